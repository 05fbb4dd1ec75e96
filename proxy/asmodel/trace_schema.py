"""The local file of runs: where it is, its tables, and how a process that wrote to it is known again.

What `trace_store` writes and `trace_reader` reads, and the little on which both must agree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

MAX_SPANS = 20_000
"""Spans kept of one run. Those beyond it still count in the run's totals."""

SCHEMA = 1
"""The tables' version. A file of another one is set aside by who writes, and refused by who reads."""

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
  span_id TEXT PRIMARY KEY, trace_id TEXT NOT NULL, root TEXT NOT NULL, run_id TEXT, program TEXT, model TEXT,
  start_ns INTEGER NOT NULL, end_ns INTEGER, outcome TEXT, error TEXT, process TEXT NOT NULL, seen_ns INTEGER NOT NULL,
  spans INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0, hits INTEGER NOT NULL DEFAULT 0,
  joined INTEGER NOT NULL DEFAULT 0, calls INTEGER NOT NULL DEFAULT 0, input_tokens INTEGER NOT NULL DEFAULT 0,
  output_tokens INTEGER NOT NULL DEFAULT 0, cost REAL NOT NULL DEFAULT 0, unpriced INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS runs_by_start ON runs (start_ns);
CREATE INDEX IF NOT EXISTS runs_by_seen ON runs (seen_ns, start_ns);
CREATE INDEX IF NOT EXISTS runs_by_trace ON runs (trace_id);
CREATE INDEX IF NOT EXISTS runs_by_run ON runs (run_id);
CREATE TABLE IF NOT EXISTS spans (
  trace_id TEXT NOT NULL, root TEXT NOT NULL, span_id TEXT NOT NULL, parent_id TEXT, run TEXT,
  start_ns INTEGER NOT NULL, end_ns INTEGER, data TEXT NOT NULL, PRIMARY KEY (trace_id, root, span_id)
) WITHOUT ROWID;
"""

Outcome: TypeAlias = Literal["ok", "error", "cancelled", "running", "lost"]


def default_path(environ: Mapping[str, str]) -> Path:
    """Where the file is kept by default: `asmodel/traces.sqlite` in `$XDG_STATE_HOME`, or in `~/.local/state`."""
    state = environ.get("XDG_STATE_HOME", "")
    # The XDG specification has relative paths ignored.
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "asmodel" / "traces.sqlite"


def process() -> str:
    """This process, told from every other one that has had or will have its number, here or on another machine.

    Boot, name space of process numbers, number, and time of start; where the system has no /proc, number and nothing
    more.
    """
    pid = os.getpid()
    return ":".join((*_place(), str(pid), _began(pid) or ""))


def _place() -> tuple[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return "", ""


def _began(pid: int) -> str | None:
    """When the process began, in ticks since boot; None where there is no such process, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in brackets, which may hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def is_gone(written: str) -> bool:
    """Whether the process that `process` named is known to have ended. One in another name space cannot be seen."""
    try:
        boot, space, number, began = written.split(":")
        pid = int(number)
    except ValueError:
        return True
    here_boot, here_space = _place()
    if boot != here_boot:
        return True
    if space != here_space:
        return False
    if began:
        return _began(pid) != began
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
