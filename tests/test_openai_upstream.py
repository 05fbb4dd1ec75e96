"""An OpenAI-compatible upstream, over real HTTP against a server that is told what to answer."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.timed import in_time, timed

from asmodel.calls import JSON, Chat, Completion, Delta, Embed, Message, Reply, Score, Terms, TokenLogprob, ToolCall
from asmodel.dialect import Assembly, error_of, refusal_of
from asmodel.errors import (
    AsmodelError,
    ConfigurationError,
    Unsupported,
    UpstreamAuth,
    UpstreamBroken,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from asmodel.likelihood import continuation_of, proven
from asmodel.protocols import Detecting, Openable, Upstream
from asmodel.testing import Fault, Received, Scores, ScriptedServer, ServerAnswer, ToyModel
from asmodel_plugins.openai_stream import Events, Stream
from asmodel_plugins.openai_upstream import OpenAIUpstream

KEY = "sk-test-0123456789abcdef"
ASKED = "What is under the lantern?"
CHAT = Chat(identity="i", messages=(Message("user", ASKED),))
PROMPT = Completion(identity="i", prompt="The amber river is", params={"max_tokens": 5})
SCORE = Score(identity="i", context="The lantern is in the grove.\n\nQ:", continuation=" Where is the lantern?")


@asynccontextmanager
async def opened(server: ScriptedServer | str, **options: Any) -> AsyncGenerator[OpenAIUpstream]:
    base_url = server if isinstance(server, str) else server.base_url
    given: dict[str, Any] = {"name": "fast", "base_url": base_url, "model": "m", "api_key": KEY}
    upstream = OpenAIUpstream(**(given | options))
    await upstream.open()
    try:
        yield upstream
    finally:
        await upstream.close()


class Heard:
    """An `emit` that remembers."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    async def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)

    @property
    def text(self) -> str:
        return "".join(d.text for d in self.deltas)

    @property
    def reasoning(self) -> str:
        return "".join(d.reasoning for d in self.deltas)


async def eventually(condition: Callable[[], bool], seconds: float = 1.0) -> float:
    """Wait until it holds; how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen"
        await asyncio.sleep(0.002)
    return time.monotonic() - started


async def failure(
    answer: Callable[[dict[str, Any]], ServerAnswer] | Sequence[ServerAnswer], *, stream: bool = False
) -> AsmodelError:
    with ScriptedServer(answer) as server:
        async with opened(server) as upstream:
            with pytest.raises(AsmodelError) as raised:
                await upstream.send(CHAT, Terms(emit=Heard() if stream else None))
    message = str(raised.value)
    assert KEY not in message
    assert ASKED not in message
    assert '"fast"' in message
    return raised.value


# --- what is sent


async def test_a_chat_is_sent_with_all_that_it_holds() -> None:
    schema: dict[str, JSON] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool: dict[str, JSON] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = Chat(
        identity="i",
        messages=(
            Message("system", "Be brief."),
            Message("user", [{"type": "text", "text": "hi"}]),
            Message("assistant", None, tool_calls=(ToolCall(id="c1", name="look", arguments='{"at": 1}'),)),
            Message("tool", "a lamp", tool_call_id="c1"),
        ),
        params={"temperature": 0.5, "reasoning_effort": "low", "stream": True, "x_unknown": [1]},
        schema=schema,
        tools=(tool,),
    )
    with ScriptedServer() as server:
        async with opened(server, headers={"X-Team": "blue"}) as upstream:
            await upstream.send(call, Terms())
        (received,) = server.requests
    assert received.path == "/v1/chat/completions"
    assert received.headers["authorization"] == f"Bearer {KEY}"
    assert received.headers["x-team"] == "blue"
    assert received.body == {
        "model": "m",
        "messages": [m.wire() for m in call.messages],
        "temperature": 0.5,
        "reasoning_effort": "low",
        "x_unknown": [1],
        "response_format": {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}},
        "tools": [tool],
    }


async def test_without_a_key_no_authorization_is_sent() -> None:
    with ScriptedServer() as server:
        async with opened(server, api_key=None) as upstream:
            await upstream.send(CHAT, Terms())
        assert "authorization" not in server.requests[0].headers


async def test_a_name_and_a_password_in_the_address_are_sent_where_there_is_no_key() -> None:
    with ScriptedServer() as server:
        address = server.base_url.replace("http://", "http://me:pass%21@")
        for key, sent in ((None, "Basic bWU6cGFzcyE="), (KEY, f"Bearer {KEY}")):
            async with opened(address, api_key=key) as upstream:
                await upstream.send(CHAT, Terms())
            assert server.requests[-1].headers["authorization"] == sent
            assert server.requests[-1].headers["host"] == server.address.removeprefix("http://")


async def test_a_completion_is_raw_text() -> None:
    with ScriptedServer() as server:
        async with opened(server) as upstream:
            whole = await upstream.send(PROMPT, Terms())
            streamed = await upstream.send(PROMPT, Terms(emit=(heard := Heard())))
        assert server.requests[0].path == "/v1/completions"
        assert server.requests[0].body == {"model": "m", "prompt": PROMPT.prompt, "max_tokens": 5}
    assert whole.text == streamed.text == heard.text != ""
    assert (whole.finish, whole.usage.completion_tokens) == ("length", 5)
    assert streamed.usage == whole.usage


async def test_embeddings_come_one_a_text_in_order() -> None:
    with ScriptedServer() as server:
        async with opened(server) as upstream:
            reply = await upstream.send(Embed(identity="i", texts=("a", "b", "a"), params={"dimensions": 8}), Terms())
        assert server.requests[0].body == {"model": "m", "input": ["a", "b", "a"], "dimensions": 8}
    assert len(reply.embeddings) == 3
    assert reply.embeddings[0] == reply.embeddings[2] != reply.embeddings[1]
    assert reply.usage.prompt_tokens == 3
    assert not reply.usage.estimated


async def test_more_than_one_choice_is_refused_rather_than_lost() -> None:
    with ScriptedServer() as server:
        async with opened(server) as upstream:
            with pytest.raises(Unsupported) as raised:
                await upstream.send(Chat(identity="i", messages=(), params={"n": 3}), Terms())
        assert raised.value.param == "n"
        assert not server.requests


# --- what comes back

MESSAGES: list[Mapping[str, Any]] = [
    {"content": "It is an ember. 🔥 Voilà."},
    {"content": "Forty.", "reasoning_content": "Six by seven, less two."},
    {"content": "Forty.", "reasoning": "Six by seven, less two."},
    {"content": None, "refusal": "I would rather not."},
    {"content": "Cut", "finish_reason": "length"},
    {
        "content": "Let me look.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"where": "under"}'}},
            {"id": "c2", "type": "function", "function": {"name": "ask", "arguments": "{}"}},
        ],
    },
]


@pytest.mark.parametrize("message", MESSAGES)
async def test_a_streamed_reply_is_the_whole_reply(message: Mapping[str, Any]) -> None:
    heard = Heard()
    with ScriptedServer(lambda body: message) as server:
        async with opened(server) as upstream:
            whole = await upstream.send(CHAT, Terms())
            streamed = await upstream.send(CHAT, Terms(emit=heard))
        assert server.requests[1].body["stream_options"] == {"include_usage": True}
    assert streamed == whole
    assert whole.text == (message.get("content") or "") == heard.text
    assert heard.reasoning == whole.reasoning == message.get("reasoning_content", message.get("reasoning", ""))
    assert whole.refusal == message.get("refusal")
    assert whole.model == "m"
    assert whole.upstream == "fast"
    calls = message.get("tool_calls", [])
    assert whole.tool_calls == tuple(ToolCall(id=c["id"], **c["function"]) for c in calls)
    assert whole.finish == message.get("finish_reason", "tool_calls" if calls else "stop")
    fragments = [f for d in heard.deltas for f in d.tool_calls]
    for index, c in enumerate(calls):
        assert "".join(f.arguments for f in fragments if f.index == index) == c["function"]["arguments"]
        assert next((f.id, f.name) for f in fragments if f.index == index) == (c["id"], c["function"]["name"])


async def test_deltas_arrive_as_they_are_said() -> None:
    times: list[float] = []

    async def emit(_: Delta) -> None:
        times.append(time.monotonic())

    with ScriptedServer(lambda body: "one two three four", token_delay=0.05) as server:
        async with opened(server) as upstream:
            await upstream.send(CHAT, Terms(emit=emit))
    assert len(times) == 4
    assert all(later - earlier > 0.02 for earlier, later in pairwise(times))


async def test_logprobs_are_read_whole_and_streamed() -> None:
    call = Chat(identity="i", messages=CHAT.messages, params={"logprobs": True, "top_logprobs": 2})
    with ScriptedServer(lambda body: "Yes it is") as server:
        async with opened(server) as upstream:
            whole = await upstream.send(call, Terms())
            streamed = await upstream.send(call, Terms(emit=Heard()))
            raw = Completion(identity="i", prompt="a b", params={"logprobs": 1, "max_tokens": 3})
            legacy = await upstream.send(raw, Terms())
            legacy_streamed = await upstream.send(raw, Terms(emit=Heard()))
    assert [t.token for t in whole.logprobs] == ["Yes", " it", " is"]
    assert all(t.logprob < 0 and t.top for t in whole.logprobs)
    assert streamed.logprobs == whole.logprobs
    assert [t.token for t in legacy.logprobs] == ["Yes", " it", " is"]
    assert legacy_streamed.logprobs == legacy.logprobs


async def test_usage_is_read_with_its_details_and_estimated_where_there_is_none() -> None:
    told = {
        "choices": [{"index": 0, "message": {"content": "ok"}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 64},
            "completion_tokens_details": {"reasoning_tokens": 7},
        },
    }
    with ScriptedServer([told]) as server:
        async with opened(server) as upstream:
            usage = (await upstream.send(CHAT, Terms())).usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.reasoning_tokens) == (
        100,
        64,
        9,
        7,
    )
    assert not usage.estimated
    with ScriptedServer(lambda body: "x" * 400, usage=False) as server:
        async with opened(server) as upstream:
            for emit in (None, Heard()):
                usage = (await upstream.send(CHAT, Terms(emit=emit))).usage
                assert usage.estimated
                assert usage.completion_tokens == 100
                assert 5 <= usage.prompt_tokens <= 20


async def test_a_server_that_does_not_stream_is_heard_all_the_same() -> None:
    whole = {"choices": [{"index": 0, "message": {"content": "at once"}, "finish_reason": "stop"}]}
    fault = Fault(body=orjson.dumps(whole), content_type="application/json")
    with ScriptedServer([fault]) as server:
        async with opened(server) as upstream:
            reply = await upstream.send(CHAT, Terms(emit=(heard := Heard())))
    assert reply.text == heard.text == "at once"


async def test_a_stream_of_the_wrong_content_type_is_read() -> None:
    with ScriptedServer(lambda body: Fault(content_type="text/plain", after=99, answer="as it is")) as server:
        async with opened(server) as upstream:
            reply = await upstream.send(CHAT, Terms(emit=(heard := Heard())))
    assert reply.text == heard.text == "as it is"


async def test_an_answer_in_parts_keeps_text_and_thought_apart() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": "Yes."},
    ]
    whole = {"choices": [{"index": 0, "message": {"content": parts}, "finish_reason": "stop"}]}
    with ScriptedServer([whole]) as server:
        async with opened(server) as upstream:
            reply = await upstream.send(CHAT, Terms())
    assert (reply.text, reply.reasoning) == ("Yes.", "Hm.")


# --- connections


async def test_connections_are_used_again_after_replies_streams_and_errors() -> None:
    def faults(received: Received) -> Fault | None:
        return Fault(status=429) if received.body.get("temperature") == 2 else None

    with ScriptedServer(faults=faults) as server:
        async with opened(server) as upstream:
            for _ in range(3):
                await upstream.send(CHAT, Terms())
                await upstream.send(CHAT, Terms(emit=Heard()))
                with pytest.raises(UpstreamRateLimited):
                    await upstream.send(Chat(identity="i", messages=(), params={"temperature": 2}), Terms())
        assert len({r.connection for r in server.requests}) == 1


async def test_a_connection_that_was_closed_while_it_was_idle_is_not_an_error() -> None:
    # The reset stands for the server's end of the connection that crosses our request on the way.
    faults = iter([None, Fault(reset=True), None, Fault(reset=True)])
    with ScriptedServer(faults=lambda _: next(faults, None)) as server:
        async with opened(server) as upstream:
            await upstream.send(CHAT, Terms())
            await upstream.send(CHAT, Terms())
        connections = [r.connection for r in server.requests]
    assert connections[0] == connections[1] != connections[2]
    assert len(connections) == 3


async def test_64_calls_at_once_are_64_calls_at_once() -> None:
    with ScriptedServer(lambda body: str(body["messages"][0]["content"]), delay=0.3) as server:
        async with opened(server) as upstream:
            calls = [Chat(identity="i", messages=(Message("user", f"n{i}"),)) for i in range(64)]
            emits = [Heard() if i % 2 else None for i in range(64)]
            started = time.monotonic()
            replies = await asyncio.gather(
                *(upstream.send(c, Terms(emit=e)) for c, e in zip(calls, emits, strict=True))
            )
            took = time.monotonic() - started
        assert server.max_in_flight == 64
    assert [r.text for r in replies] == [f"n{i}" for i in range(64)]
    assert took < 3


async def test_no_more_connections_are_opened_than_allowed() -> None:
    with ScriptedServer(delay=0.02) as server:
        async with opened(server, connections=2) as upstream:
            await asyncio.gather(*(upstream.send(CHAT, Terms()) for _ in range(8)))
        # Not what the server has in flight: it counts a call until after the client has its answer, and asks again.
        assert len({r.connection for r in server.requests}) == 2
        assert len(server.requests) == 8


@timed
@pytest.mark.parametrize("streaming", [False, True])
async def test_the_upstream_sees_a_cancelled_call_leave_within_100_ms(streaming: bool) -> None:
    heard = Heard()
    with ScriptedServer(
        lambda body: "word " * 500, delay=0 if streaming else 5, token_delay=0.02 if streaming else 0
    ) as server:
        async with opened(server) as upstream:
            task = asyncio.create_task(upstream.send(CHAT, Terms(emit=heard if streaming else None)))
            await eventually(lambda: bool(heard.deltas) if streaming else server.in_flight == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            in_time(await eventually(lambda: server.requests[0].left_at is not None), 0.1)
            server.delay = 0
            # The others are not disturbed, and nothing of the old answer is left on a connection.
            assert (await upstream.send(PROMPT, Terms())).finish == "stop"


@timed
async def test_an_emit_that_fails_ends_the_call_with_its_own_error() -> None:
    async def emit(_: Delta) -> None:
        raise ConnectionResetError("the client is gone")

    with ScriptedServer(lambda body: "word " * 500, token_delay=0.01) as server:
        async with opened(server) as upstream:
            with pytest.raises(ConnectionResetError, match="the client is gone"):
                await upstream.send(CHAT, Terms(emit=emit))
            in_time(await eventually(lambda: server.requests[0].left_at is not None), 0.1)


# --- what goes wrong


async def test_a_refused_key_names_the_setting_and_shows_nothing() -> None:
    for status in (401, 403):
        error = await failure([Fault(status=status, message=f"Incorrect API key provided: {KEY} {ASKED}")])
        assert isinstance(error, UpstreamAuth)
        assert "upstreams.fast.api_key" in str(error)
        assert "Incorrect" not in str(error)
        assert error.retry is False


async def test_an_unknown_model_is_not_asked_for_again() -> None:
    error = await failure([Fault(status=404, message="The model does not exist")])
    assert type(error) is UpstreamError
    assert error.code == "upstream_model_not_found"
    assert not error.repeatable
    assert error.retry is False
    assert "'m'" in str(error)
    assert "The model does not exist" in str(error)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_rejected_request_passes_the_upstreams_reason_and_code_on(status: int) -> None:
    said = "maximum context length is 8 tokens " + "x" * 900
    error = await failure([Fault(status=status, message=said, code="context_length_exceeded")])
    assert isinstance(error, UpstreamRejected)
    assert error.code == "context_length_exceeded"
    assert "maximum context length" in str(error)
    assert len(str(error)) < 600


async def test_a_prompt_too_long_for_llama_cpp_has_the_code_that_clients_know() -> None:
    error = await failure([Fault(status=400, type="exceed_context_size_error", message="exceeds the context size")])
    assert error.code == "context_length_exceeded"


async def test_a_key_in_a_rejection_is_struck_out() -> None:
    error = await failure([Fault(status=400, message=f"header Bearer {KEY} and {KEY} and sk-proj-another00key")])
    assert "another00key" not in str(error)
    assert str(error).count("[key]") == 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (408, UpstreamTimeout),
        (429, UpstreamRateLimited),
        (500, UpstreamUnavailable),
        (503, UpstreamUnavailable),
        (529, UpstreamUnavailable),
        (504, UpstreamTimeout),
    ],
)
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
async def test_what_may_pass_is_repeatable_and_says_when(
    status: int, kind: type[UpstreamError], headers: Mapping[str, str], seconds: float | None
) -> None:
    error = await failure([Fault(status=status, headers=headers)])
    assert type(error) is kind
    assert error.repeatable
    assert error.retry_after == seconds


async def test_a_retry_after_may_be_a_date() -> None:
    error = await failure([Fault(status=429, headers={"retry-after": email.utils.formatdate(time.time() + 7)})])
    assert error.retry_after is not None
    assert 4 < error.retry_after <= 7


async def test_no_quota_is_not_asked_again() -> None:
    error = await failure([Fault(status=429, code="insufficient_quota", message="You exceeded your current quota")])
    assert isinstance(error, UpstreamError)
    assert not error.repeatable
    assert (error.code, error.retry) == ("insufficient_quota", False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "busy", "code": 429}, UpstreamRateLimited),
        ({"message": "busy", "type": "rate_limit_error"}, UpstreamRateLimited),
        ({"message": "no", "type": "invalid_request_error"}, UpstreamRejected),
        ({"message": "overloaded", "code": "503"}, UpstreamUnavailable),
        ({"message": "key", "code": 401}, UpstreamAuth),
        ({"message": "what?"}, UpstreamUnavailable),
    ],
)
async def test_an_error_inside_a_200_is_an_error(
    error: Mapping[str, Any], kind: type[UpstreamError], stream: bool
) -> None:
    assert type(await failure([Fault(error=error)], stream=stream)) is kind
    if stream:
        assert type(await failure([Fault(error=error, after=2, answer="a b c d")], stream=True)) is kind


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(body=b"<html>Welcome</html>", content_type="text/html"),
        Fault(body=b"\xff\xfe\x00"),
        Fault(body=b""),
        Fault(body=b"[]"),
        Fault(body=b'{"object": "list"}'),
        Fault(body=b'{"choices": []}'),
        Fault(body=b'{"choices": 7}'),
        Fault(body=b'{"choices": [{"index": 0, "message'),
    ],
)
async def test_what_is_no_answer_is_broken(fault: Fault, stream: bool) -> None:
    error = await failure([fault], stream=stream)
    assert isinstance(error, UpstreamBroken)
    assert not error.repeatable
    assert "Welcome" not in str(error)


@pytest.mark.parametrize(
    "body",
    [b"data: nonsense\n\n", b"data: [1]\n\n", b'data: {"choices": 1}\n\n', b"data: {}\n\n", b": hello\n\n", b""],
)
async def test_a_stream_of_something_else_is_broken(body: bytes) -> None:
    error = await failure([Fault(body=body, content_type="text/event-stream")], stream=True)
    assert isinstance(error, UpstreamBroken)


async def test_a_stream_that_ends_without_a_finish_is_no_reply() -> None:
    error = await failure([Fault(after=3, answer="one two three four")], stream=True)
    assert isinstance(error, UpstreamBroken)
    assert "before the answer had an end" in str(error)


async def test_a_connection_reset_before_an_answer_is_unreachable_and_in_the_middle_is_broken() -> None:
    before = await failure([Fault(reset=True)])
    assert type(before) is UpstreamUnreachable
    assert before.repeatable
    whole = await failure([Fault(reset=True, after=1, answer="long " * 100)])
    streamed = await failure([Fault(reset=True, after=3, answer="long " * 100)], stream=True)
    assert type(whole) is type(streamed) is UpstreamBroken


async def test_an_address_where_nothing_listens_is_named() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    async with opened(f"http://user:hidden@127.0.0.1:{port}/v1", api_key=None) as upstream:
        with pytest.raises(UpstreamUnreachable) as raised:
            await upstream.send(CHAT, Terms())
    assert f"http://127.0.0.1:{port}" in str(raised.value)
    assert "upstreams.fast.base_url" in str(raised.value)
    assert "hidden" not in str(raised.value)
    assert raised.value.repeatable


async def test_a_host_that_has_no_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with opened("http://no-such-host.invalid/v1") as upstream:
        with pytest.raises(UpstreamUnreachable, match=r"no-such-host\.invalid.*no such host"):
            await upstream.send(CHAT, Terms())


async def test_plain_http_on_a_tls_port_says_so() -> None:
    with ScriptedServer() as server:
        async with opened(server.base_url.replace("http:", "https:")) as upstream:
            with pytest.raises(UpstreamUnreachable, match="TLS failed"):
                await upstream.send(CHAT, Terms())


async def test_a_server_that_accepts_no_connection_in_time_is_a_timeout() -> None:
    # A full backlog: the kernel leaves further connections unanswered.
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        waiting = [socket.socket() for _ in range(8)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            async with opened(f"http://127.0.0.1:{port}/v1", connect_timeout=0.2) as upstream:
                with pytest.raises(UpstreamTimeout, match=r"within 0\.2 s"):
                    await upstream.send(CHAT, Terms())
        finally:
            for one in waiting:
                one.close()


async def test_a_redirect_is_not_followed_with_our_key() -> None:
    with ScriptedServer() as other:
        fault = Fault(status=307, headers={"location": f"{other.base_url}/chat/completions"})
        with ScriptedServer([fault]) as server:
            async with opened(server) as upstream:
                with pytest.raises(UpstreamError) as raised:
                    await upstream.send(CHAT, Terms())
        assert not other.requests
        assert f"redirects to {other.address}" in str(raised.value)


# --- settings


def test_it_is_an_upstream_that_is_opened_and_detects() -> None:
    upstream: Upstream = OpenAIUpstream(name="x", base_url="http://h/v1", model="m")
    assert isinstance(upstream, Openable)
    assert isinstance(upstream, Detecting)


@pytest.mark.parametrize(
    ("base_url", "identity"),
    [
        ("http://LocalHost:11434/v1/", "openai:http://localhost:11434/v1:m"),
        ("https://api.openai.com:443/v1", "openai:https://api.openai.com/v1:m"),
        ("http://user:secret@h/v1?api-version=1", "openai:http://h/v1:m"),
        ("http://[::1]:80/v1", "openai:http://[::1]/v1:m"),
    ],
)
def test_its_identity_is_the_address_in_one_spelling_and_no_password(base_url: str, identity: str) -> None:
    assert OpenAIUpstream(name="x", base_url=base_url, model="m").identity == identity
    assert OpenAIUpstream(name="x", base_url=base_url, model="m", identity="weights-7").identity == "weights-7"


@pytest.mark.parametrize("base_url", ["localhost:8000", "ftp://h/v1", "http://", "http://h:port/v1", ""])
def test_a_base_url_that_is_none_stops_the_start(base_url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"upstreams\.fast\.base_url"):
        OpenAIUpstream(name="fast", base_url=base_url, model="m")


def test_a_route_in_the_base_url_and_an_unknown_capability_are_mistakes() -> None:
    with pytest.raises(ConfigurationError, match="leave that off"):
        OpenAIUpstream(name="fast", base_url="http://h/v1/chat/completions", model="m")
    with pytest.raises(ConfigurationError, match="there is no 'vision'"):
        OpenAIUpstream(name="fast", base_url="http://h/v1", model="m", can={"vision": True})
    with pytest.raises(ConfigurationError, match="api_key") as raised:
        OpenAIUpstream(name="fast", base_url="http://h/v1", model="m", api_key="sk-12345\nX-Evil: 1")
    assert "12345" not in str(raised.value)


async def test_capabilities_are_cheap_and_the_operator_corrects_them() -> None:
    with ScriptedServer() as server:
        async with opened(server, context=4096, can={"tools": False, "loglikelihood": True}) as upstream:
            known = await upstream.capabilities()
        assert not server.requests
    assert (known.chat, known.completion, known.tools, known.loglikelihood) == (True, True, False, False)
    assert known.context == 4096


# --- log-likelihood of given text


@pytest.mark.parametrize("scores", ["echo", "grammar", "prompt_logprobs"])
async def test_given_text_is_scored_once_that_is_proven(scores: Scores) -> None:
    with ScriptedServer(scores=scores) as server:
        async with opened(server) as upstream:
            assert (await upstream.detect()).loglikelihood
            assert (await upstream.capabilities()).loglikelihood
            server.clear()
            reply = await upstream.send(SCORE, Terms())
            asked = len(server.requests)
            other = await upstream.send(
                Score(identity="i", context="Basil.\n\nQ:", continuation=SCORE.continuation), Terms()
            )
    assert asked == (2 if scores == "grammar" else 1)
    assert [t.token for t in reply.logprobs] == [" Where", " is", " the", " lantern", "?"]
    assert reply.likelihood.total > other.likelihood.total
    assert reply.usage.prompt_tokens > 5
    assert not reply.usage.estimated


async def test_the_three_ways_agree() -> None:
    totals: list[float] = []
    ways: tuple[Scores, ...] = ("echo", "grammar", "prompt_logprobs")
    for scores in ways:
        with ScriptedServer(scores=scores) as server:
            async with opened(server) as upstream:
                totals.append((await upstream.send(SCORE, Terms())).likelihood.total)
    assert totals[0] == pytest.approx(totals[1]) == pytest.approx(totals[2])


async def test_parts_of_characters_are_scored_where_a_grammar_cannot_force_them() -> None:
    call = Score(identity="i", context="The fire.\n\nQ:", continuation=" Is it 🔥 or 🔥?")
    with ScriptedServer(scores="grammar") as server:
        async with opened(server) as upstream:
            reply = await upstream.send(call, Terms())
    toy = ToyModel()
    tokens = [" Is", " it", " ", "🔥#0", "🔥#1", " or", " ", "🔥#0", "🔥#1", "?"]
    assert [t.logprob for t in reply.logprobs] == toy.score(tokens, toy.tokens(call.context))


@pytest.mark.parametrize("scores", ["ignored", "shifted"])
async def test_an_echo_that_is_ignored_or_one_place_off_is_found_out(scores: Scores) -> None:
    with ScriptedServer(scores=scores) as server:
        async with opened(server, can={"loglikelihood": True}) as upstream:
            assert not (await upstream.detect()).loglikelihood
            asked = len(server.requests)
            with pytest.raises(Unsupported, match="does not give the log-likelihood"):
                await upstream.send(SCORE, Terms())
            await upstream.detect()
            assert len(server.requests) == asked
    assert asked < 12


async def test_what_the_operator_forbids_is_not_tried() -> None:
    with ScriptedServer() as server:
        async with opened(server, can={"loglikelihood": False}) as upstream:
            assert not (await upstream.detect()).loglikelihood
        async with opened(server, can={"completion": False}) as upstream:
            assert not (await upstream.detect()).loglikelihood
        assert not server.requests


async def test_all_who_ask_at_once_share_one_trial() -> None:
    with ScriptedServer(delay=0.02) as server:
        async with opened(server) as upstream:
            leaving = asyncio.create_task(upstream.detect())
            others = [asyncio.create_task(upstream.detect()) for _ in range(8)]
            await asyncio.sleep(0.03)
            leaving.cancel()
            assert all(c.loglikelihood for c in await asyncio.gather(*others))
        # One call after the other, and one trial: a second would have needed a connection of its own.
        assert len({r.connection for r in server.requests}) == 1
        assert len(server.requests) < 10


async def test_a_trial_that_failed_on_the_way_is_not_remembered() -> None:
    faults = iter([None, None, None, Fault(status=503)])
    with ScriptedServer(faults=lambda _: next(faults, None)) as server:
        async with opened(server) as upstream:
            with pytest.raises(UpstreamUnavailable):
                await upstream.detect()
            assert not (await upstream.capabilities()).loglikelihood
            assert (await upstream.detect()).loglikelihood


async def test_a_server_without_completions_scores_nothing_and_says_which_route_it_lacks() -> None:
    def faults(received: Received) -> Fault | None:
        return Fault(status=404, message="no route") if received.path == "/v1/completions" else None

    with ScriptedServer(faults=faults) as server:
        async with opened(server) as upstream:
            assert not (await upstream.detect()).loglikelihood
            with pytest.raises(UpstreamError, match="has not the route /completions"):
                await upstream.send(PROMPT, Terms())


async def test_an_empty_continuation_is_certain_and_costs_nothing() -> None:
    with ScriptedServer() as server:
        async with opened(server) as upstream:
            reply = await upstream.send(Score(identity="i", context="a", continuation=""), Terms())
        assert not server.requests
    assert reply.likelihood.total == 0


async def test_a_context_that_is_empty_is_refused_with_the_reason() -> None:
    with ScriptedServer() as server:
        async with opened(server) as upstream:
            with pytest.raises(UpstreamBroken, match="the context must not be empty"):
                await upstream.send(Score(identity="i", context="", continuation="a b"), Terms())


def totals(tokens: Sequence[TokenLogprob]) -> list[tuple[str, float]]:
    return [(t.token, t.logprob) for t in tokens]


@pytest.mark.parametrize(
    ("tokens", "logprobs", "expected"),
    [
        (["It", " is", ".", " Is", " it"], [None, -1, -2, -3, -4], [(" Is", -3), (" it", -4)]),
        (["<s>", "It", " is", ".", " Is", " it"], [None, -9, -1, -2, -3, -4], [(" Is", -3), (" it", -4)]),
        (["It", " is", ". Is", " it"], [None, -1, -3, -4], [(". Is", -3), (" it", -4)]),
        (["It", " is", ".", " Is", " it", " more"], [None, -1, -2, -3, -4, -5], [(" Is", -3), (" it", -4)]),
    ],
)
def test_the_continuations_tokens_are_those_that_end_after_the_context(
    tokens: list[str], logprobs: list[float | None], expected: list[tuple[str, float]]
) -> None:
    assert totals(continuation_of("It is.", " Is it", tokens, logprobs)) == expected


def test_characters_spread_over_tokens_do_not_move_the_boundary() -> None:
    tokens = ["a", "\ufffd", "\ufffd", " b", " c", "\ufffd", "", "\ufffd"]
    measured = continuation_of("a🔥 b", " c🔥", tokens, [None, -1, -1, -2, -3, -4, -5, -6])
    assert [t.logprob for t in measured] == [-3, -4, -5, -6]
    with pytest.raises(ValueError, match="spread over many tokens"):
        continuation_of("a🔥", "🔥 b", ["a", "\ufffd", "\ufffd", "\ufffd", " b"], [None, -1, -1, -1, -2])


@pytest.mark.parametrize(
    ("tokens", "logprobs"),
    [
        (["It", " was"], [None, -1]),
        (["It"], [None]),
        (["It", " is", "."], [None, -1]),
        ([], []),
        (["It is. Is it"], [None]),
    ],
)
def test_tokens_of_another_text_are_no_measurement(tokens: list[str], logprobs: list[float | None]) -> None:
    with pytest.raises(ValueError, match=r"tokens|log-probability"):
        continuation_of("It is.", " Is it", tokens, logprobs)


async def test_a_server_that_returns_what_it_would_say_itself_is_found_out_by_nonsense() -> None:
    said = [TokenLogprob(" the", -0.2), TokenLogprob(" cat", -0.3)]

    async def generate(_: str) -> Sequence[TokenLogprob]:
        return said

    async def parrot(context: str, continuation: str) -> Sequence[TokenLogprob]:
        return said

    async def honest(context: str, continuation: str) -> Sequence[TokenLogprob]:
        return said if continuation == " the cat" else [TokenLogprob(continuation, -30.0)]

    assert await proven(generate, {"parrot": parrot}) is None
    assert await proven(generate, {"parrot": parrot, "honest": honest}) == "honest"


# --- server-sent events


def reply_of_stream(chunks: Sequence[bytes]) -> tuple[Reply, list[Delta]]:
    events, assembly = Events(1 << 20), Assembly()
    found = [event for chunk in chunks for event in events.feed(chunk)] + events.end()
    deltas = [assembly.add(orjson.loads(event)) for event in found if event != b"[DONE]"]
    return assembly.reply(CHAT), [d for d in deltas if d is not None]


texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(pieces=st.lists(texts, max_size=6), newline=st.sampled_from([b"\n", b"\r\n", b"\r"]), data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_stream_cut_anywhere_yields_the_same_reply(pieces: list[str], newline: bytes, data: st.DataObject) -> None:
    lines: list[bytes] = [b": hello", b""]
    for piece in pieces:
        body = {"choices": [{"index": 0, "delta": {"content": piece}}]}
        lines += [b"event: x", b"data: " + orjson.dumps(body), b"id:1", b": ping", b""]
    lines += [b'data: {"choices": [{"index": 0,', b'data:"delta": {}, "finish_reason": "stop"}]}', b"", b"data: [DONE]"]
    stream = newline.join(lines) + newline * data.draw(st.integers(0, 2))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    edges = [0, *cuts, len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(edges)]
    reply, deltas = reply_of_stream(chunks)
    assert reply == reply_of_stream([stream])[0]
    assert reply.text == "".join(pieces) == "".join(d.text for d in deltas)
    assert reply.finish == "stop"


@given(st.binary(max_size=200), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_the_same_events_however_they_are_cut(stream: bytes, size: int) -> None:
    def events(chunks: Sequence[bytes]) -> list[bytes]:
        parser = Events(1 << 20)
        return [e for chunk in chunks for e in parser.feed(chunk)] + parser.end()

    assert events([stream[i : i + size] for i in range(0, len(stream), size)]) == events([stream])


def test_an_event_without_end_is_not_kept_for_ever() -> None:
    def fed(chunk: bytes) -> None:
        events = Events(1000)
        for _ in range(20):
            events.feed(chunk)

    for chunk in (b"data: " + b"x" * 100, b"data: " + b"x" * 100 + b"\n"):
        with pytest.raises(ValueError, match="more than 1000 bytes"):
            fed(chunk)
    fed(b"data: " + b"x" * 100 + b"\n\n")


def test_a_byte_order_mark_is_passed_over() -> None:
    assert Events(100).feed(b"\xef\xbb\xbfdata: a\n\ndata:b\n\n") == [b"a", b"b"]


def said(content: str) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]})


USAGE_ALONE = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
LAST = b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
FAILED = b'{"error":{"message":"oom","code":503}}'
WRONG = [FAILED, b"nonsense", b"[1]", b'{"choices":1}']
MADE = [LAST, USAGE_ALONE, *WRONG, b"", b" ", b'{"choices":[],"a":"error"}']


def expected(events: Sequence[bytes], usage_asked: bool) -> tuple[list[bytes], bool]:
    """What a client should be shown of a stream of these events, and whether it then fails."""
    shown: list[bytes] = []
    for event in events:
        if event in WRONG:
            return shown, True
        if event.strip() and (event != USAGE_ALONE or usage_asked):
            shown.append(event)
    return shown, False


@given(
    events=st.lists(texts.map(said) | st.sampled_from(MADE), max_size=7),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    between=st.sampled_from([b"", b": ping", b"event: x"]),
    usage_asked=st.booleans(),
    data=st.data(),
)
@settings(max_examples=400, deadline=None)
def test_a_stream_that_is_passed_on_shows_the_same_events_however_it_is_cut(
    events: list[bytes], newline: bytes, between: bytes, usage_asked: bool, data: st.DataObject
) -> None:
    stream = b"".join(
        (between + newline if between else b"") + b"data: " + event + 2 * newline for event in [*events, b"[DONE]"]
    )
    stream += b"data: after the end" + 2 * newline
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    passed: list[bytes] = []
    heard = Heard()

    async def verbatim(block: bytes) -> None:
        assert not any(bad in block for bad in (FAILED, b"nonsense", b"[1]", b"[DONE]", b"after the end"))
        passed.append(block)

    def fail(chunk: Mapping[str, Any]) -> None:
        if chunk["error"]:
            raise UpstreamUnavailable("oom")

    async def run() -> bool:
        taking = Stream(verbatim, usage_asked, heard, fail)
        try:
            for start, end in pairwise([0, *cuts, len(stream)]):
                if end > start and not taking.done:
                    await taking.take(stream[start:end])
        except (UpstreamUnavailable, ValueError):
            return True
        assert taking.done
        return False

    failed = asyncio.run(run())
    shown, fails = expected(events, usage_asked)
    assert b"".join(passed) == b"".join(b"data: " + event + b"\n\n" for event in shown)
    assert failed == fails
    # One delta at the first bytes, by which the layers above know that the answer has begun.
    assert len(heard.deltas) == bool(shown)


# --- tool calls of servers that leave out what they should not


def test_tool_call_fragments_without_an_index_find_their_call() -> None:
    assembly = Assembly()

    def chunk(*calls: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"choices": [{"index": 0, "delta": {"tool_calls": list(calls)}}]}

    assembly.add(chunk({"id": "a", "function": {"name": "f", "arguments": '{"x"'}}))
    assembly.add(chunk({"function": {"arguments": ":1}"}}))
    assembly.add(chunk({"id": "b", "function": {"name": "g", "arguments": {"y": 2}}}))
    reply = assembly.reply(CHAT)
    assert reply.tool_calls == (
        ToolCall(id="a", name="f", arguments='{"x":1}'),
        ToolCall(id="b", name="g", arguments='{"y":2}'),
    )
    assert reply.finish == "tool_calls"


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda x: st.lists(x) | st.dictionaries(texts, x))
)
@settings(max_examples=200, deadline=None)
def test_whatever_an_error_body_holds_it_becomes_an_error(body: object) -> None:
    for status in (400, 401, 404, 429, 500, 302):
        refusal = refusal_of(status, {"error": body}, {}, 0.0)
        error = error_of(refusal, who='upstream "x"', key_setting="upstreams.x.api_key", model="m", secrets=[KEY])
        assert isinstance(error, UpstreamError)
        assert isinstance(refusal_of(status, body, {}, 0.0).message, str)
