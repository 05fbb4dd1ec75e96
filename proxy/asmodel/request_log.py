"""One line a request in the log, and how the log's lines look: for people, or as JSON, one object a line.

A line says who asked for what, how it ended, what it took and cost, and which trace tells the rest. It never holds a
prompt, an answer or a key; nor does any other line, since of an exception only its kind and its place are written: its
text may quote either.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeAlias, cast

import orjson
from opentelemetry import trace

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger("asmodel.access")

Format: TypeAlias = Literal["console", "json"]

_FIELDS = "asmodel_request"
"""The attribute of a log record that holds a request's fields."""


# Not frozen, which would take as long again as all the rest of it.
@dataclass(slots=True, kw_only=True)
class RequestLine:
    """What the log says of one request. None, and empty, is what is not known, or does not apply."""

    method: str
    path: str
    status: int | None
    """The HTTP status that went out; None where the client had left before."""
    outcome: str
    """`ok`, the code of an error, `left`, or `cut off`."""
    seconds: float
    request_id: str = ""
    trace_id: str = ""
    run_id: str = ""
    model: str = ""
    """The name of what was asked, once it is known to be a name that is served: a caller may write anything there."""
    program: str = ""
    caller: str = ""
    """The name, in the settings, of whoever holds the key that was shown."""
    streamed: bool = False
    steps: int | None = None
    hits: int | None = None
    joined: int | None = None
    calls: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    estimated: bool = False
    """Whether some of the tokens are our own count."""
    cost: float | None = None
    """US dollars; None where a price is unknown, never 0."""
    late: bool = False
    """Whether it is no request of its own, but what was bought for one whose line had been written already."""
    overhead_seconds: float | None = None
    """How much of the time was not spent waiting for an upstream."""

    def fields(self) -> dict[str, Any]:
        """The line as JSON: what is not known is left out, but for the cost of a request that bought something."""
        body: dict[str, Any] = {
            name: round(value, 6) if type(value) is float else value
            for name, value in zip(_NAMES, _values(self), strict=True)
            if value is not None and value is not False and value != ""
        }
        body["status"] = self.status
        if (self.calls or self.late) and self.cost is None:
            body["cost"] = None
        return body

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """The line for people."""
        said = [self.method, self.path, self.model or "-", str(self.status or "-"), self.outcome]
        said.append(f"{self.seconds * 1e3:.0f}ms")
        if self.overhead_seconds is not None:
            said.append(f"ours={self.overhead_seconds * 1e3:.0f}ms")
        if self.steps is not None:
            said.append(
                f"steps={self.steps} cached={self.hits or 0}" + (f" joined={self.joined}" if self.joined else "")
            )
        if self.calls is not None:
            about = "~" if self.estimated else ""
            tokens = f"{about}{self.input_tokens or 0}+{self.output_tokens or 0}"
            cost = " cost=?" if self.cost is None else f" cost=${self.cost:.6f}"
            cost = cost if self.calls or self.late else ""
            said.append(f"calls={self.calls} tokens={tokens}{cost}")
        for name, value in (("caller", self.caller), ("trace", self.trace_id), ("id", self.request_id)):
            if value:
                said.append(f"{name}={value}")
        return " ".join(said)


_NAMES = tuple(field.name for field in fields(RequestLine))
_values = operator.attrgetter(*_NAMES)


def write(line: RequestLine) -> None:
    """Write the line to the log, at INFO. It is put into words only where a handler asks for them."""
    if log.isEnabledFor(logging.INFO):
        handler = _alone()
        if handler is not None:
            handler.write(line)
        elif logging.getLogRecordFactory() is logging.LogRecord:
            log.handle(_Record(line))
        else:
            # Whoever has put records of their own into place is to see all of them.
            log.info("%s", line, extra={_FIELDS: line})


def _alone() -> Handler | None:
    """The handler of the server's log, where nobody else is told of a line, and it goes by what is ours alone.

    Then no record is made and none shown around, which is most of the cost of a line.
    """
    logger = log
    if logger.filters:
        return None
    while (above := logger.parent) is not None:
        if logger.handlers or not logger.propagate:
            return None
        logger = above
    handlers = logger.handlers
    handler = handlers[0] if len(handlers) == 1 else None
    if type(handler) is not Handler or handler.level > logging.INFO or handler.filters:
        return None
    plain = type(handler.formatter) is ConsoleFormatter and logging.getLogRecordFactory() is logging.LogRecord
    return handler if plain else None


class _Record(logging.LogRecord):
    """What `log.info` makes of a line, at a quarter of the cost: it does not look up the caller, which is known."""

    def __init__(self, line: RequestLine) -> None:
        now = time.time()
        self.__dict__.update(_ALWAYS)
        self.args = (line,)
        self.created = now
        self.msecs = int(now % 1 * 1000) + 0.0
        self.relativeCreated = (now - _BEGAN) * 1000
        self.process = os.getpid() if logging.logProcesses else None
        self.thread = threading.get_ident() if logging.logThreads else None
        self.asmodel_request = line


_BEGAN = time.time()
_ALWAYS = {
    **logging.LogRecord(log.name, logging.INFO, __file__, write.__code__.co_firstlineno, "%s", None, None).__dict__,
    "funcName": write.__name__,
}
"""What is the same of each record of a line."""


class Handler(logging.StreamHandler[TextIO]):
    """Writes to a stream, a line at once, before it returns: a process that is killed has said what it did."""

    def write(self, line: RequestLine) -> None:
        """A request's line, as `emit` writes the record of it, by a `ConsoleFormatter`."""
        formatter = self.formatter
        assert type(formatter) is ConsoleFormatter
        try:
            text = formatter.line(time.time(), line) + self.terminator
            with cast("threading.RLock", self.lock):
                stream = self.stream
                stream.write(text)
                if not stream.line_buffering:
                    stream.flush()
        except RecursionError:
            raise
        except Exception:  # as below
            self.handleError(_Record(line))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = self.stream
            stream.write(self.format(record) + self.terminator)
            if not stream.line_buffering:
                stream.flush()
        except RecursionError:
            raise
        except Exception:  # as every handler of `logging` has it: nobody fails because of a line that cannot be written
            self.handleError(record)


def handler(format: Format) -> logging.Handler:
    """The handler of a server's log: lines to standard error, as they happen."""
    made = Handler(sys.stderr)
    made.setFormatter(formatter(format))
    return made


class _Clock:
    """Times as text; the text of a second is made once."""

    def __init__(self, said: Callable[[int], str]) -> None:
        self._said = said
        self._last: tuple[int, str] = (-1, "")

    def __call__(self, created: float) -> str:
        second = int(created)
        known, text = self._last
        if known != second:
            text = self._said(second)
            self._last = second, text
        return text


class ConsoleFormatter(logging.Formatter):
    """Time and message; of what is worse than INFO, its level too. One line a message, whatever is in it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._clock = _Clock(lambda second: time.strftime("%H:%M:%S", time.localtime(second)))

    def format(self, record: logging.LogRecord) -> str:
        if type(record) is _Record:
            return self.line(record.created, record.asmodel_request)
        return super().format(record)

    def line(self, created: float, line: RequestLine) -> str:
        """What the log says of a request."""
        return f"{self._clock(created)} {_printable(line.text())}"

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{record.asctime} {level}{_printable(record.message)}"

    def formatException(self, ei: Any) -> str:
        return _frames(ei)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and the trace where there is one.

    A request's line has its fields beside these instead of a text.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock(lambda second: time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "time": f"{self._clock(record.created)}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line = getattr(record, _FIELDS, None)
        if isinstance(line, RequestLine):
            body |= {"message": "bought later" if line.late else "request", **line.fields()}
        else:
            body["message"] = record.getMessage()
            ids = trace.get_current_span().get_span_context()
            if ids.is_valid:
                body |= {
                    "trace_id": trace.format_trace_id(ids.trace_id),
                    "span_id": trace.format_span_id(ids.span_id),
                }
            if record.exc_info:
                body["exception"] = _frames(record.exc_info)
        try:
            return orjson.dumps(body).decode()
        except TypeError:  # half of a surrogate pair
            return json.dumps(body, default=str)


def formatter(format: Format) -> logging.Formatter:
    """For `logging.Handler.setFormatter`."""
    return JsonFormatter() if format == "json" else ConsoleFormatter()


def _printable(text: str) -> str:
    """The text with whatever could pass for another line, or command a terminal, made visible."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _frames(info: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]) -> str:
    kind, _, where = info
    if kind is None:
        return ""
    # Places and no source, which may hold a text as well.
    places = (f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(where))
    return "\n".join((kind.__qualname__, *places))
