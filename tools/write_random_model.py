"""Write a checkpoint of random bf16 weights in the shape of a preset."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("random-model")
