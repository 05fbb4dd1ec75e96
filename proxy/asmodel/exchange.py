"""One HTTP request and its response: ids, receipts, errors in their envelope, and whether the client is still there."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from opentelemetry.trace import Span
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asmodel import request_log, tracing, wire
from asmodel.access import Access, Caller
from asmodel.budget import Budget
from asmodel.calls import Usage
from asmodel.errors import AsmodelError, PayloadTooLarge
from asmodel.ids import new_id
from asmodel.models import ServedProgram
from asmodel.request_log import RequestLine
from asmodel.service import Job
from asmodel.timeouts import Bounds

if TYPE_CHECKING:
    from types import TracebackType

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

faults = logging.getLogger("asmodel")


class Gone(Exception):
    """The client has left."""


SILENCE = 30.0
"""Seconds without a byte of a body after which no more is waited for."""
READING = 300.0
"""Seconds that a whole body may take to come."""
DISCARDED = 64_000_000
"""Bytes beyond the limit that are taken in and thrown away: most clients listen only once they have sent it all."""


class BodyTimeout(AsmodelError):
    """The body has stopped coming; a retry may fare better."""

    status = 408
    type = "invalid_request_error"
    code: str | None = "body_timeout"


_SILENT = Bounds(SILENCE)


async def read_body(receive: Receive, limit: int, *, silence: Bounds = _SILENT) -> bytes:
    """The whole body. Raises PayloadTooLarge, BodyTimeout after `silence` without any of it, or Gone."""
    data = bytearray()
    size = 0
    ends = time.monotonic() + READING
    more = True
    while more:
        bound = silence()
        try:
            with bound:
                message = await receive()
        except TimeoutError:
            if not bound.expired:
                raise
            if size > limit:
                break
            raise BodyTimeout("the body has not come to its end in time") from None
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(part)
        if more and time.monotonic() > ends:
            raise BodyTimeout("the body has not come to its end in time")
        if size <= limit:
            data += part
        else:
            data.clear()
            if size > limit + DISCARDED:
                break
    if size > limit:
        raise _too_large(limit)
    return bytes(data)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than the {limit} bytes that this server takes")


class Connection(Protocol):
    """What our own server knows without being awaited; of the ASGI scope, `asmodel.connection`."""

    def whole_body(self) -> bytes | None: ...
    def when_left(self, left: Callable[[], None] | None) -> None: ...


class Present:
    """A `with` body that is cancelled when the client leaves, and then raises Gone."""

    __slots__ = ("_cancelling", "_exchange", "_gone", "_task")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._gone = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._exchange.when_left(self._leave)

    def _leave(self) -> None:
        self._gone = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if not self._gone:
            self._exchange.when_left(_nothing)
        elif self._task.uncancel() <= self._cancelling and kind in (None, asyncio.CancelledError):
            raise Gone from None


def _nothing() -> None:
    """That the client has left is known, and nothing comes of it."""


class Exchange:
    """One request and its response: ids, receipts, and whether the client is still there."""

    __slots__ = (
        "_connection",
        "_receive",
        "_send",
        "_told_as",
        "_watch",
        "_when_left",
        "caller",
        "ended",
        "headers",
        "id",
        "job",
        "left",
        "method",
        "model",
        "path",
        "raw_headers",
        "span",
        "started",
        "status",
        "streamed",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers: dict[str, str] = {}
        """By names in lower case; of several of one name, the first."""
        for name, value in self.raw_headers:
            self.headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.started = time.monotonic()
        given = self.headers.get("x-request-id")
        self.id = given if given is not None and REQUEST_ID.fullmatch(given) else f"req_{new_id(96)}"
        self.span: Span | None = None
        self.job: Job | None = None
        self.caller = Caller()
        self.model = ""
        self.status = 0
        self.ended = False
        self.streamed = False
        self.left = False
        """Whether the client is known to have left; looked for once somebody wants to know."""
        self._receive = receive
        self._send = send
        extensions: Mapping[str, Any] = scope.get("extensions") or {}
        self._connection: Connection | None = extensions.get("asmodel.connection")
        self._told_as: Callable[[AsmodelError], bytes] | None = None
        self._when_left: Callable[[], None] | None = None
        self._watch: asyncio.Task[None] | None = None

    def admit(self, access: Access) -> None:
        """Learn whose request it is, and tell the trace. Raises Unauthorized or Forbidden."""
        self.caller = access.admit(self.headers)
        if self.span is not None and not access.open:
            tracing.record_scope(self.span, self.caller.scope)

    def all_of(self, header: str) -> str:
        """The values of every header of that name, which mean the same as one with commas between (RFC 9110, 5.3)."""
        name = header.encode("latin-1")
        return ",".join(value.decode("latin-1") for given, value in self.raw_headers if given == name)

    async def body(self, limit: int) -> bytes:
        """The request's body. Raises PayloadTooLarge, BodyTimeout, or Gone."""
        whole = self._connection.whole_body() if self._connection is not None else None
        if whole is None:
            return await read_body(self._receive, limit)
        if len(whole) > limit:
            raise _too_large(limit)
        return whole

    def when_left(self, call: Callable[[], None] | None) -> None:
        """Call it once the client has left, instead of what was to be called before; once the body has been read."""
        self._when_left = call
        if self._connection is not None:
            self._connection.when_left(None if call is None else self._has_left)
        elif call is None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
        elif self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._gone())

    def present(self) -> Present:
        """Around work that is for nobody once the client has left."""
        return Present(self)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left()

    def _has_left(self) -> None:
        self.left = True
        if self._when_left is not None:
            self._when_left()

    @property
    def trace_id(self) -> str:
        return tracing.trace_id(self.span) if self.span is not None else ""

    def receipt(self) -> dict[str, str]:
        """The receipt as headers, as it stands now."""
        elapsed = time.monotonic() - self.started
        headers = {"x-request-id": self.id, "openai-processing-ms": str(round(elapsed * 1000))}
        if trace_id := self.trace_id:
            headers["x-asmodel-trace-id"] = trace_id
        if self.job is not None:
            budget = self.job.budget
            headers |= {
                "x-asmodel-steps": str(budget.steps),
                "x-asmodel-cache-hits": str(budget.hits),
                "x-asmodel-upstream-calls": str(budget.calls),
                "x-asmodel-overhead-ms": f"{self.overhead_ms:.1f}",
            }
        return headers

    @property
    def overhead_ms(self) -> float:
        """How much of the time so far was not spent waiting for an upstream."""
        elapsed = time.monotonic() - self.started
        return max(0.0, elapsed - (0.0 if self.job is None else self.job.budget.waited)) * 1000

    async def respond(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        await self.send(status, orjson.dumps(body), headers)

    async def send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A whole response, of JSON that is written already."""
        everything = {
            "content-type": "application/json",
            "content-length": str(len(data)),
            **self.receipt(),
            **(headers or {}),
        }
        await self.start(status, everything)
        await self.write(data, last=True)

    async def open_stream(self, told_as: Callable[[AsmodelError], bytes] | None = None) -> None:
        """The start of a response of server-sent events.

        `told_as` gives what its last events are where it is broken off; by default, one with the error's envelope.
        """
        self.streamed = True
        self._told_as = told_as
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold chunks back
            **self.receipt(),
        }
        await self.start(200, headers)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes, *, last: bool = False) -> None:
        self.ended = last
        if last:
            self._told_as = None
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def refuse(self, error: AsmodelError, receipt: Mapping[str, Any] | None = None) -> None:
        body = wire.error_body(error)
        if receipt is not None:
            body["asmodel"] = receipt
        await self.respond(error.status, body, retry_headers(error))

    async def break_off(self, error: AsmodelError) -> None:
        """Tell the error in whatever way is left: as the response, or as the last of the stream."""
        if not self.status:
            await self.refuse(error)
        elif not self.ended:
            last = wire.event(wire.error_body(error)) if self._told_as is None else self._told_as(error)
            await self.write(last, last=True)

    def log(self, outcome: str) -> None:
        """One line of the log; `outcome` is `ok`, the code of an error, `left` or `cut off`."""
        job = self.job
        budget = job.budget if job is not None else None
        line = RequestLine(
            method=self.method,
            path=self.path,
            status=self.status or None,
            outcome=outcome,
            seconds=time.monotonic() - self.started,
            request_id=self.id,
            trace_id=self.trace_id,
            run_id=job.id if job is not None else "",
            model=job.model.name if job is not None else "",
            program=job.model.program.name if job is not None and isinstance(job.model, ServedProgram) else "",
            caller=self.caller.name,
            streamed=self.streamed,
            steps=budget.steps if budget is not None else None,
            hits=budget.hits if budget is not None else None,
            joined=budget.joined if budget is not None else None,
            calls=budget.calls if budget is not None else None,
            input_tokens=budget.usage.prompt_tokens if budget is not None else None,
            output_tokens=budget.usage.completion_tokens if budget is not None else None,
            estimated=budget is not None and budget.usage.estimated,
            cost=budget.cost if budget is not None else None,
            overhead_seconds=self.overhead_ms / 1000,
        )
        request_log.write(line)
        if budget is not None:
            budget.late = _Late(line, budget.calls, self.started)


class _Late:
    """Writes a line for what is bought once a request's own line is written."""

    __slots__ = ("_calls", "_line", "_started")

    def __init__(self, line: RequestLine, calls: int, started: float) -> None:
        self._line = line
        self._calls = calls
        self._started = started

    def __call__(self, budget: Budget, usage: Usage, cost: float | None) -> None:
        more, self._calls = budget.calls - self._calls, budget.calls
        request_log.write(
            replace(
                self._line,
                late=True,
                outcome="bought later",
                status=None,
                seconds=time.monotonic() - self._started,
                steps=None,
                hits=None,
                joined=None,
                calls=more,
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.completion_tokens,
                estimated=usage.estimated,
                cost=cost,
                overhead_seconds=None,
            )
        )


def retry_headers(error: AsmodelError) -> dict[str, str]:
    """What tells SDKs whether and when to try again: at most 60 s from now, for some sleep whatever they are told."""
    headers: dict[str, str] = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # What is left of the body may still come, and is not the next request.
    if error.retry is not None:
        headers["x-should-retry"] = "true" if error.retry else "false"
    if error.retry_after is not None:
        seconds = min(60.0, max(0.0, error.retry_after))
        headers |= {"retry-after": str(round(seconds + 0.499)), "retry-after-ms": str(round(seconds * 1000))}
    return headers


class Enveloped:
    """Whatever goes wrong on any route reaches the client as OpenAI's error envelope, and never as a stack trace."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            # Frames only: the text of an exception may hold a prompt.
            faults.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            if started:
                # The status is out; only a broken connection says that this is no answer. The server logs what it is
                # given, so it is not given the exception itself.
                raise RuntimeError("an answer broke off, for the reason above") from None
            failure = AsmodelError(f"asmodel itself failed ({type(error).__name__}); its log says where")
            await Exchange(scope, receive, send).refuse(failure)
