"""Run the paper's study on any model and task: train methods x ranks x learning rates, and make tables and figures."""

from pathlib import Path

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("sweep", scripts=Path(__file__).resolve().parent)
