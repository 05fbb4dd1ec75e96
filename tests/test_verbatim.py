"""A passed-through upstream's own bytes: what it is sent, what its client gets, and what goes wrong between."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer, ServerAnswer

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}, "index": 0}
WHOLE: dict[str, Any] = {
    "id": "theirs-1",
    "object": "chat.completion",
    "created": 7,
    "model": "their-model-0613",
    "system_fingerprint": "fp_1",
    "service_tier": "flex",
    "x_unknown": {"deep": [1.50, None, "ü"]},
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "reasoning_content": "thought",
                "annotations": [{"type": "url_citation"}],
                "tool_calls": [CALL],
            },
            "logprobs": {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]},
            "finish_reason": "tool_calls",
            "content_filter_results": {"hate": {"filtered": False}},
        },
        {"index": 1, "message": {"role": "assistant", "content": "second"}, "finish_reason": "length"},
    ],
    "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16, "queue_time": 0.25},
}
# Spaces and an order of their own, by which it is seen that nothing was read and written again.
RAW = json.dumps(WHOLE, indent=1).encode()


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": "theirs-2",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "choices": [choice],
        **more,
    }


USAGE: dict[str, Any] = {
    **chunk({}),
    "choices": [],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}
CHUNKS = [
    {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": [{"index": 0}]},
    chunk({"role": "assistant", "content": ""}, obfuscation="xyz"),
    chunk({"reasoning": "hm"}, x_unknown=[1.50]),
    chunk({"content": "Hel"}),
    {**chunk({}), "choices": [{"index": 1, "delta": {"content": "other"}, "finish_reason": None}]},
    chunk({"content": "lo\n\nü"}),
    chunk({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
    chunk({}, "stop", timings={"ms": 1.25}),
]


def events(chunks: list[dict[str, Any]], *, done: bool = True) -> bytes:
    lines = [b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


class Upstream(ScriptedServer):
    """Sends the bytes that it is told to."""

    def __init__(self) -> None:
        self.says: Callable[[dict[str, Any]], ServerAnswer] = lambda body: None
        self.fault: Callable[[Received], Fault | None] = lambda received: None
        super().__init__(lambda body: self.says(body), faults=lambda received: self.fault(received))

    def raw(self, body: bytes, *, stream: bool = False) -> None:
        kind = "text/event-stream" if stream else "application/json"
        self.fault = lambda received: Fault(body=body, content_type=kind)

    @property
    def last(self) -> dict[str, Any]:
        return self.requests[-1].body


@pytest.fixture(scope="module")
def started() -> Iterator[Upstream]:
    server = Upstream()
    with server:
        yield server


@pytest.fixture
def up(started: Upstream) -> Upstream:
    started.says = lambda body: None
    started.fault = lambda received: None
    started.delay = started.token_delay = 0.0
    started.clear()
    return started


@pytest.fixture(scope="module")
def server(started: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = (
        upstream(started.base_url, retries=0)
        + upstream(started.base_url, "priced", retries=0)
        + "price = { input = 1.0, output = 2.0 }\n"
        + upstream(started.base_url, "translated", kind="litellm", retries=0).replace('"scripted"', '"openai/scripted"')
        + upstream("http://127.0.0.1:9/v1", "mixed", retries=0, equals=["translated"])
        + '[models.dear]\nprogram = "plain"\nroles = { default = "plain:default" }\n'
    )
    with serving(tmp_path_factory.mktemp("verbatim"), settings, env={"OPENAI_API_KEY": "unused"}) as running:
        yield running


HELLO: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}


def streamed(server: Server, **more: Any) -> bytes:
    answer = server.chat({**HELLO, "stream": True, **more})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    return answer.body


def chunks_of(data: bytes) -> list[dict[str, Any]]:
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert lines.count(b"[DONE]") == 1
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- what the client gets ----


def test_a_body_reaches_the_client_byte_for_byte(server: Server, up: Upstream) -> None:
    up.raw(RAW)
    answer = server.chat({**HELLO, "n": 2})
    assert answer.body == RAW
    assert up.last["n"] == 2
    assert len(up.requests) == 1
    assert answer.headers["x-asmodel-upstream-calls"] == "1"


def test_chunks_reach_the_client_byte_for_byte(server: Server, up: Upstream) -> None:
    up.raw(events([*CHUNKS, USAGE]), stream=True)
    assert streamed(server, stream_options={"include_usage": True}) == events([*CHUNKS, USAGE])


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_usage_comes_only_to_those_who_ask_and_is_counted_all_the_same(
    server: Server, up: Upstream, options: dict[str, Any] | None
) -> None:
    up.raw(events([*CHUNKS, USAGE]), stream=True)
    more = {} if options is None else {"stream_options": options}
    assert streamed(server, **more) == events(CHUNKS)
    eventually("it is counted", lambda: "tokens=3+2" in server.said.splitlines()[-1])


def test_usage_in_the_last_chunk_of_an_answer_stays_where_it_is(server: Server, up: Upstream) -> None:
    last = chunk({}, "stop", usage=USAGE["usage"])
    up.raw(events([CHUNKS[3], last]), stream=True)
    assert streamed(server) == events([CHUNKS[3], last])


def test_done_is_said_once_whether_or_not_the_upstream_says_it(server: Server, up: Upstream) -> None:
    for done in (True, False):
        up.raw(events(CHUNKS, done=done), stream=True)
        assert streamed(server) == events(CHUNKS)


def test_comments_and_strange_line_ends_are_no_part_of_the_chunks(server: Server, up: Upstream) -> None:
    sent = b": PROCESSING\r\n\r\n" + events(CHUNKS).replace(b"data: ", b"event: x\r\nid: 5\r\ndata:").replace(
        b"\n\n", b"\r\n\r\n"
    )
    up.raw(sent, stream=True)
    assert streamed(server) == events(CHUNKS)


def test_an_event_of_several_lines_stays_one_event(server: Server, up: Upstream) -> None:
    lines = json.dumps(CHUNKS[3], indent=1).encode()
    up.raw(b"data: " + lines.replace(b"\n", b"\ndata: ") + b"\n\n" + events(CHUNKS[-1:]), stream=True)
    said = streamed(server)
    assert said == b"data: " + lines.replace(b"\n", b"\ndata: ") + b"\n\n" + events(CHUNKS[-1:])


def test_a_server_that_does_not_stream_is_streamed_in_its_place(server: Server, up: Upstream) -> None:
    up.raw(RAW)
    first, second = chunks_of(streamed(server, stream_options={"include_usage": True}))
    assert first["choices"][0]["delta"] == {**WHOLE["choices"][0]["message"], "tool_calls": [{**CALL, "index": 0}]}
    assert first["choices"][0]["logprobs"] == WHOLE["choices"][0]["logprobs"]
    assert [c["finish_reason"] for c in first["choices"]] == ["tool_calls", "length"]
    assert first["x_unknown"] == WHOLE["x_unknown"]
    assert "usage" not in first
    assert (second["choices"], second["usage"]) == ([], WHOLE["usage"])
    (alone,) = chunks_of(streamed(server))
    assert "usage" not in alone


def test_chunks_are_passed_on_as_they_come(server: Server, up: Upstream) -> None:
    up.token_delay = 0.1
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**HELLO, "stream": True}), {"content-type": "application/json"}
    )
    came = [time.monotonic() for line in connection.getresponse() if line.startswith(b"data: {")]
    connection.close()
    assert len(came) >= 4
    assert came[-1] - came[0] > 0.15


def test_a_silent_upstream_is_filled_in_for_with_comments_alone(server: Server, up: Upstream) -> None:
    up.fault = lambda received: Fault(delay=6.5, body=events(CHUNKS), content_type="text/event-stream")
    said = streamed(server)
    assert said.replace(b": keep-alive\n\n", b"") == events(CHUNKS)
    assert said.startswith(b": keep-alive\n\n" * 2)


# ---- what the upstream gets ----


def test_every_field_is_passed_on_as_it_was_sent(server: Server, up: Upstream) -> None:
    sent: dict[str, Any] = {
        "temperature": 1,
        "top_p": 0.10,
        "seed": None,
        "user": None,
        "stop": None,
        "logit_bias": {"50256": -100},
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "reasoning_effort": "minimal",
        "verbosity": "low",
        "prediction": {"type": "content", "content": "x"},
        "tools": [{"type": "function", "function": {"name": "f"}, "cache_control": {"type": "ephemeral"}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "("}}},
        "logprobs": True,
        "top_logprobs": 3,
        "modalities": ["text"],
        "max_completion_tokens": 50,
        "documents": [{"text": "d"}],
        "web_search_options": {},
        "min_p": 0.05,
        "x_unknown": {"deep": [None, 1, 1.5]},
    }
    server.chat({**HELLO, **sent, "asmodel": {"cache": "off"}})
    assert up.last == {"model": "scripted", "messages": HELLO["messages"], **sent}


@pytest.mark.parametrize("model", ["default", "plain"])
def test_messages_reach_the_upstream_as_they_were_sent(server: Server, up: Upstream, model: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {
            "role": "user",
            "name": "ann",
            "content": [
                {"type": "text", "text": "What is this?", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                {"type": "file", "file": {"file_id": "f-1"}},
                {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I should look.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{ "at":1 }'},
                    "extra_content": {"google": {"thought_signature": "c2ln"}},
                },
                {"id": "c2", "type": "custom", "custom": {"name": "grep", "input": "x"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "assistant", "content": "A cat.", "refusal": None, "audio": {"id": "a-1"}},
        {"role": "user", "content": "Sure?"},
    ]
    assert server.chat({"model": model, "messages": messages}).status == 200
    assert up.last["messages"] == messages


def test_what_is_asked_of_the_stream_is_passed_on(server: Server, up: Upstream) -> None:
    streamed(server, stream_options={"include_usage": False, "include_obfuscation": False, "x": 1})
    assert up.last["stream_options"] == {"include_usage": True, "include_obfuscation": False, "x": 1}
    server.chat(HELLO)
    assert "stream_options" not in up.last


# ---- what goes wrong ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault(status=400, code="context_length_exceeded"), 400, "context_length_exceeded"),
        (Fault(status=401), 502, "upstream_auth"),
        (Fault(status=404), 502, "upstream_model_not_found"),
        (Fault(status=429, headers={"retry-after-ms": "120000"}), 429, "upstream_rate_limited"),
        (Fault(status=500), 503, "upstream_unavailable"),
        (Fault(error={"message": "no", "code": 429}), 429, "upstream_rate_limited"),
        (Fault(body=b"<html>"), 502, "upstream_broken"),
        (Fault(body=b'{"choices": []}'), 502, "upstream_broken"),
    ],
)
def test_what_goes_wrong_before_the_first_byte_is_a_status(
    server: Server, up: Upstream, fault: Fault, status: int, code: str, stream: bool
) -> None:
    up.fault = lambda received: fault
    answer = server.chat({**HELLO, "stream": stream})
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.headers["x-asmodel-upstream-calls"] == "1"
    assert "asmodel" not in answer.json
    if status == 429 and fault.headers:
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("60", "60000")


def test_what_goes_wrong_after_the_stream_was_opened_in_silence_is_its_only_event(server: Server, up: Upstream) -> None:
    up.fault = lambda received: Fault(status=429, delay=1.4)
    comment, event, end = streamed(server).split(b"\n\n")
    assert (comment, end) == (b": keep-alive", b"")
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "upstream_rate_limited"


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (events(CHUNKS[:4], done=False), "upstream_broken"),
        (
            events(CHUNKS[:4], done=False) + b'data: {"error": {"message": "oom", "code": 503}}\n\n',
            "upstream_unavailable",
        ),
        (events(CHUNKS[:4], done=False) + b"data: nonsense\n\n", "upstream_broken"),
        (events([*CHUNKS[:4], chunk({}, "error")]), "upstream_unavailable"),
    ],
)
def test_what_goes_wrong_later_is_the_last_event_and_the_call_is_not_made_again(
    server: Server, up: Upstream, broken: bytes, code: str
) -> None:
    up.raw(broken, stream=True)
    said = streamed(server)
    *_, last, end = said.split(b"\n\n")
    assert end == b""
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert said.startswith(events(CHUNKS[:4], done=False))
    assert b"[DONE]" not in said
    assert len(up.requests) == 1


def test_an_answer_of_a_gigantic_size_is_given_up(server: Server, up: Upstream) -> None:
    up.raw(b'{"choices": [{"message": {"content": "' + b"x" * 70_000_000 + b'"}}]}')
    answer = server.chat(HELLO)
    assert (answer.status, answer.error["code"]) == (502, "upstream_broken")


# ---- upstreams that are translated, and cached ones ----


def test_an_upstream_of_another_kind_is_translated(server: Server, up: Upstream) -> None:
    up.says = lambda body: "Hello there."
    whole = server.chat({**HELLO, "model": "translated", "n": 2, "temperature": 0.5}).json
    assert [c["message"]["content"] for c in whole["choices"]] == ["Hello there."] * 2
    assert whole["model"] == "translated"
    assert whole["usage"]["total_tokens"] > 0
    assert "asmodel" not in whole
    first, *rest = chunks_of(streamed(server, model="translated", stream_options={"include_usage": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert rest[-1]["choices"] == []
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in rest[:-1]) == "Hello there."


def test_an_equal_of_another_kind_that_steps_in_is_translated_too(server: Server, up: Upstream) -> None:
    up.says = lambda body: "In its place."
    whole = server.chat({**HELLO, "model": "mixed", "n": 2}).json
    assert [c["message"]["content"] for c in whole["choices"]] == ["In its place."] * 2
    for delay in (0.0, 1.5):
        up.delay = delay
        first, *rest = chunks_of(streamed(server, model="mixed"))
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in rest) == "In its place."
        assert len(rest) > 2, "as it came"
        assert rest[-1]["choices"][0]["finish_reason"] == "stop"


def test_what_is_cached_on_request_is_not_bought_again_and_then_not_verbatim(server: Server, up: Upstream) -> None:
    up.raw(RAW)
    asked = {**HELLO, "messages": [{"role": "user", "content": "cached"}], "asmodel": {"cache": "on"}}
    first, second = server.chat(asked), server.chat(asked)
    assert len(up.requests) == 1
    assert first.json["choices"] == second.json["choices"]
    assert first.json["choices"][0]["message"]["tool_calls"][0]["id"] == "c1"
    assert second.headers["x-asmodel-cache-hits"] == "1"
    assert second.json["usage"]["total_tokens"] == 0


# ---- limits ----


def test_a_cost_that_cannot_be_known_is_not_limited(server: Server, up: Upstream) -> None:
    limits = {"asmodel": {"limits": {"cost": 1.0}}}
    for model in ("default", "plain", "plain:default", "plain:plain:default", "dear"):
        answer = server.chat({**HELLO, "model": model, **limits})
        assert (answer.status, answer.error["param"]) == (400, "asmodel.limits.cost"), model
        assert '"default"' in answer.error["message"]
    assert up.requests == []
    for model in ("priced", "plain:priced", "plain:plain:priced"):
        assert server.chat({**HELLO, "model": model, **limits}).status == 200
    roles = {"asmodel": {"limits": {"cost": 1.0}, "roles": {"default": "priced"}}}
    assert server.chat({**HELLO, "model": "plain", **roles}).status == 200


def test_a_deadline_ends_a_call_that_is_passed_through(server: Server, up: Upstream) -> None:
    up.delay = 20.0
    began = time.monotonic()
    answer = server.chat({**HELLO, "asmodel": {"limits": {"seconds": 0.3}}})
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 5
