"""Implements the model and its adapter in plain PyTorch as a reference, one document at a time, in any dtype.

The package provides only the model's shape and the names of the weights. Norms, softmax and loss are computed in fp32
(in fp64 if the dtype is fp64), and rotary angles in fp32, as in transformers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.cpu_attention import Scores

Tensors = Mapping[str, Tensor]
Linear = Callable[[str, str, Tensor], Tensor]  # arguments: a weight's name, a target's prefix, the input


class Document(NamedTuple):
    """The tokens and labels of one document, each (s,) int64. A label is the next token, or -100 for no label."""

    tokens: Tensor
    labels: Tensor


def loss_and_gradients(
    shape: ModelShape,
    scale: float,
    weights: Tensors,
    factors: Tensors,
    trained: Sequence[str],
    documents: Sequence[Document],
) -> tuple[float, dict[str, Tensor]]:
    """Return the summed loss of all documents, and the gradients of the trained adapter tensors.

    Args:
        scale: alpha / r.
        weights: the base weights by name, in the dtype of the computation.
        factors: the tensors A, B, u and v of each target, tied or stacked over layers.
    """
    leaves = {name: tensor.detach().clone().requires_grad_(name in trained) for name, tensor in factors.items()}
    total, gradients = 0.0, {name: torch.zeros_like(leaves[name]) for name in trained}
    for document in documents:
        logits = document_logits(shape, scale, weights, leaves, document.tokens)
        loss = functional.cross_entropy(logits, document.labels, ignore_index=-100, reduction="sum")
        found = torch.autograd.grad(loss, [leaves[name] for name in trained])
        for name, gradient in zip(trained, found, strict=True):
            gradients[name] += gradient
        total += float(loss.detach())
    return total, gradients


def document_logits(shape: ModelShape, scale: float, weights: Tensors, factors: Tensors, tokens: Tensor) -> Tensor:
    """Return the logits of each token, (s, V), in fp32, or in fp64 if the weights are fp64."""
    hidden = weights["layers.0.weight"][tokens]
    dims = {"A": 2, "B": 2, "u": 1, "v": 1}  # of a tied factor; others are stacked over layers
    for layer in range(1, shape.num_layers + 1):
        own = {name.split(".", 2)[2]: tensor for name, tensor in weights.items() if name.startswith(f"layers.{layer}.")}
        of_layer = {name: f if f.ndim == dims[name[-1]] else f[layer - 1] for name, f in factors.items()}
        linear = partial(_linear, scale, own, of_layer)
        hidden = hidden + _attention(shape, linear, _norm(hidden, own["attention.qkv.norm"], shape.final_norm.eps))
        normed = _norm(hidden, own["mlp.gate_up.norm"], shape.final_norm.eps)
        gate, up = linear("mlp.gate_up", "gate_up.", normed).chunk(2, dim=-1)
        hidden = hidden + linear("mlp.down", "down_proj.", functional.silu(gate) * up)
    head = f"layers.{shape.num_layers + 1}"
    normed = _norm(hidden, weights[f"{head}.norm.weight"], shape.final_norm.eps)
    return _wide(normed @ weights[f"{head}.weight"].t())


def _linear(scale: float, weights: Tensors, factors: Tensors, name: str, target: str, hidden: Tensor) -> Tensor:
    """Return W x + scale diag(v) B diag(u) A x of one linear, or W x if `factors` has no tensors of `target`."""
    own = {factor: factors[f"{target}{factor}"].to(hidden.dtype) for factor in "ABuv" if f"{target}{factor}" in factors}
    if not own:
        return hidden @ weights[f"{name}.weight"].t()
    ax = hidden @ own["A"].t()
    ax = ax * own["u"] if "u" in own else ax
    update = ax @ own["B"].t()
    update = update * own["v"] if "v" in own else update
    return hidden @ weights[f"{name}.weight"].t() + scale * update


def _attention(shape: ModelShape, linear: Linear, normed: Tensor) -> Tensor:
    heads = shape.heads
    fused = linear("attention.qkv", "", normed)
    length, width = normed.shape[0], heads.dim
    rows = (heads.num * width, heads.num_kv * width, heads.num_kv * width)
    query, key, value = (part.view(length, -1, width).transpose(0, 1) for part in fused.split(rows, dim=-1))
    query, key = (_rotate(part, heads.rope.theta) for part in (query, key))
    output = plain_attention(query[None], key[None], value[None], torch.zeros(1, length, dtype=torch.int64))[0]
    return linear("attention.output", "o_proj.", output)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, how: Scores | None = None) -> Tensor:
    """Compute causal attention within each document in plain PyTorch, and return its output.

    Args:
        query, key, value: (b, heads or kv heads, s, head_dim).
        ids: the document id of each token, (b, s) int64.
        how: the scale, window and cap of the scores; by default only a scale of 1 / sqrt(head_dim).

    Returns:
        (b, s, heads * head_dim).
    """
    assert ids is not None
    how = how or Scores(query.shape[-1] ** -0.5)
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    positions = torch.arange(length)
    sees = (ids[:, :, None] == ids[:, None, :]) & (positions[:, None] >= positions)
    sees &= positions[:, None] - positions < (how.window or length)
    scores = _wide(query @ key.transpose(-1, -2)) * how.scale
    scores = scores if how.cap is None else (scores / how.cap).tanh() * how.cap
    probs = scores.masked_fill(~sees[:, None].to(scores.device), float("-inf")).softmax(-1).to(query.dtype)
    return (probs @ value).transpose(1, 2).flatten(2)


def _rotate(heads: Tensor, theta: float) -> Tensor:
    """Return a (heads, s, head_dim) tensor with rotary embeddings, which pair the two halves of each head."""
    half = heads.shape[-1] // 2
    exponents = torch.arange(half, device=heads.device, dtype=torch.float32) / half
    angles = torch.arange(heads.shape[1], device=heads.device, dtype=torch.float32)[:, None] / theta**exponents
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(hidden)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# Errors ---------------------------------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected||, or nan if `expected` is zero.

    The error is computed on the CPU, because the tested device may be broken.
    """
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def worst_of(errors: Mapping[str, float]) -> str:
    """Return the name of the largest error. NaN counts as larger than any number."""
    return max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
