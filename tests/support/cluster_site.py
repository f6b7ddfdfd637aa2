"""Hosts with a tiny model on them, and the runs on one host that runs on all of them must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_routes import Task
from fake_hosts import FakeCluster
from host_needs import why_not
from run_helpers import Base, run, write_base
from slurm_cluster import SlurmCluster

LAYOUTS = {"tp2": {"tensor_parallel": 2}, "pp2": {"pipeline_parallel": 2}, "dp2": {}, "pp3": {"pipeline_parallel": 3}}


@dataclass(frozen=True)
class Site:
    """Hosts with what jobs on them need.

    Attributes:
        slurm: where it is installed.
        whole: a folder for the run of each layout on one host.
        changes: to the settings of a tiny run.
    """

    base: Base
    cluster: FakeCluster
    slurm: SlurmCluster | None
    whole: Path
    changes: dict[str, Any]

    def settings(self, layout: str) -> dict[str, Any]:
        """Of all runs of a layout."""
        return {"warmup_steps": 1, "ds_config": "zero1.json", **self.changes, **LAYOUTS[layout]}

    def whole_run(self, layout: str) -> Path:
        """The run folder of an undisturbed run on one host."""
        folder = self.whole / layout
        if not folder.exists():
            run(self.base, folder, ranks=len(self.cluster.hosts), **self.settings(layout))
        return folder

    def task(self, folder: Path, layout: str, *, work: Path, prelude: str = "", **changes: Any) -> Task:
        """A run with run folder `folder` whose launcher is started in `work`."""
        arguments = self.base.arguments(output_dir=folder, **{**self.settings(layout), **changes})
        return Task(self.cluster, arguments, work, self.base.cache, prelude=prelude, slurm=self.slurm)


@contextmanager
def opened_site(cluster: FakeCluster, folders: pytest.TempPathFactory, **changes: Any) -> Iterator[Site]:
    """The site of a test module."""
    base = write_base(folders.mktemp("base"))
    with nullcontext() if why_not("slurm") else SlurmCluster(cluster, kill_wait=5) as slurm:
        yield Site(base, cluster, slurm, folders.mktemp("whole"), changes)
