"""One purchase for all who want it at the same moment, whatever process they are in."""

from __future__ import annotations

import ast
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT
from tests.redis_serving import installed_servers, running

from asmodel.budget import Budget, Limits
from asmodel.calls import CachePolicy, Call, Chat, Delta, Message, Reply, Terms
from asmodel.errors import DeadlineExceeded, UpstreamUnavailable
from asmodel.protocols import Cache, Lease
from asmodel.testing import FunctionUpstream
from asmodel.upstreams import Cached, Readings
from asmodel_plugins.disk_cache import DiskCache

ON = Terms(program="p", step="s")
CALL = Chat(identity="up", messages=(Message("user", "hello"),))


class Gate:
    """An upstream function that answers once it is let."""

    def __init__(self, answer: Any = "yes") -> None:
        self.answer = answer
        self.open = asyncio.Event()
        self.entered = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, call: Call) -> Any:
        self.entered.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.answer


@asynccontextmanager
async def stores(folder: Path, number: int = 2) -> AsyncGenerator[list[DiskCache]]:
    """Several views of one folder, as several processes have them."""
    made = [DiskCache(folder) for _ in range(number)]
    for store in made:
        await store.open()
    try:
        yield made
    finally:
        for store in made:
            await store.close()


# Real processes


SERVERS = installed_servers()


@pytest.fixture(params=["disk", *list(SERVERS)[:1]])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the cache is: a server's address, or nothing for a folder."""
    if request.param == "disk":
        yield ""
        return
    with running(SERVERS[request.param], tmp_path) as server:
        yield server.url


@contextmanager
def buyers(folder: Path, number: int, askers: int, seconds: float, url: str) -> Generator[list[subprocess.Popen[str]]]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.buying", str(folder), str(askers), str(seconds), url]
    started = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )
        for _ in range(number)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def sources(process: subprocess.Popen[str]) -> dict[str, int]:
    assert process.stdout is not None
    told: dict[str, int] = ast.literal_eval(process.stdout.readline())
    return told


def test_64_who_want_the_same_in_two_processes_buy_it_once(tmp_path: Path, url: str) -> None:
    with buyers(tmp_path, 2, 32, 0.3, url) as (one, other):
        go(one)
        go(other)
        told = [sources(one), sources(other)]
    assert len((tmp_path / "bought").read_text().splitlines()) == 1
    assert sorted(told, key=len) == [{"joined": 32}, {"bought": 1, "joined": 31}]


def test_when_the_process_that_buys_is_killed_another_takes_over(tmp_path: Path, url: str) -> None:
    with buyers(tmp_path, 3, 4, 1.0, url) as started:
        bought = tmp_path / "bought"
        for process in started:
            go(process)
        while not bought.exists() or not bought.read_text().endswith("\n"):
            time.sleep(0.01)
        first = next(p for p in started if p.pid == int(bought.read_text()))
        first.kill()
        killed = time.monotonic()
        told = [sources(p) for p in started if p is not first]
        took = time.monotonic() - killed
    assert len(bought.read_text().splitlines()) == 2
    assert sorted(told, key=len) == [{"joined": 4}, {"bought": 1, "joined": 3}]
    assert took < 12.0  # One lease, and the purchase.


# Several views of one folder in one process, which its locks cannot tell from several processes


async def test_who_waits_for_another_process_has_bought_nothing_and_waited_for_an_upstream(tmp_path: Path) -> None:
    gate = Gate()
    async with stores(tmp_path / "cache") as (a, b):
        first, second = FunctionUpstream(gate, name="up"), FunctionUpstream(lambda call: "no", name="up")
        leading = asyncio.ensure_future(Cached(first, a).send(CALL, ON))
        await gate.entered.wait()
        budget = Budget(limits=Limits(calls=1))
        deltas: list[Delta] = []

        async def emit(delta: Delta) -> None:
            deltas.append(delta)

        terms = Terms(program="p", step="s", budget=budget, emit=emit)
        waiting = asyncio.ensure_future(Cached(second, b).send(CALL, terms))
        await asyncio.sleep(0.1)
        gate.open.set()
        reply = await waiting
        assert (reply.text, reply.source, (await leading).source) == ("yes", "joined", "bought")
        assert (budget.calls, budget.usage.total_tokens) == (0, 0)
        assert budget.upstream_seconds > 0.05
        assert "".join(delta.text for delta in deltas) == "yes"
        assert second.calls == []


async def test_a_failure_there_is_none_here(tmp_path: Path) -> None:
    gate = Gate(UpstreamUnavailable("down"))
    async with stores(tmp_path / "cache") as (a, b):
        first, second = FunctionUpstream(gate, name="up"), FunctionUpstream(lambda call: "yes", name="up")
        cached = Cached(second, b)
        leading = asyncio.ensure_future(Cached(first, a).send(CALL, ON))
        await gate.entered.wait()
        waiting = [asyncio.ensure_future(cached.send(CALL, ON)) for _ in range(3)]
        await asyncio.sleep(0.05)
        gate.open.set()
        with pytest.raises(UpstreamUnavailable):
            await leading
        assert sorted(reply.source for reply in await asyncio.gather(*waiting)) == ["bought", "joined", "joined"]
        assert len(second.calls) == 1


async def test_when_the_last_waiter_there_leaves_another_process_buys(tmp_path: Path) -> None:
    gate = Gate()
    async with stores(tmp_path / "cache") as (a, b):
        leading = asyncio.ensure_future(Cached(FunctionUpstream(gate, name="up"), a).send(CALL, ON))
        await gate.entered.wait()
        waiting = asyncio.ensure_future(Cached(FunctionUpstream(lambda call: "yes", name="up"), b).send(CALL, ON))
        await asyncio.sleep(0.05)
        leading.cancel()
        assert (await asyncio.wait_for(waiting, 2)).source == "bought"
        assert gate.cancelled == 1


async def test_each_waiter_keeps_its_own_deadline_whoever_buys(tmp_path: Path) -> None:
    gate = Gate()
    async with stores(tmp_path / "cache") as (a, b):
        leading = asyncio.ensure_future(Cached(FunctionUpstream(gate, name="up"), a).send(CALL, ON))
        await gate.entered.wait()
        cached = Cached(FunctionUpstream(lambda call: "no", name="up"), b)
        soon = asyncio.get_running_loop().time() + 0.05
        hasty = asyncio.ensure_future(cached.send(CALL, Terms(program="p", step="s", deadline=soon)))
        await asyncio.sleep(0)
        patient = asyncio.ensure_future(cached.send(CALL, ON))
        with pytest.raises(DeadlineExceeded):
            await hasty
        gate.open.set()
        assert [(await patient).source, (await leading).source] == ["joined", "bought"]


async def test_who_leaves_while_another_process_buys_leaves_nothing_behind(tmp_path: Path) -> None:
    gate = Gate()
    async with stores(tmp_path / "cache") as (a, b):
        leading = asyncio.ensure_future(Cached(FunctionUpstream(gate, name="up"), a).send(CALL, ON))
        await gate.entered.wait()
        before = asyncio.all_tasks()
        waiting = asyncio.ensure_future(Cached(FunctionUpstream(lambda call: "no", name="up"), b).send(CALL, ON))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() - before == set()
        gate.open.set()
        assert (await leading).source == "bought"


async def test_what_is_to_be_bought_afresh_waits_for_nobody(tmp_path: Path) -> None:
    gate = Gate()
    async with stores(tmp_path / "cache") as (a, b):
        leading = asyncio.ensure_future(Cached(FunctionUpstream(gate, name="up"), a).send(CALL, ON))
        await gate.entered.wait()
        fresh = Cached(FunctionUpstream(lambda call: "fresh", name="up"), b)
        refresh = Terms(program="p", step="s", cache=CachePolicy(mode="refresh"))
        assert (await fresh.send(CALL, refresh)).text == "fresh"
        gate.open.set()
        await leading


async def test_what_another_process_stored_meanwhile_is_found_and_not_bought(tmp_path: Path) -> None:
    class Late(DiskCache):
        """Another process stores just after the first look."""

        looked = False

        async def get(self, key: str) -> bytes | None:
            found = await super().get(key)
            if not self.looked:
                self.looked = True
                await Cached(FunctionUpstream(lambda call: "theirs", name="up"), other).send(CALL, ON)
            return found

    async with stores(tmp_path / "cache", 1) as (other,):
        store = Late(tmp_path / "cache")
        await store.open()
        upstream = FunctionUpstream(lambda call: "ours", name="up")
        budget = Budget()
        reply = await Cached(upstream, store).send(CALL, Terms(program="p", step="s", budget=budget))
        await store.close()
        assert (reply.text, reply.source, budget.calls, upstream.calls) == ("theirs", "hit", 0, [])


class Counted(DiskCache):
    """Counts what it is asked."""

    asked: list[str]

    def lease(self, key: str, seconds: float = 10.0) -> AbstractAsyncContextManager[Lease]:
        self.asked.append("lease")
        return super().lease(key, seconds)

    async def get(self, key: str) -> bytes | None:
        self.asked.append("get")
        return await super().get(key)

    def recall(self, key: str) -> bytes | None:
        self.asked.append("recall")
        return super().recall(key)


async def test_a_hit_asks_the_store_once_and_takes_no_lease(tmp_path: Path) -> None:
    store = Counted(tmp_path / "cache")
    store.asked = []
    await store.open()
    cached = Cached(FunctionUpstream(lambda call: "yes", name="up"), store)
    await cached.send(CALL, ON)
    store.asked.clear()
    assert (await cached.send(CALL, ON)).source == "hit"
    assert store.asked == ["recall"]
    off = Terms(program="p", step="s", cache=CachePolicy(mode="off"))
    store.asked.clear()
    await cached.send(CALL, off)
    assert store.asked == []
    await store.close()


async def test_leases_that_cannot_be_had_cost_no_answer(tmp_path: Path) -> None:
    async with stores(tmp_path / "cache", 1) as (store,):
        leases = tmp_path / "cache" / "leases"
        leases.write_text("not a folder")
        reply: Reply = await Cached(FunctionUpstream(lambda call: "yes", name="up"), store).send(CALL, ON)
        assert reply.source == "bought"


class Without:
    """The same store, which cannot say what it has in memory."""

    def __init__(self, store: Cache) -> None:
        self.get = store.get
        self.set = store.set


@pytest.mark.parametrize("recalls", [True, False])
async def test_a_hit_out_of_memory_is_the_hit_that_any_store_gives(recalls: bool, tmp_path: Path) -> None:
    async with stores(tmp_path / "cache", 1) as (store,):
        upstream = FunctionUpstream(lambda call: "yes", name="up")
        cached = Cached(upstream, store if recalls else Without(store))
        bought = await cached.send(CALL, ON)
        one, other = await cached.send(CALL, ON), await cached.send(CALL, ON)
        assert one == other == replace(bought, source="hit")
        assert one is other  # Read once.
        assert len(upstream.calls) == 1
        young = Terms(program="p", step="s", cache=CachePolicy(max_age=0.0))
        assert (await cached.send(CALL, young)).source == "bought"

        def refuse(reply: Reply) -> None:
            raise ValueError("no")

        assert (await cached.send(CALL, Terms(program="p", step="s", accept=refuse))).source == "bought"
        assert (await cached.send(CALL, ON)).source == "hit"
        assert len(upstream.calls) == 3


async def test_what_another_has_replaced_is_read_anew(tmp_path: Path) -> None:
    async with stores(tmp_path / "cache") as (store, theirs):
        cached = Cached(FunctionUpstream(lambda call: "ours", name="up"), store)
        await cached.send(CALL, ON)
        assert (await cached.send(CALL, ON)).text == "ours"
        other = Cached(FunctionUpstream(lambda call: "theirs", name="up"), theirs)
        await other.send(CALL, Terms(program="p", step="s", cache=CachePolicy(mode="refresh")))
        assert (await cached.send(CALL, ON)).text == "theirs"


def test_what_was_read_is_known_by_its_very_bytes_and_bounded_in_them() -> None:
    def stored(text: str) -> bytes:
        return Reply(text=text).dump()

    readings = Readings(limit=len(stored("x" * 10)) * 32)
    first = stored("0" * 10)
    assert readings.of("0", first) is readings.of("0", first)
    assert readings.of("0", first) == Reply.load(first)
    other = stored("1" * 10)
    assert readings.of("0", other).text == "1" * 10
    assert readings.of("0", first).text == "0" * 10
    for number in range(100):
        readings.of(str(number), stored(f"{number:010}"))
    assert readings.used <= readings.limit
    assert readings.of("0", first) is not None
    large = stored("y" * readings.limit)
    assert readings.of("large", large) is not readings.of("large", large)
    with pytest.raises(ValueError, match="stored reply"):
        readings.of("0", b"[]")
