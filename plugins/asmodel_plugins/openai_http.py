"""HTTP/1.1 to one server, as upstreams need it: post a body, read the answer as it comes, over kept connections.

A client of our own because the call of an upstream is the hot path of the whole server, and the ready-made ones cost
more than everything else on it. CPU of one post of 1 kB and its answer of 1.7 kB, over uvloop, with 1 / 16 / 256 at a
time, on a busy machine whose figures drift and whose order does not (tests/bench/clients.py):

    the floor: bytes out, httptools in        12 /    8 /    8 us
    this                                      18 /   11 /   13 us
    pyreqwest 0.15                            50 /   26 /   28 us
    rnet 2.4                                  84 /   34 /   39 us
    aiohttp 3.14                              65 /   50 /   70 us
    aiosonic 1.3                             150 /   70 /   70 us
    niquests 3.21                            550 /  470 /  500 us
    httpx 0.28                               900 / 1250 / 1450 us

And because it has to be known of each failure whether the server can have heard the request: what was sent on a kept
connection that the server closed meanwhile is sent again, and nothing else is. It does one method, no redirects, no
cookies and no proxies (openai_proxied.py does those). The parser is llhttp's, by httptools, which uvicorn has anyway;
what it accepts is narrower than what it could: see `_Connection`.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import httptools

HEAD_LIMIT = 64 * 1024
"""Bytes of the head of an answer, or of framing in which no body comes."""
FIELDS_LIMIT = 256
BUFFERED = 256 * 1024
"""Bytes of a body that are taken in before anybody reads them; the server waits with more."""
IDLE = 15.0
"""Seconds that a connection is kept for which there is no use."""
NAMES_KEPT = 60.0
"""Seconds that the addresses of a host are taken to be still right."""
STAGGER = 0.25
"""Seconds that the first address of a host has for itself before the next is tried as well (RFC 8305, 8)."""


class Unreached(Exception):
    """No answer has begun. `why`, and what is to be checked, as parts of a sentence."""

    def __init__(self, why: str, check: str) -> None:
        super().__init__(why)
        self.why = why
        self.check = check


class NotInTime(Exception):
    """No connection within the time for one: name look-up and TLS included."""


class Cut(Exception):
    """The connection broke, or what came was no HTTP any more, in the middle of an answer."""


class Encoded(Exception):
    """The body comes in an encoding that was not asked for and cannot be read. Its name is the message."""


class Response(Protocol):
    """An answer whose head has come. `release` it in the end: before all was read, that closes the connection."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]:
        """By names in lower case."""
        ...

    @property
    def content_type(self) -> str:
        """Without its parameters, in lower case."""
        ...

    @property
    def ended(self) -> bool:
        """Whether all of the body has been read."""
        ...

    def whole_body(self) -> bytes | None:
        """All of the body, where it has come and needs no more than to be taken; else it is read block by block."""
        ...

    async def block(self) -> bytes:
        """What has come of the body since the last block; empty at its end. Raises Cut, and Encoded."""
        ...

    def release(self) -> None: ...


class Client(Protocol):
    """Connections to one server."""

    async def send(
        self, path: str, body: bytes, *, more: Mapping[str, str], whole: bool, resent: Callable[[], object]
    ) -> Response:
        """Post the body, and wait for the head of the answer; with `whole`, for all of an answer that is small.

        `more` are headers for this request alone. `resent` is called where a server had closed the connection on which
        it was sent before anything came back; it is then sent on another. Raises Unreached and NotInTime.
        """
        ...

    async def close(self) -> None: ...


_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNSAYABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_OURS = frozenset({"content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"})
"""Where the request ends, and what else is said of the connection: nobody else's to say."""


def checked(name: str, value: str) -> tuple[str, str]:
    """The header, if it is one that may be sent. Raises ValueError, which shows no value."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an HTTP header")
    if name.lower() in _OURS:
        raise ValueError(f"the header {name!r} is the connection's own")
    if _UNSAYABLE.search(value):
        raise ValueError(f"the header {name!r} holds characters that no HTTP header can carry")
    return name.lower(), value.strip(" \t")


def _fields(headers: Mapping[str, str]) -> bytes:
    return b"".join(
        f"{name}: {value}\r\n".encode() for name, value in (checked(name, value) for name, value in headers.items())
    )


class _Wrong(Exception):
    """What came is not what an HTTP server would say."""


class _Reading:
    """An answer as it comes in on a connection."""

    __slots__ = (
        "_connection",
        "_decoder",
        "_fields",
        "_held",
        "_waiter",
        "blocks",
        "complete",
        "error",
        "framed",
        "size",
        "status",
        "whole",
    )

    def __init__(self, connection: _Connection, whole: bool) -> None:
        self._connection: _Connection | None = connection
        self._fields: Mapping[bytes, bytes] = {}
        self._decoder: _Decoder | None = None
        self._held = b""
        self._waiter: asyncio.Future[None] | None = None
        self.whole = whole
        self.status = 0
        self.framed = False
        """Whether the answer itself says where it ends; else the end of the connection does."""
        self.blocks: list[bytes] = []
        self.size = 0
        self.complete = False
        self.error: Exception | None = None

    # What its connection tells it.

    def headed(self, status: int, fields: Mapping[bytes, bytes], *, framed: bool) -> None:
        self.status = status
        self.framed = framed
        self._fields = fields
        encoding = fields.get(b"content-encoding")
        if encoding is not None and encoding.lower() not in (b"", b"identity"):
            self._decoder = _Decoder(encoding)

    def stir(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def _stirred(self) -> None:
        connection = self._connection
        if connection is None:
            raise RuntimeError("an answer is not read after it was released")
        self._waiter = connection.loop.create_future()
        await self._waiter

    async def begun(self) -> None:
        """Wait for its head."""
        while not self.status or (self.whole and not self.complete and self.size < BUFFERED):
            if self.error is not None:
                if self.status:
                    break
                raise self.error
            # As `_stirred`, without a coroutine more for each call of an upstream.
            connection = self._connection
            assert connection is not None
            waiter = self._waiter = connection.loop.create_future()
            await waiter
        self.whole = False

    @property
    def wanting(self) -> bool:
        """Whether more of it is to come."""
        return not self.complete

    # What its reader asks.

    @property
    def headers(self) -> Mapping[str, str]:
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self._fields.items()}

    @property
    def content_type(self) -> str:
        return self._fields.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()

    @property
    def ended(self) -> bool:
        return self.complete and not self.blocks and not self._held

    def whole_body(self) -> bytes | None:
        return self._taken() if self.complete and self.blocks and self._decoder is None else None

    async def block(self) -> bytes:
        while True:
            data = self._taken() if self.blocks else b""
            if self._decoder is not None:
                data, self._held = self._decoder.decoded(self._held + data)
            if data:
                return data
            if self._held:
                continue
            if self.complete:
                if self._decoder is not None and not self._decoder.whole:
                    raise Cut("a compressed answer without its end")
                return b""
            if self.error is not None:
                raise self.error
            await self._stirred()

    def _taken(self) -> bytes:
        blocks = self.blocks
        self.blocks = []
        self.size = 0
        if self._connection is not None:
            self._connection.go_on()
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def release(self) -> None:
        connection = self._connection
        if connection is not None:
            self._connection = None
            self.blocks = []
            connection.released(self)


class _Decoder:
    """A body that is compressed though that was not asked for, a bounded piece at a time."""

    PIECE = 1 << 20
    """Bytes made of one block at the most: a bomb goes off in the face of whoever counts, not in memory."""

    def __init__(self, encoding: bytes) -> None:
        self._encoding = encoding.strip().lower()
        self._zlib: Any = None

    @property
    def whole(self) -> bool:
        return self._zlib is None or self._zlib.eof

    def decoded(self, data: bytes) -> tuple[bytes, bytes]:
        """What the bytes stand for, and which of them are still to be decoded."""
        if not data:
            return b"", b""
        if self._zlib is None:
            self._zlib = zlib.decompressobj(self._window(data[0]))
        try:
            return self._zlib.decompress(data, self.PIECE), self._zlib.unconsumed_tail
        except zlib.error as error:
            raise Cut("a compressed answer that cannot be read") from error

    def _window(self, first: int) -> int:
        if self._encoding in (b"gzip", b"x-gzip"):
            return 16 + zlib.MAX_WBITS
        if self._encoding == b"deflate":
            # By RFC 9110, 8.4.1.2, it is zlib's format; some servers leave the wrapping off.
            return zlib.MAX_WBITS if first & 0x0F == 8 else -zlib.MAX_WBITS
        raise Encoded(self._encoding.decode("latin-1")[:40])


class _Connection(asyncio.Protocol):
    """One connection, with one request on it at a time.

    Refused, beyond what llhttp refuses: any framing but `chunked` or a length (llhttp: not both, and the latter once),
    heads beyond HEAD_LIMIT, and framing without a body beyond it. Whatever comes after the end of an answer, or
    unasked, ends the connection, or it would be taken for the answer to the next request.
    """

    __slots__ = (
        "_barren",
        "_client",
        "_count",
        "_head",
        "_interim",
        "_keep",
        "_parser",
        "_paused",
        "_reading",
        "_transport",
        "counted",
        "heard",
        "loop",
        "used",
    )

    def __init__(self, client: HTTPClient, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._client = client
        self._transport = cast("asyncio.Transport", None)
        self._parser = httptools.HttpResponseParser(self)
        # As lenient as other clients are; where nobody stands in between there is nothing to be smuggled by it.
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True)
        self._reading: _Reading | None = None
        self._head: list[tuple[bytes, bytes]] = []
        self._count = 0
        self._barren = 0
        self._interim = False
        self._keep = False
        self._paused = False
        self.counted = False
        self.used = False
        """Whether a request was sent on it before."""
        self.heard = False
        """Whether anything has come back since the last request."""

    @property
    def alive(self) -> bool:
        return not self._transport.is_closing()

    def secured(self, transport: asyncio.Transport) -> None:
        """From now on it speaks through TLS."""
        self._transport = transport

    def ask(self, data: bytes, *, whole: bool) -> _Reading:
        """Send a request; no other may be under way."""
        reading = self._reading = _Reading(self, whole)
        self.heard = self._keep = False
        self._count = self._barren = 0
        self._transport.write(data)
        return reading

    def released(self, reading: _Reading) -> None:
        self._reading = None
        self.used = True
        # What is left to be written belongs to a request that was answered before it was read.
        if reading.complete and self._keep and self.alive and not self._transport.get_write_buffer_size():
            self.go_on()
            self._client.freed(self)
        else:
            self.abort()

    def abort(self) -> None:
        self._keep = False
        self._transport.abort()
        self._client.dropped(self)

    def go_on(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(self)
        reading = self._reading
        if reading is None or reading.complete or reading.error is not None:
            return
        if not reading.status:
            reading.error = _closed()
        elif exc is None and not reading.framed:
            reading.complete = True
        else:
            reading.error = Cut("the connection was closed")
        reading.stir()

    def data_received(self, data: bytes) -> None:
        reading = self._reading
        if reading is None:
            self.abort()
            return
        if not reading.wanting:
            self._keep = False
            return
        self.heard = True
        self._barren += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._keep = False
            if not reading.complete:
                self._fail(reading)
                return
        if self._barren > HEAD_LIMIT and not reading.complete:
            self._fail(reading)
            return
        if reading.size > BUFFERED and not reading.complete and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        elif reading.whole and not reading.complete:
            return
        reading.stir()

    def _fail(self, reading: _Reading) -> None:
        what = "what came is no HTTP"
        if reading.status:
            reading.error = Cut(what)
        else:
            reading.error = Unreached("it does not answer in HTTP", "that the address is an HTTP server's")
        self.abort()
        reading.stir()

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._reading is None or self._reading.complete:
            raise _Wrong("something comes after the end of the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count += 1
        if self._count > FIELDS_LIMIT:
            raise _Wrong("too many headers")
        self._head.append((name, value))

    def on_headers_complete(self) -> None:
        head, self._head = self._head, []
        reading = self._reading
        status = self._parser.get_status_code()
        if status < 200:
            # 100 and 103 announce an answer, and are none; nothing was asked to which 101 would be one.
            self._interim = True
            return
        if reading is None or reading.status:
            raise _Wrong("a second head")
        fields = {name.lower(): value for name, value in head}
        if self._barren > HEAD_LIMIT and sum(len(name) + len(value) + 4 for name, value in head) > HEAD_LIMIT:
            raise _Wrong("too long a head")
        framing = fields.get(b"transfer-encoding")
        if framing is not None and framing.lower() != b"chunked":
            raise _Wrong("another framing")
        framed = framing is not None or b"content-length" in fields or status in (204, 304)
        reading.headed(status, fields, framed=framed)

    def on_body(self, data: bytes) -> None:
        reading = self._reading
        if reading is None:
            raise _Wrong("a body without an answer")
        self._barren = 0
        reading.size += len(data)
        reading.blocks.append(data)

    def on_message_complete(self) -> None:
        self._head = []  # What stands after a chunked body is not looked at.
        if self._interim:
            self._interim = False
            return
        reading = self._reading
        if reading is None:
            raise _Wrong("an end without an answer")
        reading.complete = True
        self._keep = self._parser.should_keep_alive()


def _closed() -> Unreached:
    return Unreached("the connection was closed before an answer", "that the server has not stopped")


def _insecure(why: str) -> Unreached:
    return Unreached(f"TLS failed ({why})", "the certificate and the scheme")


class HTTPClient:
    """At most `connections` connections to the server at `scheme`, `host`, `port`; the newest of the idle is used.

    `headers` are sent with each request. `connect_timeout`, and for how long a connection is kept `idle`, in seconds.
    Raises ValueError on headers that cannot be sent, and on a host that has no form in ASCII.
    """

    def __init__(
        self,
        *,
        scheme: str,
        host: str,
        port: int,
        headers: Mapping[str, str],
        connections: int,
        connect_timeout: float,
        idle: float = IDLE,
    ) -> None:
        self._tls = scheme == "https"
        self._host = _ascii(host)
        self._port = port
        shown = f"[{self._host}]" if ":" in self._host else self._host
        named = {"host": shown if port == (443 if self._tls else 80) else f"{shown}:{port}"}
        # Compressing a few kB costs both ends more than sending them.
        defaults = named | {"accept": "*/*", "accept-encoding": "identity", "user-agent": "asmodel"}
        self._headers = _fields(defaults | {name.lower(): value for name, value in headers.items()})
        self._heads: dict[str, bytes] = {}
        self._limit = connections
        self._patience = idle
        self._timeout = connect_timeout
        self._open = 0
        """Connections that there are or that are being made."""
        self._idle: dict[_Connection, float] = {}
        """Since when; the newest last."""
        self._waiters: deque[asyncio.Future[_Connection | None]] = deque()
        """Each is given a connection, or the right to make one."""
        self.live: set[_Connection] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Event | None = None
        self._closed = False
        self._context: ssl.SSLContext | None = None
        self._trusting = asyncio.Lock()
        self._addresses: tuple[float, Sequence[_Address]] = (0.0, ())
        self._looking: asyncio.Task[Sequence[_Address]] | None = None

    # -- one request

    async def send(
        self, path: str, body: bytes, *, more: Mapping[str, str], whole: bool, resent: Callable[[], object]
    ) -> Response:
        head = self._heads.get(path) or self._head(path)
        if more:
            head = head + _fields(more)
        data = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
        for left in (2, 1, 0):
            # The last time on a new one: it cannot have been closed for being idle.
            connection = (self._kept() if left else None) or await self._connection(fresh=not left)
            reused = connection.used
            reading = connection.ask(data, whole=whole)
            try:
                await reading.begun()
            except BaseException as error:
                reading.release()
                if not (left and reused and isinstance(error, Unreached) and not connection.heard):
                    raise
                resent()
            else:
                return reading
        raise AssertionError("the last round returns or raises")

    def _head(self, path: str) -> bytes:
        if any(character <= " " or character > "~" for character in path):
            raise ValueError("a path holds what no request line can")
        head = self._heads[path] = f"POST {path} HTTP/1.1\r\n".encode() + self._headers
        return head

    # -- the pool

    def _kept(self) -> _Connection | None:
        """The newest of the idle, if that can be used: what nearly every request finds, and need not wait for."""
        if not self._idle or self._closed:
            return None
        connection, _ = self._idle.popitem()
        if connection.alive:
            return connection
        self.dropped(connection)
        return None

    async def _connection(self, *, fresh: bool) -> _Connection:
        self._must_be_open()
        while self._idle:
            connection, _ = self._idle.popitem()
            if not connection.alive:
                self.dropped(connection)
            elif fresh:
                if self._open < self._limit:
                    self._idle[connection] = self._loop_time()
                    break
                connection.abort()
            else:
                return connection
        while self._open >= self._limit:
            given = await self._turn()
            if given is None:
                break
            if given.alive and not fresh:
                return given
            given.abort()
        else:
            self._open += 1
        try:
            connection = await self._connected()
            if not connection.alive:
                raise _closed()
        except BaseException:
            self._vacate()
            raise
        connection.counted = True
        self.live.add(connection)
        try:
            self._must_be_open()
        except Unreached:
            connection.abort()
            raise
        return connection

    def _must_be_open(self) -> None:
        if self._closed:
            raise _closed()

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()

    async def _turn(self) -> _Connection | None:
        """Wait, in the order of coming, for a connection, or for the right to make one."""
        waiter: asyncio.Future[_Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                # It was given one at the same moment.
                given = waiter.result()
                if given is None:
                    self._vacate()
                elif given.alive:
                    self.freed(given)
                else:
                    given.abort()
            else:
                with suppress(ValueError):
                    self._waiters.remove(waiter)
            raise

    def freed(self, connection: _Connection) -> None:
        """It can be used again."""
        if self._closed:
            connection.abort()
            return
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        now = connection.loop.time()
        self._idle[connection] = now
        if self._sweeping is None:
            self._sweeping = connection.loop.call_at(now + self._patience, self._sweep)

    def dropped(self, connection: _Connection) -> None:
        """It is not to be used again, and counts no more."""
        self._idle.pop(connection, None)
        if connection.counted:
            connection.counted = False
            self._vacate()

    def lost(self, connection: _Connection) -> None:
        """Its socket is closed."""
        self.dropped(connection)
        self.live.discard(connection)
        if not self.live and self._emptied is not None:
            self._emptied.set()

    def _vacate(self) -> None:
        """One connection less: whoever waits may make another."""
        self._open -= 1
        while self._waiters and not self._closed:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._open += 1
                waiter.set_result(None)
                return

    def _sweep(self) -> None:
        self._sweeping = None
        loop = asyncio.get_running_loop()
        old = loop.time() - self._patience + 0.001
        for connection in [connection for connection, since in self._idle.items() if since <= old]:
            connection.abort()
        if self._idle:
            self._sweeping = loop.call_at(min(self._idle.values()) + self._patience, self._sweep)

    async def close(self) -> None:
        """Close what is open; what is under way fails."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
            self._looking = None
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(_closed())
        self._waiters.clear()
        for connection in list(self.live):
            connection.abort()
        if self.live:
            self._emptied = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._emptied.wait()

    # -- one connection

    async def _connected(self) -> _Connection:
        if self._tls:
            async with self._trusting:
                # It reads the certificates of the system, which takes some milliseconds.
                self._context = self._context or await asyncio.to_thread(_trusting)
        try:
            async with asyncio.timeout(self._timeout):
                return await self._connect()
        except TimeoutError:
            raise NotInTime from None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            sock = await self._dialled(await self._resolved())
        except socket.gaierror as error:
            raise Unreached("no such host", "the host's name") from error
        except TimeoutError:
            raise
        except OSError as error:
            # The name may lead elsewhere by now.
            self._addresses = (0.0, ())
            why = os.strerror(error.errno) if error.errno else "not connected"
            raise Unreached(why, "that the server is up and the port right") from error
        transport, connection = await loop.create_connection(lambda: _Connection(self, loop), sock=sock)
        if self._context is not None:
            try:
                connection.secured(await self._secured(transport, connection, self._context))
            except BaseException:
                # At once, and not after a farewell that was never agreed on.
                transport.abort()
                raise
        return connection

    async def _secured(
        self, transport: asyncio.Transport, connection: _Connection, context: ssl.SSLContext
    ) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        name = self._host.rstrip(".")
        try:
            secured = await loop.start_tls(
                transport, connection, context, server_hostname=name, ssl_shutdown_timeout=1.0
            )
        except (OSError, ValueError) as error:  # Errors of TLS are of the first kind, impossible names of the second.
            if isinstance(error, TimeoutError):
                raise
            why = "the connection was closed" if isinstance(error, ConnectionError) else str(error)
            raise _insecure(why) from error
        # None where the server was quicker to close than we to look, which its types do not know of.
        return secured or transport

    async def _resolved(self) -> Sequence[_Address]:
        """The addresses of the host; those who ask at the same moment share one look-up."""
        loop = asyncio.get_running_loop()
        until, addresses = self._addresses
        if loop.time() < until:
            return addresses
        if self._looking is None:
            self._looking = loop.create_task(self._look_up(loop))
            self._looking.add_done_callback(self._looked_up)
        return await asyncio.shield(self._looking)

    def _looked_up(self, task: asyncio.Task[Sequence[_Address]]) -> None:
        self._looking = None
        if not task.cancelled():
            task.exception()  # Whoever asked may have left.

    async def _look_up(self, loop: asyncio.AbstractEventLoop) -> Sequence[_Address]:
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        # Families take turns, beginning with that of the first (RFC 8305, 4).
        families = list(dict.fromkeys(info[0] for info in found))
        by_family = [[(info[0], info[4]) for info in found if info[0] == family] for family in families]
        addresses: list[_Address] = []
        for place in range(max(map(len, by_family))):
            addresses += [those[place] for those in by_family if place < len(those)]
        self._addresses = (loop.time() + NAMES_KEPT, addresses)
        return addresses

    async def _dialled(self, addresses: Sequence[_Address]) -> socket.socket:
        """The first connection that comes about. Where one address is slow or refuses, the next is tried as well."""
        if len(addresses) == 1:
            return await _dial(addresses[0])
        loop = asyncio.get_running_loop()
        left = deque(addresses)
        trying: set[asyncio.Task[socket.socket]] = set()
        failed: BaseException | None = None
        winner: socket.socket | None = None
        try:
            while winner is None and (left or trying):
                if left:
                    trying.add(loop.create_task(_dial(left.popleft())))
                done, _ = await asyncio.wait(
                    trying, timeout=STAGGER if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    error = task.exception()
                    if error is not None:
                        trying.discard(task)
                        failed = failed or error
                    elif winner is None:
                        trying.discard(task)
                        winner = task.result()
        finally:
            for task in trying:
                task.add_done_callback(_hung_up)
                task.cancel()
        if winner is not None:
            return winner
        assert failed is not None
        raise failed


_Address = tuple[int, Any]
"""Family, and what that family of sockets takes for an address."""


async def _dial(address: _Address) -> socket.socket:
    sock = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        # Small requests leave at once (Nagle's algorithm would hold them back).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address[1])
    except BaseException:
        sock.close()
        raise
    return sock


def _hung_up(task: asyncio.Task[socket.socket]) -> None:
    """It has come too late."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _trusting() -> ssl.SSLContext:
    """Trusts what the system trusts, or what SSL_CERT_FILE and SSL_CERT_DIR name."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _ascii(host: str) -> str:
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        raise ValueError("the host's name has no form in ASCII") from None
