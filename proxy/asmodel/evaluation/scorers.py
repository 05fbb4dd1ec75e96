"""How right an answer is: named measures of an answer against what a line of data says is right.

exact, f1            as SQuAD's evaluation script has them (Rajpurkar et al. 2016): lower case, no punctuation, no
                     articles, single spaces; of several right answers the best
contains             a right answer occurs in it, as whole words
yes-no               its yes or no
number[:TOLERANCE]   its last number; the tolerance is absolute, or relative with %
pydantic:MODULE:MODEL    it is JSON that this type takes
judge:MODEL          what a model, or a program, says of it
MODULE:FUNCTION      what this function says of it
recall@K, precision@K, hit@K, mrr[@K], ndcg[@K]      of a ranking of ids
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from asmodel.calls import JSON
from asmodel.errors import AsmodelError, ConfigurationError
from asmodel.evaluation import rankings
from asmodel.evaluation.examples import Example
from asmodel.evaluation.fields import Field, text_of
from asmodel.mistakes import did_you_mean
from asmodel.programs import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a measure is given: an answer, the line that it answers, and what the line says is right."""

    example: Example
    answer: Answer
    reference: JSON


class Measure(Protocol):
    """Gives a number, or True or False. Raises Unread, or another ValueError where it cannot be told."""

    def __call__(self, given: Given, /) -> float | Awaitable[float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A measure under a name."""

    name: str
    measure: Measure
    reference: Field | None
    """The field that it compares with; None where it needs none."""
    proportion: bool | None
    """Whether its values are all 0 or 1, so that their mean is a proportion; None: as the values say."""
    judge: str | None = None
    """The model that it asks."""


class Judges(Protocol):
    """Makes the measure that asks a model."""

    def __call__(self, model: str, /) -> Measure: ...


class Unscorable(ConfigurationError):
    """A reference is of a kind that its scorer does not take: the data is wrong, not the answer."""


class Unread(ValueError):
    """The answer is not even of the kind that is asked for: it counts as wrong, and the table says how many are."""


# -- reading answers ------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


_TYPOGRAPHIC = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


def _plain(text: str) -> str:
    """Without what a typesetter makes of quotes, dashes, ligatures and widths."""
    return unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHIC)


def normalised(text: str) -> str:
    """As SQuAD's script, and quotes and dashes whatever their form: lower case, no punctuation, no articles."""
    return " ".join(_ARTICLES.sub(" ", _plain(text).lower().translate(_PUNCTUATION)).split())


_YES_NO = re.compile(r"(?<!\w)(yes|no|true|false)(?!\w)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"answer(?: is|:)\W*(yes|no|true|false)(?!\w)", re.IGNORECASE)


def yes_or_no(text: str) -> bool | None:
    """Its yes or no: the last one that follows "answer is" or "answer:", else the first; None where there is none."""
    said = _ANSWER_IS.findall(text)[-1:] or _YES_NO.findall(text)[:1]
    return said[0].lower() in ("yes", "true") if said else None


_NUMBER = re.compile(
    r"(?:(?<![\w.,])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d+(?!\w))?"
)


def last_number(text: str) -> float | None:
    """The last number in it, or the first after `####`, as GSM8K marks an answer; thousands may have commas."""
    marked = text.rpartition("####")
    found = _NUMBER.findall(marked[2])
    if not found:
        return None
    said = found[0] if marked[1] else found[-1]
    value = float(said.replace(",", "").replace("\u2212", "-"))
    return value if math.isfinite(value) else None


# -- measures -------------------------------------------------------------------------------------------------------


def _aliases(reference: JSON, scorer: str) -> list[str]:
    items: Sequence[Any] = cast("Any", reference) if isinstance(reference, list) else [reference]
    if not items or any(isinstance(item, (list, Mapping)) or item is None for item in items):
        raise Unscorable(f"{scorer} compares with a text, a number, or a list of them, of which any is right")
    return [{True: "yes", False: "no"}[item] if isinstance(item, bool) else text_of(item) for item in items]


def exact(given: Given) -> bool:
    said = normalised(given.answer.text)
    return any(said == normalised(alias) for alias in _aliases(given.reference, "exact"))


def contains(given: Given) -> bool:
    said = _plain(given.answer.text).casefold()
    for alias in _aliases(given.reference, "contains"):
        wanted = _plain(alias).casefold().strip()
        if wanted and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said):
            return True
    return False


def f1(given: Given) -> float:
    said = normalised(given.answer.text).split()
    return max(_overlap(said, normalised(alias).split()) for alias in _aliases(given.reference, "f1"))


def _overlap(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def yes_no(given: Given) -> bool:
    reference = given.reference
    wanted = reference if isinstance(reference, bool) else None
    if isinstance(reference, str) and reference.strip().lower() in ("yes", "no", "true", "false"):
        wanted = yes_or_no(reference)
    if wanted is None:
        raise Unscorable("yes-no compares with true, false, yes or no")
    said = yes_or_no(given.answer.text)
    if said is None:
        raise Unread("says neither yes nor no")
    return said is wanted


def _number(argument: str, spec: str) -> Measure:
    amount, percent = argument.removesuffix("%"), argument.endswith("%")
    try:
        tolerance = float(amount or 0)
    except ValueError:
        tolerance = math.nan
    if not 0 <= tolerance < math.inf or (percent and not amount):
        raise ConfigurationError(f"--score {spec}: the tolerance is a number such as 0.01, or a share such as 1%")

    def number(given: Given) -> bool:
        reference = given.reference
        if isinstance(reference, (int, float)) and not isinstance(reference, bool):
            wanted: float | None = float(reference)
        else:
            wanted = last_number(reference) if isinstance(reference, str) else None
        if wanted is None:
            raise Unscorable("number compares with a number, or a text with one in it")
        said = last_number(given.answer.text)
        # A millionth of a millionth is rounding: 0.1 + 0.2 is 0.3.
        least = max(abs(wanted), 1e-9) * 1e-12
        allowed = abs(wanted) * tolerance / 100 if percent else tolerance
        if said is None:
            raise Unread("holds no number")
        return abs(said - wanted) <= allowed + least

    return number


def _ranked(name: str, k: int | None, place: Field | None) -> Measure:
    measure = rankings.MEASURES[name]

    def ranked(given: Given) -> float:
        try:
            relevant = rankings.relevant_of(given.reference)
        except ValueError as error:
            raise Unscorable(f"{name} compares with a list of ids: {error}") from None
        return measure(rankings.ranking_of(given.answer, place), relevant, k)

    return ranked


def _validated(model: Any) -> Measure:
    from pydantic import TypeAdapter, ValidationError

    adapter: Any = TypeAdapter(model)

    def validated(given: Given) -> bool:
        try:
            adapter.validate_json(given.answer.text)
        except ValidationError:
            return False
        return True

    return validated


_OFFERED = ("answer", "question", "reference", "data", "citations", "record")


def _by_function(function: Any, spec: str) -> Measure:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ConfigurationError(f"--score {spec}: is no function whose parameters can be told") from None
    wanted = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    unknown = [p.name for p in parameters if p.name not in _OFFERED and p.default is p.empty and p.name in wanted]
    if unknown:
        raise ConfigurationError(
            f"--score {spec}: the function takes {', '.join(unknown)}; it is given, by name, those that it takes of "
            f"{', '.join(_OFFERED)}"
        )
    names = [name for name in wanted if name in _OFFERED]
    waits = inspect.iscoroutinefunction(function)

    async def by_function(given: Given) -> float:
        offered = {
            "answer": given.answer.text,
            "question": given.example.question,
            "reference": given.reference,
            "data": given.answer.data,
            "citations": given.answer.citations,
            "record": given.example.record,
        }
        try:
            taken = {name: offered[name] for name in names}
            # In a thread, since it may well do something that takes a while.
            value = function(**taken) if waits else await asyncio.to_thread(function, **taken)
            value = await value if inspect.isawaitable(value) else value
        except AsmodelError:
            raise
        except Exception as error:
            # By its type and place alone: the text may hold what was asked.
            frame = inspect.trace()[-1]
            raise ValueError(
                f"{spec} raised {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            ) from error
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise ValueError(
                f"{spec} returned {type(value).__name__}; a measure returns True, False or a finite number"
            )
        return value

    return by_function


# -- by name --------------------------------------------------------------------------------------------------------

_PLAIN: Mapping[str, tuple[Measure, bool]] = {
    "exact": (exact, True),
    "contains": (contains, True),
    "f1": (f1, False),
    "yes-no": (yes_no, True),
}
NAMES = (*_PLAIN, "number", *rankings.MEASURES, "pydantic:MODULE:MODEL", "judge:MODEL", "MODULE:FUNCTION")
"""What `scorer` takes."""


def scorer(spec: str, reference: Field, *, judges: Judges, ranking: Field | None = None) -> Scorer:
    """The scorer of `SCORER` or `SCORER=FIELD`. Raises ConfigurationError naming what there is.

    `reference` is the field that it compares with unless it names one; `ranking` is the place of a ranking in an
    answer's data; `judges` makes the measure of a model.
    """
    named, equals, path = spec.partition("=")
    if equals and not path:
        raise ConfigurationError(f"--score {spec}: should be SCORER=FIELD, such as {named}=gold")
    against = Field(path) if equals else reference
    head, colon, rest = named.partition(":")
    measured, at, k = named.partition("@")
    if named in _PLAIN:
        measure, proportion = _PLAIN[named]
        return Scorer(name=spec, measure=measure, reference=against, proportion=proportion)
    if head == "number":
        return Scorer(name=spec, measure=_number(rest, spec), reference=against, proportion=True)
    if measured in rankings.MEASURES:
        if at and not (k.isascii() and k.isdigit() and int(k) > 0):
            raise ConfigurationError(f"--score {spec}: should be {measured}@K, such as {measured}@5")
        if not at and measured not in ("mrr", "ndcg"):
            raise ConfigurationError(f"--score {spec}: of how many? {measured}@5, for instance")
        measure = _ranked(measured, int(k) if at else None, ranking)
        return Scorer(name=spec, measure=measure, reference=against, proportion=True if measured == "hit" else None)
    if head == "judge" and rest:
        return Scorer(name=spec, measure=judges(rest), reference=against, proportion=None, judge=rest)
    if head == "pydantic" and rest:
        measure = _validated(_loaded(rest, spec))
        return Scorer(name=spec, measure=measure, reference=Field(path) if equals else None, proportion=True)
    if colon and head and rest:
        function = _loaded(named, spec)
        wants = _wants_reference(function)
        measure = _by_function(function, spec)
        return Scorer(name=spec, measure=measure, reference=against if wants else None, proportion=None)
    raise ConfigurationError(
        f'--score {spec}: there is no scorer "{named}"{did_you_mean(named, (*_PLAIN, "number", *rankings.MEASURES))}; '
        f"there are {', '.join(NAMES)}"
    )


def check(scorers: Sequence[Scorer], examples: Sequence[Example], file: Path) -> None:
    """Hold every reference against its scorer. Raises ConfigurationError with the number of the line.

    What a judge or a function makes of a reference is its own affair.
    """
    for scorer in scorers:
        if scorer.reference is None or inspect.iscoroutinefunction(scorer.measure):
            continue
        for example in examples:
            given = Given(example=example, answer=Answer(), reference=scorer.reference.of(example.record))
            try:
                scorer.measure(given)
            except Unscorable as error:
                where = f"{file}:{example.line}"
                raise ConfigurationError(f'{where}: field "{scorer.reference.path}": {error}') from None
            except ValueError:
                continue  # Of an answer that holds nothing.


def _wants_reference(function: Any) -> bool:
    try:
        return "reference" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _loaded(name: str, spec: str) -> Any:
    """What stands at `module:attribute`; modules beside the data or in this folder count, as for `python -m`."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigurationError(f"--score {spec}: {module} cannot be imported: {reason}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not part or not hasattr(found, part):
            raise ConfigurationError(
                f'--score {spec}: {module} has no "{attribute}"{did_you_mean(attribute, dir(found))}'
            )
        found = getattr(found, part)
    return found
