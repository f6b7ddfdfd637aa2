"""The model alone: logits against transformers, the loss, what is refused, the table of methods."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_stages import adapted_stage, step_numbers
from support.tiny_models import LLAMA3_ROPE, tiny_config, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterShard,
    Target,
    TiedAdapter,
    initial_values,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import Llama3Scaling, RopeShape
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.attention import Attention
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import GatedMlp
from megatron_tiedlora.parallel import loss as loss_module

# What tests/families does not have of llama.
SHAPES: dict[str, dict[str, Any]] = {
    "mqa": {"num_kv_heads": 1},
    "bias": {"attention_bias": True},
    "llama3": {"llama3_rope": True, "rope_theta": 500.0, "head_dim": 16},
    "all": {"num_layers": 5, "head_dim": 16, "tied": True, "attention_bias": True, "llama3_rope": True},
}


def tokens(batch: int = 2, length: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def positions(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.shape[1]).expand_as(like)


def some_labels(ids: torch.Tensor, share: float, seed: int = 4) -> torch.Tensor:
    """Next tokens, of which about `share` are supervised."""
    kept = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(kept, ids.roll(-1, dims=1), -100)


# --------------------------------------------------------------------------------------------- logits and loss


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path, tokenizer=False, **SHAPES[shape])
    model = load_model(find_model(str(folder)), None, dtype=torch.float32)
    # Theirs in fp64: in fp32 each side is up to 7e-6 off that, not to the same side.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(tokens()).logits
    ours = model.predict(tokens(), positions(tokens()))
    assert theirs.std() > 1  # far from uniform, so that a fault shows
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_rope_settings_are_read_in_both_of_transformers_spellings() -> None:
    new = tiny_config(llama3_rope=True, rope_theta=500.0).to_dict()
    old = {**new, "rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}}
    del old["rope_parameters"]
    assert shape_from_hf(old) == shape_from_hf(new)
    assert shape_from_hf(new).heads.rope == RopeShape(500.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 64))
    plain = {**old, "rope_scaling": None}
    assert shape_from_hf(plain).heads.rope.scaling is None
    both = {**old, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert shape_from_hf(both).heads.rope == shape_from_hf(old).heads.rope  # as transformers reads them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), tokenizer=False)


def test_only_supervised_positions_meet_the_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And up to 7 rows more, so that there are a multiple of 8."""
    model, ids = adapted_stage(folder, scale=0.3), tokens()
    labels = some_labels(ids, 0.3)
    whole = model(ids, positions(ids), labels).item()
    rows: list[int] = []
    real = loss_module._losses

    def counted(logits: torch.Tensor, *arguments: Any) -> Any:
        rows.append(logits.shape[0])
        return real(logits, *arguments)

    monkeypatch.setattr(loss_module, "_losses", counted)
    monkeypatch.setattr(model.tail.head, "rows_at_once", 8)  # few rows at a time give the same sum
    assert model(ids, positions(ids), labels).item() == pytest.approx(whole, rel=1e-6)
    assert (labels != -100).sum() == 23 and rows == [8, 8, 8]


def test_full_recompute_gives_the_same_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And computes again what it should: all of a block, but the last MLP has its backward pass at once."""
    plain, calls = step_numbers(adapted_stage(folder)), list[str]()

    def counting(name: str, real: Any) -> Any:
        return lambda *arguments, **keywords: [calls.append(name), real(*arguments, **keywords)][1]

    monkeypatch.setattr(Attention, "steps", counting("attend", Attention.steps))
    monkeypatch.setattr(GatedMlp, "steps", counting("feed", GatedMlp.steps))
    recomputed = step_numbers(adapted_stage(folder, recompute="full"))
    assert calls.count("attend") == 2 * 3 and calls.count("feed") == 2 * 3 - 1
    assert plain.keys() == recomputed.keys()
    for name, number in plain.items():
        assert torch.equal(recomputed[name], number), name


def test_a_second_derivative_is_refused(folder: Path) -> None:
    model, ids = adapted_stage(folder), tokens()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(ids, positions(ids), some_labels(ids, 0.5)), parameters, create_graph=True)


def test_gradients_of_all_layers_are_summed_by_one_node_in_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' gradients of A and F leave them in fp32, over a base in bf16, and become A's, B's, u's and v's in one
    node for each of the two; hooks see one gradient a micro-batch."""
    model, ids, config = adapted_stage(folder, dtype=torch.bfloat16), tokens(), find_model(str(folder)).shape
    tied_adapter: Any = model.adapter
    seen: dict[str, list[torch.Tensor]] = {"A": [], "B": [], "u": [], "v": []}
    for name, gradients in seen.items():
        getattr(tied_adapter, name).register_hook(gradients.append)
    updates = model.read_adapter()
    of_qkv = [update["qkv"] for update in updates.values()]
    shapes: dict[str, list[tuple[torch.Size, torch.dtype]]] = {"grad_a": [], "grad_f": []}
    for name, found in shapes.items():
        tensors = [getattr(update, name) for update in of_qkv]
        assert all(tensor.untyped_storage().nbytes() == 4 for tensor in tensors), "no memory"
        node: Any = tensors[0].grad_fn
        assert all(tensor.grad_fn is node for tensor in tensors), "one node for all layers"
        node.register_prehook(lambda given, found=found: found.extend((g.shape, g.dtype) for g in given))
    assert {update.a.dtype for update in of_qkv} == {torch.bfloat16}
    monkeypatch.setattr(model, "read_adapter", lambda _shares: updates)
    model(ids, positions(ids), some_labels(ids, 0.5)).backward()
    o, r, d = config.heads.rows[0] + 2 * config.heads.rows[1], tied_adapter.config.rank, config.hidden_size
    wide = {"grad_a": torch.Size((r, d)), "grad_f": torch.Size((o, r))}
    assert shapes == {name: [(shape, torch.float32)] * config.num_layers for name, shape in wide.items()}
    assert all(len(gradients) == 1 and gradients[0].dtype == torch.float32 for gradients in seen.values())


# --------------------------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sliding_window": ({"sliding_window": 64}, "sliding_window = 64"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias = True"),
    "ntk": ({"rope_parameters": None, "rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_type 'ntk'"),
    "linear": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0.0}}, "factor = 0.0"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 0}, "max_position_embeddings = 0"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "weights quantised by 'awq' cannot be read. Use"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "heads": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3"),
    "size": ({"hidden_size": "wide"}, "wide"),
    "null": ({"vocab_size": None}, "vocab_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_that_are_not_implemented_are_refused_by_name(case: str) -> None:
    changes, message = REFUSED[case]
    values = tiny_config().to_dict() | changes
    with pytest.raises(UserError) as error:
        shape_from_hf(values, source="the/config.json")
    assert message in str(error.value)
    assert "the/config.json" in str(error.value) and "\n" not in str(error.value)


def test_features_that_are_switched_off_are_not_refused() -> None:
    off = {"sliding_window": None, "mlp_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"}
    assert shape_from_hf(tiny_config().to_dict() | off).hidden_size == 32


# --------------------------------------------------------------------------------------------- the table of methods

# Trained numbers on 7B and 70B at r = 8, from shared/reference/README.md; those that it does not print for 70B are by
# hand: L = 80, d = 8192, o = 10240 in its formulas. And what A, B, u and v start at by its table: N(0, std), 0 or 1.
TABLE = {
    "lora": (4_194_304, 11_796_480, "N011"),
    "vera": (393_472, 819_840, "NN10"),
    "tl1": (32_768, 65_536, "NN11"),
    "tl2": (426_240, 885_376, "NN10"),
    "tl3": (98_304, 81_920, "N011"),
    "tl4": (98_560, 82_560, "N011"),
    "tl5": (131_072, 147_456, "N011"),
    "tl6": (524_544, 967_296, "NN10"),
}


def preset_config(preset: str, method: str, layers: tuple[int, ...] | None = None) -> AdapterConfig:
    shape = shape_from_hf(PRESETS[preset])
    return make_adapter_config(
        method, rank=8, layers=layers or tuple(range(1, shape.num_layers + 1)), targets=targets_of(shape), seed=0
    )


def trained_numbers(config: AdapterConfig) -> int:
    with torch.device("meta"):
        adapter = TiedAdapter(AdapterShard.whole(config))
    return sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("preset", "column"), [("llama2-7b", 0), ("llama2-70b", 1)])
def test_trained_counts_are_the_reference(preset: str, column: int) -> None:
    assert set(TABLE) == set(METHODS)
    for method, row in TABLE.items():
        config = preset_config(preset, method)
        assert trained_numbers(config) == sum(config.num_trained().values()) == row[column], method


def test_trained_counts_of_lora_on_one_layer() -> None:
    assert trained_numbers(preset_config("llama2-7b", "lora", (8,))) == 131_072  # 8 (4096 + 12288)
    assert trained_numbers(preset_config("llama2-70b", "lora", (8,))) == 147_456  # 8 (8192 + 10240)


# --------------------------------------------------------------------------------------------- start values

TARGET = Target("qkv", 256, (256, 64, 64), "column")


@pytest.mark.parametrize("method", TABLE)
def test_initial_values_are_the_table(method: str) -> None:
    config = make_adapter_config(method, rank=8, layers=(1, 2, 3, 4), targets=(TARGET,), seed=7)
    values = initial_values(config)
    narrow = 0.3 if method == "tl1" else 1.0  # its update is there at the first step already
    widths = {"A": 1 / math.sqrt(256), "B": narrow / math.sqrt(8)}
    for name, start in zip("ABuv", TABLE[method][2], strict=True):
        if start == "N":
            assert values[name].std().item() == pytest.approx(widths[name], rel=0.1)
            assert abs(values[name].mean().item()) < 0.1 * widths[name]
        else:
            assert torch.equal(values[name], torch.full_like(values[name], float(start)))
    assert METHODS[method].starts_at_base == (method != "tl1")


def test_start_widths_can_be_set() -> None:
    config = make_adapter_config("vera", rank=8, layers=(1,), targets=(TARGET,), seed=0, init_std_a=0.5, init_std_b=2.0)
    values = initial_values(config)
    assert values["A"].std().item() == pytest.approx(0.5, rel=0.1)
    assert values["B"].std().item() == pytest.approx(2.0, rel=0.1)
