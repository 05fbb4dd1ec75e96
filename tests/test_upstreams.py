"""Between a step and a provider: bought once, tried again where that is safe, so many at a time, and never too long."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asmodel import tracing
from asmodel.budget import Budget, Limits
from asmodel.calls import (
    CachePolicy,
    Call,
    Capabilities,
    Chat,
    Delta,
    Message,
    Reply,
    Score,
    Terms,
    TokenLogprob,
    ToolCall,
    Usage,
    key,
)
from asmodel.errors import (
    DeadlineExceeded,
    LimitExceeded,
    NotCached,
    UpstreamAuth,
    UpstreamBroken,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from asmodel.protocols import Cache, Counting, Detecting, Upstream
from asmodel.testing import FunctionUpstream
from asmodel.upstreams import Cached, Flights, Limited, Metered, Price, Retried, Routed, Timed
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.memory_cache import MemoryCache

ON = Terms(program="p", step="s")


def chat(text: str = "hello", **fields: Any) -> Chat:
    return Chat(identity="up", messages=(Message("user", text),), **fields)


def terms(**fields: Any) -> Terms:
    return replace(ON, **fields)


def mode(name: Any, **more: Any) -> Terms:
    return terms(cache=CachePolicy(mode=name, **more))


class Gate:
    """An upstream function that answers once it is let, counts who is inside, and says who was cancelled."""

    def __init__(self, answer: Any = "yes") -> None:
        self.answer = answer
        self.open = asyncio.Event()
        self.entered = asyncio.Event()
        self.inside = 0
        self.most = 0
        self.cancelled = 0

    async def __call__(self, call: Call) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1
        return self.answer


async def settle() -> None:
    """Let everything that can run now have run."""
    for _ in range(20):
        await asyncio.sleep(0)


def seen_of(stream: list[Delta]) -> str:
    return "".join(delta.text for delta in stream)


def collecting(deltas: list[Delta]) -> Callable[[Delta], Awaitable[None]]:
    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    return emit


# Cached


@pytest.fixture(params=["memory", "disk"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        yield MemoryCache()
        return
    disk = DiskCache(tmp_path / "cache")
    await disk.open()
    yield disk
    await disk.close()


async def test_an_answer_is_bought_once_and_then_a_hit(store: Cache) -> None:
    upstream = FunctionUpstream(lambda call: "yes", name="up")
    cached = Cached(upstream, store)
    bought, hit = await cached.send(chat(), ON), await cached.send(chat(), ON)
    assert (bought.source, hit.source) == ("bought", "hit")
    assert hit.named("bought") == bought
    assert len(upstream.calls) == 1


async def test_another_draw_or_scope_or_upstream_is_another_answer(store: Cache) -> None:
    upstream = FunctionUpstream(lambda call: "yes", name="up")
    cached = Cached(upstream, store)
    for call in (chat(), chat(draw="0/0"), chat(draw="0/1"), replace(chat(), identity="other")):
        await cached.send(call, ON)
    await cached.send(chat(), terms(scope="team"))
    assert len(upstream.calls) == 5


async def test_a_hit_comes_as_the_stream_that_it_was() -> None:
    reply = Reply(text="yes, it is", reasoning="hm", tool_calls=(ToolCall(id="1", name="f", arguments="{}"),))
    cached = Cached(FunctionUpstream(lambda call: reply, name="up"), MemoryCache())
    await cached.send(chat(), ON)
    deltas: list[Delta] = []
    await cached.send(chat(), terms(emit=collecting(deltas)))
    assert "".join(d.text for d in deltas) == "yes, it is"
    assert "".join(d.reasoning for d in deltas) == "hm"
    assert [(c.index, c.id, c.name, c.arguments) for d in deltas for c in d.tool_calls] == [(0, "1", "f", "{}")]


async def test_64_who_want_the_same_at_once_buy_it_once(store: Cache) -> None:
    gate = Gate()
    upstream = FunctionUpstream(gate, name="up")
    cached = Cached(upstream, store)
    budgets = [Budget() for _ in range(64)]
    waiting = [asyncio.ensure_future(cached.send(chat(), terms(budget=b))) for b in budgets]
    await gate.entered.wait()
    await asyncio.sleep(0.05)
    gate.open.set()
    replies = await asyncio.gather(*waiting)
    assert len(upstream.calls) == 1
    assert Counter(reply.source for reply in replies) == {"bought": 1, "joined": 63}
    assert sum(budget.calls for budget in budgets) == 1
    assert (await cached.send(chat(), ON)).source == "hit"


async def test_upstreams_of_one_identity_may_share_what_is_under_way() -> None:
    gate = Gate()
    upstream, flights, store = FunctionUpstream(gate, name="up"), Flights(), MemoryCache()
    waiting = [asyncio.ensure_future(Cached(upstream, store, flights).send(chat(), ON)) for _ in range(3)]
    await settle()
    gate.open.set()
    assert sorted(reply.source for reply in await asyncio.gather(*waiting)) == ["bought", "joined", "joined"]
    assert (flights.flying, flights.lookups) == ({}, {})


async def test_the_time_that_a_joiner_waits_is_the_upstreams_and_not_ours() -> None:
    gate = Gate()
    cached = Cached(metered(FunctionUpstream(gate, name="up")), MemoryCache())
    budgets = [Budget(), Budget()]
    waiting = [asyncio.ensure_future(cached.send(chat(), terms(budget=b))) for b in budgets]
    await asyncio.sleep(0.05)
    gate.open.set()
    await asyncio.gather(*waiting)
    assert all(budget.upstream_seconds > 0.04 for budget in budgets)


async def test_without_a_store_those_at_the_same_moment_still_share() -> None:
    gate = Gate()
    upstream = FunctionUpstream(gate, name="up")
    cached = Cached(upstream, None)
    waiting = [asyncio.ensure_future(cached.send(chat(), ON)) for _ in range(3)]
    await settle()
    gate.open.set()
    await asyncio.gather(*waiting)
    await cached.send(chat(), ON)
    assert len(upstream.calls) == 2


async def test_a_purchase_goes_on_when_the_one_who_began_it_leaves() -> None:
    gate = Gate()
    upstream = FunctionUpstream(gate, name="up")
    cached = Cached(upstream, MemoryCache())
    leader = asyncio.ensure_future(cached.send(chat(), ON))
    await settle()
    joiner = asyncio.ensure_future(cached.send(chat(), ON))
    await settle()
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    assert leader.cancelled()
    assert gate.inside == 1
    gate.open.set()
    assert (await joiner).text == "yes"
    assert (len(upstream.calls), gate.cancelled) == (1, 0)


async def test_a_purchase_ends_when_its_last_waiter_leaves() -> None:
    gate = Gate()
    cached = Cached(FunctionUpstream(gate, name="up"), MemoryCache())
    waiting = [asyncio.ensure_future(cached.send(chat(), ON)) for _ in range(3)]
    await settle()
    for task in waiting[:2]:
        task.cancel()
    await settle()
    assert gate.inside == 1
    waiting[2].cancel()
    await settle()  # No time passes in this, so it is far below the 100 ms that a provider may be paid for nothing.
    assert (gate.inside, gate.cancelled) == (0, 1)
    gate.open.set()
    assert (await cached.send(chat(), ON)).source == "bought"


async def test_who_comes_just_as_the_last_waiter_leaves_buys_anew() -> None:
    gate = Gate()
    upstream = FunctionUpstream(gate, name="up")
    cached = Cached(upstream, MemoryCache())
    first = asyncio.ensure_future(cached.send(chat(), ON))
    await settle()
    first.cancel()
    await asyncio.sleep(0)
    second = asyncio.ensure_future(cached.send(chat(), ON))
    await settle()
    gate.open.set()
    assert (await second).source == "bought"
    assert len(upstream.calls) == 2


class SlowStore(MemoryCache):
    """A store that takes its time to write, and then says so."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = asyncio.Event()
        self.go_on = asyncio.Event()
        self.written = asyncio.Event()

    async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
        self.writing.set()
        await self.go_on.wait()
        await super().set(key, value, tag=tag, ttl=ttl)
        self.written.set()


async def test_a_reply_that_has_arrived_is_stored_even_if_everybody_has_left() -> None:
    store = SlowStore()
    cached = Cached(FunctionUpstream(lambda call: "yes", name="up"), store)
    task = asyncio.ensure_future(cached.send(chat(), ON))
    await store.writing.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    store.go_on.set()
    await store.written.wait()
    assert (await cached.send(chat(), ON)).source == "hit"


async def test_a_reply_is_returned_only_once_it_is_stored() -> None:
    store = SlowStore()
    cached = Cached(FunctionUpstream(lambda call: "yes", name="up"), store)
    task = asyncio.ensure_future(cached.send(chat(), ON))
    await store.writing.wait()
    await settle()
    assert not task.done()
    store.go_on.set()
    assert (await task).text == "yes"


async def test_a_failure_goes_to_all_who_wait_and_is_not_stored() -> None:
    gate = Gate(UpstreamUnavailable('upstream "up" is down'))
    upstream = FunctionUpstream(gate, name="up")
    cached = Cached(upstream, MemoryCache())
    waiting = [asyncio.ensure_future(cached.send(chat(), ON)) for _ in range(8)]
    await settle()
    gate.open.set()
    failed = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(error) for error in failed} == {UpstreamUnavailable}
    assert len(upstream.calls) == 1
    gate.answer = "up again"
    assert (await cached.send(chat(), ON)).text == "up again"


async def test_a_failure_that_nobody_waits_for_any_more_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def stubborn(call: Call) -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            raise UpstreamBroken("a secret") from None
        return "never"

    cached = Cached(FunctionUpstream(stubborn, name="up"), MemoryCache())
    task = asyncio.ensure_future(cached.send(chat(), ON))
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await settle()
    import gc

    gc.collect()
    assert "secret" not in caplog.text


async def test_the_limit_of_who_began_a_purchase_is_not_the_limit_of_who_joined_it() -> None:
    gate = Gate(UpstreamUnavailable("down"))
    called = Retried(FunctionUpstream(gate, name="up"), pause=0.001)
    cached = Cached(Routed([called, called]), MemoryCache())
    leader = asyncio.ensure_future(cached.send(chat(), terms(budget=Budget(limits=Limits(calls=1)))))
    await settle()
    joiner = asyncio.ensure_future(cached.send(chat(), terms(budget=Budget(limits=Limits(calls=9)))))
    await settle()
    gate.open.set()
    failed = await asyncio.gather(leader, joiner, return_exceptions=True)
    assert [type(error) for error in failed] == [UpstreamUnavailable, UpstreamUnavailable]


async def test_who_may_buy_nothing_may_still_join_and_find() -> None:
    gate = Gate()
    cached = Cached(FunctionUpstream(gate, name="up"), MemoryCache())
    broke = terms(budget=Budget(limits=Limits(calls=0)))
    leader = asyncio.ensure_future(cached.send(chat(), ON))
    await settle()
    joiner = asyncio.ensure_future(cached.send(chat(), broke))
    await settle()
    gate.open.set()
    assert (await joiner).source == "joined"
    assert (await leader).source == "bought"
    assert (await cached.send(chat(), broke)).source == "hit"
    with pytest.raises(LimitExceeded, match="0 upstream calls"):
        await cached.send(chat("other"), broke)


async def test_each_waiter_has_a_deadline_of_its_own() -> None:
    gate = Gate()
    upstream = FunctionUpstream(gate, name="up")
    cached = Cached(upstream, MemoryCache())
    now = asyncio.get_running_loop().time()
    leader = asyncio.ensure_future(cached.send(chat(), terms(deadline=now + 0.05)))
    await settle()
    joiner = asyncio.ensure_future(cached.send(chat(), terms(deadline=now + 0.1)))
    patient = asyncio.ensure_future(cached.send(chat(), terms(deadline=now + 60)))
    for task in (leader, joiner):
        with pytest.raises(DeadlineExceeded, match='used up at step "s"'):
            await task
    assert gate.inside == 1
    gate.open.set()
    assert (await patient).text == "yes"
    assert len(upstream.calls) == 1


async def test_a_deadline_ends_a_purchase_that_nobody_else_waits_for() -> None:
    gate = Gate()
    cached = Cached(FunctionUpstream(gate, name="up"), MemoryCache())
    with pytest.raises(DeadlineExceeded):
        await cached.send(chat(), terms(deadline=asyncio.get_running_loop().time() + 0.02))
    await settle()
    assert (gate.inside, gate.cancelled) == (0, 1)


async def test_an_upstreams_own_timeout_is_not_taken_for_the_deadline() -> None:
    cached = Cached(FunctionUpstream(lambda call: TimeoutError("its own"), name="up"), MemoryCache())
    with pytest.raises(TimeoutError, match="its own"):
        await cached.send(chat(), terms(deadline=asyncio.get_running_loop().time() + 60))


async def test_a_stream_is_read_by_each_waiter_at_its_own_pace() -> None:
    text = "one two three four five six seven"
    cached = Cached(FunctionUpstream(lambda call: text, name="up"), MemoryCache())
    blocked = asyncio.Event()
    slow: list[Delta] = []
    fast: list[Delta] = []

    async def slowly(delta: Delta) -> None:
        await blocked.wait()
        slow.append(delta)

    leader = asyncio.ensure_future(cached.send(chat(), terms(emit=slowly)))
    await asyncio.sleep(0)
    joiner = asyncio.ensure_future(cached.send(chat(), terms(emit=collecting(fast))))
    plain = asyncio.ensure_future(cached.send(chat(), ON))
    assert (await joiner).text == (await plain).text == text
    assert (seen_of(fast), slow) == (text, [])
    blocked.set()
    assert (await leader).text == text
    assert seen_of(slow) == text


async def test_a_waiter_that_comes_in_the_middle_of_a_stream_gets_its_beginning_too() -> None:
    go_on = asyncio.Event()

    class Streaming(FunctionUpstream):
        async def send(self, call: Call, terms: Terms) -> Reply:
            assert terms.emit is not None
            await terms.emit(Delta(text="begin "))
            await go_on.wait()
            await terms.emit(Delta(text="end"))
            return Reply(text="begin end")

    cached = Cached(Streaming(lambda call: "", name="up"), MemoryCache())
    first: list[Delta] = []
    late: list[Delta] = []
    leader = asyncio.ensure_future(cached.send(chat(), terms(emit=collecting(first))))
    await settle()
    joiner = asyncio.ensure_future(cached.send(chat(), terms(emit=collecting(late))))
    await settle()
    assert seen_of(first) == seen_of(late) == "begin "
    go_on.set()
    await asyncio.gather(leader, joiner)
    assert seen_of(first) == seen_of(late) == "begin end"


async def test_an_interrupted_stream_is_not_stored_and_what_had_come_was_passed_on() -> None:
    class Breaking(FunctionUpstream):
        async def send(self, call: Call, terms: Terms) -> Reply:
            self.calls.append(call)
            assert terms.emit is not None
            await terms.emit(Delta(text="half an ans"))
            raise UpstreamBroken("the stream broke off")

    upstream = Breaking(lambda call: "", name="up")
    cached = Cached(upstream, MemoryCache())
    for _ in range(2):
        deltas: list[Delta] = []
        with pytest.raises(UpstreamBroken):
            await cached.send(chat(), terms(emit=collecting(deltas)))
        assert seen_of(deltas) == "half an ans"
    assert len(upstream.calls) == 2


def only(word: str) -> Callable[[Reply], None]:
    def accept(reply: Reply) -> None:
        if reply.text != word:
            raise ValueError(f"not {word}")

    return accept


async def test_a_reply_is_stored_only_if_its_step_can_read_it() -> None:
    upstream = FunctionUpstream(lambda call: "yes", name="up")
    cached = Cached(upstream, MemoryCache())
    assert (await cached.send(chat(), terms(accept=only("no")))).text == "yes"
    assert (await cached.send(chat(), terms(accept=only("yes")))).source == "bought"
    assert (await cached.send(chat(), terms(accept=only("yes")))).source == "hit"
    assert (await cached.send(chat(), terms(accept=only("no")))).source == "bought"


async def test_a_reply_is_stored_if_anyone_who_waits_for_it_can_read_it() -> None:
    gate = Gate()
    cached = Cached(FunctionUpstream(gate, name="up"), MemoryCache())
    waiting = [asyncio.ensure_future(cached.send(chat(), terms(accept=only(word)))) for word in ("no", "yes")]
    await settle()
    gate.open.set()
    await asyncio.gather(*waiting)
    assert (await cached.send(chat(), terms(accept=only("yes")))).source == "hit"


async def test_a_reader_with_a_bug_harms_nobody_else() -> None:
    def buggy(reply: Reply) -> None:
        raise AttributeError("'NoneType' object has no attribute 'group'")

    gate = Gate()
    cached = Cached(FunctionUpstream(gate, name="up"), MemoryCache())
    waiting = [asyncio.ensure_future(cached.send(chat(), terms(accept=accept))) for accept in (buggy, only("yes"))]
    await settle()
    gate.open.set()
    assert [reply.text for reply in await asyncio.gather(*waiting)] == ["yes", "yes"]
    assert (await cached.send(chat(), ON)).source == "hit"


async def test_off_neither_reads_nor_writes_nor_joins() -> None:
    gate = Gate()
    upstream = FunctionUpstream(gate, name="up")
    cached = Cached(upstream, MemoryCache())
    waiting = [asyncio.ensure_future(cached.send(chat(), mode("off"))) for _ in range(2)]
    await settle()
    assert gate.inside == 2
    gate.open.set()
    assert [reply.source for reply in await asyncio.gather(*waiting)] == ["bought", "bought"]
    assert (await cached.send(chat(), ON)).source == "bought"
    assert (await cached.send(chat(), mode("off"))).source == "bought"


async def test_refresh_buys_and_replaces_what_was_stored() -> None:
    answers = iter(["old", "new"])
    cached = Cached(FunctionUpstream(lambda call: next(answers), name="up"), MemoryCache())
    await cached.send(chat(), ON)
    assert (await cached.send(chat(), mode("refresh"))).text == "new"
    assert (await cached.send(chat(), ON)).text == "new"


async def test_only_what_is_cached_is_an_error_where_nothing_is() -> None:
    upstream = FunctionUpstream(lambda call: "yes", name="up")
    cached = Cached(upstream, MemoryCache())
    with pytest.raises(NotCached, match='step "s" is not in the cache'):
        await cached.send(chat(), mode("only"))
    assert upstream.calls == []
    await cached.send(chat(), ON)
    assert (await cached.send(chat(), mode("only"))).source == "hit"


async def test_what_is_older_than_is_wanted_is_bought_anew() -> None:
    upstream = FunctionUpstream(lambda call: Reply(text="yes", bought_at=time.time() - 100), name="up")
    cached = Cached(upstream, MemoryCache())
    await cached.send(chat(), ON)
    assert (await cached.send(chat(), mode("on", max_age=200))).source == "hit"
    assert (await cached.send(chat(), mode("on", max_age=50))).source == "bought"
    # A step's own limit holds for what was stored before it had one.
    assert (await cached.send(chat(), mode("on", ttl=50))).source == "bought"
    assert (await cached.send(chat(), mode("on", ttl=200, max_age=300))).source == "hit"


async def test_a_stored_reply_ends_with_the_ttl_of_its_step() -> None:
    store = MemoryCache()
    cached = Cached(FunctionUpstream(lambda call: "yes", name="up"), store)
    await cached.send(chat(), mode("on", ttl=0.01))
    await asyncio.sleep(0.03)
    assert await store.get(key(chat())) is None


@pytest.mark.parametrize("data", [b"", b"N.", b"\x80\x04N.", b"{}", b'{"v":1,"text":"yes"}', b"[]"])
async def test_an_entry_that_cannot_be_read_is_a_miss_and_is_replaced(
    store: Cache, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cached = Cached(FunctionUpstream(lambda call: "yes", name="up"), store)
    await store.set(key(chat()), data)
    assert (await cached.send(chat(), ON)).source == "bought"
    assert "a stored reply of p/s cannot be read and counts as a miss" in caplog.text
    assert (await cached.send(chat(), ON)).source == "hit"


async def test_an_entry_is_tagged_with_the_program_and_step_that_bought_it() -> None:
    store = MemoryCache()
    await Cached(FunctionUpstream(lambda call: "yes", name="up"), store).send(chat(), ON)
    assert [tag async for _, tag, _ in store.entries() if not tag.startswith("#")] == ["p/s"]


async def test_a_store_that_cannot_be_written_costs_the_entry_and_not_the_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(MemoryCache):
        async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
            raise OSError("No space left on device")

    cached = Cached(FunctionUpstream(lambda call: "yes", name="up"), Full())
    assert (await cached.send(chat(), ON)).text == "yes"
    assert "a reply of p/s could not be stored: OSError" in caplog.text


async def test_a_purchase_that_lands_while_another_looks_is_not_made_twice() -> None:
    asked = key(chat())

    class SlowToRead(MemoryCache):
        """Its first look was taken before the entry was there, and comes back after."""

        def __init__(self) -> None:
            super().__init__()
            self.looks = 0
            self.come_back = asyncio.Event()

        async def get(self, key: str) -> bytes | None:
            self.looks += key == asked
            found = await super().get(key)
            if self.looks == 1:
                await self.come_back.wait()
            return found

    store = SlowToRead()
    upstream = FunctionUpstream(lambda call: "yes", name="up")
    cached = Cached(upstream, store)
    early = asyncio.ensure_future(cached.send(chat(), ON))
    await settle()
    late = asyncio.ensure_future(cached.send(chat(), ON))
    assert (await late).source == "bought"
    store.come_back.set()
    assert (await early).source == "hit"
    assert (len(upstream.calls), store.looks) == (1, 3)


async def test_an_upstream_that_breaks_off_its_own_call_is_broken_and_the_waiter_lives_on() -> None:
    async def cancels_itself(call: Call) -> str:
        raise asyncio.CancelledError

    cached = Cached(FunctionUpstream(cancels_itself, name="up"), MemoryCache())
    with pytest.raises(UpstreamBroken, match='upstream "up" has broken off its own call'):
        await cached.send(chat(), ON)


async def test_text_that_is_not_unicode_is_a_broken_answer() -> None:
    cached = Cached(FunctionUpstream(lambda call: Reply(text="\ud83d", upstream="up"), name="up"), MemoryCache())
    with pytest.raises(UpstreamBroken, match='upstream "up" answered with text that is not Unicode'):
        await cached.send(chat(), ON)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_cancelled_nothing_is_left_running_and_nobody_else_is_disturbed(seed: int) -> None:
    dice = random.Random(seed)
    inside = 0

    async def answer(call: Call) -> str:
        nonlocal inside
        inside += 1
        try:
            await asyncio.sleep(dice.random() / 50)
        finally:
            inside -= 1
        assert isinstance(call, Chat)
        return call.messages[0].text

    cached = Cached(FunctionUpstream(answer, name="up"), MemoryCache())

    async def ask(n: int) -> None:
        await asyncio.sleep(dice.random() / 50)
        text = str(n % 10)
        emit = collecting([]) if dice.random() < 0.5 else None
        assert (await cached.send(chat(text), terms(emit=emit))).text == text

    tasks = [asyncio.ensure_future(ask(n)) for n in range(200)]
    for task in tasks:
        if dice.random() < 0.5:
            asyncio.get_running_loop().call_later(dice.random() / 25, task.cancel)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ended} <= {type(None), asyncio.CancelledError}
    await asyncio.sleep(0.05)
    assert inside == 0


# Routed


def failing(error: UpstreamError, name: str = "up") -> FunctionUpstream:
    return FunctionUpstream(lambda call: error, name=name)


async def test_the_next_of_equals_answers_when_one_is_down() -> None:
    first, second = failing(UpstreamUnreachable("down"), "a"), FunctionUpstream(lambda call: "yes", name="b")
    routed = Routed([first, second])
    budget = Budget()
    assert (await routed.send(chat(), terms(budget=budget))).text == "yes"
    assert routed.identity == first.identity
    assert (len(first.calls), len(second.calls), budget.calls) == (1, 1, 1)


async def test_the_next_of_equals_is_not_asked_what_would_be_refused_again() -> None:
    second = FunctionUpstream(lambda call: "yes", name="b")
    with pytest.raises(UpstreamRejected):
        await Routed([failing(UpstreamRejected("no")), second]).send(chat(), ON)
    assert second.calls == []


async def test_the_last_of_equals_has_the_last_word() -> None:
    with pytest.raises(UpstreamUnavailable, match="b is down"):
        await Routed([failing(UpstreamUnreachable("a is down")), failing(UpstreamUnavailable("b is down"))]).send(
            chat(), ON
        )


async def test_a_run_at_its_limit_hears_of_the_upstreams_error_and_not_of_the_limit() -> None:
    budget = Budget(limits=Limits(calls=1))
    budget.admit()
    second = FunctionUpstream(lambda call: "yes", name="b")
    with pytest.raises(UpstreamUnreachable):
        await Routed([failing(UpstreamUnreachable("down")), second]).send(chat(), terms(budget=budget))
    assert second.calls == []


class BreaksInTheMiddle(FunctionUpstream):
    async def send(self, call: Call, terms: Terms) -> Reply:
        self.calls.append(call)
        assert terms.emit is not None
        await terms.emit(Delta(text="half"))
        raise UpstreamUnreachable("reset")


@pytest.mark.parametrize("layer", [Routed, Retried])
async def test_after_the_first_delta_a_call_is_never_made_again(layer: type[Routed | Retried]) -> None:
    upstream = BreaksInTheMiddle(lambda call: "", name="up")
    wrapped = Routed([upstream, upstream]) if layer is Routed else Retried(upstream, pause=0.001)
    deltas: list[Delta] = []
    with pytest.raises(UpstreamUnreachable):
        await wrapped.send(chat(), terms(emit=collecting(deltas)))
    assert (len(upstream.calls), seen_of(deltas)) == (1, "half")


async def test_every_one_of_equals_is_opened_and_closed() -> None:
    lives: list[str] = []

    class Living(FunctionUpstream):
        async def open(self) -> None:
            lives.append(f"{self.name} opened")

        async def close(self) -> None:
            lives.append(f"{self.name} closed")

    routed = Routed([Limited(Living(lambda call: "", name=name), slots=1) for name in "ab"])
    await routed.open()
    await routed.close()
    assert lives == ["a opened", "b opened", "a closed", "b closed"]


async def test_a_layer_can_count_and_detect_only_what_the_upstream_in_it_can() -> None:
    class Able(FunctionUpstream):
        async def count(self, text: str) -> int:
            return len(text.split())

        async def detect(self) -> Capabilities:
            return Capabilities(loglikelihood=True)

    plain = Cached(Limited(FunctionUpstream(lambda call: "", name="plain"), slots=1), None)
    able = Cached(Limited(Able(lambda call: "", name="able"), slots=1), None)
    assert not isinstance(plain, (Counting, Detecting))
    assert isinstance(able, Counting)
    assert isinstance(able, Detecting)
    assert await able.count("one two") == 2
    assert (await able.detect()).loglikelihood
    assert (plain.name, able.name) == ("plain", "able")


# Metered


@pytest.fixture
def spans() -> Iterator[Callable[[], list[ReadableSpan]]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider)
    try:
        yield lambda: list(exporter.get_finished_spans())
    finally:
        tracing.remove(provider)
        provider.shutdown()


def metered(upstream: Upstream, price: Price | None = None) -> Metered:
    return Metered(upstream, name="fast", provider="openai", model="tiny", price=price)


USED = Reply(text="yes", usage=Usage(prompt_tokens=1_000_000, completion_tokens=500_000, cached_tokens=400_000))


async def test_a_call_that_is_made_says_who_answered_when_and_for_how_much(spans: Any) -> None:
    upstream = FunctionUpstream(lambda call: USED, name="up")
    budget = Budget()
    before = time.time()
    price = Price(input=1.0, output=4.0, cached_input=0.5)
    reply = await metered(upstream, price=price).send(chat(), terms(budget=budget))
    assert reply.upstream == "fast"
    assert reply.cost == pytest.approx(0.6 + 0.2 + 2.0)
    assert before <= reply.bought_at <= time.time()
    (span,) = spans()
    assert span.name == "chat tiny"
    assert reply.origin is not None
    assert reply.origin.span_id == f"{span.context.span_id:016x}"
    assert (budget.usage, budget.cost) == (USED.usage, reply.cost)
    assert budget.upstream_seconds > 0


async def test_a_price_that_nobody_knows_is_none_and_makes_the_runs_cost_none() -> None:
    budget = Budget()
    up = FunctionUpstream(lambda call: USED, name="up")
    assert (await metered(up, price=Price(input=1, output=1)).send(chat(), terms(budget=budget))).cost is not None
    assert (await metered(up).send(chat(), terms(budget=budget))).cost is None
    await metered(up, price=Price(input=1, output=1)).send(chat(), terms(budget=budget))
    assert budget.cost is None


async def test_the_upstreams_own_price_counts_where_the_settings_have_none() -> None:
    up = FunctionUpstream(lambda call: replace(USED, cost=0.25), name="up")
    assert (await metered(up).send(chat(), ON)).cost == 0.25
    assert (await metered(up, price=Price(input=0, output=0)).send(chat(), ON)).cost == 0


async def test_a_call_that_fails_is_charged_nothing_and_its_span_says_why(spans: Any) -> None:
    budget = Budget()
    with pytest.raises(UpstreamAuth):
        await metered(failing(UpstreamAuth("a key is refused"))).send(chat("a secret"), terms(budget=budget))
    assert (budget.usage, budget.cost) == (Usage(), 0.0)
    (span,) = spans()
    assert span.attributes["error.type"] == "upstream_auth"
    assert "secret" not in span.to_json()


# Retried


def flaky(*errors: Exception) -> FunctionUpstream:
    left = list(errors)
    return FunctionUpstream(lambda call: left.pop(0) if left else "yes", name="up")


async def test_a_call_that_failed_in_passing_is_made_again(spans: Any) -> None:
    upstream = flaky(UpstreamUnreachable("reset"), UpstreamUnavailable("503"))
    budget = Budget()
    called = metered(Retried(upstream, pause=0.001))
    assert (await called.send(chat(), terms(budget=budget))).text == "yes"
    assert (len(upstream.calls), budget.calls) == (3, 2)  # The first was counted by who made the call.
    attempts = [span for span in spans() if span.name.startswith("attempt")]
    assert [span.attributes.get("error.type") for span in attempts] == [
        "upstream_unreachable",
        "upstream_unavailable",
        None,
    ]


async def test_a_call_is_made_only_so_often() -> None:
    upstream = failing(UpstreamUnavailable("503"))
    with pytest.raises(UpstreamUnavailable):
        await Retried(upstream, retries=2, pause=0.001).send(chat(), ON)
    assert len(upstream.calls) == 3
    upstream = failing(UpstreamUnavailable("503"))
    with pytest.raises(UpstreamUnavailable):
        await Retried(upstream, retries=0).send(chat(), ON)
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("error", [UpstreamAuth, UpstreamRejected, UpstreamBroken, UpstreamError, ValueError])
async def test_what_would_fail_again_is_not_made_again(error: type[Exception]) -> None:
    upstream = flaky(error("no"))
    with pytest.raises(error):
        await Retried(upstream, pause=0.001).send(chat(), ON)
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    "error", [UpstreamRateLimited, UpstreamUnavailable, UpstreamUnreachable, UpstreamTimeout], ids=lambda e: e.__name__
)
async def test_what_may_succeed_the_next_time_is_made_again(error: type[UpstreamError]) -> None:
    assert (await Retried(flaky(error("wait")), pause=0.001).send(chat(), ON)).text == "yes"


async def test_an_upstream_that_says_when_to_come_back_is_asked_then() -> None:
    came = time.monotonic()
    await Retried(flaky(UpstreamRateLimited("wait", retry_after=0.1)), pause=30).send(chat(), ON)
    assert 0.1 <= time.monotonic() - came < 5


async def test_nobody_waits_longer_than_is_patient_and_the_error_says_when_to_come_back() -> None:
    upstream = flaky(UpstreamRateLimited("wait", retry_after=61))
    with pytest.raises(UpstreamRateLimited) as refused:
        await Retried(upstream, patience=60).send(chat(), ON)
    assert (len(upstream.calls), refused.value.retry_after) == (1, 61)


async def test_a_run_without_calls_left_is_told_what_the_upstream_said() -> None:
    upstream = failing(UpstreamUnavailable("503"))
    cached = Cached(Retried(upstream, pause=0.001), MemoryCache())
    with pytest.raises(UpstreamUnavailable):
        await cached.send(chat(), terms(budget=Budget(limits=Limits(calls=2))))
    assert len(upstream.calls) == 2


async def test_a_cancelled_wait_is_over_at_once() -> None:
    upstream = failing(UpstreamRateLimited("wait", retry_after=30))
    task = asyncio.ensure_future(Retried(upstream).send(chat(), ON))
    await settle()
    task.cancel()
    await asyncio.wait([task], timeout=1)
    assert task.cancelled()
    assert len(upstream.calls) == 1


async def test_a_call_that_waits_to_be_made_again_holds_no_slot() -> None:
    first = True

    def answer(call: Call) -> Any:
        nonlocal first
        if first:
            first = False
            return UpstreamRateLimited("wait", retry_after=30)
        assert isinstance(call, Chat)
        return call.messages[0].text

    called = Retried(Limited(FunctionUpstream(answer, name="up"), slots=1))
    waiting = asyncio.ensure_future(called.send(chat("first"), ON))
    await settle()
    assert (await called.send(chat("second"), ON)).text == "second"
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


# Limited


async def test_only_so_many_calls_are_made_at_a_time() -> None:
    gate = Gate()
    limited = Limited(FunctionUpstream(gate, name="up"), slots=3)
    waiting = [asyncio.ensure_future(limited.send(chat(str(n)), ON)) for n in range(10)]
    await settle()
    assert gate.inside == 3
    gate.open.set()
    await asyncio.gather(*waiting)
    assert gate.most == 3


async def test_a_run_of_a_thousand_steps_does_not_starve_a_run_of_three() -> None:
    answered: list[str] = []

    async def answer(call: Call, terms: Terms) -> str:
        await asyncio.sleep(0)
        answered.append(terms.run_id)
        return "yes"

    limited = Limited(FunctionUpstream(answer, name="up"), slots=2)
    long = [asyncio.ensure_future(limited.send(chat(), terms(run_id="long"))) for _ in range(1000)]
    await settle()
    short = [asyncio.ensure_future(limited.send(chat(), terms(run_id="short"))) for _ in range(3)]
    before = len(answered)
    await asyncio.gather(*short)
    assert len(answered) - before < 20
    await asyncio.gather(*long)
    assert Counter(answered) == {"long": 1000, "short": 3}


async def test_calls_of_one_run_are_made_in_the_order_in_which_they_came() -> None:
    order: list[str] = []

    async def answer(call: Call) -> str:
        assert isinstance(call, Chat)
        order.append(call.messages[0].text)
        await asyncio.sleep(0)
        return "yes"

    limited = Limited(FunctionUpstream(answer, name="up"), slots=1)
    await asyncio.gather(*(limited.send(chat(str(n)), ON) for n in range(20)))
    assert order == [str(n) for n in range(20)]


@pytest.mark.parametrize("seed", range(20))
async def test_no_slot_is_lost_whoever_leaves_and_whenever(seed: int) -> None:
    dice = random.Random(seed)
    inside = most = 0

    async def answer(call: Call) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)
        finally:
            inside -= 1
        return UpstreamUnavailable("503") if dice.random() < 0.2 else "yes"

    limited = Limited(FunctionUpstream(answer, name="up"), slots=3)
    tasks: list[asyncio.Future[Reply]] = []
    for _ in range(300):
        tasks.append(asyncio.ensure_future(limited.send(chat(), terms(run_id=str(dice.randrange(4))))))
        if dice.random() < 0.5:
            dice.choice(tasks).cancel()
        if dice.random() < 0.3:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (inside, most) == (0, 3)
    gate = Gate()
    limited._inner = FunctionUpstream(gate, name="up")  # pyright: ignore[reportPrivateUsage]  # all slots are free again
    waiting = [asyncio.ensure_future(limited.send(chat(), ON)) for _ in range(5)]
    await settle()
    assert gate.inside == 3
    gate.open.set()
    await asyncio.gather(*waiting)


# Timed


def timed(upstream: Any, first_byte: float, total: float) -> Timed:
    return Timed(upstream, name="slow", first_byte=first_byte, total=total)


async def test_an_answer_that_takes_too_long_is_a_timeout_that_says_how_long() -> None:
    gate = Gate()
    with pytest.raises(UpstreamTimeout, match=r'upstream "slow" has not finished to answer within 0\.02 s'):
        await timed(FunctionUpstream(gate, name="up"), 0.01, 0.02).send(chat(), ON)
    assert (gate.inside, gate.cancelled) == (0, 1)


async def test_a_stream_that_does_not_begin_is_a_timeout_long_before_the_whole_would_be() -> None:
    deltas: list[Delta] = []
    with pytest.raises(UpstreamTimeout, match=r'upstream "slow" has not begun to answer within 0\.02 s'):
        await timed(FunctionUpstream(Gate(), name="up"), 0.02, 60).send(chat(), terms(emit=collecting(deltas)))
    assert deltas == []


class Begins(FunctionUpstream):
    """Begins its answer at once, and takes `seconds` for the rest."""

    def __init__(self, seconds: float) -> None:
        super().__init__(lambda call: "", name="up")
        self.seconds = seconds

    async def send(self, call: Call, terms: Terms) -> Reply:
        assert terms.emit is not None
        await terms.emit(Delta(text="a"))
        await asyncio.sleep(self.seconds)
        await terms.emit(Delta(text="b"))
        return Reply(text="ab")


async def test_a_stream_that_has_begun_may_take_its_time() -> None:
    deltas: list[Delta] = []
    reply = await timed(Begins(0.3), 0.2, 60).send(chat(), terms(emit=collecting(deltas)))
    assert seen_of(deltas) == reply.text == "ab"


async def test_a_stream_that_has_begun_may_not_take_for_ever() -> None:
    deltas: list[Delta] = []
    with pytest.raises(UpstreamTimeout, match=r"has not finished to answer within 0\.2 s"):
        await timed(Begins(60), 0.1, 0.2).send(chat(), terms(emit=collecting(deltas)))
    assert seen_of(deltas) == "a"


async def test_a_timeout_of_the_providers_own_stays_what_it_is() -> None:
    with pytest.raises(TimeoutError, match="its own"):
        await timed(FunctionUpstream(lambda call: TimeoutError("its own"), name="up"), 60, 60).send(chat(), ON)


async def test_time_in_the_queue_is_not_the_upstreams() -> None:
    async def answer(call: Call) -> str:
        await asyncio.sleep(0.1)
        return "yes"

    limited = Limited(timed(FunctionUpstream(answer, name="up"), 1, 1), slots=1)
    replies = await asyncio.gather(*(limited.send(chat(), ON) for _ in range(12)))
    assert len(replies) == 12


async def test_a_score_passes_through_every_layer_as_it_is() -> None:
    up = FunctionUpstream(lambda call: (-3.0, 2), name="up")
    layers = Cached(Routed([metered(Retried(Limited(timed(up, 5, 5), slots=1)))]), MemoryCache())
    call = Score(identity=layers.identity, context="a", continuation=" b c")
    assert (await layers.send(call, ON)).likelihood.total == -3.0
    hit = await layers.send(call, ON)
    assert hit.source == "hit"
    assert hit.logprobs == (TokenLogprob(" b", -1.5), TokenLogprob(" c", -1.5))
