"""The product, in this process: its service with the cache and the upstreams of the settings, asked many questions."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asmodel import Answer, Message, Program
from asmodel.app import build, onion
from asmodel.calls import CachePolicy
from asmodel.errors import AsmodelError, NotCached
from asmodel.models import Models, ServedProgram
from asmodel.preparing import prepared
from asmodel.service import Asked, Service
from asmodel.settings import Settings, load


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one program is asked."""

    program: str
    text: str
    params: Mapping[str, Any]
    weight: int = 1
    """How far it moves the bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An answer, and what it took now: calls that were bought, and steps that were found in the cache."""

    answer: Answer
    calls: int
    hits: int


class Asking:
    """Many questions, some at once, with a bar that says how long still. What is cached is not bought again."""

    def __init__(self, service: Service, *, only_cached: bool, at_once: int) -> None:
        self._service = service
        self._policy = CachePolicy(mode="only") if only_cached else None
        self._at_once = at_once
        self.bought = 0
        self.found = 0

    async def one(self, question: Question) -> Told:
        """Raises AsmodelError."""
        asked = Asked(messages=(Message("user", question.text),), params=dict(question.params), cache=self._policy)
        job = await self._service.prepare(self._service.models.find(question.program), asked)
        try:
            outcome = await self._service.answer(job, 0, None)
        finally:
            self.bought += job.budget.calls
            self.found += job.budget.hits
        return Told(answer=outcome.answer, calls=job.budget.calls, hits=job.budget.hits)

    async def all(self, questions: Sequence[Question], what: str) -> list[Told]:
        """The answers, in the order of the questions. Ends the process where something is not in the cache and may not
        be bought, or cannot be answered."""
        slots = asyncio.Semaphore(self._at_once)
        missing = 0

        async def ask(question: Question) -> Told | None:
            nonlocal missing
            async with slots:
                try:
                    told = await self.one(question)
                except NotCached:
                    missing += 1
                    return None
                finally:
                    bar.advance(task, question.weight)
            return told

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=sum(question.weight for question in questions))
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(ask(question)) for question in questions]
            except* AsmodelError as errors:
                sys.exit(f"{errors.exceptions[0]}")
        if missing:
            sys.exit(f"{missing} of {len(questions)} runs are not wholly in the cache; run it without --only-cached")
        return [told for told in (task.result() for task in tasks) if told is not None]

    def said(self) -> str:
        """What was bought and what was found, for the end of a table."""
        if not self.bought:
            return f"Nothing was bought: all {self.found} steps are from the cache."
        return f"Bought {self.bought} calls; {self.found} steps are from the cache."


def run(
    main: Callable[[Asking], Any],
    programs: Sequence[Program[Any, Any]],
    *,
    config: Path | None,
    only_cached: bool,
    at_once: int,
    changed: Callable[[Settings], Settings] = lambda settings: settings,
) -> None:
    """Build what the settings say, with these programs alone, and let `main` ask them."""
    settings = changed(load(config))
    parts = build(settings)

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Asking]:
        await parts.open()
        try:
            wrapped = onion(parts.providers, settings.effective_upstreams, parts.store, parts.metrics)
            models = Models(programs, wrapped, roles=settings.roles, store=parts.store)
            service = Service(models, store=parts.store, limits=settings.limits.run)
            service.ready.set()
            assert all(isinstance(models.find(program.name), ServedProgram) for program in programs)
            yield Asking(service, only_cached=only_cached, at_once=at_once)
        finally:
            await parts.close()

    async def whole() -> None:
        async with opened() as asking:
            await main(asking)

    with prepared(parts):
        asyncio.run(whole())
