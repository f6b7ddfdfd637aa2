"""Find the fastest parallel configuration for a cluster before you book the cluster."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("plan")
