"""The controls: what each shows the model, in one prompt, and what it takes for the answer."""

from __future__ import annotations

from typing import Any

import pytest

from asmodel import Document, InvalidRequest, Program, StepError, thoughts_and_answer
from asmodel.calls import Call, Chat
from asmodel.testing import FunctionUpstream, run_program
from asmodel_programs import all_paragraphs, chain_of_thought, golden_facts, relevance

QUESTION = "Could a mole see a star?"


class Writer(FunctionUpstream):
    """A model that says one thing, and remembers what it was shown."""

    def __init__(self, says: str) -> None:
        super().__init__(lambda call: says, name="up")

    @property
    def shown(self) -> str:
        (call,) = self.calls
        return text_of(call)


def text_of(call: Call) -> str:
    assert isinstance(call, Chat)
    (message,) = call.messages
    return message.text


CONTROLS: list[tuple[Program[Any, Any], dict[str, Any]]] = [
    (chain_of_thought.chain_of_thought, {}),
    (all_paragraphs.all_paragraphs, {"paragraphs": ["Moles are blind.", "Stars are far."]}),
    (golden_facts.golden_facts, {"facts": ["Moles are blind.", "Stars are far."]}),
]


@pytest.mark.parametrize(("program", "params"), CONTROLS, ids=lambda value: getattr(value, "name", ""))
async def test_a_control_asks_once_with_examples_that_think_or_do_not(
    program: Program[Any, Any], params: dict[str, Any]
) -> None:
    for think in (True, False):
        upstream = Writer("Moles see little. So the answer is no.")
        answer = await run_program(program, QUESTION, upstream=upstream, params={**params, "think": think})
        assert answer.text == "no"
        assert answer.data == {"thoughts": "Moles see little. So the answer is no."}
        assert upstream.shown.endswith(f"Question: {QUESTION}\nAnswer:")
        assert ("So the answer is yes." in upstream.shown) is think
        assert ("Answer: yes\n" in upstream.shown) is not think
        assert all(text in upstream.shown for texts in params.values() for text in texts)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("The answer is yes. No, wait. So the answer is no.", "no"),
        ("yes", "yes"),
        ("The answer to your question is: no", "no"),
        ("It is blue\n", "It is blue"),
    ],
)
def test_the_answer_is_what_follows_the_last_answer_is_or_the_last_line(said: str, answer: str) -> None:
    assert thoughts_and_answer(said) == (said.strip(), answer)


async def test_a_control_that_says_nothing_is_asked_again_and_is_an_error_in_the_end() -> None:
    upstream = Writer("")
    with pytest.raises(StepError, match="should end with"):
        await run_program(chain_of_thought.chain_of_thought, QUESTION, upstream=upstream)
    assert len(upstream.calls) == 3


async def test_all_paragraphs_cites_all_that_it_showed_and_wants_some() -> None:
    documents = [Document(text="Moles are blind.", id="mole"), Document(text="Stars are far.")]
    upstream = Writer("no")
    answer = await run_program(all_paragraphs.all_paragraphs, QUESTION, upstream=upstream, documents=documents)
    assert [c.id for c in answer.citations] == ["mole", "2"]
    with pytest.raises(InvalidRequest, match='program "all-paragraphs" wants a question, and paragraphs'):
        await run_program(all_paragraphs.all_paragraphs, QUESTION, upstream=upstream)


async def test_golden_facts_wants_facts() -> None:
    with pytest.raises(InvalidRequest, match="facts"):
        await run_program(golden_facts.golden_facts, QUESTION, upstream=Writer("no"))


async def test_relevance_says_yes_or_no_after_examples_of_both() -> None:
    for think, said, answer in ((False, "Yes.", "yes"), (True, "It has no word of yes, so no.", "no")):
        upstream = Writer(said)
        params: dict[str, Any] = {"paragraph": "Moles are blind.", "think": think}
        assert (await run_program(relevance.relevance, QUESTION, upstream=upstream, params=params)).text == answer
        assert upstream.shown.endswith(f"Paragraph: Moles are blind.\nQuestion: {QUESTION}\nRelevant:")
        assert upstream.shown.count("yes\n" if not think else "so yes.") == 2
    params = {"paragraph": "Moles are blind."}
    with pytest.raises(StepError, match="should say yes or no"):
        await run_program(relevance.relevance, QUESTION, upstream=Writer("Perhaps"), params=params)
