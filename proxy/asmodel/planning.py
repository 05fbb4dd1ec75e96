"""What a run would find in the cache, and what it would buy, as far as that can be known without buying anything.

The program itself runs, with its steps answered from the cache alone. A step that is not there is noted and never
returns, so what would follow from its answer is not known; what goes on beside it is. Tools are looked up too, and are
never called.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asmodel.calls import JSON, CachePolicy, Call, Capabilities, Chat, Completion, Reply, Terms, key
from asmodel.errors import AsmodelError, InvalidRequest, NotCached
from asmodel.protocols import Counting, Upstream

if TYPE_CHECKING:
    from asmodel.models import Models
    from asmodel.protocols import Cache
    from asmodel.run import Request

Finding: TypeAlias = Literal["hit", "buy", "share", "tool"]
"""In the cache; to be bought; equal to one that is to be bought; a tool whose result is not there."""

SETTLED = 0.25
"""Seconds without news after which what has not returned is taken to wait for an answer that is to be bought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """One step, or tool, that the run would make."""

    program: str
    step: str
    finding: Finding
    draw: str | None = None
    tokens: int = 0
    """What a hit saves."""
    cost: float | None = None
    """US dollars that a hit saves; None where the price was not known."""


@dataclass(slots=True)
class Plan:
    """What is foreseen of one run."""

    steps: list[Foreseen] = field(default_factory=list[Foreseen])
    whole: bool = False
    """Whether the run came to its end: every step was found, and the answer is known."""
    error: str | None = None
    """How the run would end, if what is known already makes it end in an error."""
    looking: int = 0
    """Steps that are being looked up."""
    _wanted: set[str] = field(default_factory=set[str])

    def count(self, finding: Finding) -> int:
        return sum(step.finding == finding for step in self.steps)

    @property
    def rows(self) -> list[tuple[str, str, int, int]]:
        """Program, step, how many are found and how many are not, in the order in which they were first met."""
        found = Counter((s.program, s.step) for s in self.steps if s.finding == "hit")
        wanting = Counter((s.program, s.step) for s in self.steps if s.finding in ("buy", "tool"))
        names = dict.fromkeys((s.program, s.step) for s in self.steps)
        return [(*name, found[name], wanting[name]) for name in names]

    async def stop(self, program: str, step: str, finding: Finding, draw: str | None = None) -> Any:
        """Note what is not there, and never return."""
        self.steps.append(Foreseen(program=program, step=step, finding=finding, draw=draw))
        return await asyncio.get_running_loop().create_future()

    def wanted(self, k: str) -> bool:
        """Whether this key is to be bought already; if not, it is now."""
        before = k in self._wanted
        self._wanted.add(k)
        return before


class Planned:
    """An upstream of which nothing is asked but what is in the cache."""

    count: Callable[[str], Awaitable[int]]

    def __init__(self, inner: Upstream, plan: Plan) -> None:
        self._inner = inner
        self._plan = plan
        if isinstance(inner, Counting):
            self.count = inner.count

    @property
    def name(self) -> str:
        name = getattr(self._inner, "name", None)
        return name if isinstance(name, str) else self.identity

    @property
    def identity(self) -> str:
        return self._inner.identity

    async def capabilities(self) -> Capabilities:
        return await self._inner.capabilities()

    async def send(self, call: Call, terms: Terms) -> Reply:
        plan = self._plan
        draw = call.draw if isinstance(call, (Chat, Completion)) else None
        plan.looking += 1
        try:
            reply = None
            if terms.cache.mode in ("on", "only"):
                reply = await self._inner.send(call, replace(terms, cache=replace(terms.cache, mode="only")))
        except NotCached:
            reply = None
        finally:
            plan.looking -= 1
        if reply is None:
            shared = terms.cache.mode != "off" and plan.wanted(key(call, terms.scope))
            never: Reply = await plan.stop(terms.program, terms.step, "share" if shared else "buy", draw)
            return never
        foreseen = Foreseen(
            program=terms.program,
            step=terms.step,
            finding="hit",
            draw=draw,
            tokens=reply.usage.total_tokens,
            cost=reply.cost,
        )
        plan.steps.append(foreseen)
        return reply


async def foresee(
    models: Models,
    name: str,
    request: Request,
    *,
    params: Mapping[str, JSON] | None = None,
    roles: Mapping[str, str] | None = None,
    cache: CachePolicy = CachePolicy(),
    scope: str = "",
    store: Cache | None = None,
) -> Plan:
    """What asking the program of that name would find and buy. Raises InvalidRequest as asking it would."""
    from asmodel.models import ServedProgram
    from asmodel.run import Run, execute

    plan = Plan()
    planning = models.planning(plan)
    served = planning.find(name)
    if not isinstance(served, ServedProgram):
        raise InvalidRequest(f'"{name}" is an upstream; plans are made for programs', param="model")
    run: Run[Any] = Run(
        served.program,
        request,
        id="plan",
        cast=planning.cast(served, roles),
        params=served.program.read_params({**served.params, **(params or {})}),
        cache=cache,
        scope=scope,
        store=store,
        plan=plan,
    )
    running = asyncio.ensure_future(execute(run))
    try:
        while not running.done():
            before = len(plan.steps)
            await asyncio.wait((running,), timeout=SETTLED)
            stopped = len(plan.steps) > plan.count("hit")
            if stopped and not plan.looking and len(plan.steps) == before:
                return plan
        try:
            running.result()
            plan.whole = True
        except AsmodelError as error:
            plan.error = str(error)
        return plan
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
