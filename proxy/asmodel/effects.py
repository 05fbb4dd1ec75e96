"""Tools whose doing must not be repeated: what was meant and what came of it is written down before and after.

The journal is kept under the identity of the run, which is the client's `Idempotency-Key` within its scope: a retry of
the request, in this process or another, finds there what the first attempt did. (The rule is that of write-ahead
logging: the intent is durable before the act, the result before it is used.)

A retry shows its steps the same and gets the same replies, from the step cache, and so calls its tools with the same
arguments; an effect is known by these, and by its number among equal ones of its run. Where the cache is not to be used
there is no such retry, and a program with effects is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast

import orjson

from asmodel.calls import JSON, CachePolicy, canonical
from asmodel.errors import InvalidRequest, ProgramError
from asmodel.programs import Program
from asmodel.protocols import Cache, Lockable
from asmodel.tags import JOURNAL

_VERSION = 1

_SIGN_AT = hashlib.sha256(b"asmodel journal 1").hexdigest()
_SIGN = orjson.dumps({"v": _VERSION, "journal": True})


class EffectUnknown(ProgramError):
    """An effect was begun and it is not known whether it was done; it cannot be repeated safely."""

    status = 409
    code: str | None = "effect_unknown"


class JournalUnusable(ProgramError):
    """The journal cannot be read or written just now, so nothing was done that it should have told of."""

    status = 503
    code: str | None = "journal_unusable"
    retry = True


def check(
    program: Program[Any, Any], *, identity: str | None, cache: CachePolicy, journal: bool, choices: int = 1
) -> None:
    """Refuse, before anything is bought, a program whose effects could not be kept from being repeated.

    `identity` is the client's Idempotency-Key; `journal` says whether there is a store to keep one in; `choices` is the
    request's `n`. Raises InvalidRequest.
    """
    has = _has(program)
    if has is None:
        return
    if not journal:
        raise InvalidRequest(
            f"{has}, and this server keeps no journal; set [cache] kind to something else than off",
            param="model",
            code="no_journal",
        )
    if choices > 1:
        raise InvalidRequest(f"{has}, and {choices} choices would have them {choices} times", param="n")
    if not identity:
        raise InvalidRequest(
            f"{has}; send an Idempotency-Key header, new for each request and the same for its retries",
            param="Idempotency-Key",
            code="idempotency_key_required",
        )
    if cache.mode in ("off", "refresh") or cache.max_age is not None:
        raise InvalidRequest(
            f"{has}, and a retry could go another way without the cache; leave out Cache-Control and `asmodel.cache`",
            param="asmodel.cache",
            code="effects_need_cache",
        )


def check_player(program: Program[Any, Any]) -> None:
    """Refuse, as the player of a role, a program with effects: it may be asked any number of times for one request."""
    has = _has(program)
    if has is not None:
        raise InvalidRequest(
            f"{has}, so it cannot play a role of another program; ask for it by its own name",
            param="model",
            code="effects_in_role",
        )


def _has(program: Program[Any, Any]) -> str | None:
    tools = ", ".join(f'"{tool.name}"' for tool in program.effects)
    return f'program "{program.name}" has effects that must not be repeated ({tools})' if tools else None


class Journal:
    """What one run has done to the world. Made by `begun`."""

    def __init__(self, store: Cache, run: list[str], now: datetime, *, sound: bool) -> None:
        self.now = now
        """When the run first started."""
        self._store = store
        self._run = run
        self._sound = sound

    @classmethod
    async def begun(cls, store: Cache, *, scope: str, program: str, identity: str, request: str = "") -> Journal:
        """The journal of a run, begun now or by an earlier attempt at it.

        `identity` is equal for a request and its retries alone, and `request` is a digest of what was asked. Where the
        store does not answer, the journal serves a run without effects, and refuses any effect. Raises InvalidRequest
        where the identity is that of another request.
        """
        journal = cls(store, [scope, program, identity], datetime.now(UTC), sound=False)
        key = journal._key("now")
        try:
            async with _alone(store, key):
                written = await journal._look(key)
                if written is None:
                    if await journal._lost(key):
                        return journal
                    begun = {"now": journal.now.isoformat(), "request": request}
                    await journal._begin(key, begun, "the run is not begun")
                elif written["request"] != request:
                    raise InvalidRequest(
                        "this Idempotency-Key was used for another request; use a new key for a new request",
                        param="Idempotency-Key",
                        code="idempotency_key_reused",
                    )
                else:
                    journal.now = datetime.fromisoformat(str(written["now"]))
        except (JournalUnusable, KeyError, ValueError):
            return journal
        journal._sound = True
        return journal

    async def perform(
        self, tool: str, arguments: JSON, place: str, act: Callable[[str], Awaitable[Any]], *, repeatable: bool
    ) -> Any:
        """Do it once: `act` is called with a key that is equal for each attempt at this very effect.

        `place` tells equal calls of one run apart. An effect that is known to be done gives its result again. One that
        was begun and left unfinished is done again only if `repeatable`, which says that the other side knows the key.

        Raises EffectUnknown otherwise; what `act` raises is raised, and leaves the effect begun.
        """
        key = self._key(tool, arguments, place)
        not_called = f'tool "{tool}" is not called'
        if not self._sound:
            raise JournalUnusable(f"the journal of effects could not be read; {not_called}")
        # Two attempts at one run may be under way at once, in two processes: the second waits, and finds the result.
        async with _alone(self._store, key):
            written = await self._look(key)
            if written is not None:
                if written.get("state") == "done":
                    return written["result"]
                if not repeatable:
                    raise _unknown(tool, written)
            elif not repeatable and await self._lost(key):
                raise _unknown(tool, {"lost": True})
            begun: dict[str, Any] = {"state": "begun", "at": datetime.now(UTC).isoformat(timespec="seconds")}
            await self._begin(key, begun, not_called)
            try:
                result = await act(key)
            except Exception as error:
                # For whoever must find out; that it is begun is what counts, and that is written.
                told = orjson.dumps({"v": _VERSION, **begun, "raised": type(error).__name__})
                await self._store.set(key, told, tag=JOURNAL)
                raise
            try:
                kept = orjson.loads(orjson.dumps(result, option=orjson.OPT_PASSTHROUGH_DATACLASS))
            except orjson.JSONEncodeError:
                raise ProgramError(
                    f'tool "{tool}" has effect=True and has been called, but its result is not JSON, so that it cannot '
                    f"be kept for a retry: {type(result).__name__}"
                ) from None
            done = {**begun, "state": "done", "result": kept}
            # Once it is done, being cancelled must not keep that from being written.
            await asyncio.shield(self._write(key, done, f'tool "{tool}" has been called, and a retry will not know it'))
            return kept

    def _key(self, *what: JSON) -> str:
        return hashlib.sha256(canonical(["effect", _VERSION, *self._run, *what])).hexdigest()

    async def _look(self, key: str) -> dict[str, Any] | None:
        """What is written; None only where surely nothing is: a store that does not answer looks like an empty one."""
        data = await self._store.get(key)
        if data is None:
            await self._answering()
            data = await self._store.get(key)
        if data is None:
            return None
        try:
            body = cast("object", orjson.loads(data))
        except orjson.JSONDecodeError:
            body = None
        if not isinstance(body, dict) or cast("dict[str, Any]", body).get("v") != _VERSION:
            raise JournalUnusable("the journal of effects holds something that this version cannot read")
        return cast("dict[str, Any]", body)

    async def _answering(self) -> None:
        """Ask for what must be there. Raises JournalUnusable."""
        if await self._store.get(_SIGN_AT) is None:
            await self._store.set(_SIGN_AT, _SIGN, tag=JOURNAL)
            if await self._store.get(_SIGN_AT) is None:
                raise JournalUnusable("the journal of effects cannot be read")

    async def _begin(self, key: str, body: dict[str, Any], so: str) -> None:
        """Write what is first at `key`, and then, elsewhere, that something is there; never the other way round."""
        await self._write(key, body, so)
        await self._write(_witness(key), {}, so)

    async def _lost(self, key: str) -> bool:
        """Whether something was written there that is there no more, or not whole: to a store that is a mere miss."""
        return await self._store.get(_witness(key)) is not None

    async def _write(self, key: str, body: dict[str, Any], so: str) -> None:
        value = orjson.dumps({"v": _VERSION, **body})
        await self._store.set(key, value, tag=JOURNAL)
        if await self._store.get(key) != value:
            # A store that only tries is enough for answers; of an effect it must be known.
            raise JournalUnusable(f"the journal of effects cannot be written; {so}")


@asynccontextmanager
async def _alone(store: Cache, key: str) -> AsyncGenerator[None]:
    """Be the only one at this entry, where the store has leases; it saves time, and safety does not rest on it."""
    if not isinstance(store, Lockable):
        yield
        return
    while True:
        async with store.lease(key) as lease:
            if lease.state != "taken":
                yield
                return
            await lease.wait()


def _witness(key: str) -> str:
    return hashlib.sha256(f"witness {key}".encode()).hexdigest()


def _unknown(tool: str, written: dict[str, Any]) -> EffectUnknown:
    when = f"at {written.get('at')}"
    how = f"it ended with {written['raised']}" if written.get("raised") else "the run was interrupted"
    if written.get("lost"):
        when, how = "before", "what the journal held of it cannot be read any more"
    return EffectUnknown(
        f'tool "{tool}" was begun {when} and it is not known whether it was done, because {how}; find '
        "out, and ask again with a new Idempotency-Key (a tool that takes an `idempotency_key` is repeated by itself)"
    )
