"""Stand-ins for fused attention kernels without a GPU: they have the arguments of the library or of PyTorch's operator,
check them, and compute attention's definition in fp64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.cpu_attention import Scores
from support.attention_oracle import attended

HOST = torch.device("cpu")


def by_definition(query: Any, key: Any, value: Any, offsets: torch.Tensor, how: Scores) -> torch.Tensor:
    """The oracle for (tokens, heads, head_dim) and offsets."""
    assert offsets.dtype == torch.int32
    ids = torch.bucketize(torch.arange(len(query)), offsets[1:], right=True)[None]
    rows = (part.transpose(0, 1)[None] for part in (query, key, value))
    return attended(*rows, ids, how)[0].view(query.shape).to(query.dtype)


Calls = list[dict[str, Any]]


def stand_in(
    arguments: Sequence[str], compute: Callable[[dict[str, Any]], Any], calls: Calls, num_positional: int | None = None
) -> Callable[..., Any]:
    """A function with these arguments, so many of them by position, too; `calls` gets what it is called with."""

    def function(*positional: Any, **keywords: Any) -> Any:
        assert len(positional) <= len(arguments[:num_positional])
        given = dict(zip(arguments, positional, strict=False)) | keywords
        assert given.keys() <= set(arguments), f"no such arguments: {given.keys() - set(arguments)}"
        calls.append(given)
        return compute(given)

    return function


def flash_attn_varlen_func(given: dict[str, Any]) -> torch.Tensor:
    assert given["causal"] is True and given["cu_seqlens_q"] is given["cu_seqlens_k"]
    assert given["max_seqlen_q"] == given["max_seqlen_k"]
    left, right = given.get("window_size", (None, 0))
    assert right == 0
    how = Scores(given["softmax_scale"], None if left is None else left + 1, given.get("softcap"))
    return by_definition(given["q"], given["k"], given["v"], given["cu_seqlens_q"], how)


COMMON = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
# flash_attn 2.4.1 to 2.8, hopper/flash_attn_interface.py, and flash_attn 2.3, which has no `deterministic`.
ARGUMENTS_2_3 = (*COMMON, "dropout_p", "softmax_scale", "causal", "window_size", "return_attn_probs")
ARGUMENTS_2 = (*ARGUMENTS_2_3[:-1], "softcap", "alibi_slopes", "deterministic", "return_attn_probs", "block_table")
ARGUMENTS_3 = (
    *(*COMMON, "seqused_q", "seqused_k", "softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale"),
    *("window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin"),
    "return_attn_probs",
)
# flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
ARGUMENTS_4 = (
    *("q", "k", "v", "qv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k", "seqused_q"),
    *("seqused_k", "gather_kv_indices", "page_table", "softmax_scale", "causal", "window_size", "learnable_sink"),
    *("softcap", "num_splits", "pack_gqa", "deterministic", "score_mod", "return_lse"),
)
LIBRARIES = {"flash_attn_interface": ARGUMENTS_3, "flash_attn.cute": ARGUMENTS_4, "flash_attn": ARGUMENTS_2}


def install(
    monkeypatch: pytest.MonkeyPatch, *names: str, arguments: tuple[str, ...] | None = None, as_tuple: bool = False
) -> dict[str, Calls]:
    """Have these libraries installed, and no other; the calls that each gets."""
    calls: dict[str, Calls] = {}
    for name, own in LIBRARIES.items():
        calls[name], module = [], ModuleType(name)
        compute = (lambda given: (flash_attn_varlen_func(given), None)) if as_tuple else flash_attn_varlen_func
        module.flash_attn_varlen_func = stand_in(arguments or own, compute, calls[name])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module if name in names else None)

    def find(name: str) -> ModuleSpec | None:
        if name == "flash_attn.cute" and name not in names:
            raise ImportError("undefined symbol") if "flash_attn" in names else ModuleNotFoundError("flash_attn")
        if name == "flash_attn" and "flash_attn.cute" in names and name not in names:
            return ModuleSpec(name, None)  # a folder without code
        return ModuleSpec(name, None, origin=f"{name}.py") if name in names else None

    monkeypatch.setattr(fused_attention, "find_spec", find)
    return calls


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    tried = fused_attention._try
    monkeypatch.setattr(fused_attention, "_try", lambda attend, device, *rest: tried(attend, HOST, *rest))
    stand_in_for_operators(monkeypatch)


def stand_in_for_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators, with the arguments that this torch says they have."""
    for name, compute in OPERATORS.items():
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        num_positional = sum(not argument.kwarg_only for argument in arguments)
        OPERATOR_CALLS[name].clear()
        function = stand_in([one.name for one in arguments], compute, OPERATOR_CALLS[name], num_positional)
        monkeypatch.setattr(torch.ops.aten, name, function)


def flash(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    assert query.dim() == 3 and query.shape[-1] % 8 == 0 and query.stride(-1) == 1
    assert given["cum_seq_q"] is given["cum_seq_k"] and given["max_q"] == given["max_k"]
    assert given["dropout_p"] == 0.0 and given["is_causal"] is True and given["return_debug_mask"] is False
    left = given.get("window_size_left")
    assert left is None or given["window_size_right"] == 0
    how = Scores(given["scale"], None if left is None else left + 1)
    return by_definition(query, key, value, given["cum_seq_q"], how), torch.empty(0)


def efficient(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    assert query.shape == key.shape == value.shape and len(query) == 1, "heads for every query, and one row"
    assert given["bias"] is None and given["dropout_p"] == 0.0 and given["custom_mask_type"] == 1
    assert given["cu_seqlens_q"] is given["cu_seqlens_k"] and given["max_seqlen_q"] == given["max_seqlen_k"]
    assert given["compute_log_sumexp"] is True, "its backward pass reads the log sums"
    mixed = by_definition(query[0], key[0], value[0], given["cu_seqlens_q"], Scores(given["scale"]))
    return mixed[None], torch.empty(0)


class _AsTheOutput(torch.autograd.Function):
    """Give x, and take a gradient with its strides alone: PyTorch's plans of cuDNN are found by those of q, k and v."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        context.strides = x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        assert gradient.stride() == context.strides
        return gradient


def cudnn(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    assert query.dim() == 4 and query.shape[2] % 128 == 0 and query.shape[-1] % 8 == 0 and query.stride(-1) == 1
    assert given["attn_bias"] is None and given["dropout_p"] == 0.0 and given["is_causal"] is True
    assert given["compute_log_sumexp"] is True and given["return_debug_mask"] is False
    mixed = attended(query, key, value, torch.zeros(len(query), query.shape[2]), Scores(given["scale"]))
    by_heads = mixed.unflatten(2, (query.shape[1], -1)).transpose(1, 2)  # as query in memory
    return _AsTheOutput.apply(by_heads.to(query.dtype)), torch.empty(0)  # type: ignore[no-untyped-call]


OPERATORS = {
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_flash_attention_forward": flash,
    "_efficient_attention_forward": efficient,
}
OPERATOR_CALLS: dict[str, Calls] = {name: [] for name in OPERATORS}
