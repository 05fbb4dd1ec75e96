"""Of calls that begin alike one goes ahead, so that the others find their beginning in the upstream's own prompt cache.

Providers and local servers keep the beginnings of prompts for some minutes, and what is found there costs less and is
answered sooner: from about 1,024 tokens on. But a beginning is kept only once a call with it has begun to be answered,
so a fan of calls over one document, all sent at the same moment, pays for the document as often as it has calls.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from asmodel import tracing
from asmodel.calls import Call, Chat, Completion, Delta, Embed, Message, Reply, Score, Terms, canonical
from asmodel.protocols import Upstream
from asmodel.upstreams import Layer

BLOCK = 4096
"""Bytes by which beginnings are compared: about the 1,024 tokens from which on providers keep one."""
BLOCKS = 256
"""Of one call; what comes after its first MiB is not looked at."""
PATIENCE = 10.0
"""Seconds that a call waits at most, for all that go ahead of it together."""
KEPT = 300.0
"""Seconds without use for which a beginning is taken to be kept; providers say five to ten minutes."""
MOST = 32_768
"""How many blocks are remembered; those that were not used for longest go first. About 6 MB."""


def beginnings(call: Call, scope: str = "") -> list[bytes]:
    """A digest of the first block of what the call shows, of the first two, and so on; none of what is shorter.

    Tools and schema come first, as they do in the prompt that providers make of them. The digests are those of one
    scope: callers who share nothing else do not wait for one another, nor can one tell what another asks.
    """
    if isinstance(call, Embed):
        return []
    digest = hashlib.sha256(canonical([scope, call.kind]))
    marks: list[bytes] = []
    room = BLOCK
    for text in _shown(call):
        view = memoryview(text)
        while len(view) >= room:
            digest.update(view[:room])
            marks.append(digest.digest()[:16])
            if len(marks) == BLOCKS:
                return marks
            view, room = view[room:], BLOCK
        digest.update(view)
        room -= len(view)
    return marks


def _shown(call: Chat | Completion | Score) -> Iterator[bytes]:
    if isinstance(call, Completion):
        yield _bytes(call.prompt) if call.given is None else canonical(call.given)
    elif isinstance(call, Score):
        yield _bytes(call.context)
        yield _bytes(call.continuation)
    else:
        yield canonical([call.tools, call.schema, call.params.get("response_format")])
        for message in call.messages:
            yield from _said(message)


def _said(message: Message) -> Iterator[bytes]:
    yield _bytes(f"\n{message.role}\n")
    if isinstance(message.content, str):
        yield _bytes(message.content)
    rest = message.wire()
    if isinstance(message.content, str):
        del rest["content"]
    if len(rest) > 1:
        yield canonical(rest)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


_End: TypeAlias = Literal["begun", "failed", "left"]


class _Ahead:
    """A call that has gone ahead: until when others wait for it, and what has become of it."""

    __slots__ = ("end", "ends")

    def __init__(self, ends: float) -> None:
        self.ends = ends
        self.end: asyncio.Future[_End] = asyncio.get_running_loop().create_future()


class Led(Layer):
    """Lets one of the calls that begin alike go ahead, where their terms say that they have a `shared_prefix`.

    The others wait until it has begun to be answered, has failed, or `patience` seconds are over; then all go. If
    whoever asked for it leaves, the next goes ahead. It is streamed even where nobody wants the stream, for its first
    word is the sign. Belongs outside of what limits calls: who waits holds no slot.
    """

    def __init__(self, inner: Upstream, *, patience: float = PATIENCE, kept: float = KEPT, most: int = MOST) -> None:
        super().__init__(inner)
        self._patience = patience
        self._kept = kept
        self._most = most
        self._ahead: dict[bytes, _Ahead] = {}
        self._known: OrderedDict[bytes, float] = OrderedDict()
        """Blocks that the upstream should have, in the order in which they are forgotten, and when."""

    async def send(self, call: Call, terms: Terms) -> Reply:
        marks = beginnings(call, terms.scope) if terms.shared_prefix else ()
        if not marks or not await self._is_first(marks):
            return await self._inner.send(call, terms)
        return await self._lead(marks, call, terms)

    async def _is_first(self, marks: Sequence[bytes]) -> bool:
        """Wait for who is ahead with the longest beginning that is not known yet; True where nobody is."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._patience
        while True:
            known = self._count_known(marks)
            ahead = next((a for mark in reversed(marks[known:]) if (a := self._ahead.get(mark)) is not None), None)
            if ahead is None:
                if known == len(marks):
                    self._remember(marks)
                return known < len(marks)
            seconds = min(ends, ahead.ends) - loop.time()
            if seconds <= 0:
                return False
            with tracing.waiting("upstream.prefix"):
                await asyncio.wait((ahead.end,), timeout=seconds)
            if not ahead.end.done() or ahead.end.result() == "failed":
                return False

    async def _lead(self, marks: Sequence[bytes], call: Call, terms: Terms) -> Reply:
        ahead = _Ahead(asyncio.get_running_loop().time() + self._patience)
        mine = marks[self._count_known(marks) :]
        for mark in mine:
            self._ahead[mark] = ahead

        def over(end: _End) -> None:
            if ahead.end.done():
                return
            ahead.end.set_result(end)
            for mark in mine:
                del self._ahead[mark]
            if end == "begun":
                self._remember(marks)

        async def emit(delta: Delta) -> None:
            over("begun")
            if terms.emit is not None:
                await terms.emit(delta)

        end: _End = "left"
        try:
            streamed = terms.emit is not None or (
                isinstance(call, (Chat, Completion)) and (await self._inner.capabilities()).stream
            )
            reply = await self._inner.send(call, replace(terms, emit=emit) if streamed else terms)
            end = "begun"
            return reply
        except Exception:
            end = "failed"
            raise
        finally:
            over(end)

    def _count_known(self, marks: Sequence[bytes]) -> int:
        """How many blocks from the start the upstream should have."""
        now = asyncio.get_running_loop().time()
        for count in range(len(marks), 0, -1):
            until = self._known.get(marks[count - 1])
            if until is not None and until > now:
                return count
        return 0

    def _remember(self, marks: Sequence[bytes]) -> None:
        now = asyncio.get_running_loop().time()
        # The longest first, so that it is forgotten first: a beginning is known for as long as what goes on from it.
        for mark in reversed(marks):
            self._known[mark] = now + self._kept
            self._known.move_to_end(mark)
        while self._known:
            mark, until = next(iter(self._known.items()))
            if until > now and len(self._known) <= self._most:
                return
            del self._known[mark]
