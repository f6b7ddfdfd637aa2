"""Every setting of tiedlora doctor: the hosts, the folder that a job writes, and its parallel sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from pydantic import model_validator

from megatron_tiedlora.config.fields import CommandSettings, setting_field, shared_field
from megatron_tiedlora.config.launch_settings import LauncherName, LaunchSettings, check_launcher
from megatron_tiedlora.config.train_fields import TrainFields

GROUPS = {
    "run": "which hosts are checked, and where the findings go",
    "job": "what a job will write; give the same value as for tiedlora train",
    "parallel": "parallel sizes of the job (data-parallel size = world size / (tensor x pipeline))",
    "limits": "limits of what counts as healthy",
}
ABOUT = """\
Check the hosts of a job before it starts. It finds hosts that are down, differing versions, clocks that differ,
folders that are not shared, and networks that do not connect the ranks.

    tiedlora doctor --hostfile hostfile --output_dir RUNS --tensor_parallel 2
    tiedlora doctor                            inside a Slurm allocation (srun, no ssh), else this machine alone

The job's ranks are started briefly, by the launcher that the job will use. Each host reports what it has, and the ranks
run an all-reduce in each tensor, pipeline and data parallel group. No files are left on any host.
Exit status: 0 ready, 1 not ready, 2 for a wrong flag or hostfile."""


_launch = partial(shared_field, LaunchSettings, group="run")
_train = partial(shared_field, TrainFields, group="job")


class DoctorSettings(CommandSettings):
    """The settings of one check, validated and frozen."""

    prog: ClassVar[str] = "tiedlora doctor"
    about: ClassVar[str] = ABOUT
    groups: ClassVar[Mapping[str, str]] = GROUPS

    hostfile: str | None = setting_field(
        "run", "`NAME slots=N` lines, as for deepspeed (default: the hosts of the Slurm allocation, or this machine)",
        None,
    )
    launcher: LauncherName = _launch("launcher", "how the ranks are started, as for tiedlora run")
    launcher_args: str | None = _launch("launcher_args", 'arguments of the launcher itself, e.g. "--cpu-bind=none"')
    json_file: str | None = setting_field(
        "run", "write everything to this file, for scripts; - prints it instead of the table", None, flag="json",
    )
    output_dir: str | None = _train("output_dir", "where runs will be written; should be shared by all hosts")

    tensor_parallel: int = _train("tensor_parallel", "ranks that share each layer", group="parallel")
    pipeline_parallel: int = _train("pipeline_parallel", "stages that share the layers", group="parallel")
    master_port: int | None = shared_field(LaunchSettings, "master_port", group="parallel")
    allreduce_mb: float = setting_field(
        "parallel", "megabytes per rank in the all-reduce that measures bandwidth", 64.0, gt=0, le=16384,
    )

    timeout_seconds: float = setting_field(
        "limits", "longest wait for a host's answers, for the rendezvous, and for an all-reduce", 60.0, ge=5, le=86400,
    )
    max_clock_skew: float = setting_field("limits", "seconds that a host's clock may differ from this one's", 1.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> DoctorSettings:
        check_launcher(self.launcher, self.hostfile, self.launcher_args)
        return self
