"""launch/train.py --adapters: each adapter's run folder is that of a run of its own, whatever the others do."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.ranks import wait_for
from support.run_files import assert_close_run
from support.run_helpers import FOUR, Base, run, start_run
from support.run_preludes import before_call, kill_at_call, kill_at_step, slow_steps, whole_run

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import take_folder

Four = dict[str, dict[str, Any]]
KILL_IN_TURN_4 = partial(kill_at_call, "megatron_tiedlora.training.loop", "Trainer._train_step", call=4)
_TIMES = {"tokens_per_second", "supervised_tokens_per_second", "mfu", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def four(base: Base) -> Four:
    """Four adapters that differ in what can differ; b is scored before and after training, c at each evaluation too."""
    scored = {"test_file": str(base.validation), "max_new_tokens": 8}
    answered = {"eval_metric": "exact_match", "eval_samples": 4, "max_new_tokens": 8}
    return FOUR | {"b": {**FOUR["b"], **scored}, "c": {**FOUR["c"], **answered}}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The numbers of metrics.jsonl that are not times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in found]


def content(file: Path) -> Any:
    """What a file of a run folder holds, without where it lies."""
    if file.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in load_file(file).items()}
    if file.suffix == ".json":
        found = json.loads(file.read_text())
        if "settings" in found:
            found["settings"] |= {"output_dir": None, "resume": None}
            found.pop("config_sha256")  # of the settings, with that folder
        return found
    if file.suffix == ".yaml":
        return yaml.safe_load(file.read_text()) | {"output_dir": None, "resume": None}
    return file.read_bytes()


def _files(folder: Path) -> list[str]:
    skipped = ("logs", "tensorboard", "metrics.jsonl", ".")  # an owner's token is a dot file
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith(skipped))


def _lose_the_log(name: str, step: int) -> None:
    """The log of one adapter cannot be written from a step on."""

    def look(log: Any, row: dict[str, Any]) -> None:
        if log._folder.path.name == name and row["step"] >= step:
            raise UserError("metrics.jsonl cannot be written (No space left on device)")

    before_call("megatron_tiedlora.runtime.run_folder", "MetricsLog.write", look)


def _cannot_write_the_settings_of_b() -> None:
    def look(plan: Any, folder: Any, facts: Any) -> None:
        if folder.path.name == "b":
            raise UserError(f"{folder.settings}: cannot be written (No space left on device)")

    before_call("megatron_tiedlora.training.start", "write_run_settings", look)


def same_folders(found: Path, expected: Path, adapters: Iterable[str] = ("",), *, stopped: bool = False) -> None:
    """Fail unless two run folders hold the same files and, but for times and paths, the same content.

    Args:
        adapters: the folders of these adapters in both of them are compared.
        stopped: one was stopped on its way, and so has other checkpoints than the best and the last one.
    """
    for adapter in adapters:
        _same_folder(found / adapter, expected / adapter, stopped=stopped)


def _same_folder(found: Path, expected: Path, *, stopped: bool) -> None:
    assert rows(found) == rows(expected)
    names, others = (_files(folder) for folder in (found, expected))
    if stopped:
        last = (expected / "checkpoints" / "latest").read_text().strip()
        names, others = ([n for n in some if "step_" not in n or last in n] for some in (names, others))
    assert names == others
    for name in names:
        if not name.endswith((".png", ".md")):
            assert content(found / name) == content(expected / name), name


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def alone(base: Base, four: Four, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four adapters, each in a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for name, own in four.items():
        run(base, folder / name, ds_config="zero0.json", **own)
    return folder


def state(folder: Path) -> tuple[str, int, str]:
    """(state, step, reason) of a run_status.json."""
    found = json.loads((folder / "run_status.json").read_text())
    return found["state"], found["step"], found["reason"]


def _best_is_scored() -> None:
    """A rank that scores another adapter after training than the best one ends with a traceback."""

    def look(_: Any, members: Any, samples_of: Any) -> None:
        for member in members:
            if member.state == "ended" and samples_of(member) is member.data.scored:
                best = load_file(member.folder.adapter / "adapter_model.safetensors")
                for name, parameter in member.adapter.named_parameters():
                    assert torch.equal(parameter.detach(), best[name]), name

    before_call("megatron_tiedlora.training.loop", "Evaluation.scores", look)


def test_one_fails_and_one_ends_early(base: Base, tmp_path: Path, folder: Path, alone: Path, four: Four) -> None:
    """Both have the folders of single runs that end so, and the others do not change."""
    others: dict[str, dict[str, Any]] = {
        "sick": {"learning_rate": 1e9, "gradient_clipping": 0.0, "warmup_steps": 0, "max_steps": 6, "method": "tl5"},
        "early": {"learning_rate": 1e-30, "patience": 1, "max_steps": 6, "method": "tl5"},
    }
    for name, own in others.items():
        run(base, tmp_path / name, ds_config="zero0.json", expect=2 if name == "sick" else 0, **own)
    (first, own), *rest = four.items()
    adapters = {first: own, **others, **dict(rest)}
    ended = run(base, folder, adapters=adapters, expect=1, prelude=_best_is_scored)
    assert "Traceback" not in ended.tail()
    same_folders(folder, tmp_path, others)
    same_folders(folder, alone, four)
    assert state(folder / "early")[2] == "early_stopping" and state(folder / "early")[1] < 6
    assert state(folder)[::2] == ("failed", "1 of 6 adapters failed: sick")
    found = table(folder)
    assert {name for name, row in found.items() if row["state"] == "failed"} == {"sick"}
    assert "Lower --learning_rate" in found["sick"]["reason"] and found["early"]["reason"] == "early_stopping"


def test_a_killed_run_is_resumed(base: Base, folder: Path, alone: Path, four: Four) -> None:
    """Killed twice: in a turn, and while the first of its exports is written. One more adapter joins at a resume."""
    run(base, folder, adapters=dict(list(four.items())[:3]), prelude=KILL_IN_TURN_4, expect=-signal.SIGKILL)
    assert {row["state"] for row in table(folder).values()} == {"running"}
    kill = partial(kill_at_call, "megatron_tiedlora.training.finish", "export")
    run(base, folder, adapters=four, prelude=kill, expect=-signal.SIGKILL, resume="auto")
    assert {row["state"] for row in table(folder).values()} == {"ended"}
    run(base, folder, adapters=four, resume="auto")
    same_folders(folder, alone, four)
    assert {row["state"] for row in table(folder).values()} == {"finished"}


def builds_only(*names: str) -> None:
    """A rank that builds another adapter, or that loads a base for none, ends with a traceback."""

    def look(plans: Any, *_: Any) -> None:
        assert tuple(plans) == names, tuple(plans)

    before_call("megatron_tiedlora.training.build", "build_model", look)


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_finished_ones_are_left_out(base: Base, folder: Path, alone: Path, four: Four) -> None:
    """Nothing of them is built, scored or exported again; one with more steps by now, and a new one, are."""
    longer = {**four["b"], "schedule": "constant"}
    two = {"a": four["a"], "b": longer}
    run(base, folder, adapters=two)
    before, rows_before = {name: times(folder / name) for name in ("a", "b")}, table(folder)
    ended = run(base, folder, adapters=two, resume="auto", prelude=builds_only)
    assert {name: times(folder / name) for name in ("a", "b")} == before and table(folder) == rows_before
    assert " --enable-lora " in ended.outputs[0] and " --lora-modules a=" in ended.outputs[0]
    assert state(folder) == ("finished", 6, "2 adapters trained")

    three = {"a": four["a"], "b": {**longer, "max_steps": 5}, "d": four["d"]}
    ended = run(base, folder, adapters=three, resume="auto", prelude=partial(builds_only, "b", "d"))
    assert times(folder / "a") == before["a"] and state(folder / "b")[1] == 5
    same_folders(folder, alone, "d")
    found = table(folder)
    assert list(found) == ["a", "b", "d"] and found["a"] == rows_before["a"] and found["b"]["step"] == "5"
    assert {row["state"] for row in found.values()} == {"finished"}
    assert "adapter     a: finished in an earlier launch" in ended.outputs[0]

    shutil.rmtree(folder / "a" / "peft")
    run(base, folder, adapters=three, resume="auto", prelude=partial(builds_only, "a"))
    same_folders(folder, alone, "a")


def test_one_goes_on_alone_and_comes_back(base: Base, folder: Path, alone: Path, four: Four) -> None:
    ended = run(base, folder, adapters=four, prelude=partial(kill_at_step, 3), expect=143)
    assert "stopped by SIGTERM" in ended.tail() and "--resume auto" in ended.tail()
    for part in (folder, *(folder / name for name in four)):
        assert state(part)[:2] == ("stopped", 3), part
    for name in four:
        assert (folder / name / "checkpoints" / "latest").read_text() == "step_3\n"
    run(base, folder / "b", ds_config="zero0.json", resume="auto", **four["b"])
    same_folders(folder, alone, "b", stopped=True)
    ended = run(base, folder, adapters=four, resume="auto", prelude=whole_run)
    same_folders(folder, alone, four, stopped=True)
    served = " ".join(f"{name}={folder}/{name}/peft" for name in four)
    (command,) = (line for line in ended.outputs[0].split("\n") if "vllm serve" in line)
    modules = "qkv_proj o_proj gate_up_proj down_proj"
    assert f"--enable-lora --max-lora-rank 16 --lora-target-modules {modules} " in command
    assert command.endswith(f" --max-loras 4 --max-cpu-loras 4 --lora-modules {served}")
    ends = {name: (row["state"], row["reason"]) for name, row in table(folder).items()}
    assert ends == {name: ("finished", "max_steps") for name in four}
    assert state(folder)[0] == "finished"


def test_a_start_from_another_adapter(base: Base, tmp_path: Path, folder: Path, alone: Path) -> None:
    """Its rank and method hold; a resume reads them in the adapter's own folder, not in the one of all."""
    shutil.copytree(alone / "c" / "adapter", start := tmp_path / "start")
    own = {"init_from": str(start), "max_steps": 4}
    run(base, tmp_path / "alone", ds_config="zero0.json", rank=None, **own)
    run(base, folder, adapters={"from_c": own}, rank=None, prelude=KILL_IN_TURN_4, expect=-signal.SIGKILL)
    shutil.rmtree(start)
    run(base, folder, adapters={"from_c": own}, rank=None, resume="auto")
    same_folders(folder / "from_c", tmp_path / "alone")


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"pipeline_parallel": 2}, {"tensor_parallel": 2}, {"ds_config": "zero3.json"}])
def test_two_ranks(base: Base, folder: Path, alone: Path, four: Four, layout: dict[str, Any]) -> None:
    """Every rank leaves the one that fails out, and they end with the same status; others train as alone."""
    sick = {"learning_rate": 1e9, "gradient_clipping": 0.0, "warmup_steps": 0, "max_steps": 6}
    run(base, folder, adapters={"sick": sick, **four}, expect=1, ranks=2, **layout)
    assert state(folder / "sick")[0] == "failed"
    for name in four:
        assert_close_run(folder / name, alone / name, rel=1e-4)
        assert state(folder / name) == state(alone / name)


def test_an_entry_names_a_run_folder(base: Base, tmp_path: Path, folder: Path, alone: Path, four: Four) -> None:
    """A run that began alone goes on in its own folder, beside one that begins in another."""
    begun, new = tmp_path / "begun", tmp_path / "elsewhere" / "new"
    run(base, begun, prelude=KILL_IN_TURN_4, expect=-signal.SIGKILL, ds_config="zero0.json", **four["a"])
    own = {"a": {**four["a"], "output_dir": str(begun)}, "b": {**four["b"], "output_dir": str(new)}, "d": four["d"]}
    run(base, folder, adapters=own, resume="auto")
    for name, place in {"a": begun, "b": new, "d": folder / "d"}.items():
        same_folders(place, alone / name)
    assert not (folder / "a").exists() and not (folder / "b").exists()
    line = run(base, tmp_path / "again", adapters=own, expect=2).error_line()
    assert f"--output_dir {begun} holds the run" in line
    # It is taken before its checkpoint is read and the base is loaded: another start may be writing the next one.
    lock = take_folder(begun, hint="wait")
    line = run(base, tmp_path / "again", adapters=own, resume="auto", expect=2).error_line()
    lock.release()
    assert "a: " in line and "is using this folder" in line and not (tmp_path / "again").exists()


def test_a_profile_records_turns_of_all(base: Base, folder: Path) -> None:
    """In the folder of the run, also when one adapter has ended; a resume says which turns it is too late for."""
    own: Four = {"a": {"max_steps": 2}, "b": {"max_steps": 4}}
    run(base, folder, adapters=own, profile="2:3", schedule="constant")
    events = json.loads(gzip.decompress((folder / "profile" / "rank_0.json.gz").read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 2", "step 3", "aten::mm"} <= names and not {"step 1", "step 4"} & names
    assert not (folder / "a" / "profile").exists()
    own["b"]["max_steps"] = 6
    ended = run(base, folder, adapters=own, profile="2:5", resume="auto", schedule="constant")
    note = "note        --profile 2:5: the run continues after step 4, so steps 2 to 4 are not recorded"
    assert note in ended.outputs[0].splitlines()


def test_a_folder_of_another_kind(base: Base, folder: Path, alone: Path, four: Four) -> None:
    """A single run's folder is no folder of several, and the other way round; a finished run is not begun again."""
    own = {"a": four["a"]}
    line = run(base, alone / "a", adapters=own, resume="auto", expect=2).error_line()
    assert "holds other files" in line
    run(base, folder, adapters=own)
    before = sorted(folder.rglob("*"))
    assert "holds other files" in run(base, folder, resume="auto", expect=2, **four["a"]).error_line()
    assert "--resume auto to continue a run" in run(base, folder, adapters=own, expect=2).error_line()
    line = run(base, folder, adapters={"a": {**four["a"], "rank": 2}}, resume="auto", expect=2).error_line()
    assert "a: " in line and "trained with --rank 8, but now it is 2" in line
    assert sorted(folder.rglob("*")) == before


def test_the_folder_of_each_has_one_writer(base: Base, folder: Path) -> None:
    """While all train, one of them cannot be continued alone; one whose folder is taken over fails alone."""
    own = {"max_steps": 16}
    together = start_run(base, folder, adapters={"a": own, "b": own}, prelude=partial(slow_steps, 0.5))
    latest, rank = folder / "b" / "checkpoints" / "latest", together.processes[0]
    wait_for(lambda: latest.is_file() or rank.exitcode is not None, "a checkpoint")
    other = {"a": own, "b": {**own, "rank": 4}}
    line = run(base, folder, adapters=other, resume="auto", take_over=True, expect=2).error_line()
    assert line.startswith("error: b: ") and "but now it is 4" in line, "the run is not taken over"
    line = run(base, folder / "b", resume="auto", expect=2, **own).error_line()
    assert "is using this folder" in line
    run(base, folder / "b", resume="auto", take_over=True, **own)
    together.wait().expect(1)
    assert state(folder / "a") == ("finished", 16, "max_steps") == state(folder / "b")
    found = table(folder)
    assert found["a"]["state"] == "finished" and found["b"]["state"] == "failed"
    assert "made no further changes there" in found["b"]["reason"]


def test_an_adapter_without_a_log_takes_no_further_step(base: Base, tmp_path: Path, folder: Path) -> None:
    """Long before its next save, on the rank that has the log and on the other one. The other adapter trains on."""
    own = {"a": {**FOUR["a"], "save_interval": 6}, "b": {**FOUR["b"], "max_steps": 6, "save_interval": 6}}
    run(base, tmp_path / "whole", adapters=own, ranks=2, eval_interval=6)
    lost = partial(_lose_the_log, "b", 3)
    run(base, folder, adapters=own, ranks=2, eval_interval=6, expect=1, prelude=lost)
    found = state(folder / "b")
    assert found[:2] == ("failed", 3) and "No space left on device" in found[2]
    assert [row["step"] for row in rows(folder / "b") if row["split"] == "train"] == [1, 2]
    same_folders(folder, tmp_path / "whole", "a")


def test_a_start_that_fails_at_its_second_folder_says_so(base: Base, folder: Path) -> None:
    """What it has taken does not look as if it ran."""
    own = {name: FOUR[name] for name in "ab"}
    run(base, folder, adapters=own, prelude=partial(kill_at_step, 3), expect=143)
    assert state(folder)[0] == state(folder / "a")[0] == "stopped"
    ended = run(base, folder, adapters=own, prelude=_cannot_write_the_settings_of_b, expect=2, resume="auto")
    assert "run.yaml: cannot be written" in ended.error_line()
    for part in (folder, folder / "a"):
        assert state(part)[:2] == ("failed", 3) and "run.yaml: cannot be written" in state(part)[2], part
    run(base, folder, adapters=own, resume="auto")
    assert {state(part)[0] for part in (folder, folder / "a", folder / "b")} == {"finished"}


def _sees_no_folder() -> None:
    """Rank 1 is on another host, where there is no run folder."""
    import os

    from megatron_tiedlora.runtime.run_folder import RunFolder

    if os.environ["RANK"] == "1":
        RunFolder.is_run = property(lambda folder: False)  # type: ignore[method-assign,assignment]


def test_a_rank_that_does_not_see_the_folders(base: Base, folder: Path) -> None:
    """It enters the run's folder as often as the others do, so none waits for it."""
    run(base, folder, adapters={name: FOUR[name] for name in "ab"}, ranks=2, prelude=_sees_no_folder)
    assert {state(own)[0] for own in (folder, folder / "a")} == {"finished"}
