r"""Reads PEFT's LoRA adapters as exactly equal native adapters. `vera_files` reads PEFT's VeRA adapters.

PEFT's LoRA adds s_p B_p A_p to module p, with s_p = alpha_p / r_p, or alpha_p / sqrt(r_p) with use_rslora.
`rank_pattern` and `alpha_pattern` set a different r or alpha for some modules. The native scale is the largest s_p. If
s_p is smaller, B is multiplied by s_p / scale in fp64 and rounded to fp32 once. This is exact for a power of two.

Some of PEFT's modules are fused into one linear in this package. If they all have the same A, the native adapter has
this A and the stacked rows of B. Otherwise its A stacks the A_p, its B is block-diagonal, and its rank is the sum of
the r_p. The native rank is the largest rank of any linear and layer, and smaller ranks are padded with zeros. Modules
and layers without an adapter get zero rows of B.

Padding has zero rows of A and zero columns of B, so it has no gradient and stays zero in training. But training changes
zero rows of B that belong to a non-zero A, and the zero blocks of a block-diagonal B. If B was scaled down, a step of
AdamW is relatively larger. `Native.apart` describes which of these cases applies.

PEFT's rules decide which modules a config adapts. `target_modules` and `exclude_modules` are a list of names or name
endings, or a pattern for full names. The patterns of `rank_pattern` and `alpha_pattern` match full names or their
endings after a dot. PEFT matches patterns with `re`, which can take exponential time. This module uses pydantic's regex
engine, which never backtracks. It accepts only syntax with the same meaning in both engines, and no repeated groups.
For one-line ASCII names the result is the same as with `re`.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor
from torch.nn.functional import pad

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config, targets_of
from megatron_tiedlora.base.messages import UserError, as_given, shown
from megatron_tiedlora.base.shapes import BlockShape, LinearShape
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import read_header, read_tensors
from megatron_tiedlora.config.settings import LARGEST_ALPHA, SMALLEST_ALPHA
from megatron_tiedlora.convert.export_peft import target_modules
from megatron_tiedlora.parallel.agreement import SentTensor

T = TypeVar("T")
_LARGEST_RANK = 2**20
# Fields that do not change what any kind of adapter computes for linear layers, or that are read below.
_HARMLESS = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type"),
    *("inference_mode", "runtime_config", "r", "bias", "target_modules", "layers_to_transform", "layers_pattern"),
    "fan_in_fan_out",  # PEFT ignores it for linear layers
}
_LONGEST_PATTERN = 1000
_DEEPEST = 50  # the deepest nesting of groups in a pattern
_LONGEST_PATTERNS = 50_000  # characters of all patterns of a field; full names of 126 layers x 7 modules have 30,000
_PIECE = re.compile(r"[A-Za-z0-9_|)^$]|\(\?:|\(|\\[.b]|(?:\.|\[0-9\])(?:[*+]\??)?")
_ACCEPTED = (
    rf"letters, digits, _, \., ., .*, .*?, .+, \d+, [0-9]+, \b, |, ^, $ and groups without repetition, {_DEEPEST}"
    rf" deep, at most {_LONGEST_PATTERN:,} characters"
)


class Module(NamedTuple):
    """A stored module that a config adapts.

    Attributes:
        layer: the 1-based index of its layer.
        name: its name inside the layer, such as "self_attn.q_proj".
    """

    layer: int
    name: str


_OTHER_TOWER = re.compile(r"\.(?:vision_tower|multi_modal_projector)\.")
Shapes = Mapping[str, Callable[[Module], tuple[int, ...]]]  # shapes of a module's tensors, by their names inside it


def modules_of(block: BlockShape) -> dict[str, tuple[int, int]]:
    """Return the sizes (in, out) of the stored modules of adaptable linears, by their names inside a block."""
    return {
        stored.module: (linear.in_size, stored.of or size)
        for linear in block.adaptable.values()
        for stored, size in zip(linear.sources, linear.blocks, strict=True)
    }


def named_as_in(folder: Path, source: ModelSource) -> ModelSource:
    """Return `source` with the names that its blocks have in the PEFT adapter in `folder`."""
    # A text tower has other names in multimodal models of transformers before 4.52, and in a model of its own.
    with suppress(UserError):
        keys = "\n".join(read_header(folder / WEIGHTS_FILE).entries)
        if found := re.search(r"(?m)^base_model\.model\.((?:language_model\.|model\.){1,2}layers\.)\d", keys):
            block = replace(source.shape.block, module=found[1] + "{index}")
            return replace(source, shape=replace(source.shape, block=block))
    return source


def adapted_linears(adapted: Collection[Module], source: ModelSource) -> dict[str, LinearShape]:
    """Return the adaptable linears that contain one of the modules `adapted`, by target name."""
    names = {module.name for module in adapted}
    return {
        target: linear
        for target, linear in source.shape.block.adaptable.items()
        if any(stored.module in names for stored in linear.sources)
    }


def reject_other_fields(file: Path, content: Mapping[str, Any], *, kind: str, harmless: Collection[str]) -> None:
    """Raise UserError if biases are trained, or if an unknown field is set.

    An unknown field changes the computation, or may change it in a future version of PEFT."""
    if content.get("bias") not in (None, "none"):
        raise UserError(f"{file}: bias = {shown(content['bias'])} trains biases; only 'none' is supported")
    for name, value in content.items():
        if name not in _HARMLESS and name not in harmless and value:
            why = f"is not a plain {kind}; only a plain {kind} is supported"
            raise UserError(f"{file}: {as_given(name)} = {shown(value)} {why}")


def read_rank(rank: Any, what: str) -> int:
    """Return `rank`, which error messages call `what`. Raise UserError if it is not a valid rank."""
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
    """Return the value that PEFT uses for each chosen module, and a note about unused patterns.

    The value is set by the first pattern in the file that matches the module's name or an ending of it, or else by the
    default. (PEFT sorts the patterns when it saves them.)

    Args:
        fields: the names of the default value's field and of the field {pattern: value}.
        read: checks a value; its second argument is the value's name in messages.

    Raises:
        UserError: a value or a pattern is not accepted.
    """
    default, what = read(content.get(fields[0]), f"{file}: {fields[0]}"), f"{file}: {fields[1]}"
    patterns = {} if content.get(fields[1]) is None else content[fields[1]]
    if not isinstance(patterns, dict):
        raise UserError(f"{what} = {shown(patterns)} is not an object {{pattern: value}}; remove it if it is empty")
    find = pattern_finder(patterns, what=what)
    values = {pattern: read(value, f"{what}: {shown(pattern)}") for pattern, value in patterns.items()}
    found = {module: find(name) for name, module in chosen.items()}
    used = set(found.values())
    unused = [pattern for pattern in values if pattern not in used]
    notes = (f"{what}: {shown(unused)} applies to no adapted module",) if unused else ()
    return {module: default if key is None else values[key] for module, key in found.items()}, notes


def chosen_modules(file: Path, content: Mapping[str, Any], source: ModelSource) -> dict[str, Module]:
    """Return the modules of `source` that a config adapts according to PEFT's rules, by their full names.

    Raises:
        UserError: the config names unsupported modules or layers that `source` does not have, or adapts no module.
    """
    block, modules = source.shape.block, modules_of(source.shape.block)
    words = target_modules(block, block.adaptable)
    targets, layers = content.get("target_modules"), content.get("layers_to_transform")
    if isinstance(targets, list) and targets:
        for name in targets if not block.is_tower else ():  # names may also be of modules of other towers
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
        if is_target(name := f"{block.module_name(layer + 1)}.{module}")
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
    shared: Mapping[str, tuple[int, ...]],
) -> tuple[dict[Module, tuple[Tensor, ...]], list[Tensor]]:
    """Return the fp32 tensors of each chosen module, and the shared ones, in the order of `of_module` and `shared`.

    Args:
        of_module: functions that return the shape of a module's tensor, by the tensor's name inside the module.
        kind: the kind of adapter for error messages.
        shared: shapes of the tensors that all modules share, by name.

    Raises:
        UserError: a tensor is missing, does not belong to a chosen module, or its shape does not fit `source`.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder / 'adapter_model.bin'}: pickled weights are not read; save them as {WEIGHTS_FILE}")
    keys = {module: [f"base_model.model.{name}.{factor}" for factor in of_module] for name, module in chosen.items()}
    shapes = dict(shared)
    for module, names in keys.items():
        shapes |= zip(names, (shape(module) for shape in of_module.values()), strict=True)
    found = read_header(file).shapes
    shapes |= (others := {key: shape for key, shape in found.items() if _OTHER_TOWER.search(key)})
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
    for key in others:  # B is zero after training on text
        if not key.endswith(".lora_A.weight") and values[key].any():
            why = "is of another tower, whose adapter a native adapter cannot have"
            raise UserError(f"{file}: {key} {why}; train the adapter with target_modules of the text tower only")
    of_modules = {module: tuple(values[key] for key in names) for module, names in keys.items()}
    return of_modules, [values[key] for key in shared]


def _why_not_read(key: str, factors: Collection[str], source: ModelSource, *, kind: str) -> str:
    """Return why the tensor `key` belongs to no chosen module."""
    if kind == "VeRA" and key in ("base_model.vera_A", "base_model.vera_B"):
        return f"{key} is present, but {CONFIG_FILE} has save_projection = false; set it to true to use the tensor"
    block, num_layers = source.shape.block, source.shape.num_layers
    layers = re.escape(block.module_name(1).removesuffix("0")) + r"(\d+)"
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
    """Return a function that returns whether a module's dotted name matches `modules`, by PEFT's rules.

    Args:
        modules: a pattern for the full name, or a list of names or their endings after a dot.
        what: the file and the field, for messages.

    Raises:
        UserError: the pattern has unsupported syntax or is too long, or `modules` is not a list of strings.
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
    """Return a function that returns the first pattern that matches a dotted name or its end after a dot, or None.

    Args:
        what: the file and the field, for messages.

    Raises:
        UserError: a pattern has unsupported syntax, or the patterns are too long.
    """
    if (length := sum(map(len, patterns))) > _LONGEST_PATTERNS:
        too_long = f"its patterns have {length:,} characters; at most {_LONGEST_PATTERNS:,} are read"
        raise UserError(f"{what}: {too_long}. Write endings of names")
    matchers = {pattern: _matcher(pattern, what, "Write endings of names", start=r"^(?:.*\.)?") for pattern in patterns}
    return lambda name: next((pattern for pattern, matches in matchers.items() if matches(name)), None)


def _matcher(pattern: str, what: str, instead: str, *, start: str) -> Callable[[str], bool]:
    """Return a function that returns whether a full name matches `start` followed by the pattern.

    If the pattern is rejected, the error message ends with `instead`, which names a supported form.
    """
    digits = pattern.replace(r"[\d]{1,}", r"\d+")  # as Unsloth writes it
    plain = digits.replace(r"\d", "[0-9]") if len(pattern) <= _LONGEST_PATTERN else ""
    pieces = _PIECE.findall(plain)
    depths = list(accumulate(piece.startswith("(") - (piece == ")") for piece in pieces))
    if not pieces or "".join(pieces) != plain or min(depths) < 0 or depths[-1] or max(depths) > _DEEPEST:
        raise UserError(f"{what}: the pattern {shown(pattern)} is not supported. Supported: {_ACCEPTED}. {instead}")
    kind: Any = Annotated[str, Field(pattern=f"{start}(?:{plain})$")]
    return TypeAdapter(kind, config=ConfigDict(regex_engine="rust-regex")).validator.isinstance_python


# The equal native adapter ---------------------------------------------------------------------------------------------


_HARMLESS_OF_LORA = {
    *("lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_dropout", "exclude_modules"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# With other values (pissa, olora, corda, loftq, lora_ga) PEFT changes the base weights when it loads the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class Pair(NamedTuple):
    """The factors and the scale of one module's update, scale B A, with A (r, in) and B (rows, r) in fp32."""

    a: Tensor
    b: Tensor
    scale: float = 1.0


Lora = Mapping[Module, Pair]


def read_lora(folder: Path, content: Mapping[str, Any], source: ModelSource) -> tuple[Lora, tuple[str, ...]]:
    """Return a PEFT LoRA of `source`, and notes for the user.

    Raises:
        UserError: it is not a plain LoRA, adapts unsupported modules, or its tensors do not fit.
    """
    file, source = folder / CONFIG_FILE, named_as_in(folder, source)
    if (start := content.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights = {shown(start)} changes the base weights too; convert it to a plain LoRA with"
            " PEFT (path_initial_model_for_weight_conversion) first"
        )
    reject_other_fields(file, content, kind="LoRA", harmless=_HARMLESS_OF_LORA)
    chosen, sizes = chosen_modules(file, content, source), modules_of(source.shape.block)
    ranks, rank_notes = read_by_pattern(file, content, ("r", "rank_pattern"), chosen, read_rank)
    alphas, alpha_notes = read_by_pattern(file, content, ("lora_alpha", "alpha_pattern"), chosen, read_alpha)
    stored: Shapes = {
        "lora_A.weight": lambda module: (ranks[module], sizes[module.name][0]),
        "lora_B.weight": lambda module: (sizes[module.name][1], ranks[module]),
    }
    factors, _ = read_factors(folder, chosen, stored, source, kind="LoRA", shared={})
    divisor = math.sqrt if content.get("use_rslora") else float
    lora = {key: Pair(a, b, alphas[key] / divisor(ranks[key])) for key, (a, b) in factors.items()}
    return lora, (*rank_notes, *alpha_notes)


class Native(NamedTuple):
    """The config and full fp32 tensors of a native adapter that equals a PEFT adapter.

    `apart` is the reason why further training differs from PEFT's; None if it does not differ."""

    config: AdapterConfig
    state: Mapping[str, SentTensor]
    apart: str | None = None


def native_lora(lora: Lora, source: ModelSource) -> Native:
    """Return the native `lora` that equals a PEFT LoRA of `source`.

    The result has one scale, and one A per linear and layer. Its targets are all linears with an adapted module."""
    layers = tuple(sorted({layer for layer, _ in lora}))
    scale = max(pair.scale for pair in lora.values())
    adapted, joined = adapted_linears(lora, source), {}
    for target in targets_of(source.shape, tuple(adapted)):
        joined[target] = _joined(lora, layers, scale=scale, linear=adapted[target.name])
    full_rank = max(a.shape[1] for a, _, _ in joined.values())
    config = make_adapter_config(
        "lora", rank=full_rank, alpha=scale * full_rank, layers=layers, targets=tuple(joined), seed=0
    )
    state = {name: torch.ones(config.shape(name)) for name in config.tensors}
    for target, (a, b, _) in joined.items():
        state[f"{target.prefix}A"] = pad(a, (0, 0, 0, full_rank - a.shape[1]))
        state[f"{target.prefix}B"] = pad(b, (0, full_rank - a.shape[1]))
    if not all(together for _, _, together in joined.values()):
        apart = "modules that share one A here (q, k and v; gate and up) have separate A matrices, or no adapter"
        return Native(config, state, apart)
    one_scale = len({pair.scale for pair in lora.values()}) == 1
    return Native(config, state, None if one_scale else "its modules have different scales alpha / r, but one here")


def read_alpha(alpha: Any, what: str) -> float:
    """Return `alpha`, which error messages call `what`. Raise UserError if a native adapter cannot have this value."""
    if type(alpha) not in (int, float):
        raise UserError(f"{what} = {shown(alpha)} is not a number")
    if not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
        bounds = f"{SMALLEST_ALPHA:g} and {LARGEST_ALPHA:g}"
        raise UserError(f"{what} = {shown(alpha)} is not between {bounds}; scale lora_B instead")
    return float(alpha)


def _joined(lora: Lora, layers: tuple[int, ...], *, scale: float, linear: LinearShape) -> tuple[Tensor, Tensor, bool]:
    """Return the native A (n, R, in) and B (n, out, R) of a fused linear, and whether its modules have a common A.

    A is common if in each layer either no module or every module has an adapter, with the same A. A layer needs the
    rank of its modules if they have a common A, else the sum of their ranks. R is the maximum over the layers."""
    modules = list(dict.fromkeys(stored.module for stored in linear.sources))
    by_layer = [{name: lora[Module(layer, name)] for name in modules if (layer, name) in lora} for layer in layers]
    shared = [all(torch.equal(pair.a, next(iter(here.values())).a) for pair in here.values()) for here in by_layer]
    ranks = [[len(pair.a) for pair in here.values()] for here in by_layer]
    full_rank = max((max if one else sum)(of) for of, one in zip(ranks, shared, strict=True) if of)
    blocks = list(zip(linear.sources, linear.blocks, accumulate((0, *linear.blocks[:-1])), strict=True))
    a = torch.zeros(len(layers), full_rank, linear.in_size)
    b = torch.zeros(len(layers), linear.out_size, full_rank)
    for index, here in enumerate(by_layer):
        column = 0
        for module, pair in here.items():
            columns = slice(column, column + len(pair.a))
            a[index, columns] = pair.a
            scaled = (pair.b.double() * (pair.scale / scale)).float()
            for stored, size, start in blocks:
                if stored.module == module:
                    b[index, start : start + size, columns] = scaled[stored.start : stored.start + size]
            column = 0 if shared[index] else columns.stop
    together = all(one and len(here) in (0, len(modules)) for one, here in zip(shared, by_layer, strict=True))
    return a, b, together
