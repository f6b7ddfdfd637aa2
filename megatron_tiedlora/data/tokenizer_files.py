"""Identifies a folder's tokenizer by a hash of its files. Copies have the same hash, whoever wrote their configs.

It does not import transformers, so commands that only compare tokenizers do not wait for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.text_files import read_small_text
from megatron_tiedlora.data.tokenizer import LARGEST_TOKENIZER, download_tokenizer

# The ids come from the first of these that a folder has; see `tokenizer.load_tokenizer`.
_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("*.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def tokenizer_hash(source: str | Path) -> str | None:
    """Hash of the vocabulary, BOS, EOS, added tokens and the chat template; None without a vocabulary.

    Args:
        source: a folder, a SentencePiece file, or a hub id.

    Raises:
        UserError: a file cannot be read or downloaded.
    """
    path = user_path(str(source))
    if path.is_file():
        return _hash([path], {})
    if not path.is_dir():
        path = download_tokenizer(str(source))
    for names in _VOCABULARIES:
        if files := sorted({file for name in names for file in path.glob(name) if file.is_file()}):
            return _hash(files, _settings(path))
    return None


def _settings(folder: Path) -> dict[str, Any]:
    """The other settings that ids depend on. Special tokens are reduced to their texts, since versions differ."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= read_json_object(folder / name, kind="a tokenizer's config")
    template = folder / "chat_template.jinja"
    chat = read_small_text(template) if template.is_file() else found.get("chat_template")
    tokens = {role: found.get(role) for role in ("bos_token", "eos_token")}
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    return {**texts, "chat_template": chat, "added": _added(folder, found)}


def _added(folder: Path, found: Mapping[str, Any]) -> list[str] | None:
    """Tokens that the configs add to the vocabulary, which change how text is tokenised; None if there are none."""
    file, known = folder / "tokenizer.json", set[str]()
    with suppress(UserError):  # the file does not exist, or its library will report the error
        listed = read_json_object(file, kind="a tokenizer", largest=LARGEST_TOKENIZER).get("added_tokens")
        known = {str(token.get("content")) for token in listed or () if isinstance(token, dict)}
    entries: list[Any] = []
    for name in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
        value = found.get(name)
        entries += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    more = folder / "added_tokens.json"
    entries += read_json_object(more, kind="added tokens") if more.is_file() else ()
    texts = {str(entry.get("content") if isinstance(entry, dict) else entry) for entry in entries}
    return sorted(texts - known) or None


def _hash(files: list[Path], settings: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            if file.stat().st_size > LARGEST_TOKENIZER:
                size = f"{LARGEST_TOKENIZER:,} bytes"
                raise UserError(f"{file}: is larger than {size}, too large for a tokenizer; give another one")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error}); give another tokenizer") from None
    known = {name: value for name, value in settings.items() if value is not None}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()
