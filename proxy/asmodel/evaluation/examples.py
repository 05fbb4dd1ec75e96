"""The questions of a JSONL file, one a line: what is asked, what is right, and what else a program is given.

Which field is what is said by a `Layout`. A line that cannot be used is told by its number, before anything is bought.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from asmodel.calls import JSON, Document, Message
from asmodel.errors import ConfigurationError
from asmodel.evaluation.fields import Field, NoSuchField, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which field of a line is what."""

    question: Field | None
    """The question, or with `conversation` a list of messages; None where a step is asked and no question."""
    conversation: bool = False
    id: Field | None = None
    """None is `id` where each line has it, else the number of the line."""
    params: Mapping[str, Field] = field(default_factory=dict[str, Field])
    """Parameters that come out of the data, by name."""
    documents: Sequence[Field] = ()
    references: Sequence[Field] = ()
    """What scorers compare with."""
    template: Sequence[str] = ()
    """Texts with `{field}` in them that are to be filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line."""

    id: str
    line: int
    record: Mapping[str, JSON]
    messages: tuple[Message, ...]
    question: str
    """The text of the last message of the user."""
    documents: tuple[Document, ...] = ()
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A file, read."""

    path: Path
    digest: str
    """SHA-256 of its bytes, in hex."""
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Examples that were drawn, and from what."""

    examples: tuple[Example, ...]
    of: int
    """How many there were to draw from, after the exclusion."""
    excluded: int
    seed: int | None
    """None where nothing was drawn: all that was not excluded, in the order of the file."""
    skipped: int


def read(path: Path, layout: Layout) -> Data:
    """The file's lines; blank ones are passed over. Raises ConfigurationError naming the first line that is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}:{line}: is not UTF-8") from None
    records: list[tuple[int, Mapping[str, JSON]]] = []
    # Not splitlines: a string of JSON may hold U+2028, which ends no line of JSONL.
    for number, written in enumerate(text.split("\n"), 1):
        if written.strip():
            records.append((number, _record(path, number, written)))
    if not records:
        raise ConfigurationError(f"{path}: holds no line; one JSON object a line is wanted")
    id_field = layout.id or (Field("id") if all("id" in record for _, record in records) else None)
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for number, record in records:
        try:
            example = _example(number, record, layout, id_field)
        except (NoSuchField, ValueError) as error:
            raise ConfigurationError(f"{path}:{number}: {error.args[0]}") from None
        if example.id in lines:
            raise ConfigurationError(f'{path}:{number}: the id "{example.id}" is that of line {lines[example.id]} too')
        lines[example.id] = number
        examples.append(example)
    return Data(path=path, digest=hashlib.sha256(data).hexdigest(), examples=tuple(examples))


def draw(
    data: Data, *, limit: int | None, skip: int = 0, seed: int | None = None, excluded: Iterable[str] = ()
) -> Sample:
    """`limit` examples at random, after the `skip` first ones of the same order.

    The order is that of SHA-256 over the seed and an example's id, so it does not depend on the file's; a smaller
    sample is the beginning of a larger one, and what `skip` passes over is in no sample that was drawn before it.
    Without any of limit, skip and seed, nothing is drawn. Raises ConfigurationError where nothing is left.
    """
    out = set(excluded)
    left = [example for example in data.examples if example.id not in out]
    gone = len(data.examples) - len(left)
    if out and not gone:
        raise ConfigurationError(f"{data.path}: none of the {len(out)} ids that are to be excluded is in it")
    drawing = limit is not None or skip or seed is not None
    at = (seed or 0) if drawing else None
    if at is not None:
        left.sort(key=lambda example: hashlib.sha256(f"{at}\n{example.id}".encode()).digest())
    chosen = left[skip : None if limit is None else skip + limit]
    if not chosen:
        raise ConfigurationError(
            f"{data.path}: no question is left: of {len(data.examples)}, {gone} are excluded and {skip} skipped"
        )
    return Sample(examples=tuple(chosen), of=len(left), excluded=gone, seed=at, skipped=skip)


def excluded_ids(path: Path) -> list[str]:
    """The ids in a file: one a line, or those of a report that `--json` has written. Raises ConfigurationError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--exclude {path}: {error}") from None
    if text.lstrip().startswith("{"):
        try:
            body = json.loads(text)
            return [str(example["id"]) for example in body["examples"]]
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(
                f"--exclude {path}: is neither ids, one a line, nor a report of `--json`"
            ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def filled(template: str, record: Mapping[str, JSON]) -> str:
    """The template with each `{field}` in it as text; `{{` and `}}` are braces. Raises NoSuchField, ValueError."""
    parts: list[str] = []
    rest = template
    while rest:
        head, brace, tail = _to_brace(rest)
        parts.append(head)
        if not brace:
            break
        if tail.startswith(brace):
            parts.append(brace)
            rest = tail[1:]
            continue
        name, end, rest = tail.partition("}")
        if brace == "}" or not end or not name:
            raise ValueError(f"the prompt has a lone {brace} in it; {brace * 2} is a brace, and {{field}} a field")
        parts.append(text_of(Field(name).of(record)))
    return "".join(parts)


def _to_brace(text: str) -> tuple[str, str, str]:
    places = [place for place in (text.find("{"), text.find("}")) if place >= 0]
    if not places:
        return text, "", ""
    place = min(places)
    return text[:place], text[place], text[place + 1 :]


def _record(path: Path, number: int, line: str) -> Mapping[str, JSON]:
    where = f"{path}:{number}"
    try:
        record = json.loads(line, parse_constant=_no_constant)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{where}: holds half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip().startswith("["):
            raise ConfigurationError(f"{where}: is a JSON list; one object a line is wanted (JSONL)") from None
        raise ConfigurationError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise ConfigurationError(f"{where}: is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ConfigurationError(f"{where}: is JSON, and no object; one object a line is wanted (JSONL)")
    return cast("dict[str, Any]", record)


def _no_constant(name: str) -> None:
    raise ValueError(f"it has no number {name}")


def _example(number: int, record: Mapping[str, JSON], layout: Layout, id_field: Field | None) -> Example:
    messages: tuple[Message, ...] = ()
    if layout.question is not None:
        asked = layout.question.of(record)
        messages = conversation(asked) if layout.conversation else (Message("user", _question(asked, layout.question)),)
    for reference in layout.references:
        reference.of(record)
    for template in layout.template:
        filled(template, record)
    documents = [document for each in layout.documents for document in _documents(each.of(record), each)]
    return Example(
        id=str(number) if id_field is None else text_of(id_field.of(record)),
        line=number,
        record=record,
        messages=messages,
        question=next((m.text for m in reversed(messages) if m.role == "user"), ""),
        documents=tuple(documents),
        params={name: each.of(record) for name, each in layout.params.items()},
    )


def _question(value: JSON, named: Field) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'the question, field "{named.path}", is no text; --question names another field')
    return value


def conversation(value: JSON) -> tuple[Message, ...]:
    """A list of OpenAI's messages. Raises ValueError."""
    wanted = 'a conversation is a list of messages such as {"role": "user", "content": "…"}'
    if not isinstance(value, list) or not value:
        raise ValueError(wanted)
    messages: list[Message] = []
    items: list[Any] = value
    for message in items:
        if not isinstance(message, dict):
            raise ValueError(wanted)
        told = cast("dict[str, Any]", message)
        role, content = told.get("role"), told.get("content")
        if not isinstance(role, str) or not isinstance(content, (str, list)):
            raise ValueError(wanted)
        messages.append(Message(role, cast("Any", content)))
    return tuple(messages)


def _documents(value: JSON, named: Field) -> list[Document]:
    """Texts; objects with `text`, `id` and `title`; pairs of a title and its text or sentences; texts by id."""
    if isinstance(value, dict):
        texts = cast("dict[str, Any]", value)
        return [Document(text=text_of(text), id=id) for id, text in texts.items()]
    if not isinstance(value, list):
        raise ValueError(f'the documents, field "{named.path}", are no list; --document names another field')
    items: list[Any] = value
    return [_document(place, item, named) for place, item in enumerate(items, 1)]


def _document(place: int, item: Any, named: Field) -> Document:
    if isinstance(item, str):
        return Document(text=item, id=str(place))
    if isinstance(item, dict):
        fields = cast("dict[str, Any]", item)
        if isinstance(fields.get("text"), str):
            title = str(fields.get("title") or "")
            return Document(text=fields["text"], title=title, id=str(fields.get("id") or title or place))
    if isinstance(item, list):
        both = cast("list[object]", item)
        if len(both) == 2 and isinstance(both[0], str):
            told = cast("list[object]", both[1]) if isinstance(both[1], list) else [both[1]]
            sentences = [sentence.strip() for sentence in told if isinstance(sentence, str)]
            if len(sentences) == len(told):
                return Document(text=" ".join(sentences), title=both[0], id=both[0])
    raise ValueError(
        f'document {place} of the field "{named.path}" is neither a text, nor an object with "text", nor a pair of a '
        "title and a text"
    )
