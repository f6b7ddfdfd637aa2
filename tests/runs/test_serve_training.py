"""`tiedlora serve-training` end to end: a client's training and sampling, and what it is after a crash."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_service import Client, Rejected, Service, row

pytestmark = pytest.mark.distributed


def train(client: Client, model: str, steps: range) -> list[Any]:
    """Two passes and a step, several times; what they return."""
    found = list[Any]()
    for step in steps:
        passes = [
            client.send_pass(model, [row(9, step), row(5, step + 50)]),
            client.send_pass(model, [row(7, step + 90, logprobs=-5.8, advantages=0.5)], "importance_sampling"),
        ]
        stepped = client.step(model)
        found += [torch.cat(client.logprobs(future)) for future in passes]
        found.append(client.result(stepped)["metrics"])
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def weights(service: Service, model: str, name: str) -> str:
    """A hash of saved weights."""
    (file,) = (service.folder / "state" / "models").glob(f"*/weights/{name}/*adapter*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.cpu_seconds(20, reason="three starts of two ranks")
def test_a_client_goes_on_after_all_ranks_were_killed(
    service_base: Path, tmp_path: Path, services: list[Service]
) -> None:
    """TP 2 x PP 1, states after every second step, a kill in the middle of a step; the same bits as without."""
    flags = ["--tensor_parallel", "2", "--state_steps", "2", "--share_micro_batches", "false"]
    expected, found = list[Any](), list[Any]()
    for name, kills in (("whole", False), ("killed", True)):
        service = Service(tmp_path / name, service_base, flags, ranks=2)
        key = service.key()
        services.append(service.start())
        client = Client(service.url, key)
        model, other = client.create("tl6", 3), client.create("lora", 2, number=1)
        results = train(client, model, range(3)) + train(client, other, range(1))
        sampler = client.save(model, None, kind="sampler_weights", sampling_session_seq_id=0)["sampling_session_id"]
        waiting = client.send_pass(model, [row(30, 7)])
        if kills:
            service.kill()
            service.start()
        results.append(torch.cat(client.logprobs(waiting)))
        sampled = client.sample(sampler, [5, 6, 7], 1)
        results += [one.tokens for one in sampled.sequences] + [client.result(client.step(model))["metrics"]]
        results += train(client, other, range(1, 3))
        client.save(model, "end")
        results.append(weights(service, model, "end"))
        service.world.signal(signal.SIGTERM)
        ended = service.world.wait().expect(143)
        assert "Traceback" not in ended.tail()
        (found if kills else expected).extend(results)
    assert same(found, expected)


def test_ranks_without_work_outlive_the_limit_of_waiting(
    service_base: Path, tmp_path: Path, services: list[Service]
) -> None:
    service = Service(tmp_path / "service", service_base, ["--pipeline_parallel", "2", "--timeout_minutes", "0.08"], 2)
    key = service.key()
    services.append(service.start())
    client = Client(service.url, key)
    model = client.create("tl5", 2)
    time.sleep(8)  # more than the 4.8 seconds that a rank waits for another one
    assert len(train(client, model, range(1))) == 3


def test_a_client_is_told_its_mistakes(service_base: Path, tmp_path: Path, services: list[Service]) -> None:
    service = Service(tmp_path / "service", service_base)
    key, strange = service.key(), service.key("bob")
    services.append(service.start())
    client, other = Client(service.url, key), Client(service.url, strange)
    model, strange_row = client.create("tl6", 3), {**row(9, 1), "tokens": torch.tensor([999] * 9)}
    for call, status, words in [
        (lambda: client.create("tl9", 3, number=1), 400, "tl9"),
        (lambda: client.create("lora", 999, number=2), 400, "999"),
        (lambda: other.post("get_info", {"model_id": model}), 404, "unknown"),
        (lambda: Client(service.url, "tml-wrong"), 401, "key"),
        (lambda: client.logprobs(client.send_pass(model, [row(9, 1)], "gspo")), 200, "gspo"),
        (lambda: client.logprobs(client.send_pass(model, [strange_row])), 200, "999"),
        (lambda: client.result(client.step(model)), 200, "operation 2 failed"),
        (lambda: client.result(client.step(model)), 200, "no gradients"),
    ]:
        with pytest.raises(Rejected) as caught:
            call()
        assert caught.value.status == status and words in caught.value.message, caught.value
    assert len(train(client, model, range(1))) == 3
