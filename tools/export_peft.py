"""Export a Tied-LoRA adapter as a LoRA adapter for PEFT, vLLM, SGLang and llama.cpp."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("export")
