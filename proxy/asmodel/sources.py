"""Where settings come from: a TOML file, environment variables, flags; and where each value was written.

A `Layer` is what one of them says, as nested tables, with the place of every key, so that a mistake can be pointed at.
This file knows the shape of the settings only as a pydantic model that it is given.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, Union, cast, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError

from asmodel.errors import ConfigurationError
from asmodel.mistakes import did_you_mean, listed, sentence

PREFIX = "ASMODEL_"

INTERNAL = {
    "ASMODEL_CONFIG": "The settings file, where no `--config` names one.",
    "ASMODEL_FLAGS": "Set by the server for its own workers: the flags that it was started with.",
    "ASMODEL_EMBEDDED_ADDRESS": "Set by the server for its own workers: where the embedded model listens.",
    "ASMODEL_METRICS_FOLDER": "Set by the server for its own workers: where they add up their metrics.",
    "ASMODEL_EMBEDDED_KEY": "Set by the server for its own workers: the key of the embedded model.",
}
"""Variables that start like a setting and are none, with what they are for."""

INTERNAL_PREFIXES = ("ASMODEL_BENCH_", "ASMODEL_E2E_", "ASMODEL_SOAK_", "ASMODEL_TEST_")
"""Left to tests."""

FLAGS = {"program_folders": "--programs"}
"""Flags that are not called as their setting is."""

Keys: TypeAlias = tuple[str, ...]

_UNIONS = (Union, types.UnionType)


class Mistakes(ValueError):
    """Several mistakes that one validator found: each the keys of the setting, and what is wrong with it."""

    def __init__(self, found: list[tuple[Keys, str]]) -> None:
        super().__init__("; ".join(f"{dotted(keys)}: {what}" for keys, what in found))
        self.found = found


@dataclass
class Layer:
    """What one source says, or several laid over one another."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    places: dict[Keys, str] = field(default_factory=dict[Keys, str])
    mistakes: list[str] = field(default_factory=list[str])

    def over(self, lower: Layer) -> Layer:
        """This layer laid over a lower one: tables are merged key by key, everything else is replaced."""
        return Layer(
            _merged(lower.values, self.values), {**lower.places, **self.places}, [*lower.mistakes, *self.mistakes]
        )

    def place(self, keys: Keys) -> str:
        """Where the setting was written, or the nearest table around it."""
        return next((self.places[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.places), "settings")


def dotted(keys: Keys) -> str:
    """The keys as TOML would write them."""
    bare = re.compile(r"[A-Za-z0-9_-]+")
    return ".".join(key if bare.fullmatch(key) else json.dumps(key, ensure_ascii=False) for key in keys)


def read_toml(file: Path) -> Layer:
    """Raises ConfigurationError, with line and column where the file is not TOML, and for one that cannot be read."""
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{file} line {number}: is not UTF-8, as TOML must be") from error
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror or error}") from error
    text = text.replace("\r\n", "\n")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, _, spot = str(error).partition(" (at ")
        found = re.match(r"line (\d+), column (\d+)", spot)
        # "at end of document" has no numbers: it is behind the last character.
        line, column = found.groups() if found else (str(text.count("\n") + 1), str(len(text) - text.rfind("\n")))
        raise ConfigurationError(f"{file} line {line}, column {column}: is not TOML: {reason}") from error
    return Layer(values, {keys: f"{file} line {line}" for keys, line in _toml_lines(text).items()})


def read_environment(environ: Mapping[str, str], model: type[BaseModel], known: Mapping[str, Any]) -> Layer:
    """The variables that start with `ASMODEL_`; `__` goes one table down.

    Names are read in lower case. Where a table is keyed by names, one that is in `known` (what the file says) is met in
    any case and with `_` for whatever a variable cannot hold; names of programs and presets have `-` for `_`. A text
    that starts with `[` or `{` is JSON where something else than text is wanted; a list may also be written with `,`
    between its items, of paths with the system's separator.
    """
    layer = Layer()
    # The shorter first: a table given whole as JSON lies below a variable for one of its keys.
    for variable in sorted(environ, key=lambda name: (name.count("__"), name)):
        name = variable.upper()
        if not name.startswith(PREFIX) or name in INTERNAL or name.startswith(INTERNAL_PREFIXES):
            continue
        keys, annotation = _keys(name.removeprefix(PREFIX), model, known)
        try:
            value = _decoded(environ[variable], annotation)
        except ValueError:
            layer.mistakes.append(f"{variable}: starts like JSON and is not JSON")
            continue
        one = Layer(_nested(keys, value), {keys: variable})
        one.places.update({(*keys, *inner): variable for inner in _paths(value)})
        layer = one.over(layer)
    return layer


def read_flags(flags: Mapping[str, Any]) -> Layer:
    """Settings by name, as nested as the settings are. None, and a repeatable flag that was not given, say nothing."""
    layer = Layer({name: value for name, value in flags.items() if value is not None and value not in ((), [])})
    for keys in _paths(layer.values):
        layer.places[keys] = FLAGS.get(keys[0], "--" + "-".join(keys).replace("_", "-"))
    return layer


def resolve_environment_references(layer: Layer, environ: Mapping[str, str], tables: tuple[str, ...]) -> None:
    """Put the value of the variable in the place of each text `env:NAME` in these tables, as a SecretStr.

    A variable that is not set is a mistake; so is an empty one, which is how a missing secret often looks.
    """

    def walk(keys: Keys, value: object) -> object:
        if isinstance(value, dict):
            return {key: walk((*keys, key), item) for key, item in cast("dict[str, object]", value).items()}
        if isinstance(value, list):
            return [walk(keys, item) for item in cast("list[object]", value)]
        if not isinstance(value, str) or not value.startswith("env:"):
            return value
        variable = value.removeprefix("env:")
        if not environ.get(variable):
            state = "is empty" if variable in environ else "is not set"
            layer.mistakes.append(
                f"{_head(layer, keys)}the environment variable {variable} {state}; "
                f"set it, or name another one with env:NAME"
            )
            # Not the text as it stands: it must not reach a plug-in, even if only to be complained about.
            return SecretStr("")
        return SecretStr(environ[variable])

    for table in tables:
        if table in layer.values:
            layer.values[table] = walk((table,), layer.values[table])


def explained(error: ValidationError, layer: Layer, model: type[BaseModel]) -> list[str]:
    """One line for each mistake: where it was written, which setting, what is wrong, what would be right."""
    lines: list[str] = []
    for detail in error.errors(include_url=False):
        keys = tuple(str(part) for part in detail["loc"] if part != "[key]")
        found = detail.get("ctx", {}).get("error")
        if isinstance(found, Mistakes):
            lines.extend(_head(layer, (*keys, *inner)) + what for inner, what in found.found)
            continue
        what = sentence(detail)
        around = _model(_annotation(model, keys[:-1])) or model
        if detail["type"] == "extra_forbidden":
            known = [name for name in around.model_fields if name != "options"]
            what = "there is no such setting" + (did_you_mean(keys[-1], known) or f"; known here are {listed(known)}")
        elif detail["type"] == "missing":
            what = f"is missing: {around.model_fields[keys[-1]].description}"
        elif "[key]" not in detail["loc"] and (table := _model(_annotation(model, keys))) is not None:
            what += f", with {listed(table.model_fields)} in it"
        lines.append(_head(layer, keys) + what + _kubernetes(layer.place(keys)))
    return list(dict.fromkeys(lines))


def _head(layer: Layer, keys: Keys) -> str:
    place = layer.place(keys)
    # A flag says which setting it is, and so does a variable unless the mistake is deeper than its name goes.
    # (Neither has a space in it, as the place in a file has.)
    exact = layer.places.get(keys) == place and " " not in place
    return f"{place}: " if exact and place.count("__") in {0, len(keys) - 1} else f"{place}: {dotted(keys)}: "


def _kubernetes(variable: str) -> str:
    """Kubernetes gives every pod variables named after each Service, so one named "asmodel" looks like settings."""
    if re.fullmatch(r"ASMODEL(_[A-Z0-9]+)*_(SERVICE_(HOST|PORT\w*)|PORT(_\w+)?)", variable):
        return '; if Kubernetes set it for a Service named "asmodel", put `enableServiceLinks: false` in the pod'
    return ""


def _merged(lower: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(lower)
    for key, value in higher.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(cast("Mapping[str, Any]", below), cast("Mapping[str, Any]", value)) if both else value
    return result


def _nested(keys: Keys, value: object) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return cast("dict[str, Any]", value)


def _paths(value: object) -> Iterator[Keys]:
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[str, object]", value).items():
            yield (key,)
            yield from ((key, *inner) for inner in _paths(item))


def _toml_lines(text: str) -> dict[Keys, int]:
    """The line of each key and table of a text that is TOML. A statement ends where it first parses by itself."""
    lines = text.split("\n")
    found: dict[Keys, int] = {}
    table: Keys = ()
    start = 0
    while start < len(lines):
        end = start + 1
        statement: dict[str, Any] = {}
        while end <= len(lines):
            try:
                statement = tomllib.loads("\n".join(lines[start:end]))
                break
            except tomllib.TOMLDecodeError:
                end += 1
        header = lines[start].lstrip().startswith("[")
        paths = list(_paths(_first_of_lists(statement) if header else statement))
        for keys in paths:
            found.setdefault(keys if header else (*table, *keys), start + 1)
        if header and paths:
            table = paths[-1]
        start = end
    return found


def _first_of_lists(value: object) -> object:
    if isinstance(value, list):
        items = cast("list[object]", value)
        return _first_of_lists(items[0]) if items else {}
    if isinstance(value, dict):
        return {key: _first_of_lists(item) for key, item in cast("dict[str, object]", value).items()}
    return value


def _keys(name: str, model: type[BaseModel], known: Mapping[str, Any]) -> tuple[Keys, Any]:
    """The keys that a variable's name stands for, and the annotation of the setting."""
    keys: Keys = ()
    annotation: Any = model
    here: object = known
    for segment in name.lower().split("__"):
        present = cast("Mapping[str, object]", here if isinstance(here, Mapping) else {})
        key = segment
        table = _model(annotation)
        if table is None or segment not in table.model_fields:
            key = next((name for name in present if _as_variable(name) == segment), segment)
            if key == segment and keys in {("programs",), ("models",)}:
                key = segment.replace("_", "-")
        keys, here, annotation = (*keys, key), present.get(key), _annotation(annotation, (key,))
    return keys, annotation


def _as_variable(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _annotation(annotation: Any, keys: Keys) -> Any:
    """The annotation of what is under the keys; Any where the shape does not say."""
    for key in keys:
        model = _model(annotation)
        if model is not None:
            known = model.model_fields.get(key)
            annotation = known.annotation if known is not None else Any
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = Any
    return annotation


def _model(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in _UNIONS:
        return next((model for member in get_args(annotation) if (model := _model(member)) is not None), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _decoded(text: str, annotation: Any) -> object:
    if get_origin(annotation) is list and not text.startswith("["):
        separator = os.pathsep if get_args(annotation)[0] is Path else ","
        return [item.strip() for item in text.split(separator) if item.strip()]
    texts = {str, SecretStr}
    wants_text = annotation in texts or (get_origin(annotation) in _UNIONS and texts & {*get_args(annotation)})
    if text.startswith(("[", "{")) and not wants_text:
        return cast("object", json.loads(text))
    return text
