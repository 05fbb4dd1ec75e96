"""What the parts of a request cost, each by itself in this process: no HTTP, no other process.

CPU time of the whole process for each, so that what a part leaves to another thread is in it; a median of batches, and
the best of them. Only public names are used, and a part that has gone is left out with its reason.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import orjson
from tests.bench import wire

from asmodel.protocols import Cache

BATCHES = 9


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part, in microseconds."""

    name: str
    median: float
    """CPU time, in the middle of the batches."""
    best: float
    wall: float
    """Time on the clock, in the middle of the batches."""


def _part(name: str, batches: Sequence[tuple[float, float]], times: int) -> Part:
    cpu = [taken / times * 1e6 for taken, _ in batches]
    wall = [taken / times * 1e6 for _, taken in batches]
    return Part(name=name, median=statistics.median(cpu), best=min(cpu), wall=statistics.median(wall))


def timed(name: str, work: Callable[[], object], times: int) -> Part:
    """Something that does not wait."""
    batches: list[tuple[float, float]] = []
    for _ in range(BATCHES):
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(times):
            work()
        batches.append((time.process_time() - cpu, time.perf_counter() - wall))
    return _part(name, batches, times)


async def awaited(name: str, work: Callable[[], Awaitable[object]], times: int, at_once: int = 1) -> Part:
    """Something that is awaited, so many of them at once."""
    batches: list[tuple[float, float]] = []
    for _ in range(BATCHES):
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(times // at_once):
            if at_once == 1:
                await work()
            else:
                await asyncio.gather(*(work() for _ in range(at_once)))
        batches.append((time.process_time() - cpu, time.perf_counter() - wall))
    return _part(name, batches, times // at_once * at_once)


def all_parts(folder: Path) -> list[Part]:
    """Every part, in the order in which a request meets them. The folder is for a cache and a trace file."""
    from tests.bench.upstream import new_loop

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_parts(folder))


async def _parts(folder: Path) -> list[Part]:
    from asmodel.wire import read_chat

    body = orjson.dumps(wire.question("bench", unique=" (part)"))
    found = [timed(f"a request of {len(body) / 1000:.1f} kB read and checked", lambda: read_chat(body), 400)]
    found += _keys()
    found += await _caches(folder)
    found += _spans(folder)
    found += await _steps(folder)
    return found


def _keys() -> list[Part]:
    from asmodel.calls import Chat, Message, key

    texts = (Message("system", wire.SYSTEM), Message("user", wire.QUESTION))
    # A call remembers its own canonical form, so each is a new one.
    return [timed("key of a call", lambda: key(Chat(identity="bench", messages=texts)), 1000)]


async def _caches(folder: Path) -> list[Part]:
    from asmodel_plugins.disk_cache import DiskCache
    from asmodel_plugins.memory_cache import MemoryCache

    value = orjson.dumps(wire.completion())
    numbers = count()

    def number() -> str:
        return f"{next(numbers):064x}"

    async def store(cache: Cache) -> None:
        await cache.set(number(), value, tag="bench")

    memory, disk = MemoryCache(), DiskCache(folder / "cache")
    found: list[Part] = []
    await disk.open()
    try:
        caches: Sequence[tuple[str, Cache, int]] = (("memory", memory, 2000), ("disk", disk, 64))
        for name, cache, sets in caches:
            await cache.set("0" * 64, value, tag="bench")
            found += [
                await awaited(f"{name} cache: found", partial(cache.get, "0" * 64), 1000),
                await awaited(f"{name} cache: not found", partial(cache.get, "f" * 64), 1000),
                await awaited(f"{name} cache: stored", partial(store, cache), sets),
            ]
        stored = await awaited("disk cache: stored, 16 at once", partial(store, disk), 512, 16)
        return [*found, stored]
    finally:
        await disk.close()


def _spans(folder: Path) -> list[Part]:
    from asmodel import tracing

    def step() -> None:
        with tracing.step_span("bench", program="bench", kind="chat", draw=None):
            pass

    def run() -> None:
        with tracing.run_span("bench", digest=None, run_id="0", nested=False):
            for _ in range(5):
                step()

    found = [timed("a run of 5 steps, its spans: tracing off", run, 200)]
    traces = tracing.configure(local=folder / "traces.sqlite")
    try:

        def kept() -> None:
            run()

        batches: list[tuple[float, float]] = []
        for _ in range(BATCHES):
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(100):
                kept()
            waited = time.perf_counter() - wall
            traces.flush()  # what the writing thread does is part of the price
            batches.append((time.process_time() - cpu, waited))
        found.append(_part("a run of 5 steps, its spans: local file", batches, 100))
    finally:
        traces.shutdown()
    return found


async def _steps(folder: Path) -> list[Part]:
    from asmodel import Run, program, step
    from asmodel.testing import FunctionUpstream, run_program
    from asmodel_plugins.disk_cache import DiskCache
    from asmodel_plugins.memory_cache import MemoryCache

    @step(model="writer")
    def asks(question: str, number: int) -> str:
        return f"{number}: {question}"

    @program("bench-parts")
    async def asking(run: Run) -> str:
        for number in range(many):
            await run(asks, run.question, number)
        return "done"

    many = 0
    numbers = count()

    def said(call: object) -> str:
        return wire.ANSWER

    async def answered(cache: Cache, unique: bool) -> None:
        # A new one each time: it remembers every call.
        question = f"{wire.QUESTION} {next(numbers) if unique else 'the same'}"
        await run_program(asking, question, upstream=FunctionUpstream(said), cache=cache)

    disk = DiskCache(folder / "steps")
    await disk.open()
    found: list[Part] = []
    try:
        caches: Mapping[str, Cache] = {"memory": MemoryCache(), "disk": disk}
        for name, cache in caches.items():
            for kind, unique in (("bought", True), ("found", False)):
                many = 64
                if not unique:
                    await answered(cache, unique)
                steps = await awaited("", partial(answered, cache, unique), 1)
                many = 0
                none = await awaited("", partial(answered, cache, unique), 10)
                found.append(
                    Part(
                        name=f"a step, {kind}, {name} cache, no HTTP, no trace",
                        median=(steps.median - none.median) / 64,
                        best=(steps.best - none.best) / 64,
                        wall=(steps.wall - none.wall) / 64,
                    )
                )
        return found
    finally:
        await disk.close()
