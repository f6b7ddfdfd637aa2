"""The controls of a run: --epochs, a longer --max_steps, --schedule, --profile and --report_to, on whole runs."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from run_files import assert_same_run, losses, metrics, run_settings, status
from run_helpers import Base, run, run_ranks, write_base

from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.training.throughput import StepProfiler

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


def test_epochs_are_counted_and_may_be_given_as_steps(base: Base, tmp_path: Path) -> None:
    """24 samples in batches of 4: an epoch is six steps, packed or not, on one rank or two."""
    ended = run(base, tmp_path / "run", max_steps=None, epochs=1.5, warmup_steps=None)
    assert status(tmp_path / "run") == {"state": "finished", "step": 9, "reason": "max_steps"}
    settings = run_settings(tmp_path / "run")
    assert (settings["epochs"], settings["max_steps"], settings["warmup_steps"]) == (1.5, 9, 9)
    assert "9 steps, for --epochs 1.5 of 24 training samples at 4 per step" in ended.outputs[0]
    run(base, tmp_path / "steps", ranks=2, max_steps=9, warmup_steps=9, packing=False)
    for split in ("train", "validation"):
        found, expected = losses(tmp_path / "steps", split), losses(tmp_path / "run", split)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    again = ["--config", str(tmp_path / "run" / "run.yaml"), "--output_dir", str(tmp_path / "again"), "--dry_run"]
    assert "  9 steps, 36 samples" in run_ranks(again, folder=tmp_path).expect(0).outputs[0]


def test_a_constant_schedule_continues_where_it_ended(base: Base, tmp_path: Path) -> None:
    """A finished run of 4 steps, continued to 10, is the run of 10 steps, bit for bit."""
    constant = {"schedule": "constant", "beta2": 0.99}
    run(base, tmp_path / "long", **constant)
    run(base, tmp_path / "short", max_steps=4, **constant)
    assert status(tmp_path / "short")["step"] == 4
    run(base, tmp_path / "short", max_steps=10, resume="auto", **constant)
    assert_same_run(tmp_path / "short", tmp_path / "long")
    rates = [row["learning_rate"] for row in metrics(tmp_path / "short")]
    assert rates == [1e-2, *[2e-2] * 9]


def test_a_longer_run_keeps_the_default_warm_up(base: Base, tmp_path: Path) -> None:
    """4 steps have 4 of warm-up by default; continued to 6 on two ranks they stay 4, in the rates and the record."""
    constant = {"schedule": "constant", "warmup_steps": None}
    run(base, tmp_path / "run", max_steps=4, **constant)
    run(base, tmp_path / "run", ranks=2, max_steps=6, resume="auto", **constant)
    assert [row["learning_rate"] for row in metrics(tmp_path / "run")] == [5e-3, 1e-2, 1.5e-2, 2e-2, 2e-2, 2e-2]
    assert run_settings(tmp_path / "run")["warmup_steps"] == 4


def test_a_cosine_run_says_how_it_could(base: Base, tmp_path: Path) -> None:
    run(base, tmp_path / "run", max_steps=2)
    ended = run_ranks(base.arguments(output_dir=tmp_path / "run", max_steps=4, resume="auto"), folder=tmp_path).expect(
        2
    )
    assert "only --schedule constant" in ended.errors[0] and "--init_from" in ended.errors[0]


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
    note = "note       --profile 2:9: the run continues after step 3, so steps 2 to 3 are not recorded"
    assert note in ended.outputs[0].splitlines()


def _lacks_trackers_and_figures() -> None:
    for name in ("tensorboard", "matplotlib", "accelerate"):
        sys.modules[name] = None  # type: ignore[assignment]


def test_a_run_that_ends_before_the_profiled_steps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, last_step in ((0, 4), (0, 5), (1, 4)):
        StepProfiler("5:6", RunFolder(tmp_path), rank=rank).finish(last_step=last_step)
    StepProfiler(None, RunFolder(tmp_path), rank=0).finish(last_step=4)
    assert capsys.readouterr().err == "note: --profile: the run ended after step 4, before step 5\n"


def test_a_tracker_without_its_package_is_named_before_anything_is_read(base: Base, tmp_path: Path) -> None:
    ended = run_ranks(base.arguments(output_dir=tmp_path / "run", report_to="aim"), folder=tmp_path).expect(2)
    assert "--report_to aim: the package aim is not installed; pip install aim" in ended.errors[0]
    assert not (tmp_path / "run").exists()


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
    expected = [loss for _, loss in losses(tmp_path / "run")]
    assert [loss for _, loss in losses(tmp_path / "on")] == pytest.approx(expected, rel=1e-5)


def test_betas_reach_the_optimizer(base: Base, tmp_path: Path) -> None:
    """AdamW's first step depends on no beta."""
    for name, betas in (("plain", {}), ("first", {"beta1": 0.5}), ("second", {"beta2": 0.9})):
        run(base, tmp_path / name, max_steps=4, **betas)
    plain, *others = ([loss for _, loss in losses(tmp_path / name)] for name in ("plain", "first", "second"))
    for other in others:
        assert other[:2] == pytest.approx(plain[:2], rel=1e-6) and abs(other[3] / plain[3] - 1) > 1e-5
