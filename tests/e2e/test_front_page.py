"""The front page in a real Chromium: asked, watched, stopped and opened, by hand and by keyboard, in light and in dark.

`python -m tests.e2e.test_front_page` takes the pictures of the documentation anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.browser import Browser
from tests.serving import Server, eventually, serving

from asmodel.testing import Fault, Received, ScriptedServer

pytestmark = pytest.mark.e2e

PROGRAMS = Path(__file__).parent / "front"
IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"
QUESTION = "How large is the wall of Visby, and when was it built?"
ANSWER = (
    "The town wall of Visby is nearly three and a half kilometres long, and some fifty of its towers still stand. "
    "Most of it was built in the second half of the thirteenth century, when the town on Gotland's west coast was "
    "one of the busiest harbours of the Baltic."
)
FINDINGS = {
    "atlas": "Visby, on the west coast of Gotland; a town wall of about 3.4 km, with towers.",
    "almanac": "The wall of Visby was raised in the 1250s and made higher in the 1280s.",
    "chronicle": "In the year 1288 the townsmen fought the farmers of the island before the gates.",
}
SPAN_ONLY = {"OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY"}
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 375, "height": 812}, "hasTouch": True, "isMobile": True}


def answers(body: dict[str, Any]) -> str | Fault | None:
    said = json.dumps(body)
    pause = int(hashlib.sha256(said.encode()).hexdigest()[:4], 16) / 65_536
    if "evil" in said:
        return EVIL
    if "Answer from these findings" in said:
        return Fault(delay=0.2, answer=ANSWER)
    if "How much does this help" in said:
        return Fault(delay=0.1 + pause * 0.3, answer="much" if pause > 0.5 else "a little")
    if "Look up in the" in said:
        if "Nowhere" in said:
            return Fault(delay=20.0, answer="Never mind.")
        return Fault(delay=0.15 + pause * 0.6, answer=next(text for book, text in FINDINGS.items() if book in said))
    if "fail" in said:
        return Fault(status=400, message=f"no such thing as {EVIL}")
    return None


def settings(base_url: str) -> str:
    return f"""
program_folders = [{json.dumps(str(PROGRAMS))}]

[upstreams.default]
base_url = "{base_url}"
model = "scripted"
retries = 0
price = {{ input = 0.15, output = 0.6 }}

[upstreams.fast]
base_url = "{base_url}"
model = "scripted-small"
retries = 0
price = {{ input = 0.05, output = 0.2 }}

[roles]
judge = "fast"

[models.careful]
program = "self-consistency"
params = {{ samples = 9 }}
description = "Nine chains of thought, and the answer that most of them agree on."

[traces]
jaeger = "http://127.0.0.1:16686"
"""


@contextmanager
def scripted(token_delay: float = 0.02) -> Generator[ScriptedServer]:
    with ScriptedServer(answers, token_delay=token_delay) as made:
        yield made


@pytest.fixture(scope="module")
def model() -> Generator[ScriptedServer]:
    with scripted() as made:
        yield made


@pytest.fixture(scope="module")
def front(model: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with serving(tmp_path_factory.mktemp("front"), settings(model.base_url), env=SPAN_ONLY) as made:
        yield made


@pytest.fixture(scope="module")
def keyed(model: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    text = settings(model.base_url) + '[keys]\nalice = "the-kéy-of-alice"\nbob = "the-key-of-bob"\n'
    with serving(tmp_path_factory.mktemp("keyed"), text) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    with Browser() as made:
        yield made


WATCH = """
window.seen = [];
new MutationObserver(() => {
  const text = (at) => (document.querySelector(at) || {}).textContent || "";
  window.seen.push({ state: text("#state"), progress: text("#progress"), answer: text("#answer"),
    first: text("#runs tr:first-child .badge"), stop: !document.querySelector("#stop").hidden });
}).observe(document.querySelector("#home"), { subtree: true, childList: true, characterData: true, attributes: true });
"""
"""Notes what the page shows each time that it changes, whatever else the machine is busy with."""


def home(server: Server) -> str:
    return server.base_url.removesuffix("/v1") + "/"


def focused(browser: Browser) -> str:
    """What has the focus: its id, or else its text."""
    return str(
        browser.run("document.activeElement.id || document.activeElement.innerText || document.activeElement.value")
    )


def tab_to(browser: Browser, what: str, key: str = "Tab", most: int = 60) -> None:
    """Press the key until it has the focus."""
    for _ in range(most):
        browser.press(key)
        if focused(browser) == what:
            return
    raise AssertionError(f"{what} is not reached by {most} times {key}")


def quiet(browser: Browser, server: Server) -> None:
    """The page has complained of nothing, and asked nobody but its server."""
    assert browser.noted == []
    assert {address for address in browser.asked if not address.startswith(home(server))} == set()


def test_a_program_is_asked_watched_and_its_run_opened(browser: Browser, front: Server) -> None:
    browser.open(home(front), **DESK)
    browser.click("input[value=gazetteer]")
    browser.fill("#question", QUESTION)
    browser.run(WATCH)
    browser.click("#send")
    browser.wait("#state:text('done')")
    # The run in the list, and what the steps have come to, are seen before there is an answer; then it grows.
    seen: list[dict[str, Any]] = browser.run("window.seen")
    asking = [s for s in seen if s["state"] == "asking" and s["stop"]]
    assert {s["answer"] for s in asking} == {""}
    assert any(s["progress"] for s in asking)
    assert any(s["first"] == "running" for s in seen)
    parts = dict.fromkeys(s["answer"] for s in seen if s["state"] == "answering")
    assert len(parts) > 2
    assert all(ANSWER.startswith(part) for part in parts)
    assert browser.text("#answer") == ANSWER
    lines = [line.split("\n") for line in browser.tell("texts", at="#progress li")]
    assert [line[0] for line in lines] == ["look up · finding", "weigh · weight", "answer"]
    assert [line[-1] for line in lines] == ["9 of 9", "9 of 9", "1 of 1"]
    tiles = dict(zip(browser.tell("texts", at="#receipt dt"), browser.tell("texts", at="#receipt dd"), strict=True))
    assert (tiles["steps"], tiles["calls"]) == ("19", "19")
    assert tiles["cost"].startswith("$0.000")
    assert browser.tell("texts", at="#cited li")[0].startswith("atlas 1 Visby, on the west coast")
    assert "Answered." in browser.text("#say")
    browser.wait("#stop", "hidden")
    browser.click("#ids >> text=Open the run")
    browser.wait("#drawing h1")
    assert browser.text("#drawing h1") == "gazetteer"
    assert focused(browser) == "gazetteer"
    for words in ("program gazetteer", "part look up", "step finding x9", "step answer"):
        browser.wait(f".panel .name:has-text('{words}')")
    assert QUESTION in browser.text("#drawing")
    assert str(browser.run("document.querySelector('#run-jaeger').href")).startswith("http://127.0.0.1:16686/trace/")
    # A name leads to what the step was shown; the buttons fold.
    browser.click(".name a:text('step answer')")
    browser.wait(".card[open] pre >> text=Answer from these findings")
    browser.click("button[data-of='.span'][data-open='0']")
    assert browser.tell("count", at="details.span[open]") == 0
    address = str(browser.tell("address"))
    # The answer is still there when one comes back; and a run has an address of its own.
    browser.click("text=All runs")
    assert browser.text("#answer") == ANSWER
    browser.tell("back")
    browser.wait("#drawing h1")
    browser.tell("go", url=address)
    browser.wait("#drawing h1")
    quiet(browser, front)


def test_parameters_and_roles_are_sent_as_they_are_filled_in(
    browser: Browser, front: Server, model: ScriptedServer
) -> None:
    browser.open(home(front), **DESK)
    browser.click("input[value=gazetteer]")
    browser.click("#params-box > summary")
    browser.fill("[data-param=books]", "atlas\n\n  chronicle ")
    browser.fill("[data-param=pages]", "2")
    browser.tell("select", at="[data-param=style]", value='"long"')
    browser.tell("select", at="[data-param=careful]", value="true")
    browser.click("#params-switch")
    given = json.loads(str(browser.run("document.querySelector('#params-json').value")))
    assert given == {"books": ["atlas", "chronicle"], "pages": 2, "style": "long", "careful": True}
    browser.fill("#params-json", json.dumps({**given, "pages": 1}))
    browser.click("#params-switch")
    assert browser.run("document.querySelector('[data-param=pages]').value") == "1"
    browser.click("#roles-box > summary")
    browser.tell("select", at="[data-role=reader]", value="fast")
    browser.fill("#question", "Which gate is the oldest?")
    model.clear()
    browser.click("#send")
    browser.wait("#state:text('done')")
    asked = [r for r in model.requests if "oldest" in json.dumps(r.body)]
    assert sorted(r.body["model"] for r in asked) == ["scripted", *["scripted-small"] * 4]
    # The same again is in the cache, and may be had only from there.
    browser.tell("select", at="#cache", value="only")
    model.clear()
    browser.click("#send")
    browser.wait("#state:text('done')")
    assert model.requests == []
    # What is wrong is told by the server, in its words.
    browser.click("#params-switch")
    browser.fill("#params-json", '{"pages": 99}')
    browser.click("#send")
    browser.wait("#state:text('failed')")
    assert "pages" in browser.text("#failure")
    # What is no JSON does not get that far.
    browser.fill("#params-json", "{pages")
    browser.click("#send")
    assert "not JSON" in browser.text("#trouble")
    assert [n for n in browser.noted if "400" not in n] == []


def test_stop_ends_the_run_and_its_calls(browser: Browser, front: Server, model: ScriptedServer) -> None:
    browser.open(home(front), **DESK)
    browser.click("input[value=gazetteer]")
    browser.fill("#question", "Where is Nowhere?")
    model.clear()
    browser.click("#send")
    eventually("the calls are on their way", lambda: len(model.requests) == 9)
    browser.click("#stop")
    browser.wait("#state:text('stopped')")

    def left() -> bool:
        found: list[Received] = model.requests
        return all(request.left_at is not None for request in found)

    eventually("the upstream's calls have ended", left, 5.0)
    browser.wait("#runs tr:first-child .badge:text('cancelled')")
    assert browser.run("document.querySelector('#send').disabled") is False
    assert browser.noted == []


def test_it_is_used_by_keyboard_alone(browser: Browser, front: Server) -> None:
    browser.open(home(front), **DESK)
    browser.wait("#home")
    browser.press("Tab")
    assert focused(browser) == "Skip to the content"
    tab_to(browser, "careful")
    browser.press("ArrowDown")
    assert focused(browser) == "gazetteer"
    assert browser.text("#about h3") == "gazetteer"
    tab_to(browser, "question")
    browser.type(QUESTION)
    browser.press("Control+Enter")
    browser.wait("#state:text('done')")
    tab_to(browser, "Open the run")
    browser.press("Enter")
    browser.wait("#drawing h1")
    assert focused(browser) == "gazetteer"
    tab_to(browser, "Unfold all")
    browser.press("Enter")
    assert browser.tell("count", at="details.span:not([open])") == 0
    tab_to(browser, "← All runs", "Shift+Tab")
    browser.press("Enter")
    browser.wait("#answer")
    tab_to(browser, "question")
    browser.press("End")
    browser.type(" Where is Nowhere?")
    browser.press("Control+Enter")
    browser.wait("#stop")
    browser.press("Escape")
    browser.wait("#state:text('stopped')")
    quiet(browser, front)


def test_nothing_of_a_run_acts_in_the_page(browser: Browser, front: Server) -> None:
    browser.open(home(front), **DESK)
    for chosen, question, where in (
        ("plain", "evil", "#answer"),
        ("default", "evil", "#answer"),
        ("plain", "fail", "#failure"),
    ):
        browser.click(f"input[value={chosen}]")
        browser.fill("#question", f"{question} {EVIL}")
        browser.click("#send")
        browser.wait("#receipt")
        browser.wait("#send:not([disabled])")
        assert EVIL in browser.text(where), where
        browser.click("#ids >> text=Open the run")
        browser.wait("#drawing h1")
        assert EVIL in browser.text("#drawing")
        browser.click("text=All runs")
    assert browser.tell("count", at="main img") == 0
    # The browser itself notes that a response was no 200.
    assert [note for note in browser.noted if "the server responded with a status of" not in note] == []


def test_markup_cannot_be_put_into_the_page_by_any_other_way(browser: Browser, front: Server) -> None:
    browser.open(home(front), **DESK)
    browser.wait("#home")
    blocked = browser.run(
        """(() => { const failed = [];
        try { document.querySelector("#answer").innerHTML = "<b>x</b>"; } catch (e) { failed.push("innerHTML"); }
        try { trustedTypes.createPolicy("another", {}); } catch (e) { failed.push("policy"); }
        const script = document.createElement("script"), image = document.createElement("img");
        try { script.textContent = "window.ran = 1"; } catch (e) { failed.push("script"); }
        try { image.setAttribute("onerror", "window.ran = 1"); } catch (e) { failed.push("handler"); }
        image.src = "data:,";
        document.body.append(script, image);
        return failed; })()"""
    )
    assert set(blocked) == {"innerHTML", "policy", "script", "handler"}
    time.sleep(0.2)
    assert browser.run("window.ran === undefined") is True
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'sent', (e) => 'blocked')") == "blocked"


def test_a_key_is_asked_for_kept_in_the_tab_and_shows_the_own_runs_alone(browser: Browser, keyed: Server) -> None:
    browser.open(home(keyed), **DESK)
    browser.wait("#lock")
    assert focused(browser) == "key"
    browser.type("no key of theirs")
    browser.press("Enter")
    browser.wait("#trouble")
    browser.fill("#key", "the-kéy-of-alice")
    browser.press("Enter")
    browser.wait("#home")
    browser.click("input[value=plain]")
    browser.fill("#question", "Of Alice?")
    browser.click("#send")
    browser.wait("#state:text('done')")
    browser.wait("#runs tr")
    assert "as alice" in browser.text("#foot")
    browser.click("#runs a")
    browser.wait("#drawing h1")
    address = str(browser.tell("address"))
    assert "Of Alice?" not in browser.text("#drawing")  # content is not captured
    browser.tell("reload")
    browser.wait("#drawing h1")
    assert browser.run("document.cookie + JSON.stringify(localStorage)") == "{}"
    browser.click("#forget")
    browser.wait("#lock")
    assert browser.run("JSON.stringify(sessionStorage)") == "{}"
    assert browser.tell("count", at="#drawing *") == 0
    # Another, in another window, at the same address.
    browser.open(address, **DESK)
    browser.wait("#lock")
    browser.fill("#key", "the-key-of-bob")
    browser.press("Enter")
    browser.wait("#no-run")
    assert "no such run" in browser.text("#no-run")
    browser.click("text=All runs")
    browser.wait("#no-runs")
    assert browser.tell("count", at="#runs tr") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [DESK, PHONE], ids=["desk", "phone"])
def test_it_can_be_read_and_used_by_all(
    browser: Browser, front: Server, keyed: Server, scheme: str, window: dict[str, Any]
) -> None:
    browser.open(home(front), colorScheme=scheme, **window)
    browser.click("input[value=evidence-qa]")
    browser.click("#params-box > summary")
    browser.click("#roles-box > summary")
    assert browser.faults() == []
    browser.click("input[value=gazetteer]")
    browser.fill("#question", QUESTION)
    browser.click("#send")
    browser.wait("#state:text('done')")
    browser.wait("#runs tr")
    assert browser.faults() == []
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(wide) == 0
    light = browser.run("matchMedia('(prefers-color-scheme: light)').matches")
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (light, ground) == ((True, "rgb(251, 250, 248)") if scheme == "light" else (False, "rgb(20, 22, 26)"))
    browser.click("#ids >> text=Open the run")
    browser.wait("#drawing h1")
    assert browser.faults() == []
    assert browser.run(wide) == 0
    quiet(browser, front)
    browser.open(home(keyed), colorScheme=scheme, **window)
    browser.wait("#lock")
    assert browser.faults() == []


def pictures(folder: Path) -> None:
    """Those of the documentation."""
    with (
        tempfile.TemporaryDirectory() as place,
        scripted(token_delay=0.06) as model,
        serving(Path(place), settings(model.base_url), env=SPAN_ONLY) as server,
        Browser() as browser,
    ):
        for chosen, question in (("careful", "How many towers had it?"), ("plain", "fail"), ("gazetteer", QUESTION)):
            server.chat({"model": chosen, "messages": [{"role": "user", "content": question}]})
        browser.open(home(server), viewport={"width": 1240, "height": 1090}, deviceScaleFactor=1.25)
        browser.click("input[value=gazetteer]")
        browser.fill("#question", QUESTION)
        browser.tell("select", at="#cache", value="refresh")
        browser.click("#send")
        browser.wait("#state:text('answering')")
        eventually("most of it is there", lambda: len(browser.text("#answer")) > len(ANSWER) * 0.7)
        browser.shot(folder / "front-page.png")
        browser.wait("#state:text('done')")
        browser.click("#ids >> text=Open the run")
        browser.wait("#drawing h1")
        browser.shot(folder / "front-page-run.png")
        browser.open(home(server), viewport={"width": 390, "height": 844}, deviceScaleFactor=2, colorScheme="dark")
        browser.click("input[value=gazetteer]")
        browser.fill("#question", QUESTION)
        browser.click("#send")
        browser.wait("#state:text('done')")
        browser.run("document.querySelector('#result').scrollIntoView()")
        browser.shot(folder / "front-page-phone.png")


if __name__ == "__main__":
    pictures(IMAGES)
