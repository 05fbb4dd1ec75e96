"""Where spans go: OpenTelemetry's SDK, set up from its own `OTEL_*` variables, and the local file.

Imported by `tracing.configure` alone, because the SDK and its exporter take a tenth of a second to import.

A collector that is down, slow or refusing costs a request nothing: spans are handed to a bounded queue and sent by a
thread; what does not fit is dropped, and an outage is one line in the log.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import orjson
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult

from asmodel import trace_content, tracing
from asmodel.trace_store import LocalTraces

if TYPE_CHECKING:
    from opentelemetry._logs import LoggerProvider
    from opentelemetry.context import Context
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.trace import Link, SpanKind, TraceState
    from opentelemetry.util.types import Attributes

log = logging.getLogger("asmodel.tracing")

WARN_EVERY = 60.0
"""Seconds between two warnings about exporting, however often it comes and goes."""

_NOISY = ("opentelemetry.sdk._shared_internal", "opentelemetry.exporter.otlp")
"""Loggers that write a line for each batch, each retry or each dropped span."""


class Tracing:
    """Tracing that has been set up. Spans go through it from when it is made until it is shut down.

    Several may live in one process: the newest that has not been shut down takes new spans, and a span that has begun
    ends where it began. A provider that somebody else has made global (`opentelemetry-instrument`, a host program) is
    not doubled: it exports as it was told to, and the local file is added to it. Its sampler is its own, too: what a
    request asks for by `tracing.start_request(force=True)` is then left to it.
    """

    def __init__(
        self,
        *,
        local: Path | None = None,
        service_name: str = "asmodel",
        local_runs: int = 1_000,
        redact: trace_content.Redactor | None = None,
        content_bytes: int = trace_content.LIMIT,
        hosts: Sequence[str] = (),
        processors: Sequence[SpanProcessor] = (),
    ) -> None:
        """`processors` are further receivers of spans, given to the provider as they are. The rest: `configure`."""
        self.local: LocalTraces | None = None
        """The writer of the local file, where there is one."""
        self._provider: trace.TracerProvider | None = None
        self._exporting: list[BatchSpanProcessor | BatchLogRecordProcessor] = []
        self._exporters: list[_Patient] = []
        self._others = list(processors)
        self._closed = False
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return
        if local is not None:
            self.local = LocalTraces(local, max_runs=local_runs)
        feeds: list[SpanProcessor] = [LocalFeed(self.local)] if self.local is not None else []
        host = trace.get_tracer_provider()
        if isinstance(host, TracerProvider):
            provider = host
        else:
            provider = TracerProvider(resource=_resource(service_name), shutdown_on_exit=False)
            provider.sampler = _Sampler(provider.sampler, record_all=self.local is not None)
            feeds += self._exports()
            if isinstance(host, trace.ProxyTracerProvider):
                # So that a span that a program makes by OpenTelemetry's own API is part of its run.
                trace.set_tracer_provider(_Current())
        for processor in [*feeds, *self._others]:
            provider.add_span_processor(processor)
        self._provider = provider
        content = trace_content.read(os.environ, redact=redact, limit=content_bytes)
        events = None
        if content is not None and content.in_events:
            events = self._events(_resource(service_name))
        tracing.install(provider, content=content, events=events, hosts=hosts)
        atexit.register(self.shutdown)

    def _exports(self) -> list[SpanProcessor]:
        made: list[SpanProcessor] = []
        for name in _exporter_names("TRACES"):
            try:
                exporter, target = _exporter(name)
                patient = _Patient(exporter, target)
                processor = BatchSpanProcessor(patient)
                made.append(processor)
                self._exporting.append(processor)
                self._exporters.append(patient)
            except (ValueError, ImportError, OSError) as error:
                log.warning("traces are not exported by %s: %s", name, error)
        return made

    def _events(self, resource: Resource) -> tracing.Events | None:
        """Where events with content go: log records, by the variables for logs."""
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
        told = False
        for name in _exporter_names("LOGS"):
            try:
                exporter, target = _log_exporter(name)
                patient = _Patient(exporter, target, "events with content")
                # What a batch of log records needs of an exporter is what a batch of spans needs of one.
                processor = BatchLogRecordProcessor(cast("Any", patient))
                provider.add_log_record_processor(processor)
                self._exporting.append(processor)
                self._exporters.append(patient)
                told = True
            except (ValueError, ImportError, OSError) as error:
                log.warning("events with content are not exported by %s: %s", name, error)
        if not told:
            log.warning(
                "%s asks for content in events, and no exporter of logs is set: it goes nowhere; on spans "
                "(SPAN_ONLY) it is seen in Jaeger and by `asmodel trace`",
                trace_content.VARIABLE,
            )
            return None
        return _Events(provider)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all spans that have ended are written and sent; False where `timeout` seconds were not enough.

        Blocks, so it is for a thread or a command.
        """
        until = time.monotonic() + timeout
        done = self.local is None or self.local.flush(timeout)
        for processor in self._exporting:
            done = _bounded(processor.force_flush, until - time.monotonic()) and done
        return done

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Write and send what is left, and stop; False where `timeout` seconds were not enough. Blocks.

        To be called once the last run has ended: what ends later is not kept. A second call does nothing.
        """
        if self._closed:
            return True
        self._closed = True
        until = time.monotonic() + timeout
        atexit.unregister(self.shutdown)
        if self._provider is not None:
            tracing.remove(self._provider)
        done = self.local is None or self.local.shutdown(timeout)
        for processor, exporter in zip(self._exporting, self._exporters, strict=True):
            stop: Callable[[], object] = processor.shutdown  # not annotated in the SDK
            sent = _bounded(stop, until - time.monotonic())
            if not sent:
                exporter.give_up()
            done = sent and done
        for other in self._others:
            other.shutdown()
        return done


def _bounded(work: Callable[[], object], seconds: float) -> bool:
    """Whether `work` is over in time. The SDK's own flush ignores its timeout, and its shutdown takes up to 30 s."""
    thread = threading.Thread(target=work, daemon=True, name="asmodel-trace-flush")
    thread.start()
    thread.join(max(0.0, seconds))
    return not thread.is_alive()


def _resource(service_name: str) -> Resource:
    resource = Resource.create()
    ours: dict[str, str] = {}
    # The SDK lets what is passed in win over the variables; the variables are the operator's word.
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        ours[SERVICE_NAME] = service_name
    if SERVICE_VERSION not in resource.attributes:
        try:
            ours[SERVICE_VERSION] = version("asmodel")
        except PackageNotFoundError:
            log.debug("asmodel runs from a source tree that is not installed: spans carry no version")
    return resource.merge(Resource(ours))


def _exporter_names(signal: str) -> list[str]:
    named = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip()
    if not named:
        endpoints = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        return ["otlp"] if any(os.environ.get(name) for name in endpoints) else []
    names = [name.strip().lower() for name in named.split(",")]
    return [name for name in dict.fromkeys(names) if name and name != "none"]


def _exporter(name: str) -> tuple[SpanExporter, str]:
    """The exporter of that name and what to call its target in the log. Raises ValueError or ImportError."""
    if name == "console":
        # Not standard output: that is where `asmodel run` prints its answer.
        return ConsoleSpanExporter(out=sys.stderr), "the console"
    if name != "otlp":
        raise ValueError("OTEL_TRACES_EXPORTER takes otlp, console and none")
    return _otlp("TRACES", "trace_exporter", "OTLPSpanExporter")


def _log_exporter(name: str) -> tuple[Any, str]:
    if name == "console":
        from opentelemetry.sdk._logs.export import ConsoleLogRecordExporter

        return ConsoleLogRecordExporter(out=sys.stderr), "the console"
    if name != "otlp":
        raise ValueError("OTEL_LOGS_EXPORTER takes otlp, console and none")
    return _otlp("LOGS", "_log_exporter", "OTLPLogExporter")


def _otlp(signal: str, module: str, exporter: str) -> tuple[Any, str]:
    protocol = (
        os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    if protocol not in ("grpc", "http/protobuf"):
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL takes http/protobuf and grpc, not {protocol!r}")
    try:
        found: Any = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{protocol.partition('/')[0]}.{module}")
    except ImportError as error:
        raise ImportError(
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc needs the package opentelemetry-exporter-otlp-proto-grpc; "
            "http/protobuf (port 4318) needs nothing more"
        ) from error
    variables = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = next((os.environ[name] for name in variables if os.environ.get(name)), "")
    # Neither user, password nor query: they may be keys.
    parts = urlsplit(endpoint)
    target = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or "the OTLP collector"
    return getattr(found, exporter)(), target


class _Events:
    """Makes a log record of each event."""

    def __init__(self, provider: LoggerProvider) -> None:
        self._logger = provider.get_logger(tracing.SCOPE, schema_url=tracing.SCHEMA_URL)

    def __call__(self, attributes: Mapping[str, Any]) -> None:
        from opentelemetry._logs import LogRecord, SeverityNumber

        now = time.time_ns()
        self._logger.emit(
            LogRecord(
                timestamp=now,
                observed_timestamp=now,
                severity_number=SeverityNumber.INFO,
                event_name=tracing.DETAILS_EVENT,
                # As JSON it was for spans, which hold nothing that is nested.
                attributes={n: orjson.loads(v) if n in tracing.CONTENT else v for n, v in attributes.items()},
                context=otel_context.get_current(),
            )
        )


class _Patient(SpanExporter):
    """An exporter whose outage is one warning, and whose return is one line."""

    def __init__(self, exporter: SpanExporter, target: str, what: str = "traces") -> None:
        self._exporter = exporter
        self._target = target
        self._what = what
        self._down = False
        self._closing = threading.Lock()
        self._closed = False
        self._last_warned = float("-inf")
        self._noise = _Noise(self._warn)
        self._noise.attach()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._closed:
            return SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # the exporter's thread must live on, whatever a transport raises
            self._warn(type(error).__name__)
            return SpanExportResult.FAILURE
        if result.name != SpanExportResult.SUCCESS.name:
            self._warn("not accepted")
        elif self._down:
            self._down = False
            log.info("%s are delivered to %s again", self._what, self._target)
        return result

    def _warn(self, reason: str) -> None:
        now = time.monotonic()
        if not self._down and now - self._last_warned >= WARN_EVERY:
            self._last_warned = now
            log.warning(
                "%s are not delivered to %s (%s); requests are not affected, what does not fit is dropped, and this is "
                "said once until it works again",
                self._what,
                self._target,
                reason,
            )
        self._down = True

    def give_up(self) -> None:
        """Stop waiting for a collector that does not answer: ends the exporter's back-off."""
        # The thread that waits there has yet to say so, so what it says is still kept out of the log.
        _bounded(self._close, 0.5)

    def shutdown(self) -> None:
        self._close()
        self._noise.detach()

    def _close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _Noise(logging.Filter):
    """Turns what the SDK says about each batch into the one warning of an outage."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._warn = warn
        self._loggers: list[logging.Logger] = []

    def attach(self) -> None:
        # A filter of a logger is not asked for its children's records, so each existing child gets it.
        known = [name for name in list(logging.Logger.manager.loggerDict) if name.startswith(_NOISY)]
        self._loggers = [logging.getLogger(name) for name in dict.fromkeys([*_NOISY, *known])]
        for logger in self._loggers:
            logger.addFilter(self)

    def detach(self) -> None:
        for logger in self._loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        args = record.args if isinstance(record.args, tuple) else ()
        # A transport's error quotes the whole address; its class says what the reader needs.
        plain = tuple(type(arg).__name__ if isinstance(arg, BaseException) else arg for arg in args)
        try:
            self._warn(str(record.msg) % plain if plain else str(record.msg))
        except (TypeError, ValueError):
            self._warn(str(record.msg))
        return False


class _Sampler(Sampler):
    """Leaves what is exported to the configured sampler, but for what was forced; and records the rest where told to.

    What is recorded and not exported is for the local file only.
    """

    def __init__(self, exported: Sampler, *, record_all: bool) -> None:
        self._exported = exported
        self._record_all = record_all

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        result = self._exported.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        if result.decision is not Decision.RECORD_AND_SAMPLE and otel_context.get_value(tracing.FORCED, parent_context):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, result.trace_state)
        if result.decision is Decision.DROP and self._record_all:
            # The SDK's DROP comes without the attributes, since nothing would have read them.
            return SamplingResult(Decision.RECORD_ONLY, attributes, result.trace_state)
        return result

    def get_description(self) -> str:
        return f"Asmodel({self._exported.get_description()})"


class LocalFeed(SpanProcessor):
    """Hands spans to the local file's queue; that is all that happens on the event loop."""

    def __init__(self, local: LocalTraces) -> None:
        self._local = local

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self._local.started(span)

    def on_end(self, span: ReadableSpan) -> None:
        self._local.ended(span)

    def shutdown(self) -> None:
        self._local.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._local.flush(timeout_millis / 1e3)


class _Current(trace.TracerProvider):
    """OpenTelemetry's global provider: always the one in use. It can be set once a process, so it never changes."""

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> trace.Tracer:
        return _CurrentTracer(
            lambda provider: provider.get_tracer(
                instrumenting_module_name, instrumenting_library_version, schema_url, attributes
            )
        )


class _CurrentTracer(trace.Tracer):
    def __init__(self, of: Callable[[trace.TracerProvider], trace.Tracer]) -> None:
        self._of = of

    def _tracer(self) -> trace.Tracer:
        provider = tracing.installed()
        return trace.NoOpTracer() if provider is None else self._of(provider)

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = trace.SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> trace.Span:
        return self._tracer().start_span(
            name, context, kind, attributes, links, start_time, record_exception, set_status_on_exception
        )

    def start_as_current_span(  # type: ignore[override]  # a context manager; the API's own also decorates functions
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = trace.SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> AbstractContextManager[trace.Span]:
        return self._tracer().start_as_current_span(
            name,
            context,
            kind,
            attributes,
            links,
            start_time,
            record_exception,
            set_status_on_exception,
            end_on_exit,
        )
