"""Convert NVIDIA's GPT-2B-001 from its .nemo file to a Hugging Face folder."""

import sys

from megatron_tiedlora.commands.convert_nemo import run

if __name__ == "__main__":
    run(sys.argv[1:])
