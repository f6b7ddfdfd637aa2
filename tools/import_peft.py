"""Read a PEFT LoRA or VeRA adapter into a native one."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("import")
