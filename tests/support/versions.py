"""Skips tests of what a library can do only from a release on that is later than the oldest one allowed."""

from __future__ import annotations

import pytest


def require_exact_sentencepiece() -> None:
    """Skip a test that needs the ids of a SentencePiece model: transformers gives them from 5.24 on."""
    from transformers import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < (5, 24):
        pytest.skip("transformers before 5.24 gives other ids than SentencePiece")
