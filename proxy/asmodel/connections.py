"""HTTP connections that cannot be held against the server: headers have a size, an end, and a time to come.

uvicorn reads HTTP/1.1 and sets none of these bounds (0.54): a header that never ends fills the memory, and a connection
that says nothing is kept for ever. Its timers are one a request, and its responses are checked name by name; both are
done here at a tenth of the cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from asmodel.timeouts import Timeouts

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGISendEvent

HEADER_BYTES = 65_536
"""Of a request's line and headers together; nginx takes half, and no client sends a tenth."""
HEADERS = 200
"""How many headers a request may have."""
HEADER_SECONDS = 30.0
"""Until a request's headers have come to their end, from its first byte or, on a new connection, from the start."""
LATE_BYTES = 64_000_000
"""Of a body that goes on after it was answered, before the connection is closed."""
UNREAD_BYTES = 512 * 1024
"""Of an answer that a client has not taken yet, before its upstream is made to wait: more than nearly any answer is, so
that a client that reads slowly does not hold an upstream's slot."""

SMALL = 65_536
"""Bytes of a body that may be taken at once; what is larger is received, and counted by whoever counts."""

SOON = 0.05
"""Seconds that the rest of a small body is waited for."""

EXTENSION = "asmodel.connection"
"""Of the ASGI scope: the `Cycle`, which can say at once what ASGI's `receive` has to be awaited for."""


class Cycle(RequestResponseCycle):
    """One request on a connection, and its response."""

    _left: Callable[[], None] | None = None
    _head = b""
    """Of the response, until the first of its body follows."""

    def look(self) -> bytes | None:
        """The body, if all of it is here and it is small; None where it must be received. It is not taken by this."""
        if self.more_body or len(self.body) > SMALL or self.waiting_for_100_continue or self.disconnected:
            return None
        return bytes(self.body)

    @property
    def soon(self) -> bool:
        """Whether a small body was announced of which some is not here yet: many clients send it after the headers."""
        if not self.more_body or self.waiting_for_100_continue or self.disconnected:
            return False
        for name, value in cast("Any", self.scope)["headers"]:
            if name == b"content-length":
                return len(value) <= 5 and int(value) <= SMALL
        return False

    async def arrival(self) -> None:
        """Wait a moment for the rest of the body. What takes longer has to be received, by whoever has patience."""
        waited = False

        def enough() -> None:
            # Said by the timer itself: uvloop's may come a millisecond before the clock says that it is due.
            nonlocal waited
            waited = True
            self.message_event.set()

        timer = asyncio.get_running_loop().call_later(SOON, enough)
        try:
            while self.more_body and not self.disconnected and not waited:
                self.message_event.clear()
                await self.message_event.wait()
        finally:
            timer.cancel()

    def take(self) -> None:
        """What was looked at is not to be received any more."""
        self.body = bytearray()
        self.message_event.clear()

    def whole_body(self) -> bytes | None:
        """The body, as by `look`. For the first to ask."""
        body = self.look()
        if body is not None:
            self.take()
        return body

    async def room(self) -> None:
        """Wait until what was written before has been taken by the client, or nearly all of it."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()

    def answer(self, headers: bytes, body: bytes) -> None:
        """A whole response of status 200 in one write, as `send` makes it of a start and a body.

        `headers` are lines with their ends; the caller has made sure that each is one, and that the length is right.
        """
        if self.disconnected:
            return
        self.response_started = True
        self.waiting_for_100_continue = False
        closes = b"" if self.keep_alive else b"connection: close\r\n"
        self.transport.write(b"".join((_OK, _lines(self.default_headers), headers, closes, b"\r\n", body)))
        self._complete()

    def when_left(self, left: Callable[[], None] | None) -> None:
        """Call `left` once the client has left, instead of whoever was to be called before."""
        self._left = left
        if left is not None and self.disconnected:
            asyncio.get_running_loop().call_soon(self.leave)

    def leave(self) -> None:
        """The client has left."""
        self.disconnected = True
        self.message_event.set()
        if self._left is not None:
            self._left()

    async def run_asgi(self, app: ASGI3Application) -> None:
        try:
            await super().run_asgi(app)
        finally:
            # The scope names this object, which names the scope: nothing of a request is to wait for the collector.
            cast("dict[str, Any]", self.scope).pop("extensions", None)

    def begin(self, headers: bytes) -> None:
        """The start of a response of status 200 whose length is not known, to be written with what comes first."""
        if self.disconnected:
            return
        self.response_started = self.chunked_encoding = True
        self.waiting_for_100_continue = False
        closes = b"" if self.keep_alive else b"connection: close\r\n"
        lines = _OK, _lines(self.default_headers), headers, closes, b"transfer-encoding: chunked\r\n\r\n"
        self._head = b"".join(lines)

    def go_on(self, body: bytes, *, more: bool) -> None:
        """What follows of a response that was begun."""
        if not self.disconnected:
            self._go_on(body, more=more)

    async def send(self, message: ASGISendEvent) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            if self.response_started:
                raise RuntimeError("a response has one start")
            self._start(message["status"], cast("Sequence[tuple[bytes, bytes]]", message.get("headers", ())))
        elif message["type"] == "http.response.body":
            if not self.response_started or self.response_complete:
                raise RuntimeError("the body of a response comes after its start and before its end")
            self._go_on(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise RuntimeError(f"a response is not made of {message['type']}")

    def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        self.waiting_for_100_continue = False
        lines = [_STATUS_LINES[status]]
        lines += [b"%b: %b" % header for header in self.default_headers]
        lines += [b"%b: %b" % header for header in headers]
        length: int | None = None
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close")
        self.chunked_encoding = False
        if length is not None:
            self.expected_content_length = length
        elif self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked")
        head = b"\r\n".join(lines)
        # One look at all of them: no header may end its line, and so begin another.
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1 or b"\0" in head:
            raise RuntimeError("a header of the response holds the end of a line")
        # Written with what follows it: a call of the kernel costs as much as all of this.
        self._head = head + b"\r\n\r\n"

    def _go_on(self, body: bytes, *, more: bool) -> None:
        if self.scope["method"] == "HEAD":
            self.expected_content_length, body = 0, b""
        elif self.chunked_encoding:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                raise RuntimeError("a response is longer than its content-length")
        if self._head:
            body, self._head = self._head + body, b""
        if body:
            self.transport.write(body)
        if more:
            return
        if self.expected_content_length:
            raise RuntimeError("a response is shorter than its content-length")
        self._complete()

    def _complete(self) -> None:
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}".encode() for status in HTTPStatus if status >= 200
}


_OK = _STATUS_LINES[200] + b"\r\n"

_defaults: tuple[Sequence[tuple[bytes, bytes]], bytes] = ((), b"")


def _lines(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The headers that uvicorn makes, once a second, for all responses, as lines."""
    global _defaults
    known, lines = _defaults
    if known is not headers:
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        _defaults = headers, lines
    return lines


class Connection(HttpToolsProtocol):
    """One connection, as uvicorn serves it, within bounds."""

    _heading = 0
    """Bytes of what is being read of a request's head, counted by the packet."""
    _in_head = False
    _in_body = False
    _late = 0
    _running: Cycle | None = None
    """The request that is being answered; those that a client has sent on without waiting are in the pipeline."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNREAD_BYTES)
        _HEADS.begin(self)

    def connection_lost(self, exc: Exception | None) -> None:
        _HEADS.end(self)
        _IDLE.end(self)
        super().connection_lost(exc)
        running = self._running
        if running is not None and not running.response_complete:
            running.leave()

    def data_received(self, data: bytes) -> None:
        _IDLE.end(self)
        behind_a_body = self._in_body
        super().data_received(data)
        if not self._in_head or behind_a_body:
            return
        # The head is still open, so all that has come since its beginning was part of it.
        self._heading += len(data)
        if self._heading > HEADER_BYTES:
            self._refuse(431, "the request's headers are larger than this server takes")
        elif len(self.headers) > HEADERS:
            self._refuse_headers()
        else:
            _HEADS.keep(self)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._heading = 0
        self._late = 0

    def on_headers_complete(self) -> None:
        if len(self.headers) > HEADERS:
            self._refuse_headers()
            raise ValueError  # Ends the parser; by then the connection is closing.
        self._in_head = False
        self._in_body = True
        _HEADS.end(self)
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # uvicorn makes its own kind of cycle; ours differs in what it does and not in what it holds.
        cycle.__class__ = Cycle
        self._running = running = cast("Cycle", cycle)
        cast("dict[str, Any]", cycle.scope)["extensions"] = {EXTENSION: running}
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        _IDLE.begin(self)

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._late += len(body)
            if self._late > LATE_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """In the envelope, as every error."""
        self._refuse(400, "what was sent is not a request of HTTP/1.1 that this server takes")

    @property
    def _answering(self) -> bool:
        """Whether an answer to an earlier request is on its way, between whose bytes nothing can be said."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request.
        return cycle is not None and not cycle.response_complete

    def out_of_patience(self) -> None:
        """The head of a request has not come to its end in time."""
        if self._answering:
            _HEADS.begin(self)
        elif self._in_head:
            self._refuse(408, "the request's headers have not come to their end in time")
        else:
            self.transport.close()

    def _refuse_headers(self) -> None:
        self._refuse(431, f"a request may have {HEADERS} headers")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        if not self._answering:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": _CODES[status]}
            body = orjson.dumps({"error": error})
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-should-retry: {'true' if status == 408 else 'false'}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


_CODES = {400: "bad_http", 408: "headers_timeout", 431: "headers_too_large"}

KEEP_ALIVE_SECONDS = 5.0
"""How long a connection may be silent between two requests."""

_HEADS: Timeouts[Connection] = Timeouts(HEADER_SECONDS, Connection.out_of_patience)
"""Connections of which the head of a request is awaited."""
_IDLE: Timeouts[Connection] = Timeouts(KEEP_ALIVE_SECONDS, Connection.timeout_keep_alive_handler)
"""Connections between two requests."""
