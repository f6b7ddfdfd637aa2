"""Merges that are ended by signals: the output is there whole or not at all, SIGTERM and Ctrl-C leave nothing behind.

What SIGKILL leaves in a hidden folder is removed by the same command, which starts again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from support.folders import ROOT
from support.native_files import with_adapter, write_native
from support.run_helpers import Ended, World, start_ranks
from support.run_preludes import before_call, kill_at_call
from support.tiny_models import write_tiny_model
from support.wide_models import write_wide_adapter, write_wide_model

from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.base.shapes import TARGET_NAMES

MERGE = ROOT / "tools" / "merge_adapter.py"
WRITER = "megatron_tiedlora.checkpoint.tensor_files"
COMMAND = "megatron_tiedlora.convert.merge"
Prelude = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A folder with model/, adapter/ and whole/, an undisturbed merge; `output` and `work` are for others."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "merged"

    def start(self, output: Path | None = None, prelude: Prelude | None = None) -> World:
        words = [f"--adapter={self.folder / 'adapter'}", f"--output={output or self.output}"]
        return start_ranks(words, folder=self.folder / "work", script=MERGE, prelude=prelude)

    def merge(self, output: Path | None = None, prelude: Prelude | None = None) -> Ended:
        return self.start(output, prelude).wait()

    def hidden(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name.startswith(".")]

    def check_output(self) -> None:
        """That the output has the bytes of an undisturbed merge, and nothing else is left."""
        assert sums(self.output) == sums(self.folder / "whole") and not self.hidden()


def sums(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in folder.iterdir()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tiny")
    model = write_tiny_model(folder / "model", max_shard_size="30KB")
    write_native(folder / "adapter", model, with_adapter(model, "tl6", targets=TARGET_NAMES)[2])
    case = Case(folder)
    case.merge(folder / "whole").expect(0)
    assert len(list((folder / "whole").glob("*.safetensors"))) > 4
    return case


@pytest.fixture
def case(tiny: Case) -> Case:
    """Without an output."""
    shutil.rmtree(tiny.output, ignore_errors=True)
    return tiny


def check_stopped(ended: Ended, number: signal.Signals, output: Path) -> None:
    ended.expect(128 + number)
    bars, _, line = ended.errors[0].rstrip("\n").rpartition("\n")
    assert line.rpartition("\r")[2] == f"stopped by {number.name}: {output} was not written"
    assert all(part.lstrip("\r").startswith("merge:") for part in bars.splitlines() if part.strip()), bars


WITHIN = {  # where the signal comes: (module, name, call)
    "before the first byte": (COMMAND, "side_files", 1),
    "as the folder is taken": ("megatron_tiedlora.base.output_folder", "take_folder", 1),
    "in the second file": (WRITER, "_write_file", 2),
    "in a tensor": ("megatron_tiedlora.checkpoint.tensor_files", "all_finite", 9),
}


@pytest.mark.parametrize(
    ("number", "moment"), [*((signal.SIGTERM, moment) for moment in WITHIN), (signal.SIGINT, "in the second file")]
)
def test_a_signal_leaves_nothing(case: Case, moment: str, number: signal.Signals) -> None:
    module, name, call = WITHIN[moment]
    ended = case.merge(prelude=partial(kill_at_call, module, name, call=call, number=number))
    check_stopped(ended, number, case.output)
    assert not case.output.exists() and not case.hidden()


def test_a_merge_that_is_as_good_as_done_ends_well(case: Case) -> None:
    """The signal comes as the output gets its name."""
    prelude = partial(kill_at_call, "megatron_tiedlora.base.files", "_put_in_place", number=signal.SIGTERM)
    case.merge(prelude=prelude).expect(0)
    case.check_output()


KILLS = {  # (module, name, call)
    "in the third file": (WRITER, "_write_file", 3),
    "before the record": (COMMAND, "write_json", 1),
    "before the output gets its name": ("megatron_tiedlora.base.files", "_put_in_place", 1),
}


@pytest.mark.parametrize("moment", KILLS)
def test_after_a_kill_the_same_command_starts_again(case: Case, moment: str) -> None:
    module, name, call = KILLS[moment]
    case.merge(prelude=partial(kill_at_call, module, name, call=call)).expect(-signal.SIGKILL)
    assert not case.output.exists() and [path.name for path in case.hidden()] == [".merged.partial"]
    case.merge().expect(0)
    case.check_output()


# At random moments ---------------------------------------------------------------------------------------------------


def slow_blocks() -> None:
    before_call("megatron_tiedlora.checkpoint.tensor_files", "all_finite", lambda *_: time.sleep(0.003))


def test_random_moments(case: Case) -> None:
    end_at_random(case, kills=2, prelude=slow_blocks)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_random_moments_of_each_signal(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 256}
    write_wide_model(tmp_path / "model", file_bytes=80 * 10**6, num_hidden_layers=8, **sizes)
    write_wide_adapter(tmp_path / "adapter", tmp_path / "model", TARGET_NAMES)
    case = Case(tmp_path)
    case.merge(tmp_path / "whole").expect(0)
    end_at_random(case, kills=20)


def end_at_random(case: Case, *, kills: int, prelude: Prelude | None = None) -> None:
    """End merges by SIGTERM and by SIGKILL, `kills` times each, as they have written a random part of their bytes."""
    size, draw = written(case.folder / "whole"), random.Random(18)
    for number in [signal.SIGTERM, signal.SIGKILL] * kills:
        ended = end_within(case, prelude, number, lambda: draw.uniform(0, size))
        if number == signal.SIGTERM:
            check_stopped(ended, number, case.output)
            assert not case.output.exists() and not case.hidden()
            continue
        ended.expect(-signal.SIGKILL)
        if case.output.exists():  # it came between the output's name and the end
            assert sums(case.output) == sums(case.folder / "whole")
            shutil.rmtree(case.output)
        case.merge().expect(0)
        case.check_output()


def written(folder: Path) -> int:
    """The bytes of files in a folder and its folders that are allocated; there may be none."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with suppress(OSError):
            total += file.stat().st_blocks * 512
    return total


def end_within(case: Case, prelude: Prelude | None, number: int, part: Callable[[], float]) -> Ended:
    """Signal a merge that has written so many bytes. One that was over before, or as good as, is started again."""
    while True:
        shutil.rmtree(case.output, ignore_errors=True)
        world, wanted = case.start(prelude=prelude), part()
        while world.processes[0].exitcode is None:
            if case.hidden() and sum(map(written, case.hidden())) >= wanted:
                with suppress(ProcessLookupError):
                    os.kill(world.processes[0].pid, number)
                break
            time.sleep(0.001)
        if (ended := world.wait()).status != 0:
            return ended
        case.check_output()
