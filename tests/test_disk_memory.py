"""What the disk cache keeps in memory: never what another process has cleared, replaced, or let expire."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
from tests.conftest import ROOT

from asmodel.errors import ConfigurationError
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.disk_memory import Memory

KEY = "a" * 64
SECONDS = float(os.environ.get("TEST_CACHE_HAMMER_SECONDS", "3"))


@asynccontextmanager
async def disk(folder: Path, memory_bytes: int = 1_000_000) -> AsyncGenerator[DiskCache]:
    cache = DiskCache(folder / "cache", memory_bytes=memory_bytes)
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


def behind_its_back(folder: Path, statement: str, *values: object) -> None:
    """Change the database as no asmodel does, so that memory cannot know: what is found after that was in memory."""
    with closing(sqlite3.connect(folder / "cache" / "store" / "cache.db", isolation_level=None, timeout=10)) as con:
        con.execute(statement, values)


async def is_in_memory(cache: DiskCache, folder: Path, key: str = KEY) -> bool:
    """Ends with the entry gone from the disk."""
    behind_its_back(folder, "DELETE FROM Cache WHERE key = ?", key)
    return await cache.get(key) is not None


@contextmanager
def process(source: str, folder: Path, *arguments: object) -> Generator[subprocess.Popen[str]]:
    """Another process with a disk cache, `cache`, on the same folder."""
    program = (
        "import asyncio, itertools, os, sys, time\n"
        "from asmodel_plugins.disk_cache import DiskCache\n"
        "async def main():\n"
        "    cache = DiskCache(sys.argv[1])\n"
        "    await cache.open()\n"
        + "".join(f"    {line}\n" for line in source.splitlines())
        + "    await cache.close()\n"
        "asyncio.run(main())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ("proxy", "plugins"))}
    command = [sys.executable, "-c", program, str(folder / "cache"), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as running:
        try:
            yield running
        finally:
            running.kill()


async def ran(source: str, folder: Path, *arguments: object) -> str:
    with process(source, folder, *arguments) as running:
        out, _ = await asyncio.to_thread(running.communicate, None, 20)
        assert running.returncode == 0
        return out


async def line_of(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return await asyncio.to_thread(running.stdout.readline)


# ---- what is in it ----


async def test_what_was_set_and_what_was_read_is_found_in_memory(tmp_path: Path) -> None:
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"set")
        assert await is_in_memory(cache, tmp_path)
        await cache.set("b", b"read")
    async with disk(tmp_path) as cache:
        assert await cache.get("b") == b"read"
        assert await is_in_memory(cache, tmp_path, "b")


async def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path) -> None:
    async with disk(tmp_path, 0) as cache:
        await cache.set(KEY, b"set")
        assert await cache.get(KEY) == b"set"
        assert not await is_in_memory(cache, tmp_path)
    with pytest.raises(ConfigurationError, match=r"\[cache\] memory_bytes: -1"):
        DiskCache(tmp_path, memory_bytes=-1)


async def test_a_store_for_what_lasts_is_read_from_disk_each_time(tmp_path: Path) -> None:
    async with disk(tmp_path) as cache:
        assert cache.lasting().memory_bytes == 0


def test_memory_is_bounded_in_bytes_and_the_last_used_stay() -> None:
    memory = Memory(16_000)
    version = b"version1"
    memory.find("", version)
    for n in range(100):
        memory.keep(str(n), bytes(500), None, version)
        memory.find("0", version)
    memory.keep("large", bytes(1500), None, version)
    kept = [n for n in range(100) if memory.find(str(n), version) is not None]
    assert kept == [0, *range(100 - len(kept) + 1, 100)]
    assert len(kept) == 16_000 // 900
    assert memory.find("large", version) is None


def test_nothing_is_found_at_another_version_or_at_none() -> None:
    memory = Memory(10_000)
    memory.find("a", b"version1")
    memory.keep("a", b"value", None, b"version1")
    assert memory.find("a", b"version1") == b"value"
    memory.keep("b", b"read before the change", None, b"version0")
    assert memory.find("b", b"version1") is None
    assert memory.find("a", b"") is None
    memory.keep("a", b"value", None, b"")
    assert memory.find("a", b"") is None
    assert memory.find("a", b"version1") is None


# ---- with another process ----


@pytest.mark.parametrize("how", ["cache.clear()", "cache.clear(tag='p/s')", "cache.clear(older_than=0)"])
async def test_what_another_process_cleared_is_missing_at_once(tmp_path: Path, how: str) -> None:
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"value", tag="p/s")
        assert await cache.get(KEY) == b"value"
        assert await ran(f"print(await {how})", tmp_path) == "1\n"
        assert await cache.get(KEY) is None
        await cache.set(KEY, b"again", tag="p/s")
        assert await cache.get(KEY) == b"again"
        assert await is_in_memory(cache, tmp_path)


async def test_what_another_process_replaced_is_found_anew_at_once(tmp_path: Path) -> None:
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"old")
        assert await cache.get(KEY) == b"old"
        await ran(f"await cache.set({KEY!r}, b'new')", tmp_path)
        assert await cache.get(KEY) == b"new"
        assert await is_in_memory(cache, tmp_path)


async def test_what_another_process_adds_or_sets_again_leaves_memory_as_it_is(tmp_path: Path) -> None:
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"value")
        await ran(f"await cache.set('another', b'x'); await cache.set({KEY!r}, b'value')", tmp_path)
        assert await cache.get("another") == b"x"
        assert await is_in_memory(cache, tmp_path)


async def test_a_ttl_holds_in_memory(tmp_path: Path) -> None:
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"set", ttl=1.0)
        await cache.set("long", b"set", ttl=60)
        await ran("await cache.set('b', b'from another', ttl=1.0)", tmp_path)
        begun = time.monotonic()
        assert await cache.get("b") in (b"from another", None)
        while await cache.get(KEY) is not None or await cache.get("b") is not None:
            assert time.monotonic() - begun < 5
            await asyncio.sleep(0.02)
        assert await is_in_memory(cache, tmp_path, "long")


async def test_a_ttl_that_another_process_makes_shorter_holds_too(tmp_path: Path) -> None:
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"value")
        await ran(f"await cache.set({KEY!r}, b'value', ttl=0.01)", tmp_path)
        await asyncio.sleep(0.02)
        assert await cache.get(KEY) is None


async def test_nobody_finds_what_was_replaced_after_the_one_who_replaced_it_was_told_so(tmp_path: Path) -> None:
    """One process replaces a value again and again, and says so; others must never find an older one after that."""
    source = (
        "end = time.monotonic() + float(sys.argv[2])\n"
        "for n in itertools.count():\n"
        f"    await cache.set({KEY!r}, b'%d' % n)\n"
        "    os.write(1, b'%d\\n' % n)\n"
        "    await asyncio.sleep(n % 7 / 2000)\n"
        "    if time.monotonic() > end: break\n"
        "os.write(1, b'\\n')"
    )
    async with disk(tmp_path) as cache, disk(tmp_path) as other:
        with process(source, tmp_path, SECONDS) as running:
            assert running.stdout is not None
            os.set_blocking(running.stdout.fileno(), False)
            reported, seen, gets = -1, set[int](), 0
            told = b""
            async with asyncio.timeout(SECONDS + 20):
                while not told.endswith(b"\n\n"):
                    try:
                        told = told[-40:] + os.read(running.stdout.fileno(), 65536)
                        reported = max([reported, *(int(n) for n in told.split(b"\n")[1:-1] if n)])
                    except BlockingIOError:
                        pass
                    for store in (cache, other):
                        found = await store.get(KEY)
                        assert found is not None or reported == -1
                        if found is not None:
                            assert int(found) >= reported
                            seen.add(int(found))
                            gets += 1
                    await asyncio.sleep(0)
        assert len(seen) > 20
        assert gets > len(seen)


async def test_one_who_is_killed_before_it_commits_a_change_costs_memory_and_no_entry(tmp_path: Path) -> None:
    source = (
        "def half():\n"
        "    with cache._store.writing(5) as con:\n"
        "        con.execute('DELETE FROM Cache')\n"
        "        cache._store._next_version(con)\n"
        "        print('told, and not committed', flush=True)\n"
        "        sys.stdin.readline()\n"
        "await cache._writer.job(half)"
    )
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"value")
        with process(source, tmp_path) as running:
            assert await line_of(running) == "told, and not committed\n"
            assert await cache.get(KEY) == b"value"
            running.send_signal(signal.SIGKILL)
            running.wait()
        # What is read now may be half of a change that is still to come, for all that can be told.
        assert await cache.get(KEY) == b"value"
        assert not await is_in_memory(cache, tmp_path)
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"value")  # whereupon the store is looked after
        async with asyncio.timeout(5):
            while not await is_in_memory(cache, tmp_path):
                await cache.set(KEY, b"value")
                await cache.get(KEY)


@pytest.mark.parametrize("length", [0, 3, 100])
async def test_a_version_that_somebody_cut_or_wrote_into_misleads_nobody(tmp_path: Path, length: int) -> None:
    async with disk(tmp_path) as cache, disk(tmp_path) as other:
        await cache.set(KEY, b"old")
        (tmp_path / "cache" / "store" / "version").write_bytes(b"\xff" * length)
        assert await cache.get(KEY) == b"old"
        await other.set(KEY, b"new")
        assert await cache.get(KEY) == b"new"
        await other.clear()
        assert await cache.get(KEY) is None
        assert cache.troubles.unreadable == 0


async def test_a_store_whose_version_is_lost_is_set_aside(tmp_path: Path) -> None:
    async with disk(tmp_path) as cache:
        await cache.set(KEY, b"value")
    (tmp_path / "cache" / "store" / "version").unlink()
    async with disk(tmp_path) as cache:
        assert await cache.get(KEY) is None
        assert cache.troubles.set_aside == 1
