"""Why a step of a run was bought and not found: the nearest stored call, and which field or message of it differs.

Told from fingerprints (keyed digests of a call's parts), which are on the spans of steps that missed and beside each
stored reply; no prompt is kept for it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias, cast

import orjson

from asmodel import tracing
from asmodel.fingerprint import BY, Fingerprint, differing, read
from asmodel.protocols import Cache, Listable
from asmodel.tags import read as read_tag
from asmodel.trace_reader import Node, Trace

MOST = 2_000
"""Entries of one step that are looked at, those listed last."""

Outcome: TypeAlias = Literal["hit", "joined", "miss", "bypass", "unfinished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """One step of a run, and why it was bought or not."""

    program: str
    step: str
    draw: str | None
    outcome: Outcome
    why: str
    differs: tuple[str, ...] = ()
    """Of a miss: the parts in which the nearest stored call differs, by their names in a call."""
    nearest_at: float | None = None
    """When that was bought, Unix seconds."""
    nearest_trace: str | None = None
    """The trace in which it was."""

    def as_json(self) -> dict[str, Any]:
        return {
            "program": self.program,
            "step": self.step,
            "draw": self.draw,
            "outcome": self.outcome,
            "why": self.why,
            "differs": list(self.differs),
            "nearest_at": self.nearest_at,
            "nearest_trace": self.nearest_trace,
        }


@dataclass(frozen=True, slots=True)
class _Entry:
    parts: Fingerprint
    bought_at: float
    trace_id: str | None


async def explain(trace: Trace, store: Cache | None) -> list[Explained]:
    """Each step of the trace, in the order in which they began."""
    steps = [(began, node) for root in trace.roots for began, node in _steps(root)]
    misses = {_name(node) for _, node in steps if _outcome(node) == "miss"}
    entries = await _entries(store, misses) if misses else {}
    return [_explained(node, began, entries.get(_name(node), ())) for began, node in steps]


def _steps(root: Node) -> Iterator[tuple[float, Node]]:
    """The steps below, each with when its request began, in Unix seconds."""
    found: list[Node] = []
    left = [root]
    while left:
        node = left.pop()
        if tracing.STEP_NAME in node.attributes:
            found.append(node)
        left.extend(node.children)
    yield from ((root.start_ns / 1e9, node) for node in sorted(found, key=lambda node: node.start_ns))


def _name(node: Node) -> tuple[str, str]:
    return str(node.attributes.get(tracing.STEP_PROGRAM, "")), str(node.attributes[tracing.STEP_NAME])


def _outcome(node: Node) -> Outcome:
    result = node.attributes.get(tracing.CACHE_RESULT)
    return result if result in ("hit", "joined", "miss", "bypass") else "unfinished"


async def _entries(store: Cache | None, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], list[_Entry]]:
    listable: object = store
    if store is None or not isinstance(listable, Listable):
        return {}
    keys: defaultdict[tuple[str, str], deque[str]] = defaultdict(lambda: deque(maxlen=MOST))
    async for key, tag, _ in listable.entries():
        told = read_tag(tag)
        if told is not None and (told.program, told.step) in wanted:
            keys[told.program, told.step].append(key)
    found: dict[tuple[str, str], list[_Entry]] = {}
    for name, some in keys.items():
        read_ = [_entry(await store.get(key)) for key in some]
        found[name] = [entry for entry in read_ if entry is not None]
    return found


def _entry(data: bytes | None) -> _Entry | None:
    try:
        body = cast("object", orjson.loads(data or b""))
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict):
        return None
    fields = cast("dict[str, Any]", body)
    parts, bought_at = read(fields.get("parts")), fields.get("bought_at")
    if parts is None or not isinstance(bought_at, (int, float)):
        return None
    origin = fields.get("origin")
    trace_id = cast("dict[str, Any]", origin).get("trace_id") if isinstance(origin, dict) else None
    return _Entry(parts, float(bought_at), trace_id if isinstance(trace_id, str) else None)


def _explained(node: Node, began: float, entries: Iterable[_Entry]) -> Explained:
    outcome = _outcome(node)
    parts = _parts(node.attributes) if outcome == "miss" else None
    why, differs, nearest = _WHY.get(outcome, ""), list[str](), None
    if outcome == "miss":
        # What this very run bought is no reason for anything: the question is what was there when it began.
        earlier = [entry for entry in entries if entry.bought_at < began]
        if parts is None:
            why = "bought; what it was made of was not kept"
        elif not earlier:
            why = "bought: nothing of this step was stored when the run began, or it has gone since"
        else:
            alike = [entry for entry in earlier if entry.parts.get(BY) == parts[BY]]
            if not alike:
                why = "bought; the stored answers of this step are from before the store was begun anew"
            else:
                nearest = min(alike, key=lambda e: (len(differing(parts, e.parts)), -e.bought_at))
                differs = differing(parts, nearest.parts)
                why = f"bought: {_difference(differs)} (of the nearest answer, bought {_at(nearest.bought_at)})"
    return Explained(
        program=_name(node)[0],
        step=_name(node)[1],
        draw=cast("str | None", node.attributes.get(tracing.STEP_DRAW)),
        outcome=outcome,
        why=why,
        differs=tuple(differs),
        nearest_at=None if nearest is None else nearest.bought_at,
        nearest_trace=None if nearest is None else nearest.trace_id,
    )


_WHY: Mapping[str, str] = {
    "hit": "found",
    "joined": "bought by another at that moment, and shared",
    "bypass": "bought, because the step or the request asks for no stored answer",
    "unfinished": "ended before there was an answer",
}


def _parts(attributes: Mapping[str, Any]) -> Fingerprint | None:
    try:
        return read(orjson.loads(str(attributes.get(tracing.CACHE_PARTS, ""))))
    except orjson.JSONDecodeError:
        return None


def _difference(differs: Sequence[str]) -> str:
    match list(differs):
        case []:
            return "the same call was stored, and was too old, or its step could not read it"
        case ["scope"]:
            return "the same call was stored for another caller"
        case ["draw"]:
            return "the same call was stored, as another draw"
        case _:
            told = {"identity": "the model that answers", "draw": "the draw", "scope": "the caller"}
            names = [told.get(name, name) for name in differs]
            return f"{_listed(names)} differ{'s' if len(names) == 1 else ''}"


def _listed(names: Sequence[str], most: int = 5) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
