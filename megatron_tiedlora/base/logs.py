"""Messages of the library: each module logs under the name `megatron_tiedlora`, and a command shows them on stderr.

A program that uses the library as a package gets the messages by Python's `logging` alone, as it configures it.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

from megatron_tiedlora.base.errors import show


class _OnStderr(logging.Handler):
    """Shows messages as plain lines on what is sys.stderr at that time, since a rank's log replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message; a screen that is gone changes nothing."""
        with suppress(OSError):
            show(*self.format(record).split("\n"), file=sys.stderr)


def show_messages() -> None:
    """Show the library's messages from level INFO on. Commands call this; a second call changes nothing."""
    logger = logging.getLogger("megatron_tiedlora")
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # absl and DeepSpeed put handlers of their own on the root logger
