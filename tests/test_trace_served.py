"""Traces of a real server, and the commands that read them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAIError
from tests.collecting import Sink
from tests.serving import COMMAND, Server, command, environment, eventually, serving, upstream

from asmodel import trace_reader, trace_time
from asmodel.testing import Fault, Received, ScriptedServer

PROGRAM = '''
"""A bit of everything that takes time."""

from asmodel import Prompt, Run, gather, program, score, step, tool


@tool
def look_up(word: str) -> dict[str, str]:
    """Look a word up."""
    return {"meaning": "a bell"}


@score
def given(paragraph: str, question: str) -> tuple[str, str]:
    return paragraph, " " + question


@step(returns=int, asks=2)
def count(question: str, of: int) -> str:
    return f"Count {of} in: {question}"


@step(max_tokens=8)
def thought(question: str) -> Prompt:
    return Prompt(question)


@step
def answer(question: str) -> str:
    return f"Answer {question}"


@program("story")
async def story(run: Run) -> str:
    with run.part("paragraphs", of=4):
        await gather(run(given, f"paragraph {n}", run.question) for n in range(4))
    await gather((run(count, run.question, n) for n in range(3)), errors="keep")
    await run(thought, run.question)
    await run(look_up, "bell")
    return await run.reply(answer, run.question)
'''
REDACTING = """
def redact(kind, text):
    return text.replace("SECRET", "(hidden)")
"""
SPAN_ONLY = {"OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY"}


def answers(body: dict[str, Any]) -> str | Fault | None:
    said = json.dumps(body)
    if "Count 0" in said:
        return "none that is a number" if "Please answer again" not in said else "7"
    if "Count 1" in said:
        return Fault(status=400, message="SECRET cannot be counted")
    if "Count 2" in said:
        return "2"
    return "SECRET is the answer" if "messages" in body else None


@contextmanager
def story(folder: Path, up: ScriptedServer, settings: str = "", **env: str) -> Generator[Server]:
    (folder / "programs").mkdir(exist_ok=True)
    (folder / "programs" / "story.py").write_text(PROGRAM)
    (folder / "redacting.py").write_text(REDACTING)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    text = upstream(up.base_url, concurrency=2, retries=2) + "price = { input = 1.0, output = 2.0 }\n" + settings
    with serving(folder, text, "--programs", "programs", env={"PYTHONPATH": path, **env}) as server:
        yield server


def ask(server: Server, question: str, headers: dict[str, str] | None = None, **more: Any) -> int:
    messages = [{"role": "system", "content": "SECRET system"}, {"role": "user", "content": question}]
    return server.chat({"model": "story", "messages": messages, **more}, headers).status


def kept(folder: Path) -> Path:
    return folder / "state" / "asmodel" / "traces.sqlite"


def ended(folder: Path, count: int) -> list[trace_reader.RunRow]:
    """The runs, the oldest first, once so many have ended."""

    def all_ended() -> list[trace_reader.RunRow]:
        rows = trace_reader.runs(kept(folder), 1_000)
        return rows[::-1] if len(rows) >= count and all(row.outcome != "running" for row in rows) else []

    found: list[trace_reader.RunRow] = eventually(f"{count} runs have ended", all_ended)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_with_content_on_everything_is_there_and_redacted(tmp_path: Path, stream: bool) -> None:
    sink = Sink()
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.address, "OTEL_BSP_SCHEDULE_DELAY": "50", **SPAN_ONLY}
    with (
        ScriptedServer(answers) as up,
        story(tmp_path, up, '[traces]\nredact = "redacting:redact"\n', **env) as server,
    ):
        assert ask(server, "SECRET who rang?", stream=stream) == 200
        assert ask(server, "SECRET who rang?", stream=stream) == 200
        rows = ended(tmp_path, 2)
        assert server.stop() == 0
        said = server.said
    sink.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    for data in (written, *sink.bodies, said.encode()):
        assert b"SECRET" not in data
    first, second = (trace_reader.spans(kept(tmp_path), row.run_id or "") for row in rows)
    for trace in (first, second):
        contents: dict[str, str] = {}
        for node in trace_time.walk(trace.roots):
            for name in ("gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.tool.call.result"):
                if name in node.attributes:
                    contents[f"{node.name}: {name}"] = node.attributes[name]
                    json.loads(node.attributes[name])
        assert "(hidden) who rang?" in contents["invoke_workflow story: gen_ai.input.messages"]
        assert "(hidden) is the answer" in contents["invoke_workflow story: gen_ai.output.messages"]
        assert "a bell" in contents["execute_tool look_up: gen_ai.tool.call.result"]
        answered = "chat scripted" if trace is first else "step answer"
        assert "(hidden) is the answer" in contents[f"{answered}: gen_ai.output.messages"], "a hit shows it itself"


def test_only_upstreams_that_may_know_are_told_the_trace(tmp_path: Path) -> None:
    with ScriptedServer(answers) as up:
        for hosts, told in (("[]", False), ('["127.0.0.1"]', True)):
            up.clear()
            folder = tmp_path / str(told)
            folder.mkdir()
            with story(folder, up, f"[traces]\nhosts = {hosts}\n") as server:
                sent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "baggage": "user=x", "tracestate": "a=b"}
                assert ask(server, "Who?", sent) == 200
            with_trace = [r for r in up.requests if r.headers.get("traceparent", "").startswith(f"00-{'ab' * 16}-")]
            assert bool(with_trace) is told
            assert not any("cd" * 8 in r.headers.get("traceparent", "") or "baggage" in r.headers for r in up.requests)


def test_who_may_can_have_a_request_traced_whatever_the_sampler_says(tmp_path: Path) -> None:
    sink = Sink()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink.address,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_TRACES_SAMPLER": "always_off",
    }
    settings = '[keys]\nops = "key-of-ops"\nguest = "key-of-guest"\n[traces]\nforce = ["ops"]\n'
    with ScriptedServer(answers) as up, story(tmp_path, up, settings, **env) as server:
        for key, header in (("key-of-guest", "on"), ("key-of-ops", "off"), ("key-of-ops", "on"), ("wrong", "on")):
            ask(server, "Who?", {"authorization": f"Bearer {key}", "x-asmodel-trace": header})
        assert server.stop() == 0
    sink.close()
    assert sink.names.count("POST /v1/chat/completions") == 1
    assert "invoke_workflow story" in sink.names
    assert len(ended(tmp_path, 3)) == 3, "the local file has them all"


def test_of_a_mixed_load_each_runs_time_is_accounted_for_and_each_ending_is_told(tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def faults(received: Received) -> Fault | None:
        prompt = str(received.body.get("prompt", ""))
        seen[prompt] = seen.get(prompt, 0) + 1
        if prompt.startswith("Retried") and seen[prompt] == 1:
            return Fault(status=429, headers={"retry-after-ms": "100"})
        return None

    with ScriptedServer(answers, faults=faults, delay=0.03) as up, story(tmp_path, up) as server:
        assert ask(server, "Warm up") == 200
        up.clear()
        clients = [
            threading.Thread(target=ask, args=(server, q), daemon=True) for q in ("Shared", "Shared", "Retried", "Own")
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert ask(server, "Shared") == 200
        attempts = len(up.requests)
        assert ask(server, "Limited", asmodel={"limits": {"calls": 3}}) == 422
        assert ask(server, "Late", asmodel={"limits": {"seconds": 0.05}}) == 504
        sdk = server.client(timeout=0.1)
        with pytest.raises(OpenAIError):
            sdk.chat.completions.create(model="story", messages=[{"role": "user", "content": "Leaves"}])
        sdk.close()
        rows = ended(tmp_path, 9)
    assert [row.outcome for row in rows] == [*["ok"] * 6, "error", "error", "cancelled"]
    assert [row.error for row in rows[6:]] == ["limit_exceeded", "deadline_exceeded", None]
    assert sum(row.calls for row in rows[1:6]) == attempts
    spent_on: set[str] = set()
    for row in rows:
        trace = trace_reader.spans(kept(tmp_path), row.run_id or "")
        (request,) = trace.roots
        assert request.kind == "server"
        spans = list(trace_time.walk(trace.roots))
        assert all(node.end_ns is not None for node in spans)
        (run,) = [node for node in spans if node.span_id == row.span_id]
        spent = trace_time.of_node(run, now_ns=trace_time.last(trace))
        assert spent[trace_time.UNKNOWN] + spent[trace_time.REQUEST] <= sum(spent.values()) / 100
        spent_on |= {share.what for share in trace_time.spent(trace)}
    assert {"models", "queueing for an upstream", "pauses before a retry", "another run's call"} <= spent_on


def test_the_commands_list_draw_compare_export_and_follow(tmp_path: Path) -> None:
    with ScriptedServer(answers) as up, story(tmp_path, up, **SPAN_ONLY) as server:
        follower = subprocess.Popen(
            [*COMMAND, "trace", "--follow"],
            cwd=tmp_path,
            env={**os.environ, **environment(tmp_path), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            answered = 0

            def followed() -> bool:
                nonlocal answered
                answered += 1
                assert ask(server, f"Who rang? {answered}") == 200
                return follower.poll() is not None

            eventually("a run has been followed to its end", followed)
            told = follower.communicate(timeout=20)[0]
        finally:
            follower.kill()
        assert ask(server, "Who rang? 1") == 200
        rows = ended(tmp_path, answered + 1)
    assert follower.returncode == 0, told
    assert "step answer" in told
    assert "story ok:" in told
    first, second = rows[0].run_id or "", rows[-1].run_id or ""
    assert "story" in command(tmp_path, "trace").stdout
    assert "program story" in command(tmp_path, "trace", first).stdout
    compared = command(tmp_path, "trace", first, second).stdout
    assert "bought in A, cached in B" in compared
    otlp = json.loads(command(tmp_path, "trace", "last", "--otlp").stdout)
    assert otlp["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "POST /v1/chat/completions"
    assert command(tmp_path, "trace", first, "--html", "run.html").returncode == 0
    page = (tmp_path / "run.html").read_text()
    assert "Who rang? 1" in page
    assert "SECRET is the answer" in page
    wrong = command(tmp_path, "trace", first, second, "--html", "x.html")
    assert wrong.returncode == 2
    assert "take one" in wrong.stderr
    unknown = command(tmp_path, "trace", "nothing", "--html", "x.html")
    assert unknown.returncode == 2
    assert "no run has an id that begins with 'nothing'" in unknown.stderr
