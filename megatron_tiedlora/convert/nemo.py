"""Converts a NeMo 1 model such as GPT-2B-001 from its `.nemo` to a Hugging Face folder, row by row.

The architecture is Hugging Face's StableLM: LayerNorms with bias, part of each head rotated, SwiGLU, no other biases.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import shown
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.checkpoint.streamed_files import SHARD_BYTES, write_streamed
from megatron_tiedlora.convert.nemo_archive import NemoArchive, readable
from megatron_tiedlora.convert.nemo_config import read_nemo_model
from megatron_tiedlora.convert.nemo_weights import stablelm_tensors
from megatron_tiedlora.data.tokenizer import LARGEST_TOKENIZER, check_conversion

# Ordinary texts, for which transformers must give SentencePiece's ids.
_PROBES = ("Answer: 42", " 12,345.60", "  two\n\nlines\t", "naïve 日本語 😀", "a   b ")


def convert_nemo(
    nemo: Path,
    output: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    new: Callable[[Path], AbstractContextManager[Path]] = new_output,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the model of the file `nemo` as a `stablelm` folder atomically, and return its config.

    Weights keep their dtype, except norms, which are fp32. Rows beyond the tokenizer's pieces are left out.

    Raises:
        UserError: the archive is broken or hostile, its model computes something else, or the output exists.
    """
    reject_existing(output, flag=f"--output {output}")
    archive = NemoArchive(nemo)
    model = read_nemo_model(archive)
    sentencepiece = archive.read(model.tokenizer, largest=LARGEST_TOKENIZER)
    check_conversion(nemo)
    with readable(nemo, f"{model.tokenizer} cannot be read as a SentencePiece model"):
        vocab_size, ids, settings = _read_tokenizer(sentencepiece)
    with new(output) as temporary:
        tensors = stablelm_tensors(archive, model, temporary, vocab_size=vocab_size)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        config = {**model.hf_config(vocab_size=vocab_size), **ids, "dtype": dtype}
        (temporary / "tokenizer.model").write_bytes(sentencepiece)
        write_json(temporary / "tokenizer_config.json", settings)
        write_json(temporary / "config.json", config)
        write_streamed(temporary, tensors, shard_bytes=shard_bytes, progress=progress)
    return config


def _read_tokenizer(raw: bytes) -> tuple[int, dict[str, int | None], dict[str, Any]]:
    """The number of pieces of a SentencePiece model, its special ids as fields of a model's config, and a
    `tokenizer_config.json` with which transformers gives its ids.

    Raises:
        ValueError: transformers gives other ids.
        Exception: any error of the libraries.
    """
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    found = {role: getattr(processor, f"{role}_id")() for role in ("bos", "eos", "unk", "pad")}
    roles = {role: token for role, token in found.items() if token >= 0}  # -1: it has none
    # The class that reads SentencePiece files unchanged; as in SentencePiece, "</s>" in a text is plain text.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    settings |= {f"{role}_token": processor.id_to_piece(token) for role, token in roles.items()}
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "tokenizer.model").write_bytes(raw)
        write_json(Path(scratch, "tokenizer_config.json"), settings)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch)
    for text in _PROBES:
        if tokenizer.encode(text, add_special_tokens=False) != processor.encode(text):
            raise ValueError(f"transformers gives other ids for {shown(text)}")
    ids = {f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")}
    return processor.get_piece_size(), ids, settings
