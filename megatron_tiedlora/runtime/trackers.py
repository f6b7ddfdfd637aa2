"""--report_to: the rows of metrics.jsonl for experiment trackers, through `accelerate.tracking`.

TensorBoard is written by `MetricsLog` itself, which can remove the rows beyond a resumed step. The other trackers get
every row as it comes; a resumed run is a new run of theirs. A tracker that fails during the run is left out from there
on: the numbers are in metrics.jsonl.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.config.train_fields import TENSORBOARD

PROJECT = "tiedlora"  # that the runs belong to, if the tracker's own environment variable does not name one
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJECT",
    "clearml": "CLEARML_PROJECT",
}
# The argument that names a run within its project, of trackers that have one.
_RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError if the package of one of the trackers, or accelerate for those of others, is not installed."""
    for package in (*names, *(["accelerate"] if {*names} - {TENSORBOARD} else [])):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb's own, is no package
            raise UserError(
                f"--report_to {','.join(names)}: the package {package} is not installed; pip install {package}, or"
                " give others or none"
            )


class Trackers:
    """The trackers of --report_to other than TensorBoard, on rank 0."""

    def __init__(self, names: Sequence[str], *, folder: Path, settings: Mapping[str, Any]) -> None:
        """Start a run called like `folder` in each of them, with `settings` as its configuration.

        Raises:
            UserError: one of them cannot start.
        """
        self._running: dict[str, Any] = {}
        for name in names:
            if name == TENSORBOARD:
                continue
            try:
                self._running[name] = _started(name, folder, settings)
            except Exception as error:  # a tracker's client raises what it likes
                self.close()
                why = f"cannot start ({first_line(error)}); set it up, or leave it out"
                raise UserError(f"--report_to {name}: {why}") from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row of metrics.jsonl."""
        values = {f"{row['split']}/{name}": value for name, value in row.items() if name not in ("step", "split")}
        for name, tracker in list(self._running.items()):
            try:
                tracker.log(values, step=row["step"])
            except Exception as error:
                del self._running[name]
                show(
                    f"note: --report_to {name} failed at step {row['step']} ({first_line(error)}); the run continues"
                    " without it, and metrics.jsonl has every row",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """Tell every tracker that the run has ended."""
        for name, tracker in self._running.items():
            try:
                tracker.finish()
            except Exception as error:
                show(f"note: --report_to {name} failed at the end ({first_line(error)})", file=sys.stderr)
        self._running = {}


def _started(name: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import clear_environment

    # accelerate's log messages ask for its state. Only rank 0 reports, so it must not see that several were launched.
    with clear_environment():
        PartialState(cpu=True)
    kind = LOGGER_TYPE_TO_CLASS[name]
    folders = (str(folder),) if kind.requires_logging_directory else ()
    keywords = {_RUN_NAMES[name]: folder.name} if name in _RUN_NAMES else {}
    if name == "wandb":
        keywords["dir"] = str(folder)
    project = os.environ.get(_PROJECT_VARIABLES.get(name, ""), "") or PROJECT
    tracker = kind(project, *folders, **keywords)
    getattr(tracker, "start", lambda: None)()  # earlier versions start when they are made
    plain = {key: value if isinstance(value, str | int | float) else str(value) for key, value in settings.items()}
    tracker.store_init_configuration(plain)
    return tracker
