"""An answer held against the shape that its client asked for (OpenAI's `response_format`), before it leaves."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias, cast

import orjson

from asmodel.calls import NotJSON, Reply, canonical
from asmodel.errors import InvalidRequest

SCHEMA_PARTS = 12_000
"""How many values a client's schema may be made of; OpenAI's own bound comes to less."""
PATIENCE = 0.5
"""Seconds that holding one answer against its schema may take. It takes milliseconds, unless the schema is made not to:
alternatives of alternatives double the work at each level."""

_DATA = frozenset(("const", "enum", "default", "examples"))
"""Keywords whose values are data, not schemas."""
_UNFINISHED = frozenset(("length", "content_filter"))
"""Finish reasons that say themselves that the answer is not whole; SDKs raise errors of their own for these."""


def reader(response_format: object) -> Callable[[Reply], str] | None:
    """What reads an answer of that format: gives its text, or raises ValueError with a reason that a model can act on.

    None where any text will do. A refusal, tool calls, and an answer that was cut off are answers of their own and are
    not held against it. Raises InvalidRequest for a format that is none, and for a schema that would take too long.
    Patterns are not checked: a client's regular expression could hold up everybody's requests, and models keep to them
    or not as the upstream sees to it. Nothing is fetched for a `$ref`.
    """
    if not isinstance(response_format, Mapping):
        return None
    wanted = cast("Mapping[str, Any]", response_format)
    kind = wanted.get("type")
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        schema: Any = {"type": "object"}
    elif kind == "json_schema" and isinstance(wanted.get("json_schema"), Mapping):
        schema = wanted["json_schema"].get("schema", {})
    else:
        raise InvalidRequest(
            "`response_format.type` should be text, json_object, or json_schema with a `json_schema`",
            param="response_format",
        )
    if not isinstance(schema, (Mapping, bool)):
        raise _no_schema("should be a JSON schema")
    try:
        check = _CHECKS.of(orjson.dumps(schema))
    except TypeError:
        raise _no_schema("is not JSON") from None
    # A step and the cache read each answer once.
    last: tuple[str, str | None] | None = None

    def read(reply: Reply) -> str:
        nonlocal last
        if reply.tool_calls or reply.refusal is not None or reply.finish in _UNFINISHED:
            return reply.text
        if last is None or last[0] != reply.text:
            last = reply.text, check(reply.text)
        if last[1] is not None:
            raise ValueError(last[1])
        return reply.text

    return read


def _no_schema(what: str) -> InvalidRequest:
    return InvalidRequest(f"`response_format.json_schema.schema` {what}", param="response_format")


_Check: TypeAlias = "Callable[[str], str | None]"


class _Checks:
    """What was made of the last schemas: `most` of them, and of `most_bytes` together. For several threads."""

    def __init__(self, *, most: int = 64, most_bytes: int = 16_000_000) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._made: OrderedDict[bytes, _Check] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, schema: bytes) -> _Check:
        """Raises InvalidRequest where it is no schema."""
        with self._lock:
            if (known := self._made.get(schema)) is not None:
                self._made.move_to_end(schema)
                return known
        made = _checked(schema)
        with self._lock:
            if schema not in self._made:
                # As long as it is: what writes JSON leaves it in all the room that it took.
                schema = bytes(memoryview(schema))
                self._made[schema] = made
                self._bytes += len(schema)
            while len(self._made) > self._most or (self._bytes > self._most_bytes and len(self._made) > 1):
                oldest, _ = self._made.popitem(last=False)
                self._bytes -= len(oldest)
        return made


_CHECKS = _Checks()


def _checked(schema: bytes) -> Callable[[str], str | None]:
    """What says of an answer why it does not fit; None where it does."""
    # Only a request with a schema pays for the import.
    from jsonschema import SchemaError
    from referencing.exceptions import Unresolvable

    try:
        clock = _Clock()
        validator = _validator(orjson.loads(schema), clock)
    except (SchemaError, Unresolvable) as error:
        told = getattr(error, "message", None) or "a reference leads nowhere"
        raise _no_schema(f"is not a JSON schema: {str(told)[:200]}") from None
    except RecursionError:
        raise _no_schema("is nested too deeply") from None

    def check(text: str) -> str | None:
        try:
            value = json.loads(text, parse_constant=_no_json)
        except json.JSONDecodeError as error:
            return f"The answer is not JSON: {error.msg} at character {error.pos}."
        except ValueError as error:
            return f"The answer is not JSON: {error}."
        except RecursionError:
            return "The answer is JSON that is nested too deeply."
        clock.start()
        try:
            fault = next(validator.iter_errors(value), None)
        except RecursionError:
            return "The answer cannot be held against the schema: it refers to itself without end."
        except Unresolvable:
            raise _no_schema("has a reference that leads nowhere") from None
        if fault is None:
            return None
        where = ".".join(map(str, fault.absolute_path)) or "the answer"
        return f"The answer does not fit the schema: {where}: {fault.message[:200]}."

    return check


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


class _Clock:
    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._until = time.monotonic() + PATIENCE

    def check(self) -> None:
        if time.monotonic() > self._until:
            raise _no_schema(f"takes more than {PATIENCE:g} s to hold an answer against; give it fewer alternatives")


def _validator(schema: Any, clock: _Clock) -> Any:
    from jsonschema import validators
    from referencing import Registry

    library: Any = validators  # It publishes no types.
    registry: Registry[Any] = Registry()

    parts = list(_walk(schema))
    if len(parts) > SCHEMA_PARTS:
        raise _no_schema(f"is made of more than {SCHEMA_PARTS} values")
    known: Any = library.Draft202012Validator
    if isinstance(_fields(schema).get("$schema"), str):
        known = library.validator_for(schema, default=known)
    # Its patterns may be of JavaScript's kind, which is not ours to judge, so formats are not checked.
    known.check_schema(schema, format_checker=None)
    patterned = False
    for part in parts:
        # A part that names its own draft would be read by that draft's own validator, patterns and all.
        if isinstance(_fields(part).get("$schema"), str):
            del part["$schema"]
        patterned = patterned or "patternProperties" in _fields(part)
    checks = {word: _timed(check, clock) for word, check in known.VALIDATORS.items()}
    checks["uniqueItems"] = _unique
    for word in ("pattern", "patternProperties"):
        checks[word] = _unchecked
    if patterned:
        # Which names a pattern stands for is not known, so neither is what is left over.
        checks["unevaluatedProperties"] = _unchecked
        checks["additionalProperties"] = _unless_patterned(checks["additionalProperties"])
    # A registry of its own, for without one a `$ref` is fetched from wherever it points to.
    validator: Any = library.extend(known, validators=checks)(schema, registry=registry)
    _check_references(validator, schema)
    return validator


def _timed(check: Any, clock: _Clock) -> Any:
    def timed(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        clock.check()
        return check(validator, value, instance, schema)

    return timed


def _unchecked(validator: Any, value: Any, instance: Any, schema: Any) -> None:
    """Whatever it is, it is right."""


def _unless_patterned(check: Any) -> Any:
    def additional(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        return None if "patternProperties" in schema else check(validator, value, instance, schema)

    return additional


def _unique(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """By their canonical form, for to compare each with each takes hours for a long list."""
    from jsonschema import ValidationError

    if wanted and isinstance(instance, list):
        items = cast("Sequence[Any]", instance)
        try:
            if len({canonical(item) for item in items}) < len(items):
                yield ValidationError("the items are not all different")
        except NotJSON as error:
            yield ValidationError(f"{error}")


def _check_references(validator: Any, schema: Any) -> None:
    """Raise for a reference that leads out of the schema, before anything is bought."""
    names = any(isinstance(_fields(part).get("$id"), str) for part in _walk(schema))
    for part in _walk(schema, schemas_only=True):
        for word in ("$ref", "$dynamicRef"):
            reference = _fields(part).get(word)
            # Below an `$id` of its own, a part's references start from there; whether they lead anywhere is seen later.
            if isinstance(reference, str) and not (reference.startswith("#") and names):
                validator._resolver.lookup(reference)


def _walk(schema: Any, *, schemas_only: bool = False) -> Iterator[Any]:
    """Every value in it, itself first; perhaps without those that are data."""
    left = [schema]
    while left:
        value = left.pop()
        yield value
        left += [inner for word, inner in _fields(value).items() if not (schemas_only and word in _DATA)]
        if isinstance(value, list):
            left += cast("Sequence[Any]", value)


def _fields(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
