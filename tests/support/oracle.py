"""A dense, one-process oracle for LLaMA with Tied-LoRA, in plain PyTorch. It imports nothing from the package it
judges.

It is written to be read, not to be fast, and on purpose in another way than a fast implementation: q, k and v are three
separate projections, gate and up are two, attention is a loop over query heads with an explicit -inf mask, a target's
update of one layer is `(alpha / r) * v * (B @ (u * (A @ x)))` on plain leaf tensors, padding is never needed (every
sample may have its own length), and AdamW is written out by hand.

Owns: the forward pass and the merged weights. `oracle_adapter` has the adapter's tensors, `oracle_training` the loss,
the schedule and the optimizers. Left to others: checkpoints of the base, tokenisers, start values of an adapter.

Precision. The base runs in the dtype of `weights` (fp64, fp32 or bf16). Norms, softmax and the loss run in
max(fp32, that dtype): fp32 for a bf16 or fp32 base, fp64 for an fp64 base (transformers stays at fp32 there, a
difference of about 1e-8). Rotary frequencies and angles are computed in fp32, as in transformers and in the package,
and only their cosines and sines are cast to the dtype of the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear

from support.oracle_adapter import TARGET_PARTS, OracleAdapter, adapter_update

IGNORED_LABEL = -100
Drop = Callable[[Tensor, int, str], Tensor]  # of x (S, d), a 1-based layer and a target

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
    rotates: tuple[int, ...] | None  # 0 for a layer whose queries and keys are not rotated; None: all are
    interleaved: bool  # whether neighbours are rotated together, not the elements of the two halves
    windowed: tuple[bool, ...]  # the layers with a window, of so many tokens
    window: int
    window_rope: tuple[float, Mapping[str, Any] | None] | None  # theta and scaling of these, if they have their own
    norm_offset: float  # added to the weights of norms
    tanh_gate: bool  # GELU by its approximation with tanh, not SiLU
    score_factor: float
    score_cap: float | None
    embedding_factor: float
    block_factor: float  # of the outputs of attention and MLP
    logit_divisor: float
    logit_cap: float | None

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

    def target_rows(self, target: str) -> list[int]:
        """Output sizes of a target's parts."""
        return {
            "qkv": [self.q_rows, self.kv_rows, self.kv_rows],
            "o_proj": [self.hidden_size],
            "gate_up": [self.intermediate_size, self.intermediate_size],
            "down_proj": [self.hidden_size],
        }[target]

    def target_columns(self, target: str) -> int:
        """Input size of a target."""
        widths = {"qkv": self.hidden_size, "o_proj": self.q_rows, "gate_up": self.hidden_size}
        return widths.get(target, self.intermediate_size)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> OracleConfig:
        """Read an HF config that transformers has written, old (`rope_scaling`) or v5 style (`rope_parameters`).

        Of a multimodal model, its text tower is read. Biases, which norms there are, and whether the head is tied, are
        not read from it: what `weights` holds is used.
        """
        hf, multimodal = hf.get("text_config", hf), "text_config" in hf
        family = hf.get("model_type", "llama")
        gemma, granite = family.startswith("gemma"), family == "granite"
        activation = hf.get("hidden_act" if family == "gemma" else "hidden_activation", hf.get("hidden_act", "silu"))
        assert not hf.get("mlp_bias", False) and activation == ("gelu_pytorch_tanh" if gemma else "silu"), activation
        rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
        window_rope = None
        if "full_attention" in rope:
            window_rope, rope = _rope(rope["sliding_attention"], hf), rope["full_attention"]
        num_heads, num_layers, window = hf["num_attention_heads"], hf["num_hidden_layers"], hf.get("sliding_window")
        head_dim = hf.get("head_dim") or hf["hidden_size"] // num_heads
        kinds = hf.get("layer_types") or ["full_attention" if window is None else "sliding_attention"] * num_layers
        scores = hf["attention_multiplier"] if granite else hf.get("query_pre_attn_scalar", head_dim) ** -0.5
        theta, scaling = _rope(rope, hf)
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            norm_eps=hf.get("rms_norm_eps", hf.get("layer_norm_eps", 1e-6)),
            max_positions=hf["max_position_embeddings"],
            rope_theta=theta,
            rotary_share=float(rope.get("partial_rotary_factor", 1.0)),
            rope_scaling=scaling,
            rotates=hf.get("no_rope_layers"),
            interleaved=family in ("glm", "glm4"),
            windowed=tuple(kind == "sliding_attention" for kind in kinds),
            window=window or 0,
            window_rope=window_rope,
            norm_offset=1.0 if gemma else 0.0,
            tanh_gate=gemma,
            score_factor=scores,
            score_cap=hf["attn_logit_softcapping"] if family == "gemma2" else None,  # Gemma 3 does not use its field
            embedding_factor=hf["hidden_size"] ** 0.5 if gemma else hf.get("embedding_multiplier", 1.0),
            block_factor=hf.get("residual_multiplier", 1.0),
            logit_divisor=hf.get("logits_scaling", 1.0),
            logit_cap=None if multimodal else hf.get("final_logit_softcapping"),  # Gemma 3 with towers does not use it
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> OracleConfig:
        return cls.from_hf(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))


_AMPLITUDES = {"mscale": 1, "mscale_all_dim": 0}  # of YaRN: the amplitude is a ratio where the second is given


def _rope(rope: Mapping[str, Any], hf: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """The base of the frequencies, and the fields of their scaling."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    return theta, None if kind in ("default", "dynamic") else {**rope, "rope_type": kind}


def load_weights(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every safetensors file of an HF folder, by HF name, cast to `dtype` where given; see `text_weights`."""
    weights: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        # Copies: some versions of safetensors give views of the file, which tests write again.
        weights |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    assert weights, f"no safetensors in {folder}"
    weights = text_weights(weights, OracleConfig.from_folder(folder))
    return weights if dtype is None else cast_weights(weights, dtype)


def text_weights(weights: Mapping[str, Tensor], config: OracleConfig) -> dict[str, Tensor]:
    """The text tower's tensors by the names of a text model, without others; fused tensors taken apart."""
    found = dict(weights)
    if any("vision_tower." in name for name in weights):
        found = {}
        for name, tensor in weights.items():
            _, mark, rest = name.partition("language_model.")  # model.language_model., or language_model.model.
            if mark or name == "lm_head.weight":
                own = name if not mark else rest
                found[own if own.startswith(("model.", "lm_head.")) else f"model.{own}"] = tensor
    for name in [name for name in found if "qkv_proj" in name or "gate_up_proj" in name]:
        fused = found.pop(name)
        rows = [config.q_rows, config.kv_rows, config.kv_rows] if "qkv" in name else [config.intermediate_size] * 2
        for part, piece in zip("qkv" if "qkv" in name else ("gate", "up"), fused.split(rows), strict=True):
            found[name.replace("qkv_proj" if "qkv" in name else "gate_up_proj", f"{part}_proj")] = piece
    return found


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The adapter's update of the weights


def delta_weights(adapter: OracleAdapter, config: OracleConfig, layer: int) -> dict[str, Tensor] | None:
    """(alpha / r) diag(v) B diag(u) A of a 1-based layer, cut into the parts of each target: q (q_rows, d), k and v
    (kv_rows, d) of qkv, then o, gate, up, down; None where the layer is plain."""
    deltas: dict[str, Tensor] = {}
    for target in adapter.targets:
        factors = adapter.of_layer(layer, target)
        if factors is None:
            return None
        a, b, u, v = factors
        delta = (adapter.alpha / adapter.rank) * (torch.diag(v) @ b @ torch.diag(u) @ a)
        deltas |= zip(TARGET_PARTS[target], delta.split(config.target_rows(target)), strict=True)
    return deltas


def merged_weights(weights: Mapping[str, Tensor], config: OracleConfig, adapter: OracleAdapter) -> dict[str, Tensor]:
    """The base with W + delta in the linears of the targets: summed in max(fp32, dtypes), cast once to W's dtype."""
    merged = dict(weights)
    modules = {part: module for parts in TARGET_PARTS.values() for part, module in parts.items()}
    for layer in adapter.layers:
        for part, delta in (delta_weights(adapter, config, layer) or {}).items():
            key = f"model.layers.{layer - 1}.{modules[part]}.weight"
            wide = torch.promote_types(_wide(weights[key].dtype), delta.dtype)
            merged[key] = (weights[key].to(wide) + delta.to(wide)).to(weights[key].dtype)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# The rotary embedding, frequency by frequency


def rope_frequencies(theta: float, size: int, scaling: Mapping[str, Any] | None) -> Tensor:
    """(size / 2,) angles per position of the first `size` elements of a head.

    Args:
        scaling: None, or the fields of a config's `rope_parameters` with their defaults filled in.
    """
    exponents = torch.arange(0, size, 2).to(torch.float32) / size
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    kind = scaling["rope_type"]
    if kind == "linear":
        return torch.stack([frequency / scaling["factor"] for frequency in plain])
    if kind == "longrope":
        return 1.0 / (torch.tensor(scaling["short_factor"], dtype=torch.float32) * theta**exponents)
    blend: Callable[..., float | Tensor] = {"llama3": _llama3_share, "yarn": _yarn_share}[kind]
    stretched = []
    for index, frequency in enumerate(plain):
        share = blend(index, float(frequency), theta, size, scaling)
        stretched.append(share * frequency + (1 - share) * frequency / scaling["factor"])
    return torch.stack(stretched)


def _llama3_share(index: int, frequency: float, theta: float, size: int, scaling: Mapping[str, Any]) -> float:
    """1 for a fast frequency, 0 for a slow one, and linear in the number of turns in between."""
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return min(max((turns - low) / (high - low), 0.0), 1.0)


def _yarn_share(index: int, frequency: float, theta: float, size: int, scaling: Mapping[str, Any]) -> Tensor:
    """1 before the index that turns beta_fast times, 0 after the one that turns beta_slow times, linear in between."""

    def at(turns: float) -> float:
        return size / 2 * math.log(scaling["original_max_position_embeddings"] / (2 * math.pi * turns), theta)

    first = max(math.floor(at(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(at(scaling.get("beta_slow", 1))), size - 1)
    ramp = min(max((index - first) / max(last - first, 0.001), 0.0), 1.0)
    return 1 - torch.tensor(ramp)  # in fp32, as transformers has it


def rope_amplitude(scaling: Mapping[str, Any] | None, max_positions: int) -> float:
    """What cosines and sines are multiplied by."""
    if scaling is None or scaling["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor"):
        return float(scaling["attention_factor"])
    if scaling["rope_type"] == "yarn":
        by = [0.1 * scaling.get(name, own) * math.log(scaling["factor"]) + 1 for name, own in _AMPLITUDES.items()]
        return by[0] / by[1]
    original = scaling["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(max_positions / original) / math.log(original))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn pairs at the beginning of x (S, head_dim); cos and sin (S, n / 2) turn n elements.

    A pair is an element of the first half of these and one of the second, or if `interleaved` two neighbours.
    """
    size = cos.shape[-1]
    first, second, rest = x[:, :size], x[:, size : 2 * size], x[:, 2 * size :]
    if interleaved:
        first, second = x[:, 0 : 2 * size : 2], x[:, 1 : 2 * size : 2]
    turned = first * cos - second * sin, second * cos + first * sin
    pairs = torch.stack(turned, dim=-1).flatten(1) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([pairs, rest], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


def _wide(dtype: torch.dtype) -> torch.dtype:
    """max(fp32, dtype): where norms, softmax and the loss are computed."""
    return torch.promote_types(dtype, torch.float32)


def norm(x: Tensor, weights: Mapping[str, Tensor], prefix: str, eps: float, offset: float = 0.0) -> Tensor:
    """The norm at `prefix`: RMS, weight * x / sqrt(mean(x^2) + eps), or where a bias is stored LayerNorm.

    The quotient of the first is rounded to the dtype of x before the product, as in transformers; others once, at the
    end: the second, and the first with a weight to which `offset` is added.
    """
    weight, bias = weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias")
    wide = x.to(_wide(x.dtype))
    centred = wide if bias is None else wide - wide.mean(dim=-1, keepdim=True)
    quotient = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    if bias is not None:
        return (quotient * weight + bias).to(x.dtype)
    return ((offset + weight.to(wide.dtype)) * quotient).to(x.dtype) if offset else weight * quotient.to(x.dtype)


def _norm_heads(rows: Tensor, weights: Mapping[str, Tensor], prefix: str, config: OracleConfig) -> Tensor:
    """Each head through the norm at `prefix`, if one is stored there, or all together if its weight is as wide."""
    if f"{prefix}.weight" not in weights:
        return rows
    together = len(weights[f"{prefix}.weight"]) == rows.shape[-1]
    heads = [rows] if together else rows.split(config.head_dim, -1)
    return torch.cat([norm(head, weights, prefix, config.norm_eps, config.norm_offset) for head in heads], dim=-1)


# The norms before and behind attention, and before and behind the MLP, by the name of one that only some models have:
# GLM-4's, Gemma 2 and 3's, LLaMA's, and that of models with norms behind alone.
_NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "post_self_attn_layernorm":
        ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "pre_feedforward_layernorm":
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "input_layernorm": ("input_layernorm", None, "post_attention_layernorm", None),
    "post_feedforward_layernorm": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}  # fmt: skip


def _cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()


def _gate(x: Tensor, config: OracleConfig) -> Tensor:
    if not config.tanh_gate:
        return torch.nn.functional.silu(x)
    wide = x.to(_wide(x.dtype))
    return (0.5 * wide * (1 + (math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)).tanh())).to(x.dtype)


def _linears(
    x: Tensor,
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter | None,
    target: str,
    layer: int,
    drop: Drop | None,
) -> list[Tensor]:
    """The linears of a target in the 1-based `layer`, each a product of its own, with their rows of the update."""
    names = [f"model.layers.{layer - 1}.{module}" for module in TARGET_PARTS[target].values()]
    parts = [linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in names]
    if adapter is None or adapter.of_layer(layer, target) is None:
        return parts
    dropped = x if drop is None else drop(x, layer, target)
    update = adapter_update(dropped, adapter, layer, target)
    return [part + rows for part, rows in zip(parts, update.split(config.target_rows(target), dim=-1), strict=True)]


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, config: OracleConfig) -> Tensor:
    """q (S, q_rows), k and v (S, kv_rows), already rotated; visible (S, S) bool [query, key] -> (S, q_rows)."""
    mask = torch.zeros(visible.shape, dtype=_wide(q.dtype)).masked_fill(~visible, -math.inf)
    dim, heads = config.head_dim, []
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        q_head = q[:, head * dim : (head + 1) * dim]
        k_head = k[:, kv_head * dim : (kv_head + 1) * dim]
        v_head = v[:, kv_head * dim : (kv_head + 1) * dim]
        scores = _cap(q_head @ k_head.T * config.score_factor, config.score_cap).to(mask.dtype) + mask
        exponentials = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        heads.append((exponentials / exponentials.sum(dim=-1, keepdim=True)).to(q.dtype) @ v_head)
    return torch.cat(heads, dim=-1)


def _logits_of_sequence(
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter | None,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    drop: Drop | None,
) -> Tensor:
    """tokens and positions (S,), visible (S, S) -> (S, vocabulary)."""

    def linears(x: Tensor, target: str, layer: int) -> list[Tensor]:
        return _linears(x, weights, config, adapter, target, layer, drop)

    def normed(x: Tensor, name: str | None) -> Tensor:
        return x if name is None else norm(x, weights, name, config.norm_eps, config.norm_offset)

    x = embedding(tokens, weights["model.embed_tokens.weight"])
    if config.norm_offset:  # Gemma rounds its factor first
        x = x * torch.tensor(config.embedding_factor, dtype=torch.float64).to(x.dtype)
    else:
        x = x * config.embedding_factor
    size = int(config.head_dim * config.rotary_share)

    def table(theta: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
        angles = positions.to(torch.float32)[:, None] * rope_frequencies(theta, size, scaling)
        amplitude = rope_amplitude(scaling, config.max_positions)
        return (amplitude * angles.cos()).to(x.dtype), (amplitude * angles.sin()).to(x.dtype)

    tables = [table(config.rope_theta, config.rope_scaling)] * 2
    if config.window_rope is not None:
        tables[True] = table(*config.window_rope)
    ages = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))  # of the key, for the query
    for index in range(config.num_layers):
        layer, windowed = f"model.layers.{index}", config.windowed[index]
        names = next(names for mark, names in _NORMS.items() if f"{layer}.{mark}.weight" in weights)
        before, behind, before_mlp, behind_mlp = (name and f"{layer}.{name}" for name in names)
        q, k, v = linears(normed(x, before), "qkv", index + 1)
        q, k = (_norm_heads(x, weights, f"{layer}.self_attn.{n}_norm", config) for n, x in (("q", q), ("k", k)))
        if config.rotates is None or config.rotates[index]:
            cos, sin = tables[windowed]
            heads = (
                [rotate(head, cos, sin, config.interleaved) for head in rows.split(config.head_dim, dim=-1)]
                for rows in (q, k)
            )
            q, k = (torch.cat(some, dim=-1) for some in heads)
        seen = visible & (ages < config.window) if windowed else visible
        (output,) = linears(_attention(q, k, v, seen, config), "o_proj", index + 1)
        x = x + config.block_factor * normed(output, behind)
        gate, up = linears(normed(x, before_mlp), "gate_up", index + 1)
        (output,) = linears(_gate(gate, config) * up, "down_proj", index + 1)
        x = x + config.block_factor * normed(output, behind_mlp)
    head = weights["lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"]
    return _cap(linear(normed(x, "model.norm"), head) / config.logit_divisor, config.logit_cap)


def oracle_logits(
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    drops: Sequence[Drop] | None = None,
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
        drops: dropout of the adapter's inputs, one function for each sequence.
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
        drop = None if drops is None else drops[b]
        rows.append(_logits_of_sequence(weights, config, adapter, input_ids[b], visible, positions[b], drop))
    return torch.stack(rows)
