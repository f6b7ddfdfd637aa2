"""Define how commands declare their settings. A setting is a field with a name, type, default, help text and marks.

This module also validates values and creates frozen settings objects from them. Each command declares its own settings,
and `cli.py` turns the fields of any command into flags and YAML names. `marked` returns the settings with given marks.
docs/extending.md names the lists of settings that are still written by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from megatron_tiedlora.base.messages import UserError, as_given, nearest_name, shown, user_path
from megatron_tiedlora.base.methods import FACTORS
from megatron_tiedlora.base.shapes import GATE_UP, QKV, TARGET_NAMES
from megatron_tiedlora.config.other_names import unknown_names, value_hint, value_meant

_BOUND = 2**53  # limit of numeric settings: a float represents every integer below it
LONGEST_WAIT_MINUTES = 7 * 24 * 60  # for a rank; some libraries store milliseconds in 32 bits

_POWER_OF_TEN = re.compile(r"\d+(\.\d*)?e\+?1?\d", re.IGNORECASE)

AnySettings = TypeVar("AnySettings", bound="CommandSettings")


Decides = Literal["data", "model", "adapter", "training", "layout", "nothing"]
_CONSTRAINTS = ("ge", "gt", "le", "lt", "min_length")  # the constraints of pydantic that a setting may have


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The marks of a setting, in addition to its type, default and help text. `marked` selects settings by their marks.

    Attributes:
        group: a key of the class's `groups`; '' in a command without groups.
        choices: allowed strings that are only known at run time (otherwise the type is a Literal).
        flag: the name of the flag, if the field cannot have this name, such as `json`.
        metavar: placeholder for the value in the help (default: by the type).
        words: the values are separate arguments on the command line, and a list in a file.
        positional: the value is given without a flag, in the order of declaration.
        other_names: names of the setting in other tools, separated by blanks; see also `other_names.py`.
        other_values: names of its values in other tools, each with a valid value or a hint for the user.
        holds: "path" if the value is a path, "rows" if it names data files.
        decides: what the setting affects. "data": rows and tokens; "model": outputs of the frozen model; "adapter":
            the adapter's shape and initial values; "training": its training; "layout": the work of each rank, which
            changes results only by rounding; "nothing": no computation.
        by_content: a resumed run compares the content (hashes of the base, tokens of the data), not the value.
        per_adapter: each adapter of a run has its own value.
        of_group: a run of several adapters has one value for all adapters.
        of_dry_run: only a dry run uses the setting.
        derived: the default depends on other settings and the model.
        lasts: `start`: the value holds for one launch and is ignored in a run's run.yaml; `command`: the user gives it
            each time, so it is never read from files.
        decided_by: {name of a command that sets the value itself: what to give instead}.
        shared: the setting has the same meaning as in tiedlora train, and its value may be passed on (`shared_field`).
        as_trained: the default is the value of the run that trained the adapter.
        constraints: constraints of pydantic, such as `ge=1`.
    """

    group: str = ""
    choices: Sequence[str] | None = None
    flag: str = ""
    metavar: str = ""
    words: bool = False
    positional: bool = False
    other_names: str = ""
    other_values: Mapping[str, str] = field(default_factory=dict)
    holds: Literal["path", "rows", ""] = ""
    decides: Decides | None = None
    by_content: bool = False
    per_adapter: bool = False
    of_group: bool = False
    of_dry_run: bool = False
    derived: bool = False
    lasts: Literal["", "start", "command"] = ""
    decided_by: Mapping[str, str] = field(default_factory=dict)
    shared: bool = False
    as_trained: bool = False
    constraints: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compared(self) -> bool:
        """Return whether a resumed run must have the same value as before."""
        return self.decides not in ("layout", "nothing") and not self.by_content

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add the choices to the JSON schema of the field."""
        if self.choices:
            schema.get("items", schema)["enum"] = list(self.choices)


def setting_field(group: str, help_text: str, default: Any = ..., **marks: Any) -> Any:
    """Return a field for a subclass of `CommandSettings`.

    Args:
        group: see `Declared`.
        default: omitted if the value is required or derived from other values. None means that it is optional.
        marks: the other attributes of `Declared`, and constraints of pydantic.
    """
    constraints = {name: marks.pop(name) for name in _CONSTRAINTS if name in marks}
    own = Declared(group=group, constraints=constraints, **marks)
    return Field(default=default, description=help_text, json_schema_extra=own, **constraints)


def shared_field(kind: type[CommandSettings], name: str, help_text: str = "", **changes: Any) -> Any:
    """Return a field with the same meaning as the field `name` of the settings `kind`.

    Args:
        help_text: '' for the help text in `kind`.
        changes: the default and the attributes of `Declared` that differ from the field in `kind`.
    """
    original, there = kind.model_fields[name], declared(kind)[name]
    kept = ("group", "choices", "flag", "words", "other_names", "other_values", "holds", "lasts")
    marks = {"default": original.default, "shared": True, **{mark: getattr(there, mark) for mark in kept}}
    return setting_field(help_text=help_text or original.description or "", **{**marks, **there.constraints, **changes})


@cache
def declared(kind: type[CommandSettings]) -> Mapping[str, Declared]:
    """Return the marks of each setting of a command, by field name."""
    found = {}
    for name, one in kind.model_fields.items():
        assert isinstance(one.json_schema_extra, Declared), "declare settings with setting_field"
        found[name] = one.json_schema_extra
    return found


def marked(kind: type[CommandSettings], **marks: Any) -> tuple[str, ...]:
    """Return the names of a command's settings that have these marks, in the order of their declaration."""
    return tuple(
        name
        for name, own in declared(kind).items()
        if all(getattr(own, mark) == value for mark, value in marks.items())
    )


def decided_by(command: str, kind: type[CommandSettings]) -> dict[str, str]:
    """Return {setting: what to give instead} for the settings of `kind` that `command` sets itself."""
    return {name: own.decided_by[command] for name, own in declared(kind).items() if command in own.decided_by}


def flag_word(name: str, kind: type[CommandSettings]) -> str:
    """Return the flag of a field, or its placeholder in the help if it is positional."""
    own = declared(kind)[name]
    return own.metavar if own.positional else f"--{own.flag or name}"


def names_elsewhere(*kinds: type[CommandSettings]) -> dict[str, list[str]]:
    """Return {name in another tool: settings of these commands} for `other_names.name_hint`."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        for name, own in declared(kind).items():
            for other in own.other_names.split():
                found.setdefault(other, []).append(f"{{{own.flag or name}}}")
    return found


class CommandSettings(BaseModel):
    """The settings of one launch of a command, validated and frozen. Subclasses declare fields with `setting_field`.

    Attributes:
        prog: `tiedlora NAME`, for the help. The argument `command` in the declaration of a subclass is NAME.
        about: what the command does, for the help.
        usage: the text after the command's name in the first line of the help.
        examples: the text at the end of the help.
        groups: name and description of each group of flags, in the order of the help. A command without groups has few
            flags and reads no YAML file.
        missing: by field, a hint to add to "is required" if the value is missing.
        instead: pairs of fields that exclude each other; see `combined`.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        # The schema is for YAML files, in which no value is required, because missing values are filled in.
        json_schema_extra=lambda schema: schema.pop("required", None),
    )

    prog: ClassVar[str]
    about: ClassVar[str]
    usage: ClassVar[str] = "[--FLAG VALUE ...]"
    examples: ClassVar[str] = "The YAML file of --config accepts every flag by its name; the command line overrides it."
    groups: ClassVar[Mapping[str, str]] = {}
    missing: ClassVar[Mapping[str, str]] = {}
    instead: ClassVar[Sequence[tuple[str, str]]] = ()

    def __init_subclass__(cls, *, command: str = "", **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if command:
            cls.prog = f"tiedlora {command}"

    def __init__(self, **values: Any) -> None:
        """Validate the values. Raise a one-line UserError about all unknown names or the first wrong value."""
        if unknown := unknown_names("setting", values, type(self).model_fields, names_elsewhere(type(self))):
            raise UserError(f"{unknown}; see --help")
        try:
            super().__init__(**{name: _as_meant(name, value, type(self)) for name, value in values.items()})
        except pydantic.ValidationError as error:
            raise UserError(_one_line(error, type(self))) from None
        except UnicodeEncodeError as error:  # pydantic cannot carry a message with bytes that are not UTF-8
            raise UserError(error.object) from None

    @classmethod
    def default_text(cls, name: str) -> str:
        """Return the default of a field for the help; '' if there is none or the help text contains it."""
        field = cls.model_fields[name]
        return "" if field.is_required() or field.default is None else flag_value(field.default)

    @classmethod
    def combined(cls, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values in `shared`, overridden by `own`. A value in `own` also removes fields that it excludes."""
        replaced = {name for pair in cls.instead if not own.keys().isdisjoint(pair) for name in pair}
        return {**{name: value for name, value in shared.items() if name not in replaced}, **own}

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise ValueError if a boolean is given for a number, because pydantic would accept true as 1."""
        kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
        parts = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(part, bool) for part in parts):
            raise ValueError(f"--{info.field_name} {shown(value)}: expected a number, not a boolean")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _reject_extremes(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        flag = flag_word(info.field_name, cls)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float) and abs(part) >= _BOUND:
                raise ValueError(f"{flag} {shown(value)}: out of range; give a number below 2^53 (9e15)")
            try:  # os.fsencode accepts the surrogates that Python uses for non-UTF-8 bytes in names of files
                is_text = not isinstance(part, str) or b"\0" not in os.fsencode(part)
            except UnicodeEncodeError:
                is_text = False
            if not is_text:
                raise ValueError(f"{flag} {shown(value)}: contains characters that are not text; remove them")
        return value

    def _check_fit(self) -> None:
        """Raise ValueError for values that contradict each other. pydantic calls this when it makes the settings."""

    @model_validator(mode="after")
    def _check_values(self) -> CommandSettings:
        for name, own in declared(type(self)).items():
            choices, value = own.choices, getattr(self, name)
            for part in value if isinstance(value, tuple) else (value,):
                if choices is not None and part is not None and part not in choices:
                    known, hint = ", ".join(map(repr, choices)), value_hint(part, choices, own.other_values)
                    raise ValueError(f"--{name} {as_given(part)}: input should be one of {known}{hint}")
        self._check_fit()
        return self


def _kinds_in(annotation: Any) -> set[Any]:
    """Return a type and all types inside it."""
    return {annotation}.union(*map(_kinds_in, typing.get_args(annotation)))


def _as_meant(name: str, value: Any, kind: type[CommandSettings]) -> Any:
    """Return a value in its field's form: a list for text with commas, `nf4` for `NF4` or `4bit`, 1000 for `1e3`."""
    own, kinds = declared(kind)[name], _kinds_in(kind.model_fields[name].annotation)
    meant = _part_as_meant(value, own, kinds)
    tuples = [one for one in kinds if typing.get_origin(one) is tuple]
    if not tuples or meant in literal_values(kinds.difference(*(_kinds_in(one) - {one} for one in tuples))):
        return meant
    parts = [value] if own.words and isinstance(value, str) else comma_separated(value)
    return [_part_as_meant(part, own, kinds) for part in parts] if isinstance(parts, list | tuple) else parts


def _part_as_meant(value: Any, own: Declared, kinds: set[Any]) -> Any:
    if not isinstance(value, str):
        return value
    if _POWER_OF_TEN.fullmatch(value.strip()) and int in kinds and not kinds & {float, str}:
        return int(number) if (number := float(value)).is_integer() else value
    return value_meant(value, (*(own.choices or ()), *literal_values(kinds)), own.other_values)


def literal_values(kinds: Collection[Any]) -> tuple[str, ...]:
    """Return the values that the Literal types in `kinds` allow."""
    return tuple(value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind))


def validate_settings(values: Mapping[str, Any], kind: type[AnySettings]) -> AnySettings:
    """Return settings of `kind` with these values by setting name. None means that the value was not given.

    Raises:
        UserError: names are unknown (the message suggests known ones), or a value is out of range.
    """
    return kind(**{str(name): value for name, value in values.items() if value is not None})


def _one_line(error: pydantic.ValidationError, kind: type[CommandSettings]) -> str:
    first, *others = error.errors()
    name = str(first["loc"][0]) if first["loc"] else ""
    flag = flag_word(name, kind) if name in kind.model_fields else f"--{name}"
    if first["type"] == "value_error":
        found = first["ctx"]["error"]
        # pydantic cannot pass a message with bytes that are not UTF-8 through a wrapping validator
        return found.object if isinstance(found, UnicodeEncodeError) else str(found)
    if first["type"] == "missing":
        hint = kind.missing.get(name)
        return f"{flag} is required" + (f": {hint}" if hint else "")
    said, hint = f"{flag} {as_given(first['input'])}", ""
    if first["type"] == "bool_parsing":
        return f"{said}: give true or false, or nothing after {flag}"
    # A value that has no type of a union has an error for each type.
    same = [one for one in others if len(one["loc"]) > 1 and one["loc"][:-1] == first["loc"][:-1]]
    wrong = [first, *(one for one in same if isinstance(one["loc"][-1], str))]
    if any(one["type"] == "literal_error" for one in wrong) and isinstance(first["input"], str):
        allowed = literal_values(_kinds_in(kind.model_fields[name].annotation))
        hint = value_hint(first["input"], allowed, declared(kind)[name].other_values)
    return f"{said}: " + ", or ".join(f"{one['msg'][0].lower()}{one['msg'][1:]}" for one in wrong) + hint


def comma_separated(value: Any) -> Any:
    """Return the comma-separated parts of a text, or a single number, as a tuple. Return any other value unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",")) if value.strip() else ()
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


# The target that contains each module, by the module's name in PEFT.
_FUSED = {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), QKV), **dict.fromkeys(("gate_proj", "up_proj"), GATE_UP)}
TARGETS_HELP = f"adapted linears of each adapted layer: all, or some of {', '.join(TARGET_NAMES)}"


def parse_targets(value: Any) -> Any:
    """Return the names of `--targets` in the order of `TARGET_NAMES`. Return a value that is not a list of strings
    unchanged.

    Raises:
        ValueError: a name is unknown, or no name is given.
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
    """Return a setting's value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def launcher_words(text: str | None, *, flag: str = "launcher_args") -> list[str]:
    """Return the arguments in --launcher_args or `flag`, split as a shell does. Return [] if `text` is None.

    Raises:
        ValueError: a closing quotation mark is missing.
    """
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ValueError(f"--{flag} {text}: {str(error).lower()}; correct the quotation") from None


# Types of settings, which check their own values ----------------------------------------------------------------------

# A path, with ~ expanded. Raises UserError if it cannot name a file.
FilePath = Annotated[Path, BeforeValidator(lambda value, info: user_path(value, flag=f"--{info.field_name}"))]
Targets = Annotated[tuple[str, ...], BeforeValidator(parse_targets)]
# The text auto, true or false. A YAML boolean is accepted too.
AddBos = Annotated[
    Literal["auto", "true", "false"],
    BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool) else value),
]
SpecialTokensInText = Literal["refuse", "plain", "control"]
TrainOn = Literal["all_turns", "last_turn"]
LearningRate = Annotated[float, Field(gt=0)] | Literal["auto"]
FILES_HELP = (
    ".jsonl, .json, .csv, .parquet, .arrow (also .gz), a folder, a pattern, a hub id (id:config:split), or several with"
    " commas"
)


def parse_columns(text: str | None) -> Mapping[str, str] | None:
    """Return {our field: the user's field} for --columns; None if it is not given. Raise ValueError for wrong text."""
    if text is None:
        return None
    said = f"--columns {as_given(text)}: expected OURS=YOURS[,...] with each OURS once"
    return _named_values(text, f"{said}, e.g. prompt=query,completion=response")


_NUMBER = re.compile(r"[0-9]*[.]?[0-9]+(e[+-]?[0-9]+)?")


def parse_rate_factors(text: str | None) -> Mapping[str, float]:
    """Return {factor: multiple of the learning rate} for --rate_factors. Raise ValueError for wrong text."""
    if text is None:
        return {}
    each = f"each of {', '.join(FACTORS)} at most once, and numbers from 1e-6 to 1e6"
    said = f"--rate_factors {as_given(text)}: expected FACTOR=NUMBER[,...], e.g. B=16; {each}"
    given = _named_values(text, said)
    found = {name: float(number) if _NUMBER.fullmatch(number) else 0.0 for name, number in given.items()}
    if found.keys() - {*FACTORS} or not all(1e-6 <= number <= 1e6 for number in found.values()):
        raise ValueError(said)
    return found


def _named_values(text: str, said: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if not all(found.values()) or not all(found) or len(found) < len(pairs):
        raise ValueError(said)
    return found


def _text_for(parse: Callable[[str | None], object]) -> Any:
    """Return the type of a text that `parse` accepts, and that is kept as given."""

    def kept(text: str | None) -> str | None:
        parse(text)
        return text

    return Annotated[str | None, pydantic.AfterValidator(kept)]


ColumnNames, RateFactors = _text_for(parse_columns), _text_for(parse_rate_factors)


def _parse_layers(value: Any) -> Any:
    whole = isinstance(value, list) and [str(part).lower() for part in value] in ([], ["all"], ["none"])
    return None if whole else value


Layers = Annotated[tuple[int, ...] | None, BeforeValidator(_parse_layers)]  # None means all


def profiled_steps(value: str | None) -> range:
    """Return the steps of --profile FIRST:LAST, counted from 1; no steps for None. Raise ValueError for other text."""
    if value is None:
        return range(0)
    found = re.fullmatch(r"([1-9][0-9]{0,14}):([1-9][0-9]{0,14})", value)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(f"--profile {value}: give FIRST:LAST, two steps that count from 1, for example 3:5")
    return range(int(found[1]), int(found[2]) + 1)


def _checked_range(value: Any) -> Any:
    if isinstance(value, int):  # YAML reads 3:5 as 3 * 60 + 5
        raise ValueError('--profile: in a YAML file, write FIRST:LAST in quotes, for example "3:5"')
    if isinstance(value, str):
        profiled_steps(value)
    return value


StepRange = Annotated[str | None, BeforeValidator(_checked_range)]

TENSORBOARD = "tensorboard"
# This package writes TensorBoard files, and accelerate.tracking serves the other trackers. Names are package names.
TRACKER_NAMES = (TENSORBOARD, "wandb", "mlflow", "trackio", "comet_ml", "swanlab", "clearml", "aim", "dvclive")


def _parse_trackers(value: Any) -> Any:
    """Return the names of `--report_to` without duplicates. Return a value that is not a list of strings unchanged.

    Raises:
        ValueError: a name is unknown.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return value
    found = tuple(dict.fromkeys(name.strip().lower() for name in value if name.strip()))
    if found == ("none",):
        return ()
    for name in found:
        if name not in TRACKER_NAMES:
            near = nearest_name(name, TRACKER_NAMES)
            raise ValueError(f"--report_to: {shown(name)} is unknown{near}; known: {', '.join(TRACKER_NAMES)}, or none")
    return found


Trackers = Annotated[tuple[str, ...], BeforeValidator(_parse_trackers)]
