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


class Room:
    """How many requests are being answered, of how many bytes together; and whether there is room for more."""

    def __init__(self, *, requests: int = 2_000, body_bytes: int = 268_435_456, meter: Meter = UNMEASURED) -> None:
        self.requests = 0
        self.body_bytes = 0
        self._most = requests
        self._most_bytes = body_bytes
        self._meter = meter

    def admits(self, size: int) -> bool:
        """Whether there is room for a request with a body of that size, which is here already."""
        return self.requests < self._most and size <= SMALL and self.body_bytes + size <= self._most_bytes

    def has(self, size: int) -> bool:
        """Whether there is room for so many bytes more."""
        return self.body_bytes + size <= self._most_bytes

    @property
    def crowded(self) -> bool:
        """Whether there is room for no further request."""
        return self.requests >= self._most

    def crowd(self) -> Overloaded:
        """What to tell whoever comes then."""
        self._meter.refused("in_flight")
        error = f"the server is answering the {self._most} requests that it takes at a time ([limits] in_flight)"
        return Overloaded(f"{error}; ask again", retry_after=AGAIN)

    def full(self) -> Overloaded:
        """What to tell whoever brings more bytes than there is room for."""
        self._meter.refused("in_flight_bytes")
        error = f"what is being answered comes to {self._most_bytes} bytes ([limits] in_flight_bytes)"
        return Overloaded(f"{error}; ask again", retry_after=AGAIN)


class Held:
    """Room that one request takes besides its body, for what it names and is kept here; until it is let go."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._bytes = 0

    def add(self, size: int) -> None:
        """So many bytes more. Raises Overloaded."""
        if not self._room.has(size):
            raise self._room.full()
        self._room.body_bytes += size
        self._bytes += size

    def let_go(self) -> None:
        self._room.body_bytes -= self._bytes
        self._bytes = 0


class Admitted:
    """Lets in as many requests as there is room for; what is `free` of it always.

    A body counts from its first byte until its request is over: what was read of it is in the conversation by then. Of
    what is more than the `largest` that is read nothing is kept, so it does not count.

    Raises Overloaded into the application while a body is being received; before that it answers itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        room: Room,
        *,
        largest: int = 20_000_000,
        free: Collection[str] = ("/healthz", "/readyz", "/metrics"),
    ) -> None:
        self._app = app
        self._room = room
        self._largest = largest
        self._free = frozenset(free)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._free:
            await self._app(scope, receive, send)
            return
        room = self._room
        if room.crowded:
            await Exchange(scope, receive, send).refuse(room.crowd())
            return
        counted = _announced(scope)
        if counted <= SMALL and not room.has(counted):
            await Exchange(scope, receive, send).refuse(room.full())
            return

        async def counting() -> Message:
            nonlocal counted
            message = await receive()
            more = min(len(message.get("body", b"")), self._largest - counted)
            if more > 0:
                if not room.has(more):
                    raise room.full()
                counted += more
                room.body_bytes += more
            return message

        by_part = counted > SMALL
        if by_part:
            counted = 0
        room.requests += 1
        room.body_bytes += counted
        try:
            await self._app(scope, counting if by_part else receive, send)
        finally:
            room.requests -= 1
            room.body_bytes -= counted


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
