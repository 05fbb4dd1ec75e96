"""Many equal time-outs by one timer.

`asyncio.timeout` sets a timer of the event loop each time, which costs as much as a tenth of a proxied request. Nearly
all are cancelled long before they are due, and those of one place are equally long: so the first to begin is the first
that is due, and one timer for the first will do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

K = TypeVar("K")


class Timeouts(Generic[K]):
    """Calls `expired` with a key that `begin` has named `seconds` ago, unless `end` has named it meanwhile.

    For one event loop at a time. `begin` with a key that is there already begins it anew.
    """

    __slots__ = ("_due", "_expired", "_loop", "_timer", "seconds")

    def __init__(self, seconds: float, expired: Callable[[K], None]) -> None:
        self.seconds = seconds
        self._expired = expired
        self._due: dict[K, float] = {}
        """In the order in which they are due, which is that in which they began."""
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._due)

    def begin(self, key: K) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # What was left behind in another loop, which has ended, ended with it.
            self._loop, self._timer = loop, None
            self._due.clear()
        due = loop.time() + self.seconds
        self._due.pop(key, None)
        self._due[key] = due
        if self._timer is None:
            self._timer = loop.call_at(due, self._look)

    def keep(self, key: K) -> None:
        """Begin it, unless it has begun."""
        if key not in self._due:
            self.begin(key)

    def end(self, key: K) -> None:
        self._due.pop(key, None)

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        # A timer may come a little early, by the resolution of the loop's clock.
        now = loop.time() + 0.001
        while self._due:
            key, due = next(iter(self._due.items()))
            if due > now:
                self._timer = loop.call_at(due, self._look)
                return
            del self._due[key]
            self._expired(key)


class Bound:
    """A `with` body that is cancelled when its time is over, and then raises TimeoutError, as `asyncio.timeout` does.

    `expired` tells whether it was this one.
    """

    __slots__ = ("_all", "_cancelling", "_task", "expired")

    def __init__(self, all: Timeouts[Bound]) -> None:
        self._all = all
        self.expired = False

    def __enter__(self) -> Bound:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._all.begin(self)
        return self

    def lift(self) -> None:
        """It is not bound any more."""
        self._all.end(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._all.end(self)
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        self.expired = True
        self._task.cancel()


class Bounds:
    """Makes bounds of `seconds` each."""

    __slots__ = ("_all",)

    def __init__(self, seconds: float) -> None:
        self._all: Timeouts[Bound] = Timeouts(seconds, Bound.expire)

    @property
    def seconds(self) -> float:
        return self._all.seconds

    def __call__(self) -> Bound:
        return Bound(self._all)
