"""Check what this machine's GPUs can do with this package."""

import sys

from megatron_tiedlora.commands.check_gpu import run

if __name__ == "__main__":
    run(sys.argv[1:])
