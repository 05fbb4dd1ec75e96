"""What a run may still spend, and what it has spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asmodel.calls import Usage
from asmodel.errors import DeadlineExceeded, LimitExceeded

if TYPE_CHECKING:
    from types import TracebackType


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds of one run; None is no bound. `cost` in US dollars, `seconds` from the start of the run."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    seconds: float | None = None

    def tightened(self, other: Limits) -> Limits:
        """The lower of both bounds, one by one: a request may tighten what the settings say, never widen it."""
        if other.calls is None and other.tokens is None and other.cost is None and other.seconds is None:
            return self

        def lower(a: float | None, b: float | None) -> float | None:
            return b if a is None else a if b is None else min(a, b)

        calls, tokens = lower(self.calls, other.calls), lower(self.tokens, other.tokens)
        return Limits(
            calls=None if calls is None else int(calls),
            tokens=None if tokens is None else int(tokens),
            cost=lower(self.cost, other.cost),
            seconds=lower(self.seconds, other.seconds),
        )


@dataclass(slots=True)
class Budget:
    """The one place where a run's purchases are counted; nested programs share their caller's."""

    limits: Limits = Limits()
    started: float = field(default_factory=time.monotonic)
    calls: int = 0
    """Attempts that went out to an upstream, failed ones included."""
    steps: int = 0
    hits: int = 0
    joined: int = 0
    usage: Usage = Usage()
    cost: float | None = 0.0
    """US dollars; None once anything of unknown price was bought."""
    saved: Usage = Usage()
    """What the hits would have cost."""
    upstream_seconds: float = 0.0
    """How long at least one upstream was being waited for; the rest of the run's time was ours."""
    late: Callable[[Budget, Usage, float | None], None] | None = None
    """Told, with this budget, of what is bought once the request's books are closed: by a call that went on for others
    who had joined it, or by a run that went on after its client had left."""
    _asking: int = 0
    _since: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> Limits:
        """What is left of each limit; None where there is none."""
        limits = self.limits
        return Limits(
            calls=None if limits.calls is None else max(0, limits.calls - self.calls),
            tokens=None if limits.tokens is None else max(0, limits.tokens - self.usage.total_tokens),
            cost=None if limits.cost is None else max(0.0, limits.cost - (self.cost or 0.0)),
            seconds=None if limits.seconds is None else max(0.0, limits.seconds - self.seconds),
        )

    def admit(self) -> None:
        """Count one attempt, or raise LimitExceeded because a limit is used up."""
        limits = self.limits
        if limits.calls is not None and self.calls >= limits.calls:
            raise LimitExceeded(f"the run has made the {limits.calls} upstream calls it may make", param="calls")
        if limits.tokens is not None and self.usage.total_tokens >= limits.tokens:
            raise LimitExceeded(f"the run has used the {limits.tokens} tokens it may use", param="tokens")
        if limits.cost is not None and self.cost is None:
            raise LimitExceeded("the run has bought something of unknown price, and its cost is limited", param="cost")
        if limits.cost is not None and (self.cost or 0.0) >= limits.cost:
            raise LimitExceeded(f"the run has spent the {limits.cost} US dollars it may spend", param="cost")
        if limits.seconds is not None and self.seconds >= limits.seconds:
            raise DeadlineExceeded(f"the run has taken the {limits.seconds:g} s it may take", param="seconds")
        self.calls += 1

    def asking(self) -> AbstractContextManager[object]:
        """Around a call to an upstream, its retries and its time in the queue."""
        return _Asking(self)

    def ask(self, since: float | None = None) -> None:
        """An upstream is being waited for, until `asked`; since now, or since that time of the monotonic clock."""
        if self._asking == 0:
            self._since = time.monotonic() if since is None else since
        self._asking += 1

    def asked(self) -> None:
        self._asking -= 1
        if self._asking == 0:
            self.upstream_seconds += time.monotonic() - self._since

    @property
    def waited(self) -> float:
        """Seconds for which at least one upstream was being waited for, up to now."""
        return self.upstream_seconds + (time.monotonic() - self._since if self._asking else 0.0)

    def charge(self, usage: Usage, cost: float | None) -> None:
        self.usage += usage
        self.cost = None if cost is None or self.cost is None else self.cost + cost
        if self.late is not None:
            self.late(self, usage, cost)


class _Asking(AbstractContextManager[object]):
    """Some upstream is being waited for. A class, since a generator costs three times as much."""

    __slots__ = ("_budget",)

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __enter__(self) -> None:
        self._budget.ask()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._budget.asked()
