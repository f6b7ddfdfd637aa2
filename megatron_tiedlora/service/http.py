"""The HTTP interface of a training service, as the public `tinker` SDK speaks it.

`endpoints` says what a request means. This owns the transport: keys, sizes, long polls, and how errors are told. They
run in a thread pool, and a long poll holds no thread. Clients retry 5xx answers for minutes, so no mistake of a client
is one. Neither headers nor bodies are logged or stored: the SDK sends its key in both. All but healthz needs a key.
"""

import asyncio
import functools
import logging
import resource
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import uvicorn
import zstandard
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_tiedlora.base.installation import __version__
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.service.bodies import read_name
from megatron_tiedlora.service.endpoints import Endpoints, Reply, status_of
from megatron_tiedlora.service.operations import Failure, PassResult, SampleResult, ServiceFacts, StepResult
from megatron_tiedlora.service.records import Answered, Unanswered
from megatron_tiedlora.service.tokens import TokenFile
from megatron_tiedlora.service.wire import pass_bytes, sample_bytes

if TYPE_CHECKING:
    from megatron_tiedlora.service.desk import Desk

logger = logging.getLogger(__name__)

_API = "/api/v1/"
_JSON, _PROTOBUF = "application/json", "application/x-protobuf"
_BODY_SECONDS = 300.0  # a body that takes longer is not read to its end
_POLLS_AT_ONCE = 1024  # of one owner
_BODIES_AT_ONCE = 2  # of one owner: a hostile body and its messages take 25 times its size in memory
_LARGEST_WINDOW = 2**24  # bytes that decompression may look back

_LOCAL = ("127.0.0.1", "::1", "localhost")
_MOST_FILES = 2**15
_IDLE_SECONDS = 75  # clients keep connections for a minute; a shorter time here would end them in the client's face
_STOP_SECONDS = 3  # for requests in progress; long polls are cut, and clients poll again

_Handler = Callable[[Request], Awaitable[Response]]


def take_port(host: str, port: int) -> socket.socket:
    """Return a socket for `serving`. With port 0 the system chooses one. Clients that connect wait until it serves.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port}: cannot be used ({reason}). Give another one, or end the process that uses it"
        ) from None
    # Connections inherit it. asyncio sets it only for sockets of its own, and without it each answer waits for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if host not in _LOCAL:
        logger.warning(
            "--host %s: the connection is not encrypted, so keys can be read on the network. Use 127.0.0.1 with"
            " `ssh -L`, or a proxy with TLS",
            host,
        )
    return listener


@contextmanager
def serving(app: Starlette, listener: socket.socket) -> Iterator[str]:
    """Serve `app` in a thread until the end of the block, and yield its URL. The socket is closed then."""
    server = uvicorn.Server(uvicorn.Config(
        app, http=_Connection, ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False,
        proxy_headers=False, server_header=False, limit_concurrency=_allowed_files() // 2,
        timeout_keep_alive=_IDLE_SECONDS, timeout_graceful_shutdown=_STOP_SECONDS,
    ))  # fmt: skip
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise UserError("the HTTP server did not start")
        found, bound, *_ = listener.getsockname()
        yield f"http://{f'[{found}]' if ':' in found else found}:{bound}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class _Connection(H11Protocol):
    """A connection that is closed when no complete request has come for some time, whatever else has come."""

    def connection_made(self, transport: Any) -> None:
        """See the base class."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_IDLE_SECONDS, self._check, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See the base class."""
        self._timer.cancel()  # it would keep this in memory
        super().connection_lost(exc)

    def _check(self, seen: Any) -> None:
        """Close the connection if the last request is the one that was `seen` last time, and has its response."""
        rests = self.cycle is None or self.cycle.response_complete
        if rests and self.cycle is seen:
            self.transport.close()
        else:
            self._timer = self.loop.call_later(_IDLE_SECONDS, self._check, self.cycle if rests else self)


def _allowed_files() -> int:
    """Return how many files and connections this process may have open, after raising its soft limit. A client has a
    connection for each result that it waits for, and must leave files for the rest of the service."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def make_app(desk: "Desk", tokens: TokenFile, facts: ServiceFacts) -> Starlette:
    """Return the application. It answers requests for `desk`, of the owners that `tokens` knows."""
    service, points = _Service(desk, tokens, facts), Endpoints(desk, facts)
    checkpoints = "training_runs/{model_id}/checkpoints"
    posts: dict[str, Callable[[str, bytes], Reply]] = {
        "client/config": points.client_config,
        "client/dynamic_config": lambda owner, raw: {},
        "telemetry": lambda owner, raw: {"status": "accepted"},  # it is dropped, as it can contain the client's key
        "create_session": points.create_session,
        "session_heartbeat": points.heartbeat,
        "create_model": points.create_model,
        "get_info": points.get_info,
        "optim_step": points.optim_step,
        "save_weights": functools.partial(points.save, kind="weights"),
        "save_weights_for_sampler": functools.partial(points.save, kind="sampler_weights"),
        "load_weights": points.load_weights,
        "create_sampling_session": points.create_sampler,
        "asample": points.sample,
        "weights_info": points.weights_info,
    }
    gets: dict[str, Callable[..., Reply]] = {
        "get_server_capabilities": points.capabilities,
        "samplers/{sampler_id}": points.sampler,
        "training_runs/{model_id}": points.training_run,
        checkpoints: points.checkpoints,
        "checkpoints": points.checkpoints,
    }
    handlers = [
        *(("POST", _API + path, service.answered(answer, kind=_JSON)) for path, answer in posts.items()),
        *(("GET", _API + path, service.answered(answer)) for path, answer in gets.items()),
        ("POST", _API + "forward_backward", service.answered(points.forward_backward, kind=_PROTOBUF)),
        ("POST", _API + "retrieve_future", service.retrieve_future),
        ("POST", _API + "sessions/{session_id}/finish", service.answered(points.finish_session)),
        ("DELETE", f"{_API}{checkpoints}/{{checkpoint_id:path}}", service.answered(points.delete_checkpoint)),
        ("GET", _API + "healthz", service.health),
        ("GET", "/metrics", service.metrics),
        ("GET", "/status", service.status),
    ]
    routes = [Route(path, _told(handler, path), methods=[method]) for method, path, handler in handlers]
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})


class _Service:
    """The handlers of requests, and what they share."""

    def __init__(self, desk: "Desk", tokens: TokenFile, facts: ServiceFacts) -> None:
        self._desk, self._tokens, self._facts = desk, tokens, facts
        self._started = time.time()
        # By owner, so at most as many as there are tokens.
        self._reading, self._polls = dict[str, asyncio.Semaphore](), Counter[str]()

    def answered(self, answer: Callable[..., Reply], *, kind: str = "") -> _Handler:
        """Return the handler of an endpoint that takes the names in its path, and a body of the content type `kind`."""

        async def handle(request: Request) -> Response:
            owner = self._owner(request)
            if not kind:
                return JSONResponse(await run_in_threadpool(answer, owner, **request.path_params))
            async with self._reading.setdefault(owner, asyncio.Semaphore(_BODIES_AT_ONCE)):
                return JSONResponse(await run_in_threadpool(answer, owner, await self._body(request, kind)))

        return handle

    def _owner(self, request: Request) -> str:
        owner = self._tokens.owner_of(request.headers.get("x-api-key", ""))
        if owner is None:
            raise HTTPException(401, "the key in X-API-Key is missing or unknown; use a token of this server's file")
        return owner

    async def _body(self, request: Request, kind: str) -> bytes:
        """Return the body of a request, decompressed. Its size is checked before and after, and while it is read."""
        most = self._facts.max_json if kind == _JSON else self._facts.max_body
        found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if found != kind:
            raise HTTPException(415, f"the content type {shown(found)} is not supported here; send {kind}")
        coding = request.headers.get("content-encoding", "identity").lower()
        if coding not in ("identity", "zstd"):
            raise HTTPException(415, f"the content encoding {shown(coding)} is not supported; send zstd or none")
        raw = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    raw += part
                    _check_size(len(raw), most)
        except TimeoutError:
            raise HTTPException(408, f"the body was not sent within {_BODY_SECONDS:.0f} s") from None
        return bytes(raw) if coding == "identity" else await run_in_threadpool(_decompressed, bytes(raw), most)

    async def retrieve_future(self, request: Request) -> Response:
        """Answered with the result of an operation, or after some time with 408, on which the client asks again."""
        owner = self._owner(request)
        future = read_name(await self._body(request, _JSON), "request_id")
        found = await run_in_threadpool(self._desk.answer_of, owner, future)
        if isinstance(found, Unanswered):
            if self._polls[owner] >= _POLLS_AT_ONCE:
                raise HTTPException(429, f"{_POLLS_AT_ONCE:,} requests for results wait already; ask again later")
            self._polls[owner] += 1
            try:
                await self._wait(request, future)
            finally:
                self._polls[owner] -= 1
            found = await run_in_threadpool(self._desk.answer_of, owner, future)
        if isinstance(found, Unanswered):
            again = {"type": "try_again", "request_id": future, "queue_state": found.reason}
            return JSONResponse(again, 408)  # as a 200 it would be a warning for the user
        response = await run_in_threadpool(_response, found)
        response.background = BackgroundTask(self._desk.taken, owner, future)
        return response

    async def _wait(self, request: Request, future: str) -> None:
        """Wait until an operation has a result, the client has left, or some time has passed."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the server has stopped, and its loop is closed
                loop.call_soon_threadsafe(done.set)

        async def leave() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._facts.poll_seconds):
                    while (await request.receive())["type"] != "http.disconnect":
                        pass
            await run_in_threadpool(self._desk.forget_call, future, wake)
            done.set()

        await run_in_threadpool(self._desk.when_done, future, wake)
        leaving = asyncio.create_task(leave())
        try:
            await done.wait()
        finally:
            leaving.cancel()

    async def health(self, request: Request) -> Response:
        """Answered that the server lives. This needs no key."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Answered with the desk's numbers in the text format of Prometheus."""
        lines = []
        for name, value in sorted((await self._numbers(request)).items()):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines.append(f"# TYPE tiedlora_{name} {kind}\ntiedlora_{name} {value:.17g}\n")
        return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")

    async def status(self, request: Request) -> Response:
        """Answered with what this server is, and the desk's numbers."""
        numbers = await self._numbers(request)
        about = {"version": __version__, "model": self._facts.model_name, "seconds": round(time.time() - self._started)}
        return JSONResponse({**about, "numbers": numbers})

    async def _numbers(self, request: Request) -> dict[str, float]:
        self._owner(request)
        return dict(await run_in_threadpool(self._desk.numbers))


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise HTTPException(413, f"the body is larger than {most:,} bytes; send fewer data in one request")


def _decompressed(raw: bytes, most: int) -> bytes:
    """Return a body that is one zstd frame, decompressed. At most `most` bytes, and one more, are ever made of it."""
    try:
        with zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).stream_reader(raw) as stream:
            body = stream.read(most + 1)
    except zstandard.ZstdError:
        raise HTTPException(400, "the body is not valid zstd") from None
    _check_size(len(body), most)
    return bytes(body)


def _response(found: Answered) -> Response:
    """Return the answer to a client with the result of its operation."""
    result = found.result
    if isinstance(result, Failure):
        return JSONResponse({"error": result.message, "category": "user" if result.by_user else "server"})
    if isinstance(result, PassResult):
        return Response(pass_bytes(result), media_type=_PROTOBUF)
    if isinstance(result, SampleResult):
        return Response(sample_bytes(result), media_type=_PROTOBUF)
    if isinstance(result, StepResult):
        return JSONResponse({"metrics": {"optimizer_step": result.step, "grad_norm": result.grad_norm}})
    return JSONResponse(dict(found.extra))


# Errors ---------------------------------------------------------------------------------------------------------------


def _told(handler: _Handler, path: str) -> _Handler:
    """Return a handler that answers errors with one sentence, and logs where an unexpected one was raised."""

    @functools.wraps(handler)
    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException as error:
            return JSONResponse({"error": error.detail}, error.status_code)
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_of(error))
        except ClientDisconnect:
            return Response(status_code=400)
        except asyncio.CancelledError:  # by the server's stop; clients send the request again
            return JSONResponse({"error": "the server stops"}, 503)
        except Exception as error:  # its message may quote the request, so only its place is logged
            frame, kind = traceback.extract_tb(error.__traceback__)[-1], type(error).__name__
            logger.error("%s: %s at %s:%s", path, kind, frame.filename, frame.lineno)
            return JSONResponse({"error": f"internal error of the server ({kind}); its log says where"}, 500)

    return handle


def _no_route(request: Request, error: Any) -> Response:
    """Answered a request for which there is no endpoint."""
    said = f"{request.method} {shown(request.url.path)}: this server has no such endpoint"
    return JSONResponse({"error": said}, error.status_code)
