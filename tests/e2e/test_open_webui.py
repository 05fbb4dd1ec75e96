"""Open WebUI with asmodel's programs as its models, in a real Chromium: picked, asked, watched and stopped.

`python -m tests.e2e.test_open_webui` takes the pictures of the documentation anew.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.browser import Browser
from tests.e2e.open_webui import OpenWebUi
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import Fault, ScriptedServer, ServerAnswer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROGRAMS = Path(__file__).parent / "front"
DOCS = Path(__file__).parent.parent.parent / "docs"
QUESTION = "How large is the wall of Visby, and when was it built?"
ANSWER = (
    "The town wall of Visby is nearly three and a half kilometres long, and some fifty of its towers still stand. "
    "Most of it was built in the second half of the thirteenth century, when the town on Gotland's west coast was "
    "one of the busiest harbours of the Baltic."
)
TITLE = "Town Wall of Visby"
FOLLOW_UP = "Which of its gates is the oldest?"
TASK = "### Task:"
"""How the requests begin that Open WebUI makes by itself: for a title, tags, and what might be asked next."""
WEIGHED_UNSEEN = 4
"""So many of the nine weights are answered before the test has seen the progress."""
SO_FAR = {"look up · finding 9/9", f"weigh · weight {WEIGHED_UNSEEN}/9"}
DESK = {"viewport": {"width": 1000, "height": 620}}
KEY = "the-key-of-alice"

PICKER = "button[aria-label^='Selected model']"
DONE = "button[aria-label=Regenerate]"
"""A button below an answer that is whole."""
MESSAGES = "[role=log] [id^=message-]"
PARTS = ("look up · ", "weigh · ", "answer ")
"""How the lines of progress begin."""


class Upstream:
    """The model of everything: it holds up the second half of a program until it is told to go on."""

    def __init__(self, token_delay: float = 0.02) -> None:
        self.server = ScriptedServer(self._answer, token_delay=token_delay)
        self._looked_up = self._weighed = 0
        self._go_on = threading.Event()

    def hold(self) -> None:
        self.server.clear()
        self._looked_up = self._weighed = 0
        self._go_on.clear()

    def go_on(self) -> None:
        self._go_on.set()

    def asked(self, words: str) -> list[dict[str, Any]]:
        """The bodies of the requests with the words in them."""
        return [request.body for request in self.server.requests if words in json.dumps(request.body)]

    async def _answer(self, body: dict[str, Any]) -> ServerAnswer:
        said = json.dumps(body)
        if TASK in said:
            if "concise title" in said:
                return json.dumps({"title": TITLE})
            return json.dumps({"follow_ups": [FOLLOW_UP]} if "follow_ups" in said else {"tags": ["History"]})
        if "Look up in the" in said:
            if "Nowhere" in said:
                return Fault(delay=60.0)
            self._looked_up += 1
            # One after another, as people see it.
            return Fault(delay=0.1 * self._looked_up, answer="Visby has a town wall of about 3.4 km, with towers.")
        if "How much does this help" in said:
            self._weighed += 1
            if self._weighed > WEIGHED_UNSEEN:
                await asyncio.to_thread(self._go_on.wait, 60.0)
            return "much"
        if "fail" in said:
            return Fault(status=400, message="no such thing")
        # Long enough for the last steps before it to be told.
        return Fault(delay=1.5, answer=ANSWER) if "Answer from these findings" in said else ANSWER


@contextmanager
def asmodel(folder: Path, model: Upstream) -> Generator[Server]:
    base_url = model.server.base_url
    settings = f"program_folders = [{json.dumps(str(PROGRAMS))}]\n" + upstream(base_url, retries=0)
    with serving(folder, settings + f'[keys]\nalice = "{KEY}"\n') as made:
        yield made


def documented(server: Server) -> dict[str, str]:
    """The variables that docs/openai.md gives, in their order, with this server's address and key in them."""
    section = (DOCS / "openai.md").read_text().split("\n## Open WebUI\n")[1]
    given = dict(re.findall(r"^\| `([A-Z_]+)` \| `([^`]+)` \|", section, re.MULTILINE))
    assert [*given] == ["OPENAI_API_BASE_URLS", "OPENAI_API_KEYS", "TASK_MODEL_EXTERNAL", "DEFAULT_MODEL_METADATA"]
    return given | {"OPENAI_API_BASE_URLS": server.base_url, "OPENAI_API_KEYS": KEY}


@pytest.fixture(scope="module")
def model() -> Generator[Upstream]:
    made = Upstream()
    with made.server:
        yield made
        made.go_on()


@pytest.fixture(scope="module")
def server(model: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with asmodel(tmp_path_factory.mktemp("asmodel"), model) as made:
        yield made


@pytest.fixture(scope="module")
def web(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Generator[OpenWebUi]:
    with OpenWebUi(tmp_path_factory.mktemp("web"), documented(server)) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    with Browser() as made:
        yield made


def begin(browser: Browser, web: OpenWebUi, name: str, **options: Any) -> None:
    """A new chat with the model."""
    browser.open(web.address, **(DESK | options))
    browser.click(PICKER)
    browser.click(f"[role=option][aria-label='Select {name} model']")
    browser.wait(f"button[aria-label='Selected model: {name}']")


def ask(browser: Browser, question: str) -> None:
    browser.click("#chat-input")
    browser.type(question)
    browser.press("Enter")


def shown(browser: Browser) -> list[str]:
    """The lines of the last message, as they are read."""
    return [line for line in str(browser.tell("texts", at=MESSAGES)[-1]).splitlines() if line.strip()]


def progress(browser: Browser) -> list[str]:
    return [line for line in shown(browser) if line.startswith(PARTS)]


def test_a_program_is_picked_and_its_progress_read_before_its_answer(
    browser: Browser, web: OpenWebUi, model: Upstream
) -> None:
    model.hold()
    begin(browser, web, "gazetteer")
    ask(browser, QUESTION)
    browser.click("text=Thinking...")
    eventually("the steps so far are told", lambda: set(progress(browser)) >= SO_FAR)
    early = progress(browser)
    assert early[0].startswith("look up · finding ")
    assert ANSWER[:20] not in "".join(shown(browser))
    model.go_on()
    browser.wait(DONE)
    # What was told stays above the answer, which is read on without it.
    lines = shown(browser)
    assert ANSWER in lines
    assert any(line.startswith("Thought for") for line in lines)
    late = progress(browser)
    assert late[: len(early)] == early
    assert "weigh · weight 9/9" in late
    assert all(lines.index(line) < lines.index(ANSWER) for line in late)
    # And it is kept with the chat.
    browser.tell("reload")
    browser.wait(f"text={ANSWER}")
    browser.click("text=Thought for")
    eventually("the same is told again", lambda: progress(browser) == late)


def test_titles_and_what_else_it_asks_by_itself_are_the_upstreams_and_run_no_program(
    browser: Browser, web: OpenWebUi, model: Upstream
) -> None:
    model.hold()
    model.go_on()
    begin(browser, web, "gazetteer")
    ask(browser, "How many towers has the wall of Visby?")
    browser.wait(DONE)
    browser.wait(f"h1:has-text('{TITLE}')")
    browser.wait(f"text={FOLLOW_UP}")
    eventually("it has asked for tags", lambda: model.asked("specific subtopic tags"))
    assert len(model.asked(TASK)) == 3
    assert all(body["messages"][0]["content"].startswith(TASK) for body in model.asked(TASK))
    assert len(model.asked("Look up in the")) == 9


def test_stop_ends_the_run_and_its_calls(browser: Browser, web: OpenWebUi, model: Upstream) -> None:
    model.hold()
    begin(browser, web, "gazetteer")
    ask(browser, "Where is Nowhere?")
    eventually("the calls are on their way", lambda: len(model.asked("Look up in the")) == 9)
    browser.wait("text=Thinking...")
    browser.click("button[aria-label=Stop]")

    def left() -> bool:
        return all(r.left_at is not None for r in model.server.requests if "Look up in the" in json.dumps(r.body))

    eventually("the upstream's calls have ended", left)
    browser.wait(DONE)


def test_every_model_is_listed_by_its_name(browser: Browser, web: OpenWebUi, server: Server) -> None:
    browser.open(web.address, **DESK)
    browser.click(PICKER)
    models = server.ask("GET", "/v1/models", headers={"authorization": f"Bearer {KEY}"}).json["data"]
    names = [model["id"] for model in models]
    eventually("all are listed", lambda: [name.strip() for name in browser.tell("texts", at="[role=option]")] == names)


def test_a_conversation_goes_on_without_what_was_told_of_it(browser: Browser, web: OpenWebUi, model: Upstream) -> None:
    model.hold()
    begin(browser, web, "plain")
    ask(browser, "Is it old?")
    browser.wait(DONE)
    ask(browser, "And how long is it?")
    eventually(
        "both are answered", lambda: [ANSWER in text for text in browser.tell("texts", at=MESSAGES)][1::2] == [True] * 2
    )
    (asked,) = (body for body in model.asked("And how long is it?") if TASK not in json.dumps(body))
    assert [(m["role"], m["content"]) for m in asked["messages"]] == [
        ("user", "Is it old?"),
        ("assistant", ANSWER),
        ("user", "And how long is it?"),
    ]


def test_what_fails_is_told_in_words(browser: Browser, web: OpenWebUi, model: Upstream) -> None:
    model.hold()
    begin(browser, web, "plain")
    ask(browser, "Will it fail?")
    browser.wait("text=no such thing")


def test_with_two_settings_alone_programs_are_asked_for_titles_and_those_without_tools_refuse_its_own(
    browser: Browser, server: Server, model: Upstream, tmp_path: Path
) -> None:
    model.hold()
    model.go_on()
    two = dict([*documented(server).items()][:2])
    with OpenWebUi(tmp_path / "web", two) as web:
        begin(browser, web, "gazetteer")
        ask(browser, "Is the wall of Visby whole?")
        browser.wait('text=`tools` is not supported by the program "gazetteer"')
        eventually("the program is asked for a title", lambda: len(model.asked("Look up in the")) == 9)
        assert all(TASK in json.dumps(body) for body in model.asked("Look up in the"))
        begin(browser, web, "plain")
        ask(browser, "Is the wall of Visby whole?")
        browser.wait(f"text={ANSWER}")
        # The reply step of a program is asked for a stream, too; it is shown no tools.
        assert [body for body in model.asked("Is the wall of Visby whole?") if body.get("tools")]


def pictures(folder: Path) -> None:
    """Those of the documentation."""
    model = Upstream(token_delay=0.05)
    with (
        tempfile.TemporaryDirectory() as place,
        model.server,
        asmodel(Path(place) / "asmodel", model) as server,
        OpenWebUi(Path(place) / "web", documented(server)) as web,
        Browser() as browser,
    ):
        begin(browser, web, "gazetteer", viewport={"width": 1000, "height": 720}, deviceScaleFactor=1.2)
        browser.wait("text=You're now logged in", "hidden")
        model.hold()
        ask(browser, QUESTION)
        browser.click("text=Thinking...")
        eventually("the steps so far are told", lambda: set(progress(browser)) >= SO_FAR)
        time.sleep(1.0)  # words come out of the white
        browser.shot(folder / "open-webui-progress.png")
        model.go_on()
        browser.wait(DONE)
        browser.wait(f"text={FOLLOW_UP}")
        time.sleep(1.0)
        browser.shot(folder / "open-webui-answer.png")


if __name__ == "__main__":
    pictures(DOCS / "images")
