"""Runs each part of the GPU check (a test module) in a process with a time limit, and converts its results to Markdown.

If a part hangs, crashes or breaks its device, only the results of this part are lost.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement
from zipfile import ZIP_DEFLATED, ZipFile

import psutil
import torch

from megatron_tiedlora.base.files import new_file, write_text
from megatron_tiedlora.base.messages import first_line
from megatron_tiedlora.runtime.launch_env import EXPECTED_RANKS
from megatron_tiedlora.runtime.machine import Finding
from megatron_tiedlora.runtime.process_group import gpu_name

FOLDER = Path(__file__).parent
# The options --check-NAME of a part, with the defaults of `pytest -m gpu`. `tiedlora check-gpu` passes other values.
OPTIONS = {"device": "cuda", "model": "llama2-7b", "seconds": 480.0, "folder": "", "long": 0}
MOST_IN_A_LINE = 400  # characters of a test's measured values; more are a list
WARNING = "warning"  # the name of a property that is a warning, not a measured value
NO_TIME = "no time is left for this: give more --seconds"
_SHOWN_SECONDS = 5.0
# Bits of nvidia-smi's reasons for low clocks. Bit 1, an idle GPU, slows nothing.
_SLOWED = {
    **{0x2: "clocks set by a user", 0x4: "power limit", 0x8: "hardware slowdown", 0x20: "heat (driver)"},
    **{0x40: "heat (hardware)", 0x80: "power brake"},
}
Tell = Callable[[str, object], None]  # pytest's record_property: a name and a value
# Prefixes of variables that a part does not inherit: of a job around it, of pytest, and one that disables assertions.
_FOREIGN = (
    *("SLURM_", "TORCHELASTIC_", "GROUP_", "OMPI_", "PMI_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_"),
    *(EXPECTED_RANKS, "PYTEST_", "PYTHONOPTIMIZE"),
)
_TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"  # rounds fp32 to TF32
_INSTALL_FIX = "install PyTorch for the driver's CUDA version: https://pytorch.org/get-started/locally"
ERROR_FIX = "run this part alone with CUDA_LAUNCH_BLOCKING=1, and report this with the versions of part env"
MEMORY_FIX = "end other processes on the GPU (nvidia-smi), or give a smaller --model"
HANG_FIX = "run this part alone with more --seconds; if it hangs again, see its output in the report's folder"
STUCK_FIX = (
    "this process hangs in the driver and cannot be killed: look for lines with Xid in `dmesg`; reset the GPU or"
    " restart the host"
)


def option(config: Any, name: str) -> Any:
    """Return the value of a GPU check option in a pytest session. OPTIONS has the names and defaults."""
    return config.getoption(f"--check-{name}", OPTIONS[name])


def seconds_left(config: Any) -> float:
    """Return the seconds until `tiedlora check-gpu` ends this process; in `pytest -m gpu` all of a part's time."""
    spent = time.time() - psutil.Process().create_time() if option(config, "folder") else 0.0
    return float(option(config, "seconds") - spent)


def warn_unless(good: bool, tell: Tell, fix: str) -> None:
    """Record the warning `fix`, which tells the user what to do, unless `good` is true."""
    if not good:
        tell(WARNING, fix)


def report(findings: Iterable[Finding], tell: Tell) -> None:
    """Record all findings, and the advice for each warning. Fail the test with the advice for the first error."""
    found = list(findings)
    for finding in found:
        tell(finding.code, finding.message)
        warn_unless(finding.status == "error", tell, finding.fix)
    wrong = [finding.fix for finding in found if finding.status == "error"]
    assert not wrong, wrong[0]


def why_no_gpu() -> str | None:
    """Return in one line why ranks would run without a GPU; None if they would use a GPU."""
    if torch.cuda.is_available():
        accelerator = os.environ.get("DS_ACCELERATOR", "cuda")
        return None if accelerator == "cuda" else f"DS_ACCELERATOR is {accelerator}, so ranks use no GPU; unset it"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; {_INSTALL_FIX}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty; unset it"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"torch {torch.__version__} for CUDA {torch.version.cuda}: {first_line(error)}"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no GPU; check nvidia-smi"


def ask_driver(*fields: str) -> str:
    """Return what nvidia-smi reports about the first GPU, as text with names and values, or why it reports nothing."""
    index = gpu_name(torch.device("cuda", 0))
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:  # it is missing or hangs
        return f"unknown: {first_line(error)}"
    if done.returncode:
        return f"unknown: nvidia-smi: {(done.stdout + done.stderr).strip().partition(chr(10))[0]}"
    return ", ".join(f"{name} {value.strip()}" for name, value in zip(fields, done.stdout.split(","), strict=False))


def gpu_state() -> str:
    """Return the clocks, power, temperature and reasons for low clocks of the first GPU now."""
    text = ask_driver("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")
    found = re.search(r"0x[0-9a-f]+$", text, re.IGNORECASE)
    reasons = [name for bit, name in _SLOWED.items() if found and int(found.group(), 16) & bit]
    return f"{text} ({' and '.join(reasons) or 'not slowed'})" if found else text


def part_command(part: str, *options: str) -> list[str]:
    """Return the pytest command of a check part. It shows all output, and uses no settings of other folders."""
    ours = ("-c", os.devnull, f"--rootdir={FOLDER}", f"--confcutdir={FOLDER}", "-p", "no:cacheprovider", "-v", "-s")
    return [sys.executable, "-P", "-m", "pytest", str(FOLDER / f"test_{part}.py"), *ours, *options]


def part_environment(part: str, device: str) -> dict[str, str]:
    """Return the environment of a check part, which has one rank even in a pod, in a Slurm step or under a launcher."""
    foreign = _FOREIGN if part == "env" else (*_FOREIGN, _TF32)
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    return {**own, **hidden, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def compiler_fix() -> str:
    """Return what to install so that kernels are compiled. Triton builds its launcher with a compiler and headers."""
    lacking = [] if shutil.which("gcc") or shutil.which("cc") else ["a C compiler (gcc)"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        lacking.append("Python's headers (python3-dev)")
    what = " and ".join(lacking) or "the missing software in the reason"
    return f"install {what}; without it kernels are not compiled, and speeds are not what they would be"


def tell_kernels(tell: Tell, description: str) -> None:
    """Record which kernels `choose_kernels` chose, and warn if they could not be compiled."""
    tell("kernels", description)
    warn_unless(not description.startswith("not compiled:"), tell, compiler_fix())


def run_part(
    part: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    seconds: float,
    end_seconds: float = 10.0,
    shows: Callable[[Element], None] = lambda _: None,
) -> Element:
    """Run a check part until it ends or reaches its time limit, and return its results as a junit test suite.

    If the part did not finish, the suite also has a failed test for the process of the part.

    Args:
        command: the command that runs the part. It writes the results to PART.xml in the folder, after each test.
        end_seconds: the seconds to wait for the end of the process after SIGKILL.
        shows: called with the results of the tests that have ended, every few seconds until the part ends.
    """
    file, log = folder / f"{part}.xml", folder / f"{part}.log"
    for old in _files_of(part, folder):
        old.unlink(missing_ok=True)
    found: Element | None = None
    hangs, started = True, time.monotonic()
    with log.open("wb") as output:
        streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            while hangs and (left := started + seconds - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, _SHOWN_SECONDS))
                    hangs = False
                if hangs and (found := _results(part, file, found)) is not None:
                    shows(found)
        finally:
            with suppress(ProcessLookupError, PermissionError):  # also its child processes
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver does not end
                process.wait(end_seconds)
    found = _results(part, file, found)
    suite = Element("testsuite", name=part) if found is None else found
    if hangs or process.returncode not in (0, 1) or suite.find("testcase") is None:  # 1: tests failed
        fix = ERROR_FIX if not hangs else STUCK_FIX if process.poll() is None else HANG_FIX
        how = f"not finished after {seconds:.0f} s" if hangs else f"ended with status {process.returncode}"
        lines = [line.strip() for line in log.read_text(errors="replace")[-2000:].splitlines() if line.strip()]
        case = SubElement(suite, "testcase", name="the part's process", time=f"{time.monotonic() - started:.1f}")
        said = f"{fix}\n{how}; its last line: {lines[-1] if lines else 'nothing'}"
        SubElement(case, "failure", message=said)
    return suite


def _files_of(part: str, folder: Path) -> list[Path]:
    """Return the files that a part and its process have written. Users may keep other files in the folder."""
    ours = re.compile(rf"{part}(\.(log|xml)|-.+\.(log|json|json\.gz))")
    return sorted(file for file in folder.iterdir() if ours.fullmatch(file.name) and file.is_file())


def _results(part: str, file: Path, before: Element | None) -> Element | None:
    """Return the junit test suite that a part has written, or the one `before` if the part died while it wrote."""
    try:
        suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return before
    suite.set("name", part)
    return suite


def write_reports(folder: Path, page: Iterable[str], suites: Sequence[Element]) -> None:
    """Write report.md, report.xml, and report.zip with these and every file of the parts in `suites`."""
    root = Element("testsuites")
    root.extend(suites)
    write_text(folder / "report.md", "".join(f"{line}\n" for line in page))
    write_text(folder / "report.xml", f"{ElementTree.tostring(root, encoding='unicode')}\n")
    files = (file for suite in suites for file in _files_of(suite.get("name", ""), folder))
    with new_file(folder / "report.zip") as file, ZipFile(file, "w", ZIP_DEFLATED) as archive:
        for each in (folder / "report.md", folder / "report.xml", *files):
            archive.write(each, f"{folder.name}/{each.name}")


# The page -------------------------------------------------------------------------------------------------------------


def _properties(case: Element) -> list[tuple[str, str]]:
    return [(each.get("name", ""), each.get("value", "")) for each in case.iter("property")]


def problems(case: Element) -> Iterator[Finding]:
    """Yield the errors and warnings of a test, or the reason why the test was skipped."""
    for problem in (each for each in case if each.tag in ("failure", "error", "skipped")):
        said, _, seen = (problem.get("message") or "").partition("\n")
        if problem.tag == "skipped":
            yield Finding(status="skipped", value=said)
        elif said.startswith("AssertionError: ") or case.get("classname") is None:
            yield Finding(status="error", value=seen.partition("\n")[0], fix=said.removeprefix("AssertionError: "))
        else:
            yield Finding(status="error", value=said[:300], fix=MEMORY_FIX if "OutOfMemory" in said else ERROR_FIX)
    yield from (Finding(status="warning", fix=value) for name, value in _properties(case) if name == WARNING)


_ENDS = {"error": "failed", "warning": "warned", "skipped": "skipped"}  # the worst first


def verdict(case: Element) -> str:
    """Return how a test ended: passed, warned, failed or skipped."""
    found = {_ENDS[problem.status] for problem in problems(case)}
    return next((how for how in _ENDS.values() if how in found), "passed")


def verdicts(suites: Sequence[Element]) -> Counter[str]:
    """Return the number of tests that passed, warned, failed or were skipped."""
    return Counter(verdict(case) for suite in suites for case in suite.iter("testcase"))


def part_lines(suite: Element) -> Iterator[str]:
    """Yield Markdown lines with the outcome, values and problems of each test. Count skipped tests by reason."""
    yield from ("", f"## {suite.get('name')}", "")
    yield from (f"- {name}: {value}" for of in suite.findall("properties") for name, value in _properties(of))
    skipped: Counter[str] = Counter()
    for case in suite.iter("testcase"):
        found = list(problems(case))
        if verdict(case) == "skipped":
            skipped.update(problem.value for problem in found)
            continue
        figures = [f"{name} {_short(value)}" for name, value in _properties(case) if name != WARNING]
        seen = list(filter(None, (problem.value for problem in found)))
        beside, below = (seen, figures) if sum(map(len, figures)) > MOST_IN_A_LINE else ([*figures, *seen], [])
        yield f"- {verdict(case)} **{_name(case)}** {'; '.join(beside)}".rstrip()
        yield from (f"  - {figure}" for figure in below)
    yield from (f"- skipped {count} tests: {why}" for why, count in skipped.items())


def _name(case: Element) -> str:
    return case.get("name", "").removeprefix("test_")


def _short(value: str) -> str:
    """Return the text of a number with few digits. Return text that is not a number unchanged."""
    try:
        number = float(value)
    except ValueError:
        return value
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:.4g}"


def summary_lines(suites: Sequence[Element]) -> Iterator[str]:
    """Yield Markdown lines with the number of tests per outcome, and what to do about each failure and warning."""
    yield f"{', '.join(f'{count} {how}' for how, count in verdicts(suites).items()) or 'No test has ended'}."
    tests = [(f"**{suite.get('name')}: {_name(case)}**", case) for suite in suites for case in suite.iter("testcase")]
    found = [(problem.fix, name) for name, case in tests for problem in problems(case) if problem.fix]
    for fix in dict.fromkeys(fix for fix, _ in found):
        names = list(dict.fromkeys(name for other, name in found if other == fix))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"- {', '.join(names[:3])}{more}: {fix}"
