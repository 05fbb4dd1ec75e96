"""The shapes of OpenAI's chat completions, read and written. Pure: no I/O, no program, no clock.

Source: OpenAI's openapi.yaml, info.version 2.3.0 (2026-08): `CreateChatCompletionRequest`,
`CreateChatCompletionResponse`, `CreateChatCompletionStreamResponse`, `Error`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar, cast
from urllib.parse import unquote_to_bytes

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic_core import ErrorDetails

from asmodel.calls import Delta, Document, Message, Reply, ToolCall, ToolCallDelta, Usage
from asmodel.errors import AsmodelError, InvalidRequest
from asmodel.programs import Answer, Program

Json: TypeAlias = dict[str, Any]

HINTS = frozenset(
    (
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "reasoning_effort",
        "verbosity",
        "prediction",
    )
)
"""Sampling parameters: for a program they go to its reply step."""

NEEDS: Mapping[str, str] = {
    "tools": "tools",
    "tool_choice": "tools",
    "parallel_tool_calls": "tools",
    "functions": "",
    "function_call": "",
    "response_format": "response_format",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "modalities": "",
    "audio": "",
}
"""Parameters that change the shape of the answer, and what a program must support to be given them; nothing, where what
they ask for could not be carried through a program: sound, and the calls of functions from before there were tools."""

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
    "functions": ([], None),
    "function_call": ("none", None),
    "response_format": ({"type": "text"}, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "modalities": (["text"], None),
    "audio": (None,),
}
"""Values that ask for nothing that an ordinary answer does not have."""

PARTS: Mapping[str, str] = {"image_url": "images", "input_audio": "audio"}
"""Parts of a message that no text stands for, and what a program must support to be shown them."""

_SENT = "\x00sent"
"""Where a request keeps the body that it was read from: under a name that no body's field has as an attribute."""

_OURS = frozenset(("model", "messages", "stream", "stream_options", "n", "asmodel", "documents"))

DEPTH = 100
"""How deep a body may be nested: JSON schemas come to a third of it, and what is deeper is no use but to do harm."""
OBJECTS = 200_000
"""How many objects and lists a body may hold: each takes some hundred times the memory of the `{},` that makes it."""

NAME = 256
"""Characters of a model's name: a composition names as many programs as can be nested, and no more."""

Name = Annotated[StrictStr, Field(min_length=1, max_length=NAME)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class FunctionCall(_Part):
    name: StrictStr
    arguments: StrictStr


class WireToolCall(_Part):
    id: StrictStr
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None


class ContentPart(_Part):
    type: StrictStr


class WireMessage(_Part):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: StrictStr | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[WireToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None


class StreamOptions(_Part):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class NamedFunction(_Part):
    name: Annotated[StrictStr, Field(min_length=1)]
    parameters: dict[str, Any] | None = None


class WireTool(_Part):
    """A tool of the client's; those of other types than `function` are for the upstream to judge."""

    type: StrictStr
    function: NamedFunction | None = None


class AskedLimits(BaseModel):
    model_config = ConfigDict(extra="forbid")
    calls: Annotated[StrictInt, Field(ge=1)] | None = None
    tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    cost: Annotated[Finite, Field(gt=0)] | None = None
    seconds: Annotated[Finite, Field(gt=0)] | None = None


class Extension(BaseModel):
    """The body's `asmodel` object: what one may ask of asmodel beyond OpenAI's request."""

    model_config = ConfigDict(extra="forbid")
    params: dict[str, Any] = Field(default_factory=dict)
    roles: dict[str, Name] = Field(default_factory=dict)
    cache: Literal["on", "off", "refresh", "only"] | None = None
    progress: StrictBool | None = None
    limits: AskedLimits | None = None


class Body(BaseModel):
    """The body of a request for a model. What has no name in it is kept."""

    model_config = ConfigDict(extra="allow")

    @classmethod
    def of(cls, sent: Json) -> Self:
        """Raises pydantic's ValidationError."""
        request = cls.model_validate(sent)
        # Beside the fields, and no private attribute of pydantic's, which costs as much as all of them together.
        vars(request)[_SENT] = sent
        return request

    @property
    def _sent(self) -> Json:
        """The body as it came: what is passed on is that, and not what validation made of it (1 would be 1.0)."""
        return cast("Json", self.__dict__.get(_SENT, {}))

    @property
    def stream_asks(self) -> Json:
        """What is asked of the stream besides its usage: for an upstream whose own stream is the answer."""
        return stream_asks(self._sent)


class ChatRequest(Body):
    """The body of `POST /v1/chat/completions`. What has no name here is passed on, or listed as ignored."""

    model: Name
    messages: Annotated[list[WireMessage], Field(min_length=1, fail_fast=True)]
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None = None
    seed: StrictInt | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Finite] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[WireTool], Field(fail_fast=True)] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: Annotated[list[NamedFunction], Field(fail_fast=True)] | None = None
    function_call: StrictStr | dict[str, Any] | None = None
    reasoning_effort: StrictStr | None = None
    verbosity: StrictStr | None = None
    prediction: dict[str, Any] | None = None
    modalities: Annotated[list[StrictStr], Field(fail_fast=True)] | None = None
    audio: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    service_tier: StrictStr | None = None
    moderation: dict[str, Any] | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: StrictStr | None = None
    web_search_options: dict[str, Any] | None = None
    documents: list[Any] | None = None
    asmodel: Extension = Field(default_factory=Extension)

    @property
    def asked(self) -> Json:
        """Every parameter that was sent and is not ours to act on: null counts as absent, as OpenAI has it."""
        return {name: value for name, value in self._sent.items() if name not in _OURS and value is not None}

    @property
    def passed_on(self) -> Json:
        """What an upstream is given that is passed through: all but what is asmodel's own, null included."""
        return passed_on(self._sent)

    @property
    def conversation(self) -> tuple[Message, ...]:
        return tuple(_message(m) for m in self.messages)

    @property
    def texts(self) -> tuple[Document, ...]:
        """The documents beside the messages, and the text files among their parts."""
        given = [_document(place, sent) for place, sent in enumerate(self.documents or ())]
        for message in self.messages:
            for part in message.content if isinstance(message.content, list) else ():
                if part.type == "file":
                    given += _files(cast("Mapping[str, Any]", part.model_extra or {}))
        return tuple(given)


def stream_asks(sent: Json) -> Json:
    """What a request asks of its stream besides its usage."""
    options = sent.get("stream_options")
    given = cast("Json", options) if isinstance(options, dict) else {}
    return {name: value for name, value in given.items() if name != "include_usage"}


def passed_on(sent: Json) -> Json:
    """The parameters of a request that are an upstream's."""
    return {name: value for name, value in sent.items() if name not in _OURS or name == "documents"}


def _document(place: int, sent: object) -> Document:
    """A document beside the messages, in the shape that vLLM and Cohere take: text, and perhaps title and id."""
    given = cast("Mapping[str, Any]", sent) if isinstance(sent, Mapping) else {"text": sent}
    text, title, id = (given.get(name) or "" for name in ("text", "title", "id"))
    if not (isinstance(text, str) and text and isinstance(title, str) and isinstance(id, str)):
        raise InvalidRequest(
            f'`documents.{place}` should be an object such as {{"text": "…", "title": "…", "id": "…"}}, all of it text',
            param=f"documents.{place}",
            code="invalid_value",
        )
    return Document(text=text, title=title, id=id)


def _message(wire: WireMessage) -> Message:
    content = wire.content
    extra = dict(wire.model_extra or {})
    if any(call.function is None or _holds_more(call) for call in wire.tool_calls or ()):
        # Calls of custom tools, and what a provider wants back with a call, as a signature of its thoughts, have no
        # name among the message's fields; so they go on as they came.
        extra["tool_calls"] = [call.model_dump(mode="json", exclude_unset=True) for call in wire.tool_calls or ()]
    return Message(
        role=wire.role,
        content=[part.model_dump(mode="json") for part in content] if isinstance(content, list) else content,
        name=wire.name,
        tool_calls=tuple(
            ToolCall(id=c.id, name=c.function.name, arguments=c.function.arguments)
            for c in wire.tool_calls or ()
            if c.function is not None and "tool_calls" not in extra
        ),
        tool_call_id=wire.tool_call_id,
        extra=extra,
    )


def _holds_more(call: WireToolCall) -> bool:
    return bool(call.model_extra or (call.function is not None and call.function.model_extra))


def _files(part: Mapping[str, Any]) -> Iterable[Document]:
    file = part.get("file")
    data = cast("Mapping[str, Any]", file).get("file_data") if isinstance(file, Mapping) else None
    if not isinstance(data, str) or not data.startswith("data:text/"):
        return
    head, _, body = data.partition(",")
    try:
        raw = base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
        text = raw.decode()
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidRequest("a text file among the messages is not base64 of UTF-8", param="messages") from None
    name = str(cast("Mapping[str, Any]", file).get("filename") or "")
    yield Document(text=text, title=name, id=name)


def read_chat(body: bytes, *, messages: int | None = None) -> ChatRequest:
    """Read a request. Raises InvalidRequest that names the parameter and never repeats what was sent.

    More `messages` than that are not even looked at.
    """
    sent = _object(body, "messages")
    given = cast("list[Any]", sent["messages"]) if isinstance(sent.get("messages"), list) else []
    if messages is not None and len(given) > messages:
        raise TooManyMessages(f"`messages`: at most {messages}, not {len(given)}", param="messages")
    return _checked(ChatRequest, sent)


Read = TypeVar("Read", bound=Body)


def read(kind: type[Read], body: bytes, *, beside: str) -> Read:
    """Read another request, for a model and what is `beside` it; as `read_chat`."""
    return _checked(kind, _object(body, beside))


def _object(body: bytes, beside: str) -> Json:
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at byte {error.pos}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body should be a JSON object with `model` and `{beside}`")
    return cast("Json", data)


def _checked(kind: type[Read], sent: Json) -> Read:
    check_size(sent)
    try:
        return kind.of(sent)
    except ValidationError as error:
        raise refusal_of(error.errors(include_url=False, include_input=False), sent) from None


_ROLES = frozenset(("developer", "system", "user", "assistant", "tool", "function"))


def _number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and least <= value <= most


def _is_text(value: Any) -> bool:
    return type(value) is str


def _asks_of_usage_alone(value: Any) -> bool:
    kind: object = value.__class__
    return kind is dict and all(name == "include_usage" and type(said) is bool for name, said in value.items())


USUAL: Mapping[str, Callable[[Any], bool]] = {
    "stream": lambda value: type(value) is bool,
    "stream_options": _asks_of_usage_alone,
    "n": lambda value: type(value) is int and value == 1,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "max_tokens": lambda value: type(value) is int and value >= 1,
    "max_completion_tokens": lambda value: type(value) is int and value >= 1,
    "seed": lambda value: type(value) is int,
    "stop": _is_text,
    "user": _is_text,
    "reasoning_effort": _is_text,
}
"""What most requests hold beside model and messages, and the values that `ChatRequest` takes for certain."""


def usual(sent: Json) -> list[Json] | None:
    """The messages, each as `Message.wire` has it, of a request of texts and usual parameters.

    Nearly all are, and what `ChatRequest` would say to them is known: nothing. None where it has to be asked, which
    says no more than that.
    """
    model, messages = sent.get("model"), sent.get("messages")
    kind: object = messages.__class__
    if type(model) is not str or not 0 < len(model) <= NAME or kind is not list or not messages:
        return None
    if len(sent) > 2:
        for name, value in sent.items():
            if value is not None and name != "model" and name != "messages":
                allowed = USUAL.get(name)
                if allowed is None or not allowed(value):
                    return None
    said: list[Json] = []
    for message in messages:
        kind = message.__class__
        if kind is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or type(role) is not str or role not in _ROLES:
            return None
        said.append({"role": role, "content": content})
    return said


class TooManyMessages(InvalidRequest):
    """More messages than a request may hold."""


def check_size(body: Json) -> None:
    """Raises InvalidRequest where a body is nested too deeply or holds too much."""
    level: list[Any] = [body]
    count = 0
    for _ in range(DEPTH):
        inside: list[Any] = []
        for value in level:
            items = cast("Json", value).values() if isinstance(value, dict) else cast("list[Any]", value)
            inside += [item for item in items if isinstance(item, (dict, list))]
        count += len(inside)
        if count > OBJECTS:
            raise InvalidRequest(f"the body holds more than {OBJECTS} objects and lists")
        if not inside:
            return
        level = inside
    raise InvalidRequest(f"the body is nested more than {DEPTH} deep")


def refusal_of(errors: Sequence[ErrorDetails], body: object) -> InvalidRequest:
    """What to say of a body that was not valid, by the validator's errors."""
    # A union reports an error for each of its branches. Deepest is the one that the value came closest to; among equals
    # what is wrong with a value of the right type tells more than that it is not of some other.
    placed = [(list(_place(e["loc"], body, missing=e["type"] == "missing")), e) for e in errors[:16]]
    model = [p for p in placed if p[0] == ["model"]]
    place, error = model[0] if model else max(placed, key=lambda p: (len(p[0]), not p[1]["type"].endswith("_type")))
    param = ".".join(place)
    if error["type"] == "missing":
        return InvalidRequest(f"`{param}` is required", param=param, code="missing_required_parameter")
    said = _plainly(error["msg"])
    if error["type"].endswith("_type"):
        branches = [_plainly(e["msg"]) for where, e in placed if where == place]
        said = " or ".join([said, *(other.removeprefix("should be ") for other in branches if other != said)])
    return InvalidRequest(f"`{param}`: {said}", param=param, code="invalid_value")


def _place(loc: Sequence[int | str], body: object, *, missing: bool) -> Iterable[str]:
    """Where in the body an error is: of pydantic's path to it, some steps name a branch of a union, not a place."""
    here = body
    for step in loc:
        if isinstance(here, dict) and step in here:
            here = cast("Json", here)[cast("str", step)]
        elif isinstance(here, list) and isinstance(step, int):
            here = here[step]  # pyright: ignore[reportUnknownVariableType]  # JSON
        elif not (missing and step is loc[-1]):
            continue
        yield str(step)


def _plainly(message: str) -> str:
    for library, ours in _PLAINLY.items():
        message = message.replace(library, ours)
    return message[:1].lower() + message[1:]


_PLAINLY = {
    "Input should be": "should be",
    "a valid dictionary": "an object",
    "a valid list": "a list",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "Extra inputs are not permitted": "there is no such field",
    "List should have at least 1 item after validation, not 0": "should not be empty",
    " after validation": "",
    "String should have at least 1 character": "should not be empty",
    "String should have": "should have",
}
"""The validator's words, and ours: for readers who think in JSON."""


def refuse_unsupported(request: ChatRequest, program: Program[Any, Any]) -> None:
    """Raise InvalidRequest for a parameter that would change the answer's shape and that the program cannot honour."""
    also = f"; it supports {', '.join(sorted(program.supports))}" if program.supports else ""
    for name, value in request.asked.items():
        need = NEEDS.get(name)
        if need is None or need in program.supports or value in HARMLESS[name]:
            continue
        if not need:
            raise InvalidRequest(
                f"`{name}` is not supported by programs, which answer with text and calls of `tools`; an upstream that "
                "is passed through is given it",
                param=name,
                code="unsupported_parameter",
            )
        raise InvalidRequest(
            f'`{name}` is not supported by the program "{program.name}", which answers with plain text{also}',
            param=name,
            code="unsupported_parameter",
        )
    for place, message in enumerate(request.messages):
        for part in message.content if isinstance(message.content, list) else ():
            need = PARTS.get(part.type)
            if need is not None and need not in program.supports:
                raise InvalidRequest(
                    f'the program "{program.name}" cannot look at a part of type {part.type}{also}',
                    param=f"messages.{place}.content",
                    code="unsupported_parameter",
                )


def split(request: ChatRequest, program: Program[Any, Any]) -> tuple[Json, Json, list[str]]:
    """A request's parameters as a program gets them: sampling hints, what shapes the answer, and what is ignored."""
    hints: Json = {}
    shape: Json = {}
    ignored: list[str] = []
    for name, value in request.asked.items():
        if name in HINTS:
            hints[name] = value
        elif NEEDS.get(name) in program.supports:
            shape[name] = value
        elif value not in HARMLESS.get(name, ()):
            ignored.append(name)
    return hints, shape, ignored


def usage(tokens: Usage, visible: int | None = None) -> Json:
    """OpenAI's `usage`. Tokens bought that are not in the answer count as reasoning; `visible` are those that are."""
    reasoning = tokens.reasoning_tokens if visible is None else max(0, tokens.completion_tokens - visible)
    return {
        "prompt_tokens": tokens.prompt_tokens,
        "completion_tokens": tokens.completion_tokens,
        "total_tokens": tokens.total_tokens,
        "prompt_tokens_details": {"cached_tokens": tokens.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def choice(index: int, answer: Answer, reply: Reply | None = None) -> Json:
    """One choice of a whole completion."""
    message: Json = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
    if reply is not None and reply.refusal is not None:
        message["refusal"] = reply.refusal
    if reply is not None and reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [_tool_call(c) for c in answer.tool_calls]
        message["content"] = answer.text or None
    return {"index": index, "message": message, "logprobs": logprobs(reply), "finish_reason": finish_reason(answer)}


def finish_reason(answer: Answer) -> str:
    return "tool_calls" if answer.tool_calls and answer.finish == "stop" else answer.finish


@dataclass(slots=True)
class Said:
    """What of one choice has gone out in a stream, so that its end can bring the rest."""

    text: bool = False
    reasoning: bool = False
    tool_calls: bool = False

    def add(self, delta: Delta) -> Json:
        """The `delta` of a chunk; empty where it brings nothing."""
        body: Json = {}
        if delta.text:
            self.text = True
            body["content"] = delta.text
        if delta.reasoning:
            self.reasoning = True
            body["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            self.tool_calls = True
            body["tool_calls"] = _tool_call_deltas(delta.tool_calls)
        return body

    def rest(self, answer: Answer, reply: Reply | None) -> Json:
        """The `delta` that makes what was said the whole answer; empty where it is."""
        body: Json = {}
        if reply is not None and reply.reasoning and not self.reasoning:
            body["reasoning_content"] = reply.reasoning
        if answer.text and not self.text:
            body["content"] = answer.text
        if reply is not None and reply.refusal is not None:
            body["refusal"] = reply.refusal
        if answer.tool_calls and not self.tool_calls:
            body["tool_calls"] = [{"index": place, **_tool_call(c)} for place, c in enumerate(answer.tool_calls)]
        return body


def logprobs(reply: Reply | None) -> Json | None:
    if reply is None or not reply.logprobs:
        return None
    return {
        "content": [
            {
                "token": t.token,
                "logprob": t.logprob,
                "bytes": list(t.token.encode()),
                "top_logprobs": [
                    {"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in t.top
                ],
            }
            for t in reply.logprobs
        ],
        "refusal": None,
    }


def _tool_call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool_call_deltas(calls: Iterable[ToolCallDelta]) -> list[Json]:
    deltas: list[Json] = []
    for call in calls:
        function: Json = {"arguments": call.arguments}
        delta: Json = {"index": call.index, "function": function}
        if call.id is not None:
            delta |= {"id": call.id, "type": "function"}
        if call.name is not None:
            function["name"] = call.name
        deltas.append(delta)
    return deltas


def completion(id: str, created: int, model: str, choices: Sequence[Json], tokens: Json, receipt: Json | None) -> Json:
    """A whole `chat.completion`."""
    body: Json = {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": list(choices),
        "usage": tokens,
    }
    if receipt is not None:
        body["asmodel"] = receipt
    return body


class Chunks:
    """The chunks of one stream, as bytes of server-sent events; all share id, time and model."""

    object: ClassVar[str] = "chat.completion.chunk"

    def __init__(self, id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._head = {"id": id, "object": self.object, "created": created, "model": model}
        self._include_usage = include_usage

    def delta(
        self,
        index: int,
        delta: Json,
        finish: str | None = None,
        *,
        logprobs: Json | None = None,
        receipt: Json | None = None,
    ) -> bytes:
        body: Json = {**self._head, "choices": [self._choice(index, delta, finish, logprobs)]}
        if self._include_usage:
            body["usage"] = None
        if receipt is not None:
            body["asmodel"] = receipt
        return event(body)

    def _choice(self, index: int, delta: Json, finish: str | None, logprobs: Json | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, index: int, reply: Reply | None) -> Json | None:
        """Of a whole choice."""
        return logprobs(reply)

    def usage(self, tokens: Json) -> bytes:
        """The chunk before the end, for those who asked: no choices, the usage."""
        return event({**self._head, "choices": [], "usage": tokens}) if self._include_usage else b""


DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(body: Json) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def error_body(error: AsmodelError) -> Json:
    """OpenAI's error envelope; all four keys are always there."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
