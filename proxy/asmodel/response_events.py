"""The shapes of OpenAI's Responses API, written: an answer becomes a response, whole or event by event. Pure.

Source: OpenAI's openapi.yaml, info.version 2.3.0 (2026-08): `Response`, `ResponseStreamEvent`, `OutputItem`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from asmodel import wire
from asmodel.calls import Delta, Reply, ToolCallDelta
from asmodel.errors import AsmodelError
from asmodel.programs import Answer
from asmodel.response_wire import ResponseRequest, item_id
from asmodel.wire import Json


def head(request: ResponseRequest, id: str, created: int, *, store: bool) -> Json:
    """A response that is being made: what was asked for, by the API's own defaults where nothing was said."""
    reasoning = request.reasoning
    text: Json = {"format": {"type": "text"}}
    if request.text is not None and request.text.format is not None:
        defaults = {"description": None, "strict": False} if request.text.format.get("type") == "json_schema" else {}
        text["format"] = {**defaults, **request.text.format}
    if request.text is not None and request.text.verbosity is not None:
        text["verbosity"] = request.text.verbosity
    nothing: Json = {"description": None, "parameters": None, "strict": None}
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": request.model,
        "previous_response_id": request.previous_response_id,
        "instructions": request.instructions,
        "output": [],
        "tools": [{**nothing, **tool.model_dump(mode="json", exclude_none=True)} for tool in request.tools or ()],
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "parallel_tool_calls": True if request.parallel_tool_calls is None else request.parallel_tool_calls,
        "max_tool_calls": request.max_tool_calls,
        "text": text,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": request.top_logprobs or 0,
        "max_output_tokens": request.max_output_tokens,
        "truncation": "disabled",
        "metadata": request.metadata or {},
        "store": store,
        "background": False,
        "service_tier": "default",
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
        "usage": None,
    }


def usage_of(tokens: Mapping[str, Any]) -> Json:
    """The usage of a chat completion in the words of a response."""
    return {
        "input_tokens": tokens["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": tokens["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": tokens["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": tokens["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": tokens["total_tokens"],
    }


_WHY = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is not whole, by its finish reason."""

_ENDS = {"completed": "response.completed", "incomplete": "response.incomplete", "failed": "response.failed"}


class Draft:
    """A response in the making: takes what a run says, and gives the events that tell of it, as bytes.

    `output` are the items so far; once `end` has been called, those of the whole response.
    """

    def __init__(self, head: Json) -> None:
        self.output: list[Json] = []
        self._head = head
        self._id: str = head["id"]
        self._number = 0
        self._reasoning: _Reasoning | None = None
        self._message: _Message | None = None
        self._calls: dict[int, _Call] = {}
        """Every call so far, by its index among those of the answer."""
        self._thought = self._spoke = False
        """Whether the model's own reasoning, and its answer, have begun."""

    # -- what it takes

    def begin(self) -> bytes:
        return self._event("response.created", response=self._head) + self._event(
            "response.in_progress", response=self._head
        )

    def line(self, line: str) -> bytes:
        """A line of progress: into the summary of a reasoning item. Once the answer has begun, none is told."""
        if self._spoke:
            return b""
        events, item = self._thinking()
        if item.summary is None:
            item.summary = []
            part = {"type": "summary_text", "text": ""}
            events += self._event("response.reasoning_summary_part.added", item, summary_index=0, part=part)
        item.summary.append(line + "\n")
        return events + self._event(
            "response.reasoning_summary_text.delta", item, summary_index=0, delta=item.summary[-1]
        )

    def add(self, delta: Delta) -> bytes:
        events = b""
        if delta.reasoning:
            events += self._think(delta.reasoning)
        if delta.text:
            events += self._say(delta.text)
        for call in delta.tool_calls:
            events += self._call(call)
        return events

    def end(self, answer: Answer, reply: Reply | None) -> bytes:
        """What of the answer has not been said yet, and the ends of all items."""
        events = b""
        if reply is not None and reply.reasoning and not self._thought:
            events += self._think(reply.reasoning)
        refusal = None if reply is None else reply.refusal
        said = any(item["type"] == "message" for item in self.output)
        if answer.text and not said:
            events += self._say(answer.text)
        if refusal is not None:
            events += self._refuse(refusal)
        if answer.tool_calls and not self._calls:
            for place, call in enumerate(answer.tool_calls):
                events += self._call(ToolCallDelta(index=place, id=call.id, name=call.name, arguments=call.arguments))
        if not self._calls and not said and not answer.text and refusal is None:
            events += self._say("")
        status = "incomplete" if answer.finish in _WHY else "completed"
        logprobs = (wire.logprobs(reply) or {}).get("content", [])
        events += self._end_reasoning() + self._end_message(status, logprobs)
        for open_call in self._calls.values():
            events += self._end_call(open_call, status)
        return events

    def response(self, answer: Answer, usage: Json, *, at: int, receipt: Json | None) -> Json:
        """The whole response, of an answer that has been told to its end."""
        why = _WHY.get(answer.finish)
        body = {**self._head, "status": "completed" if why is None else "incomplete", "output": self.output}
        body["usage"] = usage
        if why is None:
            body["completed_at"] = at
        else:
            body["incomplete_details"] = {"reason": why}
        if receipt is not None:
            body["asmodel"] = receipt
        return body

    def closing(self, response: Json) -> bytes:
        """The last event of a response."""
        return self._event(_ENDS[response["status"]], response=response)

    def failed(self, error: AsmodelError, receipt: Json | None) -> bytes:
        """The end of a response that has no answer.

        Two events: those who look at each see the response fail, with one of the few codes that the API has for that;
        and those who do not have it raised by their SDK, which does so where there is an `error`.
        """
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        if error.status < 500 and error.status != 429:
            code = "invalid_prompt"
        for item in self.output:
            if item.get("status") == "in_progress":
                item["status"] = "incomplete"
        for open_item in (self._reasoning, self._message, *self._calls.values()):
            if open_item is not None:
                open_item.settle()
        body = {**self._head, "status": "failed", "output": self.output}
        body["error"] = {"code": code, "message": error.message}
        if receipt is not None:
            body["asmodel"] = receipt
        envelope = wire.error_body(error)
        told: Json = {"code": error.code, "message": error.message, "param": error.param, **envelope}
        return self._event("response.failed", response=body) + self._event("error", **told)

    # -- items

    def _think(self, text: str) -> bytes:
        self._thought = True
        events = self._end_message("completed", [])
        begun, item = self._thinking()
        events += begun
        if item.content is None:
            item.content = []
            part = {"type": "reasoning_text", "text": ""}
            events += self._event("response.content_part.added", item, content_index=0, part=part)
        item.content.append(text)
        return events + self._event("response.reasoning_text.delta", item, content_index=0, delta=text)

    def _thinking(self) -> tuple[bytes, _Reasoning]:
        if self._reasoning is not None:
            return b"", self._reasoning
        item = self._reasoning = _Reasoning(*self._added("reasoning", summary=[]))
        return self._event("response.output_item.added", item, item=item.body), item

    def _end_reasoning(self) -> bytes:
        item, self._reasoning = self._reasoning, None
        if item is None:
            return b""
        item.settle()
        events = b""
        if item.summary is not None:
            part = item.body["summary"][0]
            events += self._event("response.reasoning_summary_text.done", item, summary_index=0, text=part["text"])
            events += self._event("response.reasoning_summary_part.done", item, summary_index=0, part=part)
        if item.content is not None:
            part = item.body["content"][0]
            events += self._event("response.reasoning_text.done", item, content_index=0, text=part["text"])
            events += self._event("response.content_part.done", item, content_index=0, part=part)
        return events + self._done(item, "completed")

    def _say(self, text: str) -> bytes:
        events, item = self._speaking()
        if item.text is None:
            item.text = []
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events += self._event("response.content_part.added", item, content_index=0, part=part)
        item.text.append(text)
        if not text:
            return events
        return events + self._event("response.output_text.delta", item, content_index=0, delta=text, logprobs=[])

    def _refuse(self, refusal: str) -> bytes:
        events, item = self._speaking()
        item.refusal = refusal
        index = 0 if item.text is None else 1
        part = {"type": "refusal", "refusal": ""}
        events += self._event("response.content_part.added", item, content_index=index, part=part)
        return events + self._event("response.refusal.delta", item, content_index=index, delta=refusal)

    def _speaking(self) -> tuple[bytes, _Message]:
        self._spoke = True
        events = self._end_reasoning()
        if self._message is None:
            self._message = _Message(*self._added("message", role="assistant", content=[]))
            events += self._event("response.output_item.added", self._message, item=self._message.body)
        return events, self._message

    def _end_message(self, status: str, logprobs: list[Json]) -> bytes:
        item, self._message = self._message, None
        if item is None:
            return b""
        item.logprobs = logprobs
        item.settle()
        events = b""
        for index, part in enumerate(item.body["content"]):
            if part["type"] == "refusal":
                events += self._event("response.refusal.done", item, content_index=index, refusal=part["refusal"])
            else:
                events += self._event(
                    "response.output_text.done", item, content_index=index, text=part["text"], logprobs=logprobs
                )
            events += self._event("response.content_part.done", item, content_index=index, part=part)
        return events + self._done(item, status)

    def _call(self, delta: ToolCallDelta) -> bytes:
        self._spoke = True
        call = self._calls.get(delta.index)
        events = b""
        if call is None:
            events += self._end_reasoning() + self._end_message("completed", [])
            place = len(self.output)
            fields: Json = {"call_id": delta.id or f"call_{self._id[5:]}{place:02d}", "name": delta.name or ""}
            call = self._calls[delta.index] = _Call(*self._added("function_call", **fields, arguments=""))
            events += self._event("response.output_item.added", call, item=call.body)
        if delta.arguments:
            call.arguments.append(delta.arguments)
            events += self._event("response.function_call_arguments.delta", call, delta=delta.arguments)
        return events

    def _end_call(self, call: _Call, status: str) -> bytes:
        call.settle()
        arguments, name = call.body["arguments"], call.body["name"]
        events = self._event("response.function_call_arguments.done", call, arguments=arguments, name=name)
        return events + self._done(call, status)

    def _added(self, kind: str, **fields: Any) -> tuple[int, Json]:
        place = len(self.output)
        item: Json = {"id": item_id(self._id, kind, place), "type": kind, "status": "in_progress", **fields}
        self.output.append(item)
        return place, item

    def _done(self, item: _Item, status: str) -> bytes:
        item.body["status"] = status
        return self._event("response.output_item.done", item, item=item.body)

    def _event(self, kind: str, of: _Item | None = None, /, **fields: Any) -> bytes:
        body: Json = {"type": kind, "sequence_number": self._number}
        self._number += 1
        if of is not None:
            body["output_index"] = of.place
            if "item" not in fields:
                body["item_id"] = of.body["id"]
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(body | fields))


class _Item:
    """An item, and what of it is still to be put together."""

    __slots__ = ("body", "place")

    def __init__(self, place: int, body: Json) -> None:
        self.place = place
        self.body = body

    def settle(self) -> None:
        """Write into the item what has come for it."""


class _Reasoning(_Item):
    __slots__ = ("content", "summary")

    def __init__(self, place: int, body: Json) -> None:
        super().__init__(place, body)
        self.summary: list[str] | None = None
        self.content: list[str] | None = None

    def settle(self) -> None:
        if self.summary is not None:
            self.body["summary"] = [{"type": "summary_text", "text": "".join(self.summary)}]
        if self.content is not None:
            self.body["content"] = [{"type": "reasoning_text", "text": "".join(self.content)}]


class _Message(_Item):
    __slots__ = ("logprobs", "refusal", "text")

    def __init__(self, place: int, body: Json) -> None:
        super().__init__(place, body)
        self.text: list[str] | None = None
        self.refusal: str | None = None
        self.logprobs: list[Json] = []

    def settle(self) -> None:
        content: list[Json] = []
        if self.text is not None:
            text: Json = {"type": "output_text", "text": "".join(self.text), "annotations": []}
            content.append({**text, "logprobs": self.logprobs})
        if self.refusal is not None:
            content.append({"type": "refusal", "refusal": self.refusal})
        self.body["content"] = content


class _Call(_Item):
    __slots__ = ("arguments",)

    def __init__(self, place: int, body: Json) -> None:
        super().__init__(place, body)
        self.arguments: list[str] = []

    def settle(self) -> None:
        self.body["arguments"] = "".join(self.arguments)
