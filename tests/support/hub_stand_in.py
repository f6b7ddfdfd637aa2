"""A stand-in for the hub's HTTP interface: it takes commits of small files, keeps what it was sent, and gives files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40  # of every repository


@dataclass
class Hub:
    """What the stand-in was asked and sent.

    Attributes:
        refuses: the path of a call that it answers with 403; '' for none.
        calls: the paths of calls that send something; reads: of those that read.
        repositories: the files of each repository that can be downloaded, by path.
    """

    address: str = ""
    refuses: str = ""
    calls: list[str] = field(default_factory=list)
    created: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.hub.reads.append(self.path)
        for name, files in self.hub.repositories.items():
            if self.path.startswith(f"/api/models/{name}/revision/"):
                return self.answer(200, {"id": name, "sha": COMMIT, "siblings": []})
            if self.path.startswith(f"/api/models/{name}/tree/"):
                rows = [{"type": "file", "path": path, "size": len(held), "oid": _oid(held)}
                        for path, held in files.items()]  # fmt: skip
                return self.answer(200, rows)
            path = self.path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if path in files:
                return self.send(200, files[path], **{"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(files[path])}"'})
        self.answer(404, {"error": "not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.calls.append(self.path)
        if self.hub.refuses and self.path.startswith(self.hub.refuses):
            self.answer(403, {"error": "You are not allowed to do this"})
        elif self.path == "/api/repos/create":
            self.hub.created = json.loads(body)
            self.answer(200, {"url": f"{self.hub.address}/me/demo"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **regular} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in filter(None, body.split(b"\n")):
                item = json.loads(line)
                if item["key"] == "file":
                    self.hub.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            address = f"{self.hub.address}/me/demo/commit/0"
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": address})
        else:
            self.answer(404, {"error": "not found"})

    def answer(self, status: int, content: Any) -> None:
        self.send(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub_stand_in(refuses: str = "") -> Iterator[Hub]:
    """Serve the stand-in on a free port of this host."""
    hub = Hub(refuses=refuses)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
