"""Runs that start from an adapter: what they start with, what they record, and that they resume without it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from native_files import with_adapter
from run_files import assert_same_run, files_of, metrics, run_settings
from run_helpers import Base, run, write_base
from run_preludes import kill_at_step
from safetensors.torch import load_file

from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter

TARGETS = ("qkv", "down_proj")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base: Base) -> Path:
    """Four steps from a `vera` in base.folder/start; the run's settings name none of its facts."""
    _, native, _ = with_adapter(base.model, "vera", (2, 3), targets=TARGETS)
    save_adapter(base.folder / "start", native.config, native.base, native.state)
    run(base, base.folder / "whole", rank=None, max_steps=4, init_from=base.folder / "start")
    return base.folder / "whole"


def test_it_starts_with_the_adapter_at_step_0(base: Base, whole: Path) -> None:
    settings, start = run_settings(whole), load_native_adapter(base.folder / "start")
    assert settings["init_from"] == str(base.folder / "start")
    facts = start.config.facts
    assert {name: settings[name] for name in facts} == facts
    trained = load_native_adapter(whole / "adapter")
    assert trained.config.facts == facts
    for name, tensor in trained.state.items():
        assert tensor.equal(start.state[name]) == (name[-1] in "AB"), name
        assert (tensor - start.state[name]).abs().max() < 0.1, name  # four steps of at most 0.02
    assert metrics(whole, "validation")[0]["step"] == 0
    (line,) = [line for line in (whole / "logs/rank_0.log").read_text().splitlines() if line.startswith("start  ")]
    assert line.split() == ["start", "values", "of", str(base.folder / "start")]


def test_its_export_holds_the_native_adapter(whole: Path) -> None:
    assert files_of(whole / "peft/native") == files_of(whole / "adapter")


def test_it_resumes_bit_for_bit_without_the_folder(base: Base, whole: Path, tmp_path: Path) -> None:
    """Stopped after two steps; by then the folder holds another adapter, which a resumed run must not read."""
    start, again = tmp_path / "start", partial(run, base, tmp_path / "run", rank=None, max_steps=4)
    shutil.copytree(base.folder / "start", start)
    again(init_from=start, prelude=partial(kill_at_step, 2), expect=143)
    shutil.rmtree(start)
    _, other, _ = with_adapter(base.model, "lora", seed=9)
    save_adapter(start, other.config, other.base, other.state)
    again(init_from=start, resume="auto")
    assert_same_run(tmp_path / "run", whole)
    shutil.rmtree(start)
    ended = again(init_from=start, resume="auto")  # a finished run ends at once
    assert "resumed from step 4" in ended.outputs[0]


def test_another_base_needs_a_flag(base: Base, whole: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path, seed=3)
    ended = run(other, tmp_path / "run", rank=None, max_steps=2, init_from=base.folder / "start", expect=2)
    said = ended.error_line()
    assert said.startswith(f"error: --init_from {base.folder / 'start'}: trained on {base.model}, whose weights differ")
    assert not (tmp_path / "run" / "checkpoints").exists()
    options = {"init_from": base.folder / "start", "base_differs": True, "output_dir": tmp_path / "again"}
    ended = run(other, tmp_path / "again", rank=None, max_steps=2, **options)
    assert "note       --init_from" in ended.outputs[0]
    stored = load_native_adapter(tmp_path / "again" / "adapter")
    start = load_native_adapter(base.folder / "start")
    assert stored.base.base_weights_hash != start.base.base_weights_hash
    assert load_file(tmp_path / "again/peft/native/adapter_model.safetensors").keys() == stored.state.keys()
