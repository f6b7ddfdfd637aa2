"""What a server reads from adapter folders: shared factors, and the equal LoRA, against plain PyTorch and PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.native_files import with_adapter, write_native
from support.oracle import OracleAdapter
from support.oracle_adapter import ALL_TARGETS
from support.peft_folders import CONFIG, WEIGHTS, changed
from support.peft_models import lora_model, vera_model
from support.run_files import edit_json
from support.task_files import refusal
from support.tiny_models import FAMILY_MODELS, write_tiny_model
from torch import Tensor

from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.checkpoint.base_identity import model_source
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.integrations.vllm.factors import ServedAdapter, is_plain_lora, read_served

LAYERS = 5
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 12, "intermediate_size": 40},
    "qwen3": {"family": "qwen3", "head_dim": 12},
    "phi3": {"family": "phi3"},
}
# Targets and layers of an adapter.
PARTS: dict[str, tuple[tuple[str, ...], tuple[int, ...] | None]] = {
    "qkv": (("qkv",), None),
    "all": (ALL_TARGETS, None),
    "some_layers": (("qkv", "down_proj"), (1, 3, 4)),
}
# The stored modules of each target, in the order of its rows.
SEPARATE = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
FUSED = {**SEPARATE, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
MODULES = {"llama": SEPARATE, "qwen3": SEPARATE, "phi3": FUSED}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {
        name: write_tiny_model(root / name, num_layers=LAYERS, tokenizer=False, **shape)
        for name, shape in FAMILIES.items()
    }


def config_source(base: Path) -> ModelSource:
    """The model as a server knows it, from a config of transformers."""
    from transformers import AutoConfig

    return model_source(AutoConfig.from_pretrained(base), str(base))


def dense(served: ServedAdapter) -> dict[tuple[int, str], Tensor]:
    """The update of each layer (0-based) and target in fp64, from the shared factors. Blocks have their slice of u."""
    assert served.tied is not None
    found = {}
    for target, (a, b, u, v) in served.tied.items():
        blocks = served.source.shape.block.adaptable[target].blocks
        assert u.shape == (LAYERS, u.shape[1], served.adapter.config.rank) and v.shape == (LAYERS, sum(blocks))
        assert u.shape[1] in (1, len(blocks)) and {each.dtype for each in (a, b, u, v)} == {torch.float32}
        for layer in range(LAYERS):
            rows = torch.cat([u[layer, index % u.shape[1]].expand(size, -1) for index, size in enumerate(blocks)])
            found[layer, target] = v[layer].double()[:, None] * (b.double() * rows.double()) @ a.double()
    return found


def expected_native(oracle: OracleAdapter) -> dict[tuple[int, str], Tensor]:
    """(alpha / r) diag(v) B diag(u) A of each layer and target by hand, in fp64; zeros in the other layers."""
    found = {}
    for target in oracle.targets:
        a, b, u, v = (oracle.tensor(target, factor).double() for factor in "ABuv")
        for layer in range(LAYERS):
            if layer + 1 not in oracle.layers:
                found[layer, target] = torch.zeros(b.shape[-2], a.shape[-1], dtype=torch.float64)
                continue
            at = oracle.layers.index(layer + 1)
            own_a, own_b = (a[at], b[at]) if oracle.method == "lora" else (a, b)
            update = torch.diag(v[at]) @ own_b @ torch.diag(u[at]) @ own_a
            found[layer, target] = update * oracle.alpha / oracle.rank
    return found


def from_lora(served: ServedAdapter, family: str) -> dict[tuple[int, str], Tensor]:
    """B A of the equal LoRA of each layer and target, in fp64; zeros for modules that it does not adapt."""
    tensors = served.lora_tensors()
    used, found = set(), {}
    for target, linear in served.source.shape.block.adaptable.items():
        modules = MODULES[family][target]
        sizes = linear.blocks if len(modules) > 1 else (sum(linear.blocks),)
        for layer in range(LAYERS):
            parts = []
            for module, size in zip(modules, sizes, strict=True):
                names = [f"base_model.model.model.layers.{layer}.{module}.lora_{one}.weight" for one in "AB"]
                if names[0] in tensors:
                    a, b = (tensors[name].double() for name in names)
                    assert len(a) == b.shape[1] == served.adapter.config.rank
                    parts.append(b @ a)
                    used |= {*names}
                else:
                    parts.append(torch.zeros(size, linear.in_size, dtype=torch.float64))
            found[layer, target] = torch.cat(parts)
    assert used == tensors.keys()
    return found


def check_close(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest value. What only one of them has is zero."""
    for key in found.keys() | expected.keys():
        one, other = (each.get(key, torch.zeros(())) for each in (found, expected))
        scale = max(float(one.abs().max()), float(other.abs().max()), 1e-30)
        assert float((one - other).abs().max()) <= tolerance * scale, key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_native_adapter(bases: dict[str, Path], tmp_path: Path, family: str, part: str, method: str) -> None:
    targets, layers = PARTS[part]
    oracle = with_adapter(bases[family], method, layers, targets=targets)[2]
    adapter = write_native(tmp_path / "adapter", bases[family], oracle)
    served = read_served(tmp_path / "adapter", config_source(bases[family]))
    assert served is not None and served.adapter.config.rank == 4
    expected, source = expected_native(oracle), find_model(str(bases[family]))
    check_close(from_lora(served, family), expected, 3e-7)
    if method == "lora":
        assert served.tied is None
        assert served.why_not_tied == "method lora: its layers do not share A and B"
        return
    assert served.tied is not None and served.why_not_tied == ""
    assert {*served.tied} == {*targets} and all(factors.u.shape[1] == 1 for factors in served.tied.values())
    found = dense(served)
    check_close(found, expected, 3e-7)
    names = {linear.name: target for target, linear in source.shape.block.adaptable.items()}
    updates = {
        (rule.layer - 1, names[str(rule.linear)]): b.double() @ a.double()
        for rule, a, b in adapter.updates(source.shape)
    }
    assert {layer for layer, _ in updates} == {layer - 1 for layer in oracle.layers}
    check_close(found, updates, 3e-7)


def test_factors_frozen_at_one_have_the_scale(bases: dict[str, Path], tmp_path: Path) -> None:
    write_native(tmp_path / "adapter", bases["llama"], with_adapter(bases["llama"], "tl5", (2, 5))[2])
    served = read_served(tmp_path / "adapter", config_source(bases["llama"]))
    assert served is not None and served.tied is not None
    a, b, u, v = served.tied["qkv"]
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    assert torch.equal(a, stored["A"]) and torch.equal(b, stored["B"])
    on = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    assert torch.equal(u, (1.5 * on)[:, None, None].expand(-1, 1, 4)) and torch.equal(v, on[:, None].expand(-1, 96))


def test_a_lora_of_one_layer_has_one_a_and_b(bases: dict[str, Path], tmp_path: Path) -> None:
    """So it is served as a tied adapter."""
    oracle = with_adapter(bases["llama"], "lora", (3,), targets=("qkv", "o_proj"))[2]
    write_native(tmp_path / "adapter", bases["llama"], oracle)
    served = read_served(tmp_path / "adapter", config_source(bases["llama"]))
    assert served is not None
    check_close(dense(served), expected_native(oracle), 3e-7)


# --------------------------------------------------------------------------------------------- PEFT's VeRA


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# family, options of PEFT's VeraConfig, slices of u by target
VERAS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "seven": ("llama", {"target_modules": SEVEN}, {"qkv": 3, "o_proj": 1, "gate_up": 2, "down_proj": 1}),
    "seven_qwen3": ("qwen3", {"target_modules": SEVEN}, {"qkv": 3, "o_proj": 1, "gate_up": 2, "down_proj": 1}),
    "q_v": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"qkv": 3}),
    "up_in_some_layers": ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [0, 3]}, {"gate_up": 2}),
    "pattern": ("llama", {"target_modules": r".*layers\.(0\..*o_proj|2\..*k_proj)"}, {"qkv": 3, "o_proj": 1}),
    "phi3": ("phi3", {"target_modules": "all-linear"}, {"qkv": 1, "o_proj": 1, "gate_up": 1, "down_proj": 1}),
    "phi3_qkv": ("phi3", {"target_modules": ["qkv_proj"], "layers_to_transform": [1, 2]}, {"qkv": 1}),
}


def merged_delta(peft: Any, family: str) -> dict[tuple[int, str], Tensor]:
    """What PEFT's merge adds to the weights of each layer and target, in fp64."""
    peft = peft.double()
    names = {
        (layer, target): [f"model.layers.{layer}.{module}.weight" for module in modules]
        for target, modules in MODULES[family].items()
        for layer in range(LAYERS)
    }
    plain = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor.clone()
        for name, tensor in peft.state_dict().items()
    }
    merged = peft.merge_and_unload().state_dict()
    return {key: torch.cat([merged[name] - plain[name] for name in of]) for key, of in names.items()}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", VERAS)
def test_a_vera_of_peft(bases: dict[str, Path], tmp_path: Path, name: str, saved: bool) -> None:
    family, options, slices = VERAS[name]
    options = {"r": 6, "projection_prng_key": 11, "save_projection": saved, **options}
    peft = vera_model(bases[family], **options)
    peft.save_pretrained(tmp_path / "vera")
    assert ("base_model.vera_A" in load_file(tmp_path / "vera" / WEIGHTS)) == saved
    served = read_served(tmp_path / "vera", config_source(bases[family]))
    assert served is not None and served.adapter.config.rank == 6 and served.why_not_tied == ""
    assert served.tied is not None and {key: one.u.shape[1] for key, one in served.tied.items()} == slices
    expected = merged_delta(peft, family)
    check_close(dense(served), expected, 1e-13)  # all products are taken in fp64
    check_close(from_lora(served, family), expected, 3e-7)


# --------------------------------------------------------------------------------------------- what is not served


def test_a_plain_lora_is_left_to_vllm(bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases["llama"], tmp_path / "lora"
    lora_model(base, r=2, target_modules=["q_proj"]).save_pretrained(folder)
    source = config_source(base)
    assert read_served(folder, source) is None
    for number, fields in enumerate(
        ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"})
    ):
        assert read_served(other := changed(folder, tmp_path / str(number), CONFIG, fields), source) is None
        assert is_plain_lora(other), "which is known without a model"
    edit_json(folder / CONFIG, without=["peft_type"])  # vLLM does not ask for it
    assert read_served(folder, source) is None


def test_an_export_contains_its_native_adapter(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = bases["llama"]
    source, _, oracle = with_adapter(base, "tl6")
    write_native(tmp_path / "adapter", base, oracle)
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        export_peft(
            source,
            load_native_adapter(tmp_path / "adapter"),
            folder,
            native=tmp_path / "adapter",
            dtype=dtype,
            pad_rank_to=8,
        )
        served = read_served(folder, config_source(base))
        assert served is not None and served.adapter.config.rank == 4 and not is_plain_lora(folder)
        check_close(dense(served), expected_native(oracle), 3e-7)
    (folder / "native" / WEIGHTS).write_bytes(b"")
    assert not caplog.records
    assert read_served(folder, config_source(base)) is None
    assert f"{folder}: only its PEFT files are used, since native/ is broken" in caplog.text


def test_an_adapter_of_another_shape_is_rejected_by_the_field(bases: dict[str, Path], tmp_path: Path) -> None:
    for family in ("llama", "phi3"):
        write_native(tmp_path / family, bases[family], with_adapter(bases[family], "tl6")[2])
    sizes = {"head_dim": (12, 8), "num_layers": (LAYERS, 3)}
    others = {
        "head_dim": write_tiny_model(tmp_path / "a", num_layers=LAYERS, intermediate_size=40, tokenizer=False),
        "num_layers": write_tiny_model(tmp_path / "b", head_dim=12, intermediate_size=40, tokenizer=False),
    }
    for field, (value, other) in sizes.items():
        line = refusal(read_served, tmp_path / "llama", config_source(others[field]))
        said = f"with {field} {value}, but {others[field]} has {other}; give its own base"
        assert line.startswith(f"{tmp_path}/llama: trained on ") and said in line
    vera_model(bases["llama"], r=3, target_modules=["q_proj"]).save_pretrained(tmp_path / "vera")
    line = refusal(read_served, tmp_path / "vera", config_source(others["head_dim"]))
    assert f"{tmp_path}/vera/{WEIGHTS}: base_model" in line and "(48," in line and "must be (32," in line


def test_folders_that_are_not_adapters_are_rejected(bases: dict[str, Path], tmp_path: Path) -> None:
    source = config_source(bases["llama"])
    write_native(tmp_path / "run" / "adapter", bases["llama"], with_adapter(bases["llama"], "tl6")[2])
    vera_model(bases["llama"], r=3, target_modules=["q_proj"]).save_pretrained(tmp_path / "vera")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / CONFIG).write_text("{")
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "damaged")
    weights = bytearray((tmp_path / "damaged" / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "damaged" / WEIGHTS).write_bytes(weights)
    changed(tmp_path / "vera", tmp_path / "loha", CONFIG, {"peft_type": "LOHA"})
    large = {"base_model.model.model.layers.1.self_attn.q_proj.vera_lambda_b": torch.full((48,), 1e38)}
    changed(tmp_path / "vera", tmp_path / "large", WEIGHTS, large)
    for name, said in {
        "none": "no such folder",
        "empty": f"has no {CONFIG}",
        "run": f"this is a run folder; give {tmp_path}/run/adapter",
        "broken": "not valid JSON",
        "damaged": "does not match its checksum",
        "loha": "peft_type LOHA is not supported; only LORA and VERA are",
        "large": "its update may reach",
    }.items():
        line = refusal(read_served, tmp_path / name, source)
        assert line.startswith(f"{tmp_path}/{name}") and said in line, line


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_the_config_of_a_server_gives_the_model_that_its_folder_gives(tmp_path: Path, name: str) -> None:
    base = write_tiny_model(tmp_path / "base", tokenizer=False, **FAMILY_MODELS[name])
    found, expected = config_source(base), find_model(str(base))
    assert (found.name, found.folder, found.base_hash) == (expected.name, expected.folder, expected.base_hash)
    # A server has no files of a text tower, and so it has the names in memory, which are those of PEFT's adapters.
    assert found.shape.block.module_name(2) == expected.shape.block.module_name(2)
    if not found.shape.block.is_tower:
        assert found.shape == expected.shape
    else:
        assert found.shape.block.source.startswith("model.language_model.")


def test_a_model_of_an_unknown_family_is_rejected() -> None:
    from transformers import AutoConfig

    assert "gpt2" in refusal(model_source, AutoConfig.for_model("gpt2"), "owner/model")
    assert "owner/model" in refusal(model_source, AutoConfig.for_model("gpt2"), "owner/model")
