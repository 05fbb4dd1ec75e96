"""Independent steps side by side, as one: the first failure cancels the rest, and none is left running."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, Literal, TypeVar, cast, overload

AT_ONCE = 4096
"""How many of a long list are under way at a time; then one begins when another has ended. A step that waits for its
turn at an upstream takes about 10 kB."""
BATCH = 32
"""How many begin in one go; then others in the process are let in, for whom a thousand at once would be a pause."""

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
T = TypeVar("T")


@overload
def gather(
    awaitables: Iterable[Awaitable[T]], /, *, errors: Literal["raise"] = "raise"
) -> Coroutine[Any, Any, list[T]]: ...
@overload
def gather(
    awaitables: Iterable[Awaitable[T]], /, *, errors: Literal["keep"]
) -> Coroutine[Any, Any, list[T | Exception]]: ...
@overload
def gather(a: Awaitable[A], b: Awaitable[B], /) -> Coroutine[Any, Any, tuple[A, B]]: ...
@overload
def gather(a: Awaitable[A], b: Awaitable[B], c: Awaitable[C], /) -> Coroutine[Any, Any, tuple[A, B, C]]: ...
def gather(*awaitables: Any, errors: Literal["raise", "keep"] = "raise") -> Coroutine[Any, Any, Any]:
    """Wait for all, in their order: `await gather(run(step, p) for p in paragraphs)`, or `gather(a, b)` for a pair.

    With `errors="raise"` the first failure cancels the others, waits until they have ended, and is raised as it is.
    With `errors="keep"` an exception stands in its place in the list. Cancelling the gathering cancels all.
    """
    one = len(awaitables) == 1 and not isinstance(awaitables[0], Awaitable)
    # Listed now and not when it is awaited: a generator inside a generator would find its variables changed by then.
    work: list[Awaitable[Any]] = list(cast("Any", awaitables[0] if one else awaitables))
    return _gathered(work, keep=errors == "keep", kind=list if one else tuple)


class _Gathering:
    """What is gathered, and how far it is. An object, and no functions that know one another: they, and all that was
    gathered with them, would wait for the garbage collector."""

    def __init__(self, work: list[Awaitable[Any]], *, keep: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._keep = keep
        self.work = work
        self.begun: list[asyncio.Future[Any]] = []
        self.failed: list[BaseException] = []
        self.done: asyncio.Future[None] = self._loop.create_future()
        self.under_way = 0
        self.goes_on = False
        """Whether what ends makes room for the next."""

    @property
    def left(self) -> bool:
        return len(self.begun) < len(self.work) and not self.failed

    def begin(self) -> None:
        one: asyncio.Future[Any]
        try:
            one = asyncio.ensure_future(self.work[len(self.begun)])
        except Exception as error:  # It cannot be awaited; that is told as if it had raised it.
            one = self._loop.create_future()
            one.set_exception(error)
        self.under_way += 1
        self.begun.append(one)
        one.add_done_callback(self._ended)

    def _ended(self, one: asyncio.Future[Any]) -> None:
        self.under_way -= 1
        error = None if one.cancelled() else one.exception()
        if error is not None and not (self._keep and isinstance(error, Exception)):
            self.failed.append(error)
        if self.goes_on and self.left:
            self.begin()
        if (self.failed or not self.under_way) and not self.done.done():
            self.done.set_result(None)

    async def end(self) -> None:
        """Cancel what has not ended, and wait until it has."""
        self.goes_on = False
        if unfinished := [one for one in self.begun if not one.done()]:
            for one in unfinished:
                one.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        for awaitable in self.work[len(self.begun) :]:
            # What never began would be reported as never awaited.
            if inspect.iscoroutine(awaitable):
                awaitable.close()


async def _gathered(work: list[Awaitable[Any]], *, keep: bool, kind: type[list[Any] | tuple[Any, ...]]) -> Any:
    all = _Gathering(work, keep=keep)
    # No TaskGroup: its groups would have to be taken apart again, and up to Python 3.12 it leaves a task that has
    # caught such a failure marked as being cancelled, so that a time limit around it no longer works.
    try:
        while all.left and all.under_way < AT_ONCE:
            all.begin()
            if len(all.begun) % BATCH == 0:
                await asyncio.sleep(0)
        if all.under_way and not all.failed:
            all.goes_on = True
            if all.done.done():  # All that had begun by then had ended once before.
                all.done = asyncio.get_running_loop().create_future()
            await all.done
    finally:
        await all.end()
    if all.failed:
        error = all.failed[0]
        # An error knows this frame, and is not to be known by it.
        all.failed.clear()
        all.begun.clear()
        try:
            raise error
        finally:
            del error
    if any(one.cancelled() for one in all.begun):
        # Something in the list was cancelled by somebody else.
        raise asyncio.CancelledError
    if keep:
        return kind(one.result() if one.exception() is None else one.exception() for one in all.begun)
    return kind(one.result() for one in all.begun)
