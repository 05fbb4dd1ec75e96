"""What every plug-in of a kind must do, as checks that anybody's tests can run against theirs.

Each check takes an open store, and raises AssertionError with a sentence that says what was expected. Keys are new ones
each time, so a store may be shared and may hold other things. What a store can do beyond `Cache` (`Listable`,
`Clearable`, `Lockable`, `Lasting`, `Openable`) is checked where it says that it can.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

from asmodel.protocols import Cache, Clearable, Lasting, Listable, Lockable, Openable

CacheCheck: TypeAlias = Callable[[Cache], Awaitable[None]]

_LARGE = 5 * 2**20


async def check_cache(make: Callable[[], Cache], *, durable: bool = False) -> None:
    """Run every check on stores that `make` builds; with `durable`, that a closed store's entries are still there.

    `make` is called once a check; what it returns is opened and closed here where it is `Openable`. With `durable` two
    calls must build two views of one store.
    """
    for check in CACHE_CHECKS:
        async with opened(make()) as cache:
            await check(cache)
    if durable:
        await entries_outlive_the_object(make)


@asynccontextmanager
async def opened(cache: Cache) -> AsyncGenerator[Cache]:
    """The store, open; closed in the end, where it has a life."""
    if isinstance(cache, Openable):
        await cache.open()
    try:
        yield cache
    finally:
        if isinstance(cache, Openable):
            await cache.close()


async def a_value_comes_back_as_it_was(cache: Cache) -> None:
    for value in (b'{"v":1,"text":"x"}', b"\x00\xff\x80 not UTF-8", bytes(range(256)), b"N.", b"cos\nsystem\n"):
        key = _key()
        await cache.set(key, value)
        _same(await cache.get(key), value, "a value must come back byte by byte")


async def an_unknown_key_is_missing(cache: Cache) -> None:
    _same(await cache.get(_key()), None, "a key that was never set must be None")


async def a_second_set_replaces_the_first(cache: Cache) -> None:
    key = _key()
    for value in (b"first, and longer", b"second", b"the third, and longest"):
        await cache.set(key, value, tag="p/s")
        _same(await cache.get(key), value, "the last value set must be the one that is read")


async def a_set_is_seen_at_once(cache: Cache) -> None:
    for n in range(50):
        key = _key()
        await cache.set(key, b"%d" % n)
        _same(await cache.get(key), b"%d" % n, "an entry must be readable as soon as `set` has returned")


async def an_empty_value_is_not_a_missing_one(cache: Cache) -> None:
    key = _key()
    await cache.set(key, b"")
    _same(await cache.get(key), b"", "an empty value must be b'', not missing")


async def a_large_value_comes_back(cache: Cache) -> None:
    key, value = _key(), secrets.token_bytes(_LARGE)
    await cache.set(key, value)
    _true(await cache.get(key) == value, f"a value of {_LARGE} bytes must come back whole")


async def keys_are_independent(cache: Cache) -> None:
    key = _key()
    near = {key: b"0", key[:-1] + ("0" if key[-1] != "0" else "1"): b"1", key[:-1]: b"2", key + "0": b"3"}
    for k, value in near.items():
        await cache.set(k, value)
    for k, value in near.items():
        _same(await cache.get(k), value, "keys that differ in one digit must not share an entry")


async def an_entry_ends_with_its_ttl(cache: Cache) -> None:
    short, long, none = _key(), _key(), _key()
    await cache.set(long, b"long", ttl=3600)
    await cache.set(none, b"none")
    await cache.set(short, b"short", ttl=0.2)
    for _ in range(200):
        if await cache.get(short) is None:
            break
        await asyncio.sleep(0.025)
    _same(await cache.get(short), None, "an entry with ttl=0.2 must be missing after 5 s at the latest")
    _same(await cache.get(long), b"long", "an entry must be there until its ttl is over")
    _same(await cache.get(none), b"none", "an entry without a ttl must not end")


async def a_set_without_ttl_lifts_an_older_one(cache: Cache) -> None:
    key = _key()
    await cache.set(key, b"old", ttl=0.2)
    await cache.set(key, b"new")
    await asyncio.sleep(0.3)
    _same(await cache.get(key), b"new", "a set without a ttl must replace the ttl of the entry before it")


async def a_tag_may_be_any_text(cache: Cache) -> None:
    for tag in ("", "evidence-qa/next_thought", "程序/ступень/🙂", "a'b\"c;--", "x" * 1000):
        key = _key()
        await cache.set(key, tag.encode(), tag=tag)
        _same(await cache.get(key), tag.encode(), f"an entry with the tag {tag[:30]!r} must be readable")


async def many_sets_at_once_all_arrive(cache: Cache) -> None:
    values = {_key(): b"%d " % n * 100 for n in range(200)}
    await asyncio.gather(*(cache.set(key, value, tag="many") for key, value in values.items()))
    found = await asyncio.gather(*(cache.get(key) for key in values))
    lost = sum(a != b for a, b in zip(found, values.values(), strict=True))
    _same(lost, 0, "of 200 entries set at once, none may be lost or changed")


async def a_cancelled_set_leaves_the_store_working(cache: Cache) -> None:
    key, after = _key(), _key()
    task = asyncio.ensure_future(cache.set(key, b"cancelled"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await cache.set(after, b"after")
    _same(await cache.get(after), b"after", "a set after a cancelled one must be stored")
    _true(await cache.get(key) in (None, b"cancelled"), "a cancelled set must leave its whole value or nothing")


async def entries_are_listed(cache: Cache) -> None:
    """Of a `Listable` store only."""
    if not isinstance(cache, Listable):
        return
    wanted = {_key(): (f"list/{n % 3}", n) for n in range(30)}
    for key, (tag, size) in wanted.items():
        await cache.set(key, b"x" * size, tag=tag)
    ended = _key()
    await cache.set(ended, b"ended", ttl=0.01)
    await asyncio.sleep(0.05)
    listed = [entry async for entry in cache.entries()]
    found = {key: (tag, size) for key, tag, size in listed}
    _same({k: found.get(k) for k in wanted}, wanted, "each entry must be listed with its key, tag and size in bytes")
    _same(len(listed), len(found), "no entry may be listed twice")
    _true(ended not in found, "an entry whose ttl is over must not be listed")


async def a_store_may_be_opened_again(cache: Cache) -> None:
    """Of an `Openable` store only: closing twice is no error, and after `open` it works as before."""
    if not isinstance(cache, Openable):
        return
    await cache.close()
    await cache.close()
    await cache.open()
    key = _key()
    await cache.set(key, b"again")
    _same(await cache.get(key), b"again", "a store that was closed and opened again must work")


async def entries_outlive_the_object(make: Callable[[], Cache]) -> None:
    """Of a durable store: what one object has set, the next one finds."""
    values = {_key(): b"%d" % n for n in range(20)}
    async with opened(make()) as cache:
        await asyncio.gather(*(cache.set(key, value) for key, value in values.items()))
    async with opened(make()) as cache:
        found = {key: await cache.get(key) for key in values}
    _same(found, values, "entries must be there after the store was closed and made again")


async def what_has_a_tag_can_be_cleared(cache: Cache) -> None:
    """Of a `Clearable` store only. Nothing is cleared but what was set here: the store may hold other things."""
    if not isinstance(cache, Clearable):
        return
    tag, other = f"clear/{_key()[:8]}", f"clear/{_key()[:8]}"
    gone, kept = [_key() for _ in range(300)], _key()
    await asyncio.gather(*(cache.set(key, b"gone", tag=tag) for key in gone), cache.set(kept, b"kept", tag=other))
    _same([await cache.get(key) for key in gone], [b"gone"] * 300, "what is set must be there before it is cleared")
    _same(await cache.clear(tag=tag, older_than=3600), 0, "nothing was written over an hour ago, so nothing is cleared")
    _same(await cache.clear(tag=tag), 300, "`clear` must say how many entries it has deleted")
    _same([await cache.get(key) for key in gone], [None] * 300, "what was cleared must be missing at once")
    _same(await cache.get(kept), b"kept", "an entry of another tag must stay")
    await cache.set(gone[0], b"again", tag=tag)
    _same(await cache.get(gone[0]), b"again", "what was cleared can be set again")
    await asyncio.sleep(0.1)
    _same(await cache.clear(tag=tag, older_than=0.05), 1, "what was written longer ago than `older_than` must go")
    await cache.clear(tag=other)


async def a_lease_has_one_holder(cache: Cache) -> None:
    """Of a `Lockable` store only."""
    if not isinstance(cache, Lockable):
        return
    for key in (_key(), _key()):
        async with cache.lease(key) as lease:
            _same(lease.state, "held", "a lease that nobody holds must be held by who asks for it")
            async with cache.lease(key) as second:
                _same(second.state, "taken", "a lease that is held must be taken for the next who asks")
            async with cache.lease(_key()) as other:
                _same(other.state, "held", "the leases of two keys must have nothing to do with each other")


async def whoever_waits_for_a_lease_goes_on_when_it_ends(cache: Cache) -> None:
    """Of a `Lockable` store only."""
    if not isinstance(cache, Lockable):
        return
    for note in (None, "it failed: ü\0".encode()):
        key, entered = _key(), asyncio.Semaphore(0)

        async def follow(key: str, entered: asyncio.Semaphore, store: Lockable) -> bytes | None:
            async with store.lease(key) as lease:
                entered.release()
                return await lease.wait()

        async with cache.lease(key) as lease:
            waiting = [asyncio.create_task(follow(key, entered, cache)) for _ in range(5)]
            for _ in waiting:
                await entered.acquire()
            await asyncio.sleep(0.1)
            _true(not any(task.done() for task in waiting), "nobody may go on while a lease is held")
            if note is not None:
                lease.leave(note)
        async with asyncio.timeout(5):
            told = await asyncio.gather(*waiting)
        _same(told, [note] * 5, "who waits must be told the note that was left, or None where none was")
        async with cache.lease(key) as later:
            _same((later.state, await later.wait()), ("held", None), "who comes later must be told nothing")


async def a_lease_is_kept_up_while_it_is_held(cache: Cache) -> None:
    """Of a `Lockable` store only."""
    if not isinstance(cache, Lockable):
        return
    for _ in range(5):
        key = _key()
        async with cache.lease(key, 0.5), cache.lease(key, 0.5) as lease:
            waiting = asyncio.ensure_future(lease.wait())
            stood_still = 0.0
            until = time.monotonic() + 1.5
            while not waiting.done() and (now := time.monotonic()) < until:
                await asyncio.wait((waiting,), timeout=0.02)
                stood_still = max(stood_still, time.monotonic() - now)
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                return
        # A holder that could do nothing for most of a third of the lease could not keep it up either.
        _true(stood_still > 0.12, "a holder that lives must be waited for, for longer than the seconds of the lease")
    _true(False, "this machine stood still five times in a row: check it when it is less busy")


async def one_who_stops_asking_for_a_lease_is_in_nobodys_way(cache: Cache) -> None:
    """Of a `Lockable` store only."""
    if not isinstance(cache, Lockable):
        return
    key = _key()

    async def ask(store: Lockable) -> None:
        async with store.lease(key) as lease:
            await (lease.wait() if lease.state == "taken" else asyncio.sleep(30))

    for delay in (0.0, 0.0005, 0.02):
        tasks = [asyncio.create_task(ask(cache)) for _ in range(10)]
        await asyncio.sleep(delay)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    state = ""
    for _ in range(200):
        async with cache.lease(key) as lease:
            state = lease.state
        if state == "held":
            return
        await asyncio.sleep(0.025)
    _same(state, "held", "a lease whose askers were all cancelled must be free after 5 s at the latest")


async def what_lasts_is_a_store_by_itself(cache: Cache) -> None:
    """Of a `Lasting` store only."""
    if not isinstance(cache, Lasting):
        return
    key, tag = _key(), f"lasting/{_key()[:8]}"
    async with opened(cache.lasting()) as beside:
        await beside.set(key, b"begun", tag=tag)
        await beside.set(key, b"done", tag=tag)
        _same(await beside.get(key), b"done", "what is to last must be there as it was set last")
        _same(await cache.get(key), None, "what is to last must be in a store of its own")
        await cache.set(key, b"an answer", tag=tag)
        if isinstance(cache, Clearable):
            await cache.clear(tag=tag)
        _same(await beside.get(key), b"done", "what is to last must stay, whatever becomes of the store beside it")


CACHE_CHECKS: tuple[CacheCheck, ...] = (
    a_value_comes_back_as_it_was,
    an_unknown_key_is_missing,
    a_second_set_replaces_the_first,
    a_set_is_seen_at_once,
    an_empty_value_is_not_a_missing_one,
    a_large_value_comes_back,
    keys_are_independent,
    an_entry_ends_with_its_ttl,
    a_set_without_ttl_lifts_an_older_one,
    a_tag_may_be_any_text,
    many_sets_at_once_all_arrive,
    a_cancelled_set_leaves_the_store_working,
    entries_are_listed,
    what_has_a_tag_can_be_cleared,
    a_lease_has_one_holder,
    whoever_waits_for_a_lease_goes_on_when_it_ends,
    a_lease_is_kept_up_while_it_is_held,
    one_who_stops_asking_for_a_lease_is_in_nobodys_way,
    what_lasts_is_a_store_by_itself,
    a_store_may_be_opened_again,
)
"""One by one, for a parametrised test."""


def _key() -> str:
    return secrets.token_hex(32)


def _true(condition: bool, message: str) -> None:
    # Not `assert`: the checks must also hold under `python -O`.
    if not condition:
        raise AssertionError(f"{_check_name()}: {message}")


def _same(found: object, wanted: object, message: str) -> None:
    _true(found == wanted, f"{message}; wanted {_short(wanted)}, got {_short(found)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _check_name() -> str:
    """The check that is running, for the message."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name.startswith("_"):
        frame = frame.f_back
    return frame.f_code.co_name.replace("_", " ") if frame is not None else "check"
