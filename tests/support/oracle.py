"""A dense, one-process oracle for LLaMA with Tied-LoRA, in plain PyTorch. It imports nothing from the package it
judges.

It is written to be read, not to be fast, and on purpose in another way than a fast implementation: q, k and v are three
separate projections, attention is a loop over query heads with an explicit -inf mask, the update of one layer is
`(alpha / r) * v * (B @ (u * (A @ x)))` on plain leaf tensors, padding is never needed (every sample may have its own
length), and AdamW is written out by hand.

Owns: the forward pass, the table of what each method trains, the parameter counts. `oracle_training` has the loss, the
schedule and the optimizers. Left to others: checkpoints of the base, tokenisers, start values of an adapter.

Precision. The base runs in the dtype of `weights` (fp64, fp32 or bf16). Norms, softmax and the loss run in
max(fp32, that dtype): fp32 for a bf16 or fp32 base, fp64 for an fp64 base (transformers stays at fp32 there, a
difference of about 1e-8). Rotary frequencies and angles are computed in `rope_dtype`, fp32 by default as in
transformers and in the package, and only their cosines and sines are cast to the dtype of the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from oracle_rope import rope_amplitude, rope_frequencies, rotate
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear

IGNORED_LABEL = -100

# The reference's table, by hand: which of the four tensors learn. "lora" alone has one A and one B per layer.
TRAINED_TENSORS: dict[str, tuple[str, ...]] = {
    "lora": ("A", "B"),
    "vera": ("u", "v"),
    "tl1": ("A",),
    "tl2": ("A", "u", "v"),
    "tl3": ("B",),
    "tl4": ("B", "u"),
    "tl5": ("A", "B"),
    "tl6": ("A", "B", "u", "v"),
}


def oracle_trainable_count(method: str, *, rank: int, hidden_size: int, qkv_rows: int, num_layers: int) -> int:
    """The "general" column of the reference's table; `num_layers` counts the adapted layers."""
    r, d, o, n = rank, hidden_size, qkv_rows, num_layers
    return {
        "lora": n * r * (d + o),
        "vera": n * (r + o),
        "tl1": d * r,
        "tl2": d * r + n * (r + o),
        "tl3": o * r,
        "tl4": n * r + o * r,
        "tl5": r * (d + o),
        "tl6": r * (d + o) + n * (r + o),
    }[method]


# ---------------------------------------------------------------------------------------------------------------------
# The base model's shape


@dataclass(frozen=True)
class OracleConfig:
    """What the forward pass needs of a `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope_theta: float
    rotary_share: float  # of a head, its first elements
    rope_scaling: Mapping[str, Any] | None  # the fields of its kind
    tied_embeddings: bool
    rotates: tuple[int, ...] | None  # 0 for a layer whose queries and keys are not rotated; None: all are

    @property
    def q_rows(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """o: rows of B and v, in the order [Q rows | K rows | V rows]."""
        return self.q_rows + 2 * self.kv_rows

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> OracleConfig:
        """Read an HF config that transformers has written, old (`rope_scaling`) or v5 style (`rope_parameters`).

        Biases and norms of heads are not read from it: they are used where `weights` holds them.
        """
        assert not hf.get("mlp_bias", False) and hf.get("hidden_act", "silu") == "silu"
        rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        num_heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
            norm_eps=hf.get("rms_norm_eps", hf.get("layer_norm_eps", 1e-6)),
            max_positions=hf["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
            rotary_share=float(rope.get("partial_rotary_factor", 1.0)),
            rope_scaling=None if rope_type in ("default", "dynamic") else {**rope, "rope_type": rope_type},
            tied_embeddings=hf.get("tie_word_embeddings", False),
            rotates=hf.get("no_rope_layers"),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> OracleConfig:
        return cls.from_hf(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))


def load_weights(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every safetensors file of an HF folder, by HF name, cast to `dtype` where given; fused tensors taken apart."""
    weights: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights |= load_file(path)
    assert weights, f"no safetensors in {folder}"
    for name in [name for name in weights if "qkv_proj" in name or "gate_up_proj" in name]:
        config, fused = OracleConfig.from_folder(folder), weights.pop(name)
        rows = [config.q_rows, config.kv_rows, config.kv_rows] if "qkv" in name else [config.intermediate_size] * 2
        for part, piece in zip("qkv" if "qkv" in name else ("gate", "up"), fused.split(rows), strict=True):
            weights[name.replace("qkv_proj" if "qkv" in name else "gate_up_proj", f"{part}_proj")] = piece
    return weights if dtype is None else cast_weights(weights, dtype)


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The adapter


@dataclass(frozen=True)
class OracleAdapter:
    """The four tensors as in the native format; n = len(layers), r = rank, d = hidden size, o = q + k + v rows.

    A: (r, d), or (n, r, d) for lora. B: (o, r), or (n, o, r) for lora. u: (n, r). v: (n, o).
    `layers` are 1-based, in the order of the first axis of u and v.
    """

    method: str
    rank: int
    alpha: float
    layers: tuple[int, ...]
    A: Tensor
    B: Tensor
    u: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        r, n, (d, o) = self.rank, len(self.layers), (self.A.shape[-1], self.B.shape[-2])
        lead = (n,) if self.method == "lora" else ()
        assert self.method in TRAINED_TENSORS, self.method
        assert len(set(self.layers)) == n and min(self.layers) >= 1, self.layers
        wanted = {"A": (*lead, r, d), "B": (*lead, o, r), "u": (n, r), "v": (n, o)}
        for name, shape in wanted.items():
            assert tuple(self.tensors[name].shape) == shape, (name, tuple(self.tensors[name].shape), shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "u": self.u, "v": self.v}

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors that learn."""
        return TRAINED_TENSORS[self.method]

    def with_tensors(self, **tensors: Tensor) -> OracleAdapter:
        new = self.tensors | tensors
        return replace(self, A=new["A"], B=new["B"], u=new["u"], v=new["v"])

    def cast(self, dtype: torch.dtype) -> OracleAdapter:
        return self.with_tensors(**{name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def leaves(self) -> OracleAdapter:
        """A copy whose tensors are fresh leaves; the trained ones require a gradient."""
        return self.with_tensors(
            **{
                name: tensor.detach().clone().requires_grad_(name in self.trained)
                for name, tensor in self.tensors.items()
            }
        )

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """A (r, d), B (o, r), u (r,), v (o,) of the 1-based `layer`, or None where the layer is plain."""
        if layer not in self.layers:
            return None
        i = self.layers.index(layer)
        if self.method == "lora":
            return self.A[i], self.B[i], self.u[i], self.v[i]
        return self.A, self.B, self.u[i], self.v[i]

    @classmethod
    def from_folder(cls, folder: str | Path) -> OracleAdapter:
        """Read a native adapter folder (`adapter_config.json` and `adapter_model.safetensors`)."""
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        names = {name: tensors[name] for name in ("A", "B", "u", "v")}
        return cls(config["method"], config["rank"], float(config["alpha"]), tuple(config["layers"]), **names)


def delta_weights(adapter: OracleAdapter, config: OracleConfig, layer: int) -> dict[str, Tensor] | None:
    """(alpha / r) diag(v) B diag(u) A of a 1-based layer, cut into q (q_rows, d), k and v (kv_rows, d)."""
    parts = adapter.of_layer(layer)
    if parts is None:
        return None
    a, b, u, v = parts
    delta = (adapter.alpha / adapter.rank) * (torch.diag(v) @ b @ torch.diag(u) @ a)
    q, k = config.q_rows, config.q_rows + config.kv_rows
    return {"q": delta[:q], "k": delta[q:k], "v": delta[k:]}


def merged_weights(weights: Mapping[str, Tensor], config: OracleConfig, adapter: OracleAdapter) -> dict[str, Tensor]:
    """The base with W + delta in q_proj, k_proj and v_proj: summed in max(fp32, dtypes), cast once to W's dtype."""
    merged = dict(weights)
    for layer in adapter.layers:
        for name, delta in (delta_weights(adapter, config, layer) or {}).items():
            key = f"model.layers.{layer - 1}.self_attn.{name}_proj.weight"
            wide = torch.promote_types(_wide(weights[key].dtype), delta.dtype)
            merged[key] = (weights[key].to(wide) + delta.to(wide)).to(weights[key].dtype)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


def _wide(dtype: torch.dtype) -> torch.dtype:
    """max(fp32, dtype): where norms, softmax and the loss are computed."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps); the quotient is rounded to x's dtype before the product, as transformers."""
    wide = x.to(_wide(x.dtype))
    return weight * (wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def norm(x: Tensor, weights: Mapping[str, Tensor], prefix: str, eps: float) -> Tensor:
    """The norm at `prefix`: RMS, or where a bias is stored LayerNorm, which is rounded once as torch's is."""
    weight, bias = weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias")
    if bias is None:
        return rms_norm(x, weight, eps)
    wide = x.to(_wide(x.dtype))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    return (centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias).to(x.dtype)


def _norm_heads(rows: Tensor, weights: Mapping[str, Tensor], prefix: str, config: OracleConfig) -> Tensor:
    """Each head through the norm at `prefix`, if one is stored there."""
    if f"{prefix}.weight" not in weights:
        return rows
    return torch.cat([norm(head, weights, prefix, config.norm_eps) for head in rows.split(config.head_dim, -1)], dim=-1)


def _project(x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    return linear(x, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))


def adapter_update(x: Tensor, adapter: OracleAdapter, layer: int, update_dtype: torch.dtype | None = None) -> Tensor:
    """(alpha / r) * v * (B (u * (A x))): x (S, d) -> (S, o), computed in `update_dtype`, or in x's where None."""
    parts = adapter.of_layer(layer)
    assert parts is not None
    a, b, u, v = (tensor.to(update_dtype or x.dtype) for tensor in parts)
    columns = x.to(a.dtype).T  # (d, S), so that this reads as the equation does
    update = v[:, None] * (b @ (u[:, None] * (a @ columns)))
    return (update.T * (adapter.alpha / adapter.rank)).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, config: OracleConfig) -> Tensor:
    """q (S, q_rows), k and v (S, kv_rows), already rotated; visible (S, S) bool [query, key] -> (S, q_rows)."""
    mask = torch.zeros(visible.shape, dtype=_wide(q.dtype)).masked_fill(~visible, -math.inf)
    dim, heads = config.head_dim, []
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        q_head = q[:, head * dim : (head + 1) * dim]
        k_head = k[:, kv_head * dim : (kv_head + 1) * dim]
        v_head = v[:, kv_head * dim : (kv_head + 1) * dim]
        scores = (q_head @ k_head.T * dim**-0.5).to(mask.dtype) + mask
        exponentials = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        heads.append((exponentials / exponentials.sum(dim=-1, keepdim=True)).to(q.dtype) @ v_head)
    return torch.cat(heads, dim=-1)


def _rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    return torch.cat([rotate(head, cos, sin) for head in x.split(head_dim, dim=-1)], dim=-1)


def _logits_of_sequence(
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter | None,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    rope_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
) -> Tensor:
    """tokens and positions (S,), visible (S, S) -> (S, vocabulary)."""
    x = embedding(tokens, weights["model.embed_tokens.weight"])
    size = int(config.head_dim * config.rotary_share)
    frequencies = rope_frequencies(config.rope_theta, size, config.rope_scaling, rope_dtype)
    angles = positions.to(rope_dtype)[:, None] * frequencies
    amplitude = rope_amplitude(config.rope_scaling, config.max_positions)
    cos, sin = (amplitude * angles.cos()).to(x.dtype), (amplitude * angles.sin()).to(x.dtype)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        normed = norm(x, weights, f"{layer}.input_layernorm", config.norm_eps)
        q, k, v = (_project(normed, weights, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        if adapter is not None and index + 1 in adapter.layers:
            update = adapter_update(normed, adapter, index + 1, update_dtype)
            dq, dk, dv = update.split([config.q_rows, config.kv_rows, config.kv_rows], dim=-1)
            q, k, v = q + dq, k + dk, v + dv
        q, k = (_norm_heads(x, weights, f"{layer}.self_attn.{n}_norm", config) for n, x in (("q", q), ("k", k)))
        if config.rotates is None or config.rotates[index]:
            q, k = (_rotate_heads(rows, cos, sin, config.head_dim) for rows in (q, k))
        x = x + _project(_attention(q, k, v, visible, config), weights, f"{layer}.self_attn.o_proj")
        normed = norm(x, weights, f"{layer}.post_attention_layernorm", config.norm_eps)
        gate = _project(normed, weights, f"{layer}.mlp.gate_proj")
        up = _project(normed, weights, f"{layer}.mlp.up_proj")
        x = x + _project(torch.nn.functional.silu(gate) * up, weights, f"{layer}.mlp.down_proj")
    x = norm(x, weights, "model.norm", config.norm_eps)
    return linear(x, weights["model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"])


def oracle_logits(
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    rope_dtype: torch.dtype = torch.float32,
    update_dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits (B, S, vocabulary) in the dtype of `weights` (HF names), each sequence on its own.

    Args:
        adapter: None gives the base model.
        input_ids: (B, S).
        attention_mask: (B, S), 1 for a token that may be looked at, 0 for padding. A padding token sees itself and no
            other padding, so that no row of the softmax is empty; its logits mean nothing.
        positions: (B, S) for the rotary embedding; 0, 1, 2, ... by default, also under left padding (transformers does
            the same; only differences of positions matter).
        documents: (B, S) ids of packed documents; a token sees only its own. Positions do not restart by themselves.
        update_dtype: where the adapter's product is computed, by default the dtype of `weights`.
    """
    batch, length = input_ids.shape
    every = torch.ones(batch, length, dtype=torch.bool)
    real = every if attention_mask is None else attention_mask.bool()
    positions = torch.arange(length).expand(batch, -1) if positions is None else positions
    rows = []
    for b in range(batch):
        visible = torch.ones(length, length).tril().bool() & real[b][None, :]
        if documents is not None:
            visible &= documents[b][:, None] == documents[b][None, :]
        visible |= torch.eye(length).bool()
        rows.append(
            _logits_of_sequence(weights, config, adapter, input_ids[b], visible, positions[b], rope_dtype, update_dtype)
        )
    return torch.stack(rows)
