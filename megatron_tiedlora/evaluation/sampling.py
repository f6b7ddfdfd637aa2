"""Chooses the next token of each sequence from its logits: the most likely token, or a sample at a temperature T.

A sample is the token with the smallest e / p. For a token's probability p in softmax(logits / T) and independent
exponential noise e, this token has the distribution p. The noise is a hash of the seed, the sequence's row, the
position in the answer and the token id. So there is no random state, and layouts, batches and other adapters do not
change the noise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tiedlora.adapters.low_rank import HOST_NUMBERS_AT_ONCE, mix_, token_keys
from megatron_tiedlora.parallel.rows import run_in_parts


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: T, which divides the logits; 0 for greedy decoding.
        top_p: samples are from the nucleus, the smallest set of most likely tokens with a total probability (at this
            temperature) of at least `top_p`. Of equally likely tokens, the ones with smaller ids come first.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        """Return a description for logs and signatures."""
        nucleus = f" and top_p {self.top_p}" if self.top_p < 1 else ""
        return f"sampled at temperature {self.temperature}{nucleus}, seed {self.seed}" if self.temperature else "greedy"

    def choose(self, logits: Tensor, places: Iterable[tuple[Tensor, int]]) -> Tensor:
        """Return the next token of each sequence, (b,) int64, the same on all ranks that have the same logits.

        Args:
            logits: (b, V), any float dtype. Samples are computed in fp64.
            places: for consecutive sequences, their rows (n,) int64, and the position in the answer of the next token.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        index = torch.cat([(rows << 32) + position for rows, position in places])
        keys = [token_keys(index, seed=self.seed, stream=f"sampling.{half}") for half in ("high", "low")]
        ids = torch.arange(logits.shape[1], device=logits.device)
        arguments, at_once = (logits, *keys, ids, mix_(ids.clone())), None if logits.is_cuda else HOST_NUMBERS_AT_ONCE
        found: Tensor = run_in_parts(self._sample, arguments, [True] * 3 + [False] * 2, at_once)
        return found

    def _sample(self, logits: Tensor, high: Tensor, low: Tensor, ids: Tensor, hashes: Tensor) -> Tensor:
        scores = logits.double()
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature  # a tiny temperature must not overflow
        likely, first = scores.softmax(-1), mix_(high[:, None] ^ hashes)
        bits = (mix_(first ^ low[:, None]) << 20).add_(first >> 12)  # 52 of them, and the logarithm is never of 0 or 1
        race = bits.double().add_(0.5).mul_(2.0**-52).log_().neg_().div_(likely)
        if self.top_p == 1:
            return race.argmin(-1)
        while True:
            chosen = race.argmin(-1, keepdim=True)
            own = likely.gather(-1, chosen)
            before = (likely > own) | ((likely == own) & (ids < chosen))
            outside = (likely * before).sum(-1, keepdim=True) >= self.top_p
            if not outside.any():
                return chosen[:, 0]
            race.masked_fill_(outside & ~before, torch.inf)  # the tokens after `chosen` are not in the nucleus either


GREEDY = Sampling()
