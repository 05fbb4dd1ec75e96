"""What a step returns decides what is asked; `returns=` decides what is made of the reply."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, NewType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from asmodel import LogLikelihood, Message, ProgramError, Prompt, Reply, Step, StepError, program, score, step
from asmodel.calls import Chat, Completion, NotJSON, Score, TokenLogprob, body, canonical, describe, key
from asmodel.run import Run
from asmodel.steps import asked_again
from asmodel.testing import FunctionUpstream, run_program


class Verdict(BaseModel):
    holds: bool
    why: str = ""


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


Name = NewType("Name", str)


@step(model="writer", temperature=0.7, stop=("\n",), max_tokens=8)
def question(about: str, *, loud: bool = False) -> str:
    """Ask about something."""
    return about.upper() if loud else about


@step
def conversation(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


@step(temperature=0)
def raw(text: str) -> Prompt:
    return Prompt(text)


@score(model="scorer")
def likelihood(context: str, continuation: str) -> tuple[str, str]:
    return context, continuation


def ask() -> str:
    return "?"


def call_of(step: Step[..., Any, Any], *args: Any) -> Any:
    return step.call(step(*args), "someone")


def test_calling_a_step_shows_what_the_model_would_be_shown_and_asks_nobody() -> None:
    assert question("whales", loud=True) == "WHALES"
    assert likelihood("a", "b") == ("a", "b")


def test_a_step_keeps_the_name_the_words_and_the_signature_of_its_function() -> None:
    import inspect

    assert vars(question)["__name__"] == question.name == "question"
    assert question.__doc__ == "Ask about something."
    assert list(inspect.signature(question).parameters) == ["about", "loud"]


def test_text_is_one_message_of_the_user_with_the_steps_options() -> None:
    assert call_of(question, "whales") == Chat(
        identity="someone",
        messages=(Message("user", "whales"),),
        params={"temperature": 0.7, "stop": ["\n"], "max_tokens": 8},
    )


def test_messages_are_the_conversation_that_they_are() -> None:
    messages = [Message("system", "Be brief."), Message("user", "hi")]
    assert call_of(conversation, messages).messages == tuple(messages)
    assert call_of(conversation, messages).params == {}


def test_a_prompt_is_raw_text_to_be_continued() -> None:
    assert call_of(raw, "Once") == Completion(identity="someone", prompt="Once", params={"temperature": 0})


def test_a_score_is_the_second_text_after_the_first() -> None:
    assert call_of(likelihood, "a", " b") == Score(identity="someone", context="a", continuation=" b")


@pytest.mark.parametrize("shown", [None, 3, b"bytes", ["text"], [Message("user", "a"), "b"], {"role": "user"}])
def test_a_step_that_returns_anything_else_is_told_what_it_should_return(shown: Any) -> None:
    with pytest.raises(ProgramError, match=r'step "question" returns .*; it should return text, messages or a Prompt'):
        question.call(shown, "someone")


@pytest.mark.parametrize("shown", ["text", ("a",), ("a", 1), ["a", "b"]])
def test_a_score_that_returns_anything_but_two_texts_is_told_so(shown: Any) -> None:
    with pytest.raises(ProgramError, match=r'step "likelihood" returns .*; a @score step returns two texts'):
        likelihood.call(shown, "someone")


def test_without_returns_the_value_is_the_text_as_it_came() -> None:
    assert question.read(Reply(text=" as it came\n")) == " as it came\n"
    assert question.plain


def test_a_type_is_sent_as_a_schema_and_read_from_the_reply() -> None:
    made = step(returns=Verdict)(ask)
    assert call_of(made).schema["properties"].keys() == {"holds", "why"}
    assert made.read(Reply(text='{"holds": true, "why": ""}')) == Verdict(holds=True)
    assert not made.plain


@pytest.mark.parametrize(
    ("returns", "text", "value"),
    [
        (int, '{"value": 3}', 3),
        (bool, '{"value": false}', False),
        (list[int], '{"value": [1]}', [1]),
        (Size, '{"value": "large"}', Size.LARGE),
        (Name, '{"value": "Eve"}', "Eve"),
        (int | None, '{"value": null}', None),
        (dict[str, int], '{"a": 1}', {"a": 1}),
    ],
    ids=str,
)
def test_a_type_that_is_no_object_is_wrapped_in_one(returns: Any, text: str, value: Any) -> None:
    made: Step[..., Any, Any] = step(returns=returns)(ask)
    assert call_of(made).schema["type"] == "object"
    assert made.read(Reply(text=text)) == value


def last_word(text: str) -> str:
    if not text.split():
        raise ValueError("say a word")
    return text.split()[-1]


class Reader:
    def __call__(self, text: str) -> int:
        return len(text)


@pytest.mark.parametrize(
    ("returns", "value"),
    [
        (last_word, "word"),
        (str.upper, "A WORD"),
        (str.split, ["a", "word"]),
        (functools.partial(int, base=36), None),
        (Reader(), 6),
    ],
    ids=["function", "method", "builtin", "partial", "object"],
)
def test_a_function_of_the_text_sends_no_schema_and_reads_the_reply(returns: Any, value: Any) -> None:
    made: Step[..., Any, Any] = step(returns=returns)(ask)
    assert call_of(made).schema is None
    if value is None:
        assert made.read(Reply(text="zz")) == 35 * 36 + 35
    else:
        assert made.read(Reply(text="a word")) == value


def test_a_reply_is_wanted_whole_by_naming_it() -> None:
    whole = step(returns=Reply, logprobs=5)(lambda: "?")
    reply = Reply(text="x", logprobs=(TokenLogprob("x", -1.0),), finish="length")
    assert whole.read(reply) is reply
    assert call_of(whole).params == {"logprobs": True, "top_logprobs": 5}


def test_a_score_is_read_as_a_log_likelihood_in_nats() -> None:
    reply = Reply(logprobs=(TokenLogprob("a", -1.0), TokenLogprob("b", -2.5)))
    assert likelihood.read(reply) == LogLikelihood(total=-3.5, tokens=2)
    with pytest.raises(ValueError, match="no log-probabilities"):
        likelihood.read(Reply(text="x"))


def test_using_gives_another_step_and_leaves_the_first_as_it_was() -> None:
    other = question.using(model="judge", temperature=0, params={"top_k": 5})
    assert call_of(other, "x").params == {"temperature": 0, "stop": ["\n"], "max_tokens": 8, "top_k": 5}
    assert (other.role, question.role) == ("judge", "writer")
    assert call_of(question, "x").params["temperature"] == 0.7
    assert other("x") == question("x")


def test_a_parameter_without_a_name_of_its_own_is_sent_as_it_is() -> None:
    made = step(params={"reasoning": {"effort": "low"}, "temperature": 0.1}, temperature=1)(lambda: "?")
    assert call_of(made).params == {"temperature": 0.1, "reasoning": {"effort": "low"}}


def test_an_option_that_does_not_exist_is_refused_when_the_step_is_made() -> None:
    with pytest.raises(TypeError, match=r'step "<lambda>" takes no temprature; it takes temperature, '):
        step(temprature=1)(lambda: "?")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="takes no retries"):
        question.using(retries=1)  # type: ignore[call-arg]


def test_a_score_has_nothing_to_sample_and_refuses_what_says_how() -> None:
    with pytest.raises(TypeError, match=r'step "likelihood" takes no temperature; it takes cache, ttl'):
        likelihood.using(temperature=0.5)
    assert likelihood.using(cache=False).options == {"cache": False}


def test_an_async_reader_is_refused_when_the_step_is_made() -> None:
    async def later(text: str) -> str:
        return text

    with pytest.raises(TypeError, match="async"):
        step(returns=later)(lambda: "?")


def test_steps_can_be_told_apart_and_kept_in_sets() -> None:
    assert len({question, raw, question.using(temperature=0)}) == 3


def test_asking_again_shows_the_model_its_reply_and_what_was_wrong_with_it() -> None:
    call = call_of(question, "whales")
    again = asked_again(call, Reply(text="hm"), "Say yes or no.")
    assert isinstance(again, Chat)
    assert again.messages[1:] == (
        Message("assistant", "hm"),
        Message("user", "Say yes or no.\nPlease answer again."),
    )
    assert again.params == call.params
    prompt = asked_again(call_of(raw, "Q: whales?"), Reply(text=" hm"), "Say yes or no.")
    assert isinstance(prompt, Completion)
    assert prompt.prompt.startswith("Q: whales? hm")
    assert prompt.prompt.endswith("Q: whales?")


@step(returns=Verdict)
def verdict(text: str) -> str:
    return f"Does it hold? {text}"


@program("judge")
async def judge(run: Run) -> str:
    return str((await run(verdict, run.question)).holds)


async def test_an_unreadable_reply_is_asked_again_with_the_reason_until_it_can_be_read() -> None:
    answers = iter(["perhaps", '{"holds": "perhaps"}', '{"holds": true, "why": "so"}'])
    upstream = FunctionUpstream(lambda call: next(answers), name="up")
    assert (await run_program(judge, "p", upstream=upstream)).text == "True"
    asked = [call.messages[-1].text for call in upstream.calls if isinstance(call, Chat)]
    assert asked[0] == "Does it hold? p"
    assert "not JSON" in asked[1]
    assert "holds: Input should be a valid boolean" in asked[2]


async def test_a_reply_that_stays_unreadable_is_an_error_that_names_program_step_and_what_came_back() -> None:
    upstream = FunctionUpstream(lambda call: "perhaps", name="up")
    with pytest.raises(StepError) as failed:
        await run_program(judge, "a secret question", upstream=upstream)
    assert len(upstream.calls) == 3
    assert str(failed.value) == (
        'program "judge": step "verdict" cannot read \'perhaps\' after 3 asks: '
        "The reply is not JSON: Expecting value at character 0."
    )
    assert (failed.value.status, failed.value.code, failed.value.retry) == (502, "step_unreadable", False)


async def test_how_often_is_asked_is_the_steps_to_say() -> None:
    @program("once")
    async def once(run: Run) -> str:
        return str(await run(verdict.using(asks=1), run.question))

    upstream = FunctionUpstream(lambda call: "x" * 1000, name="up")
    with pytest.raises(StepError) as failed:
        await run_program(once, "p", upstream=upstream)
    assert len(upstream.calls) == 1
    assert "x" * 200 + "…" in str(failed.value)
    assert "x" * 201 not in str(failed.value)


PARAMS = st.dictionaries(
    st.sampled_from(("top_k", "logit_bias", "user", "stop")),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.lists(st.text()),
    max_size=3,
)
SHOWN = st.text(max_size=40) | st.lists(
    st.builds(
        Message,
        st.sampled_from(("system", "user")),
        st.text(max_size=20) | st.none(),
        name=st.none() | st.text(max_size=3),
    ),
    max_size=3,
)


@given(identity=st.text(max_size=10), shown=SHOWN, params=PARAMS, returns=st.sampled_from((str, int)))
def test_the_calls_of_a_step_are_written_by_the_plain_rule(
    identity: str, shown: Any, params: dict[str, Any], returns: type[Any]
) -> None:
    @step(returns=returns, params=params)
    def one(shown: Any) -> Any:
        return shown

    for call in (one.call(shown, identity), one.call(shown, identity)):
        assert body(call) == canonical(describe(call))
        assert key(call, "s") == key(replace(call), "s")


def test_a_parameter_that_is_changed_from_inside_is_in_the_next_key() -> None:
    stops = ["a"]
    one = step(params={"stop": stops})(lambda: "x")
    before = key(one.call("x", "me"))
    stops.append("b")
    assert key(one.call("x", "me")) != before


@pytest.mark.parametrize("shown", ["\ud83d", [Message("user", "a\udc00")]])
def test_half_a_surrogate_pair_is_told_when_the_key_is_made(shown: Any) -> None:
    call = step(lambda: shown).call(shown, "me")
    with pytest.raises(NotJSON):
        key(call)
