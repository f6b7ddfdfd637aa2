"""The files of a job: what its flags name, what a host has of them, and where its output will be."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from glob import has_magic
from pathlib import Path

from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.checkpoint.sources import is_model_on_hub, prepared_model
from megatron_tiedlora.cluster.doctor.records import UNREADABLE, OutputFolder, PathContent
from megatron_tiedlora.data.readers import is_rows_file, may_be_hub_id, split_hub_name
from megatron_tiedlora.data.sources import parse_sources, without_weight

_SMALL_FILE = 1 << 20  # bytes; smaller files are compared by content: configs and tokenizers
_MOST_FILES = 10_000
_READ_OF_A_MODEL = (".json", ".jinja", ".safetensors", "tokenizer.model")  # the rest of a repository is not downloaded
_WEIGHTS = ".safetensors"


def job_files(given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(absolute paths, the id on the hub that a path means if no host has it), both by flag.

    Two aligned texts, `A.de,A.en`, are two paths, under `FLAG:1` and `FLAG:2`, and so are several files.

    Args:
        given: the values by flag, as the user gave them.

    Raises:
        UserError: a value is not a valid path, or not a valid list of files.
    """
    paths: dict[str, str] = {}
    hub: dict[str, str] = {}
    for flag, value in given.items():
        if flag == "model":
            paths[flag] = absolute_path(prepared_model(value) or value, flag=flag)
            if is_model_on_hub(value):
                hub[flag] = value
            continue
        names, is_pair = _aligned_texts(value, flag), True
        if len(names) == 1:
            names, is_pair = [source.name for source in parse_sources(value, f"--{flag}")], False
        for number, name in enumerate(names, start=1):
            key = flag if len(names) == 1 else f"{flag}:{number}"
            if not has_magic(name):  # only a job's own start knows what a pattern stands for
                paths[key] = absolute_path(name, flag=flag)
            if not is_pair and may_be_hub_id(hub_id := split_hub_name(name)[0]):
                hub[key] = hub_id
    return paths, hub


def absolute_path(path: str | Path, *, flag: str) -> str:
    """The absolute path that the hosts are asked for, from this folder and this user's home.

    Raises:
        UserError: it is not a valid path; the message names the flag.
    """
    return os.path.abspath(user_path(path, flag=f"--{flag}"))


def _aligned_texts(value: str, flag: str) -> list[str]:
    """The two names of `A.de,A.en`; any other value is one name."""
    names = [name.strip() for name in value.split(",")]
    is_pair = len(names) == 2 and all(names) and not any(is_rows_file(without_weight(name)) for name in names)
    return names if is_pair and not os.path.exists(absolute_path(value, flag=flag)) else [value]


def cached_model(hub_id: str) -> str | None:
    """The folder of a model in this host's hub cache (under HF_HOME); None if its weights are not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    folder = os.path.dirname(config) if isinstance(config, str) else None
    return folder if folder and any(name.endswith(_WEIGHTS) for name in os.listdir(folder)) else None


def job_content(flag: str, path: str, hub_id: str | None) -> PathContent:
    """What the path of a flag holds; if it does not exist, what this host has of the hub's repository. A data set of
    the hub is not looked for: its library stores it in a form that depends on how it was loaded."""
    content = path_content(path)
    if content.kind != "missing" or hub_id is None:
        return content
    if flag != "model":
        return PathContent(path=hub_id, kind="unchecked")
    folder = cached_model(hub_id)
    if folder is None:
        return PathContent(path=hub_id, kind="not_cached")
    files = {name: value for name, value in path_content(folder).files.items() if name.endswith(_READ_OF_A_MODEL)}
    return PathContent(path=hub_id, kind="cached", files=files)


def path_content(path: str) -> PathContent:
    """The names and sizes of the files at a path, with hashes of the small ones."""
    if os.path.isfile(path):
        return PathContent(path=path, kind="file", files={os.path.basename(path): _file_content(path)})
    if not os.path.isdir(path):
        return PathContent(path=path, kind="missing")
    if not os.access(path, os.R_OK | os.X_OK):
        return PathContent(path=path, kind="folder", files={".": UNREADABLE})
    files = itertools.islice(_files_below(path), _MOST_FILES)
    return PathContent(
        path=path, kind="folder", files={os.path.relpath(file, path): _file_content(file) for file in files}
    )


def _files_below(folder: str) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(where, name) for name in sorted(names))


def _file_content(path: str) -> str:
    """`SIZE`, or `SIZE HASH` for a small file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = f" {hashlib.sha256(file.read()).hexdigest()[:12]}" if size <= _SMALL_FILE else ""
        return f"{size}{digest}"
    except OSError:
        return UNREADABLE


def output_folder(path: str) -> OutputFolder:
    """Where a run folder would be made: the nearest existing folder and the free space of its file system."""
    existing = Path(path)
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    return OutputFolder(
        path=path,
        existing=str(existing),
        writable=os.access(existing, os.W_OK | os.X_OK),
        free_bytes=shutil.disk_usage(existing).free,
    )
