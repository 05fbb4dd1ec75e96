"""schemathesis against a real server, by its own document: thousands of requests, and no answer that it has not."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.environments import SCHEMATHESIS, python
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import ScriptedServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

HOOKS = Path(__file__).parent / "clients" / "schemathesis_hooks.py"
CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "no_fault_of_the_servers_own",
)
CASES = 2000
"""At least; what is made of the document's examples and bounds comes on top."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ScriptedServer() as up:
        settings = upstream(up.base_url, retries=0)
        with serving(tmp_path_factory.mktemp("openapi"), settings) as made:
            eventually("it is ready", lambda: made.ask("GET", "/readyz").status == 200)
            yield made


def _cases(report: Path) -> Iterator[dict[str, Any]]:
    """Every request that was made, as the report tells it."""
    for line in report.read_text().splitlines():
        event = json.loads(line)
        scenario = event.get("ScenarioFinished")
        if scenario is not None:
            yield from scenario["recorder"].get("interactions", {}).values()


def _status(case: dict[str, Any]) -> int | None:
    response: dict[str, Any] | None = case.get("response")
    return None if response is None else response["status_code"]


def test_thousands_of_requests_bring_no_answer_that_the_document_has_not(server: Server, tmp_path: Path) -> None:
    environment = python(*SCHEMATHESIS)
    report = tmp_path / "events.ndjson"
    command = [
        *(str(environment.interpreter.with_name("st")), "run", f"http://127.0.0.1:{server.port}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--mode", "all"),
        *("--max-examples", "100", "--seed", "1", "--workers", "1", "--continue-on-failure"),
        *("--request-timeout", "30", "--suppress-health-check", "all", "--generation-database", "none", "--no-color"),
        *("--report-ndjson-path", str(report)),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    statuses = Counter(_status(case) for case in _cases(report))
    assert sum(statuses.values()) >= CASES, statuses
    assert statuses[200] >= CASES / 20, statuses
    print(f"schemathesis: {sum(statuses.values())} requests, {dict(statuses)}")
    assert statuses[None] == 0, "every request is answered in time"
    assert server.process.poll() is None
    assert "Traceback" not in server.said
