"""Products in fp8: the numbers beside an oracle and beside PyTorch's operator, what is kept, and what is rejected."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
from support import adapted_stages
from support import quantised_oracle as oracle
from support.tiny_models import tiny_config

from megatron_tiedlora.adapters.tied_adapter import (
    AdapterShard,
    TiedAdapter,
    initial_values,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import FP8_CAPABILITY, QKV, TARGET_NAMES
from megatron_tiedlora.checkpoint.base_weights import draw_
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel import kernels, quantised_weight
from megatron_tiedlora.parallel.frozen_weight import Columns, RoundedRows, frozen_linear, frozen_weights
from megatron_tiedlora.parallel.quantised_weight import Fp8MatmulWeight, check_fp8_device, weight_maker
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import plan_run

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = adapted_stages.drawn(*shape, seed=seed)
    values[1] = 0
    values[2] *= 1e3
    return values.to(dtype)


def made(values: torch.Tensor, dtype: torch.dtype, *, keep_transposed: bool = False) -> Fp8MatmulWeight:
    make = weight_maker("fp8", products="fp8", keep_transposed=keep_transposed)
    weight = make(*values.shape, dtype=dtype)
    assert isinstance(weight, Fp8MatmulWeight)
    weight.load(values)
    return weight


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """The oracle's fp8 rows, in fp64."""
    levels, scales = oracle.row_values(rows.float().numpy(), "fp8")
    return torch.from_numpy(levels).double() * torch.from_numpy(scales).double()[:, None]


@pytest.mark.parametrize("width", [64, 100, 7])
def test_both_passes_are_the_oracles(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("round_rows", "round_scaled_rows"):  # five rows are three parts
        monkeypatch.setitem(kernels.HOST_NUMBERS_AT_ONCE, name, 2 * width)
    values, x = drawn(12, width, dtype=torch.float32), drawn(5, width, seed=1).requires_grad_()
    weight, bias, grad_y = made(values, torch.float64), drawn(12, seed=3), drawn(5, 12, seed=2)
    levels, scales = (torch.from_numpy(part).double() for part in oracle.row_values(values.numpy(), "fp8"))
    y = frozen_linear(x, weight)
    y.backward(grad_y)
    assert x.grad is not None
    expected = rounded(x.detach()) @ (levels * scales[:, None]).t()
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-9)  # scales are fp32
    torch.testing.assert_close(x.grad, rounded(grad_y * scales) @ levels, rtol=1e-6, atol=1e-9)
    rows = x.detach()
    torch.testing.assert_close(weight.times_transposed(rows, bias), expected + bias, rtol=1e-6, atol=1e-9)
    memory = torch.empty(5, 12, dtype=torch.float64)
    assert weight.times_transposed(rows, out=memory) is memory and torch.equal(memory, y)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_kernels_round_to_the_same_bits(dtype: torch.dtype) -> None:
    """Both matmuls, of rows that stand apart and of one row, with kernels of one graph for all sizes."""
    compiled = kernels.Kernels().compiled()
    joined = drawn(9, 48 + 16, seed=1).to(dtype)
    for values, x in ((drawn(32, 48), joined[:, :48]), (drawn(24, 40), joined[:1, :40]), (drawn(7, 64), joined)):
        made_of = {}
        for name, own in (("plain", kernels.EAGER), ("compiled", compiled)):
            weight = weight_maker("fp8", products="fp8", kernels=own)(*values.shape, dtype=dtype)
            weight.load(values)
            grad_y = drawn(9, len(values), seed=2)[: len(x)].to(dtype)
            made_of[name] = weight.times_transposed(x), weight.times(grad_y)
        assert all(map(torch.equal, made_of["plain"], made_of["compiled"])), values.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_kernel_that_also_rounds_gives_the_bits_of_two(compiled: bool, keeps: bool, dtype: torch.dtype) -> None:
    """After the norm, the gate and the gate's gradient; a compiler would not round to 16 bits in between."""
    own = kernels.Kernels().compiled() if compiled else kernels.EAGER
    for tokens, width in ((40, 96), (33, 600)):
        hidden, gradient, gate_up = (drawn(tokens, n, seed=n).to(dtype) for n in (width, width + 1, 2 * width))
        gradient = gradient[:, :width].contiguous()
        hidden[3, 5] = torch.nan
        weight, factors = drawn(3, width)[0].to(dtype), torch.rand(1, 2 * width) + 0.1
        gated, gate_gradient = own.gate(gate_up, "silu"), own.gate_gradient(gradient, gate_up, "silu")
        calls = [
            (own.gate_rounded(gate_up, keeps, "silu"), (gated, *kernels.round_rows(gated, width))),
            (
                own.gate_gradient_rounded(gradient, gate_up, factors, keeps, "silu"),
                (gate_gradient, *kernels.round_scaled_rows(gate_gradient, factors)),
            ),
        ]
        for bias in (None, weight):
            normed, root = own.normalise(hidden, weight, bias, 1e-5)
            _, mine, *found = own.normalise_rounded(hidden, None, weight, bias, 1e-5, keeps)
            calls.append(((*found, mine), (normed, *kernels.round_rows(normed, width), root)))
        total, normed, root = own.add_and_normalise(hidden, gradient, weight, None, 1e-5, None)
        *sums, kept, codes, scales = own.normalise_rounded(hidden, gradient, weight, None, 1e-5, keeps)
        expected = (normed, *kernels.round_rows(normed, width), total, root)
        calls.append(((kept, codes, scales, *sums), expected))
        for found, wanted in calls:
            assert (found[0] is not None) == keeps
            for mine, theirs in zip(found, wanted, strict=True):
                assert mine is None or torch.equal(as_bits(mine), as_bits(theirs))


def test_rows_that_are_rounded_already_give_the_same_bits() -> None:
    values, x, grad_y = drawn(12, 64, dtype=torch.float32), drawn(5, 64, seed=1), drawn(5, 12, seed=2)
    weight, bias = made(values, torch.float64), drawn(12, seed=3)
    codes = RoundedRows(None, *kernels.round_rows(x, 64))
    assert torch.equal(weight.times_transposed(codes, bias), weight.times_transposed(x, bias))
    codes = RoundedRows(None, *kernels.round_scaled_rows(grad_y, weight.gradient_factors))
    assert torch.equal(weight.times(codes), weight.times(grad_y))
    assert torch.equal(weight.gradient_factors[0], weight.scales[:, 0])
    assert weight_maker("fp8")(4, 4, dtype=torch.float32).gradient_factors is None


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of numbers; each NaN has the same ones."""
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
    return bits.masked_fill(tensor.float().isnan(), 1)


def test_it_is_pytorchs_operator_within_bf16() -> None:
    values = drawn(48, 64, dtype=torch.bfloat16)
    x, grad_y = drawn(16, 64, seed=1).bfloat16(), drawn(16, 48, seed=2).bfloat16()
    weight = made(values, torch.bfloat16)
    y, dx = weight.times_transposed(x), weight.times(grad_y)
    fp8 = torch.float8_e4m3fn

    def theirs(rows: torch.Tensor, right: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        scale = rows.float().abs().amax(1, keepdim=True) / 448
        codes = (rows.float() / scale.where(scale > 0, 1.0)).to(fp8)
        return torch._scaled_mm(codes, right, scale_a=scale, scale_b=scales, out_dtype=torch.bfloat16)

    codes = weight.tensor.detach().view(fp8)
    scales = weight.scales.view(1, -1)
    try:
        expected = theirs(x, codes.t(), scales), theirs(grad_y.float() * scales, codes, torch.ones(1, 64))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch._scaled_mm cannot do this on a CPU: {error}")
    for found, wanted in zip((y, dx), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=float(wanted.float().norm()) * 1e-3)


def test_nothing_is_saved_for_the_backward_pass() -> None:
    weight, x = made(drawn(16, 32, dtype=torch.bfloat16), torch.bfloat16), drawn(8, 32).bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = frozen_linear(x, weight)
    y.sum().backward()
    assert not saved and all(parameter.grad is None for parameter in weight.parameters.values())


def test_a_kept_copy_is_transposed_and_is_counted() -> None:
    values = drawn(24, 40, dtype=torch.bfloat16)
    plain, kept = made(values, torch.float32), made(values, torch.float32, keep_transposed=True)
    assert list(kept.parameters) == ["codes", "scale_bits", "transposed_codes"] and len(plain.parameters) == 2
    assert torch.equal(kept.parameters["transposed_codes"], plain.tensor.t())
    assert torch.equal(kept._transposed_codes(), plain._transposed_codes())
    parts = weight_maker("fp8", products="fp8", keep_transposed=True)(24, 40, dtype=torch.float32)
    for start in (0, 16):
        parts.load(values[start : start + 16], start=start)
    assert torch.equal(parts.parameters["transposed_codes"], plain.tensor.t())
    shards = []
    maxima = values.float().abs().amax(1)
    for rank in range(2):
        make = weight_maker("fp8", products="fp8", keep_transposed=True)
        shard = make(24, 20, dtype=torch.float32, shards_rows=True)
        columns = slice(20 * rank, 20 * rank + 20)
        shard.load(values[:, columns], dim=1, columns=Columns(columns.start, columns.stop, 40, lambda own: maxima))
        shards.append(shard.parameters["transposed_codes"].detach())
    assert torch.equal(torch.cat(shards), kept.parameters["transposed_codes"])


def test_numbers_that_are_not_finite_stay_so() -> None:
    weight, x = made(drawn(16, 32), torch.float32), torch.ones(3, 32)
    for value in (float("nan"), float("inf")):
        x[1, 4] = value
        y = weight.times_transposed(x)
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_a_gpu_without_fp8_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability in ((8, 0), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if capability < FP8_CAPABILITY:
            with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.9 or more, but A100 has 8\.0"):
                check_fp8_device(torch.device("cuda", 0))
        else:
            with monkeypatch.context() as context:
                context.setattr(quantised_weight, "_multiply_by_row", lambda _: None)
                check_fp8_device(torch.device("cuda", 0))

    def fails(_: torch.device) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nin a kernel")

    quantised_weight._multiply_by_row(torch.device("cpu"))
    monkeypatch.setattr(quantised_weight, "_multiply_by_row", fails)
    reason = r"has no FP8 matmul with one scale per row .*\(CUBLAS_STATUS_NOT_SUPPORTED.*Remove --products"
    with pytest.raises(UserError, match=reason):
        check_fp8_device(torch.device("cuda", 0))


def gradients_of(
    dtype: torch.dtype,
    make: Any,
    *,
    targets: tuple[str, ...] = (QKV,),
    layers: tuple[int, ...],
    recompute: str = "none",
) -> dict[str, torch.Tensor]:
    """The loss and all gradients of a model of four layers whose weights `make` creates."""
    shape = shape_from_hf(tiny_config(hidden_size=128, num_layers=4).to_dict())
    config = make_adapter_config("tl6", rank=8, layers=layers, targets=targets_of(shape, targets), seed=0)
    adapter = TiedAdapter(AdapterShard.whole(config), dtype=torch.float32)
    adapter.load_full(
        {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(7)) * 0.1
            for name, value in initial_values(config).items()
        }
    )
    model = Stage(layer_specs(shape, dtype=dtype, make_weight=make), adapter)
    model.set_recompute(recompute or "none")
    for name, weight in frozen_weights(model).items():
        values = torch.empty(weight.local_shape)
        draw_(values, name=name, full_shape=values.shape, seed=sum(map(ord, name)))
        weight.load(values.bfloat16())
    tokens = torch.randint(3, 320, (1, 256), generator=torch.Generator().manual_seed(3))
    loss = model(tokens, torch.arange(256)[None], tokens.roll(-1, 1))
    loss.backward()
    found = {name: value.grad for name, value in adapter.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **found}


def test_gradients_of_a_model_are_near_those_of_wide_products() -> None:
    """A, B, u and v in bf16 against fp32 arithmetic on the same 8-bit weights: within a quarter by norm."""

    def gradients(dtype: torch.dtype, products: str | None) -> dict[str, torch.Tensor]:
        found = gradients_of(dtype, weight_maker("fp8", products=products), layers=(1, 2, 3, 4))
        del found["loss"]
        return found

    wide = gradients(torch.float32, None)
    distances = {}
    for products in (None, "fp8"):
        found = gradients(torch.bfloat16, products)
        assert found.keys() == wide.keys() and len(wide) == 4
        distances[products] = {name: float((found[name] - value).norm() / value.norm()) for name, value in wide.items()}
    assert max(distances[None].values()) < 0.08, distances
    assert all(0.02 < share < 0.25 for share in distances["fp8"].values()), distances
    assert all(share > 1.5 * distances[None][name] for name, share in distances["fp8"].items()), distances


class RoundsItself(Fp8MatmulWeight):
    """A weight that does not tell layers that its rows are rounded, so that a kernel of its own rounds them."""

    hidden = True

    @property
    def gradient_factors(self) -> Any:
        return None if self.hidden else self.scales.view(1, -1)

    def times_transposed(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return self._told(super().times_transposed, *arguments, **keywords)

    def times(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return self._told(super().times, *arguments, **keywords)

    def _told(self, matmul: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        assert not any(isinstance(given, RoundedRows) for given in arguments)
        self.hidden = False
        found: torch.Tensor = matmul(*arguments, **keywords)
        self.hidden = True
        return found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layers", [(1, 2, 3, 4), (2, 3)])
@pytest.mark.parametrize("targets", [(QKV,), TARGET_NAMES])
def test_layers_round_within_their_kernels_to_the_same_bits(
    targets: tuple[str, ...], layers: tuple[int, ...], recompute: str
) -> None:
    """Loss and gradients are those of weights that round all of their inputs themselves."""
    make = weight_maker("fp8", products="fp8")
    found = gradients_of(torch.bfloat16, make, targets=targets, layers=layers, recompute=recompute)
    separate = partial(RoundsItself, **make.keywords)  # type: ignore[attr-defined]
    expected = gradients_of(torch.bfloat16, separate, targets=targets, layers=layers, recompute=recompute)
    assert found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


SETTINGS: dict[str, Any] = {"model": "llama2-7b", "dry_run": True, "plan_for": "gpu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"products": "fp8", "base": "nf4"}, "--products fp8 needs --base fp8, not nf4"),
        ({"products": "fp8"}, "--products fp8 needs --base fp8, but the linears of this base are not quantised"),
        ({"products": "int8", "base": "fp8"}, "--products"),
        ({"keep_transposed": True, "base": "fp8"}, "--keep_transposed needs --products fp8"),
        ({"products": "fp8", "base": "fp8", "dtype": "fp32"}, "--products fp8 needs --dtype bf16 on a GPU"),
        (
            {"products": "fp8", "base": "fp8", "tensor_parallel": 32},
            "multiples of 16, but mlp.down is 4096 x 344 with --tensor_parallel 32. Change --tensor_parallel, or",
        ),
    ],
)
def test_flags_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_run(make_settings({**SETTINGS, **changes}), rank=0, world_size=32, weights=False)
    if "dtype" in changes or "tensor_parallel" in changes:  # a CPU emulates them
        plan_run(make_settings({**SETTINGS, **changes, "plan_for": "cpu"}), rank=0, world_size=32, weights=False)


def test_the_dry_run_shows_both_ways_to_transpose() -> None:
    found = {}
    for keep in (False, True):
        settings = make_settings({**SETTINGS, "base": "fp8", "products": "fp8", "keep_transposed": keep})
        stage = plan_run(settings, rank=0, world_size=1, weights=False).stages[0]
        found[keep] = stage.base_bytes, stage.dequantised_bytes
        report = dry_run_report(settings).text
        assert ("one transposed" in report) == (not keep) and "they are multiplied in fp8" in report
        assert ("with transposed copies" in report) == keep
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert found[True][0] - found[False][0] == weights
    assert (found[False][1], found[True][1]) == (2 * 4096 * 11008, 0)
