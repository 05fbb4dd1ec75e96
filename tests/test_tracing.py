"""What spans look like, and where they go."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.collecting import Sink
from tests.timed import in_time, timed

from asmodel import trace_reader, tracing
from asmodel.budget import Budget
from asmodel.calls import CacheMode, Chat, Completion, Embed, Message, Origin, Reply, Score, Usage
from asmodel.errors import LimitExceeded, UpstreamRateLimited, UpstreamTimeout
from asmodel.trace_export import Tracing

SECRET = "the prompt of somebody"
CALL = Chat(
    identity="m",
    messages=(Message("user", SECRET),),
    params={"temperature": 0.7, "max_tokens": 64, "stop": "\n", "n": 2, "seed": 7, "logit_bias": {"1": 2}},
    schema={"type": "object"},
)
REPLY = Reply(
    text=SECRET,
    usage=Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4, reasoning_tokens=2),
    model="gpt-x-2026",
    cost=0.25,
    finish="length",
)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    traces = Tracing(processors=[SimpleSpanProcessor(exporter)], hosts=["127.0.0.1:8001", "*.internal", "vllm"])
    yield exporter
    traces.shutdown()


def only(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


def attributes(exporter: InMemorySpanExporter, name: str) -> dict[str, object]:
    return dict(only(exporter, name).attributes or {})


def call(call: Chat | Completion | Score | Embed = CALL, *, stream: bool = False) -> trace.Span:
    with tracing.call_span(
        call, upstream="fast", provider="openai", model="gpt-x", address="https://api.example.com/v1", stream=stream
    ) as span:
        tracing.record_reply(span, REPLY, first_delta=0.2 if stream else None)
    return span


def test_a_request_is_a_tree_of_request_program_part_step_and_call(spans: InMemorySpanExporter) -> None:
    with (
        tracing.start_request("POST", "/v1/chat/completions", {}) as request,
        tracing.run_span("evidence-qa", digest="d1", run_id="r1", nested=False),
        tracing.part_span("level 2", of=3),
        tracing.step_span("verdict", program="evidence-qa", kind="chat", draw="0/1"),
    ):
        call()
    finished = spans.get_finished_spans()
    assert [(s.name, s.kind) for s in finished] == [
        ("chat gpt-x", SpanKind.CLIENT),
        ("step verdict", SpanKind.INTERNAL),
        ("part level 2", SpanKind.INTERNAL),
        ("invoke_workflow evidence-qa", SpanKind.INTERNAL),
        ("POST /v1/chat/completions", SpanKind.SERVER),
    ]
    for child, parent in pairwise(finished):
        assert child.parent is not None
        assert parent.context is not None
        assert child.parent.span_id == parent.context.span_id
    assert tracing.trace_id(request) == format(finished[0].context.trace_id if finished[0].context else 0, "032x")


def test_a_program_has_the_names_of_both_conventions(spans: InMemorySpanExporter) -> None:
    with tracing.run_span("evidence-qa", digest="d1", run_id="r1", nested=False):
        pass
    assert attributes(spans, "invoke_workflow evidence-qa") == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "evidence-qa",
        "gen_ai.agent.name": "evidence-qa",
        "asmodel.run.id": "r1",
        "asmodel.run.program": "evidence-qa",
        "asmodel.run.nested": False,
        "asmodel.run.digest": "d1",
    }


def test_a_call_has_the_attributes_of_the_conventions(spans: InMemorySpanExporter) -> None:
    call(stream=True)
    assert attributes(spans, "chat gpt-x") == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-x",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": 7,
        "gen_ai.output.type": "json",
        "gen_ai.response.model": "gpt-x-2026",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": 0.2,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "server.address": "api.example.com",
        "server.port": 443,
        "asmodel.upstream.name": "fast",
        "asmodel.upstream.call": "chat",
        "asmodel.upstream.cost": 0.25,
    }
    assert only(spans, "chat gpt-x").instrumentation_scope.schema_url == tracing.SCHEMA_URL  # type: ignore[union-attr]


def test_each_kind_of_call_has_its_operation(spans: InMemorySpanExporter) -> None:
    call(Completion(identity="m", prompt=SECRET))
    call(Score(identity="m", context=SECRET, continuation=SECRET))
    call(Embed(identity="m", texts=(SECRET,), params={"dimensions": 8}))
    assert [span.name for span in spans.get_finished_spans()] == [
        "text_completion gpt-x",
        "text_completion gpt-x",
        "embeddings gpt-x",
    ]
    assert attributes(spans, "embeddings gpt-x")["gen_ai.embeddings.dimension.count"] == 8


@pytest.mark.parametrize("address", ["http://[::1", "", "http://user:hunter2@host:9/v1?key=hunter2"])
def test_an_address_is_host_and_port_and_never_a_key(spans: InMemorySpanExporter, address: str) -> None:
    with tracing.call_span(CALL, upstream="u", provider="p", model="m", address=address, stream=False):
        pass
    assert "hunter2" not in str(attributes(spans, "chat m"))


def test_a_cached_step_has_no_call_and_is_linked_to_the_span_that_paid(spans: InMemorySpanExporter) -> None:
    payer = tracing.origin(call())
    assert payer is None, "a span that has ended pays for nothing"
    with tracing.call_span(CALL, upstream="u", provider="p", model="payer", address=None, stream=False) as span:
        payer = tracing.origin(span)
    assert payer is not None
    spans.clear()
    with tracing.step_span("verdict", program="p", kind="chat", draw=None) as span:
        reply = replace(REPLY, source="hit", origin=payer, bought_at=time.time() - 60)
        tracing.record_step(span, reply, asks=1)
    (step,) = spans.get_finished_spans()
    found = dict(step.attributes or {})
    assert found["asmodel.cache.result"] == "hit"
    assert found["asmodel.cache.age_s"] == pytest.approx(60, abs=5)
    assert found["asmodel.cache.saved_tokens"] == 15
    assert found["asmodel.cache.saved_cost"] == 0.25
    assert "gen_ai.operation.name" not in found
    assert not [name for name in found if "usage" in name or name == "asmodel.step.input_tokens"]
    (link,) = step.links
    assert trace.format_span_id(link.context.span_id) == payer.span_id
    assert trace.format_trace_id(link.context.trace_id) == payer.trace_id


@pytest.mark.parametrize(
    ("reply", "policy", "result"),
    [
        (REPLY, "on", "miss"),
        (REPLY, "off", "bypass"),
        (REPLY, "refresh", "bypass"),
        (replace(REPLY, source="joined"), "on", "joined"),
    ],
)
def test_a_step_says_how_it_came_by_its_reply(
    spans: InMemorySpanExporter, reply: Reply, policy: CacheMode, result: str
) -> None:
    with tracing.step_span("verdict", program="p", kind="chat", draw=None) as span:
        tracing.record_step(span, reply, asks=3, cache=policy)
    found = attributes(spans, "step verdict")
    assert found["asmodel.cache.result"] == result
    assert found["asmodel.step.asks"] == 3
    assert ("asmodel.step.cost" in found) is (reply.source == "bought")


def test_ids_in_the_cache_that_are_no_ids_are_not_linked(spans: InMemorySpanExporter) -> None:
    with tracing.step_span("verdict", program="p", kind="chat", draw=None) as span:
        tracing.record_step(span, replace(REPLY, source="hit", origin=Origin("zz", "0" * 16)), asks=1)
    assert only(spans, "step verdict").links == ()


def test_a_call_that_was_tried_twice_has_a_child_for_each_try(spans: InMemorySpanExporter) -> None:
    with tracing.call_span(CALL, upstream="u", provider="p", model="m", address=None, stream=False) as span:
        now = time.time_ns()
        tracing.record_attempts(
            span,
            [
                tracing.Attempt(started_ns=now, ended_ns=now + 10, error=UpstreamRateLimited(SECRET)),
                tracing.Attempt(started_ns=now + 30, ended_ns=now + 50, waited=0.5),
            ],
        )
    first, second, whole = spans.get_finished_spans()
    assert (first.start_time, first.end_time) == (now, now + 10)
    assert (second.start_time, second.end_time) == (now + 30, now + 50)
    assert dict(first.attributes or {})["error.type"] == "upstream_rate_limited"
    assert first.status.status_code is StatusCode.ERROR
    assert second.status.status_code is StatusCode.UNSET
    assert dict(second.attributes or {})["asmodel.upstream.backoff_s"] == 0.5
    assert whole.status.status_code is StatusCode.UNSET
    assert dict(whole.attributes or {})["asmodel.upstream.attempts"] == 2
    assert first.parent is not None
    assert first.parent == whole.context


def test_a_call_that_was_tried_once_has_no_children(spans: InMemorySpanExporter) -> None:
    with tracing.call_span(CALL, upstream="u", provider="p", model="m", address=None, stream=False) as span:
        tracing.record_attempts(span, [tracing.Attempt(started_ns=1, ended_ns=2)])
    assert [s.name for s in spans.get_finished_spans()] == ["chat m"]


def test_waits_of_one_name_add_up(spans: InMemorySpanExporter) -> None:
    with tracing.step_span("s", program="p", kind="chat", draw=None) as span:
        tracing.record_wait(span, "cache.flight", 0.25)
        tracing.record_wait(span, "cache.flight", 0.5)
        tracing.record_wait(span, "queue", 1.0)
    found = attributes(spans, "step s")
    assert found["asmodel.cache.flight.wait_s"] == 0.75
    assert found["asmodel.upstream.queue.wait_s"] == 1.0
    assert len(only(spans, "step s").events) == 3


def test_an_error_is_known_by_its_kind_and_never_by_what_it_says(spans: InMemorySpanExporter) -> None:
    with (
        pytest.raises(UpstreamTimeout),
        tracing.run_span("p", digest=None, run_id="r", nested=False),
        tracing.step_span("s", program="p", kind="chat", draw=None),
    ):
        raise UpstreamTimeout(SECRET)
    for span in spans.get_finished_spans():
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None
        assert dict(span.attributes or {})["error.type"] == "upstream_timeout"
        assert span.events == ()


async def test_of_a_group_of_errors_the_one_that_failed_is_named(spans: InMemorySpanExporter) -> None:
    async def fails() -> None:
        raise ValueError(SECRET)

    async def tool() -> None:
        with tracing.tool_span("search", call_id="c1"):
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(5))
                group.create_task(fails())

    with pytest.raises(ExceptionGroup):
        await tool()
    assert attributes(spans, "execute_tool search") == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "search",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": "c1",
        "error.type": "ValueError",
    }


async def test_a_cancelled_step_did_not_fail(spans: InMemorySpanExporter) -> None:
    async def waits() -> None:
        with tracing.step_span("s", program="p", kind="chat", draw=None):
            await asyncio.sleep(5)

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    span = only(spans, "step s")
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {})["asmodel.cancelled"] is True
    assert "error.type" not in (span.attributes or {})


async def test_steps_that_run_together_are_children_of_their_own_program(spans: InMemorySpanExporter) -> None:
    async def program(name: str) -> None:
        with tracing.run_span(name, digest=None, run_id=name, nested=False):
            await asyncio.gather(*(step(name) for _ in range(5)))

    async def step(name: str) -> None:
        with tracing.step_span(name, program=name, kind="chat", draw=None):
            await asyncio.sleep(0.001)

    await asyncio.gather(program("one"), program("two"))
    for name in ("one", "two"):
        parent = only(spans, f"invoke_workflow {name}")
        steps = [s for s in spans.get_finished_spans() if s.name == f"step {name}"]
        assert len(steps) == 5
        assert all(s.parent == parent.context for s in steps)


def test_a_request_continues_the_trace_of_its_caller_and_ignores_what_is_no_traceparent(
    spans: InMemorySpanExporter,
) -> None:
    incoming = f"00-{'ab' * 16}-{'cd' * 8}-01"
    with tracing.start_request("POST", "/v1/x", {"traceparent": incoming, "baggage": "user=secret"}) as span:
        assert tracing.trace_id(span) == "ab" * 16
        outgoing = tracing.outgoing("http://vllm")["traceparent"]
    assert outgoing.startswith(f"00-{'ab' * 16}-")
    assert "cd" * 8 not in outgoing, "the parent of what follows is our span"
    for wrong in ("", "00-zz", f"00-{'0' * 32}-{'cd' * 8}-01", "x" * 10_000):
        with tracing.start_request("POST", "/v1/x", {"traceparent": wrong}) as span:
            assert tracing.trace_id(span) not in ("", "ab" * 16)


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("http://vllm/v1", True),
        ("http://VLLM:9/v1", True),
        ("http://127.0.0.1:8001/v1", True),
        ("http://127.0.0.1:8002/v1", False),
        ("http://a.b.internal/v1", True),
        ("http://internal/v1", False),
        ("https://api.example.com/v1", False),
        ("http://vllm.example.com/v1", False),
        ("http://vllm@example.com/v1", False),
        ("", False),
        ("http://[::1", False),
    ],
)
def test_only_hosts_that_are_allowed_are_told_the_trace(spans: InMemorySpanExporter, url: str, may: bool) -> None:
    incoming = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "baggage": "user=secret"}
    with tracing.start_request("POST", "/v1/x", incoming):
        told = tracing.outgoing(url)
    assert set(told) == ({"traceparent"} if may else set())


def test_a_forced_request_is_exported_whole_whatever_the_sampler_and_the_caller_say(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    traces = tracing.configure(local=None)
    not_sampled = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-00"}
    for force in (False, True):
        with (
            tracing.start_request("POST", "/v1/x", not_sampled, force=force),
            tracing.run_span(f"forced-{force}", digest=None, run_id="r1", nested=False),
        ):
            call()
    assert traces.shutdown()
    assert sink.names == ["chat gpt-x", "invoke_workflow forced-True", "POST /v1/x"]


def test_a_client_that_left_and_a_run_that_a_limit_ended_did_not_fail(spans: InMemorySpanExporter) -> None:
    with tracing.start_request("POST", "/v1/x", {}) as span:
        tracing.record_left(span)
    with tracing.run_span("p", digest=None, run_id="r", nested=False) as span:
        tracing.record_limited(span, LimitExceeded("all is used up", param="tokens"))
    assert attributes(spans, "POST /v1/x")["asmodel.cancelled"] is True
    assert attributes(spans, "invoke_workflow p")["asmodel.run.limited"] == "tokens"
    assert {span.status.status_code for span in spans.get_finished_spans()} == {StatusCode.UNSET}


def test_a_5xx_is_an_error_of_the_server_and_a_4xx_is_not(spans: InMemorySpanExporter) -> None:
    for status in (200, 404, 502):
        with tracing.start_request("POST", f"/{status}", {}) as span:
            tracing.record_response(span, status, UpstreamTimeout("x") if status == 502 else None)
    assert only(spans, "POST /200").status.status_code is StatusCode.UNSET
    assert only(spans, "POST /404").status.status_code is StatusCode.UNSET
    assert only(spans, "POST /502").status.status_code is StatusCode.ERROR
    assert attributes(spans, "POST /502")["error.type"] == "upstream_timeout"


def test_a_run_says_what_it_came_to_and_an_unknown_price_is_not_nothing(spans: InMemorySpanExporter) -> None:
    budget = Budget()
    with tracing.run_span("p", digest=None, run_id="r", nested=False) as span:
        budget.steps, budget.hits, budget.calls = 3, 1, 2
        budget.charge(Usage(prompt_tokens=7, completion_tokens=2), None)
        tracing.record_run(span, budget)
    found = attributes(spans, "invoke_workflow p")
    assert (found["asmodel.run.steps"], found["asmodel.run.cache_hits"], found["asmodel.run.calls"]) == (3, 1, 2)
    assert "asmodel.run.cost" not in found


def test_no_span_holds_a_prompt_or_an_answer(spans: InMemorySpanExporter) -> None:
    def run() -> None:
        with (
            tracing.run_span("p", digest=None, run_id="r", nested=False),
            tracing.step_span("s", program="p", kind="chat", draw=None) as span,
        ):
            call()
            tracing.record_step(span, REPLY, asks=1)
            raise RuntimeError(SECRET)

    with pytest.raises(RuntimeError):
        run()
    assert SECRET not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_without_a_provider_nothing_happens() -> None:
    assert tracing.outgoing("http://vllm") == {}
    with tracing.step_span("s", program="p", kind="chat", draw=None) as span:
        assert not span.is_recording()
        assert tracing.trace_id(span) == ""
        assert tracing.origin(span) is None
        tracing.record_step(span, REPLY, asks=1)
        tracing.record_wait(span, "queue", 1.0)
        tracing.record_attempts(span, [tracing.Attempt(1, 2), tracing.Attempt(3, 4)])
        tracing.record_limited(span, UpstreamTimeout("x"))
        tracing.record_asked(span, CALL.messages)
        tracing.record_answer(span, "x", "stop")
        tracing.record_tool(span, {})


def test_importing_the_names_does_not_import_the_sdk() -> None:
    code = "import sys, asmodel.tracing; sys.exit(any(m.startswith('opentelemetry.sdk') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=20, check=False).returncode == 0


# -- where they go --------------------------------------------------------------------------------------------------


def test_the_newest_tracing_takes_new_spans_and_the_one_before_takes_over_when_it_ends() -> None:
    first, second = InMemorySpanExporter(), InMemorySpanExporter()
    outer = Tracing(processors=[SimpleSpanProcessor(first)])
    inner = Tracing(processors=[SimpleSpanProcessor(second)])
    with tracing.tool_span("a", call_id=None):
        pass
    inner.shutdown()
    inner.shutdown()
    with tracing.tool_span("b", call_id=None):
        pass
    outer.shutdown()
    with tracing.tool_span("c", call_id=None) as span:
        assert not span.is_recording()
    assert [s.name for s in second.get_finished_spans()] == ["execute_tool a"]
    assert [s.name for s in first.get_finished_spans()] == ["execute_tool b"]


def test_a_span_that_a_program_makes_by_opentelemetrys_api_is_part_of_its_run(spans: InMemorySpanExporter) -> None:
    tracer = trace.get_tracer("somebody's program")
    with (
        tracing.run_span("p", digest=None, run_id="r", nested=False) as run,
        tracer.start_as_current_span("parse") as own,
        tracing.step_span("s", program="p", kind="chat", draw=None),
    ):
        pass
    assert only(spans, "parse").parent == run.get_span_context()
    assert only(spans, "step s").parent == own.get_span_context()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


def test_the_standard_variables_send_spans_to_a_collector(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")
    traces = tracing.configure(local=None)
    with tracing.run_span("evidence-qa", digest=None, run_id="r", nested=False):
        call()
    assert traces.flush()
    assert sink.names == ["chat gpt-x", "invoke_workflow evidence-qa"]
    resource = {a.key: a.value.string_value for a in sink.requests[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "asmodel"
    assert resource["deployment.environment.name"] == "staging"
    with tracing.tool_span("late", call_id=None):
        pass
    assert traces.shutdown(), "what is left is sent"
    assert sink.names[-1] == "execute_tool late"


def test_the_operators_service_name_wins(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{sink.address}/v1/traces")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    traces = tracing.configure(local=None, service_name="ours")
    call()
    assert traces.shutdown()
    resource = {a.key: a.value.string_value for a in sink.requests[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "theirs"


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_SAMPLER", "always_off")],
)
def test_exporting_can_be_switched_off(sink: Sink, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    monkeypatch.setenv(name, value)
    traces = tracing.configure(local=None)
    call()
    assert traces.shutdown()
    assert sink.requests == []


def test_what_the_sampler_leaves_out_is_still_in_the_local_file(
    sink: Sink, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    path = tmp_path / "state" / "traces.sqlite"
    traces = tracing.configure(local=path, hosts=["vllm"])
    not_sampled = f"00-{'ab' * 16}-{'cd' * 8}-00"
    with (
        tracing.start_request("POST", "/v1/chat/completions", {"traceparent": not_sampled}),
        tracing.run_span("p", digest=None, run_id="r1", nested=False),
    ):
        call()
        outgoing = tracing.outgoing("http://vllm")["traceparent"]
    assert traces.shutdown()
    assert sink.requests == []
    assert outgoing.endswith("-00"), "nor does our recording make others sample"
    assert [run.run_id for run in trace_reader.runs(path)] == ["r1"]


def test_the_console_exporter_leaves_standard_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    traces = tracing.configure(local=None)
    call()
    assert traces.shutdown()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert '"chat gpt-x"' in printed.err


def test_an_exporter_that_does_not_exist_is_a_warning_that_says_what_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    tracing.configure(local=None).shutdown()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke")
    tracing.configure(local=None).shutdown()
    assert "zipkin: OTEL_TRACES_EXPORTER takes otlp, console and none" in caplog.text
    assert "http/protobuf and grpc, not 'smoke'" in caplog.text


@timed
@pytest.mark.parametrize("status", [None, 503, 400])
def test_a_collector_that_is_down_or_refuses_is_one_warning_and_no_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int | None
) -> None:
    sink = Sink(status or 200)
    if status is None:
        sink.close()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address.replace("http://", "http://user:hunter2@"))
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
    caplog.set_level(logging.WARNING)
    traces = tracing.configure(local=None)
    slowest = 0.0
    for _ in range(300):
        begun = time.perf_counter()
        call()
        slowest = max(slowest, time.perf_counter() - begun)
        time.sleep(0.001)
    begun = time.perf_counter()
    traces.shutdown(timeout=0.5)
    in_time(time.perf_counter() - begun, 3)
    in_time(slowest, 0.5)
    if status is not None:
        sink.close()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1, warnings
    assert "traces are not delivered to 127.0.0.1:" in warnings[0]
    assert "hunter2" not in caplog.text


HOSTED = """
import sys
from pathlib import Path
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from asmodel import trace_reader, tracing
theirs = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(theirs))
trace.set_tracer_provider(provider)
path = Path(sys.argv[1])
traces = tracing.configure(local=path)
with tracing.run_span("p", digest=None, run_id="r1", nested=False):
    pass
assert traces.shutdown()
assert [span.name for span in theirs.get_finished_spans()] == ["invoke_workflow p"]
assert [run.run_id for run in trace_reader.runs(path)] == ["r1"]
assert provider is trace.get_tracer_provider()
"""


def test_a_host_programs_own_provider_is_used_and_not_doubled(tmp_path: Path, sink: Sink) -> None:

    environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": sink.address}
    command = [sys.executable, "-c", HOSTED, str(tmp_path / "state" / "traces.sqlite")]
    subprocess.run(command, env=environ, timeout=20, check=True)
    assert sink.requests == []
