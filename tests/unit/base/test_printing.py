"""Texts of other people's files, and of other hosts, are printed escaped: no terminal acts on them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.folders import ROOT
from support.run_files import edit_json
from support.run_helpers import Base
from support.sweep_runs import table2_markdown, write_score, write_study

from megatron_tiedlora.base.messages import printable, show
from megatron_tiedlora.cluster.doctor import report_text
from megatron_tiedlora.cluster.doctor_rank import DoctorReport, HostReport, ParallelConfig
from megatron_tiedlora.cluster.start import say
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.verify import LogitComparison, format_comparisons
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.runtime.ending import RankLog
from megatron_tiedlora.runtime.machine import Finding
from megatron_tiedlora.runtime.stopping import StopSignals
from megatron_tiedlora.study.record import StudyFolder, read_study
from megatron_tiedlora.study.sweep import Sweep

TITLE = "\x1b]0;owned\x07"  # sets a terminal's title
FOREIGN = f"name{TITLE}\x1b[2J\x9b31m\x7f\r\u202e"


def unsafe(text: str) -> list[str]:
    """Characters of a text that a terminal may act on, but new lines."""
    return [character for character in text if not character.isprintable() and character != "\n"]


def test_printable() -> None:
    assert printable("naïve 日本語 😀 100 %") == "naïve 日本語 😀 100 %"
    assert printable("a\nb\tc\x1b[31m\x9b\u2028\\") == r"a\nb\tc\x1b[31m\x9b\u2028" + "\\"
    assert not unsafe(printable(FOREIGN)) and printable(printable(FOREIGN)) == printable(FOREIGN)


def test_lines_that_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show("one", "two\nthree", FOREIGN)
    assert capsys.readouterr().out == f"one\ntwo\\nthree\n{printable(FOREIGN)}\n"


# Every place that prints -------------------------------------------------------------------------------------------

# Functions whose prints hold no text of others, or hold one that is escaped already.
PRINT = {
    ("megatron_tiedlora/base/messages.py", "show"),
    ("megatron_tiedlora/config/cli.py", "run_command"),  # a UserError
    ("megatron_tiedlora/commands/jobs.py", "doctor"),  # report_text, JSON
    ("megatron_tiedlora/commands/train.py", "main"),  # dry_run_report
    ("megatron_tiedlora/commands/convert.py", "verify"),  # Verification.report
}
WRITE = {"megatron_tiedlora/training/loop.py"}  # numbers


def prints(file: Path) -> Iterator[tuple[str, ast.Call, str]]:
    """Calls of `print` and `bar.write`: which, itself, and the function that it stands in."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call, str]]:
        for child in ast.iter_child_nodes(node):
            called = ast.unparse(child.func) if isinstance(child, ast.Call) else ""
            if called == "print" or called.endswith(("bar.write", "bar.set_postfix_str")):
                assert isinstance(child, ast.Call)
                yield called, child, function
            yield from walk(child, child.name if isinstance(child, ast.FunctionDef) else function)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), "")


def test_nothing_is_printed_but_by_show() -> None:
    found = set()
    folders = (ROOT / "megatron_tiedlora", ROOT / "launch", ROOT / "tools")
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        place = str(file.relative_to(ROOT))
        for name, call, function in prints(file):
            if name == "print":
                found.add((place, function))
            elif place not in WRITE:
                assert ast.unparse(call.args[0]).startswith("printable("), (place, function)
    assert found == PRINT


# What commands print -----------------------------------------------------------------------------------------------


def test_the_sample_of_a_dry_run(base: Base, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": f"one\n\ntwo {TITLE}\x1b[2Jé:", "completion": "x\x1by"}) + "\n")
    text = dry_run_report(parse_settings(base.arguments(train_file=train, dry_run=True), Settings)).text
    assert not unsafe(text)
    sample = text[text.index("first sample") :].splitlines()
    assert sample[2:5] == ["    <s>one", "    ", "    two \\x1b]0;owned\\x07\\x1b[2Jé:"]
    assert "     x\\x1by</s>" in sample


def test_tables_of_a_study(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    edit_json(folder / "base.json", model=f"models/{FOREIGN}", paper_model=None)
    write_score(folder, "base", 12.0)
    text = table2_markdown([read_study(folder)])
    assert f"# Table 2: {printable(FOREIGN)} on squad" in text and not unsafe(text)


def test_failures_of_a_study(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The reason is the last error line of a log, and a line that runs is shown as it runs."""
    command: Any = SimpleNamespace(settings=SimpleNamespace(together="auto"))
    plan: Any = SimpleNamespace(folder=StudyFolder(tmp_path), command=command, runs={}, grid=SimpleNamespace(points=()))
    work = Sweep(plan, tmp_path, tmp_path, lambda *_: None, 0, StopSignals())  # type: ignore[arg-type, return-value]
    work._log, work._began = plan.folder.log("a"), 0.0
    work._log.parent.mkdir()
    work._log.write_text(f"error: {FOREIGN}\n".replace("\r", "").replace("\x1b[2J", ""))
    work._show()
    work._note("run", None, "a")
    said = "".join(capsys.readouterr())
    assert "FAILED: name" in said and TITLE not in said and "\x9b" not in said and not unsafe(said.replace("\r", ""))


def test_reasons_of_hosts_and_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    say(f"node1 cannot be reached ({FOREIGN})")
    RankLog().say(f"Traceback\n  {FOREIGN}")
    said = capsys.readouterr().err
    assert said.split("\n")[:3] == [
        f"tiedlora run: node1 cannot be reached ({printable(FOREIGN)})",
        "Traceback",
        f"  {printable(FOREIGN)}",
    ]
    findings = [Finding(status="error", code="no_answer", hosts=["a"], value=FOREIGN, fix=f"look\nverdict: {FOREIGN}")]
    layout = ParallelConfig(
        num_ranks=1, tensor_parallel=1, pipeline_parallel=1, data_parallel=1, master_host=FOREIGN, master_port=1
    )
    hosts = [HostReport(name=FOREIGN, slots=1, first_rank=0)]
    found: dict[str, Any] = {"groups": [], "skipped": FOREIGN, "seconds": {}, "num_errors": 1, "num_warnings": 0}
    found["launcher"] = FOREIGN
    text = report_text(
        DoctorReport(verdict="not ready", route="ssh", layout=layout, hosts=hosts, findings=findings, **found)
    )
    assert not unsafe(text) and text.count("\nverdict:") == 1
    assert not unsafe(format_comparisons([LogitComparison(FOREIGN, 0.0, 0.0, 0.0, 1.0, "equal")]))
