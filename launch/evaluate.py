"""Answer a task's held-out rows by greedy decoding and score them."""

import sys

from megatron_tiedlora.commands.evaluate import run

if __name__ == "__main__":
    run(sys.argv[1:])
