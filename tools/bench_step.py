"""Measure the time and memory of a training step, or the speed of generation."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("bench")
