"""Measure a training step or decoding."""

import sys

from megatron_tiedlora.commands.bench import run

if __name__ == "__main__":
    run(sys.argv[1:])
