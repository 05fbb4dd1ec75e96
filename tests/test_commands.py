"""The commands, as a newcomer types them: what they print, what they leave behind, and how they end."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tests.serving import COMMAND, command, environment, upstream

from asmodel.cli import main
from asmodel.template import write
from asmodel.testing import Fault, ScriptedServer

COMMANDS = ("serve", "run", "programs", "upstreams", "check", "eval", "trace", "replay", "new", "health")

PARAGRAPHS = {"paragraphs": ["Dogs bark at cars.", "Whales sing at night.", "Cats sleep."]}


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, up: ScriptedServer) -> Path:
    """Where somebody works who has set one upstream, and one that is down."""
    settings = upstream(up.base_url) + upstream("http://127.0.0.1:9/v1", "down", retries=0)
    (tmp_path / "asmodel.toml").write_text(settings)
    return tmp_path


Asmodel = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def asmodel(folder: Path) -> Asmodel:
    """Run a command; what it prints fits 80 columns, and has no escape codes in it because nobody looks at it."""

    def run(*arguments: str, code: int = 0, fits: bool = True) -> subprocess.CompletedProcess[str]:
        ended = command(folder, *arguments)
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert "\x1b" not in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        if fits:
            assert max(map(len, ended.stdout.splitlines()), default=0) <= 80
        return ended

    return run


Here = Callable[..., Result]


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """The same in this process, for what ends before anything is opened: a process each would take long."""
    monkeypatch.chdir(folder)

    def run(*arguments: str, code: int = 0) -> Result:
        ended = CliRunner().invoke(main, arguments, prog_name="asmodel")
        assert ended.exit_code == code, ended.output
        assert max(map(len, ended.stdout.splitlines()), default=0) <= 80
        return ended

    return run


def test_help_says_what_each_command_is_for(here: Here) -> None:
    told = here("--help").stdout
    for name in COMMANDS:
        (line,) = (line for line in told.splitlines() if line.startswith(f"  {name} "))
        assert line.endswith("."), "not cut short"
        assert not line.endswith("...")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_option(here: Here, name: str) -> None:
    assert here(name, "--help").stdout.startswith(f"Usage: asmodel {name} ")
    for option in main.commands[name].params:
        assert not isinstance(option, click.Option) or option.help, option.name


def test_the_package_is_the_command_too() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "asmodel", "programs", "--help"], capture_output=True, text=True, timeout=30
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("Usage: python -m asmodel programs")


def test_version_and_a_command_that_there_is_not(asmodel: Asmodel, here: Here) -> None:
    assert "0.1.0" in asmodel("--version").stdout
    assert "No such command 'srve'" in here("srve", code=2).stderr


# ---- new ----


def test_new_writes_a_program_whose_test_passes_as_printed_and_that_runs(
    asmodel: Asmodel, folder: Path, up: ScriptedServer
) -> None:
    printed = asmodel("new", "sea-haiku").stdout
    assert "wrote programs/sea_haiku.py\nwrote programs/test_sea_haiku.py\n" in printed
    commands = {label.strip(): line for label, _, line in (x.partition(":") for x in printed.splitlines()) if line}

    test = commands["Test it"].split()
    assert test[:3] == ["python", "-m", "pytest"]
    ran = subprocess.run([sys.executable, *test[1:], "-q"], cwd=folder, capture_output=True, text=True, timeout=50)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 passed" in ran.stdout

    assert commands["Try it"].strip() == 'asmodel run sea-haiku "the sea" --programs programs'
    ran = asmodel("run", "sea-haiku", "the sea", "--programs", "programs")
    assert ran.stdout.startswith("scripted ")
    assert "2 steps · 0 cached · 2 calls" in ran.stderr
    assert len(up.requests) == 2

    assert commands["Serve it"].strip() == "asmodel serve --programs programs"
    assert "sea-haiku" in asmodel("programs", "--programs", "programs").stdout
    assert "All well." in asmodel("check", "--programs", "programs").stdout


def test_new_works_for_every_name_that_a_program_can_have(asmodel: Asmodel, folder: Path) -> None:
    names = ["haiku", "subject", "class", "program", "run", "step", "x2", "json", "written", "spec", "match"]
    for name in names:
        write(name, folder / "programs")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "programs"], cwd=folder, capture_output=True, text=True, timeout=50
    )
    assert ran.returncode == 0, ran.stdout
    assert f"{2 * len(names)} passed" in ran.stdout
    listed = json.loads(asmodel("programs", "--programs", "programs", "--json", fits=False).stdout)
    assert set(names) <= {row["name"] for row in listed}
    assert asmodel("run", "json", "fog", "--programs", "programs").stdout.startswith("scripted ")


@pytest.mark.parametrize(("name", "says"), [("Bad Name", "my-program"), ("2nd", "letter first")])
def test_new_refuses_a_name_that_cannot_be_and_writes_nothing(here: Here, folder: Path, name: str, says: str) -> None:
    assert says in here("new", name, code=2).stderr
    assert not (folder / "programs").exists()


def test_new_never_writes_over_a_file(here: Here, folder: Path) -> None:
    here("new", "mine")
    (folder / "programs" / "mine.py").write_text("# mine")
    assert "is there already" in here("new", "mine", code=2).stderr
    assert (folder / "programs" / "mine.py").read_text() == "# mine"


# ---- run and trace ----


def test_run_prints_the_answer_alone_to_stdout_and_the_receipt_to_stderr(asmodel: Asmodel, up: ScriptedServer) -> None:
    first = asmodel("run", "plain", "Why?")
    assert first.stdout.splitlines() == [first.stdout.strip()]
    assert first.stdout.startswith("scripted ")
    assert first.stderr.startswith("\n1 step · 0 cached · 1 call · ")
    again = asmodel("run", "plain", "Why?")
    assert again.stdout == first.stdout
    assert "1 step · 1 cached · 0 calls · 0 tokens" in again.stderr
    assert len(up.requests) == 1, "the cache is shared from one command to the next"
    id = again.stderr.split()[-1]
    assert id in asmodel("trace", id).stdout


def test_run_takes_params_one_by_one_or_from_a_file_and_shows_what_is_cited(asmodel: Asmodel, folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAGRAPHS))
    told = asmodel("run", "evidence-qa", "Who sings?", "--params", "params.json", "--param", "keep=2").stdout
    assert "Whales sing at night." in told
    whole = json.loads(
        asmodel("run", "evidence-qa", "Who sings?", "--params", "params.json", "--json", fits=False).stdout
    )
    assert whole["answer"].startswith("scripted ")
    assert len(whole["citations"]) == 1
    assert (whole["steps"], whole["cache_hits"], whole["upstream_calls"]) == (4, 3, 1)
    assert whole["run_id"].startswith("run_")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plian", "x"], 2, 'did you mean "plain"'),
        (["plain", "x", "--param", "keep=1"], 2, "takes no parameters"),
        (["evidence-qa", "x", "--param", "kep=1"], 2, "takes no parameter kep; it takes "),
        (["evidence-qa", "x", "--param", "keep"], 2, "NAME=VALUE"),
        (["evidence-qa", "x"], 1, "wants a question, and paragraphs"),
        (["plain", "x", "--upstream", "nobody"], 2, "nobody"),
        (["plain", "x", "--upstream", "down"], 1, "upstreams.down.base_url"),
        (["plain", "x", "--params", "broken.json"], 2, "broken.json:2"),
        (["plain", "x", "--params", "list.json"], 2, "JSON object"),
        (["plain", "x", "--config", "none.toml"], 2, "there is no file none.toml"),
    ],
)
def test_run_says_what_is_wrong_and_ends_with_a_code(
    here: Here, folder: Path, arguments: list[str], code: int, says: str
) -> None:
    (folder / "broken.json").write_text('{\n  "a": }')
    (folder / "list.json").write_text("[1]")
    ended = here("run", *arguments, code=code)
    assert says in ended.stderr
    assert ended.stdout == ""


def test_an_error_of_the_upstream_is_told_and_ends_with_1(asmodel: Asmodel, folder: Path) -> None:
    with ScriptedServer(faults=lambda received: Fault(status=401)) as refusing:
        (folder / "asmodel.toml").write_text(upstream(refusing.base_url))
        assert "upstreams.default.api_key" in asmodel("run", "plain", "x", code=1).stderr


def test_trace_lists_the_runs_and_draws_one(asmodel: Asmodel) -> None:
    assert "No runs are kept yet" in asmodel("trace").stdout
    asmodel("run", "self-consistency", "2+2?", "--param", "samples=2")
    asmodel("run", "plain", "hi")
    listed = asmodel("trace")
    assert listed.stdout.index("plain") < listed.stdout.index("self-consistency"), "the last one first"
    assert "asmodel trace ID" in listed.stdout
    assert "conversation" in asmodel("trace", "last").stdout
    (run,) = (r for r in json.loads(asmodel("trace", "--json", fits=False).stdout) if "plain" in json.dumps(r))
    assert run
    assert "nowhere" in asmodel("trace", "nowhere", code=2).stderr


# ---- looking around ----


def test_programs_say_what_they_take(asmodel: Asmodel) -> None:
    told = asmodel("programs").stdout
    assert "self-consistency\n    Draw several chains of thought" in told
    assert "params  samples, temperature" in told
    rows: list[dict[str, Any]] = json.loads(asmodel("programs", "--json", fits=False).stdout)
    assert [row["name"] for row in rows] == [
        "all-paragraphs",
        "chain-of-thought",
        "evidence-filter",
        "evidence-qa",
        "golden-facts",
        "plain",
        "relevance",
        "selection-inference",
        "self-consistency",
        "summary",
    ]
    assert rows[3]["roles"] == ["judge", "scorer", "writer"]


def test_upstreams_are_tried_and_say_what_they_can_do(asmodel: Asmodel) -> None:
    ended = asmodel("upstreams", code=1)
    good, bad = ended.stdout.split("down (openai)")
    assert good.startswith("default (openai) answers\n")
    assert "loglikelihood" in good.split("    can ")[1].splitlines()[0]
    assert "does not answer\n" in bad
    assert "upstreams.down.base_url" in bad
    rows = {row["name"]: row for row in json.loads(asmodel("upstreams", "--json", code=1, fits=False).stdout)}
    assert rows["default"]["can"]["loglikelihood"] is True
    assert rows["default"]["answers"] is True
    assert rows["down"]["answers"] is False


def test_check_shows_who_plays_what(asmodel: Asmodel, folder: Path) -> None:
    with (folder / "asmodel.toml").open("a") as settings:
        settings.write('[roles]\nwriter = "down"\n[programs.plain.roles]\nwriter = "default"\n')
    lines = [line.split() for line in asmodel("check").stdout.splitlines()]
    assert ["plain", "conversation", "writer", "default"] in lines
    assert ["self-consistency", "sample", "writer", "down"] in lines
    assert ["thought", "writer", "down"] in lines
    assert ["question_given", "scorer", "default", "log-likelihood"] in lines
    assert lines[-1] == ["All", "well."]


def test_check_finds_a_role_that_nobody_plays(asmodel: Asmodel, folder: Path, up: ScriptedServer) -> None:
    (folder / "asmodel.toml").write_text(upstream(up.base_url, "only"))
    ended = asmodel("check", code=2)
    assert "nobody" in ended.stdout
    assert "[upstreams.default]" in ended.stderr
    assert "All well." not in ended.stdout


def test_check_finds_an_upstream_that_cannot_do_what_a_step_needs(asmodel: Asmodel, folder: Path) -> None:
    with ScriptedServer(scores="ignored") as cannot:
        wanted = "[programs.evidence-qa.params]\nkeep = 2\n"
        (folder / "asmodel.toml").write_text(upstream(cannot.base_url) + wanted)
        ended = asmodel("check", code=2)
    for part in ("evidence-qa", "question_given", "scorer", "log-likelihood"):
        assert part in ended.stderr


def test_check_only_notes_that_a_program_which_nobody_asked_for_cannot_be_played(
    asmodel: Asmodel, folder: Path
) -> None:
    with ScriptedServer(scores="ignored") as cannot:
        (folder / "asmodel.toml").write_text(upstream(cannot.base_url))
        ended = asmodel("check")
    assert 'note: program "evidence-qa"' in ended.stdout
    assert "All well." in ended.stdout


def test_check_points_out_globals_clocks_and_chance_in_steps(asmodel: Asmodel, folder: Path) -> None:
    (folder / "programs").mkdir()
    (folder / "programs" / "odd.py").write_text('''
"""Odd steps."""

import random
from datetime import datetime

from asmodel import Run, program, step

SEEN = []
RULE = "be brief"


def stamp():
    return datetime.now().isoformat()


@step(model="writer")
def odd(question: str) -> str:
    return f"{question} {SEEN} {RULE} {random.random()} {stamp()}"


@step(model="writer")
def fine(question: str) -> str:
    return f"{question} {RULE} {datetime.fromisoformat('2020-01-01')}"


@program("odd")
async def odd_program(run: Run) -> str:
    return await run.reply(odd, await run(fine, run.question))
''')
    told = " ".join(asmodel("check", "--programs", "programs").stdout.split())
    for what in ("uses a global that can change (SEEN)", "draws by chance (random.random)", "a clock (datetime.now)"):
        assert f'step "odd" {what}' in told.replace("reads a clock", "a clock")
    assert "programs/odd.py:14: " in told
    assert 'step "fine"' not in told
    assert "RULE" not in told


# ---- with somebody looking ----


def test_in_a_terminal_progress_is_shown_and_taken_away_before_the_answer(folder: Path, up: ScriptedServer) -> None:
    up.delay = 0.5
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "run", "self-consistency", "terminal", "--param", "samples=2"],
        cwd=folder,
        env={**os.environ, **environment(folder), "TERM": "xterm", "COLUMNS": "80"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                shown += os.read(master, 65536)
            except OSError:  # Linux says so when the other side has closed it.
                break
        elif process.poll() is not None:
            break
    assert process.wait(10) == 0
    os.close(master)
    text = shown.decode()
    assert "votes · thought 0/2" in text
    assert text.index("votes") < text.index("\r\x1b[2K", text.index("votes")) < text.index("scripted")
