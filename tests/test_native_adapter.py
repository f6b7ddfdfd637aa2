"""The native adapter's files: what they hold, what is refused, and that a save is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import native_adapter, write_native
from oracle import OracleAdapter, OracleConfig
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter, write_tiny_model

import megatron_tiedlora
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.checkpoint import atomic, resume
from megatron_tiedlora.checkpoint.atomic import new_folder, remove_leftovers, write_text
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.convert.export_peft import export_peft

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("lora", "vera", "tl1", "tl2", "tl3", "tl4", "tl5", "tl6")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers, d = 32, 4 heads and 2 kv heads of 8: o = 32 + 16 + 16."""
    return write_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=False)


def values(base: Path, method: str = "tl6", **keywords: Any) -> OracleAdapter:
    return random_adapter(method, OracleConfig.from_folder(base), alpha=6, layers=(1, 3), **keywords)


# --------------------------------------------------------------------------------------------- what the files hold


@pytest.mark.parametrize("method", METHODS)
def test_all_four_tensors_are_written_whole_and_come_back(base: Path, tmp_path: Path, method: str) -> None:
    oracle = values(base, method)
    written = write_native(tmp_path / "adapter", base, oracle)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lead = (2,) if method == "lora" else ()
    shapes = {"A": (*lead, 4, 32), "B": (*lead, 64, 4), "u": (2, 4), "v": (2, 64)}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == shapes
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    loaded = load_adapter(tmp_path / "adapter")
    assert loaded.config == written.config and loaded.base == written.base
    read_by_oracle = OracleAdapter.from_folder(tmp_path / "adapter")
    assert (read_by_oracle.method, read_by_oracle.rank, read_by_oracle.alpha) == (method, 4, 6.0)
    assert read_by_oracle.layers == (1, 3)
    for name, tensor in oracle.tensors.items():
        assert torch.equal(loaded.state[name], tensor) and torch.equal(read_by_oracle.tensors[name], tensor)
    bank = TiedAdapter(loaded.config)
    bank.load_full(loaded.state)
    for name, tensor in bank.full_state().items():  # what a run would save again
        assert torch.equal(tensor, oracle.tensors[name]), name


def test_the_config_has_the_documented_fields(base: Path, tmp_path: Path) -> None:
    adapter = write_native(tmp_path / "adapter", base, values(base))
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content == {
        "format_version": 1,
        "method": "tl6",
        "rank": 4,
        "alpha": 6.0,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "qkv_layout": "q|k|v",
        "layers": [1, 3],
        "base_model": str(base),
        "base_hash": find_model(str(base)).base_hash,
        "base_weights_hash": adapter.base.weights_hash,
        "seed": 5,
        "init_std_a": pytest.approx(32**-0.5),
        "init_std_b": pytest.approx(4**-0.5),
        "dtype": "fp32",
        "version": megatron_tiedlora.__version__,
    }
    assert len(content["base_hash"]) == len(content["base_weights_hash"]) == 64
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_fits_its_base_in_every_precision(base: Path, tmp_path: Path) -> None:
    """The identity is of the model, not of how it is stored."""
    half = write_tiny_model(tmp_path / "half", dtype=torch.bfloat16, tokenizer=False)
    adapter = native_adapter(find_model(str(base)), values(base))
    load_model(find_model(str(half)), adapter, dtype=torch.float32)


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_layers": 5}, "num_layers 3, but"),
        ({"num_kv_heads": 4}, "num_key_value_heads 2, but"),
        ({"head_dim": 12}, "head_dim 8, but"),
        ({"rope_theta": 500.0}, "config differ"),
        ({"seed": 1}, "weights differ"),
    ],
)
def test_another_base_is_refused(base: Path, tmp_path: Path, shape: dict[str, Any], message: str) -> None:
    adapter = native_adapter(find_model(str(base)), values(base))
    other = write_tiny_model(tmp_path / "other", tokenizer=False, **shape)
    with pytest.raises(UserError) as error:
        load_model(find_model(str(other)), adapter, dtype=torch.float32)
    assert message in str(error.value) and str(base) in str(error.value) and str(other) in str(error.value)
    assert "--model" in str(error.value) and "\n" not in str(error.value)


def test_a_peft_adapter_is_refused_as_such(base: Path, tmp_path: Path) -> None:
    source = find_model(str(base))
    export_peft(source, native_adapter(source, values(base)), tmp_path / "peft")
    with pytest.raises(UserError, match="this is a PEFT adapter; give the native one"):
        load_adapter(tmp_path / "peft")


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the config; None takes a field out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG, "no such file; expected a native Tied-LoRA"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "not a whole safetensors file"),
    "not json": (lambda folder: (folder / CONFIG).write_text("{"), CONFIG, "not valid JSON"),
    "no object": (lambda folder: (folder / CONFIG).write_text("[]"), CONFIG, "expected a JSON object"),
    "truncated": (cut, WEIGHTS, "not a whole safetensors file"),
    "version": (edit(format_version=2), CONFIG, "format_version 2 is not 1"),
    "method": (edit(method="tl7"), CONFIG, "method 'tl7'"),
    "layout": (edit(qkv_layout="interleaved"), CONFIG, "'interleaved'"),
    "no rank": (edit(rank=None), CONFIG, "rank is missing"),
    "no hash": (edit(base_weights_hash=None), CONFIG, "base_weights_hash is missing"),
    "rank": (edit(rank=0), CONFIG, "rank = 0"),
    "rank text": (edit(rank="4"), CONFIG, "rank = '4'"),
    "head_dim": (edit(head_dim="wide"), CONFIG, "wrong kind"),
    "alpha": (edit(alpha="much"), CONFIG, "wrong kind"),
    "layers": (edit(layers=7), CONFIG, "wrong kind"),
    "layer 0": (edit(layers=[0, 3]), CONFIG, "[0, 3] are not among 1 to 3"),
    "layer 4": (edit(layers=[1, 4]), CONFIG, "[1, 4] are not among 1 to 3"),
    "layer order": (edit(layers=[3, 1]), CONFIG, "not in ascending order"),
    "no u": (retensor(lambda tensors: tensors.pop("u")), WEIGHTS, "tensor u is missing"),
    "shape": (retensor(lambda t: t.update(B=t["B"].T.contiguous())), WEIGHTS, "B has shape (4, 64), expected (64, 4)"),
    "nan": (retensor(lambda t: t["v"].view(-1)[3].fill_(torch.nan)), WEIGHTS, "v holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_adapter_is_one_line_that_names_the_file(base: Path, tmp_path: Path, case: str) -> None:
    write_native(tmp_path / "adapter", base, values(base))
    damage, file, message = DAMAGE[case]
    damage(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path / "adapter")
    assert message in str(error.value) and str(tmp_path / "adapter" / file) in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- whole or not at all


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
    if not swaps:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for content in ("one", "two"):
        with new_folder(tmp_path / "kept") as folder:
            (folder / content).write_text(content)
            os.chmod(folder / content, 0o600)
        assert names(tmp_path) == {"kept"} and names(tmp_path / "kept") == {content}
        assert (tmp_path / "kept" / content).stat().st_mode & 0o044 == tmp_path.stat().st_mode & 0o044 or os.umask(0)


@pytest.mark.parametrize("failure", [RuntimeError("mine"), KeyboardInterrupt(), UserError("mine")])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    with pytest.raises(type(failure)), new_folder(tmp_path / "kept") as folder:
        (folder / "new").write_text("new")
        raise failure
    assert names(tmp_path) == {"kept"} and names(tmp_path / "kept") == {"old"}


@pytest.mark.parametrize("step", ["sync_path", "rename"])
def test_a_failing_disk_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".writing-kept" in str(source) and Path(target).name == "kept":
            raise OSError(5, "Input/output error")
        real_rename(source, target)

    def sync(path: Path) -> None:
        raise OSError(5, "Input/output error")

    if step == "rename":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
        monkeypatch.setattr(os, "rename", rename)
    else:
        monkeypatch.setattr(atomic, "sync_path", sync)
    with pytest.raises(UserError) as error, new_folder(tmp_path / "kept") as folder:
        (folder / "new").write_text("new")
    assert str(error.value) == f"{tmp_path / 'kept'}: cannot be written (Input/output error); nothing was changed"
    assert names(tmp_path) == {"kept"} and names(tmp_path / "kept") == {"old"}


def test_a_place_that_cannot_be_written_is_one_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    adapter = native_adapter(find_model(str(base)), values(base))
    with pytest.raises(UserError, match=r"adapter: cannot be written \(Not a directory\); nothing was changed"):
        save_adapter(tmp_path / "file" / "adapter", adapter.config, adapter.base, adapter.state)


def test_leftovers_of_killed_writers_are_removed_or_given_back(tmp_path: Path) -> None:
    for name in (".writing-adapter-0123abcd", ".writing-old-step_2-0123abcd", ".writing-old-step_4-0123abcd", "step_4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    (tmp_path / ".writing-latest-0123abcd").write_text("step_2")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"step_2", "step_4"}
    assert (tmp_path / "step_2" / "from").read_text() == ".writing-old-step_2-0123abcd"  # nothing had replaced it
    assert (tmp_path / "step_4" / "from").read_text() == "step_4"


# Forks once for each line of the package that a save executes, kills the child at that line, and prints what is there
# afterwards. `state` names each whole state; anything else raises.
KILLER = """
import os, shutil, sys
from pathlib import Path
import torch
from megatron_tiedlora.checkpoint import atomic, native_adapter, resume

torch.set_num_threads(1)
kind, swaps, adapter_folder, root = sys.argv[1], sys.argv[2] == "swap", Path(sys.argv[3]), Path(sys.argv[4])
if not swaps:
    atomic._exchange = lambda one, other: False
old = native_adapter.load_adapter(adapter_folder)
files = {atomic.__file__, native_adapter.__file__, resume.__file__}

def full(value):
    return {name: torch.full_like(tensor, value) for name, tensor in old.state.items()}

def value_of(adapter):
    (value,) = {float(x) for tensor in adapter.state.values() for x in tensor.unique()}
    return value

def checkpoint(step, best, value):
    resume.save_checkpoint(
        root, progress=resume.Progress(step=step, best_step=best), config=old.config, base=old.base, state=full(value),
        moments={"exp_avg.B": torch.full((3,), value)}, settings={"value": value})

def prepare():
    if kind == "adapter":
        native_adapter.save_adapter(root / "adapter", old.config, old.base, full(1.0))
    else:
        checkpoint(2, 2, 1.0)
        checkpoint(4, 2, 1.0)

def save():
    if kind == "adapter":
        native_adapter.save_adapter(root / "adapter", old.config, old.base, full(2.0))
    elif kind == "again":  # the checkpoint that `latest` names, written anew
        checkpoint(4, 2, 2.0)
    else:
        checkpoint(6, 2, 2.0)

def state():
    if kind == "adapter":
        atomic.restore_interrupted(root)  # does nothing where folders were swapped
        return value_of(native_adapter.load_adapter(root / "adapter"))
    found = resume.load_checkpoint(resume.latest_checkpoint(root))
    assert value_of(resume.load_checkpoint(root / "step_2").adapter) == 1.0  # the best one
    value = value_of(found.adapter)
    assert found.settings == {"value": value} and found.moments["exp_avg.B"].tolist() == [value] * 3
    assert found.progress.step == (4 if kind == "again" or value == 1.0 else 6)
    return value

def kill_at(number):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            if count == number:
                os._exit(9)
        return trace
    sys.settrace(trace)
    save()
    os._exit(0)

number, ended, states = 0, False, []
while not ended:
    number += 1
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    prepare()
    child = os.fork()
    if child == 0:
        kill_at(number)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    states.append(state())
    if swaps:
        assert not list(root.glob(".writing-old-*"))
    save()  # the next save is not in the way of what was left
    assert state() == 2.0
assert states == sorted(states), states
print(number, states.count(1.0), states.count(2.0))
"""


@pytest.mark.parametrize("swaps", ["swap", "two renames"])
@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "again"])
def test_a_save_that_is_killed_at_any_line_leaves_a_whole_one(
    base: Path, tmp_path: Path, kind: str, swaps: str
) -> None:
    write_native(tmp_path / "adapter", base, values(base))
    result = subprocess.run(
        [sys.executable, "-c", KILLER, kind, swaps, str(tmp_path / "adapter"), str(tmp_path / "root")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    points, before, after = (int(word) for word in result.stdout.split())
    assert points > 60 and before > 40 and after >= 2 and before + after == points


# In a process of its own, because the limit holds for everything that it writes.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from megatron_tiedlora.checkpoint.atomic import write_text
from megatron_tiedlora.checkpoint.native_adapter import load_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint
from megatron_tiedlora.config.cli import run_command

adapter, root = load_adapter(Path(sys.argv[1])), Path(sys.argv[2])

def main(arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(arguments[0]), resource.RLIM_INFINITY))
    if arguments[1] == "adapter":
        save_adapter(root / "adapter", adapter.config, adapter.base, adapter.state)
    elif arguments[1] == "text":
        write_text(root / "latest", "new" * 100)
    else:
        save_checkpoint(
            root, progress=Progress(step=2), config=adapter.config, base=adapter.base, state=adapter.state,
            moments={"exp_avg.B": torch.ones(100_000)}, settings={})
    return 0

run_command(main, sys.argv[3:])
"""


@pytest.mark.parametrize(("kind", "limit"), [("adapter", 0), ("adapter", 1000), ("checkpoint", 100_000), ("text", 100)])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(base: Path, tmp_path: Path, kind: str, limit: int) -> None:
    write_native(tmp_path / "adapter", base, values(base))
    root = tmp_path / "root"
    root.mkdir()
    (root / "latest").write_text("step_1\n")
    for name in ("adapter", "step_1"):
        shutil.copytree(tmp_path / "adapter", root / name)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "adapter"), str(root), str(limit), kind],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    target = {"adapter": "adapter", "checkpoint": "step_2", "text": "latest"}[kind]
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {root / target}: cannot be written (")
    assert "File too large" in result.stderr and "nothing was changed" in result.stderr
    assert names(root) == {"latest", "adapter", "step_1"}
    assert (root / "latest").read_text() == "step_1\n"
    for file in (CONFIG, WEIGHTS):
        assert (root / "adapter" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


# --------------------------------------------------------------------------------------------- checkpoints


def save(root: Path, adapter: NativeAdapter, step: int, best: int | None) -> Path:
    return save_checkpoint(
        root,
        progress=Progress(step=step, consumed_samples=24 * step, best_metric=0.5, best_step=best, evaluated_step=step),
        config=adapter.config,
        base=adapter.base,
        state=adapter.state,
        moments={"exp_avg.B": torch.full((2, 3), float(step)), "exp_avg_sq.B": torch.ones(2, 3).T},
        settings={"method": "tl6", "layers": [1, 3]},
    )


def test_a_checkpoint_comes_back_and_is_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = native_adapter(find_model(str(base)), values(base))
    folder = save(tmp_path, adapter, 4, 4)
    assert folder == tmp_path / "step_4" == latest_checkpoint(tmp_path)
    assert names(folder) == {CONFIG, WEIGHTS, "trainer_state.safetensors", "trainer_state.json"}
    found = load_checkpoint(folder)
    assert found.progress == Progress(4, 96, 0.5, 4, 0, 4)
    assert found.settings == {"method": "tl6", "layers": [1, 3]}
    assert torch.equal(found.moments["exp_avg.B"], torch.full((2, 3), 4.0))
    for loaded in (found.adapter, load_adapter(folder)):
        assert loaded.config == adapter.config
        assert all(torch.equal(loaded.state[name], adapter.state[name]) for name in "ABuv")


def test_the_best_and_the_last_checkpoint_are_kept(base: Path, tmp_path: Path) -> None:
    adapter = native_adapter(find_model(str(base)), values(base))
    expected = [(2, None, {2}), (4, 4, {4}), (6, 4, {4, 6}), (8, 4, {4, 8}), (10, 10, {10}), (100, 10, {10, 100})]
    for step, best, kept in expected:
        save(tmp_path, adapter, step, best)
        assert names(tmp_path) == {f"step_{number}" for number in kept} | {"latest"}
        assert (tmp_path / "latest").read_text() == f"step_{step}\n"


def test_latest_moves_after_the_new_one_is_whole_and_before_the_old_one_goes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = native_adapter(find_model(str(base)), values(base))
    save(tmp_path, adapter, 2, 2)
    seen = []

    def watched(path: Path, text: str) -> None:
        seen.append((path.name, load_checkpoint(tmp_path / "step_4").progress.step, (tmp_path / "step_2").is_dir()))
        write_text(path, text)

    monkeypatch.setattr(resume, "write_text", watched)
    save(tmp_path, adapter, 4, 4)
    assert seen == [("latest", 4, True)]
    assert names(tmp_path) == {"step_4", "latest"}


def test_a_latest_that_names_nothing_is_one_line(base: Path, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for text in ("step_9\n", "../elsewhere", ""):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(UserError, match="which is no checkpoint in") as error:
            latest_checkpoint(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("trainer_state.json", None, "expected a checkpoint of a run"),
        ("trainer_state.json", b"{}", "step is missing"),
        ("trainer_state.safetensors", None, "not a whole safetensors file"),
        ("trainer_state.safetensors", b"cut", "not a whole safetensors file"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    base: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    folder = save(tmp_path, native_adapter(find_model(str(base)), values(base)), 4, 4)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(folder)
    assert str(folder / file) in str(error.value) and "\n" not in str(error.value)
