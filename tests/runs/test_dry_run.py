"""--dry_run: what it says is right, it needs no weights, and it writes nothing but the cache of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.planned import stage_table
from support.run_files import edit_json, files_of
from support.run_helpers import Base, run_ranks
from support.task_files import refusal

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.planning.adapter_plans import prepare_data
from megatron_tiedlora.planning.memory import cache_bytes
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run

# (base parameters, d, o, layers): from the published shapes.
SHAPES = {
    "llama2-7b": (6_738_415_616, 4096, 3 * 4096, 32),
    "llama2-13b": (13_015_864_320, 5120, 3 * 5120, 40),
    "llama2-70b": (68_976_648_192, 8192, 8192 + 2 * 1024, 80),
}


@pytest.fixture(autouse=True)
def _work(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, in which nothing is written."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    assert files_of(tmp_path / "work") == {}


def report(arguments: list[str]) -> str:
    """The report, made in this process."""
    return dry_run_report(parse_settings(arguments, Settings)).text


def plan_of(settings: dict[str, object]) -> RunPlan:
    """The plan of the same settings on one rank."""
    return plan_run(make_settings(settings), rank=0, world_size=1)


def number(text: str, label: str) -> int:
    """The whole number that follows `label` on its line."""
    (found,) = re.findall(rf"^  {label} +(\d[\d,]*)\b", text, re.MULTILINE)
    return int(found.replace(",", ""))


UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def size(cell: str) -> float:
    """Bytes of a cell; it has two decimals, so the half of a percent is what rounding may take.

    For the data-parallel group it says "at most", as DeepSpeed sends in messages of its own choice.
    """
    value, unit = cell.removeprefix("at most ").split()
    return float(value.replace(",", "")) * UNITS[unit]


def sent(cell: str) -> tuple[int, float]:
    """(messages, bytes) of a cell of the table of messages."""
    messages, found = cell.split(" / ")
    return int(messages.replace(",", "")), size(found)


ROUNDED = 5e-3


@pytest.mark.parametrize(
    ("preset", "world", "ds_config"),
    [
        ("llama2-7b", 1, "zero0.json"),
        ("llama2-7b", 8, "zero2.json"),
        ("llama2-13b", 64, "zero1.json"),
        ("llama2-70b", 64, "zero3.json"),
    ],
)
def test_presets_need_no_files(preset: str, world: int, ds_config: str) -> None:
    arguments = [f"--model={preset}", "--dry_run", f"--world_size={world}", f"--ds_config={ds_config}"]
    text = report(arguments)
    parameters, d, o, layers = SHAPES[preset]
    r = 8
    tl6 = r * d + o * r + layers * (r + o)
    lora = layers * (r * d + o * r)
    vera = layers * (r + o)
    assert number(text, "frozen base") == parameters
    assert number(text, "all") == tl6
    assert number(text, "lora of the same rank") == lora
    assert number(text, "vera of the same rank") == vera
    assert f"({tl6 / lora:.2%} of it)" in text
    for name, trained in (("A", r * d), ("B", o * r), ("u", layers * r), ("v", layers * o)):
        assert re.search(rf"^  {name}  .* {trained:,}$", text, re.MULTILINE), name
    ranks = "1 data-parallel rank," if world == 1 else f"{world} data-parallel ranks"
    assert f"ZeRO-{ds_config[4]}, {ranks}" in text
    (memory,) = stage_table(text, "bytes per rank")
    shared = world if ds_config == "zero3.json" else 1
    assert size(memory["base weights"]) == pytest.approx(2 * parameters / shared, rel=ROUNDED)
    assert size(memory["adapter"]) == pytest.approx(4 * tl6 / shared, rel=ROUNDED)
    assert f"packed into rows of up to 4,096 tokens: micro-batches of one row, {world} data-parallel" in text
    assert f"samples of 4,096 tokens make {256 // world} micro-batches per data-parallel rank" in text
    assert f"{2000 * 256:,} samples" in text
    if world == 1:
        assert "none: one rank sends nothing" in text
        return
    (messages,) = stage_table(text, "messages and bytes")
    assert sent(messages["all ranks"]) == (1, 56.0)
    # ZeRO-2 sums gradients after each micro-batch. What was stepped is gathered, and the norm is one number.
    steps = 256 // world
    most = ((steps if ds_config == "zero2.json" else 1) + 1) * 4 * tl6
    if ds_config == "zero3.json":  # every parameter is gathered twice for each micro-batch, and gradients are summed
        most = steps * (2 * (2 * parameters + 4 * tl6) + 4 * tl6)
    assert size(messages["data"]) == pytest.approx(most, rel=ROUNDED)


@pytest.mark.parametrize(
    ("preset", "world", "tp", "pp", "sequence_parallel"),
    [
        ("llama2-7b", 16, 8, 2, True),
        ("llama2-13b", 512, 8, 4, False),
        pytest.param("llama2-7b", 1024, 4, 32, True, marks=pytest.mark.slow),
        pytest.param("llama2-70b", 1024, 8, 8, True, marks=pytest.mark.slow),
        pytest.param("llama2-70b", 64, 8, 8, False, marks=pytest.mark.slow),
    ],
)
def test_layouts_of_presets(preset: str, world: int, tp: int, pp: int, sequence_parallel: bool) -> None:
    """Figures worked out by hand from the shapes, for every stage of a layout that nobody starts."""
    arguments = [
        *(f"--model={preset}", "--dry_run", f"--world_size={world}", "--ds_config=zero1.json"),
        *(f"--tensor_parallel={tp}", f"--pipeline_parallel={pp}", f"--sequence_parallel={sequence_parallel}"),
    ]
    text = report(arguments)
    parameters, d, o, layers = SHAPES[preset]
    dp, r, length = world // (tp * pp), 8, 4096
    steps = 256 // dp
    partition, memory, messages = (
        stage_table(text, title) for title in ("layout", "bytes per rank", "messages and bytes")
    )
    assert len(partition) == len(memory) == len(messages) == pp
    parallel = f"tensor {tp}, {'' if sequence_parallel else 'no '}sequence parallelism x pipeline {pp}"
    assert f"{world:,} ranks = {parallel}" in text
    blocks = [len(numbers(row["adapted"])) for row in partition]
    assert sum(blocks) == layers and max(blocks) - min(blocks) <= 1
    assert [numbers(row["layers"]) for row in partition] == [numbers(row["adapted"]) for row in partition]
    assert "embedding" in partition[0]["layers"] and "head" in partition[-1]["layers"]
    assert sum(float(row["work"].rstrip("%")) for row in partition) == pytest.approx(100, abs=0.05 * pp)
    assert sum(size(row["base weights of the stage"]) for row in partition) == pytest.approx(
        2 * parameters, rel=ROUNDED
    )
    # Norms are whole on every rank, the rest is cut.
    norms = 2 * d * (2 * layers + 1)
    whole = sum(size(row["base weights"]) for row in memory)
    assert whole == pytest.approx((2 * parameters - norms) / tp + norms, rel=ROUNDED)
    assert [int(row["in flight"]) for row in memory] == [min(pp - stage, steps) for stage in range(pp)]
    hidden = 2 * d * length
    for stage, row in enumerate(messages):
        trained = 4 * ((r * d + o * r + blocks[stage] * o) // tp + blocks[stage] * r)
        assert size(memory[stage]["gradients"]) == pytest.approx(trained, rel=ROUNDED)
        assert sent(row["tied"]) == (1, pytest.approx(4 * r * (d + o) / tp, rel=ROUNDED))
        first, last = stage == 0, stage == pp - 1
        sends = (not last) + (not first)  # hidden states, and their gradient
        state = hidden // tp if sequence_parallel else hidden
        assert sent(row["pipeline"]) == (steps * sends, pytest.approx(steps * sends * state, rel=ROUNDED))
        # Of h: 8 or 4 a layer; the first stage has the embedding's, but no backward pass into its first layer; the last
        # has the head's entry, forth and back. Beside them A's two, and 4 of the loss. Where sequences are
        # cut r columns travel with two messages of each layer; in the model's first layer those of one way back alone.
        per_layer, head = (8, 2) if sequence_parallel else (4, 1)
        large, alone = per_layer * blocks[stage] + head * last, first and sequence_parallel
        count, found = sent(row["tensor"])
        of_u = 4 * blocks[stage] * r  # bytes, once a step, over all ranks of the stage
        if dp > 1:
            assert sent(row["stage"]) == (1, pytest.approx(of_u, rel=ROUNDED))
        assert count == steps * (large + alone + 2 + 4 * last) + (dp == 1)
        small = 2 * 4 * r * d + 4 * 2 * tp * (length - 1) * last
        small += sequence_parallel * blocks[stage] * 2 * 2 * r * length
        assert found == pytest.approx(steps * (large * hidden + small) + of_u * (dp == 1), rel=ROUNDED)
        assert sent(row["model"]) == (1, 4.0) and sent(row["all ranks"]) == (1, 56.0)
        # Gradients are summed, and what was stepped is gathered; the norm is 4 bytes.
        assert "data" not in row if dp == 1 else size(row["data"]) == pytest.approx(2 * trained, rel=ROUNDED)


def numbers(cell: str) -> list[int]:
    """embedding + 1-3,5 -> [1, 2, 3, 5]."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", cell):
        found += range(int(first), int(last or first) + 1)
    return found


def test_a_layer_that_few_stages_need() -> None:
    """LoRA on one layer: stages before it keep nothing and send no backward messages; those after it do both."""
    arguments = ["--model=llama2-7b", "--dry_run", "--world_size=8", "--ds_config=zero1.json", "--method=lora"]
    text = report([*arguments, "--layers=20", "--tensor_parallel=2", "--pipeline_parallel=4"])
    partition, memory, messages = (
        stage_table(text, title) for title in ("layout", "bytes per rank", "messages and bytes")
    )
    (home,) = [stage for stage, row in enumerate(partition) if row["adapted"] == "20"]
    assert [row["adapted"] for row in partition].count("none") == 3 and 0 < home < 3
    for stage, row in enumerate(messages):
        blocks = numbers(partition[stage]["layers"])
        backward = [block for block in blocks if block >= 20]
        # 4 a layer each way; the way back into layer 20 has r columns alone; the embedding's; the head's two and the
        # loss's four.
        large = 4 * len(blocks) + 4 * len(backward) + (stage == 0) + 2 * (stage == 3)
        assert sent(row["tensor"])[0] == 256 * (large + 2 * (stage == home) + 4 * (stage == 3)), stage
        assert "tied" not in row
        assert memory[stage]["gradients"] == ("4 B" if stage != home else "262.14 kB")  # an anchor, or A and B
    # What the first stage keeps is its output alone, for each of four micro-batches, and a buffer for messages. A pass
    # of a block needs gate and up, their product, its partial sum, and this rank's half of a residual sum and its two
    # summands.
    block = 4096 * 2 * (1.5 * 22016 / 2 + 4096 + 3 * 4096 / 2)
    assert size(memory[0]["activations"]) == pytest.approx(block, rel=0.01)
    assert size(memory[0]["engine"]) == pytest.approx((4 + 1) * 2 * 4096 * 4096 / 2, rel=ROUNDED)


def test_a_model_folder_with_data(base: Base, tmp_path: Path) -> None:
    """Counts of tokens, how many prompts are cut, and one sample split where supervision starts."""
    train = tmp_path / "train.jsonl"
    rows = [
        {"prompt": "Question: 6 x 7?\nAnswer:", "completion": "42"},
        {"prompt": "q" * 200, "completion": "yes"},
        {"prompt": "ab", "completion": "c"},
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = base.arguments(train_file=train, dry_run=True, world_size=2, max_length=64)
    text = report(arguments)
    # <s>, a token a byte, and </s>; an answer is joined by a space. The cut one has max_length tokens.
    first, third = 1 + len(rows[0]["prompt"]) + 3 + 1, 1 + 2 + 2 + 1
    (cells,) = [line.split() for line in text.splitlines() if line.split()[1:2] == ["train"]]
    found = [int(part.replace(",", "")) for part in cells[2:-1]]  # the last are the passes of the run over it
    assert found == [3, first + 64 + third, 4 + 5 + 3, 64, 1]
    sample = text[text.index("first sample") :].splitlines()
    assert sample[0] == f"first sample ({train}:1), {first} tokens"
    assert sample[1:] == [
        f"  [not supervised, {first - 4} tokens]",
        "    <s>Question: 6 x 7?",
        "    Answer:",
        "  [supervised, 4 tokens]",
        "     42</s>",
    ]
    cut = "micro-batches of up to 2 rows, 2 data-parallel ranks"
    assert f"global batch 4 samples, packed into rows of up to 64 tokens: {cut}" in text
    text = report([*arguments, "--packing=false"])
    assert "global batch 4 samples, one per row: micro-batch 2 x 1 step x 2 data-parallel ranks" in text


def test_needs_no_weights(base: Base, tmp_path: Path) -> None:
    """A folder with config and tokenizer is enough; a config without layers to adapt is refused as in a run."""
    model = tmp_path / "model"
    model.mkdir()
    for file in base.model.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    text = report(base.arguments(model=model, dry_run=True))
    assert number(text, "all") == 3 * 32 + 64 * 3 + 3 * (3 + 64)
    edit_json(model / "config.json", num_hidden_layers=2)
    assert "--layers 3" in refusal(lambda: report(base.arguments(model=model, layers="3", dry_run=True)))
    uneven = ["--model=llama2-7b", "--dry_run", "--world_size=48"]
    line = refusal(lambda: report(uneven))
    assert "--global_batch_size 256" in line and "data parallel 48" in line and "240 or 288" in line


def test_keys_and_values_of_a_decoded_batch(base: Base) -> None:
    """The report's bytes are those of the decoder's own caches."""

    settings = base.settings(test_file=base.validation, eval_batch_size=5, max_new_tokens=11, dtype="bf16")
    plan = plan_of(settings)
    decoder = Decoder(load_model(plan.source, None, dtype=torch.bfloat16), ParallelGroups(), plan.source.shape)
    caches = decoder.new_caches(5, 30 + 11)
    found = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    assert found == cache_bytes(plan.stage, sequences=5, tokens=30 + 11) > 0
    text = report(base.arguments(**{**settings, "dry_run": True}))
    assert "for 5 prompts of up to" in text and "with 11 new ones" in text
    assert "of keys and values" not in report(base.arguments(dry_run=True))


def test_packed_rows_are_counted(base: Base) -> None:
    """Rows, micro-batches and padding of the first step are those that a run's loader gives."""

    settings = base.settings(micro_batch_size=1, global_batch_size=8)
    plan = plan_of(settings)
    data = prepare_data(plan)
    step = next(plan.training_loader(data.train, pad_id=0))
    positions = sum(batch.tokens.numel() for batch in step.micro_batches)
    rows = sum(len(batch.tokens) for batch in step.micro_batches)
    assert rows < 8 and step.num_tokens < positions
    text = report(base.arguments(**{**settings, "dry_run": True}))
    assert f"{step.num_tokens:,} tokens in {rows} rows of {len(step.micro_batches)} micro-batches" in text
    assert f"{1 - step.num_tokens / positions:.1%} of the {positions:,} positions are padding" in text
    assert f"global batch 8 samples, packed into rows of up to {plan.settings.max_length} tokens" in text
    assert f"micro-batches of up to 1 x {plan.settings.max_length} tokens" in text
    plain = base.arguments(**settings, packing=False, dry_run=True)
    text = report(plain)
    longest = -(-int(data.train.lengths.max()) // 8) * 8
    assert "8 rows of 8 micro-batches" in text and f"micro-batches of up to 1 x {longest} tokens" in text
    assert longest < plan.settings.max_length


def test_packing_leaves_a_pipeline_enough_micro_batches(base: Base) -> None:
    """Four to a stage, where the rows that hold the step's samples would be fewer."""
    found = {}
    for stages in (1, 2):
        layout = {"pipeline_parallel": stages, "world_size": stages, "ds_config": "zero1.json"}
        arguments = base.arguments(**layout, global_batch_size=16, micro_batch_size=1, dry_run=True)
        text = report(arguments)
        ((rows, batches),) = re.findall(r"tokens in (\d+) rows of (\d+) micro-batches", text)
        assert rows == batches
        found[stages] = int(rows)
        assert [row["in flight"] for row in stage_table(text, "bytes per rank")] == ["2", "1"][-stages:]
    assert found[1] < 8 and found[2] == 8


@pytest.mark.distributed
def test_several_ranks_print_one_report(base: Base, tmp_path: Path) -> None:
    ended = run_ranks(base.arguments(dry_run=True), folder=tmp_path / "ranks", cache=base.cache, ranks=2).expect(0)
    assert "2 data-parallel ranks" in ended.outputs[0] and ended.outputs[1] == ""
    assert all(".rank" in name for name in files_of(tmp_path / "ranks"))


@pytest.mark.distributed
def test_without_a_launcher(tmp_path: Path) -> None:
    arguments = ["--model", "llama2-70b", "--dry_run", "--world_size", "32"]
    folder = tmp_path / "command"
    ended = run_ranks(arguments, folder=folder).expect(0)
    assert "32 data-parallel ranks" in ended.outputs[0]
    assert ended.errors[0] == "" and all(".rank" in name for name in files_of(folder))
