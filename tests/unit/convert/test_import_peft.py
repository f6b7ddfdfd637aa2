"""PEFT's LoRA and VeRA adapters read as native ones: the same update as PEFT's own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.native_files import with_adapter
from support.peft_folders import WEIGHTS, imported
from support.peft_models import lora_model, vera_model
from support.quantised_models import SHAPE, quantised_folder
from support.run_files import edit_json
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.inputs import EXPORT_RECORD, NATIVE_FOLDER, adapter_kind, check_base
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import exported_base, import_peft, open_adapter, read_peft

# --------------------------------------------------------------------------------------------- the same update

ALL = (1, 2, 3)
Q_AND_V, QKV = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
Case = tuple[dict[str, Any], int, tuple[int, ...], list[str]]


def case(rank: int, *, layers: tuple[int, ...] = ALL, targets: tuple[str, ...] = ("qkv",), **options: Any) -> Case:
    """Options of PEFT's LoraConfig, and rank, layers and targets of the native adapter.

    Separate A's, of q, k and v or of gate and up, are stacked: the rank is their sum. For o_proj it is the largest rank
    of a layer.
    """
    return options, rank, layers, list(targets)


# The first pattern that matches decides: q_proj of layer 1 has rank 3, and those of the others 4.
PATTERNS: dict[str, Any] = {
    "targets": ("qkv", "down_proj"),
    "target_modules": [*QKV, "down_proj"],
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "q_proj": 4, r"layers\.\d+\.mlp\.down_proj": 6, "v_proj": 2},
    "alpha_pattern": {"q_proj|v_proj": 11, r".*\.(0|2)\.mlp\..*": 0.7},
}
OPTIONS: dict[str, Case] = {
    "q_v": case(6, r=3, lora_alpha=5, target_modules=Q_AND_V),
    "k": case(3, r=3, lora_alpha=5, target_modules=["k_proj"]),
    "q_k_v": case(6, r=2, lora_alpha=7, target_modules=["v_proj", "k_proj", "q_proj"]),
    "rslora": case(8, r=4, lora_alpha=3, use_rslora=True, target_modules=Q_AND_V),
    "layers": case(6, layers=(1, 3), r=3, target_modules=Q_AND_V, layers_to_transform=[2, 0], lora_dropout=0.1),
    "layer": case(3, layers=(2,), r=3, target_modules=["k_proj"], layers_to_transform=1, layers_pattern="layers"),
    "pattern": case(4, layers=(1, 3), r=2, target_modules=r".*layers\.(0\..*q_proj|2\..*(k|v)_proj)"),
    "full_name": case(4, r=2, target_modules=["model.layers.1.self_attn.v_proj", "k_proj"]),
    "full_name_beside_layers": case(  # no layer has two projections
        2, layers=(1, 2), r=2, target_modules=["model.layers.1.self_attn.v_proj", "k_proj"], layers_to_transform=[0]
    ),
    "excluded": case(4, r=2, target_modules=Q_AND_V, exclude_modules=["1.self_attn.v_proj"]),
    "gaussian": case(2, r=2, target_modules=["q_proj"], init_lora_weights="gaussian"),
    "o": case(3, targets=("o_proj",), r=3, target_modules=["o_proj"]),
    "up": case(3, targets=("gate_up",), r=3, lora_alpha=5, target_modules=["up_proj"]),
    "gate": case(3, layers=(3,), targets=("gate_up",), r=3, target_modules=["gate_proj"], layers_to_transform=2),
    "mlp": case(4, targets=("gate_up", "down_proj"), r=2, lora_alpha=7, target_modules=MLP, use_rslora=True),
    "o_and_down": case(3, targets=("o_proj", "down_proj"), r=3, lora_alpha=5, target_modules=["down_proj", "o_proj"]),
    "o_and_separate": case(  # o_proj is padded
        4, targets=("o_proj", "gate_up"), r=2, target_modules=["o_proj", "gate_proj", "up_proj"]
    ),
    "all_linear": case(6, targets=TARGET_NAMES, r=2, lora_alpha=5, target_modules="all-linear"),
    "one_a_layer": case(  # one module a linear, so nothing is block-diagonal
        2,
        targets=("qkv", "gate_up", "down_proj"),
        r=2,
        target_modules=r".*layers\.(0\..*q_proj|1\..*up_proj|2\..*down_proj)",
    ),
    "ranks": case(9, r=3, rank_pattern={"q_proj": 5, "k_proj": 1}, target_modules=QKV),
    "alphas": case(9, r=3, alpha_pattern={"k_proj": 7, "v_proj": 0.1}, target_modules=QKV),
    "ranks_and_alphas": case(8, r=2, lora_alpha=5, use_rslora=False, **PATTERNS),
    "ranks_and_alphas_rslora": case(8, r=2, lora_alpha=5, use_rslora=True, **PATTERNS),
    "rank_of_a_layer": case(7, targets=("o_proj",), r=2, rank_pattern={r"layers\.1\..*": 7}, target_modules=["o_proj"]),
    "whole_names": case(
        8,
        targets=TARGET_NAMES,
        r=2,
        target_modules="all-linear",
        rank_pattern={"model.layers.2.mlp.up_proj": 6, "mlp.down_proj": 1, "^q_proj": 9, "proj": 9},
        alpha_pattern={r".*\.0\.self_attn\.(k|v)_proj$": 3, "model.layers.0.self_attn.v_proj": 8},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_merged_weights_equal_peft_s(separate: Path, tmp_path: Path, name: str) -> None:
    options, *expected = OPTIONS[name]
    config = imported(lora_model(separate, **options), separate, tmp_path).config
    assert [config.rank, config.layers, [target.name for target in config.targets]] == expected
    assert config.method == "lora" and adapter_kind(tmp_path / "peft") == "peft"


@pytest.mark.parametrize(("alpha", "exact"), [(1, True), (3, False), (64, True)])
def test_a_scale_of_its_own_is_in_b(separate: Path, tmp_path: Path, alpha: float, exact: bool) -> None:
    """It makes no B larger, is exact if it is another power of two, and off by half a bit of fp32 otherwise."""
    options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": QKV, "alpha_pattern": {"k_proj": alpha}}
    lora_model(separate, **options).save_pretrained(tmp_path)
    stored, adapter = load_file(tmp_path / WEIGHTS), read_peft(tmp_path, find_model(str(separate))).adapter
    assert adapter.config.alpha / adapter.config.rank == max(2, alpha / 2)
    rows = {"q_proj": (slice(0, 48), slice(0, 2), 2), "k_proj": (slice(48, 72), slice(2, 4), alpha / 2)}
    for module, (of_b, columns, scale) in rows.items():
        b = stored[f"base_model.model.model.layers.0.self_attn.{module}.lora_B.weight"].double() * scale
        found = adapter.state["B"][0, of_b, columns].double() * (adapter.config.alpha / adapter.config.rank)
        assert torch.equal(found, b) if exact or module == "q_proj" else ((found - b) / b).abs().max() <= 2**-24


def test_which_adapters_train_on_as_peft_s(separate: Path, tmp_path: Path) -> None:
    """With one A for all modules of a linear: where they have one A now, and each has an adapter. Ranks of layers may
    differ, as padding has no gradient, but not their scales."""
    source = find_model(str(separate))

    def trains_as_peft(name: str, tied: dict[str, str], **options: Any) -> bool:
        peft = lora_model(separate, r=2, **options)
        parameters = dict(peft.named_parameters())
        for key, parameter in parameters.items():
            for module, first in tied.items():
                if module in key and "lora_A" in key:
                    parameter.data.copy_(parameters[key.replace(module, first)].data)
        peft.save_pretrained(tmp_path / name)
        return read_peft(tmp_path / name, source).apart is None

    tied = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    ranks: dict[str, Any] = {"target_modules": ["o_proj"], "rank_pattern": {r".*\.1\..*": 4}}
    assert trains_as_peft("o", {}, target_modules=["o_proj", "down_proj"], layers_to_transform=[0, 2])
    assert trains_as_peft("tied", tied, target_modules="all-linear")
    assert not trains_as_peft("separate", {}, target_modules="all-linear")
    assert not trains_as_peft("half", {"k_proj": "q_proj", "v_proj": "q_proj"}, target_modules="all-linear")
    assert not trains_as_peft("q", {}, target_modules=["q_proj"])
    assert not trains_as_peft("two", {"v_proj": "q_proj"}, target_modules=["q_proj", "v_proj"])
    assert trains_as_peft("scale", {}, **ranks, lora_alpha=1, alpha_pattern={r".*\.1\..*": 2})
    assert not trains_as_peft("scales", {}, **ranks)
    notes: list[str] = []
    said = import_peft(None, tmp_path / "scales", tmp_path / "native", say=notes.append).apart
    assert [said] == notes and said == (
        f"{tmp_path}/scales: its modules have different scales alpha / r, but one here, so training continues"
        " differently from PEFT's"
    )


@pytest.mark.parametrize("family", ["separate", "fused"])
@pytest.mark.parametrize("method", ["lora", "tl6"])
@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_what_is_exported_comes_back(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, method: str, layers: tuple[int, ...] | None
) -> None:
    """The export's A is one for q, k and v, so the rank stays. A fused projection is one module, whose factors come
    back to the last bit."""
    source, native, _ = with_adapter(request.getfixturevalue(family), method, layers)
    export_peft(source, native, tmp_path)
    modules = {name.split(".")[-3] for name in load_file(tmp_path / WEIGHTS)}
    assert modules == ({"qkv_proj"} if family == "fused" else set(QKV))
    back = read_peft(tmp_path, source).adapter
    assert (back.config.method, back.config.rank, back.config.layers) == ("lora", 4, native.config.layers)
    assert {name: (t.shape, t.dtype) for name, t in back.state.items()} == {
        name: (back.config.shape(name), torch.float32) for name in "ABuv"
    }
    for (rule, *found), (own_rule, *own) in zip(back.updates(source.shape), native.updates(source.shape), strict=True):
        assert rule == own_rule
        torch.testing.assert_close(found[1] @ found[0], own[1] @ own[0], rtol=1e-6, atol=1e-6)
        assert family == "separate" or all(map(torch.equal, found, own))


@pytest.mark.parametrize("name", ["ranks_and_alphas", "whole_names"])
def test_patterns_come_back_from_their_export(separate: Path, tmp_path: Path, name: str) -> None:
    """Export has one rank and alpha r, so the scales are in the factors; the update is the one that PEFT computed."""
    peft = lora_model(separate, **OPTIONS[name][0])
    peft.save_pretrained(tmp_path / "peft")
    source = find_model(str(separate))
    native = read_peft(tmp_path / "peft", source).adapter
    export_peft(source, native, tmp_path / "exported")
    back = read_peft(tmp_path / "exported", source).adapter
    assert back.config.rank == native.config.rank
    expected = {
        f"{key.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default")
        for key, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    found = {}
    for rule, a, b in back.updates(source.shape):
        found |= rule.by_stored_tensor(b @ a)
    assert {key for key, update in found.items() if update.any()} == set(expected)
    for key, update in expected.items():
        torch.testing.assert_close(found[key], update.detach(), rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_16_bits_are_read_as_they_are(separate: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    lora_model(separate, r=2, target_modules=Q_AND_V).save_pretrained(tmp_path)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(stored, tmp_path / WEIGHTS)
    adapter = read_peft(tmp_path, find_model(str(separate))).adapter
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    assert torch.equal(adapter.state["A"][1, 2:], stored[key].float())


# --------------------------------------------------------------------------------------------- VeRA


@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, (1, 2, 3)), ({"layers_to_transform": [2, 0], "vera_dropout": 0.1, "d_initial": 0.5}, (1, 3))],
)
def test_on_a_fused_projection_it_is_a_native_vera(
    fused: Path, tmp_path: Path, options: dict[str, Any], layers: tuple[int, ...]
) -> None:
    peft = vera_model(fused, r=3, target_modules=["qkv_proj"], **options)
    adapter = imported(peft, fused, tmp_path)
    config, stored = adapter.config, load_file(tmp_path / "peft" / WEIGHTS)
    assert (config.method, config.rank, config.scale, config.layers) == ("vera", 3, 1.0, layers)
    modules = [f"base_model.model.model.layers.{layer - 1}.self_attn.qkv_proj.vera_lambda" for layer in layers]
    expected = {
        "A": stored["base_model.vera_A"],
        "B": stored["base_model.vera_B"],
        "u": torch.stack([stored[f"{module}_d"] for module in modules]),
        "v": torch.stack([stored[f"{module}_b"] for module in modules]),
    }
    assert adapter.state.keys() == expected.keys()
    assert all(torch.equal(adapter.state[name], tensor) for name, tensor in expected.items())


# name: options of PEFT's VeraConfig, adapted layers
PARTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "q_k_v": ({"target_modules": ["v_proj", "k_proj", "q_proj"]}, (1, 2, 3)),
    "q_v": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, (2,)),
    "k": ({"target_modules": ["k_proj"]}, (1, 2, 3)),
    "pattern": ({"target_modules": r".*layers\.(0\..*q_proj|2\..*(k|v)_proj)"}, (1, 3)),
    "o_in_one_layer": ({"target_modules": r".*layers\.(0\..*o_proj|2\..*down_proj)"}, (1, 3)),
    "all": ({"target_modules": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}, (1, 2, 3)),
}


@pytest.mark.parametrize(
    ("family", "modules", "targets"),
    [
        ("separate", ["down_proj", "o_proj"], ["o_proj", "down_proj"]),
        ("fused", "all-linear", [*TARGET_NAMES]),
        ("fused", ["qkv_proj", "o_proj"], ["qkv", "o_proj"]),  # equally wide: each has a whole copy of A
    ],
)
def test_every_linear_that_is_one_module_has_its_part_of_a_and_b(
    separate: Path, fused: Path, tmp_path: Path, family: str, modules: Any, targets: list[str]
) -> None:
    base = {"separate": separate, "fused": fused}[family]
    adapter = imported(vera_model(base, r=3, target_modules=modules), base, tmp_path)
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    assert (adapter.config.method, [target.name for target in adapter.config.targets]) == ("vera", targets)
    assert read_peft(tmp_path / "peft", find_model(str(base))).apart is None
    for target in adapter.config.targets:
        a, b = (adapter.state[target.prefix + factor] for factor in "AB")
        assert torch.equal(a, stored["base_model.vera_A"][:, : target.in_size])
        assert torch.equal(b, stored["base_model.vera_B"][: target.out_size])


@pytest.mark.parametrize("name", PARTS)
def test_on_parts_it_is_a_native_lora(separate: Path, tmp_path: Path, name: str) -> None:
    """A and B are as large as the largest module needs; a smaller one uses the first rows of B."""
    options, layers = PARTS[name]
    adapter = imported(vera_model(separate, r=3, **options), separate, tmp_path, tolerance=1e-6)
    assert (adapter.config.method, adapter.config.rank, adapter.config.layers) == ("lora", 3, layers)
    assert read_peft(tmp_path / "peft", find_model(str(separate))).apart is not None


@pytest.mark.parametrize("key", [0, 12345, -7])
def test_projections_that_are_not_in_the_file_are_drawn_as_peft_draws_them(
    separate: Path, fused: Path, tmp_path: Path, key: int
) -> None:
    """To the bit: the import is the one of the saved projections."""
    for base, modules in ((separate, ["q_proj", "down_proj"]), (fused, "all-linear")):
        source, states = find_model(str(base)), {}
        for saved in (True, False):
            folder = tmp_path / f"{base.name}_{saved}"
            options = {"save_projection": saved, "projection_prng_key": key}
            peft = vera_model(base, r=3, target_modules=modules, **options)
            states[saved] = imported(peft, base, folder).state
            found = read_peft(folder / "peft", source)
            drawn = f"{folder / 'peft'}: vera_A and vera_B are drawn from projection_prng_key = {key}, as PEFT draws"
            assert [note[: len(drawn)] for note in found.notes] == ([] if saved else [drawn])
        assert states[True].keys() == states[False].keys()
        assert all(torch.equal(tensor, states[False][name]) for name, tensor in states[True].items())


# --------------------------------------------------------------------------------------------- its base


def test_the_record_of_an_export_decides_neither_shape_nor_precision(separate: Path, tmp_path: Path) -> None:
    source, native, _ = with_adapter(separate, "tl6")
    assert exported_base(tmp_path, native.base_identity) is None
    export_peft(source, native, tmp_path / "peft")
    file = tmp_path / "peft" / EXPORT_RECORD
    content = file.read_text()
    edit_json(file, num_layers=99, dtype="fp16")
    assert exported_base(tmp_path / "peft", native.base_identity) == native.base_identity
    for name in ("base_model", "base_hash", "base_weights_hash"):
        file.write_text(content)
        edit_json(file, without=[name])
        line = refusal(exported_base, tmp_path / "peft", native.base_identity)
        assert f"{EXPORT_RECORD}: {name} is missing" in line


def test_an_adapter_of_a_quantised_folder_can_be_merged_onto_it(tmp_path: Path) -> None:
    """PEFT's files do not say how the base was stored, so it is as the folder has it, and nothing else is said."""
    plain = write_tiny_model(tmp_path / "plain", **{**SHAPE, "num_layers": 1})
    quantised, values = quantised_folder(plain, tmp_path / "nf4", "nf4")
    source, native, _ = with_adapter(plain, "lora")
    export_peft(source, native, tmp_path / "peft")
    (tmp_path / "peft" / EXPORT_RECORD).unlink()
    opened = open_adapter(str(tmp_path / "peft"), str(quantised))
    assert opened.adapter.base_identity.base_format == "nf4"
    assert not check_base(opened.source, opened.adapter, base_format="nf4")[1]
    merge_adapter(opened.source, opened.adapter, tmp_path / "merged", onto_trained=True)
    name = "model.layers.0.mlp.up_proj.weight"
    merged, expected = (load_file(folder / "model.safetensors")[name] for folder in (tmp_path / "merged", values))
    assert torch.equal(merged, expected.to(merged.dtype))


def test_an_export_keeps_the_storage_format_of_the_base(separate: Path, tmp_path: Path) -> None:
    """So its adapter is used with the base that training saw, also if it comes back as a plain LoRA."""
    source, native, _ = with_adapter(separate, "tl6")
    folder, quantised = tmp_path / "run", replace(native.base_identity, base_format="nf4", base_stored="bf16")
    save_adapter(folder, replace(native, base_identity=quantised))
    export_peft(source, load_native_adapter(folder), tmp_path / "peft", native=folder)
    opened = open_adapter(str(tmp_path / "peft"), str(separate))
    assert opened.adapter.base_identity == quantised
    said: list[str] = []
    for name in ("whole", "alone"):
        import_peft(source, tmp_path / "peft", tmp_path / name, say=said.append)
        again = load_native_adapter(tmp_path / name).base_identity
        assert (again.base_format, again.base_stored) == ("nf4", "bf16")
        shutil.rmtree(tmp_path / "peft" / NATIVE_FOLDER, ignore_errors=True)  # for the second one
    assert not any("trained on" in note for note in said), "an import uses no base"
    for name, value, known in (("base_stored", "int4", "bf16, fp16, fp32"), ("base_format", "nf3", "int8, fp8, nf4")):
        edit_json(tmp_path / "peft" / EXPORT_RECORD, **{name: value})
        said = refusal(open_adapter, tmp_path / "peft", str(separate))
        assert f"{EXPORT_RECORD}: {name} '{value}' is not one of {known}" in said
