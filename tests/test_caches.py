"""The two caches that ship: what any cache must do, and what the one on disk withstands."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
from tests.timed import in_time, timed

from asmodel.calls import Reply
from asmodel.conformance import CACHE_CHECKS, CacheCheck, check_cache, opened
from asmodel.errors import AsmodelError, ConfigurationError
from asmodel.protocols import Cache
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.memory_cache import MemoryCache

HAMMER_SECONDS = float(os.environ.get("TEST_CACHE_HAMMER_SECONDS", "5"))
"""How long two processes write into one folder."""

SOURCES = [str(Path(__file__).resolve().parent.parent / room) for room in ("proxy", "plugins")]

Make = Callable[[], Cache]


def key(n: int | str) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


def on_disk(folder: Path) -> Make:
    return lambda: DiskCache(folder)


def in_memory(folder: Path) -> Make:
    return MemoryCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@asynccontextmanager
async def disk(folder: Path, **settings: float) -> AsyncGenerator[DiskCache]:
    cache = DiskCache(folder, **settings)  # type: ignore[arg-type]  # size_limit is an int and the others are not
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


async def filled(folder: Path, entries: int = 3) -> None:
    async with disk(folder) as cache:
        await asyncio.gather(*(cache.set(key(n), b"value %d" % n, tag="p/s") for n in range(entries)))


def database(folder: Path) -> Path:
    return folder / "store" / "cache.db"


@contextmanager
def tampering(folder: Path) -> Generator[sqlite3.Connection]:
    """The database as somebody else may open and change it."""
    with closing(sqlite3.connect(database(folder), isolation_level=None, timeout=10)) as con:
        yield con


def rights(folder: Path) -> dict[Path, int]:
    return {p: stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}


def too_wide(found: dict[Path, int]) -> dict[str, str]:
    return {p.name: oct(mode) for p, mode in found.items() if mode != (0o700 if p.is_dir() else 0o600)}


def set_aside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("store.set-aside-"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "asmodel.cache" and r.levelno >= logging.WARNING]


def running(source: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)}
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@contextmanager
def ending(process: subprocess.Popen[str]) -> Generator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.kill()


# ---- what any cache must do ----


@pytest.mark.parametrize("check", CACHE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("store", [on_disk, in_memory])
async def test_a_shipped_cache_does_what_every_cache_must(
    store: Callable[[Path], Make], check: CacheCheck, folder: Path
) -> None:
    async with opened(store(folder)()) as cache:
        await check(cache)


async def test_what_is_on_disk_outlives_the_object(folder: Path) -> None:
    await check_cache(on_disk(folder), durable=True)


async def test_the_checks_notice_a_cache_that_forgets() -> None:
    class Forgetful(MemoryCache):
        async def get(self, key: str) -> bytes | None:
            return None

    with pytest.raises(AssertionError, match="a value comes back as it was: a value must come back byte by byte"):
        await check_cache(Forgetful)


@pytest.mark.parametrize("store", [on_disk, in_memory])
async def test_one_tag_or_what_is_old_can_be_cleared(store: Callable[[Path], Make], folder: Path) -> None:
    async with opened(store(folder)()) as cache:
        assert isinstance(cache, DiskCache | MemoryCache)
        await asyncio.gather(*(cache.set(key(n), b"x" * 100, tag=f"p/{n % 2}") for n in range(1000)))
        stats = await cache.stats()
        assert (stats["entries"], stats["bytes"]) == (1000, 100_000)
        assert stats["tags"]["p/1"] == {"entries": 500, "bytes": 50_000}
        assert await cache.clear(tag="p/1") == 500
        assert await cache.get(key(1)) is None
        assert await cache.get(key(2)) == b"x" * 100
        assert await cache.clear(older_than=3600) == 0
        assert await cache.clear() == 500
        assert (await cache.stats())["entries"] == 0


async def test_the_least_recently_used_leaves_memory_first() -> None:
    cache = MemoryCache(size_limit=3 * (1000 + 256))
    for n in range(3):
        await cache.set(key(n), bytes(1000))
    await cache.get(key(0))
    await cache.set(key(3), bytes(1000))
    await cache.set(key("too large"), bytes(10_000))
    kept = [n for n in range(4) if await cache.get(key(n)) is not None]
    assert kept == [0, 2, 3]
    assert await cache.get(key("too large")) is None


# ---- rights ----


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777], ids=oct)
async def test_nobody_else_can_read_the_cache_whatever_the_umask(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        async with disk(folder) as cache:
            await cache.set(key(1), b"value")
            found = rights(folder)
    finally:
        os.umask(before)
    assert {p.name for p in found} >= {"cache.db", "cache.db-wal", "cache.db-shm", "store", "lock"}
    assert too_wide(found) == {}


async def test_a_folder_that_was_open_to_others_is_closed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    await filled(folder)
    for path in rights(folder):
        os.chmod(path, 0o777 if path.is_dir() else 0o666)
    async with disk(folder) as cache:
        assert await cache.get(key(1)) == b"value 1"
        found = rights(folder)
    assert too_wide(found) == {}
    assert any(str(folder) in m and "open to others" in m for m in warnings_of(caplog))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
async def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    os.mkdir(folder)
    os.chown(folder, 12345, 12345)
    with pytest.raises(ConfigurationError, match=f'"{folder}" belongs to user 12345'):
        await DiskCache(folder).open()


async def test_a_folder_shared_by_everybody_is_refused_and_left_as_it_is(folder: Path) -> None:
    os.mkdir(folder)
    os.chmod(folder, 0o1777)
    with pytest.raises(ConfigurationError, match=r"shared with other things; set .* a folder inside of it"):
        await DiskCache(folder).open()
    assert rights(folder)[folder] == 0o1777


def test_a_path_that_is_a_file_is_refused(folder: Path) -> None:
    folder.write_text("mine")
    with pytest.raises(ConfigurationError, match="is not a folder"):
        asyncio.run(DiskCache(folder).open())
    assert folder.read_text() == "mine"


# ---- rows that somebody changed ----


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str, int], int], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


async def test_a_pickle_in_a_row_is_a_miss_and_is_never_run(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(folder)
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    os.close(pickle.loads(pickle.dumps(Bomb(tmp_path / "it works"))))
    assert (tmp_path / "it works").exists()
    (tmp_path / "bomb").write_bytes(bomb)
    with tampering(folder) as con:
        con.execute("UPDATE Cache SET mode = 4, value = ? WHERE key = ?", (bomb, key(0)))
        con.execute("UPDATE Cache SET mode = 4, value = NULL, filename = '../../bomb' WHERE key = ?", (key(1),))
        con.execute("UPDATE Cache SET raw = 0, key = ? WHERE key = ?", (bomb, key(2)))
    async with disk(folder) as cache:
        for _ in range(2):
            assert [await cache.get(key(n)) for n in range(3)] == [None, None, None]
        assert cache.troubles.unreadable == 4
        assert [entry async for entry in cache.entries()] == []
        await cache.set(key(0), b"bought again")
        await cache.set(key(1), b"bought again")
        assert await cache.get(key(0)) == b"bought again"
        await cache.clear()
    assert not (tmp_path / "exploded").exists()
    assert (tmp_path / "bomb").exists(), "a file that a row names is not ours to remove"
    assert len([m for m in warnings_of(caplog) if "never written" in m]) == 1


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("value = substr(value, 1, length(value) - 1)", None),
        ("value = x'00'", None),
        ("value = ?", b'{"v":1,"text":"planted"}'),
        ("value = ?", "text"),
        ("value = ?", 7),
        ("value = ?", None),
        ("value = CAST(x'ff80' AS TEXT)", None),
        ("mode = 1, filename = ?", "../../etc/passwd"),
        ("mode = 2, filename = ?, value = NULL", "/etc/passwd"),
        ("mode = 'x', filename = ?", None),
    ],
)
async def test_a_changed_row_is_a_miss(folder: Path, change: str, value: object) -> None:
    await filled(folder)
    with tampering(folder) as con:
        con.execute(f"UPDATE Cache SET {change} WHERE key = '{key(0)}'", (value,) if "?" in change else ())
    async with disk(folder) as cache:
        assert await cache.get(key(0)) is None
        assert await cache.get(key(1)) == b"value 1"
        assert cache.troubles.unreadable == 1
        await cache.set(key(0), b"bought again")
        assert await cache.get(key(0)) == b"bought again"
    assert set_aside(folder) == []


async def test_a_reply_that_was_stored_is_read_as_it_was(folder: Path) -> None:
    reply = Reply(text="42 · 🙂", model="m", bought_at=1.5)
    async with disk(folder) as cache:
        await cache.set(key(0), reply.dump())
        stored = await cache.get(key(0))
    assert stored is not None
    assert Reply.load(stored) == reply.named("hit")


# ---- stores that cannot be used ----


def tampered(statement: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        with tampering(folder) as con:
            con.executescript(statement)

    return tamper


def garbage(folder: Path) -> None:
    database(folder).write_bytes(os.urandom(20_000))


def emptied(folder: Path) -> None:
    database(folder).write_bytes(b"")


def cut_in_half(folder: Path) -> None:
    os.truncate(database(folder), database(folder).stat().st_size // 2)


def removed(folder: Path) -> None:
    database(folder).unlink()


def made_a_link(folder: Path) -> None:
    database(folder).rename(folder.parent / "elsewhere.db")
    database(folder).symlink_to(folder.parent / "elsewhere.db")


def made_a_file(folder: Path) -> None:
    for path in (folder / "store").iterdir():
        path.unlink()
    (folder / "store").rmdir()
    (folder / "store").write_text("not a folder")


WAYS_TO_BREAK: dict[str, Callable[[Path], None]] = {
    "a pragma planted": tampered("INSERT INTO Settings VALUES ('sqlite_locking_mode', 'exclusive')"),
    "a method shadowed": tampered("INSERT INTO Settings VALUES ('get', 1)"),
    "a Disk option unknown": tampered("INSERT INTO Settings VALUES ('disk_unknown', 1)"),
    "a policy that does not exist": tampered("UPDATE Settings SET value = 'x' WHERE key = 'eviction_policy'"),
    "values in files": tampered("UPDATE Settings SET value = 0 WHERE key = 'disk_min_file_size'"),
    "a count of another type": tampered("UPDATE Settings SET value = 'many' WHERE key = 'count'"),
    "settings lost": tampered("DELETE FROM Settings"),
    "another format version": tampered("PRAGMA user_version = 99"),
    "another program's": tampered("PRAGMA application_id = 7"),
    "a table lost": tampered("DROP TABLE Cache"),
    "a column more": tampered("ALTER TABLE Cache ADD COLUMN more"),
    "a trigger of ours changed": tampered(
        "DROP TRIGGER Settings_count_insert;"
        "CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END"
    ),
    "a trigger planted": tampered("CREATE TRIGGER t AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END"),
    "not in WAL mode": tampered("PRAGMA journal_mode = DELETE"),
    "garbage": garbage,
    "emptied": emptied,
    "cut in half": cut_in_half,
    "database removed": removed,
    "database a link": made_a_link,
    "store a file": made_a_file,
}


@pytest.mark.parametrize("way", WAYS_TO_BREAK)
async def test_a_store_that_cannot_be_used_is_set_aside_with_one_warning_and_begun_anew(
    folder: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(folder)
    WAYS_TO_BREAK[way](folder)
    async with disk(folder) as cache:
        assert await cache.get(key(0)) is None
        await cache.set(key(0), b"new")
        assert await cache.get(key(0)) == b"new"
        assert cache.troubles.set_aside == 1
    (aside,) = set_aside(folder)
    told = [m for m in warnings_of(caplog) if "open to others" not in m]
    assert len(told) == 1
    assert aside in told[0]
    async with disk(folder) as cache:
        assert await cache.get(key(0)) == b"new"
        assert cache.troubles.set_aside == 0


async def test_only_the_newest_stores_set_aside_are_kept(folder: Path) -> None:
    for _ in range(5):
        await filled(folder)
        garbage(folder)
    await filled(folder)
    assert len(set_aside(folder)) == 3


async def test_what_a_killed_beginner_left_is_swept_up(folder: Path) -> None:
    await filled(folder)
    (folder / ".new-dead").mkdir()
    (folder / ".new-dead" / "cache.db").write_bytes(b"half")
    async with disk(folder) as cache:
        assert await cache.get(key(0)) == b"value 0"
    assert not (folder / ".new-dead").exists()


async def test_many_who_open_a_broken_store_at_once_set_it_aside_once(folder: Path) -> None:
    await filled(folder)
    garbage(folder)
    source = (
        "import asyncio, sys\n"
        "from asmodel_plugins.disk_cache import DiskCache\n"
        "async def main():\n"
        "    cache = DiskCache(sys.argv[1])\n"
        "    await cache.open()\n"
        "    await cache.set(sys.argv[2], b'mine')\n"
        "    print(cache.troubles.set_aside, flush=True)\n"
        "    await cache.close()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "asyncio.run(main())\n"
    )
    with ExitStack() as stack:
        processes = [stack.enter_context(ending(running(source, folder, key(n)))) for n in range(4)]
        for process in processes:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        answers = await asyncio.gather(*(asyncio.to_thread(p.communicate, "go\n", 30) for p in processes))
    assert sorted(out.strip() for out, _ in answers) == ["0", "0", "0", "1"]
    assert len(set_aside(folder)) == 1
    async with disk(folder) as cache:
        assert [await cache.get(key(n)) for n in range(4)] == [b"mine"] * 4


async def test_a_store_deleted_while_open_is_begun_anew(folder: Path) -> None:
    async with disk(folder) as cache, disk(folder) as other:
        await cache.set(key(0), b"before")
        await asyncio.to_thread(subprocess.run, ["rm", "-r", str(folder)], check=True)
        await cache.set(key(1), b"after")
        assert await cache.get(key(1)) == b"after"
        assert await cache.get(key(0)) is None
        assert cache.troubles.unstored == 0
        await other.set(key(2), b"from another")
        assert await cache.get(key(2)) == b"from another"
        assert rights(folder)[folder] == 0o700


BREAK = (
    "import os, sqlite3, sys\n"
    "how, path = sys.argv[1:]\n"
    "con = sqlite3.connect(path, isolation_level=None, timeout=10)\n"
    "con.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()\n"
    "if how == 'dropped': con.execute('DROP TABLE Cache')\n"
    "if how == 'cut': os.truncate(path, 8192)\n"
    "if how == 'overwritten':\n"
    "    with open(path, 'r+b') as file:\n"
    "        file.seek(4096)\n"
    "        file.write(os.urandom(os.path.getsize(path) - 4096))\n"
)
"""By another process: closing a database file ends every lock that this process holds on it."""


@pytest.mark.parametrize("how", ["dropped", "cut", "overwritten"])
@pytest.mark.parametrize("first", ["get", "set"])
async def test_a_store_that_breaks_while_open_is_set_aside_and_no_request_fails(
    folder: Path, first: str, how: str
) -> None:
    async with disk(folder, memory_bytes=0) as cache, disk(folder, memory_bytes=0) as other:
        # More than the connections keep in memory, or nobody would notice.
        await asyncio.gather(*(cache.set(key(n), bytes(20_000)) for n in range(500)))
        with ending(running(BREAK, how, database(folder))) as process:
            await asyncio.to_thread(process.communicate, None, 30)
            assert process.returncode == 0
        async with asyncio.timeout(10):
            while cache.troubles.set_aside == 0:
                if first == "get":
                    await asyncio.gather(*(cache.get(key(n)) for n in range(500)))
                else:
                    await asyncio.gather(*(cache.set(key(n), bytes(20_000)) for n in range(500)))
                await asyncio.sleep(0.01)
        await cache.set(key("new"), b"new")
        assert await cache.get(key("new")) == b"new"
        await other.set(key("other"), b"other")
        assert await cache.get(key("other")) == b"other"
        assert cache.troubles.unstored == other.troubles.unstored == 0
        assert cache.troubles.set_aside + other.troubles.set_aside == 1
    assert len(set_aside(folder)) == 1


async def test_a_set_that_went_into_a_store_just_set_aside_is_written_again(folder: Path) -> None:
    async with disk(folder) as cache:
        async with locked(folder, "BEGIN IMMEDIATE"):
            waiting = asyncio.ensure_future(cache.set(key(0), b"value"))
            await asyncio.sleep(0.2)  # it has found its store in its place, and waits for the lock
            os.rename(folder / "store", folder / "store.set-aside-by-another")
        await waiting
        assert await cache.get(key(0)) == b"value"
    async with disk(folder) as cache:
        assert await cache.get(key(0)) == b"value"


async def test_an_older_server_does_not_undo_what_a_newer_one_has_begun(folder: Path) -> None:
    async with disk(folder) as cache:
        await cache.set(key(0), b"old")
        (folder / "store").rename(folder / "store.set-aside-by-the-newer")
        async with disk(folder) as newer:
            await newer.set(key(0), b"new")
        with tampering(folder) as con:
            con.execute("PRAGMA user_version = 99")
        await cache.set(key(1), b"not stored")
        assert await cache.get(key(1)) is None
        assert cache.troubles.unstored == 1
        assert cache.troubles.set_aside == 0


async def test_a_disk_that_is_full_costs_the_entry_and_nothing_else(folder: Path) -> None:
    source = (
        "import asyncio, logging, resource, sys\n"
        "from asmodel_plugins.disk_cache import DiskCache\n"
        "logging.basicConfig(stream=sys.stdout, format='%(levelname)s')\n"
        "async def main():\n"
        "    cache = DiskCache(sys.argv[1])\n"
        "    await cache.open()\n"
        "    await cache.set('0' * 64, b'first')\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))\n"
        "    await asyncio.gather(*(cache.set(f'{n:064x}', b'x' * 300_000) for n in range(1, 9)))\n"
        "    for n in range(9, 13):\n"
        "        await cache.set(f'{n:064x}', b'x' * 300_000)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "    await cache.set('f' * 64, b'last')\n"
        "    found = [await cache.get(f'{n:064x}') for n in range(13)]\n"
        "    lost = found.count(None)\n"
        "    ends = await cache.get('0' * 64), await cache.get('f' * 64)\n"
        "    print(*ends, 0 < lost == cache.troubles.unstored, flush=True)\n"
        "    await cache.close()\n"
        "asyncio.run(main())\n"
    )
    with ending(running(source, folder)) as process:
        out, _ = await asyncio.to_thread(process.communicate, None, 30)
    assert out.splitlines() == ["WARNING", "b'first' b'last' True"]


async def test_the_oldest_written_leave_a_full_store_first(folder: Path) -> None:
    limit = 4 * 2**20
    async with disk(folder, size_limit=limit, memory_bytes=0) as cache:
        for start in range(0, 4000, 200):
            await asyncio.gather(*(cache.set(key(n), bytes(3000)) for n in range(start, start + 200)))
        kept = [n for n in range(4000) if await cache.get(key(n)) is not None]
        assert 500 < len(kept) < limit / 3000
        assert kept == list(range(4000 - len(kept), 4000))
        assert database(folder).stat().st_size < limit * 1.5
        await cache.clear()
        assert (await cache.stats())["entries"] == 0
    assert database(folder).stat().st_size < limit / 4, "what was cleared is given back to the file system"


async def test_a_store_does_not_outgrow_its_limit_however_fast_it_is_written(folder: Path) -> None:
    limit = 4 * 2**20
    async with disk(folder, size_limit=limit) as cache:
        for size in (100, 20_000):  # the oldest are small, so that many must go for one that comes
            await asyncio.gather(*(cache.set(key(f"{size}/{n}"), bytes(size)) for n in range(3000)))
        assert database(folder).stat().st_size < limit * 1.5
        # The last batch is reported first, and evicted for after that: one more entry waits for it.
        await cache.set(key("one more"), b"")
        assert limit / 2 < (await cache.stats())["bytes"] < limit * 1.1


async def test_a_cache_that_another_process_locks_says_so_when_it_is_cleared(folder: Path) -> None:
    await filled(folder)
    async with disk(folder, timeout=0.2) as cache:
        async with locked(folder, "BEGIN IMMEDIATE"):
            with pytest.raises(AsmodelError, match=r"could not be cleared: database is locked"):
                await cache.clear()
        assert await cache.clear() == 3


@pytest.mark.parametrize("path", ["~nobody-of-that-name/cache", "/somewhere/$HOME/cache"])
def test_a_path_that_means_something_else_than_it_says_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\[cache\] path"):
        DiskCache(path)


async def test_a_cache_carried_over_a_fork_says_what_to_do_instead(folder: Path) -> None:
    source = (
        "import asyncio, os, sys\n"
        "from asmodel_plugins.disk_cache import DiskCache\n"
        "cache = DiskCache(sys.argv[1])\n"
        "async def main():\n"
        "    await cache.open()\n"
        "    await cache.set('0' * 64, b'parent')\n"
        "    if (child := os.fork()) == 0:\n"
        "        try:\n"
        "            await cache.get('0' * 64)\n"
        "        except RuntimeError as error:\n"
        "            os.write(1, str(error).encode() + b'\\n')\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    os.write(1, await cache.get('0' * 64))\n"
        "    await cache.close()\n"
        "asyncio.run(main())\n"
    )
    with ending(running(source, folder)) as process:
        out, _ = await asyncio.to_thread(process.communicate, None, 30)
    assert out.splitlines() == ["the disk cache was opened before a fork; open one of its own in the child", "parent"]


# ---- processes, threads, locks ----


async def test_a_set_that_was_reported_done_survives_kill_9(folder: Path) -> None:
    source = (
        "import asyncio, itertools, sys\n"
        "from asmodel_plugins.disk_cache import DiskCache\n"
        "async def writer(cache, numbers):\n"
        "    for n in numbers:\n"
        "        await cache.set(f'{n:064x}', b'%d' % n * 50)\n"
        "        print(n, flush=True)\n"
        "async def main():\n"
        "    cache = DiskCache(sys.argv[1])\n"
        "    await cache.open()\n"
        "    numbers = itertools.count()\n"
        "    await asyncio.gather(*(writer(cache, numbers) for _ in range(8)))\n"
        "asyncio.run(main())\n"
    )

    def write_and_die() -> list[int]:
        with ending(running(source, folder)) as process:
            assert process.stdout is not None
            done = [int(process.stdout.readline()) for _ in range(300)]
            process.send_signal(signal.SIGKILL)
            return done + [int(line) for line in process.stdout if line.endswith("\n")]

    for _ in range(3):
        done = await asyncio.to_thread(write_and_die)
        assert len(done) >= 300
        async with disk(folder) as cache:
            lost = [n for n in done if await cache.get(f"{n:064x}") != b"%d" % n * 50]
            assert lost == []
            await cache.clear()
    assert set_aside(folder) == []


@pytest.mark.timeout(60 + 2 * HAMMER_SECONDS)
async def test_two_processes_that_write_into_one_folder_lose_nothing(folder: Path) -> None:
    source = (
        "import asyncio, itertools, sys, time\n"
        "from asmodel_plugins.disk_cache import DiskCache\n"
        "async def writer(cache, numbers, end):\n"
        "    while time.monotonic() < end:\n"
        "        n = next(numbers)\n"
        "        await cache.set(f'{n:064x}', b'%d' % n * 200)\n"
        "        assert await cache.get(f'{n:064x}') == b'%d' % n * 200\n"
        "async def main():\n"
        "    cache = DiskCache(sys.argv[1])\n"
        "    await cache.open()\n"
        "    numbers = itertools.count(int(sys.argv[2]), 2)\n"
        "    end = time.monotonic() + float(sys.argv[3])\n"
        "    await asyncio.gather(*(writer(cache, numbers, end) for _ in range(8)))\n"
        "    await cache.close()\n"
        "    t = cache.troubles\n"
        "    print(next(numbers), t.unstored + t.unreadable + t.late + t.set_aside, flush=True)\n"
        "asyncio.run(main())\n"
    )
    with (
        ending(running(source, folder, 0, HAMMER_SECONDS)) as even,
        ending(running(source, folder, 1, HAMMER_SECONDS)) as odd,
    ):
        answers = await asyncio.gather(
            *(asyncio.to_thread(p.communicate, None, HAMMER_SECONDS + 40) for p in (even, odd))
        )
    ends, troubles = zip(*(map(int, out.split()) for out, _ in answers), strict=True)
    assert troubles == (0, 0)
    async with disk(folder) as cache:
        wanted = [n for start, end in enumerate(ends) for n in range(start, end, 2)]
        assert min(ends) > 100 * HAMMER_SECONDS
        lost = [n for n in wanted if await cache.get(f"{n:064x}") != b"%d" % n * 200]
        assert lost == []
        assert (await cache.stats())["entries"] == len(wanted)


async def test_many_event_loops_share_one_cache(folder: Path) -> None:
    async with disk(folder) as cache:

        async def work(name: int) -> bool:
            await asyncio.gather(*(cache.set(key(f"{name}/{n}"), b"%d" % name) for n in range(100)))
            found = await asyncio.gather(*(cache.get(key(f"{name}/{n}")) for n in range(100)))
            return found == [b"%d" % name] * 100

        def loop(name: int) -> bool:
            return asyncio.run(work(name))

        answers = await asyncio.gather(*(asyncio.to_thread(loop, n) for n in range(4)), work(4))
        assert answers == [True] * 5


async def test_a_waiter_that_is_cancelled_does_not_lose_its_entry(folder: Path) -> None:
    async with disk(folder) as cache:
        tasks = [asyncio.ensure_future(cache.set(key(n), b"paid for")) for n in range(20)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    async with disk(folder) as cache:
        assert [await cache.get(key(n)) for n in range(20)] == [b"paid for"] * 20


async def test_close_writes_what_is_waiting(folder: Path) -> None:
    async with disk(folder) as cache:
        tasks = [asyncio.ensure_future(cache.set(key(n), b"waiting")) for n in range(500)]
        await asyncio.sleep(0)
        await cache.close()
        await asyncio.gather(*tasks)
        with pytest.raises(RuntimeError, match="not open"):
            await cache.set(key(1), b"too late")
    async with disk(folder) as cache:
        assert [await cache.get(key(n)) for n in range(500)] == [b"waiting"] * 500
    assert [t.name for t in threading.enumerate() if t.name.startswith("asmodel-cache")] == []


async def largest_lag(stop: asyncio.Event) -> float:
    worst = 0.0
    while not stop.is_set():
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - start - 0.001)
    return worst


@timed
async def test_sets_do_not_hold_up_the_event_loop(folder: Path) -> None:
    lags: list[float] = []
    async with disk(folder) as cache:
        for attempt in range(3):  # the machine may be busy with something else; the store is not three times in a row
            stop = asyncio.Event()
            lag = asyncio.ensure_future(largest_lag(stop))
            await asyncio.sleep(0.01)
            await asyncio.gather(*(cache.set(key(f"{attempt}/{n}"), os.urandom(4096)) for n in range(2000)))
            stop.set()
            lags.append(await lag)
            if lags[-1] < 0.05:
                break
        in_time(min(lags), 0.1)
        assert await cache.get(key("0/1999")) is not None


LOCK = (
    "import sqlite3, sys\n"
    "con = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)\n"
    "for statement in sys.argv[2].split(';'): con.execute(statement).fetchall()\n"
    "print('held', flush=True)\n"
    "sys.stdin.readline()\n"
)


@asynccontextmanager
async def locked(folder: Path, statements: str) -> AsyncGenerator[None]:
    with ending(running(LOCK, database(folder), statements)) as holder:
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
        yield
        await asyncio.to_thread(holder.communicate, "done\n", 10)


async def timed_gets(cache: DiskCache) -> tuple[list[bytes | None], float, float]:
    """A hundred gets at once, how long they took, and the event loop's largest lag meanwhile, in seconds."""
    stop = asyncio.Event()
    lag = asyncio.ensure_future(largest_lag(stop))
    start = time.monotonic()
    found = await asyncio.gather(*(cache.get(key(n % 3)) for n in range(100)))
    took = time.monotonic() - start
    stop.set()
    return found, took, await lag


@timed
async def test_a_writer_lock_that_another_process_holds_delays_no_get(folder: Path) -> None:
    await filled(folder)
    async with disk(folder, timeout=0.4) as cache:
        async with locked(folder, "BEGIN IMMEDIATE"):
            waiting = asyncio.ensure_future(cache.set(key("new"), b"new"))
            found, took, lag = await timed_gets(cache)
            in_time(max(took, lag), 0.25)
            assert None not in found
            async with asyncio.timeout(0.4 + 1):
                await waiting
            assert await cache.get(key("new")) is None
            assert cache.troubles.unstored == 1
        await cache.set(key("after"), b"after")
        assert await cache.get(key("after")) == b"after"
    assert set_aside(folder) == []


@timed
async def test_a_lock_that_shuts_readers_out_delays_a_get_up_to_its_bound_and_never_the_loop(folder: Path) -> None:
    await filled(folder)
    async with disk(folder, timeout=0.4, read_timeout=0.3) as cache:
        # No process can shut out one that is connected, so this one must not be.
        store = cache._store  # pyright: ignore[reportPrivateUsage]
        assert store is not None
        store.close()
        async with locked(folder, "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; DELETE FROM Cache"):
            found, took, lag = await timed_gets(cache)
            assert found == [None] * 100
            assert took > 0.3
            in_time(took, 0.3 + 0.5)
            in_time(lag, 0.25)
            assert cache.troubles.late == 100
        assert await cache.get(key(1)) == b"value 1"
    assert set_aside(folder) == []


async def test_a_healthy_store_that_is_locked_at_start_is_never_set_aside(folder: Path) -> None:
    await filled(folder)
    with closing(sqlite3.connect(database(folder), isolation_level=None, check_same_thread=False)) as con:
        con.execute("PRAGMA locking_mode = EXCLUSIVE")
        con.execute("BEGIN EXCLUSIVE")
        con.execute("UPDATE Cache SET access_count = 1")
        with pytest.raises(ConfigurationError, match=r"kept the cache store in .* locked for 0\.3 s"):
            await DiskCache(folder, timeout=0.3).open()
    assert set_aside(folder) == []
    async with disk(folder) as cache:
        assert await cache.get(key(0)) == b"value 0"
