"""The model alone: logits against transformers, the loss, what is refused, shard declarations, the table of methods."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA3_ROPE, tiny_config, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterPart,
    Target,
    TiedAdapter,
    initial_values,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.base.shapes import Llama3Scaling, RopeShape
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.model.attention import Attention
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import Block
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel import loss as loss_module
from megatron_tiedlora.parallel.shard_spec import ShardSpec

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 12},
    "tied": {"tied": True},
    "bias": {"attention_bias": True},
    "llama3": {"llama3_rope": True, "rope_theta": 500.0, "head_dim": 16},
    "five_layers": {"rope_theta": 500000.0, "num_layers": 5},
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


def adapted_model(folder: Path, method: str = "tl6", layers: tuple[int, ...] = (1, 2, 3)) -> Stage:
    """The tiny model with an adapter in the middle of training: no tensor is zero."""
    source = find_model(str(folder))
    model = load_model(source, None, dtype=torch.float32)
    shape = source.shape
    config = make_adapter_config(method, rank=4, layers=layers, targets=targets_of(shape), seed=1)
    adapter = TiedAdapter(AdapterPart.whole(config))
    model.hold(adapter)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


def gradients(model: Stage, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    assert model.adapter is not None
    return {name: p.grad.clone() for name, p in model.adapter.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("share", [0.5, 0.02, 1.0])
def test_loss_is_the_sum_over_supervised_tokens(folder: Path, share: float) -> None:
    model, ids = adapted_model(folder), tokens()
    labels = some_labels(ids, share)
    assert 0 < (labels != -100).sum() <= ids.numel()
    loss = model(ids, positions(ids), labels)
    log_p = model.predict(ids, positions(ids)).log_softmax(-1)
    picked = [-log_p[b, s, labels[b, s]] for b in range(2) for s in range(40) if labels[b, s] != -100]
    plain = torch.stack(picked).sum()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    expected, found = gradients(model, plain), gradients(model, loss)
    assert set(found) == {"A", "B", "u", "v"}
    for name in found:
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max())


def test_only_supervised_positions_meet_the_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And up to 7 rows more, so that there are a multiple of 8."""
    model, ids = adapted_model(folder), tokens()
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


def test_without_a_supervised_position_loss_and_gradients_are_zero(folder: Path) -> None:
    model, ids = adapted_model(folder), tokens()
    loss = model(ids, positions(ids), torch.full_like(ids, -100))
    assert loss.item() == 0.0
    for name, gradient in gradients(model, loss).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_full_recompute_gives_the_same_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted_model(folder), tokens()
    labels = some_labels(ids, 0.5)
    plain = gradients(model, model(ids, positions(ids), labels))
    calls = []
    attend, feed = Attention.attend, Block.add_mlp

    def counted(self: Attention, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append("attend")
        return attend(self, *arguments, **keywords)

    def counted_too(self: Block, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append("feed")
        return feed(self, *arguments, **keywords)

    monkeypatch.setattr(Attention, "attend", counted)
    monkeypatch.setattr(Block, "add_mlp", counted_too)
    model.recompute = "full"
    recomputed = gradients(model, model(ids, positions(ids), labels))
    # Once forwards, once more in the backward pass, which the last MLP has at once.
    assert calls.count("attend") == 2 * 3 and calls.count("feed") == 2 * 3 - 1
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


def test_layers_without_the_adapter_are_the_base(folder: Path) -> None:
    """An adapter on layer 2 leaves what enters layer 2 alone and changes what leaves it."""
    model, ids = adapted_model(folder, "lora", (2,)), tokens()
    seen: dict[str, list[torch.Tensor]] = {"in": [], "out": []}

    def look(_module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        seen["in"].append(arguments[0].detach())
        seen["out"].append(output.detach())

    model.layers["2"].register_forward_hook(look)
    model.predict(ids, positions(ids))
    model.hold(None)
    model.predict(ids, positions(ids))
    assert torch.equal(*seen["in"])
    assert not torch.allclose(*seen["out"], rtol=1e-2)


# --------------------------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sliding_window": ({"sliding_window": 64}, "sliding_window = 64"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias = True"),
    "ntk": ({"rope_parameters": None, "rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_type 'ntk'"),
    "linear": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0.0}}, "factor = 0.0"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 0}, "max_position_embeddings = 0"),
    "rope field": ({"rope_parameters": {"mrope_section": [1]}}, "'mrope_section'"),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "weights quantised by 'awq' are not read; give"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "mixtral": ({"model_type": "mixtral"}, "model_type 'mixtral'"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "heads": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3"),
    "size": ({"hidden_size": "wide"}, "wide"),
    "null": ({"vocab_size": None}, "vocab_size"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0}}, "low_freq_factor"),
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


# --------------------------------------------------------------------------------------------- shard declarations


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dim", "blocks"), [(0, (32, 16, 16)), (0, (8, 4, 4)), (1, (12,)), (0, (20, 20)), (None, (9,))]
)
def test_split_and_join_are_inverse(tp_size: int, dim: int | None, blocks: tuple[int, ...]) -> None:
    spec, size = ShardSpec(dim, blocks), sum(blocks)
    full = torch.arange(size * 3.0).view((3, size) if dim == 1 else (size, 3))
    parts = [spec.split(full, rank, tp_size) for rank in range(tp_size)]
    assert torch.equal(spec.join(parts), full)
    for part in parts:
        assert tuple(part.shape) == spec.local_shape(full.shape, tp_size)
        assert part.shape[dim or 0] == (size if dim is None else size // tp_size)


def test_fused_rows_are_cut_by_heads_within_each_block() -> None:
    """Q has 4 heads of 2 rows, K and V have 2: rank 1 of 2 holds the second half of each, not of all."""
    rows = ShardSpec(0, (8, 4, 4)).split(torch.arange(16), 1, 2)
    assert rows.tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="6 is not divisible by tensor parallel 4"):
        ShardSpec(0, (8, 6, 6)).split(torch.zeros(20), 0, 4)


# --------------------------------------------------------------------------------------------- the table of methods

# From shared/reference/README.md, r = 8; those that it does not print for 70B are L = 80, d = 8192, o = 10240 in its
# formulas, by hand.
COUNTS_7B = {
    "lora": 4_194_304,
    "vera": 393_472,
    "tl1": 32_768,
    "tl2": 426_240,
    "tl3": 98_304,
    "tl4": 98_560,
    "tl5": 131_072,
    "tl6": 524_544,
}
COUNTS_70B = {
    "lora": 11_796_480,
    "vera": 819_840,
    "tl1": 65_536,
    "tl2": 885_376,
    "tl3": 81_920,
    "tl4": 82_560,
    "tl5": 147_456,
    "tl6": 967_296,
}


def preset_config(preset: str, method: str, layers: tuple[int, ...] | None = None) -> AdapterConfig:
    shape = shape_from_hf(PRESETS[preset])
    return make_adapter_config(
        method,
        rank=8,
        layers=layers or tuple(range(1, shape.num_layers + 1)),
        targets=targets_of(shape),
        seed=0,
    )


def trained_numbers(config: AdapterConfig) -> int:
    with torch.device("meta"):
        adapter = TiedAdapter(AdapterPart.whole(config))
    return sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("preset", "counts"), [("llama2-7b", COUNTS_7B), ("llama2-70b", COUNTS_70B)])
def test_trained_counts_are_the_reference(preset: str, counts: dict[str, int]) -> None:
    assert set(counts) == set(METHODS)
    for method, count in counts.items():
        config = preset_config(preset, method)
        assert trained_numbers(config) == sum(config.num_trained().values()) == count, method


def test_trained_counts_of_lora_on_one_layer() -> None:
    assert trained_numbers(preset_config("llama2-7b", "lora", (8,))) == 131_072  # 8 (4096 + 12288)
    assert trained_numbers(preset_config("llama2-70b", "lora", (8,))) == 147_456  # 8 (8192 + 10240)


# --------------------------------------------------------------------------------------------- start values

# What each starts at, by the reference's table: N(0, std), 0 or 1.
STARTS = {
    "lora": "N011",
    "vera": "NN10",
    "tl1": "NN11",
    "tl2": "NN10",
    "tl3": "N011",
    "tl4": "N011",
    "tl5": "N011",
    "tl6": "NN10",
}


TARGET = Target("qkv", 256, (256, 64, 64), "column")


def small_config(method: str, *, layers: tuple[int, ...] = (1, 2, 3, 4), seed: int = 7) -> AdapterConfig:
    return make_adapter_config(method, rank=8, layers=layers, targets=(TARGET,), seed=seed)


@pytest.mark.parametrize("method", STARTS)
def test_initial_values_are_the_table(method: str) -> None:
    values = initial_values(small_config(method))
    narrow = 0.3 if method == "tl1" else 1.0  # its update is there at the first step already
    widths = {"A": 1 / math.sqrt(256), "B": narrow / math.sqrt(8)}
    for name, start in zip("ABuv", STARTS[method], strict=True):
        if start == "N":
            assert values[name].std().item() == pytest.approx(widths[name], rel=0.1)
            assert abs(values[name].mean().item()) < 0.1 * widths[name]
        else:
            assert torch.equal(values[name], torch.full_like(values[name], float(start)))
    assert METHODS[method].starts_at_base == (method != "tl1")


def test_start_widths_can_be_set() -> None:
    config = make_adapter_config(
        "vera", rank=8, layers=(1,), targets=(TARGET,), seed=0, init_std_a=0.5, init_std_b=2.0
    )
    values = initial_values(config)
    assert values["A"].std().item() == pytest.approx(0.5, rel=0.1)
    assert values["B"].std().item() == pytest.approx(2.0, rel=0.1)


def test_initial_values_do_not_depend_on_which_layers_are_adapted() -> None:
    lora, one = initial_values(small_config("lora")), initial_values(small_config("lora", layers=(3,)))
    assert torch.equal(lora["A"][2], one["A"][0])
    assert not torch.equal(lora["A"][0], lora["A"][1])
    tied, few = initial_values(small_config("tl6")), initial_values(small_config("tl6", layers=(2, 4)))
    assert torch.equal(tied["A"], few["A"]) and torch.equal(tied["B"], few["B"])


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    first, again, other = (initial_values(small_config("vera", seed=seed)) for seed in (7, 7, 8))
    for name in "AB":
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    streams = torch.stack([first[name].flatten()[:1000] for name in "AB"])
    assert abs(torch.corrcoef(streams)[0, 1]) < 0.2
    torch.manual_seed(99)  # the global stream has no say
    assert torch.equal(initial_values(small_config("vera"))["A"], first["A"])
