"""The step cache in Valkey or Redis: one store, and one lease a key, for any number of machines.

    PREFIX 1:KEY        an entry: format, seal, and what is sealed: a head, the tag, the value
    PREFIX lease:KEY    who is buying

An entry carries its tag and its time in its own head, so there is no index beside it that an eviction, an expiry or a
half-done write could leave behind: what lists and clears goes through the keys with SCAN, a page at a time.

The store saves money and is never needed. Whatever it does (refuse, hang, vanish, come back empty), it costs a call
`timeout` seconds at most, and those after it nothing until it answers again.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import struct
import time
import zlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from asmodel.errors import AsmodelError, ConfigurationError
from asmodel.protocols import Lease
from asmodel_plugins.redis_lease import RedisLeases
from asmodel_plugins.redis_server import Server, Troubles, Unanswered

FORMAT = 1
"""What our entries look like; part of their names, so that two versions of asmodel share a server and no entry."""

_RAW, _ZLIB = 0, 1

_HEAD = struct.Struct("<BdII")
"""How the value is packed, when it was written (Unix seconds), its size in bytes, the size of its tag in bytes."""

_HEAD_AT = 1 + 16
_TAG_AT = _HEAD_AT + _HEAD.size

_LARGEST = 64 * 2**20
"""Larger values are not stored, nor believed: a few packed bytes must not become gigabytes."""

_QUICK_BYTES = 64 * 1024
"""Longer values are packed and unpacked in a thread: that takes milliseconds."""

_PAGE = 250
"""Keys that are looked at or deleted in one go: a fraction of a millisecond of the server's time."""

_LOOK_BYTES = 256
"""How much of an entry is fetched to list it: the head, and all but the longest tags."""


class Unreadable(Exception):
    """An entry that we did not write like this; says which kind of oddity, never what it holds."""


class RedisCache:
    """Bytes by key in Valkey or Redis, for one event loop in each of any number of processes, on any machines.

    A `get` or a `set` waits `timeout` seconds at most. A store that fails is left alone until it has answered a probe;
    meanwhile every get is a miss, at once. Nothing that it does or holds can stop or mislead a run: each trouble is
    counted in `troubles`, and told once.
    """

    def __init__(
        self,
        url: str = "redis://127.0.0.1:6379/0",
        prefix: str = "asmodel:",
        timeout: float = 0.25,
        compress_above: int = 4096,
        ttl: float | None = None,
        connections: int = 16,
        secret: str = "",
    ) -> None:
        """`url` in redis-py's words: `redis://[user:password@]host:port/db?option=value`.

        With TLS `rediss://` and redis-py's `ssl_…` options; by socket `unix:///path`. Several nodes:
        `redis+cluster://host:port,host:port` and `redis+sentinel://host:port,host:port/service/db`, the latter with
        `sentinel_username` and `sentinel_password` where sentinels have a login of their own. `valkey` and `valkeys`
        are other words for `redis` and `rediss`.

        `ttl`, in seconds, is that of entries that are set without one. Values above `compress_above` bytes are packed
        with zlib. At most `connections` are open, to each node. With a `secret`, which all who share the store must
        have, what was written without it is a miss; with none, whoever can write to the store can plant answers.
        """
        for name, value in (("timeout", timeout), ("connections", connections), ("ttl", 1 if ttl is None else ttl)):
            if value <= 0:
                raise ConfigurationError(f"[cache] {name}: {value:g} is not above 0")
        self.ttl = ttl
        self.compress_above = compress_above
        self._url, self._timeout, self._connections, self._secret_text = url, timeout, connections, secret
        self._prefix = prefix
        self._secret = hashlib.sha256(secret.encode()).digest() if secret else b""
        self._server = Server(url, timeout=timeout, connections=connections, probe=f"{prefix}probe:".encode())
        self._leases = RedisLeases(self._server, f"{prefix}lease:".encode())

    @property
    def place(self) -> str:
        """Where the store is, without names and passwords."""
        return self._server.address.place

    @property
    def troubles(self) -> Troubles:
        return self._server.troubles

    def lasting(self) -> RedisCache:
        """The same server under another prefix, with no end set. A server that evicts any key may evict these too."""
        return RedisCache(
            self._url,
            f"{self._prefix}effects:",
            self._timeout,
            self.compress_above,
            None,
            self._connections,
            self._secret_text,
        )

    async def open(self) -> None:
        """Connect, if the store is there. Raises ConfigurationError where it says that it will never have us."""
        await self._server.open()

    async def close(self) -> None:
        """Let what is under way end, then hang up. The store may be opened again."""
        await self._server.close()

    # One entry

    async def get(self, key: str) -> bytes | None:
        name = self._name(key)
        try:
            found: object = await self._server.ask("GET", name)
        except Unanswered as unanswered:
            self._server.count("late" if unanswered.why == "late" else "unreachable")
            self._server.tell(unanswered, "gets are misses")
            return None
        if found is None:
            return None
        try:
            if not isinstance(found, bytes):
                raise Unreadable("something that is no text")
            if _weight(found) > _QUICK_BYTES:
                return await asyncio.to_thread(self._unseal, name, found)
            return self._unseal(name, found)
        except Unreadable as odd:
            self._trouble("unreadable", str(odd), "found %s in the cache: it is a miss, and was not used", odd)
            return None

    async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
        name, label = self._name(key), tag.encode()
        if not isinstance(value, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not be typed
            raise TypeError(f"a cached value is bytes, not {type(value).__name__}")
        if len(value) > _LARGEST:
            self._trouble("unstored", "large", "a value of %d bytes is too large to be stored", len(value))
            return
        if len(value) > _QUICK_BYTES:
            entry = await asyncio.to_thread(self._seal, name, value, label)
        else:
            entry = self._seal(name, value, label)
        ttl = self.ttl if ttl is None else ttl
        life = () if ttl is None else ("PX", max(1, round(ttl * 1000)))
        try:
            done = await self._server.ask("SET", name, entry, *life)
            if done not in (True, b"OK"):
                raise Unanswered("refused", "SET was answered with something else than OK")
        except Unanswered as unanswered:
            self._server.count("unstored")
            self._server.tell(unanswered, "entries were not stored")

    def lease(self, key: str, seconds: float = 10.0) -> AbstractAsyncContextManager[Lease]:
        """Try to be the one who acts on `key`, of all who share the store; see `asmodel.protocols.Lockable`."""
        return self._leases.lease(key, seconds)

    def _name(self, key: str) -> bytes:
        return f"{self._prefix}{FORMAT}:{key}".encode()

    def _seal(self, name: bytes, value: bytes, tag: bytes) -> bytes:
        packing, packed = _RAW, value
        if len(value) > self.compress_above:
            smaller = zlib.compress(value, 1)
            if len(smaller) < 0.9 * len(value):
                packing, packed = _ZLIB, smaller
        body = _HEAD.pack(packing, time.time(), len(value), len(tag)) + tag + packed
        return bytes((FORMAT,)) + self._sealed(name, body) + body

    def _sealed(self, name: bytes, body: bytes | memoryview) -> bytes:
        """Of an entry that is whole, and this key's; keyed with the secret, so that it is one of ours too."""
        seal = hashlib.blake2b(digest_size=16, key=self._secret, person=b"asmodel entry")
        seal.update(len(name).to_bytes(4, "little") + name)
        seal.update(body)
        return seal.digest()

    def _unseal(self, name: bytes, entry: bytes) -> bytes:
        if len(entry) < _TAG_AT or entry[0] != FORMAT:
            raise Unreadable("something that is no entry")
        body = memoryview(entry)[_HEAD_AT:]
        if not secrets.compare_digest(self._sealed(name, body), entry[1:_HEAD_AT]):
            raise Unreadable("an entry that does not match its seal")
        packing, _, size, tag_size = _HEAD.unpack_from(body)
        packed = body[_HEAD.size + tag_size :]
        if packing == _ZLIB and size <= _LARGEST:
            try:
                value = zlib.decompressobj().decompress(packed, size + 1)
            except zlib.error:
                raise Unreadable("an entry that cannot be unpacked") from None
        elif packing == _RAW:
            value = bytes(packed)
        else:
            raise Unreadable("an entry in a packing that is never used")
        if len(value) != size:
            raise Unreadable("an entry of another size than it says")
        return value

    # What it holds

    async def entries(self) -> AsyncGenerator[tuple[str, str, int]]:
        """Key, tag and size in bytes of each entry; those written while it runs may be missing, or be gone."""
        try:
            async for page in self._pages():
                for entry in page:
                    yield entry.key, entry.tag, entry.size
        except Unanswered as unanswered:
            self._server.count("unreachable")
            self._server.tell(unanswered, "the cache could not be listed")

    async def clear(self, tag: str | None = None, older_than: float | None = None) -> int:
        """Delete every entry, those of one tag, or those written over `older_than` seconds ago; says how many.

        Raises AsmodelError where the store fails meanwhile, with what was deleted until then deleted.
        """
        before = None if older_than is None else time.time() - older_than
        total = 0
        try:
            async for page in self._pages():
                gone = [
                    ("UNLINK", entry.name)
                    for entry in page
                    if (tag is None or entry.tag == tag) and (before is None or entry.written < before)
                ]
                answers = await self._server.each(gone)
                total += sum(answer or 0 for answer in answers)
                if None in answers:
                    raise Unanswered("refused", "it does not let us UNLINK its keys")
        except Unanswered as unanswered:
            raise AsmodelError(
                f"the cache at {self.place} could not be cleared: {unanswered}; {total} entries were deleted before"
            ) from unanswered
        return total

    async def stats(self) -> dict[str, Any]:
        """Entries and bytes, in all and by tag; where the store is, and the troubles so far."""
        tags: dict[str, dict[str, int]] = {}
        async for _, tag, size in self.entries():
            count = tags.setdefault(tag, {"entries": 0, "bytes": 0})
            count["entries"] += 1
            count["bytes"] += size
        return {
            "entries": sum(t["entries"] for t in tags.values()),
            "bytes": sum(t["bytes"] for t in tags.values()),
            "tags": dict(sorted(tags.items())),
            "url": self.place,
            "troubles": asdict(self.troubles),
        }

    async def _pages(self) -> AsyncGenerator[list[_Entry]]:
        start = self._name("")
        async for names in self._server.names(start, _PAGE):
            page: list[_Entry] = []
            for name, head in zip(names, await self._heads(names, _LOOK_BYTES), strict=True):
                if len(head) < _TAG_AT or head[0] != FORMAT:
                    continue  # ended meanwhile, or not ours
                _, written, size, tag_size = _HEAD.unpack_from(head, _HEAD_AT)
                tag_end = _TAG_AT + tag_size
                if tag_end > len(head) == _LOOK_BYTES:
                    (head,) = await self._heads([name], tag_end)
                with suppress(UnicodeDecodeError):  # of a head, or a name, that somebody changed
                    page.append(
                        _Entry(name, name[len(start) :].decode(), head[_TAG_AT:tag_end].decode(), size, written)
                    )
            yield page

    async def _heads(self, names: Sequence[bytes], length: int) -> list[bytes]:
        answers = await self._server.each([("GETRANGE", name, 0, length - 1) for name in names])
        return [answer if isinstance(answer, bytes) else b"" for answer in answers]

    def _trouble(self, kind: Literal["unreadable", "unstored"], what: str, message: str, *args: object) -> None:
        self._server.count(kind)
        self._server.tell_once(f"{kind}: {what}", message, *args)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    key: str
    tag: str
    size: int
    written: float


def _weight(entry: bytes) -> int:
    """Bytes to be worked through: those that are here, and those that they unpack to."""
    return max(len(entry), _HEAD.unpack_from(entry, _HEAD_AT)[2] if len(entry) >= _TAG_AT else 0)
