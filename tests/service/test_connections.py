"""Connections that ask for nothing: polls whose client has left, and clients that send no request."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_desk import FakeDesk
from support.ranks import wait_for
from support.service_facts import FACTS

from megatron_tiedlora.service.operations import Step
from megatron_tiedlora.service.tokens import TokenFile, new_token

http_part: Any = pytest.importorskip("megatron_tiedlora.service.http")


def test_a_poll_ends_with_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing behind, and a limit holds for the polls of an owner."""
    monkeypatch.setattr(http_part, "_POLLS_AT_ONCE", 3)
    key, desk = new_token(tmp_path / "tokens", "ann"), FakeDesk(holds=True)
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    request = desk._add("ann", "model", 1, Step(0, 0, 0, 0, 0, 0))
    polls, listener = desk.answers[request][2], http_part.take_port("127.0.0.1", 0)
    facts = replace(FACTS, poll_seconds=30.0)

    def poll() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*listener.getsockname(), timeout=20)
        body = json.dumps({"request_id": request})
        connection.request("POST", "/api/v1/retrieve_future", body, headers)
        return connection

    with http_part.serving(http_part.make_app(desk, TokenFile(tmp_path / "tokens"), facts), listener):
        opened = [poll() for _ in range(3)]
        wait_for(lambda: len(polls) == 3, "three polls")
        refused = poll().getresponse()
        assert refused.status == 429 and b"3 requests for results wait already" in refused.read()
        for connection in opened:
            connection.close()
        wait_for(lambda: not polls, "the polls to end", limit=10.0)
        desk.release()
        assert poll().getresponse().status == 200


@pytest.mark.parametrize("sent", [[], [b"GET / HT"], [b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"GET"]])
def test_a_connection_without_a_request_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[bytes]
) -> None:
    monkeypatch.setattr(http_part, "_IDLE_SECONDS", 0.3)
    new_token(tmp_path / "tokens", "ann")
    app, listener = http_part.make_app(FakeDesk(), TokenFile(tmp_path / "tokens"), FACTS), http_part.take_port("::1", 0)
    with http_part.serving(app, listener), socket.create_connection(listener.getsockname()[:2], timeout=10) as opened:
        for part in sent:
            opened.sendall(part)
            if part.endswith(b"\r\n\r\n"):
                assert opened.recv(1000).startswith(b"HTTP/1.1 200")
        while opened.recv(1000):
            pass
