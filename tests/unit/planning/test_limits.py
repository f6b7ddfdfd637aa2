"""The limits of a frozen base, by counts that hold on any machine: saved bytes, operations, what is never kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterPart,
    TiedAdapter,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.benchmark.timing import saved_by_autograd, storage_bytes
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.cpu_attention import find_query_tiles
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.tail import SupervisedTail
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.planning.passes import step_flops

RANK = 16
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_hidden_layers": 4}
HEADS = {"mha": 6, "gqa": 2}
ROWS, LENGTH = 2, 128


def model_config(kv_heads: int) -> ModelShape:
    values = {"model_type": "llama", "vocab_size": 4096, "num_key_value_heads": kv_heads, **SIZES}
    return shape_from_hf(values)


def adapter_config(shape: ModelShape, method: str, layers: tuple[int, ...] = (1, 2, 3, 4)) -> AdapterConfig:
    return make_adapter_config(method, rank=RANK, layers=layers, targets=targets_of(shape), seed=0)


def build(shape: ModelShape, adapter: AdapterConfig, dtype: torch.dtype = torch.bfloat16) -> Stage:
    """The model with random weights and an adapter that is not zero."""
    generator = torch.Generator().manual_seed(1)
    tied_adapter = TiedAdapter(AdapterPart.whole(adapter))
    stage = Stage(layer_specs(shape, dtype=dtype), tied_adapter)
    for parameter in stage.parameters():
        parameter.data.normal_(0.0, 0.05, generator=generator)
    return stage


def batch(share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, positions, labels); the labels of the last `share` of each row."""
    tokens = torch.randint(4096, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, dims=1)
    labels[:, : LENGTH - int(share * LENGTH)] = -100
    return tokens, torch.arange(LENGTH).expand(ROWS, LENGTH), labels


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("method", ["tl6", "lora", "vera"])
def test_a_layer_keeps_the_formula_and_no_more(method: str, heads: str) -> None:
    """4 d + 2 k + 2 f + r numbers a token and layer, norm scalars, attention's log-sum-exp: layers 2 to 3 of 4."""
    config = model_config(HEADS[heads])
    kept = []
    for layers in (3, 4):  # one layer more
        shorter = shape_from_hf({**_values(config), "num_hidden_layers": layers})
        model = build(shorter, adapter_config(shorter, method, tuple(range(1, layers + 1))))
        with saved_by_autograd(model) as saved:
            loss = model(*batch())
        assert loss.requires_grad
        kept.append(storage_bytes(saved))
    d, k, f = config.hidden_size, config.heads.rows[1], config.intermediate_size
    scalars = 4 * (2 + config.heads.num)
    formula = 2 * (4 * d + 2 * k + 2 * f + RANK) + scalars
    factors = 2 * RANK * (sum(config.heads.rows) + (d if method == "lora" else 0))  # F, and A where it is not tied
    assert kept[1] - kept[0] == pytest.approx(ROWS * LENGTH * formula + factors, rel=0.01)


def _values(shape: ModelShape) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 4096, "num_key_value_heads": shape.heads.num_kv, **SIZES}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_as_large_as_logits_or_an_adapters_product_is_kept(method: str) -> None:
    """No tensor of tokens x vocabulary; one of tokens x o a layer, which holds q, k and v, and no second one."""
    config = model_config(2)
    model, inputs = build(config, adapter_config(config, method)), batch()
    with saved_by_autograd(model) as saved:
        model(*inputs)
    o = sum(config.heads.rows)
    sizes = [tensor.untyped_storage().nbytes() // 2 for tensor in saved.values()]
    assert all(size < int((inputs[2] != -100).sum()) * config.vocab_size for size in sizes)
    assert sizes.count(ROWS * LENGTH * o) == config.num_layers
    assert 2 * ROWS * LENGTH * o not in sizes  # nor in fp32


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_behind_the_last_attention_one_gradient_is_kept(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """d numbers a supervised position and its place twice; nothing of the last MLP, the final norm and the head."""
    config = model_config(2)
    model, inputs = build(config, adapter_config(config, "tl6")), batch(share)
    attended: list[Any] = []
    original = SupervisedTail.loss

    def watched(*arguments: Any) -> torch.Tensor:
        with saved_by_autograd(model) as saved:
            loss = original(*arguments)
        attended.append(storage_bytes(saved))
        return loss

    monkeypatch.setattr(SupervisedTail, "loss", watched)
    model(*inputs)
    rows = len(find_supervised(inputs[2]).rows)
    assert attended == [rows * (2 * config.hidden_size + 2 * 8)]


@pytest.mark.parametrize("layers", [(1, 2, 3, 4), (2, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_operations_are_those_of_the_formula(method: str, layers: tuple[int, ...]) -> None:
    """Counted as they run. Attention on a CPU makes 7 products where the formula has 6: its scores anew, going back."""
    config = model_config(2)
    adapter = adapter_config(config, method, layers)
    model, (tokens, positions, labels) = build(config, adapter), batch()
    rows = find_supervised(labels)
    with FlopCounterMode(display=False) as counter:
        model(tokens, positions, labels).backward()
    counts = tokens.numel(), ROWS * LENGTH**2, padded(len(rows.labels))
    flops = step_flops(config, adapter, *counts, num_after=len(rows.rows))
    counted = counter.get_flop_counts()["Global"]
    attention = sum(counted.pop(operation, 0) for operation in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    assert sum(counted.values()) == pytest.approx(flops.total() - flops["attention"], rel=1e-3)
    blocks = find_query_tiles(None, LENGTH, size=64)
    pairs = ROWS * sum((block.stop - block.start) * (block.stop - block.first) for block in blocks)
    passes = 2 * len(config_layers(config)) + 5 * sum(layer >= layers[0] for layer in config_layers(config))
    assert attention == passes * 2 * pairs * config.heads.rows[0]


def config_layers(shape: ModelShape) -> range:
    return range(1, shape.num_layers + 1)


def test_the_formula_is_the_known_one() -> None:
    """Where all is supervised and trained: 4 P + 3 A + 6 r (d + o) L a token, less the first layer's input gradient."""
    from megatron_tiedlora.config.presets import PRESETS

    shape = shape_from_hf(PRESETS["llama2-7b"])
    layers, s, r = shape.num_layers, 4096, 8
    adapter = make_adapter_config(
        "tl6",
        rank=r,
        layers=tuple(range(1, layers + 1)),
        targets=targets_of(shape),
        seed=0,
    )
    flops = step_flops(shape, adapter, num_tokens=s, squared_lengths=s * s, num_after=s, num_supervised=s)
    d, f, k, o, vocabulary = 4096, 11008, 4096, 12288, 32000
    weights = layers * (2 * d * d + 2 * d * k + 3 * d * f) + vocabulary * d
    first = 2 * d * o + 2 * r * d  # nothing below the first layer needs a gradient
    token = 4 * weights + 3 * 2 * s * d * layers + 6 * r * (d + o) * layers - first
    assert flops.total() == s * token
    assert flops.total() / s == pytest.approx(29.6e9, rel=5e-3)


def test_a_second_derivative_is_refused() -> None:
    config = model_config(2)
    model = build(config, adapter_config(config, "tl6"), torch.float32)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(*batch()), parameters, create_graph=True)


def test_gradients_of_all_layers_are_summed_by_one_node_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' gradients of A and F leave them in fp32, over a base in bf16, and become A's, B's, u's and v's in one
    node for each of the two; hooks see one gradient a micro-batch."""
    config = model_config(2)
    model = build(config, adapter_config(config, "tl6"))
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
    model(*batch()).backward()
    o, r, d = config.heads.rows[0] + 2 * config.heads.rows[1], tied_adapter.config.rank, config.hidden_size
    wide = {"grad_a": torch.Size((r, d)), "grad_f": torch.Size((o, r))}
    assert shapes == {name: [(shape, torch.float32)] * config.num_layers for name, shape in wide.items()}
    assert all(len(gradients) == 1 and gradients[0].dtype == torch.float32 for gradients in seen.values())
