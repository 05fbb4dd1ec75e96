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

from asmodel import tracing as names
from asmodel.trace_store import Node, RunRow, Trace

if TYPE_CHECKING:
    from rich.console import Console

FOLD_ABOVE = 4
"""Siblings, of which equal ones are shown as one line with their number."""

_OUTCOMES = {"ok": "green", "error": "bold red", "cancelled": "yellow", "running": "cyan", "lost": "bold yellow"}
_PREFIXES = (
    ("invoke_workflow ", "program "),
    ("execute_tool ", "tool "),
    ("text_completion ", "completion "),
)
_CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160))}
"""A model's name comes from outside; it must not reach the terminal as a command."""


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

    console = _console(console)
    if not rows:
        console.print("No runs are kept yet. Ask a program something, then look again.")
        return
    short = _short_ids(rows)
    table = [["id", "when", "program or model", "outcome", "time", "steps", "cached", "calls", "tokens", "cost"]]
    for row in rows:
        took = "" if row.seconds is None else _seconds(row.seconds)
        tokens = _count(row.input_tokens + row.output_tokens)
        name, outcome = _clean(row.name), row.outcome
        counts = [str(row.steps), str(row.hits), str(row.calls)]
        table.append([short[row.span_id], _when(row.started), name, outcome, took, *counts, tokens, _cost(row.cost)])
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
            text.append(_clean(rows[number - 1].error or ""), "red")
        text.rstrip()
        console.print(text, soft_wrap=True)


_NAME, _OUTCOME, _HITS = 2, 3, 6
"""Columns of the list of runs; those after the outcome are numbers, flush right."""


def draw_trace(trace: Trace, *, everything: bool = False, console: Console | None = None) -> None:
    """Print a trace as a tree. With `everything`, equal siblings are not folded however many there are."""
    from rich.text import Text

    console = _console(console)
    plain = console.options.ascii_only
    for run in trace.runs:
        console.print(_heading(run))
    console.print(Text(_ids(trace), "dim"), soft_wrap=True)
    console.print()
    lines = _lines(trace, everything=everything, plain=plain)
    width = min(console.width, 160)
    longest = max((len(line.guide) + len(line.label) for line in lines), default=20)
    label_width = min(longest, max(24, width * 2 // 5))
    bar_width = max(10, width // 5)
    notes_width = max(16, width - label_width - bar_width - 12)
    begin = min((root.start_ns for root in trace.roots), default=0)
    now = time.time_ns() if any(run.outcome == "running" for run in trace.runs) else _last(trace.roots)
    for line in lines:
        for row in _rows(line, label_width, bar_width, notes_width, begin, max(now, begin + 1), plain=plain):
            console.print(row, soft_wrap=True)
    hidden = sum(run.dropped for run in trace.runs)
    if hidden:
        console.print(Text(f"{hidden} more spans are not kept: there were too many.", "yellow"))
    if not everything and any(len(line.spans) > 1 for line in lines):
        console.print(Text("Equal lines are folded (x2, x3, ...); --all shows each.", "dim"))


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
            children = [(c,) for c in group[0].children] if everything else _folded(group[0].children)
        under = below + (bar if children else blank)
        lines.append(_line(group, guide, under, trace, gone=gone))
        for index in range(len(children) - 1, -1, -1):
            last = index == len(children) - 1
            stack.append((children[index], below + (corner if last else tee), below + (blank if last else bar)))
    return lines


def _folded(children: Sequence[Node]) -> list[tuple[Node, ...]]:
    """Siblings in their order; where there are many, those of one name together, but each that failed by itself."""
    if len(children) <= FOLD_ABOVE:
        return [(child,) for child in children]
    groups: dict[object, list[Node]] = {}
    for child in children:
        odd = child.failed or child.end_ns is None or bool(child.attributes.get(names.CANCELLED))
        groups.setdefault(child.span_id if odd else (child.name, child.kind), []).append(child)
    return [tuple(group) for group in groups.values()]


def _line(group: tuple[Node, ...], guide: str, below: str, trace: Trace, *, gone: bool) -> _Line:
    label = _label(group[0])
    notes: list[tuple[str, str]]
    if len(group) > 1:
        label += f" x{len(group)}"
        notes = _notes_of_many(group)
    else:
        notes = _notes(next(iter(group)), trace, gone=gone)
    return _Line(guide, below, label, group, tuple(notes))


def _label(node: Node) -> str:
    name = _clean(node.name)
    for prefix, shown in _PREFIXES:
        if name.startswith(prefix):
            return shown + name[len(prefix) :]
    return name


def _notes(node: Node, trace: Trace, *, gone: bool) -> list[tuple[str, str]]:
    """What is worth saying about one span, the most telling first."""
    of = node.attributes
    notes: list[tuple[str, str]] = []
    if of.get(names.CANCELLED):
        notes.append(("cancelled", "yellow"))
    elif node.failed or names.ERROR_TYPE in of:
        error = _clean(str(of.get(names.ERROR_TYPE, "error")))
        # Said where it happened; what it passed through on its way out only failed with it.
        inner = any(child.attributes.get(names.ERROR_TYPE) == error for child in node.children)
        notes.append(("failed" if inner else f"failed: {error}", "bold red"))
    elif node.end_ns is None:
        notes.append(("never ended: its process is gone", "bold yellow") if gone else ("running", "cyan"))
    notes += _cache_notes(node, trace)
    if _number(of.get(names.STEP_ASKS)) > 1:
        notes.append((f"asked {of[names.STEP_ASKS]} times until its reply could be read", "yellow"))
    if names.INPUT_TOKENS in of:
        estimated = "about " if of.get(names.UPSTREAM_ESTIMATED) else ""
        out = of.get(names.OUTPUT_TOKENS)
        tokens = f"{of[names.INPUT_TOKENS]}" if out is None else f"{of[names.INPUT_TOKENS]} + {out}"
        notes.append((f"{estimated}{tokens} tokens", ""))
        if names.UPSTREAM_COST in of:
            notes.append((_cost(_number(of[names.UPSTREAM_COST])), ""))
    if names.FIRST_CHUNK in of:
        notes.append((f"first text at {_seconds(_number(of[names.FIRST_CHUNK]))}", ""))
    if names.UPSTREAM_ATTEMPTS in of:
        notes.append((f"{of[names.UPSTREAM_ATTEMPTS]} attempts", "yellow"))
    elif names.UPSTREAM_BACKOFF in of:
        notes.append((f"after waiting {_seconds(_number(of[names.UPSTREAM_BACKOFF]))}", ""))
    took = 0.0 if node.end_ns is None else (node.end_ns - node.start_ns) / 1e9
    for name, value in of.items():
        # A wait that is nothing beside the span itself is only in the JSON.
        if name.endswith(names.WAIT_SUFFIX) and _number(value) >= took / 20:
            what = name.removesuffix(names.WAIT_SUFFIX)
            notes.append((_WAITS.get(what, f"waited {{}} for {_clean(what)}").format(_seconds(_number(value))), ""))
    if names.RUN_PART_OF in of:
        notes.append((f"{len(node.children)} of {of[names.RUN_PART_OF]}", ""))
    if names.HTTP_STATUS in of:
        notes.append((f"HTTP {of[names.HTTP_STATUS]}", ""))
    return notes


_WAITS = {
    "asmodel.cache.flight": "waited {} for another run's answer",
    "asmodel.upstream.queue": "queued {} for the upstream",
    "asmodel.upstream.limit": "queued {} for the upstream",
}


def _cache_notes(node: Node, trace: Trace) -> list[tuple[str, str]]:
    of = node.attributes
    result = of.get(names.CACHE_RESULT)
    payer = next((trace.payers[link.span_id] for link in node.links if link.span_id in trace.payers), None)
    by = ""
    if payer is not None:
        same = any(run.span_id == payer.span_id for run in trace.runs)
        by = ", paid by this run" if same else f", paid by {_clean(payer.name)} {_short(payer)}"
    if result == "hit":
        age = f" {_ago(_number(of[names.CACHE_AGE]))}" if names.CACHE_AGE in of else ""
        return [(f"cached{age}{by}", "green")]
    if result == "joined":
        return [(f"shared with a run that was asking the same{by}", "green")]
    if result == "bypass":
        return [("cache not asked", "")]
    return []


def _notes_of_many(group: Sequence[Node]) -> list[tuple[str, str]]:
    notes: list[tuple[str, str]] = []
    results = [node.attributes.get(names.CACHE_RESULT) for node in group]
    for result, word in (("hit", "cached"), ("joined", "shared")):
        if result in results:
            notes.append((f"{results.count(result)} {word}", "green"))
    reasked = sum(_number(node.attributes.get(names.STEP_ASKS)) > 1 for node in group)
    if reasked:
        notes.append((f"{reasked} asked again", "yellow"))
    total_in, total_out, cost, calls = 0.0, 0.0, 0.0, 0
    unpriced = False
    stack = list(group)
    while stack:
        node = stack.pop()
        if names.INPUT_TOKENS in node.attributes:
            calls += 1
            total_in += _number(node.attributes[names.INPUT_TOKENS])
            total_out += _number(node.attributes.get(names.OUTPUT_TOKENS))
            unpriced = unpriced or names.UPSTREAM_COST not in node.attributes
            cost += _number(node.attributes.get(names.UPSTREAM_COST))
        stack.extend(node.children)
    if calls:
        notes.append((f"{int(total_in)} + {int(total_out)} tokens", ""))
        if not unpriced:
            notes.append((_cost(cost), ""))
    return notes


# -- a line as text -------------------------------------------------------------------------------------------------


def _rows(
    line: _Line, label_width: int, bar_width: int, notes_width: int, begin: int, end: int, *, plain: bool
) -> list[Any]:
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
    took = _seconds((last - first) / 1e9) if known else ""
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


def _stripped(row: Any) -> Any:
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


def _last(roots: Sequence[Node]) -> int:
    last = 0
    stack = list(roots)
    while stack:
        node = stack.pop()
        last = max(last, node.start_ns if node.end_ns is None else node.end_ns)
        stack.extend(node.children)
    return last


# -- headings and numbers -------------------------------------------------------------------------------------------


def _heading(run: RunRow) -> Any:
    from rich.text import Text

    text = Text(_clean(run.name), "bold")
    text.append("  ")
    text.append(run.outcome, _OUTCOMES[run.outcome])
    if run.error:
        text.append(f" ({_clean(run.error)})", "red")
    if run.seconds is not None:
        text.append(f"  {_seconds(run.seconds)}")
    text.append(f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(run.started))}", "dim")
    if run.outcome == "lost":
        text.append("\nThe process that ran it is gone; this is what it had done.", "yellow")
    facts = [_plural(run.steps, "step") + (f" ({run.hits} cached)" if run.hits else "")] if run.program else []
    facts.append(_plural(run.calls, "model call"))
    if run.joined:
        facts.append(f"{run.joined} shared with other runs")
    if run.calls:
        facts.append(f"{run.input_tokens:,} tokens in, {run.output_tokens:,} out")
        facts.append("price unknown" if run.cost is None else _cost(run.cost))
    text.append("\n" + ", ".join(facts))
    return text


def _ids(trace: Trace) -> str:
    runs = [f"run {_clean(run.run_id)}" for run in trace.runs if run.run_id]
    return "  ".join([*runs, f"trace {trace.trace_id}"])


def _short(run: RunRow) -> str:
    return _clean((run.run_id or run.trace_id)[:10])


def _short_ids(rows: Sequence[RunRow]) -> dict[str, str]:
    """The beginnings of the runs' ids: of one length, 8 at least, and long enough to tell them apart."""
    ids = {row.span_id: _clean(row.run_id or row.trace_id) for row in rows}
    whole = set(ids.values())
    length = 8
    while length < 32 and len({i[:length] for i in whole}) < len(whole):
        length += 1
    return {span_id: i[:length] for span_id, i in ids.items()}


def _console(console: Console | None) -> Console:
    if console is not None:
        return console
    from rich.console import Console

    # In a pipe rich takes 80 columns whatever $COLUMNS says to others; the standard library asks both.
    return Console(highlight=False, width=shutil.get_terminal_size((80, 24)).columns)


def _clean(text: str) -> str:
    return text.translate(_CONTROL)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _seconds(seconds: float) -> str:
    if seconds < 0.0000995:
        return "<0.1 ms"
    if seconds < 0.0995:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _ago(seconds: float) -> str:
    for size, word in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{_plural(int(seconds // size), word)} ago"
    return f"{_plural(int(seconds), 'second')} ago" if seconds >= 1 else "a moment ago"


def _when(at: float) -> str:
    then, now = time.localtime(at), time.localtime()
    same_day = (then.tm_year, then.tm_yday) == (now.tm_year, now.tm_yday)
    return time.strftime("%H:%M:%S" if same_day else "%m-%d %H:%M", then)


def _count(number: int) -> str:
    return f"{number:,}" if number < 100_000 else f"{number / 1e3:,.0f}k"


def _cost(dollars: float | None) -> str:
    if dollars is None:
        return "?"
    if dollars == 0:
        return "$0"
    return f"${dollars:.2f}" if dollars >= 1 else f"${dollars:.4f}" if dollars >= 0.00095 else f"${dollars:.1g}"
