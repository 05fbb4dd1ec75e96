"""The process of the embedded model, as whoever starts it sees it: started, kept running, announced to others, stopped.

A server of several worker processes starts it in the parent and announces it to the workers in two environment
variables (`announcement`). What runs in the process itself is embedded_child.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from asmodel.errors import ConfigurationError

from . import embedded_weights
from .embedded_child import HOST, Job

ADDRESS_VARIABLE = "ASMODEL_EMBEDDED_ADDRESS"
"""Where announced children listen: `NAME=http://127.0.0.1:PORT` for each upstream, with spaces between."""
KEY_VARIABLE = "ASMODEL_EMBEDDED_KEY"
"""The key that all announced children take."""

CONTEXT = 8192
SLOTS = 12
"""Calls at the same time: ten paragraphs of one question, and room for others."""

LOAD_SECONDS = 600
"""How long a child may load; a file of many gigabytes on a slow disk takes minutes."""
STOP_SECONDS = 2.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds between two starts of a child that ended: doubled each time, from the first again once one has lasted."""
LASTED_SECONDS = 30.0

_OTHER_MODEL = "name another model in the settings ([upstreams.default], with a model or a base_url)"


class EmbeddedChild:
    """The child process: started, kept running, stopped. Synchronous; safe to use from any thread.

    `name` is the upstream's, for messages and for `announcement`. `path` is a GGUF file; without it the weights are
    fetched first, with `progress` called with bytes done and in all. `context` in tokens for one call, `slots` calls at
    the same time, `threads` None for one less than there are cores. `key` is made up where none is given; children of
    one server are given the same. A child that ends is started again, on the same port and with the same key.
    """

    def __init__(
        self,
        *,
        name: str = "default",
        path: str | Path | None = None,
        context: int = CONTEXT,
        slots: int = SLOTS,
        threads: int | None = None,
        key: str | None = None,
        cache_dir: Path | None = None,
        progress: embedded_weights.Progress | None = None,
    ) -> None:
        for option, value in (("context", context), ("slots", slots), ("threads", threads)):
            if value is not None and value < 1:
                raise ConfigurationError(f"upstreams.{name}.{option} is {value}, and must be 1 or more")
        self.name = name
        self.key = key or secrets.token_hex(24)
        self.identity = ""
        """`embedded:sha256:` and 32 digits of the weights' digest; known once started."""
        self.restarts = 0
        self._path = None if path is None else Path(path).expanduser()
        self._context, self._slots, self._threads = context, slots, threads
        self._cache_dir = cache_dir
        self._progress = progress
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._ready = False
        self._trouble: str | None = None
        self._stopping = False
        self._supervisor: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Where it listens, as `http://127.0.0.1:PORT`; it stays the same over restarts."""
        return f"http://{HOST}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, if one does."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def trouble(self) -> str | None:
        """Why it ended last, while it is not serving again."""
        return None if self._ready else self._trouble

    def start(self) -> None:
        """Fetch the weights if need be, start the process, and return once it serves.

        Raises ConfigurationError where it does not, with the reason and what to do. Starting twice is starting once.
        """
        with self._changed:
            if self._stopping:
                raise ConfigurationError(f'upstream "{self.name}": the embedded model was told to stop')
        if self._supervisor is not None:
            return
        check_engine(self.name)
        job = self._job()
        # Not in the caller's thread: where Linux ends a child with its parent, it is the thread that counts as parent.
        self._supervisor = threading.Thread(
            target=self._supervise, args=(job,), name=f"embedded-{self.name}", daemon=True
        )
        self._supervisor.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._trouble is not None or self._stopping)
            if self._ready:
                return
            trouble = self._trouble or "it was told to stop"
        self.stop()
        raise ConfigurationError(f'upstream "{self.name}": the embedded model did not start: {trouble}; {_OTHER_MODEL}')

    def stop(self) -> None:
        """End the process, and a start that is under way. Stopping twice is stopping once; blocks for 2 s at most."""
        with self._changed:
            self._stopping = True
            self._ready = False
            process = self._process
            self._changed.notify_all()
        if process is not None:
            _end(process)
        if self._supervisor is not None and self._supervisor is not threading.current_thread():
            self._supervisor.join(STOP_SECONDS)

    def _job(self) -> Job:
        if self._path is None:
            weights = embedded_weights.fetch(self._cache_dir, self._watched)
        else:
            weights = self._path
            if not weights.is_file():
                raise ConfigurationError(f"upstreams.{self.name}.path: there is no file {weights}")
        try:
            digest = embedded_weights.digest(weights, self._cache_dir)
        except OSError as error:
            raise ConfigurationError(f"upstreams.{self.name}.path: {weights} cannot be read: {error}") from error
        self.identity = f"embedded:sha256:{digest[:32]}"
        return Job(
            path=str(weights.resolve()),
            model=weights.stem,
            identity=self.identity,
            key=self.key,
            port=self._port,
            context=self._context,
            slots=self._slots,
            threads=self._threads,
        )

    def _watched(self, done: int, total: int) -> None:
        if self._stopping:
            raise ConfigurationError("the embedded model's weights were not fetched: the server was told to stop")
        if self._progress is not None:
            self._progress(done, total)

    def _supervise(self, job: Job) -> None:
        pause = FIRST_PAUSE
        while not self._stopping:
            began = time.monotonic()
            try:
                trouble = self._run(job)
            except OSError as error:
                trouble = f"its process could not be started ({error.strerror or error})"
            with self._changed:
                first = self._port == 0
                lasted = time.monotonic() - began > LASTED_SECONDS
                pause = FIRST_PAUSE if lasted else min(pause * 2, LONGEST_PAUSE)
                self._ready = False
                self._trouble = trouble
                self._changed.notify_all()
                if first or self._changed.wait_for(lambda: self._stopping, pause):
                    return
                self.restarts += 1
            job = replace(job, port=self._port)

    def _run(self, job: Job) -> str:
        """Run the process once, to its end; why it ended."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "asmodel_plugins.embedded_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_child_environment(),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with self._changed:
            self._process = process
            stopped = self._stopping
        if stopped:
            _end(process)
        said: deque[bytes] = deque(maxlen=20)
        listener = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
        listener.start()
        too_long = threading.Timer(LOAD_SECONDS, process.kill)
        too_long.daemon = True
        too_long.start()
        error = ""
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(job.line())
                process.stdin.flush()
            answer = json_object(process.stdout.readline())
            too_long.cancel()
            error = str(answer.get("error") or "")
            port = answer.get("port")
            if isinstance(port, int):
                with self._changed:
                    self._port = port
                    self._ready = not self._stopping
                    self._changed.notify_all()
            process.wait()
        finally:
            too_long.cancel()
            _end(process)
            listener.join(1)
            for stream in (process.stdout, process.stderr):
                stream.close()
        return _why(process.returncode, error, list(said))


def check_engine(name: str) -> None:
    """Raise ConfigurationError where the library that runs the model is not installed. Does not import it."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigurationError(
            f'upstream "{name}" is the embedded model, and xllamacpp, which runs it, is not installed (there is no '
            f"wheel of it for every platform); {_OTHER_MODEL}"
        )


def announcement(children: Iterable[EmbeddedChild]) -> dict[str, str]:
    """The environment variables that tell worker processes of started children; the children must share one key."""
    there = list(children)
    if len({child.key for child in there}) > 1:
        raise ValueError("children that are announced together share one key")
    if not there:
        return {}
    return {
        ADDRESS_VARIABLE: " ".join(f"{child.name}={child.address}" for child in there),
        KEY_VARIABLE: there[0].key,
    }


def announced(name: str, environ: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """Address and key of the child that is announced for the upstream of that name, if one is."""
    variables = os.environ if environ is None else environ
    for entry in variables.get(ADDRESS_VARIABLE, "").split():
        who, _, address = entry.rpartition("=")
        if who == name and address:
            return address, variables.get(KEY_VARIABLE, "")
    return None


def _child_environment() -> dict[str, str]:
    """This process's own, and in a checkout that is not installed the folder that the child's code is in."""
    environment = dict(os.environ)
    environment.pop(KEY_VARIABLE, None)
    root = Path(__file__).resolve().parents[1]
    if root.name not in {"site-packages", "dist-packages"}:
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environment.get("PYTHONPATH")])])
    return environment


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _why(code: int, error: str, said: Sequence[bytes]) -> str:
    if code in (-int(getattr(signal, "SIGILL", 4)), 0xC000001D):
        return "this machine's processor lacks instructions that xllamacpp is built for (AVX2)"
    words = " ".join(line.decode(errors="replace").strip() for line in list(said)[-5:])[-600:]
    words = f' (it said: "{words}")' if words else ""
    if error:
        return f"{error}{words}"
    if code < 0:
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        hint = "; was the memory used up?" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}{words}"
    return f"its process ended with code {code}{words}"


def json_object(data: bytes) -> dict[str, Any]:
    """The object that the bytes are as JSON; an empty one where they are none."""
    try:
        body: Any = json.loads(data)
    except ValueError:
        return {}
    return cast("dict[str, Any]", body) if isinstance(body, dict) else {}
