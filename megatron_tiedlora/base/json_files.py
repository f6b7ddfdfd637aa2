"""Reads JSON objects and checks the types of their fields strictly. Every failure is a one-line UserError."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.text_files import LARGEST_TEXT, read_small_text

# Field types for `read_fields`: no value is converted, and numbers are finite.
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Size = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]

Fields = TypeVar("Fields")


def read_json_object(file: Path, *, kind: str, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """The object in `file`. Raises UserError naming the file, and `kind` (what was expected) if it does not exist."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected {kind}")
    text = read_small_text(file, kind="JSON", largest=largest)
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise UserError(f"{file}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content


def read_json_or_none(file: Path) -> dict[str, Any] | None:
    """The object in `file`, or None if there is none or a kill has truncated it."""
    with suppress(OSError, UserError):
        return read_json_object(file, kind="a JSON object")
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(name)} appears twice")
    return found


def read_fields(
    file: Path, content: Mapping[str, Any], kind: type[Fields], *, optional: Collection[str] = ()
) -> Fields:
    """Build the dataclass `kind` from the content of `file`. Each field is checked against its type, and other keys
    are ignored.

    Args:
        optional: fields that may be missing and then take their default.

    Raises:
        UserError: names the first field that is missing or of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in names:
        if name not in content and name not in optional:
            raise UserError(f"{file}: {name} is missing")
    try:
        return TypeAdapter(kind).validate_python({name: content[name] for name in names if name in content})
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first problem in a pydantic error: the field, its value and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    wrong_kind = " has the wrong type" if first["type"].endswith("_type") else ""
    return f"{where} = {shown(first['input'])}{wrong_kind}: {first['msg'][0].lower()}{first['msg'][1:]}"
