"""Frozen values that are made as fast as others.

A frozen dataclass makes itself through `object.__setattr__`, field by field, which takes four times as long as plain
assignments do; and a step makes some ten values of up to twenty fields.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_origin

T = TypeVar("T")

_FACTORY = object()
"""In the place of an argument that was not given, where each value needs a new one."""


def quickly_made(kind: type[T]) -> type[T]:
    """Give a frozen dataclass with slots, and without `__post_init__`, a constructor that does the same in less time.

    What is being made is, until all of its fields are there, of a class with the same slots that is not frozen. Nobody
    else has seen it by then. The constructor that dataclasses made is its `__wrapped__`. The class can have no
    subclasses: what it makes is of this class and no other.
    """
    own: tuple[Field[Any], ...] = fields(kind)  # type: ignore[arg-type]  # a dataclass, by contract
    if hasattr(kind, "__post_init__"):
        raise TypeError(f"{kind.__name__} has a __post_init__, which would not be called")
    open_kind = type(f"_Open{kind.__name__}", (), {"__slots__": tuple(one.name for one in own)})
    names: dict[str, Any] = {"_kind": kind, "_open": open_kind, "_set": object.__setattr__, "_factory": _FACTORY}
    by_place: list[str] = []
    by_name: list[str] = []
    lines = ["_set(self, '__class__', _open)"]
    for one in own:
        given = one.name
        default, factory = f"_default_{one.name}", f"_make_{one.name}"
        # Of `dict[str, Any]` the dict alone: what it makes is the same, in a tenth of the time.
        names |= {default: one.default, factory: get_origin(one.default_factory) or one.default_factory}
        if one.default_factory is not MISSING:
            names[default] = _FACTORY
            given = f"{factory}() if {one.name} is _factory else {one.name}" if one.init else f"{factory}()"
        elif not one.init:
            given = default
        if one.init:
            arguments = by_name if one.kw_only else by_place
            arguments.append(one.name if names[default] is MISSING else f"{one.name}={default}")
        lines.append(f"self.{one.name} = {given}")
    lines.append("self.__class__ = _kind")
    taken = ", ".join(["self", *by_place, *(["*"] if by_name else []), *by_name])
    text = f"def __init__({taken}):\n " + "\n ".join(lines)
    # Under a name of its own, by which a profile tells one class from another.
    exec(compile(text, f"<{kind.__name__}>", "exec"), names)
    open_to_change: Any = kind
    made, plain = names["__init__"], open_to_change.__init__
    made.__qualname__, made.__module__ = plain.__qualname__, kind.__module__
    made.__annotations__, made.__wrapped__ = plain.__annotations__, plain
    open_to_change.__init__ = made
    open_to_change.__init_subclass__ = classmethod(_has_no_subclasses)
    return kind


def _has_no_subclasses(kind: type[Any], /, **arguments: object) -> None:
    raise TypeError(f"{kind.__name__}: what is made quickly has no subclasses")
