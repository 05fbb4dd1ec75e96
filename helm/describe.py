"""Make what is said about the chart from its values.yaml: helm/README.md, values.schema.json, and the dashboards.

    python helm/describe.py            write them (`make chart`)
    python helm/describe.py --check    say which are not what they should be, and end with 1

A comment above a value documents it; a line of it that starts with `@schema` holds JSON that is added to its schema.
What is of one kind in the defaults must stay of that kind; a table with values in it takes no others. `settings` is
checked by the settings of the server themselves, so that one that does not exist is refused before anything is made.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from asmodel.settings import Settings

HERE = Path(__file__).resolve().parent
CHART = HERE / "asmodel"
DASHBOARDS = HERE.parent / "docs" / "dashboards"

OPEN_TABLES = ("UpstreamSettings", "CacheSettings", "ToolSettings")
"""Tables whose further keys are options of a plug-in."""
DECIDED = ("host", "port", "keys", "drain_seconds", "program_folders", "metrics")
"""Settings that the chart decides. Whatever stands there, its templates say what to set instead."""


@dataclass
class Value:
    """One value of values.yaml, with what its comment says."""

    name: str
    default: Any
    doc: str
    schema: dict[str, Any]
    section: str
    """The heading under which it stands; of values at the top alone."""
    inside: list[Value] = field(default_factory=list["Value"])


def read(text: str) -> list[Value]:
    """The values in their order."""
    node = cast("Any", yaml).compose(text, Loader=yaml.SafeLoader)  # untyped
    return list(_values(node, yaml.safe_load(text), text.splitlines()))


def _values(node: Any, defaults: Mapping[str, Any], lines: list[str]) -> Iterator[Value]:
    section = ""
    for key, inner in node.value:
        name = str(key.value)
        line: int = key.start_mark.line
        comment: list[str] = []
        while line and (found := re.match(r"\s*#( |$)(.*)", lines[line - 1])) is not None:
            comment.insert(0, found[2])
            line -= 1
        for above in range(line - 1, max(line - 3, -1), -1):
            if heading := re.match(r"## (.+)", lines[above]):
                section = heading[1]
        said: dict[str, Any] = {}
        for words in comment:
            if words.startswith("@schema "):
                said |= json.loads(words.removeprefix("@schema "))
        doc = " ".join(words for words in comment if not words.startswith("@schema "))
        value = Value(name, defaults[name], doc, said, section)
        if inner.id == "mapping" and inner.value and "additionalProperties" not in said:
            value.inside = list(_values(inner, defaults[name], lines))
        yield value


# ---- the schema ----


def schema(values: list[Value]) -> dict[str, Any]:
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart asmodel",
        **_table(values),
        "definitions": _definitions(),
    }


def _table(values: list[Value]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {value.name: _schema(value) for value in values},
    }


def _schema(value: Value) -> dict[str, Any]:
    told: dict[str, Any] = {"description": value.doc} if value.doc else {}
    if value.schema.get("settings"):
        return told | {"$ref": "#/definitions/Settings"}
    if value.inside:
        return told | _table(value.inside)
    return told | {"type": _type(value.default)} | value.schema


def _type(default: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(default, kind):
            return name
    return "object"


def _definitions() -> dict[str, Any]:
    """The settings of the server, in the words of the draft that every Helm reads."""
    made = Settings.model_json_schema()
    tables: dict[str, Any] = {**made.pop("$defs"), "Settings": made}
    for name, table in tables.items():
        if name in OPEN_TABLES:
            table["additionalProperties"] = True
    made["properties"] |= {name: {"description": "Decided by the chart."} for name in DECIDED}
    return {name: _plain(table) for name, table in sorted(tables.items())}


_WORDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_LEFT_OUT = ("title", "default", "default_words", "writeOnly", "format", "description")


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(each) for each in cast("Any", node)]
    if not isinstance(node, dict):
        return node
    table = cast("dict[str, Any]", node)
    some = [each for each in table.get("anyOf", ()) if each != {"type": "null"}]
    if len(some) == 1:
        # `null` in values takes a default away; it is never a value.
        return _plain({name: each for name, each in table.items() if name != "anyOf"} | some[0])
    plain: dict[str, Any] = {}
    for name, each in table.items():
        if name == "$ref":
            plain[name] = str(each).replace("#/$defs/", "#/definitions/")
        elif name == "properties":
            plain[name] = {inner: _plain(what) for inner, what in each.items()}
        elif name not in _LEFT_OUT:
            plain[_WORDS.get(name, name)] = _plain(each)
    return plain


# ---- the page ----

HEAD = """# The chart

`helm/asmodel` installs asmodel in Kubernetes. How to install, upgrade, scale and look into it:
[docs/kubernetes.md](../docs/kubernetes.md). Whole values files to begin with: [laptop](examples/laptop.yaml),
[team](examples/team.yaml), [fleet](examples/fleet.yaml).

Values are checked before anything is made: one that does not exist or is of the wrong kind is refused, and so are
values that do not go together. The settings of the server, under `settings`, are checked as well.

This page is made from the comments of `asmodel/values.yaml`, by `make chart`.
"""


def page(values: list[Value]) -> str:
    lines = [HEAD]
    section = ""
    for value in values:
        if value.section != section:
            section = value.section
            lines += [f"## {section}\n", "| value | default | what it is for |", "|---|---|---|"]
        lines += _rows(value, "")
        if value is values[-1] or values[values.index(value) + 1].section != section:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rows(value: Value, before: str) -> Iterator[str]:
    name = before + value.name
    doc = value.doc
    if "enum" in value.schema and not doc:
        doc = "One of " + ", ".join(f"`{each}`" for each in value.schema["enum"]) + "."
    if value.inside:
        if doc:
            yield f"| `{name}` | | {doc} |"
        for inner in value.inside:
            yield from _rows(inner, f"{name}.")
        return
    default = json.dumps(value.default, ensure_ascii=False)
    yield f"| `{name}` | `{default}` | {doc or _in_kubernetes_words(value)} |"


def _in_kubernetes_words(value: Value) -> str:
    return "As Kubernetes has it." if isinstance(value.default, dict | list) else ""


# ---- files ----


def made() -> dict[Path, str]:
    """Every file that is made, and what should be in it."""
    values = read((CHART / "values.yaml").read_text(encoding="utf-8"))
    files = {
        HERE / "README.md": page(values),
        CHART / "values.schema.json": json.dumps(schema(values), indent=1, ensure_ascii=False) + "\n",
    }
    # Helm reads no file that is not in the chart's own folder.
    for file in sorted(DASHBOARDS.glob("*.json")):
        files[CHART / "dashboards" / file.name] = file.read_text(encoding="utf-8")
    return files


def main() -> None:
    wrong = [file for file, text in made().items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for file in wrong:
            print(f"{file.relative_to(HERE.parent)} is not what values.yaml says: make chart")
        sys.exit(bool(wrong))
    for file in wrong:
        file.parent.mkdir(exist_ok=True)
        file.write_text(made()[file], encoding="utf-8")
        print(file.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
