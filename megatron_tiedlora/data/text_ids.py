"""Ids of texts and texts of ids: the calls of a tokenizer, each of whose errors becomes one line.

Owns the rule that a text after another one gets no space that it does not have. Leaves samples to `encode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tiedlora.data.examples import Segment
from megatron_tiedlora.data.tokenizer import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Decode ids to text. Raises UserError naming the tokenizer if its library fails."""
    with library_errors(tokenizer.name_or_path, "cannot decode some ids"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special))


def adds_prefix_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before any text (SentencePiece's dummy prefix, `add_prefix_space`)."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return bool(tokens) and tokens[0].startswith(("▁", "Ġ"))


def segment_ids(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sequence[Segment]]
) -> list[list[list[int]]]:
    """The ids of each segment of each sample, without any token that ends a sample."""
    found: list[list[list[int]]] = [[[] for _ in segments] for segments in samples]
    for follows in (False, True):
        for plain in (False, True):
            positions = [
                (number, index)
                for number, segments in enumerate(samples)
                for index, segment in enumerate(segments)
                if segment.plain == plain and (index > 0 and any(s.text for s in segments[:index])) == follows
            ]
            texts = [samples[number][index].text for number, index in positions]
            encode = continuation_ids if follows else _ids
            for (number, index), ids in zip(positions, encode(tokenizer, texts, plain=plain), strict=True):
                found[number][index] = ids
    return found


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, plain: bool = False
) -> list[list[int]]:
    """Tokenise texts that follow a prompt, so that decoding prompt and continuation gives the joined text.

    A tokenizer that prefixes a space would add one to " 42" and to "42". So a leading space is removed, and the
    tokenizer adds it again. A text without one is tokenised after a newline, whose ids are then dropped. If the
    newline merges with the text into one token, the extra space stays.

    Args:
        plain: whether control tokens in the texts are read as plain text.
    """
    if not texts or not adds_prefix_space(tokenizer):
        return _ids(tokenizer, texts, plain=plain)
    newline = _ids(tokenizer, ["\n"])[0]
    guarded = [text[1:] if text.startswith(" ") else "\n" + text for text in texts]
    encoded = _ids(tokenizer, guarded, plain=plain)
    for index, text in enumerate(texts):
        if not text.startswith(" "):
            ids = encoded[index]
            whole = newline and ids[: len(newline)] == newline
            encoded[index] = ids[len(newline) :] if whole else _ids(tokenizer, [text], plain=plain)[0]
    return encoded


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    if not texts:
        return []
    more = {"split_special_tokens": True} if plain else {}
    with library_errors(tokenizer.name_or_path, "cannot encode a text"):
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **more,
        )
    return [list(ids) for ids in encoded["input_ids"]]
