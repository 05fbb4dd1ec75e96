"""The shapes of OpenAI's Responses API, read: a request and its items become the chat completion that they ask for.

Pure, as `wire` is. Source: OpenAI's openapi.yaml, info.version 2.3.0 (2026-08): `CreateResponse`, `InputItem`, `Item`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag, ValidationError

from asmodel import wire
from asmodel.errors import AsmodelError, InvalidRequest, Unsupported
from asmodel.wire import Finite, Json, Name

NAMES: Mapping[str, str] = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "logprobs": "include",
}
"""Parameters of a chat completion that a response's have other names for."""

ELSEWHERE: Mapping[str, str] = {
    "messages": "they are `input` here",
    "n": "a response is one answer",
    "response_format": "it is `text.format` here",
    "max_tokens": "it is `max_output_tokens` here",
    "max_completion_tokens": "it is `max_output_tokens` here",
    "reasoning_effort": "it is `reasoning.effort` here",
    "verbosity": "it is `text.verbosity` here",
    "logprobs": 'it is `include: ["message.output_text.logprobs"]` here',
    "functions": "they are `tools` here",
    "function_call": "it is `tool_choice` here",
    "modalities": "an answer is text",
    "audio": "an answer is text",
}
"""Parameters of a chat completion that are refused, because here they would be taken for nothing."""

UNSUPPORTED: Mapping[str, str] = {
    "background": "an answer is waited for, or streamed",
    "conversation": "conversations go on by `previous_response_id`",
    "prompt": "there are no stored prompts; send `instructions` and `input`",
    "context_management": "no context is compacted",
    "moderation": "nothing is moderated",
    "truncation": "an input that is too long is refused by whoever answers, never cut",
}
"""Parameters of a response that are refused, as long as they ask for anything."""

CALM: Mapping[str, tuple[Any, ...]] = {"background": (False,), "context_management": ([],), "truncation": ("disabled",)}
"""Values of these that ask for nothing."""

LOGPROBS = "message.output_text.logprobs"

INCLUDABLE = frozenset(
    (
        LOGPROBS,
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
        "reasoning.encrypted_content",
    )
)
"""What may be asked to be in a response; what there is none of is not missed, and is listed as ignored."""

PASSED_ON = (
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "service_tier",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "documents",
)
"""Parameters that have the same name and the same meaning in a chat completion."""


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


# ---- parts of a message ----


class TextPart(_Open):
    type: Literal["input_text", "output_text"]
    text: StrictStr


class RefusalPart(_Open):
    type: Literal["refusal"]
    refusal: StrictStr


class ImagePart(_Open):
    type: Literal["input_image"]
    image_url: StrictStr
    detail: StrictStr | None = None


class FilePart(_Open):
    """A file that is in the request: none is fetched."""

    type: Literal["input_file"]
    file_data: StrictStr | None = None
    file_id: StrictStr | None = None
    file_url: StrictStr | None = None
    filename: StrictStr | None = None


class AudioPart(_Open):
    type: Literal["input_audio"]
    input_audio: dict[str, Any]


class OtherPart(_Open):
    """Of a type that there is nothing for in a chat completion; refused by its name."""

    type: StrictStr


_PART_TYPES = {
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "input_image": "image",
    "input_file": "file",
    "input_audio": "audio",
}


def _part_kind(value: object) -> str:
    kind = cast("Json", value).get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _PART_TYPES.get(kind, "other") if isinstance(kind, str) else "other"


Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[RefusalPart, Tag("refusal")]
    | Annotated[ImagePart, Tag("image")]
    | Annotated[FilePart, Tag("file")]
    | Annotated[AudioPart, Tag("audio")]
    | Annotated[OtherPart, Tag("other")],
    Discriminator(_part_kind),
]
Content: TypeAlias = StrictStr | Annotated[list[Part], Field(fail_fast=True)]


# ---- items ----


class MessageItem(_Open):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: StrictStr | None = None


class FunctionCallItem(_Open):
    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr
    id: StrictStr | None = None


class FunctionCallOutputItem(_Open):
    type: Literal["function_call_output"]
    call_id: StrictStr
    output: Content
    id: StrictStr | None = None


class ReasoningText(_Open):
    type: StrictStr
    text: StrictStr


class ReasoningItem(_Open):
    """What was thought: `content` is the model's own words, `summary` is for people and goes to no model."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    id: StrictStr | None = None


class ItemReference(_Open):
    """An item of a response that is kept here, by its id."""

    type: Literal["item_reference"] | None = None
    id: StrictStr


class OtherItem(_Open):
    """Of a type that there is nothing for in a chat completion; refused by its name."""

    type: StrictStr


_ITEM_TYPES = frozenset(("message", "function_call", "function_call_output", "reasoning", "item_reference"))


def _item_kind(value: object) -> str:
    if not isinstance(value, dict):
        kind = getattr(value, "type", None)
        return _tag(kind) if kind is not None else "item_reference"
    item = cast("Json", value)
    kind = item.get("type")
    if kind is None:
        return "message" if "role" in item or "id" not in item else "item_reference"
    return _tag(kind)


def _tag(kind: object) -> str:
    return kind if isinstance(kind, str) and kind in _ITEM_TYPES else "other"


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_item_kind),
]


# ---- the request ----


class ResponseTool(_Open):
    """A tool of the client's; of other types than `function` there are none here."""

    type: StrictStr
    name: Annotated[StrictStr, Field(min_length=1)] | None = None
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class TextConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: dict[str, Any] | None = None
    verbosity: StrictStr | None = None


class ReasoningConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    effort: StrictStr | None = None
    summary: StrictStr | None = None
    generate_summary: StrictStr | None = None
    context: StrictStr | None = None
    mode: StrictStr | None = None


MetadataKey = Annotated[StrictStr, Field(max_length=64)]
MetadataValue = Annotated[StrictStr, Field(max_length=512)]


class ResponseRequest(BaseModel):
    """The body of `POST /v1/responses`. What has no name here is kept, and passed on or listed as ignored."""

    model_config = ConfigDict(extra="allow")
    model: Name
    input: StrictStr | Annotated[list[Item], Field(fail_fast=True)] | None = None
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: wire.StreamOptions | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True)] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    max_tool_calls: Annotated[StrictInt, Field(ge=1)] | None = None
    include: Annotated[list[StrictStr], Field(fail_fast=True)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    background: StrictBool | None = None
    conversation: StrictStr | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: list[Any] | None = None
    moderation: dict[str, Any] | None = None
    truncation: StrictStr | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    service_tier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: StrictStr | None = None
    documents: list[Any] | None = None
    asmodel: wire.Extension = Field(default_factory=wire.Extension)

    @property
    def items(self) -> list[Json]:
        """The input, as items of which each says its type."""
        if self.input is None:
            return []
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        items = [item.model_dump(mode="json", exclude_none=True) for item in self.input]
        for item in items:
            item.setdefault("type", "message" if "role" in item else "item_reference")
        return items

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def without_effect(self) -> list[str]:
        """What was asked for, and is not missed where it does not come."""
        told = [f"include.{name}" for name in self.include or () if name != LOGPROBS]
        said = self.reasoning or ReasoningConfig()
        return told + [f"reasoning.{name}" for name in ("context", "mode") if getattr(said, name) is not None]


def read(body: bytes, *, items: int | None = None) -> ResponseRequest:
    """Read a request. Raises InvalidRequest that names the parameter and never repeats what was sent.

    More `items` than that are not even looked at.
    """
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at byte {error.pos}") from None
    if not isinstance(data, dict):
        raise InvalidRequest("the body should be a JSON object with `model` and `input`")
    sent = cast("Json", data)
    given = sent.get("input")
    if items is not None and isinstance(given, list):
        too_many(len(given), items)  # pyright: ignore[reportUnknownArgumentType]  # JSON
    wire.check_size(sent)
    for name, why in ELSEWHERE.items():
        if sent.get(name) is not None:
            raise Unsupported(f"`{name}` is no parameter of a response: {why}", param=name)
    try:
        request = ResponseRequest.model_validate(sent)
    except ValidationError as error:
        raise wire.refusal_of(error.errors(include_url=False, include_input=False), sent) from None
    if not request.input and request.previous_response_id is None:
        raise InvalidRequest("`input` is required", param="input", code="missing_required_parameter")
    _refuse(request, sent)
    return request


def too_many(count: int, most: int) -> None:
    """Raises wire.TooManyMessages."""
    if count > most:
        raise wire.TooManyMessages(f"`input`: at most {most} items, not {count}", param="input")


def _refuse(request: ResponseRequest, sent: Json) -> None:
    """Raise Unsupported or InvalidRequest for what there is nothing for in a chat completion."""
    for name, why in UNSUPPORTED.items():
        value = sent.get(name)
        if value is not None and value not in CALM.get(name, ()):
            raise Unsupported(f"`{name}` is not supported here: {why}", param=name)
    for place, name in enumerate(request.include or ()):
        if name not in INCLUDABLE:
            known = ", ".join(sorted(INCLUDABLE))
            raise InvalidRequest(
                f"`include.{place}` should be one of {known}", param=f"include.{place}", code="invalid_value"
            )
    for place, tool in enumerate(request.tools or ()):
        if tool.type != "function":
            raise Unsupported(
                f"`tools.{place}.type`: there are only tools of type function here, which the client runs",
                param=f"tools.{place}.type",
            )
        if tool.name is None:
            where = f"tools.{place}.name"
            raise InvalidRequest(f"`{where}` is required", param=where, code="missing_required_parameter")
    _tool_choice(request.tool_choice)
    _response_format(request.text)
    for place, item in enumerate(request.input if isinstance(request.input, list) else ()):
        if isinstance(item, OtherItem):
            raise Unsupported(
                f"`input.{place}.type`: an item may be a message, function_call, function_call_output, reasoning or "
                "item_reference",
                param=f"input.{place}.type",
            )
        content = getattr(item, "content" if isinstance(item, MessageItem) else "output", None)
        for number, part in enumerate(cast("list[Part]", content) if isinstance(content, list) else ()):
            where = f"input.{place}.{'content' if isinstance(item, MessageItem) else 'output'}.{number}"
            if isinstance(part, OtherPart):
                raise Unsupported(
                    f"`{where}.type`: a part may be {', '.join(_PART_TYPES)}",
                    param=f"{where}.type",
                )
            if isinstance(part, FilePart) and part.file_url is not None:
                raise Unsupported(
                    f"`{where}.file_url`: no file is fetched; send it as `file_data`", param=f"{where}.file_url"
                )
            if isinstance(part, FilePart) and part.file_data is None and part.file_id is None:
                raise InvalidRequest(
                    f"`{where}.file_data` is required", param=f"{where}.file_data", code="missing_required_parameter"
                )


# ---- a request becomes a chat completion ----


def chat_of(request: ResponseRequest, items: Sequence[Json]) -> wire.ChatRequest:
    """The chat completion that is asked for; `items` are the whole conversation, what went before it first.

    Raises InvalidRequest where a parameter that has no name among a response's own is wrong.
    """
    body: Json = {**(request.model_extra or {}), "model": request.model, "messages": messages_of(items)}
    if request.instructions is not None:
        body["messages"].insert(0, {"role": "system", "content": request.instructions})
    for name in PASSED_ON:
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if request.stream is not None:
        body["stream"] = request.stream
    if request.max_output_tokens is not None:
        body["max_completion_tokens"] = request.max_output_tokens
    if request.reasoning is not None and request.reasoning.effort is not None:
        body["reasoning_effort"] = request.reasoning.effort
    if request.text is not None and request.text.verbosity is not None:
        body["verbosity"] = request.text.verbosity
    if (wanted := _response_format(request.text)) is not None:
        body["response_format"] = wanted
    if request.top_logprobs:
        body["top_logprobs"] = request.top_logprobs
    if request.wants_logprobs:
        body["logprobs"] = True
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if (choice := _tool_choice(request.tool_choice)) is not None:
        body["tool_choice"] = choice
    if "asmodel" in request.model_fields_set:
        body["asmodel"] = request.asmodel.model_dump(mode="json", exclude_unset=True)
    if not body["messages"]:
        raise InvalidRequest("there is nothing to answer: send some `input`", param="input")
    try:
        return wire.ChatRequest.of(body)
    except ValidationError as error:
        raise wire.refusal_of(error.errors(include_url=False, include_input=False), body) from None


def _tool(tool: ResponseTool) -> Json:
    function = tool.model_dump(mode="json", exclude_none=True)
    return {"type": function.pop("type"), "function": function}


def _tool_choice(choice: str | Mapping[str, Any] | None) -> Any:
    """The same of a chat completion. Raises InvalidRequest or Unsupported."""
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if not isinstance(choice, Mapping):
        raise InvalidRequest(
            "`tool_choice` should be none, auto, required, or an object", param="tool_choice", code="invalid_value"
        )
    kind = choice.get("type")
    if kind == "function" and isinstance(choice.get("name"), str):
        return _named(choice)
    if kind == "allowed_tools":
        tools = choice.get("tools")
        listed = cast("list[object]", tools) if isinstance(tools, list) else []
        named = [cast("Mapping[str, Any]", tool) for tool in listed if isinstance(tool, Mapping)]
        if named and len(named) == len(listed) and all(tool.get("type") == "function" for tool in named):
            allowed = {"mode": choice.get("mode", "auto"), "tools": [_named(tool) for tool in named]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
    raise Unsupported("`tool_choice` can only name tools of type function", param="tool_choice")


def _named(tool: Mapping[str, Any]) -> Json:
    return {"type": "function", "function": {"name": tool.get("name")}}


def _response_format(text: TextConfig | None) -> Json | None:
    """The same of a chat completion. Raises InvalidRequest."""
    if text is None or text.format is None:
        return None
    wanted = text.format
    kind = wanted.get("type")
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind == "json_schema" and isinstance(wanted.get("name"), str) and isinstance(wanted.get("schema"), Mapping):
        schema = {name: value for name, value in wanted.items() if name != "type" and value is not None}
        return {"type": "json_schema", "json_schema": schema}
    raise InvalidRequest(
        "`text.format.type` should be text, json_object, or json_schema with a `name` and a `schema`",
        param="text.format",
        code="invalid_value",
    )


def messages_of(items: Iterable[Mapping[str, Any]]) -> list[Json]:
    """A conversation of items as messages of a chat completion.

    What an assistant said and called in one turn, several items here, is one message there. The model's own reasoning
    goes with the calls that it led to, as `reasoning_content`: models that reason between calls want it back, and some
    refuse it anywhere else. Summaries go nowhere.
    """
    messages: list[Json] = []
    thought: list[str] = []
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            thought += [part["text"] for part in item.get("content") or () if part["type"] == "reasoning_text"]
            continue
        last: Json | None = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if kind == "function_call":
            if last is None:
                messages.append({"role": "assistant", "content": None})
                last = messages[-1]
            function = {"name": item["name"], "arguments": item["arguments"]}
            last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
            if thought:
                last["reasoning_content"] = last.get("reasoning_content", "") + "".join(thought)
                thought = []
        elif kind == "function_call_output":
            thought = []
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])})
        elif item["role"] != "assistant":
            thought = []
            messages.append({"role": item["role"], "content": _content(item["content"])})
        elif last is not None and "tool_calls" in last:
            # It went on talking in the same turn; nothing may come between calls and their results.
            for name, said in _said(item["content"]).items():
                last[name] = (last.get(name) or "") + said
        else:
            messages.append({"role": "assistant", "content": None, **_said(item["content"])})
    return messages


def _said(content: str | Sequence[Mapping[str, Any]]) -> Json:
    """What an assistant's message says: `content`, and `refusal` where it has refused."""
    if isinstance(content, str):
        return {"content": content}
    texts = [part["text"] for part in content if part["type"] in ("input_text", "output_text")]
    refusals = [part["refusal"] for part in content if part["type"] == "refusal"]
    said: Json = {"content": "".join(texts)} if texts or not refusals else {}
    return said | ({"refusal": "".join(refusals)} if refusals else {})


def _content(content: str | Sequence[Mapping[str, Any]]) -> str | list[Json]:
    if isinstance(content, str):
        return content
    parts = [_part(part) for part in content]
    if len(parts) == 1 and parts[0]["type"] == "text":
        # Not every server takes parts, and every one takes text.
        return str(parts[0]["text"])
    return parts


def _part(part: Mapping[str, Any]) -> Json:
    kind = part["type"]
    if kind == "input_image":
        image = {"url": part["image_url"]} | ({"detail": part["detail"]} if "detail" in part else {})
        return {"type": "image_url", "image_url": image}
    if kind == "input_file":
        return {"type": "file", "file": {n: part[n] for n in ("file_data", "file_id", "filename") if n in part}}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part["input_audio"]}
    return {"type": "text", "text": part["refusal"] if kind == "refusal" else part["text"]}


# ---- items that are kept ----

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_ID = re.compile(r"(?:msg|fc|fco|rs)_([0-9a-f]{24})")


def response_id(id: str) -> str:
    """The id of a response, from that of the chat completion that it is made of."""
    return f"resp_{id.partition('-')[2]}"


def item_id(response: str, kind: str, place: int, *, given: bool = False) -> str:
    """The id of an item of a response, from which that response can be told; `given` if it is of its input."""
    return f"{_PREFIXES[kind]}_{response.removeprefix('resp_')}{'i' if given else ''}{place:02d}"


def owner_of(item: str) -> str | None:
    """The id of the response that an item's id is made from; None where it is not one of ours."""
    found = _ID.match(item)
    return None if found is None else f"resp_{found[1]}"


def kept(items: Iterable[Json], response: str) -> list[Json]:
    """The items of an input as the API lists them: each with an id, messages in parts."""
    listed: list[Json] = []
    for place, item in enumerate(items):
        item = {**item, "id": item.get("id") or item_id(response, item["type"], place, given=True)}
        if item["type"] == "message":
            item.setdefault("status", "completed")
            if isinstance(item["content"], str):
                text: Json = {"type": "input_text", "text": item["content"]}
                if item["role"] == "assistant":
                    text = {"type": "output_text", "text": item["content"], "annotations": []}
                item["content"] = [text]
        elif item["type"] == "reasoning":
            item.setdefault("summary", [])
        else:
            item.setdefault("status", "completed")
        listed.append(item)
    return listed


# ---- names ----

_QUOTED = re.compile("`(" + "|".join(re.escape(name) for name in NAMES) + r")(?=[.`])")
_E = TypeVar("_E", bound=AsmodelError)


def our_name(name: str) -> str:
    """What a response calls a parameter of a chat completion, or a place in one."""
    for theirs, ours in NAMES.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours if theirs == "messages" else ours + name[len(theirs) :]
    return name


def renamed(error: _E) -> _E:
    """The error, with parameters by the names that they have here."""
    param = None if error.param is None else our_name(error.param)
    message = _QUOTED.sub(lambda found: f"`{NAMES[found[1]]}", error.message)
    if (param, message) == (error.param, error.message):
        return error
    # A copy: others may be told the same error, of the same run.
    told = copy.copy(error)
    told.param, told.message = param, message
    return told
