"""Public suites that judge whatever says that it speaks OpenAI's API: what passes, by name, and nothing less."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.environments import COMPATCANARY, LLM_COMPLY, node, python
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import ScriptedServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODELS = ["plain", "self-consistency", "default"]
"""Two programs, and an upstream that is passed through."""


def _example(schema: dict[str, Any]) -> Any:
    """Something that is of the schema, as far as the suites' schemas go."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            properties: dict[str, dict[str, Any]] = schema.get("properties", {})
            return {name: _example(inner) for name, inner in properties.items()}
        case "array":
            return [_example(schema.get("items", {}))]
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case _:
            return "Paris"


def _obedient(body: dict[str, Any]) -> dict[str, Any] | str:
    """A model that calls the tool that it is given, and answers in the shape that it is asked for."""
    wanted: dict[str, Any] = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return json.dumps(_example(wanted["json_schema"]["schema"]))
    if wanted.get("type") == "json_object":
        return "{}"
    offered: list[dict[str, Any]] = body.get("tools") or []
    tools: list[dict[str, Any]] = [tool["function"] for tool in offered]
    if tools and body.get("tool_choice") != "none" and not any(m["role"] == "tool" for m in body["messages"]):
        function = {"name": tools[0]["name"], "arguments": json.dumps(_example(tools[0].get("parameters") or {}))}
        return {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    return "OK. Answer: 1, 2, 3, 4, 5."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with (
        ScriptedServer(_obedient) as up,
        serving(tmp_path_factory.mktemp("compliance"), upstream(up.base_url, retries=0)) as made,
    ):
        eventually("it is ready", lambda: made.ask("GET", "/readyz").status == 200)
        yield made


def _judged(command: Sequence[str], folder: Path) -> Any:
    """What a suite reports; it ends with an error where not all has passed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    begin = done.stdout.find("{")
    assert begin >= 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout[begin:])


COMPLY = {
    "chat-basic-response": "passed",
    "chat-system-prompt": "passed",
    "chat-multi-turn": "passed",
    "chat-tool-calling": "passed",
    "chat-streaming-response": "passed",
    "chat-streaming-usage": "passed",
    "chat-image-input": "passed",
    # The suite itself leaves it out where the model is not by name one of OpenAI's that reason.
    "chat-reasoning-summary": "skipped",
    "chat-error-handling": "passed",
}


@pytest.mark.parametrize("model", MODELS)
def test_llm_comply_passes(model: str, server: Server, tmp_path: Path) -> None:
    program = python(*LLM_COMPLY).interpreter.with_name("llm-comply")
    asked = ["--format", "openai-chat", "-u", server.base_url, "-k", "unused", "-m", model, "--json"]
    results = _judged([str(program), *asked], tmp_path)["results"]
    found = {result["id"]: result["status"] for result in results}
    assert found == COMPLY, results


CANARY = {
    "models.list": "pass",
    "chat.basic": "pass",
    "chat.streaming": "pass",
    "chat.tool_call": "pass",
    "chat.structured_output": "pass",
}


@pytest.mark.parametrize("model", MODELS)
def test_compatcanary_passes(model: str, server: Server, tmp_path: Path) -> None:
    environment = node("node-compatcanary", COMPATCANARY)
    script = environment.folder / "node_modules" / ".bin" / "compatcanary"
    asked = ["scan", "--base-url", server.base_url, "--model", model, "--profile", "chat", "--format", "json"]
    results = _judged([str(environment.interpreter), str(script), *asked], tmp_path)["results"]
    found = {result["id"]: result["status"] for result in results}
    assert found == CANARY, results
