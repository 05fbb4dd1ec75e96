"""What a checker says of a tool that is used wrongly."""

from __future__ import annotations

from asmodel import Run, step, tool


@tool
def add(a: int, b: int = 0) -> int:
    return a + b


@tool
async def fetch(address: str) -> bytes:
    return b""


@tool(cached=True)  # error
def keeps(word: str) -> str:
    return word


def no_tool() -> None: ...


async def use(run: Run) -> None:
    await run(add, "1")  # error
    await run(add)  # error
    text: str = await run(add, 1)  # error
    await (await run(fetch, "x"))  # error: it has been awaited
    await run(fetch, 3)  # error
    step(tools=[no_tool])  # error: a function is no tool
    await run.call("add")  # error
    await run(no_tool)  # error
    print(text)
