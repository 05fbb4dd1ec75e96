"""Leases in Valkey or Redis: one key each, with the holder's token, which ends by itself when the holder dies.

The value is `h` and the token while the lease is held; after it, where the holder has left a note, `n`, the token and
the note for some seconds. A note, or anything that is not ours, holds nobody up.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal

from asmodel.protocols import Lease
from asmodel_plugins.redis_server import Server, Unanswered

# ARGV[1] is `h` and the token. Sent twice, because a connection broke, each does what it has done already.
_TAKE = """
local now = redis.call('GET', KEYS[1])
if now and now ~= ARGV[1] and string.sub(now, 1, 1) == 'h' then return now end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
_GIVE_BACK = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

_TOKEN_BYTES = 16
_NOTE_BYTES = 16 * 1024
_NOTE_MS = 5000
"""Longer than the slowest waiter takes to look again."""

_FIRST_POLL, _LAST_POLL = 0.005, 0.05
_POLLERS = 50
"""With more who wait in one process each looks more seldom, so that together they ask a thousand times a second."""


class RedisLeases:
    """The leases of one event loop."""

    def __init__(self, server: Server, prefix: bytes) -> None:
        self.server = server
        self.waiting = 0
        self._prefix = prefix

    @asynccontextmanager
    async def lease(self, key: str, seconds: float) -> AsyncGenerator[Lease]:
        lease = _Lease(self, self._prefix + key.encode(), seconds)
        taking = self.server.later(lease.take())
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(lambda _: self.server.later(lease.give_back()))
            raise
        if lease.state == "held":
            self.server.later(lease.keep())
        elif lease.unsure:
            self.server.later(lease.give_back_after())
        try:
            yield lease
        finally:
            # Not waited for: whoever waits looks again in a moment, and a store that fails now costs nobody a second.
            lease.over.set()


class _Lease:
    """One's place before a key. Where the store does not answer it is as if there were no leases."""

    def __init__(self, leases: RedisLeases, name: bytes, seconds: float) -> None:
        self.state: Literal["held", "taken", "none"] = "none"
        self.unsure = False
        """Whether it may be ours although no answer came: then it should be in nobody's way."""
        self.over = asyncio.Event()
        self._leases = leases
        self._server = leases.server
        self._name = name
        self._seconds = seconds
        self._mine = b"h" + secrets.token_bytes(_TOKEN_BYTES)
        self._theirs = b""
        self._note = b""

    async def take(self) -> None:
        """Once; and again to keep it, for a store that came back empty has forgotten it."""
        try:
            ms = max(1, round(self._seconds * 1000))
            holder: object = await self._server.ask("EVAL", _TAKE, 1, self._name, self._mine, ms)
        except Unanswered as unanswered:
            self.unsure = unanswered.sent
            self._server.count("unlocked")
            self._server.tell(unanswered, "leases cannot be had")
            return
        if holder is None:
            self.state = "held"
        elif isinstance(holder, bytes):
            self.state, self._theirs = "taken", holder
        else:
            self._server.count("unlocked")

    async def keep(self) -> None:
        """Until it is over, or somebody else's because we stood still or the store forgot it; then give it back."""
        while not self.over.is_set():
            try:
                async with asyncio.timeout(self._seconds / 3):
                    await self.over.wait()
            except TimeoutError:
                await self.take()
                if self.state == "taken":
                    self._server.count("unlocked")
                    return
        await self.give_back()

    async def give_back_after(self) -> None:
        await self.over.wait()
        await self.give_back()

    async def give_back(self) -> None:
        """Now, or when the store is back, so that nobody waits for one that has left; after `seconds` it has ended."""
        note = b"n" + self._mine[1:] + self._note if self._note else b""
        end = time.monotonic() + self._seconds
        while (left := end - time.monotonic()) > 0:
            try:
                await self._server.ask("EVAL", _GIVE_BACK, 1, self._name, self._mine, note, _NOTE_MS)
                return
            except Unanswered as unanswered:
                if unanswered.why == "refused":
                    self._server.tell(unanswered, "leases cannot be given back")
                    return
            if not await self._server.well_again(left):
                return

    def leave(self, note: bytes) -> None:
        if len(note) > _NOTE_BYTES:
            raise ValueError(f"a note of {len(note)} bytes is too long; {_NOTE_BYTES} is the most")
        self._note = note

    async def wait(self) -> bytes | None:
        if self.state != "taken":
            return None
        left = b"n" + self._theirs[1:]
        pause = _FIRST_POLL
        self._leases.waiting += 1
        try:
            while True:
                await asyncio.sleep(pause * random.uniform(0.75, 1.0))
                try:
                    now: object = await self._server.ask("GET", self._name)
                except Unanswered:
                    self._server.count("unlocked")
                    return None
                if now != self._theirs:
                    return now[len(left) :] if isinstance(now, bytes) and now.startswith(left) else None
                pause = min(1.5 * pause, _LAST_POLL * max(1.0, self._leases.waiting / _POLLERS))
        finally:
            self._leases.waiting -= 1
