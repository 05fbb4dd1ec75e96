"""Frozen values that are made as fast as others are the same values."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel import calls
from asmodel.frozen import quickly_made

QUICK: list[Any] = [
    kind
    for kind in vars(calls).values()
    if isinstance(kind, type) and hasattr(vars(kind).get("__init__"), "__wrapped__")
]


def made_plainly(kind: type[Any], *args: object, **kwargs: object) -> Any:
    """As dataclasses would have made it."""
    value = object.__new__(kind)
    plain: Any = kind.__init__
    plain.__wrapped__(value, *args, **kwargs)
    return value


def held(value: Any) -> list[Any]:
    return [getattr(value, one.name) for one in fields(value)]


def test_the_values_of_a_step_are_made_quickly() -> None:
    assert {"Chat", "Message", "Reply", "Terms", "Usage"} <= {kind.__name__ for kind in QUICK}


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_a_value_is_what_dataclasses_would_have_made(kind: type[Any], data: st.DataObject) -> None:
    known = [one for one in fields(kind) if one.init]
    always = {one.name for one in known if "=" not in str(inspect.signature(kind).parameters[one.name])}
    names = always | data.draw(st.sets(st.sampled_from([one.name for one in known])))
    given_ = {name: data.draw(st.integers() | st.text(max_size=3)) for name in sorted(names)}
    value, plain = kind(**given_), made_plainly(kind, **given_)
    assert type(value) is kind
    assert held(value) == held(plain)
    assert value == plain
    assert repr(value) == repr(plain)
    for other in (replace(value), copy.copy(value), pickle.loads(pickle.dumps(value))):
        assert type(other) is kind
        assert other == plain


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.__name__)
def test_it_takes_the_same_arguments_and_is_as_frozen(kind: type[Any]) -> None:
    plain: Any = kind.__init__
    assert inspect.signature(kind.__init__) == inspect.signature(plain.__wrapped__)
    value = kind(**{one.name: "x" for one in fields(kind) if one.init})
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(kind)[0].name, "y")
    assert not hasattr(value, "__dict__")
    with pytest.raises(TypeError, match="nonsense"):
        kind(nonsense=1)


@quickly_made
@dataclass(frozen=True, slots=True)
class Odd:
    fixed: ClassVar[int] = 1
    first: int
    named: str = field(kw_only=True)
    many: list[int] = field(default_factory=list[int])
    own: list[int] = field(default_factory=list[int], init=False)
    none: int = field(default=3, init=False)


def test_each_value_has_lists_of_its_own() -> None:
    one, other = Odd(1, named="n"), Odd(1, named="n")
    assert one == other == made_plainly(Odd, 1, named="n")
    assert one.many is not other.many
    assert one.own is not other.own
    assert held(Odd(2, [5], named="m")) == [2, "m", [5], [], 3]
    with pytest.raises(TypeError):
        Odd(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_it_has_no_subclasses() -> None:
    with pytest.raises(TypeError, match="no subclasses"):
        type("Under", (Odd,), {})


def test_a_class_that_has_more_to_do_is_refused() -> None:
    @dataclass(frozen=True, slots=True)
    class Busy:
        x: int

        def __post_init__(self) -> None: ...

    with pytest.raises(TypeError, match="__post_init__"):
        quickly_made(Busy)
