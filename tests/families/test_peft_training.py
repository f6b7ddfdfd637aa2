"""PEFT as a second witness: 20 steps of this package are 20 steps through PEFT and transformers, with a schedule and
samples of their own (`peft_training`).

PEFT trains this package's own PEFT method; its LoRA on `all-linear`, with one A for the modules that a target fuses;
and its LoRA and VeRA on Phi-3's fused `qkv_proj`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_runs import EngineRun, relative_distance, relative_errors, run_engine, save_start
from support.oracle import OracleAdapter, OracleConfig
from support.peft_models import BASES, TARGETS, hf_model, write_bases
from support.peft_training import ALPHA, RANK, Trained, peft_losses, settings_for_peft, through_lora_on_all_linears
from support.tiny_models import random_adapter


def through_our_method(base: Any, start: OracleAdapter) -> Trained:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from megatron_tiedlora.peft import TiedLoraConfig

    config = TiedLoraConfig(method=start.method, r=RANK, alpha=start.alpha, targets=list(start.targets))
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, dict(start.tensors))
    return model, lambda: {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


# The trained tensors by PEFT's names for them.
PHI3 = {"lora": {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}}
PHI3["vera"] = {"u": "vera_lambda_d.default", "v": "vera_lambda_b.default"}


def through_fused_projections(base: Any, start: OracleAdapter) -> Trained:
    from peft import LoraConfig, VeraConfig, get_peft_model

    common = {"task_type": "CAUSAL_LM", "r": RANK, "target_modules": ["qkv_proj"]}
    config = LoraConfig(**common, lora_alpha=start.alpha) if start.method == "lora" else VeraConfig(**common)
    model = get_peft_model(base, config)
    own, place = dict(model.named_parameters()), "base_model.model.model.layers.{}.self_attn.qkv_proj.{}"
    parameters = {
        name: [own[place.format(layer - 1, theirs)] for layer in start.layers]
        for name, theirs in PHI3[start.method].items()
    }
    with torch.no_grad():
        for name, of_layers in parameters.items():
            for parameter, value in zip(of_layers, start.tensors[name], strict=True):
                parameter.copy_(value)
        if start.method == "vera":
            model.base_model.vera_A["default"].copy_(start.tensors["A"])
            model.base_model.vera_B["default"].copy_(start.tensors["B"])
    return model, lambda: {name: torch.stack([p.detach() for p in ps]) for name, ps in parameters.items()}


@dataclass(frozen=True)
class Witness:
    """A run, how PEFT is made to take it, and how many parameters PEFT trains; a shared one is counted once."""

    base: str
    method: str
    targets: str
    through: Callable[[Any, OracleAdapter], Trained]
    trained: int
    alpha: float = ALPHA


WITNESSES = {
    "tl6-all": Witness("llama", "tl6", "all", through_our_method, 16),
    "vera-qkv": Witness("llama", "vera", "qkv", through_our_method, 2),
    "lora-all": Witness("llama", "lora", "all", through_our_method, 8),
    "lora-all-linear": Witness("llama", "lora", "all", through_lora_on_all_linears, 3 * (4 + 7)),
    "phi3-lora": Witness("phi3", "lora", "qkv", through_fused_projections, 3 * 2),
    "phi3-vera": Witness("phi3", "vera", "qkv", through_fused_projections, 3 * 2, alpha=RANK),  # PEFT's has no alpha
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By base."""
    folder = tmp_path_factory.mktemp("witness")
    return {name: settings_for_peft(model, folder) for name, model in write_bases(folder).items()}


@pytest.fixture(scope="module")
def starts(settings: dict[str, dict[str, Any]]) -> dict[str, OracleAdapter]:
    """Non-zero factors for each case."""
    sizes = {name: OracleConfig.from_folder(Path(settings[name]["model"])) for name in BASES}
    common: dict[str, Any] = {"rank": RANK, "seed": 3, "scale": 0.2}
    return {
        name: random_adapter(one.method, sizes[one.base], targets=TARGETS[one.targets], alpha=one.alpha, **common)
        for name, one in WITNESSES.items()
    }


@pytest.fixture(scope="module")
def ours(
    settings: dict[str, dict[str, Any]], starts: dict[str, OracleAdapter], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EngineRun]:
    """This package's run from some factors, all in one start of one rank."""
    folder, cases = tmp_path_factory.mktemp("runs"), []
    for name, start in starts.items():
        own = {"method": start.method, "targets": list(start.targets), "alpha": start.alpha}
        file = save_start(start, folder / f"{name}.safetensors")
        cases.append({"settings": {**settings[WITNESSES[name].base], **own}, "start": str(file)})
    return dict(zip(starts, run_engine(cases, folder, ranks=1), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("name", WITNESSES)
def test_training_is_that_of_peft(
    settings: dict[str, dict[str, Any]], starts: dict[str, OracleAdapter], ours: dict[str, EngineRun], name: str
) -> None:
    witness, start, run = WITNESSES[name], starts[name], ours[name]
    model, tensors = witness.through(hf_model(Path(settings[witness.base]["model"])), start)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == witness.trained
    losses = peft_losses(model, trained, settings[witness.base])
    assert max(relative_errors(run.losses, losses)) <= 1e-6
    found = tensors()
    assert set(start.trained) <= found.keys()
    for tensor in start.trained:
        assert relative_distance(run.adapter[tensor], found[tensor]) <= 5e-5, tensor
        assert relative_distance(start.tensors[tensor], found[tensor]) > 1e-3, tensor  # it was trained
    assert losses[-1] < losses[0] - 0.01
