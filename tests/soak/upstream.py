"""An OpenAI-compatible server for a long load: cheap, in a process of its own, and wrong where a question says so.

What goes wrong is written into the question, as `fault=cut`, so that whoever asked knows what to expect. Run as a
script, it prints its port and serves until its stdin closes.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from typing import cast

import httptools
import uvloop

WORDS = 12
ANSWER = " ".join(f"word{n}" for n in range(WORDS))
"""What every question is answered with."""
FITTING = '{"answer": "yes"}'
"""What is answered where a `response_format` came with the question."""

DELAY = 0.02
"""Seconds until an answer, or its first word, comes."""
BETWEEN = 0.004
"""Seconds between two words of a stream."""
SLOW = 0.5
"""Seconds that `fault=slow` adds to it."""

_FAULT = re.compile(rb"fault=([a-z]+)-(\d+)")

_USAGE = '"usage":{"prompt_tokens":20,"completion_tokens":12,"total_tokens":32}'
_HEAD = '"id":"chatcmpl-soak","created":1700000000,"model":"scripted"'


def _response(status: str, body: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def _whole(text: str) -> bytes:
    message = f'{{"role":"assistant","content":{json.dumps(text)},"refusal":null}}'
    choice = f'{{"index":0,"message":{message},"logprobs":null,"finish_reason":"stop"}}'
    return _response("200 OK", f'{{{_HEAD},"object":"chat.completion","choices":[{choice}],{_USAGE}}}')


def _event(body: str) -> bytes:
    data = f"data: {body}\n\n"
    return f"{len(data):x}\r\n{data}\r\n".encode()


def _chunk(delta: str, finish: str = "null") -> bytes:
    choice = f'{{"index":0,"delta":{{{delta}}},"finish_reason":{finish}}}'
    return _event(f'{{{_HEAD},"object":"chat.completion.chunk","choices":[{choice}]}}')


def _words(text: str) -> list[bytes]:
    first, *others = text.split(" ")
    said = ['"role":"assistant","content":' + json.dumps(first), *('"content":' + json.dumps(f" {w}") for w in others)]
    return [_chunk(delta) for delta in said]


_ERROR = '{"error":{"message":"a scripted fault","type":"scripted_fault","param":null,"code":null}}'
_BUSY = _response("429 Too Many Requests", _ERROR, "retry-after: 1")
_FAILED = _response("500 Internal Server Error", _ERROR)
_OPEN = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_END = (
    _chunk("", '"stop"')
    + _event(f'{{{_HEAD},"object":"chat.completion.chunk","choices":[],{_USAGE}}}')
    + _event("[DONE]")
    + b"0\r\n\r\n"
)
_WHOLE = {text: _whole(text) for text in (ANSWER, FITTING)}
_WORDS = {text: _words(text) for text in (ANSWER, FITTING)}


class Connection(asyncio.Protocol):
    """One connection; a question at a time, as HTTP/1.1 clients ask."""

    refused: dict[bytes, None]

    def __init__(self, refused: dict[bytes, None]) -> None:
        self.refused = refused
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._loop = asyncio.get_running_loop()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._body.clear()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        text = FITTING if b'"response_format"' in body else ANSWER
        streamed = b'"stream":true' in body
        found = _FAULT.search(body)
        fault = b"" if found is None else found[1]
        if fault == b"reset":
            self._later(DELAY, self._transport.abort)
        elif fault == b"error":
            self._later(DELAY, self._transport.write, _FAILED)
        elif found is not None and fault == b"busy" and found[0] not in self.refused:
            # Once; who asks again is answered.
            self.refused[found[0]] = None
            if len(self.refused) > 1000:
                del self.refused[next(iter(self.refused))]
            self._later(DELAY, self._transport.write, _BUSY)
        else:
            delay = DELAY + (SLOW if fault == b"slow" else 0.0)
            cut = 3 if fault == b"cut" else None
            if streamed:
                self._later(delay, self._begin, _WORDS[text], cut)
            elif cut:
                self._later(delay, self._half, _WHOLE[text])
            else:
                self._later(delay, self._transport.write, _WHOLE[text])

    def _later(self, seconds: float, act: Callable[..., object], *args: object) -> None:
        self._timer = self._loop.call_later(seconds, act, *args)

    def _half(self, data: bytes) -> None:
        self._transport.write(data[: len(data) // 2])
        self._transport.close()

    def _begin(self, words: list[bytes], cut: int | None) -> None:
        self._transport.write(_OPEN)
        self._say(words, 0, cut)

    def _say(self, words: list[bytes], count: int, cut: int | None) -> None:
        if count == cut:
            self._transport.close()
        elif count == len(words):
            self._transport.write(_END)
        else:
            self._transport.write(words[count])
            self._later(BETWEEN, self._say, words, count + 1, cut)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    refused: dict[bytes, None] = {}
    server = await loop.create_server(lambda: Connection(refused), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    # Whoever started it has ended when nothing can be read any more.
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    uvloop.run(_serve())
