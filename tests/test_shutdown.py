"""`asmodel serve` that is told to stop: what it has begun is finished, or its client told to come again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serving import PATIENCE, Answered, eventually, listens, serving, upstream

from asmodel.testing import ScriptedServer

HELLO: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def in_background(work: Callable[[], Answered]) -> tuple[threading.Thread, list[Answered]]:
    found: list[Answered] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    return thread, found


def test_a_server_that_is_told_to_stop_finishes_what_it_has_begun_and_ends_with_0(
    tmp_path: Path, up: ScriptedServer
) -> None:
    up.delay = 1.0
    with serving(tmp_path, upstream(up.base_url)) as server:
        thread, found = in_background(lambda: server.chat(HELLO))
        eventually("the upstream is asked", lambda: up.in_flight)
        assert server.stop() == 0
        thread.join(PATIENCE)
        assert found[0].status == 200
        assert not listens(server.port)
        assert "Traceback" not in server.said


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(tmp_path: Path, up: ScriptedServer, sent: signal.Signals) -> None:
    with serving(tmp_path, upstream(up.base_url)) as server:
        server.process.send_signal(sent)
        assert server.process.wait(5) == 0
        assert "Traceback" not in server.said


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_end_in_time_is_cut_off_and_its_client_told_to_come_again(
    tmp_path: Path, up: ScriptedServer, stream: bool
) -> None:
    up.delay = 60.0
    with serving(tmp_path, "drain_seconds = 1\n" + upstream(up.base_url)) as server:
        thread, found = in_background(lambda: server.chat({**HELLO, "stream": stream}))
        eventually("the upstream is asked", lambda: up.in_flight)
        if stream:
            time.sleep(1.2)  # The stream is open by then.
        assert server.stop() == 0
        thread.join(PATIENCE)
        eventually("the upstream call stops", lambda: not up.in_flight, 5)
        (answer,) = found
        if stream:
            assert answer.status == 200
            assert b'"code":"draining"' in answer.body.splitlines()[-2]
            assert b"[DONE]" not in answer.body
        else:
            assert (answer.status, answer.error["code"]) == (503, "draining")
            assert answer.headers["x-should-retry"] == "true"
        assert "Traceback" not in server.said


@pytest.mark.parametrize("model", ["plain", "default", "self-consistency"])
def test_a_streamed_response_that_is_cut_off_fails_as_its_sdk_knows_it(tmp_path: Path, model: str) -> None:
    delay = 60.0 if model == "self-consistency" else 0.0
    up = ScriptedServer(lambda body: "word " * 300, delay=delay, token_delay=0.2)
    told: list[Any] = []
    raised: list[openai.APIError] = []

    def listen(client: openai.OpenAI) -> None:
        try:
            told.extend(client.responses.create(model=model, input="hello", stream=True))
        except openai.APIError as error:
            raised.append(error)

    settings = "drain_seconds = 1\n"
    with up, serving(tmp_path, settings + upstream(up.base_url)) as server, server.client() as client:
        thread = threading.Thread(target=listen, args=(client,), daemon=True)
        thread.start()
        eventually("the upstream speaks", lambda: up.in_flight)
        time.sleep(1.2)  # The stream is open by then.
        assert server.stop() == 0
        thread.join(PATIENCE)
        eventually("the upstream call stops", lambda: not up.in_flight, 5)
        assert "Traceback" not in server.said
    (error,) = raised
    assert error.code == "draining"
    assert "stopping" in error.message
    assert told[0].type == "response.created"
    failed = told[-1]
    assert failed.type == "response.failed"
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert (failed.response.id, failed.response.status) == (told[0].response.id, "failed")
    assert failed.response.error.code == "server_error"
    if model != "self-consistency":
        assert failed.response.output[-1].content[0].text.startswith("word word")
        assert failed.response.output[-1].status == "incomplete"
    if model != "default":
        assert failed.response.model_extra["asmodel"]["request_id"]


def test_workers_share_one_port_and_end_together(tmp_path: Path, up: ScriptedServer) -> None:
    with serving(tmp_path, upstream(up.base_url), "--workers", "2") as server:
        assert server.chat(HELLO).status == 200
        assert server.stop() == 0
        assert not listens(server.port)
        assert "Traceback" not in server.said
