"""A second witness: 20 steps through PEFT and transformers, with this package's PEFT method, are its own 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import EngineRun, relative_distance, relative_errors, run_engine, save_start
from hf_models import TARGETS, hf_model
from oracle import OracleAdapter, OracleConfig
from peft_training import ALPHA, RANK, peft_losses, settings_for_peft
from tiny_models import random_adapter, write_tiny_model

CASES = [("tl6", "qkv"), ("tl6", "all"), ("vera", "qkv"), ("lora", "all")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("witness")
    return settings_for_peft(write_tiny_model(folder / "model", head_dim=12), folder)


@pytest.fixture(scope="module")
def starts(settings: dict[str, Any]) -> list[OracleAdapter]:
    """Non-zero factors for each case."""
    sizes = OracleConfig.from_folder(settings["model"])
    common: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "seed": 3, "scale": 0.2}
    return [random_adapter(method, sizes, targets=TARGETS[targets], **common) for method, targets in CASES]


@pytest.fixture(scope="module")
def ours(
    settings: dict[str, Any], starts: list[OracleAdapter], tmp_path_factory: pytest.TempPathFactory
) -> list[EngineRun]:
    """This package's runs from these factors, in one start of one rank."""
    folder = tmp_path_factory.mktemp("runs")
    cases = [
        {
            "settings": {**settings, "method": start.method, "targets": list(start.targets)},
            "start": str(save_start(start, folder / f"{index}.safetensors")),
        }
        for index, start in enumerate(starts)
    ]
    return run_engine(cases, folder, ranks=1)


@pytest.mark.distributed
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_training_through_peft_is_this_package_s(
    settings: dict[str, Any], starts: list[OracleAdapter], ours: list[EngineRun], case: int
) -> None:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from megatron_tiedlora.peft import TiedLoraConfig

    start, run = starts[case], ours[case]
    config = TiedLoraConfig(method=start.method, r=RANK, alpha=ALPHA, targets=list(start.targets))
    model = get_peft_model(hf_model(Path(settings["model"])), config)
    set_peft_model_state_dict(model, dict(start.tensors))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = peft_losses(model, trained, settings)
    assert max(relative_errors(run.losses, losses)) <= 1e-6
    found = get_peft_model_state_dict(model)
    assert found.keys() == start.tensors.keys()
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, start.tensors[name])]
    assert len(changed) == len(trained)
    for name in changed:
        assert relative_distance(run.adapter[name], found[name]) <= 5e-5, name
        assert relative_distance(start.tensors[name], found[name]) > 1e-3, name  # it was trained
    assert losses[-1] < losses[0] - 0.01
