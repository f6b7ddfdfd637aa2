"""Starts tiedlora train on this machine, the hosts of a hostfile or a Slurm allocation, and says how it ended."""

from __future__ import annotations

from pathlib import Path

from megatron_tiedlora.cluster.start import launch
from megatron_tiedlora.config.launch_settings import LaunchCommand

HERE = Path(__file__).resolve().parent


def main(command: LaunchCommand, *, scripts: Path = HERE) -> int:
    """Start and watch a job; ranks run the train.py in the folder `scripts`. Returns the exit status."""
    return launch(command, scripts=scripts)
