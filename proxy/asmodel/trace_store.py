"""Writes the last runs into a SQLite file of the user's own: what `asmodel trace` reads when nobody runs a collector.

`LocalTraces` is the keeper (trace_spans.py) of a process's spans: it is told which requests have something new, on
whatever thread that happens, and puts them into a bounded queue. One thread for each process writes what has gathered,
ten times a second, in one transaction. A span that is still open when its turn comes is written as open, so a run in
progress can be looked at, and so can one whose process was killed. Several processes may write to one file (WAL).
`trace_reader` reads it.

A run is the outermost `invoke_workflow` span of a request; a request that was passed through to a model is a run too.
Requests in which neither happens (a list of models, a refusal) are not kept.

All that a turn has of a request is written as one text (trace_schema.py says how), and a request that began and ended
within a turn is written once. Where so many do that the file would soon have to forget them, they are held for up to a
second, and only the last of them are written at all; what is under way is not held, and so never seen late.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import orjson
from opentelemetry.trace import SpanKind, StatusCode

from asmodel import trace_schema
from asmodel import tracing as names
from asmodel.sqlite_file import SQLiteFile
from asmodel.trace_reader import NoSuchTrace as NoSuchTrace
from asmodel.trace_reader import TraceFileUnreadable as TraceFileUnreadable
from asmodel.trace_reader import runs as runs
from asmodel.trace_reader import spans as spans
from asmodel.trace_schema import SCHEMA, TABLES, Outcome, number, process
from asmodel.trace_schema import default_path as default_path

if TYPE_CHECKING:
    from opentelemetry.trace import Link

    from asmodel.trace_spans import Recorded, Unit

log = logging.getLogger("asmodel.tracing")

MAX_RUNS = 1_000
MAX_BYTES = 64 * 2**20
MAX_DATA = 32 * 2**10
"""Bytes of one span's JSON; beyond it, long texts are cut."""
MAX_CONTENT = 256 * 2**10
"""Characters of an attribute with content, which has been cut to its own limit already, inside of its JSON."""

QUEUE = 32_768
"""Spans that may wait. One that has been let in can always end."""
EVERY = 0.1
"""Seconds in which spans gather before they are written, unless half of the queue is full before."""
HOLD = 1.0
"""Seconds for which requests are held that began and ended within a turn, where they are many."""
AT_ONCE = 50
"""Requests that are read without a pause. It takes a millisecond, for which nothing else can run."""
TOGETHER = 250
"""Requests that are written in one transaction: what is in one is in memory, and then in the log of the file."""
REOPEN_EVERY = 60.0
"""Seconds between two tries to open a file that could not be opened."""

_CALLS = frozenset(names.OPERATIONS.values())
_KINDS = {kind: kind.name.lower() for kind in SpanKind}


@dataclass(slots=True, eq=False)
class _Kept:
    """A run, as its row says it. Only this process writes that row."""

    id: int
    unit: int
    span: int
    """The id of the span that is the run."""
    span_id: str
    trace_id: str
    root: str
    run_id: str | None
    program: str | None
    model: str | None
    start_ns: int
    end_ns: int | None = None
    outcome: Outcome | None = None
    error: str | None = None
    spans: int = 0
    steps: int = 0
    hits: int = 0
    joined: int = 0
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0
    scope: str | None = None
    """Whose request it is a part of; None where that is nobody's in particular."""
    fits: bool = True
    """Whether there is room for more of its spans."""


@dataclass(slots=True, eq=False)
class _State:
    """What the writer knows of a unit."""

    number: int
    root: str
    trace_id: str
    top: Recorded | None
    """Its outermost span; let go of once that has ended."""
    run: _Kept | None = None
    """The run that its spans belong to outside of any program: set where a model is passed through."""
    begun: bool = False
    """Whether a run has begun in it. If not, its spans wait for one."""
    waiting: list[Recorded] = field(default_factory=list["Recorded"])
    open: int = 0
    """How many of its spans have begun and not ended."""
    shown: bool = False
    """Whether any was written as open."""
    above: int = 0
    """Spans written of those that belong to no run."""


class LocalTraces:
    """The writer of one process. `take` may be called on any thread and never waits."""

    def __init__(self, path: Path, *, max_runs: int = MAX_RUNS, max_bytes: int = MAX_BYTES, queue: int = QUEUE) -> None:
        self.path = path
        self.off = False
        self.dropped = 0
        """Spans that found no room."""
        self.room = queue
        """How many spans more find room until the next turn. Counted without a lock: it begins anew with each turn, so
        what two threads miscount is forgotten with it."""
        self._most = queue
        self._queue: deque[Unit] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._awake = False
        self._stopping = False
        self._asked = 0
        self._flushed = 0
        self._turn = threading.Condition()
        self._held: deque[tuple[Unit, int]] = deque(maxlen=max_runs)
        """Requests that have ended and are to be written, but for those that the file would forget again; each with the
        spans that it had when it was taken in, for one that ends late may still come to it."""
        self._held_spans = 0
        self._due = 0
        """How many of them are to be written in this turn, the oldest first."""
        self._many = max(1, round(max_runs * EVERY / HOLD))
        """So many a turn are many."""
        self._writer = _Writer(path, max_runs=max_runs, max_bytes=max_bytes)
        self._thread = threading.Thread(target=self._write, name="asmodel-traces", daemon=True)
        self._thread.start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_after_fork, weakref.ref(self)))

    def take(self, unit: Unit) -> None:
        if self.off:
            return
        self._queue.append(unit)
        if not self._awake:
            self._awake = True
            self._wake.set()
        if self.room < self._most // 2 and not self._hurry.is_set():
            self._hurry.set()

    def refuse(self) -> None:
        self.dropped += 1
        if not self._hurry.is_set():
            self._hurry.set()

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that has been handed in is written; False where `timeout` seconds were not enough."""
        with self._turn:
            if self.off:
                return True
            self._asked += 1
            mine = self._asked
            self._hurry.set()
            self._wake.set()
            return self._turn.wait_for(lambda: self._flushed >= mine or not self._thread.is_alive(), timeout)

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Write what is left and stop; False where `timeout` seconds were not enough."""
        self.off = True
        self._stopping = True
        self._hurry.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _write(self) -> None:
        said = False
        held_until = 0.0
        while True:
            # What is held is written in time, whether more comes or not.
            self._wake.wait(max(0.0, held_until - time.monotonic()) if self._held else None)
            self._wake.clear()
            hurried = self._hurry.wait(EVERY)
            self._hurry.clear()
            stopping = self._stopping
            asked = self._asked
            # Before the queue is looked at: who finds it False after that wakes us again.
            self._awake = False
            now = time.monotonic()
            if not self._held:
                held_until = now + HOLD
            rest, few = self._take_in()
            if hurried or few or now >= held_until or self._held_spans > self._most // 2:
                self._due = len(self._held)
                held_until = now + HOLD
            try:
                while True:
                    self._writer.write(self._batch(rest), hurried=hurried)
                    if not rest and not self._due:
                        break
                    if len(self._queue) > TOGETHER:
                        # What the file would forget again for these does not wait for its turn beside them.
                        rest.extend(self._take_in()[0])
            except Exception:  # one odd span must not end the record of all that come after it
                log.warning("some spans could not be written to %s", self.path, exc_info=True)
            self._due = 0
            self.room = self._most - self._held_spans
            with self._turn:
                self._flushed = asked
                self._turn.notify_all()
            if self.dropped and not said:
                said = True
                log.warning("spans come faster than %s can be written: some are left out of it", self.path)
            if stopping:
                self._writer.close()
                return

    def _take_in(self) -> tuple[deque[Unit], bool]:
        """Hold the requests of the queue that have ended. Those of the rest, and whether these were few for a turn."""
        rest: deque[Unit] = deque()
        whole = 0
        for _ in range(len(self._queue)):
            unit = self._queue.popleft()
            if unit.state is not None or not _is_whole(unit.fresh):
                rest.append(unit)
                continue
            whole += 1
            if len(self._held) == self._held.maxlen:
                # Emptied, since spans and their unit know each other, and would wait for the garbage collector.
                self._let_go().fresh.clear()
            self._held.append((unit, len(unit.fresh)))
            self._held_spans += self._held[-1][1]
        return rest, whole <= self._many

    def _let_go(self) -> Unit:
        """The one that has been held for longest."""
        unit, spans = self._held.popleft()
        self._held_spans -= spans
        self._due = max(0, self._due - 1)
        return unit

    def _batch(self, rest: deque[Unit]) -> list[Unit]:
        """What is written next: of those that were held, and then of the rest."""
        batch = [self._let_go() for _ in range(min(self._due, TOGETHER))]
        return batch + [rest.popleft() for _ in range(min(len(rest), TOGETHER - len(batch)))]

    def forget(self) -> None:
        """For a forked child, which has the queue but not the thread: record nothing."""
        self.off = True
        self._queue.clear()


def _after_fork(ref: weakref.ref[LocalTraces]) -> None:
    local = ref()
    if local is not None:
        local.forget()


def _is_whole(fresh: Sequence[Recorded]) -> bool:
    """Whether a request has ended that may have been a run. One span alone is hardly ever one, and is read at once."""
    return len(fresh) > 1 and fresh[0].end_time is not None


class _Writer:
    """What the thread does; used by it alone."""

    def __init__(self, path: Path, *, max_runs: int, max_bytes: int) -> None:
        self._path = path
        self._max_runs = max_runs
        self._max_bytes = max_bytes
        self._process = process()
        self._connection: sqlite3.Connection | None = None
        self._file = _file(path)
        self._inode = 0
        self._damaged = 0
        self._retry_at = 0.0
        self._warned = False
        # What there is to be written.
        self._chunks: list[tuple[int, bool, str]] = []
        self._over: list[tuple[int]] = []
        """Units none of whose spans is open any more."""
        self._runs: dict[int, _Kept] = {}

    def write(self, units: Sequence[Unit], *, hurried: bool = False) -> None:
        for at, unit in enumerate(units, start=1):
            self._absorb(unit)
            if at % AT_ONCE == 0 and not hurried:
                time.sleep(0.001)
        if not self._chunks and not self._runs:
            return
        connection = self._open()
        if connection is None:
            self._drop()
            return
        try:
            self._commit(connection)
        except sqlite3.OperationalError as error:
            # Locked for five seconds, or the disk is full: kept in memory for the next turn, up to a bound.
            self._warn(f"cannot be written ({error})")
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()
            if len(self._chunks) > QUEUE:
                self._drop()
        except sqlite3.DatabaseError as error:
            self._warn(f"is damaged ({error})")
            self._damaged = self._inode
            self.close()

    def _drop(self) -> None:
        self._chunks.clear()
        self._over.clear()
        self._runs.clear()

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    # -- what a span means ------------------------------------------------------------------------------------------

    def _absorb(self, unit: Unit) -> None:
        """Read what is fresh in a unit, and put it down as what is to be written."""
        # First: what comes after it is told again, and what comes before the next line is read now.
        unit.queued = False
        fresh = unit.fresh[:]
        del unit.fresh[: len(fresh)]
        state: _State | None = unit.state
        ended: list[Recorded] = []
        opened: list[Recorded] = []
        for span in fresh:
            if not span.seen:
                # Before its end is looked at: one that ends after that tells.
                span.seen = True
                span.hex = f"{span.span_id:016x}"
                if state is None:
                    state = unit.state = _State(number(span.span_id), span.hex, f"{span.trace_id:032x}", span)
                self._place(state, span)
                state.open += 1
                if span.end_time is None:
                    opened.append(span)
                    continue
            if not span.written and span.end_time is not None:
                span.written = True
                state_ = cast("_State", state)
                state_.open -= 1
                ended.append(span)
        if state is None:
            return
        if not state.begun:
            # Nothing is written until a run begins in it; what has ended by then has nothing to do with the run.
            state.waiting = [span for span in (*state.waiting, *opened) if span.end_time is None]
            if state.open == 0:
                state.top = None
            return
        if state.waiting:
            opened = [span for span in (*state.waiting, *opened) if span.end_time is None]
            state.waiting = []
        self._put_down(state, ended, opened)

    def _place(self, state: _State, span: Recorded) -> None:
        """Find the run that the span belongs to, which may begin with it."""
        above = span.above
        run: _Kept | None = above.kept if above is not None else None
        attributes = span.attributes
        if names.RUN_ID in attributes:
            if run is None and names.RUN_PROGRAM in attributes:
                run = self._begin(state, span, str(attributes[names.RUN_PROGRAM]), None)
        elif run is None and state.run is None and (names.STEP_NAME in attributes or _is_call(attributes)):
            # Of a step outside of any program, the name is the upstream's.
            model = attributes.get(names.REQUEST_MODEL) or attributes.get(names.STEP_NAME)
            state.run = self._begin(state, state.top or span, None, str(model) if model else None)
        span.kept = run

    def _begin(self, state: _State, span: Recorded, program: str | None, model: str | None) -> _Kept:
        """A run begins, with the span."""
        run_id = span.attributes.get(names.RUN_ID)
        state.begun = True
        run = _Kept(
            number(span.span_id),
            state.number,
            span.span_id,
            span.hex,
            state.trace_id,
            state.root,
            None if run_id is None else str(run_id),
            program,
            model,
            span.start_time,
        )
        # The request's own span has it, which lets a caller in before any run begins.
        if state.top is not None and names.REQUEST_SCOPE in state.top.attributes:
            run.scope = str(state.top.attributes[names.REQUEST_SCOPE])
        self._runs[run.id] = run
        return run

    def _put_down(self, state: _State, ended: list[Recorded], opened: list[Recorded]) -> None:
        rows: list[dict[str, Any]] = []
        outside = state.run
        for span in ended:
            attributes = span.attributes
            run: _Kept | None = span.kept or outside
            if run is None:
                # Above the program: the request's own span belongs to no run, and is kept with those that do.
                state.above += 1
                if state.above <= trace_schema.MAX_SPANS:
                    rows.append(_row(span, None))
                continue
            run.spans += 1
            self._runs[run.id] = run
            if names.STEP_NAME in attributes:
                result = attributes.get(names.CACHE_RESULT)
                run.steps += 1
                if result == "hit":
                    run.hits += 1
                elif result == "joined":
                    run.joined += 1
            elif attributes.get(names.OPERATION) in _CALLS:
                _add_call(run, attributes)
            mine = run.span == span.span_id
            # The run's own span has its place, whether it comes first or last.
            if mine or run.spans - (run.end_ns is not None) <= trace_schema.MAX_SPANS:
                rows.append(_row(span, run.span_id))
            else:
                run.fits = False
            if mine:
                _finish(run, span)
        if rows:
            self._chunks.append((state.number, False, _texts(rows)))
        if opened:
            rows = [
                _row(span, run.span_id if run is not None else None)
                for span in opened
                if (run := span.kept or outside) is None or run.fits
            ]
            if rows:
                state.shown = True
                self._chunks.append((state.number, True, _texts(rows)))
        if state.open == 0:
            # What comes later begins anew, and finds its run with the span above it.
            state.top = None
            if state.shown:
                state.shown = False
                self._over.append((state.number,))

    # -- rows -------------------------------------------------------------------------------------------------------

    def _commit(self, connection: sqlite3.Connection) -> None:
        chunks, runs = self._chunks, list(self._runs.values())
        if len(runs) > self._max_runs:
            # They would be written to be forgotten.
            kept = {run.unit for run in runs[-self._max_runs :]}
            runs = [run for run in runs if run.unit in kept or run.end_ns is None]
            left = {run.unit for run in self._runs.values()} - {run.unit for run in runs}
            chunks = [chunk for chunk in chunks if chunk[0] not in left]
        now = time.time_ns()
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO chunks (unit, open, data) VALUES (?, ?, ?)", chunks)
        if self._over:
            connection.executemany("DELETE FROM chunks WHERE unit = ? AND open", self._over)
        if runs:
            connection.executemany(
                f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * 24)})",
                [
                    (
                        run.id,
                        run.unit,
                        run.span_id,
                        run.trace_id,
                        run.root,
                        run.run_id,
                        run.program,
                        run.model,
                        run.start_ns,
                        run.end_ns,
                        run.outcome,
                        run.error,
                        self._process,
                        now,
                        run.spans,
                        run.steps,
                        run.hits,
                        run.joined,
                        run.calls,
                        run.input_tokens,
                        run.output_tokens,
                        run.cost,
                        run.unpriced,
                        run.scope,
                    )
                    for run in runs
                ],
            )
        self._prune(connection)
        connection.execute("COMMIT")
        self._warned = False
        self._drop()

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Forget the requests that have been quiet for longest, until both bounds are kept."""
        # An eighth is left free for what one turn writes. Freed pages are used again, so what the file has grown to is
        # what it stays at.
        most = self._max_bytes // 8 * 7
        (count,) = connection.execute("SELECT count(*) FROM runs").fetchone()
        while count > 1 and (count > self._max_runs or _used(connection) > most):
            oldest = "unit IN (SELECT unit FROM runs ORDER BY seen_ns, start_ns LIMIT ?)"
            for table in ("chunks", "runs"):
                connection.execute(f"DELETE FROM {table} WHERE {oldest}", (max(1, count - self._max_runs),))
            (count,) = connection.execute("SELECT count(*) FROM runs").fetchone()

    # -- the file ---------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection | None:
        if self._connection is not None and self._file.inode() != self._inode:
            # Deleted, or set aside by another process: what is written to it now would be seen by nobody.
            self.close()
            self._retry_at = 0.0
        if self._connection is None and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + REOPEN_EVERY
            try:
                self._path.parent.parent.mkdir(parents=True, exist_ok=True)
                self._path.parent.mkdir(mode=0o700, exist_ok=True)
                self._connection = self._file.opened(self._damaged)
                self._inode = self._file.inode()
                self._damaged = 0
            except (OSError, sqlite3.Error) as error:
                self._warn(f"cannot be opened ({error})")
        return self._connection

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s %s: recent runs are not kept for `asmodel trace`", self._path, what)


def _file(path: Path) -> SQLiteFile:
    return SQLiteFile(
        path=path,
        version=SCHEMA,
        tables=TABLES,
        pragmas=(
            # A chunk fits on a page, and several do: fewer of them to be written. Of a new file; the cache holds what a
            # few turns have written, and so what is forgotten for it need not be read again.
            "page_size = 16384",
            "cache_size = -8000",
            # 8 MB, until which what is written is not yet in the file itself.
            "wal_autocheckpoint = 500",
            f"journal_size_limit = {4 * 2**20}",
        ),
        lock=f"{path.name}.lock",
        links=True,
    )


def _used(connection: sqlite3.Connection) -> int:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)


def _is_call(attributes: Mapping[str, Any]) -> bool:
    return attributes.get(names.OPERATION) in _CALLS


def _add_call(run: _Kept, attributes: Mapping[str, Any]) -> None:
    run.calls += _int(attributes.get(names.UPSTREAM_ATTEMPTS, 1))
    if names.INPUT_TOKENS in attributes:
        run.input_tokens += _int(attributes[names.INPUT_TOKENS])
        run.output_tokens += _int(attributes.get(names.OUTPUT_TOKENS, 0))
        cost = attributes.get(names.UPSTREAM_COST)
        if isinstance(cost, (int, float)):
            run.cost += cost
        else:
            run.unpriced += 1


def _finish(run: _Kept, span: Recorded) -> None:
    attributes = span.attributes
    error = attributes.get(names.ERROR_TYPE)
    status = attributes.get(names.HTTP_STATUS)
    run.outcome = "ok"
    if attributes.get(names.CANCELLED):
        run.outcome = "cancelled"
    elif span.code is StatusCode.ERROR or (isinstance(status, int) and status >= 400):
        run.outcome = "error"
    run.end_ns = span.end_time
    run.error = None if error is None else str(error)
    if run.model is None:
        model = attributes.get(names.REQUEST_MODEL)
        run.model = None if model is None else str(model)


def _int(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) else 0


def _row(span: Recorded, run: str | None) -> dict[str, Any]:
    """A span as it is kept. What it has none of is left out."""
    ended = span.end_time
    above = span.above
    row: dict[str, Any] = {
        "id": span.hex,
        "parent": above.hex if above is not None else f"{span.parent_id:016x}" if span.parent_id else None,
        "run": run,
        "start": span.start_time,
        "end": ended,
        "name": span.name,
        "kind": _KINDS[span.kind],
        # One that is open may be added to while it is read.
        "attributes": span.attributes if ended is not None else dict(span.attributes),
    }
    if span.code is StatusCode.ERROR:
        row["failed"] = True
    if span.events:
        row["events"] = list(span.events)
    if span.linked:
        row["links"] = [link for link in map(_link, list(span.linked)) if link is not None]
    return row


def _link(link: Link | tuple[str, str]) -> tuple[str, str, Mapping[str, Any]] | None:
    if isinstance(link, tuple):
        trace_id, span_id = link
        try:
            is_one = len(trace_id) == 32 and len(span_id) == 16 and int(trace_id, 16) and int(span_id, 16)
        except (ValueError, TypeError):
            return None
        return (trace_id, span_id, {}) if is_one else None
    return f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}", link.attributes or {}


def _texts(rows: list[dict[str, Any]]) -> str:
    try:
        text = orjson.dumps(rows)
        if len(text) <= MAX_DATA:
            return text.decode()
    except TypeError:
        pass  # what a program may put on its own spans: an integer beyond 64 bits, half of a surrogate pair
    return f"[{','.join(map(_text, rows))}]"


def _text(row: dict[str, Any]) -> str:
    try:
        text = orjson.dumps(row, default=str)
        if len(text) <= MAX_DATA:
            return text.decode()
    except TypeError:
        pass
    attributes: dict[str, Any] = dict(row["attributes"])
    content = {name: attributes.pop(name) for name in names.CONTENT if _is_content(attributes.get(name))}
    tamed = cast("dict[str, Any]", _tamed({**row, "attributes": attributes}))
    tamed["attributes"] |= content
    return orjson.dumps(tamed, default=str).decode()


def _is_content(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_CONTENT:
        return False
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def _tamed(value: object) -> object:
    """The value with long texts and lists cut, and what JSON cannot carry as a text."""
    if isinstance(value, str):
        whole = value if len(value) <= 1_000 else value[:1_000] + "…"
        return whole.encode("utf-8", "replace").decode()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")[:1_000]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, Mapping):
        return {str(_tamed(name)): _tamed(item) for name, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return [_tamed(item) for item in items[:256]]
    return value
