"""Runs apart from connections: who shares one by an `Idempotency-Key`, who leaves, and who reads slowly."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.serving import PATIENCE, Answered, Server, eventually, serving, upstream

from asmodel.answering import Answering, Joined
from asmodel.errors import AsmodelError, Draining, InvalidRequest, ProgramError
from asmodel.models import Models, ServedProgram
from asmodel.programs import Program, program
from asmodel.run import Run
from asmodel.service import Asked, Service
from asmodel.steps import step
from asmodel.testing import Fault, FunctionUpstream, ScriptedServer, ServerAnswer

GRACE = 1.5
KEEP = 4.0

PROGRAMS = '''
"""Programs that end in strange ways."""

import asyncio

from asmodel import Run, program


@program("cancels-itself")
async def cancels_itself(run: Run) -> str:
    """Waits for what it has cancelled."""
    work = run.start(asyncio.sleep(60))
    await asyncio.sleep(0)
    work.cancel()
    await work
    return "never"
'''


class Upstream(ScriptedServer):
    """Answers what it is told to; every answer is another."""

    def __init__(self) -> None:
        self.says: Callable[[dict[str, Any]], ServerAnswer] = self.numbered
        self.count = 0
        super().__init__(lambda body: self.says(body))

    def numbered(self, body: dict[str, Any]) -> str:
        self.count += 1
        return f"This is answer number {self.count} of all."

    def asked(self, question: str) -> int:
        return len([r for r in self.requests if r.body["messages"][-1]["content"] == question])


@pytest.fixture(scope="module")
def started() -> Iterator[Upstream]:
    server = Upstream()
    with server:
        yield server


@pytest.fixture
def up(started: Upstream) -> Upstream:
    started.says = started.numbered
    started.delay = started.token_delay = 0.0
    started.clear()
    return started


@pytest.fixture(scope="module")
def server(started: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("answering")
    (folder / "programs").mkdir()
    (folder / "programs" / "strange.py").write_text(PROGRAMS)
    settings = f'program_folders = ["programs"]\nidempotency = {{ grace_seconds = {GRACE}, keep_seconds = {KEEP} }}\n'
    settings += upstream(started.base_url, retries=0)
    settings += '[keys]\nann = "anns-key"\nbob = "bobs-key"\n'
    with serving(folder, settings) as running:
        yield running


def body(question: str, model: str = "plain", **more: Any) -> dict[str, Any]:
    # Without the cache, so that what is shared is the run.
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "asmodel": {"cache": "off"}}
    return asked | more


def ask(server: Server, asked: dict[str, Any], key: str | None, caller: str = "ann") -> Answered:
    headers = {"authorization": f"Bearer {caller}s-key"} | ({} if key is None else {"idempotency-key": key})
    return server.chat(asked, headers)


def events(answer: Answered) -> list[dict[str, Any]]:
    assert answer.status == 200, answer.body
    lines = [line[6:] for line in answer.body.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


def content(answer: Answered) -> str:
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return str(answer.json["choices"][0]["message"]["content"])
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in events(answer))


def id_of(answer: Answered) -> str:
    streamed = answer.headers["content-type"].startswith("text/event-stream")
    return str(events(answer)[0]["id"] if streamed else answer.json["id"])


class Leaver:
    """A client that asks and can leave whenever it is told to."""

    def __init__(self, server: Server, asked: dict[str, Any], key: str | None, *, room: int = 0) -> None:
        data = json.dumps(asked).encode()
        self.socket = socket.socket()
        if room:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", server.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += "authorization: Bearer anns-key\r\n" + ("" if key is None else f"idempotency-key: {key}\r\n")
        self.socket.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)

    def leave(self) -> None:
        self.socket.close()


# ---- one run for one key ----

KINDS = [("plain", False), ("plain", True), ("default", False), ("default", True)]


@pytest.mark.parametrize(("model", "stream"), KINDS)
def test_a_key_gives_the_finished_run_again(server: Server, up: Upstream, model: str, stream: bool) -> None:
    asked = body(f"finished {model} {stream}", model, stream=stream)
    first, again = (ask(server, asked, f"finished-{model}-{stream}") for _ in range(2))
    assert id_of(first) == id_of(again)
    assert content(first) == content(again)
    assert len(up.requests) == 1
    if model == "plain" and not stream:
        assert first.json["asmodel"]["run_id"] == again.json["asmodel"]["run_id"]
        assert first.json["asmodel"]["request_id"] != again.json["asmodel"]["request_id"]
    other = ask(server, asked, f"another-{model}-{stream}")
    assert id_of(other) != id_of(first) or model == "default"
    assert len(up.requests) == 2


@pytest.mark.parametrize(("model", "stream"), KINDS)
def test_a_run_under_way_is_joined_and_told_from_its_beginning(
    server: Server, up: Upstream, model: str, stream: bool
) -> None:
    up.delay, up.token_delay = (0.0, 0.15) if stream else (1.0, 0.0)
    asked = body(f"joined {model} {stream}", model, stream=stream)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, asked, f"joined-{model}-{stream}")
        eventually("the upstream is asked", lambda: up.in_flight == 1)
        time.sleep(0.4)  # Some of it has left by now.
        rest = [pool.submit(ask, server, asked, f"joined-{model}-{stream}") for _ in range(3)]
        answers = [future.result(PATIENCE) for future in [first, *rest]]
    assert len(up.requests) == 1
    assert len({id_of(answer) for answer in answers}) == 1
    assert len({content(answer) for answer in answers}) == 1
    assert content(answers[0]).startswith("This is answer number")


def test_without_a_key_equal_requests_are_runs_of_their_own(server: Server, up: Upstream) -> None:
    answers = [ask(server, body("each its own"), None) for _ in range(2)]
    assert id_of(answers[0]) != id_of(answers[1])
    assert len(up.requests) == 2


def test_progress_is_told_to_each_who_joins(server: Server, up: Upstream) -> None:
    up.delay = 0.8
    asked = body("progress", "self-consistency", stream=True)
    asked["asmodel"] = {"cache": "off", "params": {"samples": 3}}
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(ask, server, asked, "progress") for _ in range(2)]
        told = [events(future.result(PATIENCE)) for future in futures]
    for chunks in told:
        lines = [c["choices"][0]["delta"].get("reasoning_content") or "" for c in chunks]
        assert any(line.endswith("thought 3/3\n") for line in lines), lines


@pytest.mark.parametrize("state", ["under way", "finished"])
def test_a_key_that_was_used_for_another_request_is_refused(server: Server, up: Upstream, state: str) -> None:
    key = f"reused-{state[0]}"
    up.delay = 0.8 if state == "under way" else 0.0
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, body(f"one {state}"), key)
        eventually("the upstream is asked", lambda: up.requests)
        if state == "finished":
            first.result(PATIENCE)
        answer = ask(server, body(f"two {state}"), key)
    assert (answer.status, answer.error["code"]) == (400, "idempotency_key_reused")
    assert answer.error["param"] == "Idempotency-Key"
    assert answer.headers["x-should-retry"] == "false"
    assert first.result(PATIENCE).status == 200
    assert len(up.requests) == 1


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_has_one_to_255_characters(server: Server, up: Upstream, key: str) -> None:
    answer = ask(server, body("key"), key)
    assert (answer.status, answer.error["param"]) == (400, "Idempotency-Key")
    assert up.requests == []


def test_a_key_is_its_callers_own(server: Server, up: Upstream) -> None:
    anns, bobs = ask(server, body("whose"), "mine", "ann"), ask(server, body("whose"), "mine", "bob")
    assert id_of(anns) != id_of(bobs)
    assert content(anns) != content(bobs)
    # Nor does it say to one of them that the other has used it, or for what.
    assert ask(server, body("something else"), "anns-only", "ann").status == 200
    assert ask(server, body("of bob"), "anns-only", "bob").status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["plain", "default"])
def test_a_run_that_failed_is_forgotten(server: Server, up: Upstream, model: str, stream: bool) -> None:
    answers: list[ServerAnswer] = [Fault(status=503), Fault(after=2, answer="a b c d e f"), "At last."]
    up.says = lambda body: answers.pop(0)
    asked = body(f"failed {model} {stream}", model, stream=stream)
    key = f"failed-{model}-{stream}"
    assert ask(server, asked, key).status == 503
    if stream:
        up.token_delay = 0.05
        assert b'"code":"upstream_broken"' in ask(server, asked, key).body
    else:
        answers.pop(0)
    for _ in range(2):
        assert content(ask(server, asked, key)) == "At last."
    assert len(up.requests) == (3 if stream else 2)


def test_all_who_wait_for_a_run_that_fails_are_told(server: Server, up: Upstream) -> None:
    up.says = lambda body: Fault(delay=0.6, status=400, code="content_filter")
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(ask, server, body("all told"), "all-told") for _ in range(3)]
        answers = [future.result(PATIENCE) for future in futures]
    assert {(a.status, a.error["code"]) for a in answers} == {(400, "content_filter")}
    assert len(up.requests) == 1


def test_an_answer_is_kept_for_a_while_and_no_longer(server: Server, up: Upstream) -> None:
    first = ask(server, body("for a while"), "for-a-while")
    time.sleep(KEEP + 0.5)
    assert id_of(ask(server, body("for a while"), "for-a-while")) != id_of(first)


# ---- clients that leave ----


@pytest.mark.parametrize(("model", "stream"), KINDS)
def test_a_client_that_left_comes_back_to_its_run(server: Server, up: Upstream, model: str, stream: bool) -> None:
    up.token_delay, up.delay = 0.1, 0.5
    asked = body(f"back {model} {stream}", model, stream=stream)
    key = f"back-{model}-{stream}"
    leaver = Leaver(server, asked, key)
    eventually("the upstream is asked", lambda: up.in_flight == 1)
    time.sleep(0.7 if stream else 0.2)
    leaver.leave()
    time.sleep(0.3)
    assert content(ask(server, asked, key)).startswith("This is answer number")
    assert len(up.requests) == 1
    assert up.requests[0].left_at is None


def test_a_run_that_nobody_comes_back_to_ends_after_the_grace_time(server: Server, up: Upstream) -> None:
    up.delay = 30.0
    leaver = Leaver(server, body("nobody"), "nobody")
    eventually("the upstream is asked", lambda: up.in_flight == 1)
    leaver.leave()
    left = time.monotonic()
    eventually("it ends", lambda: up.in_flight == 0, 10)
    assert GRACE - 0.2 < time.monotonic() - left < GRACE + 3
    up.delay = 0.0
    assert ask(server, body("nobody"), "nobody").status == 200


def test_one_of_two_who_leaves_takes_nothing_from_the_other(server: Server, up: Upstream) -> None:
    up.delay = GRACE + 1.0
    leaver = Leaver(server, body("two"), "two")
    eventually("the upstream is asked", lambda: up.in_flight == 1)
    with ThreadPoolExecutor() as pool:
        stays = pool.submit(ask, server, body("two"), "two")
        time.sleep(0.3)
        leaver.leave()
        assert stays.result(PATIENCE).status == 200
    assert len(up.requests) == 1


@pytest.mark.parametrize(("model", "stream"), KINDS)
def test_without_a_key_a_client_that_leaves_ends_its_run(
    server: Server, up: Upstream, model: str, stream: bool
) -> None:
    up.delay = 30.0
    leaver = Leaver(server, body(f"ends {model} {stream}", model, stream=stream), None)
    eventually("the upstream is asked", lambda: up.in_flight == 1)
    leaver.leave()
    eventually("it ends", lambda: up.in_flight == 0, 1.0)


def test_a_run_goes_on_for_the_time_of_grace_while_the_server_stops_only_if_someone_listens(
    started: Upstream, up: Upstream, tmp_path: Path
) -> None:
    up.delay = 30.0
    settings = "drain_seconds = 5\n" + upstream(started.base_url) + '[keys]\nann = "anns-key"\n'
    with serving(tmp_path, settings) as server:
        leaver = Leaver(server, body("left behind"), "left-behind")
        eventually("the upstream is asked", lambda: up.in_flight == 1)
        leaver.leave()
        time.sleep(0.2)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 4
        eventually("its call has stopped", lambda: up.in_flight == 0)
        assert "Traceback" not in server.said
        assert "Task" not in server.said


def test_a_stream_that_nobody_reads_does_not_keep_the_server_from_stopping(
    started: Upstream, up: Upstream, tmp_path: Path
) -> None:
    up.says = lambda body: "word " * 400_000
    with serving(tmp_path, "drain_seconds = 1\n" + upstream(started.base_url) + '[keys]\nann = "anns-key"\n') as server:
        deaf = Leaver(server, body("deaf", "default", stream=True), None, room=4096)
        eventually("the upstream is asked", lambda: up.requests)
        time.sleep(1.0)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 15
        deaf.leave()


# ---- those who read slowly ----


def test_a_slow_reader_holds_up_neither_the_run_nor_who_joins_it(server: Server, up: Upstream) -> None:
    up.says = lambda body: "word " * 40_000  # As chunks it is 8 MB, more than all the buffers between here and there.
    asked = body("slow", "default", stream=True)
    slow = Leaver(server, asked, "slow", room=4096)
    eventually("the upstream has sent it all", lambda: up.requests and up.requests[0].answered_at)
    quick = ask(server, asked, "slow")
    assert content(quick) == "word " * 40_000
    # And what the slow one did not read is there for it still.
    said = bytearray()
    while b"data: [DONE]" not in said[-200:]:
        part = slow.socket.recv(1 << 20)
        assert part, "it ended too early"
        said += part
    slow.leave()
    assert said.count(b'"word') + said.count(b'" word') == 40_000
    assert len(up.requests) == 1


# ---- strange ends ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_program_that_cancels_itself_is_an_error_like_any_other(server: Server, stream: bool) -> None:
    answer = ask(server, body("x", "cancels-itself", stream=stream), None)
    assert (answer.status, answer.error["code"]) == (500, "program_error")
    assert '"cancels-itself"' in answer.error["message"]
    assert "Traceback" not in server.said


# ---- the book of runs, by itself ----


@step(temperature=0)
def say(question: str) -> str:
    return question


@program("parrot")
async def parrot(run: Run) -> str:
    """Says what it is told to."""
    return await run(say, run.question)


class Room:
    """A service in this process, whose upstream answers when it is let."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.fails = False
        self.length = 10
        programs: list[Program[Any, Any]] = [parrot]
        self.service = Service(Models(programs, {"default": FunctionUpstream(self._answer, name="default")}))
        self.service.ready.set()

    async def _answer(self, call: Any) -> str:
        await self.open.wait()
        if self.fails:
            raise ValueError("no")
        return "x" * self.length

    async def answering(self, question: str = "hello", **options: Any) -> Answering:
        model = self.service.models.find("parrot")
        assert isinstance(model, ServedProgram)
        from asmodel.calls import Message

        job = await self.service.prepare(model, Asked(messages=(Message("user", question),)))
        return Answering(self.service, job, stream=False, **options)


@pytest.fixture
async def room() -> Room:
    return Room()


async def finished(answering: Answering) -> None:
    with suppress(AsmodelError):
        await answering.task
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_of_what_is_done_only_the_newest_are_kept(room: Room) -> None:
    joined = Joined(most=3)
    for number in range(6):
        answering = await room.answering()
        joined.add("", str(number), b"body", answering)
        await finished(answering)
    assert [number for number in range(6) if joined.find("", str(number), b"body")] == [3, 4, 5]
    await joined.close()


async def test_of_what_is_done_no_more_is_kept_than_there_is_memory_for(room: Room) -> None:
    room.length = 1000
    joined = Joined(most_bytes=20_000)
    for number in range(8):
        answering = await room.answering(str(number))
        joined.add("", str(number), b"x" * 1000, answering)
        await finished(answering)
    kept = [number for number in range(8) if joined.find("", str(number), b"x" * 1000)]
    assert kept == list(range(8 - len(kept), 8))
    assert 3 <= len(kept) <= 6
    room.length = 30_000
    answering = await room.answering("long")
    joined.add("", "long", b"x", answering)
    await finished(answering)
    assert joined.find("", "long", b"x") is None
    await joined.close()


async def test_one_that_runs_is_never_forgotten(room: Room) -> None:
    joined = Joined(most=1)
    room.open.clear()
    running = [await room.answering(str(number)) for number in range(3)]
    for number, answering in enumerate(running):
        joined.add("", str(number), b"body", answering)
    assert [joined.find("", str(number), b"body") for number in range(3)] == running
    room.open.set()
    for answering in running:
        await finished(answering)
    assert [joined.find("", str(number), b"body") for number in range(3)] == [None, None, running[2]]
    await joined.close()


async def test_what_was_told_to_end_is_joined_by_nobody(room: Room) -> None:
    joined = Joined()
    room.open.clear()
    answering = await room.answering()
    joined.add("", "k", b"body", answering)
    ending = asyncio.create_task(answering.end())
    await asyncio.sleep(0)
    assert joined.find("", "k", b"body") is None
    other = await room.answering()
    joined.add("", "k", b"other", other)
    with pytest.raises(InvalidRequest):
        joined.find("", "k", b"body")
    await ending
    assert joined.find("", "k", b"other") is other, "the end of the first does not take the second away"
    with pytest.raises(Draining):
        answering.outcomes()
    await joined.close()


def nothing() -> None:
    """For listeners who only wait."""


async def test_a_run_without_grace_ends_with_its_last_listener(room: Room) -> None:
    room.open.clear()
    answering = await room.answering()
    async with answering.listening(nothing):
        async with answering.listening(nothing):
            await asyncio.sleep(0)
        assert not answering.task.done()
    assert answering.task.cancelled()


async def test_a_run_with_grace_waits_for_the_next_listener(room: Room) -> None:
    room.open.clear()
    answering = await room.answering(grace=0.2)
    async with answering.listening(lambda: None):
        pass
    await asyncio.sleep(0.1)
    async with answering.listening(lambda: None):
        await asyncio.sleep(0.2)
        assert not answering.task.done()
        room.open.set()
        await answering.task
    assert answering.outcomes()[0].answer.text == "x" * 10


async def test_an_error_that_nobody_hears_is_no_warning(room: Room) -> None:
    room.fails = True
    answering = await room.answering()
    await finished(answering)
    with pytest.raises(AsmodelError):
        answering.outcomes()


async def test_a_run_that_is_cancelled_by_none_of_us_is_the_programs_error(room: Room) -> None:
    room.open.clear()
    answering = await room.answering()
    await asyncio.sleep(0)
    answering.task.cancel()
    await asyncio.wait([answering.task])
    with pytest.raises(ProgramError):
        answering.outcomes()


def test_a_thousand_joins_at_once_are_one_purchase(server: Server, up: Upstream) -> None:
    up.delay = 1.0
    statuses: list[int] = []

    def some() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        for _ in range(25):
            headers = {
                "content-type": "application/json",
                "authorization": "Bearer anns-key",
                "idempotency-key": "1000",
            }
            connection.request("POST", "/v1/chat/completions", json.dumps(body("thousand")), headers)
            response = connection.getresponse()
            statuses.append(response.status)
            response.read()
        connection.close()

    threads = [threading.Thread(target=some, daemon=True) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert statuses == [200] * 1000
    assert len(up.requests) == 1
