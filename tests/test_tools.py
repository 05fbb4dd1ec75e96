"""A tool is the program's own code: typed, traced, kept where that is asked for, and called on the model's word."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from asmodel import Message, ProgramError, Reply, Run, Tool, ToolCall, program, step, tool
from asmodel.calls import CachePolicy, Chat
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache


class Place(BaseModel):
    city: str
    country: str = "?"


@tool
def weather(
    place: Place, day: date, unit: Annotated[Literal["C", "F"], Field(description="Of temperature.")] = "C"
) -> str:
    """What the weather will be.

    The model does not read this paragraph.
    """
    return f"{place.city} {day:%d %b}: 20 {unit}"


@tool(name="add")
def plus(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


def parameters(tool: Tool[..., Any]) -> dict[str, Any]:
    function = tool.wire()["function"]
    schema: dict[str, Any] = function["parameters"]
    return schema


def test_a_model_reads_a_tools_name_first_paragraph_and_arguments() -> None:
    function = weather.wire()["function"]
    assert (function["name"], function["description"]) == ("weather", "What the weather will be.")
    properties = function["parameters"]["properties"]
    assert properties["day"]["format"] == "date"
    assert properties["unit"]["enum"] == ["C", "F"]
    assert properties["unit"]["description"] == "Of temperature."


def test_a_tool_is_strict_only_where_every_argument_must_be_given() -> None:
    assert plus.wire()["function"]["strict"] is True
    assert parameters(plus)["required"] == ["a", "b"]
    assert "strict" not in weather.wire()["function"]
    assert parameters(weather)["required"] == ["place", "day"]


def test_a_tool_with_an_argument_of_any_shape_is_not_strict() -> None:
    @tool
    def store(values: dict[str, int], note: Any) -> None:
        """Keep values."""

    assert "strict" not in store.wire()["function"]


def test_a_tool_takes_what_it_has_names_for() -> None:
    @tool
    def anything(*values: int) -> int:
        """Take anything."""
        return sum(values)

    with pytest.raises(TypeError, match='tool "anything": argument values must have a name of its own'):
        anything.wire()


def test_calling_a_tool_calls_its_function() -> None:
    assert plus(1, b=2) == 3
    assert vars(weather)["__name__"] == "weather"


def test_a_models_arguments_are_read_as_the_types_that_they_are() -> None:
    read = weather.read('{"place": {"city": "Bern"}, "day": "2024-05-01"}')
    assert read == {"place": Place(city="Bern"), "day": date(2024, 5, 1)}
    assert tool(lambda: 1).read("") == {}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ('{"a": 1}', "b: Field required"),
        ('{"a": 1, "b": "x"}', "b: Input should be a valid integer"),
        ('{"a": 1, "b": 2, "c": 3}', "c: Extra inputs are not permitted"),
        ("{", "not JSON"),
        ("[1, 2]", "arguments: Input should be"),
        ("[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_a_reason(arguments: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plus.read(arguments)


def a_run(body: Callable[[Run], Any], tools: list[Tool[..., Any]] | None = None) -> Any:
    """A program whose whole code is `body`, after a step that may call `tools`."""

    @step(returns=Reply, tools=tools or [])
    def ask() -> str:
        return "?"

    @program("with-tools")
    async def with_tools(run: Run) -> str:
        if tools:
            await run(ask)
        return str(await body(run))

    return with_tools


async def answer(body: Callable[[Run], Any], tools: list[Tool[..., Any]] | None = None, **more: Any) -> str:
    upstream = FunctionUpstream(lambda call: "hm", name="up")
    return (await run_program(a_run(body, tools), "q", upstream=upstream, **more)).text


async def test_a_program_uses_a_tool_by_the_arguments_of_its_function() -> None:
    assert await answer(lambda run: run(plus, 1, b=2)) == "3"


async def test_a_tool_that_waits_is_awaited_and_one_that_does_not_is_run_in_a_thread() -> None:
    @tool
    async def waits(n: int) -> tuple[int, int]:
        await asyncio.sleep(0)
        return n, threading.get_ident()

    @tool
    def blocks(n: int) -> tuple[int, int]:
        return n, threading.get_ident()

    async def body(run: Run) -> str:
        waited, blocked = await run(waits, 1), await run(blocks, 2)
        here = threading.get_ident()
        return f"{waited[0]} {waited[1] == here} {blocked[0]} {blocked[1] == here}"

    assert await answer(body) == "1 True 2 False"


async def test_the_models_word_is_enough_to_call_a_tool_of_a_step() -> None:
    async def body(run: Run) -> Message:
        return await run.call(ToolCall(id="7", name="add", arguments='{"a": 1, "b": 2}'))

    assert await answer(body, [plus]) == str(Message("tool", "3", tool_call_id="7"))


async def test_bad_arguments_and_unknown_tools_go_back_to_the_model() -> None:
    async def body(run: Run) -> str:
        wrong = await run.call(ToolCall(id="1", name="add", arguments='{"a": "x", "b": 2}'))
        nobody = await run.call(ToolCall(id="2", name="rm", arguments="{}"))
        assert (wrong.role, wrong.tool_call_id, nobody.tool_call_id) == ("tool", "1", "2")
        return f"{wrong.text}\n{nobody.text}"

    told = await answer(body, [plus])
    assert "Not called: a: Input should be a valid integer" in told
    assert "There is no tool rm; there are: add." in told


async def test_a_tool_of_no_step_of_this_run_is_not_called() -> None:
    told = await answer(lambda run: run.call(ToolCall(id="1", name="add", arguments='{"a": 1, "b": 2}')))
    assert "There is no tool add; there are: none." in told


async def test_two_tools_of_one_name_in_a_run_are_refused() -> None:
    @tool(name="add")
    def other(a: int, b: int) -> int:
        return a - b

    with pytest.raises(ProgramError, match='program "with-tools" has two tools named "add"; rename one'):
        await answer(lambda run: run(plus, 1, 2), [plus, other])


async def test_what_a_tool_raises_ends_the_run_and_is_told_without_its_text() -> None:
    @tool
    def fails(secret: str) -> str:
        raise RuntimeError(f"cannot use {secret}")

    async def body(run: Run) -> str:
        return await run(fails, "hunter2")

    with pytest.raises(ProgramError, match=r'program "with-tools": its code raised RuntimeError') as failed:
        await answer(body)
    assert "hunter2" not in str(failed.value)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("text", "text"),
        (3, "3"),
        (None, "null"),
        ({"a": [1.5, True]}, '{"a":[1.5,true]}'),
        (Place(city="Bern"), '{"city":"Bern","country":"?"}'),
        (date(2024, 1, 1), '"2024-01-01"'),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_model_is_told_a_result_as_text_or_as_json(result: Any, told: str) -> None:
    @tool
    def get() -> Any:
        return result

    async def body(run: Run) -> str:
        return (await run.call(ToolCall(id="1", name="get", arguments="{}"))).text

    assert await answer(body, [get]) == told


async def test_a_result_that_is_no_json_is_refused_by_name() -> None:
    @tool
    def get() -> Any:
        return object()

    with pytest.raises(ProgramError, match='tool "get" returned object, which a model cannot be told'):
        await answer(lambda run: run.call(ToolCall(id="1", name="get", arguments="{}")), [get])


# Kept results


def counted(cache: bool = True, version: str = "") -> tuple[list[Any], Tool[..., Any]]:
    calls: list[Any] = []

    @tool(cache=cache, version=version)
    def look_up(word: str, place: Place | None = None) -> dict[str, Any]:
        """Look a word up."""
        calls.append(word)
        return {"word": word, "n": len(calls)}

    return calls, look_up


async def test_a_kept_result_is_not_worked_out_again() -> None:
    calls, look_up = counted()
    store = MemoryCache()
    for _ in range(3):
        assert await answer(lambda run: run(look_up, "a"), cache=store) == "{'word': 'a', 'n': 1}"
    assert calls == ["a"]


async def test_a_result_is_kept_by_its_arguments_however_they_are_given() -> None:
    calls, look_up = counted()
    store = MemoryCache()

    async def body(run: Run) -> str:
        await run(look_up, "a", Place(city="Bern"))
        await run(look_up, place=Place(city="Bern"), word="a")
        return (
            await run.call(
                ToolCall(id="1", name="look_up", arguments='{"place": {"city": "Bern"}, "word": "a"}'),
            )
        ).text

    assert await answer(body, [look_up], cache=store) == '{"word":"a","n":1}'
    assert calls == ["a"]
    await answer(lambda run: run(look_up, "b"), cache=store)
    await answer(lambda run: run(look_up, "a"), cache=store)
    assert calls == ["a", "b", "a"]


async def test_another_version_or_another_source_is_another_result() -> None:
    store = MemoryCache()
    calls, look_up = counted(version="1")
    await answer(lambda run: run(look_up, "a"), cache=store)
    newer, look_up = counted(version="2")
    await answer(lambda run: run(look_up, "a"), cache=store)
    assert (calls, newer) == (["a"], ["a"])

    @tool(name="look_up", cache=True, version="1")
    def changed(word: str, place: Place | None = None) -> str:
        return "changed"

    assert await answer(lambda run: run(changed, "a"), cache=store) == "changed"


async def test_a_tool_is_not_kept_unless_it_says_so() -> None:
    calls, look_up = counted(cache=False)
    store = MemoryCache()
    await answer(lambda run: run(look_up, "a"), cache=store)
    await answer(lambda run: run(look_up, "a"), cache=store)
    assert calls == ["a", "a"]


async def test_a_run_that_does_without_the_cache_does_without_kept_results() -> None:
    calls, look_up = counted()
    store = MemoryCache()
    await answer(lambda run: run(look_up, "a"), cache=store)
    await answer(lambda run: run(look_up, "a"), cache=store, policy=CachePolicy(mode="off"))
    assert calls == ["a", "a"]
    await answer(lambda run: run(look_up, "a"), cache=store, policy=CachePolicy(mode="refresh"))
    assert await answer(lambda run: run(look_up, "a"), cache=store) == "{'word': 'a', 'n': 3}"


async def test_what_cannot_be_read_in_the_store_is_worked_out_anew() -> None:
    calls, look_up = counted()
    store = MemoryCache()
    await answer(lambda run: run(look_up, "a"), cache=store)
    keys = [key async for key, tag, _ in store.entries() if tag == "with-tools/look_up"]
    await store.set(keys[0], b"\x80\x04N.")
    await answer(lambda run: run(look_up, "a"), cache=store)
    assert calls == ["a", "a"]


@dataclass
class Point:
    x: int


@pytest.mark.parametrize("result", [(1, 2), {1: "a"}, Point(1), Place(city="a"), float("nan"), {1}, date(2024, 1, 1)])
async def test_a_result_that_would_not_come_back_as_it_was_is_not_kept_but_refused(result: Any) -> None:
    @tool(cache=True)
    def get() -> Any:
        return result

    with pytest.raises(ProgramError, match='tool "get" has cache=True, so its result must be JSON'):
        await answer(lambda run: run(get), cache=MemoryCache())


async def test_arguments_that_have_no_json_form_are_refused_where_they_would_be_a_key() -> None:
    @tool(cache=True)
    def get(thing: Any) -> int:
        return 1

    with pytest.raises(ProgramError, match='tool "get" has cache=True, so its arguments must be JSON'):
        await answer(lambda run: run(get, object()), cache=MemoryCache())


# A conversation with tools


@step(returns=Reply, tools=[plus, weather], temperature=0)
def assistant(messages: list[Message]) -> list[Message]:
    return messages


@program("agent")
async def agent(run: Run) -> str:
    messages = list(run.messages)
    while True:
        reply = await run(assistant, messages)
        if not reply.tool_calls:
            return reply.text
        messages += [reply.message, *[await run.call(call) for call in reply.tool_calls]]


async def test_a_program_and_a_model_go_on_until_no_tool_is_asked_for() -> None:
    def model(call: Any) -> Reply | str:
        assert isinstance(call, Chat)
        assert [t["function"]["name"] for t in call.tools] == ["add", "weather"]  # type: ignore[index, call-overload]
        results = [m.text for m in call.messages if m.role == "tool"]
        if not results:
            return Reply(
                finish="tool_calls",
                tool_calls=(
                    ToolCall(id="1", name="add", arguments='{"a": 2, "b": 3}'),
                    ToolCall(id="2", name="add", arguments='{"a": "?"}'),
                ),
            )
        return f"It is {results[0]}; and: {results[1]}"

    upstream = FunctionUpstream(model, name="up")
    store = MemoryCache()
    found = await run_program(agent, "2 + 3?", upstream=upstream, cache=store)
    assert found.text.startswith("It is 5; and: Not called: a: Input should be a valid integer")
    assert len(upstream.calls) == 2
    second = upstream.calls[1]
    assert isinstance(second, Chat)
    assert [m.role for m in second.messages] == ["user", "assistant", "tool", "tool"]
    assert [m.tool_call_id for m in second.messages[2:]] == ["1", "2"]
    assert (await run_program(agent, "2 + 3?", upstream=upstream, cache=store)).text == found.text
    assert len(upstream.calls) == 2
