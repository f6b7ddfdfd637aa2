"""Choose a run folder, take it for this launch, and write its settings, status and logs."""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_tiedlora.base import files, messages
from megatron_tiedlora.base.files import Guard, unguarded
from megatron_tiedlora.base.installation import installed_versions
from megatron_tiedlora.base.messages import UserError, first_line, os_errors, show, user_path
from megatron_tiedlora.base.output_folder import PathIn, check_writable, last_name, numbered, reject_links
from megatron_tiedlora.base.ownership import FolderLock, Owner, is_of_owner, owner_in_words, take_folder
from megatron_tiedlora.base.shapes import QKV, TARGET_NAMES
from megatron_tiedlora.config.fields import TENSORBOARD
from megatron_tiedlora.config.settings import Settings

State = Literal["finished", "stopped", "failed"]
_LONGEST_ROW, _MOST_ROWS = 2**14, 10**7  # of a log file: bytes of a row, and number of rows
LOGS_FOLDER = "logs"
_BOUND = 1e300  # limit for numbers in a log, which excludes NaN, infinity and values that cannot be plotted


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: the paths of its files, and methods that write some of them.

    With --adapters, RUN/NAME is the run folder of the adapter NAME.

    Attributes:
        owner: the launch that may write to the folder; None if the folder is only read.
        of_several: whether the folder belongs to a run of several adapters.
        running: a function that returns the folders of adapters that have not ended, each with its last step.
    """

    path: Path
    owner: Owner | None = field(default=None, compare=False)
    of_several: bool = False
    running: "Callable[[], Iterable[tuple[RunFolder, int]]]" = field(default=tuple, compare=False)

    checkpoints = PathIn("checkpoints")  # resumable checkpoints, and `latest`
    logs = PathIn(LOGS_FOLDER)  # the output of each rank
    tensorboard = PathIn("tensorboard")  # the values of `metrics` for TensorBoard
    profile = PathIn("profile")  # the trace of each rank, with --profile
    adapter = PathIn("adapter")  # the best adapter so far, in the native format
    status = PathIn("run_status.json")  # how the run ended; missing while the run continues
    table = PathIn("table.csv")  # one row per adapter in a run of several adapters
    metrics = PathIn("metrics.jsonl")  # one JSON object per line
    scores = PathIn("scores.json")  # scores of greedy decoding before and after training

    @staticmethod
    def of(settings: Settings, path: Path, owner: Owner | None = None) -> "RunFolder":
        """Return the `RunFolder` at `path` for a run with these settings."""
        return RunFolder(path, owner, of_several=settings.adapters is not None)

    @property
    def settings(self) -> Path:
        """Return the path of the YAML file with settings and versions: run.yaml, or adapters.yaml with --adapters."""
        return self.path / ("adapters.yaml" if self.of_several else "run.yaml")

    @property
    def guard(self) -> Guard:
        """Return a function that raises UserError if this launch no longer owns the folder."""
        return unguarded if self.owner is None else self.owner.check

    @property
    def is_run(self) -> bool:
        """Return whether a run has used this folder."""
        return self.settings.is_file()

    def write_settings(self, content: Mapping[str, Any], *, ranks: int) -> None:
        """Write `content`, the folder, the number of ranks and library versions to the file `settings`. Remove an
        earlier run_status.json. Raise UserError if the folder cannot be written."""
        versions = installed_versions("torch", "deepspeed", "transformers")
        more = {"output_dir": str(self.path), "ranks": ranks, "versions": versions}
        files.write_yaml(self.settings, {**content, **more}, guard=self.guard)
        files.discard(self.status, guard=self.guard)

    def write_status(self, state: State, *, step: int, reason: str) -> None:
        """Write run_status.json to this folder, and to the folders of a run's adapters that have not ended."""
        files.write_json(self.status, {"state": state, "step": step, "reason": reason}, guard=self.guard)
        for folder, own_step in self.running() if self.of_several else ():
            is_main = folder.owner is not None and folder.owner.is_main
            if not is_main and folder.status.exists():
                continue  # only rank 0 knows which adapters are finished
            with suppress(UserError):  # a different launch may own one of these folders now
                folder.write_status(state, step=own_step, reason=reason)

    def write_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace table.csv of a run of several adapters. Raise UserError if it cannot be written."""
        if self.of_several:
            files.write_text(self.table, messages.csv_text(list(rows[0]), rows), guard=self.guard)


def run_name(settings: Settings) -> str:
    """Return a run folder's name: MODEL-TASK-METHOD-rRANK[-TARGETS], or MODEL-FILE with --adapters FILE."""
    if settings.adapters is not None:
        return f"{last_name(settings.model)}-{Path(settings.adapters).stem}"
    targets = "all" if settings.targets == TARGET_NAMES else "+".join(settings.targets)
    name = f"{last_name(settings.model)}-{settings.task}-{settings.method}-r{settings.rank}"
    return name if settings.targets == (QKV,) else f"{name}-{targets}"


def take_run_folder(
    settings: Settings, *, before: Callable[[RunFolder], None] = lambda folder: None
) -> tuple[RunFolder, FolderLock]:
    """Choose the folder of a run, create it if it is new, make this process its owner, and return both.

    Unfinished files of earlier launches are removed, because earlier launches can no longer complete them.

    Args:
        before: called before an existing folder is taken from another launch. If it raises, the folder is unchanged.

    Raises:
        UserError: as in `choose_run_folder`, or if another launch owns the folder and --take_over was not given.
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
        except FileExistsError:  # another launch has just created the folder
            if not folder.path.exists():
                raise UserError(f"{folder.path}: is a broken link; give another --output_dir") from None
            continue
        taken = replace(folder, owner=lock.owner)
        for path in (taken.path, taken.checkpoints, taken.logs, taken.profile):
            files.remove_leftovers(path, guard=taken.guard)
        return taken, lock


def choose_run_folder(settings: Settings) -> RunFolder:
    """Return the folder of a run. This folder may be a link, but the subfolders that the run writes to may not.

    Without --output_dir, a new run uses the first free folder of runs/NAME, runs/NAME-2 and so on (see `run_name`). A
    resumed run uses the last of these folders, or the folder of the checkpoint that is given to --resume.

    Raises:
        UserError: the folder contains other files or links, is not writable, or contains a run without --resume.
    """
    output_dir, resume = settings.output_dir, settings.resume
    if output_dir is not None:
        folder = RunFolder.of(settings, user_path(output_dir))
        check_writable(folder.path, given=output_dir)
        items = folder.path.iterdir() if folder.path.is_dir() else ()
        foreign = not folder.is_run and not all(is_of_owner(item.name) for item in items)
        if foreign or (resume == "none" and folder.is_run):
            owner = owner_in_words(folder.path)
            what = f"the run of {owner or 'an earlier launch'}" if folder.is_run else "other files"
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
    """Return the last folder of runs/NAME, runs/NAME-2 and so on, which --resume auto uses without --output_dir."""
    return RunFolder.of(settings, _last_and_next(settings)[0])


def _last_and_next(settings: Settings) -> tuple[Path, Path]:
    """Return the last existing folder of runs/NAME, runs/NAME-2 and so on (runs/NAME if none exists), and the next."""
    folders = numbered(Path("runs") / run_name(settings))
    return next(pair for pair in pairwise(folders) if not pair[1].exists())


class MetricsLog:
    """The logs of a run, which only rank 0 writes: metrics.jsonl, TensorBoard, and the other trackers in --report_to.
    Trackers other than TensorBoard are used through `accelerate.tracking`.

    After a resume, rows of later steps are removed from metrics.jsonl and TensorBoard, because they are written again.
    Trackers show a resumed run as a new run, which gets only new rows. A tracker that fails during the run gets no more
    rows. metrics.jsonl always has all rows.

    metrics.jsonl is replaced and opened once, so that a launch that no longer owns the folder cannot add rows to it.
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
        """Open the logs of a run that resumes after `resumed_step` and was last evaluated after `evaluated_step`.

        Args:
            report_to: the value of --report_to.
            settings: the run's settings, which trackers show as its configuration.

        Raises:
            UserError: a file cannot be written, or a tracker cannot start.
        """
        self._folder = folder
        last = {"train": resumed_step, "validation": evaluated_step or 0}
        rows = read_metrics(folder.metrics) if resumed_step else []
        write_metrics(folder.metrics, [r for r in rows if r["step"] <= last[r["split"]]], guard=folder.guard)
        with os_errors(f"{folder.metrics}: cannot be written", fix="; check the disk space and the permissions"):
            self._stream = folder.metrics.open("ab", buffering=0)
        folder.guard()  # before TensorBoard creates its file, which no later check removes
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
            except Exception as error:  # a tracker's client may raise any exception
                self.close()
                why = f"cannot start ({first_line(error)}); set up the tracker, or remove it from --report_to"
                raise UserError(f"--report_to {name}: {why}") from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, with `step`, `split` and unrounded values, to all logs.

        Raises:
            UserError: the disk is full, or another launch has taken over the folder.
        """
        self._folder.guard()
        values = {f"{row['split']}/{name}": value for name, value in row.items() if name not in ("step", "split")}
        fix = "; check the disk space, and that no other program replaces them"
        with os_errors(f"{self._folder.path}: its logs cannot be written", fix=fix):
            if not os.path.samestat(os.fstat(self._stream.fileno()), self._folder.metrics.stat()):
                raise OSError(f"{self._folder.metrics.name} was replaced")
            line = (json.dumps(dict(row)) + "\n").encode()
            while line:  # a full disk may accept only some bytes; the next write then raises
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
        """Close the files, and end the run in each tracker."""
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
    """Return the rows of a metrics.jsonl. Malformed lines, such as the last line of a killed run, are skipped.

    Raises:
        UserError: the file exists but cannot be read.
    """
    if not file.is_file():
        return []
    with os_errors(f"{file}: cannot be read", fix="; check its permissions"), file.open("rb") as stream:
        lines = iter(lambda: stream.readline(_LONGEST_ROW), b"")  # a longer line is read as malformed lines
        return [row for row in map(metrics_row, islice(lines, _MOST_ROWS)) if row is not None]


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line: `step`, `split`, and finite numbers with `loss`. Return None if it is malformed."""
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
    """Replace the rows of a metrics.jsonl. Raise UserError if the file cannot be written."""
    files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows), guard=guard)


def plot_losses(metrics: Path, target: Path, *, guard: Guard = unguarded) -> None:
    """Plot training and validation loss over steps to a PNG file. Raise UserError if it cannot be written."""
    rows = read_metrics(metrics)
    with new_figure(target, guard=guard, figsize=(7, 4.2), dpi=120) as (figure, axes):
        # tight_layout would draw the figure again
        figure.subplots_adjust(left=0.11, right=0.98, bottom=0.12, top=0.97)
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


@contextmanager
def new_figure(target: Path, *shape: int, guard: Guard = unguarded, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, as `pyplot.subplots` returns them for the same arguments. At the end of the block,
    write it to a PNG file atomically. The same figure always has the same bytes.

    Matplotlib draws without a display and without the user's matplotlibrc file, which could run programs.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcdefaults()
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(*shape, **options)
    try:
        yield figure, axes
        with files.new_file(target, guard=guard) as unfinished:
            figure.savefig(unfinished, format="png", metadata={"Software": None})
    finally:
        pyplot.close(figure)


# Trackers -------------------------------------------------------------------------------------------------------------


PROJECT = "tiedlora"  # the default project, if the tracker's own environment variable names none
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJECT",
    "clearml": "CLEARML_PROJECT",
}
_LAUNCH_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# The keyword for the name of a run within its project, for trackers that have such a keyword.
_RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError if a tracker's package, or accelerate for trackers other than TensorBoard, is not installed."""
    for package in (*names, *(["accelerate"] if {*names} - {TENSORBOARD} else [])):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a plain folder of that name, such as wandb's own, is not a package
            raise UserError(
                f"--report_to {','.join(names)}: the package {package} is not installed; pip install {package}, or"
                " give other trackers or none"
            )


def _started(name: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # accelerate's log messages need its state. Only rank 0 reports, so accelerate must not see the other ranks.
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
    getattr(tracker, "start", lambda: None)()  # in earlier versions of accelerate, the constructor starts it
    plain = {key: value if isinstance(value, str | int | float) else str(value) for key, value in settings.items()}
    tracker.store_init_configuration(plain)
    return tracker
