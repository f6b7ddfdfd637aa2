"""Models and exports that the tests of conversions read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.native_files import Inputs, with_adapter, write_exports
from support.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, fewer key-value heads than heads, and a tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def inputs(base: Path) -> Inputs:
    """What conversions take: the base, and a tl6 adapter of its QKV with alpha / rank 1.5."""
    return with_adapter(base, "tl6")[:2]


@pytest.fixture(scope="session")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapter/, merged/, merged16/ and peft/ of that adapter."""
    return write_exports(tmp_path_factory.mktemp("exported"), base)


@pytest.fixture(scope="session")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q, k and v apart, q wider than the hidden size: rows 48, 24 and 24 of 32. Gate and up have 40."""
    folder = tmp_path_factory.mktemp("separate")
    return write_tiny_model(folder, head_dim=12, intermediate_size=40, tokenizer=False)


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-3's qkv_proj, one of 32 + 16 + 16 rows, and one of gate and up."""
    return write_tiny_model(tmp_path_factory.mktemp("fused"), family="phi3", tokenizer=False)
