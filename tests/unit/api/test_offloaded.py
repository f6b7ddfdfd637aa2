"""Models whose weights accelerate keeps on the disk: an adapter is attached exactly, and what cannot be done is one
line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import hf_model, write_adapter, write_bases
from peft import PeftModel, get_peft_model
from peft_models import logits_of
from transformers import AutoModelForCausalLM

import megatron_tiedlora as tiedlora
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.peft import TiedLoraConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bases(tmp_path_factory.mktemp("bases"))["llama"]


@pytest.fixture(scope="module")
def native(base: Path) -> NativeAdapter:
    return write_adapter(base.parent / "native", base, targets="all")


def load(base: Path, folder: Path, *, rest: str) -> Any:
    """The model with layers 2 and 3 on the disk, in `folder`; layer 1, the final norm and the head are on `rest`."""
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": rest, "model.norm": rest, "lm_head": rest}
    devices.update({f"model.layers.{index}": "disk" if index else rest for index in range(3)})
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map=devices, offload_folder=folder / "offload"
    ).eval()
    assert sum(weight.is_meta for weight in model.parameters()) > 10
    return model


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Any:
    return load(base, tmp_path, rest=request.param)


def test_attached_to_an_offloaded_model_it_gives_the_same_bits(
    base: Path, native: NativeAdapter, offloaded: Any
) -> None:
    whole = hf_model(base)
    plain, expected = logits_of(whole), logits_of(tiedlora.attach(whole, native))
    assert not torch.equal(plain, expected)
    assert torch.equal(logits_of(tiedlora.attach(offloaded, native)), expected)
    answers = [tiedlora.generate(model, "The sky is", max_new_tokens=5) for model in (offloaded, whole)]
    assert answers[0] == answers[1]
    with pytest.raises(tiedlora.UserError, match=r"q_proj.weight is quantised, offloaded or sharded; merge with"):
        tiedlora.merge(offloaded)
    assert torch.equal(logits_of(offloaded), expected)  # it is attached still
    assert torch.equal(logits_of(tiedlora.detach(offloaded)), plain)


def test_its_final_norm_is_compared_although_it_is_on_the_disk(
    base: Path, native: NativeAdapter, tmp_path: Path
) -> None:
    offloaded = load(base, tmp_path, rest="disk")
    norm = offloaded.model.norm
    assert norm.weight.is_meta
    norm._hf_hook.weights_map = {"weight": torch.zeros_like(norm.weight, device="cpu")}
    with pytest.raises(tiedlora.UserError, match="whose weights differ from"):
        tiedlora.attach(offloaded, native)


def test_peft_rejects_it_in_one_line(base: Path, native: NativeAdapter, offloaded: Any) -> None:
    """PEFT's from_pretrained distributes the model again; without that, a new adapter is trained in place."""
    new = get_peft_model(offloaded, TiedLoraConfig(method="tl6", r=4))
    assert torch.equal(logits_of(new), logits_of(hf_model(base)))  # tl6 begins with no update
    new.unload()
    with pytest.raises(tiedlora.UserError, match=r"PEFT cannot load .* partly offloaded \(device_map\); load"):
        PeftModel.from_pretrained(offloaded, base.parent / "native")
