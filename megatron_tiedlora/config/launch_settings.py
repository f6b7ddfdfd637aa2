"""Settings of the commands that start ranks on hosts: run, whose other flags are those of train, and doctor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.cli import parse_settings, split_words
from megatron_tiedlora.config.fields import (
    LONGEST_WAIT_MINUTES,
    CommandSettings,
    setting_field,
    shared_field,
    shell_words,
    validate_settings,
)
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.config.train_fields import TrainFields

LauncherName = Literal["auto", "deepspeed", "mpirun", "srun", "torchrun"]
_LONGEST_WAIT = 60 * LONGEST_WAIT_MINUTES  # seconds

_start = partial(setting_field, "start")
_train = partial(shared_field, TrainFields, group="job")


def _check_launcher(settings: Any) -> None:
    """Raise ValueError if a launcher, the hosts and its arguments do not fit each other."""
    shell_words("launcher_args", settings.launcher_args)
    if settings.launcher == "srun" and settings.hostfile is not None:
        raise ValueError("--launcher srun runs on the nodes of its Slurm allocation; remove --hostfile")
    if settings.launcher == "torchrun" and settings.hostfile is not None:
        raise ValueError(
            "--launcher torchrun starts ranks on this machine only; choose another, or start torchrun on each host"
        )


class LaunchSettings(CommandSettings, command="run"):
    """How a job is started and watched, validated and frozen."""

    about: ClassVar[str] = (
        "Start tiedlora train on the hosts of a job, watch it, and report how it ended.\n\n"
        "    tiedlora run --num_gpus 4 ...                          this machine\n"
        "    tiedlora run --hostfile hosts ...                      hosts reached by ssh\n"
        "    tiedlora run ...                                       in a Slurm allocation: its nodes\n\n"
        "The exit status is 0 if the run finished, or was stopped by a signal given to this command and saved."
    )
    examples: ClassVar[str] = (
        "Settings of tiedlora train follow, after -- or directly. The YAML file of --config holds only those."
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
    show_command: bool = _start("print hosts, environment and command; start nothing", False)

    grace_seconds: float = setting_field(
        "time limits",
        "how long ranks that still save are awaited after their launcher has ended; then those left on this machine are"
        " ended",
        120.0, ge=0, le=_LONGEST_WAIT,
    )

    check = _check_launcher


_launch = partial(shared_field, LaunchSettings)


class DoctorSettings(CommandSettings, command="doctor"):
    """The settings of one check, validated and frozen."""

    about: ClassVar[str] = """\
Check the hosts of a job before it starts. It finds hosts that are down, differing versions, clocks that differ,
folders that are not shared, and networks that do not connect the ranks.

    tiedlora doctor --hostfile hostfile --output_dir RUNS --tensor_parallel 2
    tiedlora doctor                            inside a Slurm allocation (srun, no ssh), else this machine alone

The job's ranks are started briefly, by the launcher that the job will use. Each host reports what it has, and the ranks
run an all-reduce in each tensor, pipeline and data parallel group. No files are left on any host.
Exit status: 0 ready, 1 not ready, 2 for a wrong flag or hostfile."""
    groups: ClassVar[Mapping[str, str]] = {
        "run": "which hosts are checked, and where the findings go",
        "job": "what a job will write; give the same value as for tiedlora train",
        "parallel": "parallel sizes of the job (data-parallel size = world size / (tensor x pipeline))",
        "limits": "limits of what counts as healthy",
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
        "run", "write everything to this file, for scripts; - prints it instead of the table", None, flag="json",
    )
    output_dir: str | None = _train("output_dir", "where runs will be written; should be shared by all hosts")

    tensor_parallel: int = _train("tensor_parallel", "ranks that share each layer", group="parallel")
    pipeline_parallel: int = _train("pipeline_parallel", "stages that share the layers", group="parallel")
    master_port: int | None = _launch("master_port", group="parallel")
    allreduce_mb: float = setting_field(
        "parallel", "megabytes per rank in the all-reduce that measures bandwidth", 64.0, gt=0, le=16384,
    )

    timeout_seconds: float = setting_field(
        "limits", "longest wait for a host's answers, for the rendezvous, and for an all-reduce", 60.0, ge=5, le=86400,
    )
    max_clock_skew: float = setting_field("limits", "seconds that a host's clock may differ from this one's", 1.0, ge=0)

    check = _check_launcher


@dataclass(frozen=True)
class LaunchCommand:
    """One start of tiedlora run: its own settings, those of tiedlora train, and the latter's arguments as given."""

    settings: LaunchSettings
    train: Settings
    arguments: tuple[str, ...]


def parse_launch(argv: Sequence[str]) -> LaunchCommand:
    """Parse the settings of both commands; `--` may separate them.

    Raises:
        UserError: something is unknown, out of range or contradictory.
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
