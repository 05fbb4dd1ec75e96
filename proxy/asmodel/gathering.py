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


async def _gathered(work: list[Awaitable[Any]], *, keep: bool, kind: type[list[Any] | tuple[Any, ...]]) -> Any:
    loop = asyncio.get_running_loop()
    begun: list[asyncio.Future[Any]] = []
    failed: list[BaseException] = []
    done: asyncio.Future[None] = loop.create_future()
    under_way = 0
    goes_on = False
    """Whether what ends makes room for the next."""

    def begin() -> None:
        nonlocal under_way
        one: asyncio.Future[Any]
        try:
            one = asyncio.ensure_future(work[len(begun)])
        except Exception as error:  # It cannot be awaited; that is told as if it had raised it.
            one = loop.create_future()
            one.set_exception(error)
        under_way += 1
        begun.append(one)
        one.add_done_callback(ended)

    def ended(one: asyncio.Future[Any]) -> None:
        nonlocal under_way
        under_way -= 1
        error = None if one.cancelled() else one.exception()
        if error is not None and not (keep and isinstance(error, Exception)):
            failed.append(error)
        if goes_on and not failed and len(begun) < len(work):
            begin()
        if (failed or not under_way) and not done.done():
            done.set_result(None)

    # No TaskGroup: its groups would have to be taken apart again, and up to Python 3.12 it leaves a task that has
    # caught such a failure marked as being cancelled, so that a time limit around it no longer works.
    try:
        while len(begun) < len(work) and under_way < AT_ONCE and not failed:
            begin()
            if len(begun) % BATCH == 0:
                await asyncio.sleep(0)
        if under_way and not failed:
            goes_on = True
            if done.done():  # All that had begun by then had ended once before.
                done = loop.create_future()
            await done
    finally:
        goes_on = False
        if unfinished := [one for one in begun if not one.done()]:
            for one in unfinished:
                one.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        for awaitable in work[len(begun) :]:
            # What never began would be reported as never awaited.
            if inspect.iscoroutine(awaitable):
                awaitable.close()
    if failed:
        raise failed[0]
    if any(one.cancelled() for one in begun):
        # Something in the list was cancelled by somebody else.
        raise asyncio.CancelledError
    if keep:
        return kind(one.result() if one.exception() is None else one.exception() for one in begun)
    return kind(one.result() for one in begun)
