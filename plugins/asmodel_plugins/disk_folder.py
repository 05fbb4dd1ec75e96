"""The folder that a disk cache lives in: made, found to be this user's alone, and the store in it looked at, begun, or
set aside.

    path/            0700
      lock           held while a store is begun or set aside, by one process at a time
      store/         0700; see `disk_store`; every file 0600
      store.set-aside-TIME-ID/   what could not be used; the newest few are kept
      leases/                    0700; see `disk_lease`

A store is one folder so that it comes and goes by one rename: an old WAL beside a new database would destroy it. For
POSIX systems (`flock`, owners, rights), on a local file system.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from asmodel.errors import ConfigurationError
from asmodel_plugins.disk_store import (
    APPLICATION,
    COUNTING,
    COUNTS,
    DATABASE,
    FIRST_VERSION,
    FORMAT,
    OBJECTS,
    SETTINGS,
    TABLES,
    VERSION,
    Store,
    fault_of,
    inode,
)

log = logging.getLogger("asmodel.cache")

_KEPT_ASIDE = 3


class OtherFormat(Exception):
    """A sound store of another version of asmodel."""


def take(
    folder: Path, make: Callable[[Path], Store], wait: float, *, damaged: tuple[Store, str] | None = None, running: bool
) -> tuple[Store, bool]:
    """Open the store in the folder by `make`, after setting aside one that cannot be used, or begin one.

    `damaged` is an open one, and what is wrong with it; `running` says that this process has had a store before. Says
    also whether one was set aside. Raises ConfigurationError, OtherFormat, OSError, sqlite3.Error.
    """
    _prepare(folder)
    with _alone(folder, wait):
        for store in folder.glob("store*"):
            _tighten(store)
        for left in folder.glob(".new-*"):  # of a process that was killed; those alive hold the lock
            shutil.rmtree(left, ignore_errors=True)
        place = folder / "store"
        why: str | None = None
        if os.path.lexists(place):
            if damaged is not None and not damaged[0].moved():
                why = damaged[1]
            else:
                try:
                    why = examine(place, wait)
                except OtherFormat as error:
                    # An older server that goes on running must not undo what a newer one has begun.
                    if running:
                        raise
                    why = str(error)
            if why is not None:
                _set_aside(folder, why)
        if not os.path.lexists(place):
            _create(folder)
        return make(place), why is not None


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
        if inode(path) == (info.st_dev, info.st_ino):  # else it was deleted and made anew while we waited
            return lock
    except BlockingIOError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def examine(store: Path, wait: float) -> str | None:
    """What is wrong with a store, or None. Raises OtherFormat, or sqlite3.Error where that cannot be said."""
    try:
        if not stat.S_ISDIR(os.lstat(store).st_mode):
            return "it is not a folder"
        for name in (DATABASE, DATABASE + "-wal", DATABASE + "-shm"):
            try:
                info = os.lstat(store / name)
            except FileNotFoundError:
                if name == DATABASE:
                    return "it has no database"
                continue
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                return f"its {name} is not a file of this user"
        uri = (store / DATABASE).as_uri() + "?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None)) as con:
            return _examine_schema(con) or _examine_version(store / VERSION)
    except sqlite3.Error as error:
        if fault_of(error) in ("damaged", "odd"):
            return str(error)
        raise


def _examine_schema(con: sqlite3.Connection) -> str | None:
    con.execute("PRAGMA trusted_schema = OFF")
    ((application,),) = con.execute("PRAGMA application_id").fetchall()
    ((version,),) = con.execute("PRAGMA user_version").fetchall()
    schema = dict(con.execute("SELECT name, sql FROM sqlite_master WHERE name NOT GLOB 'sqlite_*'").fetchall())
    if application != APPLICATION:
        return "it is not a store of asmodel's"
    if version != FORMAT:
        raise OtherFormat(f"it has format {version}, and this asmodel reads format {FORMAT}")
    if schema.keys() != OBJECTS or any(schema[name] != statement for name, statement in COUNTING.items()):
        return "its schema is not ours"
    for table, columns in TABLES.items():
        if {str(row[1]) for row in con.execute(f"PRAGMA table_info({table})")} != columns:
            return f"its table {table} is not ours"
    ((mode,),) = con.execute("PRAGMA journal_mode").fetchall()
    settings: dict[object, object] = dict(con.execute("SELECT key, value FROM Settings").fetchall())
    counted = {name: settings.pop(name, None) for name in COUNTS}
    if mode != "wal" or not all(type(value) is int for value in counted.values()):
        return "its settings were changed"
    if settings != SETTINGS or any(type(settings[name]) is not type(value) for name, value in SETTINGS.items()):
        return "its settings were changed"
    return None


def _examine_version(file: Path) -> str | None:
    try:
        info = os.lstat(file)
    except FileNotFoundError:
        return f"it has no {VERSION}"
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_size != len(FIRST_VERSION):
        return f"its {VERSION} is not a file of this user, and of {len(FIRST_VERSION)} bytes"
    return None


def _create(folder: Path) -> None:
    """Begin a store: made under another name, so that a store is whole or not there."""
    fresh = folder / f".new-{secrets.token_hex(4)}"
    _make_folder(fresh)
    for name, content in ((DATABASE, b""), (VERSION, FIRST_VERSION)):
        file = os.open(fresh / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(file, 0o600)  # SQLite gives its -wal and -shm the rights of the database
        os.write(file, content)
        os.close(file)
    store = Store(fresh)
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
