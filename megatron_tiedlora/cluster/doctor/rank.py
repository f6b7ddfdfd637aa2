"""One rank of the doctor's job, which the launcher starts as it starts a job's ranks: it reports, meets, all-reduces.

    python -m megatron_tiedlora.cluster.doctor.rank ORDER               (a packed record)
    python -m megatron_tiedlora.cluster.doctor.rank SECONDS COMMAND...  (of tiedlora, ended after that time)

The first rank of each host reports what the host has, before anything can fail. Then all ranks meet as a
job's do, compare their clocks, try whether they share a folder, and all-reduce over each of their groups. Every wait,
also in subgroups, has the order's time limit, and an alarm ends the process if everything else fails.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tiedlora.base.errors import first_line, user_path
from megatron_tiedlora.base.output_folder import nearest_existing
from megatron_tiedlora.base.text_files import seen_late
from megatron_tiedlora.checkpoint.sources import is_model_on_hub, prepared_model
from megatron_tiedlora.cluster.doctor.records import (
    UNREADABLE,
    Clock,
    GroupKind,
    GroupResult,
    HostAnswer,
    Order,
    OutputFolder,
    PathContent,
    Said,
    packed,
    unpacked,
)
from megatron_tiedlora.data.readers import is_rows_file, may_be_hub_id, split_hub_name
from megatron_tiedlora.data.sources import parse_sources, without_weight
from megatron_tiedlora.runtime.launch_env import rank_number
from megatron_tiedlora.runtime.machine import machine_record, resolve

if TYPE_CHECKING:
    import torch

RANK_MARK = "doctor-rank "
SMALL_BYTES = 4096
_PIECE = 2000  # letters of a line: launchers pass on lines that are not longer in one piece
_CLOCK_LOOKS = 3
_SHARED_SECONDS = 5.0  # network file systems may cache a folder's content for some seconds
_ITEM = 4  # bytes of a float32
_PERIOD = 251  # of the pattern that is summed: a prime, so that it is not aligned with the chunks of a message
_MOST_TURNS, _WANTED_SECONDS = 20, 0.5


def answer(order: Order, peer: str | None) -> HostAnswer:
    """What this host has of all that the order asks for, and its address on the route to `peer`."""
    return HostAnswer(
        machine=machine_record(),
        master_addresses=resolve(order.first_host),
        peer_address=None if peer is None else address_towards(peer),
        paths={flag: job_content(flag, path, order.hub.get(flag)) for flag, path in order.paths.items()},
        output=None if order.output_dir is None else output_folder(order.output_dir),
    )


def address_towards(name: str) -> str | None:
    """This host's own address on the route to another one; sends nothing."""
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0]).partition("%")[0]
    return None


class TrialRank:
    """A rank's part of the job."""

    def __init__(self, order: Order, rank: int) -> None:
        self._order, self._rank, self._said = order, rank, 0

    def say(self, **news: Any) -> None:
        """Send the doctor the fields of `Said`, in lines that a launcher may mix with those of other ranks."""
        word = packed(Said(rank=self._rank, **news))
        pieces = [word[start : start + _PIECE] for start in range(0, len(word), _PIECE)]
        for number, piece in enumerate(pieces, start=1):
            sys.stdout.write(f"{RANK_MARK}{self._rank}.{self._said} {number}/{len(pieces)} {piece}\n")
        sys.stdout.flush()
        self._said += 1

    def run(self) -> None:
        """Report, meet, measure, leave."""
        order, timeout = self._order, timedelta(seconds=self._order.timeout)
        if self._rank in order.peers:
            self.say(answer=answer(order, order.peers[self._rank]))

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
        if order.output_dir is not None and len(order.peers) > 1:
            self._share(order.output_dir)
        for kind, groups in order.layout.groups().items():
            handles = [distributed.new_group(ranks, timeout=timeout, backend=group_backend(device)) for ranks in groups]
            for ranks, handle in zip(groups, handles, strict=True):
                if self._rank in ranks:
                    self._measure(kind, ranks, handle, device)
        max_over_ranks([0.0])  # wait until all have measured
        self.say(stage="done")
        distributed.destroy_process_group()

    def _compare_clocks(self) -> None:
        """Read the clock when all ranks have just met in an exchange, some times; the shortest exchange counts."""
        from megatron_tiedlora.parallel.agreement import max_over_ranks, sum_over_ranks

        looks = []
        for _ in range(_CLOCK_LOOKS):
            begin = time.perf_counter()
            max_over_ranks([0.0])
            now, margin = time.time(), time.perf_counter() - begin
            (first,) = sum_over_ranks([now if self._rank == 0 else 0.0])
            looks.append(Clock(skew=now - first, margin=margin))
        if self._rank in self._order.peers:
            self.say(clock=min(looks, key=lambda look: look.margin))

    def _share(self, output_dir: str) -> None:
        """Look for a file that rank 0 writes where the job's output will be, and that it removes again."""
        from megatron_tiedlora.parallel.agreement import decided_by_rank_0, max_over_ranks

        token = secrets.token_hex(8)
        path = os.path.join(output_folder(output_dir).existing, f".doctor-{token}")
        path, token, reason = decided_by_rank_0(lambda: (path, token, _write(path, token)), kind=tuple[str, str, str])
        try:
            if self._rank in self._order.peers:
                self.say(shared=reason or ("" if self._rank == 0 or _can_read(path, token) else "not seen"))
            max_over_ranks([0.0])
        finally:
            if self._rank == 0:
                with suppress(OSError):
                    os.unlink(path)

    def _measure(self, kind: GroupKind, ranks: list[int], handle: Any, device: torch.device) -> None:
        """Measure both message sizes; groups of one kind run at the same time, as they do in a job."""
        import torch
        from torch import distributed

        seconds, wrong, num_bytes = [], False, self._order.large_bytes
        for size in (SMALL_BYTES, num_bytes):
            part, whole = self._pattern(size, ranks, device)
            correct, first = self._reduce(part, whole, handle, turns=1)
            seconds.append(self._reduce(part, whole, handle, turns=self._agreed_turns(first))[1])
            wrong = wrong or not correct
        worst = torch.tensor([*seconds, float(wrong)], device=device)
        distributed.all_reduce(worst, op=distributed.ReduceOp.MAX, group=handle)
        latency, slowest, any_wrong = worst.tolist()
        if self._rank == ranks[0]:
            bandwidth = 2 * (len(ranks) - 1) / len(ranks) * num_bytes / slowest
            figures = {"seconds": slowest, "latency_seconds": latency, "bus_bytes_per_second": bandwidth}
            self.say(group=GroupResult(kind=kind, ranks=ranks, num_bytes=num_bytes, correct=not any_wrong, **figures))

    def _pattern(self, num_bytes: int, ranks: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(this rank's values, their sum over `ranks`): integers, which float32 adds exactly."""
        import torch

        base = torch.arange(max(1, num_bytes // _ITEM), device=device).remainder_(_PERIOD).float()
        return base * (ranks.index(self._rank) + 1), base * (len(ranks) * (len(ranks) + 1) // 2)

    def _reduce(self, part: torch.Tensor, whole: torch.Tensor, handle: Any, *, turns: int) -> tuple[bool, float]:
        """(whether the last sum is right, seconds of one all-reduce)."""
        import torch
        from torch import distributed

        from megatron_tiedlora.training.throughput import timed

        seconds, sums = 0.0, torch.empty_like(part)
        for _ in range(turns):
            timed(lambda: sums.copy_(part), part.device)
            seconds += timed(lambda: distributed.all_reduce(sums, group=handle), part.device)
        return torch.equal(sums, whole), seconds / turns

    def _agreed_turns(self, seconds: float) -> int:
        """How often to measure: the same number on all ranks, set by the slowest one."""
        from megatron_tiedlora.parallel.agreement import max_over_ranks

        (longest,) = max_over_ranks([seconds])
        return max(1, min(_MOST_TURNS, int(_WANTED_SECONDS / max(longest, 1e-9))))


def _write(path: str, token: str) -> str:
    """Write the file; returns why it cannot be written, or ''."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(file, "w") as writer:
            writer.write(token)
    except OSError as error:  # a full disk may accept the name but no content
        return error.strerror or str(error)
    return ""


def _can_read(path: str, token: str) -> bool:
    """Whether the token can be read there; a network file system may show it late."""

    def read() -> bool | None:
        with suppress(OSError), open(path, "rb") as file:
            return file.read(len(token) + 1) == token.encode() or None
        return None

    return seen_late(read, Path(path).parent, seconds=_SHARED_SECONDS) is not None


# The files of a job ---------------------------------------------------------------------------------------------------


_SMALL_FILE = 1 << 20  # bytes; smaller files are compared by content: configs and tokenizers
_MOST_FILES = 10_000
_READ_OF_A_MODEL = (".json", ".jinja", ".safetensors", "tokenizer.model")  # the rest of a repository is not downloaded
_WEIGHTS = ".safetensors"


def job_files(given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(absolute paths, the id on the hub that a path means if no host has it), both by flag.

    Two aligned texts, `A.de,A.en`, are two paths, under `FLAG:1` and `FLAG:2`, and so are several files.

    Args:
        given: the values by flag, as the user gave them.

    Raises:
        UserError: a value is not a valid path, or not a valid list of files.
    """
    paths: dict[str, str] = {}
    hub: dict[str, str] = {}
    for flag, value in given.items():
        if flag == "model":
            paths[flag] = absolute_path(prepared_model(value) or value, flag=flag)
            if is_model_on_hub(value):
                hub[flag] = value
            continue
        names = [name.strip() for name in value.split(",")]
        is_pair = len(names) == 2 and all(names) and not any(is_rows_file(without_weight(name)) for name in names)
        if not is_pair or os.path.exists(absolute_path(value, flag=flag)):
            names, is_pair = [source.name for source in parse_sources(value, f"--{flag}")], False
        for number, name in enumerate(names, start=1):
            key = flag if len(names) == 1 else f"{flag}:{number}"
            if not has_magic(name):  # only a job's own start knows what a pattern stands for
                paths[key] = absolute_path(name, flag=flag)
            if not is_pair and may_be_hub_id(hub_id := split_hub_name(name)[0]):
                hub[key] = hub_id
    return paths, hub


def absolute_path(path: str | Path, *, flag: str) -> str:
    """The absolute path that the hosts are asked for, from this folder and this user's home.

    Raises:
        UserError: it is not a valid path; the message names the flag.
    """
    return os.path.abspath(user_path(path, flag=f"--{flag}"))


def cached_model(hub_id: str) -> str | None:
    """The folder of a model in this host's hub cache (under HF_HOME); None if its weights are not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    folder = os.path.dirname(config) if isinstance(config, str) else None
    return folder if folder and any(name.endswith(_WEIGHTS) for name in os.listdir(folder)) else None


def job_content(flag: str, path: str, hub_id: str | None) -> PathContent:
    """What the path of a flag holds; if it does not exist, what this host has of the hub's repository. A data set of
    the hub is not looked for: its library stores it in a form that depends on how it was loaded."""
    content = path_content(path)
    if content.kind != "missing" or hub_id is None:
        return content
    if flag != "model":
        return PathContent(path=hub_id, kind="unchecked")
    folder = cached_model(hub_id)
    if folder is None:
        return PathContent(path=hub_id, kind="not_cached")
    files = {name: value for name, value in path_content(folder).files.items() if name.endswith(_READ_OF_A_MODEL)}
    return PathContent(path=hub_id, kind="cached", files=files)


def path_content(path: str) -> PathContent:
    """The names and sizes of the files at a path, with hashes of the small ones."""
    if os.path.isfile(path):
        return PathContent(path=path, kind="file", files={os.path.basename(path): _file_content(path)})
    if not os.path.isdir(path):
        return PathContent(path=path, kind="missing")
    if not os.access(path, os.R_OK | os.X_OK):
        return PathContent(path=path, kind="folder", files={".": UNREADABLE})
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)[:_MOST_FILES]
    contents = {os.path.relpath(file, path): _file_content(file) for file in files}
    return PathContent(path=path, kind="folder", files=contents)


def _file_content(path: str) -> str:
    """`SIZE`, or `SIZE HASH` for a small file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = f" {hashlib.sha256(file.read()).hexdigest()[:12]}" if size <= _SMALL_FILE else ""
        return f"{size}{digest}"
    except OSError:
        return UNREADABLE


def output_folder(path: str) -> OutputFolder:
    """Where a run folder would be made: the nearest existing folder and the free space of its file system."""
    existing = nearest_existing(Path(path))
    return OutputFolder(
        path=path,
        existing=str(existing),
        writable=os.access(existing, os.W_OK | os.X_OK),
        free_bytes=shutil.disk_usage(existing).free,
    )


def main() -> int:
    """Run the rank; report a failure in an event and in the exit status. Or run a command under an alarm."""
    if len(sys.argv) > 2:
        signal.alarm(math.ceil(float(sys.argv[1])))  # it stays over the exec
        os.execv(sys.executable, [sys.executable, "-m", "megatron_tiedlora", *sys.argv[2:]])
    order = unpacked(Order, sys.argv[1])
    signal.alarm(math.ceil(order.seconds))
    trial = TrialRank(order, rank_number())
    try:
        trial.run()
    except Exception as error:  # gloo and NCCL raise many kinds: each means that the ranks cannot communicate
        trial.say(failed=first_line(error)[:500])
        os._exit(1)  # without waiting for the threads of a broken group
    return 0


if __name__ == "__main__":
    sys.exit(main())
