"""The figures about attention on GPUs in docs/performance_log.md: launches, peaks, saved bytes.

    $NULL_GPU/run python tests/null_gpu/null_gpu_attention.py

NULL_GPU and the CUDA build of PyTorch are as in null_gpu_figures.py. "One by one" is the last route, which a run takes
where no fused kernel runs; "unfused" is PyTorch's attention of whole rows with grouped queries in fp32. cuDNN brings a
CUDA runtime of its own, which the stand-in cannot start: its operator is replaced by one that launches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import nullgpu  # the stand-in's own module
import torch
from null_gpu_figures import launches
from torch.nn import functional

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.attention import Attention, KeyValueCache
from megatron_tiedlora.model.batch import Documents, whole_rows
from megatron_tiedlora.model.cpu_attention import Scores
from megatron_tiedlora.model.fused_attention import CANDIDATES, Attend, FusedKernel, attend_within, choose_attention
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage

GPU, PLAIN = torch.device("cuda"), Scores(128**-0.5)
TOKENS = 4096
MIXED = [8 + 97 * index % 292 for index in range(21)]  # tokens of documents, no two alike


def main() -> None:
    """Print all figures."""
    print("launches of one micro-batch of 4,096 tokens, two layers of 7B, forward and backward")
    for lengths in ([TOKENS], [96, 32] * 32, [*MIXED, TOKENS - sum(MIXED)]):
        with patch.object(fused_attention, "CANDIDATES", ()):
            choose_attention.cache_clear()
            apart = _launches(lengths)
        choose_attention.cache_clear()
        what = f"{len(lengths)} documents of {min(lengths)} to {max(lengths)}"
        print(f"  {what}: one by one {apart}, in one call {_launches(lengths)}")
    heads = (64, 8, 2048, 128)
    print("peak of attention of 70B's width in fp32, forward and backward, GB")
    unfused = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    print(f"  unfused {_peak(unfused, *heads):.2f}, chosen {_peak(_chosen, *heads):.2f}")
    print("kernels of two rows of 2,048 tokens, heads of 70B, forward and backward")
    for candidate in CANDIDATES:
        print(f"  {candidate.name}: {', '.join(kernel_names(candidate)) or 'none'}")
    print("the same with a window of 1,024 tokens, and with a cap")
    for how in (PLAIN._replace(window=1024), PLAIN._replace(cap=50.0)):
        for candidate in CANDIDATES:
            print(f"  {candidate.name}: {', '.join(kernel_names(candidate, how)) or 'none'}")
        print(f"  chosen: {choose_attention(GPU, torch.bfloat16, 128, window=how.window is not None, cap=how.cap)}")
    print("launches of a token of an answer, four layers of 7B, uncaptured")
    print(f"  mask as it is {_decoding()}, its rows without a gap {_decoding(contiguous=True)}")
    print("bytes beside q, k, v and the result: kept, and at most in the backward pass beside the gradients of q, k, v")
    flash, efficient = fused_attention._torch_flash, fused_attention._torch_efficient
    for label, attend, dtype in (("flash", flash, torch.bfloat16), ("memory-efficient", efficient, torch.float32)):
        for num_heads, kv_heads, lengths in ((32, 32, [64] * 64), (32, 32, [4096]), (32, 8, [256] * 16)):
            kept, more = _beside(attend, dtype, num_heads, kv_heads, lengths)
            what = f"{num_heads} heads of 128, {kv_heads} of keys, {len(lengths)} documents of {lengths[0]}"
            print(f"  {label}, {what}: {kept:,}, {more:,}")


def _stage(num_layers: int) -> Stage:
    config = find_model("llama2-7b").shape
    adapter = make_adapter_config("tl6", rank=8, layers=range(1, num_layers + 1), targets=targets_of(config), seed=0)
    with GPU:
        specs = layer_specs(config, dtype=torch.bfloat16)
        return Stage((*specs[: num_layers + 1], specs[-1]), TiedAdapter(AdapterShard.whole(adapter))).to(GPU)


def _launches(lengths: Sequence[int]) -> int:
    stage = _stage(2)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=GPU)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(GPU)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    counts = []
    for _ in range(2):  # what is chosen is tried in the first
        nullgpu.reset()
        stage(tokens, positions, tokens, documents=ids).backward()
        counts.append(launches(nullgpu.report()))
    return counts[-1]


def _chosen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    route = choose_attention(GPU, query.dtype, query.shape[-1])
    assert route.attend is not None
    return attend_within(query, key, value, whole_rows(1, query.shape[2], GPU), PLAIN, route.attend)


def _peak(function: Callable[..., torch.Tensor], num_heads: int, kv_heads: int, length: int, head_dim: int) -> float:
    counts = (num_heads, kv_heads, kv_heads)
    query, key, value = (torch.zeros(1, n, length, head_dim, device=GPU, requires_grad=True) for n in counts)
    _chosen(query, key, value)
    torch.cuda.reset_peak_memory_stats()
    found = function(query, key, value)
    found.backward(torch.empty_like(found))
    return torch.cuda.max_memory_allocated() / 1e9


class NothingLaunched(torch.autograd.Function):
    """Results and gradients as cuDNN's operator allocates them."""

    @staticmethod
    def forward(context: Any, *heads: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(*heads)
        return torch.empty_like(heads[0])

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        assert gradient.stride() == context.saved_tensors[0].stride()
        return tuple(map(torch.empty_like, context.saved_tensors))


def kernel_names(candidate: FusedKernel, how: Scores = PLAIN) -> list[str]:
    """The kernels that a candidate launches, beside cuDNN's own; or why it is not chosen."""
    capability, name = torch.cuda.get_device_capability(), "_scaled_dot_product_cudnn_attention"
    if obstacle := candidate.obstacle(capability, torch.bfloat16, 128, window=how.window is not None, cap=how.cap):
        return [obstacle]
    parts = [torch.zeros(1, n, 4096, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True) for n in (64, 8, 8)]
    parts = [part.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for part in parts]
    documents = Documents([0, 2048, 4096], torch.tensor([0, 2048, 4096], dtype=torch.int32, device=GPU), 2048)
    gradient = torch.zeros(1, 4096, 64 * 128, device=GPU, dtype=torch.bfloat16)
    with patch.object(torch.ops.aten, name, lambda *heads, **_: (NothingLaunched.apply(*heads[:3]),)):
        nullgpu.reset()
        torch.autograd.grad(attend_within(*parts, documents, how, candidate.make(False)), parts, gradient)
    found = {name: count for name, count in nullgpu.report().items() if re.match("kernel:|gemm:|memcpy", name)}
    names = nullgpu.demangle([name.removeprefix("kernel:") for name in found])
    short = (re.sub(r"^(void )?(\w+::|\(anonymous namespace\)::)*", "", name) for name in names)
    return [f"{count} {re.split('[<(]', name)[0]}" for name, count in zip(short, found.values(), strict=True)]


def _decoding(*, contiguous: bool = False) -> int:
    stage, config = _stage(4).eval(), find_model("llama2-7b").shape
    like = torch.empty(0, dtype=torch.bfloat16, device=GPU)
    caches = [KeyValueCache.empty(4, config.heads.num_kv, 32, config.heads.dim, like) for _ in range(4)]
    tokens = torch.zeros(4, 11, dtype=torch.int64, device=GPU)
    positions = torch.arange(11, device=GPU).expand(4, 11)
    make = Attention._cache_mask
    changed = (lambda *arguments: make(*arguments).contiguous()) if contiguous else make
    with torch.no_grad(), patch.object(Attention, "_cache_mask", changed):
        updates = stage.read_adapter()
        stage.predict(tokens, positions, caches=caches, updates=updates)
        for step in range(11, 13):  # 13 keys do not divide by 8
            for cache in caches:
                cache.filled = step
            nullgpu.reset()
            stage.predict(tokens[:, :1], positions[:, :1] + step, caches=caches, updates=updates)
    return launches(nullgpu.report())


def _beside(
    attend: Attend, dtype: torch.dtype, num_heads: int, kv_heads: int, lengths: Sequence[int]
) -> tuple[int, int]:
    bounds = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    documents = Documents(bounds, torch.tensor(bounds, dtype=torch.int32, device=GPU), max(lengths))
    inputs = [
        torch.zeros(bounds[-1], count, 128, dtype=dtype, device=GPU, requires_grad=True)
        for count in (num_heads, kv_heads, kv_heads)
    ]
    attend(*inputs, documents, PLAIN)
    before = torch.cuda.memory_allocated()
    found = attend(*inputs, documents, PLAIN)
    kept = torch.cuda.memory_allocated() - before - found.nbytes
    gradient = torch.empty_like(found)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(found, inputs, gradient)
    return kept, torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in inputs)


if __name__ == "__main__":
    main()
