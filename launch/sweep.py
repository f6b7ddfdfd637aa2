"""The paper's study on any model and task: methods x ranks x learning rates, tables and figures.

    python launch/sweep.py --output_dir study --model meta-llama/Llama-2-7b-hf --task squad          the paper's grid
    python launch/sweep.py --output_dir study --methods lora,tl6 --ranks 2,8 --gpus_per_run 2 ...    a part of it
    python launch/sweep.py --output_dir study                                                        resumes it
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_tiedlora.config.cli import run_command
from megatron_tiedlora.study.processes import deepspeed_starter
from megatron_tiedlora.study.sweep import sweep

if __name__ == "__main__":
    run_command(lambda argv: sweep(argv, lambda: deepspeed_starter(Path(__file__).resolve().parent)), sys.argv[1:])
