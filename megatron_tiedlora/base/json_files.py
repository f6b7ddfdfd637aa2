"""JSON objects, with every way to fail told in one line, and fields of exactly their kinds."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.text_files import LARGEST_TEXT, read_small_text

# Kinds of fields of `read_fields`: nothing is converted, and a number is finite.
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Size = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]

Fields = TypeVar("Fields")


def read_json_object(file: Path, *, kind: str, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """The object in `file`. Raises UserError naming the file; where it is missing, also what was expected (`kind`)."""
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(name)} is there twice")
    return found


def read_fields(
    file: Path, content: Mapping[str, Any], kind: type[Fields], *, optional: Collection[str] = ()
) -> Fields:
    """The fields of the dataclass `kind` out of the content of `file`, each checked against its type; other keys are
    passed over.

    Args:
        optional: fields that may be missing, and have their default then.

    Raises:
        UserError: the first field that is missing or of another kind.
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
    """A pydantic error's first finding: the field, its value and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    wrong_kind = " is of the wrong kind" if first["type"].endswith("_type") else ""
    return f"{where} = {shown(first['input'])}{wrong_kind}: {first['msg'][0].lower()}{first['msg'][1:]}"
