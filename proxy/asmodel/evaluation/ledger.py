"""What each run took: every reply that its steps got, bought now or found, with what it cost when it was bought.

A hit keeps the tokens, price and time of its purchase, so what a run takes is told equally well out of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from asmodel.calls import Call, Reply, Source, Terms, Usage, key
from asmodel.errors import NotCached
from asmodel.evaluation.estimates import seconds_covered
from asmodel.protocols import Counting, Upstream
from asmodel.run import Played

if TYPE_CHECKING:
    from asmodel.recording import Witness
    from asmodel.tools import Tool

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One step's answer."""

    key: str
    program: str
    step: str
    kind: str
    source: Source
    began: float
    """Seconds from the start of the run to when it was asked for."""
    ended: float
    usage: Usage
    cost: float | None
    """US dollars, when it was bought; None where the price is unknown."""
    bought_at: float
    """Unix seconds."""
    seconds: float
    """How long the upstream took when it was bought."""
    upstream: str
    said: str
    """The beginning of its text, or its log-likelihood."""


@dataclass(slots=True)
class Account:
    """One run's entries."""

    started: float = field(default_factory=time.monotonic)
    entries: list[Entry] = field(default_factory=list[Entry])
    not_cached: int = 0
    """Steps that were not in the cache, where nothing else was to be asked."""

    def took(self) -> Taken:
        """Each answer once, however often the run has asked for it."""
        once = list({entry.key: entry for entry in self.entries}.values())
        costs = [entry.cost for entry in once]
        return Taken(
            steps=len(self.entries),
            calls=len(once),
            prompt_tokens=sum(entry.usage.prompt_tokens for entry in once),
            completion_tokens=sum(entry.usage.completion_tokens for entry in once),
            estimated=any(entry.usage.estimated for entry in once),
            cost=None if None in costs else sum(cost for cost in costs if cost is not None),
            seconds=seconds_covered([(entry.bought_at, entry.bought_at + entry.seconds) for entry in once]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a run takes if nothing of it is in the cache."""

    steps: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    """Whether any of the tokens are estimated, because an upstream did not report them."""
    cost: float | None
    """US dollars; None where any price is unknown."""
    seconds: float
    """For how long at least one of its calls was under way, each when it was bought."""


SAID = 240
"""Characters of a step's text that are kept."""


class Ledger:
    """A witness that keeps an account of each run that it is told of, and changes nothing; `inner` is one before it."""

    def __init__(self, inner: Witness | None) -> None:
        self._inner = inner
        self._accounts: dict[str, Account] = {}

    def open(self, run_id: str) -> Account:
        account = self._accounts[run_id] = Account()
        return account

    def close(self, run_id: str) -> None:
        del self._accounts[run_id]

    def note(
        self, account: Account, call_key: str, kind: str, program: str, step: str, reply: Reply, began: float
    ) -> None:
        """Enter a reply; `began` on the monotonic clock."""
        account.entries.append(
            Entry(
                key=call_key,
                program=program,
                step=step,
                kind=kind,
                source=reply.source,
                began=began - account.started,
                ended=time.monotonic() - account.started,
                usage=reply.usage,
                cost=reply.cost,
                bought_at=reply.bought_at,
                seconds=reply.seconds,
                upstream=reply.upstream,
                said=_said(kind, reply),
            )
        )

    def showing(self, program: str, step: str, call: Call) -> Call:
        return call if self._inner is None else self._inner.showing(program, step, call)

    async def send(self, role: str, upstream: Upstream, call: Call, terms: Terms) -> Reply:
        began = time.monotonic()
        account = self._accounts.get(terms.run_id)
        try:
            if self._inner is None:
                reply = await upstream.send(call, terms)
            else:
                reply = await self._inner.send(role, upstream, call, terms)
        except NotCached:
            if account is not None:
                account.not_cached += 1
            raise
        # The steps of a program that plays a role come by themselves. A reply that its step cannot read is not its
        # answer: it is not kept, and what follows is asked in its place.
        if account is not None and not isinstance(upstream, Played) and _is_read(reply, terms):
            self.note(account, key(call, terms.scope), call.kind, terms.program, terms.step, reply, began)
        return reply

    async def tool(
        self,
        run_id: str,
        program: str,
        tool: Tool[..., Any],
        arguments: dict[str, Any],
        act: Callable[[], Awaitable[T]],
    ) -> T | Any:
        return await act() if self._inner is None else await self._inner.tool(run_id, program, tool, arguments, act)

    async def count(self, run_id: str, upstream: Counting, identity: str, text: str) -> int:
        if self._inner is None:
            return await upstream.count(text)
        return await self._inner.count(run_id, upstream, identity, text)


def _is_read(reply: Reply, terms: Terms) -> bool:
    if terms.accept is None:
        return True
    try:
        terms.accept(reply)
    except Exception:
        # Whatever a reader raises, its run tells of.
        return False
    return True


def _said(kind: str, reply: Reply) -> str:
    if kind == "score":
        likelihood = reply.likelihood
        return f"{likelihood.total:.3f} nats over {likelihood.tokens} tokens"
    # What is no character would spoil the report.
    text = reply.text[:SAID].encode("utf-8", "replace").decode()
    return text if len(reply.text) <= SAID else text[:-1] + "…"
