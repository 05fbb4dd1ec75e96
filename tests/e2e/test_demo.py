"""The demo, as a person who has just fetched this folder sees it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.e2e.environments import ROOT

from asmodel_plugins.embedded_weights import FILE, default_folder, fetch

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LONGEST = 300.0
"""Seconds that it may take on two cores, the weights being there."""

RECEIPT = re.compile(
    r"receipt: (\d+) calls, (\d+) of (\d+) steps from the cache, (\d+\.\d+) s, (\d+) ms of it asmodel's own"
)


def weights(home: Path) -> None:
    """The weights, which are fetched once and not by every run, at the place where a fresh home would have them."""
    kept = fetch(Path(os.environ["ASMODEL_TEST_WEIGHTS"]))
    folder = default_folder({"XDG_CACHE_HOME": str(home / ".cache")})
    folder.mkdir(parents=True)
    (folder / FILE).symlink_to(kept)


def started_with(mark: str) -> list[str]:
    """The processes whose environment holds the mark: whatever the demo started, and what that started in its turn."""
    found: list[str] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(f"{process.name} {(process / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
        except OSError:
            continue  # It has ended meanwhile, or is somebody else's.
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All that it printed, once it has ended well and in time and has left nothing behind."""
    home = tmp_path_factory.mktemp("home")
    weights(home)
    mark = f"DEMO_IS_TESTED_BY={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ASMODEL_", "OTEL_"))}
    began = time.monotonic()
    # Its output goes to a file: a process left behind would keep a pipe open, and this waiting at its end.
    with (home / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "demo" / "demo.py")],
            cwd=ROOT,
            env={**mine, "HOME": str(home), name: value, "COLUMNS": "120"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(500)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
    seconds = time.monotonic() - began
    text = (home / "output").read_text()
    assert code == 0, text
    assert seconds < LONGEST, f"{seconds:.0f} s\n{text}"
    assert started_with(mark) == []
    return text


def test_the_demo_shows_every_one_of_its_parts(shown: str) -> None:
    assert re.findall(r"^(\d)  \w", shown, re.MULTILINE) == list("123456")
    assert "Traceback" not in shown
    assert re.search(r"^  answer: \S", shown, re.MULTILINE)
    assert re.search(r"^  from paragraph \S+: “.+”$", shown, re.MULTILINE)


def test_the_second_time_nothing_is_bought(shown: str) -> None:
    first, again = (tuple(map(float, found)) for found in RECEIPT.findall(shown))
    calls, hits, steps, seconds, _ = first
    assert calls > 0
    assert hits < steps
    assert again[:3] == (0, steps, steps)
    assert again[3] < seconds
    assert re.search(r"now \d+\.\d+ s and 0 calls", shown)


def test_what_was_bought_before_the_kill_is_not_bought_again(shown: str) -> None:
    killed = re.search(r"killed the server \(SIGKILL\) after \d+\.\d s, with (\d+) steps in its trace", shown)
    resumed = re.search(r"of (\d+) steps, (\d+) were kept from before the kill, and now bought: (\d+)", shown)
    assert killed is not None
    assert resumed is not None
    steps, kept, bought = map(int, resumed.groups())
    assert kept + bought == steps
    assert kept >= int(killed[1]) >= 3


def test_three_ways_are_measured_on_twenty_questions(shown: str) -> None:
    assert re.search(r"right of 20 .*shared .*reworded ", shown)
    rows = re.findall(r"^  (\S.*?) {2,}(\d+) +(\d+) +(\d+) +(\d+\.\d\d) *$", shown, re.MULTILINE)
    assert len(rows) == 3, shown
    for _, right, shared, reworded, seconds in rows:
        assert int(right) == int(shared) + int(reworded) <= 20
        assert max(int(shared), int(reworded)) <= 10
        assert float(seconds) > 0
    against = re.findall(r"(\d+) won, (\d+) lost, (\d+) alike \(exact McNemar p = [\d.e-]+\)", shown)
    assert [sum(map(int, found)) for found in against] == [20, 20]


def test_it_ends_with_the_next_command_to_type(shown: str) -> None:
    *_, done, command = shown.rstrip().splitlines()
    assert re.match(r"Done in \d+ s", done)
    assert re.fullmatch(r"\.venv/bin/asmodel new [a-z-]+", command.strip())
    # It is a command that there is.
    told = subprocess.run(
        [sys.executable, "-m", "asmodel.cli", "new", "--help"], capture_output=True, timeout=30, check=False
    )
    assert told.returncode == 0, told.stderr.decode()
