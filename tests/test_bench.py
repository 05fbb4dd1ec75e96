"""The benchmark measures what it says: wrong answers count as errors, rounds are fair, floors are held to."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from tests.bench import bench, report, wire
from tests.bench.chart import drawn, goodness
from tests.bench.load import PLACE, Latency, Order, Result, carry_out, fault_of, percentile
from tests.bench.measuring import Bench, Life, rotated
from tests.bench.peers import PEERS
from tests.bench.processes import (
    LINUX,
    ROOT,
    LoadProcess,
    UpstreamProcess,
    cpu_seconds,
    memory_bytes,
    start,
    stop,
    tree,
)
from tests.bench.profiling import read
from tests.bench.scenarios import CHAIN, FAN, PROGRAMS, SCENARIOS, Floor, Measured, Round, Scenario
from tests.bench.targets import Target, direct
from tests.serving import eventually

from asmodel.folders import load_folder
from asmodel.programs import programs_in
from asmodel.testing import FunctionUpstream, run_program

PAGE = ROOT / "docs" / "performance.md"

# ---- the load counts what is wrong ----

RIGHT = orjson.dumps(wire.completion())
EVENTS = wire.events()
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def chunked(*events: bytes, end: bool = True) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    return CHUNKED + chunks + (b"0\r\n\r\n" if end else b"")


@asynccontextmanager
async def answering(answer: bytes, *, closes: bool = False) -> AsyncGenerator[tuple[int, list[bytes]]]:
    """A server that gives every request the same bytes: its port, and the bodies that it was sent."""
    bodies: list[bytes] = []

    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(cast("asyncio.Task[None]", asyncio.current_task()))
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = re.search(rb"content-length: (\d+)", head)
                assert size is not None
                bodies.append(await reader.readexactly(int(size[1])))
                writer.write(answer)
                if closes:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], bodies
    finally:
        server.close()
        if serving:
            await asyncio.wait(serving, timeout=5)
        await server.wait_closed()


def an_order(port: int, *, stream: bool = False, requests: int = 6, connections: int = 2) -> Order:
    body = orjson.dumps(wire.question("m", stream=stream, unique=PLACE)).decode()
    expect = wire.STREAMED if stream else wire.ANSWER
    return Order(
        port=port, body=body, expect=expect, connections=connections, seconds=5.0, requests=requests, patience=2.0
    )


async def came_of(answer: bytes, *, stream: bool = False, closes: bool = False) -> Result:
    numbers = iter(range(1, 1000))
    async with answering(answer, closes=closes) as (port, _):
        return await carry_out(an_order(port, stream=stream), lambda: next(numbers))


async def test_right_answers_are_counted_with_their_bytes_and_times() -> None:
    result = await came_of(whole(RIGHT))
    assert (result.requests, result.errors) == (6, {})
    assert result.bytes == 6 * len(RIGHT)
    assert 0 < result.first_byte.p50 <= result.latency.p50 <= result.latency.most < 5_000


async def test_a_stream_is_read_to_its_end_and_its_first_token_is_timed() -> None:
    result = await came_of(chunked(*EVENTS), stream=True)
    assert (result.requests, result.errors) == (6, {})
    assert 0 < result.first_token.p50 <= result.latency.p50


async def test_each_request_holds_another_number() -> None:
    numbers = iter(range(1, 1000))
    async with answering(whole(RIGHT)) as (port, bodies):
        await carry_out(an_order(port), lambda: next(numbers))
    assert len(set(bodies)) == len(bodies) == 6
    assert all(PLACE.encode() not in body for body in bodies)


@pytest.mark.parametrize(
    ("answer", "stream", "said"),
    [
        (whole(b'{"error":{"message":"no"}}', b"500 Internal Server Error"), False, "status 500"),
        (whole(b"<html>"), False, "not an answer"),
        (whole(RIGHT.replace(b"proxy", b"Proxy")), False, "another text"),
        (whole(orjson.dumps({"choices": []})), False, "not an answer"),
        (chunked(*EVENTS[:-1]), True, "no [DONE]"),
        (chunked(*EVENTS[:5], EVENTS[-1]), True, "another text"),
        (chunked(*EVENTS, EVENTS[3]), True, "after [DONE]"),
        (chunked(EVENTS[0], b'data: {"error":{"message":"x"}}\n\n', EVENTS[-1]), True, "an error in the stream"),
        (chunked(*EVENTS).replace(b"\r\n\r\n", b"\r\n\r\nnonsense", 1), True, "not HTTP"),
    ],
)
async def test_a_wrong_answer_is_an_error(answer: bytes, stream: bool, said: str) -> None:
    result = await came_of(answer, stream=stream)
    assert result.requests == 0
    assert result.failed > 0
    assert all(said in fault for fault in result.errors)


@pytest.mark.parametrize(
    ("answer", "stream"),
    [(chunked(*EVENTS, end=False), True), (chunked(*EVENTS[:6], end=False), True), (whole(RIGHT)[:-10], False)],
)
async def test_a_cut_answer_is_an_error(answer: bytes, stream: bool) -> None:
    result = await came_of(answer, stream=stream, closes=True)
    assert result.requests == 0
    assert set(result.errors) == {"the connection was cut"}


async def test_a_server_that_keeps_no_connection_is_asked_over_new_ones() -> None:
    closing = whole(RIGHT).replace(b"content-length", b"connection: close\r\ncontent-length", 1)
    result = await came_of(closing, closes=True)
    assert (result.requests, result.errors) == (6, {})


async def test_of_old_http_the_end_of_the_connection_is_the_end_of_the_stream() -> None:
    old = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    assert (await came_of(old + b"".join(EVENTS), stream=True, closes=True)).requests == 6
    assert (await came_of(old + b"".join(EVENTS[:-1]), stream=True, closes=True)).requests == 0


async def test_a_server_that_does_not_answer_is_given_up_on() -> None:
    async with answering(b"") as (port, _):
        began = time.monotonic()
        order = replace(an_order(port, connections=1), seconds=0.1, patience=0.3)
        result = await carry_out(order, lambda: 1)
    assert time.monotonic() - began < 3
    assert result.errors == {"no answer in 0.3 s": 1}


async def test_nobody_there_is_an_error() -> None:
    async with answering(b"") as (port, _):
        pass
    result = await carry_out(an_order(port, connections=1), lambda: 1)
    assert result.failed == 1
    assert "no connection" in next(iter(result.errors))


def test_comments_in_a_stream_are_no_fault() -> None:
    assert fault_of(200, b": waiting\n\n" + b"".join(EVENTS), stream=True, expect=wire.STREAMED) is None


# ---- figures ----

SECONDS = st.floats(min_value=0, max_value=1e6, allow_nan=False)


@given(st.lists(SECONDS, min_size=2, max_size=200))
def test_percentiles_are_those_of_statistics(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    ranked = sorted(values)
    for share in (50, 90, 99):
        assert percentile(ranked, share / 100) == pytest.approx(cuts[share - 1], rel=1e-9, abs=1e-9)
    latency = Latency.of(values)
    assert latency.p50 == pytest.approx(statistics.median(values) * 1000)
    assert latency.mean == pytest.approx(statistics.fmean(values) * 1000)
    assert latency.most == max(values) * 1000


@given(st.integers(1, 5), st.integers(1, 4))
def test_each_target_has_its_turn_in_each_round_and_is_first_as_often_as_any(many: int, times: int) -> None:
    names = [str(n) for n in range(many)]
    orders = [rotated(names, number) for number in range(many * times * 2)]
    assert all(sorted(order) == names for order in orders)
    assert len(set(Counter(order[0] for order in orders).values())) == 1


def a_round(rate: float, p50: float, *, errors: dict[str, int] | None = None, cpu: float | None = None) -> Round:
    latency = Latency(p50=p50, p99=2 * p50)
    requests = round(rate)
    return Round(
        result=Result(
            requests=requests, seconds=1.0, bytes=0, latency=latency, first_byte=latency, first_token=latency,
            errors=errors or {},
        ),
        cpu=cpu,
    )  # fmt: skip


def test_a_ratio_is_taken_within_each_round_so_that_a_slow_round_counts_for_nothing() -> None:
    rounds = {
        "direct": [a_round(1000, 1), a_round(100, 10), a_round(1000, 1)],
        "asmodel": [a_round(500, 2), a_round(50, 20), a_round(500, 2)],
    }
    figures = Measured(Scenario(name="s"), rounds).figures("asmodel")
    assert figures["ratio"] == 0.5
    assert figures["added p50"] == 1


def test_the_cost_of_a_step_is_the_cost_of_a_request_by_its_steps() -> None:
    rounds = {"direct": [a_round(100, 1)], "asmodel": [a_round(100, 5, cpu=0.1)]}
    figures = Measured(Scenario(name="s", shape="program", steps=5, delay=0.05, in_a_row=5), rounds).figures("asmodel")
    assert figures["CPU"] == pytest.approx(1000)
    assert figures["CPU a step"] == pytest.approx(200)
    assert figures["wall"] == pytest.approx(5 / 250)


def measured(value: float, floor: Floor, others: float = 0.3, fault: str = "") -> Measured:
    rounds = {
        "direct": [a_round(1000, 1)],
        "asmodel": [a_round(1000 * value, 1)],
        "litellm": [a_round(1000 * others, 1)],
    }
    wrong = Counter({(fault, "status 500"): 1}) if fault else Counter[tuple[str, str]]()
    return Measured(Scenario(name="passed through", floors=(floor,)), rounds, wrong)


def test_the_table_says_by_how_much_a_floor_is_missed() -> None:
    (row,) = report.rows([measured(0.3, Floor("ratio", 0.4, at_least=True))], None)
    assert row.verdict == "short by 0.100"
    assert row.short
    assert row.others == {"litellm": pytest.approx(0.3)}
    (row,) = report.rows([measured(0.5, Floor("ratio", 0.4, at_least=True))], None)
    assert row.verdict == "met"


def test_a_figure_beside_a_wrong_answer_of_ours_is_broken_and_of_a_peer_is_not() -> None:
    floor = Floor("ratio", 0.4, at_least=True)
    verdicts = [report.rows([measured(0.5, floor, fault=name)], None)[0].verdict for name in ("asmodel", "litellm")]
    assert verdicts == ["broken", "met"]


def test_the_life_of_a_server_has_its_floors_too() -> None:
    life = Life(starts=(0.5, 2.0, 0.6), idle=120.0, after={10_000: 100.0, 20_000: 101.0})
    found = {row.figure: row.verdict for row in report.rows([], life)}
    assert found == {"start to /healthz": "met", "idle memory": "short by 20.0 MB", "memory growth": "met"}


def test_every_floor_is_of_a_figure_that_its_scenario_has() -> None:
    for scenario in SCENARIOS:
        rounds = {"direct": [a_round(10, 1, cpu=0.1)], "asmodel": [a_round(10, 1, cpu=0.1)]}
        assert {floor.figure for floor in scenario.floors} <= Measured(scenario, rounds).figures("asmodel").keys()
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)


# ---- what is kept and drawn ----

ABOUT = {
    "date": "2026-01-01T00:00:00Z", "commit": "abc", "changed": False, "python": "3.11", "system": "Linux x86_64",
    "cpus": 2, "load": [0.1, 0.1, 0.1], "rounds": 5, "seconds": 1.5, "peers": {"litellm": "1.2"},
}  # fmt: skip


def a_line() -> dict[str, object]:
    floors = (Floor("ratio", 0.4, at_least=True), Floor("added p50", 0.5))
    return report.line(ABOUT, [measured(0.3, floors[0]), measured(0.9, floors[1])])


def test_a_line_of_history_holds_what_the_table_says(tmp_path: Path) -> None:
    file = tmp_path / "history.json"
    old, new = {**ABOUT, "parts": [{"name": "key", "median": 1.0, "best": 1.0, "wall": 1.0}]}, a_line()
    for kept in (a_line(), old, new):
        report.append(file, kept)
    newest = report.newest(file)
    assert newest["parts"]["parts"] == old["parts"]
    assert [row.verdict for row in report.rows_of(newest["floors"])] == ["short by 0.100", "met"]


def test_the_chart_shows_what_the_line_holds() -> None:
    rows = report.rows_of(orjson.loads(orjson.dumps(a_line())))
    picture = drawn(rows, "the caption")
    root = ElementTree.fromstring(picture)
    texts = " ".join("".join(element.itertext()) for element in root.iter())
    for words in ("passed through: ratio", "0.300", "≥ 0.400", "passed through: added p50", "litellm", "the caption"):
        assert words in texts
    bars = [element for element in root.iter() if element.get("class") in ("met", "short")]
    assert [bar.get("class") for bar in bars] == ["short", "met"]
    assert goodness(rows[0], 0.4) == 1
    assert goodness(rows[0], 0.3) == pytest.approx(0.75)


def test_the_page_gets_new_tables_and_keeps_its_words() -> None:
    before = "# A\n<!-- floors: from the benchmark -->\nold\n<!-- floors: end -->\nmore\n"
    after = report.on_page(before, {"floors": a_line()})
    assert "old" not in after
    assert "| passed through | ratio | ≥ 0.4 | 0.300 | short by 0.100 | 0.300 |" in after
    assert after.startswith("# A\n")
    assert after.endswith("<!-- floors: end -->\nmore\n")
    assert report.on_page(after, {"floors": a_line()}) == after
    with pytest.raises(ValueError, match="the page needs the lines"):
        report.on_page("# A", {"floors": a_line()})


def test_the_page_of_the_project_has_a_place_for_every_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for block in report.BLOCKS:
        assert f"<!-- {block}: from the benchmark -->" in text
        assert f"<!-- {block}: end -->" in text


def test_the_page_names_only_options_that_there_are() -> None:
    known = {name for option in bench.main.params for name in option.opts}
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`[^`\n]*?(--[a-z-]+)", text)) | set(re.findall(r"bench[^\n]*?(--[a-z-]+)", text))
    assert named <= known | {"--help"}


def test_a_profile_tells_a_functions_own_time_from_that_of_what_it_calls() -> None:
    begun = "<module> (asmodel);serve (asmodel/server.py:9)"
    profile = read(
        [
            f"{begun};answer (/a/proxy/asmodel/chat.py:10);key (asmodel/calls.py:5) 3",
            f"{begun};answer (/a/proxy/asmodel/chat.py:12) 1",
        ]
    )
    assert profile.samples == 4
    assert profile.top(1) == [("key (asmodel/calls.py)", 0.75, 0.75)]
    assert profile.widest() == [("answer (asmodel/chat.py)", 0.25, 1.0), ("key (asmodel/calls.py)", 0.75, 0.75)]


# ---- real processes ----


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Generator[UpstreamProcess]:
    process = UpstreamProcess(tmp_path_factory.mktemp("upstream"))
    yield process
    stop(process.process)


def test_the_upstream_speaks_the_wire(upstream: UpstreamProcess) -> None:
    upstream.told(delay=0, pace=0)
    with OpenAI(base_url=upstream.base_url, api_key="unused", max_retries=0) as client:
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
        assert answer.choices[0].message.content == wire.ANSWER
        chunks = list(
            client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "?"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(texts) == wire.STREAMED
        assert len([text for text in texts if text]) == len(wire.TOKENS) == 16
        assert chunks[-1].usage is not None
        assert client.completions.create(model="m", prompt="?").choices[0].text == wire.ANSWER
        streamed = client.completions.create(model="m", prompt="?", stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == wire.STREAMED
        assert [model.id for model in client.models.list()] == [wire.MODEL]
    assert upstream.told()["calls"] == 4
    assert upstream.told()["calls"] == 0


def test_the_sizes_are_those_that_are_said(upstream: UpstreamProcess) -> None:
    assert 3_900 < len(orjson.dumps(wire.question("m"))) < 4_300
    assert 1_600 < len(RIGHT) < 1_900


def test_the_upstream_is_as_slow_as_it_is_told_and_counts_who_is_there_at_once(
    upstream: UpstreamProcess, tmp_path: Path
) -> None:
    load = LoadProcess(tmp_path)
    try:
        upstream.told(delay=0.05, pace=0)
        order = an_order(upstream.port, requests=16, connections=8)
        result = load.carry_out(order)
        seen = upstream.told(delay=0)
    finally:
        stop(load.process)
    assert (result.requests, result.errors) == (16, {})
    assert result.latency.p50 >= 49
    assert (seen["calls"], seen["most"]) == (16, 8)


def test_rounds_are_interleaved_and_every_target_gets_as_many(upstream: UpstreamProcess, tmp_path: Path) -> None:
    load = LoadProcess(tmp_path)
    other = Target("asmodel", upstream.port, "m", "whole", process=upstream.process)
    told: list[str] = []
    try:
        bench_ = Bench(upstream, load, [direct(upstream), other], rounds=4, seconds=0.05, warm_up=0.01, settle=0.01)
        bench_.tell = lambda what, seconds: told.append(what) if seconds == 0.05 else None
        found = bench_.measure(Scenario(name="s", connections=2))
        streams = bench_.measure(Scenario(name="t", shape="stream"))
    finally:
        stop(load.process)
    assert told[:4] == ["s: direct", "s: asmodel", "s: asmodel", "s: direct"]
    assert {name: len(rounds) for name, rounds in found.rounds.items()} == {"direct": 4, "asmodel": 4}
    assert found.faults == []
    figures = found.figures("asmodel")
    assert 0.1 < figures["ratio"] < 10
    if LINUX:
        assert 0 < figures["CPU"] < 50_000
    assert list(streams.rounds) == ["direct"]  # the other one cannot stream


def test_calls_that_were_not_made_are_a_fault(upstream: UpstreamProcess, tmp_path: Path) -> None:
    load = LoadProcess(tmp_path)
    try:
        # This one answers a "program of five steps" with a single call.
        liar = Target("asmodel", upstream.port, "m", "program", process=upstream.process)
        bench_ = Bench(upstream, load, [direct(upstream), liar], rounds=1, seconds=0.05, warm_up=0.01, settle=0.01)
        found = bench_.measure(Scenario(name="s", shape="program", model="bench-chain", steps=CHAIN))
    finally:
        stop(load.process)
    assert any("asmodel" in fault and "calls of the upstream" in fault for fault in found.faults)


@pytest.mark.skipif(not LINUX, reason="read from /proc")
def test_the_time_of_a_process_is_that_of_its_children_too(tmp_path: Path) -> None:
    burn = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'while True: pass']); time.sleep(60)"
    )
    process = start([sys.executable, "-c", burn], tmp_path, log="log", environment=dict(os.environ))
    try:
        eventually("it has a child", lambda: len(tree(process.pid)) == 2)
        pids = tree(process.pid)
        before = cpu_seconds(pids) or 0.0
        eventually("its child has burned", lambda: (cpu_seconds(pids) or 0.0) > before + 0.1)
        assert (memory_bytes(pids) or 0) > (memory_bytes(pids[:1]) or 0) > 1e6
    finally:
        stop(process)
    eventually("both have ended", lambda: not any(map(_runs, pids)))


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not LINUX, reason="read from /proc")
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_its_children_end_with_it(tmp_path: Path, ended_by: signal.Signals) -> None:
    only = ("--only", "passed through, 50 ms, c=1$", "--seconds", "30")
    command = (sys.executable, str(ROOT / "tests/bench/bench.py"), *only)
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        pids = eventually("all of them run", lambda: len(found := tree(process.pid)) >= 4 and found)
        process.send_signal(ended_by)
        process.wait(20)
        eventually("all of them have ended", lambda: not any(map(_runs, pids)))
    finally:
        stop(process)


ORPHAN = """
import os, time
from tests.bench.processes import dies_with_its_parent

parent, tie = os.getpid(), dies_with_its_parent()
if not os.fork():
    while os.getppid() == parent:
        time.sleep(0.001)
    tie()
    print("it lives on", flush=True)
"""


@pytest.mark.skipif(not LINUX, reason="another system has no such signal")
def test_a_child_whose_parent_was_killed_before_they_were_tied_ends_at_once() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # What it says ends once the parent and the child have both ended.
    said = subprocess.run([sys.executable, "-c", ORPHAN], env=environment, capture_output=True, timeout=20, check=True)
    assert said.stdout == said.stderr == b""


async def test_the_programs_make_the_calls_that_they_are_measured_by(tmp_path: Path) -> None:
    (tmp_path / "bench_programs.py").write_text(PROGRAMS)
    (module,) = load_folder(tmp_path)
    made: dict[str, int] = {}
    for found in programs_in(module):
        upstream = FunctionUpstream(lambda call: wire.ANSWER)
        answer = await run_program(found, wire.QUESTION, upstream=upstream)
        assert answer.text == wire.ANSWER
        made[found.name] = len(upstream.calls)
    assert made == {"bench-chain": CHAIN, "bench-fan": FAN}
    for scenario in SCENARIOS:
        if scenario.shape == "program":
            assert scenario.calls == (0 if scenario.cached else made[scenario.model])


def test_the_command_lists_its_scenarios_and_refuses_what_matches_none() -> None:
    run = CliRunner().invoke(bench.main, ["--list"])
    assert run.exit_code == 0
    for scenario in SCENARIOS:
        assert scenario.name in run.output
    run = CliRunner().invoke(bench.main, ["--only", "nothing like this"])
    assert run.exit_code == 2
    assert "--list" in run.output


def test_no_peer_may_be_a_release_that_carried_malware() -> None:
    wanted = [text for peer in PEERS.values() for text in peer.requirements if text.startswith("litellm")]
    assert len(wanted) == 2
    assert all("!=1.82.7" in text and "!=1.82.8" in text for text in wanted)
