"""A SQLite file of this user's alone, shared by processes; one that cannot be read is set aside, and another begun."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("asmodel")


@dataclass(frozen=True, slots=True, kw_only=True)
class SQLiteFile:
    """How a file of one kind is opened. `version` is of its `tables`: a file of another is set aside.

    `pragmas` are said before there are tables. `lock` is the name of the file beside it by which one process opens it
    at a time; without `links` none of the two may be a symbolic link.
    """

    path: Path
    version: int
    tables: str
    pragmas: Sequence[str]
    lock: str
    links: bool = False

    def inode(self) -> int:
        """Which file is there; 0 where there is none."""
        try:
            return self.path.stat().st_ino
        except OSError:
            return 0

    def opened(self, damaged: int) -> sqlite3.Connection:
        """The file, ready to be written, in autocommit. Its folder must be there. Raises OSError and sqlite3.Error.

        `damaged` is the inode of a file that could be opened and then not be written, or 0.
        """
        # One process at a time: two that set the same file aside would set aside the good one that the first has begun.
        with self._locked():
            if damaged and self.inode() == damaged:
                self._set_aside("it is damaged")
            try:
                return self._connected()
            except sqlite3.OperationalError:
                raise  # locked, or no room: nothing is wrong with the file
            except sqlite3.DatabaseError as error:
                self._set_aside(str(error))
                return self._connected()

    def _connected(self) -> sqlite3.Connection:
        # SQLite makes its -wal and -shm with the rights of the file, so the file must be there, and private, first.
        descriptor = self._own(self.path)
        try:
            if os.fstat(descriptor).st_mode & 0o077:
                os.chmod(descriptor if os.chmod in os.supports_fd else self.path, 0o600)
        finally:
            os.close(descriptor)
        connection = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if found != self.version and (found or tables):
                raise sqlite3.DatabaseError(f"its version is {found}, not {self.version}")
            for pragma in self.pragmas:
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("PRAGMA journal_mode = WAL")
            # In WAL mode this loses nothing when the process dies; a power cut may take the last moments.
            connection.execute("PRAGMA synchronous = NORMAL")
            # In one transaction: a reader finds all of it or an empty file.
            connection.executescript(f"BEGIN IMMEDIATE; {self.tables} PRAGMA user_version = {self.version}; COMMIT;")
        except BaseException:
            connection.close()
            raise
        return connection

    def _own(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | (0 if self.links else getattr(os, "O_NOFOLLOW", 0)), 0o600)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        try:
            import fcntl
        except ImportError:  # Windows: processes that begin at the same moment there are left to chance
            yield
            return
        descriptor = self._own(self.path.with_name(self.lock))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.broken-{time.strftime('%Y%m%dT%H%M%S')}")
        os.replace(self.path, aside)
        for ending in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.path}{ending}")
        log.warning("%s cannot be used (%s); it is now %s, and a new one is begun", self.path, why, aside.name)
