"""Fixtures of the tests of tokenised data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.token_rows import TokenStore
from support.zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.data import cache, encode, token_dataset
from megatron_tiedlora.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The zoo's tokenizer with a chat template that marks nothing."""
    return load_tokenizer(write_zoo_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=CHATML))


@pytest.fixture
def store(tokenizer: Any, tmp_path: Path) -> TokenStore:
    """A cache of tokens in the test's own folder."""
    return TokenStore(tokenizer, tmp_path)


@pytest.fixture(params=["one process", "several"])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chunks of three rows, encoded by this process or by others; totals and hashes by blocks of seven samples."""
    monkeypatch.setattr(token_dataset, "_BLOCK", 7)
    monkeypatch.setattr(cache, "_BLOCK", 5)
    monkeypatch.setattr(encode, "CHUNK", 3)
    monkeypatch.setattr(encode, "_FEW_CHUNKS", 10**6 if request.param == "one process" else 0)
    return str(request.param)
