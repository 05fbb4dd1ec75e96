"""A corpus that can be searched: text, Markdown and HTML of a folder, or documents as JSON lines; passages, by BM25.

The index is SQLite's own full-text search (FTS5), which is in every Python that we know: nothing to install, no pickle,
and a change of one document is a change of one document. It is made once and kept; what has changed since is read
again at the start and while searching. The corpus is named in the settings and nowhere else: no request names a path.
"""

from __future__ import annotations

import asyncio
import hashlib
import html.parser
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import orjson

from asmodel.errors import ConfigurationError
from asmodel.tools import Tool

VERSION = 1
"""Of the index and of how texts are cut; an index of another version is made anew."""

TEXTS = frozenset({".txt", ".text", ".md", ".markdown", ".rst"})
PAGES = frozenset({".html", ".htm", ".xhtml"})
LINES = frozenset({".jsonl", ".ndjson"})

WORDS = 150
"""In a passage, at most."""
_KNOWN = "select path, bytes, changed, first, past from files"

LARGEST = 32_000_000
"""Bytes of a text or a page; a larger one is left out, with a warning. Files of lines may be of any size."""
REFRESH = 60.0
"""Seconds after which a search looks whether files have changed."""
MOST = 1000
"""Passages of one search."""

Match = Literal["words", "english", "trigrams"]
Progress = Callable[[str, int, int], None]

_TOKENIZERS: dict[str, str] = {
    "words": "unicode61 remove_diacritics 2",
    "english": "porter unicode61 remove_diacritics 2",
    "trigrams": "trigram",
}

log = logging.getLogger("asmodel.corpus")


class Passage(TypedDict):
    """A passage as the tool returns it."""

    id: str
    title: str
    text: str
    """With the title in front, as a model is to be shown it."""
    score: float
    """BM25; the greater the better, and of use only within one search."""


class CorpusSearch:
    """A tool `(query, n) -> passages`, the best first.

    `path` is a folder, of which every text, Markdown, HTML and JSON lines file is read that is not hidden, or one such
    file. A line of JSON is a document: `text`, and perhaps `title` and `id`. `match` says which words are the same:
    those that are written alike but for case and accents (`words`), those of one English stem (`english`), or all that
    share three characters (`trigrams`, for languages that do not set words apart). `words` is how long a passage may
    be. Files are looked at again after `refresh` seconds. The index is kept in `index`, by default in the user's cache
    folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str = "corpus",
        match: Match = "words",
        words: int = WORDS,
        refresh: float = REFRESH,
        index: Path | None = None,
    ) -> None:
        if words < 10:
            raise ConfigurationError(f"tools.{name}.words is {words}, and must be 10 or more")
        self.name = name
        self._path = Path(path).expanduser().absolute()
        self._match, self._words, self._refresh = match, words, refresh
        told = orjson.dumps([VERSION, str(self._path), match, words])
        self._file = (index or default_folder()) / f"{hashlib.sha256(told).hexdigest()[:32]}.sqlite"
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._looked = 0.0
        self.tool: Tool[..., list[Passage]] = Tool(name, self.search, f"Search the documents of {name} for passages.")

    def prepare(self, progress: Progress, *, shared: bool) -> Mapping[str, str]:
        """Make the index, or bring it up to date. Raises ConfigurationError where there is nothing to be read."""
        with self._lock:
            self._update(progress)
        return {}

    def release(self) -> None:
        """Nothing that `prepare` started goes on."""

    async def open(self) -> None:
        await asyncio.to_thread(self.prepare, _untold, shared=False)

    async def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    async def search(self, query: str, n: int = 10) -> list[Passage]:
        """The `n` passages that match the words of the query best; fewer where fewer match at all."""
        return await asyncio.to_thread(self._search, query, max(1, min(n, MOST)))

    @property
    def size(self) -> int:
        """How many passages there are."""
        with self._lock:
            ((count,),) = self._connected().execute("select count(*) from passages")
            return int(count)

    # -- in a thread

    def _search(self, query: str, n: int) -> list[Passage]:
        wanted = " OR ".join(f'"{token}"' for token in self._tokens(query))
        with self._lock:
            if time.monotonic() - self._looked > self._refresh:
                try:
                    self._update(_untold)
                except (ConfigurationError, sqlite3.Error, OSError) as error:
                    # What was indexed is still there to be searched.
                    self._looked = time.monotonic()
                    log.warning("corpus %s cannot be brought up to date: %s", self.name, error)
            if not wanted:
                return []
            rows = self._connected().execute(
                "select id, title, text, -bm25(passages) from passages where passages match ? "
                "order by rank, rowid limit ?",
                (wanted, n),
            )
            return [Passage(id=id, title=title, text=text, score=score) for id, title, text, score in rows]

    def _tokens(self, query: str) -> list[str]:
        words = dict.fromkeys(re.findall(r"\w+", query.lower()))
        if self._match != "trigrams":
            return list(words)
        return list(dict.fromkeys(word[i : i + 3] for word in words for i in range(len(word) - 2)))

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._connection = self._begun()
            except sqlite3.DatabaseError as error:
                if "fts5" in str(error):
                    raise ConfigurationError(f"tools.{self.name}: this Python's SQLite has no FTS5") from None
                log.warning("the index of corpus %s cannot be read and is made anew: %s", self.name, error)
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self._file}{suffix}").unlink(missing_ok=True)
                self._connection = self._begun()
        return self._connection

    def _begun(self) -> sqlite3.Connection:
        # Made by us before SQLite makes it, so that nobody else can ever read it; its companions get the same rights.
        os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self._file, timeout=600, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = normal")
            connection.execute("begin immediate")
            connection.execute(
                "create table if not exists files (path text primary key, bytes int, changed int, first int, past int)"
            )
            connection.execute(
                "create virtual table if not exists passages using fts5"
                f"(title, text, id unindexed, tokenize = '{_TOKENIZERS[self._match]}')"
            )
            connection.execute("commit")
        except BaseException:
            connection.close()
            raise
        return connection

    def _update(self, progress: Progress) -> None:
        """Read what is new or has changed and forget what is gone: all of it, or nothing."""
        found = self._found()
        connection = self._connected()
        self._looked = time.monotonic()
        if _states(found) == {path: (size, changed) for path, size, changed, _, _ in connection.execute(_KNOWN)}:
            return
        # One process at a time; who has waited finds the work done.
        connection.execute("begin immediate")
        try:
            known = {row[0]: row[1:] for row in connection.execute(_KNOWN)}
            for path, (_, _, first, past) in known.items():
                if path not in found or (found[path].bytes, found[path].changed) != known[path][:2]:
                    connection.execute("delete from passages where rowid >= ? and rowid < ?", (first, past))
                    connection.execute("delete from files where path = ?", (path,))
            new = [f for path, f in found.items() if path not in known or (f.bytes, f.changed) != known[path][:2]]
            total, done = sum(f.bytes for f in new), 0
            for f in new:
                ((first,),) = connection.execute("select coalesce(max(past), 1) from files")
                past = first
                with suppress(FileNotFoundError):  # Gone since it was listed; the next look forgets it.
                    for passage, read in self._passages(f):
                        connection.execute(
                            "insert into passages (rowid, title, text, id) values (?, ?, ?, ?)",
                            (past, passage.title, passage.text, passage.id),
                        )
                        past += 1
                        if past % 1000 == 0:
                            progress(f"corpus {self.name}", done + read, total)
                done += f.bytes
                connection.execute("insert into files values (?, ?, ?, ?, ?)", (f.id, f.bytes, f.changed, first, past))
                progress(f"corpus {self.name}", done, total)
            connection.execute("commit")
        except BaseException:
            connection.execute("rollback")
            raise

    def _found(self) -> dict[str, _File]:
        """The files of the corpus by their ids, which are their paths within it."""
        if self._path.is_file():
            files = [self._path]
            root = self._path.parent
        elif self._path.is_dir():
            root = self._path
            files = list(_walked(root))
        else:
            raise ConfigurationError(f"tools.{self.name}.path: there is no folder or file {self._path}")
        found: dict[str, _File] = {}
        for file in files:
            with suppress(FileNotFoundError):  # Gone since it was listed.
                stat = file.stat()
                if file.suffix.lower() not in LINES and stat.st_size > LARGEST:
                    log.warning("corpus %s leaves out %s: it has more than %d bytes", self.name, file, LARGEST)
                    continue
                id = file.relative_to(root).as_posix()
                found[id] = _File(id, file, stat.st_size, stat.st_mtime_ns)
        if not found:
            kinds = ", ".join(sorted(TEXTS | PAGES | LINES))
            raise ConfigurationError(f"tools.{self.name}.path: {self._path} has no file of these kinds: {kinds}")
        return found

    def _passages(self, file: _File) -> Iterator[tuple[_Passage, int]]:
        """The passages of a file, each with the bytes of the file that have been read by then."""
        suffix = file.path.suffix.lower()
        if suffix in LINES:
            yield from self._lines(file)
            return
        text = decoded(file.path.read_bytes())
        document = page(text) if suffix in PAGES else marked(text, file.path.stem)
        for passage in cut(document, file.id, self._words):
            yield passage, file.bytes

    def _lines(self, file: _File) -> Iterator[tuple[_Passage, int]]:
        read = 0
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                read += len(line)
                if not line.strip():
                    continue
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise ConfigurationError(f"tools.{self.name}: {file.path}:{number}: no JSON: {error.msg}") from None
                fields = cast("dict[str, Any]", record) if isinstance(record, dict) else {}
                if not isinstance(fields.get("text"), str):
                    raise ConfigurationError(
                        f'tools.{self.name}: {file.path}:{number}: a document is {{"text": "…"}}, with "title" '
                        'and "id" if it has them'
                    )
                title, id = str(fields.get("title") or ""), str(fields.get("id") or f"{file.id}:{number}")
                for passage in cut(Document(title, [("", fields["text"])]), id, self._words):
                    yield passage, read


def default_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where indexes are kept: `asmodel/corpora` in the user's cache folder (XDG base directories, version 0.8)."""
    base = Path((os.environ if environ is None else environ).get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "asmodel" / "corpora"


def _untold(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class _File:
    id: str
    path: Path
    bytes: int
    changed: int
    """Nanoseconds, of the file system's clock."""


def _states(files: Mapping[str, _File]) -> dict[str, tuple[int, int]]:
    return {id: (file.bytes, file.changed) for id, file in files.items()}


@dataclass(frozen=True, slots=True)
class _Passage:
    id: str
    title: str
    text: str


def _walked(root: Path) -> Iterator[Path]:
    """The files to be read, in the order of their paths. What is hidden is left out, and so is what a link leads to."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if not file.startswith(".") and path.suffix.lower() in TEXTS | PAGES | LINES and not path.is_symlink():
                yield path


# ---- what is in a document


@dataclass(frozen=True, slots=True)
class Document:
    """A title, and the sections: a heading, which may be empty, and the text under it."""

    title: str
    sections: Sequence[tuple[str, str]]


def decoded(data: bytes) -> str:
    """UTF-8, or what a page says that it is in, or else Windows-1252, which reads anything."""
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8-sig")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    told = re.search(rb"""charset\s*=\s*["']?\s*([a-zA-Z0-9_-]+)""", data[:2048])
    if told:
        with suppress(LookupError):
            return data.decode(told[1].decode("ascii"), errors="replace")
    return data.decode("cp1252", errors="replace")


_HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})\s*$")
_FENCE = re.compile(r" {0,3}(```|~~~)")


def marked(text: str, name: str) -> Document:
    """Plain text or Markdown: its first heading is its title, or else its name is; headings begin sections."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)  # front matter
    title, heading, lines = "", "", list[str]()
    sections: list[tuple[str, str]] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= _FENCE.match(line) is not None
        found = None if fenced else _HEADING.match(line)
        alone = bool(lines and lines[-1].strip() and (len(lines) < 2 or not lines[-2].strip()))
        under = alone and not fenced and _UNDERLINE.match(line)
        if found or under:
            words = found[2] if found else lines.pop().strip()
            sections.append((heading, "\n".join(lines)))
            heading, lines = ("" if not title else words), []
            title = title or words
        else:
            lines.append(line)
    sections.append((heading, "\n".join(lines)))
    return Document(title or name, [(heading, text) for heading, text in sections if text.strip()])


_SKIPPED = frozenset({"script", "style", "noscript", "template", "svg", "nav", "header", "footer", "aside", "form"})
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_INLINE = frozenset(
    {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "dfn", "em", "i", "kbd", "mark", "q", "s", "samp", "small"}
    | {"span", "strong", "sub", "sup", "time", "u", "var", "wbr", "font", "del", "ins", "label", "big", "tt"}
)
_VOID = frozenset(
    {"br", "hr", "img", "input", "meta", "link", "area", "base", "col", "embed", "source", "track", "wbr"}
)


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.sections: list[tuple[str, list[str]]] = [("", [])]
        self.main: int | None = None
        """Where the sections of <main> begin, and where they end."""
        self.after: int | None = None
        self._within: str | None = None
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # A header inside <main> is part of the text; one outside is the site's.
        if self._skipping or (tag in _SKIPPED and not (tag in ("header", "aside") and self.main is not None)):
            if tag not in _VOID:
                self._skipping.append(tag)
            return
        if tag == "main" and self.main is None:
            self.main = len(self.sections)
            self.sections.append(("", []))
        if tag == "title" or tag in _HEADINGS:
            self._within = tag
            if tag in _HEADINGS:
                self.sections.append(("", []))
        elif tag not in _INLINE:
            self._say("\n\n" if tag not in ("br", "td", "th") else " ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag in self._skipping:
                del self._skipping[self._skipping.index(tag) :]
        elif tag == self._within:
            self._within = None
        elif tag == "main" and self.after is None:
            self.after = len(self.sections)
            self.sections.append(("", []))
        elif tag not in _INLINE:
            self._say("\n\n" if tag not in ("td", "th") else " ")

    def handle_data(self, data: str) -> None:
        if self._skipping:
            return
        if self._within == "title":
            self.title += data
        elif self._within is not None:
            heading, text = self.sections[-1]
            self.sections[-1] = (heading + data, text)
        else:
            self._say(re.sub(r"\s+", " ", data))

    def _say(self, text: str) -> None:
        self.sections[-1][1].append(text)


def page(text: str) -> Document:
    """An HTML page: its title, its headings and its text, without scripts, navigation, header and footer; of a page
    that says what is `<main>` in it, only that."""
    parser = _Page()
    parser.feed(text)
    parser.close()
    shown = parser.sections if parser.main is None else parser.sections[parser.main : parser.after]
    sections = [(" ".join(heading.split()), "".join(parts)) for heading, parts in shown]
    title = " ".join(parser.title.split()) or next((heading for heading, _ in sections if heading), "")
    return Document(title, [(h, t) for h, t in ((h if h != title else "", t) for h, t in sections) if t.strip()])


def cut(document: Document, id: str, words: int) -> Generator[_Passage]:
    """The document in passages of at most so many words, along its paragraphs; none goes beyond its section."""
    number = 0
    for heading, text in document.sections:
        above = ": ".join(part for part in (document.title, heading) if part)
        for body in _packed(text, words):
            number += 1
            whole = f"{above}: {body}" if above else body
            yield _Passage(id if number == 1 else f"{id}#{number}", above, whole)


def _packed(text: str, words: int) -> Iterator[str]:
    """Paragraphs, as many together as there is room for; one that is too long alone is cut after its sentences."""
    held: list[str] = []
    count = 0
    for piece in _pieces(text, words):
        size = _length(piece)
        if held and count + size > words:
            yield "\n".join(held)
            held, count = [], 0
        held.append(piece)
        count += size
    if held:
        yield "\n".join(held)


def _pieces(text: str, words: int) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        tidy = " ".join(paragraph.split())
        if not tidy:
            continue
        if _length(tidy) <= words:
            yield tidy
            continue
        for sentence in re.split(r"(?<=[.!?…])\s+|(?<=[。！？])", tidy):  # noqa: RUF001
            if _length(sentence) <= words:
                yield sentence
                continue
            limit = words * 6
            yield from (sentence[i : i + limit] for i in range(0, len(sentence), limit))


def _length(text: str) -> int:
    """In words; where none are written apart, eight characters are one."""
    return max(len(text.split()), len(text) // 8)
