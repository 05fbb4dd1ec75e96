"""Leases among the processes of one machine: a locked file each, which the kernel unlocks when its holder dies.

    leases/SHA-256 OF THE KEY    there while the lease is held; what is in it is the note to those who wait

A holder touches its file now and then, so that one who stands still (stopped, or stuck) is passed by. For POSIX systems
(`flock`, which belongs to an open file and not to a process), on a local file system.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

from asmodel.protocols import Lease

T = TypeVar("T")

log = logging.getLogger("asmodel.cache")

_NOTE_BYTES = 16 * 1024
_FIRST_POLL, _LAST_POLL = 0.005, 0.05


class DiskLeases:
    """The leases in one folder, for any number of event loops and processes. Where it cannot be used there are none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads: ThreadPoolExecutor | None = None
        self._told = False

    def close(self) -> None:
        """Let go of the threads. What is held stays held, and is given back by its holders."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    @asynccontextmanager
    async def lease(self, key: str, seconds: float) -> AsyncGenerator[Lease]:
        lease = _Lease(self, self._folder / hashlib.sha256(key.encode()).hexdigest(), seconds)
        taking = self.run(lease.take)
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(lambda taken: taken.exception() or self.run(lease.end))
            raise
        except OSError as error:
            self._tell(error)
        keeping = asyncio.create_task(lease.keep()) if lease.state == "held" else None
        try:
            yield lease
        finally:
            if keeping is not None:
                keeping.cancel()
            ending = self.run(lease.end)
            with suppress(OSError):  # the file is closed, and with that free, whatever else
                await asyncio.shield(ending)

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """In a thread of our own: those of the event loop may all be busy. In one only: numbers of files are reused."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="asmodel-cache-lease")
            self._threads.submit(self._sweep)
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _sweep(self) -> None:
        """Remove the files of processes that were killed."""
        with suppress(OSError):
            for path in list(self._folder.iterdir()):
                file, held = _lock(path)
                try:
                    if held:
                        path.unlink()
                finally:
                    os.close(file)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            log.warning('equal calls of several processes are bought by each: "%s": %s', self._folder, error.strerror)


class _Lease:
    """One's place before a key: an open file, locked by us or by another."""

    def __init__(self, leases: DiskLeases, path: Path, seconds: float) -> None:
        self.state: Literal["held", "taken", "none"] = "none"
        self._leases = leases
        self._path = path
        self._seconds = seconds
        self._file: int | None = None
        self._note = b""

    def take(self) -> None:
        try:
            self._file, held = _lock(self._path)
        except FileNotFoundError:
            with suppress(FileExistsError):
                self._path.parent.mkdir(0o700)
            os.chmod(self._path.parent, 0o700)  # the umask may have taken rights from us too
            self._file, held = _lock(self._path)
        if held:
            os.ftruncate(self._file, 0)  # of the note that a killed holder had begun
        self.state = "held" if held else "taken"

    async def keep(self) -> None:
        while self._file is not None:
            await asyncio.sleep(self._seconds / 3)
            with suppress(OSError):
                await self._leases.run(self._touch)

    def _touch(self) -> None:
        if (file := self._file) is not None:
            os.utime(file)

    def end(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if self.state == "held":
                os.pwrite(file, self._note, 0)
                if _same(self._path, file):
                    self._path.unlink()
        finally:
            os.close(file)

    def leave(self, note: bytes) -> None:
        if len(note) > _NOTE_BYTES:
            raise ValueError(f"a note of {len(note)} bytes is too long; {_NOTE_BYTES} is the most")
        self._note = note

    async def wait(self) -> bytes | None:
        touched, seen = 0, time.monotonic()
        pause = _FIRST_POLL
        while self.state == "taken" and self._file is not None:
            # Neither of these waits for a disk: a lock is the kernel's, and so is the state of an open file.
            if _try(self._file, fcntl.LOCK_SH):
                return os.pread(self._file, _NOTE_BYTES, 0) or None
            now = os.fstat(self._file).st_mtime_ns
            if now != touched:
                touched, seen = now, time.monotonic()
            elif time.monotonic() - seen > self._seconds:
                with suppress(OSError):
                    await self._leases.run(self._pass_by)
                return None
            await asyncio.sleep(pause * random.uniform(0.75, 1.0))
            pause = min(1.5 * pause, _LAST_POLL)
        return None

    def _pass_by(self) -> None:
        """Take the file out of the way of its holder, who stands still and keeps the lock on what is no lease now."""
        if self._file is not None and _same(self._path, self._file):
            self._path.unlink(missing_ok=True)


def _lock(path: Path) -> tuple[int, bool]:
    """The file, and whether it is locked by us now; else by another. Raises OSError."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(file, 0o600)
            if not _try(file, fcntl.LOCK_EX):
                return file, False
            if _same(path, file):
                return file, True
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its holder removed it between our opening and our locking


def _try(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(path: Path, file: int) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(file)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
