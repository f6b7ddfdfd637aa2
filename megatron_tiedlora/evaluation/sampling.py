"""Chooses the next token of each sequence from its logits: the most likely token, or a sample at a temperature T.

A sample is the argmax of logits / T + g. For independent Gumbel noise g, its distribution is softmax(logits / T). The
noise of a token is a hash of the seed, the sequence's row, the position in the answer and the token id. So there is no
random state, and layouts, batches and other adapters do not change it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tiedlora.adapters.low_rank import mix_, token_keys
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
        found: Tensor = run_in_parts(self._sample, (logits, *keys), [True] * 3)
        return found

    def _sample(self, logits: Tensor, high: Tensor, low: Tensor) -> Tensor:
        scores = logits.double()
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature  # a tiny temperature must not overflow
        if self.top_p < 1:
            scores.masked_fill_(~_nucleus(scores, self.top_p), -torch.inf)
        return scores.add_(_gumbel_noise(high, low, scores.shape[-1])).argmax(-1)


GREEDY = Sampling()


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Return whether each token, (b, V), is in the nucleus: whether the tokens before it have less than `top_p`."""
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    before = functional.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
    return torch.zeros_like(ids, dtype=torch.bool).scatter_(-1, ids, before < top_p)


def _gumbel_noise(high: Tensor, low: Tensor, vocab_size: int) -> Tensor:
    """Return Gumbel noise, (b, V) fp64, with 52 random bits, from two 32-bit keys of each sequence, (b,)."""
    first = mix_(high[:, None] ^ mix_(torch.arange(vocab_size, device=high.device)))
    uniform = (mix_(first ^ low[:, None]) << 20).add_(first >> 12).double().add_(0.5).mul_(2.0**-52)  # never 0 or 1
    return uniform.log_().neg_().log_().neg_()
