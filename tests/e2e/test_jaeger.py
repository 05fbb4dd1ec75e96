"""What a real Jaeger v2 has of real requests, read back by its stable API; and how they fare where there is none."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.environments import python
from tests.e2e.golang import BUILD_PATIENCE
from tests.e2e.jaeger import Jaeger
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer, ServerAnswer

# Whichever test is first may have to build Jaeger; all that happens after that is bounded by itself.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(BUILD_PATIENCE + 300)]

GRPC = ("python-otlp-grpc", f"opentelemetry-exporter-otlp-proto-grpc=={version('opentelemetry-sdk')}")
"""The exporter that is not among asmodel's own requirements, for its size."""

SECRET = "xyzzy"
"""In every question, answer and document: what must not be found where nobody asked for content."""
PARAGRAPHS = [f"Twelve apples are in the {SECRET} basket.", f"A pear is {SECRET}.", f"It rains on {SECRET}."]

REQUEST = "POST /v1/chat/completions"
UNDELIVERED = "traces are not delivered"

# The attributes that a span of ours may have by the conventions (generative AI v1.41, HTTP), and their types.
CONVENTIONS: dict[str, type] = {
    "error.type": str,
    "http.request.method": str,
    "http.response.status_code": int,
    "http.route": str,
    "network.protocol.version": str,
    "server.address": str,
    "server.port": int,
    "url.path": str,
    "url.scheme": str,
    "gen_ai.agent.name": str,
    "gen_ai.operation.name": str,
    "gen_ai.output.type": str,
    "gen_ai.provider.name": str,
    "gen_ai.request.choice.count": int,
    "gen_ai.request.max_tokens": int,
    "gen_ai.request.model": str,
    "gen_ai.request.seed": int,
    "gen_ai.request.stop_sequences": list,
    "gen_ai.request.stream": bool,
    "gen_ai.request.temperature": float,
    "gen_ai.request.top_p": float,
    "gen_ai.response.finish_reasons": list,
    "gen_ai.response.id": str,
    "gen_ai.response.model": str,
    "gen_ai.response.time_to_first_chunk": float,
    "gen_ai.usage.cache_read.input_tokens": int,
    "gen_ai.usage.input_tokens": int,
    "gen_ai.usage.output_tokens": int,
    "gen_ai.usage.reasoning.output_tokens": int,
    "gen_ai.workflow.name": str,
}


class Script:
    """The upstream: a question has a number, by which it is answered as its test wants."""

    def __init__(self) -> None:
        self._answers: dict[str, list[ServerAnswer]] = {}
        self.server = ScriptedServer(self._answer, models=("scripted",))

    def will(self, *answers: ServerAnswer) -> str:
        """A question that is answered so, in this order, and then as the last time."""
        question = f"Question {len(self._answers) + 1} about {SECRET}?"
        self._answers[question] = list(answers)
        return question

    def asked(self, question: str) -> list[Received]:
        return [call for call in self.server.requests if question in json.dumps(call.body)]

    def _answer(self, body: dict[str, Any]) -> ServerAnswer:
        text = json.dumps(body.get("messages", ""))
        found = re.search(r"Question \d+ about \w+\?", text)
        if found is None:
            return None  # What asmodel itself asks, to find out what the server can do.
        answers = self._answers[found[0]]
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture(scope="module")
def script() -> Generator[Script]:
    made = Script()
    with made.server:
        yield made


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Generator[Jaeger]:
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as made:
        yield made


def exporting(endpoint: str, **more: str) -> dict[str, str]:
    """The environment of a server that sends its traces there, soon."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50", **more}


def by_grpc(jaeger: Jaeger) -> dict[str, str]:
    (packages,) = python(*GRPC).folder.glob("lib/python*/site-packages")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(packages)]))
    return exporting(jaeger.otlp_grpc, OTEL_EXPORTER_OTLP_PROTOCOL="grpc", PYTHONPATH=path)


@dataclass(frozen=True)
class Traced:
    """A server whose spans are in Jaeger under a name of their own."""

    server: Server
    service: str

    def ask(self, model: str, question: str, *, headers: Mapping[str, str] | None = None, **params: object) -> str:
        """Ask through the official SDK, and give the id of the answer's trace."""
        with self.server.client() as client:
            answered = client.chat.completions.with_raw_response.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                extra_body={"asmodel": {"params": params}} if params else None,
                extra_headers=headers,
            )
            return answered.headers["x-asmodel-trace-id"]

    def ask_in_vain(self, model: str, question: str, **params: object) -> str:
        """The same for a request that fails."""
        with pytest.raises(openai.APIStatusError) as failed:
            self.ask(model, question, headers=None, **params)
        return failed.value.response.headers["x-asmodel-trace-id"]


@pytest.fixture(scope="module", params=["http", "grpc"])
def traced(
    request: pytest.FixtureRequest, jaeger: Jaeger, script: Script, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Traced]:
    """`asmodel serve` as it comes, told of Jaeger by the standard variables alone; by each protocol in turn."""
    env = by_grpc(jaeger) if request.param == "grpc" else exporting(jaeger.otlp_http)
    name = f"asmodel-by-{request.param}"
    settings = upstream(script.server.base_url)
    with serving(tmp_path_factory.mktemp("server"), settings, env=env | {"OTEL_SERVICE_NAME": name}) as server:
        yield Traced(server, name)
        # Neither a trace, nor a metric, which Jaeger would not take.
        assert "not delivered" not in server.said


# ---- what Jaeger has ----


def test_a_request_is_one_trace_down_to_each_call(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    trace = jaeger.whole(traced.ask("evidence-qa", script.will(f"Twelve {SECRET}."), paragraphs=PARAGRAPHS))
    assert trace.tree.splitlines() == [
        "POST /v1/chat/completions",
        "  invoke_workflow evidence-qa",
        "    part filter",
        "      3 x step question_given",
        "        text_completion scripted",
        "    step answer_from",
        "      chat scripted",
    ]
    kinds = {span.name: span.kind for span in trace.spans}
    assert kinds == {
        REQUEST: "SERVER",
        "invoke_workflow evidence-qa": "INTERNAL",
        "part filter": "INTERNAL",
        "step question_given": "INTERNAL",
        "text_completion scripted": "CLIENT",
        "step answer_from": "INTERNAL",
        "chat scripted": "CLIENT",
    }
    for span in trace.spans:
        assert span.status == "UNSET"
        assert span.scope == "asmodel"
        assert span.resource["service.name"] == traced.service
        assert span.resource["service.version"] == version("asmodel")
        for child in trace.children(span):
            assert span.started_ns <= child.started_ns <= child.ended_ns <= span.ended_ns, (span.name, child.name)


def test_each_draw_is_a_step_of_its_own(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    trace = jaeger.whole(traced.ask("self-consistency", script.will("Answer: twelve"), samples=3))
    assert trace.tree.splitlines() == [
        "POST /v1/chat/completions",
        "  invoke_workflow self-consistency",
        "    part votes",
        "      3 x step thought",
        "        chat scripted",
    ]
    assert len({span.attributes["asmodel.step.draw"] for span in trace.named("step thought")}) == 3


def test_attributes_are_those_of_the_conventions(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will("Answer: twelve")
    trace = jaeger.whole(traced.ask("self-consistency", question, samples=1, temperature=0.5))
    address, port = script.server.address.removeprefix("http://").split(":")

    assert (
        dict(trace.root.attributes).items()
        >= {
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
        }.items()
    )
    run = trace.one("invoke_workflow self-consistency").attributes
    assert (
        run.items()
        >= {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.workflow.name": "self-consistency",
            "gen_ai.agent.name": "self-consistency",
            "asmodel.run.program": "self-consistency",
            "asmodel.run.steps": 1,
            "asmodel.run.calls": 1,
            "asmodel.run.cache_hits": 0,
        }.items()
    )
    assert run["asmodel.run.digest"]
    step = trace.one("step thought").attributes
    assert step["asmodel.cache.result"] == "miss"
    assert not any(name.startswith("gen_ai.") for name in step)
    call = trace.one("chat scripted").attributes
    assert (
        call.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "scripted",
            "gen_ai.request.temperature": 0.5,
            "gen_ai.response.model": "scripted",
            "gen_ai.response.finish_reasons": ["stop"],
            "server.address": address,
            "server.port": int(port),
        }.items()
    )
    tokens = (call["gen_ai.usage.input_tokens"], call["gen_ai.usage.output_tokens"])
    assert min(tokens) > 0
    assert tokens == (step["asmodel.step.input_tokens"], step["asmodel.step.output_tokens"])
    assert tokens == (run["asmodel.run.input_tokens"], run["asmodel.run.output_tokens"])


def test_no_attribute_has_a_name_or_type_that_the_conventions_do_not_know(
    traced: Traced, jaeger: Jaeger, script: Script
) -> None:
    question = script.will(Fault(status=503), f"Twelve {SECRET}.")
    asked = [traced.ask("evidence-qa", question, paragraphs=PARAGRAPHS) for _ in range(2)]
    asked.append(traced.ask("self-consistency", script.will("Answer: twelve"), samples=2))
    for trace in map(jaeger.whole, asked):
        for span in trace.spans:
            for name, value in span.attributes.items():
                if name.startswith("@jaeger@"):
                    print(f"Jaeger remarks on {span.name}: {value}")  # Its own, put in when a trace is read.
                elif not name.startswith("asmodel."):
                    assert isinstance(value, CONVENTIONS[name]), (span.name, name, value)


def test_what_was_streamed_is_one_trace_too(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will(f"Twelve {SECRET} apples.")
    with (
        traced.server.client() as client,
        client.chat.completions.create(
            model="plain", messages=[{"role": "user", "content": question}], stream=True
        ) as stream,
    ):
        trace_id = stream.response.headers["x-asmodel-trace-id"]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == f"Twelve {SECRET} apples."
    trace = jaeger.whole(trace_id)
    assert [line.strip() for line in trace.tree.splitlines()] == [
        REQUEST,
        "invoke_workflow plain",
        "step conversation",
        "chat scripted",
    ]
    call = trace.one("chat scripted").attributes
    assert call["gen_ai.request.stream"] is True
    assert 0 < call["gen_ai.response.time_to_first_chunk"] < 60


def test_a_hit_has_no_call_and_links_to_the_call_that_paid(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will(f"Twelve {SECRET}.")
    paid = jaeger.whole(traced.ask("evidence-qa", question, paragraphs=PARAGRAPHS))
    trace = jaeger.whole(traced.ask("evidence-qa", question, paragraphs=PARAGRAPHS))
    assert [line.strip() for line in trace.tree.splitlines()] == [
        REQUEST,
        "invoke_workflow evidence-qa",
        "part filter",
        "3 x step question_given",
        "step answer_from",
    ]
    steps = [*trace.named("step question_given"), trace.one("step answer_from")]
    calls = [*paid.named("text_completion scripted"), paid.one("chat scripted")]
    assert sorted(link for step in steps for link in step.links) == sorted((c.trace_id, c.span_id) for c in calls)
    assert {step.attributes["asmodel.cache.result"] for step in steps} == {"hit"}
    assert all(step.attributes["asmodel.cache.age_s"] > 0 for step in steps)
    saved = sum(step.attributes["asmodel.cache.saved_tokens"] for step in steps)
    spent = paid.one("invoke_workflow evidence-qa").attributes
    assert saved == spent["asmodel.run.input_tokens"] + spent["asmodel.run.output_tokens"]


def test_who_joins_a_call_in_flight_links_to_it(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will(Fault(delay=1.0, answer=f"Twelve {SECRET}."))
    with ThreadPoolExecutor(2) as pool:
        first, second = (jaeger.whole(trace_id) for trace_id in pool.map(traced.ask, ["plain"] * 2, [question] * 2))
    assert len(script.asked(question)) == 1
    payer, joiner = (first, second) if first.named("chat scripted") else (second, first)
    step = joiner.one("step conversation")
    assert step.attributes["asmodel.cache.result"] == "joined"
    call = payer.one("chat scripted")
    assert step.links == [(call.trace_id, call.span_id)]
    assert not joiner.named("chat scripted")


def test_a_retry_is_two_attempts_of_one_call(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will(Fault(status=503), f"Twelve {SECRET}.")
    trace = jaeger.whole(traced.ask("plain", question))
    assert len(script.asked(question)) == 2
    call = trace.one("chat scripted")
    assert call.status == "UNSET"
    assert call.attributes["asmodel.upstream.attempts"] == 2
    assert call.attributes["asmodel.upstream.backoff_s"] > 0
    first, second = trace.children(call)
    assert (first.name, second.name) == ("attempt 1", "attempt 2")
    assert (first.kind, first.status) == ("INTERNAL", "ERROR")
    assert first.attributes["error.type"]
    assert second.status == "UNSET"
    assert "error.type" not in second.attributes
    assert (
        call.started_ns <= first.started_ns <= first.ended_ns <= second.started_ns <= second.ended_ns <= call.ended_ns
    )


def test_a_failure_is_one_from_the_call_up_to_the_request(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will(Fault(status=401, message=f"the key {SECRET} is wrong"))
    trace = jaeger.whole(traced.ask_in_vain("plain", question))
    assert len(script.asked(question)) == 1
    assert trace.root.attributes["http.response.status_code"] == 502
    for name in (REQUEST, "invoke_workflow plain", "step conversation", "chat scripted"):
        span = trace.one(name)
        assert (span.status, span.attributes.get("error.type")) == ("ERROR", "upstream_auth"), name
        assert SECRET not in span.message


def test_a_mistake_of_the_clients_is_no_error_of_the_server(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    trace = jaeger.whole(traced.ask_in_vain("self-consistency", script.will("unasked"), samples=0))
    assert trace.tree == REQUEST
    assert trace.root.attributes["http.response.status_code"] == 400
    assert trace.root.attributes["error.type"]
    assert trace.root.status == "UNSET"


def test_who_leaves_is_no_failure(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will(Fault(delay=20.0, answer="too late"))
    caller, sent = _traceparent()
    with traced.server.client(timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(
            model="plain", messages=[{"role": "user", "content": question}], extra_headers=sent
        )
    trace = jaeger.whole(caller[0])
    for name in ("invoke_workflow plain", "step conversation", "chat scripted"):
        span = trace.one(name)
        assert span.attributes["asmodel.cancelled"] is True, name
    assert {span.status for span in trace.spans} == {"UNSET"}
    assert not any("error.type" in span.attributes for span in trace.spans)


def test_a_trace_that_the_caller_began_goes_on(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    caller, sent = _traceparent()
    assert traced.ask("plain", script.will("Yes."), headers=sent) == caller[0]
    trace = jaeger.whole(caller[0])
    assert trace.root.name == REQUEST
    assert trace.root.parent_id == caller[1]


def test_a_trace_that_the_caller_does_not_sample_is_not_sent(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    caller, sent = _traceparent(sampled=False)
    assert traced.ask("plain", script.will("Yes."), headers=sent) == caller[0]
    # What was asked after it has come in, and it has not.
    jaeger.whole(traced.ask("plain", script.will("Yes.")))
    assert jaeger.trace(caller[0]) is None


def test_traces_are_found_by_service_and_operation(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    asked = traced.ask("self-consistency", script.will("Answer: twelve"), samples=2)
    other = traced.ask("plain", script.will("Yes."))
    jaeger.whole(asked)
    jaeger.whole(other)
    assert traced.service in jaeger.services()
    assert jaeger.operations(traced.service) >= {
        (REQUEST, "server"),
        ("invoke_workflow self-consistency", "internal"),
        ("step thought", "internal"),
        ("chat scripted", "client"),
    }
    found = jaeger.search(traced.service, "invoke_workflow self-consistency")
    assert asked in found
    assert other not in found
    assert other in jaeger.search(traced.service, REQUEST)


def test_there_is_no_trace_but_of_a_request(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    jaeger.whole(traced.ask("evidence-qa", script.will(f"Twelve {SECRET}."), paragraphs=PARAGRAPHS))
    for trace_id, trace in jaeger.search(traced.service).items():
        assert (trace.root.kind, trace.root.name) == ("SERVER", REQUEST), trace_id


def test_nothing_that_was_said_is_in_a_span(traced: Traced, jaeger: Jaeger, script: Script) -> None:
    question = script.will(Fault(status=503, message=f"no {SECRET}"), f"Twelve {SECRET}.")
    asked = [traced.ask("evidence-qa", question, paragraphs=PARAGRAPHS) for _ in range(2)]
    asked.append(traced.ask_in_vain("plain", script.will(Fault(status=400, message=f"no {SECRET}"))))
    for trace_id in asked:
        jaeger.whole(trace_id)
        assert SECRET not in jaeger.raw(trace_id)


def test_what_was_said_is_in_jaeger_where_it_is_asked_for(jaeger: Jaeger, script: Script, tmp_path: Path) -> None:
    env = exporting(
        jaeger.otlp_http,
        OTEL_SEMCONV_STABILITY_OPT_IN="gen_ai_latest_experimental",
        OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="SPAN_ONLY",
    )
    question = script.will(f"Twelve {SECRET}.")
    with serving(tmp_path, upstream(script.server.base_url), env=env) as server:
        call = jaeger.whole(Traced(server, "asmodel").ask("plain", question)).one("chat scripted").attributes
    shown = json.loads(call["gen_ai.input.messages"])
    assert shown == [{"role": "user", "parts": [{"type": "text", "content": question}]}]
    (said,) = json.loads(call["gen_ai.output.messages"])
    assert said["role"] == "assistant"
    assert said["parts"] == [{"type": "text", "content": f"Twelve {SECRET}."}]
    assert said["finish_reason"] == "stop"


def test_no_trace_is_lost_when_the_server_is_told_to_stop(jaeger: Jaeger, script: Script, tmp_path: Path) -> None:
    env = exporting(jaeger.otlp_http, OTEL_SERVICE_NAME="asmodel-stopped")
    # As it comes: what is asked in the last seconds is still in the queue.
    del env["OTEL_BSP_SCHEDULE_DELAY"]
    questions = [script.will(f"Answer: {n}") for n in range(16)]
    with serving(tmp_path, upstream(script.server.base_url), env=env) as server, ThreadPoolExecutor(8) as pool:
        traced = Traced(server, "asmodel-stopped")
        asked = list(pool.map(traced.ask, ["self-consistency"] * len(questions), questions))
        assert server.stop() == 0
    assert len(set(asked)) == len(questions)
    for trace_id in asked:
        assert len(jaeger.whole(trace_id).named("chat scripted")) == 5
    assert jaeger.search("asmodel-stopped").keys() == set(asked)


def _traceparent(*, sampled: bool = True) -> tuple[tuple[str, str], dict[str, str]]:
    """A caller's trace and span, and the header that tells of them."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return (trace_id, span_id), {"traceparent": f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"}


# ---- where there is none ----


@contextmanager
def nobody() -> Generator[str]:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextmanager
def silent() -> Generator[str]:
    """Connections are taken, and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def refusing(status: int) -> Generator[str]:
    """Every export is answered with the status."""

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name is http.server's
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a refusal is what is wanted."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as listening:
        serve = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
        serve.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        serve.join()


OUTAGES: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "down": nobody,
    "slow": silent,
    "overloaded": partial(refusing, 503),
    "refusing": partial(refusing, 400),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_requests_are_unharmed_without_jaeger(outage: str, script: Script, tmp_path: Path) -> None:
    question = script.will("Answer: twelve")

    def answer(server: Server) -> tuple[str | None, float]:
        began = time.monotonic()
        with server.client() as client:
            given = client.chat.completions.create(
                model="self-consistency",
                messages=[{"role": "user", "content": question}],
                extra_body={"asmodel": {"cache": "off"}},
            )
        return given.choices[0].message.content, time.monotonic() - began

    with (
        OUTAGES[outage]() as endpoint,
        serving(
            tmp_path, upstream(script.server.base_url), env=exporting(endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="1")
        ) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = [*pool.map(answer, [server] * 24)]
        eventually("the outage is told", lambda: UNDELIVERED in server.said)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            answers.append(answer(server))
        assert {text for text, _ in answers} == {"twelve"}
        # The batch that fails takes a second; a request that waited for it would too.
        assert sorted(seconds for _, seconds in answers)[len(answers) // 2] < 1
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 12
        said = server.said
    assert said.count(UNDELIVERED) == 1
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if UNDELIVERED not in line and REQUEST not in line]
    assert len(lines) < 12, lines


def test_memory_is_bounded_without_jaeger(script: Script, tmp_path: Path) -> None:
    question = script.will("Answer: twelve")
    with nobody() as endpoint, serving(tmp_path, upstream(script.server.base_url), env=exporting(endpoint)) as server:
        traced = Traced(server, "asmodel")
        a_request = 64 + 3
        a_queue = 2048 // a_request + 1  # requests that fill OpenTelemetry's own

        def after(requests: int) -> int:
            with ThreadPoolExecutor(4) as pool:
                asking = partial(traced.ask, "self-consistency", question, samples=64)
                for asked in [pool.submit(asking) for _ in range(requests)]:
                    asked.result()
            return _memory(server)

        after(a_queue)
        full = after(a_queue)
        grown = after(3 * a_queue) - full
    # All of these spans would be 23 MB.
    assert grown < 10_000_000, f"{grown / 1e6:.0f} MB more after {3 * a_queue * a_request} spans"


def test_traces_arrive_once_jaeger_is_there(script: Script, tmp_path: Path) -> None:
    jaeger = Jaeger(tmp_path / "jaeger")
    with serving(tmp_path / "server", upstream(script.server.base_url), env=exporting(jaeger.otlp_http)) as server:
        traced = Traced(server, "asmodel")
        traced.ask("plain", script.will("Yes."))
        eventually("the outage is told", lambda: UNDELIVERED in server.said)
        with jaeger:
            later = traced.ask("plain", script.will("Yes."))
            assert jaeger.whole(later).root.name == REQUEST
    assert server.said.count(UNDELIVERED) == 1


def _memory(server: Server) -> int:
    """What the server's process holds, in bytes."""
    told = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(server.process.pid)], capture_output=True, text=True, timeout=10, check=True
    )
    return int(told.stdout) * 1024
