"""One request being answered, apart from any connection: the run as a task, all that it has emitted, and who listens.

A listener reads at its own pace from what is kept here, so a slow client holds back nothing but itself. When the last
listener leaves, the run is cancelled: at once, or after a grace time where an `Idempotency-Key` says that the client
may come back for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from asmodel.calls import Delta, Emit
from asmodel.errors import InvalidRequest, ProgramError
from asmodel.gathering import gather
from asmodel.ids import new_id
from asmodel.service import Job, Outcome, Service, stopping

Event = tuple[int, Delta] | bytes
"""A delta of a choice, or bytes of a passed-through upstream as they came."""


class Answering:
    """A job under way. `events` grows until `task` is done; `outcomes` gives the choices of the answer, or raises.

    `stream` says whether deltas are wanted, `grace` how many seconds a run goes on that nobody listens to any more.
    """

    def __init__(self, service: Service, job: Job, *, stream: bool, grace: float = 0.0) -> None:
        self.job = job
        self.id = f"chatcmpl-{new_id(96)}"
        self.created = int(time.time())
        self.events: list[Event] = []
        self.ended = False
        """Whether it has been told to end before it was done: there is no answer, and there will be none."""
        self._service = service
        self._stirred: list[Callable[[], None]] = []
        """Of each listener; equal ones count as often as they are here."""
        self._grace = grace
        self._leaving: asyncio.TimerHandle | None = None
        self.passes_on = False
        """Whether the upstream's own bytes should be the answer; known once it is asked."""
        self.task = asyncio.get_running_loop().create_task(self._all(stream))
        self.task.add_done_callback(self._done)
        job.progress.on_change = self._stir

    @property
    def verbatim(self) -> bool:
        """Whether the upstream's own bytes are the answer."""
        return bool(self.events) and isinstance(self.events[0], bytes)

    def outcomes(self) -> list[Outcome]:
        """What it has come to, once it is done. Raises AsmodelError."""
        if not self.task.cancelled():
            return self.task.result()
        if self.ended:
            raise stopping()
        # By its own doing: it waited for something that it had itself cancelled.
        raise ProgramError(f'"{self.job.model.name}" has cancelled itself')

    async def _all(self, stream: bool) -> list[Outcome]:
        service, job = self._service, self.job
        choices = range(job.asked.n)
        self.passes_on = await service.passes_on(job)
        if self.passes_on:
            first = await service.answer(job, 0, self._unless_verbatim if stream else None, self._pass_on)
            if self.verbatim:
                return [first]
            # An equal has answered that does not speak OpenAI's format, and gives one choice at a time.
            others = (service.answer(job, i, self._emit(i) if stream else None) for i in choices[1:])
            return [first, *await gather(others)]
        if job.asked.n == 1:
            return [await service.answer(job, 0, self._emit(0) if stream else None)]
        return await gather(service.answer(job, i, self._emit(i) if stream else None) for i in choices)

    def _emit(self, choice: int) -> Emit:
        async def emit(delta: Delta) -> None:
            self.events.append((choice, delta))
            self._stir()

        return emit

    async def _unless_verbatim(self, delta: Delta) -> None:
        # Bytes come before the delta that is in them.
        if not self.verbatim:
            await self._emit(0)(delta)

    async def _pass_on(self, data: bytes) -> None:
        self.events.append(data)
        self._stir()

    def _stir(self) -> None:
        for stirred in self._stirred:
            stirred()

    def _done(self, task: asyncio.Task[list[Outcome]]) -> None:
        self._stay()
        self._stir()
        self.job.progress.on_change = None  # It would know us, as we know it, until the garbage collector came.
        if not task.cancelled():
            task.exception()  # Told to whoever listens; where nobody does, it is not to be warned about either.

    @asynccontextmanager
    async def listening(self, stirred: Callable[[], None]) -> AsyncGenerator[None]:
        """Call `stirred` whenever there is something new, for as long as the body runs."""
        self._stirred.append(stirred)
        self._stay()
        try:
            yield
        finally:
            self._stirred.remove(stirred)
            if not self._stirred and not self.task.done():
                if self._grace > 0 and not self._service.draining:
                    self._leaving = asyncio.get_running_loop().call_later(self._grace, self._cancel)
                else:
                    await self.end()

    async def end(self) -> None:
        """Cancel what is left, and wait until it has ended."""
        self._stay()
        self._cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def _cancel(self) -> None:
        if not self.task.done():
            self.ended = True
            self.task.cancel()

    def _stay(self) -> None:
        """It is not to end of itself."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    @property
    def size(self) -> int:
        """About how many bytes are kept of what it has said."""
        return sum(
            len(event) if isinstance(event, bytes) else _DELTA + len(event[1].text) + len(event[1].reasoning)
            for event in self.events
        ) + sum(map(_size, self.task.result() if self.task.done() and not self.task.cancelled() else ()))


_DELTA = 300
"""Bytes of a delta in memory, besides its text."""


def _size(outcome: Outcome) -> int:
    reply = outcome.reply
    said = 0 if reply is None else len(reply.text) + len(reply.reasoning) + _DELTA * len(reply.logprobs)
    return said + len(outcome.answer.text) + len(str(outcome.answer.data))


@dataclass(slots=True)
class _Kept:
    digest: bytes
    answering: Answering
    size: int
    expires: asyncio.TimerHandle | None = None


class Joined:
    """Runs by `Idempotency-Key`, within one scope: requests with one key are one run, whose answer is kept a while.

    `keep` in seconds; of what is done, the newest `most` are kept, and as many of them as come to `most_bytes` with
    their requests. A run that failed is forgotten at once, so that a retry resumes it. In one process only: elsewhere,
    equal requests still share steps, through the cache.
    """

    def __init__(self, *, keep: float = 600.0, most: int = 1000, most_bytes: int = 64_000_000) -> None:
        self._keep = keep
        self._most = most
        self._most_bytes = most_bytes
        self._runs: dict[tuple[str, str], _Kept] = {}

    def find(self, scope: str, key: str, body: bytes) -> Answering | None:
        """The run of that key. Raises InvalidRequest where it was begun with another body."""
        found = self._runs.get((scope, key))
        if found is None or found.answering.ended:
            return None
        if found.digest != hashlib.sha256(body).digest():
            raise InvalidRequest(
                "this Idempotency-Key was used for another request; use a new key for a new request",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return found.answering

    def add(self, scope: str, key: str, body: bytes, answering: Answering) -> None:
        place = (scope, key)
        # A request takes about as much memory again as its body.
        kept = self._runs[place] = _Kept(hashlib.sha256(body).digest(), answering, 2 * len(body))

        def over(task: asyncio.Task[list[Outcome]]) -> None:
            if task.cancelled() or task.exception() is not None:
                self._forget(place, answering)
                return
            if self._runs.get(place) is not kept:
                return
            kept.size += answering.size
            kept.expires = asyncio.get_running_loop().call_later(self._keep, self._forget, place, answering)
            # It is the newest of those that are done.
            self._runs[place] = self._runs.pop(place)
            self._bound()

        answering.task.add_done_callback(over)

    def _bound(self) -> None:
        # One that runs is never forgotten, or a retry would begin it twice.
        done = [(place, kept) for place, kept in self._runs.items() if kept.expires is not None]
        count, size = len(done), sum(kept.size for _, kept in done)
        for place, kept in done:
            if count <= self._most and size <= self._most_bytes:
                return
            count, size = count - 1, size - kept.size
            self._forget(place, kept.answering)

    async def close(self) -> None:
        """End the runs that nobody listens to any more."""
        kept = list(self._runs.values())
        self._runs.clear()
        for run in kept:
            if run.expires is not None:
                run.expires.cancel()
        await asyncio.gather(*(run.answering.end() for run in kept))

    def _forget(self, place: tuple[str, str], answering: Answering) -> None:
        kept = self._runs.get(place)
        if kept is not None and kept.answering is answering:
            if kept.expires is not None:
                kept.expires.cancel()  # Or the loop would hold the answer until then.
            del self._runs[place]
