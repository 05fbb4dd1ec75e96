"""A report as one HTML page that needs nothing else: figures, plots, and every question with each system's run.

Its policy (CSP) allows the page's own style and script, by their digests, and nothing that is not in it. Questions and
answers are text, escaped: they were written by strangers and by models.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from asmodel import trace_words as words
from asmodel.evaluation import charts, table
from asmodel.evaluation.report import Answered, Asked, Report, StepTaken

MAX_SAID = 12
"""Texts of equal steps that are shown."""

MAX_STEPS = 200_000
"""Steps of all questions together whose bars are drawn; a browser slows down with more."""

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1d2129;--dim:#687081;--line:#e4e2dc;--soft:#f2f0eb;
--model:#3b6fd4;--hit:#23936b;--bad:#c93c3c;--warn:#a96d00;--good:#18794e;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1b1e24;--ink:#e4e6eb;--dim:#949cab;--line:#2d323b;
--soft:#22262d;--model:#6b9bf5;--hit:#3dbb8b;--bad:#f07171;--warn:#e0b060;--good:#4cc38a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0}h2{font-size:1.05rem;margin:36px 0 12px}
h3{font-size:.92rem;margin:0 0 6px}
.dim{color:var(--dim)}.bad{color:var(--bad)}.warn{color:var(--warn)}.good{color:var(--good)}
.sub{margin:6px 0 0;color:var(--dim);font-size:.88rem;overflow-wrap:anywhere}
code{font-family:var(--mono);font-size:.86em}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px;margin:0 0 14px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
tr:first-child th{border-top:0;color:var(--dim);font-weight:600;background:var(--soft)}
th:first-child,td:first-child{text-align:left}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px}
svg{display:block;width:100%}
.plot text{font-size:12px;fill:var(--dim)}.plot text.name{fill:var(--ink)}
.grid{stroke:var(--line)}.whisker{stroke:var(--model);stroke-width:2}.dot,.box{fill:var(--model)}
.median{stroke:var(--card);stroke-width:3}
.note{color:var(--dim);font-size:.86rem;margin:4px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:0 0 8px;overflow:hidden}
summary{cursor:pointer;list-style:none}summary::-webkit-details-marker{display:none}
.card>summary{display:flex;gap:4px 14px;align-items:baseline;padding:9px 16px}
.card>summary:hover{background:var(--soft)}
.card>summary::before{content:"\\25B8";color:var(--dim)}.card[open]>summary::before{content:"\\25BE"}
.card .q{flex:1;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;unicode-bidi:isolate}
.marks{display:flex;gap:6px;flex-wrap:wrap;justify-content:flex-end}
.mark{font-size:.78rem;padding:0 8px;border-radius:99px;border:1px solid currentColor;white-space:nowrap;
font-variant-numeric:tabular-nums}
.body{padding:2px 16px 14px}
.run{border-top:1px solid var(--line);padding:10px 0 4px}
.top{display:flex;gap:10px;align-items:baseline;flex-wrap:wrap}
.said{background:var(--soft);border-radius:8px;padding:8px 12px;margin:6px 0}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-family:var(--mono);font-size:.82rem;max-height:22rem;
overflow:auto;unicode-bidi:plaintext}
.row{display:grid;grid-template-columns:minmax(150px,24%) minmax(120px,1fr) minmax(150px,26%);gap:12px;
align-items:center;font-size:.82rem;padding:2px 0}
.row .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;unicode-bidi:isolate}
.bar{height:14px}.f-model{fill:var(--model)}.f-hit{fill:var(--hit)}
.key{display:inline-block;width:10px;height:10px;margin:0 5px 0 2px}
.more{font-size:.82rem;color:var(--dim)}
.tools{display:none;gap:8px;flex-wrap:wrap;margin:0 0 12px}.js .tools{display:flex}
button,input{font:inherit;font-size:.84rem;color:var(--ink);background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:3px 10px}button{cursor:pointer}button:hover{background:var(--soft)}
button[aria-pressed=true]{border-color:var(--model);color:var(--model)}
summary:focus-visible,button:focus-visible,input:focus-visible{outline:2px solid var(--model);outline-offset:-2px}
[hidden]{display:none!important}
footer{margin-top:40px;color:var(--dim);font-size:.8rem;overflow-wrap:anywhere}
@media(max-width:820px){main{padding:18px 12px 48px}.plots{grid-template-columns:1fr}
.card>summary{flex-wrap:wrap}.card .q{flex:1 1 100%;white-space:normal}}
@media print{.tools{display:none!important}}
"""

# Only for comfort: without it the page shows all questions.
_SCRIPT = """
document.documentElement.classList.add("js");
var cards=document.querySelectorAll(".card"),shown="all",find=document.getElementById("find");
function apply(){var words=find.value.toLowerCase(),n=0;cards.forEach(function(c){
var on=(shown==="all"||c.dataset[shown]==="1")&&(!words||c.textContent.toLowerCase().indexOf(words)>=0);
c.hidden=!on;if(on)n++;});document.getElementById("count").textContent=n+" of "+cards.length;}
document.querySelectorAll("button[data-show]").forEach(function(b){b.addEventListener("click",function(){
shown=b.dataset.show;document.querySelectorAll("button[data-show]").forEach(function(o){
o.setAttribute("aria-pressed",o===b);});apply();});});
find.addEventListener("input",apply);apply();
"""


def page(report: Report) -> str:
    """The report as a page."""
    policy = (
        f"default-src 'none'; style-src '{_digest(_STYLE)}'; script-src '{_digest(_SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = " against ".join(system.name for system in report.systems[:3])
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            '<meta name="referrer" content="no-referrer"><meta name="robots" content="noindex">',
            f"<title>{_text(title)} - asmodel eval</title><style>{_STYLE}</style></head><body><main>",
            *_head(report, title),
            *_tables(report),
            *_plots(report),
            *_questions(report),
            f"<footer>asmodel {_text(report.asmodel)}, {_text(report.format)}; data SHA-256 "
            f"<code>{_text(report.data.sha256)}</code>; bootstraps by seed {report.seed}. "
            "This page is complete in itself and loads nothing.</footer>",
            f"</main><script>{_SCRIPT}</script></body></html>\n",
        )
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


def _head(report: Report, title: str) -> Iterator[str]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(report.made_at))
    yield f'<header><h1>{_text(title)}</h1><p class="sub">{_text(table.heading(report))}; {_text(when)}</p>'
    if report.interrupted:
        yield '<p class="sub warn">It was interrupted; this is as far as it came.</p>'
    yield "</header>"


def _tables(report: Report) -> Iterator[str]:
    yield "<h2>How right</h2>"
    yield _table(table.scores(report, report.scorers))
    if report.comparisons:
        yield "<h2>Question by question</h2>"
        for scorer in report.scorers:
            if rows := table.comparisons(report, scorer):
                yield _table(rows)
        for remark in table.remarks(report):
            yield f'<p class="note">{_text(remark)}</p>'
    yield "<h2>What it takes</h2>"
    yield _table(table.takes(report))
    yield (
        '<p class="note">Calls, tokens, cost and seconds as when each answer was bought, whether that was now or '
        "before. Seconds are those for which a question was waiting for a model.</p>"
    )
    yield f'<p class="note">{_text(table.now(report))}</p>'
    for note in table.notes(report):
        yield f'<p class="note{" bad" if note.startswith("error") else ""}">{_text(note)}</p>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in others)
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def _plots(report: Report) -> Iterator[str]:
    yield '<h2>Drawn</h2><div class="plots">'
    for name in report.scorers:
        kind = report.systems[0].scores[name].kind
        bars = {system.name: bar for system in report.systems if (bar := _bar(system.name, system.scores[name]))}
        if not bars:
            continue
        proportion = kind == "proportion"
        yield _figure(f"{name}, with 95 % intervals", charts.scores, list(bars.values()), proportion=proportion)
        calls = {s.name: s.takes.calls / s.takes.questions for s in report.systems if s.takes.questions}
        points = [(bars[name], calls[name]) for name in bars if name in calls]
        if points:
            yield _figure(f"{name} against calls", charts.costs, points, proportion=proportion)
    waited = {
        system.name: sorted(
            a.seconds for e in report.examples for a in e.answers if a.system == system.name and a.ending == "answered"
        )
        for system in report.systems
    }
    rows = [(name, seconds) for name, seconds in waited.items() if seconds]
    if rows:
        yield _figure("Seconds a question, as bought", charts.latencies, rows)
    yield "</div>"


def _bar(name: str, score: Any) -> charts.Bar | None:
    if score.value is None:
        return None
    shown = f"{table.figure(score.value, score.kind)} ({table.interval(score)})"
    return charts.Bar(name, score.value, score.low, score.high, shown)


def _figure(title: str, chart: Any, *args: Any, **options: Any) -> str:
    return f"<figure><h3>{_text(title)}</h3>{chart(*args, title=title, **options)}</figure>"


# -- the questions --------------------------------------------------------------------------------------------------


def _questions(report: Report) -> Iterator[str]:
    differ = sum(differs(example) for example in report.examples)
    failed = sum(any(a.ending != "answered" for a in example.answers) for example in report.examples)
    yield "<h2>Questions</h2>"
    yield '<div class="tools"><button type="button" data-show="all" aria-pressed="true">All</button>'
    yield f'<button type="button" data-show="differ" aria-pressed="false">Where systems differ ({differ})</button>'
    yield f'<button type="button" data-show="failed" aria-pressed="false">Without an answer ({failed})</button>'
    yield '<input id="find" type="search" placeholder="Find" aria-label="Find">'
    yield '<span id="count" class="dim"></span></div>'
    yield (
        '<p class="note">Of each step, when its calls were under way, as bought: '
        '<svg class="key"><rect class="f-model" width="10" height="10"/></svg>by this evaluation, '
        '<svg class="key"><rect class="f-hit" width="10" height="10"/></svg>before.</p>'
    )
    left = MAX_STEPS
    for example in report.examples:
        yield from _question(example, report, drawn=left > 0)
        left -= sum(len(answer.steps) for answer in example.answers)


def differs(example: Asked) -> bool:
    """Whether any scorer tells two systems apart by their answers to it."""
    names = dict.fromkeys(name for answer in example.answers for name in answer.scores)
    systems = _by_system(example).values()
    return any(len({m for own in systems if (m := _mean(own, name)) is not None}) > 1 for name in names)


def _by_system(example: Asked) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = {}
    for answer in example.answers:
        found.setdefault(answer.system, []).append(answer)
    return found


def _mean(answers: Sequence[Answered], scorer: str) -> float | None:
    """Over the draws of one system; None where none has a score."""
    values = [value for answer in answers if (value := answer.scores.get(scorer)) is not None]
    return math.fsum(values) / len(values) if values else None


def _question(example: Asked, report: Report, *, drawn: bool) -> Iterator[str]:
    failed = any(a.ending != "answered" for a in example.answers)
    first = report.scorers[0]
    marks = "".join(_mark(system, answers, first) for system, answers in _by_system(example).items())
    yield f'<details class="card" data-differ="{int(differs(example))}" data-failed="{int(failed)}">'
    yield f'<summary><span class="q">{_text(" ".join(example.question.split())[:300])}</span>'
    yield f'<span class="marks">{marks}</span></summary><div class="body">'
    yield f'<p class="sub">id <code>{_text(example.id)}</code>, line {example.line}</p>'
    yield f'<div class="said"><pre dir="auto">{_block(example.question)}</pre></div>'
    for value, names in _references(example):
        yield f'<p class="sub">right, by {_text(names)}: {_text(_short(value))}</p>'
    for answer in example.answers:
        yield from _run(answer, drawn=drawn, several=report.repeats > 1)
    yield "</div></details>"


def _references(example: Asked) -> list[tuple[str, str]]:
    by_value: dict[str, list[str]] = {}
    for scorer, value in example.references.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        by_value.setdefault(shown, []).append(scorer)
    return [(value, ", ".join(names)) for value, names in by_value.items()]


def _short(text: str) -> str:
    return text if len(text) <= 400 else text[:399] + "…"


def _mark(name: str, answers: Sequence[Answered], scorer: str) -> str:
    endings = dict.fromkeys(answer.ending for answer in answers if answer.ending != "answered")
    if endings:
        return f'<span class="mark warn">{_text(name)} {_text(", ".join(endings).replace("_", " "))}</span>'
    value = _mean(answers, scorer)
    if value is None:
        return f'<span class="mark dim">{_text(name)} {table.NONE}</span>'
    style = "good" if value == 1 else "bad" if value == 0 else "warn"
    shown = {1.0: "right", 0.0: "wrong"}.get(value, f"{value:.2f}")
    return f'<span class="mark {style}">{_text(name)} {shown}</span>'


def _run(answer: Answered, *, drawn: bool, several: bool) -> Iterator[str]:
    scores = ", ".join(
        f"{name} {table.NONE if value is None else f'{value:g}'}" for name, value in answer.scores.items()
    )
    facts = [words.plural(answer.calls, "call"), words.seconds(answer.seconds)]
    facts += [f"{answer.prompt_tokens:,} + {answer.completion_tokens:,} tokens", table.cost(answer.cost)]
    facts.append(f"{answer.bought} bought now" if answer.bought else "from the cache")
    name = f"{answer.system}, draw {answer.draw + 1}" if several else answer.system
    yield f'<div class="run"><div class="top"><b>{_text(name)}</b><span class="dim">{_text(scores)}</span>'
    yield f'<span class="dim">{_text(" · ".join(facts))}</span></div>'
    if answer.error is not None:
        yield f'<p class="bad">{_text(answer.error)}</p>'
    if answer.text is not None:
        yield f'<div class="said"><pre dir="auto">{_block(answer.text)}</pre></div>'
    for scorer, trouble in answer.troubles.items():
        yield f'<p class="sub warn">{_text(scorer)}: {_text(trouble)}</p>'
    if answer.citations:
        yield f'<p class="sub">cites {_text(_short(", ".join(answer.citations)))}</p>'
    if answer.data is not None:
        yield f'<p class="sub">data <code>{_text(_short(json.dumps(answer.data, ensure_ascii=False)))}</code></p>'
    if drawn:
        yield from _steps(answer.steps)
    if answer.run_id:
        yield f'<p class="sub">all that is kept of it: <code>asmodel trace {_text(answer.run_id)}</code></p>'
    yield "</div>"


def _steps(steps: Sequence[StepTaken]) -> Iterator[str]:
    """A row for each kind of step, on one line of time; steps that were bought on other days are moved together."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, step in enumerate(steps):
        groups.setdefault((step.program, step.step), []).append(place)
    spans = joined([(step.at, step.at + step.seconds) for step in steps])
    whole = max((end for _, end in spans), default=0.0)
    for (_, name), places in groups.items():
        own = [steps[place] for place in places]
        bars = [(*spans[p], "f-model" if steps[p].source == "bought" else "f-hit") for p in places]
        hits = sum(step.source != "bought" for step in own)
        notes = [f"{sum(s.prompt_tokens for s in own):,} + {sum(s.completion_tokens for s in own):,} tokens"]
        notes += [f"{hits} found"] * bool(hits)
        many = f" x{len(own)}" if len(own) > 1 else ""
        yield f'<div class="row"><span class="name">{_text(name)}{many}</span>{charts.timeline(bars, whole)}'
        yield f'<span class="dim">{_text(", ".join(notes))}</span></div>'
        yield f'<details class="more"><summary>what {_text(name)} said</summary>'
        for step in own[:MAX_SAID]:
            yield f'<div class="said"><pre dir="auto">{_block(step.said)}</pre></div>'
        if len(own) > MAX_SAID:
            yield f"<p>and {len(own) - MAX_SAID} more</p>"
        yield "</details>"


def joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans with the times taken out in which none of them was under way; in the order given, from 0."""
    moved: dict[int, tuple[float, float]] = {}
    reached, gone = 0.0, 0.0
    for place in sorted(range(len(spans)), key=lambda place: spans[place]):
        begin, end = spans[place]
        gone += max(0.0, begin - reached) if moved else begin
        reached = max(reached, end)
        moved[place] = (begin - gone, end - gone)
    return [moved[place] for place in range(len(spans))]
