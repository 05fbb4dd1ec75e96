"""The HTTP client of the `openai` upstreams against servers that say exactly what they are told, byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.timed import in_time, timed

from asmodel.calls import Chat, Delta, Message, Terms
from asmodel.errors import ConfigurationError, UpstreamBroken, UpstreamRateLimited, UpstreamUnreachable
from asmodel_plugins.openai_http import (
    BUFFERED,
    FIELDS_LIMIT,
    HEAD_LIMIT,
    Client,
    Cut,
    Encoded,
    HTTPClient,
    NotInTime,
    Response,
    Unreached,
    _Connection,  # pyright: ignore[reportPrivateUsage]
    checked,
)
from asmodel_plugins.openai_proxied import ProxiedClient
from asmodel_plugins.openai_upstream import BODY_LIMIT, OpenAIUpstream

CALL = Chat(identity="i", messages=(Message("user", "x"),))
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"


@dataclass
class Asked:
    """One request on one connection of a scripted server."""

    connection: int
    head: bytes
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    def reset(self) -> None:
        """Break the connection off, as a process that dies does."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


Answer = Callable[[Asked], Awaitable[None]]


class Served:
    """A server whose `answer` writes the bytes itself; a connection ends when it closes it, or the client does."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.connections = 0
        self.open = 0
        self.port = 0

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                asked = Asked(number, head, await reader.readexactly(length), reader, writer)
                self.asked.append(asked)
                await self.answer(asked)
                if writer.is_closing():
                    return
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            self.open -= 1
            writer.close()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, tls: ssl.SSLContext | None = None, limit: int = 1 << 26) -> AsyncGenerator[int]:
    """Its port. At the end it waits for those connections that there still are, whose clients are gone."""
    handled = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal handled
        handled += 1
        try:
            with suppress(OSError):
                await handler(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            handled -= 1

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls, limit=limit)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await eventually(lambda: handled == 0)


@asynccontextmanager
async def served(answer: Answer | bytes, tls: ssl.SSLContext | None = None) -> AsyncGenerator[Served]:
    async def same(asked: Asked) -> None:
        await asked.say(cast("bytes", answer))

    served = Served(same if isinstance(answer, bytes) else answer)
    async with listening(served.on_connection, tls) as served.port:
        yield served


def own(port: int, **more: Any) -> Client:
    options: dict[str, Any] = {"connections": 100, "connect_timeout": 5.0, "headers": {}, "port": port}
    options |= {"scheme": "http", "host": "127.0.0.1"}
    return HTTPClient(**{**options, **more})


def of_aiohttp(port: int, **more: Any) -> Client:
    options: dict[str, Any] = {
        "connections": 100,
        "connect_timeout": 5.0,
        "headers": {},
        "origin": f"http://127.0.0.1:{port}",
    }
    return ProxiedClient(**{**options, **more})


Making = Callable[..., Client]
both = pytest.mark.parametrize("make", [own, of_aiohttp])


@asynccontextmanager
async def client_of(made: Client) -> AsyncGenerator[Client]:
    try:
        yield made
    finally:
        await made.close()


async def begun(
    client: Client, body: bytes = b"{}", *, whole: bool = False, resent: Callable[[], object] = int
) -> Response:
    return await client.send("/v1/chat", body, more={}, whole=whole, resent=resent)


def open_ones(client: Client) -> int:
    """How many connections it has that it could use."""
    return sum(connection.alive for connection in cast("HTTPClient", client).live)


async def rest(response: Response) -> bytes:
    parts: list[bytes] = []
    while block := await response.block():
        parts.append(block)
    return b"".join(parts)


async def asked(
    client: Client, body: bytes = b"{}", *, whole: bool = False, resent: Callable[[], object] = int
) -> bytes:
    response = await begun(client, body, whole=whole, resent=resent)
    try:
        return await rest(response)
    finally:
        response.release()


async def eventually(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (of another thread's, or the kernel's)
            await asyncio.sleep(0.002)


loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


def run_on(loop: str, main: Coroutine[Any, Any, None]) -> None:
    uvloop = pytest.importorskip("uvloop") if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
        runner.run(main)


# ---- what both clients do ----

BODY = b'{"a": "' + bytes(range(32, 127)).replace(b'"', b"") * 50 + b'"}'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n\r\n"


@both
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY), True),
        (CHUNKED + b"5\r\n%b\r\n%x;x=y\r\n%b\r\n0\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:]), True),
        (CHUNKED + b"%x\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (len(BODY), BODY), True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY), True),
        (b"HTTP/1.1 200\r\nContent-Length: %d\r\nconnection: close\r\n\r\n%b" % (len(BODY), BODY), False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY), False),
        (b"HTTP/1.1 200 OK\ncontent-length: %d\n\n%b" % (len(BODY), BODY), True),
    ],
)
async def test_an_answer_is_read_in_every_framing_and_its_connection_kept_if_it_may_be(
    make: Making, answer: bytes, kept: bool, whole: bool
) -> None:
    async with served(answer) as server, client_of(make(server.port)) as client:
        for _ in range(3):
            assert await asked(client, whole=whole) == BODY
        assert server.connections == (1 if kept else 3)


@both
async def test_a_body_without_a_length_ends_with_its_connection(make: Making) -> None:
    async def answer(asked: Asked) -> None:
        await asked.say(b"HTTP/1.1 200 OK\r\n\r\n", BODY)
        asked.writer.close()

    async with served(answer) as server, client_of(make(server.port)) as client:
        assert await asked(client) == await asked(client, whole=True) == BODY
        assert server.connections == 2


@both
async def test_what_is_sent_is_what_was_given(make: Making) -> None:
    headers = {"Authorization": "Bearer k", "content-type": "application/json", "X-Unicode": "é"}
    async with served(OK) as server, client_of(make(server.port, headers=headers)) as client:
        response = await client.send(
            "/v1/a%20b?c=d%20e", b'{"x":1}', more={"traceparent": "00-1"}, whole=True, resent=int
        )
        assert await rest(response) == b"hi"
        response.release()
    (request,) = server.asked
    line, *fields = request.head.decode().split("\r\n")[:-2]
    sent = {name.lower(): value for name, value in (one.split(": ") for one in fields)}
    assert line == "POST /v1/a%20b?c=d%20e HTTP/1.1"
    assert len(sent) == len(fields)
    assert sent == {
        "host": f"127.0.0.1:{server.port}",
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": "asmodel",
        "authorization": "Bearer k",
        "content-type": "application/json",
        "x-unicode": "é",
        "traceparent": "00-1",
        "content-length": "7",
    }
    assert request.body == b'{"x":1}'


@both
async def test_status_and_headers_are_told_by_names_in_lower_case(make: Making) -> None:
    head = (
        b"HTTP/1.1 429 Slow\r\nRetry-After: 3\r\nContent-Type: Application/JSON; charset=x\r\ncontent-length: 0\r\n\r\n"
    )
    async with served(head) as server, client_of(make(server.port)) as client:
        response = await begun(client)
        assert (response.status, response.headers["retry-after"]) == (429, "3")
        assert response.content_type == "application/json"
        assert await response.block() == b""
        assert response.ended
        response.release()


@both
async def test_a_redirect_is_an_answer_like_any_other(make: Making) -> None:
    head = b"HTTP/1.1 307 There\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n"
    async with served(head) as server, client_of(make(server.port)) as client:
        response = await begun(client)
        assert (response.status, response.headers["location"]) == (307, "http://127.0.0.1:9/")
        response.release()


@both
async def test_blocks_come_as_they_were_sent(make: Making) -> None:
    go_on = asyncio.Event()

    async def answer(asked: Asked) -> None:
        await asked.say(CHUNKED + b"1\r\na\r\n")
        await go_on.wait()
        await asked.say(b"1\r\nb\r\n", b"0\r\n\r\n")

    async with served(answer) as server, client_of(make(server.port)) as client:
        response = await begun(client)
        assert response.content_type == "text/event-stream"
        assert await response.block() == b"a"
        assert not response.ended
        go_on.set()
        assert await rest(response) == b"b"
        response.release()


@both
async def test_what_was_sent_on_a_connection_that_was_being_closed_is_sent_again(make: Making) -> None:
    async def answer(asked: Asked) -> None:
        if asked.connection == 1 and len(server.asked) > 1:
            asked.reset()
        else:
            await asked.say(OK)

    resent: list[int] = []
    async with served(answer) as server, client_of(make(server.port)) as client:
        assert await asked(client, b"first") == b"hi"
        assert await asked(client, b"second", resent=lambda: resent.append(1)) == b"hi"
    assert [(a.connection, a.body) for a in server.asked] == [(1, b"first"), (1, b"second"), (2, b"second")]
    assert resent == [1]


@both
async def test_what_was_sent_on_a_new_connection_is_never_sent_again(make: Making) -> None:
    async def answer(asked: Asked) -> None:
        asked.reset()

    async with served(answer) as server, client_of(make(server.port)) as client:
        with pytest.raises(Unreached, match="closed before an answer"):
            await asked(client)
    assert len(server.asked) == 1


@both
async def test_what_may_have_been_answered_is_never_sent_again(make: Making) -> None:
    async def answer(asked: Asked) -> None:
        if len(server.asked) == 1:
            await asked.say(OK)
        else:
            await asked.say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
            asked.writer.close()

    async with served(answer) as server, client_of(make(server.port)) as client:
        assert await asked(client) == b"hi"
        with pytest.raises(Cut):
            await asked(client)
    assert [a.connection for a in server.asked] == [1, 1]


async def test_a_head_that_was_begun_counts_as_heard() -> None:
    async def answer(asked: Asked) -> None:
        if len(server.asked) == 1:
            await asked.say(OK)
        else:
            await asked.say(b"HTTP/1.1 200 OK\r\ncont")
            asked.writer.close()

    async with served(answer) as server, client_of(own(server.port)) as client:
        assert await asked(client) == b"hi"
        with pytest.raises(Unreached, match="closed before an answer"):
            await asked(client)
    assert [a.connection for a in server.asked] == [1, 1]


@both
@pytest.mark.parametrize(
    "cut", [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", CHUNKED + b"4\r\nhalf\r\n", CHUNKED + b"9\r\nhalf"]
)
@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_breaks_in_the_middle_is_told_of(make: Making, cut: bytes, reset: bool) -> None:
    async def answer(asked: Asked) -> None:
        await asked.say(cut)
        if reset:
            await asyncio.sleep(0.02)
            asked.reset()
        else:
            asked.writer.close()

    async with served(answer) as server, client_of(make(server.port)) as client:
        with pytest.raises(Cut):
            await asked(client)
        with pytest.raises(Cut):
            await asked(client, whole=True)


@timed
@both
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 20", CHUNKED + b"1\r\na\r\n"])
async def test_a_call_that_is_cancelled_leaves_at_once(make: Making, said: bytes) -> None:
    left = asyncio.Event()

    async def answer(asked: Asked) -> None:
        await asked.say(said)
        with suppress(OSError):
            await asked.reader.read()
        left.set()
        asked.writer.close()

    async with served(answer) as server, client_of(make(server.port)) as client:
        task = asyncio.create_task(asked(client))
        await eventually(lambda: len(server.asked) == 1)
        await asyncio.sleep(0.02)
        task.cancel()
        began = time.monotonic()
        async with asyncio.timeout(10):
            await asyncio.gather(task, return_exceptions=True)
            await left.wait()
        in_time(time.monotonic() - began, 0.5)
        assert task.cancelled()


@both
async def test_no_more_connections_than_allowed_and_who_waits_is_served_in_order(make: Making) -> None:
    async def answer(asked: Asked) -> None:
        await asyncio.sleep(0.005)
        await asked.say(OK)

    async with served(answer) as server, client_of(make(server.port, connections=2)) as client:
        await asyncio.gather(*(asked(client, b"%d" % n) for n in range(20)))
        assert server.connections == 2
        assert [int(a.body) for a in server.asked] == sorted(int(a.body) for a in server.asked)


@both
async def test_who_leaves_while_waiting_for_a_connection_takes_no_place(make: Making) -> None:
    go_on = asyncio.Event()

    async def answer(asked: Asked) -> None:
        await go_on.wait()
        await asked.say(OK)

    async with served(answer) as server, client_of(make(server.port, connections=1)) as client:
        tasks = [asyncio.create_task(asked(client, b"%d" % n)) for n in range(4)]
        await eventually(lambda: len(server.asked) == 1)
        tasks[1].cancel()
        go_on.set()
        await asyncio.sleep(0)
        tasks[2].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[0] == done[3] == b"hi"
        assert await asked(client) == b"hi"


@both
@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"<html></html>\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n"])
async def test_what_is_no_http_is_named(make: Making, said: bytes) -> None:
    async with served(said) as server, client_of(make(server.port)) as client:
        with pytest.raises(Unreached, match="does not answer in HTTP"):
            await asked(client)


@both
async def test_an_address_where_nothing_listens_is_named(make: Making) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with client_of(make(bound.getsockname()[1])) as client:
            with pytest.raises(Unreached):
                await asked(client)


@both
@pytest.mark.parametrize(
    ("encoding", "packed"),
    [(b"gzip", gzip.compress(BODY)), (b"Deflate", zlib.compress(BODY)), (b"deflate", zlib.compress(BODY)[2:-4])],
)
async def test_a_body_that_was_compressed_unasked_is_read(make: Making, encoding: bytes, packed: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (encoding, len(packed))

    async def answer(asked: Asked) -> None:
        await asked.say(head + packed[:5])
        await asyncio.sleep(0.01)
        await asked.say(packed[5:])

    async with served(answer) as server, client_of(make(server.port)) as client:
        assert await asked(client) == BODY
        assert await asked(client, whole=True) == BODY
        assert server.connections == 1


# ---- what only ours has to prove ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-a", "1\r\nx-b: 2"),
        ("x-a", "1\n2"),
        ("x-a", "1\x002"),
        ("x-a\r\nx-b", "1"),
        ("x a", "1"),
        ("", "1"),
        ("x:", "1"),
        ("Content-Length", "3"),
        ("transfer-encoding", "chunked"),
    ],
)
async def test_a_header_that_would_break_out_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="header"):
        checked(name, value)
    for make in (own, of_aiohttp):
        with pytest.raises(ValueError, match="header"):
            make(1, headers={name: value})
    async with served(OK) as server, client_of(own(server.port)) as client:
        with pytest.raises(ValueError, match="header"):
            await client.send("/", b"", more={name: value}, whole=True, resent=int)
        assert not server.connections
    with pytest.raises(ConfigurationError, match=r"upstreams\.fast\.headers") as raised:
        OpenAIUpstream(name="fast", base_url="http://h/v1", model="m", headers={name: value})
    assert value not in str(raised.value)


@pytest.mark.parametrize("path", ["/a b", "/a\r\nx: y", "/ä", "/a\0"])
async def test_a_path_that_would_break_out_is_refused(path: str) -> None:
    async with served(OK) as server, client_of(own(server.port)) as client:
        with pytest.raises(ValueError, match="path"):
            await client.send(path, b"", more={}, whole=True, resent=int)
        assert not server.connections


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 2\r\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked\r\ncontent-length: 2",
        b"content-length: 2\r\ncontent-length: 2",
        b"content-length: 2\r\nContent-Length: 3",
        b"content-length: 2, 2",
        b"content-length: +2",
        b"content-length: -2",
        b"content-length: 0x2",
        b"content-length: 99999999999999999999999",
        b"transfer-encoding: gzip, chunked",
        b"transfer-encoding: chunked, gzip",
        b"transfer-encoding: identity",
        b"transfer-encoding : chunked",
        b"x: a\r\n b",
        b"x: \0",
    ],
)
async def test_an_answer_whose_end_is_doubtful_is_refused(head: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    async with served(answer) as server, client_of(own(server.port)) as client:
        with pytest.raises(Unreached, match="does not answer in HTTP"):
            await asked(client)
        await eventually(lambda: server.open == 0)


SMUGGLED = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nsmuggled"


@pytest.mark.parametrize("more", [b"x", b"H", SMUGGLED, SMUGGLED[:20], b"\0", b"0\r\n\r\n"])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "first",
    [OK, CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", b"HTTP/1.1 204 None\r\n\r\n", b"HTTP/1.1 304 Same\r\netag: 1\r\n\r\n"],
)
async def test_what_comes_after_an_answer_is_no_answer_to_the_next_request(
    first: bytes, more: bytes, later: bool
) -> None:
    async def answer(asked: Asked) -> None:
        if len(server.asked) > 1:
            await asked.say(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nown")
        elif later:
            await asked.say(first)
            await asyncio.sleep(0.01)
            await asked.say(more)
        else:
            await asked.say(first + more)

    async with served(answer) as server, client_of(own(server.port)) as client:
        assert await asked(client) == (b"" if b" 204 " in first or b" 304 " in first else b"hi")
        await eventually(lambda: not open_ones(client))
        assert await asked(client) == b"own"
        assert [a.connection for a in server.asked] == [1, 2]


async def test_an_answer_to_half_a_request_leaves_no_connection_to_be_used() -> None:
    release = asyncio.Event()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too large\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        await release.wait()

    async with listening(early, limit=1 << 10) as port, client_of(own(port)) as client:
        response = await begun(client, b"x" * 30_000_000, whole=True)
        assert response.status == 413
        response.release()
        assert not open_ones(client)
        release.set()


FOR_EVER = 20_000_000
"""More bytes than two sockets hold between them."""


async def flooded(begins: bytes, again: bytes) -> BaseException:
    """What comes of a server that says the same for ever."""
    sent = 0

    async def answer(asked: Asked) -> None:
        nonlocal sent
        await asked.say(begins)
        with suppress(OSError):
            while not asked.writer.is_closing():
                await asked.say(again * (4096 // len(again) + 1))
                sent += 4096
                if sent > FOR_EVER:
                    return

    async with served(answer) as server, client_of(own(server.port)) as client:
        async with asyncio.timeout(10):
            with pytest.raises((Unreached, Cut)) as raised:
                await asked(client)
        await eventually(lambda: server.open == 0)
    assert sent < FOR_EVER
    return raised.value


@pytest.mark.parametrize(
    ("begins", "again"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y"),
        (b"HTTP/1.1 200 OK\r\n", b"y"),
        (b"HTTP/1.1 200 ", b"O"),
        (b"", b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (CHUNKED + b"1;", b"x"),
        (CHUNKED, b"0"),
        (CHUNKED + b"0\r\n", b"x: y\r\n"),
        (CHUNKED + b"0\r\nx: ", b"y"),
    ],
)
async def test_framing_without_an_end_is_given_up(begins: bytes, again: bytes) -> None:
    error = await flooded(begins, again)
    assert isinstance(error, Cut if begins.startswith(CHUNKED) else Unreached)


async def test_a_head_may_be_long_but_not_too_long() -> None:
    def answer(fields: int, size: int) -> bytes:
        head = b"".join(b"x-%d: %b\r\n" % (n, b"y" * size) for n in range(fields))
        return b"HTTP/1.1 200 OK\r\n" + head + b"content-length: 2\r\n\r\nhi"

    for fields, size, right in (
        (FIELDS_LIMIT - 1, 8, True),
        (FIELDS_LIMIT, 8, False),
        (7, HEAD_LIMIT // 8, True),
        (9, HEAD_LIMIT // 8, False),
    ):
        async with served(answer(fields, size)) as server, client_of(own(server.port)) as client:
            if right:
                assert await asked(client) == b"hi"
            else:
                with pytest.raises(Unreached, match="does not answer in HTTP"):
                    await asked(client)


async def test_a_server_waits_for_a_reader_that_is_slow() -> None:
    size, sent = 40_000_000, 0

    async def answer(asked: Asked) -> None:
        nonlocal sent
        await asked.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            await asked.say(b"x" * 100_000)
            sent += 100_000

    async with served(answer) as server, client_of(own(server.port)) as client:
        for whole in (False, True):
            sent = 0
            response = await begun(client, whole=whole)
            await asyncio.sleep(0.2)
            held = sent
            assert BUFFERED < held < size // 2
            assert len(await rest(response)) == size
            response.release()
        assert server.connections == 1


async def test_an_answer_that_drips_is_read_byte_by_byte() -> None:
    async def answer(asked: Asked) -> None:
        for byte in CHUNKED + b"2;x=1\r\nhi\r\n3\r\n yo\r\n0\r\nx: y\r\n\r\n":
            await asked.say(bytes([byte]))
            await asyncio.sleep(0)

    async with served(answer) as server, client_of(own(server.port)) as client:
        assert await asked(client) == await asked(client, whole=True) == b"hi yo"
        assert server.connections == 1


async def test_a_bomb_is_made_a_piece_at_a_time() -> None:
    packed = gzip.compress(b"\0" * 50_000_000)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with served(head + packed) as server, client_of(own(server.port)) as client:
        response = await begun(client, whole=True)
        blocks = [len(await response.block()) for _ in range(5)]
        assert 0 < max(blocks) <= 1 << 20
        assert not response.ended
        response.release()


async def test_a_bomb_counts_by_what_it_would_be() -> None:
    packed = gzip.compress(b"\0" * (BODY_LIMIT + 1), 1)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with served(head + packed) as server:
        with pytest.raises(UpstreamBroken, match="more than 64 MiB"):
            await told(f"http://127.0.0.1:{server.port}/v1")


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, gzip"])
async def test_an_encoding_that_nobody_asked_for_is_named(encoding: bytes) -> None:
    status = b"200 OK"

    async def answer(asked: Asked) -> None:
        head = b"HTTP/1.1 %b\r\ncontent-encoding: %b\r\ncontent-length: 2\r\n\r\nhi"
        await asked.say(head % (status, encoding))

    async with served(answer) as server:
        async with client_of(own(server.port)) as client:
            with pytest.raises(Encoded, match=encoding.decode()):
                await asked(client)
        upstream = OpenAIUpstream(name="fast", base_url=f"http://127.0.0.1:{server.port}/v1", model="m")
        await upstream.open()
        with pytest.raises(UpstreamBroken, match=f"encoding '{encoding.decode()}', which was not asked for"):
            await upstream.send(CALL, Terms())
        status = b"429 Too many"
        with pytest.raises(UpstreamRateLimited):
            await upstream.send(CALL, Terms())
        await upstream.close()


@pytest.mark.parametrize("packed", [gzip.compress(BODY)[:-9], b"no gzip at all", gzip.compress(BODY)[:30] + b"xxx"])
async def test_a_compressed_body_that_is_broken_is_told_of(packed: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with served(head + packed) as server, client_of(own(server.port)) as client:
        with pytest.raises(Cut):
            await asked(client)


async def test_the_newest_connection_is_used_and_those_that_are_idle_are_closed() -> None:
    async def answer(asked: Asked) -> None:
        await asyncio.sleep(0.01)
        await asked.say(OK)

    async with served(answer) as server, client_of(own(server.port, idle=0.2)) as client:
        await asyncio.gather(*(asked(client) for _ in range(5)))
        assert server.open == 5
        used: set[int] = set()
        for _ in range(30):
            await asked(client)
            used.add(server.asked[-1].connection)
        assert len(used) == 1
        await eventually(lambda: server.open <= 1)
        await eventually(lambda: server.open == 0)
        assert await asked(client) == b"hi"


async def test_a_connection_that_the_server_closes_while_it_is_idle_is_forgotten() -> None:
    async def answer(asked: Asked) -> None:
        await asked.say(OK)
        asked.writer.close()

    async with served(answer) as server, client_of(own(server.port)) as client:
        for _ in range(3):
            assert await asked(client) == b"hi"
            await eventually(lambda: server.open == 0)
            await asyncio.sleep(0.01)
        assert server.connections == 3


async def test_whoever_waits_when_the_client_is_closed_is_told() -> None:
    async def answer(asked: Asked) -> None:
        await asyncio.sleep(0.3)
        await asked.say(OK)

    async with served(answer) as server:
        client = own(server.port, connections=1)
        tasks = [asyncio.create_task(asked(client)) for _ in range(3)]
        await eventually(lambda: len(server.asked) == 1)
        await client.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, Unreached) for result in results)
        with pytest.raises(Unreached):
            await asked(client)


@pytest.mark.parametrize("ends", [True, False])
async def test_a_stream_is_over_with_its_last_word_whether_or_not_the_server_then_ends_it(ends: bool) -> None:
    chunk = b'data: {"choices":[{"index":0,"delta":{"content":"word"},"finish_reason":"stop"}]}\n\n'

    async def answer(asked: Asked) -> None:
        await asked.say(CHUNKED + b"%x\r\n%b\r\n" % (len(chunk), chunk), b"e\r\ndata: [DONE]\n\n\r\n")
        await asyncio.sleep(0.02)
        if ends:
            await asked.say(b"0\r\n\r\n")

    async def emit(_: Delta) -> None: ...

    async with served(answer) as server:
        upstream = OpenAIUpstream(name="fast", base_url=f"http://127.0.0.1:{server.port}/v1", model="m")
        await upstream.open()
        for _ in range(2):
            async with asyncio.timeout(1):
                assert (await upstream.send(CALL, Terms(emit=emit))).text == "word"
        await upstream.close()
        assert server.connections == (1 if ends else 2)


# ---- names and addresses ----


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str, seconds: float = 0.0) -> list[str]:
    """From now on any name leads to these addresses; the names that were looked up."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        asked.append(host)
        time.sleep(seconds)
        return [info for address in addresses for info in real(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


async def test_a_name_is_looked_up_once_for_all_who_ask_and_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(OK) as server:
        names = resolving(monkeypatch, "127.0.0.1", seconds=0.2)
        async with client_of(own(server.port, host="somewhere.test")) as client:
            waiting = asyncio.gather(*(asked(client) for _ in range(8)))
            turns = 0
            while not waiting.done():
                turns += 1
                await asyncio.sleep(0.005)
            assert turns > 5
            assert await waiting == [b"hi"] * 8
    assert names == ["somewhere.test"]
    assert server.asked[0].head.count(b"host: somewhere.test:%d\r\n" % server.port) == 1


async def test_a_look_up_counts_as_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "127.0.0.1", seconds=0.5)
    async with client_of(own(9, host="somewhere.test", connect_timeout=0.1)) as client:
        with pytest.raises(NotInTime):
            await asked(client)


async def test_where_one_address_refuses_or_is_silent_another_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(OK) as server:
        resolving(monkeypatch, "127.0.0.2", "127.0.0.1")
        async with client_of(own(server.port, host="somewhere.test")) as client:
            assert await asked(client) == b"hi"
        # A full backlog: the kernel leaves further connections unanswered.
        with socket.socket() as silent:
            silent.bind(("127.0.0.2", server.port))
            silent.listen(0)
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.2", server.port))
            async with client_of(own(server.port, host="somewhere.test", connect_timeout=2.0)) as client:
                assert await asked(client) == b"hi"
            async with client_of(own(server.port, host="127.0.0.2", connect_timeout=0.1)) as client:
                resolving(monkeypatch, "127.0.0.2", "127.0.0.2")
                with pytest.raises(NotInTime):
                    await asked(client)
            for filler in fillers:
                filler.close()


async def test_an_address_of_ipv6_is_reached_and_named_in_brackets() -> None:
    served = Served(lambda asked: asked.say(OK))
    try:
        server = await asyncio.start_server(served.on_connection, "::1", 0)
    except OSError:
        pytest.skip("there is no IPv6 here")
    port = server.sockets[0].getsockname()[1]
    async with client_of(own(port, host="::1")) as client:
        assert await asked(client) == b"hi"
    assert b"\r\nhost: [::1]:%d\r\n" % port in served.asked[0].head
    server.close()
    await eventually(lambda: served.open == 0)


# ---- TLS ----


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of "localhost" that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not here")
    folder = tmp_path_factory.mktemp("certificates")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=30)
    return folder


def serving_tls(certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@loops
def test_tls_is_spoken_with_whom_the_system_trusts(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    run_on(loop, spoken_by_tls(certificates, monkeypatch))


async def spoken_by_tls(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[str | None] = []

    async def answer(asked: Asked) -> None:
        spoken.append(asked.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await asked.say(CHUNKED + b"2\r\nhi\r\n", b"0\r\n\r\n")

    async with served(answer, serving_tls(certificates)) as server:
        async with client_of(own(server.port, scheme="https", host="localhost")) as client:
            with pytest.raises(Unreached, match=r"TLS failed .*self.signed"):
                await asked(client)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "cert.pem"))
        async with client_of(own(server.port, scheme="https", host="localhost")) as client:
            assert [await asked(client) for _ in range(3)] == [b"hi"] * 3
            assert await asked(client, b"x" * 3_000_000, whole=True) == b"hi"
            assert len({a.connection for a in server.asked}) == 1
        async with client_of(own(server.port, scheme="https", host="127.0.0.1")) as client:
            with pytest.raises(Unreached, match=r"TLS failed .*127\.0\.0\.1"):
                await asked(client)
        assert set(spoken) == {"http/1.1"}
        assert b"host: localhost:%d\r\n" % server.port in server.asked[0].head


@loops
def test_a_server_that_does_not_speak_tls_is_named_and_one_that_is_silent_is_too_late(loop: str) -> None:
    run_on(loop, not_spoken())


async def not_spoken() -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    for handler, error, seconds in ((closing, Unreached, 5.0), (silent, NotInTime, 0.3)):
        async with (
            listening(handler) as port,
            client_of(own(port, scheme="https", connect_timeout=seconds)) as client,
        ):
            with pytest.raises(error):
                await asked(client)


# ---- laws ----


class Wire(asyncio.Transport):
    """A connection whose other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Direct(HTTPClient):
    """The client over wires."""

    def __init__(self, connections: int = 9) -> None:
        super().__init__(scheme="http", host="h", port=80, headers={}, connections=connections, connect_timeout=1)
        self.wires: list[tuple[Any, Wire]] = []

    async def _connected(self) -> Any:
        connection, wire = _Connection(self, asyncio.get_running_loop()), Wire()
        connection.connection_made(wire)
        self.wires.append((connection, wire))
        return connection


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_comes_with_the_end_of_an_answer_is_seen_before_the_connection_is_used_again() -> None:
    client = Direct()
    task = asyncio.create_task(asked(client))
    await asyncio.sleep(0)
    (connection, wire), *_ = client.wires
    connection.data_received(OK)
    connection.data_received(SMUGGLED)
    assert await task == b"hi"
    assert wire.aborted


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("leaving", [False, True])
async def test_a_place_that_is_given_to_one_who_leaves_goes_to_the_next(lost: bool, leaving: bool) -> None:
    client = Direct(connections=1)
    tasks = [asyncio.create_task(asked(client)) for _ in range(3)]
    await asyncio.sleep(0)
    first, wire = client.wires[0]
    first.data_received(b"nonsense" if lost else OK)
    while not (lost or tasks[0].done()):  # noqa: ASYNC110  (turn by turn)
        await asyncio.sleep(0)
    # The first of those who wait has been given the place, and has not had its turn to notice.
    assert wire.aborted is lost
    if leaving:
        tasks[1].cancel()
    else:
        await turns()
        client.wires[-1][0].data_received(OK)
    await turns()
    client.wires[-1][0].data_received(OK)
    async with asyncio.timeout(1):
        assert await tasks[2] == b"hi"
        done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[0], Unreached) if lost else done[0] == b"hi"
    assert isinstance(done[1], asyncio.CancelledError) if leaving else done[1] == b"hi"
    assert len(client.wires) == 1 + lost


pieces = st.lists(st.binary(min_size=1, max_size=40), max_size=5)
values = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=9)
names = st.sampled_from(["x-a", "Server", "date", "X-Request-ID"])


@given(
    data=st.data(),
    parts=pieces,
    framing=st.sampled_from(["length", "chunked", "close"]),
    interim=st.integers(0, 2),
    fields=st.lists(
        st.tuples(names, st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=9)), max_size=4
    ),
    extra=st.binary(max_size=6) | st.just(SMUGGLED),
    whole=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_an_answer_cut_anywhere_is_the_same_answer_and_what_follows_it_is_never_believed(
    data: st.DataObject,
    parts: list[bytes],
    framing: str,
    interim: int,
    fields: list[tuple[str, str]],
    extra: bytes,
    whole: bool,
) -> None:
    body = b"".join(parts)
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    stream = b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n" * interim + b"HTTP/1.1 200 OK\r\n" + head.encode()
    if framing == "length":
        stream += b"content-length: %d\r\n\r\n%b" % (len(body), body)
    elif framing == "chunked":
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        stream += b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    else:
        extra = b""
        stream += b"\r\n" + body
    told = stream + extra
    places = st.integers(0, len(told)) | st.just(len(stream))
    cuts = sorted(data.draw(st.lists(places, max_size=8)))

    async def run() -> None:
        client = Direct()
        task = asyncio.create_task(asked(client, whole=whole))
        await asyncio.sleep(0)
        (connection, wire), *_ = client.wires
        for start, end in pairwise([0, *cuts, len(told)]):
            if end > start and not wire.aborted:
                connection.data_received(told[start:end])
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
        if framing == "close":
            connection.connection_lost(None)
        async with asyncio.timeout(1):
            assert await task == body
        # Blank lines are no answer to anything; all else that follows ends the connection.
        if extra.strip(b"\r\n"):
            assert wire.aborted
        if not extra and framing != "close":
            assert not wire.aborted
            again = asyncio.create_task(asked(client))
            await asyncio.sleep(0)
            assert len(client.wires) == 1
            connection.data_received(OK)
            assert await again == b"hi"

    asyncio.run(run())


@given(st.lists(st.binary(max_size=60), max_size=8), st.booleans())
@settings(max_examples=400, deadline=None)
def test_whatever_comes_ends_in_an_answer_or_an_error_of_the_client(blocks: list[bytes], whole: bool) -> None:
    async def run() -> None:
        client = Direct()
        task = asyncio.create_task(asked(client, whole=whole))
        await asyncio.sleep(0)
        (connection, wire), *_ = client.wires
        for block in [b"HTTP/1.1 200 OK\r\n", *blocks]:
            if not wire.aborted:
                connection.data_received(block)
        connection.connection_lost(None)
        async with asyncio.timeout(1):
            result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(result, (bytes, Unreached, Cut, Encoded))

    asyncio.run(run())


# ---- nothing is left behind ----


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def storm(port: int, seed: int) -> None:
    """Many calls at once against a server that does everything wrong, some of them cancelled at any moment."""
    dice = random.Random(seed)
    client = own(port, connections=20, idle=0.05, connect_timeout=1.0)

    async def one() -> None:
        try:
            async with asyncio.timeout(dice.choice([0.001, 0.005, 0.02, 2.0])):
                body = await asked(client, whole=dice.random() < 0.5)
            assert body in (b"hi", b"hi yo")
        except (TimeoutError, Unreached, NotInTime, Cut):
            pass

    for _ in range(4):
        await asyncio.gather(*(one() for _ in range(75)))
    # After all of it, the pool has lost no place.
    got = await asyncio.gather(*(asked(client, b"well") for _ in range(20)))
    assert got == [b"hi"] * 20
    await client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="it counts what the kernel lists in /proc")
@loops
def test_no_descriptor_and_no_task_is_left_after_a_storm(loop: str) -> None:
    dice = random.Random(1)

    async def answer(asked: Asked) -> None:
        if asked.body == b"well":
            await asked.say(OK)
            return
        await asyncio.sleep(dice.choice([0.0, 0.0, 0.003, 0.02]))
        match dice.randrange(9):
            case 0:
                asked.reset()
            case 1:
                asked.writer.close()
            case 2:
                await asked.say(OK[: dice.randrange(len(OK))])
                asked.reset()
            case 3:
                await asked.say(OK + b"more")
            case 4:
                await asked.say(CHUNKED, b"2\r\nhi\r\n")
                await asyncio.sleep(0.01)
                await asked.say(b"3\r\n yo\r\n0\r\n\r\n")
            case 5:
                await asked.say(b"nonsense")
            case 6:
                await asked.say(OK)
                asked.writer.close()
            case _:
                await asked.say(OK)

    async def run() -> None:
        async with served(answer) as server:
            await storm(server.port, 7)
        left = asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}
        await eventually(lambda: all(task.done() for task in left))

    run_on(loop, asyncio.sleep(0))
    before = descriptors()
    run_on(loop, run())
    assert descriptors() == before


# ---- through a proxy of the environment ----


class Proxy:
    """A forward proxy: requests in absolute form, and tunnels."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.heads: list[bytes] = []
        self.port = 0

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipes: list[asyncio.Task[None]] = []
        there: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            self.lines.append(f"{method} {target}")
            port = int(target.rpartition(":")[2]) if method == "CONNECT" else urlsplit(target).port
            back, there = await asyncio.open_connection("127.0.0.1", port)
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                path = urlsplit(target).path.encode()
                there.write(head.replace(target.encode(), path, 1))
            pipes = [asyncio.create_task(_pipe(reader, there)), asyncio.create_task(_pipe(back, writer))]
            await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            for pipe in pipes:
                pipe.cancel()
            for end in (writer, there):
                if end is not None:
                    end.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def proxying() -> AsyncGenerator[Proxy]:
    proxy = Proxy()
    async with listening(proxy.on_connection) as proxy.port:
        yield proxy


ANSWERED = b'{"model":"m","choices":[{"index":0,"message":{"content":"through"},"finish_reason":"stop"}]}'


def a_proxy_is_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", address)
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.setenv("HTTPS_PROXY", address)


async def told(base_url: str, **more: Any) -> str:
    upstream = OpenAIUpstream(name="fast", base_url=base_url, model="m", **more)
    await upstream.open()
    try:
        return (await upstream.send(CALL, Terms())).text
    finally:
        await upstream.close()


async def test_a_proxy_that_the_environment_names_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWERED), ANSWERED)
    async with served(answer) as server, proxying() as proxy:
        a_proxy_is_named(monkeypatch, f"http://me:pass%21@127.0.0.1:{proxy.port}")
        assert await told(f"http://api.provider.test:{server.port}/v1", api_key="k") == "through"
        assert proxy.lines == [f"POST http://api.provider.test:{server.port}/v1/chat/completions"]
        assert b"proxy-authorization: basic bwu6cgfzcye=" in proxy.heads[0].lower()
        assert b"host: api.provider.test" in server.asked[0].head.lower()
        assert b"Bearer k" in server.asked[0].head
        # On this machine there is none, nor where it is not wanted.
        assert await told(f"http://127.0.0.1:{server.port}/v1") == "through"
        assert len(proxy.lines) == 1
        monkeypatch.setenv("no_proxy", "provider.test")
        with pytest.raises(UpstreamUnreachable):
            await told("http://127.0.0.1:9/v1")
        assert len(proxy.lines) == 1


async def test_a_tunnel_is_dug_with_the_proxys_password_and_not_with_our_key(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWERED), ANSWERED)
    async with served(answer, serving_tls(certificates)) as server, proxying() as proxy:
        a_proxy_is_named(monkeypatch, f"http://me:pass%21@127.0.0.1:{proxy.port}")
        # It signs itself, which is seen only at the end of the tunnel.
        with pytest.raises(UpstreamUnreachable, match=r"TLS failed .*self.signed"):
            await told(f"https://localhost.:{server.port}/v1", api_key="secret-key")
        assert proxy.lines == [f"CONNECT localhost.:{server.port}"]
        (head,) = proxy.heads
        assert b"secret-key" not in head
        assert head.lower().count(b"authorization") == 1
        assert b": Basic bWU6cGFzcyE=\r\n" in head


async def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        a_proxy_is_named(monkeypatch, f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(
            UpstreamUnreachable, match=r"the proxy of the environment does not connect; check HTTPS_PROXY"
        ):
            await told("https://api.provider.test/v1")


def test_aiohttp_is_imported_only_for_a_proxy() -> None:
    code = (
        "import sys, asyncio\n"
        "from asmodel_plugins.openai_upstream import OpenAIUpstream\n"
        "up = OpenAIUpstream(name='f', base_url='http://127.0.0.1:9/v1', model='m')\n"
        "asyncio.run(up.open())\n"
        "print('aiohttp' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert said.stdout.strip() == "False", said.stderr
