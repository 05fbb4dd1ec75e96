"""A Python type as the JSON that a model is asked for and that its reply is read as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Only an object may stand at the root of a strict schema (OpenAI, structured outputs), so all else is wrapped in one.
_WRAP = "value"


class Shape:
    """The JSON shape of a type. Builds nothing until it is used, so that importing a program stays fast."""

    def __init__(self, returns: Any) -> None:
        self.type = returns

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        from pydantic import TypeAdapter

        return TypeAdapter(self.type)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema, strict: every property required, none besides; an object at the root."""
        schema = strict(_root(self._adapter.json_schema()))
        if self._wrapped:
            definitions = schema.pop("$defs", None)
            schema = {
                "type": "object",
                "properties": {_WRAP: schema},
                "required": [_WRAP],
                "additionalProperties": False,
            }
            if definitions:
                schema["$defs"] = definitions
        return schema

    @cached_property
    def _wrapped(self) -> bool:
        return _root(self._adapter.json_schema()).get("type") != "object"

    def read(self, text: str) -> Any:
        """The text as the type. Raises ValueError with a reason that a model, or a person, can act on."""
        from pydantic import ValidationError

        try:
            value: Any = json.loads(_unfenced(text), parse_constant=_no_number)
        except json.JSONDecodeError as error:
            raise ValueError(f"The reply is not JSON: {error.msg} at character {error.pos}.") from None
        except RecursionError:
            raise ValueError("The reply is JSON that is nested too deeply.") from None
        if self._wrapped and isinstance(value, dict) and set(cast("dict[str, Any]", value)) == {_WRAP}:
            value = cast("dict[str, Any]", value)[_WRAP]
        try:
            # As JSON, in which a date is a text and a tuple is a list, even where the type is strict.
            return self._adapter.validate_json(json.dumps(value))
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the reply'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"The reply does not fit: {faults}.") from None


def _no_number(name: str) -> float:
    raise ValueError(f"The reply is not JSON: {name} is no number there.")


def _root(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with an object, not a reference to one, at its root; a type that holds itself comes as a reference."""
    if "$ref" not in schema:
        return schema
    definitions = cast("dict[str, dict[str, Any]]", schema["$defs"])
    return {**definitions[schema["$ref"].rsplit("/", 1)[-1]], "$defs": definitions}


def _unfenced(text: str) -> str:
    """The text without a Markdown fence around it, which chat models add unasked."""
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```") and "\n" in stripped:
        return stripped[stripped.index("\n") + 1 : -3]
    return stripped


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with each object closed and each property required, as strict structured outputs want it.

    They know `anyOf` only, of the ways to choose, and nothing beside a `$ref` (OpenAI, structured outputs, 2025).
    """

    def close(node: Any) -> Any:
        if isinstance(node, list):
            return [close(item) for item in cast("Any", node)]
        if not isinstance(node, dict):
            return node
        closed: dict[str, Any] = {}
        for name, value in cast("dict[str, Any]", node).items():
            if name in ("properties", "$defs"):
                # Its names are the type's own, not the schema's.
                closed[name] = {key: close(item) for key, item in cast("dict[str, Any]", value).items()}
            elif name in ("enum", "const", "examples"):
                closed[name] = value
            elif name not in ("default", "title", "discriminator"):
                closed["anyOf" if name == "oneOf" else name] = close(value)
        if "properties" in closed:
            closed["additionalProperties"] = False
            closed["required"] = list(closed["properties"])
        if "$ref" in closed and len(closed) > 1:
            closed["anyOf"] = [{"$ref": closed.pop("$ref")}]
        return closed

    return cast("dict[str, Any]", close(dict(schema)))


def is_closed(schema: object) -> bool:
    """Whether strict mode can hold a model to it: no object with names of its own choosing, nothing of any type."""
    if not isinstance(schema, dict):
        return False
    node = cast("dict[str, Any]", schema)
    if node.get("type") == "object" and "properties" not in node:
        return False
    known = ("type", "anyOf", "oneOf", "allOf", "$ref", "enum", "const")
    inner = [*node.get("properties", {}).values(), *node.get("$defs", {}).values(), *node.get("anyOf", ())]
    inner += [*node.get("oneOf", ()), *([node["items"]] if "items" in node else ())]
    return any(name in node for name in known) and all(map(is_closed, inner))
