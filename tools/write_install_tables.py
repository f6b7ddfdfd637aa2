"""Write the tables of extras and commands in docs/install.md, from pyproject.toml and the table of commands.

    python tools/write_install_tables.py

A test compares the page with the output of this script. A new extra needs a line in `PURPOSES`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from megatron_tiedlora.base.files import write_text
from megatron_tiedlora.commands.front import COMMANDS, PROGRAM

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "install.md"
# The purpose of each extra. The empty name is an installation without extras.
PURPOSES = {
    "": "`merge`, `export`, `import`, `verify`, `index`, `push`, `plan`, `recipes`, `convert-nemo`, Python",
    "train": "`train`, `run`, `doctor`, `bench`",
    "eval": "`evaluate`; with `train` also `sweep`, and tasks that training scores with ROUGE or BLEU",
    "check": "`check-gpu`",
    "peft": "adapters in PEFT itself ([peft.md](peft.md)), `verify --in peft`, `bench --against peft`",
    "vllm": "`serve`, `evaluate --engine vllm`, `bench --what serving`; in an environment of its own",
    "lm-eval": "`python -m megatron_tiedlora.lm_eval` ([trainers.md](trainers.md#lm-evaluation-harness))",
    "quantised": "faster `--base nf4` ([quantised.md](quantised.md)); without it nf4 is slower but bit-identical",
    "service": "the training service",
    "tinker": "a client of the training service; the releases that were tried",
    "mpi": "ranks that `mpirun` starts without a master address",
    "gpu": "an optional attention kernel; pip builds it with nvcc: `pip install --no-build-isolation '.[gpu]'`",
    "demo": "the demo model and its task",
    "demo-base": "`demo` for machines without a C compiler (see below)",
    "test": "the test suite, in a clone",
    "test-base": "`test` for machines without a C compiler",
    "docs": "`make docs`, in a clone",
    "lint": "`make lint`, in a clone",
}


def extras_table() -> Iterator[str]:
    """Yield the lines of the table of extras. Raise ValueError if an extra is not in `PURPOSES`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield from ("| extra | for |", "|---|---|")
    for extra in sorted(["", *project["optional-dependencies"]], key=[*PURPOSES].index):
        yield f"| {f'`{extra}`' if extra else '(none)'} | {PURPOSES[extra]} |"


def commands_table() -> Iterator[str]:
    """Yield the lines of the table of commands."""
    yield from (f"| `{PROGRAM}` | what it does |", "|---|---|")
    for command in COMMANDS:
        yield f"| `{command.name}` | {command.about} |"


def with_tables(page: str) -> str:
    """Return the text of the page with new tables between the marks."""
    for name, lines in (("extras", extras_table()), ("commands", commands_table())):
        start, end = f"<!-- {name}: written by tools/write_install_tables.py -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = "\n".join([f"{before}{start}", "", *lines, "", f"{end}{rest.partition(end)[2]}"])
    return page


if __name__ == "__main__":
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8")))
