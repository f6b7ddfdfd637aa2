"""Serve training to many clients: each trains adapters of its own on one base."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("serve-training")
