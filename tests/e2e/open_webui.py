"""A real Open WebUI, with its database in a folder, whose models are those of the servers that it is pointed at."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.e2e.environments import open_webui
from tests.redis_serving import free_port
from tests.serving import PATIENCE, eventually

ALONE = {
    "USE_SLIM_DOCKER": "true",  # as what is installed
    "OFFLINE_MODE": "true",
    "ENABLE_OLLAMA_API": "false",
    "WEBUI_AUTH": "false",
    "WEBUI_SECRET_KEY": "of a test",
    "DEFAULT_INTERFACE_SETTINGS": '{"showChangelog": false}',
}
"""It has no models of its own, looks for nothing elsewhere, asks nobody who they are, and does not tell what is new."""


class OpenWebUi:
    """One on a port of 127.0.0.1. `told` are settings by its own names, in the environment."""

    def __init__(self, folder: Path, told: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._told = told
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}/"
        self.version = ""

    def __enter__(self) -> OpenWebUi:
        environment = open_webui()
        self.version = environment.versions["open-webui"]
        folders = {
            "HOME": str(self._folder),
            "DATA_DIR": str(self._folder / "data"),
            # Which it empties when it starts, and which would be in the environment, where others use it too.
            "STATIC_DIR": str(self._folder / "static"),
        }
        with (self._folder / "open-webui.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(environment.folder / "bin" / "open-webui"),
                    "serve",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(self._port),
                ],
                cwd=self._folder,
                env={"PATH": os.environ.get("PATH", os.defpath), **ALONE, **folders, **self._told},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            # The first start of an environment compiles all of it.
            eventually("Open WebUI is healthy", self._healthy, 120.0)
        except BaseException:
            self._end()
            raise
        return self

    def _healthy(self) -> bool:
        assert self._process is not None
        words = (self._folder / "open-webui.log").read_text(errors="replace")[-2_000:]
        assert self._process.poll() is None, f"Open WebUI ended with {self._process.returncode}: {words}"
        try:
            with urllib.request.urlopen(self.address + "health", timeout=PATIENCE) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)
