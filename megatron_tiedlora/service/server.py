"""Run the HTTP application of a training service in a thread of this process."""

import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from megatron_tiedlora.base.messages import UserError

_LOCAL = ("127.0.0.1", "::1", "localhost")
_MOST_FILES = 2**15
_IDLE_SECONDS = 75  # clients keep connections for a minute; a shorter time here would end them in the client's face
_STOP_SECONDS = 3  # for requests in progress; long polls are cut, and clients poll again

logger = logging.getLogger(__name__)


@contextmanager
def serving(app: Starlette, host: str, port: int) -> Iterator[str]:
    """Serve `app` until the end of the block, and yield its URL. With port 0 the system chooses one.

    Raises:
        UserError: the address cannot be used.
    """
    listener = _listening(host, port)
    if host not in _LOCAL:
        logger.warning(
            "--host %s: the connection is not encrypted, so keys can be read on the network. Use 127.0.0.1 with"
            " `ssh -L`, or a proxy with TLS",
            host,
        )
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False,
        proxy_headers=False, server_header=False, limit_concurrency=_allowed_files() // 2,
        timeout_keep_alive=_IDLE_SECONDS, timeout_graceful_shutdown=_STOP_SECONDS,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise UserError(f"--port {port}: the HTTP server did not start")
        found, bound, *_ = listener.getsockname()
        yield f"http://{f'[{found}]' if ':' in found else found}:{bound}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _allowed_files() -> int:
    """Return how many files and connections this process may have open, after raising its soft limit. A client has a
    connection for each result that it waits for, and must leave files for the rest of the service."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Raise UserError if that is impossible."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port}: cannot be used ({reason}). Give another one, or end the process that uses it"
        ) from None
    # Connections inherit it. asyncio sets it only for sockets of its own, and without it each answer waits for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
