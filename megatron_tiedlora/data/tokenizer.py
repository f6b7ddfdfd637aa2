"""Loads a tokenizer from an HF folder, a hub id or a bare SentencePiece file, saves it, and computes its hash. Only
functions that load or save a tokenizer import transformers.

If there is a `tokenizer.json`, the model was trained with it, so this file is read unchanged. The class names in
tokenizer_config.json would make transformers 5 rebuild the pre-tokenizer and lose some of its rules. For example,
GPT2Tokenizer does not split digits, and LlamaTokenizer merges a leading space with the dummy prefix.

A bare SentencePiece file must produce the same ids as `SentencePieceProcessor.encode`, which is checked when it is
loaded. Both tokenise text that looks like a control token ("</s>") as plain text. The module `encode` adds BOS and EOS.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tiedlora.base.files import file_sha256, read_json_object, read_small_text
from megatron_tiedlora.base.messages import UserError, first_line, library_errors, shown, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # importing transformers takes seconds
    Tokenizer = Any

LARGEST_TOKENIZER = 2**27  # bytes per file, since libraries read it whole; large vocabularies take 20 to 35 MB
_HUB_FILES = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
              "chat_template*", "config.json")  # fmt: skip

# First transformers release that follows a SentencePiece model's own settings. Earlier ones silently produce wrong ids.
_EXACT_SENTENCEPIECE = (5, 24)
_FIX = "; give --tokenizer an HF tokenizer folder or a SentencePiece tokenizer.model"
_PROBES = ("Answer: 42", " 12,345.60", "  two\n\nlines\t", "naïve 日本語 😀", "</s> <unk> a   b", "")


def load_tokenizer(path_or_hub: str | Path) -> Tokenizer:
    """Return the tokenizer of an HF folder, of a hub id, or of a bare SentencePiece `tokenizer.model`.

    Raises UserError, which names the folder, file or id, if there is no readable tokenizer.
    """
    name = str(path_or_hub)
    path = user_path(name)
    if path.is_file():
        if path.suffix != ".model":
            raise _rejection(name, "is neither a folder nor a SentencePiece .model file")
        _check_size(path)
        tokenizer = _load_sentencepiece(path, config_folder=None)
    elif not path.is_dir() and (name.startswith(("/", ".", "~")) or name.endswith(".model")):
        raise _rejection(name, "does not exist")
    else:
        folder = path if path.is_dir() else download_tokenizer(name)
        tokenizer = _load_folder(folder)
        tokenizer.chat_template = tokenizer.chat_template or _processor_template(folder)
    tokenizer.name_or_path = name
    return tokenizer


def tokenizer_errors(source: str | Path, what: str) -> AbstractContextManager[None]:
    """Convert any error of a tokenizer's library to a UserError of one line with `source`, `what` and the reason."""
    return library_errors(f"{source}: {what}", fix=_FIX)


def start_ids(tokenizer: Tokenizer, add_bos: str) -> list[int]:
    """Return the ids to add before a text. If `add_bos` is "auto", they are the ids that the tokenizer itself adds."""
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    if add_bos != "auto":
        return bos if add_bos == "true" else []
    with tokenizer_errors(tokenizer.name_or_path, "cannot encode a text"):
        ids = list(tokenizer("a", verbose=False)["input_ids"])
        plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    starts = (start for start in range(len(ids)) if ids[start : start + len(plain)] == plain)
    return ids[: next(starts, 0)]


def end_ids(tokenizer: Tokenizer, model_folder: Path, *, vocab_size: int) -> frozenset[int]:
    """Return the ids that end a sequence: the tokenizer's EOS, and the model's ids (chat models have several). As in
    transformers, these are in generation_config.json, or else in config.json or its text_config, and ids outside the
    `vocab_size` rows of the embedding are ignored. Raises UserError if there is no EOS, or if an id is not an int."""
    if tokenizer.eos_token_id is None:
        raise _rejection(tokenizer.name_or_path, "has no end-of-sequence token")
    files = [file for name in ("generation_config.json", "config.json") if (file := model_folder / name).is_file()]
    read = ((file, read_json_object(file, kind="a model's config")) for file in files)
    parts = ((file, part) for file, values in read for part in (values, values.get("text_config")))
    known = ((file, part["eos_token_id"]) for file, part in parts if isinstance(part, dict) and "eos_token_id" in part)
    file, found = next((pair for pair in known if pair[1] is not None), (model_folder, []))
    more = found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in more):
        raise UserError(f"{file}: eos_token_id = {shown(found)} is neither an id nor a list of ids; correct it")
    return frozenset(token for token in (int(tokenizer.eos_token_id), *more) if 0 <= token < vocab_size)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the tokenizer to `folder` so that transformers 4 and 5 produce the same ids with it.

    The class is written as PreTrainedTokenizerFast, because both versions then read tokenizer.json unchanged. BOS, EOS,
    UNK and padding tokens are removed from the list of extra special tokens, and an empty list is not written.
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


def byte_tokenizer(max_length: int) -> Tokenizer:
    """Return a tokenizer that needs no files. Its tokens are <unk>, <s>, </s> and all bytes. A text begins with <s>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: number for number, token in enumerate(tokens)}
    backend = Backend(models.BPE(ids, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", ids["<s>"])])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **named)


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the tokenizer's padding id, or its EOS id, or 0 if it has neither. Padding is never found by its id."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError if an id of the tokenizer is too large for the model's embedding of `vocab_size` rows. Control
    tokens other than BOS, EOS, UNK and padding may be larger, such as Gemma 3's token of images; see `Encoding.check`.
    """
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    unused = {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special} - named
    ids = ((number, token) for token, number in tokenizer.get_vocab().items() if token not in unused)
    largest_id, token = max(ids, default=(-1, ""))
    if largest_id >= vocab_size:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer's vocabulary needs {largest_id + 1} ids (the last is {token!r}), "
            f"but the model's embedding has {vocab_size} rows; set --tokenizer to the model's own tokenizer"
        )


def _load_folder(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for pattern in (*_HUB_FILES, "additional_chat_templates/*"):
        for file in folder.glob(pattern):
            _check_size(file)
    settings = folder / "tokenizer_config.json"
    given = read_json_object(settings, kind="a tokenizer's config") if settings.is_file() else {}
    for name in ("vocab", "merges", "fast_tokenizer_files"):  # transformers would read any file that is named here
        if isinstance(given.get(name), str) or (name == "fast_tokenizer_files" and given.get(name)):
            raise UserError(f"{settings}: {name} {shown(given[name])} names another file; remove this key")
    if (folder / "tokenizer.json").is_file():
        return _guarded(folder, lambda: PreTrainedTokenizerFast.from_pretrained(str(folder)))
    models = sorted(folder.glob("*.model"))
    preferred = [path for path in models if path.name == "tokenizer.model"] or models[:1]
    if preferred:
        return _load_sentencepiece(preferred[0], config_folder=folder if settings.is_file() else None)
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "vocab.json", "vocab.txt")):
        raise _rejection(str(folder), "contains no tokenizer (no tokenizer.json and no tokenizer.model)")
    return _guarded(folder, lambda: AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))


def _processor_template(folder: Path) -> str | None:
    """Return the chat template of a multimodal model's processor. It is read if the tokenizer itself has none."""
    file = folder / "chat_template.json"
    text = read_json_object(file, kind="a chat template").get("chat_template") if file.is_file() else None
    if not isinstance(text, str | None):
        raise _rejection(str(file), f"chat_template = {shown(text)} is not a text")
    return text


def check_conversion(source: str | Path) -> None:
    """Raise UserError, which names `source`, if transformers is too old to convert a SentencePiece model exactly."""
    from transformers import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < _EXACT_SENTENCEPIECE:
        needed = ".".join(map(str, _EXACT_SENTENCEPIECE))
        said = f"{source}: transformers {__version__} produces different ids from SentencePiece"
        raise UserError(f"{said}; run `pip install 'transformers>={needed}'`")


def _load_sentencepiece(path: Path, *, config_folder: Path | None) -> Tokenizer:
    """Return a converted SentencePiece tokenizer, with special tokens and template from `config_folder`, if given."""
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    with tokenizer_errors(path, "is not a SentencePiece model"):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        expected = [processor.encode(text) for text in _PROBES]
    check_conversion(path)
    # transformers looks for the file by its name in a folder, so it gets a folder with only the needed files.
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(path, Path(scratch, "tokenizer.model"))
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if config_folder is not None and (config_folder / name).is_file():
                shutil.copyfile(config_folder / name, Path(scratch, name))
        file = Path(scratch, "tokenizer_config.json")
        config = read_json_object(file, kind="a tokenizer's config") if file.is_file() else {}
        more: dict[str, Any] = {} if "add_bos_token" in config else {"add_bos_token": True}  # as LlamaTokenizer does
        if config_folder is not None:
            return _guarded(path, lambda: PreTrainedTokenizerFast.from_pretrained(scratch, **more))
        more["split_special_tokens"] = True
        tokenizer = _guarded(path, lambda: PreTrainedTokenizerFast.from_pretrained(scratch, **more))
    for text, ids in zip(_PROBES, expected, strict=True):
        if tokenizer.encode(text, add_special_tokens=False) != ids:
            raise _rejection(str(path), f"is a SentencePiece model that cannot be converted exactly (see {text!r})")
    return tokenizer


def download_tokenizer(hub_id: str) -> Path:
    """Download the tokenizer files of a hub model and return their folder. Raises UserError if the download fails."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client raises many unrelated types, including network errors
        raise _rejection(hub_id, f"is not a local folder and cannot be downloaded ({first_line(error)})") from error


def _guarded(source: Path, load: Callable[[], object]) -> Tokenizer:
    """Return the tokenizer that `load` returns. Raises UserError, with `source`, if loading it or using it fails."""
    from transformers import PreTrainedTokenizerBase

    with tokenizer_errors(source, "cannot be read as a tokenizer"):
        tokenizer = load()
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        # The tokenizer is tried, because files with values of wrong types are loaded and fail only when they are used.
        tokenizer(list(_PROBES), add_special_tokens=False)
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        for token_id in (*tokenizer.all_special_ids, *(token_id for token_id in named if token_id is not None)):
            if type(token_id) is not int:
                raise TypeError(f"the id of a special token is {shown(token_id)}")
    return tokenizer


def _check_size(file: Path) -> None:
    if file.is_file() and file.stat().st_size > LARGEST_TOKENIZER:
        raise _rejection(str(file), f"is larger than {LARGEST_TOKENIZER:,} bytes, too large for a tokenizer")


def _rejection(source: str, reason: str) -> UserError:
    return UserError(f"{source}: {reason}{_FIX}")


# Hash of a tokenizer -------------------------------------------------------------------------------------------------
#
# All copies of a tokenizer have the same hash, even if different programs wrote their configs.

# The ids are determined by the first of these files that a folder has; see `load_tokenizer`.
_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("*.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def tokenizer_hash(source: str | Path) -> str | None:
    """Return a hash of the vocabulary, BOS, EOS, added tokens and chat template; None if there is no vocabulary.

    `source` is a folder, a SentencePiece file or a hub id. Raises UserError if a file cannot be read or downloaded."""
    path = user_path(str(source))
    if path.is_file():
        return _hash([path], {})
    if not path.is_dir():
        path = download_tokenizer(str(source))
    for names in _VOCABULARIES:
        if files := sorted({file for name in names for file in path.glob(name) if file.is_file()}):
            return _hash(files, _id_settings(path))
    return None


def _id_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that determine ids, besides the vocabulary. Of BOS and EOS, only the text is used."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= read_json_object(folder / name, kind="a tokenizer's config")
    template = folder / "chat_template.jinja"
    own = read_small_text(template) if template.is_file() else found.get("chat_template")
    tokens = {role: found.get(role) for role in ("bos_token", "eos_token")}
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    return {**texts, "chat_template": own or _processor_template(folder), "added": _added(folder, found)}


def _added(folder: Path, found: Mapping[str, Any]) -> list[str] | None:
    """Return the tokens that the configs add to the vocabulary, or None if they add none."""
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
        _check_size(file)
        digest.update(bytes.fromhex(file_sha256(file)))
    known = {name: value for name, value in settings.items() if value is not None}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()
