"""Writes the last runs into a SQLite file of the user's own: what `asmodel trace` reads when nobody runs a collector.

`LocalTraces` takes spans as they start and end, on whatever thread that happens, and only appends them to a bounded
queue. One thread for each process writes what has gathered, ten times a second, in one transaction. A span that is
still open when its turn comes is written as open, so a run in progress can be looked at, and so can one whose process
was killed. Several processes may write to one file (WAL). `trace_reader` reads it.

A run is the outermost `invoke_workflow` span of a request; a request that was passed through to a model is a run too.
Requests in which neither happens (a list of models, a refusal) are not kept.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import orjson
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id

from asmodel import trace_schema
from asmodel import tracing as names
from asmodel.trace_reader import NoSuchTrace as NoSuchTrace
from asmodel.trace_reader import TraceFileUnreadable as TraceFileUnreadable
from asmodel.trace_reader import runs as runs
from asmodel.trace_reader import spans as spans
from asmodel.trace_schema import SCHEMA, TABLES, Outcome, process
from asmodel.trace_schema import default_path as default_path

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger("asmodel.tracing")

MAX_RUNS = 1_000
MAX_BYTES = 64 * 2**20
MAX_DATA = 32 * 2**10
"""Bytes of one span's JSON; beyond it, long texts are cut."""
MAX_CONTENT = 256 * 2**10
"""Characters of an attribute with content, which has been cut to its own limit already, inside of its JSON."""

QUEUE = 16_384
"""Spans waiting to be written. Half of it for starts: a span that has been let in can then nearly always end."""
EVERY = 0.1
"""Seconds in which spans gather before they are written, unless an eighth of the queue is full before."""
REOPEN_EVERY = 60.0
"""Seconds between two tries to open a file that could not be opened."""

_CALLS = frozenset(names.OPERATIONS.values())


@dataclass(slots=True)
class _Unit:
    """One request, or whatever else is outermost: all spans under one local root."""

    root: str
    span: ReadableSpan
    kept: bool = False
    """Whether a run has begun in it."""
    run: str | None = None
    """The run that its spans belong to outside of any program: set where a model is passed through."""


@dataclass(slots=True)
class _Live:
    """A span that has started and not ended."""

    unit: _Unit
    run: str | None
    span: ReadableSpan
    written: bool = False


@dataclass(slots=True)
class _Sums:
    spans: int = 0
    steps: int = 0
    hits: int = 0
    joined: int = 0
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0


class LocalTraces:
    """The writer of one process. `started` and `ended` may be called on any thread and never wait."""

    def __init__(self, path: Path, *, max_runs: int = MAX_RUNS, max_bytes: int = MAX_BYTES, queue: int = QUEUE) -> None:
        self.path = path
        self.dropped = 0
        """Spans that found the queue full."""
        self._queue: deque[tuple[bool, ReadableSpan]] = deque()
        self._limit = queue
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._stopping = False
        self._asked = 0
        self._flushed = 0
        self._turn = threading.Condition()
        self._off = False
        self._writer = _Writer(path, max_runs=max_runs, max_bytes=max_bytes)
        self._thread = threading.Thread(target=self._write, name="asmodel-traces", daemon=True)
        self._thread.start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_after_fork, weakref.ref(self)))

    def started(self, span: ReadableSpan) -> None:
        if self._off:
            return
        if len(self._queue) >= self._limit // 2:
            self.dropped += 1
            return
        self._queue.append((True, span))
        if not self._wake.is_set():
            self._wake.set()

    def ended(self, span: ReadableSpan) -> None:
        if self._off:
            return
        if len(self._queue) >= self._limit:
            self.dropped += 1
            return
        self._queue.append((False, span))
        if not self._wake.is_set():
            self._wake.set()
        if len(self._queue) >= self._limit // 8 and not self._hurry.is_set():
            self._hurry.set()

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that has been handed in is written; False where `timeout` seconds were not enough."""
        with self._turn:
            if self._off:
                return True
            self._asked += 1
            mine = self._asked
            self._hurry.set()
            self._wake.set()
            return self._turn.wait_for(lambda: self._flushed >= mine or not self._thread.is_alive(), timeout)

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Write what is left and stop; False where `timeout` seconds were not enough."""
        self._off = True
        self._stopping = True
        self._hurry.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _write(self) -> None:
        said = False
        while True:
            self._wake.wait()
            self._wake.clear()
            self._hurry.wait(EVERY)
            self._hurry.clear()
            stopping = self._stopping
            asked = self._asked
            try:
                self._writer.write(_drained(self._queue))
            except Exception:  # one odd span must not end the record of all that come after it
                log.warning("some spans could not be written to %s", self.path, exc_info=True)
            with self._turn:
                self._flushed = asked
                self._turn.notify_all()
            if self.dropped and not said:
                said = True
                log.warning("spans come faster than %s can be written: some are left out of it", self.path)
            if stopping:
                self._writer.close()
                return

    def forget(self) -> None:
        """For a forked child, which has the queue but not the thread: record nothing."""
        self._off = True
        self._queue.clear()


def _after_fork(ref: weakref.ref[LocalTraces]) -> None:
    local = ref()
    if local is not None:
        local.forget()


def _drained(queue: deque[tuple[bool, ReadableSpan]]) -> Iterator[tuple[bool, ReadableSpan]]:
    for _ in range(len(queue)):
        yield queue.popleft()


class _Writer:
    """What the thread does; used by it alone."""

    def __init__(self, path: Path, *, max_runs: int, max_bytes: int) -> None:
        self._path = path
        self._max_runs = max_runs
        self._max_bytes = max_bytes
        self._process = process()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._damaged = 0
        self._retry_at = 0.0
        self._warned = False
        self._live: dict[str, _Live] = {}
        self._fresh: list[_Live] = []
        self._kept: dict[str, int] = {}
        self._statements: list[tuple[str, Sequence[object]]] = []
        self._sums: dict[str, _Sums] = {}

    def write(self, spans: Iterable[tuple[bool, ReadableSpan]]) -> None:
        for is_start, span in spans:
            (self._start if is_start else self._end)(span)
        for live in self._fresh:
            self._write_open(live)
        self._fresh = [live for live in self._fresh if not live.unit.kept and self._is_open(live)]
        if len(self._live) > 2 * QUEUE:
            # Spans whose end was dropped. The oldest are the likeliest to be those.
            for span_id in list(self._live)[:QUEUE]:
                del self._live[span_id]
        if not self._statements and not self._sums:
            return
        connection = self._open()
        if connection is None:
            self._statements.clear()
            self._sums.clear()
            return
        try:
            self._commit(connection)
        except sqlite3.OperationalError as error:
            # Locked for five seconds, or the disk is full: kept in memory for the next turn, up to a bound.
            self._warn(f"cannot be written ({error})")
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()
            if len(self._statements) > QUEUE:
                self._statements.clear()
                self._sums.clear()
        except sqlite3.DatabaseError as error:
            self._warn(f"is damaged ({error})")
            self._damaged = self._inode
            self.close()

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    # -- what a span means ------------------------------------------------------------------------------------------

    def _start(self, span: ReadableSpan) -> None:
        span_id = _id(span)
        attributes = span.attributes or {}
        above = self._live.get(format_span_id(span.parent.span_id)) if span.parent is not None else None
        live = _Live(_Unit(span_id, span), None, span) if above is None else _Live(above.unit, above.run, span)
        self._live[span_id] = live
        self._fresh.append(live)
        unit = live.unit
        if names.RUN_ID in attributes and names.RUN_PROGRAM in attributes:
            if live.run is None:
                live.run = span_id
                self._begin(live, program=str(attributes[names.RUN_PROGRAM]), model=None)
        elif live.run is None and unit.run is None and (names.STEP_NAME in attributes or _is_call(attributes)):
            unit.run = unit.root
            root = self._live.get(unit.root)
            if root is not None:
                # Of a step outside of any program, the name is the upstream's.
                model = attributes.get(names.REQUEST_MODEL) or attributes.get(names.STEP_NAME)
                self._begin(root, program=None, model=str(model) if model else None)

    def _begin(self, live: _Live, *, program: str | None, model: str | None) -> None:
        """A run begins, with the span of `live`."""
        live.unit.kept = True
        span = live.span
        run_id = (span.attributes or {}).get(names.RUN_ID)
        self._statements.append(
            (
                "INSERT OR REPLACE INTO runs"
                " (span_id, trace_id, root, run_id, program, model, start_ns, process, seen_ns)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    _id(span),
                    _trace(span),
                    live.unit.root,
                    None if run_id is None else str(run_id),
                    program,
                    model,
                    span.start_time,
                    self._process,
                    time.time_ns(),
                ),
            )
        )
        root = self._live.get(live.unit.root)
        if root is not None:
            self._write_open(root)

    def _end(self, span: ReadableSpan) -> None:
        live = self._live.pop(_id(span), None)
        if live is None or not live.unit.kept:
            return
        run = live.run or live.unit.run
        # A span above the program (the request's own) belongs to no run, and is kept with those that do.
        key = run or live.unit.root
        kept = self._kept[key] = self._kept.get(key, 0) + 1
        if kept <= trace_schema.MAX_SPANS or live.written:
            self._put(live, span)
        if run is None:
            self._kept.pop(key, None)
            return
        sums = self._sums.setdefault(run, _Sums())
        attributes = span.attributes or {}
        sums.spans += 1
        _add(sums, attributes)
        if run == _id(span):
            self._kept.pop(key, None)
            self._finish(span, attributes)

    def _finish(self, span: ReadableSpan, attributes: Mapping[str, Any]) -> None:
        error = attributes.get(names.ERROR_TYPE)
        status = attributes.get(names.HTTP_STATUS)
        outcome: Outcome = "ok"
        if attributes.get(names.CANCELLED):
            outcome = "cancelled"
        elif span.status.status_code is StatusCode.ERROR or (isinstance(status, int) and status >= 400):
            outcome = "error"
        model = attributes.get(names.REQUEST_MODEL)
        self._statements.append(
            (
                "UPDATE runs SET end_ns = ?, outcome = ?, error = ?, model = coalesce(model, ?) WHERE span_id = ?",
                (
                    span.end_time,
                    outcome,
                    None if error is None else str(error),
                    None if model is None else str(model),
                    _id(span),
                ),
            )
        )

    # -- rows -------------------------------------------------------------------------------------------------------

    def _is_open(self, live: _Live) -> bool:
        return _id(live.span) in self._live

    def _write_open(self, live: _Live) -> None:
        if live.unit.kept and not live.written and self._is_open(live):
            live.written = True
            self._put(live, live.span)

    def _put(self, live: _Live, span: ReadableSpan) -> None:
        self._statements.append(
            (
                "INSERT OR REPLACE INTO spans (trace_id, root, span_id, parent_id, run, start_ns, end_ns, data)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    _trace(span),
                    live.unit.root,
                    _id(span),
                    None if span.parent is None else format_span_id(span.parent.span_id),
                    live.run or live.unit.run,
                    span.start_time,
                    span.end_time,
                    _data(span),
                ),
            )
        )

    def _commit(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        for statement, values in self._statements:
            connection.execute(statement, values)
        now = time.time_ns()
        connection.executemany(
            "UPDATE runs SET seen_ns = ?, spans = spans + ?, steps = steps + ?, hits = hits + ?, joined = joined + ?,"
            " calls = calls + ?, input_tokens = input_tokens + ?, output_tokens = output_tokens + ?, cost = cost + ?,"
            " unpriced = unpriced + ? WHERE span_id = ?",
            [
                (
                    now,
                    s.spans,
                    s.steps,
                    s.hits,
                    s.joined,
                    s.calls,
                    s.input_tokens,
                    s.output_tokens,
                    s.cost,
                    s.unpriced,
                    run,
                )
                for run, s in self._sums.items()
            ],
        )
        connection.execute("COMMIT")
        self._warned = False
        self._statements.clear()
        self._sums.clear()
        self._prune(connection)

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Forget the requests that have been quiet for longest, until both bounds are kept."""
        # An eighth is left free for what one turn writes. Freed pages are used again, so what the file has grown to is
        # what it stays at.
        most = self._max_bytes // 8 * 7
        (count,) = connection.execute("SELECT count(*) FROM runs").fetchone()
        if count <= self._max_runs and _used(connection) <= most:
            return
        connection.execute("BEGIN IMMEDIATE")
        while count > 1 and (count > self._max_runs or _used(connection) > most):
            oldest = connection.execute(
                "SELECT trace_id, root FROM runs ORDER BY seen_ns, start_ns LIMIT ?", (max(1, count - self._max_runs),)
            ).fetchall()
            connection.executemany("DELETE FROM spans WHERE trace_id = ? AND root = ?", oldest)
            connection.executemany("DELETE FROM runs WHERE trace_id = ? AND root = ?", oldest)
            (count,) = connection.execute("SELECT count(*) FROM runs").fetchone()
        connection.execute("COMMIT")

    # -- the file ---------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection | None:
        if self._connection is not None and _inode(self._path) != self._inode:
            # Deleted, or set aside by another process: what is written to it now would be seen by nobody.
            self.close()
            self._retry_at = 0.0
        if self._connection is None and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + REOPEN_EVERY
            try:
                self._connection = _opened(self._path, self._damaged)
                self._inode = _inode(self._path)
                self._damaged = 0
            except (OSError, sqlite3.Error) as error:
                self._warn(f"cannot be opened ({error})")
        return self._connection

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s %s: recent runs are not kept for `asmodel trace`", self._path, what)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _opened(path: Path, damaged: int) -> sqlite3.Connection:
    """The file, ready to be written. One that cannot be read is set aside and begun anew.

    `damaged` is the inode of a file that could be opened and then not be written.
    """
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # One process at a time: two that set the same file aside would set aside the good one that the first has begun.
    with _locked(path.with_name(path.name + ".lock")):
        if damaged and _inode(path) == damaged:
            _set_aside(path, "it is damaged")
        try:
            return _connected(path)
        except sqlite3.OperationalError:
            raise  # locked, or no room: nothing is wrong with the file
        except sqlite3.DatabaseError as error:
            _set_aside(path, str(error))
            return _connected(path)


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%S')}")
    os.replace(path, aside)
    for ending in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}{ending}")
    log.warning("%s cannot be used (%s); it is now %s, and a new one is begun", path, why, aside.name)


def _connected(path: Path) -> sqlite3.Connection:
    # SQLite makes its -wal and -shm with the rights of the file, so the file must be there, and private, first.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.fstat(descriptor).st_mode & 0o077:
            path.chmod(0o600)
    finally:
        os.close(descriptor)
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if found != SCHEMA and (found or tables):
            raise sqlite3.DatabaseError(f"its version is {found}, not {SCHEMA}")
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode this loses nothing when the process dies; a power cut may take the last moments.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {4 * 2**20}")
        # In one transaction: a reader finds all of it or an empty file.
        connection.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: processes that begin at the same moment there are left to chance
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _used(connection: sqlite3.Connection) -> int:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)


def _id(span: ReadableSpan) -> str:
    return format_span_id(span.context.span_id) if span.context is not None else ""


def _trace(span: ReadableSpan) -> str:
    return format_trace_id(span.context.trace_id) if span.context is not None else ""


def _is_call(attributes: Mapping[str, Any]) -> bool:
    return attributes.get(names.OPERATION) in _CALLS


def _add(sums: _Sums, attributes: Mapping[str, Any]) -> None:
    if names.STEP_NAME in attributes:
        result = attributes.get(names.CACHE_RESULT)
        sums.steps += 1
        sums.hits += result == "hit"
        sums.joined += result == "joined"
    elif _is_call(attributes):
        sums.calls += _int(attributes.get(names.UPSTREAM_ATTEMPTS, 1))
        if names.INPUT_TOKENS in attributes:
            sums.input_tokens += _int(attributes[names.INPUT_TOKENS])
            sums.output_tokens += _int(attributes.get(names.OUTPUT_TOKENS, 0))
            cost = attributes.get(names.UPSTREAM_COST)
            if isinstance(cost, (int, float)):
                sums.cost += cost
            else:
                sums.unpriced += 1


def _int(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) else 0


def _data(span: ReadableSpan) -> str:
    body = _body(span)
    try:
        text = orjson.dumps(body, default=str)
        if len(text) <= MAX_DATA:
            return text.decode()
    except TypeError:
        pass  # what a program may put on its own spans: an integer beyond 64 bits, half of a surrogate pair
    attributes: dict[str, Any] = body["attributes"]
    content = {name: attributes.pop(name) for name in names.CONTENT if _is_content(attributes.get(name))}
    tamed = cast("dict[str, Any]", _tamed(body))
    tamed["attributes"] |= content
    return orjson.dumps(tamed, default=str).decode()


def _is_content(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_CONTENT:
        return False
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def _body(span: ReadableSpan) -> dict[str, Any]:
    for _ in range(3):
        try:
            return {
                "name": span.name,
                "kind": span.kind.name.lower(),
                "failed": span.status.status_code is StatusCode.ERROR,
                "attributes": dict(span.attributes or {}),
                "events": [[e.name, e.timestamp, dict(e.attributes or {})] for e in span.events],
                "links": [
                    [format_trace_id(k.context.trace_id), format_span_id(k.context.span_id), dict(k.attributes or {})]
                    for k in span.links
                ],
            }
        except (KeyError, RuntimeError):  # an open span was added to as it was read
            continue
    return {"name": span.name, "kind": "internal", "failed": False, "attributes": {}, "events": [], "links": []}


def _tamed(value: object) -> object:
    """The value with long texts and lists cut, and what JSON cannot carry as a text."""
    if isinstance(value, str):
        whole = value if len(value) <= 1_000 else value[:1_000] + "…"
        return whole.encode("utf-8", "replace").decode()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, Mapping):
        return {str(_tamed(name)): _tamed(item) for name, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return [_tamed(item) for item in items[:256]]
    return value
