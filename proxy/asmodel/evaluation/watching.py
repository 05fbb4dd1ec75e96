"""How far an evaluation is, on standard error: a bar with the time left; where nobody watches, a line at times."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from asmodel.evaluation.evaluating import Result

EVERY = 10.0
"""Seconds between two lines, where nobody watches."""

RECENT = 60.0
"""Seconds whose pace tells the time left: what comes out of the cache in the beginning says nothing of the rest."""


class Watching:
    """Around an evaluation of `total` answers; told of each."""

    def __init__(self, total: int, *, console: Console | None = None) -> None:
        self._total = total
        self._console = console
        self._done = 0
        self._errors = 0
        self._bought = 0
        self._told = self._began = time.monotonic()
        self._pace: deque[tuple[float, int]] = deque([(self._began, 0)])
        self._bar: Any = None  # Of rich, imported when something is drawn.
        self._task: Any = None

    def __enter__(self) -> Watching:
        from rich.console import Console

        if self._console is None:
            self._console = Console(stderr=True, highlight=False)
        if self._console.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[notes]}"),
                console=self._console,
                transient=True,
                speed_estimate_period=RECENT,
            )
            self._bar.start()
            self._task = self._bar.add_task("asking", total=self._total, notes="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def told(self, result: Result) -> None:
        """One more answer is there."""
        self._done += 1
        self._errors += result.error is not None
        self._bought += result.budget.calls
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, notes=self._notes())
            return
        now = time.monotonic()
        self._pace.append((now, self._done))
        while now - self._pace[0][0] > RECENT and len(self._pace) > 2:
            self._pace.popleft()
        if now - self._told >= EVERY and self._done < self._total:
            self._told = now
            assert self._console is not None
            self._console.print(
                f"{self._done} of {self._total} answers, {self._notes()}, {self._left(now)}", soft_wrap=True
            )

    def _notes(self) -> str:
        errors = f", {self._errors} errors" if self._errors else ""
        return f"{self._bought} calls bought{errors}"

    def _left(self, now: float) -> str:
        since, done = self._pace[0]
        pace = (self._done - done) / max(now - since, 1e-9)
        seconds = (self._total - self._done) / pace if pace else 0.0
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"
