"""What `asmodel trace` says of a span, in words: its label, what is worth noting, numbers as people read them.

Shared by all who show a trace: the tree in the terminal, the page, the comparison, the line of one that is followed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from asmodel import tracing as names
from asmodel.trace_reader import Node, RunRow, Trace

FOLD_ABOVE = 4
"""Siblings, of which equal ones are shown as one line with their number."""

_CALLS = frozenset(names.OPERATIONS.values())
CONTENTS = frozenset(names.CONTENT)
ANSWERS = frozenset((names.OUTPUT_MESSAGES, names.TOOL_RESULT))
_PREFIXES = (
    ("invoke_workflow ", "program "),
    ("execute_tool ", "tool "),
    ("text_completion ", "completion "),
)
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160), *_BIDI)}
"""A model's name comes from outside; it must not reach the terminal as a command, nor turn round what follows it."""


def folded(children: Sequence[Node]) -> list[tuple[Node, ...]]:
    """Siblings in their order; where there are many, those of one name together, but each that failed by itself."""
    if len(children) <= FOLD_ABOVE:
        return [(child,) for child in children]
    groups: dict[object, list[Node]] = {}
    for child in children:
        odd = child.failed or child.end_ns is None or bool(child.attributes.get(names.CANCELLED))
        groups.setdefault(child.span_id if odd else (child.name, child.kind), []).append(child)
    return [tuple(group) for group in groups.values()]


def label(node: Node) -> str:
    name = clean(node.name)
    for prefix, shown in _PREFIXES:
        if name.startswith(prefix):
            return shown + name[len(prefix) :]
    return name


def notes(node: Node, trace: Trace, *, gone: bool) -> list[tuple[str, str]]:
    """What is worth saying about one span, the most telling first."""
    of = node.attributes
    said: list[tuple[str, str]] = []
    if of.get(names.CANCELLED):
        said.append(("cancelled", "yellow"))
    elif node.failed or names.ERROR_TYPE in of:
        error = clean(str(of.get(names.ERROR_TYPE, "error")))
        # Said where it happened; what it passed through on its way out only failed with it.
        inner = any(child.attributes.get(names.ERROR_TYPE) == error for child in node.children)
        said.append(("failed" if inner else f"failed: {error}", "bold red"))
    elif node.end_ns is None:
        said.append(("never ended: its process is gone", "bold yellow") if gone else ("running", "cyan"))
    said += cache_notes(node, trace)
    if number(of.get(names.STEP_ASKS)) > 1:
        said.append((f"asked {of[names.STEP_ASKS]} times until its reply could be read", "yellow"))
    if names.INPUT_TOKENS in of:
        estimated = "about " if of.get(names.UPSTREAM_ESTIMATED) else ""
        out = of.get(names.OUTPUT_TOKENS)
        tokens = f"{of[names.INPUT_TOKENS]}" if out is None else f"{of[names.INPUT_TOKENS]} + {out}"
        said.append((f"{estimated}{tokens} tokens", ""))
        if names.UPSTREAM_COST in of:
            said.append((cost(number(of[names.UPSTREAM_COST])), ""))
    if names.FIRST_CHUNK in of:
        said.append((f"first text at {seconds(number(of[names.FIRST_CHUNK]))}", ""))
    if names.UPSTREAM_ATTEMPTS in of:
        said.append((f"{of[names.UPSTREAM_ATTEMPTS]} attempts", "yellow"))
    elif names.UPSTREAM_BACKOFF in of:
        said.append((f"after waiting {seconds(number(of[names.UPSTREAM_BACKOFF]))}", ""))
    took = 0.0 if node.end_ns is None else (node.end_ns - node.start_ns) / 1e9
    for name, value in of.items():
        what = name.removesuffix(names.WAIT_SUFFIX)
        # A wait that is nothing beside the span itself is only in the JSON; so is a look into the cache, as a rule.
        least = max(took / 20, 0.002) if what in _QUICK else took / 20
        if what != name and number(value) >= least:
            said.append((_WAITS.get(what, f"waited {{}} for {clean(what)}").format(seconds(number(value))), ""))
    if names.RUN_LIMITED in of:
        said.append((f"ended by its limit of {clean(str(of[names.RUN_LIMITED]))}", "yellow"))
    if names.RUN_PART_OF in of:
        said.append((f"{len(node.children)} of {of[names.RUN_PART_OF]}", ""))
    if names.HTTP_STATUS in of:
        said.append((f"HTTP {of[names.HTTP_STATUS]}", ""))
    return said


_QUICK = ("asmodel.cache.lookup", "asmodel.cache.store")
_WAITS = {
    "asmodel.cache.flight": "waited {} for another run's answer",
    "asmodel.cache.lease": "waited {} for another process's answer",
    "asmodel.upstream.queue": "queued {} for the upstream",
    "asmodel.upstream.detection": "tried for {} what an upstream can do",
    "asmodel.upstream.loading": "waited {} for upstreams to be opened",
    "asmodel.upstream.limit": "queued {} for the upstream",
    "asmodel.upstream.prefix": "waited {} for a call that begins alike",
    "asmodel.cache.lookup": "looked it up for {}",
    "asmodel.cache.store": "stored it in {}",
}


def content(node: Node) -> dict[str, str]:
    """What is recorded of what was shown and said, by attribute, as JSON.

    The span's own; of a step that made calls, what the first of them showed and what the last was told.
    """
    found = _own_content(node)
    if not found and names.STEP_NAME in node.attributes:
        calls = [_own_content(child) for child in node.children if is_call(child)]
        if calls:
            answer = {name: text for name, text in calls[-1].items() if name in ANSWERS}
            return {name: text for name, text in calls[0].items() if name not in ANSWERS} | answer
    return found


def _own_content(node: Node) -> dict[str, str]:
    return {name: node.attributes[name] for name in names.CONTENT if isinstance(node.attributes.get(name), str)}


def is_call(node: Node) -> bool:
    return node.attributes.get(names.OPERATION) in _CALLS


def cache_notes(node: Node, trace: Trace) -> list[tuple[str, str]]:
    of = node.attributes
    result = of.get(names.CACHE_RESULT)
    payer = next((trace.payers[link.span_id] for link in node.links if link.span_id in trace.payers), None)
    by = ""
    if payer is not None:
        same = any(run.span_id == payer.span_id for run in trace.runs)
        by = ", paid by this run" if same else f", paid by {clean(payer.name)} {short(payer)}"
    if result == "hit":
        age = f" {ago(number(of[names.CACHE_AGE]))}" if names.CACHE_AGE in of else ""
        return [(f"cached{age}{by}", "green")]
    if result == "joined":
        return [(f"shared with a run that was asking the same{by}", "green")]
    if result == "bypass":
        return [("cache not asked", "")]
    return []


def notes_of_many(group: Sequence[Node]) -> list[tuple[str, str]]:
    said: list[tuple[str, str]] = []
    results = [node.attributes.get(names.CACHE_RESULT) for node in group]
    for result, word in (("hit", "cached"), ("joined", "shared")):
        if result in results:
            said.append((f"{results.count(result)} {word}", "green"))
    reasked = sum(number(node.attributes.get(names.STEP_ASKS)) > 1 for node in group)
    if reasked:
        said.append((f"{reasked} asked again", "yellow"))
    total_in, total_out, dollars, calls = 0.0, 0.0, 0.0, 0
    unpriced = False
    stack = list(group)
    while stack:
        node = stack.pop()
        if names.INPUT_TOKENS in node.attributes:
            calls += 1
            total_in += number(node.attributes[names.INPUT_TOKENS])
            total_out += number(node.attributes.get(names.OUTPUT_TOKENS))
            unpriced = unpriced or names.UPSTREAM_COST not in node.attributes
            dollars += number(node.attributes.get(names.UPSTREAM_COST))
        stack.extend(node.children)
    if calls:
        said.append((f"{int(total_in)} + {int(total_out)} tokens", ""))
        if not unpriced:
            said.append((cost(dollars), ""))
    return said


def facts(run: RunRow) -> list[str]:
    """What a run came to."""
    said = [plural(run.steps, "step") + (f" ({run.hits} cached)" if run.hits else "")] if run.program else []
    said.append(plural(run.calls, "model call"))
    if run.joined:
        said.append(f"{run.joined} shared with other runs")
    if run.calls:
        said.append(f"{run.input_tokens:,} tokens in, {run.output_tokens:,} out")
        said.append("price unknown" if run.cost is None else cost(run.cost))
    return said


def short(run: RunRow) -> str:
    return clean((run.run_id or run.trace_id)[:10])


def clean(text: str) -> str:
    return text.translate(_CONTROL)


def number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def seconds(seconds: float) -> str:
    if seconds < 0.0000995:
        return "<0.1 ms"
    if seconds < 0.0995:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ago(seconds: float) -> str:
    for size, word in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{plural(int(seconds // size), word)} ago"
    return f"{plural(int(seconds), 'second')} ago" if seconds >= 1 else "a moment ago"


def when(at: float) -> str:
    then, now = time.localtime(at), time.localtime()
    same_day = (then.tm_year, then.tm_yday) == (now.tm_year, now.tm_yday)
    return time.strftime("%H:%M:%S" if same_day else "%m-%d %H:%M", then)


def count(number: int) -> str:
    return f"{number:,}" if number < 100_000 else f"{number / 1e3:,.0f}k"


def cost(dollars: float | None) -> str:
    if dollars is None:
        return "?"
    if dollars == 0:
        return "$0"
    return f"${dollars:.2f}" if dollars >= 1 else f"${dollars:.4f}" if dollars >= 0.00095 else f"${dollars:.1g}"
