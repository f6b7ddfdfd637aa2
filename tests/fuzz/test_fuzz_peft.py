"""PEFT adapters, broken, and odd ones beside PEFT's own merge: one clear line, or the update that PEFT makes of it."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import break_one, fresh, strange_value
from fuzzing import MAPPED, Draw, cases, explore, outcome
from safetensors.torch import save_file
from support.native_files import with_adapter
from support.tiny_models import tiny_model
from valid import check_adapter

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, save_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.inputs import adapter_kind
from megatron_tiedlora.convert.open_adapter import read_peft
from megatron_tiedlora.convert.peft_files import modules_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NATIVE = [f"native/{CONFIG}", f"native/{WEIGHTS}"]


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, native, _ = with_adapter(base, "tl6", (1, 3), targets=("qkv", "down_proj"))
    folder = tmp_path_factory.mktemp("peft")
    save_adapter(folder / "adapter", native)
    export_peft(source, native, folder / "exported", native=folder / "adapter")
    return folder / "exported"


@cases("peft")
def test_a_broken_peft_adapter(base: Path, exported: Path, area: Path, examples: int) -> None:
    source, folder = find_model(str(base)), area / "peft"

    def load() -> NativeAdapter:
        adapter_kind(folder)
        return read_peft(folder, source).adapter

    def body(draw: Draw) -> object:
        fresh(exported, folder)
        break_one(draw, folder, [CONFIG, CONFIG, WEIGHTS, *NATIVE])
        loaded = outcome(load, unchanged=area, names=(str(folder),))
        if isinstance(loaded, NativeAdapter):
            check_adapter(loaded)
        return loaded

    explore("peft", examples, body, addresses=MAPPED)


# Beside PEFT ------------------------------------------------------------------------------------------------------

# By field: what people write there, and what they might.
VALUES: dict[str, list[Any]] = {
    "r": [1, 2, 4, 8, 0, -1, 4.0, "4", None],
    "lora_alpha": [1, 6, 6.5, 0, -2, 1e5, "6", None],
    "use_rslora": [True, False, None],
    "target_modules": [
        ["q_proj"], ["k_proj", "v_proj"], [*PARTS, "lm_head"], ["self_attn.q_proj", "v_proj"], ["proj"], [], "q_proj",
        ["model.layers.1.self_attn.q_proj"], "all-linear", r".*\.(q|v)_proj", r".*(q_proj|k_proj|v_proj)$",
        r"model\.layers\.[02]\.self_attn\.v_proj", r".*self_attn\.(q_proj|k_proj)", ".*_proj", "(", ["q_proj", 1],
    ],
    "exclude_modules": [None, [], ["v_proj"], "v_proj", r".*\.1\..*", ["layers.0.self_attn.k_proj"], ["nothing"]],
    "layers_to_transform": [None, 0, 2, [0], [0, 2], [1, 1], [], [5], -1, "0", [True]],
    "layers_pattern": [None, "layers", ["layers"], "blocks", ""],
    "rank_pattern": [{}, {"q_proj": 2}, {"proj": 2}, {"(": 2}, {"q_proj": 0}, {".*": "4"}, [], None],
    "alpha_pattern": [
        {}, {"q_proj": 12}, {r"layers\.[02]\.": 3}, {r"layers\.(0|2)\..*": 3, ".*": 0.5}, {"^v_proj": 4}, {".*": 0},
        {"model.layers.1.mlp.up_proj": 8, "up_proj": -1}, {"k_proj|v_proj": 7, "k_proj": 9}, {"": 2}, 12, None,
    ],
    "bias": ["none", "all", "lora_only", None],
    "fan_in_fan_out": [True, False],
    "use_dora": [True, False],
    "init_lora_weights": [True, False, "gaussian", "pissa", "olora", "eva", "x", None],
    "modules_to_save": [None, [], ["lm_head"]],
    "task_type": ["CAUSAL_LM", None, "SEQ_CLS", "x"],
    "inference_mode": [True, False],
    "peft_version": ["0.18.0", None, "9"],
    "peft_type": ["LORA", "LOHA", "lora", None],
    "megatron_config": [None, {}],
    "trainable_token_indices": [None, [1]],
    "an_unknown_field": [None, 1],
}  # fmt: skip


def write_variant(draw: Draw, exported: Path, folder: Path, source: ModelSource) -> None:
    """A PEFT folder of some projections of some layers, then with up to two fields and perhaps a tensor changed."""
    fresh(exported, folder)
    content = json.loads((folder / CONFIG).read_text())
    rank, parts = draw.choice([1, 2, 4]), draw.sample(PARTS, draw.randint(1, 4))
    layers = sorted(draw.sample(range(source.shape.num_layers), draw.randint(1, 3)))
    content |= {
        "r": rank,
        "lora_alpha": draw.choice([1, 6, 6.5]),
        "use_rslora": draw.chance(0.3),
        "target_modules": parts,
        "layers_to_transform": layers,
    }
    ranks = {}
    if draw.chance(0.4):  # PEFT's rule, for the few kinds of patterns here
        ranks = {draw.choice([part, rf"layers\.{layers[0]}\..*", f".*{part}"]): draw.randint(1, 5) for part in parts}
        content["rank_pattern"] = ranks
    if draw.chance(0.4):
        content["alpha_pattern"] = {draw.choice(parts): draw.choice([1, 3, 0.7]) for _ in range(2)}
    generator, modules = torch.Generator().manual_seed(draw.randint(0, 2**31)), modules_of(source.shape.block)
    tensors = {}
    for layer in layers:
        for module, (columns, rows) in modules.items():
            if module.rpartition(".")[2] in parts:
                name = f"model.layers.{layer}.{module}"
                own = next((r for key, r in ranks.items() if re.fullmatch(rf"(.*\.)?({key})", name)), rank)
                tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(own, columns, generator=generator)
                tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, own, generator=generator) * 0.3
    for name in draw.sample(sorted(VALUES), draw.randint(0, 2)):
        content[name] = strange_value(draw) if draw.chance(0.1) else draw.choice(VALUES[name])
        draw.say(f"{name} = {content[name]!a}"[:80])
    if draw.chance(0.25):
        name = draw.choice(sorted(tensors))
        match draw.say(draw.choice(["half", "drop", "more", "shape"])):
            case "half":
                tensors[name] = tensors[name].half()
            case "drop":
                del tensors[name]
            case "more":
                tensors[name.replace("layers", "blocks")] = torch.ones(2, 2)
            case "shape":
                tensors[name] = tensors[name].T.contiguous()
    (folder / CONFIG).write_text(json.dumps(content))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def peft_update(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merge of the folder adds to each projection. Raises whatever PEFT does."""
    from peft import PeftModel

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload()
    after = merged.state_dict()
    return {name: after[name] - tensor for name, tensor in before.items()}


def native_update(source: ModelSource, adapter: NativeAdapter) -> dict[str, torch.Tensor]:
    """What the imported adapter adds, by transformers' names."""
    found = {}
    for rule, a, b in adapter.updates(source.shape):
        found |= rule.by_stored_tensor(b @ a)
    return found


@cases("peft-merge")
def test_an_odd_peft_adapter_is_what_peft_makes_of_it(base: Path, exported: Path, area: Path, examples: int) -> None:
    """Where we refuse what PEFT takes, or take what it refuses, that is counted."""
    source, folder, model = find_model(str(base)), area / "peft", tiny_model()

    def body(draw: Draw) -> object:
        write_variant(draw, exported, folder, source)
        loaded = outcome(lambda: read_peft(folder, source).adapter, unchanged=area, names=(str(folder),))
        try:
            theirs = peft_update(model, folder)
        except Exception:  # of any kind
            draw.notes += ["that peft refuses too"] if isinstance(loaded, UserError) else ["accepted, peft refuses"]
            return loaded
        if isinstance(loaded, UserError):
            draw.notes.append("refused, peft accepts")
            return loaded
        check_adapter(loaded)
        ours = native_update(source, loaded)
        for name, expected in theirs.items():
            found = ours.pop(name, torch.zeros_like(expected))
            largest = max(expected.abs().max().item(), 1.0)
            assert torch.allclose(found, expected, atol=1e-5 * largest), f"{name}: another update than PEFT's"
        assert not ours
        return loaded

    explore("peft-merge", examples, body)
