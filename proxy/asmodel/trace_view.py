"""What `asmodel trace` shows: the list of runs, and one run as a tree on its own timeline.

    evidence-qa  ok  1.90 s  2026-11-24 06:10:12
    3 steps (1 cached), 2 model calls, 310 tokens in, 42 out, $0.0041
    run 7f3a…  trace 5c1d…

    POST /v1/chat/completions       ████████████████   1.90 s
    └─ program evidence-qa          ████████████████   1.89 s
       ├─ step question_given x10   ███                0.41 s  7 cached
       └─ step next_thought            █████████████   1.48 s
          └─ chat gpt-4o-mini          █████████████   1.47 s  62 + 21 tokens

It is text first: without colours, and in a pipe, it says the same. `rich` is imported when something is drawn.
"""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from asmodel import trace_time
from asmodel import trace_words as words
from asmodel.trace_reader import Node, RunRow, Trace

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_OUTCOMES = {"ok": "green", "error": "bold red", "cancelled": "yellow", "running": "cyan", "lost": "bold yellow"}


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the tree: a span, or several equal ones."""

    guide: str
    below: str
    """The guide of what is written under it."""
    label: str
    spans: tuple[Node, ...]
    notes: tuple[tuple[str, str], ...]
    """Text and style."""


def draw_runs(rows: Sequence[RunRow], *, console: Console | None = None) -> None:
    """Print the runs, the newest first, a line each."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    console = terminal(console)
    if not rows:
        console.print("No runs are kept yet. Ask a program something, then look again.")
        return
    short = _short_ids(rows)
    table = [["id", "when", "program or model", "outcome", "time", "steps", "cached", "calls", "tokens", "cost"]]
    for row in rows:
        took = "" if row.seconds is None else words.seconds(row.seconds)
        tokens = words.count(row.input_tokens + row.output_tokens)
        name, outcome = words.clean(row.name), row.outcome
        counts = [str(row.steps), str(row.hits), str(row.calls)]
        table.append(
            [short[row.span_id], words.when(row.started), name, outcome, took, *counts, tokens, words.cost(row.cost)]
        )
    widths = [max(cell_len(line[column]) for line in table) for column in range(len(table[0]))]
    # The name gives way first, and on a narrow terminal the count of hits, which `asmodel trace ID` shows too.
    shown = [column for column in range(len(widths)) if console.width >= 88 or column != _HITS]
    others = sum(widths[column] + 1 for column in shown if column != _NAME)
    widths[_NAME] = max(8, min(widths[_NAME], console.width - others))
    for number, line in enumerate(table):
        text = Text()
        for column in shown:
            cell, width = line[column], widths[column]
            if column == _NAME and cell_len(cell) > width:
                cell = set_cell_size(cell, width - 1).rstrip() + ("~" if console.options.ascii_only else "…")
            space = " " * (width - cell_len(cell))
            style = "bold" if number == 0 else _OUTCOMES.get(cell, "") if column == _OUTCOME else ""
            text.append(space + cell if column > _OUTCOME else cell + space, style)
            text.append(" ")
        if number and rows[number - 1].error and console.width >= 110:
            text.append(words.clean(rows[number - 1].error or ""), "red")
        text.rstrip()
        console.print(text, soft_wrap=True)


_NAME, _OUTCOME, _HITS = 2, 3, 6
"""Columns of the list of runs; those after the outcome are numbers, flush right."""


def draw_trace(trace: Trace, *, everything: bool = False, console: Console | None = None) -> None:
    """Print a trace as a tree. With `everything`, equal siblings are not folded however many there are."""
    console = terminal(console)
    for row in trace_rows(trace, everything=everything, console=console):
        console.print(row, soft_wrap=True)


def trace_rows(trace: Trace, *, everything: bool, console: Console) -> list[Text]:
    """The lines that `draw_trace` prints, for that console."""
    from rich.text import Text

    plain = console.options.ascii_only
    begin = min((root.start_ns for root in trace.roots), default=0)
    now = time.time_ns() if any(run.outcome == "running" for run in trace.runs) else trace_time.last(trace)
    rows: list[Text] = []
    for run in trace.runs:
        rows += heading(run).split("\n")
    rows.append(Text(_ids(trace), "dim"))
    if spent := trace_time.spent(trace, now_ns=now):
        rows += [Text(row, "dim") for row in textwrap.wrap(_spent(spent), console.width, subsequent_indent="      ")]
    rows.append(Text())
    lines = _lines(trace, everything=everything, plain=plain)
    width = min(console.width, 160)
    longest = max((len(line.guide) + len(line.label) for line in lines), default=20)
    label_width = min(longest, max(24, width * 2 // 5))
    bar_width = max(10, width // 5)
    notes_width = max(16, width - label_width - bar_width - 12)
    for line in lines:
        rows += _rows(line, label_width, bar_width, notes_width, begin, max(now, begin + 1), plain=plain)
    hidden = sum(run.dropped for run in trace.runs)
    if hidden:
        rows.append(Text(f"{hidden} more spans are not kept: there were too many.", "yellow"))
    if not everything and any(len(line.spans) > 1 for line in lines):
        rows.append(Text("Equal lines are folded (x2, x3, ...); --all shows each.", "dim"))
    return rows


def trace_json(trace: Trace) -> dict[str, Any]:
    """The trace as JSON: its runs, and its spans flat, in the order of the tree; times are Unix nanoseconds."""
    flat: list[dict[str, Any]] = []
    stack = [(root, 0) for root in reversed(trace.roots)]
    while stack:
        node, depth = stack.pop()
        flat.append(
            {
                "span_id": node.span_id,
                "parent_id": node.parent_id,
                "depth": depth,
                "name": node.name,
                "kind": node.kind,
                "start_ns": node.start_ns,
                "end_ns": node.end_ns,
                "failed": node.failed,
                "attributes": dict(node.attributes),
                "events": [asdict(event) for event in node.events],
                "links": [asdict(link) for link in node.links],
            }
        )
        stack.extend((child, depth + 1) for child in reversed(node.children))
    return {"trace_id": trace.trace_id, "runs": runs_json(trace.runs), "spans": flat}


def runs_json(rows: Sequence[RunRow]) -> list[dict[str, Any]]:
    """The runs as JSON, by the names of `RunRow`."""
    return [asdict(row) for row in rows]


# -- the tree as lines ----------------------------------------------------------------------------------------------


def _lines(trace: Trace, *, everything: bool, plain: bool) -> list[_Line]:
    tee, corner, bar, blank = ("|- ", "`- ", "|  ", "   ") if plain else ("├─ ", "└─ ", "│  ", "   ")
    lines: list[_Line] = []
    gone = any(run.outcome == "lost" for run in trace.runs)
    # A stack and not recursion: programs nest as deep as they like.
    stack: list[tuple[tuple[Node, ...], str, str]] = [((root,), "", "") for root in reversed(trace.roots)]
    while stack:
        group, guide, below = stack.pop()
        children: list[tuple[Node, ...]] = []
        if len(group) == 1:
            children = [(c,) for c in group[0].children] if everything else words.folded(group[0].children)
        under = below + (bar if children else blank)
        lines.append(_line(group, guide, under, trace, gone=gone))
        for index in range(len(children) - 1, -1, -1):
            last = index == len(children) - 1
            stack.append((children[index], below + (corner if last else tee), below + (blank if last else bar)))
    return lines


def _line(group: tuple[Node, ...], guide: str, below: str, trace: Trace, *, gone: bool) -> _Line:
    label = words.label(group[0])
    notes: list[tuple[str, str]]
    if len(group) > 1:
        label += f" x{len(group)}"
        notes = words.notes_of_many(group)
    else:
        notes = words.notes(next(iter(group)), trace, gone=gone)
    return _Line(guide, below, label, group, tuple(notes))


# -- a line as text -------------------------------------------------------------------------------------------------


def _rows(
    line: _Line, label_width: int, bar_width: int, notes_width: int, begin: int, end: int, *, plain: bool
) -> list[Text]:
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    most = max(6, label_width - 16)
    guide, under = line.guide, line.below[-most:]
    if len(guide) > most:  # only its inner end fits beside a name
        guide = ("~" if plain else "…") + guide[1 - most :]
    room = label_width - cell_len(guide)
    label = line.label
    if cell_len(label) > room:
        label = set_cell_size(label, max(1, room - 1)).rstrip() + ("~" if plain else "…")
    first = min(node.start_ns for node in line.spans)
    last = max(end if node.end_ns is None else node.end_ns for node in line.spans)
    bar = _bar(first, last, begin, end, bar_width, plain=plain)
    style = next((style for _, style in line.notes if style), "")
    known = line.spans[0].end_ns is not None
    took = words.seconds((last - first) / 1e9) if known else ""
    row = Text(guide, "dim")
    row.append(set_cell_size(label, max(1, room)), "bold" if line.label.startswith("program ") else "")
    row.append(" ")
    row.append(bar, style or "blue")
    row.append(f" {took:>8}", "")
    head, *rest = _wrapped(line.notes, notes_width)
    if head:
        row.append("  ")
        for text, note_style in head:
            row.append(text, note_style)
    rows = [_stripped(row)]
    for part in rest:
        more = Text(set_cell_size(under, label_width), "dim")
        more.append(" " * (bar_width + 12))
        for text, note_style in part:
            more.append(text, note_style)
        rows.append(_stripped(more))
    return rows


def _stripped(row: Text) -> Text:
    row.rstrip()
    return row


def _wrapped(notes: Sequence[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """The notes, with commas between them, as lines of at most `width` cells, broken between words."""
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0
    for index, (note, style) in enumerate(notes):
        for word in (note + ("," if index < len(notes) - 1 else "")).split():
            for piece in textwrap.wrap(word, width, break_on_hyphens=False):
                if lines[-1] and used + 1 + len(piece) > width:
                    lines.append([])
                    used = 0
                gap = " " if lines[-1] else ""
                lines[-1].append((gap + piece, style))
                used += len(gap) + len(piece)
    return lines


def _bar(first: int, last: int, begin: int, end: int, width: int, *, plain: bool) -> str:
    """Where on the timeline of the whole it lies; never empty, since even the shortest did happen."""
    span = max(1, end - begin)
    left = min(width - 1, max(0, (first - begin) * width // span))
    right = min(width, max(left + 1, round((last - begin) * width / span)))
    return " " * left + ("#" if plain else "█") * (right - left) + " " * (width - right)


# -- headings and numbers -------------------------------------------------------------------------------------------


def heading(run: RunRow) -> Text:
    """A run in two lines: what it was, and what it came to."""
    from rich.text import Text

    text = Text(words.clean(run.name), "bold")
    text.append("  ")
    text.append(run.outcome, _OUTCOMES[run.outcome])
    if run.error:
        text.append(f" ({words.clean(run.error)})", "red")
    if run.seconds is not None:
        text.append(f"  {words.seconds(run.seconds)}")
    text.append(f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(run.started))}", "dim")
    if run.outcome == "lost":
        text.append("\nThe process that ran it is gone; this is what it had done.", "yellow")
    text.append("\n" + ", ".join(words.facts(run)))
    return text


def _spent(shares: Sequence[trace_time.Share]) -> str:
    whole = sum(share.seconds for share in shares) or 1.0
    told = [
        f"{share.what} {words.seconds(share.seconds)} ({share.seconds / whole:.0%})"
        for share in shares
        if share.seconds >= whole / 100
    ]
    return "time: " + ", ".join(told)


def _ids(trace: Trace) -> str:
    runs = [f"run {words.clean(run.run_id)}" for run in trace.runs if run.run_id]
    return "  ".join([*runs, f"trace {trace.trace_id}"])


def _short_ids(rows: Sequence[RunRow]) -> dict[str, str]:
    """The beginnings of the runs' ids: of one length, 8 at least, and long enough to tell them apart."""
    ids = {row.span_id: words.clean(row.run_id or row.trace_id) for row in rows}
    whole = set(ids.values())
    length = 8
    while length < 32 and len({i[:length] for i in whole}) < len(whole):
        length += 1
    return {span_id: i[:length] for span_id, i in ids.items()}


def terminal(console: Console | None) -> Console:
    """The console that is given, or else standard output, as wide as it is."""
    if console is not None:
        return console
    from rich.console import Console

    # In a pipe rich takes 80 columns whatever $COLUMNS says to others; the standard library asks both.
    return Console(highlight=False, width=shutil.get_terminal_size((80, 24)).columns)
