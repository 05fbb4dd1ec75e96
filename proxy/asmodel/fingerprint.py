"""What a call is made of, as keyed digests: enough to say later which part of two calls differed, and of no other use.

A digest is keyed (BLAKE2b, RFC 7693) with a secret of the store's own, so that nobody who sees one (in a trace that is
exported, say) can try out guesses of a prompt against it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

import orjson

from asmodel.calls import Call, canonical, written_fields
from asmodel.protocols import Cache, Lockable
from asmodel.tags import SECRET

_SECRET_AT = hashlib.sha256(b"asmodel fingerprint secret 2").hexdigest()

_LISTED = frozenset(("messages", "texts", "tools"))

_EACH = 48
"""Of a list, so many items have a digest each, and the rest one together: a fingerprint stays small."""

BY = "by"
"""Names, in a fingerprint, the secret: digests by different secrets tell nothing of each other."""

_OWN = "params.own."

_SMALL = 64
_REMEMBERED = 1000
"""So many digests of small parts are kept: who answers, each parameter, the draw and the scope are nearly always one of
a few, and to digest anew is most of what a fingerprint costs. No message is among them.
"""

_NUMBERS = frozenset((float, int, bool))

_PARAMETERS = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "max_tokens", "max_completion_tokens", "logit_bias"}
    | {"frequency_penalty", "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs", "response_format"}
    | {"tool_choice", "parallel_tool_calls", "modalities", "audio", "prediction", "reasoning_effort", "verbosity"}
    | {"service_tier", "store", "metadata", "user", "safety_identifier", "prompt_cache_key", "web_search_options"}
    | {"documents", "echo", "suffix", "best_of", "dimensions", "encoding_format"}
)

Fingerprint = Mapping[str, str]
"""The digest of each part by its name: `identity`, `messages.0`, `params.temperature`, `draw`, `scope`, …"""


class Fingerprints:
    """Makes the fingerprints of calls with one store's secret, which is made at its first use.

    Where the secret cannot be kept, they are this process's alone until it can.
    """

    def __init__(self, store: Cache | None) -> None:
        self._store = store
        self._by = ""
        self._keyed: hashlib.blake2b | None = None
        self._small: dict[tuple[str, type, object], tuple[str, str]] = {}

    def at_once(self, call: Call, scope: str) -> dict[str, str] | None:
        """As `of`, where the secret is known by now; else None."""
        return None if self._keyed is None else self._made(call, scope, self._keyed, self._by, self._small)

    async def of(self, call: Call, scope: str) -> dict[str, str]:
        """The fingerprint of a call: 8 hex digits a part."""
        keyed, by = self._keyed, self._by
        if keyed is None:
            secret, is_kept = await self._load()
            keyed, by = hashlib.blake2b(key=secret, digest_size=4), hashlib.sha256(secret).hexdigest()[:8]
            if not is_kept:
                return self._made(call, scope, keyed, by, {})
            self._keyed, self._by = keyed, by
        return self._made(call, scope, keyed, by, self._small)

    def _made(
        self,
        call: Call,
        scope: str,
        keyed: hashlib.blake2b,
        by: str,
        small: dict[tuple[str, type, object], tuple[str, str]],
    ) -> dict[str, str]:
        made = {BY: by}
        for name, value in (*_parts(call), ("scope", scope)):
            kind = type(value)
            if (kind is str and len(cast("str", value)) <= _SMALL) or value is None or kind in _NUMBERS:
                # By its type too: 1, 1.0 and True are one key of a dictionary.
                known = small.get((name, kind, value))
                if known is None:
                    if len(small) >= _REMEMBERED:
                        small.clear()
                    known = small[name, kind, value] = _digest(keyed, name, value)
                made[known[0]] = known[1]
            else:
                told, digest = _digest(keyed, name, value)
                made[told] = digest
        return made

    async def _load(self) -> tuple[bytes, bool]:
        """The secret, and whether it is kept: else the next one may be another."""
        store = self._store
        if store is None:
            return secrets.token_bytes(32), True
        found = _read(await store.get(_SECRET_AT))
        if found is None:
            async with AsyncExitStack() as stack:
                if isinstance(store, Lockable):
                    # Of two processes that begin a store, one makes the secret.
                    lease = await stack.enter_async_context(store.lease(_SECRET_AT))
                    await lease.wait()
                    found = _read(await store.get(_SECRET_AT))
                found = found or secrets.token_bytes(32)
                # Set though it may be there: a store forgets first what was set longest ago.
                await store.set(_SECRET_AT, orjson.dumps({"v": 1, "secret": found.hex()}), tag=SECRET)
                if _read(await store.get(_SECRET_AT)) != found:
                    return found, False
        return found, True


def _digest(keyed: hashlib.blake2b, name: str, value: object) -> tuple[str, str]:
    """What a part is called in a fingerprint, and its digest."""
    digest = keyed.copy()
    digest.update(name.encode() + b"\0" + canonical(value))
    if name.startswith(_OWN):
        # A name of the caller's own making, which is not for a trace to tell.
        own = keyed.copy()
        own.update(name.encode())
        name = f"{_OWN}{own.hexdigest()}"
    return name, digest.hexdigest()


def _read(data: bytes | None) -> bytes | None:
    try:
        return bytes.fromhex(orjson.loads(data or b"")["secret"])
    except (ValueError, KeyError, TypeError):
        return None


def _parts(call: Call) -> list[tuple[str, object]]:
    parts: list[tuple[str, object]] = [("kind", call.kind)]
    for name in written_fields(call):
        value: Any = getattr(call, name)
        if name in _LISTED:
            items = cast("Sequence[Any]", value)
            for place, item in enumerate(items[:_EACH]):
                parts.append((f"{name}.{place}", item.wire() if name == "messages" else item))
            if len(items) > _EACH:
                rest = items[_EACH:]
                parts.append((f"{name}.{_EACH}-", [m.wire() for m in rest] if name == "messages" else rest))
        elif name == "params":
            for parameter, given in cast("Mapping[str, Any]", value).items():
                parts.append((("params." if parameter in _PARAMETERS else _OWN) + parameter, given))
        else:
            parts.append((name, value))
    return parts


def read(data: object) -> dict[str, str] | None:
    """A fingerprint out of a store or a trace that others may have written to; None where it is none."""
    if not isinstance(data, dict):
        return None
    parts = cast("dict[object, object]", data)
    if not all(isinstance(name, str) and isinstance(digest, str) for name, digest in parts.items()):
        return None
    return cast("dict[str, str]", parts) if BY in parts else None


def differing(a: Fingerprint, b: Fingerprint) -> list[str]:
    """The names of the parts that are not the same in both, or that only one has, in the order of a call."""
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]
