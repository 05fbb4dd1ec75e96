"""Follows a run as it happens: the tree, drawn again whenever there is more of it; in a pipe, a line a span."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from asmodel import trace_words as words
from asmodel.trace_reader import NoSuchTrace, RunRow, Trace, runs, spans
from asmodel.trace_time import last, walk
from asmodel.trace_view import draw_trace, terminal, trace_rows

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 0.2
"""Seconds between two looks at the file; it is written ten times a second."""
SETTLES = 1.0
"""Seconds after the end of a run in which the request around it may still end."""


def follow(
    path: Path,
    id_prefix: str | None = None,
    *,
    everything: bool = False,
    console: Console | None = None,
    patience: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Trace:
    """Print a run as it happens, until it ends, and give what it was in the end.

    Without an id, that is the newest run that is under way, or else the next that begins, for which at most `patience`
    seconds are waited. Raises NoSuchTrace, TraceFileUnreadable.
    """
    console = terminal(console)
    run = _found(path, id_prefix, patience, clock)
    if console.is_terminal:
        return _redrawn(path, run, console, everything=everything)
    return _told(path, run, console)


def _found(path: Path, id_prefix: str | None, patience: float | None, clock: Callable[[], float]) -> RunRow:
    if id_prefix is not None:
        return spans(path, id_prefix).runs[-1]
    gives_up = None if patience is None else clock() + patience
    rows = runs(path, limit=50)
    known = {row.span_id for row in rows if row.outcome != "running"}
    while True:
        for row in rows:
            # One that has begun and ended between two looks is the next one, too.
            if row.span_id not in known:
                return row
        if gives_up is not None and clock() >= gives_up:
            raise NoSuchTrace(f"no run is under way, and none has begun within {patience:g} s")
        time.sleep(EVERY)
        rows = runs(path, limit=50)


def _states(path: Path, run: RunRow) -> Trace:
    whole = spans(path, run.run_id or run.trace_id)
    mine = tuple(root for root in whole.roots if root.span_id == run.root)
    its = tuple(row for row in whole.runs if row.root == run.root)
    return Trace(trace_id=whole.trace_id, runs=its, roots=mine, payers=whole.payers)


class _Watch:
    """The trace, each time that there is more of it, until it is over."""

    def __init__(self, path: Path, run: RunRow) -> None:
        self._path = path
        self._run = run
        self._seen: tuple[tuple[int, int], ...] = ()
        self._over_at: float | None = None

    def look(self) -> Trace | None:
        """None where nothing has been written since the last look."""
        seen = tuple(_stamp(Path(f"{self._path}{ending}")) for ending in ("", "-wal"))
        if seen == self._seen:
            return None
        self._seen = seen
        return _states(self._path, self._run)

    def over(self, trace: Trace) -> bool:
        if any(run.outcome == "running" for run in trace.runs):
            # One whose process is killed writes nothing more: only looking again tells.
            self._seen = ()
            return False
        if all(root.end_ns is not None for root in trace.roots) or any(run.outcome == "lost" for run in trace.runs):
            return True
        now = time.monotonic()
        self._over_at = self._over_at or now + SETTLES
        return now >= self._over_at


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _redrawn(path: Path, run: RunRow, console: Console, *, everything: bool) -> Trace:
    from rich.console import Group
    from rich.live import Live

    watch = _Watch(path, run)
    trace = watch.look() or _states(path, run)
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live:
        while True:
            live.update(Group(*trace_rows(trace, everything=everything, console=console)), refresh=True)
            if watch.over(trace):
                break
            time.sleep(EVERY)
            trace = watch.look() or trace
    draw_trace(trace, everything=everything, console=console)
    return trace


def _told(path: Path, run: RunRow, console: Console) -> Trace:
    from rich.text import Text

    watch = _Watch(path, run)
    trace = watch.look() or _states(path, run)
    begun: set[str] = set()
    ended: set[str] = set()
    while True:
        begins = min((root.start_ns for root in trace.roots), default=0)
        lines: list[tuple[int, str]] = []
        depths = _depths(trace)
        for node in walk(trace.roots):
            depth = depths[node.span_id]
            if node.span_id not in begun:
                begun.add(node.span_id)
                if node.end_ns is None:
                    lines.append((node.start_ns, f"{'  ' * depth}{words.label(node)} begins"))
            if node.span_id not in ended and node.end_ns is not None:
                ended.add(node.span_id)
                took = words.seconds((node.end_ns - node.start_ns) / 1e9)
                notes = ", ".join(text for text, _ in words.notes(node, trace, gone=False))
                lines.append((node.end_ns, f"{'  ' * depth}{words.label(node)} {took}{'  ' if notes else ''}{notes}"))
        for at, line in sorted(lines):
            console.print(Text(f"{'+' + words.seconds((at - begins) / 1e9):>9}  {line}"), soft_wrap=True)
        if watch.over(trace):
            break
        time.sleep(EVERY)
        trace = watch.look() or trace
    whole = words.seconds((last(trace) - min((root.start_ns for root in trace.roots), default=0)) / 1e9)
    for run in trace.runs:
        text = f"{'+' + whole:>9}  {words.clean(run.name)} {run.outcome}"
        error = f" ({words.clean(run.error)})" if run.error else ""
        console.print(Text(f"{text}{error}: {', '.join(words.facts(run))}"), soft_wrap=True)
    return trace


def _depths(trace: Trace) -> dict[str, int]:
    depths = {root.span_id: 0 for root in trace.roots}
    for node in walk(trace.roots):
        for child in node.children:
            depths[child.span_id] = depths[node.span_id] + 1
    return depths
