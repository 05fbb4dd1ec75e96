"""An upstream through litellm, over real HTTP: in one process of its own, as importing litellm takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

KEY = "sk-test-0123456789abcdef"

SCRIPT = """
import asyncio, json, os, sys, time, traceback
from asmodel import tracing
from asmodel.calls import Chat, Completion, Embed, Message, Score, Terms
from asmodel.errors import AsmodelError
from asmodel.testing import Fault, ScriptedServer
from asmodel_plugins.litellm_upstream import LiteLLMUpstream
from opentelemetry.sdk.trace import TracerProvider

KEY = "sk-test-0123456789abcdef"
CHAT = Chat(identity="i", messages=(Message("user", "What is under the lantern?"),))
seen = {"before": "litellm" in sys.modules}

def shown(reply):
    body = json.loads(reply.dump())
    return {k: body[k] for k in ("text", "finish", "usage", "reasoning", "tool_calls", "upstream", "model", "cost")}

async def failure(upstream, call=CHAT, terms=Terms()):
    try:
        await upstream.send(call, terms)
    except AsmodelError as error:
        shape = [type(error).__name__, error.code, error.retry_after, str(error)]
        # What a log would show of it: everything that it drags along.
        return shape + ["".join(traceback.format_exception(error))]
    return None

async def emitting(upstream, call=CHAT):
    deltas = []
    async def emit(delta):
        deltas.append(delta)
    reply = await upstream.send(call, Terms(emit=emit))
    return shown(reply), [d.text for d in deltas], [d.reasoning for d in deltas]

look = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
score = Score(identity="i", context="The lantern is in the grove.\\n\\nQ:", continuation=" Where is the lantern?")

async def main():
    def answer(body):
        last = body["messages"][-1]["content"] if "messages" in body else ""
        return {
            "think": {"content": "Forty.", "reasoning_content": "Six by seven."},
            "tool": {"content": None, "tool_calls": [look]},
            "cut": Fault(after=2, answer="one two three four"),
            "slow": "word " * 500,
            "401": Fault(status=401, message=f"Incorrect API key: {KEY}"),
            "400": Fault(status=400, message=f"too long for {KEY}", code="context_length_exceeded"),
            "429": Fault(status=429, headers={"retry-after": "3"}, message="slow down"),
            "quota": Fault(status=429, code="insufficient_quota", message="insufficient_quota: you have none"),
            "404": Fault(status=404, message="no such model"),
            "500": Fault(status=500, message="sorry"),
            "reset": Fault(reset=True),
        }.get(last)

    with ScriptedServer(answer) as server:
        upstream = LiteLLMUpstream(name="lite", model="openai/scripted", api_key=KEY, base_url=server.base_url)
        other = LiteLLMUpstream(name="other", model="openai/scripted", api_key=KEY, base_url=server.base_url)
        ticks = 0
        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1
        ticking = asyncio.create_task(tick())
        await asyncio.gather(upstream.open(), other.open())
        ticking.cancel()
        seen["ticks"] = ticks
        say = lambda text, **params: Chat(identity="i", messages=(Message("user", text),), params=params)

        seen["whole"] = shown(await upstream.send(CHAT, Terms()))
        seen["streamed"] = await emitting(upstream)
        seen["think"] = shown(await upstream.send(say("think"), Terms()))
        seen["think streamed"] = await emitting(upstream, say("think"))
        seen["tool"] = shown(await upstream.send(say("tool"), Terms()))
        seen["tool streamed"] = await emitting(upstream, say("tool"))
        seen["cut"] = await failure(upstream, say("cut"), Terms(emit=lambda d: asyncio.sleep(0)))
        for name in ("401", "400", "429", "quota", "404", "500", "reset"):
            seen[name] = await failure(upstream, say(name))
        server.clear()
        theirs = {"api_base": "http://127.0.0.1:9/v1", "api_key": "sk-evil-000000", "mock_response": "ha"}
        evil = say("hi", **theirs, top_k=3, temperature=0.5)
        seen["evil"] = shown(await upstream.send(evil, Terms()))
        seen["evil body"] = server.requests[0].body
        seen["evil key"] = server.requests[0].headers["authorization"]
        await other.close()

        raw = Completion(identity="i", prompt="The amber river is", params={"max_tokens": 5})
        server.clear()
        seen["raw"] = shown(await upstream.send(raw, Terms()))
        seen["raw streamed"] = await emitting(upstream, raw)
        seen["raw paths"] = [r.path for r in server.requests]
        seen["embed"] = len((await upstream.send(Embed(identity="i", texts=("a", "b")), Terms())).embeddings)
        seen["cheap"] = (await upstream.capabilities()).loglikelihood
        seen["detected"] = (await upstream.detect()).loglikelihood
        seen["score"] = [[t.token, t.logprob] for t in (await upstream.send(score, Terms())).logprobs]

        for hosts in ([], ["127.0.0.1"]):
            provider = TracerProvider()
            tracing.install(provider, hosts=hosts)
            server.clear()
            with tracing.start_request("POST", "/v1/x", {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}):
                for call in (CHAT, raw, Embed(identity="i", texts=("a",))):
                    await upstream.send(call, Terms())
                await emitting(upstream)
            tracing.remove(provider)
            seen["told" if hosts else "not told"] = [r.headers.get("traceparent") for r in server.requests]

        server.token_delay = 0.02
        got = asyncio.Event()
        async def emit(delta):
            got.set()
        # The best of five, where the first is not in time: what else the machine does only adds.
        seen["left after"] = 99
        for _ in range(5):
            got.clear()
            server.clear()
            task = asyncio.create_task(upstream.send(say("slow"), Terms(emit=emit)))
            await got.wait()
            left = time.monotonic()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while server.requests[0].left_at is None and time.monotonic() - left < 2:
                await asyncio.sleep(0.005)
            seen["left after"] = (server.requests[0].left_at or left + 99) - left
            if seen["left after"] < 0.5:
                break
        await upstream.close()

        again = LiteLLMUpstream(name="again", model="openai/scripted", api_key=KEY, base_url=server.base_url)
        server.token_delay = 0
        await again.open()
        seen["again"] = shown(await again.send(CHAT, Terms()))
        await again.close()

    for scores in ("ignored", "shifted"):
        with ScriptedServer(scores=scores) as server:
            upstream = LiteLLMUpstream(name="lite", model="openai/scripted", api_key=KEY, base_url=server.base_url)
            await upstream.open()
            seen[scores] = (await upstream.detect()).loglikelihood
            seen[scores + " score"] = await failure(upstream, score)
            await upstream.close()

    gone = LiteLLMUpstream(name="gone", model="openai/scripted", api_key=KEY, base_url=server_address)
    keyless = LiteLLMUpstream(name="keyless", model="anthropic/claude-sonnet-4-5")
    bare = LiteLLMUpstream(name="bare", model="openai/gpt-4o-mini")
    for upstream in (gone, keyless, bare):
        await upstream.open()
    seen["gone"] = await failure(gone)
    seen["keyless"] = await failure(keyless)
    seen["bare"] = await failure(bare)
    seen["keyless raw"] = await failure(keyless, raw)
    can = await bare.capabilities()
    seen["bare can"] = [can.chat, can.completion, can.schema, can.tools, can.embeddings, can.context]
    for upstream in (gone, keyless, bare):
        await upstream.close()
    with ScriptedServer(lambda body: "x") as server:
        priced = LiteLLMUpstream(name="priced", model="openai/gpt-4o-mini", api_key=KEY, base_url=server.base_url)
        await priced.open()
        seen["priced"] = [(await priced.send(CHAT, Terms())).cost, (await emitting(priced))[0]["cost"]]
        await priced.close()
    try:
        odd = LiteLLMUpstream(name="odd", model="nonsense-without-provider")
        await odd.open()
    except AsmodelError as error:
        seen["odd"] = [type(error).__name__, str(error)]

import socket
with socket.socket() as bound:
    bound.bind(("127.0.0.1", 0))
    server_address = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
asyncio.run(main())
print("SEEN" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def process() -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_KEY")}
    environment["PYTHONPATH"] = os.pathsep.join(str(root / room) for room in ("proxy", "plugins"))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=55, check=False
    )


@pytest.fixture(scope="module")
def seen(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = [line for line in process.stdout.splitlines() if line.startswith("SEEN")]
    assert lines, process.stderr[-4000:]
    return cast("dict[str, Any]", json.loads(lines[0].removeprefix("SEEN")))


def test_litellm_is_imported_on_opening_and_the_loop_goes_on_meanwhile(seen: dict[str, Any]) -> None:
    assert seen["before"] is False
    assert seen["ticks"] > 10


def test_a_streamed_reply_is_the_whole_reply(seen: dict[str, Any]) -> None:
    assert seen["whole"]["text"].startswith("scripted ")
    assert seen["whole"]["upstream"] == "lite"
    assert not seen["whole"]["usage"]["estimated"]
    streamed, texts, _ = seen["streamed"]
    assert streamed == seen["whole"]
    assert "".join(texts) == streamed["text"]
    assert len(texts) == 2


def test_reasoning_and_tool_calls_come_through(seen: dict[str, Any]) -> None:
    assert seen["think"]["reasoning"] == "Six by seven."
    streamed, texts, thoughts = seen["think streamed"]
    assert (streamed["text"], "".join(texts), "".join(thoughts)) == ("Forty.", "Forty.", "Six by seven.")
    for reply in (seen["tool"], seen["tool streamed"][0]):
        assert reply["tool_calls"] == [{"id": "c1", "name": "look", "arguments": "{}"}]
        assert reply["finish"] == "tool_calls"


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("401", "UpstreamAuth", "upstream_auth"),
        ("400", "UpstreamRejected", "context_length_exceeded"),
        ("429", "UpstreamRateLimited", "upstream_rate_limited"),
        ("quota", "UpstreamError", "insufficient_quota"),
        ("404", "UpstreamError", "upstream_model_not_found"),
        ("500", "UpstreamUnavailable", "upstream_unavailable"),
        ("reset", "UpstreamUnreachable", "upstream_unreachable"),
        ("gone", "UpstreamUnreachable", "upstream_unreachable"),
        ("cut", "UpstreamBroken", "upstream_broken"),
        ("ignored score", "Unsupported", "unsupported_parameter"),
        ("keyless raw", "Unsupported", "unsupported_parameter"),
    ],
)
def test_what_litellm_raises_is_raised_as_ours_and_without_the_key(
    seen: dict[str, Any], name: str, kind: str, code: str
) -> None:
    found = seen[name]
    assert found[:2] == [kind, code]
    assert KEY not in found[3] + found[4]
    assert "litellm." not in found[3]
    assert "Exception -" not in found[3]
    assert found[2] == (3.0 if name == "429" else None)


def test_a_missing_key_is_told_by_the_name_of_its_variable(seen: dict[str, Any]) -> None:
    assert seen["keyless"][0] == seen["bare"][0] == "UpstreamAuth"
    assert "ANTHROPIC_API_KEY" in seen["keyless"][3]
    assert "OPENAI_API_KEY" in seen["bare"][3]
    assert "upstreams.keyless.api_key" in seen["keyless"][3]


def test_a_client_cannot_say_where_our_key_is_sent(seen: dict[str, Any]) -> None:
    assert seen["evil"]["text"].startswith("scripted ")
    assert seen["evil key"] == f"Bearer {KEY}"
    assert seen["evil body"]["top_k"] == 3
    assert seen["evil body"]["temperature"] == 0.5
    assert seen["evil body"]["mock_response"] == "ha"


def test_raw_completions_stay_raw(seen: dict[str, Any]) -> None:
    assert seen["raw paths"] == ["/v1/completions", "/v1/completions"]
    streamed, texts, _ = seen["raw streamed"]
    assert streamed["text"] == seen["raw"]["text"] == "".join(texts) != ""
    assert streamed["finish"] == seen["raw"]["finish"] == "length"
    assert streamed["usage"] == seen["raw"]["usage"]


def test_embeddings_come_one_a_text(seen: dict[str, Any]) -> None:
    assert seen["embed"] == 2


def test_given_text_is_scored_only_where_that_is_proven(seen: dict[str, Any]) -> None:
    assert seen["cheap"] is False
    assert seen["detected"] is True
    assert [token for token, _ in seen["score"]] == [" Where", " is", " the", " lantern", "?"]
    assert seen["ignored"] is seen["shifted"] is False


def test_only_a_host_that_may_know_is_told_the_trace(seen: dict[str, Any]) -> None:
    assert seen["not told"] == [None] * 4
    assert all(told.startswith(f"00-{'ab' * 16}-") for told in seen["told"])
    assert len(seen["told"]) == 4


def test_a_cancelled_call_is_seen_to_leave(seen: dict[str, Any]) -> None:
    assert seen["left after"] < 0.5


def test_closing_the_last_leaves_nothing_that_the_next_would_trip_over(
    seen: dict[str, Any], process: subprocess.CompletedProcess[str]
) -> None:
    assert seen["again"]["text"] == seen["whole"]["text"]
    assert process.returncode == 0
    for complaint in ("Unclosed", "never awaited", "Task was destroyed", "Traceback"):
        assert complaint not in process.stderr, process.stderr[-4000:]
    assert KEY not in process.stderr


def test_a_known_model_has_a_price_and_an_unknown_one_has_none(seen: dict[str, Any]) -> None:
    assert seen["whole"]["cost"] is None
    whole, streamed = seen["priced"]
    assert 0 < whole < 0.001
    assert streamed == whole


def test_capabilities_are_what_litellm_knows_of_the_model(seen: dict[str, Any]) -> None:
    assert seen["bare can"] == [True, True, True, True, False, 128000]


def test_a_model_without_a_provider_stops_the_start(seen: dict[str, Any]) -> None:
    kind, message = seen["odd"]
    assert kind == "ConfigurationError"
    assert "upstreams.odd.model" in message
    assert "openai/gpt-4o-mini" in message
