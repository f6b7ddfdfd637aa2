"""Write files atomically, and read and check small text files, JSON objects, YAML files and checksums.

A file or folder is written under a temporary name, synced, and then renamed. A `guard` is called right before the
rename. A guard raises UserError if this process may no longer change the folder. `ownership` explains how processes
that no longer own a folder are kept from changing it.

A file that cannot be read raises a UserError of one line. A YAML file must contain exactly one document. Tags,
duplicate names, anchors and aliases are rejected, because aliases can expand to more than a machine's memory.
"""

import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError

from megatron_tiedlora.base.messages import UserError, first_line, os_errors, shown

TEMPORARY_PREFIX = ".writing-"
_ASIDE_PREFIX = f"{TEMPORARY_PREFIX}old-"
_UNCHANGED = "; nothing was changed; check the disk space and the permissions"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2

Guard = Callable[[], None]


def unguarded() -> None:
    """Do nothing. This is the guard for a folder that no other process writes to."""


def sync_path(path: Path) -> None:
    """Flush a file's content, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path, *, guard: Guard = unguarded, parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an error.

    If the process is killed before that, the folder at `path` is unchanged. If the block raises, the temporary folder
    is removed.

    Args:
        parent: an existing folder in which the temporary folder is created. By default this is the parent of `path`,
            which is created if necessary.

    Raises:
        UserError: the disk is full or the parent is not writable; the message names `path`.
    """
    name = path.name if parent is None else "output"  # short, because `path` may have the longest allowed name
    temporary = (parent or path.parent) / f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:8]}"
    try:
        # safetensors raises its own error if the disk is full
        with os_errors(f"{path}: cannot be written", fix=_UNCHANGED, kinds=(OSError, SafetensorError)):
            guard()  # before mkdir, which would bring back a folder that was removed
            temporary.mkdir(parents=parent is None)
            yield temporary
            readable = temporary.stat().st_mode & 0o666
            for item in sorted(temporary.rglob("*")):
                if item.is_file() and item.stat().st_mode & 0o777 != readable:
                    item.chmod(readable)  # safetensors creates files that only their owner can read
                sync_path(item)
            sync_path(temporary)
            guard()
            _put_in_place(temporary, path, guard)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it still exists only after an error


def _put_in_place(temporary: Path, path: Path, guard: Guard) -> None:
    """Rename `temporary` to `path`. An existing folder at `path` is exchanged in one step and then removed."""
    if not os.path.lexists(path):
        os.rename(temporary, path)
        sync_path(path.parent)
        return
    old = temporary
    if not _exchange(temporary, path):
        # Some network file systems cannot exchange paths, and a folder cannot be renamed over a non-empty one. So the
        # old folder is first moved aside. After a kill between the two renames, `restore_interrupted` moves it back.
        old = path.parent / f"{_ASIDE_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
        guard()
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
    sync_path(path.parent)
    remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step. Return False if the system or the file system cannot do this."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0)


def write_text(path: Path, text: str, *, guard: Guard = unguarded) -> None:
    """Replace a file's content atomically. Raise UserError with the file's name if it cannot be written."""
    with new_file(path, guard=guard) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path, *, guard: Guard = unguarded) -> Iterator[Path]:
    """Yield a temporary path. The file written there replaces `path` when the block ends without an error.

    Raises:
        UserError: the file cannot be written; the message names `path`.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with os_errors(f"{path}: cannot be written", fix=_UNCHANGED):
            yield temporary
            sync_path(temporary)
            guard()
            os.replace(temporary, path)
            sync_path(path.parent)
    finally:
        with suppress(OSError):  # the file does not exist, or its name is too long
            temporary.unlink()


def write_json(path: Path, content: Any, *, guard: Guard = unguarded) -> None:
    """Replace a JSON file atomically. Raise UserError with the file's name if it cannot be written."""
    write_text(path, json.dumps(content, indent=2) + "\n", guard=guard)


def restore_interrupted(folder: Path) -> None:
    """Move back the folders in `folder` that a killed process had moved aside and not yet replaced."""
    for aside in folder.glob(f"{_ASIDE_PREFIX}*"):
        path = folder / aside.name.removeprefix(_ASIDE_PREFIX).rpartition("-")[0]
        if not path.exists():
            with suppress(OSError):  # another rank was faster
                os.rename(aside, path)


def remove_leftovers(folder: Path, *, guard: Guard = unguarded) -> None:
    """Run `restore_interrupted`, then remove temporary files of earlier processes. A new owner must call this."""
    restore_interrupted(folder)
    found = list(folder.glob(f"{TEMPORARY_PREFIX}*"))
    guard()  # after the glob: this process still owns the folder, so no later owner wrote these files
    for item in found:
        gone = folder / f"{TEMPORARY_PREFIX}gone-{uuid.uuid4().hex[:8]}"
        with suppress(OSError):
            os.rename(item, gone)  # atomic: a writer that resumes meanwhile finds the whole item or nothing
        remove(gone)


def discard(path: Path, *, guard: Guard = unguarded) -> None:
    """Remove a file or a folder unless the guard raises. Ignore errors of the file system.

    The path is first moved into a temporary folder, which a new owner removes. So a process that was suspended after
    the guard cannot move the path later.
    """
    if not os.path.lexists(path):
        return
    away = path.parent / f"{TEMPORARY_PREFIX}gone-{uuid.uuid4().hex[:8]}"
    try:
        with suppress(OSError):
            away.mkdir()
            guard()
            os.rename(path, away / path.name)
    finally:
        remove(away)


def make_way_for_log(file: Path) -> None:
    """Remove the log `file` if it is a link or a pipe, because opening it would follow the link or block."""
    with suppress(FileNotFoundError):
        mode = file.lstat().st_mode
        if stat.S_ISLNK(mode) or stat.S_ISFIFO(mode):
            file.unlink()


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with its content, and ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


# Reading --------------------------------------------------------------------------------------------------------------


Value = TypeVar("Value")
LARGEST_TEXT = 2**24  # bytes; the weight index of the largest models has a tenth of this size


def read_small_text(file: Path, *, kind: str = "text", largest: int = LARGEST_TEXT) -> str:
    """Return the text of an existing file. Raise UserError if the file cannot be read, is not UTF-8, or is larger than
    `largest` bytes. `kind` is the file's type in the message."""
    with os_errors(f"{file}: cannot be read", fix="; check its permissions"), file.open("rb") as stream:
        raw = stream.read(largest + 1)
    if len(raw) > largest:
        raise UserError(f"{file}: is larger than {largest:,} bytes, which is too large for {kind}; give a smaller file")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start]:#04x} at byte {error.start + 1}"
        raise UserError(f"{file}: not valid {kind} (it is not UTF-8: {where}); save it as UTF-8") from None


def seen_late(read: Callable[[], Value | None], folder: Path, *, seconds: float) -> Value | None:
    """Call `read` until its result is not None, for at most `seconds`. Return the result. NFS may show files late."""
    limit = time.monotonic() + seconds
    while (found := read()) is None and time.monotonic() < limit and folder.is_dir():
        time.sleep(seconds / 10)
        with suppress(OSError):
            os.listdir(folder)  # makes NFS look again
    return found


# JSON -----------------------------------------------------------------------------------------------------------------


# Field types for `read_fields`. Values are not converted to these types, and numbers must be finite.
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Size = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]

Fields = TypeVar("Fields")


def read_json_object(file: Path, *, kind: str, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Return the JSON object in `file`. Raise UserError if the file is missing or does not contain a JSON object."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected {kind}")
    text = read_small_text(file, kind="JSON", largest=largest)
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise UserError(f"{file}: not valid JSON (it is nested too deeply); correct it or copy it again") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); give an intact copy of the file") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object; give an intact copy of the file")
    return content


def read_json_or_none(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in `file`, or None if the file is missing, unreadable or not valid."""
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
    """Return an instance of the dataclass `kind` from the content of `file`. Each field's type is checked, and keys
    that are not fields are ignored.

    Args:
        optional: fields that may be missing. A missing field has its default value.

    Raises:
        UserError: a field is missing or has the wrong type. The message names the first such field.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in names:
        if name not in content and name not in optional:
            raise UserError(f"{file}: {name} is missing; give an intact copy of the file")
    try:
        return TypeAdapter(kind).validate_python({name: content[name] for name in names if name in content})
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}; give an intact copy of the file") from None


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as text with the field, its value and the reason."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    wrong_kind = " has the wrong type" if first["type"].endswith("_type") else ""
    return f"{where} = {shown(first['input'])}{wrong_kind}: {first['msg'][0].lower()}{first['msg'][1:]}"


# YAML -----------------------------------------------------------------------------------------------------------------


LARGEST_YAML = 2**18  # bytes; PyYAML takes seconds for a megabyte


class _PlainLoader(yaml.SafeLoader):
    """A safe YAML loader that also rejects anchors, aliases and duplicate keys."""

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
    """Replace a YAML file atomically. Keys keep their order. Raise UserError if the file cannot be written."""
    plain = content if isinstance(content, list) else dict(content)
    write_text(path, yaml.safe_dump(plain, sort_keys=False), guard=guard)


def read_yaml_mapping(file: Path) -> dict[str, Any]:
    """Return the mapping in an existing YAML file, or {} for an empty file.

    Raises:
        UserError: the file is not valid. The message has the file's name and, if possible, the line.
    """
    return parse_yaml(read_small_text(file, kind="YAML", largest=LARGEST_YAML), dict, source=str(file))


def parse_yaml(text: str, kind: type[Value], *, source: str) -> Value:
    """Return the `dict` or `list` in a YAML text, or an empty one for an empty text. Raise UserError if invalid."""
    try:
        content = _PlainLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{source}{where}: not valid YAML ({problem}); correct it") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML (it is nested too deeply); correct it") from None
    # PyYAML converts text that has a tag or looks like a date, and raises one of these errors if this is impossible.
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{source}: contains a value that cannot be read ({error}); put text in quotes") from None
    if content is None:
        return kind()
    if not isinstance(content, kind):
        wanted = "'name: value' lines" if kind is dict else "a list, whose entries begin with '- '"
        raise UserError(f"{source}: expected {wanted}, found a {type(content).__name__}; correct it")
    return content


# Checksums ------------------------------------------------------------------------------------------------------------
#
# A JSON file contains its own checksum and those of other files in its folder, so that damaged files are detected.
# Checksums are not signatures: anyone who can change the files can change the checksums. PEFT's files have none.


FILES_FIELD = "sha256"  # {file name: SHA-256 of its bytes}
UNSEALED_NOTE = "its files have no checksums (PEFT wrote them), so that damage to them is not found"
SEAL_FIELD = "config_sha256"  # SHA-256 of the JSON's content without this field


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal. Raise UserError if the file cannot be read."""
    with os_errors(f"{file}: cannot be read", fix="; check its permissions"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def with_checksums(content: Mapping[str, Any], *, files: Iterable[Path] = ()) -> dict[str, Any]:
    """Return a copy of the JSON object `content` with the checksums of `files` and its own checksum."""
    whole = {**content, FILES_FIELD: {file.name: file_sha256(file) for file in files}}
    return {**whole, SEAL_FIELD: _checksums(whole)}


def check_checksums(file: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Check that a JSON object from `file` matches its own checksum. Return the checksums of the other files, by name.

    The result is empty if PEFT wrote the file.

    Raises:
        UserError: the content has changed since it was written.
    """
    if FILES_FIELD not in content and SEAL_FIELD not in content:
        return {}
    sums = content.get(FILES_FIELD)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise UserError(f"{file}: {FILES_FIELD} = {shown(sums)} is not a table of files and checksums; copy it again")
    if content.get(SEAL_FIELD) != _checksums(content):
        raise UserError(f"{file}: does not match its own checksum: it was damaged or edited; copy it again")
    return sums


def check_file(file: Path, sums: Mapping[str, str], *, found: str | None = None) -> None:
    """Raise UserError if a file does not match its checksum in `sums`. A file without a checksum is not checked.

    Args:
        found: the file's checksum if it is known. By default the file is read.
    """
    wanted = sums.get(file.name)
    if wanted is not None and (file_sha256(file) if found is None else found) != wanted:
        raise UserError(f"{file}: does not match its checksum: it is damaged or from a different folder; copy it again")


def _checksums(content: Mapping[str, Any]) -> str:
    # Spaces and the order of keys have no effect, so that a reformatted file still matches.
    rest = {name: value for name, value in content.items() if name != SEAL_FIELD}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
