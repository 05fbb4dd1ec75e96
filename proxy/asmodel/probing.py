"""What `asmodel upstreams` and `asmodel check` find out: what each upstream can do, and who plays which role."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asmodel.calls import CachePolicy, Capabilities, Chat, Completion, Message, Terms
from asmodel.errors import AsmodelError, InvalidRequest, UpstreamError
from asmodel.folders import PACKAGE
from asmodel.hygiene import remarks
from asmodel.models import ServedProgram
from asmodel.protocols import Detecting, Upstream
from asmodel.run import require

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


def _wanted(parts: Parts, model: ServedProgram) -> bool:
    """Whether the operator has brought the program, or named it."""
    settings = parts.settings
    own = model.program.function.__module__.partition(".")[0] == PACKAGE
    return own or model.program.name in settings.programs or model.name in settings.models


def _params(served: ServedProgram) -> object:
    """Its parameters as the settings have them; None where a request has to bring some."""
    try:
        return served.program.read_params(served.params)
    except InvalidRequest:
        return None


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
        found.remarks += [said for said in map(str, remarks(model.program)) if said not in found.remarks]
        if not model.program.steps:
            note = "no step found in its code"
            found.rows.append(Played(program=model.name, step="-", role="-", player="-", note=note))
        try:
            await require(model.program, cast, params=_params(model))
        except AsmodelError as error:
            # Of what came with a package nobody has said that it is wanted here.
            told = found.problems if _wanted(parts, model) else found.remarks
            if str(error) not in told:
                told.append(str(error))
    return found
