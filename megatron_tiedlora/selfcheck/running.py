"""Sets up training runs for the GPU checks, like tiedlora bench. The caller decides which steps they run."""

import gc
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config, targets_of
from megatron_tiedlora.base.messages import UserError, bytes_in_words
from megatron_tiedlora.base.presets import PRESETS, small_llama
from megatron_tiedlora.base.shapes import TARGET_NAMES, ModelShape
from megatron_tiedlora.config import cli, tool_settings
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning import memory, run_plan
from megatron_tiedlora.selfcheck.compare import random_stage
from megatron_tiedlora.selfcheck.reference import Document, loss_and_gradients, relative
from megatron_tiedlora.selfcheck.step_bench import Started, made_up, plan_benchmark, start

MOST_LAYERS = 8  # in the runs of the parts host and memory
# The config.json of a small LLaMA whose heads have sizes that kernels support.
SMALL = small_llama(1000, 256, 512, 2, 4, 2)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of a test model: bf16 on a GPU, and fp32 on a CPU, which may have no fast bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def small_shape(**changes: int) -> ModelShape:
    """Return the shape of the small test model. `changes` replaces fields of its config."""
    return shape_from_hf({**SMALL, **changes}, source="small")


def write_small(folder: Path) -> str:
    """Write the config.json of the small test model to `folder`, and return the folder as a value of --model."""
    (folder / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return str(folder)


def step_settings(model: str, *flags: str) -> tool_settings.BenchSettings:
    """Return the settings that `tiedlora bench --what layout` parses from `flags`."""
    return cli.parse_settings(["--what=layout", f"--model={model}", *flags], tool_settings.BenchSettings)


def planned_bytes(plan: run_plan.RunPlan) -> float:
    """Return the bytes that the dry run plans for torch's allocator on this rank."""
    tokens = plan.layout.rows * plan.layout.length
    step = memory.step_memory(plan.stage, memory.LargestMicroBatch(tokens, 1, tokens))
    return memory.held_memory(plan.stage).plus(step).total


def layers_that_fit(model: str, *flags: str, share: float = 0.85, most: int | None = None) -> int:
    """Return how many layers of a preset, but at most `most`, the dry run fits into a `share` of the free GPU memory.

    Raises:
        UserError: not even one layer fits.
    """
    release()
    free = share * torch.cuda.mem_get_info()[0]

    def planned(layers: int) -> float:
        return planned_bytes(plan_benchmark(step_settings(model, *flags, f"--num_layers={layers}")))

    layers = bisect_right(range(1, 1 + (most or PRESETS[model]["num_hidden_layers"])), free, key=planned)
    if not layers:
        raise UserError(f"--model {model}: no layer fits into {bytes_in_words(free)}; give a smaller model")
    return layers


@contextmanager
def started(settings: tool_settings.BenchSettings, **changes: Any) -> Iterator[Started]:
    """Yield a run for the block. `changes` is passed to `plan_benchmark`. The next run frees the memory of this run."""
    release()
    run = start(plan_benchmark(settings, **changes), settings)
    try:
        yield run
    finally:
        run.runner.engine.destroy()


@contextmanager
def started_to_fit(model: str, flags: Sequence[str], *others: str) -> Iterator[tuple[Started, int]]:
    """Yield a run and its number of layers. As many layers as fit are used, but at most `MOST_LAYERS`."""
    layers = min(MOST_LAYERS, layers_that_fit(model, *flags))
    with started(step_settings(model, *flags, f"--num_layers={layers}", *others)) as run:
        yield run, layers


def loader_of(run: Started, lengths: NDArray[np.int64]) -> Iterator[TrainingStep]:
    """Return an iterator of training steps over random samples with these lengths."""
    return run.plan.training_loader(made_up(run.plan.source.shape.vocab_size, lengths), pad_id=0)


def release() -> None:
    """Free unreferenced memory, and reset torch's statistics of peak memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# A model with an adapter, and plain PyTorch's result ------------------------------------------------------------------


RANK = 8
SCALES = {"A": 0.05, "B": 0.1}  # standard deviations: the update is visible but does not dominate the base
LENGTHS = ((100, 31, 69), (140, 60))  # of the documents in two packed rows of 200 tokens


Computed = dict[str, Tensor]  # `loss` in fp64, and the gradient of each trained tensor NAME as `dNAME`


class Judge:
    """A comparison of this package with plain PyTorch for one model with an adapter."""

    def __init__(self, shape: ModelShape, method: str, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.adapter = adapter_of(shape, method)
        self.stage = random_stage(shape, self.adapter, dtype=dtype, device=device)
        unsettle(self.stage)
        self.documents = random_documents(shape.vocab_size, device)
        self.expected = self.plain(torch.float64)

    @cached_property
    def plain_errors(self) -> dict[str, float]:
        """The errors of plain PyTorch in bf16, relative to plain PyTorch in fp64."""
        return self.errors(self.plain(torch.bfloat16))

    def plain(self, dtype: torch.dtype) -> Computed:
        """Return the loss and gradients of plain PyTorch in this dtype, with the same weights."""
        trained = list(self.adapter.num_trained())
        weights, factors = plain_tensors(self.stage, dtype)
        flat = [document for row in self.documents for document in row]
        return _computed(*loss_and_gradients(self.shape, self.adapter.scale, weights, factors, trained, flat))

    def package(self, *, packed: bool = True, how: str = "none", kernels: Kernels = EAGER) -> Computed:
        """Return the loss and gradients of the package with packed rows, or with one document per row."""
        stage, adapter = self.stage, self.stage.adapter
        assert adapter is not None
        for module in stage.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels  # type: ignore[assignment]
        stage.set_recompute(how)
        tokens, positions, labels, ids = rows_of(self.documents, packed=packed)
        stage.zero_grad()
        loss = stage(tokens, positions, labels, documents=ids)
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in adapter.named_parameters() if value.grad is not None}
        return _computed(float(loss.detach()), gradients)

    def errors(self, answer: Computed) -> dict[str, float]:
        """Return the relative errors of loss and gradients by name. A missing gradient has an infinite error."""
        pairs = {name: (answer.get(name), expected) for name, expected in self.expected.items()}
        return {name: math.inf if found is None else relative(found, of) for name, (found, of) in pairs.items()}


def _computed(loss: float, gradients: Mapping[str, Tensor]) -> Computed:
    named = {f"d{name}": gradient for name, gradient in gradients.items()}
    return {"loss": torch.tensor(loss, dtype=torch.float64), **named}


def plain_tensors(stage: Stage, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's weights in `dtype`, and the adapter's tensors in at least fp32, by name."""
    weights = {name: weight.detach().to(dtype) for name, weight in stage.named_parameters() if "layers" in name}
    assert stage.adapter is not None
    wide = torch.promote_types(dtype, torch.float32)
    return weights, {name: value.detach().to(wide) for name, value in stage.adapter.named_parameters()}


def adapter_of(shape: ModelShape, method: str) -> AdapterConfig:
    """Return the config of an adapter on all linears of all layers, with alpha different from the rank."""
    return make_adapter_config(
        method,
        rank=RANK,
        alpha=1.5 * RANK,
        layers=tuple(range(1, shape.num_layers + 1)),
        targets=targets_of(shape, TARGET_NAMES),
        seed=0,
    )


def unsettle(stage: Stage) -> None:
    """Replace the initial values of the norms and the adapter, so that a missing term changes the results."""
    draw = torch.Generator().manual_seed(1)
    adapter = stage.adapter
    assert adapter is not None
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw).to(parameter))
        for name, factor in adapter.named_parameters():
            drawn = torch.randn(factor.shape, generator=draw)
            scale = SCALES.get(name[-1])
            factor.copy_(1 + 0.3 * drawn if scale is None else drawn * scale)


def random_documents(vocab_size: int, device: torch.device) -> list[list[Document]]:
    """Return rows of random documents. The first third and the last token of each document have no labels."""
    draw = torch.Generator().manual_seed(2)

    def document(length: int) -> Document:
        tokens = torch.randint(3, vocab_size, (length,), generator=draw)
        labels = torch.cat((tokens[1:], torch.tensor([-100])))
        labels[: length // 3] = -100
        return Document(tokens.to(device), labels.to(device))

    return [[document(length) for length in lengths] for lengths in LENGTHS]


def rows_of(documents: Sequence[Sequence[Document]], *, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return padded tokens, position ids, labels and document ids (on the CPU; None if unpacked), each (b, s)."""
    rows = documents if packed else [[document] for row in documents for document in row]
    longest = max(sum(len(document.tokens) for document in row) for row in rows)
    device = rows[0][0].tokens.device
    tokens, labels = (torch.full((len(rows), longest), fill, device=device) for fill in (0, -100))
    positions, ids = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        start = 0
        for document_id, document in enumerate(row):
            part = slice(start, start + len(document.tokens))
            tokens[number, part], labels[number, part] = document
            positions[number, part], ids[number, part] = torch.arange(len(document.tokens)), document_id
            start = part.stop
    return tokens, positions.to(device), labels, ids if packed else None
