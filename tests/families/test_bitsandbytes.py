"""transformers with bitsandbytes as an outside witness of --base nf4: the same codes, logits and, in PEFT, training."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_runs import relative_distance, relative_errors, run_engine, save_start
from support.native_files import with_adapter
from support.oracle import OracleAdapter, OracleConfig
from support.oracle_adapter import ALL_TARGETS
from support.peft_models import hf_model, nf4_model
from support.peft_training import peft_losses, settings_for_peft, through_lora_on_all_linears
from support.quantised_models import with_values
from support.tiny_models import random_adapter, write_tiny_model

import megatron_tiedlora as tiedlora
from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.checkpoint.base_identity import check_same_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 320,
    "num_layers": 3,
}
FUSED = {"attention.qkv": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bnb") / "model", dtype=torch.bfloat16, tokenizer=False, **SHAPE)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return nf4_model(folder)


def test_codes_and_scales_are_theirs(folder: Path, theirs: Any) -> None:
    ours = frozen_weights(load_model(find_model(str(folder)), None, dtype=torch.bfloat16, base_format="nf4"))
    compared = 0
    for index, layer in enumerate(theirs.model.layers):
        linears = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
        for name, weight in ours.items():
            if not name.startswith(f"layers.{index + 1}.") or not isinstance(weight, QuantisedWeight):
                continue
            own = name.removeprefix(f"layers.{index + 1}.").removesuffix(".weight")
            names = FUSED.get(own, ({"attention.output": "o_proj", "mlp.down": "down_proj"}.get(own, own),))
            stored = [linears[part].weight for part in names]
            codes = torch.cat([part.data.flatten() for part in stored])
            scales = torch.cat([part.quant_state.absmax for part in stored])
            assert torch.equal(codes, weight.tensor.flatten()), name
            assert torch.equal(scales, weight.scales.flatten()), name
            compared += len(stored)
    assert compared == 7 * SHAPE["num_layers"] and BASE_FORMATS["nf4"].block == 64


@pytest.mark.parametrize("double", [False, True])
def test_a_folder_that_they_saved_has_their_values(folder: Path, tmp_path: Path, double: bool) -> None:
    """To the last bit, with nested statistics too."""
    model = nf4_model(folder, double=double)
    from bitsandbytes import functional

    model.save_pretrained(tmp_path / "saved")
    source = find_model(str(tmp_path / "saved"))
    assert source.stored is not None
    with BaseWeights(tmp_path / "saved", source.shape, source.stored) as weights:
        compared = 0
        for name, module in model.model.layers.named_modules():
            if hasattr(state := getattr(getattr(module, "weight", None), "quant_state", None), "absmax"):
                state.dtype = torch.float32
                theirs = functional.dequantize_4bit(module.weight.data, state)
                assert torch.equal(weights.read(f"model.layers.{name}.weight"), theirs), name
                assert state.nested == double
                compared += 1
    assert compared == 7 * SHAPE["num_layers"]


def test_logits_are_theirs(folder: Path, theirs: Any) -> None:
    """In bf16 within what it rounds: a plain model's logits differ nearly as much from transformers'.

    Autograd is on, because bitsandbytes' kernel without it (0.50.2, on CPUs with bf16) rounds scales to bf16.
    """
    tokens = torch.randint(3, 320, (2, 48), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(48).expand_as(tokens)
    source = find_model(str(folder))

    def distance(base: str | None, other: Any) -> float:
        model = load_model(source, None, dtype=torch.bfloat16, base_format=base)
        ours = model.predict(tokens, positions).detach().float()
        logits = other(tokens).logits.detach().float()
        return float((ours - logits).norm() / logits.norm())

    plain = distance(None, hf_model(folder, torch.bfloat16))
    assert distance("nf4", theirs) <= 1.5 * plain < 0.03
    assert distance(None, theirs) > 0.05


def test_a_tied_adapter_in_peft_is_of_nf4(folder: Path, theirs: Any, tmp_path: Path) -> None:
    """So what it is used with here is in nf4 too, and is compared as far as PEFT knew the base."""
    peft = pytest.importorskip("peft")
    from megatron_tiedlora.peft import TiedLoraConfig

    peft.get_peft_model(theirs, TiedLoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    base = load_native_adapter(tmp_path / "adapter").base_identity
    assert base.base_format == "nf4" and base.base_sample is None
    (note,) = check_same_base(base, replace(base, base_sample="known"), source="adapter")
    assert note.startswith("adapter: saved when its base's weights were quantised or offloaded, so the base is ")


def test_a_model_in_another_format_than_in_training_is_said(folder: Path, theirs: Any) -> None:
    """In both directions, once an adapter is put on it; not if both are the same."""
    plain = hf_model(folder, torch.bfloat16)
    _, native, _ = with_adapter(folder, "tl6")
    on_nf4 = replace(native, base_identity=replace(native.base_identity, base_format="nf4"))
    said = "in fp32, but this uses it in nf4; the losses differ"
    for model, adapter, expected in (
        (plain, on_nf4, "in nf4, but this uses it in bf16; the losses differ"),
        (theirs, native, said),
        (plain, native, None),
        (theirs, on_nf4, None),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiedlora.detach(tiedlora.attach(model, adapter))
        found = [entry for entry in caught if "the adapter: trained on" in str(entry.message)]
        assert [str(entry.message).endswith(str(expected)) for entry in found] == [True] * (expected is not None)
        assert all(entry.filename == __file__ for entry in found)


# PEFT's QLoRA ---------------------------------------------------------------------------------------------------------


def peft_run(
    settings: dict[str, Any], start: OracleAdapter, *, nf4: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of PEFT's run on a bf16 base that transformers loads, in nf4 or as it is; its factors at the end."""
    folder = Path(settings["model"])
    model, tensors = through_lora_on_all_linears(nf4_model(folder) if nf4 else hf_model(folder, torch.bfloat16), start)
    losses = peft_losses(model, [value for value in model.parameters() if value.requires_grad], settings)
    return losses, tensors()


@pytest.mark.slow
@pytest.mark.distributed
def test_training_follows_qlora_as_closely_as_bf16_follows_lora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'megatron_tiedlora[quantised]'")
    model = write_tiny_model(tmp_path / "model", dtype=torch.bfloat16, **SHAPE)
    changes = {"method": "lora", "targets": list(ALL_TARGETS), "dtype": "bf16", "learning_rate": 1e-3}
    settings = {**settings_for_peft(model, tmp_path), **changes}
    start = random_adapter(
        *("lora", OracleConfig.from_folder(model)),
        **{"rank": settings["rank"], "alpha": settings["alpha"], "seed": 4, "scale": 0.2, "targets": ALL_TARGETS},
    )
    cases = [
        {"settings": {**settings, **changes}, "start": str(save_start(start, tmp_path / "start.safetensors"))}
        for changes in ({}, {"base": "nf4"})
    ]
    ours, ours_nf4 = ((run.losses, run.adapter) for run in run_engine(cases, tmp_path, ranks=1))
    lora, qlora = (peft_run(settings, start, nf4=nf4) for nf4 in (False, True))
    dequantised = with_values(model, tmp_path / "dequantised", "nf4")
    lora_nf4 = peft_run({**settings, "model": str(dequantised)}, start)

    def distances(found: tuple[Any, Any], expected: tuple[Any, Any]) -> tuple[float, float]:
        """The largest relative one of the losses, and that of the changes of all factors."""
        changed, changed_there = (
            torch.cat([(adapter[name].float() - start.tensors[name]).flatten() for name in expected[1]])
            for adapter in (found[1], expected[1])
        )
        return max(relative_errors(found[0], expected[0])), relative_distance(changed, changed_there)

    # bitsandbytes' layer in PEFT rounds the base's output before the adapter's is added, so PEFT's two ways to the
    # same values differ more than bf16 alone makes them: losses 0.006, factors 0.10.
    rounded = distances(ours, lora)
    assert rounded[0] < 0.01 and rounded[1] < 0.1, rounded
    for found, allowed in (
        (distances(ours_nf4, lora_nf4), rounded),
        (distances(ours_nf4, qlora), distances(lora_nf4, qlora)),
    ):
        assert found[0] <= 0.01 and found[1] <= 1.5 * allowed[1], (found, allowed)
    assert distances(ours_nf4, lora)[1] > 0.5 and distances(ours, qlora)[1] > 0.5  # another base is another run
