"""The cache in Valkey or Redis: what any cache must do, what it finds that is not its own, and a store that fails.

The store is a real Valkey, from a Python package. One that answers slowly, wrongly or not at all is played here.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.redis_serving import Store, free_port, packaged_server, running
from tests.timed import in_time, timed

from asmodel.conformance import CACHE_CHECKS, CacheCheck, check_cache, opened
from asmodel.errors import AsmodelError, ConfigurationError
from asmodel.protocols import Cache, Listable, Lockable, Openable
from asmodel_plugins.redis_cache import RedisCache

TIMEOUT = 0.2

SLACK = 0.3
"""What a busy machine may add to a bound."""

REPLY = b'{"v":1,"text":"' + b"an answer that goes on and on " * 1000 + b'"}'


def key(n: int | str) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Store]:
    with own_server(tmp_path_factory.mktemp("valkey")) as store:
        yield store


def own_server(folder: Path, *options: str) -> Any:
    program = packaged_server()
    if program is None:
        pytest.skip("there is no Valkey for this platform as a Python package")
    return running(program, folder, options)


@pytest.fixture
def prefix() -> str:
    """A corner of the server that is the test's own; its characters mean something in a pattern."""
    return f"te*st?[{os.urandom(4).hex()}]\\^:"


@pytest.fixture
async def cache(server: Store, prefix: str) -> AsyncGenerator[RedisCache]:
    async with opened(cache := RedisCache(server.url, prefix=prefix, timeout=2)):
        yield cache


def name(prefix: str, n: int | str) -> str:
    return f"{prefix}1:{key(n)}"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "asmodel.cache" and r.levelno >= logging.WARNING]


async def seconds_of(work: Awaitable[Any]) -> float:
    began = time.monotonic()
    await work
    return time.monotonic() - began


async def answering(cache: RedisCache) -> None:
    async with asyncio.timeout(15):
        while True:
            await cache.set("there again", b"yes")
            if await cache.get("there again") == b"yes":
                return
            await asyncio.sleep(0.02)


# ---- what any cache must do ----


@pytest.mark.parametrize("check", CACHE_CHECKS, ids=lambda check: check.__name__)
async def test_it_does_what_every_cache_must(cache: RedisCache, check: CacheCheck) -> None:
    await check(cache)
    assert cache.troubles.outages == 0


async def test_what_it_stores_outlives_the_object(server: Store, prefix: str) -> None:
    await check_cache(lambda: RedisCache(server.url, prefix=prefix, timeout=2, secret="s"), durable=True)


def test_it_is_all_that_a_store_can_be() -> None:
    cache: Cache = RedisCache()
    assert isinstance(cache, Openable)
    assert isinstance(cache, Listable)
    assert isinstance(cache, Lockable)


async def test_long_values_take_less_room_and_short_ones_are_as_they_are(
    cache: RedisCache, server: Store, prefix: str
) -> None:
    await cache.set(key("long"), REPLY)
    await cache.set(key("short"), REPLY[:1000])
    noise = os.urandom(10_000)
    await cache.set(key("noise"), noise)
    assert server.tell("STRLEN", name(prefix, "long")) < len(REPLY) / 10
    assert REPLY[:1000] in server.tell("GET", name(prefix, "short"))
    assert noise in server.tell("GET", name(prefix, "noise"))
    assert [await cache.get(key(n)) for n in ("long", "short", "noise")] == [REPLY, REPLY[:1000], noise]


async def test_an_entry_has_the_caches_ttl_unless_it_says_another(server: Store, prefix: str) -> None:
    async with opened(cache := RedisCache(server.url, prefix=prefix, ttl=100)):
        await cache.set(key(1), b"x")
        await cache.set(key(2), b"x", ttl=1000)
    assert 90_000 < server.tell("PTTL", name(prefix, 1)) <= 100_000
    assert 990_000 < server.tell("PTTL", name(prefix, 2)) <= 1_000_000


async def test_one_tag_or_what_is_old_can_be_cleared_and_nothing_of_anyone_elses(
    cache: RedisCache, server: Store, prefix: str
) -> None:
    await asyncio.gather(*(cache.set(key(n), b"x" * 100, tag=f"p/{n % 2}") for n in range(1000)))
    await cache.set(key("long tag"), b"1", tag="t" * 1000)
    theirs = [prefix.replace("*", "-") + "1:x", prefix[:-1], "test", name(prefix, "list")]
    for other in theirs[:3]:
        server.tell("SET", other, "mine")
    server.tell("RPUSH", theirs[3], "mine")
    stats = await cache.stats()
    assert (stats["entries"], stats["bytes"]) == (1001, 100_001)
    assert stats["tags"]["p/1"] == {"entries": 500, "bytes": 50_000}
    assert stats["tags"]["t" * 1000] == {"entries": 1, "bytes": 1}
    assert await cache.clear(tag="p/1") == 500
    assert await cache.get(key(1)) is None
    assert await cache.get(key(2)) == b"x" * 100
    assert await cache.clear(older_than=3600) == 0
    await asyncio.sleep(0.01)
    assert await cache.clear(older_than=0.005, tag="p/0") == 500
    assert await cache.clear() == 1
    assert server.tell("EXISTS", *theirs) == 4


async def test_listing_and_clearing_go_in_small_steps(cache: RedisCache, server: Store) -> None:
    await asyncio.gather(*(cache.set(key(n), REPLY) for n in range(2000)))
    server.tell("CONFIG", "RESETSTAT")
    assert (await cache.stats())["entries"] == 2000
    assert await cache.clear() == 2000
    commands = {command: stats["calls"] for command, stats in server.tell("INFO", "commandstats").items()}
    assert commands.pop("cmdstat_scan") >= 2 * 2000 / 250
    assert commands.pop("cmdstat_getrange") >= 2 * 2000  # a head each, and no value
    assert commands.pop("cmdstat_unlink") == 2000
    assert not {"cmdstat_keys", "cmdstat_del", "cmdstat_flushdb", "cmdstat_get", "cmdstat_mget"} & commands.keys()


# ---- what is not an entry ----


def cut(entry: bytes) -> bytes:
    return entry[:-1]


def head_only(entry: bytes) -> bytes:
    return entry[:20]


def flipped(entry: bytes) -> bytes:
    return entry[:-1] + bytes((entry[-1] ^ 1,))


def retagged(entry: bytes) -> bytes:
    return entry.replace(b"p/s", b"p/t")


def of_another_format(entry: bytes) -> bytes:
    return b"\x02" + entry[1:]


def pickled(entry: bytes) -> bytes:
    return b"\x80\x04cposix\nsystem\nX\x02\x00\x00\x00lsR."


def json_text(entry: bytes) -> bytes:
    return b'{"v":1,"text":"planted"}'


def nothing(entry: bytes) -> bytes:
    return b""


CHANGES = [cut, head_only, flipped, retagged, of_another_format, pickled, json_text, nothing]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_a_changed_entry_is_a_miss_that_is_reported(
    cache: RedisCache, server: Store, prefix: str, change: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    await cache.set(key(0), REPLY, tag="p/s")
    server.tell("SET", name(prefix, 0), change(server.tell("GET", name(prefix, 0))))
    for _ in range(3):
        assert await cache.get(key(0)) is None
    assert cache.troubles.unreadable == 3
    assert len(warnings_of(caplog)) == 1
    await cache.set(key(0), b"bought again")
    assert await cache.get(key(0)) == b"bought again"


async def test_an_entry_of_another_key_is_a_miss(cache: RedisCache, server: Store, prefix: str) -> None:
    await cache.set(key(0), b"the answer to another question")
    server.tell("COPY", name(prefix, 0), name(prefix, 1))
    assert await cache.get(key(1)) is None
    assert cache.troubles.unreadable == 1


async def test_something_that_is_no_text_is_a_miss_and_is_replaced(
    cache: RedisCache, server: Store, prefix: str
) -> None:
    server.tell("RPUSH", name(prefix, 0), "a", "list")
    assert await cache.get(key(0)) is None
    await cache.set(key(0), b"bought")
    assert await cache.get(key(0)) == b"bought"
    assert cache.troubles.outages == 0


def sealed(entry_name: str, size: int, packed: bytes) -> bytes:
    """An entry as somebody would make it who knows the format, and no secret."""
    body = struct.pack("<BdII", 1, time.time(), size, 0) + packed
    seal = hashlib.blake2b(digest_size=16, person=b"asmodel entry")
    seal.update(len(entry_name).to_bytes(4, "little") + entry_name.encode() + body)
    return b"\x01" + seal.digest() + body


@pytest.mark.parametrize("size", [10, 2**31])
async def test_a_few_bytes_cannot_become_many(cache: RedisCache, server: Store, prefix: str, size: int) -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    server.tell("SET", name(prefix, 0), sealed(name(prefix, 0), size, bomb))
    assert await cache.get(key(0)) is None
    assert cache.troubles.unreadable == 1


async def test_with_a_secret_nobody_else_can_plant_an_answer(server: Store, prefix: str) -> None:
    planted = zlib.compress(b'{"v":1,"text":"planted"}')
    server.tell("SET", name(prefix, 0), sealed(name(prefix, 0), 24, planted))
    async with opened(trusting := RedisCache(server.url, prefix=prefix)):
        assert await trusting.get(key(0)) == b'{"v":1,"text":"planted"}'
        await trusting.set(key(1), b"without the secret")
    async with opened(cache := RedisCache(server.url, prefix=prefix, secret="one")):
        assert await cache.get(key(0)) is None
        assert await cache.get(key(1)) is None
        assert cache.troubles.unreadable == 2
        await cache.set(key(2), b"with it")
    async with opened(same := RedisCache(server.url, prefix=prefix, secret="one")):
        assert await same.get(key(2)) == b"with it"
    async with opened(other := RedisCache(server.url, prefix=prefix, secret="two")):
        assert await other.get(key(2)) is None


async def test_what_is_too_large_is_not_stored(cache: RedisCache) -> None:
    await cache.set(key(0), bytes(64 * 2**20 + 1))
    assert await cache.get(key(0)) is None
    assert cache.troubles.unstored == 1


async def test_only_bytes_are_stored(cache: RedisCache) -> None:
    with pytest.raises(TypeError, match="a cached value is bytes, not dict"):
        await cache.set(key(0), {})  # type: ignore[arg-type]  # that is what is tried
    with pytest.raises(UnicodeEncodeError):
        await cache.set("\ud800", b"")
    with pytest.raises(RuntimeError, match="is not open"):
        await RedisCache().get("a")


# ---- a store that fails ----


async def drain(cache: RedisCache, calls: int = 50) -> list[float]:
    """How long each of so many gets, sets and leases took, one after another."""
    took: list[float] = []
    for n in range(calls):
        took.append(await seconds_of(cache.get(key(n))))
        took.append(await seconds_of(cache.set(key(n), REPLY)))
        began = time.monotonic()
        async with cache.lease(key(n)):
            took.append(time.monotonic() - began)
    return took


@timed
async def test_a_store_that_is_not_there_costs_nothing_and_is_used_when_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with own_server(tmp_path) as server:
        server.stop()
        async with opened(cache := RedisCache(server.url, timeout=TIMEOUT)):
            took = await drain(cache)
            in_time(sum(took), 1)
            assert (cache.troubles.unreachable, cache.troubles.unstored, cache.troubles.unlocked) == (50, 50, 50)
            server.start()
            await answering(cache)
            assert cache.troubles.outages == 1
    (told,) = warnings_of(caplog)
    assert f"redis://127.0.0.1:{server.port}/0 cannot be used: ConnectionError" in told


@timed
async def test_a_store_that_stands_still_costs_one_timeout_and_then_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with own_server(tmp_path) as server:
        async with opened(cache := RedisCache(server.url, timeout=TIMEOUT)):
            await cache.set(key(0), b"x")
            server.pause()
            waited = await seconds_of(cache.get(key(0)))
            assert waited > TIMEOUT * 0.9
            in_time(waited, TIMEOUT + SLACK)
            in_time(sum(await drain(cache)), 1)
            server.go_on()
            await answering(cache)
            assert await cache.get(key(0)) == REPLY or await cache.get(key(0)) == b"x"
            assert cache.troubles.late == 1
            assert len(warnings_of(caplog)) == 1


@timed
async def test_many_calls_at_once_wait_no_longer_than_one(tmp_path: Path) -> None:
    with own_server(tmp_path) as server:
        async with opened(cache := RedisCache(server.url, timeout=TIMEOUT, connections=4)):
            await cache.get(key(0))
            server.pause()
            took = await asyncio.gather(*(seconds_of(cache.get(key(n))) for n in range(300)))
            in_time(max(took), TIMEOUT + SLACK)
            assert cache.troubles.late + cache.troubles.unreachable == 300
            server.stop()


async def test_a_restart_loses_entries_and_no_request(tmp_path: Path) -> None:
    with own_server(tmp_path) as server:
        async with opened(cache := RedisCache(server.url, timeout=TIMEOUT)):
            await asyncio.gather(*(cache.set(key(n), b"x") for n in range(50)))
            for _ in range(3):
                server.stop()
                server.start()
                await answering(cache)
            assert await cache.get(key(1)) is None


async def test_warnings_are_few_however_often_it_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with own_server(tmp_path) as server:
        async with opened(cache := RedisCache(server.url, timeout=TIMEOUT)):
            for _ in range(3):
                server.stop()
                await drain(cache, 5)
                server.start()
                await answering(cache)
            assert cache.troubles.outages >= 3
    assert len(warnings_of(caplog)) == 1


async def test_a_busy_event_loop_is_no_slow_store(cache: RedisCache) -> None:
    quick = RedisCache(cache.place, timeout=0.05)
    async with opened(quick):
        await quick.set(key(0), b"x")
        for _ in range(5):
            asking = asyncio.create_task(quick.get(key(0)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.1)  # noqa: ASYNC251  # the very thing
            assert await asking == b"x"
        assert quick.troubles.outages == 0


async def test_callers_who_leave_leave_nothing_behind(cache: RedisCache) -> None:
    await cache.set(key(0), REPLY)
    for delay in (0, 0, 0.0001, 0.0002, 0.0005, 0.001):
        tasks = [asyncio.create_task(cache.get(key(0))) for _ in range(50)]
        await asyncio.sleep(delay)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    values = {key(n): b"%d" % n for n in range(100)}
    await asyncio.gather(*(cache.set(k, value) for k, value in values.items()))
    assert await asyncio.gather(*(cache.get(k) for k in values)) == list(values.values())
    assert cache.troubles.outages == 0


async def test_clearing_a_store_that_is_away_says_so(tmp_path: Path) -> None:
    with own_server(tmp_path) as server:
        async with opened(cache := RedisCache(server.url, timeout=TIMEOUT)):
            await cache.set(key(0), b"x")
            server.stop()
            with pytest.raises(AsmodelError, match=r"could not be cleared: ConnectionError.*; 0 entries were deleted"):
                await cache.clear()
            assert [entry async for entry in cache.entries()] == []
            assert (await cache.stats())["entries"] == 0


async def test_a_full_store_refuses_and_is_still_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with own_server(tmp_path) as server:
        async with opened(cache := RedisCache(server.url, timeout=TIMEOUT)):
            await cache.set(key(0), b"x")
            server.tell("CONFIG", "SET", "maxmemory", "1")
            for n in range(3):
                await cache.set(key(1), b"%d" % n)
            async with cache.lease(key(0)) as lease:
                assert lease.state == "none"
            assert await cache.get(key(0)) == b"x"
            assert (cache.troubles.unstored, cache.troubles.unlocked, cache.troubles.outages) == (3, 1, 0)
    stored, leased, *more = warnings_of(caplog)
    assert "entries were not stored: OutOfMemoryError" in stored
    assert "leases cannot be had" in leased
    assert more == [] or "given back" in more[0]


# ---- a server that is none, played ----


Part = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def playing(answer: Part) -> AsyncGenerator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except ConnectionError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.close()


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        pass


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4096)


async def speaks_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4096)
    writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


async def babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        writer.write(os.urandom(64))


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4096)
    writer.write(b"$1000000\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def promises_too_much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        writer.write(b"$10\r\nabc\r\n")


async def refuses_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(4096):
        # As servers do it: the command's own words come back.
        writer.write(b"-ERR unknown command, with args beginning with: " + data.replace(b"\r\n", b" ") + b"\r\n")


async def answers_the_wrong_type(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        writer.write(b"*2\r\n:1\r\n:2\r\n")


PLAYED = [says_nothing, hangs_up, speaks_http, babbles, drips, promises_too_much, refuses_all, answers_the_wrong_type]


@timed
@pytest.mark.parametrize("answer", PLAYED, ids=lambda answer: answer.__name__)
async def test_whatever_is_at_the_address_no_call_fails_and_none_waits_long(
    answer: Part, caplog: pytest.LogCaptureFixture
) -> None:
    async with playing(answer) as url, asyncio.timeout(20), opened(cache := RedisCache(url, timeout=TIMEOUT)):
        for _ in range(20):
            in_time(await seconds_of(cache.get(key(0))), TIMEOUT + SLACK)
            assert await cache.get(key(0)) is None
            in_time(await seconds_of(cache.set(key(0), b"a secret of the user")), TIMEOUT + SLACK)
            async with cache.lease(key(0)) as lease:
                assert lease.state == "none"
        assert cache.troubles.unlocked == 20
        assert [entry async for entry in cache.entries()] == []
    assert len(warnings_of(caplog)) <= 6
    assert "a secret of the user" not in caplog.text


# ---- addresses ----


def complaint(url: str, **settings: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        RedisCache(url, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h", '[cache] url: "http" is no kind of address'),
        ("h:6379", '[cache] url: "h" is no kind of address'),
        ("redis+ring://h", '"redis+ring" is no kind of address'),
        ("redis://h:port/0", "this is no address"),
        ("redis://h1,h2/0", "2 hosts are a cluster or sentinels; write redis+cluster://"),
        ("redis+cluster://", "needs at least one HOST:PORT"),
        ("rediss+sentinel://h1,h2", "say which service; rediss+sentinel://"),
        ("unix+cluster:///x", "not by a socket"),
        ("redis://h?nonsense=s3cret", "redis-py has no option 'nonsense'"),
        ("redis+cluster://h?nonsense=s3cret", "redis-py has no option 'nonsense'"),
        ("redis+sentinel://h/s?nonsense=s3cret", "redis-py has no option 'nonsense'"),
        ("redis://h?socket_timeout=s3cret", "Invalid value for 'socket_timeout'"),
        ("redis://h?sentinel_password=s3cret", "sentinel_… options are for redis+sentinel://"),
        ("redis+cluster://h/3", "Argument 'db' must be 0 or None in cluster mode"),
    ],
)
def test_an_address_that_cannot_be_is_refused_and_no_secret_told(url: str, told: str) -> None:
    found = complaint(url.replace("://", "://me:s3cret@") if "//" in url else url)
    assert told in found
    assert "s3cret" not in found


@pytest.mark.parametrize("name", ["timeout", "connections", "ttl"])
def test_a_setting_that_cannot_be_is_refused(name: str) -> None:
    assert complaint("redis://h", **{name: 0}) == f"[cache] {name}: 0 is not above 0"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://h", "redis://h:6379"),
        ("valkeys://me:s3cret@h:7/3?ssl_cert_reqs=none", "valkeys://h:7/3"),
        ("unix:///run/valkey.sock?db=2", "unix:///run/valkey.sock"),
        ("redis+cluster://me:s3cret@a:1,[::1]:2", "redis+cluster://a:1,[::1]:2"),
        ("rediss+sentinel://:s3cret@a,b:2/main/1?sentinel_password=s3cret", "rediss+sentinel://a:6379,b:2/main/1"),
        ("redis://%68ost/0", "redis://host:6379/0"),
    ],
)
def test_an_address_is_told_without_names_and_passwords(url: str, place: str) -> None:
    assert RedisCache(url).place == place


async def test_a_certificate_that_is_not_there_is_told_at_start(tmp_path: Path) -> None:
    missing = tmp_path / "ca.pem"
    with pytest.raises(ConfigurationError, match=f'ssl_ca_certs: there is no "{missing}"'):
        await RedisCache(f"rediss://127.0.0.1?ssl_ca_certs={missing}").open()


async def test_a_refused_password_stops_the_start_and_is_not_told(tmp_path: Path) -> None:
    with own_server(tmp_path, "--requirepass", "right") as server:
        at = f"127.0.0.1:{server.port}"
        for url in (f"redis://{at}", f"redis://:s3cret@{at}", f"redis://me:s3cret@{at}", f"redis://:right@{at}/99"):
            with pytest.raises(ConfigurationError, match=rf"the store at redis://{at}.* answers ") as caught:
                await RedisCache(url).open()
            assert "s3cret" not in str(caught.value)
        async with opened(cache := RedisCache(f"redis://:right@{at}/1")):
            await cache.set(key(0), b"x")
            assert await cache.get(key(0)) == b"x"


async def test_a_socket_of_this_machine_is_an_address_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with own_server(tmp_path, "--unixsocket", str(path)):
        await check_cache(lambda: RedisCache(f"unix://{path}", timeout=2))


async def test_nobody_listens_at_start(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(cache := RedisCache(f"redis://127.0.0.1:{free_port()}")):
        assert await cache.get("a") is None
    assert len(warnings_of(caplog)) == 1


def test_without_redis_py_one_is_told_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'redis'\")")
    sources = [str(Path(__file__).resolve().parent.parent / room) for room in ("proxy", "plugins")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sources])}
    command = [sys.executable, "-c", "import asmodel_plugins.redis_cache"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert "the redis cache needs redis-py: pip install 'asmodel[redis]'" in run.stderr
