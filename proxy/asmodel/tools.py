"""A tool: the program's own code as a traced step, callable by the program and, on the program's word, by a model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload

from asmodel.schemas import is_closed, strict
from asmodel.steps import resemble, source_digest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
T = TypeVar("T")

KEY_ARGUMENT = "idempotency_key"
"""The argument of an effect that is given a key, equal for each attempt at it. No model is told of it."""


@dataclass(frozen=True, eq=False)
class Tool(Generic[P, R]):
    """A function with a name, a description and typed arguments. Sync functions are run in a thread."""

    name: str
    function: Callable[P, Any]
    description: str
    cache: bool = False
    version: str = ""
    effect: bool = False
    """Whether it must not happen twice: what it did is journalled, and a retry of the run gets its result again."""

    def __post_init__(self) -> None:
        if self.effect and self.cache:
            raise TypeError(f'tool "{self.name}": cache=True and effect=True exclude each other; an effect is kept')
        resemble(self, self.function)

    @cached_property
    def takes_key(self) -> bool:
        """Whether an effect has an argument for the key by which the other side knows a repetition."""
        return self.effect and KEY_ARGUMENT in inspect.signature(self.function).parameters

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The plain function, with no run around it: neither traced nor cached."""
        return self.function(*args, **kwargs)

    @cached_property
    def digest(self) -> str:
        """Of the function's own source; part of the key of a cached result."""
        return source_digest(self.function)

    @cached_property
    def _arguments(self) -> TypeAdapter[dict[str, Any]]:
        from typing import NotRequired

        from pydantic import ConfigDict, TypeAdapter
        from typing_extensions import TypedDict

        hints = inspect.get_annotations(self.function, eval_str=True)
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f'tool "{self.name}": argument {parameter.name} must have a name of its own')
            if self.effect and parameter.name == KEY_ARGUMENT:
                continue  # The run's to give, and nobody else's.
            kind = hints.get(parameter.name, Any)
            fields[parameter.name] = kind if parameter.default is parameter.empty else NotRequired[kind]
        make: Any = TypedDict  # Checkers know TypedDict as a declaration only; here it is made at run time.
        shape: Any = make(f"{self.name}_arguments", fields)
        shape.__pydantic_config__ = ConfigDict(extra="forbid")
        return TypeAdapter(shape)

    def wire(self) -> dict[str, Any]:
        """The tool as OpenAI's JSON."""
        parameters = self._arguments.json_schema()
        parameters.pop("title", None)
        required = set(parameters.get("required", ()))
        whole = required == set(parameters.get("properties", {})) and is_closed(parameters)
        function: dict[str, Any] = {"name": self.name, "description": self.description, "parameters": parameters}
        if whole:
            # Strict mode wants each argument, of a known shape; one with a default would not be optional any more.
            function |= {"parameters": strict(parameters), "strict": True}
        return {"type": "function", "function": function}

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """The arguments by name."""
        signature = inspect.signature(self.function)
        if not self.takes_key:
            return dict(signature.bind(*args, **kwargs).arguments)
        others = [p for name, p in signature.parameters.items() if name != KEY_ARGUMENT]
        return dict(signature.replace(parameters=others).bind(*args, **kwargs).arguments)

    def plain(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments as JSON, as they are keyed: what a model asks for and what a program passes are one call.

        Raises ValueError for what has no JSON form.
        """
        plain: dict[str, Any] = self._arguments.dump_python(arguments, mode="json", warnings=False)
        return plain

    def read(self, arguments: str) -> dict[str, Any]:
        """A model's JSON text as the arguments. Raises ValueError with a reason that the model can act on."""
        from pydantic import ValidationError

        try:
            return self._arguments.validate_python(json.loads(arguments or "{}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"the arguments are not JSON: {error.msg} at character {error.pos}") from None
        except RecursionError:
            raise ValueError("the arguments are nested too deeply") from None
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
            raise ValueError(faults) from None


class ToolDecorator(Protocol):
    """What `@tool(...)` gives: awaited functions lose their Awaitable, as `run` awaits them."""

    @overload
    def __call__(self, function: Callable[P, Awaitable[T]], /) -> Tool[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> Tool[P, T]: ...


@overload
def tool(function: Callable[P, Awaitable[T]], /) -> Tool[P, T]: ...
@overload
def tool(function: Callable[P, T], /) -> Tool[P, T]: ...
@overload
def tool(*, name: str | None = None, cache: bool = False, version: str = "", effect: bool = False) -> ToolDecorator: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    cache: bool = False,
    version: str = "",
    effect: bool = False,
) -> Any:
    """Make a tool of a function; its first docstring paragraph is what a model reads of it.

    `cache=True` keeps its JSON result, keyed by the arguments, `version` and the source of the function itself; raise
    `version` when something that it calls has changed.

    `effect=True` is for what must not happen twice. The request needs an `Idempotency-Key`; a retry with the same key
    does not do again what was done. If it is not known whether it was, because the process died meanwhile, the retry
    ends in an error that says so, unless the function has an argument `idempotency_key: str = ""`: it is then called
    again with the same key, for the other side to know it by.
    """

    def make(function: Callable[..., Any]) -> Tool[..., Any]:
        description = inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        return Tool(name or function.__name__, function, description, cache, version, effect)

    return make if function is None else make(function)
