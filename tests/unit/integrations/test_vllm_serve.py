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

from megatron_tiedlora.base.messages import UserError, bytes_in_words
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.commands.front import call, main
from megatron_tiedlora.convert.collection import build_index
from megatron_tiedlora.convert.serving import slot_bytes
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
        "--max-lora-rank", "8", "--lora-target-modules", "qkv_proj", "o_proj", "--max-loras", "64",
        "--max-cpu-loras", "64", "--middleware", "megatron_tiedlora.integrations.vllm.resolver.only_by_name",
        "--additional-config", '{"tied_lora": true}',
    ]  # fmt: skip
    assert "# 2 adapters up to rank 8 on qkv, o_proj: out and team/run" in notes
    words, _ = planned(capsys, base, root, *["--hub", "me", "you", "--max_loras", "5", "--", "--port", "1", "-x"])
    assert words[1:3] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "TIEDLORA_HUB=me,you"]
    assert words[words.index("--max-loras") :][:4] == ["--max-loras", "5", "--max-cpu-loras", "5"]
    assert words[-3:] == ["--port", "1", "-x"]


def test_names_are_those_that_the_server_finds(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ": run\n" in planned(capsys, base, root / "team/run")[1]
    assert ": out\n" in planned(capsys, base, root / "out")[1]
    assert ": peft\n" in planned(capsys, base, root / "team/run/peft")[1]
    assert ": adapter\n" in planned(capsys, base, root / "team/run/adapter")[1]
    shutil.copytree(root / "team/run/peft", root / "peft")
    build_index(root)
    shutil.copytree(root / "out", root / "new")
    assert ": new, out, peft and team/run\n" in planned(capsys, base, root)[1], "an index may be older"


def test_a_folder_without_adapters_yet(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters of the hub may be of both kinds, and come later."""
    (tmp_path / "empty").mkdir()
    words, notes = planned(capsys, base, tmp_path / "empty", "--hub", "me")
    assert words[-2:] == ["--additional-config", '{"tied_lora": "both"}'] and "only from the hub" in notes
    assert words[words.index("--max-loras") + 1] == "8"


@pytest.mark.parametrize("flag", ["--additional-config", "--additional_config.other"])
def test_the_kind_of_slots_is_not_overwritten(
    flag: str, base: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--additional-config has the kind of slots; take the command of --dry_run"):
        planned(capsys, base, root, "--", flag, "1")


def test_kinds_of_slots(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_native(root / "plain", base, with_adapter(base, "lora", targets=("down_proj",))[2])
    words, _ = planned(capsys, base, root)
    assert words[-2:] == ["--additional-config", '{"tied_lora": "both"}']
    assert words[words.index("--lora-target-modules") + 1 :][:3] == ["qkv_proj", "o_proj", "down_proj"]
    words, notes = planned(capsys, base, root, "--slots", "tied")
    assert words[-1] == '{"tied_lora": true}' and "down_proj" not in words
    assert f"# not served: {root}/plain: method lora: its layers do not share A and B; " in notes
    for root_, given in ((root, ["--slots=expanded"]), (root / "plain", [])):
        assert "--additional-config" not in planned(capsys, base, root_, *given)[0]


def test_adapters_of_peft(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their configs. What cannot be read is said, and does not stop the others."""
    peft = root / "team/run/peft"
    shutil.rmtree(peft / "native")
    lora = changed(peft, root / "lora", CONFIG, {"r": 9, "target_modules": ["layers.0.self_attn.v_proj", "up_proj"]})
    changed(peft, root / "wrong", CONFIG, {"r": "many"})
    words, notes = planned(capsys, base, root / "lora")
    assert "--max-lora-rank 16 --lora-target-modules qkv_proj gate_up_proj" in " ".join(words)
    assert "--additional-config" not in words and "# 1 adapter up to rank 16 on qkv, gate_up: lora" in notes
    words, notes = planned(capsys, base, root)
    assert words[-1] == '{"tied_lora": "both"}' and f"# not served: {root}/wrong: r = 'many' is not an int" in notes
    for given in (".*mlp.*", ["experts"]):
        unknown = changed(lora, root / "unknown", CONFIG, {"target_modules": given})
        assert "qkv_proj o_proj gate_up_proj down_proj" in " ".join(planned(capsys, base, unknown)[0]), "to be safe"
        shutil.rmtree(unknown)
    vera = {"peft_type": "VERA", "r": 64, "target_modules": ["q_proj"]}
    changed(lora, root / "vera", CONFIG, vera)
    words, _ = planned(capsys, base, root / "vera")
    assert words[-1] == '{"tied_lora": true}' and words[words.index("--max-lora-rank") + 1] == "64"


def test_bases_are_compared_by_their_config(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tiny_model(root.parent / "other", num_layers=2)
    write_native(root / "foreign", other, with_adapter(other, "tl6", targets=("gate_up",))[2])
    words, notes = planned(capsys, base, root)
    assert f"# not served: {root}/foreign: its base is not {base}" in notes and "gate_up_proj" not in words
    said = refusal(planned, capsys, base, root / "foreign")
    assert f"has no adapter to serve (not served: {root}/foreign: its base is not {base}); give another" in said
    for number in range(7):
        shutil.copytree(root / "foreign", root / f"other/{number}")
    notes = planned(capsys, base, root)[1]
    assert notes.count("its base is not") == 5 and "# not served: 3 more\n" in notes


def test_what_cannot_be_served(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "empty").mkdir()
    assert "none: no such folder; give a folder with adapters" in refusal(planned, capsys, base, root / "none")
    assert "has no adapter to serve; give another" in refusal(planned, capsys, base, root / "empty")
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
    assert f"{root}/out: rank 513 is greater than --max-lora-rank 512; " in planned(capsys, base, root)[1]
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
    monkeypatch.setattr("megatron_tiedlora.base.installation.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(["serve", "--model", str(base), "--adapters", str(root)])
    output = capsys.readouterr()
    assert end.value.code == 2 and " vllm serve " in output.out
    assert " needs vLLM 0.26 or later, which is not installed here" in output.err
    assert "pip install 'vllm>=0.26'" in output.err
    assert output.err.count("\n") == 1


def test_the_command_is_run_in_place_of_this_process(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_tiedlora.base.installation.find_spec", lambda name: name)
    started: list[Any] = []

    def instead(*given: Any) -> None:
        started.append(given)
        raise SystemExit

    monkeypatch.setattr(os, "execve", instead)
    monkeypatch.setenv("MINE", "1")
    with pytest.raises(SystemExit):
        call("serve", ["--model", str(base), "--adapters", str(root), "--", "--port", "1"])
    ((file, words, environment),) = started
    assert file == sys.executable and words[:4] == [file, "-P", "-m", "vllm.entrypoints.cli.main"]
    assert words[4:6] == ["serve", str(base)] and words[-2:] == ["--port", "1"]
    assert environment["TIEDLORA_ADAPTERS"] == str(root) and environment["MINE"] == "1"
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    variables = [f"{name}={environment[name]}" for name in list(environment)[-2:]]
    assert printed == [*variables, "vllm", *words[4:]], "vllm is the program of this module"


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
    ("phi3", ("qkv",), 8, 7_776, 18_432),  # q, k and v are one module
]
PHI3 = {**SMALL, "model_type": "phi3", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(("name", "targets", "rank", "tied", "expanded"), SIZES)
def test_bytes_of_a_slot(name: str, targets: tuple[str, ...] | None, rank: int, tied: int, expanded: int) -> None:
    shape = shape_from_hf({"135M": SMALL, "phi3": PHI3, **PRESETS}[name])
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
        for name, targets, rank, tied, expanded in SIZES[2:-1]
    ]  # fmt: skip
    assert rows == expected


def test_numbers_of_slots(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 tied ones or 8 others. What one takes is said."""
    for number in range(70):
        shutil.copytree(root / "out", root / f"many/{number:02}")
    shape = shape_from_hf(json.loads((base / "config.json").read_text()))
    tied, expanded = (slot_bytes([shape.block.output], 8, shape.num_layers, tied=kind) for kind in (True, False))
    for kind, slots, size in (("tied", 64, tied), ("expanded", 8, expanded), ("both", 8, tied + expanded)):
        words, notes = planned(capsys, base, root / "many", "--slots", kind)
        assert words[words.index("--max-loras") :][:4] == ["--max-loras", f"{slots}", "--max-cpu-loras", "70"]
        assert f"# {slots} slots ({kind}) of {bytes_in_words(size)}; 70 adapters in host memory" in notes


def test_host_memory_is_limited(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        shutil.copytree(root / "out", root / f"many/{number:02}")
    for most, cached in ((50_000, 12), (1, 3)):
        monkeypatch.setattr("megatron_tiedlora.integrations.vllm.serve._CACHE_BYTES", most)
        words, _ = planned(capsys, base, root / "many", "--max_loras", "3")
        assert words[words.index("--max-cpu-loras") + 1] == str(cached)
