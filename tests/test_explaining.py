"""Why a step was bought: of edited programs, other callers, other models; and what a store holds and has saved."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from asmodel import Message, Run, gather, program, step, tracing
from asmodel.calls import CachePolicy, Call, Chat
from asmodel.errors import ConfigurationError, UpstreamRejected
from asmodel.explaining import Explained, explain
from asmodel.programs import Program
from asmodel.protocols import Cache
from asmodel.stock import clear, seconds, take
from asmodel.tags import Tag, read, tag
from asmodel.testing import FunctionUpstream, run_program
from asmodel.trace_reader import spans
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.memory_cache import MemoryCache

Body = Callable[[Run], Awaitable[str]]


def made(body: Body, name: str = "made") -> Program[None, Any]:
    async def function(run: Run) -> str:
        return await body(run)

    return program(name)(function)


@step
def ask(text: str) -> str:
    return text


@step(temperature=0)
def cold(text: str) -> str:
    return text


def upstream(name: str = "up") -> FunctionUpstream:
    return FunctionUpstream(lambda call: "yes", name=name)


class Explainer:
    """Runs programs over one store and one file of traces, and explains the last one."""

    def __init__(self, folder: Path, store: Cache) -> None:
        self.traces = folder / "traces.sqlite"
        self.store = store

    async def __call__(self, body: Body, *, up: FunctionUpstream | None = None, **more: Any) -> list[Explained]:
        traces = tracing.configure(local=self.traces)
        try:
            await run_program(made(body), "q", upstream=up or upstream(), cache=self.store, **more)
        finally:
            traces.shutdown()
        return await explain(spans(self.traces, "last"), self.store)


@pytest.fixture
async def explainer(tmp_path: Path) -> Any:
    store = DiskCache(tmp_path / "cache")
    await store.open()
    yield Explainer(tmp_path, store)
    await store.close()


async def test_a_first_run_is_bought_because_nothing_was_there(explainer: Explainer) -> None:
    async def body(run: Run) -> str:
        await run(ask, "a")
        return await run.reply(ask, "b")

    first = await explainer(body)
    assert [(e.program, e.step, e.outcome, e.differs) for e in first] == [("made", "ask", "miss", ())] * 2
    assert all("nothing of this step was stored when the run began" in e.why for e in first)
    assert [(e.outcome, e.why) for e in await explainer(body)] == [("hit", "found")] * 2


@pytest.mark.parametrize(
    ("before", "after", "differs", "why"),
    [
        (ask, ask.using(temperature=0.5), ("params.temperature",), "params.temperature differs"),
        (
            ask.using(max_tokens=1),
            ask.using(max_tokens=2, stop="x"),
            ("params.max_tokens", "params.stop"),
            "and params",
        ),
        (ask, ask.using(sample=7), ("draw",), "the same call was stored, as another draw"),
    ],
)
async def test_an_option_that_was_edited_is_named(
    explainer: Explainer, before: Any, after: Any, differs: tuple[str, ...], why: str
) -> None:
    await explainer(lambda run: run(before, "a"))
    (explained,) = await explainer(lambda run: run(after, "a"))
    assert (explained.outcome, explained.differs) == ("miss", differs)
    assert why in explained.why
    assert explained.nearest_at is not None
    assert explained.nearest_trace is not None


async def test_a_message_that_was_edited_is_named_by_its_place(explainer: Explainer) -> None:
    @step
    def talk(*texts: str) -> list[Message]:
        return [Message("user", text) for text in texts]

    await explainer(lambda run: run(talk, "a", "b", "c"))
    (explained,) = await explainer(lambda run: run(talk, "a", "x", "c"))
    assert explained.differs == ("messages.1",)
    (explained,) = await explainer(lambda run: run(talk, "a", "b", "c", "d"))
    assert explained.differs == ("messages.3",)


async def test_the_nearest_answer_is_the_one_that_is_told(explainer: Explainer) -> None:
    async def body(run: Run) -> str:
        await gather(run(ask.using(max_tokens=n), f"text {n}") for n in range(1, 6))
        return ""

    await explainer(body)
    (explained,) = await explainer(lambda run: run(ask.using(max_tokens=3), "text 4"))
    assert len(explained.differs) == 1


async def test_another_model_is_named(explainer: Explainer) -> None:
    await explainer(lambda run: run(ask, "a"))
    (explained,) = await explainer(lambda run: run(ask, "a"), up=upstream("other"))
    assert explained.differs == ("identity",)
    assert "the model that answers differs" in explained.why


async def test_what_was_not_asked_of_the_cache_says_so(explainer: Explainer) -> None:
    await explainer(lambda run: run(ask, "a"))
    (explained,) = await explainer(lambda run: run(ask.using(cache=False), "a"))
    assert (explained.outcome, explained.differs) == ("bypass", ())
    (explained,) = await explainer(lambda run: run(ask, "a"), policy=CachePolicy(mode="refresh"))
    assert explained.outcome == "bypass"


async def test_two_equal_steps_at_once_are_bought_and_shared(explainer: Explainer) -> None:
    async def body(run: Run) -> str:
        await gather(run(cold, "a") for _ in range(2))
        return ""

    assert Counter(e.outcome for e in await explainer(body)) == {"miss": 1, "joined": 1}


async def test_a_step_that_failed_says_that_there_was_no_answer(explainer: Explainer) -> None:
    fails = FunctionUpstream(lambda call: UpstreamRejected("no"), name="up")
    with pytest.raises(UpstreamRejected):
        await explainer(lambda run: run(ask, "a"), up=fails)
    (explained,) = await explain(spans(explainer.traces, "last"), explainer.store)
    assert (explained.outcome, explained.why) == ("unfinished", "ended before there was an answer")


async def test_a_step_that_was_asked_again_is_explained_by_what_it_asked_first(explainer: Explainer) -> None:
    @step(returns=int)
    def number(text: str) -> str:
        return text

    answers = iter(["hm", "1", "hm", "2"])
    up = FunctionUpstream(lambda call: next(answers), name="up")
    await explainer(lambda run: _text(run(number, "a")), up=up)
    (explained,) = await explainer(lambda run: _text(run(number, "b")), up=up)
    assert explained.differs == ("messages.0",)


async def _text(value: Awaitable[object]) -> str:
    return str(await value)


async def test_a_store_that_cannot_be_listed_explains_what_it_can(explainer: Explainer) -> None:
    await explainer(lambda run: run(ask, "a"))
    (explained,) = await explain(spans(explainer.traces, "last"), None)
    assert (explained.outcome, explained.differs) == ("miss", ())


async def test_no_trace_and_no_entry_tells_a_prompt(explainer: Explainer) -> None:
    await explainer(lambda run: run(ask, "a very secret prompt"))
    with sqlite3.connect(explainer.traces) as connection:
        data = "".join(row[0] for row in connection.execute("SELECT data FROM spans"))
    connection.close()
    assert "asmodel.cache.parts" in data
    assert "secret" not in data


async def test_a_book_of_20_chapters_with_one_word_changed(explainer: Explainer) -> None:
    """What is bought, counted, and explained."""

    @step
    def summary(chapter: str) -> str:
        return f"Summarise:\n{chapter}"

    @step
    def whole(summaries: list[str]) -> str:
        return "Put together:\n" + "\n".join(summaries)

    def book(chapters: list[str]) -> Body:
        async def body(run: Run) -> str:
            summaries = await gather(run(summary, chapter) for chapter in chapters)
            return await run.reply(whole, summaries)

        return body

    def said(call: Call) -> str:
        assert isinstance(call, Chat)
        return f"<{call.messages[0].text[-40:]}>"

    chapters = [f"Chapter {n}. It was a dark night." for n in range(20)]
    up = FunctionUpstream(said, name="up")
    assert Counter(e.outcome for e in await explainer(book(chapters), up=up)) == {"miss": 21}
    assert len(up.calls) == 21

    chapters[7] = chapters[7].replace("dark", "bright")
    explained = await explainer(book(chapters), up=up)
    assert len(up.calls) == 21 + 2
    assert Counter((e.step, e.outcome) for e in explained) == {
        ("summary", "hit"): 19,
        ("summary", "miss"): 1,
        ("whole", "miss"): 1,
    }
    assert [e.differs for e in explained if e.outcome == "miss"] == [("messages.0",), ("messages.0",)]


# What a store holds


async def test_a_store_is_counted_by_step_with_what_it_has_saved(explainer: Explainer) -> None:
    async def body(run: Run) -> str:
        await run(ask, "a")
        return await run.reply(cold, "b")

    for _ in range(3):
        await explainer(body)
    stock = await take(explainer.store, explainer.traces)
    told = {s.step: (s.program, s.entries, s.hits, s.misses) for s in stock.steps}
    assert told == {"ask": ("made", 1, 2, 1), "cold": ("made", 1, 2, 1)}
    assert stock.entries == 2
    assert stock.bytes > 0
    assert stock.saved_tokens == sum(s.saved_tokens for s in stock.steps) > 0
    assert stock.as_json()["steps"][0]["program"] == "made"
    assert (await take(explainer.store, None)).saved_tokens == 0


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ({}, []),
        ({"program": "a"}, ["b/x"]),
        ({"step": "x"}, ["a/y"]),
        ({"program": "a", "step": "x"}, ["a/y", "b/x"]),
        ({"scope": "team"}, ["a/x", "a/y", "b/x"]),
        ({"scope": ""}, ["a/x#"]),
        ({"older_than": 60.0}, ["a/x", "a/x#", "a/y", "b/x"]),
    ],
)
async def test_a_store_is_cleared_of_what_is_meant(what: dict[str, Any], left: list[str], tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "cache")
    await disk.open()
    for store in (MemoryCache(), disk):
        for n, label in enumerate([tag("a", "x"), tag("a", "y"), tag("b", "x"), tag("a", "x", "team"), "#secret"]):
            await store.set(f"{n}", b"x", tag=label)
        assert await clear(store, **what) == 4 - len(left)
        found = sorted([one async for _, one, _ in store.entries()])
        # A scope is not named in the store.
        assert [label.partition("#")[0] + ("#" if "#" in label else "") for label in found if read(label)] == left
        assert "#secret" in found
    await disk.close()


def test_a_tag_is_read_as_it_was_written() -> None:
    for program_name, step_name, scope in [("p", "s", ""), ("p", "s", "team"), ("", "gpt", ""), ("p", "a/b#c", "x")]:
        told = read(tag(program_name, step_name, scope))
        assert told is not None
        assert (told.program, told.step) == (program_name, step_name)
        assert bool(told.scope) == bool(scope)
        assert str(told) == tag(program_name, step_name, scope)
    assert read("#secret") is None
    assert read("x") is None
    assert read("p/s#1") == Tag("p", "s#1")


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("15m", 900), ("12h", 43200), ("7d", 604800), ("0.5w", 302400)]
)
def test_an_age_is_a_number_and_a_unit(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "7", "d", "7 days", "-1d", "1y"])
def test_an_age_that_is_none_says_what_one_is(text: str) -> None:
    with pytest.raises(ConfigurationError, match="90s, 15m, 12h, 7d or 2w"):
        seconds(text)
