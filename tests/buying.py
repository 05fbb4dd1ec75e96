"""A process that asks one upstream, through the cache, for one thing many times at once.

    python -m tests.buying FOLDER ASKERS SECONDS [URL]

asks after a line on its stdin; the cache is in FOLDER, or on the server at URL. Each purchase takes SECONDS and adds a
line to FOLDER/bought, the process's id; how each asker came by its answer is printed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

from asmodel.calls import Call, Chat, Message, Terms
from asmodel.testing import FunctionUpstream
from asmodel.upstreams import Cached
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.redis_cache import RedisCache


async def main(folder: Path, askers: int, seconds: float, url: str = "") -> None:
    async def answer(call: Call) -> str:
        with (folder / "bought").open("a") as bought:
            bought.write(f"{os.getpid()}\n")
        await asyncio.sleep(seconds)
        return "yes"

    store: DiskCache | RedisCache = RedisCache(url) if url else DiskCache(folder / "cache")
    await store.open()
    cached = Cached(FunctionUpstream(answer, name="up"), store)
    call = Chat(identity="up", messages=(Message("user", "hello"),))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    try:
        replies = await asyncio.gather(*(cached.send(call, Terms(program="p", step="s")) for _ in range(askers)))
    finally:
        await store.close()
    assert {reply.text for reply in replies} == {"yes"}
    print(dict(Counter(reply.source for reply in replies)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
