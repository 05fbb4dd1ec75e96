"""What the core calls to have something measured. This meter keeps nothing; `Metrics` (metrics.py) keeps numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from asmodel.calls import CacheMode, Reply, Usage


class Timing:
    """A `with` body whose time and end are of interest; this one keeps nothing."""

    __slots__ = ()

    def __enter__(self) -> Timing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        return None

    def limited(self, limit: str) -> None:
        """Of a run: `limit` has ended it, and its best answer so far is what it gives."""

    def replied(self, reply: Reply, *, cache: CacheMode = "on", first_chunk: float | None = None) -> None:
        """Of a step or a call: its reply. `cache` is the step's policy; `first_chunk` in seconds, if streamed."""


_NOTHING = Timing()


class Meter:
    """What the core records. This one keeps nothing. All of it is for the thread of the event loop."""

    __slots__ = ()

    def knows_program(self, name: str, steps: Iterable[str] = ()) -> None:
        """Give a program, and the steps that its code names, labels of their own. Before its first run."""

    def knows_upstream(
        self, name: str, *, provider: str, model: str, address: str | None = None, slots: int | None = None
    ) -> None:
        """Give an upstream labels of its own. `slots` is how many calls it may have in flight."""

    def run(self, program: str, *, nested: bool) -> Timing:
        """Around a run of a program."""
        return _NOTHING

    def step(self, program: str, step: str) -> Timing:
        """Around a step, cached or not; of what is passed through, `program` is empty and `step` the upstream."""
        return _NOTHING

    def asked_again(self, program: str, step: str) -> None:
        """A reply could not be read, and the model is asked again."""

    def call(self, upstream: str, *, kind: str, program: str) -> Timing:
        """Around a call that is really made, all its attempts included. `kind` is the call's."""
        return _NOTHING

    def bought(self, upstream: str, program: str, usage: Usage, cost: float | None) -> None:
        """Tokens and US dollars, exactly where a run's budget is charged with them; None is an unknown price."""

    def attempted(self, upstream: str, error: BaseException | None = None) -> None:
        """One attempt is over."""

    def retried(self, upstream: str, error: BaseException, pause: float) -> None:
        """Another follows, after `pause` seconds."""

    def failed_over(self, upstream: str, error: BaseException) -> None:
        """`upstream` has failed, and its next equal is asked."""

    def queued(self, upstream: str, change: int) -> None:
        """A call begins (1) or ends (-1) to wait for its turn."""

    def waited(self, upstream: str, seconds: float) -> None:
        """A call has got its turn, at once or not."""

    def in_flight(self, upstream: str, change: int) -> None:
        """A call begins (1) or ends (-1) to hold a slot."""

    def joined(self, upstream: str, seconds: float) -> None:
        """A step has waited for another's call."""

    def stored(self, operation: str, seconds: float) -> None:
        """The step cache has answered a `get` or a `set`."""

    def refused(self, limit: str, program: str = "") -> None:
        """A limit has refused something before any run began. Limits that end a run are counted with the run."""

    def requested(self, method: str, scheme: str, change: int) -> None:
        """An HTTP request begins (1) or ends (-1)."""

    def streaming(self, change: int) -> None:
        """An event stream begins (1) or ends (-1)."""

    def responded(self, method: str, scheme: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request is over; status 0 where the client left before there was one."""


UNMEASURED = Meter()
"""For whoever is given no meter. It holds no state."""
