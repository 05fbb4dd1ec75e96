"""`asmodel cache` and `asmodel run --plan`, as a person types them; and effects and repeats over HTTP."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving import COMMAND, create, serving, upstream

from asmodel.testing import ScriptedServer
from asmodel_plugins.disk_cache import DiskCache

PROGRAM = '''
"""A book, summed up."""

import time

from asmodel import Run, gather, program, step


@step(model="writer")
def summary(chapter: str) -> str:
    return f"Sum up: {chapter}"


@step(model="writer")
def whole(summaries: list[str]) -> str:
    return "Put together: " + "; ".join(summaries)


@program("book")
async def book(run: Run) -> str:
    """Sum up a book."""
    began = time.time()
    summaries = await gather(run(summary, chapter) for chapter in run.question.split("|"))
    return await run.reply(whole, summaries)
'''

MAILER = '''
"""Sends a letter."""

from pathlib import Path

from asmodel import Run, program, step, tool


@tool(effect=True)
def send(text: str) -> str:
    with Path("world").open("a") as world:
        world.write(text + "\\n")
    return "sent"


@step(model="writer")
def letter(question: str) -> str:
    return question


@program("mailer")
async def mailer(run: Run) -> str:
    """Write a letter and send it."""
    await run(send, run.question)
    return await run.reply(letter, run.question)
'''


@pytest.fixture(scope="module")
def up() -> Iterator[ScriptedServer]:
    def said(body: Any) -> str:
        shown = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        return f"<{shown[-20:]}>"

    with ScriptedServer(said) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, up: ScriptedServer) -> Path:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "book.py").write_text(PROGRAM)
    (tmp_path / "programs" / "mailer.py").write_text(MAILER)
    (tmp_path / "asmodel.toml").write_text('program_folders = ["programs"]\n' + upstream(up.base_url))
    up.clear()
    return tmp_path


def asmodel(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + (done.stderr if code else "")


def test_a_plan_is_printed_and_nothing_is_bought(folder: Path, up: ScriptedServer) -> None:
    told = asmodel(folder, "run", "book", "a|b|c", "--plan")
    assert "book  summary  0 found, 3 to buy" in told
    assert "3 calls to buy, and what follows from that, which is not known yet." in told
    assert up.requests == []
    asmodel(folder, "run", "book", "a|b|c")
    assert "Nothing would be bought" in asmodel(folder, "run", "book", "a|b|c", "--plan")
    plan = json.loads(asmodel(folder, "run", "book", "a|x|c", "--plan", "--json"))
    assert (plan["found"], plan["to_buy"], plan["whole"]) == (2, 1, False)
    assert len(up.requests) == 4


def test_a_run_is_explained_counted_and_thrown_away(folder: Path, up: ScriptedServer) -> None:
    asmodel(folder, "run", "book", "a|b|c")
    asmodel(folder, "run", "book", "a|x|c")
    told = " ".join(asmodel(folder, "cache", "explain").split())
    assert "messages.0 differs (of the nearest answer, bought 20" in told
    assert "4 steps: 2 found, 2 bought" in told
    found: list[dict[str, Any]] = json.loads(asmodel(folder, "cache", "explain", "last", "--json"))
    assert sorted(one["outcome"] for one in found) == ["hit", "hit", "miss", "miss"]
    stats = json.loads(asmodel(folder, "cache", "stats", "--json"))
    assert (stats["entries"], sum(s["hits"] for s in stats["steps"])) == (6, 2)
    assert "6 entries" in asmodel(folder, "cache", "stats")
    assert asmodel(folder, "cache", "clear", "--older-than", "1h") == "0 deleted\n"
    assert asmodel(folder, "cache", "clear", "--step", "whole") == "2 deleted\n"
    assert asmodel(folder, "cache", "clear", "--yes") == "4 deleted\n"
    assert "90s, 15m" in asmodel(folder, "cache", "clear", "--older-than", "soon", code=2)
    assert "no run has an id that begins with" in asmodel(folder, "cache", "explain", "nothing", code=2)


def test_check_names_file_and_line_of_a_clock(folder: Path) -> None:
    told = " ".join(asmodel(folder, "check").split())
    assert 'program "book" reads a clock (time.time); use run.now' in told
    assert "programs/book.py:22: " in told


def test_a_program_with_effects_wants_a_key_and_does_them_once(folder: Path, up: ScriptedServer) -> None:
    with serving(folder) as server:
        body = {"model": "mailer", "messages": [{"role": "user", "content": "hello"}]}
        refused = server.chat(body)
        assert (refused.status, refused.error["param"]) == (400, "Idempotency-Key")
        assert up.requests == []
        with server.client() as client:
            asked: Any = dict(**body, extra_headers={"Idempotency-Key": "one"})
            first = create(client, **asked).choices[0].message.content
    # Another server, which has not seen the run.
    with serving(folder) as server, server.client() as client:
        assert create(client, **asked).choices[0].message.content == first
    assert (folder / "world").read_text() == "hello\n"
    assert asmodel(folder, "run", "mailer", "by hand", "--key", "two").strip() == "<by hand>"
    assert (folder / "world").read_text() == "hello\nby hand\n"


@pytest.mark.parametrize("stream", [False, True])
def test_a_front_end_that_asks_again_gets_another_answer_and_an_sdk_that_retries_the_same(
    folder: Path, up: ScriptedServer, stream: bool
) -> None:
    settings = (folder / "asmodel.toml").read_text() + '\n[programs.book]\nrepeats = "another"\n'
    with serving(folder, settings) as server:

        def ask(**headers: str) -> int:
            before = len(up.requests)
            with server.client() as client:
                asked: Any = dict(model="book", messages=[{"role": "user", "content": "a|b"}], extra_headers=headers)
                if stream:
                    list(create(client, **asked, stream=True))
                else:
                    create(client, **asked)
            return len(up.requests) - before

        assert ask() == 3
        assert ask(**{"x-stainless-retry-count": "1"}) == 0
        assert ask() == 3
        assert ask() == 3
        assert ask(**{"x-stainless-retry-count": "2"}) == 0


async def test_a_journal_on_disk_has_no_limit_and_syncs_each_commit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 2**20)
    for store, level in ((cache, 1), (cache.lasting(), 2)):
        await store.open()
        await store.set("key", b"x" * 2**18, tag="#effects")
        assert await store.get("key") is not None
        assert await store._rows("PRAGMA synchronous", ()) == [(level,)]  # pyright: ignore[reportPrivateUsage]
        await store.close()
    assert (tmp_path / "cache" / "effects" / "store").is_dir()
