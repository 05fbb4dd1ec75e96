"""What one process fetches and starts for all, before any of them listens; downloads show their bytes and time left."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asmodel.protocols import Preparing

if TYPE_CHECKING:
    from rich.console import Console

    from asmodel.app import Parts


@contextmanager
def prepared(parts: Parts, *, shared: bool = False) -> Generator[None]:
    """Have every upstream and tool that wants it prepared, around what opens them; `shared` where several processes do.

    What they announce stands in this process's environment meanwhile, which is how the others inherit it.
    """
    set_before = dict(os.environ)
    things: list[tuple[object, str]] = [(provider, "fetching") for provider in parts.providers.values()]
    things += [(tool, "reading") for tool in parts.tools.values()]
    preparing = [(thing, doing) for thing, doing in things if isinstance(thing, Preparing)]
    try:
        for thing, doing in preparing:
            with Download(doing=doing) as download:
                os.environ.update(thing.prepare(download.progress, shared=shared))
        yield
    finally:
        for thing, _ in preparing:
            thing.release()
        for name in os.environ.keys() - set_before.keys():
            del os.environ[name]


class Download:
    """A bar that appears with the first byte: what, how much, how fast, how long still. In a log, a line at times."""

    def __init__(self, console: Console | None = None, *, doing: str = "fetching") -> None:
        self._console = console
        self._doing = doing
        self._bar: Any = None  # Of rich, which only a download imports.
        self._task: Any = None
        self._told = 0.0
        self._began = 0.0

    def __enter__(self) -> Download:
        return self

    def progress(self, what: str, done: int, total: int) -> None:
        from rich.console import Console

        now = time.monotonic()
        if self._console is None:
            self._console = Console(stderr=True, highlight=False)
            self._began = now
        if not self._console.is_terminal:
            if now - self._told > 3 or done >= total:
                self._told = now
                left = (total - done) / done * (now - self._began) if done else 0.0
                time_left = f", {left:.0f} s left" if 0 < done < total else ""
                self._console.print(f"{self._doing} {what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB{time_left}")
            return
        if self._bar is None:
            self._bar = self._started(what, total)
        self._bar.update(self._task, completed=done, total=total)

    def _started(self, what: str, total: int) -> Any:
        from rich import progress

        bar = progress.Progress(
            progress.TextColumn(f"{self._doing} {{task.description}}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=self._console,
        )
        bar.start()
        self._task = bar.add_task(what, total=total)
        return bar

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
