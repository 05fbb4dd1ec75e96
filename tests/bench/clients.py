"""What one call costs by each of several HTTP clients: why the upstreams of kind `openai` have a client of their own.

    uv venv clients && uv pip install --python clients uvloop httptools orjson \
        aiohttp pyreqwest aiosonic niquests httpx httpx-aiohttp rnet curl-cffi impit
    PYTHONPATH=.:plugins clients/bin/python -m tests.bench.clients

in an environment of its own, as none of them is needed by anything else here; what is not installed is left out. Each
client is a process of its own with the same shape: an async function on uvloop that posts a chat request of about 1 kB
to a server that does next to nothing, a process too, and reads the answer of 1.7 kB, or the stream of 16 tokens, each a
chunk and a write. The clients take turns, round by round, and of each figure the median is printed. CPU time is of the
client's whole process, all threads.

`floor` is a lower bound and no client: it writes bytes that were made before and counts those that come back.
`ours` is what is shipped (plugins/asmodel_plugins/openai_http.py).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import httptools
import orjson
from tests.bench import wire

HEADERS = {"authorization": "Bearer bench", "content-type": "application/json"}
PATH = "/v1/chat/completions"
CONNECTIONS = 256


def request(*, stream: bool) -> bytes:
    """The body that every client sends."""
    body: dict[str, Any] = {"model": wire.MODEL, "messages": [{"role": "user", "content": wire.text(900)}]}
    return orjson.dumps(body | ({"stream": True} if stream else {}))


@dataclass(frozen=True)
class Calls:
    """What a client can do."""

    post: Callable[[bytes], Awaitable[int]]
    """Send it, read the whole answer; how many bytes that was."""
    stream: Callable[[bytes], Awaitable[int]]
    """The same, taking the answer as it comes."""


class _Server(asyncio.Protocol):
    """Bytes that were made before, for every request that has come whole."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport = cast("asyncio.Transport", None)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        pieces = STREAMED if orjson.loads(self._body).get("stream") else WHOLE
        if self._delay:
            self._loop.call_later(self._delay, self._answer, pieces)
        else:
            self._answer(pieces)

    def _answer(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            if not self._transport.is_closing():
                self._transport.write(piece)


def _head(kind: str, framing: str) -> bytes:
    fields = (
        "date: Sat, 14 Jun 2025 12:00:00 GMT",
        "server: bench",
        f"content-type: {kind}",
        framing,
        "x-request-id: 1",
    )
    return "\r\n".join(["HTTP/1.1 200 OK", *fields, "", ""]).encode()


_ANSWER = orjson.dumps(wire.completion())
_EVENTS = [b"%x\r\n%b\r\n" % (len(event), event) for event in wire.events(usage=True)]
WHOLE = (_head("application/json", f"content-length: {len(_ANSWER)}") + _ANSWER,)
STREAMED = (_head("text/event-stream; charset=utf-8", "transfer-encoding: chunked"), *_EVENTS, b"0\r\n\r\n")


async def _serve(delay: float) -> None:
    """Until whoever started it is gone."""
    server = await asyncio.get_running_loop().create_server(lambda: _Server(delay), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    server.close()


def new_loop() -> asyncio.AbstractEventLoop:
    return cast("asyncio.AbstractEventLoop", loaded("uvloop").new_event_loop())


Opening = Callable[[int], AsyncGenerator[Calls]]
OPENINGS: dict[str, tuple[str, Opening]] = {}
"""By name: the module that it needs, and how it is opened for a port."""


def candidate(name: str, module: str) -> Callable[[Opening], Opening]:
    def add(opening: Opening) -> Opening:
        OPENINGS[name] = module, opening
        return opening

    return add


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}{PATH}"


def loaded(module: str) -> Any:
    """Of a package that may have no types, and may not be there."""
    return importlib.import_module(module)


class _Floor(asyncio.Protocol):
    """One connection that knows the request beforehand and looks at nothing in the answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._answered = loop.create_future()
        self._size = 0
        self.transport = cast("asyncio.Transport", None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._size += len(body)

    def on_message_complete(self) -> None:
        self._answered.set_result(self._size)

    async def ask(self, data: bytes) -> int:
        self._size = 0
        self._answered = self._loop.create_future()
        self.transport.write(data)
        return cast("int", await self._answered)


@candidate("floor", "httptools")
async def floor(port: int) -> AsyncGenerator[Calls]:
    loop = asyncio.get_running_loop()
    idle: list[_Floor] = []
    lines = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{lines}content-length: ".encode()

    async def post(body: bytes) -> int:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(lambda: _Floor(loop), "127.0.0.1", port)
        size = await connection.ask(head + b"%d\r\n\r\n" % len(body) + body)
        idle.append(connection)
        return size

    yield Calls(post, post)
    for connection in idle:
        connection.transport.close()


@candidate("ours", "asmodel_plugins.openai_http")
async def ours(port: int) -> AsyncGenerator[Calls]:
    client = loaded("asmodel_plugins.openai_http").HTTPClient(
        scheme="http", host="127.0.0.1", port=port, headers=HEADERS, connections=CONNECTIONS, connect_timeout=5.0
    )

    async def ask(body: bytes, whole: bool) -> int:
        response = await client.send(PATH, body, more={}, whole=whole, resent=int)
        try:
            size = 0
            while block := await response.block():
                size += len(block)
            return size
        finally:
            response.release()

    yield Calls(partial(ask, whole=True), partial(ask, whole=False))
    await client.close()


@candidate("aiohttp", "aiohttp")
async def aiohttp(port: int) -> AsyncGenerator[Calls]:
    aiohttp = loaded("aiohttp")
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:

        async def post(body: bytes) -> int:
            async with session.post(url(port), data=body, headers=HEADERS) as response:
                return len(await response.read())

        async def stream(body: bytes) -> int:
            async with session.post(url(port), data=body, headers=HEADERS) as response:
                return sum([len(chunk) async for chunk in response.content.iter_any()])

        yield Calls(post, stream)


@candidate("pyreqwest", "pyreqwest")
async def pyreqwest(port: int) -> AsyncGenerator[Calls]:
    builder = loaded("pyreqwest.client").ClientBuilder
    async with builder().default_headers(HEADERS).build() as client:

        async def post(body: bytes) -> int:
            response = await client.post(url(port)).body_bytes(body).build().send()
            return len(await response.bytes())

        async def stream(body: bytes) -> int:
            size = 0
            async with client.post(url(port)).body_bytes(body).build_streamed() as response:
                while chunk := await response.body_reader.read_chunk():
                    size += len(chunk)
            return size

        yield Calls(post, stream)


@candidate("aiosonic", "aiosonic")
async def aiosonic(port: int) -> AsyncGenerator[Calls]:
    aiosonic, connectors, pools = loaded("aiosonic"), loaded("aiosonic.connectors"), loaded("aiosonic.pools")
    pool = {":default": pools.PoolConfig(size=CONNECTIONS)}
    async with aiosonic.HTTPClient(connectors.TCPConnector(pool_configs=pool)) as client:

        async def post(body: bytes) -> int:
            response = await client.post(url(port), data=body, headers=HEADERS)
            return len(await response.content())

        async def stream(body: bytes) -> int:
            response = await client.post(url(port), data=body, headers=HEADERS)
            return sum([len(chunk) async for chunk in response.read_chunks()])

        yield Calls(post, stream)


@candidate("niquests", "niquests")
async def niquests(port: int) -> AsyncGenerator[Calls]:
    niquests = loaded("niquests")
    async with niquests.AsyncSession(pool_connections=1, pool_maxsize=CONNECTIONS) as session:

        async def post(body: bytes) -> int:
            response = await session.post(url(port), data=body, headers=HEADERS)
            return len(response.content)

        async def stream(body: bytes) -> int:
            response = await session.post(url(port), data=body, headers=HEADERS, stream=True)
            chunks = await response.iter_content(-1)
            return sum([len(chunk) async for chunk in chunks])

        yield Calls(post, stream)


def _of_httpx(client: Any, port: int) -> Calls:
    async def post(body: bytes) -> int:
        return len((await client.post(url(port), content=body, headers=HEADERS)).content)

    async def stream(body: bytes) -> int:
        async with client.stream("POST", url(port), content=body, headers=HEADERS) as response:
            return sum([len(chunk) async for chunk in response.aiter_raw()])

    return Calls(post, stream)


@candidate("httpx", "httpx")
async def httpx(port: int) -> AsyncGenerator[Calls]:
    httpx = loaded("httpx")
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:
        yield _of_httpx(client, port)


@candidate("httpx-aiohttp", "httpx_aiohttp")
async def httpx_aiohttp(port: int) -> AsyncGenerator[Calls]:
    limits = loaded("httpx").Limits(max_connections=CONNECTIONS)
    async with loaded("httpx_aiohttp").HttpxAiohttpClient(limits=limits, timeout=None) as client:
        yield _of_httpx(client, port)


@candidate("rnet", "rnet")
async def rnet(port: int) -> AsyncGenerator[Calls]:
    client = loaded("rnet").Client()

    async def post(body: bytes) -> int:
        return len(await (await client.post(url(port), body=body, headers=HEADERS)).bytes())

    async def stream(body: bytes) -> int:
        response = await client.post(url(port), body=body, headers=HEADERS)
        async with response.stream() as chunks:
            return sum([len(chunk) async for chunk in chunks])

    yield Calls(post, stream)


@candidate("curl-cffi", "curl_cffi")
async def curl_cffi(port: int) -> AsyncGenerator[Calls]:
    async with loaded("curl_cffi").AsyncSession(max_clients=CONNECTIONS) as session:

        async def post(body: bytes) -> int:
            return len((await session.post(url(port), data=body, headers=HEADERS)).content)

        async def stream(body: bytes) -> int:
            async with session.stream("POST", url(port), data=body, headers=HEADERS) as response:
                return sum([len(chunk) async for chunk in response.aiter_content()])

        yield Calls(post, stream)


@candidate("impit", "impit")
async def impit(port: int) -> AsyncGenerator[Calls]:
    async with loaded("impit").AsyncClient() as client:

        async def post(body: bytes) -> int:
            return len((await client.post(url(port), content=body, headers=HEADERS)).content)

        async def stream(body: bytes) -> int:
            async with client.stream("POST", url(port), content=body, headers=HEADERS) as response:
                return sum([len(chunk) async for chunk in response.aiter_bytes()])

        yield Calls(post, stream)


# ---- the process of one client ----


async def _measured(calls: Calls, *, stream: bool, flight: int, seconds: float) -> dict[str, float]:
    """So many tasks, each asking again once it is answered, for so long."""
    call = calls.stream if stream else calls.post
    body = request(stream=stream)
    expected = await call(body)
    done = 0
    end = time.perf_counter() + seconds

    async def ask() -> None:
        nonlocal done
        while time.perf_counter() < end:
            size = await call(body)
            if size != expected:
                raise RuntimeError(f"an answer of {size} bytes in place of {expected}")
            done += 1

    wall, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(flight):
            group.create_task(ask())
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"us": cpu / done * 1e6, "rate": done / wall}


async def _serve_orders(name: str, port: int) -> None:
    opening = asynccontextmanager(OPENINGS[name][1])
    async with opening(port) as calls:
        while line := await asyncio.to_thread(sys.stdin.buffer.readline):
            try:
                said: dict[str, Any] = await _measured(calls, **orjson.loads(line))
            except Exception as error:  # Whatever it is: it is what this client does under that load.
                said = {"error": f"{type(error).__name__}: {error}"[:200]}
            sys.stdout.buffer.write(orjson.dumps(said) + b"\n")
            sys.stdout.buffer.flush()


# ---- the benchmark ----


def _ask(process: subprocess.Popen[bytes], **order: Any) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(orjson.dumps(order) + b"\n")
    process.stdin.flush()
    said: dict[str, Any] = orjson.loads(process.stdout.readline() or b'{"error": "the process ended"}')
    return said


def _print(name: str, kind: str, cells: Sequence[Sequence[dict[str, Any]]]) -> None:
    columns: list[str] = []
    for rounds in cells:
        errors = [str(said["error"]) for said in rounds if "error" in said]
        if errors:
            columns.append(errors[0][:24])
        else:
            us, rate = (statistics.median(said[key] for said in rounds) for key in ("us", "rate"))
            columns.append(f"{us:7.0f} us {rate:7.0f}/s")
    print(f"| {name:14}| {kind:7}| " + " | ".join(f"{column:>20}" for column in columns) + " |")


def main() -> None:
    """`python -m tests.bench.clients`"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help=f"of {', '.join(OPENINGS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.7, help="of one figure in one round")
    parser.add_argument("--flight", type=int, nargs="*", default=[1, 16, 64, 256], help="calls at a time")
    parser.add_argument("--delay", type=float, default=0.0, help="milliseconds that the upstream waits")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        serving = _serve_orders(options.of, options.port) if options.port else _serve(options.delay / 1000)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(serving)
        return

    def python(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.bench.clients", *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    upstream = python("--of", "server", "--delay", str(options.delay))
    assert upstream.stdout is not None
    port = upstream.stdout.readline().decode().strip()
    clients: dict[str, subprocess.Popen[bytes]] = {}
    for name in options.only or OPENINGS:
        try:
            found = importlib.util.find_spec(OPENINGS[name][0]) is not None
        except ModuleNotFoundError:
            found = False
        if found:
            clients[name] = python("--of", name, "--port", port)
        else:
            print(f"{name} is not installed")
    cells = [(stream, flight) for stream in (False, True) for flight in options.flight]
    results: dict[tuple[str, bool, int], list[dict[str, Any]]] = {}
    try:
        for _ in range(options.rounds):
            for stream, flight in cells:
                for name, process in clients.items():
                    said = _ask(process, stream=stream, flight=flight, seconds=options.seconds)
                    results.setdefault((name, stream, flight), []).append(said)
    finally:
        for process in (*clients.values(), upstream):
            process.kill()
            process.wait()
    print(
        f"| {'client':14}| {'answer':7}| " + " | ".join(f"{flight:>12} at a time" for flight in options.flight) + " |"
    )
    print("|---" * (2 + len(options.flight)) + "|")
    for stream, kind in ((False, "whole"), (True, "stream")):
        for name in clients:
            _print(name, kind, [results[name, stream, flight] for flight in options.flight])


if __name__ == "__main__":
    main()
