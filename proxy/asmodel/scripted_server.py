"""A server of OpenAI's routes on a loopback port that says what it is told: on time, late, wrongly or not at all."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import orjson

from asmodel.toy_model import Generation, Scores, ToyModel, chunks_of, embeddings

if TYPE_CHECKING:
    import uvicorn


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong. The fields combine: `Fault(after=3, reset=True, answer="a b c d e")`.

    `Fault(status=429, headers={"retry-after": "2"})` is an error reply, `Fault(delay=0.5, answer="late")` a right
    one that is late, `Fault(reset=True)` a connection that is reset, `Fault(error={...})` an error inside a 200.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    message: str = "a scripted fault"
    code: str | None = None
    type: str = "scripted_fault"
    """`message`, `code` and `type` of the error envelope, which is the body of any status but 200."""
    body: bytes | str | None = None
    """Sent as it is, in place of any other body."""
    content_type: str | None = None
    delay: float = 0.0
    """Seconds before anything is sent."""
    answer: str | Mapping[str, Any] | None = None
    """What is said as far as it gets; None is the server's default answer."""
    after: int | None = None
    """After so many chunks of a stream it goes wrong: by `reset`, by `error`, or else by ending without a finish."""
    reset: bool = False
    """The connection is reset: before anything is sent or, with `after`, in the middle (a body that is no stream
    is cut in half)."""
    error: Mapping[str, Any] | None = None
    """An error object inside a 200; with `after`, in the middle of a stream."""


ServerAnswer: TypeAlias = "str | Mapping[str, Any] | Fault | None"
"""Text; a message (`content`, `tool_calls`, `reasoning_content`, `refusal`, ... and `finish_reason`) or, if it has
`choices`, a whole body; what goes wrong; or None for the default answer."""

Answering: TypeAlias = "Callable[[dict[str, Any]], ServerAnswer | Awaitable[ServerAnswer]]"


@dataclass(slots=True, kw_only=True)
class Received:
    """One request that the server has had. Times are of `time.monotonic()`, in seconds."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: dict[str, Any]
    """The JSON object that was sent; empty where none was."""
    connection: tuple[str, int]
    """The client's address and port: equal for two requests over one connection."""
    at: float
    answered_at: float | None = None
    """When the last byte of the answer was handed over."""
    left_at: float | None = None
    """When the client was seen to go before it had its answer."""
    chunks: int = 0
    """Chunks of a stream that were sent."""


class ScriptedServer:
    """An OpenAI-compatible server on 127.0.0.1 that says what it is told to say, in a thread of this process.

    `answer` is asked with the body of each chat and completion, or is a sequence of answers that are given in
    order, the last one for ever. Without it a chat is answered by a digest of its messages, and a completion by a
    toy language model, which scores given text as well (see `Scores`), so that its echo agrees with what it
    generated. `faults` is asked first, with every request on every route, and may answer None.

    `delay` is seconds before the first byte, `token_delay` seconds between two chunks of a stream. `usage=False`
    reports none. `keep` is how many requests are remembered.

        with ScriptedServer(lambda body: body["messages"][-1]["content"].upper()) as server:
            ... server.base_url ... server.requests ...
    """

    def __init__(
        self,
        answer: Answering | Sequence[ServerAnswer] | None = None,
        *,
        faults: Callable[[Received], Fault | None] | None = None,
        scores: Scores = "echo",
        delay: float = 0.0,
        token_delay: float = 0.0,
        usage: bool = True,
        models: Sequence[str] = ("scripted",),
        keep: int = 10_000,
        port: int = 0,
    ) -> None:
        self.delay = delay
        self.token_delay = token_delay
        self.in_flight = 0
        self.max_in_flight = 0
        self._answer = answer if callable(answer) or answer is None else _in_order(answer)
        self._faults = faults
        self._scores: Scores = scores
        self._usage = usage
        self._models = tuple(models)
        self._requests: deque[Received] = deque(maxlen=keep)
        self._lock = threading.Lock()
        self._transports: dict[tuple[str, int], asyncio.BaseTransport] = {}
        self._toy = ToyModel()
        self._wanted_port = port
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()

    # -- life

    def start(self) -> ScriptedServer:
        """Listen, and return once requests are answered."""
        server = self._listen()
        bound = self._socket
        assert bound is not None
        self._thread = threading.Thread(target=self._run, args=(server, bound), name="scripted-server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise RuntimeError("the scripted server did not start")
            time.sleep(0.002)
        return self

    def stop(self) -> None:
        """Stop at once, whatever is being answered."""
        if self._server is not None:
            self._server.should_exit = True
        if self._loop is not None:
            # The loop may have ended by itself, with the thread.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._leave.set)
        if self._thread is not None:
            self._thread.join(10)
        if self._socket is not None:
            self._socket.close()
        self._server = self._thread = self._socket = self._loop = None

    def serve(self, *, announce: Callable[[str], None] = print) -> None:
        """Listen and answer in this thread until the process is told to stop; `announce` gets the address."""
        server = self._listen()
        bound = self._socket
        assert bound is not None
        announce(self.base_url)
        self._run(server, bound)

    def __enter__(self) -> ScriptedServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _listen(self) -> uvicorn.Server:
        import uvicorn

        if self._server is not None:
            raise RuntimeError("the scripted server runs already")
        # asyncio switches Nagle's algorithm off only for sockets that say that they are TCP; with it on, every answer
        # that is written in two parts waits 40 ms for the client's delayed acknowledgement.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self._wanted_port))
        self._socket.listen(1024)
        self._leave = asyncio.Event()
        self._server = _server(
            self._leave,
            uvicorn.Config(
                self._app,
                http=_protocol(self._transports),
                ws="none",
                loop="asyncio",
                interface="asgi3",
                lifespan="off",
                proxy_headers=False,
                log_config=None,
                access_log=False,
                timeout_keep_alive=60,
            ),
        )
        return self._server

    def _run(self, server: uvicorn.Server, bound: socket.socket) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await server.serve(sockets=[bound])
            for transport in list(self._transports.values()):
                cast("asyncio.Transport", transport).abort()
            await asyncio.sleep(0)

        asyncio.run(main())

    # -- what a test reads

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`, without the path of the routes."""
        if self._socket is None:
            raise RuntimeError("the scripted server does not run; use it in a `with`, or call start()")
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    @property
    def base_url(self) -> str:
        return f"{self.address}/v1"

    @property
    def requests(self) -> list[Received]:
        """What was asked so far, in order; the same objects as long as they are answered."""
        with self._lock:
            return list(self._requests)

    def clear(self) -> None:
        """Forget the requests and the highest number in flight."""
        with self._lock:
            self._requests.clear()
        self.max_in_flight = self.in_flight

    # -- one request

    async def _app(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        data = bytearray()
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            data += event.get("body", b"")
            if not event.get("more_body"):
                break
        try:
            parsed: Any = orjson.loads(bytes(data)) if data else {}
        except orjson.JSONDecodeError:
            parsed = None
        received = Received(
            method=scope["method"],
            path=scope["path"],
            headers={name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]},
            body=cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {},
            connection=tuple(scope["client"]),
            at=time.monotonic(),
        )
        with self._lock:
            self._requests.append(received)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        answering = asyncio.ensure_future(self._respond(received, readable=parsed is not None, send=send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                received.left_at = time.monotonic()
            else:
                answering.result()
        finally:
            self.in_flight -= 1
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _respond(self, received: Received, *, readable: bool, send: _Send) -> None:
        out = _Out(send, received, self._transports.get(received.connection))
        fault = self._faults(received) if self._faults else None
        route = f"{received.method} {received.path}"
        body = received.body
        streamed = body.get("stream") is True
        if not readable:
            fault = Fault(status=400, message="the body is not JSON", type="invalid_request_error")
        whole: dict[str, Any] | None = None
        if fault is None or (fault.status == 200 and fault.body is None):
            match route:
                case "POST /v1/chat/completions" | "POST /v1/completions":
                    generating = Generation(
                        self._toy, self._scores, chat=route.endswith("chat/completions"), body=body, usage=self._usage
                    )
                    if not generating.scoring and fault is None and self._answer is not None:
                        try:
                            answer = self._answer(body)
                            if inspect.isawaitable(answer):
                                answer = await answer
                        except Exception as error:
                            # The script is the test's own code: its failure must reach whoever reads the client's.
                            answer = Fault(status=500, message=f"the script raised {error!r}", type="script_error")
                        fault = answer if isinstance(answer, Fault) else None
                        said = answer.answer if isinstance(answer, Fault) else answer
                    else:
                        said = fault.answer if fault is not None else None
                    whole = generating.body_of(said)
                    if generating.forces_parts:
                        fault = Fault(status=500, message="got exception: Unexpected empty grammar stack")
                case "POST /v1/embeddings":
                    whole = embeddings(self._toy, body)
                case "GET /v1/models":
                    models = [{"id": m, "object": "model", "created": 0, "owned_by": "scripted"} for m in self._models]
                    whole = {"object": "list", "data": models}
                    streamed = False
                case "POST /tokenize" if self._scores == "grammar":
                    whole = {"tokens": self._toy.pieces(str(body.get("content", "")))}
                    if not body.get("with_pieces"):
                        whole["tokens"] = [piece["id"] for piece in whole["tokens"]]
                    streamed = False
                case _:
                    fault = Fault(status=404, message=f"no route {route}", type="invalid_request_error")
        wait = fault.delay if fault is not None and fault.delay else self.delay
        if wait:
            await asyncio.sleep(wait)
        if fault is not None and await self._fail(out, fault):
            return
        assert whole is not None
        if streamed and "choices" in whole:
            options = cast("dict[str, Any]", body.get("stream_options") or {})
            include = bool(options.get("include_usage")) and self._usage
            await self._stream(out, whole, include_usage=include, fault=fault)
        elif fault is not None and fault.reset:
            await out.half(orjson.dumps(whole))
        else:
            await out.whole(200, orjson.dumps(whole))

    async def _fail(self, out: _Out, fault: Fault) -> bool:
        """Send what is wrong from the start; False where the answer begins well."""
        content_type = fault.content_type or "application/json"
        if fault.after is not None:
            return False
        if fault.reset:
            out.reset()
        elif fault.body is not None:
            data = fault.body.encode() if isinstance(fault.body, str) else fault.body
            await out.whole(fault.status, data, content_type, fault.headers)
        elif fault.error is not None:
            await out.whole(fault.status, orjson.dumps({"error": fault.error}), content_type, fault.headers)
        elif fault.status != 200:
            error = {"message": fault.message, "type": fault.type, "param": None, "code": fault.code}
            await out.whole(fault.status, orjson.dumps({"error": error}), content_type, fault.headers)
        else:
            return False
        return True

    async def _stream(self, out: _Out, whole: dict[str, Any], *, include_usage: bool, fault: Fault | None) -> None:
        after = fault.after if fault is not None else None
        await out.begin_stream(fault.headers if fault is not None else {}, fault.content_type if fault else None)
        for count, chunk in enumerate(chunks_of(whole, include_usage=include_usage)):
            if after is not None and count >= after:
                break
            if count and self.token_delay:
                await asyncio.sleep(self.token_delay)
            await out.event(chunk)
        if after is None:
            await out.done()
        elif fault is not None and fault.reset:
            out.reset()
        elif fault is not None and fault.error is not None:
            await out.event({"error": fault.error})
            await out.end()
        else:
            await out.end()


_Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def _left(receive: _Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _in_order(answers: Sequence[ServerAnswer]) -> Answering:
    if not answers or isinstance(answers, (str, bytes)):
        raise ValueError("a script is a function, or a sequence of one answer at least")
    rest = iter(answers)

    def answer(_: dict[str, Any]) -> ServerAnswer:
        return next(rest, answers[-1])

    return answer


def _protocol(transports: dict[tuple[str, int], asyncio.BaseTransport]) -> type[asyncio.Protocol]:
    """uvicorn's own protocol that notes the transport of each connection, which ASGI hides and a reset needs."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Noting(AutoHTTPProtocol):  # type: ignore[misc, valid-type, unused-ignore]  # a class chosen at run time
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._noted = tuple(transport.get_extra_info("peername")[:2])
            transports[self._noted] = transport
            super().connection_made(transport)  # type: ignore[arg-type, unused-ignore]  # uvicorn narrows it

        def connection_lost(self, exc: Exception | None) -> None:
            transports.pop(self._noted, None)
            super().connection_lost(exc)

    return Noting


def _server(leave: asyncio.Event, config: uvicorn.Config) -> uvicorn.Server:
    """uvicorn's own server that stops when `leave` is set, in place of at its next tick, and waits for nobody."""
    import uvicorn

    class Leaving(uvicorn.Server):
        async def main_loop(self) -> None:
            ticks = 0
            while not await self.on_tick(ticks):
                ticks += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await leave.wait()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()

    return Leaving(config)


class _Out:
    """What is sent on one connection, and the count of it."""

    def __init__(self, send: _Send, received: Received, transport: asyncio.BaseTransport | None) -> None:
        self._send = send
        self._received = received
        self._transport = transport

    async def _start(self, status: int, content_type: str, headers: Mapping[str, str], length: int | None) -> None:
        lines = {"content-type": content_type, **{name.lower(): value for name, value in headers.items()}}
        if length is not None:
            lines["content-length"] = str(length)
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _body(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        if not more:
            self._received.answered_at = time.monotonic()

    async def whole(
        self,
        status: int,
        data: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        await self._start(status, content_type, headers or {}, len(data))
        await self._body(data, more=False)

    async def half(self, data: bytes) -> None:
        """Half of what was promised, then a reset."""
        await self._start(200, "application/json", {}, len(data))
        await self._body(data[: len(data) // 2], more=True)
        await asyncio.sleep(0.01)
        self.reset()

    async def begin_stream(self, headers: Mapping[str, str], content_type: str | None) -> None:
        await self._start(
            200, content_type or "text/event-stream; charset=utf-8", {"cache-control": "no-cache", **headers}, None
        )

    async def event(self, chunk: Mapping[str, Any]) -> None:
        await self._body(b"data: " + orjson.dumps(chunk) + b"\n\n", more=True)
        self._received.chunks += 1

    async def done(self) -> None:
        await self._body(b"data: [DONE]\n\n", more=True)
        await self._body(b"", more=False)

    async def end(self) -> None:
        await self._body(b"", more=False)

    def reset(self) -> None:
        """Close with a TCP reset in place of an orderly end."""
        if self._transport is None:
            return
        bound = self._transport.get_extra_info("socket")
        with suppress(OSError):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        cast("asyncio.Transport", self._transport).abort()
        self._received.answered_at = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m asmodel.testing`: the scripted server as a process of its own, until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m asmodel.testing", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before the first byte of each answer")
    parser.add_argument("--token-delay", type=float, default=0.0, help="seconds between two chunks of a stream")
    parser.add_argument(
        "--scores", default="echo", choices=["echo", "grammar", "prompt_logprobs", "ignored", "shifted"]
    )
    options = parser.parse_args(arguments)
    server = ScriptedServer(
        port=options.port, delay=options.delay, token_delay=options.token_delay, scores=options.scores, keep=100
    )
    server.serve(announce=lambda address: print(address, flush=True))
