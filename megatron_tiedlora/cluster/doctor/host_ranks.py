"""Start the doctor's ranks on a host and make sure that they end.

    python -m megatron_tiedlora.cluster.doctor.host_ranks ORDER    (a record as JSON)

They end when one of them fails, when the standard input ends (with ssh or the doctor), on a signal, or when the
order's time is over, whichever comes first; no process is left.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from typing import NoReturn

from megatron_tiedlora.cluster.doctor.records import TrialOrder
from megatron_tiedlora.config.hosts import rank_variables

_MODULE = "megatron_tiedlora.cluster.doctor.rank"
_LOOK_SECONDS = 0.1
_LAST_WORDS_SECONDS = 2.0  # for the other ranks to report how they fail


def start_rank(order: TrialOrder, local_rank: int) -> subprocess.Popen[bytes]:
    """Start one rank, with the variables that torch's launchers set."""
    layout = order.layout
    launch_env = rank_variables(
        order.first_rank + local_rank, layout.num_ranks, local_rank, layout.master_host, layout.master_port
    )
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **launch_env}
    words = order.words or ("-m", _MODULE, order.model_dump_json())
    return subprocess.Popen([sys.executable, "-P", *words], env=variables, stdin=subprocess.DEVNULL)


def input_ended() -> bool:
    """Whether the standard input has ended; waits at most `_LOOK_SECONDS`."""
    return bool(select.select([0], [], [], _LOOK_SECONDS)[0]) and not os.read(0, 4096)


def watch(order: TrialOrder, ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for the ranks; returns an exit status, 0 if all have succeeded."""
    limit = time.monotonic() + order.seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < limit:
        if input_ended():
            break
        if any(rank.poll() for rank in ranks):
            limit = min(limit, time.monotonic() + _LAST_WORDS_SECONDS)
    return int(any(rank.poll() != 0 for rank in ranks))


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> int:
    """Start the ranks, watch them and clean up."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    order = TrialOrder.model_validate_json(sys.argv[1])
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for local_rank in range(order.slots):
            ranks.append(start_rank(order, local_rank))
        return watch(order, ranks)
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()


if __name__ == "__main__":
    sys.exit(main())
