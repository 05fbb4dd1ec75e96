"""The onion between a step and a provider. Each layer has one method, `send`, and wraps the next:

    Cached > Routed > Metered > Retried > Led > Limited > Timed > provider

Cached    one answer a key: from the store, from a call in flight, or bought
Routed    the first of several equals that answers
Metered   the span of a call that is really made, its time, tokens and cost
Retried   again, after a pause, where that is safe and can help
Led       of calls that begin alike one goes ahead (leading.py)
Limited   so many calls at a time, fair between runs
Timed     how long the first byte, and the whole, may take
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from opentelemetry import trace

from asmodel import tracing
from asmodel.calls import Call, Capabilities, Delta, Emit, Reply, Terms, ToolCallDelta, Usage, key
from asmodel.errors import (
    AsmodelError,
    DeadlineExceeded,
    NotCached,
    UpstreamBroken,
    UpstreamError,
    UpstreamTimeout,
)
from asmodel.fingerprint import Fingerprint, Fingerprints
from asmodel.meter import UNMEASURED, Meter
from asmodel.protocols import Cache, Counting, Detecting, Lockable, Openable, Recalling, Upstream
from asmodel.tags import tag
from asmodel.timeouts import Bounds
from asmodel.turns import Turns

READINGS = 4_000_000
"""Bytes of stored replies that an upstream's cache keeps as they were read; in memory, about three times as much."""

log = logging.getLogger("asmodel.upstream")


def name_of(upstream: Upstream) -> str:
    """Its name in the settings; of one that has none, its identity."""
    name = getattr(upstream, "name", None)
    return name if isinstance(name, str) else upstream.identity


class Layer:
    """What every layer that wraps one upstream passes on as it is."""

    count: Callable[[str], Awaitable[int]]
    detect: Callable[[], Awaitable[Capabilities]]

    def __init__(self, inner: Upstream) -> None:
        self._inner = inner
        # Whom it all comes down to, without asking each layer on the way.
        layer: object = inner
        self.provider: Upstream = layer.provider if isinstance(layer, Layer) else inner
        # A layer can do these only where what it wraps can: whoever asks, asks by `isinstance`.
        if isinstance(inner, Counting):
            self.count = inner.count
        if isinstance(inner, Detecting):
            self.detect = inner.detect

    @property
    def inner(self) -> Upstream:
        """What it wraps."""
        return self._inner

    @property
    def name(self) -> str:
        return name_of(self._inner)

    @property
    def priced(self) -> bool | None:
        """Whether what it costs is known beforehand; None where only the call itself will tell."""
        return getattr(self._inner, "priced", None)

    @property
    def identity(self) -> str:
        return self.provider.identity

    @property
    def members(self) -> Sequence[Upstream]:
        """Those of whom any may answer."""
        inner: object = self._inner
        return inner.members if isinstance(inner, Layer) else (self._inner,)

    async def capabilities(self) -> Capabilities:
        return await self.provider.capabilities()

    async def open(self) -> None:
        if isinstance(self._inner, Openable):
            await self._inner.open()

    async def close(self) -> None:
        if isinstance(self._inner, Openable):
            await self._inner.close()


class _Flight:
    """One purchase, shared by all who want it at the same moment; each reads it at its own pace."""

    __slots__ = ("accepts", "ahead", "arrived", "deltas", "key", "parts", "sleepers", "task", "waiters")

    def __init__(self, key: str, terms: Terms) -> None:
        self.key = key
        self.task: asyncio.Task[Reply] | None = None
        self.waiters = 0
        self.deltas: list[Delta] = []
        self.ahead = True
        """Its purchase is counted already, and nothing has been sent yet."""
        self.arrived = False
        """The reply is here and only its storing is left: too late to cancel, it would be paid for and lost."""
        self.accepts = [terms]
        """The terms of all who want it; first of who began it."""
        self.sleepers: list[asyncio.Future[None]] = []
        self.parts: Fingerprint | None = None
        """The fingerprint of the call, once it has been made."""

    async def add(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self._wake()

    def changed(self) -> asyncio.Future[None]:
        """Done at the next delta, or at the end. Cancelling it leaves the flight alone, as `asyncio.shield` does."""
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sleepers.append(sleeper)
        return sleeper

    def _wake(self) -> None:
        sleepers, self.sleepers = self.sleepers, []
        for sleeper in sleepers:
            if not sleeper.done():
                sleeper.set_result(None)

    def landed(self, task: asyncio.Task[Reply]) -> None:
        if not task.cancelled():
            # Its waiters may all have left; the event loop would log the text of the error that they were spared.
            task.exception()
        self._wake()

    def withdraw(self) -> None:
        """Give back what was counted for it where nothing went out."""
        if self.ahead:
            self.ahead = False
            _withdraw(self.accepts[0])


@dataclass(slots=True, eq=False)
class _Lookup:
    """Who is looking a key up just now, and how many purchases of it have landed since."""

    readers: int = 0
    landed: int = 0


class Flights:
    """The purchases that are under way, and who is looking one up. Upstreams of one identity should share them."""

    def __init__(self) -> None:
        self.flying: dict[str, _Flight] = {}
        self.lookups: dict[str, _Lookup] = {}

    def landed(self, flight: _Flight) -> None:
        """It can be joined no more."""
        if self.flying.get(flight.key) is not flight:
            return
        del self.flying[flight.key]
        lookup = self.lookups.get(flight.key)
        if lookup is not None:
            lookup.landed += 1


class Cached(Layer):
    """At most one answer is bought for a key: stored replies first, then a call in flight, then the next layer.

    A reply is stored once it is whole and its step can read it, and only then returned. Errors, interrupted streams
    and unreadable replies never are. A flight ends early when its last waiter has left. Where the store has leases, a
    flight waits for that of another process or machine; a failure there is nobody's here, who then buys.
    """

    def __init__(
        self,
        inner: Upstream,
        cache: Cache | None,
        flights: Flights | None = None,
        *,
        meter: Meter = UNMEASURED,
    ) -> None:
        super().__init__(inner)
        self._meter = meter
        self._cache = cache
        store: object = cache
        self._leases = store if isinstance(store, Lockable) else None
        self._recalling = store if isinstance(store, Recalling) else None
        self._readings = Readings()
        self._flights = Flights() if flights is None else flights
        self._fingerprints = Fingerprints(cache)

    async def send(self, call: Call, terms: Terms) -> Reply:
        if terms.cache.mode == "off":
            # Nobody can join it, so it needs no task of its own.
            _admit(terms)
            return await self._bounded(self._inner.send(call, terms), terms)
        k = key(call, terms.scope)
        flight = self._flights.flying.get(k)
        if flight is None and terms.cache.mode in ("on", "only"):
            hit = None
            began = time.perf_counter()
            known = None if self._recalling is None else self._recalling.recall(k)
            if known is not None:
                # Nothing was awaited, so nothing can have changed since: `_look_up` would come to the same.
                self._meter.stored("get", time.perf_counter() - began)
                hit = self._usable(k, known, terms)
            else:
                came = time.monotonic()
                try:
                    hit = await self._look_up(k, terms)
                finally:
                    tracing.record_waited("cache.lookup", came)
            if hit is not None:
                if terms.emit is not None:
                    await replay(hit, terms.emit)
                return hit
            flight = self._flights.flying.get(k)
            if flight is None and terms.cache.mode == "only":
                raise NotCached(f'step "{terms.step}" is not in the cache, and only cached answers were asked for')
        if flight is not None:
            flight.accepts.append(terms)
            came = time.monotonic()
            with tracing.waiting("cache.flight"), _asking(terms):
                reply = await self._bounded(self._wait(flight, terms), terms)
            self._meter.joined(self.name, time.monotonic() - came)
            return reply.named("joined")
        if terms.deadline is None:
            return await self._lead(k, call, terms)
        return await self._bounded(self._lead(k, call, terms), terms)

    async def keep(self, call: Call, reply: Reply, terms: Terms) -> None:
        """Store the reply as the answer to `call`, which its step got only by asking again."""
        if terms.cache.mode in ("on", "refresh"):
            await self._store(key(call, terms.scope), reply, [terms], await self._parts(None, call, terms))

    async def _lead(self, k: str, call: Call, terms: Terms) -> Reply:
        _admit(terms)
        flight = self._flights.flying[k] = _Flight(k, terms)
        inner = terms
        if terms.emit is not None or terms.deadline is not None:
            inner = replace(terms, emit=flight.add if terms.emit else None, deadline=None)
        flight.task = asyncio.get_running_loop().create_task(self._fly(flight, call, inner))
        flight.task.add_done_callback(flight.landed)
        return await self._wait(flight, terms)

    async def _bounded(self, work: Coroutine[object, object, Reply], terms: Terms) -> Reply:
        """Each waiter has its own deadline; the flight has none."""
        if terms.deadline is None:
            return await work
        scope = asyncio.timeout_at(terms.deadline)
        try:
            async with scope:
                return await work
        except TimeoutError:
            if scope.expired():
                raise DeadlineExceeded(f'the run\'s time was used up at step "{terms.step}"', param="seconds") from None
            raise

    async def _look_up(self, k: str, terms: Terms) -> Reply | None:
        """What is stored. Looked up again where a purchase landed meanwhile, which the look may just have missed."""
        lookup = self._flights.lookups.setdefault(k, _Lookup())
        lookup.readers += 1
        try:
            while True:
                landed = lookup.landed
                hit = await self._stored(k, terms)
                if hit is not None or k in self._flights.flying or landed == lookup.landed:
                    return hit
        finally:
            lookup.readers -= 1
            if not lookup.readers:
                del self._flights.lookups[k]

    async def _stored(self, k: str, terms: Terms) -> Reply | None:
        if self._cache is None:
            return None
        asked = time.perf_counter()
        data = await self._cache.get(k)
        self._meter.stored("get", time.perf_counter() - asked)
        return None if data is None else self._usable(k, data, terms)

    def _usable(self, k: str, data: bytes, terms: Terms) -> Reply | None:
        """What is stored, where it can be read and is not too old, and its step accepts it."""
        try:
            reply = self._readings.of(k, data)
        except ValueError:
            log.warning("a stored reply of %s/%s cannot be read and counts as a miss", terms.program, terms.step)
            return None
        policy = terms.cache
        if policy.max_age is not None or policy.ttl is not None:
            oldest = min(age for age in (policy.max_age, policy.ttl) if age is not None)
            if time.time() - reply.bought_at > oldest:
                return None
        return reply if terms.accept is None or _accepted(reply, terms) else None

    async def _fly(self, flight: _Flight, call: Call, terms: Terms) -> Reply:
        try:
            if self._leases is None:
                return await self._buy(flight, call, terms)
            return await self._buy_in_turn(self._leases, flight.key, flight, call, terms)
        finally:
            self._flights.landed(flight)

    async def _buy_in_turn(self, leases: Lockable, k: str, flight: _Flight, call: Call, terms: Terms) -> Reply:
        """Buy, unless another process is buying just now, or has bought since we looked: then it is there to be had."""
        reader = flight.accepts[0]
        waited = 0.0
        while True:
            async with leases.lease(k) as lease:
                if terms.cache.mode == "refresh" or lease.state == "none":
                    return await self._buy(flight, call, terms)
                if lease.state == "taken":
                    came = time.monotonic()
                    with _asking(terms), tracing.waiting("cache.lease"):
                        await lease.wait()
                    waited += time.monotonic() - came
                found = await self._stored(k, reader)
                if found is not None:
                    flight.withdraw()
                    if not waited:
                        return found
                    self._meter.joined(self.name, waited)
                    return found.named("joined")
                if lease.state == "held":
                    return await self._buy(flight, call, terms)

    async def _buy(self, flight: _Flight, call: Call, terms: Terms) -> Reply:
        flight.ahead = False
        # As soon as it has been sent, when this would do nothing but wait.
        asyncio.get_running_loop().call_soon(self._prepare, flight, call, terms)
        reply = await self._inner.send(call, terms)
        flight.arrived = True
        parts = await self._parts(flight, call, terms)
        came = time.monotonic()
        try:
            await self._store(flight.key, reply, flight.accepts, parts)
        finally:
            tracing.record_waited("cache.store", came)
        return reply

    def _prepare(self, flight: _Flight, call: Call, terms: Terms) -> None:
        if not flight.arrived:
            flight.parts = self._fingerprints.at_once(call, terms.scope)

    async def _parts(self, flight: _Flight | None, call: Call, terms: Terms) -> Fingerprint | None:
        """What tells later why this was bought; also on the span of the step."""
        try:
            parts = None if flight is None else flight.parts
            if parts is None:
                parts = await self._fingerprints.of(call, terms.scope)
        except Exception as error:  # Of the store, which may be anybody's; the reply has been paid for.
            log.info("a call of %s/%s has no fingerprint: %s", terms.program, terms.step, type(error).__name__)
            return None
        tracing.record_parts(trace.get_current_span(), parts)
        return parts

    async def _store(self, k: str, reply: Reply, readers: Sequence[Terms], parts: Fingerprint | None) -> None:
        for reader in readers:
            if _accepted(reply, reader):
                break
        else:
            return
        if self._cache is None:
            return
        try:
            data = reply.dump(parts)
        except ValueError:
            raise UpstreamBroken(f'upstream "{reply.upstream}" answered with text that is not Unicode') from None
        began = time.perf_counter()
        try:
            label = tag(reader.program, reader.step, reader.scope)
            await self._cache.set(k, data, tag=label, ttl=reader.cache.ttl)
            self._meter.stored("set", time.perf_counter() - began)
        except Exception as error:
            # It has been paid for: better an answer that is not kept than none.
            log.warning("a reply of %s/%s could not be stored: %s", reader.program, reader.step, type(error).__name__)

    async def _wait(self, flight: _Flight, terms: Terms) -> Reply:
        task = flight.task
        assert task is not None
        flight.waiters += 1
        sent = 0
        try:
            while True:
                if terms.emit is not None:
                    while sent < len(flight.deltas):
                        await terms.emit(flight.deltas[sent])
                        sent += 1
                if task.done():
                    break
                await flight.changed()
            try:
                reply = task.result()
            except asyncio.CancelledError:
                raise UpstreamBroken(f'upstream "{self.name}" has broken off its own call') from None
            if terms.emit is not None and not sent:
                await replay(reply, terms.emit)
            return reply
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and task.done():
                flight.task = None  # Its error, if it has one, knows the frames that know the flight.
            elif flight.waiters == 0 and not flight.arrived:
                task.cancel()
                flight.withdraw()
                # Nor may it be joined by somebody who comes before it has ended.
                self._flights.landed(flight)
            del task


class Readings:
    """What was lately read from stored bytes, by these bytes themselves: a store that has them in memory gives the same
    object each time, and of the same bytes, which cannot change, the same reply is read, which cannot change either.
    """

    def __init__(self, limit: int = READINGS) -> None:
        self.limit = limit
        self.used = 0
        """Bytes that are known; at most `limit`."""
        self._known: dict[str, tuple[bytes, Reply]] = {}
        """By the key that they are stored under; who was there first leaves first."""

    def of(self, k: str, data: bytes) -> Reply:
        """`Reply.load(data)`."""
        known = self._known.get(k)
        if known is not None and known[0] is data:
            return known[1]
        reply = Reply.load(data)
        if known is not None:
            del self._known[k]
            self.used -= len(known[0])
        # Numbers take many times the room of their text.
        if not reply.logprobs and not reply.embeddings and len(data) <= self.limit // 16:
            self._known[k] = data, reply
            self.used += len(data)
            while self.used > self.limit:
                gone = next(iter(self._known))
                self.used -= len(self._known.pop(gone)[0])
        return reply


def _asking(terms: Terms) -> AbstractContextManager[object]:
    return _NOBODY if terms.budget is None else terms.budget.asking()


_NOBODY: AbstractContextManager[object] = nullcontext()


def _admit(terms: Terms) -> None:
    if terms.budget is not None:
        terms.budget.admit()


def _withdraw(terms: Terms) -> None:
    """Give back what `_admit` counted: nothing went out."""
    if terms.budget is not None:
        terms.budget.calls -= 1


def _accepted(reply: Reply, terms: Terms) -> bool:
    if terms.accept is None:
        return True
    try:
        terms.accept(reply)
    except Exception as error:
        if not isinstance(error, ValueError):
            log.info("the reader of %s/%s raised %s", terms.program, terms.step, type(error).__name__)
        return False
    return True


async def replay(reply: Reply, emit: Emit) -> None:
    """Emit a whole reply as a stream would have brought it."""
    calls = tuple(ToolCallDelta(i, c.id, c.name, c.arguments) for i, c in enumerate(reply.tool_calls))
    if reply.reasoning:
        await emit(Delta(reasoning=reply.reasoning))
    if reply.text or calls:
        await emit(Delta(text=reply.text, tool_calls=calls))


class Routed(Layer):
    """The first of several equals that answers. The first stands for all: equals give the same answers, so theirs are
    one cache entry, under its identity.
    """

    def __init__(self, members: Sequence[Upstream], *, meter: Meter = UNMEASURED) -> None:
        super().__init__(members[0])
        self._members = members
        self._meter = meter

    @property
    def members(self) -> Sequence[Upstream]:
        return self._members

    async def send(self, call: Call, terms: Terms) -> Reply:
        watch = _Watch(terms.emit)
        if terms.emit is not None:
            terms = replace(terms, emit=watch.emit)
        for member in self._members[:-1]:
            try:
                return await member.send(call, terms)
            except UpstreamError as error:
                if watch.emitted or not error.repeatable or not _readmitted(terms):
                    raise
                log.warning("%s; the next of its equals is asked", error)
                self._meter.failed_over(name_of(member), error)
        return await self._members[-1].send(call, terms)

    async def open(self) -> None:
        for member in self._members:
            if isinstance(member, Openable):
                await member.open()

    async def close(self) -> None:
        for member in self._members:
            if isinstance(member, Openable):
                await member.close()


class _Watch:
    """Passes deltas on, and remembers that one has left: after that a call is never made again."""

    __slots__ = ("_emit", "first")

    def __init__(self, emit: Emit | None) -> None:
        self._emit = emit
        self.first: float | None = None

    @property
    def emitted(self) -> bool:
        return self.first is not None

    async def emit(self, delta: Delta) -> None:
        if self.first is None:
            self.first = time.monotonic()
        if self._emit is not None:
            await self._emit(delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """US dollars a million tokens."""

    input: float
    output: float
    cached_input: float | None = None

    def of(self, usage: Usage) -> float:
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = usage.prompt_tokens - usage.cached_tokens
        return (fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output) / 1e6


class Metered(Layer):
    """A call that is really made: its span, who answered and when, what it cost, and the charge to the run's budget."""

    def __init__(
        self,
        inner: Upstream,
        *,
        name: str,
        provider: str,
        model: str,
        address: str | None = None,
        price: Price | None = None,
        meter: Meter = UNMEASURED,
        slots: int | None = None,
    ) -> None:
        super().__init__(inner)
        self._meter = meter
        meter.knows_upstream(name, provider=provider, model=model, address=address, slots=slots)
        self._name = name
        self._provider = provider
        self.model = model
        self.price = price
        self.address = address

    @property
    def provider_name(self) -> str:
        """What spans call who provides it."""
        return self._provider

    @property
    def priced(self) -> bool | None:
        return True if self.price is not None else super().priced

    @property
    def name(self) -> str:
        return self._name

    async def send(self, call: Call, terms: Terms) -> Reply:
        watch = None if terms.emit is None else _Watch(terms.emit)
        started, clock = time.time(), time.monotonic()
        with (
            tracing.call_span(
                call,
                upstream=self._name,
                provider=self._provider,
                model=self.model,
                address=self.address,
                stream=watch is not None,
            ) as span,
            self._meter.call(self._name, kind=call.kind, program=terms.program) as timing,
        ):
            with _asking(terms):
                reply = await self._inner.send(call, terms if watch is None else replace(terms, emit=watch.emit))
            seconds = time.monotonic() - clock
            reply = reply.paid(
                upstream=self._name,
                model=reply.model or self.model,
                cost=self.price.of(reply.usage) if self.price else reply.cost,
                bought_at=started,
                seconds=seconds,
                origin=tracing.origin(span),
            )
            if terms.budget is not None:
                terms.budget.charge(reply.usage, reply.cost)
            self._meter.bought(self._name, terms.program, reply.usage, reply.cost)
            first = None if watch is None or watch.first is None else watch.first - clock
            tracing.record_reply(span, reply, first_delta=first, call=call)
            timing.replied(reply, first_chunk=first)
            return reply


class Retried(Layer):
    """Again after a pause, where the error says that it can help and nothing has been received yet.

    The pause is what the upstream asked for (`retry-after`, up to `patience` seconds), else 0.5 s doubled each time up
    to 8 s, less up to a quarter by chance, so that many callers do not come back in step.
    """

    def __init__(
        self,
        inner: Upstream,
        *,
        retries: int = 2,
        patience: float = 60.0,
        pause: float = 0.5,
        name: str = "",
        meter: Meter = UNMEASURED,
    ) -> None:
        super().__init__(inner)
        self._name = name
        self._meter = meter
        self._retries = retries
        self._patience = patience
        self._pause = pause

    async def send(self, call: Call, terms: Terms) -> Reply:
        watch = _Watch(terms.emit)
        if terms.emit is not None:
            terms = replace(terms, emit=watch.emit)
        started = time.time_ns()
        failed: BaseException
        try:
            reply = await self._inner.send(call, terms)
        except BaseException as error:
            failed = error
        else:
            self._meter.attempted(self._name)
            return reply
        try:
            return await self.again(call, terms, failed, started, lambda: watch.emitted)
        finally:
            # An error knows this frame, and this frame the error: they would wait for the garbage collector.
            del failed

    async def again(
        self, call: Call, terms: Terms, failed: BaseException, started: int, begun: Callable[[], bool]
    ) -> Reply:
        """What follows a first attempt that has `failed`: others, or its error.

        `started` in Unix nanoseconds; `begun` tells whether anything of an answer has been passed on.
        """
        attempts = [tracing.Attempt(started, time.time_ns(), failed)]
        try:
            while True:
                self._meter.attempted(self._name, failed)
                waited = self._pause_after(failed, len(attempts)) if not begun() else -1.0
                if waited < 0 or not _readmitted(terms):
                    raise failed
                _withdraw(terms)
                log.info("%s; asked again in %.1f s", failed, waited)
                self._meter.retried(self._name, failed, waited)
                paused = time.monotonic()
                try:
                    await asyncio.sleep(waited)
                except asyncio.CancelledError:
                    # No attempt follows that would tell of it.
                    tracing.record_wait(trace.get_current_span(), "upstream.pause", time.monotonic() - paused)
                    raise
                # Counted only now: a run that ends in the pause has not made this attempt.
                if not _readmitted(terms):
                    raise failed
                started = time.time_ns()
                try:
                    reply = await self._inner.send(call, terms)
                except BaseException as error:
                    attempts.append(tracing.Attempt(started, time.time_ns(), error, waited))
                    failed = error
                else:
                    attempts.append(tracing.Attempt(started, time.time_ns(), None, waited))
                    self._meter.attempted(self._name)
                    return reply
        finally:
            del failed
            if len(attempts) > 1:
                tracing.record_attempts(trace.get_current_span(), attempts)
            attempts.clear()

    def _pause_after(self, error: BaseException, attempts: int) -> float:
        if not isinstance(error, UpstreamError) or not error.repeatable or attempts > self._retries:
            return -1.0
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self._patience else -1.0
        return min(8.0, self._pause * 2.0 ** (attempts - 1)) * (1 - random.random() / 4)


def _readmitted(terms: Terms) -> bool:
    """Whether the run's limits allow one attempt more; if not, the upstream's own error is the one to tell."""
    try:
        _admit(terms)
    except AsmodelError:
        return False
    return True


class Limited(Layer):
    """At most `slots` calls at a time. Callers take turns, and in each its runs: a long run starves no short one."""

    def __init__(self, inner: Upstream, *, slots: int, name: str = "", meter: Meter = UNMEASURED) -> None:
        super().__init__(inner)
        self._name = name
        self._meter = meter
        self.turns = Turns(slots)

    async def send(self, call: Call, terms: Terms) -> Reply:
        if self.turns.take():
            self._meter.waited(self._name, 0.0)
        else:
            await self._turn(terms)
        self._meter.in_flight(self._name, 1)
        try:
            return await self._inner.send(call, terms)
        finally:
            self._meter.in_flight(self._name, -1)
            self.turns.give()

    async def _turn(self, terms: Terms) -> None:
        came = time.monotonic()
        self._meter.queued(self._name, 1)
        try:
            with tracing.waiting("upstream.queue"):
                await self.turns.wait(terms.scope, terms.run_id)
        finally:
            self._meter.queued(self._name, -1)
        self._meter.waited(self._name, time.monotonic() - came)


class Timed(Layer):
    """`first_byte` seconds until a stream begins, `total` seconds for the whole; time in the queue does not count."""

    def __init__(self, inner: Upstream, *, name: str, first_byte: float, total: float) -> None:
        super().__init__(inner)
        self._name = name
        self.whole = Bounds(total)
        self.beginning = Bounds(min(first_byte, total))

    async def send(self, call: Call, terms: Terms) -> Reply:
        emit = terms.emit
        whole, beginning = self.whole(), self.beginning()
        try:
            if emit is None:
                with whole:
                    return await self._inner.send(call, terms)

            async def began(delta: Delta) -> None:
                beginning.lift()
                await emit(delta)

            with whole, beginning:
                return await self._inner.send(call, replace(terms, emit=began))
        except TimeoutError:
            if whole.expired:
                what, seconds = "finished", self.whole.seconds
            elif beginning.expired:
                what, seconds = "begun", self.beginning.seconds
            else:
                raise
        raise self.late(what, seconds)

    def late(self, what: str, seconds: float) -> UpstreamTimeout:
        """What is raised when a time is over; `what` has not been done to answer: finished, or begun."""
        return UpstreamTimeout(f'upstream "{self._name}" has not {what} to answer within {seconds:g} s')
