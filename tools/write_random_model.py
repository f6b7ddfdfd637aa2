"""Write a checkpoint of random bf16 weights in the shape of a preset."""

import sys

from megatron_tiedlora.commands.random_model import run

if __name__ == "__main__":
    run(sys.argv[1:])
