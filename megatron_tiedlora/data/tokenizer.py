"""Tokenizers out of an HF folder, a hub id, or a bare SentencePiece file, and back into a folder.

`tokenizer.json`, where there is one, is what the model was trained with, so it is read as it stands: the
class names in tokenizer_config.json make transformers 5 rebuild the pre-tokenizer and lose parts of it
(GPT2Tokenizer drops the splitting into digits, LlamaTokenizer merges a leading space with the dummy prefix).

A bare SentencePiece file gives the ids of `SentencePieceProcessor.encode`, which is checked on load: text that
spells a control piece ("</s>") is plain text, as it is there. BOS and EOS are never added here; `encode` does.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.data.tokenizer_files import LARGEST_TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_FILES = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
              "chat_template*", "config.json")  # fmt: skip

_PROBES = ("Answer: 42", " 12,345.60", "  two\n\nlines\t", "naïve 日本語 😀", "</s> <unk> a   b", "")


def load_tokenizer(path_or_hub: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an HF folder, of a hub id, or of a bare SentencePiece `tokenizer.model`.

    Raises UserError naming the place and `--tokenizer` when there is none, or none that can be read.
    """
    name = str(path_or_hub)
    path = user_path(name)
    if path.is_file():
        if path.suffix != ".model":
            raise _refusal(name, "is neither a folder nor a SentencePiece .model file")
        _check_size(path)
        return _named(_load_sentencepiece(path, config_folder=None), name)
    if path.is_dir():
        return _named(_load_folder(path), name)
    if name.startswith(("/", ".", "~")) or name.endswith(".model"):
        raise _refusal(name, "does not exist")
    return _named(_load_folder(download_tokenizer(name)), name)


@contextmanager
def library_errors(place: str | Path, what: str) -> Iterator[None]:
    """Whatever goes wrong inside of a tokenizer's library becomes one line: `place`, `what` and the library's reason.

    Raises:
        UserError: so it did. Ctrl-C, an exit and a run's stop pass through.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # corrupt files surface as anything from KeyError to a panic of the Rust side
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _refusal(str(place), f"{what} ({first_line(error)})") from error


def end_ids(tokenizer: PreTrainedTokenizerBase, model_folder: Path, *, vocab_size: int) -> frozenset[int]:
    """The ids that end a sequence: the tokenizer's, and those of the model's generation_config.json (chat models have
    several).

    As in transformers an id that the model cannot give ends nothing, so it is left out.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: the tokenizer has none, or the file holds something else than whole numbers.
    """
    if tokenizer.eos_token_id is None:
        raise _refusal(tokenizer.name_or_path, "has no end-of-sequence token")
    file = model_folder / "generation_config.json"
    found = read_json_object(file, kind="a generation config").get("eos_token_id") if file.is_file() else None
    more = found if isinstance(found, list) else [] if found is None else [found]
    for token in more:
        if type(token) is not int:
            raise UserError(f"{file}: eos_token_id = {shown(found)} is neither an id nor a list of ids; correct it")
    return frozenset(token for token in (int(tokenizer.eos_token_id), *more) if 0 <= token < vocab_size)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer to `folder` so that transformers 4 and 5 and their users read the same ids from it.

    The class is written as PreTrainedTokenizerFast: both versions take it as "read tokenizer.json as it
    stands". Special tokens that are named anyway are left out of the extra ones, whose list form version 4 refuses.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer.save_pretrained(str(folder))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    path = Path(folder) / "tokenizer_config.json"
    config = read_json_object(path, kind="a tokenizer's config")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    named = {config.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        config["extra_special_tokens"] = [token for token in extra if token not in named]
        if not config["extra_special_tokens"]:
            del config["extra_special_tokens"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's own, else EOS, else 0. Padding is never told apart by its id."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise UserError when the tokenizer can give an id that the model's embedding of `vocab_size` rows lacks."""
    vocabulary = tokenizer.get_vocab()
    ids = [(token_id, token) for token, token_id in vocabulary.items()]
    ids += zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    largest_id, token = max(ids, default=(-1, ""))
    if largest_id >= vocab_size:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer's vocabulary needs {largest_id + 1} ids (the last is {token!r}), "
            f"but the model's embedding has {vocab_size} rows; give the model's own --tokenizer"
        )


def _load_folder(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for pattern in (*_HUB_FILES, "additional_chat_templates/*"):
        for file in folder.glob(pattern):
            _check_size(file)
    settings = folder / "tokenizer_config.json"
    given = read_json_object(settings, kind="a tokenizer's config") if settings.is_file() else {}
    for name in ("vocab", "merges", "fast_tokenizer_files"):  # transformers reads the file of that name, wherever it is
        if isinstance(given.get(name), str) or (name == "fast_tokenizer_files" and given.get(name)):
            raise UserError(f"{settings}: {name} {shown(given[name])} names another file; remove that key")
    if (folder / "tokenizer.json").is_file():
        return _guarded(folder, lambda: PreTrainedTokenizerFast.from_pretrained(str(folder)))
    models = sorted(folder.glob("*.model"))
    preferred = [path for path in models if path.name == "tokenizer.model"] or models[:1]
    if preferred:
        has_config = (folder / "tokenizer_config.json").is_file()
        return _load_sentencepiece(preferred[0], config_folder=folder if has_config else None)
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "vocab.json", "vocab.txt")):
        raise _refusal(str(folder), "holds no tokenizer (no tokenizer.json and no tokenizer.model)")
    return _guarded(folder, lambda: AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))


def _load_sentencepiece(path: Path, *, config_folder: Path | None) -> PreTrainedTokenizerBase:
    """Convert a SentencePiece model; `config_folder` holds a tokenizer_config.json with special tokens and template."""
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    with library_errors(path, "is not a SentencePiece model"):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        expected = [processor.encode(text) for text in _PROBES]
    # transformers finds the file by its name in a folder, so it is given one that holds nothing else.
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(path, Path(scratch, "tokenizer.model"))
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if config_folder is not None and (config_folder / name).is_file():
                shutil.copyfile(config_folder / name, Path(scratch, name))
        if config_folder is not None:
            return _guarded(path, lambda: PreTrainedTokenizerFast.from_pretrained(scratch))
        tokenizer = _guarded(path, lambda: PreTrainedTokenizerFast.from_pretrained(scratch, split_special_tokens=True))
    for text, ids in zip(_PROBES, expected, strict=True):
        if tokenizer.encode(text, add_special_tokens=False) != ids:
            raise _refusal(str(path), f"is a SentencePiece model that cannot be converted exactly (see {text!r})")
    return tokenizer


def download_tokenizer(hub_id: str) -> Path:
    """The folder of a hub model's tokenizer files. Raises UserError where the hub does not give them."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client raises many unrelated kinds, network errors among them
        raise _refusal(hub_id, f"is no local folder and cannot be taken from the hub ({first_line(error)})") from error


def _guarded(place: Path, load: Callable[[], object]) -> PreTrainedTokenizerBase:
    """Call `load` and try what it gives; whatever goes wrong inside the library becomes one line naming `place`."""
    from transformers import PreTrainedTokenizerBase

    with library_errors(place, "cannot be read as a tokenizer"):
        tokenizer = load()
        _try_out(tokenizer)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _check_size(file: Path) -> None:
    if file.is_file() and file.stat().st_size > LARGEST_TOKENIZER:
        raise _refusal(str(file), f"is larger than {LARGEST_TOKENIZER:,} bytes, which no tokenizer's file is")


def _try_out(tokenizer: Any) -> None:
    """Use a tokenizer as a run will: files of wrong kinds of values load, and fail when they are used."""
    tokenizer(list(_PROBES), add_special_tokens=False)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for token_id in (*tokenizer.all_special_ids, *(token_id for token_id in named if token_id is not None)):
        if type(token_id) is not int:
            raise TypeError(f"the id of a special token is {shown(token_id)}")


def _named(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    tokenizer.name_or_path = name
    return tokenizer


def _refusal(place: str, reason: str) -> UserError:
    return UserError(f"{place}: {reason}; give --tokenizer a HF tokenizer folder or a SentencePiece tokenizer.model")
