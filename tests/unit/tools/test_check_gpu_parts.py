"""Part ranks of `tiedlora check-gpu`, the folder for bare machines, and the whole command on a CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from support.folders import ROOT
from support.ranks import ENVIRONMENT

from megatron_tiedlora.model.cpu_attention import Scores
from megatron_tiedlora.model.fused_attention import AttentionRoute, one_by_one
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.parallel.quantised_weight import Fp8MatmulWeight
from megatron_tiedlora.selfcheck import (
    reference,
    test_attention,
    test_correct,
    test_env,
    test_host,
    test_memory,
    test_ranks,
)
from megatron_tiedlora.selfcheck import running as judging
from megatron_tiedlora.selfcheck.parts import WARNING, verdict
from megatron_tiedlora.selfcheck.running import Judge, small_shape, step_settings, write_small
from megatron_tiedlora.selfcheck.step_bench import plan_benchmark, read_samples
from megatron_tiedlora.selfcheck.test_ranks import Case, EndedRanks, Ranks, cases_of
from tools import run_offline

TOOL = ROOT / "tools" / "check_gpu.py"


def test_every_layout_that_fits_is_a_case() -> None:
    cases = cases_of(8, "cuda")
    layouts = {(case.tp, case.pp) for case in cases}
    assert layouts == {(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if tp * pp <= 8}
    assert {case.zero for case in cases if (case.tp, case.pp) == (1, 1)} == {0, 1, 2, 3}
    assert any(not case.sp for case in cases) and any(case.dtype == "bf16" for case in cases)
    assert {case.dtype for case in cases_of(2, "cpu")} == {"fp32"}
    assert {(case.tp, case.pp) for case in cases_of(8, "cuda", is_long=False)} == layouts
    assert len(cases_of(8, "cuda", is_long=False)) <= 2 * test_ranks.CASES_OF_A_START < len(cases)
    assert Case(2, 2, sp=False).named(8) == "TP2 PP2 DP2 ZeRO-1, fp32, whole sequences"


def left(folder: Path, losses: list[float], adapter: torch.Tensor) -> Path:
    """What a case leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / test_ranks.RESULT).write_text(json.dumps(losses))
    save_file({"A": adapter}, folder / test_ranks.ADAPTER)
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
    found = outcome_of(test_ranks.test_killed_rank, Ranks(2, {}, [], tmp_path, tmp_path, 100.0))
    assert found == ("passed" if right else "failed")


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
    monkeypatch.setattr(test_ranks, "__name__", "a_rank")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    ended = Ranks(2, {}, [], tmp_path, tmp_path, 30.0).run(0, [], 2, 1.0, grace=0.5)
    assert ended.statuses == [3, None] and ended.why() == "here" and 0.5 <= ended.seconds < 10
    ended = Ranks(2, {test_ranks.CTAS: "8"}, [], tmp_path, tmp_path, 0.5).run(test_ranks.MESSAGES, [], 2, 1.0)
    names = {f"ranks-{first}-{rank}-of-2.log" for first in ("0", "messages8") for rank in range(2)}
    assert {file.name for file in tmp_path.glob("*.log")} == names, "no launch replaces another's"
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
@pytest.mark.timeout(1600)
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    """Steps at ZeRO 0 to 3, decoding, every layout of two ranks, and a killed one."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), "--device=cpu", f"--output={tmp_path}", "--seconds=3600"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stdout
    cases: Any = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    found = {case.get("name"): verdict(case) for case in cases}
    assert set(found.values()) == {"passed", "skipped"}
    for name in ("test_steps_of_adamw[ZeRO-3]", "test_layout[TP1 PP2 DP1 ZeRO-1, fp32]", "test_killed_rank"):
        assert found[name] == "passed"


# Checks of numbers: they pass on a CPU, and each sees what is wrong ---------------------------------------------------


CPU = torch.device("cpu")


def outcome_of(check: Callable[..., None], *arguments: Any, **keywords: Any) -> str:
    """How a check ends: passed, warned or failed."""
    told: dict[str, object] = {}
    try:
        check(*arguments, tell=told.__setitem__, **keywords)
    except AssertionError:
        return "failed"
    return "warned" if WARNING in told else "passed"


def test_a_device_that_is_too_fast_has_computed_nothing_and_a_plan_that_is_too_low_is_a_failure() -> None:
    for share, expected in ((0.5, "warned"), (0.7, "passed"), (1.05, "passed"), (60.0, "failed")):
        assert outcome_of(test_env.judge_rate, rate=share * 989e12, listed=989e12) == expected
    for ratio, expected in ((0.9, "warned"), (1.05, "passed"), (1.1, "warned"), (1.2, "failed")):
        sizes = {"planned": 100.0, "allocated": 100 * ratio}
        assert outcome_of(test_memory.judge_plan, layers=1, sizes=sizes) == expected


# Attention ------------------------------------------------------------------------------------------------------------


def compared(
    route: Any,
    *,
    name: str = test_attention.CHOSEN,
    lengths: Sequence[int] = (1, 30, 64, 7),
    how: Scores = test_attention.PLAIN,
) -> str:
    drawn = test_attention.random_heads(test_attention.CASES[1], 2, sum(lengths), CPU, torch.float32)
    given: dict[str, Any] = {"name": name, "route": route, "drawn": drawn, "lengths": lengths, "how": how}
    return outcome_of(test_attention.compare, **given)


def test_every_route_here_is_right_packed_or_not() -> None:
    for route in test_attention.attention_routes(CPU, torch.float32, 128, test_attention.PLAIN).values():
        assert compared(route) == compared(route, lengths=(130,)) == "passed"
    for how in (Scores(0.3, 20), Scores(0.3, 20, 2.0), Scores(0.3, None, 2.0)):
        routes = test_attention.attention_routes(CPU, torch.float32, 128, how)
        assert test_attention.CHOSEN in routes and (test_attention.ONE_BY_ONE in routes) == (how[1:] == (None, None))
        for route in routes.values():
            assert compared(route, how=how) == compared(route, lengths=(130,), how=how) == "passed"
            assert compared(route, how=how._replace(window=19)) == "failed", "a window that is off by one is seen"


def test_a_mask_that_is_off_is_seen() -> None:
    plain = reference.plain_attention
    routes: dict[str, Callable[..., torch.Tensor]] = {
        "one document": lambda query, key, value, ids: plain(query, key, value, torch.zeros_like(ids)),
        "shifted": lambda query, key, value, ids: plain(query, key, value, ids.roll(1, dims=1)),
        "wrong scale": lambda query, key, value, ids: plain(query * 1.01, key, value, ids),
    }
    for what, route in routes.items():
        assert compared(route) == "failed", what
        assert compared(route, name="another") == "warned", what
    assert outcome_of(test_attention.test_control, CPU) == "passed"


def test_where_nothing_is_computed_nothing_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.zeros(3)
    assert not test_attention.relative(zero, zero) <= 1.0
    assert test_attention.worst_of({"a": 1.0, "b": float("nan"), "c": 5.0}) == "b"
    monkeypatch.setattr(test_attention, "relative", lambda *_: float("nan"))
    assert compared(reference.plain_attention) == outcome_of(test_attention.test_control, CPU) == "failed"


def test_a_kernel_that_is_not_taken_may_fail() -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("it is not installed")

    assert compared(fails, name="another") == "passed"
    with pytest.raises(RuntimeError, match="not installed"):
        compared(fails)


def test_every_kernel_that_can_run_here_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    chosen = AttentionRoute("PyTorch's flash kernel", "a reason", one_by_one)
    monkeypatch.setattr(test_attention, "choose_attention", lambda *_, **__: chosen)
    found = list(test_attention.attention_routes(torch.device("cuda"), torch.float32, 128, test_attention.PLAIN))
    assert found == [test_attention.CHOSEN, "PyTorch's memory-efficient kernel", test_attention.ONE_BY_ONE]


# The model ------------------------------------------------------------------------------------------------------------


def test_the_reference_adds_nothing_to_a_linear_that_has_no_factors() -> None:
    torch.manual_seed(0)
    weight, a, b, hidden = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2), torch.randn(4, 3)
    linear = functools.partial(reference._linear, 0.5, {"x.weight": weight}, {"o_proj.A": a, "o_proj.B": b}, "x")
    assert torch.equal(linear("gate_up.", hidden), hidden @ weight.t())
    assert torch.allclose(linear("o_proj.", hidden), hidden @ (weight + 0.5 * b @ a).t())


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Of a small model in fp64."""
    return Judge(small_shape(vocab_size=321), "tl6", dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_the_package_is_what_plain_pytorch_says(judge: Judge, packed: bool, how: str) -> None:
    assert max(judge.errors(judge.package(packed=packed, how=how)).values()) < 1e-5  # angles are fp32 in both


def test_what_is_left_out_is_seen(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(test_correct.compare_fp32, judge) == "passed"
    real = judging.rows_of
    changes: dict[str, Any] = {
        "a document's bound": lambda rows: (*rows[:3], torch.zeros_like(rows[3])),
        "positions": lambda rows: (rows[0], 2 * rows[1], *rows[2:]),
        "a label": lambda rows: (*rows[:2], rows[2].masked_fill(torch.arange(200) == 60, -100), rows[3]),
    }
    for what, change in changes.items():
        monkeypatch.setattr(judging, "rows_of", lambda *a, change=change, **k: change(real(*a, **k)))
        assert outcome_of(test_correct.compare_fp32, judge) == "failed", what
    answer = judge.expected
    monkeypatch.setattr(judge, "plain_errors", dict.fromkeys(judge.errors(answer), 0.05))
    wrong = {**answer, "dv": 1.3 * answer["dv"]}
    assert outcome_of(test_correct.compare_bf16, judge, answer) == "passed"
    assert outcome_of(test_correct.compare_bf16, judge, wrong) == "failed"
    assert judge.errors({"loss": answer["loss"]})["dA"] == float("inf")


def test_a_wrong_plain_pytorch_is_no_measure(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 itself is wrong the package is as wrong, and within twice of it."""
    monkeypatch.setattr(judge, "plain_errors", dict.fromkeys(judge.errors(judge.expected), 1.0))
    assert outcome_of(test_correct.test_bf16_of_plain_pytorch, judge) == "failed"
    assert outcome_of(test_correct.test_bf16, "eager", True, "none", judge) == "passed"


@pytest.mark.parametrize("name", test_correct.BASE_FORMATS)
def test_a_number_that_differs_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in test_correct.WIDTHS:
        assert outcome_of(test_correct.test_bits, name, width, CPU, EAGER) == "passed"
    original, made = test_correct.loaded, []

    def loaded(*arguments: Any, **others: Any) -> Any:
        made.append(original(*arguments, **others))
        if len(made) % 2 == 0:
            next(iter(made[-1].parameters.values())).data[7, 3] ^= 8
        return made[-1]

    monkeypatch.setattr(test_correct, "loaded", loaded)
    for width in test_correct.WIDTHS:
        assert outcome_of(test_correct.test_bits, name, width, CPU, EAGER) == "failed"


@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize("way", ["times", "times_transposed"])
def test_a_product_without_a_scale_is_seen(way: str, keep_transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(test_correct.test_products_in_fp8, keep_transposed, CPU, EAGER) == "passed"
    original = getattr(Fp8MatmulWeight, way)

    def without(self: Fp8MatmulWeight, rows: torch.Tensor) -> Any:
        return original(self, rows if self.dtype != torch.bfloat16 else rows * 1.02)

    monkeypatch.setattr(Fp8MatmulWeight, way, without)
    assert outcome_of(test_correct.test_products_in_fp8, keep_transposed, CPU, EAGER) == "failed"


def test_waits_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_sync_debug_mode", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    with test_host.waits() as seen:
        torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype", stacklevel=1)
    assert sum(seen.values()) == 2 and all("test_check_gpu_parts.py:" in place for place in seen)
