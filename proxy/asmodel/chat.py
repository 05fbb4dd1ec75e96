"""`POST /v1/chat/completions`: a request read, answered, and written as one completion or as a stream of chunks."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from asmodel import tracing, wire
from asmodel.access import Access
from asmodel.budget import Limits
from asmodel.calls import CachePolicy, Delta, Emit
from asmodel.errors import AsmodelError, InvalidRequest
from asmodel.exchange import Exchange, Gone, read_body
from asmodel.gathering import gather
from asmodel.models import ServedProgram
from asmodel.service import Asked, Job, Outcome, Service, stopping

T = TypeVar("T")

OPENS_AFTER = 1.0
"""Seconds until a stream's 200 is sent, if nothing has been answered by then."""
KEEP_ALIVE_EVERY = 5.0
"""Seconds of silence in a stream before a comment keeps it alive; proxies cut silence from 60 s on."""
LINES_A_SECOND = 5
"""How many lines of progress at most."""
HIGH_WATER = 256 * 1024
"""Bytes of chunks that wait for a slow client before its own run is held back."""


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
    ) -> None:
        self._service = service
        self._access = access
        self._body_bytes = body_bytes
        self._messages = messages
        self._n = n
        self._progress = progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        with (
            self._service.under_way(),
            tracing.start_request("POST", "/v1/chat/completions", exchange.headers) as span,
        ):
            exchange.span = span
            outcome = "ok"
            try:
                outcome = await self._handle(exchange, receive)
                tracing.record_response(span, exchange.status)
            except Gone:
                outcome = "client left"
            except AsmodelError as error:
                outcome = f"{error.status} {error.code}"
                tracing.record_response(span, error.status, error)
                await exchange.refuse(error, receipt(exchange, exchange.job, []) if exchange.job else None)
            except asyncio.CancelledError:
                if not self._service.draining:
                    raise
                # The time that running requests had to end is over; their clients are told, and come again.
                outcome = "cut off"
                await exchange.break_off(stopping())
            finally:
                exchange.log(outcome)

    async def _handle(self, exchange: Exchange, receive: Receive) -> str:
        exchange.caller = self._access.admit(exchange.headers)
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise InvalidRequest("the body should be sent as `Content-Type: application/json`")
        request = wire.read_chat(await read_body(receive, self._body_bytes))
        watch = asyncio.ensure_future(exchange.gone())
        try:
            return await self._answer(exchange, request, watch)
        finally:
            await _end(watch)

    async def _answer(self, exchange: Exchange, request: wire.ChatRequest, watch: asyncio.Future[None]) -> str:
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
            ignored=tuple(ignored),
        )
        job = exchange.job = await _unless(watch, self._service.prepare(model, asked))
        if request.stream:
            options = request.stream_options
            progress = self._progress if request.asmodel.progress is None else request.asmodel.progress
            stream = _Stream(
                exchange,
                self._service,
                job,
                chunks=wire.Chunks(
                    _completion_id(),
                    exchange.created,
                    request.model,
                    include_usage=bool(options and options.include_usage),
                ),
                progress=progress and isinstance(model, ServedProgram),
            )
            return await stream.run(watch)
        return await self._whole(exchange, job, watch)

    def _check(self, request: wire.ChatRequest) -> None:
        if len(request.messages) > self._messages:
            raise InvalidRequest(f"`messages`: at most {self._messages}, not {len(request.messages)}", param="messages")
        if request.n is not None and request.n > self._n:
            raise InvalidRequest(f"`n`: at most {self._n}, not {request.n}", param="n")

    async def _whole(self, exchange: Exchange, job: Job, watch: asyncio.Future[None]) -> str:
        outcomes = await _unless(watch, _all(self._service, job))
        choices = [wire.choice(i, o.answer, o.reply) for i, o in enumerate(outcomes)]
        body = wire.completion(
            _completion_id(),
            exchange.created,
            exchange.model,
            choices,
            tokens(job, outcomes),
            receipt(exchange, job, outcomes),
        )
        await exchange.respond(200, body)
        return "200"


def _completion_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


async def _all(service: Service, job: Job, emit: Callable[[int], Emit] | None = None) -> list[Outcome]:
    if job.asked.n == 1:
        return [await service.answer(job, 0, emit and emit(0))]
    return await gather(service.answer(job, i, emit and emit(i)) for i in range(job.asked.n))


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
    """One streamed response. The run fills, this alone writes; what a slow client leaves holds back its own run."""

    def __init__(
        self,
        exchange: Exchange,
        service: Service,
        job: Job,
        *,
        chunks: wire.Chunks,
        progress: bool,
    ) -> None:
        self._exchange = exchange
        self._service = service
        self._job = job
        self._chunks = chunks
        self._progress = progress
        self._pending: list[bytes] = []
        self._waiting = 0
        self._stirred = asyncio.Event()
        self._drained = asyncio.Event()
        self._opened = False
        self._said = [wire.Said() for _ in range(job.asked.n)]
        self._told: deque[float] = deque(maxlen=LINES_A_SECOND)
        """When the last lines of progress were told."""
        self._lines: set[str] = set()
        """Which were."""
        job.progress.on_change = self._stirred.set

    def _emit(self, index: int) -> Emit:
        async def emit(delta: Delta) -> None:
            if delta.text and not self._said[index].text:
                for line in self._progress_chunks(last=True):
                    self._put(line)
            body = self._said[index].add(delta)
            if not body:
                return
            self._put(self._chunks.delta(index, body))
            while self._waiting > HIGH_WATER:
                self._drained.clear()
                await self._drained.wait()

        return emit

    def _put(self, chunk: bytes) -> None:
        self._pending.append(chunk)
        self._waiting += len(chunk)
        self._stirred.set()

    async def run(self, watch: asyncio.Future[None]) -> str:
        """Write the stream. Raises AsmodelError where nothing has been sent yet, or Gone."""
        work = asyncio.ensure_future(_all(self._service, self._job, self._emit))
        for task in (work, watch):
            task.add_done_callback(lambda _: self._stirred.set())
        opens = time.monotonic() + OPENS_AFTER
        spoke = time.monotonic()
        try:
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
                    if not (self._pending or self._job.progress.answered or now >= opens) or work.done():
                        continue
                    await self._open()
                    spoke = now
                if await self._flush():
                    spoke = now
                elif now - spoke >= KEEP_ALIVE_EVERY:
                    await self._exchange.write(wire.KEEP_ALIVE)
                    spoke = now
            return await self._finish(work)
        finally:
            self._job.progress.on_change = None
            await _end(work)

    async def _open(self) -> None:
        self._opened = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold chunks back
            **self._exchange.receipt(),
        }
        await self._exchange.start(200, headers)
        role = {"role": "assistant", "content": ""}
        await self._exchange.write(b"".join(self._chunks.delta(i, role) for i in range(self._job.asked.n)))

    async def _flush(self, *, last: bool = False) -> bool:
        """Write what waits; whether there was anything."""
        data = b"".join(self._progress_chunks(last=last)) + b"".join(self._pending)
        self._pending.clear()
        if not data:
            return False
        await self._exchange.write(data)
        self._waiting = sum(map(len, self._pending))
        self._drained.set()
        return True

    def _progress_chunks(self, *, last: bool = False) -> list[bytes]:
        """The lines of progress that may be told now; `last` where the answer follows, after which none is told."""
        chunks: list[bytes] = []
        if not self._progress or (self._rests() > 0 and not last):
            return chunks
        # Clients show reasoning before content, and would open it again.
        silent = [i for i, said in enumerate(self._said) if not said.text]
        while silent and self._full() <= 0 and (line := self._job.progress.next_line()) is not None:
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

    async def _finish(self, work: asyncio.Future[list[Outcome]]) -> str:
        try:
            outcomes = work.result()
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
            return f"200, then {error.code}"
        if not self._opened:
            await self._open()
        await self._flush(last=True)
        ends: list[bytes] = []
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
        return "200"


async def _within(work: Awaitable[Any], seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
