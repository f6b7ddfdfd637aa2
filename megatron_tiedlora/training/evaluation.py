"""Evaluations of a run's adapters, at one time: their validation losses, and scores of greedy decoding.

Each adapter has the batches that it has alone, and its tokens meet its own factors alone. Only the base's matmuls are
over the tokens of several. So the numbers are those of an evaluation of its own, and one that fails fails alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.data.loader import Owned, evaluation_sizes, fill_rounds, shared_micro_batch
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.evaluation.answering import Questions, ScoredSet, answer_all
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.evaluation.results import Score, score_answers
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, sum_over_ranks
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.adapter_run import AdapterRun, Evaluated

Runs = Sequence[AdapterRun]
Found = TypeVar("Found")

# Tokens of a shared batch, in micro-batches of a training step. Without a backward pass a batch needs the memory of one
# layer, where a step needs that of all layers, or with recomputation their inputs and one layer with its gradients.
STEPS_AT_ONCE = 4


@dataclass(frozen=True)
class Evaluation:
    """Evaluates adapters on one rank. All ranks make the same calls.

    Attributes:
        capacity: tokens of a shared micro-batch of a training step; 0: nothing is shared.
    """

    runner: Runner
    capacity: int
    stop: StopRequests

    def evaluated(self, runs: Runs) -> dict[str, Evaluated]:
        """What an evaluation of each finds, by name. One whose answers cannot be scored fails, and is left out.

        Raises:
            RunStopped: all ranks agreed to stop.
        """
        losses = self.losses(runs)
        scores = self.scores(runs, lambda run: run.data.scored_validation)
        return {name: Evaluated(losses[name], found) for name, found in scores.items()}

    def losses(self, runs: Runs) -> dict[str, float]:
        """The mean loss of each over all supervised tokens of its validation split, the same on every rank.

        Raises:
            RunStopped: all ranks agreed to stop before a batch (in a pipeline: before a few batches).
        """
        if not runs:
            return {}
        totals = dict.fromkeys((run.name for run in runs), 0.0)
        of_batches: dict[str, list[tuple[float, int]]] = {run.name: [] for run in runs}
        batches = self._shared_batches(runs)
        total = sum(run.num_evaluation_batches for run in runs)
        with progress_bar("validation", "batch", total=total, shows=runs[0].is_main) as bar:
            while some := list(islice(batches, self.runner.inputs_at_once)):
                self.stop.agree(True)
                found = self.runner.evaluate([shared_micro_batch(owned) for owned in some])
                for owned, losses in zip(some, found, strict=True):
                    for name, batch in owned:
                        totals[name] += losses[name]
                        of_batches[name].append((losses[name], batch.num_supervised))
                bar.update(sum(map(len, some)))
        summed = sum_over_ranks(list(totals.values()))
        for run in runs:
            with run.failing_alone():
                run.keep_losses(of_batches[run.name])
        pairs = zip(runs, summed, strict=True)
        return {run.name: loss / run.data.validation.num_supervised for run, loss in pairs}

    def _shared_batches(self, runs: Runs) -> Iterator[list[Owned]]:
        """The batches of all, in shared ones: the first of every adapter, then the second."""
        batches = {run.name: run.evaluation_batches() for run in runs}
        sizes = {run.name: _sizes(run) for run in runs}
        for some in fill_rounds(sizes, capacity=STEPS_AT_ONCE * self.capacity):
            yield [(name, next(batches[name])) for name, _ in some]

    def scores(self, runs: Runs, samples_of: Callable[[AdapterRun], ScoredSet | None]) -> dict[str, dict[str, Score]]:
        """The scores of each on its own samples, by metric; one whose answers cannot be scored fails.

        Raises:
            RunStopped: all ranks agreed to stop.
        """
        asked = {run.name: scored for run in runs if (scored := samples_of(run)) is not None}
        answers = self._answers([run for run in runs if run.name in asked], asked) if asked else {}
        found: dict[str, dict[str, Score]] = {}
        for run in runs:
            with run.failing_alone():
                found[run.name] = {}
                if run.name in asked:
                    names, own = asked[run.name].task.metrics, answers.get(run.name, [])
                    score = partial(score_answers, names, own)
                    found[run.name] = decided_by_rank_0(score, kind=dict[str, Score])
        return {run.name: found[run.name] for run in runs if run.failure is None}

    def _answers(self, runs: Runs, asked: dict[str, ScoredSet]) -> dict[str, list[Answer]]:
        """The answers of each, on rank 0."""
        runner, plan = self.runner, runs[0].plan
        runner.engine.module.eval()
        decoder = Decoder(runner.stage, runner.groups, plan.source.shape, calls_together=plan.engine.zero_stage == 3)
        questions = {}
        for run in runs:
            own, scored = run.plan, asked[run.name]
            sizes = own.max_new_tokens, own.settings.eval_batch_size
            questions[run.name] = Questions(scored, run.data.tokenizer, *sizes)
        parts = [questions] if self.capacity else [{name: one} for name, one in questions.items()]
        answers: dict[str, list[Answer]] = {}
        for part in parts:
            answers |= answer_all(decoder, part, grid=plan.grid, agree=self.stop.agree, progress=runs[0].is_main)
        return answers


def of_start(runs: Runs, evaluate: Callable[[Runs], dict[str, Found]]) -> dict[str, Found]:
    """What `evaluate` finds of each run that has taken no step.

    As long as its update is zero, an adapter has the base's numbers. So of those with the same data one is evaluated.
    """
    first: dict[tuple[object, ...], AdapterRun] = {}
    same = {run.name: first.setdefault(_start(run), run) for run in runs}
    found = evaluate(list(first.values()))
    left = [run for run in runs if run.failure is None]
    found |= evaluate([run for run in left if same[run.name].failure is not None])
    left = [run for run in left if run.failure is None]
    return {run.name: found[(run if run.name in found else same[run.name]).name] for run in left}


def _start(run: AdapterRun) -> tuple[object, ...]:
    """What decides the numbers of an adapter before its first step."""
    plan = run.plan
    if plan.settings.init_from is not None or not plan.adapter.method_spec.starts_at_base:
        return (run.name,)
    return id(run.data), plan.batches.micro_batch_size, plan.max_new_tokens, plan.settings.eval_batch_size


def _sizes(run: AdapterRun) -> list[int]:
    """The tokens of each validation batch of one, on the rank where it has most."""
    sizes = evaluation_sizes(
        run.data.validation,
        micro_batch_size=run.plan.batches.micro_batch_size,
        dp_size=run.plan.grid.dp_size,
        pad_multiple=run.plan.layout.pad_multiple,
    )
    return list(sizes)
