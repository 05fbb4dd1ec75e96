"""What a run was asked and answered, step by step, in a file of its own: to run it again with one thing changed.

    asked     the request, the program with its source's digest, and what it may spend; the first line
    path      one of the request's choices: where its draws are counted from
    models    the upstreams, with what they can do, and what the settings say of who plays which role
    step      a call, its key, and its reply, or the error that it ended in
    tool      a tool's arguments and its result
    count     how many tokens an upstream said that a text has
    answer    what the choice came to

One JSON object a line, `{"step": {...}}`, so a file that ends in the middle of a line is whole up to there: each line
is written before the program is given what it tells of, and survives the process. Everything is redacted before that,
and a call's key is that of the redacted call, by which a program that is asked the redacted question finds it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, cast

import orjson

from asmodel.budget import Limits
from asmodel.calls import (
    JSON,
    CacheMode,
    CachePolicy,
    Call,
    Capabilities,
    Chat,
    Completion,
    Document,
    Embed,
    Message,
    Reply,
    Score,
    Source,
    Terms,
    ToolCall,
    canonical,
    describe,
    key,
)
from asmodel.errors import AsmodelError, ConfigurationError
from asmodel.programs import Answer, Citation
from asmodel.protocols import Counting, Upstream
from asmodel.run import Played, Request
from asmodel.trace_content import Content, Kind, Redactor

if TYPE_CHECKING:
    from asmodel.models import Models, Told
    from asmodel.tools import Tool

VERSION = 1
SUFFIX = ".jsonl"

RUNS = 1000
BYTES = 256 * 2**20

T = TypeVar("T")

log = logging.getLogger("asmodel.recording")


class Unrecorded(ConfigurationError):
    """There is no recording of this run, or none that can be read; the message says how runs are recorded."""


class Witness(Protocol):
    """Stands between a run and what is outside of it: what its steps show, who answers them, and what its tools do."""

    def showing(self, program: str, step: str, call: Call) -> Call:
        """The call that the step is to make, given the one that it would."""
        ...

    async def send(self, role: str, upstream: Upstream, call: Call, terms: Terms) -> Reply: ...

    async def tool(
        self,
        run_id: str,
        program: str,
        tool: Tool[..., Any],
        arguments: dict[str, Any],
        act: Callable[[], Awaitable[T]],
    ) -> T | Any:
        """The tool's result; `act` calls it."""
        ...

    async def count(self, run_id: str, upstream: Counting, identity: str, text: str) -> int:
        """The tokens of a text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A run as it begins: all that is needed to begin it again."""

    run: str
    program: str
    digest: str
    """Of the program's source."""
    model: str
    """The name that was asked for: the program's, a preset's, a composition's."""
    request: Request
    params: Mapping[str, JSON]
    roles: Mapping[str, str]
    limits: Limits = Limits()
    cache: CachePolicy = CachePolicy()
    scope: str = ""
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    """What the program takes for the time of its start."""
    at: float = field(default_factory=time.time)
    """When it was recorded, in Unix seconds."""
    redacted: bool = False
    """Whether a redactor has been at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """A call and what came of it."""

    key: str
    program: str
    step: str
    role: str
    upstream: str
    call: Call
    number: int
    """In the order in which they were asked."""
    source: Source
    began_ns: int
    ended_ns: int
    reply: Reply | None
    error: Mapping[str, Any] | None
    """Where there is no reply: `type`, `message`, `param`, `code` and `retry_after` of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTool:
    """A tool that was called. Without `kept`, its result was nothing that JSON can carry."""

    key: str
    name: str
    digest: str
    kept: bool
    result: Any
    raised: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedUpstream:
    """An upstream that there was."""

    identity: str
    can: Capabilities
    counts: bool
    """Whether it can count tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording, read."""

    file: Path
    asking: Asking
    paths: Mapping[int, str]
    """By choice."""
    steps: Sequence[RecordedStep]
    tools: Sequence[RecordedTool]
    counts: Mapping[str, int]
    """By `count_key`."""
    upstreams: Mapping[str, RecordedUpstream]
    """By name."""
    told: Told
    """What the settings said of models."""
    answers: Mapping[int, Answer]
    errors: Mapping[int, Mapping[str, Any]]
    cut: bool
    """Whether it reached the limit of its size, and what followed is missing."""

    @property
    def whole(self) -> bool:
        """Whether the run came to its end while it was recorded."""
        ended = {*self.answers, *self.errors}
        return not self.cut and bool(ended) and ended == set(self.paths)


def default_folder(environ: Mapping[str, str]) -> Path:
    """`asmodel/recordings` in `$XDG_STATE_HOME`, or in `~/.local/state`."""
    state = environ.get("XDG_STATE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "asmodel" / "recordings"


class Recordings:
    """Records runs, each in a file of a private folder; the oldest files go when there are too many, or too large ones.

    `runs` are the files that are kept, `limit` the bytes that they may take together. A recording that cannot be
    written is given up with a warning: the run goes on.
    """

    def __init__(self, folder: Path, *, runs: int = RUNS, limit: int = BYTES, redact: Redactor | None = None) -> None:
        self.folder = folder
        self._runs = runs
        self._limit = limit
        self._hiding = None if redact is None else _Hiding(Content(redact=redact))
        self._active: dict[str, _Recorder] = {}
        self._warned = False

    async def keep(
        self, work: Awaitable[Answer], asking: Asking, models: Models, *, choice: int = 0, path: str = "0"
    ) -> Answer:
        """Await one choice of a run by these models, and record it meanwhile."""
        recorder = self._active.get(asking.run)
        if recorder is None:
            file = self.folder / f"{asking.run}{SUFFIX}"
            recorder = self._active[asking.run] = _Recorder(file, self._limit, self._warn)
        recorder.users += 1
        try:
            await recorder.begin(_asked_line(self._hidden(asking)), self._told(models), models, self._prune)
            await recorder.write("path", {"choice": choice, "path": path})
            try:
                answer = await work
            except AsmodelError as error:
                await recorder.write("answer", {"choice": choice, "error": self._error(error)})
                raise
            told = answer if self._hiding is None else self._hiding.answer(answer)
            await recorder.write("answer", {"choice": choice, **asdict(told)})
            return answer
        finally:
            if asyncio.iscoroutine(work):
                work.close()  # Never begun, where recording itself was cancelled.
            recorder.users -= 1
            if not recorder.users:
                del self._active[asking.run]
                recorder.close()

    def _warn(self, error: OSError) -> None:
        # Once, and not a line a run.
        level = logging.DEBUG if self._warned else logging.WARNING
        log.log(level, "runs cannot be recorded in %s (%s)", self.folder, error.strerror)
        self._warned = True

    def _hidden(self, asking: Asking) -> Asking:
        return asking if self._hiding is None else self._hiding.asking(asking)

    def _told(self, models: Models) -> Mapping[str, Any]:
        told = models.told
        if self._hiding is None:
            return told
        hide = partial(self._hiding.each, "input")
        presets = {name: {**preset, "params": hide(preset["params"])} for name, preset in told["presets"].items()}
        return {**told, "program_params": hide(told["program_params"]), "presets": presets}

    def _error(self, error: AsmodelError) -> dict[str, Any]:
        message = error.message if self._hiding is None else self._hiding.text("assistant", error.message)
        return {
            "type": type(error).__name__,
            "message": message,
            "param": error.param,
            "code": error.code,
            "retry_after": error.retry_after,
        }

    def _prune(self) -> None:
        """Make room. Blocks."""
        found: list[tuple[int, int, Path]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    with suppress(FileNotFoundError):  # Another process makes room too.
                        about = entry.stat(follow_symlinks=False)
                        found.append((about.st_mtime_ns, about.st_size, Path(entry.path)))
        found.sort()
        size = sum(each for _, each, _ in found)
        active = {f"{run}{SUFFIX}" for run in tuple(self._active)}
        left = len(found)
        for _, each, path in found:
            if left <= self._runs and size <= self._limit:
                return
            if path.name in active:
                continue
            path.unlink(missing_ok=True)
            left -= 1
            size -= each

    # A witness who changes nothing.

    def showing(self, program: str, step: str, call: Call) -> Call:
        return call

    async def send(self, role: str, upstream: Upstream, call: Call, terms: Terms) -> Reply:
        recorder = self._active.get(terms.run_id)
        if recorder is None:
            return await upstream.send(call, terms)
        if isinstance(upstream, Played):
            return await upstream.send(call, terms)  # Not recorded whole, as it is not stored whole: its steps are.
        line: dict[str, Any] = {"number": recorder.next(), "program": terms.program, "step": terms.step, "role": role}
        line |= {"upstream": _name(upstream), "began_ns": time.time_ns()}
        try:
            reply = await upstream.send(call, terms)
        except AsmodelError as error:
            line |= {"ended_ns": time.time_ns(), "source": "bought", "error": self._error(error)}
            await self._step(recorder, line, call, None, terms.scope)
            raise
        line |= {"ended_ns": time.time_ns(), "source": reply.source}
        await self._step(recorder, line, call, reply, terms.scope)
        return reply

    async def _step(
        self, recorder: _Recorder, line: dict[str, Any], call: Call, reply: Reply | None, scope: str
    ) -> None:
        try:
            if self._hiding is not None:
                asked, call = call, self._hiding.call(call)
                reply = None if reply is None else self._hiding.reply(asked, reply)
            line |= {"key": key(call, scope), "call": describe(call)}
            if reply is not None:
                line["reply"] = orjson.Fragment(reply.dump())
        except ValueError as error:
            # What it answers has been paid for, and the run has it.
            log.warning("a step of %s/%s is not recorded: %s", line["program"], line["step"], type(error).__name__)
            return
        await recorder.write("step", line)

    async def tool(
        self,
        run_id: str,
        program: str,
        tool: Tool[..., Any],
        arguments: dict[str, Any],
        act: Callable[[], Awaitable[T]],
    ) -> T:
        recorder = self._active.get(run_id)
        if recorder is None:
            return await act()
        line: dict[str, Any] = {"number": recorder.next(), "name": tool.name, "digest": tool.digest, "program": program}
        try:
            plain: JSON = tool.plain(arguments)
            if self._hiding is not None:
                plain = self._hiding.json("tool.arguments", plain)
            line |= {"arguments": plain, "key": tool_key(tool.name, plain)}
        except ValueError:
            return await act()  # What has no JSON form cannot be found again.
        try:
            result = await act()
        except Exception as error:
            await recorder.write("tool", {**line, "kept": False, "raised": type(error).__name__})
            raise
        kept, told = _told(tool, result)
        if kept and self._hiding is not None:
            told = self._hiding.json("tool.result", told)
        await recorder.write("tool", {**line, "kept": kept, "result": told, "raised": None})
        return result

    async def count(self, run_id: str, upstream: Counting, identity: str, text: str) -> int:
        tokens = await upstream.count(text)
        recorder = self._active.get(run_id)
        if recorder is not None:
            told = text if self._hiding is None else self._hiding.text("prompt", text)
            await recorder.write("count", {"key": count_key(identity, told), "tokens": tokens})
        return tokens


def tool_key(name: str, plain: JSON) -> str:
    return hashlib.sha256(canonical(["tool", name, plain])).hexdigest()


def count_key(identity: str, text: str) -> str:
    return hashlib.sha256(canonical(["count", identity, text])).hexdigest()


def _name(upstream: Upstream) -> str:
    name = getattr(upstream, "name", None)
    return name if isinstance(name, str) else upstream.identity


def result_of(tool: Tool[..., Any], told: Any) -> Any:
    """A tool's result out of a recording, of the type that the tool says it returns. Raises ValueError."""
    adapter = _adapter(tool)
    return told if adapter is None else adapter.validate_json(orjson.dumps(told))


def _told(tool: Tool[..., Any], result: object) -> tuple[bool, Any]:
    """Whether a result can be had again out of JSON, and that JSON."""
    adapter = _adapter(tool)
    try:
        told = orjson.loads(orjson.dumps(result) if adapter is None else adapter.dump_json(result, warnings=False))
        return (True, told) if result_of(tool, told) == result else (False, None)
    except (ValueError, TypeError):  # pydantic's and orjson's errors are of these.
        return False, None


def _adapter(tool: Tool[..., Any]) -> Any:
    import inspect

    from pydantic import PydanticUserError, TypeAdapter

    try:
        returns = inspect.get_annotations(tool.function, eval_str=True).get("return")
        return None if returns is None or returns is Any else TypeAdapter(returns)
    except (NameError, AttributeError, TypeError, PydanticUserError):
        return None


class _Recorder:
    """One file that grows by lines. Lines come from several threads."""

    def __init__(self, path: Path, limit: int, warn: Callable[[OSError], None]) -> None:
        self.users = 0
        self._path = path
        self._warn = warn
        self._limit = limit
        self._file: int | None = None
        self._size = 0
        self._given_up = self._closed = False
        self._begun: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        # Further choices of the request, in a recorder of their own, come after these.
        self._number = time.time_ns()

    def next(self) -> int:
        self._number += 1
        return self._number

    async def begin(
        self, line: Mapping[str, Any], told: Mapping[str, Any], models: Models, prune: Callable[[], None]
    ) -> None:
        """Open the file, once, whoever comes first. Further choices of a request add to it."""
        if self._begun is None:
            self._begun = asyncio.create_task(self._begin(line, told, models, prune))
        await asyncio.shield(self._begun)

    async def _begin(
        self, line: Mapping[str, Any], told: Mapping[str, Any], models: Models, prune: Callable[[], None]
    ) -> None:
        upstreams: dict[str, Any] = {}
        for name, upstream in models.upstreams.items():
            try:
                can = await upstream.capabilities()
            except Exception as error:  # Of a plug-in, which may be anybody's; the run may never ask it anything.
                log.info("what %s can do is not recorded: %s", name, type(error).__name__)
                can = Capabilities()
            counts = isinstance(upstream, Counting)
            upstreams[name] = {"identity": upstream.identity, "can": asdict(can), "counts": counts}
        about = {"upstreams": upstreams, "told": told}
        await asyncio.to_thread(self._open, line, about, prune)

    def _open(self, line: Mapping[str, Any], about: Mapping[str, Any], prune: Callable[[], None]) -> None:
        folder = self._path.parent
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if stat.S_IMODE(folder.stat().st_mode) & 0o077:
                folder.chmod(0o700)
            prune()
            # Not through a link: whoever could lay one in the folder could have it point anywhere.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            with self._lock:
                if self._closed:
                    return
                self._file = os.open(self._path, flags, 0o600)
                self._size = os.fstat(self._file).st_size
        except OSError as error:
            self._give_up(error)
            return
        if not self._size:
            self._write("asked", line)
            self._write("models", about)

    async def write(self, kind: str, line: Mapping[str, Any]) -> None:
        await asyncio.to_thread(self._write, kind, line)

    def _write(self, kind: str, line: Mapping[str, Any]) -> None:
        try:
            data = orjson.dumps({kind: line}) + b"\n"
        except TypeError as error:
            log.warning("a %s of %s is not recorded: %s", kind, self._path.stem, type(error).__name__)
            return
        with self._lock:
            if self._file is None or self._given_up:
                return
            if self._size + len(data) > self._limit:
                self._given_up = True
                data = b'{"cut":{}}\n'
                log.warning("the recording of %s is too large; it ends here ([recording] bytes)", self._path.stem)
            self._size += len(data)
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._given_up = True
        self._warn(error)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._closed = None, True


# --- redacting ------------------------------------------------------------------------------------------------------


class _Hiding:
    """Everything that is recorded, with each text in it as the redactor would have it."""

    def __init__(self, content: Content) -> None:
        self._content = content

    def text(self, kind: Kind, text: str) -> str:
        return self._content.text(kind, text)

    def each(self, kind: Kind, value: Any) -> Any:
        """The value with every text in it redacted; names of fields are none."""
        if isinstance(value, str):
            return self.text(kind, value)
        if isinstance(value, Mapping):
            inside = cast("Mapping[str, Any]", value)
            return {
                name: item if name == "type" else self.each(_KINDS.get(name, kind), item)
                for name, item in inside.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.each(kind, item) for item in cast("Sequence[Any]", value)]
        return value

    def json(self, kind: Kind, value: JSON) -> Any:
        """A value that a redactor is shown as JSON. Where it makes no JSON of it, it is a text from then on."""
        try:
            text = self.text(kind, orjson.dumps(value).decode())
        except TypeError:
            return self.each(kind, value)  # Of integers that are longer than orjson's.
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            return text

    def message(self, message: Message) -> Message:
        kind: Kind = "user"
        if message.role in ("system", "developer"):
            kind = "system"
        elif message.role == "assistant":
            kind = "assistant"
        elif message.role in ("tool", "function"):
            kind = "tool.result"
        return replace(
            message,
            content=self.each(kind, message.content),
            name=None if message.name is None else self.text("name", message.name),
            tool_calls=self.tool_calls(message.tool_calls),
            extra=self.each(kind, message.extra),
        )

    def tool_calls(self, calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
        return tuple(replace(call, arguments=self.text("tool.arguments", call.arguments)) for call in calls)

    def call(self, call: Call) -> Call:
        if isinstance(call, Chat):
            return replace(
                call,
                messages=tuple(map(self.message, call.messages)),
                params=self.each("input", call.params),
                schema=None if call.schema is None else self.json("tool.definition", dict(call.schema)),
                tools=tuple(self.json("tool.definition", dict(tool)) for tool in call.tools),
            )
        if isinstance(call, Completion):
            return replace(call, prompt=self.text("prompt", call.prompt), params=self.each("input", call.params))
        if isinstance(call, Score):
            context, continuation = self.text("context", call.context), self.text("continuation", call.continuation)
            return replace(call, context=context, continuation=continuation)
        return replace(
            call, texts=tuple(self.text("input", text) for text in call.texts), params=self.each("input", call.params)
        )

    def reply(self, call: Call, reply: Reply) -> Reply:
        said = self.text("completion" if isinstance(call, Completion) else "assistant", reply.text)
        tokens = reply.logprobs
        given = call.continuation if isinstance(call, Score) else reply.text
        seen = self.text("continuation", given) if isinstance(call, Score) else said
        if seen != given:
            # What was hidden in the text as a whole is not to be put together from its pieces.
            tokens = tuple(replace(token, token="", top=()) for token in tokens)
        return replace(
            reply,
            text=said,
            reasoning=self.text("reasoning", reply.reasoning) if reply.reasoning else "",
            refusal=None if reply.refusal is None else self.text("assistant", reply.refusal),
            tool_calls=self.tool_calls(reply.tool_calls),
            logprobs=tokens,
        )

    def answer(self, answer: Answer) -> Answer:
        return replace(
            answer,
            text=self.text("assistant", answer.text),
            citations=tuple(replace(c, text=self.text("assistant", c.text)) for c in answer.citations),
            data=self.each("assistant", answer.data),
            tool_calls=self.tool_calls(answer.tool_calls),
        )

    def asking(self, asking: Asking) -> Asking:
        asked = asking.request
        return replace(
            asking,
            redacted=True,
            params=self.each("input", asking.params),
            request=Request(
                messages=tuple(map(self.message, asked.messages)),
                documents=tuple(
                    Document(text=self.text("input", d.text), title=self.text("input", d.title), id=d.id)
                    for d in asked.documents
                ),
                hints=self.each("input", asked.hints),
                shape=self.each("tool.definition", asked.shape),
            ),
        )


_KINDS: Mapping[str, Kind] = {
    "stop": "stop",
    "user": "name",
    "safety_identifier": "name",
    "url": "uri",
    "reasoning_content": "reasoning",
}


# --- lines ----------------------------------------------------------------------------------------------------------


def _asked_line(asking: Asking) -> dict[str, Any]:
    request = asking.request
    return {
        "v": VERSION,
        "run": asking.run,
        "at": asking.at,
        "now": asking.now.isoformat(),
        "program": asking.program,
        "digest": asking.digest,
        "model": asking.model,
        "redacted": asking.redacted,
        "messages": [message.wire() for message in request.messages],
        "documents": [asdict(document) for document in request.documents],
        "hints": dict(request.hints),
        "shape": dict(request.shape),
        "params": dict(asking.params),
        "roles": dict(asking.roles),
        "limits": asdict(asking.limits),
        "cache": asdict(asking.cache),
        "scope": asking.scope,
    }


Line: TypeAlias = "dict[str, Any]"


def find(folder: Path, id: str) -> Path:
    """The recording of the run whose id begins so; `last` is the newest; a path that ends in `.jsonl` is itself.

    Raises Unrecorded where there is none, or more than one.
    """
    if id.endswith(SUFFIX) and Path(id).is_file():
        return Path(id)
    files: dict[str, int] = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                files[entry.name.removesuffix(SUFFIX)] = entry.stat(follow_symlinks=False).st_mtime_ns
    if id == "last" and files:
        return folder / f"{max(files, key=lambda run: files[run])}{SUFFIX}"
    wanted = id.strip().lower()
    found = [run for run in files if wanted and run.startswith(wanted)]
    if wanted in found:
        found = [wanted]
    if len(found) > 1:
        raise Unrecorded(f"{id!r} begins the ids of {len(found)} recorded runs: {', '.join(sorted(found)[:5])}")
    if not found:
        raise Unrecorded(unrecorded(id, folder))
    return folder / f"{found[0]}{SUFFIX}"


def unrecorded(id: str, folder: Path) -> str:
    return (
        f"the run {id!r} was not recorded: there is no recording of it in {folder}\n"
        "what a run was asked and answered is kept by `asmodel run --record`, or of every run by\n"
        "[recording]\non = true"
    )


def read(file: Path) -> Recording:
    """Read a recording, as far as it is whole. Raises Unrecorded for what is none."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise Unrecorded(f"{file} cannot be read: {error.strerror}") from None
    lines = data.split(b"\n")
    # Whatever follows the last line end was being written when its process ended.
    kinds: dict[str, list[Line]] = {}
    try:
        for line in lines[:-1]:
            for kind, body in cast("dict[str, Line]", orjson.loads(line)).items():
                kinds.setdefault(kind, []).append(body)
        asked = kinds["asked"][0]
        if asked["v"] != VERSION:
            raise Unrecorded(f"{file} is a recording of version {asked['v']}, and not of {VERSION}; record anew")
        answers = kinds.get("answer", [])
        return Recording(
            file=file,
            asking=_asking(asked),
            paths={line["choice"]: line["path"] for line in kinds.get("path", [])},
            steps=sorted(map(_step, kinds.get("step", [])), key=lambda step: step.number),
            tools=[_tool(line) for line in sorted(kinds.get("tool", []), key=lambda line: line["number"])],
            counts={line["key"]: line["tokens"] for line in kinds.get("count", [])},
            upstreams={name: _upstream(line) for name, line in kinds["models"][0]["upstreams"].items()},
            told=kinds["models"][0]["told"],
            answers={line["choice"]: _answer(line) for line in answers if "error" not in line},
            errors={line["choice"]: line["error"] for line in answers if "error" in line},
            cut="cut" in kinds,
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise Unrecorded(f"{file} is no recording of a run, or is damaged") from None


def _asking(line: Line) -> Asking:
    cache = line["cache"]
    mode = cast("CacheMode", cache["mode"])
    return Asking(
        run=line["run"],
        program=line["program"],
        digest=line["digest"],
        model=line["model"],
        request=Request(
            messages=tuple(map(_message, line["messages"])),
            documents=tuple(Document(**document) for document in line["documents"]),
            hints=line["hints"],
            shape=line["shape"],
        ),
        params=line["params"],
        roles=line["roles"],
        limits=Limits(**line["limits"]),
        cache=CachePolicy(mode=mode, ttl=cache["ttl"], max_age=cache["max_age"]),
        scope=line["scope"],
        now=datetime.fromisoformat(line["now"]),
        at=line["at"],
        redacted=line["redacted"],
    )


_FIELDS = {f.name for f in fields(Message)} - {"extra"}


def _message(body: Line) -> Message:
    calls = body.get("tool_calls") or ()
    return Message(
        role=body["role"],
        content=body["content"],
        name=body.get("name"),
        tool_calls=tuple(
            ToolCall(id=c["id"], name=c["function"]["name"], arguments=c["function"]["arguments"]) for c in calls
        ),
        tool_call_id=body.get("tool_call_id"),
        extra={name: value for name, value in body.items() if name not in _FIELDS},
    )


def _call(body: Line) -> Call:
    """The call that `describe` has described."""
    given = {name: value for name, value in body.items() if name != "kind"}
    kind = cast("Literal['chat', 'completion', 'score', 'embed']", body["kind"])
    if kind == "chat":
        messages = tuple(map(_message, given.pop("messages")))
        return Chat(messages=messages, tools=tuple(given.pop("tools")), **given)
    if kind == "completion":
        return Completion(**given)
    if kind == "score":
        return Score(**given)
    return Embed(texts=tuple(given.pop("texts")), **given)


def _step(line: Line) -> RecordedStep:
    reply = line.get("reply")
    return RecordedStep(
        key=line["key"],
        program=line["program"],
        step=line["step"],
        role=line["role"],
        upstream=line["upstream"],
        call=_call(line["call"]),
        number=line["number"],
        source=line["source"],
        began_ns=line["began_ns"],
        ended_ns=line["ended_ns"],
        reply=None if reply is None else Reply.load(orjson.dumps(reply)),
        error=line.get("error"),
    )


def _tool(line: Line) -> RecordedTool:
    return RecordedTool(
        key=line["key"],
        name=line["name"],
        digest=line["digest"],
        kept=line["kept"],
        result=line.get("result"),
        raised=line["raised"],
    )


def _upstream(line: Line) -> RecordedUpstream:
    return RecordedUpstream(identity=line["identity"], can=Capabilities(**line["can"]), counts=line["counts"])


def _answer(line: Line) -> Answer:
    return Answer(
        text=line["text"],
        citations=tuple(Citation(**c) for c in line["citations"]),
        data=line["data"],
        finish=line["finish"],
        tool_calls=tuple(ToolCall(**c) for c in line["tool_calls"]),
    )
