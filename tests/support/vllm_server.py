"""`vllm serve` as a process of its own, with adapters by name, and its HTTP interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from support.folders import ROOT
from support.served_models import COUNT, FUSED, Answer, ServedModel, prompts
from support.vllm_engine import ENVIRONMENT, MODES

START_SECONDS = 150  # until it answers
REQUEST_SECONDS = 60


class Reply(NamedTuple):
    """The status of an HTTP reply and its JSON (the text, where it is none)."""

    status: int
    content: Any

    @property
    def error(self) -> str:
        """The message of an error."""
        content = self.content
        return str(content.get("error", content).get("message", content)) if isinstance(content, dict) else str(content)


class Server:
    """A server of a model in a mode, whose adapters are the folders below `adapters`."""

    def __init__(
        self, model: ServedModel, mode: str, adapters: Path, log: Path, *options: str, **environment: str
    ) -> None:
        """Its start; `options` are of `vllm serve`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model.folder]
        command += ["--host", "127.0.0.1", "--port", self.port, "--served-model-name", "base", "--dtype", "float32"]
        command += ["--enable-lora", "--max-lora-rank", 8, "--max-loras", 8, "--max-cpu-loras", 64, *options]
        command += ["--lora-target-modules", *FUSED, "--additional-config", json.dumps(MODES[mode])]
        command += ["--max-model-len", 96, "--max-num-seqs", 16, "--enforce-eager", "--no-enable-prefix-caching"]
        variables = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
        variables |= {"TIEDLORA_ADAPTERS": str(adapters), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **environment}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=stream, stderr=stream, env=variables, start_new_session=True
            )

    def __enter__(self) -> Self:
        """Wait until it answers."""
        end = time.monotonic() + START_SECONDS
        while not self.healthy():
            if (status := self.process.poll()) is not None or time.monotonic() > end:
                self.close()
                said = "did not start in time" if status is None else f"ended with status {status}"
                raise AssertionError(f"vllm serve {said}:\n{self.log.read_text(errors='replace')[-6000:]}")
            time.sleep(0.3)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the server and the processes that it started, which are in its session."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def call(self, path: str, body: Any = None) -> Reply:
        """GET a path, or POST `body` to it."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as reply:
                return _reply(reply.status, reply.read())
        except urllib.error.HTTPError as error:
            return _reply(error.code, error.read())

    def healthy(self) -> bool:
        """Whether it answers that it is."""
        try:
            return self.call("/health").status == 200
        except OSError:
            return False

    def complete(self, model: str, index: int, *, count: int = COUNT, prompt_logprobs: bool = False) -> Reply:
        """What it replies to a greedy completion of a prompt by an adapter, or by "base"."""
        body = {
            "model": model,
            "prompt": prompts()[index],
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            **({"prompt_logprobs": 1} if prompt_logprobs else {}),
        }
        return self.call("/v1/completions", body)

    def names(self) -> list[str]:
        """The models that it lists: the base and the adapters that were asked for."""
        return [entry["id"] for entry in self.call("/v1/models").content["data"]]


def _reply(status: int, body: bytes) -> Reply:
    try:
        return Reply(status, json.loads(body))
    except ValueError:
        return Reply(status, body.decode(errors="replace"))


def answer_of(reply: Reply, index: int) -> Answer:
    """The answer in a reply to `complete`."""
    assert reply.status == 200, reply
    said = reply.content["choices"][0]
    entries: Sequence[Any] = (said.get("prompt_logprobs") or [None])[1:]
    pairs = zip(prompts()[index][1:], entries, strict=False)
    of_prompt = [entry[str(token)]["logprob"] for token, entry in pairs]
    return Answer(said["token_ids"], said["logprobs"]["token_logprobs"], of_prompt)
