"""The checks that a run makes of itself: copies that stay equal, and gradients that reach every trained tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import Starts, grouped, marked
from support.engine_runs import EngineRun, five_layers, run_engine, settings_of
from support.fault_patches import put_in
from support.run_files import assert_same_run, checkpoint_names, losses, status
from support.run_helpers import Base, run
from support.tiny_models import write_tiny_model

from megatron_tiedlora.adapters.adapter_groups import AdapterGroup
from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.engine import optimizers as module
from megatron_tiedlora.parallel.groups import ParallelGroups

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cpu_seconds(20, reason="the first test makes the starts that all share"),
]

IN_PIECES = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else ZeRO-3 keeps small tensors whole
TIED = "stages and data-parallel ranks"
TENSOR = "tensor-parallel ranks"
DATA = "data-parallel ranks"

Sizes = tuple[int, int, int]
"""(tp, pp, dp)."""


@dataclass(frozen=True)
class Case:
    """Four steps from real start values (v = 0 or B = 0), evaluated and saved after 2 and 4, copies compared after 1.

    Attributes:
        name: what pytest calls it.
        faults: as in fault_patches.py.
        message: a regular expression for the start of the line that every rank ends with; "" where the run must pass.
        steps: training steps in the log at the end.
        saved: the last checkpoint that is there at the end, "" for none.
        zero: zero_optimization of the engine's JSON.
        shares: in which way of `shared_tensors` layers share the tensors of tl6.
    """

    name: str
    sizes: Sizes
    faults: tuple[dict[str, Any], ...] = ()
    message: str = ""
    steps: int = 4
    saved: str = "step_4"
    zero: dict[str, Any] = field(default_factory=lambda: {"stage": 1})
    settings: dict[str, Any] = field(default_factory=dict)
    shares: str | None = None

    @property
    def ranks(self) -> int:
        tp, pp, dp = self.sizes
        return tp * pp * dp

    @property
    def needs_five_layers(self) -> bool:
        """Whether there are four stages, or a layer is named that three layers do not have."""
        named = [*self.settings.get("layers", ()), *(n for fault in self.faults for n in fault.get("layers") or ())]
        return self.sizes[1] > 2 or max(named, default=1) > 3


def name_of(*parts: Any, sizes: Sizes, zero: dict[str, Any] | None = None) -> str:
    stage = (zero or {"stage": 1})["stage"]
    return "-".join([*map(str, parts), "x".join(map(str, sizes)), f"zero{stage}"])


def healthy(sizes: Sizes, method: str, **more: Any) -> Case:
    """A run without a fault."""
    layers = more.pop("layers", None)
    name = name_of(method, *(layers or ()), sizes=sizes, zero=more.get("zero"))
    settings = {"method": method, **({"layers": layers} if layers else {})}
    return Case(name, sizes, settings=settings, **more)


def changed(tensor: str, rank: int, sizes: Sizes, across: str, named: int, *, method: str = "tl6", **more: Any) -> Case:
    """One rank's copy is changed in its last bit after step 1; the message names a rank that differs from the first."""
    name = name_of(method, tensor, f"rank{rank}", sizes=sizes, zero=more.get("zero"))
    fault = {"name": "change_copy", "tensor": tensor, "rank": rank, "step": 1}
    message = rf"after step 1 {tensor} differs between {across}: .*\b{named}\b.* by up to [1-9]\S*;"
    return Case(name, sizes, (fault,), message, steps=0, saved="", settings={"method": method}, **more)


CHANGE = {"name": "change_copy", "tensor": "A", "rank": 1, "step": 1}


def differs(name: str, *changes: dict[str, Any], said: str, sizes: Sizes = (1, 2, 1), **more: Any) -> Case:
    """Copies of A are changed as in CHANGE, but for these `changes`, in the first step or at the save after step 4."""
    faults = tuple({**CHANGE, **change} for change in changes)
    step = faults[0]["step"]
    end: dict[str, Any] = {"steps": 0, "saved": ""} if step == 1 else {"saved": "step_2"}
    return Case(name, sizes, faults, f"after step {step} A differs between {TIED}: {said}", **end, **more)


def gradient(name: str, tensor: str, sizes: Sizes, message: str, *, steps: int, **more: Any) -> Case:
    """A gradient that is broken by the fault `name`: the run stops in the step after `steps`."""
    layers, step = more.pop("layers", None), more.pop("step", {})
    fault = {"name": name, "tensor": tensor, "layers": layers, **step}
    title = name_of(name, tensor, *(layers or ()), *step.values(), sizes=sizes, zero=more.get("zero"))
    return Case(title, sizes, (fault,), message, steps=steps, saved="step_2" if steps > 1 else "", **more)


def missing(tensor: str, sizes: Sizes, *, since: int = 1, **more: Any) -> Case:
    message = f"step {since}: no gradient reaches {tensor} "
    return gradient("no_gradient", tensor, sizes, message, steps=since - 1, step={"since": since}, **more)


def zero(tensor: str, sizes: Sizes, named: str, **more: Any) -> Case:
    message = f"step 2: the gradient of {named} has been exactly zero since the run's start,"
    return gradient("zero_gradient", tensor, sizes, message, steps=1, **more)


def not_finite(value: float, tensor: str, layer: int, sizes: Sizes, *, step: int = 2, **more: Any) -> Case:
    """The gradient has one entry of `value`."""
    last = "the last checkpoint is from step 2" if step > 2 else "no checkpoint was written yet"
    message = f"the gradient norm is (nan|inf) at step {step}; {last}[.] Lower --learning_rate"
    return gradient("one_gradient", tensor, sizes, message, steps=step - 1, layers=[layer],
                    step={"step": step, "value": value}, **more)  # fmt: skip


def without_clipping(case: Case) -> Case:
    return replace(case, name=f"{case.name}-no_clipping", settings={**case.settings, "gradient_clipping": 0})


HEALTHY = [
    *(healthy((1, 2, 1), method) for method in METHODS),
    healthy((1, 2, 1), "lora", layers=[2]),  # the other stage has nothing but its anchor
    healthy((1, 2, 1), "lora", layers=[5]),
    healthy((1, 2, 1), "vera", layers=[1, 2]),
    healthy((1, 2, 1), "tl6", layers=[5]),
    healthy((2, 1, 1), "tl6"),
    healthy((1, 1, 2), "tl6", zero=IN_PIECES),
    healthy((1, 1, 2), "tl1", zero=IN_PIECES),  # B is taken out and put back for the base's loss
    healthy((2, 1, 2), "tl4", zero=IN_PIECES),
    healthy((2, 2, 1), "tl6"),
]
CHANGED = [
    changed("A", 1, (1, 2, 1), TIED, 1),
    changed("A", 0, (1, 2, 1), TIED, 1),  # rank 0 is what the others are compared with
    changed("B", 1, (1, 2, 1), TIED, 1, zero={"stage": 0}),
    changed("B", 0, (1, 2, 1), TIED, 1, method="tl1"),  # frozen
    changed("u", 1, (2, 1, 1), TENSOR, 1),
    changed("A", 1, (2, 1, 1), TENSOR, 1, method="vera"),  # frozen, and so whole
    changed("v", 1, (1, 1, 2), DATA, 1),
    changed("v", 1, (1, 1, 2), DATA, 1, zero={"stage": 2}),
    changed("v", 1, (1, 1, 2), DATA, 1, zero={"stage": 3}),  # small tensors stay whole
    changed("A", 1, (1, 1, 2), TIED, 1, zero={"stage": 0}),
    changed("u", 1, (2, 1, 1), TENSOR, 1, zero=IN_PIECES),
    # Only one of several groups sees these, and all ranks must stop.
    changed("A", 3, (2, 2, 1), TIED, 3),
    changed("u", 3, (2, 2, 1), TENSOR, 3),
    changed("v", 1, (1, 2, 2), DATA, 1),
    changed("B", 2, (1, 4, 1), TIED, 2),
    changed("u", 1, (2, 1, 2), TENSOR, 1, zero=IN_PIECES),
]
RANK_1 = r".*\b1\b.* by up to"
MORE_CHANGED = [
    differs("the_largest_difference", {"value": 1000.0}, said=r".* by up to 1e\+03;"),
    differs("signs_of_zero", {"value": -0.0}, {"rank": 0, "value": 0.0}, said=f"{RANK_1} 0;"),
    differs(
        "nan_on_the_first_of_four",
        *({"rank": rank, "value": math.nan} for rank in (0, 1)),
        said=r"(?!.*\b1\b.* by).*\b2, 3\b.* by up to nan;",
        sizes=(1, 4, 1),
    ),
    differs("at_a_later_save", {"step": 4}, said=RANK_1),
    differs("just_before_a_later_save", {"step": 4, "before_save": True}, said=RANK_1),
    differs("last_of_several_shared_by_some_layers", {"index": -1}, said=RANK_1, shares="pairs"),
    Case("switched_off", (1, 2, 1), (CHANGE,), settings={"replica_check_steps": 0}),
]
GRADIENTS = [
    missing("A", (1, 2, 1)),
    missing("A", (1, 2, 1), layers=[4, 5]),  # on one stage only: its peer waits in the tied sum
    missing("B", (1, 2, 1), zero={"stage": 0}),
    missing("v", (1, 2, 1)),
    missing("u", (1, 2, 1), layers=[4, 5]),
    missing("u", (2, 1, 1)),
    missing("B", (1, 1, 2), zero={"stage": 2}),
    missing("v", (1, 1, 2), zero=IN_PIECES),
    missing("A", (1, 2, 1), since=3),  # when no hook watches any more, the tied sum itself does
    missing("A", (2, 2, 1), layers=[4, 5], since=3),
    zero("A", (1, 2, 1), "A"),
    zero("B", (2, 1, 1), "B"),
    zero("u", (1, 2, 1), "u of layer 1, u of layer 4", layers=[1, 4]),
    zero("v", (1, 2, 1), "u of layer 5, v of layer 5", layers=[5]),  # v stays 0, and so u gets nothing either
    zero("u", (2, 1, 1), "u of layer 3", layers=[3]),
    zero("v", (1, 1, 2), "u of layer 2, v of layer 2", layers=[2], zero=IN_PIECES),
    *(not_finite(math.nan, "v", layer, (1, 2, 1)) for layer in (1, 5)),  # one is lost in a maximum over the ranks
    not_finite(math.nan, "u", 1, (1, 2, 1), zero={"stage": 0}),
]
# Of 1e25 fp32 holds no square, so a second moment would be infinite. Of 1e18 it does.
LARGE = ({"name": "one_gradient", "tensor": "v", "layers": [2], "step": 3, "value": 1e18},)
EACH = [
    not_finite(value, "v", 2, (1, 1, 2), step=3, zero={"stage": stage})
    for value in (1e25, math.inf, math.nan)
    for stage in range(4)
]
WAYS = [
    (case, without_clipping(case)) if (index + index // 4) % 2 else (without_clipping(case), case)
    for index, case in enumerate(EACH)
]
OTHER_NORMS = [other for other, _ in WAYS]  # slow
NORMS = [
    # Each value at each stage, and with clipping or without: each value and each stage is seen with both.
    *(one for _, one in WAYS),
    not_finite(1e25, "B", 2, (1, 1, 2), step=3, zero=IN_PIECES),
    not_finite(1e25, "A", 3, (2, 1, 1), step=3),
    not_finite(1e25, "v", 3, (1, 2, 1), step=3),
    Case("large-zero0", (1, 1, 2), LARGE, zero={"stage": 0}),
    without_clipping(Case("large-zero3", (1, 1, 2), LARGE, zero={"stage": 3})),
]
# One start of all would take minutes where cores are shared, and a start has a time limit.
LISTS = [HEALTHY, [*CHANGED, *MORE_CHANGED], GRADIENTS, NORMS, OTHER_NORMS]
CASES = {case.name: case for cases in LISTS for case in cases}
assert len(CASES) == sum(map(len, LISTS))


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return five_layers(tmp_path_factory.mktemp("larger"))


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same for what names no later layer; two stages have two layers and one."""
    folder = tmp_path_factory.mktemp("three_layers")
    return settings_of(write_tiny_model(folder / "model", num_layers=3), folder)


@pytest.fixture(scope="module")
def runs(
    larger: dict[str, Any], three_layers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, EngineRun]:
    """What each case gave; all cases of a list and of as many ranks run in one start."""

    def run_all(names: Sequence[str]) -> list[EngineRun]:
        folder, cases = tmp_path_factory.mktemp("checks"), [CASES[name] for name in names]
        models = [larger if case.needs_five_layers else three_layers for case in cases]
        given = [case_for_workers(model, folder, case) for model, case in zip(models, cases, strict=True)]
        return run_engine(given, folder, ranks=cases[0].ranks)

    groups = [
        group for cases in LISTS for group in grouped((case.name for case in cases), lambda name: CASES[name].ranks)
    ]
    return Starts(groups, run_all)


def case_for_workers(base: dict[str, Any], folder: Path, case: Case) -> dict[str, Any]:
    tp, pp, _ = case.sizes
    engine = folder / f"{'-'.join(map(str, case.zero.values()))}.json"
    engine.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000000, **case.zero}}))
    short = {"max_steps": 4, "warmup_steps": 1, "eval_interval": 2, "save_interval": 2, "replica_check_steps": 1}
    short["global_batch_size"] = 4
    settings = {**base, **short, "ds_config": str(engine), "tensor_parallel": tp, "pipeline_parallel": pp}
    return {"settings": {**settings, **case.settings}, "faults": case.faults, "may_fail": True, "shares": case.shares}


@pytest.mark.parametrize("name", marked(CASES, {case.name for case in OTHER_NORMS}))
def test_checks(runs: Mapping[str, EngineRun], name: str) -> None:
    """A healthy run passes; a broken one stops on every rank with the same clear line, and saves nothing after."""
    case, run = CASES[name], runs[name]
    if case.message:
        assert len(run.failures) == case.ranks and len(set(run.failures)) == 1
        assert re.match(case.message, run.failures[0]), run.failures[0]
    else:
        assert run.failures == []
    assert len(run.losses) == case.steps
    assert run.saved[-1:] == ([case.saved] if case.saved else [])


@pytest.mark.parametrize("stage", range(4))
def test_the_largest_norm_is_the_same_at_every_stage(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """Whatever a stage sums its squares in: beyond it the norm counts as infinite."""
    largest = math.sqrt(torch.finfo(torch.float32).max)
    fits = {norm: norm for norm in (0.0, 1.0, largest * 0.9999)}
    others = {largest * 1.0001: math.inf, 1e300: math.inf, math.inf: math.inf, math.nan: math.nan, -1.0: math.nan}
    for norm, expected in {**fits, **others}.items():
        monkeypatch.setattr(module, "gradient_norms", lambda *_, norm=norm: [norm])
        cpu, adapter_group = torch.device("cpu"), AdapterGroup({"": SimpleNamespace(u_sum=None)})  # type: ignore[dict-item]
        engine: Any = SimpleNamespace(get_global_grad_norm=lambda norm=norm: norm, step=lambda: None, device=cpu)
        engine.optimizer = engine.lr_scheduler = None
        config: Any = SimpleNamespace(zero_stage=stage, values={"gradient_clipping": 1.0})
        if stage:
            found = module.EngineOptimizer(engine, adapter_group, ParallelGroups(), config).take("", None)
        else:
            found = module.Optimizers(adapter_group, ParallelGroups(), {}, cpu).norms([""])[""]
        assert found == expected or (math.isnan(found) and math.isnan(expected)), (norm, found)


# Real commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 6])
def test_a_run_stops_where_copies_differ(base: Base, tmp_path: Path, step: int) -> None:
    """In the first steps, and at a save long after them: one line, status 2 everywhere, and what was saved stands."""
    folder = tmp_path / "run"
    settings = {"ds_config": "zero1.json", "pipeline_parallel": 2, "max_steps": 8, "ranks": 2}
    prelude = partial(put_in, [{"name": "change_copy", "tensor": "B", "rank": 1, "step": step}])
    line = run(base, folder, prelude=prelude, expect=2, **settings).error_line()
    assert re.match(rf"error: after step {step} B differs between {TIED}: .*\b1\b.* by up to [1-9]\S*;", line), line
    assert status(folder)["state"] == "failed"
    if step == 1:
        assert not (folder / "checkpoints").exists() and not (folder / "adapter").exists()
        return
    assert (folder / "checkpoints" / "latest").read_text() == "step_4\n"
    assert "step_6" not in checkpoint_names(folder)
    run(base, folder, resume="auto", **settings)  # without the fault it goes on from there
    assert [number for number, _ in losses(folder)] == list(range(1, 9))


@pytest.mark.parametrize("ds_config", ["zero3.json", pytest.param("zero0.json", marks=pytest.mark.slow)])
def test_a_run_stops_before_an_infinite_second_moment_is_saved(base: Base, tmp_path: Path, ds_config: str) -> None:
    """One gradient of 1e25 at step 5: status 2, the checkpoint of step 4 stands, and a resume ends as another run."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = {"ds_config": ds_config, "gradient_clipping": 0, "max_steps": 6, "save_interval": 1}
    fault = {"name": "one_gradient", "tensor": "B", "layers": [2], "step": 5, "value": 1e25}
    line = run(base, folder, prelude=partial(put_in, [fault]), expect=2, **settings).error_line()
    assert line.startswith("error: the gradient norm is inf at step 5; the last checkpoint is from step 4")
    assert status(folder)["state"] == "failed" and checkpoint_names(folder) == {"step_2", "step_3", "step_4"}
    run(base, folder, resume="auto", **settings)
    run(base, whole, **settings)
    assert_same_run(folder, whole)
