"""Every question asked of every system, several at once, and each answer scored.

Nothing is stored but what the cache stores, step by step. So an evaluation that was interrupted is gone on with by
asking all of it again, and one that is done can be repeated without buying anything.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asmodel.budget import Budget
from asmodel.calls import CachePolicy, Message
from asmodel.errors import AsmodelError, ConfigurationError, NotCached
from asmodel.evaluation.examples import Example
from asmodel.evaluation.judging import judge
from asmodel.evaluation.ledger import Account, Ledger, Taken
from asmodel.evaluation.scorers import Given, Measure, Scorer, Unread, Unscorable
from asmodel.evaluation.systems import System
from asmodel.models import ServedProgram
from asmodel.programs import Answer
from asmodel.service import Asked, Job

if TYPE_CHECKING:
    from asmodel.app import Parts

Ending: TypeAlias = Literal["answered", "error", "not_cached"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One score; None where it could not be told. `trouble` says why, or why the answer is not even wrong."""

    value: float | None
    trouble: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One system and one question, asked once."""

    system: str
    example: Example
    draw: int
    """Which of its answers to the question it is; what it samples is drawn anew in each."""
    ending: Ending
    answer: Answer | None
    error: AsmodelError | None
    run_id: str
    scores: dict[str, Scored]
    taken: Taken
    """What it takes if nothing of it is in the cache."""
    budget: Budget
    """What was really bought, and found, now."""
    seconds: float
    """Of this run, as it was now."""
    account: Account


@dataclass(slots=True)
class Judged:
    """What the judges of one scorer have taken, and bought now."""

    takings: list[Taken] = field(default_factory=list[Taken])
    budgets: list[Budget] = field(default_factory=list[Budget])


@dataclass(slots=True)
class Evaluated:
    """What came of it; of an interrupted one, as far as it came."""

    results: list[Result] = field(default_factory=list[Result])
    """By question, by system within one, and by draw within that."""
    judged: dict[str, Judged] = field(default_factory=dict[str, Judged])
    seconds: float = 0.0
    interrupted: bool = False


class Asker:
    """Asks systems by the service that a server has, and keeps the account of each run. One an evaluation."""

    def __init__(self, parts: Parts, *, only_cached: bool) -> None:
        self._parts = parts
        self._only_cached = only_cached
        self._cache = CachePolicy(mode="only" if only_cached else "on")
        self._ledger = Ledger(parts.models.witness)
        parts.models.witness = self._ledger
        self.judged: dict[str, Judged] = {}

    async def ask(self, system: System, example: Example, draw: int = 0) -> Result:
        """One question, as the choice `draw` of a request. Raises nothing but what ends the evaluation."""
        messages, params = system.messages_for(example), system.params_for(example)
        asked = replace(self._asked(system, messages, params), documents=example.documents)
        run = await self._run(system, asked, draw)
        return Result(
            system=system.name,
            example=example,
            draw=draw,
            ending=run.ending,
            answer=run.answer,
            error=run.error,
            run_id=run.id,
            scores={},
            taken=run.account.took(),
            budget=run.budget,
            seconds=run.seconds,
            account=run.account,
        )

    async def check(self, system: System, example: Example) -> None:
        """Raises InvalidRequest where the system can answer no question at all. Asks nothing."""
        messages, params = system.messages_for(example), system.params_for(example)
        await self._job(system, self._asked(system, messages, params))

    def judging(self, scorer: str, system: System) -> Measure:
        """The measure of a scorer that asks this system."""
        book = self.judged.setdefault(scorer, Judged())

        async def ask(judging: System, messages: tuple[Message, ...], params: dict[str, Any]) -> str:
            run = await self._run(judging, self._asked(judging, messages, params))
            book.takings.append(run.account.took())
            book.budgets.append(run.budget)
            if run.answer is None:
                raise run.error or NotCached("the judge's answer is not in the cache")
            return run.answer.text

        return judge(system, ask)

    def _asked(self, system: System, messages: tuple[Message, ...], params: dict[str, Any]) -> Asked:
        return Asked(messages=messages, params=params, roles=dict(system.roles), cache=self._cache)

    async def _job(self, system: System, asked: Asked) -> Job:
        if not self._only_cached:
            return await self._parts.service.prepare(system.model, asked)
        # `prepare` may try what an upstream can do, which asks it; and nobody is to be asked.
        model, params = system.model, None
        if isinstance(model, ServedProgram):
            params = model.program.read_params({**model.params, **asked.params})
        return Job(id=f"run_{secrets.token_hex(8)}", model=model, asked=asked, budget=Budget(), params=params)

    async def _run(self, system: System, asked: Asked, draw: int = 0) -> _Ran:
        service, began = self._parts.service, time.monotonic()
        ran = _Ran()
        try:
            job = await self._job(system, asked)
            ran.id, ran.budget, ran.account = job.id, job.budget, self._ledger.open(job.id)
            try:
                outcome = await service.answer(job, draw)
            finally:
                self._ledger.close(job.id)
            ran.answer = outcome.answer
            if not ran.account.entries and outcome.reply is not None:
                # An upstream that is passed through makes no step that a witness could see.
                kind, name = "chat", system.asks
                self._ledger.note(ran.account, job.id, kind, "", name, outcome.reply, began)
        except NotCached:
            ran.account.not_cached += 1
        except AsmodelError as error:
            ran.error = error
        if ran.account.not_cached:
            # Also where the program made do without it: it is not the answer that it gives.
            ran.answer, ran.error, ran.ending = None, None, "not_cached"
        elif ran.error is not None:
            ran.ending = "error"
        ran.seconds = time.monotonic() - began
        return ran


@dataclass(slots=True)
class _Ran:
    id: str = ""
    ending: Ending = "answered"
    answer: Answer | None = None
    error: AsmodelError | None = None
    budget: Budget = field(default_factory=Budget)
    account: Account = field(default_factory=Account)
    seconds: float = 0.0


class Stopped(AsmodelError):
    """An error has ended the evaluation, because it was to."""


async def evaluate(
    asker: Asker,
    systems: Sequence[System],
    examples: Sequence[Example],
    scorers: Sequence[Scorer],
    *,
    repeats: int = 1,
    at_once: int = 4,
    strict: bool = False,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Evaluated:
    """Ask `at_once` questions at a time, question by question, so that what an interruption leaves can be compared.

    Each is asked `repeats` times.

    Where the task is cancelled, what is under way is given up, and what is done is given. With `strict`, the first
    error raises Stopped. Raises ConfigurationError where the data is not of a scorer's kind.
    """
    evaluated = Evaluated(judged=asker.judged)
    began = time.monotonic()
    places = list(itertools.product(range(len(examples)), range(len(systems)), range(repeats)))
    work = iter(places)
    done: dict[tuple[int, int, int], Result] = {}

    async def worker(work: Iterator[tuple[int, int, int]]) -> None:
        for e, s, draw in work:
            result = await asker.ask(systems[s], examples[e], draw)
            result = replace(result, scores=await _scores(result, scorers))
            done[e, s, draw] = result
            if strict and result.error is not None:
                raise Stopped(f'{systems[s].name}, question "{examples[e].id}": {result.error}')
            on_result(result)

    workers = [asyncio.create_task(worker(work)) for _ in range(min(at_once, len(places)))]
    try:
        # The first of them to fail ends the others.
        await asyncio.gather(*workers)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            raise
        task.uncancel()
        evaluated.interrupted = True
    finally:
        for each in workers:
            each.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        evaluated.results = [done[place] for place in sorted(done)]
        evaluated.seconds = time.monotonic() - began
    return evaluated


async def _scores(result: Result, scorers: Sequence[Scorer]) -> dict[str, Scored]:
    if result.ending == "not_cached":
        return {}
    scores: dict[str, Scored] = {}
    for scorer in scorers:
        if result.answer is None:
            # No answer is no right answer.
            scores[scorer.name] = Scored(value=0.0)
            continue
        reference = None if scorer.reference is None else scorer.reference.of(result.example.record)
        given = Given(example=result.example, answer=result.answer, reference=reference)
        try:
            value = scorer.measure(given)
            scores[scorer.name] = Scored(value=float(value if isinstance(value, (int, float)) else await value))
        except Unscorable as error:
            raise ConfigurationError(f"line {result.example.line}: --score {scorer.name}: {error}") from None
        except Unread as error:
            scores[scorer.name] = Scored(value=0.0, trouble=str(error))
        except (ValueError, AsmodelError) as error:
            scores[scorer.name] = Scored(value=None, trouble=str(error))
    return scores
