"""Where an upstream takes only so many calls at a time, nobody starves: callers take turns, and in each its runs."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.serving import Server, eventually, serving, upstream
from tests.timed import in_time, timed

from asmodel.testing import Fault, Received, ScriptedServer
from asmodel.turns import Turns

SLOTS = 8
CALL = 0.05
"""Seconds that the upstream takes for a call."""

PROGRAMS = '''
from asmodel import Run, gather, program, step


@step(cache=False)
def ask(name: str, number: int) -> str:
    return f"{name} {number}"


@program("fan")
async def fan(run: Run[None]) -> str:
    """As many steps as the question says, all at once."""
    name, count = run.question.split()
    await gather(run(ask, name, n) for n in range(int(count)))
    return "done"


@program("chain")
async def chain(run: Run[None]) -> str:
    """As many steps as the question says, one after another."""
    name, count = run.question.split()
    for n in range(int(count)):
        await run(ask, name, n)
    return "done"


@program("nest")
async def nest(run: Run[None]) -> str:
    """Ten programs at once, each of as many steps at once as the question says."""
    await gather(run(fan.using(), run.question) for _ in range(10))
    return "done"
'''


# The order itself


class Line:
    """Who waits for a turn, and in which order each got it."""

    def __init__(self, slots: int = 1) -> None:
        self.turns = Turns(slots)
        self.got: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def come(self, caller: str, run: str, times: int = 1) -> list[asyncio.Task[None]]:
        tasks = [asyncio.get_running_loop().create_task(self._wait(caller, run)) for _ in range(times)]
        self.tasks += tasks
        return tasks

    async def _wait(self, caller: str, run: str) -> None:
        if not self.turns.take():
            await self.turns.wait(caller, run)
        try:
            self.got.append(f"{caller}{run}")
            await asyncio.sleep(0)
        finally:
            self.turns.give()


async def test_callers_take_turns_whatever_the_number_of_their_runs() -> None:
    line = Line()
    for run in range(100):
        line.come("a", str(run), 3)
    line.come("b", "0", 3)
    await asyncio.gather(*line.tasks)
    assert [n for n, who in enumerate(line.got) if who == "b0"][-1] <= 6
    assert len(line.got) == 303


async def test_in_one_caller_runs_take_turns_and_in_one_run_the_first_to_come_is_first() -> None:
    line = Line()
    line.come("a", "long", 1000)
    line.come("a", "short", 3)
    await asyncio.gather(*line.tasks)
    assert [n for n, who in enumerate(line.got) if who == "ashort"][-1] <= 6
    first, second = line.got.index("along"), line.got.index("ashort")
    assert first < second


async def test_who_comes_again_is_the_last_of_its_run() -> None:
    turns = Turns(1)
    order: list[str] = []

    async def attempts(name: str) -> None:
        for attempt in range(2):
            if not turns.take():
                await turns.wait("", "run")
            order.append(f"{name}{attempt}")
            await asyncio.sleep(0)
            turns.give()

    await asyncio.gather(*(attempts(name) for name in "abc"))
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1"]


@pytest.mark.parametrize("seed", range(20))
async def test_no_slot_is_lost_and_nobody_is_left_whoever_leaves_and_whenever(seed: int) -> None:
    dice = random.Random(seed)
    line = Line(3)
    for _ in range(400):
        line.come(str(dice.randrange(3)), str(dice.randrange(4)))
        if dice.random() < 0.5:
            dice.choice(line.tasks).cancel()
        if dice.random() < 0.3:
            await asyncio.sleep(0)
    await asyncio.gather(*line.tasks, return_exceptions=True)
    assert [line.turns.take() for _ in range(4)] == [True, True, True, False]
    assert not line.turns._callers  # pyright: ignore[reportPrivateUsage]  # that nothing is left is what it is about


async def test_leaving_takes_no_longer_when_many_wait() -> None:
    """From the end of the line, where looking for one's place from the front would take longest."""

    async def seconds(count: int) -> float:
        turns = Turns(1)
        assert turns.take()
        waiting = [asyncio.ensure_future(turns.wait("", "")) for _ in range(count)]
        await asyncio.sleep(0)
        gc.disable()  # It looks at all that is there, which is not what is measured.
        try:
            began = time.process_time()
            for task in reversed(waiting):
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            return time.process_time() - began
        finally:
            gc.enable()

    few, many = await seconds(2_000), await seconds(20_000)
    assert many < 10 * few * 4


# Through the server


@pytest.fixture(scope="module")
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda body: "yes", delay=CALL) as made:
        yield made


@pytest.fixture(scope="module")
def server(up: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fair")
    (folder / "programs").mkdir()
    (folder / "programs" / "fans.py").write_text(PROGRAMS)
    settings = "\n".join(
        [
            '[keys]\nmany = "key-of-many"\none = "key-of-one"',
            upstream(up.base_url, concurrency=SLOTS, retries=2),
        ]
    )
    with serving(folder, settings, "--programs", "programs") as made:
        yield made


@pytest.fixture
def others() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(120) as pool:
        yield pool


def ask(server: Server, model: str, question: str, *, key: str = "one", **more: Any) -> float:
    """How many seconds the answer took."""
    began = time.monotonic()
    body = {"model": model, "messages": [{"role": "user", "content": question}], **more}
    answer = server.chat(body, {"authorization": f"Bearer key-of-{key}"})
    assert answer.status == 200, answer.body
    return time.monotonic() - began


def alone(server: Server, model: str, question: str, **more: Any) -> float:
    return min(ask(server, model, question, **more) for _ in range(3))


def busy(up: ScriptedServer) -> None:
    eventually("the upstream is used to the full", lambda: up.in_flight == SLOTS)


def asked_by(up: ScriptedServer, name: str) -> list[Received]:
    return [r for r in up.requests if r.body["messages"][0]["content"].split()[0] == name]


BOUND = 3.0
"""How many times as long something may take beside a run that uses the upstream to the full: for each of its calls a
slot must come free (an eighth of a call's time on average, all of it at worst), and one turn of each other passes."""
NOISE = 0.3
"""Seconds that the machine may take besides. Without turns it would be two to six seconds."""


def test_a_run_of_a_thousand_steps_at_once_does_not_starve_a_run_of_three(
    server: Server, up: ScriptedServer, others: ThreadPoolExecutor
) -> None:
    unloaded = alone(server, "chain", "short 3")
    up.clear()
    long = others.submit(ask, server, "fan", "long 1000")
    busy(up)
    loaded = ask(server, "chain", "short 3")
    print(f"three steps: {unloaded * 1000:.0f} ms alone, {loaded * 1000:.0f} ms beside a thousand")
    assert not long.done()
    assert loaded < BOUND * unloaded + NOISE
    assert long.result(60) > 1000 / SLOTS * CALL
    assert (len(asked_by(up, "long")), up.max_in_flight) == (1000, SLOTS)


def test_nested_programs_and_choices_share_the_turn_of_their_run(
    server: Server, up: ScriptedServer, others: ThreadPoolExecutor
) -> None:
    unloaded = alone(server, "chain", "short 3")
    up.clear()
    nested = others.submit(ask, server, "nest", "nested 50")
    chosen = others.submit(ask, server, "fan", "chosen 40", n=10)
    busy(up)
    loaded = ask(server, "chain", "short 3")
    print(f"three steps: {unloaded * 1000:.0f} ms alone, {loaded * 1000:.0f} ms beside 10 nested and 10 choices")
    assert not nested.done()
    assert not chosen.done()
    assert loaded < BOUND * unloaded + NOISE
    nested.result(60)
    chosen.result(60)
    # One turn each, though of one there are more calls than of the other.
    both = [name for r in up.requests if (name := r.body["messages"][0]["content"].split()[0]) != "short"]
    middle = both[100:500]
    assert 0.4 < middle.count("nested") / len(middle) < 0.6


@timed
def test_what_is_passed_through_has_a_turn_of_its_own_for_each_request(
    server: Server, up: ScriptedServer, others: ThreadPoolExecutor
) -> None:
    unloaded = alone(server, "default", "single")
    up.clear()
    long = others.submit(ask, server, "fan", "long 600")
    busy(up)
    passed = [others.submit(ask, server, "default", f"single {n}") for n in range(8)]
    slowest = max(one.result(30) for one in passed)
    print(f"passed through: {unloaded * 1000:.0f} ms alone, the slowest of 8 {slowest * 1000:.0f} ms beside 600")
    assert not long.done()
    long.result(60)
    in_time(slowest, BOUND * unloaded + NOISE)  # Eight of them, every other turn.


def test_a_caller_with_a_hundred_runs_does_not_starve_a_caller_with_one(
    server: Server, up: ScriptedServer, others: ThreadPoolExecutor
) -> None:
    unloaded = alone(server, "chain", "short 3")
    up.clear()
    runs = [others.submit(ask, server, "fan", f"many-{n} 10", key="many") for n in range(100)]
    busy(up)
    eventually("they wait in a line", lambda: len(up.requests) > 50)
    loaded = ask(server, "chain", "short 3", key="one")
    print(f"three steps: {unloaded * 1000:.0f} ms alone, {loaded * 1000:.0f} ms beside 100 runs of another caller")
    assert not all(run.done() for run in runs)
    assert loaded < BOUND * unloaded + NOISE
    for run in runs:
        run.result(60)


def test_a_call_that_is_made_again_waits_for_its_turn_again_and_holds_no_slot_meanwhile(
    tmp_path: Path, others: ThreadPoolExecutor
) -> None:
    refused: set[str] = set()

    def faults(request: Received) -> Fault | None:
        text = str(request.body["messages"][0]["content"])
        if text.startswith("refused") and text not in refused:
            refused.add(text)
            return Fault(status=429, headers={"retry-after": "1"}, message="slow down")
        return None

    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "fans.py").write_text(PROGRAMS)
    with (
        ScriptedServer(lambda body: "yes", delay=CALL, faults=faults) as up,
        serving(tmp_path, upstream(up.base_url, concurrency=SLOTS), "--programs", "programs") as server,
    ):
        again = others.submit(ask, server, "fan", f"refused {SLOTS}")
        eventually("all of them were refused", lambda: len(refused) == SLOTS)
        assert ask(server, "chain", "short 3") < 0.9, "nobody is in the way while they pause"
        assert again.result(30) > 1.0
        assert len(asked_by(up, "refused")) == 2 * SLOTS
