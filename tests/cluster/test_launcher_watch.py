"""The exit status of launch/run.py, signals, and what is left behind: with a small program as rank and as launcher."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.launcher_jobs import make_job, write_program

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.cluster.launchers import Job
from megatron_tiedlora.cluster.start import _say_what_may_be_left, launch
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import parse_launch
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.runtime.run_folder import RunFolder

pytestmark = pytest.mark.timeout(150)

# A rank: says that it runs, does as it is told, and writes how it ended.
RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
plan = json.loads(os.environ["RANK_PLAN"])
folder = Path(next(word for word in sys.argv if word.startswith("--output_dir=")).partition("=")[2])
folder.mkdir(parents=True, exist_ok=True)
again = (folder / "starts").exists()
with open(folder / "starts", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ["MASTER_PORT"]]) + "\\n")

if plan.get("owns"):
    here = {"machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    here["processes"] = os.readlink("/proc/self/ns/pid")
    token = {"start": "a", "host": "b", "pid": os.getpid(), "since": 1.0, **here, **plan.get("token", {})}
    token["job"] = plan["owns"] if isinstance(plan["owns"], str) else os.environ["MEGATRON_TIEDLORA_START"]
    (folder / ".owner").write_text(json.dumps(token))
if plan.get("saves_at") == len((folder / "starts").read_text().splitlines()):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "latest").write_text("step_1")

def end(state, status):
    if state:
        (folder / "new.json").write_text(json.dumps({"state": state, "step": 3, "reason": "so it was"}))
        (folder / "new.json").replace(folder / "run_status.json")
    os._exit(status)

def note(number, frame):
    with open(folder / "signals", "a") as file:
        file.write(f"{number} ")
    if plan.get("obeys", True):
        time.sleep(plan.get("saves", 0.0))
        end("stopped", 128 + number)

for number in (1, 2, 10, 15):
    signal.signal(number, note)
if plan.get("helper"):
    subprocess.Popen(["sleep", "60"])
(folder / "runs").write_text(str(os.getpid()))
time.sleep(plan.get("works", 0.0))
if again and "then" in plan:
    end(plan["then"], 0)
end(plan.get("state"), plan.get("status", 0))
"""

# A launcher: `mpirun` with the words that launch/run.py gives it, which passes SIGUSR1 on.
LAUNCHER = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
plan = json.loads(os.environ["LAUNCHER_PLAN"])
rank = subprocess.Popen(sys.argv[sys.argv.index({sys.executable!r}):])
signal.signal(signal.SIGUSR1, lambda number, frame: rank.send_signal(number))
if plan.get("abandons"):
    while not any(name == "runs" for _, _, names in os.walk(os.environ["RUNS"]) for name in names):
        time.sleep(0.05)
    sys.exit(plan.get("status", 0))
status = rank.wait()
time.sleep(plan.get("stays", 0.0))
sys.exit(plan.get("status", status if status >= 0 else 128 - status))
"""


@dataclass
class Start:
    """What launch/run.py returned and said, and what came of the run."""

    status: int
    said: str
    folder: Path

    @property
    def signals(self) -> list[int]:
        file = self.folder / "signals"
        return [int(number) for number in file.read_text().split()] if file.exists() else []


Launch = Callable[..., Start]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Launch]:
    """Starts a job of one rank, and checks that nothing is left of it."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text(RANK)
    write_program(tmp_path / "bin", "mpirun", LAUNCHER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HOME", str(tmp_path))
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    monkeypatch.setattr("megatron_tiedlora.cluster.start.LINGER_SECONDS", 1.0)

    def run(
        rank: dict[str, Any],
        launcher: dict[str, Any] | None = None,
        *,
        signals: tuple[int, ...] = (),
        by: str = "mpirun",
        grace: float = 20.0,
        arguments: tuple[str, ...] = (),
        before: Callable[[Path], None] | None = None,
        kills: str = "",
    ) -> Start:
        folder = tmp_path / "runs" / "one"
        monkeypatch.setenv("RANK_PLAN", json.dumps(rank))
        monkeypatch.setenv("LAUNCHER_PLAN", json.dumps(launcher or {}))
        if before is not None:
            before(folder)
        flags = [f"--launcher={by}", "--num_gpus=1", f"--grace_seconds={grace}"]
        sender = threading.Thread(target=_send, args=(folder, signals, kills), daemon=True)
        sender.start()
        status = launch(parse_launch([*flags, f"--output_dir={folder}", *arguments]), scripts=scripts)
        sender.join(10)
        assert not list(private.iterdir())
        return Start(status, capfd.readouterr().err, folder)

    # Whatever this suite runs under: nohup hands down a SIGHUP that is ignored, and then run.py ignores it too.
    hangup = signal.signal(signal.SIGHUP, lambda *_: None)
    yield run
    signal.signal(signal.SIGHUP, hangup)
    left = [process for process in psutil.process_iter() if _is_of(process, tmp_path)]
    for process in left:
        process.kill()
    assert not left


def _send(folder: Path, signals: tuple[int, ...], kills: str) -> None:
    """Once the rank runs, send this process signals one after another; or SIGKILL to its child of the name `kills`."""
    deadline = time.monotonic() + 60
    while not (folder / "runs").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in signals:
        time.sleep(0.6)
        os.kill(os.getpid(), number)
    for process in psutil.Process().children() if kills else ():
        if kills in " ".join(process.cmdline()[:2]):
            process.kill()


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get("RUNS") == str(folder / "runs")
    except psutil.Error:
        return False


def earlier_run(folder: Path) -> None:
    """A run that has ended before in the same folder."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("rank: 8\n")
    RunFolder(folder).write_status("finished", step=9, reason="max_steps")


# The truth table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "launcher", "status", "said"),
    [
        ({"state": "finished"}, {}, 0, "finished at step 3 (so it was)"),
        ({"state": "finished"}, {"status": 3}, 0, "finished at step 3"),
        ({}, {}, 1, "does not state how this launch ended; mpirun ended with status 0"),
        ({"status": 7}, {}, 7, "does not state how this launch ended; mpirun ended with status 7"),
        ({"status": 7}, {"status": 0}, 1, "mpirun ended with status 0"),
        ({"state": "failed", "status": 1}, {}, 1, "failed at step 3 (so it was); mpirun ended with status 1"),
        ({"state": "failed"}, {}, 1, "failed at step 3 (so it was); mpirun ended with status 0"),
        ({"state": "failed"}, {"status": 5}, 5, "failed at step 3"),
        ({"state": "stopped", "status": 143}, {}, 143, "stopped at step 3 (so it was); mpirun ended with status 143"),
        ({"state": "stopped"}, {}, 1, "stopped at step 3"),
    ],
)
def test_the_status_file_decides(
    start: Launch, rank: dict[str, Any], launcher: dict[str, Any], status: int, said: str
) -> None:
    ended = start(rank, launcher)
    assert ended.status == status and said in ended.said
    assert ended.said.splitlines()[-1].startswith("tiedlora run: ")


TELL = '--on_end=echo "$TIEDLORA_STATE $TIEDLORA_STATUS $TIEDLORA_RUN $TIEDLORA_REASON" >> "$HOME/told"; exit 3'


@pytest.mark.parametrize(
    ("rank", "state", "reason"),
    [({"state": "finished"}, "finished 0", "(so it was)"), ({"status": 7}, "unknown 7", "mpirun ended with status 7")],
)
def test_a_command_is_told_of_the_end(
    start: Launch, tmp_path: Path, rank: dict[str, Any], state: str, reason: str
) -> None:
    """Whatever the end; its own failure changes nothing."""
    ended = start(rank, arguments=(TELL,))
    assert ended.status == int(state.split()[1])
    (told,) = (tmp_path / "told").read_text().splitlines()
    assert told.startswith(f"{state} {ended.folder} ") and told.endswith(reason)
    assert ended.said.splitlines()[-1].endswith("exit 3: ended with status 3")


@pytest.mark.parametrize("error", [True, False])
def test_a_command_is_told_of_the_last_end_if_a_restart_does_not_begin(
    start: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: bool
) -> None:
    def between_attempts(_: Any) -> int:
        if (tmp_path / "runs/one/starts").exists():
            if error:
                raise UserError("no port is free")
            signal.raise_signal(signal.SIGTERM)
        return 20000

    monkeypatch.setattr("megatron_tiedlora.cluster.start.new_port", between_attempts)
    with pytest.raises(UserError, match="no port is free") if error else nullcontext():
        assert start({"state": "failed", "status": 7}, arguments=(TELL, "--max_restarts=1")).status == 143
    (told,) = (tmp_path / "told").read_text().splitlines()
    assert told.startswith("failed 7 ") and len((tmp_path / "runs/one/starts").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("rank", "status", "said"),
    [({}, 1, "does not state how this launch"), ({"state": "failed"}, 1, "failed at step 3")],
)
def test_the_end_of_an_earlier_start_does_not_count(
    start: Launch, rank: dict[str, Any], status: int, said: str
) -> None:
    ended = start(rank, before=earlier_run, arguments=("--resume=auto",))
    assert ended.status == status and said in ended.said
    assert RunFolder(ended.folder).status.exists()


def test_a_run_folder_that_is_not_seen_from_here_is_no_success(start: Launch, tmp_path: Path) -> None:
    (tmp_path / "scripts" / "train.py").write_text("")
    ended = start({})
    assert ended.status == 1 and "does not exist on this host" in ended.said


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "sent", "status", "said"),
    [
        *(
            ({"works": 30, "saves": 1.5}, [number], 0, "stopped at step 3")
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        ),
        ({"works": 30, "saves": 2.0}, [signal.SIGTERM, signal.SIGTERM], 0, "stopped at step 3"),
        ({"works": 2.5, "obeys": False, "state": "failed", "status": 1}, [signal.SIGTERM], 1, "failed at step 3"),
    ],
)
def test_a_signal_reaches_the_rank_once_and_a_run_that_saved_is_a_success(
    start: Launch, rank: dict[str, Any], sent: list[int], status: int, said: str
) -> None:
    """As SIGUSR1, on which mpirun does not end its ranks."""
    ended = start(rank, signals=tuple(sent))
    assert ended.status == status and said in ended.said
    assert ended.signals == [signal.SIGUSR1]
    assert "is passed on" in ended.said


@pytest.mark.distributed
@pytest.mark.parametrize(("sent", "arrives"), [(signal.SIGINT, 2), (signal.SIGHUP, 15)])
def test_a_signal_reaches_the_ranks_of_this_machine_itself(start: Launch, sent: int, arrives: int) -> None:
    """And not deepspeed, which would end at once."""
    ended = start({"works": 30, "saves": 1.5}, signals=(sent,), by="deepspeed")
    assert ended.status == 0 and "stopped at step 3" in ended.said
    assert ended.signals == [arrives]


def test_a_second_ctrl_c_kills(start: Launch) -> None:
    begun = time.monotonic()
    ended = start({"works": 50, "obeys": False}, signals=(signal.SIGINT, signal.SIGINT))
    assert ended.status == 137 and ended.signals == [10]
    assert time.monotonic() - begun < 15 and "killing all" in ended.said


# Launchers that die, lie or stay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("obeys", [True, False])
def test_a_rank_that_its_launcher_abandoned_here_is_ended_when_the_grace_is_over(start: Launch, obeys: bool) -> None:
    begun = time.monotonic()
    ended = start({"works": 50, "obeys": obeys}, {"abandons": True}, grace=1.0)
    assert ended.status == 1 and set(ended.signals) == {15}
    assert time.monotonic() - begun < 20
    assert "what is left of the job on this machine is ended: " in ended.said and "(python" in ended.said
    assert ("stopped at step 3" in ended.said) is obeys


def test_a_rank_that_its_launcher_abandoned_has_time_to_save(start: Launch) -> None:
    ended = start({"works": 3, "state": "stopped"}, {"abandons": True}, grace=60)
    assert ended.status == 1 and not ended.signals
    assert "is ended: " not in ended.said and "stopped at step 3" in ended.said


@pytest.mark.distributed
def test_a_rank_whose_deepspeed_was_killed_here_is_told_to_save(start: Launch) -> None:
    ended = start({"works": 50, "saves": 1.0}, by="deepspeed", kills="deepspeed")
    assert ended.status == 137 and ended.signals == [15]
    assert "it is told to save and to stop" in ended.said and "stopped at step 3" in ended.said


def test_a_killed_launcher_is_noticed(start: Launch) -> None:
    ended = start({"works": 4}, grace=60, kills="mpirun")
    assert ended.status == 137 and not ended.signals
    assert "mpirun ended with SIGKILL" in ended.said


def test_a_launcher_that_does_not_end_after_its_run_is_killed(start: Launch) -> None:
    ended = start({"works": 2.0, "state": "finished"}, {"stays": 50})
    assert ended.status == 0 and "the run has ended, but its launcher has not" in ended.said


def test_what_a_rank_leaves_behind_is_ended(start: Launch) -> None:
    ended = start({"helper": True, "state": "finished"})
    assert ended.status == 0


def test_a_start_that_was_refused_ends_at_once(start: Launch) -> None:
    """Another start has the folder: nothing of it is awaited, and no command that would end its ranks is shown."""
    begun = time.monotonic()
    rank = {"status": 2, "owns": "another's", "token": {"machine": "elsewhere"}}
    ended = start(rank, grace=60, arguments=("--max_restarts=1",))
    assert ended.status == 2 and time.monotonic() - begun < 20
    assert "belongs to another launch; mpirun ended with status 2" in ended.said and "restart 1" not in ended.said


def test_what_ends_the_ranks_of_an_allocation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    _say_what_may_be_left(make_job(tmp_path, route="srun"), RunFolder(tmp_path))
    assert capfd.readouterr().err == "tiedlora run: ranks that still run end with: scancel 17\n"


@pytest.mark.parametrize("stays", [0, 50])
def test_a_launcher_that_was_killed_may_have_left_ranks(
    start: Launch, monkeypatch: pytest.MonkeyPatch, stays: int
) -> None:
    said: list[Job] = []
    monkeypatch.setattr("megatron_tiedlora.cluster.start._say_what_may_be_left", lambda job, folder: said.append(job))
    assert start({"works": 1.0, "state": "finished"}, {"stays": stays}).status == 0
    assert len(said) == (stays > 0)


# Restarts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "most", "status", "starts"),
    [
        ({"state": "failed", "status": 1}, 2, 1, 3),
        ({"state": "failed", "status": 1, "then": "finished"}, 5, 0, 2),
        ({"status": 7, "owns": True}, 1, 7, 2),
        ({"status": 7}, 1, 7, 1),
        ({"state": "failed", "status": 1}, None, 1, 1),
        ({"state": "finished"}, 2, 0, 1),
        ({"state": "stopped", "status": 143}, 2, 143, 1),
    ],
)
def test_a_failed_run_is_restarted_so_often_and_no_other(
    start: Launch, rank: dict[str, Any], most: int | None, status: int, starts: int
) -> None:
    ended = start(rank, arguments=() if most is None else (f"--max_restarts={most}",))
    given = [json.loads(line) for line in (ended.folder / "starts").read_text().splitlines()]
    assert ended.status == status and len(given) == starts
    assert ["--resume=auto" in words for words, _ in given] == [False, *[True] * (starts - 1)]
    assert len({port for _, port in given}) == starts  # the old one may still be in use
    said = [f"restart {number} of {most}, from the last checkpoint" in ended.said for number in range(1, starts)]
    assert all(said)


@pytest.mark.parametrize("resume", ["auto", "PATH"])
def test_a_restart_repeats_the_given_flags_until_a_checkpoint_is_written(
    start: Launch, tmp_path: Path, resume: str
) -> None:
    given = "auto" if resume == "auto" else str(tmp_path / "runs" / "one" / "checkpoints" / "step_1")
    flags = ("--max_restarts=3", "--resume", given, "--take_over", "--seed=5")
    ended = start({"state": "failed", "status": 1, "saves_at": 2}, arguments=flags, before=earlier_run)
    words = [json.loads(line)[0] for line in (ended.folder / "starts").read_text().splitlines()]
    found = [parse_settings(line, Settings) for line in words]
    assert [one.resume for one in found] == [given, given, "auto", "auto"]
    assert [one.take_over for one in found] == [True, False, False, False]
    assert {(one.seed, one.output_dir) for one in found} == {(5, str(ended.folder))}


def test_a_run_whose_owner_lives_elsewhere_is_not_restarted(start: Launch) -> None:
    rank = {"status": 7, "owns": True, "token": {"machine": "elsewhere"}}
    ended = start(rank, grace=1.0, arguments=("--max_restarts=2",))
    assert ended.status == 7 and "restart 1" not in ended.said
    assert "no restart: a launch on b (process " in ended.said


def test_a_start_that_did_not_begin_or_was_told_to_stop_is_not_repeated(start: Launch, tmp_path: Path) -> None:
    ended = start(
        {"works": 3.0, "obeys": False, "state": "failed", "status": 1},
        signals=(signal.SIGTERM,),
        arguments=("--max_restarts=2",),
    )
    assert ended.status == 1 and "restart 1" not in ended.said
    (tmp_path / "scripts" / "train.py").write_text("raise SystemExit(2)")
    shutil.rmtree(ended.folder)
    ended = start({}, arguments=("--max_restarts=2",))
    assert ended.status == 2 and "restart 1" not in ended.said


# Before the start -----------------------------------------------------------------------------------------------------


def test_show_command_starts_nothing(start: Launch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "shown"
    flags = ["--launcher=mpirun", "--num_gpus=2", f"--output_dir={folder}", "--show_command"]
    assert launch(parse_launch(flags), scripts=tmp_path / "scripts") == 0
    printed = capfd.readouterr().out
    assert "command      mpirun -np 2 --hostfile" in printed and "localhost slots=2" in printed
    assert f"run folder   {folder}" in printed and "MEGATRON_TIEDLORA_EXPECTED_RANKS=2" in printed
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_gpus=3", "--tensor_parallel=2"], "3 ranks are not a multiple of --tensor_parallel 2"),
        (["--num_gpus=5"], "--global_batch_size 24 is not a multiple of data parallel 5"),
        (["--num_gpus=1", "--max_steps=0"], "--max_steps 0"),
        (["--num_gpus=1"], "holds the run of an earlier launch"),
    ],
)
def test_what_does_not_fit_starts_nothing(start: Launch, tmp_path: Path, flags: list[str], said: str) -> None:
    folder = tmp_path / "runs" / "one"
    earlier_run(folder)
    with pytest.raises(UserError, match=said):
        launch(parse_launch(["--launcher=mpirun", f"--output_dir={folder}", *flags]), scripts=tmp_path / "scripts")
    assert not (folder / "runs").exists() and not list((tmp_path / "private").iterdir())


def test_the_run_folder_is_named_before_the_start(
    start: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--launcher=mpirun", "--num_gpus=1", "--show_command", "--rank=4"]
    for name, more in (
        ("runs/demo-demo-tl6-r4", []),
        ("elsewhere", ["--output_dir", "first", "--output_dir=elsewhere"]),
        ("runs/demo-demo-tl6-r4-2", []),
    ):
        assert launch(parse_launch([*flags, *more]), scripts=tmp_path / "scripts") == 0
        words = shlex.split(capfd.readouterr().out.splitlines()[-1])
        settings = parse_settings(words[words.index(str(tmp_path / "scripts" / "train.py")) + 1 :], Settings)
        assert settings.output_dir == str(tmp_path / name)
        if more:  # the name is taken from here on
            earlier_run(tmp_path / "runs" / "demo-demo-tl6-r4")


def test_a_run_of_several_adapters_is_continued(start: Launch, tmp_path: Path) -> None:
    """Its folder has adapters.yaml and no run.yaml."""
    (tmp_path / "two.yaml").write_text("- {name: a, rank: 2}\n- {name: b, rank: 4}\n")
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "adapters.yaml").touch()
    flags = ["--launcher=mpirun", "--num_gpus=1", "--show_command", f"--output_dir={folder}"]
    command = parse_launch([*flags, f"--adapters={tmp_path / 'two.yaml'}", "--resume=auto"])
    assert launch(command, scripts=tmp_path / "scripts") == 0
