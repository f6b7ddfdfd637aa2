"""Bytes that a rank of each stage needs, by what they are for: arithmetic on shapes.

Activations are in_flight x tokens x blocks with a backward pass x bytes that a block keeps for each token, less for the
last block, and what one of them holds for a moment. What DeepSpeed's engines keep beside is counted apart (hidden
states of a pipeline, gathered weights of ZeRO-3), and so is what a GPU's libraries take without PyTorch's knowledge.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from megatron_tiedlora.evaluation.decoder import cache_dtype
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.parallel.kernels import NUMBERS_AT_ONCE
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.training.compiling import compiles
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.stage_plan import StagePlan

FP32 = 4
# Estimates. NCCL's is by what users report: 0.3 to 0.7 GB on hosts with NVLink (NVIDIA/nccl issues 864 and 964).
CONTEXT_BYTES = 0.5e9
COMMUNICATOR_BYTES = 0.5e9
# cuBLAS's on an H100, for the thread that runs forward and the one that runs backward: 32 MiB each.
WORKSPACE_BYTES = 2 * 2.0**25
MULTIPROCESSORS = 132  # of an H100, by which flash attention's deterministic backward pass divides its work


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a stage; `libraries` is what PyTorch does not allocate."""

    base: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    engine: float
    libraries: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(astuple(self))

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator gives out at the peak of a step."""
        return self.total - self.libraries


def stage_memory(
    plan: RunPlan, stage: StagePlan, *, tokens: int, documents: int = 1, longest: int | None = None
) -> StageMemory:
    """What a rank of `stage` needs.

    Args:
        tokens: of its largest micro-batch, padding included.
        documents: in that micro-batch, and `longest`: tokens of the longest one (None: all).
    """
    attention = AttentionMemory(plan, tokens=tokens, documents=documents, longest=longest or tokens)
    zero_stage, dp_size = plan.engine.zero_stage, plan.grid.dp_size
    trained = sum(stage.trained)
    return StageMemory(
        base=base_bytes(plan, stage) / (dp_size if zero_stage == 3 else 1),
        adapter=FP32 * sum(stage.held) / (dp_size if zero_stage == 3 else 1),
        gradients=FP32 * trained / (dp_size if zero_stage >= 2 else 1),
        # Two moments; from ZeRO-1 on also a copy of the values that is stepped.
        optimizer=(2 if zero_stage == 0 else 3) * FP32 * trained / (dp_size if zero_stage >= 1 else 1),
        activations=_activation_bytes(plan, stage, tokens=tokens, attention=attention),
        engine=_engine_bytes(plan, stage, tokens=tokens),
        libraries=CONTEXT_BYTES + COMMUNICATOR_BYTES * num_communicators(plan, stage) if plan.on_gpu else 0.0,
    )


def num_communicators(plan: RunPlan, stage: StagePlan) -> int:
    """NCCL communicators of a rank: one for each group of more than one rank and each neighbour in the pipeline."""
    grid = plan.grid
    tensor, pipeline, data = (size > 1 for size in (grid.tp_size, grid.pp_size, grid.dp_size))
    groups = [tensor, data, tensor or pipeline, tensor and data]  # the model's; of u, over tensor x data
    if pipeline:  # the pipeline's, that for choices and the tied tensors'
        groups += [True] * 3 + [not stage.is_first, not stage.is_last]
    return sum(groups)


def base_bytes(plan: RunPlan, stage: StagePlan) -> int:
    """Of the base weights that a rank of the stage holds, before ZeRO-3 cuts them over data-parallel ranks."""
    return sum(stage.local_base) * plan.dtype.itemsize


def decoding_cache_bytes(plan: RunPlan, *, longest_prompt: int) -> float:
    """Keys and values of a decoded batch on the rank with most blocks."""
    shape, batch = plan.source.shape, plan.settings.eval_batch_size
    dtype = cache_dtype(plan.dtype, torch.device("cuda" if plan.on_gpu else "cpu"))
    blocks = max(sum(1 <= layer <= shape.num_layers for layer in stage) for stage in plan.stages)
    # A pipeline has a part of the batch on each stage, so every rank holds the caches of the whole batch.
    per_token = 2 * blocks * shape.heads.num_kv // plan.grid.tp_size * shape.heads.dim * dtype.itemsize
    return float(batch * (longest_prompt + plan.max_new_tokens) * per_token)


def micro_batches_in_flight(plan: RunPlan, stage: StagePlan) -> int:
    """How many micro-batches 1F1B has begun and not ended on a stage."""
    return min(plan.grid.pp_size - stage.index, plan.batches.accumulation_steps)


def kept_bytes(plan: RunPlan, stage: StagePlan, *, tokens: int, after: int | None = None) -> float:
    """What autograd keeps of a micro-batch on a rank of `stage`, beside parameters and what is as small as indices.

    Args:
        tokens: of the micro-batch, padding included.
        after: positions that what comes after the last attention computes; None: all. Of each the gradient is kept.
    """
    after = tokens if after is None else after
    blocks, recomputes = len(stage.backward_blocks), plan.settings.recompute == "full"
    kept = blocks * (_hidden_bytes(plan, tokens) if recomputes else tokens * saved_bytes_per_token(plan))
    kept += 0 if recomputes else _factor_bytes(plan, stage)
    if stage.is_last and blocks:  # see SupervisedTail
        kept += _hidden_bytes(plan, after) - (0.0 if recomputes else tokens * _bytes_after_attention(plan))
    return kept


def _factor_bytes(plan: RunPlan, stage: StagePlan) -> int:
    """Of A and F = (alpha / r) diag(v) B diag(u) in the base's dtype, which a micro-batch's layers share."""
    part, row = stage.part, plan.adapter.row
    if not part.layers:
        return 0
    num_layers, is_copy = len(part.layers), plan.dtype.itemsize != FP32
    scaled = any(part.exists(name) for name in "uv")
    columns, rows = map(sum, zip(*(target.local_sizes(part.tp_size) for target in plan.adapter.targets), strict=True))
    f_numbers = rows * plan.adapter.rank * (num_layers if scaled or not row.B.tied else 1)
    a_numbers = columns * plan.adapter.rank * (1 if row.A.tied else num_layers)
    held = f_numbers if is_copy or scaled or plan.adapter.scale != 1.0 else 0  # else F is B itself
    held += a_numbers if is_copy or (row.A.trained and part.tp_size > 1) else 0  # else A is the parameter
    return held * plan.dtype.itemsize


class AttentionMemory:
    """What attention's kernel on a GPU needs beside its arguments and result, by how many documents there are.

    Counted for PyTorch's own kernels (2.11): flash in 16 bits, and flash_attn's is alike; the memory-efficient one in
    fp32. A CPU goes by blocks of queries, whose scores are small.

    Attributes:
        kept: of a block from its forward to its backward pass, beside one fp32 number a token and head.
        backward: at the worst moment of its backward pass: gradients of its arguments and result, and workspace.
    """

    def __init__(self, plan: RunPlan, *, tokens: int, documents: int, longest: int) -> None:
        shape, tp_size, itemsize = plan.source.shape, plan.grid.tp_size, plan.dtype.itemsize
        heads, query = shape.heads.num // tp_size, shape.heads.rows[0] // tp_size
        gradients = tokens * (sum(shape.heads.rows) // tp_size + query) * itemsize
        self.kept, workspace = 0, 0
        grouped = shape.heads.num_kv < shape.heads.num
        if plan.on_gpu and plan.dtype == torch.float32:
            square = documents * padded(longest, 32)  # it sees a batch of rows that are as long as the longest document
            self.kept = FP32 * heads * max(square - tokens, 0)
            workspace = FP32 * query * max(square, tokens) + 2 * FP32 * query * tokens * grouped
        elif plan.on_gpu:
            # An fp32 gradient of the queries, of documents that are padded by up to 128; each of `copies` of it gets
            # a part of the keys where sums must have one order; and gradients of keys and values for every query head.
            rows, copies = tokens + 128 * documents, 1
            if plan.settings.deterministic:
                copies = -(-MULTIPROCESSORS // (documents * heads))
            workspace = FP32 * heads * rows * (copies * padded(shape.heads.dim, 32) + 1)
            workspace += 2 * query * tokens * itemsize * grouped
        self.backward = float(gradients + workspace)


def _bytes_after_attention(plan: RunPlan) -> float:
    """Of `saved_bytes_per_token`, what a block keeps of a token after its attention: the second norm's, gate and up."""
    norm = plan.source.shape.hidden_size * plan.dtype.itemsize
    if plan.settings.recompute == "selective":
        return norm / plan.sequence_parts
    return (norm + FP32) / plan.sequence_parts + _gate_bytes_per_token(plan)


def _activation_bytes(plan: RunPlan, stage: StagePlan, *, tokens: int, attention: AttentionMemory) -> float:
    """At the worst moment: the last block's MLP and the head, or the backward pass of a block before it."""
    if not stage.backward_blocks:
        return 0.0
    recomputes = plan.settings.recompute == "full"
    kept = kept_bytes(plan, stage, tokens=tokens)
    # Under full recomputation, the factors are held as arguments of what is computed again.
    kept += _factor_bytes(plan, stage) if recomputes else len(stage.backward_blocks) * attention.kept
    in_flight = micro_batches_in_flight(plan, stage) * kept
    after_attention = tokens * _bytes_after_attention(plan)  # free again as attention's backward pass begins
    in_attention = attention.backward
    if recomputes:
        in_attention += attention.kept + tokens * saved_bytes_per_token(plan) - after_attention
    moment = max(_mlp_backward_bytes(plan, tokens), in_attention - (0.0 if recomputes else after_attention))
    if stage.is_last:
        at_end = max(_head_bytes(plan, stage, tokens), in_attention)
        moment = max(moment - _last_block_bytes(plan, tokens), at_end)
    return in_flight + moment + (WORKSPACE_BYTES if plan.on_gpu else 0.0)


def _mlp_backward_bytes(plan: RunPlan, tokens: int) -> float:
    """Of a block's backward pass as it reaches the MLP, beside what is kept: what is computed again, and gradients."""
    again = 0.0
    if plan.settings.recompute == "full":
        again = tokens * saved_bytes_per_token(plan)
    elif plan.settings.recompute == "selective":
        again = tokens * _gate_bytes_per_token(plan)
    return again + _gate_gradient_bytes(plan, tokens) + _gathered_bytes(plan, tokens)


def _gate_gradient_bytes(plan: RunPlan, tokens: int) -> float:
    """Gradients of gate, up and their product, and what the kernel holds beside them where it is not compiled."""
    return 1.5 * tokens * _gate_bytes_per_token(plan) + eager_temporary_bytes(plan, tokens)


def eager_temporary_bytes(plan: RunPlan, tokens: int) -> float:
    """The most that a kernel which is not compiled holds beside its arguments and its result.

    That is `gate_gradient`: for each pair of a gate and an up that it takes at once eight fp32 numbers, or five where
    nothing has to be made fp32.
    """
    numbers = 2 * tokens * plan.source.shape.intermediate_size / plan.grid.tp_size
    return _at_once(plan, numbers) / 2 * FP32 * (8 if plan.dtype.itemsize < FP32 else 5)


def _at_once(plan: RunPlan, numbers: float) -> float:
    """Of the numbers of a kernel's widest argument, those that it goes over at one time where it is not compiled."""
    if compiles(plan):
        return 0.0
    return min(numbers, NUMBERS_AT_ONCE) if plan.on_gpu else numbers


def _head_bytes(plan: RunPlan, stage: StagePlan, tokens: int) -> float:
    """From the last attention to the loss and back at once: inputs of two norms, gate and up, then logits or gradients.

    The input of the last block's QKV is counted with what is kept.
    """
    shape = plan.source.shape
    norms = 2 * (_hidden_bytes(plan, tokens) + tokens * FP32 / plan.sequence_parts)
    wide = tokens * shape.hidden_size * plan.dtype.itemsize
    logits = min(tokens, HEAD_ROWS) * shape.vocab_size / plan.grid.tp_size
    at_loss = 3 * wide + logits * plan.dtype.itemsize + _at_once(plan, logits) * FP32
    at_gate = _gate_gradient_bytes(plan, tokens) + _gathered_bytes(plan, tokens)
    attention_output = 0.0
    if plan.settings.recompute == "full" and plan.grid.pp_size == 1:  # else it is the engine's
        attention_output = _attention_output_bytes(plan, tokens)
    return norms + tokens * _gate_bytes_per_token(plan) + max(at_loss, at_gate) + attention_output


def _gathered_bytes(plan: RunPlan, tokens: int) -> float:
    """Of a gradient between layers, whole again where sequences are cut."""
    return tokens * plan.source.shape.hidden_size * plan.dtype.itemsize if plan.sequence_parts > 1 else 0.0


def _last_block_bytes(plan: RunPlan, tokens: int) -> float:
    """What the last block of the model has kept, and gives back before another's backward pass begins."""
    if plan.settings.recompute == "full":
        return _hidden_bytes(plan, tokens)
    return tokens * (saved_bytes_per_token(plan) - _bytes_after_attention(plan))


def engine_bytes_in_flight(plan: RunPlan, stage: StagePlan, *, tokens: int) -> float:
    """What DeepSpeed's pipeline engine keeps of a micro-batch in flight beside what autograd does (0.19.8).

    Of 2 d numbers a token: what came in, of which the stage gets a copy, and what went out. The first stage has no
    hidden states coming in. What the last one gives its head is kept by autograd, but for attention's result where
    that is computed again. Tokens, positions and labels, up to 24 bytes a token and 32 a label, are left out.
    """
    hidden = _hidden_bytes(plan, tokens)
    kept = 0.0 if stage.is_first else hidden
    if not stage.is_last:
        return kept + hidden
    return kept + (_attention_output_bytes(plan, tokens) if plan.settings.recompute == "full" else 0.0)


def engine_bytes_once(plan: RunPlan, stage: StagePlan, *, tokens: int) -> float:
    """What the engine keeps however many micro-batches are in flight: the buffer that gradients arrive in.

    On the last stage, which gets none, what its head was given of the micro-batch before.
    """
    hidden = _hidden_bytes(plan, tokens)
    if not stage.is_last:
        return hidden
    return hidden + _attention_output_bytes(plan, tokens) if plan.batches.accumulation_steps > 1 else 0.0


def gathered_bytes(plan: RunPlan, stage: StagePlan) -> float:
    """Of the base weights that ZeRO-3 has gathered at one time: it stops once they are more than a setting (0.19.8)."""
    if plan.engine.zero_stage < 3 or plan.grid.dp_size == 1:
        return 0.0
    most = int(plan.engine.values["zero_optimization"].get("stage3_max_live_parameters", 1_000_000_000))
    return min(sum(stage.local_base), most + max(stage.local_base)) * float(plan.dtype.itemsize)


def _engine_bytes(plan: RunPlan, stage: StagePlan, *, tokens: int) -> float:
    if plan.grid.pp_size == 1:
        return gathered_bytes(plan, stage)
    in_flight = micro_batches_in_flight(plan, stage) * engine_bytes_in_flight(plan, stage, tokens=tokens)
    return in_flight + engine_bytes_once(plan, stage, tokens=tokens)


def _hidden_bytes(plan: RunPlan, tokens: int) -> float:
    """Of what flows between layers, on one rank."""
    return tokens * plan.source.shape.hidden_size * plan.dtype.itemsize / plan.sequence_parts


def _attention_output_bytes(plan: RunPlan, tokens: int) -> float:
    """Of attention's result, on one rank."""
    return tokens * plan.source.shape.heads.rows[0] * plan.dtype.itemsize / plan.grid.tp_size


def saved_bytes_per_token(plan: RunPlan) -> float:
    """Bytes that one adapted block of a rank keeps for its backward pass, per token of the whole sequence.

    On one rank that holds all: 4 d + 2 k + 2 f + r numbers (inputs of two norms; q, k, v and attention's result; gate
    and up; and A x where a factor's gradient needs it), and in fp32 one for each norm and attention head. Without gate,
    up and the second norm's number where these are computed again; of a block that is, as a whole, while it is there.
    """
    shape, tp_size, row = plan.source.shape, plan.grid.tp_size, plan.adapter.row
    selective = plan.settings.recompute == "selective"
    between = (2 * shape.hidden_size * plan.dtype.itemsize + (1 if selective else 2) * FP32) / plan.sequence_parts
    inside = sum(shape.heads.rows) + shape.heads.rows[0]
    if plan.on_gpu and plan.dtype == torch.float32 and shape.heads.num_kv < shape.heads.num:
        inside += 2 * shape.heads.rows[0]  # the memory-efficient kernel gets keys and values for every head
    low = plan.adapter.rank if any(row.factor(name).trained for name in "Buv") else 0
    gate = 0.0 if selective else _gate_bytes_per_token(plan)
    return between + (inside / tp_size + low) * plan.dtype.itemsize + gate + shape.heads.num / tp_size * FP32


def _gate_bytes_per_token(plan: RunPlan) -> float:
    """Of gate and up, on one rank."""
    return 2 * plan.source.shape.intermediate_size / plan.grid.tp_size * plan.dtype.itemsize
