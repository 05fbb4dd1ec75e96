"""What a test needs where the program needs a model: an upstream made of a function, and a scripted server over HTTP.

`FunctionUpstream` answers calls in the process; `ScriptedServer` answers OpenAI's routes on a loopback port, on time,
late, wrongly or not at all, and remembers who asked what. Both give equal answers to equal requests. The server also
runs by itself: `python -m asmodel.testing --port 0` prints its address as its first line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import inspect
import math
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import orjson

from asmodel.budget import Limits
from asmodel.calls import (
    Call,
    Capabilities,
    Delta,
    Embed,
    Message,
    Reply,
    Score,
    Terms,
    TokenLogprob,
    ToolCallDelta,
    pieces,
)
from asmodel.conformance import check_cache as check_cache
from asmodel.dialect import estimated_usage
from asmodel.replaying import replayed as replayed

if TYPE_CHECKING:
    import uvicorn
    from pydantic import BaseModel

    from asmodel.calls import JSON, CachePolicy, Document, Emit
    from asmodel.programs import Answer, Program
    from asmodel.protocols import Cache, Upstream
    from asmodel.tools import Tool

# --- an upstream made of a function ---------------------------------------------------------------------------------

FunctionAnswer: TypeAlias = str | Reply | float | tuple[float, int] | Exception
"""Text; a whole reply; for a `Score` the nats, or the nats and over how many tokens; an error, which is raised."""

Function: TypeAlias = (
    Callable[[Call], FunctionAnswer | Awaitable[FunctionAnswer]]
    | Callable[[Call, Terms], FunctionAnswer | Awaitable[FunctionAnswer]]
)


class FunctionUpstream:
    """An upstream that asks a function: `(call)` or `(call, terms)`, sync or async, returning a `FunctionAnswer`.

    A second parameter that has a default is left alone, so `lambda call, answers=iter("ab"): next(answers)` works.
    Text streams in a few deltas; usage is estimated where the function gives none. `calls` and `terms` list, in
    order, what was asked; a call that raised is among them.
    """

    def __init__(
        self,
        function: Function,
        *,
        name: str | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        self.name = name or getattr(function, "__name__", type(function).__name__).strip("<>")
        self.calls: list[Call] = []
        self.terms: list[Terms] = []
        self._function: Callable[..., FunctionAnswer | Awaitable[FunctionAnswer]] = function
        self._wants_terms = _takes_two(function)
        self._capabilities = capabilities or Capabilities(
            completion=True, schema=True, tools=True, loglikelihood=True, embeddings=True
        )

    @property
    def identity(self) -> str:
        return f"function:{self.name}"

    async def capabilities(self) -> Capabilities:
        return self._capabilities

    async def send(self, call: Call, terms: Terms) -> Reply:
        self.calls.append(call)
        self.terms.append(terms)
        started = time.perf_counter()
        answer = self._function(call, terms) if self._wants_terms else self._function(call)
        if inspect.isawaitable(answer):
            answer = await answer
        reply = _as_reply(call, answer)
        if not reply.usage.total_tokens:
            reply = replace(reply, usage=estimated_usage(call, reply))
        reply = replace(
            reply,
            model=reply.model or self.name,
            upstream=reply.upstream or self.name,
            bought_at=reply.bought_at or time.time(),
            seconds=reply.seconds or time.perf_counter() - started,
        )
        if terms.emit is not None and not isinstance(call, (Score, Embed)):
            for delta in _deltas(reply):
                await terms.emit(delta)
        return reply


def _takes_two(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(places) > 1 and places[1].default is inspect.Parameter.empty


def _as_reply(call: Call, answer: FunctionAnswer) -> Reply:
    if isinstance(answer, Exception):
        raise answer
    if isinstance(answer, Reply):
        return answer
    if isinstance(call, Score):
        if isinstance(answer, (int, float)):
            return Reply(logprobs=_spread(call.continuation, float(answer), max(1, len(call.continuation.split()))))
        if isinstance(answer, tuple):
            total, tokens = answer
            return Reply(logprobs=_spread(call.continuation, float(total), tokens))
    elif isinstance(answer, str) and not isinstance(call, Embed):
        return Reply(text=answer)
    wanted = {"score": "nats, (nats, tokens)", "embed": "embeddings in"}.get(call.kind, "text")
    raise TypeError(f"a call of kind {call.kind} is answered with {wanted} or a Reply, not {type(answer).__name__}")


def _spread(text: str, total: float, tokens: int) -> tuple[TokenLogprob, ...]:
    """`tokens` entries over the text whose log-probabilities add up to exactly `total`."""
    if tokens < 1:
        raise ValueError("a score is over one token at least")
    share = total / tokens
    values = [share] * (tokens - 1)
    values.append(math.fsum([total, *(-v for v in values)]))
    size = math.ceil(len(text) / tokens)
    return tuple(TokenLogprob(text[i * size : (i + 1) * size], value) for i, value in enumerate(values))


def _deltas(reply: Reply, most: int = 4) -> Iterable[Delta]:
    for piece in _pieces(reply.reasoning, most):
        yield Delta(reasoning=piece)
    for piece in _pieces(reply.text, most):
        yield Delta(text=piece)
    for index, c in enumerate(reply.tool_calls):
        yield Delta(tool_calls=(ToolCallDelta(index, c.id, c.name, c.arguments),))


def _pieces(text: str, most: int) -> list[str]:
    size = math.ceil(len(text) / most)
    return [text[i : i + size] for i in range(0, len(text), size)] if text else []


# --- a scripted server ----------------------------------------------------------------------------------------------

Scores: TypeAlias = Literal["echo", "grammar", "prompt_logprobs", "ignored", "shifted"]
"""How the server gives the log-likelihood of a given text: `echo` with `logprobs` on completions; `/tokenize` and a
grammar of token literals, as llama.cpp; `prompt_logprobs`, as vLLM; not at all, while taking every parameter
(`ignored`); or by echo with each token scored one place too late (`shifted`)."""


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
                    generating = _Generating(
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
                    whole = _embeddings(self._toy, body)
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
        for count, chunk in enumerate(_chunks(whole, include_usage=include_usage)):
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


# --- what the server says -------------------------------------------------------------------------------------------


class ToyModel:
    """A language model with no weights: the same words after the same words, always, and their log-probabilities.

    A token is a word with the space before it, or one other character. The likeliest next token follows from the last
    three; a word that the text already holds is likelier than one that it does not, so that a question scores higher
    after the paragraph that answers it.
    """

    words = tuple(
        re.findall(
            r"\w+",
            "amber basil cedar delta ember fable grove harbor island jasmine kettle lantern meadow nectar orchard"
            " pebble quartz river saffron timber umber valley willow yarrow zephyr the of and in is to a",
        )
    )

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._lock = threading.Lock()

    @staticmethod
    def tokens(text: str) -> list[str]:
        """The text in tokens; joined, they are the text again."""
        return re.findall(r" ?\w+|\s|[^\w\s]", text)

    def id_of(self, token: str) -> int:
        with self._lock:
            if token not in self._ids:
                self._ids[token] = len(self._texts)
                self._texts.append(token)
            return self._ids[token]

    def text_of(self, number: int) -> str:
        return self._texts[number] if 0 <= number < len(self._texts) else f" token{number}"

    def pieces(self, text: str) -> list[dict[str, Any]]:
        """The tokens by number, as llama.cpp gives them; a character beyond U+FFFF is two, each a part of it."""
        out: list[dict[str, Any]] = []
        for token in self.tokens(text):
            data = token.encode()
            if len(data) == 4 and len(token) == 1:
                for part, piece in enumerate((data[:2], data[2:])):
                    out.append({"id": self.id_of(f"{token}#{part}"), "piece": list(piece)})
            else:
                out.append({"id": self.id_of(token), "piece": token})
        return out

    def is_part(self, number: int) -> bool:
        return "#" in self.text_of(number)[1:]

    def everything(self, before: Sequence[str]) -> list[dict[str, Any]]:
        """Every token that was ever numbered, with its log-probability after `before`."""
        texts = list(enumerate(self._texts))
        return [{"id": number, "token": text, "logprob": self.logprob(before, text)} for number, text in texts]

    def likeliest(self, before: Sequence[str]) -> str:
        return f" {self.words[self._dice('next', *before[-3:]) % len(self.words)]}"

    def logprob(self, before: Sequence[str], token: str) -> float:
        """log p(token | before), in nats: at most -0.1 for the likeliest, -1 and less for any other."""
        spread = (self._dice("spread", *before[-3:], token) % 1000) / 1000
        if token == self.likeliest(before):
            return -0.1 - 0.8 * spread
        word = token.strip().casefold()
        known = any(word == other.strip().casefold() for other in before)
        return (-1.0 if known else -6.0) - 2.0 * spread

    def generate(self, prompt: str, count: int) -> list[tuple[str, float]]:
        before = self.tokens(prompt)
        out: list[tuple[str, float]] = []
        for _ in range(count):
            token = self.likeliest(before)
            out.append((token, self.logprob(before, token)))
            before.append(token)
        return out

    def score(self, tokens: Sequence[str], before: Sequence[str] = ()) -> list[float]:
        """The log-probability of each token after `before` and the tokens in front of it."""
        context = list(before)
        out: list[float] = []
        for token in tokens:
            out.append(self.logprob(context, token))
            context.append(token)
        return out

    @staticmethod
    def _dice(*parts: str) -> int:
        return int.from_bytes(hashlib.sha256("\x00".join(parts).encode()).digest()[:4], "big")


class _Generating:
    """One chat or completion: the body of its answer."""

    def __init__(self, toy: ToyModel, scores: Scores, *, chat: bool, body: dict[str, Any], usage: bool) -> None:
        self._toy = toy
        self._scores: Scores = scores
        self._chat = chat
        self._body = body
        self._usage = usage
        self._prompt = _prompt_text(body)

    @property
    def scoring(self) -> bool:
        """Whether it measures given text, by a parameter that this server obeys; no script is asked about that."""
        if self._chat:
            return False
        match self._scores:
            case "echo" | "shifted":
                return bool(self._body.get("echo"))
            case "grammar":
                return bool(self._body.get("grammar"))
            case "prompt_logprobs":
                return self._body.get("prompt_logprobs") is not None
            case _:
                return False

    @property
    def forces_parts(self) -> bool:
        """Whether its grammar wants a part of a character, which llama.cpp's server fails on."""
        numbers = re.findall(r"<\[(\d+)\]>", str(self._body.get("grammar") or ""))
        return self._scores == "grammar" and any(self._toy.is_part(int(number)) for number in numbers)

    def body_of(self, answer: str | Mapping[str, Any] | None) -> dict[str, Any]:
        if isinstance(answer, Mapping) and "choices" in answer:
            return dict(answer)
        if self._chat:
            return self._chat_body(answer)
        given: Any = self._body.get("prompt")
        prompts = _prompts(given)
        n = int(self._body.get("n") or 1)
        if prompts == [given] and n == 1:
            return self._completion_body(answer)
        bodies = [
            _Generating(
                self._toy, self._scores, chat=False, body={**self._body, "prompt": prompt, "n": 1}, usage=self._usage
            ).body_of(answer)
            for prompt in prompts
            for _ in range(n)
        ]
        whole = dict(bodies[0])
        whole["choices"] = [{**body["choices"][0], "index": place} for place, body in enumerate(bodies)]
        if self._usage:
            counted = ("prompt_tokens", "completion_tokens", "total_tokens")
            whole["usage"] |= {name: sum(body["usage"][name] for body in bodies) for name in counted}
        return whole

    def _frame(self, choice: dict[str, Any], generated: int) -> dict[str, Any]:
        digest = hashlib.sha256(orjson.dumps(self._body, option=orjson.OPT_SORT_KEYS)).hexdigest()
        asked = len(self._toy.tokens(self._prompt))
        frame: dict[str, Any] = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{digest[:12]}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": 1_700_000_000,
            "model": self._body.get("model", "scripted"),
            "choices": [choice],
        }
        if self._usage:
            frame["usage"] = {
                "prompt_tokens": asked,
                "completion_tokens": generated,
                "total_tokens": asked + generated,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            }
        return frame

    def _chat_body(self, answer: str | Mapping[str, Any] | None) -> dict[str, Any]:
        if answer is None:
            answer = f"scripted {hashlib.sha256(self._prompt.encode()).hexdigest()[:12]}"
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        message |= {"content": answer} if isinstance(answer, str) else dict(answer)
        finish = message.pop("finish_reason", None) or ("tool_calls" if message.get("tool_calls") else "stop")
        tokens = self._toy.tokens(message["content"] or "")
        logprobs = None
        if self._body.get("logprobs"):
            before = self._toy.tokens(self._prompt)
            logprobs = {"content": self._entries(before, tokens), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
        return self._frame(choice, len(tokens))

    def _entries(self, before: Sequence[str], tokens: Sequence[str]) -> list[dict[str, Any]]:
        def entry(token: str, value: float) -> dict[str, Any]:
            number = self._toy.id_of(token)
            return {"id": number, "token": token, "bytes": list(token.encode()), "logprob": value}

        out: list[dict[str, Any]] = []
        context = list(before)
        for token, value in zip(tokens, self._toy.score(tokens, before), strict=True):
            first = self._toy.likeliest(context)
            top = [entry(first, self._toy.logprob(context, first))]
            if token != first:
                top.append(entry(token, value))
            out.append({**entry(token, value), "top_logprobs": top})
            context.append(token)
        return out

    def _completion_body(self, answer: str | Mapping[str, Any] | None) -> dict[str, Any]:
        body, toy = self._body, self._toy
        given = body.get("prompt")
        prompt: list[str] = []
        for part in cast("list[str | int]", given if isinstance(given, list) else [self._prompt]):
            prompt += [toy.text_of(part)] if isinstance(part, int) else toy.tokens(part)
        wanted = body.get("max_tokens")
        most = 16 if wanted is None else int(wanted)
        numbers = [int(n) for n in re.findall(r"<\[(\d+)\]>", str(body.get("grammar") or ""))]
        forced = [toy.text_of(number) for number in numbers]
        finish = "length"
        if self.scoring and self._scores == "grammar":
            tokens = forced[:most]
        elif isinstance(answer, Mapping):
            tokens, finish = toy.tokens(str(answer.get("content", ""))), str(answer.get("finish_reason", "stop"))
        elif answer is not None:
            tokens, finish = toy.tokens(answer), "stop"
        else:
            tokens = [token for token, _ in toy.generate(self._prompt, most)]
            stops: Any = body.get("stop") or []
            for stop in cast("list[str]", [stops] if isinstance(stops, str) else stops):
                text = "".join(tokens)
                if stop in text:
                    tokens, finish = toy.tokens(text[: text.index(stop)]), "stop"
        echoed = self.scoring and self._scores in ("echo", "shifted")
        text = "".join(tokens)
        choice: dict[str, Any] = {
            "index": 0,
            "text": self._prompt + text if echoed else text,
            "logprobs": None,
            "finish_reason": finish,
        }
        if body.get("logprobs") is not None or body.get("n_probs"):
            if self._scores == "grammar":
                entries = self._entries(prompt, tokens)
                if entries and int(body.get("n_probs") or 0) > 100:
                    entries[0]["top_logprobs"] = toy.everything(prompt)
                choice["logprobs"] = {"content": entries}
            else:
                choice["logprobs"] = self._legacy(prompt, tokens, echoed=echoed)
        if self.scoring and self._scores == "prompt_logprobs":
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt)
        return self._frame(choice, len(tokens))

    def _legacy(self, prompt: Sequence[str], tokens: Sequence[str], *, echoed: bool) -> dict[str, Any]:
        values: list[float | None] = [*self._toy.score(tokens, prompt)]
        shown = list(tokens)
        if echoed:
            before: list[float | None] = [*self._toy.score(prompt)]
            if self._scores == "shifted":
                before = [self._toy.logprob(prompt[: i + 1], token) for i, token in enumerate(prompt)]
            if before:
                before[0] = None
            values, shown = before + values, [*prompt, *tokens]
        offsets: list[int] = []
        at = 0 if echoed else len(self._prompt)
        for token in shown:
            offsets.append(at)
            at += len(token)
        top = [None if v is None else {t: v} for t, v in zip(shown, values, strict=True)]
        return {"tokens": shown, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _prompt_logprobs(self, prompt: Sequence[str]) -> list[dict[str, Any] | None]:
        out: list[dict[str, Any] | None] = []
        for i, (token, value) in enumerate(zip(prompt, self._toy.score(prompt), strict=True)):
            entry = {"logprob": value, "rank": 1, "decoded_token": token}
            out.append({str(self._toy.id_of(token)): entry} if i else None)
        return out


def _prompts(given: Any) -> list[Any]:
    """The prompts of a completion: one, of text or of tokens or, llama.cpp's way, of both; or a list of them."""
    parts: list[Any] = cast("list[object]", given) if isinstance(given, list) else []
    return parts if parts and not any(isinstance(part, int) for part in parts) else [given]


def _prompt_text(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return "".join(part for part in cast("list[object]", prompt) if isinstance(part, str))
    texts: list[str] = []
    for message in cast("list[dict[str, Any]]", body.get("messages") or []):
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [str(part.get("text", "")) for part in cast("list[dict[str, Any]]", content)]
    return "\n".join(texts)


def _embeddings(toy: ToyModel, body: Mapping[str, Any]) -> dict[str, Any]:
    given: Any = body.get("input")
    texts = [piece if isinstance(piece, str) else "".join(map(toy.text_of, piece)) for piece in pieces(given)]
    data: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        raw = [byte / 127.5 - 1 for byte in hashlib.sha256(text.encode()).digest()[:8]]
        length = math.sqrt(math.fsum(x * x for x in raw))
        vector: list[float] | str = [x / length for x in raw]
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    asked = sum(len(toy.tokens(text)) for text in texts)
    usage = {"prompt_tokens": asked, "total_tokens": asked}
    return {"object": "list", "data": data, "model": body.get("model", "scripted"), "usage": usage}


def _chunks(whole: Mapping[str, Any], *, include_usage: bool) -> Iterable[dict[str, Any]]:
    """The chunks of a stream that adds up to the body."""
    chat = whole.get("object", "chat.completion") == "chat.completion"
    frame: dict[str, Any] = {k: v for k, v in whole.items() if k not in ("choices", "usage")}
    if chat:
        frame["object"] = "chat.completion.chunk"
    if include_usage:
        frame["usage"] = None
    for choice in cast("list[dict[str, Any]]", whole["choices"]):
        place = {"index": choice.get("index", 0)}
        parts = _chat_parts(choice) if chat else _text_parts(choice)
        for part in parts:
            yield {**frame, "choices": [{**place, "finish_reason": None, **part}]}
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield {**frame, "choices": [{**place, **last, "finish_reason": choice.get("finish_reason", "stop")}]}
    if include_usage:
        yield {**frame, "choices": [], "usage": whole.get("usage")}


def _text_parts(choice: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    shape = cast("dict[str, list[Any]]", choice.get("logprobs") or {})
    for i, token in enumerate(ToyModel.tokens(choice.get("text") or "")):
        part = {name: values[i : i + 1] for name, values in shape.items() if i < len(values)}
        yield {"text": token, "logprobs": part or None}


def _chat_parts(choice: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    message = cast("dict[str, Any]", choice.get("message") or {})
    yield {"delta": {"role": "assistant", "content": ""}}
    for name in ("reasoning_content", "reasoning"):
        for piece in ToyModel.tokens(message.get(name) or ""):
            yield {"delta": {name: piece}}
    logprobs = cast("dict[str, Any]", choice.get("logprobs") or {})
    entries = cast("list[dict[str, Any]]", logprobs.get("content") or [])
    for i, piece in enumerate(ToyModel.tokens(message.get("content") or "")):
        part: dict[str, Any] = {"delta": {"content": piece}}
        if i < len(entries):
            part["logprobs"] = {"content": [entries[i]]}
        yield part
    if message.get("refusal"):
        yield {"delta": {"refusal": message["refusal"]}}
    for index, c in enumerate(cast("list[dict[str, Any]]", message.get("tool_calls") or [])):
        function = cast("dict[str, Any]", c.get("function") or {})
        head = {"name": function.get("name"), "arguments": ""}
        yield {"delta": {"tool_calls": [{"index": index, "id": c.get("id"), "type": "function", "function": head}]}}
        for piece in _pieces(str(function.get("arguments") or ""), 4):
            yield {"delta": {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}}


# --- a program, run as the server runs it ----------------------------------------------------------------------------


async def run_program(
    program: Program[Any, Any],
    question: str | Sequence[Message],
    *,
    upstream: Upstream | None = None,
    upstreams: Mapping[str, Upstream] | None = None,
    params: Mapping[str, JSON] | BaseModel | None = None,
    documents: Sequence[Document] = (),
    tools: Sequence[Tool[..., Any]] = (),
    cache: Cache | None = None,
    policy: CachePolicy | None = None,
    limits: Limits | None = None,
    roles: Mapping[str, str] | None = None,
    hints: Mapping[str, JSON] | None = None,
    shape: Mapping[str, JSON] | None = None,
    choice: int = 0,
    identity: str | None = None,
    emit: Emit | None = None,
) -> Answer:
    """Answer one question by a program, with all that is between a program and a model in the server.

    `upstream` plays every role that has no other player; `upstreams` are further ones by name, and a step's role may
    be the name of one; `tools` are those of the settings. With the same `cache` (open, if it has a life) and the same
    question, a second run is the first one resumed. `hints` are a client's sampling parameters, by OpenAI's names, and
    `shape` is what it asks of the answer (`tools`, `response_format`, …) where the program supports that; `choice`
    counts the choices of `n`; `identity` names the run, as an `Idempotency-Key` does: a program with effects wants one,
    and a cache.
    Raises what a client would be told: AsmodelError.
    """
    from asmodel.app import onion
    from asmodel.models import Models
    from asmodel.service import Asked, Service
    from asmodel.settings import UpstreamSettings

    given = dict(upstreams or {})
    if upstream is not None:
        given = {"default": upstream, **given}
    if not given:
        raise TypeError("run_program wants an upstream, such as upstream=FunctionUpstream(lambda call: 'yes')")
    wrapped = onion(given, {name: UpstreamSettings(kind="function") for name in given}, cache)
    models = Models([program], wrapped, tools={tool.name: tool for tool in tools}, store=cache)
    service = Service(models, store=cache, journals=cache)
    service.ready.set()
    asked = Asked(
        messages=(Message("user", question),) if isinstance(question, str) else tuple(question),
        documents=tuple(documents),
        hints=dict(hints or {}),
        shape=dict(shape or {}),
        params=dict(params or {}) if isinstance(params, Mapping | None) else params.model_dump(mode="json"),
        roles=dict(roles or {}),
        limits=limits or Limits(),
        cache=policy,
        identity=identity,
    )
    job = await service.prepare(models.find(program.name), asked)
    return (await service.answer(job, choice, emit)).answer


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


if __name__ == "__main__":
    main()
