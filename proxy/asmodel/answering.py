"""One request being answered, apart from any connection: the run as a task, all that it has emitted, and who listens.

A listener reads at its own pace from what is kept here, so a slow client holds back nothing but itself. When the last
listener leaves, the run is cancelled: at once, or after a grace time where an `Idempotency-Key` says that the client
may come back for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from asmodel.calls import Delta, Emit
from asmodel.errors import InvalidRequest
from asmodel.gathering import gather
from asmodel.service import Job, Outcome, Service

Event = tuple[int, Delta] | bytes
"""A delta of a choice, or bytes of a passed-through upstream as they came."""


class Answering:
    """A job under way. `events` grows until `task` is done; `task` gives the outcomes, a choice each, or raises.

    `stream` says whether deltas are wanted, `grace` how many seconds a run goes on that nobody listens to any more.
    """

    def __init__(self, service: Service, job: Job, *, stream: bool, grace: float = 0.0) -> None:
        self.job = job
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.events: list[Event] = []
        self._service = service
        self._stirred: set[Callable[[], None]] = set()
        self._grace = grace
        self._leaving: asyncio.TimerHandle | None = None
        self.passes_on = False
        """Whether the upstream's own bytes will be the answer; known once it is asked."""
        self.task = asyncio.get_running_loop().create_task(self._all(stream))
        self.task.add_done_callback(self._done)
        job.progress.on_change = self._stir

    @property
    def verbatim(self) -> bool:
        """Whether the upstream's own bytes are the answer."""
        return bool(self.events) and isinstance(self.events[0], bytes)

    async def _all(self, stream: bool) -> list[Outcome]:
        service, job = self._service, self.job
        self.passes_on = await service.passes_on(job)
        if self.passes_on:
            return [await service.answer(job, 0, _unheard if stream else None, self._pass_on)]
        if job.asked.n == 1:
            return [await service.answer(job, 0, self._emit(0) if stream else None)]
        choices = range(job.asked.n)
        return await gather(service.answer(job, i, self._emit(i) if stream else None) for i in choices)

    def _emit(self, choice: int) -> Emit:
        async def emit(delta: Delta) -> None:
            self.events.append((choice, delta))
            self._stir()

        return emit

    async def _pass_on(self, data: bytes) -> None:
        self.events.append(data)
        self._stir()

    def _stir(self) -> None:
        for stirred in self._stirred:
            stirred()

    def _done(self, task: asyncio.Task[list[Outcome]]) -> None:
        self._stir()
        if not task.cancelled():
            task.exception()  # Told to whoever listens; where nobody does, it is not to be warned about either.

    @asynccontextmanager
    async def listening(self, stirred: Callable[[], None]) -> AsyncGenerator[None]:
        """Call `stirred` whenever there is something new, for as long as the body runs."""
        self._stirred.add(stirred)
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        try:
            yield
        finally:
            self._stirred.discard(stirred)
            if not self._stirred and not self.task.done():
                if self._grace > 0 and not self._service.draining:
                    self._leaving = asyncio.get_running_loop().call_later(self._grace, self.task.cancel)
                else:
                    await self.end()

    async def end(self) -> None:
        """Cancel what is left, and wait until it has ended."""
        if self._leaving is not None:
            self._leaving.cancel()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def _unheard(delta: Delta) -> None:
    """Asks for a stream whose bytes are passed on as they are."""


class Joined:
    """Runs by `Idempotency-Key`, within one scope: requests with one key are one run, whose answer is kept a while.

    A run that failed is forgotten at once, so that a retry resumes it. In one process only: elsewhere, equal requests
    still share steps, through the cache.
    """

    def __init__(self, *, keep: float = 600.0, most: int = 1000) -> None:
        self._keep = keep
        self._most = most
        self._runs: dict[tuple[str, str], tuple[bytes, Answering]] = {}

    def find(self, scope: str, key: str, body: bytes) -> Answering | None:
        """The run of that key. Raises InvalidRequest where it was begun with another body."""
        found = self._runs.get((scope, key))
        if found is None:
            return None
        digest, answering = found
        if digest != hashlib.sha256(body).digest():
            raise InvalidRequest(
                "this Idempotency-Key was used for another request; use a new key for a new request",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return answering

    def add(self, scope: str, key: str, body: bytes, answering: Answering) -> None:
        place = (scope, key)
        self._runs[place] = (hashlib.sha256(body).digest(), answering)
        while len(self._runs) > self._most:
            # The oldest that is done; one that runs is never forgotten, or a retry would begin it twice.
            done = next((p for p, (_, a) in self._runs.items() if a.task.done()), None)
            if done is None:
                break
            del self._runs[done]

        def over(task: asyncio.Task[list[Outcome]]) -> None:
            if task.cancelled() or task.exception() is not None:
                self._forget(place, answering)
            else:
                asyncio.get_running_loop().call_later(self._keep, self._forget, place, answering)

        answering.task.add_done_callback(over)

    async def close(self) -> None:
        """End the runs that nobody listens to any more."""
        await asyncio.gather(*(answering.end() for _, answering in self._runs.values()))
        self._runs.clear()

    def _forget(self, place: tuple[str, str], answering: Answering) -> None:
        if place in self._runs and self._runs[place][1] is answering:
            del self._runs[place]
