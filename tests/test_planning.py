"""What a run would find and would buy, without buying: and whether that is what the run then does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from asmodel import InvalidRequest, Message, Run, gather, program, step, tool
from asmodel.app import onion
from asmodel.calls import CachePolicy, Call, Chat
from asmodel.models import Models
from asmodel.planning import Plan, foresee
from asmodel.programs import Program
from asmodel.protocols import Cache
from asmodel.run import Request
from asmodel.settings import UpstreamSettings
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache

Body = Callable[[Run], Awaitable[str]]


def made(body: Body, name: str = "made") -> Program[None, Any]:
    async def function(run: Run) -> str:
        return await body(run)

    return program(name)(function)


@step
def ask(text: str) -> str:
    return text


def said(call: Call) -> str:
    assert isinstance(call, Chat)
    return f"<{call.messages[0].text}>"


def upstream() -> FunctionUpstream:
    return FunctionUpstream(said, name="up")


def models(up: FunctionUpstream, store: Cache, *programs: Program[Any, Any], **more: Any) -> Models:
    wrapped = onion({"default": up}, {"default": UpstreamSettings(kind="function")}, store)
    return Models(programs, wrapped, store=store, **more)


async def plan(up: FunctionUpstream, store: Cache, *programs: Program[Any, Any], name: str = "", **more: Any) -> Plan:
    asked = Request(messages=(Message("user", "q"),))
    async with asyncio.timeout(5):
        return await foresee(models(up, store, *programs), name or programs[0].name, asked, store=store, **more)


async def book(run: Run) -> str:
    parts = await gather(run(ask, f"chapter {n}") for n in range(5))
    return await run.reply(ask, " ".join(parts))


async def test_of_an_empty_cache_the_first_steps_are_foreseen_and_nothing_is_bought() -> None:
    up = upstream()
    foreseen = await plan(up, MemoryCache(), made(book))
    assert up.calls == []
    assert (foreseen.whole, foreseen.error, foreseen.count("buy"), foreseen.count("hit")) == (False, None, 5, 0)
    assert foreseen.rows == [("made", "ask", 0, 5)]


async def test_of_a_run_that_was_made_all_is_found_and_what_it_saves_is_known() -> None:
    up, store = upstream(), MemoryCache()
    await run_program(made(book), "q", upstream=up, cache=store)
    foreseen = await plan(up, store, made(book))
    assert (foreseen.whole, foreseen.count("buy"), foreseen.count("hit")) == (True, 0, 6)
    assert sum(step.tokens for step in foreseen.steps) > 0
    assert len(up.calls) == 6


@pytest.mark.parametrize("edited", range(5))
async def test_a_plan_is_what_the_run_then_does(edited: int) -> None:
    async def changed(run: Run) -> str:
        parts = await gather(run(ask, f"chapter {n}" + "!" * (n == edited)) for n in range(5))
        return await run.reply(ask, " ".join(parts))

    up, store = upstream(), MemoryCache()
    await run_program(made(book), "q", upstream=up, cache=store)
    foreseen = await plan(up, store, made(changed))
    # What follows from the edited chapter is not known.
    assert (foreseen.whole, foreseen.count("buy"), foreseen.count("hit")) == (False, 1, 4)
    before = len(up.calls)
    await run_program(made(changed), "q", upstream=up, cache=store)
    assert len(up.calls) - before == 2


async def test_equal_calls_that_are_to_be_bought_are_one_purchase() -> None:
    cold = ask.using(temperature=0)

    async def body(run: Run) -> str:
        await gather(run(cold, "a") for _ in range(3))
        return ""

    foreseen = await plan(upstream(), MemoryCache(), made(body))
    assert Counter(s.finding for s in foreseen.steps) == {"buy": 1, "share": 2}


async def test_a_step_without_cache_is_always_to_be_bought() -> None:
    async def body(run: Run) -> str:
        return await run(ask.using(cache=False), "a")

    up, store = upstream(), MemoryCache()
    await run_program(made(body), "q", upstream=up, cache=store)
    assert (await plan(up, store, made(body))).count("buy") == 1
    refresh = CachePolicy(mode="refresh")
    assert (await plan(up, store, made(book), cache=refresh)).count("buy") == 5


async def test_tools_are_looked_up_and_never_called() -> None:
    called: list[str] = []

    @tool(cache=True)
    def kept(text: str) -> str:
        called.append(text)
        return text

    @tool
    def plain(text: str) -> str:
        called.append(text)
        return text

    @tool(effect=True)
    def pay(text: str) -> str:
        called.append(text)
        return text

    async def body(run: Run) -> str:
        await run(kept, "a")
        return "".join(await gather(run(plain, "b"), run(pay, "c")))

    up, store = upstream(), MemoryCache()
    foreseen = await plan(up, store, made(body))
    assert [(s.step, s.finding) for s in foreseen.steps] == [("kept", "tool")]
    await run_program(made(lambda run: run(kept, "a")), "q", upstream=up, cache=store)
    called.clear()
    foreseen = await plan(up, store, made(body))
    assert Counter(s.step for s in foreseen.steps) == {"plain": 1, "pay": 1}
    assert called == []


async def test_what_a_program_that_plays_a_role_would_do_is_foreseen_too() -> None:
    async def inner(run: Run) -> str:
        return await run.reply(ask, f"inside {run.question}")

    async def outer(run: Run) -> str:
        return await run.reply(ask.using(model="player"), "a")

    programs = made(inner, "inner"), made(outer, "outer")
    roles = {"player": "inner"}
    up, store = upstream(), MemoryCache()
    foreseen = await plan(up, store, *programs, name="outer", roles=roles)
    assert [(s.program, s.step, s.finding) for s in foreseen.steps] == [("inner", "ask", "buy")]
    foreseen = await plan(up, store, *programs, name="outer:inner")
    assert foreseen.count("buy") == 1
    assert up.calls == []


async def test_a_run_that_would_end_in_an_error_says_so() -> None:
    async def body(run: Run) -> str:
        raise ValueError("a secret")

    foreseen = await plan(upstream(), MemoryCache(), made(body))
    assert foreseen.whole is False
    assert foreseen.error is not None
    assert foreseen.error.startswith('program "made": its code raised ValueError')


async def test_a_slow_store_is_waited_for() -> None:
    class Slow(MemoryCache):
        async def get(self, key: str) -> bytes | None:
            await asyncio.sleep(0.4)
            return await super().get(key)

    up, store = upstream(), Slow()

    async def body(run: Run) -> str:
        return " ".join(await gather(run(ask, "a"), run(ask, "b")))

    await run_program(made(lambda run: run(ask, "b")), "q", upstream=up, cache=store)
    foreseen = await plan(up, store, made(body))
    assert Counter(s.finding for s in foreseen.steps) == {"hit": 1, "buy": 1}


async def test_a_plan_of_an_upstream_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="plans are made for programs"):
        await plan(upstream(), MemoryCache(), made(book), name="default")
