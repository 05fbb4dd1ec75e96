"""Tools of the settings: named by the operator, reached by programs by their names; and a corpus that is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asmodel import Answer, InvalidRequest, Message, Run, Tool, program, tool
from asmodel.app import Parts, build
from asmodel.calls import Call, Capabilities, Chat, Score
from asmodel.errors import AsmodelError, ConfigurationError, Unsupported
from asmodel.preparing import prepared
from asmodel.service import Asked
from asmodel.settings import Settings, ToolSettings
from asmodel.testing import FunctionUpstream, ScriptedServer, run_program
from asmodel_plugins.corpus_search import CorpusSearch
from asmodel_programs.evidence_qa import evidence_filter, evidence_qa

HERE = "asmodel_plugins.corpus_search:CorpusSearch"


@tool
def shout(query: str, n: int = 3) -> list[dict[str, str]]:
    """Say it louder."""
    return [{"id": str(i), "title": "", "text": query.upper()} for i in range(n)]


@program("louder")
async def louder(run: Run) -> str:
    found: Any = await run(run.tool("shout"), run.question, n=1)
    return str(found[0]["text"])


async def test_a_program_reaches_a_tool_of_the_settings_by_its_name() -> None:
    upstream = FunctionUpstream(lambda call: "", name="up")
    assert (await run_program(louder, "hey", upstream=upstream, tools=[shout])).text == "HEY"
    with pytest.raises(InvalidRequest, match='there is no tool "shout"; there are none'):
        await run_program(louder, "hey", upstream=upstream)


class Posting:
    def __init__(self) -> None:
        self.tool: Tool[[], None] = Tool("post", lambda: None, "", effect=True)


class Nothing:
    pass


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (f"{__name__}:Posting", {}, "tools.docs: its tool has effects"),
        (f"{__name__}:Nothing", {}, "offers no tool"),
        (HERE, {}, "tools.docs.path: is missing"),
        (HERE, {"path": "x", "wrods": 3}, 'no such option.*did you mean "words"'),
    ],
)
def test_a_tool_that_cannot_be_stops_the_server_at_its_start(kind: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        build(Settings(tools={"docs": ToolSettings(kind=kind, options=options)}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "whales.md").write_text("# Whales\n\nWhales sing for hours.")
    (tmp_path / "docs" / "dogs.md").write_text("# Dogs\n\nDogs bark at whales.")
    return tmp_path / "docs"


async def answered(parts: Parts, question: str, **params: Any) -> Answer:
    asked = Asked(messages=(Message("user", question),), params=params)
    job = await parts.service.prepare(parts.models.find("evidence-qa"), asked)
    return (await parts.service.answer(job, 0, None)).answer


async def test_evidence_qa_answers_from_a_corpus_of_the_settings_and_no_request_names_a_path(
    folder: Path, tmp_path: Path
) -> None:
    with ScriptedServer() as server:
        settings = Settings(
            upstreams={"default": {"kind": "openai", "base_url": server.base_url, "model": "scripted"}},  # type: ignore[dict-item]  # as it is written
            tools={"docs": ToolSettings(kind=HERE, options={"path": str(folder), "index": str(tmp_path / "index")})},
            programs={"evidence-qa": {"params": {"corpus": "docs"}}},  # type: ignore[dict-item]
            cache={"kind": "off"},  # type: ignore[arg-type]
        )
        parts = build(settings)
        with prepared(parts):
            await parts.open()
            try:
                answer = await answered(parts, "Who sings for hours?")
                assert [c.id for c in answer.citations] == ["whales.md"]
                assert (await answered(parts, "xyzzy")).text.startswith("The corpus has no passage")
                with pytest.raises(InvalidRequest, match='there is no tool "/etc"; there are docs'):
                    await answered(parts, "Who sings?", corpus="/etc")
            finally:
                await parts.close()


async def test_what_the_corpus_gives_is_filtered_as_any_paragraph_is(folder: Path, tmp_path: Path) -> None:
    def likely(call: Call) -> Any:
        assert isinstance(call, Score)
        return (-1.0 if "bark" in call.context else -2.0), 1

    corpus = CorpusSearch(folder, index=tmp_path / "index", name="docs")
    upstream = FunctionUpstream(likely, name="up")
    params = {"corpus": "docs", "paragraphs": ["Stones are grey."]}
    answer = await run_program(
        evidence_filter, "What do whales do?", upstream=upstream, params=params, tools=[corpus.tool]
    )
    assert [c.id for c in answer.citations] == ["dogs.md", "1", "whales.md"]
    await corpus.close()


# Steps that the parameters lead to


def chatty(call: Call) -> Any:
    assert isinstance(call, Chat)
    return "2" if "Which of these" in call.messages[0].text else "Yes."


async def test_an_upstream_need_not_be_able_to_do_what_the_parameters_do_not_lead_to() -> None:
    upstream = FunctionUpstream(chatty, name="up", capabilities=Capabilities())
    params: dict[str, Any] = {"paragraphs": ["Dogs bark.", "Whales sing."]}
    with pytest.raises(Unsupported, match='step "question_given" needs an upstream that can give the log-likelihood'):
        await run_program(evidence_qa, "Who sings?", upstream=upstream, params=params)
    assert upstream.calls == []
    answer = await run_program(evidence_qa, "Who sings?", upstream=upstream, params={**params, "ranking": "listwise"})
    assert (answer.text, [c.id for c in answer.citations]) == ("Yes.", ["2"])
    searched = {**params, "ranking": "listwise", "search": "nll"}
    with pytest.raises(Unsupported, match='step "next_thought" needs an upstream that can continue raw text'):
        await run_program(evidence_qa, "Who sings?", upstream=upstream, params=searched)


def test_without_parameters_all_steps_count() -> None:
    assert len(evidence_qa.steps_with(None)) == len(evidence_qa.steps) > 5
    assert louder.steps_with(None) == louder.steps


def test_the_steps_of_parameters_are_among_those_that_the_code_names() -> None:
    assert evidence_qa.params is not None
    for ranking in ("likelihood", "first-token", "listwise", "bm25"):
        for search in ("none", "nll", "delta", "generated"):
            for answers in ("open", "yes-no"):
                given = {"ranking": ranking, "search": search, "answers": answers}
                used = evidence_qa.steps_with(evidence_qa.read_params(given))
                assert used or (ranking, search) == ("bm25", "none")
                assert set(used) <= set(evidence_qa.steps)
    assert issubclass(Unsupported, AsmodelError)
