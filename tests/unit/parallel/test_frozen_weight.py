"""Frozen weights: quantising beside the oracle and bitsandbytes, to the last bit; matmuls; values that do not depend on
the shards; the memory that weights share; and another storage format in place of the plain one."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import quantised_oracle as oracle
from support.adapted_stages import adapted_stage, drawn, step_numbers
from support.quantised_models import CROSSING, FORMATS, bytes_of, dequantised, expected_values, with_values
from support.tiny_models import write_tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights, weight_map
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel import quantise
from megatron_tiedlora.parallel.frozen_weight import Columns, FrozenWeight, frozen_parameter, frozen_weights
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight, weight_maker
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.training import throughput

BLOCK = 64
LEVELS = quantise.levels_of("nf4", torch.device("cpu"))
WIDTHS = (64, 128, 96, 1376, 100, 7)


def odd_rows(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights with a row of zeros, a block of zeros, single large ones and subnormal ones."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 0.02
    values[1] = 0
    values[2, :BLOCK] = 0
    values[3, ::17] *= 40
    values[4] *= 1e-38  # below what nf4 stores
    return values.to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_oracles(width: int, dtype: torch.dtype) -> None:
    values = odd_rows(6, width, dtype)
    codes, scales = quantise.quantise_blocks(values, BLOCK, "nf4")
    expected, expected_scales = oracle.nf4_codes(values.float().numpy())
    assert np.array_equal(scales.numpy(), expected_scales) and np.array_equal(codes.numpy(), expected)
    packed = quantise.pack_codes(codes)
    assert packed.shape == (6, BASE_FORMATS["nf4"].row_bytes(width))
    assert torch.equal(quantise.unpack_codes(packed, width), codes)
    values_again = quantise.dequantise_blocks(packed, scales, LEVELS, width, BLOCK)
    assert np.array_equal(values_again.numpy(), oracle.nf4_values(values.float().numpy()))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rows_are_the_oracles(name: str, width: int, dtype: torch.dtype) -> None:
    values = odd_rows(6, width, dtype)
    codes, scales = quantise.quantise_rows(values, quantise.row_scales(quantise.row_maxima(values), name), name)
    levels, expected_scales = oracle.row_values(values.float().numpy(), name)
    assert np.array_equal(scales.numpy(), expected_scales) and np.array_equal(codes.float().numpy(), levels)
    again = quantise.dequantise_rows(codes, scales)
    assert np.array_equal(again.numpy(), levels * expected_scales[:, None])
    if name == "fp8":  # the largest weight of a row is on the largest level, and none is beyond
        assert codes.float().abs().amax(1)[[0, 3, 5]].tolist() == [448] * 3


def test_codes_of_fp32_and_bf16_differ() -> None:
    """So a base is quantised from its values as they are stored."""
    values = torch.randn(64, 640, generator=torch.Generator().manual_seed(0))
    both = [quantise.quantise_blocks(values.to(dtype), BLOCK, "nf4")[0] for dtype in (torch.float32, torch.bfloat16)]
    assert 0.002 < (both[0] != both[1]).float().mean() < 0.02


def test_bytes_of_the_table() -> None:
    nf4, int8 = BASE_FORMATS["nf4"], BASE_FORMATS["int8"]
    assert bytes_of(nf4, 10, 4096) * 8 == 10 * 4096 * 4.5 and bytes_of(int8, 10, 4096) == 10 * (4096 + 4)
    assert bytes_of(nf4, 1, 1376, shards_rows=True) * 8 == 1376 * 5, "scales in parts of 32"
    assert bytes_of(nf4, 1, 1376) == 688 + 22 * 4 and bytes_of(nf4, 1, 7) == 4 + 4, "a short last block"
    assert nf4.stored_block(1376, shards_rows=True) == 32 and nf4.stored_block(1376) == 64
    assert set(BASE_FORMATS) == {"int8", "fp8", "nf4"} and all(key == row.name for key, row in BASE_FORMATS.items())


class TestBitsandbytes:
    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def functional() -> Any:
        reason = "bitsandbytes is not installed: pip install 'megatron_tiedlora[quantised]'"
        return pytest.importorskip("bitsandbytes.functional", reason=reason, exc_type=ImportError)

    @pytest.mark.parametrize("width", [64, 128, 1408])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_has_the_same_codes_where_the_width_divides(self, functional: Any, width: int, dtype: torch.dtype) -> None:
        values = odd_rows(6, width, dtype)
        packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        codes, scales = quantise.quantise_blocks(values, BLOCK, "nf4")
        assert torch.equal(quantise.pack_codes(codes).flatten(), packed.flatten())
        assert torch.equal(scales.flatten(), quantise.without_tiny(state.absmax))
        state.absmax = scales.flatten()
        for kind in (torch.float32, torch.bfloat16):
            state.dtype = kind
            ours = quantise.dequantise_blocks(quantise.pack_codes(codes), scales, LEVELS, width, BLOCK)
            assert torch.equal(functional.dequantize_4bit(packed, state), ours.to(kind))

    def test_has_the_codes_of_padded_rows_elsewhere(self, functional: Any) -> None:
        values = odd_rows(6, 100)
        padded = torch.nn.functional.pad(values, (0, 28))
        packed, state = functional.quantize_4bit(padded, blocksize=BLOCK, quant_type="nf4")
        codes, scales = quantise.quantise_blocks(values, BLOCK, "nf4")
        assert torch.equal(quantise.pack_codes(codes), packed.view(6, 64)[:, :50])
        assert torch.equal(scales.flatten(), quantise.without_tiny(state.absmax))


# Weights --------------------------------------------------------------------------------------------------------------


def made(name: str, values: torch.Tensor, dtype: torch.dtype = torch.float64) -> QuantisedWeight:
    weight = weight_maker(name)(*values.shape, dtype=dtype)
    assert isinstance(weight, QuantisedWeight)
    weight.load(values)
    return weight


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_loaded_in_blocks_of_rows(name: str) -> None:
    values = drawn(7, 100, dtype=torch.bfloat16)
    whole, parts = made(name, values), weight_maker(name)(7, 100, dtype=torch.float64)
    start = 0
    for block in values.split((1, 4, 2)):
        parts.load(block, start=start)
        start += len(block)
    assert all(torch.equal(parts.parameters[key], value) for key, value in whole.parameters.items())


def shard(name: str, values: torch.Tensor, rank: int, size: int, dim: int) -> QuantisedWeight:
    """The shard of a rank, loaded as from a checkpoint."""
    local = list(values.shape)
    local[dim] //= size
    weight = weight_maker(name)(*local, dtype=torch.float64, shards_rows=dim == 1)
    assert isinstance(weight, QuantisedWeight)
    part = slice(rank * local[dim], (rank + 1) * local[dim])
    if dim == 0:
        weight.load(values[part])
        return weight
    maxima = values.float().abs().amax(1)
    columns = Columns(part.start, part.stop, values.shape[1], lambda own: torch.maximum(own, maxima))
    weight.load(values[:, weight.columns_to_read(columns)], dim=1, columns=columns)
    return weight


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("width", [256, 1376, 96, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_shards_joined_are_the_whole(name: str, width: int, size: int, dim: int) -> None:
    """1376 / 8 = 172 columns begin within a block and have scales in blocks of 4; 40 / 8 = 5, an odd number, in 1."""
    values = drawn(16, width, dtype=torch.bfloat16)
    shards = [shard(name, values, rank, size, dim) for rank in range(size)]
    joined = torch.cat([dequantised(part) for part in shards], dim)
    assert torch.equal(joined, dequantised(made(name, values)))
    assert torch.equal(joined, expected_values(name, values).float())
    for part in shards:
        stored = sum(parameter.nbytes for parameter in part.parameters.values())
        assert stored == bytes_of(part.storage, *part.local_shape, shards_rows=dim == 1)


def test_numbers_that_are_not_finite_are_rejected_by_name(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", tokenizer=False)
    source = find_model(str(folder))
    name = "model.layers.1.mlp.down_proj.weight"
    with BaseWeights(folder, source.shape) as weights:
        tensors = {tensor: weights.read(tensor).clone() for tensor in weight_map(folder)}
    for value in (float("nan"), float("inf")):
        tensors[name][3, 5] = value
        save_file(tensors, folder / "model.safetensors")
        for kind in FORMATS:
            model = Stage(layer_specs(source.shape, dtype=torch.float32, make_weight=weight_maker(kind)), None)
            with (
                BaseWeights(folder, source.shape) as weights,
                pytest.raises(UserError, match=rf"model.safetensors: {name} has numbers that are not finite"),
            ):
                load_base_weights(weights, frozen_weights(model))


@pytest.fixture(params=["bitsandbytes", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With bitsandbytes' kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(quantise, "PACKAGE", "a_package_that_is_not_there")
    elif quantise.find_spec(quantise.PACKAGE) is None:
        pytest.skip("bitsandbytes is not installed: pip install 'megatron_tiedlora[quantised]'")
    quantise._checked_kernel.cache_clear()
    yield request.param
    quantise._checked_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_kernels_give_the_same_bits(kernels: str, dtype: torch.dtype) -> None:
    identity = torch.eye(1408, dtype=dtype)
    for rows, width, size in ((64, 128, 1), (64, 1376, 8), (48, 96, 1), (48, 100, 1), (48, 96, 2), (16, 1408, 2)):
        values = drawn(rows, width, dtype=torch.bfloat16)
        weight = shard("nf4", values, size - 1, size, 1) if size > 1 else made("nf4", values)
        weight.dtype = dtype
        local = weight.local_shape[1]
        empty = torch.empty(rows, local, dtype=dtype)
        expects = kernels == "bitsandbytes" and local % weight.block == 0
        assert (quantise.nf4_kernel(empty, weight.block) is not None) == expects, (width, size)
        found = weight.times_transposed(identity[:local, :local].contiguous()).t()
        own = expected_values("nf4", values)[:, (size - 1) * local :]
        assert torch.equal(found, own.to(dtype)), (width, size)


@pytest.mark.parametrize("compile", ["false", "auto", "true"])
@pytest.mark.parametrize("base", ["nf4", "int8", None])
def test_a_run_says_that_nf4_is_slow_without_a_kernel(
    kernels: str, base: str | None, compile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(throughput, "compiled_kernels", lambda *_, **__: EAGER)
    values = {"model": "llama2-7b", "train_file": "x", "base": base, "compile": compile, "plan_for": "cpu"}
    plan = plan_run(make_settings({**values, "dry_run": True}), rank=0, world_size=1, weights=False)
    said = throughput.choose_kernels(plan, torch.device("cpu")).description
    first, _, slow = said.partition("; ")
    assert first.startswith(("not compiled", "compiled in "))
    if kernels == "bitsandbytes" or base != "nf4":
        assert not slow
    else:
        assert slow.startswith("nf4 is dequantised by plain PyTorch, ten times as slowly: a_package_that_is_not_there ")
        assert "is not installed; install it with: pip install " in slow and "[quantised]" in slow


def test_a_kernel_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(codes: torch.Tensor, scales: torch.Tensor, block: int, out: torch.Tensor) -> None:
        out.copy_(quantise.dequantise_blocks(codes, scales, LEVELS, out.shape[1], block))
        out[-1, -1] += 1e-3

    quantise._checked_kernel.cache_clear()
    monkeypatch.setattr(quantise, "_cpu_kernel", lambda dtype: wrong)
    assert quantise.nf4_kernel(torch.empty(4, 64), 64) is None
    monkeypatch.setattr(quantise, "PACKAGE", "torch")  # one that is installed
    said = quantise.slow_nf4(torch.device("cpu"), torch.float32)
    assert said.endswith("ten times as slowly: the kernel of torch cannot be used here for float32")
    quantise._checked_kernel.cache_clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and by format a copy of it with the values that the format makes of it."""
    root = tmp_path_factory.mktemp("models")
    folder = write_tiny_model(root / "model", tokenizer=False, num_layers=3, attention_bias=True, **CROSSING)
    return {"": folder, **{name: with_values(folder, root / name, name) for name in FORMATS}}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_trains_as_on_its_dequantised_weights(
    name: str, recompute: str, folders: dict[str, Path], kernels: str
) -> None:
    folder, plain = folders[""], folders[name]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found, expected = (
            step_numbers(adapted_stage(at, dtype=dtype, recompute=recompute, make_weight=weight_maker(base)))
            for at, base in ((folder, name), (plain, None))
        )
        assert found.keys() == expected.keys() and len(found) == 5
        assert all(torch.equal(found[key], number) for key, number in expected.items())


class _Alive(TorchDispatchMode):
    """Counts the 16-bit tensors of a weight's size, but parameters, that exist at the same time."""

    def __init__(self, model: Stage, least: int) -> None:
        super().__init__()
        self._stored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._least = least
        self._alive = WeakTensorKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16 and tensor.numel() >= self._least:
                self._alive[tensor] = tensor.untyped_storage().data_ptr()
        self.most = max(self.most, len(set(self._alive.values()) - self._stored))
        return result


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", FORMATS)
def test_at_most_one_dequantised_weight_exists(
    name: str, recompute: str, folders: dict[str, Path], kernels: str
) -> None:
    """A 16-bit tensor of a weight's size is one, as no activation of eight tokens is as large."""
    make = weight_maker(name)
    model = adapted_stage(folders[""], dtype=torch.bfloat16, recompute=recompute, make_weight=make)
    ids = torch.randint(3, 320, (1, 8), generator=torch.Generator().manual_seed(3))
    weights = [weight for weight in frozen_weights(model).values() if isinstance(weight, QuantisedWeight)]
    (workspace,) = {weight.workspace for weight in weights}
    gc.collect()
    with _Alive(model, least=80 * 96) as alive:
        memory = set()
        for _ in range(2):
            model(ids, torch.arange(8)[None], ids.roll(-1, 1)).backward()
            memory.add(workspace.take(1, dtype=torch.bfloat16, device=torch.device("cpu")).data_ptr())
    assert alive.most == len(memory) == 1 and len(weights) == 4 * 3


# Plain weights, and another storage format in their place -------------------------------------------------------------


class HalvedWeight(FrozenWeight):
    """W = half + half: another storage format, with the same values to the last bit and other parameters."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__(first)
        self.second = second

    @classmethod
    def empty(  # type: ignore[override]
        cls, *local_shape: int, dtype: torch.dtype, shards_rows: bool = False, after_norm: bool = False
    ) -> HalvedWeight:
        return cls(*(frozen_parameter(*local_shape, dtype=dtype) for _ in range(2)))

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        assert isinstance(self.tensor, nn.Parameter) and isinstance(self.second, nn.Parameter)
        return {"first_half": self.tensor, "second_half": self.second}

    def times_transposed(self, x: torch.Tensor, bias: Any = None, *, out: Any = None) -> torch.Tensor:
        return FrozenWeight(self.tensor + self.second).times_transposed(x, bias, out=out)

    def times(self, grad_y: torch.Tensor, *, out: Any = None) -> torch.Tensor:
        return FrozenWeight(self.tensor + self.second).times(grad_y, out=out)

    def load(self, values: torch.Tensor, *, dim: int = 0, start: int = 0, columns: Columns | None = None) -> None:
        for half in (self.tensor, self.second):
            FrozenWeight(half).load(values / 2, dim=dim, start=start)


def test_plain_values_are_loaded_in_blocks_of_rows_or_columns() -> None:
    values = drawn(6, 4)
    for dim, sizes in ((0, (1, 3, 2)), (1, (3, 1))):
        weight, start = FrozenWeight.empty(6, 4, dtype=torch.float32), 0
        for block in values.split(sizes, dim=dim):
            weight.load(block, dim=dim, start=start)
            start += block.shape[dim]
        assert torch.equal(weight.tensor, values.float()), "cast to the weight's dtype"


@pytest.mark.parametrize("tied", [False, True])
def test_another_storage_format_trains_as_the_plain_one(tmp_path: Path, tied: bool) -> None:
    """Only `layer_specs` is told of it; loss and gradients are equal to the last bit."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=3, attention_bias=True, tied=tied)
    models = [
        adapted_stage(folder, layers=(1, 3), dtype=torch.float64, scale=1.0, make_weight=kind.empty)
        for kind in (FrozenWeight, HalvedWeight)
    ]
    names = {name for name, _ in models[1].named_parameters() if name.endswith("_half")}
    assert len(names) == 2 * 4 * 3, "four linears in each of three blocks; embedding and head are plain"
    plain, halved = map(step_numbers, models)
    assert plain.keys() == halved.keys() and len(plain) == 5
    assert all(torch.equal(halved[name], number) and number.any() for name, number in plain.items())


def test_every_rule_of_the_name_table_has_its_weight(tmp_path: Path) -> None:
    source = find_model(str(write_tiny_model(tmp_path / "model", tokenizer=False, attention_bias=True)))
    model = Stage(layer_specs(source.shape, dtype=torch.float32, make_weight=HalvedWeight.empty), None)
    assert frozen_weights(model).keys() == {rule.name for rule in weight_rules(source.shape)}
