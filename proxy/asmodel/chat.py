"""`POST /v1/chat/completions`: a request read, answered, and written as one completion or as a stream of chunks."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import deque
from collections.abc import Awaitable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from asmodel import tracing, wire
from asmodel.access import Access
from asmodel.answering import Answering, Joined
from asmodel.budget import Limits
from asmodel.calls import CachePolicy
from asmodel.errors import AsmodelError, InvalidRequest, PayloadTooLarge
from asmodel.exchange import Exchange, Gone, read_body
from asmodel.models import Model, ServedProgram
from asmodel.progress import Told
from asmodel.service import Asked, Job, Outcome, Service, stopping

T = TypeVar("T")

OPENS_AFTER = 1.0
"""Seconds until a stream's 200 is sent, if nothing has been answered by then."""
KEEP_ALIVE_EVERY = 5.0
"""Seconds of silence in a stream before a comment keeps it alive; proxies cut silence from 60 s on."""
LINES_A_SECOND = 5
"""How many lines of progress at most."""


def cache_policy(headers: Headers, asked: wire.Extension) -> CachePolicy | None:
    """What the request says of the cache: the body's `asmodel.cache` before the header (RFC 9111, section 5.2.1)."""
    if asked.cache is not None:
        return CachePolicy(mode=asked.cache)
    said: dict[str, str] = {}
    for directive in ",".join(headers.getlist("cache-control")).lower().split(","):
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


class ChatCompletions:
    """The route, as an ASGI application."""

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
        with (
            self._service.under_way(),
            tracing.start_request(
                "POST", "/v1/chat/completions", exchange.headers, force=self._access.may_force(exchange.headers)
            ) as span,
        ):
            exchange.span = span
            outcome = "ok"
            try:
                outcome = await self._handle(exchange, receive)
                tracing.record_response(span, exchange.status)
            except Gone:
                outcome = "left"
                tracing.record_left(span)
            except AsmodelError as error:
                outcome = error.code or "error"
                if isinstance(error, PayloadTooLarge):
                    self._service.meter.refused("body_bytes")
                tracing.record_response(span, error.status, error)
                await exchange.refuse(error, receipt(exchange, exchange.job, []) if exchange.job else None)
            except asyncio.CancelledError:
                if not self._service.draining:
                    raise
                # The time that running requests had to end is over; their clients are told, and come again.
                outcome = "cut off"
                tracing.record_response(span, exchange.status or 503, stopping())
                tracing.record_error(span, stopping())
                # Unless it reads nothing, and so cannot be told.
                await _within(exchange.break_off(stopping()), 1.0)
            finally:
                exchange.log(outcome)

    async def _handle(self, exchange: Exchange, receive: Receive) -> str:
        exchange.caller = self._access.admit(exchange.headers)
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise InvalidRequest("the body should be sent as `Content-Type: application/json`")
        body = await read_body(receive, self._body_bytes)
        try:
            request = wire.read_chat(body, messages=self._messages)
        except wire.TooManyMessages:
            self._service.meter.refused("messages")
            raise
        watch = asyncio.ensure_future(exchange.gone())
        try:
            return await self._answer(exchange, request, body, watch)
        finally:
            await _end(watch)

    async def close(self) -> None:
        """End the runs that go on for clients who may come back."""
        await self._joined.close()

    async def _answer(
        self, exchange: Exchange, request: wire.ChatRequest, body: bytes, watch: asyncio.Future[None]
    ) -> str:
        exchange.model = request.model
        self._check(request)
        model = self._service.models.find(request.model)
        ignored: list[str] = []
        if isinstance(model, ServedProgram):
            wire.refuse_unsupported(request, model.program)
            hints, shape, ignored = wire.split(request, model.program)
        else:
            hints, shape = request.passed_on, {}
        limits = request.asmodel.limits
        asked = Asked(
            messages=request.conversation,
            documents=request.texts if isinstance(model, ServedProgram) else (),
            hints=hints,
            shape=shape,
            params=request.asmodel.params,
            roles=request.asmodel.roles,
            limits=Limits(calls=limits.calls, tokens=limits.tokens, cost=limits.cost, seconds=limits.seconds),
            cache=cache_policy(exchange.headers, request.asmodel),
            scope=exchange.caller.scope,
            n=request.n or 1,
            stream_asks=request.stream_asks if request.stream and not isinstance(model, ServedProgram) else {},
            ignored=tuple(ignored),
            usage_asked=bool(request.stream_options and request.stream_options.include_usage),
            identity=identity(exchange.headers),
            retry=exchange.headers.get("x-stainless-retry-count", "0").strip() not in ("", "0"),
            digest=hashlib.sha256(body).hexdigest(),
        )
        answering = await self._begun(exchange, asked, model, body, watch, stream=bool(request.stream))
        exchange.job = answering.job
        if request.stream:
            progress = self._progress if request.asmodel.progress is None else request.asmodel.progress
            return await _Stream(exchange, answering, progress=progress and isinstance(model, ServedProgram)).run(watch)
        return await self._whole(exchange, answering, watch)

    async def _begun(
        self, exchange: Exchange, asked: Asked, model: Model, body: bytes, watch: asyncio.Future[None], *, stream: bool
    ) -> Answering:
        """The run of this request: a new one, or the one that its Idempotency-Key names."""
        if asked.identity is None:
            job = exchange.job = await _unless(watch, self._service.prepare(model, asked))
            return Answering(self._service, job, stream=stream)
        found = self._joined.find(asked.scope, asked.identity, body)
        if found is None:
            job = exchange.job = await _unless(watch, self._service.prepare(model, asked))
            # Asked again, for another may have come first while this one was being prepared.
            found = self._joined.find(asked.scope, asked.identity, body)
            if found is None:
                found = Answering(self._service, job, stream=stream, grace=self._grace)
                self._joined.add(asked.scope, asked.identity, body, found)
        return found

    def _check(self, request: wire.ChatRequest) -> None:
        if request.n is not None and request.n > self._n:
            self._service.meter.refused("n")
            raise InvalidRequest(f"`n`: at most {self._n}, not {request.n}", param="n")

    async def _whole(self, exchange: Exchange, answering: Answering, watch: asyncio.Future[None]) -> str:
        async with answering.listening(_nothing):
            await asyncio.wait((answering.task, watch), return_when=asyncio.FIRST_COMPLETED)
            if not answering.task.done():
                raise Gone
        outcomes = answering.outcomes()
        if answering.verbatim:
            await exchange.send(200, b"".join(e for e in answering.events if isinstance(e, bytes)))
            return "ok"
        job = answering.job
        choices = [wire.choice(i, o.answer, o.reply) for i, o in enumerate(outcomes)]
        body = wire.completion(
            answering.id,
            answering.created,
            exchange.model,
            choices,
            tokens(job, outcomes),
            receipt(exchange, job, outcomes),
        )
        await exchange.respond(200, body)
        await _delivered(job, watch)
        return "ok"


async def _delivered(job: Job, watch: asyncio.Future[None]) -> None:
    """All of it has been sent, and the client was there."""
    if job.delivery is not None and not watch.done():
        await job.delivery.whole()


def _nothing() -> None:
    """For listeners who wait for the end alone."""


def identity(headers: Mapping[str, str]) -> str | None:
    """The client's own name for its request, of any characters that a header may have; at most 255 of them."""
    given: str | None = headers.get("idempotency-key")
    if given is not None and not 0 < len(given) <= 255:
        raise InvalidRequest("the Idempotency-Key should have 1 to 255 characters", param="Idempotency-Key")
    return given


async def _unless(watch: asyncio.Future[None], work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client leaves meanwhile: then it is cancelled, and Gone is raised once it has ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await _end(task)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is not done, and wait until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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


class _Stream:
    """One streamed response: what the run has emitted, written at the pace of this client."""

    def __init__(self, exchange: Exchange, answering: Answering, *, progress: bool) -> None:
        job = answering.job
        self._exchange = exchange
        self._answering = answering
        self._job = job
        self._chunks = wire.Chunks(answering.id, answering.created, exchange.model, include_usage=job.asked.usage_asked)
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

    async def run(self, watch: asyncio.Future[None]) -> str:
        """Write the stream. Raises AsmodelError where nothing has been sent yet, or Gone."""
        work = self._answering.task
        watch.add_done_callback(lambda _: self._stirred.set())
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
                if watch.done() and not work.done():
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
            await _delivered(self._job, watch)
        return outcome

    async def _open(self) -> None:
        self._opened = self._exchange.streamed = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold chunks back
            **self._exchange.receipt(),
        }
        await self._exchange.start(200, headers)
        if not self._passed_on:
            await self._exchange.write(self._roles())
        elif not self._answering.events:
            # What will come is the upstream's own; until it comes, something that is nobody's.
            await self._exchange.write(wire.KEEP_ALIVE)

    def _roles(self) -> bytes:
        """The roles, where they are not written yet."""
        if self._began:
            return b""
        self._began = True
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunks.delta(i, role) for i in range(self._job.asked.n))

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
                parts.append(self._chunks.delta(choice, body))
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
            chunks += [self._chunks.delta(i, {"reasoning_content": line + "\n"}) for i in silent]
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
            body = wire.error_body(error)
            if isinstance(self._job.model, ServedProgram):
                body["asmodel"] = receipt(self._exchange, self._job, [])
            await self._exchange.write(wire.event(body), last=True)
            if self._exchange.span is not None:
                tracing.record_error(self._exchange.span, error)
            return error.code or "error"
        if not self._opened:
            await self._open()
        await self._flush(last=True)
        if self._answering.verbatim:
            await self._exchange.write(wire.DONE, last=True)
            return "ok"
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
                    logprobs=wire.logprobs(outcome.reply),
                    receipt=everything if i == len(outcomes) - 1 else None,
                )
            )
        ends += [self._chunks.usage(tokens(self._job, outcomes)), wire.DONE]
        await self._exchange.write(b"".join(ends), last=True)
        return "ok"


async def _within(work: Awaitable[Any], seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
