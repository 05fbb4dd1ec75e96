"""Responses that are kept so that they can be gone on from: one SQLite file, for all the processes of a machine.

By scope and id, as JSON. What has not been gone on from for some days is forgotten, and so is the oldest where all of
it together takes more room than it may. All waiting is in one thread of the store's own.

What was written survives the process (WAL, a commit each); a power cut may take the last moments.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from asmodel.errors import AsmodelError, PayloadTooLarge
from asmodel.sqlite_file import SQLiteFile

FILE = "responses.sqlite"
SCHEMA = 1
"""The tables' version. A file of another one is set aside."""
REOPEN_EVERY = 5.0
"""Seconds until a file that could not be opened is tried again."""
TOUCH_EVERY = 60.0
"""Seconds in which going on from a response counts once."""

TABLES = """
CREATE TABLE IF NOT EXISTS responses (
  scope TEXT NOT NULL, id TEXT NOT NULL, previous TEXT, used REAL NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS responses_by_id ON responses (scope, id);
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM total);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON responses BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER IF NOT EXISTS taken AFTER DELETE ON responses BEGIN UPDATE total SET bytes = bytes - old.size; END;
"""
"""`used` in Unix seconds. How much there is is counted as it changes: to add it up takes longer the more there is."""

_CHAIN = """
WITH RECURSIVE chain(id, previous, depth) AS (
  SELECT id, previous, 0 FROM responses WHERE scope = :scope AND id = :id AND used >= :since
  UNION ALL
  SELECT r.id, r.previous, depth + 1 FROM chain JOIN responses AS r ON r.scope = :scope AND r.id = chain.previous
  WHERE r.used >= :since AND depth < :most)
"""

log = logging.getLogger("asmodel")

_T = TypeVar("_T")


class StoreUnavailable(AsmodelError):
    """What is kept cannot be read just now; a retry may fare better."""

    status = 503
    code: str | None = "store_unavailable"
    retry = True


@dataclass(frozen=True, slots=True)
class Kept:
    """A response as it is kept. `previous` is the one that it goes on from."""

    id: str
    previous: str | None
    body: bytes


def default_folder(environ: Mapping[str, str]) -> Path:
    """Where they are kept by default: `asmodel/responses` in `$XDG_STATE_HOME`, or in `~/.local/state`."""
    state = environ.get("XDG_STATE_HOME", "")
    # The XDG specification has relative paths ignored.
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "asmodel" / "responses"


class ResponseStore:
    """The store in one folder. `days` count from when a response was last gone on from; `most_bytes` are all of them.

    One that cannot be opened is no reason not to answer: it says so, keeps nothing, and is tried again.
    """

    def __init__(self, folder: Path, *, days: float, most_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._path = folder / FILE
        self._seconds = days * 86_400
        self._most_bytes = most_bytes
        self._clock = clock
        self._thread: ThreadPoolExecutor | None = None
        # Of the thread alone:
        self._connection: sqlite3.Connection | None = None
        self._file = SQLiteFile(
            path=self._path,
            version=SCHEMA,
            tables=TABLES,
            # What is deleted is overwritten, and its room given back to the disk.
            pragmas=("trusted_schema = OFF", "secure_delete = ON", "auto_vacuum = FULL"),
            lock="lock",
        )
        self._inode = 0
        self._damaged = 0
        self._retry_at = 0.0

    async def open(self) -> None:
        self._thread = ThreadPoolExecutor(1, "responses")
        with suppress(StoreUnavailable):  # The log says why.
            await self._do(lambda connection: None)

    async def close(self) -> None:
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
            self._thread.shutdown()
            self._thread = None

    async def put(self, scope: str, id: str, body: bytes, *, previous: str | None = None) -> bool:
        """Keep a response; whether it is kept now: not where there is no room for it, or no store."""
        if len(body) > self._most_bytes:
            return False

        def work(connection: sqlite3.Connection) -> None:
            now = self._clock()
            connection.execute("DELETE FROM responses WHERE used < ?", (now - self._seconds,))
            connection.execute("DELETE FROM responses WHERE scope = ? AND id = ?", (scope, id))
            (total,) = connection.execute("SELECT bytes FROM total").fetchone()
            over = total + len(body) - self._most_bytes
            while over > 0:
                oldest = connection.execute("SELECT rowid, size FROM responses ORDER BY used LIMIT 1").fetchone()
                if oldest is None:
                    break
                connection.execute("DELETE FROM responses WHERE rowid = ?", (oldest[0],))
                over -= oldest[1]
            connection.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", (scope, id, previous, now, len(body), body)
            )

        try:
            await self._do(work)
        except StoreUnavailable:
            return False
        return True

    async def get(self, scope: str, id: str) -> Kept | None:
        """Raises StoreUnavailable."""

        def work(connection: sqlite3.Connection) -> Kept | None:
            row = connection.execute(
                "SELECT id, previous, body FROM responses WHERE scope = ? AND id = ? AND used >= ?",
                (scope, id, self._clock() - self._seconds),
            ).fetchone()
            return None if row is None else Kept(*row)

        return await self._do(work)

    async def chain(self, scope: str, id: str, *, most: int, most_bytes: int) -> list[Kept]:
        """A response and those that it goes on from, the oldest first; empty where it is not there.

        It counts as used. What is missing is missed by its name: the first then has a `previous`. Raises
        StoreUnavailable, or PayloadTooLarge where they come to more than `most` responses or `most_bytes`.
        """

        def work(connection: sqlite3.Connection) -> list[Kept]:
            now = self._clock()
            asked = {"scope": scope, "id": id, "since": now - self._seconds, "most": most, "touch": now - TOUCH_EVERY}
            sizes = connection.execute(
                f"{_CHAIN} SELECT r.size FROM chain JOIN responses AS r ON r.scope = :scope AND r.id = chain.id", asked
            ).fetchall()
            if len(sizes) > most or sum(size for (size,) in sizes) > most_bytes:
                raise PayloadTooLarge(
                    f"what `previous_response_id` goes on from is more than the {most} responses, or the {most_bytes} "
                    "bytes, that a request may be; begin anew",
                    param="previous_response_id",
                )
            rows = connection.execute(
                f"{_CHAIN} SELECT r.id, r.previous, r.body FROM chain "
                "JOIN responses AS r ON r.scope = :scope AND r.id = chain.id ORDER BY depth DESC",
                asked,
            ).fetchall()
            connection.execute(
                f"{_CHAIN} UPDATE responses SET used = :now "
                "WHERE scope = :scope AND used < :touch AND id IN (SELECT id FROM chain)",
                {**asked, "now": now},
            )
            return [Kept(*row) for row in rows]

        return await self._do(work)

    async def delete(self, scope: str, id: str) -> bool:
        """Forget it; whether it was there. Raises StoreUnavailable."""

        def work(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                "DELETE FROM responses WHERE scope = ? AND id = ? AND used >= ?",
                (scope, id, self._clock() - self._seconds),
            )
            return found.rowcount > 0

        return await self._do(work)

    # ---- in the thread ----

    async def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._thread is None:
            raise StoreUnavailable("the store of responses is not open")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._done, work)

    def _done(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """`work`, as one transaction."""
        connection = self._connected()
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                done = work(connection)
                connection.execute("COMMIT")
                return done
            except BaseException:
                with suppress(sqlite3.Error):  # What went wrong may have ended it already.
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            # Locked for too long, no room, gone: nothing is wrong with what is written.
            log.warning("%s cannot be used just now (%s): responses are not kept", self._path, error)
            raise StoreUnavailable("the store of responses cannot be used just now") from error
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged (%s)", self._path, error)
            self._damaged = self._inode
            self._disconnect()
            self._retry_at = 0.0
            raise StoreUnavailable("the store of responses cannot be used just now") from error

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._file.inode() != self._inode:
            # Deleted, or set aside by another process: what is written to it now would be seen by nobody.
            self._disconnect()
            self._retry_at = 0.0
        if self._connection is None and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + REOPEN_EVERY
            try:
                _private(self.folder)
                self._connection = self._file.opened(self._damaged)
                self._inode = self._file.inode()
                self._damaged = 0
            except (OSError, sqlite3.Error) as error:
                log.warning("%s cannot be opened (%s): responses are not kept", self._path, error)
        if self._connection is None:
            raise StoreUnavailable("the store of responses cannot be opened")
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _private(folder: Path) -> None:
    """Make the folder, or see that it is ours alone. Raises OSError."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.geteuid() or info.st_mode & stat.S_ISVTX or folder == Path.home():
        raise PermissionError(f"{folder} is another user's or is shared; [store] path should be a folder of its own")
    if stat.S_IMODE(info.st_mode) & 0o077:
        folder.chmod(0o700)
        log.warning("%s was open to others (%o); it is 0700 now", folder, stat.S_IMODE(info.st_mode))
