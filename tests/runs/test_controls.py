"""The controls of a run, on whole runs: --epochs, --max_steps, --schedule, --profile, --report_to and --init_from."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.native_files import with_adapter
from support.run_files import assert_close_run, assert_same_run, files_of, losses, metrics, run_settings, status
from support.run_helpers import Base, run, run_ranks, write_base
from support.run_preludes import kill_at_step

from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.training.throughput import StepProfiler

pytestmark = pytest.mark.distributed


def test_epochs_are_counted_and_may_be_given_as_steps(base: Base, tmp_path: Path) -> None:
    """24 samples in batches of 4: an epoch is six steps, packed or not, on one rank or two."""
    ended = run(base, tmp_path / "run", max_steps=None, epochs=1.5, warmup_steps=None)
    assert status(tmp_path / "run") == {"state": "finished", "step": 9, "reason": "max_steps"}
    settings = run_settings(tmp_path / "run")
    assert (settings["epochs"], settings["max_steps"], settings["warmup_steps"]) == (1.5, 9, 9)
    assert "9 steps, for --epochs 1.5 of 24 training samples at 4 per step" in ended.outputs[0]
    run(base, tmp_path / "steps", ranks=2, max_steps=9, warmup_steps=9, packing=False)
    assert_close_run(tmp_path / "steps", tmp_path / "run")
    again = ["--config", str(tmp_path / "run" / "run.yaml"), "--output_dir", str(tmp_path / "again"), "--dry_run"]
    assert "  9 steps, 36 samples" in run_ranks(again, folder=tmp_path).expect(0).outputs[0]


def test_a_constant_schedule_continues_where_it_ended(base: Base, tmp_path: Path) -> None:
    """A finished run of 4 steps, continued to 10, is the run of 10 steps, bit for bit.

    4 steps have 4 of warm-up by default; of the 10 they stay 4, in the rates and in the record.
    """
    constant = {"schedule": "constant", "beta2": 0.99}
    run(base, tmp_path / "long", warmup_steps=4, **constant)
    run(base, tmp_path / "short", max_steps=4, warmup_steps=None, **constant)
    assert status(tmp_path / "short")["step"] == 4
    run(base, tmp_path / "short", max_steps=10, warmup_steps=None, resume="auto", **constant)
    assert_same_run(tmp_path / "short", tmp_path / "long")
    rates = [row["learning_rate"] for row in metrics(tmp_path / "short")]
    assert rates == [5e-3, 1e-2, 1.5e-2, *[2e-2] * 7]
    assert run_settings(tmp_path / "short")["warmup_steps"] == 4


def test_a_run_records_and_prints_the_rate_of_the_rule(base: Base, tmp_path: Path) -> None:
    """And continued for more steps it keeps its own."""
    given = {"learning_rate": "auto", "alpha": 300, "schedule": "constant", "beta2": 0.99}
    again = partial(run, base, tmp_path / "run", **given)
    ended = again(max_steps=4)
    rate, factors = run_settings(tmp_path / "run")["learning_rate"], [0.5, *[1.0] * 7]
    plan = plan_run(make_settings(base.settings(**given, max_steps=4)), rank=0, world_size=1)
    assert rate == plan.auto_rate != plan_run(plan.settings.completed(max_steps=6400), rank=0, world_size=1).auto_rate
    assert ["rate", f"{rate:g}", "(auto)"] in [line.split() for line in ended.outputs[0].splitlines()]
    again(max_steps=8, resume="auto")
    assert [row["learning_rate"] for row in metrics(tmp_path / "run")] == [rate * factor for factor in factors]
    assert run_settings(tmp_path / "run")["learning_rate"] == rate


def test_profile_writes_a_trace_of_each_rank(base: Base, tmp_path: Path) -> None:
    """Steps 3 and 4; and with an end before LAST, what there was. Without trackers and figures, none is needed."""
    without = _lacks_trackers_and_figures
    ended = run(base, tmp_path / "run", ranks=2, max_steps=5, profile="3:4", report_to="none", prelude=without)
    assert "note: loss.png is not drawn without matplotlib; install it with: pip install" in ended.errors[0]
    assert not (tmp_path / "run" / "loss.png").exists()
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["rank_0.json.gz", "rank_1.json.gz"]
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = {event.get("name") for event in events}
        end = max(event["ts"] + event["dur"] for event in events if event.get("name") == "step 4")
        assert max(event["ts"] for event in events if event.get("cat") == "cpu_op") <= end
        assert {"step 3", "step 4", "aten::mm"} <= names and not {"step 2", "step 5"} & names
    assert not (tmp_path / "run" / "tensorboard").exists() and len(metrics(tmp_path / "run")) == 5
    run(base, tmp_path / "ends", max_steps=3, profile="3:9")
    assert (tmp_path / "ends" / "profile" / "rank_0.json.gz").is_file()
    ended = run(base, tmp_path / "ends", max_steps=3, profile="2:9", resume="auto")
    note = "note        --profile 2:9: the run continues after step 3, so steps 2 to 3 are not recorded"
    assert note in ended.outputs[0].splitlines()


def _lacks_trackers_and_figures() -> None:
    for name in ("tensorboard", "matplotlib", "accelerate"):
        sys.modules[name] = None  # type: ignore[assignment]


def test_a_run_that_ends_before_the_profiled_steps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, last_step in ((0, 4), (0, 5), (1, 4)):
        StepProfiler("5:6", RunFolder(tmp_path), rank=rank).finish(last_step=last_step)
    StepProfiler(None, RunFolder(tmp_path), rank=0).finish(last_step=4)
    assert capsys.readouterr().err == "note: --profile: the run ended after step 4, before step 5\n"


def test_dropout_is_for_training_steps_and_resumes_anywhere(base: Base, tmp_path: Path) -> None:
    """tl1 begins with an update that is not zero, so its first evaluation would show dropout."""
    settings = {"method": "tl1", "targets": "qkv,down_proj", "max_steps": 4, "save_interval": 2}
    run(base, tmp_path / "plain", **settings)
    run(base, tmp_path / "run", dropout=0.3, **settings)
    found, plain = (losses(tmp_path / name, "validation") for name in ("run", "plain"))
    assert found[0] == plain[0] and found[1] != plain[1]
    assert losses(tmp_path / "run")[0] != losses(tmp_path / "plain")[0]
    middle = tmp_path / "run" / "checkpoints" / "step_2"
    run(base, tmp_path / "on", ranks=2, resume=middle, tensor_parallel=2, packing=False, dropout=0.3, **settings)
    assert_close_run(tmp_path / "on", tmp_path / "run")


# --init_from: what a run starts with, what it records, and that it resumes without that folder ------------------------


@pytest.fixture(scope="module")
def started(base: Base) -> Path:
    """Four steps from a `vera` in base.folder/start; the run's settings name none of its facts."""
    _, native, _ = with_adapter(base.model, "vera", (2, 3), targets=("qkv", "down_proj"))
    save_adapter(base.folder / "start", native)
    run(base, base.folder / "started", rank=None, max_steps=4, init_from=base.folder / "start")
    return base.folder / "started"


def test_a_run_starts_with_the_adapter_at_step_0(base: Base, started: Path) -> None:
    settings, start = run_settings(started), load_native_adapter(base.folder / "start")
    assert settings["init_from"] == str(base.folder / "start")
    assert settings["init_from_sha256"] == file_sha256(base.folder / "start/adapter_model.safetensors")
    sources = {str(file): file_sha256(file) for file in (base.train, base.validation)}
    assert settings["data_sha256_by_source"] == sources
    facts = start.config.facts
    assert {name: settings[name] for name in facts} == facts
    trained = load_native_adapter(started / "adapter")
    assert trained.config.facts == facts
    for name, tensor in trained.state.items():
        assert tensor.equal(start.state[name]) == (name[-1] in "AB"), name
        assert (tensor - start.state[name]).abs().max() < 0.1, name  # four steps of at most 0.02
    assert metrics(started, "validation")[0]["step"] == 0
    (line,) = [line for line in (started / "logs/rank_0.log").read_text().splitlines() if line.startswith("start  ")]
    assert line.split() == ["start", "values", "of", str(base.folder / "start")]


def test_the_export_of_a_run_holds_the_native_adapter(started: Path) -> None:
    assert files_of(started / "peft/native") == files_of(started / "adapter")


def test_it_resumes_without_the_folder_that_it_started_from(base: Base, started: Path, tmp_path: Path) -> None:
    """Stopped after two steps; by then the folder holds another adapter, which a resumed run must not read."""
    start, again = tmp_path / "start", partial(run, base, tmp_path / "run", rank=None, max_steps=4)
    shutil.copytree(base.folder / "start", start)
    again(init_from=start, prelude=partial(kill_at_step, 2), expect=143)
    shutil.rmtree(start)
    _, other, _ = with_adapter(base.model, "lora", seed=9)
    save_adapter(start, other)
    again(init_from=start, resume="auto")
    assert_same_run(tmp_path / "run", started)
    names = ("init_from_sha256", "data_sha256_by_source")
    ran, before = run_settings(tmp_path / "run"), run_settings(started)
    assert [ran[name] for name in names] == [before[name] for name in names]
    shutil.rmtree(start)
    ended = again(init_from=start, resume="auto")  # a finished run ends at once
    assert "resumed from step 4" in ended.outputs[0]


def test_another_base_needs_a_flag(base: Base, started: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path, seed=3)
    ended = run(other, tmp_path / "run", rank=None, max_steps=2, init_from=base.folder / "start", expect=2)
    said = ended.error_line()
    assert said.startswith(f"error: --init_from {base.folder / 'start'}: trained on {base.model}, whose weights differ")
    assert not (tmp_path / "run" / "checkpoints").exists()
    options = {"init_from": base.folder / "start", "base_differs": True, "output_dir": tmp_path / "again"}
    ended = run(other, tmp_path / "again", rank=None, max_steps=2, **options)
    assert "note        --init_from" in ended.outputs[0]
    stored = load_native_adapter(tmp_path / "again" / "adapter")
    start = load_native_adapter(base.folder / "start")
    assert stored.base_identity.base_weights_hash != start.base_identity.base_weights_hash
    assert load_file(tmp_path / "again/peft/native/adapter_model.safetensors").keys() == stored.state.keys()
