"""Check what this machine's GPUs can do with this package."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("check-gpu")
