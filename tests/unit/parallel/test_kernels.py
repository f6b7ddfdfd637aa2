"""Compiled kernels: the numbers of those that are not, one graph for all sizes, and what happens without a compiler."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import run_preludes
import torch
from kernel_runs import HOST, assert_same_numbers, loss_and_gradients, model_config
from run_files import losses
from run_helpers import Base, run, write_base

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.training.compiling import compiled_kernels

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    return compiled_kernels(model_config(), dtype=torch.float32, device=HOST)


@pytest.fixture(scope="module")
def compiled_in_bf16() -> Kernels:
    return compiled_kernels(model_config(), dtype=torch.bfloat16, device=HOST)


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_once_in_bf16_too(compiled_in_bf16: Kernels, packed: bool) -> None:
    """Against fp64: the loss within one rounding, 2^-8, and gradients, which go through some twenty, within five.

    Uncompiled ones are up to 3 roundings off, here and with other seeds.
    """
    sizes = {"rows": 3, "length": 136, "packed": packed}
    wanted, truth = loss_and_gradients(EAGER, **sizes, dtype=torch.float64)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, found = loss_and_gradients(compiled_in_bf16, **sizes, dtype=torch.bfloat16)
    assert float(loss) == pytest.approx(float(wanted), rel=2**-8)
    for name, true in truth.items():
        assert (found[name].double() - true).norm() < 5 * 2**-8 * true.norm(), name


@needs_compiler
def test_each_compiled_kernel_rounds_no_worse(compiled_in_bf16: Kernels) -> None:
    """Against fp64, by norm: what a compiler leaves wide in between, unlike the code, is nearer to exact."""
    draw = torch.Generator().manual_seed(2)
    rows, more = (torch.randn(200, 96, generator=draw).bfloat16() for _ in range(2))
    weight, root = torch.rand(96, generator=draw).bfloat16(), torch.rand(200, 1, generator=draw) + 0.5
    heads = torch.randn(200, 4, 24, generator=draw).bfloat16()
    cos, sin = (torch.randn(200, 1, 12, generator=draw).bfloat16() for _ in range(2))
    calls: dict[str, Any] = {
        "normalise": lambda kernels, wide: kernels.normalise(wide(rows), wide(weight), None, 1e-5)[0],
        "apply_norm": lambda kernels, wide: kernels.apply_norm(wide(rows), wide(weight), None, root),
        "norm_gradient": lambda kernels, wide: kernels.norm_gradient(wide(more), wide(rows), wide(weight), None, root),
        "gate": lambda kernels, wide: kernels.gate(wide(rows)),
        "gate_gradient": lambda kernels, wide: kernels.gate_gradient(wide(more)[:, :48].contiguous(), wide(rows)),
        "rotate": lambda kernels, wide: kernels.rotate(wide(heads), wide(cos), wide(sin), 3),
        "rotate_gradient": lambda kernels, wide: kernels.rotate_gradient(
            wide(heads), wide(heads[:, :2].contiguous()), wide(heads[:, 2:].contiguous()), wide(cos), wide(sin)
        ),
    }
    for name, call in calls.items():
        truth = call(EAGER, torch.Tensor.double)
        mine, plain = (float((call(side, _same) - truth).norm()) for side in (compiled_in_bf16, EAGER))
        assert 0 < mine <= 1.001 * plain, name


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@needs_compiler
def test_a_rank_with_few_tokens_of_the_vocabulary_compiles_for_those() -> None:
    """5000 ids over 2 ranks: a compiler goes over rows of up to 4096 numbers in another way than over longer ones."""
    kernels = compiled_kernels(model_config(), dtype=torch.float32, device=HOST, tp_size=2)
    logits, total = torch.randn(8, 2500), torch.zeros(8)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        kernels.row_log_sums(logits)
        kernels.exp_logits_(logits, total)


@needs_compiler
@pytest.mark.parametrize(("rows", "length"), [(2, 136), (1, 64), (5, 203), (3, 16)])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_once_for_all_sizes_with_the_same_numbers(
    compiled: Kernels, packed: bool, rows: int, length: int
) -> None:
    """After the warm-up nothing is compiled any more, whatever the shape of a micro-batch; one row packs no others."""
    wanted, expected = loss_and_gradients(EAGER, rows=rows, length=length, packed=packed)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, found = loss_and_gradients(compiled, rows=rows, length=length, packed=packed)
    assert_same_numbers(loss, found, wanted, expected)


@needs_compiler
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_computed_again_is_compiled_already(compiled: Kernels, packed: bool, recompute: str) -> None:
    """A second forward pass inside the backward one meets no form that the warm-up has not, and changes no number."""
    sizes = {"rows": 2, "length": 136, "packed": packed}
    wanted, expected = loss_and_gradients(EAGER, **sizes)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, found = loss_and_gradients(compiled, **sizes, recompute=recompute)
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("compiled"))


@needs_compiler
@pytest.mark.cpu_seconds(20, reason="both ranks compile, as ranks do nowhere else")
@pytest.mark.distributed
def test_a_compiled_run_is_the_run(base: Base, tmp_path: Path) -> None:
    """Two data-parallel ranks, packed rows: the losses of the run that is not compiled; both say which they are.

    The one that is not compiled has not imported what compiles, which takes a second.
    """
    changes = {"ranks": 2, "max_steps": 4, "packing": True}
    said = []
    for name, wish, prelude in (("plain", "auto", run_preludes.without_compiler), ("compiled", "true", None)):
        ended = run(base, tmp_path / name, **changes, compile=wish, prelude=prelude)
        said.append("".join(ended.outputs))
    assert "kernels    not compiled, as the run is short" in said[0]
    assert "kernels    compiled in" in said[1]
    assert all("attention  tiles of queries (a CPU)" in text for text in said)
    for split in ("train", "validation"):
        pairs = zip(losses(tmp_path / "compiled", split), losses(tmp_path / "plain", split), strict=True)
        for (step, loss), (same, wanted) in pairs:
            assert step == same and loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.distributed
def test_a_rank_that_cannot_compile_ends_the_run_that_must(base: Base, tmp_path: Path) -> None:
    """With one line, the same on every rank, though only rank 1 has no compiler; nothing is written."""
    cannot = functools.partial(run_preludes.no_compiler, rank=1)
    ended = run(base, tmp_path / "run", expect=2, ranks=2, prelude=cannot, compile="true")
    assert "--compile true: RuntimeError: no compiler. Install a C++ compiler" in ended.error_line()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.distributed
def test_a_rank_that_cannot_compile_makes_all_go_on_without(base: Base, tmp_path: Path) -> None:
    """`auto` where it would pay: copies of one tensor are computed alike on all ranks, or they would drift apart."""
    cannot = functools.partial(run_preludes.no_compiler, rank=1, pays=True)
    ended = run(base, tmp_path / "run", ranks=2, prelude=cannot, max_steps=2)
    assert "kernels    not compiled: RuntimeError: no compiler" in "".join(ended.outputs)
    assert len(losses(tmp_path / "run")) == 2
