"""What a model was shown and said, where it is captured: its shape, its limits, and that it is redacted everywhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.collecting import Sink

from asmodel import trace_reader, tracing
from asmodel.calls import (
    Call,
    Chat,
    Completion,
    Embed,
    Message,
    Reply,
    Score,
    TokenLogprob,
    ToolCall,
    Usage,
)
from asmodel.trace_content import HIDDEN, VARIABLE, Content, Redactor, read
from asmodel.trace_export import Tracing

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks up.", "parameters": {"a": 1}},
}
CALL = Chat(
    identity="m",
    messages=(
        Message("system", "Be brief."),
        Message("user", [{"type": "text", "text": "What rang?"}, {"type": "image_url", "image_url": {"url": "u:1"}}]),
        Message("assistant", None, tool_calls=(ToolCall(id="c1", name="look_up", arguments='{"word": "bell"}'),)),
        Message("tool", '{"meaning": "a bell"}', tool_call_id="c1"),
    ),
    params={"stop": ["END", "."]},
    tools=(TOOL,),
)
REPLY = Reply(text="The bell.", reasoning="Hm.", finish="length", usage=Usage(prompt_tokens=3, completion_tokens=2))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "SPAN_ONLY")


@contextmanager
def spans(redact: Redactor | None = None, **more: Any) -> Generator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    traces = Tracing(processors=[SimpleSpanProcessor(exporter)], redact=redact, **more)
    try:
        yield exporter
    finally:
        traces.shutdown()


def content(span: ReadableSpan) -> dict[str, Any]:
    """The span's content, by the last words of its attributes' names."""
    of = dict(span.attributes or {})
    return {
        name.removeprefix("gen_ai."): orjson.loads(str(of[name]).encode()) for name in tracing.CONTENT if name in of
    }


def call(call: Call = CALL, reply: Reply = REPLY) -> None:
    with tracing.call_span(call, upstream="u", provider="p", model="m", address=None, stream=False) as span:
        tracing.record_reply(span, reply, first_delta=None, call=call)


def step(reply: Reply, of: Call = CALL) -> None:
    with tracing.step_span("verdict", program="p", kind=of.kind, draw=None) as span:
        if reply.source == "bought":
            call(of, reply)
        tracing.record_step(span, reply, asks=1, call=of)


def everything() -> None:
    """Whatever can hold content, once."""
    with tracing.run_span("p", digest=None, run_id="r1", nested=False) as run:
        tracing.record_asked(run, CALL.messages)
        step(REPLY)
        step(replace(REPLY, source="hit"))
        call(Completion(identity="m", prompt="Once", params={"stop": "\n"}), Reply(text=" upon a time"))
        call(Score(identity="m", context="The bell", continuation=" rang"), Reply())
        call(Embed(identity="m", texts=("bell",)), Reply(embeddings=((1.0,),)))
        with tracing.tool_span("look_up", call_id=None, arguments={"word": "bell"}) as tool:
            tracing.record_tool(tool, {"meaning": "a bell"})
        tracing.record_answer(run, "It rang.", "stop")


def test_nothing_is_captured_unless_it_is_asked_for() -> None:
    with spans() as exporter:
        everything()
    for span in exporter.get_finished_spans():
        assert not content(span)
        assert tracing.REQUEST_STOP not in (span.attributes or {}), "a client's words, as they may be"


def test_a_chat_is_in_the_parts_shape_of_the_conventions(capture: None) -> None:
    with spans() as exporter:
        call()
    (span,) = exporter.get_finished_spans()
    assert content(span) == {
        "system_instructions": [{"type": "text", "content": "Be brief."}],
        "input.messages": [
            {
                "role": "user",
                "parts": [
                    {"type": "text", "content": "What rang?"},
                    {"type": "uri", "modality": "image", "uri": "u:1"},
                ],
            },
            {
                "role": "assistant",
                "parts": [{"type": "tool_call", "id": "c1", "name": "look_up", "arguments": {"word": "bell"}}],
            },
            {
                "role": "tool",
                "parts": [{"type": "tool_call_response", "id": "c1", "response": {"meaning": "a bell"}}],
            },
        ],
        "output.messages": [
            {
                "role": "assistant",
                "parts": [{"type": "reasoning", "content": "Hm."}, {"type": "text", "content": "The bell."}],
                "finish_reason": "length",
            }
        ],
        "tool.definitions": [
            {"type": "function", "name": "look_up", "description": "Looks up.", "parameters": {"a": 1}}
        ],
    }
    assert (span.attributes or {})[tracing.REQUEST_STOP] == ("END", ".")


def test_raw_text_and_scores_are_messages_too(capture: None) -> None:
    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "parts": [{"type": "text", "content": text}]}

    with spans() as exporter:
        call(Completion(identity="m", prompt="Once"), Reply(text=" upon a time"))
        measured = Reply(logprobs=(TokenLogprob(" rang", -1.5), TokenLogprob("!", -0.5)))
        call(Score(identity="m", context="The bell", continuation=" rang!"), measured)
        call(Embed(identity="m", texts=("bell", "tower")), Reply(embeddings=((1.0,), (2.0,))))
    completion, score, embed = map(content, exporter.get_finished_spans())
    assert completion == {
        "input.messages": [said("user", "Once")],
        "output.messages": [{**said("assistant", " upon a time"), "finish_reason": "stop"}],
    }
    assert score["input.messages"] == [said("user", "The bell"), said("assistant", " rang!")]
    (part,) = score["output.messages"][0]["parts"]
    assert part == {"type": "loglikelihood", "nats": -2.0, "tokens": 2}
    assert embed == {"input.messages": [said("user", "bell"), said("user", "tower")]}


def test_a_step_that_bought_nothing_says_itself_what_was_shown_and_said(capture: None) -> None:
    with spans() as exporter:
        step(REPLY)
        step(replace(REPLY, source="hit"))
        step(replace(REPLY, source="joined"))
    bought_call, bought, hit, joined = exporter.get_finished_spans()
    assert content(bought) == {}, "it is on the call"
    assert content(hit) == content(joined) == content(bought_call) != {}


def test_a_run_says_what_it_was_asked_and_answered_and_a_tool_what_it_was_given_and_gave(capture: None) -> None:
    with spans() as exporter:
        everything()
    found = {span.name: content(span) for span in exporter.get_finished_spans()}
    assert found["invoke_workflow p"]["output.messages"][0]["parts"] == [{"type": "text", "content": "It rang."}]
    assert found["invoke_workflow p"]["input.messages"][0]["role"] == "system"
    assert found["execute_tool look_up"] == {
        "tool.call.arguments": {"word": "bell"},
        "tool.call.result": {"meaning": "a bell"},
    }


def test_a_call_that_fails_shows_what_it_was_asked(capture: None) -> None:
    def fails() -> None:
        with tracing.call_span(CALL, upstream="u", provider="p", model="m", address=None, stream=False):
            raise ValueError

    with spans() as exporter, pytest.raises(ValueError, match=r"^$"):
        fails()
    (span,) = exporter.get_finished_spans()
    assert "input.messages" in content(span)
    assert "output.messages" not in content(span)


def test_a_picture_inside_of_a_message_is_not_kept_but_for_its_size(capture: None) -> None:
    data = "data:image/png;base64," + "A" * 50_000
    parts: list[Mapping[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "of the future", "secret": "x"},
    ]
    with spans() as exporter:
        call(Chat(identity="m", messages=(Message("user", parts),)))
    (span,) = exporter.get_finished_spans()
    assert content(span)["input.messages"][0]["parts"] == [
        {"type": "uri", "modality": "image", "uri": "data:image/png;base64,… 50000 characters"},
        {"type": "blob", "modality": "audio", "mime_type": "audio/wav", "bytes": 3},
        {"type": "of the future"},
    ]


# -- redaction ------------------------------------------------------------------------------------------------------


def loud(kind: str, text: str) -> str:
    return text.upper()


def test_every_text_goes_through_the_redactor(capture: None, tmp_path: Path) -> None:
    kinds: set[str] = set()

    def redact(kind: str, text: str) -> str:
        kinds.add(kind)
        return "XXX"

    path = tmp_path / "state" / "traces.sqlite"
    with spans(redact, local=path) as exporter:
        everything()
    assert kinds == {
        "system",
        "user",
        "assistant",
        "reasoning",
        "prompt",
        "completion",
        "context",
        "continuation",
        "input",
        "uri",
        "stop",
        "tool.definition",
        "tool.arguments",
        "tool.result",
    }
    sent = "".join(span.to_json() for span in exporter.get_finished_spans())
    kept = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert "XXX" in sent
    assert b"XXX" in kept
    for word in ("bell", "Bell", "brief", "Once", "rang", "upon", "Hm.", "Looks"):
        assert word not in sent
        assert word.encode() not in kept
    assert trace_reader.runs(path)


def test_json_that_a_redactor_leaves_whole_stays_json_and_is_a_text_otherwise(capture: None) -> None:
    with spans(lambda kind, text: text.replace('"bell"', "[gone")) as exporter:
        call()
    (span,) = exporter.get_finished_spans()
    messages = content(span)["input.messages"]
    assert messages[1]["parts"][0]["arguments"] == '{"word": [gone}'
    assert messages[2]["parts"][0]["response"] == {"meaning": "a bell"}


@pytest.mark.parametrize("wrong", [None, 7, b"bell"])
def test_a_redactor_that_fails_hides_the_text_and_the_log_does_not_quote_it(
    capture: None, caplog: pytest.LogCaptureFixture, wrong: object
) -> None:
    def redact(kind: str, text: str) -> str:
        if wrong is None:
            raise RuntimeError(text)
        return wrong  # type: ignore[return-value]  # what a plug-in may do

    with spans(redact) as exporter:
        everything()
    sent = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert HIDDEN in sent
    assert "bell" not in sent
    assert "the redactor failed on a text of the kind user" in caplog.text
    assert "bell" not in caplog.text


# -- limits ---------------------------------------------------------------------------------------------------------


def test_long_texts_are_cut_at_their_end_inside_of_the_json(capture: None) -> None:
    long = Chat(identity="m", messages=tuple(Message("user", f"{n}: " + "word " * 10_000) for n in range(5)))
    with spans(content_bytes=10_000) as exporter:
        call(long)
    (span,) = exporter.get_finished_spans()
    text = str((span.attributes or {})["gen_ai.input.messages"])
    assert len(text.encode()) <= 10_000
    messages = content(span)["input.messages"]
    assert [m["parts"][0]["content"][:2] for m in messages] == ["0:", "1:", "2:", "3:", "4:"]
    assert "more characters]" in messages[4]["parts"][0]["content"]


def test_of_very_many_messages_the_first_and_the_last_are_kept(capture: None) -> None:
    many = Chat(identity="m", messages=tuple(Message("user", f"message {n}") for n in range(2_000)))
    with spans(content_bytes=5_000) as exporter:
        call(many)
    (span,) = exporter.get_finished_spans()
    messages = content(span)["input.messages"]
    assert messages[0]["parts"][0]["content"] == "message 0"
    assert messages[-1]["parts"][0]["content"] == "message 1999"
    between = messages[1]
    assert between["role"] == "omitted"
    assert between["parts"][0]["content"] == f"… {2_000 - (len(messages) - 1)} more"


def test_the_sdks_own_limit_does_not_cut_the_json(capture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "2000")
    with spans() as exporter:
        call(Chat(identity="m", messages=(Message("user", "word " * 5_000),)))
    (span,) = exporter.get_finished_spans()
    assert content(span)["input.messages"][0]["parts"][0]["content"].startswith("word word")


def test_what_is_captured_is_whole_in_the_local_file(capture: None, tmp_path: Path) -> None:
    path = tmp_path / "state" / "traces.sqlite"
    long = Chat(identity="m", messages=tuple(Message("user", "word " * 2_000) for _ in range(3)))
    with spans(local=path), tracing.run_span("p", digest=None, run_id="r1", nested=False) as run:
        run.set_attribute("long", "x" * 40_000)
        tracing.record_asked(run, long.messages)
        tracing.record_answer(run, "word " * 2_000, "stop")
    (node,) = trace_reader.spans(path, "r1").roots
    for name in (tracing.INPUT_MESSAGES, tracing.OUTPUT_MESSAGES):
        assert orjson.loads(node.attributes[name])[0]["parts"]
    assert len(node.attributes["long"]) == 1_001, "what has not been cut before is cut there"


def _repeated(text: str, times: int) -> str:
    return text * times


TEXTS: st.SearchStrategy[str] = st.text(max_size=60) | st.builds(_repeated, st.text(max_size=5), st.integers(0, 900))
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXTS, inner, max_size=6),
    max_leaves=20,
)
PARTS = st.lists(st.dictionaries(st.sampled_from(["type", "text", "x"]), TEXTS, max_size=3), max_size=4)
MESSAGES = st.builds(
    Message,
    st.sampled_from(["user", "system", "assistant", "tool", "other"]),
    TEXTS
    | st.none()
    | st.lists(st.dictionaries(st.sampled_from(["type", "text", "x"]), TEXTS, max_size=3), max_size=4),
    name=TEXTS | st.none(),
    tool_calls=st.lists(st.builds(ToolCall, id=TEXTS, name=TEXTS, arguments=TEXTS), max_size=3).map(tuple),
    tool_call_id=TEXTS | st.none(),
)


@given(st.lists(MESSAGES, max_size=12), JSON_VALUES, st.integers(200, 5_000))
def test_whatever_is_captured_is_json_within_its_limit(messages: list[Message], value: object, limit: int) -> None:
    capture = Content(limit=limit)
    tool: dict[str, Any] = {"type": "function", "function": {"parameters": value}}
    chat = Chat(identity="m", messages=tuple(messages), tools=(tool,))
    shown = [
        *capture.asked(chat),
        capture.answered(chat, Reply(text="".join(m.text for m in messages if isinstance(m.content, str)))),
        capture.value("tool.result", value),
    ]
    for text in shown:
        if text is not None:
            assert len(text.encode()) <= limit
            orjson.loads(text)
    for message in orjson.loads(str(shown[1])):
        assert isinstance(message["role"], str)
        assert all(isinstance(part["type"], str) for part in message["parts"])


# -- the variables, and events --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "on_spans", "in_events"),
    [("SPAN_ONLY", True, False), ("event_only", False, True), ("SPAN_AND_EVENT", True, True), ("true", True, False)],
)
def test_the_variable_says_where_content_goes(said: str, on_spans: bool, in_events: bool) -> None:
    found = read({VARIABLE: said})
    assert found is not None
    assert (found.on_spans, found.in_events) == (on_spans, in_events)


def test_a_word_that_is_not_known_captures_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for off in ("", "NO_CONTENT", "false"):
        assert read({VARIABLE: off}) is None
    assert caplog.text == ""
    assert read({VARIABLE: "everything"}) is None
    assert "SPAN_ONLY" in caplog.text


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


def test_events_are_log_records_of_the_calls_span(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    monkeypatch.setenv(VARIABLE, "EVENT_ONLY")
    traces = tracing.configure(local=None, redact=loud)
    call()
    assert traces.shutdown()
    (event,) = sink.events
    assert event.event_name == "gen_ai.client.inference.operation.details"
    found = {pair.key: pair.value for pair in event.attributes}
    assert found["gen_ai.operation.name"].string_value == "chat"
    (message, *_) = found["gen_ai.input.messages"].array_value.values
    assert "WHAT RANG?" in str(message)
    assert "What rang?" not in str(event)
    (span,) = sink.requests[0].resource_spans[0].scope_spans[0].spans
    assert event.span_id == span.span_id
    assert not [pair.key for pair in span.attributes if pair.key in tracing.CONTENT]


def test_events_that_have_nowhere_to_go_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "EVENT_ONLY")
    with spans() as exporter:
        call()
    assert not content(exporter.get_finished_spans()[0])
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "SPAN_ONLY" in warning
