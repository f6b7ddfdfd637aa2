"""The text models of multimodal folders: their names in files, in memory and in adapters, and the other towers, which
no conversion changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.native_files import Inputs, with_adapter, write_native
from support.oracle import OracleConfig, load_weights, merged_weights, text_weights
from support.peft_folders import CONFIG, WEIGHTS
from support.peft_models import hf_model, logits_of, lora_model, our_logits, share
from support.quantised_models import SHAPE, quantised_folder
from support.run_files import edit_json, edit_tensors
from support.task_files import refusal
from support.tiny_models import FAMILY_MODELS, write_tiny_model
from transformers import PreTrainedModel

import megatron_tiedlora as tiedlora
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.base_identity import (
    BaseIdentity,
    identify_in_memory,
    identify_model,
    model_source,
)
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import open_adapter, read_peft
from megatron_tiedlora.convert.verify import compare_merged, verify_export
from megatron_tiedlora.peft import TiedLoraConfig

INDEX = "model.safetensors.index.json"
FAMILIES = ("gemma3", "mistral3")
# The names of the towers in files as they are published, in files that are named as in memory, and as a text model.
STORED = ("language_model.model.", "language_model.lm_head", "vision_tower.", "multi_modal_projector.")
IN_MEMORY = ("model.language_model.", "lm_head", "model.vision_tower.", "model.multi_modal_projector.")
TEXT = ("model.", "lm_head")
SIDE_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "tekken.json")
WIDE: dict[str, Any] = {**SHAPE, "head_dim": 16}  # whose widths are multiples of a block of nf4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def write_tower(folder: Path, family: str, prefixes: tuple[str, ...] = STORED, **fields: Any) -> Path:
    """A multimodal model whose stored names have these prefixes, with the files of its processor."""
    write_tiny_model(folder, **{**FAMILY_MODELS[family], **fields})
    for name in SIDE_FILES:
        (folder / name).write_text(f'{{"this is": "{name}"}}')
    return renamed(folder, STORED, prefixes)


def renamed(folder: Path, before: tuple[str, ...], after: tuple[str, ...]) -> Path:
    """The folder, with other prefixes of the names of its tensors. Tensors without a new prefix are taken out."""

    def new(name: str) -> str | None:
        (index,) = (index for index, prefix in enumerate(before) if name.startswith(prefix))
        return after[index] + name.removeprefix(before[index]) if index < len(after) else None

    for file in folder.glob("*.safetensors"):
        found = {new(name): value for name, value in load_file(file).items()}
        save_file({name: value for name, value in found.items() if name}, file, metadata={"format": "pt"})
    if (index := folder / INDEX).is_file():
        content = json.loads(index.read_text())
        files = {new(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps({**content, "weight_map": files}))
    return folder


def raw_tensors(folder: Path) -> dict[str, tuple[str, Any]]:
    """The file of each tensor, and the tensor."""
    files = [(file.name, load_file(file)) for file in folder.glob("*.safetensors")]
    return {name: (file, value) for file, tensors in files for name, value in tensors.items()}


def is_of_text(name: str) -> bool:
    return "language_model" in name or "lm_head" in name


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of each family, in fp32 and one file."""
    return write_tower(tmp_path_factory.mktemp("tower") / "base", request.param)


@pytest.fixture(scope="module")
def inputs(base: Path) -> Inputs:
    """The base, and an adapter of all four targets in the first and the last of its three layers."""
    return with_adapter(base, "tl6", layers=(1, 3), targets=TARGET_NAMES)[:2]


def adapted_modules(model: Any) -> set[str]:
    """The names of the modules in which PEFT has put an adapter."""
    names = (name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    return {name.removeprefix("base_model.model.") for name in names}


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefixes", [STORED, IN_MEMORY])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_other_towers_keep_their_bytes(
    tmp_path: Path, family: str, prefixes: tuple[str, ...], dtype: torch.dtype | None
) -> None:
    """In several files with an index. With a dtype, all numbers are cast; the adapter is in the text tower alone."""
    folder = write_tower(tmp_path / "base", family, prefixes, dtype=torch.bfloat16, max_shard_size="20KB")
    source, adapter, oracle = with_adapter(folder, "tl6", layers=(1, 3), targets=TARGET_NAMES)
    assert source.shape.block.source == f"{prefixes[0]}layers.{{index}}"
    merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    before, after = raw_tensors(folder), raw_tensors(tmp_path / "merged")
    assert len({file for file, _ in before.values()}) > 2 and before.keys() == after.keys()
    others = [name for name in before if not is_of_text(name)]
    assert len(others) > 10
    for name in others:
        assert torch.equal(after[name][1], before[name][1].to(dtype or torch.bfloat16)), name
        assert after[name][1].dtype == (dtype or torch.bfloat16) and after[name][0] == before[name][0]
    sizes = OracleConfig.from_folder(folder)
    wanted = merged_weights(load_weights(folder, torch.float64), sizes, oracle)
    found = text_weights(load_weights(tmp_path / "merged"), sizes)
    for name, value in text_weights(wanted, sizes).items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5 if dtype else 2**-8, atol=1e-6, msg=name)
    copied = [INDEX, *SIDE_FILES] if dtype is None else SIDE_FILES
    for name in (*copied, *(["config.json"] if dtype is None else [])):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vision_config"]


@pytest.mark.parametrize("prefixes", [STORED, IN_MEMORY])
@pytest.mark.parametrize("family", FAMILIES)
def test_exports_compute_what_base_and_adapter_do(tmp_path: Path, family: str, prefixes: tuple[str, ...]) -> None:
    """In transformers' multimodal class, in PEFT on it, and in the package's own layers."""
    folder = write_tower(tmp_path / "base", family, prefixes)
    source, adapter, oracle = with_adapter(folder, "tl6", layers=(1, 3), targets=TARGET_NAMES)
    write_native(tmp_path / "native", folder, oracle)
    merge_adapter(source, adapter, tmp_path / "merged")
    export_peft(source, adapter, tmp_path / "peft", native=tmp_path / "native")
    found = verify_export(source, adapter, merged=tmp_path / "merged", peft=tmp_path / "peft")
    assert found.passed and not found.notes and len(found.logits) == 5, found.report()
    model = hf_model(tmp_path / "merged")
    assert "ForConditionalGeneration" in type(model).__name__
    merged = logits_of(model)
    assert share(our_logits(source, adapter), merged) < 1e-5
    assert share(logits_of(hf_model(folder)), merged) > 0.01
    assert read_peft(tmp_path / "peft", source).native is not None


def test_a_dropped_tensor_of_another_tower_is_found(inputs: Inputs, tmp_path: Path) -> None:
    merge_adapter(*inputs, tmp_path / "merged")
    assert not compare_merged(*inputs, tmp_path / "merged").differences
    name = next(name for name in load_file(tmp_path / "merged" / "model.safetensors") if "vision" in name)
    edit_tensors(tmp_path / "merged" / "model.safetensors", lambda held: held.pop(name))
    (difference,) = compare_merged(*inputs, tmp_path / "merged").differences
    assert difference == f"{tmp_path / 'merged'}: {name}, which is in the base, is missing"


def test_a_tied_head_that_is_stored_is_written_once(tmp_path: Path) -> None:
    folder = write_tower(tmp_path / "base", "gemma3", **WIDE)
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    edit_tensors(folder / "model.safetensors", lambda held: held.update({head: held[embedding].clone()}))
    source, adapter, _ = with_adapter(folder, "tl6", layers=(1, 3), targets=TARGET_NAMES)
    assert source.shape.tied_embeddings
    merge_adapter(source, adapter, tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    stored, trained = in_nf4(folder, tmp_path)
    merge_adapter(stored, trained, tmp_path / "onto", onto_trained=True)
    written = load_file(tmp_path / "onto" / "model.safetensors").keys()
    assert written == load_file(folder / "model.safetensors").keys() - {head}


def in_nf4(folder: Path, into: Path, chosen: Callable[[str], bool] = is_of_text) -> Inputs:
    """A copy of the folder in `into` with its `chosen` linears in nf4, and an adapter that was trained on it."""
    stored, _ = quantised_folder(folder, into, "nf4", chosen)
    source, adapter, _ = with_adapter(stored, "tl6", layers=(1, 3), targets=TARGET_NAMES)
    return source, replace(adapter, base_identity=replace(adapter.base_identity, base_format="nf4"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_text_tower_is_merged_beside_the_others(tmp_path: Path, family: str) -> None:
    folder = write_tower(tmp_path / "base", family, **WIDE)
    edit_tensors(folder / "model.safetensors", lambda held: held.update({"vision_tower.ids": torch.arange(5)}))
    source, trained = in_nf4(folder, tmp_path)
    merge_adapter(source, trained, tmp_path / "merged", onto_trained=True)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert is_of_text(name) or torch.equal(after[name], value), name
    found = verify_export(source, trained, merged=tmp_path / "merged", inside="transformers")
    assert found.passed and not found.bits[0].differences, found.report()
    merge_adapter(source, trained, tmp_path / "bf16", onto_trained=True, dtype=torch.bfloat16)
    assert not compare_merged(source, trained, tmp_path / "bf16").differences
    kinds = {value.dtype for value in load_file(tmp_path / "bf16" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16, torch.int64}


def test_other_towers_in_few_bits_are_not_merged(tmp_path: Path) -> None:
    folder = write_tower(tmp_path / "base", "gemma3", **WIDE)
    edit_tensors(
        folder / "model.safetensors",
        lambda held: held.update({"vision_tower.encoder.layers.0.wide.weight": torch.randn(64, 128)}),
    )
    said = refusal(merge_adapter, *in_nf4(folder, tmp_path, lambda name: True), tmp_path / "merged", onto_trained=True)
    assert ".weight is U8, and only the text tower's linears are dequantised; give the original model with" in said
    assert not (tmp_path / "merged").exists()


def test_other_towers_with_unknown_dtypes_or_without_values_are_not_merged(tmp_path: Path) -> None:
    source, trained = in_nf4(write_tower(tmp_path / "base", "gemma3", **WIDE), tmp_path)
    file = source.weights_folder() / "model.safetensors"
    edit_tensors(file, lambda held: held.update({"vision_tower.x": torch.ones(3, dtype=torch.int8)}))
    merge = partial(merge_adapter, source, trained, tmp_path / "merged", onto_trained=True)
    assert "vision_tower.x is I8, and only the text tower's linears are dequantised" in refusal(merge)
    (file.parent / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(file), file.name)}))
    edit_tensors(file, lambda held: held.pop("vision_tower.x"))
    assert "vision_tower.x, but the index names it; download the model again" in refusal(merge)


# ---------------------------------------------------------------------------------------------------- PEFT's adapters


def test_an_export_adapts_the_text_tower_alone(base: Path, inputs: Inputs, tmp_path: Path) -> None:
    """By a pattern: the vision tower has modules with the same names."""
    source, adapter = inputs
    export_peft(source, adapter, tmp_path / "peft")
    model = PeftModel.from_pretrained(hf_model(base), tmp_path / "peft")
    found = adapted_modules(model)
    within = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    within += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert found == {f"model.language_model.layers.{layer}.{module}" for layer in (0, 2) for module in within}
    assert set(load_file(tmp_path / "peft" / WEIGHTS)) == {
        f"base_model.model.{name}.lora_{factor}.weight" for name in found for factor in "AB"
    }
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert "layers_to_transform" not in config
    assert config["target_modules"].startswith(r"model\.language_model\.layers\.(?:0|2)\.")
    merge_adapter(source, adapter, tmp_path / "merged")
    assert share(logits_of(model), logits_of(hf_model(tmp_path / "merged"))) < 1e-5
    by_endings = lora_model(base, target_modules=PROJECTIONS)
    assert any("vision_tower" in name for name in adapted_modules(by_endings))  # which is why


def zero_others(model: Any) -> Any:
    """The model as after training on text: B of the other towers is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not is_of_text(name):
                parameter.zero_()
    return model


IMPORTS: dict[str, Any] = {
    "endings": {"target_modules": PROJECTIONS, "layers_to_transform": [0, 2]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    "pattern": {"target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|up_proj)"},
    "pattern of Unsloth": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj|v_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|down_proj)))"
    },
    "full names": {"target_modules": [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)]},
}


@pytest.mark.parametrize("name", IMPORTS)
def test_an_adapter_that_peft_trained_on_the_multimodal_class_is_read(base: Path, tmp_path: Path, name: str) -> None:
    peft = zero_others(lora_model(base, r=3, lora_alpha=5, **IMPORTS[name]))
    peft.save_pretrained(tmp_path / "peft")
    source = find_model(str(base))
    opened = open_adapter(tmp_path / "peft", source)
    assert share(our_logits(source, opened.adapter), logits_of(peft)) < 1e-5
    with peft.disable_adapter():
        assert share(our_logits(source, opened.adapter), logits_of(peft)) > 0.01


def renamed_adapter(folder: Path, into: Path, prefix: str) -> Path:
    """A copy of a PEFT folder whose names are those of another class."""
    shutil.copytree(folder, into)
    mine, theirs = (f"base_model.model.{name}" for name in (IN_MEMORY[0], prefix))
    tensors = {name.replace(mine, theirs): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, into / WEIGHTS)
    config = (into / CONFIG).read_text()
    (into / CONFIG).write_text(
        config.replace(IN_MEMORY[0], prefix).replace(*(name.replace(".", r"\\.") for name in (IN_MEMORY[0], prefix)))
    )
    return into


@pytest.mark.parametrize("prefix", [STORED[0], TEXT[0]])
def test_the_names_of_older_classes_and_of_text_models_are_read(
    base: Path, inputs: Inputs, tmp_path: Path, prefix: str
) -> None:
    """The export, with its pattern, as if an older transformers or a text model had been adapted."""
    source, adapter = inputs
    export_peft(source, adapter, tmp_path / "peft")
    found = read_peft(renamed_adapter(tmp_path / "peft", tmp_path / "renamed", prefix), source).adapter
    wanted = read_peft(tmp_path / "peft", source).adapter
    assert found.config == wanted.config
    assert all(torch.equal(found.state[name], value) for name, value in wanted.state.items())
    other = renamed_adapter(tmp_path / "peft", tmp_path / "other", "model.other.")
    said = refusal(lambda: read_peft(other, source).adapter)
    assert "model.language_model.layers" in said or "match no q_proj" in said


def test_an_adapter_of_another_tower_is_rejected(base: Path, tmp_path: Path) -> None:
    lora_model(base, r=3, target_modules=PROJECTIONS).save_pretrained(tmp_path / "peft")
    said = refusal(read_peft, tmp_path / "peft", find_model(str(base)))
    assert "vision_tower" in said and "lora_B.weight is of another tower, whose adapter a native adapter cannot" in said


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_the_same_by_any_name(tmp_path: Path, family: str, tied: bool) -> None:
    """In files with both prefixes, in memory, and as a text model."""
    folder = write_tower(tmp_path / "stored", family, tied=tied)
    wanted = identify_model(find_model(str(folder)), "fp32")
    shutil.copytree(folder, tmp_path / "named")
    named = renamed(tmp_path / "named", STORED, IN_MEMORY)
    shutil.copytree(folder, tmp_path / "text")
    text = renamed(tmp_path / "text", STORED, TEXT)
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps({**config["text_config"], "tie_word_embeddings": tied}))
    assert identical(identify_model(find_model(str(named)), "fp32"), wanted)
    assert identical(identify_model(find_model(str(text)), "fp32"), wanted)
    in_memory(folder, wanted)
    edit_json(folder / "config.json", seals=False, without=["tie_word_embeddings"])  # as published; a stored head stays
    assert identical(identify_model(find_model(str(folder)), "fp32"), wanted)
    in_memory(folder, wanted)


def in_memory(folder: Path, wanted: BaseIdentity) -> None:
    model: PreTrainedModel = hf_model(folder)
    source = model_source(model)
    assert source.shape.block.source.startswith(IN_MEMORY[0]) and source.auto_class == "AutoModelForImageTextToText"
    assert identical(identify_in_memory(model, source), wanted)


def identical(found: BaseIdentity, wanted: BaseIdentity) -> bool:
    names = ("base_hash", "base_weights_hash", "base_sample")
    return [getattr(found, name) for name in names] == [getattr(wanted, name) for name in names]


def test_an_adapter_is_attached_to_the_multimodal_class(base: Path, inputs: Inputs, tmp_path: Path) -> None:
    source, adapter = inputs
    model = tiedlora.load_base(adapter, str(base))
    assert "ForConditionalGeneration" in type(model).__name__
    plain = logits_of(model)
    wanted = our_logits(source, adapter)
    assert share(logits_of(tiedlora.attach(model, adapter)), wanted) < 1e-5
    assert torch.equal(logits_of(tiedlora.detach(model)), plain)
    assert share(logits_of(tiedlora.merge(model, adapter)), wanted) < 1e-5
    trained = tiedlora_peft(base, tmp_path / "trained")
    assert trained.base_identity.base_hash == adapter.base_identity.base_hash


def tiedlora_peft(base: Path, folder: Path) -> Any:
    """A new adapter of PEFT's method TIED_LORA on the multimodal class, saved and read."""
    from peft import get_peft_model

    model = get_peft_model(hf_model(base), TiedLoraConfig(r=2, targets=list(TARGET_NAMES)))
    names = [name for name, module in model.named_modules() if type(module).__name__ == "TiedLoraLinear"]
    assert len(names) == 21 and all(".language_model." in name for name in names)
    model.save_pretrained(folder)
    return load_native_adapter(folder)


# ---------------------------------------------------------------------------------------------------- damaged folders


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held.pop(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_missing_is_named_in_one_line(tmp_path: Path, family: str) -> None:
    folder = write_tower(tmp_path / "base", family)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    renamed(other, STORED, ("text_model.model.", "text_model.lm_head", *STORED[2:]))
    norm = f"{STORED[0]}norm.weight"
    edit_tensors(folder / "model.safetensors", without(norm))
    for path, name in ((folder, norm), (other, f"{IN_MEMORY[0]}embed_tokens.weight")):
        source = find_model(str(path))
        said = refusal(BaseWeights, path, source.shape)
        assert said == f"{path}: tensor {name} is missing from the safetensors files; download the model again"
    (other / "model.safetensors").unlink()  # only a config, as for a dry run
    assert find_model(str(other)).shape.block.source.startswith(IN_MEMORY[0])
    assert "has neither model.safetensors nor" in refusal(BaseWeights, other, find_model(str(other)).shape)
    (other / INDEX).write_text('{"weight_map": 5}')
    assert "weight_map is not a table" in refusal(BaseWeights, other, find_model(str(other)).shape)
