"""The shared cache on real servers: each one that this machine has, alone and many as one, well and failing."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from openai import OpenAI
from tests.e2e import images, stores
from tests.leasing import LEASE_SECONDS, once
from tests.redis_serving import Store, free_port, running
from tests.serving import create, serving, upstream
from tests.timed import in_time, timed

from asmodel.conformance import check_cache, opened
from asmodel.testing import ScriptedServer
from asmodel_plugins.redis_cache import RedisCache

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(__file__).parent / "programs"

TIMEOUT = 0.25

SLACK = 0.5
"""What a busy machine may add to a bound."""


@pytest.fixture(params=stores.SERVERS)
def program(request: pytest.FixtureRequest) -> str:
    return stores.program(request.param)


@pytest.fixture
def server(program: str, tmp_path: Path) -> Generator[Store]:
    with running(program, tmp_path) as store:
        yield store


async def until(true: Callable[[], Awaitable[bool]], seconds: float = 30) -> float:
    """How long it took."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not await true():  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0.02)
    return time.monotonic() - began


def works(cache: RedisCache, key: str = "there") -> Callable[[], Awaitable[bool]]:
    async def tried() -> bool:
        await cache.set(key, b"yes")
        return await cache.get(key) == b"yes"

    return tried


# ---- one server ----


async def test_it_does_what_every_cache_must(server: Store) -> None:
    await check_cache(lambda: RedisCache(server.url, timeout=2), durable=True)


@timed
async def test_a_long_list_holds_up_nobody(server: Store) -> None:
    async with opened(cache := RedisCache(server.url, timeout=2)), opened(busy := RedisCache(server.url, timeout=2)):
        for start in range(0, 20_000, 500):
            await asyncio.gather(*(cache.set(f"k{n}", b"x" * 500, tag=f"t{n % 7}") for n in range(start, start + 500)))
        listing = asyncio.create_task(cache.stats())
        took: list[float] = []
        while not listing.done():
            began = time.monotonic()
            assert await busy.get("k1") is not None
            took.append(time.monotonic() - began)
        assert (await listing)["entries"] == 20_000
        in_time(max(took), SLACK)
        assert await cache.clear(tag="t3") == 20_000 // 7


@dataclass
class Load:
    """Gets, sets and leases by many tasks, until told to end; what a call took, and when."""

    cache: RedisCache
    calls: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    over: bool = False

    async def one(self, number: int) -> None:
        for n in itertools.count():
            if self.over:
                return
            key = f"{number}-{n % 50}"
            await self._timed(self.cache.get(key))
            async with self.cache.lease(key) as lease:
                await self._timed(lease.wait())  # at once, but where an outage has kept the last one from ending
            await self._timed(self.cache.set(key, os.urandom(2000)))
            await asyncio.sleep(0.005)

    async def _timed(self, call: Awaitable[object]) -> None:
        began = time.monotonic()
        await call
        self.calls.append((began, time.monotonic() - began))

    def slowest(self, since: float) -> float:
        return max(took for began, took in self.calls if began >= since)


@asynccontextmanager
async def load(cache: RedisCache, tasks: int = 16) -> AsyncGenerator[Load]:
    load = Load(cache)
    async with asyncio.TaskGroup() as group:
        for number in range(tasks):
            group.create_task(load.one(number))
        try:
            yield load
        finally:
            load.over = True


@timed
async def test_stopped_paused_and_restarted_under_load_no_call_fails_and_waits_are_bounded(
    server: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    faults: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "paused": (server.pause, server.go_on),
        "stopped": (server.stop, server.start),
        "restarted": (server.restart, lambda: None),
    }
    async with opened(cache := RedisCache(server.url, timeout=TIMEOUT)), load(cache) as calls:
        await asyncio.sleep(1)
        told = [f"well: {len(calls.calls)} calls, slowest {calls.slowest(0) * 1000:.0f} ms"]
        for name, (begin, end) in faults.items():
            outages, began = cache.troubles.outages, time.monotonic()
            await asyncio.to_thread(begin)
            await asyncio.sleep(2)
            await asyncio.to_thread(end)
            back = await until(works(cache, f"after-{name}"))
            slowest = calls.slowest(began)
            told.append(f"{name}: slowest call {slowest * 1000:.0f} ms, in use again {back:.2f} s after")
            in_time(slowest, TIMEOUT + SLACK)
            assert cache.troubles.outages > outages
    with capsys.disabled():
        print("", *told, cache.troubles, sep="\n  ")


@contextmanager
def asking(server: Store, key: str, askers: int, seconds: float, log: Path) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.leasing", "redis", server.url, key, str(askers), str(seconds), str(log)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_64_equal_requests_on_two_processes_are_one_purchase(server: Store, tmp_path: Path) -> None:
    log = tmp_path / "purchases"
    with ExitStack() as stack:
        processes = [stack.enter_context(asking(server, "k", 64, 1, log)) for _ in range(2)]
        for process in processes:
            go(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "64\n"
    assert len(log.read_text().splitlines()) == 1


async def test_when_the_buyer_is_killed_another_buys_within_one_lease(
    server: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "purchases"
    moments: list[float] = []

    async def buy() -> bytes:
        moments.append(time.monotonic())
        return b"bought after all"

    with asking(server, "k", 1, 600, log) as process:
        go(process)

        async def bought() -> bool:
            return await asyncio.to_thread(log.exists)

        await until(bought)
        async with opened(store := RedisCache(server.url)):
            waiting = [asyncio.create_task(once(store, "k", buy, LEASE_SECONDS)) for _ in range(64)]
            await asyncio.sleep(0.5)
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            assert set(await asyncio.gather(*waiting)) == {b"bought after all"}
    assert len(moments) == 1
    assert moments[0] - killed < LEASE_SECONDS + SLACK
    with capsys.disabled():
        print(f"\n  another buys {moments[0] - killed:.2f} s after the kill")


# ---- a server of ours on top of it ----


@dataclass
class Asked:
    at: float
    seconds: float
    error: str | None


def ask_on(client: OpenAI, asked: list[Asked], over: threading.Event, number: int) -> None:
    for n in itertools.count():
        if over.is_set():
            return
        began, error = time.monotonic(), None
        try:
            question = f"question {number}-{n // 2}"  # each twice: bought, and from the store
            create(client, model="two-steps", messages=[{"role": "user", "content": question}])
        except Exception as raised:  # whatever the client sees is a failure of the server
            error = f"{type(raised).__name__}: {raised}"
        asked.append(Asked(began, time.monotonic() - began, error))


def test_no_request_fails_because_the_store_does(
    server: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "asmodel_plugins.redis_cache:RedisCache"
    asked: list[Asked] = []
    over = threading.Event()
    marks: list[tuple[str, float]] = []
    faults: dict[str, Callable[[], object]] = {
        "well": server.listens,
        "paused": server.pause,
        "goes on": server.go_on,
        "stopped": server.stop,
        "started": server.start,
    }
    with ScriptedServer(delay=0.02) as provider:
        settings = upstream(provider.base_url) + f'[cache]\nkind = "{kind}"\nurl = "{server.url}"\n'
        with serving(tmp_path / "server", settings, "--programs", str(PROGRAMS)) as ours:
            clients = [ours.client() for _ in range(8)]
            threads = [
                threading.Thread(target=ask_on, args=(client, asked, over, number), daemon=True)
                for number, client in enumerate(clients)
            ]
            for thread in threads:
                thread.start()
            try:
                for name, fault in faults.items():
                    marks.append((name, time.monotonic()))
                    fault()
                    time.sleep(2.5)
            finally:
                over.set()
                for thread in threads:
                    thread.join(30)
                for client in clients:
                    client.close()
    assert [a.error for a in asked if a.error is not None] == []
    ends = [*(at for _, at in marks[1:]), float("inf")]
    phases = {name: [a.seconds for a in asked if at <= a.at < end] for (name, at), end in zip(marks, ends, strict=True)}
    with capsys.disabled():
        for name, seconds in phases.items():
            middle, most = statistics.median(seconds) * 1000, max(seconds) * 1000
            print(f"\n  {name}: {len(seconds)} requests, median {middle:.0f} ms, slowest {most:.0f} ms", end="")
        print()
    for name in ("paused", "stopped"):
        assert max(phases[name]) < max(phases["well"]) + TIMEOUT + SLACK


# ---- with TLS ----


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openssl = shutil.which("openssl") or str(images.program("openssl", "/usr/bin/openssl", ["openssl"]))
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "request.cnf").write_text("[req]\ndistinguished_name = name\n[name]\n")
    new = [openssl, "req", "-config", "request.cnf", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    new += ["-nodes", "-x509", "-days", "1", "-addext", "subjectAltName=IP:127.0.0.1"]
    for name in ("server", "stranger"):
        command = [*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=30)
    return folder


@pytest.mark.parametrize("name", stores.WITH_TLS)
async def test_over_tls_to_the_server_that_it_trusts_and_no_other(
    name: str, certificates: Path, tmp_path: Path
) -> None:
    port = free_port()
    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificates / "server.pem")]
    tls += ["--tls-key-file", str(certificates / "server.key"), "--tls-auth-clients", "no"]
    with running(await asyncio.to_thread(stores.program, name), tmp_path, tls):
        at = f"rediss://127.0.0.1:{port}/0"
        trusted, other = (f"{at}?ssl_ca_certs={certificates / end}.pem" for end in ("server", "stranger"))
        await check_cache(lambda: RedisCache(trusted, timeout=2), durable=True)
        async with opened(cache := RedisCache(other)):
            await cache.set("k", b"x")
            assert await cache.get("k") is None
            assert cache.troubles.unstored == 1


# ---- many as one ----


@contextmanager
def cluster(program: str, folder: Path) -> Generator[list[Store]]:
    """Three primaries, and a fourth server that will be a replica."""
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"]
    with ExitStack() as stack:
        stores: list[Store] = []
        for n in range(4):
            own = folder / str(n)
            own.mkdir()
            # The port of the cluster's own talk is by default the port and 10,000, which may be none.
            bus = free_port()
            stores.append(stack.enter_context(running(program, own, [*options, "--cluster-port", str(bus)])))
            stores[0].tell("CLUSTER", "MEET", "127.0.0.1", stores[n].port, bus)
            if n < 3:
                stores[n].tell("CLUSTER", "ADDSLOTSRANGE", 16384 * n // 3, 16384 * (n + 1) // 3 - 1)
        yield stores


@timed
async def test_a_cluster_is_one_store_and_goes_on_when_a_replica_takes_over(program: str, tmp_path: Path) -> None:
    with cluster(program, tmp_path) as stores:

        async def all_know_all() -> bool:
            infos = [await asyncio.to_thread(store.tell, "CLUSTER", "INFO") for store in stores]
            wanted = (b"cluster_state:ok", b"slots_ok:16384", b"cluster_known_nodes:4\r")
            return all(text in info for info in infos for text in wanted)

        async def replicated() -> bool:
            info = await asyncio.to_thread(stores[2].tell, "INFO", "replication")
            return bool(info["connected_slaves"]) and info["slave0"]["state"] == "online"

        await until(all_know_all)
        stores[3].tell("CLUSTER", "REPLICATE", stores[2].tell("CLUSTER", "MYID"))
        await until(replicated)
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{store.port}" for store in stores[:2])
        await check_cache(lambda: RedisCache(url, timeout=2), durable=True)
        keys = [f"k{n}" for n in range(300)]
        async with opened(filling := RedisCache(url, timeout=10)):
            await filling.clear()
            await asyncio.gather(*(filling.set(key, b"x", tag="t") for key in keys))
        async with opened(cache := RedisCache(url, timeout=TIMEOUT)):
            sizes = [store.tell("DBSIZE") for store in stores[:3]]
            assert min(sizes) > 50
            assert (await cache.stats())["entries"] == 300
            async with cache.lease("k") as mine, cache.lease("k") as theirs:
                assert (mine.state, theirs.state) == ("held", "taken")
            began = time.monotonic()
            stores[2].stop()

            async def all_there() -> bool:
                return await asyncio.gather(*(cache.get(key) for key in keys)) == [b"x"] * 300

            async with load(cache, 4) as calls:
                await until(all_there)
                in_time(calls.slowest(began), TIMEOUT + SLACK)
            assert await cache.clear(tag="t") == 300


@contextmanager
def sentinel(program: str, configuration: Path) -> Generator[None]:
    quiet = subprocess.DEVNULL
    with subprocess.Popen([program, str(configuration), "--sentinel"], stdout=quiet, stderr=quiet) as process:
        try:
            yield
        finally:
            process.kill()


async def test_by_sentinels_the_next_primary_is_found(program: str, tmp_path: Path) -> None:
    port = free_port()
    with running(program, tmp_path) as primary, ExitStack() as stack:
        folders = [tmp_path / name for name in ("replica", "sentinel")]
        for folder in folders:
            folder.mkdir()
        replicating = ["--replicaof", f"127.0.0.1 {primary.port}", "--repl-diskless-sync-delay", "0"]
        replica = stack.enter_context(running(program, folders[0], replicating))
        configuration = folders[1] / "sentinel.conf"
        configuration.write_text(
            f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n"
        )
        with sentinel(program, configuration):
            url = f"redis+sentinel://127.0.0.1:{port}/main/0"

            async def known() -> bool:
                info = await asyncio.to_thread(primary.tell, "INFO", "replication")
                return bool(info.get("connected_slaves")) and info["slave0"]["state"] == "online"

            await until(known)
            async with opened(cache := RedisCache(url, timeout=TIMEOUT)):
                await until(works(cache))
                await check_cache(lambda: RedisCache(url, timeout=2), durable=True)
                await cache.set("kept", b"by the replica", tag="t")
                assert primary.tell("EXISTS", "asmodel:1:kept") == 1
                await asyncio.sleep(11)  # a sentinel asks the primary for its replicas every ten seconds
                primary.stop()
                await until(works(cache, "after"))
                assert replica.tell("EXISTS", "asmodel:1:after") == 1
                assert await cache.get("kept") == b"by the replica"
