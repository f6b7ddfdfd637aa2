"""--dry_run: what a run would be, without starting it. Needs no weights; presets need no files at all."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter, make_adapter_config
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.model.families.llama import num_base_parameters
from megatron_tiedlora.model.layer_specs import Block
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.run_data import RunData, prepare_data

_STEP_REPORT_BYTES = 40  # five fp64 numbers: loss, time, save, stop


def dry_run_report(settings: Settings, *, launched_ranks: int = 1) -> str:
    """The whole report as text. Plans for --world_size ranks, else for as many as were launched.

    Raises:
        UserError: as a run would, before anything starts.
    """
    plan = plan_run(settings, rank=0, world_size=settings.world_size or launched_ranks, weights=False)
    data = prepare_data(plan, progress=True) if plan.source.folder is not None else None
    sections = [_parameters(plan), _memory(plan, data), _messages(plan), _batches(plan)]
    sections += (
        [_data(plan, data), _sample(data)]
        if data is not None
        else [["data", "  (a preset shape has no tokenizer; give a model folder to count tokens)"]]
    )
    return "\n\n".join("\n".join(section) for section in sections)


def _parameters(plan: RunPlan) -> list[str]:
    config, adapter = plan.source.config, plan.adapter
    lines = [f"trained parameters: {adapter.method}, rank {adapter.rank}, {len(adapter.layers)} adapted layers"]
    counts = adapter.num_trained()
    lines += [
        f"  {name}  {' x '.join(map(str, adapter.shape(name))):<22}{count:>15,}" for name, count in counts.items()
    ]
    lines.append(f"  {'all':<25}{sum(counts.values()):>15,}")
    for other in ("lora", "vera"):
        same = make_adapter_config(
            other,
            rank=adapter.rank,
            layers=adapter.layers,
            hidden_size=adapter.hidden_size,
            qkv_rows=adapter.qkv_rows,
            seed=adapter.seed,
        )
        total = sum(same.num_trained().values())
        lines.append(f"  {f'{other} of the same rank':<25}{total:>15,}   ({sum(counts.values()) / total:.2%} of it)")
    lines.append(f"  {'frozen base':<25}{num_base_parameters(config):>15,}")
    return lines


def saved_bytes_per_token(plan: RunPlan, length: int = 256) -> float:
    """Bytes that one block keeps for its backward pass, per token: the real code on tensors without data.

    Counted by storage with autograd's saved-tensor hooks, parameters left out.
    """
    with FakeTensorMode():
        block = Block(plan.source.config, update_scale=plan.adapter.scale, dtype=plan.dtype)
        bank = TiedAdapter(plan.adapter)
        hidden = torch.empty(1, length, plan.source.config.hidden_size, dtype=plan.dtype, requires_grad=True)
        positions = torch.zeros(1, length, dtype=torch.long)
        parameters = {p.untyped_storage()._cdata for p in (*block.parameters(), *bank.parameters())}
        saved: dict[int, torch.Tensor] = {}  # keeps the tensors alive, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(hidden, positions, bank()[0])
        total = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in parameters)
    return total / length


def _memory(plan: RunPlan, data: RunData | None) -> list[str]:
    config, stage, ranks = plan.source.config, plan.engine.zero_stage, plan.grid.dp_size
    trained = sum(plan.adapter.num_trained().values())
    with torch.device("meta"):
        held = sum(parameter.numel() for parameter in TiedAdapter(plan.adapter).parameters())
    per_token = saved_bytes_per_token(plan)
    length = plan.settings.max_length if data is None else int(data.train.lengths.max())
    tokens = plan.batches.micro_batch_size * length
    kept = config.num_layers if plan.settings.recompute == "none" else 1
    inputs = 0 if plan.settings.recompute == "none" else config.num_layers * config.hidden_size * plan.dtype.itemsize
    rows = [
        ("base weights", num_base_parameters(config) * plan.dtype.itemsize / (ranks if stage == 3 else 1)),
        ("adapter", 4 * held / (ranks if stage == 3 else 1)),
        ("gradients", 4 * trained / (ranks if stage >= 2 else 1)),
        ("optimizer (masters, moments)", (8 if stage == 0 else 12) * trained / (ranks if stage >= 1 else 1)),
        (f"activations, {plan.batches.micro_batch_size} x {length} tokens", tokens * (kept * per_token + inputs)),
    ]
    lines = [f"bytes per rank, ZeRO-{stage}, {ranks} data-parallel ranks"]
    lines += [f"  {name:<36}{_bytes(size):>12}" for name, size in rows]
    lines.append(f"  {'sum':<36}{_bytes(sum(size for _, size in rows)):>12}")
    lines.append(
        f"  (a block keeps {per_token / 1e3:,.1f} kB a token; logits of up to 1,024 rows and buffers come on top)"
    )
    return lines


def _messages(plan: RunPlan) -> list[str]:
    """By group: with one rank nothing is sent; gradients are those of the trained tensors only."""
    ranks, stage, steps = plan.grid.dp_size, plan.engine.zero_stage, plan.batches.accumulation_steps
    trained = 4 * sum(plan.adapter.num_trained().values())
    base = num_base_parameters(plan.source.config) * plan.dtype.itemsize
    rows = [("tensor parallel", 0, 0.0), ("pipeline", 0, 0.0), ("tied, over stages", 0, 0.0)]
    if ranks == 1:
        rows.append(("data parallel", 0, 0.0))
    else:
        # Every ZeRO stage but 0 and 1 sums gradients after each micro-batch, not once a step.
        sums = steps if stage >= 2 else 1
        rows.append(("data parallel, gradient sums", sums, float(sums * trained)))
        if stage in (1, 2):
            rows.append(("data parallel, adapter gathered", 1, float(trained)))
        if stage == 3:
            layers = plan.source.config.num_layers + 2
            rows.append(("data parallel, base gathered", 2 * steps * layers, float(2 * steps * base)))
        rows.append(("all ranks, loss and stopping", 1, float(_STEP_REPORT_BYTES)))
    lines = ["messages and bytes per step and rank (buckets of the JSON may cut sums further)"]
    return lines + [f"  {name:<36}{count:>6}{_bytes(size):>14}" for name, count, size in rows]


def _batches(plan: RunPlan) -> list[str]:
    b = plan.batches
    return [
        "batches",
        f"  global batch {b.global_batch_size} = micro-batch {b.micro_batch_size} x {b.accumulation_steps}"
        f" accumulation steps x {b.data_parallel} data-parallel ranks",
        f"  {plan.settings.max_steps} steps, {plan.settings.max_steps * b.global_batch_size:,} samples",
    ]


def _data(plan: RunPlan, data: RunData) -> list[str]:
    lines = [
        f"data: {plan.settings.task}",
        f"  {'':<12}{'samples':>10}{'tokens':>14}{'supervised':>14}{'longest':>10}{'cut':>8}",
    ]
    for name, split in (("train", data.train), ("validation", data.validation)):
        stats, longest = split.stats, int(split.lengths.max())
        lines.append(
            f"  {name:<12}{stats.rows:>10,}{stats.tokens:>14,}{stats.supervised_tokens:>14,}{longest:>10,}"
            f"{stats.truncated_prompts:>8,}"
        )
    epochs = plan.settings.max_steps * plan.settings.global_batch_size / len(data.train)
    lines.append(f"  the run sees the training part {epochs:.2f} times")
    return lines


def _sample(data: RunData) -> list[str]:
    ids = data.train.sample(0)
    prompt = int(data.train.prompt_lengths[0])
    parts = (("not supervised", ids[:prompt]), ("supervised", ids[prompt:]))
    lines = [f"first sample ({data.first_example.source}), {len(ids)} tokens"]
    for name, part in parts:
        lines += [f"  [{name}, {len(part)} tokens]", *_indented(str(data.tokenizer.decode(np.asarray(part).tolist())))]
    return lines


def _indented(text: str) -> Iterable[str]:
    return (f"    {line}" for line in text.splitlines())


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"
