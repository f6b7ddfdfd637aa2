"""--init_from a PEFT LoRA: its training goes on as in PEFT, with a new optimizer and the same schedule, where PEFT too
has one A for the modules that are one linear here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_runs import EngineRun, relative_errors, run_engine
from support.peft_models import lora_model
from support.peft_training import peft_losses, settings_for_peft
from support.tiny_models import write_tiny_model

STEPS = 10
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # the module whose A a module shares
# Options of PEFT's LoraConfig; alpha / r is not 1.
ADAPTERS: dict[str, dict[str, Any]] = {
    "o_and_down": {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "tied": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
}
CLOSE = 1e-5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Nothing of the adapter is given."""
    folder = tmp_path_factory.mktemp("settings")
    model = write_tiny_model(folder / "model", head_dim=12, intermediate_size=40)
    settings = {**settings_for_peft(model, folder), "max_steps": STEPS}
    return {name: value for name, value in settings.items() if name not in ("rank", "alpha")}


def tie(model: Any) -> Any:
    """PEFT's model with one A for q, k and v of a layer, and one for gate and up."""
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last in FIRST and hasattr(module, "lora_A"):
            module.lora_A["default"].weight = model.get_submodule(f"{parent}.{FIRST[last]}").lora_A["default"].weight
    return model


@pytest.fixture(scope="module")
def folders(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapters as PEFT writes them."""
    root = tmp_path_factory.mktemp("peft")
    for name, options in ADAPTERS.items():
        tie(lora_model(Path(settings["model"]), **options)).save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS}


def expected_losses(settings: Mapping[str, Any], folder: Path) -> list[float]:
    """PEFT's, from its own files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model = tie(PeftModel.from_pretrained(base, str(folder), is_trainable=True)).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # a shared one is there once
    return peft_losses(model, trained, dict(settings))


@pytest.fixture(scope="module")
def ours(
    settings: dict[str, Any], folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EngineRun]:
    """This package's runs from these folders, in one start of one rank."""
    cases = [{"settings": {**settings, "init_from": str(folder)}} for folder in folders.values()]
    return dict(zip(folders, run_engine(cases, tmp_path_factory.mktemp("runs"), ranks=1), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ADAPTERS)
def test_training_goes_on_as_peft_s(
    settings: dict[str, Any], folders: dict[str, Path], ours: dict[str, EngineRun], name: str
) -> None:
    expected = expected_losses(settings, folders[name])
    assert max(relative_errors(ours[name].losses, expected)) <= CLOSE
    assert expected[-1] < expected[0] - 0.01


@pytest.mark.distributed
def test_every_layout_starts_with_the_same_values(
    settings: dict[str, Any], folders: dict[str, Path], ours: dict[str, EngineRun], tmp_path: Path
) -> None:
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "init_from": str(folders["tied"])}
    (split,) = run_engine([{"settings": {**settings, **layout}}], tmp_path, ranks=4)
    assert max(relative_errors(split.losses, ours["tied"].losses)) <= CLOSE
