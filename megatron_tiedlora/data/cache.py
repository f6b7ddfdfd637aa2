"""Caches a run's training data as token ids. Each host tokenises the data once, and its processes memory-map it.

The cache has two kinds of folders. The name of a folder is a hash of everything that its content depends on. The first
kind has the token ids of all rows of a data flag. Its name depends on a hash of the data files, so a later launch does
not read the rows again. The second kind has the indices of the training samples and of the held-out samples. The first
process that acquires a folder writes it. The other processes wait for the folder. There is no process group yet, so no
collective can time out while a large data set is tokenised. A process stops waiting if nothing is written for long.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base import output_folder
from megatron_tiedlora.base.files import (
    TEMPORARY_PREFIX,
    check_checksums,
    file_sha256,
    read_json_object,
    with_checksums,
    write_json,
)
from megatron_tiedlora.base.messages import UserError, bytes_in_words
from megatron_tiedlora.base.ownership import FolderTaken, OwnerLost, owner_in_words
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.data.encode import encoded_rows
from megatron_tiedlora.data.sources import Files, NumberedRow, RowStream, mixed, row_stream, source_kind, sources_sha256
from megatron_tiedlora.data.splits import Encoding, held_out_rows
from megatron_tiedlora.data.tables import file_key
from megatron_tiedlora.data.task import Split, template_fields
from megatron_tiedlora.data.token_dataset import FACTS, TokenDataset, check_supervised
from megatron_tiedlora.data.tokenizer import Tokenizer, start_ids
from megatron_tiedlora.runtime.launch_env import launch_file, rank_number
from megatron_tiedlora.runtime.machine import source_hash

_STORE = {"tokens": np.int32, "offsets": np.int64, "supervised": np.bool_, "facts": FACTS}
_SPLITS = {"train": np.int64, "validation": np.int64}

_CODE = Path(__file__).parent  # these modules make ids of rows; if they change, data is tokenised again
_BLOCK = 2**14  # rows that `_samples_of` processes at a time
_SAY_SECONDS, _LONGEST_SILENCE = 10.0, 300.0  # seconds before a waiting process's first log line; most between lines
_LOCK_SECONDS = 1.0  # time between two looks at a lock, which may be in a home folder that all hosts share
_OWN_FILE = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST_READING = 600.0  # seconds after which a process no longer waits for another that reads the same data

_LOGGER = logging.getLogger(__name__)
_Stored = tuple[dict[str, NDArray[Any]], dict[str, Any]]


@dataclass(frozen=True)
class TrainingData:
    """The training and validation data of a run.

    Attributes:
        sha256: a hash of the token ids and the supervised positions of both splits.
        sources: the hash of the content of each source by its name.
        mix: one line of text per source about how often its rows are used; empty if the sources have no weights.
        first_row: the index of the first training sample's row among all rows of the training files.
        chats: whether any row is a conversation.
        unended: whether a chat template wrote the texts and no answer contains an end-of-sequence token.
    """

    train: TokenDataset
    validation: TokenDataset
    sha256: str
    sources: Mapping[str, str]
    mix: tuple[str, ...]
    first_row: int
    chats: bool
    unended: bool


def tokenised_once(
    encoding: Encoding, *, files: Files, seed: int, cache_dir: str | Path | None = None, timeout_minutes: float = 30.0
) -> TrainingData:
    """Return the training and validation data. Tokenise the data first if it is not in the cache.

    The process that tokenises shows a progress bar. The other processes wait, and one of them per host logs this.

    cache_dir: the folder that contains the folder `tokens`; default `user_cache()`. Damaged data is written again.
    timeout_minutes: how long a live process may write nothing. A dead or suspended process is replaced.

    Raises UserError if `RowStream` or `encoded_rows` raises it, if no token is supervised, or if a file changes while
    it is read. Also raises UserError if the cache cannot be written, or if another process takes too long.
    """
    folder = Path(cache_dir or output_folder.user_cache()) / "tokens"
    try:
        output_folder.make_own_folder(folder.parent)
        output_folder.make_own_folder(folder, mode=0o700)  # private, since it contains the texts of data sets
        output_folder.remove_abandoned_outputs(folder)
        once = partial(_once, folder, timeout_minutes)
        carves = source_kind(encoding.task, "validation", files) == "carve"
        parts: tuple[Split, ...] = ("train",) if carves else ("train", "validation")
        streams = {split: row_stream(encoding.task, split, files=files, reading=encoding.reading) for split in parts}
        stored: dict[Split, _Stored] = {}
        keys: dict[Split, str] = {}
        sources: dict[str, str] = {}
        for split, stream in streams.items():
            contents = stream.contents(once_per_host)
            for name, text in contents:  # a hub's name may be that of two splits
                own, digest = (name, f"{name} ({split})"), text.rpartition(" ")[2]
                sources[own[sources.get(name, digest) != digest]] = digest
            content = sources_sha256(contents)
            first_only = split != "train" and encoding.task.merge_by is not None
            keys[split] = cache_key(encoding, content, first_only=first_only)
            rows = partial(_write_rows, stream=stream, content=content, encoding=encoding, first_only=first_only)
            stored[split] = once(keys[split], _STORE, partial(rows, name=split), stream.names)
        shares = [[source.name, source.weight] for source in streams["train"].sources if source.weight is not None]
        choice = hashlib.sha256(json.dumps([keys, seed, shares, source_hash(_CODE)]).encode()).hexdigest()
        write_splits = partial(_write_splits, stored=stored, streams=streams, seed=seed, encoding=encoding)
        order, facts = once(choice, _SPLITS, write_splits, streams["train"].names)
    except OSError as error:
        said = f"{folder}: the cache of tokenised data cannot be written ({error})"
        raise UserError(f"{said}; check its permissions and free disk space") from error
    train = TokenDataset(**stored["train"][0], order=order["train"])
    validation = TokenDataset(**stored[parts[-1]][0], order=order["validation"])
    return TrainingData(train, validation, **{**facts, "mix": tuple(facts["mix"]), "sources": sources})


def _once(
    folder: Path, timeout_minutes: float, key: str, dtypes: Mapping[str, Any], write: Callable[[Path], None], names: str
) -> _Stored:
    """Return the content of the cache folder `key`. Call `write` if it is missing and no process writes it."""
    path = folder / key
    waits = _waits(path, names, timeout_minutes)

    def reject_whole(_: Path) -> None:
        if mapped_arrays(path, dtypes) is not None:  # other processes may have mapped it
            raise OwnerLost(f"{path}: written by another process")

    while (found := mapped_arrays(path, dtypes)) is None:  # a folder is renamed to `path` when it is complete
        try:
            output = output_folder.take_output(path, resumes=True, reject=reject_whole)
        except FolderTaken:
            next(waits)
            continue
        try:
            with output.written() as temporary:
                write(temporary)
        except OwnerLost:  # another process has written it since this one checked, or while this one was suspended
            continue
        finally:
            output.release()
        if mapped_arrays(path, dtypes) is None:
            raise UserError(f"{path}: the folder was damaged right after it was written; check the disk for errors")
    return found


def _waits(path: Path, names: str, timeout_minutes: float) -> Iterator[None]:
    """Yield when this process may try again to take the folder `path`, which another process writes. Log the wait.

    Raises UserError if that process has written nothing for `timeout_minutes`.
    """
    folder, writer = output_folder.partial_folder(path), "another process"
    size, seen, looked, changed = 0, None, 0.0, 0.0
    for waited, logs in _pauses():
        if logs:
            line = "waiting for %s, which tokenises %s: %s so far, %.0f s waited"
            _LOGGER.info(line, writer, names, bytes_in_words(size), waited)
        if waited - looked < _LOCK_SECONDS and not path.exists():
            continue
        looked = waited
        with suppress(FileNotFoundError):  # the files may be renamed or removed at any time
            files = [file.stat() for file in folder.glob(f"{TEMPORARY_PREFIX}*/*")]
            size = sum(file.st_size for file in files)
            if seen != (seen := [(file.st_ino, file.st_size, file.st_mtime_ns) for file in files]):
                changed = waited
        writer = owner_in_words(folder) or "another process"
        if waited - changed > 60 * timeout_minutes:
            raise UserError(
                f"{names}: {writer} is tokenising it, but has written nothing for {timeout_minutes:g} minutes; end that"
                f" process, raise --timeout_minutes, or set {output_folder.CACHE_VARIABLE} to another folder"
            )
        yield


def _pauses() -> Iterator[tuple[float, bool]]:
    """Pause before each yield. Yield the seconds waited, and whether this process, one per host, logs the wait now."""
    started = said = time.monotonic()
    while True:
        time.sleep(min(max((time.monotonic() - started) / 10, 0.05), 1.0))
        now = time.monotonic()
        logs = rank_number(local=True) == 0 and now - said > min(max(said - started, _SAY_SECONDS), _LONGEST_SILENCE)
        said = now if logs else said
        yield now - started, logs


def once_per_host(work: Callable[[], str], *key: object) -> str:
    """Return the word that `work` returns. Of the ranks of a launch on a host, one calls `work`, and the others wait.

    A rank calls `work` itself if they cannot share a file, or after a long wait: the other rank may be suspended.
    """
    file = launch_file(hashlib.sha256(repr(key).encode()).hexdigest()[:32])
    if file is None:
        return work()
    with suppress(OSError), os.fdopen(os.open(file, _OWN_FILE, 0o600), "a+b", buffering=0) as shared:
        if os.fstat(shared.fileno()).st_uid != os.geteuid():
            return work()
        waited, pauses, read = 0.0, _pauses(), partial(os.pread, shared.fileno(), 2**20, 0)
        while waited < _LONGEST_READING:
            with suppress(BlockingIOError):
                fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            waited, logs = next(pauses)
            if logs:
                reader = read().decode().split()[-1:]
                _LOGGER.info("waiting for process %s, which reads %s, %.0f s waited", *reader, key[0], waited)
        *known, _ = read().split(b"\n")  # each line has processes and, when it is known, the word
        if known:
            return known[-1].split()[-1].decode()
        shared.write(b"%d " % os.getpid())
        word = work()
        shared.write(f"{word}\n".encode())
        return word
    return work()


# All rows ---------------------------------------------------------------------------------------------------------


def _write_rows(
    path: Path, *, stream: RowStream, content: str, encoding: Encoding, name: str, first_only: bool
) -> None:
    """Tokenise the rows of a stream and write them to the existing folder `path`. With `first_only`, tokenise only the
    first row of each sample."""

    def read() -> Iterator[NumberedRow]:
        seen = 0
        for numbered in stream:
            if not first_only or numbered[1] >= seen:
                yield numbered
            seen = max(seen, numbered[1] + 1)

    with written_arrays(path, _STORE) as append:
        append(offsets=np.zeros(1, np.int64))
        num_tokens, total = 0, stream.about_num_rows()
        with progress_bar(f"tokenising {name}", " rows", total=total, leave=True, delay=2, mininterval=1) as bar:
            for arrays in encoded_rows(read(), encoding):
                append(**{**arrays, "offsets": num_tokens + arrays["offsets"][1:]})
                num_tokens += len(arrays["tokens"])
                bar.update(int(arrays["facts"]["first"].sum()))
        if stream.sha256() != content:
            raise UserError(f"{stream.names}: the data changed while it was read; try again with complete files")


# Selected samples -------------------------------------------------------------------------------------------------


def _write_splits(
    path: Path, *, stored: Mapping[Split, _Stored], streams: Mapping[Split, RowStream], seed: int, encoding: Encoding
) -> None:
    """Write the indices of the training and held-out samples, and the remaining fields of `TrainingData`."""
    train, stream = stored["train"][0], streams["train"]
    num_samples, first_samples = len(train["facts"]), np.flatnonzero(train["facts"]["first"])
    numbers, sources = (train["facts"][name][first_samples] for name in ("number", "source"))
    held_out = np.zeros(len(numbers), np.bool_)
    if "validation" in stored:
        other, other_stream = stored["validation"][0], streams["validation"]
        validation = np.arange(len(other["facts"]))  # all samples, because only the first row of each was stored
    else:
        other, other_stream = train, stream
        held_out = held_out_rows(stream, numbers, seed=seed)
        taken = np.flatnonzero(held_out)
        _, first = np.unique(numbers[taken], return_index=True)
        validation = _samples_of(taken[np.sort(first)], first_samples, num_samples)
    sizes = np.bincount(sources, minlength=len(stream.sources)).tolist()
    rows, mix = mixed(stream.sources, sizes, held_out, seed=seed)
    order = {"train": _samples_of(rows, first_samples, num_samples), "validation": validation}
    digest = hashlib.sha256()
    for name, arrays, read in (("train", train, stream), ("validation", other, other_stream)):
        dataset = TokenDataset(**arrays, order=order[name])
        check_supervised(dataset, f"{read.sources[0].name}, {name} split")
        dataset.update_digest(digest)
    chats = bool(train["facts"]["chat"].any())
    facts = {
        "sha256": digest.hexdigest(),
        "mix": mix,
        "first_row": int(rows[0]),
        "chats": chats,
        "unended": chats and bool(encoding.tokenizer.chat_template) and not train["facts"]["ended"].any(),
    }
    with written_arrays(path, _SPLITS, facts) as append:
        append(**order)


def _samples_of(rows: NDArray[np.int64], first_samples: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """Return the indices of the samples of `rows`, in order. first_samples: (num_rows,) each row's first sample."""
    counts = np.diff(first_samples, append=num_samples)
    found = [np.empty(0, np.int64)]
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        ends = np.cumsum(counts[block])
        found.append(np.repeat(first_samples[block] - (ends - counts[block]), counts[block]) + np.arange(ends[-1]))
    return np.concatenate(found)


# Keys -------------------------------------------------------------------------------------------------------------


def cache_key(encoding: Encoding, content: str, *, first_only: bool = False) -> str:
    """Return a hash of everything that determines the token ids of the rows.

    Args:
        content: a hash of the data files.
        first_only: see `_write_rows`.
    """
    reading = encoding.reading
    choices = [
        encoding.task.name,
        reading.template,
        encoding.max_length,
        *(sorted(encoding.end_ids), encoding.vocab_size),
        *(list((reading.columns or {}).items()), reading.train_on, reading.add_bos, reading.special_tokens),
        *(template_fields(reading.template), content, first_only, source_hash(_CODE)),
    ]
    return hashlib.sha256(json.dumps(choices).encode() + _tokenizer_content(encoding.tokenizer)).hexdigest()


def _tokenizer_content(tokenizer: Tokenizer) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocab_file = getattr(tokenizer, "vocab_file", None)
    if backend is not None:
        rules = backend.to_str().encode()
    elif vocab_file and Path(vocab_file).is_file():
        rules = Path(vocab_file).read_bytes()
    else:
        rules = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    settings = [
        type(tokenizer).__name__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        bool(getattr(tokenizer, "split_special_tokens", False)),
        tokenizer.chat_template,
        start_ids(tokenizer, "auto"),
    ]
    return hashlib.sha256(rules).digest() + json.dumps(settings, sort_keys=True).encode()


# Folders of arrays ------------------------------------------------------------------------------------------------

_META_FILE = "content.json"


@contextmanager
def written_arrays(
    folder: Path, dtypes: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> Iterator[Callable[..., None]]:
    """Yield a function that appends values to one-dimensional arrays. `dtypes` has the dtype of each array by name.

    Each array is a file in the existing folder `folder`. When the `with` block ends, a JSON file with the size and hash
    of each array is written, so that damage is detected. This file also contains `facts`, a JSON object."""
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in dtypes}

        def append(**arrays: NDArray[Any]) -> None:
            for name, values in arrays.items():
                files[name].write(np.ascontiguousarray(values, dtype=dtypes[name]).data)

        yield append
    sizes = {name: (folder / name).stat().st_size for name in dtypes}
    content = {"facts": facts or {}, "sizes": sizes}
    write_json(folder / _META_FILE, with_checksums(content, files=[folder / name for name in dtypes]))


def mapped_arrays(folder: Path, dtypes: Mapping[str, Any]) -> _Stored | None:
    """Return the memory-mapped arrays and the `facts` of a cache folder, or None if it is missing or invalid.

    The processes of a host share the operating system's copy of a mapped file, so it needs no memory per process.
    """
    meta_file, files = folder / _META_FILE, {name: folder / name for name in dtypes}
    try:
        meta = read_json_object(meta_file, kind="a folder of arrays")
        sums = check_checksums(meta_file, meta)
        # Opening a pipe would block. A sparse file may have any size, so sizes are checked before hashes.
        if any(not file.is_file() or file.stat().st_size != meta["sizes"][name] for name, file in files.items()):
            return None
        hashes = {name: once_per_host(partial(file_sha256, file), *file_key(file)) for name, file in files.items()}
        if any(hashes[name] != sums[name] for name in files):
            return None
        arrays = {name: np.empty(0, dtype) for name, dtype in dtypes.items()}  # an empty file cannot be mapped
        for name, file in files.items():
            if meta["sizes"][name]:
                arrays[name] = np.memmap(file, dtypes[name], "r").view(np.ndarray)
        return arrays, dict(meta["facts"])
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None
