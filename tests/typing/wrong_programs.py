"""What a checker says of a program that is written or used wrongly."""

from __future__ import annotations

from pydantic import BaseModel

from asmodel import Answer, Run, program


class Params(BaseModel):
    keep: int = 1


class Other(BaseModel):
    word: str = ""


@program("text")
async def text(run: Run) -> str:
    run.params.keep  # error: it has no params
    return ""


@program("with-params", params=Params)
async def with_params(run: Run[Params]) -> Answer:
    run.params.keeps  # error
    word: str = run.params.keep  # error
    return Answer(text=word)


@program("other-params", params=Other)  # error: they are Params
async def other_params(run: Run[Params]) -> str:
    return ""


@program("no-params")  # error: none are given
async def no_params(run: Run[Params]) -> str:
    return ""


@program("number")  # error: a program returns text or an Answer
async def number(run: Run) -> int:
    return 3


@program("sync")  # error: a program is async
def sync(run: Run) -> str:
    return ""


@program("supports", supports=["video"])  # error
async def supports(run: Run) -> str:
    return ""


async def nested(run: Run) -> None:
    await run(text)  # error: the messages are missing
    await run(text, 3)  # error
    answer: str = await run(with_params, "q")  # error
    await run(with_params.using(parms={}), "q")  # error
    run.note(tally="three")  # error
    run.best(3)  # error
    print(answer)
