"""Log-likelihoods of several endings of one prompt, with the prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import pad_right, split_evenly
from megatron_tiedlora.parallel.loss import IGNORED_LABEL

Sample = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt's ids and those of its endings, none of them empty."""


@torch.no_grad()
def ending_log_likelihoods(decoder: Decoder, samples: Sequence[Sample]) -> list[list[float]]:
    """Summed log-likelihood of each ending after its prompt, in nats.

    The last token of a prompt predicts the first of an ending, so it is computed with the endings; all before it goes
    through the model once and is kept in the cache.

    Returns:
        by sample and ending on ranks of the last stage; elsewhere an empty list a sample.
    """
    scores: list[list[float]] = []
    for part in split_evenly(samples, decoder.num_parts):
        scores += _score(decoder, part)
    decoder.finish()
    return scores


def _score(decoder: Decoder, samples: Sequence[Sample]) -> list[list[float]]:
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
        # One position's logits, which nobody reads: the head has no answer without any.
        decoder.forward(prompts, positions, caches, wanted=torch.zeros(len(samples), dtype=torch.int64, device=device))
    tokens = pad_right([row[:-1] for row in after], 0, device)
    labels = pad_right([row[1:] for row in after], IGNORED_LABEL, device)
    starts = torch.tensor([len(prompt) for prompt in before], device=device)[rows]
    positions = starts[:, None] + torch.arange(tokens.shape[1], device=device)
    losses = decoder.forward(tokens, positions, [cache.take(rows) for cache in caches], labels=labels)
    if losses is None:
        return [[] for _ in samples]
    found = iter((-losses.double().sum(dim=1)).tolist())
    return [[next(found) for _ in range(count)] for count in counts]
