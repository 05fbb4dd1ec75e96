"""A run that is followed while it happens in another process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from asmodel.trace_follow import follow
from asmodel.trace_reader import NoSuchTrace, Trace, runs

PROGRAM = """
import sys, time
from pathlib import Path
from asmodel import tracing
from asmodel.calls import Chat, Message, Reply, Usage
call = Chat(identity="m", messages=(Message("user", "hi"),))
reply = Reply(usage=Usage(prompt_tokens=10, completion_tokens=5), cost=0.25)
traces = tracing.configure(local=Path(sys.argv[1]))
for line in sys.stdin:
    with tracing.start_request("POST", "/v1/chat/completions", {}):
        with tracing.run_span("p", digest=None, run_id=line.strip(), nested=False):
            for name in sys.stdin:
                if name == "\\n":
                    break
                with tracing.step_span(name.strip(), program="p", kind="chat", draw=None) as span:
                    with tracing.call_span(
                        call, upstream="u", provider="p", model="gpt", address=None, stream=False
                    ) as c:
                        time.sleep(0.05)
                        tracing.record_reply(c, reply, first_delta=None)
                    tracing.record_step(span, reply, asks=1)
traces.shutdown()
"""


@contextmanager
def program(path: Path) -> Generator[subprocess.Popen[str]]:
    """A process that begins a run for a line, makes a step for each line after it, and ends the run at an empty one."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdin=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], *lines: str) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.flush()


class Following:
    """`follow` in a thread, and what it has printed so far."""

    def __init__(self, path: Path, run_id: str | None, *, terminal: bool = False) -> None:
        self.out = io.StringIO()
        self.trace: Trace | None = None
        console = Console(file=self.out, width=100, force_terminal=terminal, height=40)

        def work() -> None:
            self.trace = follow(path, run_id, console=console, patience=20)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def until(self, said: str) -> None:
        deadline = time.monotonic() + 15
        while said not in self.out.getvalue():
            assert time.monotonic() < deadline, self.out.getvalue()
            time.sleep(0.02)

    def end(self) -> Trace:
        self._thread.join(15)
        assert self.trace is not None, self.out.getvalue()
        return self.trace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "traces.sqlite"


def test_in_a_pipe_a_run_is_told_line_by_line_as_it_happens(path: Path) -> None:
    following = Following(path, None)
    with program(path) as process:
        tell(process, "run_1", "first")
        following.until("step first")
        assert "step second" not in following.out.getvalue()
        tell(process, "second")
        following.until("step second")
        tell(process, "")
        trace = following.end()
    assert [run.run_id for run in trace.runs] == ["run_1"]
    lines = following.out.getvalue().splitlines()
    assert "program p begins" in following.out.getvalue()
    assert "2 steps, 2 model calls, 20 tokens in, 10 out, $0.5000" in lines[-1]
    assert "p ok" in lines[-1]
    assert "\x1b" not in following.out.getvalue()
    order = [next(i for i, line in enumerate(lines) if text in line) for text in ("step first ", "step second ")]
    assert order == sorted(order)


def test_on_a_terminal_the_tree_is_drawn_again_and_stays_in_the_end(path: Path) -> None:
    with program(path) as process:
        tell(process, "run_1", "first")
        deadline = time.monotonic() + 15
        while not runs(path) and time.monotonic() < deadline:
            time.sleep(0.05)
        following = Following(path, "run_1", terminal=True)
        following.until("running")
        tell(process, "second", "")
        following.end()
    last = following.out.getvalue().rpartition("trace ")[2]
    assert "step second" in last
    assert "running" not in last


def test_a_run_that_has_ended_is_told_at_once(path: Path) -> None:
    with program(path) as process:
        tell(process, "run_1", "first", "")
        assert process.stdin is not None
        process.stdin.close()
        process.wait(15)
        process.stdin = None
    following = Following(path, "run_1")
    assert following.end().runs[0].outcome == "ok"
    assert "step first" in following.out.getvalue()


def test_a_run_whose_process_is_killed_is_lost_and_not_waited_for(path: Path) -> None:
    with program(path) as process:
        tell(process, "run_1", "first")
        following = Following(path, None)
        following.until("step first")
        process.kill()
        process.wait(15)
        trace = following.end()
    assert trace.runs[0].outcome == "lost"
    assert "p lost" in following.out.getvalue()


def test_where_nothing_happens_patience_ends(path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(NoSuchTrace, match="none has begun within"):
        follow(path, None, console=Console(file=io.StringIO()), patience=0.3)
    assert time.monotonic() - begun < 5


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
