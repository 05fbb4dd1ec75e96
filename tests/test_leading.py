"""Calls that begin alike: one goes ahead, and the others find their beginning in the upstream's own prompt cache."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asmodel import Run, gather, program, score, step, tracing
from asmodel.calls import (
    Call,
    Capabilities,
    Chat,
    Completion,
    Delta,
    Embed,
    Message,
    Reply,
    Score,
    Terms,
    Usage,
)
from asmodel.errors import UpstreamUnavailable
from asmodel.leading import BLOCK, BLOCKS, Led, beginnings
from asmodel.testing import FunctionUpstream, ScriptedServer, run_program
from asmodel.upstreams import Cached, Limited, Metered, Retried
from asmodel_plugins.memory_cache import MemoryCache
from asmodel_plugins.openai_upstream import OpenAIUpstream

DOCUMENT = "".join(f"{n}: it is written in the document. " for n in range(1200))
SHARED = Terms(program="p", step="s", shared_prefix=True)


def about(question: object, document: str = DOCUMENT, **fields: Any) -> Chat:
    return Chat(identity="up", messages=(Message("user", f"{document}\n\n{question}"),), **fields)


def collecting(deltas: list[Delta]) -> Callable[[Delta], Awaitable[None]]:
    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    return emit


async def settle() -> None:
    """Let everything that can run now have run."""
    for _ in range(20):
        await asyncio.sleep(0)


class Slow:
    """An upstream whose calls begin to answer, and end, when the test says so."""

    name = "slow"
    identity = "up"

    def __init__(self, *, streams: bool = True) -> None:
        self.calls: list[Chat] = []
        self.terms: list[Terms] = []
        self.begin = asyncio.Event()
        self.end = asyncio.Event()
        self.error: Exception | None = None
        self._streams = streams

    async def capabilities(self) -> Capabilities:
        return Capabilities(stream=self._streams, completion=True, loglikelihood=True)

    async def send(self, call: Call, terms: Terms) -> Reply:
        assert isinstance(call, Chat)
        self.calls.append(call)
        self.terms.append(terms)
        await self.begin.wait()
        if self.error is not None:
            raise self.error
        if terms.emit is not None:
            await terms.emit(Delta(text="ye"))
        await self.end.wait()
        if terms.emit is not None:
            await terms.emit(Delta(text="s"))
        return Reply(text="yes")


def fan(led: Any, count: int = 16, terms: Terms = SHARED, **about_: Any) -> list[asyncio.Future[Reply]]:
    return [asyncio.ensure_future(led.send(about(n, **about_), terms)) for n in range(count)]


async def end(slow: Slow, *work: asyncio.Future[Reply]) -> list[Reply]:
    slow.begin.set()
    slow.end.set()
    return await asyncio.gather(*work)


# Who waits


async def test_one_goes_ahead_and_the_others_follow_when_it_has_begun_to_be_answered() -> None:
    slow = Slow()
    led = Led(slow)
    calls = fan(led)
    await settle()
    assert [call.messages[0].text[-2:] for call in slow.calls] == ["\n0"], "the first, alone"
    slow.begin.set()
    await settle()
    assert len(slow.calls) == 16, "at its first word, long before its end"
    assert [reply.text for reply in await end(slow, *calls)] == ["yes"] * 16


async def test_only_who_goes_ahead_is_streamed_though_nobody_wants_the_stream() -> None:
    slow = Slow()
    calls = fan(Led(slow), 4)
    await settle()
    await end(slow, *calls)
    assert [terms.emit is not None for terms in slow.terms] == [True, False, False, False]


async def test_where_the_upstream_does_not_stream_the_whole_reply_is_the_sign() -> None:
    slow = Slow(streams=False)
    calls = fan(Led(slow), 4)
    slow.begin.set()
    await settle()
    assert len(slow.calls) == 1
    await end(slow, *calls)
    assert len(slow.calls) == 4
    assert all(terms.emit is None for terms in slow.terms)


async def test_a_stream_that_is_wanted_comes_whole_whether_it_goes_ahead_or_not() -> None:
    slow = Slow()
    led = Led(slow)
    streams: list[list[Delta]] = [[], []]
    calls = [
        asyncio.ensure_future(led.send(about(n), replace(SHARED, emit=collecting(stream))))
        for n, stream in enumerate(streams)
    ]
    await settle()
    assert len(slow.calls) == 1
    await end(slow, *calls)
    assert ["".join(delta.text for delta in stream) for stream in streams] == ["yes", "yes"]


async def test_a_following_fan_does_not_wait_until_the_upstream_has_forgotten() -> None:
    slow = Slow()
    led = Led(slow, kept=0.1)
    await end(slow, *fan(led, 2))
    slow.begin.clear()
    following = fan(led, 8)
    await settle()
    assert len(slow.calls) == 2 + 8
    await end(slow, *following)
    await asyncio.sleep(0.12)
    slow.begin.clear()
    late = fan(led, 8)
    await settle()
    assert len(slow.calls) == 2 + 8 + 1
    await end(slow, *late)


async def test_every_use_keeps_a_beginning_known() -> None:
    slow = Slow()
    led = Led(slow, kept=0.2)
    slow.begin.set()
    slow.end.set()
    for _ in range(8):
        await led.send(about(1), SHARED)
        await asyncio.sleep(0.05)
    slow.begin.clear()
    calls = fan(led, 3)
    await settle()
    assert len(slow.calls) == 8 + 3
    await end(slow, *calls)


async def test_other_documents_other_tools_and_other_callers_do_not_wait_for_one_another() -> None:
    slow = Slow()
    led = Led(slow)
    other = DOCUMENT[::-1]
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
    ways: list[tuple[Chat, Terms]] = [
        (about(1), SHARED),
        (about(1, other), SHARED),
        (about(1, tools=(tool,)), SHARED),
        (about(1, schema={"type": "object"}), SHARED),
        (about(1), replace(SHARED, scope="somebody else")),
        (about(1), replace(SHARED, shared_prefix=False)),
        (about(1, "short"), SHARED),
        (about(2, "short"), SHARED),
    ]
    calls = [asyncio.ensure_future(led.send(*way)) for way in ways]
    await settle()
    assert len(slow.calls) == len(ways)
    await end(slow, *calls)


async def test_other_sampling_is_the_same_beginning() -> None:
    slow = Slow()
    led = Led(slow)
    calls = [
        asyncio.ensure_future(led.send(about(1, params={"temperature": n / 10}, draw=str(n)), SHARED)) for n in range(5)
    ]
    await settle()
    assert len(slow.calls) == 1
    await end(slow, *calls)


async def test_of_two_documents_after_one_long_instruction_each_is_paid_for_once() -> None:
    slow = Slow()
    led = Led(slow)
    said = Message("system", "Be brief. " * 600)

    def under(document: str, question: int) -> Chat:
        return Chat(identity="up", messages=(said, *about(question, document).messages))

    calls = [
        asyncio.ensure_future(led.send(under(document, n), SHARED))
        for document in (DOCUMENT, DOCUMENT[::-1])
        for n in range(8)
    ]
    await settle()
    assert len(slow.calls) == 1, "the instruction"
    slow.begin.set()
    await settle()
    # The first has brought the instruction and its document; then one brings the other.
    assert len(slow.calls) == 16
    streamed = [call.messages[1].text[:9] for call, terms in zip(slow.calls, slow.terms, strict=True) if terms.emit]
    assert streamed == [DOCUMENT[:9], DOCUMENT[::-1][:9]]
    await end(slow, *calls)


# What goes wrong


async def test_if_who_went_ahead_fails_the_others_go_together_and_nothing_is_remembered() -> None:
    slow = Slow()
    led = Led(slow)
    calls = fan(led, 5)
    await settle()
    slow.error = UpstreamUnavailable("503")
    slow.begin.set()
    with pytest.raises(UpstreamUnavailable):
        await calls[0]
    slow.begin.clear()
    await settle()
    assert len(slow.calls) == 5
    slow.error = None
    more = fan(led, 3)
    await settle()
    assert len(slow.calls) == 6, "the next fan has one ahead again"
    await end(slow, *calls[1:], *more)


async def test_if_who_went_ahead_leaves_the_next_goes_ahead() -> None:
    slow = Slow()
    calls = fan(Led(slow), 5)
    await settle()
    for left in range(3):
        calls[left].cancel()
        await settle()
        assert len(slow.calls) == left + 2
    assert [reply.text for reply in await end(slow, *calls[3:])] == ["yes", "yes"]


async def test_who_waits_may_leave_and_nobody_notices() -> None:
    slow = Slow()
    calls = fan(Led(slow), 5)
    await settle()
    for left in (1, 3):
        calls[left].cancel()
    await settle()
    await end(slow, *(calls[n] for n in (0, 2, 4)))
    assert (len(slow.calls), calls[1].cancelled(), calls[3].cancelled()) == (3, True, True)


async def test_nobody_waits_longer_than_is_patient_and_who_comes_later_does_not_wait_anew() -> None:
    slow = Slow()
    led = Led(slow, patience=0.1)
    began = time.monotonic()
    calls = fan(led, 4)
    await asyncio.sleep(0.06)
    calls += fan(led, 1)
    while len(slow.calls) < 5:
        await asyncio.sleep(0.005)
        assert time.monotonic() - began < 5
    assert time.monotonic() - began > 0.09
    calls += fan(led, 2)
    await settle()
    assert len(slow.calls) == 7
    await end(slow, *calls)


async def test_a_call_that_went_ahead_and_broke_off_is_made_again_for_its_stream_was_nobodys() -> None:
    broken = True

    async def answer(call: Call, terms: Terms) -> str:
        nonlocal broken
        if broken:
            broken = False
            assert terms.emit is not None
            await terms.emit(Delta(text="ye"))
            raise UpstreamUnavailable("cut")
        return "yes"

    upstream = FunctionUpstream(answer, name="up")
    assert (await Retried(Led(upstream), pause=0.001).send(about(1), SHARED)).text == "yes"
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("seed", range(20))
async def test_nothing_hangs_and_nothing_is_left_whoever_leaves_and_whenever(seed: int) -> None:
    dice = random.Random(seed)

    async def answer(call: Call, terms: Terms) -> Any:
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        if terms.emit is not None and dice.random() < 0.5:
            await terms.emit(Delta(text="ye"))
            await asyncio.sleep(0)
        return UpstreamUnavailable("503") if dice.random() < 0.2 else "yes"

    led = Led(FunctionUpstream(answer, name="up"), kept=0.001)
    documents = [DOCUMENT, DOCUMENT[:9000] + DOCUMENT[::-1], DOCUMENT[::-1]]
    calls: list[asyncio.Future[Reply]] = []
    for n in range(200):
        calls.append(asyncio.ensure_future(led.send(about(n, dice.choice(documents)), SHARED)))
        if dice.random() < 0.4:
            dice.choice(calls).cancel()
        if dice.random() < 0.3:
            await asyncio.sleep(0.002 if dice.random() < 0.05 else 0)
    async with asyncio.timeout(5):
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(one) for one in ends} <= {Reply, UpstreamUnavailable, asyncio.CancelledError}
    assert not led._ahead  # pyright: ignore[reportPrivateUsage]  # that nothing is left is what the test is about


async def test_what_is_remembered_has_a_bound() -> None:
    led = Led(FunctionUpstream(lambda call: "yes", name="up"), most=100)
    for n in range(300):
        await led.send(about(1, f"{n} " * 2 * BLOCK), SHARED)
    known = led._known  # pyright: ignore[reportPrivateUsage]
    assert len(known) <= 100


# Where it stands in the onion


async def test_who_waits_holds_no_slot() -> None:
    slow = Slow()
    led = Led(Limited(slow, slots=2))
    calls = fan(led, 8)
    await settle()
    assert len(slow.calls) == 1
    other = asyncio.ensure_future(led.send(about(1, "something short"), Terms()))
    await settle()
    assert len(slow.calls) == 2
    await end(slow, other, *calls)


async def test_an_answer_that_is_stored_waits_for_nobody() -> None:
    slow = Slow()
    led = Led(slow, kept=0.0)
    cached = Cached(led, MemoryCache())
    await end(slow, asyncio.ensure_future(cached.send(about("stored"), SHARED)))
    slow.begin.clear()
    ahead = fan(cached, 3)
    await settle()
    assert len(slow.calls) == 2
    assert (await asyncio.wait_for(cached.send(about("stored"), SHARED), 1)).source == "hit"
    await end(slow, *ahead)


async def test_a_wait_ends_with_the_runs_time() -> None:
    slow = Slow()
    cached = Cached(Led(slow), MemoryCache())
    ahead = asyncio.ensure_future(cached.send(about(0), SHARED))
    await settle()
    hasty = replace(SHARED, deadline=asyncio.get_running_loop().time() + 0.02)
    with pytest.raises(Exception, match="the run's time was used up"):
        await cached.send(about(1), hasty)
    await end(slow, ahead)
    assert len(slow.calls) == 1


async def test_the_wait_is_in_the_trace() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider)
    try:
        slow = Slow()
        calls = fan(Metered(Led(slow), name="up", provider="test", model="m"), 2)
        await asyncio.sleep(0.05)
        await end(slow, *calls)
    finally:
        tracing.remove(provider)
        provider.shutdown()
    waits = [(span.attributes or {}).get("asmodel.upstream.prefix.wait_s") for span in exporter.get_finished_spans()]
    assert len(waits) == 2
    (wait,) = [wait for wait in waits if wait is not None]
    assert isinstance(wait, float)
    assert 0.04 < wait < 5


# Beginnings


def test_what_begins_alike_has_the_same_first_marks() -> None:
    one, other = beginnings(about(1)), beginnings(about(2))
    assert len(one) == len(DOCUMENT) // BLOCK or len(one) == len(DOCUMENT) // BLOCK + 1
    same = [a == b for a, b in zip(one, other, strict=True)]
    assert same == sorted(same, reverse=True)
    assert sum(same) >= len(DOCUMENT) // BLOCK


def test_how_a_text_is_cut_into_messages_and_parts_does_not_matter_before_the_cut() -> None:
    parts = [{"type": "text", "text": DOCUMENT}, {"type": "text", "text": "and?"}]
    more = [*parts, {"type": "text", "text": "or?"}]
    one = Chat(identity="up", messages=(Message("user", parts),))
    other = Chat(identity="up", messages=(Message("user", more), Message("assistant", "no")))
    marks = beginnings(one)
    assert marks
    assert marks[:-1] == beginnings(other)[: len(marks) - 1]


def test_raw_text_and_scores_have_beginnings_and_short_texts_and_embeddings_none() -> None:
    assert beginnings(Completion(identity="up", prompt=DOCUMENT))
    scores = [beginnings(Score(identity="up", context=DOCUMENT, continuation=text)) for text in ("yes", "no")]
    assert scores[0]
    assert scores[0] == scores[1]
    assert not beginnings(about(1, "short"))
    assert not beginnings(Embed(identity="up", texts=(DOCUMENT,)))


def test_a_very_long_text_is_looked_at_only_so_far() -> None:
    assert len(beginnings(about(1, "x" * (BLOCKS + 9) * BLOCK))) == BLOCKS


def test_half_a_surrogate_pair_is_no_matter() -> None:
    assert beginnings(Completion(identity="up", prompt="\ud800" + DOCUMENT))


# Over HTTP, from a program


class PrefixCache:
    """The script of a server that caches beginnings as providers do: from 4,096 characters on, in steps of 512, and
    only once a call with that beginning has begun to be answered. Four characters are a token.
    """

    def __init__(self, reading: float, writing: float) -> None:
        self._reading = reading
        self._writing = writing
        self._kept: set[str] = set()

    async def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        text = "\n".join(f"{m['role']}: {m['content']}" for m in body["messages"])
        steps = range(4096, len(text) + 1, 512)
        cached = max((size for size in steps if text[:size] in self._kept), default=0)
        await asyncio.sleep(self._reading * (len(text) - cached) / len(text))
        self._kept.update(text[:size] for size in steps)
        if not body.get("stream"):
            await asyncio.sleep(self._writing)  # What streams begins now; what does not, comes when it is whole.
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "scripted",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": len(text) // 4,
                "completion_tokens": 1,
                "total_tokens": len(text) // 4 + 1,
                "prompt_tokens_details": {"cached_tokens": cached // 4},
            },
        }


@step(returns=Reply)
def plain(document: str, question: int) -> str:
    return f"{document}\n\nQuestion {question}?"


led = plain.using(shared_prefix=True)


@score(shared_prefix=True)
def likely(document: str, answer: str) -> tuple[str, str]:
    return document, answer


@pytest.mark.parametrize("shared", [False, True], ids=["as it comes", "shared_prefix"])
async def test_a_fan_of_16_over_a_document_finds_it_in_the_upstreams_cache(shared: bool) -> None:
    used: list[Usage] = []

    @program("fan")
    async def fanning(run: Run[None]) -> str:
        replies = await gather(run(led if shared else plain, run.question, n) for n in range(16))
        used.extend(reply.usage for reply in replies)
        return "done"

    began = time.monotonic()
    with ScriptedServer(PrefixCache(reading=0.2, writing=0.2)) as server:
        upstream = OpenAIUpstream(name="default", base_url=server.base_url, model="scripted")
        await upstream.open()
        try:
            await run_program(fanning, DOCUMENT, upstream=upstream)
        finally:
            await upstream.close()
    wall = time.monotonic() - began
    asked, cached = (sum(usage.prompt_tokens for usage in used), sum(usage.cached_tokens for usage in used))
    print(f"shared_prefix={shared}: {cached} of {asked} prompt tokens cached, {wall:.2f} s")
    if shared:
        assert cached > 15 / 16 * 0.97 * asked
    else:
        assert cached == 0


async def test_a_step_and_a_score_say_so_in_their_terms_and_others_do_not() -> None:
    upstream = FunctionUpstream(lambda call: -1.0 if call.kind == "score" else "yes", name="up")

    @program("terms")
    async def asking(run: Run[None]) -> str:
        await run(plain, "d", 1)
        await run(led, "d", 1)
        await run(plain.using(shared_prefix=True), "d", 2)
        await run(likely, "d", "a")
        return "done"

    await run_program(asking, "?", upstream=upstream)
    assert [terms.shared_prefix for terms in upstream.terms] == [False, True, True, True]
