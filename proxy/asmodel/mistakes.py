"""What is wrong with a value, in words for the person who wrote it: settings, plug-in options, program parameters."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import SecretStr

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SECRET_NAME = re.compile(
    r"(?:.*[_-])?(?:api_?key|key|token|secret|password|passwd|authorization|cookie|credentials?)", re.I
)
_URL_WITH_PASSWORD = re.compile(r"://[^/@\s]+@")

LONGEST = 60
"""Characters of a wrong value that a message shows."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean "port"?)`, or nothing where no known name is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f' (did you mean "{by_lower[near[0]]}"?)' if near else ""


def listed(names: Iterable[str]) -> str:
    """The names in order, with commas; `none` where there are none."""
    return ", ".join(sorted(names)) or "none"


def is_secret(name: str, value: object = None) -> bool:
    """Whether a setting of this name, or this value under any name, is not for a log."""
    if isinstance(value, SecretStr) or _SECRET_NAME.fullmatch(name):
        return True
    return isinstance(value, str) and _URL_WITH_PASSWORD.search(value) is not None


def shown(value: object, name: str = "") -> str:
    """The value as a message may show it: short, quoted, and never a secret."""
    if is_secret(name, value):
        return "a secret"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple, set)):
        return "a list"
    if isinstance(value, (str, Path)):
        text = str(value)
        return json.dumps(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…", ensure_ascii=False)
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return f"a {type(value).__name__}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_sub_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "mapping_type": "a table",
    "dataclass_type": "a table",
    "none_required": "nothing",
    "url_parsing": "a URL",
    "url_type": "a URL",
}

_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def sentence(detail: ErrorDetails) -> str:
    """One of pydantic's error details as half a sentence: what is expected, and what was found."""
    kind, value, context = detail["type"], detail["input"], cast("Mapping[str, Any]", detail.get("ctx", {}))
    name = next((str(part) for part in reversed(detail["loc"]) if isinstance(part, str)), "")
    if kind in _EXPECTED:
        return f"{_EXPECTED[kind]} is expected, got {shown(value, name)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context[key]}, got {shown(value, name)}"
    if kind in {"literal_error", "enum"}:
        return f"{context['expected']} is expected, got {shown(value, name)}"
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not known"
    if kind in {"too_short", "string_too_short"}:
        return "is too short"
    if kind == "value_error" and "error" in context:
        return str(context["error"])
    if is_secret(name, value):
        return "is not valid"
    text = detail["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
