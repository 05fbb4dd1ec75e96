"""What `asmodel check` says of clocks, chance, the environment and globals that change."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asmodel import Run, program, step, tool
from asmodel.hygiene import Remark, remarks
from asmodel.programs import programs_in

HEAD = """
import datetime, os, random, secrets, sys, time, uuid
from collections import Counter
from datetime import datetime as dt
from os import environ, getenv
from random import choice as pick
from time import time as clock

from asmodel import Run, program, step

LIST = ["a"]
TUPLE = ("a",)
SEEN = {}
KNOWN = {"a": 1}
times = 0

"""

Check = Callable[[str, str], list[Remark]]


@pytest.fixture
def check(tmp_path: Path) -> Iterator[Check]:
    """What is said of a step that shows this expression, and of a program with this line in it."""
    made: list[str] = []

    def said(shown: str, line: str) -> list[Remark]:
        name = f"checked_{len(made)}"
        made.append(name)
        file = tmp_path / f"{name}.py"
        file.write_text(
            f"{HEAD}\ndef helper():\n    return {shown}\n\n"
            f"@step\ndef shows(question: str, now: str, random: str) -> str:\n    return str({shown})\n\n"
            f'@program("p")\nasync def p(run: Run) -> str:\n    {line}\n    return await run(shows, "q", "", "")\n'
        )
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (found,) = programs_in(module)
        return remarks(found)

    yield said
    for name in made:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("shown", "kind", "what"),
    [
        ("time.time()", "clock", "time.time"),
        ("clock()", "clock", "clock"),
        ("time.strftime('%Y')", "clock", "time.strftime"),
        ("dt.now()", "clock", "dt.now"),
        ("datetime.datetime.utcnow()", "clock", "datetime.datetime.utcnow"),
        ("datetime.date.today()", "clock", "datetime.date.today"),
        ("pick([1, 2])", "chance", "pick"),
        ("uuid.uuid4()", "chance", "uuid.uuid4"),
        ("secrets.token_hex(4)", "chance", "secrets.token_hex"),
        ("os.urandom(4)", "chance", "os.urandom"),
        ("os.environ['HOME']", "environment", "os.environ"),
        ("os.environ.get('HOME')", "environment", "os.environ"),
        ("environ.get('HOME')", "environment", "environ"),
        ("getenv('HOME')", "environment", "getenv"),
        ("sys.argv", "environment", "sys.argv"),
        ("[clock() for _ in (1, 2)]", "clock", "clock"),
        ("(lambda: clock())()", "clock", "clock"),
        ("LIST[0]", "global", "LIST"),
        ("[one for one in LIST]", "global", "LIST"),
    ],
)
def test_a_step_that_shows_what_is_none_of_its_arguments_is_pointed_at(
    check: Check, shown: str, kind: str, what: str
) -> None:
    (said,) = check(shown, "pass")
    assert (said.kind, said.what, said.step, said.program) == (kind, what, "shows", "p")
    assert said.file is not None
    assert what in said.file.read_text().splitlines()[said.line - 1]
    assert str(said).startswith(f'{said.file.parent.name}/{said.file.name}:{said.line}: step "shows" ')
    assert "argument" in said.instead


@pytest.mark.parametrize(
    ("line", "kind", "what"),
    [
        ("t = clock()", "clock", "clock"),
        ("t = dt.now()", "clock", "dt.now"),
        ("t = random.random()", "chance", "random.random"),
        ("t = random.Random()", "chance", "random.Random"),
        ("t = os.getenv('HOME')", "environment", "os.getenv"),
        ("SEEN[run.question] = 1", "global", "SEEN"),
        ("LIST.append('b')", "global", "LIST"),
        ("global times; times += 1", "global", "times"),
    ],
)
def test_so_is_a_program_and_it_is_told_what_to_use(check: Check, line: str, kind: str, what: str) -> None:
    said = check("question", line)[0]
    assert (said.kind, said.what, said.step) == (kind, what, None)
    told = {"clock": "run.now", "chance": "run.random", "environment": "params=", "global": "local variables"}
    assert told[kind] in said.instead


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        ("question + now + random", "t = run.now"),
        ("TUPLE", "t = run.random.random()"),
        ("dt.fromisoformat('2026-01-01')", "t = random.Random(7)"),
        ("time.strftime('%Y', time.gmtime(0))", "clock = 1; t = clock"),
        ("datetime.timedelta(1)", "t = KNOWN['a']"),
        ("len(question)", "t = Counter()"),
        ("random.upper()", "time = 3; t = time"),
        ("uuid.UUID(int=1)", "t = secrets.compare_digest('a', 'a')"),
        ("sys.maxsize", "t = os.path.join('a', 'b')"),
    ],
)
def test_nothing_is_said_of_what_is_in_order(check: Check, shown: str, line: str) -> None:
    assert check(shown, line) == []


def test_a_step_that_is_not_kept_is_pointed_at_where_a_retry_would_act_on_it() -> None:
    @tool(effect=True)
    def send(text: str) -> str:
        return text

    @step(cache=False)
    def letter(question: str) -> str:
        return question

    @step
    def kept(question: str) -> str:
        return question

    @program("mailer")
    async def mailer(run: Run) -> str:
        return await run(send, await run(letter, await run(kept, run.question)))

    (said,) = remarks(mailer)
    assert (said.kind, said.step, said.what) == ("uncached", "letter", "cache=False")
    assert "test_hygiene.py" in said.where


def test_a_function_that_a_step_calls_is_looked_at_too(check: Check) -> None:
    assert check("question", "t = helper(); question = 1") == []
    found = check("clock()", "t = helper()")
    assert [r.what for r in found] == ["clock", "clock"]


def test_the_programs_that_come_with_asmodel_are_in_order() -> None:
    from importlib import import_module

    folder = Path(import_module("asmodel_programs").__path__[0])
    modules = [import_module(f"asmodel_programs.{file.stem}") for file in sorted(folder.glob("[a-z]*.py"))]
    found = [one for module in modules for one in programs_in(module)]
    assert len(found) >= len(modules) >= 3
    assert {program.name: remarks(program) for program in found} == {program.name: [] for program in found}
