"""What is measured: every metric with its name and labels, and how what the core tells its meter becomes numbers.

`Metrics` is the meter (meter.py) that keeps numbers. One is made in app.py and passed to whatever records; a record is
an addition in memory (metric_store.py), a microsecond, and never waits. It is read as Prometheus text by `text`, and
sent by OTLP by metric_export.py.

The `gen_ai.*` names follow the OpenTelemetry semantic conventions for generative AI, v1.41 (status Development), with
the buckets they prescribe, `http.*` and `process.*` those for HTTP and processes. What they have no word for is ours,
`asmodel.*`. In Prometheus dots are underscores, and unit and `_total` follow.

A label's value is a name from the settings or of a program, or else from a small list; everything else is "other". So
a client cannot make series, whatever it sends, and no label holds content. Calls that are passed through have no
program, and their step is called as the upstream.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from asmodel.errors import AsmodelError, LimitExceeded
from asmodel.meter import Meter, Timing
from asmodel.metric_store import FOLDER, Family, Instrument, Labels, Names, Numbers, exposition
from asmodel.tracing import OPERATIONS, error_type

if TYPE_CHECKING:
    from types import TracebackType

    from asmodel.calls import CacheMode, Reply, Usage
    from asmodel.metric_export import Exporter, MetricExport
    from asmodel.protocols import Told

OBSERVE_EVERY = 5.0
"""Seconds between two looks at what is not recorded but looked up: memory, files, the troubles of stores."""

_SECONDS = tuple(0.01 * 2**k for k in range(14))
"""The conventions' buckets for durations, 0.01 to 81.92 s."""
_RUN_SECONDS = tuple(0.01 * 2**k for k in range(17))
"""The same, up to 655.36 s: a program makes many calls."""
_TOKENS = tuple(4.0**k for k in range(14))
"""The conventions' buckets for tokens, 1 to 67,108,864."""
_HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The HTTP conventions' buckets."""
_STORE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)

_CALL = (
    "gen_ai.operation.name",
    "gen_ai.provider.name",
    "gen_ai.request.model",
    "server.address",
    "server.port",
    "asmodel.upstream.name",
)

CALL_SECONDS = Family(
    "gen_ai.client.operation.duration",
    "histogram",
    "Calls to models that were really made, with all their attempts.",
    (*_CALL, "error.type"),
    "s",
    _SECONDS,
)
CALL_TOKENS = Family(
    "gen_ai.client.token.usage",
    "histogram",
    "Tokens of one call to a model.",
    (*_CALL, "gen_ai.token.type"),
    "{token}",
    _TOKENS,
)
FIRST_CHUNK = Family(
    "gen_ai.client.operation.time_to_first_chunk",
    "histogram",
    "From a streamed call to its first chunk.",
    _CALL,
    "s",
    _SECONDS,
)
REQUEST_SECONDS = Family(
    "http.server.request.duration",
    "histogram",
    "HTTP requests, from the head to the end of the answer; without a status where the client left before it.",
    ("http.request.method", "url.scheme", "http.route", "http.response.status_code"),
    "s",
    _HTTP_SECONDS,
)
REQUESTS_ACTIVE = Family(
    "http.server.active_requests",
    "gauge",
    "HTTP requests that are being answered.",
    ("http.request.method", "url.scheme"),
    "{request}",
)
STREAMS_OPEN = Family("asmodel.streams.open", "gauge", "Event streams that are being written.", (), "{stream}")
RUNS = Family(
    "asmodel.runs",
    "counter",
    "Runs of programs that have ended: ok, limited (the best answer so far), cancelled, error.",
    ("program", "nested", "outcome", "error.type"),
    "{run}",
)
RUN_SECONDS = Family(
    "asmodel.run.duration", "histogram", "Runs of programs.", ("program", "nested", "outcome"), "s", _RUN_SECONDS
)
RUNS_ACTIVE = Family("asmodel.runs.active", "gauge", "Runs under way, nested ones too.", ("program",), "{run}")
STEPS = Family(
    "asmodel.steps",
    "counter",
    "Steps by how they came by their reply: hit, miss, joined (a call in flight), bypass; or failed, cancelled.",
    ("program", "step", "cache"),
    "{step}",
)
STEPS_AGAIN = Family(
    "asmodel.steps.asked_again",
    "counter",
    "Replies that a step could not read, so that the model was asked again.",
    ("program", "step"),
    "{reply}",
)
TOKENS = Family(
    "asmodel.tokens", "counter", "Tokens bought: input, output.", ("program", "upstream", "type"), "{token}"
)
TOKENS_CACHED = Family(
    "asmodel.tokens.cached",
    "counter",
    "Input tokens that a provider's own cache served; part of asmodel.tokens.",
    ("program", "upstream"),
    "{token}",
)
TOKENS_REASONING = Family(
    "asmodel.tokens.reasoning",
    "counter",
    "Output tokens of reasoning; part of asmodel.tokens.",
    ("program", "upstream"),
    "{token}",
)
COST = Family("asmodel.cost.usd", "counter", "US dollars spent, where the price is known.", ("program", "upstream"))
UNPRICED = Family(
    "asmodel.calls.unpriced",
    "counter",
    "Calls of unknown price, which asmodel.cost.usd leaves out.",
    ("program", "upstream"),
    "{call}",
)
TOKENS_SAVED = Family(
    "asmodel.tokens.saved",
    "counter",
    "Tokens that cache hits would have cost: input, output.",
    ("program", "step", "type"),
    "{token}",
)
COST_SAVED = Family(
    "asmodel.cost.saved.usd", "counter", "US dollars that cache hits would have cost.", ("program", "step")
)
REFUSALS = Family(
    "asmodel.refusals",
    "counter",
    "What a limit stopped or refused, by the limit; runs that returned their best answer so far count too.",
    ("limit", "program"),
    "{refusal}",
)
SLOTS = Family("asmodel.upstream.slots", "gauge", "Calls that may be in flight at once.", ("upstream",), "{call}")
IN_FLIGHT = Family("asmodel.upstream.calls.active", "gauge", "Calls in flight.", ("upstream",), "{call}")
QUEUE_DEPTH = Family("asmodel.upstream.queue.depth", "gauge", "Calls that wait their turn.", ("upstream",), "{call}")
QUEUE_SECONDS = Family(
    "asmodel.upstream.queue.wait",
    "histogram",
    "How long calls waited for their turn; 0 for those that did not.",
    ("upstream",),
    "s",
    _SECONDS,
)
ATTEMPTS = Family(
    "asmodel.upstream.attempts",
    "counter",
    "Attempts at upstreams; without an error where they were answered.",
    ("upstream", "error.type"),
    "{attempt}",
)
RETRIES = Family(
    "asmodel.upstream.retries",
    "counter",
    "Attempts that were made again, by the error that they followed.",
    ("upstream", "error.type"),
    "{attempt}",
)
BACKOFF = Family("asmodel.upstream.backoff", "counter", "Pauses before attempts were made again.", ("upstream",), "s")
FAILOVERS = Family(
    "asmodel.upstream.failovers",
    "counter",
    "Calls that went on to an equal, by the upstream that failed.",
    ("upstream", "error.type"),
    "{call}",
)
FLIGHT_SECONDS = Family(
    "asmodel.flight.wait",
    "histogram",
    "Single-flight joins: how long a step waited for the call of another.",
    ("upstream",),
    "s",
    _SECONDS,
)
STORE_SECONDS = Family(
    "asmodel.cache.operation.duration",
    "histogram",
    "Looks into the step cache (get) and additions to it (set).",
    ("operation",),
    "s",
    _STORE_SECONDS,
)
TROUBLES = Family(
    "asmodel.cache.troubles", "counter", "What went wrong in a store of the cache.", ("store", "kind"), "{trouble}"
)
WORKERS = Family("asmodel.workers", "gauge", "Processes that answer requests.", ("version",), "{process}")
MEMORY = Family(
    "process.memory.usage",
    "gauge",
    "Resident memory; pages that workers share are counted in each.",
    (),
    "By",
    prometheus="process_resident_memory_bytes",
)
CPU = Family(
    "process.cpu.time", "counter", "CPU time, user and system.", (), "s", prometheus="process_cpu_seconds_total"
)
FILES = Family(
    "process.unix.file_descriptor.count",
    "gauge",
    "Open file descriptors.",
    (),
    "{file_descriptor}",
    prometheus="process_open_fds",
)

FAMILIES = tuple(value for value in dict(globals()).values() if isinstance(value, Family))
"""Every metric there is, in the order of this file."""

_GAUGES = frozenset(family.name for family in FAMILIES if family.kind == "gauge")

_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")

log = logging.getLogger("asmodel.metrics")


class _RunTiming(Timing):
    __slots__ = ("_limit", "_metrics", "_nested", "_program", "_started")

    def __init__(self, metrics: Metrics, program: str, nested: bool) -> None:
        self._metrics = metrics
        self._program = program
        self._nested = "true" if nested else "false"
        self._limit = ""
        self._started = time.perf_counter()

    def __enter__(self) -> Timing:
        self._metrics.runs_active.add((self._program,))
        return self

    def limited(self, limit: str) -> None:
        self._limit = limit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        metrics, program = self._metrics, self._program
        outcome, why = "ok", ""
        if error is not None:
            why = _error(error)
            outcome = "cancelled" if why == "cancelled" else "error"
            if isinstance(error, LimitExceeded):
                self._limit = error.param or why
        elif self._limit:
            outcome = "limited"
        metrics.runs_active.add((program,), -1.0)
        metrics.runs.add((program, self._nested, outcome, why))
        metrics.run_seconds.observe((program, self._nested, outcome), time.perf_counter() - self._started)
        # A limit is the outermost run's; the nested ones only pass it on.
        if self._limit and self._nested == "false":
            metrics.refusals.add((self._limit, program))


class _StepTiming(Timing):
    __slots__ = ("_cache", "_metrics", "_program", "_reply", "_step")

    def __init__(self, metrics: Metrics, program: str, step: str) -> None:
        self._metrics = metrics
        self._program = program
        self._step = step
        self._reply: Reply | None = None
        self._cache: CacheMode = "on"

    def replied(self, reply: Reply, *, cache: CacheMode = "on", first_chunk: float | None = None) -> None:
        self._reply = reply
        self._cache = cache

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        reply, metrics, program, step = self._reply, self._metrics, self._program, self._step
        if error is not None:
            metrics.steps.add((program, step, "cancelled" if _error(error) == "cancelled" else "failed"))
            return
        if reply is None:
            return
        result: str = reply.source
        if result == "bought":
            result = "bypass" if self._cache in ("off", "refresh") else "miss"
        metrics.steps.add((program, step, result))
        if result == "hit":
            usage = reply.usage
            metrics.tokens_saved.add((program, step, "input"), usage.prompt_tokens)
            metrics.tokens_saved.add((program, step, "output"), usage.completion_tokens)
            if reply.cost:
                metrics.cost_saved.add((program, step), reply.cost)


class _CallTiming(Timing):
    __slots__ = ("_first", "_labels", "_metrics", "_reply", "_started")

    def __init__(self, metrics: Metrics, labels: Labels) -> None:
        self._metrics = metrics
        self._labels = labels
        self._reply: Reply | None = None
        self._first: float | None = None
        self._started = time.perf_counter()

    def replied(self, reply: Reply, *, cache: CacheMode = "on", first_chunk: float | None = None) -> None:
        self._reply = reply
        self._first = first_chunk

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        metrics, labels, reply = self._metrics, self._labels, self._reply
        why = "" if error is None else _error(error)
        metrics.call_seconds.observe((*labels, why), time.perf_counter() - self._started)
        if reply is not None:
            metrics.call_tokens.observe((*labels, "input"), reply.usage.prompt_tokens)
            if not reply.embeddings:
                metrics.call_tokens.observe((*labels, "output"), reply.usage.completion_tokens)
            if self._first is not None:
                metrics.first_chunk.observe(labels, self._first)


class Through:
    """All that a request that is passed through to one upstream adds to the numbers, where nothing goes wrong.

    It is what `Metrics` would add call by call, at places that are looked up once.
    """

    __slots__ = ("_at_call", "_at_end", "_labels", "_metrics", "_name", "_request", "_route", "_scheme", "_values")

    def __init__(self, metrics: Metrics, upstream: str, route: str, scheme: str = "http") -> None:
        self._metrics = metrics
        self._name = upstream
        self._route = route
        self._scheme = scheme
        self._labels = metrics.labels_of(upstream, "chat")
        self._values = metrics.numbers.values
        # Looked up when they are first needed: a series that was never added to is not shown.
        self._request = -1
        self._at_call: tuple[int, int] = (-1, -1)
        self._at_end: tuple[int, ...] = ()

    def began(self) -> None:
        """A request has come."""
        if self._request < 0:
            self._request = self._metrics.requests_active.place(("POST", self._scheme))
        self._values[self._request] += 1.0

    def called(self, waited: float) -> None:
        """Its call has got a slot, after `waited` seconds."""
        active, queue = self._at_call
        if active < 0:
            active = self._metrics.calls_active.place((self._name,))
            queue = self._metrics.queue_seconds.place((self._name,))
            self._at_call = active, queue
        self._metrics.queue_seconds.observe_at(queue, waited)
        self._values[active] += 1.0

    def left(self) -> None:
        """Its call holds the slot no more."""
        self._values[self._at_call[0]] -= 1.0

    def bought(
        self, told: Told, cost: float | None, seconds: float, first_chunk: float | None, *, at_once: bool
    ) -> None:
        """Its call has been answered after `seconds`; `at_once`, with the first attempt."""
        metrics, name, values = self._metrics, self._name, self._values
        if not self._at_end:
            labels = self._labels
            self._at_end = (
                metrics.attempts.place((name, "")),
                metrics.tokens.place(("", name, "input")),
                metrics.tokens.place(("", name, "output")),
                metrics.steps.place(("", name, "bypass")),
                metrics.call_seconds.place((*labels, "")),
                metrics.call_tokens.place((*labels, "input")),
                metrics.call_tokens.place((*labels, "output")),
            )
        asked, said = told.prompt_tokens, told.completion_tokens
        attempts, tokens_in, tokens_out, steps, took, call_in, call_out = self._at_end
        if at_once:
            values[attempts] += 1.0
        values[tokens_in] += asked
        values[tokens_out] += said
        values[steps] += 1.0
        metrics.call_seconds.observe_at(took, seconds)
        metrics.call_tokens.observe_at(call_in, asked)
        metrics.call_tokens.observe_at(call_out, said)
        if told.cached_tokens:
            metrics.tokens_cached.add(("", name), told.cached_tokens)
        if told.reasoning_tokens:
            metrics.tokens_reasoning.add(("", name), told.reasoning_tokens)
        if cost is None:
            metrics.unpriced.add(("", name))
        else:
            metrics.cost.add(("", name), cost)
        if first_chunk is not None:
            metrics.first_chunk.observe(self._labels, first_chunk)

    def failed(self, error: BaseException, seconds: float) -> None:
        """Its call has come to nothing, all attempts included."""
        metrics, why = self._metrics, _error(error)
        metrics.call_seconds.observe((*self._labels, why), seconds)
        metrics.steps.add(("", self._name, "cancelled" if why == "cancelled" else "failed"))

    def responded(self, status: int, seconds: float) -> None:
        """The request is over; status 0 where the client left before there was one."""
        self._values[self._request] -= 1.0
        self._metrics.responded("POST", self._scheme, self._route, status, seconds)


class Metrics(Meter):
    """A meter that keeps numbers, for itself or, in a server of several processes, where the others can add them up.

    `folder` is what `shared_folder` gave the server's first process. Where it cannot be used, that is logged, and this
    process's metrics are its own. `version` labels the workers.
    """

    def __init__(self, folder: Path | None = None, *, version: str = "") -> None:
        self.numbers = _numbers(folder)
        self._watched: list[tuple[str, Callable[[], Mapping[str, float]]]] = []
        self._calls: dict[tuple[str, str], Labels] = {}
        self._servers: dict[str, tuple[str, ...]] = {}

        self._programs = programs = Names()
        self._upstreams = upstreams = Names()
        self._called = tuple(Names() for _ in range(4))
        # Steps and errors are named by authors, not by clients; still, a name may be made up at run time.
        self._steps = steps = Names(room=200)
        self._routes = Names()
        errors = Names(("cancelled", *_codes(AsmodelError)), room=50)
        limits = Names(("calls", "tokens", "cost", "seconds", "body_bytes", "messages", "n"), room=30)
        nested = Names(("true", "false"))
        outcomes = Names(("ok", "limited", "cancelled", "error"))
        results = Names(("hit", "miss", "joined", "bypass", "failed", "cancelled"))
        types = Names(("input", "output"))
        methods, schemes, statuses = Names(_METHODS), Names(("http", "https")), Names(room=60)
        operations = Names(tuple(OPERATIONS.values()))
        call = (operations, *self._called, upstreams)

        def of(family: Family, *names: Names) -> Instrument:
            return Instrument(self.numbers, family, names)

        self.call_seconds = of(CALL_SECONDS, *call, errors)
        self.call_tokens = of(CALL_TOKENS, *call, types)
        self.first_chunk = of(FIRST_CHUNK, *call)
        self.request_seconds = of(REQUEST_SECONDS, methods, schemes, self._routes, statuses)
        self.requests_active = of(REQUESTS_ACTIVE, methods, schemes)
        self.streams_open = of(STREAMS_OPEN)
        self.runs = of(RUNS, programs, nested, outcomes, errors)
        self.run_seconds = of(RUN_SECONDS, programs, nested, outcomes)
        self.runs_active = of(RUNS_ACTIVE, programs)
        self.steps = of(STEPS, programs, steps, results)
        self.steps_again = of(STEPS_AGAIN, programs, steps)
        self.tokens = of(TOKENS, programs, upstreams, types)
        self.tokens_cached = of(TOKENS_CACHED, programs, upstreams)
        self.tokens_reasoning = of(TOKENS_REASONING, programs, upstreams)
        self.cost = of(COST, programs, upstreams)
        self.unpriced = of(UNPRICED, programs, upstreams)
        self.tokens_saved = of(TOKENS_SAVED, programs, steps, types)
        self.cost_saved = of(COST_SAVED, programs, steps)
        self.refusals = of(REFUSALS, limits, programs)
        self.slots = of(SLOTS, upstreams)
        self.calls_active = of(IN_FLIGHT, upstreams)
        self.queue_depth = of(QUEUE_DEPTH, upstreams)
        self.queue_seconds = of(QUEUE_SECONDS, upstreams)
        self.attempts = of(ATTEMPTS, upstreams, errors)
        self.retries = of(RETRIES, upstreams, errors)
        self.backoff = of(BACKOFF, upstreams)
        self.failovers = of(FAILOVERS, upstreams, errors)
        self.flight_seconds = of(FLIGHT_SECONDS, upstreams)
        self.store_seconds = of(STORE_SECONDS, Names(("get", "set")))
        self.troubles = of(TROUBLES, Names(room=8), Names(room=30))
        self.workers = of(WORKERS, Names((version,)))
        self.memory = of(MEMORY)
        self.cpu = of(CPU)
        self.files = of(FILES)
        self.workers.put((version,), 1.0)

    # What there is

    def knows_program(self, name: str, steps: Iterable[str] = ()) -> None:
        self._programs.add(name)
        self._steps.add(*steps)
        # A counter that begins at 0 shows its first increase, which one that begins at 1 hides.
        self.runs.add((name, "false", "ok", ""), 0.0)
        self.runs_active.add((name,), 0.0)

    def knows_upstream(
        self, name: str, *, provider: str, model: str, address: str | None = None, slots: int | None = None
    ) -> None:
        self._upstreams.add(name)
        self._steps.add(name)
        server = (provider, model, *_host_and_port(address))
        self._servers[name] = server
        for names, value in zip(self._called, server, strict=True):
            names.add(value)
        self.attempts.add((name, ""), 0.0)
        self.calls_active.add((name,), 0.0)
        self.queue_depth.add((name,), 0.0)
        if slots is not None:
            self.slots.put((name,), slots)

    def knows_routes(self, *routes: str) -> None:
        """The routes that requests are told apart by."""
        self._routes.add(*routes)

    def watch(self, store: str, troubles: Callable[[], Mapping[str, float]]) -> None:
        """Have the troubles of a store, by kind and counted up since it was made, looked up with every `observe`."""
        self._watched.append((store, troubles))

    # What happens

    def run(self, program: str, *, nested: bool) -> Timing:
        return _RunTiming(self, program, nested)

    def step(self, program: str, step: str) -> Timing:
        return _StepTiming(self, program, step)

    def asked_again(self, program: str, step: str) -> None:
        self.steps_again.add((program, step))

    def labels_of(self, upstream: str, kind: str) -> Labels:
        """Of a call of that kind."""
        labels = self._calls.get((upstream, kind))
        if labels is None:
            server = self._servers.get(upstream)
            labels = (OPERATIONS.get(kind, kind), *(server or ("", "", "", "")), upstream)
            if server is not None:
                self._calls[upstream, kind] = labels
        return labels

    def call(self, upstream: str, *, kind: str, program: str) -> Timing:
        return _CallTiming(self, self.labels_of(upstream, kind))

    def bought(self, upstream: str, program: str, usage: Usage, cost: float | None) -> None:
        self.tokens.add((program, upstream, "input"), usage.prompt_tokens)
        self.tokens.add((program, upstream, "output"), usage.completion_tokens)
        if usage.cached_tokens:
            self.tokens_cached.add((program, upstream), usage.cached_tokens)
        if usage.reasoning_tokens:
            self.tokens_reasoning.add((program, upstream), usage.reasoning_tokens)
        if cost is None:
            self.unpriced.add((program, upstream))
        else:
            self.cost.add((program, upstream), cost)

    def attempted(self, upstream: str, error: BaseException | None = None) -> None:
        self.attempts.add((upstream, "" if error is None else _error(error)))

    def retried(self, upstream: str, error: BaseException, pause: float) -> None:
        self.retries.add((upstream, _error(error)))
        self.backoff.add((upstream,), pause)

    def failed_over(self, upstream: str, error: BaseException) -> None:
        self.failovers.add((upstream, _error(error)))

    def queued(self, upstream: str, change: int) -> None:
        self.queue_depth.add((upstream,), change)

    def waited(self, upstream: str, seconds: float) -> None:
        self.queue_seconds.observe((upstream,), seconds)

    def in_flight(self, upstream: str, change: int) -> None:
        self.calls_active.add((upstream,), change)

    def joined(self, upstream: str, seconds: float) -> None:
        self.flight_seconds.observe((upstream,), seconds)

    def stored(self, operation: str, seconds: float) -> None:
        self.store_seconds.observe((operation,), seconds)

    def refused(self, limit: str, program: str = "") -> None:
        self.refusals.add((limit, program))

    def requested(self, method: str, scheme: str, change: int) -> None:
        self.requests_active.add((method, scheme), change)

    def streaming(self, change: int) -> None:
        self.streams_open.add((), change)

    def responded(self, method: str, scheme: str, route: str, status: int, seconds: float) -> None:
        self.request_seconds.observe((method, scheme, route, str(status) if status else ""), seconds)

    # What is read

    def observe(self) -> None:
        """Look up what nothing records. Some tens of microseconds of system calls, so in a thread."""
        self.cpu.put((), time.process_time())
        if (memory := _resident_bytes()) is not None:
            self.memory.put((), memory)
        if (files := _open_files()) is not None:
            self.files.put((), files)
        for store, troubles in self._watched:
            for kind, count in troubles().items():
                self.troubles.put((store, kind), count)

    async def observing(self) -> None:
        """Observe every 5 s, until cancelled: by this the other workers know what this one sees."""
        while True:
            await asyncio.to_thread(self.observe)
            await asyncio.sleep(OBSERVE_EVERY)

    def text(self) -> str:
        """The sums over all workers, those that have ended included, as Prometheus text 0.0.4. Reads files."""
        self.observe()
        return exposition(FAMILIES, self.numbers.total(_GAUGES))

    def own(self) -> Iterator[tuple[Family, Labels, Sequence[float]]]:
        """What this process has counted itself, series by series."""
        families = {family.name: family for family in FAMILIES}
        for name, labels, values in self.numbers.own():
            if name in families:
                yield families[name], labels, values

    def close(self) -> None:
        """Leave the counters to whoever goes on with them. What is recorded after it harms nothing."""
        self.observe()
        self.numbers.close()


def _numbers(folder: Path | None) -> Numbers:
    try:
        return Numbers(folder)
    except OSError as error:
        log.warning("the metrics of this process are its own, not summed with the other workers': %s", error)
        return Numbers()


def folder_of_workers(environ: Mapping[str, str]) -> Path | None:
    """The folder that a server's first process has announced in the environment to its workers."""
    return Path(environ[FOLDER]) if environ.get(FOLDER) else None


def exported(metrics: Metrics, environ: Mapping[str, str]) -> MetricExport | None:
    """Begin to send the metrics by OTLP, where the standard variables say so; what it returns is to be shut down.

    They do by `OTEL_METRICS_EXPORTER` (otlp, console, none), or without it by `OTEL_EXPORTER_OTLP_METRICS_ENDPOINT`.
    `OTEL_EXPORTER_OTLP_ENDPOINT` alone does not: Jaeger takes traces there, and refuses metrics.
    """
    named = environ.get("OTEL_METRICS_EXPORTER", "").strip().lower()
    if not named and environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        named = "otlp"
    names = dict.fromkeys(name.strip() for name in named.split(","))
    wanted = [name for name in names if name not in ("", "none", "prometheus")]
    if not wanted or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    from asmodel import metric_export

    exporters: dict[str, Exporter] = {}
    for name in wanted:
        try:
            target, exporter = metric_export.exporter(name)
            exporters[target] = exporter
        except (ValueError, ImportError, OSError) as error:
            log.warning("metrics are not exported by %s: %s", name, error)
    if not exporters:
        return None
    preference = environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "").strip().lower()
    interval = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")
    return metric_export.MetricExport(
        metrics,
        exporters,
        interval=int(interval) / 1e3 if interval.isdecimal() and int(interval) else 60.0,
        delta=preference in ("delta", "lowmemory"),
    )


@asynccontextmanager
async def reporting(metrics: Metrics, environ: Mapping[str, str]) -> AsyncGenerator[None]:
    """Around the life of a server's process: what is looked up is looked up, and what is to be sent is sent."""
    exporting = await asyncio.to_thread(exported, metrics, environ)
    observing = asyncio.create_task(metrics.observing())
    try:
        yield
    finally:
        observing.cancel()
        await asyncio.gather(observing, return_exceptions=True)
        if exporting is not None:
            await asyncio.to_thread(exporting.shutdown)
        await asyncio.to_thread(metrics.close)


def _codes(error: type[AsmodelError]) -> Iterator[str]:
    yield error.code or error.__qualname__
    for kind in error.__subclasses__():
        yield from _codes(kind)


def _error(error: BaseException) -> str:
    name = error_type(error)
    return "cancelled" if name in ("CancelledError", "GeneratorExit", "KeyboardInterrupt") else name


def _host_and_port(address: str | None) -> tuple[str, str]:
    """Host and port of a host, host:port or URL; empty where there is none."""
    try:
        parts = urlsplit(address if address is None or "//" in address else f"//{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "", ""
    port = port or {"https": 443, "http": 80}.get(str(parts.scheme))
    return str(host), "" if port is None else str(port)


def _resident_bytes() -> float | None:
    """This process's resident memory; None where the system does not say (what macOS does say is the peak)."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, ValueError, IndexError), open("/proc/self/statm", "rb") as file:
        return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return None


def _open_files() -> float | None:
    with suppress(OSError):
        # Without the one that is open for the listing itself.
        return float(len(os.listdir("/proc/self/fd" if sys.platform.startswith("linux") else "/dev/fd")) - 1)
    return None
