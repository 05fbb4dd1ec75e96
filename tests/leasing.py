"""One purchase for all who want it, by a store's leases alone; as a function, and as a process of its own.

    python -m tests.leasing KIND PLACE KEY ASKERS SECONDS PURCHASES [LEASE_SECONDS]

asks ASKERS times at once after a line on its stdin. Each purchase takes SECONDS and adds a line to the file PURCHASES.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from asmodel.conformance import opened
from asmodel.protocols import Cache, Lockable
from asmodel_plugins.disk_cache import DiskCache

LEASE_SECONDS = 2.0
"""Not the ten of a server, for tests that wait until one has run out."""


class Leasing(Cache, Lockable, Protocol):
    """A store with both."""


class Failed(Exception):
    """The purchase failed, here or at whoever made it for all."""


async def once(store: Leasing, key: str, buy: Callable[[], Awaitable[bytes]], seconds: float = LEASE_SECONDS) -> bytes:
    """The value of `key`: stored, bought here, or bought by another meanwhile."""
    while True:
        if (found := await store.get(key)) is not None:
            return found
        async with store.lease(key, seconds) as lease:
            if lease.state == "taken":
                if (note := await lease.wait()) is not None:
                    raise Failed(note.decode())
                continue
            # Another may have stored it between our looking and our lease.
            if (found := await store.get(key)) is not None:
                return found
            try:
                value = await buy()
            except Failed as error:
                lease.leave(str(error).encode())
                raise
            await store.set(key, value)
            return value


def store_at(kind: str, place: str) -> Leasing:
    if kind == "disk":
        return DiskCache(place)
    from asmodel_plugins.redis_cache import RedisCache

    return RedisCache(place, timeout=1.0)


async def main(
    kind: str, place: str, key: str, askers: int, seconds: float, purchases: Path, lease: float = LEASE_SECONDS
) -> None:
    async def buy() -> bytes:
        with purchases.open("a") as file:
            file.write(f"{os.getpid()}\n")
        await asyncio.sleep(seconds)
        return b"bought"

    async with opened(store := store_at(kind, place)):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        answers = await asyncio.gather(*(once(store, key, buy, lease) for _ in range(askers)))
    print(answers.count(b"bought"), flush=True)


if __name__ == "__main__":
    _, kind, place, key, askers, seconds, purchases, *lease = sys.argv
    asyncio.run(main(kind, place, key, int(askers), float(seconds), Path(purchases), *map(float, lease)))
