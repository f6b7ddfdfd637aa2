"""Runs `Sample` operations of several adapters and clients in shared batches, at any layout.

The noise of a sequence is a hash of its seed, the number of the sample and the position. So the result of an operation
does not depend on the others, nor on how sequences are divided into batches and over data-parallel ranks. Saved
adapters never change, so those that were used last stay in memory. All ranks hold the same ones.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_identity import check_same_base
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Agree, Generated, Prompts, RowSettings, generate_rows, text_test
from megatron_tiedlora.evaluation.sampling import Sampling
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, gather_on_rank_0
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.service.operations import Failure, OperationResult, Sample, Sampled, SampleResult, Top
from megatron_tiedlora.training.build import BuiltModel, make_adapter

# The limits of a round of sequences on each data-parallel rank. A single sequence may exceed the first one.
CACHE_BYTES = 2**33
ROWS_AT_ONCE = 256  # logits of a step are (rows, V), and samples are computed in fp64

MOST_ADAPTERS = 32  # in memory, unless one command uses more
BASE = "base"  # the name of an adapter without layers; names of models have colons, and of folders slashes
_NONE = Failure("rank 0 has the result", by_user=False)

# By sequence: the new tokens, and the log-probabilities and most likely tokens of the prompt.
_Parts = dict[int, tuple[Sampled, tuple[float, ...], tuple[Top, ...]]]


class Sampler:
    """Runs samples beside the models of a service on one rank. All ranks call it with the same samples.

    Attributes:
        most_rows: the number of sequences that all ranks compute at once.
        cache_tokens: the number of tokens in the caches of these sequences.
    """

    def __init__(
        self,
        plan: RunPlan,
        built: BuiltModel,
        *,
        decode: Callable[[Sequence[int]], str],
        agree: Agree,
        cache_bytes: int,
    ) -> None:
        """Prepare to sample beside training. For the arguments see `sample_all`."""
        self._plan, self._identity, self._runner, grid = plan, built.base_identity, built.runner, plan.grid
        together, shape = plan.engine.zero_stage == 3, plan.source.shape
        decoder = Decoder(self._runner.stage, self._runner.groups, shape, calls_together=together)
        self._sample = partial(sample_all, decoder, grid=grid, decode=decode, agree=agree, cache_bytes=cache_bytes)
        empty = TiedAdapter(AdapterShard(plan.adapter, (), grid.tp_rank, grid.tp_size))
        self._runner.adapters[BASE] = empty.to(self._runner.device)
        self._held = dict[str, None]()  # folders, the longest unused first
        self.most_rows = ROWS_AT_ONCE * grid.dp_size
        self.cache_tokens = cache_bytes // decoder.bytes_per_token * grid.dp_size

    def __call__(self, samples: Sequence[Sample]) -> list[OperationResult]:
        """Return the results on rank 0, in the order of the samples."""
        failures = dict[str, Failure]()
        for folder in dict.fromkeys(sample.folder for sample in samples if sample.folder):
            try:
                self._hold(folder)
            except UserError as error:  # raised on every rank
                failures[folder] = Failure(str(error), by_user=False)
        for folder in list(self._held)[: max(0, len(self._held) - MOST_ADAPTERS)]:
            if all(sample.folder != folder for sample in samples):
                del self._held[folder], self._runner.adapters[folder]
        there = [sample for sample in samples if sample.folder not in failures]
        self._runner.engine.module.eval()
        results = iter(self._sample(there) if there else [])
        return [failures[one.folder] if one.folder in failures else next(results, _NONE) for one in samples]

    def _hold(self, folder: str) -> None:
        if folder not in self._held:
            found = decided_by_rank_0(lambda: load_native_adapter(Path(folder)), kind=NativeAdapter)
            check_same_base(found.base_identity, self._identity, source=folder, differs=False)
            self._runner.adapters[folder] = make_adapter(self._plan, found.config, found.state, self._runner.device)
        self._held[folder] = self._held.pop(folder, None)


def sample_all(
    decoder: Decoder,
    requests: Sequence[Sample],
    *,
    grid: Grid,
    decode: Callable[[Sequence[int]], str],
    agree: Agree = bool,
    cache_bytes: int = CACHE_BYTES,
) -> list[SampleResult]:
    """Return the result of each request on rank 0, and an empty list on other ranks.

    Args:
        requests: valid requests, the same on every rank. Adapters have the names of their folders, or `BASE`.
        decode: returns the text of tokens, in which stop texts are searched.
        agree: a function that gets whether this rank has finished a round, and returns whether all have. It may raise
            an error.
        cache_bytes: the maximum size of the caches of a rank.
    """
    places = [(index, number) for index, own in enumerate(requests) for number in range(own.num_samples)]
    # The longest come first, so that too little memory shows at once, and a round has sequences of similar length.
    places.sort(key=lambda place: -len(requests[place[0]].prompt) - requests[place[0]].max_tokens)
    asked = [requests[index] for index, _ in places]
    reads_all = decoder.calls_together and any(own.prompt_logprobs or own.num_prompt_top for own in requests)
    most = decoder.shape.vocab_size
    settings = [_settings(requests[index], number, decode, most, reads_all=reads_all) for index, number in places]
    found: _Parts = {}
    for some in _rounds(asked, cache_bytes // decoder.bytes_per_token, grid.dp_size):
        mine, by_adapter = some[grid.dp_rank :: grid.dp_size], dict[str, list[int]]()
        for sequence in mine or some[:1]:  # a rank without sequences computes the first one again and discards it
            by_adapter.setdefault(asked[sequence].folder or BASE, []).append(sequence)
        given = [
            Prompts([asked[one].prompt for one in own], [settings[one] for one in own], name)
            for name, own in by_adapter.items()
        ]
        num_steps = max(asked[sequence].max_tokens for sequence in some)
        generated = generate_rows(decoder, given, agree=agree, num_steps=num_steps)
        if mine:
            pairs = zip(by_adapter.values(), generated, strict=True)
            found |= {one: _sampled(row, asked[one]) for own, rows in pairs for one, row in zip(own, rows, strict=True)}
    gathered = gather_on_rank_0(found if grid.tp_rank == grid.pp_rank == 0 else {}, kind=_Parts)
    if gathered is None:
        return []
    by_place = {places[sequence]: own for part in gathered for sequence, own in part.items()}
    results = []
    for index, own in enumerate(requests):
        sequences = tuple(by_place[index, number][0] for number in range(own.num_samples))
        _, logprobs, top = by_place[index, 0]
        read = logprobs if own.prompt_logprobs else None
        results.append(SampleResult(sequences, read, top if own.num_prompt_top else None))
    return results


def _settings(
    request: Sample, number: int, decode: Callable[[Sequence[int]], str], most: int, *, reads_all: bool
) -> RowSettings:
    """Return the settings of a sample by its number. `most` is the size of the vocabulary. The numbers of a prompt are
    equal for all its samples. With `reads_all`, every prompt is read, since ZeRO-3 gathers weights where it is."""
    reads_prompt = reads_all or (number == 0 and (request.prompt_logprobs or request.num_prompt_top))
    return RowSettings(
        end_ids=frozenset(request.stop_tokens),
        max_new_tokens=request.max_tokens,
        is_end=text_test(decode, request.stop_texts),
        sampling=Sampling(request.temperature, request.top_p, request.seed, request.top_k),
        number=number,
        num_top=min(request.num_top, most),
        num_prompt_top=min(request.num_prompt_top, most) if reads_prompt else None,
        prompt_last=request.prompt_last,
    )


def _rounds(rows: Sequence[Sample], tokens: int, dp_size: int) -> Iterator[range]:
    """Yield consecutive indices of `rows`, in which a data-parallel rank's caches have at most `tokens` tokens."""
    start, longest, most = 0, 0, 0
    for index, row in enumerate(rows):
        longest, most = max(longest, len(row.prompt)), max(most, row.max_tokens)
        size = (index - start) // dp_size + 1
        if index > start and (size > ROWS_AT_ONCE or size * (longest + most) > tokens):
            yield range(start, index)
            start, longest, most = index, len(row.prompt), row.max_tokens
    if rows:
        yield range(start, len(rows))


def _sampled(row: Generated, request: Sample) -> tuple[Sampled, tuple[float, ...], tuple[Top, ...]]:
    new, prompt = ([own[0] for own in numbers] for numbers in (row.numbers, row.prompt))
    tops = tuple(_top(own, request.num_top) for own in row.numbers)
    sampled = Sampled((*row.tokens, *row.end), tuple(new), row.stopped, tops)
    return sampled, tuple(prompt), tuple(_top(own, request.num_prompt_top) for own in row.prompt)


def _top(numbers: Sequence[float], num_top: int) -> Top:
    """Return the most likely tokens from a row of `label_logprobs`, or () if the row is nan."""
    count = len(numbers) // 2
    num_top = 0 if math.isnan(numbers[0]) else min(num_top, count)
    return tuple((int(numbers[1 + place]), numbers[1 + count + place]) for place in range(num_top))
