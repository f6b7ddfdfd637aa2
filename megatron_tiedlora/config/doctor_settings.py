"""Every setting of tiedlora doctor: the hosts, the files that a job reads and writes, and its parallel sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

from pydantic import model_validator

from megatron_tiedlora.config.fields import CommandSettings, marked, setting_field, shared_field
from megatron_tiedlora.config.launch_settings import LauncherName, LaunchSettings, check_launcher
from megatron_tiedlora.config.presets import is_preset
from megatron_tiedlora.config.train_fields import TrainFields

GROUPS = {
    "run": "which hosts are checked, and where the findings go",
    "job": "what a job will read and write; give the same values as for tiedlora train",
    "parallel": "parallel sizes of the job (data-parallel size = world size / (tensor x pipeline))",
    "limits": "limits of what counts as healthy",
}
ABOUT = """\
Check the hosts of a job before it starts. It finds hosts that are down, differing versions, missing paths,
clocks that differ, and networks that do not connect the ranks.

    tiedlora doctor --hostfile hostfile --model MODEL --output_dir RUNS --tensor_parallel 2
    tiedlora doctor --model MODEL              inside a Slurm allocation (srun, no ssh), else this machine alone

    tiedlora doctor --hostfile hostfile --model MODEL --measure constants.json

The job's ranks are started briefly, by the launcher that the job will use. Each host reports what it has, and the ranks
run an all-reduce in each tensor, pipeline and data parallel group. With --measure and no error, all ranks then measure
the constants that `tiedlora plan --constants` reads. No files are left on any host.
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
    ssh_port: int | None = setting_field(
        "run", "port of the hosts' ssh, as in `deepspeed --ssh_port`", None, ge=1, le=65535,
    )
    json_file: str | None = setting_field(
        "run", "write everything to this file, for scripts; - prints it instead of the table", None, flag="json",
    )
    measure: str | None = setting_field(
        "run", "if the hosts are ready, measure with all ranks what tiedlora plan needs, and write it to this file",
        None,
    )
    measure_seconds: float = setting_field("run", "about how long --measure takes", 60.0, gt=0, le=3600)

    model: str | None = _train(
        "model", "the base model, the same on every host: a folder, demo, or a hub id (searched in each host's cache)",
        default=None,
    )
    train_file: str | None = _train(
        "train_file",
        "training rows, the same on every host: a file, two aligned texts A.de,A.en, or a hub id (not"
        " checked; a warning says so)",
    )
    validation_file: str | None = _train("validation_file", "the same for validation rows")
    test_file: str | None = _train("test_file", "the same for test rows")
    base: str | None = _train("base", "the storage format of the base's linears")
    products: Literal["fp8"] | None = _train("products", "fp8: the job multiplies in fp8, as --products of train")
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
        if self.model is not None and is_preset(self.model):
            raise ValueError(f"--model {self.model} is a shape without files to look for; give a folder or hub id")
        if self.ssh_port is not None and self.hostfile is None:
            raise ValueError("--ssh_port needs --hostfile: without one no host is reached by ssh")
        if self.measure is None and "measure_seconds" in self.model_fields_set:
            raise ValueError("--measure_seconds needs --measure")
        if self.measure is not None and self.model is None:
            raise ValueError(f"--measure {self.measure} needs --model: matmuls of its widths are measured")
        written = {} if self.measure is None else {"measure": self.measure}
        for name, value in {**self.paths(), **written}.items():
            if not value.strip():
                raise ValueError(f"--{name}: the path is empty")
        return self

    def paths(self) -> dict[str, str]:
        """The paths that must exist on every host, by flag, as the user gave them."""
        given = {name: getattr(self, name) for name in ("model", *marked(DoctorSettings, holds="rows"))}
        return {name: value for name, value in given.items() if value is not None}
