"""`asmodel eval` from end to end: what is asked and bought, what the table says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.serving import COMMAND, eventually, upstream

from asmodel.cli import main
from asmodel.evaluation.report import Report
from asmodel.testing import Fault, Received, ScriptedServer

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Chad": "N'Djamena"}
PROGRAM = '''
from pydantic import BaseModel

from asmodel import Answer, Citation, Run, gather, program, score, step


class Params(BaseModel):
    facts: list[str] = []
    shots: int = 0


@score(model="default")
def question_given(fact: str, question: str) -> tuple[str, str]:
    return fact, f" {question}"


@step(model="default", temperature=0)
def answer_from(fact: str, question: str) -> str:
    return f"{fact}\\n\\n{question}"


@program("ranker", params=Params)
async def ranker(run: Run[Params]) -> Answer:
    """Rank facts, and answer from the best."""
    likelihoods = await gather(run(question_given, fact, run.question) for fact in run.params.facts)
    order = sorted(range(len(likelihoods)), key=lambda i: -likelihoods[i].mean)
    text = await run(answer_from, run.params.facts[order[0]], run.question)
    return Answer(text=text, data={"ranking": order}, citations=[Citation(id=str(order[0]))])


class Judged(BaseModel):
    question: str
    reference: str
    answer: str


@step(model="default", temperature=0)
def agreement(reference: str, answer: str) -> str:
    return f"JUDGE {reference} / {answer}"


@program("strict-judge", params=Judged)
async def strict_judge(run: Run[Judged]) -> str:
    """Whether two answers agree."""
    return await run(agreement, run.params.reference, run.params.answer)


@program("breaks")
async def breaks(run: Run) -> str:
    """Breaks on what it cannot do."""
    if "Peru" in run.question:
        raise KeyError(run.question)
    return "Paris"


@step(model="default", temperature=0, returns=lambda text: {"yes": True, "no": False}[text.lower()])
def verdict(question: str, strict: bool = False) -> str:
    return f"VERDICT {question}"


@program("judges")
async def judges(run: Run) -> str:
    """A verdict."""
    return "yes" if await run(verdict, run.question) else "no"
'''


def knows(body: dict[str, Any]) -> str | None:
    """Knows each capital but that of Chad, which only `clever` knows; answers judges by comparison."""
    if "messages" not in body:
        return None  # A completion, by which given text is scored.
    text = body["messages"][-1]["content"]
    if text.startswith("JUDGE"):
        reference, answer = text.removeprefix("JUDGE ").split(" / ")
        return "yes" if reference == answer else "no"
    if text.startswith("VERDICT"):
        return "yes" if "Paris" in text else "no"
    for country, capital in CAPITALS.items():
        if country in text and (country != "Chad" or body["model"] == "clever"):
            return capital
    return "Unknown"


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer(knows) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, up: ScriptedServer) -> Path:
    price = "price = { input = 1.0, output = 2.0 }\n"
    settings = upstream(up.base_url) + price + upstream(up.base_url, "clever").replace('"scripted"', '"clever"')
    (tmp_path / "asmodel.toml").write_text(settings)
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "mine.py").write_text(PROGRAM)
    lines = [
        {
            "id": country.lower(),
            "question": f"What is the capital of {country}?",
            "answer": capital,
            "facts": [f"{other} is elsewhere.", f"{capital} is the capital of {country}."],
            "gold": [1],
        }
        for (country, capital), other in zip(CAPITALS.items(), reversed(CAPITALS), strict=True)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def upstream_url(folder: Path) -> str:
    (url,) = set(re.findall(r'base_url = "(.*)"', (folder / "asmodel.toml").read_text()))
    return str(url)


Eval = Callable[..., Result]


@pytest.fixture
def evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Eval:
    monkeypatch.chdir(folder)

    def run(*arguments: str, code: int = 0) -> Result:
        ended = CliRunner().invoke(main, ("eval", *arguments, "--programs", "programs"), prog_name="asmodel")
        assert ended.exit_code == code, ended.output + repr(ended.exception)
        return ended

    return run


@pytest.fixture
def reported(evaluate: Eval, folder: Path) -> Callable[..., Report]:
    """The same as a report, read back from its JSON."""

    def run(*arguments: str, code: int = 0) -> Report:
        evaluate(*arguments, "--json", "report.json", code=code)
        return Report.model_validate_json((folder / "report.json").read_bytes())

    return run


def asked(up: ScriptedServer) -> int:
    """Chats and completions, without what was tried to find out what the upstream can do."""
    return sum(r.path.endswith("/chat/completions") for r in up.requests)


# ---- the table ----


def test_systems_are_scored_compared_and_counted(evaluate: Eval, up: ScriptedServer) -> None:
    printed = evaluate("plain", "clever", "data.jsonl").stdout
    heading, _, *rest = printed.splitlines()
    assert heading == "all 5 questions of data.jsonl"
    rows = [re.split(r"\s{2,}", line) for line in rest]
    assert ["plain", "5", "80.0", "37.6 to 96.4", "0"] in rows
    assert ["clever", "5", "100.0", "56.6 to 100.0", "0"] in rows
    (compared,) = (row for row in rows if row[0] == "clever" and len(row) == 8)
    assert compared == ["clever", "1", "0", "4", "0", "+20.0", "+0.0 to +60.0", "1.000"]
    assert "too few to tell anything by" in printed
    (taken,) = (row for row in rows if row[0] == "clever" and len(row) == 9)
    assert taken[5] == "—", "an unknown price is never 0"
    assert re.search(r"^now: bought 10 calls, \d+ tokens, price unknown; nothing from the cache", printed, re.MULTILINE)
    assert asked(up) == 10


FIGURES = {"name", "answered", "errors", "scores", "takes", "latency"}


def test_out_of_the_cache_the_figures_are_the_same_and_nothing_is_bought(
    reported: Callable[..., Report], up: ScriptedServer
) -> None:
    arguments = ["ranker", "self-consistency@samples=3", "clever", "data.jsonl", "--param", "facts=facts"]
    for scorer in ("contains", "f1", "judge:strict-judge", "mrr=gold"):
        arguments += ["--score", scorer]
    first = reported(*arguments)
    before = len(up.requests)
    again = reported(*arguments, "--only-cached")
    assert len(up.requests) == before, "it is not even tried what the upstream can do"
    for a, b in zip(first.systems, again.systems, strict=True):
        assert a.model_dump(include=FIGURES) == b.model_dump(include=FIGURES)
    assert first.comparisons == again.comparisons
    assert [j.takes for j in first.judges] == [j.takes for j in again.judges]
    for x, y in zip(first.examples, again.examples, strict=True):
        now = {"run_id", "bought", "seconds_now", "steps"}
        assert [a.model_dump(exclude=now) for a in x.answers] == [a.model_dump(exclude=now) for a in y.answers]
    assert sum(s.now.calls for s in first.systems) > 0
    assert sum(s.now.calls for s in again.systems) == 0
    assert again.systems[0].now.hits == 15
    assert again.systems[1].takes.calls == 15, "what it would take, though it takes nothing now"


def test_each_question_is_there_with_its_steps(reported: Callable[..., Report]) -> None:
    report = reported("ranker", "data.jsonl", "--param", "facts=facts", "--score", "hit@1=gold", "--limit", "2")
    assert report.scorers == ["hit@1"]
    assert report.data.asked == len(report.examples) == 2
    (answer,) = report.examples[0].answers
    assert [step.step for step in answer.steps].count("question_given") == 2
    assert answer.steps[-1].said == answer.text
    assert answer.calls == 3
    assert answer.data["ranking"] in ([0, 1], [1, 0])
    assert answer.run_id.startswith("run_")


def test_equal_steps_of_a_run_are_one_call(reported: Callable[..., Report], folder: Path) -> None:
    line = {"question": "Peru?", "facts": ["same", "same"], "answer": "Lima"}
    (folder / "twice.jsonl").write_text(json.dumps(line))
    for _ in range(2):
        report = reported("ranker", "twice.jsonl", "--param", "facts=facts", "--score", "contains")
        assert (report.systems[0].takes.steps, report.systems[0].takes.calls) == (3, 2)


def test_each_question_is_drawn_several_times_and_the_spread_over_draws_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_of = Counter[str]()
    learns = {"Peru": 1, "Kenya": 2, "Chad": 3}

    def learner(body: dict[str, Any]) -> str:
        """Is wrong about some countries the first times."""
        text = body["messages"][-1]["content"]
        (country,) = (name for name in CAPITALS if name in text)
        nth = asked_of[body["model"] + country]
        asked_of[body["model"] + country] += 1
        right = body["model"] == "clever" or nth >= learns.get(country, 0)
        return CAPITALS[country] if right else "Unknown"

    monkeypatch.chdir(folder)
    settings = (folder / "asmodel.toml").read_text()

    def evaluated(*more: str) -> tuple[str, Report]:
        arguments = ["eval", "plain", "clever", "data.jsonl", "-j", "1", *more, "--json", "report.json"]
        ended = CliRunner().invoke(main, arguments)
        assert ended.exit_code == 0, ended.output
        return ended.stdout, Report.model_validate_json((folder / "report.json").read_bytes())

    with ScriptedServer(learner) as other:
        (folder / "asmodel.toml").write_text(settings.replace(upstream_url(folder), other.base_url))
        printed, first = evaluated("--repeats", "3")
        assert sum(asked_of.values()) == 30
        again_printed, again = evaluated("--repeats", "3", "--html", "report.html")
        _, once = evaluated()
        assert sum(asked_of.values()) == 30, "the first draw is what is asked without --repeats"
    assert printed.splitlines()[0] == "all 5 questions of data.jsonl, each asked 3 times"
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    plain = first.systems[0]
    exact = plain.scores["exact"]
    assert exact.draws == pytest.approx([0.4, 0.6, 0.8])
    assert (exact.n, exact.answers) == (5, 15)
    assert exact.value == pytest.approx(0.6)
    assert exact.spread == pytest.approx(0.2)
    assert exact.low is not None
    assert exact.high is not None
    assert 0.0 <= exact.low < 0.6 < exact.high <= 1.0
    (row,) = (row for row in rows if row[0] == "plain" and len(row) == 6)
    assert (row[1:3], row[4:]) == (["5", "60.0"], ["20.0", "0"])
    assert ["clever", "5", "100.0", "56.6 to 100.0", "0.0", "0"] in rows, "alike in all draws, it is a proportion"
    assert "note: clever: the same answer each time" in printed
    assert "note: plain: the same answer" not in printed
    (compared,) = first.comparisons
    assert (compared.n, compared.won, compared.lost, compared.both, compared.neither) == (5, 3, 0, 2, 0)
    assert compared.difference == pytest.approx(0.4)
    assert compared.p == 0.25
    assert plain.takes.calls == 15
    assert [(a.system, a.draw) for a in first.examples[0].answers] == [
        (s, d) for s in ("plain", "clever") for d in range(3)
    ]
    assert "nothing was bought" in again_printed
    assert (again.comparisons, [s.scores for s in again.systems]) == (
        first.comparisons,
        [s.scores for s in first.systems],
    )
    assert once.systems[0].scores["exact"].value == pytest.approx(0.4)
    assert once.systems[0].scores["exact"].spread is None
    page = (folder / "report.html").read_text()
    assert "plain, draw 3" in page
    assert "Where systems differ (3)" in page
    assert "plain 0.67" in page


def test_what_is_not_sampled_is_bought_once_however_often_it_is_asked(reported: Callable[..., Report]) -> None:
    (figures,) = reported("judges", "data.jsonl", "--repeats", "4").systems
    assert (figures.now.calls, figures.answered, figures.questions) == (5, 20, 5)
    assert figures.takes.calls == 20, "each answer as if nothing were in the cache"


def test_a_step_that_was_asked_again_takes_what_its_answer_took(folder: Path, up: ScriptedServer) -> None:
    said: list[str] = []

    def unsure(body: dict[str, Any]) -> str:
        said.append(body["messages"][-1]["content"])
        return "yes" if "answer again" in said[-1] else "perhaps"

    settings = (folder / "asmodel.toml").read_text()
    source = PROGRAM.replace('{"yes": True, "no": False}[text.lower()]', "int(text == 'yes') or int(text)")
    (folder / "programs" / "mine.py").write_text(source)
    with ScriptedServer(unsure) as other:
        (folder / "asmodel.toml").write_text(settings.replace(up.base_url, other.base_url))
        rows: list[Any] = []
        for _ in range(2):
            done = subprocess.run(
                [
                    *COMMAND,
                    "eval",
                    "judges",
                    "data.jsonl",
                    "--limit",
                    "1",
                    "--programs",
                    "programs",
                    "--json",
                    "r.json",
                ],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=40,
            )
            assert done.returncode == 0, done.stderr
            rows.append(json.loads((folder / "r.json").read_text())["systems"][0])
    assert len(said) == 2
    assert rows[0]["takes"] == rows[1]["takes"]
    assert rows[0]["takes"]["calls"] == 1
    assert (rows[0]["now"]["calls"], rows[1]["now"]["calls"]) == (2, 0)


def test_answers_that_are_not_even_of_the_kind_asked_for_are_wrong_and_told(evaluate: Eval, folder: Path) -> None:
    (folder / "yes.jsonl").write_text(json.dumps({"question": "Is it in Peru?", "answer": True}))
    printed = evaluate("default", "yes.jsonl", "--score", "yes-no").stdout
    assert "note: default: 1 of 1 wrong by yes-no because the answer says neither yes nor no" in printed
    assert ["default", "1", "0.0", "0.0 to 79.3", "0"] in [re.split(r"\s{2,}", line) for line in printed.splitlines()]


def test_it_is_told_how_far_one_answer_to_all_would_come(evaluate: Eval, folder: Path) -> None:
    asked = [{"question": f"Is {n} more than 5?", "answer": n > 5} for n in range(14)]
    (folder / "yes.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "programs" / "nay.py").write_text(
        "from asmodel import Run, program\n\n\n@program('nay')\nasync def nay(run: Run) -> str:\n    return 'no'\n"
    )
    printed = re.sub(r"\s+", " ", evaluate("nay", "yes.jsonl", "--score", "yes-no").stdout)
    assert "note: yes-no: right are 8 yes, 6 no; always to answer yes is right in 57.1 %" in printed
    assert "note: nay: right in 0 of 8 yes, 6 of 6 no" in printed
    few = re.sub(r"\s+", " ", evaluate("nay", "yes.jsonl", "--score", "yes-no", "--limit", "8").stdout)
    assert "always to answer" not in few


# ---- what is asked ----


def test_parameters_go_to_those_who_have_them_and_the_table_says_who_has_not(evaluate: Eval) -> None:
    printed = evaluate("ranker", "plain", "data.jsonl", "--param", "facts=facts", "--set", "shots=2").stdout
    assert "note: plain has no parameter facts, shots: asked without" in printed


def test_a_file_of_systems_gives_parameters_roles_and_prompts(
    reported: Callable[..., Report], folder: Path, up: ScriptedServer
) -> None:
    (folder / "systems.toml").write_text(
        '[helped]\nmodel = "plain"\nprompt = "{facts}\\n\\n{question}"\nroles = { writer = "clever" }\n'
        '[three]\nmodel = "self-consistency"\nparams = { samples = 3 }\n'
    )
    report = reported("data.jsonl", "--systems", "systems.toml", "--limit", "1")
    assert [(s.name, s.model, s.takes.calls) for s in report.systems] == [
        ("helped", "plain", 1),
        ("three", "self-consistency", 3),
    ]
    shown = [r.body["messages"][-1]["content"] for r in up.requests if r.body.get("model") == "clever"]
    question = report.examples[0].question
    assert len(shown) == 1
    assert shown[0].endswith(f"\n\n{question}")
    assert "is elsewhere." in shown[0]


def test_one_step_is_asked_on_data_of_its_own_by_each_who_is_to_play_its_role(
    reported: Callable[..., Report], up: ScriptedServer
) -> None:
    arguments = ["data.jsonl", "--arg", "question=question", "--arg", "fact=facts.1", "--score", "contains"]
    report = reported("--step", "ranker/answer_from", *arguments)
    assert [(s.name, s.takes.calls) for s in report.systems] == [("ranker/answer_from", 5)]
    assert report.systems[0].scores["contains"].value == 0.8
    whole = reported("ranker", "data.jsonl", "--param", "facts=facts", "--only-cached", code=1)
    assert report.systems[0].digest == whole.systems[0].digest, "the digest of the program's source"
    report = reported("--step", "ranker/answer_from", "default", "clever", *arguments)
    assert [s.name for s in report.systems] == ["ranker/answer_from:default", "ranker/answer_from:clever"]
    assert report.systems[1].scores["contains"].value == 1
    assert report.systems[0].now.calls == 0, "it is the same step as before"
    assert asked(up) == 10


def test_a_steps_value_is_its_answer(reported: Callable[..., Report], folder: Path) -> None:
    lines = [{"question": "Paris?", "answer": True}, {"question": "Rome?", "answer": True}]
    (folder / "yes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = reported("--step", "judges/verdict", "yes.jsonl", "--arg", "question=question", "--score", "yes-no")
    assert [example.answers[0].text for example in report.examples] == ["yes", "no"]
    arguments = ("--arg", "question=question", "--arg", "fact=question", "--score", "exact")
    report = reported("--step", "ranker/question_given", "yes.jsonl", *arguments)
    assert set(report.examples[0].answers[0].data) == {"total", "tokens", "mean"}


def test_a_step_of_a_real_run_is_not_bought_again_for_its_evaluation(evaluate: Eval, up: ScriptedServer) -> None:
    evaluate("ranker", "data.jsonl", "--param", "facts=facts", "--score", "contains")
    before = asked(up)
    evaluate("--step", "ranker/question_given", "data.jsonl", "--arg", "fact=facts.0", "--arg", "question=question")
    assert asked(up) == before


def test_two_scorers_of_one_kind_are_told_apart_by_their_fields(reported: Callable[..., Report]) -> None:
    report = reported("default", "data.jsonl", "--score", "exact", "--score", "exact=id", "--score", "f1=id")
    assert report.scorers == ["exact", "exact=id", "f1"]
    assert report.systems[0].scores["exact"].value == 0.8
    assert report.systems[0].scores["exact=id"].value == 0


def test_an_upstream_may_have_an_at_in_its_name(reported: Callable[..., Report], folder: Path) -> None:
    with (folder / "asmodel.toml").open("a") as file:
        file.write('[models.few]\nprogram = "plain"\nroles = { writer = "a@b=c" }\n')
        file.write(f'[upstreams."a@b=c"]\nbase_url = "{upstream_url(folder)}"\nmodel = "scripted"\n')
    report = reported("a@b=c", "plain:a@b=c", "few", "data.jsonl", "--limit", "1")
    assert [s.model for s in report.systems] == ["a@b=c", "plain:a@b=c", "few"]


def test_an_argument_of_a_step_may_be_of_any_type_that_json_gives(
    reported: Callable[..., Report], folder: Path
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Peru?"}]
    (folder / "turns.jsonl").write_text(json.dumps({"turns": turns, "answer": "Lima"}))
    report = reported("--step", "plain/conversation", "turns.jsonl", "--arg", "messages=turns")
    assert report.systems[0].scores["exact"].value == 1


# ---- judges ----


def test_a_program_that_takes_them_judges_by_question_reference_and_answer(reported: Callable[..., Report]) -> None:
    report = reported("default", "clever", "data.jsonl", "--score", "judge:strict-judge")
    assert [s.scores["judge:strict-judge"].value for s in report.systems] == [0.8, 1]
    assert report.systems[0].scores["judge:strict-judge"].kind == "proportion"
    (judge,) = report.judges
    assert judge.takes.questions == 10
    # Equal answers are judged once: only that about Chad differs.
    assert judge.now.calls + judge.now.hits + judge.now.joined == 10
    assert report.systems[0].takes.calls == 5, "judges are counted apart"


def test_a_plain_model_judges_by_what_it_is_shown(evaluate: Eval, up: ScriptedServer, folder: Path) -> None:
    evaluate("plain", "data.jsonl", "--limit", "1", "--score", "judge:clever", "--json", "r.json")
    shown = up.requests[-1].body["messages"][-1]["content"]
    example = json.loads((folder / "r.json").read_text())["examples"][0]
    assert f"Question: {example['question']}" in shown
    assert f"Answer to judge: {example['answers'][0]['text']}" in shown
    assert example["answers"][0]["scores"]["judge:clever"] is None
    assert "said neither yes nor no" in example["answers"][0]["troubles"]["judge:clever"]


# ---- errors ----


def test_an_error_counts_as_wrong_is_told_and_does_not_end_the_rest(evaluate: Eval) -> None:
    printed = evaluate("breaks", "plain", "data.jsonl", code=1).stdout
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert ["breaks", "5", "20.0", "3.6 to 62.4", "1"] in rows
    (told,) = (line for line in printed.splitlines() if line.startswith("error: "))
    assert told.startswith("error: breaks: ProgramError: program")
    assert "Peru" not in told


def test_strict_ends_at_the_first_error(evaluate: Eval) -> None:
    ended = evaluate("breaks", "data.jsonl", "--strict", "-j", "1", code=1)
    assert 'asmodel: breaks, question "peru": program "breaks": its code raised KeyError' in ended.stderr
    assert ended.stdout == ""


def test_what_failed_is_bought_by_the_same_command_once_the_upstream_is_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = [True]

    def faults(request: Received) -> Fault | None:
        return Fault(status=400) if down[0] and "Peru" in str(request.body) else None

    monkeypatch.chdir(folder)
    with ScriptedServer(knows, faults=faults) as other:
        (folder / "asmodel.toml").write_text(upstream(other.base_url))
        arguments = ("eval", "default", "data.jsonl")
        failed = CliRunner().invoke(main, arguments)
        assert failed.exit_code == 1, failed.output
        assert "error: default: UpstreamRejected" in failed.stdout
        down[0] = False
        mended = CliRunner().invoke(main, arguments)
        assert mended.exit_code == 0
        assert "now: bought 1 call," in mended.stdout


def test_only_cached_buys_nothing_and_does_not_count_what_is_not_there(evaluate: Eval, up: ScriptedServer) -> None:
    evaluate("plain", "data.jsonl", "--limit", "3", "--seed", "4")
    before = asked(up)
    printed = evaluate("plain", "clever", "data.jsonl", "--only-cached", code=1).stdout
    assert asked(up) == before
    assert "note: plain: 2 questions not in the cache, and not counted" in printed
    assert "note: clever: 5 questions not in the cache, and not counted" in printed
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert ["clever", "0", "—", "—", "0"] in rows


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plain", "nope.jsonl"], "the last argument is the JSONL file of questions, and there is no file nope.jsonl"),
        (["data.jsonl"], "which system? asmodel eval SYSTEM... DATA.jsonl"),
        (["nope", "data.jsonl"], 'system "nope": there is no model "nope"; there are all-paragraphs, breaks, '),
        (["plain", "plain", "data.jsonl"], 'the system "plain" is named twice'),
        (["clever@temperature=1", "data.jsonl"], '"clever" is an upstream, which takes no parameters'),
        (["plain@samples", "data.jsonl"], "should be MODEL@NAME=VALUE"),
        (["self-consistency@samples=0", "data.jsonl"], "data.jsonl:1: system"),
        (
            ["ranker", "data.jsonl", "--param", "facts=answer"],
            'data.jsonl:1: system "ranker": program "ranker": facts:',
        ),
        (["ranker", "data.jsonl", "--param", "fact=facts"], 'takes a parameter "fact" (did you mean "facts"?)'),
        (["plain", "data.jsonl", "--score", "judge:nope"], '--score judge:nope: system "nope": there is no model'),
        (
            ["plain", "data.jsonl", "--answer", "gold", "--score", "yes-no"],
            'data.jsonl:1: field "gold": yes-no compares',
        ),
        (["plain", "data.jsonl", "--json", "no/where.json"], "there is no folder no"),
        (["--step", "ranker", "data.jsonl"], "should be PROGRAM/STEP"),
        (["--step", "rank/x", "data.jsonl"], 'there is no program "rank" (did you mean "ranker"?)'),
        (["--step", "ranker/answer", "data.jsonl"], 'program "ranker" has no step "answer"'),
        (["--step", "ranker/answer_from", "data.jsonl", "--arg", "fact=answer"], "question: Field required"),
        (["plain", "data.jsonl", "--arg", "fact=answer"], "--arg goes with --step"),
        (["plain", "data.jsonl", "--param", "fact"], "--param fact: should be NAME=FIELD"),
        (["plain", "data.jsonl", "--systems", "asmodel.toml"], "a system has model, params, prompt, roles"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_asked(
    evaluate: Eval, up: ScriptedServer, arguments: list[str], told: str
) -> None:
    ended = evaluate(*arguments, code=2)
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
    assert asked(up) == 0


def test_a_system_that_can_answer_nothing_is_told_at_once(evaluate: Eval, folder: Path, up: ScriptedServer) -> None:
    with ScriptedServer(knows, scores="ignored") as other:
        settings = (folder / "asmodel.toml").read_text()
        (folder / "asmodel.toml").write_text(settings.replace(up.base_url, other.base_url))
        ended = evaluate("plain", "ranker", "data.jsonl", "--param", "facts=facts", code=2)
    assert 'system "ranker": program "ranker": step "question_given" needs an upstream that can give' in ended.stderr
    assert asked(other) == 0


# ---- ends ----


def test_an_interrupted_evaluation_says_how_far_it_came_and_is_gone_on_with(folder: Path) -> None:
    with ScriptedServer(knows, delay=0.15) as slow:
        (folder / "asmodel.toml").write_text(upstream(slow.base_url))
        words = [*COMMAND, "eval", "plain", "data.jsonl", "-j", "1", "--json", "part.json"]
        with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            eventually("two are asked", lambda: asked(slow) >= 2)
            process.send_signal(signal.SIGINT)
            printed, told = process.communicate(timeout=20)
        assert process.returncode == 130, told
        assert "Traceback" not in told
        done = json.loads((folder / "part.json").read_text())
        assert done["interrupted"] is True
        answered = done["systems"][0]["answered"]
        assert 1 <= answered <= 4
        assert f"interrupted after {answered} answers; the same command goes on from here" in told
        assert f"\nplain   {answered}  " in printed
        whole = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=30)
        assert whole.returncode == 0, whole.stderr
        assert "\nplain   5  " in whole.stdout
        # What was under way when it was interrupted is asked again, and nothing else is.
        assert asked(slow) <= 5 + 1


def test_progress_is_a_line_at_times_where_nobody_watches(folder: Path) -> None:
    code = (
        "import asmodel.evaluation.watching as w; w.EVERY = 0.05; import sys; from asmodel.cli import main; "
        "main(['eval', 'plain', 'data.jsonl', '-j', '1'])"
    )
    with ScriptedServer(knows, delay=0.1) as slow:
        (folder / "asmodel.toml").write_text(upstream(slow.base_url))
        done = subprocess.run(
            [COMMAND[0], "-c", code], cwd=folder, capture_output=True, text=True, timeout=30, env=dict(os.environ)
        )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d of 5 answers, \d calls bought, about \d+ s left$", done.stderr, re.MULTILINE)
    assert "\x1b" not in done.stderr


def test_many_are_asked_at_once_and_no_more_than_said(evaluate: Eval, folder: Path) -> None:
    with ScriptedServer(knows, delay=0.1) as slow:
        (folder / "asmodel.toml").write_text(upstream(slow.base_url))
        began = time.monotonic()
        evaluate("default", "data.jsonl", "-j", "3")
        assert slow.max_in_flight == 3
        assert time.monotonic() - began < 5


def test_a_run_that_is_recorded_is_recorded_as_ever(evaluate: Eval, folder: Path) -> None:
    with (folder / "asmodel.toml").open("a") as file:
        file.write('[recording]\non = true\npath = "recordings"\n')
    evaluate("plain", "data.jsonl", "--limit", "1", "--json", "r.json")
    run_id = json.loads((folder / "r.json").read_text())["examples"][0]["answers"][0]["run_id"]
    recorded = [json.loads(line) for line in (folder / "recordings" / f"{run_id}.jsonl").read_text().splitlines()]
    assert [next(iter(line)) for line in recorded].count("step") == 1
