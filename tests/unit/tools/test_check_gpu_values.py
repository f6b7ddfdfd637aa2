"""The checks of numbers in `tiedlora check-gpu`: they pass on a CPU, and each sees what is wrong."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_tiedlora.parallel.fp8_products import Fp8ProductWeight
from megatron_tiedlora.selfcheck import reference, test_attention, test_correct, test_env, test_host, test_memory
from megatron_tiedlora.selfcheck import running as judging
from megatron_tiedlora.selfcheck.parts import WARNING
from megatron_tiedlora.selfcheck.running import Computed, Judge, small_shape

CPU = torch.device("cpu")


def verdict(check: Callable[..., None], *arguments: Any, **keywords: Any) -> str:
    """How a check ends: passed, warned or failed."""
    told: dict[str, object] = {}
    try:
        check(*arguments, tell=told.__setitem__, **keywords)
    except AssertionError:
        return "failed"
    return "warned" if WARNING in told else "passed"


@pytest.mark.parametrize(("share", "expected"), [(0.5, "warned"), (0.7, "passed"), (1.05, "passed"), (60.0, "failed")])
def test_a_device_that_is_too_fast_has_computed_nothing(share: float, expected: str) -> None:
    assert verdict(test_env.judge_rate, rate=share * 989e12, listed=989e12) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(0.9, "warned"), (1.05, "passed"), (1.1, "warned"), (1.2, "failed")])
def test_a_plan_that_is_too_low_is_a_failure(ratio: float, expected: str) -> None:
    assert verdict(test_memory.judge_plan, layers=1, sizes={"planned": 100.0, "allocated": 100 * ratio}) == expected


# Attention ------------------------------------------------------------------------------------------------------------


def compared(route: Any, *, name: str = test_attention.CHOSEN, lengths: Sequence[int] = (1, 30, 64, 7)) -> str:
    case = test_attention.CASES[1]
    options = {"lengths": lengths, "device": CPU, "dtype": torch.float32}
    return verdict(test_attention.compare, name=name, route=route, case=case, **options)


def test_every_route_here_is_right_packed_or_not() -> None:
    for route in test_attention.attention_routes(CPU, torch.float32, 128).values():
        assert compared(route) == compared(route, lengths=(130,)) == "passed"


def test_a_mask_that_is_off_is_seen() -> None:
    def one_document(query: Any, key: Any, value: Any, ids: Any) -> torch.Tensor:
        return reference.plain_attention(query, key, value, torch.zeros(2, query.shape[2]))

    def shifted(query: Any, key: Any, value: Any, ids: Any) -> torch.Tensor:
        return reference.plain_attention(query, key, value, ids.roll(1, dims=1))

    def wrong_scale(query: Any, key: Any, value: Any, ids: Any) -> torch.Tensor:
        return reference.plain_attention(query * 1.01, key, value, ids)

    for route in (one_document, shifted, wrong_scale):
        assert compared(route) == "failed", route.__name__
        assert compared(route, name="another") == "warned"
    assert verdict(test_attention.test_control, CPU) == "passed"


def test_where_nothing_is_computed_nothing_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.zeros(3)
    assert not test_attention.relative(zero, zero) <= 1.0
    assert test_attention.worst_of({"a": 1.0, "b": float("nan"), "c": 5.0}) == "b"
    monkeypatch.setattr(test_attention, "relative", lambda *_: float("nan"))
    assert compared(reference.plain_attention) == verdict(test_attention.test_control, CPU) == "failed"


def test_a_kernel_that_is_not_taken_may_fail() -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("it is not installed")

    assert compared(fails, name="another") == "passed"
    with pytest.raises(RuntimeError, match="not installed"):
        compared(fails)


def test_kernels_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = test_attention.attention_obstacles(torch.device("cuda"), torch.float32, 128)
    assert found["PyTorch's flash kernel"] == "has no float32"
    assert "PyTorch's memory-efficient kernel" not in found


# The model ------------------------------------------------------------------------------------------------------------


def test_the_reference_adds_nothing_to_a_linear_that_has_no_factors() -> None:
    torch.manual_seed(0)
    weight, a, b, hidden = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2), torch.randn(4, 3)
    linear = functools.partial(reference._linear, 0.5, {"x.weight": weight}, {"o_proj.A": a, "o_proj.B": b}, "x")
    assert torch.equal(linear("gate_up.", hidden), hidden @ weight.t())
    assert torch.allclose(linear("o_proj.", hidden), hidden @ (weight + 0.5 * b @ a).t())


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Of a small model in fp64."""
    return Judge(small_shape(vocab_size=321), "tl6", dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_the_package_is_what_plain_pytorch_says(judge: Judge, packed: bool, how: str) -> None:
    assert max(judge.errors(judge.package(packed=packed, how=how)).values()) < 1e-5  # angles are fp32 in both


def test_what_is_left_out_is_seen(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(test_correct.compare_fp32, judge) == "passed"
    real = judging.rows_of
    changes: dict[str, Any] = {
        "a document's bound": lambda rows: (*rows[:3], torch.zeros_like(rows[3])),
        "positions": lambda rows: (rows[0], 2 * rows[1], *rows[2:]),
        "a label": lambda rows: (*rows[:2], rows[2].masked_fill(torch.arange(200) == 60, -100), rows[3]),
    }
    for what, change in changes.items():
        monkeypatch.setattr(judging, "rows_of", lambda *a, change=change, **k: change(real(*a, **k)))
        assert verdict(test_correct.compare_fp32, judge) == "failed", what
    answer = judge.expected
    monkeypatch.setattr(judge, "plain_errors", dict.fromkeys(judge.errors(answer), 0.05))
    wrong = Computed(answer.loss, {**answer.gradients, "v": 1.3 * answer.gradients["v"]})
    assert verdict(test_correct.compare_bf16, judge, answer) == "passed"
    assert verdict(test_correct.compare_bf16, judge, wrong) == "failed"
    assert judge.errors(Computed(answer.loss, {}))["dA"] == float("inf")


def test_a_wrong_plain_pytorch_is_no_measure(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 itself is wrong the package is as wrong, and within twice of it."""
    monkeypatch.setattr(judge, "plain_errors", dict.fromkeys(judge.errors(judge.expected), 1.0))
    assert verdict(test_correct.test_bf16_of_plain_pytorch, judge) == "failed"
    assert verdict(test_correct.test_bf16, "eager", True, "none", judge) == "passed"


@pytest.mark.parametrize("name", test_correct.BASE_FORMATS)
def test_a_number_that_differs_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in test_correct.WIDTHS:
        assert verdict(test_correct.test_bits, name, width, CPU) == "passed"
    original, made = test_correct.loaded, []

    def loaded(*arguments: Any) -> Any:
        made.append(original(*arguments))
        if len(made) % 2 == 0:
            next(iter(made[-1].parameters.values())).data[7, 3] ^= 8
        return made[-1]

    monkeypatch.setattr(test_correct, "loaded", loaded)
    for width in test_correct.WIDTHS:
        assert verdict(test_correct.test_bits, name, width, CPU) == "failed"


@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize("way", ["times", "times_transposed"])
def test_a_product_without_a_scale_is_seen(way: str, keep_transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(test_correct.test_products_in_fp8, keep_transposed, CPU) == "passed"
    original = getattr(Fp8ProductWeight, way)

    def without(self: Fp8ProductWeight, rows: torch.Tensor) -> Any:
        return original(self, rows if self.dtype != torch.bfloat16 else rows * 1.02)

    monkeypatch.setattr(Fp8ProductWeight, way, without)
    assert verdict(test_correct.test_products_in_fp8, keep_transposed, CPU) == "failed"


def test_waits_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_sync_debug_mode", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    with test_host.waits() as seen:
        torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype", stacklevel=1)
    assert sum(seen.values()) == 2 and all("test_check_gpu_values.py:" in place for place in seen)
