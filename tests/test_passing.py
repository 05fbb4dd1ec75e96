"""The short way of a request that is passed through does all that the long way does, and nothing else.

One server, whose short way can be closed, and an upstream that says what it is told and remembers the bytes that it was
sent: of each request the two ways give the same bytes upstream, the same answer, spans, numbers and line in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvicorn
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from asmodel import request_log, tracing, wire
from asmodel.app import build, create_app
from asmodel.calls import Chat
from asmodel.dialect import Assembly, body_of, forwarded, reply_of, told_of
from asmodel.measuring import Measured
from asmodel.metrics import Metrics
from asmodel.passing import Passage
from asmodel.protocols import Told
from asmodel.request_log import RequestLine
from asmodel.settings import Settings
from asmodel.trace_spans import Recorded, Recorder

PATIENCE = 20.0


async def until(done: Callable[[], bool]) -> bool:
    """Wait until it is so; whether that came about in time."""
    for _ in range(round(PATIENCE / 0.002)):
        if done():
            return True
        await asyncio.sleep(0.002)
    return done()


@dataclass
class Said:
    """What the upstream answers to a request: bytes as they are, a part at a time."""

    status: int = 200
    kind: str = "application/json"
    parts: tuple[bytes, ...] = ()
    hangs: bool = False
    """After the last part nothing comes any more."""
    breaks: bool = False
    """After the last part the connection is closed, in the middle of the answer."""


class Bytes:
    """An upstream of bytes. `script` is what it says, request by request; the last for ever."""

    def __init__(self) -> None:
        self.script: list[Said] = []
        self.received: list[bytes] = []
        self.left = asyncio.Event()
        """A client has closed a connection before it had its answer."""
        self.base_url = ""

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                assert length is not None
                body = await reader.readexactly(int(length[1]))
                self.received.append(head + body)
                said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                words = f"HTTP/1.1 {said.status} X\r\ncontent-type: {said.kind}\r\ntransfer-encoding: chunked\r\n"
                again = "" if said.status == 200 else "retry-after-ms: 5\r\n"
                writer.write(f"{words}{again}\r\n".encode())
                for part in said.parts:
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                    await writer.drain()
                    await asyncio.sleep(0)
                if said.hangs:
                    assert await reader.read(1) == b""
                    self.left.set()
                if said.hangs or said.breaks:
                    return
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@dataclass
class Seen:
    """All that can be seen of one request."""

    upstream: list[bytes]
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    spans: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])
    numbers: dict[Any, Any] = field(default_factory=dict[Any, Any])
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    words: list[str] = field(default_factory=list[str])
    """Other lines of the log."""


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[RequestLine] = []
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = getattr(record, "asmodel_request", None)
        if isinstance(line, RequestLine):
            self.lines.append(line)
        else:
            self.words.append(f"{record.levelname} {re.sub(r'[0-9.]+ s', 'S', record.getMessage())}")


class _Ends:
    def __init__(self) -> None:
        self.spans: list[Recorded] = []

    def on_end(self, span: Any, /) -> None:
        self.spans.append(span)


VARIES = {"x-request-id", "openai-processing-ms", "x-asmodel-trace-id", "x-asmodel-overhead-ms", "date"}
"""Of the headers."""


class Ways:
    """A server, and what is seen of it."""

    def __init__(self, app: Measured, metrics: Metrics, up: Bytes, port: int) -> None:
        self.app = app
        self.metrics = metrics
        self.up = up
        self.port = port
        passage = app.passage
        assert passage is not None
        self.passage: Passage = passage
        self.taken = 0
        """How many requests have gone the short way."""
        find = passage.of

        def counting(scope: Any, started: float) -> Any:
            found = find(scope, started)
            self.taken += found is not None
            return found

        passage.of = counting  # type: ignore[method-assign]

    async def ask(self, request: bytes, *, short: bool, leaves: bool = False) -> Seen:
        self.app.passage = self.passage if short else None
        ends, lines = _Ends(), _Lines()
        recorder = Recorder(receivers=[ends])
        tracing.install(recorder)
        loggers = [request_log.log, logging.getLogger("asmodel.upstream"), logging.getLogger("asmodel.service")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.addHandler(lines)
            logger.setLevel(logging.INFO)
        before, received = self._numbers(), len(self.up.received)
        self.up.left.clear()
        try:
            status, headers, body = await asyncio.wait_for(self.spoken(request, leaves=leaves), PATIENCE)
            if leaves:
                await asyncio.wait_for(self.up.left.wait(), PATIENCE)
            assert await until(lambda: bool(lines.lines))
            assert await self.passage.service.idle(PATIENCE)
        finally:
            tracing.remove(recorder)
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(lines)
                logger.setLevel(level)
        after = self._numbers()
        return Seen(
            upstream=self.up.received[received:],
            status=status,
            headers=headers,
            body=body,
            spans=_told(ends.spans),
            numbers={k: round(v - before.get(k, 0.0), 9) for k, v in after.items() if v != before.get(k, 0.0)},
            lines=[_line(line) for line in lines.lines],
            words=lines.words,
        )

    def _numbers(self) -> dict[Any, float]:
        found: dict[Any, float] = {}
        for family, labels, values in self.metrics.own():
            if family.name.startswith(("process.", "asmodel.cache")):
                continue
            if family.kind == "histogram":
                found[family.name, labels] = sum(values[:-1])
                if family.unit != "s":
                    found[family.name, labels, "sum"] = values[-1]
            elif family.unit != "s":
                found[family.name, labels] = values[0]
        return found

    async def spoken(
        self, request: bytes, *, leaves: bool, pauses: float | None = None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """With `pauses` the body is sent after the headers, in two parts, and so many seconds between them."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            count = len(self.up.received)
            if pauses is not None:
                start = request.index(b"\r\n\r\n") + 4
                for part in (request[:start], request[start : start + 9]):
                    writer.write(part)
                    await asyncio.sleep(pauses)
                request = request[start + 9 :]
            writer.write(request)
            if leaves:
                assert await until(lambda: len(self.up.received) > count)
                await asyncio.sleep(0.02)
                return 0, [], b""
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = [(n, v) for n, _, v in (line.partition(": ") for line in head[1:] if line)]
            if (length := dict(headers).get("content-length")) is not None:
                body = await reader.readexactly(int(length))
            else:
                body = b""
                while size := int(await reader.readline(), 16):
                    body += await reader.readexactly(size)
                    await reader.readexactly(2)
                await reader.readexactly(2)
            # What of an answer is made here, since the upstream has not said it.
            body = re.sub(rb'"id":"chatcmpl-\w+"|"created":\d{9,}', b'"made"', body)
            return int(head[0].split()[1]), [(n, "…" if n in VARIES else v) for n, v in headers], body
        finally:
            writer.close()


def _told(spans: list[Recorded]) -> list[tuple[Any, ...]]:
    """In the order of their ends."""
    names = {span.span_id: span.name for span in spans}
    varies = {tracing.FIRST_CHUNK, tracing.UPSTREAM_BACKOFF}
    return [
        (
            span.name,
            span.kind,
            names.get(span.parent_id, span.parent_id),
            {k: "…" if k in varies else v for k, v in span.attributes.items()},
            span.code,
            span.description,
            [event[0] for event in span.events],
        )
        for span in spans
    ]


def _line(line: RequestLine) -> dict[str, Any]:
    varies = {"seconds", "request_id", "trace_id", "run_id", "overhead_seconds"}
    return {name: "…" if name in varies else value for name, value in line.fields().items()}


@contextlib.asynccontextmanager
async def served(folder: Path, *, key: str | None = None, **upstream: Any) -> AsyncGenerator[Ways]:
    up = Bytes()
    listening = await up.start()
    about = {"base_url": up.base_url, "model": "theirs", "retries": 1, **upstream}
    settings = Settings.model_validate(
        {
            "upstreams": {"default": about},
            "cache": {"kind": "memory"},
            "traces": {"local": False},
            "keys": {} if key is None else {"ann": key},
        }
    )
    parts = build(settings)
    app = create_app(settings, parts=parts)
    config = uvicorn.Config(app, port=0, http="asmodel.connections:Connection", ws="none", log_config=None,
        access_log=False, server_header=False, lifespan="on")  # fmt: skip
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    work = asyncio.create_task(server._serve())  # pyright: ignore[reportPrivateUsage]  # signals are the tests'
    while not server.started:
        assert not work.done(), work.exception()
        await asyncio.sleep(0.002)
    await parts.service.ready.wait()
    ways = Ways(app, parts.metrics, up, server.servers[0].sockets[0].getsockname()[1])
    # What the upstream speaks is found out, once, on the long way.
    up.script = [whole("hello")]
    await ways.ask(request(ASKED) if key is None else request(ASKED, authorization=f"Bearer {key}"), short=False)
    try:
        yield ways
    finally:
        server.should_exit = True
        await work
        listening.close()


ASKED: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Who? Ü"}]}


def request(body: Any, **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(data))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + data


def answer(text: str | None, finish: Any = "stop", usage: Any = None, **more: Any) -> dict[str, Any]:
    used = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5} if usage is None else usage
    message = {"role": "assistant", "content": text, **more}
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": "theirs-1",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": used,
    }  # fmt: skip


def whole(text: str | None, *, status: int = 200, **more: Any) -> Said:
    return Said(status=status, parts=(json.dumps(answer(text, **more), indent=1).encode(),))


def chunk(delta: Any, finish: Any = None, **more: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "theirs-1", "choices": choices, **more}


USED = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
TEXT = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hel"}),
    chunk({"content": "lo"}),
    chunk({}, "stop"),
]
USAGE: dict[str, Any] = {**chunk({}), "choices": [], "usage": USED}
DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def stream(*chunks: Any, done: bool = True, together: bool = False, **more: Any) -> Said:
    parts = [event(c) if isinstance(c, dict) else c for c in chunks] + ([DONE] if done else [])
    return Said(kind="text/event-stream", parts=(b"".join(parts),) if together else tuple(parts), **more)


def error(status: int, **more: Any) -> Said:
    body = {"error": {"message": "no", "type": "t", "param": None, "code": None, **more}}
    return Said(status=status, parts=(json.dumps(body).encode(),))


STREAMED = {**ASKED, "stream": True}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
TALK = [
    {"role": "system", "content": "S"},
    {"content": "turned", "role": "user"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "c1", "content": "1"},
    {"role": "user", "content": [{"type": "text", "text": "look"}]},
    {"role": "user", "content": "named", "name": "me"},
]
USUAL = {"temperature": 0, "top_p": 0.5, "max_tokens": 9, "seed": 3, "stop": "x", "user": "u", "n": 1, "stream": False}

SPOKEN = stream(*TEXT, USAGE)

REQUESTS: dict[str, tuple[bytes, list[Said]]] = {
    "text": (request(ASKED), [whole("hello")]),
    "the usual parameters": (request({**ASKED, **USUAL, "stream_options": None}), [whole("hello")]),
    "unusual parameters": (
        request({**ASKED, "top_k": 5, "x": {"deep": [1.50, None]}, "logit_bias": {"1": 2}}),
        [whole("a")],
    ),
    "null parameters": (request({**ASKED, "temperature": None, "stop": None, "n": None}), [whole("hello")]),
    "tools and talk": (request({**ASKED, "messages": TALK, "tools": [TOOL], "tool_choice": "auto"}), [whole("hello")]),
    "tools that are none": (request({**ASKED, "tools": []}), [whole("hello")]),
    "a response format": (request({**ASKED, "response_format": {"type": "json_object"}}), [whole("{}")]),
    "its own id": (request(ASKED, x_request_id="mine"), [whole("hello")]),
    "an id that is none": (request(ASKED, x_request_id="m ü"), [whole("hello")]),
    "somebody's trace": (
        request(ASKED, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        [whole("a")],
    ),
    "a connection that is closed": (request(ASKED, connection="close"), [whole("hello")]),
    "no usage": (
        request(ASKED),
        [Said(parts=(json.dumps({**answer("four words are here"), "usage": None}).encode(),))],
    ),
    "half a usage": (request(ASKED), [whole("hello", usage={"prompt_tokens": 4})]),
    "more usage": (request(ASKED), [whole("a", usage={**USED, "completion_tokens_details": {"reasoning_tokens": 1}})]),
    "a call of a tool": (request(ASKED), [whole(None, finish=None, tool_calls=CALLS)]),
    "no finish": (request(ASKED), [whole("a", finish=None)]),
    "in pieces": (request(ASKED), [Said(parts=tuple(json.dumps(answer("hello")).encode().partition(b"hel")))]),
    "busy, then not": (request(ASKED), [error(503), whole("hello")]),
    "busy, and no better": (request(ASKED), [error(503)]),
    "refused": (request(ASKED), [error(400, param="messages", code="bad")]),
    "a key that is refused": (request(ASKED), [error(401)]),
    "an error inside": (request(ASKED), [Said(parts=(b'{"error": {"message": "no", "code": 400}}',))]),
    "no answer": (request(ASKED), [Said(parts=(b'{"choices": []}',))]),
    "no JSON": (request(ASKED), [Said(kind="text/html", parts=(b"<html>",))]),
    "a finish that is an error": (request(ASKED), [whole("a", finish="error")]),
    "broken off": (request(ASKED), [Said(parts=(b'{"choices"',), breaks=True)]),
    "a stream": (request(STREAMED), [stream(*TEXT, USAGE)]),
    "a stream at once": (request(STREAMED), [stream(*TEXT, USAGE, together=True)]),
    "a stream with its usage": (
        request({**STREAMED, "stream_options": {"include_usage": True}}),
        [stream(*TEXT, USAGE)],
    ),
    "a stream that asks for more": (
        request({**STREAMED, "stream_options": {"include_usage": False, "include_obfuscation": False}}),
        [stream(*TEXT, USAGE)],
    ),
    "a stream with parameters": (
        request({**STREAMED, **USUAL, "stream": True, "tools": [TOOL]}),
        [stream(*TEXT, USAGE)],
    ),
    "a stream without usage": (request(STREAMED), [stream(*TEXT)]),
    "a stream without an end": (request(STREAMED), [stream(*TEXT, USAGE, done=False)]),
    "a stream with comments": (request(STREAMED), [stream(b": hi\n\n", *TEXT, b"event: x\r\ndata: {}\r\n\r\n", USAGE)]),
    "a stream of calls": (
        request(STREAMED),
        [stream(chunk({"tool_calls": [{"index": 0, **CALLS[0]}]}), chunk({}, "tool_calls"), USAGE)],
    ),
    "a stream that is none": (request(STREAMED), [whole("hello")]),
    "a stream that says nothing": (request(STREAMED), [stream()]),
    "a stream of its usage alone": (request(STREAMED), [stream(USAGE)]),
    "a stream that breaks": (request(STREAMED), [stream(*TEXT[:2], done=False, breaks=True)]),
    "a stream that breaks at once": (request(STREAMED), [stream(done=False, breaks=True), stream(*TEXT, USAGE)]),
    "a stream with an error": (request(STREAMED), [stream(*TEXT[:2], {"error": {"message": "no", "code": 500}})]),
    "a stream that begins with an error": (
        request(STREAMED),
        [stream({"error": {"message": "no", "code": 503}}), stream(*TEXT, USAGE)],
    ),
    "a stream of no JSON": (request(STREAMED), [stream(TEXT[0], b"data: {no\n\n")]),
    "a stream that is refused": (request(STREAMED), [error(429)]),
    "a stream that was busy": (request(STREAMED), [error(503), stream(*TEXT, USAGE)]),
}


def same(long: Seen, short: Seen) -> None:
    assert short.upstream == long.upstream
    assert short.status == long.status
    assert short.headers == long.headers
    assert short.body == long.body
    assert short.spans == long.spans
    assert short.numbers == long.numbers
    assert short.lines == long.lines
    assert short.words == long.words


async def both(ways: Ways, asked: bytes, script: list[Said], *, leaves: bool = False) -> tuple[Seen, Seen]:
    ways.up.script = list(script)
    long = await ways.ask(asked, short=False, leaves=leaves)
    ways.up.script = list(script)
    before = ways.taken
    short = await ways.ask(asked, short=True, leaves=leaves)
    assert ways.taken == before + 1, "it did not go the short way"
    return long, short


async def of_each(ways: Ways, requests: dict[str, tuple[bytes, list[Said]]]) -> None:
    for name, (asked, script) in requests.items():
        try:
            same(*await both(ways, asked, script))
        except AssertionError as error:
            error.add_note(f"of the request with {name}")
            raise


@pytest.fixture
async def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ways]:
    monkeypatch.setattr("random.random", lambda: 0.0)
    async with served(tmp_path) as made:
        yield made


async def test_of_every_kind_of_request_the_two_ways_show_the_same(ways: Ways) -> None:
    await of_each(ways, REQUESTS)


async def test_whose_request_it_is_is_told_alike(tmp_path: Path) -> None:
    key = "k" * 32
    async with served(tmp_path, key=key) as ways:
        long, short = await both(ways, request(ASKED, authorization=f"Bearer {key}"), [whole("hello")])
        same(long, short)
        assert short.spans[-1][3][tracing.REQUEST_SCOPE] == "ann"
        assert short.lines[0]["caller"] == "ann"
        ways.up.script = [whole("hello")]
        refused = await ways.ask(request(ASKED, authorization="Bearer no"), short=True)
        assert (refused.status, ways.taken) == (401, 1)


@pytest.mark.parametrize("body", [ASKED, STREAMED], ids=["whole", "stream"])
async def test_a_client_that_leaves_is_told_of_alike(ways: Ways, body: dict[str, Any]) -> None:
    kind = "text/event-stream" if body.get("stream") else "application/json"
    same(*await both(ways, request(body), [Said(kind=kind, hangs=True)], leaves=True))


@pytest.mark.parametrize(
    ("bounds", "asked", "script"),
    [
        ({"timeout": 0.2, "retries": 0}, ASKED, [Said(hangs=True)]),
        ({"timeout": 1.0, "retries": 1}, ASKED, [Said(hangs=True), whole("hello")]),
        ({"first_byte_timeout": 0.2, "retries": 0}, STREAMED, [Said(kind="text/event-stream", hangs=True)]),
        ({"timeout": 1.0, "retries": 0}, STREAMED, [stream(*TEXT[:2], done=False, hangs=True)]),
    ],
    ids=["not finished", "finished when asked again", "not begun", "begun and not finished"],
)
async def test_a_call_that_takes_too_long_is_told_of_alike(
    tmp_path: Path, bounds: dict[str, Any], asked: dict[str, Any], script: list[Said]
) -> None:
    async with served(tmp_path, **bounds) as ways:
        same(*await both(ways, request(asked), script))


async def test_a_price_is_charged_alike(tmp_path: Path) -> None:
    async with served(tmp_path, price={"input": 1.0, "output": 2.0, "cached_input": 0.5}) as ways:
        for name in ("text", "more usage", "a stream", "busy, then not", "no usage"):
            asked, script = REQUESTS[name]
            long, short = await both(ways, asked, script)
            same(long, short)
            assert short.lines[0]["cost"] > 0


async def test_who_waits_for_a_turn_is_told_of_alike(tmp_path: Path) -> None:
    async with served(tmp_path, concurrency=1) as ways:
        turns = ways.passage.ways["default"].turns
        seen: list[Seen] = []
        for short in (False, True):
            assert turns.take()
            ways.up.script = [whole("hello")]
            asking = asyncio.create_task(ways.ask(request(ASKED), short=short))
            await asyncio.sleep(0.1)
            assert not asking.done()
            turns.give()
            seen.append(await asking)
        for one in seen:
            (called, *_) = one.spans
            assert called[3].pop("asmodel.upstream.queue.wait_s") > 0.05
            assert called[-1] == ["asmodel.wait"]
        same(*seen)
        # And gives its slot back.
        assert turns.take()


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (request(ASKED, idempotency_key="k"), 200),
        (request(ASKED, cache_control="no-store"), 200),
        (request(ASKED, x_asmodel_trace="on"), 200),
        (request(ASKED, content_type="application/json; charset=utf-8"), 200),
        (request({**ASKED, "asmodel": {"cache": "off"}}), 200),
        (request({**ASKED, "n": 2}), 200),
        (request(ASKED, origin="http://evil.example"), 403),
        (request(ASKED, host="evil.example"), 403),
        (request({**ASKED, "model": "nobody"}), 404),
        (request({**ASKED, "temperature": 3}), 400),
        (request({**ASKED, "messages": []}), 400),
        (request({**ASKED, "messages": [{"role": "user", "content": 1}]}), 400),
        (request({**ASKED, "messages": [{"role": [], "content": "x"}]}), 400),
        (request({**ASKED, "model": {}}), 400),
        (request(b"{"), 400),
        (request(b"[]"), 400),
        (request(b'"' + b"x" * 70_000 + b'"'), 400),
    ],
)
async def test_what_is_out_of_the_ordinary_goes_the_long_way(ways: Ways, asked: bytes, status: int) -> None:
    ways.up.script = [whole("hello")]
    seen = await ways.ask(asked, short=True)
    assert (seen.status, ways.taken) == (status, 0)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_body_that_comes_after_its_headers_goes_the_short_way_too(ways: Ways, streamed: bool) -> None:
    said = stream(chunk({"content": "hello"}), chunk({}, "stop")) if streamed else whole("hello")
    ways.up.script, ways.app.passage = [said], ways.passage
    status, _, body = await ways.spoken(request({**ASKED, "stream": streamed}), leaves=False, pauses=0.002)
    assert (status, ways.taken) == (200, 1)
    assert b"hello" in body


async def test_a_body_that_takes_its_time_is_waited_for_on_the_long_way(ways: Ways) -> None:
    ways.up.script, ways.app.passage = [whole("hello")], ways.passage
    status, _, body = await ways.spoken(request(ASKED), leaves=False, pauses=0.1)
    assert (status, ways.taken) == (200, 0)
    assert b"hello" in body


async def test_whoever_leaves_in_the_middle_of_a_body_is_asked_for_nothing(ways: Ways) -> None:
    ways.app.passage = ways.passage
    count = len(ways.up.received)
    _, writer = await asyncio.open_connection("127.0.0.1", ways.port)
    writer.write(request(ASKED)[:-9])
    await asyncio.sleep(0.01)
    writer.close()
    assert await until(lambda: not ways.passage.room.requests)
    await asyncio.sleep(0.1)
    assert len(ways.up.received) == count
    assert not ways.passage.room.requests


async def test_what_gathers_and_what_captures_is_seen_on_the_long_way(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways.up.script = [whole("hello")]
    monkeypatch.setattr(ways.passage.service, "draining", True)
    assert (await ways.ask(request(ASKED), short=True)).status == 503
    monkeypatch.undo()
    monkeypatch.setattr(ways.passage.room, "_most", 0)
    ways.app.passage = ways.passage
    status, _, _ = await ways.spoken(request(ASKED), leaves=False)
    assert (status, ways.taken) == (503, 0)


# --- what is read and what is written, of any body -------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-3, 3) | TEXTS | st.lists(TEXTS, max_size=2)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "nobody"]) | VALUES, "content": TEXTS | VALUES},
    optional={"name": TEXTS, "x": VALUES},
)
BODIES = st.fixed_dictionaries(
    {"model": TEXTS, "messages": st.lists(MESSAGES, max_size=4)},
    optional={name: VALUES for name in (*wire.USUAL, "top_k", "tools", "documents", "logprobs", "metadata")},
)


@given(BODIES)
@hypothesis_settings(max_examples=150)
def test_a_usual_request_is_one_that_the_validator_takes_and_says_the_same(body: dict[str, Any]) -> None:
    sent = json.loads(json.dumps(body))
    usual = wire.usual(sent)
    try:
        read = wire.ChatRequest.of(sent)
    except ValidationError:
        assert usual is None
        return
    messages = [message.wire() for message in read.conversation]
    if usual is not None:
        assert orjson.dumps(usual) == orjson.dumps(messages)
    for streams in (False, True):
        params = {**read.passed_on}
        if streams and read.stream_asks:
            params["stream_options"] = dict(read.stream_asks)
        tools = params.pop("tools", None) or ()
        if params.get("n", 1) not in (1, None):
            continue
        call = Chat(identity="i", messages=read.conversation, params=params, tools=tuple(tools))
        ours = wire.passed_on(sent)
        if streams and (asks := wire.stream_asks(sent)):
            ours["stream_options"] = asks
        sent_on = forwarded(ours, usual or messages, "theirs", stream=streams)
        assert orjson.dumps(sent_on) == orjson.dumps(body_of(call, "theirs", stream=streams))


EMPTY: dict[str, Any] = {}
NOTHING: list[Any] = []
WORDS: st.SearchStrategy[Any] = st.none() | st.integers(-1, 5) | TEXTS | st.just(EMPTY) | st.just(NOTHING)
CHOICES: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {},
    optional={
        "index": st.none() | st.integers(0, 1),
        "finish_reason": st.none() | st.sampled_from(["stop", "length", ""]),
        "logprobs": st.none() | st.just({"content": [{"token": "a", "logprob": -1.0}]}),
        "message": st.fixed_dictionaries({}, optional={"content": WORDS, "tool_calls": st.just(CALLS) | WORDS}) | WORDS,
        "delta": st.fixed_dictionaries({}, optional={"content": WORDS, "role": WORDS, "reasoning": WORDS}) | WORDS,
    },
)
USAGES: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": WORDS,
        "completion_tokens": st.integers(0, 5) | WORDS,
        "prompt_tokens_details": st.just({"cached_tokens": 2}) | WORDS,
        "completion_tokens_details": st.just({"reasoning_tokens": 1}) | WORDS,
    },
)
ANSWERS = st.fixed_dictionaries(
    {}, optional={"model": WORDS, "choices": st.lists(CHOICES | WORDS, max_size=2) | WORDS, "usage": USAGES | WORDS}
)


@given(ANSWERS)
@hypothesis_settings(max_examples=200)
def test_what_is_told_of_an_answer_is_what_the_whole_of_it_tells(body: dict[str, Any]) -> None:
    told = told_of(body)
    if told is not None:
        assert told == Told.of(reply_of(body, Chat(identity="i", messages=())))


@given(st.lists(ANSWERS, max_size=4))
@hypothesis_settings(max_examples=200)
def test_a_chunk_is_held_as_it_is_added(chunks: list[dict[str, Any]]) -> None:
    added, held = Assembly(), Assembly()
    for one in chunks:
        outcomes: list[str] = []
        for take in (added.add, held.hold):
            try:
                take(one)
                outcomes.append("")
            except ValueError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
    assert held == added
    told = held.told()
    if told is not None:
        assert told == Told.of(added.reply(Chat(identity="i", messages=())))
