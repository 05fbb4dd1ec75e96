"""Every protocol that a plug-in may implement, on one screen. There is no base class to inherit from.

A plug-in is found by name in an entry-point group `asmodel.KIND`, or by `module:attribute`; it is called with its
settings as keyword arguments, and `name=` where it takes one. Ours come in by the same door. What an object can do
beyond its first protocol is said by further protocols of one or two methods, never by optional methods or flags.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from asmodel.calls import Call, Capabilities, Chat, Emit, Reply, Terms, Usage

if TYPE_CHECKING:
    from asmodel.tools import Tool

KINDS = ("upstreams", "caches", "programs", "tools")


class Upstream(Protocol):
    """Whatever answers calls: a provider, or a wrapper around another upstream."""

    @property
    def identity(self) -> str:
        """Who answers, never where. Part of every cache key; known once the upstream is open."""
        ...

    async def capabilities(self) -> Capabilities:
        """What it can do. What must be detected is detected at the first call, and once."""
        ...

    async def send(self, call: Call, terms: Terms) -> Reply:
        """Answer one call. With `terms.emit`, await it with each delta as it arrives; the reply is whole all the same.

        Raises UpstreamError. Cancelling the task stops the work at the provider too.
        """
        ...


class Cache(Protocol):
    """A store of bytes by key. It never raises for what it holds: what cannot be read is not there."""

    async def get(self, key: str) -> bytes | None: ...

    async def set(self, key: str, value: bytes, *, tag: str = "", ttl: float | None = None) -> None:
        """Store; on return the entry survives a `kill -9`. `ttl` in seconds; `tag` says which step it belongs to."""
        ...


@runtime_checkable
class Recalling(Protocol):
    """A store that has in memory what was lately used of it."""

    def recall(self, key: str) -> bytes | None:
        """What `get` would give, where that can be told at once. None tells nothing: then `get` has to be asked.

        As long as nobody has changed the entry, it gives the very same object each time.
        """
        ...


class Offering(Protocol):
    """What a tool of the settings is made of: something, perhaps with a life (`Openable`), that offers a tool."""

    @property
    def tool(self) -> Tool[..., Any]:
        """The tool. It has no effects: those are declared by the program that has them, in its own code."""
        ...


class Lease(Protocol):
    """One's place before a key, as it was when it was asked for."""

    @property
    def state(self) -> Literal["held", "taken", "none"]:
        """`held`: act, the others wait. `taken`: another acts; `wait` for it. `none`: the store cannot say; act."""
        ...

    async def wait(self) -> bytes | None:
        """Of a taken lease: return once its holder is done or dead, or can no longer be told; with the note it left.

        That may take as long as the holder lives: a deadline is the caller's to set. It may be cancelled at any time.
        """
        ...

    def leave(self, note: bytes) -> None:
        """Of a held lease: what those who are waiting when it ends are told. Who comes later is told nothing."""
        ...


@runtime_checkable
class Lockable(Protocol):
    """A store by which one of many processes, on one machine or many, acts for all of them."""

    def lease(self, key: str, seconds: float = 10.0) -> AbstractAsyncContextManager[Lease]:
        """Try to be the one who acts on `key`. Entering never waits for another holder, and never raises for the store.

        A held lease is kept up until the block ends; when its holder dies, or stands still, another can have it at the
        latest `seconds` after. So it saves purchases and proves nothing: two may hold it when one has stood still.
        """
        ...


@runtime_checkable
class Listable(Protocol):
    """A store that can say what it holds."""

    def entries(self) -> AsyncIterator[tuple[str, str, int]]:
        """Key, tag and size in bytes of each entry."""
        ...


@runtime_checkable
class Clearable(Protocol):
    """A store that can throw away what it holds."""

    async def clear(self, tag: str | None = None, older_than: float | None = None) -> int:
        """Delete every entry, those of one tag, or those written over `older_than` seconds ago; says how many."""
        ...


@runtime_checkable
class Lasting(Protocol):
    """A store that has a place for what must not be forgotten: of what was done to the world, say."""

    def lasting(self) -> Cache:
        """A store beside this one, opened and closed by itself, of which nothing expires and nothing is evicted."""
        ...


@runtime_checkable
class Openable(Protocol):
    """Anything with a life: opened before the first use, closed after the last, on the same event loop."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...


@runtime_checkable
class Counting(Protocol):
    """An upstream that can count the tokens of a text exactly."""

    async def count(self, text: str) -> int: ...


@runtime_checkable
class Detecting(Protocol):
    """An upstream that must try before it can say whether it scores given text; tried once, remembered."""

    async def detect(self) -> Capabilities:
        """What it can do, `loglikelihood` proven or disproven. Raises UpstreamError where that could not be tried."""
        ...


class Told(NamedTuple):
    """What is to be known of an answer that is passed on as it came: of a `Reply`, what is counted and traced."""

    model: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False

    @classmethod
    def of(cls, reply: Reply) -> Told:
        u = reply.usage
        used = u.prompt_tokens, u.completion_tokens, u.cached_tokens, u.reasoning_tokens, u.estimated
        return cls(reply.model, reply.finish, *used)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            reasoning_tokens=self.reasoning_tokens,
            estimated=self.estimated,
        )


class Forwarded(NamedTuple):
    """A request for one answer, as it is to be forwarded."""

    params: dict[str, Any]
    """All that was sent beside the messages, and the model; the receiver's to change."""
    messages: Sequence[Mapping[str, Any]]
    """As `Message.wire` has them."""
    call: Callable[[], Chat]
    """The same as a call, for where it has to be looked at."""
    resent: Callable[[], object]
    """To be told where it has been sent once more, because its connection was closed before an answer."""


@runtime_checkable
class Forwarding(Protocol):
    """An upstream that can take a request that is passed through as it came, and give its answer as it comes.

    What goes out, what comes back and what is raised is what `send` with `Terms.verbatim` would send, give and raise.
    """

    async def forward(self, request: Forwarded) -> tuple[bytes, Told]:
        """The whole answer as it came, and what it tells."""
        ...

    async def forward_stream(
        self, request: Forwarded, usage_asked: bool, take: Callable[[bytes], Awaitable[None]], emit: Emit
    ) -> Told:
        """`take` is awaited with the upstream's own bytes: whole events, and not the last one, `[DONE]`.

        `emit` is awaited once something has been taken; what with is of no interest.
        """
        ...


@runtime_checkable
class Preparing(Protocol):
    """Something that one process must fetch or start for all of a server's processes, before any of them listens."""

    def prepare(self, progress: Callable[[str, int, int], None], *, shared: bool) -> Mapping[str, str]:
        """Fetch what is missing. Blocks; raises ConfigurationError.

        `progress` is told what is being fetched, and the bytes done and in all. `shared` says that several processes
        will open this: then start what they share, and give the environment variables by which they find it, those
        that are set already included.
        """
        ...

    def release(self) -> None:
        """End what `prepare` started."""
        ...
