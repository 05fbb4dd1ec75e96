"""So many requests at a time, with bodies of so many bytes together: what is more is refused, to come again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import MutableMapping, Sequence
from typing import Any

import orjson
import pytest

from asmodel.admission import SMALL, Admitted, Held, Overloaded, Room
from asmodel.exchange import Exchange, Gone, read_body


class Client:
    """One request, by hand: sends its body part by part, and keeps what it is answered."""

    def __init__(
        self, app: Any, body: Sequence[bytes] = (b"{}",), *, path: str = "/v1/chat/completions", length: bool = True
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.said = b""
        self.sent = 0
        headers = [(b"content-type", b"application/json")]
        if length:
            headers.append((b"content-length", str(sum(map(len, body))).encode()))
        else:
            headers.append((b"transfer-encoding", b"chunked"))
        self._body = body
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "headers": headers,
            "query_string": b"",
        }
        self.task = asyncio.get_running_loop().create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self.sent == len(self._body):
            await asyncio.Event().wait()
        part = self._body[self.sent]
        self.sent += 1
        return {"type": "http.request", "body": part, "more_body": self.sent < len(self._body)}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.said += message.get("body", b"")

    @property
    def code(self) -> str:
        return str(orjson.loads(self.said)["error"]["code"])


class App:
    """Reads a body, and answers when it is let."""

    def __init__(self, limit: int = 1_000_000) -> None:
        self.go = asyncio.Event()
        self.inside = 0
        self.read = 0
        self._limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange = Exchange(scope, receive, send)
        self.inside += 1
        try:
            body = await read_body(receive, self._limit)
            self.read += len(body)
            await self.go.wait()
            await exchange.respond(200, {"read": len(body)})
        except Gone:
            return
        except Exception as error:
            await exchange.refuse(error)  # type: ignore[arg-type]
        finally:
            self.inside -= 1


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_so_many_are_answered_at_a_time_and_the_next_is_told_to_come_again() -> None:
    inner = App()
    room = Room(requests=3)
    app = Admitted(inner, room)
    clients = [Client(app) for _ in range(3)]
    await settle()
    refused = Client(app)
    await refused.task
    assert (refused.status, refused.code, inner.inside) == (503, "overloaded", 3)
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-should-retry"] == "true"
    assert refused.headers["x-request-id"]
    assert b"in_flight" in refused.said
    assert refused.sent == 0, "before anything of it is read"
    inner.go.set()
    await asyncio.gather(*(client.task for client in clients))
    later = Client(app)
    await later.task
    assert later.status == 200
    assert (room.requests, room.body_bytes) == (0, 0)


async def test_whoever_asks_how_the_server_is_gets_an_answer() -> None:
    inner = App()
    room = Room(requests=1)
    app = Admitted(inner, room)
    client = Client(app)
    await settle()
    probes = [Client(app, path=path) for path in ("/healthz", "/readyz", "/metrics")]
    inner.go.set()
    await asyncio.gather(client.task, *(probe.task for probe in probes))
    assert [probe.status for probe in probes] == [200, 200, 200]


@pytest.mark.parametrize("length", [True, False], ids=["announced", "chunked"])
async def test_bodies_count_until_their_requests_are_over(length: bool) -> None:
    inner = App()
    room = Room(body_bytes=300_000)
    app = Admitted(inner, room)
    part = b"x" * 50_000
    clients = [Client(app, [part, part], length=length) for _ in range(3)]
    await settle()
    assert room.body_bytes == 300_000
    refused = Client(app, [part, part], length=length)
    await refused.task
    assert (refused.status, refused.code) == (503, "overloaded")
    assert b"in_flight_bytes" in refused.said
    assert room.body_bytes == 300_000
    small = Client(app, [b"{}"])
    await small.task
    assert small.status == 503
    inner.go.set()
    await asyncio.gather(*(client.task for client in clients))
    assert (room.requests, room.body_bytes) == (0, 0)


async def test_what_was_announced_and_has_not_come_takes_no_room_where_it_is_large() -> None:
    inner = App()
    room = Room(body_bytes=300_000)
    app = Admitted(inner, room)

    class Silent(Client):
        async def _receive(self) -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

    silent = [Silent(app, [b"x" * 200_000]) for _ in range(9)]
    await settle()
    assert room.body_bytes == 0
    inner.go.set()
    served = Client(app, [b"x" * 200_000])
    await served.task
    assert served.status == 200
    for client in silent:
        client.task.cancel()
    await asyncio.gather(*(client.task for client in silent), return_exceptions=True)
    assert (room.requests, room.body_bytes) == (0, 0)


async def test_of_a_body_that_is_thrown_away_no_more_counts_than_would_be_read() -> None:
    inner = App(limit=100_000)
    room = Room(body_bytes=150_000)
    app = Admitted(inner, room, largest=100_000)
    client = Client(app, [b"x" * 90_000] * 10)
    await client.task
    assert (client.status, client.code) == (413, "payload_too_large")
    assert room.body_bytes == 0


async def test_a_refusal_is_measured() -> None:
    from asmodel.meter import Meter

    said: list[str] = []

    class Noting(Meter):
        def refused(self, limit: str, program: str = "") -> None:
            said.append(limit)

    room = Room(requests=1, meter=Noting())
    app = Admitted(App(), room)
    Client(app)
    await settle()
    await Client(app).task
    full = Admitted(App(), Room(body_bytes=1, meter=Noting()))
    await Client(full).task
    assert said == ["in_flight", "in_flight_bytes"]


@pytest.mark.parametrize("seed", range(10))
async def test_the_books_are_right_whoever_leaves_and_whenever(seed: int) -> None:
    dice = random.Random(seed)
    inner = App()
    inner.go.set()
    room = Room(requests=20, body_bytes=400_000)
    app = Admitted(inner, room)
    clients: list[Client] = []
    for _ in range(200):
        parts = [b"x" * dice.choice((1, 100, SMALL, 90_000))] * dice.randrange(1, 4)
        clients.append(Client(app, parts, length=dice.random() < 0.7))
        if dice.random() < 0.3:
            dice.choice(clients).task.cancel()
        if dice.random() < 0.5:
            await asyncio.sleep(0)
        assert room.requests <= 20
        assert room.body_bytes <= 400_000
    await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
    assert (room.requests, room.body_bytes) == (0, 0)
    assert {client.status for client in clients} <= {0, 200, 503}


async def test_what_a_request_brings_in_besides_its_body_counts_until_it_is_let_go() -> None:
    room = Room(body_bytes=100_000)
    app = Admitted(App(), room)
    held = Held(room)
    held.add(60_000)
    held.add(39_999)
    assert not room.admits(2)
    refused = Client(app, [b"{}"])
    await refused.task
    assert (refused.status, refused.code) == (503, "overloaded")
    with pytest.raises(Overloaded, match="in_flight_bytes"):
        held.add(2)
    assert room.body_bytes == 99_999
    held.let_go()
    held.let_go()
    assert room.body_bytes == 0
