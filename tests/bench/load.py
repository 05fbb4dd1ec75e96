"""The load of the benchmark: so many connections, each asking again as soon as it has its answer (a closed loop).

A process of its own on uvloop, with httptools as its only HTTP. Every answer is read to its end and checked: its
status, that its JSON holds exactly the text that the upstream says, and of a stream that it was ended as streams end.
It takes one order a line on its standard input, as JSON, and answers each with one line; it ends when its input does.
"""

from __future__ import annotations

import asyncio
import gc
import math
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, cast

import httptools
import orjson
from tests.bench.upstream import new_loop

PLACE = "{number}"
"""In the body of an order: where the number of the request goes, so that no two requests are equal."""
_FIRST_TOKEN = re.compile(rb'"(?:content|text)":\s*"[^"]')


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to ask, whom, how often at once and how long."""

    port: int
    body: str
    """The request's JSON; `{number}` in it is replaced by another number in each request."""
    expect: str
    """The text that each answer must hold."""
    connections: int = 1
    seconds: float = 1.0
    """After so long nothing new is asked; what was asked is waited for."""
    requests: int | None = None
    """Or after so many requests, whichever comes first."""
    path: str = "/v1/chat/completions"
    patience: float = 60.0
    """Seconds that a single answer may take."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Of one round, in milliseconds. All zero if nothing was measured."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        if not seconds:
            return cls()
        ranked = sorted(seconds)
        p50, p90, p99 = (percentile(ranked, share) * 1000 for share in (0.5, 0.9, 0.99))
        return cls(mean=math.fsum(ranked) / len(ranked) * 1000, p50=p50, p90=p90, p99=p99, most=ranked[-1] * 1000)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of an order."""

    requests: int
    """Answers that were right."""
    seconds: float
    """From the first request to the last answer."""
    bytes: int
    """Of bodies, checked."""
    latency: Latency
    first_byte: Latency
    """Until the first byte of the body."""
    first_token: Latency
    """Until the first text, where it streams."""
    errors: dict[str, int] = field(default_factory=dict[str, int])
    """What was wrong with the others, and how often."""

    @property
    def rate(self) -> float:
        """Right answers a second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        times: dict[str, Any] = {name: Latency(**data[name]) for name in ("latency", "first_byte", "first_token")}
        return cls(**(data | times))


def percentile(ranked: Sequence[float], share: float) -> float:
    """Of values in order; between two of them in a straight line, as `statistics.quantiles(..., "inclusive")` does."""
    at = (len(ranked) - 1) * share
    low = math.floor(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)


def fault_of(status: int, body: bytes, *, stream: bool, expect: str) -> str | None:
    """What is wrong with a whole answer; None if nothing is."""
    if status != 200:
        return f"status {status}: {body[:200].decode('utf-8', 'replace')}"
    try:
        said = _streamed(body) if stream else _said(orjson.loads(body)["choices"][0])
    except (ValueError, LookupError, TypeError) as error:
        return f"not an answer: {error}"
    if said is None:
        return "the stream has no [DONE]"
    return None if said == expect else f"another text: {said[:60]!r}"


def _said(choice: dict[str, Any]) -> str:
    part: dict[str, Any] = choice.get("message") or choice.get("delta") or choice
    return part.get("content") or part.get("text") or ""


def _streamed(body: bytes) -> str | None:
    text: list[str] = []
    done = False
    for event in body.split(b"\n\n"):
        if not event.startswith(b"data:"):
            continue  # a comment, a blank
        data = event[5:].strip()
        if data == b"[DONE]":
            done = True
            continue
        if done:
            raise ValueError("something comes after [DONE]")
        chunk: dict[str, Any] = orjson.loads(data)
        if "error" in chunk:
            raise ValueError(f"an error in the stream: {chunk['error']}")
        if chunk["choices"]:
            text.append(_said(chunk["choices"][0]))
    return "".join(text) if done else None


class Phase:
    """One order as it is carried out."""

    def __init__(self, order: Order, number: Callable[[], int], loop: asyncio.AbstractEventLoop) -> None:
        self.order = order
        self.loop = loop
        self.latencies: list[float] = []
        self.first_bytes: list[float] = []
        self.first_tokens: list[float] = []
        self.errors: Counter[str] = Counter()
        self.bytes = 0
        self.deadline = math.inf
        self.last = 0.0
        self.stream = orjson.loads(order.body).get("stream") is True
        self._number = number
        self._left = order.requests if order.requests is not None else sys.maxsize
        head = (
            f"POST {order.path} HTTP/1.1\r\nhost: 127.0.0.1:{order.port}\r\ncontent-type: application/json\r\n"
            "authorization: Bearer bench\r\naccept: */*\r\nuser-agent: bench\r\ncontent-length: "
        )
        self._parts = order.body.encode().split(PLACE.encode())
        length = sum(map(len, self._parts)) + (len(self._parts) - 1) * 12
        self._parts[0] = f"{head}{length}\r\n\r\n".encode() + self._parts[0]

    def next(self) -> bytes | None:
        """A request to send, or None when there were enough."""
        if self._left <= 0 or time.perf_counter() >= self.deadline:
            return None
        self._left -= 1
        if len(self._parts) == 1:
            return self._parts[0]
        return (b"%012d" % self._number()).join(self._parts)

    def answered(self, status: int, body: bytes, began: float, first_byte: float, first_token: float) -> None:
        self.last = now = time.perf_counter()
        fault = fault_of(status, body, stream=self.stream, expect=self.order.expect)
        if fault is not None:
            self.errors[fault] += 1
            return
        self.bytes += len(body)
        self.latencies.append(now - began)
        self.first_bytes.append(first_byte - began)
        if self.stream:
            self.first_tokens.append(first_token - began)


class _NoTransport(asyncio.WriteTransport):
    """Before there is a connection."""

    def abort(self) -> None:
        pass


class Client(asyncio.Protocol):
    """One connection: asks, reads the whole answer, asks again. Where the server closes it, it is made anew."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self.ended: asyncio.Future[None] = phase.loop.create_future()
        self.asking = False
        self._transport: asyncio.WriteTransport = _NoTransport()
        self._parser = httptools.HttpResponseParser(self)
        self._connecting: asyncio.Task[None] | None = None
        self._body: list[bytes] = []
        self._framed = False
        self._began = self._first_byte = self._first_token = 0.0

    async def connect(self) -> None:
        try:
            await self._phase.loop.create_connection(lambda: self, "127.0.0.1", self._phase.order.port)
        except OSError as error:
            self._fail(f"no connection: {error.strerror}")

    def ask(self) -> None:
        """Send the next request, or end."""
        request = self._phase.next()
        if request is None or self.ended.done():
            self._end()
            return
        self._body = []
        self._framed = False
        self._first_byte = self._first_token = 0.0
        self.asking = True
        self._began = time.perf_counter()
        self._transport.write(request)

    def give_up(self, why: str) -> None:
        """The phase is over."""
        if self.asking:
            self._fail(why)

    def _fail(self, why: str) -> None:
        self.asking = False
        self._phase.errors[why] += 1
        self._end()

    def _end(self) -> None:
        self._transport.abort()
        if not self.ended.done():
            self.ended.set_result(None)

    def _answered(self) -> None:
        self.asking = False
        first_token = self._first_token or self._first_byte
        self._phase.answered(
            self._parser.get_status_code(), b"".join(self._body), self._began, self._first_byte, first_token
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpResponseParser(self)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        if self.asking:
            if exc is not None or not self._body or self._framed:
                self._fail("the connection was cut")
                return
            # Of old HTTP: the end of the connection is the end of the body.
            self._answered()

        async def again() -> None:
            await self.connect()
            if not self.ended.done():
                self.ask()

        self._connecting = self._phase.loop.create_task(again())

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    # What httptools calls as it reads.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_body(self, body: bytes) -> None:
        if not self._first_byte:
            self._first_byte = time.perf_counter()
        self._body.append(body)
        if self._phase.stream and not self._first_token and _FIRST_TOKEN.search(body):
            self._first_token = time.perf_counter()

    def on_message_complete(self) -> None:
        if not self.asking or not (self._framed or self._parser.should_keep_alive()):
            return
        self._answered()
        if self._parser.should_keep_alive():
            # Not from inside of the parser, which is not done with this message yet.
            self._phase.loop.call_soon(self.ask)
        else:
            self._transport.close()


async def carry_out(order: Order, number: Callable[[], int]) -> Result:
    """Carry an order out. It ends, whatever the target does: `seconds`, then `patience` at most."""
    loop = asyncio.get_running_loop()
    phase = Phase(order, number, loop)
    clients = [Client(phase) for _ in range(order.connections)]
    for client in clients:
        await client.connect()
    # What is made meanwhile are numbers and bytes; a pause for the collector would be taken for the target's.
    gc.collect()
    gc.freeze()
    gc.disable()
    began = time.perf_counter()
    phase.deadline = began + order.seconds
    try:
        for client in clients:
            if not client.ended.done():
                client.ask()
        await asyncio.wait([client.ended for client in clients], timeout=order.seconds + order.patience)
    finally:
        gc.enable()
        gc.unfreeze()
    for client in clients:
        client.give_up(f"no answer in {order.patience:g} s")
    return Result(
        requests=len(phase.latencies),
        seconds=max(phase.last - began, 1e-9),
        bytes=phase.bytes,
        latency=Latency.of(phase.latencies),
        first_byte=Latency.of(phase.first_bytes),
        first_token=Latency.of(phase.first_tokens),
        errors=dict(phase.errors),
    )


async def take_orders() -> None:
    """One order a line, one result a line."""
    loop = asyncio.get_running_loop()
    numbers = count(1)
    lines = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        result = await carry_out(Order(**orjson.loads(line)), lambda: next(numbers))
        sys.stdout.buffer.write(orjson.dumps(asdict(result)) + b"\n")
        sys.stdout.buffer.flush()


def main() -> None:
    """`python -m tests.bench.load`"""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(take_orders())


if __name__ == "__main__":
    main()
