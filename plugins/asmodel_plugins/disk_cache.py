"""The step cache on local disk: SQLite by way of diskcache, made safe to read and cheap to wait for.

What is in the folder, and what is done to one that cannot be used: `disk_folder`. What is in the store: `disk_store`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from asmodel.errors import AsmodelError, ConfigurationError
from asmodel.protocols import Lease
from asmodel_plugins.disk_folder import OtherFormat, examine, take
from asmodel_plugins.disk_lease import DiskLeases
from asmodel_plugins.disk_store import CHUNK_ROWS, OURS, Retired, Row, Store, Unreadable, fault_of
from asmodel_plugins.disk_writer import Writer

T = TypeVar("T")

log = logging.getLogger("asmodel.cache")

_LOOK_SECONDS = 0.5
"""How often a reader looks whether its store is still the one in the folder (the writer always does)."""

_REPAIR_SECONDS = 60.0
"""A store that breaks again sooner than this stays off: the disk is the trouble, not the store."""

_RETRY_SECONDS = 5.0
_EXPIRE_SECONDS = 60.0
_MEASURE_SECONDS = 1.0


@dataclass(slots=True)
class Troubles:
    """What went wrong since the store was made; each kind is also logged, once."""

    unreadable: int = 0
    """Gets that missed because the row, or the store, could not be read."""
    late: int = 0
    """Gets that missed because another process kept the store locked for longer than `read_timeout`."""
    unstored: int = 0
    """Sets that returned without having stored: disk full, read-only, locked for longer than `timeout`."""
    set_aside: int = 0
    """Stores that this process set aside."""


class DiskCache:
    """Bytes by key on local disk, for any number of tasks, event loops and processes at once.

    A `get` finds what was lately read or written in memory (about 2 us), or reads it on the event loop (about 6 us),
    and never waits there: while another process has the store locked it tries again, for `read_timeout` seconds at
    most, and then misses. What anybody has cleared or replaced is found in memory no more, in whatever process.

    A `set` is written by one thread that commits whatever has gathered, and returns when the commit is done: the entry
    survives a `kill -9`, power loss may take the last second. `size_limit` bytes of database are kept, the oldest
    entries leave first; what left for want of room may be found in memory for a while.

    Nothing that the folder holds can stop or mislead a run. What cannot be read is a miss, what cannot be written is
    not stored, a store that cannot be used is set aside; each is counted in `troubles` and logged once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "~/.cache/asmodel",
        size_limit: int = 2**30,
        timeout: float = 5.0,
        read_timeout: float = 0.5,
        memory_bytes: int = 16_000_000,
    ) -> None:
        """`size_limit` in bytes of disk, `memory_bytes` of each process's memory (0: none); `timeout` is how long, in
        seconds, a write waits for other processes' writes.
        """
        expanded = os.path.expanduser(path)
        if os.fspath(expanded).startswith("~"):
            raise ConfigurationError(f'[cache] path: "{expanded}" starts at a home folder that is not known; set HOME')
        self.path = Path(os.path.abspath(expanded))
        if os.path.expandvars(self.path) != str(self.path):
            raise ConfigurationError(f'[cache] path: "{self.path}" holds a variable; write the folder itself')
        if size_limit < 2**20:
            raise ConfigurationError(f"[cache] size_limit: {size_limit} bytes are too few; at least {2**20} are needed")
        if memory_bytes < 0:
            raise ConfigurationError(f"[cache] memory_bytes: {memory_bytes} is not a number of bytes; 0 keeps nothing")
        self.size_limit = size_limit
        self.memory_bytes = memory_bytes
        self.timeout = timeout
        self.read_timeout = read_timeout
        self.troubles = Troubles()
        self._synchronous = 1
        self._store: Store | None = None
        # At most what lies above the limit until it is evicted.
        self._writer = Writer(self._write, self._tidy, batch_bytes=size_limit // 8)
        self._pool: ThreadPoolExecutor | None = None
        self._guard = threading.Lock()
        self._leases = DiskLeases(self.path / "leases")
        self._told: set[str] = set()
        self._set_aside_at = -_REPAIR_SECONDS
        self._retry_at = 0.0
        self._expire_at = 0.0
        self._measure_at = 0.0
        self._written = 0

    def lasting(self) -> DiskCache:
        """A store in a folder of its own within this one, without a limit, whose entries survive the power too."""
        made = DiskCache(self.path / "effects", 2**62, self.timeout, self.read_timeout, memory_bytes=0)
        made._synchronous = 2
        return made

    # Life

    async def open(self) -> None:
        """Make or take the folder. Raises ConfigurationError where it cannot be this user's private folder."""
        if self._writer.is_running:
            return
        await asyncio.to_thread(self._begin)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="asmodel-cache-reader")
        self._writer.start()
        await self.get("")  # connects this thread now rather than in the first request

    def _begin(self) -> None:
        try:
            self._store = self._take(running=False)
            self._store.close()  # this thread was only lent, and is no reader of ours
        except sqlite3.Error as error:
            if fault_of(error) == "busy":
                raise ConfigurationError(
                    f'another process has kept the cache store in "{self.path}" locked for {self.timeout:g} s; stop '
                    "it, or set another [cache] path"
                ) from error
            raise ConfigurationError(f'the cache store in "{self.path}" cannot be opened: {error}') from error
        except OSError as error:
            raise ConfigurationError(
                f'the cache folder "{self.path}" cannot be used: {error.strerror}; set [cache] path to a folder that '
                'can be written, or kind = "memory"'
            ) from error

    async def close(self) -> None:
        """Write what is waiting, then let go of the folder. The store may be opened again."""
        thread = self._writer.end()
        if thread is not None:
            await asyncio.shield(asyncio.to_thread(self._end, thread))

    def _end(self, writer: threading.Thread) -> None:
        writer.join()
        if self._pool is not None:
            self._pool.shutdown()
        self._leases.close()
        store, self._store = self._store, None
        if store is not None:
            store.retire()

    def lease(self, key: str, seconds: float = 10.0) -> AbstractAsyncContextManager[Lease]:
        """Try to be the one who acts on `key`, of this machine's processes; see `asmodel.protocols.Lockable`."""
        return self._leases.lease(key, seconds)

    # Reading

    def recall(self, key: str) -> bytes | None:
        """What is in memory, as `get` would find it there; None where something else is to be done, or looked at."""
        store = self._store
        if store is None or time.monotonic() >= store.look_at:
            return None
        return store.recall(key)

    async def get(self, key: str) -> bytes | None:
        deadline: float | None = None
        large = False
        while True:
            store = self._store
            if store is None:
                self._off()
                return None
            now = time.monotonic()
            if now >= store.look_at:
                store.look_at = now + _LOOK_SECONDS
                if store.moved():
                    self._ask(store, None)
                    return None
            try:
                return await self._in_thread(store.load, key) if large else store.look(key)
            except Unreadable as error:
                self._trouble("unreadable", str(error), "found %s in the cache: it is a miss, and was not run", error)
                return None
            except Retired:
                if self._store is store:
                    return None
                continue
            except sqlite3.Error as error:
                fault = fault_of(error)
                if fault == "large" and not large:
                    large = True
                    continue
                if fault != "busy":
                    self._trouble("unreadable", f"read: {fault}", "a cache entry could not be read: %s", error)
                    self._ask(store, error)
                    return None
            if deadline is None:
                deadline = now + self.read_timeout
            elif now >= deadline:
                self._trouble("late", "late", "the cache stayed locked for %g s: a miss", self.read_timeout)
                return None
            await asyncio.sleep(0.005)

    def _off(self) -> None:
        if not self._writer.is_running:
            raise RuntimeError("the disk cache is not open")
        self._trouble("unreadable", "off", "the cache is off, until its folder can be used again: every get is a miss")
        self._wake()

    def _wake(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._writer.ask(self._usable)

    def _ask(self, store: Store, error: sqlite3.Error | None) -> None:
        """Have the writer thread look at a store that moved or failed, once however many readers notice."""
        if not store.suspect:
            store.suspect = True
            self._writer.ask(lambda: self._recover(store, error))

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        if self._pool is None or not self._writer.is_running:
            raise RuntimeError("the disk cache is not open")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    # Writing

    async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
        (key + tag).encode()  # lone surrogates are the caller's mistake, so they are raised here
        if not isinstance(value, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not be typed
            raise TypeError(f"a cached value is bytes, not {type(value).__name__}")
        if len(value) > self.size_limit // 2:
            self._trouble(
                "unstored", "large", "a value of %d bytes was not stored: the cache has %d", len(value), self.size_limit
            )
            return
        await self._writer.set(Row(key, bytes(value), tag, ttl))

    def _write(self, batch: Sequence[Row]) -> None:
        try:
            self._commit(batch)
        except Exception as error:
            self._trouble("unstored", "writer", "entries were not stored: %s", type(error).__name__, n=len(batch))
            raise

    def _commit(self, batch: Sequence[Row]) -> None:
        # The one there was. Whether it is the one in the folder has to be seen once it is written to; to look before as
        # well would be one wait more for the interpreter, which is let go of meanwhile.
        store = self._store
        for attempt in range(3):
            if store is None or attempt:
                store = self._usable()
            if store is None:
                break
            try:
                store.write(batch, self.timeout)
            except (sqlite3.Error, OSError) as error:
                if self._recover(store, error):
                    continue
                self._trouble(
                    "unstored", f"write: {fault_of(error)}", "entries were not stored: %s", error, n=len(batch)
                )
                return
            self._written += sum(len(row.value) for row in batch)
            # Another process may have set the store aside while we committed to it.
            if not store.moved():
                return
        self._trouble("unstored", "off", "entries were not stored: the cache is off", n=len(batch))

    def _usable(self) -> Store | None:
        """The store that is in the folder now. In the writer thread."""
        store = self._store
        if store is not None and not store.moved():
            return store
        if store is not None or time.monotonic() >= self._retry_at:
            self._replace(store, damaged=None)
        return self._store

    def _recover(self, store: Store, error: sqlite3.Error | OSError | None) -> bool:
        """After an error, or a suspicion: whether there is another store now. In the writer thread."""
        if self._store is not store:
            return self._store is not None
        store.suspect = False
        if store.moved():
            return self._replace(store, damaged=None)
        if error is None or fault_of(error) in ("busy", "large", "refused"):
            return False
        why: str | None = str(error)
        if fault_of(error) == "odd":
            try:
                why = examine(self.path / "store", self.timeout)
            except (sqlite3.Error, OtherFormat, OSError):
                why = None
        return why is not None and self._replace(store, damaged=why)

    def _replace(self, store: Store | None, *, damaged: str | None) -> bool:
        """Put the store that is in the folder, or a new one, in the place of this one; off where that fails."""
        self._store = None
        now = time.monotonic()
        self._retry_at = now + _RETRY_SECONDS
        try:
            if damaged is not None and now < self._set_aside_at + _REPAIR_SECONDS:
                self._retry_at = self._set_aside_at + _REPAIR_SECONDS
                log.warning(
                    'the cache store in "%s" broke again: %s. The cache is off for a minute', self.path, damaged
                )
                return False
            broken = None if store is None or damaged is None else (store, damaged)
            self._store = self._take(damaged=broken, running=True)
        except (sqlite3.Error, OSError, ConfigurationError, OtherFormat) as error:
            self._told_once("replace", "the cache is off until its folder can be used again: %s", error)
        finally:
            if store is not None:
                store.retire()
        return self._store is not None

    def _take(self, *, damaged: tuple[Store, str] | None = None, running: bool) -> Store:
        make = partial(Store, synchronous=self._synchronous, memory_bytes=self.memory_bytes)
        store, was_set_aside = take(self.path, make, self.timeout, damaged=damaged, running=running)
        if was_set_aside:
            self._set_aside_at = time.monotonic()
            self._count("set_aside", 1)
        return store

    def _tidy(self, evicting: bool) -> bool:
        """Look after the store, once nobody waits for what was written; says whether there is more to evict."""
        store = self._store
        if store is None:
            return False
        try:
            store.settle()
            now = time.monotonic()
            if now >= self._expire_at and store.delete_expired(self.timeout) < CHUNK_ROWS:
                store.mend(self.timeout)
                self._expire_at = now + _EXPIRE_SECONDS
            # Other processes write too, so what this one has written does not tell.
            if not evicting and now < self._measure_at and self._written < self.size_limit // 64:
                return False
            self._measure_at = now + _MEASURE_SECONDS
            self._written = 0
            return self._evict(store, evicting)
        except (sqlite3.Error, OSError) as error:
            if fault_of(error) != "busy":
                self._told_once("evict", "the cache could not be made smaller: %s", error)
                self._recover(store, error)
            return False

    def _evict(self, store: Store, evicting: bool) -> bool:
        """Delete some of what is too much; says whether there is more. Ends at nine tenths, not to be always at it."""
        if store.used() <= self.size_limit * (0.9 if evicting else 1.0):
            return False
        deleted, _ = store.remove_rows("TRUE", (), self.timeout, told=False)
        # A chunk between two batches, unless writes outrun that.
        while deleted and store.used() > self.size_limit * 1.1:
            deleted, _ = store.remove_rows("TRUE", (), self.timeout, told=False)
        return deleted > 0

    # What it holds

    async def entries(self) -> AsyncIterator[tuple[str, str, int]]:
        """Key, tag and size in bytes of each entry; those written while it runs may be missing."""
        after = 0
        while rows := await self._rows(
            f"SELECT rowid, key, tag, size FROM Cache WHERE rowid > ? AND {OURS}"
            " AND (expire_time IS NULL OR expire_time > ?) ORDER BY rowid LIMIT 500",
            (after, time.time()),
        ):
            for row, key, tag, size in rows:
                yield str(key), str(tag or ""), int(size)
                after = row

    async def clear(self, tag: str | None = None, older_than: float | None = None) -> int:
        """Delete every entry, those of one tag, or those written over `older_than` seconds ago; says how many.

        Raises AsmodelError where the store cannot be written, with what was deleted until then deleted.
        """
        where, values = "rowid > ? AND rowid <= ?", list[object]()
        if tag is not None:
            where, values = f"{where} AND tag = ?", [*values, tag]
        if older_than is not None:
            where, values = f"{where} AND store_time < ?", [*values, time.time() - older_than]
        rows = await self._rows("SELECT COALESCE(MAX(rowid), 0) FROM Cache", ())
        last = int(rows[0][0]) if rows else 0
        total = after = 0
        # One job a chunk, so that sets get their turn in between.
        while after < last:
            limits = (after, last, *values)
            deleted, after = await self._writer.job(partial(self._delete, where, limits))
            total += deleted
            if not deleted:
                break
        while total and await self._writer.job(self._shrink):
            continue
        return total

    def _delete(self, where: str, values: Sequence[object]) -> tuple[int, int]:
        try:
            return self._required().remove_rows(where, values, self.timeout, told=True)
        except (sqlite3.Error, OSError) as error:
            raise AsmodelError(f'the cache in "{self.path}" could not be cleared: {error}') from error

    def _shrink(self) -> bool:
        try:
            return self._required().shrink()
        except sqlite3.Error as error:  # the entries are gone; only their room is still taken
            self._told_once("shrink", "what was cleared was not given back to the file system: %s", error)
            return False

    async def stats(self) -> dict[str, Any]:
        """Entries and bytes, in all and by tag; where the store is, its limit in bytes, and the troubles so far."""
        rows = await self._rows(
            f"SELECT tag, COUNT(*), SUM(size) FROM Cache WHERE {OURS} AND (expire_time IS NULL OR expire_time > ?)"
            " GROUP BY tag ORDER BY tag",
            (time.time(),),
        )
        tags = {str(tag or ""): {"entries": int(count), "bytes": int(size)} for tag, count, size in rows}
        return {
            "entries": sum(t["entries"] for t in tags.values()),
            "bytes": sum(t["bytes"] for t in tags.values()),
            "tags": tags,
            "path": str(self.path),
            "size_limit": self.size_limit,
            "troubles": asdict(self.troubles),
        }

    async def _rows(self, statement: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        """Rows of the store, read in a thread; none while it cannot be read."""
        deadline = time.monotonic() + self.timeout
        while True:
            store = self._store
            if store is None:
                self._off()
                return []
            try:
                return await self._in_thread(store.rows, statement, values)
            except Retired:
                if self._store is store:
                    return []
            except sqlite3.Error as error:
                if fault_of(error) != "busy" or time.monotonic() >= deadline:
                    self._trouble("unreadable", f"list: {fault_of(error)}", "the cache could not be listed: %s", error)
                    self._ask(store, error)
                    return []
                await asyncio.sleep(0.01)

    def _required(self) -> Store:
        store = self._usable()
        if store is None:
            raise AsmodelError(f'the cache in "{self.path}" is off: its folder cannot be used')
        return store

    # Troubles

    def _count(self, kind: Literal["unreadable", "late", "unstored", "set_aside"], n: int) -> None:
        with self._guard:
            setattr(self.troubles, kind, getattr(self.troubles, kind) + n)

    def _trouble(
        self, kind: Literal["unreadable", "late", "unstored"], what: str, message: str, *args: object, n: int = 1
    ) -> None:
        self._count(kind, n)
        self._told_once(f"{kind}: {what}", message, *args)

    def _told_once(self, what: str, message: str, *args: object) -> None:
        with self._guard:
            if what in self._told:
                return
            self._told.add(what)
        log.warning(message + " (said once; %s)", *args, self.path)
