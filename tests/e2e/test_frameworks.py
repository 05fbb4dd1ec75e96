"""Conversations as people have them through the frameworks that they use: streamed, with a tool call in the middle."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.environments import AI_PACKAGES, FRAMEWORKS, node, python
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import ScriptedServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CLIENTS = Path(__file__).parent / "clients"
QUESTION = "How warm is it in Velden?"
ANSWER = "It is 21 degrees in Velden, so a coat is not needed."
NAMES = [*FRAMEWORKS, "ai-compatible", "ai-openai"]


def _scripted(body: dict[str, Any]) -> dict[str, Any] | str:
    """A model that looks at the tool once, and answers with what it has heard."""
    heard = [m for m in body["messages"] if m["role"] == "tool"]
    if heard:
        assert "21 degrees in Velden" in json.dumps(heard[-1]["content"])
        return ANSWER
    function = {"name": "weather", "arguments": '{"city": "Velden"}'}
    return {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}


@pytest.fixture(scope="module")
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer(_scripted) as made:
        yield made


@pytest.fixture(scope="module")
def server(up: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("frameworks"), upstream(up.base_url, retries=0)) as made:
        eventually("it is ready", lambda: made.ask("GET", "/readyz").status == 200)
        yield made


def _converse(name: str, server: Server, model: str, folder: Path) -> dict[str, Any]:
    """What the framework's user sees."""
    if name in FRAMEWORKS:
        environment, script = python(*FRAMEWORKS[name]), CLIENTS / "frameworks.py"
    else:
        environment, script = node("node-ai", AI_PACKAGES), CLIENTS / "ai.mjs"
    own = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "PYTHON"))}
    done = subprocess.run(
        [str(environment.interpreter), str(environment.script(script)), name, server.base_url, model, QUESTION],
        cwd=folder,
        env={**own, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{name} with {environment.versions}:\n{done.stderr[-3000:]}"
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.parametrize("model", ["plain", "default"])
@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_conversation_with_a_tool_call_comes_to_its_answer(
    name: str, model: str, server: Server, up: ScriptedServer, tmp_path: Path
) -> None:
    up.clear()
    seen = _converse(name, server, model, tmp_path)
    assert seen["text"] == ANSWER
    assert seen["called"] == ["Velden"]
    assert seen["pieces"] > 1, "it is streamed"
    # What `plain` has answered before, to another framework's equal request, need not be asked again.
    assert len(up.requests) == 2 or model == "plain"
    assert all(request.body["stream"] is True for request in up.requests)
