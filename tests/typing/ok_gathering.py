"""What is gathered keeps its types: a list of one, or a pair of two."""

from __future__ import annotations

import asyncio
from typing import assert_type

from asmodel import LogLikelihood, Run, gather, score, step


@step
def ask(question: str) -> str:
    return question


@score
def fits(text: str) -> tuple[str, str]:
    return text, text


async def many(run: Run) -> None:
    assert_type(await gather(run(ask, q) for q in "abc"), list[str])
    assert_type(await gather([run(fits, q) for q in "abc"]), list[LogLikelihood])
    assert_type(await gather((run(ask, q) for q in "abc"), errors="keep"), list[str | Exception])
    assert_type(await gather(gather(run(ask, q) for q in p) for p in ["ab"]), list[list[str]])


async def some(run: Run) -> None:
    assert_type(await gather(run(ask, "q"), run(fits, "q")), tuple[str, LogLikelihood])
    assert_type(await gather(run(ask, "q"), run(fits, "q"), asyncio.sleep(0, 1)), tuple[str, LogLikelihood, int])


async def beside(run: Run) -> None:
    task = run.start(run(fits, "q"))
    assert_type(task, asyncio.Task[LogLikelihood])
    assert_type(await task, LogLikelihood)
    assert_type(await run.start(gather(run(ask, q) for q in "ab")), list[str])
