"""Leases: of all who want the same, in whatever process, one buys; when that one dies, another."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.leasing import LEASE_SECONDS, Failed, Leasing, once, store_at
from tests.redis_serving import Store, packaged_server, running
from tests.timed import in_time, timed

from asmodel.conformance import opened
from asmodel.protocols import Lockable
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.redis_cache import RedisCache

ROOT = Path(__file__).resolve().parent.parent

A_MOMENT = 1.0
"""Within this, on a busy machine, whoever waits has seen that there is nothing to wait for."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Store]:
    program = packaged_server()
    if program is None:
        pytest.skip("there is no Valkey for this platform as a Python package")
    with running(program, tmp_path_factory.mktemp("valkey")) as store:
        yield store


@pytest.fixture(params=["disk", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "disk":
        return str(tmp_path / "cache")
    server: Store = request.getfixturevalue("server")
    return server.url


@pytest.fixture
async def store(kind: str, place: str) -> AsyncGenerator[Leasing]:
    async with opened(store := store_at(kind, place)):
        yield store


@pytest.fixture
async def other(kind: str, place: str) -> AsyncGenerator[Leasing]:
    """The same store, as another process has it."""
    async with opened(store := store_at(kind, place)):
        yield store


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}-{os.urandom(4).hex()}"


@contextmanager
def ready(*arguments: str) -> Generator[subprocess.Popen[str]]:
    """A Python process that has said that it is ready."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@contextmanager
def asking(kind: str, place: str, key: str, askers: int, seconds: float, log: Path) -> Generator[subprocess.Popen[str]]:
    """A process that is ready to ask."""
    with ready("-m", "tests.leasing", kind, place, key, str(askers), str(seconds), str(log)) as process:
        yield process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


async def answers(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return int(await asyncio.to_thread(process.stdout.readline))


def purchases(log: Path) -> list[str]:
    """Who has bought."""
    return log.read_text().splitlines() if log.exists() else []


async def grown(log: Path, lines: int = 1) -> list[str]:
    async with asyncio.timeout(20):
        while len(found := await asyncio.to_thread(purchases, log)) < lines:  # noqa: ASYNC110  # by another process
            await asyncio.sleep(0.01)
    return found


def test_both_stores_can_be_locked(tmp_path: Path) -> None:
    assert isinstance(DiskCache(tmp_path), Lockable)
    assert isinstance(RedisCache(), Lockable)


async def test_one_holds_it_and_the_others_know(store: Leasing, other: Leasing, key: str) -> None:
    async with store.lease(key, LEASE_SECONDS) as mine:
        assert mine.state == "held"
        for theirs in (store, other):
            async with theirs.lease(key, LEASE_SECONDS) as lease:
                assert lease.state == "taken"
        async with other.lease(key + "x", LEASE_SECONDS) as lease:
            assert lease.state == "held"


@timed
async def test_whoever_waits_goes_on_when_it_is_given_back(store: Leasing, other: Leasing, key: str) -> None:
    async def follow() -> float:
        async with other.lease(key, LEASE_SECONDS) as lease:
            assert lease.state == "taken"
            assert await lease.wait() is None
            return time.monotonic()

    async with store.lease(key, LEASE_SECONDS):
        waiting = asyncio.create_task(follow())
        await asyncio.sleep(0.3)
        assert not waiting.done()
    ended = time.monotonic()
    in_time(await waiting - ended, A_MOMENT)
    async with other.lease(key, LEASE_SECONDS) as lease:
        assert lease.state == "held"


@timed
async def test_a_lease_is_kept_up_for_as_long_as_it_is_held(store: Leasing, other: Leasing, key: str) -> None:
    async with store.lease(key, 0.5):
        for _ in range(15):
            looked = time.monotonic()
            await asyncio.sleep(0.1)
            in_time(time.monotonic() - looked, 0.25)  # Nobody keeps up what he stands still with.
            async with other.lease(key, 0.5) as lease:
                assert lease.state == "taken"


async def test_a_note_is_for_those_who_waited_and_nobody_after(store: Leasing, other: Leasing, key: str) -> None:
    following = asyncio.Barrier(11)

    async def follow() -> bytes | None:
        async with other.lease(key, LEASE_SECONDS) as lease:
            assert lease.state == "taken"
            await following.wait()
            return await lease.wait()

    async with store.lease(key, LEASE_SECONDS) as lease:
        waiting = [asyncio.create_task(follow()) for _ in range(10)]
        await following.wait()
        lease.leave("it failed: ü\0".encode())
    assert set(await asyncio.gather(*waiting)) == {"it failed: ü\0".encode()}
    async with other.lease(key, LEASE_SECONDS) as later:
        assert later.state == "held"
    with pytest.raises(ValueError, match="too long"):
        lease.leave(bytes(100_000))


async def test_one_who_stops_waiting_or_asking_is_in_nobodys_way(store: Leasing, other: Leasing, key: str) -> None:
    async def follow() -> None:
        async with store.lease(key, LEASE_SECONDS) as lease:
            await (lease.wait() if lease.state == "taken" else asyncio.sleep(30))

    for delay in (0, 0, 0.0001, 0.0003, 0.001, 0.05):
        tasks = [asyncio.create_task(follow()) for _ in range(20)]
        await asyncio.sleep(delay)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    deadline = time.monotonic() + A_MOMENT
    while True:
        async with other.lease(key, LEASE_SECONDS) as lease:
            if lease.state == "held":
                return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_deadline_is_the_waiters_own(store: Leasing, other: Leasing, key: str) -> None:
    async with store.lease(key, LEASE_SECONDS), other.lease(key, LEASE_SECONDS) as lease:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await lease.wait()


async def test_equal_requests_in_two_processes_are_one_purchase(
    kind: str, place: str, store: Leasing, key: str, tmp_path: Path
) -> None:
    log = tmp_path / "purchases"
    with ExitStack() as stack:
        processes = [stack.enter_context(asking(kind, place, key, 32, 0.5, log)) for _ in range(2)]
        for process in processes:
            go(process)
        assert [await answers(process) for process in processes] == [32, 32]
    assert len(purchases(log)) == 1
    assert await store.get(key) == b"bought"


@timed
async def test_when_the_buyer_is_killed_another_buys_within_one_lease(
    kind: str, place: str, store: Leasing, key: str, tmp_path: Path
) -> None:
    log = tmp_path / "purchases"

    async def buy() -> bytes:
        return b"bought after all"

    with asking(kind, place, key, 1, 60, log) as process:
        go(process)
        await grown(log)
        waiting = [asyncio.create_task(once(store, key, buy)) for _ in range(8)]
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        assert set(await asyncio.gather(*waiting)) == {b"bought after all"}
        in_time(time.monotonic() - began, LEASE_SECONDS + A_MOMENT)


@timed
async def test_a_buyer_that_stands_still_is_passed_by_and_does_no_harm_later(
    kind: str, place: str, store: Leasing, key: str, tmp_path: Path
) -> None:
    log = tmp_path / "purchases"
    began_again = asyncio.Event()

    async def buy() -> bytes:
        began_again.set()
        await asyncio.sleep(1.5)
        return b"bought after all"

    with asking(kind, place, key, 1, 0.5, log) as process:
        go(process)
        await grown(log)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        waiting = asyncio.create_task(once(store, key, buy))
        await began_again.wait()
        in_time(time.monotonic() - began, LEASE_SECONDS + A_MOMENT)
        process.send_signal(signal.SIGCONT)
        assert await answers(process) == 1
        # It gave back what it no longer had.
        async with store.lease(key, LEASE_SECONDS) as lease:
            assert lease.state == "taken"
        assert await waiting == b"bought after all"


async def test_a_failure_is_every_waiters_and_no_later_askers(store: Leasing, other: Leasing, key: str) -> None:
    bought = Counter[str]()

    async def fail() -> bytes:
        bought["failed"] += 1
        # All have to be waiting before it fails, also on a machine that is busy with something else.
        await asyncio.sleep(1.5)
        raise Failed("the upstream is down")

    async def buy() -> bytes:
        bought["bought"] += 1
        return b"value"

    waiting = [asyncio.create_task(once(s, key, fail)) for s in (store, other) for _ in range(16)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {str(result) for result in results} == {"the upstream is down"}
    assert await once(other, key, buy) == b"value"
    assert bought == {"failed": 1, "bought": 1}


# ---- on disk ----


def files(leases: Path) -> list[str]:
    return [path.name for path in leases.iterdir()]


async def test_no_file_is_left_of_those_who_waited_nor_of_a_killed_holder(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "purchases"
    leases = folder / "leases"
    with asking("disk", str(folder), "abandoned", 1, 60, log) as process:
        go(process)
        await grown(log)
        async with opened(store := DiskCache(folder)), store.lease("abandoned") as lease:
            assert lease.state == "taken"
            assert {p.stat().st_mode & 0o777 for p in leases.iterdir()} == {0o600}
            assert leases.stat().st_mode & 0o777 == 0o700
            assert len(files(leases)) == 2
            process.kill()
            assert await lease.wait() is None
        assert files(leases) == ["table"]
    # One who was killed while it waited left its box.
    (leases / "abandoned-box").write_bytes(b"")
    async with opened(store := DiskCache(folder)), store.lease("another"):
        assert files(leases) == ["table"]


async def test_a_folder_that_cannot_be_used_is_no_lease_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(store := DiskCache(tmp_path / "cache")):
        (tmp_path / "cache" / "leases").write_text("in the way")
        for _ in range(3):
            async with store.lease("a") as lease:
                assert lease.state == "none"
                assert await lease.wait() is None
        (tmp_path / "cache" / "leases").unlink()
        async with store.lease("a") as lease:
            assert lease.state == "held"
    assert len([r for r in caplog.records if "bought by each" in r.getMessage()]) == 1


MANY = (
    "import asyncio, os, sys\n"
    "from tests.leasing import once\n"
    "from asmodel_plugins.disk_cache import DiskCache\n"
    "async def main():\n"
    "    store = DiskCache(sys.argv[1])\n"
    "    await store.open()\n"
    "    bought = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
    "    async def ask(n):\n"
    "        async def buy():\n"
    "            os.write(bought, b'%d\\n' % n)\n"
    "            await asyncio.sleep(n % 5 / 1000)\n"
    "            return b'%d' % n\n"
    "        assert await once(store, f'key {n}', buy) == b'%d' % n\n"
    "    print('ready', flush=True)\n"
    "    sys.stdin.readline()\n"
    "    for start in range(0, 2000, 100):\n"
    "        await asyncio.gather(*(ask(n) for n in range(start, start + 100)))\n"
    "    await store.close()\n"
    "    print(2000, flush=True)\n"
    "asyncio.run(main())\n"
)


async def test_of_many_keys_that_several_processes_want_each_is_bought_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        arguments = "-c", MANY, str(tmp_path / "cache"), str(tmp_path / "bought")
        processes = [stack.enter_context(ready(*arguments)) for _ in range(3)]
        for process in processes:
            go(process)
        assert [await answers(process) for process in processes] == [2000] * 3
    assert sorted(purchases(tmp_path / "bought"), key=int) == [str(n) for n in range(2000)]


async def test_a_table_that_is_deleted_is_begun_anew_and_what_was_held_in_it_given_back(tmp_path: Path) -> None:
    async with opened(store := DiskCache(tmp_path / "cache")), opened(other := DiskCache(tmp_path / "cache")):
        async with store.lease("a") as before:
            assert before.state == "held"
            (tmp_path / "cache" / "leases" / "table").unlink()
            await asyncio.sleep(0.6)  # Both look now and then.
            async with store.lease("b") as mine, other.lease("b") as theirs:
                assert (mine.state, theirs.state) == ("held", "taken")
        async with other.lease("a") as after:
            assert after.state == "held"
    assert files(tmp_path / "cache" / "leases") == ["table"]


async def test_a_store_may_be_closed_while_a_lease_is_held(tmp_path: Path) -> None:
    async with opened(other := DiskCache(tmp_path / "cache")):
        store = DiskCache(tmp_path / "cache")
        await store.open()
        async with store.lease("a") as lease:
            await store.close()
            assert lease.state == "held"
            async with other.lease("a") as theirs:
                assert theirs.state == "taken"
        async with other.lease("a") as theirs:
            assert theirs.state == "held"


async def test_leases_do_not_wait_for_the_event_loops_own_threads(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with opened(store := DiskCache(tmp_path / "cache")):
        busy = asyncio.create_task(asyncio.to_thread(time.sleep, 1))
        async with store.lease("a") as lease:
            assert lease.state == "held"
        assert not busy.done()
        await busy


# ---- in Valkey ----


@timed
async def test_a_store_that_forgets_is_told_again(server: Store, key: str) -> None:
    async with opened(store := RedisCache(server.url)), store.lease(key, 0.6):
        server.tell("FLUSHDB")
        flushed = time.monotonic()
        await asyncio.sleep(0.4)
        in_time(time.monotonic() - flushed, 0.55)
        async with store.lease(key, 0.6) as lease:
            assert lease.state == "taken"


@timed
async def test_without_a_store_there_is_no_lease_and_no_waiting(server: Store, key: str) -> None:
    async with opened(store := RedisCache(f"redis://127.0.0.1:{server.port + 1}", timeout=0.2)):
        began = time.monotonic()
        for _ in range(100):
            async with store.lease(key) as lease:
                assert lease.state == "none"
                assert await lease.wait() is None
        in_time(time.monotonic() - began, 0.5)
        assert store.troubles.unlocked == 100


async def test_what_could_not_be_given_back_is_when_the_store_is_there_again(tmp_path: Path, key: str) -> None:
    program = packaged_server()
    if program is None:
        pytest.skip("there is no Valkey for this platform as a Python package")
    with running(program, tmp_path) as server:
        async with opened(store := RedisCache(server.url, timeout=0.2)):
            async with store.lease(key, 60) as lease:
                assert lease.state == "held"
                server.pause()
                assert await store.get("x") is None
            await asyncio.sleep(0.1)
            server.go_on()
            async with asyncio.timeout(5):
                while True:
                    async with store.lease(key, 60) as lease:
                        if lease.state == "held":
                            return
                    await asyncio.sleep(0.05)


@timed
async def test_a_waiter_goes_on_when_the_store_fails(tmp_path: Path, key: str) -> None:
    program = packaged_server()
    if program is None:
        pytest.skip("there is no Valkey for this platform as a Python package")
    with running(program, tmp_path) as server:
        async with opened(store := RedisCache(server.url)), store.lease(key), store.lease(key) as lease:
            waiting = asyncio.create_task(lease.wait())
            await asyncio.sleep(0.1)
            server.pause()
            began = time.monotonic()
            assert await waiting is None
            in_time(time.monotonic() - began, A_MOMENT)
            server.stop()
