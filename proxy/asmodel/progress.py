"""What a run tells its client while it works: step names, counts and cache hits; never content."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

from asmodel.calls import Source


@dataclass(slots=True)
class _Count:
    started: int = 0
    done: int = 0
    cached: int = 0
    again: int = 0
    changes: int = 0


# Only which line of progress a step is counted in; no answer depends on it.
_part: ContextVar[str] = ContextVar("asmodel_part", default="")


Told: TypeAlias = dict[tuple[str, str], int]
"""How often a line had changed when it was last told, by part and step; the one told longest ago comes first."""


class Progress:
    """Counts by part and step. Writers never wait; a reader takes what has changed, as often as it likes.

    Each reader keeps its own `told`, so that what one of them has taken is there for the others still.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Count] = {}
        self._told: Told = {}
        self._of: dict[str, int] = {}
        self.answered = False
        """Whether any step has been answered yet."""
        self.on_change: Callable[[], None] | None = None

    @contextmanager
    def part(self, name: str, of: int | None) -> Generator[None, None, None]:
        """Count the steps of the body under `name`; `of` says how many there will be. Entered again, it counts on."""
        if of is not None:
            self._of[name] = self._of.get(name, 0) + of
        token = _part.set(name)
        try:
            yield
        finally:
            _part.reset(token)

    def _count(self, step: str) -> _Count:
        part = _part.get()
        count = self._counts.get((part, step))
        if count is None:
            count = self._counts[part, step] = _Count()
        return count

    def started(self, step: str) -> None:
        count = self._count(step)
        count.started += 1
        count.changes += 1
        if self.on_change is not None:
            self.on_change()

    def asked_again(self, step: str) -> None:
        count = self._count(step)
        count.again += 1
        count.changes += 1
        if self.on_change is not None:
            self.on_change()

    def finished(self, step: str, source: Source) -> None:
        count = self._count(step)
        count.done += 1
        count.cached += source == "hit"
        self.answered = True
        count.changes += 1
        if self.on_change is not None:
            self.on_change()

    def next_line(self, told: Told | None = None) -> str | None:
        """The line that has waited longest to be told, as it stands now; None where all has been told.

        `told` is the reader's own book of it; without one, all who ask share one.
        """
        book = self._told if told is None else told
        waiting = (place for place, count in self._counts.items() if count.changes != book.get(place, 0))
        # In the order of the book where it is in it, so that a busy step does not keep the others from being told.
        order = {place: number for number, place in enumerate(book)}
        place = min(waiting, key=lambda place: order.get(place, -1), default=None)
        if place is None:
            return None
        count = self._counts[place]
        book.pop(place, None)
        book[place] = count.changes
        return _line(*place, count, self._of.get(place[0], 0))


def _line(part: str, step: str, count: _Count, of: int) -> str:
    total = max(of, count.started)
    notes = [f"{count.cached} cached"] * bool(count.cached) + [f"{count.again} asked again"] * bool(count.again)
    name = f"{part} · {step}" if part else step
    return f"{name} {count.done}/{total}" + (f" ({', '.join(notes)})" if notes else "")
