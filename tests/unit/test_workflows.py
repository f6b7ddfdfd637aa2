"""The workflow files and the page for coding agents name commands, files and versions that exist."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from support.folders import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_what_is_there(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    assert content["permissions"] == {"contents": "read"}, "no job may write unless it says so"
    for name, job in content["jobs"].items():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands or job.get("needs"), name
        for command in commands:
            program, *words = command.split()
            assert (words[0] in TARGETS) if program == "make" else os.access(ROOT / program, os.X_OK), command
    for version in re.findall(r"(?<![\w.])3\.\d+", file.read_text()):
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_page_for_agents_names_what_is_there() -> None:
    page = (ROOT / "AGENTS.md").read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page)]
    files = re.findall(r"(?:tests|megatron_tiedlora|base|adapters)/[\w/]+(?:\.py)?", page)
    places = [ROOT / name for name in [*links, *files]]
    assert links and files
    for place in places:
        inside = ROOT / "megatron_tiedlora" / place.relative_to(ROOT)
        assert place.exists() or inside.exists(), place
    assert set(re.findall(r"(?m)^ +make ([a-z-]+)", page)) <= set(TARGETS)
