"""The step cache in memory: for tests, for one process, and for machines without a disk to write to."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from asmodel.errors import ConfigurationError

_OVERHEAD = 256
"""Bytes that an entry takes besides its value, so that many empty values do not count as nothing."""


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    tag: str
    written: float
    expires: float | None

    @property
    def cost(self) -> int:
        return len(self.value) + _OVERHEAD


class MemoryCache:
    """The last used entries that fit into `size_limit` bytes. It ends with the process, `kill -9` or not.

    Nothing here waits, so the tasks of one event loop cannot disturb each other; another thread needs one of its own.
    """

    def __init__(self, size_limit: int = 64 * 2**20) -> None:
        if size_limit <= 0:
            raise ConfigurationError(f"[cache] size_limit: {size_limit} is not a number of bytes above 0")
        self.size_limit = size_limit
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._used = 0

    def lasting(self) -> MemoryCache:
        """A store without a limit; it ends with the process all the same."""
        return MemoryCache(2**62)

    async def get(self, key: str) -> bytes | None:
        return self.recall(key)

    def recall(self, key: str) -> bytes | None:
        """All that it has is in memory, so this is all that `get` does."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not _alive(entry, time.monotonic()):
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
        """Store; what is larger than the whole cache is not kept. `ttl` in seconds."""
        if not isinstance(value, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not be typed
            raise TypeError(f"a cached value is bytes, not {type(value).__name__}")
        now = time.monotonic()
        self._drop(key)
        entry = _Entry(bytes(value), tag, now, None if ttl is None else now + ttl)
        if entry.cost > self.size_limit:
            return
        self._entries[key] = entry
        self._used += entry.cost
        while self._used > self.size_limit:
            self._drop(next(iter(self._entries)))

    async def entries(self) -> AsyncIterator[tuple[str, str, int]]:
        """Key, tag and size in bytes of each entry, as they were when it began."""
        now = time.monotonic()
        for key, entry in list(self._entries.items()):
            if _alive(entry, now):
                yield key, entry.tag, len(entry.value)

    async def clear(self, tag: str | None = None, older_than: float | None = None) -> int:
        """Delete every entry, those of one tag, or those written over `older_than` seconds ago; says how many."""
        before = None if older_than is None else time.monotonic() - older_than
        gone = [
            key
            for key, entry in self._entries.items()
            if (tag is None or entry.tag == tag) and (before is None or entry.written < before)
        ]
        for key in gone:
            self._drop(key)
        return len(gone)

    async def stats(self) -> dict[str, Any]:
        """Entries and bytes, in all and by tag; the limit in bytes."""
        tags: dict[str, dict[str, int]] = {}
        async for _, tag, size in self.entries():
            count = tags.setdefault(tag, {"entries": 0, "bytes": 0})
            count["entries"] += 1
            count["bytes"] += size
        return {
            "entries": sum(t["entries"] for t in tags.values()),
            "bytes": sum(t["bytes"] for t in tags.values()),
            "tags": dict(sorted(tags.items())),
            "size_limit": self.size_limit,
        }

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._used -= entry.cost


def _alive(entry: _Entry, now: float) -> bool:
    return entry.expires is None or entry.expires > now
