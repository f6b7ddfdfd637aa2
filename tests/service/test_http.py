"""The server over real connections, with a desk that answers at once: keys, sizes, long polls, errors."""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.fake_desk import FakeDesk
from support.service_facts import FACTS

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.service.operations import Create, Pass, Sample, Step
from megatron_tiedlora.service.records import Refused
from megatron_tiedlora.service.tokens import TokenFile, new_token
from megatron_tiedlora.service.wire_pb2 import Datum, ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse

pytest.importorskip("uvicorn")
zstandard = pytest.importorskip("zstandard")
make_app = pytest.importorskip("megatron_tiedlora.service.http").make_app
serving = pytest.importorskip("megatron_tiedlora.service.http").serving
take_port = pytest.importorskip("megatron_tiedlora.service.http").take_port

API, PROTOBUF = "/api/v1/", "application/x-protobuf"


@dataclass
class Client:
    """A client of the server with a key."""

    url: str
    key: str
    desk: FakeDesk

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port or 0, timeout=20)
        sent = {"X-API-Key": self.key, "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {name: value for name, value in sent.items() if value})
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def post(self, name: str, **fields: Any) -> tuple[int, Any]:
        """The status of an answer to a JSON body, and what is in its JSON."""
        status, body = self.send("POST", API + name, json.dumps(fields).encode())
        return status, json.loads(body)

    def sent_pass(self, body: bytes, **headers: str) -> tuple[int, bytes]:
        """The status and the body of an answer to a pass."""
        return self.send("POST", API + "forward_backward", body, Content_Type=PROTOBUF, **headers)

    def made(self, **more: Any) -> str:
        """The id of a new model."""
        lora = {"rank": 4, "seed": 3, **more.pop("lora_config", {})}
        fields = {"session_id": "s", "model_seq_id": 0, "base_model": "org/base", "lora_config": lora, **more}
        status, future = self.post("create_model", **fields)
        assert status == 200, future
        return str(self.post("retrieve_future", request_id=future["request_id"])[1]["model_id"])

    def rejected(self, name: str, **fields: Any) -> str:
        """The error of an answer with the status 400."""
        status, found = self.post(name, **fields)
        assert status == 400, found
        return str(found["error"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server, and its client alice."""
    file = tmp_path_factory.mktemp("keys") / "tokens"
    key, desk = new_token(file, "alice"), FakeDesk()
    with serving(make_app(desk, TokenFile(file), replace(FACTS, poll_seconds=30.0)), take_port("127.0.0.1", 0)) as url:
        yield Client(url, key, desk)


@pytest.fixture
def client(server: Client) -> Client:
    """The client of the server, whose desk is new."""
    server.desk.__dict__.update(FakeDesk().__dict__)
    return server


def passed(model: str, number: int = 1, **more: Any) -> ForwardBackwardRequest:
    """A pass of two tokens."""
    sent = ForwardBackwardRequest(model_id=model, seq_id=number, loss_fn="cross_entropy", **more)
    datum = Datum()
    datum.model_input.add().encoded_text.tokens = bytes([1, 0, 0, 0, 2, 0, 0, 0])
    datum.loss_fn_inputs["target_tokens"].dense = bytes([2, 0, 0, 0, 3, 0, 0, 0])
    datum.loss_fn_inputs["target_tokens"].dtype = 3
    sent.data.append(datum.SerializeToString())
    return sent


# Keys


def test_every_route_but_health_needs_a_key(client: Client) -> None:
    posts = "create_session telemetry asample retrieve_future forward_backward client/config sessions/s/finish"
    for name, key in itertools.product((*posts.split(), "checkpoints", "samplers/x"), ("", "tml-wrong")):
        for method in ("POST",) if name in posts else ("GET",):
            status, body = client.send(method, API + name, b"{}", X_API_Key=key)
            assert status == 401 and json.loads(body)["error"].startswith("the key in X-API-Key is missing or unknown")
    for path in ("/metrics", "/status"):
        assert client.send("GET", path, X_API_Key="")[0] == 401
    assert client.send("GET", API + "healthz", X_API_Key="") == (200, b'{"status":"ok"}')
    assert not client.desk.events


# Models


def test_a_model_has_what_its_client_asks_for(client: Client) -> None:
    client.made(base_model="org/base:tl6", user_metadata={"note": "x", "tries": 2})
    client.made(lora_config={"rank": 32, "seed": None, "train_attn": False})
    client.made(user_metadata={"method": "tl5"}, lora_config={"train_mlp": False})
    tl6, lora, tl5 = (operation for _, _, operation in client.desk.operations)
    all_targets = ("qkv", "o_proj", "gate_up", "down_proj")
    assert tl6 == Create("tl6", 4, 16.0, all_targets, 3)
    assert lora == Create("lora", 32, 16.0, ("gate_up", "down_proj"), 42)
    assert tl5 == Create("tl5", 4, 16.0, ("qkv", "o_proj"), 3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_model": "org/other"}, "'org/other': this server has org/base. Use org/base, or org/base:lora"),
        ({"base_model": "org/base:tl9"}, "unknown method 'tl9' (did you mean tl"),
        ({"user_metadata": {"method": 3}}, "unknown method '3'"),
        ({"user_metadata": {"note": "x" * 20000}}, "user_metadata: has 20,004 characters"),
        ({"session_id": "\ud800"}, "the body is not valid JSON"),
        ({"lora_config": {"rank": 0}}, "lora_config.rank = 0: input should be greater than or equal to 1"),
        ({"lora_config": {"train_mlp": False, "train_attn": False}}, "nothing is trained"),
        ({"optimizer_config": {"type": "dimuon"}}, "optimizer_config.type = 'dimuon': input should be 'adamw'"),
        ({"dropout": 0.1}, "the field 'dropout' = 0.1 is not supported by this server; omit it"),
    ],
)
def test_a_model_that_cannot_be_made_is_an_error(client: Client, fields: dict[str, Any], said: str) -> None:
    sent = {"session_id": "s", "model_seq_id": 0, "base_model": "org/base", **fields}
    sent["lora_config"] = {"rank": 4, **fields.get("lora_config", {})}
    assert said in client.rejected("create_model", **sent)
    assert not client.desk.operations


def test_a_pass_and_a_step_reach_the_desk_and_their_results_the_client(client: Client) -> None:
    model = client.made()
    request = json.loads(client.sent_pass(passed(model).SerializeToString())[1])["request_id"]
    status, body = client.send("POST", API + "retrieve_future", json.dumps({"request_id": request}).encode())
    assert status == 200 and ForwardBackwardOutput.FromString(body).metrics["loss:sum"] == pytest.approx(0.05)
    _, found = client.post("optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 0.5, "beta2": 0.9})
    assert client.post("retrieve_future", **found) == (200, {"metrics": {"optimizer_step": 1, "grad_norm": 0.5}})
    (_, number, step) = client.desk.operations[-1]
    assert (number, step) == (2, Step(0.5, 0.9, 0.9, 1e-12, 0.0, 0.0))
    assert isinstance(client.desk.operations[-2][2], Pass)
    deadline = time.monotonic() + 5
    while ("taken", "alice", request) not in client.desk.events and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ("taken", "alice", request) in client.desk.events


def test_a_rejected_operation_uses_its_number_up(client: Client) -> None:
    """Otherwise the next operation of the client would wait for it for ever."""
    model = client.made()
    sent = passed(model, 3)
    sent.loss_fn = "gspo"
    futures = [json.loads(client.sent_pass(sent.SerializeToString())[1])]
    futures.append(client.post("optim_step", model_id=model, seq_id=4, adam_params={"learning_rate": 1e38})[1])
    futures.append(client.post("optim_step", model_id=model, seq_id=5, optimizer_params={"type": "dimuon"})[1])
    load = {"path": "tinker://x/weights/y", "optimizer": True}
    futures.append(client.post("load_weights", model_id=model, seq_id=6, **load)[1])
    said = [client.post("retrieve_future", **future)[1] for future in futures]
    assert all(answer["category"] == "user" for answer in said)
    parts = ("'gspo': is not supported", "adam_params.learning_rate = 1e+38", "optimizer_params", "unknown")
    assert all(part in answer["error"] for part, answer in zip(parts, said, strict=True))
    assert [event[3] for event in client.desk.events if event[0] == "reject"] == ["3", "4", "5", "6"]
    sent.model_id = "of nobody"
    assert client.sent_pass(sent.SerializeToString())[0] == 404


def test_an_operation_is_sent_again_after_an_error_of_the_disk(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, submit = client.made(), client.desk.submit

    def full(*_: Any, **__: Any) -> str:
        raise Refused(503, "the server cannot use its desk.sqlite (disk is full); try again")

    monkeypatch.setattr(client.desk, "submit", full, raising=False)
    assert client.post("optim_step", model_id=model, seq_id=1)[0] == 503
    monkeypatch.setattr(client.desk, "submit", submit)
    assert client.post("optim_step", model_id=model, seq_id=1)[0] == 200
    assert not [event for event in client.desk.events if event[0] == "reject"]


# Samples


def sample(**more: Any) -> dict[str, Any]:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"type": "encoded_text", "tokens": [3]}]}
    return {"sampling_session_id": "sampler", "seq_id": 0, "prompt": prompt, **more}


def test_a_sample_has_what_its_client_asks_for(client: Client) -> None:
    _, opened = client.post("create_sampling_session", session_id="s", sampling_session_seq_id=0, base_model="org/base")
    sampler = opened["sampling_session_id"]
    params = {"max_tokens": 5, "seed": 7, "stop": ["a", "b"], "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    sent = sample(sampling_session_id=sampler, sampling_params=params, num_samples=2, topk_sample_logprobs=2)
    _, found = client.post("asample", **sent, prompt_logprobs=True, prompt_logprobs_last_n=2)
    assert len(found["sample_sequence_ids"]) == 2
    wanted = Sample("", (1, 2, 3), 2, 5, 7, 0.5, 3, 0.9, (), ("a", "b"), 2, 0, True, 2)
    assert client.desk.operations[-1][2] == wanted
    _, body = client.send("POST", API + "retrieve_future", json.dumps({"request_id": found["request_id"]}).encode())
    assert len(SampleResponse.FromString(body).sequences) == 2


@pytest.mark.parametrize(
    ("stop", "tokens", "texts"),
    [(None, (9,), ()), ([], (), ()), ([4, 5], (4, 5), ()), ("end", (), ("end",)), (["a"], (), ("a",))],
)
def test_stops_replace_those_of_the_base(client: Client, stop: Any, tokens: tuple[int], texts: tuple[str]) -> None:
    sampler = client.desk.open_sampler("alice", "s", 0, path=None)
    client.post("asample", **sample(sampling_session_id=sampler, sampling_params={"stop": stop}))
    found = client.desk.operations[-1][2]
    assert isinstance(found, Sample) and (found.stop_tokens, found.stop_texts) == (tokens, texts)
    assert found.max_tokens == 61 and found.top_k == 0 and found.seed >= 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": {"chunks": []}}, "prompt: has 0 tokens"),
        ({"prompt": {"chunks": [{"tokens": [100]}]}}, "prompt: 100 is not a token of org/base"),
        ({"prompt": {"chunks": [{"tokens": [-1]}]}}, "prompt.chunks.0.tokens.0 = -1"),
        ({"prompt": {"chunks": [{"type": "image", "data": "x"}]}}, "type = 'image': input should be 'encoded_text'"),
        ({"sampling_params": {"max_tokens": 62}}, "62 and the 3 tokens of the prompt are more than 64 tokens"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature = -1"),
        ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p = 0"),
        ({"sampling_params": {"stop": [""]}}, "sampling_params.stop"),
        ({"num_samples": 129}, "num_samples = 129: input should be less than or equal to 128"),
        ({"topk_prompt_logprobs": 21}, "topk_prompt_logprobs = 21: input should be less than or equal to 20"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n: 1 needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, "prompt_logprobs_last_n: 3 needs"),
        ({"prompt_alt_tokens_k": 1}, "the field 'prompt_alt_tokens_k' = 1 is not supported"),
        ({"record_stability_info": True}, "the field 'record_stability_info' = True is not supported"),
        ({"target_prompt_logprobs": {"data": [1]}}, "the field 'target_prompt_logprobs'"),
    ],
)
def test_a_sample_that_cannot_be_made_is_an_error(client: Client, fields: dict[str, Any], said: str) -> None:
    sampler = client.desk.open_sampler("alice", "s", 0, path=None)
    assert said in client.rejected("asample", **sample(sampling_session_id=sampler, **fields))


# Checkpoints and sessions


def test_checkpoints_are_listed_loaded_and_deleted(client: Client) -> None:
    model = client.made(base_model="org/base:tl6")
    _, found = client.post("save_weights", model_id=model, seq_id=1, path="a")
    path = client.post("retrieve_future", **found)[1]["path"]
    assert path == f"tinker://{model}/weights/a"
    _, body = client.send("GET", f"{API}training_runs/{model}/checkpoints")
    (listed,) = json.loads(body)["checkpoints"]
    assert (listed["checkpoint_id"], listed["checkpoint_type"], listed["size_bytes"]) == ("weights/a", "training", 1234)
    assert json.loads(client.send("GET", f"{API}training_runs/{model}")[1])["base_model"] == "org/base:tl6"
    info = client.post("weights_info", tinker_path=path)[1]
    assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == ("org/base:tl6", 4, True)
    client.post("load_weights", session_id="s", model_seq_id=1, path=path, optimizer=True)
    made = client.desk.operations[-1][2]
    assert isinstance(made, Create) and (made.method, made.folder, made.optimizer) == ("tl6", path, True)
    assert client.send("DELETE", f"{API}training_runs/{model}/checkpoints/weights/a")[0] == 200
    assert client.send("DELETE", f"{API}training_runs/{model}/checkpoints/weights/a")[0] == 404
    assert not client.desk.weights


def test_sessions_open_live_and_end(client: Client) -> None:
    status, found = client.post("create_session", tags=[], user_metadata={"a": 1}, sdk_version="0.38.0")
    assert status == 200 and "train_unembed has no effect" in found["warning_message"]
    for version, is_tested in (("0.25.0", True), ("0.24.1", False), ("0.40.1", False), ("1.30", False), ("", False)):
        warned = "tested with" in client.post("create_session", sdk_version=version)[1]["warning_message"]
        assert warned != is_tested, version
    assert client.post("session_heartbeat", session_id=found["session_id"]) == (200, {})
    assert client.post("session_heartbeat", session_id="finished")[0] == 410
    assert client.post(f"sessions/{found['session_id']}/finish", reason={"type": "success"}, detail=None) == (200, {})
    assert client.desk.events[-1] == ("finish", "alice", found["session_id"])


# Bodies


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON"),
        (b"[]", "the body is not a JSON object"),
        (b"\xff\xfe", "the body is not valid JSON"),
        (b"[" * 50_000, "the body is not valid JSON (it is nested too deeply)"),
        (b'{"model_id": "m", "seq_id": 1e400}', "seq_id"),
        (b'{"model_id": "m", "seq_id": true}', "seq_id = True"),
        (b'{"model_id": 3, "seq_id": 1}', "model_id = 3"),
        (b'{"model_id": "m", "seq_id": ' + b"9" * 5000 + b"}", "the body is not valid JSON"),
        (b'{"seq_id": 1}', "model_id"),
    ],
)
def test_json_that_is_wrong_is_one_line(client: Client, body: bytes, said: str) -> None:
    status, found = client.send("POST", API + "optim_step", body)
    message = json.loads(found)["error"]
    assert status == 400 and said in message and "\n" not in message and len(message) < 1300


@pytest.mark.parametrize(
    ("path", "kind"), [("optim_step", PROTOBUF), ("optim_step", ""), ("forward_backward", "application/json")]
)
def test_another_content_type_is_415(client: Client, path: str, kind: str) -> None:
    status, found = client.send("POST", API + path, b"{}", Content_Type=kind)
    assert status == 415 and "send application/" in json.loads(found)["error"]


def test_bodies_may_be_compressed_and_bombs_are_not_unpacked(client: Client) -> None:
    model = client.made()
    pack = zstandard.ZstdCompressor().compress
    body = passed(model).SerializeToString()
    assert client.sent_pass(pack(body), Content_Encoding="zstd")[0] == 200
    bomb = pack(bytes(2**28))
    assert len(bomb) < FACTS.max_body
    tracemalloc.start()
    status, found = client.sent_pass(bomb, Content_Encoding="zstd")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert status == 413 and "larger than 100,000 bytes" in json.loads(found)["error"]
    assert peak < 10e6
    for broken in (b"", b"zstd", pack(body)[:-5], b"\x28\xb5\x2f\xfd\xff\xff\xff"):
        status, found = client.sent_pass(broken, Content_Encoding="zstd")
        assert status == 400, found
    assert client.sent_pass(body, Content_Encoding="gzip")[0] == 415


def test_a_large_body_is_rejected_before_it_is_read(client: Client) -> None:
    status, found = client.send("POST", API + "telemetry", bytes(FACTS.max_body + 1))
    assert status == 413, found
    address = urlsplit(client.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        head = f"POST {API}create_session HTTP/1.1\r\nHost: x\r\nX-API-Key: {client.key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {2**40}\r\n\r\n"
        connection.sendall(head.encode() + bytes(FACTS.max_body + 1))
        assert b"413" in connection.recv(100)


def test_hostile_passes_are_one_error_each_and_the_server_lives(client: Client) -> None:
    model = client.made()
    whole = passed(model).SerializeToString()
    for length in range(0, len(whole), 3):
        status, found = client.sent_pass(whole[:length])
        assert status in (200, 400) and b"Traceback" not in found  # 200: the future fails
    assert client.sent_pass(b"\x1a\x00" * 40_000)[0] == 400
    assert client.send("GET", API + "healthz")[0] == 200


def test_telemetry_is_accepted_and_dropped(client: Client) -> None:
    assert client.send("POST", API + "telemetry", b"not even JSON") == (200, b'{"status":"accepted"}')
    assert not client.desk.events


# Results


def test_a_long_poll_wakes_when_the_result_is_there(client: Client) -> None:
    model = client.made()
    client.desk.holds = True
    _, found = client.post("optim_step", model_id=model, seq_id=1)
    before = time.monotonic()
    threading.Timer(0.1, client.desk.release).start()
    assert client.post("retrieve_future", **found)[0] == 200
    assert time.monotonic() - before < 5


def test_a_long_poll_ends_with_408(client: Client, tmp_path: Path) -> None:
    key = new_token(tmp_path / "tokens", "alice")
    client.desk.holds = True
    request = client.desk.create("alice", "s", 0, Create("lora", 1, 1.0, (), 0), info={})
    with serving(make_app(client.desk, TokenFile(tmp_path / "tokens"), FACTS), take_port("127.0.0.1", 0)) as url:
        before = time.monotonic()
        status, again = replace(client, url=url, key=key).post("retrieve_future", request_id=request)
        assert FACTS.poll_seconds <= time.monotonic() - before < 5
    assert (status, again) == (408, {"type": "try_again", "request_id": request, "queue_state": "paused_capacity"})


def test_a_long_poll_holds_no_thread(client: Client) -> None:
    """More polls than the pool has threads wait at once, and another request is answered meanwhile."""
    model = client.made()
    client.desk.holds = True
    _, found = client.post("optim_step", model_id=model, seq_id=1)
    polls = [threading.Thread(target=client.post, args=("retrieve_future",), kwargs=found) for _ in range(60)]
    for poll in polls:
        poll.start()
    assert client.send("GET", API + "get_server_capabilities")[0] == 200
    client.desk.release()
    for poll in polls:
        poll.join(10)
        assert not poll.is_alive()


def test_results_of_others_are_unknown(client: Client, tmp_path: Path) -> None:
    _, found = client.post("optim_step", model_id=client.made(), seq_id=1)
    bob = new_token(tmp_path / "tokens", "bob")
    with serving(make_app(client.desk, TokenFile(tmp_path / "tokens"), FACTS), take_port("127.0.0.1", 0)) as url:
        assert replace(client, url=url, key=bob).post("retrieve_future", **found)[0] == 404
    assert client.post("retrieve_future", **found)[0] == 200


# Errors and numbers


def test_the_message_of_an_unexpected_error_is_not_told(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, found = client.post("retrieve_future", request_id="broken")
    assert (status, found) == (500, {"error": "internal error of the server (RuntimeError); its log says where"})
    (record,) = caplog.records
    assert "RuntimeError at" in record.getMessage() and "fake_desk.py" in record.getMessage()
    assert "secret" not in caplog.text and client.key not in caplog.text


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", API + "no/such"), ("GET", API + "optim_step")])
def test_unknown_routes_are_json(client: Client, method: str, path: str) -> None:
    status, found = client.send(method, path)
    assert status in (404, 405) and json.loads(found)["error"] == f"{method} '{path}': this server has no such endpoint"


def test_numbers_for_prometheus_and_people(client: Client) -> None:
    lines = client.send("GET", "/metrics")[1].decode().splitlines()
    assert lines == ["# TYPE tiedlora_models gauge", "tiedlora_models 2", "# TYPE tiedlora_operations_total counter",
                     "tiedlora_operations_total 12345678"]  # fmt: skip
    status = json.loads(client.send("GET", "/status")[1])
    assert status["model"] == "org/base" and status["numbers"]["models"] == 2


def test_a_port_in_use_is_one_clear_line(client: Client) -> None:
    port = urlsplit(client.url).port
    with pytest.raises(UserError, match=f"--port {port}: cannot be used .Address already in use"):
        take_port("127.0.0.1", port or 0)
    with pytest.raises(UserError, match="cannot be used"):
        take_port("no such host", 1)


def test_another_host_is_served_with_a_warning(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(make_app(client.desk, None, FACTS), take_port("0.0.0.0", 0)) as url:
        assert replace(client, url=url).send("GET", API + "healthz")[0] == 200
    assert "--host 0.0.0.0: the connection is not encrypted" in caplog.text


def test_a_stop_cuts_long_polls(client: Client) -> None:
    client.desk.holds = True
    request = client.desk._add("alice", "m", 1, Step(0, 0, 0, 0, 0, 0))

    class Anyone:
        def owner_of(self, key: str) -> str:
            return "alice"

    with serving(make_app(client.desk, Anyone(), replace(FACTS, poll_seconds=30.0)), take_port("127.0.0.1", 0)) as url:
        found: list[int] = []

        def poll() -> None:
            found.append(replace(client, url=url).post("retrieve_future", request_id=request)[0])

        (thread := threading.Thread(target=poll)).start()
        time.sleep(0.3)
        before = time.monotonic()
    assert time.monotonic() - before < 10
    thread.join(5)
    assert found == [503]  # which clients send again
    client.desk.release()  # a result for a loop that is closed is no error
