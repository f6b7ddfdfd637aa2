"""Log-likelihoods of several endings of one prompt. The prompt is computed only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_tiedlora.evaluation.decoder import AdapterRows, Decoder
from megatron_tiedlora.evaluation.generate import pad_right, split_evenly
from megatron_tiedlora.parallel.loss import IGNORED_LABEL

# Maximum tokens in the caches at one time: prompts and endings, where each ending has a copy of its prompt.
ENDING_TOKENS_AT_ONCE = 32768

Sample = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The ids of a prompt and of each of its endings, none of them empty."""


@torch.no_grad()
def ending_log_likelihoods(decoder: Decoder, samples: Sequence[Sample], *, adapter: str = "") -> list[list[float]]:
    """Summed log-likelihood of each ending after its prompt, in nats.

    The last token of a prompt predicts the first token of an ending, so it is computed with the endings. The tokens
    before it go through the model once, and stay in the cache.

    Args:
        adapter: as in `AdapterRows`.

    Returns:
        values by sample and ending on ranks of the last stage; elsewhere one empty list per sample.
    """
    scores: list[list[float]] = []
    for part in split_evenly(samples, decoder.num_parts):
        for some in _groups(part, whole=decoder.calls_together):
            scores += _score(decoder, some, adapter)
    decoder.finish()
    return scores


def _groups(samples: Sequence[Sample], *, whole: bool) -> Iterator[Sequence[Sample]]:
    """Split samples into runs whose caches, with a copy per ending, have a bounded size; with `whole`, into one run."""
    start, rows, longest = 0, 0, 0
    for index, (prompt, endings) in enumerate(samples):
        grown = max(longest, len(prompt) + max(map(len, endings)))
        if not whole and index > start and (rows + len(endings)) * grown > ENDING_TOKENS_AT_ONCE:
            yield samples[start:index]
            start, rows, grown = index, 0, len(prompt) + max(map(len, endings))
        rows, longest = rows + len(endings), grown
    yield samples[start:]


def _score(decoder: Decoder, samples: Sequence[Sample], adapter: str) -> list[list[float]]:
    device = decoder.device
    counts = [len(endings) for _, endings in samples]
    rows = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)).to(device)
    before = [list(prompt[:-1]) for prompt, _ in samples]
    after = [[prompt[-1], *ending] for prompt, endings in samples for ending in endings]
    longest = max(map(len, before))
    caches = decoder.new_caches(len(samples), longest + max(map(len, after)) - 1)
    if longest:
        prompts = pad_right(before, 0, device)
        positions = torch.arange(longest, device=device).expand_as(prompts)
        # The head needs at least one position; these logits are not used.
        unused = torch.zeros(len(samples), dtype=torch.int64, device=device)
        decoder.forward([AdapterRows(prompts, positions, caches, adapter)], wanted=[unused])
    tokens = pad_right([row[:-1] for row in after], 0, device)
    labels = pad_right([row[1:] for row in after], IGNORED_LABEL, device)
    starts = torch.tensor([len(prompt) for prompt in before], device=device)[rows]
    positions = starts[:, None] + torch.arange(tokens.shape[1], device=device)
    taken = [cache.take(rows) for cache in caches]
    losses = decoder.forward([AdapterRows(tokens, positions, taken, adapter)], labels=[labels])
    if losses is None:
        return [[] for _ in samples]
    found = iter((-losses.view_as(tokens).double().sum(dim=1)).tolist())
    return [[next(found) for _ in range(count)] for count in counts]
