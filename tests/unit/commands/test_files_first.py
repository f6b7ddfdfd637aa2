"""What a flag names is looked for before torch, DeepSpeed and transformers are imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# (flag, value, what the error says), of a command; FOLDER is one with a model and data.
CASES = {
    "train": (
        ("adapters", "no.yaml", "--adapters no.yaml: no such file"),
        ("adapters", "FOLDER", "--adapters FOLDER: is a folder; give a YAML list"),
        ("train_file", "no.jsonl", "no.jsonl: no such file"),
        ("train_file", "FOLDER/rows.jsonl:0.5,no.jsonl:0.5", "no.jsonl: no such file"),
        ("train_file", "no*.jsonl", "no*.jsonl: no file has a name of this pattern"),
        ("validation_file", "./no.csv", "no.csv: no such file"),
        ("test_file", "no.parquet", "no.parquet: no such file"),
        ("ds_config", "no.json", "--ds_config no.json: no such file"),
        ("chat_template", "no.jinja", "--chat_template no.jinja: no such file"),
        ("model", "./no", "--model ./no: no such folder"),
    ),
    "evaluate": (
        ("test_file", "no.jsonl", "no.jsonl: no such file"),
        ("chat_template", "no.jinja", "--chat_template no.jinja: no such file"),
    ),
}
PROGRAM = """
import json, sys
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.commands.front import call
found = []
for arguments in json.loads(sys.argv[2]):
    try:
        call(sys.argv[1], arguments)
    except UserError as error:
        found.append(str(error))
print(json.dumps([found, sorted({"torch", "deepspeed", "transformers", "datasets"} & sys.modules.keys())]))
"""


@pytest.mark.parametrize("command", CASES)
def test_no_slow_import_comes_first(tmp_path: Path, command: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    given = [(flag, value.replace("FOLDER", str(tmp_path))) for flag, value, _ in CASES[command]]
    whole = {"train_file": f"{tmp_path}/rows.jsonl"} if command == "train" else {}
    whole |= {"model": str(tmp_path), "task": "custom"}
    calls = [[f"--{name}={text}" for name, text in {**whole, flag: value}.items()] for flag, value in given]
    program = [sys.executable, "-c", PROGRAM, command, json.dumps(calls)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found, imported = json.loads(ended.stdout.splitlines()[-1])
    assert len(found) == len(given), found
    for (_, _, message), said in zip(CASES[command], found, strict=True):
        assert message.replace("FOLDER", str(tmp_path)) in said and "\n" not in said
    assert imported == []
