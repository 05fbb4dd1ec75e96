"""What a person sees of a run in the terminal: its content, not its exact art."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from asmodel.trace_reader import LinkTo, Node, RunRow, Trace
from asmodel.trace_schema import Outcome
from asmodel.trace_view import draw_runs, draw_trace, runs_json, trace_json

SECOND = 1_000_000_000
BEGAN = 1_790_000_000 * SECOND
RUN = RunRow(
    trace_id="5c1d" * 8,
    span_id="run",
    root="request",
    run_id="7f3a9b21c0",
    program="evidence-qa",
    model=None,
    started=BEGAN / SECOND,
    seconds=2.0,
    outcome="ok",
    error=None,
    steps=3,
    hits=1,
    joined=0,
    calls=2,
    input_tokens=310,
    output_tokens=42,
    cost=0.0041,
)
PAYER = replace(RUN, span_id="other-run", run_id="e1e2e3e4e5", program="self-consistency")


def node(
    name: str,
    begin: float = 0.0,
    end: float | None = 2.0,
    *children: Node,
    failed: bool = False,
    links: tuple[LinkTo, ...] = (),
    kind: str = "internal",
    **attributes: object,
) -> Node:
    """Times in seconds from the start; attribute names with `__` for a dot."""
    return Node(
        span_id=f"{name}@{begin}",
        parent_id=None,
        name=name,
        kind=kind,
        start_ns=BEGAN + int(begin * SECOND),
        end_ns=None if end is None else BEGAN + int(end * SECOND),
        failed=failed,
        attributes={key.replace("__", "."): value for key, value in attributes.items()},
        links=links,
        children=children,
    )


def trace(*roots: Node, run: RunRow = RUN, payers: Mapping[str, RunRow] | None = None) -> Trace:
    return Trace(trace_id=run.trace_id, runs=(run,), roots=roots, payers=payers or {})


def drawn(of: Trace, *, width: int = 80, everything: bool = False, ascii_only: bool = False) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8")
    draw_trace(of, everything=everything, console=Console(file=out, width=width))
    out.flush()
    assert isinstance(out.buffer, io.BytesIO)
    return out.buffer.getvalue().decode()


def listed(*rows: RunRow, width: int = 80) -> str:
    out = io.StringIO()
    draw_runs(rows, console=Console(file=out, width=width))
    return out.getvalue()


def line(text: str, holding: str) -> str:
    (found,) = [row for row in text.splitlines() if holding in row]
    return found


def words(text: str) -> str:
    """Without guides, bars and the breaks between lines."""
    return " ".join(re.sub(r"[│├└─█|`#]", " ", text).split())


CALL: dict[str, Any] = {"gen_ai__usage__input_tokens": 62, "gen_ai__usage__output_tokens": 21}
STORY = trace(
    node(
        "POST /v1/chat/completions",
        0,
        2,
        node(
            "invoke_workflow evidence-qa",
            0,
            2,
            node(
                "step question_given",
                0,
                0.01,
                links=(LinkTo(trace_id="t", span_id="paid", attributes={}),),
                asmodel__cache__result="hit",
                asmodel__cache__age_s=310.0,
            ),
            node(
                "step next_thought",
                0.5,
                1.5,
                node("chat gpt-4o-mini", 0.5, 1.5, kind="client", asmodel__upstream__cost=0.0041, **CALL),
                asmodel__cache__result="miss",
            ),
        ),
        kind="server",
        http__response__status_code=200,
    ),
    payers={"paid": PAYER},
)


def test_a_run_is_a_heading_and_a_tree() -> None:
    text = drawn(STORY)
    head, counts, ids, *_ = text.splitlines()
    assert "evidence-qa" in head
    assert "ok" in head
    assert "2.00 s" in head
    assert counts == "3 steps (1 cached), 2 model calls, 310 tokens in, 42 out, $0.0041"
    assert ids == f"run 7f3a9b21c0  trace {'5c1d' * 8}"
    tree = [row[:32].rstrip(" █") for row in text.splitlines()[4:] if re.search(r"[a-z]", row[:30])]
    assert tree == [
        "POST /v1/chat/completions",
        "└─ program evidence-qa",
        "   ├─ step question_given",
        "   └─ step next_thought",
        "      └─ chat gpt-4o-mini",
    ]


def test_where_the_time_went_is_said_above_the_tree() -> None:
    call = node("chat m", 0.5, 1.5, gen_ai__operation__name="chat")
    step = node("step a", 0.4, 1.6, call, asmodel__step__name="a")
    text = drawn(trace(node("invoke_workflow p", 0, 2, step, asmodel__run__program="p")), width=60)
    assert "time: models 1.00 s (50%), asmodel, around the steps 0.20 s (10%), the program 0.80 s (40%)" in words(text)


def test_a_hit_says_how_old_it_is_and_who_paid() -> None:
    assert "cached 5 minutes ago, paid by self-consistency e1e2e3e4e5" in words(drawn(STORY))
    own = replace(STORY, payers={"paid": RUN})
    assert "paid by this run" in words(drawn(own))
    assert "cached 5 minutes ago" in words(drawn(replace(STORY, payers={}))), "the run that paid is kept no more"


def test_a_call_says_its_tokens_and_cost() -> None:
    assert "62 + 21 tokens, $0.0041" in line(drawn(STORY, width=120), "chat gpt-4o-mini")


def test_bars_lie_where_their_span_lies_on_the_timeline() -> None:
    text = drawn(STORY)
    whole = line(text, "program evidence-qa")
    start, length = whole.index("█"), whole.count("█")
    step = line(text, "step next_thought")
    assert step.index("█") - start == pytest.approx(length / 4, abs=1)
    assert step.count("█") == pytest.approx(length / 2, abs=1)
    assert line(text, "step question_given").count("█") == 1, "what happened is seen, however short"


@pytest.mark.parametrize("width", [80, 100, 132, 400])
def test_it_fits_the_terminal(width: int) -> None:
    deep = node("chat " + "a-long-model-name-" * 5, 0, 1, asmodel__upstream__queue__wait_s=0.9, **CALL)
    for level in range(12):
        deep = node(
            f"invoke_workflow level-{level}-{'x' * 30}", 0, 1, deep, failed=True, error__type="upstream_timeout"
        )
    text = drawn(trace(deep), width=width)
    assert max(cell_len(row) for row in text.splitlines()) <= width
    assert "queued 0.90 s for the upstream" in words(text)
    assert max(cell_len(row) for row in listed(RUN, replace(RUN, program="p" * 90), width=width).splitlines()) <= width


def test_piped_it_is_plain_text() -> None:
    assert "\x1b" not in drawn(STORY)
    assert "\x1b" not in listed(RUN)
    assert drawn(STORY, ascii_only=True).isascii()
    assert "`- program evidence-qa" in drawn(STORY, ascii_only=True)


def test_a_name_cannot_command_the_terminal() -> None:
    text = drawn(trace(node("chat \x1b[2Jevil\x07", 0, 1)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "evil" in text
    assert "\x1b" not in listed(replace(RUN, program="\x1b[2J"))


def extra(failing: bool) -> dict[str, Any]:
    return {"error__type": "step_unreadable"} if failing else {}


def many(count: int, *, hits: int, failing: int = 0) -> Node:
    steps = [
        node(
            "step question_given",
            index / 10,
            index / 10 + 0.1,
            *([node("chat m", index / 10, index / 10 + 0.1, **CALL)] if index >= hits else []),
            failed=index < failing,
            asmodel__cache__result="hit" if index < hits else "miss",
            **extra(index < failing),
        )
        for index in range(count)
    ]
    return node("invoke_workflow p", 0, 2, *steps)


def test_many_equal_siblings_are_one_line_with_what_they_come_to() -> None:
    text = drawn(trace(many(20, hits=7)), width=110)
    row = line(text, "step question_given")
    assert "x20" in row
    assert f"7 cached, {13 * 62} + {13 * 21} tokens" in row
    assert "--all" in text
    assert "chat m" not in text
    everything = drawn(trace(many(20, hits=7)), everything=True)
    assert everything.count("step question_given") == 20
    assert everything.count("chat m") == 13
    assert "--all" not in everything


def test_few_equal_siblings_are_shown_one_by_one() -> None:
    assert drawn(trace(many(4, hits=0))).count("step question_given") == 4


def test_a_sibling_that_failed_is_never_folded_away() -> None:
    text = drawn(trace(many(20, hits=7, failing=1)), width=110)
    assert text.count("step question_given") == 2
    assert "x19" in text
    assert "failed: step_unreadable" in text


def test_an_error_is_said_where_it_happened() -> None:
    inner = node("chat m", 0, 1, failed=True, error__type="upstream_timeout")
    text = drawn(
        trace(
            node("invoke_workflow p", 0, 1, inner, failed=True, error__type="upstream_timeout"),
            run=replace(RUN, outcome="error", error="upstream_timeout"),
        ),
        width=100,
    )
    assert "error (upstream_timeout)" in text.splitlines()[0]
    assert line(text, "program p").rstrip().endswith("failed")
    assert "failed: upstream_timeout" in line(text, "chat m")


def test_retries_are_told_one_by_one() -> None:
    call = node(
        "chat m",
        0,
        2,
        node("attempt 1", 0, 0.5, failed=True, error__type="upstream_rate_limited"),
        node("attempt 2", 1.5, 2, asmodel__upstream__backoff_s=1.0),
        asmodel__upstream__attempts=2,
        asmodel__upstream__backoff_s=1.0,
    )
    text = drawn(trace(node("invoke_workflow p", 0, 2, call)), width=120)
    assert "2 attempts" in line(text, "chat m")
    assert "failed: upstream_rate_limited" in line(text, "attempt 1")
    assert "after waiting 1.00 s" in line(text, "attempt 2")


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"asmodel__cache__result": "joined"}, "shared with a run that was asking the same"),
        ({"asmodel__cache__result": "bypass"}, "cache not asked"),
        ({"asmodel__step__asks": 2}, "asked 2 times until its reply could be read"),
        ({"asmodel__cancelled": True}, "cancelled"),
        ({"asmodel__run__part": "level 2", "asmodel__run__part__of": 4}, "0 of 4"),
        ({"asmodel__cache__flight__wait_s": 1.0}, "waited 1.00 s for another run's answer"),
        ({"asmodel__own__thing__wait_s": 1.0}, "waited 1.00 s for asmodel.own.thing"),
        ({"gen_ai__response__time_to_first_chunk": 0.31}, "first text at 0.31 s"),
        ({"gen_ai__usage__input_tokens": 9, "asmodel__upstream__usage_estimated": True}, "about 9 tokens"),
    ],
)
def test_what_is_worth_saying_of_a_span_is_said_in_words(attributes: dict[str, Any], said: str) -> None:
    assert said in words(drawn(trace(node("step s", 0, 1, **attributes))))


def test_a_lost_run_says_so_and_what_was_under_way() -> None:
    lost = replace(RUN, outcome="lost", seconds=None)
    text = drawn(trace(node("invoke_workflow p", 0, None, node("step s", 0, 1), node("step t", 1, None)), run=lost))
    assert "The process that ran it is gone; this is what it had done." in text
    assert "never ended: its process is gone" in words(text)


def test_a_running_run_says_so() -> None:
    text = drawn(trace(node("invoke_workflow p", 0, None), run=replace(RUN, outcome="running")))
    assert "running" in line(text, "program p")


def test_an_unknown_price_is_said_and_is_not_0() -> None:
    assert "price unknown" in drawn(trace(node("invoke_workflow p"), run=replace(RUN, cost=None)))
    assert listed(replace(RUN, cost=None)).splitlines()[1].endswith("?")


@pytest.mark.parametrize("outcome", ["ok", "error", "cancelled", "running", "lost"])
def test_runs_are_listed_a_line_each(outcome: Outcome) -> None:
    head, first, second = listed(replace(RUN, outcome=outcome), replace(PAYER, seconds=None), width=90).splitlines()
    assert head.split()[:3] == ["id", "when", "program"]
    assert first.startswith("7f3a9b21 ")
    for part in ("evidence-qa", outcome, "2.00 s", "352", "$0.0041"):
        assert part in first
    assert "self-consistency" in second


def test_listed_ids_are_long_enough_to_tell_runs_apart() -> None:
    text = listed(replace(RUN, run_id="aaaaaaaaaa1", span_id="1"), replace(RUN, run_id="aaaaaaaaaa2", span_id="2"))
    assert [row.split()[0] for row in text.splitlines()[1:]] == ["aaaaaaaaaa1", "aaaaaaaaaa2"]


def test_no_runs_is_a_sentence() -> None:
    assert listed().startswith("No runs are kept yet.")


def test_json_is_flat_and_in_the_order_of_the_tree() -> None:
    found = json.loads(json.dumps(trace_json(STORY)))
    assert [(span["name"], span["depth"]) for span in found["spans"]] == [
        ("POST /v1/chat/completions", 0),
        ("invoke_workflow evidence-qa", 1),
        ("step question_given", 2),
        ("step next_thought", 2),
        ("chat gpt-4o-mini", 3),
    ]
    assert found["spans"][2]["links"] == [{"trace_id": "t", "span_id": "paid", "attributes": {}}]
    assert found["runs"] == json.loads(json.dumps(runs_json([RUN])))


def test_programs_may_nest_deeper_than_pythons_stack() -> None:
    deep = node("step s", 0, 1)
    for _ in range(1_200):
        deep = node("invoke_workflow p", 0, 1, deep)
    assert len(trace_json(trace(deep))["spans"]) == 1_201
    text = drawn(trace(deep))
    assert "step s" in text
    assert max(cell_len(row) for row in text.splitlines()) <= 80
