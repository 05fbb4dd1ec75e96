"""docs/evaluation.md is run: its files are written, its commands given in its order, and what it prints is printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asmodel.evaluation import rankings, report, scorers
from asmodel.testing import ScriptedServer

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()

BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)

KNOWN = {"France": "Paris", "Japan": "Tokyo.", "Peru": "It is Lima."}
HINTED = {"Chad": "N'Djamena", "Mali": "Bamako"}


def model(body: dict[str, Any]) -> str:
    """A model that knows three capitals, and with a hint two more."""
    text = body["messages"][-1]["content"]
    if "Answer to judge" in text:
        return "Yes."
    known = KNOWN | HINTED if "It is in" in text else KNOWN
    return next((capital for country, capital in known.items() if country in text), "I do not know.")


def masked(text: str) -> str:
    """Without what no two runs have in common: times, and with them the width of columns."""
    text = re.sub(r"[\d.]+ (ms|s)\b|<0\.1 ms", "T", text)
    return re.sub(r"[ ]+", " ", re.sub(r"[\d.]+ answers a second", "T", text)).strip()


@pytest.mark.timeout(120)
def test_the_page_is_run_as_it_stands(tmp_path: Path) -> None:
    printed = ""
    with ScriptedServer(model) as upstream:
        environment = {
            **os.environ,
            "ASMODEL_UPSTREAMS__DEFAULT__BASE_URL": upstream.base_url,
            "ASMODEL_UPSTREAMS__DEFAULT__MODEL": "scripted",
            "ASMODEL_UPSTREAMS__DEFAULT__PRICE": '{"input": 1, "output": 2}',
        }
        for language, name, text in BLOCK.findall(PAGE):
            if name:
                (tmp_path / name).write_text(text)
            elif language == "sh":
                for line in text.splitlines():
                    words = shlex.split(line, comments=True)
                    done = subprocess.run(
                        [sys.executable, "-m", "asmodel.cli", *words[1:]],
                        cwd=tmp_path,
                        env=environment,
                        capture_output=True,
                        text=True,
                        timeout=50,
                        check=False,
                    )
                    assert done.returncode == 0, line + done.stdout + done.stderr
                    printed = done.stdout
            else:
                assert language == "text"
                assert masked(printed) == masked(text)


def test_every_scorer_is_on_the_page() -> None:
    for name in (*scorers.NAMES, *(f"{n}@K" for n in rankings.MEASURES if n != "mrr")):
        assert f"`{name}" in PAGE or f"`{name}@K`" in PAGE, name
    assert report.FORMAT in PAGE
