"""PEFT LoRA adapters read as native ones: the same update as PEFT's own, and a refusal of all that is not a LoRA."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import moments_of, with_adapter, write_native
from oracle import OracleConfig
from peft_folders import CONFIG, WEIGHTS, rejection, with_fields, with_tensors
from peft_models import logits_of, lora_model, share
from quantised_folders import SHAPE, quantised_folder
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import lora_factors
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.inputs import EXPORT_RECORD, NATIVE_FOLDER, adapter_kind, check_base
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import exported_base, import_peft, open_adapter, read_peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, fewer key-value heads than heads, and q wider than the hidden size: rows 48, 24 and 24 of 32. Gate
    and up have 40."""
    return write_tiny_model(tmp_path_factory.mktemp("base"), head_dim=12, intermediate_size=40, tokenizer=False)


# --------------------------------------------------------------------------------------------- the same update

Q_AND_V = ["q_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# name: options of PEFT's LoraConfig, layers and rank of the native adapter
OPTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "q_v": ({"r": 3, "lora_alpha": 5, "target_modules": Q_AND_V}, (1, 2, 3), 6),
    "k": ({"r": 3, "lora_alpha": 5, "target_modules": ["k_proj"]}, (1, 2, 3), 3),
    "q_k_v": ({"r": 2, "lora_alpha": 7, "target_modules": ["v_proj", "k_proj", "q_proj"]}, (1, 2, 3), 6),
    "rslora": ({"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": Q_AND_V}, (1, 2, 3), 8),
    "layers": ({"r": 3, "target_modules": Q_AND_V, "layers_to_transform": [2, 0], "lora_dropout": 0.1}, (1, 3), 6),
    "layer": ({"r": 3, "target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, (2,), 3),
    "pattern": ({"r": 2, "target_modules": r".*layers\.(0\..*q_proj|2\..*(k|v)_proj)"}, (1, 3), 4),
    "full_name": ({"r": 2, "target_modules": ["model.layers.1.self_attn.v_proj", "k_proj"]}, (1, 2, 3), 4),
    "full_name_beside_layers": (
        {"r": 2, "target_modules": ["model.layers.1.self_attn.v_proj", "k_proj"], "layers_to_transform": [0]},
        (1, 2),
        2,  # no layer has two projections
    ),
    "excluded": ({"r": 2, "target_modules": Q_AND_V, "exclude_modules": ["1.self_attn.v_proj"]}, (1, 2, 3), 4),
    "gaussian": ({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, (1, 2, 3), 2),
    "o": ({"r": 3, "target_modules": ["o_proj"]}, (1, 2, 3), 3),
    "up": ({"r": 3, "lora_alpha": 5, "target_modules": ["up_proj"]}, (1, 2, 3), 3),
    "gate": ({"r": 3, "target_modules": ["gate_proj"], "layers_to_transform": 2}, (3,), 3),
    "mlp": ({"r": 2, "lora_alpha": 7, "target_modules": MLP, "use_rslora": True}, (1, 2, 3), 4),
    "o_and_down": ({"r": 3, "lora_alpha": 5, "target_modules": ["down_proj", "o_proj"]}, (1, 2, 3), 3),
    "o_and_separate": ({"r": 2, "target_modules": ["o_proj", "gate_proj", "up_proj"]}, (1, 2, 3), 4),  # o_proj padded
    "all_linear": ({"r": 2, "lora_alpha": 5, "target_modules": "all-linear"}, (1, 2, 3), 6),
    # q of layer 1, up of layer 2, down of layer 3: one module a linear, so nothing is block-diagonal
    "one_a_layer": ({"r": 2, "target_modules": r".*layers\.(0\..*q_proj|1\..*up_proj|2\..*down_proj)"}, (1, 2, 3), 2),
}
TARGETS = {  # of the native adapter, where it is not qkv alone
    **{"o": ["o_proj"], "up": ["gate_up"], "gate": ["gate_up"], "mlp": ["gate_up", "down_proj"]},
    **{"o_and_separate": ["o_proj", "gate_up"], "o_and_down": ["o_proj", "down_proj"], "all_linear": [*TARGET_NAMES]},
    "one_a_layer": ["qkv", "gate_up", "down_proj"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_equal_peft_s(base: Path, tmp_path: Path, name: str) -> None:
    """Separate A's, of q, k and v or of gate and up, are stacked: the rank is their sum."""
    options, layers, rank = OPTIONS[name]
    peft = lora_model(base, **options)
    peft.save_pretrained(tmp_path)
    source = find_model(str(base))
    assert adapter_kind(tmp_path) == "peft"
    adapter = read_peft(tmp_path, source).adapter
    assert adapter.config.method == "lora" and (adapter.config.layers, adapter.config.rank) == (layers, rank)
    assert [target.name for target in adapter.config.targets] == TARGETS.get(name, ["qkv"])
    save_adapter(tmp_path / "native", adapter.config, adapter.base, adapter.state)
    adapter = load_native_adapter(tmp_path / "native")
    positions = torch.arange(24).expand(2, 24)
    ours = logits_of(load_model(source, adapter, dtype=torch.float32).predict, positions)
    assert share(ours, logits_of(peft)) <= 1e-5
    with peft.disable_adapter():
        assert share(ours, logits_of(peft)) > 0.01  # the update is there


def test_which_adapters_train_on_as_peft_s(base: Path, tmp_path: Path) -> None:
    """With one A for all modules of a linear: where they have one A now, and each has an adapter."""

    def trains_as_peft(name: str, tied: dict[str, str], **options: Any) -> bool:
        peft = lora_model(base, r=2, **options)
        parameters = dict(peft.named_parameters())
        with torch.no_grad():
            for key, parameter in parameters.items():
                for module, first in tied.items():
                    if module in key and "lora_A" in key:
                        parameter.copy_(parameters[key.replace(module, first)])
        peft.save_pretrained(tmp_path / name)
        return read_peft(tmp_path / name, find_model(str(base))).apart is None

    tied = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    assert trains_as_peft("o", {}, target_modules=["o_proj", "down_proj"], layers_to_transform=[0, 2])
    assert trains_as_peft("tied", tied, target_modules="all-linear")
    assert not trains_as_peft("separate", {}, target_modules="all-linear")
    assert not trains_as_peft("half", {"k_proj": "q_proj", "v_proj": "q_proj"}, target_modules="all-linear")
    assert not trains_as_peft("q", {}, target_modules=["q_proj"])
    assert not trains_as_peft("two", {"v_proj": "q_proj"}, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("method", ["lora", "tl6"])
@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_what_is_exported_comes_back(base: Path, tmp_path: Path, method: str, layers: tuple[int, ...] | None) -> None:
    """The export's A is one for q, k and v, so the rank stays."""
    source, native, _ = with_adapter(base, method, layers)
    export_peft(source, native, tmp_path / "peft")
    back = read_peft(tmp_path / "peft", source).adapter
    assert (back.config.rank, back.config.layers) == (4, native.config.layers)
    for layer in native.config.layers:
        pairs = (lora_factors(one.config, one.state, one.config.targets[0], layer) for one in (back, native))
        found, expected = (b @ a for a, b in pairs)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert {name: (t.shape, t.dtype) for name, t in back.state.items()} == {
        name: (back.config.shape(name), torch.float32) for name in "ABuv"
    }


@pytest.mark.parametrize("method", ["lora", "tl6"])
@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_a_fused_projection_is_one_module(tmp_path: Path, method: str, layers: tuple[int, ...] | None) -> None:
    """Phi-3's qkv_proj: PEFT has one pair for all of it, whose product comes back to the last bit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = write_tiny_model(tmp_path / "base", family="phi3", num_kv_heads=2, tokenizer=False)
    source, native, _ = with_adapter(base, method, layers)
    export_peft(source, native, tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    assert len(stored) == 2 * len(native.config.layers) and all(".qkv_proj.lora_" in name for name in stored)
    back = read_peft(tmp_path / "peft", source).adapter
    assert (back.config.method, back.config.rank, back.config.layers) == ("lora", 4, native.config.layers)
    for (found_rule, *found), (rule, *expected) in zip(
        back.updates(source.shape), native.updates(source.shape), strict=True
    ):
        assert found_rule == rule and all(map(torch.equal, found, expected))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "peft")
    positions = torch.arange(24).expand(2, 24)
    ours = logits_of(load_model(source, back, dtype=torch.float32).predict, positions)
    assert share(ours, logits_of(peft)) <= 1e-5
    with peft.disable_adapter():
        assert share(ours, logits_of(peft)) > 0.01  # the update is there


def test_it_merges_as_a_native_adapter(base: Path, tmp_path: Path) -> None:
    peft = lora_model(base, r=3, lora_alpha=5, target_modules=Q_AND_V)
    peft.save_pretrained(tmp_path / "peft")
    source = find_model(str(base))
    merge_adapter(source, read_peft(tmp_path / "peft", source).adapter, tmp_path / "merged")
    expected = peft.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_16_bits_are_read_as_they_are(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    lora_model(base, r=2, target_modules=Q_AND_V).save_pretrained(tmp_path)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(stored, tmp_path / WEIGHTS)
    adapter = read_peft(tmp_path, find_model(str(base))).adapter
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    assert torch.equal(adapter.state["A"][1, 2:], stored[key].float())


# --------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of q and v as PEFT writes it."""
    folder = tmp_path_factory.mktemp("plain")
    lora_model(base, r=3, lora_alpha=5, target_modules=Q_AND_V).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA is not supported; only LORA and VERA are"),
        ({"use_dora": True}, "use_dora = True is not a plain LoRA"),
        ({"bias": "lora_only"}, "bias = 'lora_only' trains biases"),
        ({"lora_bias": True}, "lora_bias = True is not a plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not a plain LoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = "),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = "),
        ({"a_field_to_come": 1}, "a_field_to_come = 1 is not a plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes the base weights too"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target module lm_head is not supported. Supported: q_proj, k"),
        ({"target_modules": "all-linear"}, "target_modules = 'all-linear' is not supported"),
        ({"target_modules": None}, "target_modules = None is not supported"),
        ({"target_modules": "q_proj"}, "target_modules 'q_proj' match no q_proj"),  # a whole name has to match it
        ({"target_modules": "(q"}, r"target_modules: the pattern '\(q' is not read; letters, .* Write a list of names"),
        ({"exclude_modules": 3}, "exclude_modules = 3 is neither a pattern nor a list of names. Write a list of names"),
        ({"layers_to_transform": [3]}, "layers_to_transform has 3, but .* has layers 0 to 2; give the adapter's own"),
        ({"layers_to_transform": 0.5}, "layers_to_transform = 0.5 is neither a layer nor a list"),
        ({"r": 0}, "r = 0 is not an integer from 1 to"),
        ({"r": True}, "r = True is not an integer"),
        ({"lora_alpha": None}, "lora_alpha = None is not a number"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is not between"),
        ({"lora_alpha": -2}, "lora_alpha = -2 is not between"),
        ({"lora_alpha": 2**53}, "lora_alpha = 9007199254740992 is not between"),
        ({"lora_alpha": 1e6}, r"its native alpha = 2000000.0 is not between 1e-06 and 1e\+06; scale lora_B inst"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused_by_name(
    base: Path, plain: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = with_fields(plain, tmp_path / "adapter", changes)
    assert re.match(rf"{re.escape(CONFIG)}: {said}", rejection(base, folder))


Q1, LAYERS = "base_model.model.model.layers.1.self_attn.q_proj", "base_model.model.model.layers"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{Q1}.lora_A.weight": None}, f"{Q1}.lora_A.weight is missing, but {CONFIG} targets its module"),
        ({f"{Q1}.lora_B.weight": None}, f"{Q1}.lora_B.weight is missing"),
        ({f"{Q1}.lora_A.weight": torch.ones(2, 32)}, r"\S* has shape \(2, 32\), but .* it must be \(3, 32\)"),
        ({f"{Q1}.lora_A.weight": torch.ones(3, 64)}, r"\S* has shape \(3, 64\), but .* it must be \(3, 32\)"),
        ({f"{Q1}.lora_B.weight": torch.ones(32, 3)}, r"\S* has shape \(32, 3\), but .* it must be \(48, 3\)"),
        ({f"{Q1}.lora_B.weight": torch.full((48, 3), torch.inf)}, r"\S* holds numbers that are not finite"),
        ({f"{Q1}.lora_B.weight": torch.ones(48, 3, dtype=torch.int8)}, r"\S* is I8, not floating point"),
        ({f"{Q1}.lora_magnitude_vector": torch.ones(48)}, r"\S* is not a LoRA factor of q_proj, .*, down_proj; only"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 48)}, r"\S*lm_head\S* is not a LoRA factor"),
        ({f"{LAYERS}.3.self_attn.q_proj.lora_A.weight": torch.ones(3, 32)}, r"\S* is for layer 3, but .* 0 to 2; give"),
        ({f"{LAYERS}.0.self_attn.k_proj.lora_A.weight": torch.ones(3, 32)}, r"\S* is present, but \S* does not target"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    base: Path, plain: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], said: str
) -> None:
    folder = with_tensors(plain, tmp_path / "adapter", changes)
    assert re.match(rf"{re.escape(WEIGHTS)}: {said}", rejection(base, folder))


def test_folders_that_hold_no_peft_adapter(base: Path, plain: Path, tmp_path: Path) -> None:
    assert rejection(base, tmp_path).startswith(f"{CONFIG}: no such file; expected a PEFT adapter folder")
    (tmp_path / CONFIG).write_text("{}")
    assert rejection(base, tmp_path) == f"{CONFIG}: not a PEFT adapter (it has no peft_type); give another folder"
    shutil.copy(plain / CONFIG, tmp_path)
    assert rejection(base, tmp_path).startswith(f"{WEIGHTS}: not a whole safetensors file")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert rejection(base, tmp_path).startswith("adapter_model.bin: pickled weights are not read")


def test_kinds_of_folders(base: Path, plain: Path, tmp_path: Path) -> None:
    write_native(tmp_path / "run" / "adapter", base, random_adapter("tl5", OracleConfig.from_folder(base)))
    oracle = random_adapter("tl5", OracleConfig.from_folder(base), targets=["o_proj"])
    native = write_native(tmp_path / "version2", base, oracle)  # it has a peft_type
    moments = moments_of(native)
    content = {"config": native.config, "base_identity": native.base, "state": native.state}
    step = save_checkpoint(tmp_path / "checkpoints", progress=Progress(), moments=moments, settings={}, **content)
    assert adapter_kind(str(tmp_path / "run" / "adapter")) == "native"
    assert adapter_kind(tmp_path / "version2") == adapter_kind(step) == "native"
    assert adapter_kind(plain) == "peft"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / CONFIG).write_text('{"r": 3}')
    (tmp_path / "empty").mkdir()
    for folder, said in {
        tmp_path / "run": f"--adapter {tmp_path}/run: this is a run folder; give {tmp_path}/run/adapter",
        tmp_path / "none": f"--adapter {tmp_path}/none: no such folder; give a run's adapter/ or checkpoints/",
        step.parent: f"--adapter {step.parent}: this is a folder of checkpoints; give one of them, {step.parent}/step",
        step.parent / "latest": f"--adapter {step.parent}/latest: this file names the newest checkpoint; give its",
        base: f"--adapter {base}: this is a model folder; give it with --model",
        tmp_path / "empty": f"--adapter {tmp_path}/empty: has no {CONFIG}; give the folder of a native or",
        tmp_path / "odd": f"{tmp_path}/odd/{CONFIG}: neither a native adapter (format_version) nor a PEFT one",
    }.items():
        with pytest.raises(UserError, match=f"^{re.escape(said)}"):
            adapter_kind(folder)


def test_the_record_of_an_export_decides_neither_shape_nor_precision(base: Path, tmp_path: Path) -> None:
    source, native, _ = with_adapter(base, "tl6")
    assert exported_base(tmp_path, native.base) is None
    export_peft(source, native, tmp_path / "peft")
    file = tmp_path / "peft" / EXPORT_RECORD
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "num_layers": 99, "dtype": "fp16"}))
    assert exported_base(tmp_path / "peft", native.base) == native.base
    for name in ("base_model", "base_hash", "base_weights_hash"):
        file.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        with pytest.raises(UserError, match=f"{EXPORT_RECORD}: {name} is missing"):
            exported_base(tmp_path / "peft", native.base)


def test_an_adapter_of_a_quantised_folder_can_be_merged_onto_it(tmp_path: Path) -> None:
    """PEFT's files do not say how the base was stored, so it is as the folder has it, and nothing else is said."""
    plain = write_tiny_model(tmp_path / "plain", **{**SHAPE, "num_layers": 1})
    quantised, values = quantised_folder(plain, tmp_path / "nf4", "nf4")
    source, native, _ = with_adapter(plain, "lora")
    export_peft(source, native, tmp_path / "peft")
    (tmp_path / "peft" / EXPORT_RECORD).unlink()
    opened = open_adapter(str(tmp_path / "peft"), str(quantised))
    assert opened.adapter.base.base_format == "nf4"
    assert not check_base(opened.source, opened.adapter, base_format="nf4").notes
    merge_adapter(opened.source, opened.adapter, tmp_path / "merged", onto_trained=True)
    name = "model.layers.0.mlp.up_proj.weight"
    merged, expected = (load_file(folder / "model.safetensors")[name] for folder in (tmp_path / "merged", values))
    assert torch.equal(merged, expected.to(merged.dtype))


def test_an_export_keeps_the_storage_format_of_the_base(base: Path, tmp_path: Path) -> None:
    """So its adapter is used with the base that training saw, also if it comes back as a plain LoRA."""
    source, native, _ = with_adapter(base, "tl6")
    folder, quantised = tmp_path / "run", replace(native.base, base_format="nf4", base_stored="bf16")
    save_adapter(folder, native.config, quantised, native.state)
    export_peft(source, load_native_adapter(folder), tmp_path / "peft", native=folder)
    opened = open_adapter(str(tmp_path / "peft"), str(base))
    assert opened.adapter.base == quantised
    said: list[str] = []
    for name, inside in (("whole", True), ("alone", False)):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "peft", copy)
        if not inside:
            shutil.rmtree(copy / NATIVE_FOLDER)
        import_peft(source, copy, tmp_path / f"{name} again", say=said.append)
        again = load_native_adapter(tmp_path / f"{name} again").base
        assert (again.base_format, again.base_stored) == ("nf4", "bf16")
    assert not any("trained on" in note for note in said), "an import uses no base"
    file = tmp_path / "peft" / EXPORT_RECORD
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base_stored": "int4"}))
    with pytest.raises(UserError, match=f"{EXPORT_RECORD}: base_stored 'int4' is not one of bf16, fp16, fp32"):
        open_adapter(str(tmp_path / "peft"), str(base))
    file.write_text(json.dumps({**content, "base_format": "nf3"}))
    with pytest.raises(UserError, match=f"{EXPORT_RECORD}: base_format 'nf3' is not one of int8, fp8, nf4"):
        open_adapter(str(tmp_path / "peft"), str(base))
