"""Check the hosts of a job before it starts: hosts of a hostfile, hosts of a Slurm allocation, or this machine."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("doctor")
