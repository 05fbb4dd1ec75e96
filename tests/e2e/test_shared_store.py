"""One store for many: equal requests at once, a leader that dies, a store that fails, tenants, and spoiled entries."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e import stores
from tests.redis_serving import Store, running
from tests.serving import Answered, Server, create, eventually, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer
from asmodel_plugins.disk_cache import DiskCache

pytestmark = pytest.mark.e2e

KIND = "asmodel_plugins.redis_cache:RedisCache"

LEASE_SECONDS = 10.0

TIMEOUT = 0.25

SLACK = 1.0
"""What a busy machine may add to a bound."""

PROGRAM = '''
"""Five votes at once, a step at temperature 0, and a reply: seven calls."""

from pathlib import Path

from asmodel import Run, gather, program, step, tool


@step(model="writer")
def vote(question: str) -> str:
    return f"vote on {question}"


@step(model="writer", temperature=0)
def count(votes: list[str]) -> str:
    return "count " + ", ".join(votes)


@step(model="writer")
def reply(question: str, counted: str) -> str:
    return f"reply to {question}: {counted}"


@program("council")
async def council(run: Run) -> str:
    """Votes, counted."""
    votes = await gather(run(vote, run.question) for _ in range(5))
    return await run.reply(reply, run.question, await run(count, votes))


@tool(effect=True)
async def send(text: str) -> str:
    """Nobody can tell whether it was done, but by looking."""
    with Path("sent").open("a") as world:
        world.write(text + "\\n")
    return "sent"


@program("mailer")
async def mailer(run: Run) -> str:
    """Sends what it is asked."""
    await run(send, run.question)
    return await run.reply(vote, run.question)


@program("short")
async def short(run: Run) -> str:
    """Two steps."""
    return await run.reply(reply, run.question, await run(vote, run.question))
'''

CALLS = Counter({"vote": 5, "count": 1, "reply": 1})


def shown(received: Received) -> str:
    return str(received.body["messages"][-1]["content"])


def kinds(up: ScriptedServer) -> Counter[str]:
    """What was bought, by step."""
    return Counter(shown(received).split()[0] for received in up.requests)


class Upstream(ScriptedServer):
    """Says what it was shown; it can be made to hold back what it is asked next."""

    def __init__(self) -> None:
        self.holds = False
        super().__init__(lambda body: f"<{str(body['messages'][-1]['content'])[:24]}>", faults=self._pace, keep=10**6)

    def _pace(self, _: Received) -> Fault | None:
        return Fault(delay=60.0) if self.holds else None


@pytest.fixture
def up() -> Iterator[Upstream]:
    server = Upstream()
    with server:
        yield server


@pytest.fixture(params=stores.SERVERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Store]:
    with running(stores.program(request.param), tmp_path) as made:
        yield made


@contextmanager
def served(
    folder: Path, up: Upstream, store: Store | None = None, more: str = "", workers: int = 1
) -> Generator[Server]:
    (folder / "programs").mkdir(parents=True)
    (folder / "programs" / "council.py").write_text(PROGRAM)
    settings = 'program_folders = ["programs"]\n' + upstream(up.base_url) + more
    if store is not None:
        settings += f'\n[cache]\nkind = "{KIND}"\nurl = "{store.url}"\ntimeout = {TIMEOUT}\n'
    arguments = ["--workers", str(workers)] if workers > 1 else []
    with serving(folder, settings, *arguments) as server:
        yield server


def ask(server: Server, question: str, model: str = "council", **headers: str) -> Answered:
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    return server.chat(body, headers)


def text(answered: Answered) -> str:
    assert answered.status == 200, answered.body
    return str(answered.json["choices"][0]["message"]["content"])


# ---- equal requests at once ----


def all_at_once(servers: list[Server], up: Upstream, tell: Callable[[str], None]) -> None:
    up.delay = 0.5  # all are there before the first has its answer
    barrier = threading.Barrier(64)

    def one(number: int) -> Answered:
        barrier.wait(20)
        return ask(servers[number % len(servers)], "all want the same")

    began = time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    seconds = time.monotonic() - began
    receipts = [answer.json["asmodel"] for answer in answers]
    tell(
        f"64 at once: {len(up.requests)} upstream calls, {seconds:.2f} s; by the receipts "
        f"{sum(r['upstream_calls'] for r in receipts)} bought, {sum(r['joined'] for r in receipts)} joined, "
        f"{sum(r['cache_hits'] for r in receipts)} found"
    )
    assert len({text(answer) for answer in answers}) == 1
    assert kinds(up) == CALLS
    assert sum(receipt["upstream_calls"] for receipt in receipts) == CALLS.total()
    for server in servers:
        assert "Traceback" not in server.said


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Callable[[str], None]:
    def print_it(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {request.node.name}: {line}", end="")

    return print_it


@pytest.mark.parametrize("workers", [1, 2])
def test_64_equal_requests_at_once_are_one_set_of_calls_on_one_machine(
    tmp_path: Path, up: Upstream, workers: int, tell: Callable[[str], None]
) -> None:
    with served(tmp_path / "server", up, workers=workers) as server:
        all_at_once([server], up, tell)


def test_64_equal_requests_at_once_are_one_set_of_calls_on_two_servers(
    tmp_path: Path, up: Upstream, store: Store, tell: Callable[[str], None]
) -> None:
    with served(tmp_path / "one", up, store) as one, served(tmp_path / "two", up, store) as two:
        all_at_once([one, two], up, tell)


# ---- who buys dies ----


def test_the_other_server_takes_over_within_one_lease_when_the_one_that_buys_is_killed(
    tmp_path: Path, up: Upstream, store: Store, tell: Callable[[str], None]
) -> None:
    with (
        served(tmp_path / "one", up, store) as one,
        served(tmp_path / "two", up, store) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        up.holds = True
        lost = pool.submit(ask, one, "who buys dies")
        eventually("one buys", lambda: kinds(up)["vote"] == 5)
        waiting = pool.submit(ask, two, "who buys dies")
        time.sleep(4.5)  # past the first renewal, by a third of the lease
        assert kinds(up)["vote"] == 5, "the other waits for it"
        up.holds = False
        one.kill()
        killed = time.monotonic()
        answer = text(waiting.result(40))
        again = up.requests[5]
        assert again.at - killed < LEASE_SECONDS + SLACK
        tell(f"the other buys {again.at - killed:.2f} s after the kill; {len(up.requests)} calls, 5 of them lost")
        assert kinds(up) == CALLS + Counter({"vote": 5})
        with pytest.raises(OSError, match=r"."):
            lost.result(10)
        assert text(ask(two, "who buys dies")) == answer
        assert len(up.requests) == CALLS.total() + 5


# ---- the store fails ----


@dataclass
class Asked:
    at: float
    seconds: float
    bought: int
    error: str | None


def test_no_request_fails_because_a_store_with_leases_does(
    tmp_path: Path, up: Upstream, store: Store, tell: Callable[[str], None]
) -> None:
    up.delay = 0.02
    faults: dict[str, Callable[[], object]] = {
        "well": store.listens,
        "paused": store.pause,
        "goes on": store.go_on,
        "stopped": store.stop,
        "started": store.start,
        "restarted": store.restart,
    }
    asked: list[Asked] = []
    marks: list[tuple[str, float]] = []
    over = threading.Event()

    def client(server: Server, number: int) -> None:
        with server.client() as sdk:  # asks once: whatever fails is seen
            for n in itertools.count():
                if over.is_set():
                    return
                began, error, bought = time.monotonic(), None, 0
                try:
                    # Two clients on each server go through the same questions, so that they meet at leases.
                    messages = [{"role": "user", "content": f"question {number // 4} {n // 2}"}]
                    bought = create(sdk, model="short", messages=messages).model_dump()["asmodel"]["upstream_calls"]
                except Exception as raised:  # whatever the client sees is a failure of the server
                    error = f"{type(raised).__name__}: {raised}"
                asked.append(Asked(began, time.monotonic() - began, bought, error))

    with served(tmp_path / "one", up, store) as one, served(tmp_path / "two", up, store) as two:
        threads = [threading.Thread(target=client, args=((one, two)[n % 2], n), daemon=True) for n in range(8)]
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
        assert all("Traceback" not in server.said for server in (one, two))
    ends = [*(at for _, at in marks[1:]), float("inf")]
    phases = {name: [a for a in asked if at <= a.at < end] for (name, at), end in zip(marks, ends, strict=True)}
    for name, some in phases.items():
        seconds = [a.seconds * 1000 for a in some]
        tell(
            f"{name}: {len(some)} requests, {sum(a.error is not None for a in some)} failed, "
            f"{sum(a.bought for a in some)} calls, median {statistics.median(seconds):.0f} ms, "
            f"slowest {max(seconds):.0f} ms"
        )
    assert [a.error for a in asked if a.error is not None] == []
    # A request of two steps meets the store a few times before that is left alone; each time is bounded.
    most = max(a.seconds for a in phases["well"]) + 4 * TIMEOUT + SLACK
    for name, some in phases.items():
        assert max(a.seconds for a in some) < most, name


# ---- tenants ----

KEYS = '\n[keys]\nalice = "the-key-of-alice"\nbob = "the-key-of-bob"\n'


def asked_by(server: Server, who: str) -> Answered:
    return ask(server, "the same prompt", authorization=f"Bearer the-key-of-{who}")


def never_share(alices: Server, bobs: Server, up: Upstream) -> None:
    up.delay = 0.2
    with ThreadPoolExecutor(8) as pool:  # four each at the same moment: each shares with itself alone
        asking = [pool.submit(asked_by, *pair) for pair in [(alices, "alice"), (bobs, "bob")] * 4]
        for one in asking:
            text(one.result(30))
    assert kinds(up) == CALLS + CALLS
    for server in (alices, bobs):
        for who in ("alice", "bob"):
            assert asked_by(server, who).json["asmodel"]["cache_hits"] == CALLS.total()
    assert len(up.requests) == 2 * CALLS.total()
    assert ask(alices, "the same prompt").status == 401


def test_two_tenants_with_the_same_prompt_never_share_on_one_server(tmp_path: Path, up: Upstream) -> None:
    with served(tmp_path / "server", up, more=KEYS) as server:
        never_share(server, server, up)


def test_two_tenants_with_the_same_prompt_never_share_on_two_servers(
    tmp_path: Path, up: Upstream, store: Store
) -> None:
    with served(tmp_path / "one", up, store, KEYS) as one, served(tmp_path / "two", up, store, KEYS) as two:
        never_share(one, two, up)


# ---- spoiled entries ----


PICKLE = b"cposix\nsystem\n(S'touch pwned'\ntR."

SPOILED: dict[str, tuple[str, tuple[object, ...], str]] = {
    "truncated": ("value = substr(value, 1, length(value) / 2)", (), "does not match its checksum"),
    "altered": (
        "value = CAST(replace(value, ?, ?) AS BLOB)",
        (b'"text":"<', b'"text":">'),
        "does not match its checksum",
    ),
    "pickle": ("mode = 4, value = ?", (PICKLE,), "a mode that is never written"),
    "file": ("mode = 2, filename = ?, value = NULL", ("../../../asmodel.toml",), "in a mode that is never written"),
    "text": ("value = ?", ("plain text",), "a value that is not bytes"),
    "empty": ("value = ?", (b"",), "does not match its checksum"),
}


FROM_DISK = "\n[cache]\nmemory_bytes = 0\n"
"""A server that looks at the disk each time: what it has in memory cannot be spoiled there."""

FOREIGN = {"foreign": b"what another program keeps", "foreign-json": b'{"text": "planted"}'}
"""Sound entries of the store that are no replies."""


async def overwrite(database: Path, value: bytes) -> int:
    """Put it in the place of every answer, as whoever uses the store's own code could; says how many."""
    store = DiskCache(database.parent.parent)
    await store.open()
    try:
        answers = [(key, tag) async for key, tag, _ in store.entries() if tag.startswith("council/")]
        for key, tag in answers:
            await store.set(key, value, tag=tag)
    finally:
        await store.close()
    return len(answers)


@pytest.mark.parametrize("kind", [*SPOILED, *FOREIGN])
def test_a_spoiled_entry_of_a_running_server_is_a_miss_and_is_reported(tmp_path: Path, up: Upstream, kind: str) -> None:
    folder = tmp_path / "server"
    with served(folder, up, more="" if kind in FOREIGN else FROM_DISK) as server:
        first = text(ask(server, "spoiled"))
        database = folder / "cache" / "asmodel" / "store" / "cache.db"
        if kind in FOREIGN:
            reported = "cannot be read and counts as a miss"
            changed = asyncio.run(overwrite(database, FOREIGN[kind]))
        else:
            change, values, reported = SPOILED[kind]
            with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
                changed = connection.execute(f"UPDATE Cache SET {change} WHERE tag LIKE 'council/%'", values).rowcount
        assert changed == CALLS.total()
        up.clear()
        again = ask(server, "spoiled")
        assert text(again) == first
        assert kinds(up) == CALLS, "each is bought anew"
        eventually("it is reported", lambda: reported in server.said)
        assert "planted" not in server.said
        # And what was bought is good again.
        assert text(ask(server, "spoiled")) == first
        assert len(up.requests) == CALLS.total()
        assert not list(tmp_path.rglob("pwned"))


def test_an_entry_that_was_stored_for_another_call_is_a_miss(tmp_path: Path, up: Upstream) -> None:
    folder = tmp_path / "server"
    with served(folder, up, more=FROM_DISK) as server:
        text(ask(server, "one", "short"))
        other = text(ask(server, "two", "short"))
        database = folder / "cache" / "asmodel" / "store" / "cache.db"
        with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
            rows = connection.execute("SELECT key, value FROM Cache WHERE tag LIKE 'short/reply%' ORDER BY store_time")
            (_, ones), (key_of_two, _) = rows.fetchall()
            connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (ones, key_of_two))
        assert text(ask(server, "two", "short")) == other
        eventually("it is reported", lambda: "does not match its checksum" in server.said)


def test_an_effect_whose_entry_in_the_journal_is_spoiled_is_not_repeated(tmp_path: Path, up: Upstream) -> None:
    folder = tmp_path / "server"
    named = {"idempotency-key": "one"}
    with served(folder, up) as server:
        text(ask(server, "a letter", "mailer", **named))
    database = folder / "cache" / "asmodel" / "effects" / "store" / "cache.db"
    spoil = "UPDATE Cache SET value = substr(value, 1, length(value) / 2) WHERE CAST(value AS TEXT) LIKE ?"
    for entry in ("%done%", "%now%"):  # that of the effect, then that of the run too
        with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
            assert connection.execute(spoil, (entry,)).rowcount == 1
        with serving(folder) as server:
            answered = ask(server, "a letter", "mailer", **named)
            wanted = (409, "effect_unknown") if entry == "%done%" else (503, "journal_unusable")
            assert (answered.status, answered.error["code"]) == wanted
            eventually("it is reported", lambda s=server: "does not match its checksum" in s.said)
    assert (folder / "sent").read_text() == "a letter\n"


def test_an_entry_that_another_wrote_into_the_shared_store_is_a_miss_and_is_reported(
    tmp_path: Path, up: Upstream, store: Store
) -> None:
    with served(tmp_path / "one", up, store) as server:
        first = text(ask(server, "spoiled"))
        keys: list[bytes] = [key for key in store.tell("KEYS", "asmodel:1:*") if len(key) > 64]
        assert len(keys) >= CALLS.total()
        held: list[bytes] = [store.tell("GET", key) for key in keys]
        for n, (key, value) in enumerate(zip(keys, [*held[1:], held[0]], strict=True)):
            # One another's, truncated, and foreign.
            store.tell("SET", key, (value, value[: len(value) // 2], b"what another program keeps")[n % 3])
        up.clear()
        assert text(ask(server, "spoiled")) == first
        assert kinds(up) == CALLS
        eventually("it is reported", lambda: "it is a miss, and was not used" in server.said)
