"""What a test needs where the program needs a model: an upstream made of a function, and a scripted server over HTTP.

`FunctionUpstream` answers calls in the process; `ScriptedServer` answers OpenAI's routes on a loopback port, on time,
late, wrongly or not at all, and remembers who asked what. Both give equal answers to equal requests. The server also
runs by itself: `python -m asmodel.testing --port 0` prints its address as its first line.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from asmodel.budget import Limits
from asmodel.calls import (
    Call,
    Capabilities,
    Delta,
    Embed,
    Message,
    Reply,
    Score,
    Terms,
    TokenLogprob,
    ToolCallDelta,
)
from asmodel.conformance import check_cache as check_cache
from asmodel.dialect import estimated_usage
from asmodel.replaying import replayed as replayed
from asmodel.scripted_server import Answering as Answering
from asmodel.scripted_server import Fault as Fault
from asmodel.scripted_server import Received as Received
from asmodel.scripted_server import ScriptedServer as ScriptedServer
from asmodel.scripted_server import ServerAnswer as ServerAnswer
from asmodel.scripted_server import main
from asmodel.toy_model import Scores as Scores
from asmodel.toy_model import ToyModel as ToyModel
from asmodel.toy_model import cut

if TYPE_CHECKING:
    from pydantic import BaseModel

    from asmodel.calls import JSON, CachePolicy, Document, Emit
    from asmodel.programs import Answer, Program
    from asmodel.protocols import Cache, Upstream
    from asmodel.tools import Tool

FunctionAnswer: TypeAlias = str | Reply | float | tuple[float, int] | Exception
"""Text; a whole reply; for a `Score` the nats, or the nats and over how many tokens; an error, which is raised."""

Function: TypeAlias = (
    Callable[[Call], FunctionAnswer | Awaitable[FunctionAnswer]]
    | Callable[[Call, Terms], FunctionAnswer | Awaitable[FunctionAnswer]]
)


class FunctionUpstream:
    """An upstream that asks a function: `(call)` or `(call, terms)`, sync or async, returning a `FunctionAnswer`.

    A second parameter that has a default is left alone, so `lambda call, answers=iter("ab"): next(answers)` works.
    Text streams in a few deltas; usage is estimated where the function gives none. `calls` and `terms` list, in
    order, what was asked; a call that raised is among them.
    """

    def __init__(
        self,
        function: Function,
        *,
        name: str | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        self.name = name or getattr(function, "__name__", type(function).__name__).strip("<>")
        self.calls: list[Call] = []
        self.terms: list[Terms] = []
        self._function: Callable[..., FunctionAnswer | Awaitable[FunctionAnswer]] = function
        self._wants_terms = _takes_two(function)
        self._capabilities = capabilities or Capabilities(
            completion=True, schema=True, tools=True, loglikelihood=True, embeddings=True
        )

    @property
    def identity(self) -> str:
        return f"function:{self.name}"

    async def capabilities(self) -> Capabilities:
        return self._capabilities

    async def send(self, call: Call, terms: Terms) -> Reply:
        self.calls.append(call)
        self.terms.append(terms)
        started = time.perf_counter()
        answer = self._function(call, terms) if self._wants_terms else self._function(call)
        if inspect.isawaitable(answer):
            answer = await answer
        reply = _as_reply(call, answer)
        if not reply.usage.total_tokens:
            reply = replace(reply, usage=estimated_usage(call, reply))
        reply = replace(
            reply,
            model=reply.model or self.name,
            upstream=reply.upstream or self.name,
            bought_at=reply.bought_at or time.time(),
            seconds=reply.seconds or time.perf_counter() - started,
        )
        if terms.emit is not None and not isinstance(call, (Score, Embed)):
            for delta in _deltas(reply):
                await terms.emit(delta)
        return reply


def _takes_two(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(places) > 1 and places[1].default is inspect.Parameter.empty


def _as_reply(call: Call, answer: FunctionAnswer) -> Reply:
    if isinstance(answer, Exception):
        raise answer
    if isinstance(answer, Reply):
        return answer
    if isinstance(call, Score):
        if isinstance(answer, (int, float)):
            return Reply(logprobs=_spread(call.continuation, float(answer), max(1, len(call.continuation.split()))))
        if isinstance(answer, tuple):
            total, tokens = answer
            return Reply(logprobs=_spread(call.continuation, float(total), tokens))
    elif isinstance(answer, str) and not isinstance(call, Embed):
        return Reply(text=answer)
    wanted = {"score": "nats, (nats, tokens)", "embed": "embeddings in"}.get(call.kind, "text")
    raise TypeError(f"a call of kind {call.kind} is answered with {wanted} or a Reply, not {type(answer).__name__}")


def _spread(text: str, total: float, tokens: int) -> tuple[TokenLogprob, ...]:
    """`tokens` entries over the text whose log-probabilities add up to exactly `total`."""
    if tokens < 1:
        raise ValueError("a score is over one token at least")
    share = total / tokens
    values = [share] * (tokens - 1)
    values.append(math.fsum([total, *(-v for v in values)]))
    size = math.ceil(len(text) / tokens)
    return tuple(TokenLogprob(text[i * size : (i + 1) * size], value) for i, value in enumerate(values))


def _deltas(reply: Reply, most: int = 4) -> Iterable[Delta]:
    for piece in cut(reply.reasoning, most):
        yield Delta(reasoning=piece)
    for piece in cut(reply.text, most):
        yield Delta(text=piece)
    for index, c in enumerate(reply.tool_calls):
        yield Delta(tool_calls=(ToolCallDelta(index, c.id, c.name, c.arguments),))


async def run_program(
    program: Program[Any, Any],
    question: str | Sequence[Message],
    *,
    upstream: Upstream | None = None,
    upstreams: Mapping[str, Upstream] | None = None,
    params: Mapping[str, JSON] | BaseModel | None = None,
    documents: Sequence[Document] = (),
    tools: Sequence[Tool[..., Any]] = (),
    cache: Cache | None = None,
    policy: CachePolicy | None = None,
    limits: Limits | None = None,
    roles: Mapping[str, str] | None = None,
    hints: Mapping[str, JSON] | None = None,
    shape: Mapping[str, JSON] | None = None,
    choice: int = 0,
    identity: str | None = None,
    emit: Emit | None = None,
) -> Answer:
    """Answer one question by a program, with all that is between a program and a model in the server.

    `upstream` plays every role that has no other player; `upstreams` are further ones by name, and a step's role may
    be the name of one; `tools` are those of the settings. With the same `cache` (open, if it has a life) and the same
    question, a second run is the first one resumed. `hints` are a client's sampling parameters, by OpenAI's names, and
    `shape` is what it asks of the answer (`tools`, `response_format`, …) where the program supports that; `choice`
    counts the choices of `n`; `identity` names the run, as an `Idempotency-Key` does: a program with effects wants one,
    and a cache.
    Raises what a client would be told: AsmodelError.
    """
    from asmodel.app import onion
    from asmodel.models import Models
    from asmodel.service import Asked, Service
    from asmodel.settings import UpstreamSettings

    given = dict(upstreams or {})
    if upstream is not None:
        given = {"default": upstream, **given}
    if not given:
        raise TypeError("run_program wants an upstream, such as upstream=FunctionUpstream(lambda call: 'yes')")
    wrapped = onion(given, {name: UpstreamSettings(kind="function") for name in given}, cache)
    models = Models([program], wrapped, tools={tool.name: tool for tool in tools}, store=cache)
    service = Service(models, store=cache, journals=cache)
    service.ready.set()
    asked = Asked(
        messages=(Message("user", question),) if isinstance(question, str) else tuple(question),
        documents=tuple(documents),
        hints=dict(hints or {}),
        shape=dict(shape or {}),
        params=dict(params or {}) if isinstance(params, Mapping | None) else params.model_dump(mode="json"),
        roles=dict(roles or {}),
        limits=limits or Limits(),
        cache=policy,
        identity=identity,
    )
    job = await service.prepare(models.find(program.name), asked)
    return (await service.answer(job, choice, emit)).answer


if __name__ == "__main__":
    main()
