"""The command of a vLLM server of adapters, the memory of its slots, and how it is started; without vLLM itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.folders import ROOT
from support.native_files import with_adapter, write_exports, write_native
from support.peft_folders import changed
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.shapes import PRESETS
from megatron_tiedlora.commands.front import call, main
from megatron_tiedlora.convert.collection import build_index
from megatron_tiedlora.convert.serving import LARGEST_BATCH, slot_bytes
from megatron_tiedlora.model.families import shape_from_hf

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bases") / "the base")


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its exports, and an adapter of o_proj."""
    root = tmp_path_factory.mktemp("made") / "my adapters"
    (root / "team/run").mkdir(parents=True)
    write_exports(root / "team/run", base)
    (root / "team/run/run.yaml").write_text("{}")
    write_native(root / "out", base, with_adapter(base, "tl5", targets=("o_proj",))[2])
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return Path(shutil.copytree(made, tmp_path / "my adapters"))


def planned(capsys: pytest.CaptureFixture[str], base: Path, root: Path, *words: str) -> tuple[list[str], str]:
    """The words of the command that a dry run prints, and its notes. A shell takes all lines as they stand."""
    capsys.readouterr()
    assert call("serve", ["--model", str(base), "--adapters", str(root), "--dry_run", *words]) == 0
    *notes, command = capsys.readouterr().out.splitlines()
    assert all(note.startswith("# ") for note in notes)
    return shlex.split(command), "\n".join(notes)


def test_the_command_of_tied_adapters(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints and exports of a run are not counted beside its adapter."""
    words, notes = planned(capsys, base, root)
    assert words == [
        f"TIEDLORA_ADAPTERS={root}", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "vllm", "serve", str(base), "--enable-lora",
        "--max-lora-rank", "8", "--lora-target-modules", "qkv_proj", "o_proj", "--max-loras", "2",
        "--max-cpu-loras", "2", "--additional-config", '{"tied_lora": true}',
    ]  # fmt: skip
    assert "# 2 adapters up to rank 8 on qkv, o_proj: out and team/run" in notes
    more = "--tensor_parallel 2 --hub me you --base_differs --max_loras 5 -- --port 1 -x"
    words, _ = planned(capsys, base, root, *more.split())
    assert words[1:4] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "TIEDLORA_HUB=me,you", "TIEDLORA_BASE_DIFFERS=1"]
    assert words[words.index("--max-loras") :][:4] == ["--max-loras", "5", "--max-cpu-loras", "5"]
    assert "--tensor-parallel-size 2 --additional-config" in " ".join(words) and words[-3:] == ["--port", "1", "-x"]


def test_names_are_those_that_the_server_finds(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ": run\n" in planned(capsys, base, root / "team/run")[1]
    assert ": out\n" in planned(capsys, base, root / "out")[1]
    assert ": peft\n" in planned(capsys, base, root / "team/run/peft")[1]
    build_index(root)
    assert ": out and team/run\n" in planned(capsys, base, root)[1]
    shutil.rmtree(root / "out")
    assert ": out and team/run\n" in planned(capsys, base, root)[1], "the index alone is read"


@pytest.mark.parametrize("indexed", [False, True])
def test_kinds_of_slots(base: Path, root: Path, capsys: pytest.CaptureFixture[str], indexed: bool) -> None:
    write_native(root / "plain", base, with_adapter(base, "lora", targets=("down_proj",))[2])
    if indexed:
        build_index(root)
    words, _ = planned(capsys, base, root)
    assert words[-2:] == ["--additional-config", '{"tied_lora": "both"}']
    assert words[words.index("--lora-target-modules") + 1 :][:3] == ["qkv_proj", "o_proj", "down_proj"]
    words, notes = planned(capsys, base, root, "--slots", "tied")
    assert words[-1] == '{"tied_lora": true}' and "down_proj" not in words
    assert "# 1 adapter not tied, so --slots tied cannot serve this: plain" in notes
    for root_, given in ((root, ["--slots=expanded"]), (root / "plain", [])):
        assert "--additional-config" not in planned(capsys, base, root_, *given)[0]


def test_adapters_of_peft(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By PEFT's rules for modules and ranks. What is no LoRA of these linears is said, and does not stop the others."""
    peft = root / "team/run/peft"
    shutil.rmtree(peft / "native")
    changes = {"r": 4, "rank_pattern": {"v_proj": 9}, "target_modules": ["v_proj", "up_proj"]}
    lora = changed(peft, root / "lora", CONFIG, changes)
    (lora / "tiedlora_export.json").unlink()
    changed(peft, root / "moe", CONFIG, {"target_modules": ["experts"]})
    words, notes = planned(capsys, base, root / "lora")
    assert "--max-lora-rank 16 --lora-target-modules qkv_proj gate_up_proj" in " ".join(words)
    assert "--additional-config" not in words and "# 1 adapter up to rank 16 on qkv, gate_up: lora" in notes
    words, notes = planned(capsys, base, root)
    assert words[-1] == '{"tied_lora": "both"}' and "# not served: " in notes and "experts is not supported" in notes
    vera = {"peft_type": "VERA", "r": 64, "target_modules": ["q_proj"]}
    changed(lora, root / "vera", CONFIG, vera)
    words, _ = planned(capsys, base, root / "vera")
    assert words[-1] == '{"tied_lora": true}' and words[words.index("--max-lora-rank") + 1] == "64"


def test_bases_are_compared_by_their_config(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tiny_model(root.parent / "other", num_layers=2)
    write_native(root / "foreign", other, with_adapter(other, "tl6", targets=("gate_up",))[2])
    words, notes = planned(capsys, base, root)
    assert f"# 1 adapter of another base than {base}, so requests are errors: foreign" in notes
    assert "gate_up_proj" not in words and "gate_up_proj" in planned(capsys, base, root, "--base_differs")[0]
    said = refusal(planned, capsys, base, root / "foreign")
    assert "has no adapter that can be served (1 adapter of another base" in said and "give another folder" in said


def test_what_cannot_be_served(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "empty").mkdir()
    assert "none: no such folder; give a folder with adapters" in refusal(planned, capsys, base, root / "none")
    assert "has no adapter that can be served; give another" in refusal(planned, capsys, base, root / "empty")
    words, _ = planned(capsys, base, root / "empty", "--hub", "me")
    assert "--max-lora-rank 16 --lora-target-modules qkv_proj o_proj gate_up_proj down_proj" in " ".join(words)
    assert "--hub me/x: is not an owner" in refusal(planned, capsys, base, root, "--hub", "me/x")
    config = json.loads((base / "config.json").read_text())
    stable = root.parent / "stablelm"
    stable.mkdir()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    held = {"num_key_value_heads": config["num_attention_heads"], **{name: config[name] for name in names}}
    (stable / "config.json").write_text(json.dumps({"model_type": "stablelm", **held}))
    assert "vLLM has no LoRA for StableLM; serve the merged" in refusal(planned, capsys, stable, root)
    huge = root / "out" / CONFIG
    huge.write_text(json.dumps({"peft_type": "LORA", "r": 513, "target_modules": ["q_proj"]}))
    assert "1 adapter of a rank above 512, which vLLM does not accept: out" in planned(capsys, base, root)[1]
    assert "unknown argument --port" in refusal(planned, capsys, base, root, "--port", "1")


def test_the_plugin_is_loaded_whatever_is_set(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, expected in (("", ["tied_lora"]), ("other", ["other,tied_lora"]), ("x,tied_lora", [])):
        monkeypatch.setenv("VLLM_PLUGINS", given)
        words, _ = planned(capsys, base, root)
        assert [word for word in words if "PLUGINS" in word] == [f"VLLM_PLUGINS={names}" for names in expected]


# The start -----------------------------------------------------------------------------------------------------------


def test_without_vllm_it_is_said_how_to_get_it(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(SystemExit) as end:
        main(["serve", "--model", str(base), "--adapters", str(root)])
    output = capsys.readouterr()
    assert end.value.code == 2 and " vllm serve " in output.out
    assert output.err.startswith("error: vLLM is not installed; ") and "pip install 'vllm>=0.26'" in output.err
    assert output.err.count("\n") == 1


def test_the_command_is_run_in_place_of_this_process(
    base: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setattr("megatron_tiedlora.commands.convert.find_spec", lambda name: name)
    started: list[Any] = []

    def instead(*given: Any) -> None:
        started.append(given)
        raise SystemExit

    monkeypatch.setattr(os, "execvpe", instead)
    monkeypatch.setenv("MINE", "1")
    with pytest.raises(SystemExit):
        call("serve", ["--model", str(base), "--adapters", str(root), "--", "--port", "1"])
    ((file, words, environment),) = started
    assert file == str(program) and words[:3] == ["vllm", "serve", str(base)] and words[-2:] == ["--port", "1"]
    assert environment["TIEDLORA_ADAPTERS"] == str(root) and environment["MINE"] == "1"
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert printed == [*(f"{name}={environment[name]}" for name in list(environment)[-2:]), *words]


# Slots ---------------------------------------------------------------------------------------------------------------

SMALL = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
# Model, targets, rank, and the bytes of a tied and of an expanded slot. Those of the first were counted in a server.
SIZES = [
    ("135M", ("qkv",), 8, 85_056, 1_290_240),
    ("135M", None, 8, 452_928, 4_884_480),
    ("llama2-7b", ("qkv",), 8, 1_051_648, 12_582_912),
    ("llama2-7b", None, 8, 3_779_584, 39_976_960),
    ("llama2-7b", ("qkv",), 64, 2_908_160, 100_663_296),
    ("llama2-70b", ("qkv",), 8, 1_940_992, 44_564_480),
    ("llama2-70b", None, 8, 15_648_256, 207_093_760),
    ("llama2-70b", ("qkv",), 64, 4_059_136, 356_515_840),
]


@pytest.mark.parametrize(("name", "targets", "rank", "tied", "expanded"), SIZES)
def test_bytes_of_a_slot(name: str, targets: tuple[str, ...] | None, rank: int, tied: int, expanded: int) -> None:
    shape = shape_from_hf({"135M": SMALL, **PRESETS}[name])
    linears = [linear for target, linear in shape.block.adaptable.items() if targets is None or target in targets]
    assert slot_bytes(linears, rank, shape.num_layers, tied=True) == tied
    assert slot_bytes(linears, rank, shape.num_layers, tied=False) == expanded


def test_the_table_of_the_docs() -> None:
    """Its rows are the sizes above, with the adapters that 10 GB hold."""
    rows = re.findall(r"^\| (\d+B) \| (\w+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \|$",
                      (ROOT / "docs/serving.md").read_text(), re.MULTILINE)  # fmt: skip
    expected = [
        (name.removeprefix("llama2-").upper(), "qkv" if targets else "all", str(rank), f"{tied:,}", f"{expanded:,}",
         f"{expanded / tied:.0f}", f"{10**10 // tied:,}", f"{10**10 // expanded:,}")
        for name, targets, rank, tied, expanded in SIZES[2:]
    ]  # fmt: skip
    assert rows == expected


def test_bytes_of_a_slot_with_tensor_parallelism() -> None:
    """Column-parallel linears shard B and v, row-parallel linears A alone."""
    shape = shape_from_hf(PRESETS["llama2-7b"])
    column, row, layers = shape.block.qkv, shape.block.down, shape.num_layers
    assert slot_bytes([column], 8, layers, tied=True, tp_size=2) == 2 * (8 * (4096 + 6144) + 32 * 6144) + 4 * 32 * 3 * 8
    assert slot_bytes([row], 8, layers, tied=True, tp_size=2) == 2 * (8 * (5504 + 4096) + 32 * 4096) + 4 * 32 * 8
    assert slot_bytes([column], 8, layers, tied=False, tp_size=2) == 2 * 32 * 8 * (3 * 4096 + 6144)
    assert slot_bytes([row], 8, layers, tied=False, tp_size=2) == 2 * 32 * 8 * (5504 + 4096)


def test_tied_slots_take_the_memory_of_eight_expanded_ones(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as there are adapters, at most 64. What they take is said."""
    for number in range(70):
        shutil.copytree(root / "out", root / f"many/{number:02}")
    config = json.loads((base / "config.json").read_text())
    shape = shape_from_hf(config)
    bytes_of = {kind: slot_bytes([shape.block.output], 8, shape.num_layers, tied=kind) for kind in (True, False)}
    words, notes = planned(capsys, base, root / "many")
    expected = min(64, LARGEST_BATCH * bytes_of[False] // bytes_of[True])
    assert 8 < expected <= 64 and words[words.index("--max-loras") + 1] == str(expected)
    assert words[words.index("--max-cpu-loras") + 1] == "70"
    said = rf"# {expected} slots \(tied\) of \S+ k?B, so .* on each GPU \(a slot: .* tied, .* expanded\)"
    assert re.search(said, notes)
    words, notes = planned(capsys, base, root / "many", "--slots", "expanded")
    assert words[words.index("--max-loras") + 1] == "8" and "# 8 slots (expanded)" in notes
