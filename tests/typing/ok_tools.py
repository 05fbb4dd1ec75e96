"""A tool gives what its function returns, awaited where that must be awaited."""

from __future__ import annotations

from typing import assert_type

from asmodel import Message, Reply, Run, ToolCall, step, tool


@tool
def add(a: int, b: int = 0) -> int:
    return a + b


@tool
async def fetch(address: str) -> bytes:
    return b""


@tool(cache=True, version="2")
def look_up(word: str) -> list[str]:
    return [word]


@tool(name="search")
async def find(word: str, *, most: int = 3) -> dict[str, int]:
    return {word: most}




@step(returns=Reply, tools=[add, fetch, look_up, find])
def assistant(question: str) -> str:
    return question


async def use(run: Run) -> None:
    assert_type(await run(add, 1), int)
    assert_type(await run(add, 1, b=2), int)
    assert_type(await run(fetch, "x"), bytes)
    assert_type(await run(look_up, word="x"), list[str])
    assert_type(await run(find, "x", most=1), dict[str, int])
    reply = await run(assistant, "q")
    assert_type(reply.tool_calls, tuple[ToolCall, ...])
    assert_type([await run.call(call) for call in reply.tool_calls], list[Message])
