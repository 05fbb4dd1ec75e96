"""A report as text: how right each system is, what that takes, and how the systems compare. It fits a terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from asmodel import trace_words as words
from asmodel.evaluation.report import Report, Score, SystemFigures

NONE = "—"
"""What is not known. It is never a 0."""

SHOWN = 5
"""Different errors that are shown."""

ANSWERS = 5
"""Where so many different answers are right at the most, it is told how far one of them alone would come."""
ASKED = 5
"""Questions of each, on average, from which on that is told."""


def lines(report: Report, width: int = 80) -> Iterator[str]:
    """The report, line by line; scorers share a table as long as it is no wider than `width`."""
    yield heading(report)
    for rows in scores_within(report, width):
        yield ""
        yield from columns(rows)
    for scorer in report.scorers:
        if rows := comparisons(report, scorer):
            yield ""
            yield from columns(rows)
    for told in remarks(report):
        yield from _wrapped(told, width)
    yield ""
    yield from columns(takes(report))
    for told in notes(report):
        yield from _wrapped(told, width)
    yield ""
    yield now(report)


def _wrapped(told: str, width: int) -> list[str]:
    return textwrap.wrap(told, max(40, width), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def heading(report: Report) -> str:
    """Which questions were asked of what."""
    data = report.data
    asked, file = data.asked, words.clean(data.file)
    if data.seed is None:
        which = f"all {words.plural(asked, 'question')} of {file}"
    else:
        which = f"{asked} of {words.plural(data.of, 'question')} of {file}, drawn by seed {data.seed}"
    if data.skipped:
        which += f" after the first {data.skipped}"
    if data.excluded:
        which += f", without {data.excluded} that are excluded"
    if report.repeats > 1:
        which += f", each asked {report.repeats} times"
    return which


def figure(value: float | None, kind: str) -> str:
    """A score: in per cent where it is a proportion."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}" if kind == "proportion" else f"{value:.3f}"


def interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return NONE
    return f"{figure(score.low, score.kind)} to {figure(score.high, score.kind)}"


def cost(dollars: float | None) -> str:
    return NONE if dollars is None else words.cost(dollars)


def scores(report: Report, scorers: Sequence[str]) -> list[Sequence[str]]:
    """How right each system is, by each of these scorers."""
    head, several = ["system", "n"], report.repeats > 1
    for name in scorers:
        head += [named(report, name), "95 %", *["spread"] * several]
    rows: list[Sequence[str]] = [[*head, "errors"]]
    for system in report.systems:
        row = [words.clean(system.name), str(system.questions)]
        for name in scorers:
            score = system.scores[name]
            row += [figure(score.value, score.kind), interval(score), *[figure(score.spread, score.kind)] * several]
        rows.append([*row, str(system.errors)])
    return rows


def scores_within(report: Report, width: int) -> Iterator[list[Sequence[str]]]:
    """The scorers in as few tables as there can be that are no wider; at least one in each."""
    held: list[str] = []
    for name in report.scorers:
        wider = [*held, name]
        if held and max(map(len, columns(scores(report, wider)))) > width:
            yield scores(report, held)
            wider = [name]
        held = wider
    yield scores(report, held)


def named(report: Report, scorer: str) -> str:
    """The scorer, with its unit."""
    kind = report.systems[0].scores[scorer].kind
    return f"{words.clean(scorer)} %" if kind == "proportion" else words.clean(scorer)


def takes(report: Report) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("what it takes", "calls", "each", "tokens in", "out", "cost", "p50", "p90", "p99"),
    ]
    for system in report.systems:
        takes, latency = system.takes, system.latency
        times = [NONE] * 3 if latency is None else [words.seconds(s) for s in (latency.p50, latency.p90, latency.p99)]
        about = "~" if takes.estimated else ""
        tokens = [f"{about}{takes.prompt_tokens:,}", f"{about}{takes.completion_tokens:,}"]
        each = f"{takes.calls / takes.questions:.1f}" if takes.questions else NONE
        rows.append((words.clean(system.name), f"{takes.calls:,}", each, *tokens, cost(takes.cost), *times))
    for judge in report.judges:
        takes = judge.takes
        each = f"{takes.calls / takes.questions:.1f}" if takes.questions else NONE
        tokens = [f"{takes.prompt_tokens:,}", f"{takes.completion_tokens:,}"]
        rows.append((words.clean(judge.scorer), f"{takes.calls:,}", each, *tokens, cost(takes.cost), *[NONE] * 3))
    return rows


def comparisons(report: Report, scorer: str) -> list[Sequence[str]]:
    """The systems against one another by one scorer; nothing where there is nothing to compare."""
    compared = [c for c in report.comparisons if c.scorer == scorer]
    if not compared:
        return []
    others = len({c.against for c in compared}) > 1
    binary = compared[0].p is not None
    head = [f"{named(report, scorer)}: " + ("pairs" if others else f"against {words.clean(compared[0].against)}")]
    head += ["won", "lost", *(["both", "neither"] if binary else ["alike"]), "difference", "95 %"]
    head += ["p"] * binary + ["Holm"] * (binary and len(compared) > 1)
    rows: list[Sequence[str]] = [head]
    for c in compared:
        kind = "proportion" if binary else "mean"
        row = [words.clean(f"{c.system} : {c.against}" if others else c.system), str(c.won), str(c.lost)]
        row += [str(c.both), str(c.neither)] if binary else [str(c.alike)]
        row += [_signed(c.difference, kind), f"{_signed(c.low, kind)} to {_signed(c.high, kind)}"]
        row += [p_value(c.p)] * binary + [p_value(c.p_holm)] * (binary and len(compared) > 1)
        rows.append(row)
    return rows


def _signed(value: float, kind: str) -> str:
    text = figure(value, kind)
    return text if value < 0 else f"+{text}"


def p_value(p: float | None) -> str:
    if p is None:
        return NONE
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def remarks(report: Report) -> Iterator[str]:
    """What to know before one believes a comparison."""
    for scorer in report.scorers:
        yield from _always_the_same(report, scorer)
    systems: dict[str, list[str]] = {}
    for c in report.comparisons:
        if c.remark:
            systems.setdefault(c.remark, []).append(f"{c.system} ({c.scorer})")
    for remark, which in systems.items():
        where = "" if len(which) == len(report.comparisons) else f"{words.clean(', '.join(dict.fromkeys(which)))}: "
        yield f"note: {where}{remark}"


def _always_the_same(report: Report, scorer: str) -> Iterator[str]:
    """Where there are few right answers: how often one of them is right, and each system on the questions of each."""
    if report.systems[0].scores[scorer].kind != "proportion":
        return
    right = {id(asked): _short(asked.references.get(scorer)) for asked in report.examples}
    counts = Counter(right.values()).most_common()
    if (
        not 2 <= len(counts) <= ANSWERS
        or len(right) < ASKED * len(counts)
        or any(answer is None for answer, _ in counts)
    ):
        return
    most, often = counts[0]
    of_each = ", ".join(f"{count} {words.clean(answer or '')}" for answer, count in counts)
    yield (
        f"note: {words.clean(scorer)}: right are {of_each}; always to answer {words.clean(most or '')} is right in "
        f"{100 * often / len(right):.1f} %"
    )
    for system in report.systems:
        hits = Counter(
            right[id(asked)]
            for asked in report.examples
            for answered in asked.answers
            if answered.system == system.name and answered.scores.get(scorer) == 1.0
        )
        told = ", ".join(
            f"{hits[answer]} of {count * report.repeats} {words.clean(answer or '')}" for answer, count in counts
        )
        yield f"note: {words.clean(system.name)}: right in {told}"


def _short(reference: object) -> str | None:
    """An answer that may be one of few, as it is told; None where it is none."""
    if isinstance(reference, bool):
        return "yes" if reference else "no"
    return reference.strip().lower() if isinstance(reference, str) and 0 < len(reference.strip()) <= 20 else None


def notes(report: Report) -> Iterator[str]:
    """What the figures do not say."""
    without: dict[str, list[str]] = {}
    for system in report.systems:
        if system.not_given:
            without.setdefault(", ".join(system.not_given), []).append(system.name)
    for params, names in without.items():
        have = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"
        yield f"note: {words.clean(have)} no parameter {words.clean(params)}: asked without"
    for system in report.systems:
        name = words.clean(system.name)
        if system.not_cached:
            what = "question" if report.repeats == 1 else "answer"
            yield f"note: {name}: {words.plural(system.not_cached, what)} not in the cache, and not counted"
        if report.repeats > 1 and system.answered and not _varies(report, system):
            yield f"note: {name}: the same answer each time: nothing in it is sampled, or what is does not differ"
        for scorer, score in system.scores.items():
            for why, count in score.unread.items():
                wrong = f"{count} of {score.answers} wrong by {words.clean(scorer)}"
                yield f"note: {name}: {wrong} because the answer {words.clean(why)}"
            if score.untold:
                yield (
                    f"note: {name}: {words.plural(score.untold, 'answer')} without a score by {words.clean(scorer)}: "
                    + (_trouble(report, system, scorer))
                )
    yield from _errors(report)


def _varies(report: Report, system: SystemFigures) -> bool:
    """Whether any question has answers that differ."""
    return any(len({a.text for a in asked.answers if a.system == system.name}) > 1 for asked in report.examples)


def _trouble(report: Report, system: SystemFigures, scorer: str) -> str:
    found = (
        a.troubles[scorer]
        for e in report.examples
        for a in e.answers
        if a.system == system.name and scorer in a.troubles
    )
    return words.clean(next(found, "?"))


def _errors(report: Report) -> Iterator[str]:
    errors = Counter((a.system, a.error) for e in report.examples for a in e.answers if a.error is not None)
    for (system, error), count in errors.most_common(SHOWN):
        yield f"error: {words.clean(system)}: {words.clean(error or '')}" + (f" ({count} times)" if count > 1 else "")
    if len(errors) > SHOWN:
        yield f"error: and {len(errors) - SHOWN} other ones; --json has them all"


def now(report: Report) -> str:
    """What this run was, besides what it found out."""
    parts = [system.now for system in report.systems] + [judge.now for judge in report.judges]
    calls, hits = sum(p.calls for p in parts), sum(p.hits for p in parts)
    tokens = sum(p.prompt_tokens + p.completion_tokens for p in parts)
    costs = [p.cost for p in parts]
    runs = sum(s.answered + s.errors for s in report.systems)
    rate = runs / report.seconds if report.seconds else 0.0
    bought = (
        f"bought {words.plural(calls, 'call')}, {tokens:,} tokens, "
        + ("price unknown" if None in costs else words.cost(sum(c for c in costs if c is not None)))
        if calls
        else "nothing was bought"
    )
    found = f"{hits:,} from the cache" if hits else "nothing from the cache"
    at_once = f"{report.at_once} at once"
    return f"now: {bought}; {found}; {words.seconds(report.seconds)}, {rate:.3g} answers a second, {at_once}"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows as lines: the first column to the left, the others to the right."""
    from rich.cells import cell_len

    widths = [max(cell_len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell + " " * (width - cell_len(cell)) if place == 0 else " " * (width - cell_len(cell)) + cell
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
