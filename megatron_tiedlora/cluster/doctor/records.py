"""The doctor's records: what a host is asked and answers, what was measured, found and concluded.

The field names are those of the JSON report, so scripts rely on them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

UNREADABLE = "unreadable"


class Record(BaseModel):
    """A frozen record. A host with another version of this package may send fields that are unknown here."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


# Asked and answered ------------------------------------------------------------------------------------------------


class HubRepo(Record):
    """A repository on the Hugging Face hub."""

    kind: Literal["model", "dataset"]
    id: str


class Gpu(Record):
    """One GPU as torch sees it."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = (0, 0)


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


class OutputFolder(Record):
    """Where a job writes: the nearest existing folder and its file system."""

    path: str
    existing: str
    writable: bool
    free_bytes: int


class Probe(Record):
    """What a host reports about itself.

    Attributes:
        machine: an id of the machine, the same for two names of one machine.
        versions: of Python and packages, by name, without packages that are not installed.
        source_hash: hash of this package's own files, because two checkouts may have the same version number.
        torch_error: why torch cannot be imported; the fields about GPUs are then empty.
        name_addresses: what the host's own name resolves to on the host itself.
        master_addresses: what the first host's name resolves to.
        peer_address: the host's own address on the route to another host.
        interfaces: addresses by interface.
        socket_names: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME if they are set.
        nofile, memlock: limits of a process (open files, locked bytes); None for unlimited.
    """

    hostname: str
    machine: str
    executable: str
    versions: dict[str, str]
    source_hash: str
    torch_error: str | None
    cuda: str | None
    nccl: str | None
    gpus: list[Gpu]
    infiniband: list[str]
    num_cores: int
    memory_bytes: int
    free_memory_bytes: int
    shm_bytes: int
    nofile: int | None
    memlock: int | None
    name_addresses: list[str]
    master_addresses: list[str]
    peer_address: str | None
    interfaces: dict[str, list[str]]
    socket_names: dict[str, str]
    paths: dict[str, PathContent]
    output: OutputFolder | None


class Clock(Record):
    """A host's clock compared with the first host's: it is ahead by `skew` +- `margin` seconds."""

    skew: float
    margin: float


class HostReport(Record):
    """A host and its answers; `probe` is None if it gave none."""

    name: str
    slots: int
    first_rank: int
    probe: Probe | None = None
    clock: Clock | None = None


# Measured ----------------------------------------------------------------------------------------------------------


Backend = Literal["nccl", "gloo"]
GroupKind = Literal["tensor", "pipeline", "data"]


class ParallelConfig(Record):
    """The parallel configuration of the ranks, and where they meet."""

    num_ranks: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    master_host: str
    master_port: int
    backend: Backend | None = None


class Order(Record):
    """What the ranks are to do.

    Attributes:
        peers: another host by the first rank of each host, which reports about its own and looks up the local address
            on the route to that one; None if there is no other host.
        first_host: where the ranks meet.
        paths: what a job reads, by flag; `FLAG:1` and `FLAG:2` if one flag names two files.
        hub: the repository that a flag means if its path does not exist.
        output_dir: where the job writes.
        large_bytes: bytes per rank in the all-reduce that measures bandwidth.
        timeout: longest time in seconds that a rank waits for the others.
        seconds: time limit, after which all ranks end by themselves.
    """

    layout: ParallelConfig
    peers: dict[int, str | None]
    first_host: str
    paths: dict[str, str]
    hub: dict[str, HubRepo] = Field(default_factory=dict)
    output_dir: str | None
    large_bytes: int
    timeout: float
    seconds: float


class RankEvent(Record):
    """What a rank reports.

    Attributes:
        event: `probe` and `clock` (of its host), `started` (torch is imported), `joined` (all ranks have met), `shared`
            (whether its host sees the file in the output folder), `measured` (an all-reduce over one of its groups),
            `done`, `failed`.
        ranks: the ranks of the group.
        seconds: duration of one all-reduce on this rank.
        reason: why the rank failed, or what is wrong with the shared file.
    """

    rank: int
    event: Literal["probe", "started", "joined", "clock", "shared", "measured", "done", "failed"]
    probe: Probe | None = None
    clock: Clock | None = None
    kind: GroupKind | None = None
    ranks: list[int] = Field(default_factory=list)
    num_bytes: int = 0
    seconds: float = 0.0
    correct: bool = True
    reason: str = ""


class GroupResult(Record):
    """An all-reduce over one group of ranks.

    Attributes:
        bus_bytes_per_second: 2 (n - 1) / n * bytes / seconds of the large all-reduce: bandwidth per link for any n.
        latency_seconds: duration of the small all-reduce.
    """

    kind: GroupKind
    ranks: list[int]
    hosts: list[str]
    num_bytes: int
    seconds: float
    bus_bytes_per_second: float
    latency_seconds: float
    correct: bool


# Found and concluded -----------------------------------------------------------------------------------------------


class Finding(Record):
    """One thing that is wrong (`error`: no job should start) or may become so (`warning`).

    Attributes:
        code: kind of the finding; scripts rely on it.
        hosts: the hosts that it concerns.
    """

    level: Literal["error", "warning"]
    code: str
    hosts: list[str]
    message: str
    fix: str


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
