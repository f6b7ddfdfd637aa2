"""The doctor's records: what ranks are asked and answer, what was measured, and what was concluded.

The field names are those of the JSON report, so scripts rely on them.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field

from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime.machine import Finding, MachineRecord, Record

UNREADABLE = "unreadable"
AnyRecord = TypeVar("AnyRecord", bound=Record)
Backend = Literal["nccl", "gloo"]
GroupKind = Literal["tensor", "pipeline", "data"]

# Asked and answered ------------------------------------------------------------------------------------------------


class PathContent(Record):
    """A file or folder that a job reads, or a repository on the Hugging Face hub.

    Attributes:
        path: the path; for a repository its id.
        kind: of a repository: `cached` (a model in this host's hub cache), `not_cached`, or `unchecked` (a data set).
        files: size of each file by its path below the folder (or by the file's own name), with a hash of its content
            if it is small; or UNREADABLE.
    """

    path: str
    kind: Literal["file", "folder", "missing", "cached", "not_cached", "unchecked"]
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        """Whether the host has it."""
        return self.kind in ("file", "folder", "cached")


class OutputFolder(Record):
    """Where a job writes: the nearest existing folder and its file system."""

    path: str
    existing: str
    writable: bool
    free_bytes: int


class Clock(Record):
    """A host's clock compared with the first host's: it is ahead by `skew` +- `margin` seconds."""

    skew: float
    margin: float


class HostAnswer(Record):
    """What a host's first rank reports about its host, before anything can fail.

    Attributes:
        master_addresses: what the first host's name resolves to.
        peer_address: the host's own address on the route to another host.
    """

    machine: MachineRecord
    master_addresses: list[str]
    peer_address: str | None
    paths: dict[str, PathContent]
    output: OutputFolder | None


class HostReport(Record):
    """A host and what it answered; `answer` is None if nothing came."""

    name: str
    slots: int
    first_rank: int
    answer: HostAnswer | None = None
    clock: Clock | None = None


class ParallelConfig(Record):
    """The parallel configuration of the ranks, and where they meet."""

    num_ranks: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    master_host: str
    master_port: int
    backend: Backend | None = None

    def groups(self) -> dict[GroupKind, list[list[int]]]:
        """The ranks of each tensor, pipeline and data parallel group, without kinds whose groups have one rank."""
        grid = Grid(0, self.num_ranks, self.tensor_parallel, self.pipeline_parallel)
        found: dict[GroupKind, dict[tuple[int, int], list[int]]] = {
            "tensor": grid.groups(lambda at: (at.pp_rank, at.dp_rank)),
            "pipeline": grid.groups(lambda at: (at.dp_rank, at.tp_rank)),
            "data": grid.groups(lambda at: (at.pp_rank, at.tp_rank)),
        }
        return {kind: list(groups.values()) for kind, groups in found.items() if len(groups[0, 0]) > 1}


class Order(Record):
    """What the ranks are to do.

    Attributes:
        peers: another host by the first rank of each host, which reports about its own and looks up the local address
            on the route to that one; None if there is no other host.
        first_host: where the ranks meet.
        paths: what a job reads, by flag; `FLAG:1` and `FLAG:2` if one flag names two files.
        hub: the id on the Hugging Face hub that a flag means if its path does not exist.
        output_dir: where the job writes.
        large_bytes: bytes per rank in the all-reduce that measures bandwidth.
        timeout: longest time in seconds that a rank waits for the others.
        seconds: time limit, after which all ranks end by themselves.
    """

    layout: ParallelConfig
    peers: dict[int, str | None]
    first_host: str
    paths: dict[str, str]
    hub: dict[str, str] = Field(default_factory=dict)
    output_dir: str | None
    large_bytes: int
    timeout: float
    seconds: float


class GroupResult(Record):
    """An all-reduce over one group of ranks, as its slowest rank measured it.

    Attributes:
        hosts: of the ranks, which do not know them.
        bus_bytes_per_second: 2 (n - 1) / n * bytes / seconds of the large all-reduce: bandwidth per link for any n.
        latency_seconds: duration of the small all-reduce.
    """

    kind: GroupKind
    ranks: list[int]
    hosts: list[str] = Field(default_factory=list)
    num_bytes: int
    seconds: float
    bus_bytes_per_second: float
    latency_seconds: float
    correct: bool


Stage = Literal["started", "joined", "done"]


class Said(Record):
    """What a rank says in one message: each field that is set is news.

    Attributes:
        stage: how far it is: torch is imported, all ranks have met, all has been measured.
        group: result of a group, of which this is the first rank.
        shared: what is wrong with the file that rank 0 wrote into the output folder, as this rank's host sees it.
        failed: why the rank failed.
    """

    rank: int
    stage: Stage | None = None
    answer: HostAnswer | None = None
    clock: Clock | None = None
    shared: str | None = None
    group: GroupResult | None = None
    failed: str | None = None


# Measured and concluded --------------------------------------------------------------------------------------------


class DoctorReport(Record):
    """The whole examination, as --json writes it.

    Attributes:
        seconds: duration of each phase that was run.
        groups: those whose ranks have all measured; `skipped` says why there are none.
        machine: the constants that --measure has found, as tiedlora plan reads them; None if it has found none.
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
    machine: dict[str, Any] | None = None

    @classmethod
    def of(cls, findings: Sequence[Finding], **values: Any) -> DoctorReport:
        """The report of these findings, counted and with the errors first."""
        errors, warnings = ([one for one in findings if one.status == status] for status in ("error", "warning"))
        values |= {"num_errors": len(errors), "num_warnings": len(warnings), "findings": [*errors, *warnings]}
        return cls(verdict="not ready" if errors else "ready", **values)


def answering(hosts: Sequence[HostReport]) -> list[tuple[HostReport, HostAnswer]]:
    """The hosts that answered, with their answers."""
    return [(host, host.answer) for host in hosts if host.answer is not None]


def hosts_of_ranks(hosts: Sequence[HostReport], ranks: Sequence[int]) -> list[str]:
    """The names of the hosts on which `ranks` run, each once."""
    return [host.name for host in hosts if any(0 <= rank - host.first_rank < host.slots for rank in ranks)]


def packed(record: Record) -> str:
    """A record as one word that every shell passes on."""
    return base64.b64encode(zlib.compress(record.model_dump_json(exclude_defaults=True).encode())).decode()


def unpacked(kind: type[AnyRecord], word: str) -> AnyRecord:
    """The record in a word of `packed`.

    Raises:
        ValueError, zlib.error: it is not one.
    """
    return kind.model_validate_json(zlib.decompress(base64.b64decode(word)))
