"""Compiled kernels: the numbers of those that are not, one graph for all sizes, what happens without a compiler, and
how they run on GPUs: uncompiled by rows, compiled with widths that are constants."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run_preludes
from support.kernel_runs import HOST, assert_same_numbers, loss_and_gradients, model_config
from support.run_files import losses
from support.run_helpers import Base, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.model.attention import KeyValueCache
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel import kernels as module
from megatron_tiedlora.parallel import rows as by_rows
from megatron_tiedlora.parallel.frozen_weight import wide_matmul
from megatron_tiedlora.parallel.groups import RankGroup, TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.rows import as_wide_rows, run_in_parts
from megatron_tiedlora.training import throughput
from megatron_tiedlora.training.throughput import compiled_kernels

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@functools.cache
def compiled(dtype: torch.dtype = torch.float32) -> Kernels:
    return compiled_kernels(model_config(), dtype=dtype, device=HOST)


@functools.cache
def static() -> Kernels:
    """Compiled as for a GPU, on this CPU; but for its own attention, which has another form in every block."""
    plain = Kernels()
    kernels = plain.compiled(static_widths=True)
    kernels = replace(kernels, exp_scores_=plain.exp_scores_, score_gradient_=plain.score_gradient_)
    throughput.warm_up_widths(kernels, model_config(), TensorParallel(), dtype=torch.float32, device=HOST)
    return kernels


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_once_in_bf16_too(packed: bool) -> None:
    """Against fp64: the loss within one rounding, 2^-8, and gradients, which go through some twenty, within five.

    Uncompiled ones are up to 3 roundings off, here and with other seeds.
    """
    sizes = {"rows": 3, "length": 136, "packed": packed}
    wanted, truth = loss_and_gradients(EAGER, **sizes, dtype=torch.float64)
    kernels = compiled(torch.bfloat16)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, found = loss_and_gradients(kernels, **sizes, dtype=torch.bfloat16)
    assert float(loss) == pytest.approx(float(wanted), rel=2**-8)
    for name, true in truth.items():
        assert (found[name].double() - true).norm() < 5 * 2**-8 * true.norm(), name


@needs_compiler
def test_each_compiled_kernel_rounds_no_worse() -> None:
    """Against fp64, by norm: what a compiler leaves wide in between, unlike the code, is nearer to exact."""
    draw = torch.Generator().manual_seed(2)
    rows, more = (torch.randn(200, 96, generator=draw).bfloat16() for _ in range(2))
    weight, root = torch.rand(96, generator=draw).bfloat16(), torch.rand(200, 1, generator=draw) + 0.5
    heads = torch.randn(200, 4, 24, generator=draw).bfloat16()
    cos, sin = (torch.randn(200, 1, 12, generator=draw).bfloat16() for _ in range(2))
    calls: dict[str, Any] = {
        "normalise": lambda kernels, wide: kernels.normalise(wide(rows), wide(weight), None, 1e-5)[0],
        "apply_norm": lambda kernels, wide: kernels.apply_norm(wide(rows), wide(weight), None, root),
        "norm_gradient": lambda kernels, wide: kernels.norm_gradient(
            *(wide(more), wide(rows), wide(weight), None, root, wide(rows))
        ),
        "gate": lambda kernels, wide: kernels.gate(wide(rows), "silu"),
        "gate_gradient": lambda kernels, wide: kernels.gate_gradient(
            wide(more)[:, :48].contiguous(), wide(rows), "silu"
        ),
        "rotate": lambda kernels, wide: kernels.rotate(wide(heads), wide(cos), wide(sin), 3, False),
        "rotate_gradient": lambda kernels, wide: kernels.rotate_gradient(
            wide(heads), wide(heads[:, :2].contiguous()), wide(heads[:, 2:].contiguous()), wide(cos), wide(sin), False
        ),
    }
    for name, call in calls.items():
        truth = call(EAGER, torch.Tensor.double)
        mine, plain = (float((call(side, lambda t: t) - truth).norm()) for side in (compiled(torch.bfloat16), EAGER))
        assert 0 < mine <= 1.001 * plain, name


@needs_compiler
def test_a_rank_with_few_tokens_of_the_vocabulary_compiles_for_those() -> None:
    """5000 ids over 2 ranks: a compiler goes over rows of up to 4096 numbers in another way than over longer ones."""
    halves = TensorParallel(RankGroup(None, 0, 2))
    kernels = compiled_kernels(model_config(), dtype=torch.float32, device=HOST, tensor_parallel=halves)
    logits, total = torch.randn(8, 2500), torch.zeros(8)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        kernels.row_log_sums(logits, None)
        kernels.exp_logits_(logits, total, None)


@needs_compiler
def test_compiled_kernels_of_logits_allocate_no_rows() -> None:
    """Capped logits are read twice: for their maximum, which is that of the logits, and for their sum."""
    logits, kernels = 20 * torch.randn(16, 5000).bfloat16(), Kernels().compiled()
    for cap in (None, 30.0):
        expected = torch.logsumexp(module.soft_capped(logits.double(), cap), dim=-1)
        torch.testing.assert_close(kernels.row_log_sums(logits, cap).double(), expected, rtol=1e-6, atol=0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            kernels.exp_logits_(logits.clone(), kernels.row_log_sums(logits, cap), cap)
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert max(event.nbytes() for event in events) == 2 * logits.numel(), "the clone"


@needs_compiler
@pytest.mark.parametrize(
    ("make", "packed", "rows", "length", "recompute"),
    [
        *((compiled, packed, *sizes, "none") for packed in (False, True) for sizes in ((1, 64), (5, 203), (3, 16))),
        *((compiled, packed, 2, 136, how) for packed in (False, True) for how in ("none", "full", "selective")),
        *((static, False, 1, 8, "full"), (static, True, 4, 203, "selective")),
    ],
)
def test_compiled_once_for_all_sizes_with_the_same_numbers(
    make: Callable[[], Kernels], packed: bool, rows: int, length: int, recompute: str
) -> None:
    """After the warm-up nothing is compiled any more, whatever the shape of a micro-batch; one row packs no others.

    A second forward pass inside the backward one meets no form that the warm-up has not. The same with widths that are
    constants.
    """
    sizes: dict[str, Any] = {"rows": rows, "length": length, "packed": packed}
    kernels, (wanted, expected) = make(), loss_and_gradients(EAGER, **sizes)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, found = loss_and_gradients(kernels, **sizes, recompute=recompute)
    assert_same_numbers(loss, found, wanted, expected)


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_torch_told_not_to_compile_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Either makes torch.compile hand back what it gets, which must not be called compiled."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"^{name} is 1$"):
        compiled_kernels(model_config(), dtype=torch.float32, device=HOST)


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Kernels, **_: Any) -> Kernels:
        def broken(*_: Any) -> Any:
            raise RuntimeError("no compiler\nwith a long story")

        return Kernels(normalise=broken)

    monkeypatch.setattr(Kernels, "compiled", refuse)
    with pytest.raises(UserError, match=r"^RuntimeError: no compiler$"):
        compiled_kernels(model_config(), dtype=torch.float32, device=HOST)


@needs_compiler
@pytest.mark.cpu_seconds(20, reason="both ranks compile, as ranks do nowhere else")
@pytest.mark.distributed
def test_a_compiled_run_is_the_run(base: Base, tmp_path: Path) -> None:
    """Two data-parallel ranks, packed rows: the losses of the run that is not compiled; both say which they are.

    The one that is not compiled has not imported what compiles, which takes a second.
    """
    changes = {"ranks": 2, "max_steps": 2, "packing": True}
    said = []
    for name, wish, prelude in (("plain", "auto", run_preludes.without_compiler), ("compiled", "true", None)):
        ended = run(base, tmp_path / name, **changes, compile=wish, prelude=prelude)
        said.append("".join(ended.outputs))
    assert "kernels     not compiled, as the run is short" in said[0]
    assert "kernels     compiled in" in said[1]
    assert all("attention   tiles of queries (a CPU)" in text for text in said)
    for split in ("train", "validation"):
        pairs = zip(losses(tmp_path / "compiled", split), losses(tmp_path / "plain", split), strict=True)
        for (step, loss), (same, wanted) in pairs:
            assert step == same and loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.distributed
def test_a_rank_that_cannot_compile_ends_the_run_that_must(base: Base, tmp_path: Path) -> None:
    """With one line, the same on every rank, though only rank 1 has no compiler; nothing is written."""
    cannot = functools.partial(run_preludes.no_compiler, rank=1)
    ended = run(base, tmp_path / "run", expect=2, ranks=2, prelude=cannot, compile="true")
    assert "RuntimeError: no compiler. Fix the cause (often no C++ compiler), or give" in ended.error_line()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.distributed
def test_a_rank_that_cannot_compile_makes_all_go_on_without(base: Base, tmp_path: Path) -> None:
    """`auto` where it would pay: copies of one tensor are computed alike on all ranks, or they would drift apart."""
    cannot = functools.partial(run_preludes.no_compiler, rank=1, pays=True)
    ended = run(base, tmp_path / "run", ranks=2, prelude=cannot, max_steps=2)
    assert "kernels     not compiled: RuntimeError: no compiler" in "".join(ended.outputs)
    assert len(losses(tmp_path / "run")) == 2


# On GPUs, as far as a CPU can show it ---------------------------------------------------------------------------------


ROWS = 50


def arguments_of_kernels(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    draw = torch.Generator().manual_seed(3)

    def drawn(*shape: int, wide: bool = False) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(torch.promote_types(dtype, torch.float32) if wide else dtype)

    rows, weight, root = drawn(ROWS, 24), drawn(24), drawn(ROWS, 1, wide=True)
    heads, table = drawn(ROWS, 4, 6), (drawn(ROWS, 1, 3), drawn(ROWS, 1, 3))
    return {
        "normalise": (rows, weight, None, 1e-5),
        "apply_norm": (rows, weight, None, root),
        "norm_gradient": (drawn(ROWS, 24), rows, weight, None, root, None),
        "norm_gradient with an addend": (drawn(ROWS, 24), rows, weight, None, root, drawn(ROWS, 24)),
        "add_and_normalise": (rows, drawn(ROWS, 24), weight, None, 1e-5, None),
        "add_and_normalise beside": (rows, drawn(ROWS, 24), weight, None, 1e-5, drawn(ROWS, 24)),
        "gate": (rows, "silu"),
        "gate_gradient": (drawn(ROWS, 12), rows, "silu"),
        "gate of gelu": (rows, "gelu"),
        "gate_gradient of gelu": (drawn(ROWS, 12), rows, "gelu"),
        "rotate": (heads, *table, 3, False),
        "rotate interleaved": (heads, *table, 3, True),
        "rotate_gradient": (heads, heads[:, :2], heads[:, 2:3], *table, False),
        "rotate_normed": (heads, *table, drawn(3, 6), 1e-5),
        "rotate_normed_gradient": (
            *(heads[:, :2], heads[:, 2:3], heads[:, 3:]),
            *(heads, drawn(ROWS, 3, 1, wide=True), None, *table, 1 + drawn(3, 6).abs()),
        ),
        "rotate_with_root": (heads, *table, drawn(ROWS, 3, 1, wide=True), drawn(3, 6)),
        "rotate_normed_gradient of all heads": (
            *(heads[:, :2], heads[:, 2:3], heads[:, 3:]),
            *(heads, drawn(ROWS, 3, 1, wide=True), drawn(ROWS, 3, 1, wide=True), *table, 1 + drawn(3, 6).abs()),
        ),
        "square_means": (heads, 2, 1),
        "product_means": (heads[:, :2], heads[:, 2:3], heads),
        "row_log_sums": (rows, None),
        "row_log_sums with a cap": (rows, 2.0),
        "exp_logits_": (rows, drawn(ROWS, wide=True), None),
        "exp_logits_ with a cap": (rows, drawn(ROWS, wide=True), 2.0),
    }


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gates_and_rotations_have_the_gradients_of_autograd(activation: str) -> None:
    draw = torch.Generator().manual_seed(5)
    numbers = (6 * torch.randn(ROWS, 40, generator=draw, dtype=torch.float64)).requires_grad_()
    gated = module.gate(numbers, activation)
    gates, up = numbers.detach().chunk(2, dim=1)
    wanted = torch.nn.functional.gelu(gates, approximate="tanh") if activation == "gelu" else gates * gates.sigmoid()
    torch.testing.assert_close(gated.detach(), wanted * up, rtol=1e-13, atol=1e-13)
    gradient = torch.randn(gated.shape, generator=draw, dtype=torch.float64)
    (expected,) = torch.autograd.grad(gated, numbers, gradient)
    found = module.gate_gradient(gradient, numbers.detach(), activation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    heads = torch.randn(ROWS, 4, 10, generator=draw, dtype=torch.float64)
    angles = torch.rand(ROWS, 1, 3, generator=draw, dtype=torch.float64)
    turned = module.rotate(heads, angles.cos(), angles.sin(), 3, activation == "gelu")
    first = heads[:, :3, :6]
    pairs = first.unflatten(-1, (3, 2)) if activation == "gelu" else first.unflatten(-1, (2, 3)).mT
    by_hand = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.view_as_real(by_hand) if activation == "gelu" else torch.view_as_real(by_hand).mT
    torch.testing.assert_close(turned[:, :3, :6], wanted.flatten(-2), rtol=1e-13, atol=1e-13)
    assert torch.equal(turned[:, :3, 6:], heads[:, :3, 6:]) and torch.equal(turned[:, 3], heads[:, 3])
    back = module.rotate_gradient(*turned.split((2, 1, 1), 1), angles.cos(), angles.sin(), activation == "gelu")
    torch.testing.assert_close(back, heads, rtol=1e-13, atol=1e-13)  # a rotation's gradient turns back


def test_a_wide_weight_of_a_norm_is_multiplied_before_the_rounding() -> None:
    rows, weight = torch.randn(ROWS, 24).bfloat16(), 1 + 0.01 * torch.randn(24)
    normed, root = module.normalise(rows, weight, None, 1e-6)
    assert torch.equal(normed, (rows.float() * root * weight).bfloat16())
    assert not torch.equal(normed, module.normalise(rows, weight.bfloat16(), None, 1e-6)[0])


@pytest.mark.parametrize("rows_at_once", [1, 7, 49, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parts_give_what_the_whole_gives(
    dtype: torch.dtype, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel that a GPU runs, some rows at a time; the last part is shorter. None gets more rows than it may."""
    monkeypatch.setattr(by_rows, "NUMBERS_AT_ONCE", rows_at_once * 24 + 5)
    for name, arguments in arguments_of_kernels(dtype).items():
        kernel, calls = getattr(Kernels(), name.split()[0]), []

        def counted(*parts: Any, kernel: Any = kernel, calls: list[int] = calls) -> Any:
            calls.append(len(parts[0]))
            return kernel(*parts)

        whole, parts = ([a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2))
        wanted, found = kernel(*whole), run_in_parts(counted, tuple(parts), module.has_rows(kernel))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15, msg=name)
        torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-15, msg=name)  # where it works in place
        assert sum(calls) == ROWS and max(calls) == rows_at_once, name


def test_a_gradient_is_scaled_in_parts_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "NUMBERS_AT_ONCE", 7 * 24)
    sizes, upcast = [], by_rows.upcast
    monkeypatch.setattr(by_rows, "upcast", lambda rows: sizes.append(len(rows)) or upcast(rows))
    gradient, factor = torch.randn(1, ROWS, 24).bfloat16(), torch.tensor(1 / 3)
    found = by_rows.scaled(gradient, factor)
    assert sizes == [7] * 7 + [1]
    assert torch.equal(found, (gradient.float() * factor).bfloat16())
    assert not torch.equal(found, gradient * factor.bfloat16())


def test_a_cpu_runs_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_in_parts", lambda *_: pytest.fail("in parts"))
    for name, arguments in arguments_of_kernels(torch.float32).items():
        getattr(EAGER, name.split()[0])(*arguments)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 3])
def test_an_answer_is_generated_without_compiling(batch: int) -> None:
    config = model_config()
    stage = Stage(layer_specs(config, dtype=torch.float32, kernels=static()), None)
    for parameter in stage.parameters():
        torch.nn.init.zeros_(parameter)
    like = torch.empty(0)
    caches = [KeyValueCache.empty(batch, config.heads.num_kv, 9, config.heads.dim, like) for _ in range(2)]
    tokens = positions = torch.arange(6).expand(batch, 6)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        stage.predict(tokens, positions, caches=caches)
        for cache in caches:
            cache.filled = 6
        stage.predict(tokens[:, :1], positions[:, :1] + 6, caches=caches)


@pytest.mark.parametrize(("device", "rank", "waits"), [("cuda", 1, False), ("cpu", 1, True), ("cpu", 0, False)])
def test_gpus_compile_in_one_turn(device: str, rank: int, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cache is by device: a rank that waits for another finds nothing there. On a CPU the first rank fills it."""
    seen: list[str] = []
    plan: Any = SimpleNamespace(
        settings=SimpleNamespace(compile="true", base=None),
        layout=SimpleNamespace(compiled=True, sequence_parallel=False),
        adapter=SimpleNamespace(rank=8),
        grid=SimpleNamespace(rank=rank, tp_size=1),
        source=SimpleNamespace(shape=None),
        dtype=torch.bfloat16,
        weight_maker=lambda *_: None,
    )
    monkeypatch.setattr(throughput, "rank_number", lambda *, local: rank)
    monkeypatch.setattr(throughput, "compiled_kernels", lambda *_, **__: seen.append("compiles") or EAGER)
    monkeypatch.setattr(throughput, "sum_over_ranks", lambda _: seen.append("meets"))
    monkeypatch.setattr(throughput, "first_messages", lambda messages: messages)
    throughput.choose_kernels(plan, torch.device(device))
    assert seen.count("compiles") == 1
    assert (seen.index("meets") < seen.index("compiles")) == waits
    assert seen.count("meets") == (1 if device == "cuda" else 2)


class _Operators(TorchDispatchMode):
    """Which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("of_matrices", "of_product"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_sums_leave_a_matmul_wide_on_gpus(device: str, of_matrices: torch.dtype, of_product: torch.dtype) -> None:
    """torch.mm takes an out_dtype on CUDA alone, and there no other pair than 16 bits and fp32."""
    with FakeTensorMode():  # tensors on a GPU that need none
        left, right = (torch.empty(shape, dtype=of_matrices, device=device) for shape in ((8, 16), (16, 24)))
        with _Operators() as called:
            product = wide_matmul(left, right, of_product)
    can = device == "cuda" and of_matrices.itemsize == 2 and of_product == torch.float32
    assert ("aten.mm.dtype" in called.names) == can
    assert (product.dtype, product.shape) == (of_product, (8, 24))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_wide_matmul_is_rounded_once() -> None:
    """From bf16 to fp32 within fp32's rounding."""
    left, right = (torch.randn(shape, device="cuda").bfloat16() for shape in ((8, 4096), (4096, 512)))
    exact = left.double() @ right.double()
    error = (wide_matmul(left, right, torch.float32).double() - exact).norm() / exact.norm()
    assert error < 1e-5


def test_rows_come_with_what_follows_them_in_memory() -> None:
    """Of the first columns of a tensor, whose distance a compiler then knows; any other tensor stays as it is."""
    joined = torch.arange(24.0).view(4, 6)
    assert torch.equal(as_wide_rows(joined[:, :4]), joined) and torch.equal(as_wide_rows(joined[None, :, :4]), joined)
    assert as_wide_rows(joined[:, :4]).data_ptr() == joined.data_ptr()
    others = joined, joined[:1, :4], joined[:, 2:], joined.t(), torch.zeros(1).expand(4, 6), joined[:, :1].expand(4, 6)
    for tensor in others:  # the last row of the third would end outside of its memory
        assert torch.equal(as_wide_rows(tensor), tensor)
