"""A recorded run, run again: with one thing changed, and what that does not touch taken from the recording.

A step whose call is the same, byte for byte, is answered from the recording; one that is not, by the cache or by its
upstream. Nothing is bought for a run that is unchanged. What a tool did is not done again: its recorded result is used,
and an effect of which there is none is an error.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from asmodel import errors, tracing
from asmodel.budget import Budget, Limits
from asmodel.calls import Call, Capabilities, Chat, Completion, Message, Reply, Score, Terms, Usage, key
from asmodel.errors import AsmodelError, ConfigurationError, InvalidRequest, ModelNotFound, ProgramError, UpstreamError
from asmodel.fingerprint import Fingerprints, differing
from asmodel.mistakes import did_you_mean
from asmodel.models import Model, Models, Preset, ServedProgram
from asmodel.programs import Answer, Program
from asmodel.protocols import Counting, Upstream
from asmodel.recording import (
    RecordedStep,
    RecordedTool,
    RecordedUpstream,
    Recording,
    count_key,
    default_folder,
    find,
    read,
    result_of,
    tool_key,
    unrecorded,
)
from asmodel.run import Played, Run, execute, finished, require
from asmodel.upstreams import replay as emit_whole

if TYPE_CHECKING:
    from rich.console import Console

    from asmodel.protocols import Cache
    from asmodel.settings import Settings
    from asmodel.tools import Tool
    from asmodel.trace_reader import Trace

T = TypeVar("T")

SHOWN = "{shown}"
"""In the text that replaces what a step shows, stands for what it showed before."""

How: TypeAlias = Literal["recorded", "cached", "bought", "failed"]


class NotRecorded(ProgramError):
    """A run that must not ask anybody asked something that was not recorded."""

    code: str | None = "not_recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one step shows instead: `step` is its name, or `program/step`."""

    step: str
    text: str

    def means(self, program: str, step: str) -> bool:
        return self.step in (step, f"{program}/{step}")

    def of(self, call: Call) -> Call:
        """The call with its prompt, its context, or the last message of its user replaced."""
        if isinstance(call, Completion):
            return replace(call, prompt=self._said(call.prompt))
        if isinstance(call, Score):
            return replace(call, context=self._said(call.context))
        if not isinstance(call, Chat):
            raise InvalidRequest(f'step "{self.step}" makes a {call.kind} call, whose prompt cannot be changed')
        messages = list(call.messages)
        places = [place for place, message in enumerate(messages) if message.role == "user"]
        if not places:
            return replace(call, messages=(*messages, Message("user", self._said(""))))
        last = messages[places[-1]]
        said = self._said(last.text)
        if last.content is None or isinstance(last.content, str):
            messages[places[-1]] = replace(last, content=said)
        else:
            others = [part for part in last.content if part.get("type") != "text"]
            messages[places[-1]] = replace(last, content=[{"type": "text", "text": said}, *others])
        return replace(call, messages=tuple(messages))

    def _said(self, shown: str) -> str:
        return self.text.replace(SHOWN, shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A step that the replay has made."""

    program: str
    step: str
    draw: str | None
    how: How
    changed: bool
    """Whether it is the one whose prompt is replaced."""
    began_ns: int
    ended_ns: int
    usage: Usage = Usage()
    cost: float | None = 0.0


class _AsRecorded(Budget):
    """Counts what the replay spends, and limits it by that and by what the recorded run spent on what is reused.

    A program that goes on until a limit ends it so comes as far as it did.
    """

    __slots__ = ("reused_calls", "reused_cost", "reused_usage")

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits=limits)
        self.reused_calls = 0
        self.reused_usage = Usage()
        self.reused_cost: float | None = 0.0

    def reuse(self, usage: Usage, cost: float | None) -> None:
        self.reused_calls += 1
        self.reused_usage += usage
        self.reused_cost = None if cost is None or self.reused_cost is None else self.reused_cost + cost

    def _whole(self) -> Budget:
        cost = None if self.cost is None or self.reused_cost is None else self.cost + self.reused_cost
        return Budget(
            limits=self.limits,
            started=self.started,
            calls=self.calls + self.reused_calls,
            usage=self.usage + self.reused_usage,
            cost=cost,
        )

    @property
    def left(self) -> Limits:
        return self._whole().left

    def admit(self) -> None:
        self._whole().admit()
        self.calls += 1


class Replaying:
    """The witness of a replay: answers what was asked before as it was answered then.

    `again` are the steps that failed and are to be asked again; without a change they fail as they did. `offline`
    asks nobody: what was not recorded is noted in `missed`, and raises NotRecorded.
    """

    def __init__(
        self, recording: Recording, *, change: Change | None = None, again: bool = False, offline: bool = False
    ) -> None:
        self.made: list[Made] = []
        self.missed: str | None = None
        self.budget = _AsRecorded(recording.asking.limits)
        self._recording = recording
        self._change = change
        self._again = again or change is not None
        self._offline = offline
        self._prints = Fingerprints(None)
        self._steps: dict[str, deque[RecordedStep]] = {}
        # Of a redacted recording: two calls that became equal have each a draw of the call that it was.
        self._drawless: dict[str, deque[RecordedStep]] = {}
        self._tools: dict[str, deque[RecordedTool]] = {}
        for step in recording.steps:
            self._steps.setdefault(step.key, deque()).append(step)
            if recording.asking.redacted:
                bare = key(_bare(step.call), recording.asking.scope)
                self._drawless.setdefault(bare, deque()).append(step)
        for tool in recording.tools:
            self._tools.setdefault(tool.key, deque()).append(tool)

    def total(self, how: How) -> int:
        return sum(step.how == how for step in self.made)

    @property
    def rows(self) -> list[tuple[str, str, Counter[How]]]:
        """Program, step, and how often it came by its answer which way; in the order in which they were first made."""
        rows: dict[tuple[str, str], Counter[How]] = {}
        for step in self.made:
            rows.setdefault((step.program, step.step), Counter())[step.how] += 1
        return [(*name, counts) for name, counts in rows.items()]

    # The witness

    def showing(self, program: str, step: str, call: Call) -> Call:
        if self._change is not None and self._change.means(program, step):
            return self._change.of(call)
        return call

    async def send(self, role: str, upstream: Upstream, call: Call, terms: Terms) -> Reply:
        if isinstance(upstream, Played):
            return await upstream.send(call, terms)
        began = time.time_ns()
        found = self._found(call, terms)
        how: How = "recorded"
        reply: Reply | None = None
        try:
            if found is not None:
                reply = found.reply
                if found.source == "bought" and (reply is not None or _is_of_upstream(found)):
                    self.budget.reuse(Usage() if reply is None else reply.usage, 0.0 if reply is None else reply.cost)
                if reply is None:
                    raise _error(found.error or {})
                if terms.emit is not None:
                    await emit_whole(reply, terms.emit)
                return reply
            if self._offline:
                raise self._miss(await self._unlike(call, terms))
            reply = await upstream.send(call, terms)
            how = "bought" if reply.source == "bought" else "cached"
            return reply
        except AsmodelError:
            how = "failed"
            raise
        finally:
            self.made.append(
                Made(
                    program=terms.program,
                    step=terms.step,
                    draw=_draw(call),
                    how=how,
                    changed=self._change is not None and self._change.means(terms.program, terms.step),
                    began_ns=began,
                    ended_ns=time.time_ns(),
                    usage=Usage() if reply is None else reply.usage,
                    cost=0.0 if reply is None else reply.cost,
                )
            )

    async def tool(
        self,
        run_id: str,
        program: str,
        tool: Tool[..., Any],
        arguments: dict[str, Any],
        act: Callable[[], Awaitable[T]],
    ) -> T | Any:
        try:
            found = _next(self._tools, tool_key(tool.name, tool.plain(arguments)))
        except ValueError:
            found = None
        if found is not None and found.kept and (self._offline or tool.effect or found.digest == tool.digest):
            try:
                return result_of(tool, found.result)
            except ValueError:
                pass  # The tool says by now that it returns something else.
        if found is None:
            why = "with these arguments it was not called in the recorded run"
        elif found.raised is not None:
            why = f"in the recorded run it ended with {found.raised}"
        else:
            why = "its recorded result is not what it returns now, or nothing that JSON can carry"
        if self._offline:
            raise self._miss(f'program "{program}": tool "{tool.name}" cannot be answered from the recording: {why}')
        if tool.effect:
            raise NotRecorded(
                f'program "{program}": tool "{tool.name}" has effects, which a replay does not repeat, and {why}'
            )
        return await act()

    async def count(self, run_id: str, upstream: Counting, identity: str, text: str) -> int:
        found = self._recording.counts.get(count_key(identity, text))
        if found is not None:
            return found
        if self._offline:
            raise self._miss(f'what "{identity}" counts as tokens of a text was not recorded of this text')
        return await upstream.count(text)

    # What was recorded

    def _found(self, call: Call, terms: Terms) -> RecordedStep | None:
        found = _next(self._steps, key(call, terms.scope))
        if found is None and self._drawless:
            found = _next(self._drawless, key(_bare(call), terms.scope))
        if found is not None and found.reply is None and self._again:
            return None
        return found

    def _miss(self, message: str) -> NotRecorded:
        self.missed = self.missed or message
        return NotRecorded(message)

    async def _unlike(self, call: Call, terms: Terms) -> str:
        what = f'program "{terms.program}": step "{terms.step}" asks what was not recorded'
        asked = [s for s in self._recording.steps if (s.program, s.step) == (terms.program, terms.step)]
        if not asked:
            others = sorted({s.step for s in self._recording.steps}) or ["none"]
            return f"{what}: there is no such step in the recording; there are {', '.join(others)}"
        own = await self._prints.of(call, terms.scope)
        nearest: list[str] | None = None
        for step in asked:
            parts = differing(await self._prints.of(step.call, self._recording.asking.scope), own)
            if nearest is None or len(parts) < len(nearest):
                nearest = parts
        return f"{what}: from the nearest of the {len(asked)} that were it differs in {', '.join(nearest or ())}"


E = TypeVar("E")


def _next(entries: Mapping[str, deque[E]], k: str) -> E | None:
    """The next of what was recorded under the key; the last of them for ever."""
    found = entries.get(k)
    if not found:
        return None
    return found.popleft() if len(found) > 1 else found[0]


def _draw(call: Call) -> str | None:
    return call.draw if isinstance(call, (Chat, Completion)) else None


def _bare(call: Call) -> Call:
    return replace(call, draw=None) if isinstance(call, (Chat, Completion)) else call


def _is_of_upstream(step: RecordedStep) -> bool:
    return isinstance(_error(step.error or {}), UpstreamError)


def _error(told: Mapping[str, Any]) -> AsmodelError:
    """The error that was recorded, of its own type."""
    kind: object = getattr(errors, str(told.get("type")), None)
    made: type[AsmodelError] = AsmodelError
    if isinstance(kind, type) and issubclass(kind, AsmodelError):
        made = kind
    message = str(told.get("message"))
    return made(message, param=told.get("param"), code=told.get("code"), retry_after=told.get("retry_after"))


# --- running it again -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What came of running a recorded run again."""

    recording: Recording
    choice: int
    id: str
    """Of the new run."""
    digest: str
    """Of the program's source now."""
    replaying: Replaying
    answer: Answer | None
    error: AsmodelError | None
    changed: tuple[str, ...] = ()
    """What was changed, in words."""
    began_ns: int = 0
    ended_ns: int = 0

    @property
    def recorded(self) -> str | None:
        """The text of the recorded answer; None where the run had none."""
        found = self.recording.answers.get(self.choice)
        return None if found is None else found.text

    @property
    def same(self) -> bool:
        """Whether it came to what it had come to: the same answer, or the same error."""
        if self.answer is not None:
            return self.answer == self.recording.answers.get(self.choice)
        told = self.recording.errors.get(self.choice)
        return told is not None and self.error is not None and told["type"] == type(self.error).__name__

    @property
    def well(self) -> bool:
        """Whether it ended as it should: as it did before, or with an answer where that was not to be expected."""
        return self.same or (self.answer is not None and bool(self.changed or self.edited or not self.recording.whole))

    @property
    def edited(self) -> bool:
        """Whether the program's file is another one by now."""
        return self.digest != self.recording.asking.digest


def _as_told(answer: Answer) -> Answer:
    """The answer with lists and tuples as a recording has them."""
    import orjson

    data = orjson.loads(orjson.dumps(answer.data))
    return replace(answer, citations=tuple(answer.citations), tool_calls=tuple(answer.tool_calls), data=data)


async def run_again(
    models: Models,
    recording: Recording,
    *,
    change: Change | None = None,
    upstream: str | None = None,
    choice: int = 0,
    store: Cache | None = None,
    offline: bool = False,
) -> Replay:
    """Run the recorded run again, by these models, with one step's prompt or the upstream of every role changed.

    Raises ConfigurationError or InvalidRequest where that cannot be begun; how the run ends is in what it returns.
    """
    asking = recording.asking
    replaying = Replaying(recording, change=change, again=upstream is not None, offline=offline)
    models = copy.copy(models)
    models.witness = replaying
    served = models.find(asking.model)
    if not isinstance(served, ServedProgram):
        raise ConfigurationError(f'"{asking.model}", which {recording.file.name} is a run of, is no program any more')
    if change is not None:
        _check_step(change, recording, served.program)
    changed: tuple[str, ...] = ()
    roles = dict(asking.roles)
    if change is not None:
        changed += (f'step "{change.step}" shows another text',)
    if upstream is not None:
        served, roles = _played_by(served, models.find(upstream)), {}
        changed += (f'"{upstream}" plays every role',)
    cast_ = models.cast(served, roles)
    if upstream is not None:
        await require(served.program, cast_)
    limits = asking.limits
    # "refresh" is for what is bought: here it is to be reused. What was not to be kept is not kept now either.
    policy = replace(asking.cache, mode="off" if asking.cache.mode == "off" else "on", max_age=None)
    run: Run[Any] = Run(
        served.program,
        asking.request,
        id=f"run_{secrets.token_hex(8)}",
        cast=cast_,
        params=served.program.read_params(asking.params),
        path=recording.paths.get(choice, str(choice)),
        budget=replaying.budget,
        cache=policy,
        scope=asking.scope,
        deadline=None if limits.seconds is None else asyncio.get_running_loop().time() + limits.seconds,
        store=store,
        now=asking.now,
        witness=models.witness,
    )
    answer: Answer | None = None
    error: AsmodelError | None = None
    began = time.time_ns()
    try:
        answer = _as_told(finished(run, await execute(run)))
    except AsmodelError as failure:
        error = failure
    return Replay(
        recording=recording,
        choice=choice,
        id=run.id,
        digest=served.program.digest,
        replaying=replaying,
        answer=answer,
        error=error,
        changed=changed,
        began_ns=began,
        ended_ns=time.time_ns(),
    )


def _check_step(change: Change, recording: Recording, program: Program[Any, Any]) -> None:
    known = {(s.program, s.step) for s in recording.steps} | {(program.name, s.name) for s in program.steps}
    if not any(change.means(*names) for names in known):
        steps = sorted({step for _, step in known})
        near = did_you_mean(change.step, steps) or f"; there are {', '.join(steps) or 'none'}"
        raise ConfigurationError(f'the recorded run has no step "{change.step}"{near}')


def _played_by(served: ServedProgram, player: Model) -> ServedProgram:
    """The program with another player of every role; in a composition, of the innermost program's."""
    inner = served.everyone
    return replace(served, everyone=_played_by(inner, player) if isinstance(inner, ServedProgram) else player)


# --- with nobody to ask ---------------------------------------------------------------------------------------------


class _Silent:
    """An upstream of a recording: as it was, and nobody is there."""

    count: Callable[[str], Awaitable[int]]

    def __init__(self, name: str, recorded: RecordedUpstream) -> None:
        self.name = name
        self._recorded = recorded
        if recorded.counts:
            self.count = self._counted

    @property
    def identity(self) -> str:
        return self._recorded.identity

    async def capabilities(self) -> Capabilities:
        return self._recorded.can

    async def send(self, call: Call, terms: Terms) -> Reply:
        raise NotRecorded(f'step "{terms.step}" asks the upstream "{self.name}", and there is only its recording')

    async def _counted(self, text: str) -> int:
        raise NotRecorded(f'the upstream "{self.name}" is not there to count tokens')


class _RecordedModels(Models):
    """The upstreams of a recording, with nobody there, and the programs that one has, under the settings of then."""

    def __init__(
        self, programs: Sequence[Program[Any, Any]], recording: Recording, tools: Sequence[Tool[..., Any]] = ()
    ) -> None:
        told = recording.told
        known = {program.name for program in programs}
        presets = {name: Preset(**preset) for name, preset in told["presets"].items()}
        self.missing: list[str] = []
        super().__init__(
            programs,
            {name: _Silent(name, upstream) for name, upstream in recording.upstreams.items()},
            presets={name: preset for name, preset in presets.items() if preset.program.partition(":")[0] in known},
            roles=told["roles"],
            program_roles={name: roles for name, roles in told["program_roles"].items() if name in known},
            program_params={name: params for name, params in told["program_params"].items() if name in known},
            tools={tool.name: tool for tool in tools},
        )

    def _found(self, name: str, where: str) -> None:
        """Not all that the settings named need be here: only what is asked for is missed."""

    def find(self, name: str, *, within: tuple[str, ...] = ()) -> Model:
        try:
            return super().find(name, within=within)
        except ModelNotFound:
            self.missing.append(
                f'the recorded run had a model "{name}", which is not here; give the programs that are part of it: '
                "replayed(…, programs=[…])"
            )
            raise NotRecorded(self.missing[-1]) from None


async def replayed(
    program: Program[Any, Any],
    file: Path | str,
    *,
    programs: Sequence[Program[Any, Any]] = (),
    tools: Sequence[Tool[..., Any]] = (),
    choice: int = 0,
    same: bool = True,
) -> Answer:
    """Run the program as it was recorded, with nobody to ask: each step and tool is answered from the recording.

    `programs` are others that played roles of it, `tools` those that it had of the settings; none is called. Raises
    AssertionError where something is asked that was not recorded, saying in what it differs; and, unless `same` is
    False, where the answer is not the recorded one, byte for byte. How the recorded run ended is how this one ends:
    with its AsmodelError, if it failed. Raises Unrecorded.
    """
    recording = read(Path(file))
    if recording.asking.program != program.name:
        raise AssertionError(f'{file} is a recording of "{recording.asking.program}", and not of "{program.name}"')
    others = {each.name: each for each in (*program.programs, *programs) if each.name != program.name}
    models = _RecordedModels([program, *others.values()], recording, tools)
    try:
        again = await run_again(models, recording, choice=choice, offline=True)
    except NotRecorded as error:
        raise AssertionError(f"{error} ({file})") from None
    missed = again.replaying.missed or next(iter(models.missing), None)
    if missed is not None:
        edited = "; the program's file has changed since it was recorded" if again.edited else ""
        raise AssertionError(f"{missed}{edited} ({file})")
    if same and not again.same:
        told = again.error or "another text, or other data"
        if again.answer is not None and again.recorded is not None and again.answer.text != again.recorded:
            told = "\n" + "\n".join(difference(again.recorded, again.answer.text))
        raise AssertionError(f'program "{program.name}" no longer answers as it was recorded ({file}): {told}')
    if again.error is not None:
        raise again.error
    assert again.answer is not None
    return again.answer


def difference(recorded: str, now: str) -> list[str]:
    """Lines of what differs, as `diff -u` has them; none where nothing does."""
    return list(difflib.unified_diff(recorded.split("\n"), now.split("\n"), "recorded", "replayed", n=2, lineterm=""))


# --- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A replay, and both runs as they are drawn."""

    replay: Replay
    a: Trace
    b: Trace
    nested: bool = field(default=True)
    """Whether both are the traces that were kept; without one, both are made of the steps alone."""


def command(
    settings: Settings, id: str, *, step: str | None = None, prompt: str | None = None, upstream: str | None = None
) -> Compared:
    """What `asmodel replay` does. Raises Unrecorded, ConfigurationError, InvalidRequest."""
    from asmodel import trace_reader
    from asmodel.app import build
    from asmodel.preparing import prepared
    from asmodel.trace_schema import default_path

    folder = settings.recording.path or default_folder(os.environ)
    traces = settings.traces.path or default_path(os.environ)
    recording = read(_file(folder, traces, id))
    change = None if step is None or prompt is None else Change(step=step, text=prompt)
    parts = build(settings)

    async def again() -> Replay:
        try:
            await parts.open()
            return await run_again(
                parts.models,
                recording,
                change=change,
                upstream=upstream,
                choice=min(recording.paths, default=0),
                store=parts.store,
            )
        finally:
            await parts.close()

    with prepared(parts):
        tracing_ = parts.trace()
        try:
            done = asyncio.run(again())
        finally:
            tracing_.shutdown()
    try:
        a, b = (trace_reader.spans(traces, run) for run in (recording.asking.run, done.id))
        return Compared(replay=done, a=a, b=b)
    except (trace_reader.NoSuchTrace, trace_reader.TraceFileUnreadable):
        return Compared(replay=done, a=_recorded_trace(done), b=_made_trace(done), nested=False)


def _file(folder: Path, traces: Path, id: str) -> Path:
    """The recording, by its own id or by that of its trace."""
    from asmodel import trace_reader
    from asmodel.recording import Unrecorded

    try:
        return find(folder, id)
    except Unrecorded as error:
        try:
            runs = sorted(run.run_id for run in trace_reader.spans(traces, id).runs if run.run_id)
        except (trace_reader.NoSuchTrace, trace_reader.TraceFileUnreadable):
            raise error from None
        for run in runs:
            try:
                return find(folder, run)
            except Unrecorded:
                continue
        raise Unrecorded(unrecorded(next(iter(runs), id), folder)) from None


def _recorded_trace(replay: Replay) -> Trace:
    recording = replay.recording
    made = [
        Made(
            program=step.program,
            step=step.step,
            draw=_draw(step.call),
            how="failed" if step.reply is None else "bought" if step.source == "bought" else "cached",
            changed=False,
            began_ns=step.began_ns,
            ended_ns=step.ended_ns,
            usage=Usage() if step.reply is None else step.reply.usage,
            cost=0.0 if step.reply is None else step.reply.cost,
        )
        for step in recording.steps
    ]
    begin = int(recording.asking.at * 1e9)
    failed = replay.choice in recording.errors
    return _flat(recording.asking.run, recording.asking, made, begin, failed=failed, digest=recording.asking.digest)


def _made_trace(replay: Replay) -> Trace:
    return _flat(
        replay.id,
        replay.recording.asking,
        replay.replaying.made,
        replay.began_ns,
        failed=replay.error is not None,
        digest=replay.digest,
    )


def _flat(run: str, asking: Any, made: Sequence[Made], begin: int, *, failed: bool, digest: str) -> Trace:
    """A trace of the steps alone: which program asked which other is not in a recording."""
    from asmodel.trace_reader import Node, RunRow, Trace

    root = "0" * 16
    results = {"recorded": "hit", "cached": "hit", "bought": "miss"}
    steps: list[Node] = []
    for number, step in enumerate(sorted(made, key=lambda step: step.began_ns), start=1):
        attributes: dict[str, Any] = {tracing.STEP_NAME: step.step, tracing.STEP_PROGRAM: step.program}
        if step.how in results:
            attributes[tracing.CACHE_RESULT] = results[step.how]
        if step.draw is not None:
            attributes[tracing.STEP_DRAW] = step.draw
        steps.append(
            Node(
                span_id=f"{number:016x}",
                parent_id=root,
                name=f"step {step.step}",
                kind="internal",
                start_ns=step.began_ns,
                end_ns=step.ended_ns,
                failed=step.how == "failed",
                attributes=attributes,
            )
        )
    ended = max((step.ended_ns for step in made), default=begin)
    begin = min([begin, *(step.began_ns for step in made)])
    bought = [step for step in made if step.how == "bought"]
    costs = [step.cost for step in bought]
    row = RunRow(
        trace_id="",
        span_id=root,
        root=root,
        run_id=run,
        program=asking.program,
        model=asking.model,
        started=begin / 1e9,
        seconds=(ended - begin) / 1e9,
        outcome="error" if failed else "ok",
        error=None,
        steps=len(made),
        hits=sum(step.how in ("recorded", "cached") for step in made),
        joined=0,
        calls=len(bought),
        input_tokens=sum(step.usage.prompt_tokens for step in bought),
        output_tokens=sum(step.usage.completion_tokens for step in bought),
        cost=None if None in costs else sum(cost for cost in costs if cost is not None),
    )
    node = Node(
        span_id=root,
        parent_id=None,
        name=f"invoke_workflow {asking.program}",
        kind="internal",
        start_ns=begin,
        end_ns=ended,
        failed=failed,
        attributes={tracing.RUN_ID: run, tracing.RUN_PROGRAM: asking.program, tracing.RUN_DIGEST: digest},
        children=tuple(steps),
    )
    return Trace(trace_id="", runs=(row,), roots=(node,))


def replay_json(done: Compared) -> dict[str, Any]:
    """The replay as JSON."""
    from asmodel import trace_compare

    replay = done.replay
    replaying = replay.replaying
    told = replay.recording.errors.get(replay.choice)
    return {
        "recorded_run": replay.recording.asking.run,
        "run": replay.id,
        "program": replay.recording.asking.program,
        "changed": list(replay.changed),
        "digest": {"recorded": replay.recording.asking.digest, "now": replay.digest},
        "whole": replay.recording.whole,
        "redacted": replay.recording.asking.redacted,
        "steps": {
            "reused": replaying.total("recorded"),
            "cached": replaying.total("cached"),
            "bought": replaying.total("bought"),
            "failed": replaying.total("failed"),
        },
        "answer": {
            "recorded": replay.recorded,
            "replayed": None if replay.answer is None else replay.answer.text,
            "same": replay.same,
        },
        "error": {
            "recorded": None if told is None else told["message"],
            "replayed": None if replay.error is None else replay.error.message,
        },
        "comparison": trace_compare.comparison_json(done.a, done.b),
    }


def draw_replay(done: Compared, *, everything: bool = False, console: Console | None = None) -> None:
    """Print what was changed, both trees side by side, how the steps came by their answers, and both answers."""
    from rich.text import Text

    from asmodel import trace_compare
    from asmodel import trace_words as words
    from asmodel.trace_view import terminal

    console = terminal(console)
    replay, replaying = done.replay, done.replay.replaying
    asking = replay.recording.asking

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=False)

    say(f"{asking.run}, replayed as {replay.id}: {', '.join(replay.changed) or 'nothing is changed'}", "bold")
    if replay.edited:
        say(f"The program's file has changed since it was recorded: {asking.digest}, now {replay.digest}.", "yellow")
    if not replay.recording.whole:
        say("The recording ends before the run did; what followed was not recorded.", "yellow")
    if asking.redacted:
        say("It was redacted when it was recorded: where that changed a text, the replay has the changed one.", "dim")
    console.print()
    trace_compare.draw_comparison(done.a, done.b, everything=everything, console=console)
    if not done.nested:
        say("\nThe trace of one of them is not kept, so only their steps are compared.", "dim")
    console.print()
    failed = replaying.total("failed")
    say(
        f"{len(replaying.made)} calls of steps: {replaying.total('recorded')} reused from the recording, "
        f"{replaying.total('cached')} from the cache, {replaying.total('bought')} bought"
        + (f", {failed} failed" if failed else ""),
        "bold",
    )
    for _, step, counts in replaying.rows:
        others = {how: count for how, count in counts.items() if how != "recorded"}
        if others:
            say(f"  {words.clean(step)}: " + ", ".join(f"{count} {how}" for how, count in others.items()), "yellow")
    console.print()
    _draw_answers(replay, say)


def _draw_answers(replay: Replay, say: Callable[..., None]) -> None:
    from asmodel import trace_words as words

    def shown(text: str) -> str:
        return "\n".join(map(words.clean, text.split("\n")))

    recorded, answer = replay.recorded, replay.answer
    told = replay.recording.errors.get(replay.choice)
    if told is not None:
        say(f"The recorded run failed: {shown(str(told['message']))}", "yellow")
    if replay.error is not None:
        say(f"The replay failed{' the same way' if replay.same else ''}: {shown(replay.error.message)}", "red")
    if answer is None:
        return
    if replay.same:
        say("The answer is the same, byte for byte:", "green")
        say(shown(answer.text))
        return
    if recorded is None:
        say("The answer, where the recorded run had none:", "yellow")
        say(shown(answer.text))
        return
    if recorded == answer.text:
        say("The text of the answer is the same; its citations, data or finish reason are not:", "yellow")
        say(shown(answer.text))
        return
    say("The answers differ:", "yellow")
    for line in difference(recorded, answer.text):
        say(shown(line), {"-": "red", "+": "green", "@": "cyan"}.get(line[:1], ""))
