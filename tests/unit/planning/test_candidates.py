"""Every layout that a run accepts is enumerated, and no other: `plan_run` is asked about each by itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from support.planned import H100, THREE, group_of, searched, short, words_of_a_plan, words_of_a_run

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.job_settings import parse_plan
from megatron_tiedlora.model.hf_config import BITSANDBYTES, FBGEMM, StoredFormat
from megatron_tiedlora.planning.cluster_report import hint_lines, plan_cluster, report_lines
from megatron_tiedlora.planning.layout import Layout, Storage
from megatron_tiedlora.planning.machines import GPUS
from megatron_tiedlora.planning.search import ENGINE_FILES, RECOMPUTES, STORAGES, divisors

SOURCE = short("qwen3-8b", 3)
BATCH = 12


@pytest.mark.parametrize(
    "asked", [pytest.param(None, marks=pytest.mark.slow, id="all"), pytest.param(250, id="250 of them")]
)
@pytest.mark.parametrize(
    ("adapters", "source", "ranks", "per_node", "storages"),
    [("", SOURCE, 12, 4, STORAGES), (THREE, short("llama2-7b", 6), 6, 2, (STORAGES[0], STORAGES[3]))],
    ids=["one adapter", "three adapters"],
)
def test_what_is_enumerated_is_what_a_run_accepts(
    tmp_path: Path,
    adapters: str,
    source: ModelSource,
    ranks: int,
    per_node: int,
    storages: tuple[Storage, ...],
    asked: int | None,
) -> None:
    """The full product of all choices; a run is asked about each, or some. Groups over nodes are not asked for.

    Rows divide each adapter's share of its batch: 12 samples are the most that divide 12, and 24, 36 and 48.
    """
    given: dict[str, Any] = {"global_batch_size": BATCH, "max_length": 512}
    if adapters:
        (tmp_path / "three.yaml").write_text(adapters)
        given |= {"global_batch_size": 3 * BATCH, "adapters": str(tmp_path / "three.yaml")}
    flags = [f"--{name}={value}" for name, value in given.items()]
    formats = f"--formats={','.join(storage.name for storage in storages)}"
    found = searched(*flags, formats, source=source, ranks=ranks, per_node=per_node)
    accepted, refused, keys = dict[Any, Layout](), Counter[str](), []
    for tp, pp in ((t, p) for t in divisors(ranks) for p in divisors(ranks) if ranks % (t * p) == 0):
        sizes = divisors(BATCH // (ranks // (tp * pp)))
        for file, storage, rows, recompute in product(ENGINE_FILES, storages, sizes, RECOMPUTES):
            for shards in [True, False] if tp > 1 else [True]:
                keys.append((file, storage, tp, pp, rows, recompute, shards))
    sample = random.Random(36).sample(keys, asked or len(keys))
    for key in sample:
        file, storage, tp, pp, rows, recompute, shards = key
        choices = {"tensor_parallel": tp, "pipeline_parallel": pp, "ds_config": file, "micro_batch_size": rows}
        choices |= {"recompute": recompute, "sequence_parallel": shards, **storage._asdict()}
        try:
            if per_node % tp:
                raise UserError("over nodes")
            accepted[key] = group_of(source, ranks, **given, **choices).layout
        except UserError as error:
            refused[str(error)] += 1
    mine = {
        (c.engine_file, c.storage, *sizes_of(c.layout), c.layout.recompute, c.layout.shards_sequences): c.layout
        for c in found.candidates
    }
    assert len(mine) == len(found.candidates) > 200 and found.enumerated == len(keys)
    assert len({candidate.name for candidate in found.candidates}) == len(found.candidates)
    assert any("ZeRO-1 clips the gradients of all adapters together" in words for words in refused) == bool(adapters)
    if asked:
        assert {key: layout for key, layout in mine.items() if key in sample} == accepted
        assert len(accepted) > 20 < refused.total()
        return
    assert mine == accepted
    theirs = Counter[str]()
    for words, number in found.refused.items():
        theirs["over nodes" if "span nodes" in words else words] += number
    assert theirs == refused and len(refused) > 4


def sizes_of(layout: Layout) -> tuple[int, int, int]:
    return layout.tp_size, layout.pp_size, layout.rows


def test_a_flag_leaves_one_value() -> None:
    flags = ("--tensor_parallel=2", "--recompute=full", "--ds_config=zero1.json", "--base=nf4", "--micro_batch_size=2")
    found = searched(*flags, f"--global_batch_size={BATCH}", source=SOURCE, ranks=4)
    assert {sizes_of(c.layout) for c in found.candidates} == {(2, 1, 2), (2, 2, 2)}
    assert {(c.layout.recompute, c.engine_file, c.storage.name) for c in found.candidates} == {
        ("full", "zero1.json", "nf4")
    }
    # --base fp8 leaves its products open
    fp8 = searched("--base=fp8", source=SOURCE, ranks=1)
    assert {c.storage.name for c in fp8.candidates} == {"fp8", "fp8-products", "fp8-transposed"}


def test_tensor_parallelism_spans_nodes_only_if_it_is_asked_for() -> None:
    found = searched("--formats=none", source=SOURCE, ranks=8, per_node=2)
    assert {c.layout.tp_size for c in found.candidates} == {1, 2}
    asked_for = searched("--formats=none", "--tensor_parallel=4", source=SOURCE, ranks=8, per_node=2)
    assert {c.layout.tp_size for c in asked_for.candidates} == {4}


def test_a_card_without_fp8_refuses_it_in_the_words_of_a_run() -> None:
    found = searched(source=SOURCE, ranks=1, machine=GPUS["a100-80"])
    assert {c.storage.name for c in found.candidates} == {"none", "int8", "fp8", "nf4"}
    (words,) = found.refused
    assert words.startswith("--products fp8 needs a GPU of compute capability 8.9 or more, but A100 80GB has 8.0")
    assert H100.capability is not None and H100.capability >= (8, 9)


def test_a_model_that_is_stored_quantised_has_one_format() -> None:
    """Its own: it is never in 16 bits, so nothing says what those would need or how fast they would be."""
    flags, own = (f"--global_batch_size={BATCH}", "--max_length=512"), StoredFormat(BITSANDBYTES, "nf4")
    stored = replace(SOURCE, stored=own)
    for more in ((), ("--base=nf4",), ("--formats=nf4,int8",)):
        found = searched(*flags, *more, source=stored, ranks=1)
        assert {c.storage.name for c in found.candidates} == {"nf4"} and not found.refused
    assert found.rows and not any("changes the base" in line for line in hint_lines(found))
    fp8 = searched(*flags, source=replace(SOURCE, stored=StoredFormat(FBGEMM, "fp8")), ranks=1)
    assert {c.storage.name for c in fp8.candidates} == {"fp8", "fp8-products", "fp8-transposed"}
    with pytest.raises(UserError, match=r"^--formats none,int8: .* already has its weights in nf4 .*. Give nf4, or"):
        searched(*flags, "--formats=int8,none", source=stored, ranks=1)
    with pytest.raises(UserError, match=r"^--base int8: the weights of qwen3-8b are already in nf4"):
        searched(*flags, "--base=int8", source=stored, ranks=1)


def test_nothing_is_said_of_16_bits_that_were_not_compared() -> None:
    found = searched("--formats=nf4", f"--global_batch_size={BATCH}", source=SOURCE, ranks=1)
    text = "".join(hint_lines(found))
    assert "nf4 changes the base" in text and "in 16 bits nothing fits" not in text


# Contradictions -----------------------------------------------------------------------------------------------------

# One layout of four ranks, so that a plan has no other way out than a run.
PINNED = {
    "tensor_parallel": "2",
    "pipeline_parallel": "2",
    "sequence_parallel": "true",
    "ds_config": "zero1.json",
    "micro_batch_size": "1",
    "recompute": "none",
    "global_batch_size": "8",
    "max_length": "512",
}
VALUES: dict[str, tuple[str, ...]] = {
    "tensor_parallel": ("3", "4"),
    "pipeline_parallel": ("1", "4", "64"),
    "ds_config": ("zero0.json", "zero2.json", "zero3.json", "nosuch.json"),
    "micro_batch_size": ("3", "8"),
    "global_batch_size": ("7", "16"),
    "max_length": ("8192", "4"),
    "recompute": ("full", "some"),
    "sequence_parallel": ("false",),
    "base": ("nf4", "fp8", "int4"),
    "products": ("fp8",),
    "keep_transposed": ("true",),
    "epochs": ("2",),
    "max_steps": ("10",),
    "warmup_steps": ("20",),
    "layers": ("1,2", "40"),
    "targets": ("all", "q_proj"),
    "rank": ("0", "16"),
    "method": ("lora", "none"),
    "dtype": ("fp32",),
    "profile": ("3:5", "5:3"),
    "resume": ("auto",),
    "take_over": ("true",),
    "eval_samples": ("4",),
    "eval_metric": ("rouge",),
    "max_new_tokens": ("100000",),
}


# Those of a run of several adapters, and the files of their adapters.
TOGETHER: dict[str, tuple[str, ...]] = {
    "tensor_parallel": ("3", "4"),
    "pipeline_parallel": ("1", "64"),
    "ds_config": ("zero0.json", "zero1.json", "zero2.json", "zero3.json", "nosuch.json"),
    "micro_batch_size": ("3", "8"),
    "global_batch_size": ("7", "16"),
    "base": ("nf4", "int4"),
    "products": ("fp8",),
    "layers": ("1,2", "40"),
    "rank": ("0",),
    "resume": ("auto", "runs/one"),
    "report_to": ("wandb",),
    "halving": ("true",),
    "share_micro_batches": ("false",),
    "eval_metric": ("rouge",),
    "profile": ("5:3",),
    "adapters": ("layers", "batch", "of all", "task", "twice", "none"),
}
ENTRIES = {
    "two": "- name: a\n- name: b\n  rank: 16\n",
    "layers": "- name: a\n- name: b\n  layers: 50\n",
    "batch": "- name: a\n- name: b\n  global_batch_size: 9\n",
    "of all": "- name: a\n- name: b\n  dtype: fp32\n",
    "task": "- name: a\n- name: b\n  task: samsum\n",
    "twice": "- name: a\n- name: A\n",
    "none": "[]\n",
}


@pytest.mark.parametrize("part", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(4, id="a quarter")])
@pytest.mark.parametrize(
    ("pinned", "choices", "least"),
    [(PINNED, VALUES, 400), ({**PINNED, "ds_config": "zero0.json", "adapters": "two"}, TOGETHER, 200)],
    ids=["one adapter", "adapters"],
)
def test_a_plan_refuses_what_a_run_refuses(
    tmp_path: Path, pinned: Mapping[str, str], choices: Mapping[str, tuple[str, ...]], least: int, part: int
) -> None:
    """Over all pairs of flags and their values, or a sample of these, in the same words."""
    for name, text in ENTRIES.items():
        (tmp_path / name).write_text(text)
    values = [(name, value) for name, options in choices.items() for value in options]
    refused, pairs = 0, [*combinations(values, 2)]
    for pair in random.Random(36).sample(pairs, len(pairs) // part):
        given = {**pinned, **dict(pair)}
        if "adapters" in given:
            given["adapters"] = str(tmp_path / given["adapters"])
        flags = ["--model=llama2-7b", *(f"--{name}={value}" for name, value in given.items())]
        expected, found = words_of_a_run(flags), words_of_a_plan(flags)
        assert found == expected, pair
        refused += bool(expected)
    assert refused > least / part * 0.9  # a sample has a little less now and then


@pytest.mark.parametrize(
    "flag", ["--tensor_parallel=3", "--pipeline_parallel=5", "--tensor_parallel=64", "--pipeline_parallel=3"]
)
def test_one_size_alone_is_refused_in_the_words_of_a_run(flag: str) -> None:
    flags = ["--model=llama2-7b", "--max_length=512", "--global_batch_size=8", flag]
    expected = words_of_a_run(flags)
    assert expected and words_of_a_plan(flags) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dry_run"], "--dry_run is not for a plan"),
        (["--world_size=4", "--dry_run"], "is not for a plan"),
        (["--gpu=h1000"], "--gpu h1000: input should be one of .*did you mean h100"),
        (["--ranks_on_cpu=2", "--nodes=2"], "--ranks_on_cpu 2 plans for this machine's CPUs; remove --nodes"),
        (["--constants=c.json", "--gpu=h100"], "--constants c.json and --gpu h100 both describe the cards"),
        (["--constants=nosuch.json"], "nosuch.json"),
        (["--formats=int3"], "--formats int3: input should be one of .*did you mean int8"),
        (["--formats=int8", "--base=nf4"], "^--formats int8 and --base nf4: none of these formats stores"),
        (["--nodes=0"], "--nodes 0"),
        (["--gpu_per_node=4"], "unknown argument --gpu_per_node"),
        (["--why=t1p1d9"], "--why t1p1d9: no such layout"),
        (["--layout=t1p1d9"], "--layout t1p1d9: no such layout"),
        (["--adapters=nosuch.yaml"], "--adapters nosuch.yaml: no such file"),
        (["--share_micro_batches=false"], "needs --adapters"),
        (["--halving=true"], "needs --adapters"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        command = parse_plan(["--model=llama2-7b", "--gpus_per_node=1", "--formats=none", *flags])
        report_lines(plan_cluster(command), command.settings)
