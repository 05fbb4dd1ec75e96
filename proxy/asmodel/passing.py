"""The short way of a request that is passed through: from its connection to its upstream and back, in one go.

Most requests that are passed through ask for nothing that any of the rooms on the long way (chat, service, upstreams)
is for, and what they pay for is to be shown around. `Passage.of` knows them, and nothing has happened by then: whatever
is out of the ordinary goes the long way, which is the one that says what is right. Here the same is done in the same
order, for one upstream that forwards, without a cache and without limits: the same bytes go out and come back, with the
same receipt, spans, numbers and line in the log (tests/test_passing.py holds the two ways to each other).

What goes wrong goes on the long way, too: a first attempt that fails is handed to `Retried`, an error to
`ChatCompletions`, which tell it to whom it concerns.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import orjson
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from pydantic import ValidationError

from asmodel import request_log, tracing, wire
from asmodel.budget import Budget
from asmodel.calls import CachePolicy, Chat, Delta, Message, Reply, Terms
from asmodel.connections import EXTENSION, Cycle
from asmodel.errors import AsmodelError
from asmodel.exchange import REQUEST_ID, Exchange, Gone
from asmodel.ids import new_id
from asmodel.leading import Led
from asmodel.models import ServedUpstream
from asmodel.programs import Answer
from asmodel.progress import Progress
from asmodel.protocols import Forwarded, Forwarding, Told
from asmodel.request_log import RequestLine
from asmodel.service import Asked, Job, Outcome, own_fault
from asmodel.timeouts import Timeouts
from asmodel.trace_spans import CURRENT, Identified, RecorderTracer
from asmodel.upstreams import Cached, Layer, Limited, Metered, Retried, Timed

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from asmodel.access import Access, Caller
    from asmodel.admission import Room
    from asmodel.chat import ChatCompletions
    from asmodel.metrics import Metrics, Through
    from asmodel.protocols import Upstream
    from asmodel.service import Service

PATH = "/v1/chat/completions"

OPENS_AFTER = 1.0
"""Seconds until a stream's 200 is sent, if nothing has been answered by then."""
KEEP_ALIVE_EVERY = 5.0
"""Seconds of silence in a stream before a comment keeps it alive; proxies cut silence from 60 s on."""

_ELSEWHERE = frozenset((b"idempotency-key", b"cache-control", b"x-asmodel-trace", b"origin", b"expect"))
"""Headers that ask for something that is not done here, or that must be looked at with care."""
_OFF = CachePolicy(mode="off")
_NAME = f"POST {PATH}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The onion around one upstream that forwards, as what is looked up nowhere and led by nobody goes through it."""

    metered: Metered
    retried: Retried
    limited: Limited
    timed: Timed
    provider: Forwarding

    @classmethod
    def of(cls, upstream: Upstream) -> Layers | None:
        """None where there are other layers, or there is an upstream that does not forward."""
        found: list[Upstream] = [upstream]
        while isinstance(layer := found[-1], Layer):
            found.append(layer.inner)
        match found:
            case [
                Cached(),
                Metered() as metered,
                Retried() as retried,
                Led(),
                Limited() as limited,
                Timed() as timed,
                at,
            ]:
                if isinstance(at, Forwarding):
                    return cls(metered=metered, retried=retried, limited=limited, timed=timed, provider=at)
            case _:
                pass
        return None


class Way:
    """All that is the same of every request that is passed through to one upstream."""

    __slots__ = (
        "begin",
        "beginnings",
        "layers",
        "model",
        "numbers",
        "price",
        "span",
        "stream",
        "turns",
        "whole",
        "wholes",
    )

    def __init__(self, model: ServedUpstream, layers: Layers, numbers: Through) -> None:
        metered = layers.metered
        self.model = model
        self.layers = layers
        self.numbers = numbers
        self.price = metered.price
        self.turns = layers.limited.turns
        about = "chat", metered.name, metered.provider_name, metered.model, metered.address
        self.whole = tracing.call_attributes(*about, stream=False)
        self.stream = tracing.call_attributes(*about, stream=True)
        self.span = f"chat {metered.model}"
        self.wholes: Timeouts[Request] = Timeouts(layers.timed.whole.seconds, Request.out_of_time)
        self.beginnings: Timeouts[Request] = Timeouts(layers.timed.beginning.seconds, Request.never_begun)


class Speaking(ABC):
    """A stream that is passed on as it comes; while nothing does, its client is told to go on waiting."""

    __slots__ = ("_saying", "_spoke", "opened", "written")

    def __init__(self) -> None:
        self.opened = False
        self.written = False
        """Whether anything of the upstream's has been passed on."""
        self._spoke = 0.0
        self._saying: asyncio.Task[None] | None = None

    @abstractmethod
    async def open(self) -> None:
        """Write the start of the response."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Write more of it."""

    def begin(self) -> None:
        _SPEAKING.begin(self)

    def end(self) -> None:
        _SPEAKING.end(self)
        if self._saying is not None:
            self._saying.cancel()

    async def take(self, data: bytes) -> None:
        """Pass on what has come."""
        if self._saying is not None:
            await self.said()
        if not self.opened:
            self.opened = True
            await self.open()
        self.written = True
        self._spoke = time.monotonic()
        await self.write(data)

    def look(self) -> None:
        """Once a second: whether something should be said that is nobody's, so that the client goes on waiting."""
        if self.opened and time.monotonic() - self._spoke < KEEP_ALIVE_EVERY:
            _SPEAKING.begin(self)
        else:
            self._saying = asyncio.get_running_loop().create_task(self._say())

    async def _say(self) -> None:
        self._spoke = time.monotonic()
        if not self.opened:
            self.opened = True
            await self.open()
        await self.write(wire.KEEP_ALIVE)
        self._saying = None
        _SPEAKING.begin(self)

    async def said(self) -> None:
        """Wait until what is being said has been said: it would come in the middle of what follows."""
        if self._saying is not None:
            await asyncio.wait((self._saying,))


_SPEAKING: Timeouts[Speaking] = Timeouts(OPENS_AFTER, Speaking.look)
"""The streams that are passed through just now."""


class Passage:
    """Knows the requests that can go the short way."""

    def __init__(
        self,
        service: Service,
        access: Access,
        room: Room,
        chat: ChatCompletions,
        metrics: Metrics,
        *,
        messages: int,
        body_bytes: int,
    ) -> None:
        from asmodel.metrics import Through

        self.service = service
        self.access = access
        self.room = room
        self.chat = chat
        self.messages = messages
        self.body_bytes = body_bytes
        self.ways: dict[str, Way] = {}
        if service.passes_straight:
            for name, upstream in service.models.upstreams.items():
                layers = Layers.of(upstream)
                if layers is not None:
                    numbers = Through(metrics, name, PATH)
                    self.ways[name] = Way(ServedUpstream(name=name, upstream=upstream), layers, numbers)

    def awaited(self, scope: Scope) -> Cycle | None:
        """The connection, if it is worth a moment's waiting for the rest of what may go the short way."""
        if not self.ways or scope["path"] != PATH:
            return None
        cycle: object = (scope.get("extensions") or _NOTHING).get(EXTENSION)
        return cycle if type(cycle) is Cycle and cycle.soon else None

    def of(self, scope: Scope, started: float) -> Request | None:
        """The request, if it can go the short way; it came at `started`, by the monotonic clock. Changes nothing."""
        if not self.ways or scope["path"] != PATH or scope["method"] != "POST" or scope["scheme"] != "http":
            return None
        extensions: Mapping[str, Any] = scope.get("extensions") or _NOTHING
        cycle: object = extensions.get(EXTENSION)
        service = self.service
        tracer = tracing.plain()
        if type(cycle) is not Cycle or tracer is None or service.draining or not service.ready.is_set():
            return None
        body = cycle.look()
        if body is None or len(body) > self.body_bytes or not self.room.admits(len(body)):
            return None
        given: list[tuple[bytes, bytes]] = scope["headers"]
        headers = dict(given)
        if (
            len(headers) != len(given)
            or headers.get(b"content-type") != b"application/json"
            or not _ELSEWHERE.isdisjoint(headers)
        ):
            return None
        try:
            sent: Any = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if type(sent) is not dict or "asmodel" in sent:
            return None
        name = cast("wire.Json", sent).get("model")
        way = self.ways.get(name) if type(name) is str else None
        # What an upstream speaks is found out on the long way, once.
        if way is None or not service.verbatim.get(way.model.name):
            return None
        messages = self._messages(cast("wire.Json", sent))
        if messages is None:
            return None
        said = {_text(n): _text(v) for n in (b"host", b"authorization") if (v := headers.get(n)) is not None}
        try:
            caller = self.access.admit(said)
        except AsmodelError:
            return None
        return Request(self, way, cycle, tracer, caller, headers, len(body), cast("wire.Json", sent), messages, started)

    def _messages(self, sent: wire.Json) -> Sequence[Mapping[str, Any]] | None:
        """Those of a request that is right, each as `Message.wire` has it, and asks for one answer."""
        usual = wire.usual(sent)
        if usual is not None:
            return usual if len(usual) <= self.messages else None
        given: Any = sent.get("messages")
        kind: object = given.__class__
        if sent.get("n") not in (None, 1) or (kind is list and len(given) > self.messages):
            return None
        try:
            wire.check_size(sent)
            request = wire.ChatRequest.of(sent)
        except (ValidationError, AsmodelError):
            return None
        return [message.wire() for message in request.conversation]


def _text(value: bytes) -> str:
    return value.decode("latin-1")


class Request(Speaking):
    """One request on the short way."""

    __slots__ = (
        "_budget",
        "_caller",
        "_calls",
        "_cancelling",
        "_clock",
        "_cycle",
        "_data",
        "_first",
        "_gone",
        "_headers",
        "_id",
        "_late",
        "_messages",
        "_passage",
        "_run",
        "_sent",
        "_size",
        "_span",
        "_started",
        "_stream",
        "_task",
        "_tracer",
        "_waited",
        "_way",
    )

    def __init__(
        self,
        passage: Passage,
        way: Way,
        cycle: Cycle,
        tracer: RecorderTracer,
        caller: Caller,
        headers: Mapping[bytes, bytes],
        size: int,
        sent: wire.Json,
        messages: Sequence[Mapping[str, Any]],
        started: float,
    ) -> None:
        super().__init__()
        self._started = started
        self._passage = passage
        self._way = way
        self._cycle = cycle
        self._tracer = tracer
        self._caller = caller
        self._headers = headers
        self._size = size
        self._sent = sent
        self._messages = messages
        self._stream = bool(sent.get("stream"))
        given = headers.get(b"x-request-id")
        known = given is not None and REQUEST_ID.fullmatch(_text(given)) is not None
        self._id = _text(cast("bytes", given)) if known else f"req_{new_id(96)}"
        self._run = f"run_{new_id(64)}"
        self._budget: Budget | None = None
        self._calls = 1
        self._waited = 0.0
        self._first: float | None = None
        self._gone = False
        self._late = ""
        self._data = b""

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        passage, way, cycle = self._passage, self._way, self._cycle
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        way.numbers.began()
        room = passage.room
        room.requests += 1
        room.body_bytes += self._size
        passage.service.begin()
        cycle.take()
        cycle.when_left(self._leave)
        trace = self._headers.get(b"traceparent")
        parent = _NO_PARENT if trace is None else self._parent(trace)
        about = {tracing.HTTP_METHOD: "POST", tracing.HTTP_ROUTE: PATH}
        if not passage.access.open:
            about[tracing.REQUEST_SCOPE] = self._caller.scope
        span = self._span = self._tracer.begin(_NAME, SpanKind.SERVER, about, parent)
        status = 0
        try:
            try:
                if self._stream:
                    await self._streamed(span)
                else:
                    told = await self._told(span)
                    # From here on it is no use to leave.
                    cycle.when_left(None)
                    if cycle.flow.write_paused:
                        await cycle.room()
                    cycle.answer(self._head(span, len(self._data)), self._data)
                    self._ended_well(span, told)
                status = 200
            except BaseException as error:
                status = await self._ended(Exchange(scope, receive, send), span, error)
        finally:
            span.end()
            passage.service.end()
            room.requests -= 1
            room.body_bytes -= self._size
            if self.opened:
                passage.service.meter.streaming(-1)
            way.numbers.responded(status, time.monotonic() - self._started)

    async def _streamed(self, span: Identified) -> None:
        """As `Passing.run`."""
        cycle = self._cycle
        self.begin()
        try:
            told = await self._told(span)
            await self.said()
        except AsmodelError:
            await self.said()
            raise
        finally:
            self.end()
        cycle.when_left(None)
        if not self.opened:
            await self.open()
        data = wire.DONE if self.written else self._unwritten(told)
        if cycle.flow.write_paused:
            await cycle.room()
        cycle.go_on(data, more=False)
        self._ended_well(span, told)

    def _parent(self, trace: bytes) -> Context:
        headers = {"traceparent": _text(trace)}
        if (state := self._headers.get(b"tracestate")) is not None:
            headers["tracestate"] = _text(state)
        return tracing.caller(headers)

    # Whoever ends it before its time.

    def _leave(self) -> None:
        self._gone = True
        self._task.cancel()

    def out_of_time(self) -> None:
        self._late = "finished"
        self._task.cancel()

    def never_begun(self) -> None:
        self._late = "begun"
        self._task.cancel()

    # The call.

    async def _told(self, server: Identified) -> Told:
        """As `Metered.send` and all that is inside of it."""
        way = self._way
        began, clock = time.time_ns(), time.monotonic()
        self._clock = clock
        attributes = dict(way.stream if self._stream else way.whole)
        if len(self._sent) > 2:
            tracing.add_params(attributes, self._params())
        span = self._tracer.begin(way.span, SpanKind.CLIENT, attributes, Context({CURRENT: server}))
        failed: BaseException | None = None
        told: Told | None = None
        try:
            try:
                told = await self._attempt(span)
            except BaseException as error:
                failed = error
            if told is None:
                assert failed is not None
                told = await self._again(span, failed, began, clock)
            seconds = self._waited = time.monotonic() - clock
            first = None if self._first is None else self._first - clock
            cost = None if way.price is None else way.price.of(told.usage)
            tracing.record_told(span, told, way.layers.metered.model, cost, first)
            way.numbers.bought(told, cost, seconds, first, at_once=self._budget is None)
            return told
        except BaseException as error:
            way.numbers.failed(error, time.monotonic() - clock)
            tracing.record_error(span, error)
            raise
        finally:
            failed = None  # It knows this frame.
            span.end()

    async def _attempt(self, span: Identified) -> Told:
        """As `Limited.send` and `Timed.send`."""
        way = self._way
        if way.turns.take():
            way.numbers.called(0.0)
        else:
            await self._turn(span)
        try:
            way.wholes.begin(self)
            provider = way.layers.provider
            if self._stream:
                way.beginnings.begin(self)
                return await provider.forward_stream(self._request(span), self._usage_asked, self.take, self._heard)
            self._data, told = await provider.forward(self._request(span))
            return told
        except asyncio.CancelledError:
            if not self._late or self._task.uncancel() > self._cancelling:
                raise
        finally:
            way.wholes.end(self)
            if self._stream:
                way.beginnings.end(self)
            way.numbers.left()
            way.turns.give()
        bound = way.beginnings if self._late == "begun" else way.wholes
        late, self._late = self._late, ""
        raise way.layers.timed.late(late, bound.seconds)

    async def _turn(self, span: Identified) -> None:
        came = time.monotonic()
        meter, name = self._passage.service.meter, self._way.model.name
        meter.queued(name, 1)
        try:
            await self._way.turns.wait(self._caller.scope, self._run)
        finally:
            meter.queued(name, -1)
            tracing.record_wait(span, "upstream.queue", time.monotonic() - came)
        self._way.numbers.called(time.monotonic() - came)

    async def open(self) -> None:
        self.opened = True
        self._passage.service.meter.streaming(1)
        self._cycle.begin(_STREAM + self._receipt(self._span))

    async def write(self, data: bytes) -> None:
        cycle = self._cycle
        if cycle.flow.write_paused:
            await cycle.room()
        cycle.go_on(data, more=True)

    async def _heard(self, delta: Delta) -> None:
        """The answer has begun."""
        if self._first is None:
            self._first = time.monotonic()
            self._way.beginnings.end(self)

    @property
    def _usage_asked(self) -> bool:
        options = self._sent.get("stream_options")
        return bool(options and options.get("include_usage"))

    def _params(self) -> dict[str, Any]:
        params = wire.passed_on(self._sent)
        if self._stream and (asks := wire.stream_asks(self._sent)):
            params["stream_options"] = asks
        return params

    def _request(self, span: Identified) -> Forwarded:
        return Forwarded(self._params(), self._messages, self._call, lambda: tracing.record_resent(span))

    def _call(self) -> Chat:
        """As the service makes it."""
        params = self._params()
        tools = params.pop("tools", None) or ()
        return Chat(
            identity=self._way.model.upstream.identity,
            messages=self._conversation(),
            params=params,
            tools=tuple(tools),
            draw=None if params.get("temperature") == 0 else "0",
        )

    def _conversation(self) -> tuple[Message, ...]:
        return wire.ChatRequest.of(self._sent).conversation

    async def _again(self, span: Identified, failed: BaseException, began: int, clock: float) -> Told:
        """What follows a first attempt that has failed, on the long way: other attempts, or the error."""
        budget = self._budget = Budget(started=self._started, calls=1)
        budget.ask(clock)
        terms = Terms(
            emit=self._heard if self._stream else None,
            verbatim=self.take if self._stream else self._keep,
            usage_asked=self._usage_asked,
            run_id=self._run,
            step=self._way.model.name,
            scope=self._caller.scope,
            cache=_OFF,
            budget=budget,
            progress=Progress(),
        )
        token = otel_context.attach(Context({CURRENT: span}))
        try:
            return Told.of(await self._way.layers.retried.again(self._call(), terms, failed, began, self._has_begun))
        finally:
            del failed
            otel_context.detach(token)
            budget.asked()

    async def _keep(self, data: bytes) -> None:
        self._data = data

    def _has_begun(self) -> bool:
        return self._first is not None

    # The end.

    def _receipt(self, span: Identified) -> bytes:
        """The receipt as headers, as `Exchange.receipt` has it."""
        elapsed = time.monotonic() - self._started
        budget = self._budget
        calls = 1 if budget is None else budget.calls
        # Of a stream, the call is still being waited for.
        waited = self._waited or time.monotonic() - self._clock
        return (
            f"x-request-id: {self._id}\r\nopenai-processing-ms: {round(elapsed * 1000)}\r\n"
            f"x-asmodel-trace-id: {span.trace_id:032x}\r\nx-asmodel-steps: 0\r\nx-asmodel-cache-hits: 0\r\n"
            f"x-asmodel-upstream-calls: {calls}\r\n"
            f"x-asmodel-overhead-ms: {max(0.0, elapsed - waited) * 1000:.1f}\r\n"
        ).encode("latin-1")

    def _head(self, span: Identified, length: int) -> bytes:
        return b"content-type: application/json\r\ncontent-length: %d\r\n%b" % (length, self._receipt(span))

    def _unwritten(self, told: Told) -> bytes:
        """What an answer comes to of which there were no bytes."""
        from asmodel.chat import as_stream

        reply = Reply(finish=told.finish, usage=told.usage, model=told.model)
        asked = Asked(messages=(), usage_asked=self._usage_asked)
        budget = Budget(usage=told.usage)
        job = Job(id=self._run, model=self._way.model, asked=asked, budget=budget)
        answer = Answer(text="", finish=told.finish)
        chunks = wire.Chunks(
            f"chatcmpl-{new_id(96)}", int(time.time()), self._way.model.name, include_usage=self._usage_asked
        )
        return as_stream(chunks, job, Outcome(answer=answer, reply=reply))

    def _ended_well(self, span: Identified, told: Told) -> None:
        tracing.record_status(span, 200)
        self._log(span, told)

    def _log(self, span: Identified, told: Told) -> None:
        """As `Exchange.log`, of what went well."""
        way = self._way
        seconds = time.monotonic() - self._started
        request_log.write(
            RequestLine(
                method="POST",
                path=PATH,
                status=200,
                outcome="ok",
                seconds=seconds,
                request_id=self._id,
                trace_id=f"{span.trace_id:032x}",
                run_id=self._run,
                model=way.model.name,
                caller=self._caller.name,
                streamed=self._stream,
                steps=0,
                hits=0,
                joined=0,
                calls=1 if self._budget is None else self._budget.calls,
                input_tokens=told.prompt_tokens,
                output_tokens=told.completion_tokens,
                estimated=told.estimated,
                cost=None if way.price is None else way.price.of(told.usage),
                overhead_seconds=max(0.0, seconds - self._waited),
            )
        )

    async def _ended(self, exchange: Exchange, span: Identified, error: BaseException) -> int:
        """Whatever else came of it, told as on the long way; the status that went out."""
        chat = self._passage.chat
        exchange.started = self._started
        exchange.id = self._id
        exchange.span = span
        exchange.caller = self._caller
        exchange.model = self._way.model.name
        budget = self._budget or Budget(started=self._started, calls=1)
        asked = Asked(messages=(), scope=self._caller.scope)
        exchange.job = Job(id=self._run, model=self._way.model, asked=asked, budget=budget, started=self._started)
        if self.opened:
            exchange.status, exchange.streamed = 200, True
            exchange.ended = self._cycle.response_complete
        self._cycle.when_left(None)
        if self._gone and self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            error = Gone()
        elif isinstance(error, Exception) and not isinstance(error, AsmodelError):
            error = own_fault(error)
        token = otel_context.attach(Context({CURRENT: span}))
        try:
            if self.opened and isinstance(error, AsmodelError):
                await exchange.write(wire.event(wire.error_body(error)), last=True)
                tracing.record_error(span, error)
                tracing.record_status(span, 200)
            else:
                await chat.end(exchange, span, error)
        except BaseException as raised:
            tracing.record_error(span, raised)
            raise
        finally:
            exchange.log(chat.word(error))
            otel_context.detach(token)
        return exchange.status


_NO_PARENT = Context()
_NOTHING: Mapping[str, Any] = {}
_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
"""As `Exchange.open_stream` has it."""
