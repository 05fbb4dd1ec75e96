"""What a model was shown and what it said, as spans may carry it: redacted, in the conventions' JSON, cut to a limit.

Off unless `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` says otherwise; then nothing here is made, and a span
costs what it costs without it. The JSON is that of the OpenTelemetry semantic conventions for generative AI, v1.41: a
list of messages of `parts`. Raw text has no roles: a prompt is one message of a user, its continuation one of an
assistant; and so for what a score was given, whose context comes first.

Every text goes through the redactor before anything else is done with it, so before it is cut, put on a span, sent, or
written to the local file. A redactor that fails hides the text. What a length limit takes away is taken inside of the
JSON, which stays whole: first from the ends of long texts, then from the messages in the middle.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import orjson

from asmodel.calls import Call, Chat, Completion, Given, Message, Reply, Score, ToolCall, pieces

log = logging.getLogger("asmodel.tracing")

VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_MODES: Mapping[str, tuple[bool, bool]] = {
    "": (False, False),
    "NO_CONTENT": (False, False),
    "FALSE": (False, False),
    "SPAN_ONLY": (True, False),
    "EVENT_ONLY": (False, True),
    "SPAN_AND_EVENT": (True, True),
    # What older instrumentations take.
    "TRUE": (True, False),
}
"""What the variable may say, and whether content is then on spans and in events."""

_LENGTHS = ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT")
"""The SDK would cut at these, in the middle of the JSON."""

LIMIT = 30_000
"""Bytes of one attribute's JSON. Stores that index tags drop whole spans from 32 KB on."""
PART = 8_000
"""Characters of one text."""
_LEAST = 125
_PARTS = 64

HIDDEN = "[hidden: the redactor failed]"

Kind: TypeAlias = Literal[
    "system",
    "user",
    "assistant",
    "tool",
    "reasoning",
    "prompt",
    "completion",
    "context",
    "continuation",
    "input",
    "uri",
    "name",
    "stop",
    "tool.definition",
    "tool.arguments",
    "tool.result",
]
"""What a redactor is told that a text is. `tool.*` are JSON; what is no JSON any more afterwards is kept as a text.

`prompt` and `completion` are of raw completions, `context` and `continuation` of scores, `input` of embeddings, `uri`
is where a picture or a file is, `name` a participant's.
"""

_ROLES: Mapping[str, Kind] = {
    "system": "system",
    "developer": "system",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}

Redactor: TypeAlias = Callable[[str, str], str]
"""(kind, text) -> text. Called on the event loop, with every text; should be quick, and not raise."""


@dataclass(frozen=True, slots=True)
class Content:
    """How content is captured, where it is."""

    on_spans: bool = True
    in_events: bool = False
    redact: Redactor | None = None
    limit: int = LIMIT

    def asked(self, call: Call) -> tuple[str | None, str, str | None]:
        """System instructions, messages, and definitions of tools that a call shows."""
        if isinstance(call, Chat):
            start = 0
            while start < len(call.messages) and call.messages[start].role in ("system", "developer"):
                start += 1
            system = [part for message in call.messages[:start] for part in self._parts(message, "system")]
            tools = [self._definition(tool) for tool in call.tools]
            return (
                _fitted(system, self.limit) if system else None,
                self.messages(call.messages[start:]),
                _fitted(tools, self.limit) if tools else None,
            )
        if isinstance(call, Completion):
            prompts = self._given("prompt", call.prompt if call.given is None else call.given)
            return None, _fitted(prompts, self.limit), None
        if isinstance(call, Score):
            given = [
                self._said("user", "context", call.context),
                self._said("assistant", "continuation", call.continuation),
            ]
            return None, _fitted(given, self.limit), None
        inputs = self._given("input", call.texts if call.given is None else call.given)
        return None, _fitted(inputs, self.limit), None

    def _given(self, what: Kind, given: Given) -> list[dict[str, Any]]:
        """Of tokens, which are numbers that say nothing to a reader, how many they are."""
        texts = (text if isinstance(text, str) else f"[{len(text)} tokens]" for text in pieces(given))
        return [self._said("user", what, text) for text in texts]

    def messages(self, messages: Sequence[Message]) -> str:
        return _fitted([self._message(message) for message in messages], self.limit)

    def answered(self, call: Call, reply: Reply) -> str | None:
        """What came back. Of a score it is numbers; None for embeddings, whose numbers say nothing to a reader."""
        if isinstance(call, Chat):
            return self.answer(reply.text or reply.refusal or "", reply.finish, reply.tool_calls, reply.reasoning)
        if isinstance(call, Completion):
            return _fitted(
                [{**self._said("assistant", "completion", reply.text), "finish_reason": reply.finish}], self.limit
            )
        if isinstance(call, Score):
            measured = {"type": "loglikelihood", "nats": reply.likelihood.total, "tokens": reply.likelihood.tokens}
            return _fitted([{"role": "assistant", "parts": [measured], "finish_reason": reply.finish}], self.limit)
        return None

    def answer(self, text: str, finish: str, tool_calls: Sequence[ToolCall] = (), reasoning: str = "") -> str:
        parts: list[dict[str, Any]] = []
        if reasoning:
            parts.append({"type": "reasoning", "content": self.text("reasoning", reasoning)})
        if text or not tool_calls:
            parts.append({"type": "text", "content": self.text("assistant", text)})
        parts += [self._tool_call(call) for call in tool_calls]
        return _fitted([{"role": "assistant", "parts": parts, "finish_reason": finish}], self.limit)

    def value(self, kind: Kind, value: object) -> str:
        """A tool's arguments or result, as JSON."""
        return _fitted(self._json(kind, value if isinstance(value, str) else _dumps(value)), self.limit)

    def text(self, kind: Kind, text: str) -> str:
        """The text as it may be shown."""
        if self.redact is not None:
            try:
                text = self.redact(kind, text)
                if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # a plug-in's word
                    raise TypeError(f"it gave {type(text).__name__}, not a text")
            except Exception as error:
                # Its text may quote what was to be hidden.
                log.warning(
                    "the redactor failed on a text of the kind %s (%s); it is hidden", kind, type(error).__name__
                )
                return HIDDEN
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode()
        return text

    def _said(self, role: str, kind: Kind, text: str) -> dict[str, Any]:
        return {"role": role, "parts": [{"type": "text", "content": self.text(kind, text)}]}

    def _message(self, message: Message) -> dict[str, Any]:
        body: dict[str, Any] = {"role": message.role, "parts": self._parts(message, _ROLES.get(message.role, "user"))}
        if message.name is not None:
            body["name"] = self.text("name", message.name)
        return body

    def _parts(self, message: Message, kind: Kind) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        thought = message.extra.get("reasoning_content")
        if isinstance(thought, str) and thought:
            parts.append({"type": "reasoning", "content": self.text("reasoning", thought)})
        if message.tool_call_id is not None:
            response = self._json("tool.result", message.text)
            return [{"type": "tool_call_response", "id": message.tool_call_id, "response": response}]
        if isinstance(message.content, str):
            parts.append({"type": "text", "content": self.text(kind, message.content)})
        elif message.content is not None:
            parts += [self._part(cast("Mapping[str, Any]", part), kind) for part in message.content]
        parts += [self._tool_call(call) for call in message.tool_calls]
        if len(parts) > _PARTS:
            left_out = len(parts) - _PARTS
            parts[_PARTS // 2 : -_PARTS // 2] = [_note(f"… {left_out} more parts")]
        return parts

    def _part(self, part: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
        what = str(part.get("type"))
        if what in ("text", "refusal") and isinstance(part.get(what), str):
            return {"type": "text", "content": self.text(kind, part[what])}
        inside = _mapping(part.get(what))
        if what == "image_url":
            uri = str(inside.get("url"))
            if uri.startswith("data:"):
                head, _, data = uri.partition(",")
                uri = f"{head},… {len(data)} characters"
            return {"type": "uri", "modality": "image", "uri": self.text("uri", uri)}
        if what == "input_audio":
            sound = inside.get("data")
            size = len(sound) * 3 // 4 if isinstance(sound, str) else 0
            return {"type": "blob", "modality": "audio", "mime_type": f"audio/{inside.get('format')}", "bytes": size}
        if what == "file" and isinstance(inside.get("file_id"), str):
            return {"type": "file", "modality": "document", "file_id": inside["file_id"]}
        # Of what is not known, that it was there: nothing says what in it is a text.
        return {"type": what}

    def _tool_call(self, call: ToolCall) -> dict[str, Any]:
        arguments = self._json("tool.arguments", call.arguments)
        return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": arguments}

    def _definition(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = _mapping(tool.get("function")) or tool
        shown = {"type": tool.get("type", "function"), "name": function.get("name")}
        about = {name: function[name] for name in ("description", "parameters") if name in function}
        told = self._json("tool.definition", _dumps(about))
        if isinstance(told, dict):
            return {**shown, **cast("dict[str, Any]", told)}
        return {**shown, "description": told}

    def _json(self, kind: Kind, text: str) -> Any:
        text = self.text(kind, text)
        # A text can be deeper than the stack.
        if text.count("[") + text.count("{") > 500:
            return text
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            return text


def read(environ: Mapping[str, str], *, redact: Redactor | None = None, limit: int = LIMIT) -> Content | None:
    """What the variables say about content: None where it is off. A word that is not known is off, with a warning."""
    said = environ.get(VARIABLE, "").strip().upper()
    if said not in _MODES:
        log.warning(
            "%s takes NO_CONTENT, SPAN_ONLY, EVENT_ONLY, SPAN_AND_EVENT and true; nothing is captured", VARIABLE
        )
        return None
    on_spans, in_events = _MODES[said]
    if not on_spans and not in_events:
        return None
    for name in _LENGTHS:
        given = environ.get(name, "").strip()
        if given.isdecimal():
            limit = min(limit, int(given))
            break
    return Content(on_spans, in_events, redact, limit)


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _note(text: str) -> dict[str, Any]:
    return {"type": "text", "content": text}


def _dumps(value: object) -> str:
    try:
        return orjson.dumps(value, default=_plain).decode()
    except TypeError:
        # Integers of more than 64 bits, names that are no texts, what is nested too deeply.
        try:
            return json.dumps(value, ensure_ascii=False, default=_plain, skipkeys=True)
        except (ValueError, RecursionError, TypeError):
            return f'"{type(value).__name__}"'


def _plain(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) else str(value)


def _fitted(value: object, limit: int) -> str:
    """The value as JSON of at most `limit` bytes. A list loses what is in its middle."""
    room = PART
    while True:
        text = _dumps(_cut(value, room))
        if _size(text) <= limit:
            return text
        if room <= _LEAST:
            break
        room = max(_LEAST, room // 2)
    if not isinstance(value, list):
        return _dumps(_shortened(text, max(0, limit // 4 - 40)))
    items = [_flat(item, room) for item in cast("list[object]", value)]
    sizes = [_size(_dumps(item)) + 1 for item in items]
    # The first says what it is all about, and the last what was asked; an eighth is for saying what is missing.
    left = limit - limit // 8 - 32 - sizes[0]
    begins = len(items)
    while begins > 1 and sizes[begins - 1] <= left:
        begins -= 1
        left -= sizes[begins]
    note = _note(f"… {begins - 1} more")
    between = {"role": "omitted", "parts": [note]} if "parts" in _mapping(items[0]) else note
    kept = _dumps([items[0], between, *items[begins:]])
    return kept if _size(kept) <= limit else "[]"


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[:room]}… [{len(text) - room} more characters]"


def _cut(value: object, room: int) -> object:
    if isinstance(value, str):
        return _shortened(value, room)
    if isinstance(value, dict):
        return {name: _cut(item, room) for name, item in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        return [_cut(item, room) for item in cast("list[object]", value)]
    return value


def _flat(item: object, room: int) -> object:
    """The item with whatever is nested in it as a short text: that can be large without one long text in it."""
    fields = _mapping(item)
    if not fields:
        return _shortened(_dumps(item), room)
    flat: dict[str, object] = {}
    for name, value in fields.items():
        if name == "parts":
            flat[name] = [_flat(part, room) for part in cast("list[object]", value)]
        elif isinstance(value, (dict, list)):
            flat[name] = _shortened(_dumps(cast("object", value)), room)
        else:
            flat[name] = _cut(value, room)
    return flat
