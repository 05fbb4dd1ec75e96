"""Reads the local file of runs: their list, and one of them as a tree. On a connection that cannot write."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from asmodel import trace_schema
from asmodel.trace_schema import SCHEMA, Outcome, is_gone


class NoSuchTrace(LookupError):
    """No run, or more than one, has an id that begins so; the message says which."""


class TraceFileUnreadable(OSError):
    """There is a file, but it is no trace file of this version; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run as `asmodel trace` lists it."""

    trace_id: str
    span_id: str
    """The span that is the run."""
    root: str
    """The outermost span of the request that it belongs to."""
    run_id: str | None
    program: str | None
    """None where a model was asked and no program."""
    model: str | None
    started: float
    """Unix seconds."""
    seconds: float | None
    """How long it took, or has taken so far; None where its process is gone."""
    outcome: Outcome
    """`lost`: it had not ended when its process did."""
    error: str | None
    """`error.type` of the run."""
    steps: int
    hits: int
    joined: int
    calls: int
    """Calls that went out to an upstream, each attempt counted."""
    input_tokens: int
    output_tokens: int
    cost: float | None
    """US dollars; None where a price is unknown."""
    dropped: int = 0
    """Spans of it that are not kept, because there were too many."""

    @property
    def name(self) -> str:
        return self.program or self.model or "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    name: str
    time_ns: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTo:
    trace_id: str
    span_id: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One span and what happened inside it, in the order in which it began."""

    span_id: str
    parent_id: str | None
    name: str
    kind: str
    """server, client, internal, producer or consumer."""
    start_ns: int
    end_ns: int | None
    """None where it has not ended: it is running, or its process is gone."""
    failed: bool
    attributes: Mapping[str, Any]
    events: tuple[Event, ...] = ()
    links: tuple[LinkTo, ...] = ()
    children: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What is kept of one trace, or of the part of it that one request is."""

    trace_id: str
    runs: tuple[RunRow, ...]
    roots: tuple[Node, ...]
    payers: Mapping[str, RunRow] = field(default_factory=dict[str, RunRow])
    """By span id: the kept runs that paid for what was found in the cache."""


_COLUMNS = (
    "trace_id, span_id, root, run_id, program, model, start_ns, end_ns, outcome, error, process, steps, hits, joined,"
    " calls, input_tokens, output_tokens, cost, unpriced, spans, unit"
)


@dataclass(frozen=True, slots=True)
class Of:
    """Only the runs of one scope: those of one key's holder, or with None those that came without a key."""

    scope: str | None


def runs(path: Path, limit: int = 20, *, of: Of | None = None) -> list[RunRow]:
    """The last runs, the newest first; none where there is no file. Raises TraceFileUnreadable.

    With `of` only those of one scope.
    """
    if not path.exists():
        return []
    with _reading(path) as connection:
        if _is_empty(connection):
            return []
        where, values = _those(of)
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM runs WHERE {where} ORDER BY start_ns DESC LIMIT ?", (*values, limit)
        ).fetchall()
    return [_run_row(row) for row in rows]


def _those(of: Of | None) -> tuple[str, tuple[str | None, ...]]:
    """The condition, and its values. `IS` and not `=`, for which NULL is not even NULL."""
    return ("1", ()) if of is None else ("scope IS ?", (of.scope,))


def spans(path: Path, id_prefix: str, *, of: Of | None = None, without: Collection[str] = ()) -> Trace:
    """The trace, or the one request, whose trace id or run id begins with `id_prefix`; "last" is the newest run's.

    With `of` it is as if there were no runs but those of one scope: a trace id is the client's to choose, so several
    may have used the same. Attributes named in `without` are not read.

    Raises NoSuchTrace where none or several do, TraceFileUnreadable.
    """
    if not path.exists():
        raise NoSuchTrace(f"no runs are kept yet: there is no {path}")
    with _reading(path) as connection:
        if _is_empty(connection):
            raise NoSuchTrace(f"no runs are kept yet: {path} is empty")
        chosen = _find(connection, id_prefix.strip().lower(), path, of)
        row = _run_row(chosen[0])
        whole = len({_unit(r) for r in chosen}) > 1
        where, value = ("trace_id = ?", row.trace_id) if whole else ("unit = ?", _unit(chosen[0]))
        those, values = _those(of)
        kept = connection.execute(
            f"SELECT {_COLUMNS} FROM runs WHERE {where} AND {those} ORDER BY start_ns", (value, *values)
        ).fetchall()
        found = [_run_row(r) for r in kept]
        nodes: list[tuple[Node, str]] = []
        for unit in dict.fromkeys(map(_unit, kept)):
            root = _hex(unit)
            nodes += [_node(row, root, without) for row in _rows(connection, unit)]
        nodes.sort(key=lambda pair: (pair[0].start_ns, -(pair[0].end_ns or 0)))
        links = {(link.trace_id, link.span_id) for node, _ in nodes for link in node.links}
        payers = _payers(connection, links, of)
    return Trace(trace_id=row.trace_id, runs=tuple(found), roots=_tree(nodes), payers=payers)


def _find(connection: sqlite3.Connection, wanted: str, path: Path, of: Of | None) -> list[Sequence[Any]]:
    where, values = _those(of)
    if wanted == "last":
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM runs WHERE {where} ORDER BY start_ns DESC LIMIT 1", values
        ).fetchall()
    else:
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM runs WHERE (substr(trace_id, 1, ?) = ? OR lower(substr(run_id, 1, ?)) = ?)"
            f" AND {where} ORDER BY start_ns DESC",
            (len(wanted), wanted, len(wanted), wanted, *values),
        ).fetchall()
    found = [_run_row(row) for row in rows]
    if not found or not wanted:
        (count,) = connection.execute(f"SELECT count(*) FROM runs WHERE {where}", values).fetchone()
        raise NoSuchTrace(f"no run has an id that begins with {wanted!r}; {count} are kept in {path}")
    if len({run.trace_id for run in found}) == 1:
        return rows
    exact = [run.span_id for run in found if wanted in (run.trace_id, (run.run_id or "").lower())]
    if len({run.trace_id for run in found if run.span_id in exact}) == 1:
        return [row for row, run in zip(rows, found, strict=True) if run.span_id in exact]
    some = ", ".join(f"{run.run_id or run.trace_id} ({run.name})" for run in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise NoSuchTrace(f"{wanted!r} begins the ids of {len(found)} runs: {some}{more}")


def _unit(row: Sequence[Any]) -> int:
    return int(row[-1])


def _hex(number: int) -> str:
    return f"{number & (1 << 64) - 1:016x}"


def _rows(connection: sqlite3.Connection, unit: int) -> Iterable[dict[str, Any]]:
    """The spans of a unit, each as it was last: open, if it has not ended."""
    rows: dict[str, dict[str, Any]] = {}
    for (data,) in connection.execute("SELECT data FROM chunks WHERE unit = ? ORDER BY open DESC, id", (unit,)):
        rows |= {row["id"]: row for row in orjson.loads(data)}
    return rows.values()


def _payers(connection: sqlite3.Connection, links: Iterable[tuple[str, str]], of: Of | None) -> dict[str, RunRow]:
    where, values = _those(of)
    payers: dict[str, RunRow] = {}
    wanted: dict[str, set[str]] = {}
    for trace_id, span_id in links:
        wanted.setdefault(trace_id, set()).add(span_id)
    for trace_id, span_ids in wanted.items():
        kept = connection.execute(
            f"SELECT {_COLUMNS} FROM runs WHERE trace_id = ? AND {where}", (trace_id, *values)
        ).fetchall()
        by_span = {run.span_id: run for run in map(_run_row, kept)}
        for unit in dict.fromkeys(map(_unit, kept)):
            for row in _rows(connection, unit):
                if row["id"] in span_ids and row["run"] in by_span:
                    payers[row["id"]] = by_span[row["run"]]
    return payers


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Whether there is nothing in the file yet: another process is about to begin it."""
    return bool(connection.execute("SELECT count(*) = 0 FROM sqlite_master").fetchone()[0])


@contextlib.contextmanager
def _reading(path: Path) -> Generator[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)
        try:
            for left in range(50, -1, -1):
                (found,) = connection.execute("PRAGMA user_version").fetchone()
                if found == SCHEMA or _is_empty(connection):
                    break
                # 0 is what a file says that another process is beginning at this very moment.
                if found or not left:
                    raise TraceFileUnreadable(
                        f"{path} is no trace file of this version (it says {found}, not {SCHEMA})"
                    )
                time.sleep(0.01)
            yield connection
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise TraceFileUnreadable(f"{path} cannot be read: {error}") from error


def _run_row(row: Sequence[Any]) -> RunRow:
    (trace_id, span_id, root, run_id, program, model, start, end, outcome, error, process_, *counts) = row
    steps, hits, joined, calls, input_tokens, output_tokens, cost, unpriced, kept, _ = counts
    seconds: float | None = None
    if outcome is None:
        outcome = "lost" if is_gone(process_) else "running"
        if outcome == "running":
            seconds = max(0.0, time.time() - start / 1e9)
    else:
        seconds = (end - start) / 1e9
    return RunRow(
        trace_id=trace_id,
        span_id=span_id,
        root=root,
        run_id=run_id,
        program=program,
        model=model,
        started=start / 1e9,
        seconds=seconds,
        outcome=outcome,
        error=error,
        steps=steps,
        hits=hits,
        joined=joined,
        calls=calls,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost=None if unpriced else cost,
        dropped=max(0, kept - trace_schema.MAX_SPANS),
    )


def _node(row: Mapping[str, Any], root: str, without: Collection[str] = ()) -> tuple[Node, str]:
    run = row["run"]
    attributes: Mapping[str, Any] = row["attributes"]
    if without:
        attributes = {name: value for name, value in attributes.items() if name not in without}
    node = Node(
        span_id=row["id"],
        parent_id=row["parent"],
        name=row["name"],
        kind=row["kind"],
        start_ns=row["start"],
        end_ns=row["end"],
        failed=row.get("failed", False),
        attributes=attributes,
        events=tuple(Event(name=n, time_ns=t, attributes=a) for n, t, a in row.get("events", ())),
        links=tuple(LinkTo(trace_id=t, span_id=s, attributes=a) for t, s, a in row.get("links", ())),
    )
    # Where a parent is missing (dropped, or never written), the span hangs under its run, or under the request.
    return node, run if run is not None and run != node.span_id else root


def _tree(nodes: Sequence[tuple[Node, str]]) -> tuple[Node, ...]:
    by_id = {node.span_id: node for node, _ in nodes}
    below: dict[str | None, list[str]] = {}
    for node, fallback in nodes:
        parent = node.parent_id
        if parent not in by_id:
            parent = fallback if fallback in by_id and fallback != node.span_id else None
        below.setdefault(parent, []).append(node.span_id)
    # Built from the leaves, without recursion: a program may nest as deep as it likes.
    order: list[str] = []
    stack = list(below.get(None, []))
    while stack:
        span_id = stack.pop()
        order.append(span_id)
        stack.extend(below.get(span_id, []))
    built: dict[str, Node] = {}
    for span_id in reversed(order):
        children = tuple(built[child] for child in below.get(span_id, []))
        built[span_id] = replace(by_id[span_id], children=children)
    return tuple(built[span_id] for span_id in below.get(None, []))
