"""Write the paper's set-ups as files for `asmodel eval`: a line a question, and a table of systems each.

    python tests/paper/setups.py --data DIR --out FOLDER --seed 7

`docs/paper.md` has the command for each. Files of the tables have their lines in the order of the seed, the 40 that are
tuned on left out, so that `--limit N` without a seed of its own would not draw them either.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __package__ in (None, ""):
    # Run as a script: its siblings are found as what they are in the tests, and none of them hides a standard module.
    sys.path[0] = str(ROOT)

import click  # noqa: E402
from tests.paper.drawing import (  # noqa: E402
    CANDIDATES,
    Distractors,
    Item,
    drawn,
    hotpotqa,
    reported,
    strategyqa,
    tuned_on,
)

SYSTEMS: Mapping[str, str] = {
    "filter": """
[likelihood]
model = "evidence-filter"
[bm25]
model = "evidence-filter"
params = { ranking = "bm25" }
[bm25-then-likelihood]
model = "evidence-filter"
params = { prefilter = 20 }
""",
    "table1": """
[few-shot]
model = "relevance"
[few-shot-cot]
model = "relevance"
params = { think = true }
""",
    "table2": """
[no-cot]
model = "chain-of-thought"
params = { think = false }
[cot]
model = "chain-of-thought"
[tree-nll]
model = "evidence-qa"
params = { search = "nll", answers = "yes-no", keep = 1000 }
[tree-delta]
model = "evidence-qa"
params = { search = "delta", answers = "yes-no", keep = 1000 }
[golden-facts]
model = "golden-facts"
[golden-facts-cot]
model = "golden-facts"
params = { think = true }
[all-paragraphs]
model = "all-paragraphs"
[all-paragraphs-cot]
model = "all-paragraphs"
params = { think = true }
""",
    "end-to-end": """
[filter-then-tree]
model = "evidence-qa"
params = { keep = 4, search = "delta", answers = "yes-no" }
[bm25-then-tree]
model = "evidence-qa"
params = { ranking = "bm25", keep = 4, search = "delta", answers = "yes-no" }
[cot]
model = "chain-of-thought"
""",
    "hotpotqa-filter": """
[likelihood]
model = "evidence-filter"
[bm25]
model = "evidence-filter"
params = { ranking = "bm25" }
""",
    "hotpotqa-answers": """
[plain]
model = "plain"
[all-paragraphs]
model = "all-paragraphs"
[evidence-qa]
model = "evidence-qa"
params = { keep = 2 }
[bm25-then-answer]
model = "evidence-qa"
params = { ranking = "bm25", keep = 2 }
""",
}


def filtered(items: Iterable[Item], paragraphs: Mapping[str, str], distractors: Distractors, seed: int) -> list[Any]:
    """100 candidates a question, one of them right."""
    lines: list[Any] = []
    for item in items:
        draw = drawn(item, paragraphs, distractors, seed)
        documents = [{"id": id, "text": paragraphs[id]} for id in draw.candidates]
        lines.append({"id": item.id, "question": item.question, "documents": documents, "answer": [draw.right]})
    return lines


def questions(items: Iterable[Item], paragraphs: Mapping[str, str]) -> list[Any]:
    """What Table 2 needs: the facts, and all paragraphs of evidence."""
    return [
        {
            "id": item.id,
            "question": item.question,
            "answer": item.answer,
            "facts": list(item.facts),
            "evidence": [{"id": id, "text": paragraphs[id]} for id in item.evidence],
        }
        for item in items
    ]


def whole(items: Iterable[Item], paragraphs: Mapping[str, str], seed: int) -> list[Any]:
    """All of a question's evidence among 100 paragraphs: filter, then search."""
    lines: list[Any] = []
    for item in items:
        chance = random.Random(f"{seed}/{item.id}/whole")
        evidence = sorted(set(item.evidence))
        others = chance.sample(sorted(paragraphs.keys() - set(evidence)), CANDIDATES - len(evidence))
        pool = [*evidence, *others]
        chance.shuffle(pool)
        documents = [{"id": id, "text": paragraphs[id]} for id in pool]
        lines.append({"id": item.id, "question": item.question, "answer": item.answer, "documents": documents})
    return lines


def pairs(items: Sequence[Item], paragraphs: Mapping[str, str], seed: int, count: int = 300) -> list[Any]:
    """Table 1: as many paragraphs that are evidence for the question as such that are for another."""
    chance = random.Random(f"{seed}/pairs")
    lines: list[Any] = []
    for number in range(count):
        item = items[number // 2 % len(items)]
        right = number % 2 == 0
        among = sorted(item.evidence) if right else sorted(paragraphs.keys() - set(item.evidence))
        id = chance.choice(among)
        lines.append(
            {
                "id": f"{item.id}-{number}",
                "question": item.question,
                "paragraph": paragraphs[id],
                "answer": "yes" if right else "no",
            }
        )
    return lines


def hotpot(records: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Ten paragraphs a question, of which those with a supporting sentence are right."""
    lines: list[Any] = []
    for record in records:
        documents = [{"id": title, "text": f"{title}: {''.join(parts)}"} for title, parts in record["context"]]
        supporting = sorted({title for title, _ in record["supporting_facts"]})
        lines.append(
            {
                "id": record["id"],
                "question": record["question"],
                "answer": record["answer"],
                "supporting": supporting,
                "documents": documents,
            }
        )
    return lines


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--tune", is_flag=True, help="The 40 questions that are tuned on, in place of all others.")
def main(data: Path, out: Path, seed: int, tune: bool) -> None:
    """Write NAME.jsonl and NAME.toml of each set-up into a folder."""
    items, paragraphs = strategyqa(data)
    chosen = tuned_on(items, seed) if tune else reported(items, seed, len(items))
    setups: dict[str, list[Any]] = {
        "filter-random": filtered(chosen, paragraphs, "random", seed),
        "filter-hard": filtered(chosen, paragraphs, "hard", seed),
        "table1": pairs(chosen, paragraphs, seed),
        "table2": questions(chosen, paragraphs),
        "end-to-end": whole(chosen, paragraphs, seed),
        "hotpotqa": hotpot(hotpotqa(data)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in setups.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        click.echo(f"{out / name}.jsonl  {len(lines)} lines")
    for name, table in SYSTEMS.items():
        (out / f"{name}.toml").write_text(table.lstrip(), encoding="utf-8")


if __name__ == "__main__":
    main()
