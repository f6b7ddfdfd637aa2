"""The paper's study on any model and task: methods x ranks x learning rates, tables and figures.

    tiedlora sweep --output_dir study --model meta-llama/Llama-2-7b-hf --task squad                  the paper's grid
    tiedlora sweep --output_dir study --methods lora,tl6 --ranks 2,8 ...                             a part of it
    tiedlora sweep --output_dir study                                                                resumes it
"""

from __future__ import annotations

from pathlib import Path

from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.config.sweep_settings import SweepCommand

HERE = Path(__file__).resolve().parent


def main(command: SweepCommand, *, scripts: Path = HERE) -> int:
    """Run the sweep, which starts the train.py and evaluate.py in the folder `scripts`. Returns the exit status."""
    require_extra("train", "eval")
    require_extra("train", only=["matplotlib"])  # for the figures at its end
    from megatron_tiedlora.study.sweep import sweep

    return sweep(command, scripts=scripts)
