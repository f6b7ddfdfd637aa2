"""Generates tokens with a `Decoder`, for prompts of different lengths and in any parallel layout. Also computes the
log-likelihoods of several endings of a prompt. The prompt is computed only once.

A batch is divided into at most as many chunks as there are stages, so that stages work on different chunks at the same
time. The last stage sends the generated tokens to the other stages.

Prompts are padded on the right, and every sequence writes its next token at its own position. So no token attends to
padding. Prompts of similar length are computed together, so that little padding is computed.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.evaluation.decoder import AdapterRows, Decoder
from megatron_tiedlora.model.attention import KeyValueCache
from megatron_tiedlora.parallel.loss import IGNORED_LABEL

# Prompts computed together have at most this many tokens including padding, which bounds the memory. Each of these
# prompts is at least MIN_SHARE_OF_LONGEST times as long as the longest.
PROMPT_TOKENS_AT_ONCE = 8192
MIN_SHARE_OF_LONGEST = 0.75

# Ranks that decode independently agree on stopping once per this many tokens, because the fast ranks wait for the slow.
TOKENS_BETWEEN_AGREEMENTS = 8

Item = TypeVar("Item")

Agree = Callable[[bool], bool]
"""A function that gets whether this rank's sequences have ended, and returns whether those of all ranks have. All ranks
call it at the same time, and it may raise an error."""

# The maximum number of tokens in the caches: prompts and endings, where each ending has a copy of its prompt.
ENDING_TOKENS_AT_ONCE = 32768

Sample = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The token ids of a prompt, and the token ids of each of its endings. They are never empty."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of one adapter, and the conditions that end their answers.

    Attributes:
        prompts: non-empty lists of token ids, the same on all tensor-parallel ranks and pipeline stages.
        end_ids: the token ids that end a sequence.
        is_end: a function that gets the new tokens of a sequence, and returns whether the sequence has ended.
        adapter: the name of the adapter, or ONLY if the stage has at most one adapter.
        numbers: the row number of each prompt, on which its samples depend (default: the prompt's index).
    """

    prompts: Sequence[Sequence[int]]
    end_ids: Collection[int]
    max_new_tokens: int
    is_end: Callable[[Sequence[int]], bool] = lambda _: False
    adapter: str = ONLY
    numbers: Sequence[int] = range(2**31)


@torch.no_grad()
def generate(decoder: Decoder, given: Sequence[Prompts], *, agree: Agree = bool) -> list[list[list[int]]]:
    """Continue each prompt with its most likely tokens, or samples, until `end_ids`, `is_end` or `max_new_tokens`.

    Each adapter's prompts have the same order, caches and attention calls as in a batch without other adapters. Only
    the base's matmuls run over the rows of all adapters. An adapter is skipped once all of its sequences have ended.

    Args:
        given: the prompts of each adapter. If the stage has no adapter group, there is one entry.

    Returns:
        the new tokens of each prompt of each adapter, without the end token, on every rank of the pipeline.

    Raises:
        Exception: an error of `agree`. At that time, no message is in flight between the stages.
    """
    num_steps, num_stages = max(some.max_new_tokens for some in given), decoder.pipeline.size
    batches = [
        [_Batch(decoder, some, part, num_steps) for part in split_evenly(range(len(some.prompts)), num_stages)]
        for some in given
    ]
    parts = [_Part(decoder, [batch for batch in some if batch is not None]) for some in zip_longest(*batches)]
    every = 1 if decoder.calls_together else TOKENS_BETWEEN_AGREEMENTS
    for step in range(1, num_steps + 1):
        for part in parts:
            part.advance()
        agrees = step % every == 0 or step == num_steps
        if not agrees and num_stages > 1:
            continue
        for part in parts:  # no message may be in flight when all ranks agree, or stages would deadlock
            part.collect()
        decoder.finish()
        for part in parts:
            part.capture()
        if agrees and agree(all(part.is_done for part in parts)):
            break
    if decoder.graphs:
        decoder.idle += [batch.caches for some in batches for batch in some]
    return [[row for batch in some for row in batch.in_given_order()] for some in batches]


def split_evenly(items: Sequence[Item], num_parts: int) -> list[Sequence[Item]]:
    """Split `items` into at most `num_parts` non-empty slices whose lengths differ by at most one."""
    count = min(num_parts, len(items))
    boundaries = [len(items) * index // count for index in range(count + 1)]
    return [items[start:stop] for start, stop in itertools.pairwise(boundaries)]


def similar_lengths(lengths: Sequence[int]) -> list[slice]:
    """Return slices of descending `lengths`. Prompts of a slice are computed together; see the constants above."""
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
    """Pad rows of different lengths with `fill`, and return one int64 tensor of shape (b, maximum length)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(ids, batch_first=True, padding_value=fill).to(device)


class _Batch:
    """A batch of sequences of one adapter, with the longest sequences first."""

    def __init__(self, decoder: Decoder, given: Prompts, indices: Sequence[int], num_steps: int) -> None:
        """Make empty caches for some of the adapter's prompts, by index. At most `num_steps` tokens per sequence are
        computed, and at most `given.max_new_tokens` of them are used."""
        self.given = given
        self.order = sorted(indices, key=lambda index: -len(given.prompts[index]))
        self.prompts = [given.prompts[index] for index in self.order]
        self.lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=decoder.device)
        self.numbers = torch.tensor([given.numbers[index] for index in self.order], device=decoder.device)
        self.most = num_steps if decoder.calls_together else given.max_new_tokens
        self.caches = decoder.take_caches(len(indices), len(self.prompts[0]) + self.most)
        self.rows: list[list[int]] = [[] for _ in indices]
        self.tokens = torch.empty(0)  # the newest token of each sequence, (b, 1), once it exists
        self.ended, self.num_chosen = [False] * len(indices), 0

    @property
    def is_done(self) -> bool:
        """Return whether every sequence has ended, according to the tokens collected so far."""
        return all(self.ended) or self.num_chosen >= self.most

    def runs(self, *, whole: bool) -> list[slice]:
        """Return slices of prompts that are computed together. With `whole`, return one slice of all prompts."""
        return [slice(0, len(self.prompts))] if whole else similar_lengths([len(prompt) for prompt in self.prompts])

    def prompt_rows(self, some: slice, device: torch.device) -> AdapterRows:
        """Return the input for some prompts. Its caches are views of this batch's caches."""
        tokens = pad_right(self.prompts[some], 0, device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        caches = [KeyValueCache(cache.keys[some], cache.values[some]) for cache in self.caches]
        return AdapterRows(tokens, positions, caches, self.given.adapter)

    def newest_rows(self) -> AdapterRows:
        """Return the input for the newest token of each sequence."""
        positions = self.lengths[:, None] + (self.num_chosen - 1)
        return AdapterRows(self.tokens, positions, self.caches, self.given.adapter)

    def take(self, chosen: torch.Tensor) -> None:
        """Append the generated tokens `chosen`, (b,), to the sequences that have not ended."""
        self.tokens = chosen[:, None]
        for index, token in enumerate(chosen.tolist()):
            if self.ended[index] or self.num_chosen > self.given.max_new_tokens:
                continue
            if token in self.given.end_ids:
                self.ended[index] = True
            else:
                self.rows[index].append(token)
                self.ended[index] = self.given.is_end(self.rows[index])

    def in_given_order(self) -> list[list[int]]:
        """Return the new tokens of each prompt, in the order of the prompts."""
        return [row for _, row in sorted(zip(self.order, self.rows, strict=True))]


class _Part:
    """Sequences of one or several adapters that go through the stages together."""

    def __init__(self, decoder: Decoder, batches: Sequence[_Batch]) -> None:
        self.decoder, self.batches = decoder, batches
        self.computed: list[_Batch] = []  # batches whose newest tokens have not been received
        self.waiting: Callable[[], torch.Tensor] | None = None

    @property
    def is_done(self) -> bool:
        """Return whether every sequence has ended, according to the tokens collected so far."""
        return all(batch.is_done for batch in self.batches)

    def advance(self) -> None:
        """Compute a new token for every sequence. The next call collects the tokens, so that stages can run ahead."""
        self.collect()
        self.computed = [batch for batch in self.batches if self.decoder.calls_together or not batch.is_done]
        if not self.computed:
            return
        if self.computed[0].num_chosen == 0:
            chosen = self._read_prompts()
        else:
            logits = self.decoder.forward([batch.newest_rows() for batch in self.computed])
            chosen = self._choose(logits, [(batch, slice(None)) for batch in self.computed])
        for batch in self.computed:
            batch.num_chosen += 1
        self.waiting = self.decoder.share(chosen, sum(len(batch.rows) for batch in self.computed))
        if self.decoder.pipeline.size == 1:
            self.collect()

    def _choose(self, logits: torch.Tensor | None, call: Sequence[tuple[_Batch, slice]]) -> torch.Tensor | None:
        places = ((batch.numbers[run], batch.num_chosen) for batch, run in call)
        return None if logits is None else self.decoder.sampling.choose(logits, places)

    def capture(self) -> None:
        """Capture the next step. If there is none, capture the last one, for later batches with these caches."""
        left, graphs = [batch for batch in self.computed if not batch.is_done] or self.computed, self.decoder.graphs
        if left and graphs is not None and graphs.lacks_some:
            self.decoder.capture([batch.newest_rows() for batch in left])

    def _read_prompts(self) -> torch.Tensor | None:
        """Fill the caches. Return the first new token of every sequence, (b,), on the last stage, otherwise None."""
        found: dict[_Batch, list[torch.Tensor]] = {batch: [] for batch in self.computed}
        whole = self.decoder.calls_together  # the number of calls must not depend on the prompts of a rank
        for turn in zip_longest(*(batch.runs(whole=whole) for batch in self.computed)):
            present = [(batch, run) for batch, run in zip(self.computed, turn, strict=True) if run is not None]
            sized = [((b, r), len(b.prompts[r.start]) * (r.stop - r.start), PROMPT_TOKENS_AT_ONCE) for b, r in present]
            for call in [present] if whole else filled(sized):
                rows = [batch.prompt_rows(run, self.decoder.device) for batch, run in call]
                wanted = [batch.lengths[run] - 1 for batch, run in call]
                chosen = self._choose(self.decoder.forward(rows, wanted=wanted), call)
                if chosen is not None:
                    parts = chosen.split([len(positions) for positions in wanted])
                    for (batch, _), part in zip(call, parts, strict=True):
                        found[batch].append(part)
        for batch in self.computed:
            for cache in batch.caches:
                cache.filled = len(batch.prompts[0])
        return torch.cat([part for parts in found.values() for part in parts]) if self.decoder.is_last else None

    def collect(self) -> None:
        """Receive the generated tokens from the last stage, if some are expected."""
        if self.waiting is None:
            return
        chosen, self.waiting = self.waiting(), None
        for batch, part in zip(self.computed, chosen.split([len(b.rows) for b in self.computed]), strict=True):
            batch.take(part)


@torch.no_grad()
def ending_log_likelihoods(decoder: Decoder, samples: Sequence[Sample], *, adapter: str = ONLY) -> list[list[float]]:
    """Return the summed log-likelihood of each ending after its prompt, in nats, as one list per sample. The lists are
    empty on earlier stages. For `adapter` see `AdapterRows`.

    The last token of a prompt predicts the first token of an ending, so it is computed with the endings. The tokens
    before it are computed once and stay in the cache."""
    scores: list[list[float]] = []
    for part in split_evenly(samples, decoder.pipeline.size):
        for some in _groups(part, whole=decoder.calls_together):
            scores += _score(decoder, some, adapter)
    decoder.finish()
    return scores


def _groups(samples: Sequence[Sample], *, whole: bool) -> Iterator[Sequence[Sample]]:
    """Yield slices of samples with caches of limited size (a prompt copy per ending). With `whole`, yield one slice."""
    start, rows, longest = 0, 0, 0
    for index, (prompt, endings) in enumerate(samples):
        grown = max(longest, len(prompt) + max(map(len, endings)))
        if not whole and index > start and (rows + len(endings)) * grown > ENDING_TOKENS_AT_ONCE:
            yield samples[start:index]
            start, rows, grown = index, 0, len(prompt) + max(map(len, endings))
        rows, longest = rows + len(endings), grown
    yield samples[start:]


def _score(decoder: Decoder, samples: Sequence[Sample], adapter: str) -> list[list[float]]:
    device, counts = decoder.device, [len(endings) for _, endings in samples]
    rows = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)).to(device)
    before = [list(prompt[:-1]) for prompt, _ in samples]
    after = [[prompt[-1], *ending] for prompt, endings in samples for ending in endings]
    longest = max(map(len, before))
    caches = decoder.new_caches(len(samples), longest + max(map(len, after)) - 1)
    if longest:
        prompts = pad_right(before, 0, device)
        positions = torch.arange(longest, device=device).expand_as(prompts)
        # The head needs at least one position. These logits are not used.
        unused = torch.zeros(len(samples), dtype=torch.int64, device=device)
        decoder.forward([AdapterRows(prompts, positions, caches, adapter)], wanted=[unused])
    tokens = pad_right([row[:-1] for row in after], 0, device)
    labels = pad_right([row[1:] for row in after], IGNORED_LABEL, device)
    starts = torch.tensor([len(prompt) for prompt in before], device=device)[rows]
    positions = starts[:, None] + torch.arange(tokens.shape[1], device=device)
    caches = [cache.take(rows) for cache in caches]
    losses = decoder.forward([AdapterRows(tokens, positions, caches, adapter)], labels=[labels])
    if losses is None:
        return [[] for _ in samples]
    found = iter((-losses.view_as(tokens).double().sum(dim=1)).tolist())
    return [[next(found) for _ in range(count)] for count in counts]
