"""The routes of the front page: its files, read once, and the data that it asks for, which want a key if there is any.

The page itself holds nothing and is given to whoever asks; a browser that opens it cannot show a key. What it then
fetches is let in as any other request is. What takes time (the file of runs, the drawing of one) is done in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import orjson
from starlette.types import Receive, Scope, Send

from asmodel import __version__, trace_html, trace_reader, tracing
from asmodel.access import Access
from asmodel.errors import AsmodelError, Forbidden, InvalidRequest
from asmodel.exchange import Exchange
from asmodel.models import Model, Models, ServedProgram
from asmodel.trace_content import VARIABLE
from asmodel.trace_reader import NoSuchTrace, Of, RunRow, Trace, TraceFileUnreadable

P = ParamSpec("P")

log = logging.getLogger("asmodel")

RUNS = 50
"""How many runs are listed."""
SOON = 1.0
"""Seconds that a run which is not in the file is waited for."""
LOOK_EVERY = 0.1

WITHOUT_CONTENT = frozenset((*tracing.CONTENT, tracing.REQUEST_STOP))
"""What is not read from the file where content is not captured now, whoever recorded it before."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The one place where the page makes elements of text: the server's own drawing of a run.
        "require-trusted-types-for 'script'",
        "trusted-types drawing",
    )
)
SAFELY: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_ID = re.compile(r"[0-9a-f]{32}|[0-9A-Za-z_.-]{6,80}")


class NoSuchRun(InvalidRequest):
    status = 404
    code: str | None = "run_not_found"


class RunsUnreadable(AsmodelError):
    """The file of runs cannot be read; the log says why, and where it is."""

    status = 503
    code: str | None = "runs_unreadable"


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    type: str
    tag: str


def _file(name: str, data: bytes) -> _File:
    return _File(data, _TYPES[Path(name).suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')


class FrontPage:
    """The routes as one ASGI application. To make it reads files and looks into programs: not on the event loop."""

    def __init__(
        self,
        models: Models,
        access: Access,
        notes: Mapping[str, Mapping[str, Any]],
        *,
        traces: Path | None,
        jaeger: str | None,
        content: bool,
        routes: Sequence[tuple[str, str]],
    ) -> None:
        """`notes` say by name what kind of upstream one is; `content`, whether it is captured; `routes` are all there
        are, for those who ask without a browser."""
        self._access = access
        self._traces = traces
        self._jaeger = None if jaeger is None else jaeger.rstrip("/")
        self._without = frozenset[str]() if content else WITHOUT_CONTENT
        # One at a time: however many pages are open, those who answer have the rest of the processor.
        self._turn = asyncio.Lock()
        folder = Path(__file__).parent
        self._files = {
            **{name: _file(name, (folder / name).read_bytes()) for name in ("page.html", "page.css", "page.js")},
            "trace.css": _file("trace.css", trace_html.STYLE.encode()),
            "icon.svg": _file("icon.svg", (folder / "icon.svg").read_bytes()),
        }
        self._routes = {
            "object": "server",
            "description": "asmodel: LLM programs served as models; open this address in a browser",
            "routes": [
                f"{method} {path.replace(':path}', '}')}"
                for method, path in routes
                if method != "HEAD" and not path.startswith("/front/")
            ],
        }
        self._about: dict[str, Any] = {
            "version": __version__,
            "keys": not access.open,
            "runs_kept": traces is not None,
            "content": content,
            "content_variable": VARIABLE,
            "jaeger": self._jaeger,
            "models": [_told(models, notes, model) for model in models.all()],
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(exchange, scope["path_params"])
        except AsmodelError as error:
            await exchange.refuse(error)

    async def _answer(self, exchange: Exchange, given: Mapping[str, str]) -> None:
        if self._access.open:
            # The page is nobody's secret, but a foreign name for this machine is not to be taken for it.
            self._access.admit(exchange.headers)
        path, name = exchange.path, given.get("name", "")
        if path == "/" and "text/html" not in exchange.headers.get("accept", ""):
            await exchange.respond(200, self._routes, {"vary": "accept", **SAFELY})
        elif path == "/" or path.startswith("/runs/"):
            await self._send(exchange, self._files["page.html"], {"content-security-policy": POLICY, "vary": "accept"})
        elif name in self._files and name != "page.html":
            await self._send(exchange, self._files[name])
        else:
            _refuse_others(exchange.headers)
            exchange.admit(self._access)
            of = Of(None if self._access.open else exchange.caller.scope)
            if name == "about":
                data = orjson.dumps({**self._about, "caller": exchange.caller.name})
            elif name == "runs":
                data = await self._in_turn(self._runs, of)
            elif "id" in given:
                data = await self._soon(given["id"], of)
            else:
                raise NoSuchRun(f"there is no {path[:200]}")
            await exchange.send(200, data, {"cache-control": "no-store", **SAFELY})

    async def _send(self, exchange: Exchange, file: _File, more: Mapping[str, str] | None = None) -> None:
        # Asked for each time, since another version of the server may answer next; it is not sent each time.
        headers = {"etag": file.tag, "cache-control": "no-cache", **SAFELY, **(more or {})}
        if file.tag in exchange.headers.get("if-none-match", ""):
            await exchange.start(304, headers)
            await exchange.write(b"", last=True)
            return
        await exchange.start(200, {"content-type": file.type, "content-length": str(len(file.data)), **headers})
        await exchange.write(file.data, last=True)

    async def _soon(self, id: str, of: Of) -> bytes:
        """The run. What has just been answered is in the file a moment later, and its page may be opened before."""
        patience = time.monotonic() + SOON
        while True:
            try:
                return await self._in_turn(self._run, id, of)
            except NoSuchRun:
                if self._traces is None or time.monotonic() > patience:
                    raise
            await asyncio.sleep(LOOK_EVERY)

    async def _in_turn(self, read: Callable[P, dict[str, Any]], *args: P.args, **kwargs: P.kwargs) -> bytes:
        def written() -> bytes:
            return orjson.dumps(read(*args, **kwargs))

        async with self._turn:
            try:
                return await asyncio.to_thread(written)
            except TraceFileUnreadable as error:
                log.warning("%s", error)
                raise RunsUnreadable("the file of runs cannot be read; the server's log says why") from None

    def _runs(self, of: Of) -> dict[str, Any]:
        found = [] if self._traces is None else trace_reader.runs(self._traces, RUNS, of=of)
        return {"runs": [_row(run) for run in found]}

    def _run(self, id: str, of: Of) -> dict[str, Any]:
        unknown = NoSuchRun("there is no such run, or it is kept no longer, or it is another's")
        if self._traces is None or not _ID.fullmatch(id):
            raise unknown
        try:
            trace = trace_reader.spans(self._traces, id, of=of, without=self._without)
        except NoSuchTrace:
            raise unknown from None
        if not _is(trace, id):
            raise unknown
        running = any(run.outcome == "running" for run in trace.runs)
        return {
            "title": trace_html.title(trace),
            "trace_id": trace.trace_id,
            "running": running,
            "html": trace_html.drawing(trace, now_ns=time.time_ns() if running else None),
        }


def _is(trace: Trace, id: str) -> bool:
    """Whether it is meant by its whole id; the reader takes beginnings too."""
    return id == trace.trace_id or any(run.run_id == id for run in trace.runs)


def _refuse_others(headers: Mapping[str, str]) -> None:
    """Browsers say whose page a request is for; these are for ours. What has no browser says nothing."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Forbidden("this is for the server's own page")


def _row(run: RunRow) -> dict[str, Any]:
    return {
        "id": run.run_id or run.trace_id,
        "trace_id": run.trace_id,
        "span_id": run.span_id,
        "name": run.name,
        "program": run.program is not None,
        "started": run.started,
        "seconds": run.seconds,
        "outcome": run.outcome,
        "error": run.error,
        "steps": run.steps,
        "hits": run.hits + run.joined,
        "calls": run.calls,
        "tokens": run.input_tokens + run.output_tokens,
        "cost": run.cost,
    }


def _told(models: Models, notes: Mapping[str, Mapping[str, Any]], model: Model) -> dict[str, Any]:
    """What the page shows of a model. Of what is settled only the names: values may be long, or private."""
    if not isinstance(model, ServedProgram):
        return {"id": model.name, "kind": "upstream", "description": model.description, **notes.get(model.name, {})}
    program = model.program
    cast = models.cast(model)
    roles: list[dict[str, str | None]] = []
    for role in sorted({step.role for step in program.steps}):
        try:
            player: str | None = cast.who(role).name
        except AsmodelError:
            player = None
        roles.append({"role": role, "player": player})
    return {
        "id": model.name,
        "kind": "program" if model.name == program.name else "preset",
        "own": program.function.__module__.startswith("programs."),
        "program": program.name,
        "description": model.description,
        "supports": sorted(program.supports),
        "params": program.params.model_json_schema() if program.params else None,
        "settled": sorted({**program.given, **model.params}),
        "roles": roles,
        "digest": program.digest,
    }
