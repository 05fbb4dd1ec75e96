"""How much is answered at a time: past it a request is refused at once, and told to come again, before memory is."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asmodel.errors import AsmodelError
from asmodel.exchange import Exchange
from asmodel.meter import UNMEASURED, Meter

SMALL = 65_536
"""Bytes up to which a body counts as soon as it is announced; to count it part by part costs more than it holds."""
AGAIN = 1.0
"""Seconds after which whoever is refused may come again."""


class Overloaded(AsmodelError):
    """More is being answered than may be; nothing is wrong with the request."""

    status = 503
    code: str | None = "overloaded"
    retry = True


class Admitted:
    """Lets in so many requests at a time, with bodies of so many bytes together; what is `free` of it always.

    A body counts from its first byte until its request is over: what was read of it is in the conversation by then. Of
    what is more than the `largest` that is read nothing is kept, so it does not count.

    Raises Overloaded into the application while a body is being received; before that it answers itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        requests: int = 2_000,
        body_bytes: int = 268_435_456,
        largest: int = 20_000_000,
        free: Collection[str] = ("/healthz", "/readyz", "/metrics"),
        meter: Meter = UNMEASURED,
    ) -> None:
        self.requests = 0
        self.body_bytes = 0
        self._app = app
        self._most = requests
        self._most_bytes = body_bytes
        self._largest = largest
        self._free = frozenset(free)
        self._meter = meter

    def admits(self, size: int) -> bool:
        """Whether there is room for a request with a body of that size, which is here already."""
        return self.requests < self._most and size <= SMALL and self.body_bytes + size <= self._most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._free:
            await self._app(scope, receive, send)
            return
        if self.requests >= self._most:
            self._meter.refused("in_flight")
            error = f"the server is answering the {self._most} requests that it takes at a time ([limits] in_flight)"
            await Exchange(scope, receive, send).refuse(Overloaded(f"{error}; ask again", retry_after=AGAIN))
            return
        counted = _announced(scope)
        if counted <= SMALL and self.body_bytes + counted > self._most_bytes:
            await Exchange(scope, receive, send).refuse(self._full())
            return

        async def counting() -> Message:
            nonlocal counted
            message = await receive()
            more = min(len(message.get("body", b"")), self._largest - counted)
            if more > 0:
                if self.body_bytes + more > self._most_bytes:
                    raise self._full()
                counted += more
                self.body_bytes += more
            return message

        by_part = counted > SMALL
        if by_part:
            counted = 0
        self.requests += 1
        self.body_bytes += counted
        try:
            await self._app(scope, counting if by_part else receive, send)
        finally:
            self.requests -= 1
            self.body_bytes -= counted

    def _full(self) -> Overloaded:
        self._meter.refused("in_flight_bytes")
        error = f"the bodies that are being answered come to {self._most_bytes} bytes ([limits] in_flight_bytes)"
        return Overloaded(f"{error}; ask again", retry_after=AGAIN)


def _announced(scope: Scope) -> int:
    """How long the body is to be; more than small where that is not said."""
    length = 0
    for name, value in scope["headers"]:
        if name == b"content-length":
            # Not a number, or not one, is for the server's own parser to refuse; here it is read with care.
            length = int(value) if value.isdigit() and len(value) < 20 else SMALL + 1
        elif name == b"transfer-encoding":
            return SMALL + 1
    return length
