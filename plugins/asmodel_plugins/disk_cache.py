"""The step cache on local disk: diskcache's SQLite store, made safe to read and cheap to wait for.

diskcache as it comes follows the umask, unpickles what it finds, removes files that a row names, turns every row of its
`Settings` table into a pragma or an attribute, and keeps a failed commit open. So: nothing but bytes in rows is written
or believed, connections are ours, and a store is looked at before diskcache sees it.

    path/            0700
      lock           held while a store is begun or set aside, by one process at a time
      store/         0700; cache.db, cache.db-wal, cache.db-shm, all 0600
      store.set-aside-TIME-ID/   what could not be used; the newest few are kept
      leases/                    0700; see `disk_lease`

A store is one folder so that it comes and goes by one rename: an old WAL beside a new database would destroy it. For
POSIX systems (`flock`, owners, rights), on a local file system.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import queue
import secrets
import shutil
import sqlite3
import stat
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from asmodel.errors import AsmodelError, ConfigurationError
from asmodel.protocols import Lease
from asmodel_plugins.disk_lease import DiskLeases

if TYPE_CHECKING:  # diskcache publishes no types; this is what we use of it

    class _Disk: ...

    class _Cache:
        def __init__(self, directory: str, *, timeout: float, disk: type[_Disk], **settings: int | str) -> None: ...
        def get(self, key: str) -> bytes | None: ...
        def set(self, key: str, value: bytes, *, expire: float | None, tag: str) -> bool: ...

    DBNAME: str
    METADATA: Mapping[str, int]
    MODE_RAW: int
else:
    from diskcache import Cache as _Cache
    from diskcache import Disk as _Disk
    from diskcache.core import DBNAME, METADATA, MODE_RAW

T = TypeVar("T")

log = logging.getLogger("asmodel.cache")

FORMAT = 2
"""What our rows look like: SQLite's `user_version`. Raise it when they change."""

APPLICATION = 0x61736D31
"""SQLite's `application_id`: this database is ours and not any other program's."""

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

_TABLES: Mapping[str, set[str]] = {
    "Settings": {"key", "value"},
    "Cache": {"rowid", "key", "raw", "store_time", "expire_time", "access_time", "access_count"}
    | {"tag", "size", "mode", "filename", "value"},
}

_OBJECTS: set[str] = (
    {"Settings", "Settings_count_insert", "Settings_count_delete"}
    | {"Settings_size_insert", "Settings_size_update", "Settings_size_delete"}
    | {"Cache", "Cache_key_raw", "Cache_expire_time", "Cache_store_time"}
)
"""Everything the schema may hold: a trigger of somebody else's would run inside our writes."""

_OURS = "typeof(key) = 'text' AND raw = 1 AND mode = 1 AND filename IS NULL AND typeof(value) = 'blob'"

_QUICK_BYTES = 256 * 1024
"""Longer values are read in a thread: about 0.1 ms is what the event loop can spare."""

_BATCH_ENTRIES = 512
_BATCH_BYTES = 16 * 2**20
_CHUNK_ROWS = 256
"""Rows deleted in one transaction: what a waiting `set` waits for at most."""

_LOOK_SECONDS = 0.5
"""How often a reader looks whether its store is still the one in the folder (the writer always does)."""

_REPAIR_SECONDS = 60.0
"""A store that breaks again sooner than this stays off: the disk is the trouble, not the store."""

_CONNECT_SECONDS = 5.0
_RETRY_SECONDS = 5.0
_EXPIRE_SECONDS = 60.0
_KEPT_ASIDE = 3


class Unreadable(Exception):
    """A row that we did not write like this; says which kind of oddity, never what the row holds."""


class _Retired(Exception):
    """The store object was closed in favour of another one."""


class _OtherFormat(Exception):
    """A sound store of another version of asmodel."""


Fault: TypeAlias = Literal["busy", "large", "damaged", "refused", "odd"]


def _fault(error: sqlite3.Error) -> Fault:
    """What an error of SQLite means for the store (https://sqlite.org/rescode.html)."""
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


def _checksum(key: str, value: bytes) -> bytes:
    """CRC-32 of both, so that a value is found under no other key than the one that it was stored under."""
    return zlib.crc32(value, zlib.crc32(key.encode())).to_bytes(4, "little")


class BytesDisk(_Disk):
    """How a value lies in a row: its bytes, then `_checksum` in four bytes. Keys are text. No files, no pickles."""

    def put(self, key: object) -> tuple[str, bool]:
        if type(key) is not str:
            raise TypeError(f"a cache key is a str, not {type(key).__name__}")
        return key, True

    def get(self, key: object, raw: object) -> str:
        if not raw or type(key) is not str:
            raise Unreadable("a key that is not text")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, bytes]:
        if read or type(value) is not bytes:
            raise TypeError(f"a cached value is bytes, not {type(value).__name__}")
        if type(key) is not str:
            raise TypeError(f"a cache key is a str, not {type(key).__name__}")
        return len(value), MODE_RAW, None, value + _checksum(key, value)

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> bytes:
        if mode != MODE_RAW:
            raise Unreadable("a value in a mode that is never written")
        if filename is not None:
            raise Unreadable("a value that names a file")
        if type(value) is not bytes:
            raise Unreadable("a value that is not bytes")
        return value  # with its checksum, which is of the key too: `_Store._read` looks at that

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


@dataclass(slots=True, eq=False)
class _Entry:
    key: str
    value: bytes
    tag: str
    ttl: float | None
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class _Job:
    """Work for the writer thread that is not an entry; `settle` is told the result, or the error."""

    work: Callable[[], object]
    settle: Callable[[object, Exception | None], None] | None = None


class _Store(_Cache):
    """One open store: diskcache's reads and writes over connections and transactions of our own.

    Every method blocks; only `look` never waits. As of any diskcache, its truth value is a query: compare with None.
    diskcache names its seams with an underscore (`_con`, `_transact`) and
    has not changed since 5.6.3.
    """

    def __init__(self, folder: Path, synchronous: int = 1) -> None:
        """`synchronous` as SQLite's pragma: 1 survives the process, 2 (FULL, a sync each commit) the power too."""
        self.database = folder / DBNAME
        self._synchronous = synchronous
        self.look_at = 0.0
        self.suspect = False
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._connections: list[_Held] = []
        self._is_retired = False
        self._thread = threading.local()
        super().__init__(str(folder), timeout=0, disk=BytesDisk, **SETTINGS)
        self._inode = _inode(self.database)

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
                raise _Retired
            gone = [h for h in self._connections if not h.thread.is_alive()]
            self._connections = [h for h in self._connections if h.thread.is_alive()]
            self._connections.append(held)
        for h in gone:
            h.con.close()
        self._thread.held = held
        return held

    def _held(self, *, quick: bool = False) -> _Held:
        if os.getpid() != self._pid:
            raise RuntimeError("the disk cache was opened before a fork; open one of its own in the child")
        held: _Held | None = getattr(self._thread, "held", None)
        if held is None:
            held = self._connect(quick=quick)
        return held

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
        """Close every thread's connection; whoever still holds this store is told so by `_Retired`."""
        with self._guard:
            self._is_retired = True
            connections, self._connections = self._connections, []
        for held in connections:
            with held.lock:
                held.con.close()

    def moved(self) -> bool:
        """Whether the database that this store writes to is no longer the one in the folder."""
        return _inode(self.database) != self._inode

    # Reading

    def look(self, key: str) -> bytes | None:
        """Read without ever waiting. Raises sqlite3.Error: `_fault` says whether it is worth another try."""
        return self._read(key, quick=True)

    def load(self, key: str) -> bytes | None:
        """Read a value of any size."""
        return self._read(key, quick=False)

    def _read(self, key: str, *, quick: bool) -> bytes | None:
        held = self._held(quick=quick)
        with held.lock:
            if self._is_retired:
                raise _Retired
            value = self.get(key)
        if value is None:
            return None
        data = value[:-4]
        if value[-4:] != _checksum(key, data):
            raise Unreadable("a value that does not match its checksum")
        return data

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        held = self._held()
        with held.lock:
            if self._is_retired:
                raise _Retired
            return held.con.execute(statement, values).fetchall()

    # Writing

    @contextmanager
    def writing(self, wait: float) -> Generator[sqlite3.Connection]:
        """One transaction of the only writer; waits `wait` seconds at most for other processes' to end."""
        con = self._held().con
        deadline = time.monotonic() + wait
        for attempt in itertools.count():
            try:
                con.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                if _fault(error) != "busy" or time.monotonic() >= deadline:
                    raise
                # SQLite's own handler backs off to 100 ms, which starves one of two busy processes.
                time.sleep(min(0.0005 * (attempt + 1), 0.005))
        self._thread.in_transaction = True
        try:
            yield con
            con.execute("COMMIT")
        except BaseException:
            if con.in_transaction:  # after a full disk SQLite has already rolled back
                con.execute("ROLLBACK")
            raise
        finally:
            self._thread.in_transaction = False

    @contextmanager
    def _transact(
        self, retry: bool = False, filename: str | None = None
    ) -> Generator[tuple[Callable[..., sqlite3.Cursor], Callable[[object], None]]]:
        """diskcache's transaction, within ours: its own hides why it did not begin, and leaves a failed commit open."""
        if not getattr(self._thread, "in_transaction", False):
            raise RuntimeError("the disk cache is written by its writer thread only")
        yield self._con.execute, _no_cleanup

    def write(self, entries: Sequence[_Entry], wait: float) -> None:
        with self.writing(wait):
            for entry in entries:
                self.set(entry.key, entry.value, expire=entry.ttl, tag=entry.tag)

    def remove_rows(self, where: str, values: Sequence[object], order: str, wait: float) -> tuple[int, int]:
        """Delete the first rows that match; says how many, and the highest row id among them."""
        with self.writing(wait) as con:
            found = [
                row
                for (row,) in con.execute(
                    f"SELECT rowid FROM Cache WHERE {where} ORDER BY {order} LIMIT {_CHUNK_ROWS}", values
                )
            ]
            con.executemany("DELETE FROM Cache WHERE rowid = ?", [(row,) for row in found])
        return len(found), max(found, default=0)

    def delete_expired(self, wait: float) -> int:
        return self.remove_rows("expire_time < ?", (time.time(),), "expire_time", wait)[0]

    def used(self) -> int:
        """Bytes of the database that hold something."""
        con = self._con
        ((pages,),) = con.execute("PRAGMA page_count").fetchall()
        ((free,),) = con.execute("PRAGMA freelist_count").fetchall()
        ((size,),) = con.execute("PRAGMA page_size").fetchall()
        return int(size) * (int(pages) - int(free))

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
        con.execute("CREATE INDEX Cache_store_time ON Cache(store_time)")  # the order of eviction
        con.execute(f"PRAGMA application_id = {APPLICATION}")
        con.execute(f"PRAGMA user_version = {FORMAT}")


def _lenient(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _no_cleanup(filename: object) -> None:
    """What diskcache calls for the file of an overwritten row. Our rows have none."""


def _inode(path: Path) -> tuple[int, int] | None:
    # By stat, never by open: closing any descriptor of a database drops this process's locks on it (POSIX).
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _make_folder(path: Path) -> None:
    os.mkdir(path, 0o700)
    os.chmod(path, 0o700)  # the umask may have taken rights from us too


def _prepare(folder: Path) -> None:
    """Make the folder, or see that it is ours alone. Raises ConfigurationError, OSError."""
    for missing in (*(p for p in reversed(folder.parents) if not p.exists()), folder):
        with suppress(FileExistsError):  # of the folder itself, or because another process is as fast
            _make_folder(missing)
    info = os.stat(folder)
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigurationError(f'the cache path "{folder}" is not a folder; set [cache] path to a folder')
    if info.st_uid != os.geteuid():
        raise ConfigurationError(
            f'the cache folder "{folder}" belongs to user {info.st_uid}, and this is user {os.geteuid()}: what it '
            "holds cannot be trusted; set [cache] path to a folder of your own (it may be a new one inside of this one)"
        )
    if info.st_mode & stat.S_ISVTX or folder in (Path(os.path.expanduser("~")), folder.parent):
        raise ConfigurationError(
            f'the cache folder "{folder}" is shared with other things; set [cache] path to a folder inside of it'
        )
    if stat.S_IMODE(info.st_mode) & 0o777 != 0o700:
        os.chmod(folder, 0o700)
        log.warning('the cache folder "%s" was open to others (%o); it is 0700 now', folder, info.st_mode & 0o777)


def _tighten(store: Path) -> None:
    """Make a store folder 0700 and its files 0600. What else lies in the cache folder is not ours to change."""
    if not stat.S_ISDIR(os.lstat(store).st_mode):
        return
    if stat.S_IMODE(os.lstat(store).st_mode) & 0o777 != 0o700:
        os.chmod(store, 0o700)
    for file in store.iterdir():
        try:
            mode = os.lstat(file).st_mode
            if stat.S_ISREG(mode) and stat.S_IMODE(mode) & 0o777 != 0o600:
                os.chmod(file, 0o600)
                log.warning('the cache file "%s" was open to others (%o); it is 0600 now', file, mode & 0o777)
        except FileNotFoundError:  # another process closed its WAL between the two looks
            continue


@contextmanager
def _alone(folder: Path, wait: float) -> Generator[None]:
    """Hold the folder's lock. Raises ConfigurationError if another process holds it for longer than `wait` seconds."""
    path = folder / "lock"
    deadline = time.monotonic() + wait
    while (lock := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise ConfigurationError(
                f'another process has been holding "{path}" for {wait:g} s; stop it, or set another [cache] path'
            )
        time.sleep(0.01)
    try:
        yield
    finally:
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(lock, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        info = os.fstat(lock)
        if _inode(path) == (info.st_dev, info.st_ino):  # else it was deleted and made anew while we waited
            return lock
    except BlockingIOError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _examine(store: Path, wait: float) -> str | None:
    """What is wrong with a store, or None. Raises _OtherFormat, or sqlite3.Error where that cannot be said."""
    try:
        if not stat.S_ISDIR(os.lstat(store).st_mode):
            return "it is not a folder"
        for name in (DBNAME, DBNAME + "-wal", DBNAME + "-shm"):
            try:
                info = os.lstat(store / name)
            except FileNotFoundError:
                if name == DBNAME:
                    return "it has no database"
                continue
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                return f"its {name} is not a file of this user"
        uri = (store / DBNAME).as_uri() + "?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None)) as con:
            return _examine_schema(con)
    except sqlite3.Error as error:
        if _fault(error) in ("damaged", "odd"):
            return str(error)
        raise


def _examine_schema(con: sqlite3.Connection) -> str | None:
    con.execute("PRAGMA trusted_schema = OFF")
    ((application,),) = con.execute("PRAGMA application_id").fetchall()
    ((version,),) = con.execute("PRAGMA user_version").fetchall()
    schema = con.execute("SELECT name FROM sqlite_master WHERE name NOT GLOB 'sqlite_*'")
    names = {str(name) for (name,) in schema}
    if application != APPLICATION:
        return "it is not a store of asmodel's"
    if version != FORMAT:
        raise _OtherFormat(f"it has format {version}, and this asmodel reads format {FORMAT}")
    if names != _OBJECTS:
        return "its schema is not ours"
    for table, columns in _TABLES.items():
        if {str(row[1]) for row in con.execute(f"PRAGMA table_info({table})")} != columns:
            return f"its table {table} is not ours"
    ((mode,),) = con.execute("PRAGMA journal_mode").fetchall()
    settings: dict[object, object] = dict(con.execute("SELECT key, value FROM Settings").fetchall())
    counted = {name: settings.pop(name, None) for name in METADATA}
    if mode != "wal" or not all(type(value) is int for value in counted.values()):
        return "its settings were changed"
    if settings != SETTINGS or any(type(settings[name]) is not type(value) for name, value in SETTINGS.items()):
        return "its settings were changed"
    return None


def _create(folder: Path) -> None:
    """Begin a store: made under another name, so that a store is whole or not there."""
    fresh = folder / f".new-{secrets.token_hex(4)}"
    _make_folder(fresh)
    database = os.open(fresh / DBNAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.fchmod(database, 0o600)  # SQLite gives its -wal and -shm the rights of the database
    os.close(database)
    store = _Store(fresh)
    try:
        store.found()
    finally:
        store.retire()
    os.rename(fresh, folder / "store")


def _set_aside(folder: Path, why: str) -> None:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = folder / f"store.set-aside-{stamp}-{secrets.token_hex(2)}"
    os.rename(folder / "store", aside)
    log.warning(
        'the cache store in "%s" cannot be used: %s. It is set aside as "%s", and a new one begun',
        folder,
        why,
        aside.name,
    )
    older = sorted(p for p in folder.iterdir() if p.name.startswith("store.set-aside-"))[:-_KEPT_ASIDE]
    for old in older:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


class DiskCache:
    """Bytes by key on local disk, for any number of tasks, event loops and processes at once.

    A `get` reads on the event loop (about 10 us) and never waits there: while another process has the store locked it
    tries again, for `read_timeout` seconds at most, and then misses. A `set` is written by one thread that commits
    whatever has gathered, and returns when the commit is done: the entry survives a `kill -9`, power loss may take the
    last second. `size_limit` bytes of database are kept, the oldest entries leave first.

    Nothing that the folder holds can stop or mislead a run. What cannot be read is a miss, what cannot be written is
    not stored, a store that cannot be used is set aside; each is counted in `troubles` and logged once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "~/.cache/asmodel",
        size_limit: int = 2**30,
        timeout: float = 5.0,
        read_timeout: float = 0.5,
    ) -> None:
        """`size_limit` in bytes; `timeout` is how long, in seconds, a write waits for other processes' writes."""
        expanded = os.path.expanduser(path)
        if os.fspath(expanded).startswith("~"):
            raise ConfigurationError(f'[cache] path: "{expanded}" starts at a home folder that is not known; set HOME')
        self.path = Path(os.path.abspath(expanded))
        if os.path.expandvars(self.path) != str(self.path):
            raise ConfigurationError(f'[cache] path: "{self.path}" holds a variable; write the folder itself')
        if size_limit < 2**20:
            raise ConfigurationError(f"[cache] size_limit: {size_limit} bytes are too few; at least {2**20} are needed")
        self.size_limit = size_limit
        self.timeout = timeout
        self.read_timeout = read_timeout
        self.troubles = Troubles()
        self._synchronous = 1
        self._store: _Store | None = None
        self._queue: queue.SimpleQueue[_Entry | _Job | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._guard = threading.Lock()
        self._leases = DiskLeases(self.path / "leases")
        self._told: set[str] = set()
        self._set_aside_at = -_REPAIR_SECONDS
        self._retry_at = 0.0
        self._expire_at = 0.0

    def lasting(self) -> DiskCache:
        """A store in a folder of its own within this one, without a limit, whose entries survive the power too."""
        made = DiskCache(self.path / "effects", 2**62, self.timeout, self.read_timeout)
        made._synchronous = 2
        return made

    # Life

    async def open(self) -> None:
        """Make or take the folder. Raises ConfigurationError where it cannot be this user's private folder."""
        if self._writer is not None:
            return
        await asyncio.to_thread(self._begin)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="asmodel-cache-reader")
        self._writer = threading.Thread(target=self._work, name="asmodel-cache-writer", daemon=True)
        self._writer.start()
        await self.get("")  # connects this thread now rather than in the first request

    def _begin(self) -> None:
        try:
            self._store = self._take(damaged=None, running=False)
            self._store.close()  # this thread was only lent, and is no reader of ours
        except sqlite3.Error as error:
            if _fault(error) == "busy":
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
        with self._guard:
            writer, self._writer = self._writer, None
            if writer is None:
                return
            self._queue.put(None)
        await asyncio.shield(asyncio.to_thread(self._end, writer))

    def _end(self, writer: threading.Thread) -> None:
        writer.join()
        if self._pool is not None:
            self._pool.shutdown()
        self._leases.close()
        store, self._store = self._store, None
        if store is not None:
            store.retire()

    def _put(self, item: _Entry | _Job) -> None:
        with self._guard:  # nothing may come in behind the end
            if self._writer is None:
                raise RuntimeError("the disk cache is not open")
            self._queue.put(item)

    def lease(self, key: str, seconds: float = 10.0) -> AbstractAsyncContextManager[Lease]:
        """Try to be the one who acts on `key`, of this machine's processes; see `asmodel.protocols.Lockable`."""
        return self._leases.lease(key, seconds)

    # Reading

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
            except _Retired:
                if self._store is store:
                    return None
                continue
            except sqlite3.Error as error:
                fault = _fault(error)
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
        if self._writer is None:
            raise RuntimeError("the disk cache is not open")
        self._trouble("unreadable", "off", "the cache is off, until its folder can be used again: every get is a miss")
        self._wake()

    def _wake(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._put(_Job(self._usable))

    def _ask(self, store: _Store, error: sqlite3.Error | None) -> None:
        """Have the writer thread look at a store that moved or failed, once however many readers notice."""
        if not store.suspect:
            store.suspect = True
            self._put(_Job(lambda: self._recover(store, error)))

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        if self._pool is None or self._writer is None:
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
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._put(_Entry(key, bytes(value), tag, ttl, loop, done))
        await done

    def _work(self) -> None:
        """The writer thread: everything that changes the store, one batch after the other, until the end."""
        evicting = False
        ended = False
        while not ended:
            batch: list[_Entry] = []
            jobs: list[_Job] = []
            for item in self._drain(wait=not evicting):
                if item is None:
                    ended = True
                elif isinstance(item, _Job):
                    jobs.append(item)
                else:
                    batch.append(item)
            try:
                if batch:
                    self._write(batch)
            except Exception as error:  # a bug here must cost one batch, not hang every run that waits for one
                log.exception("the cache writer failed")
                self._trouble("unstored", "writer", "entries were not stored: %s", type(error).__name__, n=len(batch))
            finally:
                _resolve(batch)
            for job in jobs:
                _run(job)
            evicting = not ended and self._evict(evicting)

    def _drain(self, *, wait: bool) -> Iterator[_Entry | _Job | None]:
        size = 0
        most = min(_BATCH_BYTES, self.size_limit // 8)  # what lies above the limit until it is evicted
        try:
            for count in itertools.count(1):
                item = self._queue.get(block=wait and count == 1)
                yield item
                if isinstance(item, _Entry):
                    size += len(item.value)
                if item is None or count >= _BATCH_ENTRIES or size >= most:
                    return
        except queue.Empty:
            return

    def _write(self, batch: Sequence[_Entry]) -> None:
        for _ in range(3):
            store = self._usable()
            if store is None:
                break
            try:
                store.write(batch, self.timeout)
            except sqlite3.Error as error:
                if self._recover(store, error):
                    continue
                self._trouble("unstored", f"write: {_fault(error)}", "entries were not stored: %s", error, n=len(batch))
                return
            # Another process may have set the store aside while we committed to it.
            if not store.moved():
                return
        self._trouble("unstored", "off", "entries were not stored: the cache is off", n=len(batch))

    def _usable(self) -> _Store | None:
        """The store that is in the folder now. In the writer thread."""
        store = self._store
        if store is not None and not store.moved():
            return store
        if store is not None or time.monotonic() >= self._retry_at:
            self._replace(store, damaged=None)
        return self._store

    def _recover(self, store: _Store, error: sqlite3.Error | None) -> bool:
        """After an error, or a suspicion: whether there is another store now. In the writer thread."""
        if self._store is not store:
            return self._store is not None
        store.suspect = False
        if store.moved():
            return self._replace(store, damaged=None)
        if error is None or _fault(error) in ("busy", "large", "refused"):
            return False
        why: str | None = str(error)
        if _fault(error) == "odd":
            try:
                why = _examine(self.path / "store", self.timeout)
            except (sqlite3.Error, _OtherFormat, OSError):
                why = None
        return why is not None and self._replace(store, damaged=why)

    def _replace(self, store: _Store | None, *, damaged: str | None) -> bool:
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
        except (sqlite3.Error, OSError, ConfigurationError, _OtherFormat) as error:
            self._told_once("replace", "the cache is off until its folder can be used again: %s", error)
        finally:
            if store is not None:
                store.retire()
        return self._store is not None

    def _take(self, *, damaged: tuple[_Store, str] | None, running: bool) -> _Store:
        """Open the store in the folder, after setting aside one that cannot be used, or begin one."""
        _prepare(self.path)
        with _alone(self.path, self.timeout):
            for store in self.path.glob("store*"):
                _tighten(store)
            for left in self.path.glob(".new-*"):  # of a process that was killed; those alive hold the lock
                shutil.rmtree(left, ignore_errors=True)
            place = self.path / "store"
            if os.path.lexists(place):
                if damaged is not None and not damaged[0].moved():
                    why: str | None = damaged[1]
                else:
                    try:
                        why = _examine(place, self.timeout)
                    except _OtherFormat as error:
                        # An older server that goes on running must not undo what a newer one has begun.
                        if running:
                            raise
                        why = str(error)
                if why is not None:
                    _set_aside(self.path, why)
                    self._set_aside_at = time.monotonic()
                    self._count("set_aside", 1)
            if not os.path.lexists(place):
                _create(self.path)
            return _Store(place, self._synchronous)

    def _evict(self, evicting: bool) -> bool:
        """Delete some of what is too much; says whether there is more. Ends at nine tenths, not to be always at it."""
        store = self._store
        if store is None:
            return False
        try:
            now = time.monotonic()
            if now >= self._expire_at and store.delete_expired(self.timeout) < _CHUNK_ROWS:
                self._expire_at = now + _EXPIRE_SECONDS
            if store.used() <= self.size_limit * (0.9 if evicting else 1.0):
                return False
            deleted, _ = store.remove_rows("TRUE", (), "store_time", self.timeout)
            # A chunk between two batches, unless writes outrun that.
            while deleted and store.used() > self.size_limit * 1.1:
                deleted, _ = store.remove_rows("TRUE", (), "store_time", self.timeout)
            return deleted > 0
        except sqlite3.Error as error:
            if _fault(error) != "busy":
                self._told_once("evict", "the cache could not be made smaller: %s", error)
                self._recover(store, error)
            return False

    # What it holds

    async def entries(self) -> AsyncIterator[tuple[str, str, int]]:
        """Key, tag and size in bytes of each entry; those written while it runs may be missing."""
        after = 0
        while rows := await self._rows(
            f"SELECT rowid, key, tag, size FROM Cache WHERE rowid > ? AND {_OURS}"
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
            deleted, after = await self._job(partial(self._delete, where, limits))
            total += deleted
            if not deleted:
                break
        while total and await self._job(self._shrink):
            continue
        return total

    def _delete(self, where: str, values: Sequence[object]) -> tuple[int, int]:
        try:
            return self._required().remove_rows(where, values, "rowid", self.timeout)
        except sqlite3.Error as error:
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
            f"SELECT tag, COUNT(*), SUM(size) FROM Cache WHERE {_OURS} AND (expire_time IS NULL OR expire_time > ?)"
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
            except _Retired:
                if self._store is store:
                    return []
            except sqlite3.Error as error:
                if _fault(error) != "busy" or time.monotonic() >= deadline:
                    self._trouble("unreadable", f"list: {_fault(error)}", "the cache could not be listed: %s", error)
                    self._ask(store, error)
                    return []
                await asyncio.sleep(0.01)

    def _required(self) -> _Store:
        store = self._usable()
        if store is None:
            raise AsmodelError(f'the cache in "{self.path}" is off: its folder cannot be used')
        return store

    async def _job(self, work: Callable[[], T]) -> T:
        """Run something in the writer thread, in its turn."""
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


def _run(job: _Job) -> None:
    try:
        result, error = job.work(), None
    except Exception as raised:  # whatever it is belongs to whoever asked for the job
        result, error = None, raised
    if job.settle is not None:
        job.settle(result, error)
    elif error is not None:
        log.error("the cache writer could not look after its store", exc_info=error)


def _resolve(batch: Sequence[_Entry]) -> None:
    """Tell everyone who waits for the batch, with one call into each event loop."""
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for entry in batch:
        waiting.setdefault(entry.loop, []).append(entry.done)

    def finish(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            if not future.done():  # a waiter that was cancelled
                future.set_result(None)

    for loop, futures in waiting.items():
        _call(loop, partial(finish, futures))


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        log.debug("an event loop ended before its cache entries were written")
