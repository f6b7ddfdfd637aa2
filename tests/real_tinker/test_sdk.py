"""The unmodified `tinker` SDK against the service: five steps with the bits of training, clients side by side, losses.

TINKER_PYTHON names a Python that has it (`make test-tinker`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from support.forked_ranks import run_on_ranks
from support.oracle_training import SETTINGS
from support.ranks import TIME_LIMIT
from support.service_steps import five_steps_on_ranks, full_passes
from support.training_service import NAME, Service

from megatron_tiedlora.config.settings import DEFAULT_TASK

pytestmark = pytest.mark.tinker
CLIENT = Path(__file__).parent.parent / "support" / "tinker_client.py"
FLAGS = ["--tensor_parallel", "2", "--pipeline_parallel", "2", "--share_micro_batches", "false", "--state_steps", "2"]
NUMBERS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 0.5}


def rows(seed: int, loss: str, lengths: tuple[int, ...] = (9, 14, 5)) -> list[dict[str, list[float]]]:
    """Rows of random tokens with the inputs of a loss."""
    drawn, found = torch.Generator().manual_seed(seed), list[dict[str, list[float]]]()
    for length in lengths:
        tokens = torch.randint(3, 300, (length + 1,), generator=drawn).tolist()
        numbers = torch.randn(2, length, generator=drawn)
        row = {"tokens": tokens[:-1], "target_tokens": tokens[1:]}
        if loss == "cross_entropy":
            row["weights"] = numbers[0].abs().tolist()
        else:
            row |= {"logprobs": (0.5 * numbers[0] - 5.8).tolist(), "advantages": numbers[1].tolist()}
        found.append(row)
    return found


def step(seed: int, loss: str) -> list[Any]:
    return ["step", rows(seed, loss), loss, SETTINGS[loss], NUMBERS]


def clients() -> dict[str, dict[str, Any]]:
    """Three clients with methods, ranks and losses of their own."""
    losses = list(SETTINGS)
    made = {}
    for number, (method, rank) in enumerate((("tl6", 3), ("lora", 2), ("tl5", 5))):
        calls = [step(10 * number + index, losses[(number + index) % len(losses)]) for index in range(5)]
        calls += [["custom", rows(77 + number, "cross_entropy"), NUMBERS], ["sample", [5, 6, 7]]]
        calls += [["fails", rows(1, "cross_entropy"), "stable_reinforce"], step(99, "ppo"), ["save", "end"]]
        made[method] = {"base_model": f"{NAME}:{method}", "rank": rank, "seed": number, "calls": calls}
    return made


def start_client(service: Service, key: str, folder: Path, script: dict[str, Any], *, pause: float) -> Any:
    folder.mkdir(parents=True)
    (folder / "script.json").write_text(json.dumps({**script, "pause": pause}))
    command = [os.environ["TINKER_PYTHON"], "-W", "ignore", str(CLIENT), service.url, key]
    command += [str(folder / "script.json"), str(folder / "results.json")]
    environment = {**os.environ, "TINKER_TELEMETRY": "0"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def results(process: Any, folder: Path) -> list[Any]:
    assert process.wait(TIME_LIMIT) == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "results.json").read_text())


def saved_bytes(service: Service, path: str) -> bytes:
    """The tensors of a checkpoint at a tinker:// path."""
    model, _, name = path.removeprefix("tinker://").split("/")
    found = [f for f in (service.folder / "state" / "models").glob(f"*/weights/{name}/adapter*.safetensors")]
    (file,) = [f for f in found if model.split(":")[0] in str(f)]
    return file.read_bytes()


def test_five_steps_have_the_bits_of_train(service_base: Path, tmp_path: Path, services: list[Service]) -> None:
    """TP 2 x PP 2, clipping active: what the client saves has the tensors of `tiedlora train` on the same tokens."""
    settings = {"model": str(service_base), "task": DEFAULT_TASK, "dtype": "fp32", "ds_config": "zero0.json"}
    given = {**settings, "method": "tl6", "rank": 3, "alpha": 32.0}
    expected, *_ = run_on_ranks(five_steps_on_ranks, given, (2, 2, 1), str(tmp_path), ranks=4, folder=tmp_path)
    calls = list[Any]()
    for of_step in full_passes():
        sent = [
            {"tokens": tokens.tolist(), "target_tokens": targets.tolist(), "weights": [1 / 64] * len(tokens)}
            for one in of_step
            for tokens, targets in zip(one.tokens.split(one.lengths), one.targets.split(one.lengths), strict=True)
        ]
        calls.append(["step", sent, "cross_entropy", {}, NUMBERS])
    script = {"base_model": f"{NAME}:tl6", "rank": 3, "seed": 5, "calls": [*calls, ["save", "end"]]}
    # The rows of a step fill two micro-batches of 32 tokens, as those of the run.
    flags = [*FLAGS, "--max_length", "32", "--micro_batch_size", "1"]
    service = Service(tmp_path / "service", service_base, flags, ranks=4)
    key = service.key()
    services.append(service.start())
    found = results(start_client(service, key, tmp_path / "client", script, pause=0.0), tmp_path / "client")
    state = load(saved_bytes(service, found[-1]))
    assert len(state) == len(expected) > 4
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_clients_side_by_side_have_the_bits_of_one_alone(
    service_base: Path, tmp_path: Path, services: list[Service]
) -> None:
    """TP 2 x PP 2, several losses, a loss of the client's own, samples and a rejected call in between."""
    expected = {}
    for name, script in clients().items():
        service = Service(tmp_path / name, service_base, FLAGS, ranks=4)
        key = service.key()
        services.append(service.start())
        own = tmp_path / name / "client"
        found = results(start_client(service, key, own, script, pause=0.0), own)
        expected[name] = found[:-1], saved_bytes(service, found[-1])
        service.kill()
    service = Service(tmp_path / "all", service_base, FLAGS, ranks=4)
    keys = {name: service.key(name) for name in clients()}
    services.append(service.start())
    folders = {name: tmp_path / "all" / name for name in keys}
    processes = {
        name: start_client(service, keys[name], folders[name], script, pause=0.2) for name, script in clients().items()
    }
    for name, process in processes.items():
        found = results(process, folders[name])
        assert found[:-1] == expected[name][0], name
        assert saved_bytes(service, found[-1]) == expected[name][1], name
        assert all("stable_reinforce" in said for said in found[7])
