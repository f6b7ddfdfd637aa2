"""Part ranks of `tiedlora check-gpu`, the folder for bare machines, and the whole command on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from folders import ROOT
from ranks import ENVIRONMENT
from safetensors.torch import save_file

from megatron_tiedlora.benchmark.layout import plan_benchmark, read_samples
from megatron_tiedlora.selfcheck import rank, test_ranks
from megatron_tiedlora.selfcheck.parts import verdict
from megatron_tiedlora.selfcheck.rank import Case
from megatron_tiedlora.selfcheck.running import step_settings, write_small
from megatron_tiedlora.selfcheck.test_ranks import EndedRanks, Ranks, cases_of
from tools import run_offline

TOOL = ROOT / "tools" / "check_gpu.py"


def test_every_layout_that_fits_is_a_case() -> None:
    cases = cases_of(8, "cuda")
    layouts = {(case.tp, case.pp) for case in cases}
    assert layouts == {(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if tp * pp <= 8}
    assert {case.zero for case in cases if (case.tp, case.pp) == (1, 1)} == {0, 1, 2, 3}
    assert any(not case.sp for case in cases) and any(case.dtype == "bf16" for case in cases)
    assert {case.dtype for case in cases_of(2, "cpu")} == {"fp32"}
    assert Case(2, 2, sp=False).named(8) == "TP2 PP2 DP2 ZeRO-1, fp32, whole sequences"


def left(folder: Path, losses: list[float], adapter: torch.Tensor) -> Path:
    """What a case leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / rank.RESULT).write_text(json.dumps(losses))
    save_file({"A": adapter}, folder / rank.ADAPTER)
    return folder


def test_ranks_that_compute_something_else_are_seen(tmp_path: Path) -> None:
    start = torch.ones(4, 4)
    one = left(tmp_path / "one", [2.0, 1.9], start)

    def is_right(name: str, losses: list[float], adapter: torch.Tensor) -> bool:
        try:
            test_ranks.compare({}.__setitem__, Case(), left(tmp_path / name, losses, adapter), one)
        except AssertionError as error:
            assert str(error).startswith(test_ranks.DIFFERS_FIX)
            return False
        return True

    assert is_right("same", [2.0, 1.9], start + 1e-6)
    assert not is_right("loss", [2.0, 1.9001], start)
    assert not is_right("adapter", [2.0, 1.9], start + 1e-3)
    assert not is_right("no number", [2.0, float("nan")], start)


@pytest.fixture
def eight(tmp_path: Path) -> Ranks:
    """Eight ranks that have 100 seconds."""
    return Ranks(8, {}, cases_of(8, "cuda"), tmp_path, tmp_path, 100.0)


def test_cases_are_done_in_several_starts_each_with_its_part_of_the_time(
    eight: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[int, Sequence[Case], int]] = []
    shares: list[float] = []

    def run(self: Ranks, first: int, cases: Sequence[Case], size: int, share: float) -> EndedRanks:
        starts.append((first, cases, size))
        shares.append(share)
        return EndedRanks([0] * size, [""] * size, 0.0)

    monkeypatch.setattr(Ranks, "run", run)
    for number in (0, 1):
        with pytest.raises(AssertionError, match="it did not finish"):
            eight.results(number, 1)
    for number in range(len(eight.cases)):
        with pytest.raises(AssertionError, match="it did not finish"):  # nothing was left, nothing passes
            eight.results(number, 8)
    alone, *others = starts
    assert alone == (0, [Case(), Case(dtype="bf16")], 1) and {size for _, _, size in others} == {8}
    done = {first + number: case for first, cases, _ in others for number, case in enumerate(cases)}
    assert len(others) == 3 and [done[number] for number in range(len(done))] == list(eight.cases)
    assert shares == pytest.approx([0.25, 0.75 / 3, 0.75 / 2, 0.75], abs=0.02)
    (eight.folder / "8-3").mkdir()
    (eight.folder / "8-3" / "error1").write_text("Traceback\nUserError: it does not fit")
    with pytest.raises(AssertionError, match="UserError: it does not fit"):
        eight.results(3, 8)


def test_the_line_that_names_the_dead_rank() -> None:
    named = "error: rank 1 on host, after step 4: killed"
    assert test_ranks.naming_line(f"x\n{named}\n", 1) == named
    assert test_ranks.naming_line(f"x\n{named}\n", 2) is None
    assert test_ranks.naming_line("error: rank 10 stopped responding", 1) is None
    assert test_ranks.last_error("ValueError: bad\nwarning: later") == "ValueError: bad"


@pytest.mark.parametrize(
    ("statuses", "seconds", "said", "right"),
    [
        ([1, -9], 30.0, "error: rank 1 stopped responding", True),
        ([1, -9], 50.0, "error: rank 1 stopped responding", False),
        ([0, -9], 30.0, "error: rank 1 stopped responding", False),
        ([None, -9], 30.0, "error: rank 1 stopped responding", False),
        ([1, -9], 30.0, "error: rank 11 stopped responding", False),
        ([1, 1], 30.0, "error: rank 1 stopped responding", False),
    ],
)
def test_what_must_follow_the_death_of_a_rank(
    statuses: list[int | None], seconds: float, said: str, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "run", lambda *_, **__: EndedRanks(statuses, [said, ""], seconds))
    try:
        test_ranks.test_killed_rank(Ranks(2, {}, [], tmp_path, tmp_path, 100.0), {}.__setitem__)
    except AssertionError:
        assert not right
    else:
        assert right


def test_one_gpu_has_several_ranks_where_nccl_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for version, count in (((2, 28, 9), 1), ((2, 30, 7), 2), ((), 1)):
        monkeypatch.setattr(test_ranks, "loaded_nccl", lambda version=version: version)
        found, variables, why = test_ranks.possible_ranks("cuda")
        assert found == count and bool(variables) == (count > 1) and "NCCL" in why
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert test_ranks.possible_ranks("cuda")[0] == 4


def test_ranks_that_fail_are_waited_for_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_rank.py").write_text(
        "import os, time; print('here'); time.sleep(60 * (os.environ['RANK'] == '1')); raise SystemExit(3)"
    )
    monkeypatch.setattr(rank, "__name__", "a_rank")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    ended = Ranks(2, {}, [], tmp_path, tmp_path, 30.0).run(0, [], 2, 1.0, grace=0.5)
    assert ended.statuses == [3, None] and ended.why() == "here" and 0.5 <= ended.seconds < 10
    ended = Ranks(2, {}, [], tmp_path, tmp_path, 0.5).run(0, [], 2, 1.0)
    assert ended.statuses[1] is None and time.monotonic() - began < 30
    assert EndedRanks([None, None], ["x", "y"], 0.0).why() == "not finished in time; the last line of rank 0: x"
    assert EndedRanks([0, 0], ["x", "y"], 0.0).why() == ""


def test_documents_of_a_made_up_row_are_packed(tmp_path: Path) -> None:
    model = write_small(tmp_path)
    settings = step_settings(model, "--random_weights", "--rows=2", "--length=64", "--documents=4", "--micro_batches=3")
    plan = plan_benchmark(settings)
    dataset, pad_id = read_samples(plan, settings)
    batches = next(plan.training_loader(dataset, pad_id=pad_id)).micro_batches
    assert len(batches) == 3 and {batch.tokens.shape for batch in batches} == {(2, 64)}
    assert all(batch.documents is not None and batch.num_samples == 8 for batch in batches)


def test_a_bare_machine_gets_the_wheels_of_its_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = run_offline.TAG, "cp27"
    names = ("a-1-py3-none-any", "b-1-py2.py3-none-any", f"c-1-{mine}-{mine}-linux", "d-1-cp36-abi3-linux")
    wrong = (f"e-1-{other}-{other}-linux", "f-1-cp399-abi3-linux")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in (*names, *wrong):
        with zipfile.ZipFile(wheels / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name[0]}.py", "")
    monkeypatch.setattr(run_offline, "HERE", tmp_path)
    run_offline.unpack(wheels, tmp_path / "site")
    assert {file.name for file in (tmp_path / "site").iterdir()} == {"a.py", "b.py", "c.py", "d.py"}
    with pytest.raises(SystemExit, match="packed without Python"):
        run_offline.main()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    """Steps at ZeRO 0 to 3, decoding, every layout of two ranks, and a killed one."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), "--device=cpu", f"--output={tmp_path}", "--minutes=60"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stdout
    cases: Any = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    found = {case.get("name"): verdict(case) for case in cases}
    assert set(found.values()) == {"passed", "skipped"}
    for name in ("test_steps_of_adamw[ZeRO-3]", "test_layout[TP1 PP2 DP1 ZeRO-1, fp32]", "test_killed_rank"):
        assert found[name] == "passed"
