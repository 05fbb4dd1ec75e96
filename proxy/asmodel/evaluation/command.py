"""What `asmodel eval` does, from its options to its exit code."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asmodel import trace_words
from asmodel.app import Parts, build
from asmodel.calls import JSON
from asmodel.errors import AsmodelError, ConfigurationError, InvalidRequest, ModelNotFound
from asmodel.evaluation import examples, page, scorers, systems, table
from asmodel.evaluation.evaluating import Asker, Evaluated, Stopped, evaluate
from asmodel.evaluation.fields import Field
from asmodel.evaluation.report import Report, report
from asmodel.evaluation.watching import Watching
from asmodel.preparing import prepared

if TYPE_CHECKING:
    from asmodel.evaluation.scorers import Measure, Scorer
    from asmodel.evaluation.systems import System
    from asmodel.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The options."""

    systems: Sequence[str]
    data: Path
    question: Field
    answer: Field
    systems_file: Path | None = None
    step: str | None = None
    conversation: bool = False
    id: Field | None = None
    fields: Mapping[str, Field] = field(default_factory=dict[str, Field])
    """Parameters, or arguments of the step, that come out of the data."""
    documents: Sequence[Field] = ()
    params: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    scorers: Sequence[str] = ("exact",)
    ranking: Field | None = None
    limit: int | None = None
    skip: int = 0
    seed: int | None = None
    exclude: Sequence[Path] = ()
    repeats: int = 1
    at_once: int = 4
    only_cached: bool = False
    strict: bool = False
    all_pairs: bool = False


def run(settings: Settings, wanted: Wanted, *, json: Path | None = None, html: Path | None = None) -> int:
    """Evaluate, print the table, write the report; give the exit code.

    0 where every question was answered, 1 where one ended in an error or is not in the cache, 130 where it was
    interrupted. Raises ConfigurationError, before anything is asked, for whatever is wrong with the options or data.
    """
    parts = build(settings)
    asker = Asker(parts, only_cached=wanted.only_cached)
    found, chosen = _systems(wanted, parts), _scorers(wanted, parts, asker)
    templates = [system.prompt for system in found if system.prompt is not None]
    layout = examples.Layout(
        question=None if wanted.step is not None else wanted.question,
        conversation=wanted.conversation,
        id=wanted.id,
        params=wanted.fields,
        documents=wanted.documents,
        references=[scorer.reference for scorer in chosen if scorer.reference is not None],
        template=templates,
    )
    data = examples.read(wanted.data, layout)
    excluded = [id for file in wanted.exclude for id in examples.excluded_ids(file)]
    sample = examples.draw(data, limit=wanted.limit, skip=wanted.skip, seed=wanted.seed, excluded=excluded)
    systems.check(found, sample.examples, wanted.fields, wanted.data)
    scorers.check(chosen, sample.examples, wanted.data)
    for file in (json, html):
        _check_writable(file)
    with prepared(parts):
        traces = parts.trace()
        try:
            evaluated = asyncio.run(_evaluated(parts, asker, found, sample.examples, chosen, wanted))
        except Stopped as error:
            print(f"asmodel: {trace_words.clean(str(error))}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            # Before the first question was asked, or for the second time.
            return 130
        finally:
            traces.shutdown()
    missing = {s.name: sorted(name for name in (*wanted.fields, *wanted.params) if not s.has(name)) for s in found}
    made = report(
        evaluated,
        data=data,
        sample=sample,
        systems=found,
        scorers=chosen,
        seed=wanted.seed or 0,
        repeats=wanted.repeats,
        at_once=wanted.at_once,
        all_pairs=wanted.all_pairs,
        not_given=missing,
    )
    try:
        for file, text in ((json, made.model_dump_json(indent=1)), (html, page.page(made) if html is not None else "")):
            if file is not None:
                _write(file, text)
    finally:
        # In a pipe, what fits a terminal of 80 columns.
        for line in table.lines(made, shutil.get_terminal_size((80, 24)).columns):
            print(line)
    return _code(made, parts)


def _systems(wanted: Wanted, parts: Parts) -> list[System]:
    models = parts.models
    if wanted.step is not None:
        found = systems.step_systems(wanted.step, wanted.systems, models)
    else:
        told = systems.described(wanted.systems, wanted.systems_file, models)
        if not told:
            raise ConfigurationError("which system? asmodel eval SYSTEM... DATA.jsonl, or --systems FILE")
        found = systems.systems_of(told, models)
    return systems.with_params(found, wanted.params)


def _scorers(wanted: Wanted, parts: Parts, asker: Asker) -> list[Scorer]:
    made: list[Scorer] = []
    specs = list(dict.fromkeys(wanted.scorers))
    short = Counter(spec.partition("=")[0] for spec in specs)
    for spec in specs:
        # Without its field, unless that is what tells it from another.
        name = spec.partition("=")[0] if short[spec.partition("=")[0]] == 1 else spec

        def judges(model: str, spec: str = spec, name: str = name) -> Measure:
            try:
                (system,) = systems.systems_of(systems.described([model], None, parts.models), parts.models)
            except (ModelNotFound, ConfigurationError) as error:
                raise ConfigurationError(f"--score {spec}: {error}") from None
            return asker.judging(name, system)

        scorer = scorers.scorer(spec, wanted.answer, judges=judges, ranking=wanted.ranking)
        made.append(replace(scorer, name=name))
    return made


async def _evaluated(
    parts: Parts,
    asker: Asker,
    found: Sequence[System],
    chosen: Sequence[examples.Example],
    measures: Iterable[Scorer],
    wanted: Wanted,
) -> Evaluated:
    try:
        await parts.open()
        for system in found:
            try:
                await asker.check(system, chosen[0])
            except InvalidRequest as error:
                raise ConfigurationError(f'system "{system.name}": {error}') from error
            except AsmodelError:
                continue  # An upstream that is down now: its questions tell of it, and may find it up.
        with Watching(len(found) * len(chosen) * wanted.repeats) as watching:
            return await evaluate(
                asker,
                found,
                chosen,
                list(measures),
                repeats=wanted.repeats,
                at_once=wanted.at_once,
                strict=wanted.strict,
                on_result=watching.told,
            )
    finally:
        await parts.close()


def _code(made: Report, parts: Parts) -> int:
    if made.interrupted:
        asked = sum(s.answered + s.errors for s in made.systems)
        kept = (
            "the same command goes on from here: what is done comes out of the cache"
            if parts.store is not None
            else "[cache] kind is off, so the same command begins anew"
        )
        print(f"asmodel: interrupted after {asked} answers; {kept}", file=sys.stderr)
        return 130
    return 1 if any(system.errors or system.not_cached for system in made.systems) else 0


def _check_writable(file: Path | None) -> None:
    """A folder that is not there is better told before an hour of questions than after."""
    if file is not None and not file.parent.is_dir():
        raise ConfigurationError(f"{file}: there is no folder {file.parent}")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}") from None
    print(f"wrote {file}", file=sys.stderr)
