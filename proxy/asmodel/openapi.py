"""`GET /openapi.json`: what the server does, by OpenAPI 3.1.

Requests are described by the types that read them, errors by the classes that are raised, headers by the tables of
docs/openai.md. What answers look like is written here, and tests hold every answer of a server against it. A route is
described by one `Operation` in `OPERATIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from asmodel import reference
from asmodel.completions import CompletionRequest, EmbeddingRequest
from asmodel.response_wire import ResponseRequest
from asmodel.responses import LISTED, MOST_LISTED
from asmodel.wire import NAME, ChatRequest

Json: TypeAlias = dict[str, Any]

_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path: what it reads, what it answers, and which errors it may end in beside what all may."""

    method: str
    path: str
    answer: str
    """The name of a schema in `ANSWERS`."""
    reads: type[BaseModel] | None = None
    event: str | None = None
    """That of the events of a stream, where it streams."""
    text: bool = False
    """Whether the answer is text and no JSON."""
    open: bool = False
    """Whether it is answered to those who have no key."""
    errors: frozenset[int] = frozenset()
    done: bool = True
    """Whether a stream that went well ends in `[DONE]`."""
    query: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """What may be asked in the address, by name."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


_ASKING = frozenset((400, 404, 408, 409, 413, 422, 429, 502, 503, 504))
_ALL = frozenset((500, 503))
"""Of every route: asmodel itself has failed, or has more requests than it may hold."""

OPERATIONS: Sequence[Operation] = (
    Operation(
        method="POST",
        path="/v1/chat/completions",
        reads=ChatRequest,
        answer="ChatAnswer",
        event="ChatEvent",
        errors=_ASKING,
    ),
    Operation(
        method="POST",
        path="/v1/completions",
        reads=CompletionRequest,
        answer="TextAnswer",
        event="TextEvent",
        errors=_ASKING,
    ),
    Operation(method="POST", path="/v1/embeddings", reads=EmbeddingRequest, answer="EmbeddingAnswer", errors=_ASKING),
    Operation(
        method="POST",
        path="/v1/responses",
        reads=ResponseRequest,
        answer="Response",
        event="ResponseEvent",
        done=False,
        errors=_ASKING,
    ),
    Operation(
        method="GET",
        path="/v1/responses/{id}",
        answer="Response",
        errors=frozenset((400, 404)),
        query={"stream": {"const": "false"}},
    ),
    Operation(method="DELETE", path="/v1/responses/{id}", answer="DeletedResponse", errors=frozenset((404,))),
    Operation(
        method="GET",
        path="/v1/responses/{id}/input_items",
        answer="ItemList",
        errors=frozenset((400, 404, 413)),
        query={
            "order": {"enum": ["asc", "desc"], "default": "desc"},
            "limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": LISTED},
            "after": {"type": "string"},
        },
    ),
    Operation(method="GET", path="/v1/models", answer="ModelList"),
    Operation(method="GET", path="/v1/models/{id}", answer="Model", errors=frozenset((404,))),
    Operation(method="GET", path="/healthz", answer="Status", open=True),
    Operation(method="GET", path="/readyz", answer="Status", open=True),
    Operation(method="GET", path="/metrics", answer="Metrics", text=True),
    Operation(method="GET", path="/openapi.json", answer="Contract"),
)


def _null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Json, *optional: str) -> Json:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _ref(name: str) -> Json:
    return {"$ref": _REF.format(model=name)}


_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_NUMBER: Json = {"type": "number"}
_ANY: Json = {}
_HEAD: Json = {"id": _TEXT, "created": _COUNT, "model": _TEXT}
_FINISH: Json = _null(_TEXT)
_CALL = _object({"id": _TEXT, "type": {"const": "function"}, "function": _object({"name": _TEXT, "arguments": _TEXT})})

ANSWERS: Mapping[str, Json] = {
    "Error": _object(
        {
            "error": _object({"message": _TEXT, "type": _TEXT, "param": _null(_TEXT), "code": _null(_TEXT)}),
            "asmodel": _null(_ref("Receipt")),
        },
        "asmodel",
    ),
    "Receipt": _object(
        {
            "request_id": _TEXT,
            "trace_id": _null(_TEXT),
            "run_id": _TEXT,
            "program": _TEXT,
            "program_digest": _TEXT,
            "steps": _COUNT,
            "cache_hits": _COUNT,
            "joined": _COUNT,
            "upstream_calls": _COUNT,
            "cost": _null(_NUMBER),
            "saved": _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT}),
            "usage_estimated": {"type": "boolean"},
            "seconds": _NUMBER,
            "overhead_ms": _NUMBER,
            "ignored": _list(_TEXT),
            "citations": {"type": "array"},
            "data": _ANY,
        },
        "citations",
        "data",
    ),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": {"type": "object"},
            "completion_tokens_details": {"type": "object"},
        }
    ),
    "PassedThrough": {
        "type": "object",
        "description": "An upstream's own, as it came; nothing is promised of it but what asmodel itself reads.",
        "not": {"required": ["asmodel", "usage", "object", "created"]},
    },
    "ChatCompletion": _object(
        {
            **_HEAD,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {
                                "role": {"const": "assistant"},
                                "content": _null(_TEXT),
                                "refusal": _null(_TEXT),
                                "annotations": {"type": "array"},
                                "reasoning_content": _TEXT,
                                "tool_calls": _list(_CALL),
                            },
                            "reasoning_content",
                            "tool_calls",
                        ),
                        "logprobs": _null({"type": "object"}),
                        "finish_reason": _TEXT,
                    }
                )
            ),
            "usage": _ref("Usage"),
            "asmodel": _ref("Receipt"),
        },
        "asmodel",
    ),
    "ChatAnswer": {"anyOf": [_ref("ChatCompletion"), _ref("PassedThrough")]},
    "ChatChunk": _object(
        {
            **_HEAD,
            "object": {"const": "chat.completion.chunk"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "delta": {"type": "object"},
                        "logprobs": _null({"type": "object"}),
                        "finish_reason": _FINISH,
                    }
                )
            ),
            "usage": _null(_ref("Usage")),
            "asmodel": _ref("Receipt"),
        },
        "usage",
        "asmodel",
    ),
    "ChatEvent": {"anyOf": [_ref("ChatChunk"), _ref("Error"), _ref("PassedThrough")]},
    "TextCompletion": _object(
        {
            **_HEAD,
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "text": _TEXT,
                        "logprobs": _null({"type": "object"}),
                        "finish_reason": _FINISH,
                    }
                )
            ),
            "usage": _null(_ref("Usage")),
        },
        "usage",
    ),
    "TextAnswer": {"anyOf": [_ref("TextCompletion"), _ref("PassedThrough")]},
    "TextEvent": {"anyOf": [_ref("TextCompletion"), _ref("Error"), _ref("PassedThrough")]},
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _COUNT,
                        "embedding": {"anyOf": [_list(_NUMBER), _TEXT]},
                    }
                )
            ),
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "EmbeddingAnswer": {"anyOf": [_ref("Embeddings"), _ref("PassedThrough")]},
    "Item": _object({"id": _TEXT, "type": _TEXT}),
    "Response": _object(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "completed_at": _null(_COUNT),
            "status": {"enum": ["in_progress", "completed", "incomplete", "failed"]},
            "error": _null(_object({"code": _TEXT, "message": _TEXT})),
            "incomplete_details": _null(_object({"reason": {"enum": ["max_output_tokens", "content_filter"]}})),
            "model": _TEXT,
            "previous_response_id": _null(_TEXT),
            "instructions": _null(_TEXT),
            "output": _list(_ref("Item")),
            "tools": {"type": "array"},
            "tool_choice": _ANY,
            "parallel_tool_calls": {"type": "boolean"},
            "text": {"type": "object"},
            "reasoning": {"type": "object"},
            "temperature": _NUMBER,
            "top_p": _NUMBER,
            "max_output_tokens": _null(_COUNT),
            "metadata": {"type": "object"},
            "store": {"type": "boolean"},
            "usage": _null(_ref("ResponseUsage")),
            "asmodel": _ref("Receipt"),
        },
        "asmodel",
    ),
    "ResponseUsage": _object(
        {
            "input_tokens": _COUNT,
            "input_tokens_details": {"type": "object"},
            "output_tokens": _COUNT,
            "output_tokens_details": {"type": "object"},
            "total_tokens": _COUNT,
        }
    ),
    "ResponseEvent": _object(
        {"type": _TEXT, "sequence_number": _COUNT, "response": _ref("Response"), "item": _ref("Item")},
        "response",
        "item",
    ),
    "DeletedResponse": _object({"id": _TEXT, "object": {"const": "response"}, "deleted": {"const": True}}),
    "ItemList": _object(
        {
            "object": {"const": "list"},
            "data": _list(_ref("Item")),
            "first_id": _null(_TEXT),
            "last_id": _null(_TEXT),
            "has_more": {"type": "boolean"},
        }
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": {"enum": ["asmodel", "upstream"]},
            "asmodel": {
                "oneOf": [
                    _object(
                        {
                            "kind": {"const": "program"},
                            "program": _TEXT,
                            "description": _TEXT,
                            "digest": _TEXT,
                            "supports": _list(_TEXT),
                            "params": _null({"type": "object"}),
                        }
                    ),
                    _object({"kind": {"const": "upstream"}, "upstream_kind": _TEXT, "description": _TEXT}),
                ]
            },
        }
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Status": _object({"status": {"enum": ["ok", "ready", "loading", "draining"]}}),
    "Metrics": _TEXT,
    "Contract": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
}
"""What answers look like. More fields than are named here may come with time."""


def document(
    *,
    version: str,
    keys: bool = False,
    metrics_keys: bool = False,
    names: Sequence[str] = (),
    messages: int | None = None,
    n: int | None = None,
    operations: Sequence[Operation] = OPERATIONS,
) -> Json:
    """The whole document. `keys` says whether a key is wanted, `names` which models there are."""
    reading = {operation.reads for operation in operations if operation.reads is not None}
    _, made = models_json_schema(
        sorted(((kind, "validation") for kind in reading), key=lambda pair: pair[0].__name__), ref_template=_REF
    )
    schemas: Json = dict(made["$defs"])
    for kind in reading:
        _bounded(schemas[kind.__name__]["properties"], names=names, messages=messages, n=n)
    paths: Json = {}
    for operation in operations:
        keyed = metrics_keys if operation.text else keys and not operation.open
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, keyed=keyed)
    components: Json = {"schemas": schemas | dict(ANSWERS)}
    if keys or metrics_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "asmodel",
            "version": version,
            "description": "OpenAI's API, in which the name of a model may stand for a program.",
        },
        "paths": paths,
        "components": components,
    }


def _bounded(properties: Json, *, names: Sequence[str], messages: int | None, n: int | None) -> None:
    """What the settings say beyond what the types do."""
    if names:
        properties["model"]["examples"] = list(names)
    for name, keyword, bound in (
        ("n", "maximum", n),
        ("messages", "maxItems", messages),
        ("prompt", "maxItems", messages),
        ("input", "maxItems", messages),
    ):
        if bound is None or name not in properties:
            continue
        for branch in properties[name].get("anyOf", (properties[name],)):
            # A list of token numbers is one prompt.
            several = branch.get("type") == "array" and branch["items"].get("type") != "integer"
            if several or (keyword == "maximum" and branch.get("type") == "integer"):
                branch[keyword] = min(bound, branch.get(keyword, bound))


def _operation(operation: Operation, *, keyed: bool) -> Json:
    body: Json = {
        "operationId": "_".join(re.findall(r"[a-z0-9]+", operation.name.lower())),
        "summary": reference.ROUTES[operation.name],
        "parameters": _parameters(operation),
        "responses": _responses(operation, keyed=keyed),
    }
    if keyed:
        body["security"] = [{"key": []}]
    if operation.reads is not None:
        content = {"application/json": {"schema": _ref(operation.reads.__name__)}}
        body["requestBody"] = {"required": True, "content": content}
    return body


_SENT: Mapping[str, Json] = {
    "x-request-id": {"type": "string"},
    "traceparent": {"type": "string"},
    "tracestate": {"type": "string"},
    "x-asmodel-trace": {"type": "string"},
    "cache-control": {"type": "string", "examples": ["no-cache", "no-store", "only-if-cached", "max-age=60"]},
    "idempotency-key": {"type": "string", "minLength": 1, "maxLength": 255},
    "x-stainless-retry-count": {"type": "string"},
}
"""Headers of a request for a model; of the others each is looked for its id alone."""


def _parameters(operation: Operation) -> list[Json]:
    names = _SENT if operation.reads is not None else ("x-request-id",)
    found: list[Json] = [
        {
            "name": name,
            "in": "header",
            "required": False,
            "description": reference.REQUEST_HEADERS[name],
            "schema": _SENT[name],
        }
        for name in names
    ]
    found += [
        {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in operation.query.items()
    ]
    for name in re.findall(r"\{(\w+)\}", operation.path):
        schema = {"type": "string", "minLength": 1, "maxLength": NAME}
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    return found


_COUNTS = ("x-asmodel-steps", "x-asmodel-cache-hits", "x-asmodel-upstream-calls")


def _headers(*names: str) -> Json:
    def schema(name: str) -> Json:
        numbers = (*_COUNTS, "openai-processing-ms", "retry-after", "retry-after-ms")
        if name in numbers:
            return {"type": "integer", "minimum": 0}
        return {"type": "number"} if name == "x-asmodel-overhead-ms" else {"type": "string"}

    return {name: {"description": reference.RESPONSE_HEADERS[name], "schema": schema(name)} for name in names}


def _responses(operation: Operation, *, keyed: bool) -> Json:
    content: Json = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.text:
        content = {"text/plain": {"schema": _ref(operation.answer)}}
    headers: Json = {} if operation.text else _headers("x-request-id", "openai-processing-ms")
    if operation.reads is not None:
        headers |= _headers("x-asmodel-trace-id", *_COUNTS, "x-asmodel-overhead-ms")
    if operation.event is not None:
        told = f"Events whose data is JSON ({operation.event})"
        told += ", and a last one, `[DONE]`, where all went well." if operation.done else ", and whose names are types."
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": told},
            "x-event": _ref(operation.event),
        }
    found: Json = {"200": {"description": "the answer", "headers": headers, "content": content}}
    errors = {*operation.errors, *_ALL}
    if not operation.open:
        errors.add(401 if keyed else 403)
    why = _told()
    for status in sorted(errors):
        answer = "Status" if operation.open and status == 503 else "Error"
        refused: Json = {
            "description": why[status],
            "headers": _headers("x-request-id", "x-should-retry", "retry-after", "retry-after-ms"),
            "content": {"application/json": {"schema": _ref(answer)}},
        }
        if operation.open and status == 503:
            refused["content"] = {"application/json": {"schema": {"anyOf": [_ref("Status"), _ref("Error")]}}}
        found[str(status)] = refused
    return found


def _told() -> dict[int, str]:
    """What each status is for, with the codes that come with it."""
    told: dict[int, list[str]] = {}
    for status, code, _, _, when in reference.errors_told():
        told.setdefault(int(status), []).append(f"{code}: {when}")
    return {status: "; ".join(lines) for status, lines in told.items()}
