"""What an evaluation comes to: figures of each system, comparisons, and every question's answers. It is its own JSON.

Two groups of figures are kept apart. `taken` is what a question takes if nothing of it is in the cache, with the prices
and times of when it was bought, and so is the same however often it is asked; `now` is what this run bought and found.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from asmodel import __version__
from asmodel.budget import Budget
from asmodel.evaluation import estimates
from asmodel.evaluation.evaluating import Evaluated, Result
from asmodel.evaluation.examples import Data, Example, Sample
from asmodel.evaluation.fields import text_of
from asmodel.evaluation.ledger import Taken
from asmodel.evaluation.scorers import Scorer
from asmodel.evaluation.systems import System

Kind: TypeAlias = Literal["proportion", "mean"]

FORMAT: Literal["asmodel.eval/1"] = "asmodel.eval/1"
"""Of the JSON; another number where a reader of this one could go wrong."""

FEW = 30
"""Questions below which intervals and tests are said to rest on few."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Drawn(_Value):
    """Which questions were asked."""

    file: str
    sha256: str
    lines: int
    excluded: int
    of: int
    seed: int | None
    skipped: int
    asked: int


class Score(_Value):
    """A mean over `n` questions, of each of which it is the mean over its draws; None if n is 0.

    The 95 % interval is over questions: Wilson's for a proportion, else bootstrap. The latter is taken for a proportion
    too, where draws of one question differ.
    """

    kind: Kind
    n: int
    value: float | None
    low: float | None
    high: float | None
    draws: list[float]
    """The score of each draw alone: the first answers to all questions, the second ones, and so on."""
    spread: float | None
    """Their standard deviation: how far another draw would be off. None where there is but one."""
    answers: int
    """That have a score, all draws together."""
    untold: int
    """Answers that could not be scored."""
    unread: dict[str, int]
    """Answers that are not of the kind that was asked for, and count as wrong, by what they are."""


class Takes(_Value):
    """What is taken; tokens and calls in all, `cost` in US dollars or None where any price is unknown.

    Of a question that was asked several times, each time counts as a question.
    """

    questions: int
    steps: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    cost: float | None


class Now(_Value):
    """What this run bought and found; `seconds` of wall time, added up over its questions."""

    steps: int
    calls: int
    hits: int
    joined: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    seconds: float


class Latency(_Value):
    """Seconds a question was waiting for models, of the `n` that were answered, each call as when it was bought."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float


class SystemFigures(_Value):
    name: str
    model: str
    params: dict[str, Any]
    roles: dict[str, str]
    prompt: str | None
    digest: str | None
    """Of the program's source."""
    not_given: list[str]
    """Parameters for all that this one has not, and so was not given."""
    questions: int
    """That were asked and are counted, each once."""
    answered: int
    errors: int
    not_cached: int
    """Answers, of which there are as many to a question as it was asked times."""
    scores: dict[str, Score]
    takes: Takes
    latency: Latency | None
    now: Now


class Comparison(_Value):
    """One system against another, question by question, over those that both have a score for.

    Of a question that was asked several times, it is the means over its draws that are compared.
    """

    scorer: str
    system: str
    against: str
    n: int
    won: int
    lost: int
    alike: int
    both: int | None
    """Both right, in all draws, for a proportion; `neither` are both wrong."""
    neither: int | None
    difference: float
    low: float
    high: float
    """Of the difference: 95 % by a paired bootstrap."""
    p: float | None
    """Exact McNemar, which is a sign test on the questions that differ, two-sided; None for a mean."""
    p_holm: float | None
    """The same, adjusted for all comparisons by this scorer."""
    remark: str | None


class JudgeFigures(_Value):
    scorer: str
    takes: Takes
    now: Now


class StepTaken(_Value):
    """One step's answer. `at` and `seconds` are of the purchase: `at` from the first of the question's."""

    program: str
    step: str
    kind: str
    upstream: str
    source: str
    at: float
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    said: str


class Answered(_Value):
    """One system's answer to one question."""

    system: str
    draw: int
    """From 0; which it is of its answers to that question."""
    ending: Literal["answered", "error", "not_cached"]
    text: str | None
    data: Any
    citations: list[str]
    finish: str | None
    error: str | None
    scores: dict[str, float | None]
    troubles: dict[str, str]
    """Why a score could not be told, or is 0 because the answer is not of the kind that was asked for."""
    run_id: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    seconds: float
    bought: int
    """Calls that were made now."""
    seconds_now: float
    steps: list[StepTaken]


class Asked(_Value):
    """One question and all answers to it."""

    id: str
    line: int
    question: str
    references: dict[str, Any]
    """What is right, by scorer."""
    answers: list[Answered]


class Report(_Value):
    format: Literal["asmodel.eval/1"] = FORMAT
    asmodel: str
    made_at: float
    """Unix seconds."""
    data: Drawn
    seed: int
    """Of the bootstraps."""
    repeats: int
    """How often each system was asked each question."""
    at_once: int
    seconds: float
    """Of wall time, for all of it."""
    interrupted: bool
    systems: list[SystemFigures]
    comparisons: list[Comparison]
    judges: list[JudgeFigures]
    examples: list[Asked]

    @property
    def scorers(self) -> list[str]:
        return list(self.systems[0].scores)


def report(
    evaluated: Evaluated,
    *,
    data: Data,
    sample: Sample,
    systems: Sequence[System],
    scorers: Sequence[Scorer],
    seed: int,
    at_once: int,
    repeats: int = 1,
    all_pairs: bool = False,
    not_given: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """The figures. The same results and seed give the same ones, however they came out of cache or purchase."""
    kinds: dict[str, Kind] = {scorer.name: _kind(scorer, evaluated.results) for scorer in scorers}
    by_system = {system.name: [r for r in evaluated.results if r.system == system.name] for system in systems}
    return Report(
        asmodel=__version__,
        made_at=time.time(),
        data=Drawn(
            file=data.path.name,
            sha256=data.digest,
            lines=len(data.examples),
            excluded=sample.excluded,
            of=sample.of,
            seed=sample.seed,
            skipped=sample.skipped,
            asked=len(sample.examples),
        ),
        seed=seed,
        repeats=repeats,
        at_once=at_once,
        seconds=evaluated.seconds,
        interrupted=evaluated.interrupted,
        systems=[
            _figures(system, by_system[system.name], kinds, seed, list((not_given or {}).get(system.name, ())))
            for system in systems
        ],
        comparisons=[
            each
            for name, kind in kinds.items()
            for each in _comparisons(name, kind, by_system, all_pairs=all_pairs, seed=seed)
        ],
        judges=[
            JudgeFigures(scorer=name, takes=_takes(judged.takings), now=_now(judged.budgets, 0.0))
            for name, judged in evaluated.judged.items()
        ],
        examples=_examples(evaluated.results, scorers),
    )


def _kind(scorer: Scorer, results: Sequence[Result]) -> Kind:
    if scorer.proportion is not None:
        return "proportion" if scorer.proportion else "mean"
    values = {scored.value for r in results if (scored := r.scores.get(scorer.name)) and scored.value is not None}
    return "proportion" if values <= {0.0, 1.0} else "mean"


def _figures(
    system: System,
    results: Sequence[Result],
    kinds: Mapping[str, Kind],
    seed: int,
    not_given: list[str],
) -> SystemFigures:
    answered = [r for r in results if r.ending == "answered"]
    asked = [r for r in results if r.ending != "not_cached"]
    program = getattr(system.model, "program", None)
    waited = sorted(r.taken.seconds for r in answered)
    return SystemFigures(
        name=system.name,
        model=system.asks,
        params=dict(system.params),
        roles=dict(system.roles),
        prompt=system.prompt,
        digest=None if program is None else program.digest,
        not_given=not_given,
        questions=len({r.example.id for r in asked}),
        answered=len(answered),
        errors=len(asked) - len(answered),
        not_cached=len(results) - len(asked),
        scores={name: _score(kind, name, asked, seed) for name, kind in kinds.items()},
        takes=_takes([r.taken for r in asked]),
        latency=Latency(
            n=len(waited),
            mean=_mean(waited),
            p50=estimates.percentile(waited, 0.5),
            p90=estimates.percentile(waited, 0.9),
            p99=estimates.percentile(waited, 0.99),
        )
        if waited
        else None,
        now=_now([r.budget for r in results], math.fsum(r.seconds for r in results)),
    )


def _score(kind: Kind, name: str, results: Sequence[Result], seed: int) -> Score:
    scored = [r.scores[name] for r in results]
    values = [s.value for s in scored if s.value is not None]
    means = list(_by_question(results, name).values())
    found: estimates.Interval | None = None
    if kind == "proportion" and means and set(means) <= {0.0, 1.0}:
        found = estimates.wilson(sum(mean == 1.0 for mean in means), len(means))
    elif means:
        found = estimates.bootstrap(means, seed=seed)
    by_draw: dict[int, list[float]] = {}
    for r in results:
        if (value := r.scores[name].value) is not None:
            by_draw.setdefault(r.draw, []).append(value)
    draws = [_mean(by_draw[draw]) for draw in sorted(by_draw)]
    return Score(
        kind=kind,
        n=len(means),
        value=None if found is None else found.value,
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        draws=draws,
        spread=estimates.spread(draws) if len(draws) > 1 else None,
        answers=len(values),
        untold=len(scored) - len(values),
        unread=dict(Counter(s.trouble for s in scored if s.value is not None and s.trouble is not None)),
    )


def _by_question(results: Sequence[Result], scorer: str) -> dict[str, float]:
    """Of each question that has a score, its mean over the draws."""
    values: dict[str, list[float]] = {}
    for r in results:
        if (scored := r.scores.get(scorer)) and scored.value is not None:
            values.setdefault(r.example.id, []).append(scored.value)
    return {id: _mean(own) for id, own in values.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _comparisons(
    scorer: str,
    kind: Kind,
    by_system: Mapping[str, Sequence[Result]],
    *,
    all_pairs: bool,
    seed: int,
) -> list[Comparison]:
    values = {name: _by_question(results, scorer) for name, results in by_system.items()}
    names = list(values)
    pairs = (
        [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]
        if all_pairs
        else [(a, names[0]) for a in names[1:]]
    )
    found = [_compared(scorer, kind, a, b, values, seed) for a, b in pairs]
    made = [c for c in found if c is not None]
    if kind == "proportion" and len(made) > 1:
        adjusted = estimates.holm([c.p if c.p is not None else 1.0 for c in made])
        made = [c.model_copy(update={"p_holm": p}) for c, p in zip(made, adjusted, strict=True)]
    return made


def _compared(
    scorer: str,
    kind: Kind,
    system: str,
    against: str,
    values: Mapping[str, Mapping[str, float]],
    seed: int,
) -> Comparison | None:
    ids = [id for id in values[against] if id in values[system]]
    if not ids:
        return None
    pairs = [(values[system][id], values[against][id]) for id in ids]
    won, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    difference = estimates.bootstrap([a - b for a, b in pairs], seed=seed)
    binary = kind == "proportion"
    p = estimates.mcnemar(won, lost) if binary else None
    return Comparison(
        scorer=scorer,
        system=system,
        against=against,
        n=len(pairs),
        won=won,
        lost=lost,
        alike=len(pairs) - won - lost,
        both=sum(a == b == 1.0 for a, b in pairs) if binary else None,
        neither=sum(a == b == 0.0 for a, b in pairs) if binary else None,
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        p=p,
        p_holm=p,
        remark=_remark(len(pairs), won + lost, binary),
    )


def _remark(n: int, differ: int, binary: bool) -> str | None:
    """What a reader should know before believing it."""
    if binary and not differ:
        return f"right and wrong on the same {n} questions, which shows no difference and excludes none"
    if binary and (least := estimates.mcnemar(differ, 0)) > 0.05:
        return f"differs on {differ} of {n} questions, too few to tell anything by: p is {least:.2g} at the least"
    return f"{n} questions are few" if n < FEW else None


def _takes(takings: Sequence[Taken]) -> Takes:
    costs = [taken.cost for taken in takings]
    return Takes(
        questions=len(takings),
        steps=sum(taken.steps for taken in takings),
        calls=sum(taken.calls for taken in takings),
        prompt_tokens=sum(taken.prompt_tokens for taken in takings),
        completion_tokens=sum(taken.completion_tokens for taken in takings),
        estimated=any(taken.estimated for taken in takings),
        cost=_sum(costs),
    )


def _now(budgets: Sequence[Budget], seconds: float) -> Now:
    return Now(
        steps=sum(b.steps for b in budgets),
        calls=sum(b.calls for b in budgets),
        hits=sum(b.hits for b in budgets),
        joined=sum(b.joined for b in budgets),
        prompt_tokens=sum(b.usage.prompt_tokens for b in budgets),
        completion_tokens=sum(b.usage.completion_tokens for b in budgets),
        cost=_sum([b.cost for b in budgets]),
        seconds=seconds,
    )


def _sum(costs: Sequence[float | None]) -> float | None:
    known = [cost for cost in costs if cost is not None]
    return math.fsum(known) if len(known) == len(costs) else None


def _examples(results: Sequence[Result], scorers: Sequence[Scorer]) -> list[Asked]:
    grouped: dict[str, tuple[Example, list[Result]]] = {}
    for result in results:
        grouped.setdefault(result.example.id, (result.example, []))[1].append(result)
    return [
        Asked(
            id=example.id,
            line=example.line,
            question=example.question or text_of(dict(example.params)),
            references={s.name: s.reference.of(example.record) for s in scorers if s.reference is not None},
            answers=[_answered(result) for result in own],
        )
        for example, own in grouped.values()
    ]


def _answered(result: Result) -> Answered:
    answer, taken = result.answer, result.taken
    entries = sorted(result.account.entries, key=lambda entry: (entry.bought_at, entry.began))
    first = min((entry.bought_at for entry in entries), default=0.0)
    return Answered(
        system=result.system,
        draw=result.draw,
        ending=result.ending,
        text=None if answer is None else answer.text,
        data=None if answer is None else answer.data,
        citations=[] if answer is None else [citation.id for citation in answer.citations],
        finish=None if answer is None else answer.finish,
        error=None if result.error is None else f"{type(result.error).__name__}: {result.error}",
        scores={name: scored.value for name, scored in result.scores.items()},
        troubles={name: scored.trouble for name, scored in result.scores.items() if scored.trouble is not None},
        run_id=result.run_id,
        calls=taken.calls,
        prompt_tokens=taken.prompt_tokens,
        completion_tokens=taken.completion_tokens,
        cost=taken.cost,
        seconds=taken.seconds,
        bought=result.budget.calls,
        seconds_now=result.seconds,
        steps=[
            StepTaken(
                program=entry.program,
                step=entry.step,
                kind=entry.kind,
                upstream=entry.upstream,
                source=entry.source,
                at=entry.bought_at - first,
                seconds=entry.seconds,
                prompt_tokens=entry.usage.prompt_tokens,
                completion_tokens=entry.usage.completion_tokens,
                said=entry.said,
            )
            for entry in entries
        ],
    )
