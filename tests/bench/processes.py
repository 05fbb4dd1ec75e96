"""The processes of the benchmark: started, told, measured from outside, and always ended.

CPU time is the kernel's own clock of each process, so it covers every thread and costs the process nothing.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from tests.bench.load import Order, Result

ROOT = Path(__file__).resolve().parent.parent.parent
LINUX = sys.platform == "linux"
PATIENCE = 60.0
"""Seconds that a process may take to start."""


class DidNotStart(RuntimeError):
    """A process ended or said nothing; with its last words."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def own_environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what a person has set for servers, and with folders of its own."""
    theirs = ("ASMODEL_", "OTEL_", "XDG_", "LITELLM_", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(theirs) and not k.endswith("_API_KEY")}
    folders = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CACHE", "STATE", "CONFIG", "DATA")}
    return {**kept, **folders, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", **(more or {})}


@cache
def dies_with_its_parent() -> Callable[[], None] | None:
    """What a child does before it is anyone else, so that the kernel ends it if the benchmark is killed and cannot.

    It is made before there is a child, which may import nothing: another thread may have held the lock.
    """
    if not LINUX:
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    parent = os.getpid()

    def tied() -> None:
        prctl(death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed in between, and that signal will not come any more
            os._exit(1)

    return tied


def start(
    command: Sequence[str | Path], folder: Path, *, log: str, environment: Mapping[str, str], piped: bool = False
) -> subprocess.Popen[bytes]:
    """A process whose words go to a file of the folder; with `piped`, its output can be read and its input written."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE if piped else None
    with (folder / log).open("ab") as words:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT if piped else folder,
            env=dict(environment),
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or words,
            stderr=words,
            preexec_fn=dies_with_its_parent(),
        )


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a process and whatever it started."""
    family = tree(process.pid)
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    if process.poll() is None:
        process.kill()
        process.wait()
    for pid in family[1:]:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


# ---- measured from outside ----


def tree(pid: int) -> list[int]:
    """A process and all that came of it; only itself where the system does not say."""
    children: dict[int, list[int]] = {}
    if LINUX:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    # The name in brackets may hold anything, brackets too.
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    children.setdefault(int(parent), []).append(int(entry.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


def cpu_seconds(pids: Iterable[int]) -> float | None:
    """User and system time so far; None where the system does not say."""
    if not LINUX:
        return None
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            # The clock of another process, as clock_getcpuclockid(3) makes it: to the nanosecond, where
            # /proc/PID/stat has hundredths of a second.
            total += time.clock_gettime((~pid << 3) | 2)
    return total


def memory_bytes(pids: Iterable[int]) -> int | None:
    """Resident memory; None where the system does not say."""
    if not LINUX:
        return None
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


# ---- the upstream and the load ----


class UpstreamProcess:
    """The scripted upstream."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.upstream"]
        self.process = start(command, folder, log="upstream.log", environment=own_environment(folder), piped=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise DidNotStart(f"the upstream: {(folder / 'upstream.log').read_text()[-2000:]}")
        self.port = int(line)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def told(self, **settings: float) -> dict[str, int]:
        """What it has counted since it was told the last time; `delay` and `pace` in seconds hold from now on."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/bench", orjson.dumps(settings))
            found: dict[str, int] = orjson.loads(connection.getresponse().read())
            return found
        finally:
            connection.close()


class LoadProcess:
    """The load generator."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.load"]
        self.log = folder / "load.log"
        self.process = start(command, folder, log="load.log", environment=own_environment(folder), piped=True)

    def carry_out(self, order: Order) -> Result:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(orjson.dumps(asdict(order)) + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise DidNotStart(f"the load generator ended: {self.log.read_text()[-2000:]}")
        return Result.from_json(orjson.loads(line))


@contextmanager
def ended_with(*signals: signal.Signals) -> Generator[None]:
    """Meanwhile these signals end the block as Ctrl-C does, so that what it started is ended, too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(port: int, path: str = "/healthz", timeout: float = 5.0) -> bool:
    """Whether a GET there is a success."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 300
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def until_it_answers(process: subprocess.Popen[bytes], port: int, path: str, log: Path, patience: float) -> None:
    """Wait until it answers. Raises DidNotStart, with its last words."""
    deadline = time.monotonic() + patience
    while not answers(port, path):
        if process.poll() is not None:
            raise DidNotStart(f"it ended with {process.returncode}: {last_words(log)}")
        if time.monotonic() > deadline:
            raise DidNotStart(f"it did not answer within {patience:g} s: {last_words(log)}")
        time.sleep(0.005)


def last_words(log: Path, most: int = 1500) -> str:
    return " ".join(log.read_text(errors="replace").split())[-most:]


def uv() -> str | None:
    """The `uv` of the machine, or of this environment."""
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if beside.is_file() else None)


def described() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was already."""
    import platform

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git("rev-parse", "--short", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--", "proxy", "plugins", "programs")),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }
