"""The paper's set-ups as scripts: what they draw, that nothing reported was tuned on, and that a table comes again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.paper import filter as filtering
from tests.paper import setups, summary
from tests.paper.drawing import CANDIDATES, drawn, ordered, reported, strategyqa, tuned_on

from asmodel.testing import ScriptedServer

WORDS = [f"word{n}" for n in range(300)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty questions over 180 paragraphs, and one with many paragraphs of its own, in the shape of the real files."""
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(1)
    paragraphs = {f"p{n}": f"Title {n}: {' '.join(chance.choices(WORDS, k=12))}." for n in range(180)}
    (folder / "strategyqa").mkdir()
    (folder / "hotpotqa").mkdir()
    (folder / "strategyqa" / "paragraphs.json").write_text(json.dumps(paragraphs))
    with (folder / "strategyqa" / "questions.jsonl").open("w") as lines:
        for n in range(60):
            evidence = [f"p{3 * n + k}" for k in range(3)]
            words = paragraphs[evidence[0]].split()[2:5]
            record = {
                "qid": f"q{n}",
                "question": f"Is it {' '.join(words)}?",
                "answer": n % 2 == 0,
                "facts": ["A fact."],
            }
            lines.write(json.dumps(record | {"evidence": evidence}) + "\n")
    with (folder / "hotpotqa" / "distractor.jsonl").open("w") as lines:
        context = [[f"T{n}", [f"Sentence {n}. ", "More."]] for n in range(10)]
        record = {"id": "h", "question": "Who?", "answer": "T3", "supporting_facts": [["T3", 0], ["T3", 1], ["T5", 0]]}
        lines.write(json.dumps(record | {"context": context}) + "\n")
    return folder


def test_what_is_reported_was_not_tuned_on_and_more_of_it_is_more_of_the_same(data: Path) -> None:
    items, _ = strategyqa(data)
    for seed in (0, 7):
        tuned = {item.id for item in tuned_on(items, seed)}
        told = [item.id for item in reported(items, seed, 20)]
        assert tuned.isdisjoint(told)
        assert len(tuned) == 40
        assert told[:5] == [item.id for item in reported(items, seed, 5)]
        assert tuned | set(told) == {item.id for item in items}
    assert ordered(items, 0) != ordered(items, 7)


@pytest.mark.parametrize("distractors", ["random", "hard"])
def test_one_of_a_hundred_candidates_is_right_and_none_of_the_others_is_evidence(data: Path, distractors: Any) -> None:
    items, paragraphs = strategyqa(data)
    places: set[int] = set()
    for item in items[:10]:
        draw = drawn(item, paragraphs, distractors, 7)
        assert draw == drawn(item, paragraphs, distractors, 7)
        assert len(set(draw.candidates)) == CANDIDATES
        assert set(draw.candidates) & set(item.evidence) == {draw.right}
        places.add(draw.candidates.index(draw.right))
    assert len(places) > 3, "where it stands says nothing"


def ran(command: Any, *arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(tmp_path / "asmodel.toml")


def settings(config: str, server: ScriptedServer) -> None:
    upstream = f'[upstreams.default]\nbase_url = "{server.base_url}"\nmodel = "scripted"\n'
    cache = f'[cache]\npath = "{Path(config).parent / "cache"}"\n[traces]\nlocal = false\n'
    Path(config).write_text(upstream + cache)


def test_the_table_of_the_filter_comes_again_from_the_cache_with_no_call_and_the_same_figures(
    data: Path, config: str, tmp_path: Path
) -> None:
    asked = ("--data", str(data), "--questions", "2", "--config", config)
    with ScriptedServer() as server:
        settings(config, server)
        none = ran(filtering.main, *asked, "--only-cached")
        assert none.exit_code == 1
        assert "run it without --only-cached" in none.output
        first = ran(filtering.main, *asked, "--json", str(tmp_path / "report.json"))
        assert first.exit_code == 0, first.output
        bought = len(server.requests)
        again = ran(filtering.main, *asked, "--only-cached")
        hard = ran(filtering.main, *asked, "--distractors", "hard")
    assert bought >= 200
    assert again.exit_code == hard.exit_code == 0

    def table(result: Result) -> list[str]:
        # Before it stand the bar's lines, which say how long it took.
        whole = result.output[result.output.index("2 questions of seed 7") :]
        return whole.splitlines()[:-1]

    assert table(first) == table(again)
    assert "Bought" in first.output
    assert "Nothing was bought: all 200 steps are from the cache." in again.output
    for row in ("likelihood", "BM25", "BM25, then likelihood", "random", "the paper, 175B"):
        assert any(line.startswith(row) for line in table(first)), row
    assert not any(line.startswith("the paper") for line in table(hard))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [len(question["places"]) for question in report["questions"]] == [3, 3]


def test_what_ties_with_the_right_paragraph_counts_as_better(data: Path) -> None:
    items, paragraphs = strategyqa(data)
    draw = drawn(items[0], paragraphs, "random", 7)
    same = {(items[0].id, id): -1.0 for id in draw.candidates}
    assert filtering.places(draw, same, paragraphs)["likelihood"] == CANDIDATES
    best = same | {(items[0].id, draw.right): -0.5}
    found = filtering.places(draw, best, paragraphs)
    assert found["likelihood"] == 1
    assert found["BM25, then likelihood"] in (1, CANDIDATES + 1)


def test_the_files_for_asmodel_eval_have_what_each_set_up_needs(data: Path, tmp_path: Path) -> None:
    assert ran(setups.main, "--data", str(data), "--out", str(tmp_path)).exit_code == 0
    lines = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in tmp_path.glob("*.jsonl")
    }
    assert {name: len(records) for name, records in lines.items()} == {
        "filter-random": 20,
        "filter-hard": 20,
        "table1": 300,
        "table2": 20,
        "end-to-end": 20,
        "hotpotqa": 1,
    }
    for name in ("filter-random", "filter-hard"):
        for record in lines[name]:
            assert record["answer"][0] in [document["id"] for document in record["documents"]]
    assert [record["answer"] for record in lines["table1"]].count("yes") == 150
    for record in lines["end-to-end"]:
        assert len(record["documents"]) == CANDIDATES
    (record,) = lines["hotpotqa"]
    assert record["supporting"] == ["T3", "T5"]
    assert record["documents"][3] == {"id": "T3", "text": "T3: Sentence 3. More."}
    tuned = tmp_path / "tuned"
    assert ran(setups.main, "--data", str(data), "--out", str(tuned), "--tune").exit_code == 0
    ids = {json.loads(line)["id"] for line in (tuned / "table2.jsonl").read_text().splitlines()}
    assert ids.isdisjoint(record["id"] for record in lines["table2"])


def test_the_systems_of_each_table_are_programs_with_parameters_that_they_take(tmp_path: Path) -> None:
    import tomllib
    from importlib import import_module

    for name, table in setups.SYSTEMS.items():
        for system in tomllib.loads(table).values():
            module = import_module(f"asmodel_programs.{MODULES[system['model']]}")
            found = next(value for value in vars(module).values() if getattr(value, "name", "") == system["model"])
            found.check_params(system.get("params", {}))
            assert name


MODULES = {
    "evidence-qa": "evidence_qa",
    "evidence-filter": "evidence_qa",
    "relevance": "relevance",
    "chain-of-thought": "chain_of_thought",
    "golden-facts": "golden_facts",
    "all-paragraphs": "all_paragraphs",
    "plain": "plain",
}


def test_a_summary_of_a_long_text_says_what_each_changed_word_bought(data: Path, config: str) -> None:
    with ScriptedServer(lambda body: "It says what it says.") as server:
        settings(config, server)
        asked = (
            "--data",
            str(data),
            "--config",
            config,
            "--context",
            "256",
            "--edits",
            "2",
            "--part",
            "60",
            "--words",
            "30",
        )
        told = ran(summary.main, *asked)
        again = ran(summary.main, *asked, "--only-cached")
    assert told.exit_code == again.exit_code == 0, told.output + again.output
    assert "as it is" in told.output
    table = told.output[told.output.index(" tokens a call") :]  # before it stand the bars
    assert table.count(" changed ") == 2
    assert "Nothing was bought" in again.output
