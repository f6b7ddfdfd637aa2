"""Runs cases of the engine on some ranks, at layouts, and reads back what they did; what the oracle makes of each case;
and the comparison of the two.

A case: {"settings": {...}, "start": file of A, B, u, v or null, "optimizer": "adamw" or "sgd", "output": folder}, and
"faults": what to break before the model is built (see fault_patches.py); "may_fail": whether a run that ends with a
UserError is an answer (each rank then gives its message) or an error of the test; "shares": how layers share the
tensors of tl6 (see shared_tensors.py). A rank trains its cases as the package does, one after another.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from megatron_tiedlora.adapters.tied_adapter import initial_values
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.run_plan import plan_run
from support.fault_patches import put_in
from support.forked_ranks import join_as_launched, run_on_ranks
from support.oracle import OracleAdapter, OracleConfig, cast_weights, load_weights
from support.oracle_adapter import dropout
from support.oracle_training import OracleBatch, OracleRun, oracle_train
from support.shared_tensors import GROUPS, tl6_shares
from support.tiny_models import pack_samples, random_adapter, write_tiny_model

T = TypeVar("T")

STEPS = 6
# Two steps of two micro-batches, or of one where data-parallel ranks share them: whether buffers of a pipeline are used
# again, and what a third step does without the checks of the first two, is seen in test_layouts.py at every layout.
SHORT: dict[str, Any] = {"max_steps": 2, "micro_batch_size": 4}
CASES_A_START = 24  # so that a start ends within the limit of `ranks`
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-5
ADAPTER_TOLERANCE = {"adamw": 5e-5, "sgd": 1e-5}
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class EngineRun:
    """What a run logged: per-step losses and norms before clipping, and the final full adapter.

    Attributes:
        local: each rank's part of the adapter.
        failures: each rank's message, where the run was stopped; `adapter` and `local` are empty then.
        saved: the checkpoints that are there at the end.
    """

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    adapter: dict[str, torch.Tensor]
    local: list[dict[str, torch.Tensor]]
    failures: list[str]
    saved: list[str]


def write_uneven_data(path: Path, *, rows: int = 40, seed: int = 0) -> Path:
    """Prompt and completion rows whose supervised lengths run from 2 to 60 tokens."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for index in range(rows):
            prompt = "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(3, 40)))
            answer = "".join(draw.choice("klmnop") for _ in range((1, 3, 9, 58)[index % 4]))
            stream.write(json.dumps({"prompt": prompt + "?", "completion": answer}) + "\n")
    return path


def save_start(adapter: OracleAdapter, path: Path) -> Path:
    """Write an oracle adapter's tensors as the worker reads them."""
    save_file({name: tensor.contiguous() for name, tensor in adapter.tensors.items()}, path)
    return path


def run_engine(cases: list[dict[str, Any]], folder: Path, *, ranks: int) -> list[EngineRun]:
    """Run all cases in one start of `ranks` processes; a hang or a failing rank fails the test with its output."""
    for index, case in enumerate(cases):
        case["output"] = str(folder / f"case{index}")
    by_rank = run_on_ranks(run_cases, cases, str(folder), ranks=ranks, folder=folder / "ranks")
    ends = zip(*by_rank, strict=True)
    return [_read(Path(case["output"]), found) for case, found in zip(cases, ends, strict=True)]


def _read(folder: Path, found: Sequence[dict[str, Any]]) -> EngineRun:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    failures = [end["failure"] for end in found if "failure" in end]
    assert len(failures) in (0, len(found)), f"some ranks went on: {failures}"
    return EngineRun(
        losses=[row["loss"] for row in steps],
        grad_norms=[row["grad_norm"] for row in steps],
        learning_rates=[row["learning_rate"] for row in steps],
        adapter={} if failures else found[0]["adapter"],
        local=[] if failures else [end["local"] for end in found],
        failures=failures,
        saved=sorted(item.name for item in (folder / "checkpoints").glob("step_*")),
    )


def oracle_run(settings: dict[str, Any], start: OracleAdapter, *, optimizer: str = "adamw") -> OracleRun:
    """The dense one-process answer: the same samples, in fp32.

    The oracle reads four of them as documents of one sequence, which test_oracle.py shows to be four sequences: it goes
    over sequences and heads in Python, one after another, and would take three times as long for each sample alone.
    """
    from megatron_tiedlora.data.encode import encode_dataset
    from megatron_tiedlora.data.splits import load_split
    from megatron_tiedlora.data.token_dataset import sample_indices
    from megatron_tiedlora.data.tokenizer import load_tokenizer

    model = Path(settings["model"])
    tokenizer = load_tokenizer(model)
    files = {"train": settings["train_file"], "validation": settings["validation_file"]}
    examples = load_split("custom", "train", files=files, seed=settings["seed"], tokenizer=tokenizer)
    dataset = encode_dataset(examples, tokenizer, max_length=settings["max_length"])
    steps = []
    for step in range(settings["max_steps"]):
        count = settings["global_batch_size"]
        indices = sample_indices(len(dataset), seed=settings["seed"], consumed=step * count, count=count)
        samples, numbers = [], []
        for place, index in enumerate(indices.tolist(), start=step * count):
            tokens = torch.from_numpy(dataset.sample(index).astype("int64"))
            labels = torch.full_like(tokens, -100)
            learned = torch.from_numpy(dataset.supervised_of(index)[1:])
            labels[:-1][learned] = tokens[1:][learned]
            samples.append(OracleBatch(tokens[None], labels[None]))
            numbers.append([place * 2**24 + t for t in range(len(tokens))])
        rows = [pack_samples(samples[first : first + 4]) for first in range(0, count, 4)]
        if p := settings.get("dropout"):
            joined = [list(itertools.chain(*numbers[first : first + 4])) for first in range(0, count, 4)]
            draws = [dropout(ids, seed=settings["seed"], probability=p) for ids in joined]
            rows = [replace(row, drops=[drawn]) for row, drawn in zip(rows, draws, strict=True)]
        steps.append(rows)
    return oracle_train(
        cast_weights(load_weights(model), torch.float32),
        OracleConfig.from_folder(model),
        start,
        steps,
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"],
        max_steps=settings["max_steps"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["gradient_clipping"],
        optimizer=optimizer,
        rate_factors={name: float(one) for name, _, one in _pairs(settings.get("rate_factors", ""))},
    )


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [pair.partition("=") for pair in text.split(",") if pair]


def relative_errors(found: list[float], expected: list[float]) -> list[float]:
    """|found - expected| / |expected|, step by step."""
    assert len(found) == len(expected)
    return [abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True)]


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


# Cases at layouts -----------------------------------------------------------------------------------------------------


def with_optimizers(cases: Sequence[T], *, whole: bool) -> list[tuple[T, str]]:
    """Each case with both optimizers, or in part with one of them in turn."""
    return [
        (case, optimizer)
        for index, case in enumerate(cases)
        for optimizer in (OPTIMIZERS if whole else OPTIMIZERS[index % 2 :][:1])
    ]


@dataclass(frozen=True)
class Layout:
    """Sizes of a grid."""

    tp: int
    pp: int
    dp: int

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def settings(self) -> dict[str, Any]:
        """The two sizes that a run is told."""
        return {"tensor_parallel": self.tp, "pipeline_parallel": self.pp}


LAYOUTS = [
    Layout(*sizes)
    for sizes in (
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
        (2, 2, 1),
        (2, 1, 2),
        (1, 2, 2),
        (4, 1, 1),
        (1, 4, 1),
        (2, 2, 2),
    )
]


def engine_json(folder: Path, stage: int, **zero: Any) -> Path:
    """An engine JSON of a ZeRO stage that takes SGD too."""
    zero = {"stage": stage, "reduce_bucket_size": 1000000, **zero}
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_allow_untested_optimizer": True, "zero_optimization": zero}))
    return file


def settings_of(model: Path, folder: Path) -> dict[str, Any]:
    """Settings of a short run of `model` on uneven samples, with clipping active; the files are in `folder`."""
    return {
        "model": str(model),
        "train_file": str(write_uneven_data(folder / "train.jsonl")),
        "validation_file": str(write_uneven_data(folder / "validation.jsonl", rows=2, seed=1)),
        "ds_config": str(engine_json(folder, 1)),
        "dtype": "fp32",
        "rank": 3,
        "alpha": 6.0,
        "seed": 11,
        "max_length": 128,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "gradient_clipping": 0.05,
        "eval_interval": 1000,
    }


def five_layers(folder: Path) -> dict[str, Any]:
    """Settings of a tiny model whose 5 layers divide by neither 2 nor 4 stages; 8 heads on 4 key-value heads."""
    model = write_tiny_model(folder / "model", num_layers=5, num_heads=8, num_kv_heads=4, head_dim=6)
    return settings_of(model, folder)


@dataclass(frozen=True)
class Prepared:
    """A case for the workers with the oracle's run of it."""

    case: dict[str, Any]
    oracle: OracleRun
    layout: Layout


_oracles: dict[Any, OracleRun] = {}
"""By the folder of `prepare` and what of its arguments the oracle's run depends on."""


def prepare(
    base: dict[str, Any],
    folder: Path,
    layout: Layout,
    /,
    *,
    optimizer: str = "sgd",
    own_start: bool = False,
    oracle_model: Path | None = None,
    shares: str | None = None,
    **changes: Any,
) -> Prepared:
    """A case at `layout` that starts from random non-zero factors.

    Args:
        folder: for files; cases with the same one differ in layout, optimizer and method alone, as the oracle sees it.
        own_start: it starts from the package's own values, and the oracle from those that one rank alone draws.
        oracle_model: what the oracle computes with; None for the run's own model.
        shares: in which way of `shared_tensors` layers share the tensors of tl6.
    """
    settings = {**base, **layout.settings, **changes}
    if layout.pp * layout.dp == 1 and "micro_batch_size" not in changes:
        settings["micro_batch_size"] *= 2  # two micro-batches are enough where no stage waits for another
    if optimizer == "sgd":
        settings["learning_rate"] = 0.3
    layers, targets = settings.get("layers"), settings.get("targets", ["qkv"])
    method, rank = settings.get("method", "tl6"), settings["rank"]
    key = (method, rank, optimizer, str(layers), settings["max_steps"], "+".join(targets), settings.get("base"), shares)
    key += (settings.get("rate_factors"),)
    file = folder / f"{'-'.join(map(str, key))}.safetensors"
    if (file, own_start) not in _oracles:
        if own_start:
            alone = {**settings, "tensor_parallel": 1, "pipeline_parallel": 1}
            config = plan_run(make_settings(alone), rank=0, world_size=1).adapter
            start = OracleAdapter(config.method, config.rank, config.alpha, config.layers, initial_values(config))
        else:
            start = random_adapter(
                method,
                OracleConfig.from_folder(Path(base["model"])),
                rank=rank,
                alpha=settings["alpha"],
                layers=tuple(layers) if layers else None,
                seed=3,
                scale=0.2,
                targets=targets,
                groups=GROUPS[shares] if shares else None,
            )
            save_start(start, file)
        of_oracle = settings if oracle_model is None else {**settings, "model": str(oracle_model)}
        _oracles[file, own_start] = oracle_run(of_oracle, start, optimizer=optimizer)
    case = {"settings": settings, "start": None if own_start else str(file), "optimizer": optimizer, "shares": shares}
    return Prepared(case, _oracles[file, own_start], layout)


def red_measures(run: EngineRun, prepared: Prepared, *, loss: float = LOSS_TOLERANCE) -> dict[str, Any]:
    """Which measures say that the run is not the oracle's, and how far it is: losses, rates, norms, the factors, and
    copies of tied tensors, which are equal to the last bit."""
    oracle, layout = prepared.oracle, prepared.layout
    assert min(oracle.grad_norms) > 0.05, "clipping must be active"
    found = {
        "losses": (max(relative_errors(run.losses, oracle.losses)), loss),
        "norms": (max(relative_errors(run.grad_norms, oracle.grad_norms)), NORM_TOLERANCE),
    }
    for factor in oracle.adapter.trained:
        distance = relative_distance(run.adapter[factor], oracle.adapter.tensors[factor])
        found[factor] = distance, ADAPTER_TOLERANCE[prepared.case["optimizer"]]
    red: dict[str, Any] = {name: error for name, (error, limit) in found.items() if not error <= limit}
    if run.learning_rates != pytest.approx(oracle.learning_rates, rel=1e-12):
        red["rates"] = run.learning_rates
    tied = "AB" if prepared.case["settings"].get("method", "tl6") != "lora" else ""
    for rank, local in enumerate(run.local):
        first = rank // (layout.tp * layout.dp) * layout.tp * layout.dp
        for factor, value in local.items():
            # u is whole on every rank of its stage.
            twin = rank % layout.tp if factor[-1] in tied else first if factor[-1] == "u" else rank
            if not torch.equal(value, run.local[twin][factor]):
                red[f"copies_of_{factor}"] = rank
    return red


def check(run: EngineRun, prepared: Prepared, *, loss: float = LOSS_TOLERANCE) -> None:
    """The run is the oracle's, with losses within `loss`."""
    red = red_measures(run, prepared, loss=loss)
    assert not red, (red, prepared.case)


def run_and_check(prepared: list[Prepared], folder: Path, *, loss: float = LOSS_TOLERANCE) -> None:
    """Run all cases, some in one start, and compare each with its oracle."""
    ranks = prepared[0].layout.ranks
    for first in range(0, len(prepared), CASES_A_START):
        started = prepared[first : first + CASES_A_START]
        place = folder / f"from{first}" if first else folder  # which has the oracle's tokenised samples
        runs = run_engine([item.case for item in started], place, ranks=ranks)
        for item, run in zip(started, runs, strict=True):
            check(run, item, loss=loss)


# One rank -------------------------------------------------------------------------------------------------------------


def sgd(parameters: Any, *, weight_decay: float, lr: float = 0.0, betas: Any = None) -> Any:
    """In place of AdamW in training.build: p -= lr (g + decay p), without momentum; groups have their own rates."""
    from torch.optim import SGD

    return SGD(list(parameters), lr=lr, weight_decay=weight_decay)


def run_case(case: dict[str, Any], patch: pytest.MonkeyPatch, device: Any) -> dict[str, Any]:
    """Train as a run does, into the output folder; this rank's part of the adapter, and on rank 0 the full one."""
    from megatron_tiedlora.adapters import tied_adapter
    from megatron_tiedlora.adapters.adapter_groups import ONLY
    from megatron_tiedlora.planning.adapter_plans import prepare_data
    from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder
    from megatron_tiedlora.runtime.stopping import StopRequests
    from megatron_tiedlora.training import build, start, throughput
    from megatron_tiedlora.training.adapter_run import AdapterRun
    from megatron_tiedlora.training.loop import Trainer
    from megatron_tiedlora.training.step import TrainStep

    rank = distributed.get_rank()
    plan = plan_run(make_settings(case["settings"]), rank=rank, world_size=distributed.get_world_size())
    data = prepare_data(plan)
    folder = RunFolder(Path(case["output"]))
    use_sgd = case.get("optimizer") == "sgd"
    if use_sgd:
        patch.setattr(build, "AdamW", sgd)
    if case.get("start"):
        values = load_file(case["start"])
        patch.setattr(tied_adapter, "initial_values", lambda _: values)
    # Counting a model's operations takes longer than these steps, and no test of theirs reads a rate.
    patch.setattr(throughput, "step_flops", lambda *_: Counter(linears=1))
    built = build.build_model({ONLY: plan}, device)
    runner, layout = built.runner, plan.layout_of(plan.adapter)
    if rank == 0:
        folder.path.mkdir(parents=True)
        start.write_run_settings(plan, folder)
    stop = StopRequests()
    step = TrainStep({ONLY: plan}, runner, stop)
    run = AdapterRun(
        name=ONLY,
        plan=plan,
        data=data,
        runner=runner,
        base_identity=built.base_identity,
        layout=layout,
        folder=folder,
        log=MetricsLog(folder, resumed_step=0) if rank == 0 else None,
        meter=throughput.Meter(plan.source.shape, plan.adapter, throughput.Peak(1e9, "made up")),
        checks=step.checks[ONLY],
    )
    if use_sgd:
        run.save = lambda **_: None  # it has no moments to save
    Trainer({ONLY: run}, step, folder, stop, {ONLY: run}).run()
    local = {name: parameter.detach().clone() for name, parameter in runner.adapters[ONLY].named_parameters()}
    state = runner.full_state(ONLY, layout)
    runner.engine.destroy()
    return {"local": local, "adapter": state if rank == 0 else None}


def run_cases(cases: Sequence[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """All cases on this rank, which finds tokenised samples in `folder`."""
    device, ends = join_as_launched(folder), []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch, tl6_shares(case.get("shares")):
            put_in(case.get("faults", []), patch)
            try:
                ends.append(run_case(case, patch, device))
            except UserError as error:
                if not case.get("may_fail"):
                    raise
                ends.append({"failure": str(error)})
    return ends
