"""CPU seconds of tests, with the processes that they start: a table of the dearest files, and a limit for one test.

Wall seconds say little on a busy machine, and `--durations` sees no child. A test is charged with what this process and
all below it have used since the test before it ended. So a process that a test leaves running is charged to the tests
that run beside it, and at its end to the test in which it is reaped. A fixture of a module, or an import, is charged to
the test that needs it first. No test is charged with a process that has lost its parents before it ends, with
collection, or with the imports of the server that ranks are forked from.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from typing import Any

import psutil
import pytest

from support.ranks import fork_server_pid

# CPU seconds that a test of the default suite may use; `cpu_seconds(number, reason=...)` gives one another number.
LIMIT = 10.0
# Such a number is exceeded by up to five times on a busy machine (seen at a load of 10). Beyond this a run fails in CI.
MARGIN = 10.0
NOT_LIMITED = ("slow", "gpu", "nullgpu", "vllm")  # not of the default suite
FILES = 20  # that the table names


# One process that runs tests ------------------------------------------------------------------------------------


def cpu_seconds_here() -> float:
    """CPU seconds of this process, of all that run below it, and of all that those have reaped.

    The server that ranks are forked from counts with its ranks, and not with its imports, which are no test's.
    """
    server = fork_server_pid()
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            total += times.children_user + times.children_system
            total += 0.0 if process.pid == server else times.user + times.system
    return total


def limit_of(item: pytest.Item) -> float | None:
    """CPU seconds that a test may use; None where there is no limit.

    Raises:
        pytest.UsageError: a mark `cpu_seconds` that has no number over LIMIT, or no reason.
    """
    if any(item.get_closest_marker(name) for name in NOT_LIMITED):
        return None
    mark = item.get_closest_marker("cpu_seconds")
    if mark is None:
        return LIMIT
    if len(mark.args) != 1 or mark.args[0] <= LIMIT or not mark.kwargs.get("reason"):
        raise pytest.UsageError(f"{item.nodeid}: write cpu_seconds(NUMBER over {LIMIT:g}, reason='why not slow')")
    return float(mark.args[0])


# The plugin -----------------------------------------------------------------------------------------------------


@dataclass
class FileCost:
    """What the tests of a file have used."""

    cpu: float = 0.0
    wall: float = 0.0
    tests: int = 0


@dataclass(eq=False)  # pytest keeps plugins in sets
class CpuSeconds:
    """Measures every test, in a worker of pytest-xdist or in the only process, and says at the end what they used."""

    in_ci: bool
    files: dict[str, FileCost] = field(default_factory=dict)
    over: list[tuple[float, float, str]] = field(default_factory=list)  # CPU seconds, the limit, the test
    _before: float = 0.0

    # Where tests run

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A mark that is wrong ends the run before the first test."""
        for item in items:
            limit_of(item)

    def pytest_collection_finish(self) -> None:
        """The first test begins here."""
        self._before = cpu_seconds_here()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """The last report of a test says what it used; attributes of a report travel from a worker."""
        report = yield
        if call.when == "teardown":
            now = cpu_seconds_here()
            # Less than before: a process that was counted is gone, and no parent has its seconds.
            report.cpu_seconds, report.cpu_limit = max(0.0, now - self._before), limit_of(item)
            self._before = now
        return report

    # Where reports arrive

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a report to its file."""
        cost = self.files.setdefault(report.nodeid.partition("::")[0], FileCost())
        cost.wall += report.duration
        if report.when == "teardown":
            cpu, limit = report.cpu_seconds, report.cpu_limit
            cost.cpu += cpu
            cost.tests += 1
            if limit is not None and cpu > limit:
                self.over.append((cpu, limit, report.nodeid))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The process that reports, which is no worker, fails the run in CI for a test far over."""
        is_worker = hasattr(session.config, "workeroutput")
        if self.in_ci and not is_worker and self._far_over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        """The table, but with -q, and the tests over their limits."""
        write = terminalreporter.write_line
        if self.files and config.get_verbosity() >= 0:
            terminalreporter.section("CPU seconds, with child processes")
            for line in self.table():
                write(line)
        if self.over:
            terminalreporter.section("tests over their CPU seconds", red=True)
            for cpu, limit, test in sorted(self.over, reverse=True):
                write(f"{cpu:8.1f} of {limit:g}  {test}", red=True)
            write("Mark them slow, make them cheaper, or give a number: @pytest.mark.cpu_seconds(NUMBER, reason='...')")
            if self.in_ci and self._far_over():
                write(f"CI is set, and a test used over {MARGIN:g} times its number: the run fails.", red=True)

    def table(self) -> list[str]:
        """The dearest files, and the sum of all."""
        dearest = sorted(self.files.items(), key=lambda entry: -entry[1].cpu)
        rows = [(cost, file) for file, cost in dearest[:FILES]]
        total = FileCost(*map(sum, zip(*map(astuple, self.files.values()), strict=True)))
        rows.append((total, f"all {len(self.files)} files"))
        head = f"{'CPU s':>8} {'wall s':>8} {'tests':>6}  file"
        return [head, *(f"{cost.cpu:8.1f} {cost.wall:8.1f} {cost.tests:6}  {name}" for cost, name in rows)]

    def _far_over(self) -> bool:
        return any(cpu > MARGIN * limit for cpu, limit, _ in self.over)


def pytest_configure(config: pytest.Config) -> None:
    """Measure the tests of this run, which do not see CI: PyTorch's compiler and transformers heed it."""
    config.pluginmanager.register(CpuSeconds(in_ci=bool(os.environ.pop("CI", ""))))
