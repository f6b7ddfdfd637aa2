"""Publish a run's adapter on the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.config.cli import CommandParser, path_value

EXAMPLE = """\
examples:
  tiedlora push runs/demo --repo me/demo-tied --dry_run --output published
  tiedlora push runs/demo --repo me/demo-tied --base_name HuggingFaceTB/SmolLM2-135M-Instruct

The repository gets the adapter as LoRA for PEFT and vLLM, the native files in native/, a model card with base, method,
scores, the training command and versions, and the plot of the losses. No folder of this host is in them. Log in with
`hf auth login`, or set HF_TOKEN.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora push", description=__doc__, epilog=EXAMPLE)
    described.add_argument("run", metavar="RUN", help="run folder, or the folder of a native adapter")
    described.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository on the hub")
    described.add_model()
    described.add_argument("--base_name", metavar="ID", help="hub id of the base [as given to --model in training]")
    described.add_argument("--private", action="store_true", help="make a new repository private")
    described.add_argument("--dry_run", action="store_true", help="write the folder and upload nothing")
    described.add_argument(
        "--output", type=path_value, metavar="DIR", help="keep what is uploaded in this folder; it must not exist"
    )
    described.add_argument("--base_differs", action="store_true", help="continue although the base differs")
    return described


def main(argv: Sequence[str]) -> int:
    """Publish the adapter; returns the exit status."""
    options = parser().parse_known_names(argv)
    from megatron_tiedlora.base.output_folder import reject_existing
    from megatron_tiedlora.sharing.push import check_hub_id, upload, write_published

    check_hub_id(options.repo, flag="--repo", owned=True)
    if options.base_name is not None:
        check_hub_id(options.base_name, flag="--base_name")
    if options.dry_run and options.output is None:
        raise UserError("--dry_run writes the folder; give it with --output DIR")
    if options.output is not None:
        reject_existing(options.output, flag=f"--output {options.output}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary) / "published"
        write_published(
            options.run,
            options.repo,
            folder,
            model=options.model,
            named=options.base_name,
            base_differs=options.base_differs,
            say=lambda note: show(f"note: {note}"),
        )
        if options.dry_run:
            show(f"wrote what {options.repo} would hold: {folder}")
            return 0
        show(f"published: {upload(folder, options.repo, private=options.private)}")
    return 0
