"""Run one rank of the test job of `tiedlora doctor`. The launcher starts this module like a rank of a real job.

    python -m megatron_tiedlora.cluster.doctor_rank ORDER    (an `Order`, encoded by `packed`)

The first rank of each host reports the hardware and software of the host. Then all ranks join a process group as in a
real job, and compare their clocks. They check whether they share a folder, and run an all-reduce in each process group.
Every wait has the time limit of the order, and an alarm ends the process if a wait does not return.
"""

from __future__ import annotations

import base64
import math
import os
import secrets
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_tiedlora.base.files import seen_late
from megatron_tiedlora.base.messages import first_line
from megatron_tiedlora.base.output_folder import nearest_existing
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime.launch_env import rank_number
from megatron_tiedlora.runtime.machine import Finding, MachineRecord, Record, machine_record

if TYPE_CHECKING:
    import torch

RANK_MARK, RANK_END = "doctor-rank ", "."  # the beginning of each line of a report, and the end of its last line
NOT_SEEN, _CLOSED = "not seen", "no permission to write"
STAGES = ("reported", "started", "joined", "done")
GroupKind = Literal["tensor", "pipeline", "data"]
_PIECE = 2000  # characters of a line: launchers do not split lines of this length
_SHARED_SECONDS = 5.0  # network file systems may cache a folder's content for some seconds
_ITEM = 4  # bytes of a float32
_PERIOD = 251  # of the summed pattern: a prime, so that it is not aligned with the chunks of a message
_TURNS, _LONG_SECONDS = 5, 0.5  # measured all-reduces; fewer if one takes this long


class Clock(Record):
    """The clock of a host, which is ahead of the first host's clock by `skew` +- `margin` seconds."""

    skew: float
    margin: float


class HostAnswer(Record):
    """The report of a host's first rank about the host. It is sent before anything can fail.

    Attributes:
        output_free_bytes: the free space in the job's output folder; None if no folder was given.
    """

    machine: MachineRecord
    output_free_bytes: int | None


class HostReport(Record):
    """A host and its answer. The answer is None if no rank of the host has reported."""

    name: str
    slots: int
    first_rank: int
    answer: HostAnswer | None = None
    clock: Clock | None = None


class ParallelConfig(Record):
    """The parallel configuration of the ranks, and the address and port of their rendezvous."""

    num_ranks: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    master_host: str
    master_port: int
    backend: Literal["nccl", "gloo"] | None = None

    def groups(self) -> dict[GroupKind, list[list[int]]]:
        """Return the ranks of each tensor, pipeline and data parallel group, except for groups of a single rank."""
        grid = Grid(0, self.num_ranks, self.tensor_parallel, self.pipeline_parallel)
        found: dict[GroupKind, dict[tuple[int, int], list[int]]] = {
            "tensor": grid.groups(lambda at: (at.pp_rank, at.dp_rank)),
            "pipeline": grid.groups(lambda at: (at.dp_rank, at.tp_rank)),
            "data": grid.groups(lambda at: (at.pp_rank, at.tp_rank)),
        }
        return {kind: list(groups.values()) for kind, groups in found.items() if len(groups[0, 0]) > 1}


class Order(Record):
    """The instructions that `tiedlora doctor` gives to all ranks.

    Attributes:
        first_ranks: the first rank of each host, which reports about the host.
        output_dir: the output folder of the job.
        large_bytes: the bytes per rank in the all-reduce that measures bandwidth.
        timeout: the maximum time in seconds that a rank waits for others. All ranks end after twice this time.
    """

    layout: ParallelConfig
    first_ranks: list[int]
    output_dir: str | None
    large_bytes: int
    timeout: float


class GroupResult(Record):
    """The result of an all-reduce in one process group, with the time of the slowest rank.

    Attributes:
        hosts: the hosts of the ranks, which are added after the measurement.
        bus_bytes_per_second: 2 (n - 1) / n * bytes / seconds, which is the bandwidth per link for any n.
    """

    kind: GroupKind
    ranks: list[int]
    hosts: list[str] = Field(default_factory=list)
    num_bytes: int
    seconds: float
    bus_bytes_per_second: float
    correct: bool


class RankReport(Record):
    """All results of a rank so far. The rank sends the report again after each new result.

    Attributes:
        stage: the last stage that the rank has finished: it has reported its host, imported torch, joined the process
            group, or finished all measurements.
        answer, clock: the results for the host; only the first rank of the host has them.
        output: the problem of this rank's host with the output folder or with the file that rank 0 wrote there.
        groups: the results of the process groups in which this rank is the first.
        failed: the reason why the rank failed; None if it has not failed.
    """

    rank: int
    stage: Literal["reported", "started", "joined", "done"] = "reported"
    answer: HostAnswer | None = None
    clock: Clock | None = None
    output: str | None = None
    groups: list[GroupResult] = Field(default_factory=list)
    failed: str | None = None


class DoctorReport(Record):
    """The results of the doctor, as --json writes them.

    Attributes:
        seconds: the duration of each phase.
        groups: the process groups that finished their all-reduce; `skipped` explains why there are none.
    """

    verdict: Literal["ready", "not ready"]
    num_errors: int
    num_warnings: int
    route: Literal["ssh", "srun", "local"]
    launcher: str
    layout: ParallelConfig
    hosts: list[HostReport]
    groups: list[GroupResult]
    skipped: str | None
    findings: list[Finding]
    seconds: dict[str, float]


def answering(hosts: Sequence[HostReport]) -> list[tuple[HostReport, HostAnswer]]:
    """Return the hosts that answered, with their answers."""
    return [(host, host.answer) for host in hosts if host.answer is not None]


def packed(record: Record) -> str:
    """Return a record encoded as one word without special characters of a shell."""
    return base64.b64encode(zlib.compress(record.model_dump_json(exclude_defaults=True).encode())).decode()


def unpacked(kind: type[Record], word: str) -> Any:
    """Return the record that `packed` has encoded as `word`.

    Raises:
        ValueError, zlib.error: the word is not an encoded record of this kind.
    """
    return kind.model_validate_json(zlib.decompress(base64.b64decode(word)))


class TrialRank:
    """One rank of the test job, with its report."""

    def __init__(self, order: Order, rank: int) -> None:
        self._order, self._rank, self._report = order, rank, RankReport(rank=rank)

    def say(self, **news: Any) -> None:
        """Update fields of the report and print it. Each line names its rank, as launchers may mix lines of ranks."""
        self._report = self._report.model_copy(update=news)
        word = packed(self._report) + RANK_END
        pieces = (word[start : start + _PIECE] for start in range(0, len(word), _PIECE))
        sys.stdout.write("".join(f"{RANK_MARK}{self._rank} {piece}\n" for piece in pieces))
        sys.stdout.flush()

    def run(self) -> None:
        """Report the host, join the process group, run all measurements, and leave the process group."""
        order, timeout = self._order, timedelta(seconds=self._order.timeout)
        if self._rank in order.first_ranks:
            folder = None if order.output_dir is None else nearest_existing(Path(order.output_dir))
            free = None if folder is None else shutil.disk_usage(folder).free
            is_open = folder is None or os.access(folder, os.W_OK | os.X_OK)
            answer = HostAnswer(machine=machine_record(), output_free_bytes=free)
            self.say(answer=answer, output=None if is_open else _CLOSED)

        from torch import distributed

        from megatron_tiedlora.parallel.agreement import max_over_ranks
        from megatron_tiedlora.runtime.launch_env import prepare_environment
        from megatron_tiedlora.runtime.process_group import choose_device, group_backend, meet

        prepare_environment()
        self.say(stage="started")
        device = choose_device()
        meet(device, timeout)
        found = distributed.get_world_size()
        if found != order.layout.num_ranks:
            raise RuntimeError(f"{found} ranks have met, not {order.layout.num_ranks}")
        self.say(stage="joined")
        self._compare_clocks()
        if order.output_dir is not None:
            self._share(nearest_existing(Path(order.output_dir)))
        for kind, groups in order.layout.groups().items():
            handles = [distributed.new_group(ranks, timeout=timeout, backend=group_backend(device)) for ranks in groups]
            for ranks, handle in zip(groups, handles, strict=True):
                if self._rank in ranks:
                    self._measure(kind, ranks, handle, device)
        max_over_ranks([0.0])  # wait until all ranks have measured
        self.say(stage="done")
        distributed.destroy_process_group()

    def _compare_clocks(self) -> None:
        """Compare the clocks of all hosts. Each rank reads its clock directly after a collective operation."""
        from megatron_tiedlora.parallel.agreement import max_over_ranks, sum_over_ranks

        max_over_ranks([0.0])  # so that all ranks start the next exchange together
        begin = time.perf_counter()
        max_over_ranks([0.0])
        now, margin = time.time(), time.perf_counter() - begin
        (first,) = sum_over_ranks([now if self._rank == 0 else 0.0])
        if self._rank in self._order.first_ranks:
            self.say(clock=Clock(skew=now - first, margin=margin))

    def _share(self, folder: Path) -> None:
        """Report whether this host sees a temporary file that rank 0 writes into the output folder of the job."""
        from megatron_tiedlora.parallel.agreement import decided_by_rank_0, max_over_ranks

        path = str(folder / f".doctor-{secrets.token_hex(8)}")
        path, wrong = decided_by_rank_0(lambda: (path, _write(path)), kind=tuple[str, str])
        try:
            if self._rank in self._order.first_ranks:
                if self._rank == 0:
                    self.say(output=wrong)
                elif self._report.output is None:  # this rank's host can write there
                    self.say(output="" if wrong or _is_seen(path) else NOT_SEEN)
            max_over_ranks([0.0])
        finally:
            if self._rank == 0:
                with suppress(OSError):
                    os.unlink(path)

    def _measure(self, kind: GroupKind, ranks: list[int], handle: Any, device: torch.device) -> None:
        """Measure the time of an all-reduce. Process groups of one kind run at the same time, as in a real job."""
        import torch
        from torch import distributed

        from megatron_tiedlora.training.throughput import timed

        part, whole = self._pattern(ranks, device)
        sums, seconds, slowest = torch.empty_like(part), list[float](), 0.0
        while len(seconds) <= _TURNS and slowest < _LONG_SECONDS:  # the first turn connects the ranks
            timed(lambda: sums.copy_(part), device)
            seconds.append(timed(lambda: distributed.all_reduce(sums, group=handle), device))
            mean = sum(seconds[1:]) / max(len(seconds) - 1, 1)
            worst = torch.tensor([mean, float(not torch.equal(sums, whole))], device=device)
            distributed.all_reduce(worst, op=distributed.ReduceOp.MAX, group=handle)  # all ranks continue, or none
            slowest, any_wrong = worst.tolist()
        if self._rank == ranks[0]:
            num_bytes = self._order.large_bytes
            group = GroupResult(
                kind=kind,
                ranks=ranks,
                num_bytes=num_bytes,
                seconds=slowest,
                bus_bytes_per_second=2 * (1 - 1 / len(ranks)) * num_bytes / slowest,
                correct=not any_wrong,
            )
            self.say(groups=[*self._report.groups, group])

    def _pattern(self, ranks: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of this rank and their sum over `ranks`. Both are integers, which float32 adds exactly."""
        import torch

        base = torch.arange(self._order.large_bytes // _ITEM, device=device).remainder_(_PERIOD).float()
        return base * (ranks.index(self._rank) + 1), base * (len(ranks) * (len(ranks) + 1) // 2)


def _write(path: str) -> str:
    """Write a short file, and return '' or the reason why the file cannot be written."""
    try:
        Path(path).touch(mode=0o600, exist_ok=False)
        Path(path).write_text("for tiedlora doctor")
    except OSError as error:  # a full disk may accept the name but no content
        return error.strerror or str(error)
    return ""


def _is_seen(path: str) -> bool:
    """Return whether this host sees the file. A network file system may show a new file after some seconds."""
    return seen_late(lambda: os.path.exists(path) or None, Path(path).parent, seconds=_SHARED_SECONDS) is not None


def main() -> int:
    """Run the rank and return its exit status. A failure is also printed in the report of the rank."""
    order = unpacked(Order, sys.argv[1])
    signal.alarm(math.ceil(2 * order.timeout))
    trial = TrialRank(order, rank_number())
    try:
        trial.run()
    except Exception as error:  # gloo and NCCL raise many types, which all mean that the ranks cannot communicate
        trial.say(failed=first_line(error)[:500])
        os._exit(1)  # without waiting for the threads of a broken process group
    return 0


if __name__ == "__main__":
    sys.exit(main())
