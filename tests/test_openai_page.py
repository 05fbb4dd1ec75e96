"""`docs/openai.md` says what the server does: made of the code, and where written by hand, held against it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving import Server, serving, upstream

from asmodel import reference, response_wire, wire
from asmodel.app import create_app
from asmodel.settings import Settings
from asmodel.testing import Fault, ScriptedServer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "openai.md"


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == reference.page(), "python -m asmodel.reference > docs/openai.md"


def test_every_route_is_on_the_page() -> None:
    routes = create_app(Settings()).routes
    served = {f"{m} {r.path.replace(':path', '')}" for r in routes for m in (r.methods or ()) if m != "HEAD"}
    assert served == reference.ROUTES.keys()


def test_every_parameter_of_the_api_is_on_the_page() -> None:
    words = (
        "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages "
        "metadata modalities model moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key "
        "prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed "
        "service_tier stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity "
        "web_search_options"
    )
    api = words.split()
    page = PAGE.read_text()
    for name in [*api, "asmodel"]:
        assert f"\n| `{name}` | " in page, name
    assert wire.HINTS | wire.NEEDS.keys() <= set(api)


def test_every_header_that_is_read_is_on_the_page() -> None:
    read: set[str] = set()
    for file in (ROOT / "proxy" / "asmodel").glob("*.py"):
        read |= set(re.findall(r'\bheaders\.(?:get|getlist)\(\s*"([^"]+)"', file.read_text()))
    upstreams_own = {"retry-after", "retry-after-ms", "location"}
    assert read - upstreams_own <= reference.REQUEST_HEADERS.keys()


@pytest.fixture(scope="module")
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer() as made:
        yield made


@pytest.fixture(scope="module")
def server(up: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page"), upstream(up.base_url, retries=0)) as made:
        yield made


def test_every_header_of_a_response_is_on_the_page(server: Server, up: ScriptedServer) -> None:
    hello: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
    refusing = ScriptedServer([Fault(status=429, headers={"retry-after": "1"})])
    answers = [
        server.chat(hello),
        server.chat({**hello, "stream": True}),
        server.chat({**hello, "model": "default"}),
        server.chat({**hello, "model": "nobody"}),
        server.chat(b"{" * 25_000_000),
        server.ask("GET", "/v1/models"),
        server.ask("GET", "/v1/chat/completions"),
        server.ask("GET", "/nowhere"),
        server.ask("GET", "/readyz"),
        server.ask("GET", "/metrics"),
    ]
    with refusing:
        settings = upstream(refusing.base_url, retries=0) + '[keys]\nann = "anns-key"\n'
        with serving(server.folder / "locked", settings) as locked:
            answers.append(locked.chat(hello))
            answers.append(locked.chat(hello, {"authorization": "Bearer anns-key"}))
    assert [a.status for a in answers] == [200, 200, 200, 404, 413, 200, 405, 404, 200, 200, 401, 429]
    told: set[str] = set()
    for answer in answers:
        told |= set(answer.headers)
    assert told <= reference.RESPONSE_HEADERS.keys()
    assert reference.RESPONSE_HEADERS.keys() <= told


def responses_row(name: str) -> list[str]:
    """What the page says of a parameter of a response, cell by cell."""
    section = PAGE.read_text().split("\n## Responses\n")[1].split("\n## ")[0]
    return next(line for line in section.splitlines() if line.startswith(f"| `{name}` | ")).split(" | ")


ASKED: dict[str, tuple[Any, str]] = {
    "input": ("hello", ""),
    "max_tool_calls": (1, ""),
    "max_output_tokens": (5, ""),
    "top_logprobs": (1, "top_logprobs"),
    "text": ({"format": {"type": "json_object"}}, "text.format"),
    "tools": ([{"type": "function", "name": "f"}], "tools"),
    "tool_choice": ("required", "tool_choice"),
    "include": (["message.output_text.logprobs"], "include"),
    "background": (True, "background"),
    "conversation": ("conv_1", "conversation"),
    "prompt": ({"id": "p"}, "prompt"),
    "context_management": ([{"type": "compaction"}], "context_management"),
    "moderation": ({"model": "m"}, "moderation"),
    "truncation": ("auto", "truncation"),
    "previous_response_id": ("resp_0", "previous_response_id"),
    "reasoning": ({"summary": "auto"}, ""),
    "documents": (["d"], ""),
    "asmodel": ({}, ""),
    "stream": (False, ""),
    "metadata": ({"a": "b"}, ""),
    "stream_options": ({"include_obfuscation": False}, ""),
}
"""A value of each parameter of a response that asks for something, and the name under which it is refused, if it is."""


@pytest.mark.parametrize("name", [n for n in response_wire.ResponseRequest.model_fields if n != "model"])
def test_what_the_page_says_of_a_parameter_of_a_response_is_what_becomes_of_it(
    name: str, server: Server, up: ScriptedServer
) -> None:
    """By asking a program that supports nothing, and has no reply step."""
    told = responses_row(name)[2]
    kinds = response_wire.ResponseRequest.model_json_schema()["properties"][name].get("anyOf", [{}])
    value, param = ASKED.get(name) or (FIRST[kinds[0].get("type", "object")], "")
    asked = {"model": "chain-of-thought", "input": "x", name: value}
    answer = server.ask("POST", "/v1/responses", asked)
    if param:
        assert "refused" in told or "404" in told
        assert (answer.status, answer.error["param"]) == (404 if "404" in told else 400, param)
        return
    assert answer.status == 200, answer.body
    assert not told.startswith("refused") or name == "parallel_tool_calls"
    ignored = answer.json["asmodel"]["ignored"]
    assert ignored == ([name] if told == "ignored" or told.startswith("a hint") else [])


FIRST: dict[str, Any] = {"number": 1, "integer": 1, "boolean": True, "object": {"a": "b"}, "array": [], "string": "x"}


@pytest.mark.parametrize("name", [n for n in wire.ChatRequest.model_fields if n not in ("model", "messages")])
def test_what_the_page_says_of_a_parameter_for_a_program_is_what_becomes_of_it(
    name: str, server: Server, up: ScriptedServer
) -> None:
    """By asking a program that supports nothing, and has no reply step."""
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` | "))
    told = row.split(" | ")[2]
    schema = wire.ChatRequest.model_json_schema()["properties"][name]
    kinds = [b.get("type", "object") for b in schema.get("anyOf", [schema])]
    value: Any = {"a": 1} if name == "logit_bias" else FIRST[kinds[0]]
    value = {"tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}]}.get(name, value)
    value = {
        "modalities": ["audio"],
        "asmodel": {},
        "documents": ["d"],
        "response_format": {"type": "json_object"},
    }.get(name, value)
    asked = {"model": "chain-of-thought", "messages": [{"role": "user", "content": "x"}], name: value}
    answer = server.chat({"stream": False, **asked})
    if told.startswith("refused") and f"`{str(value).lower()}`" not in told:
        assert (answer.status, answer.error["param"]) == (400, name)
        return
    assert answer.status == 200, answer.body
    if name == "stream":
        return
    ignored = answer.json["asmodel"]["ignored"]
    if told == "ignored" or told.startswith("a hint"):
        assert ignored == [name]
    else:
        assert ignored == []
