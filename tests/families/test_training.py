"""Families with arithmetic of their own, at layouts: logits against transformers, and training against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import FAMILY_MODELS
from forked_ranks import groups_of, run_on_ranks
from layout_runs import Layout, engine_json, prepare, run_and_check, settings_of
from tiny_models import EOS_ID, write_tiny_model

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation.generate import AdapterRows, Decoder, Prompts, generate
from megatron_tiedlora.model.partition import layer_costs, partition
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups

pytestmark = pytest.mark.distributed

PROMPTS = [[5, 17, 300, 44, 8, 201, 9], [77], list(range(3, 27))]

# Biases on q, k and v alone; norms of heads; LayerNorms, and part of a head rotated; fused tensors; unrotated layers;
# norms of all heads, and norms after attention and MLP; two rotations.
NAMES = ("qwen2", "qwen3", "stablelm", "phi3", "smollm3", "olmo2", "olmo3")


def _decoder(folder: str, tp: int, pp: int) -> Decoder:
    grid = Grid(torch.distributed.get_rank(), tp * pp, tp_size=tp, pp_size=pp)
    source, groups = find_model(folder), groups_of(grid) if tp * pp > 1 else ParallelGroups()
    stages = partition(layer_costs(source.shape, length=32, first_adapted=1), pp)
    stage = load_model(source, None, dtype=torch.float32, grid=grid, groups=groups, stages=stages)
    return Decoder(stage, groups, source.shape)


def _decoded(folder: str, tp: int, pp: int) -> list[list[int]]:
    return generate(_decoder(folder, tp, pp), [Prompts(PROMPTS, (EOS_ID,), 16)])[0]


def _logits(folder: str, tp: int, pp: int) -> torch.Tensor | None:
    decoder = _decoder(folder, tp, pp)
    tokens = _tokens()
    found = decoder.forward([AdapterRows(tokens, torch.arange(32).expand_as(tokens), decoder.new_caches(2, 32))])
    decoder.finish()
    return None if found is None else found.view(*tokens.shape, -1)


def _tokens() -> torch.Tensor:
    return torch.randint(3, 320, (2, 32), generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_compute_what_transformers_does(tmp_path: Path, name: str, tp: int, pp: int) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "model", **{**FAMILY_MODELS[name], "num_layers": 5, "tied": pp > 1})
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(_tokens()).logits.detach()
    found = run_on_ranks(_logits, str(folder), tp, pp, ranks=tp * pp, folder=tmp_path / "ranks")[-1]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["olmo2", "olmo3"])
def test_ranks_decode_the_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    """With the cache, at (2, 2, 1), where the norms of all heads are summed over ranks token by token."""
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "model", **{**FAMILY_MODELS[name], "num_layers": 5})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": EOS_ID}
        row = theirs.generate(ids, max_new_tokens=16, **more)[0, len(prompt) :].tolist()
        wanted.append(row[: row.index(EOS_ID)] if EOS_ID in row else row)
    assert run_on_ranks(_decoded, str(folder), 2, 2, ranks=4, folder=tmp_path / "ranks") == [wanted] * 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "stablelm", "smollm3", "olmo2", "olmo3"])
def test_runs_are_the_oracle_s(tmp_path: Path, name: str) -> None:
    """Losses, clipped norms and adapters at (2, 1, 1), (1, 2, 1) and (2, 2, 1), with and without sequence parallelism.

    Selective and full recompute occur at one layout each, and so does ZeRO-3. In two steps: what a third one does,
    without the checks of the first two, depends on no family.
    """
    shape = {"num_layers": 5, "num_heads": 8, "num_kv_heads": 4, **FAMILY_MODELS[name]}
    model = write_tiny_model(tmp_path / "model", **shape)
    base = {**settings_of(model, tmp_path), "max_steps": 2, "max_length": 64}
    oracles: dict[Any, Any] = {}

    def run(*layouts: tuple[tuple[int, int, int], dict[str, Any]]) -> None:
        cases = [prepare(base, tmp_path, Layout(*sizes), oracles=oracles, **more) for sizes, more in layouts]
        folder = tmp_path / str(cases[0].layout.ranks)
        folder.mkdir()
        run_and_check(cases, folder)

    if name != "olmo3":  # whose layers differ from OLMo 2's only in the rotation
        run(
            ((2, 1, 1), {"sequence_parallel": False}),
            ((2, 1, 1), {"sequence_parallel": True, "recompute": "selective"}),
            ((1, 2, 1), {}),
            ((1, 1, 2), {"ds_config": str(engine_json(tmp_path, 3))}),
        )
    if name in ("qwen3", "stablelm", "olmo2", "olmo3"):
        run(((2, 2, 1), {"sequence_parallel": False, "recompute": "full"}), ((2, 2, 1), {"sequence_parallel": True}))
