"""The demo: a program served as a model, on the embedded model, asked by the official OpenAI SDK. No key, no account.

It shows progress and a receipt, the cache, a server killed in mid-run whose client gets its answer all the same, the
trace, and a small measurement against two controls. It stops what it starts.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from asmodel.trace_store import NoSuchTrace, TraceFileUnreadable, runs
from asmodel_programs.evidence_qa import answer_from

HERE = Path(__file__).parent
ASMODEL = [sys.executable, "-m", "asmodel.cli"]
DATA: dict[str, Any] = json.loads((HERE / "questions.json").read_text())

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Server:
    """`asmodel serve` in a process of its own, on one port for its whole life, killed and started at will."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "server.log"

    def start(self) -> float:
        """Start it, and give the seconds until it answers `/healthz`."""
        began = time.monotonic()
        with self.log.open("ab") as log:
            command = [*ASMODEL, "serve", "--port", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=1):
                    return time.monotonic() - began
            except OSError:
                if self.process.poll() is not None or time.monotonic() - began > 60:
                    sys.exit(f"the server did not start:\n{self.log.read_text()}")
                time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()

    def client(self, retries: int = 2) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none-needed", max_retries=retries)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def say(title: str, *lines: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    for line in lines:
        console.print(line, markup=False)


def receipt(told: dict[str, Any]) -> str:
    return (
        f"receipt: {told['upstream_calls']} calls, {told['cache_hits']} of {told['steps']} steps from the cache, "
        f"{told['seconds']:.2f} s, {told['overhead_ms']:.0f} ms of it asmodel's own"
    )


def texts(theme: dict[str, Any]) -> list[str]:
    return [paragraph["text"] for paragraph in theme["paragraphs"]]


def ask(client: OpenAI, question: str, paragraphs: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Ask evidence-qa, streamed: print each line of progress and the answer as they come; give answer and receipt."""
    body = {"asmodel": {"params": {"paragraphs": list(paragraphs)}}}
    stream = client.chat.completions.create(
        model="evidence-qa", messages=[{"role": "user", "content": question}], stream=True, extra_body=body
    )
    answer, begun = "", False
    told: dict[str, Any] = {}
    for chunk in stream:
        told = getattr(chunk, "asmodel", None) or told
        delta = chunk.choices[0].delta
        if line := getattr(delta, "reasoning_content", None):
            console.print(f"  [dim]{line.rstrip()}[/dim]")
        if delta.content:
            if not begun:
                console.print("  answer: ", end="")
            begun = True
            answer += delta.content
            console.print(delta.content, end="", markup=False)
    console.print()
    for citation in told.get("citations", []):
        console.print(f"  from paragraph {citation['id']}: “{citation['text']}”", markup=False)
    console.print(f"  {receipt(told)}", markup=False)
    return answer, told


def killed_in_mid_run(server: Server, traces: Path, question: str, paragraphs: Sequence[str]) -> None:
    """Ask, kill the server once some steps are done, start it again; the client's own retry gets the answer."""
    results: list[Any] = []
    client = server.client(retries=10)

    def asking() -> None:
        body = {"asmodel": {"params": {"paragraphs": list(paragraphs)}}}
        messages: Any = [{"role": "user", "content": question}]
        results.append(client.chat.completions.create(model="evidence-qa", messages=messages, extra_body=body))

    before = {run.span_id for run in _runs(traces)}
    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    began, done = time.monotonic(), 0
    while time.monotonic() - began < 60 and thread.is_alive():
        current = [run for run in _runs(traces) if run.span_id not in before]
        done = current[0].steps if current else 0
        if done >= 3:
            break
        time.sleep(0.01)
    server.kill()
    console.print(
        f"  killed the server (SIGKILL) after {time.monotonic() - began:.1f} s, with {done} steps in its trace"
    )
    seconds = server.start()
    console.print(f"  started it again: it answers after {seconds:.1f} s; the client retries by itself …")
    thread.join(120)
    if not results:
        sys.exit("the client got no answer")
    told = results[0].asmodel
    console.print(f"  answer: {results[0].choices[0].message.content}", markup=False)
    console.print(
        f"  of {told['steps']} steps, {told['cache_hits']} were kept from before the kill, and "
        f"now bought: {told['upstream_calls']}"
    )


def _runs(traces: Path) -> Sequence[Any]:
    try:
        return runs(traces, limit=5)
    except (NoSuchTrace, TraceFileUnreadable):
        return []


# The measurement


def right(reply: str, aliases: Sequence[str]) -> bool:
    """Whether an alias occurs in the reply, as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(alias)}(?!\w)", reply, re.IGNORECASE) for alias in aliases)


def bm25_best(question: str, paragraphs: Sequence[str], k1: float = 1.2, b: float = 0.75) -> int:
    """The place of the paragraph that BM25 ranks first (Robertson and Zaragoza 2009, section 3; tokens `[a-z0-9]+`)."""
    words = [re.findall(r"[a-z0-9]+", p.lower()) for p in paragraphs]
    mean = sum(map(len, words)) / len(words)
    seen = Counter(word for paragraph in words for word in set(paragraph))

    def score(paragraph: list[str]) -> float:
        total = 0.0
        for word in re.findall(r"[a-z0-9]+", question.lower()):
            n, f = seen[word], paragraph.count(word)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            total += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(paragraph) / mean))
        return total

    scores = [score(paragraph) for paragraph in words]
    return scores.index(max(scores))


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p of a paired comparison: ties say nothing, so wins and losses are tosses of a fair coin."""
    n = wins + losses
    tail: float = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / float(2**n)
    return min(1.0, 2 * tail)


@dataclass
class System:
    """One way of answering, and which questions it got right."""

    name: str
    right: list[bool] = field(default_factory=list[bool])
    seconds: float = 0.0


def measure(client: OpenAI) -> None:
    questions: list[dict[str, Any]] = DATA["questions"]
    themes = {theme["name"]: texts(theme) for theme in DATA["themes"]}
    everything = System("plain prompt, all ten")
    lexical = System("BM25's best, same prompt")
    program = System("program evidence-qa")

    def plainly(evidence: Sequence[str], question: str) -> str:
        messages: Any = [{"role": "user", "content": answer_from(evidence, question)}]
        reply = client.chat.completions.create(model="plain", messages=messages, extra_body=dict(answer_from.params))
        return reply.choices[0].message.content or ""

    def by_program(evidence: Sequence[str], question: str) -> str:
        messages: Any = [{"role": "user", "content": question}]
        body = {"asmodel": {"params": {"paragraphs": list(evidence)}}}
        reply = client.chat.completions.create(model="evidence-qa", messages=messages, extra_body=body)
        return reply.choices[0].message.content or ""

    with Progress(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        for item in bar.track(questions, description="20 questions, three ways"):
            paragraphs, question = themes[item["theme"]], item["question"]
            best = [paragraphs[bm25_best(question, paragraphs)]]
            asked: list[tuple[System, Callable[[Sequence[str], str], str], Sequence[str]]] = [
                (everything, plainly, paragraphs),
                (lexical, plainly, best),
                (program, by_program, paragraphs),
            ]
            for system, answer, evidence in asked:
                began = time.monotonic()
                system.right.append(right(answer(evidence, question), item["aliases"]))
                system.seconds += time.monotonic() - began
    report(questions, [everything, lexical, program])


def report(questions: Sequence[dict[str, Any]], systems: Sequence[System]) -> None:
    shared = [item["wording"] == "shared" for item in questions]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("  the same model", no_wrap=True)
    for column in ("right of 20", "shared words", "reworded", "s each"):
        table.add_column(column, justify="right")
    for system in systems:
        counts = (
            sum(system.right),
            sum(r for r, s in zip(system.right, shared, strict=True) if s),
            sum(r for r, s in zip(system.right, shared, strict=True) if not s),
        )
        table.add_row(f"  {system.name}", *map(str, counts), f"{system.seconds / len(questions):.2f}")
    console.print(table)
    program = systems[-1]
    for other in systems[:-1]:
        wins = sum(a and not b for a, b in zip(program.right, other.right, strict=True))
        losses = sum(b and not a for a, b in zip(program.right, other.right, strict=True))
        console.print(
            f"  question by question against “{other.name}”: {wins} won, {losses} lost, "
            f"{len(questions) - wins - losses} alike (exact McNemar p = {mcnemar(wins, losses):.2g})",
            markup=False,
        )
    console.print("  Twenty questions are few: read p before the counts.")


@contextmanager
def folder() -> Generator[Path]:
    """A cache of the demo's own, empty at its start and gone at its end, so that what is shown as bought was bought."""
    with tempfile.TemporaryDirectory(prefix="asmodel-demo-") as name:
        os.environ["ASMODEL_CACHE__PATH"] = str(Path(name) / "cache")
        os.environ.setdefault("ASMODEL_TRACES__PATH", str(Path(name) / "traces.sqlite3"))
        yield Path(name)


def main() -> None:
    began = time.monotonic()
    opening = DATA["opening"]
    paragraphs = texts(opening["theme"])
    with folder() as own:
        traces = Path(os.environ["ASMODEL_TRACES__PATH"])
        say("1  The model", "A 135-million-parameter model that asmodel runs by itself when no upstream is set:")
        if subprocess.run([*ASMODEL, "upstreams"], cwd=own).returncode:
            sys.exit(1)
        server = Server(own, free_port())
        try:
            seconds = server.start()
            say(
                "2  A program, asked as a model",
                f"asmodel serve answers after {seconds:.1f} s. The official OpenAI SDK asks model=“evidence-qa”, with",
                f"ten paragraphs: “{opening['question']['question']}”",
            )
            client = server.client()
            question = opening["question"]["question"]
            _, first = ask(client, question, paragraphs)
            say("3  The same again", "Every step was kept, so nothing is bought:")
            _, again = ask(client, question, paragraphs)
            console.print(
                f"  before {first['seconds']:.2f} s and {first['upstream_calls']} calls · "
                f"now {again['seconds']:.3f} s and {again['upstream_calls']} calls"
            )
            theme = DATA["themes"][0]
            say("4  Killed in mid-run", "A new question; the server is killed while it is being answered:")
            asked = next(q for q in DATA["questions"] if q["theme"] == theme["name"])
            killed_in_mid_run(server, traces, asked["question"], texts(theme))
            say("5  What happened, step by step", "asmodel trace last:")
            subprocess.run([*ASMODEL, "trace", "last"], cwd=own)
            say(
                "6  Was it worth it?",
                "Twenty questions, written before the first run; none is dropped. The model is small: what is compared",
                "are ways of asking it.",
            )
            measure(client)
        finally:
            server.stop()
    say(
        f"Done in {time.monotonic() - began:.0f} s, and all that was started is stopped. Next, a program of yours:",
        "  .venv/bin/asmodel new my-program",
    )


if __name__ == "__main__":
    main()
