"""tools/check_gpu.py on a CPU: its comparisons see what is wrong, its parts end in time; no GPU is told in one line."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from folders import ROOT
from ranks import ENVIRONMENT

from megatron_tiedlora.commands import check_gpu
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.tool_settings import CheckGpuSettings
from megatron_tiedlora.gpu_checks import attention, child, children, correct, env, host, output, records, reference
from megatron_tiedlora.gpu_checks.package import CHOSEN, attention_obstacles, attention_routes, small_shape
from megatron_tiedlora.gpu_checks.records import Check, CheckOptions, PartOver, Report, read_checks
from megatron_tiedlora.runtime import launch_env

TOOL = ROOT / "tools" / "check_gpu.py"
CPU = torch.device("cpu")
WRITES = "import sys, json, os, time; f = open(sys.argv[1], 'a', buffering=1);"
ROW = json.dumps({"part": "p", "name": "found", "status": "pass", "value": 1.0})


# Findings -------------------------------------------------------------------------------------------------------------


def test_what_is_no_number_is_no_pass() -> None:
    report = Report("p")
    report.at_most("most", float("nan"), 1.0, fix="do it")
    report.at_least("least", float("nan"), 1.0, fix="do it", otherwise="warn")
    report.at_most("fine", 1.0, 1.0, fix="not needed")
    assert [(check.status, check.fix) for check in report.checks] == [
        ("fail", "do it"),
        ("warn", "do it"),
        ("pass", ""),
    ]


def test_an_error_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    report = Report("p", tmp_path / "p.jsonl")
    with report.attempt("breaks", fix="mend it"):
        raise RuntimeError("first line\nsecond line")
    with report.attempt("is full"):
        raise torch.OutOfMemoryError("no memory")
    report.tell("later", 1.0)
    first, second, third = read_checks(tmp_path / "p.jsonl")
    assert (first.status, first.why, first.fix) == ("fail", "RuntimeError: first line", "mend it")
    assert (second.status, second.fix) == ("fail", records.MEMORY_FIX)
    assert third.name == "later" and report.checks == [first, second, third]


def test_a_device_that_is_lost_ends_the_part() -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    report = Report("p", is_alive=lost)
    with pytest.raises(PartOver, match="after breaks: RuntimeError: an illegal"), report.attempt("breaks"):
        raise RuntimeError("launch failure")
    assert [check.name for check in report.checks] == ["breaks"]


def test_the_files_hold_every_finding_and_what_to_do() -> None:
    checks = [
        Check("a", "good|bad", "pass", 0.5, "ms"),
        Check("a", "no number", "fail", float("nan"), expected="<= 1", why="why", fix="mend it"),
    ]
    found = output.to_json(checks, {"model": "m"})
    assert json.loads(json.dumps(found, allow_nan=False))["checks"][1]["value"] == "nan"
    page = "\n".join(output.to_markdown(checks, {"model": "m"}))
    assert "| a | good\\|bad | pass | 0.5 ms |" in page and "- **a: no number**: mend it" in page
    many = [Check("a", f"number {number}", "warn", fix="mend it") for number in range(5)]
    assert "**a: number 2** and 2 more: mend it" in output.to_markdown(many, {})[-1]
    told: list[str] = []
    assert "-> mend it" in output.check_lines(checks[1], told)[-1]
    assert "-> mend it" not in "\n".join(output.check_lines(checks[1], told)), "not twice in a row"


# Parts in processes of their own --------------------------------------------------------------------------------------


def run(code: str, tmp_path: Path, *, seconds: float = 20.0, **limits: float) -> list[Check]:
    """A part that is this code."""
    options = CheckOptions("cpu", seconds=seconds, folder=str(tmp_path))
    heard: list[Check] = []
    found = children.run_part("p", options, command=[sys.executable, "-c", code], hear=heard.append, **limits)
    assert heard == found
    return found


def test_a_part_that_dies_keeps_what_it_found(tmp_path: Path) -> None:
    code = f"{WRITES} f.write({ROW!r} + '\\n'); f.write('{{'); print('last words'); sys.stdout.flush(); os.abort()"
    found, end = run(code, tmp_path)
    assert found.name == "found" and end.status == "fail"
    assert end.why == "ended by SIGABRT; its last line: last words"


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        f"{WRITES} f.write({ROW!r} + '\\n'); import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f" child = subprocess.Popen(['sleep', '100']); open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(100)"
    )
    found, end = run(code, tmp_path, seconds=3.0, end_seconds=0.2)
    assert found.name == "found" and end.name == "time limit" and end.status == "fail" and end.fix
    deadline = time.monotonic() + 5
    while _runs(int(pid.read_text())):
        assert time.monotonic() < deadline, "what the part had started is still there"
        time.sleep(0.05)


def test_a_part_that_finds_nothing_is_a_failure(tmp_path: Path) -> None:
    (end,) = run("print('nothing to do')", tmp_path)
    assert (end.status, end.why) == ("fail", "ended without a finding; its last line: nothing to do")


def test_a_part_that_cannot_be_killed_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process inside a driver that does not come back: here the signals do not reach it."""
    started: list[subprocess.Popen[bytes]] = []

    class Deaf(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            started.append(self)

        def terminate(self) -> None:
            pass

    monkeypatch.setattr(children.subprocess, "Popen", Deaf)
    monkeypatch.setattr(children.os, "killpg", lambda *_: None)
    try:
        (end,) = run("print('here', flush=True); import time; time.sleep(100)", tmp_path, seconds=2.0, end_seconds=0.2)
    finally:
        started[0].kill()
        started[0].wait()
    assert end.name == "time limit" and end.fix == children.STUCK_FIX and "its last line: here" in end.why


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_part_ends_with_the_command(number: int, status: int, tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(TOOL), f"--output={tmp_path}", "--device=cpu", "--parts=correct", "--minutes=60"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as command:
        deadline = time.monotonic() + 100
        while not (tmp_path / "correct.jsonl").exists():
            assert time.monotonic() < deadline and command.poll() is None
            time.sleep(0.05)
        (part,) = psutil.Process(command.pid).children()
        command.send_signal(number)
        assert command.wait(30) == status
    deadline = time.monotonic() + 10
    while _runs(part.pid):
        assert time.monotonic() < deadline, "the part holds the device"
        time.sleep(0.05)


def test_a_part_is_a_world_of_one_whatever_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    around = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "pod-0",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "TORCHELASTIC_MAX_RESTARTS": "2",
        launch_env.EXPECTED_RANKS: "8",
        "HOME": "/root",
    }
    monkeypatch.setattr(os, "environ", around)
    child._be_alone()
    assert launch_env.rank_and_world_size() == (0, 1)
    assert around["MASTER_ADDR"] == "127.0.0.1" and around["HOME"] == "/root"
    assert not any(name.startswith(("SLURM", "TORCHELASTIC")) for name in around)


def _runs(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split(")")[1].split()[0] != "Z"


def test_the_reference_adds_nothing_to_a_linear_that_has_no_factors() -> None:
    torch.manual_seed(0)
    weight, a, b, hidden = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2), torch.randn(4, 3)
    linear = functools.partial(reference._linear, 0.5, {"x.weight": weight}, {"o_proj.A": a, "o_proj.B": b}, "x")
    assert torch.equal(linear("gate_up.", hidden), hidden @ weight.t())
    assert torch.allclose(linear("o_proj.", hidden), hidden @ (weight + 0.5 * b @ a).t())


# Without a GPU, and its flags -----------------------------------------------------------------------------------------


def test_without_a_gpu_env_alone_one_line_and_status_2(tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), f"--output={tmp_path}", "--minutes=60"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("no GPU, so only env was run: ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert {check["part"] for check in report["checks"]} == {"env"}
    assert [check["name"] for check in report["checks"] if check["status"] == "fail"] == ["GPU"]
    assert "| env | torch | pass |" in (tmp_path / "report.md").read_text()


def test_a_gpu_that_ranks_would_not_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "DS_ACCELERATOR is cpu" in (env.why_no_gpu() or "")
    monkeypatch.delenv("DS_ACCELERATOR")
    assert env.why_no_gpu() is None


@pytest.mark.parametrize(("flags", "said"), [(["--parts=speed,fast"], "fast"), (["--minutes=0"], "more than 0")])
def test_wrong_flags_are_rejected(flags: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(check_gpu.UserError, match=said):
        call("check-gpu", [f"--output={tmp_path}", *flags])
    (tmp_path / "file").touch()
    with pytest.raises(check_gpu.UserError, match="give a writable folder"):
        call("check-gpu", [f"--output={tmp_path / 'file'}"])


@pytest.mark.parametrize(("status", "expected"), [("fail", 1), ("warn", 0), ("skip", 0)])
def test_a_failure_decides_the_exit_status(
    status: Any, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def run_part(part: str, options: CheckOptions, **_: Any) -> list[Check]:
        limits.append(options.seconds)
        return [Check(part, "x", status)]

    monkeypatch.setattr(check_gpu, "run_part", run_part)
    assert call("check-gpu", ["--device=cpu", "--parts=env,correct", f"--output={tmp_path}"]) == expected
    assert limits[1] > check_gpu.SHARES["correct"] + 0.9 * check_gpu.SHARES["env"], "what env left is for the next"


def test_all_parts_together_take_eight_minutes_and_each_is_there() -> None:
    assert sum(check_gpu.part_limits(list(check_gpu.SHARES), None, num_gpus=1).values()) == 480
    assert sum(check_gpu.part_limits(list(check_gpu.SHARES), None, num_gpus=8).values()) == 720
    assert check_gpu.part_limits(["ranks"], None, num_gpus=1) == {"ranks": 480}
    some = check_gpu.part_limits(["env", "ranks"], 3.0, num_gpus=0)
    assert sum(some.values()) == 180 and some["ranks"] == 2 * some["env"]
    for part in check_gpu.SHARES:
        assert (Path(records.__file__).parent / f"{part}.py").exists()
        assert f"\n    {part} " in CheckGpuSettings.about


@pytest.mark.parametrize(("share", "status"), [(0.5, "warn"), (0.7, "pass"), (1.05, "pass"), (60.0, "fail")])
def test_a_device_that_is_too_fast_has_computed_nothing(share: float, status: str) -> None:
    report = Report("env")
    env._matmul_ceiling(report, share * 989e12, 989e12)
    assert [check.status for check in report.checks] == [status]


# Attention ------------------------------------------------------------------------------------------------------------


def compared(route: Any, *, lengths: Sequence[int] = (1, 30, 64, 7)) -> Check:
    report = Report("attention")
    attention.compare(report, CHOSEN, route, attention.CASES[1], lengths, device=CPU, dtype=torch.float32)
    return report.checks[0]


def test_every_route_here_is_right_packed_or_not() -> None:
    for route in attention_routes(CPU, torch.float32, 128).values():
        assert compared(route).status == compared(route, lengths=(130,)).status == "pass"


def test_a_mask_that_is_off_is_seen() -> None:
    def one_document(query: Any, key: Any, value: Any, ids: Any) -> torch.Tensor:
        return attention.plain_attention(query, key, value, torch.zeros(2, query.shape[2]))

    def shifted(query: Any, key: Any, value: Any, ids: Any) -> torch.Tensor:
        return attention.plain_attention(query, key, value, ids.roll(1, dims=1))

    def wrong_scale(query: Any, key: Any, value: Any, ids: Any) -> torch.Tensor:
        return attention.plain_attention(query * 1.01, key, value, ids)

    for route in (one_document, shifted, wrong_scale):
        assert compared(route).status == "fail", route.__name__
    report = Report("attention")
    attention._control(report, CPU)
    assert report.checks[0].status == "pass"


def test_where_nothing_is_computed_nothing_passes() -> None:
    zero = torch.zeros(3)
    assert not attention.relative(zero, zero) <= 1.0
    assert attention.worst_of({"a": 1.0, "b": float("nan"), "c": 5.0}) == "b"


def test_a_kernel_that_is_not_taken_may_fail() -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("it is not installed")

    for name, status in ((CHOSEN, "fail"), ("another", "skip")):
        report = Report("attention")
        attention.compare(report, name, fails, attention.CASES[0], (8,), device=CPU, dtype=torch.float32)
        assert [check.status for check in report.checks] == [status]


def test_kernels_that_are_not_here_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = attention_obstacles(torch.device("cuda"), torch.float32, 128)
    assert found["PyTorch's flash kernel"] == "has no float32"
    assert "PyTorch's memory-efficient kernel" not in found


# The model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge() -> correct.Judge:
    """Of a small model in fp64."""
    return correct.Judge(small_shape(vocab_size=321), "tl6", dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_the_package_is_what_plain_pytorch_says(judge: correct.Judge, packed: bool, how: str) -> None:
    assert max(judge.errors(judge.package(packed=packed, how=how)).values()) < 1e-5  # angles are fp32 in both


def test_what_is_left_out_is_seen(judge: correct.Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    real = correct.rows_of
    changes: dict[str, Any] = {
        "a document's bound": lambda rows: (*rows[:3], torch.zeros_like(rows[3])),
        "positions": lambda rows: (rows[0], 2 * rows[1], *rows[2:]),
        "a label": lambda rows: (*rows[:2], rows[2].masked_fill(torch.arange(200) == 60, -100), rows[3]),
    }
    for what, change in changes.items():
        monkeypatch.setattr(correct, "rows_of", lambda *a, change=change, **k: change(real(*a, **k)))
        report = Report("correct")
        correct.compare_fp32(report, "fp32", judge)
        assert "fail" in [check.status for check in report.checks], what
    answer = judge.expected
    wrong = correct.Computed(answer.loss, {**answer.gradients, "v": 1.3 * answer.gradients["v"]})
    report = Report("correct")
    correct.compare_bf16(report, "bf16", judge, dict.fromkeys(judge.errors(answer), 0.05), wrong)
    assert report.checks[0].status == "fail"
    assert judge.errors(correct.Computed(answer.loss, {}))["dA"] == float("inf")


def test_a_wrong_plain_pytorch_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 itself is wrong the package is as wrong, and within twice of it."""
    monkeypatch.setattr(correct.Judge, "errors", lambda *_: {"loss": 0.0, "dA": 1.0})
    report = Report("correct")
    correct.forms(report, "small", small_shape(vocab_size=321), CPU, all_forms=False)
    plain, *others = report.checks
    assert plain.status == "fail" and plain.fix == correct.PLAIN_FIX
    assert [check.status for check in others] == ["pass"] * 3


def test_waits_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    for name in ("set_sync_debug_mode", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    with host.waits() as seen:
        torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype", stacklevel=1)
    assert sum(seen.values()) == 2 and all("test_check_gpu.py:" in place for place in seen)
