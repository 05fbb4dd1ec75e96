"""`/v1/responses`, asked by OpenAI's SDK and by hand, over a scripted upstream."""

from __future__ import annotations

import base64
import http.client
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel
from tests.serving import Server, eventually, serving, upstream
from tests.timed import in_time, timed

from asmodel.response_store import FILE
from asmodel.testing import Fault, Received, ScriptedServer, ServerAnswer

PROGRAMS = '''
"""Programs that do one thing each."""

import asyncio

from asmodel import Run, program, step


@step(model="writer", temperature=0)
def outline(question: str) -> str:
    return f"Outline: {question}"


@step(model="writer", temperature=0)
def text(outline: str) -> str:
    return f"Write from: {outline}"


@program("two-step")
async def two_step(run: Run) -> str:
    """An outline, then a text."""
    return await run.reply(text, await run(outline, run.question))


@program("faulty")
async def faulty(run: Run) -> str:
    """Takes a step, and raises what its question says."""
    await run(outline, run.question)
    await asyncio.sleep(0.3)
    raise RuntimeError(run.question)
'''

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
    "strict": True,
}


class Script:
    """What the upstream says: `answer` to what it is asked, unless `fault` has something to say of the request."""

    def __init__(self) -> None:
        self.reset()
        self.server = ScriptedServer(lambda body: self.answer(body), faults=lambda received: self.fault(received))

    def reset(self) -> None:
        self.answer: Callable[[dict[str, Any]], ServerAnswer] = lambda body: None
        self.fault: Callable[[Received], Fault | None] = lambda received: None

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [r.body for r in self.server.requests if r.path == "/v1/chat/completions"]


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    made = Script()
    with made.server:
        yield made


@pytest.fixture(scope="module")
def running(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("responses")
    (folder / "programs").mkdir()
    (folder / "programs" / "small.py").write_text(PROGRAMS)
    settings = (
        'program_folders = ["programs"]\n[limits]\nbody_bytes = 100_000\nmessages = 40\n'
        + upstream(script.server.base_url, retries=0)
        + '[models.careful]\nprogram = "self-consistency"\nparams = { samples = 3 }\n'
    )
    with serving(folder, settings) as server:
        yield server


@pytest.fixture
def server(running: Server, script: Script) -> Server:
    script.reset()
    script.server.delay = script.server.token_delay = 0.0
    script.server.clear()
    return running


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def create(client: OpenAI, **asked: Any) -> Any:
    """`client.responses.create`, for parameters that are put together and so no overload of it can be told."""
    return cast("Any", client.responses.create)(**asked)


def streaming(client: OpenAI, **asked: Any) -> Any:
    """And `client.responses.stream`."""
    return cast("Any", client.responses.stream)(**asked)


def ask(server: Server, body: object, headers: dict[str, str] | None = None) -> Any:
    return server.ask("POST", "/v1/responses", body, headers)


def events_of(server: Server, body: dict[str, Any], headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    answer = ask(server, {**body, "stream": True}, headers)
    assert answer.status == 200, answer.body
    lines = answer.body.decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def receipt_of(response: Response) -> dict[str, Any]:
    return dict((response.model_extra or {})["asmodel"])


# ---- answers ----


@pytest.mark.parametrize(
    ("model", "calls"), [("plain", 1), ("two-step", 2), ("default", 1), ("careful", 3), ("plain:two-step:default", 2)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_programs_presets_compositions_and_upstreams_answer(
    client: OpenAI, script: Script, model: str, calls: int, stream: bool
) -> None:
    script.answer = lambda body: f"It is blue, {model} {stream}. Answer: blue"
    asked: dict[str, Any] = {"model": model, "input": f"Why {model} {stream}?"}
    if stream:
        with streaming(client, **asked) as events:
            told = list(events)
            answer = events.get_final_response()
        assert [e.sequence_number for e in told] == list(range(len(told)))
        if model != "careful":
            assert sum(e.type == "response.output_text.delta" for e in told) > 3, "it is streamed as it is generated"
    else:
        answer = create(client, **asked)
    assert answer.output_text == ("blue" if model == "careful" else f"It is blue, {model} {stream}. Answer: blue")
    assert (answer.status, answer.model, answer.object) == ("completed", model, "response")
    assert answer.id.startswith("resp_")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert len(script.bodies) == calls
    if model == "default":
        assert "asmodel" not in (answer.model_extra or {})
    else:
        assert receipt_of(answer)["upstream_calls"] == calls


def test_a_request_reaches_the_upstream_as_a_chat_completion(client: OpenAI, script: Script) -> None:
    client.responses.create(
        model="default",
        instructions="You are a pirate.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}],
        max_output_tokens=50,
        temperature=0.5,
        metadata={"a": "b"},
        extra_body={"flavour": "sour", "asmodel": {"cache": "off"}},
    )
    assert script.bodies[-1] == {
        "model": "scripted",
        "messages": [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who?"}],
        "max_completion_tokens": 50,
        "temperature": 0.5,
        "flavour": "sour",
    }


def test_hints_reach_the_reply_step_and_what_is_not_heard_is_listed_by_the_names_it_has_here(
    client: OpenAI, script: Script
) -> None:
    client.responses.create(model="two-step", input="hints", max_output_tokens=7, top_p=0.9)
    assert "max_completion_tokens" not in script.bodies[0]
    assert (script.bodies[1].get("max_tokens") or script.bodies[1].get("max_completion_tokens")) == 7
    assert script.bodies[1]["top_p"] == 0.9
    script.answer = lambda body: "Answer: x"
    answer = client.responses.create(
        model="careful", input="ignored", max_output_tokens=7, user="me", include=["reasoning.encrypted_content"]
    )
    assert receipt_of(answer)["ignored"] == ["include.reasoning.encrypted_content", "max_output_tokens", "user"]


def test_the_response_says_what_was_asked(client: OpenAI) -> None:
    answer = client.responses.create(
        model="plain", input="echo", instructions="Briefly.", metadata={"a": "b"}, temperature=0.25, store=False
    )
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Briefly.", {"a": "b"}, 0.25)
    assert (answer.model_extra or {})["store"] is False


def test_usage_counts_what_was_bought_and_what_is_not_in_the_answer_as_reasoning(
    client: OpenAI, script: Script
) -> None:
    script.answer = lambda body: "I think and think. Answer: x"
    answer = client.responses.create(model="careful", input="usage")
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == answer.usage.output_tokens > 0
    again = client.responses.create(model="careful", input="usage")
    assert again.usage is not None
    assert again.usage.total_tokens == 0
    assert receipt_of(again)["cache_hits"] == 3
    assert again.id != answer.id


def test_an_answer_that_is_cut_off_is_incomplete(client: OpenAI, script: Script) -> None:
    script.answer = lambda body: {"content": "It was a", "finish_reason": "length"}
    answer = client.responses.create(model="default", input="long", max_output_tokens=16)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(model="default", input="long", stream=True)
    assert last.type == "response.incomplete"


def test_refusals_and_reasoning_are_items_of_their_own(client: OpenAI, script: Script) -> None:
    script.answer = lambda body: {"content": None, "refusal": "I will not.", "reasoning_content": "Should I? No."}
    whole: Any = client.responses.create(model="default", input="refuse")
    with client.responses.stream(model="default", input="refuse") as events:
        told = [e.type for e in events]
        streamed: Any = events.get_final_response()
    for answer in (whole, streamed):
        reasoning, message = answer.output
        assert reasoning.content[0].text == "Should I? No."
        assert reasoning.summary == []
        assert message.content[0].refusal == "I will not."
    assert "response.reasoning_text.delta" in told
    assert "response.refusal.done" in told


class Sum(BaseModel):
    what: str
    total: int


@pytest.mark.parametrize("model", ["plain", "default", "careful"])
def test_an_answer_is_parsed_into_the_clients_type(client: OpenAI, script: Script, model: str) -> None:
    script.answer = lambda body: '{"what": "apples", "total": 12}'
    parsed = client.responses.parse(model=model, input="count", text_format=Sum)
    assert parsed.output_parsed == Sum(what="apples", total=12)
    sent = script.bodies[-1]["response_format"]
    assert sent["json_schema"]["strict"] is True
    assert sent["json_schema"]["schema"]["required"] == ["what", "total"]
    with client.responses.stream(model=model, input="count again", text_format=Sum) as events:
        assert events.get_final_response().output_parsed == Sum(what="apples", total=12)


def test_an_answer_that_does_not_fit_is_asked_for_once_more(client: OpenAI, script: Script) -> None:
    given = iter(["a dozen", '{"what": "apples", "total": 12}'])
    script.answer = lambda body: next(given)
    assert client.responses.parse(model="plain", input="fit", text_format=Sum).output_parsed is not None
    assert len(script.bodies) == 2


def test_log_probabilities_come_where_they_are_asked_for(client: OpenAI, script: Script) -> None:
    script.answer = lambda body: "yes"
    answer: Any = client.responses.create(
        model="default", input="probably", include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert script.bodies[-1]["logprobs"] is True
    assert [t.token for t in answer.output[0].content[0].logprobs] == ["yes"]


def call_the_tool(body: dict[str, Any]) -> ServerAnswer:
    last = body["messages"][-1]
    if last["role"] == "tool":
        return f"That makes {last['content']}."
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "add", "arguments": f'{{"a": {n}}}'}}
        for n in (1, 2)
    ]
    return {"content": None, "reasoning_content": "Two sums.", "tool_calls": calls}


@pytest.mark.parametrize("model", ["plain", "default", "careful"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["previous_response_id", "input"])
def test_the_clients_tools_make_their_round_trip(
    client: OpenAI, script: Script, model: str, stream: bool, by: str
) -> None:
    script.answer = call_the_tool
    question: dict[str, Any] = {"role": "user", "content": f"Add {model} {stream} {by}"}
    asked: dict[str, Any] = {"model": model, "input": [question], "tools": [TOOL], "tool_choice": "auto"}
    first: Any
    if stream:
        with streaming(client, **asked) as events:
            first = events.get_final_response()
    else:
        first = create(client, **asked)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(c.name, c.arguments, c.call_id) for c in calls] == [
        ("add", '{"a": 1}', "call_1"),
        ("add", '{"a": 2}', "call_2"),
    ]
    sent = script.bodies[-1]["tools"][0]
    assert sent == {"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}
    results: list[Any] = [{"type": "function_call_output", "call_id": c.call_id, "output": "12"} for c in calls]
    if by == "input":
        said = [item.to_dict() for item in first.output]
        for item in said:
            item.pop("parsed_arguments", None)
        second = create(client, **{**asked, "input": [question, *said, *results]})
    else:
        second = create(client, **{**asked, "input": results, "previous_response_id": first.id})
    assert second.output_text == "That makes 12."
    _, assistant, *told = script.bodies[-1]["messages"]
    assert [c["id"] for c in assistant["tool_calls"]] == ["call_1", "call_2"]
    assert assistant["reasoning_content"] == "Two sums."
    assert [m["tool_call_id"] for m in told] == ["call_1", "call_2"]


# ---- streams ----


def test_a_stream_says_how_far_the_program_is_in_a_reasoning_item(client: OpenAI, script: Script) -> None:
    script.answer = lambda body: "Answer: blue"
    with client.responses.stream(model="careful", input="progress") as events:
        told = list(events)
        answer: Any = events.get_final_response()
    reasoning, message = answer.output
    assert "thought" in reasoning.summary[0].text
    assert reasoning.content is None, "what a step does is nobody's thought"
    assert message.content[0].text == "blue"
    kinds = [e.type for e in told]
    assert kinds.index("response.reasoning_summary_text.delta") < kinds.index("response.output_text.delta")
    followed = client.responses.create(model="plain", input="and?", previous_response_id=answer.id)
    assert followed.output_text
    assert [m["content"] for m in script.bodies[-1]["messages"]] == ["progress", "blue", "and?"]

    with client.responses.stream(
        model="careful", input="progress", extra_body={"asmodel": {"progress": False}}
    ) as events:
        assert not any("reasoning" in e.type for e in events)


@timed
def test_a_stream_begins_before_a_slow_upstream_answers(server: Server, script: Script) -> None:
    script.fault = lambda received: Fault(delay=2.0, answer="At last.")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = {"model": "default", "input": "slow", "stream": True}
    started = time.monotonic()
    connection.request("POST", "/v1/responses", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.readline() == b"event: response.created\n"
    begun = time.monotonic() - started
    assert b"At last." in response.read()
    connection.close()
    in_time(begun, 1.9)


def test_what_is_wrong_with_a_request_is_an_http_error_in_a_stream_too(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(model="plaim", input="x", stream=True)
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("model", ["plain", "default"])
def test_an_upstream_that_fails_in_the_middle_fails_the_response_and_the_sdk_raises(
    client: OpenAI, script: Script, model: str
) -> None:
    script.fault = lambda received: Fault(after=3, error={"message": "overheated", "code": "hot"}, answer="a b c d e f")
    script.server.token_delay = 0.05
    told: list[Any] = []
    with pytest.raises(openai.APIError) as raised:
        told.extend(client.responses.create(model=model, input=f"break {model}", stream=True))
    assert raised.value.code == "upstream_unavailable"
    failed = told[-1]
    assert failed.type == "response.failed"
    assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
    assert failed.response.output[-1].content[0].text.startswith("a")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.response.id)


def test_a_program_that_raises_after_its_stream_began_is_told_with_its_receipt(server: Server, script: Script) -> None:
    *_, failed, error = events_of(server, {"model": "faulty", "input": "secret words"})
    assert (failed["type"], error["type"]) == ("response.failed", "error")
    assert failed["response"]["asmodel"]["upstream_calls"] == 1
    assert error["error"]["code"] == error["code"] == "program_error"
    assert "secret words" not in json.dumps(error)


# ---- errors ----


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "two-step", "tools": [TOOL]}, "tools", "unsupported_parameter"),
        (
            {"model": "two-step", "text": {"format": {"type": "json_object"}}},
            "text.format",
            "unsupported_parameter",
        ),
        (
            {"model": "two-step", "include": ["message.output_text.logprobs"]},
            "include",
            "unsupported_parameter",
        ),
        ({"model": "two-step", "top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
        (
            {
                "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}],
                "model": "two-step",
            },
            "input",
            "unsupported_parameter",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 5}}}},
            "text.format",
            "invalid_request",
        ),
        ({"model": "default", "asmodel": {"params": {"a": 1}}}, "asmodel.params", "invalid_request"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id", "previous_response_not_found"),
        ({"input": [{"type": "item_reference", "id": "msg_" + "0" * 26}]}, "input.0.id", "response_not_found"),
        ({"input": [{"role": "user", "content": "x"}] * 41}, "input", "invalid_request"),
        ({"input": None}, "input", "missing_required_parameter"),
    ],
)
def test_what_is_refused_is_named_before_anything_is_bought(
    server: Server, script: Script, body: dict[str, Any], param: str, code: str
) -> None:
    answer = ask(server, {"model": "plain", "input": "x", **body})
    assert answer.status == (404 if code.endswith("not_found") else 400)
    assert (answer.error["param"], answer.error["code"]) == (param, code)
    assert "response_format" not in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert script.bodies == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/responses", 405, "method_not_allowed"),
        ("POST", "/v1/responses/compact", 404, "not_found"),
        ("POST", "/v1/responses/resp_1/cancel", 404, "not_found"),
        ("PUT", "/v1/responses/resp_1", 405, "method_not_allowed"),
        ("GET", "/v1/responses/resp_1", 404, "response_not_found"),
        ("DELETE", "/v1/responses/resp_1", 404, "response_not_found"),
        ("GET", "/v1/responses/resp_1/input_items", 404, "response_not_found"),
        ("POST", "/v1/responses", 400, "invalid_request"),
    ],
)
def test_every_error_is_in_the_envelope(server: Server, method: str, path: str, status: int, code: str) -> None:
    answer = server.ask(method, path, b"not json" if method == "POST" else None)
    assert (answer.status, answer.error["code"]) == (status, code)


def test_faults_of_the_upstream_are_the_sdks_own_exceptions(client: OpenAI, script: Script) -> None:
    script.fault = lambda received: Fault(status=429, headers={"retry-after": "2"})
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model="plain", input="limited")
    script.fault = lambda received: Fault(status=400, code="context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model="default", input="long", stream=True)
    assert raised.value.code == "context_length_exceeded"


def test_receipts_limits_and_the_cache_are_those_of_a_chat_completion(server: Server, script: Script) -> None:
    body = {"model": "two-step", "input": "receipts"}
    first, again = ask(server, body, {"x-request-id": "mine"}), ask(server, body)
    assert first.headers["x-request-id"] == first.json["asmodel"]["request_id"] == "mine"
    assert (first.headers["x-asmodel-steps"], first.headers["x-asmodel-upstream-calls"]) == ("2", "2")
    assert len(first.headers["x-asmodel-trace-id"]) == 32
    assert again.headers["x-asmodel-cache-hits"] == "2"
    chat = server.chat({"model": "two-step", "messages": [{"role": "user", "content": "receipts"}]})
    assert chat.headers["x-asmodel-cache-hits"] == "2", "a step is a step, whichever way it was asked for"
    assert ask(server, body, {"cache-control": "no-cache"}).headers["x-asmodel-upstream-calls"] == "2"
    limited = ask(server, {"model": "two-step", "input": "limits", "asmodel": {"limits": {"calls": 1}}})
    assert (limited.status, limited.error["code"]) == (422, "limit_exceeded")
    assert ask(server, {"model": "plain", "input": "new"}, {"cache-control": "only-if-cached"}).status == 504


def test_requests_of_one_idempotency_key_are_one_response(server: Server, script: Script) -> None:
    script.server.delay = 0.3
    body = {"model": "default", "input": "once"}
    key = {"idempotency-key": "one"}
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, server, body, key) for _ in range(3)]
        answers = [each.result() for each in asked]
    assert len({a.json["id"] for a in answers}) == 1
    assert len(script.bodies) == 1
    assert ask(server, {**body, "input": "twice"}, key).error["code"] == "idempotency_key_reused"


def test_a_client_that_leaves_ends_its_run_and_nothing_is_kept(server: Server, script: Script) -> None:
    script.fault = lambda received: Fault(delay=20.0)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = {"model": "plain", "input": "leaving", "stream": True}
    connection.request("POST", "/v1/responses", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    line = ""
    while not line.startswith("data: "):
        line = response.readline().decode()
    id = json.loads(line.removeprefix("data: "))["response"]["id"]
    response.close()
    connection.close()
    eventually("the upstream is called off", lambda: script.server.requests[-1].left_at is not None)
    assert server.ask("GET", f"/v1/responses/{id}").status == 404


# ---- what is kept ----


def test_a_conversation_goes_on_from_response_to_response(client: OpenAI, script: Script) -> None:
    count = iter(range(1, 10))
    script.answer = lambda body: f"answer {next(count)}"
    first = client.responses.create(model="plain", input="one", instructions="Only this once.")
    second = client.responses.create(model="default", input="two", previous_response_id=first.id)
    third = client.responses.create(model="plain", input="three", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    assert [(m["role"], m["content"]) for m in script.bodies[-1]["messages"]] == [
        ("user", "one"),
        ("assistant", "answer 1"),
        ("user", "two"),
        ("assistant", "answer 2"),
        ("user", "three"),
    ]
    branch = client.responses.create(model="plain", input="or two", previous_response_id=first.id)
    assert [m["content"] for m in script.bodies[-1]["messages"]] == ["one", "answer 1", "or two"]
    assert branch.output_text == "answer 4"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_retrieved_and_deleted(client: OpenAI, server: Server, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "plain", "input": f"keep {stream}", "metadata": {"a": "b"}}
    answer: Any
    if stream:
        with streaming(client, **asked) as events:
            answer = events.get_final_response()
    else:
        answer = create(client, **asked)
    kept = client.responses.retrieve(answer.id)
    assert kept.output_text == answer.output_text
    assert kept.metadata == {"a": "b"}
    assert kept.usage == answer.usage
    assert receipt_of(kept) == receipt_of(answer)
    deleted = server.ask("DELETE", f"/v1/responses/{answer.id}")
    assert deleted.json == {"id": answer.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(model="plain", input="go on", previous_response_id=answer.id)
    assert raised.value.code == "previous_response_not_found"
    assert raised.value.param == "previous_response_id"


def test_one_that_goes_on_from_a_deleted_one_cannot_be_gone_on_from(client: OpenAI) -> None:
    first = client.responses.create(model="plain", input="first")
    second = client.responses.create(model="plain", input="second", previous_response_id=first.id)
    client.responses.delete(first.id)
    assert client.responses.retrieve(second.id).output_text == second.output_text
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(model="plain", input="third", previous_response_id=second.id)
    assert raised.value.code == "previous_response_not_found"


def test_the_items_of_an_input_are_listed_with_those_before_it_newest_first(client: OpenAI, server: Server) -> None:
    first = client.responses.create(model="plain", input="one", store=True)
    parts: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": f"two {n}"}]} for n in range(4)]
    second = client.responses.create(model="plain", input=parts, previous_response_id=first.id)
    items: list[Any] = list(client.responses.input_items.list(second.id, limit=2))
    texts = [item.content[0].text for item in items]
    assert texts == ["two 3", "two 2", "two 1", "two 0", first.output_text, "one"]
    assert len({item.id for item in items}) == 6
    one: Any = client.responses.input_items.list(second.id, limit=1, order="asc")
    assert (one.data[0].content[0].text, one.has_more) == ("one", True)
    for query in ("limit=0", "limit=101", "limit=x", "limit=1&limit=2", "order=up", "after=msg_0"):
        answer = server.ask("GET", f"/v1/responses/{second.id}/input_items?{query}")
        assert (answer.status, answer.error["param"]) == (400, query.partition("=")[0])
    for query in ("stream=true", "stream=null", "stream=false&stream=true"):
        assert server.ask("GET", f"/v1/responses/{second.id}?{query}").error["param"] == "stream"


def test_an_item_that_is_kept_can_be_sent_by_its_id_alone(client: OpenAI, script: Script) -> None:
    script.answer = call_the_tool
    first: Any = create(client, model="plain", input="refer", tools=[TOOL])
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "12"}
        for item in first.output
        if item.type == "function_call"
    ]
    asked = [{"role": "user", "content": "refer"}, *references, *results]
    assert create(client, model="plain", input=asked, tools=[TOOL]).output_text == "That makes 12."
    assert script.bodies[-1]["messages"][1]["tool_calls"][1]["id"] == "call_2"


def test_nothing_is_kept_where_the_request_says_so(client: OpenAI, server: Server) -> None:
    answer = client.responses.create(model="plain", input="a private matter of mine", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    client.responses.create(model="plain", input="a public matter of mine")
    file = server.folder / "state" / "asmodel" / "responses" / FILE
    written = b"".join(path.read_bytes() for path in file.parent.iterdir())
    assert b"a public matter of mine" in written
    assert b"a private matter of mine" not in written


def test_what_is_gone_on_from_is_no_larger_than_a_request_may_be(client: OpenAI, server: Server) -> None:
    first = client.responses.create(model="plain", input="x" * 60_000)
    second = client.responses.create(model="plain", input="y" * 60_000, previous_response_id=first.id)
    with pytest.raises(openai.APIStatusError) as raised:
        client.responses.create(model="plain", input="z", previous_response_id=second.id)
    assert (raised.value.status_code, raised.value.code) == (413, "payload_too_large")
    assert "previous_response_id" in raised.value.message


def test_what_is_gone_on_from_counts_with_the_bodies_that_are_being_answered(script: Script, tmp_path: Path) -> None:
    script.reset()
    settings = "[limits]\nin_flight_bytes = 150_000\n" + upstream(script.server.base_url, retries=0)
    with serving(tmp_path, settings) as server, server.client(max_retries=0) as client:
        first: Any = create(client, model="plain", input="x" * 60_000)
        more: dict[str, Any] = {"model": "plain", "previous_response_id": first.id}
        script.fault = lambda received: Fault(delay=20.0)
        waiting = [create(client, input=f"more {number}", stream=True, **more) for number in range(2)]
        named: list[Any] = [{"type": "item_reference", "id": first.output[0].id}]
        tries: list[Callable[[], object]] = [
            lambda: create(client, input="and more", **more),
            lambda: create(client, model="plain", input=named),
            lambda: client.responses.retrieve(first.id),
            lambda: client.responses.input_items.list(first.id),
        ]
        for attempt in tries:
            with pytest.raises(openai.InternalServerError, match="in_flight_bytes") as raised:
                attempt()
            assert (raised.value.status_code, raised.value.code) == (503, "overloaded")
        script.reset()
        assert create(client, model="plain", input="small").output_text, "what brings nothing in has room"
        for stream in waiting:
            stream.close()
        eventually("those have left", lambda: server.ask("GET", f"/v1/responses/{first.id}").status == 200)
        for number in range(9):
            assert create(client, input=f"one after another {number}", **more).output_text


def test_the_store_is_for_its_user_alone_and_apart_from_the_cache(client: OpenAI, server: Server) -> None:
    client.responses.create(model="plain", input="a matter for the store alone", metadata={"only": "in the store"})
    folder = server.folder / "state" / "asmodel" / "responses"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    cache = b"".join(path.read_bytes() for path in (server.folder / "cache").rglob("*") if path.is_file())
    assert b"in the store" not in cache
    connection = sqlite3.connect(folder / FILE)
    (body,) = connection.execute("SELECT body FROM responses ORDER BY rowid DESC LIMIT 1").fetchone()
    connection.close()
    assert json.loads(body)["response"]["metadata"] == {"only": "in the store"}, "JSON, and nothing else"


def test_the_server_says_at_its_start_where_responses_are(server: Server) -> None:
    assert f"\n  responses  {server.folder / 'state' / 'asmodel' / 'responses'}\n" in server.said


def test_images_and_files_are_kept_with_the_rest(client: OpenAI, script: Script) -> None:
    data = "data:text/plain;base64," + base64.b64encode(b"Twelve apples.").decode()
    content: list[Any] = [
        {"type": "input_text", "text": "Count."},
        {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"},
        {"type": "input_file", "filename": "a.txt", "file_data": data},
    ]
    first = client.responses.create(model="default", input=[{"role": "user", "content": content}])
    sent = script.bodies[-1]["messages"][0]
    client.responses.create(model="default", input="Again.", previous_response_id=first.id)
    assert script.bodies[-1]["messages"][0] == sent
    assert [part["type"] for part in sent["content"]] == ["text", "image_url", "file"]


def test_what_one_key_keeps_no_other_finds(script: Script, tmp_path: Path) -> None:
    script.reset()
    settings = upstream(script.server.base_url) + '[keys]\nann = "key-of-ann"\nbob = "key-of-bob"\n'
    with serving(tmp_path, settings) as server:
        ann, bob = server.client(api_key="key-of-ann"), server.client(api_key="key-of-bob")
        with ann, bob:
            hers = ann.responses.create(model="plain", input="mine alone")
            assert ann.responses.retrieve(hers.id).id == hers.id
            item: Any = {"type": "item_reference", "id": hers.output[0].id}
            tries: list[Callable[[], object]] = [
                lambda: bob.responses.retrieve(hers.id),
                lambda: bob.responses.delete(hers.id),
                lambda: bob.responses.input_items.list(hers.id),
                lambda: bob.responses.create(model="plain", input="x", previous_response_id=hers.id),
                lambda: bob.responses.create(model="plain", input=[item]),
            ]
            for attempt in tries:
                with pytest.raises(openai.NotFoundError):
                    attempt()
            assert ann.responses.retrieve(hers.id).output_text == hers.output_text
        for method, path in (("POST", ""), ("GET", "/x"), ("DELETE", "/x"), ("GET", "/x/input_items")):
            assert server.ask(method, f"/v1/responses{path}", b"{}").status == 401


def test_a_server_without_a_store_answers_and_says_that_it_keeps_nothing(script: Script, tmp_path: Path) -> None:
    script.reset()
    with serving(tmp_path, upstream(script.server.base_url) + '[store]\nkind = "off"\n') as server:
        with server.client() as client:
            answer = client.responses.create(model="plain", input="x", store=True)
            assert (answer.model_extra or {})["store"] is False
            tries: list[Callable[[], object]] = [
                lambda: client.responses.retrieve(answer.id),
                lambda: client.responses.create(model="plain", input="x", previous_response_id=answer.id),
            ]
            for attempt in tries:
                with pytest.raises(openai.NotFoundError, match="kind is off"):
                    attempt()
        assert "\n  cache " in server.said
        assert "\n  responses " not in server.said
        assert not (tmp_path / "state" / "asmodel" / "responses").exists()


def test_a_store_that_cannot_be_used_keeps_nobody_from_an_answer(script: Script, tmp_path: Path) -> None:
    script.reset()
    (tmp_path / "file").write_text("in the way")
    with serving(tmp_path, upstream(script.server.base_url) + '[store]\npath = "file/responses"\n') as server:
        with server.client() as client:
            answer = client.responses.create(model="plain", input="x")
            assert answer.output_text
            assert (answer.model_extra or {})["store"] is False
            with pytest.raises(openai.InternalServerError) as raised:
                client.responses.retrieve(answer.id)
            assert (raised.value.status_code, raised.value.code) == (503, "store_unavailable")
        assert "responses are not kept" in server.said


def test_servers_of_one_machine_share_what_is_kept_and_a_kill_takes_nothing(script: Script, tmp_path: Path) -> None:
    script.reset()
    settings = upstream(script.server.base_url)
    with serving(tmp_path, settings) as killed, serving(tmp_path) as left:
        last = ""
        with killed.client() as one, left.client() as other:
            for number in range(4):
                asked: dict[str, Any] = {"previous_response_id": last} if last else {}
                last = create((one, other)[number % 2], model="plain", input=f"turn {number}", **asked).id
            *_, end = create(one, model="plain", input="the last", previous_response_id=last, stream=True)
            killed.kill()
            assert other.responses.retrieve(end.response.id).output_text
            create(other, model="plain", input="after", previous_response_id=end.response.id)
        assert len(script.bodies[-1]["messages"]) == 2 * 5 + 1
