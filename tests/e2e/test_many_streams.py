"""Five hundred clients that stream at once, from one worker."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving import Server, eventually, serving, upstream
from tests.timed import in_time, timed

from asmodel.testing import ScriptedServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

CLIENTS = 500
WORDS = 60
ANSWER = " ".join(f"word{n}" for n in range(WORDS))
FLAT = 30_000_000
"""Bytes by which the server may have grown after as many streams again."""


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[None]:
    """Room for the connections of both ends, which the server inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * CLIENTS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = hard if hard == resource.RLIM_INFINITY else max(hard, wanted)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        except ValueError:  # What is more than the hard limit is for root to allow.
            pytest.skip(f"the system allows {hard} open files, and this needs {wanted}")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda body: ANSWER) as made:
        yield made


@pytest.fixture(scope="module")
def server(up: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = upstream(up.base_url, concurrency=2 * CLIENTS, retries=0)
    with serving(tmp_path_factory.mktemp("many"), settings) as made:
        yield made


def resident(server: Server) -> int:
    try:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
    except OSError:
        return 0
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


class Client:
    """One that streams, by hand, so that five hundred of them are no load of their own."""

    def __init__(self, server: Server, model: str, number: int) -> None:
        self._port = server.port
        body: dict[str, Any] = {"model": model, "stream": True}
        # A question of its own each, or they would share what is bought.
        body["messages"] = [{"role": "user", "content": f"question {number}"}]
        self._body = json.dumps(body).encode()
        self.said = bytearray()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def begin(self) -> None:
        """Ask, and wait until the stream is open."""
        sock = socket.socket()
        # Little room, so that what is not read is held up at the server.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=4096)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        self._writer.write(
            f"{head}connection: close\r\ncontent-length: {len(self._body)}\r\n\r\n".encode() + self._body
        )
        self.said += await self._reader.readline()
        assert self.said.startswith(b"HTTP/1.1 200 "), bytes(self.said)

    async def read_slowly(self) -> None:
        while part := await self._reader.read(2048):
            self.said += part
            await asyncio.sleep(0.1)
        await self.leave()

    async def leave(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    @property
    def content(self) -> str:
        chunks = [json.loads(line[6:]) for line in bytes(self.said).split(b"\n") if line.startswith(b"data: {")]
        assert bytes(self.said).count(b"data: [DONE]") == 1
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["stop"]
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


async def all_read(server: Server, model: str, first: int) -> list[Client]:
    clients = [Client(server, model, first + n) for n in range(CLIENTS)]
    await asyncio.gather(*(client.begin() for client in clients))
    await asyncio.gather(*(client.read_slowly() for client in clients))
    return clients


@pytest.mark.parametrize("model", ["plain", "default"])
async def test_each_of_five_hundred_slow_clients_gets_all_its_chunks(
    model: str, server: Server, up: ScriptedServer
) -> None:
    up.clear()
    up.token_delay = 0.05
    sizes: list[int] = []
    for turn in range(3):
        for client in await all_read(server, model, turn * CLIENTS):
            assert client.content == ANSWER
        sizes.append(resident(server))
    assert up.max_in_flight > 0.9 * CLIENTS, "they were there at once"
    assert len(up.requests) == 3 * CLIENTS
    grown = sizes[-1] - sizes[0]
    print(f"{model}: {[round(size / 1e6) for size in sizes]} MB")
    assert grown < FLAT, f"it has grown by {grown / 1e6:.0f} MB"
    assert "Traceback" not in server.said


@timed
@pytest.mark.parametrize("model", ["plain", "default"])
async def test_the_upstream_calls_of_those_who_leave_stop_within_a_second_and_those_of_others_go_on(
    model: str, server: Server, up: ScriptedServer
) -> None:
    up.clear()
    up.token_delay = 0.25
    clients = [Client(server, model, 1_000_000 + n) for n in range(CLIENTS)]
    await asyncio.gather(*(client.begin() for client in clients))
    leaving, staying = clients[: CLIENTS // 2], clients[CLIENTS // 2 :]
    reading = asyncio.gather(*(client.read_slowly() for client in staying))
    await asyncio.sleep(1.0)
    left_at = time.monotonic()
    await asyncio.gather(*(client.leave() for client in leaving))
    await asyncio.to_thread(eventually, "only the others go on", lambda: up.in_flight == len(staying), 10.0)
    seen = sorted(r.left_at - left_at for r in up.requests if r.left_at is not None)
    assert len(seen) == len(leaving)
    print(f"{model}: half of them had stopped after {seen[len(seen) // 2]:.2f} s, the last after {seen[-1]:.2f} s")
    await reading
    assert all(client.content == ANSWER for client in staying)
    in_time(seen[-1], 1.0)
    assert up.in_flight == 0
