"""Make the demo model."""

import sys

from megatron_tiedlora.commands.prepare_demo import run

if __name__ == "__main__":
    run(sys.argv[1:])
