"""What the server's own connections add to uvicorn's: bounds, and knowing at once what ASGI has to be awaited for."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.serving import PATIENCE, Server, eventually, serving, upstream
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from asmodel.connections import Cycle
from asmodel.testing import ScriptedServer

PROGRAM = '''
from asmodel import Run, program, step


@step
def ask(question: str) -> str:
    return question


@program("once")
async def once(run: Run) -> str:
    """Asks once."""
    return await run(ask, run.question)
'''


@pytest.fixture(scope="module")
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer() as made:
        yield made


@pytest.fixture(scope="module")
def server(up: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("connections")
    (folder / "programs").mkdir()
    (folder / "programs" / "once.py").write_text(PROGRAM)
    with serving(folder, 'program_folders = ["programs"]\n' + upstream(up.base_url, retries=0)) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(up: ScriptedServer) -> None:
    up.delay = 0.0
    up.clear()


def request(question: str, *, model: str = "once", headers: str = "", **body: Any) -> bytes:
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}], **body}
    data = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def responses(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """That many responses, each of which says how long it is."""
    data = b""
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        head, end, rest = data.partition(b"\r\n\r\n")
        if end:
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            if len(rest) >= length:
                found.append((int(head[9:12]), rest[:length]))
                data = rest[length:]
                continue
        part = connection.recv(65_536)
        assert part, "the connection was closed"
        data += part
    return found


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def test_requests_that_are_sent_ahead_are_answered_in_their_order(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"".join(request(f"ahead {i}") for i in range(5)))
        answers = responses(connection, 5)
    assert [status for status, _ in answers] == [200] * 5
    assert len({json.loads(body)["id"] for _, body in answers}) == 5


def test_a_body_that_comes_byte_by_byte_is_the_same_request(server: Server) -> None:
    whole = request("drip")
    with connect(server) as connection:
        for at in range(0, len(whole), 7):
            connection.sendall(whole[at : at + 7])
            time.sleep(0.0005)
        [(status, body)] = responses(connection, 1)
    assert status == 200
    assert json.loads(body)["asmodel"]["program"] == "once"


def test_the_rest_of_a_body_is_waited_for_a_moment_only_though_timers_come_early() -> None:
    async def waiting(wait: float) -> None:
        await asyncio.sleep(wait)
        cycle = Cycle.__new__(Cycle)
        cycle.more_body, cycle.disconnected, cycle.message_event = True, False, asyncio.Event()
        await cycle.arrival()

    async def main() -> None:
        # uvloop's clock counts milliseconds, and which of them a timer falls into is chance.
        await asyncio.wait_for(asyncio.gather(*(waiting(n / 1e4) for n in range(3_000))), timeout=PATIENCE)

    uvloop.run(main())


def test_a_client_that_waits_to_be_told_to_go_on_is_told(server: Server) -> None:
    head, _, data = request("continue", headers="expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with connect(server) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(data)
        assert responses(connection, 1)[0][0] == 200


def test_a_connection_can_be_used_for_many_requests(server: Server) -> None:
    with connect(server) as connection:
        for i in range(50):
            connection.sendall(request(f"again {i % 3}"))
            assert responses(connection, 1)[0][0] == 200


def test_a_response_says_when_it_was_made(server: Server) -> None:
    assert server.ask("GET", "/healthz").headers["date"].endswith("GMT")


def test_head_is_answered_without_a_body(server: Server) -> None:
    answered = server.ask("HEAD", "/v1/models")
    assert (answered.status, answered.body) == (200, b"")


@pytest.mark.parametrize("model", ["once", "default"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_call_with_it(
    server: Server, up: ScriptedServer, model: str, stream: bool
) -> None:
    up.delay = 30.0
    with connect(server) as connection:
        connection.sendall(request(f"leaving {model} {stream} {time.time()}", model=model, stream=stream))
        eventually("the call has reached the upstream", lambda: len(up.requests) == 1)
    eventually("the upstream has seen us leave", lambda: up.requests[0].left_at is not None)


def test_the_parts_of_uvicorn_that_we_take_the_place_of_are_there() -> None:
    """They are private and may be renamed: then requests would be answered still, at a multiple of the cost."""
    for name in ("_start_asgi_task", "on_response_complete", "timeout_keep_alive_handler", "on_headers_complete"):
        assert callable(getattr(HttpToolsProtocol, name))
    assert Cycle.__init__ is RequestResponseCycle.__init__, "an object of theirs becomes one of ours"
