"""The upstream of the benchmark: OpenAI's wire with one scripted answer, cheap enough to measure others by.

A bare ASGI application on uvicorn, uvloop and httptools, in a process of its own: what a server in Python costs at the
least, and so a direct call to it is as cheap as a call gets here. It answers on `/v1`; on `/bench` it is told by the
benchmark how slow to be and asked what it saw. It ends when its standard input does.

The delay is from the last byte of a request to the first byte of its answer. A stream then sends its tokens at once,
each a chunk of its own, as a server with a fast model does; with `pace` it waits that long before each token instead.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias, cast

import orjson
import uvicorn
from tests.bench import wire

Event: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Event]]
Send: TypeAlias = Callable[[Event], Awaitable[None]]


class Scripted:
    """The application: the answers, how slow they are, and the counts."""

    def __init__(self, delay: float = 0.0, pace: float = 0.0) -> None:
        self.delay = delay
        """Seconds before an answer."""
        self.pace = pace
        """Seconds before each token of a stream."""
        self.calls = 0
        self.in_flight = 0
        self.most = 0
        self._answers = {
            "/v1/chat/completions": _whole(orjson.dumps(wire.completion())),
            "/v1/completions": _whole(orjson.dumps(wire.legacy_completion())),
        }
        self._streams = {
            (path, usage): _chunks(wire.events(chat=path == "/v1/chat/completions", usage=usage))
            for path in self._answers
            for usage in (False, True)
        }
        model = {"id": wire.MODEL, "object": "model", "created": 1_750_000_000, "owned_by": "bench"}
        self._models = _whole(orjson.dumps({"object": "list", "data": [model]}))

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path in self._answers:
            await self._answer(path, await read(receive), send)
        elif path == "/bench":
            await _say(_whole(self._control(await read(receive))), send)
        elif path == "/v1/models":
            await _say(self._models, send)
        else:
            await _say(_whole(_error("no such route"), 404), send)

    async def _answer(self, path: str, body: bytes, send: Send) -> None:
        try:
            asked: dict[str, Any] = orjson.loads(body)
        except ValueError:
            await _say(_whole(_error("the body is not JSON"), 400), send)
            return
        self.calls += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            if not asked.get("stream"):
                await _say(self._answers[path], send)
                return
            options: dict[str, Any] = asked.get("stream_options") or {}
            usage = bool(options.get("include_usage"))
            for event in self._streams[path, usage]:
                if self.pace and event["type"] == "http.response.body":
                    await asyncio.sleep(self.pace)
                await send(event)
        finally:
            self.in_flight -= 1

    def _control(self, body: bytes) -> bytes:
        """Counts since the last time; and from now on as slow as it is told to be."""
        asked: dict[str, Any] = orjson.loads(body or b"{}")
        said = {"calls": self.calls, "most": self.most, "in_flight": self.in_flight}
        self.calls, self.most = 0, self.in_flight
        self.delay = float(asked.get("delay", self.delay))
        self.pace = float(asked.get("pace", self.pace))
        return orjson.dumps(said)


def _error(message: str) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})


def _whole(body: bytes, status: int = 200) -> Sequence[Event]:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return (
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


def _chunks(events: Sequence[bytes]) -> Sequence[Event]:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    bodies: list[Event] = [{"type": "http.response.body", "body": event, "more_body": True} for event in events]
    bodies[-1]["more_body"] = False
    return ({"type": "http.response.start", "status": 200, "headers": headers}, *bodies)


async def _say(events: Sequence[Event], send: Send) -> None:
    for event in events:
        await send(event)


async def read(receive: Receive) -> bytes:
    """The whole body of a request."""
    parts: list[bytes] = []
    while True:
        event = await receive()
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def until_input_ends(loop: asyncio.AbstractEventLoop, end: Callable[[], object]) -> None:
    """Call `end` once whoever started this process is gone."""

    def read() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            end()

    loop.add_reader(sys.stdin.fileno(), read)


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, or asyncio's own where there is no uvloop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return cast("asyncio.AbstractEventLoop", uvloop.new_event_loop())


def main() -> None:
    """`python -m tests.bench.upstream`: prints its port as its first line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.upstream", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--delay", type=float, default=0.0, help="milliseconds before an answer")
    parser.add_argument("--pace", type=float, default=0.0, help="milliseconds before each token of a stream")
    options = parser.parse_args()
    application = Scripted(options.delay / 1000, options.pace / 1000)

    async def run() -> None:
        config = uvicorn.Config(
            cast("Any", application), http="httptools", lifespan="off", log_level="warning", access_log=False,
            backlog=1024, timeout_keep_alive=600,
        )  # fmt: skip
        server = uvicorn.Server(config)

        def end() -> None:
            server.should_exit = server.force_exit = True

        until_input_ends(asyncio.get_running_loop(), end)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", options.port))
            # Whoever reads the port may connect at once.
            sock.listen(1024)
            print(sock.getsockname()[1], flush=True)
            await server.serve(sockets=[sock])

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
