"""Check exports of an adapter."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("verify")
