"""Check exports of an adapter."""

import sys

from megatron_tiedlora.commands.verify import run

if __name__ == "__main__":
    run(sys.argv[1:])
