"""The ZeRO section's own list of names and types, beside DeepSpeed's, and the import of its Muon."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.batch import plan_batches
from megatron_tiedlora.engine.engine import import_muon_uncompiled
from megatron_tiedlora.engine.engine_json import ZeroSection, load_engine_config

LEFT_OUT = {"zenflow", "leaf_module"}
OFFLOADS = {"offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig, "offload_param": DeepSpeedZeroOffloadParamConfig}
VALUES = [True, False, None, 0, 1, 2, 3, 4, -1, 5e8, 0.5, 1.0, 1.5, 1e30, 10**30, math.nan, math.inf, "", "x", "5",
          "0.5", "true", "false", "none", "cpu", "nvme", "/tmp", [], [1], {}, {"device": "cpu"}, {"a": 1}]  # fmt: skip


def load(file: Path, zero: dict[str, Any]) -> dict[str, Any]:
    file.write_text(json.dumps({"zero_optimization": zero}))
    values = load_engine_config(str(file), batches=plan_batches(8, 2, 2), gradient_clipping=1.0).values
    return dict(values["zero_optimization"])


def test_the_names_are_those_of_deepspeed() -> None:
    deprecated = {
        name
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
    }
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ZeroSection.model_fields) == names - deprecated - LEFT_OUT and names > LEFT_OUT


FIELDS = [(None, name) for name in ZeroSection.model_fields]
FIELDS += [(section, name) for section, kind in OFFLOADS.items() for name in kind.model_fields]


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_every_value_that_is_taken_deepspeed_takes_too(tmp_path: Path, section: str | None, name: str) -> None:
    taken = 0
    for value in VALUES:
        given = {name: value} if section is None else {section: {"device": "cpu", name: value}}
        try:
            zero = load(tmp_path / "engine.json", {"stage": 3, **given})
        except UserError as error:
            assert f"engine.json: zero_optimization.{section or name}" in str(error), error
        else:
            DeepSpeedZeroConfig(**zero)
            taken += 1
    assert taken


def test_deepspeed_s_own_defaults_are_taken(tmp_path: Path) -> None:
    """But for those of fields whose null says nothing, such as a section that is left out."""
    default = DeepSpeedZeroConfig().model_dump(by_alias=True)
    for name in ZeroSection.model_fields:
        if default[name] is not None or name == "overlap_comm":
            load(tmp_path / "engine.json", {name: default[name]})


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage3_max_liv_parameters": 1}, "did you mean stage3_max_live_parameters?"),
        ({"max_live_parameters": 1}, "did you mean stage3_max_live_parameters?"),
        ({"cpu_offload": True}, "unknown key 'zero_optimization.cpu_offload'"),
        ({"zenflow": {}}, "unknown key 'zero_optimization.zenflow'"),
        ({"overlap_comm": "maybe"}, "zero_optimization.overlap_comm = 'maybe'"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio is for stage 3"),
        ({"offload_param": {"device": "disk"}}, "zero_optimization.offload_param.device = 'disk'"),
    ],
)
def test_wrong_values_are_one_line(tmp_path: Path, zero: dict[str, Any], said: str) -> None:
    message = refusal(load, tmp_path / "engine.json", zero)
    assert "engine.json: " in message and said in message


# Muon, which costs a second of every start if it is compiled ----------------------------------------------------------

MUON = "deepspeed.runtime.zero.muon.original_muon"
SWITCH = "TORCHDYNAMO_DISABLE"


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_muon_is_imported_uncompiled(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """And the switch is as it was, so that what else is compiled afterwards is compiled."""
    monkeypatch.delitem(sys.modules, MUON, raising=False)
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    import_muon_uncompiled()
    functions = [function for function in vars(sys.modules[MUON]).values() if isinstance(function, FunctionType)]
    assert "zeropower_via_newtonschulz5" in {function.__name__ for function in functions}
    assert not [function for function in functions if hasattr(function, "_torchdynamo_orig_callable")]
    assert os.environ.get(SWITCH) == before
