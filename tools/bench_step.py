"""Measure a training step or decoding."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("bench")
