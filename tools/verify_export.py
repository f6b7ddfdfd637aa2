"""Check that the exports of an adapter compute the same values as the adapter."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("verify")
