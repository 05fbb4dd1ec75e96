"""The page of a report: complete in itself, nothing in it can act, and all of the report is on it."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel.evaluation import charts, table
from asmodel.evaluation.estimates import seconds_covered
from asmodel.evaluation.page import differs, joined, page
from asmodel.evaluation.report import (
    Answered,
    Asked,
    Comparison,
    Drawn,
    Latency,
    Now,
    Report,
    Score,
    StepTaken,
    SystemFigures,
    Takes,
)

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\x1b[2J\u202e</pre></style></details>"
VOID = {"meta", "input", "line", "circle", "rect", "path"}


def answered(system: str, value: float | None, **changes: Any) -> Answered:
    step = StepTaken(
        program="p",
        step="thought",
        kind="chat",
        upstream="u",
        source="hit",
        at=0.0,
        seconds=1.0,
        prompt_tokens=3,
        completion_tokens=1,
        said=EVIL,
    )
    values: dict[str, Any] = {
        "system": system,
        "draw": 0,
        "ending": "answered",
        "text": f"answer of {system} {EVIL}",
        "data": {"ranking": [EVIL]},
        "citations": [EVIL],
        "finish": "stop",
        "error": None,
        "scores": {"exact": value},
        "troubles": {} if value is not None else {"exact": EVIL},
        "run_id": "run_1",
        "calls": 1,
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "cost": None,
        "seconds": 1.0,
        "bought": 0,
        "seconds_now": 0.01,
        "steps": [step, step.model_copy(update={"at": 1000.0, "source": "bought"})],
    }
    return Answered(**(values | changes))


def figures(name: str, value: float | None) -> SystemFigures:
    return SystemFigures(
        name=name,
        model=name,
        params={},
        roles={},
        prompt=None,
        digest=None,
        not_given=[EVIL],
        questions=3,
        answered=2,
        errors=1,
        not_cached=0,
        scores={
            "exact": Score(
                kind="proportion",
                n=3,
                value=value,
                low=value,
                high=value,
                draws=[],
                spread=None,
                answers=3,
                untold=1,
                unread={EVIL: 1},
            )
        },
        takes=Takes(questions=3, steps=3, calls=3, prompt_tokens=9, completion_tokens=3, estimated=True, cost=None),
        latency=None if value is None else Latency(n=2, mean=1, p50=1, p90=1, p99=1),
        now=Now(steps=0, calls=0, hits=3, joined=0, prompt_tokens=0, completion_tokens=0, cost=0.0, seconds=0.1),
    )


def report(**changes: Any) -> Report:
    systems = ["plain", EVIL]
    compared = Comparison(
        scorer="exact",
        system=EVIL,
        against="plain",
        n=2,
        won=1,
        lost=0,
        alike=1,
        both=0,
        neither=1,
        difference=0.5,
        low=0.0,
        high=1.0,
        p=1.0,
        p_holm=1.0,
        remark="2 questions are few",
    )
    questions = [
        ("alike", [answered(systems[0], 1.0), answered(systems[1], 1.0)]),
        ("apart", [answered(systems[0], 1.0), answered(systems[1], 0.0)]),
        ("failed", [answered(systems[0], None), answered(systems[1], 0.0, ending="error", text=None, error=EVIL)]),
    ]
    values: dict[str, Any] = {
        "asmodel": "0.1.0",
        "made_at": 1_790_000_000.0,
        "data": Drawn(file=EVIL, sha256="0" * 64, lines=3, excluded=0, of=3, seed=7, skipped=0, asked=3),
        "seed": 0,
        "repeats": 1,
        "at_once": 4,
        "seconds": 0.5,
        "interrupted": False,
        "systems": [figures(systems[0], 0.5), figures(systems[1], None)],
        "comparisons": [compared],
        "judges": [],
        "examples": [
            Asked(id=id, line=1, question=f"{id}? {EVIL}", references={"exact": [EVIL]}, answers=answers)
            for id, answers in questions
        ],
    }
    return Report(**(values | changes))


class Elements(HTMLParser):
    """What there is in a page, and whether it is nested well."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_on_the_page_can_act_or_load_but_what_its_policy_names() -> None:
    text = page(report())
    elements = Elements(text)
    assert elements.open == []
    assert sum(tag == "script" for tag, _ in elements.found) == 1
    assert not {tag for tag, _ in elements.found} & {"img", "link", "iframe", "a", "object", "form"}
    for _, attributes in elements.found:
        assert not any(name.startswith("on") or name in ("src", "href", "style") for name in attributes)
    (policy,) = (a["content"] or "" for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "\x1b" not in text
    assert "\u202e" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL), "names turn no line round"


def test_every_question_is_there_and_says_whether_systems_differ() -> None:
    elements = Elements(page(report()))
    cards = [a for tag, a in elements.found if tag == "details" and a.get("class") == "card"]
    assert [(a["data-differ"], a["data-failed"]) for a in cards] == [("0", "0"), ("1", "0"), ("0", "1")]
    for shown in ("answer of plain", "Where systems differ (1)", "Without an answer (1)", "asmodel trace run_1"):
        assert shown in elements.text
    assert [differs(example) for example in report().examples] == [False, True, False]


def test_an_interrupted_report_says_so() -> None:
    assert "interrupted" not in page(report()).split("</header>")[0]
    assert "interrupted" in page(report(interrupted=True)).split("</header>")[0]


def test_a_report_is_the_same_out_of_its_json() -> None:
    assert Report.model_validate_json(report().model_dump_json()) == report()
    assert report().format == Report.model_json_schema()["properties"]["format"]["const"]


def test_the_table_is_text_whatever_the_names_are() -> None:
    lines = list(table.lines(report()))
    assert not any(c in line for line in lines for c in "\x1b\u202e\r\n")
    assert lines[0].endswith("drawn by seed 7")


SPANS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 1000)).map(lambda s: (float(s[0]), float(s[0] + s[1]))), max_size=12
)


@given(SPANS)
def test_steps_of_other_days_are_moved_together_and_keep_their_length(spans: list[tuple[float, float]]) -> None:
    moved = joined(spans)
    for (begin, end), (other_begin, other_end) in zip(spans, moved, strict=True):
        assert end - begin == other_end - other_begin
    assert max((end for _, end in moved), default=0.0) == seconds_covered(spans)
    assert min((begin for begin, _ in moved), default=0.0) == 0


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 10), st.floats(0, 1e4)), min_size=1, max_size=6))
def test_a_chart_is_well_formed_whatever_the_figures(rows: list[tuple[float, float, float]]) -> None:
    bars = [charts.Bar(EVIL, value, value - width, value + width, "v") for value, width, _ in rows]
    drawn = [
        charts.scores(bars, title="t", proportion=False),
        charts.latencies([(EVIL, sorted(abs(x) for x in row)) for row in rows], title="t"),
        charts.costs(
            [(bar, calls) for bar, (_, _, calls) in zip(bars, rows, strict=True)], title="t", proportion=False
        ),
    ]
    for svg in drawn:
        assert Elements(svg).open == []
        numbers = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width)="([^"]+)"', svg)
        assert all(abs(float(n)) < 1e5 for n in numbers)


@pytest.mark.parametrize("kind", ["f-model", "f-hit"])
def test_a_timeline_shows_even_the_shortest_step(kind: str) -> None:
    drawn = charts.timeline([(0.0, 0.0, kind), (0.0, 5.0, kind)], 5.0)
    assert drawn.count(f'class="{kind}"') == 1
    assert "h3v10" in drawn
    assert "h1000v10" in drawn
