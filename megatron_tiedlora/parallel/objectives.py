"""Losses of single tokens: functions of a token's log-probability lp and of numbers that are given for the token.

With q, the log-probability at which the token was sampled, its advantage A, its weight w, and r = exp(lp - q):

    cross_entropy         -w lp
    importance_sampling   -r A
    ppo                   -min(r A, clip(r) A)               arXiv 1707.06347, equation 7
    cispo                 -stop_gradient(clip(r)) lp A       arXiv 2506.13585, equation 4
    dro                   -(lp A - beta / 2 (lp - q)^2)      arXiv 2405.19107, section 3

They are functions of lp, so they are computed where lp is computed, and the frozen base keeps its single backward pass.
The loss of an adapter is a sum over its tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Numbers = Mapping[str, float]


class _Kind(NamedTuple):
    """A loss: the names of the numbers of a token, its settings and their defaults, and its function.

    The function takes log-probabilities (n,), the numbers of the tokens (2, n), and the settings.
    """

    inputs: tuple[str, ...]
    settings: Numbers
    function: Callable[[Tensor, Tensor, Numbers], Tensor]


def _ratio(logprobs: Tensor, inputs: Tensor) -> Tensor:
    return (logprobs - inputs[0]).exp()


def _clipped(ratio: Tensor, settings: Numbers) -> Tensor:
    return ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])


def _ppo(logprobs: Tensor, inputs: Tensor, settings: Numbers) -> Tensor:
    ratio = _ratio(logprobs, inputs)
    return -torch.minimum(ratio * inputs[1], _clipped(ratio, settings) * inputs[1])


def _cispo(logprobs: Tensor, inputs: Tensor, settings: Numbers) -> Tensor:
    return -_clipped(_ratio(logprobs, inputs), settings).detach() * logprobs * inputs[1]


def _dro(logprobs: Tensor, inputs: Tensor, settings: Numbers) -> Tensor:
    return 0.5 * settings["beta"] * (logprobs - inputs[0]).square() - logprobs * inputs[1]


_SAMPLED = ("logprobs", "advantages")
KINDS: Mapping[str, _Kind] = {
    "cross_entropy": _Kind(("weights",), {}, lambda logprobs, inputs, _: -inputs[0] * logprobs),
    "importance_sampling": _Kind(_SAMPLED, {}, lambda logprobs, inputs, _: -_ratio(logprobs, inputs) * inputs[1]),
    "ppo": _Kind(_SAMPLED, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, _ppo),
    "cispo": _Kind(_SAMPLED, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, _cispo),
    "dro": _Kind(_SAMPLED, {"beta": 0.05}, _dro),
}


@dataclass(frozen=True)
class Objective:
    """The loss of an adapter's tokens.

    Attributes:
        name: a key of `KINDS`.
        settings: settings that differ from the defaults of the kind.
    """

    name: str
    settings: Numbers = field(default_factory=dict)

    def losses(self, logprobs: Tensor, inputs: Tensor) -> Tensor:
        """Return the losses of tokens, (n,), from their log-probabilities (n,).

        Args:
            inputs: (2, n), the numbers of the tokens in the order of the kind's `inputs`.
        """
        kind = KINDS[self.name]
        return kind.function(logprobs, inputs, {**kind.settings, **self.settings})
