"""What of OpenTelemetry's SDK is used: its exporters, samplers, limits and resource, set by its own `OTEL_*` variables.

Imported where spans are exported, or a host program has made a provider of the SDK's global: the SDK and its exporter
take a tenth of a second to import, and twelve megabytes. Our spans (trace_spans.py) become the SDK's in the thread that
exports them.

A collector that is down, slow or refusing costs a request nothing: spans are handed to a bounded queue and sent by a
thread; what does not fit is dropped, and an outage is one line in the log.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import orjson
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from asmodel import tracing
from asmodel.trace_spans import SAMPLED, Bounds, Decide, Recorded, Recorder, Scope, Unit

if TYPE_CHECKING:
    from opentelemetry._logs import LoggerProvider
    from opentelemetry.context import Context
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.trace import Link, SpanKind, TraceState
    from opentelemetry.util.types import Attributes

    from asmodel.trace_store import LocalTraces

log = logging.getLogger("asmodel.tracing")

WARN_EVERY = 60.0
"""Seconds between two warnings about exporting, however often it comes and goes."""

_NOISY = ("opentelemetry.sdk._shared_internal", "opentelemetry.exporter.otlp")
"""Loggers that write a line for each batch, each retry or each dropped span."""


class Exports:
    """The exporters of one signal that the variables name, each behind a queue of its own."""

    def __init__(self) -> None:
        self.processors: list[BatchSpanProcessor | BatchLogRecordProcessor] = []
        self._patient: list[_Patient] = []

    def spans(self, names: Sequence[str], service_name: str) -> list[BatchSpanProcessor]:
        """Those of spans. One that cannot be made is a warning."""
        read = functools.partial(readable, resource=_resource(service_name), limits=SpanLimits())
        made: list[BatchSpanProcessor] = []
        for name in names:
            try:
                exporter, target = _exporter(name)
                patient = _Patient(exporter, target, read=read)
                made.append(BatchSpanProcessor(patient))
                self._patient.append(patient)
            except (ValueError, ImportError, OSError) as error:
                log.warning("traces are not exported by %s: %s", name, error)
        self.processors += made
        return made

    def events(self, names: Sequence[str], service_name: str) -> tracing.Events | None:
        """Where events with content go: log records. None where nobody takes them."""
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        provider = LoggerProvider(resource=_resource(service_name), shutdown_on_exit=False)
        told = False
        for name in names:
            try:
                exporter, target = _log_exporter(name)
                patient = _Patient(exporter, target, "events with content")
                # What a batch of log records needs of an exporter is what a batch of spans needs of one.
                processor = BatchLogRecordProcessor(cast("Any", patient))
                provider.add_log_record_processor(processor)
                self.processors.append(processor)
                self._patient.append(patient)
                told = True
            except (ValueError, ImportError, OSError) as error:
                log.warning("events with content are not exported by %s: %s", name, error)
        return _Events(provider) if told else None

    def flush(self, until: float) -> bool:
        """Send what has ended, until that moment of the monotonic clock."""
        done = True
        for processor in self.processors:
            done = _bounded(processor.force_flush, until - time.monotonic()) and done
        return done

    def shutdown(self, until: float) -> bool:
        done = True
        for processor, exporter in zip(self.processors, self._patient, strict=True):
            stop: Callable[[], object] = processor.shutdown  # not annotated in the SDK
            sent = _bounded(stop, until - time.monotonic())
            if not sent:
                exporter.give_up()
            done = sent and done
        return done


def _bounded(work: Callable[[], object], seconds: float) -> bool:
    """Whether `work` is over in time. The SDK's own flush ignores its timeout, and its shutdown takes up to 30 s."""
    thread = threading.Thread(target=work, daemon=True, name="asmodel-trace-flush")
    thread.start()
    thread.join(max(0.0, seconds))
    return not thread.is_alive()


def readable(span: Recorded, *, resource: Resource, limits: SpanLimits) -> ReadableSpan:
    """The span as the SDK's, within the SDK's limits, and saying what these have taken away."""
    attributes = BoundedAttributes(
        limits.max_span_attributes, span.attributes, max_value_len=limits.max_span_attribute_length
    )
    attributes.dropped += span.dropped[0]
    length = limits.max_attribute_length
    events = cast("Any", BoundedList)(limits.max_events)  # not annotated in the SDK
    for name, time_ns, about in span.events:
        events.append(Event(name, BoundedAttributes(limits.max_event_attributes, about, max_value_len=length), time_ns))
    events.dropped += span.dropped[1]
    links = cast("Any", BoundedList)(limits.max_links)
    for link in span.links:
        about = BoundedAttributes(limits.max_link_attributes, link.attributes, max_value_len=length)
        links.append(trace.Link(link.context, about))
    links.dropped += span.dropped[2]
    return ReadableSpan(
        name=span.name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=resource,
        attributes=attributes,
        events=events,
        links=links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=_scope(span.scope),
    )


@functools.lru_cache(maxsize=64)
def _scope(scope: Scope) -> InstrumentationScope:
    return InstrumentationScope(scope.name, scope.version, scope.schema_url, scope.attributes)


class Receiver:
    """Hands spans on to a processor of the SDK's, as the SDK's own."""

    def __init__(self, processor: SpanProcessor, service_name: str) -> None:
        self._processor = processor
        self._read = functools.partial(readable, resource=_resource(service_name), limits=SpanLimits())

    def on_start(self, span: Recorded, parent_context: Context | None = None) -> None:
        self._processor.on_start(cast("Span", span), parent_context=parent_context)

    def on_end(self, span: Recorded) -> None:
        self._processor.on_end(self._read(span))


def sampler() -> Decide:
    """What `OTEL_TRACES_SAMPLER` says."""
    # The SDK has no public name for what it reads of it.
    exported = TracerProvider(shutdown_on_exit=False).sampler

    def decide(
        context: Context,
        trace_id: int,
        name: str,
        kind: SpanKind,
        attributes: Attributes,
        links: Sequence[Link] | None,
    ) -> tuple[bool, Attributes, TraceState | None]:
        result = exported.should_sample(context, trace_id, name, kind, attributes, links)
        if result.decision is Decision.RECORD_AND_SAMPLE:
            return True, cast("Attributes", result.attributes), result.trace_state
        # The SDK's DROP comes without the attributes, since nothing would have read them.
        return False, attributes, result.trace_state

    return decide


def bounds() -> Bounds:
    """What the variables for limits say."""
    limits = SpanLimits()
    return Bounds(limits.max_span_attributes, limits.max_events, limits.max_links)


def is_the_sdks(provider: trace.TracerProvider) -> bool:
    return isinstance(provider, TracerProvider)


def add(provider: trace.TracerProvider, local: LocalTraces | None, processors: Sequence[SpanProcessor]) -> None:
    """Have a host program's provider tell these of its spans, too."""
    host = cast("TracerProvider", provider)
    for processor in [*([LocalFeed(local)] if local is not None else []), *processors]:
        host.add_span_processor(processor)


class LocalFeed(SpanProcessor):
    """Hands spans that somebody else's provider makes to the local file."""

    def __init__(self, local: LocalTraces) -> None:
        self._local = local
        self._recorder = Recorder(keeper=local)
        self._scope = Scope(tracing.SCOPE, None, tracing.SCHEMA_URL, None)
        self._open: dict[int, Recorded] = {}
        """By the id of the span."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        context = span.context
        if context is None or self._local.off:
            return
        if self._local.room <= 0:
            self._local.refuse()
            return
        self._local.room -= 1
        ours = Recorded(
            self._recorder,
            context.trace_id,
            context.span_id,
            SAMPLED,
            context.trace_state,
            span.name,
            span.kind,
            cast("dict[str, Any]", span.attributes),
            span.start_time or time.time_ns(),
            self._scope,
        )
        if span.parent is not None:
            ours.parent_id = span.parent.span_id
            ours.above = self._open.get(span.parent.span_id)
        unit = ours.unit = ours.above.unit if ours.above is not None else Unit(self._local)
        self._open[context.span_id] = ours
        if unit is not None:
            unit.fresh.append(ours)
            if not unit.queued:
                unit.queued = True
                self._local.take(unit)

    def on_end(self, span: ReadableSpan) -> None:
        ours = self._open.pop(span.context.span_id, None) if span.context is not None else None
        if ours is None:
            return
        ours.name = span.name
        ours.attributes = dict(span.attributes or {})
        ours.events = [(event.name, event.timestamp, dict(event.attributes or {})) for event in span.events]
        ours.linked = list(span.links)
        ours.code = span.status.status_code
        ours.end(span.end_time)

    def shutdown(self) -> None:
        self._local.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._local.flush(timeout_millis / 1e3)


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

    def __init__(
        self,
        exporter: SpanExporter,
        target: str,
        what: str = "traces",
        *,
        read: Callable[[Recorded], ReadableSpan] | None = None,
    ) -> None:
        """`read` makes of a span of ours one of the SDK's."""
        self._read = read
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
            read = self._read
            if read is not None:
                spans = [read(span) for span in cast("Sequence[Recorded]", spans)]
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
