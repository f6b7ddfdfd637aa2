"""Read a PEFT LoRA or VeRA adapter into a native one."""

import sys

from megatron_tiedlora.commands.import_adapter import run

if __name__ == "__main__":
    run(sys.argv[1:])
