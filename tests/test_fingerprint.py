"""Keyed digests of what a call is made of."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from asmodel.calls import Chat, Completion, Embed, Message, Reply, Score, Terms, key
from asmodel.fingerprint import BY, Fingerprints, differing, read
from asmodel.testing import FunctionUpstream
from asmodel.tracing import CACHE_PARTS
from asmodel.upstreams import Cached
from asmodel_plugins.disk_cache import DiskCache
from asmodel_plugins.memory_cache import MemoryCache

CHAT = Chat(
    identity="up",
    messages=(Message("system", "be brief"), Message("user", "hello")),
    params={"temperature": 0.5, "max_tokens": 9},
    tools=({"type": "function"},),
    draw="0/0",
)


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (replace(CHAT, identity="else"), ["identity"]),
        (replace(CHAT, messages=(CHAT.messages[0], Message("user", "hallo"))), ["messages.1"]),
        (replace(CHAT, messages=(*CHAT.messages, Message("user", "?"))), ["messages.2"]),
        (replace(CHAT, params={"temperature": 0.6, "max_tokens": 9}), ["params.temperature"]),
        (replace(CHAT, params={"temperature": 0.5}), ["params.max_tokens"]),
        (replace(CHAT, schema={}), ["schema"]),
        (replace(CHAT, tools=()), ["tools.0"]),
        (replace(CHAT, draw="0/1"), ["draw"]),
        (CHAT, []),
    ],
)
async def test_two_calls_differ_in_the_parts_that_differ(other: Chat, parts: list[str]) -> None:
    prints = Fingerprints(MemoryCache())
    assert differing(await prints.of(CHAT, ""), await prints.of(other, "")) == parts


async def test_every_kind_of_call_and_the_scope_have_parts() -> None:
    prints = Fingerprints(MemoryCache())
    completion = Completion(identity="up", prompt="a")
    assert differing(await prints.of(completion, ""), await prints.of(replace(completion, prompt="b"), "")) == [
        "prompt"
    ]
    score = Score(identity="up", context="a", continuation="b")
    assert differing(await prints.of(score, ""), await prints.of(replace(score, context="x"), "")) == ["context"]
    embed = Embed(identity="up", texts=("a", "b"))
    assert differing(await prints.of(embed, ""), await prints.of(replace(embed, texts=("a", "c")), "")) == ["texts.1"]
    assert differing(await prints.of(CHAT, "a"), await prints.of(CHAT, "b")) == ["scope"]


async def test_a_long_conversation_has_a_small_fingerprint() -> None:
    prints = Fingerprints(MemoryCache())
    long = replace(CHAT, messages=tuple(Message("user", str(n)) for n in range(2000)))
    made = await prints.of(long, "")
    assert len(made) < 64
    late = replace(long, messages=(*long.messages[:-1], Message("user", "x")))
    assert differing(made, await prints.of(late, "")) == ["messages.48-"]


async def test_digests_are_of_the_store_and_tell_nothing_by_themselves() -> None:
    store = MemoryCache()
    one, again = await Fingerprints(store).of(CHAT, ""), await Fingerprints(store).of(CHAT, "")
    assert one == again
    elsewhere = await Fingerprints(MemoryCache()).of(CHAT, "")
    assert set(differing(one, elsewhere)) == set(one)
    text = orjson.dumps(one).decode()
    assert "hello" not in text
    assert key(CHAT)[:8] not in text


async def test_two_processes_that_begin_a_store_have_one_secret(tmp_path: Path) -> None:
    stores = [DiskCache(tmp_path / "cache") for _ in range(2)]
    for store in stores:
        await store.open()
    made = await asyncio.gather(*(Fingerprints(store).of(CHAT, "") for store in stores))
    for store in stores:
        await store.close()
    assert made[0] == made[1]


class Deaf(MemoryCache):
    async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
        return


async def test_a_secret_that_is_not_kept_is_not_taken_for_the_stores() -> None:
    prints = Fingerprints(Deaf())
    assert (await prints.of(CHAT, ""))[BY] != (await prints.of(CHAT, ""))[BY]


async def test_a_stored_reply_has_its_calls_fingerprint_beside_it() -> None:
    store = MemoryCache()
    await Cached(FunctionUpstream(lambda call: "yes", name="up"), store).send(CHAT, Terms(program="p", step="s"))
    data = await store.get(key(CHAT))
    assert data is not None
    body: dict[str, Any] = orjson.loads(data)
    assert read(body["parts"]) == await Fingerprints(store).of(CHAT, "")
    assert Reply.load(data).text == "yes"
    assert "hello" not in data.decode()
    # And one that was stored before there were any is read all the same.
    del body["parts"]
    assert Reply.load(orjson.dumps(body)).text == "yes"


@pytest.mark.parametrize("odd", [None, [], "x", {}, {"a": 1}, {"a": "b"}, {BY: 1}])
def test_what_is_no_fingerprint_is_none(odd: object) -> None:
    assert read(odd) is None


def test_the_attribute_has_a_name_of_the_cache_family() -> None:
    assert CACHE_PARTS.startswith("asmodel.cache.")
