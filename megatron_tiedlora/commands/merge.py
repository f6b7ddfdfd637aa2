"""Merge a Tied-LoRA adapter into its base model: a plain Hugging Face checkpoint for transformers, vLLM and others."""

from __future__ import annotations

import shlex
import sys
from functools import partial

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.adapter_settings import MergeSettings, adapter_flags
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests, exit_status


def main(settings: MergeSettings) -> int:
    """Merge the adapter; returns the exit status."""
    output, stop = settings.output, StopRequests(launchers=[])
    reject_existing(output, flag=f"--output {output}")
    try:
        with stop.installed():
            opened = open_adapter(
                settings.adapter, settings.model, tokenizer=settings.tokenizer, differs=settings.base_differs
            )
            for note in opened.notes:
                show(f"note: {note}")
            with stop.deferred():  # a signal ends the merge between two blocks, where it can clean up
                merge_adapter(
                    opened.source,
                    opened.adapter,
                    output,
                    dtype=None if settings.dtype is None else DTYPES[settings.dtype],
                    tokenizer=settings.tokenizer,
                    base_differs=settings.base_differs,
                    onto_trained=settings.onto == "trained",
                    say=lambda note: show(f"note: {note}"),
                    new=partial(new_output, take_over=settings.take_over),
                    between=stop.raise_if_requested,
                    progress=True,
                )
    except RunStopped as stopped:
        show(f"stopped by {stopped}: {output} was not written", file=sys.stderr)
        return exit_status(stopped.signal_number)
    show(f"merged {settings.adapter} into {opened.source.name}: {output}")
    if not any(output.glob("tokenizer*")):
        show(f"{opened.source.name} has no tokenizer, so the merged model has none; --tokenizer adds one")
    flags = f"{adapter_flags(settings.adapter, settings)} --merged {shlex.quote(str(output))}"
    show(f"check it with: tiedlora verify {flags}")
    return 0
