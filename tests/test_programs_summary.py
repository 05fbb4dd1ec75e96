"""summary: parts that an edit does not move, a result of a set length, and no call over the upstream's context."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel import Document, InvalidRequest
from asmodel.calls import Call, Capabilities, Chat
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache
from asmodel_programs.summary import Params, length, parts, sentences, summary, within

VOCABULARY = [f"w{n}" for n in range(500)]


def novel(words: int, seed: int = 1) -> str:
    """A text of sentences of 5 to 25 words, and now and then a new paragraph."""
    chance = random.Random(seed)
    said: list[str] = []
    while sum(map(length, said)) < words:
        sentence = " ".join(chance.choices(VOCABULARY, k=chance.randint(5, 25))).capitalize() + "."
        said.append(sentence + ("\n\n" if chance.random() < 0.1 else " "))
    return "".join(said)


def brief(call: Call) -> str:
    """A model that summarises by the first words of each sentence, as many in all as it may use."""
    assert isinstance(call, Chat)
    text, _, asked = call.messages[0].text.rpartition("\n\n")
    most = int(re.search(r"at most (\d+) words", asked)[1])  # type: ignore[index]  # it is there
    firsts = [sentence.split()[0].rstrip(".") for sentence in text.split(". ") if sentence.split()]
    return " ".join(firsts[:most]).capitalize() + "."


class Counted(FunctionUpstream):
    """A model with a context of so many tokens, each word one, that refuses what is longer, as servers do."""

    def __init__(self, context: int | None, answer: Any = brief) -> None:
        can = Capabilities(context=context)
        super().__init__(answer, name="up", capabilities=can)
        self._context = context

    async def count(self, text: str) -> int:
        return len(text.split())

    async def send(self, call: Call, terms: Any) -> Any:
        assert isinstance(call, Chat)
        asked = len(call.messages[0].text.split())
        most = call.params["max_tokens"]
        assert isinstance(most, int)
        if self._context is not None:
            assert asked + most <= self._context, "a call over the context"
        return await super().send(call, terms)


TEXTS = st.text(alphabet="ab .\n!?。é", max_size=400)


@given(TEXTS, st.integers(1, 40))
def test_of_the_text_nothing_is_lost_and_no_sentence_is_longer_than_it_may_be(text: str, most: int) -> None:
    found = sentences(text, most)
    assert "".join(found) == text
    assert all(length(sentence) <= most for sentence in found)


@given(st.lists(st.text("abc .", min_size=1, max_size=30), max_size=40), st.integers(1, 30))
def test_parts_are_the_units_in_their_order_and_none_of_several_is_too_long(units: list[str], most: int) -> None:
    found = parts(units, most)
    assert "".join(found) == "".join(units)
    assert all(length(part) <= most for part in found if part not in units)


UNITS = [f"s{n} " for n in range(400)]


@given(st.integers(3, 40), st.integers(0, 399), st.sampled_from(["change", "insert", "delete"]), st.integers(0, 10**6))
def test_an_edit_moves_no_part_but_those_within_its_reach(most: int, at: int, how: str, word: int) -> None:
    """Each unit is a word, so that a reach of `most` words is one of `most` units."""
    edited = [*UNITS]
    if how == "change":
        edited[at] = f"x{word} "
    elif how == "insert":
        edited.insert(at, f"x{word} ")
    else:
        del edited[at]
    before, after = parts(UNITS, most), parts(edited, most)
    untouched = [part for part in before if part in after]
    moved = "".join(part for part in before if part not in after).split()
    assert len(untouched) + len([part for part in before if part not in after]) == len(before)
    assert all(abs(int(unit[1:]) - at) <= 2 * most for unit in moved)


@given(st.integers(60, 4000), st.integers(0, 10**6), st.sampled_from([80, 150, 400]))
async def test_the_result_is_of_the_set_length_and_no_call_is_over_the_context(
    words: int, seed: int, part: int
) -> None:
    upstream = Counted(context=part + 200)
    answer = await run_program(summary, novel(words, seed), upstream=upstream, params={"words": 40, "part": part})
    assert 0 < length(answer.text) <= 40


async def test_where_a_part_is_more_than_the_context_it_is_cut_further() -> None:
    upstream = Counted(context=300)
    answer = await run_program(summary, novel(3000), upstream=upstream, params={"words": 50, "part": 1000})
    assert 0 < length(answer.text) <= 50


async def test_a_text_many_times_the_context_is_summarised_and_a_changed_word_buys_its_way_to_the_top_alone() -> None:
    upstream, store = Counted(context=700), MemoryCache()
    text = novel(40_000)
    params = Params(words=60, part=300)
    whole = await run_program(summary, text, upstream=upstream, params=params, cache=store)
    assert isinstance(whole.data, dict)
    bought, levels = len(upstream.calls), whole.data["levels"]
    assert isinstance(levels, int)
    assert bought > 150
    assert levels >= 3
    await run_program(summary, text, upstream=upstream, params=params, cache=store)
    assert len(upstream.calls) == bought, "the same text buys nothing"
    chance, most = random.Random(7), 0
    for _ in range(12):
        words = text.split(" ")
        words[chance.randrange(len(words))] = "changed"
        before = len(upstream.calls)
        await run_program(summary, " ".join(words), upstream=upstream, params=params, cache=store)
        most = max(most, len(upstream.calls) - before)
    # A path is one call a level; where the edit makes or unmakes an end of a part, it is two or three there.
    assert most <= 3 * levels
    assert most < bought / 8


async def test_a_short_text_is_one_call_and_one_that_is_short_enough_is_left_as_it_is() -> None:
    upstream = Counted(context=None)
    answer = await run_program(summary, novel(200), upstream=upstream)
    assert (len(upstream.calls), answer.data) == (1, {"levels": 1, "parts": 1})
    untouched = await run_program(summary, "Short as it is.", upstream=upstream)
    assert (len(upstream.calls), untouched.text) == (1, "Short as it is.")


async def test_what_comes_out_too_long_is_summarised_again_and_then_cut_after_a_sentence() -> None:
    def talks(call: Call) -> str:
        return "One two three. " * 20

    upstream = Counted(None, talks)
    params = {"words": 10}
    answer = await run_program(summary, novel(200), upstream=upstream, params=params, cache=MemoryCache())
    assert answer.text == "One two three. One two three. One two three."
    assert len(upstream.calls) == 2, "the second summary of the same words is the same step, and would say the same"


async def test_documents_are_read_where_there_are_some_and_the_focus_is_told() -> None:
    upstream = Counted(None)
    documents = [Document(text=novel(120, 1)), Document(text=novel(120, 2))]
    await run_program(summary, "?", upstream=upstream, documents=documents, params={"focus": "money"})
    (call,) = upstream.calls
    assert isinstance(call, Chat)
    assert "attending to money, in at most 100 words" in call.messages[0].text
    assert documents[1].text.split()[0] in call.messages[0].text


@pytest.mark.parametrize(
    ("asked", "params", "context", "says"),
    [
        ("", {}, None, "wants a text"),
        (novel(300), {"words": 500}, None, "cannot be made of parts of 400"),
        (novel(200), {}, 30, "ask for fewer words"),
    ],
)
async def test_what_cannot_be_is_said(asked: str, params: dict[str, Any], context: int | None, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        await run_program(summary, asked, upstream=Counted(context), params=params)


@pytest.mark.parametrize(
    ("text", "words", "kept"),
    [
        ("A b. C d e.", 2, "A b."),
        ("A b. C d e.", 5, "A b. C d e."),
        ("a b c d e f", 3, "a b c"),
        ("A b. Considerations outlast others", 4, "A b."),
        ("Considerations outlast all", 6, "Considerations outlast all"),
        ("Considerations outlast all others", 4, "Considerations outlast all"),
        ("鯨は長く歌い続ける。鯨は大きい。" * 9, 2, "鯨は長く歌い続ける。鯨は大きい。"),
        ("鯨" * 99, 2, "鯨" * 16),
        ("", 3, ""),
    ],
)
def test_within_so_many_words_whole_sentences_are_kept(text: str, words: int, kept: str) -> None:
    assert within(text, words) == kept


def test_length_counts_words_and_where_none_are_written_apart_characters() -> None:
    counted: Sequence[tuple[str, int]] = [("", 0), ("one two", 2), ("鯨は長く歌い続ける。" * 8, 10)]
    for text, words in counted:
        assert length(text) == words
