"""The shapes of the Responses API, by themselves: requests into chat completions, and answers into responses."""

from __future__ import annotations

import json
from typing import Any, cast

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from asmodel import response_events, response_wire, wire
from asmodel.calls import Delta, Reply, TokenLogprob, ToolCall, ToolCallDelta, Usage
from asmodel.errors import AsmodelError, InvalidRequest, UpstreamRateLimited
from asmodel.programs import Answer
from asmodel.response_events import Draft

ID = "resp_" + "a1" * 12
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def request(**body: Any) -> response_wire.ResponseRequest:
    return response_wire.read(orjson.dumps({"model": "plain", "input": "hello", **body}))


def chat(**body: Any) -> dict[str, Any]:
    """What the request becomes, as it would be sent."""
    asked = request(**body)
    made = response_wire.chat_of(asked, asked.items)
    return {**made.asked, "messages": [message.wire() for message in made.conversation]}


def messages(*items: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    made = chat(input=list(items), **body)["messages"]
    return cast("list[dict[str, Any]]", made)


def refused(**body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        chat(**body)
    assert raised.value.status == 400
    return raised.value


def draft(**body: Any) -> Draft:
    return Draft(response_events.head(request(**body), ID, 1_800_000_000, store=True))


def events(data: bytes) -> list[dict[str, Any]]:
    """Server-sent events, each held against the SDK's own types."""
    told: list[dict[str, Any]] = []
    for event in data.decode().split("\n\n")[:-1]:
        named, _, rest = event.partition("\n")
        body = json.loads(rest.removeprefix("data: "))
        assert named == f"event: {body['type']}"
        EVENT.validate_python(body)
        told.append(body)
    assert [body["sequence_number"] for body in told] == list(range(len(told)))
    return told


# ---- requests ----


def test_a_text_and_instructions_become_messages() -> None:
    assert chat(instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]


def test_parameters_get_the_names_that_they_have_in_a_chat_completion() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    made = chat(
        max_output_tokens=20,
        temperature=0,
        top_p=0.5,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        tools=[{"type": "function", "name": "add", "description": "adds", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "add"},
        parallel_tool_calls=False,
        service_tier="flex",
        metadata={"a": "b"},
        store=False,
        truncation="disabled",
        background=False,
        max_tool_calls=3,
        top_k=5,
        stop=["x"],
    )
    made.pop("messages")
    assert made == {
        "max_completion_tokens": 20,
        "temperature": 0,
        "top_p": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
        "reasoning_effort": "low",
        "verbosity": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        "tools": [
            {
                "type": "function",
                "function": {"name": "add", "description": "adds", "parameters": schema, "strict": True},
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
        "service_tier": "flex",
        "top_k": 5,
        "stop": ["x"],
    }


@pytest.mark.parametrize(
    ("choice", "becomes"),
    [
        ("required", "required"),
        ("none", "none"),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "a"}]},
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "a"}}]},
            },
        ),
    ],
)
def test_a_choice_of_tools_is_translated(choice: Any, becomes: Any) -> None:
    assert chat(tool_choice=choice)["tool_choice"] == becomes


def test_a_turn_of_several_items_is_one_message() -> None:
    assert messages(
        {"role": "user", "content": [{"type": "input_text", "text": "What is 5 + 7?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "step 1/2"}], "content": None},
        {
            "type": "reasoning",
            "id": "rs_2",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Add them."}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I ask ", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
        {"role": "assistant", "content": "the tool."},
        {"type": "function_call_output", "call_id": "c1", "output": "12"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "12"}]},
        {"role": "assistant", "content": "12"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
        {"role": "developer", "content": "Go on."},
    ) == [
        {"role": "user", "content": "What is 5 + 7?"},
        {
            "role": "assistant",
            "content": "I ask the tool.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}},
                {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
            ],
            "reasoning_content": "Add them.",
        },
        {"role": "tool", "tool_call_id": "c1", "content": "12"},
        {"role": "tool", "tool_call_id": "c2", "content": "12"},
        {"role": "assistant", "content": "12"},
        {"role": "assistant", "content": None, "refusal": "No more."},
        {"role": "developer", "content": "Go on."},
    ]


def test_reasoning_without_calls_goes_to_no_model() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    assert messages(thought, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}) == [
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]


def test_parts_of_a_message_become_parts_of_a_message() -> None:
    (message,) = messages(
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look:"},
                {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"},
                {"type": "input_file", "file_data": "data:text/plain,hi", "filename": "a.txt"},
                {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            ],
        }
    )
    assert message["content"] == [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "file", "file": {"file_data": "data:text/plain,hi", "filename": "a.txt"}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ]


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "king", "content": "x"}]}, "input.0.role"),
        ({"input": [USER, {"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.1.call_id"),
        ({"input": [USER, {"type": "function_call_output", "call_id": "c"}]}, "input.1.output"),
        ({"input": [USER, {"type": "web_search_call", "id": "ws_1"}]}, "input.1.type"),
        ({"input": [USER, {"type": "custom_tool_call"}]}, "input.1.type"),
        ({"input": [{"type": {"a": 1}}]}, "input.0.type"),
        ({"input": [{"type": ["message"], "role": "user", "content": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": {"a": 1}, "text": "x"}]}]}, "input.0.content.0.type"),
        ({"tools": [{"type": {"a": 1}}]}, "tools.0.type"),
        ({"tool_choice": {"type": []}}, "tool_choice"),
        ({"text": {"format": {"type": {"a": 1}}}}, "text.format"),
        ({"input": [{"role": "user", "content": [{"type": "video", "url": "x"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input.0.content.0.image_url",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0.file_data"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "http://x"}]}]},
            "input.0.content.0.file_url",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"tone": "calm"}}, "text.tone"),
        ({"include": ["everything"]}, "include.0"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"messages": [USER]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"stop": 5}, "stop"),
        ({"model": ""}, "model"),
        ({"asmodel": {"cahce": "on"}}, "asmodel.cahce"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    error = refused(**body)
    assert error.param == param
    assert "None" not in error.message


def test_what_there_is_none_of_is_welcome_and_listed() -> None:
    asked = request(include=["reasoning.encrypted_content"], reasoning={"mode": "pro"})
    assert asked.without_effect == ["include.reasoning.encrypted_content", "reasoning.mode"]


def test_errors_name_parameters_as_a_response_does() -> None:
    error = InvalidRequest("`response_format.json_schema.schema` is not JSON", param="response_format")
    told = response_wire.renamed(error)
    assert (told.message, told.param) == ("`text.format.schema` is not JSON", "text.format")
    assert error.param == "response_format", "others may be told it too"
    other = InvalidRequest("`temperature` is wrong", param="temperature")
    assert response_wire.renamed(other) is other
    assert response_wire.our_name("messages.3.content") == "input"


# ---- answers ----

TEXTS = st.text(min_size=1, max_size=20)
CALLS = st.lists(st.tuples(st.sampled_from(["add", "look"]), st.text(max_size=20)), max_size=3)


@st.composite
def answers(draw: st.DrawFn) -> tuple[Answer, Reply, list[Delta]]:
    """An answer, and one of the ways in which a run may have said it."""
    text = draw(st.text(max_size=30))
    thought = draw(st.text(max_size=30))
    refusal = draw(st.none() | TEXTS)
    calls = tuple(
        ToolCall(id=f"call_{place}", name=name, arguments=arguments)
        for place, (name, arguments) in enumerate(draw(CALLS))
    )
    finish = draw(st.sampled_from(["stop", "length", "content_filter"]))
    deltas: list[Delta] = []
    if draw(st.booleans()):
        deltas += [Delta(reasoning=part) for part in split(draw, thought)]
        said = [Delta(text=part) for part in split(draw, text)]
        called: list[Delta] = []
        for place, call in enumerate(calls):
            called.append(Delta(tool_calls=(ToolCallDelta(index=place, id=call.id, name=call.name),)))
            called += [
                Delta(tool_calls=(ToolCallDelta(index=place, arguments=part),)) for part in split(draw, call.arguments)
            ]
        order = draw(st.sampled_from(["said first", "called first", "woven"]))
        if order == "woven":
            # Each in its own order, and one among the other: a model may go on talking.
            for delta in called:
                said.insert(draw(st.integers(min(len(said), len(deltas)), len(said))), delta)
            by_call = [d for d in said if d.tool_calls]
            fixed = iter(sorted(by_call, key=called.index))
            deltas += [next(fixed) if d.tool_calls else d for d in said]
        else:
            deltas += [*said, *called] if order == "said first" else [*called, *said]
    answer = Answer(text=text, tool_calls=calls, finish=finish)
    return answer, Reply(text=text, reasoning=thought, refusal=refusal, tool_calls=calls, finish=finish), deltas


def split(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [part for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if (part := text[a:b])]


def finished(made: Draft, answer: Answer) -> dict[str, Any]:
    usage = response_events.usage_of(wire.usage(Usage(prompt_tokens=1, completion_tokens=2)))
    body = made.response(answer, usage, at=1_800_000_001, receipt=None)
    Response.model_validate(orjson.loads(orjson.dumps(body)))
    return body


def whole(answer: Answer, reply: Reply | None) -> dict[str, Any]:
    made = draft()
    made.end(answer, reply)
    return finished(made, answer)


@given(answers())
def test_an_answer_that_comes_back_as_input_is_what_a_chat_would_have_had(
    said: tuple[Answer, Reply, list[Delta]],
) -> None:
    """There and back: output items are input items, and make the assistant's message of a chat completion."""
    answer, reply, deltas = said
    expected = wire.choice(0, answer, reply)["message"]
    streamed = draft()
    for delta in deltas:
        streamed.add(delta)
    streamed.end(answer, reply)
    for output in (whole(answer, reply)["output"], streamed.output):
        sent = request(input=output).items
        (message,) = response_wire.messages_of(sent)
        assert (message["content"] or "") == (expected["content"] or "")
        assert message.get("refusal") == expected["refusal"]
        assert message.get("tool_calls") == expected.get("tool_calls")
        if answer.tool_calls:
            assert message.get("reasoning_content", "") == reply.reasoning
        assert response_wire.messages_of(response_wire.kept(sent, ID)) == [message]


@given(answers(), st.lists(st.integers(0, 5), max_size=4))
def test_the_events_of_a_stream_add_up_to_its_response(
    said: tuple[Answer, Reply, list[Delta]], lines: list[int]
) -> None:
    answer, reply, deltas = said
    made = draft()
    data = made.begin()
    for place, delta in enumerate(deltas):
        if place in lines:
            data += made.line(f"step {place}")
        data += made.add(delta)
    data += made.end(answer, reply)
    response = finished(made, answer)
    data += made.closing(response)
    told = events(data)
    assert [e["type"] for e in told[:2]] == ["response.created", "response.in_progress"]
    assert told[-1]["type"] == ("response.completed" if answer.finish == "stop" else "response.incomplete")
    items: list[Any] = []
    ended: set[int] = set()
    for event in told[2:-1]:
        kind = event["type"].removeprefix("response.")
        place = event["output_index"]
        assert place not in ended, "nothing comes of an item after its end"
        if kind == "output_item.added":
            assert place == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            continue
        item = items[place]
        if kind == "output_item.done":
            ended.add(place)
            assert {**item, "status": event["item"]["status"]} == event["item"]
            items[place] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        part = event.get("part")
        if kind == "content_part.added":
            item.setdefault("content", [])
            assert event["content_index"] == len(item["content"])
            item["content"].append(part)
        elif kind == "reasoning_summary_part.added":
            item["summary"].append(part)
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "refusal.delta":
            item["content"][event["content_index"]]["refusal"] += event["delta"]
        elif kind == "reasoning_summary_text.delta":
            item["summary"][event["summary_index"]]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (event["arguments"], event["name"]) == (item["arguments"], item["name"])
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == item["content"][event["content_index"]]["text"]
        elif kind == "refusal.done":
            assert event["refusal"] == item["content"][event["content_index"]]["refusal"]
        elif kind == "content_part.done":
            assert part == item["content"][event["content_index"]]
        elif kind == "reasoning_summary_text.done":
            assert event["text"] == item["summary"][event["summary_index"]]["text"]
        else:
            assert kind == "reasoning_summary_part.done"
            assert part == item["summary"][event["summary_index"]]
    assert ended == set(range(len(items)))
    assert items == orjson.loads(orjson.dumps(response["output"]))
    assert len({item["id"] for item in items}) == len(items)
    assert all(response_wire.owner_of(item["id"]) == ID for item in items)


def test_an_answer_that_was_cut_off_is_incomplete() -> None:
    response = whole(Answer(text="and then", finish="length"), None)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"
    assert response["completed_at"] is None
    assert whole(Answer(finish="content_filter"), None)["incomplete_details"] == {"reason": "content_filter"}


def test_log_probabilities_come_with_the_text() -> None:
    reply = Reply(text="yes", logprobs=(TokenLogprob("yes", -0.5, (("yes", -0.5), ("no", -1.0))),))
    (part,) = whole(Answer(text="yes"), reply)["output"][0]["content"]
    assert part["logprobs"][0]["logprob"] == -0.5
    assert [top["token"] for top in part["logprobs"][0]["top_logprobs"]] == ["yes", "no"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("no"), "invalid_prompt"),
        (UpstreamRateLimited("too often"), "rate_limit_exceeded"),
        (AsmodelError("broken"), "server_error"),
    ],
)
def test_a_failure_is_told_twice_as_an_end_and_as_an_error(error: AsmodelError, code: str) -> None:
    made = draft()
    data = made.begin() + made.line("thinking") + made.add(Delta(text="I beg")) + made.failed(error, {"steps": 1})
    *_, failed, told = events(data)
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": code, "message": error.message})
    assert response["asmodel"] == {"steps": 1}
    assert response["output"][1]["content"][0]["text"] == "I beg"
    assert response["output"][1]["status"] == "incomplete"
    assert told["error"] == wire.error_body(error)["error"]
    assert (told["code"], told["message"]) == (error.code, error.message)


def test_a_response_says_what_was_asked_for() -> None:
    schema: dict[str, Any] = {"type": "json_schema", "name": "n", "schema": {}}
    body = response_events.head(
        request(
            instructions="i", metadata={"a": "b"}, text={"format": schema}, tools=[{"type": "function", "name": "f"}]
        ),
        ID,
        1_800_000_000,
        store=False,
    )
    Response.model_validate(body)
    assert (body["instructions"], body["metadata"], body["store"]) == ("i", {"a": "b"}, False)
    assert body["text"]["format"] == {**schema, "description": None, "strict": False}
    assert body["tools"] == [{"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}]
    assert (body["temperature"], body["tool_choice"], body["parallel_tool_calls"]) == (1.0, "auto", True)
