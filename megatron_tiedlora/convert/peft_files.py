r"""What PEFT's adapter folders have in common: which modules a config adapts, and the tensors of these modules.

What a kind of adapter adds to a module is left to `peft_methods`. `target_modules` and `exclude_modules` are a list of
names or name endings, or a pattern for whole names. The patterns of `rank_pattern` and `alpha_pattern` match whole
names or their endings after a dot.

PEFT matches a pattern with `re`, which can take exponential time. Here the pattern engine of pydantic matches it, which
never backtracks. Only pieces that mean the same there are accepted, and none of them repeats a group. For one-line
ASCII names the result is that of `re`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter

from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.shapes import BlockShape, LinearShape
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import read_header, read_tensors
from megatron_tiedlora.convert.export_peft import target_modules

T = TypeVar("T")
_LARGEST_RANK = 2**20
# Fields that do not change what any kind of adapter computes for linear layers, or that are read below.
_HARMLESS = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type"),
    *("inference_mode", "runtime_config", "r", "bias", "target_modules", "layers_to_transform", "layers_pattern"),
    "fan_in_fan_out",  # PEFT itself drops it for linear layers
}
_LONGEST_PATTERN = 1000
_DEEPEST = 50  # of the groups in a pattern
_LONGEST_PATTERNS = 50_000  # all patterns of a field together; 126 layers of 7 whole names have 30,000
_PIECE = re.compile(r"[A-Za-z0-9_|)^$]|\(\?:|\(|\\\.|(?:\.|\[0-9\])[*+]?")
_ACCEPTED = (
    rf"letters, digits, _, \., ., .*, .+, \d+, [0-9]+, |, ^, $ and groups without repetition, {_DEEPEST}"
    rf" deep, at most {_LONGEST_PATTERN:,} characters"
)


class Module(NamedTuple):
    """A stored module that a config adapts.

    Attributes:
        layer: 1-based.
        name: its name below the layer ("self_attn.q_proj").
    """

    layer: int
    name: str


Shapes = Mapping[str, Callable[[Module], tuple[int, ...]]]  # of a module's tensors, by their names below it


def modules_of(block: BlockShape) -> dict[str, tuple[int, int]]:
    """(in, out) of the stored modules that are adaptable linears or parts of one, by their names below the block."""
    return {
        stored.module: (linear.in_size, stored.of or size)
        for linear in block.adaptable.values()
        for stored, size in zip(linear.sources, linear.blocks, strict=True)
    }


def adapted_linears(adapted: Collection[Module], source: ModelSource) -> dict[str, LinearShape]:
    """The adaptable linears, by target name, of which one of the modules `adapted` is a part."""
    names = {module.name for module in adapted}
    return {
        target: linear
        for target, linear in source.shape.block.adaptable.items()
        if any(stored.module in names for stored in linear.sources)
    }


def reject_other_fields(file: Path, content: Mapping[str, Any], *, kind: str, harmless: Collection[str]) -> None:
    """Raise UserError if biases are trained, or if a field is set that is neither harmless nor read.

    Such a field changes the computation, or may change it in a future version of PEFT.
    """
    if content.get("bias") not in (None, "none"):
        raise UserError(f"{file}: bias = {shown(content['bias'])} trains biases; only 'none' is supported")
    for name, value in content.items():
        if name not in _HARMLESS and name not in harmless and value:
            raise UserError(f"{file}: {as_given(name)} = {shown(value)} is not a plain {kind}; only that is supported")


def read_rank(rank: Any, what: str) -> int:
    """The rank that is called `what` in messages. Raises UserError if it is none."""
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise UserError(f"{what} = {shown(rank)} is not an integer from 1 to {_LARGEST_RANK:,}")
    return rank


def read_by_pattern(
    file: Path,
    content: Mapping[str, Any],
    fields: tuple[str, str],
    chosen: Mapping[str, Module],
    read: Callable[[Any, str], T],
) -> tuple[dict[Module, T], tuple[str, ...]]:
    """The value that PEFT takes for each chosen module: that of the first pattern that matches its name or an ending of
    it, in the order of the file (PEFT sorts them as it saves). Also returns a note if a pattern decides for no module.

    Args:
        fields: names of the value for all other modules, and of the object {pattern: value}.
        read: checks a value, which the second argument names in messages.

    Raises:
        UserError: a value or a pattern is not accepted.
    """
    default, what = read(content.get(fields[0]), f"{file}: {fields[0]}"), f"{file}: {fields[1]}"
    patterns = {} if content.get(fields[1]) is None else content[fields[1]]
    if not isinstance(patterns, dict):
        raise UserError(f"{what} = {shown(patterns)} is not an object {{pattern: value}}; leave it out if it is empty")
    find = pattern_finder(patterns, what=what)
    values = {pattern: read(value, f"{what}: {shown(pattern)}") for pattern, value in patterns.items()}
    found = {module: find(name) for name, module in chosen.items()}
    used = set(found.values())
    unused = [pattern for pattern in values if pattern not in used]
    notes = (f"{what}: {shown(unused)} decides for no adapted module",) if unused else ()
    return {module: default if key is None else values[key] for module, key in found.items()}, notes


def chosen_modules(file: Path, content: Mapping[str, Any], source: ModelSource) -> dict[str, Module]:
    """The modules that the config adapts, by their whole names. PEFT's own rules decide.

    Raises:
        UserError: it adapts others, layers that `source` does not have, or none.
    """
    block, modules = source.shape.block, modules_of(source.shape.block)
    words = target_modules(block, block.adaptable)
    targets, layers = content.get("target_modules"), content.get("layers_to_transform")
    if isinstance(targets, list) and targets:
        for name in targets:
            if not isinstance(name, str) or name.rpartition(".")[2] not in words:
                supported = ", ".join(words)
                raise UserError(f"{file}: target module {as_given(name)} is not supported. Supported: {supported}")
    elif not isinstance(targets, str) or targets == "all-linear":
        raise UserError(f"{file}: target_modules = {shown(targets)} is not supported; list {', '.join(words)}")
    if not (layers is None or type(layers) is int or isinstance(layers, list)):
        raise UserError(f"{file}: layers_to_transform = {shown(layers)} is neither a layer nor a list of layers")
    chosen = [layers] if isinstance(layers, int) else layers or range(source.shape.num_layers)
    for layer in chosen:
        if type(layer) is not int or not 0 <= layer < source.shape.num_layers:
            raise UserError(
                f"{file}: layers_to_transform has {shown(layer)}, but {source.name} has layers 0 to"
                f" {source.shape.num_layers - 1}; give the adapter's own base with --model"
            )
    is_target = name_matcher(targets, what=f"{file}: target_modules")
    is_excluded = name_matcher(content.get("exclude_modules") or [], what=f"{file}: exclude_modules")
    whole_names, of_chosen = frozenset(targets if isinstance(targets, list) else ()), frozenset(chosen)
    found = {
        name: Module(layer + 1, module)
        for layer in range(source.shape.num_layers)
        for module in modules
        if is_target(name := f"{block.source.format(index=layer)}.{module}")
        and not is_excluded(name)
        # layers_to_transform does not apply to a module that is named in full.
        and (name in whole_names or layer in of_chosen)
    }
    if not found:
        raise UserError(f"{file}: target_modules {shown(targets)} match no {', '.join(words)} of {source.name}")
    return found


def read_factors(
    folder: Path,
    chosen: Mapping[str, Module],
    of_module: Shapes,
    source: ModelSource,
    *,
    kind: str,
    shared: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[Module, tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """The fp32 tensors of each chosen module and the shared ones, in the order of `of_module` and `shared`.

    Args:
        kind: the name of the kind of adapter, for messages.
        shared: shapes of the tensors that all modules share, by name.

    Raises:
        UserError: a tensor is missing, does not belong to a chosen module, or has another shape than `source` needs.
    """
    file, shared = folder / WEIGHTS_FILE, shared or {}
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder / 'adapter_model.bin'}: pickled weights are not read; save them as {WEIGHTS_FILE}")
    keys = {module: [f"base_model.model.{name}.{factor}" for factor in of_module] for name, module in chosen.items()}
    shapes = dict(shared)
    for module, names in keys.items():
        shapes |= zip(names, (shape(module) for shape in of_module.values()), strict=True)
    found = read_header(file).shapes
    for key, shape in found.items():
        if key not in shapes:
            raise UserError(f"{file}: {_why_not_read(key, of_module, source, kind=kind)}")
        if shape != shapes[key]:
            raise UserError(
                f"{file}: {key} has shape {shown(shape)}, but with its rank in {CONFIG_FILE} and {source.name} it must"
                f" be {shapes[key]}; give the adapter's own base with --model"
            )
    for key in shapes:
        if key not in found:
            user = "every module uses it" if key in shared else f"{CONFIG_FILE} targets its module"
            raise UserError(
                f"{file}: {key} is missing, but {user}; copy the adapter again, or give its own base with --model"
            )
    values = read_tensors(file, shapes)
    of_modules = {module: tuple(values[key] for key in names) for module, names in keys.items()}
    return of_modules, [values[key] for key in shared]


def _why_not_read(key: str, factors: Collection[str], source: ModelSource, *, kind: str) -> str:
    """Why the tensor `key` belongs to no chosen module."""
    block, num_layers = source.shape.block, source.shape.num_layers
    layers = re.escape(block.source).replace(re.escape("{index}"), r"(\d+)")
    names, ends = ("|".join(map(re.escape, words)) for words in (modules_of(block), factors))
    match = re.fullmatch(rf"base_model\.model\.{layers}\.(?:{names})\.(?:{ends})", key)
    if match is None:
        words = ", ".join(target_modules(block, block.adaptable))
        return f"{as_given(key)} is not a {kind} factor of {words}; only these are supported"
    if (layer := int(match[1])) < num_layers:
        return f"{key} is present, but {CONFIG_FILE} does not target its module"
    return (
        f"{key} is for layer {layer}, but {source.name} has layers 0 to {num_layers - 1}; give the adapter's own base"
        " with --model"
    )


def name_matcher(modules: Any, *, what: str) -> Callable[[str], bool]:
    """A function that tells whether a module's dotted name matches `modules`, by PEFT's rules.

    Args:
        modules: a pattern for the whole name, or a list of names or their endings after a dot.
        what: the file and the field, for messages.

    Raises:
        UserError: the pattern has other pieces or is too long, or it is not a list of strings.
    """
    if isinstance(modules, str):
        return _matcher(modules, what, "Write a list of names", start="^")
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"{what} = {shown(modules)} is neither a pattern nor a list of names. Write a list of names")
    names = frozenset(modules)

    def matches(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[first:]) in names for first in range(len(parts)))

    return matches


def pattern_finder(patterns: Collection[str], *, what: str) -> Callable[[str], str | None]:
    """A function that returns the first pattern that matches a module's dotted name, or an ending of it after a dot;
    None if none does.

    Args:
        what: the file and the field, for messages.

    Raises:
        UserError: a pattern has other pieces, or they are too long.
    """
    if (length := sum(map(len, patterns))) > _LONGEST_PATTERNS:
        too_long = f"its patterns have {length:,} characters; at most {_LONGEST_PATTERNS:,} are read"
        raise UserError(f"{what}: {too_long}. Write endings of names")
    matchers = {pattern: _matcher(pattern, what, "Write endings of names", start=r"^(?:.*\.)?") for pattern in patterns}
    return lambda name: next((pattern for pattern, matches in matchers.items() if matches(name)), None)


def _matcher(pattern: str, what: str, instead: str, *, start: str) -> Callable[[str], bool]:
    """A function that tells whether a name is something that `start` matches, and then the pattern.

    `instead` says what to write if the pattern is rejected.
    """
    plain = pattern.replace(r"\d", "[0-9]") if len(pattern) <= _LONGEST_PATTERN else ""
    pieces = _PIECE.findall(plain)
    depths = list(accumulate(piece.startswith("(") - (piece == ")") for piece in pieces))
    if not pieces or "".join(pieces) != plain or min(depths) < 0 or depths[-1] or max(depths) > _DEEPEST:
        raise UserError(f"{what}: the pattern {shown(pattern)} is not read; {_ACCEPTED} are. {instead}")
    kind: Any = Annotated[str, Field(pattern=f"{start}(?:{plain})$")]
    return TypeAdapter(kind, config=ConfigDict(regex_engine="rust-regex")).validator.isinstance_python
