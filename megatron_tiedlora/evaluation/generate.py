"""Generates tokens with a `Decoder`, for prompts of different lengths and in any parallel layout. Also computes the
log-likelihoods of several endings of a prompt. The prompt is computed only once.

A batch is divided into at most as many chunks as there are stages, so that stages work on different chunks at the same
time. The last stage sends the generated tokens to the other stages.

Prompts are padded on the right, and every sequence writes its next token at its own position. So no token attends to
padding. Prompts of similar length are computed together, so that little padding is computed. A prompt with several
samples is computed once, and its keys and values are copied.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.evaluation.decoder import AdapterRows, Decoder
from megatron_tiedlora.evaluation.sampling import GREEDY, RowSamplings, Sampling, choose
from megatron_tiedlora.model.attention import KeyValueCache
from megatron_tiedlora.parallel.loss import IGNORED_LABEL, label_logprobs

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

Endings = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The token ids of a prompt, and the token ids of each of its endings. They are never empty."""


@dataclass(frozen=True)
class RowSettings:
    """How one prompt is continued.

    Attributes:
        end_ids: the token ids that end the sequence.
        is_end: a function that gets the new tokens of the sequence, and returns whether the sequence has ended.
        number: the row number, on which samples depend.
        num_top: the number of most likely tokens that are wanted with each new token and its log-probability; None if
            not even the log-probability is wanted.
        num_prompt_top: the same for the tokens of the prompt.
        prompt_last: of the prompt, only this number of last tokens is meant; None for all.
    """

    end_ids: Collection[int]
    max_new_tokens: int
    is_end: Callable[[Sequence[int]], bool] = lambda _: False
    sampling: Sampling = GREEDY
    number: int = 0
    num_top: int | None = None
    num_prompt_top: int | None = None
    prompt_last: int | None = None

    def prompt_labels(self, prompt: Sequence[int]) -> list[int]:
        """Return the label of each token of the prompt, which is the next token, or -100 if it is not wanted."""
        num_wanted = len(prompt) - 1 if self.prompt_last is None else min(self.prompt_last, len(prompt) - 1)
        num_wanted = 0 if self.num_prompt_top is None else num_wanted
        first = len(prompt) - num_wanted
        return [IGNORED_LABEL] * (first - 1) + list(prompt[first:]) + [IGNORED_LABEL]


@dataclass(frozen=True)
class Prompts:
    """The prompts of one adapter, and how each of them is continued.

    Attributes:
        prompts: non-empty lists of token ids, the same on all tensor-parallel ranks and pipeline stages.
        adapter: the name of the adapter, or ONLY if the stage has at most one adapter.
    """

    prompts: Sequence[Sequence[int]]
    settings: Sequence[RowSettings]
    adapter: str = ONLY


@dataclass
class Generated:
    """The continuation of one prompt.

    Attributes:
        tokens: the new tokens, without the end token.
        end: the end token, or () if the sequence ended by `is_end` or has the maximum number of tokens.
        stopped: whether an end token or `is_end` ended the sequence.
        numbers: for each new token, and the end token, a row of `label_logprobs`, if it is wanted. It may have more
            tokens than are wanted.
        prompt: the same for each token of the prompt; nan for the first token and where it is not wanted.
    """

    tokens: list[int] = field(default_factory=list)
    end: tuple[int, ...] = ()
    stopped: bool = False
    numbers: list[list[float]] = field(default_factory=list)
    prompt: list[list[float]] = field(default_factory=list)


def generate(decoder: Decoder, given: Sequence[Prompts], *, agree: Agree = bool) -> list[list[list[int]]]:
    """Return the tokens of `generate_rows`: the new tokens of each prompt of each adapter, without the end token."""
    return [[row.tokens for row in rows] for rows in generate_rows(decoder, given, agree=agree)]


@torch.no_grad()
def generate_rows(
    decoder: Decoder, given: Sequence[Prompts], *, agree: Agree = bool, num_steps: int = 0
) -> list[list[Generated]]:
    """Continue each prompt with its most likely tokens, or samples, until `end_ids`, `is_end` or `max_new_tokens`.

    Each adapter's prompts have the same order, caches and attention calls as in a batch without other adapters. Only
    the base's matmuls run over the rows of all adapters. An adapter is skipped once all of its sequences have ended.

    Args:
        given: the prompts of each adapter. If the stage has no adapter group, there is one entry.
        num_steps: at least the largest `max_new_tokens`, which is its default. It must be the same on all ranks that
            `agree`.

    Returns:
        the new tokens of each prompt of each adapter, on every rank of the pipeline. A sequence does not depend on the
            settings of the others.

    Raises:
        Exception: an error of `agree`. At that time, no message is in flight between the stages.
    """
    num_stages = decoder.pipeline.size
    num_steps = max(num_steps, *(own.max_new_tokens for some in given for own in some.settings))
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
    for part in parts:
        part.take_prompts()
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


def text_test(
    decode: Callable[[Sequence[int]], str],
    stops: Sequence[str],
    contains: Callable[[str, str], bool] = lambda text, stop: stop in text,
) -> Callable[[Sequence[int]], bool]:
    """Return a function for `is_end`, which tests whether the text of new tokens contains one of the texts `stops`.

    Args:
        contains: whether a text, in which a stop occurs somewhere, contains it.
    """
    if not stops:
        return RowSettings.is_end
    # A token is at least one byte. With one token more, a decoder that strips the first space strips none of a stop.
    width = 1 + max(len(stop.encode()) for stop in stops)

    def ends(row: Sequence[int]) -> bool:
        # The whole text is decoded only if the last tokens contain a stop text.
        tail = decode(row[-width:])
        return any(stop in tail and contains(decode(row), stop) for stop in stops)

    return ends


class _Batch:
    """A batch of sequences of one adapter, with the longest sequences first."""

    def __init__(self, decoder: Decoder, given: Prompts, indices: Sequence[int], num_steps: int) -> None:
        """Make empty caches for some of the adapter's prompts, by index. At most `num_steps` tokens per sequence are
        computed, and at most the `max_new_tokens` of the sequence are used."""
        self.given = given
        self.order = sorted(indices, key=lambda index: -len(given.prompts[index]))
        self.prompts = [given.prompts[index] for index in self.order]
        self.lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=decoder.device)
        self.settings = [given.settings[index] for index in self.order]
        how, numbers = [own.sampling for own in self.settings], [own.number for own in self.settings]
        self.samplings = RowSamplings.of(how, numbers, decoder.device)
        # The rows whose prompts are computed, and the number of rows that have each of these prompts.
        self.firsts = [row for row in range(len(self.prompts)) if self._differs(row)]
        self.counts = [stop - row for row, stop in itertools.pairwise([*self.firsts, len(self.prompts)])]
        self.most = num_steps if decoder.calls_together else max(own.max_new_tokens for own in self.settings)
        self.num_top = _most(own.num_top for own in self.settings)
        self.num_prompt_top = _most(own.num_prompt_top for own in self.settings)
        self.caches = decoder.take_caches(len(indices), len(self.prompts[0]) + self.most)
        self.rows = [Generated() for _ in indices]
        self.prompt_numbers: list[torch.Tensor] = []  # on the last stage, for each of `firsts` (its tokens, n)
        self.tokens = torch.empty(0)  # the newest token of each sequence, (b, 1), once it exists
        self.ended, self.num_chosen = [False] * len(indices), 0

    @property
    def is_done(self) -> bool:
        """Return whether every sequence has ended, according to the tokens collected so far."""
        return all(self.ended) or self.num_chosen >= self.most

    def _differs(self, row: int) -> bool:
        """Return whether the prompt of a row is not that of the row before, as it is for several samples."""
        reports = self.settings[row].num_prompt_top is not None
        return row == 0 or reports or self.prompts[row] != self.prompts[row - 1]

    def runs(self, *, whole: bool) -> list[slice]:
        """Return slices of `firsts` that are computed together. With `whole`, return one slice of all."""
        lengths = [len(self.prompts[row]) for row in self.firsts]
        return [slice(0, len(lengths))] if whole else similar_lengths(lengths)

    def rows_of(self, some: slice) -> slice:
        """Return the rows that have the prompts of some `firsts`."""
        return slice(self.firsts[some.start], self.firsts[some.start] + sum(self.counts[some]))

    def num_tokens(self, some: slice) -> int:
        """Return the number of tokens of the prompts of some `firsts`, with padding."""
        return len(self.prompts[self.firsts[some.start]]) * (some.stop - some.start)

    def prompt_rows(self, some: slice, device: torch.device) -> AdapterRows:
        """Return the input for the prompts of some `firsts`. Its caches are views of this batch's caches, which
        `spread_prompts` copies to the rows of these prompts."""
        tokens = pad_right([self.prompts[row] for row in self.firsts[some]], 0, device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        caches = [KeyValueCache(cache.keys[some], cache.values[some]) for cache in self.caches]
        return AdapterRows(tokens, positions, caches, self.given.adapter)

    def spread_prompts(self) -> None:
        """Copy the keys and values of each computed prompt to all rows that have it."""
        longest, places = len(self.prompts[0]), torch.arange(len(self.firsts))
        of_row = places.repeat_interleave(torch.tensor(self.counts)).to(self.lengths.device)
        for cache in self.caches:
            cache.filled = longest
            if len(self.firsts) < len(self.prompts):
                for values in (cache.keys, cache.values):
                    values[:, :, :longest] = values[of_row, :, :longest]

    def newest_rows(self) -> AdapterRows:
        """Return the input for the newest token of each sequence."""
        positions = self.lengths[:, None] + (self.num_chosen - 1)
        return AdapterRows(self.tokens, positions, self.caches, self.given.adapter)

    def take(self, chosen: torch.Tensor) -> None:
        """Append the generated tokens, the first column of `chosen`, to the sequences that have not ended. The other
        columns are the rows of `label_logprobs`."""
        self.tokens = chosen[:, :1].long()
        tokens: list[int] = self.tokens[:, 0].tolist()
        numbers = [] if self.num_top is None else chosen[:, 1:].tolist()
        for index, (row, own, token) in enumerate(zip(self.rows, self.settings, tokens, strict=True)):
            if self.ended[index]:
                continue
            if own.num_top is not None:
                row.numbers.append(numbers[index])
            if token in own.end_ids:
                row.end, row.stopped = (token,), True
            else:
                row.tokens.append(token)
                row.stopped = own.is_end(row.tokens)
            self.ended[index] = row.stopped or len(row.tokens) == own.max_new_tokens

    def in_given_order(self) -> list[Generated]:
        """Return the continuation of each prompt, in the order of the prompts."""
        return [self.rows[place] for place in sorted(range(len(self.order)), key=self.order.__getitem__)]


def _most(counts: Iterable[int | None]) -> int | None:
    """Return the largest of the counts that are not None, or None."""
    return max((count for count in counts if count is not None), default=None)


class _Part:
    """Sequences of one or several adapters that go through the stages together."""

    def __init__(self, decoder: Decoder, batches: Sequence[_Batch]) -> None:
        self.decoder, self.batches = decoder, batches
        self.num_top = _most(batch.num_top for batch in batches)
        self.num_prompt_top = _most(batch.num_prompt_top for batch in batches)
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
        num_rows, width = sum(len(batch.rows) for batch in self.computed), 2 + 2 * (self.num_top or 0)
        # fp64 represents ids and fp32 numbers exactly.
        kind = ((num_rows, 1), torch.int64) if self.num_top is None else ((num_rows, width), torch.float64)
        self.waiting = self.decoder.share(chosen, *kind)
        if self.decoder.pipeline.size == 1:
            self.collect()

    def _choose(self, logits: torch.Tensor | None, call: Sequence[tuple[_Batch, slice]]) -> torch.Tensor | None:
        """Return the next tokens, (b, 1), and if wanted with the columns of `label_logprobs`, on the last stage."""
        if logits is None:
            return None
        chosen = choose(logits, [(batch.samplings.at(run), batch.num_chosen) for batch, run in call])
        if self.num_top is None:
            return chosen[:, None]
        return torch.cat((chosen[:, None].double(), label_logprobs(logits, chosen, self.num_top)), dim=1)

    def capture(self) -> None:
        """Capture the next step. If there is none, capture the last one, for later batches with these caches."""
        left, graphs = [batch for batch in self.computed if not batch.is_done] or self.computed, self.decoder.graphs
        if left and graphs is not None and graphs.lacks_some:
            self.decoder.capture([batch.newest_rows() for batch in left])

    def _read_prompts(self) -> torch.Tensor | None:
        """Fill the caches. Return what `_choose` does for every sequence on the last stage, otherwise None."""
        found: dict[_Batch, list[torch.Tensor]] = {batch: [] for batch in self.computed}
        whole = self.decoder.calls_together  # the number of calls must not depend on the prompts of a rank
        for turn in zip_longest(*(batch.runs(whole=whole) for batch in self.computed)):
            present = [(batch, run) for batch, run in zip(self.computed, turn, strict=True) if run is not None]
            sized = [((batch, run), batch.num_tokens(run), PROMPT_TOKENS_AT_ONCE) for batch, run in present]
            for call in [present] if whole else filled(sized):
                rows = [batch.prompt_rows(run, self.decoder.device) for batch, run in call]
                wanted = [batch.lengths[batch.firsts[run]] - 1 for batch, run in call]
                logits = self.decoder.forward(rows, wanted=wanted, **self._reported(call))
                if logits is not None:
                    counts = [count for batch, run in call for count in batch.counts[run]]
                    logits = logits.repeat_interleave(torch.tensor(counts, device=logits.device), dim=0)
                chosen = self._choose(logits, [(batch, batch.rows_of(run)) for batch, run in call])
                if chosen is not None:
                    parts = chosen.split([sum(batch.counts[run]) for batch, run in call])
                    for (batch, _), part in zip(call, parts, strict=True):
                        found[batch].append(part)
        for batch in self.computed:
            batch.spread_prompts()
        return torch.cat([part for parts in found.values() for part in parts]) if self.decoder.is_last else None

    def _reported(self, call: Sequence[tuple[_Batch, slice]]) -> dict[str, Any]:
        """Return the options of `Decoder.forward` with which batches keep the numbers of their prompts, if wanted."""
        if all(batch.num_prompt_top is None for batch, _ in call):
            return {}
        labels = list[torch.Tensor]()
        for batch, run in call:
            rows = [batch.settings[row].prompt_labels(batch.prompts[row]) for row in batch.firsts[run]]
            labels.append(pad_right(rows, IGNORED_LABEL, self.decoder.device))

        def report(found: torch.Tensor) -> None:
            parts = found.flatten(0, 1).split([part.numel() for part in labels])
            for (batch, run), part, own in zip(call, parts, labels, strict=True):
                of_rows = zip(part.view(*own.shape, -1), batch.firsts[run], strict=True)
                batch.prompt_numbers += [numbers[: len(batch.prompts[row])] for numbers, row in of_rows]

        return {"labels": labels, "num_top": self.num_prompt_top, "report": report}

    def take_prompts(self) -> None:
        """Receive the numbers of the prompts' tokens from the last stage, if some are wanted."""
        for batch in self.batches:
            if batch.num_prompt_top is None:
                continue
            lengths = [len(batch.prompts[row]) for row in batch.firsts]
            mine = torch.cat(batch.prompt_numbers) if self.decoder.is_last else None
            found = self.decoder.share(mine, (sum(lengths), 1 + 2 * (self.num_prompt_top or 0)), torch.float64)()
            for row, numbers in zip(batch.firsts, found.split(lengths), strict=True):
                if batch.settings[row].num_prompt_top is not None:
                    batch.rows[row].prompt = numbers.roll(1, dims=0).tolist()  # a label is the token after its position

    def collect(self) -> None:
        """Receive the generated tokens from the last stage, if some are expected."""
        if self.waiting is None:
            return
        chosen, self.waiting = self.waiting(), None
        for batch, part in zip(self.computed, chosen.split([len(b.rows) for b in self.computed]), strict=True):
            batch.take(part)


@torch.no_grad()
def ending_log_likelihoods(decoder: Decoder, samples: Sequence[Endings], *, adapter: str = ONLY) -> list[list[float]]:
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


def _groups(samples: Sequence[Endings], *, whole: bool) -> Iterator[Sequence[Endings]]:
    """Yield slices of samples with caches of limited size (a prompt copy per ending). With `whole`, yield one slice."""
    start, rows, longest = 0, 0, 0
    for index, (prompt, endings) in enumerate(samples):
        grown = max(longest, len(prompt) + max(map(len, endings)))
        if not whole and index > start and (rows + len(endings)) * grown > ENDING_TOKENS_AT_ONCE:
            yield samples[start:index]
            start, rows, grown = index, 0, len(prompt) + max(map(len, endings))
        rows, longest = rows + len(endings), grown
    yield samples[start:]


def _score(decoder: Decoder, samples: Sequence[Endings], adapter: str) -> list[list[float]]:
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
