"""An answer held against the shape that its client asked for (OpenAI's `response_format`), before it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from asmodel.calls import Reply
from asmodel.errors import InvalidRequest


def reader(response_format: object) -> Callable[[Reply], str] | None:
    """What reads an answer of that format: gives its text, or raises ValueError with a reason that a model can act on.

    None where any text will do. A refusal and tool calls are answers of their own and are not held against it. Raises
    InvalidRequest for a format that is none. Patterns are not checked: a client's regular expression could hold up
    everybody's requests, and models keep to them or not as the upstream sees to it. Nothing is fetched for a `$ref`.
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
    validator = _validator(schema)

    def read(reply: Reply) -> str:
        if reply.tool_calls or reply.refusal is not None:
            return reply.text
        try:
            value = json.loads(reply.text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The answer is not JSON: {error.msg} at character {error.pos}.") from None
        except RecursionError:
            raise ValueError("The answer is JSON that is nested too deeply.") from None
        try:
            fault = next(iter(sorted(validator.iter_errors(value), key=lambda e: list(map(str, e.path)))), None)
        except RecursionError:
            raise ValueError("The answer cannot be held against the schema: it refers to itself without end.") from None
        if fault is not None:
            where = ".".join(map(str, fault.absolute_path)) or "the answer"
            raise ValueError(f"The answer does not fit the schema: {where}: {fault.message[:200]}.")
        return reply.text

    return read


def _validator(schema: object) -> Any:
    # Only a request with a schema pays for the import.
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    if not isinstance(schema, (Mapping, bool)):
        raise InvalidRequest("`response_format.json_schema.schema` should be a JSON schema", param="response_format")
    library: Any = jsonschema  # It publishes no types.
    known = library.Draft202012Validator
    lenient = library.validators.create(
        meta_schema=known.META_SCHEMA,
        validators={k: check for k, check in known.VALIDATORS.items() if k not in ("pattern", "patternProperties")},
        type_checker=known.TYPE_CHECKER,
    )
    faults: tuple[type[Exception], ...] = (library.SchemaError, Unresolvable)
    try:
        known.check_schema(schema)
        # A registry of its own, for without one a `$ref` is fetched from wherever it points to.
        registry: Any = Registry
        validator = lenient(schema, registry=registry())
        for _ in validator.iter_errors(None):
            break
    except faults as error:
        told = str(getattr(error, "message", "") or "a reference leads nowhere")
        raise InvalidRequest(
            f"`response_format.json_schema.schema` is not a JSON schema: {told[:200]}", param="response_format"
        ) from None
    except RecursionError:
        raise InvalidRequest(
            "`response_format.json_schema.schema` is nested too deeply", param="response_format"
        ) from None
    return validator
