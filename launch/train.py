"""Fine-tune a language model with Tied-LoRA: `deepspeed launch/train.py --ds_config zero2.json` trains the demo."""

import sys

from megatron_tiedlora.commands.train import run

if __name__ == "__main__":
    run(sys.argv[1:])
