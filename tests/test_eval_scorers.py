"""Scorers: what counts as right, what cannot be told, and what is said of a scorer or reference that is none."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel import Answer, Citation
from asmodel.errors import ConfigurationError
from asmodel.evaluation import rankings
from asmodel.evaluation.examples import Example
from asmodel.evaluation.fields import Field
from asmodel.evaluation.judging import verdict
from asmodel.evaluation.scorers import (
    Given,
    Measure,
    Unread,
    Unscorable,
    check,
    last_number,
    normalised,
    scorer,
    yes_or_no,
)


def no_judge(model: str) -> Measure:
    raise AssertionError(f"{model} is not to be asked")


def example(reference: Any, **more: Any) -> Example:
    return Example(id="1", line=1, record={"answer": reference, **more}, messages=(), question="q")


async def scored(spec: str, answer: str | Answer, reference: Any = None, **options: Any) -> float:
    made = scorer(spec, Field("answer"), judges=no_judge, **options)
    told = answer if isinstance(answer, Answer) else Answer(text=answer)
    value = made.measure(Given(example=example(reference), answer=told, reference=reference))
    return float(value if isinstance(value, (int, float)) else await value)


@pytest.mark.parametrize(
    ("spec", "answer", "reference", "value"),
    [
        ("exact", "The Eiffel-Tower!", "eiffeltower", 1),
        ("exact", "  an  apple. ", "Apple", 1),
        ("exact", "Tokyo", ["Edo", "Tokyo"], 1),
        ("exact", "Yes.", True, 1),
        ("exact", "4", 4, 1),
        ("exact", "Tokyo, Japan", "Tokyo", 0),
        ("contains", "It is Tokyo, I think", ["Edo", "TOKYO"], 1),
        ("contains", "Tokyoites", "Tokyo", 0),
        ("contains", "N\u2019Djamena is it", "N'Djamena", 1),
        ("contains", "C++ and more", "c++", 1),
        ("contains", "ﬁne", "fine", 1),
        ("contains", "anything", "", 0),
        ("f1", "the cat sat", "a cat", 2 / 3),
        ("f1", "", "a", 1),
        ("f1", "x", "", 0),
        ("f1", "b c", ["a", "b c d"], 0.8),
        ("yes-no", "Yes, it would.", True, 1),
        ("yes-no", "No.", "no", 1),
        ("yes-no", "Yes and no. So the answer is no.", False, 1),
        ("yes-no", "true", "Yes", 1),
        ("number", "so 1,234.5 in all", "#### 1234.5", 1),
        ("number", "#### 18 eggs of 20", "16 - 3 - 4 = 9\n#### 18", 1),
        ("number", "$1,000", 1000, 1),
        ("number", "16-3", 3, 1),
        ("number", "it is -3.", -3, 1),
        ("number", "\u22123", -3, 1),
        ("number", "1e3", 1000, 1),
        ("number", ".5", 0.5, 1),
        ("number", "0.30000000000000004", 0.3, 1),
        ("number:0.5", "3.4", 3, 1),
        ("number:0.5", "3.6", 3, 0),
        ("number:1%", "101", 100, 1),
        ("number:1%", "102", 100, 0),
    ],
)
async def test_what_is_right(spec: str, answer: str, reference: Any, value: float) -> None:
    assert await scored(spec, answer, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("a1b", 1), ("1,23", 23), ("1,234,567", 1234567), ("v2.0", 2.0), ("7 e5", 5), ("", None), ("e5", 5), ("1..2", 2)],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


@given(st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9))
def test_a_number_is_read_as_it_is_written(number: float) -> None:
    assert last_number(f"it is {number}.") == number
    if isinstance(number, int):
        assert last_number(f"it is {number:,}!") == number


@given(st.text())
def test_reading_an_answer_never_fails_and_is_settled_after_once(text: str) -> None:
    assert yes_or_no(text) in (True, False, None)
    number = last_number(text)
    assert number is None or math.isfinite(number)
    assert " " not in normalised(text).strip().split(" ")


@given(st.text(), st.text())
async def test_f1_is_1_where_exact_is_and_symmetric(a: str, b: str) -> None:
    one, other = await scored("f1", a, b), await scored("f1", b, a)
    assert one == other
    assert 0 <= one <= 1
    assert one == 1 or not await scored("exact", a, b)


@pytest.mark.parametrize(
    ("spec", "answer", "reference", "told"),
    [
        ("yes-no", "Noone knows", False, "says neither yes nor no"),
        ("yes-no", "perhaps", True, "says neither yes nor no"),
        ("number", "none", 3, "holds no number"),
    ],
)
async def test_an_answer_of_another_kind_says_so(spec: str, answer: str, reference: Any, told: str) -> None:
    with pytest.raises(Unread, match=told):
        await scored(spec, answer, reference)


# ---- references that are none ----


@pytest.mark.parametrize(
    ("spec", "reference"),
    [("exact", None), ("exact", [["a"]]), ("contains", {}), ("yes-no", "maybe"), ("yes-no", 1), ("number", "none")],
)
async def test_a_reference_that_its_scorer_does_not_take_is_the_datas_fault(spec: str, reference: Any) -> None:
    with pytest.raises(Unscorable, match=spec):
        await scored(spec, "x", reference)


def test_references_are_held_against_their_scorers_before_anything_is_asked() -> None:
    made = [scorer(spec, Field("answer"), judges=no_judge) for spec in ("yes-no", "recall@2=gold")]
    right = example(True, gold=["a"])
    check(made, [right], Path("d.jsonl"))
    with pytest.raises(ConfigurationError, match=r'^d.jsonl:1: field "gold": recall compares with a list of ids'):
        check(made, [right, example(True, gold=[1.5])], Path("d.jsonl"))


# ---- rankings ----

RANKED = Answer(data=["c", "a", "x", "b"])


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("recall@2", 1 / 2),
        ("recall@4", 1),
        ("precision@2", 1 / 2),
        ("precision@8", 2 / 8),
        ("hit@1", 0),
        ("hit@2", 1),
        ("mrr", 1 / 2),
        ("mrr@1", 0),
        ("ndcg", (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))),
        ("ndcg@2", (1 / math.log2(3)) / (1 + 1 / math.log2(3))),
    ],
)
async def test_rankings_are_measured_as_the_textbook_has_it(spec: str, value: float) -> None:
    assert await scored(spec, RANKED, ["a", "b"]) == pytest.approx(value)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(data=["b", "a"]),
        Answer(data=[{"id": "b", "score": 1}, {"id": "a"}]),
        Answer(data={"ranking": ["b", "a"]}),
        Answer(citations=[Citation(id="b"), Citation(id="a")]),
    ],
)
async def test_a_ranking_is_found_in_data_or_citations(answer: Answer) -> None:
    assert await scored("mrr", answer, "a") == 0.5


async def test_a_ranking_is_found_where_the_option_says() -> None:
    answer = Answer(data={"kept": [{"ids": [7, 3]}]})
    assert await scored("mrr", answer, [3], ranking=Field("kept.0.ids")) == 0.5
    with pytest.raises(ValueError, match='the answer\'s data: there is no field "gone"'):
        await scored("mrr", answer, [3], ranking=Field("gone"))


async def test_an_answer_without_a_ranking_is_told_how_one_is_given() -> None:
    with pytest.raises(ValueError, match="by its citations"):
        await scored("mrr", "a, b", ["a"])


@given(
    st.lists(st.sampled_from("abcdef"), max_size=8), st.sets(st.sampled_from("abcdef"), min_size=1), st.integers(1, 8)
)
def test_every_measure_of_a_ranking_is_between_0_and_1_and_1_for_the_best(
    ranking: list[str], relevant: set[str], k: int
) -> None:
    for measure in rankings.MEASURES.values():
        assert 0 <= measure(ranking, relevant, k) <= 1 + 1e-12
        if measure is not rankings.precision:
            assert measure(sorted(relevant), relevant, len(relevant)) == pytest.approx(1)


# ---- types, functions, judges ----


def half(answer: str, reference: str) -> float:
    return 0.5 if answer == reference else 0.0


async def waits(question: str) -> bool:
    return question == "q"


def lying(answer: str) -> Any:
    return answer


def failing(answer: str) -> bool:
    raise KeyError(answer)


def wanting(prompt: str) -> bool:
    return bool(prompt)


HERE = __name__


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module by a name that a scorer can be called by."""
    import sys

    monkeypatch.setitem(sys.modules, "measures", sys.modules[HERE])


async def test_a_function_is_given_what_it_takes_by_name() -> None:
    assert await scored("measures:half", "a", "a") == 0.5
    assert await scored("measures:waits", "a") == 1
    assert scorer("measures:half", Field("answer"), judges=no_judge).reference == Field("answer")
    assert scorer("measures:waits", Field("answer"), judges=no_judge).reference is None


async def test_what_a_function_does_wrong_is_told_without_what_it_was_given() -> None:
    with pytest.raises(
        ValueError, match="measures:lying returned str; a measure returns True, False or a finite number"
    ):
        await scored("measures:lying", "secret")
    with pytest.raises(ValueError, match=r"measures:failing raised KeyError at test_eval_scorers.py:\d+") as raised:
        await scored("measures:failing", "secret")
    assert "secret" not in str(raised.value)


async def test_pydantic_validates_the_answer_as_json() -> None:
    assert await scored("pydantic:pydantic:Json", '"[1]"') == 1
    assert await scored("pydantic:asmodel.evaluation.report:Now", '{"steps": 1}') == 0
    assert await scored("pydantic:asmodel.evaluation.report:Now", "no JSON") == 0


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("exat", r'there is no scorer "exat" \(did you mean "exact"\?\); there are exact, contains'),
        ("recall", "of how many"),
        ("recall@0", "should be recall@K"),
        ("mrr@x", "should be mrr@K"),
        ("number:-1", "tolerance"),
        ("number:%", "tolerance"),
        ("exact=", "should be SCORER=FIELD"),
        ("measures:wanting", "takes prompt; it is given, by name"),
        ("measures:gone", 'has no "gone"'),
        ("nowhere_at_all:f", "nowhere_at_all cannot be imported"),
        ("pydantic:measures:Gone", 'has no "Gone"'),
    ],
)
def test_a_scorer_that_is_none_is_told_what_there_is(spec: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        scorer(spec, Field("answer"), judges=no_judge)


@pytest.mark.parametrize(
    ("said", "value"),
    [("Yes.", 1), ("no", 0), ("0.75", 0.75), ("80%", 80), (" 4. ", 4), ("Score: 3", 3), ("Yes, 2 of 3", 1)],
)
def test_a_judge_says_yes_no_or_a_number(said: str, value: float) -> None:
    assert verdict(said, "j") == value


def test_a_judge_that_says_neither_is_named() -> None:
    with pytest.raises(ValueError, match='the judge "j" said neither yes nor no, nor a number'):
        verdict("Well.", "j")


def test_the_fields_of_another_scorer_are_its_own() -> None:
    made = scorer("exact=gold", Field("answer"), judges=no_judge)
    assert made.name == "exact=gold"
    assert made.reference == Field("gold")
    assert not inspect.iscoroutinefunction(made.measure)
