"""The line of a request in the log, for people and as JSON; and that no line quotes an exception."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Generator
from contextlib import contextmanager

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asmodel import request_log, tracing
from asmodel.request_log import Format, RequestLine
from asmodel.trace_export import Tracing

LINE = RequestLine(
    method="POST",
    path="/v1/chat/completions",
    status=200,
    outcome="ok",
    seconds=1.25,
    request_id="req_1",
    trace_id="ab" * 16,
    run_id="run_1",
    model="careful",
    program="evidence-qa",
    caller="ops",
    streamed=True,
    steps=3,
    hits=1,
    joined=0,
    calls=2,
    input_tokens=310,
    output_tokens=42,
    cost=0.0041,
    overhead_seconds=0.012,
)
BARE = RequestLine(method="POST", path="/v1/chat/completions", status=404, outcome="model_not_found", seconds=0.001)


@contextmanager
def logging_to(format: Format) -> Generator[io.StringIO]:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(request_log.formatter(format))
    log = logging.getLogger("asmodel")
    before, log.propagate, level = log.propagate, False, log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield out
    finally:
        log.removeHandler(handler)
        log.propagate = before
        log.setLevel(level)


def test_a_request_is_one_line_for_people() -> None:
    with logging_to("console") as out:
        request_log.write(LINE)
        request_log.write(BARE)
    first, second = out.getvalue().splitlines()
    assert first[8:] == (
        " POST /v1/chat/completions careful 200 ok 1250ms ours=12ms steps=3 cached=1 calls=2 tokens=310+42 "
        f"cost=$0.004100 caller=ops trace={'ab' * 16} id=req_1"
    )
    assert second[8:] == " POST /v1/chat/completions - 404 model_not_found 1ms"


def test_a_server_s_own_handler_is_given_the_line_without_a_record_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(request_log.log, "level", logging.INFO)
    handled: list[logging.LogRecord] = []
    handle = request_log.log.handle

    def heard(record: logging.LogRecord) -> None:
        handled.append(record)
        handle(record)

    monkeypatch.setattr(request_log.log, "handle", heard)
    written: list[str] = []
    for others in (0, 1):
        out = io.StringIO()
        ours = request_log.handler("console")
        assert isinstance(ours, request_log.Handler)
        ours.setStream(out)
        root.handlers = [ours, *[logging.NullHandler()] * others]
        for line in (LINE, BARE):
            request_log.write(line)
        written.append(out.getvalue().partition(" ")[2])
        assert len(handled) == 2 * others
    assert written[0].split(" ")[:5] == written[1].split(" ")[:5]
    assert [one.count("\n") for one in written] == [2, 2]
    assert str(LINE) in written[0]
    assert str(LINE) in written[1]


def test_who_listens_to_the_lines_besides_hears_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    ours = request_log.handler("console")
    assert isinstance(ours, request_log.Handler)
    ours.setStream(io.StringIO())
    monkeypatch.setattr(root, "handlers", [ours])
    heard: list[logging.LogRecord] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    monkeypatch.setattr(request_log.log, "level", logging.INFO)
    above = logging.getLogger("asmodel")
    ear = Ear()
    above.addHandler(ear)
    try:
        request_log.write(LINE)
    finally:
        above.removeHandler(ear)
    assert [record.getMessage() for record in heard] == [str(LINE)]


def test_as_json_a_request_has_a_field_for_each_thing() -> None:
    with logging_to("json") as out:
        request_log.write(LINE)
        request_log.write(BARE)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "asmodel.access",
        "message": "request",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "ok",
        "seconds": 1.25,
        "request_id": "req_1",
        "trace_id": "ab" * 16,
        "run_id": "run_1",
        "model": "careful",
        "program": "evidence-qa",
        "caller": "ops",
        "streamed": True,
        "steps": 3,
        "hits": 1,
        "joined": 0,
        "calls": 2,
        "input_tokens": 310,
        "output_tokens": 42,
        "cost": 0.0041,
        "overhead_seconds": 0.012,
    }
    assert set(second) == {"time", "level", "logger", "message", "method", "path", "status", "outcome", "seconds"}


def test_an_unknown_price_is_not_0() -> None:
    unpriced = RequestLine(method="POST", path="/", status=200, outcome="ok", seconds=1, calls=1)
    assert "cost=?" in unpriced.text()
    assert unpriced.fields()["cost"] is None


@pytest.mark.parametrize("format", ["console", "json"])
def test_of_an_exception_kind_and_place_are_logged_and_never_what_it_says(format: Format) -> None:
    log = logging.getLogger("asmodel.test")
    with logging_to(format) as out:
        try:
            raise ValueError("a prompt of somebody")
        except ValueError:
            log.warning("went wrong", exc_info=True)
    said = out.getvalue()
    assert "went wrong" in said
    assert "ValueError" in said
    assert "test_request_log.py" in said
    assert "a prompt of somebody" not in said


def test_a_line_can_not_pass_for_two_nor_command_the_terminal() -> None:
    with logging_to("console") as out:
        request_log.write(RequestLine(method="POST", path="/\x1b[2J", status=1, outcome="ok\r", seconds=0))
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    with logging_to("json") as out:
        logging.getLogger("asmodel").info("two\nlines \ud800")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["message"].startswith("two\nlines")


def test_a_line_within_a_request_names_its_trace() -> None:
    traces = Tracing(processors=[SimpleSpanProcessor(InMemorySpanExporter())])
    with logging_to("json") as out, tracing.start_request("POST", "/v1/x", {}) as span:
        logging.getLogger("asmodel.upstream").info("asked again")
        trace_id = tracing.trace_id(span)
    traces.shutdown()
    assert json.loads(out.getvalue())["trace_id"] == trace_id
