"""What a program's code reads besides its arguments: clocks, chance, the environment, and globals that change.

All of it may end up in a prompt, and so in a cache key; but whoever reads the code does not see it there, and a run
that is resumed may show something else than before, and pay again. Found by looking at the source of the functions that
a program reaches: no name is guessed, each is looked up as Python would.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import platform
import random
import secrets
import socket
import sys
import textwrap
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal, TypeAlias, cast

from asmodel.programs import Program

Kind: TypeAlias = Literal["clock", "chance", "environment", "global", "uncached"]

_CLOCKS = [time.time, time.time_ns, time.monotonic, time.monotonic_ns, time.perf_counter, time.perf_counter_ns]
_CLOCKS_OF_NOW = [time.localtime, time.gmtime, time.ctime, time.asctime, time.strftime]
"""These ask a clock where they are given no time."""
_CHANCE = [
    *(os.urandom, uuid.uuid1, uuid.uuid4),
    *(getattr(random, name) for name in random.__all__ if name != "Random"),
    *(getattr(secrets, name) for name in secrets.__all__ if name != "compare_digest"),
]
_ENVIRONMENT = [
    *(os.environ, sys.argv, os.getenv, os.getpid, os.getlogin, os.uname),
    *(socket.gethostname, socket.getfqdn, platform.node),
]

_INSTEAD: dict[tuple[Kind, bool], str] = {
    ("clock", True): "take the time as an argument, and pass run.now",
    ("clock", False): "use run.now, which is the same when the run is resumed",
    ("chance", True): "take it as an argument, and draw it by run.random",
    ("chance", False): "use run.random, which draws the same when the run is resumed",
    ("environment", True): "take it as an argument, and give it to the program as a parameter (params=)",
    ("environment", False): "make it a parameter of the program (params=)",
    ("global", True): "take it as an argument, or make it a constant: a tuple, a frozenset, a text",
    ("global", False): "keep what changes in local variables: a global is shared by all runs, until the process ends",
}

_CHANGES = frozenset(
    {"append", "extend", "insert", "remove", "pop", "clear", "add", "discard", "update", "setdefault", "popitem"}
    | {"appendleft", "extendleft", "popleft", "sort", "reverse", "difference_update", "intersection_update"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """One place where a step or a program reads what is none of its arguments."""

    program: str
    step: str | None
    """None for the program's own code."""
    kind: Kind
    what: str
    """As it is written there: `time.time`."""
    file: Path | None
    line: int
    instead: str

    @property
    def where(self) -> str:
        """As one reads it from the current folder."""
        file = self.file
        if file is None:
            return f"?:{self.line}"
        near = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else Path(*file.parts[-2:])
        return f"{near}:{self.line}"

    def __str__(self) -> str:
        who = f'step "{self.step}"' if self.step is not None else f'program "{self.program}"'
        reads = {
            "clock": "reads a clock",
            "chance": "draws by chance",
            "environment": "reads the environment",
            "global": "uses a global that can change",
            "uncached": "is not kept in the cache, in a program with effects",
        }
        return f"{self.where}: {who} {reads[self.kind]} ({self.what}); {self.instead}"


def remarks(program: Program[Any, Any]) -> list[Remark]:
    """What there is to say of a program and of the steps that it reaches, in the order of file and line."""
    found: dict[tuple[str, int, str], Remark] = {}

    def note(function: Callable[..., Any], step: str | None) -> None:
        for one in _functions(function):
            for kind, what, line in _reads(one, shown=step is not None):
                remark = Remark(
                    program=program.name,
                    step=step,
                    kind=kind,
                    what=what,
                    file=_file(one),
                    line=line,
                    instead=_INSTEAD[kind, step is not None],
                )
                found.setdefault((str(remark.file), line, what), remark)

    for step in program.steps:
        note(step.show, step.name)
        if program.effects and (not step.options.get("cache", True) or "ttl" in step.options):
            function = inspect.unwrap(step.show)
            remark = Remark(
                program=program.name,
                step=step.name,
                kind="uncached",
                what="cache=False" if not step.options.get("cache", True) else "ttl",
                file=_file(cast("FunctionType", function)),
                line=function.__code__.co_firstlineno,
                instead="a retry may be told something else, and have an effect again with that; keep it",
            )
            found[str(remark.file), remark.line, remark.what] = remark
    note(program.function, None)
    return sorted(found.values(), key=lambda r: (str(r.file), r.line, r.what))


def _file(function: FunctionType) -> Path | None:
    file = inspect.getsourcefile(function)
    return None if file is None else Path(file)


def _functions(function: Callable[..., Any]) -> Iterator[FunctionType]:
    """The function, and those of its own package that it calls by name."""
    first = inspect.unwrap(function)
    package = first.__module__.partition(".")[0]
    seen: set[int] = set()
    left: list[object] = [first]
    while left:
        one = left.pop()
        if not isinstance(one, FunctionType) or one.__module__.partition(".")[0] != package or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        tree, _ = _source(one)
        if tree is not None:
            scope = _Scope(one, tree)
            left += [found for node in ast.walk(tree) if (found := scope.value(node)) is not None]


@cache
def _source(function: FunctionType) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | None, int]:
    """The function's own syntax, and what to add to its line numbers; None where there is no source."""
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None, 0
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == function.__name__:
            return node, start - 1
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    # Of several on one line it cannot be told which is meant.
    return (lambdas[0], start - 1) if len(lambdas) == 1 else (None, 0)


class _Scope:
    """What the names in a function's source stand for, without running any of it."""

    def __init__(self, function: FunctionType, tree: ast.AST) -> None:
        self._variables: dict[str, object] = dict(vars(builtins)) | function.__globals__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._variables[name] = cell.cell_contents
            except ValueError:
                continue  # A variable that has no value yet.
        # A name that is set anywhere in the function is its own there, or may be: nothing is said of it.
        own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        declared = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
        imports = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
        own |= {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
        self.own = own - declared
        self.declared = declared

    def value(self, node: ast.AST) -> object:
        """What a name, or a name with attributes, stands for; None where that is not known."""
        if isinstance(node, ast.Name):
            return None if node.id in self.own else self._variables.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.value(node.value)
            # Of modules and classes only: an attribute of anything else may be code that runs.
            if isinstance(base, type):
                return inspect.getattr_static(base, node.attr, None)
            if isinstance(base, ModuleType):
                return vars(base).get(node.attr)
        return None

    def reads_clock(self, node: ast.Attribute) -> bool:
        """`datetime.now` and its like, which are made anew each time that they are looked up."""
        base = self.value(node.value)
        return isinstance(base, type) and issubclass(base, date) and node.attr in ("now", "utcnow", "today")


def _reads(function: FunctionType, *, shown: bool) -> Iterator[tuple[Kind, str, int]]:
    tree, offset = _source(function)
    if tree is None:
        return
    scope = _Scope(function, tree)
    given = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    # What decorates it and what it is annotated with is no part of what it does.
    parts: list[ast.AST] = [*tree.args.defaults, *filter(None, tree.args.kw_defaults)]
    parts += [tree.body] if isinstance(tree, ast.Lambda) else tree.body
    inside: set[int] = set()
    for node in (node for part in parts for node in ast.walk(part)):
        if not isinstance(node, (ast.Name, ast.Attribute)) or id(node) in inside:
            continue
        kind = _kind(node, scope, given.get(id(node)))
        if kind is None and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in scope.own:
            value = function.__globals__.get(node.id)
            changes = _can_change(value) and (shown or _is_changed(function, node.id))
            if changes or (not callable(value) and _is_rebound(function, node.id)):
                kind = "global"
        elif kind is None and isinstance(node, ast.Name) and node.id in scope.declared:
            kind = "global"  # Which it sets.
        if kind is not None:
            # `os.environ` within `os.environ.get` is the same remark.
            inside.update(id(below) for below in ast.walk(node))
            yield kind, ast.unparse(node), node.lineno + offset


def _kind(node: ast.Name | ast.Attribute, scope: _Scope, call: ast.Call | None) -> Kind | None:
    if isinstance(node, ast.Attribute) and scope.reads_clock(node):
        return "clock"
    value = scope.value(node)
    if value is None:
        return None
    if _is_in(value, _CLOCKS):
        return "clock"
    if _is_in(value, _CLOCKS_OF_NOW):
        wants = 2 if value is time.strftime else 1
        return "clock" if call is not None and len(call.args) < wants else None
    if _is_in(value, _CHANCE):
        return "chance"
    if value is random.Random:
        return "chance" if call is not None and not call.args else None
    if isinstance(value, ModuleType) and value.__name__ == "numpy.random":
        return "chance"
    return "environment" if _is_in(value, _ENVIRONMENT) else None


def _is_in(value: object, some: list[Any]) -> bool:
    return any(value is one for one in some)


def _can_change(value: object) -> bool:
    return isinstance(value, (list, dict, set, bytearray, deque))


@cache
def _module_tree(file: str) -> ast.Module | None:
    try:
        return ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _module(function: FunctionType) -> ast.Module | None:
    file = inspect.getsourcefile(function)
    return None if file is None else _module_tree(file)


def _is_changed(function: FunctionType, name: str) -> bool:
    """Whether any function of the module puts something into that global."""
    tree = _module(function)
    for node in _in_functions(tree) if tree is not None else ():
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=one), attr=attr)) if one == name and attr in _CHANGES:
                return True
            case ast.Subscript(value=ast.Name(id=one), ctx=ast.Store() | ast.Del()) if one == name:
                return True
            case ast.AugAssign(target=ast.Name(id=one)) if one == name:
                return True
            case _:
                pass
    return False


def _is_rebound(function: FunctionType, name: str) -> bool:
    """Whether any function of the module gives that global another value."""
    tree = _module(function)
    return tree is not None and any(isinstance(node, ast.Global) and name in node.names for node in _in_functions(tree))


def _in_functions(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from ast.walk(node)
