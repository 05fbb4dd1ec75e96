"""Each room imports only what it may: the core no provider, a plug-in no other plug-in, a program nothing but asmodel.

Every import counts, wherever in a file it is: at the top, inside a function, under `if TYPE_CHECKING`, or by
`import_module` with a literal name.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

CORE = "proxy/asmodel"
PLUGINS = "plugins/asmodel_plugins"
PROGRAMS = "programs/asmodel_programs"

# The one library that each plug-in file is for, besides the core and what all may use.
PLUGIN_LIBRARIES: dict[str, set[str]] = {
    "corpus_search.py": set(),
    "disk_cache.py": set(),
    "disk_folder.py": set(),
    "disk_lease.py": set(),
    "disk_memory.py": set(),
    "disk_store.py": {"diskcache"},
    "disk_writer.py": set(),
    "embedded_child.py": {"xllamacpp"},
    "embedded_process.py": set(),
    "embedded_upstream.py": {"aiohttp"},
    "embedded_weights.py": set(),
    "litellm_upstream.py": {"litellm"},
    "memory_cache.py": set(),
    "openai_http.py": {"httptools"},
    "openai_proxied.py": {"aiohttp"},
    "openai_stream.py": set(),
    "openai_upstream.py": set(),
    "redis_address.py": {"redis"},
    "redis_cache.py": set(),
    "redis_lease.py": set(),
    "redis_server.py": set(),
}
# Files that are one plug-in in several parts, and so may import each other.
FAMILIES = ("disk_", "embedded_", "openai_", "redis_")
# Values and their JSON, which plug-ins share with the core.
PLUGINS_MAY_ALL_USE = {"orjson", "pydantic", "typing_extensions"}
# What a plug-in may not lean on: the server that is built around it.
SERVER = {"asmodel.app", "asmodel.chat", "asmodel.cli", "asmodel.settings", "asmodel.wire"}

CORE_MAY_USE = {
    "anyio",
    "click",
    "httptools",
    "jsonschema",
    "opentelemetry",
    "orjson",
    "pydantic",
    "pydantic_core",
    "pydantic_settings",
    "referencing",
    "rich",
    "starlette",
    "typing_extensions",
    "uvicorn",
    "uvloop",
}
# Where a library that belongs to the server's outside may be named in the core; an author's import must not meet it.
ONLY_IN: dict[str, set[str]] = {
    "click": {"cli.py", "asking.py"},
    "jsonschema": {"structured.py"},
    "referencing": {"structured.py"},
    "pydantic_settings": {"settings.py"},
    "opentelemetry.sdk": {"trace_export.py", "trace_sdk.py", "testing.py", "metric_export.py"},
    "opentelemetry.exporter": {"trace_sdk.py", "metric_export.py"},
}
# Values and shapes: what they do depends on nothing but what they are given.
PURE = {"calls.py", "response_events.py", "response_wire.py", "wire.py"}
NOT_PURE = {
    "aiofiles",
    "anyio",
    "asyncio",
    "http.client",
    "http.server",
    "opentelemetry",
    "os",
    "pathlib",
    "random",
    "socket",
    "sqlite3",
    "starlette",
    "subprocess",
    "threading",
    "time",
    "urllib.request",
    "uvicorn",
}

PROGRAMS_MAY_USE = {"pydantic"}


class Import(NamedTuple):
    line: int
    module: str
    """Absolute. `from a import b` counts as `a.b` as well as `a`, since `b` may be a module."""


def imports(file: Path, package: str) -> Iterator[Import]:
    """Every module that the file imports. `package` is the package it is in, against which relative imports resolve."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield Import(node.lineno, name.name)
            case ast.ImportFrom(module=module, names=names, level=level):
                parts = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parts, *([module] if module else [])])
                yield Import(node.lineno, base)
                for name in names:
                    yield Import(node.lineno, f"{base}.{name.name}")
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield Import(node.lineno, module)
            case _:
                pass


def within(module: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is the module or a package above it."""
    return next((name for name in names if module == name or module.startswith(f"{name}.")), None)


def top(module: str) -> str:
    return module.split(".")[0]


def is_third_party(module: str, *own: str) -> bool:
    return top(module) not in {*sys.stdlib_module_names, "__future__", *own}


def wrong_in_core(file: Path, module: str) -> str | None:
    if top(module) in {"asmodel_plugins", "asmodel_programs"}:
        return "the core is handed its plug-ins and programs; find them by name in plugins.py"
    if file.name in PURE and within(module, NOT_PURE):
        return f"{file.name} is pure; what waits, reads or knows the server belongs in the file that uses {file.name}"
    if (library := within(module, ONLY_IN)) and file.name not in ONLY_IN[library]:
        return f"{library} belongs in {' or '.join(sorted(ONLY_IN[library]))}"
    if is_third_party(module, "asmodel") and top(module) not in CORE_MAY_USE:
        return f"a file of its own in {PLUGINS} is the room for {top(module)}, behind a protocol of protocols.py"
    return None


def wrong_in_plugin(file: Path, module: str) -> str | None:
    if top(module) == "asmodel_programs":
        return f"a plug-in knows no program; what both need belongs in {CORE}"
    if within(module, SERVER):
        return f"a plug-in leans on protocols, calls and errors, not on the server; app.py in {CORE} is where they meet"
    if top(module) == "asmodel_plugins":
        other = module.split(".")[1] if "." in module else ""
        family = next((family for family in FAMILIES if file.name.startswith(family)), None)
        if other in {"", file.stem} or (family and other.startswith(family)):
            return None
        return f"no plug-in imports another; what both need belongs in {CORE}"
    allowed = PLUGIN_LIBRARIES[file.name] | PLUGINS_MAY_ALL_USE if file.name in PLUGIN_LIBRARIES else set[str]()
    if is_third_party(module, "asmodel") and top(module) not in allowed:
        if file.name not in PLUGIN_LIBRARIES:
            return f"name its one library in PLUGIN_LIBRARIES of {Path(__file__).name}"
        return f"another library is another plug-in: a file of its own in {PLUGINS}"
    return None


def wrong_in_program(file: Path, module: str) -> str | None:
    if top(module) == "asmodel_plugins":
        return f"a program says which role it asks, never which plug-in; settings decide that, in {CORE}/app.py"
    if top(module) == "asmodel_programs":
        return f"a program is one file that reads by itself; what several need belongs in {CORE}"
    if module.startswith("asmodel.") and module.split(".")[1] not in PUBLIC_NAMES:
        return "a program imports from `asmodel` itself, as anyone's; what is missing there belongs in its __init__.py"
    if is_third_party(module, "asmodel") and top(module) not in PROGRAMS_MAY_USE:
        return f"a program leans on asmodel alone; {top(module)} belongs in {PLUGINS}"
    return None


def violations(root: Path) -> list[str]:
    """Everything under `root` that imports what its room may not, as `file:line: what is wrong; where it belongs`."""
    found: list[str] = []
    for room, wrong in ((CORE, wrong_in_core), (PLUGINS, wrong_in_plugin), (PROGRAMS, wrong_in_program)):
        base = root / room
        for file in sorted(base.rglob("*.py")):
            package = ".".join([base.name, *file.parent.relative_to(base).parts])
            seen: set[tuple[int, str]] = set()
            for line, module in imports(file, package):
                reason = (
                    "tests are nobody's library; what is of use to others belongs in asmodel/testing.py"
                    if top(module) in {"tests", "conftest"}
                    else wrong(file, module)
                )
                # `from a import b` is seen as `a` and as `a.b`: one line, one complaint.
                if reason and (line, reason) not in seen:
                    seen.add((line, reason))
                    found.append(f"{file.relative_to(root)}:{line}: imports {module}; {reason}")
    return found


def _public_names() -> set[str]:
    """What `asmodel/__init__.py` offers, read from its text: `from asmodel import X` is an import of `asmodel.X`."""
    init = ROOT / CORE / "__init__.py"
    if not init.exists():
        return set()
    names: set[str] = set()
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names |= set(ast.literal_eval(node.value))
    return names


PUBLIC_NAMES = _public_names()


def test_every_room_imports_only_what_it_may() -> None:
    assert (ROOT / CORE / "calls.py").exists()
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


PLANTED = [
    (f"{CORE}/run.py", "import litellm", PLUGINS),
    (f"{CORE}/run.py", "def f():\n    from diskcache import Cache", PLUGINS),
    (f"{CORE}/run.py", "import aiohttp", PLUGINS),
    (f"{CORE}/run.py", "from openai import OpenAI", PLUGINS),
    (f"{CORE}/app.py", "import importlib\nimportlib.import_module('xllamacpp')", PLUGINS),
    (f"{CORE}/app.py", "from asmodel_plugins import disk_cache", "plugins.py"),
    (f"{CORE}/app.py", "from asmodel_programs.plain import plain", "plugins.py"),
    (f"{CORE}/app.py", "import tests.demo", "testing.py"),
    (f"{CORE}/steps.py", "import click", "cli.py"),
    (f"{CORE}/steps.py", "from opentelemetry.sdk.trace import TracerProvider", "trace_sdk.py"),
    (f"{CORE}/calls.py", "import asyncio", "pure"),
    (f"{CORE}/wire.py", "from starlette.requests import Request", "pure"),
    (f"{PLUGINS}/disk_cache.py", "from asmodel_plugins.memory_cache import MemoryCache", CORE),
    (f"{PLUGINS}/disk_cache.py", "from .memory_cache import MemoryCache", CORE),
    (f"{PLUGINS}/disk_cache.py", "from . import memory_cache", CORE),
    (f"{PLUGINS}/disk_cache.py", "import asmodel_plugins.embedded_weights", CORE),
    (f"{PLUGINS}/disk_cache.py", "import litellm", "file of its own"),
    (f"{PLUGINS}/disk_cache.py", "from asmodel.app import create_app", "app.py"),
    (f"{PLUGINS}/disk_cache.py", "from asmodel_programs import plain", CORE),
    (f"{PLUGINS}/mongo_cache.py", "import pymongo", "PLUGIN_LIBRARIES"),
    (f"{PROGRAMS}/plain.py", "import litellm", PLUGINS),
    (f"{PROGRAMS}/plain.py", "from asmodel_plugins.disk_cache import DiskCache", "role"),
    (f"{PROGRAMS}/plain.py", "from .evidence_qa import evidence_qa", "one file"),
    (f"{PROGRAMS}/plain.py", "from asmodel.app import create_app", "__init__"),
    (f"{PROGRAMS}/plain.py", "if TYPE_CHECKING:\n    import openai", PLUGINS),
]


@pytest.mark.parametrize(("path", "text", "belongs"), PLANTED)
def test_a_planted_import_is_found_and_told_where_it_belongs(
    path: str, text: str, belongs: str, tmp_path: Path
) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{path}:{len(text.splitlines())}: imports ")
    assert belongs in found


ALLOWED = [
    (f"{CORE}/run.py", "import asyncio\nfrom opentelemetry import trace\nfrom . import calls\nimport asmodel.calls"),
    (f"{CORE}/calls.py", "import hashlib, json\nimport orjson\nfrom asmodel.errors import AsmodelError"),
    (f"{PLUGINS}/disk_store.py", "import sqlite3\nimport diskcache\nfrom asmodel.protocols import Cache"),
    (f"{PLUGINS}/embedded_upstream.py", "from asmodel_plugins.embedded_weights import x\nfrom . import embedded_child"),
    (f"{PROGRAMS}/plain.py", "import re\nimport asmodel\nfrom pydantic import BaseModel"),
]


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_what_a_room_is_for_is_let_in(path: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert violations(tmp_path) == []
