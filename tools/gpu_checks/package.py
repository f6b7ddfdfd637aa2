"""What the checks take from inside the package: attention's routes and choice, kernels, the process group.

Everything else they reach through plans, settings, the trainer and the decoder. Where the package changes one of these,
this is the file to follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.model.blocks import attend_by_blocks, block_size, find_blocks
from megatron_tiedlora.model.documents import attend_within, causal_attention, find_documents
from megatron_tiedlora.model.families.llama import LlamaConfig, llama_config_from_hf
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.training.compiling import compiled_kernels
from megatron_tiedlora.training.memory_plan import stage_memory
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.stage_plan import plan_stages

Route = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From queries (b, heads, s, head_dim), keys and values (b, kv heads, s, head_dim), and document ids (b, s) int64 on
the host or None, to (b, s, heads * head_dim)."""

CHOSEN, BY_DOCUMENT = "chosen by the package", "document by document"
_BACKENDS = {
    "PyTorch flash": SDPBackend.FLASH_ATTENTION,
    "PyTorch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "PyTorch memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def compute_dtype(device: torch.device) -> torch.dtype:
    """What a model is run in on the device: bf16 on a GPU, fp32 on a CPU, which has no fast bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def small_config(
    *, hidden: int = 256, intermediate: int = 512, layers: int = 2, heads: int = 4, kv_heads: int = 2, vocab: int = 1000
) -> LlamaConfig:
    """A LLaMA of few numbers whose heads are of the sizes that kernels are made for."""
    values = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return llama_config_from_hf(values, source="small")


def attention_choice(device: torch.device, dtype: torch.dtype, head_dim: int, *, packed: bool) -> tuple[str, str]:
    """What attention goes through on the device, and why."""
    if device.type == "cpu":
        return "blocks of queries", "a CPU"
    if packed:
        ids = torch.zeros(1, 8, dtype=torch.int64)
        kernel = find_documents(ids, device, dtype=dtype, head_dim=head_dim).kernel
        if kernel is None:
            return "one document after another", "no kernel for documents of different lengths fits (docs/gpu.md)"
        return kernel.__name__.removeprefix("by_"), "the first kernel for documents of different lengths that fits"
    heads = [torch.empty(1, 8, 256, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    choose: Any = torch._fused_sdp_choice  # typed wrongly by torch
    number = choose(*heads, None, 0.0, True)
    return f"PyTorch {SDPBackend(number).name.lower()}", "the first of PyTorch's that takes these shapes"


def attention_routes(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Route]:
    """By name, every way that attention can go on the device; the first is the package's choice."""
    routes: dict[str, Route] = {CHOSEN: _chosen_on_cpu if device.type == "cpu" else _chosen_on_gpu}
    routes[BY_DOCUMENT] = _by_document
    if device.type == "cuda":
        routes |= {name: _by_backend(backend) for name, backend in _BACKENDS.items()}
    return routes


def is_taken(name: str) -> bool:
    """Whether the package may take a route."""
    return name in (CHOSEN, BY_DOCUMENT)


def takes_documents(name: str) -> bool:
    """Whether a route serves rows that hold several documents."""
    return name not in _BACKENDS


def _chosen_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    blocks = find_blocks(ids, query.shape[2], size=block_size(query.shape[1], key.shape[1]))
    return attend_by_blocks(query, key, value, blocks, EAGER)


def _chosen_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    if ids is None:
        return causal_attention(query, key, value).transpose(1, 2).flatten(2)
    found = find_documents(ids, query.device, dtype=query.dtype, head_dim=query.shape[-1])
    return attend_within(query, key, value, found)


def _by_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    if ids is None:
        ids = torch.zeros(query.shape[0], query.shape[2], dtype=torch.int64)
    found = find_documents(ids, query.device, dtype=query.dtype, head_dim=query.shape[-1])
    return attend_within(query, key, value, found._replace(kernel=None))


def _by_backend(backend: SDPBackend) -> Route:
    def route(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        assert ids is None
        with sdpa_kernel(backend):
            return causal_attention(query, key, value).transpose(1, 2).flatten(2)

    return route


def kernels_for(config: LlamaConfig, *, dtype: torch.dtype, device: torch.device) -> Kernels:
    """The compiled kernels. Raises UserError where they cannot be compiled."""
    return compiled_kernels(config, dtype=dtype, device=device)


def compiler_failure(device: torch.device) -> str | None:
    """Why kernels cannot be compiled, None where they can."""
    try:
        kernels_for(small_config(), dtype=compute_dtype(device), device=device)
    except UserError as error:
        return str(error)
    return None


def join(world_size: int, *, minutes: float) -> torch.device:
    """Meet the other ranks, as a run does; returns this rank's device."""
    from megatron_tiedlora.pipeline.launch_env import join_process_group

    return join_process_group(minutes, expected_ranks=world_size)


def gathered(value: Any, device: torch.device, *, kind: Any) -> list[Any] | None:
    """Every rank's value in rank order, on rank 0; None elsewhere."""
    from megatron_tiedlora.parallel.agreement import gather_on_rank_0

    return gather_on_rank_0(value, device, kind=kind)


def planned_bytes(plan: RunPlan) -> float:
    """What the dry run plans for this rank's tensors: what torch's allocator is to hold at most."""
    stage = plan_stages(plan)[plan.grid.pp_rank]
    return stage_memory(plan, stage, tokens=plan.batches.micro_batch_size * plan.settings.max_length).total
