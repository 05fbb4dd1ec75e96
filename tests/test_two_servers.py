"""Two servers on one cache folder, and one of two processes: under load nothing is lost, and little bought twice."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.serving import Server, serving, upstream

from asmodel.testing import ScriptedServer

PROGRAM = '''
"""Five steps, of which runs share some."""

from asmodel import Run, gather, program, step


@step(model="writer", temperature=0)
def piece(number: int) -> str:
    return f"piece {number}"


@program("pieces")
async def pieces(run: Run) -> str:
    """The pieces that are asked for, joined."""
    return " ".join(await gather(run(piece, int(number)) for number in run.question.split()))
'''

CLIENTS = 6


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    def answer(body: dict[str, Any]) -> str:
        return f"<{body['messages'][-1]['content']}>"

    with ScriptedServer(answer, delay=0.005, keep=1_000_000) as server:
        yield server


class Load:
    """Clients that ask for pieces, now of this server and now of that, until their time is up."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._lock = threading.Lock()
        self.wrong: list[str] = []
        self.asked = 0
        self.wanted: set[int] = set()
        self.calls = 0
        """Purchases by the receipts."""

    def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(self._client, seed, until) for seed in range(CLIENTS)]:
                done.result()

    def _client(self, seed: int, until: float) -> None:
        chance = random.Random(seed)
        connections = [http.client.HTTPConnection("127.0.0.1", s.port, timeout=20) for s in self._servers]
        number = 0
        while time.monotonic() < until:
            number += 1
            # Clients move on together through the numbers, so that they often want the same at the same time.
            base = int((time.monotonic() % 1000) * 20)
            numbers = [base + chance.randrange(30) for _ in range(5)]
            self.ask(chance.choice(connections), numbers)
        for connection in connections:
            connection.close()

    def ask(self, connection: http.client.HTTPConnection, numbers: list[int]) -> None:
        question = " ".join(map(str, numbers))
        body = json.dumps({"model": "pieces", "messages": [{"role": "user", "content": question}]})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        data = json.loads(response.read())
        expected = " ".join(f"<piece {n}>" for n in numbers)
        with self._lock:
            self.asked += 1
            self.wanted |= set(numbers)
            if response.status != 200 or data["choices"][0]["message"]["content"] != expected:
                self.wrong.append(f"{response.status} {data}")
            else:
                self.calls += data["asmodel"]["upstream_calls"]


def bear(tmp_path: Path, up: ScriptedServer, seconds: float, *, servers: int, workers: int) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "pieces.py").write_text(PROGRAM)
    settings = 'program_folders = ["programs"]\n' + upstream(up.base_url)
    with ExitStack() as stack:
        # Folders of their own, for what they print; one cache.
        shared = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path / "state")}
        running: list[Server] = []
        for number in range(servers):
            folder = tmp_path / f"server-{number}"
            folder.mkdir()
            (folder / "programs").symlink_to(tmp_path / "programs")
            arguments = ["--workers", str(workers)] if workers > 1 else []
            running.append(stack.enter_context(serving(folder, settings, *arguments, env=shared)))
        load = Load(running)
        load.run(seconds)
        processes = servers * workers
        bought = Counter(r.body["messages"][-1]["content"] for r in up.requests)

        assert load.wrong == []
        assert load.asked > 5 * seconds
        assert load.calls == bought.total(), "the receipts say what was bought"
        assert set(bought) == {f"piece {n}" for n in load.wanted}
        # Within a process nothing is bought twice; between processes what both want at the same moment is a race, and
        # all that there can be of it is one purchase for each process.
        assert max(bought.values()) <= processes
        assert bought.total() <= 1.5 * len(bought)

        # Nothing was lost: all of it is there for whoever asks now.
        up.clear()
        wanted = sorted(load.wanted)
        again = Load(running)
        for server in running:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            for start in range(0, len(wanted), 100):
                again.ask(connection, wanted[start : start + 100])
            connection.close()
        assert again.wrong == []
        assert up.requests == []
        for server in running:
            assert server.stop() == 0
            for word in ("Traceback", "set aside", "locked", "cannot"):
                assert word not in server.said


def test_two_servers_on_one_folder_share_what_they_buy(tmp_path: Path, up: ScriptedServer) -> None:
    bear(tmp_path, up, 4, servers=2, workers=1)


def test_two_workers_share_what_they_buy(tmp_path: Path, up: ScriptedServer) -> None:
    bear(tmp_path, up, 4, servers=1, workers=2)


@pytest.mark.e2e
@pytest.mark.timeout(150)
@pytest.mark.parametrize(("servers", "workers"), [(2, 1), (1, 2)])
def test_a_minute_of_load_loses_nothing(tmp_path: Path, up: ScriptedServer, servers: int, workers: int) -> None:
    bear(tmp_path, up, 60, servers=servers, workers=workers)
