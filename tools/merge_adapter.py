"""Merge an adapter into its base model: a plain Hugging Face checkpoint."""

import sys

from megatron_tiedlora.commands.merge import run

if __name__ == "__main__":
    run(sys.argv[1:])
