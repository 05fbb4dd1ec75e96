"""What the README and the pages say is run, or held against the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from asmodel.settings import load
from asmodel.testing import ScriptedServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(first_word: str) -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(first_word + " ")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of the README in it."""
    for block in blocks("python"):
        if named := re.match(r"# (\S+\.py)\n", block):
            file = tmp_path / named[1]
            file.parent.mkdir(exist_ok=True)
            file.write_text(block)
    return tmp_path


@pytest.fixture
def upstream() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def environment(upstream: ScriptedServer, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "ASMODEL_UPSTREAMS__DEFAULT__BASE_URL": upstream.base_url,
        "ASMODEL_UPSTREAMS__DEFAULT__MODEL": "scripted",
        "ASMODEL_CACHE__PATH": str(tmp_path / "cache"),
        "ASMODEL_TRACES__PATH": str(tmp_path / "traces.sqlite"),
    }


def asmodel(line: str, folder: Path, environment: dict[str, str]) -> str:
    words = [sys.executable, "-m", "asmodel.cli", *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = commands("make")
    assert {"make demo", "make test"} <= set(named)
    for command in named:
        assert re.search(rf"^{command.split()[1]}:.*##", makefile, re.MULTILINE), command


def test_the_program_of_the_readme_passes_its_test(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "programs"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "programs")},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.timeout(120)
def test_every_command_and_the_client_of_the_readme_work_as_printed(
    folder: Path, upstream: ScriptedServer, environment: dict[str, str]
) -> None:
    ran = [line for line in commands("asmodel") if "serve" not in line and "trace" not in line]
    assert len(ran) == 2
    for line in ran:
        assert asmodel(line, folder, environment)
    assert chats(upstream) == 4

    (serve,) = {line for line in commands("asmodel") if "serve" in line}
    port = free_port()
    words = [sys.executable, "-m", "asmodel.cli", *shlex.split(serve)[1:], "--port", str(port)]
    with subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/readyz")
            (client,) = (block for block in blocks("python") if "from openai" in block)
            code = client.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                capture_output=True,
                text=True,
                timeout=50,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        finally:
            server.terminate()
    # `asmodel run` has bought it all already, and the server has the same cache.
    answer, receipt, streamed = done.stdout.splitlines()
    assert answer == streamed
    assert answer.startswith("scripted ")
    assert receipt == "4 steps, 0 calls"
    assert chats(upstream) == 4

    for line in (line for line in commands("asmodel") if "trace" in line):
        assert "tagline" in asmodel(line, folder, environment)


def chats(upstream: ScriptedServer) -> int:
    return sum(request.path.endswith("/chat/completions") for request in upstream.requests)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(url: str) -> None:
    for _ in range(500):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.04)
    raise AssertionError(f"{url} does not answer")


def test_the_settings_of_the_readme_are_settings(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    tomllib.loads(text)
    file = tmp_path / "asmodel.toml"
    file.write_text(text)
    settings = load(file, environ={})
    assert settings.upstreams["default"].kind == "litellm"
    assert settings.upstreams["local"].kind == "openai"
    assert settings.roles == {"scorer": "local"}
    assert settings.models["careful"].params == {"samples": 9}


def test_every_program_that_ships_is_in_the_readme() -> None:
    for file in (ROOT / "programs" / "asmodel_programs").glob("[a-z]*.py"):
        assert f"| `{file.stem.replace('_', '-')}` |" in README


def test_every_page_that_the_readme_points_to_is_there() -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_module_of_the_core_has_its_room_on_the_page_of_the_architecture() -> None:
    rooms = ARCHITECTURE.split("## Rooms")[1].split("## One request")[0]
    for file in (ROOT / "proxy" / "asmodel").glob("[a-z]*.py"):
        assert re.search(rf"\b{file.stem}\b", rooms), f"{file.name} is not on docs/architecture.md"
