"""Declares the settings of the commands that start or plan jobs: run, doctor, plan and sweep.

run, plan and sweep also accept the flags of train. In a plan, a flag such as --tensor_parallel limits the search to its
value. A sweep sets some training settings itself. One YAML file may contain the settings of the sweep and of training.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from megatron_tiedlora.base.messages import UserError, as_given, naming, user_path
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.shapes import BASE_NAMES, UNQUANTISED
from megatron_tiedlora.config import fields
from megatron_tiedlora.config.cli import naming_file, parse_settings, parse_words, read_yaml, split_words
from megatron_tiedlora.config.fields import CommandSettings, setting_field, shared_field, validate_settings
from megatron_tiedlora.config.other_names import OTHER_FORMATS
from megatron_tiedlora.config.settings import Settings, make_settings

LauncherName = Literal["auto", "deepspeed", "mpirun", "srun", "torchrun"]
_LONGEST_WAIT = 60 * fields.LONGEST_WAIT_MINUTES  # seconds

_start = partial(setting_field, "start")
_train = partial(shared_field, Settings, group="job")


def _check_launcher(settings: Any) -> None:
    """Raise ValueError if a launcher, its hosts and its arguments contradict each other."""
    fields.launcher_words(settings.launcher_args)
    if settings.launcher == "srun" and settings.hostfile is not None:
        raise ValueError("--launcher srun runs on the nodes of its Slurm allocation; remove --hostfile")
    if settings.launcher == "torchrun" and settings.hostfile is not None:
        raise ValueError(
            "--launcher torchrun starts ranks on this machine only; use a different one, or run torchrun on each host"
        )


class LaunchSettings(CommandSettings, command="run"):
    """The settings for starting and monitoring a job, validated and frozen."""

    about: ClassVar[str] = (
        "Start tiedlora train on the hosts of a job, watch it, and report how it ended.\n\n"
        "    tiedlora run --num_gpus 4 ...                          this machine\n"
        "    tiedlora run --hostfile hosts ...                      hosts reached by ssh\n"
        "    tiedlora run ...                                       in a Slurm allocation: its nodes\n\n"
        "The exit status is 0 if the run finished, or if a signal to this command stopped it and it was saved."
    )
    examples: ClassVar[str] = (
        "Settings of tiedlora train follow, after -- or directly. The YAML file of --config has no other settings."
    )
    groups: ClassVar[Mapping[str, str]] = {
        "run": "passed to tiedlora train, as are all flags not listed here; see `tiedlora train --help`",
        "start": "what is started, and where",
        "time limits": "how long to wait for the end of a job",
    }

    launcher: LauncherName = _start(
        "auto: srun in a Slurm allocation, else deepspeed, here or with --hostfile; torchrun: this machine only",
        "auto",
    )
    hostfile: str | None = _start("hosts of the job, one `NAME slots=N` line per host", None)
    num_gpus: int | None = _start(
        "ranks per host (default: its slots or Slurm tasks; locally all GPUs, or 1 without GPUs)", None, ge=1,
    )
    master_addr: str | None = _start("address of the first host, for the rendezvous (default: its name)", None)
    master_port: int | None = _start("port of the rendezvous (default: random)", None, ge=1, le=65535)
    launcher_args: str | None = _start(
        'arguments of deepspeed, mpirun, srun or torchrun itself, e.g. "--cpu-bind=none"', None,
    )
    max_restarts: int = _start(
        "how often to restart after a failure, from the last checkpoint (--resume auto)", 0, ge=0,
    )
    on_end: str | None = _start(
        "shell command to run here when the job has ended, such as a notification; the variables TIEDLORA_RUN,"
        " TIEDLORA_STATE, TIEDLORA_STATUS and TIEDLORA_REASON describe the end",
        None,
    )
    show_command: bool = _start("print hosts, environment and command; start nothing", False)

    grace_seconds: float = setting_field(
        "time limits",
        "how long to wait for ranks that are still saving after their launcher has ended; then the remaining ranks on"
        " this machine are ended",
        120.0, ge=0, le=_LONGEST_WAIT,
    )

    _check_fit = _check_launcher


_launch = partial(shared_field, LaunchSettings)


class DoctorSettings(CommandSettings, command="doctor"):
    """The settings of one check of a job's hosts, validated and frozen."""

    about: ClassVar[str] = """\
Check the hosts of a job before it starts. This finds hosts that are down, versions and clocks that differ, folders that
are not shared, and networks that do not connect the ranks.

    tiedlora doctor --hostfile hostfile --output_dir RUNS --tensor_parallel 2
    tiedlora doctor                            inside a Slurm allocation (srun, no ssh), else this machine alone

The job's ranks are started briefly, with the launcher that the job will use. Each host reports its hardware, software
and folders, and the ranks run an all-reduce in each tensor, pipeline and data parallel group. No files are left behind.
Exit status: 0 ready, 1 not ready, 2 for a wrong flag or hostfile."""
    groups: ClassVar[Mapping[str, str]] = {
        "run": "which hosts are checked, and where the results are written",
        "job": "what a job will write; give the same value as for tiedlora train",
        "parallel": "parallel sizes of the job (data-parallel size = world size / (tensor x pipeline))",
        "limits": "limits beyond which the doctor reports a problem",
    }

    hostfile: str | None = setting_field(
        "run", "`NAME slots=N` lines, as for deepspeed (default: the hosts of the Slurm allocation, or this machine)",
        None,
    )
    launcher: LauncherName = _launch("launcher", "how the ranks are started, as for tiedlora run", group="run")
    launcher_args: str | None = _launch(
        "launcher_args", 'arguments of the launcher itself, e.g. "--cpu-bind=none"', group="run",
    )
    json_file: str | None = setting_field(
        "run", "write all results to this file, for scripts; - prints them instead of the table", None, flag="json",
    )
    output_dir: str | None = _train("output_dir", "where runs will be written; should be shared by all hosts")

    tensor_parallel: int = _train("tensor_parallel", "ranks over which each layer is sharded", group="parallel")
    pipeline_parallel: int = _train("pipeline_parallel", "stages, each with some of the layers", group="parallel")
    master_port: int | None = _launch("master_port", group="parallel")
    allreduce_mb: float = setting_field(
        "parallel", "megabytes per rank in the all-reduce that measures bandwidth", 64.0, gt=0, le=16384,
    )

    timeout_seconds: float = setting_field(
        "limits", "longest wait for a host's answers, for the rendezvous, and for an all-reduce", 60.0, ge=5, le=86400,
    )
    max_clock_skew: float = setting_field("limits", "seconds that a host's clock may differ from this one's", 1.0, ge=0)

    _check_fit = _check_launcher


@dataclass(frozen=True)
class LaunchCommand:
    """A parsed command line of tiedlora run: its own settings, and the settings and arguments of tiedlora train."""

    settings: LaunchSettings
    train: Settings
    arguments: tuple[str, ...]


def parse_launch(argv: Sequence[str]) -> LaunchCommand:
    """Return the parsed command line of tiedlora run. `--` may separate its own flags from those of tiedlora train.

    Raises:
        UserError: a setting is unknown or out of range, or settings contradict each other.
    """
    words, given = list(argv), []
    if "--" in words:
        words, given = words[: words.index("--")], words[words.index("--") + 1 :]
    own, _, arguments = split_words(words, LaunchSettings, more=given)
    settings, train = validate_settings(own, LaunchSettings), parse_settings(arguments, Settings)
    if train.dry_run:
        raise UserError(
            "--dry_run starts no job; give it to tiedlora train, or give --show_command here to see the command"
        )
    return LaunchCommand(settings, train, tuple(arguments))


# tiedlora plan --------------------------------------------------------------------------------------------------------

# Flags of tiedlora train with a different default in a plan. --max_length is still at most the model's limit.
PLAN_DEFAULTS = {"max_length": 4096, "global_batch_size": 128}
FORMAT_NAMES = (UNQUANTISED, *BASE_NAMES, "fp8-products", "fp8-transposed")


class PlanSettings(CommandSettings, command="plan"):
    """The settings of one plan (the cluster, and what the output shows), validated and frozen."""

    about: ClassVar[str] = """\
Find the fastest parallel configuration of a cluster before it is booked, with its memory, messages and time.

    tiedlora plan --model llama2-70b --nodes 4 --gpus_per_node 8 --gpu h100            a table, the fastest first
    tiedlora plan --model FOLDER --train_file data.jsonl --gpu a100-80                 with the lengths of your samples
    tiedlora plan --model FOLDER --adapters four.yaml                                  several adapters in one run
    tiedlora plan ... --why t2p1d16-b2-zero0                                           the arithmetic of one row
    tiedlora plan ... --yaml plan.yaml                                                 settings of the fastest row

This needs no GPU and reads no weights. It tries every combination of tensor, pipeline and sequence parallelism,
micro-batch, recompute, ZeRO stage and storage format that tiedlora train accepts. Stages, memory, messages and FLOPs
are the same as in --dry_run. A few constants of the cards convert them to seconds (--constants FILE). With --adapters,
all layouts are for one run of several adapters, which is compared with training one adapter after another."""
    usage: ClassVar[str] = "--model M [--FLAG VALUE ...]"
    examples: ClassVar[str] = "Settings of tiedlora train follow. The YAML file of --config has no other settings."
    groups: ClassVar[dict[str, str]] = {
        "run": "every flag of tiedlora train: --model, --method, --train_file ...; flags of a layout limit the search",
        "cluster": "the hosts and cards to plan for",
        "shown": "what is shown and written",
    }

    nodes: int = setting_field("cluster", "number of nodes", 1, ge=1, le=4096)
    gpus_per_node: int = setting_field("cluster", "cards in a node", 8, ge=1, le=256)
    gpu: str | None = shared_field(Settings, "gpu", "the kind of card [h100]", group="cluster")
    ranks_on_cpu: int | None = setting_field(
        "cluster", "plan for this number of ranks on this machine's CPUs", None, ge=1, le=1024,
    )
    constants: str | None = setting_field(
        "cluster", "file with the constants of a machine, written by --measure, in place of --gpu", None,
    )
    measure: str | None = setting_field(
        "cluster", "measure the constants of this machine, write them to this file (-: print them), and plan nothing",
        None,
    )
    measure_seconds: float = setting_field("cluster", "about how long --measure takes", 60.0, gt=0, le=3600)
    formats: tuple[str, ...] | None = setting_field(
        "cluster",
        "storage formats of the base to choose from [16 bits or --base; the gain of other formats is reported]", None,
        choices=FORMAT_NAMES, other_values=OTHER_FORMATS,
    )

    top: int = setting_field("shown", "rows of the table; 0 for all", 20, ge=0)
    every_layout: bool = setting_field(
        "shown", "show each layout, not only the fastest of each tensor x pipeline x data and storage format", False,
    )
    why: str | None = setting_field("shown", "print the calculation of this layout, a name in the table", None)
    layout: str | None = setting_field("shown", "write command and YAML of this layout [the fastest that fits]", None)
    yaml: str | None = setting_field("shown", "write the settings of the layout to this file, for --config", None)
    json_file: str | None = setting_field(
        "shown", "write all layouts to this file; - prints them instead of the table", None, flag="json",
    )

    def _check_fit(self) -> None:
        given = self.model_fields_set
        if self.formats == ():
            raise ValueError(f"--formats is empty; give some of {', '.join(FORMAT_NAMES)}")
        for name in ("measure", "constants", "json_file", "yaml"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"--{name.removesuffix('_file')}: the path is empty; give a file")
        for flag in ("nodes", "gpus_per_node", "gpu"):
            if self.ranks_on_cpu is not None and flag in given:
                raise ValueError(f"--ranks_on_cpu {self.ranks_on_cpu} plans for this machine's CPUs; remove --{flag}")
        if self.constants is not None and self.gpu is not None:
            raise ValueError(f"--constants {self.constants} and --gpu {self.gpu} both describe the cards; remove one")
        if self.measure is None and "measure_seconds" in given:
            raise ValueError("--measure_seconds needs --measure")


@dataclass(frozen=True)
class PlanCommand:
    """A parsed command line of tiedlora plan: its own settings and the training settings of the planned run."""

    settings: PlanSettings
    train: Settings


def parse_plan(argv: Sequence[str]) -> PlanCommand:
    """Return the parsed command line of tiedlora plan.

    Raises:
        UserError: a setting is unknown or out of range, or settings contradict each other.
    """
    own, known, words = split_words(argv, PlanSettings)
    others = [name for name in known if name not in ("model", "config")]
    others += sorted(name.removesuffix("_file") for name in own.keys() - {"measure", "measure_seconds"})
    if "measure" in own and others:  # --model is the only training flag that --measure uses
        raise UserError(f"--measure measures this machine and plans nothing; remove --{others[0]}")
    # Parse the training flags as for a dry run, which needs no data. The file of --config may also set --dry_run.
    train = parse_settings([*words, "--dry_run"], Settings)
    for name, instead in fields.decided_by("plan", Settings).items():
        if name in known or name in train.model_fields_set - {"dry_run"}:
            raise UserError(f"--{name} is not for a plan: {instead}")
    defaults = {name: value for name, value in PLAN_DEFAULTS.items() if name not in train.model_fields_set}
    return PlanCommand(validate_settings(own, PlanSettings), train.completed(**defaults))


# tiedlora sweep -------------------------------------------------------------------------------------------------------

PAPER_RANKS = (2, 4, 8, 16, 32, 64, 128)
PAPER_LEARNING_RATES = (1e-4, 1e-5)
GRID = ("methods", "ranks", "learning_rates")  # each combination of these settings is a run
MOST_TOGETHER = 32  # maximum adapters of one run with --together auto; more save little time
SWEEP_FILE, SWEEP_BASE, SWEEP_STATUS = "sweep.yaml", "base.json", "sweep_status.json"  # in the sweep's folder
# Matches the flags of tiedlora run that a file may contain, with a NUL after each argument. Other flags would let the
# author of the file run any program or use other hosts.
_FROM_FILE = re.compile(r"(--(num_gpus|master_port)[=\0]\d{1,6}\0)*", re.ASCII)
# Rejected: a sweep's next launch repeats failed runs, and a sweep has many jobs.
_NOT_OF_SWEEP = frozenset(("max_restarts", "on_end", "show_command"))


class SweepSettings(CommandSettings, command="sweep"):
    """The settings of one sweep (the adapters to train, and how to train them), validated and frozen."""

    about: ClassVar[str] = (
        "Train methods x ranks x learning rates on a task, score the best learning rate of each on the test set, and"
        "\nwrite the paper's tables and figures. All settings of tiedlora train are accepted too (see its --help)."
    )
    groups: ClassVar[Mapping[str, str]] = {
        "run": "the sweep's folder; another launch with the same folder resumes the sweep",
        "grid": "which adapters are trained (defaults: the paper's grid)",
        "scores": "how the test set is scored",
        "processes": "how groups of runs are started, one after another; a later launch may change these settings",
        "slurm": "run the study as jobs of Slurm; repeat the command to submit what is left",
    }
    missing: ClassVar[Mapping[str, str]] = {"output_dir": "the folder of runs, scores, tables and figures"}

    output_dir: str = setting_field("run", "folder of runs, scores, tables and figures", lasts="start")
    dry_run: bool = setting_field(
        "run", "list the runs, their state and trained parameters; start nothing", False, lasts="start",
    )
    take_over: bool = setting_field(
        "run", "take the folders of the sweep and its runs over from another launch", False, lasts="command",
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
    learning_rates: tuple[float | Literal["auto"], ...] = setting_field(
        "grid", "learning rates; the best is scored; auto: see tiedlora train (default: 1e-4,1e-5)",
        PAPER_LEARNING_RATES, other_names="lr",
    )
    seeds: int = setting_field(
        "grid", "train each adapter with N seeds (--seed, --seed + 1, ...); all seeds of the best rate are scored", 1,
        ge=1, le=1000, other_names="num_seeds n_seeds",
    )
    single_layers: tuple[int, ...] | Literal["paper"] | None = setting_field(
        "grid", "also train LoRA on one layer: 1-based layers, or paper for 1, 4, 8, ... and the last (default: none)",
        None,
    )
    single_layer_rank: int = setting_field("grid", "rank of LoRA on one layer, and of its tl5 counterpart", 16, ge=1)

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
        "maximum number of runs in a group, which share the base and micro-batches; auto: as many as fit in this"
        f" machine's free memory, at most {MOST_TOGETHER}",
        "auto",
    )
    halving: bool = setting_field(
        "processes", "stop a run if another learning rate has a lower validation loss by more than the noise", False,
    )

    slurm: str | None = setting_field(
        "slurm",
        "submit the base score, an array with one task per group, and the scores as jobs with these options of sbatch,"
        ' e.g. "--nodes=1 --gpus-per-node=8 --time=04:00:00 --array=%4" (at most 4 tasks at once), or ""', None,
        lasts="command",
    )
    gpu: str | None = shared_field(
        Settings, "gpu", "with --slurm or --dry_run: the kind of card, for --together auto and GPU hours",
        group="slurm", lasts="command",
    )
    constants: str | None = shared_field(PlanSettings, "constants", group="slurm", lasts="command")
    part: str | None = setting_field(
        "slurm", "run one part of a study that --slurm has submitted: base, scores, or the name of a group's first run",
        None, lasts="command",
    )

    @classmethod
    def default_text(cls, name: str) -> str:
        """Return the default of a field for the help; '' for a setting in `GRID`, whose help text states it."""
        return "" if name in GRID else super().default_text(name)

    def _check_fit(self) -> None:
        for name, values in self:
            if values == ():
                raise ValueError(f"--{name} is empty; give one value or more, with commas between them")
            for index, value in enumerate(values if isinstance(values, tuple) else ()):
                if value in values[:index]:
                    raise ValueError(f"--{name} has {value} twice; give each value once")
        for name in ("ranks", "single_layers"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and min(numbers) < 1:
                raise ValueError(f"--{name} {min(numbers)}: {name.replace('_', ' ')} start at 1; increase it")
        for rate in self.learning_rates:
            if rate != "auto" and rate <= 0:
                raise ValueError(f"--learning_rates {rate:g}: a learning rate must be above 0")
        if self.together != "auto" and self.together < 1:
            raise ValueError(f"--together {self.together}: give auto, or an integer of at least 1")
        if self.halving and len(self.learning_rates) < 2:
            raise ValueError("--halving compares learning rates; give two or more to --learning_rates")
        if self.halving and self.together != "auto" and self.together < len(self.learning_rates):
            raise ValueError(
                f"--halving compares learning rates that train together; give --together auto, or"
                f" {len(self.learning_rates)} or more"
            )
        fields.launcher_words(self.launcher_args)
        fields.launcher_words(self.slurm, flag="slurm")
        if self.part is not None and (self.slurm is not None or self.dry_run):
            raise ValueError(f"--part {self.part} runs here; remove --{'dry_run' if self.slurm is None else 'slurm'}")
        for name in ("gpu", "constants"):
            if getattr(self, name) is not None and self.slurm is None and not self.dry_run:
                raise ValueError(f"--{name} needs --slurm or --dry_run; a sweep here uses the cards of this machine")
        if self.gpu is not None and self.constants is not None:
            raise ValueError(f"--constants {self.constants} and --gpu {self.gpu} both describe the cards; remove one")


def parse_launcher(words: Sequence[str]) -> LaunchSettings:
    """Return the settings of tiedlora run in --launcher_args. Raise UserError if they are not valid."""
    with naming("--launcher_args"):
        found = validate_settings(parse_words(words, LaunchSettings), LaunchSettings)
        if others := found.model_fields_set & _NOT_OF_SWEEP:
            raise UserError(f"--{min(others)} is a flag of tiedlora run only; remove it")
        return found


@dataclass(frozen=True)
class SweepCommand:
    """A parsed command line of tiedlora sweep.

    Attributes:
        given: the training settings that the user gave, by name. All others have the defaults of tiedlora train.
        train: all training settings of the grid's first run.
    """

    settings: SweepSettings
    given: Mapping[str, Any]
    train: Settings

    @property
    def shared(self) -> dict[str, Any]:
        """The training settings of all runs: the given ones, and the seed that decides their validation rows."""
        return {**self.given, "split_seed": self.train.split_seed}

    @property
    def launcher(self) -> LaunchSettings:
        """Return the settings in --launcher_args. Raise UserError if they are not valid."""
        return parse_launcher(fields.launcher_words(self.settings.launcher_args))


def parse_sweep(argv: Sequence[str]) -> SweepCommand:
    """Return the parsed command line of a sweep. The command line overrides the file of --config. Both override the
    settings that an earlier launch saved in the sweep's folder, so --output_dir alone is enough to resume a sweep.

    Raises:
        UserError: a setting is unknown, out of range or set by the sweep itself.
    """
    decided = fields.decided_by("sweep", Settings)
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
        raise UserError(f"--{others[0]} cannot be combined with --tables_from, which only reads sweeps; remove one")
    source = config
    with naming_file(config, read.keys() - values.keys()):
        started = user_path(as_given(merged.get("output_dir", "")), flag="--output_dir") / SWEEP_FILE
    if "output_dir" in merged and "tables_from" not in merged and started.is_file():
        before = read_yaml(str(started), Settings, SweepSettings)
        source = source if "launcher_args" in merged else str(started)
        merged = {**before, **merged}
    with naming_file(config, read.keys() - values.keys()):
        command = make_command(merged)
    words = fields.launcher_words(command.settings.launcher_args)
    if "launcher_args" not in values and not _FROM_FILE.fullmatch("".join(f"{word}\0" for word in words)):
        raise UserError(
            f"{source}: launcher_args are not read from a file, which another user may have written ("
            f"{command.settings.launcher_args}); give --launcher_args again on the command line"
        )
    return command


def make_command(values: Mapping[str, Any]) -> SweepCommand:
    """Return a command with these settings of the sweep and of training. Raise UserError if a setting is wrong."""
    settings = validate_settings({n: v for n, v in values.items() if n in SweepSettings.model_fields}, SweepSettings)
    given = {n: v for n, v in values.items() if n not in SweepSettings.model_fields}
    return SweepCommand(settings, given, resolve_train(settings, given))


def resolve_train(settings: SweepSettings, given: Mapping[str, Any]) -> Settings:
    """Return the training settings of the grid's first run. Raise UserError if a setting is wrong."""
    if settings.tables_from is not None:
        return make_settings({})
    first = {
        "method": settings.methods[0],
        "rank": settings.ranks[0],
        "learning_rate": settings.learning_rates[0],
        "output_dir": settings.output_dir,
    }
    return make_settings({**given, **first})
