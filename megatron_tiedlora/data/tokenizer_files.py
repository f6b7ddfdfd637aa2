"""Which tokenizer a folder holds, told by a hash of its files: equal for copies, whoever has written their configs.

Imports no transformers: commands that only compare tokenizers do not wait for it.
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

LARGEST_TOKENIZER = 2**27  # bytes of a file, which libraries read whole; large vocabularies take 20 to 35 MB
# The first of these that a folder has is what its ids come from; see `tokenizer.load_tokenizer`.
_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("*.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def tokenizer_hash(place: str | Path) -> str | None:
    """Hash of the vocabulary, the tokens at a sequence's ends, and the chat template; None without a vocabulary.

    Args:
        place: a folder, a SentencePiece file, or a hub id.

    Raises:
        UserError: a file that cannot be read; or the hub does not give it.
    """
    path = user_path(str(place))
    if path.is_file():
        return _hash([path], {})
    if not path.is_dir():
        from megatron_tiedlora.data.tokenizer import download_tokenizer

        path = download_tokenizer(str(place))
    for names in _VOCABULARIES:
        if files := sorted({file for name in names for file in path.glob(name) if file.is_file()}):
            return _hash(files, _settings(path))
    return None


def _settings(folder: Path) -> dict[str, Any]:
    """What else decides on ids: of the special tokens only their texts, since versions write them in several ways."""
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
    """Tokens that the configs add to those of the vocabulary, which change how a text is cut; None without any."""
    file, known = folder / "tokenizer.json", set[str]()
    with suppress(UserError):  # none there, or one that its library will have something to say of
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
                raise UserError(f"{file}: is larger than {LARGEST_TOKENIZER:,} bytes, which no tokenizer is")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    known = {name: value for name, value in settings.items() if value is not None}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()
