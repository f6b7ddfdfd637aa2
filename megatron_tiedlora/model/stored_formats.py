"""Which storage format a folder's weights have, from the quantization_config in its config.json.

Read are 4-bit folders of bitsandbytes (nf4) and fp8 folders with a scale for each row or tensor (compressed-tensors and
fbgemm_fp8). Their weights alone count: how another program rounds activations is no part of the model here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown

BITSANDBYTES, COMPRESSED, FBGEMM = "bitsandbytes", "compressed-tensors", "fbgemm_fp8"
_WHAT_TO_DO = (
    "give the model with weights in bf16, fp16 or fp32, and train on fewer bits with --base (folders that can be read:"
    " bitsandbytes in nf4, compressed-tensors and fbgemm_fp8 in fp8 by row or by tensor)"
)


@dataclass(frozen=True)
class StoredFormat:
    """How the linears of a folder's blocks are stored.

    Attributes:
        method: the quant_method of its config.
        base_format: the storage format, a name of `BASE_FORMATS`.
    """

    method: str
    base_format: str

    @property
    def in_words(self) -> str:
        """The format and who wrote it."""
        return f"{self.base_format} (by {self.method})"


def format_in_use(
    stored: StoredFormat | None, given: str | None, products: str | None = None, *, source: str
) -> str | None:
    """The storage format that the blocks' linears have in a run: `given`, or that of the folder if it has one.

    Args:
        given: --base. products: --products.
        source: the model's name in messages.

    Raises:
        UserError: another one was given than that of the folder, or `products` needs another one.
    """
    if stored is not None and given not in (None, stored.base_format):
        raise UserError(
            f"--base {given}: {source} has its weights in {stored.in_words} already, and they are not quantised again;"
            " leave --base out, or give the model with weights in 16 bits"
        )
    found = given if stored is None else stored.base_format
    if products is not None and found != products:
        raise UserError(f"--products {products} needs --base {products}; {_in_words(found)}")
    return found


def _in_words(base_format: str | None) -> str:
    words = "the linears of this base are not quantised"
    return words if base_format is None else f"this base is in {base_format}"


def stored_format(values: Mapping[str, Any], *, source: str) -> StoredFormat | None:
    """The storage format of a folder by the fields of its config; None if nothing there is quantised.

    Args:
        source: the config's name in messages.

    Raises:
        UserError: it is one that is not read.
    """
    config = values.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    why = ""
    if isinstance(config, Mapping) and isinstance(method, str) and method in _CHECKS:
        base, why = _CHECKS[method](config)
        if not why:
            return StoredFormat(method, base)
    detail = f" ({why})" if why else ""
    raise UserError(
        f"{source}: quantization_config: weights quantised by {shown(method)}{detail} are not read; {_WHAT_TO_DO}"
    )


def _bitsandbytes(config: Mapping[str, Any]) -> tuple[str, str]:
    """(format, why it cannot be read)."""
    kind, storage = config.get("bnb_4bit_quant_type"), config.get("bnb_4bit_quant_storage") or "uint8"
    if not config.get("load_in_4bit"):
        return "", "load_in_4bit is not true"
    if kind != "nf4":
        return "", f"bnb_4bit_quant_type is {shown(kind)}, not 'nf4'"
    return "nf4", "" if storage == "uint8" else f"bnb_4bit_quant_storage is {shown(storage)}, not 'uint8'"


def _compressed(config: Mapping[str, Any]) -> tuple[str, str]:
    """(format, why it cannot be read)."""
    groups, sparsity = config.get("config_groups"), config.get("sparsity_config") or {}
    if not isinstance(groups, Mapping) or not groups:
        return "", "it has no config_groups"
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return "", f"{shown(name)} has no weights"
        bits, kind, strategy = (weights.get(field) for field in ("num_bits", "type", "strategy"))
        if (bits, kind) != (8, "float"):
            return "", f"{shown(name)} has {shown(bits)} bits of type {shown(kind)}, not 8 of 'float'"
        if strategy not in ("channel", "tensor"):
            return "", f"the strategy of {shown(name)} is {shown(strategy)}, not 'channel' or 'tensor'"
        if weights.get("symmetric", True) is not True:
            return "", f"{shown(name)} is not symmetric"
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        return "", "its weights are sparse"
    if config.get("transform_config"):
        return "", "it transforms weights"
    return "fp8", ""


def _fbgemm(config: Mapping[str, Any]) -> tuple[str, str]:
    """(format, why it cannot be read): it has one scheme alone."""
    return "fp8", ""


_CHECKS = {BITSANDBYTES: _bitsandbytes, COMPRESSED: _compressed, FBGEMM: _fbgemm}
