"""Checks results: compares the losses and gradients of all training modes with plain PyTorch in fp64.

It also compares quantised weights and FP8 matmuls with results of a CPU, and the engine's steps with torch's AdamW."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import BASE_FORMATS, FP8_CAPABILITY, ModelShape
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.quantised_weight import weight_maker
from megatron_tiedlora.selfcheck import parts, reference, running
from megatron_tiedlora.selfcheck.step_bench import Started
from megatron_tiedlora.training.throughput import compiled_kernels

pytestmark = pytest.mark.gpu

# Relative errors of fp32 compared with fp64. With TF32, or with a missing term, they are much larger.
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
# In bf16, the package and plain PyTorch round similarly, but in a different order. The package's error may be MULTIPLE
# times plain PyTorch's measured error plus BEYOND.
MULTIPLE, BEYOND = 2.0, 2e-3
PLAIN_BOUND = 0.1  # if plain PyTorch's error is larger, a comparison with it means nothing; on a CPU it is 0.025
PLAIN_FIX = (
    "plain PyTorch computes wrong bf16 results here: check part attention and `matmul ceiling` of part env; do"
    " not train with this torch or driver"
)
WRONG_FIX = (
    "the model computes wrong results here: check part attention first, then give --compile false; if that fails, do"
    " not train with this torch or driver"
)

ROWS, WIDTHS = 192, (1024, 1040)  # the second is not a multiple of nf4's block; bitsandbytes cannot dequantise it
TOKENS = 64
PRODUCT_BOUND = 0.01  # bf16 rounds by up to 0.004; without a scale the error is over 0.1
BITS_FIX = "a base model in this format has different values here than on a CPU: report the versions of part env"
PRODUCT_FIX = "train without --products fp8 here, and report the versions of part env"

STEPS = 3
RATE = 1e-2
CHANGE_BOUND = 1e-3  # an element whose gradient is only rounding error may change with either sign
ENGINE_FIX = "DeepSpeed computes wrong results here: try a different ZeRO stage, and report the versions of part env"


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_fp32(method: str, joined: torch.device, tell: parts.Tell) -> None:
    """Check the loss and gradients of every method with packed rows in fp32."""
    compare_fp32(running.Judge(running.small_shape(), method, dtype=torch.float32, device=joined), tell)


def compare_fp32(judge: running.Judge, tell: parts.Tell) -> None:
    """Check that the errors of loss and gradients with packed rows are not larger than rounding errors."""
    errors = judge.errors(judge.package())
    tell("errors", in_words(errors))
    loss = errors.pop("loss")
    assert loss <= LOSS_BOUND and errors[reference.worst_of(errors)] <= GRADIENT_BOUND, WRONG_FIX


@pytest.fixture(scope="module", params=["small", "wide"])
def judge(request: pytest.FixtureRequest, joined: torch.device, model: str) -> Iterator[running.Judge]:
    """Yield a `Judge` in bf16 for a small model and, on a GPU, for two layers of --model."""
    if request.param == "wide" and joined.type == "cpu":
        pytest.skip("two layers of a large model are too slow on a CPU")
    wide = replace(shape_from_hf(PRESETS[model], source=model), num_layers=2)
    shape = running.small_shape() if request.param == "small" else wide
    yield running.Judge(shape, "tl6", dtype=torch.bfloat16, device=joined)
    running.release()


@cache
def compiled(shape: ModelShape, device: torch.device) -> Kernels:
    """Return compiled bf16 kernels for a model of this shape."""
    return compiled_kernels(shape, dtype=torch.bfloat16, device=device)


def test_bf16_of_plain_pytorch(judge: running.Judge, tell: parts.Tell) -> None:
    """Check that the bf16 errors of plain PyTorch are small enough for a comparison."""
    tell("errors", in_words(judge.plain_errors))
    assert judge.plain_errors[reference.worst_of(judge.plain_errors)] <= PLAIN_BOUND, PLAIN_FIX


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one a row"])
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_bf16(kind: str, packed: bool, how: str, judge: running.Judge, tell: parts.Tell) -> None:
    """Compare packed and unpacked rows, eager and compiled kernels and each --recompute with plain PyTorch in bf16."""
    if kind == "compiled" and judge.device.type == "cpu":
        pytest.skip("a CPU's compiler takes minutes, and is not checked")
    if not packed and judge.shape != running.small_shape():
        pytest.skip("rows of one document are tried on the small model")
    kernels = EAGER if kind == "eager" else compiled(judge.shape, judge.device)
    compare_bf16(judge, judge.package(packed=packed, how=how, kernels=kernels), tell)


def compare_bf16(judge: running.Judge, answer: running.Computed, tell: parts.Tell) -> None:
    """Check that the errors are at most the allowed multiple of plain PyTorch's errors in bf16."""
    errors = judge.errors(answer)
    shares = {name: error / (MULTIPLE * judge.plain_errors[name] + BEYOND) for name, error in errors.items()}
    worst = reference.worst_of(shares)
    tell("errors", in_words(errors))
    tell(f"share of the bound, of {worst}", shares[worst])
    assert shares[worst] <= 1, WRONG_FIX


def in_words(errors: Mapping[str, float]) -> str:
    """Return a short text that lists the errors by name."""
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


# Quantised bases ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["eager", "compiled"])
def weight_kernels(request: pytest.FixtureRequest, joined: torch.device) -> Kernels:
    """Return the kernels with which weights are dequantised and inputs are rounded."""
    if request.param == "eager":
        return EAGER
    if joined.type == "cpu":
        pytest.skip("kernels that are compiled for GPUs")
    return Kernels().compiled(static_widths=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", BASE_FORMATS)
def test_bits(name: str, width: int, joined: torch.device, weight_kernels: Kernels, tell: parts.Tell) -> None:
    """Check that the stored bits and the dequantised values of a format are the same as on a CPU."""
    contents = []
    for device, kernels in ((torch.device("cpu"), EAGER), (joined, weight_kernels)):
        weight = loaded(width, device, torch.bfloat16, name, kernels=kernels)
        ones = torch.eye(weight.local_shape[0], dtype=torch.bfloat16, device=device)  # a matmul returns the values
        contents.append([*(stored.detach().cpu() for stored in weight.parameters.values()), weight.times(ones).cpu()])
    wrong = sum(int((a != b).sum()) for a, b in zip(*contents, strict=True))
    tell("numbers that differ", wrong)
    assert wrong == 0, BITS_FIX


@pytest.mark.parametrize("keep_transposed", [False, True], ids=["", "transposed copies kept"])
def test_products_in_fp8(
    keep_transposed: bool, joined: torch.device, weight_kernels: Kernels, tell: parts.Tell
) -> None:
    """Compare FP8 matmuls of both passes with fp64 matmuls of the same 8-bit values on a CPU."""
    if joined.type == "cuda" and torch.cuda.get_device_capability(joined) < FP8_CAPABILITY:
        pytest.skip(f"the GPU's compute capability is below {'.'.join(map(str, FP8_CAPABILITY))}")
    width = WIDTHS[0]
    draw = torch.Generator().manual_seed(4)
    x, grad_y = (torch.randn(TOKENS, size, generator=draw).bfloat16() for size in (width, ROWS))
    exact = loaded(width, torch.device("cpu"), torch.float64, "fp8", products="fp8")
    given = {"products": "fp8", "keep_transposed": keep_transposed, "kernels": weight_kernels}
    found = loaded(width, joined, torch.bfloat16, "fp8", **given)
    forward = reference.relative(found.times_transposed(x.to(joined)), exact.times_transposed(x.double()))
    backward = reference.relative(found.times(grad_y.to(joined)), exact.times(grad_y.double()))
    tell("errors forward and backward", f"{forward:.1e}, {backward:.1e}")
    assert forward <= PRODUCT_BOUND and backward <= PRODUCT_BOUND, PRODUCT_FIX


def loaded(width: int, device: torch.device, dtype: torch.dtype, name: str, **products: object) -> FrozenWeight:
    """Return a weight in the storage format `name`, with the same random values on every device."""
    values = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(3)).bfloat16()
    with device:
        weight = weight_maker(name, **products)(*values.shape, dtype=dtype)  # type: ignore[arg-type]
    weight.load(values.to(device))
    return weight


# The engine -----------------------------------------------------------------------------------------------------------


@contextmanager
def engine_run(stage: int, folder: Path) -> Iterator[tuple[Started, list[TrainingStep]]]:
    """Yield a small training run in fp32 with the given ZeRO stage, and its first steps."""
    flags = ("--random_weights", "--dtype=fp32", f"--ds_config=zero{stage}.json", "--rows=2", "--length=64")
    settings = running.step_settings(running.write_small(folder), *flags, "--compile=false", "--micro_batches=2")
    # No clipping and an almost constant schedule, so that the reference is plain AdamW.
    with running.started(settings, learning_rate=RATE, gradient_clipping=0.0) as run:
        yield run, [next(run.loader) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def expected_change(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return how torch's AdamW changes the adapter. The change is the same for every ZeRO stage."""
    with engine_run(0, tmp_path_factory.mktemp("model")) as (run, steps):
        return plain_steps(run, adapter_values(run), steps)


@pytest.mark.parametrize("stage", range(4), ids="ZeRO-{}".format)
def test_steps_of_adamw(stage: int, expected_change: dict[str, torch.Tensor], tmp_path: Path, tell: parts.Tell) -> None:
    """Compare the adapter's change over a few fp32 steps with AdamW on fp64 gradients of plain PyTorch."""
    with engine_run(stage, tmp_path) as (run, steps):
        before = adapter_values(run)
        for step in steps:
            run.take(step)
        after = adapter_values(run)
    errors = {name: reference.relative(after[name] - before[name], change) for name, change in expected_change.items()}
    worst = reference.worst_of(errors)
    tell(f"error relative to the change of {worst}", errors[worst])
    assert errors[worst] <= CHANGE_BOUND, ENGINE_FIX


def adapter_values(run: Started) -> dict[str, torch.Tensor]:
    """Return copies of the full tensors of the adapter, by name."""
    (name,) = run.runner.adapters
    with run.runner.optimizers.opened(name):
        named = run.runner.adapters[name].named_parameters()
        return {tensor: factor.detach().clone() for tensor, factor in named}


def plain_steps(run: Started, start: dict[str, torch.Tensor], steps: list[TrainingStep]) -> dict[str, torch.Tensor]:
    """Return how torch's AdamW changes each trained tensor, with fp64 gradients of the reference implementation."""
    settings, adapter, shape = run.plan.settings, run.plan.adapter, run.plan.source.shape
    layers = run.runner.stage.named_parameters()
    weights = {name: weight.detach().double() for name, weight in layers if name.startswith("layers")}
    trained = list(adapter.num_trained())
    factors = {name: tensor.double() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(
        [factors[name] for name in trained], lr=float(settings.learning_rate), weight_decay=settings.weight_decay
    )
    for step in steps:
        documents = [
            reference.Document(tokens.to(run.runner.device), labels.to(run.runner.device))
            for batch in step.micro_batches
            for tokens, labels in zip(batch.tokens, batch.labels, strict=True)
        ]
        _, gradients = reference.loss_and_gradients(shape, adapter.scale, weights, factors, trained, documents)
        for name in trained:
            factors[name].grad = gradients[name] / step.num_supervised
        optimizer.step()
    return {name: factors[name] - start[name] for name in trained}
