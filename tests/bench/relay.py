"""The least that a proxy in Python does: bytes in, the same bytes on, bytes back. What is left to gain ends here.

uvicorn, uvloop and httptools in front, kept connections and httptools behind, nothing read and nothing kept. It is no
proxy that anyone should use: no error is handled but by breaking the connection.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvicorn
from tests.bench.upstream import Event, Receive, Send, new_loop, read

HOP = {b"connection", b"keep-alive", b"transfer-encoding"}


class Kept(asyncio.Protocol):
    """A connection to the upstream, for one exchange at a time."""

    def __init__(self) -> None:
        self.open = True
        self._transport = cast("asyncio.Transport", None)
        self._parser = httptools.HttpResponseParser(self)
        self._send: asyncio.Queue[Event] = asyncio.Queue()
        self._headers: list[tuple[bytes, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._send.put_nowait({"type": "lost"})

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in HOP:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._send.put_nowait({"type": "http.response.start", "status": status, "headers": self._headers})
        self._headers = []

    def on_body(self, body: bytes) -> None:
        self._send.put_nowait({"type": "http.response.body", "body": body, "more_body": True})

    def on_message_complete(self) -> None:
        self._send.put_nowait({"type": "http.response.body", "body": b"", "more_body": False})

    async def exchange(self, request: bytes, send: Send) -> None:
        self._transport.write(request)
        while True:
            event = await self._send.get()
            if event["type"] == "lost":
                raise ConnectionResetError
            await send(event)
            if not event.get("more_body", True):
                return


class Relay:
    """The application."""

    def __init__(self, base_url: str) -> None:
        address = urlsplit(base_url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._idle: deque[Kept] = deque()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        body = await read(receive)
        head = f"{scope['method']} {scope['path']} HTTP/1.1\r\nhost: {self._host}\r\ncontent-length: {len(body)}\r\n"
        while self._idle and not self._idle[-1].open:
            self._idle.pop()
        connection = self._idle.pop() if self._idle else await self._connected()
        await connection.exchange(f"{head}content-type: application/json\r\n\r\n".encode() + body, send)
        self._idle.append(connection)

    async def _connected(self) -> Kept:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Kept, self._host, self._port)
        return connection


def main() -> None:
    """`python -m tests.bench.relay --port PORT --to BASE_URL`, until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.relay", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--to", required=True, metavar="BASE_URL")
    options = parser.parse_args()
    config = uvicorn.Config(
        cast("Any", Relay(options.to)), port=options.port, http="httptools", lifespan="off", log_level="critical",
        access_log=False, backlog=1024,
    )  # fmt: skip
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(uvicorn.Server(config).serve())


if __name__ == "__main__":
    main()
