"""A real Jaeger v2 in a process of its own: built from source once and kept, started for a test, and asked.

`jaeger/` beside this file is a Go module of ours that names Jaeger and pins everything it is made of. What is built is
kept with the other environments (see `environments`), under a name that says of which sources. Jaeger's modules have
no page in them, only its receivers, its store and its queries. `python -m tests.e2e.jaeger` builds it, starts it and
says where it is.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

from tests.e2e import golang
from tests.serving import PATIENCE, eventually

MODULE = Path(__file__).with_name("jaeger")
PACKAGE = "github.com/jaegertracing/jaeger/cmd/jaeger"
VERSION = "v2.13.0"
"""What the tag in go.mod is also called: Jaeger v2 has v1 tags as a module, since its path has no /v2."""


# ---- built once ----


def binary() -> Path:
    """Jaeger, built first if it is not there. Raises EnvironmentUnavailable."""
    version = f"-X github.com/jaegertracing/jaeger/internal/version.latestVersion={VERSION}"
    return golang.binary(MODULE, PACKAGE, "jaeger", version=VERSION, ldflags=version)


# ---- what it was told ----


@dataclass(frozen=True)
class Span:
    """One span, as Jaeger gives it back."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty for one that has no parent."""
    name: str
    kind: str
    """`SERVER`, `CLIENT`, `INTERNAL`, …"""
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    scope: str
    links: Sequence[tuple[str, str]]
    """Trace and span ids."""
    events: Sequence[str]
    status: str
    """`UNSET`, `OK` or `ERROR`."""
    message: str
    started_ns: int
    ended_ns: int


@dataclass(frozen=True)
class Trace:
    """All spans of one trace, by when they began."""

    spans: Sequence[Span]

    @property
    def root(self) -> Span:
        """The one span whose parent is not in the trace; fails where there are several, since those are orphans."""
        here = {span.span_id for span in self.spans}
        roots = [span for span in self.spans if span.parent_id not in here]
        assert len(roots) == 1, f"not one root: {[span.name for span in roots]}"
        return roots[0]

    def children(self, of: Span) -> list[Span]:
        return [span for span in self.spans if span.parent_id == of.span_id]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        found = self.named(name)
        assert len(found) == 1, f"{len(found)} spans are named {name!r}, of {sorted(s.name for s in self.spans)}"
        return found[0]

    @property
    def tree(self) -> str:
        """Names only, two spaces a level; equal siblings are counted, and siblings stand in the order of their text."""
        return "\n".join(self._lines(self.root))

    def _lines(self, span: Span) -> list[str]:
        drawn = sorted("\n".join(self._lines(child)) for child in self.children(span))
        lines = [span.name]
        for text in dict.fromkeys(drawn):
            first, *rest = text.split("\n")
            count = drawn.count(text)
            lines += ["  " + (f"{count} x {first}" if count > 1 else first), *("  " + line for line in rest)]
        return lines


# ---- a process ----


class Jaeger:
    """One Jaeger with its store in memory, on ports of 127.0.0.1 that are chosen when this is made, not when it starts.

    So a test can name where Jaeger will be, and start it later or not at all.
    """

    def __init__(self, folder: Path, *, page: Path | None = None) -> None:
        """`page` is a folder with Jaeger's page, built elsewhere."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._page = page
        self._process: subprocess.Popen[bytes] | None = None
        self._otlp_http, self._otlp_grpc, self._query, self._query_grpc, self._health = _free_ports(5)
        self.otlp_http = f"http://127.0.0.1:{self._otlp_http}"
        """For `OTEL_EXPORTER_OTLP_ENDPOINT` with `http/protobuf`."""
        self.otlp_grpc = f"http://127.0.0.1:{self._otlp_grpc}"
        """The same with `grpc`."""
        self.address = f"http://127.0.0.1:{self._query}"

    def start(self) -> Jaeger:
        """Returns once it takes spans and answers queries."""
        # Built before the clock runs.
        program = binary()
        config = self._folder / "config.yaml"
        config.write_text(json.dumps(self._config(), indent=1))  # JSON is YAML
        with (self._folder / "jaeger.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(program), "--config", str(config)],
                cwd=self._folder,
                env={"HOME": str(self._folder), "PATH": os.environ.get("PATH", os.defpath)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            eventually("Jaeger is ready", self._ready, 30.0)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)

    def __enter__(self) -> Jaeger:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def said(self) -> str:
        return (self._folder / "jaeger.log").read_text(errors="replace")

    def _config(self) -> dict[str, Any]:
        def at(port: int) -> dict[str, Any]:
            return {"endpoint": f"127.0.0.1:{port}"}

        query: dict[str, Any] = {
            "storage": {"traces": "here"},
            "enable_tracing": False,  # of itself, to an address of its own choice
            "http": at(self._query),
            "grpc": at(self._query_grpc),
        }
        if self._page is not None:
            query["ui"] = {"assets_path": str(self._page)}
        return {
            "service": {
                "extensions": ["jaeger_storage", "jaeger_query", "healthcheckv2"],
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
                "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
            },
            "extensions": {
                "jaeger_storage": {"backends": {"here": {"memory": {"max_traces": 10_000}}}},
                "jaeger_query": query,
                "healthcheckv2": {"use_v2": True, "http": at(self._health)},
            },
            "receivers": {"otlp": {"protocols": {"http": at(self._otlp_http), "grpc": at(self._otlp_grpc)}}},
            "exporters": {"jaeger_storage_exporter": {"trace_storage": "here"}},
        }

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"Jaeger ended with {self._process.returncode}:\n{self.said}"
        try:
            return _get(self._health, "/status")[0] == 200 and _get(self._query, "/api/v3/services")[0] == 200
        except OSError:
            return False

    # -- queries, all by the stable API

    def services(self) -> list[str]:
        found: list[str] = self._asked("/api/v3/services")["services"]
        return found

    def operations(self, service: str) -> set[tuple[str, str]]:
        """Names and kinds (lower case) of spans."""
        found = self._asked("/api/v3/operations", service=service)["operations"]
        return {(operation["name"], operation.get("spanKind", "")) for operation in found}

    def search(self, service: str, operation: str = "", **more: object) -> dict[str, Trace]:
        """Trace id -> trace, of those of the last hour with a span of that service and, if given, of that name."""
        now = time.time()
        query: dict[str, object] = {
            "service_name": service,
            "start_time_min": _rfc3339(now - 3_600),
            "start_time_max": _rfc3339(now + 60),
            "num_traces": 1_000,
            **more,
        }
        if operation:
            query["operation_name"] = operation
        found = self._asked("/api/v3/traces", **{f"query.{name}": value for name, value in query.items()})
        return _traces(found)

    def trace(self, trace_id: str, spans: int = 1) -> Trace | None:
        """The trace as it is by now; None where nothing of it has come in, or less than so many spans."""
        found = _traces(self._asked(f"/api/v3/traces/{trace_id}")).get(trace_id)
        return found if found is not None and len(found.spans) >= spans else None

    def whole(self, trace_id: str) -> Trace:
        """The trace, once its request's span is in, which ends last."""

        def complete() -> Trace | None:
            found = self.trace(trace_id)
            return found if found is not None and any(span.kind == "SERVER" for span in found.spans) else None

        trace: Trace = eventually(f"Jaeger has the trace {trace_id}", complete)
        return trace

    def raw(self, trace_id: str) -> str:
        """All that Jaeger says about the trace, as it says it."""
        return _get(self._query, f"/api/v3/traces/{trace_id}")[1].decode()

    def _asked(self, path: str, **parameters: object) -> Any:
        status, body = _get(self._query, f"{path}?{urlencode(parameters)}" if parameters else path)
        if status == 404:
            return {}
        assert status == 200, f"{path}: {status} {body[:500]!r}"
        return json.loads(body)


def _get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ---- OTLP's JSON ----


def _traces(answer: Mapping[str, Any]) -> dict[str, Trace]:
    by_trace: dict[str, list[Span]] = {}
    for resource in _all(answer.get("result", {}), "resourceSpans"):
        of = _attributes(resource.get("resource", {}))
        for scope in _all(resource, "scopeSpans"):
            for span in _all(scope, "spans"):
                read = _span(span, of, scope.get("scope", {}).get("name", ""))
                by_trace.setdefault(read.trace_id, []).append(read)
    return {name: Trace(sorted(spans, key=lambda span: span.started_ns)) for name, spans in by_trace.items()}


def _span(span: Mapping[str, Any], resource: Mapping[str, Any], scope: str) -> Span:
    status: Mapping[str, Any] = span.get("status", {})
    kind: int = span.get("kind", 0)
    code: int = status.get("code", 0)
    return Span(
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_id=span.get("parentSpanId") or "",
        name=span["name"],
        kind=_KINDS[kind],
        attributes=_attributes(span),
        resource=resource,
        scope=scope,
        links=[(link["traceId"], link["spanId"]) for link in _all(span, "links")],
        events=[event["name"] for event in _all(span, "events")],
        status=_STATUS[code],
        message=status.get("message", ""),
        started_ns=int(span["startTimeUnixNano"]),
        ended_ns=int(span["endTimeUnixNano"]),
    )


_KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
_STATUS = ("UNSET", "OK", "ERROR")


def _all(of: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    # What is empty is left out.
    found: list[dict[str, Any]] = of.get(name, [])
    return found


def _attributes(of: Mapping[str, Any]) -> dict[str, Any]:
    return {each["key"]: _value(each["value"]) for each in _all(of, "attributes")}


def _value(value: Mapping[str, Any]) -> Any:
    ((kind, given),) = value.items()
    match kind:
        case "intValue":
            return int(given)
        case "doubleValue":
            return float(given)  # JSON writes 1.0 as 1
        case "arrayValue":
            return [_value(each) for each in _all(given, "values")]
        case _:
            return given


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="asmodel-jaeger-") as folder, Jaeger(Path(folder)) as jaeger:
        print(f"OTEL_EXPORTER_OTLP_ENDPOINT={jaeger.otlp_http} (over gRPC: {jaeger.otlp_grpc})")
        print(f"queries: {jaeger.address}/api/v3/services", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
