"""The front page: who gets what of it, that nothing of a run can act in it, and that it stands in nobody's way."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message
from tests.serving import Answered, Server, eventually, serving, upstream

import asmodel.front_page
from asmodel.access import Access
from asmodel.front_page.serving import POLICY, FrontPage
from asmodel.models import Models
from asmodel.testing import Fault, Received, ScriptedServer

ROOT = Path(__file__).parent.parent
FILES = Path(asmodel.front_page.__file__).parent
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
PROGRAM = '''
"""Says what it is told, after a step or two."""

from typing import Literal

from asmodel import Run, program, step
from pydantic import BaseModel, Field


class Params(BaseModel):
    samples: int = Field(default=3, ge=1, le=9, description="How many are asked.")
    tone: Literal["dry", "warm"] = "dry"


@step(model="reader")
def saying(question: str) -> str:
    return question


@program("teller", params=Params)
async def teller(run: Run[Params]) -> str:
    run.note(**{"EVIL": 1})
    with run.part("EVIL", of=1):
        return await run.reply(saying, run.question)
'''.replace("EVIL", EVIL)
SPAN_ONLY = {"OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY"}
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
ALICE = {"authorization": "Bearer the-key-of-alice"}
BOB = {"authorization": "Bearer the-key-of-bob"}


def answers(body: dict[str, Any]) -> str | Fault | None:
    said = json.dumps(body)
    if "slowly" in said:
        return Fault(delay=1.5, answer="At last.")
    return EVIL if "evil" in said else None


@pytest.fixture(scope="module")
def model() -> Generator[ScriptedServer]:
    with ScriptedServer(answers) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("front")
    (made / "programs").mkdir()
    (made / "programs" / "teller.py").write_text(PROGRAM)
    return made


@pytest.fixture(scope="module")
def server(model: ScriptedServer, folder: Path) -> Generator[Server]:
    """Without keys, with content."""
    settings = "\n".join(
        [
            'program_folders = ["programs"]',
            upstream(model.base_url, api_key="a-key-of-ours"),
            '[models.brief]\nprogram = "teller"\nparams = { samples = 1 }\ndescription = "One is asked."',
            '[traces]\njaeger = "http://127.0.0.1:16686/"',
        ]
    )
    with serving(folder, settings, env=SPAN_ONLY) as made:
        yield made


@pytest.fixture(scope="module")
def locked(model: ScriptedServer, tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Generator[Server]:
    """With keys, and without content."""
    settings = upstream(model.base_url) + '[keys]\nalice = "the-key-of-alice"\nbob = "the-key-of-bob"\n'
    with serving(tmp_path_factory.mktemp("locked"), settings, "--programs", str(folder / "programs")) as made:
        yield made


def ask(server: Server, text: str, headers: dict[str, str] | None = None, name: str = "teller") -> Answered:
    body = {"model": name, "messages": [{"role": "user", "content": text}]}
    answered = server.chat(body, headers or {})
    assert answered.status == 200, answered.body
    return answered


def listed(server: Server, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    answered = server.ask("GET", "/front/runs", headers=headers or {})
    assert answered.status == 200, answered.body
    found: list[dict[str, Any]] = answered.json["runs"]
    return found


def the_run(server: Server, answered: Answered, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The run in the list, once it has ended there."""
    trace = answered.headers["x-asmodel-trace-id"]

    def ended() -> dict[str, Any] | None:
        return next((r for r in listed(server, headers) if r["trace_id"] == trace and r["outcome"] != "running"), None)

    found: dict[str, Any] = eventually("the run is listed", ended)
    return found


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# ---- the page itself ----


def test_a_browser_gets_a_page_under_a_strict_policy(server: Server) -> None:
    for path in ("/", "/runs/run_0011223344556677"):
        page = server.ask("GET", path, headers=BROWSER)
        assert page.status == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert policy == POLICY
        for rule in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
            assert rule in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"


def test_the_page_has_no_script_and_no_style_inside_and_loads_only_its_own_files(server: Server) -> None:
    html = server.ask("GET", "/", headers=BROWSER).body.decode()
    loaded: list[str] = []
    for tag, attributes in Elements(html).found:
        assert tag not in ("style", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        address = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
        if address:
            loaded.append(address)
            assert address.startswith("/front/"), address
    assert "<script src=" in html
    assert re.search(r"<script(?! src=)", html) is None
    for address in dict.fromkeys(loaded):
        file = server.ask("GET", address)
        assert file.status == 200, address
        assert file.headers["x-content-type-options"] == "nosniff"
        again = server.ask("GET", address, headers={"if-none-match": file.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
    script = (FILES / "page.js").read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        'setAttribute("on',
    ):
        assert word not in script
    assert re.findall(r"https?://", script) == []


def test_who_asks_without_a_browser_is_told_the_routes(server: Server) -> None:
    answered = server.ask("GET", "/", headers={"accept": "*/*"})
    assert answered.status == 200
    assert answered.headers["content-type"] == "application/json"
    assert {"POST /v1/chat/completions", "GET /v1/models", "GET /v1/models/{id}", "GET /"} <= set(
        answered.json["routes"]
    )
    assert server.ask("HEAD", "/", headers=BROWSER).body == b""
    assert server.ask("POST", "/", b"{}").error["code"] == "method_not_allowed"
    assert server.ask("GET", "/front/page.html").error["code"] == "run_not_found"
    assert server.ask("GET", "/front/serving.py").status == 404


def test_the_page_is_in_what_is_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    import zipfile

    inside = {name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist() if "/front_page/" in name}
    assert {"page.html", "page.css", "page.js", "icon.svg", "serving.py"} <= inside


def test_it_can_be_switched_off(model: ScriptedServer, tmp_path: Path) -> None:
    settings = "front_page = false\n" + upstream(model.base_url) + "[traces]\nlocal = false\n"
    with serving(tmp_path, settings) as server:
        for path in ("/", "/runs/run_0011223344556677", "/front/page.js", "/front/about", "/front/runs"):
            assert server.ask("GET", path, headers=BROWSER).error["code"] == "not_found"


def test_where_no_runs_are_kept_the_page_says_so(model: ScriptedServer, tmp_path: Path) -> None:
    with serving(tmp_path, upstream(model.base_url) + "[traces]\nlocal = false\n") as server:
        assert server.ask("GET", "/front/about").json["runs_kept"] is False
        assert listed(server) == []
        assert server.ask("GET", "/front/runs/run_0011223344556677").error["code"] == "run_not_found"


def test_nothing_of_it_is_imported_before_it_is_asked_for() -> None:
    code = """
import asyncio, sys
from asmodel.app import create_app
from asmodel.settings import Settings
app = create_app(Settings(upstreams={"default": {"kind": "embedded"}}, cache={"kind": "off"}))
before = {name for name in sys.modules if name.startswith(("asmodel.front_page", "asmodel.trace_html"))}
assert not before, before
async def ask():
    sent = []
    async def send(message): sent.append(message)
    async def receive(): return {"type": "http.disconnect"}
    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "scheme": "http",
             "headers": [(b"host", b"localhost"), (b"accept", b"text/html")], "root_path": ""}
    await app(scope, receive, send)
    return sent[0]["status"]
assert asyncio.run(ask()) == 200
assert "asmodel.front_page.serving" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr


# ---- what is served ----


def test_it_tells_what_is_served_and_nothing_of_the_settings(server: Server) -> None:
    about = server.ask("GET", "/front/about").json
    models = {m["id"]: m for m in about["models"]}
    teller, brief, default = models["teller"], models["brief"], models["default"]
    assert (teller["kind"], teller["own"], teller["description"]) == (
        "program",
        True,
        "Says what it is told, after a step or two.",
    )
    assert teller["params"]["properties"]["samples"] == {
        "default": 3,
        "description": "How many are asked.",
        "maximum": 9,
        "minimum": 1,
        "title": "Samples",
        "type": "integer",
    }
    assert teller["roles"] == [{"role": "reader", "player": "default"}]
    assert (brief["kind"], brief["program"], brief["settled"]) == ("preset", "teller", ["samples"])
    assert models["plain"]["supports"] == ["audio", "images", "logprobs", "response_format", "tools"]
    assert default == {"id": "default", "kind": "upstream", "description": "", "upstream_kind": "openai"}
    assert about["jaeger"] == "http://127.0.0.1:16686"
    assert (about["keys"], about["caller"], about["content"], about["runs_kept"]) == (False, "", True, True)
    assert "a-key-of-ours" not in json.dumps(about)


# ---- runs ----


def test_a_run_is_listed_and_drawn_as_asmodel_trace_draws_it(server: Server) -> None:
    answered = ask(server, "Who rang the bell?")
    run = the_run(server, answered)
    assert (run["name"], run["program"], run["outcome"], run["error"]) == ("teller", True, "ok", None)
    assert (run["steps"], run["calls"], run["id"]) == (1, 1, answered.json["asmodel"]["run_id"])
    assert run["seconds"] > 0
    for id in (run["id"], run["trace_id"]):
        drawn = server.ask("GET", f"/front/runs/{id}")
        assert drawn.headers["cache-control"] == "no-store"
        told = drawn.json
        assert (told["title"], told["trace_id"], told["running"]) == ("teller", run["trace_id"], False)
        for words in ("<h1>teller</h1>", "Timeline", "step saying", 'class="bar"', "Who rang the bell?"):
            assert words in told["html"]
        assert "style=" not in told["html"]
    # The whole id and nothing less.
    for id in (run["id"][:-1], run["trace_id"][:8], "last", "%25", "x" * 200, "run_0000000000000000"):
        assert server.ask("GET", f"/front/runs/{id}").error["code"] == "run_not_found"


def test_a_model_that_is_passed_through_is_listed_too(server: Server) -> None:
    run = the_run(server, ask(server, "Straight on?", name="default"))
    assert (run["program"], run["id"], run["calls"]) == (False, run["trace_id"], 1)
    assert server.ask("GET", f"/front/runs/{run['id']}").status == 200


def test_a_run_is_seen_while_it_runs(server: Server) -> None:
    import threading

    asking = threading.Thread(target=ask, args=(server, "Please, slowly."))
    asking.start()
    try:
        running = eventually(
            "it is listed", lambda: next((r for r in listed(server) if r["outcome"] == "running"), None)
        )
        told = server.ask("GET", f"/front/runs/{running['id']}").json
        assert told["running"] is True
        assert ">running<" in told["html"]
    finally:
        asking.join()
    eventually("it has ended", lambda: not [r for r in listed(server) if r["outcome"] == "running"])


def test_nothing_that_was_asked_or_answered_becomes_markup(server: Server) -> None:
    run = the_run(server, ask(server, f"evil {EVIL}"))
    for path in (f"/front/runs/{run['id']}", "/front/runs", "/front/about"):
        assert server.ask("GET", path).headers["content-type"] == "application/json"
    html = server.ask("GET", f"/front/runs/{run['id']}").json["html"]
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    tags = {tag for tag, _ in Elements(html).found}
    assert not tags & {"img", "script", "iframe", "style", "link", "form"}
    assert not [a for _, attributes in Elements(html).found for a in attributes if a.startswith("on")]


def test_content_is_shown_only_where_it_is_captured_now(server: Server, folder: Path, model: ScriptedServer) -> None:
    run = the_run(server, ask(server, "A secret question?"))
    assert "A secret question?" in server.ask("GET", f"/front/runs/{run['id']}").json["html"]
    # The same file of runs, in a server that captures nothing.
    settings = (
        upstream(model.base_url) + f"[traces]\npath = {json.dumps(str(folder / 'state/asmodel/traces.sqlite'))}\n"
    )
    with serving(folder / "other", settings) as other:
        assert other.ask("GET", "/front/about").json["content"] is False
        told = other.ask("GET", f"/front/runs/{run['id']}").json
    assert "step saying" in told["html"]
    assert "secret" not in told["html"]


# ---- who may ----


def test_without_keys_only_this_machine_is_answered_and_only_its_own_pages(server: Server) -> None:
    run = the_run(server, ask(server, "Whose?"))
    paths = ("/", f"/runs/{run['id']}", "/front/page.js", "/front/about", "/front/runs", f"/front/runs/{run['id']}")
    for path in paths:
        for foreign in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
            refused = server.ask("GET", path, headers={**BROWSER, **foreign})
            assert refused.status == 403, (path, foreign)
            assert run["id"].encode() not in refused.body
    for path in paths[3:]:
        assert server.ask("GET", path, headers={"sec-fetch-site": "same-origin"}).status == 200
        for site in ("cross-site", "same-site"):
            assert server.ask("GET", path, headers={"sec-fetch-site": site}).status == 403
    # A link from elsewhere to the page is nothing bad.
    assert server.ask("GET", "/", headers={**BROWSER, "sec-fetch-site": "cross-site"}).status == 200


def test_with_keys_the_page_is_open_and_what_it_shows_is_not(locked: Server) -> None:
    page = locked.ask("GET", "/", headers=BROWSER)
    assert page.status == 200
    assert b"teller" not in page.body
    assert locked.ask("GET", "/front/page.js").status == 200
    for path in ("/front/about", "/front/runs", "/front/runs/run_0011223344556677"):
        for headers in ({}, {"authorization": "Bearer no-key"}, {"cookie": "key=the-key-of-alice"}):
            refused = locked.ask("GET", path, headers=headers)
            assert refused.status == 401
            assert refused.error["code"] == "invalid_api_key"
    about = locked.ask("GET", "/front/about", headers=ALICE).json
    assert (about["keys"], about["caller"], about["content"]) == (True, "alice", False)


def test_the_holder_of_a_key_sees_the_runs_of_that_key_alone(locked: Server) -> None:
    shared = {"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"}
    hers = the_run(locked, ask(locked, "Of Alice", {**ALICE, **shared}), ALICE)
    his = the_run(locked, ask(locked, "Of Bob", {**BOB, **shared}), BOB)
    passed = the_run(locked, ask(locked, "Of Alice, straight", ALICE, name="default"), ALICE)
    assert {r["id"] for r in listed(locked, ALICE)} == {hers["id"], passed["id"]}
    assert {r["id"] for r in listed(locked, BOB)} == {his["id"]}
    for id in (hers["id"], passed["id"], passed["trace_id"]):
        assert locked.ask("GET", f"/front/runs/{id}", headers=ALICE).status == 200
        refused = locked.ask("GET", f"/front/runs/{id}", headers=BOB)
        assert refused.error["code"] == "run_not_found"
        # As if there were none: nothing tells another's run from one that never was.
        assert refused.error == locked.ask("GET", "/front/runs/run_0000000000000000", headers=BOB).error
    # Both chose the same trace id, and each finds the own part of it.
    trace = locked.ask("GET", f"/front/runs/{'ab' * 16}", headers=BOB).json
    assert his["id"] in trace["html"]
    assert hers["id"] not in trace["html"]
    assert trace["html"].count("<h1>") == 1


def test_runs_of_a_server_without_keys_are_nobodys_with_keys(
    server: Server, folder: Path, model: ScriptedServer
) -> None:
    run = the_run(server, ask(server, "Before there were keys"))
    settings = upstream(model.base_url) + '[keys]\nalice = "the-key-of-alice"\n'
    settings += f"[traces]\npath = {json.dumps(str(folder / 'state/asmodel/traces.sqlite'))}\n"
    with serving(folder / "keyed", settings) as keyed:
        assert listed(keyed, ALICE) == []
        assert keyed.ask("GET", f"/front/runs/{run['id']}", headers=ALICE).error["code"] == "run_not_found"
        hers = the_run(keyed, ask(keyed, "With a key", ALICE, name="plain"), ALICE)
    assert hers["id"] not in {r["id"] for r in listed(server)}
    assert server.ask("GET", f"/front/runs/{hers['id']}").error["code"] == "run_not_found"


# ---- in nobody's way ----


async def test_a_file_of_runs_that_is_slow_to_read_halts_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that another process seems to be beginning is waited for, half a second, in vain."""
    path = tmp_path / "traces.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE stranger (x)")
    connection.commit()
    connection.close()
    page = FrontPage(Models([], {}), Access({}), {}, traces=path, jaeger=None, content=False, routes=[])
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/front/runs",
        "headers": [(b"host", b"localhost")],
        "path_params": {"name": "runs"},
    }
    turns = 0
    began = time.monotonic()
    asking = asyncio.gather(*(page(scope, receive, send) for _ in range(2)))
    while not asking.done():
        turns += 1
        await asyncio.sleep(0.001)
    await asking
    assert time.monotonic() - began >= 0.4
    assert turns >= 20
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == [503, 503]
    said = b"".join(m["body"] for m in sent if m["type"] == "http.response.body")
    assert b"runs_unreadable" in said
    assert str(path).encode() not in said
    assert str(path) in caplog.text


def test_what_the_page_asks_is_neither_traced_nor_counted_as_a_run(server: Server, model: ScriptedServer) -> None:
    before: list[Received] = list(model.requests)
    runs = [r["id"] for r in listed(server)]
    for path in ("/", "/front/about", "/front/runs", "/runs/run_0011223344556677"):
        server.ask("GET", path, headers=BROWSER)
    assert [r["id"] for r in listed(server)] == runs
    assert model.requests == before
