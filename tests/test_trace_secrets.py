"""With content off, nothing of what was asked or answered, no key, and nothing of who asks leaves the server.

A word that occurs nowhere else is put into every field of a request, of the programs, and of what the upstream answers.
Then everything that a real server wrote is searched for them: spans as they were exported, the local file, the log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.collecting import Sink
from tests.serving import Answered, Server, eventually, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer

PROGRAM = '''
"""Uses all there is."""

from asmodel import Message, Prompt, Run, gather, program, score, step, tool


@tool
def look_up(word: str) -> dict[str, str]:
    """MARK-TOOLDOC"""
    return {"meaning": "MARK-TOOLRESULT " + word}


@score
def given(text: str) -> tuple[str, str]:
    return text + " MARK-CONTEXT", " MARK-CONTINUATION"


@step(stop="MARK-STEPSTOP", max_tokens=8)
def thought(text: str) -> Prompt:
    return Prompt(text + " MARK-PROMPT")


@step(returns=int, asks=2)
def count(text: str) -> str:
    return text + " MARK-UNREADABLE"


@step(tools=[look_up])
def answer(text: str) -> list[Message]:
    return [Message("system", "MARK-STEPSYSTEM"), Message("user", text)]


@program("everything")
async def everything(run: Run) -> str:
    await gather((run(given, run.question), run(thought, run.question)))
    await gather((run(count, run.question),), errors="keep")
    await run(look_up, "MARK-ARGUMENT")
    return await run.reply(answer, run.question)


@program("raises")
async def raises(run: Run) -> str:
    raise ValueError(run.question)
'''
HEADERS = {
    "authorization": "Bearer MARK-KEY-0123456789",
    "cookie": "session=MARK-COOKIE",
    "user-agent": "MARK-AGENT",
    "baggage": "user=MARK-BAGGAGE",
    "x-forwarded-for": "MARK-ADDRESS",
    "x-own": "MARK-HEADER",
    "referer": "http://127.0.0.1/MARK-REFERER",
}
BODY: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "MARK-SYSTEM", "name": "MARK-SYSTEMNAME"},
        {"role": "user", "content": [{"type": "text", "text": "MARK-EARLIER"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "MARK-CALLID", "type": "function", "function": {"name": "f", "arguments": '{"a":"MARK-ARGS"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "MARK-CALLID", "content": "MARK-RESULT"},
        {"role": "user", "content": "MARK-QUESTION", "name": "MARK-USERNAME"},
    ],
    "user": "MARK-USER",
    "metadata": {"MARK-METANAME": "MARK-METAVALUE"},
    "safety_identifier": "MARK-SAFETY",
    "prompt_cache_key": "MARK-CACHEKEY",
    "stop": ["MARK-STOP"],
    "MARK-FIELD": "MARK-FIELDVALUE",
}


def answers(body: dict[str, Any]) -> dict[str, Any] | None:
    if "messages" not in body:
        return None  # by the server's own model, which can score as well
    return {"content": "MARK-ANSWER", "reasoning_content": "MARK-REASONING"}


def faults(received: Received) -> Fault | None:
    said = json.dumps(received.body)
    if "MARK-FAIL" in said:
        return Fault(status=400, message="MARK-UPSTREAM of MARK-FAIL", headers={"x-own": "MARK-UPSTREAMHEADER"})
    return None


def marks(data: Iterable[bytes]) -> set[bytes]:
    """Each mark with what stands before it, which tells where it is."""
    return {found for part in data for found in re.findall(rb".{0,24}MARK[-A-Z0-9]*", part, re.DOTALL)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Server, Sink, Path]]:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "programs").mkdir()
    (folder / "programs" / "everything.py").write_text(PROGRAM)
    sink = Sink()
    with ScriptedServer(answers, faults=faults) as up:
        settings = upstream(up.base_url, api_key="MARK-OURKEY-0123456789", retries=0)
        settings += '[keys]\nops = "MARK-KEY-0123456789"\n'
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.address, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        with serving(folder, settings, "--programs", "programs", env=env) as server:
            yield server, sink, folder
    sink.close()


def ask(model: str, **changes: Any) -> Callable[[Server], Answered]:
    return lambda server: server.chat({"model": model, **BODY, **changes}, HEADERS)


def raw(method: str, path: str, body: object, headers: dict[str, str]) -> Callable[[Server], Answered]:
    return lambda server: server.ask(method, path, body, headers)


FAILING = [{"role": "user", "content": "MARK-FAIL"}]


@pytest.mark.parametrize(
    ("asking", "status"),
    [
        (ask("everything"), 200),
        (ask("everything", temperature=0), 200),
        (ask("everything", stream=True), 200),
        (ask("default", tools=[{"type": "function", "function": {"name": "f", "description": "MARK-TOOL"}}]), 200),
        (ask("default", stream=True), 200),
        (ask("default", asmodel={"cache": "on"}), 200),
        (ask("everything", messages=FAILING), 400),
        (ask("default", messages=FAILING), 400),
        (ask("raises"), 500),
        (ask("MARK-MODEL"), 404),
        (ask("everything", tools=[{"type": "function", "function": {"name": "MARK-F"}}]), 400),
        (ask("everything", asmodel={"params": {"MARK-PARAM": "MARK-VALUE"}}), 400),
        (raw("POST", "/v1/chat/completions", b'{"model": MARK-BROKEN', HEADERS), 400),
        (raw("POST", "/v1/chat/completions", BODY, {"authorization": "Bearer MARK-WRONGKEY"}), 401),
        (raw("GET", "/v1/models/MARK-MODEL?q=MARK-QUERY", None, HEADERS), 404),
        (raw("GET", "/MARK-PATH?q=MARK-QUERY", None, HEADERS), 404),
    ],
)
def test_no_word_of_a_request_or_an_answer_leaves_the_server(
    served: tuple[Server, Sink, Path], asking: Callable[[Server], Answered], status: int
) -> None:
    server, sink, folder = served
    before = len(sink.names)
    answered = asking(server)
    assert answered.status == status, answered.body
    if status == 200:
        eventually("spans are exported", lambda: len(sink.names) > before)
    written = [path for path in (folder / "state").rglob("*") if path.is_file()]
    assert not marks(sink.bodies), "in what was exported"
    assert not marks(path.read_bytes() for path in written), "in the local file"
    assert not marks([server.said.encode()]), "in the log"
    assert server.said.count("trace=") or status in (404, 400, 401)
