"""JSON objects from files, with every way to fail told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tiedlora.config.errors import UserError


def read_json_object(file: Path, *, kind: str) -> dict[str, Any]:
    """The object in `file`. Raises UserError naming the file; where it is missing, also what was expected (`kind`)."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected {kind}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content
