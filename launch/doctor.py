"""Examine the hosts of a job before it starts: a hostfile's, a Slurm allocation's, or this machine."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("doctor")
