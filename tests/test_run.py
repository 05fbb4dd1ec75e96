"""A run: steps happen through it, draws are numbered in it, limits end it, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel

from asmodel import (
    Answer,
    Citation,
    Document,
    InvalidRequest,
    LimitExceeded,
    Limits,
    Message,
    Program,
    ProgramError,
    Prompt,
    Run,
    StepError,
    ToolCall,
    UpstreamError,
    gather,
    program,
    score,
    step,
    tool,
    tracing,
)
from asmodel.app import onion
from asmodel.calls import CachePolicy, Call, Capabilities, Chat, Completion, Delta, Emit, Reply, Terms, Usage
from asmodel.errors import DeadlineExceeded, NotCached, UpstreamRejected, UpstreamUnavailable
from asmodel.models import Models
from asmodel.service import Asked, Job, Service
from asmodel.settings import Price, UpstreamSettings
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.memory_cache import MemoryCache


@step
def ask(text: str) -> str:
    return text


@step(temperature=0)
def ask_cold(text: str) -> str:
    return text


@step
def continued(text: str) -> Prompt:
    return Prompt(text)


@score
def fits(context: str, text: str) -> tuple[str, str]:
    return context, text


def made(body: Callable[[Run], Any], name: str = "made", **options: Any) -> Program[None, Any]:
    """A program whose code is `body`."""

    @program(name, **options)
    async def of_body(run: Run) -> Any:
        return await body(run)

    program_of_body: Program[None, Any] = of_body
    return program_of_body


def counting() -> FunctionUpstream:
    """An upstream whose every answer is another one."""
    numbers = iter(range(1_000_000))
    return FunctionUpstream(lambda call: (-1.0, 1) if call.kind == "score" else f"answer {next(numbers)}", name="up")


def draws(upstream: FunctionUpstream) -> list[str | None]:
    return [call.draw for call in upstream.calls if isinstance(call, (Chat, Completion))]


def collecting(deltas: list[Delta]) -> Emit:
    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    return emit


async def serve(
    served: Program[Any, Any],
    upstream: FunctionUpstream,
    *,
    price: Price | None = None,
    emit: Emit | None = None,
    **asked: Any,
) -> tuple[Answer, Job]:
    """As `run_program`, and the request's books with it."""
    settings = UpstreamSettings(kind="function", price=price)
    models = Models([served], onion({"default": upstream}, {"default": settings}, None))
    service = Service(models)
    service.ready.set()
    job = await service.prepare(models.find(served.name), Asked(messages=(Message("user", "q"),), **asked))
    return (await service.answer(job, 0, emit)).answer, job


# Draws


async def test_the_k_th_equal_sampled_call_of_a_run_is_its_k_th_draw() -> None:
    async def votes(run: Run) -> str:
        return " ".join(await gather(run(ask, "a") for _ in range(3)))

    upstream = counting()
    assert (await run_program(made(votes), "q", upstream=upstream)).text == "answer 0 answer 1 answer 2"
    assert draws(upstream) == ["0/0", "0/1", "0/2"]


async def test_only_equal_calls_are_numbered_together() -> None:
    async def several(run: Run) -> str:
        for text in ("a", "b", "a"):
            await run(ask, text)
        await run(ask.using(max_tokens=5), "a")
        await run(continued, "a")
        return ""

    upstream = counting()
    await run_program(made(several), "q", upstream=upstream)
    assert draws(upstream) == ["0/0", "0/0", "0/1", "0/0", "0/0"]


async def test_at_temperature_0_and_in_a_score_equal_is_equal() -> None:
    async def repeats(run: Run) -> str:
        return str([await run(ask_cold, "a"), await run(ask_cold, "a"), await run(ask.using(temperature=0.0), "a")])

    async def scores(run: Run) -> str:
        return str([await run(fits, "a", "b"), await run(fits, "a", "b")])

    upstream = counting()
    answer = await run_program(made(repeats), "q", upstream=upstream, cache=MemoryCache())
    assert answer.text == "['answer 0', 'answer 0', 'answer 0']"
    assert draws(upstream) == [None]
    upstream = counting()
    await run_program(made(scores), "q", upstream=upstream, cache=MemoryCache())
    assert len(upstream.calls) == 1


async def test_a_draw_can_be_taken_by_its_number() -> None:
    async def picks(run: Run) -> str:
        drawn = [await run(ask, "a") for _ in range(3)]
        assert await run(ask.using(sample=1), "a") == drawn[1]
        assert await run(ask.using(sample=7), "a") not in drawn
        assert await run(ask_cold.using(sample=1), "a") == await run(ask_cold, "a")
        return "ok"

    upstream = counting()
    await run_program(made(picks), "q", upstream=upstream, cache=MemoryCache())
    assert draws(upstream) == ["0/0", "0/1", "0/2", "0/7", None]


async def test_every_choice_of_n_has_draws_of_its_own() -> None:
    async def one(run: Run) -> str:
        return await run(ask, "a")

    upstream, store = counting(), MemoryCache()
    texts = [(await run_program(made(one), "q", upstream=upstream, cache=store, choice=n)).text for n in (0, 1, 2, 1)]
    assert texts == ["answer 0", "answer 1", "answer 2", "answer 1"]


@program("inner")
async def inner(run: Run) -> str:
    return " ".join([await run(ask, "same for all"), await run(ask, "same for all")])


async def test_nested_programs_share_no_draws_and_get_the_same_ones_on_resume() -> None:
    async def outer(run: Run) -> str:
        texts = [await run(ask, "same for all"), await run(inner, "x"), await run(inner, "x"), await run(inner, "y")]
        return " | ".join(texts)

    upstream, store = counting(), MemoryCache()
    first = await run_program(made(outer), "q", upstream=upstream, cache=store)
    assert len(set(draws(upstream))) == len(upstream.calls) == 7
    again = await run_program(made(outer), "q", upstream=upstream, cache=store)
    assert (again.text, len(upstream.calls)) == (first.text, 7)


async def test_a_run_that_failed_is_resumed_with_the_draws_that_it_had() -> None:
    numbers = iter(range(100))
    down = True

    def answer(call: Call) -> Any:
        assert isinstance(call, Chat)
        if call.draw == "0/3" and down:
            return UpstreamRejected("no")
        return f"answer {next(numbers)}"

    async def votes(run: Run) -> str:
        return " ".join([await run(ask, "a") for _ in range(5)])

    upstream, store = FunctionUpstream(answer, name="up"), MemoryCache()
    with pytest.raises(UpstreamRejected):
        await run_program(made(votes), "q", upstream=upstream, cache=store)
    assert len(upstream.calls) == 4
    down = False
    answered = await run_program(made(votes), "q", upstream=upstream, cache=store)
    assert answered.text == "answer 0 answer 1 answer 2 answer 3 answer 4"
    assert draws(upstream) == ["0/0", "0/1", "0/2", "0/3", "0/3", "0/4"]


@pytest.mark.parametrize("seed", range(20))
async def test_any_program_stopped_anywhere_buys_each_step_once(seed: int) -> None:
    """Chains, fans and nested programs, drawn by chance; the upstream stops answering after k calls, for every k."""
    dice = random.Random(seed)
    shape = [(dice.choice(["chain", "fan", "nest"]), dice.randrange(1, 4), dice.choice("ab")) for _ in range(4)]

    async def built(run: Run) -> str:
        texts: list[str] = []
        for kind, width, text in shape:
            if kind == "chain":
                for _ in range(width):
                    texts.append(await run(ask, text + "".join(texts[-1:])))
            elif kind == "fan":
                texts += await gather(run(ask, text) for _ in range(width))
            else:
                texts += await gather(run(inner, text) for _ in range(width))
        return " ".join(texts)

    allowed = 1_000
    bought: dict[str, str] = {}  # by all that a call says of itself

    def answer(call: Call) -> Any:
        if len(bought) >= allowed:
            return UpstreamRejected("stopped")
        assert repr(call) not in bought, "bought twice"
        bought[repr(call)] = f"<{len(bought)}>"
        return bought[repr(call)]

    store = MemoryCache()
    await run_program(made(built), "q", upstream=FunctionUpstream(answer, name="up"), cache=store)
    whole = len(bought)
    for k in range(0, whole, 3):
        bought.clear()
        store = MemoryCache()
        allowed = k
        with pytest.raises(UpstreamError):
            await run_program(made(built), "q", upstream=FunctionUpstream(answer, name="up"), cache=store)
        allowed = 1_000
        text = (await run_program(made(built), "q", upstream=FunctionUpstream(answer, name="up"), cache=store)).text
        assert len(bought) == whole
        assert (
            await run_program(made(built), "q", upstream=FunctionUpstream(answer, name="up"), cache=store)
        ).text == text


async def test_a_step_that_was_asked_again_is_found_at_once_the_next_time() -> None:
    @step(returns=int)
    def number(text: str) -> str:
        return text

    async def one(run: Run) -> str:
        return str(await run(number, "a"))

    answers = iter(["hm", "hm", "3"])
    upstream, store = FunctionUpstream(lambda call: next(answers), name="up"), MemoryCache()
    assert (await run_program(made(one), "q", upstream=upstream, cache=store)).text == "3"
    assert (await run_program(made(one), "q", upstream=upstream, cache=store)).text == "3"
    only = CachePolicy(mode="only")
    assert (await run_program(made(one), "q", upstream=upstream, cache=store, policy=only)).text == "3"
    assert len(upstream.calls) == 3


async def test_a_step_may_do_without_the_cache() -> None:
    async def one(run: Run) -> str:
        return await run(ask_cold.using(cache=False), "a")

    upstream, store = counting(), MemoryCache()
    for _ in range(2):
        await run_program(made(one), "q", upstream=upstream, cache=store)
    assert len(upstream.calls) == 2


# The reply


async def replying(run: Run) -> str:
    await run(ask, "first")
    return await run.reply(ask, "then")


async def test_the_reply_streams_as_it_is_generated_and_is_the_answer() -> None:
    deltas: list[Delta] = []
    upstream = FunctionUpstream(lambda call: "a long answer in pieces", name="up")
    answer = await run_program(made(replying), "q", upstream=upstream, emit=collecting(deltas))
    assert "".join(d.text for d in deltas) == answer.text == "a long answer in pieces"
    assert len(deltas) > 1
    assert [t.emit is not None for t in upstream.terms] == [False, True]


async def test_the_clients_hints_go_to_the_reply_and_to_nothing_else() -> None:
    upstream = counting()
    hints = {"temperature": 0.1, "max_completion_tokens": 7}

    async def body(run: Run) -> str:
        await run(ask.using(max_tokens=3), "first")
        return await run.reply(ask.using(temperature=0.9, max_tokens=3), "then")

    await run_program(made(body), "q", upstream=upstream, hints=hints)
    first, then = upstream.calls
    assert isinstance(first, Chat)
    assert isinstance(then, Chat)
    assert first.params == {"max_tokens": 3}
    assert then.params == hints


async def test_a_raw_reply_takes_the_hints_that_mean_something_there() -> None:
    upstream = counting()

    async def body(run: Run) -> str:
        return await run.reply(continued, "Once")

    await run_program(
        made(body), "q", upstream=upstream, hints={"max_completion_tokens": 7, "reasoning_effort": "low", "top_p": 0.5}
    )
    (call,) = upstream.calls
    assert isinstance(call, Completion)
    assert call.params == {"max_tokens": 7, "top_p": 0.5}


async def test_the_reply_can_be_given_once() -> None:
    async def twice(run: Run) -> str:
        await run.reply(ask, "a")
        return await run.reply(ask, "b")

    with pytest.raises(ProgramError, match=r'program "made" called run\.reply twice'):
        await run_program(made(twice), "q", upstream=counting())


def longer(text: str) -> Answer:
    return Answer(text=text + ".")


@pytest.mark.parametrize("change", [str.upper, longer, str.lstrip])
async def test_a_reply_that_is_not_returned_as_it_was_is_an_error(change: Callable[[str], Any]) -> None:
    async def changes(run: Run) -> Any:
        return change(await run.reply(ask, "a"))

    upstream = FunctionUpstream(lambda call: " a", name="up")
    with pytest.raises(ProgramError, match=r"returned something else than its run\.reply gave"):
        await run_program(made(changes), "q", upstream=upstream)


async def test_a_reply_may_be_returned_with_citations_and_data() -> None:
    async def cites(run: Run) -> Answer:
        return Answer(text=await run.reply(ask, "a"), citations=[Citation(id="1")], data={"n": 1})

    answer = await run_program(made(cites), "q", upstream=counting())
    assert answer == Answer(text="answer 0", citations=[Citation(id="1")], data={"n": 1})


async def test_a_reply_that_was_cut_off_says_so() -> None:
    upstream = FunctionUpstream(lambda call: Reply(text="half", finish="length"), name="up")
    assert (await run_program(made(replying), "q", upstream=upstream)).finish == "length"


TOOLS: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
SHAPE: dict[str, Any] = {"tools": TOOLS, "tool_choice": "auto", "response_format": {"type": "json_object"}}


async def test_a_draft_is_asked_for_what_the_client_wants_and_held_and_may_become_the_answer() -> None:
    deltas: list[Delta] = []

    async def chooses(run: Run) -> Answer:
        assert run.wants_json
        drafts = [await run.draft(ask.using(temperature=1), "q") for _ in range(3)]
        assert not deltas
        return Answer(text=await run.reply(drafts[1]), data={"drafts": [draft.text for draft in drafts]})

    call = ToolCall(id="c", name="look", arguments="{}")
    replies = iter([Reply(text='{"a": 1}'), Reply(tool_calls=(call,), finish="tool_calls"), Reply(refusal="No.")])
    upstream = FunctionUpstream(lambda call: next(replies), name="up")
    answer = await run_program(
        made(chooses, supports=["tools", "response_format"]),
        "q",
        upstream=upstream,
        hints={"temperature": 0.1, "max_tokens": 5},
        shape=SHAPE,
        emit=collecting(deltas),
    )
    assert answer == Answer(tool_calls=(call,), finish="tool_calls", data={"drafts": ['{"a": 1}', "", ""]})
    for asked, number in zip(upstream.calls, range(3), strict=True):
        assert isinstance(asked, Chat)
        assert asked.tools == tuple(TOOLS)
        assert asked.params == {"temperature": 1, **{name: SHAPE[name] for name in SHAPE if name != "tools"}}
        assert asked.draw == f"0/{number}"


async def test_a_draft_that_does_not_fit_or_cannot_be_read_is_asked_for_again_and_kept_as_it_then_is() -> None:
    def short(text: str) -> str:
        if len(text) > 8:
            raise ValueError("That is too long.")
        return text

    async def drafts(run: Run) -> str:
        return await run.reply(await run.draft(brief, "q"))

    @step(returns=short)
    def brief(text: str) -> str:
        return text

    said = ["no JSON", '{"a": "too long"}', '{"a": 1}']
    replies, store = iter(said), MemoryCache()
    upstream = FunctionUpstream(lambda call: next(replies), name="up")
    for _ in range(2):
        shape = {"response_format": {"type": "json_object"}}
        answer = await run_program(made(drafts), "q", upstream=upstream, cache=store, shape=shape)
        assert answer == Answer(text='{"a": 1}')
    last = upstream.calls[-1]
    assert isinstance(last, Chat)
    assert len(upstream.calls) == 3
    assert last.messages[-1].text == "That is too long.\nPlease answer again."


async def test_where_the_client_wants_text_a_draft_is_the_call_that_any_step_would_make() -> None:
    async def both(run: Run) -> str:
        assert not run.wants_json
        await run(ask, "q")
        return (await run.draft(ask.using(sample=0), "q")).text

    upstream = counting()
    shape: dict[str, Any] = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"}
    await run_program(made(both), "q", upstream=upstream, shape=shape, cache=MemoryCache())
    assert len(upstream.calls) == 1


async def test_a_draft_has_the_tools_of_its_program_too() -> None:
    @tool
    def own() -> str:
        """The program's own."""
        return "done"

    async def drafts(run: Run) -> str:
        draft = await run.draft(ask.using(tools=[own]), "q")
        return (await run.call(draft.tool_calls[0])).text

    call = ToolCall(id="c", name="own", arguments="{}")
    upstream = FunctionUpstream(lambda asked: Reply(tool_calls=(call,), finish="tool_calls"), name="up")
    answer = await run_program(made(drafts, supports=["tools"]), "q", upstream=upstream, shape={"tools": TOOLS})
    assert answer.text == "done"
    (asked,) = upstream.calls
    assert isinstance(asked, Chat)
    assert [tool["function"]["name"] for tool in cast("Any", asked.tools)] == ["own", "look"]


@step(returns=list[int])
def shaped(text: str) -> str:
    return text


@pytest.mark.parametrize("what", [continued, shaped])
async def test_what_cannot_answer_as_the_client_asks_cannot_be_a_draft(what: Any) -> None:
    async def drafts(run: Run) -> str:
        return (await run.draft(what, "q")).text

    upstream = counting()
    with pytest.raises(ProgramError, match=r"run\.draft wants a step that shows messages"):
        await run_program(made(drafts), "q", upstream=upstream)
    assert not upstream.calls


async def test_a_draft_is_the_reply_or_another_is_but_not_both() -> None:
    async def twice(run: Run) -> str:
        await run.reply(await run.draft(ask, "a"))
        return await run.reply(ask, "b")

    with pytest.raises(ProgramError, match=r"called run\.reply twice"):
        await run_program(made(twice), "q", upstream=counting())


async def test_a_step_whose_reply_is_made_into_something_cannot_be_the_reply() -> None:
    upstream = counting()

    @step(returns=str.strip)
    def stripped() -> str:
        return "?"

    async def body(run: Run) -> str:
        return await run.reply(stripped)

    with pytest.raises(ProgramError, match=r'step "stripped" .* cannot have returns='):
        await run_program(made(body), "q", upstream=upstream)
    assert upstream.calls == []


async def test_a_nested_program_streams_only_if_the_outer_one_passes_it_on() -> None:
    nested = made(replying, "nested")

    async def passes(run: Run) -> str:
        return await run.reply(nested, run.messages)

    async def keeps(run: Run) -> str:
        return await run(nested, run.messages)

    upstream = FunctionUpstream(lambda call: Reply(text="a long answer in pieces", finish="length"), name="up")
    deltas: list[Delta] = []
    hints = {"temperature": 0.1}
    answer = await run_program(made(passes), "q", upstream=upstream, emit=collecting(deltas), hints=hints)
    assert "".join(d.text for d in deltas) == answer.text == "a long answer in pieces"
    assert answer.finish == "length"
    assert [c.params for c in upstream.calls if isinstance(c, Chat)] == [{}, hints]
    deltas.clear()
    upstream.calls.clear()
    answer = await run_program(made(keeps), "q", upstream=upstream, emit=collecting(deltas), hints=hints)
    assert (answer.text, deltas) == ("a long answer in pieces", [])
    assert [c.params for c in upstream.calls if isinstance(c, Chat)] == [{}, {}]


async def test_text_that_a_call_of_the_programs_own_tool_may_follow_is_held_back() -> None:
    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return word

    @step(tools=[look_up], temperature=0)
    def say(text: str) -> str:
        return text

    async def uses(run: Run) -> str:
        return await run.reply(say, run.question)

    deltas: list[Delta] = []
    answer = await run_program(made(uses), "q", upstream=FunctionUpstream(lambda call: "hm"), emit=collecting(deltas))
    assert (answer.text, deltas) == ("hm", [])


async def test_text_streams_where_the_clients_own_tools_are_offered() -> None:
    deltas: list[Delta] = []
    upstream = FunctionUpstream(lambda call: "hm", name="up")
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer, _ = await serve(
        made(replying, supports=["tools"]), upstream, emit=collecting(deltas), shape={"tools": tools}
    )
    assert answer.text == "".join(delta.text for delta in deltas) == "hm"
    assert isinstance(upstream.calls[1], Chat)
    assert upstream.calls[1].tools == tuple(tools)


# What a program is shown


async def test_a_program_is_shown_the_whole_conversation() -> None:
    conversation = [
        Message("system", "Be brief."),
        Message("user", [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "data:,"}}]),
        Message("assistant", "two", name="bot"),
        Message("user", "three", extra={"cache_control": {"type": "ephemeral"}}),
        Message("assistant", "four"),
    ]
    seen: list[Run] = []

    async def looks(run: Run) -> str:
        seen.append(run)
        return run.question

    assert (await run_program(made(looks), conversation, upstream=counting())).text == "three"
    assert seen[0].messages == tuple(conversation)


async def test_a_conversation_without_a_user_has_no_question() -> None:
    async def looks(run: Run) -> str:
        return f"[{run.question}]"

    assert (await run_program(made(looks), [Message("system", "x")], upstream=counting())).text == "[]"


async def test_documents_come_with_the_request_and_reach_nested_programs() -> None:
    async def inside(run: Run) -> str:
        return " ".join(f"{d.id}:{d.text}" for d in run.documents)

    nested = made(inside, "nested")
    documents = [Document(text="a", id="1"), Document(text="b", id="2")]
    answer = await run_program(made(lambda run: run(nested, "x")), "q", upstream=counting(), documents=documents)
    assert answer.text == "1:a 2:b"


class Params(BaseModel):
    n: int
    word: str = "w"


@program("with-params", params=Params)
async def with_params(run: Run[Params]) -> str:
    return run.params.word * run.params.n


async def test_params_are_validated_before_anything_is_bought() -> None:
    upstream = counting()
    assert (await run_program(with_params, "q", upstream=upstream, params={"n": 2})).text == "ww"
    assert (await run_program(with_params, "q", upstream=upstream, params=Params(n=1, word="x"))).text == "x"
    for wrong, reason, param in (
        ({}, "n: Field required", "asmodel.params.n"),
        ({"n": "x"}, "n: Input should be a valid integer", "asmodel.params.n"),
        ({"n": 1, "m": 2}, "takes no parameter m; it takes n, word", "asmodel.params.m"),
    ):
        with pytest.raises(InvalidRequest, match=reason) as refused:
            await run_program(with_params, "q", upstream=upstream, params=wrong)
        assert refused.value.param == param
    with pytest.raises(InvalidRequest, match='program "inner" takes no parameters, but was given n'):
        await run_program(inner, "q", upstream=upstream, params={"n": 1})
    assert upstream.calls == []


async def test_a_nested_program_takes_its_params_by_using() -> None:
    async def outer(run: Run) -> str:
        return await run(with_params.using(params={"n": 1}).using(params={"word": "z"}), "x")

    assert (await run_program(made(outer), "q", upstream=counting())).text == "z"


async def test_wrong_params_of_a_nested_program_are_the_outer_programs_fault_and_not_the_clients() -> None:
    async def outer(run: Run) -> str:
        return await run(with_params.using(params={"n": "x"}), "x")

    with pytest.raises(
        ProgramError, match='program "made" runs another with wrong parameters: program "with-params": n'
    ):
        await run_program(made(outer), "q", upstream=counting())


async def test_the_same_request_has_the_same_chances_and_another_has_others() -> None:
    async def rolls(run: Run) -> str:
        return str([run.random.random() for _ in range(3)])

    async def roll(question: str, choice: int = 0) -> str:
        return (await run_program(made(rolls), question, upstream=counting(), choice=choice)).text

    assert await roll("a") == await roll("a")
    assert len({await roll("a"), await roll("b"), await roll("a", 1)}) == 3


async def test_now_stands_still_for_a_run() -> None:
    async def looks(run: Run) -> str:
        before = run.now
        await asyncio.sleep(0.01)
        assert run.now == before
        assert run.now.tzinfo is not None
        return "ok"

    await run_program(made(looks), "q", upstream=counting())


async def test_a_step_is_measured_against_the_context_of_who_plays_it() -> None:
    class Counts(FunctionUpstream):
        async def count(self, text: str) -> int:
            return len(text.split())

    async def measures(run: Run) -> str:
        size = await run.size(ask, "one two three")
        return f"{size.tokens} of {size.context}, {size.estimated}, {size.fits}"

    can = Capabilities(context=3)
    exact = Counts(lambda call: "", name="up", capabilities=can)
    assert (await run_program(made(measures), "q", upstream=exact)).text == "4 of 3, False, False"
    rough = FunctionUpstream(lambda call: "", name="up", capabilities=replace(can, context=None))
    assert (await run_program(made(measures), "q", upstream=rough)).text == "5 of None, True, True"
    assert exact.calls == rough.calls == []


# Limits


async def asks_ten(run: Run) -> str:
    for n in range(10):
        text = await run(ask, str(n))
        run.best(f"best {n}")
        del text
    return "done"


USED = Usage(prompt_tokens=60, completion_tokens=40)


@pytest.mark.parametrize(
    ("limits", "param", "calls"),
    [
        (Limits(calls=4), "calls", 4),
        (Limits(tokens=250), "tokens", 3),
        (Limits(cost=0.0003), "cost", 3),
    ],
    ids=["calls", "tokens", "cost"],
)
async def test_a_limit_ends_the_run_with_the_best_so_far_or_else_an_error(
    limits: Limits, param: str, calls: int
) -> None:
    price = Price(input=1.0, output=1.0)
    upstream = FunctionUpstream(lambda call: Reply(text="x", usage=USED), name="up")
    answer, job = await serve(made(asks_ten), upstream, price=price, limits=limits)
    assert answer == Answer(text=f"best {calls - 1}", finish="length")
    assert (job.budget.calls, len(upstream.calls)) == (calls, calls)

    async def no_best(run: Run) -> str:
        return str([await run(ask, str(n)) for n in range(10)])

    with pytest.raises(LimitExceeded) as ended:
        await serve(made(no_best), upstream, price=price, limits=limits)
    assert ended.value.param == param
    assert (ended.value.status, ended.value.retry) == (422, False)


async def test_a_run_sees_what_is_left_of_its_limits() -> None:
    seen: list[Limits] = []

    async def looks(run: Run) -> str:
        seen.append(run.left)
        await run(ask, "a")
        seen.append(run.left)
        return ""

    upstream = FunctionUpstream(lambda call: Reply(text="x", usage=USED), name="up")
    limits = Limits(calls=3, tokens=150, cost=1.0, seconds=60)
    await serve(made(looks), upstream, price=Price(input=1000.0, output=1000.0), limits=limits)
    before, after = seen
    assert (before.calls, before.tokens, before.cost) == (3, 150, 1.0)
    assert (after.calls, after.tokens) == (2, 50)
    assert after.cost == pytest.approx(0.9)
    assert before.seconds is not None
    assert after.seconds is not None
    assert 0 < after.seconds <= before.seconds <= 60
    seen.clear()
    await serve(made(looks), upstream)
    assert seen[1] == Limits()


async def slow(call: Call) -> str:
    await asyncio.sleep(30)
    return "never"


async def test_time_ends_a_step_and_the_run_has_a_moment_to_say_what_it_has() -> None:
    async def tries(run: Run) -> str:
        try:
            return await run(ask, "a")
        except DeadlineExceeded:
            return "in time"

    upstream = FunctionUpstream(slow, name="up")
    answer, _ = await serve(made(tries), upstream, limits=Limits(seconds=0.05))
    assert answer == Answer(text="in time")

    async def has_best(run: Run) -> str:
        run.best(Answer(text="best", data=1))
        return await run(ask, "a")

    answer, _ = await serve(made(has_best), upstream, limits=Limits(seconds=0.05))
    assert answer == Answer(text="best", data=1, finish="length")
    with pytest.raises(DeadlineExceeded):
        await serve(made(lambda run: run(ask, "a")), upstream, limits=Limits(seconds=0.05))


async def test_time_ends_what_is_no_step_too() -> None:
    ended = asyncio.Event()

    async def dawdles(run: Run) -> str:
        run.best("best")
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return "never"

    answer, _ = await serve(made(dawdles), counting(), limits=Limits(seconds=0.01))
    assert answer == Answer(text="best", finish="length")
    assert ended.is_set()


async def test_a_program_that_catches_everything_buys_nothing_more_all_the_same() -> None:
    caught: list[Exception] = []

    async def stubborn(run: Run) -> str:
        for n in range(20):
            try:
                await run(ask, str(n))
            except Exception as error:
                caught.append(error)
        return f"{len(caught)} refused"

    upstream = counting()
    answer, job = await serve(made(stubborn), upstream, limits=Limits(calls=2))
    assert answer.text == "18 refused"
    assert (len(upstream.calls), job.budget.calls) == (2, 2)
    assert {type(error) for error in caught} == {LimitExceeded}


async def test_nested_programs_share_the_limits_of_the_run_and_give_their_best_as_they_would_their_answer() -> None:
    nested = made(asks_ten, "nested")

    async def outer(run: Run) -> str:
        return str(await run(nested, "x")).upper()

    upstream = counting()
    answer, job = await serve(made(outer), upstream, limits=Limits(calls=3))
    assert (answer.text, job.budget.calls) == ("BEST 2", 3)


async def test_an_answer_that_has_begun_to_stream_is_not_exchanged_for_another() -> None:
    class Stalls(FunctionUpstream):
        async def send(self, call: Call, terms: Terms) -> Reply:
            assert terms.emit is not None
            await terms.emit(Delta(text="half an ans"))
            await asyncio.sleep(30)
            return Reply()

    async def body(run: Run) -> str:
        run.best("another")
        return await run.reply(ask, "a")

    deltas: list[Delta] = []
    with pytest.raises(DeadlineExceeded):
        await serve(made(body), Stalls(lambda call: ""), limits=Limits(seconds=0.1), emit=collecting(deltas))
    assert "".join(d.text for d in deltas) == "half an ans"


# Parts, notes, tasks


@pytest.fixture
def spans() -> Iterator[Callable[[str], list[ReadableSpan]]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider)
    try:
        yield lambda name: [span for span in exporter.get_finished_spans() if span.name == name]
    finally:
        tracing.remove(provider)
        provider.shutdown()


async def test_a_part_is_one_span_and_counts_its_steps(spans: Callable[[str], list[ReadableSpan]]) -> None:
    lines: list[str] = []

    async def body(run: Run) -> str:
        with run.part("votes", of=4):
            await gather(run(ask, "a") for _ in range(3))
        with run.part("votes", of=2):
            await run(ask, "a")
        await run(ask, "alone")
        return ""

    _, job = await serve(made(body), counting())
    while (line := job.progress.next_line()) is not None:
        lines.append(line)
    assert lines == ["votes · ask 4/6", "ask 1/1"]
    part = spans("part votes")[0].context
    assert part is not None
    inside = [s for s in spans("step ask") if s.parent is not None and s.parent.span_id == part.span_id]
    assert len(inside) == 3


async def test_progress_says_what_was_cached_and_what_was_asked_again() -> None:
    @step(returns=int)
    def number() -> str:
        return "?"

    answers = iter(["hm", "1"])

    async def body(run: Run) -> str:
        return str(await run(number))

    _, job = await serve(made(body), FunctionUpstream(lambda call: next(answers), name="up"))
    assert job.progress.next_line() == "number 1/1 (1 asked again)"
    assert job.progress.next_line() is None


async def test_notes_are_numbers_on_the_span_of_the_run(spans: Callable[[str], list[ReadableSpan]]) -> None:
    async def body(run: Run) -> str:
        with run.part("inside"):
            run.note(tally=[3, 2], share=0.6, mixed=[1, 0.5], none=[])
        return ""

    await serve(made(body), counting())
    (span,) = spans("invoke_workflow made")
    assert span.attributes is not None
    assert span.attributes["asmodel.run.note.tally"] == (3, 2)
    assert span.attributes["asmodel.run.note.share"] == 0.6
    assert span.attributes["asmodel.run.note.mixed"] == (1.0, 0.5)


@pytest.mark.parametrize("fact", ["text", ["a"], None, {"a": 1}, b"x"])
async def test_a_note_of_anything_but_numbers_is_refused(fact: Any) -> None:
    async def body(run: Run) -> str:
        run.note(fact=fact)
        return ""

    with pytest.raises(ProgramError, match="raised TypeError"):
        await serve(made(body), counting())


async def test_what_a_run_started_ends_with_it() -> None:
    ended: list[str] = []

    async def work(name: str, seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            ended.append(f"{name} cancelled")
            raise
        return name

    async def body(run: Run) -> str:
        run.start(work("long", 30))
        return await run.start(work("short", 0))

    answer, _ = await serve(made(body), counting())
    assert (answer.text, ended) == ("short", ["long cancelled"])

    async def fails(run: Run) -> str:
        run.start(work("long", 30))
        await asyncio.sleep(0)
        raise ValueError

    ended.clear()
    with pytest.raises(ProgramError):
        await serve(made(fails), counting())
    assert ended == ["long cancelled"]


async def test_a_started_task_that_fails_unheard_is_told_of_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        raise RuntimeError("a secret")

    async def body(run: Run) -> str:
        run.start(work())
        await asyncio.sleep(0.01)
        return "ok"

    await serve(made(body), counting())
    gc.collect()
    assert 'program "made": what run.start began raised RuntimeError at test_run.py:' in caplog.text
    assert "secret" not in caplog.text


async def test_a_run_that_is_cancelled_leaves_nothing_running() -> None:
    inside = 0

    async def answer(call: Call) -> str:
        nonlocal inside
        inside += 1
        try:
            await asyncio.sleep(30)
        finally:
            inside -= 1
        return "never"

    async def body(run: Run) -> str:
        run.start(run(ask, "beside"))
        return " ".join(await gather(run(inner, str(n)) for n in range(3)))

    upstream = FunctionUpstream(answer, name="up")
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(run_program(made(body), "q", upstream=upstream))
    while inside < 4:  # noqa: ASYNC110  # there is no event for that
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (inside, asyncio.all_tasks() - before) == (0, set())


# Errors


async def test_a_programs_own_exception_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def body(run: Run) -> str:
        raise KeyError(f"no entry for {run.question}")

    with caplog.at_level(logging.DEBUG), pytest.raises(ProgramError) as failed:
        await run_program(made(body), "a secret question", upstream=counting())
    assert str(failed.value).startswith('program "made": its code raised KeyError at test_run.py:')
    assert (failed.value.status, failed.value.retry) == (500, False)
    assert "secret" not in str(failed.value) + caplog.text
    assert "test_run.py" in caplog.text


async def test_an_exception_in_a_step_or_its_reader_names_the_step_and_the_line() -> None:
    @step
    def shows(question: str) -> str:
        return {"a": "b"}[question]

    @step(returns=lambda text: text.split("=")[1])
    def reads(question: str) -> str:
        return question

    with pytest.raises(ProgramError, match=r'^program "made": step "shows" raised KeyError at test_run.py:\d+$'):
        await run_program(made(lambda run: run(shows, "secret")), "q", upstream=counting())
    with pytest.raises(
        ProgramError, match=r'^program "made": the reader of step "reads" raised IndexError at test_run.py:\d+$'
    ):
        await run_program(made(lambda run: run(reads, "secret")), "q", upstream=counting())


async def test_a_step_that_shows_what_it_should_not_is_told_what_it_should() -> None:
    untyped: Any = step
    wrong = untyped(lambda: 3)

    with pytest.raises(ProgramError, match=r'program "made": step "<lambda>" returns int; it should return text'):
        await run_program(made(lambda run: run(wrong)), "q", upstream=counting())


async def test_a_step_called_with_wrong_arguments_is_told_which() -> None:
    call: Any = ask
    with pytest.raises(ProgramError, match=r'step "ask": missing a required argument: \'text\''):
        await run_program(made(lambda run: run(call)), "q", upstream=counting())


async def test_a_step_that_shows_half_a_surrogate_pair_is_refused_by_name() -> None:
    upstream = counting()
    for asked in (ask, ask_cold):
        with pytest.raises(ProgramError, match=r'step "ask\w*" shows what JSON cannot carry: .*surrogates') as failed:
            await run_program(made(lambda run, asked=asked: run(asked, "secret \ud800")), "q", upstream=upstream)  # type: ignore[misc]
        assert "secret" not in str(failed.value)
    assert upstream.calls == []


@pytest.mark.parametrize("returned", [None, 3, ["a"], b"x", Message("assistant", "x")])
async def test_a_program_that_returns_something_else_is_told_what_a_program_returns(returned: Any) -> None:
    async def body(run: Run) -> Any:
        return returned

    name = type(returned).__name__
    with pytest.raises(ProgramError, match=f'program "made" returned {name}; a program returns text or an Answer'):
        await run_program(made(body), "q", upstream=counting())


async def test_an_upstreams_error_reaches_the_client_as_it_is() -> None:
    upstream = FunctionUpstream(lambda call: UpstreamRejected("too long"), name="up")
    with pytest.raises(UpstreamRejected, match="too long"):
        await run_program(made(replying), "q", upstream=upstream)


async def test_what_can_be_run_is_a_step_a_program_or_a_tool() -> None:
    wrong: Any = "text"
    with pytest.raises(ProgramError, match="raised TypeError"):
        await run_program(made(lambda run: run(wrong)), "q", upstream=counting())


async def test_only_cached_answers_are_wanted_and_one_is_missing() -> None:
    upstream = counting()
    with pytest.raises(NotCached, match='step "ask" is not in the cache'):
        await run_program(made(replying), "q", upstream=upstream, cache=MemoryCache(), policy=CachePolicy(mode="only"))
    assert upstream.calls == []


async def test_programs_nested_without_end_are_stopped() -> None:
    loop: list[Program[None, Any]] = []
    loop.append(made(lambda run: run(loop[0], "x"), "loop"))
    with pytest.raises(ProgramError, match=r'program "loop" is nested more than 16 deep'):
        await run_program(loop[0], "q", upstream=counting())


# Gathering


async def value(n: int) -> int:
    await asyncio.sleep(0)
    return n


async def fail(error: Exception, after: float = 0) -> int:
    await asyncio.sleep(after)
    raise error


async def test_what_is_gathered_keeps_its_order() -> None:
    async def late(n: int) -> int:
        await asyncio.sleep((5 - n) / 500)
        return n

    assert await gather(late(n) for n in range(5)) == [0, 1, 2, 3, 4]
    assert await gather([]) == []


async def test_two_or_three_of_different_kinds_are_gathered_as_a_tuple() -> None:
    async def text() -> str:
        return "a"

    assert await gather(value(1), text()) == (1, "a")
    assert await gather(value(1), text(), value(2)) == (1, "a", 2)


async def test_the_first_failure_cancels_the_rest_and_is_raised_as_it_is() -> None:
    ended: list[int] = []

    async def long(n: int) -> int:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(n)
        return n

    error = UpstreamUnavailable("down")
    with pytest.raises(UpstreamUnavailable) as raised:
        await gather([long(0), fail(error), long(2)])
    assert raised.value is error
    assert sorted(ended) == [0, 2]
    assert error.__context__ is None
    assert error.__cause__ is None


async def test_an_error_keeps_the_cause_that_it_had() -> None:
    async def chained() -> int:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise StepError("outer") from error

    with pytest.raises(StepError) as raised:
        await gather([value(1), chained()])
    assert isinstance(raised.value.__cause__, KeyError)


async def test_errors_that_are_kept_stand_in_their_places() -> None:
    error = StepError("unreadable")
    assert await gather([value(0), fail(error), value(2)], errors="keep") == [0, error, 2]


async def test_cancelling_what_is_gathered_cancels_all_of_it_even_before_it_has_begun() -> None:
    started = ended = 0

    async def long() -> int:
        nonlocal started, ended
        started += 1
        try:
            await asyncio.sleep(30)
        finally:
            ended += 1
        return 0

    for pause in (0.0, 0.01):
        gathering = [asyncio.ensure_future(gather(long() for _ in range(3)))]
        await asyncio.sleep(0)
        await asyncio.sleep(pause)
        gathering[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await gathering[0]
    # Here what is gathered has not begun when it is cancelled.
    async with asyncio.TaskGroup() as group:
        cancelled = group.create_task(gather(long() for _ in range(3)))
        asyncio.get_running_loop().call_soon(cancelled.cancel)
    gc.collect()
    assert started == ended


async def test_a_gathering_that_is_cancelled_is_not_kept_alive_by_what_fails_of_it() -> None:
    async def stubborn() -> int:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            raise ValueError("while ending") from None
        return 0

    async def carries_on() -> str:
        try:
            await gather([stubborn(), stubborn()])
        except Exception:
            return "carried on"
        return "?"

    task = asyncio.ensure_future(carries_on())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_something_gathered_that_somebody_else_cancels_is_not_taken_for_an_answer() -> None:
    task = asyncio.ensure_future(asyncio.sleep(30))
    asyncio.get_running_loop().call_later(0.01, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await gather([value(1), task])


async def test_gatherings_inside_gatherings_keep_their_variables_apart() -> None:
    assert await gather(gather(value(10 * m + n) for n in range(2)) for m in range(3)) == [[0, 1], [10, 11], [20, 21]]


async def test_a_failure_that_was_caught_leaves_a_time_limit_around_it_working() -> None:
    async def catches() -> None:
        with contextlib.suppress(StepError):
            await gather([fail(StepError("caught")), value(1)])
        await asyncio.sleep(30)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await catches()


async def test_gatherings_inside_gatherings_raise_no_groups() -> None:
    with pytest.raises(StepError) as raised:
        await gather(
            gather(fail(StepError("deep"), 0.01) if n == m == 1 else value(n) for n in range(3)) for m in range(3)
        )
    assert raised.value.__context__ is None


async def test_a_gathering_inside_a_time_limit_ends_with_it() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await gather(asyncio.sleep(30) for _ in range(3))
