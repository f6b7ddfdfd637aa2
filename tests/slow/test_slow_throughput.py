"""Tokens per second of clients of the training service beside the same work by a run of several adapters, in turns."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import write_tiny_model
from support.training_service import Client, Service, row

from megatron_tiedlora.config.settings import DEFAULT_TASK, make_settings
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.runtime.process_group import join_process_group
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.service.batches import Division
from megatron_tiedlora.service.operations import Pass
from megatron_tiedlora.training.build import build_model
from megatron_tiedlora.training.step import TrainStep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LENGTH, TURNS = 512, 3
TARGETS = ("qkv", "o_proj", "gate_up", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    widths = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    folder = tmp_path_factory.mktemp("model") / "base"
    return write_tiny_model(folder, num_hidden_layers=8, max_positions=LENGTH, **widths)


def train(base: str, clients: int, tokens: int, steps: int, connection: Any) -> None:
    """In a process: `steps` steps of as many adapters as there are clients, each time that it is asked."""
    torch.set_num_threads(1)
    device, plans = join_process_group(5, expected_ranks=1), {}
    numbers = {"max_steps": 1000, "schedule": "constant", "warmup_steps": 0, "compile": "false", "rank": 8}
    sizes = {"max_length": LENGTH, "global_batch_size": 1, "micro_batch_size": 1, "targets": TARGETS}
    for index in range(clients):
        own = {"model": base, "task": DEFAULT_TASK, "dtype": "fp32", "ds_config": "zero0.json", "seed": index}
        settings = make_settings({**own, **numbers, **sizes, "method": ("lora", "tl6")[index % 2]})
        plans[str(index)] = plan_run(settings, rank=0, world_size=1)
    step = TrainStep(plans, build_model(plans, device).runner, StopRequests(), capacity=LENGTH)
    samples = {}
    for index in range(clients):
        given = row(tokens, index)
        weights = torch.ones(2, tokens)
        one = Pass((tokens,), given["tokens"], given["target_tokens"], weights, "cross_entropy", {}, True)
        batches = tuple(replace(b, objectives=(), loss_inputs=None) for b in Division(LENGTH).micro_batches(one))
        sizes_of = tuple(batch.tokens.numel() for batch in batches)
        samples[str(index)] = TrainingStep(batches, tokens, tokens, (tokens,), tokens, sizes_of, 0)
    for _ in range(3):
        step.run(samples)
    connection.send(0.0)
    while connection.recv():
        begin = time.monotonic()
        for _ in range(steps):
            step.run(samples)
        connection.send(time.monotonic() - begin)


def send_steps(client: Client, model: str, given: dict[str, torch.Tensor], steps: int) -> None:
    """Steps of a client that has the next one under way while it waits for the last."""
    waiting: list[tuple[str, str]] = []
    for _ in range(steps):
        waiting.append((client.send_pass(model, [given]), client.step(model)))
        for passed, stepped in waiting[:-1]:
            client.logprobs(passed), client.result(stepped)
        del waiting[:-1]
    for passed, stepped in waiting:
        client.logprobs(passed), client.result(stepped)


SIZES = [(1, 64, 8), (4, 64, 5), (16, 64, 2), (1, 256, 4), (4, 256, 2), (16, 256, 1)]


@pytest.mark.parametrize("clients, tokens, steps", SIZES)
def test_clients_are_served_as_fast_as_a_run_trains(
    base: Path, tmp_path: Path, services: list[Service], clients: int, tokens: int, steps: int
) -> None:
    service = Service(tmp_path / "service", base, ["--max_length", str(LENGTH), "--state_steps", "1000"])
    key = service.key()
    services.append(service.start())
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=train, args=(str(base), clients, tokens, steps, theirs), daemon=True)
    process.start()
    ours.recv()
    made = [Client(service.url, key) for _ in range(clients)]
    pairs = [(client, client.create(("lora", "tl6")[seed % 2], 8, seed=seed)) for seed, client in enumerate(made)]

    def serve(steps: int) -> float:
        threads = [
            threading.Thread(target=send_steps, args=(*pair, row(tokens, index), steps))
            for index, pair in enumerate(pairs)
        ]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - begin

    serve(3)
    seconds: list[tuple[float, float]] = []
    for _ in range(TURNS):
        served = serve(steps)
        ours.send(True)
        seconds.append((served, ours.recv()))
    ours.send(False)
    process.join(30)
    served, trained = map(statistics.median, zip(*seconds, strict=True))
    work = clients * tokens * steps
    print(f"{clients} x {tokens}: {work / served:.0f} and {work / trained:.0f} tokens/s, ratio {trained / served:.2f}")
    assert trained / served >= 0.9, seconds
