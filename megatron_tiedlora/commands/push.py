"""Publish a run's adapter on the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.output_folder import reject_existing
from megatron_tiedlora.config.adapter_settings import PushSettings
from megatron_tiedlora.sharing.push import check_hub_id, upload, write_published


def main(settings: PushSettings) -> int:
    """Publish the adapter; returns the exit status."""
    check_hub_id(settings.repo, flag="--repo", owned=True)
    if settings.base_name is not None:
        check_hub_id(settings.base_name, flag="--base_name")
    if settings.output is not None:
        reject_existing(settings.output, flag=f"--output {settings.output}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.output or Path(temporary) / "published"
        write_published(
            settings.run,
            settings.repo,
            folder,
            model=settings.model,
            named=settings.base_name,
            base_differs=settings.base_differs,
            say=lambda note: show(f"note: {note}"),
        )
        if settings.dry_run:
            show(f"wrote what {settings.repo} would hold: {folder}")
            return 0
        show(f"published: {upload(folder, settings.repo, private=settings.private)}")
    return 0
