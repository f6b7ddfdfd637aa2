"""Convert a PEFT LoRA or VeRA adapter to a native adapter."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("import")
