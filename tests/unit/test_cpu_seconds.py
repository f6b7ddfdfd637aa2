"""Tests are charged with what they and their processes use, the table has it by file, and a dear test is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import cpu_seconds
from support.cpu_seconds import LIMIT, CpuSeconds, cpu_seconds_here, limit_of
from support.folders import ROOT, TESTS
from support.forked_ranks import run_on_ranks

# Files of a small suite, whose tests may use 0.2 s. Children burn, and not the tests' own process.
CONFTEST = """
from support import cpu_seconds
cpu_seconds.LIMIT, cpu_seconds.MARGIN = 0.2, 1.5
pytest_plugins = ["support.cpu_seconds"]
"""
BURN = """
import subprocess, sys, pytest
def burn(seconds):
    code = f"import time\\nwhile time.process_time() < {seconds}: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
"""
CHEAP = """
def test_nothing():
    import os
    assert "CI" not in os.environ
@pytest.mark.slow
def test_slow(): burn(0.5)
@pytest.mark.cpu_seconds(2, reason="it burns")
def test_with_a_number(): burn(0.5)
"""
DEAR = """
@pytest.fixture(scope="module")
def dear():
    yield
    burn(0.5)
def test_dear(dear): pass
"""


def burn_here(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def run_suite(folder: Path, *options: str, **files: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on such a suite, as in CI."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(BURN + text)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", folder]
    command += ["-m", "", "-p", "no:cacheprovider", *options, folder]
    environment = {**kept, "PYTHONPATH": f"{TESTS}:{ROOT}", "CI": "true"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_table_and_the_names_of_dear_tests(tmp_path: Path) -> None:
    """Two workers report to one table, and a dear test fails the run."""
    ended = run_suite(tmp_path, "-n", "2", "--dist", "loadfile", cheap=CHEAP, dear=DEAR)
    rows = {
        name: (float(cpu), float(wall), int(tests))
        for cpu, wall, tests, name in re.findall(r"^ *([\d.]+) +([\d.]+) +(\d+)  (.+)$", ended.stdout, re.MULTILINE)
    }
    assert list(rows) == ["test_cheap.py", "test_dear.py", "all 2 files"], ended.stdout
    for name, (burnt, tests) in {"test_cheap.py": (1.0, 3), "test_dear.py": (0.5, 1), "all 2 files": (1.5, 4)}.items():
        cpu, wall, number = rows[name]
        assert burnt <= cpu < burnt + 2 * tests  # a busy machine counts more
        assert number == tests and wall > 0, ended.stdout
    named = re.findall(r"([\d.]+) of ([\d.]+)  (.*)", ended.stdout)
    assert [(limit, test) for _, limit, test in named] == [("0.2", "test_dear.py::test_dear")]
    assert ended.returncode == 1 and "the run fails" in ended.stdout, ended.stdout


@pytest.mark.parametrize(
    ("cpu", "ci", "status"), [(90.0, True, 0), (101.0, False, 0), (101.0, True, 1)], ids=["margin", "by hand", "CI"]
)
def test_only_ci_fails_and_only_far_over(cpu: float, ci: bool, status: int) -> None:
    report = SimpleNamespace(nodeid="test_a.py::test_b", when="teardown", duration=1.0, cpu_seconds=cpu, cpu_limit=10.0)
    measured = CpuSeconds(in_ci=ci)
    measured.pytest_runtest_logreport(report)
    session = SimpleNamespace(config=SimpleNamespace(), exitstatus=pytest.ExitCode.OK)
    measured.pytest_sessionfinish(session)
    assert measured.over == [(cpu, 10.0, "test_a.py::test_b")]
    assert session.exitstatus == status


def test_a_process_that_nobody_reaps_has_used_what_it_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts of the tests die with all that runs on them: their seconds stay with the test, and once."""
    seen = iter([1.0, 6.0, 2.0, 3.0])
    monkeypatch.setattr(cpu_seconds, "cpu_seconds_here", lambda: next(seen))
    measured = CpuSeconds(in_ci=False)
    measured.pytest_collection_finish()
    for _ in range(3):
        report = SimpleNamespace(nodeid="test_a.py::test_b", when="teardown", duration=1.0)
        hook = measured.pytest_runtest_makereport(item_with(), SimpleNamespace(when="teardown"))
        next(hook)
        with pytest.raises(StopIteration):
            hook.send(report)
        measured.pytest_runtest_logreport(report)
    assert measured.files["test_a.py"].cpu == 6.0, "5, then 0 and not -4, then 1"


MARK = pytest.mark.cpu_seconds


@pytest.mark.parametrize(
    ("marks", "limit"),
    [
        ([], LIMIT),
        ([MARK(20, reason="one start of 16 ranks")], 20.0),
        ([pytest.mark.slow], None),
        ([pytest.mark.slow, MARK(20, reason="one start of 16 ranks")], None),
        ([pytest.mark.gpu], None),
    ],
)
def test_the_limit_of_a_test(marks: list[pytest.MarkDecorator], limit: float | None) -> None:
    assert limit_of(item_with(*marks)) == limit


@pytest.mark.parametrize("mark", [MARK(20), MARK(20, reason=""), MARK(10, reason="as all"), MARK(reason="no number")])
def test_a_number_needs_a_reason(mark: pytest.MarkDecorator) -> None:
    with pytest.raises(
        pytest.UsageError, match=r"^a test: write cpu_seconds\(NUMBER over 10, reason='why not slow'\)$"
    ):
        limit_of(item_with(mark))


def item_with(*marks: pytest.MarkDecorator) -> Any:
    """A test with these marks."""
    found = {mark.name: mark.mark for mark in marks}
    return SimpleNamespace(nodeid="a test", get_closest_marker=found.get)


def test_ranks_count_without_the_imports_of_their_server(tmp_path: Path) -> None:
    """Children of the server are not ours; what it imports itself takes four seconds or more."""
    before = cpu_seconds_here()
    run_on_ranks(burn_here, 1.0, ranks=2, folder=tmp_path)
    assert 2.0 <= cpu_seconds_here() - before < 4.0


def test_a_process_counts_while_it_runs() -> None:
    before = cpu_seconds_here()
    command = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while_it_runs = cpu_seconds_here() - before
        process.communicate(b"\n")
    assert 0.4 < while_it_runs < 1.5
    assert while_it_runs <= cpu_seconds_here() - before < while_it_runs + 0.5, "and once"
