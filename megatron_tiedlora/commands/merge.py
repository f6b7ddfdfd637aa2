"""Merge a Tied-LoRA adapter into its base model: a plain Hugging Face checkpoint for transformers, vLLM and others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.config.cli import CommandParser, adapter_flags

EXAMPLE = """\
example:
  tiedlora merge --adapter runs/demo/adapter --output runs/demo/merged

Each file of the base is copied, and adapted weights are computed in the copy, some rows at a time: W + B A in fp32,
cast once. It needs 50 MB of memory beside PyTorch and the adapter, whatever the model. All other bytes are the base's
own, and are not checked; with --dtype all weights are computed. Computed weights that are not finite are rejected.
Of a base that is quantised (--onto trained) all weights are computed, in the dtype of its embedding or in --dtype, and
a merge that was killed starts from the beginning.

The room on the disk is checked first. DIR appears complete or not at all. Ctrl-C and SIGTERM leave nothing behind.
After a kill -9 or a crash, the same command continues with the files that are complete.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora merge", description=__doc__, epilog=EXAMPLE)
    described.add_adapter("a run's adapter/ folder or one of its checkpoints, or a PEFT LoRA or VeRA")
    described.add_output()
    described.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the written weights [as stored in the base]"
    )
    described.add_argument(
        "--onto",
        choices=("original", "trained"),
        default="original",
        help="after a run with --base: the stored base, or its dequantised weights, which training saw [original]",
    )
    described.add_argument(
        "--tokenizer", metavar="T", help="tokenizer to include: folder, hub id or tokenizer.model [the base's own]"
    )
    return described


def main(argv: Sequence[str]) -> int:
    """Merge the adapter; returns the exit status."""
    options = parser().parse_known_names(argv)
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    import torch

    from megatron_tiedlora.base.output_folder import new_output, reject_existing
    from megatron_tiedlora.convert.merge import merge_adapter
    from megatron_tiedlora.convert.merge_journal import JOURNAL
    from megatron_tiedlora.convert.open_adapter import open_adapter
    from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests, exit_status

    output, stop = options.output, StopRequests(launchers=[])
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
    reject_existing(output, flag=f"--output {output}")
    try:
        with stop.installed():
            opened = open_adapter(
                options.adapter, options.model, tokenizer=options.tokenizer, differs=options.base_differs
            )
            for note in opened.notes:
                show(f"note: {note}")
            with stop.deferred():  # a signal ends the merge between two blocks, where it can clean up
                merge_adapter(
                    opened.source,
                    opened.adapter,
                    output,
                    dtype=dtypes[options.dtype],
                    tokenizer=options.tokenizer,
                    base_differs=options.base_differs,
                    onto_trained=options.onto == "trained",
                    say=lambda note: show(f"note: {note}"),
                    new=partial(new_output, take_over=options.take_over, journal=JOURNAL),
                    between=stop.raise_if_requested,
                    progress=True,
                )
    except RunStopped as stopped:
        show(f"stopped by {stopped}: {output} was not written", file=sys.stderr)
        return exit_status(stopped.signal_number)
    show(f"merged {options.adapter} into {opened.source.name}: {output}")
    if not any(output.glob("tokenizer*")):
        show(f"{opened.source.name} has no tokenizer, so the merged model has none; --tokenizer adds one")
    show(f"check it with: tiedlora verify {adapter_flags(options)} --merged {shlex.quote(str(output))}")
    return 0
