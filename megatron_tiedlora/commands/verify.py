"""Check exports of an adapter: the bits of a merged or PEFT folder, and logits; exit status 1 if any differ."""

from __future__ import annotations

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.adapter_settings import VerifySettings
from megatron_tiedlora.convert.inputs import check_base
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.convert.verify import verify_export


def main(settings: VerifySettings) -> int:
    """Check the exports; returns the exit status."""
    opened = open_adapter(settings.adapter, settings.model, differs=settings.base_differs)
    base = check_base(opened.source, opened.adapter, uses_tokenizer=False, differs=settings.base_differs)
    for note in (*opened.notes, *base.notes):
        show(f"note: {note}")
    found = verify_export(
        opened.source,
        opened.adapter,
        merged=settings.merged,
        peft=settings.peft,
        dtype=DTYPES[settings.dtype],
        inside=settings.inside,
        progress=True,
    )
    print(found.report())
    return 0 if found.passed else 1
