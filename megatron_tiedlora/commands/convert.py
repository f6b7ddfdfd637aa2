"""Implement the commands that read, write or serve models: merge, export, import, verify, serve, convert-nemo, ..."""

import os
import shlex
import sys
from functools import partial
from typing import Any

from megatron_tiedlora.base.installation import require_vllm
from megatron_tiedlora.base.messages import UserError, count_text, show, user_path
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.checkpoint.base_weights import write_random_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config import adapter_settings
from megatron_tiedlora.config.adapter_settings import adapter_flags
from megatron_tiedlora.config.tool_settings import ConvertNemoSettings, RandomModelSettings
from megatron_tiedlora.convert import export_peft
from megatron_tiedlora.convert.inputs import check_base
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.nemo import convert_nemo
from megatron_tiedlora.convert.open_adapter import import_peft, open_adapter
from megatron_tiedlora.convert.serving import serve_hints
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests


def merge(settings: adapter_settings.MergeSettings) -> int:
    """Merge an adapter into its base model. Return the exit status."""
    output, stop = settings.output, StopRequests(launchers=[])
    reject_existing(output, flag=f"--output {output}")
    try:
        with stop.installed():
            opened = open_adapter(
                settings.adapter, settings.model, tokenizer=settings.tokenizer, differs=settings.base_differs
            )
            for note in opened.notes:
                _show_note(note)
            with stop.deferred():  # a signal ends the merge between two blocks of rows, where it can clean up
                merge_adapter(
                    opened.source,
                    opened.adapter,
                    output,
                    dtype=None if settings.dtype is None else DTYPES[settings.dtype],
                    tokenizer=settings.tokenizer,
                    base_differs=settings.base_differs,
                    onto_trained=settings.onto == "trained",
                    say=_show_note,
                    new=partial(new_output, take_over=settings.take_over),
                    between=stop.raise_if_requested,
                )
    except RunStopped as stopped:
        show(f"stopped by {stopped}: {output} was not written", file=sys.stderr)
        return stopped.status
    show(f"merged {settings.adapter} into {opened.source.name}: {output}")
    if not any(output.glob("tokenizer*")):
        show(f"{opened.source.name} has no tokenizer, so the merged model has no tokenizer; use --tokenizer to add one")
    flags = f"{adapter_flags(settings.adapter, settings)} --merged {shlex.quote(str(output))}"
    show(f"check it with: tiedlora verify {flags}")
    return 0


def export(settings: adapter_settings.ExportSettings) -> int:
    """Export one or more adapters in PEFT format. Return the exit status."""
    output, adapters = settings.output, export_peft.find_adapters(settings.adapter)
    hints = partial(serve_hints, named=settings.base_name, adapters=output)
    chosen: dict[str, Any] = {
        "pad_rank_to": settings.pad_rank_to,
        "dtype": DTYPES[settings.dtype],
        "named": settings.base_name,
        "base_differs": settings.base_differs,
        "new": partial(new_output, take_over=settings.take_over),
    }
    if len(settings.adapter) > 1 or adapters != [user_path(settings.adapter[0])]:
        of_bases = export_peft.export_all(adapters, settings.model, output, say=_show_note, options=chosen)
        show(f"exported {count_text(len(adapters), 'adapter')}: {output}")
        for source, exports in of_bases:
            show(*hints(exports, source))
        return 0
    reject_existing(output, flag=f"--output {output}")
    (given,) = settings.adapter
    opened = open_adapter(given, settings.model, kind="native")
    source = opened.source
    exported = export_peft.export_peft(
        source, opened.adapter, output, native=user_path(given), say=_show_note, **chosen
    )
    show(f"exported {given} as LoRA of rank {exported.rank} on {export_peft.base_location(source)}: {output}")
    show(*hints({"tied": exported}, source))
    show(f"check it with: tiedlora verify {adapter_flags(given, settings)} --peft {shlex.quote(str(output))}")
    return 0


def import_adapter(settings: adapter_settings.ImportSettings) -> int:
    """Convert a PEFT adapter to a native adapter. Return the exit status."""
    output, chosen = settings.output, {"base_differs": settings.base_differs, "take_over": settings.take_over}
    opened = import_peft(settings.model, settings.peft, output, say=_show_note, **chosen)
    config = opened.config
    targets = ", ".join(target.name for target in config.targets)
    what = f"{config.method} of rank {config.rank} on {targets} of {len(config.layers)} layers"
    show(f"imported {settings.peft} as {what} of {opened.source.name}: {output}")
    show(f"train it further with: --init_from {shlex.quote(str(output))}")
    return 0


def verify(settings: adapter_settings.VerifySettings) -> int:
    """Check exports of an adapter. Return the exit status, which is 1 if an export differs from the adapter."""
    opened = open_adapter(settings.adapter, settings.model, differs=settings.base_differs)
    _, notes = check_base(opened.source, opened.adapter, uses_tokenizer=False, differs=settings.base_differs)
    for note in (*opened.notes, *notes):
        _show_note(note)
    found = verify_export(
        opened.source, opened.adapter, merged=settings.merged, peft=settings.peft, dtype=DTYPES[settings.dtype],
        inside=settings.inside, progress=True,
    )  # fmt: skip
    print(found.report())
    return 0 if found.passed else 1


def serve(settings: adapter_settings.ServeSettings) -> int:
    """Print the command of a vLLM server and run it in place of this process. Return 0 after a dry run."""
    from megatron_tiedlora.integrations.vllm.serve import plan_server  # needs sqlite3

    source = find_model(settings.model, weights=False)
    words, variables, notes = plan_server(settings, source)
    before = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    show(*(f"# {note}" for note in notes), " ".join([*before, shlex.join(words)]))
    if not settings.dry_run:
        require_vllm("tiedlora serve without --dry_run")
        # This is the program `vllm` of this environment, wherever its script is.
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", *words[1:]]
        os.execve(sys.executable, command, {**os.environ, **variables})
    return 0


def convert(settings: ConvertNemoSettings) -> int:
    """Convert a .nemo file to a Hugging Face folder. Return the exit status."""
    output = settings.output
    if not settings.nemo.exists():
        raise UserError(f"--nemo {settings.nemo}: no such file; give the path of a .nemo file")
    reject_existing(output, flag=f"--output {output}")
    try:
        config = convert_nemo(settings.nemo, output, take_over=settings.take_over)
    except UserError as error:
        show(f"error: {error}", file=sys.stderr)
        return 1
    layers, rows = config["num_hidden_layers"], config["vocab_size"]
    show(f"converted {settings.nemo} ({layers} layers, {rows:,} pieces, {config['dtype']}): {output}")
    show(f"train it with: tiedlora run --model {shlex.quote(str(output))} --train_file data.jsonl")
    return 0


def make_random(settings: RandomModelSettings) -> int:
    """Write a checkpoint with random weights in the shape of a preset model. Return the exit status."""
    write_random_model(PRESETS[settings.model], settings.output, name=settings.model, seed=settings.seed)
    show(f"{settings.output}: random weights in the shape of {settings.model}")
    return 0


def _show_note(note: str) -> None:
    show(f"note: {note}")
