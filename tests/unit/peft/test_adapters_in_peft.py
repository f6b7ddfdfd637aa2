"""What PEFT's users do with adapters: several side by side, off and on, merged, trained, deleted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hf_models import hf_model, write_adapter, write_bases
from peft import PeftModel, get_peft_model
from peft_models import logits_of
from safetensors.torch import load_file

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.peft import TiedLoraConfig, TiedLoraLinear


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models, with adapters "one" (all targets) and "two" (the MLP alone) of the llama."""
    root = tmp_path_factory.mktemp("bases")
    found = write_bases(root)
    one = write_adapter(root / "one", found["llama"], "tl6", "all")
    two = write_adapter(root / "two", found["llama"], "vera", "mlp", seed=5)
    assert one.config.rank == two.config.rank
    return {**found, "one": root / "one", "two": root / "two"}


def both(bases: dict[str, Path], *, trained: bool = False) -> PeftModel:
    model = PeftModel.from_pretrained(hf_model(bases["llama"]), bases["one"], adapter_name="one", is_trainable=trained)
    model.load_adapter(str(bases["two"]), "two")
    return model


def trained_names(model: PeftModel) -> set[str]:
    return {
        name.partition("tied_lora_adapters.")[2] for name, weight in model.named_parameters() if weight.requires_grad
    }


def test_adapters_side_by_side(bases: dict[str, Path], tmp_path: Path) -> None:
    alone = {
        name: logits_of(PeftModel.from_pretrained(hf_model(bases["llama"]), bases[name])) for name in ("one", "two")
    }
    plain, model = logits_of(hf_model(bases["llama"])), both(bases)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits_of(model), alone[name]) and not torch.equal(alone[name], plain)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(model), alone["one"])
    model.base_model.set_adapter(["one", "two"])
    together = logits_of(model)
    assert not torch.equal(together, alone["one"]) and not torch.equal(together, alone["two"])
    model.save_pretrained(tmp_path)
    assert all(load_native_adapter(tmp_path / name).equals(load_native_adapter(bases[name])) for name in ("one", "two"))
    model.base_model.set_adapter("one")
    model.delete_adapter("one")
    assert model.active_adapters == ["two"] and torch.equal(logits_of(model), alone["two"])
    assert not any(".one." in name for name in model.state_dict())
    assert torch.equal(logits_of(model.unload()), plain)


def test_loading_another_adapter_freezes_nothing(bases: dict[str, Path]) -> None:
    factors = {f"one.{target}{factor}" for target in ("", "o_proj.", "gate_up.", "down_proj.") for factor in "ABuv"}
    model = both(bases, trained=True)
    assert trained_names(model) == factors
    model.set_adapter("two")  # a vera: A and B stay frozen
    assert trained_names(model) == {f"two.{target}.{factor}" for target in ("gate_up", "down_proj") for factor in "uv"}
    model.set_adapter("one")
    assert trained_names(model) == factors
    with model.disable_adapter():
        assert trained_names(model) == set()
    assert trained_names(model) == factors
    again = copy.deepcopy(model)  # as trainers make reference models
    assert trained_names(again) == factors and torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_bits_of_the_merged_folder(
    bases: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    native = write_adapter(tmp_path / "native", bases[family], "tl6", "all")
    hf_model(bases[family], dtype).save_pretrained(tmp_path / "base")
    merge_adapter(find_model(str(tmp_path / "base")), native, tmp_path / "merged", tokenizer=str(bases[family]))
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    for safe in (False, True):
        model = PeftModel.from_pretrained(hf_model(bases[family], dtype), tmp_path / "native")
        merged = model.merge_and_unload(safe_merge=safe)
        assert not any(isinstance(module, TiedLoraLinear) for module in merged.modules())
        found = merged.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_merging_and_unmerging(bases: dict[str, Path]) -> None:
    model, plain = both(bases), logits_of(hf_model(bases["llama"]))
    separate = logits_of(model)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), separate, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():  # PEFT unmerges then
        torch.testing.assert_close(logits_of(model), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model), separate, rtol=1e-4, atol=1e-4)
    model.merge_adapter(["one", "two"])
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), separate, rtol=1e-4, atol=1e-4)


def test_names_of_tensors_are_no_names_of_adapters(bases: dict[str, Path]) -> None:
    for name in ("A", "v", "o_proj"):
        with pytest.raises(UserError, match=f"adapter name '{name}' is a tensor's name"):
            get_peft_model(hf_model(bases["llama"]), TiedLoraConfig(), adapter_name=name)
    model = both(bases)
    with pytest.raises(UserError, match="tensor's name"):
        model.load_adapter(str(bases["one"]), "u")
    assert set(model.peft_config) == {"one", "two"} and torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_step_with_gradient_checkpointing_is_the_step_without(bases: dict[str, Path], reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = hf_model(bases["llama"])
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = get_peft_model(base, TiedLoraConfig(r=2, targets="all"))
        model.train()
        tokens = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(2))
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert len(gradients[0]) == 16 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
