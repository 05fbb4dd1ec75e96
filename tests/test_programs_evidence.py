"""evidence-qa whole: its filter in three rankings, its search in three, and how one answer comes of several chains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel import Answer, Document, InvalidRequest, Limits, Reply, StepError
from asmodel.calls import Call, Chat, Completion, Score, TokenLogprob
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache
from asmodel_programs.evidence_qa import (
    Chain,
    EvidenceParams,
    Thought,
    answer_given,
    answer_in,
    bm25,
    chosen,
    evidence_filter,
    evidence_qa,
    next_thought,
    next_thought_in_chat,
    numbers_in,
    same,
    thought_given,
    yes_over_no,
)

ANIMALS = ["Dogs bark at night.", "Whales sing for hours.", "Cats sleep all day.", "Whales are large.", "Birds fly."]
QUESTION = "Do whales sing?"


def likely_after_whales(call: Call) -> Any:
    """To this model, whales make the question likely, and singing more so; without a paragraph it is in between."""
    assert isinstance(call, Score)
    if call.context == "Q:":
        return -5.0, 1
    return (-1.0 if "sing" in call.context else -3.0 if "Whales" in call.context else -8.0), 1


async def ranked(model: Any, paragraphs: Sequence[str] = ANIMALS, **params: Any) -> list[str]:
    upstream = FunctionUpstream(model, name="up")
    answer = await run_program(
        evidence_filter, QUESTION, upstream=upstream, params={"paragraphs": list(paragraphs), **params}
    )
    assert answer.text.split() == [c.id for c in answer.citations]
    return [c.id for c in answer.citations]


# The filter


async def test_the_filter_alone_ranks_all_paragraphs_and_buys_a_score_for_each_and_nothing_else() -> None:
    assert await ranked(likely_after_whales) == ["2", "4", "1", "3", "5"]


async def test_paragraphs_are_kept_by_their_number_or_by_their_gain_over_no_paragraph() -> None:
    assert await ranked(likely_after_whales, keep=2) == ["2", "4"]
    assert await ranked(likely_after_whales, gain=0.0) == ["2", "4"]
    assert await ranked(likely_after_whales, gain=3.0) == ["2"]
    assert await ranked(likely_after_whales, gain=0.0, keep=1) == ["2"]
    assert await ranked(likely_after_whales, gain=9.0) == []


async def test_where_nothing_makes_the_question_likelier_the_answer_says_so_and_nothing_is_asked() -> None:
    upstream = FunctionUpstream(likely_after_whales, name="up")
    params: dict[str, Any] = {"paragraphs": ANIMALS, "gain": 9.0}
    answer = await run_program(evidence_qa, QUESTION, upstream=upstream, params=params)
    assert answer.text.startswith("None of the paragraphs")
    assert not any(isinstance(call, Chat) for call in upstream.calls)


async def test_a_prefilter_scores_only_the_best_by_words() -> None:
    upstream = FunctionUpstream(likely_after_whales, name="up")
    params: dict[str, Any] = {"paragraphs": ANIMALS, "prefilter": 2}
    answer = await run_program(evidence_filter, QUESTION, upstream=upstream, params=params)
    assert [c.id for c in answer.citations] == ["2", "4"]
    assert len(upstream.calls) == 2
    assert all(isinstance(call, Score) and "Whales" in call.context for call in upstream.calls)


def tokens(**logprobs: float) -> Reply:
    top = tuple(sorted(logprobs.items(), key=lambda pair: -pair[1]))
    return Reply(text=top[0][0], logprobs=(TokenLogprob(*top[0], top),))


async def test_by_the_first_token_what_counts_is_how_likely_yes_is_against_no() -> None:
    def judge(call: Call) -> Any:
        assert isinstance(call, Chat)
        text = call.messages[0].text
        assert call.params["max_tokens"] == 1
        assert call.params["logprobs"] is True
        return tokens(Yes=-0.1, No=-2.5) if "sing for" in text else tokens(No=-0.5, Yes=-1.0, Well=-2.0)

    assert (await ranked(judge, ranking="first-token"))[0] == "2"


def test_both_spellings_of_a_yes_count_and_one_that_is_not_among_the_likeliest_is_as_likely_as_the_last() -> None:
    both = tokens(**{"Yes": math.log(0.2), " yes": math.log(0.3), "No": math.log(0.5)})
    assert yes_over_no("helps", both) == pytest.approx(0.0)
    assert yes_over_no("helps", tokens(Yes=-0.1, Perhaps=-4.0)) == pytest.approx(3.9)
    with pytest.raises(StepError, match=r'step "helps": the upstream reports no log-probabilities'):
        yes_over_no("helps", Reply(text="Yes"))


async def test_by_a_list_the_model_puts_ten_at_a_time_in_order_from_the_end_and_the_best_reach_the_front() -> None:
    asked: list[int] = []

    def judge(call: Call) -> Any:
        assert isinstance(call, Chat)
        lines = [line for line in call.messages[0].text.splitlines() if line.startswith("[")]
        asked.append(len(lines))
        best = sorted(range(len(lines)), key=lambda i: -int(lines[i].rsplit(" ", 1)[1]))
        return ", ".join(str(i + 1) for i in best)

    # The paragraph of the greatest number is the best, and stands last.
    paragraphs = [f"paragraph {i}" for i in range(23)]
    order = await ranked(judge, paragraphs, ranking="listwise")
    assert [int(id) - 1 for id in order[:5]] == [22, 21, 20, 19, 18]
    assert sorted(map(int, order)) == list(range(1, 24))
    assert max(asked) == 10
    assert await ranked(judge, paragraphs[:3], ranking="listwise") == ["3", "2", "1"]


def four(call: Call) -> str:
    return "Passage 4, I think; and 99."


async def test_passages_that_the_model_does_not_name_stay_in_their_order_behind_those_that_it_names() -> None:
    assert await ranked(four, ranking="listwise") == ["4", "1", "2", "3", "5"]


def test_a_list_without_a_number_is_not_read() -> None:
    assert numbers_in("3, 1 and 3") == [3, 1]
    with pytest.raises(ValueError, match="numbers of passages"):
        numbers_in("none of them")


def nobody(call: Call) -> str:
    raise AssertionError("a model was asked")


async def test_by_words_alone_no_model_is_asked() -> None:
    assert (await ranked(nobody, ranking="bm25"))[0] == "2"


async def test_a_gain_without_likelihoods_is_refused() -> None:
    upstream = FunctionUpstream(likely_after_whales, name="up")
    params: dict[str, Any] = {"paragraphs": ["a"], "gain": 1.0, "ranking": "listwise"}
    with pytest.raises(InvalidRequest, match="`gain` compares likelihoods"):
        await run_program(evidence_qa, QUESTION, upstream=upstream, params=params)


async def test_documents_without_a_name_are_numbered_after_the_paragraphs() -> None:
    upstream = FunctionUpstream(likely_after_whales, name="up")
    documents = [Document(text=ANIMALS[1]), Document(text=ANIMALS[3], id="large")]
    params: dict[str, Any] = {"paragraphs": ANIMALS[:1]}
    answer = await run_program(evidence_filter, QUESTION, upstream=upstream, documents=documents, params=params)
    assert [c.id for c in answer.citations] == ["2", "large", "1"]


WORDS = st.lists(st.sampled_from(["whale", "song", "sea", "night", "dog", "cat"]), max_size=8).map(" ".join)


@given(WORDS, st.lists(WORDS, max_size=6))
def test_bm25_is_nothing_without_a_common_word_and_something_with_one(question: str, paragraphs: list[str]) -> None:
    scores = bm25(question, paragraphs)
    for paragraph, score in zip(paragraphs, scores, strict=True):
        assert (score > 0) == bool(set(question.split()) & set(paragraph.split()))


def test_bm25_prefers_the_rarer_word_and_the_shorter_text() -> None:
    first, second, third = bm25("whale song", ["whale in the sea", "song in the sea", "a song a song in the wide sea"])
    assert bm25("whale", ["a whale", "a whale and much besides"])[0] > bm25("whale", ["a whale", "a whale and more"])[1]
    assert first > second
    assert third > 0


# The search


class Thinker:
    """A model with a script: what it thinks, by paragraph and how many thoughts there are; and what it finds likely."""

    def __init__(self, thoughts: dict[tuple[str, int], str], likely: dict[str, float] | None = None) -> None:
        self.thoughts = thoughts
        self.likely = likely or {}
        self.upstream = FunctionUpstream(self.answer, name="up")

    def answer(self, call: Call) -> Any:
        if isinstance(call, Completion):
            shown = call.prompt.rsplit("\n\n", 1)[1]
            assert "Question: Why?" in shown
            return self.thoughts[shown.split("\n")[0].removeprefix("Passage: "), shown.count("Step: ")]
        if isinstance(call, Score):
            text = call.continuation.strip()
            if text in ("yes.", "no."):
                return self.likely.get(text, -2.0), 1
            where = ("P" if "paragraph" in call.context else "") + ("Q" if "Why?" in call.context else "")
            return self.likely.get(f"{text}|{where}", self.likely.get(text, -1.0)), 1
        return "because"

    async def search(self, *paragraphs: str, **params: Any) -> Answer:
        return await run_program(
            evidence_qa,
            "Why?",
            upstream=self.upstream,
            params={"paragraphs": list(paragraphs), "keep": 9, "search": "nll", "answers": "yes-no", **params},
        )

    @property
    def thought(self) -> list[Completion]:
        return [call for call in self.upstream.calls if isinstance(call, Completion)]


A, B = "paragraph a", "paragraph b"


async def test_each_new_thought_is_had_over_one_paragraph_and_the_thoughts_before_it() -> None:
    model = Thinker(
        {(A, 0): "A first.", (B, 0): "B first.", (A, 1): "So the answer is yes.", (B, 1): "So the answer is no."},
        likely={"A first.": -0.1, "B first.": -9.0, "So the answer is yes.": -0.1},
    )
    answer = await model.search(A, B, complete=1)
    assert [(A in call.prompt, B in call.prompt) for call in model.thought] == [(True, False), (False, True)] * 2
    assert model.thought[-1].prompt.endswith(f"Passage: {B}\nQuestion: Why?\nStep: A first.\nStep:")
    assert answer.text == "Yes"
    assert isinstance(answer.data, dict)
    assert answer.data["thoughts"] == ["A first.", "So the answer is yes."]
    assert [c.text for c in answer.citations] == [A]


async def test_the_search_ends_with_more_than_k_complete_chains() -> None:
    thoughts = {(p, n): "So the answer is no." if n else f"{p}." for p in (A, B) for n in range(9)}
    for complete, grown in ((0, 2), (1, 2), (2, 3), (3, 3)):
        model = Thinker(thoughts)
        answer = await model.search(A, B, complete=complete)
        assert len(model.thought) == 2 * grown
        assert isinstance(answer.data, dict)
        assert answer.data["votes"] == {"no": 2 * (grown - 1)}


async def test_the_best_chain_is_grown_first() -> None:
    thoughts = {(A, 0): "Dull.", (B, 0): "Bright.", (A, 1): "So the answer is yes.", (B, 1): "So the answer is yes."}
    model = Thinker(thoughts, likely={"Dull.": -9.0, "Bright.": -0.1})
    await model.search(A, B, complete=0)
    assert all("Step: Bright." in call.prompt for call in model.thought[2:])


async def test_by_nll_a_copied_phrase_wins_and_by_delta_the_one_that_uses_the_paragraph_and_keeps_to_the_question() -> (
    None
):
    likely = {
        # Copied: likely whatever it is given. p(S|Q,P), p(S|Q), p(S|P):
        "Copied.|PQ": -0.1,
        "Copied.|Q": -0.2,
        "Copied.|P": -0.1,
        # Thought: less likely, but much less so without the paragraph, or without the question.
        "Thought.|PQ": -1.0,
        "Thought.|Q": -4.0,
        "Thought.|P": -3.0,
    }
    thoughts = {(A, 0): "Copied.", (B, 0): "Thought."} | {(p, 1): "So the answer is yes." for p in (A, B)}
    for search, first in (("nll", "Copied."), ("delta", "Thought.")):
        model = Thinker(thoughts, likely)
        answer = await model.search(A, B, complete=0, search=search)
        assert f"Step: {first}" in model.thought[2].prompt
        if search == "delta":
            assert isinstance(answer.data, dict)
            # The mean of -3 + -2 for the thought and of nothing for its answer, which is equally likely everywhere.
            assert answer.data["rank"] == pytest.approx(-2.5)


def test_what_delta_compares_is_the_thought_with_paragraph_and_question_and_without_either() -> None:
    assert thought_given("P", "Q", ["one"], "two") == ("P\n\nQ: Q\nA: one", " two")
    assert thought_given("", "Q", ["one"], "two") == ("Q: Q\nA: one", " two")
    assert thought_given("P", "", [], "two") == ("P\n\nA:", " two")
    assert answer_given("Q", ["one"], "yes") == ("Q: Q\nA: one So the answer is", " yes.")


@pytest.mark.parametrize(("likely", "answer"), [({"yes.": -1.0, "no.": -3.0}, "Yes"), ({"yes.": -3.0}, "No")])
async def test_at_the_greatest_depth_the_likelier_of_yes_and_no_is_the_answer(
    likely: dict[str, float], answer: str
) -> None:
    model = Thinker({(A, n): f"Thought {n}." for n in range(9)}, likely)
    found = await model.search(A, depth=3, complete=0)
    assert found.text == answer
    assert len(model.thought) == 3
    assert isinstance(found.data, dict)
    assert found.data["thoughts"] == ["Thought 0.", "Thought 1.", "Thought 2."]


async def test_after_the_last_expansion_the_best_chains_are_brought_to_an_answer() -> None:
    model = Thinker({(p, n): f"{p} {n}." for p in (A, B) for n in range(9)}, {"yes.": -1.0})
    answer = await model.search(A, B, depth=9, complete=1, expansions=2)
    assert len(model.thought) == 4
    assert isinstance(answer.data, dict)
    assert answer.data["votes"] == {"yes": 2}


async def test_a_thought_that_the_chain_has_had_already_or_that_is_empty_makes_no_chain() -> None:
    model = Thinker({(A, 0): "Hm.", (A, 1): "Hm.", (B, 0): "", (B, 1): "So the answer is no."})
    answer = await model.search(A, B, complete=3)
    assert (answer.text, len(model.thought)) == ("No", 4)
    silent = Thinker({(A, 0): ""}, {"yes.": -1.0})
    assert (await silent.search(A)).text == "Yes"


async def test_open_answers_are_taken_from_the_thought_or_concluded() -> None:
    model = Thinker({(A, 0): "It rains.", (A, 1): "So the answer is the rain."})
    assert (await model.search(A, answers="open", complete=0)).text == "the rain"
    endless = Thinker({(A, n): f"Thought {n}." for n in range(9)})
    assert (await endless.search(A, answers="open", complete=0, depth=2)).text == "because"


async def test_a_chat_model_that_reports_its_own_log_probabilities_is_searched_by_them_and_nothing_is_scored() -> None:
    def chatting(call: Call) -> Any:
        assert isinstance(call, Chat)
        text = call.messages[0].text
        if "Say Yes or No" in text:
            return tokens(No=-0.2, Yes=-3.0)
        assert call.params["logprobs"] is True
        said = f"Thought {text.count('Step: ')}."
        return Reply(text=said, logprobs=(TokenLogprob(said, -1.5),))

    upstream = FunctionUpstream(chatting, name="up")
    params: dict[str, Any] = {
        "paragraphs": [A],
        "keep": 9,
        "search": "generated",
        "answers": "yes-no",
        "depth": 2,
        "complete": 0,
    }
    # What ranks the paragraph needs no model: there is only one.
    with pytest.raises(AssertionError):
        chatting(Score(identity="", context="", continuation=""))
    answer = await run_program(
        evidence_qa, "Why?", upstreams={"up": upstream, "default": FunctionUpstream(lambda call: -1.0)}, params=params,
        roles={"writer": "up"},
    )  # fmt: skip
    assert answer.text == "No"
    assert isinstance(answer.data, dict)
    assert answer.data["rank"] == pytest.approx(1.5)
    assert next_thought(A, "Why?", ["x"]).text in next_thought_in_chat(A, "Why?", ["x"])


async def test_a_limit_ends_the_search_with_the_best_answer_so_far() -> None:
    thoughts = {(A, n): f"Thought {n}." for n in range(20)} | {(B, n): "So the answer is yes." for n in range(20)}
    model = Thinker(thoughts)
    params: dict[str, Any] = {
        "paragraphs": [A, B],
        "keep": 9,
        "search": "nll",
        "answers": "yes-no",
        "complete": 9,
        "depth": 9,
    }
    answer = await run_program(evidence_qa, "Why?", upstream=model.upstream, params=params, limits=Limits(calls=12))
    assert (answer.text, answer.finish) == ("Yes", "length")


async def test_the_same_search_again_buys_nothing_and_gives_the_same_chain() -> None:
    model, store = Thinker({(p, n): f"{p} {n}." for p in (A, B) for n in range(9)}, {"yes.": -1.0}), MemoryCache()
    params: dict[str, Any] = {"paragraphs": [A, B], "keep": 9, "search": "delta", "answers": "yes-no"}
    first = await run_program(evidence_qa, "Why?", upstream=model.upstream, params=params, cache=store)
    bought = len(model.upstream.calls)
    assert await run_program(evidence_qa, "Why?", upstream=model.upstream, params=params, cache=store) == first
    assert len(model.upstream.calls) == bought


# One answer of several chains


def chain(answer: str, nll: float, paragraph: int = 0) -> Chain:
    return Chain((Thought(f"{answer} at {nll}", paragraph, -nll, 1),), answer)


EVIDENCE = [Document(text=A, id="a"), Document(text=B, id="b")]


def test_a_vote_takes_the_answer_of_most_chains_and_best_that_of_the_best_ranked() -> None:
    chains = [chain("yes", 2.0), chain("no", 1.0, 1), chain("yes", 3.0)]
    vote = chosen(EvidenceParams(search="nll", answers="yes-no", choice="vote"), chains, EVIDENCE)
    best = chosen(EvidenceParams(search="nll", answers="yes-no", choice="best"), chains, EVIDENCE)
    assert (vote.text, best.text) == ("Yes", "No")
    # The chain that is shown is the best of those with the answer, and cited is what it used.
    assert ([c.id for c in vote.citations], [c.id for c in best.citations]) == (["a"], ["b"])
    assert vote.data == {"thoughts": ["yes at 2.0"], "rank": 2.0, "votes": {"yes": 2, "no": 1}}


def test_of_answers_with_as_many_votes_that_of_the_best_ranked_chain_is_taken() -> None:
    chains = [chain("yes", 2.0), chain("no", 1.0)]
    assert chosen(EvidenceParams(search="nll", answers="yes-no"), chains, EVIDENCE).text == "No"


@pytest.mark.parametrize(
    ("thought", "kind", "answer"),
    [
        ("Thus, the answer is no.", "yes-no", "no"),
        ("So the answer is: Yes!", "yes-no", "yes"),
        ("The answer to the question is no.", "yes-no", "no"),
        ("So the answer is nothing to them.", "yes-no", ""),
        ("Yes, whales sing.", "yes-no", ""),
        ("So the answer is 3.5 km.", "open", "3.5 km"),
        ("So the answer is the “Blue Train”.", "open", "the “Blue Train”"),
        ("It rains.", "open", ""),
    ],
)
def test_an_answer_is_read_from_a_thought_that_gives_it(thought: str, kind: str, answer: str) -> None:
    assert answer_in(thought, kind) == answer


def test_answers_that_differ_in_form_alone_are_one_vote() -> None:
    assert same("The Beatles!") == same("beatles")
    assert same("A") != same("")
