"""`POST /v1/completions` and `POST /v1/embeddings`: raw text, continued or embedded, by upstreams alone.

A program answers conversations, so its name is refused here. What is passed through is the upstream's own bytes; where
it speaks another format, or a cache is asked first, the answer is put together here: each choice of each prompt is then
a call of its own, embeddings are one.

Source: OpenAI's openapi.yaml, info.version 2.3.0 (2026-08): `CreateCompletionRequest`, `CreateCompletionResponse`,
`CreateEmbeddingRequest`, `CreateEmbeddingResponse`.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

from pydantic import Field, StrictBool, StrictInt, StrictStr

from asmodel import wire
from asmodel.calls import Given, Reply, pieces
from asmodel.chat import Asking, cache_policy, identity, limits_of, tokens
from asmodel.errors import Unsupported
from asmodel.exchange import Exchange
from asmodel.models import Model, ServedProgram
from asmodel.service import Asked, Job, Outcome, Raw
from asmodel.wire import Body, Extension, Finite, Json, Name, StreamOptions

Token: TypeAlias = Annotated[StrictInt, Field(ge=0)]
Tokens: TypeAlias = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Texts: TypeAlias = (
    StrictStr
    | Annotated[list[StrictStr], Field(min_length=1, fail_fast=True)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
)
"""One text or several, or as many lists of token numbers."""

_OURS = frozenset(("model", "prompt", "input", "n", "stream", "stream_options", "asmodel"))


class _Passed(Body):
    @property
    def passed_on(self) -> Json:
        """What an upstream is sent beside what is continued or embedded: as it came, null included."""
        return {name: value for name, value in self._sent.items() if name not in _OURS}


class CompletionRequest(_Passed):
    """The body of `POST /v1/completions`. What has no name here is passed on as it is."""

    model: Name
    prompt: Texts
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    best_of: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    suffix: StrictStr | None = None
    echo: StrictBool | None = None
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None = None
    seed: StrictInt | None = None
    logprobs: Annotated[StrictInt, Field(ge=0)] | None = None
    logit_bias: dict[str, Finite] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    user: StrictStr | None = None
    asmodel: Extension = Field(default_factory=Extension)

    @property
    def given(self) -> Given:
        return cast("Given", self._sent["prompt"])


class EmbeddingRequest(_Passed):
    """The body of `POST /v1/embeddings`. What has no name here is passed on as it is."""

    model: Name
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    user: StrictStr | None = None
    asmodel: Extension = Field(default_factory=Extension)

    @property
    def given(self) -> Given:
        return cast("Given", self._sent["input"])

    @property
    def n(self) -> None:
        return None

    @property
    def stream(self) -> bool:
        return False


_R = TypeVar("_R", CompletionRequest, EmbeddingRequest)


class _Upstreams(Asking[_R]):
    """A route of upstreams alone."""

    def _bounded(self, request: _R, name: str) -> _R:
        if (count := len(pieces(request.given))) > self._messages:
            raise wire.TooManyMessages(f"`{name}`: at most {self._messages}, not {count}", param=name)
        return request

    def _raw(self, exchange: Exchange, request: _R, model: Model, body: bytes, raw: Raw) -> Asked:
        if isinstance(model, ServedProgram):
            names = ", ".join(sorted(self._service.models.upstreams)) or "none"
            raise Unsupported(
                f'"{request.model}" is a program, which POST /v1/chat/completions asks; POST {self.path} is for '
                f"upstreams: {names}",
                param="model",
            )
        headers = exchange.headers
        options = cast("StreamOptions | None", getattr(request, "stream_options", None))
        return Asked(
            raw=raw,
            hints=request.passed_on,
            params=request.asmodel.params,
            roles=request.asmodel.roles,
            limits=limits_of(request.asmodel),
            cache=cache_policy(exchange.all_of("cache-control"), request.asmodel),
            scope=exchange.caller.scope,
            n=raw.n * len(pieces(raw.given)) if raw.kind == "completion" else 1,
            stream_asks=request.stream_asks if request.stream else {},
            usage_asked=bool(options and options.include_usage),
            identity=identity(headers),
            retry=headers.get("x-stainless-retry-count", "0").strip() not in ("", "0"),
            body=body,
        )


class Completions(_Upstreams[CompletionRequest]):
    """`POST /v1/completions`."""

    path = "/v1/completions"

    async def _read(self, exchange: Exchange, body: bytes) -> CompletionRequest:
        return self._bounded(wire.read(CompletionRequest, body, beside="prompt"), "prompt")

    def _asked(self, exchange: Exchange, request: CompletionRequest, model: Model, body: bytes) -> Asked:
        raw = Raw(kind="completion", given=request.given, n=request.n or 1)
        return self._raw(exchange, request, model, body, raw)

    async def _body(
        self,
        exchange: Exchange,
        request: CompletionRequest,
        job: Job,
        id: str,
        created: int,
        outcomes: list[Outcome],
    ) -> Json:
        return {
            "id": _own(id),
            "object": "text_completion",
            "created": created,
            "model": exchange.model,
            "choices": [
                {
                    "index": index,
                    "text": outcome.answer.text,
                    "logprobs": logprobs(outcome.reply, _starts(job, index)),
                    "finish_reason": outcome.answer.finish,
                }
                for index, outcome in enumerate(outcomes)
            ],
            "usage": tokens(job, outcomes),
        }

    def _chunks(self, exchange: Exchange, job: Job, id: str, created: int) -> wire.Chunks:
        return TextChunks(_own(id), created, exchange.model, job)


class Embeddings(_Upstreams[EmbeddingRequest]):
    """`POST /v1/embeddings`."""

    path = "/v1/embeddings"

    async def _read(self, exchange: Exchange, body: bytes) -> EmbeddingRequest:
        return self._bounded(wire.read(EmbeddingRequest, body, beside="input"), "input")

    def _asked(self, exchange: Exchange, request: EmbeddingRequest, model: Model, body: bytes) -> Asked:
        return self._raw(exchange, request, model, body, Raw(kind="embed", given=request.given))

    async def _body(
        self,
        exchange: Exchange,
        request: EmbeddingRequest,
        job: Job,
        id: str,
        created: int,
        outcomes: list[Outcome],
    ) -> Json:
        reply = outcomes[0].reply
        vectors = () if reply is None else reply.embeddings
        encoded = job.asked.hints.get("encoding_format") == "base64"
        used = job.budget.usage
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": packed(vector) if encoded else vector}
                for index, vector in enumerate(vectors)
            ],
            "model": exchange.model,
            "usage": {"prompt_tokens": used.prompt_tokens, "total_tokens": used.total_tokens},
        }

    def _chunks(self, exchange: Exchange, job: Job, id: str, created: int) -> wire.Chunks:
        raise AssertionError("embeddings are not streamed")


class TextChunks(wire.Chunks):
    """The chunks of a stream of raw text."""

    object = "text_completion"

    def __init__(self, id: str, created: int, model: str, job: Job) -> None:
        super().__init__(id, created, model, include_usage=job.asked.usage_asked)
        self._job = job

    def _choice(self, index: int, delta: Json, finish: str | None, logprobs: Json | None) -> Json:
        return {"index": index, "text": delta.get("content") or "", "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, index: int, reply: Reply | None) -> Json | None:
        return logprobs(reply, _starts(self._job, index))


def _own(id: str) -> str:
    return f"cmpl-{id.removeprefix('chatcmpl-')}"


def _starts(job: Job, choice: int) -> int:
    """Where in prompt and continuation together the text of a choice begins, as far as that is known."""
    raw = job.asked.raw
    if raw is None or job.asked.hints.get("echo"):
        return 0
    prompt = pieces(raw.given)[choice // raw.n]
    return len(prompt) if isinstance(prompt, str) else 0


def logprobs(reply: Reply | None, starts: int = 0) -> Json | None:
    """Log-probabilities in the shape of completions. The first token of an echoed prompt has none, and is there."""
    if reply is None or not reply.logprobs:
        return None
    shown: list[str] = [t.token for t in reply.logprobs]
    values: list[float | None] = [t.logprob for t in reply.logprobs]
    tops: list[Json | None] = [dict(t.top) or None for t in reply.logprobs]
    whole = "".join(shown)
    if reply.text != whole and reply.text.endswith(whole):
        first = reply.text[: len(reply.text) - len(whole)]
        shown, values, tops = [first, *shown], [None, *values], [None, *tops]
    offsets: list[int] = []
    for token in shown:
        offsets.append(starts)
        starts += len(token)
    return {"tokens": shown, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def packed(vector: Sequence[float]) -> str:
    """A vector as base64 of numbers of 32 bits, the lowest byte first: OpenAI's `encoding_format: base64`."""
    numbers: array[Any] = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
