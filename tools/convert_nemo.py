"""Convert NVIDIA's GPT-2B-001 from its .nemo file to a Hugging Face folder."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("convert-nemo")
