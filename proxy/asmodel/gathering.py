"""Independent steps side by side, as one: the first failure cancels the rest, and none is left running."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Iterable
from typing import Any, Literal, TypeVar, cast, overload

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
T = TypeVar("T")


@overload
async def gather(awaitables: Iterable[Awaitable[T]], /, *, errors: Literal["raise"] = "raise") -> list[T]: ...
@overload
async def gather(awaitables: Iterable[Awaitable[T]], /, *, errors: Literal["keep"]) -> list[T | Exception]: ...
@overload
async def gather(a: Awaitable[A], b: Awaitable[B], /) -> tuple[A, B]: ...
@overload
async def gather(a: Awaitable[A], b: Awaitable[B], c: Awaitable[C], /) -> tuple[A, B, C]: ...
async def gather(*awaitables: Any, errors: Literal["raise", "keep"] = "raise") -> Any:
    """Wait for all, in their order: `await gather(run(step, p) for p in paragraphs)`, or `gather(a, b)` for a pair.

    With `errors="raise"` the first failure cancels the others, waits until they have ended, and is raised as it is.
    With `errors="keep"` an exception stands in its place in the list. Cancelling the gathering cancels all.
    """
    one = len(awaitables) == 1 and not isinstance(awaitables[0], Awaitable)
    work = cast("list[Awaitable[Any]]", list(cast("Any", awaitables[0])) if one else list(awaitables))
    results: dict[int, Any] = {}
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    cancelled_before = task.cancelling()
    failure: BaseException | None = None

    async def fill(index: int, awaitable: Awaitable[Any]) -> None:
        try:
            results[index] = await awaitable
        except Exception as error:
            if errors == "raise":
                raise
            results[index] = error

    try:
        async with asyncio.TaskGroup() as group:
            for index, awaitable in enumerate(work):
                group.create_task(fill(index, awaitable))
    except BaseExceptionGroup as failures:
        # The first to fail. A program should not have to take groups apart.
        failure = failures.exceptions[0]
    finally:
        for awaitable in work:
            # What was cancelled before it began would be reported as never awaited.
            if inspect.iscoroutine(awaitable):
                awaitable.close()
    if task.cancelling() > cancelled_before:
        # Whoever cancelled the gathering does not want to hear of what failed of it.
        raise asyncio.CancelledError
    if failure is not None:
        # Raised out here, or the group would be its context, and so stand in the traceback of every step that fails.
        raise failure
    if len(results) < len(work):
        # Something in the list was cancelled by somebody else; a group says nothing of it.
        raise asyncio.CancelledError
    found = [results[index] for index in range(len(work))]
    return found if one else tuple(found)
