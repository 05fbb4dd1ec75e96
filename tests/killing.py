"""A server that is killed again and again while clients ask it, and then the same requests of one that nobody kills."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
from openai import DefaultHttpxClient, OpenAI
from tests.serving import Server, command, create, eventually, serving, upstream

from asmodel.calls import Reply
from asmodel.tags import read as read_tag
from asmodel.testing import Received, ScriptedServer
from asmodel_plugins.disk_cache import DiskCache, Troubles

CLIENTS = 8

PROGRAMS = '''
"""Programs of several shapes, and two that act on the world; some of their steps are wanted by many runs."""

import asyncio
from pathlib import Path

from asmodel import Run, gather, program, step, tool


@step(model="writer")
def link(number: int, before: str) -> str:
    return f"link {number} after {before}"


@step(model="writer", temperature=0)
def piece(number: int) -> str:
    return f"piece {number}"


@step(model="writer")
def vote(question: str) -> str:
    return f"vote on {question}"


@step(model="writer")
def whole(parts: list[str]) -> str:
    return "put together " + ", ".join(parts)


@program("chain")
async def chain(run: Run) -> str:
    """Ten links, each of which needs the one before it."""
    text = run.question
    for number in range(1, 10):
        text = await run(link, number, text)
    return await run.reply(link, 10, text)


@program("fan")
async def fan(run: Run) -> str:
    """Six pieces at once, which other runs want too."""
    number = int(run.question.split("-")[1])
    return await run.reply(whole, await gather(run(piece, number + i) for i in range(6)))


@program("votes")
async def votes(run: Run) -> str:
    """Three equal calls, and what they come to."""
    return await run.reply(whole, await gather(run(vote, run.question) for _ in range(3)))


@tool(effect=True)
async def send(text: str) -> str:
    """Nobody can tell whether it was done, but by looking."""
    await asyncio.sleep(0.02)
    with Path("sent").open("a") as world:
        world.write(text + "\\n")
    await asyncio.sleep(0.02)
    return f"sent {text}"


@tool(effect=True)
async def order(text: str, idempotency_key: str = "") -> str:
    """The other side knows an order that it has had."""
    await asyncio.sleep(0.02)
    with Path("ordered").open("a+") as world:
        world.seek(0)
        if f"{idempotency_key} {text}\\n" not in world.readlines():
            world.write(f"{idempotency_key} {text}\\n")
    await asyncio.sleep(0.02)
    return f"ordered {text}"


@program("mailer")
async def mailer(run: Run) -> str:
    """Send what a step says."""
    done = await run(send, await run(link, 0, run.question))
    return await run.reply(whole, [done])


@program("orders")
async def orders(run: Run) -> str:
    """Order what a step says."""
    done = await run(order, await run(link, 0, run.question))
    return await run.reply(whole, [done])
'''

NAMES = ("chain", "fan", "votes", "mailer", "orders")

JUST_NOW = 0.5
"""Seconds before a kill within which an answer may have been on its way to the store: a busy machine's time for it."""


def said(body: dict[str, Any]) -> str:
    """What the upstream answers to a prompt: always the same, and of no other prompt."""
    return hashlib.sha256(shown(body).encode()).hexdigest()[:12]


def shown(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def quiet_port() -> int:
    """A port that no client's own end can have: one that waits for a server at such a port may find itself there."""
    chance = random.Random(os.getpid())
    while True:
        with socket.socket() as listener:
            port = chance.randrange(15_000, 30_000)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class Question:
    """A request, by whom it is made, and which of theirs it is."""

    client: int
    number: int

    @property
    def model(self) -> str:
        return NAMES[(self.client + self.number) % len(NAMES)]

    @property
    def text(self) -> str:
        # Of the fan, neighbours want some of the same pieces.
        return f"{self.model} {self.client}" + (f"-{self.number}" if self.model != "fan" else f"-{3 * self.number}")

    @property
    def streams(self) -> bool:
        return self.number % 3 == 0

    @property
    def asked(self) -> dict[str, Any]:
        named = {"extra_headers": {"Idempotency-Key": f"{self.client}-{self.number}"}}
        body = {"model": self.model, "messages": [{"role": "user", "content": self.text}]}
        return body | (named if self.model in ("mailer", "orders") else {})


@dataclass
class Kill:
    """One `kill -9`, and the upstream's requests at that time whose answers the server cannot be known to have kept."""

    unanswered: Counter[str]
    answered: dict[str, float]
    """Those that the upstream had just answered, and how many seconds before."""


@dataclass
class Bearing:
    """What came of it."""

    texts: dict[Question, str] = field(default_factory=dict[Question, str])
    unknown: dict[Question, str] = field(default_factory=dict[Question, str])
    """Requests that ended with `effect_unknown`, and what it said."""
    failed: dict[Question, str] = field(default_factory=dict[Question, str])
    bought: Counter[str] = field(default_factory=Counter[str])
    kills: list[Kill] = field(default_factory=list[Kill])
    sent: int = 0
    """HTTP requests, with those that an SDK sent again."""
    retried: int = 0
    """Those of them that an SDK sent again by itself."""
    asked_again: int = 0
    """Times that a person had to ask again: the SDK had given up, or a stream was broken off."""
    slowest: float = 0.0
    said: list[str] = field(default_factory=list[str])
    """All that the servers printed."""


class Clients:
    """Eight of them, with the official SDK as it comes, each going through its requests one after another."""

    def __init__(self, port: int, bearing: Bearing) -> None:
        self._port = port
        self._bearing = bearing
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.over = threading.Event()

    @property
    def asks(self) -> bool:
        """Whether any of them still waits for an answer."""
        return any(thread.is_alive() for thread in self._threads)

    @contextmanager
    def asking(self, questions: dict[int, list[Question]] | None = None) -> Generator[None]:
        """All of these; without them each goes on until `over`, and to the end of the one that it is at."""
        self._threads = [
            threading.Thread(target=self._all, args=(client, questions), daemon=True) for client in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            if questions is None:
                self.over.set()
            for thread in self._threads:
                thread.join(120)
        assert not self.asks, "a request was never answered"

    def _all(self, client: int, questions: dict[int, list[Question]] | None) -> None:
        def count(request: httpx.Request) -> None:
            with self._lock:
                self._bearing.sent += 1
                self._bearing.retried += request.headers["x-stainless-retry-count"] != "0"

        http = DefaultHttpxClient(event_hooks={"request": [count]})
        url = f"http://127.0.0.1:{self._port}/v1"
        theirs = map(Question, itertools.repeat(client), itertools.count()) if questions is None else questions[client]
        with OpenAI(base_url=url, api_key="unused", timeout=60, http_client=http) as sdk:
            for question in theirs:
                if questions is None and self.over.is_set():
                    return
                began = time.monotonic()
                self._one(sdk, question)
                with self._lock:
                    self._bearing.slowest = max(self._bearing.slowest, time.monotonic() - began)

    def _one(self, sdk: OpenAI, question: Question) -> None:
        bearing = self._bearing
        while True:
            try:
                text = self._text(sdk, question)
            except (openai.APIConnectionError, httpx.HTTPError):
                with self._lock:
                    bearing.asked_again += 1
                time.sleep(0.1)
                continue
            except openai.APIError as error:  # by its status, or in a stream
                kind = bearing.unknown if error.code == "effect_unknown" else bearing.failed
                kind[question] = f"{type(error).__name__} {error.code}: {error}"
                return
            bearing.texts[question] = text
            return

    def _text(self, sdk: OpenAI, question: Question) -> str:
        if not question.streams:
            return str(create(sdk, **question.asked).choices[0].message.content)
        parts: list[str] = []
        finish = None
        for chunk in create(sdk, **question.asked, stream=True):
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                finish = choice.finish_reason or finish
        if finish is None:
            raise httpx.RemoteProtocolError("a stream that ends without a reason")
        return "".join(parts)


class Trial:
    """A folder with the programs, an upstream, and what is done to the servers of it."""

    def __init__(self, folder: Path, up: ScriptedServer) -> None:
        self.folder = folder
        self.port = quiet_port()
        self._up = up

    @contextmanager
    def _served(self, name: str, bearing: Bearing) -> Generator[Server]:
        folder = self.folder / name
        (folder / "programs").mkdir(parents=True, exist_ok=True)
        (folder / "programs" / "killed.py").write_text(PROGRAMS)
        settings = 'program_folders = ["programs"]\n' + upstream(self._up.base_url)
        with serving(folder, settings, port=self.port) as server:
            try:
                yield server
            finally:
                bearing.said.append(server.said)

    def killed(self, kills: int, seed: int) -> Bearing:
        """Under load, `kills` times at a random moment; at last one server is left to answer what is still asked."""
        chance = random.Random(seed)
        bearing = Bearing()
        up = self._up
        up.clear()
        up.delay, up.token_delay = 0.03, 0.002
        clients = Clients(self.port, bearing)
        with clients.asking():
            seen = 0
            for _ in range(kills):
                with self._served("killed", bearing) as server:
                    eventually("somebody asks", lambda before=seen: len(up.requests) > before)
                    time.sleep(chance.uniform(0.0, 1.2))
                    at = time.monotonic()
                    server.kill()
                    time.sleep(0.05)  # what it had sent arrives
                    requests = up.requests[seen:]
                    bearing.kills.append(_kill(at, requests))
                    seen += len(requests)
            clients.over.set()
            with self._served("killed", bearing) as server:
                eventually("all are answered", lambda: not clients.asks, 120)
                assert server.stop() == 0
        bearing.bought = Counter(shown(r.body) for r in up.requests)
        return bearing

    def unkilled(self, questions: list[Question], name: str = "unkilled") -> Bearing:
        """The same requests, of a server that nobody kills; of the folder `killed`, to see what was kept there."""
        bearing = Bearing()
        up = self._up
        up.clear()
        up.delay, up.token_delay = 0.003, 0.0
        theirs = {client: [q for q in questions if q.client == client] for client in range(CLIENTS)}
        with self._served(name, bearing) as server:
            with Clients(self.port, bearing).asking(theirs):
                pass
            assert server.stop() == 0
        bearing.bought = Counter(shown(r.body) for r in up.requests)
        return bearing

    def lines(self, file: Literal["sent", "ordered"], name: str = "killed") -> Counter[str]:
        """What was done to the world, by what it was."""
        path = self.folder / name / file
        return Counter(line.split()[-1] for line in path.read_text().splitlines()) if path.exists() else Counter()


def _kill(at: float, requests: list[Received]) -> Kill:
    unanswered = [r for r in requests if r.answered_at is None or r.answered_at >= at or r.left_at is not None]
    answered = {shown(r.body): at - r.answered_at for r in requests if r.answered_at is not None and r.answered_at < at}
    return Kill(Counter(shown(r.body) for r in unanswered), answered)


async def stored(folder: Path) -> int:
    """The answers in the store of that folder; fails unless each can be read."""
    cache = DiskCache(folder / "cache" / "asmodel")
    await cache.open()
    try:
        answers = [key async for key, tag, _ in cache.entries() if read_tag(tag) is not None]
        for key in answers:
            data = await cache.get(key)
            assert data is not None
            Reply.load(data)
        assert cache.troubles == Troubles()
    finally:
        await cache.close()
    return len(answers)


def held_leases(folder: Path) -> list[str]:
    """Leases that somebody still holds."""
    held: list[str] = []
    for path in folder.rglob("leases/*"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path.name)
    return held


async def bear_kills(folder: Path, kills: int, seed: int) -> str:
    """Kill, compare, and assert all that must hold; gives what to print."""
    with ScriptedServer(said, keep=10_000_000) as up:
        trial = Trial(folder, up)
        killed = trial.killed(kills, seed)
        questions = [*killed.texts, *killed.unknown, *killed.failed]
        calm = trial.unkilled(questions)
        again = trial.unkilled([*killed.texts], "killed")

    assert killed.failed == {}
    assert (calm.failed, calm.unknown) == ({}, {})
    assert {q: calm.texts[q] for q in killed.texts} == killed.texts, "the texts of the unkilled runs"

    # What is bought twice was on its way when a server was killed: to the upstream and back, or on to the store.
    unanswered = sum((kill.unanswered for kill in killed.kills), Counter[str]())
    # A run whose effect is unknown was not gone on with; all that the others bought is wanted by the unkilled ones.
    twice = killed.bought - calm.bought
    unkept = twice - unanswered
    ages = {prompt: min(k.answered.get(prompt, float("inf")) for k in killed.kills) for prompt in unkept}
    assert all(age < JUST_NOW for age in ages.values()), f"bought again without having been in flight: {ages}"
    assert unkept.total() <= CLIENTS * kills

    for text in killed.said + again.said:
        for word in ("Traceback", "set aside", "unreadable", "cannot be read", "not stored", "is a miss", "locked"):
            assert word not in text
    entries = await stored(folder / "killed")
    stats = command(folder / "killed", "cache", "stats", "--json")
    assert stats.returncode == 0, stats.stderr
    assert json.loads(stats.stdout)["entries"] == entries

    assert held_leases(folder) == []
    assert again.bought == Counter(), "all of it is there for whoever asks again"
    assert again.texts == killed.texts
    assert again.slowest < 5.0

    # The world: each order once; each letter once, or not at all where the client was told that it is not known.
    orders = {q for q in killed.texts if q.model == "orders"}
    letters = {q for q in killed.texts if q.model == "mailer"}
    assert {q.model for q in killed.unknown} <= {"mailer"}
    ordered, sent = trial.lines("ordered"), trial.lines("sent")
    assert max(ordered.values(), default=1) == 1
    assert max(sent.values(), default=1) == 1
    assert len(ordered) == len(orders) > 0
    assert len(letters) <= len(sent) <= len(letters) + len(killed.unknown)

    counts = Counter(q.model for q in killed.texts)
    shapes = ", ".join(f"{name} {counts[name]}" for name in NAMES)
    return (
        f"\n  {kills} kills, {CLIENTS} clients, {len(questions)} requests ({shapes}; "
        f"{len(killed.unknown)} told of an effect that is not known)"
        f"\n  sent {killed.sent} times: {killed.retried} retries by the SDK, {killed.asked_again} times asked again"
        f"\n  bought {killed.bought.total()}, keys {calm.bought.total()} without a kill; "
        f"{twice.total()} bought twice"
        f"\n  in flight at the kills: {unanswered.total()} unanswered, {unkept.total()} answered and not yet kept, "
        f"at most {max(ages.values(), default=0) * 1000:.0f} ms before"
        f"\n  stored {entries} answers, all readable; letters {sent.total()}, orders {ordered.total()}, none twice"
        f"\n  slowest request {killed.slowest:.2f} s under kills; all asked again: {again.bought.total()} bought, "
        f"slowest {again.slowest:.2f} s\n"
    )
