"""The page `docs/openai.md`, made of the code that does what it says: `python -m asmodel.reference > docs/openai.md`.

What can be read off the code is; the words for what cannot are kept here, and tests hold them against the server.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel

from asmodel import (
    access,
    admission,
    chat,
    completions,
    connections,
    effects,
    errors,
    exchange,
    passing,
    response_store,
    response_wire,
    responses,
    routes,
    wire,
)
from asmodel.errors import AsmodelError
from asmodel.settings import IdempotencySettings, LimitsSettings, StoreSettings

ROUTES: Mapping[str, str] = {
    "POST /v1/chat/completions": "an answer, whole or as a stream; of programs and of passed-through upstreams",
    "POST /v1/responses": "an answer in the shape of a response, whole or as events: see below",
    "GET /v1/responses/{id}": "a response that is kept; 404 where there is none, or none of this caller's",
    "DELETE /v1/responses/{id}": "and it is not kept any more",
    "GET /v1/responses/{id}/input_items": "what it was asked, with what went before it: `order` (`desc`, or `asc`), "
    f"`limit` (1 to {responses.MOST_LISTED}, else {responses.LISTED}), `after`",
    "POST /v1/completions": "raw text continued, whole or as a stream; of upstreams alone",
    "POST /v1/embeddings": "vectors of texts; of upstreams alone",
    "GET /v1/models": "programs, presets and upstreams; under `asmodel` what each is and, of a program, its "
    "description, "
    "the digest of its source, what it supports, and the JSON schema of its parameters",
    "GET /v1/models/{id}": "one of them, a composition (`PROGRAM:REST`) too; 404 with the nearest name",
    "GET /healthz": "200 as long as the process answers",
    "GET /readyz": "200 when it can answer; 503 while it is loading or draining",
    "GET /metrics": "Prometheus text: docs/metrics.md",
    "GET /": "a page to look at and to try things out: docs/front-page.md; without a browser, the routes as JSON",
    "GET /runs/{id}": "one of the last runs, on that page",
    "GET /front/{name}": "a part of that page: for the page alone, and as it needs it",
    "GET /front/runs/{id}": "the same",
    "GET /openapi.json": "all this for machines, by OpenAPI 3.1, as it is with the settings of this server",
}
"""Every route. What is not among them is a 404 in the error envelope; another method is a 405."""

OF_THE_PAGE = frozenset(("GET /", "GET /runs/{id}", "GET /front/{name}", "GET /front/runs/{id}"))
"""Those that are for people, and not in `/openapi.json`, which is for programs."""

REQUEST_HEADERS: Mapping[str, str] = {
    "authorization": "`Bearer KEY`, one of `[keys]`. Without keys it is not looked at.",
    "content-type": "must be `application/json`; anything else is a 400.",
    "host": "without keys it must name this machine, or the answer is a 403: a page elsewhere could lead here by "
    "a name of "
    "its own.",
    "origin": "without keys it must name this machine too, if it is there. CORS headers are never sent.",
    "x-request-id": "up to 128 printable characters, and comes back; else one is made.",
    "traceparent": "W3C trace context: the request's trace goes on from there.",
    "tracestate": "goes with it.",
    "x-asmodel-trace": "`on` has the request traced whatever the sampler says, for those who may: docs/tracing.md.",
    "x-stainless-retry-count": "sent by SDKs when they ask again by themselves: the same request then, not a repeat.",
    "cache-control": "`no-cache` buys anew and stores, `no-store` does neither, `only-if-cached` buys nothing "
    "(504 where "
    "something would be), `max-age=N` takes what is no older than N seconds. `asmodel.cache` in the body comes first.",
    "idempotency-key": "up to 255 characters: see below.",
}
"""Every header of a request that is looked at, in lower case."""

RESPONSE_HEADERS: Mapping[str, str] = {
    "content-type": "`application/json`, or `text/event-stream; charset=utf-8`.",
    "content-length": "of whatever is no stream.",
    "transfer-encoding": "`chunked`, of a stream.",
    "date": "when the response began.",
    "cache-control": "`no-cache`, of a stream.",
    "x-accel-buffering": "`no`, of a stream: nginx would hold chunks back.",
    "x-request-id": "names the request in the log; SDKs show it as `_request_id`.",
    "x-asmodel-trace-id": "names its trace: `asmodel trace ID`.",
    "x-asmodel-steps": "steps that were made, cached ones too; 0 for what is passed through.",
    "x-asmodel-cache-hits": "answers that were found in the cache.",
    "x-asmodel-upstream-calls": "attempts that went out to an upstream, failed ones too.",
    "openai-processing-ms": "milliseconds from the request to these headers.",
    "x-asmodel-overhead-ms": "how many of these no upstream was being waited for: what asmodel itself took.",
    "retry-after": "seconds, at most 60: longer waits make some SDKs give up, and others sleep.",
    "retry-after-ms": "the same in milliseconds.",
    "x-should-retry": "`true` or `false` where the status alone would mislead an SDK.",
    "www-authenticate": "`Bearer`, with a 401.",
    "allow": "with a 405.",
    "connection": "`close` where no further request can come over the connection.",
}
"""Every header of a response, in lower case."""

_OURS: Mapping[str, tuple[str, str]] = {
    "model": (
        "a program, a preset, or `PROGRAM:REST`, in which REST plays every role of PROGRAM",
        "an upstream, by its name in the settings; it is sent the name that it knows itself by",
    ),
    "messages": (
        "reach the program as they came: roles, names, parts, tool calls and their results",
        "as they were sent, fields without a name here too",
    ),
    "n": (
        "the program runs `n` times; sampled steps are drawn anew for each",
        "as it was sent; where the answer is translated or cached, `n` calls",
    ),
    "stream": ("honoured: see below", "honoured: see below"),
    "stream_options": (
        "`include_usage` is honoured; `include_obfuscation` and others have no meaning",
        "`include_usage` is honoured: every stream is asked for its usage, and the chunk that brings it is left "
        "out where "
        "it was not asked for; others as they were sent",
    ),
    "asmodel": ("see below", "`cache` and `limits`; taken off before the upstream is asked"),
    "documents": ("texts beside the conversation, for programs that read some", "as they were sent"),
}
"""What is done with the parameters that are neither passed on as they are, nor hints, nor shapes."""

_EXTENSION: Mapping[str, str] = {
    "params": "parameters of the program; which it takes, `GET /v1/models` says. Not for upstreams.",
    "roles": "who plays which role of the program, by name. Not for upstreams.",
    "cache": "`on`, `off` (neither read nor write), `refresh` (buy anew and write), `only` (buy nothing: 504 "
    "`not_cached`). By default as the settings say: programs on, upstreams off.",
    "progress": "whether a program's stream tells what it is at, as `reasoning_content`. By default as the "
    "settings say.",
    "limits": "bounds of this request, which can only be tighter than those of the settings:",
}

_LIMITS: Mapping[str, str] = {
    "calls": "attempts at upstreams",
    "tokens": "tokens bought, of prompts and answers together",
    "cost": "US dollars; a 400 where an upstream that would be asked has no price, for what is not known cannot "
    "be limited",
    "seconds": "from the start of the run",
}


_AS_ABOVE = ("as above", "as above")
_RESPONSE: Mapping[str, tuple[str, str]] = {
    "model": _AS_ABOVE,
    "input": (
        "text, or items: `message`, `function_call`, `function_call_output`, `reasoning`, and `item_reference` to an "
        "item that is kept; an item or a part of another type is refused",
        "the same",
    ),
    "instructions": ("a system message before all others; not carried over", "the same"),
    "previous_response_id": (
        "the conversation goes on from there; 404 `previous_response_not_found` where it is not kept, or is another's",
        "the same",
    ),
    "store": ("`false` keeps nothing", "the same; not sent"),
    "stream": ("honoured: see below", "honoured: see below"),
    "stream_options": ("has no meaning: nothing is obfuscated", "the same; not sent"),
    "max_output_tokens": ("a hint for the reply step", "sent as `max_completion_tokens`"),
    "temperature": ("a hint for the reply step", "as it was sent"),
    "top_p": ("a hint for the reply step", "as it was sent"),
    "top_logprobs": ("refused, unless it supports `logprobs` (but `0`)", "sent, with `logprobs`"),
    "text": (
        "`format` is refused, unless it supports `response_format` (but of type `text`); `verbosity` is a hint for the "
        "reply step",
        "sent as `response_format` and `verbosity`",
    ),
    "reasoning": (
        "`effort` is a hint for the reply step; `summary` has no meaning: what there is, is told; `context` and `mode` "
        "are ignored",
        "`effort` is sent as `reasoning_effort`; the others are not sent",
    ),
    "tools": (
        "refused, unless it supports `tools` (but `[]`); only tools of type `function`",
        "only tools of type `function`; sent as a chat completion's",
    ),
    "tool_choice": (
        "refused, unless it supports `tools` (but `none`, `auto`)",
        "text, `function` or `allowed_tools`; sent as a chat completion's",
    ),
    "parallel_tool_calls": ("refused, unless it supports `tools` (but `true`, `false`)", "as it was sent"),
    "max_tool_calls": ("has no meaning: it is about tools that the API runs itself", "the same; not sent"),
    "include": (
        "`message.output_text.logprobs` is refused, unless it supports `logprobs`; others are ignored, for there is "
        "nothing of the kind",
        "`message.output_text.logprobs` is sent as `logprobs`; others are not sent",
    ),
    "metadata": ("kept with the response", "the same; not sent"),
    "documents": _AS_ABOVE,
    "asmodel": _AS_ABOVE,
}
"""What is done with the parameters of a response, but for those that are refused or mean what they mean in a chat."""


def page() -> str:
    """The whole page, as Markdown."""
    limits, named, kept = LimitsSettings(), IdempotencySettings(), StoreSettings()
    return _wrapped(f"""\
# OpenAI's API, as asmodel speaks it

<!-- Made by `python -m asmodel.reference`; a test holds it against the code. -->

What a client of OpenAI's API may send, and what becomes of it. **Honoured**, **refused** (a 400 that names the
parameter), or **ignored** (and then listed in the receipt, under `asmodel.ignored`): nothing is dropped in silence.
The source is OpenAI's openapi.yaml, version 2.3.0.

## Routes

{_table(("route", "gives"), ((f"`{route}`", what) for route, what in ROUTES.items()))}

## Parameters of a chat completion

For a **program**, sampling hints go to its reply step (the one whose words are the answer); a program that has none
lists them as ignored. What changes the shape of the answer is refused unless the program supports it; values that ask
for nothing special are always welcome. A field that is not in this table is ignored.

An **upstream that is passed through** is sent every field as it came, `null` and unknown ones too, but those marked
here.

{_table(("parameter", "what it may be", "for a program", "passed through"), _parameters())}

Parts of a message may be of any type. For a program, {_parts()}; a part of another type is passed on to those steps
that show the conversation.

A body has at most {limits.body_bytes:,} bytes, {limits.messages:,} messages, `n` up to {limits.n} (`[limits]` of the
settings), {wire.OBJECTS:,} objects and lists, and is at most {wire.DEPTH} deep.

### `asmodel`

One object in the body for all that OpenAI's API has no word for (`extra_body={{"asmodel": {{…}}}}` in SDKs). A name
in it that does not exist is refused.

{_table(("field", "what it does"), _extension())}

## Completions of raw text, and embeddings

Of upstreams alone; the name of a program is a 400, and so is an upstream that has none, with the names of those that
do. An upstream that speaks OpenAI's API is sent the body as it came, fields that are not in these tables too, and its
own bytes come back. Where it speaks another format, or a cache is asked (`asmodel.cache`, `Cache-Control`; by default
none is), each choice of each prompt is a call of its own, kept by itself; all that is embedded by one request is one
call. What a list may hold at most is `[limits] messages`.

{_table(("`POST /v1/completions`", "what it may be"), _passed(completions.CompletionRequest))}

{_table(("`POST /v1/embeddings`", "what it may be"), _passed(completions.EmbeddingRequest))}

The embedded model does both. It does not take `echo`, `suffix`, `best_of`, nor `dimensions` other than its own; its
vectors are those of the last token of a model that was not made for it, good for a try.

## Answers

**Of a program**, a `chat.completion` as OpenAI's, with the receipt under `asmodel`: `request_id`, `trace_id`,
`run_id`, `program`, `program_digest`, `steps`, `cache_hits`, `joined`, `upstream_calls`, `cost` (US dollars; null
where a price is not known), `saved` (what the hits would have cost), `usage_estimated`, `seconds`, `overhead_ms`,
`ignored`, and `citations` and `data` where the program gives some. `usage` is what was bought for this request,
failed attempts included; of it, completion tokens that are not in the answer are `reasoning_tokens`.

**Passed through**, the upstream's own bytes, where it speaks OpenAI's API: its ids, its name for the model, fields
that nobody knows. Upstreams of other kinds are translated, and so is what comes out of the cache. The receipt is in
the headers alone.

**In a shape** (`response_format`): a program's answer is held until it is whole, held against the schema, and asked
for once more if it does not fit (of several that a program chooses among, each as often as any step is); an answer that
never fits is an error. Refusals, tool calls and answers that were
cut off (`finish_reason` `length` or `content_filter`) are not held against it. Nothing is fetched for a `$ref`,
`pattern` is left to the upstream, and a schema that cannot be read, or takes too long, is a 400.

## Streams

The status is sent when the first upstream has answered, or after {passing.OPENS_AFTER:g} s; what is wrong with the
request is said before that, with its own status. Then come, as `data:` events:

1. the role, for each choice;
2. while steps run, what the program is at: lines of `reasoning_content`, at most {chat.LINES_A_SECOND} a second, that
   hold names and counts and never content;
3. the answer, as `content` and `tool_calls`, as it is generated;
4. the `finish_reason`, and with the last one the receipt;
5. the usage, with `choices: []`, if `stream_options.include_usage` asked for it;
6. `[DONE]`.

Of an upstream that is passed through, its own chunks come instead, and one `[DONE]`. Where nothing has been said for
{passing.KEEP_ALIVE_EVERY:g} s there is a comment, which clients pass over. An error in the middle is an event
`{{"error": {{…}}}}` and the end, also where the server stops; there is no `[DONE]` then, and what has begun to be
answered is not begun anew. A client that reads slowly holds up nobody else, and one that leaves ends its run.

## Responses

A **response** is the same answer in another shape: the request becomes a chat completion, by the tables above and
below, and its answer a response. So all upstreams have it, whether or not they speak that API; they are asked for chat
completions, and their answers are translated. Caches, limits, receipts, headers and errors are the same.

{_table(("parameter", "what it may be", "for a program", "passed through"), _response_parameters())}

A field that is not in this table goes the way of one that is not in the table of a chat completion. Those of a chat
completion that have another name here are refused: {", ".join(f"`{name}`" for name in response_wire.ELSEWHERE)}.

What an assistant said and called in one turn is one message to the model. Reasoning that comes back goes with the calls
it led to (as `reasoning_content`), and nowhere else; summaries go to no model.

The `output` has an item `reasoning` where there is some (`content` is the model's own; `summary` is what a program was
at, in streams alone), a `message`, and a `function_call` for each call of a tool of the client's. An answer that was
cut off is `incomplete`, by `max_output_tokens` or `content_filter`. The receipt is under `asmodel`, of programs.

**Events**, each with its `sequence_number`: `response.created` and `response.in_progress`; for each item
`response.output_item.added`, what is in it as it comes (`response.output_text.delta`,
`response.function_call_arguments.delta`, `response.reasoning_summary_text.delta` for what the program is at,
`response.reasoning_text.delta`, `response.refusal.delta`, each with its part's `added` and `done`) and
`response.output_item.done`; then `response.completed` or `response.incomplete`, with all of it. An error in the middle
is `response.failed`, with the receipt, and then `error`, which SDKs raise; so is the end of a server that stops, with
`draining`.

**Kept** are responses that came to their end, unless the request has `store: false` or the server `[store] kind =
"off"`; `store` of a response says whether it is. They are kept by holder of a key, in a file that its user alone can
read, for {kept.days:g} days after they were made or last gone on from, and in {kept.bytes:,} bytes together, beyond
which the oldest go first. They are no part of the cache. One that goes on from another holds what is its own: where the
other is deleted, it can be read still, and not be gone on from. A conversation that goes on has at most as many items
and bytes as a request may have, and counts in `[limits] in_flight_bytes` as a body does. The processes of one machine
share what is kept; several machines do not, and where a client may meet any of them it should send its whole
conversation.

## Idempotency-Key

Requests of one caller with one key are one run. One that comes while the run is under way joins it, and is told all
of it from its beginning; one that comes within {named.keep_seconds:g} s after it has ended gets the same answer, with
the same `id`. A run that has a key goes on for {named.grace_seconds:g} s after its client has left. One that failed
is forgotten, so that a retry makes it anew, from where its steps are cached. The same key with another body is a 400.
(`[idempotency]` of the settings; in one process, elsewhere a retry finds the steps in the cache.)

## Headers of a request

{_table(("header", "what it does"), ((f"`{name}`", what) for name, what in REQUEST_HEADERS.items()))}

Others are not looked at. A request has {connections.HEADER_SECONDS:g} s to send them, at most {connections.HEADERS}
of them, and {connections.HEADER_BYTES:,} bytes in all.

## Headers of a response

{_table(("header", "what it says"), ((f"`{name}`", what) for name, what in RESPONSE_HEADERS.items()))}

The counts are as of when the headers leave: of a stream, of its beginning.

## Errors

On every route, `{{"error": {{"message", "type", "param", "code"}}}}`, with a status by which SDKs do the right thing;
of a program, with the receipt beside it. Where an upstream gives a `code` of its own (`context_length_exceeded`,
`content_filter`, …) that is kept. An upstream that does not know its own model, has no quota left, or cannot do what
it is asked is a 502 with `upstream_model_not_found`, `insufficient_quota` or `upstream_not_implemented`, not worth a
retry.

{_table(("status", "code", "type", "SDKs ask again", "when"), errors_told())}

## What others' tests say of it

Suites that judge any server of OpenAI's API, run by `make e2e` against `plain`, `self-consistency` and an upstream that
is passed through, all over one scripted upstream that calls the tools and fills the schemas that it is given:

{_table(("suite", "each passes", "does not, and why"), _SUITES)}

schemathesis asks some thousands of requests, right and wrong ones, by `/openapi.json`: every answer is one that the
document has, and none is a fault of asmodel's own.

A streamed conversation with a tool call comes to its answer, by `plain` and by a passed-through upstream, with the
official SDKs of OpenAI for Python (2 and 3) and Node, LangChain's `ChatOpenAI`, pydantic-ai, the OpenAI Agents SDK
(`OpenAIChatCompletionsModel`), litellm's SDK, the `llm` command, and the Vercel AI SDK (`@ai-sdk/openai-compatible`,
and `@ai-sdk/openai` by `.chat(…)`).

## Open WebUI

Programs are models of Open WebUI (0.12.4) by four variables of its environment. It reads them when it starts for the
first time; afterwards the same stands in its admin settings.

{_table(("variable", "value", "what for"), _OPEN_WEBUI)}

The first two are enough for upstreams and for programs that support `tools`, such as `plain`. The last is for all
models; those that are to have the tools get them back by a capability of the model, "Builtin Tools", in its admin
settings.

What a program is at is read under "Thinking…" while it works, and stays there above its answer:

![Steps that are counted while they are done, under Thinking…, and no answer yet](images/open-webui-progress.png)

![The answer below them, with a title and a suggestion that an upstream has made](images/open-webui-answer.png)

Stopping ends the run and its calls. The lines of progress are no part of the conversation that the next question is
asked with.
""")


def _wrapped(text: str) -> str:
    """Paragraphs in lines of one length, whatever stands in them; tables, lists and headings as they are."""
    parts = text.removesuffix("\n").split("\n\n")
    wrapped = [part if part[:1] in "|#<1" else _fill(part) for part in parts]
    return "\n\n".join(wrapped) + "\n"


def _fill(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parameters() -> Iterable[tuple[str, str, str, str]]:
    schema = wire.ChatRequest.model_json_schema()
    for name in wire.ChatRequest.model_fields:
        may_be = _words(schema["properties"][name], schema["$defs"])
        if name in _OURS:
            program, upstream = _OURS[name]
            may_be = "an object" if name == "asmodel" else may_be
        else:
            upstream = "as it was sent"
            if name in wire.HINTS:
                program = "a hint for the reply step"
            elif name in wire.NEEDS:
                need = wire.NEEDS[name]
                program = f"refused, unless it supports `{need}`" if need else "refused"
                if calm := [_json(v) for v in wire.HARMLESS[name] if v is not None]:
                    program += f" (but {', '.join(calm)})"
            else:
                program = "ignored"
        yield f"`{name}`", may_be, program, upstream


def _passed(kind: type[BaseModel]) -> Iterable[tuple[str, str]]:
    schema = kind.model_json_schema()
    for name in kind.model_fields:
        may_be = _words(schema["properties"][name], schema["$defs"])
        if name in ("prompt", "input"):
            may_be = "text, a list of text, a list of token numbers, or a list of such lists"
        elif name == "asmodel":
            may_be = "an object: `cache` and `limits` of it; taken off before the upstream is asked"
        elif choices := [c["enum"] for c in schema["properties"][name].get("anyOf", ()) if "enum" in c]:
            may_be = " or ".join(f"`{choice}`" for choice in choices[0])
        yield f"`{name}`", may_be


def _response_parameters() -> Iterable[tuple[str, str, str, str]]:
    schema = response_wire.ResponseRequest.model_json_schema()
    for name in response_wire.ResponseRequest.model_fields:
        may_be = _words(schema["properties"][name], schema["$defs"])
        if name in response_wire.UNSUPPORTED:
            calm = "".join(f" (but {_json(value)})" for value in response_wire.CALM.get(name, ()))
            program = upstream = f"refused{calm}: {response_wire.UNSUPPORTED[name]}"
        elif name in _RESPONSE:
            program, upstream = _RESPONSE[name]
        else:
            program, upstream = "ignored", "as it was sent"
        yield f"`{name}`", "an object" if name == "asmodel" else may_be, program, upstream


def _parts() -> str:
    told = [f"`{part}` is refused unless it supports `{need}`" for part, need in wire.PARTS.items()]
    files = "a `file` of text is a document as well"
    return ", ".join([*told, files])


def _extension() -> Iterable[tuple[str, str]]:
    for name in wire.Extension.model_fields:
        yield f"`{name}`", _EXTENSION[name]
    for name in wire.AskedLimits.model_fields:
        yield f"`limits.{name}`", _LIMITS[name]


def _json(value: object) -> str:
    words = {True: "true", False: "false"}
    if isinstance(value, bool):
        return f"`{words[value]}`"
    return "`" + str(value).replace("'", '"') + "`"


_TYPES = {
    "string": "text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "object": "an object",
    "array": "a list",
}


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a JSON schema of pydantic's allows, in words; that anything may be null goes without saying."""
    if "$ref" in schema:
        return _words(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        branches = [_words(b, definitions) for b in schema["anyOf"] if b.get("type") != "null"]
        return " or ".join(dict.fromkeys(branches))
    kind = schema.get("type", "")
    told = _TYPES.get(kind, "anything")
    if kind == "array":
        inner = cast("Mapping[str, Any]", schema.get("items", {}))
        items = _TYPES.get(str(_resolved(inner, definitions).get("type", "")), "")
        told = (
            f"a list of {items.removeprefix('an ').removeprefix('a ')}{'' if items == 'text' else 's'}"
            if items
            else told
        )
        if "maxItems" in schema:
            told += f", at most {schema['maxItems']}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        told += f", {low:g} to {high:g}"
    elif low is not None:
        told += f" from {low:g} on"
    if "maxLength" in schema:
        told += f" of up to {schema['maxLength']} characters"
    return told


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    return definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


_TREE = re.compile(r"^[│├└─ ]*(\w+) +(?:\d{3}|---) +(.+)$", re.MULTILINE)


def errors_told() -> Iterable[tuple[str, str, str, str, str]]:
    """Of every error: status, code, type, whether SDKs ask again, and when it is."""
    told = dict(_TREE.findall(errors.__doc__ or ""))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AsmodelError)]
    kinds += [access.Unauthorized, admission.Overloaded, exchange.BodyTimeout]
    kinds += [routes.RouteNotFound, routes.MethodNotAllowed]
    kinds += [effects.EffectUnknown, effects.JournalUnusable, response_store.StoreUnavailable]
    kinds += [responses.PreviousResponseNotFound, responses.ResponseNotFound]
    rows: list[tuple[str, str, str, str, str]] = []
    for kind in kinds:
        if kind in (errors.ConfigurationError, errors.UpstreamError):
            continue
        when = _WHEN.get(kind.__name__) or told[kind.__name__]
        again = kind.retry if kind.retry is not None else kind.status in (408, 409, 429) or kind.status >= 500
        rows.append(
            (
                str(kind.status),
                f"`{kind.code}`" if kind.code else "null",
                f"`{kind.type}`",
                "yes" if again else "no",
                when,
            )
        )
    return sorted(rows)


_WHEN: Mapping[str, str] = {
    "AsmodelError": "asmodel itself failed; its log says where",
    "Unauthorized": "no key, or a wrong one",
    "Overloaded": "more is being answered than `[limits] in_flight` and `in_flight_bytes` allow; with `retry-after`",
    "BodyTimeout": "the body has stopped coming",
    "RouteNotFound": "there is no such route",
    "MethodNotAllowed": "the route is asked with another method",
    "EffectUnknown": "a tool whose doing must not be repeated was begun, and it is not known whether it was done",
    "JournalUnusable": "the journal of such tools cannot be read or written just now; nothing was done",
    "StoreUnavailable": "the responses that are kept cannot be read just now",
    "PreviousResponseNotFound": "what `previous_response_id` names is not kept here, or not for this caller",
    "ResponseNotFound": "no such response is kept here, or not for this caller",
    "PayloadTooLarge": "the body is larger than this server takes",
    "UpstreamRejected": "an upstream calls the request wrong",
    "UpstreamRateLimited": "an upstream is asked too often; with `retry-after`",
    "UpstreamUnreachable": "there is no connection to an upstream",
    "UpstreamUnavailable": "an upstream answers 5xx, or is still loading",
    "UpstreamTimeout": "an upstream takes too long to be reached, to begin, or to end",
    "UpstreamBroken": "an upstream has answered with something that is no answer",
    "UpstreamAuth": "the upstream refuses *our* key: the client's is fine, so it is never a 401",
}
"""Of the errors that the tree in `errors` does not have, or has in words for those who write code."""


_SUITES: Sequence[tuple[str, str, str]] = (
    (
        "llm-comply 0.5.0",
        "8 of 9",
        "`chat-reasoning-summary`, which the suite leaves out for models that are not OpenAI's by name",
    ),
    ("CompatCanary 0.2.2, `chat`", "5 of 5", ""),
)
"""What tests/e2e/test_compliance.py asserts."""

_OPEN_WEBUI: Sequence[tuple[str, str, str]] = (
    ("`OPENAI_API_BASE_URLS`", "`http://127.0.0.1:8000/v1`", "whom it asks"),
    ("`OPENAI_API_KEYS`", "`unused`", "where the settings have `[keys]`, one of them"),
    (
        "`TASK_MODEL_EXTERNAL`",
        "`default`",
        "the upstream, by its name, that gives a chat its title, its tags, and what might be asked next; without it "
        "these are asked of the chat's own model, and a program runs three times more",
    ),
    (
        "`DEFAULT_MODEL_METADATA`",
        '`{"capabilities": {"builtin_tools": false}}`',
        "it sends tools of its own with every question otherwise, and programs that support none refuse them",
    ),
)
"""What tests/e2e/test_open_webui.py starts it with."""


if __name__ == "__main__":
    print(page(), end="")
