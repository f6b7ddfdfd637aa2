"""Fine-tune a language model with Tied-LoRA: `deepspeed launch/train.py --ds_config zero2.json` trains the demo."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("train")
