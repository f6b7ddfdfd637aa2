"""One rank of the doctor's trial: meets the others as a job does, and all-reduces over each of its groups.

    python -m megatron_tiedlora.cluster.doctor.rank ORDER    (a record as JSON; ranks and master from the environment)

Says how far it has come in lines with a mark of their own. Every wait has the order's timeout, subgroups' too, and an
alarm ends the process when all else fails.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_tiedlora.cluster.doctor.layouts import group_members
from megatron_tiedlora.cluster.doctor.records import GroupKind, RankEvent, RankOrder

if TYPE_CHECKING:
    import torch

RANK_MARK = "doctor-rank "
SMALL_BYTES = 4096
_ITEM = 4  # bytes of a float32
_PERIOD = 251  # of the pattern that is summed: a prime, so that no cut of a message falls on it
_MOST_TURNS, _WANTED_SECONDS = 20, 0.5


class Trial:
    """A rank's part of the trial."""

    def __init__(self, order: RankOrder, rank: int, local_rank: int) -> None:
        self._order, self._rank, self._local_rank = order, rank, local_rank

    def say(self, event: Any, **more: Any) -> None:
        """One line for the doctor."""
        line = RankEvent(rank=self._rank, event=event, **more).model_dump_json(exclude_defaults=True)
        sys.stdout.write(f"{RANK_MARK}{line}\n")  # in one piece, since all ranks of a host share the stream
        sys.stdout.flush()

    def run(self) -> None:
        """Meet, measure, leave."""
        import torch
        from torch import distributed

        timeout = timedelta(seconds=self._order.timeout)
        device = torch.device("cpu")
        if self._order.backend == "nccl":
            device = torch.device("cuda", self._local_rank)
            torch.cuda.set_device(device)
        self.say("started")
        distributed.init_process_group(self._order.backend, timeout=timeout)
        found = distributed.get_world_size()
        if found != self._order.num_ranks:
            raise RuntimeError(f"{found} ranks have met, not {self._order.num_ranks}")
        self._world = torch.zeros(1, device=device)
        distributed.all_reduce(self._world)  # by now every rank is there
        self._synchronize(device)
        self.say("joined")
        for kind, groups in group_members(self._order).items():
            handles = [distributed.new_group(ranks, timeout=timeout) for ranks in groups]
            for ranks, handle in zip(groups, handles, strict=True):
                if self._rank in ranks:
                    self._measure(kind, ranks, handle, device)
        distributed.all_reduce(self._world)
        self._synchronize(device)
        self.say("done")
        distributed.destroy_process_group()

    def _measure(self, kind: GroupKind, ranks: list[int], handle: Any, device: torch.device) -> None:
        """Both sizes; groups of one kind run at the same time, as they do in a job."""
        for num_bytes in (SMALL_BYTES, self._order.large_bytes):
            part, whole = self._pattern(num_bytes, ranks, device)
            correct, first = self._reduce(part, whole, handle, turns=1)
            turns = self._agreed_turns(first)
            _, seconds = self._reduce(part, whole, handle, turns=turns)
            self.say("measured", kind=kind, ranks=ranks, num_bytes=num_bytes, seconds=seconds, correct=correct)

    def _pattern(self, num_bytes: int, ranks: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(this rank's values, their sum over `ranks`): whole numbers, which float32 adds without an error."""
        import torch

        base = torch.arange(max(1, num_bytes // _ITEM), device=device).remainder_(_PERIOD).float()
        return base * (ranks.index(self._rank) + 1), base * (len(ranks) * (len(ranks) + 1) // 2)

    def _reduce(self, part: torch.Tensor, whole: torch.Tensor, handle: Any, *, turns: int) -> tuple[bool, float]:
        """(whether the last sum is right, seconds of one all-reduce)."""
        import torch
        from torch import distributed

        seconds, sums = 0.0, torch.empty_like(part)
        for _ in range(turns):
            sums.copy_(part)
            self._synchronize(part.device)
            begin = time.perf_counter()
            distributed.all_reduce(sums, group=handle)
            self._synchronize(part.device)
            seconds += time.perf_counter() - begin
        return torch.equal(sums, whole), seconds / turns

    def _agreed_turns(self, seconds: float) -> int:
        """How often to measure: by the slowest rank, the same on all."""
        from torch import distributed

        self._world.fill_(seconds)
        distributed.all_reduce(self._world, op=distributed.ReduceOp.MAX)
        return max(1, min(_MOST_TURNS, int(_WANTED_SECONDS / max(self._world.item(), 1e-9))))

    def _synchronize(self, device: torch.device) -> None:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)


def main() -> int:
    """Run the trial; a failure is said in a line and by the exit status."""
    order = RankOrder.model_validate_json(sys.argv[1])
    signal.alarm(math.ceil(order.seconds))
    trial = Trial(order, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))
    try:
        trial.run()
    except Exception as error:  # gloo and NCCL raise many kinds: each means that the ranks do not come together
        trial.say("failed", reason=(str(error).strip().splitlines() or [type(error).__name__])[0][:500])
        sys.stdout.flush()
        os._exit(1)  # without waiting for threads of a group that is broken
    return 0


if __name__ == "__main__":
    sys.exit(main())
