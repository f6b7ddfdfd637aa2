"""Describe the hardware of a cluster with named constants, and give the source of each constant.

A `Machine` is a GPU model with its node, or a CPU; `machines.yaml` lists all known machines. The planners compute
memory and time from these constants and the counts of a layout. `tiedlora plan --measure` writes measured constants.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.base import files, shapes
from megatron_tiedlora.base.messages import UserError, aligned_lines, nearest_name, shown
from megatron_tiedlora.config.settings import GPU_NAMES
from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.fused_attention import CANDIDATES, TILES, AttentionRoute, FusedKernel, Installed

_KNOWN = files.read_yaml_mapping(Path(__file__).with_suffix(".yaml"))
_BY_FORMAT = {"dequantise": [f"dequantise.{name}" for name in shapes.BASE_NAMES]}
CONSTANTS: Mapping[str, tuple[str, str]] = {  # name -> (unit, description)
    name: entry for key, entry in _KNOWN["constants"].items() for name in _BY_FORMAT.get(key, [key])
}
_MOST = 1e30
_MOST_SHARE = 2.0  # a measured fraction of a peak can be slightly above 1


class Constant(NamedTuple):
    """The value of a constant and its source."""

    value: float
    source: str


_BY_BYTES = dict.fromkeys(_BY_FORMAT["dequantise"], Constant(0.0, "by its bytes"))  # 0: computed from the bytes moved


@dataclass(frozen=True)
class Machine:
    """A GPU model or a CPU, with the links of its node.

    Attributes:
        title: the name that tables show.
        on_gpu: whether ranks run on GPUs; False for CPUs.
        capability: the CUDA compute capability, such as (9, 0); None for CPUs.
        constants: the constant for each name in `CONSTANTS`.
        windowed: the `attention.bf16` of rows that are longer than the window, if another kernel computes them.
    """

    name: str
    title: str
    on_gpu: bool
    constants: Mapping[str, Constant] = field(repr=False)
    capability: tuple[int, int] | None = None
    windowed: Constant | None = None

    def __getitem__(self, name: str) -> float:
        """Return the value of a constant."""
        return self.constants[name].value

    def rate(self, what: str, dtype: str, *, windowed: bool = False) -> float:
        """Return the FLOP/s that `matmul` or `attention` reaches in a dtype: bf16, fp8 or fp32."""
        other = self.windowed if windowed and dtype == "bf16" else None
        return self[f"peak.{dtype}"] * (other or self.constants[f"{what}.{dtype}"]).value

    def record(self) -> dict[str, Any]:
        """Return the machine as a dictionary in the JSON format that --constants reads."""
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
        """Return a copy of the machine in which `constants` and the fields in `changes` are replaced."""
        return replace(self, constants={**self.constants, **constants}, **changes)


def read_machine(path: Path) -> Machine:
    """Read a machine from the file that --constants names.

    Raises:
        UserError: the file has a different format, or a constant is missing, unknown or out of range.
    """
    content = files.read_json_object(path, kind="a file of constants")
    constants = content.get("constants")
    if not isinstance(constants, dict) or type(content.get("on_gpu")) is not bool:
        raise UserError(f"{path}: this is not a file of constants. Write one with `tiedlora plan --measure FILE`")
    found = {}
    for name, entry in constants.items():
        if name not in CONSTANTS:
            raise UserError(f"{path}: unknown constant {shown(name)}{nearest_name(name, CONSTANTS)}. Correct its name")
        value, unit = entry.get("value") if isinstance(entry, dict) else entry, CONSTANTS[name][0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
            raise UserError(f"{path}: {name} is {shown(value)}. Give a number (unit: {unit})")
        if unit == "share" and value > _MOST_SHARE:
            raise UserError(f"{path}: {name} is {shown(value)}. Give a fraction such as 0.8, not a percentage")
        if value == 0 and name in _KNOWN["above_zero"]:
            raise UserError(f"{path}: {name} is 0. Give a value above 0")
        source = entry.get("source", path.name) if isinstance(entry, dict) else path.name
        found[name] = Constant(float(value), str(source))
    if missing := [name for name in CONSTANTS if name not in found]:
        raise UserError(f"{path}: {missing[0]} is missing. Write a complete file with `tiedlora plan --measure FILE`")
    name, capability = str(content.get("name", path.stem)), content.get("capability")
    if isinstance(capability, list) and [type(part) for part in capability] == [int, int]:
        capability = tuple(capability)
    elif capability is not None:
        raise UserError(f"{path}: capability is {shown(capability)}. Give two integers such as [9, 0]")
    if content["on_gpu"] and capability is None:
        raise UserError(f"{path}: capability is missing. Give the GPU's CUDA compute capability, such as [9, 0]")
    if found["peak.fp8"].value == 0 and (capability is None or capability >= shapes.FP8_CAPABILITY):
        raise UserError(f"{path}: peak.fp8 is 0. Give a value above 0 for a CPU, or a GPU of capability 8.9 or higher")
    return Machine(name, str(content.get("title", name)), content["on_gpu"], found, capability)


# Machines by name -----------------------------------------------------------------------------------------------------


# The fraction of the bf16 peak that attention reaches, by compute capability and by the names of CANDIDATES. Kernels
# with equal fractions differ in their sources.
ATTENTION: Mapping[tuple[int, ...], Mapping[str, Constant]] = {
    tuple(map(int, capability.split("."))): {
        name: Constant(share, f"{name}: {source}") for name, (share, source) in kernels.items()
    }
    for capabilities, kernels in _KNOWN["attention"].items()
    for capability in capabilities.split(", ")
}


def attention_kernel(
    capability: tuple[int, int],
    head_dim: int = 128,
    *,
    whole: bool = True,
    here: Installed | None = ().__contains__,
    **options: Any,
) -> str:
    """Return the name of the attention kernel that a run in 16 bits uses on a GPU of this capability.

    Args:
        whole: whether each row is one document, of a length that every kernel supports.
        here, options: see `FusedKernel.obstacle`. By default no library is installed, as after `pip install` of this
            project.
    """
    given = capability, torch.bfloat16, head_dim
    able = (one for one in CANDIDATES if whole or one.multiple is None)
    return next((one.name for one in able if one.obstacle(*given, here=here, **options) is None), TILES)


def attention_of(machine: Machine) -> str | None:
    """Return the attention kernel that a machine's constants assume; None if attention was measured, or on a CPU."""
    known = {} if machine.capability is None else ATTENTION.get(machine.capability, {})
    return next((name for name, share in known.items() if share == machine.constants["attention.bf16"]), None)


def attending(
    machine: Machine, *, head_dim: int, length: int | None, window: int | None = None, **options: Any
) -> Machine:
    """Return a machine of `GPUS` with the constants of the attention kernels that a run uses; others as they are.

    Libraries count as installed only if they are installed on this computer, and if it has such a GPU.

    Args:
        length: the tokens of each row, if a row is one document; None for packed samples and rows of many lengths.
        window: the smallest window of the model's blocks.
        options: `deterministic` and `cap`, see `choose_attention`.
    """
    preset = GPUS.get(machine.name)
    if preset is None or machine.constants["attention.bf16"] != preset.constants["attention.bf16"]:
        return machine
    assert machine.capability is not None, "a GPU has a capability"
    whole = length is not None and all(length % one.multiple == 0 for one in CANDIDATES if one.multiple is not None)
    options |= {"here": None} if is_here(machine) else {}
    in_windows = [False, *([True] if window is not None and (length is None or window < length) else [])]
    names = [attention_kernel(machine.capability, head_dim, whole=whole, window=w, **options) for w in in_windows]
    share, *others = map(ATTENTION[machine.capability].get, names)
    windowed = next((other for other in others if other != share), None)
    return machine if share is None else machine.changed({"attention.bf16": share}, windowed=windowed)


def faster_attention(capability: tuple[int, int], name: str, *, head_dim: int, **options: Any) -> FusedKernel | None:
    """Return the fastest attention kernel, which one command installs; None if the kernel `name` is as fast.

    Args:
        options: see `FusedKernel.obstacle`.
    """
    shares = {key: share.value for key, share in ATTENTION.get(capability, {}).items()}
    faster = (one for one in CANDIDATES if shares.get(one.name, 0.0) > shares.get(name, _MOST_SHARE))
    fits = (one for one in faster if one.obstacle(capability, torch.bfloat16, head_dim, here=bool, **options) is None)
    return next(fits, None)  # the fastest is the first


def attention_in_words(
    route: AttentionRoute, device: torch.device, *, heads: shapes.HeadShape, packing: bool, windowed: bool = False
) -> str:
    """Return a run's attention kernel, its expected share of the peak, and how to install a faster one, as text."""
    if device.type != "cuda":
        return str(route)
    capability, name = torch.cuda.get_device_capability(device), (packing and route.otherwise) or route.name
    known, options = ATTENTION.get(capability, {}), {"window": windowed, "cap": heads.cap}
    faster = faster_attention(capability, name, head_dim=heads.dim, **options)
    words = f"{route}; {known[name].value} of the peak in bf16 is expected" if name in known else str(route)
    if route.otherwise in known and name != route.otherwise:
        words += f" ({known[route.otherwise].value} for other rows)"
    if faster is None or fused_attention.is_installed(str(faster.kernel)):  # an installed kernel does not run here
        return words
    return f"{words}, and {known[faster.name].value} with {faster.name}: {faster.install}"


def is_here(machine: Machine) -> bool:
    """Return whether this computer has a GPU of this kind."""
    return torch.cuda.is_available() and known_gpu(torch.cuda.get_device_name()) == machine.name


def known_gpu(device: str) -> str | None:
    """Return the name in `GPUS` of a device; None for unknown devices."""
    words, peak = set(re.split(r"[\s-]+", device)), listed_peak(device)
    alike = (card for card in GPUS.values() if set(card.title.split()) <= words and card["peak.bf16"] == peak)
    return next((card.name for card in alike), None)


def listed_peak(name: str) -> float | None:
    """Return the peak bf16 FLOP/s of a device from its data sheet; None for unknown devices and MIG instances."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((1e12 * rate for needed, rate in _KNOWN["data_sheets"] if words >= set(needed.split())), None)


def _card(name: str, facts: Mapping[str, Any]) -> Machine:
    major, minor = map(int, facts["capability"].split("."))
    peak = listed_peak(facts["title"])
    assert peak is not None, "a GPU in the table has a data sheet"
    of_sheet = {"peak.bf16": peak, **facts["sheet"]}
    constants = _BY_BYTES | {key: Constant(float(value), source) for key, (value, source) in _KNOWN["card"].items()}
    constants |= {key: Constant(float(value), "data sheet") for key, value in of_sheet.items()}
    constants["memory"] = Constant(facts["gib"] * 2**30, "total capacity in PyTorch's messages on this card")
    constants["attention.bf16"] = ATTENTION[major, minor][attention_kernel((major, minor))]
    return Machine(name, facts["title"], True, {key: constants[key] for key in CONSTANTS}, (major, minor))


GPUS: Mapping[str, Machine] = {name: _card(name, facts) for name, facts in _KNOWN["cards"].items()}
assert tuple(GPUS) == GPU_NAMES, "--gpu accepts the GPUs in this table"
DEFAULT_GPU = "h100"
CPU = Machine(
    "cpu",
    "CPU",
    False,
    _BY_BYTES
    | {key: Constant(float(value), of["source"]) for of in _KNOWN["cpu"] for key, value in of["constants"].items()},
)
assert set(CPU.constants) == set(CONSTANTS), "a machine has every constant"
