"""Where spans go: the local file, and where OpenTelemetry's own `OTEL_*` variables say.

Where nothing is exported, the SDK is not even imported (trace_sdk.py).
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import SpanKind

from asmodel import trace_content, tracing
from asmodel.trace_spans import Bounds, Recorder
from asmodel.trace_store import LocalTraces

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Link
    from opentelemetry.util.types import Attributes

    from asmodel.trace_sdk import Exports, Receiver

log = logging.getLogger("asmodel.tracing")


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
        self._exports: Exports | None = None
        self._others = list(processors)
        self._closed = False
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return
        if local is not None:
            self.local = LocalTraces(local, max_runs=local_runs)
        content = trace_content.read(os.environ, redact=redact, limit=content_bytes)
        events = self._events(service_name) if content is not None and content.in_events else None
        host = trace.get_tracer_provider()
        if self._is_hosted(host):
            from asmodel import trace_sdk

            trace_sdk.add(host, self.local, self._others)
            self._provider = host
        else:
            self._provider = self._recorder(service_name, shown=events is not None)
            if isinstance(host, trace.ProxyTracerProvider):
                # So that a span that a program makes by OpenTelemetry's own API is part of its run.
                trace.set_tracer_provider(_Current())
        tracing.install(self._provider, content=content, events=events, hosts=hosts)
        atexit.register(self.shutdown)

    def _is_hosted(self, host: trace.TracerProvider) -> bool:
        if isinstance(host, (trace.ProxyTracerProvider, _Current)):
            return False
        from asmodel import trace_sdk

        return trace_sdk.is_the_sdks(host)

    def _recorder(self, service_name: str, *, shown: bool) -> Recorder:
        exporting: list[BatchSpanProcessor] = []
        receivers: list[Receiver] = []
        names = _exporter_names("TRACES")
        if names or self._others:
            from asmodel import trace_sdk

            if names:
                self._exports = self._exports or trace_sdk.Exports()
                exporting = self._exports.spans(names, service_name)
            receivers = [trace_sdk.Receiver(processor, service_name) for processor in self._others]
        decide, inherits, bounds = None, True, Bounds()
        chosen = os.environ.get("OTEL_TRACES_SAMPLER", "parentbased_always_on").strip().lower()
        if chosen != "parentbased_always_on":
            from asmodel import trace_sdk

            decide, inherits = trace_sdk.sampler(), chosen.startswith("parentbased_")
        if any(name.startswith("OTEL_") and name.endswith("_LIMIT") for name in os.environ):
            from asmodel import trace_sdk

            bounds = trace_sdk.bounds()
        return Recorder(
            keeper=self.local,
            decide=decide,
            inherits=inherits,
            exporting=exporting,
            receivers=receivers,
            beginning=receivers,
            bounds=bounds,
            shown=shown,
        )

    def _events(self, service_name: str) -> tracing.Events | None:
        """Where events with content go: log records, by the variables for logs."""
        from asmodel import trace_sdk

        self._exports = self._exports or trace_sdk.Exports()
        events = self._exports.events(_exporter_names("LOGS"), service_name)
        if events is None:
            log.warning(
                "%s asks for content in events, and no exporter of logs is set: it goes nowhere; on spans "
                "(SPAN_ONLY) it is seen in Jaeger and by `asmodel trace`",
                trace_content.VARIABLE,
            )
        return events

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all spans that have ended are written and sent; False where `timeout` seconds were not enough.

        Blocks, so it is for a thread or a command.
        """
        until = time.monotonic() + timeout
        done = self.local is None or self.local.flush(timeout)
        return (self._exports is None or self._exports.flush(until)) and done

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
        if self._exports is not None:
            done = self._exports.shutdown(until) and done
        for other in self._others:
            other.shutdown()
        return done


def _exporter_names(signal: str) -> list[str]:
    named = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip()
    if not named:
        endpoints = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        return ["otlp"] if any(os.environ.get(name) for name in endpoints) else []
    names = [name.strip().lower() for name in named.split(",")]
    return [name for name in dict.fromkeys(names) if name and name != "none"]


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
        kind: SpanKind = SpanKind.INTERNAL,
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
        kind: SpanKind = SpanKind.INTERNAL,
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
