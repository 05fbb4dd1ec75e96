"""`POST /v1/chat/completions` and the small routes, asked by OpenAI's SDK and by hand, over a scripted upstream."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.serving import Server, create, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer, ServerAnswer

PROGRAMS = '''
"""Programs that do one thing each."""

import asyncio

from pydantic import BaseModel

from asmodel import Message, Run, gather, program, step


@step(model="writer", temperature=0)
def outline(question: str) -> str:
    return f"Outline: {question}"


@step(model="writer", max_tokens=50, temperature=0)
def text(outline: str) -> str:
    return f"Write from: {outline}"


@step(model="writer", temperature=0)
def item(number: int) -> str:
    return f"Item {number}"


@program("two-step")
async def two_step(run: Run) -> str:
    """An outline, then a text."""
    return await run.reply(text, await run(outline, run.question))


@program("without-reply")
async def without_reply(run: Run) -> str:
    """An outline alone."""
    return (await run(outline, run.question)).upper()


class Items(BaseModel):
    count: int = 3
    pause: float = 0.0


@program("items", params=Items)
async def items(run: Run[Items]) -> str:
    """Many small steps, one after the other, and then the reply."""
    with run.part("items", of=run.params.count):
        for number in range(run.params.count):
            await run(item, number)
            await asyncio.sleep(run.params.pause)
    return await run.reply(text, "items")


@program("faulty")
async def faulty(run: Run) -> str:
    """Raises what its question says."""
    raise RuntimeError(run.question)
'''


class Script:
    """What the upstream says: `answer` to what it is asked, unless `fault` has something to say of the request."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], ServerAnswer] = lambda body: None
        self.fault: Callable[[Received], Fault | None] = lambda received: None
        self.server = ScriptedServer(lambda body: self.answer(body), faults=lambda received: self.fault(received))

    def reset(self) -> None:
        self.answer = lambda body: None
        self.fault = lambda received: None
        self.server.delay = self.server.token_delay = 0.0
        self.server.clear()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The chats that it was asked for."""
        return [r.body for r in self.server.requests if r.path == "/v1/chat/completions"]


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    made = Script()
    with made.server:
        yield made


@pytest.fixture(scope="module")
def running(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "programs").mkdir()
    (folder / "programs" / "small.py").write_text(PROGRAMS)
    settings = (
        'program_folders = ["programs"]\nlimits.body_bytes = 300_000\n'
        + upstream(script.server.base_url, retries=0)
        + upstream(script.server.base_url, "llama3.2:3b", retries=0)
        + upstream("http://127.0.0.1:9/v1", "nowhere", retries=0)
        + '[models.careful]\nprogram = "self-consistency"\nparams = { samples = 3 }\ndescription = "votes"\n'
    )
    with serving(folder, settings) as server:
        yield server


@pytest.fixture
def server(running: Server, script: Script) -> Server:
    script.reset()
    return running


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def receipt_of(thing: ChatCompletion | ChatCompletionChunk) -> dict[str, Any]:
    return dict((thing.model_extra or {})["asmodel"])


def reasoning_of(chunk: ChatCompletionChunk) -> str | None:
    if not chunk.choices:
        return None
    return getattr(chunk.choices[0].delta, "reasoning_content", None)


def take(chunks: Iterable[ChatCompletionChunk], into: list[ChatCompletionChunk]) -> None:
    """Keep what has come even if the rest does not."""
    for chunk in chunks:
        into.append(chunk)


def content_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


# ---- what is asked for ----


@pytest.mark.parametrize("stream", [False, True])
def test_the_sdk_with_only_base_url_and_model_changed_gets_the_answer(
    client: OpenAI, script: Script, stream: bool
) -> None:
    script.answer = lambda body: "Because of Rayleigh scattering."
    if stream:
        chunks = list(client.chat.completions.create(model="plain", messages=user("Why blue?"), stream=True))
        assert content_of(chunks) == "Because of Rayleigh scattering."
        assert len(chunks) > 4, "it is streamed as it is generated"
    else:
        answer = client.chat.completions.create(model="plain", messages=user("Why not blue?"))
        assert answer.choices[0].message.content == "Because of Rayleigh scattering."
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model == "plain"


def test_the_whole_conversation_reaches_the_upstream_as_it_was_sent(client: OpenAI, script: Script) -> None:
    conversation: list[Any] = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Who?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "a parrot", "tool_call_id": "c1"},
        {"role": "user", "content": [{"type": "text", "text": "And then?"}]},
    ]
    client.chat.completions.create(model="plain", messages=conversation)
    assert script.bodies[-1]["messages"] == conversation


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        ("two-step", 2),
        ("default", 1),
        ("llama3.2:3b", 1),
        ("careful", 3),
        ("plain:llama3.2:3b", 1),
        ("plain:two-step:default", 2),
    ],
)
def test_a_name_is_a_program_an_upstream_a_preset_or_a_composition(
    client: OpenAI, script: Script, model: str, calls: int
) -> None:
    answer = client.chat.completions.create(model=model, messages=user(f"name {model}"))
    # What is passed through is the upstream's own answer, its name for the model included.
    assert answer.model == (model if getattr(answer, "asmodel", None) else "scripted")
    assert answer.choices[0].message.content
    assert len(script.bodies) == calls


def test_hints_reach_the_reply_step_and_no_other(client: OpenAI, script: Script) -> None:
    hints: dict[str, Any] = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 7, "stop": ["END"], "seed": 4}
    answer = create(client, model="two-step", messages=user("hints"), **hints)
    first, reply = script.bodies
    assert {name: reply[name] for name in hints} == hints
    assert first["temperature"] == 0
    assert not first.keys() & (hints.keys() - {"temperature"})
    assert receipt_of(answer)["ignored"] == []


def test_a_program_without_a_reply_step_lists_the_hints_and_unknown_fields_as_ignored(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="without-reply", messages=user("ignored"), temperature=0.3, user="me", extra_body={"flavour": "sour"}
    )
    assert receipt_of(answer)["ignored"] == ["flavour", "temperature", "user"]


def test_a_passed_through_upstream_gets_every_field_but_ours(client: OpenAI, script: Script) -> None:
    client.chat.completions.create(
        model="default",
        messages=user("fields"),
        user="me",
        extra_body={"flavour": "sour", "documents": [{"doc": 1}], "asmodel": {"cache": "off"}},
    )
    body = script.bodies[-1]
    assert body["model"] == "scripted"
    assert (body["user"], body["flavour"], body["documents"]) == ("me", "sour", [{"doc": 1}])
    assert "asmodel" not in body


@pytest.mark.parametrize("model", ["plain", "default"])
@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_their_calls_pass_through_plain_and_upstreams(
    client: OpenAI, script: Script, model: str, stream: bool
) -> None:
    made = [{"id": "c9", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    script.answer = lambda body: {"content": None, "tool_calls": made}
    tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    asked: Any = dict(model=model, messages=user(f"Rain {stream}?"), tools=tools, tool_choice="auto")
    whole: Any
    if stream:
        with cast("Any", client.chat.completions.stream)(**asked) as events:
            whole = events.get_final_completion()
    else:
        whole = create(client, **asked)
    (call,) = whole.choices[0].message.tool_calls
    assert (call.id, call.function.name, call.function.arguments) == ("c9", "weather", '{"city": "Rome"}')
    assert whole.choices[0].finish_reason == "tool_calls"
    assert script.bodies[-1]["tools"] == tools
    assert script.bodies[-1]["tool_choice"] == "auto"


def test_response_format_and_logprobs_pass_through_plain(client: OpenAI, script: Script) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    script.answer = lambda body: '{"a": 1}'
    asked: Any = dict(model="plain", messages=user("shape"), response_format=shape, logprobs=True, top_logprobs=2)
    answer = create(client, **asked)
    assert script.bodies[-1]["response_format"] == shape
    assert answer.choices[0].logprobs is not None
    tokens = [t.token for t in answer.choices[0].logprobs.content or ()]
    assert "".join(tokens) == '{"a": 1}'
    asked["messages"] = user("shape, streamed")
    chunks = create(client, **asked, stream=True)
    ends = [c.choices[0].logprobs for c in chunks]
    assert [t.token for end in ends if end for t in end.content or ()] == tokens


def test_n_is_three_draws_and_three_choices(client: OpenAI, script: Script) -> None:
    count = iter(range(100))
    script.answer = lambda body: f"draw {next(count)}"
    answer = client.chat.completions.create(model="plain", messages=user("n"), n=3)
    assert sorted(c.message.content or "" for c in answer.choices) == ["draw 0", "draw 1", "draw 2"]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert receipt_of(answer)["upstream_calls"] == 3
    again: dict[int, str] = {}
    for chunk in client.chat.completions.create(model="plain", messages=user("n"), n=3, stream=True):
        for choice in chunk.choices:
            again[choice.index] = again.get(choice.index, "") + (choice.delta.content or "")
    assert again == {c.index: c.message.content for c in answer.choices}, "the same draws, from the cache"
    assert len(script.bodies) == 3


# ---- streams ----


def lines_of(server: Server, body: dict[str, Any]) -> list[tuple[float, str]]:
    """Each line of a stream that is not empty, and when it came, in seconds from the request on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    started = time.monotonic()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), {"content-type": "application/json"}
    )
    response = connection.getresponse()
    found = [(time.monotonic() - started, f"{response.status}")]
    for line in response:
        if text := line.decode().rstrip("\n"):
            found.append((time.monotonic() - started, text))
    connection.close()
    return found


def test_a_stream_is_role_progress_content_finish_with_receipt_usage_and_done(server: Server, script: Script) -> None:
    body = {"model": "two-step", "messages": user("order"), "stream_options": {"include_usage": True}}
    status, *lines, done = [text for _, text in lines_of(server, body)]
    assert (status, done) == ("200", "data: [DONE]")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *middle, finish, usage = chunks[1:]
    kinds = [next(iter(c["choices"][0]["delta"])) for c in middle]
    content = kinds.index("content")
    assert set(kinds[:content]) == {"reasoning_content"}
    assert set(kinds[content:]) == {"content"}
    assert middle[0]["choices"][0]["delta"]["reasoning_content"] == "outline 1/1\n"
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert finish["asmodel"]["upstream_calls"] == 2
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] > 0
    assert all(c["usage"] is None for c in chunks[:-1])
    assert not any("asmodel" in c for c in chunks if c is not finish)


def test_a_stream_without_include_usage_has_no_usage_at_all(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="two-step", messages=user("no usage"), stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_progress_is_five_lines_a_second_at_most_and_never_content(server: Server, script: Script) -> None:
    script.server.delay = 0.01
    params = {"params": {"count": 60, "pause": 0.02}}
    lines = lines_of(server, {"model": "items", "messages": user("progress"), "asmodel": params})
    told: list[float] = []
    content = ""
    for when, line in lines:
        if line.startswith("data: {"):
            delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
            content += delta.get("content", "")
            if "reasoning_content" in delta:
                told.append(when)
                assert delta["reasoning_content"].startswith(("items · item ", "text "))
    assert content.startswith("scripted ")
    assert told[-1] - told[0] > 1, "the run was long enough to measure"
    # What leaves the server at most 5 times a second may arrive a little closer together.
    for first, sixth in zip(told, told[5:], strict=False):
        assert sixth - first > 0.8
    assert len(told) >= 5


def test_progress_can_be_left_out(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="two-step", messages=user("quiet"), stream=True, extra_body={"asmodel": {"progress": False}}
    )
    assert not any(reasoning_of(chunk) for chunk in chunks)


def test_the_last_state_of_the_steps_is_told_before_the_answer(client: OpenAI) -> None:
    for cache, notes in (("refresh", "items · item 4/4\n"), ("on", "items · item 4/4 (4 cached)\n")):
        extra = {"asmodel": {"params": {"count": 4}, "cache": cache}}
        chunks = list(
            client.chat.completions.create(model="items", messages=user("last state"), stream=True, extra_body=extra)
        )
        assert notes in [reasoning_of(chunk) for chunk in chunks]


def test_a_silent_stream_is_opened_after_one_second_and_kept_alive(server: Server, script: Script) -> None:
    script.server.delay = 1.6
    (opened, status), *lines = lines_of(server, {"model": "default", "messages": user("slow")})
    assert status == "200"
    assert 0.9 < opened < 1.55, "before there was anything to say"
    assert lines[-1][1] == "data: [DONE]"
    script.server.delay = 6.0
    lines = lines_of(server, {"model": "default", "messages": user("slower")})
    assert ": keep-alive" in [text for _, text in lines]


def test_a_name_or_parameter_that_is_wrong_is_an_http_error_in_a_stream_too(client: OpenAI, script: Script) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=user("x"), stream=True)
    wrong = {"asmodel": {"params": {"count": "many"}}}
    with pytest.raises(openai.BadRequestError, match="count"):
        client.chat.completions.create(model="items", messages=user("x"), stream=True, extra_body=wrong)
    assert script.bodies == []


def test_an_upstream_that_fails_in_the_middle_of_a_stream_is_an_error_that_the_sdk_raises(
    client: OpenAI, script: Script
) -> None:
    script.server.token_delay = 0.05
    for fault in (Fault(after=3, reset=True), Fault(after=3, error={"message": "out of memory", "code": "oom"})):
        script.answer = lambda body, fault=fault: fault  # type: ignore[misc]
        for model in ("plain", "default"):
            seen: list[ChatCompletionChunk] = []
            chunks = client.chat.completions.create(model=model, messages=user(f"{fault}"), stream=True)
            with pytest.raises(openai.APIError) as caught:
                take(chunks, into=seen)
            assert type(caught.value) is openai.APIError, "neither a status nor a broken connection"
            assert content_of(seen).startswith("scripted")
            assert 'upstream "default"' in str(caught.value)
    assert len(script.bodies) == 4, "what had begun to answer is not asked again"


# ---- receipts ----


def test_receipts_in_headers_and_body_agree_with_what_the_upstream_counted(client: OpenAI, script: Script) -> None:
    for calls, hits in ((2, 0), (0, 2)):
        script.server.clear()
        raw = client.chat.completions.with_raw_response.create(model="two-step", messages=user("receipt"))
        receipt, headers = receipt_of(raw.parse()), raw.headers
        assert len(script.bodies) == receipt["upstream_calls"] == calls
        assert receipt["cache_hits"] == hits
        assert receipt["steps"] == 2
        assert headers["x-asmodel-upstream-calls"] == str(calls)
        assert headers["x-asmodel-cache-hits"] == str(hits)
        assert headers["x-asmodel-steps"] == "2"
        assert headers["x-request-id"] == receipt["request_id"]
        assert headers["x-asmodel-trace-id"] == receipt["trace_id"]
        assert float(headers["x-asmodel-overhead-ms"]) <= float(headers["openai-processing-ms"]) + 1
        assert receipt["program"] == "two-step"
        assert len(receipt["program_digest"]) == 16
        usage = raw.parse().usage
        assert usage is not None
        assert (usage.total_tokens == 0) == (calls == 0)
    assert receipt["saved"]["completion_tokens"] > 0
    assert receipt["cost"] == 0


def test_usage_is_the_sum_of_what_was_bought_and_what_is_not_in_the_answer_is_reasoning(
    client: OpenAI, script: Script
) -> None:
    script.answer = lambda body: "one two three" if body["messages"][-1]["content"].startswith("Outline") else "four"
    usage = client.chat.completions.create(model="two-step", messages=user("sums")).usage
    assert usage is not None
    assert usage.completion_tokens == 4
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 3
    assert usage.total_tokens == usage.prompt_tokens + 4


def test_the_time_an_upstream_takes_is_not_ours(client: OpenAI, script: Script) -> None:
    script.server.delay = 1.2
    raw = client.chat.completions.with_raw_response.create(model="plain", messages=user("not ours"))
    assert float(raw.headers["openai-processing-ms"]) >= 1200
    assert float(raw.headers["x-asmodel-overhead-ms"]) < 600
    # The headers of this one go out while the upstream is still being waited for.
    with client.chat.completions.with_streaming_response.create(
        model="plain", messages=user("not ours either"), stream=True
    ) as response:
        assert float(response.headers["openai-processing-ms"]) >= 900
        assert float(response.headers["x-asmodel-overhead-ms"]) < 600


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_passed_through_has_its_receipt_in_the_headers_alone(client: OpenAI, stream: bool) -> None:
    ask = cast("Any", client.chat.completions.with_raw_response.create)
    raw = ask(model="default", messages=user("pass"), stream=stream)
    assert raw.headers["x-asmodel-steps"] == "0"
    if not stream:
        assert raw.headers["x-asmodel-upstream-calls"] == "1"
    assert "asmodel" not in raw.http_response.read().decode()


def test_errors_have_receipts_too(server: Server, script: Script) -> None:
    script.fault = lambda received: Fault(status=400, message="bad") if len(script.bodies) == 2 else None
    answer = server.chat({"model": "two-step", "messages": user("error receipt")})
    assert answer.status == 400
    assert answer.headers["x-asmodel-upstream-calls"] == "2"
    assert answer.json["asmodel"]["upstream_calls"] == 2
    assert answer.json["asmodel"]["steps"] == 1


def test_a_request_id_is_echoed_and_else_made(server: Server) -> None:
    body = {"model": "plain", "messages": user("id")}
    assert server.chat(body, {"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [server.chat(body, headers).headers["x-request-id"] for headers in ({}, {"x-request-id": "two words"})]
    assert all(id.startswith("req_") for id in made)
    assert made[0] != made[1]
    assert server.ask("GET", "/nowhere", headers={"x-request-id": "mine-2"}).headers["x-request-id"] == "mine-2"


def test_a_traceparent_is_taken_up(server: Server) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = server.chat({"model": "plain", "messages": user("trace")}, {"traceparent": parent})
    assert answer.headers["x-asmodel-trace-id"] == "0af7651916cd43dd8448eb211c80319c"


# ---- the cache ----


@pytest.mark.parametrize(
    ("headers", "mode", "buys"),
    [
        ({}, None, 0),
        ({"cache-control": "no-cache"}, None, 2),
        ({"cache-control": "no-store"}, None, 2),
        ({"cache-control": "max-age=0"}, None, 2),
        ({"cache-control": "max-age=3600"}, None, 0),
        ({"cache-control": "only-if-cached, max-age=3600"}, None, 0),
        ({}, "off", 2),
        ({}, "refresh", 2),
        ({}, "only", 0),
        ({"cache-control": "no-store"}, "on", 0),
    ],
)
def test_what_is_in_the_cache_is_bought_again_only_where_the_request_says_so(
    server: Server, script: Script, headers: dict[str, str], mode: str | None, buys: int
) -> None:
    body: dict[str, Any] = {"model": "two-step", "messages": user("cached")}
    assert server.chat(body).status == 200
    script.server.clear()
    answer = server.chat(body | ({} if mode is None else {"asmodel": {"cache": mode}}), headers)
    assert answer.status == 200
    assert len(script.bodies) == buys


@pytest.mark.parametrize("by", ["header", "body"])
def test_only_cached_answers_are_no_answer_where_there_are_none(server: Server, script: Script, by: str) -> None:
    body: dict[str, Any] = {"model": "two-step", "messages": user(f"never asked {by}")}
    headers = {"cache-control": "only-if-cached"} if by == "header" else {}
    answer = server.chat(body | ({"asmodel": {"cache": "only"}} if by == "body" else {}), headers)
    assert answer.status == 504
    assert answer.json["error"]["code"] == "not_cached"
    assert answer.headers["x-should-retry"] == "false"
    assert script.bodies == []


def test_nothing_is_stored_where_the_request_says_no_store(server: Server, script: Script) -> None:
    body: dict[str, Any] = {"model": "two-step", "messages": user("no trace of it")}
    server.chat(body, {"cache-control": "no-store"})
    server.chat(body)
    assert len(script.bodies) == 4


@pytest.mark.parametrize("value", ["max-age=soon", "max-age=" + "9" * 5000, "max-age"])
def test_a_max_age_that_is_no_number_is_refused(server: Server, value: str) -> None:
    answer = server.chat({"model": "plain", "messages": user("age")}, {"cache-control": value})
    assert answer.status == 400
    assert "max-age" in answer.error["message"]


def test_what_is_passed_through_is_bought_every_time(client: OpenAI, script: Script) -> None:
    for _ in range(2):
        client.chat.completions.create(model="default", messages=user("twice"))
    assert len(script.bodies) == 2


def test_two_names_of_one_model_share_what_is_bought(server: Server, script: Script) -> None:
    script.server.delay = 0.5
    models = ("plain:default", "plain:llama3.2:3b")
    with ThreadPoolExecutor() as pool:
        asked = [{"model": model, "messages": user("one of two"), "temperature": 0} for model in models]
        assert [answer.status for answer in pool.map(server.chat, asked)] == [200, 200]
    assert len(script.bodies) == 1


# ---- errors ----


def test_an_unknown_model_names_the_nearest(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="two-steps", messages=user("x"))
    assert 'did you mean "two-step"?' in caught.value.message
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="did you mean"):
        client.models.retrieve("plian")


def test_an_unsupported_parameter_is_named_before_anything_is_bought(client: OpenAI, script: Script) -> None:
    tools: Any = [{"type": "function", "function": {"name": "x"}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="two-step", messages=user("x"), tools=tools)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")
    assert '"two-step"' in caught.value.message
    assert script.bodies == []


HELLO: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "says"),
    [
        ("GET", "/v1/nowhere", None, {}, 404, "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/", HELLO, {}, 404, "/v1/chat/completions"),
        ("GET", "/v1/chat/completions", None, {}, 405, "does not take GET"),
        ("POST", "/v1/models", HELLO, {}, 405, "does not take POST"),
        ("GET", "/v1/models/nobody", None, {}, 404, "nobody"),
        ("POST", "/v1/chat/completions", b"{", {}, 400, "not JSON"),
        ("POST", "/v1/chat/completions", b"", {}, 400, "not JSON"),
        ("POST", "/v1/chat/completions", b"[]", {}, 400, "JSON object"),
        ("POST", "/v1/chat/completions", b'{"model": "\xff"}', {}, 400, "UTF-8"),
        ("POST", "/v1/chat/completions", b'{"a": ' * 500 + b"1" + b"}" * 500, {}, 400, "nested"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, {}, 400, "not JSON"),
        ("POST", "/v1/chat/completions", {"messages": []}, {}, 400, "model"),
        ("POST", "/v1/chat/completions", {**HELLO, "n": 99}, {}, 400, "`n`"),
        ("POST", "/v1/chat/completions", {**HELLO, "messages": HELLO["messages"] * 3000}, {}, 400, "at most 2048"),
        ("POST", "/v1/chat/completions", {**HELLO, "asmodel": {"roles": {"writer": "nobody"}}}, {}, 400, "nobody"),
        ("POST", "/v1/chat/completions", {**HELLO, "asmodel": {"params": {"a": 1}}}, {}, 400, "takes no parameters"),
        ("POST", "/v1/chat/completions", {**HELLO, "filler": "x" * 400_000}, {}, 413, "300000 bytes"),
        ("POST", "/v1/chat/completions", HELLO, {"content-type": "text/plain"}, 400, "application/json"),
        ("POST", "/v1/chat/completions", HELLO, {"host": "evil.example"}, 403, "local name"),
        ("POST", "/v1/chat/completions", HELLO, {"host": "[::1"}, 403, "local name"),
        ("POST", "/v1/chat/completions", HELLO, {"origin": "https://evil.example"}, 403, "origins"),
        ("POST", "/v1/chat/completions", HELLO, {"origin": "null"}, 403, "origins"),
        ("GET", "/v1/models", None, {"host": "127.0.0.1.evil.example"}, 403, "local name"),
    ],
)
def test_every_error_of_every_route_is_in_the_envelope_and_is_not_worth_a_retry(
    server: Server, script: Script, method: str, path: str, body: Any, headers: dict[str, str], status: int, says: str
) -> None:
    answer = server.ask(method, path, body, headers)
    assert answer.status == status
    assert says in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert "access-control-allow-origin" not in answer.headers
    assert script.bodies == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "[::1]:8000", "LOCALHOST:80"])
def test_a_local_host_and_origin_are_welcome(server: Server, host: str) -> None:
    headers = {"host": host, "origin": "http://localhost:3000", "content-type": "application/json; charset=utf-8"}
    assert server.chat(HELLO, headers).status == 200


@pytest.mark.parametrize(
    ("fault", "status", "code", "raised", "retries"),
    [
        (Fault(status=401), 502, "upstream_auth", openai.InternalServerError, "false"),
        (Fault(status=403), 502, "upstream_auth", openai.InternalServerError, "false"),
        (Fault(status=429, headers={"retry-after": "7"}), 429, "upstream_rate_limited", openai.RateLimitError, None),
        (Fault(status=400, message="too long"), 400, "upstream_rejected", openai.BadRequestError, "false"),
        (Fault(status=500), 503, "upstream_unavailable", openai.InternalServerError, None),
        (Fault(status=503), 503, "upstream_unavailable", openai.InternalServerError, None),
        (Fault(reset=True), 502, "upstream_unreachable", openai.InternalServerError, None),
        (Fault(body="<html>"), 502, "upstream_broken", openai.InternalServerError, None),
    ],
)
@pytest.mark.parametrize("model", ["plain", "default"])
def test_faults_of_an_upstream_become_the_sdks_own_exceptions(
    client: OpenAI, script: Script, fault: Fault, status: int, code: str, raised: Any, retries: str | None, model: str
) -> None:
    script.fault = lambda received: fault
    with pytest.raises(raised) as caught:
        client.chat.completions.create(model=model, messages=user(f"fault {fault}"))
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert 'upstream "default"' in caught.value.message
    assert caught.value.response.headers.get("x-should-retry") == retries
    if fault.status == 429:
        assert caught.value.response.headers["retry-after"] == "7"


def test_our_own_key_refused_is_said_once_and_never_retried_by_the_sdk(server: Server, script: Script) -> None:
    script.fault = lambda received: Fault(status=401)
    with pytest.raises(openai.InternalServerError), server.client(max_retries=3) as client:
        client.chat.completions.create(model="plain", messages=user("auth"))
    assert len(script.bodies) == 1


def test_an_upstream_that_is_not_there_is_named_with_its_setting(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match=r"upstreams\.nowhere\.base_url") as caught:
        client.chat.completions.create(model="plain:nowhere", messages=user("x"))
    assert caught.value.code == "upstream_unreachable"


def test_a_program_that_raises_is_named_with_its_line_and_never_quoted(server: Server) -> None:
    answer = server.chat({"model": "faulty", "messages": user("the-secret-question")})
    assert (answer.status, answer.headers["x-should-retry"]) == (500, "false")
    message = answer.json["error"]["message"]
    assert '"faulty"' in message
    assert "RuntimeError at small.py:" in message
    assert "the-secret-question" not in answer.body.decode() + server.said


def test_a_limit_of_the_request_ends_its_run(server: Server, script: Script) -> None:
    limits = {"limits": {"calls": 2}, "params": {"count": 5}}
    answer = server.chat({"model": "items", "messages": user("limits"), "asmodel": {**limits, "cache": "off"}})
    assert answer.status == 422
    assert answer.json["error"]["code"] == "limit_exceeded"
    assert len(script.bodies) == 2


def test_an_upstream_takes_no_params_or_roles(server: Server) -> None:
    answer = server.chat({**HELLO, "model": "default", "asmodel": {"params": {"a": 1}}})
    assert (answer.status, answer.error["param"]) == (400, "asmodel.params")


# ---- the small routes ----


def test_models_are_listed_with_what_they_are(client: OpenAI) -> None:
    models = {m.id: m for m in client.models.list()}
    assert {"plain", "two-step", "careful", "default", "llama3.2:3b"} <= models.keys()
    assert Counter(m.owned_by for m in models.values())["upstream"] == 3
    told: Any = (models["items"].model_extra or {})["asmodel"]
    assert told["description"] == "Many small steps, one after the other, and then the reply."
    assert told["params"]["properties"].keys() == {"count", "pause"}
    assert len(told["digest"]) == 16
    assert (models["careful"].model_extra or {})["asmodel"]["description"] == "votes"
    assert client.models.retrieve("llama3.2:3b").id == "llama3.2:3b"
    assert client.models.retrieve("plain:default").id == "plain:default"


def test_health_and_readiness_need_no_local_name(server: Server) -> None:
    for path, word in (("/healthz", "ok"), ("/readyz", "ready")):
        answer = server.ask("GET", path, headers={"host": "10.0.0.7:8000"})
        assert (answer.status, answer.json) == (200, {"status": word})


# ---- keys ----


@pytest.fixture(scope="module")
def locked(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = upstream(script.server.base_url) + '[keys]\nann = "env:ANN_KEY"\nbob = "bobs-schlüssel"\n'
    with serving(tmp_path_factory.mktemp("locked"), settings, env={"ANN_KEY": "anns-key"}) as server:
        yield server


@pytest.mark.parametrize("sent", [None, "Bearer wrong", "Basic anns-key", "anns-key", "Bearer", "Bearer anns-key2"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/chat/completions"), ("GET", "/v1/models")])
def test_without_one_of_the_keys_nothing_is_answered(locked: Server, sent: str | None, method: str, path: str) -> None:
    answer = locked.ask(method, path, HELLO, {} if sent is None else {"authorization": sent})
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert "anns-key" not in answer.body.decode()


def test_the_sdk_raises_an_authentication_error_at_once(locked: Server) -> None:
    with pytest.raises(openai.AuthenticationError), locked.client(max_retries=5) as client:
        client.chat.completions.create(model="plain", messages=user("x"))


def test_each_holder_of_a_key_has_a_cache_of_its_own(locked: Server, script: Script) -> None:
    script.reset()
    for key, calls in (("anns-key", 1), ("bobs-schlüssel", 2), ("anns-key", 2), ("bobs-schlüssel", 2)):
        answer = locked.chat(
            HELLO, {"authorization": f"Bearer {key}".encode().decode("latin-1"), "host": "any.example"}
        )
        assert answer.status == 200
        assert len(script.bodies) == calls
    assert "caller=ann" in locked.said
    assert "anns-key" not in locked.said
