"""What `asmodel upstreams` and `asmodel check` find out: what each upstream can do, and who plays which role."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from asmodel.calls import CachePolicy, Capabilities, Chat, Completion, Message, Terms
from asmodel.errors import AsmodelError, UpstreamError
from asmodel.models import ServedProgram
from asmodel.programs import Program
from asmodel.protocols import Detecting, Upstream
from asmodel.run import require
from asmodel.steps import Step

if TYPE_CHECKING:
    from asmodel.app import Parts

_CAN = ("chat", "completion", "stream", "schema", "tools", "loglikelihood", "embeddings", "context")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One upstream: whether it answers, and what it can do."""

    name: str
    kind: str
    identity: str
    answers: str
    error: str = ""
    can: dict[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "identity": self.identity,
            "answers": not self.error,
            "error": self.error or None,
            "can": self.can,
        }


async def probe(parts: Parts) -> list[Probed]:
    """Ask every upstream for one token, and have it detect what must be detected; all at once, nothing cached."""
    settings = parts.settings.effective_upstreams
    return list(
        await asyncio.gather(*(_probe(name, settings[name].kind, up) for name, up in parts.models.upstreams.items()))
    )


async def _probe(name: str, kind: str, upstream: Upstream) -> Probed:
    can = Capabilities()
    try:
        can = await upstream.capabilities()
        terms = Terms(step="probe", cache=CachePolicy(mode="off"))
        if can.chat:
            call: Chat | Completion = Chat(
                identity=upstream.identity, messages=(Message("user", "Say hello."),), params={"max_tokens": 1}
            )
        else:
            call = Completion(identity=upstream.identity, prompt="Hello", params={"max_tokens": 1})
        reply = await upstream.send(call, terms)
        if isinstance(upstream, Detecting):
            can = await upstream.detect()
    except UpstreamError as error:
        shown = {name: getattr(can, name) for name in _CAN}
        return Probed(name=name, kind=kind, identity=upstream.identity, answers="no", error=str(error), can=shown)
    shown = {name: getattr(can, name) for name in _CAN}
    return Probed(name=name, kind=kind, identity=upstream.identity, answers=reply.model or "yes", can=shown)


@dataclass(frozen=True, kw_only=True)
class Played:
    """A step, its role, and who plays that."""

    program: str
    step: str
    role: str
    player: str
    note: str = ""


@dataclass(kw_only=True)
class Checked:
    """Who plays each role, what is wrong, and what is odd."""

    rows: list[Played] = field(default_factory=list[Played])
    problems: list[str] = field(default_factory=list[str])
    remarks: list[str] = field(default_factory=list[str])


async def roles(parts: Parts) -> Checked:
    """Look at every step of every program that is served."""
    found = Checked()
    for model in parts.models.all():
        if not isinstance(model, ServedProgram):
            continue
        cast = parts.models.cast(model)
        for step in model.program.steps:
            try:
                player = cast.who(step.role).name
            except AsmodelError as error:
                player = "nobody"
                found.problems.append(str(error))
            note = "log-likelihood" if step.kind == "score" else ""
            found.rows.append(Played(program=model.name, step=step.name, role=step.role, player=player, note=note))
            found.remarks += [r for r in remarks(model.program, step) if r not in found.remarks]
        if not model.program.steps:
            note = "no step found in its code"
            found.rows.append(Played(program=model.name, step="-", role="-", player="-", note=note))
        try:
            await require(model.program, cast)
        except AsmodelError as error:
            if str(error) not in found.problems:
                found.problems.append(str(error))
    return found


_CLOCKS = frozenset(("time", "monotonic", "perf_counter", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"))
_OUTSIDE = {
    "time": "a clock",
    "datetime": "a clock",
    "random": "chance",
    "secrets": "chance",
    "uuid": "chance",
    "os": "the machine's environment",
}
"""Modules whose functions answer differently when they are asked again."""


def remarks(program: Program[Any, Any], step: Step[..., Any, Any]) -> list[str]:
    """What the step shows besides its arguments: globals that can change, clocks, chance.

    All of it is part of the prompt, and so of the cache key; but whoever reads the step does not see it, and a run
    that is resumed may show something else than before.
    """
    found: list[str] = []
    for function in _functions(step.show):
        try:
            variables = inspect.getclosurevars(function)
        except (TypeError, ValueError):
            continue
        names = set(function.__code__.co_names)
        for name, value in {**variables.globals, **variables.nonlocals}.items():
            what = _outside(name, value, names)
            if what:
                found.append(
                    f'program "{program.name}": step "{step.name}" shows {what}, which is none of its arguments; '
                    "take it as one, so that it can be seen and tested"
                )
    return found


def _functions(function: Callable[..., Any]) -> list[FunctionType]:
    """The function, and those of its module that it calls."""
    found: list[FunctionType] = []
    left: list[object] = [inspect.unwrap(function)]
    while left:
        one = left.pop()
        if not isinstance(one, FunctionType) or one in found or one.__module__ != function.__module__:
            continue
        found.append(one)
        left += [one.__globals__[name] for name in one.__code__.co_names if name in one.__globals__]
    return found


def _outside(name: str, value: object, used: set[str]) -> str:
    """What a global is, where its value may be another one next time; else nothing."""
    if isinstance(value, (list, dict, set, bytearray)):
        return f"the global {name}"
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    kind = _OUTSIDE.get(str(home or "").lstrip("_"))
    if kind == "a clock" and not (used & _CLOCKS):
        return ""  # `datetime.fromisoformat` and the like ask no clock.
    return f"{kind} ({name})" if kind else ""
