"""The oracle's adapter: its targets, its tensors by their names in the native format, its update of x, and dropout.

It imports nothing from the package it judges.

Owns: the tables of targets and of what each method trains, the parameter counts, one target's update of x. Left to
others: where the update is added (`oracle`), start values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

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
# What a target is made of, within a layer and in the order of its rows: the linears that read the same x.
TARGET_PARTS: dict[str, dict[str, str]] = {
    "qkv": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "o_proj": {"o": "self_attn.o_proj"},
    "gate_up": {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    "down_proj": {"down": "mlp.down_proj"},
}
ALL_TARGETS = tuple(TARGET_PARTS)
Groups = tuple[tuple[int, ...], ...]  # of layers, 1-based


def tensor_name(target: str, factor: str) -> str:
    """The name in the native format of "A", "B", "u" or "v" of a target."""
    return factor if target == "qkv" else f"{target}.{factor}"


@dataclass(frozen=True)
class OracleAdapter:
    """The tensors as in the native format, four for each target: "A", "B", "u" and "v" are qkv's, "o_proj.A" o_proj's.

    With n = len(layers), r = rank and a target's input size d and output size o:
    A: (r, d), or (n, r, d) for lora. B: (o, r), or (n, o, r) for lora. u: (n, r). v: (n, o).
    `layers` are 1-based, in the order of the first axis of u and v.

    `groups` says by the letter of a factor which of the layers share one, if that is not as above: the g-th group uses
    the g-th entry along the first axis, of (len(groups), ...). A factor of one group has no such axis.
    """

    method: str
    rank: int
    alpha: float
    layers: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    targets: tuple[str, ...] = ("qkv",)
    groups: Mapping[str, Groups] = field(default_factory=dict)

    def __post_init__(self) -> None:
        r, n = self.rank, len(self.layers)
        assert self.method in TRAINED_TENSORS, self.method
        assert len(set(self.layers)) == n and min(self.layers) >= 1, self.layers
        assert self.targets and self.targets == tuple(name for name in ALL_TARGETS if name in self.targets)
        names = {tensor_name(target, factor) for target in self.targets for factor in "ABuv"}
        assert self.tensors.keys() == names, (sorted(self.tensors), sorted(names))
        for target in self.targets:
            d, o = self.tensor(target, "A").shape[-1], self.tensor(target, "B").shape[-2]
            sizes = {"A": (r, d), "B": (o, r), "u": (r,), "v": (o,)}
            wanted = {factor: (*first_axis(factor, self.method, n, self.groups), *sizes[factor]) for factor in sizes}
            for factor, shape in wanted.items():
                found = tuple(self.tensor(target, factor).shape)
                assert found == shape, (target, factor, found, shape)

    def tensor(self, target: str, factor: str) -> Tensor:
        """ "A", "B", "u" or "v" of a target."""
        return self.tensors[tensor_name(target, factor)]

    @property
    def A(self) -> Tensor:
        """Of qkv, as B, u and v are."""
        return self.tensors["A"]

    @property
    def B(self) -> Tensor:
        return self.tensors["B"]

    @property
    def u(self) -> Tensor:
        return self.tensors["u"]

    @property
    def v(self) -> Tensor:
        return self.tensors["v"]

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors that learn."""
        factors = TRAINED_TENSORS[self.method]
        return tuple(tensor_name(target, factor) for target in self.targets for factor in factors)

    def with_tensors(self, **tensors: Tensor) -> OracleAdapter:
        """A copy with other values of some tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

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

    def of_layer(self, layer: int, target: str = "qkv") -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """A (r, d), B (o, r), u (r,), v (o,) of a target in the 1-based `layer`, or None where it is plain."""
        if layer not in self.layers or target not in self.targets:
            return None
        a, b, u, v = (self._of_layer(layer, target, factor) for factor in "ABuv")
        return a, b, u, v

    def _of_layer(self, layer: int, target: str, factor: str) -> Tensor:
        tensor, groups = self.tensor(target, factor), self.groups.get(factor)
        if groups is not None:
            (mine,) = (g for g, group in enumerate(groups) if layer in group)
            return tensor[mine] if len(groups) > 1 else tensor
        if factor in "AB" and self.method != "lora":
            return tensor
        return tensor[self.layers.index(layer)]

    @classmethod
    def from_folder(cls, folder: str | Path, groups: Mapping[str, Groups] | None = None) -> OracleAdapter:
        """Read a native adapter folder (`adapter_config.json` and `adapter_model.safetensors`)."""
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        shared = config["method"], config["rank"], float(config["alpha"]), tuple(config["layers"])
        return cls(*shared, tensors, tuple(config["targets"]), groups or {})


def first_axis(factor: str, method: str, num_layers: int, groups: Mapping[str, Groups]) -> tuple[int, ...]:
    """The size of the axis of a factor's tensors for layers, or groups of them; () for a tensor of all layers."""
    if factor in groups:
        return (len(groups[factor]),) if len(groups[factor]) > 1 else ()
    return () if factor in "AB" and method != "lora" else (num_layers,)


def adapter_update(x: Tensor, adapter: OracleAdapter, layer: int, target: str) -> Tensor:
    """(alpha / r) * v * (B (u * (A x))): x (S, d) -> (S, o), computed in the dtype of x."""
    parts = adapter.of_layer(layer, target)
    assert parts is not None
    a, b, u, v = (tensor.to(x.dtype) for tensor in parts)
    update = v[:, None] * (b @ (u[:, None] * (a @ x.T)))  # x.T is (d, S), so that this reads as the equation does
    return update.T * (adapter.alpha / adapter.rank)


# Dropout of the input, in NumPy's 32-bit integers, token by token. The rule: a run draws from SHA-256 of "SEED:NAME"; a
# token has a number; feature j of the input of a target in a layer is kept where a hash of the token's key and of j is
# at least p. The noise of sampled tokens is of the same hashes and keys.


def hashed(words: np.ndarray) -> np.ndarray:
    """The hashes of 32-bit values by C. Wellons' constants; products wrap."""
    words = words ^ words >> np.uint32(15)
    words = words * np.uint32(0x2C1B3C6D)
    words = words ^ words >> np.uint32(12)
    words = words * np.uint32(0x297A2D39)
    return words ^ words >> np.uint32(15)


def _drawn(seed: int, name: str) -> int:
    """63 bits of a run's stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") // 2


def keys_of(numbers: Sequence[int], *, seed: int, name: str) -> np.ndarray:
    """The key of each token, (tokens,)."""
    run = _drawn(seed, name)
    low, high = (np.array([part(n) for n in numbers], np.uint32) for part in (lambda n: n % 2**32, lambda n: n >> 32))
    return hashed(hashed(low ^ np.uint32(run % 2**32)) ^ high ^ np.uint32(run >> 32))


def kept(numbers: Sequence[int], *, seed: int, layer: int, target: str, width: int, probability: float) -> np.ndarray:
    """(tokens, width) bool."""
    salt, keys = _drawn(seed, f"dropout.{layer}.{target}") % 2**32, keys_of(numbers, seed=seed, name="dropout")
    columns = hashed(np.arange(width, dtype=np.uint32) ^ np.uint32(salt))
    return hashed(keys[:, None] ^ columns) >= round(probability * 2**32)


def dropout(numbers: Sequence[int], *, seed: int, probability: float) -> Callable[[Tensor, int, str], Tensor]:
    """The dropout of a sequence of tokens with these numbers, as `oracle_logits` takes it."""
    share = 1 - round(probability * 2**32) / 2**32

    def drop(x: Tensor, layer: int, target: str) -> Tensor:
        mask = kept(numbers, seed=seed, layer=layer, target=target, width=x.shape[1], probability=probability)
        return x * torch.from_numpy(mask).to(x.dtype) / share

    return drop
