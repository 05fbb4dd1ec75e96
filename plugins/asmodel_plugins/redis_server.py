"""Asking a Valkey or Redis server that nobody needs: within a bound, and not again while it fails."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from asmodel.errors import ConfigurationError
from asmodel_plugins.redis_address import Address, Client, errors

log = logging.getLogger("asmodel.cache")

_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0
"""Seconds between two probes of a server that failed."""

_FLAPPING_SECONDS = 30.0
"""A server that fails again sooner than this goes on with its longer pauses."""

_QUIET_SECONDS = 60.0
"""From one warning of an outage to the next."""

_FINAL = (errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError)
"""Refusals that time does not heal."""

_BUSY_SECONDS = 0.01
"""A timer that is later than this is of a busy event loop, which is no slow server: the answer gets as long again."""

Why: TypeAlias = Literal["late", "unreachable", "refused"]


class Unanswered(Exception):
    """The server gave no answer, or a refusal; says so in words for the log, unless it is in the log already."""

    def __init__(self, why: Why, reason: str = "", *, sent: bool = True) -> None:
        super().__init__(reason)
        self.why: Why = why
        self.sent = sent
        """Whether it may have been done all the same."""


@dataclass(slots=True)
class Troubles:
    """What went wrong since the store was made. An outage is logged as one, anything else once a kind."""

    unreadable: int = 0
    """Gets that missed because what the store had is not ours, or not whole."""
    late: int = 0
    """Gets that missed because no answer came within `timeout`."""
    unreachable: int = 0
    """Gets that missed because the store refused, could not be asked, or is left alone after a failure."""
    unstored: int = 0
    """Sets that returned with no word from the store that it has the entry."""
    unlocked: int = 0
    """Leases that could not be asked for, waited for or kept: whoever wanted one acts without."""
    outages: int = 0
    """Times that the store was left alone until it answered a probe."""


class Server:
    """A server, or many that are one. After a failure it is left alone until it has answered a probe.

    The probes are made in the background, the first after 0.1 s, then ever more seldom, up to every 5 s. Of a cluster
    that has lost slots for good each probe asks another node, so that it is used little, and holds nobody up.
    """

    def __init__(self, url: str, *, timeout: float, connections: int, probe: bytes) -> None:
        """`timeout` in seconds, for an answer and whatever it needs; `probe` is the start of a key to ask for."""
        self.address = Address(url)
        self.timeout = timeout
        self.troubles = Troubles()
        self._connections = connections
        self._probe = probe
        self._client: Client | None = None
        self._slots = asyncio.Semaphore(connections)
        self._asking: set[asyncio.Task[Any]] = set()
        self._later: set[asyncio.Task[None]] = set()
        self._prober: asyncio.Task[None] | None = None
        self._closing = False
        self._pause = _FIRST_PAUSE
        self._well_since = float("-inf")
        self._quiet_until = float("-inf")
        self._told: set[str] = set()

    async def open(self) -> None:
        """Connect, if the server is there. Raises ConfigurationError where it says that it will never have us."""
        if self._client is not None:
            return
        self.address.check_files()
        self._closing = False
        # A caller waits `timeout` in all, and leaves what goes on after it to the background, where it ends by this.
        self._client = self.address.client(self._connections + 1, self.timeout + 1.0)
        try:
            await self.ask("GET", self._probe_key(), patience=max(1.0, 4 * self.timeout))
        except Unanswered as unanswered:
            cause = unanswered.__cause__
            if isinstance(cause, _FINAL) or (isinstance(cause, errors.ResponseError) and "DB index" in str(cause)):
                await self.close()
                raise ConfigurationError(
                    f"[cache] url: the store at {self.address.place} answers {short(cause)}; write "
                    "redis://USER:PASSWORD@HOST:PORT/DB with a user who may use its prefix, and a database that it has"
                ) from cause

    async def close(self) -> None:
        """Let what is under way end, then hang up."""
        if self._client is None:
            return
        self._closing = True
        if self._prober is not None:
            self._prober.cancel()
        while self._later:
            await asyncio.wait(self._later)
        client, self._client, self._prober = self._client, None, None
        while self._asking:
            await asyncio.wait(self._asking)
        try:
            await client.aclose()
        except (errors.RedisError, OSError) as error:
            log.debug(
                "the connections to the cache at %s were not closed in order: %s", self.address.place, short(error)
            )

    # Asking

    async def ask(self, *words: bytes | str | int, patience: float | None = None) -> Any:
        """The answer to one command. Raises Unanswered, after `patience` (or `timeout`) seconds at the latest."""
        loop = asyncio.get_running_loop()
        patience = self.timeout if patience is None else patience
        deadline = loop.time() + patience
        client = self._required()
        if self._prober is not None:
            raise Unanswered("unreachable", sent=False)
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError:  # that many callers, or a server that fails: those who have the slots find out
            reason = f"all {self._connections} connections were busy for {patience:g} s"
            raise Unanswered("late", reason, sent=False) from None
        # Never cancelled: a connection left in mid-sentence is of no use to the next. The socket's timeout ends it.
        task = self._start(client, *words)
        await asyncio.wait((task,), timeout=max(0.0, deadline - loop.time()))
        if not task.done() and (late := loop.time() - deadline) > _BUSY_SECONDS:
            await asyncio.wait((task,), timeout=min(late, patience))
        if not task.done():
            self._leave_alone(client, f"no answer within {patience:g} s")
            raise Unanswered("late")
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, errors.ResponseError) and not isinstance(error, errors.ClusterDownError):
            raise Unanswered("refused", short(error)) from error
        self._leave_alone(client, short(error))
        raise Unanswered("unreachable") from error

    def _start(self, client: Client, *words: bytes | str | int) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(_run(client.execute_command(*words)))
        self._asking.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._slots.release()
        self._asking.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if the caller has left

    def _required(self) -> Client:
        if self._client is None:
            raise RuntimeError("the redis cache is not open")
        return self._client

    async def each(self, commands: Sequence[tuple[bytes | str | int, ...]]) -> list[Any]:
        """The answers to commands that are sent at once, None for those that were refused. Raises Unanswered."""
        if not commands:
            return []
        pipeline = self._required().pipeline(transaction=False)
        for words in commands:
            pipeline.execute_command(*words)
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except Exception as error:  # whatever redis-py makes of what it was sent
            raise Unanswered("unreachable", short(error)) from error
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, errors.ResponseError):
                raise Unanswered("unreachable", short(answer)) from answer
        return [None if isinstance(answer, Exception) else answer for answer in answers]

    async def names(self, start: bytes, page: int) -> AsyncGenerator[list[bytes]]:
        """The keys that begin with `start`, each once, some at a time, by SCAN. Raises Unanswered."""
        seen: set[int] = set()  # SCAN may give a key twice. Hashes, because there may be millions
        names: list[bytes] = []
        scan = self._required().scan_iter(match=_literally(start) + b"*", count=page)
        while True:
            try:
                name = await anext(scan, None)
            except Exception as error:  # whatever redis-py makes of what it was sent
                raise Unanswered("unreachable", short(error)) from error
            if name is None:
                break
            if hash(name) not in seen:
                seen.add(hash(name))
                names.append(name)
            if len(names) >= page:
                yield names
                names = []
        if names:
            yield names

    def later(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Have something done in the background, before the end."""
        task = asyncio.get_running_loop().create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return task

    # Leaving it alone

    def _leave_alone(self, client: Client, reason: str) -> None:
        if self._prober is not None or self._client is not client or self._closing:
            return
        now = time.monotonic()
        if now - self._well_since > _FLAPPING_SECONDS:
            self._pause = _FIRST_PAUSE
        self.troubles.outages += 1
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_SECONDS
            log.warning(
                "the cache at %s cannot be used: %s. Steps are bought without it until it answers (told once a minute)",
                self.address.place,
                reason,
            )
        self._prober = asyncio.get_running_loop().create_task(self._until_it_answers(client))

    async def _until_it_answers(self, client: Client) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(self._pause * random.uniform(1.0, 1.25))  # many machines, one server that comes back
            self._pause = min(2 * self._pause, _LAST_PAUSE)
            await self._slots.acquire()
            task = self._start(client, "GET", self._probe_key())
            await asyncio.wait((task,), timeout=self.timeout)
            # A server that refuses answers, and as fast as any.
            if task.done() and isinstance(task.exception(), errors.ResponseError | None):
                break
        self._prober = None
        self._well_since = time.monotonic()
        log.info("the cache at %s answers again, after %.1f s", self.address.place, self._well_since - began)

    async def well_again(self, seconds: float) -> bool:
        """Wait until it has answered a probe; says whether it has, within so many seconds and before the end."""
        if self._prober is None:
            await asyncio.sleep(min(0.1, seconds))  # not that failure: the connections were busy
        else:
            await asyncio.wait((self._prober,), timeout=seconds)
        return self._prober is None and not self._closing

    def _probe_key(self) -> bytes:
        return self._probe + secrets.token_hex(4).encode()  # another node of a cluster each time

    # Troubles

    def count(self, kind: Literal["unreadable", "late", "unreachable", "unstored", "unlocked"]) -> None:
        setattr(self.troubles, kind, getattr(self.troubles, kind) + 1)

    def tell(self, unanswered: Unanswered, what: str) -> None:
        if reason := str(unanswered):
            self.tell_once(f"{what}: {unanswered.why}: {reason}", "%s: %s", what, reason)

    def tell_once(self, what: str, message: str, *args: object) -> None:
        if what not in self._told and len(self._told) < 100:
            self._told.add(what)
            log.warning(message + " (said once; %s)", *args, self.address.place)


def short(error: BaseException | None) -> str:
    """What a failure was, for the log. Not all of it: a server that does not know a command quotes its arguments."""
    text = str(error).partition("\n")[0].partition(", with args")[0]
    if isinstance(error, errors.ResponseError) or not isinstance(error, errors.RedisError | OSError):
        text = text.partition(":")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _literally(text: bytes) -> bytes:
    """A pattern that matches just this text."""
    return b"".join(b"\\" + bytes((c,)) if c in b"*?[]^\\" else bytes((c,)) for c in text)


async def _run(answer: Awaitable[Any]) -> Any:
    return await answer
