"""Training from Python: a run in this process is the command's run, and the process is as before when it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from folders import python

import megatron_tiedlora as tiedlora

CODE = """
import os, signal, sys
from megatron_tiedlora import Settings, UserError, attach, generate, load_adapter, load_base, train
from megatron_tiedlora.commands.front import call

call("random-model", ["--model=tiny", "--output=tiny"])
values = dict(model="tiny", train_file="rows.jsonl", max_steps=12, global_batch_size=8, learning_rate=0.1)
values.update(eval_interval=6, output_dir="one")
before = dict(os.environ), signal.getsignal(signal.SIGINT)
found = []
for folder in ("one", "two"):
    run = train(Settings(**{**values, "output_dir": folder}))
    assert run.adapter == run.folder / "adapter" and (run.step, run.reason) == (12, "max_steps"), run
    found.append(load_adapter(run.adapter))
assert found[0].equals(found[1])
for wrong in ({}, {"output_dir": "three", "layers": "99"}):
    try:
        train(Settings(**{**values, **wrong}))
    except UserError as error:
        print("rejected:", error)
after = {name: value for name, value in os.environ.items() if name in before[0] or "RANK" in name or "MASTER" in name}
assert (after, signal.getsignal(signal.SIGINT)) == before
print("answer:", len(generate(attach(load_base(found[0]), found[0]), "1 + 1 =", max_new_tokens=4)))
"""


@pytest.mark.cpu_seconds(25, reason="two runs in a process of their own")
@pytest.mark.distributed
def test_two_runs_in_one_process_need_neither_a_model_nor_a_network(tmp_path: Path) -> None:
    rows = ({"prompt": f"{number} + {number} =", "completion": f" {2 * number}"} for number in range(8))
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ended = python("-c", CODE, folder=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert ended.returncode == 0, ended.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: validation loss (\S+)$", ended.stdout, re.MULTILINE)]
    assert len(losses) == 6 and losses[0] > 5.5 and losses[2] < losses[0] - 1
    rejected = [line for line in ended.stdout.splitlines() if line.startswith("rejected: ")]
    assert "one" in rejected[0] and "layers 1 to " in rejected[1] and len(rejected) == 2
    assert "answer: " in ended.stdout and (tmp_path / "one" / "run.yaml").is_file()
    assert ended.stderr.startswith("training: 100%| 12/12 [") and "\r" not in ended.stderr


def test_a_dry_run_is_the_command_s() -> None:
    with pytest.raises(tiedlora.UserError, match="dry_run trains nothing; use the command: tiedlora train --dry_run"):
        tiedlora.train(tiedlora.Settings(dry_run=True))


def test_several_adapters_are_the_command_s() -> None:
    with pytest.raises(tiedlora.UserError, match="use the command: tiedlora train --adapters FILE"):
        tiedlora.train(tiedlora.Settings(adapters="four.yaml"))


def test_settings_are_checked_and_have_a_schema() -> None:
    schema = tiedlora.Settings.model_json_schema()
    fields = schema["properties"]
    assert fields.keys() == tiedlora.Settings.model_fields.keys() and "required" not in schema
    assert fields["method"]["enum"] == ["lora", "vera", "tl1", "tl2", "tl3", "tl4", "tl5", "tl6"]
    assert fields["rank"] == {
        "default": 8,
        "description": "rank r of A and B",
        "minimum": 1,
        "title": "Rank",
        "type": "integer",
    }
    for name, field in fields.items():
        assert field["description"] and not field.keys() & {"group", "flag", "choices"}, name
    for values, message in (
        ({"rank": 0}, "--rank 0: input should be greater than or equal to 1"),
        ({"rnk": 2}, r"unknown setting .rnk. .did you mean rank.."),
        ({"method": "tl7"}, "--method tl7: input should be one of"),
    ):
        with pytest.raises(tiedlora.UserError, match=message):
            tiedlora.Settings(**values)
