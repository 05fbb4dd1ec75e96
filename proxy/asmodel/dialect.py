"""OpenAI's wire as a client speaks it: calls to bodies, bodies and chunks to replies, refusals to errors. All pure.

Upstream plug-ins share this; none of it does I/O. It reads what real servers send, not only what the API's description
(openapi.yaml 2.3.0) allows: `reasoning` beside `reasoning_content`, tool-call fragments without an index, chat-shaped
log-probabilities on completions (llama.cpp), errors inside a 200 (OpenRouter).
"""

from __future__ import annotations

import base64
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, cast

import orjson

from asmodel.calls import (
    Call,
    Chat,
    Completion,
    Delta,
    Embed,
    Given,
    Reply,
    Score,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
    pieces,
)
from asmodel.errors import (
    Unsupported,
    UpstreamAuth,
    UpstreamBroken,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asmodel.protocols import Told

MESSAGE_LIMIT = 500
"""Characters of an upstream's own message that are passed on."""


# --- calls to bodies ------------------------------------------------------------------------------------------------


def body_of(call: Chat | Completion | Embed, model: str, *, stream: bool = False, n: int = 1) -> dict[str, Any]:
    """The JSON body of the call for the route of its kind; `n` choices, of which a Reply holds the first.

    `stream` of the parameters is ours to decide and is dropped, and so is whether a stream tells its usage, which each
    does; the other `stream_options` are sent with a stream. Raises Unsupported on an `n`
    among the parameters other than 1: the other choices would be paid for and lost.
    """
    body: dict[str, Any] = {k: v for k, v in call.params.items() if k not in ("stream", "stream_options")}
    if body.get("n", 1) not in (1, None):
        raise Unsupported(f"one call has one answer: n is {body['n']}, and may only be 1", param="n")
    body["model"] = model
    if n != 1:
        body["n"] = n
    if isinstance(call, Chat):
        body["messages"] = [message.wire() for message in call.messages]
        if call.schema is not None:
            schema = {"name": "reply", "strict": True, "schema": call.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if call.tools:
            body["tools"] = list(call.tools)
    elif isinstance(call, Completion):
        body["prompt"] = call.prompt if call.given is None else call.given
    else:
        body["input"] = list(call.texts) if call.given is None else call.given
    if stream:
        body["stream"] = True
        body["stream_options"] = {**mapping(call.params.get("stream_options")), "include_usage": True}
    return body


def forwarded(
    params: dict[str, Any], messages: Sequence[Mapping[str, Any]], model: str, *, stream: bool = False
) -> dict[str, Any]:
    """What `body_of` makes of a `Chat` of these parameters and messages (each as its `wire`), which is taken apart.

    Of a request that is passed through, which is none of our own and asks for one choice.
    """
    tools = params.pop("tools", None)
    asks = params.pop("stream_options", None)
    params.pop("stream", None)
    params["model"] = model
    params["messages"] = messages
    if tools:
        params["tools"] = tools
    if stream:
        params["stream"] = True
        params["stream_options"] = {**mapping(asks), "include_usage": True}
    return params


# --- usage ----------------------------------------------------------------------------------------------------------


def estimated_tokens(text: str) -> int:
    """Tokens of a text where nobody counted them: 4 characters each, which holds for English."""
    return math.ceil(len(text) / 4)


def _given_tokens(given: Given) -> int:
    return sum(estimated_tokens(piece) if isinstance(piece, str) else len(piece) for piece in pieces(given))


def estimated_usage(call: Call, reply: Reply) -> Usage:
    """What a call has probably used, marked as an estimate."""
    if isinstance(call, Chat):
        # A message costs a few tokens beyond its text: its role and the marks around it.
        asked = sum(
            4 + estimated_tokens(m.text) + sum(estimated_tokens(c.name + c.arguments) for c in m.tool_calls)
            for m in call.messages
        )
        asked += sum(len(orjson.dumps(part)) // 4 for part in (call.schema, *call.tools) if part)
    elif isinstance(call, Completion):
        asked = _given_tokens(call.prompt if call.given is None else call.given)
    elif isinstance(call, Score):
        asked = estimated_tokens(call.context + call.continuation)
    else:
        asked = _given_tokens(call.texts if call.given is None else call.given)
    reasoning = estimated_tokens(reply.reasoning)
    said = "".join([reply.text, reply.refusal or "", *(c.name + c.arguments for c in reply.tool_calls)])
    return Usage(
        prompt_tokens=asked,
        completion_tokens=reasoning + estimated_tokens(said),
        reasoning_tokens=reasoning,
        estimated=True,
    )


def usage_of(body: object, call: Call, reply: Reply) -> Usage:
    """The usage that a body reports; what it leaves out is estimated, and the whole then marked so."""
    usage = _told(body, call)
    if usage is not None:
        return usage
    reported, guess = mapping(body), estimated_usage(call, reply)
    asked, said = _count(reported.get("prompt_tokens")), _count(reported.get("completion_tokens"))
    if said is None and isinstance(call, (Embed, Score)):
        said = 0
    asked = guess.prompt_tokens if asked is None else asked
    said = guess.completion_tokens if said is None else said
    return _usage(reported, asked, said, estimated=True)


def _told(body: object, call: Call) -> Usage | None:
    """The usage that a body reports, if it reports all of it."""
    reported = mapping(body)
    asked, said = _count(reported.get("prompt_tokens")), _count(reported.get("completion_tokens"))
    if said is None and isinstance(call, (Embed, Score)):
        said = 0
    return None if asked is None or said is None else _usage(reported, asked, said)


def _usage(reported: Mapping[str, Any], asked: int, said: int, *, estimated: bool = False) -> Usage:
    cached = _count(mapping(reported.get("prompt_tokens_details")).get("cached_tokens"))
    reasoning = _count(mapping(reported.get("completion_tokens_details")).get("reasoning_tokens"))
    return Usage(
        prompt_tokens=asked,
        completion_tokens=said,
        cached_tokens=cached or 0,
        reasoning_tokens=reasoning or 0,
        estimated=estimated,
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


# --- bodies and chunks to replies -----------------------------------------------------------------------------------


# One assembly a reply: `list[str]()` takes as long as ten of `list()`.
_texts = cast("Callable[[], list[str]]", list)


@dataclass(slots=True)
class _Fragments:
    id: str | None = None
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class Assembly:
    """A reply in the making: fed with chunks, or with one whole body, which is one big chunk."""

    finish: str | None = None
    model: str = ""
    usage: Mapping[str, Any] | None = None
    _text: list[str] = field(default_factory=_texts)
    _reasoning: list[str] = field(default_factory=_texts)
    _refusal: list[str] = field(default_factory=_texts)
    _logprobs: list[TokenLogprob] = field(default_factory=cast("Callable[[], list[TokenLogprob]]", list))
    _calls: dict[int, _Fragments] = field(default_factory=cast("Callable[[], dict[int, _Fragments]]", dict))

    def add(self, chunk: Mapping[str, Any]) -> Delta | None:
        """Take one chunk in (or one whole body); the delta that it brings, if it brings one.

        Raises ValueError where it has not the shape of one. An error inside it is for `embedded_error`, before.
        """
        # Once for every word of every stream: a type that is certain is asked for first, an abstract one only then.
        name = chunk.get("model")
        if name and isinstance(name, str):
            self.model = name
        usage = chunk.get("usage")
        if usage is not None and isinstance(usage, Mapping):
            self.usage = cast("Mapping[str, Any]", usage)
        choices: Any = chunk.get("choices")
        if not isinstance(choices, list) and (not isinstance(choices, Sequence) or isinstance(choices, str)):
            if "usage" in chunk or "object" in chunk:
                return None
            raise ValueError("it has no `choices`")
        for choice in cast("Sequence[object]", choices):
            if not isinstance(choice, (dict, Mapping)):
                raise ValueError("a choice is not an object")
            item = cast("Mapping[str, Any]", choice)
            if not item.get("index"):
                return self._choice(item)
        return None

    def hold(self, chunk: dict[str, Any]) -> None:
        """As `add`, where nobody is told of the delta: at a third of the cost, for what nearly every chunk is."""
        choices: Any = chunk.get("choices")
        kind: object = choices.__class__
        choice: Any = choices[0] if kind is list and len(choices) == 1 else None
        kind = choice.__class__
        said: Any = choice.get("delta") if kind is dict else None
        kind = said.__class__
        if kind is dict and said.keys() <= _PLAIN and not choice.get("index") and not choice.get("logprobs"):
            content: Any = said.get("content")
            if (content is None or isinstance(content, str)) and (said or not choice.get("message")):
                if (name := chunk.get("model")) and isinstance(name, str):
                    self.model = name
                usage: Any = chunk.get("usage")
                kind = usage.__class__
                if kind is dict:
                    self.usage = usage
                finish: Any = choice.get("finish_reason")
                if finish and isinstance(finish, str):
                    self.finish = finish
                if content:
                    self._text.append(content)
                return
        self.add(chunk)

    def _choice(self, choice: Mapping[str, Any]) -> Delta | None:
        finish = choice.get("finish_reason")
        if finish and isinstance(finish, str):
            self.finish = finish
        logprobs = choice.get("logprobs")
        if logprobs:
            self._logprobs += logprobs_of(logprobs)
        said: dict[str, Any] | None = choice.get("delta")
        if isinstance(said, dict) and said.keys() <= _PLAIN:
            content: object = said.get("content")
            if not content:
                if said or not choice.get("message"):
                    return None
            elif isinstance(content, str):
                self._text.append(content)
                return Delta(text=content)
        fragments: tuple[ToolCallDelta, ...] = ()
        if "delta" in choice or "message" in choice:
            parts = mapping(said or choice.get("message"))
            text, thought = _text_and_thought(parts.get("content"))
            thought += _string(parts.get("reasoning_content")) or _string(parts.get("reasoning"))
            if refusal := _string(parts.get("refusal")):
                self._refusal.append(refusal)
            if calls := parts.get("tool_calls"):
                fragments = tuple(self._fragments(calls))
        else:
            text, thought = _string(choice.get("text")), ""
        if text:
            self._text.append(text)
        if thought:
            self._reasoning.append(thought)
        return Delta(text=text, reasoning=thought, tool_calls=fragments) if text or thought or fragments else None

    def _fragments(self, calls: object) -> Iterable[ToolCallDelta]:
        for place, item in enumerate(cast("Sequence[object]", calls) if isinstance(calls, Sequence) else ()):
            fragment = mapping(item)
            function = mapping(fragment.get("function"))
            identity = _string(fragment.get("id")) or None
            index = _count(fragment.get("index"))
            if index is None:
                index = self._index(identity, place)
            known = self._calls.setdefault(index, _Fragments())
            name = _string(function.get("name")) if not known.name else ""
            given = function.get("arguments")
            # Some servers hand the arguments over as an object instead of as JSON text.
            arguments = given if isinstance(given, str) else orjson.dumps(given).decode() if given else ""
            fresh = identity if known.id is None else None
            known.id = known.id or identity
            known.name += name
            known.arguments.append(arguments)
            yield ToolCallDelta(index, fresh, name or None, arguments)

    def _index(self, identity: str | None, place: int) -> int:
        """Where a fragment without an index belongs: an id that is new begins a call, none continues the last."""
        for index, known in self._calls.items():
            if identity is not None and known.id == identity:
                return index
        if identity is None and self._calls:
            return max(self._calls)
        return max(self._calls, default=-1) + 1 if self._calls else place

    def told(self) -> Told | None:
        """What is told of the answer so far; None unless it has told all of its usage."""
        return None if self.usage is None else told(self.model, self.finish, bool(self._calls), self.usage)

    def reply(self, call: Call, *, upstream: str = "") -> Reply:
        """The reply so far, with its usage, and the name of who gave it."""
        calls = tuple(
            ToolCall(id=c.id or f"call_{index}", name=c.name, arguments="".join(c.arguments))
            for index, c in sorted(self._calls.items())
        )
        told = _told(self.usage, call)
        reply = Reply(
            text="".join(self._text),
            finish=self.finish or ("tool_calls" if calls else "stop"),
            usage=told or _NOTHING,
            tool_calls=calls,
            reasoning="".join(self._reasoning),
            refusal="".join(self._refusal) or None,
            logprobs=tuple(self._logprobs),
            model=self.model,
            upstream=upstream,
        )
        # To make a reply again takes as long as to read a body, so it is done only for an estimate, which reads it.
        return reply if told is not None else replace(reply, usage=usage_of(self.usage, call, reply))


def told_of(body: Mapping[str, Any]) -> Told | None:
    """What is told of a whole body that is an answer of text, or of calls of tools, with its usage.

    None where one has to look closer (`reply_of`): at a body that may be none, or does not say what it has used.
    """
    choices: Any = body.get("choices")
    usage: Any = body.get("usage")
    kinds: tuple[object, object] = choices.__class__, usage.__class__
    if kinds != (list, dict) or not choices:
        return None
    choice: Any = choices[0]
    kind: object = choice.__class__
    if kind is not dict or choice.get("index") or choice.get("logprobs") or "delta" in choice:
        return None
    said: Any = choice.get("message")
    kind = said.__class__
    if kind is not dict:
        return None
    calls: Any = said.get("tool_calls")
    kind = calls.__class__
    if calls and kind is not list:
        return None
    return told(body.get("model"), choice.get("finish_reason"), bool(calls), usage)


def told(model: object, finish: object, calls: bool, usage: Mapping[str, Any]) -> Told | None:
    """The same, of a model, a finish reason, whether tools are called, and a usage; None unless that is whole."""
    asked, said = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(asked) is not int or type(said) is not int or asked < 0 or said < 0:
        return None
    cached = reasoning = 0
    if "prompt_tokens_details" in usage:
        cached = _count(mapping(usage["prompt_tokens_details"]).get("cached_tokens")) or 0
    if "completion_tokens_details" in usage:
        reasoning = _count(mapping(usage["completion_tokens_details"]).get("reasoning_tokens")) or 0
    if not (finish and isinstance(finish, str)):
        finish = "tool_calls" if calls else "stop"
    return Told(model if isinstance(model, str) else "", finish, asked, said, cached, reasoning)


_PLAIN = frozenset({"content", "role"})
"""What nearly every chunk has of its delta, and no more."""
_NOTHING = Usage()


def reply_of(body: Mapping[str, Any], call: Chat | Completion | Embed, *, upstream: str = "") -> Reply:
    """The reply of a whole body; `upstream` is who gave it. Raises ValueError where it has not the shape of one."""
    if isinstance(call, Embed):
        return _embedded(body, call, upstream)
    first_choice(body)
    assembly = Assembly()
    assembly.add(body)
    return assembly.reply(call, upstream=upstream)


def first_choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first choice of a whole body. Raises ValueError where there is none."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError("it has no `choices`")
    return mapping(cast("list[object]", choices)[0])


def _embedded(body: Mapping[str, Any], call: Embed, upstream: str) -> Reply:
    size = call.size
    vectors: list[tuple[float, ...] | None] = [None] * size
    for place, entry in enumerate(_vectors(body, size)):
        index = _count(entry.get("index"))
        try:
            vectors[place if index is None else index] = _vector(entry.get("embedding"))
        except IndexError as error:
            raise ValueError("an embedding is out of place") from error
    if any(vector is None for vector in vectors):
        raise ValueError("it has two embeddings for one text")
    found = tuple(v for v in vectors if v is not None)
    return _of_vectors(body, call, found, upstream)


def unread(body: Mapping[str, Any], call: Embed, *, upstream: str = "") -> Reply:
    """The reply of a body of embeddings that is passed on as it came: its vectors, which may be millions of numbers,
    are counted and not read. Raises ValueError where there are not as many as there should be.
    """
    _vectors(body, call.size)
    return _of_vectors(body, call, (), upstream)


def _vectors(body: Mapping[str, Any], size: int) -> Sequence[Mapping[str, Any]]:
    data = body.get("data")
    if not isinstance(data, Sequence) or len(cast("Sequence[object]", data)) != size:
        raise ValueError(f"it does not hold one embedding for each of the {size} texts")
    return [mapping(item) for item in cast("Sequence[object]", data)]


def _vector(given: object) -> tuple[float, ...]:
    """A vector, as numbers or as base64 of their 32 bits each, the lowest byte first."""
    if isinstance(given, str):
        try:
            numbers = array("f", base64.b64decode(given, validate=True))
        except ValueError as error:
            raise ValueError("an embedding is text, and no base64 of numbers") from error
        if sys.byteorder == "big":
            numbers.byteswap()
        return tuple(numbers)
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError("an embedding is not a list of numbers")
    try:
        return tuple(float(cast("Any", x)) for x in cast("Sequence[object]", given))
    except (TypeError, ValueError) as error:
        raise ValueError("an embedding is not a list of numbers") from error


def _of_vectors(body: Mapping[str, Any], call: Embed, found: tuple[tuple[float, ...], ...], upstream: str) -> Reply:
    reply = Reply(embeddings=found, model=_string(body.get("model")), upstream=upstream)
    return replace(reply, usage=usage_of(body.get("usage"), call, reply))


def logprobs_of(value: object) -> list[TokenLogprob]:
    """The log-probabilities of a choice, in the chat shape (`content`) or the legacy one (`token_logprobs`).

    A token without one (the first of an echoed prompt) is left out.
    """
    shape = mapping(value)
    out: list[TokenLogprob] = []
    content = shape.get("content")
    if isinstance(content, Sequence):
        for item in cast("Sequence[object]", content):
            entry = mapping(item)
            if (number := finite(entry.get("logprob"))) is not None:
                others = [mapping(other) for other in cast("Sequence[object]", entry.get("top_logprobs") or ())]
                pairs = ((_string(other.get("token")), other.get("logprob")) for other in others)
                out.append(TokenLogprob(_string(entry.get("token")), number, _top(pairs)))
        return out
    tokens = cast("Sequence[object]", shape.get("tokens") or ())
    values = cast("Sequence[object]", shape.get("token_logprobs") or ())
    tops = cast("Sequence[object]", shape.get("top_logprobs") or ())
    for i, token in enumerate(tokens):
        if (number := finite(values[i] if i < len(values) else None)) is not None:
            top = mapping(tops[i] if i < len(tops) else None)
            out.append(TokenLogprob(_string(token), number, _top(top.items())))
    return out


def _top(pairs: Iterable[tuple[str, object]]) -> tuple[tuple[str, float], ...]:
    return tuple((token, number) for token, value in pairs if (number := finite(value)) is not None)


def finite(value: object) -> float | None:
    """The value as a float if it is a number that JSON can carry."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _text_and_thought(content: object) -> tuple[str, str]:
    """Text and reasoning of a content that is a text or a list of parts (as Mistral's `thinking` parts)."""
    if isinstance(content, str):
        return content, ""
    if content is None:
        return "", ""
    texts: list[str] = []
    thoughts: list[str] = []
    for item in cast("Sequence[object]", content) if isinstance(content, Sequence) else ():
        part = mapping(item)
        if part.get("type") == "thinking":
            thought = part.get("thinking")
            thoughts.append(thought if isinstance(thought, str) else _text_and_thought(thought)[0])
        else:
            texts.append(_string(part.get("text")))
    return "".join(texts), "".join(thoughts)


_EMPTY: Mapping[str, Any] = MappingProxyType({})


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def mapping(value: object) -> Mapping[str, Any]:
    """The value where it is a JSON object; an empty one for anything else."""
    if value is None:
        return _EMPTY
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


# --- refusals to errors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an upstream says in place of an answer."""

    status: int
    message: str = ""
    code: str | None = None
    param: str | None = None
    kind: str | None = None
    """`type` of the error envelope."""
    retry_after: float | None = None


_KINDS = {
    "rate_limit": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "exceed_context_size_error": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "overloaded_error": 503,
    "unavailable_error": 503,
    "server_error": 500,
    "api_error": 500,
    "timeout": 408,
}


def refusal_of(status: int, body: object, headers: Mapping[str, str], now: float) -> Refusal:
    """Read an error reply: the body as far as it is one, and when a retry is worth it.

    `headers` must not care for case; `now` in Unix seconds is for a `retry-after` that is a date.
    """
    envelope = mapping(body)
    error = envelope.get("error", envelope.get("detail", envelope))
    if isinstance(error, str):
        error = {"message": error}
    inner = mapping(error)
    code = inner.get("code")
    return Refusal(
        status=status,
        message=_string(inner.get("message")) or _string(envelope.get("message")),
        code=code if isinstance(code, str) and code else None,
        param=_string(inner.get("param")) or None,
        kind=_string(inner.get("type")) or None,
        retry_after=retry_after_of(headers, now),
    )


def embedded_error(body: Mapping[str, Any]) -> Refusal | None:
    """The error that hides in a 200 or in a stream, if there is one; its status is read out of it, else 502."""
    if not body.get("error"):
        return None
    refusal = refusal_of(502, body, {}, 0.0)
    error = mapping(body["error"])
    for name in ("code", "status", "status_code"):
        value = error.get(name)
        number = int(value) if isinstance(value, str) and value.isdigit() else value
        if isinstance(number, int) and not isinstance(number, bool) and 400 <= number <= 599:
            return replace(refusal, status=number)
    for word in (refusal.code, refusal.kind):
        if word in _KINDS:
            return replace(refusal, status=_KINDS[word])
    return refusal


def retry_after_of(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by `retry-after-ms`, else by `retry-after` (RFC 9110, 10.2.3: seconds or a date)."""
    try:
        if (given := headers.get("retry-after-ms")) is not None:
            return _wait(float(given) / 1000)
        if (given := headers.get("retry-after")) is None:
            return None
        with_point = re.fullmatch(r"\s*\d+(\.\d+)?\s*", given)
        return _wait(float(given) if with_point else parsedate_to_datetime(given).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return None


def _wait(seconds: float) -> float | None:
    return max(0.0, seconds) if math.isfinite(seconds) else None


def error_of(
    refusal: Refusal, *, who: str, key_setting: str, model: str, where: str = "", secrets: Sequence[str] = ()
) -> UpstreamError:
    """The error to raise. `who` begins its message (`upstream "fast"`); `key_setting` names where our key is set.

    The body of a 401 or 403 is never shown, as providers quote the key in it; `secrets` are struck out of the others.
    """
    said = scrubbed(refusal.message, secrets)[:MESSAGE_LIMIT].strip()
    said = f": {said}" if said else ""
    status, code, wait = refusal.status, refusal.code, refusal.retry_after
    if status in (401, 403):
        return UpstreamAuth(f"{who} refuses our key (HTTP {status}): look at {key_setting}")
    if status == 404:
        message = f"{who} knows no model {model!r}, or has not the route{where} (HTTP 404){said}"
        return _final(UpstreamError(message, code="upstream_model_not_found"))
    if status == 408:
        return UpstreamTimeout(f"{who} gave up waiting (HTTP 408){said}", retry_after=wait)
    if status == 429 and "insufficient_quota" in (code, refusal.kind):
        return _final(UpstreamError(f"{who} has no quota left{said}", code="insufficient_quota"))
    if status == 429:
        return UpstreamRateLimited(f"{who} is asked too often (HTTP 429){said}", retry_after=wait)
    if refusal.kind == "exceed_context_size_error":
        # llama.cpp's word for what clients know by OpenAI's.
        code = "context_length_exceeded"
    if 400 <= status < 500:
        return UpstreamRejected(f"{who} rejects the request (HTTP {status}){said}", param=refusal.param, code=code)
    if status == 501:
        return _final(UpstreamError(f"{who} does not do that (HTTP 501){said}", code="upstream_not_implemented"))
    if status == 504:
        return UpstreamTimeout(f"{who} timed out behind its gateway (HTTP 504){said}", retry_after=wait)
    if 500 <= status < 600:
        return UpstreamUnavailable(f"{who} is unavailable (HTTP {status}){said}", retry_after=wait)
    return UpstreamBroken(f"{who} answered HTTP {status}, which is no answer{said}")


def _final(error: UpstreamError) -> UpstreamError:
    """Mark as not worth a retry what asking again cannot change, though its status alone would invite one."""
    error.retry = False
    return error


_KEYS = re.compile(r"\b(?:sk|pk|rk|gsk|xai|hf|key)[-_][A-Za-z0-9_\-*.]{8,}|(?i:bearer)\s+[A-Za-z0-9_\-.=+/]{8,}")


def scrubbed(text: str, secrets: Sequence[str] = ()) -> str:
    """The text with every secret, and whatever looks like a key, struck out."""
    for secret in sorted(secrets, key=len, reverse=True):
        if secret:
            text = text.replace(secret, "[key]")
    return _KEYS.sub("[key]", text)
