"""One rank of the doctor's trial: it meets the others as a job's ranks do and all-reduces over each of its groups.

    python -m megatron_tiedlora.cluster.doctor.rank ORDER    (a record as JSON; ranks and master from the environment)

It reports its progress in lines that begin with RANK_MARK. Every wait, also in subgroups, has the order's timeout, and
an alarm ends the process if everything else fails.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.cluster.doctor.rank_groups import group_members
from megatron_tiedlora.cluster.doctor.records import GroupKind, RankEvent, TrialOrder

if TYPE_CHECKING:
    import torch

RANK_MARK = "doctor-rank "
SMALL_BYTES = 4096
_ITEM = 4  # bytes of a float32
_PERIOD = 251  # of the pattern that is summed: a prime, so that it is not aligned with the chunks of a message
_MOST_TURNS, _WANTED_SECONDS = 20, 0.5


class TrialRank:
    """A rank's part of the trial."""

    def __init__(self, order: TrialOrder, rank: int) -> None:
        self._order, self._rank = order, rank

    def say(self, event: Any, **more: Any) -> None:
        """Print one line for the doctor."""
        line = RankEvent(rank=self._rank, event=event, **more).model_dump_json(exclude_defaults=True)
        sys.stdout.write(f"{RANK_MARK}{line}\n")  # in one call, because all ranks of a host share the stream
        sys.stdout.flush()

    def run(self) -> None:
        """Meet, measure, leave."""
        import torch
        from torch import distributed

        from megatron_tiedlora.parallel.agreement import max_over_ranks
        from megatron_tiedlora.runtime.launch_env import prepare_cuda
        from megatron_tiedlora.runtime.process_group import choose_device, meet

        layout, timeout = self._order.layout, timedelta(seconds=self._order.timeout)
        backend = layout.backend or "gloo"
        if backend != "gloo":
            prepare_cuda()  # as a run does, so that a GPU error can be reported
        self.say("started")
        device = torch.device("cpu") if backend == "gloo" else choose_device()
        meet(device, timeout)
        found = distributed.get_world_size()
        if found != layout.num_ranks:
            raise RuntimeError(f"{found} ranks have met, not {layout.num_ranks}")
        self.say("joined")
        for kind, groups in group_members(layout).items():
            handles = [distributed.new_group(ranks, timeout=timeout, backend=backend) for ranks in groups]
            for ranks, handle in zip(groups, handles, strict=True):
                if self._rank in ranks:
                    self._measure(kind, ranks, handle, device)
        max_over_ranks([0.0])  # wait until all have measured
        self.say("done")
        distributed.destroy_process_group()

    def _measure(self, kind: GroupKind, ranks: list[int], handle: Any, device: torch.device) -> None:
        """Measure both message sizes; groups of one kind run at the same time, as they do in a job."""
        for num_bytes in (SMALL_BYTES, self._order.large_bytes):
            part, whole = self._pattern(num_bytes, ranks, device)
            correct, first = self._reduce(part, whole, handle, turns=1)
            turns = self._agreed_turns(first)
            _, seconds = self._reduce(part, whole, handle, turns=turns)
            self.say("measured", kind=kind, ranks=ranks, num_bytes=num_bytes, seconds=seconds, correct=correct)

    def _pattern(self, num_bytes: int, ranks: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(this rank's values, their sum over `ranks`): integers, which float32 adds exactly."""
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
        """How often to measure: the same number on all ranks, set by the slowest one."""
        from megatron_tiedlora.parallel.agreement import max_over_ranks

        (longest,) = max_over_ranks([seconds])
        return max(1, min(_MOST_TURNS, int(_WANTED_SECONDS / max(longest, 1e-9))))

    def _synchronize(self, device: torch.device) -> None:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)


def main() -> int:
    """Run the trial; report a failure in a line and in the exit status."""
    order = TrialOrder.model_validate_json(sys.argv[1])
    signal.alarm(math.ceil(order.seconds))
    trial = TrialRank(order, int(os.environ["RANK"]))
    try:
        trial.run()
    except Exception as error:  # gloo and NCCL raise many kinds: each means that the ranks cannot communicate
        trial.say("failed", reason=first_line(error)[:500])
        sys.stdout.flush()
        os._exit(1)  # without waiting for the threads of a broken group
    return 0


if __name__ == "__main__":
    sys.exit(main())
