"""Examine the hosts of a job before it starts: a hostfile's, a Slurm allocation's, or this machine."""

import sys

from megatron_tiedlora.commands.doctor import run

if __name__ == "__main__":
    run(sys.argv[1:])
