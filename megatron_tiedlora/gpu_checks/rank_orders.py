"""The orders for the ranks of part ranks, and how the ranks are started and ended on this host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_tiedlora.config.hosts import rank_variables
from megatron_tiedlora.runtime.launch_env import free_port

SCRIPT = Path(__file__).resolve().parent / "rank.py"
ADAPTER, RESULT, STEPPING = "adapter.safetensors", "result.json", "stepping"
_POLL_SECONDS = 0.1


class Case(NamedTuple):
    """A layout, a ZeRO stage and a dtype of the base; data-parallel size = world size / (tp x pp)."""

    tp: int = 1
    pp: int = 1
    zero: int = 1
    dtype: str = "fp32"
    sp: bool = True

    def named(self, world_size: int) -> str:
        """The case as short text."""
        words = [f"TP{self.tp}", f"PP{self.pp}", f"DP{world_size // (self.tp * self.pp)}", f"ZeRO-{self.zero}"]
        return f"{' '.join(words)}, {self.dtype}{'' if self.sp or self.tp == 1 else ', whole sequences'}"


@dataclass(frozen=True)
class RankOrder:
    """What all ranks of a start do.

    Attributes:
        world_size: number of ranks.
        variables: environment variables that they need here.
        folder: for their results.
        logs: folder for their output.
        model: a folder with a small model.
        first: number of the first case; the result folders are named by these numbers.
        samples: per step, over all ranks.
        endless: train the first case until a rank is lost; each rank makes a file once `steps` are done.
    """

    cases: tuple[Case, ...]
    folder: str
    logs: str
    model: str
    device: str
    world_size: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    first: int = 0
    steps: int = 3
    samples: int = 16
    length: int = 64
    learning_rate: float = 1e-3
    endless: bool = False

    def to_json(self) -> str:
        """The order as a command-line argument."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RankOrder:
        """The order that `to_json` wrote."""
        values = json.loads(text)
        return RankOrder(**{**values, "cases": tuple(Case(*case) for case in values["cases"])})


class Rank(NamedTuple):
    """A started rank and its log file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")


@contextmanager
def started_ranks(order: RankOrder) -> Iterator[list[Rank]]:
    """Ranks that run on this host inside the block; remaining ones are killed afterwards."""
    port, ranks = free_port("127.0.0.1"), []
    try:
        for rank in range(order.world_size):
            launch_env = rank_variables(rank, order.world_size, rank, "127.0.0.1", port)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **launch_env, **order.variables}
            kind = "killed" if order.endless else f"layouts-{order.first}"
            log = Path(order.logs, f"ranks-{kind}-{rank}-of-{order.world_size}.log")
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-P", str(SCRIPT), order.to_json()],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            ranks.append(Rank(process, log))
        yield ranks
    finally:
        for started in ranks:
            if started.process.poll() is None:
                started.process.kill()
            started.process.wait()


def wait_for(happened: Callable[[], bool], seconds: float) -> bool:
    """Whether `happened` became true within this time."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def wait_for_ranks(ranks: Sequence[Rank], seconds: float, *, grace_seconds: float = 5.0) -> bool:
    """Whether all ranks succeeded; once one has failed, the others get `grace_seconds` to report why."""

    def all_ended() -> bool:
        return all(rank.process.poll() is not None for rank in ranks)

    def over() -> bool:
        return all_ended() or any(rank.process.poll() for rank in ranks)

    wait_for(over, seconds)
    if not all_ended() and any(rank.process.poll() for rank in ranks):
        wait_for(all_ended, grace_seconds)
    return all(rank.process.poll() == 0 for rank in ranks)
