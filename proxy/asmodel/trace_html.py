"""A kept trace as one HTML page that needs nothing else: no network, no other file, and no script to be read.

Its policy (CSP) allows the page's own style and script, by their digests, and nothing that is not in it. Whatever comes
out of the trace is text, escaped: names and content were written by strangers and by models. The front page shows the
same drawing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, cast

import orjson

from asmodel import trace_time
from asmodel import trace_words as words
from asmodel import tracing as names
from asmodel.trace_content import VARIABLE
from asmodel.trace_reader import Node, RunRow, Trace
from asmodel.trace_time import walk

MAX_CARDS = 2_000
"""Steps that are shown in full; a browser slows down with more."""
_OPEN = 12
"""Cards that are open at first, if there are no more."""
_DEEP = 24
"""How far the timeline is indented at most, and how deep it is nested: browsers flatten what is nested very deeply."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1d2129;--dim:#5c6474;--line:#e4e2dc;--soft:#f2f0eb;
--model:#3b6fd4;--tool:#7a5bc7;--hit:#23936b;--run:#9aa3b2;--wait:#d8a13a;--bad:#c23535;--warn:#8f5c00;--good:#18794e;
--user:#eef3fd;--said:#edf8f2;--system:#f6f2ea;--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1b1e24;--ink:#e4e6eb;--dim:#949cab;--line:#2d323b;
--soft:#22262d;--model:#6b9bf5;--tool:#a88bf0;--hit:#3dbb8b;--run:#5d6675;--wait:#d8a94f;--bad:#f07171;--warn:#e0b060;
--good:#4cc38a;--user:#1d2737;--said:#1a2a24;--system:#292620}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere;unicode-bidi:isolate}
h2{font-size:1.05rem;margin:36px 0 12px}
.dim{color:var(--dim)}.bad{color:var(--bad)}.warn{color:var(--warn)}.good{color:var(--good)}
.top{display:flex;gap:12px;align-items:center;flex-wrap:wrap}
.badge{font-size:.8rem;font-weight:600;padding:2px 10px;border-radius:99px;border:1px solid currentColor}
.sub{margin:6px 0 0;color:var(--dim);font-size:.88rem;overflow-wrap:anywhere}
code,.mono{font-family:var(--mono);font-size:.86em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:20px 0 0;padding:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.tile b{display:block;font-size:1.22rem;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:var(--dim);font-size:.8rem}
svg{display:block;width:100%}
.spent{height:12px;border-radius:6px;margin:22px 0 8px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.84rem;color:var(--dim);margin:0;padding:0;list-style:none}
.legend svg{display:inline-block;width:10px;height:10px;margin-right:6px;border-radius:2px}
.f-model{fill:var(--model)}.f-tool{fill:var(--tool)}.f-hit{fill:var(--hit)}.f-run{fill:var(--run)}
.f-wait{fill:var(--wait)}.f-bad{fill:var(--bad)}.f-soft{fill:var(--line)}
.panel{background:var(--card);border:1px solid var(--line);border-radius:12px;overflow:hidden}
.row{display:grid;grid-template-columns:minmax(190px,27%) minmax(140px,1fr) 72px minmax(160px,26%);gap:14px;
align-items:center;padding:4px 14px;border-top:1px solid var(--line);font-size:.88rem;min-height:32px}
.panel>details:first-of-type>summary.row{border-top:0}
summary{cursor:pointer;list-style:none}summary::-webkit-details-marker{display:none}
summary.row:hover,a.row:hover{background:var(--soft)}
summary:focus-visible,a:focus-visible,button:focus-visible{outline:2px solid var(--model);outline-offset:-2px}
.axis{color:var(--dim);font-size:.76rem;min-height:26px;border-top:0;background:var(--soft)}
.ticks{display:flex;justify-content:space-between;font-variant-numeric:tabular-nums}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;unicode-bidi:isolate}
.name a{color:inherit;text-decoration:none}.name a:hover{text-decoration:underline}
.name.program{font-weight:600}
summary .name::before{content:"\\25B8";display:inline-block;width:1.1em;color:var(--dim)}
details[open]>summary .name::before{content:"\\25BE"}
div.row .name::before{content:"";display:inline-block;width:1.1em}
.bar{height:14px}
.took{text-align:right;font-variant-numeric:tabular-nums;color:var(--dim)}
.notes{font-size:.82rem;color:var(--dim);overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:0 0 10px;overflow:hidden}
.card:target{border-color:var(--model);box-shadow:0 0 0 1px var(--model)}
.card>summary{display:flex;gap:4px 12px;align-items:baseline;padding:10px 16px;flex-wrap:wrap}
.card>summary:hover{background:var(--soft)}
.card>summary b{unicode-bidi:isolate;overflow-wrap:anywhere}
.card>summary::before{content:"\\25B8";color:var(--dim)}.card[open]>summary::before{content:"\\25BE"}
.card .num{color:var(--dim);font-variant-numeric:tabular-nums;min-width:1.6em;text-align:right}
.card .peek{flex:1 1 100%;color:var(--dim);font-size:.85rem;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;
padding-left:3.4em;unicode-bidi:isolate}
.card[open]>summary .peek{display:none}
.body{padding:4px 16px 14px}
.msg{border-radius:8px;margin:8px 0;padding:8px 12px;background:var(--user)}
.msg.said{background:var(--said)}.msg.system{background:var(--system)}
.msg .who{font-size:.74rem;font-weight:600;color:var(--dim);margin:0 0 2px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-family:var(--mono);font-size:.82rem;line-height:1.5;
max-height:26rem;overflow:auto;unicode-bidi:plaintext;tab-size:4}
pre.think{color:var(--dim);font-style:italic}
.more{margin-top:8px;font-size:.82rem}.more>summary{color:var(--dim)}
.more>summary::before{content:"\\25B8";display:inline-block;width:1.1em}.more[open]>summary::before{content:"\\25BE"}
table{border-collapse:collapse;width:100%;margin:6px 0 0}
td{padding:3px 10px 3px 0;border-top:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere;
font-family:var(--mono);font-size:.78rem}
td:first-child{color:var(--dim);width:34%}
.note{background:var(--soft);border-radius:10px;padding:12px 16px;font-size:.9rem}
.tools{display:none;gap:8px;margin-left:auto}.js .tools{display:flex}
.bar2{display:flex;align-items:baseline;gap:12px}.bar2 h2{margin-right:auto}
button{font:inherit;font-size:.8rem;color:var(--ink);background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:3px 10px;cursor:pointer}button:hover{background:var(--soft)}
footer{margin-top:40px;color:var(--dim);font-size:.8rem;overflow-wrap:anywhere}
INDENT
@media(max-width:820px){main{padding:18px 12px 48px}.row{grid-template-columns:minmax(0,1fr) 66px;gap:2px 10px}
.row .bar{grid-column:1/3;grid-row:2}.row .notes{grid-column:1/3;grid-row:3}.axis .name,.axis .notes{display:none}
.axis .ticks{grid-column:1/3}}
@media print{body{background:#fff}.tools{display:none!important}pre{max-height:none}}
""".replace("INDENT", "".join(f".d{n}{{padding-left:{n * 14}px}}" for n in range(_DEEP + 1)))

# Only for comfort: without it the page shows all that it shows with it.
_SCRIPT = """
document.documentElement.classList.add("js");
function reveal(){var e=location.hash&&document.getElementById(location.hash.slice(1));
if(e&&e.tagName==="DETAILS"){e.open=true;e.scrollIntoView({block:"start"});}}
addEventListener("hashchange",reveal);reveal();
document.querySelectorAll("button[data-of]").forEach(function(b){b.addEventListener("click",function(){
document.querySelectorAll(b.dataset.of).forEach(function(d){d.open=b.dataset.open==="1";});});});
document.querySelectorAll(".name a").forEach(function(a){a.addEventListener("click",function(e){
e.stopPropagation();});});
"""

_FILLS: Mapping[str, str] = {
    trace_time.MODEL: "model",
    trace_time.TOOL: "tool",
    trace_time.DETECT: "model",
    trace_time.LOAD: "wait",
    trace_time.PAUSE: "wait",
    trace_time.QUEUE: "wait",
    trace_time.FLIGHT: "wait",
    trace_time.CACHE: "hit",
    trace_time.WAIT: "wait",
}
_OUTCOMES = {"ok": "good", "error": "bad", "cancelled": "warn", "running": "", "lost": "warn"}
_STYLES = {"bold red": "bad", "yellow": "warn", "bold yellow": "warn", "green": "good"}


def page(trace: Trace, *, now_ns: int | None = None) -> str:
    """The trace as a page. What has not ended is drawn up to `now_ns`; by default up to what is known last."""
    policy = (
        f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(_SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            '<meta name="referrer" content="no-referrer"><meta name="robots" content="noindex">',
            f"<title>{escape(title(trace))} - asmodel trace</title><style>{STYLE}</style></head><body><main>",
            *_Page(trace, now_ns).parts(),
            f"<footer>{_named(trace)} This page is complete in itself and loads nothing.</footer>"
            f"</main><script>{_SCRIPT}</script></body></html>\n",
        )
    )


def drawing(trace: Trace, *, now_ns: int | None = None) -> str:
    """What `page` shows, to be a part of another page, which has STYLE."""
    return "".join((*_Page(trace, now_ns).parts(), f"<footer>{_named(trace)}</footer>"))


def title(trace: Trace) -> str:
    return " + ".join(words.clean(run.name) for run in trace.runs[:3]) or "trace"


def _named(trace: Trace) -> str:
    return (
        f"Trace <code>{_text(trace.trace_id)}</code>. Names follow the OpenTelemetry semantic conventions for "
        f"generative AI, {_text(names.SCHEMA_URL.rpartition('/')[2])}."
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(value: object) -> str:
    """A name, or a number: one line, nothing in it that turns the line round."""
    return escape(words.clean(str(value)))


_SAFE = {c: "\ufffd" for c in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def _block(value: str) -> str:
    """Text as it is, with its lines."""
    return escape(value.encode("utf-8", "replace").decode().translate(_SAFE))


class _Page:
    def __init__(self, trace: Trace, now_ns: int | None) -> None:
        self._trace = trace
        self._begin = min((root.start_ns for root in trace.roots), default=0)
        self._end = max(self._begin + 1, trace_time.last(trace) if now_ns is None else now_ns)
        self._gone = any(run.outcome == "lost" for run in trace.runs)
        self._cards = [node for node in walk(trace.roots) if _is_card(node, trace)]
        self._numbers = {node.span_id: number for number, node in enumerate(self._cards[:MAX_CARDS], start=1)}
        # A call is told within its step.
        self._homes = {child.span_id: node.span_id for node in self._cards for child in node.children}

    def parts(self) -> Iterator[str]:
        for run in self._trace.runs:
            yield self._heading(run)
        yield from self._spent()
        yield from self._answers()
        yield from self._timeline()
        yield from self._steps()

    # -- above ------------------------------------------------------------------------------------------------------

    def _heading(self, run: RunRow) -> str:
        error = f" ({_text(run.error)})" if run.error else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started))
        ids = f"run <code>{_text(run.run_id)}</code>, " if run.run_id else ""
        tiles = [("-" if run.seconds is None else words.seconds(run.seconds), "wall time")]
        if run.program:
            tiles += [(f"{run.steps}", "steps"), (f"{run.hits}", "from the cache")]
        if run.joined:
            tiles.append((f"{run.joined}", "shared with other runs"))
        tiles += [
            (f"{run.calls}", "model calls"),
            (f"{run.input_tokens:,}", "tokens in"),
            (f"{run.output_tokens:,}", "tokens out"),
            ("unknown" if run.cost is None else words.cost(run.cost), "cost"),
        ]
        lost = '<p class="sub warn">The process that ran it is gone; this is what it had done.</p>'
        return "".join(
            (
                f'<header><div class="top"><h1>{_text(run.name)}</h1>',
                f'<span class="badge {_OUTCOMES[run.outcome]}">{_text(run.outcome)}{error}</span></div>',
                f'<p class="sub">{ids}{_text(when)}</p>',
                lost if run.outcome == "lost" else "",
                '<div class="tiles">',
                *(f'<div class="tile"><b>{_text(value)}</b><span>{what}</span></div>' for value, what in tiles),
                "</div></header>",
            )
        )

    def _spent(self) -> Iterator[str]:
        shares = trace_time.spent(self._trace, now_ns=self._end)
        whole = sum(share.seconds for share in shares)
        if not whole:
            return
        yield '<svg class="spent" role="img" aria-label="Where the time went">'
        at = 0.0
        for share in shares:
            part = 100 * share.seconds / whole
            yield f'<rect class="f-{_FILLS.get(share.what, "run")}" x="{at:.3f}%" width="{part:.3f}%" height="12"/>'
            at += part
        yield '</svg><ul class="legend">'
        for share in shares:
            if share.seconds < whole / 200:
                continue
            square = f'<svg><rect class="f-{_FILLS.get(share.what, "run")}" width="10" height="10"/></svg>'
            took = f"{words.seconds(share.seconds)} ({share.seconds / whole:.0%})"
            yield f"<li>{square}{_text(share.what)} {_text(took)}</li>"
        yield "</ul>"

    def _answers(self) -> Iterator[str]:
        """What was asked and answered in the end, where that was recorded."""
        runs = {run.span_id for run in self._trace.runs}
        for node in walk(self._trace.roots):
            if node.span_id in runs and names.RUN_PROGRAM in node.attributes and words.content(node):
                yield "<h2>Asked and answered</h2>"
                yield from _content(words.content(node), score=False)

    # -- the timeline -----------------------------------------------------------------------------------------------

    def _timeline(self) -> Iterator[str]:
        yield '<div class="bar2"><h2>Timeline</h2><div class="tools">'
        yield '<button type="button" data-of=".span" data-open="1">Unfold all</button>'
        yield '<button type="button" data-of=".span" data-open="0">Fold all</button></div></div>'
        whole = (self._end - self._begin) / 1e9
        ticks = "".join(f"<span>{_text(words.seconds(whole * n / 4) if n else '0')}</span>" for n in range(5))
        yield '<div class="panel"><div class="row axis"><span class="name"></span>'
        yield f'<span class="ticks">{ticks}</span><span></span><span class="notes"></span></div>'
        # A stack and not recursion: programs nest as deep as they like. A text is what closes an element.
        stack: list[tuple[tuple[Node, ...], int] | str] = [((root,), 0) for root in reversed(self._trace.roots)]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                yield item
                continue
            group, depth = item
            below = words.folded(group[0].children) if len(group) == 1 else [(node,) for node in group]
            row = self._row(group, min(depth, _DEEP))
            if not below:
                yield f'<div class="row">{row}</div>'
                continue
            nested = depth < _DEEP
            is_open = " open" if len(group) == 1 else ""
            yield f'<details class="span"{is_open}><summary class="row">{row}</summary>'
            if nested:
                stack.append("</details>")
            else:
                yield "</details>"
            stack.extend((child, depth + 1) for child in reversed(below))
        yield "</div>"

    def _row(self, group: tuple[Node, ...], depth: int) -> str:
        node = group[0]
        if len(group) > 1:
            name, notes = f"{words.label(node)} x{len(group)}", words.notes_of_many(group)
        else:
            name, notes = words.label(node), words.notes(node, self._trace, gone=self._gone)
        number = self._number(node) if len(group) == 1 else None
        shown = (
            f'<a href="#s{number}" title="what it was shown and said">{escape(name)}</a>' if number else escape(name)
        )
        program = " program" if names.RUN_PROGRAM in node.attributes else ""
        ended = [n.end_ns for n in group if n.end_ns is not None]
        took = words.seconds((max(ended) - node.start_ns) / 1e9) if len(ended) == len(group) else ""
        return "".join(
            (
                f'<span class="name d{depth}{program}" title="{escape(name)}">{shown}</span>',
                f'<svg class="bar" aria-hidden="true">{"".join(self._bars(group))}</svg>',
                f'<span class="took">{escape(took)}</span>',
                f'<span class="notes">{_notes(notes)}</span>',
            )
        )

    def _bars(self, group: tuple[Node, ...]) -> Iterator[str]:
        whole = self._end - self._begin
        for node in group[:500]:
            yield _rect(node.start_ns - self._begin, self._ends(node) - self._begin, whole, _fill(node))
            # A step's bar shows its calls, and a call's bar its waits, so that a folded line tells of them too.
            calls = [child for child in node.children if words.is_call(child)]
            if names.STEP_NAME not in node.attributes:
                calls = []
            for call in calls:
                yield _rect(call.start_ns - self._begin, self._ends(call) - self._begin, whole, _fill(call))
            for one in (node, *calls):
                for begin, end, what in trace_time.waits(one):
                    fill = _FILLS.get(what, "wait")
                    yield _rect(begin - self._begin, min(end, self._ends(one)) - self._begin, whole, fill)

    def _ends(self, node: Node) -> int:
        return self._end if node.end_ns is None else node.end_ns

    def _number(self, node: Node) -> int | None:
        return self._numbers.get(node.span_id) or self._numbers.get(self._homes.get(node.span_id, ""))

    # -- step by step -----------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[str]:
        if not self._cards:
            return
        yield '<div class="bar2"><h2>Step by step</h2><div class="tools">'
        yield '<button type="button" data-of=".card" data-open="1">Unfold all</button>'
        yield '<button type="button" data-of=".card" data-open="0">Fold all</button></div></div>'
        if not any(words.content(node) for node in walk(self._trace.roots)):
            yield (
                '<p class="note">What was shown and said is not in this trace: it is recorded only where '
                f"<code>{VARIABLE}=SPAN_ONLY</code> is set when a run is made.</p>"
            )
        is_open = " open" if len(self._cards) <= _OPEN else ""
        for node in self._cards[:MAX_CARDS]:
            yield from self._card(node, is_open)
        if len(self._cards) > MAX_CARDS:
            yield f'<p class="note">{len(self._cards) - MAX_CARDS} more steps are in the timeline only.</p>'

    def _card(self, node: Node, is_open: str) -> Iterator[str]:
        number = self._numbers[node.span_id]
        took = "" if node.end_ns is None else words.seconds((node.end_ns - node.start_ns) / 1e9)
        notes = words.notes(node, self._trace, gone=self._gone)
        calls = [child for child in node.children if words.is_call(child)]
        for call in calls:
            notes += [("by " + words.label(call), ""), *words.notes(call, self._trace, gone=self._gone)]
        yield f'<details class="card" id="s{number}"{is_open}><summary><span class="num">{number}</span>'
        yield f'<b>{escape(words.label(node))}</b><span class="took">{escape(took)}</span>'
        yield f'<span class="notes">{_notes(_once(notes))}</span>'
        told = [one for one in (node, *calls) if words.CONTENTS & one.attributes.keys()]
        if told:
            yield f'<span class="peek">{_text(_peek(words.content(told[-1])))}</span>'
        yield '</summary><div class="body">'
        for index, one in enumerate(told):
            if len(told) > 1:
                yield f'<p class="sub">{"asked" if index == 0 else "asked again"}</p>'
            score = one.attributes.get(names.UPSTREAM_CALL, one.attributes.get(names.STEP_KIND)) == "score"
            yield from _content(words.content(one), score=score)
        yield from _facts(node)
        for call in calls:
            yield from _facts(call)
        yield "</div></details>"


def _is_card(node: Node, trace: Trace) -> bool:
    if names.STEP_NAME in node.attributes or node.attributes.get(names.OPERATION) == "execute_tool":
        return True
    # A call without a step: of a model that was passed through.
    return words.is_call(node) and not any(run.program for run in trace.runs)


def _fill(node: Node) -> str:
    if node.failed:
        return "bad"
    if node.attributes.get(names.CANCELLED):
        return "wait"
    if node.attributes.get(names.CACHE_RESULT) in ("hit", "joined"):
        return "hit"
    if words.is_call(node) or names.UPSTREAM_ATTEMPT in node.attributes:
        return "model"
    return "tool" if node.attributes.get(names.OPERATION) == "execute_tool" else "run"


def _rect(begin: int, end: int, whole: int, fill: str) -> str:
    left = min(99.7, max(0.0, 100 * begin / whole))
    # Even the shortest did happen.
    width = min(100 - left, max(0.3, 100 * (end - begin) / whole))
    return f'<rect class="f-{fill}" x="{left:.3f}%" width="{width:.3f}%" y="2" height="10" rx="2"/>'


def _notes(notes: Sequence[tuple[str, str]]) -> str:
    return ", ".join(
        f'<span class="{_STYLES[style]}">{escape(text)}</span>' if style in _STYLES else escape(text)
        for text, style in notes
    )


def _once(notes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(notes))


def _facts(node: Node) -> Iterator[str]:
    rows = [(name, value) for name, value in node.attributes.items() if name not in names.CONTENT]
    rows += [(f"event {event.name}", dict(event.attributes)) for event in node.events]
    rows += [("link", f"trace {link.trace_id}, span {link.span_id}") for link in node.links]
    if not rows:
        return
    yield f'<details class="more"><summary>attributes of {escape(words.label(node))}</summary><table>'
    for name, value in rows:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        yield f"<tr><td>{_text(name)}</td><td>{_text(shown)}</td></tr>"
    yield "</table></details>"


# -- content --------------------------------------------------------------------------------------------------------


def _content(content: Mapping[str, str], *, score: bool) -> Iterator[str]:
    """What was shown and said, one block a message. What is no JSON, for others may have written it, is a text."""
    for attribute in names.CONTENT:
        if attribute not in content:
            continue
        value = _parsed(content[attribute])
        if attribute == names.SYSTEM_INSTRUCTIONS:
            yield _message("system instructions", "system", _parts(value))
        elif attribute == names.TOOL_DEFINITIONS:
            yield _message("tools it may call", "system", [("", _pretty(value))])
        elif attribute == names.TOOL_ARGUMENTS:
            yield _message("arguments", "", [("", _pretty(value))])
        elif attribute == names.TOOL_RESULT:
            yield _message("result", "said", [("", _pretty(value))])
        else:
            said = attribute == names.OUTPUT_MESSAGES
            messages = cast("list[object]", value) if isinstance(value, list) else [value]
            for index, message in enumerate(messages):
                fields = _fields(message)
                role = str(fields.get("role", ""))
                if score:
                    who = "measured" if said else ("context", "continuation")[min(index, 1)]
                else:
                    who = "said" if said else role
                finish = fields.get("finish_reason")
                if said and finish not in (None, "stop"):
                    who += f" (finish: {finish})"
                kind = "said" if said else "system" if role in ("system", "developer", "omitted") else ""
                yield _message(who, kind, _parts(fields.get("parts", message)))


def _message(who: str, kind: str, parts: Sequence[tuple[str, str]]) -> str:
    blocks = "".join(f'<pre class="{style}" dir="auto">{_block(text)}</pre>' for style, text in parts)
    return f'<div class="msg {kind}"><p class="who">{_text(who)}</p>{blocks}</div>'


def _parts(value: object) -> list[tuple[str, str]]:
    """Each part as its style and its text."""
    parts: list[tuple[str, str]] = []
    for part in cast("list[object]", value) if isinstance(value, list) else [value]:
        fields = _fields(part)
        kind, content = fields.get("type"), fields.get("content")
        if kind == "text" and isinstance(content, str):
            parts.append(("", content))
        elif kind == "reasoning" and isinstance(content, str):
            parts.append(("think", content))
        elif kind == "tool_call":
            parts.append(("", f"calls {fields.get('name')}: {_pretty(fields.get('arguments'))}"))
        elif kind == "tool_call_response":
            parts.append(("", _pretty(fields.get("response"))))
        elif kind == "loglikelihood":
            parts.append(("", _likelihood(fields)))
        else:
            parts.append(("", _pretty(part)))
    return parts


def _likelihood(fields: Mapping[str, Any]) -> str:
    nats, tokens = fields.get("nats"), fields.get("tokens")
    if not isinstance(nats, (int, float)):
        return "a log-likelihood of minus infinity"
    each = f", {nats / tokens:.3f} a token" if isinstance(tokens, int) and tokens else ""
    return f"log-likelihood {nats:.3f} nats over {tokens} tokens{each}"


def _peek(content: Mapping[str, str]) -> str:
    """The beginning of what was said, for a card that is closed."""
    for attribute in (names.OUTPUT_MESSAGES, names.TOOL_RESULT):
        if attribute in content:
            value = _parsed(content[attribute])
            messages = cast("list[object]", value) if isinstance(value, list) else [value]
            texts = [text for message in messages for _, text in _parts(_fields(message).get("parts", message))]
            return " ".join(" ".join(texts).split())[:300]
    return ""


def _parsed(text: str) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _fields(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def _pretty(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
