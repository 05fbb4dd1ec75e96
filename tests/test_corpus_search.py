"""A corpus that can be searched: what is read of a folder, what is found, and that what is unchanged is left alone."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel import Run, program
from asmodel.errors import ConfigurationError
from asmodel.plugins import make
from asmodel.testing import FunctionUpstream, run_program
from asmodel_plugins.corpus_search import CorpusSearch, Document, cut, decoded, default_folder, marked, page

WHALES = "# Whales\n\nWhales sing for hours.\n\n## Food\n\nThey eat krill.\n"
SITE = """<!doctype html><html><head><title>Prices &amp; plans</title><style>b{}</style>
<script>var krill = "<p>not text</p>";</script></head>
<body><nav><a href="/">Home of everything</a></nav><header>Our banner</header>
<main><header><h1>Prices &amp; plans</h1></header><p>The small plan costs <b>five</b> euros
a month.</p><h2>Refunds</h2><p>Money back<br>within thirty days.</p>
<table><tr><td>Large</td><td>nine euros</td></tr></table></main>
<footer>Imprint</footer></body></html>"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "site").mkdir(parents=True)
    (folder / "whales.md").write_text(WHALES)
    (folder / "dogs.txt").write_text("Dogs bark at night.\n\nDogs fetch sticks.")
    (folder / "site" / "prices.html").write_text(SITE)
    (folder / "image.png").write_bytes(b"\x89PNG krill")
    (folder / ".hidden.md").write_text("krill krill krill")
    (folder / "more.jsonl").write_text(
        '{"text": "Cats sleep all day.", "title": "Cats", "id": "cat-1"}\n\n{"text": "Owls wake at dusk."}\n'
    )
    return folder


def bytes_read(folder: Path) -> int:
    """Of all files that are no pictures, and not hidden."""
    files = [file for file in folder.rglob("*.*") if file.suffix != ".png" and not file.name.startswith(".")]
    return sum(file.stat().st_size for file in files)


def rights(index: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (index, *index.iterdir())}


def databases(index: Path) -> list[Path]:
    return list(index.glob("*.sqlite"))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "index"


async def test_passages_of_every_kind_of_file_are_found_by_their_words(folder: Path, index: Path) -> None:
    corpus = CorpusSearch(folder, index=index)
    await corpus.open()
    (krill,) = await corpus.search("Who eats krill?")
    assert krill["text"] == "Whales: Food: They eat krill."
    assert (krill["id"], krill["title"]) == ("whales.md#2", "Whales: Food")
    assert krill["score"] > 0
    assert [p["id"] for p in await corpus.search("Cats")] == ["cat-1"]
    assert [p["id"] for p in await corpus.search("owls")] == ["more.jsonl:3"]
    assert [p["text"] for p in await corpus.search("refunds?")] == [
        "Prices & plans: Refunds: Money back within thirty days.\nLarge nine euros"
    ]
    (plan,) = await corpus.search("five small")
    assert plan["text"] == "Prices & plans: The small plan costs five euros a month."
    for absent in ("everything", "banner", "imprint", "PNG"):
        assert await corpus.search(absent) == []
    await corpus.close()


async def test_the_best_come_first_and_no_more_than_are_wanted(folder: Path, index: Path) -> None:
    corpus = CorpusSearch(folder, index=index)
    found = await corpus.search("dogs bark at night", n=3)
    assert found[0]["text"].startswith("dogs: Dogs bark")
    assert [p["score"] for p in found] == sorted((p["score"] for p in found), reverse=True)
    assert len(await corpus.search("dogs cats owls whales", n=2)) == 2
    assert await corpus.search("?!", n=2) == []
    await corpus.close()


@pytest.mark.parametrize("query", ['"', "a AND (b", "NEAR(x y", "text: x*", "^dogs -bark", "'; drop table files; --"])
async def test_nothing_in_a_query_is_taken_for_syntax(folder: Path, index: Path, query: str) -> None:
    corpus = CorpusSearch(folder, index=index)
    await corpus.search(query)
    assert (await corpus.search("krill"))[0]["id"] == "whales.md#2"
    await corpus.close()


async def test_only_what_has_changed_is_read_again_and_what_is_gone_is_forgotten(folder: Path, index: Path) -> None:
    told: list[tuple[str, int, int]] = []
    corpus = CorpusSearch(folder, index=index, name="docs")

    def progress(*news: Any) -> None:
        told.append(news)

    corpus.prepare(progress, shared=False)
    total = bytes_read(folder)
    assert told[-1] == ("corpus docs", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    told.clear()
    corpus.prepare(progress, shared=False)
    assert told == []
    (folder / "dogs.txt").write_text("Dogs swim.")
    (folder / "whales.md").unlink()
    (folder / "bees.txt").write_text("Bees hum.")
    corpus.prepare(progress, shared=False)
    assert told[-1][1:] == (19, 19), "ten bytes of dogs and nine of bees"
    assert await corpus.search("krill bark") == []
    assert {p["id"] for p in await corpus.search("dogs hum")} == {"dogs.txt", "bees.txt"}
    await corpus.close()


async def test_an_index_that_was_made_is_used_by_the_next_process_and_is_nobody_elses(
    folder: Path, index: Path
) -> None:
    first = CorpusSearch(folder, index=index)
    await first.open()
    size = first.size
    await first.close()
    second = CorpusSearch(folder, index=index)
    told: list[Any] = []
    second.prepare(lambda what, done, total: told.append(what), shared=False)
    assert (second.size, told) == (size, [])
    assert rights(index) == {0o700, 0o600}
    await second.close()


async def test_a_change_is_seen_while_searching_once_it_is_time_to_look(folder: Path, index: Path) -> None:
    corpus, patient = CorpusSearch(folder, index=index, refresh=0), CorpusSearch(folder, index=index)
    for each in (corpus, patient):
        assert await each.search("zebra") == []
    (folder / "zebra.txt").write_text("A zebra.")
    assert await patient.search("zebra") == []
    assert [p["id"] for p in await corpus.search("zebra")] == ["zebra.txt"]
    assert [p["id"] for p in await patient.search("zebra")] == ["zebra.txt"], "one index for both"
    await corpus.close()
    await patient.close()


async def test_a_folder_that_vanishes_leaves_what_was_indexed(
    folder: Path, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = CorpusSearch(folder, index=index, refresh=0)
    await corpus.open()
    os.rename(folder, folder.parent / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert await corpus.search("krill")
    assert "cannot be brought up to date" in caplog.text
    await corpus.close()


async def test_a_broken_index_is_made_anew(folder: Path, index: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = CorpusSearch(folder, index=index)
    await corpus.open()
    await corpus.close()
    (file,) = databases(index)
    file.write_bytes(b"not a database" * 100)
    again = CorpusSearch(folder, index=index)
    assert await again.search("krill")
    assert "is made anew" in caplog.text
    await again.close()


def test_several_processes_at_once_make_one_index(folder: Path, index: Path) -> None:
    def make_one(_: int) -> int:
        corpus = CorpusSearch(folder, index=index)
        corpus.prepare(lambda what, done, total: None, shared=False)
        return corpus.size

    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(make_one, range(16)))
    assert len(set(sizes)) == 1
    (file,) = databases(index)
    with sqlite3.connect(file) as connection:
        ids = [id for (id,) in connection.execute("select id from passages")]
    connection.close()
    assert len(ids) == len(set(ids)) == sizes[0]


async def test_what_a_link_leads_to_is_not_read(folder: Path, index: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "keys.txt").write_text("The password is swordfish.")
    os.symlink(secret, folder / "linked")
    os.symlink(secret / "keys.txt", folder / "keys.txt")
    corpus = CorpusSearch(folder, index=index)
    assert await corpus.search("swordfish") == []
    await corpus.close()


async def test_english_stems_and_trigrams_are_for_whoever_names_them(tmp_path: Path, index: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("She was running.\n\n鯨は長く歌い続ける動物である。")
    counts: dict[str, list[int]] = {}
    for match in ("words", "english", "trigrams"):
        corpus = CorpusSearch(tmp_path / "d", index=index, match=match)
        counts[match] = [len(await corpus.search(query)) for query in ("runs", "鯨は長く鳴く", "RÚNNING")]
        await corpus.close()
    assert counts == {"words": [0, 0, 1], "english": [1, 0, 1], "trigrams": [1, 1, 1]}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no file of these kinds"),
        ({"a.jsonl": '{"text": "x"}\nnot json\n'}, r"a\.jsonl:2: no JSON"),
        ({"a.jsonl": '{"title": "x"}\n'}, r"a\.jsonl:1: a document is"),
        ({"a.jsonl": '["x"]\n'}, r"a\.jsonl:1: a document is"),
    ],
)
async def test_what_cannot_be_read_is_named(tmp_path: Path, index: Path, files: dict[str, str], says: str) -> None:
    (tmp_path / "d").mkdir()
    for name, text in files.items():
        (tmp_path / "d" / name).write_text(text)
    with pytest.raises(ConfigurationError, match=says):
        await CorpusSearch(tmp_path / "d", index=index).open()


async def test_a_corpus_that_is_not_there_is_named_and_so_is_a_wrong_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"tools\.docs\.path: there is no folder or file"):
        await CorpusSearch(tmp_path / "none", index=tmp_path, name="docs").open()
    where = "asmodel_plugins.corpus_search:CorpusSearch"
    with pytest.raises(ConfigurationError, match="match") as refused:
        make("caches", where, {"path": str(tmp_path), "match": "stems", "words": "many"}, where="tools.docs")
    assert "tools.docs.words" in str(refused.value)


async def test_one_file_of_lines_is_a_corpus_too(folder: Path, index: Path) -> None:
    corpus = CorpusSearch(folder / "more.jsonl", index=index)
    assert corpus.name == "corpus"
    assert [p["id"] for p in await corpus.search("cats owls krill", n=9)] == ["cat-1", "more.jsonl:3"]
    await corpus.close()


async def test_a_program_searches_it_as_a_tool_and_a_model_is_told_how(folder: Path, index: Path) -> None:
    corpus = CorpusSearch(folder, index=index, name="docs")

    @program("finder")
    async def finder(run: Run) -> str:
        passages = await run(corpus.tool, run.question, n=1)
        return str(passages[0]["id"])

    upstream = FunctionUpstream(lambda call: "", name="up")
    assert (await run_program(finder, "krill", upstream=upstream)).text == "whales.md#2"
    told = corpus.tool.wire()["function"]
    assert told["name"] == "docs"
    assert set(told["parameters"]["properties"]) == {"query", "n"}
    json.dumps(told)
    await corpus.close()


def test_indexes_are_kept_in_the_users_cache_folder() -> None:
    assert default_folder({"XDG_CACHE_HOME": "/var/x"}) == Path("/var/x/asmodel/corpora")
    assert default_folder({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache/asmodel/corpora"


# What is in a document


def test_markdown_has_a_title_and_sections_and_code_is_no_heading() -> None:
    text = (
        "---\ntags: x\n---\nIntro\n=====\n\nFirst.\n\nPart\n----\nSecond.\n\n```\n# no heading\n```\n\n"
        "### Deep ##\nThird."
    )
    assert marked(text, "name") == Document(
        "Intro", [("", "\nFirst.\n"), ("Part", "Second.\n\n```\n# no heading\n```\n"), ("Deep", "Third.")]
    )
    assert marked("Just text.", "name") == Document("name", [("", "Just text.")])


def test_a_page_without_main_is_read_but_for_what_surrounds_it() -> None:
    text = "<title>T</title><nav>skip</nav><h1>T</h1><p>One &amp; <i>two</i>.<p>Three.<aside>skip</aside><footer>f"
    (section,) = page(text).sections
    assert (page(text).title, " ".join(section[1].split())) == ("T", "One & two. Three.")
    assert page("").sections == []


@given(st.text(max_size=200))
def test_any_text_is_a_page_and_a_markdown_file_of_some_kind(text: str) -> None:
    page(text)
    marked(text, "name")


@given(st.text(alphabet="ab .\n", max_size=600), st.integers(10, 40))
def test_no_passage_is_longer_than_it_may_be_and_no_word_is_lost(text: str, words: int) -> None:
    passages = list(cut(Document("", [("", text)]), "id", words))
    assert "".join("".join(p.text for p in passages).split()) == "".join(text.split())
    # A word that is longer than a passage is cut; letters are all that such a passage has.
    assert all(len(p.text.split()) <= words or " " not in p.text.strip() for p in passages)
    assert len({p.id for p in passages}) == len(passages)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("é".encode(), "é"),
        (b"\xef\xbb\xbfx", "x"),
        ("é".encode("utf-16"), "é"),
        (b'<meta charset="iso-8859-15">\xa4', '<meta charset="iso-8859-15">€'),
        (b"caf\xe9 \x80", "café €"),
        (b"<meta charset=nonsense>\xe9", "<meta charset=nonsense>é"),
    ],
)
def test_a_text_is_read_in_what_it_is_written_in(data: bytes, text: str) -> None:
    assert decoded(data) == text
