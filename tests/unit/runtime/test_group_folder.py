"""The folder of a run of several adapters: what killed starts leave, and to whom the end of the run is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tiedlora.base.ownership import Owner, take_folder
from megatron_tiedlora.runtime.run_folder import RunFolder, take_run_folder


@pytest.mark.parametrize("is_main", [True, False])
def test_another_rank_leaves_what_rank_0_has_finished(tmp_path: Path, is_main: bool) -> None:
    """Rank 0 was lost between two exports: its peers, which write that down, do not know of the first one."""
    paths = [tmp_path / name for name in ("run", "run/finished", "run/ended")]
    locks = [take_folder(path, hint="") for path in paths]
    owners = [Owner(path, lock.owner.start, is_main=is_main) for path, lock in zip(paths, locks, strict=True)]
    own = [RunFolder(path, owner) for path, owner in zip(paths[1:], owners[1:], strict=True)]
    own[0].write_status("finished", step=3, reason="max_steps")
    unrecorded = own[1:] if is_main else own
    group = RunFolder(paths[0], owners[0], of_several=True, running=lambda: [(folder, 3) for folder in unrecorded])
    group.write_status("failed", step=3, reason="rank 0 was lost")
    states = [json.loads((path / "run_status.json").read_text())["state"] for path in paths]
    assert states == ["failed", "finished", "failed"]
    for lock in locks:
        lock.release()


@pytest.mark.parametrize("of_several", [False, True])
def test_a_start_removes_what_killed_ones_have_left(tmp_path: Path, of_several: bool) -> None:
    """In every folder into which a run writes files; those of adapters are run folders of their own."""
    folder = RunFolder(tmp_path / "run", of_several=of_several)
    for path in (folder.path, folder.logs, folder.checkpoints, folder.profile):
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writing-rank_0.log-1a2b3c4d").touch()
        (path / ".writing-step_3-1a2b3c4d").mkdir()
        (path / "whole").touch()
    folder.settings.touch()
    _, lock = take_run_folder(str(folder.path), name="", resume="auto", of_several=of_several)
    lock.release()
    left = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert left == {folder.settings.name, *(f"{name}whole" for name in ("", "logs/", "checkpoints/", "profile/"))}
