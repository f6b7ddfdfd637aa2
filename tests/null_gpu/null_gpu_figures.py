"""What can be said of the GPU path without a GPU: counts of launches, waits, messages and bytes, and their bounds.

    NULL_GPU=FOLDER python tests/null_gpu/null_gpu_figures.py [WORD ...]     a table of all of them, or of those whose
                                                                            names have one of the words

FOLDER has a command `run` that starts another on a stand-in for the CUDA driver, with CUDA's virtual memory
(cuMemCreate and what goes with it) for the figures of reserved bytes. Python must have PyTorch's CUDA build.
`tests/null_gpu/test_null_gpu.py` holds each figure to its bound.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

RANK = Path(__file__).with_name("null_gpu_rank.py")
ROOT = Path(__file__).parents[2]
SEVENTY = {"model": "llama2-70b", "num_layers": 8, "tensor_parallel": 8, "zero": "zero1.json"}
TWO_STAGES = {**SEVENTY, "pipeline_parallel": 2, "world_size": 16}
# Whose memory the plan is held to, for each --recompute: an 80 GB card is about half full.
SHAPES: dict[str, dict[str, Any]] = {
    "none": {"recompute": "none", "rows": 2, "lengths": [2048, 2048]},
    "selective": {"recompute": "selective", "rows": 4, "lengths": [4096, 4096]},
    "full": {"recompute": "full", "rows": 8, "lengths": [4096, 4096]},
}

FOUR = {**SEVENTY, "num_layers": 4, "world_size": 8, "lengths": [4096, 4096]}
LENGTHS: dict[str, Any] = {"rows": 4, "lengths": [128, 2048], "micro_batches": 1, "steps": 150}
LAYOUTS: dict[str, dict[str, Any]] = {
    "4 layers of 7B, documents of 16 tokens": {"num_layers": 4, "packing": True, "lengths": [16, 16]},
    "the same in fp32": {"num_layers": 4, "packing": True, "lengths": [16, 16], "dtype": "fp32"},
    "4 layers of 70B, tensor 8": FOUR,
    "the same with all targets": {**FOUR, "targets": "all"},
    "the same in two halves": {**FOUR, "rows": 2, "overlap": "halves"},
    "8 layers of 70B, tensor 8, first of two stages": {**TWO_STAGES, "lengths": [4096, 4096]},
    "4 layers of 7B, deterministic": {"num_layers": 4, "deterministic": True, "packing": True, "lengths": [512, 512]},
    "4 layers of 7B, data 8, ZeRO-2": {"num_layers": 4, "world_size": 8, "zero": "zero2.json"},
    "4 layers of 7B, data 8, ZeRO-3": {"num_layers": 4, "world_size": 8, "zero": "zero3.json"},
}
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"base": "nf4"},
    "int8": {"base": "int8"},
    "fp8": {"base": "fp8"},
    "products in fp8": {"base": "fp8", "products": "fp8"},
    "products in fp8, transposed copies kept": {"base": "fp8", "products": "fp8", "keep_transposed": True},
}


# At most 8 launches beside those of plain weights: each dequantises or rounds for one of 8 matmuls. Products in fp8
# transpose the codes for 4 of them.
# Products in fp8 round 4 of 8 within other kernels.
MOST = {"nf4": 35, "int8": 35, "fp8": 35, "products in fp8": 35, "products in fp8, transposed copies kept": 31}
JOINED = {"adapter_in_matmul": True}
EIGHT = {"world_size": 8, "tensor_parallel": 8}
NARROW: dict[str, dict[str, Any]] = {
    "": {},
    ", tensor 2": {"world_size": 2, "tensor_parallel": 2},
    ", tensor 8": EIGHT,
    ", tensor 8, sequences not sharded": EIGHT | {"sequence_parallel": False},
    ", base in nf4": BASES["nf4"],
    ", adapter in the matmul": {"adapter_in_matmul": True, "targets": "all"},
    ", products in fp8, tensor 8": EIGHT | BASES["products in fp8, transposed copies kept"],
}
DECODED: dict[str, dict[str, Any]] = {
    "4 layers of 7B": {"num_layers": 4},
    "12 layers of 7B": {"num_layers": 12},
    "4 layers of 7B, compiled": {"num_layers": 4, "compile": "true"},
    "4 layers of 7B, deterministic": {"num_layers": 4, "deterministic": True},
    "4 layers of 7B, base in nf4": {"num_layers": 4, **BASES["nf4"]},
    "4 layers of 7B, products in fp8": {"num_layers": 4, **BASES["products in fp8"]},
    "4 layers of 70B, tensor 8": FOUR,
    "4 layers of 70B, first of two stages, tensor 8, half of the batch": TWO_STAGES,
}
SPLITS = ((1, False), (2, True), (2, False), (8, True), (8, False))
COMPILE: dict[str, Any] = {"measure": "compile", "num_layers": 2, "compile": "true", "rows": 2, "lengths": [100, 2000]}


@dataclass(frozen=True)
class Figure:
    """A measured number, its unit, and between which two it must lie."""

    name: str
    measure: Callable[[], float]
    most: float
    least: float = 0.0
    digits: int = 0

    @property
    def bounds(self) -> str:
        """In words."""
        most = f"{self.most:.{self.digits}f}"
        return f"at most {most}" if not self.least else f"{self.least:.{self.digits}f} to {most}"


def run_rank(*, environment: Mapping[str, str] | None = None, **order: Any) -> dict[str, Any]:
    """What null_gpu_rank.py says of an order.

    Raises:
        RuntimeError: it ended otherwise than well, with the end of its output.
    """
    given = json.dumps(order, sort_keys=True)
    found: dict[str, Any] = json.loads(_run_rank(given, tuple(sorted((environment or {}).items()))))
    return found


@cache
def _run_rank(order: str, environment: tuple[tuple[str, str], ...]) -> str:
    command = [str(Path(os.environ["NULL_GPU"]) / "run"), sys.executable, str(RANK), order]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    packages = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    surroundings = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "RANK")}
    surroundings.update(PATH=path, PYTHONPATH=packages, **dict(environment))
    done = subprocess.run(command, env=surroundings, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reasons = re.findall(r"^\w*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE) or ["no reason given"]
        raise RuntimeError(f"{order}: status {done.returncode}\n{done.stderr[-3000:]}\n{reasons[-1]}")
    return lines[-1]


def counted(pattern: str) -> Callable[[Mapping[str, int]], int]:
    """The sum of those counts whose names begin so."""
    return lambda counts: sum(number for name, number in counts.items() if re.match(pattern, name))


launches = counted("kernel:|gemm:|cudaGraphLaunch")  # kernels, matrix products, and CUDA graphs of these
between_streams = counted("event:wait")  # waits of a stream for another one
waits = counted(r"sync:|memcpy:.*(pageable| sync)")  # of the host for the device, also those that a copy would have
messages = counted("nccl(?!:|Group)")  # NCCL's collectives, sends and receives
communicators = counted("nccl:(init|split)")  # of NCCL that were made


def _per_micro_batch(count: Callable[[Mapping[str, int]], int], **order: Any) -> float:
    few, many = (_fewest(count, micro_batches=number, **order) for number in (2, 6))
    return max(many - few, 0) / 4


def _per_layer(**order: Any) -> float:
    given = {"micro_batches": 2, "compile": "true"} | order
    few, many = (_fewest(launches, num_layers=number, **given) for number in (3, 5))
    return (many - few) / 2 / 2


def _fewest(count: Callable[[Mapping[str, int]], int], **order: Any) -> int:
    """Of some steps: with garbage for numbers, some have more to clip."""
    return min(map(count, run_rank(steps=3, **order)["steps"]))


def _waits_for_messages(recompute: str) -> float:
    """Of a layer in two halves: waits of a stream for another, without the two of each message, to send and to use."""
    given: dict[str, Any] = {"rows": 2, "overlap": "halves", "recompute": recompute, "compile": "true"}
    found = [run_rank(**EIGHT, num_layers=number, lengths=[2048, 2048], **given) for number in (3, 5)]
    few, many = ([min(map(count, one["steps"])) for count in (between_streams, messages)] for one in found)
    assert many[1] > few[1], found
    return (many[0] - few[0]) - 2 * (many[1] - few[1])


def _starts_with_one_visible() -> float:
    found = run_rank(measure="join", world_size=8, local_rank=3)
    assert (found["device"], found["bound"]) == ("cuda:0", "None"), found
    return 1.0


def _communicators_at_512(**order: Any) -> float:
    found = run_rank(world_size=512, steps=1, **order)
    return sum(map(communicators, (found["start"], *found["steps"])))


def _launches_of_a_token(*, parts: int = 1, **order: Any) -> float:
    """Of each part of a batch: the graph's and those beside it. The second batch has the graphs of the first."""
    found = run_rank(**{"measure": "decode", "rows": 4, "steps": 24} | order | {"lengths": [16, 16]})
    assert not found["told"], found["told"]  # a stand-in needs stream capture (cudaStreamBeginCapture)
    assert found["captures"] == [parts, 0], found["captures"]
    counts = found["batches"][-1]
    assert all(count.get("cudaGraphLaunch") == parts * found["tokens"] for count in counts), counts
    return max(map(launches, counts)) / parts / found["tokens"]


def _beside_cudnn() -> float:
    """Kernels of attention by cuDNN beside its own. What PyTorch's others launch is known by name."""
    found = run_rank(measure="attention")
    for name, words in (("flash", "1 flash_fwd_kernel"), ("memory-efficient", "1 fmha_cutlassF_bf16")):
        assert any(kernel.startswith(words) for kernel in found[f"PyTorch's {name} kernel"]), found
    print(*found.items(), sep="\n", file=sys.stderr)
    return len(found["PyTorch's cuDNN kernel"])


def _messages_of_a_step() -> float:
    """Those of a step without a micro-batch."""
    few = _fewest(messages, micro_batches=2, **TWO_STAGES)
    return few - 2 * _per_micro_batch(messages, **TWO_STAGES)


def _packed_against_unpacked() -> float:
    whole = run_rank(num_layers=4, lengths=[4096, 4096])
    packed = run_rank(num_layers=4, lengths=[64, 64], packing=True)
    counts = [launches(found["steps"][-1]) / len(found["micro_batches"]) for found in (packed, whole)]
    return counts[0] / counts[1]


def _reserved_to_allocated(**order: Any) -> float:
    found = run_rank(**order)
    assert found["segments"], "the stand-in needs CUDA's virtual memory (cuMemCreate)"
    return found["reserved"] / found["allocated"]


def _launches_of_rows() -> float:
    """How many more launches a layer has for 4 rows than for 1 under sequence parallelism."""
    order = {name: value for name, value in FOUR.items() if name != "num_layers"} | {"compile": "true"}
    few, many = (_per_layer(**order | {"rows": rows, "lengths": [1024, 1024]}) for rows in (1, 4))
    return many - few


def _planned_to_allocated(**order: Any) -> float:
    found = run_rank(prompts=0, steps=2, **order)
    return found["planned"] / found["allocated"]


def _compiled_again() -> float:
    again = 0
    for recompute in SHAPES:
        found = run_rank(recompute=recompute, steps=12, **COMPILE)
        assert len(found["lengths"]) >= 7, found
        again += found["more"]
    return again


def _compiled_in_steps() -> float:
    """Of every tensor-parallel layout and base."""
    again = 0
    for (tp_size, sequences), base in itertools.product(SPLITS, ({}, BASES["nf4"], BASES["products in fp8"], JOINED)):
        layout = {"tensor_parallel": tp_size, "world_size": tp_size, "sequence_parallel": sequences}
        again += run_rank(recompute="selective", steps=4, **COMPILE, **layout, **base)["more"]
    again += run_rank(recompute="full", steps=4, overlap="halves", **COMPILE, **EIGHT)["more"]
    return again


def _narrow_kernels(**order: Any) -> float:
    """Compiled kernels that access no tensor 128 bits at a time, that divide whole numbers, or that do not know how far
    two rows are apart.

    Inductor makes several variants of some, and takes the one that is fastest on the GPU: one of them must be wide.
    """
    variants: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_rank(num_layers=2, compile="true", steps=1, environment={"TORCHINDUCTOR_CACHE_DIR": folder}, **order)
        for file in Path(folder).rglob("*.ptx"):
            variants.setdefault(file.stem, []).append(file.read_text())
        narrow = [str(file) for file in Path(folder).rglob("*.py") if re.search(r"\bks\d+ ?\*", file.read_text())]
    assert len(variants) >= 8, sorted(variants)
    narrow += [name for name, texts in variants.items() if not any(map(is_wide, texts)) or any(map(divides, texts))]
    print(*narrow, sep="\n", end="\n" if narrow else "", file=sys.stderr)
    return len(narrow)


@cache
def _rounding_kernels() -> Mapping[str, list[tuple[int, int]]]:
    """Registers and bytes of spills of each compiled kernel that rounds to fp8, for each variant that is wide."""
    tool = Path(importlib.import_module("triton").__file__ or "").parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found: dict[str, list[tuple[int, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        around = {"TORCHINDUCTOR_CACHE_DIR": folder}
        run_rank(num_layers=2, compile="true", steps=1, environment=around, **BASES["products in fp8"])
        for file in Path(folder).rglob("*.ptx"):
            text = file.read_text()
            if not is_wide(text) or ".e4m3x2." not in text:
                continue
            said = subprocess.run([tool, "-res-usage", file.with_suffix(".cubin")], capture_output=True, text=True)
            used = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
            found.setdefault(file.stem, []).append((used["REG"], used["STACK"] + used["LOCAL"]))
    assert len(found) >= 4, found
    return found


def is_wide(ptx: str) -> bool:
    """Whether a kernel reads or writes tensors 128 bits at a time."""
    return re.search(r"(ld|st)\.global\S*\.(v4\.b32|v2\.b64)", ptx) is not None


def divides(ptx: str) -> bool:
    """Whether a kernel divides whole numbers, which a GPU does in dozens of instructions."""
    return re.search(r"\b(div|rem)\.[su](32|64)", ptx) is not None


# Which of each kernel's variants is fastest is not known: the worst of them counts.
ROUNDING: dict[str, tuple[int, int]] = {"registers a thread": (0, 64), "bytes of spills a thread": (1, 0)}
SHARES = {"planned": (_planned_to_allocated, 1.07, 0.93), "reserved": (_reserved_to_allocated, 1.15, 1.0)}


def _share(what: str, name: str, **order: Any) -> Figure:
    """A figure of bytes to bytes that are allocated."""
    measure, most, least = SHARES[what]
    return Figure(f"{what} to allocated bytes, {name}", lambda: measure(**order), most, least, digits=2)


def _waits(name: str, **order: Any) -> Figure:
    return Figure(f"waits a micro-batch, {name}", lambda: _per_micro_batch(waits, **order), 0)


COMPILED: dict[str, dict[str, Any]] = {"not compiled": {"compile": "false"}, "compiled": {"compile": "true"}}
FIGURES = [
    Figure("rank of LOCAL_RANK 3 that sees one GPU: starts", _starts_with_one_visible, 1, 1),
    Figure(
        "NCCL communicators of a rank of 512 (tensor 8, pipeline 2, data 32)",
        lambda: _communicators_at_512(pipeline_parallel=2, **SEVENTY),
        12,
        1,
    ),
    Figure("NCCL communicators of a rank of 512 (data 512)", lambda: _communicators_at_512(num_layers=2), 1, 1),
    Figure(
        "NCCL messages a micro-batch, 4 layers on the first of two stages, tensor 8",
        lambda: _per_micro_batch(messages, **TWO_STAGES),
        4 * 8 + 5,
        4 * 8,
    ),
    Figure("NCCL messages a step beside those", _messages_of_a_step, 6, 1),
    *(
        Figure(
            f"waits between streams a layer beside two a message, two halves, tensor 8, recompute {recompute}",
            partial(_waits_for_messages, recompute),
            0,
        )
        for recompute in SHAPES
    ),
    _waits("one stage", num_layers=2),
    _waits("two halves, tensor 8", num_layers=2, rows=2, overlap="halves", **EIGHT),
    _waits("first of two stages", **TWO_STAGES),
    Figure("launches a layer, forward and backward, compiled", _per_layer, 27),
    *(
        Figure(f"launches a layer, base in {name}", partial(_per_layer, **BASES[name]), most)
        for name, most in MOST.items()
    ),
    Figure("launches a layer, adapter in the matmul", partial(_per_layer, **JOINED), 27),
    Figure("launches a layer, adapter in the matmul, tensor 8", partial(_per_layer, **EIGHT, **JOINED), 28),
    Figure("launches a layer, forward and backward, not compiled", lambda: _per_layer(compile="false"), 148),
    *(
        Figure(
            f"launches a token, decoding, {name}",
            partial(_launches_of_a_token, parts=order.get("pipeline_parallel", 1), **order),
            3,
            2,
        )
        for name, order in DECODED.items()
    ),
    Figure("launches a layer more for 4 rows than for 1, tensor 8", _launches_of_rows, 0, digits=1),
    Figure("launches beside cuDNN's of attention, two rows of 2,048 tokens", _beside_cudnn, 0),
    Figure("launches packed (documents of 64) to unpacked, 4,096 tokens", _packed_against_unpacked, 1.1, 0.9, 2),
    *(
        _share("reserved", f"150 micro-batches of 4 x 128 to 2,048, {w}", **kind, **LENGTHS)
        for w, kind in COMPILED.items()
    ),
    *(
        _share("planned", f"7B, recompute {recompute}, {word}", **kind, **order)
        for recompute, order in SHAPES.items()
        for word, kind in COMPILED.items()
    ),
    *(_share("planned", name, compile="true", **order) for name, order in LAYOUTS.items()),
    _share("planned", "7B, adapter in the matmul", compile="true", **SHAPES["none"], **JOINED),
    *(_share("reserved", name, compile="true", prompts=0, steps=2, **order) for name, order in LAYOUTS.items()),
    *(_waits(f"base in {name}", num_layers=2, **order) for name, order in BASES.items()),
    *(
        _share("planned", f"7B, recompute {recompute}, base in {name}, compiled", compile="true", **order, **base)
        for name, base in BASES.items()
        for recompute, order in SHAPES.items()
    ),
    Figure("graphs compiled again, 7 or more lengths x 3 recomputes", _compiled_again, 0),
    Figure("graphs compiled in steps, tensor 1 to 8, halves, bf16, nf4 and fp8", _compiled_in_steps, 0),
    *(
        Figure(
            f"{name}, kernels that round to fp8",
            lambda index=index: max(pair[index] for variants in _rounding_kernels().values() for pair in variants),
            most,
        )
        for name, (index, most) in ROUNDING.items()
    ),
    *(
        Figure(
            f"compiled kernels without 128-bit accesses, or with divisions{of}", partial(_narrow_kernels, **order), 0
        )
        for of, order in NARROW.items()
    ),
]


def main() -> int:
    """Measure and print all; the status is 1 where one is out of its bounds."""
    outside = 0
    print("| figure | measured | must be |\n|---|---|---|")
    for figure in FIGURES:
        if sys.argv[1:] and not any(word in figure.name for word in sys.argv[1:]):
            continue
        try:
            value = figure.measure()
            text, good = f"{value:.{figure.digits}f}", figure.least <= value <= figure.most
        except (RuntimeError, AssertionError) as error:
            text, good = f"fails ({str(error).strip().splitlines()[-1][:120]})", False
        outside += not good
        print(f"| {figure.name} | {text}{'' if good else ' **'} | {figure.bounds} |", flush=True)
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
