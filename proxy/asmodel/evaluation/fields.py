"""A field of a line of data, by its path: `answer`, `context.0.title`, `/a~1b/0`, `supporting_facts.*.0`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from asmodel.calls import JSON
from asmodel.errors import ConfigurationError
from asmodel.mistakes import did_you_mean, listed


class NoSuchField(LookupError):
    """The line has no such field; the message says which there are."""


@dataclass(frozen=True, slots=True)
class Field:
    """A path into a JSON object: names and places with dots between them, or a JSON Pointer (RFC 6901) if it begins
    with a slash. `*` is each element of a list, or each value of an object, and makes a list. A field whose whole
    name is the path comes before any reading of it."""

    path: str

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigurationError("the name of a field is empty")

    def of(self, record: Mapping[str, JSON]) -> JSON:
        """Its value. Raises NoSuchField."""
        if self.path in record:
            return record[self.path]
        if self.path.startswith("/"):
            parts = [part.replace("~1", "/").replace("~0", "~") for part in self.path[1:].split("/")]
        else:
            parts = self.path.split(".")
        return self._follow(record, parts)

    def _follow(self, value: JSON, parts: Sequence[str]) -> JSON:
        for place, part in enumerate(parts):
            if part == "*" and isinstance(value, (list, tuple, dict)):
                rest = parts[place + 1 :]
                return [self._follow(item, rest) for item in _items(value)]
            if isinstance(value, dict) and part in value:
                value = cast("dict[str, Any]", value)[part]
            elif isinstance(value, list) and _is_place(part, cast("list[object]", value)):
                value = cast("Any", value[int(part)])
            else:
                raise NoSuchField(self._missing(value, parts[:place], part))
        return value

    def _missing(self, value: object, above: Sequence[str], part: str) -> str:
        if isinstance(value, dict):
            known = list(map(str, cast("dict[object, object]", value)))
            near = did_you_mean(part, known)
            if not above:
                return f'there is no field "{self.path}"{near}; there are {listed(known)}'
            why = f'has no "{part}"{near}; it has {listed(known)}'
        elif isinstance(value, list):
            count = len(cast("list[object]", value))
            why = f"is a list of {count}, which has no place {part}; the first is 0, and * is each"
        else:
            why = "is neither a list nor an object"
        return f'there is no field "{self.path}": "{".".join(above)}" {why}'


def _is_place(part: str, of: list[object]) -> bool:
    return part.isascii() and part.isdigit() and int(part) < len(of)


def _items(value: object) -> Sequence[Any]:
    return list(cast("dict[str, Any]", value).values()) if isinstance(value, dict) else cast("Sequence[Any]", value)


def pair(text: str, option: str) -> tuple[str, Field]:
    """`NAME=FIELD`. Raises ConfigurationError."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigurationError(f"{option} {text}: should be NAME=FIELD")
    return name, Field(path)


def text_of(value: JSON) -> str:
    """A value as text: of a list each element, a blank line between two; what is no text as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        items: list[Any] = value
        return "\n\n".join(map(text_of, items))
    return json.dumps(value, ensure_ascii=False)
