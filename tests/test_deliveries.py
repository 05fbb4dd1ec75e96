"""Asking again for another answer: which draws a repeated request gets."""

from __future__ import annotations

import orjson
import pytest

from asmodel.deliveries import Deliveries, Delivery, draw_path
from asmodel_plugins.memory_cache import MemoryCache


async def ask(deliveries: Deliveries, *, retry: bool = False, scope: str = "", request: str = "a") -> Delivery:
    return await deliveries.begin(request, scope=scope, retry=retry)


async def test_a_repeat_of_what_was_delivered_whole_takes_the_next_draws() -> None:
    deliveries = Deliveries(MemoryCache())
    paths: list[str] = []
    for _ in range(3):
        delivery = await ask(deliveries)
        paths.append(delivery.path(0))
        await delivery.whole()
    assert paths == ["0", "again1:0", "again2:0"]


async def test_what_was_not_delivered_is_asked_for_again_with_the_same_draws() -> None:
    deliveries = Deliveries(MemoryCache())
    assert [(await ask(deliveries)).generation for _ in range(3)] == [0, 0, 0]
    await (await ask(deliveries)).whole()
    assert [(await ask(deliveries)).generation for _ in range(3)] == [1, 1, 1]


async def test_an_sdks_own_retry_never_takes_the_next_draws() -> None:
    deliveries = Deliveries(MemoryCache())
    await (await ask(deliveries)).whole()
    # Delivered whole as far as we know, and lost on the way: its retry is the same request.
    assert (await ask(deliveries, retry=True)).generation == 0
    # Asked again, broken off, and retried: that retry is the second request.
    assert (await ask(deliveries)).generation == 1
    assert (await ask(deliveries, retry=True)).generation == 1


async def test_an_answer_that_arrives_late_does_not_undo_the_next_one() -> None:
    deliveries = Deliveries(MemoryCache())
    first, same = await ask(deliveries), await ask(deliveries)
    await first.whole()
    second = await ask(deliveries)
    await same.whole()
    assert (await ask(deliveries)).generation == second.generation == 1


async def test_other_requests_and_other_scopes_are_counted_apart() -> None:
    deliveries = Deliveries(MemoryCache())
    await (await ask(deliveries)).whole()
    assert (await ask(deliveries, scope="team")).generation == 0
    assert (await ask(deliveries, request="b")).generation == 0


@pytest.mark.parametrize("odd", [b"", b"[]", b"{}", orjson.dumps({"v": 1, "generation": "1", "delivered": True})])
async def test_a_count_that_cannot_be_read_is_begun_anew(odd: bytes) -> None:
    class Odd(MemoryCache):
        async def get(self, key: str) -> bytes | None:
            return odd

    assert (await ask(Deliveries(Odd()))).generation == 0


def test_no_path_of_one_generation_begins_one_of_another() -> None:
    paths = [draw_path(choice, generation) + "/" for choice in range(12) for generation in range(12)]
    assert not any(a != b and b.startswith(a) for a in paths for b in paths)
