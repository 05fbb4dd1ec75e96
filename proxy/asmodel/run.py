"""A run: one request being answered, and the only way to make a step happen: `await run(step, *args)`."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import random
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    overload,
    runtime_checkable,
)

import orjson
from opentelemetry import trace

from asmodel import structured, tracing
from asmodel.budget import Budget, Limits
from asmodel.calls import (
    JSON,
    KEY_VERSION,
    CachePolicy,
    Call,
    Capabilities,
    Chat,
    Completion,
    Delta,
    Document,
    Emit,
    Message,
    NotJSON,
    Reply,
    Terms,
    ToolCall,
    body,
    canonical,
    describe,
    drawn,
)
from asmodel.effects import Journal
from asmodel.errors import (
    AsmodelError,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    ProgramError,
    StepError,
    Unsupported,
)
from asmodel.frozen import quickly_made
from asmodel.meter import UNMEASURED, Meter
from asmodel.programs import Answer, Out, ParamsT, Program
from asmodel.progress import Progress
from asmodel.protocols import Cache, Counting, Detecting, Upstream
from asmodel.steps import Prompt, Step, asked_again
from asmodel.tags import tag
from asmodel.tools import KEY_ARGUMENT, Tool
from asmodel.upstreams import Cached, name_of

if TYPE_CHECKING:
    from asmodel.planning import Plan
    from asmodel.recording import Witness

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

DEPTH = 16
"""How deep programs may be nested; roles that lead back to themselves end here, with an error that says so."""

_SHOWN_OF_A_REPLY = 200
"""Characters of an unreadable reply that its StepError shows."""

_AGREED = 64
"""Steps whose terms are kept for their next call in the run."""

_GRACE = 0.5
"""Seconds after its deadline at which a run is stopped whatever it is doing. A step ends at the deadline itself, so the
program has this long to say what it has got."""

_OURS = Path(__file__).parent

# A raw completion takes these; the other hints of a chat request mean nothing there.
_COMPLETION_HINTS = frozenset(
    ("temperature", "top_p", "max_tokens", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias")
)

log = logging.getLogger("asmodel.run")


@quickly_made
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked, as far as a program or its reply step may know it."""

    messages: tuple[Message, ...]
    documents: tuple[Document, ...] = ()
    hints: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    """Sampling parameters of the request; they go to the reply step."""
    shape: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    """What changes the shape of the answer (`tools`, `response_format`, …), for programs that support it."""


class Cast(Protocol):
    """Who plays which role."""

    def play(self, role: str) -> Upstream:
        """Raises InvalidRequest or ConfigurationError where nobody can."""
        ...

    def nested(self, program: Program[Any, Any]) -> Cast:
        """The cast of a program that is run inside this one."""
        ...

    async def able(self, can: Callable[[Capabilities], bool]) -> Sequence[str]:
        """The names of those who could play a role that asks for this."""
        ...

    def tool(self, name: str) -> Tool[..., Any]:
        """The tool of the settings that has this name. Raises InvalidRequest where there is none."""
        ...


@runtime_checkable
class Played(Protocol):
    """An upstream that is a program, and so has roles of its own to be played."""

    async def require(self, chain: tuple[str, ...]) -> None:
        """`require` of that program. `chain` names the models that have led here, so that a loop is seen."""
        ...


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens of what a step would show, against what its upstream takes."""

    tokens: int
    context: int | None
    estimated: bool
    """True where the upstream cannot count: about 4 characters a token."""

    @property
    def fits(self) -> bool:
        return self.context is None or self.tokens <= self.context


class Run(Generic[ParamsT]):
    """One request being answered: conversation, params, documents, limits, and the way to make steps happen."""

    params: ParamsT

    def __init__(
        self,
        program: Program[ParamsT, Any],
        request: Request,
        *,
        id: str,
        cast: Cast,
        params: ParamsT,
        path: str = "0",
        budget: Budget | None = None,
        progress: Progress | None = None,
        cache: CachePolicy = CachePolicy(),
        scope: str = "",
        deadline: float | None = None,
        store: Cache | None = None,
        emit: Emit | None = None,
        depth: int = 0,
        journal: Journal | None = None,
        now: datetime | None = None,
        plan: Plan | None = None,
        meter: Meter = UNMEASURED,
        witness: Witness | None = None,
    ) -> None:
        self.id = id
        self.meter = meter
        self.program = program
        self.request = request
        self.params = params
        self.messages = request.messages
        self.documents = request.documents
        self.now = now or (journal.now if journal is not None else datetime.now(UTC))
        """When the run started; the same for the whole run, and for a retry that is known by its Idempotency-Key."""
        self.budget = budget or Budget()
        self.deadline = deadline
        """When the run must have ended, on the clock of the event loop, in seconds."""
        self.depth = depth
        """How many programs this run is inside of."""
        self.replied: Reply | None = None
        self.streamed = False
        """Whether any of the answer has left for the client already."""
        self.thought = False
        """Whether any of its reasoning has."""
        self.limited = False
        """Whether a limit has ended the run, so that its best answer so far is what it returned."""
        self.hinted = False
        """Whether the request's sampling hints have reached a step."""
        self.span: trace.Span = trace.INVALID_SPAN
        self._cast = cast
        self._path = path
        self._progress = progress or Progress()
        self._cache = cache
        self._scope = scope
        self._store = store
        self._emit = emit
        self._journal = journal
        self._plan = plan
        self._witness = witness
        self._drawn: dict[int, int] = {}
        """How often each sampled call has been made, by the hash of its `body`."""
        self._draws: Counter[bytes] = Counter()
        """The same of nested programs, and of effects."""
        self._agreed: dict[Step[..., Any, Any], Terms] = {}
        """The terms of a step are the same for all of its calls in the run that are not streamed."""
        self._tools: dict[str, Tool[..., Any]] = {}
        self._best: str | Answer | None = None
        self._replying = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @cached_property
    def random(self) -> random.Random:
        """Seeded by the request: the same request draws the same numbers."""
        params = None if self.params is None else self.params.model_dump(mode="json")
        asked = [self.program.name, [m.wire() for m in self.messages], params, self._path]
        return random.Random(int.from_bytes(hashlib.sha256(canonical(asked)).digest()[:8]))

    @property
    def question(self) -> str:
        """The text of the last message of the user; the rest of the conversation is in `messages`."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.text
        return ""

    @property
    def left(self) -> Limits:
        """What is left of the run's limits: calls, tokens, cost, seconds; None where there is no limit."""
        return self.budget.left

    def tool(self, name: str) -> Tool[..., Any]:
        """The tool that the settings have under this name, to be called as any other: `await run(run.tool(name), …)`.

        Raises InvalidRequest where there is none, so that a parameter of the request may name it.
        """
        return self._cast.tool(name)

    @property
    def wants_json(self) -> bool:
        """Whether the client has asked for JSON (`response_format`), so that no other text will do as the answer."""
        return self._fits is not None

    @cached_property
    def _fits(self) -> Callable[[Reply], str] | None:
        return structured.reader(self.request.shape.get("response_format"))

    def best(self, answer: str | Answer) -> None:
        """The best answer so far: what is returned, with finish reason `length`, if a limit ends the run."""
        self._best = answer

    @property
    def best_so_far(self) -> str | Answer | None:
        return self._best

    # Making things happen

    @overload
    async def __call__(self, step: Step[P, Any, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    async def __call__(self, program: Program[Any, Out], messages: str | Sequence[Message], /) -> Out: ...
    @overload
    async def __call__(self, tool: Tool[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    async def __call__(self, thing: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run a step, a program or a tool, and give its value.

        Raises StepError where a reply stayed unreadable, LimitExceeded, or an UpstreamError.
        """
        if isinstance(thing, Step):
            asked = cast("Step[..., Any, Any]", thing)
            if "tools" in asked.options:
                self._remember(asked)
            upstream = self._cast.play(asked.role)
            call = self._call(asked, upstream, args, kwargs)
            return (await self._ask(asked, upstream, call, asks=asked.asks, emit=None))[0]
        if isinstance(thing, Program):
            return (await self._nest(cast("Any", thing), *args, emit=None))[1]
        if isinstance(thing, Tool):
            used = cast("Tool[..., Any]", thing)
            return await self._use(used, used.bind(*args, **kwargs), call_id=None)
        raise TypeError(f"run takes a step, a program or a tool, not {type(thing).__name__}")

    @overload
    async def reply(self, step: Step[P, Any, str], /, *args: P.args, **kwargs: P.kwargs) -> str: ...
    @overload
    async def reply(self, program: Program[Any, Any], messages: str | Sequence[Message], /) -> str: ...
    @overload
    async def reply(self, draft: Reply, /) -> str: ...
    async def reply(self, thing: Any, /, *args: Any, **kwargs: Any) -> str:
        """Run the step (or program) whose text *is* the answer: it streams to the client as it is generated.

        At most once a run; return the text unchanged. The client's sampling hints go to it. It is not asked again, but
        where the client wants an answer of a certain shape, which is held until it fits. A reply that `draft` gave is
        the answer as it came, with its tool calls or its refusal.
        """
        if self._replying:
            raise ProgramError(f'program "{self.program.name}" called run.reply twice; one reply is the answer')
        self._replying = True
        if isinstance(thing, Reply):
            self.replied = thing
            return thing.text
        emit = None if self._emit is None else self._leaving
        if isinstance(thing, Program):
            self.hinted = True
            inner, value = await self._nest(cast("Any", thing), *args, emit=emit, hand_on=True)
            answer = finished(inner, value)
            self.replied = replace(
                inner.replied or Reply(), text=answer.text, finish=answer.finish, tool_calls=tuple(answer.tool_calls)
            )
            return answer.text
        step = cast("Step[..., Any, Any]", thing)
        if not step.plain:
            raise ProgramError(
                f'program "{self.program.name}": run.reply streams what step "{step.name}" is told, as it comes, so '
                "the step cannot have returns=; make it with `await run(...)`, and return what you make of it"
            )
        self._remember(step)
        upstream = self._cast.play(step.role)
        call = self._hint(self._call(step, upstream, args, kwargs))
        if emit is not None and step.options.get("tools"):
            emit = None  # Held: text before a tool call must not leave until it is known that none follows.
        asks = 1
        check = structured.reader(call.params.get("response_format")) if isinstance(call, Chat) else None
        if check is not None:
            # Held too, until it is known to fit; and if it does not, it is asked for once more.
            emit, asks, step = None, 2, replace(step, reader=check)
        value, self.replied = await self._ask(step, upstream, call, asks=asks, emit=emit)
        return cast("str", value)

    async def draft(self, step: Step[P, Any, Any], /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        """Run a step that may become the answer, and hold it: as often as there are to be candidates.

        The client's tools and `response_format` go to it; its sampling hints do not. It is asked again while it is not
        of that shape, and while its step cannot read its text; calls of tools and refusals are answers of their own.
        `run.reply(draft)` makes one of them the answer as it came.
        """
        self._remember(step)
        upstream = self._cast.play(step.role)
        call = self._call(step, upstream, args, kwargs)
        if not isinstance(call, Chat) or step.shape is not None:
            raise ProgramError(
                f'program "{self.program.name}": run.draft wants a step that shows messages and answers as the client '
                f'asks; step "{step.name}" shows raw text, or has an answer of its own shape'
            )
        fits = self._fits

        def read(reply: Reply) -> Reply:
            if not reply.tool_calls and reply.refusal is None:
                if fits is not None:
                    fits(reply)
                step.read(reply)
            return reply

        asked = replace(step, reader=read)
        return (await self._ask(asked, upstream, self._shaped(call), asks=step.asks, emit=None))[1]

    def _shaped(self, call: Chat) -> Chat:
        """The call with what the client asks of its answer. Where that is text, as it is, so that its key stays too."""
        shape = dict(self.request.shape)
        tools = cast("Sequence[Mapping[str, JSON]]", shape.pop("tools", None) or ())
        if not tools:
            shape.pop("tool_choice", None)
            shape.pop("parallel_tool_calls", None)
        if self._fits is None:
            shape.pop("response_format", None)
        if not shape and not tools:
            return call
        return replace(call, params={**call.params, **shape}, tools=(*call.tools, *tools))

    async def _leaving(self, delta: Delta) -> None:
        assert self._emit is not None
        if delta.text or delta.tool_calls:
            self.streamed = True
        if delta.reasoning:
            self.thought = True
        await self._emit(delta)

    async def call(self, call: ToolCall) -> Message:
        """Do what the model asked for, and give the message that tells it the result.

        Only tools of steps that this run has made are called. An unknown name and arguments that do not fit go back
        to the model as the result; what the tool itself raises is raised.
        """
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(sorted(self._tools)) or "none"
            return Message("tool", f"There is no tool {call.name}; there are: {known}.", tool_call_id=call.id)
        try:
            arguments = tool.read(call.arguments)
        except ValueError as error:
            return Message("tool", f"Not called: {error}.", tool_call_id=call.id)
        result = await self._use(tool, arguments, call_id=call.id)
        if isinstance(result, str):
            return Message("tool", result, tool_call_id=call.id)
        try:
            text = orjson.dumps(result, default=_jsonable).decode()
        except orjson.JSONEncodeError:
            raise ProgramError(
                f'tool "{tool.name}" returned {type(result).__name__}, which a model cannot be told; '
                "return text, JSON or a pydantic model"
            ) from None
        return Message("tool", text, tool_call_id=call.id)

    @contextmanager
    def part(self, name: str, *, of: int | None = None) -> Generator[None, None, None]:
        """Group the steps of the body: one span, and one line of progress that counts to `of`."""
        with self._progress.part(name, of), tracing.part_span(name, of=of):
            yield

    def note(self, **facts: float | Sequence[float]) -> None:
        """Put numbers on the run's span, such as a tally of votes. Numbers only: a trace holds no content."""
        tracing.record_notes(self.span, facts)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start work beside the rest of the run. It is cancelled when the run ends, if it is not done by then."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._has_ended)
        return task

    def _has_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            # If nobody awaits it, nobody hears of it; and the event loop's own log would show the text of the error.
            log.warning("%s", self._fault(error, "what run.start began"))

    async def size(self, step: Step[P, Any, Any], /, *args: P.args, **kwargs: P.kwargs) -> Size:
        """How many tokens the step would show, against the context of the upstream that plays its role."""
        upstream = self._cast.play(step.role)
        call = self._call(step, upstream, args, kwargs)
        if isinstance(call, Chat):
            text = "\n".join(f"{m.role}\n{m.text}" for m in call.messages)
        elif isinstance(call, Completion):
            text = call.prompt
        else:
            text = "".join(str(value) for name, value in describe(call).items() if name not in ("kind", "identity"))
        context = (await upstream.capabilities()).context
        if isinstance(upstream, Counting):
            if self._witness is None:
                return Size(await upstream.count(text), context, estimated=False)
            return Size(await self._witness.count(self.id, upstream, call.identity, text), context, estimated=False)
        return Size(len(text) // 4 + 1, context, estimated=True)

    # How it happens

    def _remember(self, step: Step[..., Any, Any]) -> None:
        for tool in step.options.get("tools", ()):
            if self._tools.setdefault(tool.name, tool) is not tool:
                raise ProgramError(f'program "{self.program.name}" has two tools named "{tool.name}"; rename one')

    def _call(self, step: Step[..., Any, Any], upstream: Upstream, args: Any, kwargs: Any) -> Call:
        try:
            call = step.call(step.show(*args, **kwargs), upstream.identity)
            return call if self._witness is None else self._witness.showing(self.program.name, step.name, call)
        except ProgramError as error:
            raise ProgramError(f'program "{self.program.name}": {error}') from error
        except AsmodelError:
            raise
        except Exception as error:
            misfit = _misfit(step, args, kwargs) if isinstance(error, TypeError) else None
            if misfit is not None:
                raise ProgramError(f'program "{self.program.name}": step "{step.name}": {misfit}') from None
            raise self._fault(error, f'step "{step.name}"') from error

    def _fault(self, error: Exception, what: str) -> ProgramError:
        """A program's own exception, told without its text, which may hold a prompt."""
        frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        frames = [(file, line) for file, line in frames if not file.is_relative_to(_OURS)]
        # The author's own line, not the library's that it called.
        own = [(file, line) for file, line in frames if file == self.program.file] or frames
        where = f" at {own[-1][0].name}:{own[-1][1]}" if own else ""
        return ProgramError(f'program "{self.program.name}": {what} raised {type(error).__name__}{where}')

    def _hint(self, call: Call) -> Call:
        self.hinted = True
        hints, shape = dict(self.request.hints), dict(self.request.shape)
        if isinstance(call, Completion):
            if "max_completion_tokens" in hints:
                hints["max_tokens"] = hints["max_completion_tokens"]
            return replace(call, params={**call.params, **{k: hints[k] for k in hints.keys() & _COMPLETION_HINTS}})
        if not isinstance(call, Chat):
            raise ProgramError(f'program "{self.program.name}": run.reply wants a step that answers with text')
        params = dict(call.params)
        if "max_tokens" in hints or "max_completion_tokens" in hints:
            params.pop("max_tokens", None)
        tools = cast("Sequence[Mapping[str, JSON]]", shape.pop("tools", ()))
        return replace(call, params={**params, **hints, **shape}, tools=(*call.tools, *tools))

    def _draw(self, call: Call, sample: int | None) -> Call:
        """Number equal sampled calls, so that votes differ and a resumed run gets the same ones."""
        if not isinstance(call, (Chat, Completion)) or call.params.get("temperature") == 0:
            return call
        if sample is not None:
            return replace(call, draw=f"{self._path}/{sample}")
        written = body(call)
        # By Python's own keyed hash, in a third of the time of SHA-256: were two of its 64 bits ever equal in one run,
        # the second would only have a draw of another number.
        equal = hash(written)
        number = self._drawn.get(equal, 0)
        self._drawn[equal] = number + 1
        return drawn(call, written, f"{self._path}/{number}")

    def _terms(self, step: Step[..., Any, Any], emit: Emit | None) -> Terms:
        if emit is not None:
            return self._agree(step, emit)
        terms = self._agreed.get(step)
        if terms is None:
            if len(self._agreed) >= _AGREED:
                self._agreed.clear()  # `using` makes a step of its own each time.
            terms = self._agreed[step] = self._agree(step, None)
        return terms

    def _agree(self, step: Step[..., Any, Any], emit: Emit | None) -> Terms:
        policy = self._cache
        if not step.options.get("cache", True):
            policy = replace(policy, mode="off")
        if "ttl" in step.options:
            policy = replace(policy, ttl=step.options["ttl"])
        return Terms(
            emit=emit,
            run_id=self.id,
            program=self.program.name,
            step=step.name,
            scope=self._scope,
            cache=policy,
            deadline=self.deadline,
            budget=self.budget,
            progress=self._progress,
            depth=self.depth,
            now=self.now,
            shared_prefix=step.options.get("shared_prefix", False),
            # Text is text: a step that takes it as it comes can refuse none.
            accept=None if step.plain else step.read,
        )

    async def _ask(
        self, step: Step[..., Any, R], upstream: Upstream, call: Call, *, asks: int, emit: Emit | None
    ) -> tuple[R, Reply]:
        try:
            first = call = self._draw(call, step.options.get("sample"))
            terms = self._terms(step, emit)
            draw = call.draw if isinstance(call, (Chat, Completion)) else None
            self._progress.started(step.name)
            with (
                tracing.step_span(step.name, program=self.program.name, kind=call.kind, draw=draw) as span,
                self.meter.step(self.program.name, step.name) as timing,
            ):
                for ask in range(1, asks + 1):
                    if self._witness is None:
                        reply = await upstream.send(call, terms)
                    else:
                        reply = await self._witness.send(step.role, upstream, call, terms)
                    try:
                        value = step.reader(reply)
                    except ValueError as error:
                        if ask == asks or call.kind == "score":
                            tracing.record_step(span, reply, asks=ask, call=call, cache=terms.cache.mode)
                            raise self._unreadable(step, reply, str(error), ask) from error
                        self._progress.asked_again(step.name)
                        self.meter.asked_again(self.program.name, step.name)
                        call = asked_again(call, reply, str(error))
                        continue
                    except AsmodelError:
                        raise
                    except Exception as error:
                        raise self._fault(error, f'the reader of step "{step.name}"') from error
                    if ask > 1 and isinstance(upstream, Cached):
                        # One step, one entry: the next run that makes this step is not to go the same long way.
                        await upstream.keep(first, reply, terms)
                    self.budget.steps += 1
                    if reply.source == "hit":
                        self.budget.hits += 1
                        self.budget.saved += reply.usage
                    elif reply.source == "joined":
                        self.budget.joined += 1
                    tracing.record_step(span, reply, asks=ask, cache=terms.cache.mode, call=call)
                    timing.replied(reply, cache=terms.cache.mode)
                    self._progress.finished(step.name, reply.source)
                    return value, reply
            raise AssertionError("unreachable: a step is asked at least once")
        except NotJSON as error:
            raise ProgramError(
                f'program "{self.program.name}": step "{step.name}" shows what JSON cannot carry: {error}'
            ) from None

    def _unreadable(self, step: Step[..., Any, Any], reply: Reply, reason: str, asks: int) -> StepError:
        text = reply.text if len(reply.text) <= _SHOWN_OF_A_REPLY else reply.text[:_SHOWN_OF_A_REPLY] + "…"
        times = "" if asks == 1 else f" after {asks} asks"
        return StepError(f'program "{self.program.name}": step "{step.name}" cannot read {text!r}{times}: {reason}')

    async def _nest(
        self,
        program: Program[Any, Any],
        messages: str | Sequence[Message],
        *,
        emit: Emit | None,
        hand_on: bool = False,
    ) -> tuple[Run[Any], Any]:
        told = (Message("user", messages),) if isinstance(messages, str) else tuple(messages)
        request = Request(
            messages=told,
            documents=self.documents,
            hints=self.request.hints if hand_on else {},
            shape=self.request.shape if hand_on else {},
        )
        # Equal nested runs get draws of their own; so does one whose arguments differ, because it is another run.
        asked = hashlib.sha256(canonical([program.name, [m.wire() for m in told], program.given])).digest()
        self._draws[asked] += 1
        path = f"{self._path}/{program.name}.{asked.hex()[:8]}.{self._draws[asked] - 1}"
        try:
            params = program.read_params({})
        except InvalidRequest as error:
            # The client has not sent them, and could not put them right.
            raise ProgramError(f'program "{self.program.name}" runs another with wrong parameters: {error}') from None
        inner: Run[Any] = Run(
            program,
            request,
            id=self.id,
            cast=self._cast.nested(program),
            params=params,
            path=path,
            budget=self.budget,
            progress=self._progress,
            cache=self._cache,
            scope=self._scope,
            deadline=self.deadline,
            store=self._store,
            emit=emit,
            depth=self.depth + 1,
            journal=self._journal,
            now=self.now,
            plan=self._plan,
            meter=self.meter,
            witness=self._witness,
        )
        return inner, await execute(inner)

    async def _use(self, tool: Tool[..., Any], arguments: dict[str, Any], *, call_id: str | None) -> Any:
        with tracing.tool_span(tool.name, call_id=call_id, arguments=arguments) as span:
            if self._witness is None:
                result = await self._used(tool, arguments)
            else:
                result = await self._witness.tool(
                    self.id, self.program.name, tool, arguments, lambda: self._used(tool, arguments)
                )
            tracing.record_tool(span, result)
            return result

    async def _used(self, tool: Tool[..., Any], arguments: dict[str, Any]) -> Any:
        key = self._tool_key(tool, arguments) if tool.cache and self._store is not None else None
        if key is not None and self._store is not None and self._cache.mode in ("on", "only"):
            stored = _tool_result(await self._store.get(key))
            if stored is not None:
                return stored[0]
        if self._plan is not None:
            return await self._plan.stop(self.program.name, tool.name, "tool")
        if tool.effect:
            return await self._perform(tool, arguments)
        result = await _act(tool, arguments)
        if key is not None and self._store is not None and self._cache.mode in ("on", "refresh"):
            value = _stored_result(tool, result)
            await self._store.set(key, value, tag=tag(self.program.name, tool.name, self._scope))
        return result

    async def _perform(self, tool: Tool[..., Any], arguments: dict[str, Any]) -> Any:
        if self._journal is None:
            raise InvalidRequest(
                f'program "{self.program.name}" calls "{tool.name}", an effect that must not be repeated; send an '
                "Idempotency-Key header, new for each request and the same for its retries",
                param="Idempotency-Key",
                code="idempotency_key_required",
            )
        try:
            plain = tool.plain(arguments)
            asked = hashlib.sha256(canonical(["effect", tool.name, plain])).digest()
        except ValueError:
            raise ProgramError(
                f'tool "{tool.name}" has effect=True, so its arguments must be JSON, or what pydantic makes JSON of'
            ) from None
        self._draws[asked] += 1

        def act(key: str) -> Awaitable[Any]:
            return _act(tool, {**arguments, KEY_ARGUMENT: key} if tool.takes_key else arguments)

        place = f"{self._path}/{self._draws[asked] - 1}"
        return await self._journal.perform(tool.name, plain, place, act, repeatable=tool.takes_key)

    def _tool_key(self, tool: Tool[..., Any], arguments: dict[str, Any]) -> str:
        what = {"kind": "tool", "name": tool.name, "version": tool.version, "source": tool.digest}
        try:
            asked = canonical([KEY_VERSION, self._scope, what | {"arguments": tool.plain(arguments)}])
        except ValueError:
            raise ProgramError(
                f'tool "{tool.name}" has cache=True, so its arguments must be JSON, or what pydantic makes JSON of'
            ) from None
        return hashlib.sha256(asked).hexdigest()

    async def finish(self) -> None:
        """End what `start` began."""
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)


async def _act(tool: Tool[..., Any], arguments: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(tool.function):
        return await tool.function(**arguments)
    result = await asyncio.to_thread(tool.function, **arguments)
    return await result if inspect.isawaitable(result) else result


def _misfit(step: Step[..., Any, Any], args: Any, kwargs: Any) -> str | None:
    """What is wrong with the arguments of a step, if anything; without showing them."""
    try:
        inspect.signature(step.show).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def _jsonable(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError
    return dump(mode="json")


def _stored_result(tool: Tool[..., Any], result: object) -> bytes:
    """A tool's result as it is stored. Raises ProgramError where what comes back would not be what it was."""
    try:
        value = orjson.dumps({"v": 1, "result": result}, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    except orjson.JSONEncodeError:
        value = b""
    stored = _tool_result(value)
    if stored is None or stored[0] != result:
        raise ProgramError(
            f'tool "{tool.name}" has cache=True, so its result must be JSON as it is: text, finite numbers, lists, and '
            f"dictionaries with texts for keys; {type(result).__name__} is not, or holds something that is not"
        )
    return value


def _tool_result(data: bytes | None) -> tuple[Any] | None:
    if data is None:
        return None
    try:
        body = orjson.loads(data)
        return (body["result"],) if body["v"] == 1 else None
    except (ValueError, KeyError, TypeError):
        return None


def _answer(value: str | Answer) -> Answer:
    return value if isinstance(value, Answer) else Answer(text=value)


async def execute(run: Run[Any]) -> Any:
    """Run a program to its end, and hold it to its rules. Gives what the program returned.

    Raises AsmodelError, whatever the program itself raised; a limit gives `run.best` where there is one.
    """
    program = run.program
    if run.depth > DEPTH:
        raise ProgramError(
            f'program "{program.name}" is nested more than {DEPTH} deep; does a role lead back to the program itself?'
        )
    nested = run.depth > 0
    with (
        tracing.run_span(program.name, digest=program.digest, run_id=run.id, nested=nested) as span,
        run.meter.run(program.name, nested=nested) as timing,
    ):
        run.span = span
        tracing.record_asked(span, run.messages)
        try:
            answer = await _within_deadline(run)
        except LimitExceeded as error:
            best = run.best_so_far
            if best is None or run.replied is not None or run.streamed:
                raise
            log.info("run %s: %s; its best answer so far is returned", run.id, error)
            run.limited = True
            tracing.record_limited(span, error)
            tracing.record_answer(span, _answer(best).text, "length")
            timing.limited(error.param or "")
            # Of the type that the program returns, for the program that it may be nested in.
            return replace(best, finish="length") if isinstance(best, Answer) else best
        except AsmodelError:
            raise
        except Exception as error:
            fault = run._fault(error, "its code")  # pyright: ignore[reportPrivateUsage]  # the same noun
            log.error("%s\n%s", fault, "".join(traceback.format_tb(error.__traceback__)))
            raise fault from error
        finally:
            await run.finish()
            if run.depth == 0:
                tracing.record_run(span, run.budget)
        if not isinstance(answer, (str, Answer)):
            raise ProgramError(
                f'program "{program.name}" returned {type(answer).__name__}; a program returns text or an Answer'
            )
        if run.replied is not None and _answer(answer).text != run.replied.text:
            raise ProgramError(
                f'program "{program.name}" returned something else than its run.reply gave; that text has already '
                "been streamed, so return it unchanged, or make the last step with `await run(...)`"
            )
        whole = finished(run, answer)
        tracing.record_answer(span, whole.text, whole.finish, whole.tool_calls)
        return answer


async def _within_deadline(run: Run[Any]) -> Any:
    # A nested run ends with the run that it is in.
    ends = None if run.deadline is None or run.depth else run.deadline + _GRACE
    scope = asyncio.timeout_at(ends)
    try:
        async with scope:
            return await run.program.function(run)
    except TimeoutError:
        if scope.expired():
            raise DeadlineExceeded("the run's time was used up, outside of any step", param="seconds") from None
        raise


def finished(run: Run[Any], returned: str | Answer) -> Answer:
    """The answer as the wire wants it: the reply step's finish reason and tool calls belong to it."""
    answer = _answer(returned)
    if run.limited:
        return replace(answer, finish="length")
    if run.replied is None:
        return answer
    tool_calls = tuple(answer.tool_calls) or run.replied.tool_calls
    finish = answer.finish if answer.finish != "stop" else run.replied.finish
    return replace(answer, tool_calls=tool_calls, finish=finish)


_Can: TypeAlias = Callable[[Capabilities], bool]


def _needs(step: Step[..., Any, Any]) -> list[tuple[str, _Can]]:
    """What a step asks of whoever plays its role, and how it is called."""
    if step.kind == "score":
        return [("give the log-likelihood of given text", lambda can: can.loglikelihood)]
    shows = inspect.get_annotations(step.show).get("return")
    if shows is Prompt or (isinstance(shows, str) and shows.rpartition(".")[2] == Prompt.__name__):
        return [("continue raw text", lambda can: can.completion)]
    needs: list[tuple[str, _Can]] = [("chat", lambda can: can.chat)]
    if step.shape is not None:
        needs.append(("keep to a JSON schema", lambda can: can.schema))
    if step.options.get("tools"):
        needs.append(("call tools", lambda can: can.tools))
    return needs


async def require(
    program: Program[Any, Any],
    roles: Cast,
    *,
    seen: frozenset[str] = frozenset(),
    chain: tuple[str, ...] = (),
    params: object = None,
) -> None:
    """Refuse, before anything is bought, a program one of whose steps cannot be played by whoever plays its role.

    With the parameters of the run, only steps that these can lead to are looked at, where the program says which.

    Raises Unsupported naming program, step, role and upstream, and the upstreams that could; InvalidRequest where the
    roles lead in a circle.
    """
    for step in program.steps_with(params):
        player = roles.play(step.role)
        if isinstance(player, Played):
            await player.require(chain)
        can = await player.capabilities()
        for what, enough in _needs(step):
            if not enough(can) and isinstance(player, Detecting):
                can = await player.detect()
            if enough(can):
                continue
            others = ", ".join(f'"{name}"' for name in await roles.able(enough))
            raise Unsupported(
                f'program "{program.name}": step "{step.name}" needs an upstream that can {what}, and '
                f'"{name_of(player)}", which plays its role "{step.role}", cannot; '
                + (f'these can: {others} (set "{step.role}" under [roles])' if others else "none that is set can"),
                param="model",
                code="upstream_cannot",
            )
    for inner in program.programs:
        if inner.name not in seen:
            await require(inner, roles.nested(inner), seen=seen | {program.name, inner.name}, chain=chain)
