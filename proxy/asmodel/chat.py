"""`POST /v1/chat/completions`: a request read, answered, and written as one completion or as a stream of chunks."""

from __future__ import annotations

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from opentelemetry.trace import Span
from starlette.types import Receive, Scope, Send

from asmodel import tracing, wire
from asmodel.access import Access
from asmodel.answering import Answering, Joined
from asmodel.budget import Limits
from asmodel.calls import CachePolicy, Delta
from asmodel.errors import AsmodelError, InvalidRequest, PayloadTooLarge, ProgramError
from asmodel.exchange import Exchange, Gone
from asmodel.gathering import gather
from asmodel.ids import new_id
from asmodel.models import Model, ServedProgram
from asmodel.passing import KEEP_ALIVE_EVERY, OPENS_AFTER, Speaking
from asmodel.progress import Told
from asmodel.service import Asked, Job, Outcome, Service, stopping

LINES_A_SECOND = 5
"""How many lines of progress at most."""


def cache_policy(header: str, asked: wire.Extension) -> CachePolicy | None:
    """What the request says of the cache: the body's `asmodel.cache` before the header (RFC 9111, section 5.2.1)."""
    if asked.cache is not None:
        return CachePolicy(mode=asked.cache)
    if not header:
        return None
    said: dict[str, str] = {}
    for directive in header.lower().split(","):
        name, _, value = directive.partition("=")
        said[name.strip()] = value.strip().strip('"')
    max_age: float | None = None
    if "max-age" in said:
        if not re.fullmatch(r"[0-9]{1,15}", said["max-age"]):
            raise InvalidRequest("the Cache-Control header's max-age should be whole seconds")
        max_age = float(said["max-age"])
    if "no-store" in said:
        return CachePolicy(mode="off")
    if "only-if-cached" in said:
        return CachePolicy(mode="only", max_age=max_age)
    if "no-cache" in said or max_age == 0:
        return CachePolicy(mode="refresh")
    return None if max_age is None else CachePolicy(max_age=max_age)


_NO_LIMITS = Limits()


def limits_of(asked: wire.Extension) -> Limits:
    given = asked.limits
    if given is None:
        return _NO_LIMITS
    return Limits(calls=given.calls, tokens=given.tokens, cost=given.cost, seconds=given.seconds)


class Request(Protocol):
    """What every request for a model says."""

    @property
    def model(self) -> str: ...
    @property
    def n(self) -> int | None: ...
    @property
    def stream(self) -> bool | None: ...
    @property
    def asmodel(self) -> wire.Extension: ...


R = TypeVar("R", bound=Request)


class Asking(ABC, Generic[R]):
    """A route by which a model is asked, as an ASGI application; what its requests and answers look like is its own."""

    path: ClassVar[str]

    def __init__(
        self,
        service: Service,
        access: Access,
        *,
        body_bytes: int = 20_000_000,
        messages: int = 2048,
        n: int = 16,
        progress: bool = True,
        grace: float = 60.0,
        keep: float = 600.0,
    ) -> None:
        self._service = service
        self._access = access
        self._grace = grace
        self._joined = Joined(keep=keep)
        self._body_bytes = body_bytes
        self._messages = messages
        self._n = n
        self._progress = progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        self._service.begin()
        try:
            with tracing.start_request(
                "POST", self.path, exchange.headers, force=self._access.may_force(exchange.headers)
            ) as span:
                exchange.span = span
                await self._answered(exchange, span)
        finally:
            self._service.end()

    async def _answered(self, exchange: Exchange, span: Span) -> None:
        outcome = "ok"
        try:
            outcome = await self._handle(exchange)
            tracing.record_response(span, exchange.status)
        except (Gone, AsmodelError, asyncio.CancelledError) as error:
            outcome = self.word(error)
            await self.end(exchange, span, error)
        finally:
            exchange.log(outcome)

    def word(self, error: BaseException) -> str:
        """For the line of a request that has ended with the error."""
        if isinstance(error, Gone):
            return "left"
        if isinstance(error, AsmodelError):
            return error.code or "error"
        return "cut off" if self._service.draining else "ok"

    async def end(self, exchange: Exchange, span: Span, error: BaseException) -> None:
        """Tell the client, where it is still there, and the span how the request has ended; or raise the error."""
        if isinstance(error, Gone):
            tracing.record_left(span)
            return
        if isinstance(error, AsmodelError):
            if isinstance(error, PayloadTooLarge):
                self._service.meter.refused("body_bytes")
            tracing.record_response(span, error.status, error)
            await exchange.refuse(error, receipt(exchange, exchange.job, []) if exchange.job else None)
            return
        if not self._service.draining:
            raise error
        # The time that running requests had to end is over; their clients are told, and come again.
        tracing.record_response(span, exchange.status or 503, stopping())
        tracing.record_error(span, stopping())
        # Unless it reads nothing, and so cannot be told.
        await _within(exchange.break_off(stopping()), 1.0)

    async def _handle(self, exchange: Exchange) -> str:
        headers = exchange.headers
        exchange.admit(self._access)
        kind = headers.get("content-type", "")
        if kind != "application/json" and kind.partition(";")[0].strip().lower() != "application/json":
            raise InvalidRequest("the body should be sent as `Content-Type: application/json`")
        body = await exchange.body(self._body_bytes)
        try:
            request = await self._read(exchange, body)
        except wire.TooManyMessages:
            self._service.meter.refused("messages")
            raise
        try:
            return await self._answer(exchange, request, body)
        finally:
            exchange.when_left(None)

    async def close(self) -> None:
        """End the runs that go on for clients who may come back."""
        await self._joined.close()

    @abstractmethod
    async def _read(self, exchange: Exchange, body: bytes) -> R:
        """Raises InvalidRequest."""

    @abstractmethod
    def _asked(self, exchange: Exchange, request: R, model: Model, body: bytes) -> Asked:
        """What it asks of the model. Raises InvalidRequest where that is nothing for such a model."""

    @abstractmethod
    async def _body(
        self, exchange: Exchange, request: R, job: Job, id: str, created: int, outcomes: list[Outcome]
    ) -> wire.Json:
        """A whole answer."""

    @abstractmethod
    def _chunks(self, exchange: Exchange, job: Job, id: str, created: int) -> wire.Chunks:
        """How the parts of an answer are written."""

    def _stream(self, exchange: Exchange, request: R, answering: Answering, *, progress: bool) -> Stream:
        """An answer that is written as it comes."""
        chunks = self._chunks(exchange, answering.job, answering.id, answering.created)
        return Stream(exchange, answering, chunks, progress=progress)

    async def _answer(self, exchange: Exchange, request: R, body: bytes) -> str:
        exchange.model = request.model
        self._check(request)
        model = self._service.models.find(request.model)
        asked = self._asked(exchange, request, model, body)
        if asked.identity is not None:
            answering = await self._joining(exchange, asked, model, body, stream=bool(request.stream))
        else:
            with exchange.present():
                job = exchange.job = await self._service.prepare(model, asked)
                passes = await self._service.passes_on(job)
                if not request.stream:
                    # Nobody else can ask for this run, so it is done here and ends with this request.
                    return await self._at_once(exchange, request, job, passes=passes)
                if passes and await self._service.only_passes_on(job):
                    return await Passing(exchange, self._service, job, self._chunks).run()
            answering = Answering(self._service, job, stream=True)
        job = exchange.job = answering.job
        if request.stream:
            progress = self._progress if request.asmodel.progress is None else request.asmodel.progress
            told = progress and isinstance(model, ServedProgram)
            return await self._stream(exchange, request, answering, progress=told).run()
        async with answering.listening(_nothing):
            with exchange.present():
                await asyncio.wait((answering.task,))
        passed = b"".join(e for e in answering.events if isinstance(e, bytes)) if answering.verbatim else None
        outcomes = answering.outcomes()
        return await self._whole(exchange, request, answering.job, answering.id, answering.created, outcomes, passed)

    async def _joining(self, exchange: Exchange, asked: Asked, model: Model, body: bytes, *, stream: bool) -> Answering:
        """The run that the request's Idempotency-Key names, begun by this request or by an equal one."""
        assert asked.identity is not None
        found = self._joined.find(asked.scope, asked.identity, body)
        if found is None:
            with exchange.present():
                job = exchange.job = await self._service.prepare(model, asked)
            # Asked again, for another may have come first while this one was being prepared.
            found = self._joined.find(asked.scope, asked.identity, body)
            if found is None:
                found = Answering(self._service, job, stream=stream, grace=self._grace)
                self._joined.add(asked.scope, asked.identity, body, found)
        return found

    def _check(self, request: R) -> None:
        if request.n is not None and request.n > self._n:
            self._service.meter.refused("n")
            raise InvalidRequest(f"`n`: at most {self._n}, not {request.n}", param="n")

    async def _at_once(self, exchange: Exchange, request: R, job: Job, *, passes: bool) -> str:
        created = int(time.time())
        passed: list[bytes] = []

        async def take(data: bytes) -> None:
            passed.append(data)

        answer, choices = self._service.answer, range(job.asked.n)
        try:
            if passes:
                outcomes = [await answer(job, 0, verbatim=take)]
                if not passed and len(choices) > 1:
                    # An equal has answered that does not speak OpenAI's format, and gives one choice at a time.
                    outcomes += await gather(answer(job, choice) for choice in choices[1:])
            elif len(choices) == 1:
                outcomes = [await answer(job, 0)]
            else:
                outcomes = await gather(answer(job, choice) for choice in choices)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # It waited for something that it had itself cancelled.
            raise ProgramError(f'"{job.model.name}" has cancelled itself') from None
        # From here on it is no use to leave.
        exchange.when_left(_nothing)
        id = f"chatcmpl-{new_id(96)}"
        return await self._whole(exchange, request, job, id, created, outcomes, b"".join(passed) if passed else None)

    async def _whole(
        self,
        exchange: Exchange,
        request: R,
        job: Job,
        id: str,
        created: int,
        outcomes: list[Outcome],
        passed: bytes | None,
    ) -> str:
        if passed is not None:
            await exchange.send(200, passed)
            return "ok"
        await exchange.respond(200, await self._body(exchange, request, job, id, created, outcomes))
        await _delivered(exchange, job)
        return "ok"


class ChatCompletions(Asking[wire.ChatRequest]):
    """`POST /v1/chat/completions`."""

    path = "/v1/chat/completions"

    async def _read(self, exchange: Exchange, body: bytes) -> wire.ChatRequest:
        return wire.read_chat(body, messages=self._messages)

    def _asked(self, exchange: Exchange, request: wire.ChatRequest, model: Model, body: bytes) -> Asked:
        return asked_of(exchange, request, model, body)

    async def _body(
        self,
        exchange: Exchange,
        request: wire.ChatRequest,
        job: Job,
        id: str,
        created: int,
        outcomes: list[Outcome],
    ) -> wire.Json:
        choices = [wire.choice(i, o.answer, o.reply) for i, o in enumerate(outcomes)]
        told = receipt(exchange, job, outcomes)
        return wire.completion(id, created, exchange.model, choices, tokens(job, outcomes), told)

    def _chunks(self, exchange: Exchange, job: Job, id: str, created: int) -> wire.Chunks:
        return wire.Chunks(id, created, exchange.model, include_usage=job.asked.usage_asked)


def asked_of(exchange: Exchange, request: wire.ChatRequest, model: Model, body: bytes) -> Asked:
    """What a chat completion asks of the model. Raises InvalidRequest where that is nothing for such a model."""
    headers, extension = exchange.headers, request.asmodel
    program = isinstance(model, ServedProgram)
    ignored: list[str] = []
    if isinstance(model, ServedProgram):
        wire.refuse_unsupported(request, model.program)
        hints, shape, ignored = wire.split(request, model.program)
    else:
        hints, shape = request.passed_on, {}
    return Asked(
        messages=request.conversation,
        documents=request.texts if program else (),
        hints=hints,
        shape=shape,
        params=extension.params,
        roles=extension.roles,
        limits=limits_of(extension),
        cache=cache_policy(exchange.all_of("cache-control") if "cache-control" in headers else "", extension),
        scope=exchange.caller.scope,
        n=request.n or 1,
        stream_asks=request.stream_asks if request.stream and not program else {},
        ignored=tuple(ignored),
        usage_asked=bool(request.stream_options and request.stream_options.include_usage),
        identity=identity(headers),
        retry=headers.get("x-stainless-retry-count", "0").strip() not in ("", "0"),
        body=body,
    )


async def _delivered(exchange: Exchange, job: Job) -> None:
    """All of it has been sent, and the client was there."""
    if job.delivery is not None and not exchange.left:
        await job.delivery.whole()


def _nothing() -> None:
    """For listeners who wait for the end alone."""


def identity(headers: Mapping[str, str]) -> str | None:
    """The client's own name for its request, of any characters that a header may have; at most 255 of them."""
    given: str | None = headers.get("idempotency-key")
    if given is not None and not 0 < len(given) <= 255:
        raise InvalidRequest("the Idempotency-Key should have 1 to 255 characters", param="Idempotency-Key")
    return given


def tokens(job: Job, outcomes: list[Outcome]) -> wire.Json:
    """What was bought for this request. Of a program, what is not in its answer is reasoning."""
    bought = job.budget.usage
    if not isinstance(job.model, ServedProgram):
        return wire.usage(bought)
    shown = 0
    for outcome in outcomes:
        reply = outcome.reply
        if reply is not None and reply.source == "bought":
            shown += reply.usage.completion_tokens - reply.usage.reasoning_tokens
    return wire.usage(bought, visible=min(shown, bought.completion_tokens))


def receipt(exchange: Exchange, job: Job, outcomes: list[Outcome]) -> wire.Json | None:
    """The body's `asmodel` object; None for what is passed through, whose receipt is headers only."""
    if not isinstance(job.model, ServedProgram):
        return None
    budget = job.budget
    unheard = [name for name in job.asked.hints if not all(o.hinted for o in outcomes)]
    body: wire.Json = {
        "request_id": exchange.id,
        "trace_id": exchange.trace_id or None,
        "run_id": job.id,
        "program": job.model.program.name,
        "program_digest": job.model.program.digest,
        "steps": budget.steps,
        "cache_hits": budget.hits,
        "joined": budget.joined,
        "upstream_calls": budget.calls,
        "cost": budget.cost,
        "saved": {
            "prompt_tokens": budget.saved.prompt_tokens,
            "completion_tokens": budget.saved.completion_tokens,
        },
        "usage_estimated": budget.usage.estimated,
        "seconds": round(time.monotonic() - exchange.started, 4),
        "overhead_ms": round(exchange.overhead_ms, 1),
        "ignored": sorted([*job.asked.ignored, *unheard]),
    }
    citations = [[{"id": c.id, "text": c.text} for c in o.answer.citations] for o in outcomes]
    data = [o.answer.data for o in outcomes]
    if any(citations):
        body["citations"] = citations[0] if len(citations) == 1 else citations
    if any(d is not None for d in data):
        body["data"] = data[0] if len(data) == 1 else data
    return body


class Passing(Speaking):
    """A stream that is passed through: the upstream's own bytes, as they come.

    A client that reads slowly makes its upstream wait, once more than `connections.UNREAD_BYTES` are on their way.
    """

    __slots__ = ("_chunks", "_exchange", "_job", "_service")

    def __init__(
        self,
        exchange: Exchange,
        service: Service,
        job: Job,
        chunks: Callable[[Exchange, Job, str, int], wire.Chunks],
    ) -> None:
        super().__init__()
        self._exchange = exchange
        self._chunks = chunks
        self._service = service
        self._job = job

    async def open(self) -> None:
        await self._exchange.open_stream()

    async def write(self, data: bytes) -> None:
        await self._exchange.write(data)

    async def run(self) -> str:
        """Write the stream. Raises AsmodelError where nothing has been sent yet."""
        exchange = self._exchange
        self.begin()
        try:
            outcome = await self._service.answer(self._job, 0, _unheard, self.take)
            await self.said()
        except AsmodelError as error:
            await self.said()
            if not self.opened:
                raise
            await exchange.write(wire.event(wire.error_body(error)), last=True)
            if exchange.span is not None:
                tracing.record_error(exchange.span, error)
            return error.code or "error"
        finally:
            self.end()
        exchange.when_left(_nothing)
        if not self.opened:
            await self.open()
        # Of an upstream that promised its own bytes and gave none, what it answered.
        data = wire.DONE
        if not self.written:
            chunks = self._chunks(exchange, self._job, f"chatcmpl-{new_id(96)}", int(time.time()))
            data = as_stream(chunks, self._job, outcome)
        await exchange.write(data, last=True)
        return "ok"


async def _unheard(delta: Delta) -> None:
    """Of a stream whose bytes are passed on."""


def as_stream(chunks: wire.Chunks, job: Job, outcome: Outcome) -> bytes:
    """A whole answer as a stream would have brought it."""
    said = wire.Said()
    rest = {"role": "assistant", "content": "", **said.rest(outcome.answer, outcome.reply)}
    end = chunks.delta(0, {}, wire.finish_reason(outcome.answer), logprobs=chunks.logprobs(0, outcome.reply))
    return chunks.delta(0, rest) + end + chunks.usage(tokens(job, [outcome])) + wire.DONE


class Stream:
    """One streamed response: what the run has emitted, written at the pace of this client.

    In chunks; what is written otherwise overrides the methods from `_roles` on.
    """

    def __init__(self, exchange: Exchange, answering: Answering, chunks: wire.Chunks, *, progress: bool) -> None:
        job = answering.job
        self._exchange = exchange
        self._answering = answering
        self._job = job
        self._chunks = chunks
        self._progress = progress
        self._stirred = asyncio.Event()
        self._written = 0
        """How many of the run's events are."""
        self._opened = False
        self._said = [wire.Said() for _ in range(job.asked.n)]
        self._told: deque[float] = deque(maxlen=LINES_A_SECOND)
        """When the last lines of progress were told."""
        self._lines: set[str] = set()
        """Which were."""
        self._book: Told = {}
        self._began = False
        """Whether the roles are written, with which a stream that we put together ourselves begins."""

    async def run(self) -> str:
        """Write the stream. Raises AsmodelError where nothing has been sent yet, or Gone."""
        work = self._answering.task
        self._exchange.when_left(self._stirred.set)
        opens = time.monotonic() + OPENS_AFTER
        spoke = time.monotonic()
        async with self._answering.listening(self._stirred.set):
            while not work.done():
                now = time.monotonic()
                due = (opens if not self._opened else spoke + KEEP_ALIVE_EVERY) - now
                if self._opened and self._progress and (rests := self._rests()) > 0:
                    due = min(due, rests)
                await _within(self._stirred.wait(), max(0.0, due))
                self._stirred.clear()
                if self._exchange.left and not work.done():
                    raise Gone
                now = time.monotonic()
                if not self._opened:
                    begun = self._answering.events or self._job.progress.answered
                    if not (begun or now >= opens) or work.done():
                        continue
                    await self._open()
                    spoke = now
                if await self._flush():
                    spoke = now
                elif now - spoke >= KEEP_ALIVE_EVERY:
                    await self._exchange.write(wire.KEEP_ALIVE)
                    spoke = now
        outcome = await self._finish()
        if outcome == "ok":
            await _delivered(self._exchange, self._job)
        return outcome

    async def _open(self) -> None:
        self._opened = True
        await self._exchange.open_stream(self._failure)
        if not self._passed_on:
            await self._exchange.write(self._roles())
        elif not self._answering.events:
            # What will come is the upstream's own; until it comes, something that is nobody's.
            await self._exchange.write(wire.KEEP_ALIVE)

    @property
    def _passed_on(self) -> bool:
        return not isinstance(self._job.model, ServedProgram) and (
            self._answering.verbatim or (not self._answering.events and self._answering.passes_on)
        )

    async def _flush(self, *, last: bool = False) -> bool:
        """Write what is new; whether there was anything."""
        events = self._answering.events[self._written :]
        self._written += len(events)
        parts: list[bytes] = []
        for event in events:
            if isinstance(event, bytes):
                parts.append(event)
                continue
            choice, delta = event
            parts.append(self._roles())
            if delta.text and not self._said[choice].text:
                parts += self._progress_chunks(last=True)
            if body := self._said[choice].add(delta):
                parts.append(self._delta(choice, body, delta))
        data = b"".join([*parts, *self._progress_chunks(last=last)])
        if not data:
            return False
        await self._exchange.write(data)
        return True

    def _progress_chunks(self, *, last: bool = False) -> list[bytes]:
        """The lines of progress that may be told now; `last` where the answer follows, after which none is told."""
        chunks: list[bytes] = []
        if not self._progress or (self._rests() > 0 and not last):
            return chunks
        # Clients show reasoning before content, and would open it again.
        silent = [i for i, said in enumerate(self._said) if not said.text]
        while silent and self._full() <= 0 and (line := self._job.progress.next_line(self._book)) is not None:
            if line in self._lines:
                continue  # A step has begun, which the line does not show.
            self._lines.add(line)
            self._told.append(time.monotonic())
            chunks += [self._line(i, line) for i in silent]
        return chunks

    def _full(self) -> float:
        """Seconds until this second has a line left."""
        return 0.0 if len(self._told) < LINES_A_SECOND else self._told[0] + 1.0 - time.monotonic()

    def _rests(self) -> float:
        """Seconds until lines of progress are told again: often enough to watch, and one is kept for the end."""
        pause = self._told[-1] + 1.0 / (LINES_A_SECOND - 1) - time.monotonic() if self._told else 0.0
        return max(pause, self._full())

    async def _finish(self) -> str:
        try:
            outcomes = self._answering.outcomes()
        except AsmodelError as error:
            if not self._opened:
                raise
            await self._flush(last=True)
            await self._exchange.write(self._failure(error), last=True)
            if self._exchange.span is not None:
                tracing.record_error(self._exchange.span, error)
            return error.code or "error"
        if not self._opened:
            await self._open()
        await self._flush(last=True)
        if self._answering.verbatim:
            await self._exchange.write(wire.DONE, last=True)
            return "ok"
        await self._exchange.write(await self._ending(outcomes), last=True)
        return "ok"

    def _roles(self) -> bytes:
        """The roles, where they are not written yet."""
        if self._began:
            return b""
        self._began = True
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunks.delta(i, role) for i in range(self._job.asked.n))

    def _delta(self, choice: int, body: wire.Json, delta: Delta) -> bytes:
        """What a choice says; `body` is the `delta` of its chunk."""
        return self._chunks.delta(choice, body)

    def _line(self, choice: int, line: str) -> bytes:
        """A line of progress."""
        return self._chunks.delta(choice, {"reasoning_content": line + "\n"})

    def _failure(self, error: AsmodelError) -> bytes:
        """The end of a stream that has no answer."""
        body = wire.error_body(error)
        if isinstance(self._job.model, ServedProgram):
            body["asmodel"] = receipt(self._exchange, self._job, [])
        return wire.event(body)

    async def _ending(self, outcomes: list[Outcome]) -> bytes:
        """The end of a stream: what of the answer is not said yet, and what is told of it."""
        ends = [self._roles()]
        everything = receipt(self._exchange, self._job, outcomes)
        for i, outcome in enumerate(outcomes):
            if rest := self._said[i].rest(outcome.answer, outcome.reply):
                ends.append(self._chunks.delta(i, rest))
            ends.append(
                self._chunks.delta(
                    i,
                    {},
                    wire.finish_reason(outcome.answer),
                    # Whole at the end: what arrives as it is generated carries none.
                    logprobs=self._chunks.logprobs(i, outcome.reply),
                    receipt=everything if i == len(outcomes) - 1 else None,
                )
            )
        return b"".join([*ends, self._chunks.usage(tokens(self._job, outcomes)), wire.DONE])


async def _within(work: Awaitable[Any], seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
