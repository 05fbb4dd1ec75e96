"""What is measured, drawn from the data by a stated seed: the questions that are tuned on and those that are reported
are different ones, and so is nothing that a run of it prints from one run to the next."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asmodel_programs.evidence_qa import bm25

TUNED_ON = 40
"""Questions that come first in the order of a seed, and are never reported."""

CANDIDATES = 100
"""One paragraph that is evidence, and 99 of other questions: the set-up of the paper."""

Distractors = Literal["random", "hard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A StrategyQA question. `evidence` are ids of paragraphs."""

    id: str
    question: str
    answer: bool
    facts: Sequence[str]
    evidence: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A question with candidates, in an order that says nothing; `right` is the id of the one that is evidence."""

    item: Item
    right: str
    candidates: Sequence[str]


def strategyqa(folder: Path) -> tuple[list[Item], dict[str, str]]:
    """The questions and the paragraphs by id, from `strategyqa/questions.jsonl` and `strategyqa/paragraphs.json`."""
    lines = (folder / "strategyqa" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    items = [
        Item(id=r["qid"], question=r["question"], answer=r["answer"], facts=r["facts"], evidence=r["evidence"])
        for r in map(json.loads, lines)
    ]
    paragraphs: dict[str, str] = json.loads((folder / "strategyqa" / "paragraphs.json").read_text(encoding="utf-8"))
    return items, paragraphs


def hotpotqa(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "hotpotqa" / "distractor.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ordered(items: Sequence[Item], seed: int) -> list[Item]:
    """All of them, in the order of the seed: that of a hash over seed and id, so that more are more of the same."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}/{item.id}".encode()).digest())


def reported(items: Sequence[Item], seed: int, count: int) -> list[Item]:
    return ordered(items, seed)[TUNED_ON : TUNED_ON + count]


def tuned_on(items: Sequence[Item], seed: int) -> list[Item]:
    return ordered(items, seed)[:TUNED_ON]


def drawn(item: Item, paragraphs: Mapping[str, str], distractors: Distractors, seed: int) -> Drawn:
    """One of its paragraphs of evidence, and 99 paragraphs that are evidence for other questions only: any, or the
    nearest to the question by BM25."""
    chance = random.Random(f"{seed}/{item.id}")
    right = chance.choice(sorted(item.evidence))
    others = sorted(paragraphs.keys() - set(item.evidence))
    if distractors == "random":
        chosen = chance.sample(others, CANDIDATES - 1)
    else:
        near = bm25(item.question, [paragraphs[id] for id in others])
        order = sorted(range(len(others)), key=lambda i: (-near[i], others[i]))
        chosen = [others[i] for i in order[: CANDIDATES - 1]]
    candidates = [right, *chosen]
    chance.shuffle(candidates)
    return Drawn(item=item, right=right, candidates=candidates)
