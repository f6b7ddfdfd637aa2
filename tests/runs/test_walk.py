"""The walk from argv to the loss that docs/architecture.md describes is the one that a run takes, and it is short."""

from __future__ import annotations

import ast
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.folders import ROOT
from support.run_helpers import Base, run

pytestmark = pytest.mark.distributed
PACKAGE = ROOT / "megatron_tiedlora"
LOSS, STEP = ("parallel/loss.py", "token_losses"), ("training/step.py", "TrainStep.run")
Place = tuple[str, str]  # a file of the package, and the qualified name of a function there


def functions(file: str) -> set[str]:
    """The qualified names of a file's functions and methods."""
    tree = ast.parse((PACKAGE / file).read_text())
    scopes = [("", tree), *((f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef))]
    return {prefix + node.name for prefix, scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)}


def described() -> list[Place]:
    """The functions that the steps of the walk name, each with the file that was named last before it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## From argv to the loss\n")[1].split("\n\n`Losses.weighted`")[0]
    file, found = "", []
    for name in re.findall(r"`([\w./]+)`", section.partition("\n1. ")[2]):
        if name.endswith(".py"):
            file = name
        elif name in functions(file):
            found.append((file, name))
        else:
            assert name.lstrip("_")[0].isupper(), f"{file} has no function {name}"  # a class or a table
    return found


def record_stacks(places: list[Place]) -> None:
    """In a rank, before its script: until the first loss of a step, the callers of each of these places.

    Writes `walk.json` in the current folder: for each place that was called, all places on the stack of its last call.
    """
    wanted, stacks = set(places), dict[str, list[Place]]()

    def place(frame: FrameType) -> Place:
        file = Path(frame.f_code.co_filename)
        inside = str(file.relative_to(PACKAGE)) if file.is_relative_to(PACKAGE) else ""
        return inside, frame.f_code.co_qualname.split(".<locals>")[0]

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (here := place(frame)) in wanted:
            callers, caller = [here], frame.f_back
            while caller is not None:
                callers.append(place(caller))
                caller = caller.f_back
            stacks[str(here)] = [known for known in callers if known[0] and "<" not in known[1]]
            if here == LOSS and STEP in callers:
                sys.setprofile(None)
                Path("walk.json").write_text(json.dumps(stacks))

    sys.setprofile(profile)


def test_the_walk_in_the_documents_is_taken(base: Base, tmp_path: Path) -> None:
    """The functions that are named are called before the loss, through at most 60 functions in 30 files."""
    places = described()
    run(base, tmp_path / "run", prelude=partial(record_stacks, places), max_steps=1, warmup_steps=0)
    stacks = json.loads((tmp_path / "run-work" / "walk.json").read_text())
    assert len(places) >= 20 and LOSS in places
    assert not [name for name in places if str(name) not in stacks]
    walked = {tuple(caller) for stack in stacks.values() for caller in stack}
    files = {file for file, _ in walked}
    print(len(walked), "functions in", len(files), "files")
    assert len(walked) <= 60 and len(files) <= 30, sorted(walked)
