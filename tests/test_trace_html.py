"""The page of a run: that it is complete in itself, that nothing in a trace can act in it, and what it tells."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import orjson
import pytest

from asmodel.trace_html import page
from asmodel.trace_reader import Event, LinkTo, Node, RunRow, Trace

SECOND = 1_000_000_000
BEGAN = 1_790_000_000 * SECOND
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\x1b[2J\u202e</pre></style></script>"


def run(**changes: Any) -> RunRow:
    values: dict[str, Any] = {
        "trace_id": "5c1d" * 8,
        "span_id": "run",
        "root": "request",
        "run_id": "run_7f3a",
        "program": "evidence-qa",
        "model": None,
        "started": BEGAN / SECOND,
        "seconds": 2.0,
        "outcome": "ok",
        "error": None,
        "steps": 3,
        "hits": 1,
        "joined": 0,
        "calls": 2,
        "input_tokens": 310,
        "output_tokens": 42,
        "cost": 0.0041,
    }
    return RunRow(**(values | changes))


def node(
    name: str, begin: float, end: float | None, *children: Node, events: tuple[Event, ...] = (), **attributes: Any
) -> Node:
    """Times in seconds from the start; attribute names with `__` for a dot."""
    return Node(
        span_id=f"{name}@{begin}",
        parent_id=None,
        name=name,
        kind="internal",
        start_ns=BEGAN + int(begin * SECOND),
        end_ns=None if end is None else BEGAN + int(end * SECOND),
        failed="error__type" in attributes,
        attributes={key.replace("__", "."): value for key, value in attributes.items()},
        events=events,
        links=(LinkTo(trace_id="t" * 32, span_id="paid", attributes={}),) if name == "step linked" else (),
        children=children,
    )


def said(role: str, text: str, **more: object) -> str:
    return orjson.dumps([{"role": role, "parts": [{"type": "text", "content": text}], **more}]).decode()


def step(text: str, answer: str, begin: float = 0.5) -> Node:
    call = node(
        "chat gpt",
        begin,
        begin + 1,
        gen_ai__operation__name="chat",
        gen_ai__usage__input_tokens=62,
        gen_ai__usage__output_tokens=21,
        asmodel__upstream__cost=0.0041,
        gen_ai__input__messages=said("user", text),
        gen_ai__output__messages=said("assistant", answer, finish_reason="stop"),
    )
    return node("step verdict", begin, begin + 1, call, asmodel__step__name="verdict", asmodel__cache__result="miss")


def trace(*children: Node, of: RunRow | None = None, payers: dict[str, RunRow] | None = None) -> Trace:
    program = node("invoke_workflow evidence-qa", 0, 2, *children, asmodel__run__program="evidence-qa")
    row = of or run()
    return Trace(trace_id=row.trace_id, runs=(row,), roots=(program,), payers=payers or {})


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.blocks: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not [name for name in self._open if name not in ("meta", "rect")], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "rect"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements are closed in their order"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            self.blocks[self._open[-1]] = self.blocks.get(self._open[-1], "") + data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


def test_a_page_tells_what_was_asked_what_it_cost_and_who_paid() -> None:
    hit = node(
        "step linked", 0, 0.01, asmodel__step__name="linked", asmodel__cache__result="hit", asmodel__cache__age_s=90.0
    )
    found = Page(
        page(trace(hit, step("Which bell?", "The big one."), payers={"paid": run(span_id="o", run_id="e1e2")}))
    )
    for words in (
        "evidence-qa",
        "Which bell?",
        "The big one.",
        "62 + 21 tokens",
        "$0.0041",
        "cached 1 minute ago, paid by evidence-qa e1e2",
        "310",
        "models 1.00 s (50%)",
        "the program 0.99 s (50%)",
    ):
        assert words in found.text


def test_a_page_loads_nothing_and_lets_nothing_run_but_its_own_script() -> None:
    found = Page(page(trace(step("x", "y"))))
    (policy,) = [m["content"] or "" for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for block in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.blocks[block].encode()).digest()).decode()
        assert f"{block}-src 'sha256-{digest}'" in policy
    for tag, attributes in found.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "use", "image")
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "style", "srcdoc", "action")
        ]
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?://|url\(|@import", found.blocks["style"] + found.blocks["script"])


def test_names_and_content_are_text_whatever_is_in_them() -> None:
    call = node(
        f"chat {EVIL}",
        0,
        1,
        gen_ai__operation__name="chat",
        gen_ai__request__model=EVIL,
        gen_ai__input__messages=said(EVIL, EVIL),
        gen_ai__output__messages=EVIL,
        gen_ai__system_instructions=orjson.dumps([{"type": EVIL, EVIL: EVIL}]).decode(),
        gen_ai__tool__definitions=orjson.dumps({EVIL: [EVIL]}).decode(),
        asmodel__own=EVIL,
        error__type=EVIL,
    )
    tool = node(
        f"execute_tool {EVIL}",
        1,
        2,
        events=(Event(name=EVIL, time_ns=BEGAN, attributes={EVIL: EVIL}),),
        gen_ai__operation__name="execute_tool",
        gen_ai__tool__call__arguments=orjson.dumps(EVIL).decode(),
        gen_ai__tool__call__result=orjson.dumps([EVIL]).decode(),
    )
    inside = node(f"step {EVIL}", 0, 1, call, asmodel__step__name=EVIL, asmodel__cache__result=EVIL)
    evil = run(program=EVIL, run_id=EVIL, outcome="error", error=EVIL)
    benign = Page(page(trace(step("x", "y"))))
    html = page(trace(inside, tool, of=evil, payers={"paid": evil}))
    found = Page(html)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in benign.elements} | {"table", "tr", "td"}
    assert found.blocks == benign.blocks, "style and script are what they always are"
    assert "\x1b" not in html
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "\u202e" not in str(attributes), "nothing turns a title round"
    assert "<script>alert(1)</script>" in found.text, "and it is seen as what it is"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"outcome": "lost", "seconds": None}, "The process that ran it is gone"),
        ({"outcome": "running"}, "running"),
        ({"outcome": "cancelled"}, "cancelled"),
        ({"cost": None}, "unknown"),
        ({"joined": 4}, "shared with other runs"),
    ],
)
def test_how_a_run_ended_is_said(changes: dict[str, Any], says: str) -> None:
    assert says in Page(page(trace(step("x", "y"), of=run(**changes)))).text


def test_a_span_that_has_not_ended_is_drawn_up_to_now() -> None:
    unended = node("invoke_workflow p", 0, None, step("x", "y"), asmodel__run__program="p")
    running = Trace(trace_id="t", runs=(run(outcome="running"),), roots=(unended,))
    assert "4.00 s" in Page(page(running, now_ns=BEGAN + 4 * SECOND)).text


def test_without_content_the_page_says_how_to_have_it() -> None:
    bare = node("step s", 0, 1, asmodel__step__name="s", asmodel__cache__result="miss")
    assert "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=SPAN_ONLY" in Page(page(trace(bare))).text
    assert "CAPTURE_MESSAGE_CONTENT" not in Page(page(trace(step("x", "y")))).text


def test_a_score_shows_context_and_continuation() -> None:
    messages = [
        {"role": "user", "parts": [{"type": "text", "content": "The bell"}]},
        {"role": "assistant", "parts": [{"type": "text", "content": " rang"}]},
    ]
    measured = [{"role": "assistant", "parts": [{"type": "loglikelihood", "nats": -3.0, "tokens": 2}]}]
    score = node(
        "step given",
        0,
        1,
        asmodel__step__name="given",
        asmodel__step__kind="score",
        gen_ai__input__messages=orjson.dumps(messages).decode(),
        gen_ai__output__messages=orjson.dumps(measured).decode(),
    )
    text = Page(page(trace(score))).text
    assert "context The bell continuation rang" in text
    assert "log-likelihood -3.000 nats over 2 tokens, -1.500 a token" in text


def test_many_equal_steps_are_folded_and_each_has_its_card() -> None:
    found = Page(page(trace(*(step(f"question {n}", f"answer {n}", n / 50) for n in range(40)))))
    assert "step verdict x40" in found.text
    cards = [d for d in found.all("details") if d.get("class") == "card"]
    assert len(cards) == 40
    links = {a["href"] for a in found.all("a")}
    assert {f"#{card['id']}" for card in cards} <= links


def test_programs_may_nest_deeper_than_pythons_stack_and_a_browser() -> None:
    deep = step("x", "y")
    for number in range(1_200):
        deep = node(f"invoke_workflow p{number}", 0, 2, deep, asmodel__run__program="p", asmodel__run__nested=True)
    html = page(trace(deep))
    depth = most = 0
    for tag in re.findall(r"<(/?)details", html):
        depth += -1 if tag else 1
        most = max(most, depth)
    assert most < 40
    assert "step verdict" in Page(html).text


def test_an_empty_trace_is_a_page_too() -> None:
    assert "Timeline" in Page(page(Trace(trace_id="t", runs=(), roots=()))).text
