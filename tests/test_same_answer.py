"""Whatever an upstream says: the chunks of a stream, put together, are the body that is not streamed."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving import PATIENCE, Server, serving, upstream

from asmodel.testing import ScriptedServer

Strategy = st.SearchStrategy[Any]

texts: Strategy = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
words: Strategy = st.lists(
    st.sampled_from(["alpha", "beta", "ü", "日本", "a\nb", '"', "{}", "data: x", "\r\n", "\u2028"]), max_size=8
)
said: Strategy = texts | words.map(" ".join)
calls: Strategy = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.uuids().map(lambda u: f"call_{u.hex[:8]}"),
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["add", "look_up"]),
                    "arguments": st.dictionaries(texts, texts, max_size=2).map(json.dumps),
                }
            ),
        }
    ),
    min_size=1,
    max_size=3,
)
messages: Strategy = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": said},
    optional={"reasoning_content": said.filter(bool), "tool_calls": calls, "refusal": said.filter(bool)},
)
finishes = st.sampled_from(["stop", "length", "content_filter"])


def usage_of(asked: int, told: int, thought: int) -> dict[str, Any]:
    return {
        "prompt_tokens": asked,
        "completion_tokens": told + thought,
        "total_tokens": asked + told + thought,
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


counts = st.integers(0, 9999)
usages: Strategy = st.builds(usage_of, counts, counts, counts)


@pytest.fixture(scope="module")
def said_by() -> dict[str, dict[str, Any]]:
    return {}


@pytest.fixture(scope="module")
def server(said_by: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with (
        ScriptedServer(lambda body: said_by["now"]) as up,
        serving(tmp_path_factory.mktemp("same"), upstream(up.base_url)) as made,
    ):
        yield made


def ask(server: Server, asked: dict[str, Any]) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"content-type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    assert response.status == 200, data
    return data


def put_together(data: bytes) -> dict[str, Any]:
    """The body that the chunks add up to, as the SDKs do it."""
    assert data.endswith(b"data: [DONE]\n\n")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n")[:-2] if event[:1] != b":"]
    whole: dict[str, Any] = {"usage": None, "choices": {}}
    for chunk in chunks:
        whole["usage"] = chunk.get("usage") or whole["usage"]
        for choice in chunk["choices"]:
            so_far = whole["choices"].setdefault(choice["index"], {"calls": {}})
            so_far["finish"] = choice["finish_reason"] or so_far.get("finish")
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    for part in value:
                        call = so_far["calls"].setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
                        call["id"] += part.get("id") or ""
                        call["name"] += part["function"].get("name") or ""
                        call["arguments"] += part["function"].get("arguments") or ""
                elif value:
                    so_far[name] = so_far.get(name, "") + value
    return whole


def plainly(body: dict[str, Any]) -> dict[str, Any]:
    """A whole body in the same form."""
    choices: dict[int, Any] = {}
    for choice in body["choices"]:
        message = choice["message"]
        told = {
            name: message[name] for name in ("role", "content", "refusal", "reasoning_content") if message.get(name)
        }
        made: dict[int, Any] = {
            place: {"id": c["id"], **c["function"]} for place, c in enumerate(message.get("tool_calls") or ())
        }
        choices[choice["index"]] = {**told, "calls": made, "finish": choice["finish_reason"]}
    return {"usage": body["usage"], "choices": choices}


@pytest.mark.parametrize("model", ["plain", "default", "plain:plain:default"])
@given(st.lists(st.tuples(messages, finishes), min_size=1, max_size=3), usages, st.booleans())
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_adds_up_to_the_body(
    server: Server,
    said_by: dict[str, dict[str, Any]],
    model: str,
    choices: list[tuple[dict[str, Any], str]],
    usage: dict[str, Any],
    tools: bool,
) -> None:
    if model != "default":
        choices = choices[:1]
    said_by["now"] = {
        "id": "theirs",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [
            {"index": place, "message": message, "finish_reason": "tool_calls" if "tool_calls" in message else finish}
            for place, (message, finish) in enumerate(choices)
        ],
        "usage": usage,
    }
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "Say it."}],
        "n": len(choices),
        "asmodel": {"cache": "off", "progress": False},
        **({"tools": [{"type": "function", "function": {"name": "add"}}]} if tools else {}),
    }
    body = json.loads(ask(server, asked))
    stream = ask(server, {**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert put_together(stream) == plainly(body)
    content = [c["message"]["content"] or "" for c in body["choices"]]
    assert content == [message["content"] for message, _ in choices]
