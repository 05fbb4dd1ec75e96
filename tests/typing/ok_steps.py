"""What a step gives is what its `returns=` says, and its arguments are those of its function."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import assert_type

from pydantic import BaseModel

from asmodel import LogLikelihood, Message, Prompt, Reply, Run, Step, score, step


class Verdict(BaseModel):
    holds: bool


class Colour(Enum):
    RED = "red"


def words(text: str) -> list[str]:
    return text.split()


@step
def bare(question: str) -> str:
    return question


@step(model="writer", stop="\n", max_tokens=64)
def thought(question: str, *, loud: bool = False) -> Prompt:
    return Prompt(question)


@step(returns=Verdict)
def verdict(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


@step(returns=list[int])
def numbers() -> str:
    return "?"


@step(returns=bool)
def yes() -> str:
    return "?"


@step(returns=Colour)
def colour() -> list[Message]:
    return []


@step(returns=words)
def split(question: str) -> str:
    return question


@step(returns=Reply, logprobs=5)
def whole() -> str:
    return "?"


@score(model="scorer")
def likelihood(context: str, text: str) -> tuple[str, str]:
    return context, text


@score
def plain_likelihood(context: str) -> tuple[str, str]:
    return context, ""


async def values(run: Run) -> None:
    assert_type(await run(bare, "q"), str)
    assert_type(await run(thought, "q", loud=True), str)
    assert_type(await run(verdict, [Message("user", "q")]), Verdict)
    assert_type(await run(numbers), list[int])
    assert_type(await run(yes), bool)
    assert_type(await run(colour), Colour)
    assert_type(await run(split, question="q"), list[str])
    assert_type(await run(whole), Reply)
    assert_type(await run(likelihood, "a", "b"), LogLikelihood)
    assert_type(await run(plain_likelihood, "a"), LogLikelihood)
    assert_type((await run(likelihood, "a", "b")).mean, float)


async def options(run: Run) -> None:
    assert_type(await run(verdict.using(sample=3, temperature=0.7), []), Verdict)
    assert_type(await run(thought.using(model="judge", asks=1, cache=False), "q"), str)
    assert_type(await run(likelihood.using(cache=False), "a", "b"), LogLikelihood)


async def reply(run: Run) -> str:
    assert_type(await run.reply(bare, "q"), str)
    assert_type(await run.reply(thought.using(temperature=0), "q"), str)
    assert_type(await run.draft(bare, "q"), Reply)
    assert_type(await run.draft(split, question="q"), Reply)
    assert_type(await run.reply(await run.draft(bare, "q")), str)
    return ""


def shown() -> None:
    assert_type(bare("q"), str)
    assert_type(thought("q"), Prompt)
    assert_type(verdict([]), Sequence[Message])
    assert_type(likelihood("a", "b"), tuple[str, str])


async def size(run: Run) -> None:
    assert_type((await run.size(thought, "q", loud=True)).fits, bool)


def any_text_step(made: Step[[str], str, str]) -> None:
    assert_type(made.name, str)


any_text_step(bare)
