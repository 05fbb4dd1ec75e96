"""Asking again for another answer: how often an answer to a request was delivered whole, and so which draws come next.

For chat front ends, whose "regenerate" is the same request once more. What an SDK sends again, or what comes again
because its answer never arrived, gets the draws that it had: it has paid for them. Scores and calls at temperature 0
have no draw, so there the next answer costs nothing and is the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import orjson

from asmodel.calls import canonical
from asmodel.protocols import Cache
from asmodel.tags import DELIVERIES

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Delivery:
    """One answer on its way to a client."""

    generation: int
    """How many answers to this request were delivered before, as far as that is known."""
    _key: str
    _store: Cache

    def path(self, choice: int) -> str:
        """The beginning of the draws of a choice. Of the first answer, what it is without this."""
        return draw_path(choice, self.generation)

    async def whole(self) -> None:
        """It has been delivered whole: whoever asks again, asks for another."""
        seen = _read(await self._store.get(self._key))
        if seen is None or seen[0] == self.generation:
            await _write(self._store, self._key, self.generation, delivered=True)


def draw_path(choice: int, generation: int = 0) -> str:
    """Where a run's draws begin. No path of one generation begins one of another."""
    return f"{choice}" if generation == 0 else f"again{generation}:{choice}"


class Deliveries:
    """What was delivered, by request, kept in the step cache: forgotten where that forgets, and then begun anew."""

    def __init__(self, store: Cache) -> None:
        self._store = store

    async def begin(self, request: str, *, scope: str, retry: bool) -> Delivery:
        """An answer that is about to be made.

        `request` is a digest of all that makes the request what it is (model, messages, parameters, …) and of nothing
        that differs between it and its repetition; `retry` says that an SDK sends it again by itself
        (`x-stainless-retry-count` above 0).
        """
        key = hashlib.sha256(canonical(["delivery", _VERSION, scope, request])).hexdigest()
        generation, delivered = _read(await self._store.get(key)) or (0, False)
        if delivered and not retry:
            generation += 1
            # Written now, so that a retry of this request keeps to it.
            await _write(self._store, key, generation, delivered=False)
        return Delivery(generation, key, self._store)


async def _write(store: Cache, key: str, generation: int, *, delivered: bool) -> None:
    body = {"v": _VERSION, "generation": generation, "delivered": delivered}
    await store.set(key, orjson.dumps(body), tag=DELIVERIES)


def _read(data: bytes | None) -> tuple[int, bool] | None:
    try:
        body = cast("object", orjson.loads(data or b""))
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict):
        return None
    fields = cast("dict[str, Any]", body)
    generation, delivered = fields.get("generation"), fields.get("delivered")
    if fields.get("v") != _VERSION or not isinstance(generation, int) or not isinstance(delivered, bool):
        return None
    return generation, delivered
