"""The settings of launch/sweep.py: the grid and how its runs are started. All others are those of launch/train.py.

Owns how the two sets of names share a command line and a YAML file, and which training settings the sweep decides.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import create_model, field_validator, model_validator

from megatron_tiedlora.base.errors import UserError, as_given
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import nearest_name
from megatron_tiedlora.config.cli import build_parser, naming_file, read_yaml
from megatron_tiedlora.config.fields import (
    CommandSettings,
    optional_field,
    setting_field,
    shell_words,
    validate_settings,
)
from megatron_tiedlora.config.settings import Settings, make_settings

PAPER_RANKS = (2, 4, 8, 16, 32, 64, 128)
PAPER_LEARNING_RATES = (1e-4, 1e-5)
SWEEP_FILE = "sweep.yaml"  # in the sweep's folder: what it was started with
# Flags of the `deepspeed` launcher that a file may give, with a NUL after each word: they choose among the devices and
# hosts that are there. Any other flag could start what the file's author likes, or start it elsewhere.
_FROM_FILE = re.compile(
    r"(--(num_gpus|num_accelerators|num_nodes|master_port)[=\0]\d{1,6}\0"
    r"|(--(include|exclude)[=\0]|-[ie]\0)[\w.][\w.:,@-]*\0"
    r"|--bind_cores_to_rank\0|--bind_core_list[=\0]\d[\d,-]*\0)*",
    re.ASCII,
)
# What a user cannot give to the runs of a sweep, and what to give in its place.
DECIDED_BY_SWEEP = {
    "method": "the sweep trains those of --methods",
    "rank": "the sweep trains those of --ranks",
    "learning_rate": "the sweep trains those of --learning_rates",
    "layers": "the sweep adapts all layers, and one at a time with --single_layers",
    "resume": "the sweep always goes on where its runs were cut off",
    "world_size": "the launcher decides how many ranks a run has (--launcher_args or --gpus_per_run)",
    "plan_for": "a sweep's dry run lists runs alone",
}


class SweepSettings(CommandSettings):
    """Which adapters are trained, and how; validated and frozen."""

    prog: ClassVar[str] = "sweep.py"
    about: ClassVar[str] = (
        "Train methods x ranks x learning rates on a task, score the better learning rate of each on the test set, and"
        "\nwrite the paper's tables and figures. Every setting of launch/train.py goes here too (see its --help)."
    )
    groups: ClassVar[Mapping[str, str]] = {
        "run": "where the study goes; a second start with the same folder goes on",
        "grid": "which adapters are trained (defaults: the paper's grid)",
        "scores": "how the test set is scored",
        "processes": "how runs are started; a second start may change it",
    }
    missing: ClassVar[Mapping[str, str]] = {"output_dir": "the folder of runs, scores, tables and figures"}

    output_dir: str = setting_field("run", "folder of runs, scores, tables and figures")
    dry_run: bool = setting_field("run", "list the runs, their state and trained parameters; start nothing", False)
    take_over: bool = setting_field(
        "run", "take the folder, and those of its runs, from a start that still has them", False
    )
    tables_from: tuple[str, ...] | None = optional_field(
        "run", "start nothing: join these sweeps (folders, one a task) into tables and figures in --output_dir"
    )

    methods: tuple[str, ...] = setting_field("grid", "configurations, e.g. lora,tl5,tl6 (default: all)", METHOD_NAMES)
    ranks: tuple[int, ...] = setting_field("grid", "ranks (default: 2,4,8,16,32,64,128)", PAPER_RANKS)
    learning_rates: tuple[float, ...] = setting_field(
        "grid", "of which the best on validation is scored (default: 1e-4,1e-5)", PAPER_LEARNING_RATES
    )
    single_layers: tuple[int, ...] | str | None = optional_field(
        "grid", "also LoRA on one layer: 1-based layers, or paper for 1, 4, 8, ... and the last (default: none)"
    )
    single_layer_rank: int = setting_field("grid", "rank of LoRA on one layer and of the tl5 beside it", 16, ge=1)

    test_batch_size: int | None = optional_field("scores", "samples that are decoded together", ge=1)
    test_limit: int | None = optional_field(
        "scores", "score the first N test rows only (default: all; a run of the demo decodes its own 24)", ge=1
    )

    launcher_args: str | None = optional_field(
        "processes",
        'arguments of the deepspeed launcher, e.g. "--num_gpus 4" or "--hostfile hosts"; of those in a file only the'
        " choice of devices counts",
    )
    gpus_per_run: int | None = optional_field(
        "processes", "run several at once, each on so many GPUs of this machine", ge=1
    )
    runs_at_once: int = setting_field("processes", "run so many at once on the same devices (CPUs, or MPS)", 1, ge=1)

    @classmethod
    def default_text(cls, name: str) -> str:
        """As for every command; the help texts of the grid hold their own."""
        return "" if name in ("methods", "ranks", "learning_rates") else super().default_text(name)

    @field_validator("methods", "ranks", "learning_rates", "single_layers", "tables_from", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().lower() != "paper":
            return tuple(part.strip() for part in value.split(",")) if value.strip() else ()
        return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> SweepSettings:
        for name in ("methods", "ranks", "learning_rates", "single_layers", "tables_from"):
            values = getattr(self, name)
            if not isinstance(values, tuple):
                continue
            if not values:
                raise ValueError(f"--{name} is empty; give one value or more, with commas between them")
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise ValueError(f"--{name} has {value} twice; give each value once")
        for method in self.methods:
            if method not in METHOD_NAMES:
                hint = nearest_name(method, METHOD_NAMES)
                raise ValueError(f"--methods {method}: no such method{hint}; known: {', '.join(METHOD_NAMES)}")
        for name in ("ranks", "single_layers"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and min(numbers) < 1:
                raise ValueError(f"--{name} {min(numbers)}: {name.replace('_', ' ')} count from 1")
        for rate in self.learning_rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"--learning_rates {rate:g}: learning rates are above 0")
        if self.gpus_per_run is not None and (self.launcher_args is not None or self.runs_at_once > 1):
            other = "launcher_args" if self.launcher_args is not None else "runs_at_once"
            raise ValueError(f"--gpus_per_run chooses the GPUs of every run itself; leave --{other} out")
        launcher = shell_words("launcher_args", self.launcher_args)
        if self.runs_at_once > 1 and names_port(launcher):
            raise ValueError(
                f"--runs_at_once {self.runs_at_once}: the runs cannot share the --master_port of --launcher_args; leave"
                " it out, and each gets one of its own"
            )
        return self


def names_port(launcher: Sequence[str]) -> bool:
    """Whether launcher arguments say at which port the ranks meet."""
    return any(word.split("=")[0] == "--master_port" for word in launcher)


def may_come_from_file(launcher: Sequence[str]) -> bool:
    """Whether launcher arguments only choose devices, so that it does not matter who wrote them."""
    return _FROM_FILE.fullmatch("".join(f"{word}\0" for word in launcher)) is not None


@dataclass(frozen=True)
class SweepCommand:
    """A start of launch/sweep.py.

    Attributes:
        given: the training settings that were given, by name; the others keep train.py's defaults.
        train: those settings resolved, for the first point of the grid.
    """

    settings: SweepSettings
    given: Mapping[str, Any]
    train: Settings


def parse_sweep(argv: Sequence[str]) -> SweepCommand:
    """The sweep's settings and the runs', from the command line, over the file of --config, over what the folder's
    sweep was started with, so that its name alone resumes it.

    Raises:
        UserError: anything unknown, out of range or decided by the sweep, in one line.
    """
    parser, train_parser = build_parser(SweepSettings), build_parser(Settings)
    own, rest = parser.parse_known_args(argv)
    theirs, unknown = train_parser.parse_known_args(rest)
    known = [*SweepSettings.model_fields, *(n for n in Settings.model_fields if n not in DECIDED_BY_SWEEP)]
    if unknown:
        name = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {name}{nearest_name(name, [f'--{n}' for n in known])}; see --help")
    values = {name: value for name, value in {**vars(theirs), **vars(own)}.items() if value is not None}
    values.pop("local_rank", None)
    config = values.pop("config", None)
    read = read_sweep_yaml(config) if config else {}
    merged = {**read, **values}
    for name, reason in DECIDED_BY_SWEEP.items():
        if name in merged:
            raise UserError(f"--{name} cannot be given to a sweep: {reason}")
    others = [name for name in merged if name not in ("tables_from", "output_dir", "take_over")]
    if "tables_from" in merged and others:
        other = others[0]
        raise UserError(f"--{other} does not go with --tables_from, which reads sweeps that are there")
    source = config
    with naming_file(config, read.keys() - values.keys()):
        started = user_path(as_given(merged.get("output_dir", "")), flag="--output_dir") / SWEEP_FILE
    if "output_dir" in merged and "tables_from" not in merged and started.is_file():
        before = read_sweep_yaml(str(started))
        # GPUs by run go with neither of the other two: where one side is given now, it replaces the other.
        shared = ("launcher_args", "runs_at_once")
        replaced = shared if "gpus_per_run" in merged else ("gpus_per_run",) if {*shared} & merged.keys() else ()
        source = source if "launcher_args" in merged else str(started)
        merged = {**{name: value for name, value in before.items() if name not in replaced}, **merged}
    with naming_file(config, read.keys() - values.keys()):
        command = make_command(merged)
    if "launcher_args" not in values and not may_come_from_file(shlex.split(command.settings.launcher_args or "")):
        raise UserError(
            f"{source}: its launcher_args are not taken from a file, which may be another user's ("
            f"{command.settings.launcher_args}); give --launcher_args again on the command line"
        )
    return command


def make_command(values: Mapping[str, Any]) -> SweepCommand:
    """A command from the names of both. Raises UserError."""
    settings = validate_settings({n: v for n, v in values.items() if n in SweepSettings.model_fields}, SweepSettings)
    given = {n: v for n, v in values.items() if n not in SweepSettings.model_fields}
    return SweepCommand(settings, given, resolve_train(settings, given))


def resolve_train(settings: SweepSettings, given: Mapping[str, Any]) -> Settings:
    """The settings of the grid's first run. Raises UserError."""
    if settings.tables_from is not None:
        return make_settings({})
    first = {
        "method": settings.methods[0],
        "rank": settings.ranks[0],
        "learning_rate": settings.learning_rates[0],
        "output_dir": settings.output_dir,
    }
    return make_settings({**given, **first})


def read_sweep_yaml(path: str) -> dict[str, Any]:
    """The values in a YAML file with names of both. Raises UserError."""
    own: dict[str, Any] = {name: (field.annotation, field) for name, field in SweepSettings.model_fields.items()}
    return read_yaml(path, create_model("SweepFile", __base__=Settings, **own))  # only its names count
