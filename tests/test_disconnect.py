"""A client that dies: its run stops at once, and what it had bought is not bought again."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer

PROGRAM = '''
"""Three steps, one after the other, and three beside one another."""

from asmodel import Run, gather, program, step


@step(model="writer", temperature=0)
def part(name: str, question: str) -> str:
    return f"{name} {question}"


@program("three")
async def three(run: Run) -> str:
    """Quick, quick, slow."""
    for name in ("quick-1", "quick-2"):
        await run(part, name, run.question)
    return await run.reply(part, "slow", run.question)


@program("wide")
async def wide(run: Run) -> str:
    """Three slow ones at once."""
    return "".join(await gather(run(part, f"slow-{n}", run.question) for n in range(3)))
'''

# A client of its own, so that it can be killed as one is.
CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("POST", "/v1/chat/completions", sys.argv[2], {"content-type": "application/json"})
response = connection.getresponse()
while response.read1():
    pass
"""

JSON = {"content-type": "application/json"}

AT_ONCE = 0.1
"""Seconds after which no upstream call may go on."""


class Upstream(ScriptedServer):
    """Answers in capitals: at once, but for what is called slow, which goes on for longer than any of these tests."""

    def __init__(self) -> None:
        self.patient = True
        super().__init__(lambda body: body["messages"][-1]["content"].upper(), faults=self._pace)

    def _pace(self, received: Received) -> Fault | None:
        text = received.body["messages"][-1]["content"]
        return Fault(delay=60.0, answer=text.upper()) if self.patient and "slow" in text else None

    def bought(self, question: str) -> list[str]:
        """What was asked about the question and answered."""
        texts = [r.body["messages"][-1]["content"] for r in self.requests if r.answered_at]
        return [text for text in texts if text.endswith(question)]

    @property
    def waiting(self) -> int:
        """How many slow ones go on."""
        slow = [r for r in self.requests if "slow" in r.body["messages"][-1]["content"]]
        return len([r for r in slow if r.answered_at is None and r.left_at is None])


@pytest.fixture(scope="module")
def started() -> Iterator[Upstream]:
    server = Upstream()
    with server:
        yield server


@pytest.fixture
def up(started: Upstream) -> Upstream:
    started.patient = True
    started.clear()
    return started


@pytest.fixture(scope="module")
def server(started: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("disconnect")
    (folder / "programs").mkdir()
    (folder / "programs" / "small.py").write_text(PROGRAM)
    with serving(folder, 'program_folders = ["programs"]\n' + upstream(started.base_url)) as running:
        yield running


def body(model: str, question: str, *, stream: bool = False) -> dict[str, Any]:
    return {"model": model, "stream": stream, "messages": [{"role": "user", "content": question}]}


@contextmanager
def a_client(server: Server, body: dict[str, Any]) -> Generator[subprocess.Popen[bytes]]:
    """A client in a process of its own, that asks."""
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(server.port), json.dumps(body)])
    try:
        yield client
    finally:
        client.kill()
        client.wait()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("model", "slow"), [("three", 1), ("wide", 3), ("default", 1)])
def test_the_upstream_calls_of_a_killed_client_stop_within_a_tenth_of_a_second(
    server: Server, up: Upstream, stream: bool, model: str, slow: int
) -> None:
    took: list[float] = []
    for number in range(3):
        up.clear()
        with a_client(
            server, body(model, f"{'' if model == 'three' else 'slow '}{model} {stream} {number}", stream=stream)
        ) as client:
            eventually("the upstream is asked", lambda: up.waiting == slow)
            client.kill()
            killed = time.monotonic()
            eventually("its calls stop", lambda: up.waiting == 0)
        left = [r.left_at - killed for r in up.requests if r.left_at is not None]
        assert len(left) == slow
        took.append(max(left))
    # The median: the machine may be busy with something else for one of them.
    assert statistics.median(took) < AT_ONCE


@pytest.mark.parametrize("stream", [False, True])
def test_a_killed_client_that_asks_again_does_not_buy_finished_steps_twice(
    server: Server, up: Upstream, stream: bool
) -> None:
    question = f"again {stream}"
    with a_client(server, body("three", question, stream=stream)) as client:
        eventually("the third step is asked", lambda: up.waiting == 1 and len(up.bought(question)) == 2)
        client.kill()
        eventually("it stops", lambda: up.waiting == 0)
    up.patient = False
    with server.client() as sdk:
        answer = sdk.chat.completions.create(model="three", messages=[{"role": "user", "content": question}])
    assert answer.choices[0].message.content == f"SLOW {question}".upper()
    assert sorted(up.bought(question)) == [f"quick-1 {question}", f"quick-2 {question}", f"slow {question}"]
    receipt: Any = (answer.model_extra or {})["asmodel"]
    assert (receipt["upstream_calls"], receipt["cache_hits"]) == (1, 2)


def test_a_step_that_another_client_waits_for_too_goes_on(server: Server, up: Upstream) -> None:
    question = "shared"
    with a_client(server, body("three", question)) as first, a_client(server, body("three", question)) as second:
        # The third step is one call that both wait for: nothing else happens before the first one dies.
        eventually("the third step is asked", lambda: up.waiting == 1 and len(up.bought(question)) == 2)
        time.sleep(0.3)
        first.kill()
        time.sleep(0.5)
        assert up.waiting == 1
        second.kill()
        eventually("it stops with the last one", lambda: up.waiting == 0)
    assert len(up.bought(question)) == 2


def test_a_client_that_reads_slowly_holds_up_nobody_else(server: Server, up: Upstream) -> None:
    up.patient = False
    long = "x " * 200_000
    slow = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    slow.request("POST", "/v1/chat/completions", json.dumps(body("default", long, stream=True)), JSON)
    slow.getresponse()  # And is never read.
    started = time.monotonic()
    assert server.chat(body("default", "quick")).status == 200
    assert time.monotonic() - started < 5
    slow.close()


def test_a_client_that_leaves_before_its_body_is_whole_disturbs_nobody(server: Server, up: Upstream) -> None:
    leaver = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    leaver.putrequest("POST", "/v1/chat/completions")
    for name, value in (JSON | {"content-length": "100"}).items():
        leaver.putheader(name, value)
    leaver.endheaders(b'{"model":')
    leaver.close()
    up.patient = False
    assert server.chat(body("default", "next")).status == 200
    assert "Traceback" not in server.said
