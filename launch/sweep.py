"""The paper's study on any model and task: methods x ranks x learning rates, tables and figures."""

import sys
from pathlib import Path

from megatron_tiedlora.commands.sweep import run

if __name__ == "__main__":
    run(sys.argv[1:], scripts=Path(__file__).resolve().parent)
