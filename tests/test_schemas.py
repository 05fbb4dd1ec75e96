"""A Python type becomes the strict JSON schema that a model is held to, and the model's JSON becomes the type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from asmodel.schemas import Shape, is_closed, strict


class Evidence(BaseModel):
    """One piece of evidence."""

    text: str = Field(description="The words that count.")
    weight: float = 1.0


class Verdict(BaseModel):
    holds: bool
    evidence: list[Evidence] = []
    best: Evidence | None = Field(default=None, description="The best of it, if any.")


class Tree(BaseModel):
    name: str
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Odd(BaseModel):
    """Its fields are named like words of the schema itself."""

    title: str
    default: int
    properties: dict[str, int] = {}
    enum: str = "x"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Point(TypedDict):
    x: int
    y: int


@dataclass
class Pair:
    a: int
    b: str


class Day(BaseModel):
    model_config = ConfigDict(strict=True)
    day: date
    span: tuple[int, int]


def every_node(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a schema. The names of properties and of definitions are the type's own, not the schema's."""
    if isinstance(node, dict):
        known = cast("dict[str, Any]", node)
        yield known
        for name, value in known.items():
            for inner in list(value.values()) if name in ("properties", "$defs") else [value]:
                yield from every_node(inner)
    elif isinstance(node, list):
        for value in cast("Any", node):
            yield from every_node(value)


@pytest.mark.parametrize("returns", [Verdict, Tree, Owner, Point, Pair, int, list[Verdict], Cat | Dog, Colour])
def test_every_object_of_a_schema_is_closed_and_wants_all_of_its_properties(returns: Any) -> None:
    schema = Shape(returns).schema
    assert schema["type"] == "object"
    objects = [node for node in every_node(schema) if "properties" in node]
    assert objects
    for node in objects:
        assert node["required"] == list(node["properties"])
        assert node["additionalProperties"] is False


@pytest.mark.parametrize("returns", [Verdict, Tree, Owner, list[Tree]])
def test_a_schema_holds_no_defaults_no_titles_no_one_of_and_nothing_beside_a_reference(returns: Any) -> None:
    for node in every_node(Shape(returns).schema):
        assert not node.keys() & {"default", "title", "oneOf", "discriminator"}
        assert "$ref" not in node or len(node) == 1


def test_what_a_type_says_of_itself_reaches_the_model() -> None:
    schema = Shape(Verdict).schema
    assert schema["$defs"]["Evidence"]["description"] == "One piece of evidence."
    assert schema["$defs"]["Evidence"]["properties"]["text"]["description"] == "The words that count."
    assert schema["properties"]["best"]["description"] == "The best of it, if any."


def test_a_type_that_holds_itself_has_an_object_at_its_root() -> None:
    schema = Shape(Tree).schema
    assert list(schema["properties"]) == ["name", "children"]
    assert schema["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
    tree = Shape(Tree).read('{"name": "a", "children": [{"name": "b", "children": []}]}')
    assert tree == Tree(name="a", children=[Tree(name="b")])


def test_a_choice_by_a_discriminator_is_a_choice_all_the_same() -> None:
    assert "anyOf" in Shape(Owner).schema["properties"]["pet"]
    assert Shape(Owner).read('{"pet": {"kind": "dog", "tricks": ["sit"]}}') == Owner(
        pet=Dog(kind="dog", tricks=["sit"])
    )


def test_fields_named_like_words_of_the_schema_are_kept() -> None:
    schema = Shape(Odd).schema
    assert schema["required"] == ["title", "default", "properties", "enum"]
    assert schema["properties"]["title"] == {"type": "string"}


@pytest.mark.parametrize(
    ("returns", "text", "value"),
    [
        (int, '{"value": 42}', 42),
        (int, "42", 42),
        (bool, '{"value": true}', True),
        (bool, "false", False),
        (float, '{"value": 1}', 1.0),
        (list[int], '{"value": [1, 2]}', [1, 2]),
        (list[str], '["a"]', ["a"]),
        (Colour, '{"value": "red"}', Colour.RED),
        (Colour, '"blue"', Colour.BLUE),
        (Cat | Dog, '{"value": {"kind": "cat", "lives": 9}}', Cat(kind="cat", lives=9)),
        (int | None, '{"value": null}', None),
        (Literal["yes", "no"], '{"value": "yes"}', "yes"),
        (Point, '{"x": 1, "y": 2}', {"x": 1, "y": 2}),
        (Pair, '{"a": 1, "b": "c"}', Pair(1, "c")),
        (Day, '{"day": "2024-02-29", "span": [1, 2]}', Day(day=date(2024, 2, 29), span=(1, 2))),
        (Verdict, '```json\n{"holds": true, "evidence": [], "best": null}\n```', Verdict(holds=True)),
        (Verdict, ' \n{"holds": true}\n ', Verdict(holds=True)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_reply_is_read_as_the_type(returns: Any, text: str, value: Any) -> None:
    assert Shape(returns).read(text) == value


@pytest.mark.parametrize(
    ("returns", "text", "reason"),
    [
        (int, "forty-two", "not JSON: Expecting value at character 0"),
        (int, '{"value": "x"}', "valid integer"),
        (bool, "NaN", "NaN is no number"),
        (Verdict, "[]", "the reply: Input should be an object"),
        (Verdict, '{"holds": "perhaps"}', "holds: Input should be a valid boolean"),
        (Verdict, "{}", "holds: Field required"),
        (Verdict, '{"holds": true, "evidence": [{}]}', "evidence.0.text: Field required"),
        (Colour, '"green"', "'red' or 'blue'"),
        (list[int], "[" * 100_000, "nested too deeply|not JSON"),
        (int, "1" * 5000, "."),
        (str, "", "not JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_reply_that_does_not_fit_is_refused_with_a_reason_that_a_model_can_act_on(
    returns: Any, text: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Shape(returns).read(text)


def test_a_shape_of_a_type_that_is_not_there_yet_costs_nothing_until_it_is_used() -> None:
    shape = Shape("no such type")
    with pytest.raises(Exception, match="no such type"):
        _ = shape.schema


@given(
    st.builds(
        Verdict,
        holds=st.booleans(),
        evidence=st.lists(st.builds(Evidence, text=st.text(), weight=st.floats(allow_nan=False, allow_infinity=False))),
        best=st.none() | st.builds(Evidence, text=st.text()),
    )
)
def test_what_a_type_writes_its_shape_reads(verdict: Verdict) -> None:
    assert Shape(Verdict).read(verdict.model_dump_json()) == verdict


@given(st.recursive(st.builds(Tree, name=st.text()), lambda t: st.builds(Tree, name=st.text(), children=st.lists(t))))
def test_a_tree_is_read_whatever_its_depth(tree: Tree) -> None:
    assert Shape(Tree).read(tree.model_dump_json()) == tree


@given(st.lists(st.integers()) | st.lists(st.text()))
def test_a_list_is_read_wrapped_and_bare(value: list[Any]) -> None:
    shape = Shape(list[int] | list[str])
    text = TypeAdapter(list[Any]).dump_json(value).decode()
    assert shape.read(text) == shape.read(f'{{"value": {text}}}') == value


def test_a_schema_is_not_changed_by_being_made_strict() -> None:
    schema = Verdict.model_json_schema()
    strict(schema)
    assert schema == Verdict.model_json_schema()


@pytest.mark.parametrize(
    ("returns", "closed"), [(Verdict, True), (Tree, True), (Owner, True), (Odd, False), (dict[str, int], False)]
)
def test_an_object_with_names_of_its_own_choosing_is_not_closed(returns: Any, closed: bool) -> None:
    assert is_closed(TypeAdapter(returns).json_schema()) is closed
