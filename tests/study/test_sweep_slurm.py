"""A study in the parts that jobs of Slurm run, with stand-ins for sbatch and others that note their calls."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.launcher_jobs import write_program
from support.run_files import losses, status
from support.run_helpers import Ended
from support.run_preludes import at_call
from support.sweep_runs import Given, go_on, planned, run_study, starts, study_arguments, sweep_here, work
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import OWNER_FILE, STALE_SECONDS, OwnerLost
from megatron_tiedlora.planning import machines
from megatron_tiedlora.planning.planned import Planned, StepPlan
from megatron_tiedlora.study import slurm
from megatron_tiedlora.study.record import StudyFolder
from megatron_tiedlora.study.sweep import lock_study

RUNS = [f"tl6-r2-lr{rate}" for rate in ("2e-1", "5e-2")]
SETTINGS: dict[str, Any] = {"methods": "tl6", "ranks": "2", "together": 1}
# Notes its name and words. sbatch answers with the next number, and rejects the job whose number is in `reject`.
PROGRAM = """#!/bin/bash
cd "$(dirname "$0")"; name=$(basename "$0"); echo "$name $*" >> calls; env | grep ^SLURM_JOB >> variables
case "$name $1" in
    "sbatch --parsable") number=$(($(cat number 2> /dev/null || echo 10) + 1)); echo $number | tee number
        if grep -qs $number reject; then echo "sbatch: error: no such partition" >&2; exit 1; fi ;;
    "squeue "*) cat queue 2> /dev/null || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; } ;;
    "scontrol release") ls -A "$STUDY" > at_release ;;
esac
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Slurm's programs, first on the path, and of the notes that they make."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
        write_program(folder, name, PROGRAM)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STUDY", str(tmp_path / "out"))
    return folder


def calls(programs: Path) -> list[str]:
    """What was called since the last time."""
    file = programs / "calls"
    lines = file.read_text().splitlines() if file.is_file() else []
    file.unlink(missing_ok=True)
    return lines


def submit(study: Given, folder: Path, options: str = "", *more: str) -> int:
    return sweep_here([*study_arguments(*study, folder, **SETTINGS), f"--slurm={options}", *more])


@pytest.mark.parametrize(
    ("text", "num_gpus", "nodes", "ranks", "kept"),
    [
        ("", None, 1, 1, []),
        ("-p gpu -N2 --gpus-per-node=h100:8 --array=%4", None, 2, 8, ["-pgpu", "--gpus-per-node=h100:8"]),
        ("--gpus-per-node=8 --tasks-per-node=4 --comment='a b'", None, 1, 4, ["--comment=a b"]),
        ("--gres=gpu:8 --exclusive -s -x n3 -wn1", None, 1, 8, ["--gres=gpu:8", "--exclusive", "-s", "-xn3", "-wn1"]),
        ("--gres=gpu:a100-80gb:4 --gres-flags=enforce-binding", None, 1, 4, ["--gres=gpu:a100-80gb:4"]),
        ("--gres=gpu:8 --ntasks-per-node=2", None, 1, 2, ["--gres=gpu:8"]),
        ("--gres=scratch:1,nvme --wait-all-nodes=1", None, 1, 1, ["--gres=scratch:1,nvme", "--wait-all-nodes=1"]),
        ("--gpus-per-node=8 --signal=USR1@600", 2, 1, 2, ["--signal=USR1@600"]),
    ],
)
def test_options(text: str, num_gpus: int | None, nodes: int, ranks: int, kept: list[str]) -> None:
    """The ranks that are planned are those of the allocation; options that are not read stay as they are."""
    words, allocation, limit = slurm.job_options(text, num_gpus=num_gpus)
    assert {*kept, f"--nodes={nodes}", f"--ntasks-per-node={ranks}"} <= set(words) and "array" not in str(words)
    assert limit == ("%4" if "%4" in text else "") and "--signal=USR1@" in str(words)
    assert allocation["SLURM_TASKS_PER_NODE"] == f"{ranks}(x{nodes})"
    assert len(allocation["SLURM_JOB_NODELIST"].split(",")) == nodes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--nodes=2-4", "--slurm: --nodes=2-4: give one number"),
        ("-n 8", "--slurm: --ntasks is not for a sweep; .* --ntasks-per-node"),
        ("--array=0-3", "--slurm: --array=0-3: give only a limit such as %4"),
        ("--signal=B:USR1@60", "--slurm: --signal=B:USR1@60: give USR1@SECONDS"),
        ("-d afterok:3", "--slurm: --dependency is not for a sweep"),
        ("--gres=gpu:8,nvme:1", "--slurm: --gres=gpu:8,nvme:1: give gpu:N or gpu:TYPE:N, else --gpus-per-node=N"),
        ("--gpus-per-task=1", "--slurm: --gpus-per-task is not for a sweep"),
        ("--gpus-per-socket=1", "--slurm: --gpus-per-socket is not for a sweep"),
        ("--ntasks-per-gpu=1", "--slurm: --ntasks-per-gpu is not for a sweep"),
        ("-t5 -H", "--slurm: --hold is not for a sweep"),
        ("-- x", "--slurm: --: no option; write options as --option=value or -x value"),
        ("--exclusive script.sh", "--slurm: script.sh: no option; write options"),
        ("--mem=1G -p", "--slurm: -p: no option; write options as"),
        ("--nodes 2", "--slurm: --nodes=: give one number"),
        ("-sn4", "--slurm: -sn4: no option; write options as"),
        ("--ntasks-p=4", "--slurm: --ntasks-p: write the name in full, such as --ntasks-per-node"),
        ("--tasks-p=4", "--slurm: --tasks-p: write the name in full, such as --tasks-per-node"),
        ("--node=2", "--slurm: --node: write the name in full, such as --nodes"),
        ("--w=x", "--slurm: --w: write the name in full, such as --wrap"),
    ],
)
def test_options_that_are_rejected(text: str, said: str) -> None:
    assert re.search(said, refusal(slurm.job_options, text, num_gpus=None))


@pytest.mark.usefixtures("programs")
def test_jobs_of_runs_that_the_study_does_not_have(study: Given, tmp_path: Path) -> None:
    submit(study, folder := tmp_path / "out")
    (folder / "slurm.json").write_text(json.dumps({"jobs": ["1"], "groups": {RUNS[0]: [RUNS[0], "tl6-r9-lr1"]}}))
    said = f"{folder}/slurm.json: tl6-r9-lr1 is not a run of this study; submit the study again with --slurm"
    for part in (RUNS[0], "scores"):
        assert refusal(planned(study, folder, f"--part={part}", **SETTINGS).groups) == said


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("part", [RUNS[0], "scores"])
def test_a_part_waits_for_the_lock_of_a_killed_task(
    study: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The lock is that of a process on another node, which was last renewed 59.5 of the 60 seconds ago."""
    submit(study, folder := tmp_path / "out")
    own = folder / "jobs" / RUNS[0]
    with lock_study(folder, part=RUNS[0]):
        token = {**json.loads((own / OWNER_FILE).read_text()), "machine": "elsewhere"}
    own.mkdir(parents=True)
    (own / OWNER_FILE).write_text(json.dumps(token))
    os.utime(own / OWNER_FILE, (time.time() - STALE_SECONDS + 0.5,) * 2)
    monkeypatch.setattr("megatron_tiedlora.study.sweep.Sweep.run", lambda self: self.stop.received.append(15))
    assert sweep_here([f"--output_dir={folder}", f"--part={part}"]) == 128 + 15


def test_settings_that_do_not_fit(study: Given, tmp_path: Path) -> None:
    message = functools.partial(refusal, planned, study, tmp_path / "out", **SETTINGS)
    (file := tmp_path / "s.yaml").write_text("slurm: --wrap=reboot\n")
    assert message("--config", str(file)).endswith("slurm is not read from a file; give --slurm on the command line")
    assert message("--slurm='--time=1") == "--slurm '--time=1: no closing quotation; correct the quotation"
    assert "needs --slurm or --dry_run" in message("--gpu=h100")
    assert message("--part=base", "--slurm=") == "--part base runs here; remove --slurm"
    assert "srun or mpirun starts the ranks" in message("--slurm=", "--launcher_args=--launcher torchrun")
    for flags, together, said in (
        ("--part=x", 1, "--part x: --slurm has planned no such part. Give one of base, scores"),
        ("--slurm=--gres=gpu:2", "auto", "jobs' GPUs; give their kind to --gpu, or give a number"),
    ):
        assert said in refusal(planned(study, tmp_path / "out", flags, **{**SETTINGS, "together": together}).groups)


def test_the_script(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names survive the shell. Only a task that saved at its time limit returns to the queue."""
    here = tmp_path / 'it\'s "$HOME" `x`'
    here.mkdir()
    monkeypatch.chdir(here)
    text = '#!/bin/bash\nprintf "%s\\n" "$PWD" "$@" "${SRUN_CPUS_PER_TASK:-no}" > said; exit $WANTED\n'
    program, options = write_program(here, "pro gram", text), slurm.job_options("--array=%3", num_gpus=None)
    jobs = slurm.Submission(StudyFolder(here / "100%"), options, [str(program), "--a=$b c"], {}, ["base"])
    (here / "script").write_text(jobs.script)
    for wanted, index, cpus in ((138, "1", "4"), (1, None, None), (0, "0", None)):
        extra = {"SLURM_ARRAY_TASK_ID": index, "SLURM_CPUS_PER_TASK": cpus, "SLURM_JOB_ID": "7", "WANTED": str(wanted)}
        environment = {**os.environ, **{name: value for name, value in extra.items() if value is not None}}
        done = subprocess.run(["bash", "script", "x", "y z"], env=environment, check=False)
        assert done.returncode == wanted
        part = "y z" if index == "1" else "x"
        assert (here / "said").read_text().splitlines() == [str(here), "--a=$b c", f"--part={part}", cpus or "no"]
        assert calls(programs) == (["scontrol requeue 7"] if wanted == 138 else [])
    assert f"--output={here}/100%%/logs/slurm-%j.out" in next(jobs.commands([]))


def test_gpu_hours(study: Given, tmp_path: Path) -> None:
    """Hours of a step by its own plan, times steps and ranks; of data, those of the samples' lengths."""
    shape = {**SETTINGS, "model": "llama2-7b", "max_length": 512, "global_batch_size": 16, "dtype": "bf16"}
    plan = planned(study, tmp_path / "out", "--slurm=--nodes=2 --gpus-per-node=4", "--gpu=h100", "--dry_run", **shape)
    hours = plan.gpu_hours(plan.groups())
    for run, found in zip(plan.runs, hours or (), strict=True):
        step = StepPlan({run.name: plan.runs[run]})
        card = plan.runs[run].with_attention(machines.GPUS["h100"], packed=False)
        seconds = Planned(step=step, layout=step.layout, machine=card, per_node=4).seconds.total
        assert plan.runs[run].layout.dp_size == 8 and found == pytest.approx(16 * seconds * 8 / 3600)
    assert hours is not None and f"  {sum(hours):,.2f} GPU hours of training steps" in "\n".join(plan.dry_run_lines())
    plan = planned(study, tmp_path / "out", "--slurm=", **SETTINGS)
    assert plan.gpu_hours(plan.groups()) is None
    assert "rank hours are unknown; give --gpu, or --constants" in "\n".join(plan.dry_run_lines())

    (file := tmp_path / "cpu.json").write_text(json.dumps({**machines.CPU.record(), "title": "here"}))
    plan = planned(study, tmp_path / "out", "--slurm=", f"--constants={file}", **SETTINGS)
    own = plan.gpu_hours(plan.groups())
    long = sum(Planned(step=(step := StepPlan({"a": p})), layout=step.layout, machine=machines.CPU).hours
               for p in plan.runs.values())  # fmt: skip
    assert own is not None and 0 < sum(own) < long, "samples are shorter than --max_length"


def test_what_is_submitted(
    study: Given, tmp_path: Path, programs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    monkeypatch.setenv("SLURM_JOB_NAME", "x")  # as in another allocation
    assert submit(study, folder, "--array=%1", "--dry_run") == 0
    assert calls(programs) == [] and not folder.exists() and "#!/bin/bash" in (shown := capsys.readouterr().out)
    assert submit(study, folder, "--time=9 --array=%1", "--launcher_args=--num_gpus 1") == 0
    _, *found = calls(programs)
    assert found.pop() == "scontrol release 11"
    script, ends = str(folder / "slurm.sbatch"), ["base", " ".join(RUNS), "scores"]
    assert [line.partition(f" {script} ")[2] for line in found] == ends
    words = [line.split() for line in found]
    assert all(line[:2] == ["sbatch", "--parsable"] and "--time=9" in line for line in words)
    own = [[w for w in line if w.startswith(("--hold", "--dep", "--array", "--kill"))] for line in words]
    kill = "--kill-on-invalid-dep=yes"
    assert own == [["--hold"], ["--array=0-1%1", kill, "--dependency=afterok:11"], [kill, "--dependency=afterany:12"]]
    assert "--dependency=afterany:JOB" in shown
    before = (folder / "slurm.json").read_text()
    assert json.loads(before) == {"jobs": ["11", "12", "13"], "groups": {name: [name] for name in RUNS}}
    assert '--launcher_args=--num_gpus 1\' --part="$1"' in (folder / "slurm.sbatch").read_text()
    assert (programs / "variables").read_text() == ""
    assert OWNER_FILE not in (programs / "at_release").read_text().split(), "the first job can lock the folder"
    assert "scancel 11 12 13" in capsys.readouterr().out

    (programs / "queue").write_text("12_[0-1%1]\n13\n")
    for more in ("--slurm=", "--together=1"):
        said = refusal(sweep_here, [f"--output_dir={folder}", more])
        assert "queued or run (12_[0-1%1], 13); wait " in said and said.endswith(" scancel 11 12 13")
    (programs / "queue").unlink()  # then squeue does not know the jobs
    (programs / "reject").write_text("15")
    calls(programs)
    said = refusal(sweep_here, [f"--output_dir={folder}", "--slurm="])
    assert said == "sbatch fails: sbatch: error: no such partition"
    assert calls(programs)[-1] == "scancel 14" and (folder / "slurm.json").read_text() == before


def test_without_slurm(study: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refusal(submit, study, tmp_path / "out")
    assert said == "--slurm: sbatch fails (No such file or directory); submit on a login node of the cluster"
    assert not (tmp_path / "out").exists()


def test_parts_are_locked_beside_each_other_and_never_with_the_whole(tmp_path: Path) -> None:
    with lock_study(tmp_path, part="a") as a, lock_study(tmp_path, part="b"):
        with pytest.raises(UserError, match="it is another sweep"), lock_study(tmp_path, part="a"):
            pass
        with pytest.raises(UserError, match=r"jobs/a: a launch on .* is using this folder"), lock_study(tmp_path):
            pass
        with lock_study(tmp_path, take_over=True), pytest.raises(OwnerLost):
            a.owner.check()
    with lock_study(tmp_path), pytest.raises(UserError, match="is using this folder"), lock_study(tmp_path, part="a"):
        pass
    with lock_study(tmp_path, part="a"):
        pass


def be_told(_sweep: int, *, module: str, name: str, call: int = 1) -> None:
    """SIGUSR1 to this rank alone when a function is called, as Slurm sends it before the time limit."""
    at_call(f"megatron_tiedlora.{module}", name, lambda: signal.raise_signal(signal.SIGUSR1), call=call)


IN_A_STEP = functools.partial(be_told, module="training.loop", name="Trainer._train_step", call=7)
BEFORE_STEPS = functools.partial(be_told, module="planning.adapter_plans", name="prepare_all_data")


@pytest.mark.cpu_seconds(25, reason="a study twice, in one launch and in parts")
def test_a_study_in_parts(study: Given, tmp_path: Path, programs: Path) -> None:
    """Its tables and runs are those of one launch, though one task was requeued and the other came too late."""
    folder, whole = tmp_path / "out", tmp_path / "whole"
    submit(study, folder)

    def run(part: str, **keywords: Any) -> Ended:
        return go_on(study, folder, f"--part={part}", **keywords)

    early = run("scores", expect=1)
    assert early.error_line().startswith("error: 1 failed: score base; nothing else was started")
    run("base")
    log = f"group {RUNS[0]}"
    run(RUNS[0], expect=128 + signal.SIGUSR1, preludes={log: IN_A_STEP})
    assert json.loads((folder / "jobs" / RUNS[0] / "sweep_status.json").read_text())["state"] == "stopped"
    run(RUNS[0], expect=1, preludes={log: BEFORE_STEPS})  # it would return for ever
    run(RUNS[0])
    assert not (folder / "table2.md").exists()
    ended = run("scores", expect=1)
    assert f"{RUNS[1]}: it was not started" in ended.outputs[0]
    assert "not all learning rates are finished" in (folder / "table2.md").read_text()
    assert json.loads((folder / "sweep_status.json").read_text())["failed"][0]["name"] == RUNS[1]

    submit(study, folder)
    assert json.loads((folder / "slurm.json").read_text())["groups"] == {RUNS[1]: [RUNS[1]]}
    run(RUNS[1])
    run("scores")
    groups = [f"group {name}" for name in (RUNS[0], RUNS[0], RUNS[0], RUNS[1])]
    assert starts(work(folder)) == ["score base", *groups[:3], "scores", groups[3]]
    run_study(study, whole, **SETTINGS)
    for name in RUNS:
        assert losses(folder / "runs" / name) == losses(whole / "runs" / name)
        assert status(folder / "runs" / name) == status(whole / "runs" / name)
    for name in ("table2.md", "table2.csv", "figure2.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    calls(programs)
    assert sweep_here([f"--output_dir={folder}", "--slurm="]) == 0
    assert not any("--parsable" in line for line in calls(programs)), "nothing is left to submit"
