"""Each rank's log in the run folder, and what shows on the screen. test_stop_and_resume.py has those of two starts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.folders import ROOT
from support.run_files import status
from support.run_helpers import Base, run, run_code
from support.run_preludes import before_call

from megatron_tiedlora.runtime.ending import _Tee

LOOP = "megatron_tiedlora.training.loop"


def log_of(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank_{rank}.log").read_text()


def test_of_a_bar_the_log_keeps_its_last_state() -> None:
    screen, log = io.StringIO(), io.StringIO()
    tee = _Tee(screen, log)
    for text in ("one\n", "\r 1/3", "\r 2/3", "\r 3/3\n", "two", " three\r\n", "open"):
        assert tee.write(text) == len(text)
    assert screen.getvalue() == "one\n\r 1/3\r 2/3\r 3/3\ntwo three\r\nopen"
    assert log.getvalue() == "one\n 3/3\ntwo three\n"
    assert not tee.isatty()


SAY = """
import sys
from pathlib import Path
from megatron_tiedlora.runtime.ending import RankLog

log = RankLog()
with log.opened(Path(sys.argv[1]), int(sys.argv[2])):
    print("inside")
    log.say("said")
    log.note("noted")
print("outside")
"""


def say(folder: Path, rank: int) -> tuple[str, str]:
    """What SAY shows on the screen, and what it says there as an error."""
    ended = run_code(SAY, folder, folder, rank).expect(0)
    return ended.outputs[0], ended.errors[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_output_goes_to_the_log_and_then_back_to_the_screen(tmp_path: Path, rank: int) -> None:
    assert say(tmp_path, rank) == ("inside\noutside\n" if rank == 0 else "outside\n", "said\n")
    header, *lines = log_of(tmp_path, rank).splitlines()
    assert f"rank {rank} on" in header and sorted(lines) == ["inside", "noted", "said"]


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    assert say(tmp_path, 1) == ("inside\noutside\n", "said\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(tmp_path: Path, rank: int) -> None:
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / f"rank_{rank}.log")
    say(tmp_path, rank)
    assert "inside\n" in log_of(tmp_path, rank)


def test_a_screen_that_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    """As where the ssh connection that it went over is: the log goes on, and the exit status is as it was."""
    script = SAY.replace('print("inside")', 'sys.stdin.read(); print("inside", flush=True); print("more", flush=True)')
    command = [sys.executable, "-c", script, str(tmp_path), "0"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, cwd=ROOT)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 0
    assert log_of(tmp_path, 0).splitlines()[1:] == ["inside", "more", "said", "noted"]


def fail_on(rank: int) -> None:
    """This rank's code breaks at training step 3."""

    def look(trainer: Any, *_: Any) -> None:
        if trainer.last_step == 2 and trainer.rank == rank:
            raise ZeroDivisionError("of ours")

    before_call(LOOP, "Trainer._train_step", look)


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_failing_ranks_traceback_is_shown_once(base: Base, folder: Path, rank: int) -> None:
    """Its peer's, which tells of a lost connection only, is in its log; all give the same reason."""
    ended = run(base, folder, ranks=2, prelude=partial(fail_on, rank), expect=1)
    screen = ended.errors[0] + ended.errors[1]
    assert screen.count("Traceback") == 1 and "Traceback" in ended.errors[rank]
    end = status(folder)
    assert end["reason"].startswith(f"rank {rank} on ") and end["step"] == 2 and end["state"] == "failed"
    assert end["reason"].endswith("after step 2: ZeroDivisionError: of ours")
    assert screen.count(f"error: {end['reason']}\n") == 1
    for each in (0, 1):
        assert log_of(folder, each).count(f"error: {end['reason']}\n") == 1
    assert "ZeroDivisionError" in log_of(folder, rank) and "gloo" in log_of(folder, 1 - rank)
    assert "validation loss" in log_of(folder, 0) and "samples per step" not in log_of(folder, 1)
