"""The common ground of all commands' settings: a field has a name, type, default, help text and group.

Owns how fields are declared and how values become frozen settings. Each command declares its own settings, and
`cli.py` turns the fields of any command into flags and YAML names.
"""

from __future__ import annotations

import os
import re
import shlex
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.shapes import GATE_UP, QKV, TARGET_NAMES
from megatron_tiedlora.base.wording import nearest_name
from megatron_tiedlora.config.other_names import unknown_names, value_hint, value_meant

_BOUND = 2**53  # limit of numeric settings: a float represents every integer below it
LONGEST_WAIT_MINUTES = 7 * 24 * 60  # for a rank; libraries below us count milliseconds, some in 32 bits

_POWER_OF_TEN = re.compile(r"\d+(\.\d*)?e\+?1?\d", re.IGNORECASE)

AnySettings = TypeVar("AnySettings", bound="CommandSettings")


def setting_field(
    group: str,
    help_text: str,
    default: Any = ...,
    *,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    words: bool = False,
    **constraints: Any,
) -> Any:
    """A field of a `CommandSettings`.

    Args:
        group: a key of the class's `groups`.
        default: left out if the command requires the value, or fills it in from other values.
        choices: allowed strings that are only known at run time (else let the type be a Literal).
        flag: the field's name for users, where pydantic reserves it for an attribute.
        words: its values are separate words on the command line, and a list in a file.
        constraints: pydantic constraints, such as `ge=1`.
    """
    extra: dict[str, Any] = {"group": group, "choices": choices, "flag": flag, "words": words}
    return Field(default=default, description=help_text, json_schema_extra=extra, **constraints)


def optional_field(group: str, help_text: str, **constraints: Any) -> Any:
    """A field that may be left out and is then None. The arguments are those of `setting_field`."""
    return setting_field(group, help_text, None, **constraints)


def field_group(field: FieldInfo) -> str:
    """The group that a field was declared in."""
    return str(_extra(field)["group"])


def field_choices(field: FieldInfo) -> tuple[str, ...] | None:
    """The choices that a field was declared with; None if only its type limits the values."""
    choices = _extra(field)["choices"]
    return None if choices is None else tuple(choices)


def field_flag(name: str, field: FieldInfo) -> str:
    """The name of a field on the command line and in files."""
    return str(_extra(field)["flag"] or name)


def takes_words(field: FieldInfo) -> bool:
    """Whether the values of a field are separate words on the command line."""
    return bool(_extra(field)["words"])


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    assert isinstance(field.json_schema_extra, dict), "declare settings with setting_field"
    return field.json_schema_extra


class CommandSettings(BaseModel):
    """The settings of one start of a command, validated and frozen. Subclasses declare fields with `setting_field`.

    Attributes:
        prog: `tiedlora NAME`, for its help.
        about: what the command does, for its help.
        usage: what follows the command's name in the first line of its help.
        groups: name and description of each group of flags, in the order of the help.
        missing: by field, a hint to add to "is required" if the value is missing.
        instead: pairs of fields that exclude each other. The one on the command line replaces the other in a file.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        json_schema_extra=lambda schema: _tidy_schema(schema),
    )

    prog: ClassVar[str]
    about: ClassVar[str]
    usage: ClassVar[str] = "[--FLAG VALUE ...]"
    groups: ClassVar[Mapping[str, str]]
    missing: ClassVar[Mapping[str, str]] = {}
    instead: ClassVar[Sequence[tuple[str, str]]] = ()

    def __init__(self, **values: Any) -> None:
        """Raises UserError in one line: all names that are unknown, or the first value that is wrong."""
        if unknown := unknown_names("setting", values, type(self).model_fields):
            raise UserError(f"{unknown}; see --help")
        try:
            super().__init__(**{name: _as_meant(name, value, type(self)) for name, value in values.items()})
        except ValidationError as error:
            raise UserError(_one_line(error, type(self))) from None
        except UnicodeEncodeError as error:  # pydantic cannot carry a message with bytes that are not UTF-8
            raise UserError(error.object) from None

    @classmethod
    def default_text(cls, name: str) -> str:
        """The default of a field as its help shows it; '' if the help text contains it, or there is none."""
        field = cls.model_fields[name]
        if field.is_required() or field.default is None:
            return ""
        if isinstance(field.default, tuple):
            return ",".join(map(str, field.default))
        return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would accept true as 1."""
        kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
        parts = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(part, bool) for part in parts):
            raise ValueError(f"--{info.field_name} {shown(value)}: expected a number, not a boolean")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _reject_extremes(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        flag = field_flag(info.field_name, cls.model_fields[info.field_name])
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float) and abs(part) >= _BOUND:
                raise ValueError(f"--{flag} {shown(value)}: out of range; give a number below 2^53 (9e15)")
            if isinstance(part, str) and ("\0" in part or not _is_system_text(part)):
                raise ValueError(f"--{flag} {shown(value)}: contains characters that are not text")
        return value

    @model_validator(mode="after")
    def _check_choices(self) -> CommandSettings:
        for name, field in type(self).model_fields.items():
            choices, value = field_choices(field), getattr(self, name)
            for part in value if isinstance(value, tuple) else (value,):
                if choices is not None and part is not None and part not in choices:
                    known, hint = ", ".join(map(repr, choices)), value_hint(name, part, choices)
                    raise ValueError(f"--{name} {as_given(part)}: input should be one of {known}{hint}")
        return self


def _kinds_in(annotation: Any) -> set[Any]:
    """A type and all types that it is made of."""
    return {annotation}.union(*map(_kinds_in, typing.get_args(annotation)))


def _as_meant(name: str, value: Any, kind: type[CommandSettings]) -> Any:
    """A value as its field spells it: `nf4` for `NF4` or `4bit`, and the whole number 1000 for `1e3`."""
    field = kind.model_fields[name]
    kinds = _kinds_in(field.annotation)
    if isinstance(value, list | tuple):
        return [_as_meant(name, part, kind) if isinstance(part, str) else part for part in value]
    if not isinstance(value, str):
        return value
    if "," in value and any(typing.get_origin(one) is tuple for one in kinds):
        return ",".join(str(_as_meant(name, part, kind)) for part in value.split(","))
    if _POWER_OF_TEN.fullmatch(value.strip()) and int in kinds and not kinds & {float, str}:
        return int(number) if (number := float(value)).is_integer() else value
    return value_meant(name, value, (*(field_choices(field) or ()), *literal_values(kinds)))


def literal_values(kinds: Collection[Any]) -> tuple[str, ...]:
    """The values that Literal types among `kinds` allow."""
    return tuple(value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind))


def _is_system_text(text: str) -> bool:
    """Whether `text` can name a file. Bytes that are not UTF-8 come from the command line as surrogates."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def validate_settings(values: Mapping[str, Any], kind: type[AnySettings]) -> AnySettings:
    """Validate flat names and values into settings of `kind`. None stands for a value that was left out.

    Raises:
        UserError: names are unknown (the message says which are meant), or a value is out of range.
    """
    return kind(**{str(name): value for name, value in values.items() if value is not None})


def _tidy_schema(schema: dict[str, Any]) -> None:
    """Make a command's JSON schema that of its YAML files: choices as an enum, and nothing required, because values
    that are left out are filled in from others."""
    schema.pop("required", None)
    for field in schema["properties"].values():
        choices = field.pop("choices")
        del field["group"], field["flag"], field["words"]
        if choices:
            field.get("items", field)["enum"] = list(choices)


def _one_line(error: ValidationError, kind: type[CommandSettings]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    flag = field_flag(name, kind.model_fields[name]) if name in kind.model_fields else name
    if first["type"] == "value_error":
        found = first["ctx"]["error"]
        # pydantic cannot carry a message with bytes that are not UTF-8 through a validator around the others
        return found.object if isinstance(found, UnicodeEncodeError) else str(found)
    if first["type"] == "missing":
        hint = kind.missing.get(name)
        return f"--{flag} is required" + (f": {hint}" if hint else "")
    said, hint = f"--{flag} {as_given(first['input'])}", ""
    if first["type"] == "bool_parsing":
        return f"{said}: give true or false, or nothing after --{flag}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = value_hint(name, first["input"], literal_values(_kinds_in(kind.model_fields[name].annotation)))
    return f"{said}: {first['msg'][0].lower()}{first['msg'][1:]}{hint}"


def comma_separated(value: Any) -> Any:
    """The parts of a text with commas between them, or one number, as a tuple; any other value is unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",")) if value.strip() else ()
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


# Names that PEFT's users know, and the target that they are part of.
_FUSED = {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), QKV), **dict.fromkeys(("gate_proj", "up_proj"), GATE_UP)}
TARGETS_HELP = f"adapted linears of each adapted layer: all, or some of {', '.join(TARGET_NAMES)}"

BASE_HELP = (
    "storage format of the frozen linears of all blocks, 4 or 8 bits a weight; the rest of the base, and what is"
    " computed, stays in --dtype (default: --dtype too)"
)
PRODUCTS_HELP = (
    "fp8: with --base fp8, the activations and gradients that these linears multiply are rounded to fp8 too, with a"
    " scale for each row; GPUs of compute capability 8.9 or more, emulated on a CPU. The adapter reads them unrounded."
    " Scales of activations in row-parallel layers, and of gradients in column-parallel ones, depend on"
    " --tensor_parallel (default: products in --dtype)"
)
KEEP_TRANSPOSED_HELP = "with --products fp8: keep a transposed copy of their weights, one byte each, for speed"


def parse_targets(value: Any) -> Any:
    """The names of `--targets` in the order of `TARGET_NAMES`. A value that is not a list of strings is unchanged.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    names = comma_separated(value)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return names
    names = [name.strip().lower() for name in names]
    if "all" in names:
        return TARGET_NAMES
    for name in names:
        if name not in TARGET_NAMES:
            hint = f" (part of {_FUSED[name]})" if name in _FUSED else nearest_name(name, TARGET_NAMES)
            raise ValueError(f"--targets: {shown(name)} is unknown{hint}; known: {', '.join(TARGET_NAMES)}, or all")
    if not names:
        raise ValueError(f"--targets is empty; give all, or some of {', '.join(TARGET_NAMES)}")
    return tuple(name for name in TARGET_NAMES if name in names)


def flag_value(value: Any) -> str:
    """A setting's value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def shell_words(name: str, text: str | None) -> list[str]:
    """Split a setting that is written in shell syntax into words. The list is empty if `text` is None.

    Args:
        name: the setting's name, for the message.

    Raises:
        ValueError: a quotation is not closed.
    """
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ValueError(f"--{name} {text}: {str(error).lower()}") from None
