"""Write a checkpoint of random bf16 weights in the shape of a preset, to test an installation, memory and speed.

    tiedlora random-model --model tiny --output tiny                          4 layers and a tokenizer of bytes
    tiedlora random-model --model llama2-7b --output random-7b                without a tokenizer: give --tokenizer

Each layer is one shard and is written at once, so this needs the memory of one shard. tiny needs no network and trains
in seconds on a CPU: tiedlora train --model tiny --train_file rows.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.config.cli import CommandParser, path_value
from megatron_tiedlora.config.presets import PRESETS


def main(argv: Sequence[str]) -> int:
    """Read the command line and write the folder."""
    parser = CommandParser(prog="tiedlora random-model", description=(__doc__ or "").strip())
    parser.add_argument("--model", required=True, choices=sorted(PRESETS), help="the shape")
    parser.add_argument("--output", required=True, type=path_value, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights [0]")
    arguments = parser.parse_known_names(argv)
    # This imports torch, which takes a second: --help and a wrong flag do not wait for it.
    from megatron_tiedlora.checkpoint.random_model import write_random_model

    write_random_model(PRESETS[arguments.model], arguments.output, name=arguments.model, seed=arguments.seed)
    show(f"{arguments.output}: random weights in the shape of {arguments.model}")
    return 0
