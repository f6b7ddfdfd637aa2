"""Bytes that a rank of each stage needs, by what they are for: shapes, and the real block on tensors without data.

Activations are in_flight x tokens x blocks with a backward pass x bytes that a block keeps for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_tiedlora.adapters.methods import FACTORS
from megatron_tiedlora.adapters.tied_adapter import AdapterPart, LayerUpdate
from megatron_tiedlora.evaluation.decoder import cache_dtype
from megatron_tiedlora.model.layer_specs import Block, layer_specs
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.stage_plan import StagePlan

FP32 = 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a stage."""

    base: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(astuple(self))


def stage_memory(plan: RunPlan, stage: StagePlan, *, tokens: int, per_token: float) -> StageMemory:
    """What a rank of `stage` needs.

    Args:
        tokens: of its largest micro-batch, padding included.
        per_token: bytes that a block keeps, from `saved_bytes_per_token`.
    """
    zero_stage, dp_size = plan.engine.zero_stage, plan.grid.dp_size
    trained = sum(stage.trained)
    return StageMemory(
        base=base_bytes(plan, stage) / (dp_size if zero_stage == 3 else 1),
        adapter=FP32 * sum(stage.held) / (dp_size if zero_stage == 3 else 1),
        gradients=FP32 * trained / (dp_size if zero_stage >= 2 else 1),
        # Two moments; from ZeRO-1 on also a copy of the values that is stepped.
        optimizer=(2 if zero_stage == 0 else 3) * FP32 * trained / (dp_size if zero_stage >= 1 else 1),
        activations=_activation_bytes(plan, stage, tokens=tokens, per_token=per_token),
    )


def base_bytes(plan: RunPlan, stage: StagePlan) -> int:
    """Of the base weights that a rank of the stage holds, before ZeRO-3 cuts them over data-parallel ranks."""
    return sum(stage.local_base) * plan.dtype.itemsize


def decoding_cache_bytes(plan: RunPlan, *, longest_prompt: int) -> float:
    """Keys and values of a decoded batch on the rank with most blocks, on the device that is here."""
    config, batch = plan.source.config, plan.settings.eval_batch_size
    dtype = cache_dtype(plan.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    blocks = max(sum(1 <= layer <= config.num_layers for layer in stage) for stage in plan.stages)
    # A pipeline has a part of the batch on each stage, so every rank holds the caches of the whole batch.
    per_token = 2 * blocks * config.num_kv_heads // plan.grid.tp_size * config.head_dim * dtype.itemsize
    return float(batch * (longest_prompt + plan.max_new_tokens) * per_token)


def micro_batches_in_flight(plan: RunPlan, stage: StagePlan) -> int:
    """How many micro-batches 1F1B has begun and not ended on a stage."""
    return min(plan.grid.pp_size - stage.index, plan.batches.accumulation_steps)


def _activation_bytes(plan: RunPlan, stage: StagePlan, *, tokens: int, per_token: float) -> float:
    hidden = tokens * plan.source.config.hidden_size * plan.dtype.itemsize / _sequence_parts(plan)
    blocks = len(stage.backward_blocks)
    recomputes = plan.settings.recompute == "full"
    kept = blocks * (hidden if recomputes else tokens * per_token)
    if plan.grid.pp_size > 1:  # the engine keeps what came in and what went out
        kept += hidden * (1 if stage.is_first else 2)
    if stage.is_last:  # logits, as if every position were supervised
        kept += tokens * -(-plan.source.config.vocab_size // plan.grid.tp_size) * plan.dtype.itemsize
    again = tokens * per_token if recomputes and blocks else 0.0
    return micro_batches_in_flight(plan, stage) * kept + again


def _sequence_parts(plan: RunPlan) -> int:
    return plan.grid.tp_size if plan.sequence_parallel else 1


def saved_bytes_per_token(plan: RunPlan, length: int = 256) -> float:
    """Bytes that one block of a rank keeps for its backward pass, per token of the whole sequence.

    The real modules run at the rank's sizes on tensors without data, and what autograd saves is counted by storage,
    parameters left out. Norms see the rank's part of the sequence, attention and MLP all of it, as between a gather and
    a reduce-scatter; a gathered input is counted where something keeps it (a trained A does).

    Args:
        length: of the sequence that is tried, a multiple of the tensor-parallel size.
    """
    config, tp_size = plan.source.config, plan.grid.tp_size
    with FakeTensorMode():
        specs = layer_specs(config, dtype=plan.dtype, tp_size=tp_size)
        block = specs[1].build()
        assert isinstance(block, Block)
        update = _layer_update(plan)
        between, inside = (
            torch.empty(1, size, config.hidden_size, dtype=plan.dtype, requires_grad=True)
            for size in (length // _sequence_parts(plan), length)
        )
        # What all layers share: the table is kept once a micro-batch, not once a layer.
        places = block.attention.places(torch.zeros(1, length, dtype=torch.long), plan.dtype)
        held = (*block.parameters(), *places.table, *(t for t in update if isinstance(t, torch.Tensor)))
        parameters = {tensor.untyped_storage()._cdata for tensor in held}
        saved: dict[int, torch.Tensor] = {}  # keeps the tensors alive, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        if plan.engine.zero_stage == 3:
            # DeepSpeed puts its own linear product in place of torch's, which keeps its input although the weight is
            # frozen (0.19.8; torch's would keep the gathered weight instead).
            for module in block.modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    module.register_forward_pre_hook(_keeper(keep))
        alone = TensorParallel()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = [block.attention_norm(between), block.mlp_norm(between * 1)]  # of two different inputs
            outputs += [block.attention(inside, places, alone, update=update), block.mlp(inside * 1, alone)]
            assert all(output.requires_grad for output in outputs)
        total = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in parameters)
    return total / length


def _keeper(keep: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        keep(inputs[0])

    return hook


def _layer_update(plan: RunPlan) -> LayerUpdate:
    """One layer's factors as `TiedAdapter.forward` gives them on a rank: A and u whole, B and v its rows."""
    adapter = plan.adapter
    part = AdapterPart(adapter, adapter.layers[:1], 0, plan.grid.tp_size)
    factors: dict[str, torch.Tensor | None] = {}
    for name in FACTORS:
        factor = adapter.row.factor(name)
        shape = adapter.shape(name) if name in ("A", "u") else part.local_shape(name)
        shape = shape if factor.tied else shape[1:]
        factors[name] = torch.empty(shape, requires_grad=factor.trained) if part.exists(name) else None
    a, b, u, v = (factors[name] for name in FACTORS)
    assert a is not None and b is not None
    return LayerUpdate(a, b, u, v, adapter.scale)
