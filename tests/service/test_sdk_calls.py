"""The real `tinker` SDK, unchanged, against the server: every call that recipes make.

The environment variable TINKER_PYTHON names a Python that has the SDK and torch (`make test-tinker`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.fake_desk import FakeDesk
from support.folders import TESTS
from support.service_facts import FACTS

from megatron_tiedlora.service.operations import Create, Pass
from megatron_tiedlora.service.tokens import TokenFile, new_token

PYTHON = os.environ.get("TINKER_PYTHON", "")
pytestmark = pytest.mark.tinker
make_app = pytest.importorskip("megatron_tiedlora.service.http").make_app
serving = pytest.importorskip("megatron_tiedlora.service.http").serving
take_port = pytest.importorskip("megatron_tiedlora.service.http").take_port


def test_the_sdk_trains_saves_loads_and_samples(tmp_path: Path) -> None:
    key, desk = new_token(tmp_path / "tokens", "alice"), FakeDesk()
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TINKER_API_KEY": key, "PYTHONPATH": str(TESTS)}
    with serving(make_app(desk, TokenFile(tmp_path / "tokens"), FACTS), take_port("127.0.0.1", 0)) as url:
        command = [PYTHON, "-m", "support.sdk_run", url]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=variables)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen["models"][0] == "org/base" and "org/base:tl6" in seen["models"] and seen["info"] == "org/base"
    assert seen["logprobs"] == [pytest.approx([-0.02, -0.03, -0.04]), pytest.approx([-0.06])]
    assert seen["metrics"] == {"loss:sum": pytest.approx(0.15)} == seen["resumed"]
    assert seen["step"] == seen["after"] == {"optimizer_step": 1.0, "grad_norm": 0.5}
    squares = 0.02**2 + 0.03**2 + 0.04**2 + 0.06**2  # the loss of the client, whose gradient is sent as weights
    assert seen["custom"]["loss:sum"] == pytest.approx(squares) and seen["custom"]["mine"] == 1.0
    assert seen["custom"]["surrogate_loss:sum"] == pytest.approx(2 * squares)  # sum of -weight * logprob
    assert seen["rejected"].startswith("RequestFailedError: Request failed: loss_fn 'gspo': is not supported")
    assert seen["saved"] == ["weights", "first"] and "exists; choose another name" in seen["twice"]
    assert seen["run"] == "org/base:tl6"
    assert seen["sampled"] == [[1, 2, 3]] * 2 and seen["prompt"] == [None, -1.0] == seen["scored"]
    numbers = [number for model, number, _ in desk.operations if model.endswith("train:0")]
    assert numbers == [0, 1, 2, 3, 4, 6, 7, 9, 10]  # 5 (gspo) and 8 (a name that exists) were rejected
    create = desk.operations[0][2]
    assert isinstance(create, Create) and (create.method, create.rank, create.seed) == ("tl6", 4, 3)
    assert [operation.backward for _, _, operation in desk.operations if isinstance(operation, Pass)] == [
        True, False, True, False,
    ]  # fmt: skip
    assert ("finish", "alice", desk.events[-1][-1]) == desk.events[-1]
