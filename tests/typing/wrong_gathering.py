"""What a checker says of a gathering that is used wrongly."""

from __future__ import annotations

from asmodel import Run, gather, step


@step
def ask(question: str) -> str:
    return question


async def wrong(run: Run) -> None:
    await gather(["a", "b"])  # error: nothing to await
    await gather(run(ask, 3) for _ in "ab")  # error
    numbers: list[int] = await gather(run(ask, q) for q in "ab")  # error
    kept: list[str] = await gather((run(ask, q) for q in "ab"), errors="keep")  # error
    await gather((run(ask, q) for q in "ab"), errors="ignore")  # error
    a, b, c = await gather(run(ask, "a"), run(ask, "b"))  # error
    run.start(ask)  # error
    print(numbers, kept, a, b)
