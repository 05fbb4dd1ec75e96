"""Metrics sent by OTLP, where the `OTEL_*` variables say so; the only part of the metrics that knows the SDK.

Imported only if they do, because the SDK and its exporter take a tenth of a second to import. A thread sends what this
process has counted itself every `OTEL_METRIC_EXPORT_INTERVAL` (60 s), as a service instance of its own: the receiver
adds the workers up. A collector that is down costs a request nothing, and the log one line.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    ConsoleMetricExporter,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from asmodel.tracing import SCHEMA_URL, SCOPE

if TYPE_CHECKING:
    from asmodel.metric_store import Family, Labels
    from asmodel.metrics import Metrics

_WHOLE = frozenset(("server.port", "http.response.status_code"))
"""Attributes that the conventions want as numbers."""

_NOISY = "opentelemetry.exporter.otlp"
"""Loggers that write a line for each retry and each batch that is lost. Exporters of traces use some of them too."""

_THREAD = "asmodel-metrics"

log = logging.getLogger("asmodel.metrics")


class Exporter(Protocol):
    """What is asked of an exporter of the SDK, whose own types are not all given."""

    def export(self, metrics_data: MetricsData, /) -> MetricExportResult: ...

    def shutdown(self) -> None: ...


class MetricExport:
    """Sends metrics until it is shut down. `exporters` by what the log is to call their targets."""

    def __init__(
        self,
        metrics: Metrics,
        exporters: Mapping[str, Exporter],
        *,
        interval: float,
        delta: bool = False,
        service_name: str = "asmodel",
    ) -> None:
        """`interval` in seconds; `delta` sends increases of counters instead of their sums."""
        self._metrics = metrics
        self._exporters = dict(exporters)
        self._delta = delta
        self._resource = _resource(service_name)
        self._began = self._last = time.time_ns()
        self._sent: dict[tuple[str, Labels], Sequence[float]] = {}
        self._down: set[str] = set()
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._interval = interval
        # A filter of a logger is not asked for its children's records, so each existing child gets it.
        known = [name for name in list(logging.Logger.manager.loggerDict) if name.startswith(_NOISY)]
        self._noisy = [logging.getLogger(name) for name in dict.fromkeys([_NOISY, *known])]
        for logger in self._noisy:
            # First, so that nobody else's filter takes our outage for its own.
            logger.filters.insert(0, _silence)
        self._thread = threading.Thread(target=self._send_on, daemon=True, name=_THREAD)
        self._thread.start()

    def _send_on(self) -> None:
        while not self._stop.wait(self._interval):
            self.send()

    def send(self) -> None:
        """Send what has been counted so far. Blocks, up to the exporter's own timeout."""
        with self._turn:
            data = self._data()
            for target, exporter in self._exporters.items():
                try:
                    done = exporter.export(data) is MetricExportResult.SUCCESS
                    reason = "not accepted"
                except Exception as error:  # the thread must live on, whatever a transport raises
                    done, reason = False, type(error).__name__
                self._tell(target, done, reason)

    def _tell(self, target: str, done: bool, reason: str) -> None:
        if done and target in self._down:
            self._down.discard(target)
            log.info("metrics are delivered to %s again", target)
        elif not done and target not in self._down:
            self._down.add(target)
            log.warning(
                "metrics are not delivered to %s (%s); requests are not affected, and this is said once until it "
                "works again",
                target,
                reason,
            )

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Send once more, and stop; False where `timeout` seconds were not enough. Blocks."""
        if self._stop.is_set():
            return True
        self._stop.set()
        until = time.monotonic() + timeout
        sent = _bounded(self.send, timeout)
        for exporter in self._exporters.values():
            # Also what ends the back-off of an exporter whose collector does not answer.
            _bounded(exporter.shutdown, max(0.5, until - time.monotonic()))
        self._thread.join(max(0.5, until - time.monotonic()))
        for logger in self._noisy:
            logger.removeFilter(_silence)
        return sent

    def _data(self) -> MetricsData:
        self._metrics.observe()
        now = time.time_ns()
        points: dict[str, tuple[Family, list[Any]]] = {}
        for family, labels, values in self._metrics.own():
            if not any(values) and family.kind != "gauge":
                continue
            delta = self._delta and family.kind != "gauge"
            if delta:
                before = self._sent.get((family.name, labels))
                self._sent[family.name, labels] = values
                if before is not None:
                    values = [a - b for a, b in zip(values, before, strict=True)]
                    if not any(values):
                        continue
            start = self._last if delta else self._began
            points.setdefault(family.name, (family, []))[1].append(_point(family, labels, values, start, now))
        self._last = now
        scope = InstrumentationScope(SCOPE, schema_url=SCHEMA_URL)
        metrics = [self._metric(family, found) for family, found in points.values()]
        return MetricsData([ResourceMetrics(self._resource, [ScopeMetrics(scope, metrics, SCHEMA_URL)], "")])

    def _metric(self, family: Family, points: list[Any]) -> Metric:
        temporality = AggregationTemporality.DELTA if self._delta else AggregationTemporality.CUMULATIVE
        if family.kind == "histogram":
            data: Sum | Histogram = Histogram(points, temporality)
        elif family.kind == "counter":
            data = Sum(points, temporality, is_monotonic=True)
        else:
            # Of what goes up and down the conventions make sums, so that instances add up.
            data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=False)
        return Metric(family.name, family.help, family.unit, data)


def _point(
    family: Family, labels: Labels, values: Sequence[float], start: int, now: int
) -> NumberDataPoint | HistogramDataPoint:
    attributes: dict[str, str | int] = {}
    for key, value in zip(family.labels, labels, strict=True):
        if value:
            attributes[key] = int(value) if key in _WHOLE and value.isdecimal() else value
    if family.kind != "histogram":
        return NumberDataPoint(attributes, start, now, values[0])
    counts = [int(count) for count in values[:-1]]
    # Nobody keeps the lowest and highest value, and OTLP does not ask for them; the SDK's type does.
    nothing = cast("float", None)
    return HistogramDataPoint(
        attributes, start, now, sum(counts), values[-1], counts, family.bounds, min=nothing, max=nothing
    )


def _silence(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or not (record.threadName or "").startswith(_THREAD)


def _bounded(work: Callable[[], object], seconds: float) -> bool:
    thread = threading.Thread(target=work, daemon=True, name=f"{_THREAD}-end")
    thread.start()
    thread.join(seconds)
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
            log.debug("asmodel runs from a source tree that is not installed: metrics carry no version")
    if SERVICE_INSTANCE_ID not in resource.attributes:
        # Else the sums of several workers would be taken for one that jumps to and fro.
        ours[SERVICE_INSTANCE_ID] = str(uuid.uuid4())
    return resource.merge(Resource(ours))


def exporter(name: str) -> tuple[str, Exporter]:
    """What the log is to call its target, and the exporter of that name. Raises ValueError or ImportError."""
    if name == "console":
        # Not standard output: that is where `asmodel run` prints its answer.
        return "the console", ConsoleMetricExporter(out=sys.stderr)
    if name != "otlp":
        raise ValueError(
            "OTEL_METRICS_EXPORTER takes otlp, console, prometheus (which is /metrics, always on) and none"
        )
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    if protocol == "grpc":
        try:
            module: Any = importlib.import_module("opentelemetry.exporter.otlp.proto.grpc.metric_exporter")
        except ImportError as error:
            raise ImportError(
                "OTEL_EXPORTER_OTLP_PROTOCOL=grpc needs the package opentelemetry-exporter-otlp-proto-grpc; "
                "http/protobuf (port 4318) needs nothing more"
            ) from error
        made: Exporter = module.OTLPMetricExporter()
    elif protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        made = OTLPMetricExporter()
    else:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL takes http/protobuf and grpc, not {protocol!r}")
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    # Neither user, password nor query: they may be keys.
    parts = urlsplit(endpoint or "")
    return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or "the OTLP collector", made
