"""Part ranks of tools/check_gpu.py, the folder for bare machines, and the whole command on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ROOT
from ranks import ENVIRONMENT
from safetensors.torch import save_file

from megatron_tiedlora.benchmark.plan import plan_benchmark, read_samples
from megatron_tiedlora.gpu_checks import rank_orders, ranks, run_offline
from megatron_tiedlora.gpu_checks.rank_orders import Case, RankOrder
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report
from megatron_tiedlora.gpu_checks.running import step_settings, write_small

TOOL = ROOT / "tools" / "check_gpu.py"


def test_every_layout_that_fits_is_a_case() -> None:
    cases = ranks.cases_of(8, "cuda")
    layouts = {(case.tp, case.pp) for case in cases}
    assert layouts == {(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if tp * pp <= 8}
    assert {case.zero for case in cases if (case.tp, case.pp) == (1, 1)} == {0, 1, 2, 3}
    assert any(not case.sp for case in cases) and any(case.dtype == "bf16" for case in cases)
    assert {case.dtype for case in ranks.cases_of(2, "cpu")} == {"fp32"}
    assert Case(2, 2, sp=False).named(8) == "TP2 PP2 DP2 ZeRO-1, fp32, whole sequences"


def left(folder: Path, losses: list[float], adapter: torch.Tensor) -> Path:
    """What a case leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / rank_orders.RESULT).write_text(json.dumps({"losses": losses}))
    save_file({"A": adapter}, folder / rank_orders.ADAPTER)
    return folder


def test_ranks_that_compute_something_else_are_seen(tmp_path: Path) -> None:
    order = RankOrder((), str(tmp_path), str(tmp_path), "m", "cpu", learning_rate=0.1)
    start = torch.ones(4, 4)
    one = left(tmp_path / "one", [2.0, 1.9], start)

    def statuses(found: Path) -> list[str]:
        report = Report("ranks")
        ranks.compare(report, "x", Case(), found, one, order)
        return [check.status for check in report.checks]

    assert statuses(left(tmp_path / "same", [2.0, 1.9], start + 1e-4)) == ["pass", "pass"]
    assert statuses(left(tmp_path / "loss", [2.0, 1.9001], start)) == ["fail", "pass"]
    assert statuses(left(tmp_path / "adapter", [2.0, 1.9], start + 0.1)) == ["pass", "fail"]
    assert statuses(left(tmp_path / "no number", [2.0, float("nan")], start)) == ["fail", "pass"]
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "error1").write_text("Traceback\nUserError: it does not fit")
    report = Report("ranks")
    ranks.compare(report, "x", Case(), tmp_path / "refused", one, order)
    assert [(check.status, check.why) for check in report.checks] == [("fail", "UserError: it does not fit")]


def test_cases_are_done_in_several_starts_each_with_its_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[RankOrder] = []
    limits: list[float] = []

    @contextmanager
    def started_ranks(order: RankOrder) -> Iterator[list[rank_orders.Rank]]:
        starts.append(order)
        yield []

    def wait_for_ranks(_: Any, limit: float) -> bool:
        limits.append(limit)
        return True

    monkeypatch.setattr(ranks, "started_ranks", started_ranks)
    monkeypatch.setattr(ranks, "wait_for_ranks", wait_for_ranks)
    order = RankOrder((), str(tmp_path), str(tmp_path), "m", "cuda", world_size=8)
    report = Report("ranks")
    ranks.check_layouts(report, order, left=lambda share: 100 * share)
    alone, *others = starts
    assert alone.world_size == 1 and {some.world_size for some in others} == {8}
    assert [case.dtype for case in alone.cases] == ["fp32", "bf16"]
    done = {some.first + number: case for some in others for number, case in enumerate(some.cases)}
    assert [done[number] for number in range(len(done))] == list(ranks.cases_of(8, "cuda"))
    assert limits == pytest.approx([25, 75 / 3, 75 / 2, 75])
    assert {check.why for check in report.checks} == {"it did not finish"}, "nothing was left, nothing passes"


def test_the_line_that_names_the_dead_rank() -> None:
    named = "error: rank 1 on host, after step 4: killed"
    assert ranks.naming_line(f"x\n{named}\n", 1) == named
    assert ranks.naming_line(f"x\n{named}\n", 2) is ranks.naming_line("error: rank 10 stopped responding", 1) is None
    assert ranks.last_error("ValueError: bad\nwarning: later") == "ValueError: bad"


def test_one_gpu_has_several_ranks_where_nccl_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = CheckOptions()
    for version, count in (((2, 28, 9), 1), ((2, 30, 7), 2), ((), 1)):
        monkeypatch.setattr(ranks, "loaded_nccl", lambda version=version: version)
        found, variables, why = ranks._possible(options)
        assert found == count and bool(variables) == (count > 1) and "NCCL" in why
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert ranks._possible(options)[0] == 4


def test_an_order_comes_back_as_it_was(tmp_path: Path) -> None:
    order = RankOrder((Case(2, dtype="bf16"), Case(zero=3)), "f", "l", "m", "cuda", endless=True)
    assert RankOrder.from_json(order.to_json()) == order


def test_ranks_that_fail_are_waited_for_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, time; print('here'); time.sleep(60 * (os.environ['RANK'] == '1')); raise SystemExit(3)"
    )
    monkeypatch.setattr(rank_orders, "SCRIPT", script)
    order = RankOrder((), str(tmp_path), str(tmp_path), "m", "cpu", world_size=2)
    with rank_orders.started_ranks(order) as started:
        assert not rank_orders.wait_for_ranks(started, 30, grace_seconds=0.1)
        assert started[0].process.returncode == 3 and "here" in started[0].output
        assert ranks.why_not_ended(started, 30) == "here"
        assert ranks.why_not_ended(started[1:], 30).startswith("not finished after 30 s; the last line of rank 0: ")
    assert started[1].process.returncode == -9


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
    report = json.loads((tmp_path / "report.json").read_text())
    found = {check["name"]: check["status"] for check in report["checks"]}
    assert "fail" not in found.values() and "warn" not in found.values()
    for name in (
        "3 steps of AdamW at ZeRO-3, fp32",
        "TP1 PP2 DP1 ZeRO-1, fp32: adapter",
        "a killed rank: they name it",
    ):
        assert found[name] == "pass"
