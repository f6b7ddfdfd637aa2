"""What the doctor knows, as records: what a host is asked and answers, what was measured, found and concluded.

Their field names are those of the JSON report; scripts rely on them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

UNREADABLE = "unreadable"


class Record(BaseModel):
    """A frozen record. One from a host with another version of this package may have fields that are not known here."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


# Asked and answered ------------------------------------------------------------------------------------------------


class HubRepo(Record):
    """Something on the Hugging Face hub."""

    kind: Literal["model", "dataset"]
    id: str


class Question(Record):
    """What a host is asked.

    Attributes:
        host: its name in the hostfile or the allocation.
        peer: another host, towards which the address in use is looked up; None where there is none.
        first_host: where the ranks meet.
        master_port: looked at on the first host alone, where this is not None.
        paths: what a job reads, by flag; `FLAG:1` and `FLAG:2` where one flag names two files.
        hub: what a flag stands for where its path is not there.
        output_dir: where it writes.
        seconds: after which the probe ends itself.
    """

    host: str
    peer: str | None
    first_host: str
    master_port: int | None
    paths: dict[str, str]
    hub: dict[str, HubRepo] = Field(default_factory=dict)
    output_dir: str | None
    seconds: float


class Gpu(Record):
    """One GPU as torch sees it."""

    name: str
    total_bytes: int
    free_bytes: int


class Port(Record):
    """A port that the ranks will listen on.

    Attributes:
        holder: who listens on it now, as far as this user may know.
        next_free: the next port after it that nothing listens on.
    """

    number: int
    free: bool
    holder: str | None = None
    next_free: int | None = None


class PathContent(Record):
    """A file or folder that a job reads, or what stands for it on the Hugging Face hub.

    Attributes:
        path: the path; the id for what is on the hub.
        kind: `cached` (a model in this host's cache of the hub), `not_cached`, or `unchecked` (a hub's data set).
        files: size of each file by its path below the folder (a file's own name for a file), with a hash of what is in
            it where that is small; or UNREADABLE.
    """

    path: str
    kind: Literal["file", "folder", "missing", "cached", "not_cached", "unchecked"]
    files: dict[str, str] = Field(default_factory=dict)


class OutputFolder(Record):
    """Where a job writes: the nearest folder that is there already, and its file system."""

    path: str
    existing: str
    writable: bool
    free_bytes: int


class Probe(Record):
    """What a host says of itself.

    Attributes:
        machine: the same for two names of one machine.
        versions: of Python and packages, by name; a package that is not installed is left out.
        source_hash: of this package's own files: two checkouts may call themselves the same version.
        torch_error: why torch cannot be imported; the fields about GPUs are then empty.
        name_addresses: what the host's own name stands for, on the host itself.
        master_addresses: what the first host's name stands for.
        peer_address: the address that other hosts see, by the route to one of them.
        interfaces: addresses by interface.
        socket_names: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where they are set.
        nofile, memlock: limits of a process (open files, locked bytes); None for none.
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
    port: Port | None
    paths: dict[str, PathContent]
    output: OutputFolder | None


class Clock(Record):
    """A host's clock beside the caller's: it is ahead by `skew` seconds, give or take `margin`."""

    skew: float
    margin: float


class HostReport(Record):
    """A host and all that it answered; `probe` is None where it did not."""

    name: str
    slots: int
    first_rank: int
    probe: Probe | None = None
    clock: Clock | None = None
    seconds: float | None = None


# Measured ----------------------------------------------------------------------------------------------------------


Backend = Literal["nccl", "gloo"]
GroupKind = Literal["tensor", "pipeline", "data"]


class RankOrder(Record):
    """What the ranks of a host are told.

    Attributes:
        large_bytes: of each rank in the all-reduce that measures bandwidth.
        timeout: seconds that a rank waits for others, at most.
        seconds: after which all end by themselves.
    """

    first_rank: int
    slots: int
    num_ranks: int
    tensor_parallel: int
    pipeline_parallel: int
    master_host: str
    master_port: int
    backend: Backend
    large_bytes: int
    timeout: float
    seconds: float


class RankEvent(Record):
    """What a rank has come to.

    Attributes:
        event: `started` (torch is imported), `joined` (all ranks have met), `measured` (an all-reduce over one of its
            groups), `done`, `failed`.
        ranks: of the group.
        seconds: of one all-reduce, on this rank.
        reason: of a failure.
    """

    rank: int
    event: Literal["started", "joined", "measured", "done", "failed"]
    kind: GroupKind | None = None
    ranks: list[int] = Field(default_factory=list)
    num_bytes: int = 0
    seconds: float = 0.0
    correct: bool = True
    reason: str = ""


class GroupResult(Record):
    """An all-reduce over one group of ranks.

    Attributes:
        bus_bytes_per_second: 2 (n - 1) / n * bytes / seconds of the large one: what a link carries, whatever n is.
        latency_seconds: of the small one.
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
        code: what kind of thing; stable, for scripts.
        hosts: whom it is about.
    """

    level: Literal["error", "warning"]
    code: str
    hosts: list[str]
    message: str
    fix: str


class Layout(Record):
    """How the ranks are laid out, and where they meet."""

    num_ranks: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    master_host: str
    master_port: int
    backend: Backend | None = None


class Report(Record):
    """All of an examination; what --json writes.

    Attributes:
        seconds: by phase, those that were run.
        groups: empty where no ranks were started; `skipped` then says why.
    """

    verdict: Literal["ready", "not ready"]
    num_errors: int
    num_warnings: int
    route: Literal["ssh", "srun", "local"]
    layout: Layout
    hosts: list[HostReport]
    groups: list[GroupResult]
    skipped: str | None
    findings: list[Finding]
    seconds: dict[str, float]
