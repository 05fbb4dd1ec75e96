"""Our own spans: what a program may do to them, what is exported of them, and what they cost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, cast

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from tests.collecting import Sink
from tests.timed import in_time, timed

from asmodel import trace_spans, trace_store, tracing
from asmodel.trace_export import Tracing
from asmodel.trace_reader import runs, spans
from asmodel.trace_spans import Recorded, Recorder


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "asmodel" / "traces.sqlite"


@contextmanager
def exported() -> Generator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    traces = Tracing(processors=[SimpleSpanProcessor(exporter)])
    try:
        yield exporter
    finally:
        traces.shutdown()


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


ELSEWHERE = SpanContext(0xAB << 120, 0xCD << 56, is_remote=True, trace_flags=TraceFlags(1))


# -- what a program may do ------------------------------------------------------------------------------------------


def test_a_program_adds_to_the_current_span_by_opentelemetrys_api() -> None:
    with exported() as exporter, tracing.step_span("s", program="p", kind="chat", draw=None):
        span = trace.get_current_span()
        span.set_attribute("one", 1)
        span.set_attributes({"two": "2", "three": [3.0, 4.0]})
        span.add_event("looked", {"at": "it"}, timestamp=5)
        span.add_link(ELSEWHERE, {"why": "so"})
        span.update_name("renamed")
        assert span.is_recording()
        ids = span.get_span_context()
        assert ids.is_valid
        assert ids is span.get_span_context()
    done = only(exporter)
    assert done.name == "renamed"
    found = dict(done.attributes or {})
    assert (found["one"], found["two"], found["three"]) == (1, "2", (3.0, 4.0))
    assert [(e.name, e.timestamp, dict(e.attributes or {})) for e in done.events] == [("looked", 5, {"at": "it"})]
    assert [(k.context, dict(k.attributes or {})) for k in done.links] == [(ELSEWHERE, {"why": "so"})]


def test_what_is_said_of_a_span_that_has_ended_is_not_heard() -> None:
    with exported() as exporter:
        with tracing.step_span("s", program="p", kind="chat", draw=None) as span:
            pass
        before = only(exporter).to_json()
        span.set_attribute("late", 1)
        span.set_attributes({"late": 1})
        span.add_event("late")
        span.add_link(ELSEWHERE)
        span.set_status(StatusCode.ERROR)
        span.update_name("late")
        span.end()
        assert only(exporter).to_json() == before
        assert isinstance(span, Recorded)
        assert "late" not in span.attributes


def test_a_list_is_kept_as_it_was_when_it_was_given() -> None:
    votes = [1, 2]
    with exported() as exporter, tracing.part_span("x", of=None) as span:
        span.set_attribute("votes", votes)
        span.set_attribute("odd", cast("Any", Path("x")))
        votes.append(3)
    found = dict(only(exporter).attributes or {})
    assert (found["votes"], found["odd"]) == ((1, 2), "x")


def test_a_status_that_is_ok_is_final_and_none_is_unset() -> None:
    what: dict[str, list[tuple[StatusCode, str | None]]] = {
        "fails": [(StatusCode.ERROR, "why"), (StatusCode.UNSET, None)],
        "fine": [(StatusCode.OK, "ignored"), (StatusCode.ERROR, "too late")],
    }
    with exported() as exporter:
        for name, said in what.items():
            with tracing.part_span(name, of=None) as span:
                for code, description in said:
                    span.set_status(Status(code, description if code is StatusCode.ERROR else None))
    fails, fine = exporter.get_finished_spans()
    assert (fails.status.status_code, fails.status.description) == (StatusCode.ERROR, "why")
    assert (fine.status.status_code, fine.status.description) == (StatusCode.OK, None)


def test_a_programs_own_span_has_its_own_scope_and_records_its_exception() -> None:
    def fail(how: str) -> None:
        tracer = trace.get_tracer("theirs", "1.2", schema_url="https://example.com/schema")
        if how == "current":
            with tracer.start_as_current_span("parse", kind=SpanKind.CONSUMER, links=[Link(ELSEWHERE)]):
                raise ValueError("their own words")
        with tracer.start_span("parse", attributes={"a": 1}):
            raise ValueError("their own words")

    for how in ("current", "not"):
        with exported() as exporter, tracing.run_span("p", digest=None, run_id="r", nested=False) as run:
            with pytest.raises(ValueError, match="their own"):
                fail(how)
            span = exporter.get_finished_spans()[0]
            assert span.parent == run.get_span_context()
        assert span.instrumentation_scope is not None
        assert (span.instrumentation_scope.name, span.instrumentation_scope.version) == ("theirs", "1.2")
        assert span.status.status_code is StatusCode.ERROR
        (event,) = span.events
        assert (event.attributes or {})["exception.type"] == "ValueError"
        assert len(span.links) == (how == "current")


def test_a_span_of_another_provider_can_be_the_parent(path: Path) -> None:
    theirs = TracerProvider(shutdown_on_exit=False).get_tracer("theirs")
    traces = Tracing(local=path)
    with (
        theirs.start_as_current_span("outer") as outer,
        tracing.run_span("p", digest=None, run_id="r", nested=False),
        tracing.step_span("s", program="p", kind="chat", draw=None),
    ):
        pass
    traces.shutdown()
    (row,) = runs(path)
    assert row.trace_id == trace.format_trace_id(outer.get_span_context().trace_id)
    (root,) = spans(path, "r").roots
    assert root.parent_id == trace.format_span_id(outer.get_span_context().span_id)
    assert [child.name for child in root.children] == ["step s"]


def test_ids_differ_though_a_program_seeds_its_random_numbers_and_forks() -> None:
    def drawn() -> str:
        random.seed(1)
        with tracing.part_span("x", of=None) as span:
            return tracing.trace_id(span)

    tracing.install(provider := Recorder())
    try:
        ids = {drawn() for _ in range(100)}
        read, write = os.pipe()
        if hasattr(os, "fork"):
            child = os.fork()
            if child == 0:
                os.write(write, drawn().encode())
                os._exit(0)
            os.waitpid(child, 0)
            ids |= {os.read(read, 32).decode(), drawn()}
        os.close(read)
        os.close(write)
        assert len(ids) == (102 if hasattr(os, "fork") else 100)
    finally:
        tracing.remove(provider)


# -- what is exported -----------------------------------------------------------------------------------------------


def test_the_sdks_limits_hold_and_what_they_take_away_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "4")
    monkeypatch.setenv("OTEL_SPAN_EVENT_COUNT_LIMIT", "2")
    monkeypatch.setenv("OTEL_SPAN_LINK_COUNT_LIMIT", "1")
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "3")
    with exported() as exporter, tracing.part_span("x", of=None) as span:
        for number in range(9):
            span.set_attribute(f"n{number}", "long text")
            span.add_event(str(number))
            span.add_link(ELSEWHERE, {"n": number})
    done = only(exporter)
    assert dict(done.attributes or {}) == {f"n{number}": "lon" for number in (5, 6, 7, 8)}
    assert [event.name for event in done.events] == ["7", "8"]
    assert [(link.attributes or {})["n"] for link in done.links] == [8]
    assert (done.dropped_attributes, done.dropped_events, done.dropped_links) == (6, 7, 8)


def test_what_is_exported_is_what_the_sdk_would_have_exported(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    traces = tracing.configure(local=None)
    incoming = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "vendor=x"}
    with tracing.start_request("POST", "/v1/x", incoming), tracing.part_span("x", of=2) as span:
        span.add_event("e", {"k": 1}, timestamp=7)
        span.add_link(ELSEWHERE)
        span.set_status(StatusCode.ERROR, "why")
    traces.shutdown()
    (found, request) = sink.requests[0].resource_spans[0].scope_spans[0].spans
    scope = sink.requests[0].resource_spans[0].scope_spans[0]
    assert (scope.scope.name, scope.schema_url) == (tracing.SCOPE, tracing.SCHEMA_URL)
    assert request.parent_span_id.hex() == "cd" * 8
    assert found.parent_span_id == request.span_id
    assert {found.trace_id.hex(), request.trace_id.hex()} == {"ab" * 16}
    assert {found.trace_state, request.trace_state} == {"vendor=x"}
    assert (request.flags, found.flags) == (0x300, 0x100), "whether the parent is remote is known, and it is"
    assert (found.status.code, found.status.message) == (2, "why")
    assert [(e.name, e.time_unix_nano) for e in found.events] == [("e", 7)]
    assert [link.span_id.hex() for link in found.links] == ["cd" + "00" * 7]
    assert {a.key: a.value.int_value or a.value.string_value for a in found.attributes} == {
        tracing.RUN_PART: "x",
        tracing.RUN_PART_OF: 2,
    }


@pytest.fixture
def sink() -> Generator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


@pytest.mark.parametrize(
    ("sampler", "argument", "flag", "out"),
    [
        ("parentbased_always_on", "", None, True),
        ("parentbased_always_on", "", "00", False),
        ("always_on", "", "00", True),
        ("always_off", "", "01", False),
        ("parentbased_always_off", "", None, False),
        ("parentbased_always_off", "", "01", True),
        ("traceidratio", "0", "01", False),
        ("traceidratio", "1", "00", True),
        ("parentbased_traceidratio", "1", None, True),
        ("parentbased_traceidratio", "0", None, False),
    ],
)
@pytest.mark.parametrize("local", [False, True])
def test_the_sdks_samplers_decide_what_is_exported(
    monkeypatch: pytest.MonkeyPatch,
    sink: Sink,
    path: Path,
    sampler: str,
    argument: str,
    flag: str | None,
    out: bool,
    local: bool,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    if argument:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    traces = tracing.configure(local=path if local else None, hosts=["vllm"])
    headers = {} if flag is None else {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-{flag}"}
    with (
        tracing.start_request("POST", "/v1/x", headers) as request,
        tracing.run_span("p", digest=None, run_id="r", nested=False) as span,
    ):
        assert span.is_recording() is (out or local)
        assert request.get_span_context().trace_flags.sampled is out
        told = int(tracing.outgoing("http://vllm")["traceparent"][-2:], 16) & 1
    assert traces.shutdown()
    assert bool(told) is out
    assert sink.names == (["invoke_workflow p", "POST /v1/x"] if out else [])
    assert [row.run_id for row in runs(path)] == (["r"] if local else [])


def test_where_nobody_listens_there_are_ids_and_nothing_is_recorded() -> None:
    traces = Tracing()
    with tracing.start_request("POST", "/v1/x", {}) as request, tracing.part_span("x", of=None) as span:
        assert len(tracing.trace_id(request)) == 32
        assert tracing.trace_id(span) == tracing.trace_id(request)
        assert tracing.origin(span) is None
        span.set_attribute("a", 1)
        span.set_attributes({"a": 1})
        span.add_event("e")
        span.add_link(ELSEWHERE)
        span.update_name("n")
        span.set_status(StatusCode.ERROR)
        span.record_exception(ValueError("x"))
        assert not isinstance(span, Recorded)
    traces.shutdown()


def test_the_sdk_is_not_imported_where_nothing_is_exported(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from asmodel import tracing\n"
        f"traces = tracing.configure(local=Path({str(path)!r}))\n"
        "with tracing.run_span('p', digest=None, run_id='r', nested=False): pass\n"
        "assert traces.shutdown()\n"
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=20, check=False).returncode == 0
    assert [row.run_id for row in runs(path)] == ["r"]


# -- on their way to the local file ---------------------------------------------------------------------------------


def test_of_very_many_short_runs_the_last_are_kept_and_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_store, "EVERY", 0.01)
    traces = Tracing(local=path, local_runs=200)
    assert traces.local is not None
    for number in range(3_000):
        with (
            tracing.start_request("POST", "/v1/x", {}),
            tracing.run_span("p", digest=None, run_id=f"r{number}", nested=False),
            tracing.step_span("s", program="p", kind="chat", draw=None),
        ):
            pass
        if number % 50 == 49:
            time.sleep(0.002)
    assert traces.shutdown()
    assert traces.local.dropped == 0
    found = runs(path, limit=10_000)
    assert [row.run_id for row in found] == [f"r{number}" for number in range(2_999, 2_799, -1)]
    for row in found[::50]:
        (root,) = spans(path, row.trace_id).roots
        assert [child.name for run in root.children for child in run.children] == ["step s"]


@timed
def test_a_run_that_is_under_way_is_seen_at_once_though_many_short_ones_are_held(path: Path) -> None:
    traces = Tracing(local=path, local_runs=20)

    def short(number: int) -> None:
        with tracing.start_request("POST", "/v1/x", {}), tracing.run_span("p", digest=None, run_id="s", nested=False):
            pass

    for number in range(100):
        short(number)
    time.sleep(0.15)
    with tracing.run_span("long", digest=None, run_id="long", nested=False):
        for number in range(100):
            short(number)
        begun = time.monotonic()
        while not [row for row in runs(path) if row.run_id == "long" and row.outcome == "running"]:
            assert time.monotonic() - begun < 5
            time.sleep(0.01)
        seen = time.monotonic() - begun
    begun = time.monotonic()
    while not [row for row in runs(path) if row.run_id == "s"]:
        assert time.monotonic() - begun < 5, "what is held is written, though nothing comes after it"
        time.sleep(0.02)
    traces.shutdown()
    in_time(seen, 1.0)


def test_what_begins_after_its_request_has_ended_is_still_part_of_its_run(path: Path) -> None:
    traces = Tracing(local=path)
    with (
        tracing.start_request("POST", "/v1/x", {}),
        tracing.run_span("p", digest=None, run_id="r", nested=False) as run,
    ):
        inside = trace.set_span_in_context(run)
    assert traces.flush()
    tracer = trace.get_tracer("theirs")
    late = tracer.start_span("late", inside)
    assert traces.flush()
    late.end()
    assert traces.shutdown()
    (root,) = spans(path, "r").roots
    ((late_one,),) = [found.children for found in root.children]
    assert (late_one.name, late_one.end_ns is not None) == ("late", True)
    assert runs(path)[0].outcome == "ok"


def test_spans_of_many_threads_are_all_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_store, "EVERY", 0.001)
    traces = Tracing(local=path)
    with tracing.run_span("p", digest=None, run_id="r", nested=False) as run:
        context = trace.set_span_in_context(run)
        tracer = trace.get_tracer("theirs")

        def work() -> None:
            for number in range(300):
                span = tracer.start_span("t", context, attributes={tracing.STEP_NAME: "t"})
                span.set_attribute("n", number)
                span.end()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert traces.shutdown()
    (root,) = spans(path, "r").roots
    assert len(root.children) == 2_400
    assert all(child.end_ns is not None and "n" in child.attributes for child in root.children)
    assert runs(path)[0].steps == 2_400


# -- what they cost -------------------------------------------------------------------------------------------------


class _Nowhere(SpanExporter):
    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def test_a_span_of_ours_costs_a_third_of_the_sdks_or_less(path: Path) -> None:
    def cost(provider: trace.TracerProvider) -> float:
        tracing.install(provider)
        try:
            return min(_seconds(_steps) for _ in range(15))
        finally:
            tracing.remove(provider)

    traces = Tracing(local=path)
    ours = tracing.installed()
    assert ours is not None
    sdk = TracerProvider(shutdown_on_exit=False)
    sdk.add_span_processor(SimpleSpanProcessor(_Nowhere()))
    cost(ours)
    mine, theirs = cost(ours), cost(sdk)
    traces.shutdown()
    print(
        f"\n  a span: {mine * 1e6 / 200:.1f} µs on the thread that makes it, and the SDK's {theirs * 1e6 / 200:.1f} µs"
    )
    assert mine < theirs / 3


def _steps() -> None:
    for _ in range(200):
        with tracing.step_span("s", program="p", kind="chat", draw=None):
            pass


def _seconds(work: Callable[[], None]) -> float:
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def test_the_current_context_is_asked_of_opentelemetrys_own_variable() -> None:
    """By its public functions each span takes a tenth longer: where this fails, they are used, and all else holds."""
    assert isinstance(trace_spans.current, ContextVar)
    token = otel_context.attach(otel_context.set_value("key", "value", otel_context.Context()))
    try:
        assert trace_spans.current.get() is otel_context.get_current()
        inner = trace_spans.current.set(otel_context.Context())
        assert otel_context.get_current() == {}
        trace_spans.leave(inner)
        assert otel_context.get_current()["key"] == "value"
    finally:
        otel_context.detach(token)


def test_a_context_that_another_task_left_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    token = copy_context().run(trace_spans.current.set, otel_context.Context())
    trace_spans.leave(token)
    assert "detach" in caplog.text
