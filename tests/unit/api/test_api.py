"""The Python interface: adapters on transformers' models, what is rejected, and that it loads nothing before use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import hf_model, write_adapter, write_bases
from peft import PeftModel
from peft_models import logits_of
from safetensors.torch import load_file
from tiny_models import write_tiny_model

import megatron_tiedlora as tiedlora
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_has_the_bits_of_the_merged_folder(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    native = write_adapter(tmp_path / "native", bases["llama"], targets="all")
    hf_model(bases["llama"], dtype).save_pretrained(tmp_path / "base")
    merge_adapter(find_model(str(tmp_path / "base")), native, tmp_path / "merged", tokenizer=str(bases["llama"]))
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    direct = tiedlora.merge(hf_model(bases["llama"], dtype), native)
    attached = tiedlora.merge(tiedlora.attach(hf_model(bases["llama"], dtype), native))
    for model in (direct, attached):
        found = model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
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
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
