"""`kill -9` at every step of a program, and at any moment of a load: what was bought is kept, nothing done twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIConnectionError
from tests.killing import PROGRAMS, bear_kills, quiet_port, said, shown
from tests.serving import Server, create, eventually, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer

pytestmark = pytest.mark.e2e

STEPS = 10


class Upstream(ScriptedServer):
    """Quick, but for one link, which it is slow to give until it is told not to be."""

    def __init__(self) -> None:
        self.slow: int | None = None
        super().__init__(said, faults=self._pace, delay=0.005)

    def _pace(self, received: Received) -> Fault | None:
        return Fault(delay=60.0) if link(received) == self.slow else None

    def take(self) -> list[int]:
        """The links that were bought since this was asked last."""
        links = [link(received) for received in self.requests]
        self.clear()
        return links


def link(received: Received) -> int:
    return int(shown(received.body).split()[1])


@pytest.fixture
def up() -> Iterator[Upstream]:
    server = Upstream()
    with server:
        yield server


@pytest.mark.timeout(120)
def test_killed_at_each_of_ten_steps_it_buys_exactly_the_unfinished_ones(
    up: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "killed.py").write_text(PROGRAMS)
    settings = 'program_folders = ["programs"]\n' + upstream(up.base_url)
    port = quiet_port()
    rows: list[tuple[int, list[int], list[int], dict[str, Any]]] = []

    def ask(server: Server, killed_at: int) -> Any:
        with server.client() as client:
            question = f"killed at {killed_at}"
            return create(client, model="chain", messages=[{"role": "user", "content": question}]).model_dump()

    def ask_in_vain(server: Server, killed_at: int) -> None:
        with pytest.raises(APIConnectionError):
            ask(server, killed_at)

    for killed_at in range(1, STEPS + 2):
        with serving(tmp_path, settings, port=port) as server:
            if killed_at > 1:
                up.slow = None
                answer = ask(server, killed_at - 1)
                rows[-1][2].extend(up.take())
                rows[-1][3].update(answer["asmodel"])
            if killed_at <= STEPS:
                up.slow = killed_at
                client = threading.Thread(target=ask_in_vain, args=(server, killed_at), daemon=True)
                client.start()
                eventually("the step is asked", lambda k=killed_at: k in map(link, up.requests))
                server.kill()
                client.join(20)
                assert not client.is_alive()
                rows.append((killed_at, up.take(), [], {}))

    with capsys.disabled():
        print("\n  killed at  bought before  bought after              found  receipt says bought")
        for killed_at, before, after, receipt in rows:
            print(
                f"  {killed_at:9}  {len(before):13}  {','.join(map(str, after)):24}  {receipt['cache_hits']:5}"
                f"  {receipt['upstream_calls']:19}"
            )
    assert len(rows) == STEPS
    for killed_at, before, after, receipt in rows:
        assert before == list(range(1, killed_at + 1))
        assert after == list(range(killed_at, STEPS + 1))
        assert (receipt["steps"], receipt["cache_hits"]) == (STEPS, killed_at - 1)
        assert receipt["upstream_calls"] == STEPS - killed_at + 1


@pytest.mark.timeout(240)
async def test_twenty_kills_under_load_lose_nothing_and_repeat_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = await bear_kills(tmp_path, kills=20, seed=1)
    with capsys.disabled():
        print(told)
