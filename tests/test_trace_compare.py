"""Two runs side by side: real spans, out of the local file."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from asmodel import trace_reader, tracing
from asmodel.calls import Chat, Message, Reply, Usage
from asmodel.errors import UpstreamTimeout
from asmodel.trace_compare import compare, comparison_json, draw_comparison
from asmodel.trace_content import VARIABLE
from asmodel.trace_export import Tracing
from asmodel.trace_reader import Trace


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def step(
    name: str, shown: str = "hi", said: str = "yes", *, hit: bool = False, model: str = "gpt", draw: str | None = None
) -> None:
    call = Chat(identity="m", messages=(Message("user", shown),))
    reply = Reply(text=said, usage=Usage(prompt_tokens=3, completion_tokens=1), model=model, cost=0.5)
    with tracing.step_span(name, program="p", kind="chat", draw=draw) as span:
        if hit:
            reply = reply.named("hit")
        else:
            with tracing.call_span(call, upstream="u", provider="p", model=model, address=None, stream=False) as c:
                tracing.record_reply(c, reply, first_delta=None, call=call)
        tracing.record_step(span, reply, asks=1, call=call)


def two(tmp_path: Path, a: Callable[[], None], b: Callable[[], None]) -> tuple[Trace, Trace]:
    path = tmp_path / "state" / "traces.sqlite"
    traces = Tracing(local=path)
    for run_id, work in (("run_a", a), ("run_b", b)):
        with (
            tracing.start_request("POST", "/v1/chat/completions", {}),
            tracing.run_span("p", digest="d", run_id=run_id, nested=False),
        ):
            work()
    assert traces.shutdown()
    return trace_reader.spans(path, "run_a"), trace_reader.spans(path, "run_b")


def told(a: Trace, b: Trace) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(pair.depth, pair.name, pair.differences) for pair in compare(a, b)]


def drawn(a: Trace, b: Trace, *, everything: bool = False) -> str:
    out = io.StringIO()
    draw_comparison(a, b, everything=everything, console=Console(file=out, width=120))
    return out.getvalue()


def test_a_run_and_its_repetition_differ_in_what_was_bought_alone(tmp_path: Path) -> None:
    def steps(hit: bool) -> Callable[[], None]:
        def work() -> None:
            step("one", hit=hit)
            step("two")

        return work

    both = two(tmp_path, steps(False), steps(True))
    assert told(*both) == [
        (0, "program p", ()),
        (1, "step one", ("bought in A, cached in B",)),
        (1, "step two", ()),
        (2, "chat gpt", ()),
    ]


def test_steps_that_one_run_made_alone_stand_where_it_made_them(tmp_path: Path) -> None:
    def a() -> None:
        step("one")
        step("two")
        step("three")

    def b() -> None:
        step("one")
        step("extra")
        step("three")
        step("three")

    assert [line for line in told(*two(tmp_path, a, b)) if line[0] == 1] == [
        (1, "step one", ()),
        (1, "step two", ("only in A",)),
        (1, "step extra", ("only in B",)),
        (1, "step three", ()),
        (1, "step three", ("only in B",)),
    ]


def test_draws_are_paired_whatever_order_they_come_in(tmp_path: Path) -> None:
    def votes(order: str) -> Callable[[], None]:
        def work() -> None:
            for draw in order:
                step("vote", model=f"m{draw}", draw=f"0/{draw}")

        return work

    assert not [line for line in told(*two(tmp_path, votes("0123"), votes("3210"))) if line[2]]


def test_another_model_another_ending_and_another_answer_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "SPAN_ONLY")

    def fails() -> None:
        step("same")
        step("one", "this", "yes", model="small")
        with tracing.step_span("two", program="p", kind="chat", draw=None):
            raise UpstreamTimeout("x")

    def a() -> None:
        with pytest.raises(UpstreamTimeout):
            fails()

    def b() -> None:
        step("same")
        step("one", "that", "no", model="large")
        step("two")

    found = {line[1]: line[2] for line in told(*two(tmp_path, a, b))}
    assert found["step same"] == ()
    assert found["step one"] == ("shown something else", "said something else")
    assert "model small in A, large in B" in found["chat small"]
    assert "failed (upstream_timeout) in A, fine in B" in found["step two"]


def test_which_part_of_a_call_was_another_is_known_without_its_content(tmp_path: Path) -> None:
    def asked(**parts: str) -> Callable[[], None]:
        def work() -> None:
            with tracing.step_span("one", program="p", kind="chat", draw=None) as span:
                span.set_attribute(tracing.CACHE_PARTS, json.dumps(parts))

        return work

    def differences(a: Callable[[], None], b: Callable[[], None], folder: str) -> tuple[str, ...]:
        return next(line[2] for line in told(*two(tmp_path / folder, a, b)) if line[1] == "step one")

    one = asked(**{"by": "s", "identity": "1", "messages.0": "2"})
    other = asked(**{"by": "s", "identity": "1", "messages.0": "3", "messages.1": "4"})
    assert differences(one, one, "same") == ()
    assert differences(one, other, "other") == ("asked something else (messages.0, messages.1)",)
    assert differences(one, asked(by="another", identity="9"), "secret") == ()


def test_the_drawing_folds_what_is_alike_and_says_what_could_not_be_compared(tmp_path: Path) -> None:
    def scores(hits: int) -> Callable[[], None]:
        def work() -> None:
            for number in range(20):
                step("score", f"p{number}", hit=number < hits)

        return work

    both = two(tmp_path, scores(0), scores(7))
    text = drawn(*both)
    assert "step score x20" in text
    assert "bought in A, cached in B (7)" in text
    assert "not recorded" in text
    assert drawn(*both, everything=True).count("step score") == 20


def test_a_run_compared_with_itself_differs_in_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "SPAN_ONLY")
    a, _ = two(tmp_path, lambda: step("one"), lambda: step("one"))
    text = drawn(a, a)
    assert "nothing but their time differs" in text
    assert "not recorded" not in text


def test_the_comparison_is_json_too(tmp_path: Path) -> None:
    rows = comparison_json(*two(tmp_path, lambda: step("one"), lambda: None))
    one = next(row for row in rows if row["name"] == "step one")
    assert one["b"] is None
    assert (one["a"]["cache"], one["a"]["input_tokens"], one["a"]["cost"]) == ("miss", 3, 0.5)
    assert one["differences"] == ["only in A"]
