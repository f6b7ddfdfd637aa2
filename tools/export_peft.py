"""Export a Tied-LoRA adapter as a LoRA adapter for PEFT, vLLM, SGLang and llama.cpp."""

import sys

from megatron_tiedlora.commands.export import run

if __name__ == "__main__":
    run(sys.argv[1:])
