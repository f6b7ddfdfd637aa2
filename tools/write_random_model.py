"""Write a checkpoint with random bf16 weights in the shape of a preset model."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("random-model")
