"""The public typing is what we say it is, to mypy and to pyright alike.

`tests/typing/ok_*.py` must pass both checkers in strict mode. In `wrong_*.py` each line that ends in `# error` (or in
`# error: why`) must be an error in both, and no other line may be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = Path(__file__).resolve().parent / "typing"
SOURCES = [ROOT / room for room in ("proxy", "programs", "plugins")]

MARKED = re.compile(r"#\s*error\b[^#]*$")


class Place(NamedTuple):
    file: str
    line: int


Errors = dict[Place, list[str]]
"""What a checker said, by where."""


def mypy(files: Sequence[Path], scratch: Path) -> Errors:
    settings = scratch / "mypy.ini"
    path = ":".join(map(str, SOURCES))
    settings.write_text(f"[mypy]\nstrict = true\npython_version = 3.11\nmypy_path = {path}\n")
    command = [sys.executable, "-m", "mypy", "--output", "json", "--no-error-summary"]
    command += ["--config-file", str(settings), "--cache-dir", str(scratch / "mypy_cache"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=scratch)
    assert done.returncode in {0, 1}, f"mypy did not finish: {done.stdout}{done.stderr}"
    cases = {file.resolve() for file in files}
    found: Errors = {}
    for text in done.stdout.splitlines():
        said: dict[str, Any] = json.loads(text)
        file = (scratch / said["file"]).resolve()
        # Of what they import, mypy checks the bodies too; that is for `make check` to say.
        if said["severity"] == "error" and file in cases:
            found.setdefault(Place(str(file), said["line"]), []).append(f"{said['message']} [{said['code']}]")
    return found


def pyright(files: Sequence[Path], scratch: Path) -> Errors:
    """In pyright's own strict mode. basedpyright, since it brings its engine along and so runs without a network."""
    settings = scratch / "pyrightconfig.json"
    settings.write_text(
        json.dumps(
            {
                "include": [str(file) for file in files],
                "extraPaths": [str(source) for source in SOURCES],
                "pythonVersion": "3.11",
                "typeCheckingMode": "strict",
            }
        )
    )
    command = [sys.executable, "-m", "basedpyright", "--project", str(settings), "--outputjson"]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=scratch)
    assert done.returncode in {0, 1}, f"pyright did not finish: {done.stdout}{done.stderr}"
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files), f"pyright read {report['summary']['filesAnalyzed']} files"
    found: Errors = {}
    for said in report["generalDiagnostics"]:
        if said["severity"] == "error":
            place = Place(str(Path(said["file"]).resolve()), said["range"]["start"]["line"] + 1)
            found.setdefault(place, []).append(f"{said['message']} [{said.get('rule', 'syntax')}]")
    return found


def expected(files: Sequence[Path]) -> set[Place]:
    """Every line marked `# error`, which only a file named `wrong_…` may have."""
    places: set[Place] = set()
    for file in files:
        marked = {
            Place(str(file.resolve()), number)
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
            if MARKED.search(line)
        }
        assert bool(marked) == file.name.startswith("wrong_"), f"{file.name}: `# error` belongs in wrong_*.py, in each"
        places |= marked
    return places


def complaints(folder: Path, scratch: Path) -> list[str]:
    """Where a checker and the marks in `folder` differ; empty if nowhere."""
    files = sorted([*folder.glob("ok_*.py"), *folder.glob("wrong_*.py")])
    assert files, f"no ok_*.py or wrong_*.py in {folder}"
    wanted = expected(files)
    found: list[str] = []
    for checker in (mypy, pyright):
        said = checker(files, scratch)
        for place in sorted(said.keys() - wanted):
            found.append(f"{Path(place.file).name}:{place.line}: {checker.__name__} says: {'; '.join(said[place])}")
        for place in sorted(wanted - said.keys()):
            found.append(f"{Path(place.file).name}:{place.line}: {checker.__name__} finds nothing wrong")
    return found


@pytest.mark.timeout(480)
def test_the_public_typing_holds_in_both_checkers(tmp_path: Path) -> None:
    found = complaints(CASES, tmp_path)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.timeout(240)
def test_what_is_not_as_marked_is_reported_for_each_checker(tmp_path: Path) -> None:
    cases, scratch = tmp_path / "cases", tmp_path / "scratch"
    cases.mkdir()
    scratch.mkdir()
    (cases / "ok_values.py").write_text('number: int = 1\ntext: int = "two"\n')
    (cases / "wrong_values.py").write_text(
        'a: int = "one"  # error\nb: int = "two"  # error: a reason\nc: int = 3  # error\nd: int = "four"\ne: int = 5\n'
    )
    found = complaints(cases, scratch)
    for checker in ("mypy", "pyright"):
        assert any(line.startswith(f"ok_values.py:2: {checker} says: ") for line in found)
        assert f"wrong_values.py:3: {checker} finds nothing wrong" in found
        assert any(line.startswith(f"wrong_values.py:4: {checker} says: ") for line in found)
    assert len(found) == 6


@pytest.mark.timeout(240)
def test_files_that_are_as_marked_pass(tmp_path: Path) -> None:
    cases, scratch = tmp_path / "cases", tmp_path / "scratch"
    cases.mkdir()
    scratch.mkdir()
    (cases / "ok_call.py").write_text("from asmodel.calls import KEY_VERSION\n\nnumber: int = KEY_VERSION\n")
    (cases / "wrong_call.py").write_text("from asmodel.calls import KEY_VERSION\n\ntext: str = KEY_VERSION  # error\n")
    assert complaints(cases, scratch) == []


def test_a_mark_in_a_file_that_must_pass_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ok_values.py").write_text('a: int = "one"  # error\n')
    with pytest.raises(AssertionError, match="wrong_"):
        complaints(tmp_path, tmp_path)
