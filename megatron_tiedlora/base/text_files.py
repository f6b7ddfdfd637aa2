"""Reads small text files, JSON objects with strictly checked fields and checksums, and YAML files. Every failure is a
one-line UserError.

Owns which part of YAML is read: one document without tags, duplicate names, anchors or aliases. Aliases can expand to
more than a machine's memory.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from megatron_tiedlora.base.atomic import Guard, unguarded, write_text
from megatron_tiedlora.base.messages import UserError, first_line, os_errors, shown

Value = TypeVar("Value")
LARGEST_TEXT = 2**24  # bytes; the weight index of the largest models has a tenth of that


def read_small_text(file: Path, *, kind: str = "text", largest: int = LARGEST_TEXT) -> str:
    """The text of an existing file that should be `kind`. Raises UserError naming the file if it is unreadable, not
    UTF-8, or too large."""
    with os_errors(f"{file}: cannot be read"), file.open("rb") as stream:
        raw = stream.read(largest + 1)
    if len(raw) > largest:
        raise UserError(f"{file}: is larger than {largest:,} bytes, which is too large for {kind}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start]:#04x} at byte {error.start + 1}"
        raise UserError(f"{file}: not valid {kind} (not UTF-8: {where})") from None


def seen_late(read: Callable[[], Value | None], folder: Path, *, seconds: float) -> Value | None:
    """What `read` finds in `folder`, awaited for at most `seconds`: NFS caches for a while that a file was missing."""
    limit = time.monotonic() + seconds
    while (found := read()) is None and time.monotonic() < limit and folder.is_dir():
        time.sleep(seconds / 10)
        with suppress(OSError):
            os.listdir(folder)  # makes NFS look again
    return found


# JSON -----------------------------------------------------------------------------------------------------------------


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


# YAML -----------------------------------------------------------------------------------------------------------------


LARGEST_YAML = 2**18  # bytes; PyYAML takes seconds for a megabyte


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader that rejects anchors, aliases and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not supported", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if names and names.most_common(1)[0][1] > 1:
            problem = f"{shown(names.most_common(1)[0][0])} appears twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def write_yaml(path: Path, content: Mapping[str, Any] | list[Any], *, guard: Guard = unguarded) -> None:
    """Replace a YAML file atomically, keeping the order of names. Raises UserError naming the file."""
    plain = content if isinstance(content, list) else dict(content)
    write_text(path, yaml.safe_dump(plain, sort_keys=False), guard=guard)


def read_yaml_mapping(file: Path) -> dict[str, Any]:
    """The names and values of an existing file. The result is empty if the file is.

    Raises:
        UserError: the file is not valid; the message names it, and the line if known.
    """
    return parse_yaml(read_small_text(file, kind="YAML", largest=LARGEST_YAML), dict, source=str(file))


def read_yaml_list(file: Path) -> list[Any]:
    """The entries of an existing file that holds a list; none if it is empty. Raises UserError naming the file."""
    return parse_yaml(read_small_text(file, kind="YAML", largest=LARGEST_YAML), list, source=str(file))


def parse_yaml(text: str, kind: type[Value], *, source: str) -> Value:
    """The content of a text, a `dict` or a `list`, which is empty if the text is. Raises UserError naming `source`."""
    try:
        content = _PlainLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{source}{where}: not valid YAML ({problem})") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML (nested too deeply)") from None
    # PyYAML converts text that looks like a date or carries a tag, whether or not it is valid.
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{source}: holds a value that cannot be read ({error}); put text in quotes") from None
    if content is None:
        return kind()
    if not isinstance(content, kind):
        wanted = "'name: value' lines" if kind is dict else "a list, whose entries begin with '- '"
        raise UserError(f"{source}: expected {wanted}, found a {type(content).__name__}")
    return content


# Checksums ------------------------------------------------------------------------------------------------------------
#
# They are of files, in the JSON beside them, which also has its own, so that damage and mix-ups are found before use.
# They are not signatures: anyone who can change the files can change them too. Files that PEFT wrote have none.


FILES_FIELD = "sha256"  # {file name: SHA-256 of its bytes}
UNSEALED_NOTE = "its files have no checksums (PEFT wrote them), so that damage to them is not found"
SEAL_FIELD = "config_sha256"  # SHA-256 of the JSON's content without this field


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises UserError if it cannot be read."""
    with os_errors(f"{file}: cannot be read"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed(content: Mapping[str, Any], *, files: Iterable[Path] = ()) -> dict[str, Any]:
    """Return `content`, a JSON object, with the checksums of `files` and its own."""
    whole = {**content, FILES_FIELD: {file.name: file_sha256(file) for file in files}}
    return {**whole, SEAL_FIELD: _seal(whole)}


def check_seal(file: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """The checksums of files in a JSON object read from `file`; empty if PEFT wrote it, without any.

    Raises:
        UserError: the content has changed since it was written.
    """
    if FILES_FIELD not in content and SEAL_FIELD not in content:
        return {}
    sums = content.get(FILES_FIELD)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise UserError(f"{file}: {FILES_FIELD} = {shown(sums)} is not a table of files and checksums; copy it again")
    if content.get(SEAL_FIELD) != _seal(content):
        raise UserError(f"{file}: does not match its own checksum: it was damaged or edited; copy it again")
    return sums


def check_file(file: Path, sums: Mapping[str, str], *, found: str | None = None) -> None:
    """Raise UserError if a file does not match the checksum for its name in `sums`, if there is one.

    Args:
        found: the file's checksum if it is known; otherwise the file is read.
    """
    wanted = sums.get(file.name)
    if wanted is not None and (file_sha256(file) if found is None else found) != wanted:
        raise UserError(f"{file}: does not match its checksum: it was damaged, or is another folder's; copy it again")


def _seal(content: Mapping[str, Any]) -> str:
    # Independent of spaces and order, so that a reformatted file still matches.
    rest = {name: value for name, value in content.items() if name != SEAL_FIELD}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
