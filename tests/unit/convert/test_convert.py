"""Merged checkpoints and PEFT adapters compute what the native adapter computes, in the programs that read them; and
the commands that write them: what they print, what they refuse and how they end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.native_files import Inputs, with_adapter
from support.oracle import OracleConfig, load_weights, merged_weights
from support.peft_models import hf_model, logits_of, our_logits, peft_logits, share
from support.run_files import edit_json, edit_tensors, files_of, truncate
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.checkpoint.base_identity import MERGE_RECORD
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.adapter_settings import ExportSettings, MergeSettings, adapter_flags
from megatron_tiedlora.config.cli import run_command
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.inputs import EXPORT_RECORD
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.data.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"


# name: (model, sharded, adapted layers or all)
CASES: dict[str, tuple[dict[str, Any], bool, tuple[int, ...] | None]] = {
    "gqa": ({}, False, None),
    "mha_sharded": ({"num_kv_heads": 4}, True, None),
    "some_layers_sharded": ({"tied": True, "head_dim": 12}, True, (1, 3)),
    "one_layer_bias": ({"attention_bias": True, "llama3_rope": True}, False, (2,)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: write_tiny_model(root / name, max_shard_size="30KB" if sharded else None, **shape)
        for name, (shape, sharded, _) in CASES.items()
    }


# --------------------------------------------------------------------------------------------- both exports


@pytest.mark.parametrize(
    ("method", "case"),
    [
        *((method, "some_layers_sharded") for method in METHODS),
        *((method, case) for method in ("lora", "tl6") for case in CASES if case != "some_layers_sharded"),
    ],
)
def test_exports_compute_what_the_adapter_computes(
    bases: dict[str, Path], tmp_path: Path, method: str, case: str
) -> None:
    base, layers = bases[case], CASES[case][2]
    source, adapter, oracle = with_adapter(base, method, layers)
    merge_adapter(source, adapter, tmp_path / "merged")
    export_peft(source, adapter, tmp_path / "peft")
    native = our_logits(source, adapter)
    assert share(our_logits(source, None), native) > 0.02  # the update is there
    assert share(logits_of(hf_model(tmp_path / "merged")), native) <= 1e-4
    assert share(peft_logits(base, tmp_path / "peft"), native) <= 1e-4

    stored, merged = load_weights(base), load_weights(tmp_path / "merged")
    expected = merged_weights(stored, OracleConfig.from_folder(base), oracle)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    changed = {f"model.layers.{i - 1}.self_attn.{part}_proj.weight" for i in layers or (1, 2, 3) for part in "qkv"}
    assert {name for name in merged if not torch.equal(merged[name], stored[name])} == changed


# --------------------------------------------------------------------------------------------- the merged folder


def test_a_merged_folder_holds_a_whole_model_and_nothing_else(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["mha_sharded"], tmp_path / "base")
    shards = {file.name for file in base.glob("*.safetensors")}
    assert len(shards) > 3
    files = {*shards, INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    others = {"demo_manifest.json": "{}", "optimizer.json": "{}", "README.md": "of the base"}
    kept = {"LICENSE.txt": "terms", "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    for name, text in (others | kept).items():
        (base / name).write_text(text)
    source, adapter, _ = with_adapter(base, "tl6")
    merge_adapter(source, adapter, tmp_path / "merged")
    found = list((tmp_path / "merged").iterdir())
    assert {file.name for file in found} == {*files, *kept, MERGE_RECORD}
    for file in found:
        assert file.stat().st_mode & 0o044 == (tmp_path / "merged").stat().st_mode & 0o044, file  # others may read it


@pytest.mark.parametrize(
    ("field", "dtype"),
    [
        *(("dtype", kind) for kind in (None, torch.bfloat16, torch.float16, torch.float32)),
        ("torch_dtype", torch.bfloat16),
    ],
)
def test_config_states_the_dtype_that_is_stored(
    base: Path, tmp_path: Path, field: str, dtype: torch.dtype | None
) -> None:
    """In the field that it has: transformers 4 wrote torch_dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    old, merged, expected = Path(shutil.copytree(base, tmp_path / "base")), tmp_path / "merged", dtype or torch.float32
    edit_json(old / "config.json", without=["dtype"], **{field: "float32"})
    source, adapter, _ = with_adapter(old, "tl6")
    merge_adapter(source, adapter, merged, dtype=dtype)
    assert {tensor.dtype for tensor in load_weights(merged).values()} == {expected}
    assert AutoConfig.from_pretrained(merged).dtype == expected
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == expected
    values, original = (json.loads((folder / "config.json").read_text()) for folder in (merged, old))
    assert values == {**original, field: str(expected).removeprefix("torch.")}  # nothing else changes


def test_the_merged_tokenizer_is_the_one_of_training(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = shutil.copytree(base, tmp_path / "base")
    edit_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    backend = json.loads((base / "tokenizer.json").read_text())
    backend["model"]["vocab"]["12"] = 259
    backend["model"]["merges"] = [["1", "2"]]
    digits = {"type": "Digits", "individual_digits": True}
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, backend["pre_tokenizer"]]}
    (base / "tokenizer.json").write_text(json.dumps(backend))
    source, adapter, _ = with_adapter(base, "tl6")
    merge_adapter(source, adapter, tmp_path / "merged")
    ours, theirs = load_tokenizer(base), AutoTokenizer.from_pretrained(tmp_path / "merged")
    # The class name makes transformers rebuild the base's own and lose the splitting into digits.
    assert 259 in AutoTokenizer.from_pretrained(base)("12").input_ids and 259 not in ours("12").input_ids
    for text in ("Question: 12 + 30?", "  naïve\n\n日本", "</s> <s>x", ""):
        for special in (False, True):
            assert theirs(text, add_special_tokens=special).input_ids == (
                ours(text, add_special_tokens=special).input_ids
            )
    assert theirs.eos_token_id == ours.eos_token_id == 2
    content = (tmp_path / "merged" / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in content  # nothing of this machine


def test_another_tokenizer_replaces_the_base_s(base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(base, tmp_path / "base")
    (base / "added_tokens.json").write_text("{}")
    other = load_tokenizer(shutil.copytree(base, tmp_path / "other"))
    other.add_tokens(["<only here>"])
    other.save_pretrained(tmp_path / "other")
    source, adapter, _ = with_adapter(base, "tl6")
    own = str(tmp_path / "other")
    said = refusal(merge_adapter, source, adapter, tmp_path / "m", tokenizer=own)
    assert "trained with a different tokenizer" in said
    notes: list[str] = []
    merge_adapter(source, adapter, tmp_path / "merged", tokenizer=own, base_differs=True, say=notes.append)
    assert len(notes) == 1 and "whose tokenizer differ" in notes[0]
    assert "<only here>" in load_tokenizer(tmp_path / "merged").get_vocab()
    assert not (tmp_path / "merged" / "added_tokens.json").exists()  # of the tokenizer that was replaced


def test_an_adapter_that_was_trained_on_a_merged_model_is_merged_into_it(inputs: Inputs, tmp_path: Path) -> None:
    merge_adapter(*inputs, tmp_path / "merged")
    merged, second, _ = with_adapter(tmp_path / "merged", "tl5", seed=3)
    merge_adapter(merged, second, tmp_path / "both")
    assert share(logits_of(hf_model(tmp_path / "both")), our_logits(merged, second)) <= 1e-4
    for convert in (merge_adapter, export_peft):
        assert "weights differ" in refusal(convert, inputs[0], second, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


# --------------------------------------------------------------------------------------------- the PEFT adapter


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_peft_files_are_as_documented(base: Path, tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    source, adapter, oracle = with_adapter(base, "tl6", layers)
    assert export_peft(source, adapter, tmp_path / "peft").rank == 4
    files = {"adapter_config.json", "adapter_model.safetensors", "tiedlora_export.json"}
    assert {f.name for f in (tmp_path / "peft").iterdir()} == files
    content = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,  # a path would not exist elsewhere; the record has it
        "r": 4,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    if layers:
        expected |= {"layers_to_transform": [0, 2], "layers_pattern": "layers"}
    assert content == expected
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    rows = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
    for (index, layer), (part, cut) in product(enumerate(layers or (1, 2, 3)), rows.items()):
        module = f"base_model.model.model.layers.{layer - 1}.self_attn.{part}_proj"
        a, b = (tensors.pop(f"{module}.lora_{side}.weight") for side in "AB")
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, torch.diag(oracle.u[index]) @ oracle.A)
        torch.testing.assert_close(b, 6 / 4 * (torch.diag(oracle.v[index]) @ oracle.B)[cut])
    assert not tensors


def test_padding_the_rank_changes_nothing(base: Path, inputs: Inputs, tmp_path: Path) -> None:
    for rank in (3, 0, -8):
        said = refusal(export_peft, *inputs, tmp_path / "peft", pad_rank_to=rank)
        assert said.startswith(f"--pad_rank_to {rank} is less than the adapter's rank 4")
    assert not list(tmp_path.iterdir())
    export_peft(*inputs, tmp_path / "plain")
    assert export_peft(*inputs, tmp_path / "padded", pad_rank_to=16).rank == 16
    content = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert content["r"] == content["lora_alpha"] == 16
    plain, padded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "padded"))
    for name, tensor in padded.items():
        kept, filled = (tensor[:4], tensor[4:]) if "lora_A" in name else (tensor[:, :4], tensor[:, 4:])
        assert filled.numel() and torch.equal(kept, plain[name]) and not filled.any()
    assert share(peft_logits(base, tmp_path / "padded"), our_logits(*inputs)) <= 1e-4


def test_what_is_not_finite_is_refused_by_tensor(base: Path, inputs: Inputs, tmp_path: Path) -> None:
    """A NaN of the base in computed weights, an update that fp16 does not hold, factors that overflow."""
    broken, output = Path(shutil.copytree(base, tmp_path / "base")), tmp_path / "output"
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(broken / "model.safetensors", lambda tensors: tensors[name][2, 3].fill_(torch.nan))
    for targets, dtype in ((("gate_up",), None), (("qkv",), torch.float32)):
        source, adapter, _ = with_adapter(broken, "tl6", targets=targets)
        said = refusal(merge_adapter, source, adapter, output, dtype=dtype)
        assert f"{name} has values that are not finite (the base has such values too; download it again)" in said
    source, adapter = inputs
    large = replace(adapter, state={**adapter.state, "A": adapter.state["A"] * 1e5})
    with pytest.raises(UserError, match=r"[qkv]_proj\.weight has .* are too large for float16; give --dtype bf16"):
        merge_adapter(source, large, output, dtype=torch.float16)
    wide = {**adapter.state, "B": adapter.state["B"] * 1e37}
    huge = replace(adapter, config=replace(adapter.config, alpha=1e6), state=wide)
    assert "lora_B.weight of its export has values that are not finite" in refusal(export_peft, source, huge, output)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


# --------------------------------------------------------------------------------------------- the commands


def test_an_output_that_is_an_empty_folder_is_filled(inputs: Inputs, tmp_path: Path) -> None:
    export_peft(*inputs, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


def test_a_corrupt_tokenizer_stops_the_merge_before_it_writes(base: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    (broken / "tokenizer.json").write_text("{")
    source, adapter, _ = with_adapter(broken, "tl6")
    assert "cannot be read as a tokenizer" in refusal(merge_adapter, source, adapter, tmp_path / "merged")
    assert {item.name for item in tmp_path.iterdir()} == {"base"}


def test_the_next_command_has_the_flags_of_this_one() -> None:
    given = MergeSettings(adapter="a b", model="m", base_differs=True, output="new")
    assert adapter_flags(given.adapter, given) == "--adapter 'a b' --model m --base_differs"
    assert adapter_flags("a", ExportSettings(adapter=["a"], output="new")) == "--adapter a"


def test_checkpoints_and_peft_folders_are_merged_alike(base: Path, exported: Path, tmp_path: Path) -> None:
    """The native adapter that travels in its export comes back; without it the PEFT tensors give the same weights."""
    native = load_native_adapter(exported / "adapter")
    export_peft(find_model(str(base)), native, tmp_path / "plain")
    step = Progress(step=1)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", progress=step, moments={}, settings={}, adapter=native)
    wanted, output = files_of(exported / "merged"), tmp_path / "merged"
    for folder in (checkpoint, exported / "peft", tmp_path / "plain"):
        assert call("merge", ["--adapter", str(folder), "--output", str(output)]) == 0
        found = files_of(output)
        if folder == tmp_path / "plain":
            assert b'"method": "lora"' in found.pop(MERGE_RECORD) and found.items() <= wanted.items()
        else:
            assert found == wanted
        shutil.rmtree(output)


ADAPTER, OUT = "--adapter adapter", "--output out"
WRONG: list[tuple[str, str, str]] = [  # commands, their arguments, what is said
    ("merge export", f"--adapter none {OUT}", "none"),
    ("merge export", f"--adapter run {OUT}", "--adapter run: this is a run folder; give run/adapter"),
    ("export", f"--adapter peft {OUT}", "this is a PEFT adapter; give the native one"),  # a merge takes it
    ("merge export", f"--adapter lost {OUT}", "lost: its base cannot be found; give it with --model"),
    ("merge export", f"{ADAPTER} --model merged {OUT}", "already merged into it; give the plain base"),
    *(("merge export", f"{ADAPTER} --output {name}", f"--output {name} exists; give a new folder")
      for name in ("peft", "file", "link")),
    ("merge export", ADAPTER, "--output"),
    ("merge export", f"{ADAPTER} --ouput out", "--output"),
    ("import", "--peft peft --output adapter", "adapter exists; give a new folder"),
    ("import", f"--peft adapter {OUT}", "not a PEFT adapter (it is a native one); give another folder"),
    ("import", f"--peft none {OUT}", "none/adapter_config.json: no such file; expected a PEFT adapter folder"),
    ("import", f"--peft nameless {OUT}", "names no base model; give it with --model"),
    ("verify", f"{ADAPTER} --merged none", "none/config.json: no such file"),
    ("verify", f"{ADAPTER} --merged peft", "peft/config.json: no such file"),
    ("verify", f"{ADAPTER} --peft none", "none/adapter_config.json: no such file"),
    ("verify", f"{ADAPTER} --peft adapter", "not a PEFT adapter (it is a native one)"),
    ("verify", f"{ADAPTER} --merged other", "num_key_value_heads is 4, not 2 as in"),
    ("verify", f"{ADAPTER} --merged cut/merged", "not a complete safetensors file"),
    ("verify", f"{ADAPTER} --peft cut/peft", "not a complete safetensors file"),
    ("verify", f"{ADAPTER} --in none", "nothing to check; give --merged DIR, --peft DIR or both"),
    ("verify", f"{ADAPTER} --merged merged --in vllm", "--in vllm: 'vllm' is not one of transformers, peft, none"),
    ("verify", f"{ADAPTER} --merged merged --in transformers,", "--in transformers,: '' is not one of"),
    ("verify", f"{ADAPTER} --merged merged --in peft", "--in peft: peft has nothing to load; give --peft DIR"),
    ("verify", f"{ADAPTER} --peft peft --in transformers",
     "--in transformers: transformers has nothing to load; give --merged DIR"),
    ("verify", f"{ADAPTER} --merged merged --in transformers --dtype bf16",
     "transformers computes in fp32, not in bf16; remove --dtype"),
    ("verify", f"{ADAPTER} --peft peft --dtype bf16", "--dtype bf16: a PEFT adapter is compared in fp32 only"),
]  # fmt: skip


@pytest.fixture(scope="module")
def wrong(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exports, a run, an adapter whose base is gone, another model, cut/ with weights that are too short, a PEFT
    folder that names no base, a file, and a link to nowhere."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("wrong") / "all")
    for name in ("run/adapter", "lost"):
        shutil.copytree(exported / "adapter", folder / name)
    edit_json(folder / "lost" / "adapter_config.json", base_model="/gone")
    write_tiny_model(folder / "other", num_kv_heads=4, tokenizer=False)
    for name in ("merged", "peft"):
        (weights,) = Path(shutil.copytree(exported / name, folder / "cut" / name)).glob("*.safetensors")
        truncate(weights)
    edit_json(
        shutil.copytree(exported / "peft", folder / "nameless") / "adapter_config.json", base_model_name_or_path=None
    )
    (folder / "nameless" / EXPORT_RECORD).unlink()
    (folder / "file").write_text("precious")
    (folder / "link").symlink_to(folder / "nowhere")
    return folder


@pytest.mark.parametrize("case", WRONG, ids=lambda case: " ".join(case[:2]))
def test_wrong_arguments_are_one_line(
    wrong: Path, case: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools, words, message = case
    monkeypatch.chdir(wrong)
    before = files_of(wrong)
    for tool in tools.split():
        with pytest.raises(SystemExit) as end:
            run_command(partial(call, tool), words.split())
        captured = capsys.readouterr()
        assert end.value.code == 2 and not captured.out
        assert captured.err.count("\n") == 1 and message in captured.err, captured.err
    assert files_of(wrong) == before and (wrong / "link").is_symlink() and not (wrong / "nowhere").exists()
