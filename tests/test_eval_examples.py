"""The data of an evaluation: what its lines may be, what is drawn from them, and how a wrong line is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel import Document
from asmodel.errors import ConfigurationError
from asmodel.evaluation.examples import Data, Example, Layout, draw, excluded_ids, filled, read
from asmodel.evaluation.fields import Field, NoSuchField, text_of

LINE: dict[str, Any] = {"id": "a", "question": "Who?", "answer": "Ada", "deep": {"x.y": [{"n": 1}, {"n": 2}]}}


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def layout(**changes: Any) -> Layout:
    values: dict[str, Any] = {"question": Field("question"), **changes}
    return Layout(**values)


# ---- fields ----


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("answer", "Ada"),
        ("a.b", "whole"),
        ("/deep/x.y/1/n", 2),
        ("list.0.0", "t"),
        ("list.*.0", ["t", "u"]),
        ("/s~1t/~0", "escaped"),
        ("texts.*", ["one", "two"]),
    ],
)
def test_a_field_is_a_name_a_path_or_a_pointer(path: str, value: Any) -> None:
    more: dict[str, Any] = {
        "a.b": "whole",
        "list": [["t", 0], ["u", 1]],
        "s/t": {"~": "escaped"},
        "texts": {"p": "one", "q": "two"},
    }
    assert Field(path).of({**LINE, **more}) == value


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("anser", r'there is no field "anser" \(did you mean "answer"\?\); there are answer, deep, id, question'),
        ("deep.z", '"deep" has no "z"; it has x.y'),
        ("/deep/x.y/7", "is a list of 2, which has no place 7; the first is 0"),
        ("answer.first", '"answer" is neither a list nor an object'),
    ],
)
def test_a_field_that_is_not_there_is_told_what_is(path: str, told: str) -> None:
    with pytest.raises(NoSuchField, match=told):
        Field(path).of(LINE)


def test_a_template_is_filled_with_fields_and_keeps_braces_that_are_doubled() -> None:
    record: dict[str, Any] = {"q": "Who?", "facts": ["One.", ["Two.", 3]], "n": {"m": True}}
    assert filled("{facts}\n\n{q} {{json}} {n.m}", record) == "One.\n\nTwo.\n\n3\n\nWho? {json} true"
    for wrong in ("{q", "q}", "{}", "a { b"):
        with pytest.raises((ValueError, NoSuchField)):
            filled(wrong, record)


@given(st.text())
def test_a_text_without_braces_is_its_own_template(text: str) -> None:
    assert filled(text.replace("{", "{{").replace("}", "}}"), {}) == text
    assert text_of(text) == text


# ---- lines ----


def test_lines_become_examples(tmp_path: Path) -> None:
    file = written(tmp_path, LINE, "", {**LINE, "id": 2, "question": "Line\u2028separator?"})
    data = read(file, layout(params={"p": Field("deep")}))
    assert [(e.id, e.line, e.question) for e in data.examples] == [("a", 1, "Who?"), ("2", 3, "Line\u2028separator?")]
    assert data.examples[0].params == {"p": LINE["deep"]}
    assert data.examples[0].messages[0].role == "user"


def test_without_ids_a_line_is_named_by_its_number(tmp_path: Path) -> None:
    data = read(written(tmp_path, {"question": "a"}, {"question": "b", "id": "x"}), layout())
    assert [e.id for e in data.examples] == ["1", "2"]


def test_a_conversation_is_asked_whole(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    data = read(written(tmp_path, {"turns": turns}), layout(question=Field("turns"), conversation=True))
    assert [m.role for m in data.examples[0].messages] == ["user", "assistant", "user"]
    assert data.examples[0].question == "?"


@pytest.mark.parametrize(
    ("value", "documents"),
    [
        (["x"], [Document(text="x", id="1")]),
        ([{"text": "x", "id": 7}], [Document(text="x", id="7")]),
        ([{"text": "x", "title": "T"}], [Document(text="x", title="T", id="T")]),
        ([["T", ["One. ", "Two."]]], [Document(text="One. Two.", title="T", id="T")]),
        ([["T", "x"]], [Document(text="x", title="T", id="T")]),
        ({"k": "x"}, [Document(text="x", id="k")]),
    ],
)
def test_documents_come_in_the_shapes_that_data_sets_have(
    tmp_path: Path, value: Any, documents: list[Document]
) -> None:
    data = read(written(tmp_path, {"question": "q", "d": value}), layout(documents=[Field("d")]))
    assert list(data.examples[0].documents) == documents


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["{"], r"data.jsonl:1: is not JSON: .* at column 2"),
        (['{"question": NaN}'], r"data.jsonl:1: is not JSON: it has no number NaN"),
        ([r'{"question": "\ud800"}'], r"data.jsonl:1: holds half of a surrogate pair"),
        ([LINE, "[1]"], r"data.jsonl:2: is JSON, and no object"),
        (["[", "1]"], r"data.jsonl:1: is a JSON list; one object a line is wanted"),
        ([LINE, LINE], r'data.jsonl:2: the id "a" is that of line 1 too'),
        ([LINE, {"id": "b", "q": "?"}], r'data.jsonl:2: there is no field "question"; there are id, q'),
        ([{"question": "  "}], r'data.jsonl:1: the question, field "question", is no text'),
        ([{"question": 3}], "--question names another field"),
        ([], "holds no line"),
        (["", " "], "holds no line"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, lines: list[Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        read(written(tmp_path, *lines), layout())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"references": [Field("gold")]}, r'data.jsonl:1: there is no field "gold"'),
        ({"template": ["{gold}"]}, r'data.jsonl:1: there is no field "gold"'),
        ({"template": ["{answer"]}, r"data.jsonl:1: the prompt has a lone {"),
        ({"documents": [Field("answer")]}, r"are no list; --document names another field"),
        ({"question": Field("answer"), "conversation": True}, "a conversation is a list of messages"),
    ],
)
def test_what_a_line_has_not_is_told_before_anything_is_asked(tmp_path: Path, changes: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        read(written(tmp_path, LINE), layout(**changes))


def test_a_document_of_no_known_shape_is_named_by_its_place(tmp_path: Path) -> None:
    file = written(tmp_path, {"question": "q", "d": ["x", {"body": "y"}]})
    with pytest.raises(ConfigurationError, match=r'data.jsonl:1: document 2 of the field "d" is neither'):
        read(file, layout(documents=[Field("d")]))


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"question": "a"}\n{"question": "\xe9"}\n')
    with pytest.raises(ConfigurationError, match=r"data.jsonl:2: is not UTF-8"):
        read(file, layout())
    file.write_bytes(b'\xef\xbb\xbf{"question": "a"}\n')
    assert len(read(file, layout()).examples) == 1, "a byte order mark is no part of it"


# ---- samples ----


def numbered(*ids: int) -> Data:
    examples = (Example(id=str(i), line=i, record={}, messages=(), question="q") for i in ids)
    return Data(path=Path("d.jsonl"), digest="", examples=tuple(examples))


def ids(data: Data, **options: Any) -> list[str]:
    return [e.id for e in draw(data, limit=options.pop("limit", None), **options).examples]


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(1, 50))
def test_a_smaller_sample_begins_a_larger_one_and_what_is_skipped_is_never_drawn_again(
    seed: int, a: int, b: int
) -> None:
    data = numbered(*range(100))
    small, large = ids(data, limit=a, seed=seed), ids(data, limit=a + b, seed=seed)
    assert len(small) == a
    assert large[:a] == small
    assert ids(data, limit=b, skip=a, seed=seed) == large[a:]


def test_a_sample_does_not_depend_on_the_order_of_the_file_but_on_the_seed() -> None:
    assert ids(numbered(*range(100)), limit=10, seed=7) == ids(numbered(*range(99, -1, -1)), limit=10, seed=7)
    assert ids(numbered(*range(100)), limit=10, seed=7) != ids(numbered(*range(100)), limit=10, seed=8)
    assert ids(numbered(*range(100)), limit=10) == ids(numbered(*range(100)), limit=10, seed=0)


def test_a_sample_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert ids(numbered(*range(20)), limit=5, seed=7) == ["17", "15", "16", "5", "12"]


def test_without_limit_seed_and_skip_all_are_asked_in_the_order_of_the_file() -> None:
    sample = draw(numbered(3, 1, 2), limit=None)
    assert [e.id for e in sample.examples] == ["3", "1", "2"]
    assert sample.seed is None


def test_excluded_ids_come_from_a_list_or_from_a_report(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("1\n\n 2 \n")
    (tmp_path / "report").write_text(json.dumps({"examples": [{"id": "3"}]}))
    excluded = [*excluded_ids(tmp_path / "ids"), *excluded_ids(tmp_path / "report")]
    assert excluded == ["1", "2", "3"]
    sample = draw(numbered(*range(1, 6)), limit=None, excluded=excluded)
    assert ([e.id for e in sample.examples], sample.of, sample.excluded) == (["4", "5"], 2, 3)
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ConfigurationError, match="neither ids, one a line, nor a report"):
        excluded_ids(tmp_path / "other")


def test_a_sample_of_nothing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no question is left: of 2, 0 are excluded and 5 skipped"):
        draw(numbered(1, 2), limit=1, skip=5)
    with pytest.raises(ConfigurationError, match="none of the 1 ids that are to be excluded is in it"):
        draw(numbered(1, 2), limit=1, excluded=["x"])
