"""`POST /v1/completions` and `POST /v1/embeddings` of a real server: passed through, translated, cached and refused."""

from __future__ import annotations

import base64
import http.client
import json
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.serving import Answered, Server, command, eventually, serving, upstream

from asmodel.calls import Embed, key
from asmodel.completions import logprobs, packed
from asmodel.testing import Fault, Received, ScriptedServer

COMPLETION: dict[str, Any] = {
    "id": "theirs-1",
    "object": "text_completion",
    "created": 7,
    "model": "their-model",
    "x_unknown": {"deep": [1.50, None, "ü"]},
    "choices": [
        {"index": 0, "text": " one", "logprobs": None, "finish_reason": "stop"},
        {"index": 1, "text": " two", "logprobs": None, "finish_reason": "length"},
    ],
    "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
}
RAW = json.dumps(COMPLETION, indent=1).encode()
VECTORS: dict[str, Any] = {
    "object": "list",
    "model": "their-embedder",
    "x_unknown": [1.50],
    "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -1.5]}],
    "usage": {"prompt_tokens": 4, "total_tokens": 4},
}


class Upstream(ScriptedServer):
    """Sends the bytes that it is told to, or what a small model would."""

    def __init__(self) -> None:
        self.fault: Callable[[Received], Fault | None] = lambda received: None
        super().__init__(None, faults=lambda received: self.fault(received))

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
    started.fault = lambda received: None
    started.delay = started.token_delay = 0.0
    started.clear()
    return started


@pytest.fixture(scope="module")
def server(started: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = (
        upstream(started.base_url, retries=0)
        + upstream(started.base_url, "chat-only", retries=0, can={"completion": False, "embeddings": False}).replace(
            '{"completion": false, "embeddings": false}', "{ completion = false, embeddings = false }"
        )
        + upstream(started.base_url, "priced", retries=0)
        + "price = { input = 1.0, output = 2.0 }\n"
        + upstream(started.base_url, "translated", kind="litellm", retries=0).replace('"scripted"', '"openai/scripted"')
        + '[models.mine]\nprogram = "plain"\n[keys]\nann = "the-key-of-ann"\nbob = "the-key-of-bob"\n'
    )
    with serving(tmp_path_factory.mktemp("completions"), settings, env={"OPENAI_API_KEY": "unused"}) as running:
        yield running


ANN = {"authorization": "Bearer the-key-of-ann"}


def complete(server: Server, prompt: Any = "Once", headers: dict[str, str] | None = None, **more: Any) -> Answered:
    body = {"model": "default", "prompt": prompt, **more}
    return server.ask("POST", "/v1/completions", body, {**ANN, **(headers or {})})


def embed(server: Server, given: Any = "bell", headers: dict[str, str] | None = None, **more: Any) -> Answered:
    body = {"model": "default", "input": given, **more}
    return server.ask("POST", "/v1/embeddings", body, {**ANN, **(headers or {})})


def events(body: bytes) -> list[dict[str, Any]]:
    *lines, last, empty = body.split(b"\n\n")
    assert (last, empty) == (b"data: [DONE]", b"")
    return [json.loads(line.removeprefix(b"data: ")) for line in lines if not line.startswith(b":")]


# ---- what an upstream is sent, and what comes back ----


@pytest.mark.parametrize("prompt", ["Once", ["Once", "Twice"], [5, 6, 7], [[5, 6], [7]]])
def test_a_prompt_reaches_the_upstream_as_it_came(server: Server, up: Upstream, prompt: Any) -> None:
    up.raw(RAW)
    sent: dict[str, Any] = {
        "n": 2,
        "best_of": 3,
        "echo": True,
        "logprobs": 0,
        "suffix": "end",
        "stop": ["a"],
        "max_tokens": 0,
    }
    sent |= {"temperature": 1, "user": None, "x_unknown": {"a": [1]}, "logit_bias": {"50256": -100}}
    assert complete(server, prompt, **sent).status == 200
    assert up.last == {"model": "scripted", "prompt": prompt, **sent}


@pytest.mark.parametrize("given", ["bell", ["bell"], [5, 6], [[5, 6]]])
def test_what_is_embedded_reaches_the_upstream_as_it_came(server: Server, up: Upstream, given: Any) -> None:
    up.raw(json.dumps(VECTORS).encode())
    sent: dict[str, Any] = {"encoding_format": "base64", "dimensions": 2, "user": "u", "x_unknown": None}
    assert embed(server, given, **sent, asmodel={"cache": "off"}).status == 200
    assert up.last == {"model": "scripted", "input": given, **sent}


def test_the_upstreams_own_bytes_come_back_with_the_receipt_in_the_headers(server: Server, up: Upstream) -> None:
    up.raw(RAW)
    answer = complete(server, n=2)
    assert answer.body == RAW
    assert answer.headers["x-asmodel-upstream-calls"] == "1"
    assert len(answer.headers["x-asmodel-trace-id"]) == 32
    raw = json.dumps(VECTORS, indent=2).encode()
    up.raw(raw)
    answer = embed(server)
    assert answer.body == raw
    assert answer.headers["x-asmodel-upstream-calls"] == "1"


def test_a_stream_is_the_upstreams_own_events(server: Server, up: Upstream) -> None:
    def chunk(text: str, index: int = 0, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        return {"id": "x", "object": "text_completion", "created": 7, "model": "m", "choices": [choice], "y": 1.50}

    sent = [chunk("Hel"), chunk("other", 1), chunk("lo\n\nü"), chunk("", 0, "stop")]
    usage: dict[str, Any] = {
        "id": "x",
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    lines = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in [*sent, usage])
    up.raw(lines + b"data: [DONE]\n\n", stream=True)
    answer = complete(server, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events(answer.body) == sent
    assert up.last["stream_options"] == {"include_usage": True}
    assert events(complete(server, stream=True, stream_options={"include_usage": True}).body) == [*sent, usage]


def test_an_upstream_that_does_not_stream_is_streamed_as_text(server: Server, up: Upstream) -> None:
    up.raw(RAW)
    (made,) = events(complete(server, stream=True).body)
    assert made == {name: value for name, value in COMPLETION.items() if name != "usage"}


def test_the_official_sdk_takes_both_and_decodes_what_it_asks_for(server: Server, up: Upstream) -> None:
    client = server.client(api_key="the-key-of-ann")
    text = client.completions.create(model="default", prompt="Once upon", max_tokens=3)
    assert text.object == "text_completion"
    assert text.choices[0].text
    streamed = client.completions.create(model="default", prompt="Once upon", max_tokens=3, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text.choices[0].text
    # It asks for base64 where numpy is there, and takes numbers as well.
    vectors = client.embeddings.create(model="default", input=["a", "b"], encoding_format="float").data
    again = client.embeddings.create(
        model="default", input=["a", "b"], encoding_format="base64", extra_body={"asmodel": {"cache": "refresh"}}
    ).data
    assert [len(v.embedding) for v in vectors] == [8, 8]
    unpacked = [struct.unpack("<8f", base64.b64decode(str(v.embedding))) for v in again]
    assert unpacked[1] == pytest.approx(vectors[1].embedding, rel=1e-6)


# ---- cached on request ----


def test_each_prompt_of_a_list_is_cached_by_itself(server: Server, up: Upstream) -> None:
    on: dict[str, Any] = {"asmodel": {"cache": "on"}, "max_tokens": 4, "n": 2}
    first = complete(server, ["red", "blue"], **on)
    assert [c["index"] for c in first.json["choices"]] == [0, 1, 2, 3]
    assert [r.body["prompt"] for r in up.requests] == ["red", "red", "blue", "blue"]
    assert first.headers["x-asmodel-upstream-calls"] == "4"
    assert first.json["usage"]["completion_tokens"] == 16
    second = complete(server, ["blue", "green"], **on)
    assert second.headers["x-asmodel-cache-hits"] == "2"
    assert [c["text"] for c in second.json["choices"][:2]] == [c["text"] for c in first.json["choices"][2:]]
    assert second.json["object"] == "text_completion"
    assert second.json["id"].startswith("cmpl-")


def test_tokens_are_cached_by_their_numbers(server: Server, up: Upstream) -> None:
    on: dict[str, Any] = {"headers": {"cache-control": "max-age=600"}}
    assert complete(server, [[1, 2], [3]], **on).status == 200
    assert [r.body["prompt"] for r in up.requests] == [[1, 2], [3]]
    assert complete(server, [[3], [1, 2]], **on).headers["x-asmodel-upstream-calls"] == "0"


def test_a_cached_completion_is_streamed_as_text(server: Server, up: Upstream) -> None:
    on: dict[str, Any] = {
        "asmodel": {"cache": "on"},
        "max_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    bought = events(complete(server, "A tree", **on).body)
    hit = events(complete(server, "A tree", **on).body)
    for chunks in (bought, hit):
        *said, end, usage = chunks
        assert {c["object"] for c in chunks} == {"text_completion"}
        assert end["choices"][0]["finish_reason"] == "length"
        assert all(c["choices"][0]["finish_reason"] is None for c in said)
        assert usage["choices"] == []
    texts = ["".join(c["choices"][0]["text"] for c in chunks[:-1]) for chunks in (bought, hit)]
    assert texts[0] == texts[1] != ""
    assert (bought[-1]["usage"]["total_tokens"] > 0, hit[-1]["usage"]["total_tokens"]) == (True, 0)
    assert len(up.requests) == 1


def test_cached_log_probabilities_have_the_shape_of_completions(server: Server, up: Upstream) -> None:
    asked: dict[str, Any] = {"prompt": "The old bell", "max_tokens": 3, "logprobs": 1, "temperature": 0}
    theirs = complete(server, **asked).json["choices"][0]["logprobs"]
    ours = complete(server, **asked, asmodel={"cache": "on"}).json["choices"][0]["logprobs"]
    assert ours == theirs
    echoed: dict[str, Any] = {**asked, "echo": True, "prompt": "The old bell rings"}
    theirs = complete(server, **echoed).json["choices"][0]
    ours = complete(server, **echoed, asmodel={"cache": "on"}).json["choices"][0]
    assert ours == theirs
    assert ours["logprobs"]["token_logprobs"][0] is None


def test_embeddings_are_cached_in_the_format_that_was_asked_for(server: Server, up: Upstream) -> None:
    on: dict[str, Any] = {"asmodel": {"cache": "on"}}
    bought = embed(server, ["bell", "tower"], **on)
    hit = embed(server, ["bell", "tower"], **on)
    assert hit.json["data"] == bought.json["data"]
    assert [d["index"] for d in hit.json["data"]] == [0, 1]
    assert (hit.headers["x-asmodel-cache-hits"], hit.headers["x-asmodel-upstream-calls"]) == ("1", "0")
    assert (bought.json["usage"]["prompt_tokens"] > 0, hit.json["usage"]) == (
        True,
        {"prompt_tokens": 0, "total_tokens": 0},
    )
    vector = bought.json["data"][0]["embedding"]
    encoded = embed(server, ["bell", "tower"], **on, encoding_format="base64").json["data"][0]["embedding"]
    assert struct.unpack(f"<{len(vector)}f", base64.b64decode(encoded)) == pytest.approx(vector, rel=1e-6)
    up.raw(json.dumps({**VECTORS, "data": [{"index": 0, "embedding": packed([0.25, -1.5])}]}).encode())
    assert embed(server, "packed", **on, encoding_format="base64").json["data"][0]["embedding"] == packed([0.25, -1.5])


def test_one_keys_cache_is_not_anothers(server: Server, up: Upstream) -> None:
    on: dict[str, Any] = {"asmodel": {"cache": "on"}}
    bob = {"authorization": "Bearer the-key-of-bob"}
    for headers in (None, bob):
        assert embed(server, "whose", headers, **on).headers["x-asmodel-upstream-calls"] == "1"
        assert complete(server, "whose", headers, **on).headers["x-asmodel-upstream-calls"] == "1"


def test_what_only_the_cache_may_answer_is_a_504_where_it_cannot(server: Server, up: Upstream) -> None:
    for answer in (
        complete(server, "nobody knows", asmodel={"cache": "only"}),
        embed(server, asmodel={"cache": "only"}),
    ):
        assert (answer.status, answer.error["code"]) == (504, "not_cached")
    assert not up.requests


def test_equal_requests_by_one_idempotency_key_are_one_run(server: Server, up: Upstream) -> None:
    named = {"headers": {"idempotency-key": "mine"}}
    assert complete(server, **named).body == complete(server, **named).body
    assert embed(server, **named).body == embed(server, **named).body
    assert [r.path for r in up.requests] == ["/v1/completions", "/v1/embeddings"]
    assert complete(server, "other", **named).error["code"] == "idempotency_key_reused"


# ---- upstreams of other kinds ----


def test_litellms_answers_are_translated(server: Server, up: Upstream) -> None:
    text = complete(server, ["red", "blue"], model="translated", max_tokens=3)
    assert [c["index"] for c in text.json["choices"]] == [0, 1]
    assert text.json["model"] == "translated"
    assert sorted(r.body["prompt"] for r in up.requests) == ["blue", "red"]
    vectors = embed(server, ["red", "blue"], model="translated", encoding_format="base64")
    assert len(base64.b64decode(vectors.json["data"][1]["embedding"])) == 4 * 8
    assert embed(server, [[4, 5]], model="translated").status == 200
    assert up.last["input"] == [[4, 5]]


# ---- refusals ----


def test_a_programs_name_is_refused_with_the_upstreams_that_there_are(server: Server, up: Upstream) -> None:
    for name in ("plain", "mine", "self-consistency:default"):
        for answer in (complete(server, model=name), embed(server, model=name)):
            assert (answer.status, answer.error["param"]) == (400, "model")
            assert f'"{name}" is a program' in answer.error["message"]
            assert "chat-only, default, priced, translated" in answer.error["message"]
    assert complete(server, model="nobody").error["code"] == "model_not_found"
    assert not up.requests


def test_an_upstream_that_cannot_is_named_with_those_that_can(server: Server, up: Upstream) -> None:
    said = embed(server, model="chat-only").error
    assert (said["param"], said["code"]) == ("model", "unsupported_parameter")
    assert said["message"] == (
        'upstream "chat-only" gives no embeddings; upstreams that do: default, priced, translated'
    )
    assert "gives no completions of raw text" in complete(server, model="chat-only").error["message"]
    assert not up.requests


NOT_PROMPTS: list[Any] = [None, [], [[]], ["a", 1], [-1], [1.5], {}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *(({"prompt": prompt}, "prompt") for prompt in NOT_PROMPTS),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "asmodel": {"params": {"x": 1}}}, "asmodel.params"),
        ({"prompt": ["a"] * 2049}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(server: Server, up: Upstream, body: dict[str, Any], param: str) -> None:
    answer = server.ask("POST", "/v1/completions", {"model": "default", **body}, ANN)
    assert answer.status == 400
    assert answer.error["param"] is not None
    assert answer.error["param"].startswith(param.partition(".")[0])
    assert not up.requests


def test_a_body_that_is_none_is_refused_on_both(server: Server, up: Upstream) -> None:
    for path, beside in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        assert f"`{beside}`" in server.ask("POST", path, b"[]", ANN).error["message"]
        assert server.ask("POST", path, {"model": "default"}, ANN).error["param"] == beside
        assert server.ask("POST", path, {"model": "default"}).error["code"] == "invalid_api_key"
        assert server.ask("GET", path, None, ANN).status == 405
        wrong = server.ask("POST", path, {"model": "default", beside: "a"}, {**ANN, "content-type": "text/plain"})
        assert wrong.status == 400
    assert embed(server, "a", encoding_format="hex").error["param"] == "encoding_format"
    assert embed(server, "a", dimensions=0).error["param"] == "dimensions"


def test_limits_hold_here_too(server: Server, up: Upstream) -> None:
    over = complete(server, ["a", "b"], n=2, asmodel={"cache": "on", "limits": {"calls": 2}})
    assert (over.status, over.error["code"]) == (422, "limit_exceeded")
    unpriced = embed(server, asmodel={"limits": {"cost": 1.0}})
    assert unpriced.error["param"] == "asmodel.limits.cost"
    assert embed(server, model="priced", asmodel={"limits": {"cost": 1.0}}).status == 200


def test_an_upstreams_refusal_is_passed_on(server: Server, up: Upstream) -> None:
    up.fault = lambda received: Fault(status=400, message="too long", code="context_length_exceeded")
    assert complete(server).error["code"] == "context_length_exceeded"
    up.fault = lambda received: Fault(status=429, headers={"retry-after": "7"})
    assert embed(server).headers["retry-after"] == "7"
    up.raw(json.dumps({**VECTORS, "data": []}).encode())
    assert embed(server).error["code"] == "upstream_broken"
    up.raw(b"data: {}\n\n", stream=True)
    assert complete(server, stream=True).error["code"] == "upstream_broken"


def test_a_client_that_leaves_ends_the_call(server: Server, up: Upstream) -> None:
    up.delay = 30.0
    for path, body in (("completions", {"prompt": "a"}), ("embeddings", {"input": "a"})):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        data = json.dumps({"model": "default", **body})
        connection.request("POST", f"/v1/{path}", data, {"content-type": "application/json", **ANN})
        eventually("the upstream is asked", lambda path=path: any(path in r.path for r in up.requests))
        before = time.monotonic()
        connection.close()
        eventually("the upstream sees it leave", lambda: up.requests[-1].left_at)
        assert time.monotonic() - before < 5


def test_both_are_measured_and_traced(server: Server, up: Upstream) -> None:
    answers = {"completion": complete(server, "measured"), "embeddings": embed(server, "measured")}
    page = server.ask("GET", "/metrics", None, ANN).body.decode()
    for operation in ("text_completion", "embeddings"):
        assert f'gen_ai_operation_name="{operation}"' in page
    for operation, answer in answers.items():
        shown = eventually(
            "the trace is there",
            lambda id=answer.headers["x-asmodel-trace-id"]: command(server.folder, "trace", id).stdout,
        )
        assert f"{operation} scripted" in shown
    for path in ("/v1/completions", "/v1/embeddings"):
        assert f'http_route="{path}"' in page
        assert f"POST {path}" in server.said


# ---- pure ----


def test_a_call_that_programs_make_keeps_the_key_that_it_had() -> None:
    assert key(Embed(identity="m", texts=("a",))) != key(Embed(identity="m", texts=(), given="a"))


def test_there_are_no_log_probabilities_of_nothing() -> None:
    assert logprobs(None) is None
