"""The local file of runs: what is in it, who may read it, what a kill leaves of it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.timed import in_time, timed

from asmodel import trace_schema, trace_store, tracing
from asmodel.calls import Chat, Message, Reply, Usage
from asmodel.errors import UpstreamRateLimited, UpstreamTimeout
from asmodel.trace_export import Tracing
from asmodel.trace_reader import NoSuchTrace, TraceFileUnreadable, runs, spans
from asmodel.trace_sdk import LocalFeed
from asmodel.trace_spans import Unit

CALL = Chat(identity="m", messages=(Message("user", "hi"),))
REPLY = Reply(usage=Usage(prompt_tokens=10, completion_tokens=5), model="gpt-x", cost=0.25)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "asmodel" / "traces.sqlite"


@contextmanager
def kept(path: Path, *, local_runs: int = 1_000) -> Generator[Tracing]:
    traces = Tracing(local=path, local_runs=local_runs)
    try:
        yield traces
        assert traces.shutdown(), "it is written in time"
    finally:
        traces.shutdown()


def run(run_id: str, work: Callable[[], object] = lambda: None, *, name: str = "evidence-qa") -> None:
    with tracing.run_span(name, digest=None, run_id=run_id, nested=False):
        work()


def step(reply: Reply = REPLY, *, name: str = "verdict", work: Callable[[], object] = lambda: None) -> None:
    with tracing.step_span(name, program="evidence-qa", kind="chat", draw=None) as span:
        if reply.source == "bought":
            with tracing.call_span(CALL, upstream="u", provider="p", model="gpt", address=None, stream=False) as call:
                work()
                tracing.record_reply(call, reply, first_delta=None)
        tracing.record_step(span, reply, asks=1)


def many(count: int, reply: Reply = REPLY, *, name: str = "verdict") -> Callable[[], None]:
    def work() -> None:
        for _ in range(count):
            step(reply, name=name)

    return work


def test_a_run_is_listed_with_what_it_did(path: Path) -> None:
    def work() -> None:
        step()
        step(replace(REPLY, source="hit"))
        step(replace(REPLY, source="joined"))

    before = time.time()
    with kept(path), tracing.start_request("POST", "/v1/chat/completions", {}) as span:
        run("r1", work)
        trace_id = tracing.trace_id(span)
    (row,) = runs(path)
    assert (row.trace_id, row.run_id, row.program, row.outcome, row.error) == (
        trace_id,
        "r1",
        "evidence-qa",
        "ok",
        None,
    )
    assert (row.steps, row.hits, row.joined, row.calls) == (3, 1, 1, 1)
    assert (row.input_tokens, row.output_tokens, row.cost) == (10, 5, 0.25)
    assert before <= row.started <= time.time()
    assert row.seconds is not None
    assert 0 < row.seconds < 5


def test_the_tree_of_a_run_begins_with_its_request(path: Path) -> None:
    with kept(path), tracing.start_request("POST", "/v1/chat/completions", {}):
        run("r1", step)
    names: list[tuple[str, str]] = []
    below = spans(path, "r1").roots
    while below:
        names.append((below[0].name, below[0].kind))
        below = below[0].children
    assert names == [
        ("POST /v1/chat/completions", "server"),
        ("invoke_workflow evidence-qa", "internal"),
        ("step verdict", "internal"),
        ("chat gpt", "client"),
    ]


def test_a_nested_program_is_part_of_the_run_that_asked_for_it(path: Path) -> None:
    def nested() -> None:
        with tracing.run_span("inner", digest=None, run_id="r1", nested=True):
            step()

    with kept(path):
        run("r1", nested, name="outer")
    (row,) = runs(path)
    assert (row.program, row.steps, row.calls) == ("outer", 1, 1)


def test_a_model_that_is_passed_through_is_a_run_too(path: Path) -> None:
    with kept(path), tracing.start_request("POST", "/v1/embeddings", {}) as span:
        with tracing.call_span(CALL, upstream="u", provider="p", model="llama", address=None, stream=False) as call:
            tracing.record_reply(call, replace(REPLY, cost=None), first_delta=None)
        tracing.record_response(span, 200)
    (row,) = runs(path)
    assert (row.program, row.model, row.outcome, row.calls, row.steps) == (None, "llama", "ok", 1, 0)
    assert row.cost is None, "a price that is not known is not 0"
    assert row.name == "llama"


def test_requests_that_run_nothing_are_not_kept(path: Path) -> None:
    with kept(path):
        run("r1")
        for _ in range(5):
            with tracing.start_request("GET", "/v1/models", {}) as span:
                tracing.record_response(span, 404)
    assert [row.run_id for row in runs(path)] == ["r1"]


def test_the_outcome_of_a_run_is_told(path: Path) -> None:
    def failing(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    with kept(path):
        run("fine")
        with pytest.raises(UpstreamTimeout):
            run("failed", failing(UpstreamTimeout("x")))
        with pytest.raises(asyncio.CancelledError):
            run("stopped", failing(asyncio.CancelledError()))
    found = {row.run_id: (row.outcome, row.error) for row in runs(path)}
    assert found == {"fine": ("ok", None), "failed": ("error", "upstream_timeout"), "stopped": ("cancelled", None)}


def test_every_attempt_counts_as_a_call(path: Path) -> None:
    def work() -> None:
        with tracing.call_span(CALL, upstream="u", provider="p", model="m", address=None, stream=False) as span:
            attempts = [tracing.Attempt(1, 2, UpstreamRateLimited("x")), tracing.Attempt(3, 4, None, 0.5)]
            tracing.record_attempts(span, attempts)

    with kept(path):
        run("r1", work)
    (row,) = runs(path)
    assert row.calls == 2


def test_a_run_in_progress_can_be_looked_at(path: Path) -> None:
    with kept(path) as traces, tracing.run_span("p", digest=None, run_id="r1", nested=False):
        step(name="done")
        with tracing.step_span("under_way", program="p", kind="chat", draw=None):
            assert traces.flush()
            (row,) = runs(path)
            assert (row.outcome, row.steps) == ("running", 1)
            (root,) = spans(path, "last").roots
            assert [(c.name, c.end_ns is None) for c in root.children] == [
                ("step done", False),
                ("step under_way", True),
            ]
    assert runs(path)[0].outcome == "ok"


def test_a_hit_knows_the_run_that_paid(path: Path) -> None:
    paid = None
    with kept(path):
        with (
            tracing.run_span("first", digest=None, run_id="payer", nested=False),
            tracing.call_span(CALL, upstream="u", provider="p", model="m", address=None, stream=False) as span,
        ):
            paid = tracing.origin(span)
        run("r2", lambda: step(replace(REPLY, source="hit", origin=paid)))
    found = spans(path, "r2")
    (link,) = found.roots[0].children[0].links
    assert found.payers[link.span_id].run_id == "payer"


def test_a_run_is_found_by_the_beginning_of_its_ids_or_as_the_last(path: Path) -> None:
    with kept(path):
        run("abc-1")
        run("abc-2")
        run("xyz-3")
    last = runs(path)[0]
    assert last.run_id == "xyz-3"
    assert [r.run_id for r in spans(path, "last").runs] == ["xyz-3"]
    assert [r.run_id for r in spans(path, "XYZ").runs] == ["xyz-3"]
    assert [r.run_id for r in spans(path, last.trace_id[:12]).runs] == ["xyz-3"]
    with pytest.raises(NoSuchTrace, match=r"'abc' begins the ids of 2 runs: abc-2 \(evidence-qa\), abc-1"):
        spans(path, "abc")
    with pytest.raises(NoSuchTrace, match="no run has an id that begins with 'nothing'; 3 are kept"):
        spans(path, "nothing")


def test_two_requests_of_one_caller_are_shown_together_by_the_trace_and_apart_by_the_run(path: Path) -> None:
    caller = f"00-{'ab' * 16}-{'cd' * 8}-01"
    with kept(path):
        for run_id in ("r1", "r2"):
            with tracing.start_request("POST", "/v1/x", {"traceparent": caller}):
                run(run_id)
    assert len(spans(path, "abab").roots) == 2
    assert [r.run_id for r in spans(path, "r1").runs] == ["r1"]
    assert len(spans(path, "r1").roots) == 1


def test_no_file_is_no_runs_and_no_file_is_made_by_looking(path: Path) -> None:
    assert runs(path) == []
    with pytest.raises(NoSuchTrace, match="no runs are kept yet"):
        spans(path, "last")
    assert not path.exists()


def test_only_the_user_may_read_it(path: Path) -> None:
    path.parent.parent.mkdir()
    old = os.umask(0)
    try:
        with kept(path) as traces:
            run("r1")
            traces.flush()
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {"traces.sqlite", "traces.sqlite-wal"} <= set(modes)
    assert set(modes.values()) == {0o600}, modes


def test_a_file_that_others_may_read_is_closed_to_them(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch()
    path.chmod(0o644)
    with kept(path):
        run("r1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_no_database_is_set_aside_with_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(TraceFileUnreadable, match=r"traces\.sqlite cannot be read"):
        runs(path)
    with kept(path):
        run("r1")
        run("r2")
    assert len(runs(path)) == 2
    (aside,) = path.parent.glob("*.broken-*")
    assert aside.read_bytes().startswith(b"no database")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "it is now traces.sqlite.broken-" in warning


def test_a_file_of_another_version_is_set_aside(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
        connection.execute("CREATE TABLE runs (other)")
    connection.close()
    with kept(path):
        run("r1")
    assert [row.run_id for row in runs(path)] == ["r1"]


def test_where_no_file_can_be_made_runs_go_on_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with kept(tmp_path / "file" / "traces.sqlite") as traces:
        for number in range(3):
            run(str(number))
            traces.flush()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "cannot be opened" in warning


def test_a_file_that_is_deleted_under_the_writer_is_begun_anew(path: Path) -> None:
    with kept(path) as traces:
        run("r1")
        traces.flush()
        for file in path.parent.glob("traces.sqlite*"):
            file.unlink()
        run("r2")
        traces.flush()
        assert [row.run_id for row in runs(path)] == ["r2"]


def test_only_the_last_runs_are_kept(path: Path) -> None:
    with kept(path, local_runs=50) as traces:
        for number in range(120):
            run(f"r{number}", step)
            if number % 40 == 39:
                traces.flush()
    found = runs(path, limit=1_000)
    assert [row.run_id for row in found] == [f"r{number}" for number in range(119, 69, -1)]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM spans").fetchone() == (150,)
    connection.close()


def test_the_file_keeps_within_its_bytes(path: Path) -> None:
    local = trace_store.LocalTraces(path, max_bytes=2 * 2**20)
    traces = Tracing(processors=[LocalFeed(local)])
    for number in range(60):
        run(f"r{number}", many(30, name="x" * 900))
        local.flush()
    traces.shutdown()
    assert 5 < len(runs(path, limit=1_000)) < 60
    assert runs(path)[0].run_id == "r59"
    assert path.stat().st_size <= 2 * 2**20


def test_of_a_run_with_very_many_spans_all_count_and_the_first_are_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_schema, "MAX_SPANS", 100)
    with kept(path):
        run("r1", many(300, replace(REPLY, source="hit")))
    (row,) = runs(path)
    assert row.steps == 300
    assert row.dropped == 201
    assert len(spans(path, "r1").roots[0].children) == 100


def test_what_finds_the_queue_full_is_dropped_and_counted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _held(path):
        local = trace_store.LocalTraces(path, queue=64)
        traces = Tracing(processors=[LocalFeed(local)])
        run("r1", many(500))
    traces.shutdown()
    assert local.dropped > 0
    assert "spans come faster than" in caplog.text


def test_runs_that_end_while_others_are_written_take_the_place_of_those_that_would_be_forgotten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_store, "TOGETHER", 50)
    local = trace_store.LocalTraces(path, max_runs=200)
    inside = vars(local)
    write: Callable[..., None] = inside["_writer"].write
    ended, waiting = iter(range(3_000)), 0

    def write_while_more_end(units: list[Unit], *, hurried: bool = False) -> None:
        nonlocal waiting
        write(units, hurried=hurried)
        for _, number in zip(range(100), ended, strict=False):
            run(f"r{number}", step)
        waiting = max(waiting, len(inside["_queue"]) + len(inside["_held"]))

    monkeypatch.setattr(inside["_writer"], "write", write_while_more_end)
    traces = Tracing(processors=[LocalFeed(local)])
    for number in range(2_000, 2_500):
        run(f"earlier-{number}", step)
    for _ in range(30):
        assert local.flush()
    assert next(ended, None) is None, "all have ended"
    run("last", step)
    traces.shutdown()
    assert local.dropped == 0
    assert waiting <= 200 + 100 + trace_store.TOGETHER
    kept = [row.run_id for row in runs(path, limit=1_000)]
    assert len(kept) == 200
    assert kept[0] == "last"


@contextmanager
def _held(path: Path) -> Generator[None]:
    """Nobody can open the file."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_texts_that_json_has_trouble_with_are_kept(path: Path) -> None:
    with kept(path), tracing.run_span("p", digest=None, run_id="r1", nested=False) as span:
        span.set_attributes(
            {"half": "\ud800", "big": 2**70, "long": "x" * 100_000, "bytes": b"\xff", "nan": float("nan")}
        )
    (root,) = spans(path, "r1").roots
    found = {name: root.attributes[name] for name in ("half", "big", "nan")}
    assert found == {"half": "?", "big": str(2**70), "nan": None}
    assert len(root.attributes["long"]) == 1_001


@timed
async def test_nothing_is_written_on_the_threads_that_run_programs(path: Path) -> None:
    threads: set[int] = set()

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event == "sqlite3.connect" or (event == "open" and str(args[0]).startswith(str(path.parent))):
            threads.add(threading.get_ident())

    sys.addaudithook(watch)
    traces = Tracing(local=path)
    slowest = 0.0
    for number in range(50):
        begun = time.perf_counter()
        run(f"r{number}", step)
        slowest = max(slowest, time.perf_counter() - begun)
        await asyncio.sleep(0.002)
    assert await asyncio.to_thread(traces.shutdown)
    assert threads
    assert threading.get_ident() not in threads
    assert len(runs(path, 100)) == 50
    in_time(slowest, 0.1)


WRITER = """
import sys, time
from pathlib import Path
from asmodel import tracing
from asmodel.calls import Chat, Message, Reply, Usage
call = Chat(identity="m", messages=(Message("user", "hi"),))
reply = Reply(usage=Usage(prompt_tokens=10, completion_tokens=5), cost=0.25)
path, name, count, hang = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "hang"

def step(wait=0.0):
    with tracing.step_span("verdict", program=name, kind="chat", draw=None) as span:
        with tracing.call_span(call, upstream="u", provider="p", model="m", address=None, stream=False) as c:
            time.sleep(wait)
            tracing.record_reply(c, reply, first_delta=None)
        tracing.record_step(span, reply, asks=1)

traces = tracing.configure(local=path)
for number in range(count):
    with tracing.run_span(name, digest=None, run_id=f"{name}-{number}", nested=False):
        step()
        step()
        if hang:
            print("hanging", flush=True)
            step(60.0)
traces.shutdown()
"""


def writer(path: Path, name: str, count: int, how: str = "end") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count), how], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_server_leaves_its_run_as_lost_with_what_it_had_done(path: Path) -> None:
    process = writer(path, "doomed", 1, "hang")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        deadline = time.monotonic() + 10
        while not runs(path) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        (row,) = runs(path)
        assert row.outcome == "running"
        assert row.seconds is not None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    (row,) = runs(path)
    assert (row.outcome, row.seconds) == ("lost", None)
    assert (row.steps, row.calls, row.input_tokens, row.cost) == (2, 2, 20, 0.5)
    (root,) = spans(path, "doomed").roots
    assert [(child.name, child.end_ns is None) for child in root.children] == [
        ("step verdict", False),
        ("step verdict", False),
        ("step verdict", True),
    ]
    assert [(child.name, child.end_ns) for child in root.children[2].children] == [("chat m", None)]


def test_two_processes_write_to_one_file(path: Path) -> None:
    both = [writer(path, name, 100) for name in ("one", "two")]
    with kept(path):
        run("here", step)
        for process in both:
            process.communicate(timeout=30)
            assert process.returncode == 0
    found = runs(path, limit=1_000)
    assert len(found) == 201
    assert {(row.steps, row.outcome) for row in found if row.run_id != "here"} == {(2, "ok")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_records_nothing_and_its_parent_goes_on(path: Path) -> None:
    with kept(path):
        run("before")
        child = os.fork()
        if child == 0:
            run("in the child")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        run("after")
    assert {row.run_id for row in runs(path)} == {"before", "after"}


def test_a_process_that_is_gone_is_known_from_one_that_has_its_number_now() -> None:
    me = trace_schema.process()
    assert not trace_schema.is_gone(me)
    boot, space, pid, began = me.split(":")
    if began:
        assert trace_schema.is_gone(f"{boot}:{space}:{pid}:{int(began) - 1}"), "another process had the number"
        assert trace_schema.is_gone(f"another-boot:{space}:{pid}:{began}")
        assert not trace_schema.is_gone(f"{boot}:1{space}:{pid}:{began}"), "a container's processes cannot be seen"
    assert trace_schema.is_gone("nonsense")


def test_the_file_is_where_the_users_state_is() -> None:
    at_home = Path.home() / ".local/state/asmodel/traces.sqlite"
    assert trace_schema.default_path({"XDG_STATE_HOME": "/var/state"}) == Path("/var/state/asmodel/traces.sqlite")
    assert trace_schema.default_path({"XDG_STATE_HOME": "relative"}) == at_home
    assert trace_schema.default_path({}) == at_home


def test_a_file_that_is_damaged_under_the_writer_is_set_aside(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_store, "REOPEN_EVERY", 0.0)
    with kept(path) as traces:
        run("r1", many(200))
        traces.flush()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        for number in range(5):
            run(f"after-{number}", many(5))
            traces.flush()
        assert "after-4" in {row.run_id for row in runs(path)}
    assert list(path.parent.glob("*.broken-*"))
    assert "is damaged" in caplog.text
