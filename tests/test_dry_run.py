"""--dry_run: what it says is right, it needs no weights, and it writes nothing but the cache of tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import edit_json, files_of
from run_helpers import Base, Ended, plain_command, run_ranks, start_command, write_base

pytestmark = pytest.mark.distributed

# (base parameters, d, o, layers): from the published shapes.
SHAPES = {
    "llama2-7b": (6_738_415_616, 4096, 3 * 4096, 32),
    "llama2-13b": (13_015_864_320, 5120, 3 * 5120, 40),
    "llama2-70b": (68_976_648_192, 8192, 8192 + 2 * 1024, 80),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


def report(folder: Path, arguments: list[str], **keywords: Any) -> str:
    """The report; nothing else may be printed but bars, and nothing written beside the cache."""
    ended = run_ranks(arguments, folder=folder, **keywords).expect(0)
    written = {name for name in files_of(folder) if ".rank" not in name and not name.startswith("cache/")}
    assert written == set()
    return ended.outputs[0]


def number(text: str, label: str) -> int:
    """The whole number that follows `label` on its line."""
    (found,) = re.findall(rf"^  {label} +(\d[\d,]*)\b", text, re.MULTILINE)
    return int(found.replace(",", ""))


@pytest.mark.parametrize(
    ("preset", "world", "ds_config"),
    [
        ("llama2-7b", 1, "zero0.json"),
        ("llama2-7b", 8, "zero2.json"),
        ("llama2-13b", 64, "zero1.json"),
        ("llama2-70b", 64, "zero3.json"),
    ],
)
def test_presets_need_no_files(tmp_path: Path, preset: str, world: int, ds_config: str) -> None:
    arguments = [f"--model={preset}", "--dry_run", f"--world_size={world}", f"--ds_config={ds_config}"]
    text = report(tmp_path / "work", arguments)
    assert not (tmp_path / "work" / "cache").exists()
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
    for name, size in (("A", r * d), ("B", o * r), ("u", layers * r), ("v", layers * o)):
        assert re.search(rf"^  {name}  .* {size:,}$", text, re.MULTILINE), name
    assert f"ZeRO-{ds_config[4]}, {world} data-parallel ranks" in text
    shared = world if ds_config == "zero3.json" else 1
    assert f"{2 * parameters / shared / 1e9:,.2f} GB" in text
    assert f"global batch 256 = micro-batch 1 x {256 // world} accumulation steps x {world} data-parallel" in text
    assert f"{2000 * 256:,} samples" in text
    if world == 1:
        assert number(text, "data parallel") == 0
    for group in ("tensor parallel", "pipeline", "tied, over stages"):
        assert number(text, group) == 0


def test_a_world_that_does_not_divide(tmp_path: Path) -> None:
    arguments = ["--model=llama2-7b", "--dry_run", "--world_size=48"]
    line = run_ranks(arguments, folder=tmp_path).expect(2).error_line()
    assert "--global_batch_size 256" in line and "data parallel 48" in line and "240 or 288" in line


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
    text = report(tmp_path / "work", arguments, cache=base.cache)
    # <s>, a token a byte, and </s>; an answer is joined by a space. The cut one has max_length tokens.
    first, third = 1 + len(rows[0]["prompt"]) + 3 + 1, 1 + 2 + 2 + 1
    (line,) = [line for line in text.splitlines() if line.strip().startswith("train ")]
    found = [int(part.replace(",", "")) for part in line.split()[1:]]
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
    assert "global batch 4 = micro-batch 2 x 1 accumulation steps x 2 data-parallel ranks" in text


def test_needs_no_weights(base: Base, tmp_path: Path) -> None:
    """A folder with config and tokenizer is enough; a config without layers to adapt is refused as in a run."""
    model = tmp_path / "model"
    model.mkdir()
    for file in base.model.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    text = report(tmp_path / "work", base.arguments(model=model, dry_run=True), cache=base.cache)
    assert number(text, "all") == 3 * 32 + 64 * 3 + 3 * (3 + 64)
    edit_json(model / "config.json", num_hidden_layers=2)
    line = run_ranks(base.arguments(model=model, layers="3", dry_run=True), folder=tmp_path / "bad").expect(2)
    assert "--layers 3" in line.error_line()


def test_saved_bytes_are_those_of_a_real_block(base: Base) -> None:
    """What the report counts on tensors without data equals a count on real ones."""
    from megatron_tiedlora.adapters.tied_adapter import TiedAdapter, start_values
    from megatron_tiedlora.config.settings import make_settings
    from megatron_tiedlora.model.layer_specs import Block
    from megatron_tiedlora.training.dry_run import saved_bytes_per_token
    from megatron_tiedlora.training.plan import plan_run

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in base.settings().items()}
    plan = plan_run(make_settings(settings), rank=0, world_size=1)
    length = 256
    block = Block(plan.source.config, update_scale=plan.adapter.scale, dtype=plan.dtype)
    bank = TiedAdapter(plan.adapter)
    bank.load_full(start_values(plan.adapter))
    own = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *bank.parameters())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(1, length, plan.source.config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(hidden, torch.arange(length)[None], bank()[0])
    counted = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    assert output.shape == hidden.shape
    assert saved_bytes_per_token(plan, length) == pytest.approx(counted / length, rel=0.02)


def test_several_ranks_print_one_report(base: Base, tmp_path: Path) -> None:
    ended: Ended = run_ranks(base.arguments(dry_run=True), folder=tmp_path, cache=base.cache, ranks=2).expect(0)
    assert "2 data-parallel ranks" in ended.outputs[0] and ended.outputs[1] == ""


def test_the_real_command(tmp_path: Path) -> None:
    arguments = ["--model", "llama2-70b", "--dry_run", "--world_size", "32"]
    ended = start_command(plain_command(arguments), folder=tmp_path).wait().expect(0)
    assert "32 data-parallel ranks" in ended.outputs[0]
    assert ended.errors[0] == "" and set(files_of(tmp_path)) == {"command.out", "command.err"}
