"""The Python interface: adapters on transformers' models, what is rejected, and that it loads nothing before use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import python
from hf_models import hf_model, write_adapter, write_bases
from peft import PeftModel, get_peft_model
from peft_models import logits_of
from safetensors.torch import load_file
from tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

import megatron_tiedlora as tiedlora
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.peft import TiedLoraConfig, TiedLoraLinear


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_attached_is_the_export_and_detached_is_the_base(
    bases: dict[str, Path], tmp_path: Path, method: str, family: str
) -> None:
    base = bases[family]
    native = write_adapter(tmp_path / "native", base, method, "all")
    export_peft(find_model(str(base)), native, tmp_path / "peft")
    adapter = tiedlora.load_adapter(tmp_path / "native")
    model = hf_model(base)
    plain, names = logits_of(model), list(model.state_dict())
    assert tiedlora.attach(model, adapter) is model
    attached = logits_of(model)
    assert torch.equal(attached, logits_of(PeftModel.from_pretrained(hf_model(base), tmp_path / "peft")))
    assert list(model.state_dict()) == names and (attached - plain).abs().max() > 0.05
    assert torch.equal(logits_of(tiedlora.detach(model)), plain)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_has_the_bits_of_the_merged_folder(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype, family: str
) -> None:
    """Merged directly, after it was attached, and by PEFT."""
    native = write_adapter(tmp_path / "native", bases[family], targets="all")
    hf_model(bases[family], dtype).save_pretrained(tmp_path / "base")
    merge_adapter(find_model(str(tmp_path / "base")), native, tmp_path / "merged", tokenizer=str(bases[family]))
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    ours = tiedlora.merge(hf_model(bases[family], dtype), native)
    attached = tiedlora.merge(tiedlora.attach(hf_model(bases[family], dtype), native))
    by_peft = [
        PeftModel.from_pretrained(hf_model(bases[family], dtype), tmp_path / "native").merge_and_unload(safe_merge=safe)
        for safe in (False, True)
    ]
    for model in (ours, attached, *by_peft):
        found = model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not any(isinstance(module, TiedLoraLinear) for module in model.modules())
    for model in (ours, attached):
        with pytest.raises(tiedlora.UserError, match="an adapter is merged into the model already; load the model"):
            tiedlora.attach(model, native)


def test_five_lines_load_an_adapter_and_generate(bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tmp_path / "native", bases["llama"], targets="all", scale=1.0)
    adapter = tiedlora.load_adapter(tmp_path / "native")
    model = tiedlora.attach(tiedlora.load_base(adapter), adapter)
    answer = tiedlora.generate(model, "The sky is", max_new_tokens=12)
    merged = tiedlora.merge(tiedlora.load_base(adapter), adapter)
    several = tiedlora.generate(merged, ["The sky is", "Another"], max_new_tokens=12)
    assert several[0] == answer and len(several) == 2
    assert answer != tiedlora.generate(tiedlora.detach(model), "The sky is", max_new_tokens=12)


def test_what_does_not_fit_is_one_line(bases: dict[str, Path], tmp_path: Path) -> None:
    native = write_adapter(tmp_path / "native", bases["llama"])
    model = tiedlora.attach(hf_model(bases["llama"]), native)
    with pytest.raises(tiedlora.UserError, match=r"the model has an adapter already; detach\(model\) first"):
        tiedlora.attach(model, native)
    tiedlora.detach(model)
    with pytest.raises(tiedlora.UserError, match=r"no attached adapter; attach\(model, adapter\) first"):
        tiedlora.detach(model)
    other = hf_model(write_tiny_model(tmp_path / "other", head_dim=12, seed=1))
    with pytest.raises(tiedlora.UserError, match=r"whose weights differ from .*'s; use its own base, or base_d"):
        tiedlora.attach(other, native)
    tiedlora.detach(tiedlora.attach(other, native, base_differs=True))
    with pytest.raises(tiedlora.UserError, match="has 8; use its own base"):
        tiedlora.attach(hf_model(bases["phi3"]), native, base_differs=True)
    with pytest.raises(tiedlora.UserError, match="Linear is not a model of transformers"):
        tiedlora.attach(torch.nn.Linear(2, 2), native)
    with pytest.raises(tiedlora.UserError, match=r"the model has no model.norm.weight; give the whole causal model"):
        tiedlora.attach(hf_model(bases["llama"]).model, native)
    export_peft(find_model(str(bases["llama"])), native, tmp_path / "peft")
    with pytest.raises(tiedlora.UserError, match="this is a PEFT adapter; load it with PEFT, or import it"):
        tiedlora.load_adapter(tmp_path / "peft")
    with pytest.raises(tiedlora.UserError, match="no such folder"):
        tiedlora.load_adapter(tmp_path / "nothing")


def test_a_merged_model_is_not_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """Also if another program has merged."""
    import megatron_tiedlora.peft  # noqa: F401 (registers the method)

    native = write_adapter(tmp_path / "native", bases["llama"], targets="all")
    merged = PeftModel.from_pretrained(hf_model(bases["llama"]), tmp_path / "native").merge_and_unload()
    with pytest.raises(tiedlora.UserError, match="whose weights differ"):
        tiedlora.attach(merged, native)


def test_the_names_are_there_and_load_nothing_before_use() -> None:
    assert set(tiedlora.__all__) <= set(dir(tiedlora))
    assert all(getattr(tiedlora, name) is not None for name in tiedlora.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Setting'"):
        _ = tiedlora.Setting  # type: ignore[attr-defined]
    code = (
        "import sys, megatron_tiedlora as t; t.Settings, t.UserError, dir(t);"
        " print([name for name in ('torch', 'transformers', 'deepspeed', 'peft') if name in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"


# Models whose weights accelerate keeps on the disk ------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(bases: dict[str, Path]) -> NativeAdapter:
    return write_adapter(bases["llama"].parent / "native", bases["llama"], targets="all")


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
def offloaded(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path) -> Any:
    return load(bases["llama"], tmp_path, rest=request.param)


def test_attached_to_an_offloaded_model_it_gives_the_same_bits(
    bases: dict[str, Path], native: NativeAdapter, offloaded: Any
) -> None:
    whole = hf_model(bases["llama"])
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
    bases: dict[str, Path], native: NativeAdapter, tmp_path: Path
) -> None:
    offloaded = load(bases["llama"], tmp_path, rest="disk")
    norm = offloaded.model.norm
    assert norm.weight.is_meta
    norm._hf_hook.weights_map = {"weight": torch.zeros_like(norm.weight, device="cpu")}
    with pytest.raises(tiedlora.UserError, match="whose weights differ from"):
        tiedlora.attach(offloaded, native)


def test_peft_rejects_it_in_one_line(bases: dict[str, Path], native: NativeAdapter, offloaded: Any) -> None:
    """PEFT's from_pretrained distributes the model again; without that, a new adapter is trained in place."""
    new = get_peft_model(offloaded, TiedLoraConfig(method="tl6", r=4))
    assert torch.equal(logits_of(new), logits_of(hf_model(bases["llama"])))  # tl6 begins with no update
    new.unload()
    with pytest.raises(tiedlora.UserError, match=r"PEFT cannot load .* partly offloaded \(device_map\); load"):
        PeftModel.from_pretrained(offloaded, bases["llama"].parent / "native")
