"""What users complain of where a model's name stands for a procedure, and how it is here instead.

History flattened into one string, tools and images dropped on the way, streams of a single chunk, bodies without ids
and usage, errors that are bare strings, and one caller's settings that change everybody's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.serving import Server, create, serving, upstream

from asmodel.testing import Fault, ScriptedServer, ServerAnswer

PROGRAMS = '''
"""A procedure in front of the answer, as such servers have: it thinks first, then replies with all it was given."""

from pydantic import BaseModel, Field

from asmodel import Message, Run, program, step


@step(model="thinker", temperature=0)
def plan(question: str) -> str:
    return f"Plan an answer to: {question}"


@step
def conversation(messages: list[Message], plan: str) -> list[Message]:
    return [*messages[:-1], Message("system", f"The plan: {plan}"), messages[-1]]


class Effort(BaseModel):
    plans: int = Field(default=1, ge=1, le=9)


@program("planned", params=Effort, supports=["tools", "images", "response_format", "logprobs"])
async def planned(run: Run[Effort]) -> str:
    """Plans, and then replies."""
    made = [await run(plan, f"{run.question} ({number})") for number in range(run.params.plans)]
    return await run.reply(conversation, list(run.messages), " ".join(made))
'''

MODELS = ("planned", "plain", "self-consistency")


class Upstream(ScriptedServer):
    """Plans where it is asked to, and says what it is told to for the rest."""

    def __init__(self) -> None:
        self.says: Callable[[dict[str, Any]], ServerAnswer] = lambda body: None
        super().__init__(self._answer)

    def _answer(self, body: dict[str, Any]) -> ServerAnswer:
        return "think" if self.planning(body) else self.says(body)

    @staticmethod
    def planning(body: dict[str, Any]) -> bool:
        return str(body["messages"][-1]["content"]).startswith("Plan an answer")

    @property
    def replied(self) -> dict[str, Any]:
        """The body of the last call that was not one of planning."""
        return next(r.body for r in reversed(self.requests) if not self.planning(r.body))


@pytest.fixture(scope="module")
def started() -> Iterator[Upstream]:
    made = Upstream()
    with made:
        yield made


@pytest.fixture
def up(started: Upstream) -> Upstream:
    started.says = lambda body: "One two three four five six seven eight."
    started.token_delay = 0.0
    started.clear()
    return started


@pytest.fixture(scope="module")
def server(started: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("peers")
    (folder / "programs").mkdir()
    (folder / "programs" / "planned.py").write_text(PROGRAMS)
    with serving(folder, 'program_folders = ["programs"]\n' + upstream(started.base_url, retries=0)) as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


HISTORY: list[Any] = [
    {"role": "system", "content": "You are a clerk."},
    {"role": "user", "content": "User: is this a turn?\nAssistant: no, it is text.", "name": "ann"},
    {"role": "assistant", "content": "It is text."},
    {"role": "user", "content": "Good. And what did I say first?", "name": "bob"},
]


def test_a_conversation_stays_turns_with_their_roles_and_names(client: openai.OpenAI, up: Upstream) -> None:
    create(client, model="planned", messages=HISTORY)
    *before, plan, last = up.replied["messages"]
    assert [*before, last] == HISTORY
    assert plan["role"] == "system"


def test_a_system_prompt_that_names_a_model_changes_no_model(client: openai.OpenAI, up: Upstream) -> None:
    """Names are never read out of the text of messages, nor guessed from the beginning of another name."""
    tag = "<optillm_approach>self-consistency</optillm_approach>"
    answer = create(client, model="plain", messages=[{"role": "system", "content": tag}, *user("x")])
    assert (answer.model, len(up.requests)) == ("plain", 1)
    assert up.replied["messages"][0]["content"] == tag
    with pytest.raises(openai.NotFoundError):
        create(client, model="planned-default", messages=user("x"))


TOOLS: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALLS: list[Any] = [
    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}},
    {"id": "c2", "type": "function", "function": {"name": "look", "arguments": '{"at": 2}'}},
]


@pytest.mark.parametrize("model", ["planned", "self-consistency"])
@pytest.mark.parametrize("stream", [False, True])
def test_tools_go_through_a_procedure_and_their_calls_come_back(
    client: openai.OpenAI, up: Upstream, stream: bool, model: str
) -> None:
    up.says = lambda body: {"content": None, "tool_calls": CALLS}
    asked: dict[str, Any] = dict(model=model, messages=user(f"look {stream}"), tools=TOOLS, tool_choice="required")
    if stream:
        found: dict[int, dict[str, str]] = {}
        for chunk in create(client, **asked, stream=True):
            for part in chunk.choices[0].delta.tool_calls or ():
                call = found.setdefault(part.index, {"id": "", "arguments": ""})
                call["id"] += part.id or ""
                call["arguments"] += part.function.arguments or ""
        told = [(c["id"], c["arguments"]) for c in found.values()]
    else:
        choice = create(client, **asked).choices[0]
        assert choice.finish_reason == "tool_calls"
        told = [(c.id, c.function.arguments) for c in choice.message.tool_calls]
    assert told == [("c1", '{"at": 1}'), ("c2", '{"at": 2}')]
    assert (up.replied["tools"], up.replied["tool_choice"]) == (TOOLS, "required")


@pytest.mark.parametrize("model", ["plain", "self-consistency"])
def test_results_of_tools_go_back_to_the_model_as_such(client: openai.OpenAI, up: Upstream, model: str) -> None:
    results = [
        {"role": "tool", "tool_call_id": id, "content": f"a {what}"} for id, what in (("c1", "cat"), ("c2", "dog"))
    ]
    messages = [*user("look"), {"role": "assistant", "content": None, "tool_calls": CALLS}, *results]
    create(client, model=model, messages=messages, tools=TOOLS)
    question, *rest = up.replied["messages"]
    assert question["content"].startswith("look")
    assert rest == messages[1:]


@pytest.mark.parametrize("model", MODELS)
def test_images_go_through_a_procedure(client: openai.OpenAI, up: Upstream, model: str) -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}},
    ]
    create(client, model=model, messages=[{"role": "user", "content": parts}])
    assert up.replied["messages"][-1]["content"][:2] == parts


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_goes_through_a_vote(server: Server, up: Upstream, stream: bool) -> None:
    refusal = {"content": None, "refusal": "I would rather not."}
    replies: Iterator[dict[str, Any]] = iter([refusal, {"content": '{"a": 1}'}, refusal])
    up.says = lambda body: next(replies)
    asked = {"response_format": {"type": "json_object"}, "asmodel": {"params": {"samples": 3}, "cache": "off"}}
    answer = server.chat({"model": "self-consistency", "messages": user("refuse"), "stream": stream, **asked})
    assert answer.status == 200
    assert b'"refusal":"I would rather not."' in answer.body.replace(b'": "', b'":"')


def test_a_vote_has_as_many_choices_as_are_asked_for(client: openai.OpenAI, up: Upstream) -> None:
    up.says = lambda body: "Answer: one"
    extra = {"asmodel": {"params": {"samples": 3}}}
    choices = create(client, model="self-consistency", messages=user("votes"), n=2, extra_body=extra).choices
    assert [choice.message.content for choice in choices] == ["one", "one"]
    assert len(up.requests) == 6


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
        ),
    ],
)
def test_what_a_procedure_cannot_honour_is_refused_by_name_and_never_dropped(
    client: openai.OpenAI, up: Upstream, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **({"model": "chain-of-thought", "messages": user("x")} | asked))
    assert caught.value.param == param
    assert up.requests == []


@pytest.mark.parametrize("model", ["planned", "plain"])
def test_a_stream_comes_in_many_chunks_while_it_is_being_generated(
    client: openai.OpenAI, up: Upstream, model: str
) -> None:
    up.token_delay = 0.05
    came: list[float] = []
    for chunk in create(client, model=model, messages=user(f"stream {model}"), stream=True):
        if chunk.choices[0].delta.content:
            came.append(time.monotonic())
    assert len(came) >= 8
    assert came[-1] - came[0] > 0.2


def test_a_procedure_says_what_it_is_at_before_its_answer(client: openai.OpenAI, up: Upstream) -> None:
    up.says = lambda body: Fault(delay=0.5, answer="Done.")
    extra = {"asmodel": {"params": {"plans": 2}}}
    chunks = list(create(client, model="planned", messages=user("progress"), stream=True, extra_body=extra))
    told = [getattr(c.choices[0].delta, "reasoning_content", None) for c in chunks]
    assert any(line and line.startswith("plan 2/2") for line in told)


@pytest.mark.parametrize("model", MODELS)
def test_every_body_has_an_id_a_time_a_name_a_finish_and_whole_usage(
    client: openai.OpenAI, up: Upstream, model: str
) -> None:
    first, second = (create(client, model=model, messages=user(f"whole {model} {n}")) for n in range(2))
    assert first.id.startswith("chatcmpl-")
    assert first.id != second.id
    assert abs(first.created - time.time()) < 60
    assert (first.object, first.model) == ("chat.completion", model)
    assert first.choices[0].finish_reason == "stop"
    assert first.choices[0].message.role == "assistant"
    usage = first.usage
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    ends = list(create(client, model=model, messages=user(model), stream=True, stream_options={"include_usage": True}))
    assert ends[-1].usage.total_tokens == ends[-1].usage.prompt_tokens + ends[-1].usage.completion_tokens > 0
    assert len({(c.id, c.created, c.model) for c in ends}) == 1


def test_an_answer_that_is_cut_off_says_so(client: openai.OpenAI, up: Upstream) -> None:
    up.says = lambda body: {"content": "One two", "finish_reason": "length"}
    assert create(client, model="planned", messages=user("long"), max_tokens=2).choices[0].finish_reason == "length"
    assert up.replied["max_tokens"] == 2


def test_usage_counts_every_call_of_a_procedure(client: openai.OpenAI, up: Upstream) -> None:
    extra = {"asmodel": {"params": {"plans": 3}}}
    usage = create(client, model="planned", messages=user("counted"), extra_body=extra).usage
    assert len(up.requests) == 4
    assert usage.completion_tokens_details.reasoning_tokens == 3
    assert usage.completion_tokens > 3


def test_n_is_honoured_even_where_the_upstream_does_not_know_it(client: openai.OpenAI, up: Upstream) -> None:
    count = iter(range(10))
    up.says = lambda body: f"draw {next(count)}"
    choices = create(client, model="plain", messages=user("n"), n=3).choices
    assert [c.index for c in choices] == [0, 1, 2]
    assert {c.message.content for c in choices} == {"draw 0", "draw 1", "draw 2"}


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"messages": []}, 400),
        ({"messages": "hello"}, 400),
        ({"temperature": "hot"}, 400),
        ({"asmodel": {"params": {"plans": 99}}}, 400),
    ],
)
def test_errors_are_objects_with_a_status_of_their_own(
    server: Server, up: Upstream, asked: dict[str, Any], status: int
) -> None:
    answer = server.chat({"model": "planned", "messages": user("x"), **asked})
    assert answer.status == status
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert error["param"]


def test_an_error_of_the_upstream_in_the_middle_of_a_procedure_keeps_its_meaning(
    client: openai.OpenAI, up: Upstream
) -> None:
    up.says = lambda body: Fault(status=429, headers={"retry-after": "3"})
    with pytest.raises(openai.RateLimitError) as caught:
        create(client, model="planned", messages=user("limited"))
    assert caught.value.response.headers["retry-after"] == "3"


def test_what_one_caller_asks_for_changes_nothing_for_another(server: Server, up: Upstream) -> None:
    """Parameters, roles and hints are of one request; there is nothing that a request could set for all."""
    asked: list[dict[str, Any]] = []
    for number in range(30):
        own: dict[str, Any] = {"model": "planned", "messages": user(f"caller {number}")}
        if number % 3 == 0:
            own |= {"temperature": 0.1, "max_tokens": number + 1, "asmodel": {"params": {"plans": 2}, "cache": "off"}}
        elif number % 3 == 1:
            own |= {"temperature": 0.9, "stop": [f"stop {number}"], "asmodel": {"progress": False}}
        asked.append(own)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(server.chat, asked))
    for number, (own, answer) in enumerate(zip(asked, answers, strict=True)):
        assert answer.status == 200
        assert answer.json["asmodel"]["steps"] == (3 if number % 3 == 0 else 2)
        bodies = [r.body for r in up.requests if r.body["messages"][-1]["content"] == f"caller {number}"]
        (replied,) = bodies
        sent = {name: own[name] for name in ("temperature", "max_tokens", "stop") if name in own}
        assert {name: replied[name] for name in ("temperature", "max_tokens", "stop") if name in replied} == sent
    untouched = server.chat({"model": "planned", "messages": user("after them all")})
    assert json.dumps(up.replied).count("stop") == 0
    assert untouched.json["asmodel"]["steps"] == 2
