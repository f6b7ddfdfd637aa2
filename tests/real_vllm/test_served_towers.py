"""Adapters of the text models of multimodal folders: a real vLLM answers texts as the merged model does.

vLLM starts such a model with its processor. Native adapters and exports have the names of transformers' multimodal
class, which vLLM renames. Tied slots are those of the text model alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.served_models import ServedModel
from support.vllm_engine import TOLERANCE, questions_of, wrong_answers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
_SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "num_layers": 4, "intermediate_size": 96}
TOWERS: dict[str, dict[str, Any]] = {
    "mistral3": {"family": "mistral3", **_SIZES, "sliding_window": None},
    "gemma3": {"family": "gemma3", **_SIZES, "sliding_window": 64, "query_pre_attn_scalar": 32}
    | {"layer_kinds": ("sliding_attention", "full_attention")},
}
IMAGE = {"mistral3": ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), "gemma3": ("<start_of_image>", "<end_of_image>", "<image>")}


def write_processor(folder: Path, family: str) -> None:
    """The files of a processor of small images, whose tokens are added to the tokenizer."""
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE[family])})
    ids = [tokenizer.convert_tokens_to_ids(token) for token in IMAGE[family]]
    if family == "mistral3":
        images: Any = transformers.PixtralImageProcessor(
            size={"longest_edge": 16}, patch_size={"height": 4, "width": 4}
        )
        processor: Any = transformers.PixtralProcessor(images, tokenizer, patch_size=4, spatial_merge_size=2)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "image_token_index": ids[0]}))
    else:
        for name, token, number in zip(("boi", "eoi", "image"), IMAGE[family], ids, strict=True):
            tokenizer.init_kwargs[f"{name}_token"] = token
            setattr(tokenizer, f"{name}_token", token)
            setattr(tokenizer, f"{name}_token_id", number)
        images = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16})
        processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module", params=TOWERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A multimodal base with a processor, and adapters of its text model."""
    served = ServedModel(request.param, tmp_path_factory.mktemp("tower"), TOWERS[request.param])
    write_processor(served.folder, request.param)
    return served


@pytest.mark.parametrize("mode", ["default", "tied", "both"])
def test_adapters_of_a_text_tower(model: ServedModel, started: Any, mode: str) -> None:
    # vLLM does not load the vision tower of Gemma 3 by the names with which transformers 5.20 and later write it.
    engine = started(model, mode, **({"limit_mm_per_prompt": {"image": 0}} if model.name == "gemma3" else {}))
    adapters = [model.of_method("tl6", "some"), model.exported("tl6", "all", native=True)]
    if mode != "tied":
        adapters += [model.of_method("lora", "qkv"), model.exported("tl6", "all", native=False)]
    asked = questions_of(*adapters) + (questions_of(model.base, most=2) if mode != "default" else [])
    assert not wrong_answers(asked, engine.ask(asked), TOLERANCE)
