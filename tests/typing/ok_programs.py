"""A program knows its params; what it returns is what another program gets that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_type

from pydantic import BaseModel

from asmodel import Answer, Citation, Document, Limits, Message, Program, Run, program


class Params(BaseModel):
    keep: int = 1


@program("plain-text")
async def text(run: Run) -> str:
    assert_type(run.params, None)
    assert_type(run.messages, tuple[Message, ...])
    assert_type(run.documents, tuple[Document, ...])
    assert_type(run.question, str)
    assert_type(run.left, Limits)
    return ""


@program("with-params", params=Params, supports=["tools"])
async def with_params(run: Run[Params]) -> Answer:
    assert_type(run.params, Params)
    assert_type(run.params.keep, int)
    return Answer(text="", citations=[Citation(id="1")], data={"n": [1, None]})


@program("either", params=Params, description="One or the other.")
async def either(run: Run[Params]) -> str | Answer:
    return ""


async def helper(run: Run[Params], keep: int) -> list[int]:
    return [run.params.keep, keep]


assert_type(text, Program[None, str])
assert_type(with_params, Program[Params, Answer])


async def nested(run: Run, messages: Sequence[Message]) -> None:
    assert_type(await run(text, "question"), str)
    assert_type(await run(text, messages), str)
    assert_type(await run(with_params, messages), Answer)
    assert_type(await run(with_params.using(params=Params(keep=2)), messages), Answer)
    assert_type(await run(with_params.using(params={"keep": 2}, roles={"writer": "fast"}), run.messages), Answer)
    assert_type(await run(either, "question"), str | Answer)
    assert_type(await run.reply(text, messages), str)


async def best(run: Run) -> None:
    run.best("so far")
    run.best(Answer(text="so far"))
    run.note(tally=[3, 2], share=0.5)
    with run.part("votes", of=3):
        pass
