"""The small routes: which models there are, whether the server is alive and ready, and what is not there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from asmodel import wire
from asmodel.access import Access
from asmodel.errors import AsmodelError, InvalidRequest, ModelNotFound
from asmodel.exchange import Exchange
from asmodel.models import Model, Models, ServedProgram
from asmodel.service import Service


class ModelList:
    """`GET /v1/models` and `GET /v1/models/{id}`. `notes` say by name what kind of upstream one is."""

    def __init__(self, models: Models, access: Access, notes: dict[str, dict[str, Any]]) -> None:
        self._models = models
        self._access = access
        self._notes = notes
        self._started = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            self._access.admit(exchange.headers)
            wanted = scope["path_params"].get("id")
            if wanted is None:
                body: dict[str, Any] = {"object": "list", "data": [self._entry(m) for m in self._models.all()]}
            elif len(wanted) > wire.NAME:
                raise ModelNotFound(f"a model's name has at most {wire.NAME} characters", param="model")
            else:
                body = self._entry(self._models.find(wanted))
        except AsmodelError as error:
            await exchange.refuse(error)
            return
        await exchange.respond(200, body)

    def _entry(self, model: Model) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": model.name, "object": "model", "created": self._started}
        if not isinstance(model, ServedProgram):
            return {**entry, "owned_by": "upstream", "asmodel": {"kind": "upstream", **self._notes[model.name]}}
        program = model.program
        if program.file is not None and program.file.exists():
            entry["created"] = int(program.file.stat().st_mtime)
        told = {
            "kind": "program",
            "program": program.name,
            "description": model.description,
            "digest": program.digest,
            "supports": sorted(program.supports),
            "params": program.params.model_json_schema() if program.params else None,
        }
        return {**entry, "owned_by": "asmodel", "asmodel": told}


class Later:
    """An application that is imported and made when it is first asked, in a thread; until then it costs nothing."""

    def __init__(self, make: Callable[[], ASGIApp]) -> None:
        self._make = make
        self._made: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        made = self._made
        if made is None:
            made = self._made = await asyncio.to_thread(self._make)
        await made(scope, receive, send)


class Contract:
    """`GET /openapi.json`. The document is made when it is first asked for."""

    def __init__(self, make: Callable[[], dict[str, Any]], access: Access) -> None:
        self._make = make
        self._access = access
        self._made: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            self._access.admit(exchange.headers)
        except AsmodelError as error:
            await exchange.refuse(error)
            return
        if self._made is None:
            self._made = await asyncio.to_thread(lambda: orjson.dumps(self._make()))
        await exchange.send(200, self._made)


class Probe:
    """A route that says one thing about the server; open to all, for whoever probes has no key."""

    def __init__(self, state: Callable[[], tuple[int, str]]) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, word = self._state()
        await Exchange(scope, receive, send).respond(status, {"status": word})


def alive() -> tuple[int, str]:
    return 200, "ok"


def readiness(service: Service) -> Callable[[], tuple[int, str]]:
    def ready() -> tuple[int, str]:
        if service.draining:
            return 503, "draining"
        return (200, "ready") if service.ready.is_set() else (503, "loading")

    return ready


class RouteNotFound(InvalidRequest):
    status = 404
    code: str | None = "not_found"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code: str | None = "method_not_allowed"


async def not_there(request: Request, error: Exception) -> Response:
    """404 and 405 in the envelope."""
    assert isinstance(error, HTTPException)
    exchange = Exchange(request.scope, request.receive, request._send)  # pyright: ignore[reportPrivateUsage]
    method, path = request.method, request.url.path[:200]
    if error.status_code == 405:
        failure: AsmodelError = MethodNotAllowed(f"{path} does not take {method}")
    else:
        failure = RouteNotFound(f"there is no {method} {path}; try POST /v1/chat/completions or GET /v1/models")
    headers = {**dict(error.headers or {}), **exchange.receipt(), "x-should-retry": "false"}
    return JSONResponse(wire.error_body(failure), failure.status, headers)
