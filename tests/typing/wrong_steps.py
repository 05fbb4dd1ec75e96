"""What a checker says of a step that is used wrongly."""

from __future__ import annotations

from pydantic import BaseModel

from asmodel import Run, score, step


class Verdict(BaseModel):
    holds: bool


@step
def bare(question: str) -> str:
    return question


@step(returns=Verdict)
def verdict(question: str, *, n: int = 1) -> str:
    return question


@score
def likelihood(context: str) -> tuple[str, str]:
    return context, ""


async def arguments(run: Run) -> None:
    await run(bare)  # error: an argument is missing
    await run(bare, 3)  # error
    await run(bare, "q", "r")  # error
    await run(verdict, "q", n="2")  # error
    await run(verdict, "q", m=2)  # error
    await run(likelihood, "a", "b")  # error


async def results(run: Run) -> None:
    text: str = await run(verdict, "q")  # error
    number: int = await run(bare, "q")  # error
    (await run(verdict, "q")).hold  # error: it is called holds
    await run(likelihood, "a") + 1  # error
    print(text, number)


async def replies(run: Run) -> None:
    await run.reply(verdict, "q")  # error: the reply is the text itself
    await run.reply(bare, 3)  # error
    await run.draft(bare, 3)  # error
    await run.reply(await run.draft(bare, "q"), "q")  # error: it has been asked already


def options() -> None:
    bare.using(temprature=0.5)  # error
    bare.using(temperature="hot")  # error
    step(stop=3)  # error
    step(tempo=1)  # error


@step  # error: a number is nothing that a model can be shown
def shows_a_number(question: str) -> int:
    return 3


@score  # error: two texts
def scores_one_text(context: str) -> str:
    return context
