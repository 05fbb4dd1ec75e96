"""Who is asked: the upstream itself, and `asmodel serve` as anyone runs it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.bench import wire
from tests.bench.processes import (
    PATIENCE,
    UpstreamProcess,
    free_port,
    own_environment,
    start,
    stop,
    tree,
    until_it_answers,
)
from tests.bench.scenarios import PROGRAMS, Shape

SETTINGS = """# The upstream, and as many calls in flight as the load has connections and programs have steps.
[upstreams.default]
base_url = {base_url!r}
model = {model!r}
api_key = "unused"
concurrency = 2048
"""


class Target:
    """Something that can be asked."""

    def __init__(self, name: str, port: int, model: str, *able: Shape, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.port = port
        self.model = model
        """The name by which it passes a call on."""
        self.path = "/v1/chat/completions"
        self.streams_whole = False
        """Whether the text of its stream is what the upstream says without one."""
        self.able = able
        self.process = process

    @property
    def pids(self) -> list[int]:
        return tree(self.process.pid)

    def stop(self) -> None:
        stop(self.process)


def direct(upstream: UpstreamProcess) -> Target:
    """The upstream without anything in between."""
    return Target("direct", upstream.port, wire.MODEL, "whole", "stream", process=upstream.process)


class Asmodel(Target):
    """`asmodel serve` in a folder of its own, with an empty cache, and traces in a file, as it comes.

    `checkout` is another tree of asmodel than this one, whose code is run in this environment.
    """

    def __init__(self, upstream: UpstreamProcess, folder: Path, name: str = "asmodel", checkout: Path | None = None):
        folder.mkdir(parents=True)
        (folder / "asmodel.toml").write_text(
            SETTINGS.format(base_url=upstream.base_url, model=wire.MODEL), encoding="utf-8"
        )
        (folder / "programs").mkdir()
        (folder / "programs" / "bench_programs.py").write_text(PROGRAMS, encoding="utf-8")
        port = free_port()
        more: dict[str, str] = {}
        if checkout is not None:
            rooms = [str(checkout / room) for room in ("proxy", "plugins", "programs")]
            more["PYTHONPATH"] = ":".join(rooms)
        command = [*installed(), "serve", "--port", str(port), "--programs", folder / "programs"]
        self.folder = folder
        began = time.monotonic()
        process = start(command, folder, log="server.log", environment=own_environment(folder, more))
        super().__init__(name, port, "default", "whole", "stream", "program", process=process)
        try:
            until_it_answers(process, port, "/healthz", folder / "server.log", PATIENCE)
        except BaseException:
            self.stop()
            raise
        self.started_in = time.monotonic() - began
        """Seconds from the start of the process to its first answer at /healthz."""


def installed() -> list[str | Path]:
    """The command that the installation made, or the module that it stands for."""
    command = Path(sys.executable).with_name("asmodel")
    return [command] if command.is_file() else [sys.executable, "-m", "asmodel.cli"]
