"""The demo's questions are what their file says they are: well formed, answerable from one paragraph, not leaking."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

FILE = Path(__file__).parent / "demo" / "questions.json"

Wording = Literal["shared", "reworded"]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Paragraph(Record):
    id: str
    text: str


class Theme(Record):
    name: str
    paragraphs: list[Paragraph]


class Question(Record):
    id: str
    theme: str
    question: str
    aliases: list[str]
    paragraph: str
    wording: Wording


class Opening(Record):
    theme: Theme
    question: Question


class Demo(Record):
    about: str
    opening: Opening
    themes: list[Theme]
    questions: list[Question]


# The closed classes of English only (articles, pronouns, question words, prepositions, conjunctions, auxiliaries,
# counting words): a noun, verb, adjective or adverb never goes on this list to let a question pass.
CLOSED_CLASSES = """
    a an the this that these those each every all any no not
    i he him his she her hers it its itself they them their theirs we us our you your one someone anyone whoever
    who whom whose which what when where why how
    at by for from in into of off on onto out over through to under up down with without along beside behind
    and or but so if because as than while until since
    am is are was were be been being do does did has have had can could may might must shall should will would
"""
FUNCTION_WORDS = frozenset(CLOSED_CLASSES.split())


def words(text: str) -> list[str]:
    """Lower-case words; a hyphen or an apostrophe ends one, and a possessive s is dropped."""
    return re.findall(r"[a-z]+", re.sub(r"'s\b", "", text.lower()))


def content_words(text: str) -> set[str]:
    return {word for word in words(text) if word not in FUNCTION_WORDS}


def stem(word: str) -> str:
    return re.sub(r"(?<=[a-z]{3})(ing|ed|es|er|e|s)$", "", word)


def same_stem(left: str, right: str) -> bool:
    """Without its ending, a word of up to three letters has to be equal; of a longer one, the first five letters have
    to agree, or as many as the shorter word has (seals, sealed; paint, painting, painter; but not ice, icicle)."""
    left, right = stem(left), stem(right)
    length = min(len(left), len(right), 5)
    return left == right if length <= 3 else left[:length] == right[:length]


def shared_words(question: str, paragraph: str) -> set[str]:
    """The question's content words that also occur, by stem, in the paragraph."""
    theirs = content_words(paragraph)
    return {word for word in content_words(question) if any(same_stem(word, other) for other in theirs)}


def occurs(alias: str, text: str) -> bool:
    """The demo's rule for a right answer: the alias stands in the text as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(alias)}(?!\w)", text, re.IGNORECASE) is not None


DEMO = Demo.model_validate_json(FILE.read_text(encoding="utf-8"))
THEMES = [*DEMO.themes, DEMO.opening.theme]
QUESTIONS = [*DEMO.questions, DEMO.opening.question]
PARAGRAPHS = [paragraph for theme in THEMES for paragraph in theme.paragraphs]

every_question = pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)


def theme_of(question: Question) -> Theme:
    return next(theme for theme in THEMES if theme.name == question.theme)


def paragraph_of(question: Question) -> Paragraph:
    return next(paragraph for paragraph in theme_of(question).paragraphs if paragraph.id == question.paragraph)


def position_of(question: Question) -> int:
    return [paragraph.id for paragraph in theme_of(question).paragraphs].index(question.paragraph)


def test_there_are_twenty_questions_and_one_opening_outside_them() -> None:
    assert len(DEMO.questions) == 20
    assert DEMO.opening.question not in DEMO.questions
    assert DEMO.opening.theme.name not in {theme.name for theme in DEMO.themes}


def test_there_are_two_to_four_themes_of_ten_paragraphs_and_each_is_asked_five_to_ten_times() -> None:
    assert 2 <= len(DEMO.themes) <= 4
    assert all(len(theme.paragraphs) == 10 for theme in THEMES)
    asked = Counter(question.theme for question in DEMO.questions)
    assert set(asked) == {theme.name for theme in DEMO.themes}
    assert all(5 <= count <= 10 for count in asked.values())


def test_every_name_and_id_is_used_once() -> None:
    for names in (
        [theme.name for theme in THEMES],
        [paragraph.id for paragraph in PARAGRAPHS],
        [paragraph.text for paragraph in PARAGRAPHS],
        [question.id for question in QUESTIONS],
        [question.question for question in QUESTIONS],
    ):
        assert len(set(names)) == len(names)


def test_no_paragraph_is_asked_about_twice() -> None:
    asked = [question.paragraph for question in QUESTIONS]
    assert len(set(asked)) == len(asked)


def test_all_text_is_plain_ascii() -> None:
    assert FILE.read_text(encoding="utf-8").isascii()


@pytest.mark.parametrize("paragraph", PARAGRAPHS, ids=lambda paragraph: paragraph.id)
def test_a_paragraph_has_35_to_50_words(paragraph: Paragraph) -> None:
    assert 35 <= len(paragraph.text.split()) <= 50


def test_the_wordings_alternate_so_that_each_has_ten_questions() -> None:
    wordings = [question.wording for question in DEMO.questions]
    assert wordings == ["shared", "reworded"] * 10


@pytest.mark.parametrize("wording", ["shared", "reworded"])
def test_each_position_in_a_theme_holds_the_answer_once_per_wording(wording: Wording) -> None:
    positions = [position_of(question) for question in DEMO.questions if question.wording == wording]
    assert sorted(positions) == list(range(10))


@every_question
def test_a_question_is_one_short_question(question: Question) -> None:
    assert question.question.endswith("?")
    assert question.question.count("?") == 1
    assert 5 <= len(question.question.split()) <= 20


@every_question
def test_an_answer_is_a_short_name_or_thing_and_neither_a_number_nor_yes_or_no(question: Question) -> None:
    assert question.aliases
    for alias in question.aliases:
        assert re.fullmatch(r"[A-Za-z]+( [A-Za-z]+){0,2}", alias)
        assert len(alias) >= 3
        assert not content_words(alias) & {"yes", "no", "true", "false"}
        assert content_words(alias)


@every_question
def test_every_alias_stands_in_the_paragraph_that_answers_and_in_no_other_of_the_theme(question: Question) -> None:
    for alias in question.aliases:
        holders = [paragraph.id for paragraph in theme_of(question).paragraphs if occurs(alias, paragraph.text)]
        assert holders == [question.paragraph]


@every_question
def test_no_question_names_its_answer(question: Question) -> None:
    for alias in question.aliases:
        assert not occurs(alias, question.question)
        assert not shared_words(alias, question.question)


def test_no_theme_name_gives_an_answer_away() -> None:
    for question in QUESTIONS:
        assert not any(occurs(alias, question.theme) for alias in question.aliases)


@pytest.mark.parametrize(
    "question", [question for question in QUESTIONS if question.wording == "reworded"], ids=lambda question: question.id
)
def test_a_reworded_question_shares_no_content_word_with_its_paragraph(question: Question) -> None:
    assert shared_words(question.question, paragraph_of(question).text) == set()


@pytest.mark.parametrize(
    "question", [question for question in QUESTIONS if question.wording == "shared"], ids=lambda question: question.id
)
def test_a_shared_question_has_at_least_three_content_words_of_its_paragraph(question: Question) -> None:
    assert len(shared_words(question.question, paragraph_of(question).text)) >= 3


def test_two_words_of_one_stem_count_as_shared_and_function_words_do_not() -> None:
    assert shared_words("Who seals the bag?", "It was sealed by the widow, who kept a bag.") == {"seals", "bag"}
    assert shared_words("Who makes painters' tools?", "The maker of this painting.") == {"makes", "painters"}
    assert shared_words("What is the ice?", "What an icicle this is.") == set()


def test_an_alias_matches_whole_words_only_in_any_case() -> None:
    assert occurs("hare", "A white Hare.")
    assert not occurs("hare", "They share it.")


def test_the_file_says_how_it_was_written_and_that_none_is_dropped() -> None:
    assert "before any model had seen it" in DEMO.about
    assert "none is dropped" in DEMO.about
