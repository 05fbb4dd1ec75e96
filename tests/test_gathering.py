"""Independent steps side by side: however many they are, others in the process are let in and memory is bounded."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from asmodel import gather
from asmodel.gathering import AT_ONCE, BATCH


async def number(n: int) -> int:
    await asyncio.sleep(0)
    return n


async def failing(error: BaseException) -> int:
    await asyncio.sleep(0)
    raise error


@pytest.mark.parametrize("count", [0, 1, 2, BATCH - 1, BATCH, BATCH + 1, 16 * BATCH, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE])
async def test_all_come_back_in_their_order_however_many_they_are(count: int) -> None:
    assert await gather(number(n) for n in range(count)) == list(range(count))


async def test_what_has_ended_at_once_makes_room_too() -> None:
    async def at_once(n: int) -> int:
        return n

    count = 2 * AT_ONCE + 7
    assert await gather(at_once(n) for n in range(count)) == list(range(count))


async def test_of_a_long_list_only_so_many_are_under_way_and_the_next_begin_as_others_end() -> None:
    inside = most = 0
    go = asyncio.Event()

    async def work(n: int) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            if n == AT_ONCE - 1:
                go.set()
            await go.wait()
            await asyncio.sleep(0)
            return n
        finally:
            inside -= 1

    count = AT_ONCE + 500
    assert await gather(work(n) for n in range(count)) == list(range(count))
    assert most <= AT_ONCE


async def test_others_are_let_in_while_a_long_list_begins() -> None:
    begun = most = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0)

    async def other() -> None:
        nonlocal most
        while True:
            before = begun
            await asyncio.sleep(0)
            most = max(most, begun - before)

    watch = asyncio.ensure_future(other())
    await gather(work() for _ in range(3000))
    watch.cancel()
    assert begun == 3000
    assert most <= 2 * BATCH, "as one go it would be all of them"


@pytest.mark.parametrize("count", [3, 2 * BATCH, 2 * AT_ONCE])
async def test_the_first_failure_ends_all_the_others_and_those_that_never_began(count: int) -> None:
    cancelled: list[int] = []
    begun: list[int] = []

    async def waiting(n: int) -> int:
        begun.append(n)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(n)
            raise
        return n

    def work() -> Iterator[Any]:
        for n in range(count):
            yield failing(ValueError("no")) if n == 1 else waiting(n)

    with pytest.raises(ValueError, match="no"):
        await gather(work())
    assert sorted(cancelled) == sorted(begun)
    assert len(begun) <= min(count, 3 * BATCH), "nothing began for nothing"
    gc.collect()  # What never began is not reported as never awaited.


@pytest.mark.parametrize("count", [3, 2 * AT_ONCE])
async def test_cancelling_the_gathering_cancels_all_and_begins_no_more(count: int) -> None:
    inside = begun = 0
    full = asyncio.Event()

    async def waiting() -> None:
        nonlocal inside, begun
        begun += 1
        inside += 1
        if inside == min(count, AT_ONCE):
            full.set()
        try:
            await asyncio.Event().wait()
        finally:
            inside -= 1

    task = asyncio.get_running_loop().create_task(gather(waiting() for _ in range(count)))
    await full.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (task.cancelled(), inside, begun) == (True, 0, min(count, AT_ONCE))


async def test_of_several_failures_the_first_to_happen_is_raised() -> None:
    async def later() -> int:
        await asyncio.sleep(0.01)
        raise KeyError("later")

    with pytest.raises(ValueError, match="first"):
        await gather([later(), failing(ValueError("first")), number(1)])


async def test_kept_errors_stand_in_their_places_and_all_goes_on() -> None:
    error = ValueError("no")
    count = AT_ONCE + 10
    found = await gather((failing(error) if n % 3 == 0 else number(n) for n in range(count)), errors="keep")
    assert found == [error if n % 3 == 0 else n for n in range(count)]


async def test_what_cannot_be_awaited_is_an_error_like_any_other() -> None:
    things: Any = [number(1), 7]
    with pytest.raises(TypeError):
        await gather(things)
    things = [number(1), 7]
    one, other = await gather(things, errors="keep")
    assert one == 1
    assert isinstance(other, TypeError)


async def test_tasks_that_run_already_may_stand_in_the_list_and_twice() -> None:
    task = asyncio.ensure_future(number(5))
    assert await gather([task, task, number(1)]) == [5, 5, 1]
    assert await gather([task]) == [5]


async def test_what_somebody_else_cancels_cancels_the_gathering_once_the_others_have_ended() -> None:
    ended = False

    async def ends() -> None:
        nonlocal ended
        await asyncio.sleep(0.01)
        ended = True

    lost = asyncio.ensure_future(asyncio.Event().wait())
    task = asyncio.ensure_future(gather([lost, ends()]))
    await asyncio.sleep(0)
    lost.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_a_time_limit_around_a_gathering_that_failed_still_works() -> None:
    async def work() -> None:
        async with asyncio.timeout(0.05):
            try:
                await gather([failing(ValueError("no")), asyncio.sleep(5)])
            except ValueError:
                await asyncio.sleep(5)

    with pytest.raises(TimeoutError):
        await work()
