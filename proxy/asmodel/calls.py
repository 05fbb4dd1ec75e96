"""One model call: `Call` is all that its answer may depend on, `Terms` is everything else, `Reply` is the answer.

The cache key hashes a `Call` and nothing but a `Call` (and the scope). So a field belongs in `Call` if another value
could change the answer, and in `Terms` if it could not. Frozen values throughout; nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, cast

import orjson

from asmodel.frozen import quickly_made

if TYPE_CHECKING:
    from asmodel.budget import Budget
    from asmodel.progress import Progress

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

KEY_VERSION = 1
"""Part of every cache key. Raise it when the meaning of a field changes."""

REPLY_VERSION = 1
"""First field of every stored reply. An entry with another version is a miss."""

_NO_JSON: Mapping[str, Any] = {}


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model asks for. `arguments` is the model's own JSON text, which may not be valid JSON."""

    id: str
    name: str
    arguments: str


@quickly_made
@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, in the shape of OpenAI's chat completions; nothing that came in is lost."""

    role: str
    content: str | Sequence[Mapping[str, JSON]] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    extra: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    """Fields of the message that have no name above, as they came."""

    @property
    def text(self) -> str:
        """The text alone: of a list of parts, the text parts, one a line."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")

    def wire(self) -> dict[str, Any]:
        """The message as OpenAI's JSON."""
        body: dict[str, Any] = {"role": self.role, "content": self.content, **self.extra}
        if self.name is not None:
            body["name"] = self.name
        if self.tool_calls and "tool_calls" not in self.extra:
            body["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        if self.tool_call_id is not None:
            body["tool_call_id"] = self.tool_call_id
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text that came with the request."""

    text: str
    title: str = ""
    id: str = ""


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages in, a message out."""

    kind: ClassVar[str] = "chat"
    identity: str
    """Who answers, never where: two addresses of one model are one identity."""
    messages: tuple[Message, ...]
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    """Sampling parameters by OpenAI's names. An absent one differs from any value of it, null too."""
    schema: Mapping[str, JSON] | None = None
    """JSON Schema of the reply, sent as `response_format: json_schema`, strict."""
    tools: tuple[Mapping[str, JSON], ...] = ()
    draw: str | None = None
    """Which draw of a sampled reply this is; None where equal calls have equal answers."""
    _body: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """What `body` gives, once it has been made."""


Given: TypeAlias = "str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]"
"""What a request may ask to have continued or embedded: one text or several, or as many lists of token numbers."""


def pieces(given: Given) -> Sequence[str | Sequence[int]]:
    """The single texts, or lists of tokens, of what was given."""
    if isinstance(given, str):
        return (given,)
    if given and isinstance(given[0], int):
        return (cast("Sequence[int]", given),)
    return cast("Sequence[str | Sequence[int]]", given)


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Raw text in, its continuation out; no chat template."""

    kind: ClassVar[str] = "completion"
    identity: str
    prompt: str
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    draw: str | None = None
    given: Given | None = None
    """Of a request that is passed through, what is sent in place of `prompt`: several texts, or tokens."""
    _body: bytes | None = field(default=None, init=False, repr=False, compare=False)


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The log-likelihood of a given continuation after a given context; both raw text."""

    kind: ClassVar[str] = "score"
    identity: str
    context: str
    continuation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """One vector a text."""

    kind: ClassVar[str] = "embed"
    identity: str
    texts: tuple[str, ...]
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    given: Given | None = None
    """Of a request that is passed through, what is sent in place of `texts`: one text by itself, or tokens."""

    @property
    def size(self) -> int:
        """How many vectors answer it."""
        return len(self.texts) if self.given is None else len(pieces(self.given))


Call: TypeAlias = Chat | Completion | Score | Embed


class NotJSON(ValueError):
    """A call holds what JSON cannot carry. The message says of what kind it is, and does not show it."""


def canonical(value: object) -> bytes:
    """Canonical JSON: keys sorted, no white space, UTF-8; a float that is whole is written as an integer.

    (RFC 8785 without its rule for the order of keys outside the basic plane: the result is only ever hashed.)
    Raises NotJSON for what JSON cannot carry: numbers that are not finite, half a surrogate pair, other types.
    """
    try:
        return orjson.dumps(_plain(value), option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise NotJSON(f"{error}") from None
    except RecursionError:
        raise NotJSON("it is nested too deeply") from None


def _plain(value: object) -> object:
    kind = type(value)
    # Nearly all there is, told apart without asking what it is a kind of.
    if kind is str or kind is bool or value is None:
        return value
    if kind is dict:
        items = cast("dict[object, object]", value)
        for name, item in items.items():
            if type(name) is not str or type(item) is not str or name[:1] == "\x00":
                return {_name(name): _plain(item) for name, item in items.items()}
        return items
    if kind is list or kind is tuple:
        return [_plain(item) for item in cast("Sequence[object]", value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotJSON(f"{value} is not a number that JSON can carry")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        # orjson stops at 64 bits; a tagged text cannot be taken for a number, nor for anything that was sent.
        return value if -(2**63) <= value < 2**64 else {"\x00int": str(value)}
    if isinstance(value, Mapping):
        mapping = cast("Mapping[str, object]", value)
        return {_name(name): _plain(item) for name, item in mapping.items()}
    if isinstance(value, (bytes, bytearray)):
        raise NotJSON("bytes are no JSON")
    if isinstance(value, Sequence):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    raise NotJSON(f"{type(value).__name__} is no JSON")


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise NotJSON(f"a name in JSON is a text, not {type(name).__name__}")
    # A name that was sent cannot be taken for the tag of a large integer.
    return f"\x00{name}" if name.startswith("\x00") else name


def describe(call: Call) -> dict[str, Any]:
    """The call as the JSON that its key hashes, field by field."""
    body: dict[str, Any] = {"kind": call.kind}
    for name in _FIELDS[type(call)]:
        value = getattr(call, name)
        if name == "given" and value is None:
            continue  # What programs ask is known by the key that it had before requests could be passed through.
        body[name] = [m.wire() for m in value] if name == "messages" else value
    return body


def written_fields(call: Call) -> Sequence[str]:
    """The names of what `describe` says of it, besides its kind."""
    return _FIELDS[type(call)]


_FIELDS: Mapping[type[Call], tuple[str, ...]] = {
    kind: tuple(f.name for f in fields(kind) if f.init) for kind in (Chat, Completion, Score, Embed)
}


def body(call: Call) -> bytes:
    """Canonical JSON of `describe(call)`. Raises NotJSON."""
    if isinstance(call, Chat):
        return call._body or _plain_chat(call) or canonical(describe(call))  # pyright: ignore[reportPrivateUsage]
    if isinstance(call, Completion) and call._body is not None:  # pyright: ignore[reportPrivateUsage]
        return call._body  # pyright: ignore[reportPrivateUsage]
    return canonical(describe(call))


def _plain_chat(call: Chat) -> bytes | None:
    """The same where the messages are text and nothing else, as nearly all are, at a fifth of the cost."""
    if call.schema is not None or call.tools:
        return None
    try:
        return written_chat(call.draw, call.identity, call.messages, chat_ending(call.params))
    except orjson.JSONEncodeError as error:
        raise NotJSON(f"{error}") from None


def written_chat(draw: str | None, identity: str, messages: Sequence[Message], ending: bytes) -> bytes | None:
    """The `body` of a chat that ends in `chat_ending(...)`: what is the same in all calls of a step is written once.

    None where a message holds more than text. Raises orjson.JSONEncodeError for half a surrogate pair.
    """
    plain: list[dict[str, str]] = []
    for m in messages:
        content = m.content
        if type(content) is not str or m.extra or m.tool_calls or m.name is not None or m.tool_call_id is not None:
            return None
        plain.append({"content": content, "role": m.role})
    return b'{"draw":%b,"identity":%b,"kind":"chat","messages":%b%b' % (
        b"null" if draw is None else orjson.dumps(draw),
        orjson.dumps(identity),
        orjson.dumps(plain),
        ending,
    )


def chat_ending(
    params: Mapping[str, JSON], schema: Mapping[str, JSON] | None = None, tools: Sequence[Mapping[str, JSON]] = ()
) -> bytes:
    """What stands after the messages in the `body` of a chat. Raises NotJSON."""
    return b',"params":%b,"schema":%b,"tools":%b}' % (
        canonical(params) if params else b"{}",
        b"null" if schema is None else canonical(schema),
        canonical(tools) if tools else b"[]",
    )


_NO_DRAW = b'{"draw":null,'


def drawn(call: Chat | Completion, undrawn: bytes, draw: str) -> Chat | Completion:
    """That draw of a call that has none; `undrawn` is its `body`.

    To number equal calls one has to write each out, and for its key again: by name, `draw` is the first of its fields.
    """
    if isinstance(call, Chat):  # Not by `replace`, which takes three times as long.
        made: Chat | Completion = Chat(
            identity=call.identity,
            messages=call.messages,
            params=call.params,
            schema=call.schema,
            tools=call.tools,
            draw=draw,
        )
    else:
        made = replace(call, draw=draw)
    if undrawn.startswith(_NO_DRAW):
        return written_with(made, b'{"draw":%b,%b' % (orjson.dumps(draw), undrawn[len(_NO_DRAW) :]))
    return made


def written_with(call: Chat | Completion, written: bytes) -> Chat | Completion:
    """The call, which knows from now on that `written` is its `body`."""
    object.__setattr__(call, "_body", written)
    return call


def key(call: Call, scope: str = "") -> str:
    """The cache key: 64 hex digits of SHA-256 over the call, the scope and the version of this rule."""
    written = getattr(call, "_body", None) or body(call)
    return hashlib.sha256(b"%b%b]" % (_opening(scope), written)).hexdigest()


@lru_cache(maxsize=64)
def _opening(scope: str) -> bytes:
    """What stands before the call in what its key hashes."""
    return b"[%d,%b," % (KEY_VERSION, canonical(scope))


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one call, or of many added up."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the *provider's* own prompt cache served; part of `prompt_tokens`."""
    reasoning_tokens: int = 0
    """Part of `completion_tokens`."""
    estimated: bool = False
    """True where the upstream reported nothing and the count is ours (about 4 characters a token)."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            estimated=self.estimated or other.estimated,
        )

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and the natural logarithm of its probability; `top` are the likeliest tokens in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """log p(continuation | context), in nats, over `tokens` tokens of the continuation."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token: the paper's average negative log-likelihood with the sign turned."""
        return self.total / self.tokens if self.tokens else 0.0


@quickly_made
@dataclass(frozen=True, slots=True)
class Origin:
    """The span that paid for a reply: hex ids of OpenTelemetry (32 and 16 digits)."""

    trace_id: str
    span_id: str


Source: TypeAlias = Literal["bought", "hit", "joined"]


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back for one call."""

    text: str = ""
    finish: str = "stop"
    """OpenAI's finish reason: stop, length, tool_calls, content_filter."""
    usage: Usage = Usage()
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    refusal: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the generated text where they were asked for; of the given continuation for a `Score`."""
    embeddings: tuple[tuple[float, ...], ...] = ()
    model: str = ""
    """The model that says that it answered."""
    upstream: str = ""
    """The name, in the settings, of the upstream that answered."""
    cost: float | None = None
    """US dollars; None where the price is unknown, never 0."""
    bought_at: float = 0.0
    """Unix seconds."""
    seconds: float = 0.0
    """How long the upstream took when it was bought."""
    origin: Origin | None = None
    source: Source = "bought"
    """How this run came by it: bought by it, found in the cache, or bought by another run at the same moment."""

    @property
    def cached(self) -> bool:
        return self.source == "hit"

    @property
    def message(self) -> Message:
        """The reply as the next message of a conversation."""
        content = None if self.tool_calls and not self.text else self.text
        return Message("assistant", content, tool_calls=self.tool_calls)

    @property
    def likelihood(self) -> LogLikelihood:
        return LogLikelihood(total=math.fsum(t.logprob for t in self.logprobs), tokens=len(self.logprobs))

    def dump(self, parts: Mapping[str, str] | None = None) -> bytes:
        """The reply as it is stored: JSON, with its version. Raises ValueError where it holds what JSON cannot carry.

        JSON has no number for the logarithm of 0; it is stored as null. `parts` is the fingerprint of the call that it
        answers, which is stored beside it and is none of what is read back.
        """
        # Dataclasses inside of it are written as objects by orjson itself, in an eighth of the time of `asdict`.
        body: dict[str, Any] = {"v": REPLY_VERSION}
        for name in _STORED:
            body[name] = getattr(self, name)
        if parts is not None:
            body["parts"] = parts
        try:
            # Copied, for it may be kept: orjson leaves what it wrote in all the room that it took, 32 kB for 500 bytes.
            return bytes(memoryview(orjson.dumps(body)))
        except orjson.JSONEncodeError as error:
            raise ValueError(f"the reply holds what JSON cannot carry: {error}") from None

    @classmethod
    def load(cls, data: bytes) -> Reply:
        """Read what `dump` wrote, as a hit. Raises ValueError on anything else; never runs what it reads."""
        stored: Any = orjson.loads(data)
        return _plain_reply(stored) or cls._read(_Stored(stored))

    @classmethod
    def _read(cls, body: _Stored) -> Reply:
        if body.get("v") != REPLY_VERSION:
            raise ValueError("not a stored reply of this version")
        usage = body.part("usage")
        origin = None if body.get("origin") is None else body.part("origin")
        return cls(
            text=body.text("text"),
            finish=body.text("finish"),
            usage=Usage(
                prompt_tokens=usage.integer("prompt_tokens"),
                completion_tokens=usage.integer("completion_tokens"),
                cached_tokens=usage.integer("cached_tokens"),
                reasoning_tokens=usage.integer("reasoning_tokens"),
                estimated=usage.get("estimated") is True,
            ),
            tool_calls=tuple(
                ToolCall(id=c.text("id"), name=c.text("name"), arguments=c.text("arguments"))
                for c in map(_Stored, body.items("tool_calls"))
            ),
            reasoning=body.text("reasoning"),
            refusal=None if body.get("refusal") is None else body.text("refusal"),
            logprobs=tuple(
                TokenLogprob(t.text("token"), _logprob(t.get("logprob")), tuple(map(_likely, t.items("top"))))
                for t in map(_Stored, body.items("logprobs"))
            ),
            embeddings=tuple(tuple(_number(x) for x in _list(vector)) for vector in body.items("embeddings")),
            model=body.text("model"),
            upstream=body.text("upstream"),
            cost=None if body.get("cost") is None else _number(body.get("cost")),
            bought_at=_number(body.get("bought_at")),
            seconds=_number(body.get("seconds")),
            origin=None if origin is None else Origin(origin.text("trace_id"), origin.text("span_id")),
            source="hit",
        )

    def named(self, source: Source) -> Reply:
        return replace(self, source=source)

    def paid(
        self,
        *,
        upstream: str,
        model: str,
        cost: float | None,
        bought_at: float,
        seconds: float,
        origin: Origin | None,
    ) -> Reply:
        """The reply with who answered, when, and at what cost: as by `replace`, in half of its time."""
        return Reply(
            text=self.text,
            finish=self.finish,
            usage=self.usage,
            tool_calls=self.tool_calls,
            reasoning=self.reasoning,
            refusal=self.refusal,
            logprobs=self.logprobs,
            embeddings=self.embeddings,
            model=model,
            upstream=upstream,
            cost=cost,
            bought_at=bought_at,
            seconds=seconds,
            origin=origin,
            source=self.source,
        )


def _plain_reply(stored: Any) -> Reply | None:
    """The reply, where it is one of text and nothing else, as nearly all are; None where one has to look closer."""
    try:
        usage, origin = stored["usage"], stored["origin"]
        if stored["v"] != REPLY_VERSION or stored["tool_calls"] or stored["logprobs"] or stored["embeddings"]:
            return None
        text, finish, reasoning = stored["text"], stored["finish"], stored["reasoning"]
        model, upstream, refusal = stored["model"], stored["upstream"], stored["refusal"]
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        cached, thinking = usage["cached_tokens"], usage["reasoning_tokens"]
        bought_at, seconds, cost = stored["bought_at"], stored["seconds"], stored["cost"]
        trace_id, span_id = ("", "") if origin is None else (origin["trace_id"], origin["span_id"])
    except (KeyError, TypeError):
        return None
    if not (
        type(text) is type(finish) is type(reasoning) is type(model) is type(upstream) is str
        and type(trace_id) is type(span_id) is str
        and type(prompt) is type(completion) is type(cached) is type(thinking) is int
        and type(bought_at) is type(seconds) is float
        and (cost is None or type(cost) is float)
        and (refusal is None or type(refusal) is str)
    ):
        return None
    return Reply(
        text=text,
        finish=finish,
        reasoning=reasoning,
        refusal=refusal,
        usage=Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=cached,
            reasoning_tokens=thinking,
            estimated=usage.get("estimated") is True,
        ),
        model=model,
        upstream=upstream,
        cost=cost,
        bought_at=bought_at,
        seconds=seconds,
        origin=None if origin is None else Origin(trace_id, span_id),
        source="hit",
    )


_STORED = tuple(f.name for f in fields(Reply) if f.name != "source")


class _Stored:
    """An object out of a store that others may have written to: every field is what it should be, or a ValueError."""

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError("not a stored reply")
        self._fields = cast("dict[str, object]", value)

    def get(self, name: str) -> object:
        if name not in self._fields:
            raise ValueError(f"not a stored reply: it has no {name}")
        return self._fields[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ValueError(f"not a stored reply: its {name} is no text")
        return value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"not a stored reply: its {name} is no integer")
        return value

    def part(self, name: str) -> _Stored:
        return _Stored(self.get(name))

    def items(self, name: str) -> Sequence[object]:
        return _list(self.get(name))


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise ValueError("not a stored reply: a list is missing")
    return cast("Sequence[object]", value)


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError("not a stored reply: a number is missing")
    return float(value)


def _logprob(value: object) -> float:
    return -math.inf if value is None else _number(value)


def _likely(value: object) -> tuple[str, float]:
    pair = _list(value)
    if len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError("not a stored reply: a likely token is missing")
    return pair[0], _logprob(pair[1])


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A fragment of a tool call: `id` and `name` come with the first fragment of each index."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a stream has added since the last one."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


Emit: TypeAlias = Callable[[Delta], Awaitable[None]]

CacheMode: TypeAlias = Literal["on", "off", "refresh", "only"]


@quickly_made
@dataclass(frozen=True, slots=True)
class CachePolicy:
    """on: read and write; off: neither; refresh: write only; only: a miss is an error. Ages and `ttl` in seconds."""

    mode: CacheMode = "on"
    ttl: float | None = None
    max_age: float | None = None


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On what terms a call is made. Nothing here may change the answer, and nothing here is hashed but the scope."""

    emit: Emit | None = None
    """Awaited with each delta as it arrives. Present means: stream."""
    verbatim: Callable[[bytes], Awaitable[None]] | None = None
    """Awaited with the upstream's own bytes, where it speaks OpenAI's format: its body, or each event of its stream, so
    that a call that is passed through reaches the client unaltered."""
    n: int = 1
    """How many choices to ask for; more than 1 only where they are passed on `verbatim`."""
    usage_asked: bool = False
    """Whether the client of a verbatim stream wants its usage chunk."""
    run_id: str = ""
    program: str = ""
    step: str = ""
    """Names the call in spans and errors, and tags its cache entry as `program/step`."""
    scope: str = ""
    """Whose cache: the tenant of the caller's key, empty without auth."""
    cache: CachePolicy = CachePolicy()
    deadline: float | None = None
    """On the clock of the event loop, in seconds."""
    budget: Budget | None = None
    progress: Progress | None = None
    depth: int = 0
    """How many programs this call is inside of."""
    now: datetime | None = None
    """When the run began, for a program that plays the role: it is told the same."""
    shared_prefix: bool = False
    """Whether other calls begin as this one does, so that one of them should go ahead."""
    accept: Callable[[Reply], object] | None = None
    """Raises ValueError on a reply that must not be stored, because its step cannot read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an upstream can do. `loglikelihood` is of *given* text, and is only ever True where it was proven."""

    chat: bool = True
    completion: bool = False
    stream: bool = True
    schema: bool = False
    tools: bool = False
    loglikelihood: bool = False
    embeddings: bool = False
    verbatim: bool = False
    """Whether its answers are in OpenAI's format, and can be passed on as they are."""
    context: int | None = None
    """Tokens of prompt and reply together; None where it is not known."""
