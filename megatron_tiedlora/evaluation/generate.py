"""Greedy decoding with a key-value cache, for prompts of different lengths in one batch, in any layout.

Prompts are padded on the right, and every sequence writes its next token at its own position. So no token attends to
padding. Prompts of similar length are computed together, so that little padding is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.model.attention import KeyValueCache

# Prompts computed together have at most this many tokens including padding, which bounds the memory. None is shorter
# than this share of the longest.
PROMPT_TOKENS_AT_ONCE = 8192
MIN_SHARE_OF_LONGEST = 0.75

# Ranks that decode independently agree on stopping only this often, since a sum over all ranks waits for the slowest.
TOKENS_BETWEEN_AGREEMENTS = 8

Item = TypeVar("Item")

Agree = Callable[[bool], bool]
"""Maps "this rank's sequences are done" to "those of all ranks are". All ranks call it together, and it may raise."""


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Collection[int],
    max_new_tokens: int,
    is_end: Callable[[Sequence[int]], bool] = lambda _: False,
    agree: Agree = bool,
) -> list[list[int]]:
    """Continue each prompt with its most likely tokens until one of `end_ids`, `is_end` or `max_new_tokens`.

    Args:
        prompts: non-empty token ids of any lengths, the same on all ranks of a pipeline and tensor group.
        end_ids: tokens that end a sequence.
        is_end: called with all new tokens of a sequence after each of them.

    Returns:
        the new tokens of each prompt without the end token, on every rank of the pipeline.

    Raises:
        whatever `agree` raises; then no message is in flight between the stages.
    """
    parts = [
        _Part(decoder, some, end_ids=end_ids, max_new_tokens=max_new_tokens, is_end=is_end)
        for some in split_evenly(prompts, decoder.num_parts)
    ]
    every = 1 if decoder.calls_together else TOKENS_BETWEEN_AGREEMENTS
    for step in range(1, max_new_tokens + 1):
        for part in parts:
            part.advance()
        if step % every and step < max_new_tokens:
            continue
        for part in parts:  # no message may be in flight when all ranks meet, or stages would wait for each other
            part.collect()
        decoder.finish()
        if agree(all(part.is_done for part in parts)):
            break
    return [row for part in parts for row in part.in_given_order()]


def split_evenly(items: Sequence[Item], num_parts: int) -> list[Sequence[Item]]:
    """Split `items` into at most `num_parts` non-empty runs, whose lengths differ by at most one."""
    count = min(num_parts, len(items))
    boundaries = [len(items) * index // count for index in range(count + 1)]
    return [items[start:stop] for start, stop in itertools.pairwise(boundaries)]


def similar_lengths(lengths: Sequence[int]) -> list[slice]:
    """Split descending `lengths` into runs that are computed together; see the constants above."""
    runs, start = [], 0
    for stop in range(1, len(lengths) + 1):
        longest = lengths[start]
        if (
            stop == len(lengths)
            or lengths[stop] < MIN_SHARE_OF_LONGEST * longest
            or longest * (stop + 1 - start) > PROMPT_TOKENS_AT_ONCE
        ):
            runs.append(slice(start, stop))
            start = stop
    return runs


def pad_right(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    """Pad rows of different lengths with `fill` to one (b, longest) int64 tensor."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), fill, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded.to(device)


class _Part:
    """A part of the batch: sequences that go through the stages together."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        end_ids: Collection[int],
        max_new_tokens: int,
        is_end: Callable[[Sequence[int]], bool],
    ) -> None:
        self.decoder = decoder
        self.end_ids = end_ids
        self.is_end = is_end
        self.order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # longest first
        self.prompts = [prompts[index] for index in self.order]
        self.lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=decoder.device)
        self.caches = decoder.new_caches(len(prompts), len(self.prompts[0]) + max_new_tokens)
        self.rows: list[list[int]] = [[] for _ in prompts]
        self.tokens = torch.empty(0)  # the newest token of each sequence, (b, 1), once there is one
        self.ended = [False] * len(prompts)
        self.num_chosen = 0
        self.waiting: Callable[[], torch.Tensor] | None = None  # for the tokens that were chosen last

    @property
    def is_done(self) -> bool:
        """Whether every sequence has ended, judging by the tokens collected so far."""
        return all(self.ended)

    def advance(self) -> None:
        """Compute one more token for every sequence. It is collected at the next call, so that stages run ahead."""
        self.collect()
        if self.is_done and not self.decoder.calls_together:
            return
        if self.num_chosen == 0:
            chosen = self._read_prompts()
        else:
            positions = (self.lengths + self.num_chosen - 1)[:, None]
            logits = self.decoder.forward(self.tokens, positions, self.caches)
            chosen = None if logits is None else logits[:, -1].argmax(-1)
        self.num_chosen += 1
        self.waiting = self.decoder.share(chosen, len(self.rows))
        if self.decoder.num_parts == 1:
            self.collect()

    def _read_prompts(self) -> torch.Tensor | None:
        """Fill the caches and choose the first token of every sequence, (b,) on the last stage."""
        found = []
        runs = similar_lengths([len(prompt) for prompt in self.prompts])
        if self.decoder.calls_together:  # the number of calls must not depend on a rank's own prompts
            runs = [slice(0, len(self.prompts))]
        for rows in runs:
            tokens = pad_right(self.prompts[rows], 0, self.decoder.device)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            caches = [KeyValueCache(cache.keys[rows], cache.values[rows]) for cache in self.caches]
            logits = self.decoder.forward(tokens, positions, caches, wanted=self.lengths[rows] - 1)
            if logits is not None:
                found.append(logits[:, -1].argmax(-1))
        for cache in self.caches:
            cache.filled = len(self.prompts[0])
        return torch.cat(found) if found else None

    def in_given_order(self) -> list[list[int]]:
        """The new tokens of each prompt, in the order of the prompts."""
        found = dict(zip(self.order, self.rows, strict=True))
        return [found[index] for index in range(len(found))]

    def collect(self) -> None:
        """Receive the tokens that the last stage chose, if there are any."""
        if self.waiting is None:
            return
        chosen = self.waiting()
        self.waiting = None
        self.tokens = chosen[:, None]
        for index, token in enumerate(chosen.tolist()):
            if self.ended[index]:
                continue
            if token in self.end_ids:
                self.ended[index] = True
            else:
                self.rows[index].append(token)
                self.ended[index] = self.is_end(self.rows[index])
