"""The programs that come along: what each shows a model, what it makes of the answers, and that it is short."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import asmodel_programs
from asmodel import Answer, Citation, Document, InvalidRequest, Message, StepError, ToolCall, canonical_json, tracing
from asmodel.calls import Call, Chat, Delta, Reply, Score, key
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache
from asmodel_programs.evidence_qa import EvidenceParams, answer_from, evidence_qa, question_given
from asmodel_programs.plain import plain
from asmodel_programs.self_consistency import ASK, final_answer, normalised, self_consistency, thought

FILES = sorted(p for p in Path(asmodel_programs.__file__).parent.glob("*.py") if p.name != "__init__.py")


LONGEST = {"evidence_qa": 440, "selection_inference": 100, "self_consistency": 100, "summary": 130}
"""Lines of a file; of the others, 85: a page of their paper. These are read in one sitting all the same."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_program_is_one_short_file_that_says_what_it_is_for_and_where_it_is_from(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST.get(file.stem, 85)
    assert text.startswith('"""')
    if file.stem != "plain":
        assert re.search(r"^Source: .*?arXiv\s\d{4}\.\d{5}\s\(\d{4}\)", text, re.MULTILINE | re.DOTALL)


# plain


async def test_plain_passes_the_whole_conversation_on_with_every_hint() -> None:
    conversation = [
        Message("system", "Be brief."),
        Message("user", "one", name="eve"),
        Message("assistant", "two"),
        Message("user", [{"type": "text", "text": "three"}]),
    ]
    upstream = FunctionUpstream(lambda call: Reply(text="four", finish="length"), name="up")
    hints: dict[str, Any] = {"temperature": 0.2, "stop": ["x"], "seed": 7}
    answer = await run_program(plain, conversation, upstream=upstream, hints=hints)
    assert answer == Answer(text="four", finish="length")
    (call,) = upstream.calls
    assert isinstance(call, Chat)
    assert (list(call.messages), call.params) == (conversation, hints)


async def test_plain_streams() -> None:
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    await run_program(plain, "hi", upstream=FunctionUpstream(lambda call: "a long answer", name="up"), emit=emit)
    assert "".join(d.text for d in deltas) == "a long answer"


# evidence-qa

PARAGRAPHS = ["Dogs bark at night.", "Whales sing for hours.", "Cats sleep all day.", "Whales are large."]
LIKELY = {PARAGRAPHS[0]: -9.0, PARAGRAPHS[1]: -2.0, PARAGRAPHS[2]: -8.0, PARAGRAPHS[3]: -3.0}
QUESTION = "Do whales sing?"


def reader(call: Call) -> Any:
    """A model to which whales make the question likely."""
    if isinstance(call, Score):
        return LIKELY[call.context.partition("\n\n")[0]], 4
    assert isinstance(call, Chat)
    return "Yes, they do."


async def test_evidence_qa_answers_from_the_paragraph_that_makes_the_question_most_likely_and_cites_it() -> None:
    upstream = FunctionUpstream(reader, name="up")
    answer = await run_program(evidence_qa, QUESTION, upstream=upstream, params={"paragraphs": PARAGRAPHS})
    assert answer == Answer(text="Yes, they do.", citations=[Citation(id="2", text=PARAGRAPHS[1])])
    *scores, asked = upstream.calls
    assert [type(call) for call in scores] == [Score] * 4
    assert isinstance(asked, Chat)
    (message,) = asked.messages
    assert PARAGRAPHS[1] in message.text
    assert QUESTION in message.text
    assert not any(paragraph in message.text for paragraph in PARAGRAPHS if paragraph != PARAGRAPHS[1])


async def test_evidence_qa_keeps_as_many_as_it_is_told_the_best_first() -> None:
    upstream = FunctionUpstream(reader, name="up")
    params = EvidenceParams(paragraphs=PARAGRAPHS, keep=2)
    answer = await run_program(evidence_qa, QUESTION, upstream=upstream, params=params)
    assert [c.id for c in answer.citations] == ["2", "4"]
    asked = upstream.calls[-1]
    assert isinstance(asked, Chat)
    text = asked.messages[0].text
    assert text.index(PARAGRAPHS[1]) < text.index(PARAGRAPHS[3])
    assert PARAGRAPHS[0] not in text
    assert PARAGRAPHS[2] not in text


async def test_evidence_qa_buys_nothing_when_it_is_asked_again_and_one_score_for_one_new_paragraph() -> None:
    upstream, store = FunctionUpstream(reader, name="up"), MemoryCache()

    async def ask(paragraphs: list[str]) -> Answer:
        params = {"paragraphs": paragraphs}
        return await run_program(evidence_qa, QUESTION, upstream=upstream, params=params, cache=store)

    first = await ask(PARAGRAPHS[:3])
    assert len(upstream.calls) == 4
    assert await ask(PARAGRAPHS[:3]) == first
    assert len(upstream.calls) == 4
    assert await ask(PARAGRAPHS) == first
    assert len(upstream.calls) == 5


async def test_evidence_qa_reads_documents_that_come_with_the_conversation() -> None:
    documents = [Document(text=text, title=text.split()[0]) for text in PARAGRAPHS[:2]]
    upstream = FunctionUpstream(reader, name="up")
    answer = await run_program(evidence_qa, QUESTION, upstream=upstream, documents=documents)
    assert answer.citations == [Citation(id="Whales", text=PARAGRAPHS[1])]


async def test_evidence_qa_ranks_by_the_mean_and_not_by_the_length_of_the_question() -> None:
    def by_tokens(call: Call) -> Any:
        if isinstance(call, Score):
            return (-6.0, 6) if "long" in call.context else (-4.0, 2)
        return "yes"

    upstream = FunctionUpstream(by_tokens, name="up")
    answer = await run_program(evidence_qa, "q", upstream=upstream, params={"paragraphs": ["short", "long"]})
    assert [c.text for c in answer.citations] == ["long"]


async def test_evidence_qa_without_anything_to_read_says_what_to_send() -> None:
    upstream = FunctionUpstream(reader, name="up")
    with pytest.raises(InvalidRequest, match="wants a question, and paragraphs") as refused:
        await run_program(evidence_qa, QUESTION, upstream=upstream)
    assert refused.value.param == "asmodel.params.paragraphs"
    with pytest.raises(InvalidRequest, match="keep: Input should be greater than or equal to 1"):
        await run_program(evidence_qa, QUESTION, upstream=upstream, params={"paragraphs": ["a"], "keep": 0})
    assert upstream.calls == []


def test_evidence_qa_shows_the_paragraph_and_measures_the_question() -> None:
    assert question_given("P.", "Q?") == ("P.\n\nQ:", " Q?")
    assert answer_from(["P.", "R."], "Q?").startswith("P.\n\nR.\n\n")
    assert answer_from(["P."], "Q?").endswith("Question: Q?")


# self-consistency


def voter(*answers: str) -> FunctionUpstream:
    """A model whose k-th draw ends in the k-th answer."""

    def vote(call: Call) -> str:
        assert isinstance(call, Chat)
        assert call.draw is not None
        return f"I think.\nAnswer: {answers[int(call.draw.rpartition('/')[2])]}"

    return FunctionUpstream(vote, name="up")


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider)
    try:
        yield exporter
    finally:
        tracing.remove(provider)
        provider.shutdown()


async def test_self_consistency_returns_the_answer_that_most_draws_end_in(exporter: InMemorySpanExporter) -> None:
    upstream = voter("Paris", "paris.", "Rome", "The Paris", "rome")
    answer = await run_program(self_consistency, "Capital?", upstream=upstream)
    assert answer == Answer(text="Paris", data={"tally": {"paris": 3, "rome": 2}})
    draws = [call.draw for call in upstream.calls if isinstance(call, Chat)]
    assert sorted(map(str, draws)) == [f"0/{k}" for k in range(5)]
    (span,) = [s for s in exporter.get_finished_spans() if s.name == "invoke_workflow self-consistency"]
    assert span.attributes is not None
    assert span.attributes["asmodel.run.note.tally"] == (3, 2)


async def test_of_answers_with_as_many_votes_the_one_that_was_drawn_first_wins() -> None:
    upstream = voter("b", "c", "c", "b", "d")
    assert (await run_program(self_consistency, "q", upstream=upstream)).text == "b"


async def test_self_consistency_samples_as_often_and_as_warmly_as_it_is_told_and_never_buys_twice() -> None:
    upstream, store = voter(*"aabbbab"), MemoryCache()
    params = {"samples": 7, "temperature": 1.2}
    for _ in range(2):
        answer = await run_program(self_consistency, "q", upstream=upstream, params=params, cache=store)
        assert answer.text == "b"
    assert len(upstream.calls) == 7
    assert [call.params["temperature"] for call in upstream.calls if isinstance(call, Chat)] == [1.2] * 7
    # Two more votes cost two more calls: those that were cast count on.
    wider = voter(*"aabbbabaa")
    more = await run_program(
        self_consistency, "q", upstream=wider, params={"samples": 9, "temperature": 1.2}, cache=store
    )
    assert (more.text, len(wider.calls)) == ("a", 2)


async def test_self_consistency_shows_the_whole_conversation_and_asks_at_its_end() -> None:
    conversation = [
        Message("system", "Be brief."),
        Message("user", "1"),
        Message("assistant", "2"),
        Message("user", "3"),
    ]
    upstream = voter(*"aaaaa")
    await run_program(self_consistency, conversation, upstream=upstream)
    for call in upstream.calls:
        assert isinstance(call, Chat)
        assert list(call.messages) == [*conversation[:3], Message("user", f"3\n\n{ASK}")]


async def test_an_empty_chain_of_thought_is_asked_for_again() -> None:
    empty = True

    def model(call: Call) -> str:
        nonlocal empty
        was, empty = empty, False
        return "" if was else "Answer: x"

    upstream = FunctionUpstream(model, name="up")
    assert (await run_program(self_consistency, "q", upstream=upstream, params={"samples": 2})).text == "x"
    assert len(upstream.calls) == 3


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is\nAnswer: 42", "42"),
        ("Answer: 1\nno, wait\n**Answer: 2**", "2"),
        ("the answer is: blue\n", "blue"),
        ("ANSWER : yes ", "yes"),
        ("first line\n\nlast line\n ", "last line"),
    ],
)
def test_the_final_answer_is_after_the_last_answer_or_the_last_line(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Paris", "paris."),
        ("The Beatles", "Beatles"),
        ("1,234", "1234"),
        ("42", "42.0"),
        ("42", "$42"),
        ('"yes"', "Yes!"),
        ("a  b", "b"),
    ],
)
def test_answers_that_differ_in_form_alone_are_one(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"), [("1.5", "15"), ("A", "B"), ("A", "The"), ("5%", "5"), ("-3", "3"), ("1.50", "150")]
)
def test_answers_that_differ_in_substance_are_two(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@given(st.lists(st.sampled_from(["red", "green", "blue"]), min_size=1, max_size=9))
async def test_no_answer_has_more_votes_than_the_one_that_is_returned(votes: list[str]) -> None:
    answer = await run_program(self_consistency, "q", upstream=voter(*votes), params={"samples": len(votes)})
    counts = Counter(votes)
    assert counts[answer.text] == max(counts.values())
    assert answer.data == {"tally": dict(counts)}


def test_a_thought_is_the_conversation_with_the_request_at_its_end() -> None:
    assert thought([Message("user", "q")]) == [Message("user", f"q\n\n{ASK}")]


PICTURE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def test_a_thought_about_a_picture_is_shown_it_and_one_about_parts_of_text_is_shown_text() -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "Where is"}, PICTURE, {"type": "text", "text": "this?"}]
    assert thought([Message("user", parts)]) == [Message("user", [*parts, {"type": "text", "text": ASK}])]
    texts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert thought([Message("user", texts)]) == [Message("user", f"one\ntwo\n\n{ASK}")]


def test_a_thought_that_follows_results_of_tools_is_asked_for_with_the_question() -> None:
    since = [Message("assistant", None, tool_calls=(calling("look"),)), Message("tool", "12", tool_call_id="c")]
    before = [Message("system", "s"), Message("user", "old"), Message("assistant", "a")]
    shown = thought([*before, Message("user", "q"), *since])
    assert shown == [*before, Message("user", f"q\n\n{ASK}"), *since]


def calling(name: str, arguments: str = "{}", id: str = "c") -> ToolCall:
    return ToolCall(id=id, name=name, arguments=arguments)


def drawing(*replies: Reply) -> FunctionUpstream:
    """A model whose k-th draw is the k-th reply."""

    def draw(call: Call) -> Reply:
        assert isinstance(call, Chat)
        assert call.draw is not None
        return replies[int(call.draw.rpartition("/")[2])]

    return FunctionUpstream(draw, name="up")


async def voted(*replies: Reply, **shape: Any) -> Answer:
    upstream, params = drawing(*replies), {"samples": len(replies)}
    return await run_program(self_consistency, "q", upstream=upstream, params=params, shape=shape)


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
JSON_OBJECT = {"type": "json_object"}


async def test_samples_that_make_the_same_calls_agree_and_the_first_of_them_is_the_answer() -> None:
    first = (calling("look", '{"at": 1.0, "in": "x"}', "a"), calling("wait", "", "b"))
    again = (calling("wait", "{}", "c"), calling("look", '{"in":"x","at":1}', "d"))
    answer = await voted(
        Reply(tool_calls=(calling("look", '{"at": 2}'),), finish="tool_calls"),
        Reply(tool_calls=first, finish="tool_calls", text="Let me see."),
        Reply(text="Answer: 12"),
        Reply(tool_calls=again, finish="tool_calls"),
        tools=TOOLS,
    )
    assert (answer.tool_calls, answer.finish, answer.text) == (first, "tool_calls", "Let me see.")
    assert answer.data == {"tally": {'look({"at":1,"in":"x"}), wait({})': 2, 'look({"at":2})': 1, "12": 1}}


async def test_an_answer_in_words_may_have_more_votes_than_any_call() -> None:
    call = Reply(tool_calls=(calling("look"),), finish="tool_calls")
    answer = await voted(call, Reply(text="So.\nAnswer: Twelve"), Reply(text="Answer: twelve."), tools=TOOLS)
    assert answer == Answer(text="Twelve", data={"tally": {"twelve": 2, "look({})": 1}})


async def test_samples_of_json_are_drawn_as_the_client_asks_and_equal_values_agree() -> None:
    upstream = drawing(*(Reply(text=t) for t in ('{"n": 1}', '{"n": 2, "m": [3.0]}', '{"m":[3],"n":2}')))
    shape: dict[str, Any] = {"response_format": JSON_OBJECT}
    answer = await run_program(self_consistency, "q", upstream=upstream, params={"samples": 3}, shape=shape)
    assert answer == Answer(text='{"n": 2, "m": [3.0]}', data={"tally": {'{"m":[3],"n":2}': 2, '{"n":1}': 1}})
    for call in upstream.calls:
        assert isinstance(call, Chat)
        assert call.messages == (Message("user", "q"),)
        assert call.params == {"temperature": 0.7, **shape}


async def test_a_sample_that_cannot_be_read_is_no_vote_and_only_where_none_can_is_it_an_error() -> None:
    fits, other = Reply(text='{"n": 1}'), Reply(text="one")
    answer = await voted(other, fits, other, response_format=JSON_OBJECT)
    assert answer == Answer(text='{"n": 1}', data={"tally": {'{"n":1}': 1}})
    with pytest.raises(StepError, match="sample"):
        await voted(other, other, response_format=JSON_OBJECT)
    with pytest.raises(StepError, match="thought"):
        await voted(Reply(text=""), Reply(text=" "))


async def test_a_sample_of_json_that_was_cut_off_is_a_vote_for_itself() -> None:
    cut = Reply(text='{"n": 1', finish="length")
    assert (await voted(cut, Reply(text="{}"), cut, response_format=JSON_OBJECT)).finish == "length"
    assert (await voted(cut, Reply(text="{}"), Reply(text="{ }"), response_format=JSON_OBJECT)).text == "{}"


async def test_what_asks_for_text_in_other_words_buys_nothing_that_is_known_already() -> None:
    store, params = MemoryCache(), {"samples": 1}
    upstream = voter("x")
    await run_program(self_consistency, "q", upstream=upstream, params=params, cache=store)
    # As it has been since there is a cache: what is stored must be found again.
    (call,) = upstream.calls
    assert key(call) == "9d4349d9aecb79435017ba6798cc4b08c76854aa900132b9c466379a4b524c3f"
    asks: list[dict[str, Any]] = [
        {"response_format": {"type": "text"}, "tool_choice": "none"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    ]
    for shape in asks:
        await run_program(self_consistency, "q", upstream=upstream, params=params, cache=store, shape=shape)
    assert len(upstream.calls) == 1


BALLOTS = {
    "red": Reply(text="Answer: red"),
    "blue": Reply(text="Answer: blue"),
    "look({})": Reply(tool_calls=(calling("look"),), finish="tool_calls"),
    'look({"at":1})': Reply(tool_calls=(calling("look", '{"at": 1}'),), finish="tool_calls"),
}


@given(st.lists(st.sampled_from(sorted(BALLOTS)), min_size=1, max_size=7), st.randoms(use_true_random=False))
async def test_in_which_order_votes_are_cast_decides_between_equals_alone(votes: list[str], random: Random) -> None:
    counts = Counter(votes)
    first = [name for name, count in counts.items() if count == max(counts.values())]
    shuffled = random.sample(votes, len(votes))
    answers = [await voted(*(BALLOTS[vote] for vote in order), tools=TOOLS) for order in (votes, shuffled)]
    for answer, order in zip(answers, (votes, shuffled), strict=True):
        winner = min(first, key=order.index)
        assert (answer.tool_calls, answer.text) == (BALLOTS[winner].tool_calls, "" if "(" in winner else winner)
        assert answer.data == {"tally": dict(counts)}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.booleans())
def test_json_is_one_however_it_is_written(value: Any, ascii: bool) -> None:
    written = json.dumps(value, ensure_ascii=ascii, indent=2)
    backwards = json.loads(written, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    one = canonical_json(written)
    assert canonical_json(json.dumps(backwards)) == one
    assert canonical_json(json.dumps([value, 0])) != one


@pytest.mark.parametrize("text", ["", '{"a": 1', "NaN", "1e999", "[" * 100_000, r'"\ud800"', "no"])
def test_what_is_no_json_stays_as_it_is(text: str) -> None:
    assert canonical_json(text) == text
