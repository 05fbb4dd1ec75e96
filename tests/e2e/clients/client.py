"""The official Python SDK under remote control: reads one request a line, does it, writes one line of what it saw.

Runs in an environment of its own, with nothing of ours in it. `python client.py sync|async`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
from pydantic import BaseModel


class Sum(BaseModel):
    what: str
    total: int


SCHEMAS: dict[str, type[BaseModel]] = {"Sum": Sum}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}

look_up = socket.getaddrinfo


def rebound(host: Any, *args: Any, **kwargs: Any) -> Any:
    """As a name server might answer that is up to no good: a foreign name, and the address of this machine."""
    return look_up("127.0.0.1" if host in ("models.example", b"models.example") else host, *args, **kwargs)


socket.getaddrinfo = rebound

IS_ASYNC = sys.argv[1:] == ["async"]
MAKE = openai.AsyncOpenAI if IS_ASYNC else openai.OpenAI


async def settled(value: Any) -> Any:
    """What the client of either kind gave."""
    return await value if inspect.isawaitable(value) else value


async def each(stream: Any) -> AsyncIterator[Any]:
    if IS_ASYNC:
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item


def plain(value: BaseModel) -> dict[str, Any]:
    """Only what was on the wire."""
    return value.model_dump(mode="json", exclude_unset=True)


def failure(error: Exception) -> dict[str, Any]:
    told: dict[str, Any] = {"class": type(error).__name__, "message": str(error)}
    told["classes"] = [c.__name__ for c in type(error).__mro__]
    if isinstance(error, openai.APIError):
        told |= {"code": error.code, "param": error.param, "type": error.type, "body": error.body}
    if isinstance(error, openai.APIStatusError):
        headers = {name.lower(): value for name, value in error.response.headers.items()}
        told |= {"status": error.status_code, "headers": headers, "request_id": error.request_id}
    return told


async def create(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    completion = await settled(client.chat.completions.create(**order["ask"]))
    return {"completion": plain(completion), "request_id": completion._request_id}


async def raw(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    response = await settled(client.chat.completions.with_raw_response.create(**order["ask"]))
    completion = await settled(response.parse())
    headers = {name.lower(): value for name, value in response.headers.items()}
    return {"completion": plain(completion), "headers": headers, "request_id": completion._request_id}


async def stream(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    chunks: list[Any] = []
    result: dict[str, Any] = {"chunks": chunks, "at": []}
    stream = await settled(client.chat.completions.create(stream=True, **order["ask"]))
    result["headers"] = {name.lower(): value for name, value in stream.response.headers.items()}
    leave = order.get("leave_after")
    try:
        async for chunk in each(stream):
            chunks.append(plain(chunk))
            result["at"].append(time.monotonic())
            said = sum(bool(c["choices"] and c["choices"][0]["delta"].get("content")) for c in chunks)
            if leave is not None and said >= leave:
                result["left_at"] = time.monotonic()
                await settled(stream.close())
                break
    except Exception as error:
        result["error"] = failure(error)
    return result


async def parse(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    completion = await settled(client.chat.completions.parse(response_format=SCHEMAS[order["schema"]], **order["ask"]))
    parsed = completion.choices[0].message.parsed
    return {"parsed": None if parsed is None else parsed.model_dump(), "completion": plain(completion)}


async def accumulate(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    """By the SDK's own helper, which puts the chunks together and is particular about their shapes."""
    more: dict[str, Any] = {"response_format": SCHEMAS[order["schema"]]} if "schema" in order else {}
    if order.get("tools"):
        more["tools"] = [TOOL]
    kinds: list[str] = []
    manager = client.chat.completions.stream(**order["ask"], **more)
    if IS_ASYNC:
        async with manager as events:
            async for event in events:
                kinds.append(event.type)
            final = await events.get_final_completion()
    else:
        with manager as events:
            for event in events:
                kinds.append(event.type)
            final = events.get_final_completion()
    message = final.choices[0].message
    return {
        "events": kinds,
        "completion": plain(final),
        "parsed": message.parsed.model_dump() if isinstance(message.parsed, BaseModel) else None,
    }


async def tools(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Ask with a tool, do what the model wants done, ask again with the result."""
    ask: dict[str, Any] = {**order["ask"], "tools": [TOOL]}
    first = await settled(client.chat.completions.create(**ask))
    wanted: Any = first.choices[0].message
    messages = [*ask["messages"], wanted.model_dump(exclude_none=True)]
    calls: list[Any] = wanted.tool_calls or []
    for call in calls:
        given = json.loads(call.function.arguments)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(given["a"] + given["b"])})
    second = await settled(client.chat.completions.create(**{**ask, "messages": messages}))
    return {"first": plain(first), "second": plain(second)}


async def models(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    return {"models": [plain(model) async for model in each(await settled(client.models.list()))]}


async def model(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    return {"model": plain(await settled(client.models.retrieve(order["id"])))}


async def get(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    return {"got": await settled(client.get(order["path"], cast_to=object))}


async def abort(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Ask, without a stream, and give up after so many seconds."""
    task = asyncio.ensure_future(client.chat.completions.create(**order["ask"]))
    await asyncio.wait([task], timeout=order["after"])
    left_at = time.monotonic()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return {"left_at": left_at}


async def complete(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Raw text, not a chat."""
    completion = await settled(client.completions.create(**order["ask"]))
    return {"completion": plain(completion), "request_id": completion._request_id}


async def complete_stream(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"chunks": []}
    try:
        async for chunk in each(await settled(client.completions.create(stream=True, **order["ask"]))):
            result["chunks"].append(plain(chunk))
    except Exception as error:
        result["error"] = failure(error)
    return result


async def embed(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    embedded = await settled(client.embeddings.create(**order["ask"]))
    return {"embedded": plain(embedded), "request_id": embedded._request_id}


async def respond(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    response = await settled(client.responses.create(**order["ask"]))
    return {"response": plain(response), "text": response.output_text, "request_id": response._request_id}


async def respond_stream(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"events": []}
    try:
        async for event in each(await settled(client.responses.create(stream=True, **order["ask"]))):
            result["events"].append(plain(event))
    except Exception as error:
        result["error"] = failure(error)
    return result


async def respond_parse(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    response = await settled(client.responses.parse(text_format=SCHEMAS[order["schema"]], **order["ask"]))
    return {"parsed": response.output_parsed.model_dump()}


async def respond_accumulate(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    """By the SDK's own helper."""
    more: dict[str, Any] = {"text_format": SCHEMAS[order["schema"]]} if "schema" in order else {}
    kinds: list[str] = []
    manager = client.responses.stream(**order["ask"], **more)
    if IS_ASYNC:
        async with manager as events:
            async for event in events:
                kinds.append(event.type)
            final = await events.get_final_response()
    else:
        with manager as events:
            for event in events:
                kinds.append(event.type)
            final = events.get_final_response()
    parsed = final.output_parsed
    return {
        "events": kinds,
        "text": final.output_text,
        "parsed": parsed.model_dump() if isinstance(parsed, BaseModel) else None,
    }


async def respond_tools(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Ask with a tool, do what the model wants done, go on with the result: from what is kept, or all of it anew."""
    ask: dict[str, Any] = {**order["ask"], "tools": [{"type": "function", **TOOL["function"]}]}
    first = await settled(client.responses.create(**ask))
    results: list[Any] = []
    for item in first.output:
        if item.type == "function_call":
            given = json.loads(item.arguments)
            output = str(given["a"] + given["b"])
            results.append({"type": "function_call_output", "call_id": item.call_id, "output": output})
    if order["kept"]:
        more: dict[str, Any] = {"input": results, "previous_response_id": first.id}
    else:
        asked = {"role": "user", "content": ask["input"]}
        more = {"input": [asked, *(item.model_dump(exclude_unset=True) for item in first.output), *results]}
    second = await settled(client.responses.create(**{**ask, **more}))
    return {"first": plain(first), "second": plain(second), "text": second.output_text}


async def keep(client: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Ask, go on, read both again, list what was asked, delete, and read once more."""
    first = await settled(client.responses.create(**order["ask"]))
    second = await settled(client.responses.create(**order["then"], previous_response_id=first.id))
    read = await settled(client.responses.retrieve(second.id))
    items = [plain(item) async for item in each(await settled(client.responses.input_items.list(second.id, limit=2)))]
    await settled(client.responses.delete(first.id))
    result: dict[str, Any] = {"second": plain(second), "read": plain(read), "items": items}
    ways: list[Callable[[], Any]] = [
        lambda: client.responses.retrieve(first.id),
        lambda: client.responses.create(**order["then"], previous_response_id=second.id),
    ]
    for way in ways:
        try:
            await settled(way())
        except Exception as error:
            result.setdefault("gone", []).append(failure(error))
    return result


CHAT = (create, raw, stream, parse, accumulate, tools, models, model, get, abort)
RAW = (complete, complete_stream, embed)
RESPONSES = (respond, respond_stream, respond_parse, respond_accumulate, respond_tools, keep)
WAYS = {way.__name__: way for way in (*CHAT, *RAW, *RESPONSES)}


async def obey(order: dict[str, Any]) -> dict[str, Any]:
    client = MAKE(**order["client"])
    started = time.monotonic()
    try:
        result = await WAYS[order["do"]](client, order)
    except Exception as error:
        result = {"error": failure(error)}
    finally:
        await settled(client.close())
    return {**result, "seconds": time.monotonic() - started}


async def main() -> None:
    print(json.dumps({"version": openai.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(await obey(json.loads(line))), flush=True)


asyncio.run(main())
