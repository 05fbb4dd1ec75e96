"""What a client may ask for by the name `model`, and who plays the roles of what it asked for.

A name is, in this order: a program; an upstream, passed through; a preset of the settings; `PROGRAM:REST`, split at the
first colon, where REST is resolved by the same rules and plays every role of PROGRAM. Nothing is guessed from a prefix
and nothing is read out of message text.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from asmodel.calls import JSON, Call, Capabilities, Chat, Reply, Terms, Usage, key
from asmodel.effects import check_player
from asmodel.errors import ConfigurationError, InvalidRequest, ModelNotFound, ProgramError, UpstreamError
from asmodel.meter import UNMEASURED, Meter
from asmodel.planning import Plan, Planned
from asmodel.programs import Answer, Program
from asmodel.protocols import Cache, Upstream
from asmodel.run import Request, Run, execute, finished, require
from asmodel.upstreams import replay

if TYPE_CHECKING:
    from asmodel.recording import Witness
    from asmodel.tools import Tool

Roles: TypeAlias = Mapping[str, str]

log = logging.getLogger("asmodel.models")


@dataclass(frozen=True, kw_only=True)
class ServedProgram:
    """A program under a name, with what a preset or a composition settles beforehand."""

    name: str
    program: Program[Any, Any]
    roles: Roles = field(default_factory=dict[str, str])
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    description: str = ""
    everyone: Model | None = None
    """Who plays every role, in a composition."""


@dataclass(frozen=True, kw_only=True)
class ServedUpstream:
    """An upstream under its name in the settings: passed through."""

    name: str
    upstream: Upstream
    description: str = ""


Model: TypeAlias = ServedProgram | ServedUpstream


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A program with parameters and roles under a name of its own, for clients that can only type a name."""

    program: str
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    roles: Roles = field(default_factory=dict[str, str])
    description: str = ""


class Told(TypedDict):
    """What the settings say of models."""

    roles: Roles
    program_roles: Mapping[str, Roles]
    program_params: Mapping[str, Mapping[str, JSON]]
    presets: Mapping[str, Mapping[str, Any]]


class Models:
    """Every name that is served, checked at start: two things with one name raise ConfigurationError."""

    def __init__(
        self,
        programs: Sequence[Program[Any, Any]],
        upstreams: Mapping[str, Upstream],
        *,
        presets: Mapping[str, Preset] | None = None,
        roles: Roles | None = None,
        program_roles: Mapping[str, Roles] | None = None,
        program_params: Mapping[str, Mapping[str, JSON]] | None = None,
        tools: Mapping[str, Tool[..., Any]] | None = None,
        store: Cache | None = None,
        meter: Meter = UNMEASURED,
        witness: Witness | None = None,
    ) -> None:
        self.witness = witness
        """Who sees what runs are asked and answered, where runs are recorded, or replayed."""
        self.programs: dict[str, Program[Any, Any]] = {}
        self.upstreams = dict(upstreams)
        self.presets = dict(presets or {})
        self.tools = dict(tools or {})
        self._roles = dict(roles or {})
        self._program_roles = dict(program_roles or {})
        self._program_params = dict(program_params or {})
        self._store = store
        self._meter = meter
        self._plan: Plan | None = None
        for program in programs:
            meter.knows_program(program.name, (step.name for step in program.steps))
            other = self.programs.get(program.name)
            if other is not None:
                raise ConfigurationError(
                    f'two programs are named "{program.name}": {other.where} and {program.where}; rename one'
                )
            self.programs[program.name] = program
        for name in self.upstreams:
            if name in self.programs:
                raise ConfigurationError(
                    f'"{name}" is both an upstream and a program ({self.programs[name].where}); '
                    f"rename [upstreams.{name}] or the program"
                )
            head, colon, _ = name.partition(":")
            if colon and head in self.programs:
                raise ConfigurationError(
                    f'the upstream "{name}" also reads as the program "{head}" ({self.programs[head].where}) played '
                    f"by something else; rename [upstreams.{name!r}] so that it does not begin with a program's name"
                )
        for name, preset in self.presets.items():
            if name.partition(":")[0] in self.programs and ":" in name:
                raise ConfigurationError(
                    f'the preset "{name}" also reads as the program "{name.partition(":")[0]}" played by something '
                    f"else; rename [models.{name!r}]"
                )
            for kind, known in (("a program", self.programs), ("an upstream", self.upstreams)):
                if name in known:
                    raise ConfigurationError(f'"{name}" is both a preset and {kind}; rename [models.{name}]')
            if preset.program.partition(":")[0] not in self.programs:
                raise ConfigurationError(f"[models.{name}]: {self._unknown(preset.program, self.programs, 'program')}")
            self._found(preset.program, f"[models.{name}]")
        for name in self._program_roles.keys() | self._program_params.keys():
            if name not in self.programs:
                raise ConfigurationError(f"[programs.{name}]: {self._unknown(name, self.programs, 'program')}")
        self._check_roles()

    def _check_roles(self) -> None:
        tables: list[tuple[str, Roles]] = [("[roles]", self._roles)]
        tables += [(f"[programs.{name}.roles]", roles) for name, roles in self._program_roles.items()]
        tables += [(f"[models.{name}] roles", preset.roles) for name, preset in self.presets.items()]
        for table, roles in tables:
            for role, player in roles.items():
                self._found(player, f'{table}: role "{role}"')

    def _found(self, name: str, where: str) -> None:
        try:
            self.find(name)
        except ModelNotFound as error:
            raise ConfigurationError(f"{where}: {error}") from None

    def _unknown(self, name: str, known: Mapping[str, object], what: str) -> str:
        near = difflib.get_close_matches(name, known, n=1)
        return f'there is no {what} "{name}"' + (
            f'; did you mean "{near[0]}"?' if near else f"; there are {', '.join(sorted(known)) or 'none'}"
        )

    def find(self, name: str, *, within: tuple[str, ...] = ()) -> Model:
        """What the name stands for. Raises ModelNotFound with the nearest name.

        `within` are the names that this one is part of, so that a preset cannot be made of itself.
        """
        if name in within:
            raise ConfigurationError(f'"{name}" is made of itself: {" > ".join((*within, name))}')
        if name in self.programs:
            program = self.programs[name]
            params = self._program_params.get(name, {})
            return ServedProgram(name=name, program=program, params=params, description=program.description)
        if name in self.upstreams:
            return ServedUpstream(name=name, upstream=self.upstreams[name])
        if name in self.presets:
            preset = self.presets[name]
            base = self.find(preset.program, within=(*within, name))
            assert isinstance(base, ServedProgram)
            return replace(
                base,
                name=name,
                roles=preset.roles,
                params={**base.params, **preset.params},
                description=preset.description or base.description,
            )
        head, colon, rest = name.partition(":")
        if colon and head in self.programs:
            outer = self.find(head)
            assert isinstance(outer, ServedProgram)
            return replace(outer, name=name, everyone=self.find(rest, within=(*within, name)))
        known = dict.fromkeys((*self.programs, *self.presets, *self.upstreams))
        whole = f'"{within[0]}": ' if within else ""
        raise ModelNotFound(whole + self._unknown(name, known, "model"), param="model")

    def planning(self, plan: Plan) -> Models:
        """The same models, of which nothing is asked: what a run would find, and would buy, is noted in `plan`."""
        twin = copy.copy(self)
        twin.upstreams = {name: Planned(upstream, plan) for name, upstream in self.upstreams.items()}
        twin._plan = plan
        return twin

    @property
    def told(self) -> Told:
        """What it was made with, besides programs and upstreams: JSON, by which a recorded run is found a cast."""
        return Told(
            roles=self._roles,
            program_roles=self._program_roles,
            program_params=self._program_params,
            presets={name: asdict(preset) for name, preset in self.presets.items()},
        )

    def all(self) -> list[Model]:
        """Programs, presets and upstreams; compositions are too many to list."""
        return [self.find(name) for name in (*self.programs, *self.presets, *self.upstreams)]

    def cast(self, served: ServedProgram, roles: Roles | None = None) -> RoleCast:
        """Who plays the roles of a program; `roles` are the request's own, and come first."""
        for role, player in (roles or {}).items():
            try:
                self.find(player)
            except ModelNotFound as error:
                raise InvalidRequest(f'role "{role}": {error}', param=f"asmodel.roles.{role}") from None
        return RoleCast(self, served.program, request=roles or {}, preset=served.roles, everyone=served.everyone)

    def role(self, program: str, role: str) -> str | None:
        """Who the settings say plays the role; None where they say nothing."""
        return self._program_roles.get(program, {}).get(role) or self._roles.get(role)

    def tool(self, name: str) -> Tool[..., Any]:
        """The tool of the settings that has this name. Raises InvalidRequest where there is none."""
        if name not in self.tools:
            raise InvalidRequest(self._unknown(name, self.tools, "tool"), param="asmodel.params")
        return self.tools[name]

    def upstream(self, model: Model, roles: Roles) -> Upstream:
        """A model as something that answers calls."""
        if isinstance(model, ServedUpstream):
            return model.upstream
        return PlayedByProgram(self, model, roles, self._store, self._meter, self._plan)


class RoleCast:
    """Who plays which role in one program of one request."""

    def __init__(
        self, models: Models, program: Program[Any, Any], *, request: Roles, preset: Roles, everyone: Model | None
    ) -> None:
        self._models = models
        self._program = program
        self._request = request
        self._preset = preset
        self._everyone = everyone
        self._players: dict[str, Upstream] = {}

    def who(self, role: str) -> Model:
        """The model that plays the role. Raises InvalidRequest where there is none."""
        models, program = self._models, self._program
        if role in self._request:
            return models.find(self._request[role])
        if self._everyone is not None:
            return self._everyone
        name = self._preset.get(role) or program.roles.get(role) or models.role(program.name, role)
        if name is not None:
            return models.find(name)
        if role in models.upstreams:
            return models.find(role)
        if "default" in self._request:
            return models.find(self._request["default"])
        # `default` may be a role of the settings too, so that one line says who plays everything else.
        name = models.role(program.name, "default") or "default"
        if name in models.upstreams or name != "default":
            return models.find(name)
        raise InvalidRequest(
            f'nobody plays the role "{role}" of program "{program.name}": write [upstreams.default], or name an '
            f"upstream under [roles]; there are {', '.join(sorted(models.upstreams)) or 'no upstreams'}",
            param=f"asmodel.roles.{role}",
        )

    def play(self, role: str) -> Upstream:
        player = self._players.get(role)
        if player is None:
            player = self._players[role] = self._models.upstream(self.who(role), self._request)
        return player

    async def able(self, can: Callable[[Capabilities], bool]) -> list[str]:
        """The upstreams that say of themselves that they can; none is asked to try."""
        able: list[str] = []
        for name, upstream in self._models.upstreams.items():
            try:
                if can(await upstream.capabilities()):
                    able.append(name)
            except UpstreamError as error:
                log.info("upstream %s does not say what it can do: %s", name, error)
        return able

    def tool(self, name: str) -> Tool[..., Any]:
        return self._models.tool(name)

    def nested(self, program: Program[Any, Any]) -> RoleCast:
        return RoleCast(self._models, program, request=self._request, preset=self._preset, everyone=self._everyone)


class PlayedByProgram:
    """A program as an upstream: it plays a role of another. Its answer is not stored whole; its own steps are."""

    def __init__(
        self,
        models: Models,
        served: ServedProgram,
        roles: Roles,
        store: Cache | None,
        meter: Meter = UNMEASURED,
        plan: Plan | None = None,
    ) -> None:
        self.name = served.name
        self._models = models
        self._served = served
        self._roles = {role: player for role, player in roles.items() if player != served.name}
        self._store = store
        self._meter = meter
        self._plan = plan

    @property
    def identity(self) -> str:
        return f"program:{self._served.name}:{self._served.program.digest}"

    async def capabilities(self) -> Capabilities:
        supports = self._served.program.supports
        return Capabilities(chat=True, schema="response_format" in supports, tools="tools" in supports)

    async def require(self, chain: tuple[str, ...]) -> None:
        """Raises InvalidRequest where the program leads back to itself, or wants parameters that it is not given."""
        served = self._served
        if self.name in chain:
            way = " > ".join((*chain[chain.index(self.name) :], self.name))
            raise InvalidRequest(
                f"the roles lead in a circle: {way}; say in [programs.{served.program.name}.roles] who plays its roles",
                param="model",
                code="role_circle",
            )
        check_player(served.program)
        params = served.program.read_params(served.params)
        cast = self._models.cast(served, self._roles)
        await require(served.program, cast, chain=(*chain, self.name), params=params)

    async def send(self, call: Call, terms: Terms) -> Reply:
        served = self._served
        if not isinstance(call, Chat):
            raise ProgramError(
                f'step "{terms.step}" makes a {call.kind} call, and the program "{served.name}", which plays its '
                "role, answers chat calls only; name an upstream for that role"
            )
        shape: dict[str, Any] = {}
        hints = dict(call.params)
        for name in ("response_format", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs"):
            if name in hints:
                shape[name] = hints.pop(name)
        if call.schema is not None:
            schema = {"name": "reply", "schema": call.schema, "strict": True}
            shape["response_format"] = {"type": "json_schema", "json_schema": schema}
        if call.tools:
            shape["tools"] = list(call.tools)
        run: Run[Any] = Run(
            served.program,
            Request(messages=call.messages, hints=hints, shape=shape),
            id=terms.run_id,
            cast=self._models.cast(served, self._roles),
            params=served.program.read_params(served.params),
            # The draw says which of several equal calls this is, the key which they equal: runs inside share no draws.
            # By its name and not its source: what an edit of the program leaves as it was is not bought again.
            path=f"{call.draw or '-'}/{served.name}.{key(replace(call, identity=served.name))[:8]}",
            budget=terms.budget,
            progress=terms.progress,
            cache=terms.cache,
            scope=terms.scope,
            deadline=terms.deadline,
            store=self._store,
            emit=terms.emit,
            depth=terms.depth + 1,
            now=terms.now,
            plan=self._plan,
            meter=self._meter,
            witness=self._models.witness,
        )
        answer: Answer = finished(run, await execute(run))
        said = run.replied or Reply()
        reply = Reply(
            text=answer.text,
            finish=answer.finish,
            tool_calls=tuple(answer.tool_calls),
            reasoning=said.reasoning,
            refusal=said.refusal,
            logprobs=said.logprobs,
            usage=Usage(),  # Its steps have been charged already.
            model=served.name,
            cost=0.0,
        )
        if terms.emit is not None and not run.streamed:
            await replay(replace(reply, reasoning="") if run.thought else reply, terms.emit)
        return reply
