"""Many time-outs by one timer: each comes when it is due, none that was ended comes, and nothing is left behind."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.timed import in_time, timed

from asmodel.timeouts import Bound, Bounds, Timeouts


@timed
async def test_a_body_that_takes_too_long_is_cancelled_and_raises_timeout_error() -> None:
    bounds = Bounds(0.02)
    bound = bounds()
    began = time.perf_counter()
    with pytest.raises(TimeoutError), bound:
        await asyncio.sleep(5)
    assert bound.expired
    took = time.perf_counter() - began
    assert took > 0.015
    in_time(took, 1)


async def test_a_body_that_ends_in_time_is_left_alone() -> None:
    bound = Bounds(5)()
    with bound:
        await asyncio.sleep(0)
    assert not bound.expired


async def test_a_bound_that_is_lifted_never_expires() -> None:
    bound = Bounds(0.01)()
    with bound:
        bound.lift()
        await asyncio.sleep(0.05)
    assert not bound.expired


async def test_a_cancellation_from_elsewhere_is_no_timeout() -> None:
    bound = Bounds(5)()

    async def work() -> None:
        with bound:
            await asyncio.sleep(5)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not bound.expired


async def test_a_cancellation_that_comes_with_the_timeout_wins() -> None:
    bounds = Bounds(0.01)

    async def work() -> None:
        with bounds():
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                task.cancel()
                raise

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_inner_of_two_bounds_says_so_and_the_outer_goes_on() -> None:
    outer, inner = Bounds(5)(), Bounds(0.01)()
    with outer:
        with pytest.raises(TimeoutError), inner:
            await asyncio.sleep(5)
        await asyncio.sleep(0)
    assert (outer.expired, inner.expired) == (False, True)


async def test_an_error_of_the_bodys_own_is_raised_as_it_is() -> None:
    bound = Bounds(5)()
    with pytest.raises(KeyError), bound:
        raise KeyError("its own")


async def test_one_timer_serves_for_all_and_none_is_left_when_all_have_ended() -> None:
    expired: list[int] = []
    timeouts: Timeouts[int] = Timeouts(0.02, expired.append)
    for key in range(1000):
        timeouts.begin(key)
    for key in range(0, 1000, 2):
        timeouts.end(key)
    await asyncio.sleep(0.06)
    assert expired == list(range(1, 1000, 2))
    assert len(timeouts) == 0


@timed
async def test_to_begin_again_starts_the_time_anew_and_to_keep_does_not() -> None:
    expired: list[tuple[str, float]] = []
    began = time.perf_counter()
    timeouts: Timeouts[str] = Timeouts(0.05, lambda key: expired.append((key, time.perf_counter() - began)))
    timeouts.begin("again")
    timeouts.begin("kept")
    await asyncio.sleep(0.03)
    in_time(time.perf_counter() - began, 0.045)
    timeouts.begin("again")
    timeouts.keep("kept")
    await asyncio.sleep(0.09)
    assert [key for key, _ in expired] == ["kept", "again"]
    assert expired[1][1] >= 0.079
    in_time(expired[0][1], 0.079)


def test_what_was_begun_in_a_loop_that_has_ended_does_not_come_in_another() -> None:
    expired: list[str] = []
    timeouts: Timeouts[str] = Timeouts(0.01, expired.append)

    async def begin(key: str, wait: float) -> None:
        timeouts.begin(key)
        await asyncio.sleep(wait)

    asyncio.run(begin("first", 0))
    asyncio.run(begin("second", 0.05))
    assert expired == ["second"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_whatever_begins_and_ends_those_left_expire_once_each(steps: list[tuple[int, bool]]) -> None:
    async def run() -> tuple[list[int], set[int]]:
        expired: list[int] = []
        timeouts: Timeouts[int] = Timeouts(0.005, expired.append)
        left: set[int] = set()
        for key, begins in steps:
            (timeouts.begin if begins else timeouts.end)(key)
            (left.add if begins else left.discard)(key)
        await asyncio.sleep(0.02)
        return expired, left

    expired, left = asyncio.run(run())
    assert sorted(expired) == sorted(left)


def test_a_bound_is_for_a_task() -> None:
    with pytest.raises(RuntimeError), Bound(Timeouts(1, Bound.expire)):
        pass
