"""A stream of OpenAI's, as it is taken in: its events out of bytes, and what they are put together to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import orjson

from asmodel.calls import Delta, Emit
from asmodel.dialect import Assembly, mapping
from asmodel.errors import UpstreamError

EVENT_LIMIT = 8 * 1024 * 1024
"""Bytes of one event of a stream."""


class Stream:
    """A stream as it is taken in: what each block brings is put together, and passed on at once.

    `look_for_error` raises UpstreamError on an event that is one.
    """

    __slots__ = ("_begun", "_events", "_look_for_error", "assembly", "done", "emit", "usage_asked", "verbatim")

    def __init__(
        self,
        verbatim: Callable[[bytes], Awaitable[None]] | None,
        usage_asked: bool,
        emit: Emit,
        look_for_error: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.assembly = Assembly()
        self.done = False
        """Whether it has said that it is."""
        self._look_for_error = look_for_error
        self.emit = emit
        self.verbatim = verbatim
        self.usage_asked = usage_asked
        self._events = Events(EVENT_LIMIT)
        self._begun = False

    async def take(self, block: bytes) -> None:
        """Take a block in; an empty one is the end, which some servers do not write."""
        events = self._events.feed(block) if block else self._events.end()
        if self.verbatim is None:
            for data in events:
                if not data.startswith(b"{") and self._says_nothing(data):
                    continue
                if self.done:
                    break
                delta = self._added(data)
                if delta is not None:
                    await self.emit(delta)
        else:
            await self._pass_on(events, block if self._events.plain else b"", self.verbatim)

    async def _pass_on(self, events: list[bytes], block: bytes, verbatim: Callable[[bytes], Awaitable[None]]) -> None:
        """`block` is the bytes of just these events, where they came as we would write them."""
        shown: list[bytes] = []
        failed: Exception | None = None
        assembly = self.assembly
        hides = not self.usage_asked
        try:
            for data in events:
                if not data.startswith(b"{") and self._says_nothing(data):
                    continue
                if self.done:
                    break
                usage = assembly.usage
                chunk = self._read(data)
                try:
                    assembly.hold(chunk)
                except ValueError as error:
                    raise Unreadable(str(error)) from error
                # We ask every stream for its usage; a client that did not is not shown the chunk that brings it.
                if hides and assembly.usage is not usage and _is_usage_alone(data):
                    continue
                shown.append(data)
        except (UpstreamError, Unreadable) as error:
            # What came before it has come all the same.
            failed = error
        if shown:
            # What is not shown is nearly always at the end: the usage, and that it is the end.
            if block and shown == events[: len(shown)]:
                passed = block[: sum(map(len, shown)) + _FRAME * len(shown)]
            else:
                passed = b"".join(map(_framed, shown))
            await verbatim(passed)
            if not self._begun:
                # Something has left, even if it brought no text: the call is not to be made again.
                self._begun = True
                await self.emit(Delta())
        if failed is not None:
            raise failed

    def _says_nothing(self, data: bytes) -> bool:
        """Whether the event is none: empty, the last, or after it."""
        said = data.strip()
        self.done = self.done or said == b"[DONE]"
        return self.done or not said

    def _added(self, data: bytes) -> Delta | None:
        """Read an event, and what it adds."""
        chunk = self._read(data)
        try:
            return self.assembly.add(chunk)
        except ValueError as error:
            raise Unreadable(str(error)) from error

    def _read(self, data: bytes) -> dict[str, Any]:
        try:
            chunk: Any = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            raise Unreadable("an event is not a JSON object")
        found = cast("dict[str, Any]", chunk)
        if "error" in found:
            self._look_for_error(found)
        return found


def _is_usage_alone(data: bytes) -> bool:
    return not orjson.loads(data).get("choices")


_FRAME = len(b"data: \n\n")
"""Bytes around an event that is written plainly."""


def _framed(data: bytes) -> bytes:
    """An event as bytes of a stream."""
    return b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n"


class Unreadable(ValueError):
    """The stream is none: apart from what `emit` may raise, which is not the upstream's doing."""


def as_chunks(body: Mapping[str, Any], *, usage: bool) -> list[dict[str, Any]]:
    """A whole completion as the chunks of a stream: of a server that was asked to stream and does not."""
    frame = {k: v for k, v in body.items() if k not in ("choices", "usage")}
    choices = [mapping(choice) for choice in cast("list[object]", body.get("choices") or [])]
    if any("message" in choice for choice in choices):  # A chunk of text is as a whole answer of text.
        frame["object"] = "chat.completion.chunk"
        choices = [
            {**{k: v for k, v in choice.items() if k != "message"}, "delta": _as_delta(choice)} for choice in choices
        ]
    chunks: list[dict[str, Any]] = [{**frame, "choices": choices}]
    if usage and body.get("usage") is not None:
        chunks.append({**frame, "choices": [], "usage": body["usage"]})
    return chunks


def _as_delta(choice: Mapping[str, Any]) -> dict[str, Any]:
    message = dict(mapping(choice.get("message")))
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        # Only in a stream have they numbers, by which clients put them together.
        numbered = enumerate(cast("list[object]", calls))
        message["tool_calls"] = [{"index": place, **mapping(call)} for place, call in numbered]
    return message


class Events:
    """The `data` of server-sent events (HTML standard, 9.2.6), out of bytes that may be cut anywhere.

    Lines end by CRLF, LF or CR; comments and other fields are passed over, as no reply depends on them. Works on bytes,
    so a character cut in two is whole again before it is read. `limit`, in bytes, bounds an event; beyond it
    Unreadable is raised, a ValueError. `plain` says of the last feed that its bytes were whole events and nothing
    else, written as most servers do: `data: `, one line, a blank line.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        """The beginning of a line whose end has not come."""
        self._data: list[bytes] = []
        self._size = 0
        self._begun = False
        self.plain = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that the chunk completes."""
        self.plain = False
        if not self._size and chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and b"\r" not in chunk:
            ends = chunk.count(b"\n")
            events = [chunk[6:-2]] if ends == 2 else chunk[6:-2].split(b"\n\ndata: ")
            if ends == 2 * len(events) and len(chunk) <= self._limit:
                self._begun = self.plain = True
                return events
        self._size += len(chunk)
        if b"\n" not in chunk and b"\r" not in chunk and not (self._parts and self._parts[-1].endswith(b"\r")):
            self._parts.append(chunk)
            self._check()
            return []
        text = b"".join([*self._parts, chunk])
        held = b""
        if b"\r" in text:
            if text.endswith(b"\r"):
                # The line feed that belongs to it may be the first byte of the next chunk.
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._parts = [part for part in (rest, held) if part]
        events = [event for line in lines if (event := self._line(line)) is not None]
        self._size = len(rest) + len(held) + sum(map(len, self._data))
        self._check()
        return events

    def end(self) -> list[bytes]:
        """What the end of the bytes completes: some servers leave out the last blank line."""
        text = b"".join(self._parts).removesuffix(b"\r")
        self._parts = []
        events = [event for line in (text, b"") if (event := self._line(line)) is not None]
        self._size = 0
        return events

    def _line(self, line: bytes) -> bytes | None:
        if not self._begun:
            self._begun = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            event = b"\n".join(self._data) if self._data else None
            self._data = []
            return event
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None

    def _check(self) -> None:
        if self._size > self._limit:
            raise Unreadable(f"an event of more than {self._limit} bytes")
