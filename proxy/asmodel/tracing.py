"""Every span that asmodel makes, and the only file that knows an attribute's name.

Names follow the OpenTelemetry semantic conventions for generative AI, v1.41 (status Development), and those for HTTP.
The conventions' next home drops `gen_ai.workflow.name` for `gen_ai.agent.name`, so a program carries both. What they
have no word for is ours: `asmodel.run.*`, `asmodel.step.*`, `asmodel.cache.*`, `asmodel.upstream.*`.

    POST /v1/chat/completions       SERVER    `start_request`; a caller's `traceparent` is its parent
      invoke_workflow NAME          INTERNAL  `run_span`; the root where there is no request
        part NAME                   INTERNAL  `part_span`
        step NAME                   INTERNAL  `step_span`; no `gen_ai.operation.name`, since no convention has a step
          chat MODEL                CLIENT    `call_span`; only where a call is really made, retries and all
            attempt K               INTERNAL  `record_attempts`; only where there was more than one
        execute_tool NAME           INTERNAL  `tool_span`

No span holds content (no prompt, no answer, no stop sequence) unless the variable that `trace_content` reads asks for
it. None ever holds the message of an exception, which may quote either. Content is on the span of the call that was
made; a step that bought nothing has no such span, and carries it itself.

Where spans go is decided by `configure`, which makes its provider the one in use until it is shut down; then the one
before it is in use again. With none, OpenTelemetry's own global provider is asked, which does nothing until a program
that embeds asmodel has set one. This module imports OpenTelemetry's API; the SDK is imported by `configure`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from urllib.parse import urlsplit

import orjson
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from asmodel.calls import CacheMode, Call, Chat, Message, Origin, Reply, Score, ToolCall
from asmodel.errors import AsmodelError
from asmodel.trace_content import LIMIT, Content, Redactor
from asmodel.trace_spans import CURRENT, FORCED, Identified, Recorded, RecorderTracer, current, leave, remote

if TYPE_CHECKING:
    from contextvars import Token
    from pathlib import Path
    from types import TracebackType

    from opentelemetry.util.types import AttributeValue

    from asmodel.budget import Budget
    from asmodel.protocols import Told
    from asmodel.trace_export import Tracing

SCOPE = "asmodel"
SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"

ERROR_TYPE = "error.type"
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
AGENT_NAME = "gen_ai.agent.name"
WORKFLOW_NAME = "gen_ai.workflow.name"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_STREAM = "gen_ai.request.stream"
REQUEST_CHOICES = "gen_ai.request.choice.count"
REQUEST_STOP = "gen_ai.request.stop_sequences"
OUTPUT_TYPE = "gen_ai.output.type"
DIMENSIONS = "gen_ai.embeddings.dimension.count"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_FINISH = "gen_ai.response.finish_reasons"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
TOOL_NAME = "gen_ai.tool.name"
TOOL_TYPE = "gen_ai.tool.type"
TOOL_CALL_ID = "gen_ai.tool.call.id"

SYSTEM_INSTRUCTIONS = "gen_ai.system_instructions"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
TOOL_DEFINITIONS = "gen_ai.tool.definitions"
TOOL_ARGUMENTS = "gen_ai.tool.call.arguments"
TOOL_RESULT = "gen_ai.tool.call.result"
CONTENT = (SYSTEM_INSTRUCTIONS, TOOL_DEFINITIONS, INPUT_MESSAGES, OUTPUT_MESSAGES, TOOL_ARGUMENTS, TOOL_RESULT)
"""Where content is, as JSON, on a span that holds any; in the order in which one reads it."""
DETAILS_EVENT = "gen_ai.client.inference.operation.details"
"""The conventions' event that holds content; a log record."""

RUN_ID = "asmodel.run.id"
RUN_PROGRAM = "asmodel.run.program"
RUN_DIGEST = "asmodel.run.digest"
RUN_NESTED = "asmodel.run.nested"
RUN_PART = "asmodel.run.part"
RUN_PART_OF = "asmodel.run.part.of"
RUN_STEPS = "asmodel.run.steps"
RUN_HITS = "asmodel.run.cache_hits"
RUN_JOINED = "asmodel.run.joined"
RUN_CALLS = "asmodel.run.calls"
RUN_INPUT_TOKENS = "asmodel.run.input_tokens"
RUN_OUTPUT_TOKENS = "asmodel.run.output_tokens"
RUN_COST = "asmodel.run.cost"
RUN_NOTE = "asmodel.run.note"
RUN_LIMITED = "asmodel.run.limited"
CANCELLED = "asmodel.cancelled"
REQUEST_SCOPE = "asmodel.scope"
STEP_NAME = "asmodel.step.name"
STEP_PROGRAM = "asmodel.step.program"
STEP_KIND = "asmodel.step.kind"
STEP_DRAW = "asmodel.step.draw"
STEP_ASKS = "asmodel.step.asks"
STEP_INPUT_TOKENS = "asmodel.step.input_tokens"
STEP_OUTPUT_TOKENS = "asmodel.step.output_tokens"
STEP_COST = "asmodel.step.cost"
CACHE_RESULT = "asmodel.cache.result"
CACHE_PARTS = "asmodel.cache.parts"
CACHE_AGE = "asmodel.cache.age_s"
CACHE_SAVED_TOKENS = "asmodel.cache.saved_tokens"
CACHE_SAVED_COST = "asmodel.cache.saved_cost"
UPSTREAM_NAME = "asmodel.upstream.name"
UPSTREAM_CALL = "asmodel.upstream.call"
UPSTREAM_COST = "asmodel.upstream.cost"
UPSTREAM_ESTIMATED = "asmodel.upstream.usage_estimated"
UPSTREAM_ATTEMPTS = "asmodel.upstream.attempts"
UPSTREAM_ATTEMPT = "asmodel.upstream.attempt"
UPSTREAM_BACKOFF = "asmodel.upstream.backoff_s"
UPSTREAM_RESENT = "asmodel.upstream.resent"
WAIT_EVENT = "asmodel.wait"
WAIT_NAME = "asmodel.wait.name"
WAIT_SECONDS = "asmodel.wait.seconds"
WAIT_SUFFIX = ".wait_s"

OPERATIONS: Mapping[str, str] = {
    "chat": "chat",
    "completion": "text_completion",
    "score": "text_completion",
    "embed": "embeddings",
}
"""A call's kind to the conventions' operation. A score is a text completion that generates nothing."""

_NUMBERS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "seed": "gen_ai.request.seed",
    "dimensions": DIMENSIONS,
}
"""OpenAI's parameter to the conventions' attribute. What is not a number is left out rather than turned into a text."""

_WHOLE = frozenset(("max_tokens", "max_completion_tokens", "seed", "dimensions"))

_W3C = TraceContextTextMapPropagator()
_NO_PARENT = Context()

Events: TypeAlias = "Callable[[Mapping[str, Any]], None]"
"""Where events with content go; called with their attributes while the span that they belong to is current."""

WAIT_LEAST = 0.0001
"""Seconds."""

_STOPPED = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt)
"""Somebody stopped the work; nothing failed."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at an upstream. Times are Unix nanoseconds; `waited` is the back-off before it, in seconds."""

    started_ns: int
    ended_ns: int
    error: BaseException | None = None
    waited: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Using:
    provider: trace.TracerProvider
    content: Content | None
    events: Events | None
    hosts: frozenset[str]


# Those in use, the newest last. OpenTelemetry's own holder can be set once a process, which would tie every app that a
# process builds to the first one. What is asked at every span is kept apart.
_used: list[_Using] = []
_tracer: trace.Tracer | None = None
_content: Content | None = None
_events: Events | None = None
_hosts: frozenset[str] = frozenset()


def install(
    provider: trace.TracerProvider,
    *,
    content: Content | None = None,
    events: Events | None = None,
    hosts: Sequence[str] = (),
) -> None:
    """Make `provider` the one that new spans come from.

    `content` says what of it they may hold; `hosts` are those that are told the trace: `host`, `host:port`, `*.suffix`.
    """
    _used.append(_Using(provider, content, events, frozenset(host.lower() for host in hosts)))
    _use_newest()


def remove(provider: trace.TracerProvider) -> None:
    """Take `provider` out; the newest of those left is in use again. Nothing happens where it is not in."""
    _used[:] = [using for using in _used if using.provider is not provider]
    _use_newest()


def _use_newest() -> None:
    global _tracer, _content, _events, _hosts
    newest = _used[-1] if _used else None
    _tracer = _tracer_of(newest.provider) if newest is not None else None
    _content = newest.content if newest is not None else None
    _events = newest.events if newest is not None else None
    _hosts = newest.hosts if newest is not None else frozenset()
    _may_know.cache_clear()


def installed() -> trace.TracerProvider | None:
    """The provider in use, or None: then OpenTelemetry's global one is asked."""
    return _used[-1].provider if _used else None


def _tracer_of(provider: trace.TracerProvider) -> trace.Tracer:
    return provider.get_tracer(SCOPE, schema_url=SCHEMA_URL)


@functools.cache
def _global_tracer() -> trace.Tracer:
    return trace.get_tracer(SCOPE, schema_url=SCHEMA_URL)


def configure(
    *,
    local: Path | None,
    service_name: str = "asmodel",
    local_runs: int = 1_000,
    redact: Redactor | None = None,
    content_bytes: int = LIMIT,
    hosts: Sequence[str] = (),
) -> Tracing:
    """Send spans where the `OTEL_*` variables say, and keep the last runs in the SQLite file `local`, if one is given.

    Read are the SDK's standard variables. Without `OTEL_TRACES_EXPORTER`, spans are exported (OTLP over HTTP, protobuf)
    only where `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set. The sampler decides about
    export; the local file keeps every run. Where content is captured, each text goes through `redact` first, and an
    attribute holds at most `content_bytes`. `hosts` are told the trace that a call belongs to, and no others. The
    caller shuts down what this returns.
    """
    from asmodel.trace_export import Tracing

    return Tracing(
        local=local,
        service_name=service_name,
        local_runs=local_runs,
        redact=redact,
        content_bytes=content_bytes,
        hosts=hosts,
    )


def plain() -> RecorderTracer | None:
    """Who makes our spans, where these are our own, hold no content and are told to no upstream; else None."""
    tracer = _tracer
    return tracer if type(tracer) is RecorderTracer and _content is None and not _hosts else None


class _Active(AbstractContextManager[Span]):
    """A span that is the current one for a `with` body. A class, since a generator costs twice as much."""

    __slots__ = ("_attributes", "_kind", "_name", "_parent", "_span", "_token")

    _span: Span
    _token: Token[Context] | None

    def __init__(
        self, name: str, kind: SpanKind, attributes: dict[str, AttributeValue], parent: Context | None = None
    ) -> None:
        self._name = name
        self._kind = kind
        self._attributes = attributes
        self._parent = parent

    def __enter__(self) -> Span:
        tracer = _tracer if _tracer is not None else _global_tracer()
        if type(tracer) is RecorderTracer:
            parent = current.get() if self._parent is None else self._parent
            ours = self._span = tracer.begin(self._name, self._kind, self._attributes, parent)
            # Nearly always nothing else is in the context, and then there is nothing to be copied.
            alone = not parent or (len(parent) == 1 and CURRENT in parent)
            context = Context({CURRENT: ours}) if alone else trace.set_span_in_context(ours, parent)
            self._token = current.set(context)
            return ours
        span = tracer.start_span(self._name, self._parent, self._kind, self._attributes)
        self._span = span
        # A span that is not sampled must be current too, or its children would begin traces of their own.
        valid = span.get_span_context().is_valid
        self._token = current.set(trace.set_span_in_context(span, self._parent)) if valid else None
        return span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._token is not None:
            leave(self._token)
        if error is not None:
            record_error(self._span, error)
        self._span.end()


class _Asking(_Active):
    """As `_Active`, with content on the span from its start, so that a run in progress shows what it is asking."""

    __slots__ = ("_shown",)

    _shown: Callable[[], dict[str, AttributeValue]]

    def showing(self, shown: Callable[[], dict[str, AttributeValue]]) -> _Asking:
        self._shown = shown
        return self

    def __enter__(self) -> Span:
        span = super().__enter__()
        if span.is_recording():
            span.set_attributes(self._shown())
        return span


def _put(span: Span, attributes: dict[str, AttributeValue]) -> None:
    """As `set_attributes`, of attributes that need no check, since they are ours."""
    if type(span) is Recorded:
        span.put(attributes)
    else:
        span.set_attributes(attributes)


def start_request(
    method: str, route: str, headers: Mapping[str, str], *, force: bool = False
) -> AbstractContextManager[Span]:
    """The span of one HTTP request. `headers` by lower-case names (or a mapping that does not care).

    Its parent is the W3C `traceparent` that came in; one that cannot be read begins a new trace. Baggage is not read,
    so none can leak onward. With `force`, the request is exported whatever the sampler and the caller's flag say.
    """
    parent = caller(headers)
    if force:
        parent = otel_context.set_value(FORCED, True, parent)
    attributes: dict[str, AttributeValue] = {HTTP_METHOD: method, HTTP_ROUTE: route}
    return _Active(f"{method} {route}", SpanKind.SERVER, attributes, parent)


def caller(headers: Mapping[str, str]) -> Context:
    """Whose trace a request belongs to, by its `traceparent`."""
    return _W3C.extract(headers) if headers.get("traceparent") else _NO_PARENT


def record_response(span: Span, status: int, error: BaseException | None = None) -> None:
    """The status that went out, and why. Only a 5xx makes a server's span an error (HTTP conventions)."""
    if not span.is_recording():
        return
    span.set_attribute(HTTP_STATUS, status)
    if error is not None:
        span.set_attribute(ERROR_TYPE, error_type(error))
    elif status >= 500:
        span.set_attribute(ERROR_TYPE, str(status))
    if status >= 500:
        span.set_status(StatusCode.ERROR)


def record_scope(span: Span, scope: str) -> None:
    """Whose request it is: the holder of its key, where the server wants keys."""
    span.set_attribute(REQUEST_SCOPE, scope)


def record_status(span: Identified, status: int) -> None:
    """As `record_response`, of what went well."""
    if type(span) is Recorded:
        span.put({HTTP_STATUS: status})


def record_left(span: Span) -> None:
    """The client left before its answer was whole: nothing failed."""
    span.set_attribute(CANCELLED, True)


def run_span(program: str, *, digest: str | None, run_id: str, nested: bool) -> AbstractContextManager[Span]:
    """One run of a program. `digest` is of its source; `nested` where another program asked for it."""
    attributes: dict[str, AttributeValue] = {
        OPERATION: "invoke_workflow",
        WORKFLOW_NAME: program,
        AGENT_NAME: program,
        RUN_ID: run_id,
        RUN_PROGRAM: program,
        RUN_NESTED: nested,
    }
    if digest is not None:
        attributes[RUN_DIGEST] = digest
    return _Active(f"invoke_workflow {program}", SpanKind.INTERNAL, attributes)


def record_run(span: Span, budget: Budget) -> None:
    """What the whole run came to. For the outermost run, whose budget it is."""
    if not span.is_recording():
        return
    attributes: dict[str, AttributeValue] = {
        RUN_STEPS: budget.steps,
        RUN_HITS: budget.hits,
        RUN_JOINED: budget.joined,
        RUN_CALLS: budget.calls,
        RUN_INPUT_TOKENS: budget.usage.prompt_tokens,
        RUN_OUTPUT_TOKENS: budget.usage.completion_tokens,
    }
    if budget.cost is not None:
        attributes[RUN_COST] = budget.cost
    _put(span, attributes)


def record_limited(span: Span, error: AsmodelError) -> None:
    """A limit ended the run, and its best answer so far is what it returned: no failure, and not the whole either."""
    span.set_attribute(RUN_LIMITED, error.param or error_type(error))


def record_asked(span: Span, messages: Sequence[Message]) -> None:
    """What a run was asked, where content is captured."""
    if _content is not None and _content.on_spans and span.is_recording():
        span.set_attribute(INPUT_MESSAGES, _content.messages(messages))


def record_answer(span: Span, text: str, finish: str, tool_calls: Sequence[ToolCall] = ()) -> None:
    """What a run answered, where content is captured."""
    if _content is not None and _content.on_spans and span.is_recording():
        span.set_attribute(OUTPUT_MESSAGES, _content.answer(text, finish, tool_calls))


def record_notes(span: Span, facts: Mapping[str, float | Sequence[float]]) -> None:
    """An author's own numbers on the span of a run. Raises TypeError for anything else: a trace holds no content."""
    for name, value in facts.items():
        numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError(f"a note holds numbers only; {name} holds something else")
        # Of one type: OpenTelemetry takes no mixed sequence.
        alike = len({type(number) for number in numbers}) <= 1
        plain = numbers if alike else tuple(float(cast("float", number)) for number in numbers)
        noted = plain if isinstance(value, Sequence) else plain[0]
        span.set_attribute(f"{RUN_NOTE}.{name}", cast("AttributeValue", noted))


def step_span(step: str, *, program: str, kind: str, draw: str | None) -> AbstractContextManager[Span]:
    """One call of a step, cached or not. `kind` is the call's: chat, completion, score, embed."""
    attributes: dict[str, AttributeValue] = {STEP_NAME: step, STEP_PROGRAM: program, STEP_KIND: kind}
    if draw is not None:
        attributes[STEP_DRAW] = draw
    return _Active(f"step {step}", SpanKind.INTERNAL, attributes)


def record_step(span: Span, reply: Reply, *, asks: int, cache: CacheMode = "on", call: Call | None = None) -> None:
    """How the step came by its reply. `asks` is 1 and one more for each time it was asked again; `cache` is the policy.

    A reply that somebody else paid for is linked to the span that did. There is no span of a call then, so what was
    shown and said is here, where content is captured and `call` is given.
    """
    if not span.is_recording():
        return
    usage = reply.usage
    attributes: dict[str, AttributeValue] = {STEP_ASKS: asks}
    if reply.source == "bought":
        attributes[CACHE_RESULT] = "bypass" if cache in ("off", "refresh") else "miss"
        attributes[STEP_INPUT_TOKENS] = usage.prompt_tokens
        attributes[STEP_OUTPUT_TOKENS] = usage.completion_tokens
        if reply.cost is not None:
            attributes[STEP_COST] = reply.cost
        _put(span, attributes)
        return
    attributes[CACHE_RESULT] = reply.source
    attributes[CACHE_SAVED_TOKENS] = usage.total_tokens
    if reply.cost is not None:
        attributes[CACHE_SAVED_COST] = reply.cost
    if reply.source == "hit" and reply.bought_at:
        attributes[CACHE_AGE] = round(max(0.0, time.time() - reply.bought_at), 3)
    _put(span, attributes)
    if call is not None and _content is not None and _content.on_spans:
        span.set_attributes({**_asked(_content, call), **_answered(_content, call, reply)})
    if reply.origin is None:
        return
    # The ids come out of a store that others may have written to.
    if type(span) is Recorded:
        span.refer(reply.origin.trace_id, reply.origin.span_id)
    elif (payer := remote(reply.origin.trace_id, reply.origin.span_id)) is not None:
        span.add_link(payer)


def call_span(
    call: Call, *, upstream: str, provider: str, model: str, address: str | None, stream: bool
) -> AbstractContextManager[Span]:
    """One call that is really made, with all its attempts.

    `upstream` is its name in the settings, `provider` a value of `gen_ai.provider.name`, `address` its host, host:port
    or URL.
    """
    attributes = call_attributes(call.kind, upstream, provider, model, address, stream=stream)
    operation = OPERATIONS[call.kind]
    if isinstance(call, Chat) and call.schema is not None:
        attributes[OUTPUT_TYPE] = "json"
    if not isinstance(call, Score):
        add_params(attributes, call.params)
    if _content is None or not _content.on_spans:
        return _Active(f"{operation} {model}", SpanKind.CLIENT, attributes)
    shown = functools.partial(_asked, _content, call)
    return _Asking(f"{operation} {model}", SpanKind.CLIENT, attributes).showing(shown)


def call_attributes(
    kind: str, upstream: str, provider: str, model: str, address: str | None, *, stream: bool
) -> dict[str, AttributeValue]:
    """What is the same of all spans of calls of one kind of an upstream."""
    attributes: dict[str, AttributeValue] = {
        OPERATION: OPERATIONS[kind],
        PROVIDER: provider,
        REQUEST_MODEL: model,
        UPSTREAM_NAME: upstream,
        UPSTREAM_CALL: kind,
    }
    if address:
        attributes |= _server(address)
    if stream:
        attributes[REQUEST_STREAM] = True
    return attributes


def _asked(content: Content, call: Call) -> dict[str, AttributeValue]:
    system, messages, tools = content.asked(call)
    attributes: dict[str, AttributeValue] = {INPUT_MESSAGES: messages}
    if system is not None:
        attributes[SYSTEM_INSTRUCTIONS] = system
    if tools is not None:
        attributes[TOOL_DEFINITIONS] = tools
    stop = None if isinstance(call, Score) else call.params.get("stop")
    if stop:
        # The client's own words, as they may be; the conventions do not count them as content.
        stops = (stop,) if isinstance(stop, str) else cast("Sequence[object]", stop)
        attributes[REQUEST_STOP] = tuple(content.text("stop", str(one)) for one in stops)
    return attributes


def _answered(content: Content, call: Call, reply: Reply) -> dict[str, AttributeValue]:
    said = content.answered(call, reply)
    return {} if said is None else {OUTPUT_MESSAGES: said}


def add_params(attributes: dict[str, AttributeValue], params: Mapping[str, Any]) -> None:
    """The sampling parameters that the conventions have an attribute for."""
    for name, value in params.items():
        attribute = _NUMBERS.get(name)
        if attribute is not None:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                # The conventions want a double where a value may have a fraction, whatever an author wrote.
                attributes[attribute] = value if name in _WHOLE else float(value)
        elif name == "n" and value != 1 and isinstance(value, int):
            attributes[REQUEST_CHOICES] = value


@functools.lru_cache(maxsize=256)
def _server(address: str) -> Mapping[str, AttributeValue]:
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return {}
    if not host:
        return {}
    port = port or {"https": 443, "http": 80}.get(parts.scheme)
    return {SERVER_ADDRESS: host} if port is None else {SERVER_ADDRESS: host, SERVER_PORT: port}


def record_reply(span: Span, reply: Reply, *, first_delta: float | None, call: Call | None = None) -> None:
    """What the upstream answered. `first_delta` in seconds from the start of the call, where it was streamed.

    Where content is captured and `call` is given, what the upstream said is on the span, in an event, or both.
    """
    if not span.is_recording():
        return
    usage = reply.usage
    attributes: dict[str, AttributeValue] = {INPUT_TOKENS: usage.prompt_tokens}
    if not reply.embeddings:
        attributes[OUTPUT_TOKENS] = usage.completion_tokens
        attributes[RESPONSE_FINISH] = (reply.finish,)
    if usage.cached_tokens:
        attributes[CACHE_READ_TOKENS] = usage.cached_tokens
    if usage.reasoning_tokens:
        attributes[REASONING_TOKENS] = usage.reasoning_tokens
    if usage.estimated:
        attributes[UPSTREAM_ESTIMATED] = True
    if reply.model:
        attributes[RESPONSE_MODEL] = reply.model
    if reply.cost is not None:
        attributes[UPSTREAM_COST] = reply.cost
    if first_delta is not None:
        attributes[FIRST_CHUNK] = first_delta
    if _content is not None and call is not None:
        said = _answered(_content, call, reply)
        if _content.in_events and _events is not None:
            of_span: Mapping[str, Any] = getattr(span, "attributes", None) or {}
            _events({**of_span, **attributes, **_asked(_content, call), **said})
        if _content.on_spans:
            attributes |= said
    _put(span, attributes)


def record_told(span: Identified, told: Told, model: str, cost: float | None, first_delta: float | None) -> None:
    """As `record_reply`, of an answer that is passed on as it came; `model` is who is asked."""
    if type(span) is not Recorded:
        return
    attributes: dict[str, AttributeValue] = {
        INPUT_TOKENS: told.prompt_tokens,
        OUTPUT_TOKENS: told.completion_tokens,
        RESPONSE_FINISH: (told.finish,),
    }
    if told.cached_tokens:
        attributes[CACHE_READ_TOKENS] = told.cached_tokens
    if told.reasoning_tokens:
        attributes[REASONING_TOKENS] = told.reasoning_tokens
    if told.estimated:
        attributes[UPSTREAM_ESTIMATED] = True
    attributes[RESPONSE_MODEL] = told.model or model
    if cost is not None:
        attributes[UPSTREAM_COST] = cost
    if first_delta is not None:
        attributes[FIRST_CHUNK] = first_delta
    span.put(attributes)


def record_attempts(span: Span, attempts: Sequence[Attempt]) -> None:
    """How a call was tried, once it is over: a child for each try, where there was more than one."""
    if len(attempts) < 2 or not span.is_recording():
        return
    span.set_attributes({UPSTREAM_ATTEMPTS: len(attempts), UPSTREAM_BACKOFF: round(sum(a.waited for a in attempts), 6)})
    tracer = _tracer if _tracer is not None else _global_tracer()
    parent = trace.set_span_in_context(span)
    for number, attempt in enumerate(attempts, start=1):
        attributes: dict[str, AttributeValue] = {UPSTREAM_ATTEMPT: number}
        if attempt.waited:
            attributes[UPSTREAM_BACKOFF] = attempt.waited
        child = tracer.start_span(
            f"attempt {number}", parent, SpanKind.INTERNAL, attributes, start_time=attempt.started_ns
        )
        if attempt.error is not None:
            record_error(child, attempt.error)
        child.end(end_time=max(attempt.started_ns, attempt.ended_ns))


def record_resent(span: Span | None = None) -> None:
    """A call was sent once more within one attempt: its connection was closed before there was an answer.

    `span` is the call's, by default the current one.
    """
    if span is None:
        span = trace.get_current_span()
    if span.is_recording():
        so_far: Mapping[str, Any] = getattr(span, "attributes", None) or {}
        span.set_attribute(UPSTREAM_RESENT, so_far.get(UPSTREAM_RESENT, 0) + 1)


def record_wait(span: Span, name: str, seconds: float) -> None:
    """Time spent waiting for something other than the model, so that a span's time adds up.

    `name` says for what, and in whose family: `cache.flight`, `upstream.limit`; without a dot it is the upstream's.
    Waits of one name add up in `asmodel.NAME.wait_s`; each is an event as well. One that is shorter than a span takes
    to be made is left out.
    """
    if seconds < WAIT_LEAST or not span.is_recording():
        return
    name = name if "." in name else f"upstream.{name}"
    attribute = f"asmodel.{name}{WAIT_SUFFIX}"
    so_far: Mapping[str, Any] = getattr(span, "attributes", None) or {}
    span.set_attribute(attribute, round(so_far.get(attribute, 0.0) + seconds, 6))
    span.add_event(WAIT_EVENT, {WAIT_NAME: name, WAIT_SECONDS: seconds})


class waiting(AbstractContextManager[None]):
    """Around a wait: `record_wait` on the span that is current when it begins, however the wait ends."""

    __slots__ = ("_began", "_context", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        # Which span that is can be asked later: most waits are over before they are worth it.
        self._context = current.get()
        self._began = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._began
        if seconds >= WAIT_LEAST:
            record_wait(trace.get_current_span(self._context), self._name, seconds)


def record_waited(name: str, began: float) -> None:
    """A wait since `began`, of the monotonic clock, is over: as `waiting` around it, where the current span is still
    the one that it began with."""
    seconds = time.monotonic() - began
    if seconds >= WAIT_LEAST:
        record_wait(trace.get_current_span(), name, seconds)


def tool_span(
    name: str, *, call_id: str | None, arguments: Mapping[str, object] | None = None
) -> AbstractContextManager[Span]:
    """One call of a program's own tool. `call_id` is the model's, where a model asked for it.

    `arguments` are on the span where content is captured.
    """
    attributes: dict[str, AttributeValue] = {OPERATION: "execute_tool", TOOL_NAME: name, TOOL_TYPE: "function"}
    if call_id is not None:
        attributes[TOOL_CALL_ID] = call_id
    content = _content
    if content is None or not content.on_spans or arguments is None:
        return _Active(f"execute_tool {name}", SpanKind.INTERNAL, attributes)
    asking = _Asking(f"execute_tool {name}", SpanKind.INTERNAL, attributes)
    return asking.showing(lambda: {TOOL_ARGUMENTS: content.value("tool.arguments", arguments)})


def record_tool(span: Span, result: object) -> None:
    """What a tool returned, where content is captured."""
    if _content is not None and _content.on_spans and span.is_recording():
        span.set_attribute(TOOL_RESULT, _content.value("tool.result", result))


def part_span(name: str, *, of: int | None) -> AbstractContextManager[Span]:
    """A part of a run that its author named; `of` says how many steps it expects to take."""
    attributes: dict[str, AttributeValue] = {RUN_PART: name}
    if of is not None:
        attributes[RUN_PART_OF] = of
    return _Active(f"part {name}", SpanKind.INTERNAL, attributes)


def record_parts(span: Span, parts: Mapping[str, str]) -> None:
    """The fingerprint of a call that is bought; of a step that is asked again, of what it asked first."""
    so_far: Mapping[str, Any] = getattr(span, "attributes", None) or {}
    if span.is_recording() and CACHE_PARTS not in so_far:
        span.set_attribute(CACHE_PARTS, orjson.dumps(parts).decode())


def record_error(span: Span, error: BaseException) -> None:
    """Mark the span as failed, by the kind of error alone; or as cancelled, which is no failure."""
    if not span.is_recording():
        return
    error = _cause(error)
    if isinstance(error, _STOPPED):
        span.set_attribute(CANCELLED, True)
        return
    span.set_attribute(ERROR_TYPE, error_type(error))
    span.set_status(StatusCode.ERROR)


def error_type(error: BaseException) -> str:
    """The `code` of an error of ours, otherwise the name of its class."""
    error = _cause(error)
    return error.code if isinstance(error, AsmodelError) and error.code else type(error).__qualname__


def _cause(error: BaseException) -> BaseException:
    """What a task group failed of: of several errors, the first that is not just a task being stopped."""
    while isinstance(error, BaseExceptionGroup):
        errors = cast("BaseExceptionGroup[BaseException]", error).exceptions  # isinstance tells nothing of its contents
        error = next((e for e in errors if not isinstance(e, _STOPPED)), errors[0])
    return error


def origin(span: Span) -> Origin | None:
    """The ids of a span that pays for a reply, to be kept with the reply; None where nothing is recorded."""
    if not span.is_recording():
        return None
    if type(span) is Recorded:
        return Origin(f"{span.trace_id:032x}", f"{span.span_id:016x}")
    ids = span.get_span_context()
    return Origin(trace.format_trace_id(ids.trace_id), trace.format_span_id(ids.span_id))


def trace_id(span: Span) -> str:
    """The trace's id, 32 hex digits; empty where there is none."""
    if type(span) is Recorded or type(span) is Identified:
        return f"{span.trace_id:032x}"
    ids = span.get_span_context()
    return trace.format_trace_id(ids.trace_id) if ids.is_valid else ""


def outgoing(url: str) -> Mapping[str, str]:
    """The headers that tell an upstream which trace its call belongs to: none unless its host may know."""
    if not _hosts or not _may_know(url):
        return {}
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier


@functools.lru_cache(maxsize=256)
def _may_know(url: str) -> bool:
    server = _server(url)
    host, port = str(server.get(SERVER_ADDRESS, "")).lower(), server.get(SERVER_PORT)
    if not host:
        return False
    above = host.split(".")
    names = {host, f"{host}:{port}", *(f"*.{'.'.join(above[i:])}" for i in range(1, len(above)))}
    return not names.isdisjoint(_hosts)
