"""A kept trace as OTLP JSON, which collectors, Jaeger's upload and other tools take.

The encoding is that of OTLP 1.x for JSON over HTTP: ids as hex digits, 64-bit integers as texts, enumerations as
numbers, names in lowerCamelCase. One object that could be the body of a `POST /v1/traces`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from asmodel import tracing as names
from asmodel.trace_reader import Node, Trace
from asmodel.trace_time import last, walk

INCOMPLETE = "asmodel.incomplete"
"""On a span that has not ended: OTLP has no word for it, so it ends with the last thing that is known of its trace."""

_KINDS = {"internal": 1, "server": 2, "client": 3, "producer": 4, "consumer": 5}
_ERROR = 2


def otlp(trace: Trace, *, service_name: str = "asmodel") -> dict[str, Any]:
    """The trace as the JSON of an ExportTraceServiceRequest."""
    ends = last(trace)
    resource: dict[str, Any] = {"service.name": service_name}
    with contextlib.suppress(PackageNotFoundError):  # a source tree that is not installed
        resource["service.version"] = version("asmodel")
    spans = [_span(node, trace.trace_id, ends) for node in walk(trace.roots)]
    scope = {"scope": {"name": names.SCOPE}, "spans": spans, "schemaUrl": names.SCHEMA_URL}
    return {"resourceSpans": [{"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}]}


def _span(node: Node, trace_id: str, ends: int) -> dict[str, Any]:
    attributes = dict(node.attributes)
    end = node.end_ns
    if end is None:
        attributes[INCOMPLETE] = True
        end = max(node.start_ns, ends)
    body: dict[str, Any] = {"traceId": trace_id, "spanId": node.span_id}
    if node.parent_id is not None:
        body["parentSpanId"] = node.parent_id
    body |= {
        "name": node.name,
        "kind": _KINDS.get(node.kind, 0),
        "startTimeUnixNano": str(node.start_ns),
        "endTimeUnixNano": str(end),
        "attributes": _attributes(attributes),
        "status": {"code": _ERROR} if node.failed else {},
    }
    if node.events:
        body["events"] = [
            {"timeUnixNano": str(event.time_ns), "name": event.name, "attributes": _attributes(event.attributes)}
            for event in node.events
        ]
    if node.links:
        body["links"] = [
            {"traceId": link.trace_id, "spanId": link.span_id, "attributes": _attributes(link.attributes)}
            for link in node.links
        ]
    return body


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in attributes.items()]


def _value(value: object) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, (list, tuple)):
        return {"arrayValue": {"values": [_value(item) for item in cast("Sequence[object]", value)]}}
    if isinstance(value, Mapping):
        pairs = _attributes(cast("Mapping[str, Any]", value))
        return {"kvlistValue": {"values": pairs}}
    return {}
