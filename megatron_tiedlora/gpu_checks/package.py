"""What the checks use of the package's internals: attention's routes and choice, and kernels.

They reach everything else through plans, settings, training steps and the decoder. If the package changes one of these
internals, change this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.model.cpu_attention import attend_by_tiles, find_query_tiles, tile_size
from megatron_tiedlora.model.documents import find_documents, whole_rows
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.fused_attention import (
    CANDIDATES,
    Attend,
    FusedKernel,
    attend_within,
    choose_attention,
    one_by_one,
)
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.planning.memory import stage_memory
from megatron_tiedlora.training.compiling import compiled_kernels
from megatron_tiedlora.training.plan import RunPlan

Route = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From queries (b, heads, s, head_dim), keys and values (b, kv heads, s, head_dim), and document ids (b, s) int64 on
the host or None, to (b, s, heads * head_dim)."""

CHOSEN = "chosen by the package"  # the only route that must be correct
ONE_BY_ONE, CUDNN = "one document after another", "PyTorch's cuDNN, for comparison"


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a model on the device: bf16 on a GPU, fp32 on a CPU, which may have no fast bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# The config.json of a small LLaMA whose heads have sizes that kernels support.
SMALL: dict[str, Any] = {
    **PRESETS["llama2-7b"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_shape(**changes: int) -> ModelShape:
    """The shape of SMALL with changed fields."""
    return shape_from_hf({**SMALL, **changes}, source="small")


def attention_choice(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str, bool]:
    """(the attention chosen on the device, why, whether it is one call for all documents)."""
    route = choose_attention(device, dtype, head_dim)
    return route.name, route.reason, route.attend is not one_by_one


def attention_routes(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Route]:
    """Every attention route that works on the device, by name; the first is the package's choice."""
    chosen = choose_attention(device, dtype, head_dim)
    if chosen.attend is None:
        return {CHOSEN: _by_blocks, ONE_BY_ONE: _within(one_by_one)}
    routes = {CHOSEN: _within(chosen.attend), ONE_BY_ONE: _within(one_by_one)}
    for candidate in CANDIDATES:
        if candidate.name != chosen.name and candidate.name not in attention_obstacles(device, dtype, head_dim):
            routes[candidate.name] = _of_candidate(candidate)
    return {**routes, CUDNN: _by_cudnn}


def attention_obstacles(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """The kernels that cannot run on the device, by name, with the reason as text that follows "it"."""
    if device.type == "cpu":
        return {}
    capability = torch.cuda.get_device_capability(device)
    found = {candidate.name: candidate.obstacle(capability, dtype, head_dim) for candidate in CANDIDATES}
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def _by_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    blocks = find_query_tiles(ids, query.shape[2], size=tile_size(query.shape[1], key.shape[1]))
    return attend_by_tiles(query, key, value, blocks, EAGER)


def _within(attend: Attend) -> Route:
    def route(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        size, _, length, _ = query.shape
        documents = whole_rows(size, length, query.device) if ids is None else find_documents(ids, query.device)
        return attend_within(query, key, value, documents, attend)

    return route


def _of_candidate(candidate: FusedKernel) -> Route:
    """A kernel that the package does not choose here, or whose library fails when it is called."""
    return lambda *heads: _within(candidate.make(False))(*heads)


def _by_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """What PyTorch itself would choose on Hopper, for comparison; the package excludes it."""
    assert ids is None
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
    return output.transpose(1, 2).flatten(2)


def compiler_failure(device: torch.device) -> str | None:
    """Why kernels cannot be compiled; None if they can."""
    try:
        compiled_kernels(small_shape(), dtype=compute_dtype(device), device=device)
    except UserError as error:
        return str(error)
    return None


def planned_bytes(plan: RunPlan) -> float:
    """The bytes that the dry run plans for this rank's tensors: at most what torch's allocator holds."""
    return stage_memory(plan.stage, tokens=plan.layout.rows * plan.layout.length).allocated
