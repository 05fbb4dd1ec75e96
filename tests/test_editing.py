"""Whatever a program looks like: what an edit leaves as it was is not bought again; a resumed run draws the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from asmodel import Message, Run, gather, program, step
from asmodel.app import onion
from asmodel.calls import Call, Chat, key
from asmodel.models import Models
from asmodel.programs import Program
from asmodel.service import Asked, Service
from asmodel.settings import UpstreamSettings
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache


@step
def shows(prompt: str, before: str) -> str:
    return f"{prompt}|{before}"


@step(temperature=0)
def cold(prompt: str, before: str) -> str:
    return f"{prompt}|{before}"


@dataclass(frozen=True)
class Leaf:
    """A step, with a prompt of its own."""

    prompt: str
    sampled: bool


@dataclass(frozen=True)
class Chain:
    """One after the other; each is shown what the one before it said."""

    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Fan:
    """Side by side, and then put together."""

    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Loop:
    """The same again and again, until so many times."""

    part: Any
    times: int


@dataclass(frozen=True)
class Nested:
    """In a program of its own."""

    part: Any


leaves = st.builds(Leaf, st.sampled_from("abcdef"), st.booleans())
shapes = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Chain, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Fan, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Loop, inner, st.integers(1, 3)),
        st.builds(Nested, inner),
    ),
    max_leaves=6,
)


async def walk(run: Run, shape: Any, before: str) -> str:
    match shape:  # pyright: ignore[reportMatchNotExhaustive]  # of any shape
        case Leaf():
            return await run(shows if shape.sampled else cold, shape.prompt, before)
        case Chain():
            for part in shape.parts:
                before = await walk(run, part, before)
            return before
        case Fan():
            return "+".join(await gather(walk(run, part, before) for part in shape.parts))
        case Loop():
            for _ in range(shape.times):
                before = await walk(run, shape.part, before)
            return before
        case Nested():
            inner = made(shape.part, "inner")
            return await run(inner, before)
    raise AssertionError(shape)


def made(shape: Any, name: str = "made") -> Program[None, Any]:
    @program(name)
    async def generated(run: Run) -> str:
        return await walk(run, shape, run.question)

    return generated


def prompts(shape: Any) -> list[tuple[int, ...]]:
    """Where in the shape there are leaves."""
    match shape:
        case Leaf():
            return [()]
        case Chain() | Fan():
            return [(n, *rest) for n, part in enumerate(shape.parts) for rest in prompts(part)]
        case _:
            return [(0, *rest) for rest in prompts(shape.part)]


def edited(shape: Any, place: tuple[int, ...]) -> Any:
    """The shape with the prompt at that place changed."""
    match shape:
        case Leaf():
            return Leaf(shape.prompt + "!", shape.sampled)
        case Chain() | Fan():
            n, *rest = place
            parts = list(shape.parts)
            parts[n] = edited(parts[n], tuple(rest))
            return type(shape)(tuple(parts))
        case Loop():
            return Loop(edited(shape.part, place[1:]), shape.times)
        case _:
            return Nested(edited(shape.part, place[1:]))


class Model(FunctionUpstream):
    """Answers each call by its text and its draw, so that what differs anywhere shows in the answer."""

    def __init__(self) -> None:
        super().__init__(self.say, name="up")

    @staticmethod
    def say(call: Call) -> str:
        assert isinstance(call, Chat)
        return f"{abs(hash((call.messages[0].text, call.draw))) % 10**8}"

    @property
    def keys(self) -> set[str]:
        return {key(call) for call in self.calls}


async def run_once(shape: Any, store: MemoryCache | None) -> tuple[str, Model]:
    up = Model()
    answer = await run_program(made(shape), "q", upstream=up, cache=store)
    return answer.text, up


@given(shapes)
@settings(max_examples=60)
def test_what_was_run_is_not_bought_again_and_gives_the_same(shape: Any) -> None:
    async def check() -> None:
        store = MemoryCache()
        first, up = await run_once(shape, store)
        again, other = await run_once(shape, store)
        assert (again, other.calls) == (first, [])
        # No two purchases of a run are of one key, but where two are equal because nothing is sampled.
        assert len(up.keys) == len(up.calls)

    asyncio.run(check())


@given(shapes, st.data())
@settings(max_examples=100)
def test_an_edit_of_one_prompt_buys_exactly_the_calls_that_it_changed(shape: Any, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(prompts(shape)))

    async def check() -> None:
        store = MemoryCache()
        _, before = await run_once(shape, store)
        answer, bought = await run_once(edited(shape, place), store)
        fresh, whole = await run_once(edited(shape, place), None)
        assert bought.keys == whole.keys - before.keys
        assert len(bought.calls) == len(bought.keys)
        assert answer == fresh

    asyncio.run(check())


@given(shapes, st.integers(0, 30))
@settings(max_examples=60)
def test_a_run_that_is_broken_off_anywhere_goes_on_with_the_same_draws(shape: Any, after: int) -> None:
    async def check() -> None:
        fresh, whole = await run_once(shape, None)
        store = MemoryCache()
        left = after

        def fails(call: Call) -> str | Exception:
            nonlocal left
            left -= 1
            return Model.say(call) if left >= 0 else RuntimeError("killed")

        broken = FunctionUpstream(fails, name="up")
        try:
            await run_program(made(shape), "q", upstream=broken, cache=store)
        except Exception:
            assert after < len(whole.calls)
        answer, rest = await run_once(shape, store)
        assert answer == fresh
        assert len(rest.calls) == max(0, len(whole.keys) - after)

    asyncio.run(check())


def served(up: FunctionUpstream, store: MemoryCache, *programs: Program[Any, Any]) -> Service:
    wrapped = onion({"default": up}, {"default": UpstreamSettings(kind="function")}, store)
    service = Service(Models(programs, wrapped, store=store), store=store)
    service.ready.set()
    return service


@step
def vote(question: str) -> str:
    return question


@program("votes")
async def votes(run: Run) -> str:
    """Two equal calls side by side."""
    return " ".join(await gather(run(vote, run.question) for _ in range(2)))


@program("twice")
async def twice(run: Run) -> str:
    """Two equal programs side by side, and a call equal to theirs."""
    return " ".join(await gather(run(votes, "q"), run(votes, "q"), run(vote, "q")))


async def test_choices_and_nested_programs_have_draws_of_their_own_and_the_same_when_resumed() -> None:
    store, up = MemoryCache(), Model()
    answers: list[list[str]] = []
    for _ in range(2):
        service = served(up, store, twice, votes)
        job = await service.prepare(service.models.find("twice"), Asked(messages=(Message("user", "q"),), n=3))
        outcomes = await gather(service.answer(job, choice) for choice in range(3))
        answers.append([outcome.answer.text for outcome in outcomes])
        # Three choices of 2 + 2 + 1 calls, no two of them one draw; and none is bought by the second attempt.
        assert len(up.calls) == len({getattr(call, "draw", None) for call in up.calls}) == 15
    assert len({word for text in answers[0] for word in text.split()}) == 15
    assert answers[0] == answers[1]


async def test_a_program_that_plays_a_role_keeps_its_draws_when_only_its_file_is_edited() -> None:
    def player(doc: str) -> Program[Any, Any]:
        async def plays(run: Run) -> str:
            return await run.reply(vote, run.question)

        made_of: Program[Any, Any] = program("player", description=doc)(plays)
        made_of.__dict__["digest"] = doc  # As of an edited file.
        return made_of

    store, up = MemoryCache(), Model()
    for doc in ("before", "after"):
        service = served(up, store, votes, player(doc))
        job = await service.prepare(service.models.find("votes:player"), Asked(messages=(Message("user", "q"),)))
        await service.answer(job)
    assert len(up.calls) == 2


async def test_two_scopes_never_share_whatever_they_run() -> None:
    store, up = MemoryCache(), Model()
    service = served(up, store, twice, votes)
    texts: list[str] = []
    for scope in ("one", "two", "one"):
        asked = Asked(messages=(Message("user", "q"),), scope=scope)
        job = await service.prepare(service.models.find("twice"), asked)
        texts.append((await service.answer(job)).answer.text)
    assert Counter(key(call) for call in up.calls) == {key(call): 2 for call in up.calls}
    assert len(up.calls) == 10
