"""Evaluations of several adapters at one time: their validation losses, and scores of greedy decoding.

Each adapter has the batches that it has alone, and its tokens meet its own factors alone. Only the base's matmuls are
over the tokens of several. So the numbers are those of an evaluation of its own, and one that fails fails alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

from megatron_tiedlora.data.loader import evaluation_sizes
from megatron_tiedlora.data.shared import Owned, fill_rounds, shared_input
from megatron_tiedlora.engine.bank_runner import BankPipelineRunner, BankPlainRunner
from megatron_tiedlora.evaluation.answering import answer_all
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.held_out import Questions, ScoredSet
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.evaluation.scores import Score, score_answers
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, sum_over_ranks
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.loop import Evaluated
from megatron_tiedlora.training.member import Member

Members = Sequence[Member]
Found = TypeVar("Found")

# Tokens of a shared batch, in micro-batches of a training step. Without a backward pass a batch needs the memory of one
# layer, where a step needs that of all layers, or with recomputation their inputs and one layer with its gradients.
STEPS_AT_ONCE = 4


@dataclass(frozen=True)
class GroupEvaluation:
    """Evaluates members of a group on one rank. All ranks make the same calls.

    Attributes:
        capacity: tokens of a shared micro-batch of a training step; 0: nothing is shared.
    """

    runner: BankPlainRunner | BankPipelineRunner
    capacity: int
    stop: StopRequests

    def evaluated(self, members: Members) -> dict[str, Evaluated]:
        """What an evaluation of each finds, by name. One whose answers cannot be scored fails, and is left out.

        Raises:
            RunStopped: all ranks agreed to stop.
        """
        losses = self.losses(members)
        scores = self.scores(members, lambda member: member.data.scored_validation)
        return {name: Evaluated(losses[name], found) for name, found in scores.items()}

    def losses(self, members: Members) -> dict[str, float]:
        """The mean loss of each over its own validation split, as `Trainer.evaluate`."""
        if not members:
            return {}
        totals = dict.fromkeys((member.name for member in members), 0.0)
        of_batches: dict[str, list[tuple[float, int]]] = {member.name: [] for member in members}
        batches = self._shared_batches(members)
        with members[0].evaluation_bar(sum(member.num_evaluation_batches for member in members)) as bar:
            while some := list(islice(batches, self.runner.inputs_at_once)):
                self.stop.agree(True)
                found = self.runner.evaluate_shares([shared_input(owned) for owned in some])
                for owned, losses in zip(some, found, strict=True):
                    for name, batch in owned:
                        totals[name] += losses[name]
                        of_batches[name].append((losses[name], batch.num_supervised))
                bar.update(sum(map(len, some)))
        summed = sum_over_ranks(list(totals.values()))
        for member in members:
            with member.failing_alone():
                member.keep_losses(of_batches[member.name])
        pairs = zip(members, summed, strict=True)
        return {member.name: loss / member.data.validation.num_supervised for member, loss in pairs}

    def _shared_batches(self, members: Members) -> Iterator[list[Owned]]:
        """The batches of all, in shared ones: the first of every adapter, then the second."""
        batches = {member.name: member.evaluation_batches() for member in members}
        sizes = {member.name: _sizes(member) for member in members}
        for some in fill_rounds(sizes, capacity=STEPS_AT_ONCE * self.capacity):
            yield [(name, next(batches[name])) for name, _ in some]

    def scores(
        self, members: Members, samples_of: Callable[[Member], ScoredSet | None]
    ) -> dict[str, dict[str, Score]]:
        """The scores of each on its own samples, as `Trainer.score`; one whose answers cannot be scored fails."""
        asked = {member.name: scored for member in members if (scored := samples_of(member)) is not None}
        answers = self._answers([member for member in members if member.name in asked], asked) if asked else {}
        found: dict[str, dict[str, Score]] = {}
        for member in members:
            with member.failing_alone():
                found[member.name] = {}
                if member.name in asked:
                    names, own = asked[member.name].task.metrics, answers.get(member.name, [])
                    score = partial(score_answers, names, own)
                    found[member.name] = decided_by_rank_0(score, kind=dict[str, Score])
        return {member.name: found[member.name] for member in members if member.failure is None}

    def _answers(self, members: Members, asked: dict[str, ScoredSet]) -> dict[str, list[Answer]]:
        """The answers of each, on rank 0."""
        runner, plan = self.runner, members[0].plan
        runner.engine.module.eval()
        decoder = Decoder(runner.stage, runner.groups, plan.source.shape, calls_together=plan.engine.zero_stage == 3)
        questions = [
            Questions(
                asked[member.name],
                member.data.tokenizer,
                member.plan.max_new_tokens,
                member.plan.settings.eval_batch_size,
                member.name,
            )
            for member in members
        ]
        parts = [questions] if self.capacity else [[one] for one in questions]
        answers: list[list[Answer]] = []
        for part in parts:
            answers += answer_all(decoder, part, grid=plan.grid, agree=self.stop.agree, progress=members[0].is_main)
        return {member.name: own for member, own in zip(members, answers, strict=True)}


def of_start(members: Members, evaluate: Callable[[Members], dict[str, Found]]) -> dict[str, Found]:
    """What `evaluate` finds of each member that has taken no step.

    As long as its update is zero, an adapter has the base's numbers. So of those with the same data one is evaluated.
    """
    first: dict[tuple[object, ...], Member] = {}
    same = {member.name: first.setdefault(_start(member), member) for member in members}
    found = evaluate(list(first.values()))
    left = [member for member in members if member.failure is None]
    found |= evaluate([member for member in left if same[member.name].failure is not None])
    left = [member for member in left if member.failure is None]
    return {member.name: found[(member if member.name in found else same[member.name]).name] for member in left}


def _start(member: Member) -> tuple[object, ...]:
    """What decides the numbers of an adapter before its first step."""
    plan = member.plan
    if plan.settings.init_from is not None or not plan.adapter.method_spec.starts_at_base:
        return (member.name,)
    return id(member.data), plan.batches.micro_batch_size, plan.max_new_tokens, plan.settings.eval_batch_size


def _sizes(member: Member) -> list[int]:
    """The tokens of each validation batch of one, on the rank where it has most."""
    sizes = evaluation_sizes(
        member.data.validation,
        micro_batch_size=member.plan.batches.micro_batch_size,
        dp_size=member.plan.grid.dp_size,
        pad_multiple=member.plan.layout.pad_multiple,
    )
    return list(sizes)
