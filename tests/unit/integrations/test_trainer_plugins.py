"""The plugins of axolotl and ms-swift: their keys and flags become a `TiedLoraConfig`, and wrong ones one line.

Where a tool is not installed, its base classes are stood in for. Where it is, it also trains 5 steps.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import yaml
from support.peft_models import hf_model
from support.task_files import refusal
from support.tiny_models import write_tiny_model

import megatron_tiedlora
from megatron_tiedlora.adapters.tied_adapter import initial_values
from megatron_tiedlora.peft import TiedLoraConfig


class SwiftTuner:
    """The tuner of ms-swift 4.6 that saves and loads by PEFT."""

    @staticmethod
    def save_pretrained(model: Any, save_directory: str, state_dict: Any = None, **keywords: Any) -> None:
        model.save_pretrained(save_directory, selected_adapters=["default"], **keywords)

    from_pretrained = staticmethod(peft.PeftModel.from_pretrained)


# Of axolotl 0.19, a plugin also inherits hooks that do nothing.
CAPABILITIES = make_dataclass("AdapterCapabilities", ["name", ("lora_like", bool, False), ("relora", bool, False)])
STAND_INS: dict[str, dict[str, Any]] = {
    "axolotl.integrations.base": {"AdapterCapabilities": CAPABILITIES, "BasePlugin": object},
    "swift.tuner_plugin": {"PeftTuner": SwiftTuner, "tuners_map": {"ia3": SwiftTuner}},
}
# The flags of swift that the tuner reads, and their defaults.
DEFAULTS: dict[str, Any] = {"tuner_type": "tl6", "task_type": "causal_lm", "seed": 42, "lora_rank": 8}
DEFAULTS |= {"lora_alpha": 32.0, "target_modules": field(default_factory=lambda: ["all-linear"])}
DEFAULTS |= {"lora_dropout": 0.05, "lora_bias": "none", "lora_dtype": None, "lorap_lr_ratio": None, "use_dora": False}
DEFAULTS |= {"use_rslora": False, "init_weights": "true", "target_parameters": None}
DEFAULTS["modules_to_save"] = field(default_factory=list)
Flags = make_dataclass("Flags", [(name, Any, value) for name, value in DEFAULTS.items()])
KEYS = {"adapter": "tied_lora", "lora_r": 3, "tied_lora_method": "tl6", "tied_lora_layers": [1, 3], "seed": 7}
KEYS |= {"tied_lora_targets": ["qkv", "o_proj"]}


@pytest.fixture(scope="module")
def plugins() -> Iterator[SimpleNamespace]:
    """The plugin's module for each tool."""
    with pytest.MonkeyPatch.context() as patch:
        for name, members in STAND_INS.items():
            top = name.partition(".")[0]
            if importlib.util.find_spec(top) is None:
                patch.setitem(sys.modules, name, ModuleType(name))
                vars(sys.modules[name]).update(members)
        names = ("axolotl", "swift")
        yield SimpleNamespace(**{x: importlib.import_module(f"megatron_tiedlora.integrations.{x}") for x in names})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), head_dim=12)


def check_start(model: Any, **wanted: Any) -> None:
    """The adapter has the initial values of its config, whose fields are as wanted."""
    config, adapter = model.peft_config["default"], model.base_model.tied_lora_adapters["default"]
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert all(torch.equal(adapter.factors()[name], value) for name, value in initial_values(adapter.config).items())


def test_axolotl_adds_loads_and_ignores_adapters(plugins: Any, base: Path, tmp_path: Path) -> None:
    plugin = plugins.axolotl.TiedLoraPlugin()
    assert [one.name for one in plugin.get_adapter_capabilities()] == ["tied_lora"]
    assert plugin.load_adapter(None, {"adapter": "mora"}) is None
    model, config = plugin.load_adapter(hf_model(base), KEYS)
    check_start(model, method="tl6", r=3, alpha=3.0, seed=7, layers=[1, 3], targets=["qkv", "o_proj"])
    nothing, config = plugin.load_adapter(None, KEYS, config_only=True)
    assert nothing is None and config.r == 3
    with torch.no_grad():
        model.base_model.tied_lora_adapters["default"].B.fill_(0.5)
    model.save_pretrained(tmp_path)
    again, _ = plugin.load_adapter(hf_model(base), KEYS | {"lora_model_dir": str(tmp_path)}, inference=True)
    b = again.base_model.tied_lora_adapters["default"].B
    assert (b == 0.5).all() and not b.requires_grad


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tied_lora_methd": "tl6"}, "tied_lora_methd is unknown (did you mean tied_lora_method?)"),
        ({"adapter": "lora"}, "tied_lora_method needs `adapter: tied_lora`, not lora"),
        ({"lora_r": 0}, "adapter: tied_lora (r is lora_r, alpha is lora_alpha): r = 0 is not a positive integer"),
        ({"tied_lora_targets": "q_proj"}, "'q_proj' is unknown (part of qkv)"),
        ({"load_in_4bit": True}, "load_in_4bit: True does not work with adapter: tied_lora; axolotl quantises"),
        ({"lora_target_linear": True}, "use tied_lora_targets"),
        *(
            ({f"lora_{name}": 0.1}, f"lora_{name}: 0.1 does not work with adapter: tied_lora; it is for LoRA only")
            for name in ("dropout", "qkv_kernel", "mlp_kernel", "o_kernel", "embedding_kernel")
        ),
    ],
)
def test_axolotl_says_what_is_wrong(plugins: Any, keys: dict[str, Any], said: str) -> None:
    config = getattr(plugins.axolotl, plugins.axolotl.TiedLoraPlugin().get_input_args().rpartition(".")[2])
    assert config(**KEYS, lora_dropout=0.0, fsdp=None).tied_lora_layers == [1, 3] and config(adapter="lora")
    with pytest.raises(ValueError, match=re.escape(said)):
        config(**KEYS | keys)


def test_axolotl_has_not_resized_the_embeddings(plugins: Any, base: Path) -> None:
    """It does for special_tokens that are new, and for resize_token_embeddings_to_32x if that changes the number."""
    model = hf_model(base)
    model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    said = refusal(plugins.axolotl.TiedLoraPlugin().load_adapter, model, KEYS)
    assert f"axolotl gave {base} 321 embeddings for added tokens (special_tokens" in said


def test_swift_adds_saves_and_loads_adapters(plugins: Any, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    tuners = sys.modules["swift.tuner_plugin"].tuners_map
    assert {"ia3", "tl1", "tl6"} <= tuners.keys() and not {"lora", "vera"} & tuners.keys()
    model = tuners["tl6"].prepare_model(Flags(init_weights=True), hf_model(base))
    check_start(model, method="tl6", r=8, alpha=32.0, seed=42, targets=["qkv", "o_proj", "gate_up", "down_proj"])
    tuners["tl6"].save_pretrained(model, str(tmp_path), safe_serialization=True)
    check_start(tuners["tl6"].from_pretrained(hf_model(base), str(tmp_path), is_trainable=True), layers=[1, 2, 3])
    monkeypatch.setenv("TIED_LORA_LAYERS", "[1, 3]")  # as swift sets it for --model_kwargs
    assert plugins.swift.swift_config(Flags("tl5", target_modules=["qkv"])).layers == [1, 3]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_dropout": 0.1}, "--lora_dropout 0.1 is for LoRA only; remove it"),
        ({"use_dora": True}, "--use_dora True is for LoRA only"),
        ({"init_weights": "pissa"}, "--init_weights 'pissa' is for LoRA only"),
        ({"modules_to_save": ["lm_head"]}, "--modules_to_save ['lm_head'] is for LoRA only"),
        ({"target_modules": ["q_proj"]}, "--tuner_type tl6 (r is --lora_rank, alpha is --lora_alpha"),
        ({"task_type": "seq_cls"}, "task_type SEQ_CLS is not implemented"),
    ],
)
def test_swift_says_what_is_wrong(plugins: Any, flags: dict[str, Any], said: str) -> None:
    assert said in refusal(plugins.swift.swift_config, Flags(**flags))


@pytest.mark.parametrize("given", ["5-8", "[-1]", "[1.5]", "[True]", "3", "[]", "[1 3]"])
def test_swift_s_layers_are_a_list(plugins: Any, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TIED_LORA_LAYERS", given)
    said = refusal(plugins.swift.swift_config, Flags())
    assert said == f"--model_kwargs tied_lora_layers {given}: is not a list of layers; give one like [1, 3]"


def test_swift_is_not_given_the_package_s_own_file(plugins: Any) -> None:
    """Its folder would be searched before all others, and has modules named vllm and axolotl."""
    spec = importlib.util.spec_from_file_location("_swift_external_0", plugins.swift.__file__)
    said = refusal(spec.loader.exec_module, importlib.util.module_from_spec(spec))
    assert "give a file with `import megatron_tiedlora.integrations.swift`" in said


def test_a_trainer_that_adds_tokens_is_told() -> None:
    with pytest.raises(AttributeError, match="trainable_token_indices: Tied-LoRA does not train embeddings"):
        _ = TiedLoraConfig().trainable_token_indices  # SFTTrainer reads it then


def check_trained(folder: Path) -> None:
    """Five steps have changed the factors of layers 1 and 3."""
    found = megatron_tiedlora.load_adapter(folder)
    assert found.config.method == "tl6" and found.config.layers == (1, 3) and found.config.rank == 3
    assert found.state["v"].abs().min() > 0 and (found.state["u"] - 1).abs().max() > 0.01


def test_axolotl_trains(base: Path, tmp_path: Path) -> None:
    config = pytest.importorskip("axolotl.cli.config", reason="axolotl is not installed")
    rows, file, out = tmp_path / "rows.jsonl", tmp_path / "config.yml", tmp_path / "out"
    rows.write_text("".join(json.dumps({"instruction": "ab" * n, "output": "yes" * n}) + "\n" for n in range(1, 9)))
    own = f"""{{base_model: {base}, datasets: [{{path: {rows}, type: alpaca, ds_type: json}}], output_dir: {out},
        plugins: [megatron_tiedlora.integrations.axolotl.TiedLoraPlugin], max_steps: 5, micro_batch_size: 2,
        gradient_accumulation_steps: 1, learning_rate: 0.01, optimizer: adamw_torch, lr_scheduler: constant,
        bf16: false, sequence_len: 256, special_tokens: {{pad_token: </s>}}, dataset_prepared_path: {out}.rows,
        attn_implementation: eager, dataset_num_proc: 1, dataloader_num_workers: 0, gradient_checkpointing: true}}"""
    file.write_text(yaml.safe_dump(KEYS | yaml.safe_load(own)))
    cfg = config.load_cfg(str(file))
    rows_of = importlib.import_module("axolotl.common.datasets").load_datasets(cfg=cfg)
    importlib.import_module("axolotl.train").train(cfg=cfg, dataset_meta=rows_of)
    check_trained(out)


def test_swift_trains(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    swift = pytest.importorskip("swift.pipelines", reason="ms-swift is not installed")
    rows, plugin, out = tmp_path / "rows.jsonl", tmp_path / "plugin.py", tmp_path / "out"
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "yes"}]
    rows.write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    plugin.write_text("import megatron_tiedlora.integrations.swift\n")
    flags = f"""--model {base} --model_type llama --template dummy --external_plugins {plugin} --tuner_type tl6
        --lora_rank 3 --lora_alpha 3 --target_modules qkv o_proj --dataset {rows} --max_steps 5 --use_hf true
        --torch_dtype float32 --learning_rate 1e-2 --save_steps 5 --split_dataset_ratio 0 --add_version false
        --dataloader_num_workers 0 --report_to none --gradient_accumulation_steps 1""".split()
    monkeypatch.setenv("TIED_LORA_LAYERS", "")
    swift.sft_main([*flags, "--output_dir", str(out), "--model_kwargs", '{"tied_lora_layers": [1, 3]}'])
    check_trained(out / "checkpoint-5")
    again = ["--adapters", str(out / "checkpoint-5"), "--output_dir", str(tmp_path / "more")]
    swift.sft_main([*flags, *again])
    check_trained(tmp_path / "more" / "checkpoint-5")
