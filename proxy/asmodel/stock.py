"""What a store holds and what it has saved, by step; and throwing some of it away."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asmodel import tracing
from asmodel.errors import ConfigurationError
from asmodel.protocols import Cache, Clearable, Listable
from asmodel.tags import read, scope_digest
from asmodel.trace_schema import SCHEMA

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(slots=True, kw_only=True)
class OfStep:
    """One step's part in it. What was found and saved is that of the runs that are kept."""

    program: str
    step: str
    entries: int = 0
    bytes: int = 0
    hits: int = 0
    joined: int = 0
    misses: int = 0
    saved_tokens: int = 0
    saved_cost: float = 0.0
    """US dollars, of the hits whose price is known."""

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, kw_only=True)
class Stock:
    """A store, step by step."""

    steps: list[OfStep] = field(default_factory=list[OfStep])

    @property
    def entries(self) -> int:
        return sum(step.entries for step in self.steps)

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    @property
    def saved_tokens(self) -> int:
        return sum(step.saved_tokens for step in self.steps)

    @property
    def saved_cost(self) -> float:
        return sum(step.saved_cost for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        return {
            "entries": self.entries,
            "bytes": self.bytes,
            "saved_tokens": self.saved_tokens,
            "saved_cost": self.saved_cost,
            "steps": [step.as_json() for step in self.steps],
        }


async def take(store: Cache, traces: Path | None) -> Stock:
    """Count what the store holds, and what the runs in the local file of traces found in it."""
    steps: dict[tuple[str, str], OfStep] = {}

    def of(program: str, step: str) -> OfStep:
        return steps.setdefault((program, step), OfStep(program=program, step=step))

    async for _, tag, size in _listable(store).entries():
        told = read(tag)
        if told is not None:
            one = of(told.program, told.step)
            one.entries += 1
            one.bytes += size
    for program, step, result, times, tokens, cost in _found(traces) if traces is not None else ():
        one = of(str(program or ""), str(step))
        if result == "hit":
            one.hits += times
            one.saved_tokens += int(tokens or 0)
            one.saved_cost += float(cost or 0.0)
        elif result == "joined":
            one.joined += times
        elif result == "miss":
            one.misses += times
    return Stock(steps=[steps[name] for name in sorted(steps)])


def _found(path: Path) -> list[tuple[Any, ...]]:
    if not path.exists():
        return []

    def attribute(name: str) -> str:
        return f"json_extract(data, '$.attributes.\"{name}\"')"

    columns = ", ".join(map(attribute, (tracing.STEP_PROGRAM, tracing.STEP_NAME, tracing.CACHE_RESULT)))
    sums = ", ".join(f"sum({attribute(name)})" for name in (tracing.CACHE_SAVED_TOKENS, tracing.CACHE_SAVED_COST))
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
            ((version,),) = connection.execute("PRAGMA user_version").fetchall()
            if version != SCHEMA:
                return []
            return connection.execute(
                f"SELECT {columns}, count(*), {sums} FROM spans WHERE {attribute(tracing.STEP_NAME)} IS NOT NULL"
                " GROUP BY 1, 2, 3"
            ).fetchall()
    except sqlite3.Error as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


async def clear(
    store: Cache,
    *,
    program: str | None = None,
    step: str | None = None,
    scope: str | None = None,
    older_than: float | None = None,
) -> int:
    """Delete the answers of a program, a step, a scope, or those over `older_than` seconds old; says how many.

    All that is given must hold of what is deleted. What the store keeps for itself stays.
    """
    listable = _listable(store)
    if not isinstance(store, Clearable):
        raise ConfigurationError(f"[cache]: {type(store).__name__} cannot be cleared")
    digest = None if scope is None else scope_digest(scope)
    tags: set[str] = set()
    async for _, tag, _ in listable.entries():
        told = read(tag)
        if (
            told is not None
            and program in (None, told.program)
            and step in (None, told.step)
            and digest in (None, told.scope)
        ):
            tags.add(tag)
    return sum([await store.clear(tag=tag, older_than=older_than) for tag in sorted(tags)])


def _listable(store: Cache) -> Listable:
    if not isinstance(store, Listable):
        raise ConfigurationError(f"[cache]: {type(store).__name__} cannot say what it holds")
    return store


def seconds(text: str) -> float:
    """`90s`, `15m`, `12h`, `7d`, `2w` as seconds. Raises ConfigurationError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if found is None:
        raise ConfigurationError(f"{text}: should be a number and a unit: 90s, 15m, 12h, 7d or 2w")
    return float(found[1]) * _UNITS[found[2]]
