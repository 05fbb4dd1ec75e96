"""The one thread that changes a store: whatever has gathered while it was busy is its next batch."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from asmodel_plugins.disk_store import Row

T = TypeVar("T")

log = logging.getLogger("asmodel.cache")

_TOGETHER = 64
_BATCH_ROWS = 512
_BATCH_BYTES = 16 * 2**20


@dataclass(slots=True, eq=False)
class _Entries:
    """What one event loop has to store, and who waits for each."""

    loop: asyncio.AbstractEventLoop
    rows: list[Row] = field(default_factory=list[Row])
    waiting: list[asyncio.Future[None]] = field(default_factory=list[asyncio.Future[None]])
    size: int = 0
    """Bytes of the values."""


@dataclass(slots=True, eq=False)
class _Job:
    """Work that is no entry; `settle` is told the result, or the error."""

    work: Callable[[], object]
    settle: Callable[[object, Exception | None], None] | None = None


class Writer:
    """Writes batches by `write`, which never raises, and tells whoever waits for one; then lets `tidy` have its turn.

    `tidy` is told whether it was not done when it last returned, and says whether there is more: then it has another
    turn even where nothing comes in.
    """

    def __init__(
        self, write: Callable[[Sequence[Row]], None], tidy: Callable[[bool], bool], *, batch_bytes: int = _BATCH_BYTES
    ) -> None:
        self._write = write
        self._tidy = tidy
        self._batch_bytes = min(batch_bytes, _BATCH_BYTES)
        self._queue: queue.SimpleQueue[_Entries | _Job | None] = queue.SimpleQueue()
        self._gathered: dict[asyncio.AbstractEventLoop, _Entries] = {}
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="asmodel-cache-writer", daemon=True)
        self._thread.start()

    def end(self) -> threading.Thread | None:
        """Take nothing more in; the thread ends when it has written what is waiting. None where it had been ended."""
        with self._guard:
            thread, self._thread = self._thread, None
            if thread is not None:
                for entries in self._gathered.values():
                    self._queue.put(entries)
                self._gathered.clear()
                self._queue.put(None)
            return thread

    def set(self, row: Row) -> asyncio.Future[None]:
        """Done once the row is committed, or is known not to be."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        with self._guard:
            self._check()
            entries = self._gathered.get(loop)
            if entries is None:
                entries = self._gathered[loop] = _Entries(loop)
                # After what else is ready to run: of many that have come at once, the first would be a batch by itself,
                # and the others would wait for it.
                loop.call_soon(self._hand_over, loop)
            entries.rows.append(row)
            entries.waiting.append(done)
            entries.size += len(row.value)
            if len(entries.rows) >= _TOGETHER or entries.size >= self._batch_bytes:
                del self._gathered[loop]
                self._queue.put(entries)
        return done

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._guard:
            entries = self._gathered.pop(loop, None)
            if entries is not None:
                self._queue.put(entries)

    def ask(self, work: Callable[[], object]) -> None:
        """Have something done in the thread, in its turn; nobody waits for it."""
        self._put(_Job(work))

    async def job(self, work: Callable[[], T]) -> T:
        """Run something in the thread, in its turn."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(result: T, error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def settle(result: Any, error: Exception | None) -> None:
            _call(loop, lambda: tell(result, error))

        self._put(_Job(work, settle))
        return await done

    def _put(self, job: _Job) -> None:
        with self._guard:  # nothing may come in behind the end
            self._check()
            self._queue.put(job)

    def _check(self) -> None:
        if self._thread is None:
            raise RuntimeError("the disk cache is not open")

    def _work(self) -> None:
        more = False
        ended = False
        while not ended:
            batch, jobs, ended = self._gather(wait=not more)
            if batch:
                try:
                    self._write([row for entries in batch for row in entries.rows])
                except Exception:  # a bug here must cost one batch, not hang every run that waits for one
                    log.exception("the cache writer failed")
                finally:
                    _resolve(batch)
            for job in jobs:
                _run(job)
            # What it has written is not held until the next batch.
            batch = []
            jobs = []
            more = not ended and self._tidy(more)

    def _gather(self, *, wait: bool) -> tuple[list[_Entries], list[_Job], bool]:
        """What is there by now, or will be there next; and whether that is the end."""
        batch: list[_Entries] = []
        jobs: list[_Job] = []
        rows = size = 0
        try:
            item = self._queue.get(block=wait)
            while item is not None:
                if isinstance(item, _Entries):
                    batch.append(item)
                    rows += len(item.rows)
                    size += item.size
                else:
                    jobs.append(item)
                if rows + len(jobs) >= _BATCH_ROWS or size >= self._batch_bytes:
                    return batch, jobs, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return batch, jobs, False
        return batch, jobs, True


def _run(job: _Job) -> None:
    try:
        result, error = job.work(), None
    except Exception as raised:  # whatever it is belongs to whoever asked for the job
        result, error = None, raised
    if job.settle is not None:
        job.settle(result, error)
    elif error is not None:
        log.error("the cache writer could not look after its store", exc_info=error)


def _resolve(batch: Sequence[_Entries]) -> None:
    """Tell everyone who waits for the batch, with one call into each event loop."""
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for entries in batch:
        waiting.setdefault(entries.loop, []).extend(entries.waiting)
    for loop, futures in waiting.items():
        _call(loop, partial(_finish, futures))


def _finish(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # a waiter that was cancelled
            future.set_result(None)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        log.debug("an event loop ended before its cache entries were written")
