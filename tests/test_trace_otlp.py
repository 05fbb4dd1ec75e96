"""A kept trace as OTLP JSON: what a collector reads out of it is what the exporter would have sent."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format  # type: ignore[import-untyped]  # it has no stubs
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from asmodel import trace_reader, tracing
from asmodel.calls import Chat, Message, Origin, Reply, Usage
from asmodel.errors import UpstreamTimeout
from asmodel.trace_export import Tracing
from asmodel.trace_otlp import otlp

CALL = Chat(identity="m", messages=(Message("user", "hi"),), params={"temperature": 0.5})


def read(body: dict[str, Any]) -> ExportTraceServiceRequest:
    """As a collector does: OTLP's JSON is protobuf's, but for ids, which are hex digits and not base64."""

    def ids(fields: dict[str, Any]) -> dict[str, Any]:
        for name in ("traceId", "spanId", "parentSpanId"):
            if name in fields:
                fields[name] = base64.b64encode(bytes.fromhex(fields[name])).decode()
        return fields

    request = ExportTraceServiceRequest()
    json_format.ParseDict(json.loads(json.dumps(body), object_hook=ids), request)
    return request


def spans(request: ExportTraceServiceRequest) -> dict[str, Span]:
    return {span.name: span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "traces.sqlite"


def test_a_kept_trace_is_read_as_the_trace_that_it_was(path: Path) -> None:
    traces = Tracing(local=path)

    def failing() -> None:
        with tracing.step_span("verdict", program="p", kind="chat", draw="0/1") as span:
            tracing.record_wait(span, "cache.flight", 0.25)
            tracing.record_step(span, Reply(source="hit", origin=Origin("ab" * 16, "cd" * 8)), asks=1)
            raise UpstreamTimeout("x")

    with tracing.start_request("POST", "/v1/chat/completions", {}) as request:
        with (
            tracing.run_span("p", digest="d", run_id="r1", nested=False),
            tracing.call_span(CALL, upstream="u", provider="openai", model="gpt", address="h:1", stream=False) as call,
        ):
            tracing.record_reply(call, Reply(usage=Usage(prompt_tokens=9), cost=0.5), first_delta=None)
        with pytest.raises(UpstreamTimeout):
            failing()
    assert traces.shutdown()
    found = read(otlp(trace_reader.spans(path, "r1")))
    (resource,) = found.resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "asmodel"
    assert resource.scope_spans[0].schema_url == tracing.SCHEMA_URL
    by_name = spans(found)
    server, run = by_name["POST /v1/chat/completions"], by_name["invoke_workflow p"]
    chat, step = by_name["chat gpt"], by_name["step verdict"]
    assert server.trace_id.hex() == tracing.trace_id(request)
    assert (server.kind, run.kind, chat.kind) == (
        Span.SPAN_KIND_SERVER,
        Span.SPAN_KIND_INTERNAL,
        Span.SPAN_KIND_CLIENT,
    )
    assert run.parent_span_id == server.span_id
    assert chat.parent_span_id == run.span_id
    assert server.start_time_unix_nano <= run.start_time_unix_nano <= run.end_time_unix_nano
    attributes = {a.key: a.value for a in chat.attributes}
    assert attributes["gen_ai.usage.input_tokens"].int_value == 9
    assert attributes["gen_ai.request.temperature"].double_value == 0.5
    assert attributes["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "stop"
    assert {a.key: a.value for a in run.attributes}["asmodel.run.nested"].WhichOneof("value") == "bool_value"
    assert step.status.code == Status.STATUS_CODE_ERROR
    assert run.status.code == Status.STATUS_CODE_UNSET
    assert step.links[0].trace_id.hex() == "ab" * 16
    assert step.events[0].name == "asmodel.wait"


def test_what_has_not_ended_says_so_and_has_an_end_all_the_same(path: Path) -> None:
    traces = Tracing(local=path)
    with tracing.run_span("p", digest=None, run_id="r1", nested=False):
        with tracing.step_span("done", program="p", kind="chat", draw=None):
            pass
        assert traces.flush()
        by_name = spans(read(otlp(trace_reader.spans(path, "r1"))))
    traces.shutdown()
    run, step = by_name["invoke_workflow p"], by_name["step done"]
    assert run.end_time_unix_nano >= step.end_time_unix_nano
    assert "asmodel.incomplete" in {a.key for a in run.attributes}
    assert "asmodel.incomplete" not in {a.key for a in step.attributes}
