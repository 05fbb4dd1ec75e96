"""What tests of programs lean on: an upstream made of a function, and a scripted server over real HTTP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import pytest
from tests.timed import in_time, timed

from asmodel.calls import Call, Chat, Completion, Delta, Embed, Message, Reply, Score, Terms, ToolCall
from asmodel.errors import UpstreamUnavailable
from asmodel.testing import Fault, FunctionUpstream, Received, ScriptedServer, ToyModel

CHAT = Chat(identity="i", messages=(Message("user", "Who is there?"),))
SCORE = Score(identity="i", context="It rains.\n\nQ:", continuation=" Does it rain?")


async def post(server: ScriptedServer, route: str, body: Mapping[str, Any], **kind: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(server.base_url + route, json=body, **kind) as response:
        return response.status, await response.json()


# --- FunctionUpstream


async def test_a_function_answers_with_text() -> None:
    upstream = FunctionUpstream(lambda call: "It is I.", name="fake")
    reply = await upstream.send(CHAT, Terms())
    assert (reply.text, reply.finish, reply.model, reply.upstream) == ("It is I.", "stop", "fake", "fake")
    assert reply.usage.estimated
    assert reply.usage.completion_tokens > 0
    assert upstream.identity == "function:fake"
    assert upstream.calls == [CHAT]


async def test_a_function_may_be_async_and_may_want_the_terms() -> None:
    async def answer(call: Call, terms: Terms) -> str:
        await asyncio.sleep(0)
        return f"{call.kind} for {terms.step}"

    upstream = FunctionUpstream(answer)
    assert (await upstream.send(CHAT, Terms(step="guess"))).text == "chat for guess"
    assert [t.step for t in upstream.terms] == ["guess"]


async def test_a_parameter_with_a_default_is_left_alone() -> None:
    answers = iter("ab")

    def answer(call: Call, rest: Iterator[str] = answers) -> str:
        return next(rest)

    upstream = FunctionUpstream(answer)
    assert [(await upstream.send(CHAT, Terms())).text for _ in range(2)] == ["a", "b"]


async def test_text_streams_in_a_few_deltas_that_add_up_to_the_reply() -> None:
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    text = "The rain in Spain stays mainly in the plain."
    call = ToolCall(id="1", name="look", arguments="{}")
    upstream = FunctionUpstream(lambda call_: Reply(text=text, reasoning="Hm, hm.", tool_calls=(call,)))
    reply = await upstream.send(CHAT, Terms(emit=emit))
    assert "".join(d.text for d in deltas) == reply.text == text
    assert "".join(d.reasoning for d in deltas) == reply.reasoning
    assert [t.arguments for d in deltas for t in d.tool_calls] == ["{}"]
    assert 1 < sum(bool(d.text) for d in deltas) <= 4


@pytest.mark.parametrize("answer", [-12.3, (-12.3, 7), (-0.1, 1), (-1e-9, 3), -5])
async def test_a_number_is_the_nats_of_a_score(answer: float | tuple[float, int]) -> None:
    reply = await FunctionUpstream(lambda call: answer).send(SCORE, Terms())
    total, tokens = answer if isinstance(answer, tuple) else (answer, 3)
    assert (reply.likelihood.total, reply.likelihood.tokens) == (total, tokens)
    assert "".join(t.token for t in reply.logprobs) == SCORE.continuation


async def test_an_error_is_raised_whether_returned_or_raised() -> None:
    def raises(_: Call) -> str:
        raise UpstreamUnavailable("not today")

    def returns(_: Call) -> Exception:
        return UpstreamUnavailable("not today")

    for function in (raises, returns):
        upstream = FunctionUpstream(function)
        with pytest.raises(UpstreamUnavailable, match="not today"):
            await upstream.send(CHAT, Terms())
        assert upstream.calls == [CHAT]


async def test_an_answer_of_the_wrong_kind_is_told_apart() -> None:
    with pytest.raises(TypeError, match="of kind score is answered with nats"):
        await FunctionUpstream(lambda call: "yes").send(SCORE, Terms())
    with pytest.raises(TypeError, match="of kind embed is answered with embeddings"):
        await FunctionUpstream(lambda call: "yes").send(Embed(identity="i", texts=("a",)), Terms())
    with pytest.raises(TypeError, match="of kind completion is answered with text"):
        await FunctionUpstream(lambda call: 1.0).send(Completion(identity="i", prompt="a"), Terms())


# --- ScriptedServer


async def test_equal_requests_have_equal_answers_and_others_have_others() -> None:
    with ScriptedServer() as server:
        bodies = [{"model": "m", "messages": [{"role": "user", "content": text}]} for text in ("a", "a", "b")]
        answers = [await post(server, "/chat/completions", body) for body in bodies]
        texts = [body["choices"][0]["message"]["content"] for _, body in answers]
    assert texts[0] == texts[1] != texts[2]
    assert [status for status, _ in answers] == [200] * 3


async def test_a_script_is_asked_with_the_body_and_requests_are_remembered() -> None:
    async def answer(body: dict[str, Any]) -> str:
        await asyncio.sleep(0)
        return str(body["messages"][-1]["content"]).upper()

    with ScriptedServer(answer) as server:
        _, body = await post(
            server, "/chat/completions", {"messages": [{"role": "user", "content": "hey"}]}, headers={"X-Me": "1"}
        )
        (received,) = server.requests
    assert body["choices"][0]["message"]["content"] == "HEY"
    assert (received.path, received.headers["x-me"]) == ("/v1/chat/completions", "1")
    assert received.body["messages"] == [{"role": "user", "content": "hey"}]
    assert received.answered_at is not None
    assert received.left_at is None


async def test_a_sequence_is_given_in_order_and_its_last_for_ever() -> None:
    with ScriptedServer(["one", Fault(status=503), "two"]) as server:
        answers = [await post(server, "/chat/completions", {"messages": []}) for _ in range(4)]
    assert [status for status, _ in answers] == [200, 503, 200, 200]
    assert answers[3][1]["choices"][0]["message"]["content"] == "two"


async def test_a_script_that_raises_tells_its_client() -> None:
    with ScriptedServer(lambda body: str(body["nothing"])) as server:
        status, body = await post(server, "/chat/completions", {"messages": []})
    assert status == 500
    assert "KeyError('nothing')" in body["error"]["message"]


async def test_the_toy_model_scores_what_it_generated_as_it_generated_it() -> None:
    with ScriptedServer() as server:
        prompt = "The amber river is"
        ask = {"prompt": prompt, "logprobs": 1, "max_tokens": 6}
        _, said = await post(server, "/completions", ask)
        text = said["choices"][0]["text"]
        _, scored = await post(
            server, "/completions", {"prompt": prompt + text, "logprobs": 1, "max_tokens": 0, "echo": True}
        )
    generated, echoed = said["choices"][0]["logprobs"], scored["choices"][0]["logprobs"]
    assert echoed["token_logprobs"][0] is None
    assert echoed["tokens"][-6:] == generated["tokens"]
    assert echoed["token_logprobs"][-6:] == generated["token_logprobs"]
    assert scored["choices"][0]["text"] == prompt + text
    places = zip(echoed["tokens"], echoed["text_offset"], strict=True)
    assert all((prompt + text)[at:].startswith(token) for token, at in places)


def test_the_toy_model_prefers_the_paragraph_that_holds_the_words() -> None:
    toy = ToyModel()
    question = toy.tokens(" Where is the lantern?")
    near, far = (toy.tokens(f"{text}\n\nQ:") for text in ("The lantern is in the grove.", "A kettle of basil."))
    assert sum(toy.score(question, near)) > sum(toy.score(question, far))


async def test_embeddings_and_models_are_served() -> None:
    with ScriptedServer(models=["a", "b"]) as server:
        _, body = await post(server, "/embeddings", {"input": ["x", "y", "x"]})
        async with aiohttp.ClientSession() as session, session.get(f"{server.base_url}/models") as response:
            models = await response.json()
    vectors = [entry["embedding"] for entry in body["data"]]
    assert vectors[0] == vectors[2] != vectors[1]
    assert [m["id"] for m in models["data"]] == ["a", "b"]


async def test_faults_come_before_any_answer_on_every_route() -> None:
    def faults(received: Received) -> Fault | None:
        return Fault(status=429, headers={"retry-after": "2"}, code="slow") if "embed" in received.path else None

    with ScriptedServer(faults=faults) as server:
        assert (await post(server, "/chat/completions", {"messages": []}))[0] == 200
        status, body = await post(server, "/embeddings", {"input": "x"})
        assert (await post(server, "/nothing", {}))[0] == 404
        assert (await post(server, "/tokenize", {}))[0] == 404
    assert (status, body["error"]["code"]) == (429, "slow")


async def test_a_stream_comes_piece_by_piece_and_ends_as_it_should() -> None:
    with ScriptedServer(lambda body: "one two three", token_delay=0.03) as server:
        body: dict[str, Any] = {"messages": [], "stream": True, "stream_options": {"include_usage": True}}
        times: list[float] = []
        lines: list[bytes] = []
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{server.base_url}/chat/completions", json=body) as response,
        ):
            async for line in response.content:
                if line.strip():
                    times.append(time.monotonic())
                    lines.append(line.strip())
    assert lines[-1] == b"data: [DONE]"
    assert b'"choices":[]' in lines[-2]
    assert b'"usage":{"prompt_tokens"' in lines[-2]
    assert b'"finish_reason":"stop"' in lines[-3]
    assert times[-1] - times[0] > 0.1


@timed
async def test_small_answers_do_not_wait_for_acknowledgements() -> None:
    with ScriptedServer() as server:
        async with aiohttp.ClientSession() as session:
            started = time.monotonic()
            for _ in range(30):
                async with session.post(f"{server.base_url}/chat/completions", json={"messages": []}) as response:
                    await response.read()
            # Nagle's algorithm against delayed acknowledgements costs 40 ms each.
            in_time(time.monotonic() - started, 0.6)


@pytest.mark.parametrize("fault", [Fault(reset=True), Fault(after=2, reset=True)])
async def test_a_connection_is_reset_before_or_in_the_middle(fault: Fault) -> None:
    with ScriptedServer(lambda body: fault) as server:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                async with session.post(
                    f"{server.base_url}/chat/completions", json={"messages": [], "stream": True}
                ) as response:
                    await response.read()


@timed
async def test_it_is_seen_when_a_client_leaves() -> None:
    with ScriptedServer(delay=5) as server:
        leaving = asyncio.create_task(post(server, "/chat/completions", {"messages": []}))
        await asyncio.sleep(0.2)
        assert server.in_flight == 1
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        left = time.monotonic()
        await asyncio.sleep(0.1)
        in_time(time.monotonic() - left, 0.15)
        (received,) = server.requests
        assert received.left_at is not None
        assert received.answered_at is None
        assert (server.in_flight, server.max_in_flight) == (0, 1)


def test_a_server_stops_while_it_answers() -> None:
    started = time.monotonic()
    with ScriptedServer(delay=30) as server:
        port = int(server.address.rpartition(":")[2])
        asking = subprocess.Popen(
            [sys.executable, "-c", f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/v1/models')"],
            stderr=subprocess.DEVNULL,
        )
        while not server.in_flight:
            time.sleep(0.01)
    assert time.monotonic() - started < 10
    assert asking.wait(10) != 0


def test_the_server_runs_as_a_process_of_its_own() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "asmodel.testing", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        code = f"import urllib.request as u; print(u.urlopen('{address}/models').status)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10, check=True)
        assert done.stdout.strip() == "200"
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
