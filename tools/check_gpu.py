"""Check whether this package works on the GPUs of this machine, and measure its speed."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("check-gpu")
