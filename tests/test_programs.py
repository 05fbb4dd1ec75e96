"""The programs that come along: what each shows a model, what it makes of the answers, and that it is short."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import asmodel_programs
from asmodel import Answer, Citation, Document, InvalidRequest, Message, tracing
from asmodel.calls import Call, Chat, Delta, Reply, Score
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache
from asmodel_programs.evidence_qa import EvidenceParams, answer_from, evidence_qa, question_given
from asmodel_programs.plain import plain
from asmodel_programs.self_consistency import ASK, final_answer, normalised, self_consistency, thought

FILES = sorted(p for p in Path(asmodel_programs.__file__).parent.glob("*.py") if p.name != "__init__.py")


LONGEST = {"evidence_qa": 440, "selection_inference": 100, "summary": 130}
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
