"""What the proxy itself costs: `make bench`, or `python tests/bench/bench.py --help`."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __package__ in (None, ""):
    # Run as a script: its siblings are found as what they are in the tests, and none of them hides a standard module.
    sys.path[0] = str(ROOT)

import click  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from tests.bench import report  # noqa: E402
from tests.bench.chart import drawn  # noqa: E402
from tests.bench.measuring import Bench, Life, live  # noqa: E402
from tests.bench.parts import all_parts  # noqa: E402
from tests.bench.peers import PEERS, PeerUnavailable, RunningPeer  # noqa: E402
from tests.bench.processes import DidNotStart, LoadProcess, UpstreamProcess, described, ended_with, last_words, stop  # noqa: E402
from tests.bench.profiling import NoProfiler, Profile  # noqa: E402
from tests.bench.scenarios import SCENARIOS, Measured, Scenario  # noqa: E402
from tests.bench.targets import Asmodel, Target, direct  # noqa: E402

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
LIFE_NAME = "server: start, idle memory, memory growth"


def chosen(patterns: Sequence[str]) -> tuple[list[Scenario], bool]:
    """The scenarios whose names hold one of the patterns, and whether the server's life is among them."""

    def wanted(name: str) -> bool:
        return not patterns or any(re.search(pattern, name, re.IGNORECASE) for pattern in patterns)

    return [scenario for scenario in SCENARIOS if wanted(scenario.name)], wanted(LIFE_NAME)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--only",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Only scenarios in whose name this regular expression is found; repeatable.",
)
@click.option("--list", "listing", is_flag=True, help="Say which scenarios there are, and measure nothing.")
@click.option("--quick", is_flag=True, help="Three rounds of half a second: a first impression.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of each scenario (5).")
@click.option("--seconds", type=click.FloatRange(0.05, 600), help="Seconds of each target in each round (1.5).")
@click.option(
    "--against",
    type=FOLDER,
    multiple=True,
    metavar="DIR",
    help="Another checkout of asmodel, in the same rounds (git worktree add DIR COMMIT); repeatable.",
)
@click.option(
    "--peer",
    "peers",
    type=click.Choice(list(PEERS)),
    multiple=True,
    help="Another proxy in the same rounds, installed once; relay is the least that any in Python can do; repeatable.",
)
@click.option(
    "--memory",
    "requests",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Memory after N requests to memory after 10,000.",
)
@click.option(
    "--parts", "with_parts", is_flag=True, help="Only what the parts of a request cost, each by itself in this process."
)
@click.option(
    "--profile", "profiled", is_flag=True, help="Only where the server's time goes in the scenarios, by py-spy."
)
@click.option("--details", is_flag=True, help="All figures of all targets, not only those with a floor.")
@click.option("--json", "history", type=FILE, metavar="FILE", help="Append what was measured to this file, a line.")
@click.option("--page", type=FILE, metavar="FILE", help="Write the tables into this page, between its markers.")
@click.option("--chart", "picture", type=FILE, metavar="FILE", help="Draw the figures against their floors, as SVG.")
@click.option(
    "--from",
    "source",
    type=FILE,
    metavar="FILE",
    help="Measure nothing: --page and --chart from the newest lines of this file.",
)
@click.option("--strict", is_flag=True, help="Fail where a floor is missed.")
def main(
    patterns: tuple[str, ...],
    listing: bool,
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    against: tuple[Path, ...],
    peers: tuple[str, ...],
    requests: int,
    with_parts: bool,
    profiled: bool,
    details: bool,
    history: Path | None,
    page: Path | None,
    picture: Path | None,
    source: Path | None,
    strict: bool,
) -> None:
    """Measure what asmodel itself costs, and hold it against its floors.

    An upstream that answers at once or after 50 ms, a load that checks every answer, and `asmodel serve` as anyone
    runs it: three processes on this machine, which share its cores. In every round each target has its turn, so that
    noise falls on all alike; figures are medians over the rounds, and ratios are to the direct call of the same round.

    Ends with 1 where an answer of asmodel was wrong, and with --strict where a floor is missed.
    """
    scenarios, with_life = chosen(patterns)
    if listing:
        for scenario in scenarios:
            floors = ", ".join(f"{f.figure} {'>=' if f.at_least else '<='} {f.limit:g}" for f in scenario.floors)
            click.echo(f"{scenario.name:45} {floors}".rstrip())
        if with_life:
            click.echo(LIFE_NAME)
        return
    if not scenarios and not with_life and not with_parts and source is None:
        raise click.UsageError(f"no scenario has {' or '.join(map(repr, patterns))} in its name; --list shows them all")
    if source is not None:
        keep(report.newest(source), page, picture)
        return
    about = described() | {"rounds": rounds or (3 if quick else 5), "seconds": seconds or (0.5 if quick else 1.5)}
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    faults: list[str] = []
    short = False
    with tempfile.TemporaryDirectory(prefix="asmodel-bench-") as made, ended_with(signal.SIGTERM):
        folder = Path(made)
        try:
            if with_parts:
                parts = all_parts(folder)
                out.print(report.parts_table(parts))
                line = report.line(about, parts=parts)
            elif profiled:
                profiles = profile(folder, scenarios, about["seconds"] * about["rounds"], err)
                for name, found in profiles.items():
                    out.print(report.profile_table(f"{name}: functions by their own time", found.top()))
                    out.print(report.profile_table(f"{name}: our functions by all that they call", found.widest()))
                line = report.line(about, profiles=profiles)
            else:
                wanted = Wanted(scenarios, with_life or bool(requests), requests, peers, against)
                measured, life, about["peers"] = measure(folder, wanted, about, err)
                found_rows = report.rows(measured, life)
                out.print(report.table(found_rows))
                line = report.line(about, measured, life)
                if details:
                    out.print(report.details(line.get("figures", {})))
                faults = report.faults(measured, life)
                short = any(row.short for row in found_rows)
        except (DidNotStart, NoProfiler) as error:
            raise click.ClickException(str(error)) from None
    out.print(report.of_machine(about))
    if history is not None:
        report.append(history, line)
    keep({block: line for block in report.BLOCKS if block in line}, page, picture)
    for fault in faults:
        err.print(f"[red]broken[/] {fault}")
    ours = [fault for fault in faults if not any(f": {name}: " in fault for name in peers)]
    if ours or (strict and short):
        sys.exit(1)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and beside whom."""

    scenarios: Sequence[Scenario]
    life: bool
    requests: int
    peers: Sequence[str]
    against: Sequence[Path]


@contextmanager
def shown_on(err: Console) -> Generator[Progress]:
    """What is being done, how far it is, and how long it will still take."""
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f} %, left"))
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
        yield progress


def measure(
    folder: Path, wanted: Wanted, about: Mapping[str, Any], err: Console
) -> tuple[list[Measured], Life | None, dict[str, str]]:
    """Everything that is wanted, and the versions of the peers that were there."""
    measured: list[Measured] = []
    versions: dict[str, str] = {}
    life: Life | None = None
    with ExitStack() as stack:
        upstream = UpstreamProcess(folder)
        stack.callback(stop, upstream.process)
        load = LoadProcess(folder)
        stack.callback(stop, load.process)
        targets: list[Target] = [direct(upstream)]
        if wanted.scenarios:
            checkouts = {"asmodel": None} | {path.resolve().name: path.resolve() for path in wanted.against}
            for name, checkout in checkouts.items():
                server = Asmodel(upstream, folder / f"target-{name}", name, checkout)
                stack.callback(server.stop)
                targets.append(server)
            for name in dict.fromkeys(wanted.peers):
                try:
                    peer = RunningPeer(PEERS[name], folder / f"peer-{name}", upstream.base_url, err.print)
                except PeerUnavailable as error:
                    err.print(f"{name} is not measured: {error}")
                    continue
                stack.callback(peer.stop)
                targets.append(peer)
                versions[name] = peer.version
        bench = Bench(upstream, load, targets, about["rounds"], about["seconds"])
        progress = stack.enter_context(shown_on(err))
        task = progress.add_task("", total=sum(map(bench.planned, wanted.scenarios)) + (5.0 if wanted.life else 0.0))
        bench.tell = lambda what, more: progress.update(task, description=what, advance=more)
        for scenario in wanted.scenarios:
            measured.append(bench.measure(scenario))
            if not err.is_terminal:
                err.print(f"{scenario.name}: {report.summary(measured[-1])}")
        if wanted.life:
            # Not beside the others, whose memory and threads would be felt.
            for target in targets[1:]:
                target.stop()
            life = live(bench, folder / "life")
            if wanted.requests:
                progress.reset(task, total=wanted.requests)
                aged = live(bench, folder / "long", wanted.requests, starts=1)
                life = replace(aged, starts=life.starts, idle=life.idle)
        for target in targets:
            if isinstance(target, Asmodel) and any(name == target.name for one in measured for name, _ in one.wrong):
                err.print(f"the last words of {target.name}: {last_words(target.folder / 'server.log')}", markup=False)
    return measured, life, versions


def profile(folder: Path, scenarios: Sequence[Scenario], seconds: float, err: Console) -> dict[str, Profile]:
    """The server's functions in each scenario."""
    found: dict[str, Profile] = {}
    with ExitStack() as stack:
        upstream = UpstreamProcess(folder)
        stack.callback(stop, upstream.process)
        load = LoadProcess(folder)
        stack.callback(stop, load.process)
        server = Asmodel(upstream, folder / "target")
        stack.callback(server.stop)
        bench = Bench(upstream, load, [server])
        for scenario in scenarios:
            err.print(f"{scenario.name}: {seconds:g} s")
            found[scenario.name] = bench.profile(scenario, seconds, folder)
    return found


def keep(found: Mapping[str, Mapping[str, Any]], page: Path | None, picture: Path | None) -> None:
    """The page and the picture, of what there is for them."""
    if page is not None:
        try:
            page.write_text(report.on_page(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise click.ClickException(f"{page}: {error}") from None
    if picture is not None and "floors" in found:
        line = found["floors"]
        picture.write_text(drawn(report.rows_of(line), report.of_machine(line, brief=True)), encoding="utf-8")


if __name__ == "__main__":
    main()
