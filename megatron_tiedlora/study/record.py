"""A study's folder records its settings, so that a later start resumes the same study or is rejected.

`sweep.yaml` holds the settings (and can be given to --config). `base.json` describes the base model and the task, so
that tables need neither, and has the hashes of the row files. `sweep_status.json` says how the last start ended.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.atomic import TEMPORARY_PREFIX, Guard, discard, remove_leftovers, unguarded, write_json
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.output_folder import PathIn, reject_links
from megatron_tiedlora.base.ownership import Owner, is_of_owner
from megatron_tiedlora.base.text_files import Size, Text, read_fields, read_json_object, write_yaml
from megatron_tiedlora.config.cli import naming_file, read_yaml
from megatron_tiedlora.config.fields import declared, flag_value, marked
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.config.sweep_settings import (
    GRID,
    SWEEP_FILE,
    SweepCommand,
    SweepSettings,
    make_command,
    resolve_train,
)
from megatron_tiedlora.study.grid import single_layers

RUNS, GROUPS, SCORES, LOGS = "runs", "groups", "scores", "logs"


@dataclass(frozen=True)
class StudyFolder:
    """Paths of a study.

    Attributes:
        owner: the sweep that writes; None for a reader.
    """

    path: Path
    owner: Owner | None = field(default=None, compare=False)

    settings = PathIn(SWEEP_FILE)
    base = PathIn("base.json")  # describes the base model and the task
    status = PathIn("sweep_status.json")  # how the last start ended; absent while a sweep runs

    @property
    def guard(self) -> Guard:
        """A guard that raises UserError if this sweep may no longer change the folder."""
        return unguarded if self.owner is None else self.owner.check

    def run(self, name: str) -> Path:
        """The run folder of the run called `name`."""
        return self.path / RUNS / name

    def group(self, name: str) -> Path:
        """The folder of all of the runs that train together, of which `name` is the first."""
        return self.path / GROUPS / name

    def score(self, name: str) -> Path:
        """The folder that tiedlora evaluate writes for the run called `name`, or for `base`."""
        return self.path / SCORES / name

    def log(self, name: str) -> Path:
        """The output of the command called `name`."""
        return self.path / LOGS / f"{name}.log"


@dataclass(frozen=True)
class BaseRecord:
    """The base model and the task of a study.

    Attributes:
        trained: the trained parameters of each point, by its name.
        file_sha256: hashes of the local row files, by name.
    """

    model: Text
    base_hash: Text
    num_layers: Size
    trained: dict[Text, Size]
    paper_model: Text | None  # the paper's model, whose published numbers are shown beside the study's
    task: Text
    metric: Text
    file_sha256: dict[Text, Text]


def check_folder(folder: StudyFolder) -> None:
    """Raise UserError if the path is a file, or the folder holds something other than a study, or links. A start that
    was killed before it wrote its settings is no obstacle."""
    path = folder.path
    folders = (RUNS, GROUPS, SCORES, LOGS)
    # Beside the lists of their adapters, of which a kill may leave a temporary file.
    found = (item for item in (path / GROUPS).glob("*") if not item.name.startswith(TEMPORARY_PREFIX))
    groups = (item for item in found if item.suffix != ".yaml")
    reject_links(*(path / name for name in folders), *(path / RUNS).glob("*"), *groups)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; give a folder")
    if not path.is_dir() or folder.settings.is_file():
        return
    if not all(is_of_owner(item.name) for item in path.iterdir()):
        raise UserError(f"--output_dir {path} holds other files and no sweep; give a new folder")


def check_resumable(folder: StudyFolder, now: SweepCommand, base: BaseRecord) -> None:
    """Raise UserError, with the setting's name, if `now` contradicts the settings of the study in the folder."""
    if not folder.settings.is_file():
        return
    before, where = read_command(folder), f"{folder.settings}: the sweep was started with"
    _check_extended(before.settings, now.settings, base.num_layers, where)
    if before.settings.test_limit != now.settings.test_limit:
        raise UserError(f"{where} --test_limit {before.settings.test_limit}, now it is {now.settings.test_limit}")
    # Both are resolved for the same point, so that alpha, which follows the rank, only differs if it was given.
    theirs, ours = resolve_train(now.settings, before.given), now.train
    for name, own in declared(Settings).items():
        # A resumed run may name its files otherwise, but a resumed study may not.
        same = (own.compared or own.by_content) and "sweep" not in own.decided_by
        if same and getattr(theirs, name) != getattr(ours, name):
            old, new = (flag_value(getattr(settings, name)) for settings in (theirs, ours))
            raise UserError(f"{where} --{name} {old}, now it is {new}; give the same, or another --output_dir")
    if not folder.base.is_file():
        return
    found = read_base(folder)
    if found.base_hash != base.base_hash:
        raise UserError(f"{folder.base}: --model {base.model} is not the sweep's model {found.model}; give that one")
    for name in [*found.file_sha256, *base.file_sha256]:
        if found.file_sha256.get(name) != base.file_sha256.get(name):
            raise UserError(
                f"{name}: holds other rows than when the sweep was started ({folder.base} has its SHA-256); restore the"
                " former file, or give another --output_dir"
            )


def _check_extended(before: SweepSettings, now: SweepSettings, num_layers: int, where: str) -> None:
    pairs: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {n: (getattr(before, n), getattr(now, n)) for n in GRID}
    layers = (single_layers(settings.single_layers, num_layers) for settings in (before, now))
    pairs["single_layers"] = (next(layers), next(layers))
    for name, (old, new) in pairs.items():
        missing = [value for value in old if value not in new]
        if missing:
            raise UserError(
                f"{where} --{name} {flag_value(old)}, now {missing[0]} is missing; values may be added, but not removed"
            )
    if before.single_layers is not None and before.single_layer_rank != now.single_layer_rank:
        raise UserError(
            f"{where} --single_layer_rank {before.single_layer_rank}, now it is {now.single_layer_rank}; give the same"
        )


def write_record(folder: StudyFolder, command: SweepCommand, base: BaseRecord) -> None:
    """Write the study's record, before its first command starts. Raises UserError if it cannot be written."""
    for path in (folder.path, folder.path / GROUPS):
        remove_leftovers(path, guard=folder.guard)
    own, train = command.settings.model_dump(mode="json"), command.train.model_dump(mode="json")
    found = {**{name: own[name] for name in marked(SweepSettings, lasts="")}, **{n: train[n] for n in command.given}}
    content = {name: value for name, value in found.items() if value is not None}
    write_json(folder.base, asdict(base), guard=folder.guard)  # first: it has all points of the settings, or more
    write_yaml(folder.settings, content, guard=folder.guard)
    discard(folder.status, guard=folder.guard)


def read_command(folder: StudyFolder) -> SweepCommand:
    """The settings of the study in the folder. Raises UserError."""
    values = read_yaml(str(folder.settings), Settings, SweepSettings)
    with naming_file(folder.settings, values):
        return make_command({**values, "output_dir": str(folder.path)})


def read_base(folder: StudyFolder) -> BaseRecord:
    """Read base.json. Raises UserError naming what is broken."""
    content = read_json_object(folder.base, kind="a sweep's folder")
    if "num_layers" not in content:
        raise UserError(f"{folder.base}: was not written by this version; give another --output_dir")
    return read_fields(folder.base, content, BaseRecord)
