"""tl6 whose layers share tensors in groups, which no method of the table does: exact at layouts, in files, in counts.

The model has five layers, which no number of stages here divides, and groups of layers cross the stages' boundaries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import marked
from support.engine_runs import SHORT, Layout, engine_json, prepare, run_and_check, settings_of
from support.forked_ranks import run_on_ranks
from support.gradient_worker import Case, run_gradients
from support.native_files import with_adapter
from support.oracle import OracleConfig, load_weights, merged_weights, oracle_logits
from support.oracle_adapter import ALL_TARGETS, Groups, OracleAdapter
from support.run_files import assert_same_run, metrics
from support.run_helpers import Base, run, write_base
from support.shared_tensors import DECLARED, GROUPS, share_tensors, tl6_shares
from support.tiny_models import write_tiny_model
from support.traffic_runs import run_cases, write_inputs
from test_group_steps import check_near, run_group_steps
from test_layout_resume import SAVED, Grid, assert_went_on, resumed
from test_parallel_gradients import Answers, check_messages, check_numbers, check_ties

from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import read_peft
from megatron_tiedlora.planning.report import dry_run_report

pytestmark = pytest.mark.distributed

WAYS = tuple(DECLARED)
# (tp, pp, dp) by ranks.
LAYOUTS = {2: [(1, 2, 1), (2, 1, 1)], 3: [(1, 3, 1)], 4: [(2, 2, 1), (1, 4, 1), (1, 2, 2)]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_layers": 5, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "vocab_size": 321}
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model", **shape)


def cases_of(model: Path, ranks: int, whole: bool) -> list[Case]:
    """Each way at each layout, with and without recompute and packing; in part one of these in turn."""
    choices: tuple[dict[str, Any], ...] = ({}, {"targets": ALL_TARGETS, "recompute": "full", "packed": True})
    return [
        Case(model, layout, shares=way, sequence_parallel=layout[0] > 1, **more)
        for turn, layout in enumerate(LAYOUTS[ranks])
        for number, way in enumerate(WAYS)
        for more in (choices if whole else choices[(turn + number) % 2 :][:1])
    ]


def test_groups_of_layers_cross_stages(model: Path) -> None:
    """No number of stages divides the layers, and some groups are on several stages, but for pairs on three stages."""
    for layout in (layout for some in LAYOUTS.values() for layout in some if layout[1] > 1):
        case = Case(model, layout)
        stages = [{layer for layer in range(1, 6) if layer in stage} for stage in case.stages]
        assert 5 % layout[1] and case.shape.heads.num_kv < case.shape.heads.num
        for way in WAYS:
            inside = [any(stage.issuperset(group) for stage in stages) for group in GROUPS[way]["A"]]
            assert all(inside) == (layout[1] == 3 and way == "pairs"), (layout, way, stages)


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_gradients_equal_the_oracle(model: Path, answers: Answers, tmp_path: Path, ranks: int, whole: bool) -> None:
    """Loss, logits and each gradient in fp64, and copies to the last bit; messages, where the rules of them hold."""
    cases = cases_of(model, ranks, whole)
    by_rank = run_on_ranks(run_gradients, cases, ranks=ranks, folder=tmp_path)
    for case, outcomes in zip(cases, zip(*by_rank, strict=True), strict=True):
        with tl6_shares(case.shares):
            check_numbers(case, list(outcomes), answers)
            check_ties(case, list(outcomes))
            if case.shares == "pairs":  # u is each layer's own
                check_messages(case, list(outcomes))


# Engines --------------------------------------------------------------------------------------------------------------


# By ranks: layouts with a ZeRO stage, 0 where adapters are stepped by our own optimizer.
ENGINES: dict[int, list[tuple[tuple[int, int, int], int]]] = {
    2: [((1, 1, 2), 0), ((2, 1, 1), 2), ((1, 1, 2), 3)],
    3: [((1, 3, 1), 1)],
    4: [((2, 2, 1), 1), ((2, 2, 1), 0), ((1, 4, 1), 1), ((1, 2, 2), 0), ((1, 2, 2), 1), ((2, 1, 2), 2)],
}


@pytest.mark.parametrize("ranks", ENGINES)
def test_engines_equal_the_oracle(model: Path, tmp_path: Path, ranks: int, whole: bool) -> None:
    """Steps in fp32 with each way to step adapters: our own, and DeepSpeed's ZeRO-1 to 3.

    Both ways of sharing at (2, 2, 1) under ZeRO-1, and in whole over three and four stages; one at each other layout.
    """
    base, prepared = {**settings_of(model, tmp_path), **SHORT}, []
    for turn, (sizes, zero) in enumerate(ENGINES[ranks]):
        both = zero == 1 and (sizes[2] == 1 if whole else sizes == (2, 2, 1))
        for way in WAYS if both else WAYS[turn % 2 :][:1]:
            optimizer = ("sgd", "adamw")[(turn + (way == "mixed")) % 2]
            engine = {"ds_config": str(engine_json(tmp_path, zero))}
            prepared.append(prepare(base, tmp_path, Layout(*sizes), optimizer=optimizer, shares=way, **engine))
    run_and_check(prepared, tmp_path)


@pytest.mark.parametrize("way", [pytest.param("pairs", marks=pytest.mark.slow), "mixed"])
def test_they_are_trained_beside_other_adapters(model: Path, tmp_path: Path, way: str) -> None:
    """At (2, 2, 1) in micro-batches with others, as in a run of its own."""
    base = {**settings_of(model, tmp_path), "max_steps": 3, "tensor_parallel": 2, "pipeline_parallel": 2}
    base |= {"ds_config": "zero0.json", "max_length": 256}
    own: dict[str, dict[str, Any]] = {"a": {"targets": "all"}, "b": {"method": "lora", "layers": (2, 3), "rank": 4}}
    own["c"] = {"method": "vera", "rank": 5}
    case = {"settings": {name: {**base, **some} for name, some in own.items()}, "shares": True, "alone": True}
    for (found,) in run_on_ranks(run_group_steps, [case], str(tmp_path), way, ranks=4, folder=tmp_path):
        assert found.most > 1 and not found.failures
        for name in own:
            check_near(found.together[name], found.alone[name], name)


# Commands and files ---------------------------------------------------------------------------------------------------


WRITER = Grid(2, 2, 1, zero=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"), num_layers=5, num_heads=8, num_kv_heads=4, head_dim=6)


@pytest.mark.cpu_seconds(20, reason="four starts of four ranks")
@pytest.mark.parametrize("way", [pytest.param("pairs", marks=pytest.mark.slow), "mixed"])
def test_runs_go_on_and_give_their_adapter(base: Base, tmp_path: Path, way: str) -> None:
    """A stopped run goes on bit for bit, and at another layout; the merged adapter is the oracle's."""
    shared, whole, stopped = partial(share_tensors, way), tmp_path / "whole", tmp_path / "stopped"
    run(base, whole, **WRITER.settings, prelude=shared)
    run(base, stopped, **WRITER.settings, prelude=partial(share_tensors, way, SAVED), expect=143)
    assert_same_run(resumed(base, stopped, tmp_path / "same", WRITER, prelude=shared), whole)
    other = Grid(1, 4, 1, zero=1) if way == "pairs" else Grid(1, 1, 2, zero=0)
    assert_went_on(resumed(base, stopped, tmp_path / "other", other, prelude=shared), whole)
    assert metrics(whole)[-1]["loss"] < metrics(whole)[0]["loss"]

    source = find_model(str(base.model))
    with tl6_shares(way):
        merge_adapter(source, load_native_adapter(whole / "adapter"), tmp_path / "merged")
    trained = OracleAdapter.from_folder(whole / "adapter", GROUPS[way])
    check_merged(base.model, tmp_path / "merged", trained)


def check_merged(base: Path, folder: Path, adapter: OracleAdapter) -> None:
    """A merged model is the oracle's, and each adapted layer has changed in its own way."""
    expected = merged_weights(load_weights(base), OracleConfig.from_folder(base), adapter)
    merged, plain = load_weights(folder), load_weights(base)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    changed = {name for name in merged if not torch.equal(merged[name], plain[name])}
    assert {int(name.split(".")[2]) + 1 for name in changed} == set(adapter.layers)


# By name: the way, the adapted layers, and their groups where these are not all layers.
FILES: dict[str, tuple[str, tuple[int, ...] | None, dict[str, Groups]]] = {
    "pairs": ("pairs", None, {}),
    "mixed": ("mixed", None, {}),
    "pairs of some layers": ("pairs", (1, 2, 4), dict.fromkeys("AB", ((1, 2), (4,)))),
    "one pair": ("pairs", (3, 4), dict.fromkeys("AB", ((3, 4),))),
}


@pytest.mark.parametrize("name", marked(FILES, {"pairs"}))
@torch.no_grad()
def test_files_compute_what_the_adapter_computes(model: Path, tmp_path: Path, name: str) -> None:
    """The native folder is read again; the merged model and PEFT's LoRA are the oracle's, and PEFT's gives it back."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    way, layers, groups = FILES[name]
    with tl6_shares(way):
        source, adapter, oracle = with_adapter(model, "tl6", layers, targets=ALL_TARGETS, groups=groups or GROUPS[way])
        save_adapter(tmp_path / "native", adapter)
        native = load_native_adapter(tmp_path / "native")
        assert native.equals(replace(adapter, base_identity=native.base_identity))
        merge_adapter(source, native, tmp_path / "merged")
        export_peft(source, native, tmp_path / "peft", native=tmp_path / "native")
        back = read_peft(tmp_path / "peft", source)
        assert back.native is not None and back.native.equals(native)
        untied = read_peft(tmp_path / "peft", source, tied=False)
    check_merged(model, tmp_path / "merged", oracle)
    assert untied.config.method == "lora"
    config = untied.config
    of_lora = OracleAdapter("lora", config.rank, config.alpha, config.layers, untied.state, ALL_TARGETS)
    merged = merged_weights(load_weights(model), OracleConfig.from_folder(model), of_lora)
    for weight, tensor in load_weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, merged[weight], rtol=1e-5, atol=1e-5, msg=weight)
    tokens = torch.randint(3, 320, (2, 20), generator=torch.Generator().manual_seed(11))
    expected = oracle_logits(load_weights(model), OracleConfig.from_folder(model), oracle, tokens)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "peft"))
    assert (peft(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


# Plans ----------------------------------------------------------------------------------------------------------------


BOTH = {"tensor_parallel": 2, "pipeline_parallel": 2}
PLANNED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp zero0": {"ds_config": "zero0.json"},
        "tp": {"tensor_parallel": 2},
        "pp zero0": {"pipeline_parallel": 2, "ds_config": "zero0.json"},
    },
    4: {
        "tp x pp": BOTH,
        "tp x pp zero0": {**BOTH, "ds_config": "zero0.json"},
        "pp": {"pipeline_parallel": 4},
        "tp x dp zero0": {"tensor_parallel": 2, "ds_config": "zero0.json"},
        "pp x dp zero0": {"pipeline_parallel": 2, "ds_config": "zero0.json"},
    },
}


@pytest.mark.parametrize("ranks", PLANNED)
def test_plans_count_what_is_sent_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, whole: bool
) -> None:
    """Every message and byte of ours on every rank, and the trained parameters of the dry run; in part of one way."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))
    inputs = {**write_inputs(tmp_path), "micro_batch_size": 4}  # five layers; rank 3, 32 inputs, 6 (8 + 4 + 4) outputs
    changes = {
        f"{name}, {way}": {**case, "shares": way}
        for turn, (name, case) in enumerate(PLANNED[ranks].items())
        for way in (WAYS if whole else WAYS[turn % 2 :][:1])
    }
    for name, found in run_cases(changes, inputs, tmp_path, ranks=ranks).items():
        way = name.rpartition(", ")[2]
        slots = {"pairs": (3, 3, 5, 5), "mixed": (3, 2, 1, 3)}[way]
        sizes = [number * size for number, size in zip(slots, (3 * 32, 96 * 3, 3, 96), strict=True)]
        with tl6_shares(way):
            for rank in range(ranks):
                found.check(rank)
            assert list(found.plan(0).adapter.num_trained().values()) == sizes
            text = dry_run_report(make_settings(found.case.settings), launched_ranks=ranks).text
        assert f"{sum(sizes):,}" in text, text
