"""HTTP connections that cannot be held against the server: headers have a size, an end, and a time to come.

uvicorn reads HTTP/1.1 and sets none of these bounds (0.54): a header that never ends fills the memory, and a connection
that says nothing is kept for ever.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import cast

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEADER_BYTES = 65_536
"""Of a request's line and headers together; nginx takes half, and no client sends a tenth."""
HEADERS = 200
"""How many headers a request may have."""
HEADER_SECONDS = 30.0
"""Until a request's headers have come to their end, from its first byte or, on a new connection, from the start."""
LATE_BYTES = 64_000_000
"""Of a body that goes on after it was answered, before the connection is closed."""


class Connection(HttpToolsProtocol):
    """One connection, as uvicorn serves it, within bounds."""

    _patience: asyncio.TimerHandle | None = None
    _heading = 0
    """Bytes of what is being read of a request's head, counted by the packet."""
    _in_head = False
    _in_body = False
    _late = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        behind_a_body = self._in_body
        super().data_received(data)
        if not self._in_head or behind_a_body:
            return
        # The head is still open, so all that has come since its beginning was part of it.
        self._heading += len(data)
        if self._heading > HEADER_BYTES:
            self._refuse(431, "the request's headers are larger than this server takes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._heading = 0
        self._late = 0
        if self._patience is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > HEADERS:
            self._refuse(431, f"a request may have {HEADERS} headers")
            raise ValueError  # Ends the parser; by then the connection is closing.

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_body = True
        self._stop_waiting()
        super().on_headers_complete()

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

    def _await_head(self) -> None:
        self._patience = self.loop.call_later(HEADER_SECONDS, self._out_of_patience)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _out_of_patience(self) -> None:
        self._patience = None
        if self._answering:
            self._await_head()
        elif self._in_head:
            self._refuse(408, "the request's headers have not come to their end in time")
        else:
            self.transport.close()

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
