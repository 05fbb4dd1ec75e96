"""What is compared: a model under a name, with parameters and roles of its own; or one step of a program.

evidence-qa                     a program, a preset, an upstream, a composition such as plain:fast
self-consistency@samples=5      the same with parameters
--systems FILE                  a table a system: model, params, roles, prompt
"""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
)

from asmodel.calls import JSON, LogLikelihood, Message, Reply
from asmodel.errors import ConfigurationError, InvalidRequest, ModelNotFound
from asmodel.evaluation.examples import Example, conversation, filled
from asmodel.evaluation.fields import text_of
from asmodel.mistakes import did_you_mean, listed, sentence
from asmodel.models import Model, Models, ServedProgram, ServedUpstream
from asmodel.programs import Answer, Program

if TYPE_CHECKING:
    from asmodel.run import Run
    from asmodel.steps import Step


class Described(BaseModel):
    """A system in a file of systems."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="A program, a preset, an upstream, or a composition.")
    params: dict[str, Any] = Field(default={}, description="Parameters; they come before those for all.")
    roles: dict[str, str] = Field(default={}, description="Who plays which role.")
    prompt: str | None = Field(default=None, description="What it is asked instead of the question; {field} is filled.")


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One that is asked every question."""

    name: str
    asks: str
    """The model's name, as a client would ask for it."""
    model: Model
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    roles: Mapping[str, str] = field(default_factory=dict[str, str])
    prompt: str | None = None
    takes: frozenset[str] | None = frozenset()
    """The parameters that it has; None is any."""

    def params_for(self, example: Example) -> dict[str, JSON]:
        """The example's parameters as far as it takes them, and its own, which come first."""
        return {**{name: value for name, value in example.params.items() if self.has(name)}, **self.params}

    def has(self, param: str) -> bool:
        return self.takes is None or param in self.takes

    def messages_for(self, example: Example) -> tuple[Message, ...]:
        return example.messages if self.prompt is None else (Message("user", filled(self.prompt, example.record)),)


def described(specs: Iterable[str], file: Path | None, models: Models) -> dict[str, Described]:
    """Systems by name: those of the command line, then those of the file. Raises ConfigurationError."""
    found: dict[str, Described] = {}
    for spec in specs:
        if spec in found:
            raise ConfigurationError(f'the system "{spec}" is named twice')
        # The name of an upstream may have an @ in it.
        model, at, pairs = (spec, "", "") if _is_model(spec, models) else spec.partition("@")
        params = dict(_pair(spec, pair) for pair in pairs.split(",")) if at else {}
        found[spec] = Described(model=model, params=params)
    for name, system in ({} if file is None else _read(file)).items():
        if name in found:
            raise ConfigurationError(f'{file}: the system "{name}" is on the command line too; rename one')
        found[name] = system
    return found


def _is_model(name: str, models: Models) -> bool:
    try:
        models.find(name)
    except (ModelNotFound, ConfigurationError):
        return False
    return True


def _pair(spec: str, pair: str) -> tuple[str, Any]:
    name, equals, text = pair.partition("=")
    if not (equals and name):
        raise ConfigurationError(f"{spec}: should be MODEL@NAME=VALUE,NAME=VALUE; --systems FILE takes any value")
    return name, value_of(text)


def value_of(text: str) -> Any:
    """A value on the command line: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read(file: Path) -> dict[str, Described]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        body: Any = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(f"--systems {file}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"--systems {file}: {error}") from None
    try:
        systems = TypeAdapter(dict[str, Described]).validate_python(body)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}: {sentence(e)}" for e in error.errors(include_url=False))
        takes = listed(Described.model_fields)
        raise ConfigurationError(f"--systems {file}: {'; '.join(faults)}; a system has {takes}") from None
    if not systems:
        raise ConfigurationError(f'--systems {file}: has no system in it; one is [name] with model = "…"')
    return systems


def systems_of(found: Mapping[str, Described], models: Models) -> list[System]:
    """The systems, each with its model. Raises ConfigurationError for one that there is not, naming those there are."""
    systems: list[System] = []
    for name, told in found.items():
        try:
            model = models.find(told.model)
        except ModelNotFound as error:
            there = f"; there are {listed((*models.programs, *models.presets, *models.upstreams))}"
            raise ConfigurationError(f'system "{name}": {error}{"" if "there are" in str(error) else there}') from None
        for role, player in told.roles.items():
            try:
                models.find(player)
            except ModelNotFound as error:
                raise ConfigurationError(f'system "{name}": role "{role}": {error}') from None
        if isinstance(model, ServedUpstream) and (told.params or told.roles):
            what = "parameters" if told.params else "roles"
            raise ConfigurationError(f'system "{name}": "{told.model}" is an upstream, which takes no {what}')
        systems.append(
            System(
                name=name,
                asks=told.model,
                model=model,
                params=told.params,
                roles=told.roles,
                prompt=told.prompt,
                takes=_takes(model),
            )
        )
    return systems


def with_params(systems: Sequence[System], given: Mapping[str, JSON]) -> list[System]:
    """The systems with parameters for all, each as far as it takes them. Raises ConfigurationError where none does."""
    for name in given:
        _somebody_takes(systems, name)
    return [
        replace(s, params={**{name: value for name, value in given.items() if s.has(name)}, **s.params})
        for s in systems
    ]


def check(systems: Sequence[System], examples: Sequence[Example], params: Iterable[str], file: Path) -> None:
    """Read every parameter of every question. Raises ConfigurationError with the number of the line."""
    for name in params:
        _somebody_takes(systems, name)
    for system in systems:
        if not isinstance(system.model, ServedProgram):
            continue
        for example in examples:
            try:
                system.model.program.read_params({**system.model.params, **system.params_for(example)})
            except InvalidRequest as error:
                raise ConfigurationError(f'{file}:{example.line}: system "{system.name}": {error}') from None


def _somebody_takes(systems: Sequence[System], param: str) -> None:
    if not any(system.has(param) for system in systems):
        takes = {system.name: listed(system.takes or ()) for system in systems}
        told = "; ".join(f"{name} takes {what}" for name, what in takes.items())
        known = [name for system in systems for name in system.takes or ()]
        raise ConfigurationError(f'no system takes a parameter "{param}"{did_you_mean(param, known)}: {told}')


def _takes(model: Model) -> frozenset[str] | None:
    if not isinstance(model, ServedProgram) or model.program.params is None:
        return frozenset()
    params = model.program.params
    if params.model_config.get("extra") == "allow":
        return None
    return frozenset((*params.model_fields, *(f.alias for f in params.model_fields.values() if f.alias)))


# -- one step of a program ------------------------------------------------------------------------------------------


def step_named(name: str, models: Models) -> tuple[Program[Any, Any], Step[..., Any, Any]]:
    """The step of `PROGRAM/STEP`. Raises ConfigurationError naming the steps that there are."""
    program_name, slash, step_name = name.partition("/")
    if not slash:
        raise ConfigurationError(f"--step {name}: should be PROGRAM/STEP, such as evidence-qa/answer_from")
    program = models.programs.get(program_name)
    if program is None:
        near = did_you_mean(program_name, models.programs)
        raise ConfigurationError(
            f'--step {name}: there is no program "{program_name}"{near}; there are {listed(models.programs)}'
        )
    steps = {step.name: step for step in program.steps}
    if step_name not in steps:
        near = did_you_mean(step_name, steps)
        raise ConfigurationError(
            f'--step {name}: program "{program_name}" has no step "{step_name}"{near}; it has {listed(steps)}'
        )
    return program, steps[step_name]


def step_systems(name: str, players: Iterable[str], models: Models) -> list[System]:
    """The step, once for each model that plays its role; played as the settings say where none is named.

    Raises ConfigurationError.
    """
    program, step = step_named(name, models)
    alone = _alone(program, step)
    takes = frozenset(alone.params.model_fields) if alone.params is not None else frozenset[str]()
    served = ServedProgram(name=name, program=alone)
    roles = dict.fromkeys(players)
    for player in roles:
        try:
            models.find(player)
        except ModelNotFound as error:
            raise ConfigurationError(f"--step {name}: {error}") from None
    return [
        System(
            name=f"{name}:{player}" if player else name,
            asks=name,
            model=served,
            roles={step.role: player} if player else {},
            takes=takes,
        )
        for player in (*roles,) or ("",)
    ]


def _alone(program: Program[Any, Any], step: Step[..., Any, Any]) -> Program[Any, Any]:
    """A program of that name which makes the one step, of arguments that come as parameters."""
    parameters = inspect.signature(step.show).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
        raise ConfigurationError(f'step "{step.name}" takes arguments without names, which no field can be given to')
    try:
        hints = inspect.get_annotations(step.show, eval_str=True)
    except NameError:  # Imported under TYPE_CHECKING.
        hints = {}
    fields: dict[str, Any] = {
        p.name: (_readable(hints.get(p.name, Any)), ... if p.default is p.empty else p.default) for p in parameters
    }
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    arguments = create_model("Arguments", __config__=config, **fields)

    async def one_step(run: Run[Any]) -> Answer:
        given = {p: getattr(run.params, p) for p in fields}
        return _answer(await run(step, **given))

    alone = Program(program.name, one_step, arguments, description=f'step "{step.name}" alone')
    # What traces and the report say was running is the source of the step, not of the function above.
    vars(alone).update(file=program.file, digest=program.digest)
    return alone


def _readable(hint: Any) -> Any:
    """The type of an argument as something that is read out of JSON; Any where pydantic knows no way."""
    if hint is Message or Message in get_args(hint):
        # Of its own, since messages hold any JSON, which is a type that is made of itself.
        one = hint is Message
        return Annotated[Any, BeforeValidator(lambda v: conversation([v])[0] if one else conversation(v))]
    try:
        TypeAdapter(hint)
    except (PydanticUserError, RecursionError):
        return Any
    return hint


def _answer(value: Any) -> Answer:
    """A step's value as an answer: text as it is, yes or no, a number, or JSON."""
    if isinstance(value, str):
        return Answer(text=value)
    if isinstance(value, Reply):
        return Answer(text=value.text, finish=value.finish)
    if isinstance(value, bool):
        return Answer(text="yes" if value else "no", data=value)
    if isinstance(value, LogLikelihood):
        told = {"total": value.total, "tokens": value.tokens, "mean": value.mean}
        return Answer(text=repr(value.mean), data=told)
    data: JSON = TypeAdapter(Any).dump_python(value, mode="json")
    return Answer(text=text_of(data), data=data)
