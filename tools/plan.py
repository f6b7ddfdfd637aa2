"""Plan a cluster before it is booked."""

import sys

from megatron_tiedlora.commands.plan import run

if __name__ == "__main__":
    run(sys.argv[1:])
