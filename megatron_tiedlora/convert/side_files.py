"""The files beside a model's weights that are copied into an output: only files of the folder itself.

A folder that came from somebody else may hold links to anywhere, and outputs are shared with others. Links of the
hub's cache, from `models--X/snapshots/REVISION/` into `models--X/blobs/`, count as its own files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.data.tokenizer import load_tokenizer

# The files from which transformers reads a tokenizer, including chat templates, whose texts it saves again.
_TOKENIZER_SOURCES = (
    *("tokenizer*", "*.model", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json"),
    *("*.txt", "*.spm", "*.codes", "chat_template*", "*.jinja", "additional_chat_templates"),
    "additional_chat_templates/*",
)


def side_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The sorted files of a model folder that match one of `patterns`. Folders are ignored.

    Raises:
        UserError: a file is a link that leads out of the model, or a pipe, a socket or a device.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots" and inside[0].parents[1].name.startswith("models--"):
        inside.append(inside[0].parents[1] / "blobs")
    for path in found:
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(root) for root in inside):
            raise UserError(
                f"{path}: leads to {target}, out of the model folder, and would be copied from there; replace it with"
                " the file itself, or remove the link"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: is a pipe, a socket or a device; replace it with a file, or remove it")
    return [path for path in found if path.is_file()]


def load_tokenizer_to_copy(source: str | Path) -> PreTrainedTokenizerBase:
    """`load_tokenizer` for a tokenizer that is saved to an output. Raises UserError as that and `side_files` do."""
    folder = user_path(source)
    if folder.is_dir():
        side_files(folder, _TOKENIZER_SOURCES)
    return load_tokenizer(source)
