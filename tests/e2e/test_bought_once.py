"""What an edit costs, and what a cached answer takes: over a real server, counted, timed and explained."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving import Answered, command, eventually, serving, upstream

from asmodel.testing import ScriptedServer

pytestmark = pytest.mark.e2e

CHAPTERS = 20

PROGRAM = '''
"""A long text, chapter by chapter; and five steps of which each needs the one before."""

from asmodel import Run, gather, program, step


@step(model="writer")
def summary(title: str, chapter: str) -> str:
    return f"{title}, to sum up:\\n{chapter}"


@step(model="writer")
def whole(summaries: list[str]) -> str:
    return "Put together:\\n" + "\\n".join(summaries)


@program("book")
async def book(run: Run) -> str:
    """Sum up each chapter, then the book."""
    chapters = run.question.split("\\n\\n")
    return await run.reply(whole, await gather(run(summary, f"Chapter {n}", c) for n, c in enumerate(chapters, 1)))


@step(model="writer")
def next_thought(number: int, before: str) -> str:
    return f"thought {number} after {before}"


@program("thoughts")
async def thoughts(run: Run) -> str:
    """Five thoughts."""
    text = run.question
    for number in range(1, 5):
        text = await run(next_thought, number, text)
    return await run.reply(next_thought, 5, text)
'''


def said(body: dict[str, Any]) -> str:
    """A summary that any word of the chapter changes."""
    text = str(body["messages"][-1]["content"])
    return f"[{text.splitlines()[0]}: {len(text)} characters, {sum(map(ord, text))}]"


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer(said) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, up: ScriptedServer) -> Path:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "book.py").write_text(PROGRAM)
    (tmp_path / "asmodel.toml").write_text('program_folders = ["programs"]\n' + upstream(up.base_url))
    return tmp_path


def text_of(answered: Answered) -> str:
    assert answered.status == 200, answered.body
    return str(answered.json["choices"][0]["message"]["content"])


def test_one_word_of_twenty_chapters_costs_that_chapter_and_what_is_shown_of_it(
    folder: Path, up: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    chapters = [f"In chapter {n} the sea was calm. " + "And so it went on. " * 200 for n in range(1, CHAPTERS + 1)]
    edited = [*chapters]
    edited[6] = edited[6].replace("calm", "rough")

    def body(parts: list[str]) -> dict[str, Any]:
        return {"model": "book", "messages": [{"role": "user", "content": "\n\n".join(parts)}]}

    with serving(folder) as server:
        first = text_of(server.chat(body(chapters)))
        assert len(up.requests) == CHAPTERS + 1
        up.clear()
        assert text_of(server.chat(body(chapters))) == first
        assert up.requests == []
        answer = server.chat(body(edited))
        assert text_of(answer) != first
        bought = [str(received.body["messages"][-1]["content"]).splitlines()[0] for received in up.requests]
        assert bought == ["Chapter 7, to sum up:", "Put together:"]
        receipt = answer.json["asmodel"]
        assert (receipt["steps"], receipt["cache_hits"], receipt["upstream_calls"]) == (CHAPTERS + 1, CHAPTERS - 1, 2)

        def explained() -> list[dict[str, Any]] | None:
            done = command(folder, "cache", "explain", receipt["run_id"], "--json")
            found: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
            return found if len(found) == CHAPTERS + 1 else None

        found = eventually("the run is in the traces", explained)
        told = command(folder, "cache", "explain", receipt["run_id"]).stdout
    with capsys.disabled():
        print(f"\n  {CHAPTERS} chapters, one word changed: {len(bought)} calls bought of {CHAPTERS + 1}\n{told}")
    missed = [(one["step"], one["differs"]) for one in found if one["outcome"] != "hit"]
    assert missed == [("summary", ["messages.0"]), ("whole", ["messages.0"])]
    assert "messages.0 differs" in told
    assert f"{CHAPTERS + 1} steps: {CHAPTERS - 1} found, 2 bought" in told


def test_a_cached_answer_of_five_steps_takes_milliseconds(
    folder: Path, up: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    up.delay = 0.2
    with serving(folder) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)

        def timed(question: str) -> tuple[float, str, int]:
            body = json.dumps({"model": "thoughts", "messages": [{"role": "user", "content": question}]})
            began = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            seconds = time.perf_counter() - began
            assert response.status == 200, data
            answer = json.loads(data)
            return seconds, answer["choices"][0]["message"]["content"], answer["asmodel"]["cache_hits"]

        timed("to warm up")
        fresh, answer, hits = timed("what is new?")
        assert hits == 0
        cached: list[float] = []
        for _ in range(50):
            seconds, again, hits = timed("what is new?")
            assert (again, hits) == (answer, 5)
            cached.append(seconds)
        connection.close()
    assert len(up.requests) == 10
    middle = statistics.median(cached)
    with capsys.disabled():
        print(
            f"\n  five steps of {up.delay * 1000:.0f} ms each: fresh {fresh * 1000:.0f} ms, cached median "
            f"{middle * 1000:.1f} ms, slowest of 50 {max(cached) * 1000:.1f} ms"
        )
    assert fresh > 5 * up.delay
    assert middle < 0.05
