"""What every official SDK, in an environment of its own, makes of responses: nothing differs but `base_url`."""

from __future__ import annotations

import json

import pytest
from tests.e2e.sdks import Json, Script, Sdk
from tests.serving import Server

from asmodel.testing import Fault

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

SUM = {"what": "apples", "total": 12}
MODELS = pytest.mark.parametrize("model", ["plain", "default"])


def asking(question: str, model: str = "plain", **more: object) -> Json:
    """The arguments of the SDKs' `responses.create`."""
    return {"model": model, "input": question, **more}


@MODELS
def test_an_answer_is_an_ordinary_response(model: str, sdk: Sdk, server: Server, script: Script) -> None:
    question = script.will("Twelve apples.")
    saw = sdk.does("respond", server, asking(question, model, instructions="Count.", metadata={"a": "b"}))
    response = saw["response"]
    assert saw["text"] == "Twelve apples."
    assert (response["object"], response["status"], response["model"]) == ("response", "completed", model)
    assert response["metadata"] == {"a": "b"}
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert saw["request_id"]
    assert script.asked(question)[0].body["messages"][0] == {"role": "system", "content": "Count."}
    assert ("asmodel" in response) == (model == "plain")


@MODELS
def test_a_stream_is_numbered_and_ends_with_the_whole_response(
    model: str, sdk: Sdk, server: Server, script: Script
) -> None:
    events = sdk.does("respond_stream", server, asking(script.will("One two three."), model))["events"]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == "One two three."
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][-1]["content"][0]["text"] == "One two three."


def test_a_stream_says_how_far_the_program_is(sdk: Sdk, server: Server, script: Script) -> None:
    more = {"extra_body": {"asmodel": {"params": {"samples": 2}}}}
    ask = asking(script.will("Answer: twelve"), "self-consistency", **more)
    events = sdk.does("respond_stream", server, ask)["events"]
    told = "".join(e["delta"] for e in events if e["type"] == "response.reasoning_summary_text.delta")
    assert "thought" in told
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message"]


def test_the_sdks_own_accumulation_gives_the_whole_answer(sdk: Sdk, server: Server, script: Script) -> None:
    saw = sdk.does("respond_accumulate", server, asking(script.will("One two three.")))
    assert saw["text"] == "One two three."
    assert "response.completed" in saw["events"]


@pytest.mark.parametrize("model", ["plain", "self-consistency", "default"])
def test_structured_answers_are_of_the_clients_type(model: str, sdk: Sdk, server: Server, script: Script) -> None:
    question = script.will(json.dumps(SUM))
    assert sdk.does("respond_parse", server, asking(question, model), schema="Sum")["parsed"] == SUM
    assert sdk.does("respond_accumulate", server, asking(question, model), schema="Sum")["parsed"] == SUM
    sent = script.asked(question)[0].body["response_format"]
    assert sent["json_schema"]["schema"]["required"] == ["what", "total"]


def call_the_tool(body: Json) -> Json | str:
    last = body["messages"][-1]
    if last["role"] == "tool":
        return f"That makes {last['content']}."
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 5, "b": 7}'}}
    return {"content": None, "tool_calls": [call], "finish_reason": "tool_calls"}


@pytest.mark.parametrize("model", ["plain", "self-consistency", "default"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_clients_tools_make_their_round_trip(
    model: str, kept: bool, sdk: Sdk, server: Server, script: Script
) -> None:
    question = script.will(call_the_tool)
    saw = sdk.does("respond_tools", server, asking(question, model), kept=kept)
    (call,) = saw["first"]["output"]
    assert (call["type"], call["call_id"], call["name"]) == ("function_call", "call_1", "add")
    assert saw["text"] == "That makes 12."
    answered = script.asked(question)[-1].body["messages"]
    assert [m["role"] for m in answered] == ["user", "assistant", "tool"]
    assert answered[-1] == {"role": "tool", "tool_call_id": "call_1", "content": "12"}


def test_what_is_kept_is_gone_on_from_read_listed_and_deleted(sdk: Sdk, server: Server, script: Script) -> None:
    question, then = script.will("Twelve."), script.will("Apples.")
    saw = sdk.does("keep", server, asking(question), then=asking(then, "default"))
    asked = [m["content"] for m in script.asked(then)[0].body["messages"]]
    assert asked == [question, "Twelve.", then]
    assert saw["read"]["id"] == saw["second"]["id"]
    assert saw["read"]["output"] == saw["second"]["output"]
    assert [item["content"][0]["text"] for item in saw["items"]] == [then, "Twelve.", question]
    read, gone_on = saw["gone"]
    assert (read["class"], read["code"]) == ("NotFoundError", "response_not_found")
    assert (gone_on["class"], gone_on["code"]) == ("NotFoundError", "previous_response_not_found")


def test_errors_are_the_sdks_own(sdk: Sdk, server: Server, script: Script) -> None:
    error = sdk.fails("respond", server, asking(script.will("Never mind."), "plaim"), retries=True)
    assert (error["class"], error["code"], error["param"]) == ("NotFoundError", "model_not_found", "model")
    more = {"text": {"format": {"type": "json_object"}}}
    error = sdk.fails("respond", server, asking(script.will("Never mind."), "chain-of-thought", **more), retries=True)
    assert (error["class"], error["param"]) == ("BadRequestError", "text.format")
    error = sdk.fails("respond", server, asking(script.will(Fault(status=429)), "default"))
    assert error["class"] == "RateLimitError"


@MODELS
def test_a_failure_in_the_middle_of_a_stream_is_seen_and_raised(
    model: str, sdk: Sdk, server: Server, script: Script
) -> None:
    question = script.will(Fault(after=3, error={"message": "overheated"}, answer="a b c d e f"))
    with script.slowly(0.1):
        saw = sdk.tell("respond_stream", server, asking(question, model))
    assert saw["events"][-1]["type"] == "response.failed"
    assert saw["events"][-1]["response"]["error"]["code"] == "server_error"
    assert saw["error"]["code"] == "upstream_unavailable"
