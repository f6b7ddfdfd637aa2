"""Settings of tiedlora run: a few flags of its own. All other flags on its command line belong to tiedlora train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import model_validator

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.cli import parse_settings, split_words
from megatron_tiedlora.config.fields import (
    LONGEST_WAIT_MINUTES,
    CommandSettings,
    setting_field,
    shell_words,
    validate_settings,
)
from megatron_tiedlora.config.settings import Settings

LauncherName = Literal["auto", "deepspeed", "mpirun", "srun", "torchrun"]
_LONGEST_WAIT = 60 * LONGEST_WAIT_MINUTES  # seconds


class LaunchSettings(CommandSettings):
    """How a job is started and watched, validated and frozen."""

    prog: ClassVar[str] = "tiedlora run"
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

    launcher: LauncherName = setting_field(
        "start",
        "auto: srun in a Slurm allocation, else deepspeed, here or with --hostfile; torchrun: this machine only",
        "auto",
    )
    hostfile: str | None = setting_field("start", "hosts of the job, one `NAME slots=N` line per host", None)
    num_gpus: int | None = setting_field(
        "start", "ranks per host (default: its slots or Slurm tasks; locally all GPUs, or 1 without GPUs)", None, ge=1,
    )
    master_addr: str | None = setting_field(
        "start", "address of the first host, for the rendezvous (default: its name)", None,
    )
    master_port: int | None = setting_field("start", "port of the rendezvous (default: random)", None, ge=1, le=65535)
    launcher_args: str | None = setting_field(
        "start", 'arguments of deepspeed, mpirun, srun or torchrun itself, e.g. "--cpu-bind=none"', None,
    )
    max_restarts: int = setting_field(
        "start", "how often to restart after a failure, from the last checkpoint (--resume auto)", 0, ge=0,
    )
    show_command: bool = setting_field("start", "print hosts, environment and command; start nothing", False)

    grace_seconds: float = setting_field(
        "time limits",
        "how long ranks that still save are awaited after their launcher has ended; then those left on this machine are"
        " ended",
        120.0, ge=0, le=_LONGEST_WAIT,
    )

    @model_validator(mode="after")
    def _check(self) -> "LaunchSettings":
        check_launcher(self.launcher, self.hostfile, self.launcher_args)
        return self


def check_launcher(launcher: str, hostfile: str | None, launcher_args: str | None) -> None:
    """Raise ValueError if a launcher, the hosts and its arguments do not fit each other."""
    shell_words("launcher_args", launcher_args)
    if launcher == "srun" and hostfile is not None:
        raise ValueError("--launcher srun runs on the nodes of its Slurm allocation; remove --hostfile")
    if launcher == "torchrun" and hostfile is not None:
        raise ValueError(
            "--launcher torchrun starts ranks on this machine only; choose another, or start torchrun on each host"
        )


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
    own, _, rest = split_words(words, LaunchSettings, more=given)
    config = own.pop("config", None)
    arguments = (*(("--config", config) if config is not None else ()), *rest)
    settings, train = validate_settings(own, LaunchSettings), parse_settings(arguments, Settings)
    if train.dry_run:
        raise UserError(
            "--dry_run starts no job; give it to tiedlora train, or give --show_command here to see the command"
        )
    return LaunchCommand(settings, train, arguments)
