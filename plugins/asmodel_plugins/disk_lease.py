"""Leases among the processes of one machine: locks on bytes of one file, which the kernel ends with their holder.

    leases/table                 locked at a place that a key and its turn give, far behind its end: no byte is there
    leases/SHA-256 OF THE KEY    there while somebody waits: the box into which a holder puts its note

To take and to give back is one call of the kernel's each, which waits for no disk. In the table itself a key has eight
bytes: its holder's *beat*, renewed now and then, and its *turn*. A holder whose beat stands still (who is stopped, or
stuck) keeps its lock on what was the key's place: who has waited long enough passes to the next turn, which is another
place. Two keys may share their eight bytes, which costs a purchase at worst, and only when one has stood still.

For POSIX systems, on a local file system. Where the kernel has no locks that belong to an open file (Linux has), they
belong to the process: then two stores on one folder in one process do not see each other's leases.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

T = TypeVar("T")

log = logging.getLogger("asmodel.cache")

_NOTE_BYTES = 16 * 1024
_FIRST_POLL, _LAST_POLL = 0.005, 0.05

_LOOK_SECONDS = 0.5
"""How often it is looked whether the table is still the one in the folder."""

_KEYS = 2**16
_STATE, _WORD = struct.Struct("<II"), struct.Struct("<I")
_LOCKS = 2**40
_PLACES = 2**61

_OFD_SETLK: int | None = getattr(fcntl, "F_OFD_SETLK", None)
_FLOCK = struct.Struct("hhqqi")
"""Linux's `struct flock`: type, whence, start, length, process."""


class DiskLeases:
    """The leases in one folder, for any number of event loops and processes. Where it cannot be used there are none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table: _Table | None = None
        self._look_at = 0.0
        self._threads: ThreadPoolExecutor | None = None
        self._kept: dict[tuple[asyncio.AbstractEventLoop, float], set[_Lease]] = {}
        self._told = False

    def close(self) -> None:
        """Let go of the table and the threads. What is held stays held, and is given back by its holders."""
        table, self._table = self._table, None
        if table is not None:
            table.retire()
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    def lease(self, key: str, seconds: float) -> AbstractAsyncContextManager[_Lease]:
        return _Lease(self, hashlib.sha256(key.encode()).digest(), seconds)

    @property
    def known(self) -> _Table | None:
        """The table, where it was looked at lately; None where `table` has to be asked."""
        return self._table if time.monotonic() < self._look_at else None

    async def table(self) -> _Table | None:
        """The table that is in the folder; None where there can be none."""
        table = self._table
        if table is not None and (now := time.monotonic()) >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            if not _same(table.path, table.file):
                self._table = None
                table.retire()
                table = None
        if table is not None:
            return table
        try:
            return await asyncio.shield(self.run(self._open))
        except OSError as error:
            self.tell(error)
            return None

    def tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            log.warning('equal calls of several processes are bought by each: "%s": %s', self._folder, error.strerror)

    def _open(self) -> _Table:
        if (table := self._table) is not None:
            return table
        with suppress(FileExistsError):
            self._folder.mkdir(0o700)
        os.chmod(self._folder, 0o700)  # the umask may have taken rights from us too
        table = self._table = _Table(self._folder / "table")
        with suppress(OSError):
            for path in list(self._folder.iterdir()):
                if path != table.path:
                    _leave(path, os.open(path, os.O_RDWR | os.O_NOFOLLOW))  # of one who was killed while it waited
        return table

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """In a thread of our own: those of the event loop may all be busy. In one only: numbers of files are reused."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="asmodel-cache-lease")
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def box(self, name: bytes) -> Path:
        return self._folder / name.hex()

    # Beats

    def keep(self, lease: _Lease, seconds: float) -> set[_Lease]:
        """Renew its beat until it is taken out of the set; by the event loop, so that one that is stuck has none."""
        loop = asyncio.get_running_loop()
        kept = self._kept.get((loop, seconds))
        if kept is None:
            kept = self._kept[loop, seconds] = set()
            loop.call_later(seconds / 3, self._beat, loop, seconds)
        kept.add(lease)
        return kept

    def _beat(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        kept = self._kept[loop, seconds]
        if not kept:
            del self._kept[loop, seconds]
            return
        self.run(partial(_beat, tuple(kept)))
        loop.call_later(seconds / 3, self._beat, loop, seconds)


def _beat(leases: Sequence[_Lease]) -> None:
    for lease in leases:
        lease.beat()


class _Table:
    """The open table, and which of its places are locked by us."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: dict[int, object] = {}
        self._retired = False
        self._guard = threading.Lock()
        """Held to write and to close: the number of a closed file is soon another's."""
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.fchmod(self.file, 0o600)

    def retire(self) -> None:
        """Close it once nothing in it is held."""
        self._retired = True
        self._end()

    def _end(self) -> None:
        if self._retired and not self.held:
            with self._guard:
                file, self.file = self.file, -1
            if file >= 0:
                os.close(file)

    def take(self, place: int, by: object) -> bool:
        """Lock a place. Raises OSError where that cannot be done, whoever has it."""
        # A lock is the open file's: among ourselves the dictionary decides, and it does so in one step.
        if self.held.setdefault(place, by) is not by:
            return False
        try:
            taken = _lock(self.file, place)
        except BaseException:
            del self.held[place]
            raise
        if not taken:
            del self.held[place]
        return taken

    def give_back(self, place: int) -> None:
        try:
            _unlock(self.file, place)
        finally:
            del self.held[place]
            if self._retired:
                self._end()

    def read(self, name: bytes) -> tuple[int, int]:
        """The beat and the turn of a key."""
        # The file ends with what was written last.
        return _STATE.unpack(os.pread(self.file, _STATE.size, _at(name)).ljust(_STATE.size, b"\0"))

    def renew(self, name: bytes) -> None:
        self._write(time.monotonic_ns() % 2**32, _at(name))

    def pass_on(self, name: bytes, turn: int) -> None:
        if self.read(name)[1] == turn:
            self._write((turn + 1) % 2**32, _at(name) + _WORD.size)

    def _write(self, number: int, at: int) -> None:
        with self._guard:
            if self.file >= 0:
                os.pwrite(self.file, _WORD.pack(number), at)


class _Lease(AbstractAsyncContextManager["_Lease"]):
    """One's place before a key, and the block in which one has it."""

    def __init__(self, leases: DiskLeases, name: bytes, seconds: float) -> None:
        self.state: Literal["held", "taken", "none"] = "none"
        self._leases = leases
        self._name = name
        self._seconds = seconds
        self._table: _Table | None = None
        self._turn = 0
        self._place = 0
        """Which lock is the key's, at its turn."""
        self._kept: set[_Lease] | None = None
        self._box: int | None = None
        self._note = b""

    async def __aenter__(self) -> _Lease:
        leases = self._leases
        table = leases.known or await leases.table()
        if table is None:
            return self
        try:
            self._turn = table.read(self._name)[1]
            number = int.from_bytes(self._name[8:16], "little")
            self._place = _LOCKS + (number + self._turn * 0x9E3779B97F4A7C15) % _PLACES
            taken = table.take(self._place, self)
        except OSError as error:
            leases.tell(error)
            return self
        self._table = table
        if taken:
            self.state = "held"
            self._kept = leases.keep(self, self._seconds)
            return self
        self.state = "taken"
        opening = leases.run(self._open_box)
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._opened_for_nobody)
            raise
        except OSError:  # then it is told nothing
            pass
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._kept is not None:
            self._kept.discard(self)
        if self.state == "held":
            if not self._note:
                self._give_back()
                return
            ending = self._leases.run(self._tell)
        elif self._box is not None:
            ending = self._leases.run(self._close_box)
        else:
            return
        with suppress(OSError):  # it is free, or was never ours, whatever else
            await asyncio.shield(ending)

    def leave(self, note: bytes) -> None:
        if len(note) > _NOTE_BYTES:
            raise ValueError(f"a note of {len(note)} bytes is too long; {_NOTE_BYTES} is the most")
        self._note = note

    def beat(self) -> None:
        table = self._table
        if table is not None and table.held.get(self._place) is self:
            with suppress(OSError):
                table.renew(self._name)

    def _give_back(self) -> None:
        assert self._table is not None
        with suppress(OSError):
            self._table.give_back(self._place)

    def _tell(self) -> None:
        """Put the note into the box, if there is one: nobody else waits. Then give back."""
        try:
            path = self._leases.box(self._name)
            box = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                os.pwrite(box, self._note, 0)
                # Taken away, it is whole; and who comes later has another.
                path.unlink()
            finally:
                os.close(box)
        except FileNotFoundError:
            pass
        finally:
            self._give_back()

    def _open_box(self) -> None:
        self._box = os.open(self._leases.box(self._name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.fchmod(self._box, 0o600)
        with suppress(BlockingIOError):  # of one who is just leaving
            fcntl.flock(self._box, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _opened_for_nobody(self, opened: asyncio.Future[None]) -> None:
        if opened.exception() is None:
            self._leases.run(self._close_box)

    def _close_box(self) -> None:
        box, self._box = self._box, None
        if box is not None:
            _leave(self._leases.box(self._name), box)

    def _read_box(self) -> bytes | None:
        if self._box is None or os.fstat(self._box).st_nlink:
            return None
        return os.pread(self._box, _NOTE_BYTES, 0) or None

    async def wait(self) -> bytes | None:
        beat, seen = 0, time.monotonic()
        pause = _FIRST_POLL
        while self.state == "taken" and self._table is not None:
            # None of these waits for a disk: they ask the kernel for a lock, or for what it has of an open file.
            if (note := self._read_box()) is not None:
                return note
            if self._is_over(self._table):
                return self._read_box()
            now, _ = self._table.read(self._name)
            if now != beat:
                beat, seen = now, time.monotonic()
            elif time.monotonic() - seen > self._seconds:
                with suppress(OSError):
                    await self._leases.run(self._pass_by)
                return None
            await asyncio.sleep(pause * random.uniform(0.75, 1.0))
            pause = min(1.5 * pause, _LAST_POLL)
        return None

    def _is_over(self, table: _Table) -> bool:
        try:
            if table.read(self._name)[1] != self._turn:
                return True
            over = table.take(self._place, self)
        except OSError:
            return True
        if over:
            table.give_back(self._place)
        return over

    def _pass_by(self) -> None:
        """Go on to the next turn: its holder stands still, and keeps the lock on what is no lease now."""
        if self._table is not None:
            self._table.pass_on(self._name, self._turn)


def _leave(path: Path, box: int) -> None:
    """Close a box, and take it away if nobody else waits at it."""
    try:
        fcntl.flock(box, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same(path, box):
            path.unlink()
    except BlockingIOError:
        pass
    finally:
        os.close(box)


def _at(name: bytes) -> int:
    return int.from_bytes(name[:8], "little") % _KEYS * _STATE.size


def _lock(file: int, place: int) -> bool:
    try:
        if _OFD_SETLK is not None:
            fcntl.fcntl(file, _OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):  # POSIX lets a system say either
        return False
    return True


def _unlock(file: int, place: int) -> None:
    if _OFD_SETLK is not None:
        fcntl.fcntl(file, _OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, place, 1, 0))
    else:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place)


def _same(path: Path, file: int) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    opened = os.fstat(file)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
