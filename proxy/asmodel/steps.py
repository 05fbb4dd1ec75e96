"""A step: one kind of model call. Its function returns what the model is shown; `returns=` says how the reply is read.

Calling a step calls its function and nothing else, so what a model would be shown can be tested with no model at all;
`await run(step, ...)` makes it happen.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import WRAPPER_ASSIGNMENTS, cached_property
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NewType,
    ParamSpec,
    TypeAlias,
    TypedDict,
    TypeVar,
    cast,
    get_origin,
    overload,
)

import orjson
from typing_extensions import TypeAliasType

from asmodel.calls import (
    JSON,
    Call,
    Chat,
    Completion,
    LogLikelihood,
    Message,
    NotJSON,
    Reply,
    Score,
    chat_ending,
    written_chat,
    written_with,
)
from asmodel.errors import ProgramError
from asmodel.schemas import Shape

if TYPE_CHECKING:
    from typing import Unpack

    from asmodel.tools import Tool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Raw text to be continued: asked by completions, with no chat template around it."""

    text: str


Shown: TypeAlias = str | Sequence[Message] | Prompt
"""What a step may return: one user message, a conversation, or raw text."""

P = ParamSpec("P")
Text = TypeVar("Text", bound="str | Sequence[Message] | Prompt")
S = TypeVar("S", bound="str | Sequence[Message] | Prompt | tuple[str, str]", covariant=True)
T = TypeVar("T")
R = TypeVar("R", covariant=True)


class Options(TypedDict, total=False):
    """What goes on a step, or on one call of it by `using`."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: str | Sequence[str]
    seed: int
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    """How many likeliest tokens to report in each place; use with `returns=Reply`."""
    reasoning_effort: str
    params: Mapping[str, JSON]
    """Parameters that have no name here, passed to the upstream as they are."""
    tools: Sequence[Tool[..., Any]]
    """Tools that the model may call; use with `returns=Reply` and `run.call`."""
    sample: int
    """Which draw to take, counted from 0, instead of the next one."""
    asks: int
    """How often at most to ask for a reply that can be read: 3 unless said."""
    cache: bool
    ttl: float
    """Seconds after which a stored reply is not used any more."""
    shared_prefix: bool
    """Say of a step whose calls begin alike, with the same long document, that one of them is to go ahead, so that the
    others find the beginning in the upstream's own prompt cache."""


_OF_A_SCORE = ("cache", "ttl", "shared_prefix")
"""Options of a score, which has nothing to sample."""

_PARAMS = (
    "temperature",
    "top_p",
    "max_tokens",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "reasoning_effort",
)

_SETTLED = frozenset((str, int, float, bool, type(None)))
"""Types of parameters that cannot be changed from inside, as a list of stop sequences can."""

Kind: TypeAlias = Literal["ask", "score"]


class Unreadable(ValueError):
    """A reply that its step cannot read; the message is what the model is told."""


@dataclass(frozen=True, eq=False)
class Step(Generic[P, S, R]):
    """One kind of model call, made by `@step` or `@score`: name, role, prompt, reader and options."""

    name: str
    show: Callable[P, S]
    role: str
    reader: Callable[[Reply], R]
    shape: Shape | None = None
    """The JSON shape of the reply, where `returns` is a type."""
    options: Options = field(default_factory=lambda: Options())
    kind: Kind = "ask"

    def __post_init__(self) -> None:
        known = _OF_A_SCORE if self.kind == "score" else tuple(Options.__annotations__)
        unknown = sorted(self.options.keys() - set(known))
        if unknown:
            raise TypeError(f'step "{self.name}" takes no {", ".join(unknown)}; it takes {", ".join(known)}')
        resemble(self, self.show)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> S:
        """What the model is shown. Asks nobody."""
        return self.show(*args, **kwargs)

    def using(self, *, model: str | None = None, **options: Unpack[Options]) -> Step[P, S, R]:
        """The same step with other options, or played by another role: `run(vote.using(temperature=0.7), q)`."""
        return replace(self, role=model or self.role, options=cast("Options", {**self.options, **options}))

    @property
    def plain(self) -> bool:
        """Whether its value is the reply's text, as it came."""
        return self.reader is _text

    @property
    def asks(self) -> int:
        return max(1, self.options.get("asks", 3))

    @cached_property
    def params(self) -> dict[str, JSON]:
        """The sampling parameters as they are sent and hashed."""
        options = cast("dict[str, Any]", self.options)
        params: dict[str, JSON] = {name: options[name] for name in _PARAMS if name in options}
        if isinstance(params.get("stop"), tuple):
            params["stop"] = list(cast("Sequence[str]", params["stop"]))
        if "logprobs" in options:
            params |= {"logprobs": True, "top_logprobs": options["logprobs"]}
        return params | dict(self.options.get("params", {}))

    def call(self, shown: object, identity: str) -> Call:
        """The call that shows `shown` to the upstream of that identity, before its draw is known.

        Raises ProgramError where `shown` is nothing that can be shown.
        """
        if self.kind == "score":
            if not _is_pair(shown):
                raise ProgramError(f'step "{self.name}" returns {_name(shown)}; a @score step returns two texts')
            context, continuation = cast("tuple[str, str]", shown)
            return Score(identity=identity, context=context, continuation=continuation)
        if isinstance(shown, Prompt):
            return Completion(identity=identity, prompt=shown.text, params=self.params)
        if isinstance(shown, str):
            messages: tuple[Message, ...] = (Message("user", shown),)
        elif isinstance(shown, Sequence) and all(isinstance(m, Message) for m in cast("Sequence[object]", shown)):
            messages = tuple(cast("Sequence[Message]", shown))
        else:
            raise ProgramError(
                f'step "{self.name}" returns {_name(shown)}; it should return text, messages or a Prompt'
            )
        call = Chat(
            identity=identity,
            messages=messages,
            params=self.params,
            schema=self.shape.schema if self.shape else None,
            tools=self._wired,
        )
        ending = self._ending
        if ending is not None:
            try:
                written = written_chat(None, identity, messages, ending)
            except orjson.JSONEncodeError:
                written = None  # Whoever asks for its `body` is told why.
            if written is not None:
                written_with(call, written)
        return call

    @cached_property
    def _wired(self) -> tuple[Mapping[str, JSON], ...]:
        return tuple(tool.wire() for tool in self.options.get("tools", ()))

    @cached_property
    def _ending(self) -> bytes | None:
        """What stands after the messages in each of its calls as they are written; None where that may change yet."""
        if not all(type(value) in _SETTLED for value in self.params.values()):
            return None
        try:
            return chat_ending(self.params, self.shape.schema if self.shape else None, self._wired)
        except NotJSON:
            return None

    def read(self, reply: Reply) -> R:
        """The reply as the step's value. Raises ValueError with the reason where it cannot be read."""
        return self.reader(reply)


def _is_pair(shown: object) -> bool:
    if not isinstance(shown, tuple):
        return False
    pair = cast("tuple[object, ...]", shown)
    return len(pair) == 2 and all(isinstance(part, str) for part in pair)


def _name(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def asked_again(call: Call, reply: Reply, reason: str) -> Call:
    """The call that follows an unreadable reply: it shows the model its reply and what was wrong with it."""
    if isinstance(call, Chat):
        told = (Message("assistant", reply.text), Message("user", f"{reason}\nPlease answer again."))
        return replace(call, messages=(*call.messages, *told))
    if isinstance(call, Completion):
        # Raw text has no turns, so the same text is set before the model once more, after the reason.
        return replace(call, prompt=f"{call.prompt}{reply.text}\n\n({reason} Again:)\n\n{call.prompt}")
    raise TypeError(f"a {call.kind} call is not asked again")


def _text(reply: Reply) -> str:
    return reply.text


def _whole(reply: Reply) -> Reply:
    return reply


def _by(function: Callable[[str], T]) -> Callable[[Reply], T]:
    def read(reply: Reply) -> T:
        return function(reply.text)

    return read


def _reader(returns: Any) -> tuple[Callable[[Reply], Any], Shape | None]:
    if returns is None or returns is str:
        return _text, None
    if returns is Reply:
        return _whole, None
    # A list[int] can be called too, and would make a list of the reply's characters.
    is_type = isinstance(returns, (type, NewType, TypeAliasType)) or get_origin(returns) is not None
    if callable(returns) and not is_type:
        if inspect.iscoroutinefunction(returns):
            raise TypeError("returns= wants a type or an ordinary function; an async one would not be awaited")
        return _by(cast("Callable[[str], Any]", returns)), None
    shape = Shape(returns)
    return lambda reply: shape.read(reply.text), shape


@overload
def step(function: Callable[P, Text], /) -> Step[P, Text, str]: ...
@overload
def step(
    *, model: str = "default", returns: type[T], name: str | None = None, **options: Unpack[Options]
) -> Callable[[Callable[P, Text]], Step[P, Text, T]]: ...
@overload
def step(
    *, model: str = "default", returns: Callable[[str], T], name: str | None = None, **options: Unpack[Options]
) -> Callable[[Callable[P, Text]], Step[P, Text, T]]: ...
@overload
def step(
    *, model: str = "default", name: str | None = None, **options: Unpack[Options]
) -> Callable[[Callable[P, Text]], Step[P, Text, str]]: ...
def step(
    function: Callable[..., Any] | None = None,
    /,
    *,
    model: str = "default",
    returns: Any = None,
    name: str | None = None,
    **options: Any,
) -> Any:
    """Make a step of a function that returns what the model is shown.

    `model` is a role, resolved by the settings. `returns` is a type (its JSON schema is sent, the reply is validated),
    a function of the reply's text that raises ValueError with a reason, `Reply` for all of it, or nothing for the text.
    An unreadable reply is asked again with the reason, `asks` times in all, and is then a StepError.
    """

    def make(function: Callable[..., Any]) -> Step[..., Any, Any]:
        reader, shape = _reader(returns)
        return Step(name or function.__name__, function, model, reader, shape, cast("Options", options))

    return make if function is None else make(function)


@overload
def score(function: Callable[P, tuple[str, str]], /) -> Step[P, tuple[str, str], LogLikelihood]: ...
@overload
def score(
    *,
    model: str = "default",
    name: str | None = None,
    cache: bool = True,
    ttl: float | None = None,
    shared_prefix: bool = False,
) -> Callable[[Callable[P, tuple[str, str]]], Step[P, tuple[str, str], LogLikelihood]]: ...
def score(
    function: Callable[..., Any] | None = None,
    /,
    *,
    model: str = "default",
    name: str | None = None,
    cache: bool = True,
    ttl: float | None = None,
    shared_prefix: bool = False,
) -> Any:
    """Make a step of a function that returns two texts: what is shown, and what is measured after it.

    Its value is `LogLikelihood(total, tokens)` in nats: log p(second | first), both as raw text, never sampled.
    """

    def make(function: Callable[..., Any]) -> Step[..., Any, LogLikelihood]:
        options = Options(cache=cache) if ttl is None else Options(cache=cache, ttl=ttl)
        if shared_prefix:
            options["shared_prefix"] = True
        return Step(name or function.__name__, function, model, _likelihood, None, options, kind="score")

    return make if function is None else make(function)


def _likelihood(reply: Reply) -> LogLikelihood:
    if not reply.logprobs:
        raise Unreadable("the reply holds no log-probabilities")
    return reply.likelihood


def resemble(wrapper: object, function: Callable[..., Any]) -> None:
    """Give a frozen object the name, docstring and signature of the function that it was made of."""
    known: dict[str, Any] = {name: getattr(function, name) for name in WRAPPER_ASSIGNMENTS if hasattr(function, name)}
    wrapper.__dict__.update(known, __wrapped__=function)


def source_digest(function: Callable[..., Any]) -> str:
    """The first 16 hex digits of SHA-256 over a function's source; of its code where there is no source."""
    try:
        text = inspect.getsource(function).encode()
    except (OSError, TypeError):
        text = function.__code__.co_code
    return hashlib.sha256(text).hexdigest()[:16]
