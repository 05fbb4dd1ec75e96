"""Tools whose doing must not be repeated: the journal, what is refused, and what a retry finds after a `kill -9`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import ROOT
from tests.effecting import ask

from asmodel import InvalidRequest, ProgramError, Run, program, step, tool
from asmodel.calls import CachePolicy, Message, ToolCall
from asmodel.effects import EffectUnknown, Journal, JournalUnusable, check
from asmodel.models import Models, ServedProgram
from asmodel.programs import Program
from asmodel.run import Request, execute, require
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.memory_cache import MemoryCache


@step
def letter(question: str) -> str:
    return question


def mailer(*sent: str, again: bool = False) -> tuple[Program[Any, Any], list[str]]:
    """A program that sends these texts, and what has been sent."""
    world: list[str] = []

    @tool(effect=True)
    def send(text: str) -> int:
        """Send a text."""
        world.append(text)
        return len(world)

    @program("mailer")
    async def mails(run: Run) -> str:
        numbers = [await run(send, text) for text in sent]
        if again:
            await run(letter, "fails")
        return f"{numbers}"

    return mails, world


def upstream() -> FunctionUpstream:
    return FunctionUpstream(lambda call: "yes", name="up")


# What a retry finds


async def test_an_effect_is_not_repeated_by_a_retry_and_gives_its_result_again() -> None:
    mails, world = mailer("a", "b")
    store = MemoryCache()
    assert await ask(mails, upstream(), store, store, "key") == "[1, 2]"
    assert await ask(mails, upstream(), store, store, "key") == "[1, 2]"
    assert world == ["a", "b"]


async def test_another_request_has_effects_of_its_own() -> None:
    mails, world = mailer("a")
    store = MemoryCache()
    assert await ask(mails, upstream(), store, store, "one") == "[1]"
    assert await ask(mails, upstream(), store, store, "two") == "[2]"
    assert world == ["a", "a"]


async def test_equal_effects_of_one_run_are_as_many_as_it_asks_for() -> None:
    mails, world = mailer("a", "a", "a")
    store = MemoryCache()
    for _ in range(2):
        assert await ask(mails, upstream(), store, store, "key") == "[1, 2, 3]"
    assert world == ["a", "a", "a"]


async def test_a_retry_goes_on_where_the_first_attempt_failed() -> None:
    mails, world = mailer("a", "b", again=True)
    store = MemoryCache()
    answers: Iterator[Exception | str] = iter([RuntimeError("down"), "yes"])
    flaky = FunctionUpstream(lambda call: next(answers), name="up")
    with pytest.raises(ProgramError):
        await ask(mails, flaky, store, store, "key")
    assert await ask(mails, flaky, store, store, "key") == "[1, 2]"
    assert world == ["a", "b"]


async def test_a_run_and_its_retry_are_told_the_same_time() -> None:
    @program("clock")
    async def clock(run: Run) -> str:
        @program("inner")
        async def inner(nested: Run) -> str:
            assert nested.now == run.now
            return "ok"

        await run(inner, "x")
        return run.now.isoformat()

    store = MemoryCache()
    first = await ask(clock, upstream(), store, store, "key")
    await asyncio.sleep(0.01)
    assert await ask(clock, upstream(), store, store, "key") == first
    assert await ask(clock, upstream(), store, store, "other") != first


async def test_a_program_that_plays_a_role_is_told_the_time_of_the_run_that_it_is_in() -> None:
    told: list[str] = []

    @program("player")
    async def player(run: Run) -> str:
        told.append(run.now.isoformat())
        return "played"

    @program("asks")
    async def asks(run: Run) -> str:
        told.append(run.now.isoformat())
        return await run(letter, "q")

    models = Models([asks, player], {"default": upstream()}, roles={"default": "player"})
    served = models.find("asks")
    assert isinstance(served, ServedProgram)
    asked = Request(messages=(Message("user", "q"),))
    await execute(Run(asks, asked, id="run", cast=models.cast(served), params=None))
    assert len(told) == 2
    assert told[0] == told[1]


async def test_an_effect_that_raises_is_of_unknown_outcome_and_says_how_it_ended() -> None:
    @tool(effect=True)
    def send(text: str) -> str:
        raise ConnectionResetError("a secret")

    @program("mailer")
    async def mails(run: Run) -> str:
        return await run(send, "x")

    store = MemoryCache()
    with pytest.raises(ProgramError, match="raised ConnectionResetError"):
        await ask(mails, upstream(), store, store, "key")
    with pytest.raises(
        EffectUnknown, match=r'tool "send" was begun .* because it ended with ConnectionReset'
    ) as failed:
        await ask(mails, upstream(), store, store, "key")
    assert (failed.value.status, failed.value.code, failed.value.retry) == (409, "effect_unknown", False)
    assert "secret" not in str(failed.value)


async def test_an_effect_that_takes_a_key_is_repeated_with_the_same_one() -> None:
    keys: list[str] = []

    @tool(effect=True)
    async def send(text: str, idempotency_key: str = "") -> str:
        keys.append(idempotency_key)
        if len(keys) == 1:
            raise ConnectionResetError
        return "sent"

    @program("mailer")
    async def mails(run: Run) -> str:
        return await run(send, "x")

    store = MemoryCache()
    with pytest.raises(ProgramError):
        await ask(mails, upstream(), store, store, "key")
    assert await ask(mails, upstream(), store, store, "key") == "sent"
    assert len(keys[0]) == 64
    assert keys[0] == keys[1]


async def test_the_key_is_the_runs_to_give_and_no_model_is_told_of_it() -> None:
    given: list[str] = []

    @tool(effect=True)
    def send(text: str, idempotency_key: str = "") -> str:
        """Send a text."""
        given.append(idempotency_key)
        return text

    function = send.wire()["function"]
    assert list(function["parameters"]["properties"]) == ["text"]
    assert function["strict"] is True
    with pytest.raises(ValueError, match="idempotency_key"):
        send.read('{"text": "x", "idempotency_key": "mine"}')
    with pytest.raises(TypeError, match="idempotency_key"):
        send.bind("x", idempotency_key="mine")

    @step(tools=[send])
    def asks(question: str) -> str:
        return question

    @program("agent")
    async def agent(run: Run) -> str:
        await run(asks, "q")
        told = await run.call(ToolCall(id="1", name="send", arguments='{"text": "hello"}'))
        return told.text

    store = MemoryCache()
    assert await ask(agent, upstream(), store, store, "key") == "hello"
    assert len(given[0]) == 64


async def test_two_attempts_at_once_have_one_effect(tmp_path: Path) -> None:
    entered = asyncio.Event()
    world: list[str] = []

    @tool(effect=True)
    async def send(text: str) -> str:
        world.append(text)
        entered.set()
        await asyncio.sleep(0.2)
        return "sent"

    @program("mailer")
    async def mails(run: Run) -> str:
        return await run(send, "x")

    store = DiskCache(tmp_path / "cache")
    await store.open()
    try:
        first = asyncio.ensure_future(ask(mails, upstream(), store, store, "key"))
        await entered.wait()
        second = asyncio.ensure_future(ask(mails, upstream(), store, store, "key"))
        assert list(await asyncio.gather(first, second)) == ["sent", "sent"]
    finally:
        await store.close()
    assert world == ["x"]


async def test_an_effects_result_that_is_no_json_is_told_and_the_effect_is_not_forgotten() -> None:
    @tool(effect=True)
    def send(text: str) -> object:
        return object()

    @program("mailer")
    async def mails(run: Run) -> str:
        return str(await run(send, "x"))

    store = MemoryCache()
    with pytest.raises(
        ProgramError, match='tool "send" has effect=True and has been called, but its result is not JSON'
    ):
        await ask(mails, upstream(), store, store, "key")
    with pytest.raises(EffectUnknown):
        await ask(mails, upstream(), store, store, "key")


# A store that does not do its part


class Failing(MemoryCache):
    """A store that can be told to answer nothing, or to keep nothing."""

    silent = deaf = False

    async def get(self, key: str) -> bytes | None:
        return None if self.silent else await super().get(key)

    async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
        if not self.deaf:
            await super().set(key, value, tag=tag, ttl=ttl)


async def test_nothing_is_done_where_the_journal_cannot_be_written() -> None:
    mails, world = mailer("a")
    journals = Failing()
    journals.deaf = True
    with pytest.raises(JournalUnusable, match="the journal of effects could not be read"):
        await ask(mails, upstream(), MemoryCache(), journals, "key")
    assert world == []


async def test_a_store_that_falls_silent_is_not_taken_for_an_empty_journal() -> None:
    mails, world = mailer("a")
    journals = Failing()
    assert await ask(mails, upstream(), MemoryCache(), journals, "key") == "[1]"
    journals.silent = True
    with pytest.raises(JournalUnusable) as failed:
        await ask(mails, upstream(), MemoryCache(), journals, "key")
    assert (failed.value.status, failed.value.retry) == (503, True)
    journals.silent = False
    assert await ask(mails, upstream(), MemoryCache(), journals, "key") == "[1]"
    assert world == ["a"]


async def test_a_store_that_falls_silent_within_a_run_stops_its_effects() -> None:
    world: list[str] = []
    journals = Failing()

    @tool(effect=True)
    def send(text: str) -> str:
        world.append(text)
        return text

    @program("mailer")
    async def mails(run: Run) -> str:
        await run(send, "a")
        journals.silent = True
        return await run(send, "b")

    with pytest.raises(JournalUnusable):
        await ask(mails, upstream(), MemoryCache(), journals, "key")
    assert world == ["a"]


async def test_an_entry_that_cannot_be_read_is_not_taken_for_none() -> None:
    mails, world = mailer("a")
    journals = MemoryCache()
    assert await ask(mails, upstream(), MemoryCache(), journals, "key") == "[1]"
    entries = [(key, tag) async for key, tag, _ in journals.entries()]
    for key, tag in entries:
        await journals.set(key, b"{}", tag=tag)
    with pytest.raises(JournalUnusable):
        await ask(mails, upstream(), MemoryCache(), journals, "key")
    assert world == ["a"]


async def test_a_run_without_effects_does_not_need_the_journal() -> None:
    @program("quiet")
    async def quiet(run: Run) -> str:
        return await run.reply(letter, "x")

    journals = Failing()
    journals.silent = journals.deaf = True
    assert await ask(quiet, upstream(), MemoryCache(), journals, "key") == "yes"


# What is refused


@tool(effect=True)
def pay(amount: int) -> str:
    return f"paid {amount}"


@step(tools=[pay])
def by_model(question: str) -> str:
    return question


async def _hands_on(run: Run) -> str:
    return str(await run(pay, 1))


@program("payer")
async def payer(run: Run) -> str:
    return await _hands_on(run)


@program("agent")
async def agent(run: Run) -> str:
    return await run(by_model, "q")


@program("outer")
async def outer(run: Run) -> str:
    return await run(payer, "q")


@pytest.mark.parametrize("reaching", [payer, agent, outer])
def test_a_program_that_reaches_an_effect_wants_an_idempotency_key(reaching: Program[Any, Any]) -> None:
    assert [tool.name for tool in reaching.effects] == ["pay"]
    with pytest.raises(
        InvalidRequest, match='has effects that must not be repeated \\("pay"\\); send an Idem'
    ) as refused:
        check(reaching, identity=None, cache=CachePolicy(), journal=True)
    assert (refused.value.status, refused.value.param) == (400, "Idempotency-Key")
    check(reaching, identity="key", cache=CachePolicy(), journal=True)


@pytest.mark.parametrize("policy", [CachePolicy("off"), CachePolicy("refresh"), CachePolicy(max_age=5)])
def test_effects_and_doing_without_the_cache_exclude_each_other(policy: CachePolicy) -> None:
    with pytest.raises(InvalidRequest, match="a retry could go another way without the cache"):
        check(payer, identity="key", cache=policy, journal=True)


def test_effects_are_not_had_once_for_each_of_several_choices() -> None:
    with pytest.raises(InvalidRequest, match="3 choices would have them 3 times") as refused:
        check(payer, identity="key", cache=CachePolicy(), journal=True, choices=3)
    assert refused.value.param == "n"


def test_a_server_without_a_journal_refuses_effects() -> None:
    with pytest.raises(InvalidRequest, match="this server keeps no journal"):
        check(payer, identity="key", cache=CachePolicy(), journal=False)


def test_a_program_without_effects_wants_nothing() -> None:
    @program("quiet")
    async def quiet(run: Run) -> str:
        return ""

    check(quiet, identity=None, cache=CachePolicy("off"), journal=False)


async def test_an_effect_that_no_one_foresaw_is_refused_when_it_is_met() -> None:
    hidden = SimpleNamespace(tool=pay)

    @program("sly")
    async def sly(run: Run) -> str:
        return str(await run(hidden.tool, 1))

    with pytest.raises(InvalidRequest, match='program "sly" calls "pay", an effect that must not be repeated'):
        await run_program(sly, "q", upstream=upstream(), cache=MemoryCache())


async def test_a_program_with_effects_plays_no_role_of_another() -> None:
    @program("asks")
    async def asks(run: Run) -> str:
        return await run(letter, "q")

    models = Models([asks, payer], {"default": upstream()}, roles={"default": "payer"})
    served = models.find("asks")
    assert isinstance(served, ServedProgram)
    with pytest.raises(InvalidRequest, match=r'program "payer" has effects .* so it cannot play a role of another'):
        await require(asks, models.cast(served))


def test_an_effect_is_not_cached_too() -> None:
    with pytest.raises(TypeError, match="exclude each other"):
        tool(effect=True, cache=True)(str.upper)


async def test_journals_of_scopes_programs_and_keys_are_apart() -> None:
    store = MemoryCache()
    done: list[str] = []

    async def act(key: str) -> str:
        done.append(key)
        return "ok"

    for scope, name, identity in [("a", "p", "k"), ("b", "p", "k"), ("a", "q", "k"), ("a", "p", "l")]:
        journal = await Journal.begun(store, scope=scope, program=name, identity=identity)
        assert await journal.perform("t", {}, "0/0", act, repeatable=False) == "ok"
    assert len(set(done)) == 4


async def test_a_key_that_was_used_for_another_request_is_refused_wherever_that_was() -> None:
    store = MemoryCache()
    for _ in range(2):
        await Journal.begun(store, scope="", program="p", identity="k", request="a")
    with pytest.raises(InvalidRequest, match="was used for another request") as refused:
        await Journal.begun(store, scope="", program="p", identity="k", request="b")
    assert (refused.value.status, refused.value.code) == (400, "idempotency_key_reused")


# Killed


def once(folder: Path, kind: str, dies: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "tests.effecting", str(folder), "key", kind, dies],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    ("kind", "dies", "answer", "effects"),
    [
        ("plain", "before", "effect_unknown", 0),
        ("plain", "after", "effect_unknown", 1),
        ("plain", "later", "answer", 1),
        ("keyed", "before", "answer", 1),
        ("keyed", "after", "answer", 2),
        ("keyed", "later", "answer", 1),
    ],
)
def test_a_process_killed_at_an_effect_is_followed_by_one_that_knows(
    tmp_path: Path, kind: str, dies: str, answer: str, effects: int
) -> None:
    assert once(tmp_path, kind, dies).returncode == -9
    retried = once(tmp_path, kind, "never")
    if answer == "answer":
        assert retried.stdout.startswith("<Say that <Write about q.> was sent at "), retried.stderr
    else:
        assert retried.stdout.strip() == answer, retried.stderr
    world = lines(tmp_path / "world")
    assert len(world) == effects
    # The other side knows a repetition by its key.
    assert len(set(world)) <= 1
    # The letter was bought once, and so the effect was meant with the same text.
    assert lines(tmp_path / "bought").count("Write about q.") == 1
    if answer == "answer":
        assert once(tmp_path, kind, "never").stdout == retried.stdout
        assert len(lines(tmp_path / "bought")) == 2
