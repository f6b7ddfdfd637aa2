"""The bytes that a block of each family keeps are those of the dry run's formula, to the byte."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from family_models import FAMILY_MODELS
from forked_ranks import groups_of, run_on_ranks
from saved_bytes import saved_bytes_per_token
from tiny_models import write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.adapters.tying import sum_of_u
from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.fp8_products import weight_maker
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, TensorParallel
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.passes import saved_per_token

DTYPES, RECOMPUTES = (torch.float32, torch.bfloat16), ("none", "selective")


def _counted_and_planned(folders: list[str], tp_size: int) -> list[tuple[float, float]]:
    """Of each model, in both dtypes, with both kinds of recompute and with a base of each format."""
    found = []
    rank = torch.distributed.get_rank() if tp_size > 1 else 0
    groups = groups_of(Grid(rank, tp_size, tp_size=tp_size)) if tp_size > 1 else ParallelGroups()
    for folder in folders:
        shape = find_model(folder).shape
        adapter = make_adapter_config("tl6", rank=3, layers=(1, 2), targets=targets_of(shape), seed=1)
        for dtype in DTYPES:
            for recompute, base in product(RECOMPUTES, (None, *BASE_FORMATS)):
                specs = layer_specs(
                    shape,
                    dtype=dtype,
                    tp_size=tp_size,
                    recomputes_gate=recompute == "selective",
                    make_weight=weight_maker(base),
                )
                part = TiedAdapter(AdapterPart(adapter, (1, 2), rank, tp_size))
                part.u_sum = sum_of_u(groups) if tp_size > 1 else None
                stage = Stage(specs, part, tensor_parallel=TensorParallel(groups.tensor, tp_size > 1))
                layout = Layout(
                    (adapter,), length=256, tp_size=tp_size, dtype=dtype, recompute=recompute, base_format=base
                )
                found.append((saved_bytes_per_token(stage, dtype), saved_per_token(shape, layout)))
    return found


@pytest.mark.distributed
def test_kept_bytes_are_the_formula_s(tmp_path: Path) -> None:
    folders = [
        str(write_tiny_model(tmp_path / name, tokenizer=False, **{**FAMILY_MODELS[name], "num_layers": 2}))
        for name in ("qwen3", "qwen3 mha", "stablelm", "phi3", "olmo2")
    ]
    alone = _counted_and_planned(folders, 1)
    ranks = run_on_ranks(_counted_and_planned, folders, 2, ranks=2, folder=tmp_path / "ranks")
    for counted, planned in (*alone, *ranks[0], *ranks[1]):
        assert counted == planned


@pytest.mark.parametrize(("targets", "more"), [(("qkv",), 0), (("qkv", "gate_up"), 32 + 3)])
def test_bytes_of_norms_behind_the_linears_by_hand(tmp_path: Path, targets: tuple[str, ...], more: int) -> None:
    """A linear without a norm before it keeps its input for its A alone, and a norm of all heads two numbers."""
    shape = find_model(str(write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=2, family="olmo2"))).shape
    adapter = make_adapter_config("tl6", rank=3, layers=(1, 2), targets=targets_of(shape, targets), seed=1)
    stage = Stage(layer_specs(shape, dtype=torch.float32), TiedAdapter(AdapterPart.whole(adapter)))
    d, f, queries, keys, heads = 32, 48, 32, 16, 4
    attention = d + 3 + (queries + 2 * keys + 2) + (queries + heads)  # input and A x; heads and roots; what it keeps
    mlp = more + 2 * f
    assert saved_bytes_per_token(stage, torch.float32) == 4 * (attention + (d + 1) + mlp + (d + 1))
