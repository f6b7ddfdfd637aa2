"""Forward and every gradient in fp64 at layouts, without engine or optimizer, against the dense oracle.

Here nothing hides an error of 1e-9: what is summed, gathered, cut and sent is exact up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import part_of
from support.engine_runs import LAYOUTS, relative_distance
from support.forked_ranks import run_on_ranks
from support.gradient_worker import DTYPE, SEED, Case, Outcome, joined, run_gradients
from support.oracle import OracleConfig, cast_weights, load_weights, oracle_logits
from support.oracle_adapter import ALL_TARGETS, TRAINED_TENSORS, dropout
from support.oracle_training import SETTINGS, oracle_gradients
from support.quantised_models import quantised
from support.tiny_models import FAMILY_MODELS, LATER_FAMILIES, write_tiny_model

from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.parallel.groups import Grid

pytestmark = pytest.mark.distributed

# Sums of some thousand fp64 products in another order; 1e-13 is usual.
TOLERANCE = 1e-10
CASES_A_START = 100  # so that a start ends within the limit of `ranks`

# No size of one is a size of another; heads * head_dim is not d; 321 words leave padding at TP 2 and 4.
SHAPES: dict[str, dict[str, Any]] = {
    "main": {"num_layers": 5, "head_dim": 6, "vocab_size": 321},
    "short": {"num_layers": 3, "head_dim": 6, "vocab_size": 321},
    "bias": {"num_layers": 3, "head_dim": 6, "attention_bias": True},
    "tied": {"num_layers": 3, "vocab_size": 321, "tied": True, "llama3_rope": True},
    "mha_tied": {"num_layers": 3, "num_kv_heads": 4, "tied": True},  # as many key-value heads as heads
    "wide": {"num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "vocab_size": 321},
    "thirds": {"num_layers": 3, "hidden_size": 36, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4},
}
# Those whose layers compute something of their own. The later ones come to more layouts, and to TP 4 with as many
# key-value heads.
FAMILIES = ("qwen3", "stablelm", "smollm3", "olmo2", "olmo3", "mistral", *LATER_FAMILIES)
AS_MANY = tuple(f"{name} mha" for name in LATER_FAMILIES if f"{name} mha" in FAMILY_MODELS)
SHAPES |= {name: FAMILY_MODELS[name] for name in (*FAMILIES, *AS_MANY, "qwen2")}
# What each layout, and whole and cut sequences meet in all cases and in part: models, methods, targets.
VIEWS: tuple[Callable[[Case], Any], ...] = (lambda c: c.folder, lambda c: c.method, lambda c: c.targets)
# At two stages one of them is then without an adapted layer.
SOME_LAYERS = (("lora", (2,)), ("lora", (5,)), ("tl6", (1, 2)), ("tl6", (5,)))


def _variants(layout: tuple[int, int, int]) -> list[dict[str, Any]]:
    sequence = (True, False) if layout[0] > 1 else (False,)
    return [
        {"layout": layout, "sequence_parallel": cut, "recompute": recompute}
        for cut in sequence
        for recompute in ("none", "full")
    ]


def _cases(folders: dict[str, Path], ranks: int, *, whole: bool = True) -> list[Case]:
    """Each method, some layers, packed rows, and each model of its own, in each way of sharding.

    In part, each layout meets every model, method and choice of layers, and each way both kinds of rows
    with every kind of recompute; on two ranks, whole and cut sequences and kinds of recompute meet each method.
    """
    cases, main, short = list[Case](), folders["main"], folders["short"]
    for layout in {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1)], 3: [], 4: [(2, 2, 1)]}[ranks]:
        for variant in _variants(layout):
            cases += [Case(short, method=method, **variant) for method in METHODS]
            cases += [Case(main, method="lora", layers=(2,), **variant)]
            if variant["recompute"] == "full":
                continue
            cases += [Case(main, method=name, layers=layers, **variant) for name, layers in SOME_LAYERS[1:]]
            cases += [Case(main, method=method, packed=True, **variant) for method in ("lora", "tl6")]
            cases += [Case(folders[shape], **variant) for shape in ("bias", "tied", *FAMILIES)]
            cases += [Case(folders["mha_tied"], method=method, **variant) for method in ("lora", "tl3", "tl6")]
        cases += [Case(main, packed=True, **_variants(layout)[1])]
        selective = {**_variants(layout)[0], "recompute": "selective"}
        cases += [Case(main, method=method, **selective) for method in ("lora", "tl6")]
    if ranks == 3:
        for variant in _variants((3, 1, 1)):
            cases += [Case(folders["thirds"], method=method, **variant) for method in ("lora", "tl2", "tl6")]
        cases += [Case(folders["thirds"], layout=(1, 3, 1), method=method) for method in ("tl5", "tl6")]
    if ranks == 4:
        # A is cut along d, so its rank may be anything; u is whole on every rank.
        for variant, rank in product(_variants((4, 1, 1)), (1, 2)):
            names = ("lora", "tl5", "tl6") if variant["recompute"] == "none" else ("tl6",)
            cases += [Case(folders["wide"], method=method, rank=rank, **variant) for method in names]
        cases += [Case(short, layout=(1, 2, 2), method=method) for method in ("lora", "tl3", "tl6")]
        cases += [Case(short, layout=(2, 1, 2), method=method) for method in ("vera", "tl6")]
        cases += [Case(short, layout=(2, 1, 2), method="tl6", sequence_parallel=True, recompute="full")]
        cases += [Case(main, layout=(1, 4, 1), method="tl6", layers=(3,))]
    if whole:
        return cases
    if ranks > 1:  # families come to these layouts with all targets, below
        cases = [case for case in cases if case.folder.name not in FAMILIES]
    views: list[Callable[[Case], Any]] = [
        *(lambda case, view=view: (case.layout, view(case)) for view in VIEWS[:2]),
        lambda case: (case.way, case.packed, case.recompute),
        lambda case: (case.layout, case.method, case.layers),
        lambda case: (case.way, case.rank),
    ]
    if ranks == 2:
        views += [lambda case, view=view: (case.sequence_parallel, view(case)) for view in VIEWS[:2]]
        views += [lambda case: (case.folder == folders["mha_tied"], case.method)]
        views += [lambda case: (case.method, case.recompute)]
    return part_of(cases, *views)


NEW_TARGETS = [(target,) for target in ALL_TARGETS if target != "qkv"] + [ALL_TARGETS]


def _target_cases(folders: dict[str, Path], ranks: int, *, whole: bool = True) -> list[Case]:
    """Each target but qkv alone, and all of them, in each way of sharding.

    In part, each layout meets every target, method, model and choice of layers, each way both kinds of rows and every
    kind of recompute with all targets and without; on two ranks, whole and cut sequences meet what layouts do.
    """
    cases = list[Case]()
    for layout in {2: [(2, 1, 1), (1, 2, 1)], 4: [(2, 2, 1), (4, 1, 1)]}[ranks]:
        main, short = (folders["wide" if layout[0] == 4 else name] for name in ("main", "short"))
        last = 3 if layout[0] == 4 else 5
        for variant in _variants(layout):
            methods = METHODS if variant["recompute"] == "none" else ("lora", "tl6")
            cases += [Case(short, method=m, targets=targets, **variant) for m, targets in product(methods, NEW_TARGETS)]
            if variant["recompute"] == "full":
                continue
            some = [*NEW_TARGETS[:-1], ("o_proj", "gate_up"), ALL_TARGETS]
            for method, layer, targets in product(("tl6", "lora"), (1, last), some):
                cases += [Case(main, method=method, layers=(layer,), targets=targets, **variant)]
            families = ("qwen2", *FAMILIES) if layout[0] < 4 else ()
            cases += [Case(folders[name], targets=ALL_TARGETS, **variant) for name in families]
        for targets in NEW_TARGETS:
            more: dict[str, Any] = {"targets": targets, "sequence_parallel": layout[0] > 1}
            cases += [Case(short, layout, recompute="full", **more)]
            cases += [Case(short, layout, recompute="selective", packed=True, **more)]
            more["layers"] = (last - 1, last)
            cases += [Case(main, layout, recompute="selective", method="lora", **more)]
        if layout[0] < 4:
            more = {"targets": ALL_TARGETS, "sequence_parallel": layout[0] > 1}
            cases += [Case(folders["olmo2"], layout, recompute="full", **more)]
            cases += [Case(folders["olmo2"], layout, recompute="selective", targets=ALL_TARGETS)]
    if whole:
        layouts = ((1, 2, 2), (2, 1, 2)) if ranks == 4 else ()
        cases += [Case(folders["main"], layout, targets=t) for layout, t in product(layouts, NEW_TARGETS)]
        for name, recompute in product(LATER_FAMILIES, ("selective", "full")):
            cuts = {2: [((2, 1, 1), True), ((1, 2, 1), False)], 4: [((2, 2, 1), True)]}[ranks]
            given = {"targets": ALL_TARGETS, "recompute": recompute, "packed": True}
            cases += [Case(folders[name], layout, sequence_parallel=cut, **given) for layout, cut in cuts]
        given = {"targets": ALL_TARGETS, "method": "lora"}
        names = AS_MANY if ranks == 4 else ()
        cases += [Case(folders[n], (4, 1, 1), sequence_parallel=cut, **given) for n in names for cut in (True, False)]
        return list(dict.fromkeys(cases))
    views: list[Callable[[Case], Any]] = [
        *(lambda case, view=view: (case.layout, view(case)) for view in VIEWS),
        lambda case: (case.way, case.targets == ALL_TARGETS, case.recompute),
        lambda case: (case.way, case.packed),
        lambda case: (case.layout, case.layers, case.targets == ALL_TARGETS),
    ]
    if ranks == 2:
        views += [lambda case, view=view: (case.sequence_parallel, view(case)) for view in VIEWS]
        views += [lambda case: (case.folder, case.recompute)]
    return part_of(cases, *views)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(folder / name, tokenizer=False, **shape) for name, shape in SHAPES.items()}


def test_families_and_targets_are_in_the_quick_cases() -> None:
    named = {name: Path(name) for name in SHAPES}
    cases = [case for ranks in (2, 4) for case in _target_cases(named, ranks, whole=False)]
    assert {case.folder.name for case in cases} >= {"qwen2", *FAMILIES}
    assert {case.targets for case in cases} >= set(NEW_TARGETS)
    for value in (True, False):
        whole = {case.layout for case in cases if case.sequence_parallel is value}
        packed = {case.layout for case in cases if case.packed is value}
        assert whole >= {(2, 1, 1), (2, 2, 1)} and packed >= {(2, 1, 1), (1, 2, 1), (2, 2, 1)}, value


class Answers:
    """The oracle's loss, gradients and logits, worked out once for each adapter and base."""

    def __init__(self) -> None:
        self._gradients: dict[Any, Any] = {}
        self._weights: dict[Any, Any] = {}

    def weights(self, case: Case) -> tuple[Any, OracleConfig]:
        """The base that the adapter is on: with the values of its format."""
        key = case.folder, case.base
        if key not in self._weights:
            loaded = load_weights(case.folder)
            values = cast_weights(quantised(loaded, case.base) if case.base else loaded, DTYPE)
            self._weights[key] = values, OracleConfig.from_folder(case.folder)
        return self._weights[key]

    def gradients(self, case: Case) -> tuple[float, dict[str, torch.Tensor]]:
        """Of the samples, each on its own: neither padded nor packed; dropout is drawn for each, too."""
        adapter = case.method, case.rank, case.layers, case.targets, case.shares
        key = case.folder, case.base, *adapter, case.dropout, case.objective
        if key not in self._gradients:
            samples = case.samples
            if case.dropout:
                draws = [dropout(numbers, seed=SEED, probability=case.dropout) for numbers in case.numbers]
                samples = [replace(sample, drops=[draw]) for sample, draw in zip(samples, draws, strict=True)]
            self._gradients[key] = oracle_gradients(*self.weights(case), case.adapter, samples)
        return self._gradients[key]

    def logits(self, case: Case) -> torch.Tensor:
        batch = case.micro_batches[-1]
        return oracle_logits(
            *self.weights(case), case.adapter, batch.input_ids, None, batch.positions, documents=batch.documents
        )


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gradients_equal_the_oracle(
    folders: dict[str, Path], answers: Answers, tmp_path: Path, ranks: int, whole: bool
) -> None:
    run_and_check(_cases(folders, ranks, whole=whole), answers, tmp_path, ranks)


@pytest.mark.cpu_seconds(30, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_every_target_equal_the_oracle(
    folders: dict[str, Path], answers: Answers, tmp_path: Path, ranks: int, whole: bool
) -> None:
    run_and_check(_target_cases(folders, ranks, whole=whole), answers, tmp_path, ranks)


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_with_the_adapter_in_the_matmul(
    folders: dict[str, Path], answers: Answers, tmp_path: Path, ranks: int
) -> None:
    """Also where gate and up are recomputed; olmo2 has no norm before a linear."""
    cases = list[Case]()
    for variant in _variants((ranks, 1, 1)):
        given = {"adapter_in_matmul": True, "targets": ALL_TARGETS, **variant}
        cases += [Case(folders["short"], **given | {"recompute": how}) for how in ("none", "selective", "full")]
        cases += [Case(folders["main"], layers=(2,), packed=True, **given | {"targets": ("qkv",)})]
        names = "bias", "stablelm", "olmo2", "qwen3", "gemma3", "glm4"
        cases += [Case(folders[name], method="lora", **given) for name in names]
    if ranks == 2:
        cases += [replace(case, overlap=True) for case in cases if case.folder == folders["short"]]
    run_and_check(list(dict.fromkeys(cases)), answers, tmp_path, ranks)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_later_families_at_every_layout(answers: Answers, tmp_path: Path, ranks: int) -> None:
    """Five layers with all linears adapted; at TP 4 with four key-value heads."""
    layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
    cases = list[Case]()
    for name, four in product(LATER_FAMILIES, (False, True)):
        sizes = {"num_layers": 5, **({"num_kv_heads": 4} if four else {})}
        folder = write_tiny_model(tmp_path / f"{name}-{four}", tokenizer=False, **{**FAMILY_MODELS[name], **sizes})
        for tp, pp, dp in [(own.tp, own.pp, own.dp) for own in layouts if (own.tp == 4) == four]:
            given = {"sequence_parallel": tp > 1, "recompute": "selective" if pp > 1 else "none", "packed": dp > 1}
            cases += [Case(folder, (tp, pp, dp), targets=ALL_TARGETS, **given)]
    assert len({case.layout for case in cases}) == len(layouts) and len(cases) == len(layouts) * len(LATER_FAMILIES)
    run_and_check(cases, answers, tmp_path, ranks)


def _half_cases(folders: dict[str, Path], ranks: int, *, whole: bool = True) -> list[Case]:
    """Micro-batches in two halves that are computed alternately, with each kind of recompute, of messages and rows."""
    cases = list[Case]()
    for layout in {2: [(2, 1, 1)], 4: [(2, 2, 1), (4, 1, 1)]}[ranks]:
        short = folders["wide" if layout[0] == 4 else "short"]
        for cut, recompute in product((True, False), ("none", "selective", "full")):
            given: dict[str, Any] = {"sequence_parallel": cut, "recompute": recompute, "overlap": True}
            cases += [Case(short, layout, targets=targets, **given) for targets in (("qkv",), ALL_TARGETS)]
            cases += [Case(short, layout, method="lora", layers=(2,), targets=ALL_TARGETS, **given)]
            cases += [Case(short, layout, packed=True, dropout=0.25, targets=ALL_TARGETS, **given)]
            # nothing before down_proj of the second layer has a gradient
            cases += [Case(short, layout, method="vera", layers=(2,), targets=("down_proj",), **given)]
            cases += [Case(folders["olmo2"], layout, targets=ALL_TARGETS, **given)] if layout[0] == 2 else []
    if whole:
        families = ("gemma2", "gemma3", "granite", "glm4")
        given = {"targets": ALL_TARGETS, "overlap": True, "sequence_parallel": True}
        return cases + [Case(folders[name], (2, ranks // 2, 1), **given) for name in families]
    return part_of(cases, lambda case: (case.way, case.recompute), lambda case: (case.way, case.targets, case.packed))


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_two_halves_equal_the_oracle(
    folders: dict[str, Path], answers: Answers, tmp_path: Path, ranks: int, whole: bool
) -> None:
    run_and_check(_half_cases(folders, ranks, whole=whole), answers, tmp_path, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_of_every_loss_of_tokens_equal_the_oracle(
    folders: dict[str, Path], answers: Answers, tmp_path: Path, ranks: int
) -> None:
    """Every loss in every way of sharding, packed and in halves; the last block's MLP is adapted too."""
    cases = list[Case]()
    for layout in {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1)], 4: [(2, 2, 1), (1, 2, 2)]}[ranks]:
        for variant, objective in product(_variants(layout), SETTINGS):
            cases += [Case(folders["short"], objective=objective, targets=ALL_TARGETS, **variant)]
        last = {**_variants(layout)[0], "objective": "ppo", "packed": True}
        cases += [Case(folders["short"], **last), Case(folders["gemma2"], **last)]
        cases += [Case(folders["short"], overlap=True, **last)] if layout[0] == 2 else []
    run_and_check(cases, answers, tmp_path, ranks)


def run_and_check(cases: list[Case], answers: Answers, tmp_path: Path, ranks: int) -> None:
    """Run all cases, some in one start, and compare each with the oracle and with the messages that it should send."""
    for number, first in enumerate(range(0, len(cases), CASES_A_START)):
        started = cases[first : first + CASES_A_START]
        by_rank = run_on_ranks(run_gradients, started, ranks=ranks, folder=tmp_path / str(number))
        for case, outcomes in zip(started, zip(*by_rank, strict=True), strict=True):
            check_numbers(case, list(outcomes), answers)
            check_ties(case, list(outcomes))
            check_messages(case, list(outcomes))


def check_numbers(case: Case, outcomes: list[Outcome], answers: Answers) -> None:
    """Loss, logits and all gradients are the oracle's."""
    loss, expected = answers.gradients(case)
    last = [outcome for grid, outcome in zip(grids(case), outcomes, strict=True) if grid.pp_rank == grid.pp_size - 1]
    tp_size = case.layout[0]
    for tp_rank in range(tp_size):
        found = sum(outcome.loss for outcome in last[tp_rank::tp_size])  # over data-parallel ranks
        assert abs(found - loss) <= TOLERANCE * abs(loss), (found, loss, case)
    if case.gives_logits:
        logits = answers.logits(case)
        for outcome in last[:tp_size]:
            assert outcome.logits is not None and outcome.logits.shape == logits.shape, case
            assert (outcome.logits - logits).abs().max() <= TOLERANCE * logits.abs().max(), case
    gradients = joined(case, [outcome.gradients for outcome in outcomes])
    assert gradients.keys() == expected.keys()
    for name, reference in expected.items():
        found = gradients[name]
        assert found.shape == reference.shape and reference.abs().max() > 0, (name, case)
        assert relative_distance(found, reference) <= TOLERANCE, (name, relative_distance(found, reference), case)
        assert (found - reference).abs().max() <= TOLERANCE * reference.abs().max(), (name, case)


def check_ties(case: Case, outcomes: list[Outcome]) -> None:
    """Stages have different parts of a tied gradient before their sum; frozen tensors have none."""
    config, all_parts = case.adapter_config, []
    for grid, outcome in zip(grids(case), outcomes, strict=True):
        part = case.part(grid)
        tied = [name for name in case.adapter.trained if config.is_tied(name)]
        assert not outcome.frozen_gradients, case
        assert set(outcome.parts) == set(tied if part.layers else []), case
        if grid.tp_rank == grid.dp_rank == 0 and part.layers:
            all_parts.append(outcome.parts)
        if grid.pp_rank > 0:  # the stage before wants a gradient only if a layer down there is adapted
            wanted = case.adapter.layers[0] < case.stages[grid.pp_rank].start
            assert len(outcome.input_gradients) == len(case.micro_batches[grid.dp_rank :: grid.dp_size])
            assert (max(outcome.input_gradients) > 0) == wanted, case
    for other in all_parts[1:]:
        assert all(relative_distance(other[name], all_parts[0][name]) > 1e-3 for name in other), case


def check_messages(case: Case, outcomes: list[Outcome]) -> None:
    """What the tensor-parallel group sends is what the layers send, and for the adapter no more than the rules say."""
    for grid, outcome in zip(grids(case), outcomes, strict=True):
        found, tied = outcome.traffic.messages, outcome.tied_traffic
        assert {group for group, _ in found} <= {"tensor", "pipeline", "stage"}, (found, case)
        expected = tensor_messages(case, grid)
        kinds = ("all-gather", "reduce-scatter", "all-reduce")
        if not case.counted:
            kinds = ()
        elif case.recompute == "full":  # blocks send again, by kinds[:2] or by kinds[2:]; adapters do not
            kinds = kinds[2:] if case.sequence_parallel else kinds[:2]
        for kind in kinds:
            assert found["tensor", kind] == expected[kind], (kind, found, expected, case)
        part, config = case.part(grid), case.adapter_config
        sums_u = grid.tp_size > 1 and config.method_spec.u.trained and bool(part.layers)
        if case.counted:  # one message for all targets
            u_bytes = 8 * len(part.layers) * case.rank * len(case.targets)
            assert outcome.traffic.of_group("stage") == ((1, u_bytes) if sums_u else (0, 0)), case
        sizes = [
            torch.Size(part.local_shape(name)).numel()
            for name in case.adapter.trained
            if config.is_tied(name) and grid.pp_size > 1
        ]
        once = {("tied", "all-reduce"): 1} if sizes else {}
        assert tied.messages == once and tied.of_group("tied")[1] == 8 * sum(sizes), case


def tensor_messages(case: Case, grid: Grid) -> Counter[str]:
    """Messages of a rank's tensor-parallel group in one forward and backward pass without full recompute, by kind.

    Worked out by hand: a block enters and leaves its region twice. The adapter adds one gather and its reduce-scatter
    for each micro-batch and stage, whatever the number of layers and targets: of A for qkv and gate_up, of B and v for
    o_proj and down_proj, where these are trained. Nothing before the first adapted linear needs a gradient; with
    sequence parallelism a trained A there needs one of r columns, and B, u and v that of the whole output. Where gate
    and up are computed again a block enters once more, but the last, whose backward pass comes at once. Norms of all
    heads are summed over ranks once in each pass of the linear before them.
    """
    count: Counter[str] = Counter()
    if grid.tp_size == 1:
        return count
    enter, leave = ("all-gather", "reduce-scatter") if case.sequence_parallel else ("", "all-reduce")
    enter_back, leave_back = ("reduce-scatter", "all-gather") if case.sequence_parallel else ("all-reduce", "")
    shape, first, stage = case.shape, case.adapter.layers[0], case.stages[grid.pp_rank]
    learns = TRAINED_TENSORS[case.method]
    gathered = {"qkv": "A", "gate_up": "A", "o_proj": "Bv", "down_proj": "Bv"}
    for batch in case.micro_batches[grid.dp_rank :: grid.dp_size]:
        for half, layer in product(halves_of(case, batch.labels), stage):
            if layer == 0:
                count[leave] += 1
            elif layer <= shape.num_layers:
                count[enter] += 2
                count[leave] += 2
                together = any(norm.sharded for norm in shape.heads.norms)
                count["all-reduce"] += together
                if layer < first:
                    continue
                start = ALL_TARGETS.index(case.targets[0]) if layer == first else -1  # the first one with a gradient
                count["all-reduce"] += together and start <= 0
                if case.recompute == "full":  # of the last block only what comes before the end of attention
                    count["all-reduce"] += together and (start <= 0 or layer < shape.num_layers)
                for index, linear in enumerate(ALL_TARGETS):
                    adapted = index == start and linear in case.targets
                    if linear in ("o_proj", "down_proj"):
                        count[leave_back] += index > start or adapted
                    else:
                        narrow = adapted and case.sequence_parallel and "A" in learns
                        count[enter_back] += index > start or narrow
                if case.recompute == "selective" and layer < shape.num_layers:
                    count[enter] += start < ALL_TARGETS.index("down_proj") or "A" in learns
            else:
                count[enter] += 1
                count[enter_back] += 1
                count["all-gather"] += bool((half != -100).any())  # of the loss
        if case.part(grid).layers and any(set(gathered[target]) & set(learns) for target in case.targets):
            count["all-gather"] += 1
            count["reduce-scatter"] += 1
    return count


def halves_of(case: Case, labels: torch.Tensor) -> Sequence[torch.Tensor]:
    """The labels of what is computed at once: half of a micro-batch, if it has an even number of rows."""
    return labels.chunk(2) if case.overlap and len(labels) % 2 == 0 else [labels]


def grids(case: Case) -> list[Grid]:
    """Every rank's place."""
    tp_size, pp_size, dp_size = case.layout
    world_size = tp_size * pp_size * dp_size
    return [Grid(rank, world_size, tp_size=tp_size, pp_size=pp_size) for rank in range(world_size)]


def test_cases_are_what_they_are_meant_to_be(folders: dict[str, Path]) -> None:
    """Stages without an adapted layer, layers that stages do not divide, padding of vocabulary and sequence."""
    cases = [case for ranks in (2, 3, 4) for case in _cases(folders, ranks)]
    assert {(2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (3, 1, 1)} <= {case.layout for case in cases}
    empty = [case for case in cases if any(not case.part(grid).layers for grid in grids(case))]
    assert {(case.layout, case.layers) for case in empty} >= {
        (layout, layers) for layout in ((1, 2, 1), (2, 2, 1)) for _, layers in SOME_LAYERS
    }
    for case in cases:
        shape, tp_size = case.shape, case.layout[0]
        as_many = case.folder == folders["mha_tied"]
        assert (shape.heads.num_kv == shape.heads.num) == as_many and case.adapter.alpha != case.rank
        assert shape.num_layers % case.layout[1] or case.layout[1] in (1, 3)
        lengths = {batch.input_ids.shape[1] for batch in case.micro_batches}
        assert len(lengths) == 3 or case.packed, lengths
        if tp_size == 2 and not case.sequence_parallel:  # so with it, padding is needed in every micro-batch
            assert all(length % 2 for length in lengths) or case.packed, lengths
    assert any(case.shape.vocab_size % case.layout[0] for case in cases)
    alone = [case for ranks in (2, 4) for case in _target_cases(folders, ranks, whole=False) if case.layers]
    assert any(not case.part(grid).layers for case in alone for grid in grids(case))
