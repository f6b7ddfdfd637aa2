"""Start launch/train.py on this machine, the hosts of a hostfile or a Slurm allocation, and report how it ended."""

from pathlib import Path

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("run", scripts=Path(__file__).resolve().parent)
