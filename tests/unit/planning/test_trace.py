"""Traces: counts of small micro-batches give those of all sizes, and recompute adds what it computes again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config, targets_of
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import OUTPUT, QKV, TARGET_NAMES
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, plan_stages
from megatron_tiedlora.planning.passes import stage_work
from megatron_tiedlora.planning.trace import Kind, Sizes, Trace, Tracer

SHAPE = shape_from_hf({**PRESETS["llama2-70b"], "num_hidden_layers": 4})
PARALLEL = [(1, False), (4, False), (4, True)]
RECOMPUTES = ("none", "selective", "full")


def adapter(method: str, rank: int, *names: str, layers: tuple[int, ...] = (1, 2, 3, 4)) -> AdapterConfig:
    return make_adapter_config(method, rank=rank, layers=layers, targets=targets_of(SHAPE, names), seed=0)


ADAPTERS = {
    "qkv": adapter("tl6", 8, QKV),
    "all": adapter("lora", 3, *TARGET_NAMES),
    "frozen A and B": adapter("vera", 5, *TARGET_NAMES),
    "output alone": adapter("tl5", 4, OUTPUT),
    "none": None,
}


def numbers(trace: Trace) -> dict[Any, float]:
    """Everything that a trace says, but for the moments' kernels."""
    found: dict[Any, float] = {("forward", key): count for key, count in trace.forward.items()}
    found |= {("backward", key): count for key, count in trace.backward.items()}
    found |= {"saved": trace.saved, "kept": trace.kept, "gradients": trace.gradients}
    for number, moments in enumerate(trace.moments):
        found[number, "peak"] = max((moment.alive for moment in moments), default=0)
    return {key: count for key, count in found.items() if count}


def ways() -> Iterator[Any]:
    """All kinds of recompute in all groups, by default a third of them."""
    for (i, recompute), (j, parallel) in product(enumerate(RECOMPUTES), enumerate(PARALLEL)):
        yield pytest.param(*parallel, recompute, marks=[pytest.mark.slow] if (i + j) % 3 else [])


@pytest.mark.parametrize(("tp_size", "sequence_parallel", "recompute"), list(ways()))
def test_a_few_traces_give_all_sizes(tp_size: int, sequence_parallel: bool, recompute: str) -> None:
    """Against traces of the sizes themselves; rows of logits are one part, several, and several with a rest."""
    tracer = Tracer(SHAPE, dtype=torch.bfloat16, tp_size=tp_size, sequence_parallel=sequence_parallel)
    sizes = [Sizes((1024,), (512,), 512, 1024), Sizes((64,), (64,), 64, 16), Sizes((512,), (96,), 72, 32)]
    for config, earlier, ends in product(ADAPTERS.values(), (True, False), (True, False)):
        if not earlier and config is None:
            continue  # it has no backward pass
        kind = Kind((config and config.of_one_layer,), earlier, ends)
        for some in sizes:
            wanted = numbers(tracer.trace(kind, some, recompute=recompute))
            assert numbers(tracer.at(kind, some, recompute=recompute)) == pytest.approx(wanted, rel=1e-9), (kind, some)


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), PARALLEL)
@pytest.mark.parametrize("name", [name for name, config in ADAPTERS.items() if config is not None])
def test_recompute_adds_what_it_computes_again(name: str, tp_size: int, sequence_parallel: bool) -> None:
    """Nothing else: both passes without it are the same, and it never takes anything away."""
    batch = MicroBatchShape((0,), (512,), (224,), 200, (512,))
    config = ADAPTERS[name]
    assert config is not None
    layout = Layout((config,), length=512, tp_size=tp_size, shards_sequences=sequence_parallel)
    works = {}
    for recompute in RECOMPUTES:
        (stage,) = plan_stages(SHAPE, replace(layout, recompute=recompute))
        works[recompute] = stage_work(stage, batch)
    assert not any(works["none"].again.values())
    for recompute in RECOMPUTES:
        assert works[recompute].forward == works["none"].forward
        assert works[recompute].backward == works["none"].backward
        again = works[recompute].again
        amounts = [count for key, count in again.items() if isinstance(key, str)]
        assert min([*amounts, *again.sent.messages.values(), *again.sent.bytes.values()]) >= 0
    gate_up = 2 * 512 * SHAPE.block.gate_up.num_weights / tp_size
    assert works["selective"].again["linears"] == pytest.approx(3 * gate_up)  # nothing behind the last attention
    in_blocks = 2 * 512 * SHAPE.block.num_weights / tp_size
    of_last = 2 * 512 * SHAPE.block.qkv.num_weights / tp_size
    # of the last block only its QKV, as nothing behind the last attention is recomputed
    assert works["full"].again["linears"] == pytest.approx(3 * in_blocks + of_last)


def test_a_kernel_counts_as_one_operation() -> None:
    """A frozen block in bf16 at TP 1: what norm, rotation, gate and residuals read and write, by hand."""
    tracer = Tracer(SHAPE, dtype=torch.bfloat16)
    found = tracer.trace(Kind((None,), earlier=True), Sizes((256,), (8,), 8, 8))
    d, o, g = SHAPE.hidden_size, sum(SHAPE.heads.rows), 2 * SHAPE.intermediate_size
    # a norm; one with a sum of two tensors; the last sum; rotation; gate; and fp32 roots, cos and sin, norms' weights
    beside = 2 * (4 * 256 + 2 * d) + 2 * 2 * 256 * SHAPE.heads.dim // 2
    assert found.forward["moved"] == 256 * 2 * (2 * d + 4 * d + 3 * d + 2 * o + 1.5 * g) + beside
    assert "messages" not in {key[0] for key in found.forward if isinstance(key, tuple)}


@pytest.mark.parametrize("name", ["none", "qkv", "all"])
def test_kernels_that_round_save_bytes(name: str) -> None:
    """They write a byte and read none for a number, and no 16-bit copy without an update; the rest is rounded alone."""
    config = ADAPTERS[name]
    kind, sizes = Kind((config and config.of_one_layer,), earlier=True), Sizes((256,), (8,), 8, 8)
    plain, found = (Tracer(SHAPE, dtype=torch.bfloat16, rounds=rounds).trace(kind, sizes) for rounds in (False, True))
    d, o, f = SHAPE.hidden_size, SHAPE.heads.num * SHAPE.heads.dim, SHAPE.intermediate_size
    copies = {"none": 2 * d + f, "qkv": d + f, "all": 0}[name]
    more = found.forward["moved"] - plain.forward["moved"]
    assert more == 256 * (2 * d + f - 2 * copies) + 3 * 4 * 256  # and the scales
    gate_up = 0 if name == "all" else 2 * f
    more = found.backward["moved"] - plain.backward["moved"]
    assert more == 256 * (2 * f - 2 * gate_up) + 4 * 256 + 4 * 2 * f  # and the factors of gradients
    assert plain.forward["rounded"] - found.forward["rounded"] == 256 * (2 * d + f)
    assert plain.backward["rounded_back"] - found.backward["rounded_back"] == 256 * 2 * f
    assert found.forward["rounded"] == 256 * o


def test_what_the_garbage_collector_ends_is_not_counted() -> None:
    """An engine of DeepSpeed runs operations when it is deleted, and the collector may delete it at any moment."""

    class Ending:
        def __init__(self) -> None:
            self.itself, self.tensor = self, torch.zeros(1)

        def __del__(self) -> None:
            self.tensor.add_(1)

    class Leaving(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Ending()
            return func(*args, **(kwargs or {}))

    kind, sizes = Kind((ADAPTERS["qkv"].of_one_layer,), earlier=True), Sizes((256,), (8,), 8, 8)  # type: ignore[union-attr]
    wanted = Tracer(SHAPE, dtype=torch.float32).trace(kind, sizes)
    tracer = Tracer(SHAPE, dtype=torch.float32)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with Leaving():
            assert tracer.trace(kind, sizes) == wanted
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)


def test_the_last_rows_of_logits_need_no_more_than_the_first() -> None:
    """At the loss rows of logits are in memory for some positions at a time; the peak is that of the first ones."""
    tracer = Tracer(SHAPE, dtype=torch.bfloat16)
    kind = Kind((ADAPTERS["qkv"].of_one_layer,), earlier=True, ends=True)  # type: ignore[union-attr]
    peaks = []
    for rows in (1024, 4096, 8192):
        forward, _ = tracer.at(kind, Sizes((8192,), (8192,), rows, 1024), recompute="none").moments
        peaks.append(max(moment.alive for moment in forward if moment.kernel and moment.kernel.name == "exp_logits_"))
    grown = 4096 * SHAPE.hidden_size * 2 * 2 + 4096 * 8  # the rows, their gradient and their labels
    assert peaks[2] - peaks[1] == pytest.approx(grown)
