"""Tokenised data, stored once under a key that is a hash of everything it depends on.

The first process on a host to take the file lock tokenises. The others wait for the file, not for each other: no
process group exists yet, so no collective can time out while a large data set is tokenised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_tiedlora.base.atomic import new_file
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.private_folders import make_own_folder, user_cache
from megatron_tiedlora.data.encode import TokenDataset, encode_dataset
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.tokenizer import start_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2  # increase it whenever the same text may give other ids


def tokenise_once(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    reading: Reading | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> TokenDataset:
    """Return the samples as ids, from the cache if the same texts were tokenised with the same tokenizer before.

    cache_dir: default `user_cache()`; its files are `tokens/<key>.safetensors`. A broken file is written
    again. Raises UserError as `encode_dataset` does, and if the cache cannot be written.
    """
    folder = Path(cache_dir or user_cache()) / "tokens"
    path = folder / f"{cache_key(examples, tokenizer, max_length=max_length, reading=reading)}.safetensors"
    try:
        make_own_folder(folder.parent)
        make_own_folder(folder, mode=0o700)  # private, since it contains the texts of data sets
        dataset = _load(path)  # a finished file needs no lock: it is renamed into place when complete
        if dataset is not None:
            return dataset
        with FileLock(str(path.with_suffix(".lock"))):
            dataset = _load(path)  # another process may have written it while we waited
            if dataset is None:
                dataset = encode_dataset(
                    examples, tokenizer, max_length=max_length, reading=reading, progress=progress
                )
                _save(dataset, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the cache of tokenised data cannot be written ({error}); free space there"
        ) from error
    return dataset


def cache_key(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    reading: Reading | None = None,
) -> str:
    """Return the hash of everything the ids depend on: texts, tokenizer, length, settings and this code's version."""
    reading = reading or Reading()
    choices = f"{reading.add_bos} {reading.train_on} {reading.special_tokens} {reading.first_rules}"
    digest = hashlib.sha256(f"{FORMAT_VERSION} {max_length} {choices} {len(examples)}\n".encode())
    digest.update(_tokenizer_content(tokenizer))
    for example in examples:
        digest.update(bytes([example.templated, len(example.segments) % 256]))
        for segment in example.segments:
            raw = segment.text.encode("utf-8")
            digest.update(bytes([segment.supervised, segment.plain, segment.ends]))
            digest.update(len(raw).to_bytes(8, "little"))  # lengths, so that moving a boundary changes the hash
            digest.update(raw)
        if example.conversation is not None:  # the turns that a chat can lose
            digest.update(json.dumps([example.conversation.messages, example.conversation.tools]).encode())
    return digest.hexdigest()


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> bytes:
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


_ARRAYS = ("tokens", "offsets", "supervised")
_COUNTS = ("truncated_prompts", "shortened_chats", "lost_turns")


def _save(dataset: TokenDataset, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {name: getattr(dataset, name) for name in _ARRAYS}
    counts = {name: str(getattr(dataset, name)) for name in _COUNTS}
    with new_file(path) as temporary:
        save_file(arrays, str(temporary), metadata={**counts, "sha256": _checksum(arrays)})


def _load(path: Path) -> TokenDataset | None:
    """Return the stored data set, or None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            metadata = file.metadata() or {}
        if metadata["sha256"] != _checksum(arrays):
            return None
        counts = [int(metadata[name]) for name in _COUNTS]
        return TokenDataset(arrays["tokens"], arrays["offsets"], arrays["supervised"], *counts)
    # AttributeError: unusual dtypes. MemoryError: a sparse file larger than memory.
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, MemoryError):
        return None


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
