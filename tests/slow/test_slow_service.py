"""The training service for minutes: kills at random moments, fuzzed requests, and constant memory."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.training_service import Client, Service, row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]
KILLS = int(os.environ.get("SERVICE_KILLS", "40"))
REQUESTS = int(os.environ.get("SERVICE_REQUESTS", "20000"))
MINUTES = float(os.environ.get("SERVICE_MINUTES", "60"))
TENANTS = (("tl6", 3), ("lora", 2), ("tl5", 4))
STEPS = 12


def a_run(client: Client, method: str, rank: int, round_: int, pause: float) -> list[Any]:
    """The training, sampling and saving of one client: all that it is told."""
    seed = 1000 * rank + round_
    drawn, found = random.Random(seed), list[Any]()
    model = client.create(method, rank, seed=seed, number=round_)
    for step in range(STEPS):
        time.sleep(pause * drawn.random())
        rows = [row(drawn.randint(4, 20), seed + step) for _ in range(drawn.randint(1, 3))]
        futures = [client.send_pass(model, [own]) for own in rows]
        stepped = client.step(model)
        found += [client.logprobs(future) for future in futures]
        found.append(client.result(stepped)["metrics"])
        if step % 4 == 3:
            more = {"sampling_session_seq_id": 100 * round_ + step}
            saved = client.save(model, None, kind="sampler_weights", **more)["sampling_session_id"]
            found += [list(one.tokens) for one in client.sample(saved, [5, 6, 7], step).sequences]
        if step == STEPS // 2:
            client.save(model, "half")
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two nested lists have the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("ranks", [None, 2])
def test_kills_at_random_moments_change_nothing(
    service_base: Path, tmp_path: Path, services: list[Service], ranks: int | None
) -> None:
    """SIGKILL of all ranks or of one (then its peers end by themselves), half of the kills at each number of ranks."""
    flags = ["--state_steps", "3", "--share_micro_batches", "false"]
    flags += ["--tensor_parallel", "2"] if ranks else []
    expected: dict[tuple[str, int], list[Any]] = {}
    quiet = Service(tmp_path / "quiet", service_base, flags, ranks=ranks)
    key = quiet.key()
    services.append(quiet.start())
    rounds = 4
    for method, rank in TENANTS:
        for round_ in range(rounds):
            expected[method, round_] = a_run(Client(quiet.url, key), method, rank, round_, 0.0)
    quiet.kill()
    service = Service(tmp_path / "killed", service_base, flags, ranks=ranks)
    keys = [service.key(method) for method, _ in TENANTS]
    services.append(service.start())
    compared, errors, done = list[int](), list[str](), threading.Event()

    def work(own: str, method: str, rank: int) -> None:
        try:
            for turn in itertools.cycle(range(rounds)):
                if done.is_set():
                    return
                result = a_run(Client(service.url, own), method, rank, turn, 0.3)
                assert same(result, expected[method, turn]), f"{method} {turn}: other bits"
                compared.append(len(result))
        except Exception as error:  # told by the main thread
            errors.append(f"{type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=work, args=(own, *tenant)) for own, tenant in zip(keys, TENANTS, strict=True)
    ]
    for thread in threads:
        thread.start()
    drawn = random.Random(5)
    for number in range(KILLS // 2):
        time.sleep(drawn.random() * 4)
        if ranks and number % 2:  # one rank alone
            service.world.signal(signal.SIGKILL, rank=drawn.randrange(ranks))
            ended = service.world.wait()
            assert all(status for status in ended.statuses), ended.tail()
        service.kill()
        service.start()
        assert not errors, errors
    done.set()
    for thread in threads:
        thread.join(300)
    assert not errors and not any(thread.is_alive() for thread in threads), errors
    assert len(compared) >= len(TENANTS)
    print(f"{KILLS // 2} kills, {sum(compared)} results of {len(compared)} runs compared")


# Hostile and hasty clients --------------------------------------------------------------------------------------------


def damaged(drawn: random.Random, body: bytes) -> bytes:
    """A body with some bytes changed, cut, repeated, or replaced."""
    kind = drawn.randrange(6)
    if kind == 0:
        return body[: drawn.randrange(len(body) + 1)]
    if kind == 1:
        return body + drawn.randbytes(drawn.randrange(200))
    if kind == 2:
        return drawn.randbytes(drawn.randrange(400))
    changed = bytearray(body)
    for _ in range(drawn.randint(1, 8)):
        if changed:
            changed[drawn.randrange(len(changed))] = drawn.randrange(256)
    return bytes(changed)


def test_fuzzed_requests_leave_a_service_that_works(
    service_base: Path, tmp_path: Path, services: list[Service]
) -> None:
    service = Service(tmp_path / "service", service_base, ["--request_tokens", "4096"])
    key = service.key()
    services.append(service.start())
    client = Client(service.url, key)
    model = client.create("tl6", 3)
    sampler = client.save(model, None, kind="sampler_weights", sampling_session_seq_id=0)["sampling_session_id"]
    seeds = list(valid_requests(client, model, sampler))
    statuses, drawn = Counter[int](), random.Random(3)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    for _ in range(REQUESTS):
        method, path, body, kind = drawn.choice(seeds)
        headers = {"X-API-Key": key if drawn.random() < 0.95 else "tml-no", "Content-Type": kind}
        if drawn.random() < 0.05:
            headers["Content-Encoding"] = drawn.choice(["zstd", "gzip", "br"])
        path = path if drawn.random() < 0.97 else f"{path}/{drawn.randrange(10**6)}"
        if path.endswith("retrieve_future") and drawn.random() < 0.9:
            body = b'{"request_id": "%d"}' % drawn.randrange(10**9)  # an existing one may wait for 30 s
        body, begin = damaged(drawn, body) if drawn.random() < 0.9 else body, time.monotonic()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            statuses[answer.status] += 1
            assert "Traceback" not in answer.read().decode(errors="replace")
        except (http.client.HTTPException, ConnectionError):
            connection.close()
            statuses[0] += 1
        assert time.monotonic() - begin < 10, (method, path, body, headers)
    print(dict(statuses))
    assert not any(status >= 500 for status in statuses), statuses
    fresh = Client(service.url, service.key("bob"))  # the first one has as many sessions as it may have
    assert len(a_run(fresh, "lora", 2, 0, 0.0)) > STEPS
    service.world.signal(signal.SIGTERM)
    assert "Traceback" not in service.world.wait().expect(143).tail()


def valid_requests(client: Client, model: str, sampler: str) -> Iterator[tuple[str, str, bytes, str]]:
    """Requests as a client sends them: method, path, body and content type."""
    sent = list[tuple[str, bytes]]()
    post = client.post

    def record(path: str, body: Any) -> Any:
        sent.append((path, body if isinstance(body, bytes) else json.dumps(body).encode()))
        return post(path, body)

    client.post = record  # type: ignore[method-assign]
    Client.__post_init__(replace_session(client))
    client.logprobs(client.send_pass(model, [row(5, 1), row(7, 2)]))
    client.logprobs(client.send_pass(model, [row(6, 1, logprobs=-5.0, advantages=1.0)], "ppo"))
    client.result(client.step(model))
    client.save(model, "kept")
    client.sample(sampler, [5, 6, 7], 1)
    del client.post
    for path, body in sent:
        kind = "application/x-protobuf" if path == "forward_backward" else "application/json"
        yield "POST", f"/api/v1/{path}", body, kind
    for path in ("client/config", "telemetry", "session_heartbeat", "load_weights", "create_sampling_session"):
        yield "POST", f"/api/v1/{path}", b'{"session_id": "%s"}' % client.session.encode(), "application/json"
    for path in ("healthz", "get_server_capabilities", f"training_runs/{model}", "checkpoints", f"samplers/{sampler}"):
        yield "GET", f"/api/v1/{path}", b"", "application/json"
    yield "GET", "/status", b"", "application/json"
    yield "GET", "/metrics", b"", "application/json"


def replace_session(client: Client) -> Client:
    """The client without a session, so that it asks for a new one."""
    client.session = ""
    return client


def test_memory_and_handles_are_constant(service_base: Path, tmp_path: Path, services: list[Service]) -> None:
    """Load and idle minutes in turns."""
    service = Service(tmp_path / "service", service_base, ["--owner_models", "4096"])
    keys = [service.key(method) for method, _ in TENANTS]
    services.append(service.start())
    process = psutil.Process(service.world.processes[0].pid)
    seen, end = list[tuple[float, int, int, int]](), time.monotonic() + 60 * MINUTES
    begin, turn = time.monotonic(), 0
    while time.monotonic() < end:
        for own, (method, rank) in zip(keys, TENANTS, strict=True):
            client = Client(service.url, own)
            a_run(client, method, rank, turn % 4, 0.0)
            client.post(f"sessions/{client.session}/finish", {})
        turn += 1
        if turn % 5 == 0:
            time.sleep(min(20.0, MINUTES))
            memory = process.memory_info().rss
            seen.append((time.monotonic() - begin, memory, process.num_fds(), process.num_threads()))
            print(*(f"{value:,.0f}" for value in seen[-1]), turn, flush=True)
    quarter = len(seen) // 4
    early, late = seen[quarter], seen[-1]
    assert late[1] - early[1] < 30e6 and late[2] <= early[2] + 2 and late[3] <= early[3], (early, late)
