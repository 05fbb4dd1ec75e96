"""The one place where everything meets: settings become plug-ins, the onion, models, a service, and an application.

Importing this does nothing; `create_app(settings)` builds, and the application's lifespan opens and closes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asmodel import __version__, trace_content, tracing
from asmodel.access import Access
from asmodel.admission import Admitted, Room
from asmodel.chat import Asking, ChatCompletions
from asmodel.completions import Completions, Embeddings
from asmodel.errors import AsmodelError, ConfigurationError, InvalidRequest
from asmodel.exchange import Enveloped
from asmodel.folders import load_folders
from asmodel.leading import Led
from asmodel.measuring import Measured, MetricsPage
from asmodel.meter import UNMEASURED, Meter
from asmodel.metrics import Metrics, folder_of_workers, reporting
from asmodel.models import Models, Preset, ServedProgram
from asmodel.passing import Passage
from asmodel.plugins import find, make, names, resolve
from asmodel.programs import Program, programs_in
from asmodel.protocols import Cache, Lasting, Offering, Openable, Upstream
from asmodel.recording import Recordings, default_folder
from asmodel.response_store import ResponseStore
from asmodel.response_store import default_folder as responses_folder
from asmodel.responses import KeptResponses, KeptRoute, Responses
from asmodel.routes import Contract, Later, ModelList, Probe, alive, not_there, readiness
from asmodel.service import Service
from asmodel.settings import CacheSettings, Settings, ToolSettings, UpstreamSettings
from asmodel.tools import Tool
from asmodel.upstreams import Cached, Flights, Limited, Metered, Price, Retried, Routed, Timed

if TYPE_CHECKING:
    from asmodel.trace_content import Redactor
    from asmodel.trace_export import Tracing

log = logging.getLogger("asmodel")

ENDING = 5.0
"""Seconds that requests which are cut off have to end their steps and say so."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What settings come to: built, and not yet opened."""

    settings: Settings
    models: Models
    service: Service
    access: Access
    store: Cache | None
    journals: Cache | None
    """Where programs with effects keep their journals; None where there are none, or no place for them."""
    metrics: Metrics
    providers: Mapping[str, Upstream]
    """The plug-ins themselves, by upstream."""
    tools: Mapping[str, Offering] = field(default_factory=dict[str, Offering])
    """And those that offer the tools of the settings."""
    responses: ResponseStore | None = None
    """Where responses are kept that clients may go on from; None where none are."""
    redact: Redactor | None = None
    """What each text goes through before it is recorded, where content is."""

    def trace(self) -> Tracing:
        """Set tracing up, as the settings and the `OTEL_*` variables say. The caller shuts down what this returns."""
        traces = self.settings.traces
        return tracing.configure(
            local=traces.path if traces.local else None,
            redact=self.redact,
            content_bytes=traces.content_bytes,
            hosts=traces.hosts,
        )

    async def open_store(self) -> None:
        """Open the cache, which takes milliseconds and must be there before anything is answered."""
        stores: list[object] = [self.store, self.journals]
        for store in stores:
            if isinstance(store, Openable):
                await store.open()

    async def open_upstreams(self) -> None:
        """Open every upstream and tool, side by side, which may take seconds; then the service answers."""
        things: list[object] = [*self.providers.values(), *self.tools.values()]
        await asyncio.gather(*(thing.open() for thing in things if isinstance(thing, Openable)))
        self.service.ready.set()

    async def open(self) -> None:
        await self.open_store()
        await self.open_upstreams()

    async def close(self) -> None:
        stores: list[object] = [self.responses, self.journals, self.store]
        things: list[object] = [*self.tools.values(), *self.providers.values(), *stores]
        closing = [thing.close() for thing in things if isinstance(thing, Openable)]
        for failed in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(failed, BaseException):
                log.warning("while closing: %s", type(failed).__name__)


def all_programs(folders: Sequence[Path]) -> list[Program[Any, Any]]:
    """The programs of installed packages and of folders. Raises ConfigurationError for what does not load."""
    programs: list[Program[Any, Any]] = []
    for name in names("programs"):
        found = resolve("programs", name)
        if isinstance(found, Program):
            programs.append(found)  # pyright: ignore[reportUnknownArgumentType]  # of any parameters
        elif hasattr(found, "__dict__"):
            programs += programs_in(cast("Any", found))
    modules = load_folders(folders)
    for module in modules:
        defined = programs_in(module)
        if not defined:
            log.warning("%s defines no program", module.__file__)
        programs += defined
    return programs


def _provider(name: str, settings: UpstreamSettings, where: str) -> Upstream:
    made = make(
        "upstreams",
        settings.kind,
        settings.plugin_options,
        where=where,
        beside=UpstreamSettings.model_fields,
        name=name,
        connect_timeout=settings.connect_timeout,
    )
    if not callable(getattr(made, "send", None)):
        raise ConfigurationError(f'{where}: the plug-in "{settings.kind}" makes no upstream: it has no `send`')
    return cast("Upstream", made)


def _tool(name: str, settings: ToolSettings) -> Offering:
    """Raises ConfigurationError where the plug-in offers no tool, or one that must not be done twice."""
    where = f"tools.{name}"
    made = make("tools", settings.kind, settings.options, where=where, beside=ToolSettings.model_fields, name=name)
    offered = getattr(made, "tool", None)
    if not isinstance(offered, Tool):
        raise ConfigurationError(f'{where}: the plug-in "{settings.kind}" offers no tool')
    if cast("Tool[..., Any]", offered).effect:
        raise ConfigurationError(
            f"{where}: its tool has effects, and a program's effects are declared in its own code (@tool(effect=True))"
        )
    return cast("Offering", made)


def onion(
    providers: Mapping[str, Upstream],
    settings: Mapping[str, UpstreamSettings],
    store: Cache | None,
    meter: Meter = UNMEASURED,
) -> dict[str, Upstream]:
    """Wrap each provider: Cached > Routed > Metered > Retried > Led > Limited > Timed > provider."""
    called: dict[str, Upstream] = {}
    for name, s in settings.items():
        timed = Timed(providers[name], name=name, first_byte=s.first_byte_timeout, total=s.timeout)
        limited = Limited(timed, slots=s.concurrency, name=name, meter=meter)
        # Inside of what tries again, so that what an unwanted stream has brought does not forbid it.
        retried = Retried(Led(limited), retries=s.retries, name=name, meter=meter)
        base_url, model = str(s.options.get("base_url") or ""), str(s.options.get("model") or s.kind)
        address = urlsplit(base_url).netloc or None
        provider = model.partition("/")[0] if s.kind == "litellm" and "/" in model else s.kind
        p = s.price
        price = None if p is None else Price(input=p.input, output=p.output, cached_input=p.cached_input)
        called[name] = Metered(
            retried,
            name=name,
            provider=provider,
            model=model,
            address=address,
            price=price,
            meter=meter,
            slots=s.concurrency,
        )
    # One book of what is in flight: two names of one model buy one answer.
    flights = Flights()
    made: dict[str, Upstream] = {}
    for name, s in settings.items():
        equals = [called[name], *(called[equal] for equal in s.equals)]
        inner = Routed(equals, meter=meter) if len(equals) > 1 else equals[0]
        made[name] = Cached(inner, store, flights, meter=meter)
    return made


def _cache(settings: CacheSettings) -> Cache | None:
    if settings.kind == "off":
        return None
    made = make("caches", settings.kind, settings.options, where="cache", beside=CacheSettings.model_fields)
    return cast("Cache", made)


@asynccontextmanager
async def open_cache(settings: Settings) -> AsyncGenerator[Cache]:
    """The cache alone, open. Raises ConfigurationError, where it is off too."""
    store = _cache(settings.cache)
    if store is None:
        raise ConfigurationError("[cache] kind is off: there is nothing to see")
    life: object = store
    if isinstance(life, Openable):
        await life.open()
    try:
        yield store
    finally:
        if isinstance(life, Openable):
            await life.close()


def _recordings(settings: Settings, redact: Redactor | None) -> Recordings | None:
    """Who records runs: as the settings say, or where the content of traces is captured; None where nobody does."""
    said = settings.recording
    if not (trace_content.read(os.environ) is not None if said.on is None else said.on):
        return None
    return Recordings(said.path or default_folder(os.environ), runs=said.runs, limit=said.bytes, redact=redact)


def _responses(settings: Settings) -> ResponseStore | None:
    said = settings.store
    if said.kind == "off":
        return None
    return ResponseStore(said.path or responses_folder(os.environ), days=said.days, most_bytes=said.bytes)


def build(settings: Settings, *, metrics_folder: Path | None = None) -> Parts:
    """Make everything that the settings name. Raises ConfigurationError; opens nothing.

    `metrics_folder` is where the processes of one server add up their metrics.
    """
    metrics = Metrics(metrics_folder, version=__version__)
    upstreams = settings.effective_upstreams
    providers = {name: _provider(name, s, f"upstreams.{name}") for name, s in upstreams.items()}
    programs = all_programs(settings.program_folders)
    tools = {name: _tool(name, s) for name, s in settings.tools.items()}
    store = _cache(settings.cache)
    made: object = store
    journals: Cache | None = None
    if (troubles := getattr(made, "troubles", None)) is not None:
        metrics.watch(settings.cache.kind, lambda: asdict(troubles))
    if isinstance(made, Lasting) and any(program.effects for program in programs):
        journals = made.lasting()
    redact = None if settings.traces.redact is None else find("redactors", settings.traces.redact)
    recordings = _recordings(settings, redact)
    models = Models(
        programs,
        onion(providers, upstreams, store, metrics),
        presets={
            name: Preset(program=p.program, params=p.params, roles=p.roles, description=p.description)
            for name, p in settings.models.items()
        },
        roles=settings.roles,
        program_roles={name: p.roles for name, p in settings.programs.items()},
        program_params={name: p.params for name, p in settings.programs.items()},
        tools={name: offering.tool for name, offering in tools.items()},
        store=store,
        meter=metrics,
        witness=recordings,
    )
    for model in models.all():
        # What the settings say of parameters is wrong from the start, not at the first request.
        if isinstance(model, ServedProgram) and model.params:
            try:
                model.program.check_params(model.params)
            except InvalidRequest as error:
                raise ConfigurationError(f'settings of "{model.name}": {error}') from None
    service = Service(
        models,
        store=store,
        journals=journals,
        repeats=settings.repeats,
        limits=settings.limits.run,
        program_limits={name: p.limits.run for name, p in settings.programs.items()},
        cache_programs=settings.cache.programs,
        cache_upstreams=settings.cache.upstreams,
        meter=metrics,
        recordings=recordings,
    )
    access = Access(
        {name: key.get_secret_value() for name, key in settings.keys.items()}, tracers=settings.traces.force
    )
    return Parts(
        redact=redact,
        settings=settings,
        models=models,
        service=service,
        access=access,
        store=store,
        journals=journals,
        metrics=metrics,
        providers=providers,
        tools=tools,
        responses=_responses(settings),
    )


class Shortcut:
    """An application some of whose routes, by method and path, are found without asking it.

    What Starlette does for each request is as much work as the whole of a cached answer.
    """

    def __init__(self, app: ASGIApp, routes: Mapping[tuple[str, str], ASGIApp]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        await (found or self._app)(scope, receive, send)


AsksT = TypeVar("AsksT", bound=Asking[Any])
"""A route that asks models."""


def create_app(
    settings: Settings,
    *,
    parts: Parts | None = None,
    on_open: Callable[[], None] | None = None,
    on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> Measured:
    """The ASGI application. Its lifespan opens what the settings name and closes it.

    `on_open` is called when connections may come, `on_ready` when every upstream is open; `on_failure` with what cannot
    be opened, after which nothing is answered and the server should end. Without it, the log says so.
    """
    parts = parts or build(settings, metrics_folder=folder_of_workers(os.environ))
    service, metrics = parts.service, parts.metrics

    def failed(error: BaseException) -> None:
        # Whoever waits for the service to be ready is told now that it will not be.
        service.draining = True
        service.ready.set()
        if not isinstance(error, AsmodelError):
            log.error(
                "%s", type(error).__name__, exc_info=error
            )  # A fault of ours: whoever reports it needs all of it.
        if on_failure is not None:
            on_failure(error)
        else:
            log.error("cannot serve: %s", error)

    def opened(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            failed(error)
        elif on_ready is not None:
            on_ready()

    @asynccontextmanager
    async def answering(app: Starlette) -> AsyncGenerator[None]:
        traces: Tracing | None = None
        opening: asyncio.Task[None] | None = None
        try:
            traces = parts.trace()
            await parts.open_store()
            if parts.responses is not None:  # Which only a server has a use for.
                await parts.responses.open()
        except Exception as error:
            failed(error)
        else:
            opening = asyncio.create_task(parts.open_upstreams())
            opening.add_done_callback(opened)
            if on_open is not None:
                on_open()
        try:
            yield
        finally:
            service.draining = True
            if opening is not None:
                opening.cancel()
                await asyncio.gather(opening, return_exceptions=True)
            # Requests that were cut off are cancelled already, and are ending.
            await service.idle(ENDING)
            for route in (chat, responses, completions, embeddings):
                await route.close()
            await parts.close()
            # After the runs have ended: a span that ends later would not be exported.
            if traces is not None:
                await asyncio.to_thread(traces.shutdown)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        # Outermost: what the last run cost, and what closing the store came to, is measured too.
        async with reporting(metrics, os.environ), answering(app):
            yield

    limits = settings.limits
    room = Room(requests=limits.in_flight, body_bytes=limits.in_flight_bytes, meter=metrics)

    def asked(kind: Callable[..., AsksT]) -> AsksT:
        return kind(
            service,
            parts.access,
            body_bytes=limits.body_bytes,
            messages=limits.messages,
            n=limits.n,
            progress=settings.progress,
            grace=settings.idempotency.grace_seconds,
            keep=settings.idempotency.keep_seconds,
        )

    chat, completions, embeddings = asked(ChatCompletions), asked(Completions), asked(Embeddings)
    responses = asked(partial(Responses, store=parts.responses, room=room))
    kept = KeptResponses(parts.access, parts.responses, room, most=limits.messages, most_bytes=limits.body_bytes)
    notes: dict[str, dict[str, Any]] = {
        name: {
            "upstream_kind": s.kind,
            "description": "the embedded model, because no upstream is set" if settings.embedded_by_default else "",
        }
        for name, s in settings.effective_upstreams.items()
    }
    models = ModelList(parts.models, parts.access, notes)
    # A key of its own, so that whoever scrapes need not hold one that can spend money.
    readers = {name: key.get_secret_value() for name, key in settings.keys.items()}
    if settings.metrics.key is not None:
        readers["metrics"] = settings.metrics.key.get_secret_value()
    page = MetricsPage(metrics, None if settings.metrics.open else Access(readers))

    def front_page() -> ASGIApp:
        from asmodel.front_page.serving import FrontPage

        traces = settings.traces
        return FrontPage(
            parts.models,
            parts.access,
            notes,
            traces=traces.path if traces.local else None,
            jaeger=traces.jaeger,
            content=(captured := trace_content.read(os.environ)) is not None and captured.on_spans,
            routes=[(method, route.path) for route in routes for method in sorted(route.methods or ())],
        )

    def contract() -> dict[str, Any]:
        # When it is first asked for: what describes the server takes a while to be imported, and is seldom wanted.
        from asmodel import openapi

        return openapi.document(
            version=__version__,
            keys=bool(settings.keys),
            metrics_keys=bool(readers) and not settings.metrics.open,
            names=[model.name for model in parts.models.all()],
            messages=limits.messages,
            n=limits.n,
        )

    front = Later(front_page)
    paths = ("/", "/runs/{id}", "/front/{name}", "/front/runs/{id}") if settings.front_page else ()
    app = Starlette(
        routes=[
            *(Route(path, front, methods=["GET"]) for path in paths),
            Route("/openapi.json", Contract(contract, parts.access), methods=["GET"]),
            Route("/metrics", page, methods=["GET"]),
            Route(chat.path, chat, methods=["POST"]),
            Route(responses.path, responses, methods=["POST"]),
            Route("/v1/responses/{id}/input_items", kept, methods=["GET"]),
            KeptRoute("/v1/responses/{id}", kept, methods=["GET", "DELETE"]),
            Route(completions.path, completions, methods=["POST"]),
            Route(embeddings.path, embeddings, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{id:path}", models, methods=["GET"]),
            Route("/healthz", Probe(alive), methods=["GET"]),
            Route("/readyz", Probe(readiness(service)), methods=["GET"]),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: not_there},
    )
    # What is not there is said in the envelope, never redirected to what may be meant.
    app.router.redirect_slashes = False
    app.add_middleware(Enveloped)
    routes = [route for route in app.routes if isinstance(route, Route)]
    admitted = Admitted(
        Shortcut(app, {("POST", route.path): Enveloped(route) for route in (chat, responses, completions, embeddings)}),
        room,
        largest=limits.body_bytes,
    )
    passage = Passage(
        service, parts.access, room, chat, metrics, messages=limits.messages, body_bytes=limits.body_bytes
    )
    return Measured(admitted, metrics, routes, passage=passage)
