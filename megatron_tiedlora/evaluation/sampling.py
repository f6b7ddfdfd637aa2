"""Chooses the next token of each sequence from its logits: the most likely token, or a sample at a temperature T.

A sample is the token with the smallest e / p. For a token's probability p in softmax(logits / T) and independent
exponential noise e, this token has the distribution p. The noise is a hash of the seed, the sequence's row, the
position in the answer and the token id. So there is no random state, and layouts, batches and other adapters do not
change the noise. The sequences of a batch may have different settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.adapters.low_rank import HOST_NUMBERS_AT_ONCE, mix_, salted_keys
from megatron_tiedlora.parallel.rows import run_in_parts
from megatron_tiedlora.parallel.shard_spec import stream_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: T, which divides the logits; 0 for greedy decoding.
        top_p: samples are from the nucleus, the smallest set of most likely tokens with a total probability (at this
            temperature) of at least `top_p`. Of equally likely tokens, the ones with smaller ids come first.
        top_k: the number of most likely tokens that samples are from; 0 for all. Their probabilities are divided by
            their sum before the nucleus is found.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0

    def __str__(self) -> str:
        """Return a description for logs and signatures."""
        limits = f" and top_k {self.top_k}" if self.top_k else ""
        limits += f" and top_p {self.top_p}" if self.top_p < 1 else ""
        return f"sampled at temperature {self.temperature}{limits}, seed {self.seed}" if self.temperature else "greedy"


GREEDY = Sampling()


class RowSamplings(NamedTuple):
    """The settings of n sequences as tensors.

    Attributes:
        kinds: the different settings that occur, with the seed 0. Of some rows it may have the settings of more.
        numbers: the row number of each sequence, (n,) int64.
        salts: two hashes of each seed, (n, 2) int64.
        temperature, top_p: (n, 1) fp64, where a top_p of 1 is infinite.
        top_k: (n, 1) int64.
    """

    kinds: frozenset[Sampling]
    numbers: Tensor
    salts: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor

    @staticmethod
    def of(how: Sequence[Sampling], numbers: Sequence[int], device: torch.device | None = None) -> "RowSamplings":
        """Return the settings `how` and the row numbers of consecutive sequences as tensors."""
        salts = {one.seed: [stream_seed(one.seed, f"sampling.{half}") for half in ("high", "low")] for one in how}
        reals = [(one.temperature, one.top_p if one.top_p < 1 else torch.inf) for one in how]
        temperature, top_p = torch.tensor(reals, dtype=torch.float64, device=device).split(1, dim=1)
        return RowSamplings(
            frozenset(replace(one, seed=0) for one in how),
            torch.tensor(numbers, dtype=torch.int64, device=device),
            torch.tensor([salts[one.seed] for one in how], device=device),
            temperature,
            top_p,
            torch.tensor([[one.top_k] for one in how], device=device),
        )

    def at(self, rows: slice) -> "RowSamplings":
        """Return the settings of some of the sequences."""
        return RowSamplings(self.kinds, *(tensor[rows] for tensor in self[1:]))


def choose(logits: Tensor, places: Sequence[tuple[RowSamplings, int]]) -> Tensor:
    """Return the next token of each sequence, (b,) int64, the same on all ranks that have the same logits.

    The token of a sequence does not depend on the other sequences.

    Args:
        logits: (b, V), any float dtype. Samples are computed in fp64.
        places: for consecutive sequences, their settings, and the position in the answer of the next token.
    """
    kinds = frozenset[Sampling]().union(*(rows.kinds for rows, _ in places))
    if all(kind.temperature == 0 for kind in kinds):
        return logits.argmax(-1)
    index = torch.cat([(rows.numbers << 32) + position for rows, position in places])
    _, salts, *settings = (torch.cat(parts) for parts in zip(*(rows[1:] for rows, _ in places), strict=True))
    keys = [salted_keys(index, salt) for salt in salts.unbind(1)]
    ids = torch.arange(logits.shape[1], device=logits.device)
    arguments, at_once = (logits, *keys, *settings, ids, mix_(ids.clone())), HOST_NUMBERS_AT_ONCE
    has_rows = [True] * 6 + [False] * 2
    sample = partial(_sample, most_k=max(kind.top_k for kind in kinds), nucleus=any(kind.top_p < 1 for kind in kinds))
    found: Tensor = run_in_parts(sample, arguments, has_rows, None if logits.is_cuda else at_once)
    if any(kind.temperature == 0 for kind in kinds):
        found = torch.where(settings[0][:, 0] == 0, logits.argmax(-1), found)
    return found


def _sample(
    logits: Tensor,
    high: Tensor,
    low: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    ids: Tensor,
    hashes: Tensor,
    *,
    most_k: int,
    nucleus: bool,
) -> Tensor:
    """Return samples, (b,) int64. `most_k` is the largest top_k, and `nucleus` is whether a top_p is below 1."""
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature.masked_fill(temperature == 0, 1.0)
    likely, mass = scores.softmax(-1), scores.new_ones(())
    if most_k:
        best = scores.topk(min(most_k, len(ids))).values
        least = best.gather(-1, (top_k - 1).clamp(0, best.shape[1] - 1))
        above, ties = scores > least, scores == least
        room = top_k - above.sum(-1, keepdim=True)
        likely = likely * (above | (ties & (ties.cumsum(-1) <= room)) | (top_k == 0))
        mass = likely.sum(-1, keepdim=True).masked_fill(top_k == 0, 1.0)
    first = mix_(high[:, None] ^ hashes)
    bits = (mix_(first ^ low[:, None]) << 20).add_(first >> 12)  # 52 of them, and the logarithm is never of 0 or 1
    race = bits.double().add_(0.5).mul_(2.0**-52).log_().neg_().div_(likely)
    if not nucleus:
        return race.argmin(-1)
    while True:
        chosen = race.argmin(-1, keepdim=True)
        own = likely.gather(-1, chosen)
        before = (likely > own) | ((likely == own) & (ids < chosen))
        outside = (likely * before).sum(-1, keepdim=True) >= top_p * mass
        if not outside.any():
            return chosen[:, 0]
        race.masked_fill_(outside & ~before, torch.inf)  # the tokens after `chosen` are not in the nucleus either
