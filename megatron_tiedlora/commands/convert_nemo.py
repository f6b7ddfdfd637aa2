"""Convert NVIDIA's GPT-2B-001 from its .nemo file to a Hugging Face folder that --model and transformers read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.config.cli import CommandParser, path_value

EXAMPLE = """\
example:
  tiedlora convert-nemo --nemo GPT-2B-001_bf16_tp1.nemo --output gpt-2b-001-hf

FILE may be split by tensor and pipeline parallelism. Its model must be a NeMo 1 GPT with LayerNorm1p, fast-swiglu, rope
and a SentencePiece tokenizer; a setting that computes something else is rejected by name. Nothing is unpacked and no
pickle is run. The weights keep their dtype (norms: fp32), so DIR is as large as FILE. It is written atomically.

Exit status: 1 if FILE cannot be converted, 2 if a flag is wrong.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora convert-nemo", description=__doc__, epilog=EXAMPLE)
    described.add_argument("--nemo", required=True, type=path_value, metavar="FILE", help="the .nemo file")
    described.add_new_folder()
    return described


def main(argv: Sequence[str]) -> int:
    """Convert the file; returns the exit status."""
    options = parser().parse_known_names(argv)
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    from megatron_tiedlora.base.output_folder import new_output, reject_existing
    from megatron_tiedlora.convert.nemo import convert_nemo

    output = options.output
    if not options.nemo.exists():
        raise UserError(f"--nemo {options.nemo}: no such file")
    reject_existing(output, flag=f"--output {output}")
    try:
        new = partial(new_output, take_over=options.take_over)
        config = convert_nemo(options.nemo, output, new=new, progress=True)
    except UserError as error:
        show(f"error: {error}", file=sys.stderr)
        return 1
    layers, rows = config["num_hidden_layers"], config["vocab_size"]
    show(f"converted {options.nemo} ({layers} layers, {rows:,} pieces, {config['dtype']}): {output}")
    show(f"train it with: tiedlora run --model {shlex.quote(str(output))} --train_file data.jsonl")
    return 0
