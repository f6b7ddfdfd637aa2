"""Describe the cards, links and libraries of a cluster by named constants, each with its source.

A `Machine` is one kind of card with its node; `machines.yaml` lists all known ones. The planners combine the counts of
a layout (`passes`, `memory`) with these constants only. `tiedlora plan --measure` writes a file with them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.base.files import read_json_object, read_yaml_mapping
from megatron_tiedlora.base.messages import UserError, aligned_lines, nearest_name, shown
from megatron_tiedlora.base.shapes import BASE_NAMES, FP8_CAPABILITY
from megatron_tiedlora.config.settings import GPU_NAMES
from megatron_tiedlora.model.fused_attention import CANDIDATES

_KNOWN = read_yaml_mapping(Path(__file__).with_suffix(".yaml"))
_BY_FORMAT = {"dequantise": [f"dequantise.{name}" for name in BASE_NAMES]}
CONSTANTS: Mapping[str, tuple[str, str]] = {  # name -> (unit, description)
    name: entry for key, entry in _KNOWN["constants"].items() for name in _BY_FORMAT.get(key, [key])
}
_MOST = 1e30
_MOST_SHARE = 2.0  # measured shares can be slightly above 1


class Constant(NamedTuple):
    """The value of a constant and its source."""

    value: float
    source: str


_BY_BYTES = dict.fromkeys(_BY_FORMAT["dequantise"], Constant(0.0, "by its bytes"))  # unless it was measured


@dataclass(frozen=True)
class Machine:
    """A kind of card, with the links of its node.

    Attributes:
        title: the name in tables.
        on_gpu: False for processes on CPUs.
        capability: CUDA's compute capability; None on CPUs.
        constants: a constant for each name in `CONSTANTS`.
    """

    name: str
    title: str
    on_gpu: bool
    constants: Mapping[str, Constant] = field(repr=False)
    capability: tuple[int, int] | None = None

    def __getitem__(self, name: str) -> float:
        """Return the value of a constant."""
        return self.constants[name].value

    def rate(self, what: str, dtype: str) -> float:
        """Return the FLOP/s of `matmul` or `attention` in a dtype, bf16, fp8 or fp32."""
        return self[f"peak.{dtype}"] * self[f"{what}.{dtype}"]

    def record(self) -> dict[str, Any]:
        """Return the machine as a record that --constants can read."""
        constants = {
            name: {"value": constant.value, "unit": CONSTANTS[name][0], "source": constant.source}
            for name, constant in self.constants.items()
        }
        facts = {"name": self.name, "title": self.title, "on_gpu": self.on_gpu, "capability": self.capability}
        return {**facts, "constants": constants}

    def lines(self) -> list[str]:
        """Return a table of the constants as lines of text."""
        rows = [(name, f"{value:,.4g}", CONSTANTS[name][0], source) for name, (value, source) in self.constants.items()]
        return aligned_lines(rows, align="<><", indent="  ")

    def changed(self, constants: Mapping[str, Constant], **changes: Any) -> "Machine":
        """Return a copy of the machine with these constants replaced, and with `changes` of its fields."""
        return replace(self, constants={**self.constants, **constants}, **changes)


def read_machine(path: Path) -> Machine:
    """Read the machine in a file of --constants.

    Raises:
        UserError: the file has another format, or a constant is missing, unknown or out of range.
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
        if value == 0 and name in _KNOWN["above_zero"]:
            raise UserError(f"{path}: {name} is 0; a machine without it computes nothing")
        source = entry.get("source", path.name) if isinstance(entry, dict) else path.name
        found[name] = Constant(float(value), str(source))
    if missing := [name for name in CONSTANTS if name not in found]:
        raise UserError(f"{path}: {missing[0]} is missing; write one with `tiedlora plan --measure FILE`")
    name, capability = str(content.get("name", path.stem)), content.get("capability")
    if isinstance(capability, list) and [type(part) for part in capability] == [int, int]:
        capability = tuple(capability)
    elif capability is not None:
        raise UserError(f"{path}: capability is {shown(capability)}, expected two numbers such as [9, 0]")
    if content["on_gpu"] and capability is None:
        raise UserError(f"{path}: capability is missing, CUDA's compute capability of the card such as [9, 0]")
    if found["peak.fp8"].value == 0 and (capability is None or capability >= FP8_CAPABILITY):
        raise UserError(f"{path}: peak.fp8 is 0; a card of capability 8.9 or more, and a CPU, multiplies in fp8")
    return Machine(name, str(content.get("title", name)), content["on_gpu"], found, capability)


# Machines by name -----------------------------------------------------------------------------------------------------


# The share of the bf16 peak that attention reaches, by compute capability and by the names of CANDIDATES.
ATTENTION: Mapping[tuple[int, ...], Mapping[str, Constant]] = {
    tuple(map(int, capability.split("."))): {name: Constant(*share) for name, share in kernels.items()}
    for capability, kernels in _KNOWN["attention"].items()
}
NF4_WITHOUT_LIBRARY = 47.0  # bytes that eager kernels move per weight without bitsandbytes


def default_attention(capability: tuple[int, int]) -> str:
    """Return the attention kernel that a bf16 run uses on a card of this capability with PyTorch alone."""
    of_torch = (candidate for candidate in CANDIDATES if callable(candidate.kernel))
    return next(one.name for one in of_torch if one.obstacle(capability, torch.bfloat16, 128) is None)


def attention_of(machine: Machine) -> str | None:
    """Return the attention kernel of a machine's constants; None if attention was measured, or on a CPU."""
    known = {} if machine.capability is None else ATTENTION.get(machine.capability, {})
    return next((name for name, share in known.items() if share == machine.constants["attention.bf16"]), None)


def listed_peak(name: str) -> float | None:
    """Return the bf16 FLOP/s of a device by its name; None without a known data sheet, or for a MIG instance."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((1e12 * rate for needed, rate in _KNOWN["data_sheets"] if words >= set(needed.split())), None)


def _card(name: str, facts: Mapping[str, Any]) -> Machine:
    major, minor = map(int, facts["capability"].split("."))
    peak = listed_peak(facts["title"])
    assert peak is not None, "a card of the table has a data sheet"
    of_sheet = {"peak.bf16": peak, **facts["sheet"]}
    constants = _BY_BYTES | {key: Constant(float(value), source) for key, (value, source) in _KNOWN["card"].items()}
    constants |= {key: Constant(float(value), "data sheet") for key, value in of_sheet.items()}
    constants["memory"] = Constant(facts["gib"] * 2**30, "total capacity in PyTorch's messages on this card")
    constants["attention.bf16"] = ATTENTION[major, minor][default_attention((major, minor))]
    return Machine(name, facts["title"], True, {key: constants[key] for key in CONSTANTS}, (major, minor))


GPUS: Mapping[str, Machine] = {name: _card(name, facts) for name, facts in _KNOWN["cards"].items()}
assert tuple(GPUS) == GPU_NAMES, "--gpu offers the cards of this table"
DEFAULT_GPU = "h100"
CPU = Machine(
    "cpu",
    "CPU",
    False,
    _BY_BYTES
    | {key: Constant(float(value), of["source"]) for of in _KNOWN["cpu"] for key, value in of["constants"].items()},
)
assert set(CPU.constants) == set(CONSTANTS), "a machine has every constant"
