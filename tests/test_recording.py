"""Runs that are recorded, replayed with one thing changed, and tested with nobody to ask."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel
from tests.serving import Server, command, eventually, serving, upstream

from asmodel import Answer, Message, Reply, Run, gather, program, score, step, tool
from asmodel.app import onion
from asmodel.budget import Limits
from asmodel.calls import CachePolicy, Call, Chat, Document, Score, describe
from asmodel.errors import AsmodelError, UpstreamRejected
from asmodel.models import Models, Preset
from asmodel.programs import Program
from asmodel.recording import Recordings, Unrecorded, find, read
from asmodel.replaying import Change, NotRecorded, Replay, replayed, run_again
from asmodel.service import Asked, Service
from asmodel.settings import UpstreamSettings
from asmodel.testing import FunctionUpstream, ScriptedServer
from asmodel_plugins.memory_cache import MemoryCache

PROGRAM = '''
from asmodel import Run, gather, program, step

@step
def fact(paragraph: str, question: str) -> str:
    return f"fact: {paragraph} {question}"

@step
def title(question: str) -> str:
    return f"title: {question}"

@step
def verdict(facts: list[str]) -> str:
    return "verdict: " + " ".join(facts)

@program("tale")
async def tale(run: Run) -> str:
    """Tell a tale."""
    facts = await gather(run(fact, p, run.question) for p in ("one", "two"))
    name = await run(title, run.question)
    judged = await run(verdict, facts)
    return f"{name}\\n{judged}\\n"
'''


def said(body: Mapping[str, Any]) -> str:
    text = str(body["messages"][-1]["content"])
    return f"<{text.split(':')[0]} {len(text)}>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "tale.py").write_text(PROGRAM)
    return tmp_path


def settings(server: ScriptedServer, *more: str) -> str:
    return "\n".join(['program_folders = ["programs"]', upstream(server.base_url), *more])


def recorded(folder: Path, server: ScriptedServer, *more: str) -> str:
    """Record one run of the program, and give its id. The cache is gone afterwards."""
    (folder / "asmodel.toml").write_text(settings(server, *more))
    ended = command(folder, "run", "tale", "why?", "--record", "--json")
    assert ended.returncode == 0, ended.stderr
    shutil.rmtree(folder / "cache")
    return str(json.loads(ended.stdout)["run_id"])


def again(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    ended = command(folder, "replay", *arguments, "--json")
    assert ended.returncode == code, ended.stdout + ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def recordings_of(folder: Path) -> Path:
    return folder / "state" / "asmodel" / "recordings"


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_replay_with_nothing_changed_asks_nobody_and_gives_the_same_answer(folder: Path) -> None:
    with ScriptedServer(said) as server:
        run = recorded(folder, server)
        assert len(server.requests) == 4
        told = again(folder, run)
        assert len(server.requests) == 4
        assert told["answer"]["same"]
        assert told["answer"]["replayed"] == told["answer"]["recorded"]
        assert told["steps"] == {"reused": 4, "cached": 0, "bought": 0, "failed": 0}
        assert told["whole"]
        tree = [(row["depth"], row["name"]) for row in told["comparison"]]
        assert Counter(tree) == {
            (0, "program tale"): 1,
            (1, "step fact"): 2,
            (1, "step title"): 1,
            (1, "step verdict"): 1,
        }
        assert all(row["a"] and row["b"] for row in told["comparison"]), "both made the same steps"
        assert int(told["comparison"][0]["a"]["span_id"], 16), "as both are traced"
        assert "byte for byte" in command(folder, "replay", "last").stdout


def test_one_changed_prompt_buys_that_step_and_what_follows_from_it(folder: Path) -> None:
    with ScriptedServer(said) as server:
        run = recorded(folder, server)
        (folder / "shorter.txt").write_text("verdict: briefly, {shown}!\n")
        told = again(folder, run, "--step", "verdict", "--prompt-file", "shorter.txt")
        assert told["steps"] == {"reused": 3, "cached": 0, "bought": 1, "failed": 0}
        (asked,) = server.requests[4:]
        shown = asked.body["messages"][-1]["content"]
        assert shown == "verdict: briefly, verdict: <fact 14> <fact 14>!"
        assert not told["answer"]["same"]

        (folder / "other.txt").write_text("fact: nothing of {shown}")
        told = again(folder, run, "--step", "tale/fact", "--prompt-file", "other.txt")
        assert told["steps"] == {"reused": 1, "cached": 0, "bought": 3, "failed": 0}, "both facts, and the verdict"
        assert len(server.requests) == 8
        told = again(folder, run, "--step", "tale/fact", "--prompt-file", "other.txt")
        assert told["steps"] == {"reused": 1, "cached": 3, "bought": 0, "failed": 0}, "they are in the cache by now"

        drawn = command(folder, "replay", run, "--step", "verdict", "--prompt-file", "shorter.txt").stdout
        assert "3 reused from the recording, 1 from the cache, 0 bought" in drawn
        assert "+<verdict" in drawn
        assert "-<verdict" in drawn


def test_another_upstream_answers_every_step(folder: Path) -> None:
    with ScriptedServer(said) as server, ScriptedServer(lambda body: "other") as other:
        run = recorded(folder, server, upstream(other.base_url, "other"))
        told = again(folder, run, "--upstream", "other")
        assert len(server.requests) == 4
        assert len(other.requests) == 4
        assert told["answer"]["replayed"] == "other\nother\n"
        assert told["steps"]["bought"] == 4


def test_a_run_that_was_not_recorded_says_so_and_how_runs_are(folder: Path) -> None:
    with ScriptedServer(said) as server:
        (folder / "asmodel.toml").write_text(settings(server))
        run = str(json.loads(command(folder, "run", "tale", "why?", "--json").stdout)["run_id"])
        assert not recordings_of(folder).exists()
        for id in (run, "last"):
            ended = command(folder, "replay", id)
            assert ended.returncode == 2
            assert "was not recorded" in ended.stderr
            assert "--record" in ended.stderr
            assert "[recording]" in ended.stderr
            assert "Traceback" not in ended.stderr


def test_a_program_whose_file_has_changed_says_so_by_its_digest(folder: Path) -> None:
    with ScriptedServer(said) as server:
        run = recorded(folder, server)
        (folder / "programs" / "tale.py").write_text(PROGRAM.replace("title: ", "heading: "))
        told = again(folder, run)
        assert told["digest"]["recorded"] != told["digest"]["now"]
        assert told["steps"] == {"reused": 3, "cached": 0, "bought": 1, "failed": 0}, "only the step that shows another"
        assert "file has changed since" in command(folder, "replay", run).stdout


def test_a_step_that_there_is_not_is_an_error_with_the_nearest_name(folder: Path) -> None:
    with ScriptedServer(said) as server:
        run = recorded(folder, server)
        (folder / "p.txt").write_text("x")
        ended = command(folder, "replay", run, "--step", "verdikt", "--prompt-file", "p.txt")
        assert ended.returncode == 2
        assert 'did you mean "verdict"?' in ended.stderr
        assert "belong together" in command(folder, "replay", run, "--step", "verdict").stderr


def test_a_recording_survives_kill_9_up_to_its_last_finished_step(folder: Path) -> None:
    async def answer(body: Mapping[str, Any]) -> str:
        if said(body).startswith("<verdict") and not let:
            await asyncio.sleep(60)
        return said(body)

    let = False
    with ScriptedServer(answer) as server:
        with serving(folder, settings(server, "[recording]", "on = true")) as asmodel:
            asking = asyncio.run(_asked_and_killed(asmodel, server))
        assert asking == 4
        let = True
        shutil.rmtree(folder / "cache")
        recording = read(find(recordings_of(folder), "last"))
        assert sorted(s.step for s in recording.steps) == ["fact", "fact", "title"]
        assert not recording.whole
        told = again(folder, "last")
        assert told["steps"] == {"reused": 3, "cached": 0, "bought": 1, "failed": 0}
        assert told["answer"]["replayed"] == "<title 11>\n<verdict 28>\n"


async def _asked_and_killed(asmodel: Server, server: ScriptedServer) -> int:
    body = {"model": "tale", "messages": [{"role": "user", "content": "why?"}]}

    def ask() -> None:
        with pytest.raises(OSError):  # noqa: PT011  # of whatever kind: the server is killed meanwhile
            asmodel.chat(body)

    asked = asyncio.create_task(asyncio.to_thread(ask))
    await asyncio.to_thread(eventually, "the verdict is asked for", lambda: len(server.requests) == 4)
    asmodel.kill()
    await asked
    return len(server.requests)


REDACTOR = """
def hide(kind: str, text: str) -> str:
    return text.replace("Alice", "NAME")
"""


def test_a_redacted_recording_holds_nothing_of_what_was_hidden_and_can_be_replayed(folder: Path) -> None:
    (folder / "hiding.py").write_text(REDACTOR)
    more = ("[traces]", 'redact = "hiding:hide"', "[recording]", "on = true")
    env = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    with ScriptedServer(lambda body: f"said {body['messages'][-1]['content']}") as server:
        (folder / "asmodel.toml").write_text(settings(server, *more))
        ended = command(folder, "run", "tale", "why, Alice?", "--json", env=env)
        assert "Alice" in json.loads(ended.stdout)["answer"]
        shutil.rmtree(folder / "cache")
        written = find(recordings_of(folder), "last").read_text()
        assert "Alice" not in written
        assert "why, NAME?" in written
        told = json.loads(command(folder, "replay", "last", "--json", env=env).stdout)
        assert told["redacted"]
        assert told["steps"]["bought"] == 0
        assert told["answer"]["same"]
        assert len(server.requests) == 4


# --- in this process ------------------------------------------------------------------------------------------------

Body = Callable[[Run], Awaitable[Any]]


def made(body: Body, name: str = "made") -> Program[Any, Any]:
    async def function(run: Run) -> str:
        text: str = await body(run)
        return text

    return program(name)(function)


@step
def ask(text: str) -> str:
    return text


def echo(call: Call) -> str:
    assert isinstance(call, Chat)
    return f"<{call.messages[-1].text} {call.draw}>"


class Bench:
    """A service that records, of one upstream that counts what it is asked."""

    def __init__(
        self, folder: Path, *programs: Program[Any, Any], answer: Callable[[Call], Any] = echo, **more: Any
    ) -> None:
        self.up = FunctionUpstream(answer, name="up")
        self.folder = folder / "recordings"
        self.store = MemoryCache()
        self.recordings = Recordings(self.folder, **more)
        wrapped = onion({"default": self.up}, {"default": UpstreamSettings(kind="function")}, self.store)
        self.models = Models(programs, wrapped, store=self.store, witness=self.recordings)
        self.service = Service(self.models, store=self.store, journals=self.store, recordings=self.recordings)
        self.service.ready.set()
        self.program = programs[0]

    async def run(self, question: str = "q", *, model: str = "", choices: int = 1, **more: Any) -> Path:
        """Ask and record; gives the file, and what was answered is in `answers`."""
        asked = Asked(messages=(Message("user", question),), n=choices, **more)
        job = await self.service.prepare(self.models.find(model or self.program.name), asked)
        self.answers: list[Any] = []
        for choice in range(choices):
            try:
                self.answers.append((await self.service.answer(job, choice)).answer)
            except AsmodelError as error:
                self.answers.append(error)
        self.asked = len(self.up.calls)
        return self.folder / f"{job.id}.jsonl"

    async def replay(self, file: Path, **more: Any) -> Replay:
        return await run_again(self.models, read(file), store=more.pop("store", None), **more)

    @property
    def bought(self) -> int:
        """Calls since the run was recorded."""
        return len(self.up.calls) - self.asked


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    return lambda *programs, **more: Bench(tmp_path, *programs, **more)


Make = Callable[..., Bench]


async def votes(run: Run) -> str:
    return " ".join(await gather(run(ask.using(temperature=1.0), run.question) for _ in range(3)))


async def test_recordings_are_the_owners_alone_whatever_the_umask(bench: Make) -> None:
    b = bench(made(votes))
    b.folder.mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        file = await b.run()
    finally:
        os.umask(before)
    assert stat.S_IMODE(b.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_a_changed_prompt_that_shows_the_same_is_no_change(bench: Make) -> None:
    b = bench(made(votes))
    file = await b.run()
    assert (await b.replay(file, change=Change(step="ask", text="{shown}"))).same
    assert b.bought == 0


async def test_the_draws_of_equal_calls_are_told_apart_and_each_choice_is_recorded(bench: Make) -> None:
    b = bench(made(votes))
    file = await b.run(choices=2)
    assert len({a.text for a in b.answers}) == 2
    for choice in (0, 1):
        done = await b.replay(file, choice=choice)
        assert done.answer == b.answers[choice]
        assert done.same
    assert b.bought == 0


async def test_what_is_not_cached_is_replayed_in_the_order_in_which_it_was_asked(bench: Make) -> None:
    answers = iter("abcdef")

    def answer(_: Call) -> str:
        return next(answers)

    b = bench(made(votes), answer=answer)
    file = await b.run(cache=CachePolicy(mode="off"))
    assert b.answers[0].text == "a b c"
    assert (await b.replay(file)).same
    assert b.bought == 0


class Params(BaseModel):
    tone: str


async def everything(run: Run[Any]) -> Answer:
    texts = [run.params.tone, run.documents[0].text, run.now.isoformat(), str(run.random.random()), run.question]
    replies = await gather(run(ask, text) for text in texts)
    return Answer(text="\n".join(replies), data={"now": run.now.isoformat()})


async def test_params_documents_chance_and_the_time_are_those_of_the_recorded_run(bench: Make) -> None:
    whole = program("whole", params=Params)(everything)
    b = bench(whole)
    file = await b.run(params={"tone": "dry"}, documents=(Document(text="A text."),))
    assert (await b.replay(file)).same
    assert b.bought == 0
    assert (await replayed(whole, file)) == b.answers[0]


def digit(text: str) -> int:
    if not text.isdigit():
        raise ValueError("a digit, please")
    return int(text)


@step(returns=digit)
def number(question: str) -> str:
    return question


async def test_a_step_that_was_asked_again_is_asked_again_in_the_replay(bench: Make) -> None:
    async def body(run: Run) -> str:
        return str(await run(number, "how many?"))

    def answer(call: Call) -> str:
        return "7" if isinstance(call, Chat) and len(call.messages) > 1 else "seven"

    b = bench(made(body), answer=answer)
    file = await b.run()
    assert b.asked == 2
    done = await b.replay(file)
    assert done.same
    assert b.bought == 0
    assert len(done.replaying.made) == 2


async def test_an_upstream_that_failed_fails_again_and_is_asked_again_where_something_is_changed(bench: Make) -> None:
    def answer(call: Call) -> str:
        assert isinstance(call, Chat)
        if "bad" in call.messages[-1].text:
            raise UpstreamRejected("no such thing", code="odd")
        return "fine"

    async def body(run: Run) -> str:
        replies = await gather((run(ask, text) for text in ("good", "bad")), errors="keep")
        return " ".join(reply if isinstance(reply, str) else f"{type(reply).__name__}" for reply in replies)

    b = bench(made(body), answer=answer)
    file = await b.run()
    assert b.answers[0].text == "fine UpstreamRejected"
    assert (await b.replay(file)).same
    assert b.bought == 0
    await b.replay(file, change=Change(step="ask", text="{shown}"))
    assert b.bought == 1


async def test_a_run_that_failed_is_recorded_and_fails_the_same_way(bench: Make) -> None:
    async def body(run: Run) -> str:
        return await run(ask, "x") + await run(ask, "bad")

    def answer(call: Call) -> str:
        assert isinstance(call, Chat)
        if "bad" in call.messages[-1].text:
            raise UpstreamRejected("no such thing")
        return "fine"

    failing = made(body)
    b = bench(failing, answer=answer)
    file = await b.run()
    done = await b.replay(file)
    assert isinstance(done.error, UpstreamRejected)
    assert done.same
    with pytest.raises(UpstreamRejected):
        await replayed(failing, file)


async def test_a_program_that_goes_on_until_its_limit_comes_as_far_as_it_did(bench: Make) -> None:
    async def body(run: Run) -> str:
        texts: list[str] = []
        while run.left.calls:
            texts.append(await run(ask.using(temperature=1.0), "more"))
        return " ".join(texts)

    endless = made(body)
    b = bench(endless)
    file = await b.run(limits=Limits(calls=3))
    assert b.asked == 3
    assert (await b.replay(file)).same
    assert b.bought == 0
    await replayed(endless, file)


async def test_the_steps_of_nested_programs_and_of_those_that_play_roles_are_replayed(bench: Make) -> None:
    async def inner_body(run: Run) -> str:
        return await run.reply(ask.using(temperature=1.0), f"inner {run.question}")

    inner = made(inner_body, "inner")

    async def body(run: Run) -> str:
        return " ".join([await run(inner, "one"), await run(inner, "one"), await run(ask, "outer")])

    outer = made(body, "outer")
    b = bench(outer, inner)
    file = await b.run(model="outer:inner")
    assert b.asked == 3
    done = await b.replay(file)
    assert done.same
    assert b.bought == 0
    assert [(p, s) for p, s, _ in done.replaying.rows] == [("inner", "ask")]
    await b.replay(file, change=Change(step="inner/ask", text="other {shown}"))
    assert b.bought == 3
    assert await replayed(outer, file, programs=[inner]) == b.answers[0]
    with pytest.raises(AssertionError, match='had a model "inner", which is not here; give the programs'):
        await replayed(made(votes_of_outer, "outer"), file)


async def votes_of_outer(run: Run) -> str:
    return await run(ask, "outer")


@tool
def measured(thing: str) -> dict[str, int]:
    """Measure a thing."""
    MEASURED.append(thing)
    return {"length": len(MEASURED)}


MEASURED: list[str] = []
SENT: list[str] = []


@tool(effect=True)
def send_letter(to: str) -> str:
    """Send a letter."""
    SENT.append(to)
    return f"sent {len(SENT)}"


async def letters(run: Run) -> str:
    found = await run(measured, run.question)
    return f"{found['length']} {await run(send_letter, run.question)} {await run(ask, run.question)}"


async def test_what_tools_did_is_taken_from_the_recording_and_no_effect_is_repeated(bench: Make) -> None:
    posting = made(letters)
    MEASURED.clear()
    SENT.clear()
    b = bench(posting)
    file = await b.run("Bob", identity="key-1", body=b"d")
    assert len(SENT) == 1
    assert (await b.replay(file)).same
    await replayed(posting, file)
    assert len(SENT) == len(MEASURED) == 1

    # Where what is to be done is another thing, it is not done at all.
    lines = [line for line in file.read_bytes().splitlines() if b'"send_letter"' not in line]
    file.write_bytes(b"\n".join(lines) + b"\n")
    done = await b.replay(file)
    assert isinstance(done.error, NotRecorded)
    assert 'tool "send_letter" has effects, which a replay does not repeat' in str(done.error)
    assert len(SENT) == 1
    with pytest.raises(AssertionError, match='tool "send_letter" cannot be answered from the recording'):
        await replayed(posting, file)


# --- as a fixture ---------------------------------------------------------------------------------------------------


async def test_a_recorded_run_is_a_fixture_that_needs_nobody_to_answer(bench: Make, tmp_path: Path) -> None:
    voting = made(votes)
    file = await bench(voting).run()
    kept = Path(shutil.copy(file, tmp_path / "fixture.jsonl"))
    answer = await replayed(voting, kept)
    assert answer.text == "<q 0/0> <q 0/1> <q 0/2>"


async def test_a_fixture_names_the_step_that_asks_something_else_and_what_of_it_differs(bench: Make) -> None:
    file = await bench(made(votes)).run()

    async def changed(run: Run) -> str:
        return await run(ask.using(temperature=0.5, max_tokens=9), run.question)

    with pytest.raises(AssertionError) as caught:
        await replayed(made(changed), file)
    told = str(caught.value)
    assert 'step "ask" asks what was not recorded' in told
    assert "it differs in params.temperature, params.max_tokens" in told

    async def other(run: Run) -> str:
        # A program that swallows the error is told of all the same.
        return str(await gather((run(ask.using(temperature=1.0), "another secret") for _ in range(1)), errors="keep"))

    with pytest.raises(AssertionError, match=r"differs in messages\.0") as hidden:
        await replayed(made(other), file)
    assert "another secret" not in str(hidden.value)

    @step
    def unheard_of(text: str) -> str:
        return text

    async def new(run: Run) -> str:
        return await run(unheard_of, "x")

    with pytest.raises(AssertionError, match="there is no such step in the recording; there are ask"):
        await replayed(made(new), file)
    with pytest.raises(AssertionError, match=r'a recording of "made", and not of "other"'):
        await replayed(made(votes, "other"), file)


async def test_a_fixture_whose_answer_is_another_fails_unless_that_is_wanted(bench: Make) -> None:
    file = await bench(made(votes)).run()

    async def louder(run: Run) -> str:
        return (await votes(run)).upper()

    with pytest.raises(AssertionError, match="no longer answers as it was recorded"):
        await replayed(made(louder), file)
    assert (await replayed(made(louder), file, same=False)).text == "<Q 0/0> <Q 0/1> <Q 0/2>"


@score
def likely(context: str, continuation: str) -> tuple[str, str]:
    return context, continuation


async def test_scores_and_replies_with_numbers_come_back_to_the_last_bit(bench: Make) -> None:
    async def body(run: Run) -> str:
        measured = await run(likely, "The sky is", " blue today")
        reply = await run(ask.using().using(temperature=0.0), "x")
        return f"{measured.total!r} {measured.tokens} {reply}"

    scoring = made(body)

    def answer(call: Call) -> float | str:
        return -0.1 / 3 if isinstance(call, Score) else "y"

    b = bench(scoring, answer=answer)
    file = await b.run()
    assert await replayed(scoring, file) == b.answers[0]


async def test_a_recorded_call_reads_back_as_the_call_that_it_was(bench: Make) -> None:
    @step(returns=Reply, tools=[measured])
    def talk(text: str) -> list[Message]:
        picture: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:,x"}}
        parts = [{"type": "text", "text": text}, picture]
        return [Message("system", "s"), Message("user", parts, name="n", extra={"odd": {"a": [1.0, None]}})]

    async def body(run: Run) -> str:
        return (await run(talk, "t")).text

    b = bench(made(body))
    file = await b.run()
    (only,) = read(file).steps
    assert describe(only.call) == describe(b.up.calls[0])
    assert (await b.replay(file)).same


class Counting(FunctionUpstream):
    """One that counts a token a letter, and how often it was asked to."""

    counted = 0

    async def count(self, text: str) -> int:
        self.counted += 1
        return len(text)


async def test_what_an_upstream_counted_is_not_counted_again(bench: Make) -> None:
    async def body(run: Run) -> str:
        size = await run.size(ask, "four")
        return f"{size.tokens} {size.estimated} {await run(ask, 'x')}"

    sized = made(body)
    b = bench(sized)
    b.up = Counting(echo, name="up")
    b.models.upstreams.update(onion({"default": b.up}, {"default": UpstreamSettings(kind="function")}, b.store))
    file = await b.run()
    assert b.answers[0].text.endswith("False <x 0/0>")
    assert (await b.replay(file)).same
    assert await replayed(sized, file) == b.answers[0]
    assert b.up.counted == 1


async def test_equal_calls_are_reused_whoever_first_paid_for_them(bench: Make) -> None:
    async def body(run: Run) -> str:
        return " ".join(await gather(run(ask.using(temperature=0.0), "same") for _ in range(4)))

    b = bench(made(body))
    for _ in range(2):  # bought and joined; then found in the cache
        file = await b.run()
        assert b.asked == 1
        done = await b.replay(file)
        assert done.same
        assert done.replaying.total("recorded") == 4
        assert b.bought == 0


async def test_a_fixture_knows_presets_and_roles_of_the_settings(bench: Make) -> None:
    class Params(BaseModel):
        tone: str

    async def inner_body(run: Run[Any]) -> str:
        return await run(ask.using(model="teller"), f"{run.params.tone} {run.question}")

    inner = program("inner", params=Params)(inner_body)

    async def body(run: Run) -> str:
        return await run(ask.using(model="writer"), "outer")

    outer = made(body, "outer")
    b = bench(outer, inner)
    b.models = Models(
        [outer, inner],
        b.models.upstreams,
        presets={"careful": Preset(program="inner", params={"tone": "dry"})},
        roles={"writer": "careful"},
        program_roles={"inner": {"teller": "default"}},
        witness=b.recordings,
    )
    b.service.models = b.models
    file = await b.run()
    assert b.answers[0].text.startswith("<dry outer ")
    assert (await b.replay(file)).same
    assert await replayed(outer, file, programs=[inner]) == b.answers[0]


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_the_oldest_recordings_go_when_there_are_too_many(bench: Make) -> None:
    b = bench(made(votes), runs=3)
    files = [await b.run(f"q{n}") for n in range(5)]
    left = {path for path in files if path.exists()}
    # Room is made when a recording begins, so that one more may be there until the next one.
    assert left in (set(files[-3:]), set(files[-4:]))


async def test_a_recording_that_is_too_large_ends_and_the_run_does_not(bench: Make) -> None:
    b = bench(made(votes), limit=2500)
    file = await b.run()
    assert b.answers[0].text
    recording = read(file)
    assert recording.cut
    assert not recording.whole
    assert file.stat().st_size < 2600


async def test_a_folder_that_cannot_be_written_is_no_reason_not_to_answer(
    bench: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "recordings").write_text("a file")
    b = bench(made(votes))
    file = await b.run()
    assert b.answers[0].text
    await b.run()
    assert caplog.text.count("cannot be recorded") == 1, "one warning, and not one a run"
    with pytest.raises(Unrecorded):
        read(file)


async def test_what_is_no_recording_is_an_error_that_says_so(tmp_path: Path) -> None:
    for text in ("", "{}\n", "[]\n", '{"asked": {"v": 1}}\n', '{"asked": {"v": 99}}\n', "\x00\xff\n", '{"step": 3}\n'):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(Unrecorded):
            read(tmp_path / "x.jsonl")
    with pytest.raises(Unrecorded):
        find(tmp_path, "../x")


async def test_a_line_that_was_being_written_is_left_out(bench: Make) -> None:
    file = await bench(made(votes)).run()
    data = file.read_bytes()
    whole = len(read(file).steps)
    lines = data.splitlines(keepends=True)
    place = max(i for i, line in enumerate(lines) if line.startswith(b'{"step"'))
    file.write_bytes(b"".join(lines[:place]) + lines[place][:100])
    assert len(read(file).steps) == whole - 1


async def test_recording_keeps_the_event_loop_free(bench: Make) -> None:
    async def body(run: Run) -> str:
        return str(len(await gather(run(ask, f"{n}") for n in range(200))))

    b = bench(made(body))
    file = await b.run()
    assert len(read(file).steps) == 200
    assert all(orjson.loads(line) for line in file.read_bytes().splitlines())
    assert (await b.replay(file)).same
