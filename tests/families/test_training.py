"""Families with arithmetic of their own, at layouts: logits against transformers, and training against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_runs import SHORT, Layout, Prepared, engine_json, prepare, run_and_check, settings_of
from support.forked_ranks import run_on_ranks
from support.oracle_adapter import ALL_TARGETS
from support.peft_models import greedy_tokens, hf_model
from support.quantised_models import with_values
from support.tiny_decoders import build
from support.tiny_models import EOS_ID, FAMILY_MODELS, LATER_FAMILIES, write_tiny_model

from megatron_tiedlora.evaluation.decoder import AdapterRows, Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, generate
from megatron_tiedlora.parallel.groups import Grid

pytestmark = pytest.mark.distributed

PROMPTS = [[5, 17, 300, 44, 8, 201, 9], [77], list(range(3, 27))]

# Biases on q, k and v alone; norms of heads; LayerNorms, and part of a head rotated; fused tensors; unrotated layers;
# norms of all heads, and norms after attention and MLP; two rotations.
OLD = ("qwen2", "qwen3", "stablelm", "phi3", "smollm3", "olmo2", "olmo3")
# The later ones have norms with an offset, GELU and a scaled embedding; caps; norms of heads with an offset, and a
# window's own rotation; multipliers; neighbours rotated together; the text towers of two multimodal models.
NAMES = OLD + LATER_FAMILIES


def _decoder(folder: str, tp: int, pp: int) -> Decoder:
    return build(Path(folder), grid=Grid(torch.distributed.get_rank(), tp * pp, tp_size=tp, pp_size=pp), adapted=False)


def _decoded(folders: list[str], tp: int, pp: int) -> list[list[list[int]]]:
    """What each model answers to the prompts."""
    given = Prompts(PROMPTS, [RowSettings((EOS_ID,), 16)] * len(PROMPTS))
    return [generate(_decoder(folder, tp, pp), [given])[0] for folder in folders]


def _logits(folders: list[str], tp: int, pp: int) -> list[torch.Tensor | None]:
    """Those of each model, on the last stage."""
    tokens, logits = _tokens(), []
    for folder in folders:
        decoder = _decoder(folder, tp, pp)
        found = decoder.forward([AdapterRows(tokens, torch.arange(32).expand_as(tokens), decoder.new_caches(2, 32))])
        decoder.finish()
        logits.append(None if found is None else found.view(*tokens.shape, -1))
    return logits


def _tokens() -> torch.Tensor:
    return torch.randint(3, 320, (2, 32), generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks_compute_what_transformers_does(tmp_path: Path, tp: int, pp: int) -> None:
    """Every family, in one start."""
    shapes = {name: {**FAMILY_MODELS[name], "num_layers": 5, "tied": pp > 1} for name in (*NAMES, "mistral")}
    folders = {name: write_tiny_model(tmp_path / name, **shape) for name, shape in shapes.items()}
    arguments = [str(folder) for folder in folders.values()], tp, pp
    found = run_on_ranks(_logits, *arguments, ranks=tp * pp, folder=tmp_path / "ranks")[-1]
    for (name, folder), ours in zip(folders.items(), found, strict=True):
        expected = hf_model(folder, torch.float64)(_tokens()).logits.detach()
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_ranks_decode_the_tokens_of_transformers(tmp_path: Path) -> None:
    """With the cache, at (2, 2, 1), where the norms of all heads are summed over ranks token by token.

    Answers go beyond the windows.
    """
    names = ("olmo2", "olmo3", "gemma2", "gemma3")
    folders = [write_tiny_model(tmp_path / name, **{**FAMILY_MODELS[name], "num_layers": 5}) for name in names]
    models = [hf_model(folder, torch.float64) for folder in folders]
    wanted = [[greedy_tokens(model, prompt, 16, eos=EOS_ID) for prompt in PROMPTS] for model in models]
    given = [str(folder) for folder in folders]
    assert run_on_ranks(_decoded, given, 2, 2, ranks=4, folder=tmp_path / "ranks") == [wanted] * 4


def _base(tmp_path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """A folder for a family's files, and settings of a short run of it."""
    shape, folder = {"num_layers": 5, "num_heads": 8, "num_kv_heads": 4, **FAMILY_MODELS[name]}, tmp_path / name
    return folder, {**settings_of(write_tiny_model(folder / "model", **shape), folder), **SHORT, "max_length": 64}


# By the number of ranks: (tensor, pipeline, data), and what else is set.
RUNS: dict[int, list[tuple[Layout, dict[str, Any]]]] = {
    2: [
        (Layout(2, 1, 1), {"sequence_parallel": False}),
        (Layout(2, 1, 1), {"recompute": "selective"}),
        (Layout(1, 2, 1), {}),
        (Layout(1, 1, 2), {"zero": 3}),
    ],
    4: [(Layout(2, 2, 1), {"sequence_parallel": False, "recompute": "full"}), (Layout(2, 2, 1), {})],
}


@pytest.mark.cpu_seconds(20, reason="every family at one layout beside the oracle, in one start")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", RUNS)
def test_runs_are_the_oracle_s(tmp_path: Path, ranks: int, whole: bool) -> None:
    """Losses, clipped norms and adapters of every family at every layout.

    In part each is at one layout of two ranks and one of four, and every third under ZeRO-3; without families that
    compute what another one does.

    In two steps: what a third one does, without the checks of the first two, depends on no family. All gradients are
    compared at all of these layouts in tests/layouts/test_parallel_gradients.py.
    """
    prepared = []
    left_out = {"phi3"} if whole else {"phi3", "gemma", "gemma3_text", "mistral3", "glm", "ministral3"}
    for number, name in enumerate(name for name in NAMES if name not in left_out):
        folder, base = _base(tmp_path, name)
        for turn, (layout, changes) in enumerate(RUNS[ranks]):
            if not whole and turn != number % len(RUNS[ranks]) and (number % 3 or "zero" not in changes):
                continue
            own = dict(changes)
            own |= {"ds_config": str(engine_json(folder, own.pop("zero")))} if "zero" in own else {}
            prepared.append(prepare(base, folder, layout, **own))
    run_and_check(prepared, tmp_path)


@pytest.mark.timeout(600)
def test_every_linear_learns_what_the_oracle_s_does(tmp_path: Path, whole: bool) -> None:
    """tl6 and LoRA on all linears at TP 2 x PP 2: ten steps of each new family, and once on a base in NF4.

    In part, two steps of one family by each method, the second on a base in NF4.
    """
    prepared = list[Prepared]()
    for name in LATER_FAMILIES if whole else ("gemma2", "gemma3"):
        folder, base = _base(tmp_path, name)
        given = base | {"targets": list(ALL_TARGETS), **({"max_steps": 10} if whole else {})}
        for method in ("tl6", "lora") if whole else ("lora" if name == "gemma2" else "tl6",):
            changes: dict[str, Any] = {"method": method}
            if (name, method) == ("gemma3", "tl6"):
                values = with_values(folder / "model", folder / "values", "nf4")
                changes |= {"base": "nf4", "oracle_model": values}
            prepared.append(prepare(given, folder, Layout(2, 2, 1), **changes))
    run_and_check(prepared, tmp_path)
