"""selection-inference: what each small step sees, and when the loop ends."""

from __future__ import annotations

from typing import Any

import pytest

from asmodel import Answer, Document, InvalidRequest
from asmodel.calls import Call, Chat, Score
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache
from asmodel_programs.selection_inference import fact_given, selection_inference

FACTS = ["Wolves are animals.", "Stones are grey.", "All animals breathe.", "Rain is wet."]
QUESTION = "Do wolves breathe?"


class Reasoner:
    """A model that names facts of animals first, and concludes what it is told to."""

    def __init__(self, concludes: list[str], settles: str = "breathe") -> None:
        self.concludes, self.settles = iter(concludes), settles
        self.upstream = FunctionUpstream(self.answer, name="up")

    def answer(self, call: Call) -> Any:
        if isinstance(call, Score) and call.context.endswith("\nAnswer:"):
            assert call.context == f"Wolves breathe.\nQuestion: {QUESTION}\nAnswer:"
            return {" yes": (-1.0, 1), " no": (-3.0, 2)}[call.continuation]
        if isinstance(call, Score):
            assert call.context.startswith(f"Question: {QUESTION}\n")
            known = ["\nWolves are animals.", "\nAll animals breathe."]
            return (-1.0 - known.index(call.continuation) if call.continuation in known else -9.0), 1
        assert isinstance(call, Chat)
        text = call.messages[0].text
        if "What follows" in text:
            assert QUESTION not in text, "a conclusion is drawn without the question"
            return next(self.concludes)
        if "unknown" in text:
            return "yes" if self.settles in text.partition("Question:")[0] else "unknown"
        return "perhaps"

    async def run(self, **params: Any) -> Answer:
        return await run_program(
            selection_inference, QUESTION, upstream=self.upstream, params={"facts": FACTS, **params}
        )

    def chats(self, part: str) -> list[str]:
        return [c.messages[0].text for c in self.upstream.calls if isinstance(c, Chat) and part in c.messages[0].text]


async def test_the_likeliest_facts_are_selected_and_one_thing_is_concluded_from_them_alone() -> None:
    model = Reasoner(["Wolves breathe."])
    answer = await model.run()
    assert (answer.text, answer.data) == ("yes", {"conclusions": ["Wolves breathe."]})
    assert [c.id for c in answer.citations] == ["1", "3"]
    (inferred,) = model.chats("What follows")
    assert inferred.startswith("Wolves are animals.\nAll animals breathe.\n\nWhat follows")
    (asked,) = model.chats("unknown")
    assert asked.startswith(f"Wolves breathe.\n\nQuestion: {QUESTION}")
    assert "animals" not in asked, "the answer is read from what was concluded"


async def test_a_yes_or_a_no_is_the_likelier_of_the_two_after_what_was_concluded() -> None:
    assert (await Reasoner(["Wolves breathe."]).run(answers="yes-no")).text == "Yes"
    unsettled = Reasoner(["Wolves breathe.", "Wolves breathe."], settles="nothing")
    assert (await unsettled.run(answers="yes-no")).text == "Yes"
    assert not unsettled.chats("likeliest"), "it is read by likelihood, and not asked for"


async def test_each_further_fact_is_selected_given_those_before_it() -> None:
    model = Reasoner(["Wolves breathe."])
    await model.run(select=3)
    contexts = [call.context for call in model.upstream.calls if isinstance(call, Score)]
    assert [context.count("\n") for context in contexts] == [1] * 4 + [2] * 3 + [3] * 2
    assert fact_given("Q?", ["one"], "two") == ("Question: Q?\nThese facts settle it:\none", "\ntwo")


async def test_a_conclusion_is_a_fact_of_the_next_round_and_the_loop_ends_once_the_question_is_settled() -> None:
    model = Reasoner(["Wolves live.", "Living things breathe.", "never reached"])
    answer = await model.run()
    assert answer.data == {"conclusions": ["Wolves live.", "Living things breathe."]}
    assert any("Wolves live." in c.continuation for c in model.upstream.calls if isinstance(c, Score))


@pytest.mark.parametrize("concludes", [["Hm.", "Hm."], ["", "x"], ["Rain is wet."]])
async def test_where_nothing_new_follows_the_likeliest_answer_is_given(concludes: list[str]) -> None:
    model = Reasoner(concludes)
    assert (await model.run()).text == "perhaps"


async def test_after_so_many_steps_the_likeliest_answer_is_given() -> None:
    model = Reasoner([f"Conclusion {n}." for n in range(9)])
    answer = await model.run(steps=3)
    assert answer.text == "perhaps"
    assert len(model.chats("What follows")) == 3


async def test_asked_again_it_buys_nothing() -> None:
    model, store = Reasoner(["Wolves breathe."]), MemoryCache()
    for _ in range(2):
        documents = [Document(text=fact, title=fact.split()[0]) for fact in FACTS]
        answer = await run_program(
            selection_inference, QUESTION, upstream=model.upstream, documents=documents, cache=store
        )
        assert [c.id for c in answer.citations] == ["Wolves", "All"]
    assert len(model.upstream.calls) == 4 + 3 + 2


async def test_without_facts_it_says_what_to_send() -> None:
    with pytest.raises(InvalidRequest, match="wants a question and facts"):
        await run_program(selection_inference, QUESTION, upstream=Reasoner([]).upstream)
