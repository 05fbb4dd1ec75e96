"""A real `asmodel serve` in a process of its own, as the tests of the server use it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from openai import OpenAI

COMMAND = (sys.executable, "-m", "asmodel.cli")

PATIENCE = 20.0
"""Seconds that anything may take on a machine that is busy with something else; nothing is measured by it."""


def eventually(what: str, done: Any, seconds: float = PATIENCE) -> Any:
    """Wait until `done()` is true, and give what it gave. Fails after `seconds`, saying what did not come about."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.005)
    return found


def create(client: OpenAI, **asked: Any) -> Any:
    """`client.chat.completions.create`, for parameters that are put together and so no overload of it can be told."""
    return cast("Any", client.chat.completions.create)(**asked)


@dataclass(frozen=True)
class Answered:
    """A response as it came, of a request that no SDK would send."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of the envelope; fails unless all of the envelope is there."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert self.headers["content-type"].startswith("application/json")
        assert self.headers["x-request-id"]
        return dict(error)


class Server:
    """One `asmodel serve`, from its start to its end."""

    def __init__(self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = dict(environment)
        """What is set for it besides this process's own environment."""
        self._errors = folder / "stderr.txt"
        self.started_at = time.monotonic()
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", *arguments],
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        self._port: int | None = None

    @property
    def said(self) -> str:
        """All that it has printed so far."""
        return self._errors.read_text()

    @property
    def port(self) -> int:
        """Where it listens, as it says itself."""
        if self._port is None:

            def announced() -> re.Match[str] | None:
                self.check_it_runs()
                return re.search(r" on http://[^ ]+?:(\d+)/v1\n", self.said)

            self._port = int(eventually("the server says where it listens", announced)[1])
        return self._port

    def check_it_runs(self) -> None:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.said}"

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options: Any) -> OpenAI:
        """The official SDK, as anyone has it: only `base_url` differs. It does not ask again unless told to."""
        given: dict[str, Any] = {"base_url": self.base_url, "api_key": "unused", "max_retries": 0, "timeout": 30.0}
        return OpenAI(**(given | options))

    def ask(
        self, method: str, path: str, body: bytes | object = None, headers: Mapping[str, str] | None = None
    ) -> Answered:
        """A request by hand. A body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        try:
            connection.putrequest(method, path, skip_host="host" in sent)
            for name, value in (sent | ({} if data is None else {"content-length": str(len(data))})).items():
                connection.putheader(name, value)
            connection.endheaders(data)
            response = connection.getresponse()
            return Answered(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, body: bytes | object, headers: Mapping[str, str] | None = None) -> Answered:
        return self.ask("POST", "/v1/chat/completions", body, headers)

    def healthy(self) -> bool:
        try:
            return self.ask("GET", "/healthz").status == 200
        except OSError:
            self.check_it_runs()
            return False

    def kill(self) -> None:
        """As a machine that loses its power would: no chance to tidy up."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> int:
        """Tell it to stop, and give its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def listens(port: int) -> bool:
    """Whether anything takes connections there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def environment(folder: Path) -> dict[str, str]:
    """Caches and traces inside of the folder, so that two servers of one folder share them."""
    return {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}


@contextmanager
def serving(
    folder: Path, settings: str = "", *arguments: str, port: int = 0, env: Mapping[str, str] | None = None
) -> Generator[Server]:
    """`asmodel serve` in the folder, answering when the body begins, and ended after it whatever happens.

    `settings` is the text of its `asmodel.toml`; what is there already stays if it is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if settings:
        (folder / "asmodel.toml").write_text(settings)
    server = Server(folder, ["--port", str(port), *arguments], environment(folder) | dict(env or {}))
    try:
        eventually("the server answers", lambda: server.port and server.healthy())
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            try:
                server.process.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def command(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """One `asmodel` command in the folder, to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env={**os.environ, **environment(folder), **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def upstream(base_url: str, name: str = "default", **more: object) -> str:
    """The settings of an upstream that is a scripted server."""
    lines = {"base_url": base_url, "model": "scripted", **more}
    return "\n".join([f"[upstreams.{json.dumps(name)}]", *(f"{k} = {json.dumps(v)}" for k, v in lines.items()), ""])
