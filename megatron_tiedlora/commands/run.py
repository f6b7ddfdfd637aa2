"""Start tiedlora train on this machine, the hosts of a hostfile or a Slurm allocation, and say how it ended.

    tiedlora run --num_gpus 4 --ds_config zero2.json                              this machine
    tiedlora run --hostfile hosts --model meta-llama/Llama-2-7b-hf ...            hosts that ssh reaches
    tiedlora run --launcher torchrun --max_restarts 3 --resume auto ...           restart after a failure

The exit status is 0 only if the run finished, or saved and stopped on a signal that was sent to this command.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tiedlora.cluster.start import launch
from megatron_tiedlora.config.launch_settings import LaunchCommand

HERE = Path(__file__).resolve().parent


def main(command: LaunchCommand, *, scripts: Path = HERE) -> int:
    """Start and watch a job; ranks run the train.py in the folder `scripts`. Returns the exit status."""
    return launch(command, scripts=scripts)
