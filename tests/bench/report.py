"""What was measured, for people and for files: rows with their floors, tables, a line of history, the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.table import Table
from tests.bench.measuring import Life
from tests.bench.parts import Part
from tests.bench.profiling import Profile
from tests.bench.scenarios import LIFE, UNITS, Floor, Measured

OURS = ("asmodel", "direct")
"""Whose faults make a figure worthless; others' are their own."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one scenario, against its floor."""

    scenario: str
    figure: str
    value: float | None
    floor: Floor | None = None
    fault: bool = False
    """Whether something went wrong meanwhile: then the value is worth nothing."""
    others: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """The same figure of whoever else was measured."""

    @property
    def verdict(self) -> str:
        if self.fault:
            return "broken"
        if self.floor is None:
            return ""
        if self.value is None:
            return "not measured"
        short = self.floor.short_by(self.value)
        return f"short by {shown(self.figure, short)}" if short else "met"

    @property
    def short(self) -> bool:
        return self.verdict.startswith("short")

    @property
    def floor_text(self) -> str:
        if self.floor is None:
            return ""
        return f"{'>=' if self.floor.at_least else '<='} {self.floor.limit:g}{UNITS.get(self.figure, '')}"


def shown(figure: str, value: float | None) -> str:
    """A figure with its unit, as precise as it is worth."""
    if value is None:
        return "-"
    unit = UNITS.get(figure, "")
    size = abs(value)
    digits = 3 if size < 10 and not unit else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:,.{digits}f}{unit}"


def rows(measured: Iterable[Measured], life: Life | None, target: str = "asmodel") -> list[Row]:
    """A row for each floor, and where a scenario has none, one for its ratio or its time."""
    out: list[Row] = []
    for one in measured:
        figures = {name: one.figures(name) for name in one.rounds}
        faulty = any(fault.startswith(tuple(f"{name}:" for name in OURS)) for fault in one.faults)
        for floor in one.scenario.floors or (None,):
            figure = floor.figure if floor else "ratio"
            others = {name: found.get(figure) for name, found in figures.items() if name not in OURS}
            value = figures[target].get(figure)
            out.append(
                Row(scenario=one.scenario.name, figure=figure, value=value, floor=floor, fault=faulty, others=others)
            )
    if life is not None:
        for floor, value in zip(LIFE, (life.start, life.idle, life.growth), strict=True):
            name = f"memory, {life.requests} to 10,000" if floor.figure == "memory growth" else "server"
            if value is not None:
                out.append(Row(scenario=name, figure=floor.figure, value=value, floor=floor, fault=bool(life.faults)))
    return out


# ---- on the screen ----


def table(found: Sequence[Row]) -> Table:
    """Scenario, floor, figure, met or not, and the others' figures."""
    others = list(dict.fromkeys(name for row in found for name in row.others))
    out = Table(title="asmodel against its floors", title_justify="left")
    for name in ("scenario", "figure"):
        out.add_column(name, no_wrap=True)
    for name in ("floor", "asmodel"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("", no_wrap=True)
    for name in others:
        out.add_column(name, justify="right", no_wrap=True)
    for row in found:
        style = {"met": "green", "": "none", "broken": "red"}.get(row.verdict, "yellow")
        out.add_row(
            row.scenario,
            row.figure,
            row.floor_text,
            shown(row.figure, row.value),
            f"[{style}]{row.verdict}[/]",
            *(shown(row.figure, row.others[name]) if name in row.others else "" for name in others),
        )
    return out


DETAILS = (
    "rate",
    "ratio",
    "p50",
    "p99",
    "added p50",
    "added p99",
    "added first token",
    "wall",
    "CPU",
    "CPU a step",
    "memory",
)
HEADS = {"rate": "req/s", "CPU": "CPU a request"}


def details(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Every target of every scenario with all of its figures."""
    out = Table(title="all figures (medians of the rounds)", title_justify="left")
    out.add_column("scenario", no_wrap=True)
    out.add_column("target", no_wrap=True)
    for name in DETAILS:
        out.add_column(HEADS.get(name, name), justify="right")
    for scenario, targets in figures.items():
        for number, (target, found) in enumerate(targets.items()):
            cells = [shown(name, found.get(name)) for name in DETAILS]
            out.add_row("" if number else scenario, target, *cells, end_section=number + 1 == len(targets))
    return out


def parts_table(parts: Sequence[Part]) -> Table:
    out = Table(title="parts, in this process", title_justify="left")
    out.add_column("part", no_wrap=True)
    for name in ("CPU, median", "best", "on the clock"):
        out.add_column(name, justify="right")
    for part in parts:
        out.add_row(part.name, *(shown("CPU", value) for value in (part.median, part.best, part.wall)))
    return out


def profile_table(title: str, functions: Sequence[tuple[str, float, float]]) -> Table:
    out = Table(title=title, title_justify="left")
    for name in ("own", "total"):
        out.add_column(name, justify="right")
    out.add_column("function")
    for name, own, total in functions:
        out.add_row(f"{own:.1%}", f"{total:.1%}", name)
    return out


def summary(one: Measured) -> str:
    """A scenario in a line."""
    texts: list[str] = []
    for target in one.rounds:
        figures = one.figures(target)
        names = ("rate",) if target == "direct" else ("ratio", "added p50", "CPU")
        texts.append(f"{target} " + " ".join(f"{shown(name, figures.get(name))}" for name in names))
    return "; ".join(texts)


def faults(measured: Iterable[Measured], life: Life | None) -> list[str]:
    """All that went wrong, once each."""
    found = [f"{one.scenario.name}: {fault}" for one in measured for fault in one.faults]
    return list(dict.fromkeys([*found, *(life.faults if life else ())]))


def of_machine(about: Mapping[str, Any], *, brief: bool = False) -> str:
    """What it was measured on."""
    if brief:
        return f"{about['date'][:10]}, Python {about['python']}, {about['system']}, {about['cpus']} CPUs"
    changed = " with changes" if about["changed"] else ""
    peers: Mapping[str, str] = about.get("peers") or {}
    beside = "".join(f", {name} {version}".rstrip() for name, version in peers.items())
    return (
        f"{about['date']}, commit {about['commit']}{changed}, Python {about['python']}, {about['system']}, "
        f"{about['cpus']} CPUs, load before {about['load']}, {about['rounds']} rounds of {about['seconds']:g} s{beside}"
    )


# ---- in files ----


def line(
    about: Mapping[str, Any],
    measured: Sequence[Measured] = (),
    life: Life | None = None,
    parts: Sequence[Part] = (),
    profiles: Mapping[str, Profile] | None = None,
) -> dict[str, Any]:
    """What is kept of a run: a line of a history file. What was not measured is not in it."""
    out: dict[str, Any] = dict(about)
    found = rows(measured, life)
    if found:
        out["floors"] = [
            {
                "scenario": row.scenario,
                "figure": row.figure,
                "value": row.value,
                "floor": row.floor.limit if row.floor else None,
                "at_least": row.floor.at_least if row.floor else None,
                "verdict": row.verdict,
                "others": dict(row.others),
            }
            for row in found
        ]
    if measured:
        out["figures"] = {
            one.scenario.name: {
                target: {name: round(value, 4) for name, value in one.figures(target).items()} for target in one.rounds
            }
            for one in measured
        }
        out["faults"] = faults(measured, life)
    if life is not None:
        out["life"] = {**asdict(life), "after": {str(k): round(v, 2) for k, v in life.after.items()}}
    if parts:
        out["parts"] = [asdict(part) for part in parts]
    if profiles:
        out["profiles"] = {
            name: {"samples": profile.samples, "own": profile.top(), "total": profile.widest()}
            for name, profile in profiles.items()
        }
    return out


def rows_of(kept: Mapping[str, Any]) -> list[Row]:
    """The rows of a line of history."""
    return [
        Row(
            scenario=row["scenario"],
            figure=row["figure"],
            value=row["value"],
            floor=None if row["floor"] is None else Floor(row["figure"], row["floor"], row["at_least"]),
            fault=row["verdict"] == "broken",
            others=row["others"],
        )
        for row in kept["floors"]
    ]


def append(file: Path, kept: Mapping[str, Any]) -> None:
    """One more line of JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as history:
        history.write(orjson.dumps(dict(kept)) + b"\n")


BLOCKS = ("floors", "parts", "profiles")
"""Of the page, and of a line of history that holds what stands there."""


def newest(file: Path) -> dict[str, dict[str, Any]]:
    """By block, the newest line of a history that has it."""
    found: dict[str, dict[str, Any]] = {}
    for text in file.read_bytes().splitlines():
        kept: dict[str, Any] = orjson.loads(text)
        found |= {block: kept for block in BLOCKS if block in kept}
    return found


def on_page(text: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with new tables between its markers; a block without a new one stays. Raises ValueError without them."""
    written = {"floors": _floors_block, "parts": _parts_block, "profiles": _profiles_block}
    for block, kept in found.items():
        begin, end = f"<!-- {block}: from the benchmark -->", f"<!-- {block}: end -->"
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise ValueError(f"the page needs the lines {begin} and {end}, in this order")
        text = f"{before}{begin}\n\n{written[block](kept)}\n\n{end}{after}"
    return text


def _floors_block(kept: Mapping[str, Any]) -> str:
    found = rows_of(kept)
    others = list(dict.fromkeys(name for row in found for name in row.others))
    head = ["scenario", "figure", "floor", "asmodel", "", *others]
    cells = [
        [
            row.scenario,
            row.figure,
            row.floor_text.replace(">=", "≥").replace("<=", "≤"),
            shown(row.figure, row.value),
            row.verdict,
            *(shown(row.figure, row.others[name]) if name in row.others else "" for name in others),
        ]
        for row in found
    ]
    figures: Mapping[str, Mapping[str, Mapping[str, float]]] = kept.get("figures") or {}
    all_head = ["scenario", "target", *(HEADS.get(name, name) for name in DETAILS)]
    all_cells = [
        ["" if number else scenario, target, *(shown(name, found_.get(name)) for name in DETAILS)]
        for scenario, targets in figures.items()
        for number, (target, found_) in enumerate(targets.items())
    ]
    return (
        f"{of_machine(kept)}\n\n{_markdown(head, cells, 2)}\n\n"
        f"<details><summary>All figures of all targets</summary>\n\n{_markdown(all_head, all_cells, 2)}\n\n</details>"
    )


def _parts_block(kept: Mapping[str, Any]) -> str:
    cells = [
        [part["name"], *(shown("CPU", part[name]) for name in ("median", "best", "wall"))] for part in kept["parts"]
    ]
    return _markdown(["part", "CPU, median", "best", "on the clock"], cells, 1)


def _profiles_block(kept: Mapping[str, Any]) -> str:
    texts: list[str] = []
    for name, profile in kept["profiles"].items():
        for kind, title in (("own", "by their own time"), ("total", "of ours by all that they call")):
            cells = [[f"{own:.1%}", f"{total:.1%}", f"`{function}`"] for function, own, total in profile[kind]]
            texts.append(f"{name}, {profile['samples']} samples, functions {title}:\n")
            texts.append(_markdown(["own", "total", "function"], cells, 0) + "\n")
    return "\n".join(texts).rstrip()


def _markdown(head: Sequence[str], cells: Iterable[Sequence[str]], texts: int) -> str:
    """A table whose first `texts` columns are text; the others are figures."""
    out = [f"| {' | '.join(head)} |", f"|{'|'.join('---' if at < texts else '--:' for at in range(len(head)))}|"]
    return "\n".join([*out, *(f"| {' | '.join(row)} |" for row in cells)])
