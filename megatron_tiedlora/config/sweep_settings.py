"""The settings of tiedlora sweep: the grid, and how its groups are started. All others are tiedlora train's.

Owns how both sets of names share a command line and a YAML file, and which training settings the sweep decides.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_tiedlora.base.messages import UserError, as_given, naming, user_path
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.config.cli import naming_file, parse_words, read_yaml, split_words
from megatron_tiedlora.config.fields import (
    CommandSettings,
    decided_by,
    setting_field,
    shared_field,
    shell_words,
    validate_settings,
)
from megatron_tiedlora.config.launch_settings import LaunchSettings
from megatron_tiedlora.config.settings import Settings, make_settings

PAPER_RANKS = (2, 4, 8, 16, 32, 64, 128)
PAPER_LEARNING_RATES = (1e-4, 1e-5)
GRID = ("methods", "ranks", "learning_rates")  # settings; each of their combinations is a run
MOST_TOGETHER = 32  # of --together auto; with more the gain grows little
SWEEP_FILE = "sweep.yaml"  # in the sweep's folder: the settings that it was started with
# Flags of tiedlora run that a file may give, with a NUL after each word. Any other could start a program of the file's
# author, or start it elsewhere.
_FROM_FILE = re.compile(r"(--(num_gpus|master_port)[=\0]\d{1,6}\0)*", re.ASCII)
_NOT_OF_SWEEP = frozenset(("max_restarts", "show_command"))  # what failed is tried again by the sweep's next start


class SweepSettings(CommandSettings, command="sweep"):
    """Which adapters a sweep trains, and how; validated and frozen."""

    about: ClassVar[str] = (
        "Train methods x ranks x learning rates on a task, score the best learning rate of each on the test set, and"
        "\nwrite the paper's tables and figures. It also takes every setting of tiedlora train (see its --help)."
    )
    groups: ClassVar[Mapping[str, str]] = {
        "run": "the sweep's folder; a second start with the same folder resumes it",
        "grid": "which adapters are trained (defaults: the paper's grid)",
        "scores": "how the test set is scored",
        "processes": "how groups of runs are started, one after another; a second start may change it",
    }
    missing: ClassVar[Mapping[str, str]] = {"output_dir": "the folder of runs, scores, tables and figures"}

    output_dir: str = setting_field("run", "folder of runs, scores, tables and figures", lasts="start")
    dry_run: bool = setting_field(
        "run", "list the runs, their state and trained parameters; start nothing", False, lasts="start",
    )
    take_over: bool = setting_field(
        "run", "take over the folder, and those of its runs, from a start that still has them", False, lasts="command",
    )
    tables_from: tuple[str, ...] | None = setting_field(
        "run", "start nothing; join these sweeps (folders, one per task) into tables and figures in --output_dir", None,
        lasts="start",
    )

    methods: tuple[str, ...] = shared_field(
        Settings, "method", "configurations, e.g. lora,tl5,tl6 (default: all)", group="grid", default=METHOD_NAMES,
    )
    ranks: tuple[int, ...] = setting_field(
        "grid", "ranks (default: 2,4,8,16,32,64,128)", PAPER_RANKS, other_names="r lora_r lora_rank",
    )
    learning_rates: tuple[float, ...] = setting_field(
        "grid", "the best on validation is scored (default: 1e-4,1e-5)", PAPER_LEARNING_RATES, other_names="lr",
    )
    single_layers: tuple[int, ...] | Literal["paper"] | None = setting_field(
        "grid", "also train LoRA on one layer: 1-based layers, or paper for 1, 4, 8, ... and the last (default: none)",
        None,
    )
    single_layer_rank: int = setting_field("grid", "rank of LoRA on one layer, and of the tl5 beside it", 16, ge=1)

    test_batch_size: int | None = setting_field("scores", "samples that are answered together", None, ge=1)
    test_limit: int | None = setting_field(
        "scores", "score only the first N test rows (default: all; a single run of the demo scores 24)", None, ge=1,
    )

    launcher_args: str | None = setting_field(
        "processes",
        'flags of tiedlora run, e.g. "--num_gpus 4" or "--hostfile hosts"; files may give --num_gpus, --master_port',
        None,
    )
    together: int | Literal["auto"] = setting_field(
        "processes",
        "the most runs of a group, which share the base and micro-batches; auto: as many as fit into the free memory of"
        f" this machine, at most {MOST_TOGETHER}",
        "auto",
    )
    halving: bool = setting_field(
        "processes", "stop a run that is behind another learning rate on validation by more than the noise", False,
    )

    @classmethod
    def default_text(cls, name: str) -> str:
        """As for every command, but the help texts of the grid contain their defaults."""
        return "" if name in GRID else super().default_text(name)

    def check(self) -> None:
        """Raise ValueError for settings that do not fit each other."""
        for name, values in self:
            if values == ():
                raise ValueError(f"--{name} is empty; give one value or more, with commas between them")
            for index, value in enumerate(values if isinstance(values, tuple) else ()):
                if value in values[:index]:
                    raise ValueError(f"--{name} has {value} twice; give each value once")
        for name in ("ranks", "single_layers"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and min(numbers) < 1:
                raise ValueError(f"--{name} {min(numbers)}: {name.replace('_', ' ')} start at 1")
        for rate in self.learning_rates:
            if rate <= 0:
                raise ValueError(f"--learning_rates {rate:g}: a learning rate must be above 0")
        if self.together != "auto" and self.together < 1:
            raise ValueError(f"--together {self.together}: give auto, or a number from 1 on")
        if self.halving and len(self.learning_rates) < 2:
            raise ValueError("--halving compares learning rates; give two or more to --learning_rates")
        if self.halving and self.together != "auto" and self.together < len(self.learning_rates):
            raise ValueError(
                f"--halving compares learning rates that train together; give --together auto, or"
                f" {len(self.learning_rates)} or more"
            )
        shell_words("launcher_args", self.launcher_args)


def parse_launcher(words: Sequence[str]) -> LaunchSettings:
    """The settings of tiedlora run in --launcher_args. Raises UserError."""
    with naming("--launcher_args"):
        found = validate_settings(parse_words(words, LaunchSettings), LaunchSettings)
        if others := found.model_fields_set & _NOT_OF_SWEEP:
            raise UserError(f"--{min(others)} is of tiedlora run alone; remove it")
        return found


@dataclass(frozen=True)
class SweepCommand:
    """One start of tiedlora sweep.

    Attributes:
        given: the training settings that were given, by name; the others keep train.py's defaults.
        train: all training settings, resolved for the first point of the grid.
    """

    settings: SweepSettings
    given: Mapping[str, Any]
    train: Settings

    @property
    def launcher(self) -> LaunchSettings:
        """What --launcher_args says. Raises UserError; a study can be read whatever it was started with."""
        return parse_launcher(shell_words("launcher_args", self.settings.launcher_args))


def parse_sweep(argv: Sequence[str]) -> SweepCommand:
    """Parse the settings of the sweep and of its runs. The command line wins over the file of --config, and both win
    over the settings that the folder's sweep was started with. So the folder's name alone resumes it.

    Raises:
        UserError: something is unknown, out of range or decided by the sweep.
    """
    decided = decided_by("sweep", Settings)
    own, theirs, _ = split_words(argv, SweepSettings, without=decided)
    values = {**theirs, **own}
    config = values.pop("config", None)
    read = read_yaml(config, Settings, SweepSettings) if config else {}
    merged = {**read, **values}
    for name, reason in decided.items():
        if name in merged:
            raise UserError(f"--{name} cannot be given to a sweep: {reason}")
    others = [name for name in merged if name not in ("tables_from", "output_dir", "take_over")]
    if "tables_from" in merged and others:
        raise UserError(f"--{others[0]} cannot be combined with --tables_from, which only reads existing sweeps")
    source = config
    with naming_file(config, read.keys() - values.keys()):
        started = user_path(as_given(merged.get("output_dir", "")), flag="--output_dir") / SWEEP_FILE
    if "output_dir" in merged and "tables_from" not in merged and started.is_file():
        before = read_yaml(str(started), Settings, SweepSettings)
        source = source if "launcher_args" in merged else str(started)
        merged = {**before, **merged}
    with naming_file(config, read.keys() - values.keys()):
        command = make_command(merged)
    words = shell_words("launcher_args", command.settings.launcher_args)
    if "launcher_args" not in values and not _FROM_FILE.fullmatch("".join(f"{word}\0" for word in words)):
        raise UserError(
            f"{source}: launcher_args are not read from a file, which may be another user's ("
            f"{command.settings.launcher_args}); give --launcher_args again on the command line"
        )
    return command


def make_command(values: Mapping[str, Any]) -> SweepCommand:
    """Make a command from the names of both sets. Raises UserError."""
    settings = validate_settings({n: v for n, v in values.items() if n in SweepSettings.model_fields}, SweepSettings)
    given = {n: v for n, v in values.items() if n not in SweepSettings.model_fields}
    return SweepCommand(settings, given, resolve_train(settings, given))


def resolve_train(settings: SweepSettings, given: Mapping[str, Any]) -> Settings:
    """The training settings of the grid's first run. Raises UserError."""
    if settings.tables_from is not None:
        return make_settings({})
    first = {
        "method": settings.methods[0],
        "rank": settings.ranks[0],
        "learning_rate": settings.learning_rates[0],
        "output_dir": settings.output_dir,
    }
    return make_settings({**given, **first})
