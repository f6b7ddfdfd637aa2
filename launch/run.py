"""Start launch/train.py on this machine, the hosts of a hostfile or a Slurm allocation, and say how it ended."""

import sys
from pathlib import Path

from megatron_tiedlora.commands.run import run

if __name__ == "__main__":
    run(sys.argv[1:], scripts=Path(__file__).resolve().parent)
