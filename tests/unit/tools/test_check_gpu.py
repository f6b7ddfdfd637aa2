"""`tiedlora check-gpu` on a CPU: its parts end in time, its page says what is wrong; no GPU is told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import psutil
import pytest
import torch
from support.folders import ROOT
from support.ranks import ENVIRONMENT, wait_for

from megatron_tiedlora.commands import jobs
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.tool_settings import CHECK_PARTS, CheckGpuSettings
from megatron_tiedlora.runtime import launch_env
from megatron_tiedlora.selfcheck import conftest, parts, test_layers, test_ranks

TOOL = ROOT / "tools" / "check_gpu.py"


# The page -------------------------------------------------------------------------------------------------------------

TESTS = """
import pytest

@pytest.mark.parametrize("name", ["a|b", "c", "d", "e"])
def test_wrong(name, record_property):
    record_property("error", 123456.7)
    assert float("nan") <= 1, "mend it"

def test_slow(record_property):
    record_property("share", 0.123456)
    record_property("warning", "be quick")

def test_breaks():
    raise RuntimeError("first line\\nsecond line")

def test_is_full():
    class OutOfMemoryError(RuntimeError):
        pass
    raise OutOfMemoryError("no memory")

@pytest.mark.skip("not here")
@pytest.mark.parametrize("name", range(3))
def test_skipped(name):
    pass
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Element:
    """What a part that is TESTS finds, as the command runs it."""
    folder = tmp_path_factory.mktemp("part")
    (folder / "test_p.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --a-flag-that-is-not-there\n")
    command = parts.part_command("p", f"--junitxml={folder / 'p.xml'}")
    command[command.index(str(parts.FOLDER / "test_p.py"))] = str(folder / "test_p.py")
    return parts.run_part("p", command, environment=parts.part_environment("p", "cpu"), folder=folder, seconds=60)


def test_the_page_has_every_test_and_what_to_do(suite: Element) -> None:
    assert parts.verdicts([suite]) == {"failed": 6, "warned": 1, "skipped": 3}
    page = "\n".join(parts.part_lines(suite))
    assert "- failed **wrong[c]** error 123,457; assert nan <= 1" in page
    assert "- warned **slow** share 0.1235" in page and "- skipped 3 tests: not here" in page
    assert "- failed **breaks** RuntimeError: first line" in page


def test_the_state_of_the_gpu_and_long_lists_are_in_the_page() -> None:
    text = "<testsuite name='p'><properties><property name='GPU before' value='hot'/></properties>{}</testsuite>"
    case = "<testcase name='test_{}'><properties>" + "<property name='a' value='{}'/>" * 2 + "</properties></testcase>"
    cases = case.format("short", "b" * 20, "c" * 20) + case.format("long", "x" * 300, "y" * 300)
    page = list(parts.part_lines(ElementTree.fromstring(text.format(cases))))
    assert page[3:6] == ["- GPU before: hot", f"- passed **short** a {'b' * 20}; a {'c' * 20}", "- passed **long**"]
    assert page[6:] == [f"  - a {letter * 300}" for letter in "xy"]


def test_advice_is_given_once(suite: Element) -> None:
    counts, *advice = parts.summary_lines([suite])
    assert counts == "6 failed, 1 warned, 3 skipped."
    assert "- **p: wrong[a|b]**, **p: wrong[c]**, **p: wrong[d]** and 1 more: mend it" in advice
    assert "- **p: slow**: be quick" in advice
    assert f"- **p: breaks**: {parts.ERROR_FIX}" in advice and f"- **p: is_full**: {parts.MEMORY_FIX}" in advice


# Parts in processes of their own --------------------------------------------------------------------------------------


def run(code: str, tmp_path: Path, *, seconds: float = 20.0, **limits: float) -> tuple[str, str, str]:
    """What is wrong in a part that is this code."""
    command = [sys.executable, "-c", code]
    suite = parts.run_part("p", command, environment=os.environ, folder=tmp_path, seconds=seconds, **limits)
    (case,) = suite.iter("testcase")
    (problem,) = parts.problems(case)
    return parts.verdict(case), problem.fix, problem.value


def test_a_part_that_dies_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "p.xml").write_text("<testsuites><testsuite><testcase/></testsuite></testsuites>")  # of an earlier run
    how, fix, seen = run("import os; print('last words', flush=True); os.abort()", tmp_path)
    assert (how, fix, seen) == ("failed", parts.ERROR_FIX, "ended with status -6; its last line: last words")
    whole = f"import os; open('{tmp_path}/p.xml', 'w').write('<testsuite><testcase/></testsuite>'); os.abort()"
    *_, case = parts.run_part("p", [sys.executable, "-c", whole], environment=os.environ, folder=tmp_path, seconds=20)
    assert parts.verdict(case) == "failed", "it died after its last test"


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f" child = subprocess.Popen(['sleep', '100']); open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(100)"
    )
    how, fix, seen = run(code, tmp_path, seconds=3.0, end_seconds=0.2)
    assert (how, fix) == ("failed", parts.HANG_FIX) and seen.startswith("not finished after 3 s")
    wait_for(lambda: not _runs(int(pid.read_text())), "the end of what the part had started", limit=5)


HANGS = """
import os, time
import pytest

def test_ends(record_property):
    record_property("share", 0.5)
    time.sleep(0.2)

@pytest.mark.long
def test_of_the_long_form():
    pass

@pytest.mark.if_time
def test_is_not_begun():
    time.sleep(100)

def test_hangs(record_property):
    record_property("cache", os.environ["TORCHINDUCTOR_CACHE_DIR"])
    time.sleep(100)
"""


def test_a_part_that_is_ended_keeps_the_tests_that_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_p.py").write_text(HANGS)
    own = ("-p", "megatron_tiedlora.selfcheck.conftest", f"--check-folder={tmp_path}", "--check-seconds=0.1")
    command = parts.part_command("p", f"--junitxml={tmp_path / 'p.xml'}", *own, "--check-device=cpu")
    command[command.index(str(parts.FOLDER / "test_p.py"))] = str(tmp_path / "test_p.py")
    environment = {**parts.part_environment("p", "cpu"), "PYTHONPATH": str(ROOT)}
    monkeypatch.setattr(parts, "_SHOWN_SECONDS", 0.2)
    shown: list[Element] = []

    def shows(suite: Element) -> None:
        shown.append(suite)

    limits: dict[str, Any] = {"folder": tmp_path, "seconds": 12.0, "shows": shows}
    suite = parts.run_part("p", command, environment=environment, **limits)
    page = "\n".join(parts.part_lines(suite))
    assert "- passed **ends** share 0.5" in page and "- failed **the part's process** not finished after 12 s" in page
    assert "- skipped 1 tests: only the long form measures this" in page
    assert "- skipped 1 tests: no time is left for this" in page
    assert "- passed **ends** share 0.5" in "\n".join(parts.part_lines(shown[-1])), "it was told before the end"


def test_a_part_that_dies_while_it_writes_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_SHOWN_SECONDS", 0.1)
    shown: list[Element] = []
    code = f"""if True:
        import os, pathlib, time
        file = pathlib.Path('{tmp_path}/p.xml')
        file.write_text("<testsuite><testcase classname='x' name='test_ends'/></testsuite>")
        while not pathlib.Path('{tmp_path}/told').exists():
            time.sleep(0.05)
        file.write_text("<testsuite><testcase cla")
        os.abort()"""

    def shows(suite: Element) -> None:
        shown.append(suite)
        (tmp_path / "told").touch()

    limits: dict[str, Any] = {"folder": tmp_path, "seconds": 20.0, "shows": shows}
    suite = parts.run_part("p", [sys.executable, "-c", code], environment=os.environ, **limits)
    assert [case.get("name") for case in suite.iter("testcase")] == ["test_ends", "the part's process"]
    assert shown and suite.get("name") == "p"


def test_only_files_of_this_run_are_mailed_and_only_its_own_are_removed(tmp_path: Path) -> None:
    old = ["p-trace.json.gz", "p-constants.json", "p-messages8-0-of-2.log", "p.xml"]
    users = ["p-notes.txt", "p.json", "pq.log", "p.yaml"]
    for name in (*old, *users):
        (tmp_path / name).touch()
    run(f"open('{tmp_path}/p-new.json', 'w'); print('nothing')", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*users, "p.log", "p-new.json"}
    parts.write_reports(tmp_path, ["page"], [Element("testsuite", name="p")])
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        names = {Path(name).name for name in archive.namelist()}
    assert names == {"report.md", "report.xml", "p.log", "p-new.json"}


@pytest.mark.parametrize(
    ("given", "is_long", "left", "runs"),
    [((), 0, 21, True), ((), 0, 19, False), ((32, 80), 0, 33, True), ((32, 80), 0, 31, False), ((32, 80), 1, 9, False)],
)
def test_a_measurement_begins_if_its_time_is_left(
    given: tuple[float, ...], is_long: int, left: float, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 seconds that began with the process, whose imports take some of them."""
    monkeypatch.setattr(parts.psutil.Process, "create_time", lambda _: parts.time.time() - 100 + left)
    options = {"--check-seconds": 100.0, "--check-folder": "x", "--check-long": is_long}
    config: Any = SimpleNamespace(getoption=lambda name, _: options[name])
    marks = {"if_time": SimpleNamespace(args=given)}
    item: Any = SimpleNamespace(config=config, get_closest_marker=marks.get)
    try:
        conftest.pytest_runtest_setup(item)
    except pytest.skip.Exception as skipped:
        assert not runs and str(skipped) == parts.NO_TIME
    else:
        assert runs
    options["--check-folder"] = ""
    assert parts.seconds_left(config) == 100


def test_what_takes_long_begins_only_if_its_time_is_left() -> None:
    (mark,) = (mark for mark in vars(test_layers.test_constants)["pytestmark"] if mark.name == "if_time")
    assert all(least > seconds for least, seconds in zip(mark.args, test_layers.SECONDS, strict=True))
    assert "if_time" in {mark.name for mark in vars(test_ranks.test_messages)["pytestmark"]}


def test_a_part_that_finds_nothing_is_a_failure(tmp_path: Path) -> None:
    how, _, seen = run("print('nothing to do')", tmp_path)
    assert (how, seen) == ("failed", "ended with status 0; its last line: nothing to do")


def test_a_part_that_cannot_be_killed_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process inside a driver that does not come back: here the signals do not reach it."""
    started: list[subprocess.Popen[bytes]] = []

    class Deaf(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            started.append(self)

        def terminate(self) -> None:
            pass

    monkeypatch.setattr(parts.subprocess, "Popen", Deaf)
    monkeypatch.setattr(parts.os, "killpg", lambda *_: None)
    code = "print('here', flush=True); import time; time.sleep(100)"
    try:
        _, fix, seen = run(code, tmp_path, seconds=2.0, end_seconds=0.2)
    finally:
        started[0].kill()
        started[0].wait()
    assert fix == parts.STUCK_FIX and "its last line: here" in seen


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_part_ends_with_the_command(number: int, status: int, tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(TOOL), f"--output={tmp_path}", "--device=cpu", "--parts=correct", "--seconds=3600"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as command:
        log = tmp_path / "correct.log"
        wait_for(
            lambda: command.poll() is not None or (log.exists() and "test_fp32" in log.read_text()), "a test", limit=100
        )
        assert command.poll() is None
        (part,) = psutil.Process(command.pid).children()
        command.send_signal(number)
        assert command.wait(30) == status
    wait_for(lambda: not _runs(part.pid), "the end of the part, which holds the device", limit=10)


def _runs(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split(")")[1].split()[0] != "Z"


def test_a_part_is_a_world_of_one_whatever_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    around = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "pod-0",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "TORCHELASTIC_MAX_RESTARTS": "2",
        launch_env.EXPECTED_RANKS: "8",
        "PYTEST_ADDOPTS": "--co",
        "PYTHONOPTIMIZE": "1",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        "HOME": "/root",
    }
    monkeypatch.setattr(os, "environ", around)
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" in parts.part_environment("env", "cuda")
    around = parts.part_environment("correct", "cuda")
    assert around == {"HOME": "/root", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    monkeypatch.setattr(os, "environ", around)
    launch_env.prepare_environment()
    assert launch_env.rank_and_world_size() == (0, 1) and around["MASTER_ADDR"] == "127.0.0.1"


# Without a GPU, and its flags -----------------------------------------------------------------------------------------


def test_without_a_gpu_env_alone_one_line_and_status_2(tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), f"--output={tmp_path}", "--seconds=3600"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("no GPU, so only env was run: ")
    (suite,) = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert suite.get("name") == "env"
    assert [case.get("name") for case in suite.iter("testcase") if parts.verdict(case) == "failed"] == ["test_gpu"]
    assert f"  - torch {torch.__version__}\n" in (tmp_path / "report.md").read_text()


def test_without_pytest_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = "megatron_tiedlora.base.installation.find_spec"
    monkeypatch.setattr(missing, lambda name: None if name == "pytest" else name)
    with pytest.raises(jobs.UserError, match=r"this needs pytest; install it with: pip install .*\[check\]"):
        call("check-gpu", [f"--output={tmp_path}", "--device=cpu"])


def test_a_gpu_that_ranks_would_not_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "DS_ACCELERATOR is cpu" in (parts.why_no_gpu() or "")
    monkeypatch.delenv("DS_ACCELERATOR")
    assert parts.why_no_gpu() is None


@pytest.mark.parametrize(
    ("flag", "said"), [("--parts=speed,fast", "fast"), ("--parts=", "at least 1"), ("--seconds=0", "greater than 0")]
)
def test_wrong_flags_are_rejected(flag: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(jobs.UserError, match=said):
        call("check-gpu", [f"--output={tmp_path}", flag])
    (tmp_path / "file").touch()
    with pytest.raises(jobs.UserError, match="give a writable folder"):
        call("check-gpu", [f"--output={tmp_path / 'file'}"])


@pytest.mark.parametrize(("tag", "expected"), [("failure", 1), ("properties", 0), ("skipped", 0)])
def test_a_failure_decides_the_exit_status(
    tag: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def run_part(part: str, command: list[str], *, seconds: float, **_: Any) -> Element:
        limits.append(seconds)
        assert "--check-long=1" in command, "two parts have time for their long forms"
        assert f"--check-seconds={seconds}" in command
        text = f"<testsuite name='{part}'><testcase><{tag}><property name='warning' value='x'/></{tag}></testcase>"
        return ElementTree.fromstring(f"{text}</testsuite>")

    monkeypatch.setattr(parts, "run_part", run_part)
    assert call("check-gpu", ["--device=cpu", "--parts=env,correct", f"--output={tmp_path}"]) == expected
    assert limits[0] < 480 and limits[1] > 470, "what env left is for the next"


def test_the_seconds_choose_parts_and_their_forms() -> None:
    one, several = (jobs.part_limits(None, None, num_gpus=count) for count in (1, 8))
    assert sum(limit.seconds for limit in one.values()) == pytest.approx(480)
    assert sum(limit.seconds for limit in several.values()) == pytest.approx(600)
    sure = [part for part, limit in one.items() if limit.seconds]
    assert sure == [part for part in CHECK_PARTS if part != "ranks"], "eight minutes are enough for the others"
    assert one["ranks"] == (0, CHECK_PARTS["ranks"][0], False), "it runs if time is left"
    assert not any(one[part].is_long for part in sure if CHECK_PARTS[part][0] < CHECK_PARTS[part][1])
    first = ["env", "correct", "attention", "speed", "ranks", "layers"]
    assert list(several)[:6] == first and several["ranks"].seconds >= jobs.RANKS_OF_SEVERAL[0]
    for count in (1, 8):
        hour = jobs.part_limits(None, 3000, num_gpus=count)
        assert hour.keys() == CHECK_PARTS.keys() and all(limit.is_long for limit in hour.values())
        assert sum(limit.seconds for limit in hour.values()) == pytest.approx(3000)
        assert all(hour[part].seconds >= CHECK_PARTS[part][1] for part in hour)
    enough = jobs.part_limits(None, sum(short for short, _ in CHECK_PARTS.values()), num_gpus=1)
    assert enough["ranks"].seconds > 0 and not enough["ranks"].is_long
    longer = jobs.part_limits(None, 1100, num_gpus=1)
    assert longer["speed"].is_long and not longer["layers"].is_long and longer["ranks"].seconds > 0


def test_given_parts_all_run_however_little_time_there_is() -> None:
    assert jobs.part_limits(["ranks"], None, num_gpus=1) == {"ranks": (480, 0, True)}
    some = jobs.part_limits(["speed", "env"], 13.5, num_gpus=0)
    assert some == {"env": (4, 0, False), "speed": (9.5, 0, False)}, "in the order of worth"
    assert next(iter(jobs.part_limits(None, 1, num_gpus=1).items())) == ("env", (1, 0, False))


def test_each_part_is_in_the_table_and_in_the_help() -> None:
    assert {file.stem for file in parts.FOLDER.glob("test_*.py")} == {f"test_{part}" for part in CHECK_PARTS}
    for part, (short, long) in CHECK_PARTS.items():
        assert f"\n    {part} " in CheckGpuSettings.about and 0 < short <= long


CASE = "<testsuite name='{}'><testcase name='test_{}'><properties/></testcase></testsuite>"


def test_a_run_that_is_killed_leaves_what_has_ended_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that has ended, and the tests that have ended of the part that runs."""

    def run_part(part: str, command: list[str], *, folder: Path, shows: Any, **_: Any) -> Element:
        (folder / f"{part}.log").write_text(f"said by {part}")
        if part == "correct":
            (folder / "attention.log").write_text("of an earlier run")
            shows(ElementTree.fromstring(CASE.format(part, "begun")))
            raise SystemExit(137)  # as a signal would: nothing after it is written
        return ElementTree.fromstring(CASE.format(part, "whole"))

    monkeypatch.setattr(parts, "run_part", run_part)
    with pytest.raises(SystemExit):
        call("check-gpu", ["--device=cpu", "--parts=env,correct,attention", f"--output={tmp_path / 'out'}"])
    with zipfile.ZipFile(tmp_path / "out" / "report.zip") as archive:
        names = {name.removeprefix("out/") for name in archive.namelist()}
        page = archive.read("out/report.md").decode()
    assert names == {"report.md", "report.xml", "env.log", "correct.log"}
    assert "- passed **whole**" in page and "- passed **begun**" in page
    assert page == (tmp_path / "out" / "report.md").read_text()


def test_a_part_that_is_left_out_is_named_and_runs_if_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    now = 0.0

    def run_part(part: str, command: list[str], *, seconds: float, **_: Any) -> Element:
        nonlocal now
        now += took
        ran.append(part)
        return ElementTree.fromstring(CASE.format(part, "whole"))

    monkeypatch.setattr(parts, "run_part", run_part)
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now)
    for took, expected in ((40.0, list(CHECK_PARTS)), (55.0, list(CHECK_PARTS)[:-1])):
        ran.clear()
        assert call("check-gpu", ["--device=cpu", f"--output={tmp_path}"]) == 0
        assert ran == expected
        assert ("Left out for lack of time: ranks (give" in (tmp_path / "report.md").read_text()) == (took == 55)
