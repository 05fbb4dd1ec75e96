"""The filter, measured as in the paper: among 100 paragraphs, where is the one that is evidence?

    python tests/paper/filter.py --data DIR --distractors random --questions 100 --seed 7
    python tests/paper/filter.py --data DIR --distractors hard --questions 100 --seed 7 --only-cached

All rows come of the same scores: one for each question and paragraph, bought once. They are bought paragraph by
paragraph, since a server that keeps what it has read then reads each paragraph once for all its questions.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __package__ in (None, ""):
    # Run as a script: its siblings are found as what they are in the tests, and none of them hides a standard module.
    sys.path[0] = str(ROOT)

import click  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tests.paper.asking import Asking, Question, run  # noqa: E402
from tests.paper.drawing import CANDIDATES, Distractors, Drawn, drawn, reported, strategyqa, tuned_on  # noqa: E402

from asmodel import Answer, Run, program  # noqa: E402
from asmodel.evaluation.estimates import mcnemar, wilson  # noqa: E402
from asmodel_programs.evidence_qa import bm25, question_given  # noqa: E402

TOPS = (1, 5, 10)
PREFILTERED = 20
"""Paragraphs that BM25 leaves for the likelihood, in the row of both; those that it does not leave are not found."""
PAPER = {1: 0.79, 5: 0.93}
"""With a model of 175 thousand million parameters, and random distractors."""


class Params(BaseModel):
    paragraph: str
    questions: list[str]


@program("questions-of-one-paragraph", params=Params)
async def questions_of_one_paragraph(run: Run[Params]) -> Answer:
    """Score each question after one paragraph, one after the other, so that the paragraph has been read already."""
    found = [(await run(question_given, run.params.paragraph, question)).mean for question in run.params.questions]
    return Answer(data=found)


async def scored(asking: Asking, draws: Sequence[Drawn], paragraphs: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """The mean log-likelihood by question's id and paragraph's id."""
    wanted: dict[str, list[Drawn]] = defaultdict(list)
    for draw in draws:
        for id in draw.candidates:
            wanted[id].append(draw)
    questions = [
        Question(
            program="questions-of-one-paragraph",
            text=id,
            params={"paragraph": paragraphs[id], "questions": [d.item.question for d in wanted[id]]},
            weight=len(wanted[id]),
        )
        for id in sorted(wanted)
    ]
    told = await asking.all(questions, f"{len(draws)} questions, {CANDIDATES} paragraphs each")
    scores: dict[tuple[str, str], float] = {}
    for id, answered in zip(sorted(wanted), told, strict=True):
        values: Any = answered.answer.data
        scores |= {(draw.item.id, id): value for draw, value in zip(wanted[id], values, strict=True)}
    return scores


def places(draw: Drawn, scores: Mapping[tuple[str, str], float], paragraphs: Mapping[str, str]) -> dict[str, int]:
    """At which place, from 1, the right paragraph stands, by each way of ranking; 101 where it was left out."""
    likely = {id: scores[draw.item.id, id] for id in draw.candidates}
    words = dict(
        zip(draw.candidates, bm25(draw.item.question, [paragraphs[id] for id in draw.candidates]), strict=True)
    )
    first = sorted(draw.candidates, key=lambda id: -words[id])[:PREFILTERED]

    def place(values: Mapping[str, float], among: Sequence[str]) -> int:
        # Who is as good as the right one counts as better: nothing is won by a tie.
        if draw.right not in among:
            return CANDIDATES + 1
        return sum(values[id] >= values[draw.right] for id in among)

    return {
        "likelihood": place(likely, draw.candidates),
        "BM25": place(words, draw.candidates),
        "BM25, then likelihood": place(likely, first),
    }


def table(found: Sequence[Mapping[str, int]], distractors: Distractors) -> Table:
    """Top-k of each way, with Wilson's intervals, and against BM25 question by question."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("ranking")
    for k in TOPS:
        shown.add_column(f"top-{k} %", justify="right")
        shown.add_column("95 %", justify="right")
    for k in TOPS:
        shown.add_column(f"top-{k}, BM25:\nwon, lost, p", justify="right")
    for way in found[0]:
        cells: list[str] = []
        against: list[str] = []
        for k in TOPS:
            hits = [places[way] <= k for places in found]
            interval = wilson(sum(hits), len(hits))
            cells += [f"{100 * interval.value:.1f}", f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"]
            others = [places["BM25"] <= k for places in found]
            won = sum(a and not b for a, b in zip(hits, others, strict=True))
            lost = sum(b and not a for a, b in zip(hits, others, strict=True))
            against.append("" if way == "BM25" else f"{won}, {lost}, {mcnemar(won, lost):.2g}")
        shown.add_row(way, *cells, *against)
    chance = [cell for k in TOPS for cell in (f"{100 * k / CANDIDATES:.1f}", "by count")]
    shown.add_row("random", *chance, *("" for _ in TOPS))
    if distractors == "random":
        paper = [cell for k in TOPS for cell in (f"{100 * PAPER[k]:.1f}" if k in PAPER else "not told", "")]
        shown.add_row("the paper, 175B", *paper, *("" for _ in TOPS))
    return shown


def kept(
    file: Path, seed: int, distractors: Distractors, draws: Sequence[Drawn], found: Sequence[Mapping[str, int]]
) -> None:
    """Write each question's places as JSON."""
    rows = [
        {"id": draw.item.id, "right": draw.right, "places": places} for draw, places in zip(draws, found, strict=True)
    ]
    told = {"seed": seed, "distractors": distractors, "questions": rows}
    file.write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--distractors", type=click.Choice(["random", "hard"]), default="random", show_default=True)
@click.option("--questions", type=click.IntRange(1), default=100, show_default=True, help="How many are reported.")
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--tune", is_flag=True, help="The 40 that are tuned on, in place of those that are reported.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings: another model.")
@click.option("--at-once", type=click.IntRange(1), default=6, show_default=True, help="Paragraphs read side by side.")
@click.option("--only-cached", is_flag=True, help="Buy nothing; end with an error where something is missing.")
@click.option("--json", "report", type=click.Path(dir_okay=False, path_type=Path), help="Each question's places.")
def main(
    data: Path,
    distractors: Distractors,
    questions: int,
    seed: int,
    tune: bool,
    config: Path | None,
    at_once: int,
    only_cached: bool,
    report: Path | None,
) -> None:
    """Print the table of the filter: top-1, top-5 and top-10."""
    items, paragraphs = strategyqa(data)
    chosen = tuned_on(items, seed) if tune else reported(items, seed, questions)
    draws = [drawn(item, paragraphs, distractors, seed) for item in chosen]

    async def measure(asking: Asking) -> None:
        scores = await scored(asking, draws, paragraphs)
        found = [places(draw, scores, paragraphs) for draw in draws]
        console = Console(highlight=False, width=140)
        kind = "that are tuned on, and not to be reported" if tune else "none of which was tuned on"
        console.print(f"{len(draws)} questions of seed {seed}, {kind}; {distractors} distractors\n")
        console.print(table(found, distractors))
        console.print(f"\n{asking.said()}")
        if report is not None:
            kept(report, seed, distractors, draws, found)

    run(measure, [questions_of_one_paragraph], config=config, only_cached=only_cached, at_once=at_once)


if __name__ == "__main__":
    main()
