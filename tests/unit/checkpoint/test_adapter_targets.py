"""Native adapters on other linears than QKV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import reseal, write_native
from oracle import OracleAdapter, OracleConfig
from tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import sized_targets, targets_of
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.convert.inputs import check_base
from megatron_tiedlora.model.families import shape_from_hf


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", tokenizer=False)


def written(folder: Path, base: Path, targets: tuple[str, ...], method: str = "tl6") -> OracleAdapter:
    oracle = random_adapter(method, OracleConfig.from_folder(base), alpha=6, layers=(1, 3), targets=targets)
    write_native(folder, base, oracle)
    return oracle


@pytest.mark.parametrize("targets", [("o_proj",), ("qkv", "down_proj"), TARGET_NAMES])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_tensors_and_targets_come_back(base: Path, tmp_path: Path, method: str, targets: tuple[str, ...]) -> None:
    oracle = written(tmp_path / "a", base, targets, method)
    loaded = load_native_adapter(tmp_path / "a")
    assert loaded.config.targets == targets_of(find_model(str(base)).shape, targets)
    assert loaded.state.keys() == oracle.tensors.keys()
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in oracle.tensors.items())
    save_adapter(tmp_path / "b", loaded.config, loaded.base, loaded.state)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_config_names_the_targets_and_has_peft_s_fields(base: Path, tmp_path: Path) -> None:
    for targets in (("qkv",), ("qkv", "gate_up")):
        folder = tmp_path / "-".join(targets)
        written(folder, base, targets)
        content = json.loads((folder / CONFIG_FILE).read_text())
        assert content["format_version"] == 2 and content["targets"] == list(targets)
        assert (content["peft_type"], content["task_type"]) == ("TIED_LORA", "CAUSAL_LM")
        assert content["base_model_name_or_path"] == str(base) and content["inference_mode"] is True
        assert content["intermediate_size"] == find_model(str(base)).shape.intermediate_size


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"targets": ["qkv", "o_projj"]}, "targets ['qkv', 'o_projj'] are not some of qkv, o_proj, gate_up"),
    "order": ({"targets": ["gate_up", "qkv"]}, "in this order"),
    "twice": ({"targets": ["qkv", "qkv"]}, "in this order"),
    "none": ({"targets": []}, "targets [] are not some of"),
    "no list": ({"targets": "all"}, "wrong type"),
    "missing": ({"targets": None}, "targets is missing"),
    "no width": ({"intermediate_size": None}, "intermediate_size is missing"),
    "width": ({"intermediate_size": 7}, "gate_up.B has shape"),
    "fewer": ({"targets": ["qkv"]}, "holds a tensor 'gate_up."),
    "more": ({"targets": ["qkv", "gate_up", "down_proj"]}, "tensor down_proj.A is missing"),
    "version": ({"format_version": 1}, "format_version 1, of version '"),
    "type": ({"peft_type": "LORA"}, "this is a PEFT adapter"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_adapter_is_one_line(base: Path, tmp_path: Path, case: str) -> None:
    changes, message = DAMAGE[case]
    written(tmp_path / "adapter", base, ("qkv", "gate_up"))
    file = tmp_path / "adapter" / CONFIG_FILE
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    reseal(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        load_native_adapter(tmp_path / "adapter")
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_another_mlp_width_is_another_base(base: Path, tmp_path: Path) -> None:
    wider = write_tiny_model(tmp_path / "wider", tokenizer=False, intermediate_size=80)
    written(tmp_path / "adapter", base, ("o_proj",))
    with pytest.raises(UserError, match=r"with intermediate_size 48, but .* has 80"):
        check_base(find_model(str(wider)), load_native_adapter(tmp_path / "adapter"), differs=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_from_a_file_are_those_of_the_model(preset: str) -> None:
    shape = shape_from_hf(PRESETS[preset])
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    assert sized_targets(TARGET_NAMES, qkv_rows=shape.heads.rows, **sizes) == targets_of(shape, TARGET_NAMES)
