"""A model, or a program, as the judge of an answer: it is shown question, right answer and answer, and says how right.

A program that has parameters `question`, `reference` or `answer` is given them; any other, and a plain model, is shown
them in one message. The judge says yes or no, or a number. Its steps are cached like anybody's, and its costs are kept
apart from those of what it judges.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from asmodel.calls import Message
from asmodel.evaluation.fields import text_of
from asmodel.evaluation.scorers import Given, Measure, last_number, yes_or_no
from asmodel.evaluation.systems import System

Ask: TypeAlias = Callable[[System, tuple[Message, ...], dict[str, Any]], Awaitable[str]]
"""Asks a system, with messages and parameters, for its answer's text."""

_SHOWN = """\
Question: {question}

Right answer: {reference}

Answer to judge: {answer}

Does the answer to judge say the same as the right answer? Say yes or no, and nothing else."""


def judge(system: System, ask: Ask) -> Measure:
    """The measure that asks this system."""

    async def judged(given: Given) -> float:
        reference = given.reference
        right = text_of({True: "yes", False: "no"}[reference] if isinstance(reference, bool) else reference)
        told = {"question": given.example.question, "reference": right, "answer": given.answer.text}
        params = {name: value for name, value in told.items() if system.has(name) and system.takes is not None}
        shown = given.example.question if params else _filled(told)
        said = await ask(system, (Message("user", shown),), {**params, **system.params})
        return verdict(said, system.name)

    return judged


def _filled(told: dict[str, str]) -> str:
    # By one pass, so that braces in an answer stay what they are.
    return re.sub(r"\{(question|reference|answer)\}", lambda found: told[found[1]], _SHOWN)


def verdict(said: str, judge: str) -> float:
    """A judge's text as a number: 1 for yes, 0 for no, else its last number. Raises ValueError."""
    alone = said.strip().rstrip(".%")
    number = last_number(alone)
    if number is not None and not any(c.isalpha() for c in alone):
        return number
    yes = yes_or_no(said)
    if yes is not None:
        return float(yes)
    if number is not None:
        return number
    raise ValueError(f'the judge "{judge}" said neither yes nor no, nor a number')
