"""A program: a named async function `Run -> str`. Its name is the `model` that clients ask for."""

from __future__ import annotations

import dis
import hashlib
import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, cast, overload

from typing_extensions import TypeVar

from asmodel.calls import JSON, ToolCall
from asmodel.errors import ConfigurationError, InvalidRequest
from asmodel.steps import Step, resemble, source_digest
from asmodel.tools import Tool

if TYPE_CHECKING:
    from pydantic import BaseModel

    from asmodel.run import Run

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

Support: TypeAlias = Literal["tools", "response_format", "logprobs", "images", "audio"]
"""What changes the shape of an answer, and is refused unless the program says that it can."""

ParamsT = TypeVar("ParamsT", bound="BaseModel | None", default=None)
Out = TypeVar("Out", bound="str | Answer", covariant=True, default="str")


@dataclass(frozen=True, slots=True, kw_only=True)
class Citation:
    """A piece of evidence: which document, and the words of it that count."""

    id: str
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a program returns when text alone is not enough.

    `citations` and `data` reach the client in the body's `asmodel` object; `tool_calls` are calls of the *client's*
    tools, for a program that supports them.
    """

    text: str = ""
    citations: Sequence[Citation] = ()
    data: JSON = None
    finish: str = "stop"
    tool_calls: Sequence[ToolCall] = ()


@dataclass(frozen=True, eq=False)
class Program(Generic[ParamsT, Out]):
    """Made by `@program`. Calling it calls its function; `await run(program, messages)` runs it inside another."""

    name: str
    function: Callable[[Run[ParamsT]], Awaitable[Out]]
    params: type[BaseModel] | None = None
    supports: frozenset[Support] = frozenset()
    description: str = ""
    given: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    """Parameters that `using` has set."""
    roles: Mapping[str, str] = field(default_factory=dict[str, str])
    """Roles that `using` has set."""
    uses: Callable[[Any], Sequence[Step[..., Any, Any]]] | None = None
    """Which of its steps a run with given parameters may make, where that is not all of them."""

    def __post_init__(self) -> None:
        resemble(self, self.function)

    async def __call__(self, run: Run[ParamsT]) -> Out:
        return await self.function(run)

    def using(
        self, *, params: BaseModel | Mapping[str, JSON] | None = None, roles: Mapping[str, str] | None = None
    ) -> Program[ParamsT, Out]:
        """The same program with parameters or roles set: `run(evidence_qa.using(params={"keep": 3}), messages)`."""
        given = params if params is None or isinstance(params, Mapping) else params.model_dump(mode="json")
        return replace(self, given={**self.given, **(given or {})}, roles={**self.roles, **(roles or {})})

    def read_params(self, given: Mapping[str, JSON]) -> Any:
        """Validate parameters. Raises InvalidRequest naming each that is wrong, before anything is bought."""
        merged = {**self.given, **given}
        if self.params is None:
            if merged:
                raise InvalidRequest(
                    f'program "{self.name}" takes no parameters, but was given {", ".join(sorted(merged))}',
                    param=f"asmodel.params.{min(merged)}",
                )
            return None
        from pydantic import ValidationError

        names = {field.alias or name for name, field in self.params.model_fields.items()}
        unknown = merged.keys() - names - self.params.model_fields.keys()
        if unknown and self.params.model_config.get("extra") != "allow":
            raise InvalidRequest(
                f'program "{self.name}" takes no parameter {", ".join(sorted(unknown))}; '
                f"it takes {', '.join(sorted(names))}",
                param=f"asmodel.params.{min(unknown)}",
            )
        try:
            return self.params.model_validate(merged)
        except ValidationError as error:
            faults = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
            raise InvalidRequest(
                f'program "{self.name}": ' + "; ".join(f"{where or 'params'}: {what}" for where, what in faults),
                param=".".join(filter(None, ("asmodel.params", faults[0][0]))),
            ) from None

    def check_params(self, given: Mapping[str, JSON]) -> None:
        """Raise InvalidRequest for given parameters that can never be right; what is missing may still come."""
        if self.params is None:
            self.read_params(given)
            return
        from pydantic import ValidationError

        try:
            self.params.model_validate({**self.given, **given})
        except ValidationError as error:
            wrong = [e for e in error.errors() if e["type"] != "missing"]
            if wrong:
                self.read_params(given)

    @cached_property
    def file(self) -> Path | None:
        try:
            return Path(inspect.getfile(self.function))
        except TypeError:
            return None

    @cached_property
    def where(self) -> str:
        """File and line, for error messages."""
        return f"{self.file or '?'}:{self.function.__code__.co_firstlineno}"

    @cached_property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over the source of the program's file: what was running, when it is asked later."""
        try:
            return hashlib.sha256((self.file or Path()).read_bytes()).hexdigest()[:16]
        except OSError:
            return source_digest(self.function)

    @cached_property
    def steps(self) -> tuple[Step[..., Any, Any], ...]:
        """The steps that its code names, in it or in functions that it calls; for checks before anything is bought."""
        return tuple(found for found in reachable(self.function) if isinstance(found, Step))

    def steps_with(self, params: object) -> Sequence[Step[..., Any, Any]]:
        """The steps that a run with these parameters may make; all of them where the parameters are not known."""
        if self.uses is None or (params is None and self.params is not None):
            return self.steps
        return self.uses(params)

    @cached_property
    def programs(self) -> tuple[Program[Any, Any], ...]:
        """The programs that its code names."""
        return tuple(found for found in reachable(self.function) if isinstance(found, Program))

    @cached_property
    def effects(self) -> tuple[Tool[..., Any], ...]:
        """The tools with effects that its code, its steps, and the programs that it names could call."""
        found: dict[str, Tool[..., Any]] = {}
        seen: set[int] = set()

        def look(program: Program[Any, Any]) -> None:
            if id(program.function) in seen:
                return
            seen.add(id(program.function))
            for thing in reachable(program.function):
                if isinstance(thing, Program):
                    look(thing)
                tools = (thing,) if isinstance(thing, Tool) else ()
                for tool in (*tools, *(thing.options.get("tools", ()) if isinstance(thing, Step) else ())):
                    if tool.effect:
                        found.setdefault(tool.name, tool)

        look(self)
        return tuple(found.values())


def _code(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of the lambdas, comprehensions and functions inside it."""
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _code(constant)


def _variables(code: CodeType) -> set[str]:
    """The global variables that the code reads; `co_names` alone holds the names of attributes too."""
    read = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return {name for name in read if isinstance(name, str)}


Reached: TypeAlias = "Step[..., Any, Any] | Program[Any, Any] | Tool[..., Any]"


def reachable(function: Callable[..., Any]) -> Iterator[Reached]:
    """Steps, programs and tools that a function's code names, through the functions of its own package too."""
    seen: set[int] = set()
    package = function.__module__.partition(".")[0]

    def visit(value: object) -> Iterator[Reached]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (Step, Program, Tool)):
            yield cast("Any", value)
        elif isinstance(value, (list, tuple)):
            for item in cast("Sequence[object]", value):
                yield from visit(item)
        elif isinstance(value, dict):
            for item in cast("dict[object, object]", value).values():
                yield from visit(item)
        elif inspect.isfunction(value) and value.__module__.partition(".")[0] == package:
            yield from named(value)

    def named(function: Callable[..., Any]) -> Iterator[Reached]:
        codes = list(_code(function.__code__))
        names = {name for code in codes for name in code.co_names}
        read = {name for code in codes for name in _variables(code)}
        variables = {name: function.__globals__[name] for name in read if name in function.__globals__}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # A variable that has no value yet.
                variables[name] = cell.cell_contents
        for _, value in sorted(variables.items(), key=lambda variable: variable[0]):
            if isinstance(value, ModuleType):
                # `prompts.verdict`: of a module, only what is named after it.
                for name in sorted(names & vars(value).keys()):
                    yield from visit(vars(value)[name])
            else:
                yield from visit(value)

    yield from named(function)


@overload
def program(
    name: str,
    *,
    params: type[ParamsT],
    supports: Sequence[Support] = (),
    description: str | None = None,
    uses: Callable[[ParamsT], Sequence[Step[..., Any, Any]]] | None = None,
) -> Callable[[Callable[[Run[ParamsT]], Awaitable[Out]]], Program[ParamsT, Out]]: ...
@overload
def program(
    name: str, *, supports: Sequence[Support] = (), description: str | None = None
) -> Callable[[Callable[[Run[None]], Awaitable[Out]]], Program[None, Out]]: ...
def program(
    name: str,
    *,
    params: Any = None,
    supports: Sequence[Support] = (),
    description: str | None = None,
    uses: Callable[[Any], Sequence[Step[..., Any, Any]]] | None = None,
) -> Any:
    """Make a program of an async function that takes a `Run` and returns the answer, as text or as an `Answer`.

    `params` is a pydantic model that the request's parameters are validated by; `supports` names what else of the
    request it honours; `uses` says which of its steps given parameters lead to, for a program that has several ways, so
    that no more is asked of the upstreams; `description` is what `/v1/models` and `asmodel programs` say, else the
    docstring's first line.
    Nothing is registered anywhere: a server finds the programs of a module among its attributes.
    """
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f'"{name}" cannot be a program\'s name: lower-case letters, digits and single hyphens between them, please'
        )

    def make(function: Callable[..., Awaitable[Any]]) -> Program[Any, Any]:
        if not inspect.iscoroutinefunction(function):
            raise ConfigurationError(f'program "{name}": {function.__name__} must be `async def`')
        module = inspect.getmodule(function)
        told = (description or inspect.getdoc(function) or (module and module.__doc__) or "").strip().split("\n")[0]
        return Program(name, function, params, frozenset(supports), told, uses=uses)

    return make


def programs_in(module: ModuleType) -> list[Program[Any, Any]]:
    """The programs that a module defines: those among its attributes that were not imported from elsewhere."""
    found: list[Program[Any, Any]] = []
    for value in vars(module).values():
        if isinstance(value, Program):
            candidate: Program[Any, Any] = cast("Any", value)
            if candidate.function.__module__ == module.__name__ and candidate not in found:
                found.append(candidate)
    return found
