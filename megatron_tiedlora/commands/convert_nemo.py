"""Convert NVIDIA's GPT-2B-001 from its .nemo file to a Hugging Face folder that --model and transformers read."""

from __future__ import annotations

import shlex
import sys
from functools import partial

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.config.tool_settings import ConvertNemoSettings
from megatron_tiedlora.convert.nemo import convert_nemo


def main(settings: ConvertNemoSettings) -> int:
    """Convert the file; returns the exit status."""
    output = settings.output
    if not settings.nemo.exists():
        raise UserError(f"--nemo {settings.nemo}: no such file")
    reject_existing(output, flag=f"--output {output}")
    try:
        new = partial(new_output, take_over=settings.take_over)
        config = convert_nemo(settings.nemo, output, new=new, progress=True)
    except UserError as error:
        show(f"error: {error}", file=sys.stderr)
        return 1
    layers, rows = config["num_hidden_layers"], config["vocab_size"]
    show(f"converted {settings.nemo} ({layers} layers, {rows:,} pieces, {config['dtype']}): {output}")
    show(f"train it with: tiedlora run --model {shlex.quote(str(output))} --train_file data.jsonl")
    return 0
