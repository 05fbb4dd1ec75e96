"""A server that is killed in the middle of a run: its successor goes on where it was."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serving import create, eventually, serving, upstream

from asmodel.testing import Fault, Received, ScriptedServer

STEPS = 10

PROGRAM = f'''
"""Ten steps, each of which needs what the one before it said."""

from asmodel import Run, program, step


@step(model="writer")
def next_link(number: int, before: str) -> str:
    return f"link {{number}} after {{before}}"


@program("chain")
async def chain(run: Run) -> str:
    """Ten links."""
    link = run.question
    for number in range(1, {STEPS}):
        link = await run(next_link, number, link)
    return await run.reply(next_link, {STEPS}, link)
'''


class Upstream(ScriptedServer):
    """Quick, but for one link, which it is slow to give until it is told not to be."""

    def __init__(self) -> None:
        self.slow: int | None = None
        super().__init__(lambda body: f"<{body['messages'][-1]['content'][:12]}>", faults=self._pace, delay=0.01)

    def _pace(self, received: Received) -> Fault | None:
        return Fault(delay=60.0) if self.link(received) == self.slow else None

    @staticmethod
    def link(received: Received) -> int:
        return int(received.body["messages"][-1]["content"].split()[1])

    @property
    def links(self) -> list[int]:
        """The links that were asked for, in order."""
        return [self.link(r) for r in self.requests]


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    server = Upstream()
    with server:
        yield server


@pytest.mark.parametrize(("killed_at", "stream"), [(1, False), (3, True), (5, False), (8, True)])
def test_a_server_killed_at_a_step_is_followed_by_one_that_buys_only_what_is_missing(
    up: Upstream, tmp_path: Path, killed_at: int, stream: bool
) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "chain.py").write_text(PROGRAM)
    settings = 'program_folders = ["programs"]\n' + upstream(up.base_url)
    up.clear()
    up.slow = killed_at
    answers: list[Any] = []

    def ask(port: int) -> None:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=8, timeout=30)
        asked: Any = dict(model="chain", messages=[{"role": "user", "content": "start"}])
        with client:
            if not stream:
                whole = create(client, **asked)  # The SDK's own retries.
                answers.append(whole.model_dump())
                return
            # What has begun to arrive is not asked for again by the SDK; so it is by us.
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(create(client, **asked, stream=True))
            chunks = list(create(client, **asked, stream=True))
            answers.append(chunks[-1].model_dump())

    with serving(tmp_path, settings) as first:
        client = threading.Thread(target=ask, args=(first.port,), daemon=True)
        client.start()
        eventually("the step is asked", lambda: killed_at in up.links)
        time.sleep(0.3 if stream else 0.0)  # So that the stream is open, and its client sees it break.
        first.kill()
    assert up.links == list(range(1, killed_at + 1))
    up.slow = None
    with serving(tmp_path, port=first.port):
        client.join(40)
        assert not client.is_alive()

    # That which was in flight is bought twice, and no other.
    assert Counter(up.links) == Counter(range(1, STEPS + 1)) + Counter([killed_at])

    receipt = answers[0]["asmodel"]
    assert receipt["steps"] == STEPS
    assert receipt["cache_hits"] == killed_at - 1
    assert receipt["upstream_calls"] == STEPS - killed_at + 1


def test_what_was_bought_under_one_program_file_is_kept_when_the_file_changes(up: Upstream, tmp_path: Path) -> None:
    up.clear()
    up.slow = None
    (tmp_path / "programs").mkdir()
    file = tmp_path / "programs" / "chain.py"
    body = {"model": "chain", "messages": [{"role": "user", "content": "edit"}]}
    for text in (PROGRAM, PROGRAM.replace("Ten links.", "Ten links, and a remark.")):
        file.write_text(text)
        with serving(tmp_path, 'program_folders = ["programs"]\n' + upstream(up.base_url)) as server:
            assert server.chat(body).status == 200
    assert len(up.links) == STEPS
