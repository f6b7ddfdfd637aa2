"""Plan a cluster before it is booked."""

from megatron_tiedlora.commands.front import run

if __name__ == "__main__":
    run("plan")
