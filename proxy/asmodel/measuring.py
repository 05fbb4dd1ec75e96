"""The HTTP side of the metrics: the page that Prometheus reads, and the layer that measures every request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asmodel.access import Access
from asmodel.errors import AsmodelError
from asmodel.exchange import Exchange
from asmodel.metric_store import OTHER
from asmodel.metrics import Metrics
from asmodel.passing import Passage


class MetricsPage:
    """`GET /metrics`: Prometheus text, format 0.0.4. Without `access` it is open to all."""

    def __init__(self, metrics: Metrics, access: Access | None) -> None:
        self._metrics = metrics
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            if self._access is not None:
                self._access.admit(exchange.headers)
        except AsmodelError as error:
            await exchange.refuse(error)
            return
        # Files of other workers are read.
        data = (await asyncio.to_thread(self._metrics.text)).encode()
        headers = {
            "content-type": "text/plain; version=0.0.4; charset=utf-8",
            "content-length": str(len(data)),
            "cache-control": "no-store",
        }
        await exchange.start(200, headers)
        await exchange.write(data, last=True)


class Measured:
    """Measures every request of the application inside of it, which answers on `routes`.

    What can go the short way, by `passage`, goes that one, and is measured there.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route], *, passage: Passage | None = None
    ) -> None:
        self._app = app
        self.passage = passage
        self._metrics = metrics
        self.routes = routes
        paths = [route.path for route in routes]
        self._exact = {path for path in paths if "{" not in path}
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        for path in paths:
            if "{" in path:
                parts = re.split(r"(\{[^}]*\})", path)
                pattern = "".join(".+" if part.startswith("{") else re.escape(part) for part in parts)
                self._patterns.append((re.compile(pattern), re.sub(r":\w+\}", "}", path)))
        metrics.knows_routes(*self._exact, *(route for _, route in self._patterns))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self.passage is not None:
            started = time.monotonic()
            if (cycle := self.passage.awaited(scope)) is not None:
                await cycle.arrival()
            if (request := self.passage.of(scope, started)) is not None:
                await request.run(scope, receive, send)
                return
        metrics, method, scheme = self._metrics, str(scope["method"]), str(scope.get("scheme", "http"))
        started = time.perf_counter()
        status = 0
        streams = False

        async def watched(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in message["headers"]:
                    if name == b"content-type":
                        if value[:17] == b"text/event-stream":
                            streams = True
                            metrics.streaming(1)
                        break
            await send(message)

        metrics.requested(method, scheme, 1)
        try:
            await self._app(scope, receive, watched)
        finally:
            metrics.requested(method, scheme, -1)
            if streams:
                metrics.streaming(-1)
            metrics.responded(method, scheme, self._route(scope["path"]), status, time.perf_counter() - started)

    def _route(self, path: str) -> str:
        if path in self._exact:
            return path
        return next((route for pattern, route in self._patterns if pattern.fullmatch(path)), OTHER)
