"""Make the demo model."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("prepare-demo")
