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

SCHEMA = 3
"""The tables' version. A file of another one is set aside by who writes, and refused by who reads."""

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
  id INTEGER PRIMARY KEY, unit INTEGER NOT NULL, span_id TEXT NOT NULL, trace_id TEXT NOT NULL, root TEXT NOT NULL,
  run_id TEXT, program TEXT, model TEXT, start_ns INTEGER NOT NULL, end_ns INTEGER, outcome TEXT, error TEXT,
  process TEXT NOT NULL, seen_ns INTEGER NOT NULL, spans INTEGER NOT NULL, steps INTEGER NOT NULL,
  hits INTEGER NOT NULL, joined INTEGER NOT NULL, calls INTEGER NOT NULL, input_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL, cost REAL NOT NULL, unpriced INTEGER NOT NULL, scope TEXT
);
CREATE TABLE IF NOT EXISTS chunks (
  id INTEGER PRIMARY KEY, unit INTEGER NOT NULL, open INTEGER NOT NULL, data TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS chunks_by_unit ON chunks (unit);
CREATE VIEW IF NOT EXISTS spans AS
  SELECT chunks.unit AS unit, json_extract(span.value, '$.id') AS span_id, json_extract(span.value, '$.run') AS run,
    json_extract(span.value, '$.start') AS start_ns, json_extract(span.value, '$.end') AS end_ns, span.value AS data
  FROM chunks, json_each(chunks.data) AS span
  WHERE NOT chunks.open OR NOT EXISTS (
    SELECT 1 FROM chunks AS later, json_each(later.data) AS ended
    WHERE later.unit = chunks.unit AND NOT later.open
      AND json_extract(ended.value, '$.id') = json_extract(span.value, '$.id'));
"""
"""A unit is one request with all its spans, a number that is the id of the outermost of them. A run is a row, of the
unit that it is a part of; `id` is the id of its span. What a unit did in a tenth of a second is a chunk, a list of
spans in JSON: of those that ended, or where `open` of those that had begun by then and not ended. A row for each span
took five times as long to be written; and since there are a thousand runs and no more, one is found without an index.
"""


def number(span_id: int) -> int:
    """A span's id as an integer of SQLite's, which have a sign."""
    return span_id - (1 << 64) if span_id >= 1 << 63 else span_id


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
