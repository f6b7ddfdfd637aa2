"""The end of a run of several adapters: the scores and exports of each, and the table of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_tiedlora.base.table import aligned_lines
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.resume import Checkpoint
from megatron_tiedlora.convert.export_peft import base_location, base_name
from megatron_tiedlora.convert.serving import Export, serve_hints
from megatron_tiedlora.evaluation.scores import Score
from megatron_tiedlora.runtime.ending import FAILED_STATUS, End
from megatron_tiedlora.runtime.group_folder import GroupFolder
from megatron_tiedlora.training import finish
from megatron_tiedlora.training.group import Finished, Group, table_rows
from megatron_tiedlora.training.group_evaluation import of_start
from megatron_tiedlora.training.member import Member


def score_before(group: Group, checkpoints: Mapping[str, Checkpoint | None]) -> None:
    """Score the adapters that begin, before their first step. All ranks call it."""
    _score(group, [member for name, member in group.members.items() if checkpoints[name] is None], "before")


def score_after(group: Group) -> None:
    """Score the best adapter of each that has ended; the bank then holds it. All ranks call it."""
    for member in _trained(group):
        with member.failing_alone():
            finish.use_best_adapter(member)
    _score(group, _trained(group), "after")


def _score(group: Group, members: Sequence[Member], moment: str) -> None:
    """Score them together on their test samples, and record that."""

    def score(some: Sequence[Member]) -> dict[str, dict[str, Score]]:
        return group.evaluation.scores(some, lambda member: member.data.scored)

    with group.stop.deferred():
        found = of_start(members, score) if moment == "before" else score(members)
    for member in members:
        if member.name in found:
            with member.failing_alone():
                finish.record_score(member, moment, found[member.name])


def export_all(group: Group) -> list[str]:
    """Export each adapter that has ended, and record that it has finished. On rank 0. Returns lines to print.

    Raises:
        RunStopped: a signal came; those that are exported have finished.
    """
    lines: list[str] = []
    for member in _trained(group):
        with member.failing_alone():
            lines += finish.export(member)
            member.finish()
    group.write_table()
    return lines


def _trained(group: Group) -> list[Member]:
    return [member for member in group.members.values() if member.state == "ended"]


def original_losses(group: Group) -> list[str]:
    """The validation loss of each on the base as it is stored, if the run used another one. On rank 0."""
    finished = [member for member in group.members.values() if member.recorded and member.failure is None]
    return [f"{member.name}: {line}" for member in finished for line in finish.original_loss(member) if line]


def set_end(group: Group, end: End) -> None:
    """How the run ends: it fails if an adapter did."""
    failed, total = group.failed, count_text(len(group.names), "adapter")
    end.reason = f"{len(failed)} of {total} failed: {', '.join(failed)}" if failed else f"{total} trained"
    if failed:
        end.state, end.status = "failed", FAILED_STATUS


def end_at_once(adapters: Mapping[str, Finished], folder: GroupFolder, end: End, *, is_main: bool) -> list[str]:
    """End a start that finds every adapter finished: rank 0 writes the table and the status. Returns lines to print."""
    end.reason = f"{count_text(len(adapters), 'adapter')} trained"
    if is_main:
        folder.write_table(table_rows(adapters))
        last = max(adapter.progress.step for adapter in adapters.values())
        folder.write_status("finished", step=last, reason=end.reason)
    return table_lines(adapters, folder)


def table_lines(adapters: Mapping[str, Member | Finished], folder: GroupFolder) -> list[str]:
    """The last lines: how each adapter ended, and where its files are. On rank 0."""
    rows = [("adapter", "state   ", "  step", "best step", "    best", "reason")]
    for name, member in adapters.items():
        progress = member.progress
        state = "finished" if member.failure is None else "failed"
        best = "-" if progress.best_metric is None else f"{progress.best_metric:.4f}"
        numbers = (str(progress.step), str(progress.best_step or "-"), best)
        rows.append((name, state, *numbers, member.failure or member.reason))
    lines = ["", *aligned_lines(rows, align="<<>>><"), "", f"run folder  {folder.path}"]
    lines += ["  NAME/      the run folder of each adapter, with peft/; or the output_dir of its entry"]
    finished = [member for member in adapters.values() if member.failure is None]
    if not finished:
        return lines
    source = finished[0].plan.source
    own = [(member.folder.path / "peft", member.plan.settings) for member in finished]
    exports = {of.name: Export(peft, its.rank, its.targets) for of, (peft, its) in zip(finished, own, strict=True)}
    serving = serve_hints(exports, base_location(source), source.shape, named=base_name(source))
    return [*lines, "", "next", *(f"  {line}" for line in serving)]
