"""The shapes of the wire, with no server: what is read, what is refused, and that a stream adds up to the body."""

from __future__ import annotations

import json
import string
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel import wire
from asmodel.calls import Delta, Reply, TokenLogprob, ToolCall, ToolCallDelta, Usage
from asmodel.errors import InvalidRequest
from asmodel.programs import Answer, Program, program
from asmodel.run import Run

BODY: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}


def read(**more: Any) -> wire.ChatRequest:
    return wire.read_chat(json.dumps({**BODY, **more}).encode())


def refusal(**more: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(**more)
    return caught.value


@program("text-only")
async def text_only(run: Run) -> str:
    """Says nothing."""
    return ""


@program("seeing", supports=["images", "tools"])
async def seeing(run: Run) -> str:
    """Says nothing either."""
    return ""


# ---- reading ----

texts = st.text(max_size=12)
numbers = st.floats(allow_nan=False) | st.integers() | st.integers(10**30, 10**40)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
fields = st.sampled_from([*wire.ChatRequest.model_fields, "functions", "copy", "model_extra", "asked", "user"])


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_as_an_invalid_request_or_read(body: bytes) -> None:
    with suppress(InvalidRequest):
        wire.read_chat(body)


@given(st.dictionaries(fields | texts, anything, max_size=6))
def test_json_of_any_kind_is_refused_as_an_invalid_request_or_read(more: dict[str, Any]) -> None:
    for body in (more, {**BODY, **more}):
        with suppress(InvalidRequest):
            request = wire.read_chat(json.dumps(body).encode())
            for target in (text_only, seeing):
                wire.refuse_unsupported(request, target)
                hints, shape, ignored = wire.split(request, target)
                assert not set(hints) & set(shape)
                assert not set(ignored) & (set(hints) | set(shape))
            assert all(message.wire() for message in request.conversation)
            assert request.texts is not None


@given(
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "robot"]), "content": anything}),
        max_size=3,
    )
)
def test_messages_of_any_kind_are_refused_or_read(messages: list[Any]) -> None:
    with suppress(InvalidRequest):
        assert len(read(messages=messages).conversation) == len(messages)


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage", "true or false"),
        ({"model": None}, "model", "text"),
        ({"model": ""}, "model", "not be empty"),
        ({"messages": []}, "messages", "not be empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'developer'"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text or a list"),
        ({"temperature": "0.5"}, "temperature", "a number"),
        ({"temperature": 5}, "temperature", "less than or equal to 2"),
        ({"temperature": True}, "temperature", "a number"),
        ({"max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"stop": 5}, "stop", "text or a list"),
        ({"stop": list("abcde")}, "stop", "at most 4 items, not 5"),
        ({"tools": [5]}, "tools.0", "an object"),
        ({"logit_bias": {"strange": "x"}}, "logit_bias.strange", "a number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"asmodel": {"parms": {}}}, "asmodel.parms", "no such field"),
        ({"asmodel": {"cache": "sometimes"}}, "asmodel.cache", "'refresh'"),
        ({"asmodel": {"limits": {"calls": 0}}}, "asmodel.limits.calls", "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_what_would_be_right(
    more: dict[str, Any], param: str, says: str
) -> None:
    error = refusal(**more)
    assert error.param == param
    assert error.message.startswith(f"`{param}`")
    assert says in error.message


def test_a_refusal_never_repeats_a_value_that_was_sent() -> None:
    secret = "my-diary-says"
    for more in ({"temperature": secret}, {"messages": [{"role": secret}]}, {"asmodel": {"cache": secret}}):
        assert secret not in refusal(**more).message


def test_a_body_that_is_nested_too_deeply_is_refused_and_one_that_is_deep_is_not() -> None:
    def nested(depth: int) -> Any:
        return {"a": nested(depth - 1)} if depth else 1

    assert read(metadata=nested(90)).asked
    assert "nested more than 100 deep" in refusal(metadata=nested(150)).message
    with pytest.raises(InvalidRequest):
        wire.read_chat(b'{"model": ' + b"[" * 50_000)


def test_null_counts_as_absent_and_names_of_pythons_own_are_only_names() -> None:
    request = read(temperature=None, copy=1, asked=2, seed=3)
    assert request.asked == {"copy": 1, "asked": 2, "seed": 3}


def test_documents_become_texts_for_a_program_and_go_on_as_they_are_to_an_upstream() -> None:
    documents = [{"text": "whales sing", "title": "Whales", "id": "w", "vendor": 1}, "dogs bark"]
    request = read(documents=documents)
    assert [(d.text, d.title, d.id) for d in request.texts] == [("whales sing", "Whales", "w"), ("dogs bark", "", "")]
    assert request.passed_on == {"documents": documents}
    with pytest.raises(InvalidRequest, match=r"documents\.1"):
        assert read(documents=["fine", {"data": {"text": "not that way"}}]).texts


def test_a_text_file_among_the_messages_is_a_document_and_a_broken_one_is_refused() -> None:
    def file(data: str) -> wire.ChatRequest:
        part = {"type": "file", "file": {"filename": "notes.txt", "file_data": data}}
        return read(messages=[{"role": "user", "content": [{"type": "text", "text": "read"}, part]}])

    assert [(d.text, d.id) for d in file("data:text/plain;base64,aGVsbG8=").texts] == [("hello", "notes.txt")]
    with pytest.raises(InvalidRequest, match="base64"):
        assert file("data:text/plain;base64,!!!").texts


def test_no_field_of_a_message_is_lost() -> None:
    sent = {
        "role": "assistant",
        "content": "let me look",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
    }
    custom = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c2", "type": "custom", "custom": {"name": "x"}}],
    }
    request = read(messages=[sent, custom])
    assert [m.wire() for m in request.conversation] == [sent, custom]


# ---- refusing ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "x"}}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("modalities", ["text", "audio"]),
        ("functions", [{"name": "x"}]),
        ("tool_choice", "required"),
    ],
)
def test_what_would_change_the_shape_of_the_answer_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"`{name}`") as caught:
        wire.refuse_unsupported(read(**{name: value}), text_only)
    assert caught.value.param == name


def test_what_asks_for_nothing_special_is_neither_refused_nor_listed_as_ignored() -> None:
    request = read(tools=[], tool_choice="auto", response_format={"type": "text"}, logprobs=False, modalities=["text"])
    wire.refuse_unsupported(request, text_only)
    assert wire.split(request, text_only) == ({}, {}, [])


@pytest.mark.parametrize(("kind", "sees"), [("image_url", seeing), ("input_audio", None)])
def test_a_program_is_not_given_what_it_cannot_look_at(kind: str, sees: Program[Any, Any] | None) -> None:
    request = read(messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}])
    with pytest.raises(InvalidRequest, match=kind) as caught:
        wire.refuse_unsupported(request, text_only)
    assert caught.value.param == "messages.0.content"
    if sees is not None:
        wire.refuse_unsupported(request, sees)


def test_parameters_are_parted_into_hints_shape_and_what_is_ignored() -> None:
    tools = [{"type": "function", "function": {"name": "x"}}]
    request = read(temperature=0, seed=1, tools=tools, user="me", flavour="sour")
    assert wire.split(request, seeing) == ({"temperature": 0, "seed": 1}, {"tools": tools}, ["user", "flavour"])


# ---- answering ----

words = st.text(string.ascii_letters + 'äß€ \n"\\', max_size=20)
calls = st.builds(
    ToolCall, id=st.text(string.ascii_letters, min_size=1, max_size=4), name=st.just("look"), arguments=words
)
logprobs = st.builds(
    TokenLogprob, words, st.floats(-20, 0), st.tuples() | st.tuples(st.tuples(words, st.floats(-20, 0)))
)
replies = st.builds(
    Reply,
    text=words,
    finish=st.sampled_from(["stop", "length", "content_filter"]),
    reasoning=words,
    refusal=st.none() | words,
    tool_calls=st.lists(calls, max_size=3).map(tuple),
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    usage=st.builds(Usage, prompt_tokens=st.integers(0, 99), completion_tokens=st.integers(0, 99)),
)


def cut(data: st.DataObject, text: str) -> list[str]:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def streamed(data: st.DataObject, reply: Reply) -> list[Delta]:
    """The reply in pieces, as some upstream may have sent it."""
    deltas = [Delta(reasoning=piece) for piece in cut(data, reply.reasoning)]
    deltas += [Delta(text=piece) for piece in cut(data, reply.text)]
    for place, call in enumerate(reply.tool_calls):
        deltas.append(Delta(tool_calls=(ToolCallDelta(place, call.id, call.name),)))
        deltas += [Delta(tool_calls=(ToolCallDelta(place, arguments=a),)) for a in cut(data, call.arguments)]
    return deltas


def put_together(events: bytes) -> dict[str, Any]:
    """What a client makes of a stream: OpenAI's rules, written down once more and independently."""
    *lines, done, end = events.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    message: dict[str, Any] = {"content": None, "refusal": None, "annotations": []}
    choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "finish_reason": None}
    whole: dict[str, Any] = {"choices": [choice]}
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        whole |= {name: chunk[name] for name in ("id", "created", "model")}
        whole["usage"] = chunk["usage"]
        if "asmodel" in chunk:
            whole["asmodel"] = chunk["asmodel"]
        for part in chunk["choices"]:
            assert choice["finish_reason"] is None, "nothing comes after the finish"
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                assert choice["logprobs"] is None
                choice["logprobs"] = part["logprobs"]
            delta = part["delta"]
            message |= {"role": delta["role"]} if "role" in delta else {}
            for name in ("content", "reasoning_content", "refusal"):
                if delta.get(name) is not None:
                    message[name] = (message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", ()):
                made = message.setdefault("tool_calls", [])
                if call["index"] == len(made):
                    made.append(
                        {
                            "id": call["id"],
                            "type": "function",
                            "function": {"name": call["function"]["name"], "arguments": ""},
                        }
                    )
                made[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if message.get("tool_calls"):
        message["content"] = message["content"] or None
    return whole


@given(st.data(), replies, st.booleans())
def test_the_chunks_of_a_stream_put_together_are_the_body_of_the_same_answer(
    data: st.DataObject, reply: Reply, live: bool
) -> None:
    answer = Answer(text=reply.text, finish=reply.finish, tool_calls=reply.tool_calls)
    tokens, receipt = wire.usage(reply.usage), {"steps": 1}
    body = wire.completion("chatcmpl-1", 1, "m", [wire.choice(0, answer, reply)], tokens, receipt)

    chunks, said = wire.Chunks("chatcmpl-1", 1, "m", include_usage=True), wire.Said()
    events = chunks.delta(0, {"role": "assistant", "content": ""})
    for delta in streamed(data, reply) if live else ():
        if brought := said.add(delta):
            events += chunks.delta(0, brought)
    if rest := said.rest(answer, reply):
        events += chunks.delta(0, rest)
    finish = wire.finish_reason(answer)
    events += chunks.delta(0, {}, finish, logprobs=wire.logprobs(reply), receipt=receipt)
    events += chunks.usage(tokens) + wire.DONE

    together = put_together(events)
    body.pop("object")
    assert together == body


def test_usage_counts_what_was_bought_and_is_not_in_the_answer_as_reasoning() -> None:
    bought = Usage(prompt_tokens=10, completion_tokens=7)
    told = wire.usage(bought, visible=2)
    assert told["total_tokens"] == 17
    assert told["completion_tokens_details"]["reasoning_tokens"] == 5
    assert wire.usage(bought, visible=9)["completion_tokens_details"]["reasoning_tokens"] == 0
