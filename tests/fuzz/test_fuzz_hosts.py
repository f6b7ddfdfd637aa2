"""Hostfiles, Slurm's variables, files of variables, reports of hosts, logs and studies, broken: usable, or one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from damage import broken_file, broken_json, changed_fields, damaged
from fuzzing import Draw, cases, explore, outcome, printable
from support.sweep_runs import table2_markdown, table3_markdown, write_scored, write_study
from valid import METRICS

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.cluster.start import StatusFile, judge
from megatron_tiedlora.runtime.launch_env import Host, read_hostfile, slurm_hosts
from megatron_tiedlora.runtime.run_folder import RunFolder, read_metrics
from megatron_tiedlora.study.record import Study, StudyFolder, read_base, read_study
from megatron_tiedlora.study.sweep import last_lines, last_row

WHOLE = b"# the cluster\nnode1 slots=8\n\n10.0.0.2\tslots=4  # small\nnode-3.local slots=16\n"
PARTS = ("node1", " slots=", "2", "\n")  # of a line
STRANGE = (
    ["node2", "-o", "~", "#", "é", "a\0b", "a\x1bb", "\ufeffa", "a" * 5000, "", "a b", "a@b"],
    ["\tslots=", "slots=", " slots = ", " ", " max_slots="],
    ["0", "-1", "1e3", "²", "٣", "0x8", "999999", "1000000", "9" * 5000, "", "1 max_slots=2"],
    ["\r\n", "\r", "\u2028", " # x\n", "\0", ""],
)


def strange_line(draw: Draw) -> str:
    """A line with one or two of its parts strange."""
    parts = list(PARTS)
    for place in draw.sample(range(4), draw.randint(1, 2)):
        parts[place] = draw.choice(STRANGE[place])
    return "".join(parts)


def check_hosts(hosts: tuple[Host, ...]) -> None:
    assert hosts
    for host in hosts:
        assert 1 <= host.slots <= 999_999, f"{host.slots} slots"
        printable(host.name)
        assert host.name and not host.name.startswith("-") and " " not in host.name, host.name


@cases("hostfile")
def test_a_broken_hostfile(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "hosts"

    def body(draw: Draw) -> object:
        if draw.chance():
            raw = damaged(draw, WHOLE)
        else:
            raw = "".join(strange_line(draw) for _ in range(draw.randint(1, 3))).encode()
        draw.say(ascii(raw)[:200])
        file.write_bytes(raw)
        found = outcome(lambda: read_hostfile(file), unchanged=tmp_path, names=(str(file),))
        if not isinstance(found, UserError):
            check_hosts(found)
            assert len({host.name for host in found}) == len(found)
        return found

    explore("hostfile", examples, body)


NODES = ["n1", "n1,n2", "n-1.x", "gpu[01-02]", "n[1-99999999999]", "", ",", "n1,,n2", "-o", "n1 n2", "é", "\x1b"]
TASKS = ["1", "2(x2)", "2(x3),1", "8,8", "0", "-1", "2(x0)", "", ",", "x", "²", "9" * 30, "2(x99999999999)", "2(x2"]


@cases("slurm")
def test_broken_variables_of_slurm(tmp_path: Path, examples: int) -> None:
    def body(draw: Draw) -> object:
        step = draw.choice(["STEP", "JOB"])
        names = {"STEP": "SLURM_STEP_TASKS_PER_NODE", "JOB": "SLURM_TASKS_PER_NODE"}
        environment = {
            f"SLURM_{step}_NODELIST": draw.choice(NODES),
            names[step]: draw.choice(TASKS),
            "SLURM_JOB_ID": "1",
        }
        if step == "STEP":
            environment |= {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        if draw.chance(0.2):
            del environment[draw.choice(sorted(environment))]
        draw.say(ascii(environment))
        found = outcome(lambda: slurm_hosts(environment), unchanged=tmp_path, names=("Slurm", "SLURM", "scontrol"))
        if not isinstance(found, UserError):
            check_hosts(found)
        return found

    explore("slurm", examples, body)


@cases("reports")
def test_a_broken_report_of_a_run(tmp_path: Path, examples: int) -> None:
    """run_status.json."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    status_text = json.dumps({"state": "failed", "step": 4, "reason": "rank 1 was killed"}).encode()

    def body(draw: Draw) -> object:
        run.status.unlink(missing_ok=True)
        status = StatusFile(run)
        run.status.write_bytes(broken_json(draw, status_text))
        verdict = outcome(
            lambda: judge(status, launcher="torchrun", launcher_status=1, passed_on=0), unchanged=tmp_path, names=("",)
        )
        assert verdict.status in (0, 1)
        printable(verdict.line)
        assert len(verdict.line) < 3000, f"a line of {len(verdict.line)} letters"
        return verdict

    explore("reports", examples, body)


@cases("metrics")
def test_broken_logs(area: Path, examples: int) -> None:
    folder = area / "run"
    run = RunFolder(folder)
    folder.mkdir()

    def body(draw: Draw) -> object:
        if draw.chance():
            raw = damaged(draw, METRICS)
        else:
            rows = [changed_fields(draw, json.loads(line)) for line in METRICS.splitlines()]
            raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        run.metrics.write_bytes(raw)
        rows = outcome(lambda: read_metrics(run.metrics), unchanged=area, names=(str(folder),))
        assert isinstance(rows, list)
        for row in (*rows, *filter(None, [outcome(lambda: last_row(run.metrics), unchanged=area, names=("",))])):
            assert type(row["step"]) is int and row["split"] in ("train", "validation")
            assert f"{row['loss']:.4f}" and json.dumps(row, allow_nan=False)
        lines = outcome(lambda: last_lines(run.metrics), unchanged=area, names=("",))
        assert all(isinstance(line, str) for line in lines)
        return rows

    explore("metrics", examples, body)


@cases("study")
def test_a_broken_study(area: Path, examples: int) -> None:
    whole = write_study(area / "whole", single_layers=[1, 4], single_layer_rank=2, learning_rates=[1e-4, 1e-5])
    for name in ("lora-r2-lr1e-4", "tl6-r8-lr1e-5"):
        write_scored(whole, name, 50.0)
    write_scored(whole, "base", 20.0)
    assert isinstance(read_study(whole), Study)
    study = area / "study"
    files = [str(path.relative_to(whole)) for path in sorted(whole.rglob("*")) if path.is_file()]
    assert any(name.endswith("latest") for name in files) and any(name.endswith("results.json") for name in files)

    def body(draw: Draw) -> object:
        shutil.rmtree(study, ignore_errors=True)
        shutil.copytree(whole, study)
        name = draw.say(draw.choice(files))
        raw = (whole / name).read_bytes()
        (study / name).write_bytes(broken_file(draw, name, raw) if name.endswith(".json") else damaged(draw, raw))
        found = outcome(lambda: read_study(study), unchanged=area, names=(str(study), "--"))
        if isinstance(found, Study):
            tables = outcome(
                lambda: [table2_markdown([found]), table3_markdown([found])], unchanged=area, names=(str(study),)
            )
            if not isinstance(tables, UserError):
                printable(*(line for table in tables for line in table.splitlines()))
        outcome(lambda: read_base(StudyFolder(study)), unchanged=area, names=(str(study),))
        return found

    explore("study", examples, body)
