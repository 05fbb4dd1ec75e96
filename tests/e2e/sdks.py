"""An official SDK in a process and environment of its own, told by tests what to do; and the upstream behind it all."""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from tests.e2e.environments import Environment
from tests.serving import PATIENCE, Server, eventually

from asmodel.testing import Received, ScriptedServer, ServerAnswer

CLIENTS = Path(__file__).parent / "clients"

Json = dict[str, Any]


Answer: TypeAlias = "ServerAnswer | Callable[[Json], ServerAnswer]"


class Failed(AssertionError):
    """The SDK raised where the test wanted an answer."""


class Sdk:
    """One SDK: a process that does one order after another. `kind` is what its script is told to be."""

    def __init__(self, name: str, environment: Environment, script: str, *kind: str) -> None:
        self.name = name
        self._command = [str(environment.interpreter), str(environment.script(CLIENTS / script)), *kind]
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.version = ""

    @property
    def is_node(self) -> bool:
        return self.name == "node"

    @property
    def can_abort(self) -> bool:
        """A blocking call cannot be given up but by a timeout."""
        return self.name.endswith("async") or self.is_node

    def start(self) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
        self._lines = queue.SimpleQueue()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=own
        )
        threading.Thread(target=self._listen, args=(self._process, self._lines), daemon=True).start()
        self.version = str(self._hear(60.0)["version"])

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait(PATIENCE)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            # What was about to be said to a process that has died is of no interest.
            try:
                pipe.close()
            except BrokenPipeError:
                continue

    @staticmethod
    def _listen(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.put(line)
        except ValueError:
            pass  # Closed under its hands, by `stop`.
        lines.put("")

    def _hear(self, seconds: float) -> Json:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise AssertionError(f"{self.name} has not done within {seconds:g} s what it was told") from None
        if not line:
            self.stop()
            raise AssertionError(f"{self.name} ended; its standard error says why")
        heard: Json = json.loads(line)
        return heard

    def tell(self, do: str, server: Server, ask: Json | None = None, *, retries: bool = False, **order: Any) -> Json:
        """Have it do something, and give what it saw; `error` is in it where the SDK raised.

        The client is as anyone has it, but for what `client` says; only with `retries` does it ask again.
        """
        self.begin(do, server, ask, retries=retries, **order)
        return self._hear(45.0)

    def begin(self, do: str, server: Server, ask: Json | None = None, *, retries: bool = False, **order: Any) -> None:
        """Have it do something, and do not wait."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        client = {"base_url": server.base_url, "api_key": "unused"} | ({} if retries else {"max_retries": 0})
        client |= order.pop("client", {})
        self._process.stdin.write(json.dumps({"do": do, "client": client, "ask": ask, **order}) + "\n")
        self._process.stdin.flush()

    def kill(self) -> float:
        """End it as it is, whatever it is at; when that was."""
        assert self._process is not None
        self._process.kill()
        at = time.monotonic()
        self.stop()
        return at

    def does(self, do: str, server: Server, ask: Json | None = None, **order: Any) -> Json:
        """The same where it should go well."""
        saw = self.tell(do, server, ask, **order)
        if "error" in saw:
            raise Failed(f"{self.name} raised {saw['error']}")
        return saw

    def fails(self, do: str, server: Server, ask: Json | None = None, **order: Any) -> Json:
        """The error that it should raise."""
        saw = self.tell(do, server, ask, **order)
        assert "error" in saw, f"{self.name} raised nothing, and saw {saw}"
        error: Json = saw["error"]
        return {**error, "seconds": saw["seconds"]}


def asking(question: str, model: str = "plain", **more: Any) -> Json:
    """The arguments of the SDKs' `create`."""
    return {"model": model, "messages": [{"role": "user", "content": question}], **more}


_NUMBER = re.compile(r"\bquestion (\d+)\b")


def _words(body: Json) -> str:
    """What was asked, by whichever route."""
    return json.dumps([body[name] for name in ("messages", "prompt", "input") if name in body])


class Script:
    """A scripted upstream that all tests share: questions have numbers, and are answered by them."""

    def __init__(self) -> None:
        self.server = ScriptedServer(self._answer)
        self._numbers = itertools.count(1)
        self._answers: dict[str, list[Answer]] = {}

    def will(self, *answers: Answer) -> str:
        """A question that will be answered so, in this order, the last one for ever; a function gets the body."""
        number = str(next(self._numbers))
        self._answers[number] = list(answers)
        return f"This is question {number}."

    def asked(self, question: str) -> list[Received]:
        """The calls that had the question in them, in order."""
        number = self._number(question)
        return [r for r in self.server.requests if number in _NUMBER.findall(_words(r.body))]

    def left(self, question: str) -> Received:
        """The last call with the question in it, once the upstream has seen that nobody waits for it any more."""

        def gone() -> Received | None:
            calls = self.asked(question)
            return calls[-1] if calls and calls[-1].left_at is not None else None

        found: Received = eventually("the upstream sees that its client has gone", gone)
        return found

    @contextmanager
    def slowly(self, seconds: float) -> Generator[None]:
        """Meanwhile streams take their time between two chunks."""
        self.server.token_delay = seconds
        try:
            yield
        finally:
            self.server.token_delay = 0.0

    @staticmethod
    def _number(text: str) -> str:
        found = _NUMBER.search(text)
        assert found is not None, text
        return found[1]

    def _answer(self, body: Json) -> ServerAnswer:
        answers = self._answers[self._number(_words(body))]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return answer(body) if callable(answer) else answer


def content(chunks: Sequence[Json]) -> str:
    """What a stream has said."""
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def thinking(chunks: Sequence[Json]) -> str:
    return "".join(c["choices"][0]["delta"].get("reasoning_content") or "" for c in chunks if c["choices"])


def attempts(server: Server) -> int:
    """How many chat completions the server has answered, by its own log; nobody else asks it meanwhile."""
    # It logs after it has answered, so what its client has seen may not be logged yet; before the next answer it is.
    assert server.healthy()
    return len(re.findall(r"^\S+ POST /v1/chat/completions ", server.said, re.MULTILINE))


def counted(server: Server, before: int, expected: int) -> None:
    """The server was asked so often, and is asked no more."""
    eventually(f"{expected} attempts", lambda: attempts(server) - before >= expected)
    time.sleep(0.1)
    found = attempts(server) - before
    assert found == expected, f"the server was asked {found} times, not {expected}:\n{server.said[-2000:]}"
