"""What the routes answer with: the models, the limits, the store, and every run that is under way."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import orjson
from opentelemetry import trace

from asmodel import effects, structured, tracing
from asmodel.budget import Budget, Limits
from asmodel.calls import (
    JSON,
    CachePolicy,
    Call,
    Capabilities,
    Chat,
    Completion,
    Document,
    Embed,
    Emit,
    Given,
    Message,
    Reply,
    Terms,
    pieces,
)
from asmodel.deliveries import Deliveries, Delivery
from asmodel.effects import Journal
from asmodel.errors import (
    AsmodelError,
    Draining,
    InvalidRequest,
    LimitExceeded,
    ProgramError,
    Unsupported,
    UpstreamError,
)
from asmodel.ids import new_id
from asmodel.meter import UNMEASURED, Meter
from asmodel.models import Model, Models, RoleCast, ServedProgram, ServedUpstream
from asmodel.planning import Plan, foresee
from asmodel.programs import Answer, Program
from asmodel.progress import Progress
from asmodel.protocols import Cache
from asmodel.recording import Asking, Recordings
from asmodel.run import Request, Run, execute, finished, require

LOADING = 60.0
"""Seconds that a request waits for the upstreams to be opened, before it is told to come back."""

_ON = CachePolicy()
_OFF = CachePolicy(mode="off")

log = logging.getLogger("asmodel.service")


def stopping() -> Draining:
    return Draining("the server is stopping; ask again, another will answer", retry_after=1.0)


def own_fault(error: Exception) -> AsmodelError:
    """What is told of an error that nobody raised on purpose. The log says where it was."""
    # Frames only: the text of an exception may hold a prompt.
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return AsmodelError(f"asmodel itself failed ({type(error).__name__}); its log says where")


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """What a request asks to have continued, `n` times each, or embedded: of upstreams alone."""

    kind: Literal["completion", "embed"]
    given: Given
    n: int = 1

    def call(self, identity: str, params: Mapping[str, JSON], *, choice: int | None, draw: str | None) -> Call:
        """The call for one choice, numbered as OpenAI has it, or for all of them at once."""
        given = self.given
        if self.kind == "embed":
            several = not isinstance(given, str) and isinstance(given[0], str)
            texts = tuple(cast("Sequence[str]", given)) if several else ()
            return Embed(identity=identity, texts=texts, params=params, given=None if several else given)
        if choice is not None:
            given = pieces(given)[choice // self.n]
        if isinstance(given, str):
            return Completion(identity=identity, prompt=given, params=params, draw=draw)
        return Completion(identity=identity, prompt="", params=params, draw=draw, given=given)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, whatever route it came by."""

    messages: tuple[Message, ...] = ()
    raw: Raw | None = None
    """What is asked in place of messages."""
    documents: tuple[Document, ...] = ()
    hints: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    shape: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    roles: Mapping[str, str] = field(default_factory=dict[str, str])
    limits: Limits = Limits()
    cache: CachePolicy | None = None
    """None where the request says nothing of it."""
    scope: str = ""
    n: int = 1
    usage_asked: bool = False
    """Whether a stream's usage chunk was asked for."""
    stream_asks: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    """What was asked of the stream besides, for an upstream whose own stream is the answer."""
    identity: str | None = None
    """What names the run for its client: its `Idempotency-Key`."""
    body: bytes = b""
    """The request as it was sent, by which it is known that an identity is used for no other."""
    retry: bool = False
    """Whether an SDK sends the request again by itself."""
    translated: bool = False
    """Whether the answer is given another shape than an upstream's own, so that its bytes are never passed on."""
    ignored: tuple[str, ...] = ()
    """Names of what was sent and has no meaning for this model."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.body).hexdigest() if self.body else ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One choice of the answer; `reply` is the upstream's where there is one behind it."""

    answer: Answer
    reply: Reply | None
    hinted: bool = True
    """Whether the request's sampling hints reached a model."""


@dataclass(kw_only=True)
class Job:
    """A request on its way: what it may spend and has spent, and how far it is."""

    id: str
    model: Model
    asked: Asked
    budget: Budget
    progress: Progress = field(default_factory=Progress)
    started: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    params: Any = None
    delivery: Delivery | None = None
    """Where a repeat is to get another answer: which one this is, and whom to tell when it has been delivered."""


class Service:
    """Answers requests for models. One a process; knows no HTTP."""

    def __init__(
        self,
        models: Models,
        *,
        store: Cache | None = None,
        journals: Cache | None = None,
        repeats: Callable[[str, str], bool] = lambda model, scope: False,
        limits: Limits = Limits(),
        program_limits: Mapping[str, Limits] | None = None,
        cache_programs: bool = True,
        cache_upstreams: bool = False,
        meter: Meter = UNMEASURED,
        recordings: Recordings | None = None,
    ) -> None:
        self.recordings = recordings
        self.models = models
        self.meter = meter
        self.store = store
        self._journals = journals
        self._repeats = repeats
        """Whether a repeat of a request gets another answer; by the name of the model, and the caller's scope."""
        self.draining = False
        self.ready = asyncio.Event()
        """Set once every upstream is open; until then requests wait, and `/readyz` says so."""
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._limits = limits
        self._program_limits = dict(program_limits or {})
        self._cache_programs = cache_programs
        self._cache_upstreams = cache_upstreams
        self.verbatim: dict[str, bool] = {}
        """Of upstreams that were asked for: whether they speak OpenAI's format, by name."""
        self._all_verbatim: dict[str, bool] = {}
        self._playable: set[tuple[str, ...]] = set()
        """The programs and presets whose roles are known to be played by those who can."""

    @property
    def passes_straight(self) -> bool:
        """Whether what is passed through is looked up nowhere and limited by nothing, unless its request says so."""
        return not self._cache_upstreams and self._limits == Limits()

    def begin(self) -> None:
        """A request has come, so that the server's end can wait until it has ended."""
        self._under_way += 1
        self._idle.clear()

    def end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    async def idle(self, seconds: float) -> bool:
        """Wait until no request is under way; whether that came about in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()

    async def prepare(self, model: Model, asked: Asked) -> Job:
        """Check all that can be checked before anything is bought, and open the books.

        Raises InvalidRequest, Unsupported or Draining.
        """
        if self.draining:
            raise stopping()
        params = None
        if isinstance(model, ServedProgram):
            params = model.program.read_params({**model.params, **asked.params})
        elif asked.params or asked.roles:
            raise InvalidRequest(
                f'"{model.name}" is an upstream, passed through; only programs take `asmodel.params` and `.roles`',
                param="asmodel.params" if asked.params else "asmodel.roles",
            )
        if not self.ready.is_set():
            await self._loaded()
        if asked.raw is not None and not isinstance(model, ServedProgram):
            await self._refuse_unable(model, asked.raw)
        if isinstance(model, ServedProgram):
            effects.check(
                model.program,
                identity=asked.identity,
                cache=self._policy(model, asked),
                journal=self._journals is not None,
                choices=asked.n,
            )
            if (wanted := asked.shape.get("response_format")) is not None:
                # In a thread: to read a large schema takes a while. It is remembered.
                await asyncio.to_thread(structured.reader, wanted)
        limits = self._limits.tightened(asked.limits)
        if isinstance(model, ServedProgram):
            limits = limits.tightened(self._program_limits.get(model.program.name, Limits()))
        budget = Budget(limits=limits)
        used: tuple[str, ...] = ()
        if isinstance(model, ServedProgram):
            used = (model.name, *(step.name for step in model.program.steps_with(params)))
        if isinstance(model, ServedProgram) and (asked.roles or used not in self._playable):
            with (
                tracing.waiting("upstream.detection"),
                budget.asking(),
            ):  # An upstream that must try before it can say what it can is asked here, once.
                await require(model.program, self.models.cast(model, asked.roles), params=params)
            if not asked.roles and (model.name in self.models.programs or model.name in self.models.presets):
                # What an upstream can do does not go away; and of these names there are so many and no more.
                self._playable.add(used)
        if limits.cost is not None:
            self._refuse_unpriced(model, asked.roles, asked)
        deadline = None if limits.seconds is None else asyncio.get_running_loop().time() + limits.seconds
        id = f"run_{new_id(64)}"
        job = Job(id=id, model=model, asked=asked, budget=budget, deadline=deadline, params=params)
        # Who names a request means that one and no other, however often it comes.
        counted = asked.body and asked.identity is None and self._policy(model, asked).mode == "on"
        if self.store is not None and counted and self._repeats(model.name, asked.scope):
            deliveries = Deliveries(self.store)
            job.delivery = await deliveries.begin(asked.digest, scope=asked.scope, retry=asked.retry)
        return job

    async def _loaded(self) -> None:
        try:
            with tracing.waiting("upstream.loading"):
                async with asyncio.timeout(LOADING):
                    await self.ready.wait()
        except TimeoutError:
            raise Draining("the server is still loading", code="loading", retry_after=5.0) from None
        if self.draining:
            raise stopping()

    async def _refuse_unable(self, model: ServedUpstream, raw: Raw) -> None:
        able, what = _RAW[raw.kind]
        if able(await model.upstream.capabilities()):
            return
        others: list[str] = []
        for name, upstream in self.models.upstreams.items():
            with suppress(UpstreamError):  # Of one that cannot say just now, it is not said.
                if able(await upstream.capabilities()):
                    others.append(name)
        raise Unsupported(
            f'upstream "{model.name}" gives no {what}; upstreams that do: {", ".join(sorted(others)) or "none"}',
            param="model",
        )

    async def plan(self, name: str, asked: Asked) -> Plan:
        """What answering would find in the cache, and what it would buy; nothing is bought."""
        return await foresee(
            self.models,
            name,
            Request(messages=asked.messages, documents=asked.documents, hints=asked.hints, shape=asked.shape),
            params=asked.params,
            roles=asked.roles,
            cache=self._policy(self.models.find(name), asked),
            scope=asked.scope,
            store=self.store,
        )

    def _refuse_unpriced(self, model: Model, roles: Mapping[str, str], asked: Asked) -> None:
        """A cost that cannot be known cannot be limited."""
        if isinstance(model, ServedProgram):
            self._refuse_unpriced_roles(model.program, self.models.cast(model, roles), roles, asked)
        elif getattr(model.upstream, "priced", None) is False:
            raise InvalidRequest(
                f'the cost of "{model.name}" is not known, so it cannot be limited: set its price '
                f"([upstreams.{model.name}] price = {{ input = …, output = … }}), or limit calls or tokens",
                param=None if asked.limits.cost is None else "asmodel.limits.cost",
            )

    def _refuse_unpriced_roles(
        self, program: Program[Any, Any], cast: RoleCast, roles: Mapping[str, str], asked: Asked
    ) -> None:
        for player in {cast.who(step.role).name: cast.who(step.role) for step in program.steps}.values():
            # A program that plays a role is not given that role again; that no roles lead in a circle has been seen to.
            self._refuse_unpriced(player, {r: who for r, who in roles.items() if who != player.name}, asked)
        for inner in program.programs:
            if inner.name != program.name:
                self._refuse_unpriced_roles(inner, cast.nested(inner), roles, asked)

    async def passes_on(self, job: Job) -> bool:
        """Whether the upstream's own bytes go to the client: it speaks OpenAI's format, and no cache is asked first."""
        model = job.model
        if isinstance(model, ServedProgram) or job.asked.translated or self._policy(model, job.asked).mode != "off":
            return False
        # What format it speaks is known from the start, other than what must be tried.
        known = self.verbatim.get(model.name)
        if known is None:
            known = self.verbatim[model.name] = (await model.upstream.capabilities()).verbatim
        return known

    async def only_passes_on(self, job: Job) -> bool:
        """Where it passes on: whether all of the upstream's equals would do so too."""
        model = job.model
        assert not isinstance(model, ServedProgram)
        known = self._all_verbatim.get(model.name)
        if known is None:
            members = getattr(model.upstream, "members", (model.upstream,))
            known = all([(await member.capabilities()).verbatim for member in members])
            self._all_verbatim[model.name] = known
        return known

    def _policy(self, model: Model, asked: Asked) -> CachePolicy:
        if asked.cache is not None:
            return asked.cache
        on = self._cache_programs if isinstance(model, ServedProgram) else self._cache_upstreams
        return _ON if on else _OFF

    async def answer(
        self,
        job: Job,
        choice: int = 0,
        emit: Emit | None = None,
        verbatim: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> Outcome:
        """One choice, or with `verbatim` all of them, as the upstream sent them.

        Equal requests in flight share steps, never runs. Raises AsmodelError, and nothing else.
        """
        try:
            return await self._answer(job, choice, emit, verbatim)
        except AsmodelError:
            raise
        except Exception as error:
            raise own_fault(error) from error

    async def _answer(
        self, job: Job, choice: int, emit: Emit | None, verbatim: Callable[[bytes], Awaitable[None]] | None
    ) -> Outcome:
        model, asked = job.model, job.asked
        cache = self._policy(model, asked)
        # Of several prompts, each has draws of its own.
        nth = choice if asked.raw is None else choice % asked.raw.n
        path = str(nth) if job.delivery is None else job.delivery.path(nth)
        if isinstance(model, ServedProgram):
            journal = None
            if asked.identity is not None and self._journals is not None:
                journal = await Journal.begun(
                    self._journals,
                    scope=asked.scope,
                    program=model.program.name,
                    identity=asked.identity,
                    request=asked.digest,
                )
            run: Run[Any] = Run(
                model.program,
                Request(messages=asked.messages, documents=asked.documents, hints=asked.hints, shape=asked.shape),
                id=job.id,
                cast=self.models.cast(model, asked.roles),
                params=job.params,
                path=path,
                budget=job.budget,
                progress=job.progress,
                cache=cache,
                scope=asked.scope,
                deadline=job.deadline,
                store=self.store,
                emit=emit,
                journal=journal,
                meter=self.meter,
                witness=self.models.witness,
            )
            work = _ended(run)
            if self.recordings is not None:
                asking = Asking(
                    run=job.id,
                    program=model.program.name,
                    digest=model.program.digest,
                    model=model.name,
                    request=run.request,
                    params={**model.params, **asked.params},
                    roles=asked.roles,
                    limits=job.budget.limits,
                    cache=cache,
                    scope=asked.scope,
                    now=run.now,
                )
                work = self.recordings.keep(work, asking, self.models, choice=choice, path=path)
            answer = await work
            _check(model.program, answer, run.replied, asked)
            return Outcome(answer=answer, reply=run.replied, hinted=run.hinted)
        params = {**asked.hints, **asked.shape}
        if verbatim is not None and emit is not None and asked.stream_asks:
            params["stream_options"] = dict(asked.stream_asks)
        drawn = params.get("temperature") != 0 and (asked.raw is None or asked.raw.kind != "embed")
        draw = path if drawn else None
        identity = model.upstream.identity
        if asked.raw is not None:
            one = None if verbatim is not None else choice
            call = asked.raw.call(identity, params, choice=one, draw=draw)
        else:
            tools = params.pop("tools", None) or ()
            call = Chat(
                identity=identity,
                messages=asked.messages,
                params=params,
                tools=tuple(tools),  # type: ignore[arg-type]  # a list of objects, as the wire has checked
                draw=draw,
            )
        terms = Terms(
            emit=emit,
            verbatim=verbatim,
            n=1 if verbatim is None else asked.n if asked.raw is None else asked.raw.n,
            usage_asked=asked.usage_asked,
            run_id=job.id,
            step=model.name,
            scope=asked.scope,
            cache=cache,
            deadline=job.deadline,
            budget=job.budget,
            progress=job.progress,
        )
        try:
            # Where a cache is asked, this is a step: who has paid for a hit is told by its span, for there is no call.
            step = (
                nullcontext(trace.INVALID_SPAN)
                if cache.mode == "off"
                else tracing.step_span(model.name, program="", kind=call.kind, draw=draw)
            )
            with step as span, self.meter.step("", model.name) as timing:
                reply = await model.upstream.send(call, terms)
                tracing.record_step(span, reply, asks=1, cache=cache.mode, call=call)
                timing.replied(reply, cache=cache.mode)
        except LimitExceeded as error:
            self.meter.refused(error.param or "")
            raise
        if reply.source == "hit":
            job.budget.hits += 1
            job.budget.saved += reply.usage
        elif reply.source == "joined":
            job.budget.joined += 1
        answer = Answer(text=reply.text, finish=reply.finish, tool_calls=reply.tool_calls)
        return Outcome(answer=answer, reply=reply)


_RAW: Mapping[str, tuple[Callable[[Capabilities], bool], str]] = {
    "completion": (lambda can: can.completion, "completions of raw text"),
    "embed": (lambda can: can.embeddings, "embeddings"),
}


async def _ended(run: Run[Any]) -> Answer:
    return finished(run, await execute(run))


def _check(program: Program[Any, Any], answer: Answer, reply: Reply | None, asked: Asked) -> None:
    """Hold what a program returned to what its client was promised. Raises ProgramError."""
    try:
        orjson.dumps([answer.text, answer.data, [[c.id, c.text] for c in answer.citations]])
    except orjson.JSONEncodeError:
        raise ProgramError(
            f'program "{program.name}" returned what JSON cannot carry: text that is not Unicode, or `data` of a type '
            "that JSON has not"
        ) from None
    fits = structured.reader(asked.shape.get("response_format"))
    if fits is None:
        return
    refusal = None if reply is None else reply.refusal
    whole = Reply(text=answer.text, finish=answer.finish, tool_calls=tuple(answer.tool_calls), refusal=refusal)
    try:
        fits(whole)
    except ValueError as error:
        raise ProgramError(
            f'program "{program.name}" returned an answer that is not of the `response_format` that was asked for: '
            f"{error}",
            code="answer_unfit",
        ) from None
