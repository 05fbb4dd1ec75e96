"""Programs that go wrong: before they say anything, in the middle of it, and at their second step."""

from __future__ import annotations

from asmodel import Run, program, step


@step(model="writer")
def opening(question: str) -> str:
    return f"Begin: {question}"


@step(model="writer")
def ending(question: str, begun: str) -> str:
    return f"End what begins so: {begun}. {question}"


@program("broken")
async def broken(run: Run) -> str:
    raise RuntimeError("a secret that no client should read")


@program("broken-late")
async def broken_late(run: Run) -> str:
    await run.reply(opening, run.question)
    raise RuntimeError("a secret that no client should read")


@program("two-steps")
async def two_steps(run: Run) -> str:
    begun = await run(opening, run.question)
    return await run.reply(ending, run.question, begun)
