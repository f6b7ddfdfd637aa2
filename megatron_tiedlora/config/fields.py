"""What the settings of every command have in common: a field is a name, a type, a default, a help text and a group.

Owns how fields are declared and how values become frozen settings; which settings there are is each command's, and
`cli.py` turns the fields of any command into flags and YAML names.
"""

from __future__ import annotations

import os
import shlex
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.wording import nearest_name

_BOUND = 2**53  # of a number that is a setting: a float holds every whole one below it
LONGEST_WAIT_MINUTES = 7 * 24 * 60  # for a rank; the clocks below us count milliseconds, some in 32 bits

AnySettings = TypeVar("AnySettings", bound="CommandSettings")


def setting_field(
    group: str,
    help_text: str,
    default: Any = ...,
    *,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    **constraints: Any,
) -> Any:
    """A field of a `CommandSettings`.

    Args:
        group: a key of the class's `groups`.
        default: left out where the command needs the value, or fills it in from other values.
        choices: of a text, where they are not known when the code is written (else let the type be a Literal).
        flag: a shorter flag beside the field's name, such as one that pydantic's own attributes take as a name.
        constraints: pydantic's, such as `ge=1`.
    """
    extra: dict[str, Any] = {"group": group, **({"choices": list(choices)} if choices is not None else {})}
    if flag is not None:
        extra["flag"] = flag
    return Field(default=default, description=help_text, json_schema_extra=extra, **constraints)


def optional_field(group: str, help_text: str, **constraints: Any) -> Any:
    """A field that may be left out, and is None then; the arguments are those of `setting_field`."""
    return setting_field(group, help_text, None, **constraints)


def field_group(field: FieldInfo) -> str:
    """The group that a field was declared in."""
    return str(_extra(field)["group"])


def field_choices(field: FieldInfo) -> tuple[str, ...] | None:
    """The choices that a field was declared with; None where its type alone says what it takes."""
    choices = _extra(field).get("choices")
    return None if choices is None else tuple(choices)


def field_flags(name: str, field: FieldInfo) -> tuple[str, ...]:
    """The flags that set a field on the command line: the first one is named after it."""
    flag = _extra(field).get("flag")
    return (f"--{name}", *(() if flag is None else (f"--{flag}",)))


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    assert isinstance(field.json_schema_extra, dict), "declare settings with setting_field"
    return field.json_schema_extra


class CommandSettings(BaseModel):
    """The settings of one start of a command, validated and frozen. Subclasses declare fields with `setting_field`.

    Attributes:
        prog: the command's file name, for its help.
        about: what the command does, for its help.
        groups: name and description of each group of flags, in the order of the help.
        missing: by field, what to say beside "is needed" where a value is missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    prog: ClassVar[str]
    about: ClassVar[str]
    groups: ClassVar[Mapping[str, str]]
    missing: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def default_text(cls, name: str) -> str:
        """The default of a field as its help shows it; '' where the help text says it, or there is none."""
        field = cls.model_fields[name]
        if field.is_required() or field.default is None:
            return ""
        return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
        parts = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(part, bool) for part in parts):
            raise ValueError(f"--{info.field_name} {shown(value)}: true and false are no value of it")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_extremes(cls, value: Any, info: ValidationInfo) -> Any:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float) and abs(part) >= _BOUND:
                raise ValueError(f"--{info.field_name} {shown(value)}: no such number makes sense there")
            if isinstance(part, str) and ("\0" in part or not _is_system_text(part)):
                raise ValueError(f"--{info.field_name} {shown(value)}: holds what is not text")
        return value

    @model_validator(mode="after")
    def _check_choices(self) -> CommandSettings:
        for name, field in type(self).model_fields.items():
            choices, value = field_choices(field), getattr(self, name)
            if choices is not None and value is not None and value not in choices:
                known = ", ".join(repr(choice) for choice in choices)
                near = nearest_name(value, choices)
                raise ValueError(f"--{name} {as_given(value)}: input should be one of {known}{near}")
        return self


def _kinds_in(annotation: Any) -> set[Any]:
    """A type and all that it is made of."""
    return {annotation}.union(*map(_kinds_in, typing.get_args(annotation)))


def _is_system_text(text: str) -> bool:
    """Whether it can name a file; bytes of a name that are not UTF-8 come from the command line as surrogates."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def validate_settings(values: Mapping[str, Any], kind: type[AnySettings]) -> AnySettings:
    """Validate flat names and values into settings of `kind`.

    Raises:
        UserError: an unknown name (with the nearest known one) or a value out of range, in one line.
    """
    for name in values:
        if name not in kind.model_fields:
            raise UserError(f"unknown setting {shown(name)}{nearest_name(str(name), kind.model_fields)}; see --help")
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(_one_line(error, kind)) from None
    except UnicodeEncodeError as error:  # pydantic carries no message with bytes of a name that are not UTF-8
        raise UserError(error.object) from None


def _one_line(error: ValidationError, kind: type[CommandSettings]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        hint = kind.missing.get(name)
        return f"--{name} is needed" + (f": {hint}" if hint else "")
    return f"--{name} {as_given(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def shell_words(name: str, text: str | None) -> list[str]:
    """The words of a setting that is written as in a shell; none where it is not given.

    Args:
        name: of the setting, for the message.

    Raises:
        ValueError: a quotation that is not closed.
    """
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ValueError(f"--{name} {text}: {str(error).lower()}") from None
