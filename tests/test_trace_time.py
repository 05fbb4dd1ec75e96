"""Where the time of a trace went: every moment once, and none of it lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel.trace_reader import Event, Node, Trace
from asmodel.trace_time import spent

SECOND = 1_000_000_000


def node(name: str, begin: float, end: float | None, *children: Node, wait: Any = None, **attributes: Any) -> Node:
    events: tuple[Event, ...] = ()
    if wait is not None:
        what, at, took = wait
        told = {"asmodel.wait.name": what, "asmodel.wait.seconds": took}
        events = (Event(name="asmodel.wait", time_ns=int((at + took) * SECOND), attributes=told),)
    of = {key.replace("__", "."): value for key, value in attributes.items()}
    if name.startswith("step"):
        of["asmodel.step.name"] = name
    if name.startswith("invoke_workflow"):
        of["asmodel.run.program"] = name
    if name.startswith("chat"):
        of["gen_ai.operation.name"] = "chat"
    if name.startswith("execute_tool"):
        of["gen_ai.operation.name"] = "execute_tool"
    return Node(
        span_id=f"{name}@{begin}",
        parent_id=None,
        name=name,
        kind="server" if name.startswith("POST") else "internal",
        start_ns=int(begin * SECOND),
        end_ns=None if end is None else int(end * SECOND),
        failed=False,
        attributes=of,
        events=events,
        children=children,
    )


def shares(*roots: Node, now: float | None = None) -> dict[str, float]:
    trace = Trace(trace_id="t", runs=(), roots=roots)
    found = spent(trace, now_ns=None if now is None else int(now * SECOND))
    return {share.what: round(share.seconds, 6) for share in found}


def test_each_moment_counts_for_what_is_most_telling_in_it() -> None:
    call = node("chat m", 2, 5, wait=("upstream.queue", 2, 1))
    stored = node("step a", 1, 6, call, wait=("cache.store", 5, 0.5))
    tool = node("execute_tool t", 6.5, 7)
    assert shares(node("POST /v1", 0, 10, node("invoke_workflow p", 0.5, 9, stored, tool))) == {
        "before and after the run": 1.5,
        "the program": 0.5 + 0.5 + 2,
        "asmodel, around the steps": 1 + 0.5,
        "queueing for an upstream": 1,
        "models": 2,
        "the cache": 0.5,
        "tools": 0.5,
    }


def test_while_a_model_works_another_calls_wait_is_no_loss() -> None:
    busy = node("step a", 0, 4, node("chat m", 0, 4))
    queued = node("step b", 0, 6, node("chat m", 0, 6, wait=("upstream.queue", 0, 5)))
    assert shares(node("invoke_workflow p", 0, 6, busy, queued)) == {"models": 5, "queueing for an upstream": 1}


def test_a_pause_before_a_retry_and_another_runs_call_are_told_apart() -> None:
    first = node("attempt 1", 0, 1, asmodel__upstream__attempt=1)
    second = node("attempt 2", 3, 4, asmodel__upstream__attempt=2, asmodel__upstream__backoff_s=2.0)
    tried = node("step a", 0, 4, node("chat m", 0, 4, first, second))
    joined = node("step b", 4, 6, wait=("cache.flight", 4, 2))
    assert shares(node("invoke_workflow p", 0, 6, tried, joined)) == {
        "models": 2,
        "pauses before a retry": 2,
        "another run's call": 2,
    }


def test_what_has_not_ended_counts_up_to_now() -> None:
    open_call = node("step a", 1, None, node("chat m", 1, None))
    assert shares(node("invoke_workflow p", 0, None, open_call), now=5) == {"models": 4, "the program": 1}


def test_spans_of_others_belong_to_whatever_they_are_in() -> None:
    assert shares(node("invoke_workflow p", 0, 2, node("parse", 0, 1))) == {"the program": 2}
    assert shares(node("theirs", 0, 2)) == {"unknown": 2}


TIMES = st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted)


@given(TIMES, st.lists(st.tuples(TIMES, TIMES, st.sampled_from(["step", "chat", "execute_tool", "x"])), max_size=8))
def test_nothing_is_counted_twice_and_nothing_is_lost(whole: list[float], parts: list[Any]) -> None:
    children = [
        node(f"{kind} {n}", inner[0], inner[1], wait=("cache.flight", wait[0], wait[1] - wait[0]))
        for n, (inner, wait, kind) in enumerate(parts)
    ]
    trace = Trace(trace_id="t", runs=(), roots=(node("invoke_workflow p", whole[0], whole[1], *children),))
    total = sum(share.seconds for share in spent(trace))
    assert total == pytest.approx(whole[1] - whole[0], abs=1e-6)
    assert all(share.seconds > 0 for share in spent(trace))
