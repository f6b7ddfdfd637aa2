"""What one rank finds or suffers is every rank's: data that differ between hosts, and logs that cannot be written."""

from __future__ import annotations

import functools
import importlib
import re
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_files import assert_same_run, checkpoint_names, losses, status
from run_helpers import Base, run, run_ranks, write_base

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


def other_data_on_rank_1(part: str) -> None:
    """Rank 1 reads one row less than its peer."""
    import os

    if os.environ["RANK"] == "1":
        module: Any = importlib.import_module("megatron_tiedlora.planning.adapter_plans")
        name = "tokenised_once" if part == "train" else "read_split"
        original = getattr(module, name)

        def other_file(encoding: Any, *, files: Any, **keywords: Any) -> Any:
            shorter = Path("shorter.jsonl")
            shorter.write_text("".join(Path(files["train"]).read_text().splitlines(keepends=True)[1:]))
            return original(encoding, files={**files, "train": shorter}, **keywords)

        def one_less(settings: Any, split: str, **keywords: Any) -> Any:
            return original(settings, split, **keywords)[1:]

        setattr(module, name, other_file if part == "train" else one_less)


def broken_log(step: int) -> None:
    """metrics.jsonl cannot be written from training step `step` on."""
    module: Any = importlib.import_module("megatron_tiedlora.runtime.run_folder")
    errors: Any = importlib.import_module("megatron_tiedlora.base.errors")
    write = module.MetricsLog.write

    def failing(log: Any, row: dict[str, Any]) -> None:
        if row["step"] >= step:
            raise errors.UserError("metrics.jsonl cannot be written (No space left on device)")
        write(log, row)

    module.MetricsLog.write = failing


@pytest.mark.parametrize("part", ["train", "test"])
def test_ranks_that_read_other_data_are_refused(base: Base, tmp_path: Path, part: str) -> None:
    arguments = base.arguments(output_dir=tmp_path / "run", test_file=base.validation)
    prelude = functools.partial(other_data_on_rank_1, part)
    ended = run_ranks(arguments, folder=tmp_path, cache=base.cache, ranks=2, prelude=prelude).expect(2)
    assert "1 rank read other training, validation or test data than rank 0" in ended.error_line()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [3, 10])
def test_a_log_that_cannot_be_written_ends_all_ranks_in_order(base: Base, tmp_path: Path, step: int) -> None:
    arguments = base.arguments(output_dir=tmp_path / "run")
    prelude = partial(broken_log, step)
    ended = run_ranks(arguments, folder=tmp_path, cache=base.cache, ranks=2, prelude=prelude).expect(2)
    assert "No space left on device" in ended.error_line()
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"].startswith("rank 0 on ")


def full_disk_at(file: Path, split: str, step: int) -> None:
    """There is room for a part of one row of metrics.jsonl; for what is said of it there is room again."""
    module: Any = importlib.import_module("megatron_tiedlora.runtime.run_folder")
    write = module.MetricsLog.write

    def limited(log: Any, row: dict[str, Any]) -> None:
        here = (row["split"], row["step"]) == (split, step)
        limit = file.stat().st_size + 40 if here else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write(log, row)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    module.MetricsLog.write = limited


@pytest.fixture(scope="module")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(base, folder, ranks=2)
    return folder


@pytest.mark.parametrize(
    ("split", "step", "saved"),
    [("train", 4, "step_2"), ("validation", 4, "step_2"), ("train", 5, "step_4"), ("train", 10, "step_8")],
)
def test_no_checkpoint_is_saved_without_its_rows(
    base: Base, whole: Path, tmp_path: Path, split: str, step: int, saved: str
) -> None:
    """Also where a checkpoint is due at that step: the reason names rank 0, and the resumed run writes the row."""
    folder = tmp_path / "run"
    prelude = partial(full_disk_at, folder / "metrics.jsonl", split, step)
    line = run(base, folder, ranks=2, prelude=prelude, expect=2).error_line()
    assert "logs cannot be written (File too large)" in line
    end = status(folder)
    assert end["state"] == "failed" and re.match(r"rank 0 on \S+, after step \d+: .*File too large", end["reason"]), end
    assert (folder / "checkpoints" / "latest").read_text() == f"{saved}\n"
    assert f"step_{step}" not in checkpoint_names(folder)
    run(base, folder, ranks=2, resume="auto")
    assert [number for number, _ in losses(folder)] == list(range(1, 11))
    assert_same_run(folder, whole)


def test_a_folder_of_other_files_is_refused_whatever_resume_says(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.txt").write_text("keep")
    for resume in ("none", "auto"):
        arguments = base.arguments(output_dir=folder, resume=resume)
        ended = run_ranks(arguments, folder=tmp_path / f"work-{resume}", cache=base.cache).expect(2)
        assert "holds other files" in ended.error_line()
    assert [item.name for item in folder.iterdir()] == ["photo.txt"]
