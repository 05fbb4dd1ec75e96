"""Spans as cheap as they can be: OpenTelemetry's API, and no more than what whoever listens here will read.

The SDK's own spans take ten times as long to be made as these: each is locked, bounded and checked where it is made.
Here that is left to whoever reads a span: the local file's thread (trace_store.py), or an exporter's, which is handed
it as the SDK's own (trace_sdk.py). A `Recorder` is a provider by OpenTelemetry's API, so what a program does to the
current span, or to one that it makes itself, is recorded as well.

A span may be made, added to and ended on any thread. What is said of a span by one thread while another reads it is
seen or not, and never half.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import traceback
from collections.abc import Callable, Generator, Mapping, MutableSequence, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from time import time_ns
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

if TYPE_CHECKING:
    from contextvars import Token
    from types import TracebackType

    from opentelemetry.context import Context
    from opentelemetry.util.types import Attributes

log = logging.getLogger("asmodel.tracing")

FORCED = otel_context.create_key("asmodel-forced")
"""In a context in which every span is exported, whatever the sampler would say."""

# The API has no name for it, and to ask by its functions costs more than all the rest of a span.
CURRENT: str = next(iter(trace.set_span_in_context(trace.INVALID_SPAN, otel_context.Context())))
"""Under which key a context holds the current span."""


class _Asked:
    """Where OpenTelemetry keeps contexts as it was told to: its functions, by the names of a variable's methods."""

    get = staticmethod(otel_context.get_current)
    set = staticmethod(otel_context.attach)
    reset = staticmethod(otel_context.detach)


def _current() -> ContextVar[Context] | _Asked:
    runtime: object = getattr(otel_context, "_RUNTIME_CONTEXT", None)
    variable: object = getattr(runtime, "_current_context", None)
    own = type(runtime) is ContextVarsRuntimeContext and isinstance(variable, ContextVar)
    return cast("ContextVar[Context]", variable) if own else _Asked()


current = _current()
"""The current context. As a rule OpenTelemetry's own variable, which its functions ask through two more of Python."""


def leave(token: Token[Context]) -> None:
    """Make the context current again that was so before `current.set` gave this token."""
    try:
        current.reset(token)
    except ValueError:
        # A generator that was closed by another task: OpenTelemetry logs that, and goes on.
        otel_context.detach(token)


SAMPLED = 0x01
RANDOM = 0x02
"""The flags of W3C Trace Context, level 2."""

_FLAGS = tuple(TraceFlags(flags) for flags in range(256))

_ids = random.Random()
"""Seeded by the system; a program that seeds `random` must not get the ids of its last run again."""
_bits = _ids.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ids.seed)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much one span holds, as the SDK's variables for limits say (OpenTelemetry SDK environment variables, 1.x).

    None is no bound. Of what is too much the oldest goes.
    """

    attributes: int | None = 128
    events: int | None = 128
    links: int | None = 128


class Unit:
    """One request, or whatever else is outermost: all spans under one local root, on their way to the local file."""

    __slots__ = ("fresh", "keeper", "queued", "state")

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.fresh: list[Recorded] = []
        """Spans that have begun, and those that have ended since they were seen open: what there is to be written."""
        self.queued = False
        """Whether the keeper has been told that there is some."""
        self.state: Any = None
        """The keeper's own, used on its thread alone."""


class Keeper(Protocol):
    """Who keeps units: the writer of the local file. Called on any thread; never waits."""

    off: bool
    room: int
    """How many spans more it takes in before its next turn."""

    def take(self, unit: Unit) -> None:
        """There is something fresh in the unit."""
        ...

    def refuse(self) -> None:
        """There was no room for a span."""
        ...


class Ended(Protocol):
    """Who is told of each span that has ended, on the thread that ended it."""

    def on_end(self, span: Any, /) -> None: ...


class Begun(Protocol):
    """Who is told of each span that begins, too."""

    def on_start(self, span: Any, parent_context: Context | None = None) -> None: ...


Decision: TypeAlias = "tuple[bool, Attributes, TraceState | None]"
Decide: TypeAlias = "Callable[[Context, int, str, SpanKind, Attributes, Sequence[Link] | None], Decision]"
"""A sampler: whether a span is exported, the attributes that it begins with, and its trace state."""


class Scope:
    """Whose spans they are: OpenTelemetry's instrumentation scope."""

    __slots__ = ("attributes", "name", "schema_url", "version")

    def __init__(self, name: str, version: str | None, schema_url: str | None, attributes: Attributes) -> None:
        self.name = name
        self.version = version
        self.schema_url = schema_url
        self.attributes = attributes


class Identified(trace.Span):
    """A span that is known by its ids and records nothing: nobody listens. Its children belong to its trace."""

    context_: SpanContext | None = None

    def __init__(self, recorder: Recorder, trace_id: int, span_id: int, flags: int, state: TraceState | None) -> None:
        self.recorder = recorder
        self.trace_id = trace_id
        self.span_id = span_id
        self.flags = flags
        self.trace_state = state

    def get_span_context(self) -> SpanContext:
        context = self.context_
        if context is None:
            context = self.context_ = SpanContext(
                self.trace_id, self.span_id, False, _FLAGS[self.flags], self.trace_state
            )
        return context

    @property
    def context(self) -> SpanContext:
        return self.get_span_context()

    def is_recording(self) -> bool:
        return False

    def end(self, end_time: int | None = None) -> None:
        """Nothing ends."""

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Not recorded; nor is what follows."""

    def set_attribute(self, key: str, value: Any) -> None: ...

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None: ...

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None: ...

    def update_name(self, name: str) -> None: ...

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None: ...

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None: ...


class Recorded(Identified):
    """A span. What it is called by is what the SDK calls it by, so either can be read."""

    # Not set for each: most spans have none of it.
    above: Recorded | None = None
    """The span that it is a child of, if that is one of its unit."""
    parent_: SpanContext | None = None
    parent_id: int = 0
    """0 where it is the root of its trace."""
    unit: Unit | None = None
    end_time: int | None = None
    events: MutableSequence[tuple[str, int, Mapping[str, Any]]] | tuple[()] = ()
    """Name, time, attributes."""
    linked: MutableSequence[Link | tuple[str, str]] | tuple[()] = ()
    """What it refers to; of `refer`, the ids as they were given."""
    code: StatusCode = StatusCode.UNSET
    description: str | None = None
    dropped: tuple[int, int, int] = (0, 0, 0)
    """How many attributes, events and links did not fit."""
    records_exception = True
    sets_status = True
    hex: str = ""
    """The keeper's own: the id in hex."""
    kept: Any = None
    """The keeper's own: the run that it is part of."""
    seen = False
    """Whether the keeper has it, and must be told of its end."""
    written = False
    """Whether its end has been written."""

    def __init__(
        self,
        recorder: Recorder,
        trace_id: int,
        span_id: int,
        flags: int,
        state: TraceState | None,
        name: str,
        kind: SpanKind,
        attributes: dict[str, Any],
        start_time: int,
        scope: Scope,
    ) -> None:
        self.recorder = recorder
        self.trace_id = trace_id
        self.span_id = span_id
        self.flags = flags
        self.trace_state = state
        self.name = name
        self.kind = kind
        self.attributes = attributes
        self.start_time = start_time
        self.scope = scope

    @property
    def parent(self) -> SpanContext | None:
        if self.parent_ is None and self.above is not None:
            self.parent_ = self.above.get_span_context()
        return self.parent_

    @property
    def status(self) -> Status:
        return Status(self.code, self.description)

    def is_recording(self) -> bool:
        return self.end_time is None

    def end(self, end_time: int | None = None) -> None:
        if self.end_time is not None:
            return
        self.end_time = time_ns() if end_time is None else end_time
        if self.seen:
            # Only now: until then it waits to be seen, ended or not.
            unit = self.unit
            if unit is not None:
                unit.fresh.append(self)
                if not unit.queued:
                    unit.queued = True
                    unit.keeper.take(unit)
        recorder = self.recorder
        if recorder.told:
            for receiver in recorder.receivers:
                receiver.on_end(self)
            if self.flags & SAMPLED:
                for receiver in recorder.exporting:
                    receiver.on_end(self)

    def put(self, attributes: Mapping[str, Any]) -> None:
        """As `set_attributes`, of plain values, and few of them: of our own."""
        if self.end_time is None:
            self.attributes.update(attributes)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            self.set_attribute(name, value)

    def set_attribute(self, key: str, value: Any) -> None:
        if self.end_time is not None:
            return
        held = self.attributes
        if type(value) not in _PLAIN:
            value = _cleaned(value)
        held[key] = value
        most = self.recorder.bounds.attributes
        if most is not None and len(held) > most:
            del held[next(iter(held))]
            attributes, events, links = self.dropped
            self.dropped = attributes + 1, events, links

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        if self.end_time is not None:
            return
        if not self.events:
            self.events = []
        events = cast("list[tuple[str, int, Mapping[str, Any]]]", self.events)
        events.append((name, time_ns() if timestamp is None else timestamp, _clean(attributes)))
        most = self.recorder.bounds.events
        if most is not None and len(events) > most:
            del events[0]
            self.dropped = self.dropped[0], self.dropped[1] + 1, self.dropped[2]

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        if self.end_time is None and (context.is_valid or attributes or context.trace_state):
            self._link(Link(context, _clean(attributes)))

    def refer(self, trace_id: str, span_id: str) -> None:
        """Link to the span of these ids, if they are any (hex): whoever reads the span finds out."""
        if self.end_time is None:
            self._link((trace_id, span_id))

    def _link(self, link: Link | tuple[str, str]) -> None:
        if not self.linked:
            self.linked = []
        linked = cast("list[Link | tuple[str, str]]", self.linked)
        linked.append(link)
        most = self.recorder.bounds.links
        if most is not None and len(linked) > most:
            del linked[0]
            self.dropped = self.dropped[0], self.dropped[1], self.dropped[2] + 1

    @property
    def links(self) -> Sequence[Link]:
        found = [link if isinstance(link, Link) else _referred(*link) for link in list(self.linked)]
        return [link for link in found if link is not None]

    def update_name(self, name: str) -> None:
        if self.end_time is None:
            self.name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        if isinstance(status, Status):
            code, description = status.status_code, status.description
        else:
            code = status
        # OK is final, and nothing can be unset (OpenTelemetry specification, trace API, "Set Status").
        if self.end_time is None and self.code is not StatusCode.OK and code is not StatusCode.UNSET:
            self.code = code
            self.description = description if code is StatusCode.ERROR else None

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        # Of a program's own spans: on ours it is never called, for the message may quote a prompt.
        kind = type(exception)
        module = kind.__module__
        said: dict[str, Any] = {
            "exception.type": f"{module}.{kind.__qualname__}" if module and module != "builtins" else kind.__qualname__,
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
            **(attributes or {}),
        }
        self.add_event("exception", said, timestamp)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        if exc_val is not None and self.end_time is None:
            if self.records_exception:
                self.record_exception(exc_val, escaped=True)
            if self.sets_status:
                self.set_status(Status(StatusCode.ERROR, f"{type(exc_val).__name__}: {exc_val}"))
        self.end()


def _referred(trace_id: str, span_id: str) -> Link | None:
    context = remote(trace_id, span_id)
    return None if context is None else Link(context)


def remote(trace_id: str, span_id: str) -> SpanContext | None:
    """The span of these ids, in hex; None where they are none."""
    try:
        context = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=_FLAGS[SAMPLED])
    except (ValueError, TypeError):
        return None
    return context if context.is_valid else None


_PLAIN = frozenset((str, bool, int, float, bytes, type(None)))


def _cleaned(value: object) -> Any:
    """The value as it is now, whatever becomes of a list that its owner goes on with. What is no value is a text."""
    if isinstance(value, (str, bool, int, float, bytes)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(name): _cleaned(item) for name, item in cast("Mapping[object, object]", value).items() if name}
    if isinstance(value, Sequence):
        return tuple(_cleaned(item) for item in cast("Sequence[object]", value))
    return str(value)


def _clean(attributes: Attributes) -> dict[str, Any]:
    return {} if not attributes else {str(n): v if type(v) in _PLAIN else _cleaned(v) for n, v in attributes.items()}


class Recorder(trace.TracerProvider):
    """Makes spans, and hands them to who listens: the keeper of the local file, exporters, and further receivers.

    `decide` is the sampler, which is about export alone: what it leaves out is still kept, and told to receivers. None
    goes by the caller's flag, and has what has no caller exported; with `inherits`, only roots are asked about.
    """

    def __init__(
        self,
        *,
        keeper: Keeper | None = None,
        decide: Decide | None = None,
        inherits: bool = True,
        exporting: Sequence[Ended] = (),
        receivers: Sequence[Ended] = (),
        beginning: Sequence[Begun] = (),
        bounds: Bounds = Bounds(),
        shown: bool = False,
    ) -> None:
        """With `shown`, spans are recorded for the sake of those who ask for what is on the current one."""
        self.keeper = keeper
        self.decide = decide
        self.inherits = inherits
        self.exporting = tuple(exporting)
        self.receivers = tuple(receivers)
        self.beginning = tuple(beginning)
        self.bounds = bounds
        self.told = bool(self.exporting or self.receivers)
        self.records_sampled = keeper is not None or self.told or shown
        self.records_all = keeper is not None
        self._tracers: dict[tuple[object, ...], RecorderTracer] = {}

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> RecorderTracer:
        about = tuple(sorted((attributes or {}).items(), key=lambda pair: pair[0]))
        key = instrumenting_module_name, instrumenting_library_version, schema_url, repr(about)
        found = self._tracers.get(key)
        if found is None:
            scope = Scope(instrumenting_module_name, instrumenting_library_version, schema_url, attributes)
            found = self._tracers[key] = RecorderTracer(self, scope)
        return found


class RecorderTracer(trace.Tracer):
    def __init__(self, recorder: Recorder, scope: Scope) -> None:
        self._recorder = recorder
        self._scope = scope

    def begin(
        self,
        name: str,
        kind: SpanKind,
        attributes: dict[str, Any],
        context: Context,
        start_time: int | None = None,
        links: Sequence[Link] | None = None,
    ) -> Identified:
        """A span whose attributes are plain, and given away; in `context`, whose current span is its parent."""
        recorder = self._recorder
        current = context.get(CURRENT)
        above: Identified | None = None
        foreign: SpanContext | None = None
        # Not by isinstance, which takes a tenth of all this where a class is abstract.
        if type(current) is Recorded or type(current) is Identified:
            above = current
            trace_id, flags, state = above.trace_id, above.flags, above.trace_state
        else:
            foreign = current.get_span_context() if current and isinstance(current, trace.Span) else None
            if foreign is not None and foreign.is_valid:
                trace_id, flags, state = foreign.trace_id, int(foreign.trace_flags), foreign.trace_state
            else:
                foreign, state = None, None
                trace_id, flags = _bits(128) or 1, SAMPLED | RANDOM
        decide = recorder.decide
        if decide is not None and (above is None or not recorder.inherits):
            sampled, started, state = decide(context, trace_id, name, kind, attributes, links)
            flags = flags | SAMPLED if sampled else flags & ~SAMPLED
            if started is not None and started is not attributes:
                attributes = dict(cast("Mapping[str, Any]", started))
        if not flags & SAMPLED and context.get(FORCED):
            flags |= SAMPLED
        if not (recorder.records_sampled if flags & SAMPLED else recorder.records_all):
            return Identified(recorder, trace_id, _bits(64) or 1, flags, state)
        span = Recorded(
            recorder,
            trace_id,
            _bits(64) or 1,
            flags,
            state,
            name,
            kind,
            attributes,
            time_ns() if start_time is None else start_time,
            self._scope,
        )
        keeper = recorder.keeper
        if type(above) is Recorded:
            span.above = above
            span.parent_id = above.span_id
            unit = above.unit
            if keeper is not None and (unit is None or unit.keeper is not keeper):
                # Of another application's trace in this process, or one that found no room.
                unit = None if above.recorder is recorder else Unit(keeper)
                span.parent_ = above.get_span_context()
                span.above = None
        else:
            unit = None if keeper is None else Unit(keeper)
            if above is not None:
                span.parent_ = above.get_span_context()
                span.parent_id = above.span_id
            elif foreign is not None:
                span.parent_ = foreign
                span.parent_id = foreign.span_id
        if unit is not None and keeper is not None and not keeper.off:
            if keeper.room > 0:
                keeper.room -= 1
                span.unit = unit
                unit.fresh.append(span)
                if not unit.queued:
                    unit.queued = True
                    keeper.take(unit)
            else:
                keeper.refuse()
        if links:
            for link in links:
                span.add_link(link.context, link.attributes)
        if recorder.beginning:
            for receiver in recorder.beginning:
                receiver.on_start(span, parent_context=context)
        return span

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
        if context is None:
            context = otel_context.get_current()
        span = self.begin(name, kind, _clean(attributes), context, start_time, links)
        if isinstance(span, Recorded):
            span.records_exception = record_exception
            span.sets_status = set_status_on_exception
        return span

    @contextlib.contextmanager
    def start_as_current_span(  # type: ignore[override]  # a context manager; the API's own also decorates coroutines
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
    ) -> Generator[trace.Span]:
        span = self.start_span(name, context, kind, attributes, links, start_time)
        with trace.use_span(span, end_on_exit, record_exception, set_status_on_exception):
            yield span
