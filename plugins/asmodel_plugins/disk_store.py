"""One open store: diskcache's tables, read and written over connections, statements and transactions of our own.

diskcache as it comes follows the umask, unpickles what it finds, removes files that a row names, turns every row of its
`Settings` table into a pragma or an attribute, and keeps a failed commit open. So: nothing but bytes in rows is written
or believed, connections are ours, and a store is looked at before diskcache sees it (`disk_folder`).

    cache.db, cache.db-wal, cache.db-shm
    version      8 bytes: a number that goes up before entries are removed or replaced

**Versions.** What was read may be kept in memory until somebody changes it. Whoever does so writes the next number into
the file `version`, within the transaction and so as the only one, and then commits the same number to the table
`Version`, together with the change. To read the file costs next to nothing. A value that is read beside the number that
the file held just before was read after the last change, and holds for as long as the file says the same. One who dies
between the two leaves numbers that differ: then nothing that is read is kept in memory, until the next change or until
somebody looks after the store. An entry that is new changes nothing that anybody could hold, nor does one that is
evicted, or whose time is over.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from asmodel.errors import ConfigurationError
from asmodel.frozen import quickly_made
from asmodel_plugins.disk_memory import Memory

if TYPE_CHECKING:  # diskcache publishes no types; this is what we use of it

    class _Disk: ...

    class _Cache:
        def __init__(self, directory: str, *, timeout: float, disk: type[_Disk], **settings: int | str) -> None: ...

    DATABASE: str
    COUNTS: Mapping[str, int]
    MODE_RAW: int
else:
    from diskcache import Cache as _Cache
    from diskcache import Disk as _Disk
    from diskcache.core import DBNAME as DATABASE
    from diskcache.core import METADATA as COUNTS  # noqa: F401  # what it counts in its `Settings`: for `disk_folder`
    from diskcache.core import MODE_RAW

T = TypeVar("T")

FORMAT = 3
"""What our rows look like: SQLite's `user_version`. Raise it when they change."""

APPLICATION = 0x61736D31
"""SQLite's `application_id`: this database is ours and not any other program's."""

VERSION = "version"
"""The name of the file."""

FIRST_VERSION = (1).to_bytes(8, "big")

SETTINGS: Mapping[str, int | str] = {
    "statistics": 0,  # counting hits would make every read a write
    "tag_index": 0,
    "eviction_policy": "none",  # and so would recency; the writer evicts
    "size_limit": 2**30,  # not used: the limit is the process's, these rows are the store's
    "cull_limit": 0,
    "sqlite_auto_vacuum": 2,  # incremental: free pages are reused, and given back after `clear`
    "sqlite_cache_size": 1024,  # pages, for every connection; the system caches the file once for all
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,  # a mapped file that somebody truncates is a SIGBUS
    "sqlite_synchronous": 1,  # NORMAL: survives the process, not the power
    "disk_min_file_size": 2**31 - 1,  # everything in the row
    "disk_pickle_protocol": 4,  # never used, but diskcache wants one
}

TABLES: Mapping[str, set[str]] = {
    "Settings": {"key", "value"},
    "Cache": {"rowid", "key", "raw", "store_time", "expire_time", "access_time", "access_count"}
    | {"tag", "size", "mode", "filename", "value"},
    "Version": {"number"},
}

COUNTING: Mapping[str, str] = {
    name: f"CREATE TRIGGER {name} AFTER {event} ON Cache WHEN 0 BEGIN SELECT 1; END"
    for name, event in (
        ("Settings_count_insert", "INSERT"),
        ("Settings_count_delete", "DELETE"),
        ("Settings_size_insert", "INSERT"),
        ("Settings_size_update", "UPDATE"),
        ("Settings_size_delete", "DELETE"),
    )
}
"""In the place of diskcache's triggers, which keep sums that nobody here reads: a page more in each commit."""

OBJECTS: set[str] = {"Settings", "Version", "Cache", "Cache_key_raw", "Cache_expire_time", *COUNTING}
"""Everything the schema may hold: a trigger of somebody else's would run inside our writes."""

OURS = "typeof(key) = 'text' AND raw = 1 AND mode = 1 AND filename IS NULL AND typeof(value) = 'blob'"

_FIND = (
    "SELECT mode, filename, value, expire_time, (SELECT number FROM Version) FROM Cache"
    " WHERE key = ? AND raw = 1 AND (expire_time IS NULL OR expire_time > ?)"
)

_COLUMNS = "key, raw, store_time, expire_time, access_time, access_count, tag, size, mode, filename, value"

_ROWS_AT_ONCE = 64
"""Entries in one statement, which is a transaction by itself: each statement hands the interpreter's lock around."""

CHUNK_ROWS = 256
"""Rows deleted in one transaction: what a waiting `set` waits for at most."""

_QUICK_BYTES = 256 * 1024
"""Longer values are read in a thread: about 0.1 ms is what the event loop can spare."""

_CONNECT_SECONDS = 5.0

_WAL_PAGES = 1500
"""About so many pages are written between two checkpoints."""


_process = object()
"""Stands for this process: a forked child has another. To ask the system each time for its number is a call of it."""


def _forked() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Unreadable(Exception):
    """A row that we did not write like this; says which kind of oddity, never what the row holds."""


class Retired(Exception):
    """The store object was closed in favour of another one."""


Fault: TypeAlias = Literal["busy", "large", "damaged", "refused", "odd"]


def fault_of(error: sqlite3.Error | OSError) -> Fault:
    """What an error of SQLite means for the store (https://sqlite.org/rescode.html)."""
    if isinstance(error, OSError):  # of the file beside the database
        return "refused"
    code: int | None = getattr(error, "sqlite_errorcode", None)  # errors of the Python module itself have none
    if code is None:
        return "odd"
    if code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return "damaged"
    match code & 0xFF:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "busy"
        case sqlite3.SQLITE_TOOBIG:
            return "large"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return "damaged"
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_IOERR | sqlite3.SQLITE_CANTOPEN:
            return "refused"
        case sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH | sqlite3.SQLITE_NOMEM:
            return "refused"
        case _:
            return "odd"


@quickly_made
@dataclass(frozen=True, slots=True)
class Row:
    """What is to be stored. `ttl` in seconds."""

    key: str
    value: bytes
    tag: str
    ttl: float | None


def _sealed(key: str, value: bytes) -> bytes:
    """The value as it lies in its row, ended by a checksum: so that it is found under no other key than its own."""
    return value + zlib.crc32(value, zlib.crc32(key.encode())).to_bytes(4, "little")


def _unsealed(key: str, mode: object, filename: object, value: object) -> bytes:
    """The value of a row. Raises Unreadable."""
    if mode != MODE_RAW:
        raise Unreadable("a value in a mode that is never written")
    if filename is not None:
        raise Unreadable("a value that names a file")
    if type(value) is not bytes:
        raise Unreadable("a value that is not bytes")
    data = value[:-4]
    if value[-4:] != zlib.crc32(data, zlib.crc32(key.encode())).to_bytes(4, "little"):
        raise Unreadable("a value that does not match its checksum")
    return data


class NoDisk(_Disk):
    """What diskcache may do with keys and values: nothing. No files, no pickles; rows are read and written by us."""

    def put(self, key: object) -> tuple[object, bool]:
        raise TypeError("diskcache neither writes nor reads here")

    def get(self, key: object, raw: object) -> object:
        raise TypeError("diskcache neither writes nor reads here")

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, bytes]:
        raise TypeError("diskcache neither writes nor reads here")

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> object:
        raise TypeError("diskcache neither writes nor reads here")

    def filename(self, key: object = None, value: object = None) -> tuple[str, str]:
        raise TypeError("values are kept in rows, not in files")

    def remove(self, file_path: object) -> None:
        """Nothing: a path in a row is not ours, and it may lead out of the folder."""


@dataclass(slots=True, eq=False)
class _Held:
    """One thread's connection; whoever closes it takes the lock first."""

    con: sqlite3.Connection
    thread: threading.Thread
    lock: threading.Lock = field(default_factory=threading.Lock)


class Store(_Cache):
    """One open store. Every method blocks; only `look` never waits.

    As of any diskcache, its truth value is a query: compare with None. diskcache names its seam with an underscore
    (`_con`) and has not changed since 5.6.3.
    """

    def __init__(self, folder: Path, *, synchronous: int = 1, memory_bytes: int = 0) -> None:
        """`synchronous` as SQLite's pragma: 1 survives the process, 2 (FULL, a sync each commit) the power too."""
        self.database = folder / DATABASE
        self.memory = Memory(memory_bytes)
        self._synchronous = synchronous
        self.look_at = 0.0
        self.suspect = False
        self._process = _process
        self._guard = threading.Lock()
        self._connections: list[_Held] = []
        self._is_retired = False
        self._thread = threading.local()
        self._unsettled = 0
        self._version = os.open(folder / VERSION, os.O_RDWR | os.O_NOFOLLOW)
        try:
            super().__init__(str(folder), timeout=0, disk=NoDisk, **SETTINGS)
        except BaseException:
            self.retire()
            raise
        self._inode = inode(self.database)

    # Connections

    def _connect(self, *, quick: bool) -> _Held:
        uri = self.database.as_uri() + "?mode=rw"  # never creates: a file that SQLite creates has the umask's rights
        # The last process to close a database locks everybody out for a moment; all but an event loop can wait for it.
        wait = 0.0 if quick else _CONNECT_SECONDS
        con = sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None, check_same_thread=False)
        try:
            for name in ("cache_size", "mmap_size", "synchronous"):
                con.execute(f"PRAGMA {name} = {SETTINGS['sqlite_' + name]}")
            con.execute(f"PRAGMA synchronous = {self._synchronous}")
            con.execute("PRAGMA trusted_schema = OFF")
            con.execute("PRAGMA cell_size_check = ON")
            con.execute("PRAGMA journal_size_limit = 16777216").fetchall()
            con.execute("PRAGMA wal_autocheckpoint = 0").fetchall()  # or a `set` would wait for it: see `settle`
            con.execute("PRAGMA busy_timeout = 0").fetchall()
            if quick:
                con.execute("PRAGMA query_only = ON")
                con.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _QUICK_BYTES)
            else:
                con.text_factory = _lenient
        except BaseException:
            con.close()
            raise
        held = _Held(con, threading.current_thread())
        with self._guard:
            if self._is_retired:
                con.close()
                raise Retired
            gone = [h for h in self._connections if not h.thread.is_alive()]
            self._connections = [h for h in self._connections if h.thread.is_alive()]
            self._connections.append(held)
        for h in gone:
            h.con.close()
        self._thread.held = held
        return held

    def _held(self, *, quick: bool = False) -> _Held:
        self._same_process()
        held: _Held | None = getattr(self._thread, "held", None)
        if held is None:
            held = self._connect(quick=quick)
        return held

    def _same_process(self) -> None:
        if self._process is not _process:
            raise RuntimeError("the disk cache was opened before a fork; open one of its own in the child")

    @property
    def _con(self) -> sqlite3.Connection:
        return self._held().con

    def close(self) -> None:
        """Close this thread's connection; diskcache does so at the end of its constructor."""
        held: _Held | None = getattr(self._thread, "held", None)
        if held is not None:
            del self._thread.held
            with self._guard:
                self._connections.remove(held)
            held.con.close()

    def retire(self) -> None:
        """Close every thread's connection; whoever still holds this store is told so by `Retired`."""
        with self._guard:
            if self._is_retired:
                return
            self._is_retired = True
            connections, self._connections = self._connections, []
        for held in connections:
            with held.lock:
                held.con.close()
        os.close(self._version)

    def moved(self) -> bool:
        """Whether the database that this store writes to is no longer the one in the folder."""
        return inode(self.database) != self._inode

    # Reading

    def look(self, key: str) -> bytes | None:
        """Read without ever waiting. Raises sqlite3.Error: `fault_of` says whether it is worth another try."""
        self._same_process()
        if self._is_retired:
            raise Retired
        version = self._read_version()
        value = self.memory.find(key, version)
        return self._read(key, version, quick=True) if value is None else value

    def recall(self, key: str) -> bytes | None:
        """What `look` would find in memory; None where it would have to read, or to raise."""
        if key not in self.memory or self._process is not _process or self._is_retired:
            return None
        return self.memory.find(key, self._read_version())

    def load(self, key: str) -> bytes | None:
        """Read a value of any size."""
        return self._read(key, b"", quick=False)

    def _read(self, key: str, version: bytes, *, quick: bool) -> bytes | None:
        held = self._held(quick=quick)
        with held.lock:
            if self._is_retired:
                raise Retired
            found = held.con.execute(_FIND, (key, time.time())).fetchall()
        if not found:
            return None
        mode, filename, value, expires, committed = found[0]
        data = _unsealed(key, mode, filename, value)
        if committed == version and (expires is None or type(expires) is float):
            self.memory.keep(key, data, expires, version)
        return data

    def _read_version(self) -> bytes:
        """What the file says; nothing where it says nothing."""
        try:
            version = os.pread(self._version, 8, 0)
        except OSError:
            return b""
        return version if len(version) == 8 else b""

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        held = self._held()
        with held.lock:
            if self._is_retired:
                raise Retired
            return held.con.execute(statement, values).fetchall()

    # Writing

    def write(self, rows: Sequence[Row], wait: float) -> None:
        """Commit all of these; waits `wait` seconds at most for other processes' transactions to end."""
        con = self._held().con
        version = self._read_version()  # before they are there: who removes them goes on from this number
        now = time.time()
        if len(rows) <= _ROWS_AT_ONCE:
            added = _patiently(partial(_insert, con, rows, now), wait)
        else:
            with self.writing(wait):
                added = sum(
                    _insert(con, rows[start : start + _ROWS_AT_ONCE], now)
                    for start in range(0, len(rows), _ROWS_AT_ONCE)
                )
        if added < len(rows):
            self._replace(rows, now, wait)
        else:
            for row in rows:
                self.memory.keep(row.key, row.value, None if row.ttl is None else now + row.ttl, version)
        self._unsettled += 3 + sum(1 + len(row.value) // 2048 for row in rows)

    def _replace(self, rows: Sequence[Row], now: float, wait: float) -> None:
        """Put those in whose keys are taken; in order, since the last of equal keys counts."""
        with self.writing(wait) as con:
            changed = False
            for row in rows:
                wanted = _sealed(row.key, row.value)
                until = None if row.ttl is None else now + row.ttl
                found = con.execute(
                    "SELECT value, expire_time, store_time FROM Cache WHERE key = ? AND raw = 1", (row.key,)
                ).fetchall()
                if found == [(wanted, until, now)]:
                    continue  # by `_insert`
                for value, expires, _ in found:
                    # The same again, and for as long at least, is no change for who holds it. It is young again.
                    longer = until is None or (type(expires) is float and expires <= until)
                    changed = changed or value != wanted or not longer
                con.execute(
                    f"INSERT OR REPLACE INTO Cache({_COLUMNS}) VALUES (?, 1, ?, ?, ?, 0, ?, ?, 1, NULL, ?)",
                    (row.key, now, until, now, row.tag, len(row.value), wanted),
                )
            if changed:
                self._next_version(con)

    def _next_version(self, con: sqlite3.Connection) -> None:
        """Tell that something has changed. In the transaction that changes it, as its last words."""
        ((committed,),) = con.execute("SELECT number FROM Version").fetchall()
        known = max(self._read_version(), committed if type(committed) is bytes else b"", FIRST_VERSION)
        number = ((int.from_bytes(known, "big") + 1) % 2**64).to_bytes(8, "big")
        con.execute("UPDATE Version SET number = ?", (number,))
        os.pwrite(self._version, number, 0)

    def mend(self, wait: float) -> None:
        """Where somebody died between telling of a change and committing it: let things be kept in memory again."""
        con = self._con
        if con.execute("SELECT number FROM Version").fetchall() != [(self._read_version(),)]:
            with self.writing(wait) as con:
                self._next_version(con)

    @contextmanager
    def writing(self, wait: float) -> Generator[sqlite3.Connection]:
        """One transaction of the only writer; waits `wait` seconds at most for other processes' to end."""
        con = self._held().con
        _patiently(lambda: con.execute("BEGIN IMMEDIATE"), wait)
        try:
            yield con
            con.execute("COMMIT")
        except BaseException:
            if con.in_transaction:  # after a full disk SQLite has already rolled back
                con.execute("ROLLBACK")
            raise

    def remove_rows(
        self, where: str, values: Sequence[object], wait: float, order: str = "rowid", *, told: bool
    ) -> tuple[int, int]:
        """Delete the first rows that match; says how many, and the highest row id among them.

        `told`: nobody may go on using what is deleted. Row ids are in the order of writing.
        """
        with self.writing(wait) as con:
            found = [
                row
                for (row,) in con.execute(
                    f"SELECT rowid FROM Cache WHERE {where} ORDER BY {order} LIMIT {CHUNK_ROWS}", values
                )
            ]
            con.executemany("DELETE FROM Cache WHERE rowid = ?", [(row,) for row in found])
            if found and told:
                self._next_version(con)
        self._unsettled += len(found)
        return len(found), max(found, default=0)

    def delete_expired(self, wait: float) -> int:
        return self.remove_rows("expire_time < ?", (time.time(),), wait, "expire_time", told=False)[0]

    def used(self) -> int:
        """Bytes of the database that hold something."""
        con = self._con
        ((pages,),) = con.execute("PRAGMA page_count").fetchall()
        ((free,),) = con.execute("PRAGMA freelist_count").fetchall()
        ((size,),) = con.execute("PRAGMA page_size").fetchall()
        return int(size) * (int(pages) - int(free))

    def settle(self) -> None:
        """Move what was committed from the WAL into the database, once it is enough. Nobody waits for it."""
        if self._unsettled >= _WAL_PAGES:
            self._unsettled = 0
            self._con.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def shrink(self) -> bool:
        """Give some free pages back to the file system; says whether there are more."""
        con = self._con
        con.execute("PRAGMA incremental_vacuum(1000)").fetchall()
        ((free,),) = con.execute("PRAGMA freelist_count").fetchall()
        return int(free) > 0

    def found(self) -> None:
        """Make diskcache's new tables ours."""
        con = self._con
        ((mode,),) = con.execute("PRAGMA journal_mode").fetchall()
        if mode != "wal":
            raise ConfigurationError(
                f'the file system of the cache folder "{self.database.parent.parent}" cannot share memory between '
                "processes, which SQLite's WAL needs; set [cache] path to a local disk"
            )
        # Under their own names, or diskcache would make them again whenever the store is opened.
        for name, statement in COUNTING.items():
            con.execute(f"DROP TRIGGER {name}")
            con.execute(statement)
        con.execute("DROP INDEX Cache_expire_time")
        con.execute("CREATE INDEX Cache_expire_time ON Cache(expire_time) WHERE expire_time IS NOT NULL")
        con.execute("CREATE TABLE Version(number BLOB)")
        con.execute("INSERT INTO Version VALUES (?)", (FIRST_VERSION,))
        con.execute(f"PRAGMA application_id = {APPLICATION}")
        con.execute(f"PRAGMA user_version = {FORMAT}")


def _insert(con: sqlite3.Connection, rows: Sequence[Row], now: float) -> int:
    """Add those whose keys are new, in one statement; says how many."""
    values: list[object] = [now]
    for row in rows:
        values += (
            row.key,
            None if row.ttl is None else now + row.ttl,
            row.tag,
            _sealed(row.key, row.value),
        )
    return con.execute(_insert_statement(len(rows)), values).rowcount


@cache
def _insert_statement(rows: int) -> str:
    each = ", ".join(
        f"(?{n}, 1, ?1, ?{n + 1}, ?1, 0, ?{n + 2}, length(?{n + 3}) - 4, 1, NULL, ?{n + 3})"
        for n in range(2, 2 + 4 * rows, 4)
    )
    return f"INSERT OR IGNORE INTO Cache({_COLUMNS}) VALUES {each}"


def _patiently(work: Callable[[], T], wait: float) -> T:
    """Do it as soon as no other process writes. Raises sqlite3.OperationalError after `wait` seconds of that."""
    deadline = time.monotonic() + wait
    for attempt in itertools.count():
        try:
            return work()
        except sqlite3.OperationalError as error:
            if fault_of(error) != "busy" or time.monotonic() >= deadline:
                raise
            # SQLite's own handler backs off to 100 ms, which starves one of two busy processes.
            time.sleep(min(0.0005 * (attempt + 1), 0.005))
    raise AssertionError("unreachable")


def _lenient(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def inode(path: Path) -> tuple[int, int] | None:
    # By stat, never by open: closing any descriptor of a database drops this process's locks on it (POSIX).
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino
