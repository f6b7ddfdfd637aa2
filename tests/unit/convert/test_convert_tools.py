"""What conversions refuse, and the three commands: what they print and how they end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from folders import ROOT
from native_files import reseal, with_adapter, write_exports
from oracle import load_weights
from run_files import files_of
from safetensors.torch import save_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.base_identity import MERGE_RECORD
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.tool_settings import ExportSettings, MergeSettings, adapter_flags
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with kv heads < heads."""
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def inputs(base: Path) -> tuple[ModelSource, NativeAdapter]:
    """What the conversions take."""
    return with_adapter(base, "tl6")[:2]


# --------------------------------------------------------------------------------------------- what is refused


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    _, adapter, _ = with_adapter(base, "tl6")
    other_shape = find_model(str(write_tiny_model(tmp_path / "mha", num_kv_heads=4, tokenizer=False)))
    other_values = find_model(str(write_tiny_model(tmp_path / "other", seed=1, tokenizer=False)))
    for source, what in ((other_shape, "num_key_value_heads"), (other_values, "weights differ")):
        for convert in (merge_adapter, export_peft):
            with pytest.raises(UserError, match=what):
                convert(source, adapter, tmp_path / "output")
        assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_exists_is_refused(inputs: tuple[ModelSource, NativeAdapter], tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind == "folder":
        output.mkdir()
        (output / "mine").write_text("precious")
    elif kind == "file":
        output.write_text("precious")
    else:
        output.symlink_to(tmp_path / "nowhere")
    for convert in (merge_adapter, export_peft):
        with pytest.raises(UserError, match="exists; give a new folder"):
            convert(*inputs, output)
    assert list(tmp_path.iterdir()) == [output]
    assert kind == "link" or (output / "mine" if kind == "folder" else output).read_text() == "precious"


def test_an_output_that_is_an_empty_folder_is_filled(inputs: tuple[ModelSource, NativeAdapter], tmp_path: Path) -> None:
    export_peft(*inputs, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


def test_a_corrupt_tokenizer_stops_the_merge_before_it_writes(base: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    (broken / "tokenizer.json").write_text("{")
    source, adapter, _ = with_adapter(broken, "tl6")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        merge_adapter(source, adapter, tmp_path / "merged")
    assert {item.name for item in tmp_path.iterdir()} == {"base"}


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapter/, merged/, merged16/ and peft/ of one adapter."""
    return write_exports(tmp_path_factory.mktemp("exported"), base)


# --------------------------------------------------------------------------------------------- the commands

# Runs tools one after another, each as the command that was started, and says whether deepspeed was imported by one.
RUNNER = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print("END", flush=True)
print("deepspeed" in sys.modules, file=sys.stderr)
"""


def run_tools(*commands: tuple[object, ...]) -> tuple[list[str], str]:
    """(what each of these prints, all of stderr) of names in tools/ with their arguments; each must end with 0."""
    words = [[str(ROOT / "tools" / str(name)), *map(str, arguments)] for name, *arguments in commands]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, rest = done.stdout.split("END\n")
    assert len(printed) == len(commands) and not rest, done.stdout
    return printed, done.stderr


def test_the_commands_work_one_after_another_without_deepspeed(exported: Path, tmp_path: Path) -> None:
    adapter = exported / "adapter"
    (merged, peft, checked), errors = run_tools(
        ("merge_adapter.py", "--adapter", adapter, "--output", tmp_path / "merged", "--dtype", "bf16"),
        ("export_peft.py", "--adapter", adapter, "--output", tmp_path / "peft", "--pad_rank_to", 8),
        ("verify_export.py", "--adapter", adapter, "--merged", tmp_path / "merged", "--peft", tmp_path / "peft"),
    )
    assert f"tiedlora verify --adapter {adapter} --merged {tmp_path / 'merged'}" in merged
    assert "vllm serve" in peft and "--max-lora-rank 8" in peft
    assert checked.count("ok") == 6, checked  # bits of both, by layers, and in transformers and PEFT
    assert errors.endswith("False\n")  # transformers and peft are imported, deepspeed is not


def test_a_check_of_nothing_is_rejected(exported: Path) -> None:
    from megatron_tiedlora.commands.front import call

    with pytest.raises(UserError, match="nothing to check; give --merged DIR, --peft DIR or both"):
        call("verify", ["--adapter", str(exported / "adapter"), "--in", "none"])


def test_the_next_command_has_the_flags_of_this_one() -> None:
    given = MergeSettings(adapter="a b", model="m", base_differs=True, output="new")
    assert adapter_flags(given.adapter, given) == "--adapter 'a b' --model m --base_differs"
    assert adapter_flags("a", ExportSettings(adapter=["a"], output="new")) == "--adapter a"


def test_checkpoints_and_peft_folders_are_merged_alike(base: Path, exported: Path, tmp_path: Path) -> None:
    """The native adapter that travels in its export comes back; without it the PEFT tensors give the same weights."""
    from megatron_tiedlora.commands.front import call

    native = load_native_adapter(exported / "adapter")
    export_peft(find_model(str(base)), native, tmp_path / "plain")
    checkpoint = save_checkpoint(
        tmp_path / "checkpoints",
        progress=Progress(step=1),
        config=native.config,
        base_identity=native.base,
        state=native.state,
        moments={},
        settings={},
    )
    wanted, output = files_of(exported / "merged"), tmp_path / "merged"
    for folder in (checkpoint, exported / "peft", tmp_path / "plain"):
        assert call("merge", ["--adapter", str(folder), "--output", str(output)]) == 0
        found = files_of(output)
        if folder == tmp_path / "plain":
            assert b'"method": "lora"' in found.pop(MERGE_RECORD) and found.items() <= wanted.items()
        else:
            assert found == wanted
        shutil.rmtree(output)


def test_the_check_command_exits_1_where_an_export_is_wrong(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_tiedlora.commands.front import call

    broken = shutil.copytree(exported / "merged", tmp_path / "broken")
    weights = load_weights(broken)
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.01
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert call("verify", ["--adapter", str(exported / "adapter"), "--merged", str(broken)]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["merge_adapter.py", "export_peft.py", "verify_export.py", "import_peft.py"])
def test_help_reads_without_loading_anything(tool: str) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "tools" / tool), "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    first = "--peft" if tool == "import_peft.py" else "--adapter"
    assert f"tiedlora {tool.partition('_')[0]} {first}" in result.stdout and "--model M" in result.stdout
    assert " torch\n" not in result.stderr and " yaml\n" in result.stderr
    assert max(len(line) for line in result.stdout.splitlines()) <= 120


WRONG: dict[str, tuple[list[str], str]] = {
    "no adapter": (["--adapter", "none", "--output", "out"], "none"),
    "run folder": (["--adapter", "run", "--output", "out"], "--adapter run: this is a run folder; give run/adapter"),
    "peft folder": (["--adapter", "peft", "--output", "out"], "this is a PEFT adapter; give the native one"),
    "no base": (["--adapter", "lost", "--output", "out"], "lost: its base cannot be found; give it with --model"),
    "wrong model": (["--adapter", "adapter", "--model", "merged", "--output", "out"], "already; give the plain base"),
    "output": (["--adapter", "adapter", "--output", "peft"], "--output peft exists"),
    "no output": (["--adapter", "adapter"], "--output"),
    "flag": (["--adapter", "adapter", "--ouput", "out"], "--output"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line(
    exported: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_tiedlora.commands.front import call
    from megatron_tiedlora.config.cli import run_command

    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    shutil.copytree(exported / "adapter", tmp_path / "run" / "adapter")
    lost = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(exported / "adapter", tmp_path / "lost")
    (tmp_path / "lost" / "adapter_config.json").write_text(json.dumps(lost | {"base_model": "/gone"}))
    reseal(tmp_path / "lost")
    monkeypatch.chdir(tmp_path)
    before = sorted(item.name for item in tmp_path.iterdir())
    arguments, message = WRONG[case]
    for tool in ("merge", "export"):
        if case == "peft folder" and tool == "merge":  # it takes one
            continue
        with pytest.raises(SystemExit) as end:
            run_command(partial(call, tool), arguments)
        captured = capsys.readouterr()
        assert end.value.code == 2 and not captured.out
        assert captured.err.count("\n") == 1 and message in captured.err, captured.err
    assert sorted(item.name for item in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flag", "folder", "message"),
    [
        ("--merged", "none", "none/config.json: no such file"),
        ("--merged", "peft", "peft/config.json: no such file"),
        ("--peft", "none", "none/adapter_config.json: no such file"),
        ("--peft", "adapter", "not a PEFT adapter (it is a native one)"),
        ("--merged", "other", "num_key_value_heads is 4, not 2 as in"),
        ("--merged", "cut", "not a whole safetensors file"),
        ("--peft", "cut", "not a whole safetensors file"),
    ],
)
def test_a_folder_that_is_no_export_is_one_line(
    exported: Path, tmp_path: Path, flag: str, folder: str, message: str
) -> None:
    from megatron_tiedlora.commands.front import call

    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    write_tiny_model(tmp_path / "other", num_kv_heads=4, tokenizer=False)
    shutil.copytree(tmp_path / ("merged" if flag == "--merged" else "peft"), tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError) as error:
        call("verify", ["--adapter", str(tmp_path / "adapter"), flag, str(tmp_path / folder)])
    assert message in str(error.value) and "\n" not in str(error.value)
