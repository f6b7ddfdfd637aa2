"""Starts `tiedlora serve-training` on a tiny model, and a small client of its protocol."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.service import wire_pb2
from megatron_tiedlora.service.tokens import new_token
from support.folders import ROOT
from support.ranks import TIME_LIMIT, free_port, wait_for
from support.run_helpers import World, start_ranks

NAME = "tiny/base"
SCRIPT = ROOT / "launch" / "serve_training.py"


@dataclass
class Service:
    """A service in a folder, which can be killed and started again.

    Attributes:
        flags: further flags of the command.
        ranks: the number of ranks; None is plain python.
    """

    folder: Path
    base: Path
    flags: Sequence[str] = ()
    ranks: int | None = None
    port: int = field(default_factory=free_port)
    world: World | None = None

    def key(self, owner: str = "ann") -> str:
        """A new key of a client."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return new_token(self.folder / "tokens", owner)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        """The command line behind the script's name."""
        paths = ["--state", str(self.folder / "state"), "--token_file", str(self.folder / "tokens")]
        model = ["--model", str(self.base), "--model_name", NAME, "--tokenizer", str(self.base), "--dtype", "fp32"]
        return [*model, *paths, "--port", str(self.port), *self.flags]

    def start(self) -> Service:
        """Start the ranks, and wait until they serve."""
        self.world = start_ranks(self.arguments(), folder=self.folder / "work", ranks=self.ranks, script=SCRIPT)
        out, _ = self.world.files[0]
        alive = self.world.processes[0]
        wait_for(lambda: "serving " in out.read_text() or alive.exitcode is not None, "the service to start")
        assert "serving " in out.read_text(), self.world.wait().tail()
        return self

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        assert self.world is not None
        self.world.kill()


class Rejected(Exception):
    """An answer with an error: the HTTP status (200 for a failed operation), and the message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


@dataclass
class Client:
    """A client with a session. Requests are sent again while the service is away."""

    url: str
    key: str
    session: str = ""
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = self.session or self.post("create_session", {"tags": [], "sdk_version": "0"})["session_id"]

    def post(self, path: str, body: Any) -> Any:
        """The JSON of an answer, or the bytes of a protobuf one."""
        proto = isinstance(body, bytes)
        kind = "application/x-protobuf" if proto else "application/json"
        data = body if proto else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/api/v1/{path}", data, {"X-API-Key": self.key, "Content-Type": kind}, method="POST"
        )
        deadline = time.monotonic() + TIME_LIMIT / 2
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    raw = answer.read()
                    return raw if "protobuf" in answer.headers["Content-Type"] else json.loads(raw)
            except urllib.error.HTTPError as error:
                if error.code not in (408, 503):  # a poll is over, or the server is ending
                    raise Rejected(error.code, json.loads(error.read())["error"]) from None
                time.sleep(0.1 * (error.code == 503))
            except (OSError, http.client.IncompleteRead):  # it was killed, perhaps in the middle of an answer
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def result(self, future: str) -> Any:
        """The result of an operation."""
        while True:
            found = self.post("retrieve_future", {"request_id": future})
            if not isinstance(found, dict) or found.get("type") != "try_again":
                break
        if isinstance(found, dict) and "error" in found:
            raise Rejected(200, found["error"])
        return found

    def create(self, method: str, rank: int, *, seed: int = 1, number: int = 0, **more: Any) -> str:
        """A new model."""
        config = {"rank": rank, "seed": seed, "train_mlp": True, "train_attn": True, "train_unembed": False}
        body = {"session_id": self.session, "model_seq_id": number, "base_model": f"{NAME}:{method}", **more}
        model = self.result(self.post("create_model", {**body, "lora_config": config})["request_id"])["model_id"]
        self.numbers[model] = 0
        return str(model)

    def _next(self, model: str) -> int:
        self.numbers[model] += 1
        return self.numbers[model]

    def send_pass(
        self, model: str, rows: Sequence[Mapping[str, torch.Tensor]], loss: str = "cross_entropy", **more: Any
    ) -> str:
        """Send a forward and a backward pass, and return its future. A row has tokens and the inputs of the loss."""
        sent = wire_pb2.ForwardBackwardRequest(model_id=model, seq_id=self._next(model), loss_fn=loss, **more)
        for row in rows:
            datum = wire_pb2.Datum()
            datum.model_input.add().encoded_text.tokens = row["tokens"].to(torch.int32).numpy().tobytes()
            for name, values in row.items():
                if name != "tokens":
                    own = datum.loss_fn_inputs[name]
                    own.dtype = 1 if values.is_floating_point() else 2
                    own.dense = values.numpy().tobytes()
            sent.data.append(datum.SerializeToString())
        return str(self.post("forward_backward", sent.SerializeToString())["request_id"])

    def logprobs(self, future: str) -> list[torch.Tensor]:
        """The log-probabilities of the rows of a pass."""
        found = wire_pb2.ForwardBackwardOutput.FromString(self.result(future))
        (record,) = found.loss_fn_outputs
        array = record.fields["logprobs"]
        values = torch.frombuffer(bytearray(array.data), dtype=torch.float32)
        bounds = (torch.frombuffer(bytearray(array.offsets), dtype=torch.int64) // 4).tolist()
        return [values[start:stop] for start, stop in pairwise(bounds)]

    def step(self, model: str, **numbers: float) -> str:
        """Send a step of the optimizer, and return its future."""
        given = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, **numbers}
        body = {"model_id": model, "seq_id": self._next(model), "adam_params": given}
        return str(self.post("optim_step", body)["request_id"])

    def save(self, model: str, name: str | None, *, kind: str = "weights", **more: Any) -> Any:
        """Save weights under a name, and return what the service says."""
        path = {"weights": "save_weights", "sampler_weights": "save_weights_for_sampler"}[kind]
        body = {"model_id": model, "seq_id": self._next(model), **({"path": name} if name else {}), **more}
        return self.result(self.post(path, body)["request_id"])

    def sample(self, sampler: str, prompt: Sequence[int], number: int, **params: Any) -> Any:
        """The sequences that continue a prompt."""
        body = {
            "sampling_session_id": sampler,
            "seq_id": number,
            "num_samples": 2,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {"max_tokens": 6, "seed": 5, "temperature": 1.0, **params},
        }
        return wire_pb2.SampleResponse.FromString(self.result(self.post("asample", body)["request_id"]))


def row(length: int, seed: int, **inputs: float) -> dict[str, torch.Tensor]:
    """A row of random tokens, with weights of one or these numbers for each token."""
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 300, (length + 1,), generator=drawn)
    numbers = {name: torch.full((length,), value) for name, value in (inputs or {"weights": 1.0}).items()}
    return {"tokens": tokens[:-1], "target_tokens": tokens[1:], **numbers}
