"""The run folder: its files, its owner, and the logs that rank 0 writes there."""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_tiedlora.base import files, messages
from megatron_tiedlora.base.files import Guard, unguarded
from megatron_tiedlora.base.messages import UserError, first_line, installed_versions, os_errors, show, user_path
from megatron_tiedlora.base.output_folder import PathIn, check_writable, last_name, numbered, reject_links
from megatron_tiedlora.base.ownership import FolderLock, Owner, is_of_owner, owner_in_words, take_folder
from megatron_tiedlora.base.shapes import QKV, TARGET_NAMES
from megatron_tiedlora.config.fields import TENSORBOARD
from megatron_tiedlora.config.settings import Settings

State = Literal["finished", "stopped", "failed"]
_LONGEST_ROW, _MOST_ROWS = 2**14, 10**7  # bytes, and rows
LOGS_FOLDER = "logs"
_BOUND = 1e300  # of numbers in a log: excludes NaN and infinity, and values that cannot be drawn


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run, and functions that write some of them.

    A run of several adapters (--adapters) has this folder and RUN/NAME, the run folder of the adapter NAME.

    Attributes:
        owner: the start that writes; None to read only.
        of_several: whether it is that of a run of several adapters.
        running: the folders of the adapters that have not ended, each with its last step. They end as the run does.
    """

    path: Path
    owner: Owner | None = field(default=None, compare=False)
    of_several: bool = False
    running: "Callable[[], Iterable[tuple[RunFolder, int]]]" = field(default=tuple, compare=False)

    checkpoints = PathIn("checkpoints")  # resumable ones, and `latest`
    logs = PathIn(LOGS_FOLDER)  # the output of each rank
    tensorboard = PathIn("tensorboard")  # the numbers of `metrics` for TensorBoard
    profile = PathIn("profile")  # the trace of each rank, with --profile
    adapter = PathIn("adapter")  # the best adapter so far, native format
    status = PathIn("run_status.json")  # how the run ended; absent while it runs
    table = PathIn("table.csv")  # one row per adapter, of a run of several
    metrics = PathIn("metrics.jsonl")  # one JSON object per line
    scores = PathIn("scores.json")  # of greedy decoding before and after training

    @staticmethod
    def of(settings: Settings, path: Path, owner: Owner | None = None) -> "RunFolder":
        """The folder `path` of a run with these settings."""
        return RunFolder(path, owner, of_several=settings.adapters is not None)

    @property
    def settings(self) -> Path:
        """Every setting as resolved, versions and seed; of several adapters those of all and of each."""
        return self.path / ("adapters.yaml" if self.of_several else "run.yaml")

    @property
    def guard(self) -> Guard:
        """A check that raises UserError if this start no longer owns the folder."""
        return unguarded if self.owner is None else self.owner.check

    @property
    def is_run(self) -> bool:
        """Whether a run has used this folder."""
        return self.settings.is_file()

    def write_settings(self, content: Mapping[str, Any], *, ranks: int) -> None:
        """Write run.yaml, with the folder, the number of ranks and versions of libraries beside `content`, and remove
        an earlier run_status.json. Raises UserError if the folder cannot be written."""
        versions = installed_versions("torch", "deepspeed", "transformers")
        more = {"output_dir": str(self.path), "ranks": ranks, "versions": versions}
        files.write_yaml(self.settings, {**content, **more}, guard=self.guard)
        files.discard(self.status, guard=self.guard)

    def write_status(self, state: State, *, step: int, reason: str) -> None:
        """Write run_status.json, and that of each of several adapters that has not ended."""
        files.write_json(self.status, {"state": state, "step": step, "reason": reason}, guard=self.guard)
        for folder, own_step in self.running() if self.of_several else ():
            is_main = folder.owner is not None and folder.owner.is_main
            if not is_main and folder.status.exists():
                continue  # only rank 0 knows which ones it has finished by now
            with suppress(UserError):  # another start may have one of them by now
                folder.write_status(state, step=own_step, reason=reason)

    def write_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace table.csv of a run of several adapters. Raises UserError if it cannot be written."""
        if self.of_several:
            files.write_text(self.table, messages.csv_text(list(rows[0]), rows), guard=self.guard)

    def new_folder(self, path: Path) -> AbstractContextManager[Path]:
        """`files.new_folder` for a folder of the run."""
        return files.new_folder(path, guard=self.guard)


def run_name(settings: Settings) -> str:
    """MODEL-TASK-METHOD-rRANK[-TARGETS], the name of the run folder; with --adapters FILE, MODEL-FILE."""
    if settings.adapters is not None:
        return f"{last_name(settings.model)}-{Path(settings.adapters).stem}"
    targets = "all" if settings.targets == TARGET_NAMES else "+".join(settings.targets)
    name = f"{last_name(settings.model)}-{settings.task}-{settings.method}-r{settings.rank}"
    return name if settings.targets == (QKV,) else f"{name}-{targets}"


def take_run_folder(
    settings: Settings, *, before: Callable[[RunFolder], None] = lambda folder: None
) -> tuple[RunFolder, FolderLock]:
    """Choose the folder of a run and become its owner; make it if it is new.

    Half-written files of earlier starts are removed at once, since from now on none of their writes can finish.

    Args:
        before: called before an existing folder is taken from another start; if it raises, the folder is unchanged.

    Raises:
        UserError: as of `choose_run_folder`; or another start owns the folder and --take_over was not given.
    """
    resumes = settings.resume != "none"
    while True:
        folder = choose_run_folder(settings)
        force = "--take_over" if resumes else "--resume auto --take_over"
        try:
            lock = take_folder(
                folder.path,
                new=not folder.path.exists(),
                resumes=resumes,
                take_over=settings.take_over,
                before=partial(before, folder),
                hint=f"wait until it ends, give another --output_dir, or take it over with {force}",
            )
        except FileExistsError:  # another start was faster, so the folder is no longer free
            if not folder.path.exists():
                raise UserError(f"{folder.path}: is a broken link; give another --output_dir") from None
            continue
        taken = replace(folder, owner=lock.owner)
        for path in (taken.path, taken.checkpoints, taken.logs, taken.profile):
            files.remove_leftovers(path, guard=taken.guard)
        return taken, lock


def choose_run_folder(settings: Settings) -> RunFolder:
    """Choose the folder of a run. The folder may be a link, but the folders in it that the run writes to may not.

    Without --output_dir it is runs/NAME, of `run_name`: the first free one of NAME, NAME-2, NAME-3, ...; to resume, the
    last of these, or the run of the checkpoint given to --resume.

    Raises:
        UserError: the folder holds a run and --resume was not given, or holds other files or links, or is not writable.
    """
    output_dir, resume = settings.output_dir, settings.resume
    if output_dir is not None:
        folder = RunFolder.of(settings, user_path(output_dir))
        check_writable(folder.path, given=output_dir)
        items = folder.path.iterdir() if folder.path.is_dir() else ()
        foreign = not folder.is_run and not all(is_of_owner(item.name) for item in items)
        if foreign or (resume == "none" and folder.is_run):
            owner = owner_in_words(folder.path)
            what = f"the run of {owner or 'an earlier start'}" if folder.is_run else "other files"
            advice = "" if resume != "none" else ", or --resume auto to continue a run"
            raise UserError(f"--output_dir {output_dir} holds {what}; give a new folder{advice}")
    else:
        last, following = _last_and_next(settings)
        folder = RunFolder.of(settings, last if resume != "none" or not last.exists() else following)
        if resume not in ("none", "auto"):
            named = replace(folder, path=user_path(resume).parent.parent)
            folder = named if named.is_run else folder
    reject_links(folder.checkpoints, folder.logs, folder.tensorboard, folder.profile)
    return folder


def last_run_folder(settings: Settings) -> RunFolder:
    """The folder that --resume auto continues without --output_dir: the last of runs/NAME, NAME-2, NAME-3, ..."""
    return RunFolder.of(settings, _last_and_next(settings)[0])


def _last_and_next(settings: Settings) -> tuple[Path, Path]:
    """The last of these folders, or runs/NAME if there is none; and the one that follows it."""
    folders = numbered(Path("runs") / run_name(settings))
    return next(pair for pair in pairwise(folders) if not pair[1].exists())


class MetricsLog:
    """metrics.jsonl, and what --report_to names: TensorBoard, and on rank 0 trackers through `accelerate.tracking`.

    After a resume, rows beyond the resumed step are removed from the first two: they are written again. Trackers get
    every row as it comes; a resumed run is a new run of theirs. One that fails during the run is left out from there
    on: the numbers are in metrics.jsonl.

    metrics.jsonl is replaced and opened once, so that a start which has lost the folder cannot add rows to it.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        resumed_step: int,
        evaluated_step: int | None = None,
        report_to: Sequence[str] = (TENSORBOARD,),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the logs of a run that resumes from `resumed_step` and was last evaluated after `evaluated_step`.

        Args:
            report_to: of --report_to.
            settings: what trackers show as the run's configuration.

        Raises:
            UserError: a file cannot be written, or a tracker cannot start.
        """
        self._folder = folder
        last = {"train": resumed_step, "validation": evaluated_step or 0}
        rows = read_metrics(folder.metrics) if resumed_step else []
        write_metrics(folder.metrics, [r for r in rows if r["step"] <= last[r["split"]]], guard=folder.guard)
        with os_errors(f"{folder.metrics}: cannot be written"):
            self._stream = folder.metrics.open("ab", buffering=0)
        folder.guard()  # checked first: TensorBoard's file has a unique name, which no later check can undo
        self._board: Any = None
        if TENSORBOARD in report_to:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

            with os_errors(
                f"{folder.tensorboard}: cannot be written", fix="; make it a folder that you own, or remove it"
            ):
                self._board = SummaryWriter(folder.tensorboard, purge_step=resumed_step + 1 if resumed_step else None)
        self._trackers: dict[str, Any] = {}
        for name in report_to:
            if name == TENSORBOARD:
                continue
            try:
                self._trackers[name] = _started(name, folder.path, settings or {})
            except Exception as error:  # a tracker's client raises what it likes
                self.close()
                why = f"cannot start ({first_line(error)}); set it up, or leave it out"
                raise UserError(f"--report_to {name}: {why}") from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row: `step`, `split`, and unrounded numbers.

        Raises:
            UserError: the disk is full, or another start has taken over the folder.
        """
        self._folder.guard()
        values = {f"{row['split']}/{name}": value for name, value in row.items() if name not in ("step", "split")}
        with os_errors(f"{self._folder.path}: its logs cannot be written"):
            if not os.path.samestat(os.fstat(self._stream.fileno()), self._folder.metrics.stat()):
                raise OSError(f"{self._folder.metrics.name} was replaced")
            line = (json.dumps(dict(row)) + "\n").encode()
            while line:  # on a full disk only a part may be written; the next write raises the reason
                line = line[self._stream.write(line) :]
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, row["step"], walltime=time.time())
                self._board.flush()
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(values, step=row["step"])
            except Exception as error:
                del self._trackers[name]
                show(
                    f"note: --report_to {name} failed at step {row['step']} ({first_line(error)}); the run continues"
                    " without it, and metrics.jsonl has every row",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """Close the files, and end the run of each tracker."""
        self._stream.close()
        if self._board is not None:
            self._board.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                show(f"note: --report_to {name} failed at the end ({first_line(error)})", file=sys.stderr)
        self._trackers = {}


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; malformed lines (for example truncated by a kill) are skipped.

    Raises:
        UserError: the file exists and cannot be read.
    """
    if not file.is_file():
        return []
    with os_errors(f"{file}: cannot be read"), file.open("rb") as stream:
        lines = iter(lambda: stream.readline(_LONGEST_ROW), b"")  # pieces of a longer line are malformed
        return [row for row in map(metrics_row, islice(lines, _MOST_ROWS)) if row is not None]


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """The row of one line: `step`, `split` and finite numbers, including `loss`; None if it is malformed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("split") not in ("train", "validation") or "loss" not in row:
        return None
    numbers = [value for name, value in row.items() if name != "split"]
    if type(row.get("step")) is not int or not all(type(n) in (int, float) and abs(n) < _BOUND for n in numbers):
        return None
    return row


def write_metrics(file: Path, rows: Iterable[Mapping[str, Any]], *, guard: Guard = unguarded) -> None:
    """Replace the rows of a metrics.jsonl. Raises UserError if it cannot be written."""
    files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows), guard=guard)


def plot_losses(metrics: Path, target: Path, *, guard: Guard = unguarded) -> None:
    """Plot training and validation loss over steps as a PNG. Raises UserError if it cannot be written."""
    from matplotlib import pyplot

    plain_figures()
    rows = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.12, top=0.97)  # tight_layout would draw all of it once more
    for split, style in (
        ("train", {"color": "#7aa6c2", "linewidth": 1.2}),
        ("validation", {"color": "#b5401f", "marker": "o"}),
    ):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=split, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, target, guard=guard)


def plain_figures() -> None:
    """Draw without a screen and with default settings: a matplotlibrc in the current folder could start programs."""
    import matplotlib

    matplotlib.rcdefaults()
    matplotlib.use("Agg")


def save_figure(figure: Any, target: Path, *, guard: Guard = unguarded) -> None:
    """Write a matplotlib figure as a PNG atomically, with the same bytes for the same figure, and close it.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib import pyplot

    try:
        with files.new_file(target, guard=guard) as unfinished:
            figure.savefig(unfinished, format="png", metadata={"Software": None})
    finally:
        pyplot.close(figure)


# Trackers -------------------------------------------------------------------------------------------------------------


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
_LAUNCH_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError if the package of one of the trackers, or accelerate for those of others, is not installed."""
    for package in (*names, *(["accelerate"] if {*names} - {TENSORBOARD} else [])):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb's own, is no package
            raise UserError(
                f"--report_to {','.join(names)}: the package {package} is not installed; pip install {package}, or"
                " give others or none"
            )


def _started(name: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # accelerate's log messages ask for its state. Only rank 0 reports, so it must not see that several were launched.
    hidden = {name: os.environ.pop(name) for name in _LAUNCH_VARIABLES if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)
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
