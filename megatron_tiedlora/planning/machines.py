"""What a cluster's cards, links and libraries do, as a few named constants, each with its source.

A `Machine` is one kind of card with its node. Planners multiply the counts of a layout (`passes`, `memory`,
`traffic`) by these constants and by nothing else. `tiedlora plan --measure` writes a file of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.base.base_formats import BASE_NAMES, FP8_CAPABILITY
from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.wording import aligned_lines, nearest_name
from megatron_tiedlora.config.train_fields import GPU_NAMES
from megatron_tiedlora.model.fused_attention import CANDIDATES

# Every constant: its unit, and what it is.
CONSTANTS: Mapping[str, tuple[str, str]] = {
    "memory": ("bytes", "of a card, as PyTorch reports it; on CPUs the memory of the machine"),
    "peak.bf16": ("FLOP/s", "dense peak of matmuls in bf16"),
    "peak.fp8": ("FLOP/s", "the same in fp8"),
    "peak.fp32": ("FLOP/s", "the same in fp32"),
    "matmul.bf16": ("share", "of that peak which matmuls of a model's widths reach"),
    "matmul.fp8": ("share", "the same in fp8, with the part of rounding to fp8 that is not in round.*"),
    "matmul.fp32": ("share", "the same in fp32"),
    "attention.bf16": ("share", "of the peak in bf16 which attention reaches, by its necessary FLOPs"),
    "attention.fp32": ("share", "the same in fp32"),
    "weights.bf16": ("weights/s", "that a matmul reads beside its FLOPs; 0: while it computes"),
    "weights.fp32": ("weights/s", "the same in fp32"),
    "queries.bf16": ("numbers/s", "of queries that attention reads beside its FLOPs; 0: while it computes"),
    "queries.fp32": ("numbers/s", "the same in fp32"),
    "bandwidth": ("bytes/s", "of the memory, by the data sheet"),
    "elementwise": ("share", "of it which elementwise kernels reach"),
    "dequantise.nf4": ("weights/s", "that are dequantised; 0: as fast as their bytes are read and written"),
    "dequantise.int8": ("weights/s", "the same"),
    "dequantise.fp8": ("weights/s", "the same"),
    "round.forward": ("bytes", "that rounding to fp8 moves for a number of an activation; 0: it is in matmul.fp8"),
    "round.backward": ("bytes", "the same of a gradient"),
    "node_bandwidth": ("bytes/s", "of a rank's link to the others of its node, in one direction"),
    "node_link": ("share", "of it which collectives reach"),
    "network_bandwidth": ("bytes/s", "of a rank's link to other nodes, in one direction"),
    "network_link": ("share", "of it which collectives reach"),
    "message": ("seconds", "of a message without its bytes"),
    "instruction": ("seconds", "that DeepSpeed's pipeline adds to a pass"),
    "block": ("seconds", "that the host needs to launch a pass through a block"),
    "hides_launches": ("0 or 1", "1: the device works while the host launches, so only the longer of both counts"),
    "step": ("seconds", "of a step beside its passes and messages: loader, agreements, optimizer"),
    "context": ("bytes", "of a process outside PyTorch's allocator: CUDA, libraries"),
    "communicator": ("bytes", "of a communicator's buffers"),
    "slack": ("share", "of the allocated bytes which the allocator reserves beyond them"),
}

_ABOVE_ZERO = (
    *("memory", "bandwidth", "elementwise", "node_bandwidth", "node_link", "network_bandwidth", "network_link"),
    *(name for name in CONSTANTS if name.startswith(("peak.bf16", "peak.fp32", "matmul.", "attention."))),
)
_MOST = 1e30
_MOST_SHARE = 2.0  # measured ones can be a little more than 1


class Constant(NamedTuple):
    """A value, and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Machine:
    """A kind of card, in nodes of `cards` of them.

    Attributes:
        title: for tables.
        on_gpu: False for processes on CPUs.
        capability: CUDA's compute capability; None on CPUs.
        constants: one for each name of `CONSTANTS`.
    """

    name: str
    title: str
    on_gpu: bool
    constants: Mapping[str, Constant] = field(repr=False)
    capability: tuple[int, int] | None = None

    def __getitem__(self, name: str) -> float:
        """The value of a constant."""
        return self.constants[name].value

    def rate(self, what: str, dtype: str) -> float:
        """The FLOP/s of `matmul` or `attention` in a dtype, bf16, fp8 or fp32."""
        return self[f"peak.{dtype}"] * self[f"{what}.{dtype}"]

    def record(self) -> dict[str, Any]:
        """The machine as --constants reads it."""
        constants = {
            name: {"value": constant.value, "unit": CONSTANTS[name][0], "source": constant.source}
            for name, constant in self.constants.items()
        }
        facts = {"name": self.name, "title": self.title, "on_gpu": self.on_gpu, "capability": self.capability}
        return {**facts, "constants": constants}

    def lines(self) -> list[str]:
        """Its constants as text."""
        rows = [
            (name, f"{constant.value:>12,.4g} {CONSTANTS[name][0]:<9}", constant.source)
            for name, constant in self.constants.items()
        ]
        return aligned_lines(rows, align="<", indent="  ")

    def changed(self, constants: Mapping[str, Constant], **changes: Any) -> Machine:
        """The machine with other values of some constants, and with `changes` of its other fields."""
        return replace(self, constants={**self.constants, **constants}, **changes)


def read_machine(path: Path) -> Machine:
    """The machine in a file of --constants.

    Raises:
        UserError: the file is not one, or a constant is missing, unknown or no number above 0.
    """
    content = read_json_object(path, kind="a file of constants")
    constants = content.get("constants")
    if not isinstance(constants, dict) or type(content.get("on_gpu")) is not bool:
        raise UserError(f"{path}: is no file of constants; write one with `tiedlora plan --measure FILE`")
    found = {}
    for name, entry in constants.items():
        if name not in CONSTANTS:
            raise UserError(f"{path}: unknown constant {shown(name)}{nearest_name(name, CONSTANTS)}")
        value, unit = entry.get("value") if isinstance(entry, dict) else entry, CONSTANTS[name][0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
            raise UserError(f"{path}: {name} is {shown(value)}, expected a number in {unit}")
        if unit == "share" and value > _MOST_SHARE:
            raise UserError(f"{path}: {name} is {shown(value)}, expected a share, where 1 is all of it")
        if value == 0 and name in _ABOVE_ZERO:
            raise UserError(f"{path}: {name} is 0; a machine without it computes nothing")
        source = entry.get("source", path.name) if isinstance(entry, dict) else path.name
        found[name] = Constant(float(value), str(source))
    missing = [name for name in CONSTANTS if name not in found]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; write one with `tiedlora plan --measure FILE`")
    name, capability = str(content.get("name", path.stem)), content.get("capability")
    if isinstance(capability, list) and [type(part) for part in capability] == [int, int]:
        capability = tuple(capability)
    elif capability is not None:
        raise UserError(f"{path}: capability is {shown(capability)}, expected two numbers such as [9, 0]")
    if content["on_gpu"] and capability is None:
        raise UserError(f"{path}: capability is missing, CUDA's compute capability of the card such as [9, 0]")
    has_fp8 = capability is None or capability >= FP8_CAPABILITY
    for needed in ("peak.fp8", "matmul.fp8"):
        if has_fp8 and found[needed].value == 0:
            raise UserError(f"{path}: {needed} is 0; a card of capability 8.9 or more, and a CPU, multiplies in fp8")
    return Machine(name, str(content.get("title", name)), content["on_gpu"], found, capability)


# Cards by name --------------------------------------------------------------------------------------------------------


# Dense bf16 TFLOP/s (half of the rate with sparsity) from the vendor's data sheets, by words of the device's name. The
# first row counts whose words are all in the name.
_DATA_SHEETS: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"GB200"}), 2500.0),
    (frozenset({"B200"}), 2250.0),
    (frozenset({"GH200"}), 989.4),
    (frozenset({"H200", "NVL"}), 835.5),
    (frozenset({"H200"}), 989.4),
    (frozenset({"H100", "NVL"}), 835.5),
    (frozenset({"H100", "PCIe"}), 756.5),
    (frozenset({"H100", "HBM3"}), 989.4),  # SXM
    (frozenset({"A100"}), 312.0),
    (frozenset({"A40"}), 149.7),
    (frozenset({"L40S"}), 362.1),
    (frozenset({"L4"}), 121.0),
)

_SHEET = "data sheet"
_FITTED = "fitted to three published rates of LoRA in fp8 on H100 (docs/planning.md)"
_ASSUMED = "assumed, not measured"
_LINK = "assumed: NCCL's bus bandwidth on such nodes is 75 to 85 % of the link"
_NETWORK = "assumed: 90 % of the network card"
_REPORTED = "0.3 to 0.7 GB on hosts with NVLink, as users report (NVIDIA/nccl issues 864 and 964)"
_LAUNCHES = "counted without a GPU: about 1 ms of the host's time per block, forward and backward (docs/gpu_log.md)"
_RESERVED = "counted without a GPU: 1.01 to 1.07 of the allocated bytes are reserved (docs/gpu_log.md)"
_CAPACITY = "total capacity in PyTorch's messages on this card"
_UNFUSED = "counted: eager kernels that find the largest number, divide, limit and store"


def _of_paper(share: float, ahead: int, back: int) -> Constant:
    rates = f"{ahead} TFLOP/s forward with a causal mask, {back} backward without one, which is faster than with one"
    counted = "a kernel computes 5 matmuls backward, of which a plan counts 4"
    return Constant(share, f"FlashAttention-3's paper, H100, heads of 128, 4,096 tokens: {rates}; {counted}")


# Of the peak in bf16, forward and backward pass together, by compute capability and by the names of CANDIDATES.
_HOPPER = {
    "FlashAttention 3": _of_paper(0.45, 579, 542),
    "PyTorch's flash kernel": _of_paper(0.26, 319, 310),  # which is FlashAttention 2
}
ATTENTION: Mapping[tuple[int, int], Mapping[str, Constant]] = {
    (8, 0): {"PyTorch's flash kernel": Constant(0.55, "FlashAttention-2's paper: 0.5 to 0.73 on A100")},
    (9, 0): _HOPPER,
    (10, 0): {"PyTorch's flash kernel": Constant(0.26, f"{_ASSUMED}: the share on H100; it may be less")},
}
NF4_WITHOUT_LIBRARY = 47.0  # bytes that eager kernels move for a weight, where bitsandbytes is not installed
CUDNN_ATTENTION = _of_paper(0.41, 518, 499)  # of NVIDIA's own published rates; a run does not use it


def default_attention(capability: tuple[int, int]) -> str:
    """The attention kernel of a run in bf16 on such a card where nothing but PyTorch is installed."""
    of_torch = (candidate for candidate in CANDIDATES if callable(candidate.kernel))
    return next(one.name for one in of_torch if one.obstacle(capability, torch.bfloat16, 128) is None)


def attention_of(machine: Machine) -> str | None:
    """The kernel whose share of the peak a machine has; None if that was measured, or the machine is a CPU."""
    known = {} if machine.capability is None else ATTENTION.get(machine.capability, {})
    return next((name for name, share in known.items() if share == machine.constants["attention.bf16"]), None)


def listed_peak(name: str) -> float | None:
    """bf16 FLOP/s of a device of that name; None if its data sheet is not known or it is a part of a device (MIG)."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((1e12 * rate for needed, rate in _DATA_SHEETS if needed <= words), None)


def _card(
    name: str,
    device: str,
    *,
    gib: float,
    fp8: float,
    fp32: float,
    bandwidth: float,
    link: float,
    network: float,
    capability: tuple[int, int],
) -> Machine:
    """A preset: a data-centre card in a node with a fast link among its cards, and a network card for each.

    Args:
        device: its name, for the peak in bf16.
        gib: its memory in GiB.
        fp8, fp32: further peaks in TFLOP/s; 0 if it has no such matmuls.
        bandwidth, link, network: GB/s of its memory, of its link in the node and of its network card, in one direction.
    """
    peak = listed_peak(device)
    assert peak is not None, "a preset's card has a data sheet"
    values: dict[str, tuple[float, str]] = {
        "memory": (gib * 2**30, _CAPACITY),
        "peak.bf16": (peak, _SHEET),
        "peak.fp8": (fp8 * 1e12, _SHEET),
        "peak.fp32": (fp32 * 1e12, _SHEET),
        "matmul.bf16": (0.72, f"{_ASSUMED}: what large matmuls in bf16 reach; published training is 10 to 20 % slower"),
        "matmul.fp8": (FP8_SHARE, _FITTED),
        "matmul.fp32": (0.8, _ASSUMED),
        "attention.bf16": ATTENTION[capability][default_attention(capability)],
        "attention.fp32": (0.4, _ASSUMED),
        **dict.fromkeys(("weights.bf16", "weights.fp32", "queries.bf16", "queries.fp32"), (0.0, "while it computes")),
        "bandwidth": (bandwidth * 1e9, _SHEET),
        "elementwise": (0.8, f"{_ASSUMED}: compiled kernels that read and write once"),
        **{f"dequantise.{base}": (0.0, "by its bytes") for base in BASE_NAMES},
        "round.forward": (35.0, _UNFUSED),
        "round.backward": (49.0, f"{_UNFUSED}; the weight's scales are multiplied in first"),
        "node_bandwidth": (link * 1e9, _SHEET),
        "node_link": (0.8, _LINK),
        "network_bandwidth": (network * 1e9, _SHEET),
        "network_link": (0.9, _NETWORK),
        "message": (15e-6, f"{_ASSUMED}: NCCL's small messages take 10 to 20 us"),
        "instruction": (1e-4, _ASSUMED),
        "block": (5e-4, _LAUNCHES),
        "hides_launches": (1.0, "CUDA's launches return at once"),
        "step": (5e-3, _ASSUMED),
        "context": (0.5e9, _ASSUMED),
        "communicator": (0.5e9, _REPORTED),
        "slack": (0.05, _RESERVED),
    }
    return Machine(name, device, True, {key: Constant(*value) for key, value in values.items()}, capability)


FP8_SHARE = 0.57
_H100 = "H100 80GB HBM3"  # SXM

_CARDS = (
    _card("a100-80", "A100 80GB", gib=79.1, fp8=0, fp32=19.5, bandwidth=2039, link=300, network=25, capability=(8, 0)),
    _card("h100", _H100, gib=79.1, fp8=1978.9, fp32=66.9, bandwidth=3350, link=450, network=50, capability=(9, 0)),
    _card("h200", "H200", gib=139.8, fp8=1978.9, fp32=66.9, bandwidth=4800, link=450, network=50, capability=(9, 0)),
    _card("b200", "B200", gib=178.3, fp8=4500, fp32=75, bandwidth=8000, link=900, network=50, capability=(10, 0)),
)
GPUS: Mapping[str, Machine] = {card.name: card for card in _CARDS}
assert tuple(GPUS) == GPU_NAMES, "--gpu offers the cards of this table"
DEFAULT_GPU = "h100"

# So that --ranks_on_cpu has numbers to sort layouts by; another CPU has others (--measure).
_CPU_MEASURED = "measured by 2 ranks with a core each of a server CPU with bf16 instructions, at SmolLM2's widths"
_CPU_GUESSED = "a guess, not measured"
_CPU: dict[str, float] = {
    "peak.bf16": 214e9,
    "peak.fp8": 99e9,
    "peak.fp32": 99e9,
    "matmul.bf16": 0.92,
    "matmul.fp8": 1.0,
    "matmul.fp32": 0.93,
    "attention.bf16": 0.25,
    "attention.fp32": 0.45,
    "weights.bf16": 60e9,
    "weights.fp32": 5.6e9,
    "queries.bf16": 0.11e9,
    "queries.fp32": 0.13e9,
    "bandwidth": 14.3e9,
    "elementwise": 0.28,
    "dequantise.nf4": 3.1e9,
    "dequantise.int8": 1.9e9,
    "dequantise.fp8": 0.75e9,
    "round.forward": 0.0,
    "round.backward": 0.0,
    "node_bandwidth": 0.8e9,
    "node_link": 1.0,
    "message": 0.46e-3,
    "instruction": 2.3e-3,
    "block": 1.5e-3,
    "step": 10e-3,
    "context": 0.37e9,
}
_CPU_GUESSES: dict[str, float] = {
    "memory": 16e9,
    "network_bandwidth": 1e9,
    "network_link": 1.0,
    "communicator": 0.0,
    "slack": 0.05,
}
CPU = Machine(
    "cpu",
    "CPU",
    False,
    {name: Constant(value, _CPU_MEASURED) for name, value in _CPU.items()}
    | {name: Constant(value, _CPU_GUESSED) for name, value in _CPU_GUESSES.items()}
    | {"hides_launches": Constant(0.0, "the thread that launches computes, too")},
)
assert set(CPU.constants) == set(CONSTANTS), "a machine has every constant"


def default_machine(*, on_gpu: bool) -> Machine:
    """The machine of a plan that names none."""
    return GPUS[DEFAULT_GPU] if on_gpu else CPU
