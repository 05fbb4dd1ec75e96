"""What a run may spend: bounds of the settings, of a program and of a request, and what is said when one is reached."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.serving import Answered, Server, serving, upstream

from asmodel.testing import ScriptedServer

PROGRAMS = '''
"""Programs that could go on for ever."""

from asmodel import Run, program, step


@step(temperature=0)
def more(number: int, question: str) -> str:
    return f"{number} of {question}"


@program("endless")
async def endless(run: Run) -> str:
    """Never has enough."""
    for number in range(1000):
        await run(more, number, run.question)
    return "enough"


@program("modest")
async def modest(run: Run) -> str:
    """The same, with its own bound in the settings, and an answer in hand."""
    for number in range(1000):
        run.best(f"{number} so far")
        await run(more, number, run.question)
    return "enough"


@program("frugal")
async def frugal(run: Run) -> str:
    """Looks at what is left."""
    return str(run.left.calls)
'''

SETTINGS = """
program_folders = ["programs"]
[limits]
calls = 6
seconds = 20
[programs.modest]
limits = { calls = 4 }
"""


@pytest.fixture(scope="module")
def started() -> Iterator[ScriptedServer]:
    with ScriptedServer() as made:
        yield made


@pytest.fixture
def up(started: ScriptedServer) -> ScriptedServer:
    started.delay = 0.0
    started.clear()
    return started


@pytest.fixture(scope="module")
def server(started: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "programs").mkdir()
    (folder / "programs" / "endless.py").write_text(PROGRAMS)
    priced = upstream(started.base_url, retries=0) + "price = { input = 1000.0, output = 1000.0 }\n"
    with serving(folder, SETTINGS + priced) as made:
        yield made


def ask(server: Server, model: str, *, stream: bool = False, **limits: Any) -> Answered:
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "all of it"}]}
    return server.chat(body | {"asmodel": {"limits": limits, "cache": "off", "progress": False}})


@pytest.mark.parametrize(
    ("model", "asked", "calls"),
    [
        ("endless", None, 6),
        ("endless", 3, 3),
        ("endless", 100, 6),
        ("modest", None, 4),
        ("modest", 2, 2),
        ("modest", 5, 4),
        ("modest", 100, 4),
    ],
)
def test_a_request_may_tighten_a_limit_and_never_widen_it(
    server: Server, up: ScriptedServer, model: str, asked: int | None, calls: int
) -> None:
    limits: dict[str, Any] = {} if asked is None else {"calls": asked}
    ask(server, model, **limits)
    assert len(up.requests) == calls


def test_a_program_sees_what_is_left(server: Server, up: ScriptedServer) -> None:
    given: list[dict[str, Any]] = [{}, {"calls": 2}]
    told = [ask(server, "frugal", **limits).json["choices"][0]["message"]["content"] for limits in given]
    assert told == ["6", "2"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("limits", "status", "code", "param"),
    [
        ({"calls": 2}, 422, "limit_exceeded", "calls"),
        ({"tokens": 10}, 422, "limit_exceeded", "tokens"),
        ({"cost": 0.005}, 422, "limit_exceeded", "cost"),
        ({"seconds": 0.4}, 504, "deadline_exceeded", "seconds"),
    ],
)
def test_what_a_limit_cuts_off_is_an_error_with_the_receipt(
    server: Server, up: ScriptedServer, limits: dict[str, Any], status: int, code: str, param: str, stream: bool
) -> None:
    if param == "seconds":
        up.delay = 0.15
    began = time.monotonic()
    answer = ask(server, "endless", stream=stream, **limits)
    assert time.monotonic() - began < 5
    if stream and answer.status == 200:
        body = json.loads(answer.body.split(b"\n\n")[-2].removeprefix(b"data: "))
        assert b"[DONE]" not in answer.body
        error = body["error"]
    else:
        assert answer.status == status
        assert answer.headers["x-should-retry"] == "false"
        body, error = answer.json, answer.error
    assert (error["code"], error["param"]) == (code, param)
    told = body["asmodel"]
    assert told["upstream_calls"] == len(up.requests)
    assert told["steps"] >= 1
    assert told["cost"] > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limits", [{"calls": 2}, {"tokens": 10}, {"cost": 0.005}, {"seconds": 0.4}])
def test_the_best_answer_so_far_is_given_with_the_reason_length(
    server: Server, up: ScriptedServer, limits: dict[str, Any], stream: bool
) -> None:
    if "seconds" in limits:
        up.delay = 0.15
    answer = ask(server, "modest", stream=stream, **limits)
    assert answer.status == 200
    if stream:
        assert answer.body.endswith(b"data: [DONE]\n\n")
        chunks = [json.loads(e.removeprefix(b"data: ")) for e in answer.body.split(b"\n\n")[:-2]]
        content = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        finish, told = chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["asmodel"]
    else:
        (choice,) = answer.json["choices"]
        content, finish, told = choice["message"]["content"], choice["finish_reason"], answer.json["asmodel"]
    assert content.endswith(" so far")
    assert finish == "length"
    assert told["upstream_calls"] == len(up.requests)


@pytest.mark.parametrize("limits", [{"calls": 0}, {"tokens": -1}, {"cost": 0}, {"seconds": "1"}, {"steps": 5}])
def test_a_limit_that_is_none_is_refused_by_name(server: Server, up: ScriptedServer, limits: dict[str, Any]) -> None:
    answer = ask(server, "endless", **limits)
    assert answer.status == 400
    assert answer.error["param"] == f"asmodel.limits.{next(iter(limits))}"
    assert up.requests == []


@pytest.mark.parametrize("limits", [{"seconds": 1e300}, {"calls": 10**18}, {"tokens": 2**63}, {"cost": 1e308}])
def test_a_limit_beyond_all_reason_is_no_limit(server: Server, limits: dict[str, Any]) -> None:
    assert ask(server, "frugal", **limits).status == 200


def test_choices_share_one_budget(server: Server, up: ScriptedServer) -> None:
    body = {"model": "endless", "n": 3, "messages": [{"role": "user", "content": "shared"}]}
    answer = server.chat(body | {"asmodel": {"limits": {"calls": 5}, "cache": "off"}})
    assert (answer.status, answer.error["param"]) == (422, "calls")
    assert 3 <= len(up.requests) <= 5, "the last may have been taken back before they were sent"


def test_a_limit_of_calls_holds_for_what_is_passed_through(server: Server, up: ScriptedServer) -> None:
    body = {"model": "default", "n": 3, "messages": [{"role": "user", "content": "x"}]}
    assert server.chat(body | {"asmodel": {"limits": {"calls": 1}}}).status == 200
    # What was called off for the test before may have been on its way to the upstream.
    assert len([r for r in up.requests if r.body["messages"] == body["messages"]]) == 1
    cached = server.chat(body | {"asmodel": {"limits": {"calls": 1}, "cache": "refresh"}})
    assert (cached.status, cached.error["param"]) == (422, "calls")
