"""The native adapter's files: what they hold and what is refused; and which checkpoints are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.native_files import native_adapter, write_native
from support.oracle import OracleAdapter, OracleConfig, delta_weights
from support.oracle_adapter import TARGET_PARTS
from support.run_files import edit_json, edit_tensors, files_of, flip_last_value, truncate
from support.task_files import refusal
from support.tiny_models import random_adapter, write_tiny_model

import megatron_tiedlora
from megatron_tiedlora.adapters.tied_adapter import AdapterShard, Target, TiedAdapter, targets_of
from megatron_tiedlora.adapters.tying import AdapterLayout, gather_state
from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import TARGET_NAMES, linear_sizes
from megatron_tiedlora.checkpoint.base_identity import check_same_base
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, remove_superseded
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.inputs import check_base
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.parallel.groups import Grid

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers, d = 32, 4 heads and 2 kv heads of 8: o = 32 + 16 + 16."""
    return write_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=False)


def values(base: Path, method: str = "tl6", **keywords: Any) -> OracleAdapter:
    return random_adapter(method, OracleConfig.from_folder(base), alpha=6, layers=(1, 3), **keywords)


# --------------------------------------------------------------------------------------------- what the files hold


@pytest.mark.parametrize("targets", [("qkv",), ("o_proj",), ("qkv", "down_proj"), TARGET_NAMES], ids="-".join)
@pytest.mark.parametrize("method", METHODS)
def test_all_tensors_are_written_whole_and_come_back(
    base: Path, tmp_path: Path, method: str, targets: tuple[str, ...]
) -> None:
    oracle = values(base, method, targets=targets)
    written = write_native(tmp_path / "adapter", base, oracle)
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    if targets == ("qkv",):
        lead = (2,) if method == "lora" else ()
        shapes = {"A": (*lead, 4, 32), "B": (*lead, 64, 4), "u": (2, 4), "v": (2, 64)}
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == shapes
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    loaded = load_native_adapter(tmp_path / "adapter")
    assert loaded.config == written.config and loaded.base_identity == written.base_identity
    assert loaded.config.targets == targets_of(find_model(str(base)).shape, targets)
    read_by_oracle = OracleAdapter.from_folder(tmp_path / "adapter")
    assert (read_by_oracle.method, read_by_oracle.rank, read_by_oracle.alpha) == (method, 4, 6.0)
    assert (read_by_oracle.layers, set(read_by_oracle.targets)) == ((1, 3), set(targets))
    assert loaded.state.keys() == read_by_oracle.tensors.keys() == oracle.tensors.keys()
    for name, tensor in oracle.tensors.items():
        assert torch.equal(loaded.state[name], tensor) and torch.equal(read_by_oracle.tensors[name], tensor)
    tied_adapter, whole = TiedAdapter(AdapterShard.whole(loaded.config)), Grid(rank=0, world_size=1)
    tied_adapter.load_full(loaded.state)
    local = dict(tied_adapter.named_parameters())
    full = gather_state(local, AdapterLayout(loaded.config, whole, (loaded.config.layers,)))
    for name, tensor in full.items():  # what a run would save again
        assert torch.equal(tensor, oracle.tensors[name]), name
    save_adapter(tmp_path / "again", loaded)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "adapter")


def test_only_a_model_in_memory_may_have_another_tokenizer(base: Path) -> None:
    trained = native_adapter(find_model(str(base)), values(base, "tl6")).base_identity
    found = replace(trained, tokenizer_hash="another")
    trained = replace(trained, tokenizer_hash="its")
    assert check_same_base(trained, found, source="x", in_memory=True) == ()
    assert refusal(check_same_base, trained, found, source="x").startswith("x: trained with a different tokenizer")


@pytest.mark.parametrize("method", METHODS)
def test_updates_are_the_oracle_s_for_every_target(base: Path, tmp_path: Path, method: str) -> None:
    """W' - W of every linear and layer, as they are stored and as they are read back."""
    oracle = values(base, method, targets=TARGET_NAMES)
    write_native(tmp_path / "adapter", base, oracle)
    read_by_oracle = OracleAdapter.from_folder(tmp_path / "adapter")
    assert read_by_oracle.targets == TARGET_NAMES
    updates = list(load_native_adapter(tmp_path / "adapter").updates(find_model(str(base)).shape))
    assert len(updates) == len(oracle.layers) * len(TARGET_NAMES)
    for rule, a, b in updates:
        deltas = delta_weights(read_by_oracle, OracleConfig.from_folder(base), rule.layer)
        stored = [part.name.split(".", 3)[-1].removesuffix(".weight") for part in rule.parts]
        (parts,) = [parts for parts in TARGET_PARTS.values() if list(parts.values()) == stored]
        torch.testing.assert_close(b @ a, torch.cat([deltas[part] for part in parts]))


def test_the_config_has_the_documented_fields(base: Path, tmp_path: Path) -> None:
    adapter = write_native(tmp_path / "adapter", base, values(base))
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content == {
        "format_version": 2,
        "peft_type": "TIED_LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "method": "tl6",
        "rank": 4,
        "alpha": 6.0,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "qkv_layout": "q|k|v",
        "targets": ["qkv"],
        "layers": [1, 3],
        "base_model": str(base),
        "base_hash": find_model(str(base)).base_hash,
        "base_weights_hash": adapter.base_identity.base_weights_hash,
        "base_sample": adapter.base_identity.base_sample,
        "seed": 5,
        "init_std_a": pytest.approx(32**-0.5),
        "init_std_b": pytest.approx(4**-0.5),
        "dtype": "fp32",
        "version": megatron_tiedlora.__version__,
        "sha256": {WEIGHTS: hashlib.sha256((tmp_path / "adapter" / WEIGHTS).read_bytes()).hexdigest()},
        "config_sha256": content["config_sha256"],
    }
    rest = {name: value for name, value in content.items() if name != "config_sha256"}
    plain = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert content["config_sha256"] == hashlib.sha256(plain.encode()).hexdigest()
    assert len(content["base_sample"]) == 64
    assert len(content["base_hash"]) == len(content["base_weights_hash"]) == 64
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_fits_its_base_in_every_precision(base: Path, tmp_path: Path) -> None:
    """The identity is of the model, not of how it is stored."""
    half = write_tiny_model(tmp_path / "half", dtype=torch.bfloat16, tokenizer=False)
    adapter = native_adapter(find_model(str(base)), values(base))
    check_base(find_model(str(half)), adapter, uses_tokenizer=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_from_a_file_are_those_of_the_model(preset: str) -> None:
    shape = shape_from_hf(PRESETS[preset])
    known = linear_sizes(shape.hidden_size, shape.heads.rows, shape.intermediate_size)
    assert tuple(Target(name, *sizes) for name, sizes in known.items()) == targets_of(shape, TARGET_NAMES)


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_layers": 5}, "num_layers 3, but"),
        ({"num_kv_heads": 4}, "num_key_value_heads 2, but"),
        ({"head_dim": 12}, "head_dim 8, but"),
        ({"intermediate_size": 80}, "with intermediate_size 48, but"),
        ({"rope_theta": 500.0}, "config differ"),
        ({"seed": 1}, "weights differ"),
    ],
)
def test_another_base_is_refused(base: Path, tmp_path: Path, shape: dict[str, Any], message: str) -> None:
    adapter = native_adapter(find_model(str(base)), values(base))
    other = write_tiny_model(tmp_path / "other", tokenizer=False, **shape)
    said = refusal(check_base, find_model(str(other)), adapter, uses_tokenizer=False)
    assert all(words in said for words in (message, str(base), str(other), "--model"))
    if "_" in message:  # another shape is never taken
        assert message in refusal(check_base, find_model(str(other)), adapter, uses_tokenizer=False, differs=True)


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the config, as `edit_json`."""
    return lambda folder: edit_json(folder / CONFIG, **changes)


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / WEIGHTS, change)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG, "no such file; expected a native Tied-LoRA"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "not a complete safetensors file"),
    "not json": (lambda folder: (folder / CONFIG).write_text("{"), CONFIG, "not valid JSON"),
    "no object": (lambda folder: (folder / CONFIG).write_text("[]"), CONFIG, "expected a JSON object"),
    "truncated": (lambda folder: truncate(folder / WEIGHTS), WEIGHTS, "not a complete safetensors file"),
    "version": (edit(format_version=3), CONFIG, "is not 2, which this version reads; train"),
    "method": (edit(method="tl7"), CONFIG, "method 'tl7'"),
    "layout": (edit(qkv_layout="interleaved"), CONFIG, "'interleaved'"),
    "no rank": (edit(without=["rank"]), CONFIG, "rank is missing"),
    "no hash": (edit(without=["base_weights_hash"]), CONFIG, "base_weights_hash is missing"),
    "rank": (edit(rank=0), CONFIG, "rank = 0"),
    "rank text": (edit(rank="4"), CONFIG, "rank = '4'"),
    "head_dim": (edit(head_dim="wide"), CONFIG, "head_dim = 'wide'"),
    "alpha": (edit(alpha="much"), CONFIG, "wrong type"),
    "no targets": (edit(without=["targets"]), CONFIG, "targets is missing"),
    "no width": (edit(without=["intermediate_size"]), CONFIG, "intermediate_size is missing"),
    "layers": (edit(layers=7), CONFIG, "wrong type"),
    "layer 0": (edit(layers=[0, 3]), CONFIG, "[0, 3] are not ascending numbers from 1 to 3"),
    "layer 4": (edit(layers=[1, 4]), CONFIG, "[1, 4] are not ascending numbers from 1 to 3"),
    "layer order": (edit(layers=[3, 1]), CONFIG, "[3, 1] are not ascending numbers"),
    "no u": (retensor(lambda tensors: tensors.pop("u")), WEIGHTS, "tensor u is missing"),
    "shape": (retensor(lambda t: t.update(B=t["B"].T.contiguous())), WEIGHTS, "B has shape (4, 64), expected (64, 4)"),
    "whole numbers": (retensor(lambda t: t.update(u=t["u"].to(torch.int8))), WEIGHTS, "u is I8, not floating point"),
    "complex": (retensor(lambda t: t.update(u=t["u"].to(torch.complex64))), WEIGHTS, "u is C64, not floating"),
    "8 bits": (retensor(lambda t: t.update(u=t["u"].to(torch.float8_e5m2))), WEIGHTS, "u is F8_E5M2, not floating"),
    "fp64": (retensor(lambda t: t.update(u=t["u"].double() * 1e300)), WEIGHTS, "u holds numbers that are not finite"),
    "alpha 0": (edit(alpha=0), CONFIG, "alpha = 0 is not between"),
    "alpha negative": (edit(alpha=-3), CONFIG, "alpha = -3 is not between"),
    "alpha absurd": (edit(alpha=1e300), CONFIG, "alpha = 1e+300 is not between"),
    "width": (edit(init_std_b=1e9), CONFIG, "init_std_b = 1e+09 is not between 0 and 1000"),
    "name": (edit(base_model="x\x1b[2J"), CONFIG, "holds control characters"),
    "u not one": (edit(method="tl5"), WEIGHTS, "u is not all ones, but method tl5 does not train it"),
    "huge": (retensor(lambda t: t["A"].mul_(1e35)), WEIGHTS, "its update may reach"),
    "more": (retensor(lambda t: t.update(more=torch.ones(1))), WEIGHTS, "holds a tensor 'more' that does not belong"),
    "no table": (edit(sha256=[1]), CONFIG, "is not a table of files and checksums"),
    "unsealed": (edit(alpha=7.0, seals=False), CONFIG, "does not match its own checksum"),
    "precision": (edit(base_stored="int4"), CONFIG, "base_stored 'int4' is not one of bf16, fp16, fp32"),
    "unknown": (edit(targets=["qkv", "o_projj"]), CONFIG, "'o_projj'] is invalid; list one or more of qkv, o_proj, "),
    "order": (edit(targets=["gate_up", "qkv"]), CONFIG, "in this order"),
    "twice": (edit(targets=["qkv", "qkv"]), CONFIG, "in this order"),
    "none": (edit(targets=[]), CONFIG, "targets = [] is invalid; list one or more of"),
    "no list": (edit(targets="all"), CONFIG, "wrong type"),
    "mlp width": (edit(intermediate_size=7), WEIGHTS, "gate_up.B has shape"),
    "fewer targets": (edit(targets=["qkv"]), WEIGHTS, "holds a tensor 'gate_up."),
    "more targets": (edit(targets=["qkv", "gate_up", "down_proj"]), WEIGHTS, "tensor down_proj.A is missing"),
    "type": (edit(peft_type="LORA"), "", "this is a PEFT adapter"),
    "seal alone": (edit(sha256=None, seals=False), CONFIG, "is not a table of files and checksums"),
    "flipped": (lambda folder: flip_last_value(folder / WEIGHTS), WEIGHTS, "does not match its checksum"),
    "nan": (retensor(lambda t: t["v"].view(-1)[3].fill_(torch.nan)), WEIGHTS, "v holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_adapter_is_one_line_that_names_the_file(base: Path, tmp_path: Path, case: str) -> None:
    write_native(tmp_path / "adapter", base, values(base, targets=("qkv", "gate_up")))
    damage, file, message = DAMAGE[case]
    damage(tmp_path / "adapter")
    said = refusal(load_native_adapter, tmp_path / "adapter")
    assert message in said and str(tmp_path / "adapter" / file) in said


def test_a_folder_of_another_format_names_the_version_that_wrote_it(base: Path, tmp_path: Path) -> None:
    """That of version 0.1, which was not published, had no peft_type, targets and intermediate_size."""
    write_native(tmp_path / "adapter", base, values(base))
    edit(without=["peft_type", "targets", "intermediate_size"], format_version=1, version="0.1.0")(tmp_path / "adapter")
    assert refusal(load_native_adapter, tmp_path / "adapter") == (
        f"{tmp_path / 'adapter' / CONFIG}: format_version 1, of version '0.1.0' of this package, is not 2, which"
        " this version reads; train the adapter again"
    )


# --------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("keep", "later", "left"),
    [(1, False, {2, 8, 9, 10}), (2, False, {2, 7, 8, 9, 10}), (1, True, {2, 8}), (3, True, {2, 6, 7, 8})],
)
def test_earlier_checkpoints_are_removed(tmp_path: Path, keep: int, later: bool, left: set[int]) -> None:
    """After a save, and by a run that resumes after a kill between a save and that."""
    for step in range(1, 11):
        (tmp_path / f"step_{step}").mkdir()
    remove_superseded(tmp_path, Progress(step=8, best_step=2), keep=keep, later=later)
    assert {int(path.name.removeprefix("step_")) for path in tmp_path.iterdir()} == left
