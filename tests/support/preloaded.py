"""Imported by the server that ranks are forked from: what each rank would import and look up by itself.

A rank that imports all of it works for 9 s. A forked one works for 0.1 s before it reads its first row, and for 0.8 s
where the server has not done what is below and imported what that needs.
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.adapters import tied_adapter
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.planning.passes import step_flops
from support.tiny_models import tiny_config

MODULES = (
    "pytest",
    "torch._dynamo",  # through torch.optim, a second
    "deepspeed.runtime.pipe.engine",
    "deepspeed.module_inject.auto_ep_layer",
    "PIL.BmpImagePlugin",  # with the next three: PIL imports them as it writes its first image
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PpmImagePlugin",
    "pydantic.dataclasses",
    "setuptools",  # torch.utils.cpp_extension, through DeepSpeed's builders
    "sentencepiece",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_sentencepiece",
    "megatron_tiedlora.evaluation.answering",
    "megatron_tiedlora.evaluation.results",
    "megatron_tiedlora.runtime.ending",
    "megatron_tiedlora.planning.report",
    "megatron_tiedlora.training.finish",
    "megatron_tiedlora.training.start",
    "support.forked_ranks",
    "support.run_helpers",
    "support.run_preludes",
)


gc.disable()  # imports make objects that stay
for module in MODULES:
    importlib.import_module(module)

# DeepSpeed asks the compiler which of its operations can be built, once in each process that was not told; an engine
# imports Muon.
assert importlib.import_module("deepspeed").ops.__compatible_ops__
importlib.import_module("megatron_tiedlora.engine.engine").import_muon_uncompiled()

# What few tests look at, and each run spends half of its time on, is replaced here; `whole_run` of run_preludes.py puts
# it back. The first figure of a process finds its fonts: the loss plot of all runs is this one.
pyplot = importlib.import_module("matplotlib.pyplot")
pyplot.switch_backend("agg")
figure, axes = pyplot.subplots()
axes.plot([1, 2], [3, 4], label="train")
axes.set_xlabel("step")
axes.legend()
figure.savefig(png := io.BytesIO(), format="png")
pyplot.close(figure)


def write_plot(_metrics: Path, target: Path, **keywords: Any) -> None:
    with new_file(target, **keywords) as unfinished:
        unfinished.write_bytes(png.getvalue())


new_file = importlib.import_module("megatron_tiedlora.base.files").new_file
finish: Any = importlib.import_module("megatron_tiedlora.training.finish")
finish.plot_losses = write_plot

# The peak that a run measures, a quarter of a second of matmuls, is kept for the ranks.
throughput: Any = importlib.import_module("megatron_tiedlora.training.throughput")
throughput.measured_peak = functools.cache(throughput.measured_peak)
throughput.measured_peak(torch.device("cpu"), torch.float32)
throughput.step_flops = importlib.import_module("support.run_preludes").token_flops

os.fsync = lambda _: None  # no test cuts the power, and what was written before a kill is there

# The operations of the model that most tests train are counted once here: a run counts them by tracing its blocks.
if torch.version.cuda is None:  # else a backward pass starts threads for GPUs, which a forked rank would miss
    shape = shape_from_hf(tiny_config().to_dict())
    for method in ("tl6", "lora"):
        targets = tied_adapter.targets_of(shape, ("qkv",))
        adapter = tied_adapter.make_adapter_config(method, rank=3, layers=(1, 2, 3), targets=targets, seed=0)
        step_flops(shape, adapter, lengths=(8,), num_supervised=8)

gc.enable()
gc.set_threshold(20_000)  # ranks make many objects and few cycles: their collections took 5 % of all tests' time
gc.freeze()  # else a collection in a rank writes to, and so copies, the pages of all that was imported here
os.environ["PYTHONPATH"] = os.environ.pop("OWN_PYTHONPATH")  # the other one led here
