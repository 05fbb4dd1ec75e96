"""Where the time of a trace went: each moment of it is counted once, for the most telling thing that happened in it.

While a model is at work nothing else matters, so that comes first; then what was waited for; a moment in which a step
is under way and none of these is ours, and one in which a program is under way and no step is the program's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from asmodel import tracing as names
from asmodel.trace_reader import Node, Trace
from asmodel.trace_words import is_call

MODEL = "models"
TOOL = "tools"
DETECT = "finding out what an upstream can do"
LOAD = "upstreams being opened"
PAUSE = "pauses before a retry"
QUEUE = "queueing for an upstream"
FLIGHT = "another run's call"
CACHE = "the cache"
WAIT = "other waits"
OURS = "asmodel, around the steps"
PROGRAM = "the program"
REQUEST = "before and after the run"
UNKNOWN = "unknown"

ORDER: tuple[str, ...] = (MODEL, TOOL, DETECT, LOAD, PAUSE, QUEUE, FLIGHT, CACHE, WAIT, OURS, PROGRAM, REQUEST, UNKNOWN)
"""The more telling first."""

_WAITS: Mapping[str, str] = {
    "cache.flight": FLIGHT,
    "cache.lease": FLIGHT,
    "cache.lookup": CACHE,
    "cache.store": CACHE,
    "upstream.pause": PAUSE,
    "upstream.queue": QUEUE,
    "upstream.limit": QUEUE,
    "upstream.prefix": WAIT,
    "upstream.detection": DETECT,
    "upstream.loading": LOAD,
}

_Interval: TypeAlias = "tuple[int, int, str]"


@dataclass(frozen=True, slots=True)
class Share:
    what: str
    seconds: float


def spent(trace: Trace, *, now_ns: int | None = None) -> list[Share]:
    """What the wall time of a trace was spent on, by `ORDER`, without what took none of it.

    What has not ended counts up to `now_ns`, or else up to the last thing that is known of the trace. The time between
    two requests of one trace belongs to neither, and is not counted.
    """
    end = last(trace) if now_ns is None else now_ns
    total = dict.fromkeys(ORDER, 0)
    for root in trace.roots:
        for what, took in _of(root, end).items():
            total[what] += took
    return [Share(what, took / 1e9) for what, took in total.items() if took > 0]


def of_node(node: Node, *, now_ns: int) -> dict[str, float]:
    """Seconds by `ORDER`, of one span and what is in it."""
    return {what: took / 1e9 for what, took in _of(node, now_ns).items()}


def last(trace: Trace) -> int:
    """The last moment that is known of the trace, in Unix nanoseconds; 0 where nothing is."""
    latest = 0
    for node in walk(trace.roots):
        latest = max(latest, node.start_ns if node.end_ns is None else node.end_ns)
    return latest


def walk(nodes: tuple[Node, ...]) -> Iterator[Node]:
    """Every span, each before those inside it, in their order."""
    stack = list(reversed(nodes))
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def waits(node: Node) -> list[_Interval]:
    """When the span was waiting, and for what; Unix nanoseconds."""
    found: list[_Interval] = []
    for event in node.events:
        seconds = event.attributes.get(names.WAIT_SECONDS)
        if event.name == names.WAIT_EVENT and isinstance(seconds, (int, float)):
            what = _WAITS.get(str(event.attributes.get(names.WAIT_NAME)), WAIT)
            found.append((max(node.start_ns, event.time_ns - int(seconds * 1e9)), event.time_ns, what))
    for child in node.children:
        pause = child.attributes.get(names.UPSTREAM_BACKOFF)
        if names.UPSTREAM_ATTEMPT in child.attributes and isinstance(pause, (int, float)):
            found.append((max(node.start_ns, child.start_ns - int(pause * 1e9)), child.start_ns, PAUSE))
    return found


def _of(root: Node, now_ns: int) -> dict[str, int]:
    # Each span and each wait opens at one moment and closes at another; between two moments nothing changes.
    moments: list[tuple[int, int, str]] = []

    def open_for(begin: int, end: int, what: str, by: int = 1) -> None:
        begin, end = max(begin, root.start_ns), min(end, ends)
        if begin < end:
            moments.append((begin, by, what))
            moments.append((end, -by, what))

    ends = now_ns if root.end_ns is None else root.end_ns
    for node in walk((root,)):
        node_ends = ends if node.end_ns is None else node.end_ns
        what = _what(node)
        if what is not None:
            open_for(node.start_ns, node_ends, what)
        for begin, end, waited in waits(node):
            open_for(begin, end, waited)
            if what == MODEL:
                open_for(begin, min(end, node_ends), MODEL, by=-1)  # it was not the model's, then
    moments.sort(key=lambda moment: moment[0])
    total = dict.fromkeys(ORDER, 0)
    under_way = dict.fromkeys(ORDER, 0)
    before = root.start_ns
    for at, by, what in moments:
        if at > before:
            most = next((name for name, count in under_way.items() if count > 0), UNKNOWN)
            total[most] += at - before
            before = at
        under_way[what] += by
    total[UNKNOWN] += max(0, ends - before)
    return total


def _what(node: Node) -> str | None:
    of = node.attributes
    if is_call(node):
        return MODEL
    if of.get(names.OPERATION) == "execute_tool":
        return TOOL
    if names.STEP_NAME in of:
        return OURS
    if names.RUN_PROGRAM in of:
        return PROGRAM
    return REQUEST if node.kind == "server" else None
