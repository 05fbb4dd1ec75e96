"""Independent steps side by side, as one: the first failure cancels the rest, and none is left running."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, Literal, TypeVar, cast, overload

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
    results: dict[int, Any] = {}
    failed: list[Exception] = []

    async def fill(index: int, awaitable: Awaitable[Any]) -> None:
        try:
            results[index] = await awaitable
        except Exception as error:
            if keep:
                results[index] = error
                return
            failed.append(error)
            raise

    # No TaskGroup: its groups would have to be taken apart again, and up to Python 3.12 it leaves a task that has
    # caught such a failure marked as being cancelled, so that a time limit around it no longer works.
    tasks = [asyncio.ensure_future(fill(index, awaitable)) for index, awaitable in enumerate(work)]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for awaitable in work:
            # What was cancelled before it began would be reported as never awaited.
            if inspect.iscoroutine(awaitable):
                awaitable.close()
    if failed:
        raise failed[0]
    if len(results) < len(work):
        # Something in the list was cancelled by somebody else.
        raise asyncio.CancelledError
    return kind(results[index] for index in range(len(work)))
