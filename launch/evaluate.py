"""Generate answers to a task's held-out rows by greedy decoding, and score the answers."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("evaluate")
