"""Merge an adapter into its base model, and write a Hugging Face checkpoint."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("merge")
