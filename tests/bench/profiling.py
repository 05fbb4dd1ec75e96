"""Where the server's time goes under a load: samples of its stacks by py-spy, as tables of functions.

Only the thread that holds the interpreter's lock is looked at: that is what a process cannot have more of, and a thread
that merely waits is not taken for one that works. What is done without the lock, as SQLite's commits are, is not in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RATE = 250
"""Samples a second: more would slow down what they show."""


class NoProfiler(RuntimeError):
    """There is no py-spy, or it may not look; says what to do."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Samples by function. A function's file is shortened to what tells it apart."""

    samples: int
    own: Counter[str]
    """In which the function itself was running."""
    total: Counter[str]
    """In which it was somewhere on the stack."""

    def top(self, count: int = 15) -> list[tuple[str, float, float]]:
        """Functions with the share of samples that are their own and that they are part of, most of their own first."""
        return [self._shares(name) for name, _ in self.own.most_common(count)]

    def widest(self, count: int = 15) -> list[tuple[str, float, float]]:
        """The same of our own functions, those that are part of most first; what only starts it all is left out."""
        ours = [name for name, _ in self.total.most_common() if _OURS.search(name)]
        return [self._shares(name) for name in ours[:count]]

    def _shares(self, name: str) -> tuple[str, float, float]:
        return name, self.own[name] / self.samples, self.total[name] / self.samples


_OURS = re.compile(r"\((?:asmodel|asmodel_plugins|asmodel_programs)/(?!cli\.py|server\.py)")
_FRAME = re.compile(r"^(?P<name>.*) \((?P<file>.*?)(?::\d+)?\)$")


def _named(frame: str) -> str:
    """`function (file)` without the line and without the folders that all files share."""
    matched = _FRAME.match(frame.strip())
    if matched is None:
        return frame.strip()
    for mark in ("site-packages/", "/lib/python", "/proxy/", "/plugins/", "/programs/"):
        _, found, after = matched["file"].rpartition(mark)
        if found:
            return f"{matched['name']} ({re.sub(r'^3[.][0-9]+/', '', after)})"
    return f"{matched['name']} ({matched['file']})"


def read(lines: Iterable[str]) -> Profile:
    """py-spy's raw format: a stack from the outside in with `;` between its frames, and how often it was seen."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in lines:
        stack, _, times = line.rstrip().rpartition(" ")
        if not stack:
            continue
        frames = [_named(frame) for frame in stack.split(";")]
        own[frames[-1]] += int(times)
        for name in set(frames):
            total[name] += int(times)
        samples += int(times)
    return Profile(samples=samples, own=own, total=total)


def profiler() -> str:
    """py-spy. Raises NoProfiler."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.is_file() else shutil.which("py-spy")
    if found is None:
        raise NoProfiler("py-spy is not installed (pip install py-spy)")
    return found


class Watch:
    """py-spy beside a process for some seconds; `taken` waits for its end."""

    def __init__(self, pid: int, seconds: float, folder: Path) -> None:
        self._file = folder / f"profile-{pid}.txt"
        command = [
            profiler(),
            "record",
            "--gil",
            "--full-filenames",
            "--pid",
            str(pid),
            "--duration",
            str(max(1, round(seconds))),
        ]
        command += ["--rate", str(RATE), "--format", "raw", "--output", str(self._file)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def taken(self, patience: float = 60.0) -> Profile:
        try:
            said, _ = self._process.communicate(timeout=patience)
        finally:
            self.stop()
        if self._process.returncode or not self._file.exists():
            raise NoProfiler(f"py-spy ended with {self._process.returncode}: {' '.join(said.split())[-300:]}")
        return read(self._file.read_text().splitlines())

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
