"""Finds plug-ins by name and makes them from their settings. What a plug-in does is no business of this file.

A name is an entry point of the group `asmodel.KIND`, or `module:attribute` of anything that can be imported. Whatever
does not load, or does not take the settings it is given, is a ConfigurationError; nothing is skipped.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, SecretStr, TypeAdapter, ValidationError

from asmodel.errors import ConfigurationError
from asmodel.mistakes import did_you_mean, is_secret, listed, sentence
from asmodel.protocols import KINDS


def names(kind: str) -> dict[str, EntryPoint]:
    """The installed plug-ins of a kind, by name, none of them imported.

    Raises ConfigurationError where two distributions give one name.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of plug-in; the kinds are {listed(KINDS)}")
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"asmodel.{kind}"):
        other = found.setdefault(entry.name, entry)
        # One distribution can be on the path twice (a wheel and an editable install): the first one counts, as it
        # does for imports.
        if other is not entry and _distribution(other) != _distribution(entry):
            raise ConfigurationError(
                f'two plug-ins of the kind "{kind}" are named "{entry.name}": {other.value} of '
                f"{_distribution(other)} and {entry.value} of {_distribution(entry)}; uninstall one, "
                f"or name the wanted one as module:attribute"
            )
    return found


def resolve(kind: str, name: str) -> object:
    """Whatever stands under the name: for `programs` a module or a program, for the other kinds a factory.

    Raises ConfigurationError if there is nothing, or if it cannot be imported: then with the entry point, the file
    and line of the failure, and the reason.
    """
    if ":" in name:
        return _load(EntryPoint(name=name, value=name, group=f"asmodel.{kind}"), f'plug-in "{name}"')
    known = names(kind)
    if name not in known:
        raise ConfigurationError(
            f'no plug-in of the kind "{kind}" is named "{name}"{did_you_mean(name, known)}; '
            f"known are {listed(known)}, and anything importable as module:attribute"
        )
    entry = known[name]
    return _load(entry, f'plug-in "{name}" ({entry.value} of {_distribution(entry)})')


def find(kind: str, name: str) -> Callable[..., Any]:
    """The factory of a plug-in. Raises ConfigurationError as `resolve` does, and for what cannot be called."""
    found = resolve(kind, name)
    if not callable(found):
        raise ConfigurationError(
            f'plug-in "{name}" of the kind "{kind}" is a {type(found).__name__}; a class or function is wanted'
        )
    return found


def make(
    kind: str,
    name: str,
    options: Mapping[str, Any],
    /,
    *,
    where: str | None = None,
    beside: Iterable[str] = (),
    **context: Any,
) -> object:
    """Call the factory of a plug-in with its options as keyword arguments, each checked by its annotation.

    `where` is how messages call the table that the options come from, such as `upstreams.fast`; by default the kind
    and `context["name"]`. `beside` are the settings of that table that asmodel itself takes, of which an unknown option
    may be a misspelling. What stands in `context` is given to factories that have a parameter of that very name.

    Raises ConfigurationError naming each option that is unknown, missing or of the wrong type, all of them at once.
    """
    given = context.get("name")
    table = where if where is not None else f"{kind}.{given}" if isinstance(given, str) else kind
    factory = find(kind, name)
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError as error:
        raise ConfigurationError(f'{table}: plug-in "{name}" does not say what it takes: {error}') from error
    takes = {
        parameter.name: parameter
        for parameter in parameters.values()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    rest = next((p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    arguments = {key: value for key, value in context.items() if key in takes}
    own = [key for key in takes if key not in arguments]
    hints = _hints(factory)

    mistakes: list[str] = []
    for option, value in options.items():
        parameter = takes.get(option, rest)
        if option in context:
            mistakes.append(f"{table}.{option}: is given by asmodel itself and cannot be set")
        elif parameter is None:
            near = did_you_mean(option, [*own, *beside])
            mistakes.append(f'{table}.{option}: plug-in "{name}" has no such option{near}; it takes {listed(own)}')
        else:
            try:
                arguments[option] = _checked(hints.get(parameter.name, Any), unveil(value))
            except ValidationError as error:
                wrong: dict[str, list[str]] = {}
                for detail in error.errors(include_url=False):
                    inner = "".join(f".{part}" for part in detail["loc"] if not _names_a_type(part, value))
                    # The name decides whether the value is a secret, and pydantic knows only what is inside.
                    detail["loc"] = (option, *detail["loc"])
                    if _secrets(value):
                        detail["input"] = SecretStr("")
                    wrong.setdefault(inner, []).append(sentence(detail))
                mistakes.extend(f"{table}.{option}{inner}: {'; or '.join(why)}" for inner, why in wrong.items())
    mistakes.extend(
        f'{table}.{key}: is missing, and plug-in "{name}" needs it'
        for key in own
        if takes[key].default is inspect.Parameter.empty and key not in options
    )
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))
    try:
        return factory(**arguments)
    except ConfigurationError:
        raise
    except Exception as error:
        # The reason is in the error's text; a key that a plug-in put there is taken out.
        place, reason = failure(error)
        for secret in _secrets(options):
            reason = reason.replace(secret, "…")
        raise ConfigurationError(f'{table}: plug-in "{name}" cannot be made: {_at(place)}{reason}') from None


def unveil(value: object) -> object:
    """The value with each SecretStr in it, at any depth, as the text that it hides."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Mapping):
        return {key: unveil(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [unveil(item) for item in cast("list[object]", value)]
    return value


def failure(error: BaseException, within: str = "") -> tuple[str, str]:
    """Where an import failed, as `FILE, line N` or empty, and why, in one line.

    With `within`, the innermost line of a file whose path starts so; a library that raises is not where its user erred.
    """
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename and error.filename.startswith(within or os.sep):
        place = error.filename if error.lineno is None else f"{error.filename}, line {error.lineno}"
        return place, f"{type(error).__name__}: {error.msg}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and frame.filename not in (__file__, importlib.__file__)
        and frame.filename.startswith(within)
    ]
    return (f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "", reason)


def _load(entry: EntryPoint, title: str) -> object:
    module_name, _, attribute = entry.value.partition(":")
    try:
        target: object = importlib.import_module(module_name.strip())
    except (Exception, SystemExit) as error:
        place, reason = failure(error)
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            hint = " (is it installed, or its folder on PYTHONPATH?)"
        raise ConfigurationError(f"{title} cannot be imported: {_at(place)}{reason}{hint}") from error
    for part in filter(None, attribute.strip().split(".")):
        if not hasattr(target, part):
            here = getattr(target, "__name__", entry.value)
            raise ConfigurationError(f'{title}: {here} has no "{part}"{did_you_mean(part, dir(target))}')
        target = getattr(target, part)
    return target


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the factory's parameters, as far as they can be evaluated.

    An annotation imported under TYPE_CHECKING cannot, and is passed unchecked: it belongs to a parameter that the
    person who writes settings does not set.
    """
    target: Any = factory
    while isinstance(target, functools.partial):
        target = target.func
    if inspect.isclass(target):
        constructor: Any = vars(object)["__init__"]
        target = target.__new__ if target.__init__ is constructor else target.__init__
    elif not inspect.isroutine(target):
        target = type(target).__call__
    target = inspect.unwrap(target)
    try:
        return get_type_hints(target, include_extras=True)
    except NameError:
        hints: dict[str, Any] = {}
        for name, annotation in inspect.get_annotations(target).items():
            alone = type("Alone", (), {"__annotations__": {name: annotation}, "__module__": target.__module__})
            try:
                hints.update(get_type_hints(alone, include_extras=True))
            except NameError:
                continue
        return hints


def _checked(annotation: Any, value: object) -> object:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    return adapter.validate_python(value)


def _names_a_type(part: int | str, value: object) -> bool:
    """Whether part of an error's location is the member of a union that pydantic tried, not a place in the value."""
    return not isinstance(value, (Mapping, list, tuple)) or (isinstance(part, str) and "[" in part)


def _secrets(value: object) -> list[str]:
    if isinstance(value, SecretStr):
        return [value.get_secret_value()] if value.get_secret_value() else []
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value).items()
        return [
            secret
            for name, item in items
            for secret in ([item] if isinstance(item, str) and item and is_secret(name, item) else _secrets(item))
        ]
    if isinstance(value, (list, tuple)):
        return [secret for item in cast("list[object]", value) for secret in _secrets(item)]
    return []
