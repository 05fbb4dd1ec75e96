"""Two runs side by side, step by step: which steps both made, what each took and cost, and what differs.

Steps are paired by their name and draw, in the order in which they began, level by level; what is left over happened in
one run only. Whether two were told the same is known where content was recorded in both runs; whether they asked the
same, also where both missed the cache, by the digests of a call's parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson

from asmodel import trace_words as words
from asmodel import tracing as names
from asmodel.fingerprint import BY, Fingerprint, differing, read
from asmodel.trace_reader import Node, Trace
from asmodel.trace_time import walk
from asmodel.trace_view import heading, terminal

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Pair:
    """One thing that happened in both runs, or in one of them."""

    depth: int
    name: str
    a: Node | None
    b: Node | None
    differences: tuple[str, ...]
    """In words; empty where nothing worth saying differs. How long it took is not among them: it always differs."""


def compare(a: Trace, b: Trace) -> list[Pair]:
    """The two traces as pairs, in the order of the trees."""
    pairs: list[Pair] = []
    stack: list[tuple[int, Node | None, Node | None]] = [(0, x, y) for x, y in reversed(_paired(_runs(a), _runs(b)))]
    while stack:
        depth, x, y = stack.pop()
        one = x or y
        assert one is not None
        pairs.append(Pair(depth, words.label(one), x, y, tuple(_differences(x, y))))
        below = _paired(x.children if x else (), y.children if y else ())
        if x and y and _source(x) != _source(y):
            # That a step which bought nothing made no call has been said.
            below = [pair for pair in below if all(pair) or not any(one and words.is_call(one) for one in pair)]
        stack.extend((depth + 1, *pair) for pair in reversed(below))
    return pairs


def draw_comparison(a: Trace, b: Trace, *, everything: bool = False, console: Console | None = None) -> None:
    """Print both runs and their pairs. With `everything`, equal pairs are not folded however many there are."""
    from rich.table import Table
    from rich.text import Text

    console = terminal(console)
    for letter, trace in (("A", a), ("B", b)):
        for run in trace.runs:
            for index, row in enumerate(heading(run).split("\n")):
                console.print(Text.assemble((f"{letter}  " if index == 0 else "   ", "bold"), row), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step", overflow="fold", ratio=3)
    table.add_column("A", justify="right", no_wrap=True)
    table.add_column("B", justify="right", no_wrap=True)
    table.add_column("what differs", overflow="fold", ratio=3)
    pairs = compare(a, b)
    for group in [(pair,) for pair in pairs] if everything else _folded(pairs):
        first = group[0]
        name = "  " * first.depth + first.name + (f" x{len(group)}" if len(group) > 1 else "")
        differences = _together(group)
        style = "" if not differences else "yellow" if first.a and first.b else "cyan"
        table.add_row(
            Text(name, style),
            Text(_took([pair.a for pair in group])),
            Text(_took([pair.b for pair in group])),
            Text(", ".join(differences), style),
        )
    console.print(table)
    if not any(pair.differences for pair in pairs):
        console.print(Text("\nBoth made the same steps, and nothing but their time differs.", "green"))
    if not (_has_content(a) and _has_content(b)):
        console.print(
            Text("\nWhat was shown and said is not recorded of both runs, so it could not be compared.", "dim")
        )


def comparison_json(a: Trace, b: Trace) -> list[dict[str, Any]]:
    """The pairs as JSON."""
    return [
        {
            "depth": pair.depth,
            "name": pair.name,
            "a": _side(pair.a),
            "b": _side(pair.b),
            "differences": list(pair.differences),
        }
        for pair in compare(a, b)
    ]


def _runs(trace: Trace) -> tuple[Node, ...]:
    """The runs themselves: the requests around them, where there are any, are of no interest."""
    wanted = {run.span_id for run in trace.runs}
    return tuple(node for node in walk(trace.roots) if node.span_id in wanted) or trace.roots


def _key(node: Node) -> object:
    if words.is_call(node):
        return "call"  # of another model, perhaps: that is what one wants to see
    if names.RUN_PROGRAM in node.attributes and not node.attributes.get(names.RUN_NESTED):
        return "run"
    return node.name, node.attributes.get(names.STEP_DRAW)


def _paired(a: Sequence[Node], b: Sequence[Node]) -> list[tuple[Node | None, Node | None]]:
    waiting: dict[object, deque[int]] = {}
    for index, node in enumerate(b):
        waiting.setdefault(_key(node), deque()).append(index)
    partners = [same.popleft() if (same := waiting.get(_key(node))) else None for node in a]
    alone = deque(sorted(index for left in waiting.values() for index in left))
    pairs: list[tuple[Node | None, Node | None]] = []
    for node, partner in zip(a, partners, strict=True):
        if partner is None:
            pairs.append((node, None))
            continue
        # What only B did comes where it did it: before what follows it there.
        while alone and alone[0] < partner:
            pairs.append((None, b[alone.popleft()]))
        pairs.append((node, b[partner]))
    return pairs + [(None, b[index]) for index in alone]


def _differences(a: Node | None, b: Node | None) -> list[str]:
    if a is None or b is None:
        return ["only in A" if b is None else "only in B"]
    found: list[str] = []
    for how, other in ((_ending(a), _ending(b)), (_source(a), _source(b))):
        if how != other:
            found.append(f"{how} in A, {other} in B")
    for name, said in ((names.RESPONSE_MODEL, "model"), (names.RUN_DIGEST, "source"), (names.STEP_ASKS, "asks")):
        x, y = a.attributes.get(name), b.attributes.get(name)
        if x != y and x is not None and y is not None:
            found.append(f"{said} {words.clean(str(x))} in A, {words.clean(str(y))} in B")
    in_a, in_b = words.content(a), words.content(b)
    parts = _other_parts(a, b)
    if parts:
        found.append(f"asked something else ({', '.join(parts)})")
    elif in_a and in_b and any(in_a.get(name) != in_b.get(name) for name in words.CONTENTS - words.ANSWERS):
        found.append("shown something else")
    if in_a and in_b and any(in_a.get(name) != in_b.get(name) for name in words.ANSWERS):
        found.append("said something else")
    return found


def _other_parts(a: Node, b: Node) -> list[str]:
    """Which parts of two calls differ, by the digests that a step which missed the cache has of them."""
    x, y = _fingerprint(a), _fingerprint(b)
    if x is None or y is None or x[BY] != y[BY]:
        return []  # a hit has none; and what another store's secret has made tells nothing
    return [words.clean(name) for name in differing(x, y)]


def _fingerprint(node: Node) -> Fingerprint | None:
    held = node.attributes.get(names.CACHE_PARTS)
    try:
        return read(orjson.loads(held)) if isinstance(held, str) else None
    except orjson.JSONDecodeError:
        return None


def _ending(node: Node) -> str:
    if node.attributes.get(names.CANCELLED):
        return "cancelled"
    if node.failed or names.ERROR_TYPE in node.attributes:
        return f"failed ({words.clean(str(node.attributes.get(names.ERROR_TYPE, 'error')))})"
    return "not ended" if node.end_ns is None else "fine"


_SOURCES = {"hit": "cached", "joined": "shared", "miss": "bought", "bypass": "bought"}


def _source(node: Node) -> str:
    return _SOURCES.get(str(node.attributes.get(names.CACHE_RESULT)), "")


def _took(nodes: Sequence[Node | None]) -> str:
    there = [node for node in nodes if node is not None]
    if not there:
        return "-"
    took = sum((node.end_ns - node.start_ns) / 1e9 for node in there if node.end_ns is not None)
    return words.seconds(took) if any(node.end_ns is not None for node in there) else "?"


def _folded(pairs: Sequence[Pair]) -> list[tuple[Pair, ...]]:
    """Many siblings that are alike as one, and of what is in them only what failed in one run alone."""
    groups: list[tuple[Pair, ...]] = []
    index = 0
    while index < len(pairs):
        here = pairs[index]
        siblings = [here]
        after = index + 1
        inside: list[Pair] = []
        while after < len(pairs) and pairs[after].depth >= here.depth:
            if pairs[after].depth > here.depth:
                inside.append(pairs[after])
            elif pairs[after].name == here.name:
                siblings.append(pairs[after])
            else:
                break
            after += 1
        if len(siblings) > words.FOLD_ABOVE:
            groups.append(tuple(siblings))
            odd = [pair for pair in inside if any(side and side.failed for side in (pair.a, pair.b))]
            groups += [(replace(pair, depth=here.depth + 1),) for pair in odd if pair.differences]
            index = after
        else:
            groups.append((here,))
            index += 1
    return groups


def _together(group: Sequence[Pair]) -> list[str]:
    if len(group) == 1:
        return list(group[0].differences)
    counts: dict[str, int] = {}
    for pair in group:
        for difference in pair.differences:
            counts[difference] = counts.get(difference, 0) + 1
    return [f"{difference} ({count})" for difference, count in counts.items()]


def _has_content(trace: Trace) -> bool:
    return any(words.content(node) for node in walk(trace.roots))


def _side(node: Node | None) -> dict[str, Any] | None:
    if node is None:
        return None
    return {
        "span_id": node.span_id,
        "seconds": None if node.end_ns is None else (node.end_ns - node.start_ns) / 1e9,
        "ending": _ending(node),
        "cache": node.attributes.get(names.CACHE_RESULT),
        "input_tokens": node.attributes.get(names.INPUT_TOKENS, node.attributes.get(names.STEP_INPUT_TOKENS)),
        "output_tokens": node.attributes.get(names.OUTPUT_TOKENS, node.attributes.get(names.STEP_OUTPUT_TOKENS)),
        "cost": node.attributes.get(names.UPSTREAM_COST, node.attributes.get(names.STEP_COST)),
    }
