"""A merged model of every family is decoded by other programs as by transformers: llama.cpp, and CTranslate2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from family_models import LONGROPE
from native_files import with_adapter
from other_runtimes import ctranslate2_tokens, llama_cpp_tokens, needs_wheel, transformers_tokens
from tiny_models import BOS_ID, write_tiny_model

from megatron_tiedlora.convert.merge import merge_adapter

# llama.cpp makes room for this many tokens at least, and chooses longrope's factors by that.
LONG = 256
PROMPT, NEW_TOKENS = [BOS_ID, 5, 77, 250, 42], 24
# Of families that CTranslate2 reads too: default rope and no window, which it would read wrongly, and heads that divide
# the hidden size.
BOTH: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tied": True, "num_kv_heads": 4, "seed": 5},
    "qwen3": {"family": "qwen3", "head_dim": 32},
}
LLAMA_CPP: dict[str, dict[str, Any]] = BOTH | {
    "llama llama3": {"llama3_rope": True, "head_dim": 12, "attention_bias": True},
    "qwen2 linear": {"family": "qwen2", "rope": {"rope_type": "linear", "factor": 3.0}},
    "phi3": {"family": "phi3"},
    "phi3 partial": {"family": "phi3", "rope": {"partial_rotary_factor": 0.75}},
    "phi3 longrope": {
        "family": "phi3",
        "original_max_position_embeddings": LONG,
        "rope": LONGROPE | {"original_max_position_embeddings": LONG},
        "max_positions": 4 * LONG,
    },
    "stablelm": {"family": "stablelm", "use_qkv_bias": True, "rope": {"partial_rotary_factor": 0.5}},
    # llama.cpp leaves the rotation out in every fourth layer, whatever the interval
    "smollm3": {"family": "smollm3", "no_rope_layer_interval": 4, "num_layers": 5},
    "olmo2": {"family": "olmo2"},
}


class Merged(NamedTuple):
    """A merged folder, and what transformers decodes from it."""

    folder: Path
    tokens: list[int]


@pytest.fixture(scope="module")
def merged_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Merged]:
    """Makes a family's merged folder, of a base and a tl6 that is not zero, when it is first asked for."""
    made: dict[str, Merged] = {}

    def make(name: str) -> Merged:
        folder = tmp_path_factory.mktemp("merged")
        base = write_tiny_model(folder / "base", **LLAMA_CPP[name])
        source, native, _ = with_adapter(base, "tl6")
        merge_adapter(source, native, folder / "merged")
        tokens = transformers_tokens(folder / "merged", PROMPT, NEW_TOKENS)
        assert len(tokens) == NEW_TOKENS and len(set(tokens)) > 6, "the text must not repeat itself"
        assert tokens[:4] != transformers_tokens(base, PROMPT, 4), "the adapter must change it"
        return Merged(folder / "merged", tokens)

    return lambda name: made.get(name) or made.setdefault(name, make(name))


@needs_wheel("llama-cpp-py-sync")
@pytest.mark.parametrize("name", LLAMA_CPP)
def test_llama_cpp_decodes_the_same_tokens(merged_of: Callable[[str], Merged], tmp_path: Path, name: str) -> None:
    merged = merged_of(name)
    assert llama_cpp_tokens(merged.folder, PROMPT, NEW_TOKENS, scratch=tmp_path) == merged.tokens


@needs_wheel("ctranslate2")
@pytest.mark.parametrize("name", BOTH)
def test_ctranslate2_decodes_the_same_tokens(merged_of: Callable[[str], Merged], tmp_path: Path, name: str) -> None:
    merged = merged_of(name)
    assert ctranslate2_tokens(merged.folder, PROMPT, NEW_TOKENS, scratch=tmp_path) == merged.tokens
