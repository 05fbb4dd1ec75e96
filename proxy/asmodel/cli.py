"""The `asmodel` command: each subcommand is a few lines over the parts, and imports what is slow where it is used."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from asmodel.errors import AsmodelError, ConfigurationError

if TYPE_CHECKING:
    from asmodel.app import Parts
    from asmodel.probing import Probed
    from asmodel.protocols import Cache
    from asmodel.settings import Settings

T = TypeVar("T")

CONFIG_HELP = "Settings file; asmodel.toml in this folder if there is one."
PROGRAMS_HELP = "Folder of program files; may be given several times."


def _config(function: Callable[..., T]) -> Callable[..., T]:
    """The two options that every command with settings has."""
    programs = click.option("--programs", "folders", type=click.Path(path_type=Path), multiple=True, help=PROGRAMS_HELP)
    config = click.option("--config", type=click.Path(path_type=Path), help=CONFIG_HELP)
    return config(programs(function))


class _Commands(click.Group):
    """Commands in the order in which one needs them, and every error of ours as one message and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AsmodelError as error:
            for line in error.message.splitlines():
                click.echo(f"asmodel: {line}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="asmodel")
def main() -> None:
    """Serve LLM programs as models.

    A program is Python that keeps the state and asks models in small steps. Clients of OpenAI's API select it by the
    model name, and get one ordinary completion.

    \b
    asmodel new haiku        write a program that works, and its test
    asmodel serve            answer on http://127.0.0.1:8000/v1
    asmodel run haiku "…"    ask without a server
    asmodel trace            see what was done, step by step
    """


def _settings(config: Path | None, folders: tuple[Path, ...], **flags: Any) -> Settings:
    from asmodel.settings import load

    given = {name: value for name, value in flags.items() if value is not None}
    if folders:
        given["program_folders"] = list(folders)
    return load(config, given)


@main.command(short_help="Answer OpenAI's API on http://127.0.0.1:8000/v1.")
@_config
@click.option("--host", help="Address to listen at; 127.0.0.1 unless set. Others need [keys].")
@click.option("--port", type=int, help="Port to listen at; 8000 unless set. 0 takes a free one.")
@click.option("--workers", type=int, help="Processes that answer; 1 unless set.")
@click.option("--reload", is_flag=True, help="Start again when a program file or the settings change.")
def serve(
    config: Path | None,
    folders: tuple[Path, ...],
    host: str | None,
    port: int | None,
    workers: int | None,
    reload: bool,
) -> None:
    """Answer OpenAI's API: POST /v1/chat/completions, GET /v1/models.

    Nothing is listened at until settings, programs and names are found to be right. With no upstream set, the embedded
    model answers.
    """
    from asmodel.server import serve as run

    settings = _settings(config, folders, host=host, port=port, workers=workers)
    run(settings, config=config, reload=reload)


@main.command(short_help="Ask the running server whether it is alive.")
@click.option("--config", type=click.Path(path_type=Path), help=CONFIG_HELP)
@click.option(
    "--ready", is_flag=True, help="Ask whether it can answer: not while it loads, nor once it was told to stop."
)
def health(config: Path | None, ready: bool) -> None:
    """Ask the server of these settings, on this machine, whether it is alive. Exit code 1 if it is not.

    For the health checks of containers, which then need no other program.
    """
    import http.client

    settings = _settings(config, ())
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=4)
    try:
        connection.request("GET", "/readyz" if ready else "/healthz")
        response = connection.getresponse()
        said = response.read(1000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        click.echo(f"nobody answers at {host}:{settings.port}: {error}", err=True)
        sys.exit(1)
    finally:
        connection.close()
    click.echo(said)
    sys.exit(response.status != 200)


@main.command()
@click.argument("program")
@click.argument("question")
@_config
@click.option("--param", "params", multiple=True, metavar="K=V", help="A parameter; V is JSON, or else text.")
@click.option(
    "--params",
    "params_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSON file of parameters.",
)
@click.option("--upstream", metavar="NAME", help="Who plays every role; [roles] of the settings unless given.")
@click.option("--plan", is_flag=True, help="Say what is in the cache and what would be bought; buy nothing.")
@click.option("--key", metavar="KEY", help="Idempotency key, for programs with effects; the same to go on with a run.")
@click.option("--record", is_flag=True, help="Keep what it is asked and answered, for `asmodel replay`.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer, its citations and the receipt as JSON.")
def run(
    program: str,
    question: str,
    config: Path | None,
    folders: tuple[Path, ...],
    params: tuple[str, ...],
    params_file: Path | None,
    upstream: str | None,
    plan: bool,
    key: str | None,
    as_json: bool,
    record: bool,
) -> None:
    """Ask PROGRAM a QUESTION, without a server. Shares the cache and the traces with one.

    \b
    asmodel run plain "Why is the sky blue?"
    asmodel run evidence-qa "Who rang the bell?" --params paragraphs.json
    asmodel run self-consistency "What is 17 * 23?" --param samples=3
    """
    from asmodel.asking import ask

    settings = _settings(config, folders, recording={"on": True} if record else None)
    given = _params(params, params_file)
    code = ask(settings, program, question, given, upstream=upstream, as_json=as_json, identity=key, plan=plan)
    sys.exit(code)


@main.command(name="eval", short_help="Ask models the questions of a file, score the answers, compare.")
@click.argument("arguments", nargs=-1, required=True, metavar="SYSTEM... DATA.jsonl")
@_config
@click.option("--question", default="question", show_default=True, metavar="FIELD", help="The question.")
@click.option("--messages", metavar="FIELD", help="A conversation, a list of messages, instead of a question.")
@click.option("--answer", default="answer", show_default=True, metavar="FIELD", help="What is right.")
@click.option("--id", "id_field", metavar="FIELD", help="What names a line; id, or else its number.")
@click.option(
    "--param", "fields", multiple=True, metavar="NAME=FIELD", help="A parameter that each line has its own of."
)
@click.option("--document", "documents", multiple=True, metavar="FIELD", help="Documents that go with the question.")
@click.option("--set", "pairs", multiple=True, metavar="K=V", help="A parameter for all; V is JSON, or else text.")
@click.option(
    "--params",
    "params_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSON file of parameters for all.",
)
@click.option(
    "--systems",
    "systems_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML or JSON file of systems: [NAME] with model, params, roles, prompt.",
)
@click.option("--step", metavar="PROGRAM/STEP", help="Ask one step of a program; the systems then play its role.")
@click.option("--arg", "step_fields", multiple=True, metavar="NAME=FIELD", help="An argument of the step.")
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="SCORER[=FIELD]",
    help="How an answer is scored: exact (unless set), contains, f1, yes-no, number[:TOLERANCE], recall@K, "
    "precision@K, hit@K, mrr[@K], ndcg[@K], pydantic:MODULE:MODEL, judge:MODEL, MODULE:FUNCTION. FIELD is what is "
    "right, for this one.",
)
@click.option("--ranking", metavar="FIELD", help="Where a ranking is in an answer's data.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Draw so many questions; all unless set.")
@click.option("--seed", type=int, metavar="S", help="What draws them; 0 unless set.")
@click.option("--skip", type=click.IntRange(0), default=0, metavar="N", help="Pass over so many of the drawn first.")
@click.option(
    "--exclude",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Leave out the ids in it: one a line, or a report by --json.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    metavar="N",
    help="Ask each question so often; what is sampled is drawn anew.",
)
@click.option(
    "-j", "--jobs", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="How many at once."
)
@click.option("--only-cached", is_flag=True, help="Buy nothing; what is not in the cache is not counted.")
@click.option("--strict", is_flag=True, help="End at the first error.")
@click.option("--all-pairs", is_flag=True, help="Compare each with each, not only with the first.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write all of it as JSON.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with plots.")
def evaluate(
    arguments: tuple[str, ...],
    config: Path | None,
    folders: tuple[Path, ...],
    question: str,
    messages: str | None,
    answer: str,
    id_field: str | None,
    fields: tuple[str, ...],
    documents: tuple[str, ...],
    pairs: tuple[str, ...],
    params_file: Path | None,
    systems_file: Path | None,
    step: str | None,
    step_fields: tuple[str, ...],
    scores: tuple[str, ...],
    ranking: str | None,
    limit: int | None,
    seed: int | None,
    skip: int,
    exclude: tuple[Path, ...],
    repeats: int,
    jobs: int,
    only_cached: bool,
    strict: bool,
    all_pairs: bool,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Ask each SYSTEM every question of DATA.jsonl, score the answers, and compare the systems.

    A SYSTEM is a program, an upstream, a preset or a composition; MODEL@NAME=VALUE,NAME=VALUE gives it parameters.
    Nothing is stored but the cache: the same command goes on where an interrupted one stopped, and one that is done
    gives the same table again and buys nothing.

    \b
    asmodel eval evidence-qa plain data.jsonl --param paragraphs=facts
    asmodel eval plain self-consistency@samples=5 math.jsonl --score number
    asmodel eval fast slow data.jsonl --limit 100 --seed 7 --html report.html
    asmodel eval --step evidence-qa/answer_from fast slow data.jsonl \\
        --arg evidence=facts --arg question=question

    Exit code 1 where a question has no answer, 130 where it was interrupted.
    """
    from asmodel.evaluation import command
    from asmodel.evaluation.fields import Field, pair

    *systems, data = arguments
    if not Path(data).is_file():
        raise ConfigurationError(f"the last argument is the JSONL file of questions, and there is no file {data}")
    if step is None and step_fields:
        raise click.UsageError("--arg goes with --step; a program's parameter is --param")
    if step is not None and (fields or systems_file):
        raise click.UsageError("--step takes --arg, and models that play its role; no --param, and no --systems")
    own = [pair(text, "--arg" if step else "--param") for text in (step_fields if step else fields)]
    wanted = command.Wanted(
        systems=systems,
        data=Path(data),
        systems_file=systems_file,
        step=step,
        question=Field(messages or question),
        conversation=messages is not None,
        answer=Field(answer),
        id=None if id_field is None else Field(id_field),
        fields=dict(own),
        documents=[Field(path) for path in documents],
        params=_params(pairs, params_file, option="--set"),
        scorers=scores or ("exact",),
        ranking=None if ranking is None else Field(ranking),
        limit=limit,
        skip=skip,
        seed=seed,
        exclude=exclude,
        repeats=repeats,
        at_once=jobs,
        only_cached=only_cached,
        strict=strict,
        all_pairs=all_pairs,
    )
    sys.exit(command.run(_settings(config, folders), wanted, json=json_file, html=html_file))


def _params(pairs: tuple[str, ...], file: Path | None, *, option: str = "--param") -> dict[str, Any]:
    given: dict[str, Any] = {}
    if file is not None:
        try:
            loaded: Any = json.loads(file.read_text())
        except OSError as error:
            raise ConfigurationError(f"--params {file}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{file}:{error.lineno}: is not JSON: {error.msg}") from None
        if not isinstance(loaded, dict):
            raise ConfigurationError(f'{file}: should be a JSON object of parameters, such as {{"paragraphs": ["…"]}}')
        given = cast("dict[str, Any]", loaded)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigurationError(f"{option} {pair}: should be NAME=VALUE")
        try:
            given[name] = json.loads(text)
        except json.JSONDecodeError:
            given[name] = text
    return given


def _width() -> int:
    """Columns of the terminal; 80 where there is none, so that what is piped reads like what is shown."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def _wrapped(text: str, *, first: str = "", rest: str = "") -> str:
    """The text in lines that fit, after `first` on its first line and `rest` on the others."""
    return textwrap.fill(
        text,
        _width(),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


@main.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def programs(config: Path | None, folders: tuple[Path, ...], as_json: bool) -> None:
    """List the programs, what they take, and where they come from."""
    from asmodel.app import all_programs

    settings = _settings(config, folders)
    found = sorted(all_programs(settings.program_folders), key=lambda p: p.name)
    if as_json:
        rows = [
            {
                "name": p.name,
                "description": p.description,
                "params": p.params.model_json_schema() if p.params else None,
                "supports": sorted(p.supports),
                "roles": sorted({s.role for s in p.steps}),
                "file": str(p.file),
                "digest": p.digest,
            }
            for p in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for p in found:
        click.echo(click.style(p.name, bold=True))
        click.echo(_wrapped(p.description, first="    ", rest="    "))
        params = ", ".join(p.params.model_fields) if p.params else "none"
        click.echo(_wrapped(params, first="    params  ", rest=" " * 12))
        click.echo(
            _wrapped(", ".join(sorted({s.role for s in p.steps})) or "none", first="    roles   ", rest=" " * 12)
        )
        click.echo(f"    file    {_short(p.file)}")


def _short(file: Path | None) -> str:
    if file is None:
        return "?"
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else f"{file.parent.name}/{file.name}"


def _opened(settings: Settings, work: Callable[[Parts], Any]) -> Any:
    """Build, prepare and open the parts around some work; each part once, and closed whatever happens."""
    from asmodel.app import build
    from asmodel.preparing import prepared

    parts = build(settings)

    async def around() -> Any:
        try:
            await parts.open()
            return await work(parts)
        finally:
            await parts.close()

    with prepared(parts):
        return asyncio.run(around())


@main.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def upstreams(config: Path | None, folders: tuple[Path, ...], as_json: bool) -> None:
    """Try each upstream, and say what it can do. Asks each for one token, and for a log-likelihood."""
    from asmodel.probing import probe

    settings = _settings(config, folders)
    rows = _opened(settings, probe)
    if as_json:
        click.echo(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        for row in rows:
            _show_upstream(row)
    if any(row.error for row in rows):
        sys.exit(1)


def _show_upstream(row: Probed) -> None:
    click.echo(f"{click.style(row.name, bold=True)} ({row.kind}) " + ("does not answer" if row.error else "answers"))
    if row.error:
        click.echo(_wrapped(row.error, first="    ", rest="    "))
        return
    told = {
        "model": row.answers,
        "can": ", ".join(name for name, value in row.can.items() if value is True),
        "cannot": ", ".join(name for name, value in row.can.items() if value is False),
        "context": f"{row.can['context']} tokens" if row.can["context"] else "of a size that it does not tell",
        "identity": row.identity,
    }
    for name, value in told.items():
        if value:
            click.echo(_wrapped(value, first=f"    {name:10}", rest=" " * 14))


@main.command(short_help="Check settings, programs and roles; show who plays what.")
@_config
def check(config: Path | None, folders: tuple[Path, ...]) -> None:
    """Check settings, programs, names and roles, and show who plays each role.

    Points out steps that show something else than their arguments: globals that change, clocks, chance. Asks no
    upstream anything, unless one must be tried to know whether it can give log-likelihoods; `asmodel upstreams` does.

    Exit code 2 where something is wrong.
    """
    from asmodel.probing import roles

    settings = _settings(config, folders)
    found = _opened(settings, roles)
    rows = [("program", "step", "role", "played by", "")]
    above = ""
    for row in found.rows:
        # A name stands once, above what belongs to it.
        rows.append((row.program if row.program != above else "", row.step, row.role, row.player, row.note))
        above = row.program
    head, *lines = _columns(rows)
    click.echo(click.style(head, bold=True))
    for line in lines:
        click.echo(line)
    for remark in found.remarks:
        click.echo("\n" + _wrapped(f"note: {remark}", rest="      "))
    for problem in found.problems:
        click.echo("\n" + _wrapped(f"asmodel: {problem}", rest="         "), err=True)
    if found.problems:
        sys.exit(2)
    click.echo("\nAll well.")


@main.command(short_help="List the last runs; draw one, follow it, or compare two.")
@click.argument("ids", nargs=-1, metavar="[ID [ID]]")
@_config
@click.option("--follow", "-f", is_flag=True, help="Draw a run as it happens: ID, or else the next one.")
@click.option("--all", "everything", is_flag=True, help="Do not fold steps that are alike.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many runs to list.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--otlp", is_flag=True, help="Print as OTLP JSON, which collectors and Jaeger take.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write a page that needs nothing else; - prints it.",
)
def trace(
    ids: tuple[str, ...],
    config: Path | None,
    folders: tuple[Path, ...],
    follow: bool,
    everything: bool,
    limit: int,
    as_json: bool,
    otlp: bool,
    html: Path | None,
) -> None:
    """List the last runs, or draw the one whose trace or run id begins with ID; `last` is the last one.

    \b
    asmodel trace last                 one run as a tree, and where its time went
    asmodel trace --follow             the next run, as it happens
    asmodel trace run_1a2b run_3c4d    two runs, step by step
    asmodel trace last --html run.html
    """
    from asmodel import trace_compare, trace_follow, trace_html, trace_otlp, trace_reader, trace_schema, trace_view

    settings = _settings(config, folders)
    path = settings.traces.path or trace_schema.default_path(os.environ)
    if len(ids) > 2:
        raise click.UsageError("give one ID, or two to compare")
    if len(ids) == 2 and (follow or otlp or html):
        raise click.UsageError("two runs can be compared, as text or with --json; --follow, --otlp and --html take one")
    try:
        if follow:
            trace_follow.follow(path, ids[0] if ids else None, everything=everything)
            return
        if not ids and not (otlp or html):
            rows = trace_reader.runs(path, limit=limit)
            if as_json:
                click.echo(json.dumps(trace_view.runs_json(rows), indent=2))
                return
            trace_view.draw_runs(rows)
            if rows:
                click.echo("\nOne of them, step by step: asmodel trace ID")
            return
        found = [trace_reader.spans(path, id) for id in ids or ("last",)]
    except (trace_reader.NoSuchTrace, trace_reader.TraceFileUnreadable) as error:
        raise ConfigurationError(str(error)) from None
    except KeyboardInterrupt:
        sys.exit(130)
    if html is not None:
        with click.open_file(str(html), "w", encoding="utf-8") as file:
            file.write(trace_html.page(found[0]))
        if str(html) != "-":
            click.echo(f"wrote {html}", err=True)
    elif otlp:
        click.echo(json.dumps(trace_otlp.otlp(found[0]), ensure_ascii=False))
    elif len(found) == 2:
        if as_json:
            click.echo(json.dumps(trace_compare.comparison_json(*found), indent=2))
        else:
            trace_compare.draw_comparison(*found, everything=everything)
    elif as_json:
        click.echo(json.dumps(trace_view.trace_json(found[0]), indent=2))
    else:
        trace_view.draw_trace(found[0], everything=everything)


@main.group(cls=_Commands, short_help="See what the cache holds and saves, why a step was bought; clear it.")
def cache() -> None:
    """What was bought is kept, step by step, and is not bought again."""


def _with_store(settings: Settings, work: Callable[[Cache, Path], Awaitable[T]]) -> T:
    """Open the cache alone around some work on it and the file of traces."""
    from asmodel import trace_store
    from asmodel.app import open_cache

    traces = settings.traces.path or trace_store.default_path(os.environ)

    async def around() -> T:
        async with open_cache(settings) as store:
            return await work(store, traces)

    return asyncio.run(around())


@cache.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def stats(config: Path | None, folders: tuple[Path, ...], as_json: bool) -> None:
    """Count entries, bytes, hits, and the tokens and dollars saved, by step.

    Hits and savings are those of the runs that `asmodel trace` lists.
    """
    from asmodel.stock import take

    stock = _with_store(_settings(config, folders), take)
    if as_json:
        click.echo(json.dumps(stock.as_json(), indent=2))
        return
    rows: list[Sequence[str]] = [("program", "step", "entries", "kB", "hits", "misses", "tokens saved", "saved")]
    for s in stock.steps:
        counts = (s.entries, round(s.bytes / 1000, 1), s.hits, s.misses, s.saved_tokens)
        rows.append((s.program or "-", s.step, *map(str, counts), f"${s.saved_cost:.4f}"))
    head, *lines = _columns(rows)
    click.echo(click.style(head, bold=True))
    for line in lines:
        click.echo(line)
    click.echo(
        f"\n{stock.entries} entries, {stock.bytes / 1000:.1f} kB; "
        f"{stock.saved_tokens} tokens and ${stock.saved_cost:.4f} saved in the runs that are kept"
    )


@cache.command()
@_config
@click.option("--program", metavar="NAME", help="Only answers of this program.")
@click.option("--step", metavar="NAME", help="Only answers of this step.")
@click.option("--scope", metavar="NAME", help="Only those of this holder of a key; '' for those of nobody.")
@click.option("--older-than", metavar="AGE", help="Only those stored longer ago: 90s, 15m, 12h, 7d, 2w.")
@click.option("--yes", is_flag=True, help="Do not ask before everything is deleted.")
def clear(
    config: Path | None,
    folders: tuple[Path, ...],
    program: str | None,
    step: str | None,
    scope: str | None,
    older_than: str | None,
    yes: bool,
) -> None:
    """Delete stored answers: those for which all that is given holds; all, if nothing is."""
    from asmodel.stock import clear as delete
    from asmodel.stock import seconds

    settings = _settings(config, folders)
    age = None if older_than is None else seconds(older_than)
    if (program, step, scope, age) == (None, None, None, None) and not yes:
        click.confirm("Delete every stored answer?", abort=True, err=True)
    gone = _with_store(
        settings, lambda store, _: delete(store, program=program, step=step, scope=scope, older_than=age)
    )
    click.echo(f"{gone} deleted")


@cache.command()
@click.argument("id", default="last")
@_config
@click.option("--all", "everything", is_flag=True, help="The steps that were found, too.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def explain(id: str, config: Path | None, folders: tuple[Path, ...], everything: bool, as_json: bool) -> None:
    """Say of each step of a run whether it was found, and why not: what differs from the nearest stored answer.

    ID is the beginning of a run's or trace's id; the last run unless given.
    """
    from asmodel import explaining, trace_reader

    settings = _settings(config, folders)

    async def work(store: Cache, traces: Path) -> list[explaining.Explained]:
        try:
            return await explaining.explain(trace_reader.spans(traces, id), store)
        except (trace_reader.NoSuchTrace, trace_reader.TraceFileUnreadable) as error:
            raise ConfigurationError(str(error)) from None

    found = _with_store(settings, work)
    if as_json:
        click.echo(json.dumps([one.as_json() for one in found], indent=2))
        return
    for one in found:
        if everything or one.outcome not in ("hit", "joined"):
            click.echo(_wrapped(one.why, first=f"{one.program or '-'}  {one.step}  ", rest="    "))
    hits = sum(one.outcome == "hit" for one in found)
    bought = sum(one.outcome in ("miss", "bypass") for one in found)
    click.echo(f"\n{len(found)} steps: {hits} found, {bought} bought")


@main.command(short_help="Run a recorded run again, with one thing changed.")
@click.argument("id")
@_config
@click.option("--step", metavar="NAME", help="The step that shows something else; with --prompt-file.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What it shows instead; {shown} in it is what it showed.",
)
@click.option("--upstream", metavar="NAME", help="Who plays every role instead.")
@click.option("--all", "everything", is_flag=True, help="Do not fold steps that are alike.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def replay(
    id: str,
    config: Path | None,
    folders: tuple[Path, ...],
    step: str | None,
    prompt_file: Path | None,
    upstream: str | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Run the recorded run again whose id begins with ID; `last` is the last one, and a .jsonl file is itself.

    What the change does not touch is taken from the recording, and not bought again. Without a change, nothing is
    bought, and the answer should be the same.

    \b
    asmodel run plain "Why is the sky blue?" --record
    asmodel replay last
    asmodel replay last --step answer --prompt-file shorter.txt
    asmodel replay run_1a2b --upstream fast

    Exit code 1 where it fails, or nothing was changed and the answer differs.
    """
    from asmodel import replaying

    if (step is None) != (prompt_file is None):
        raise click.UsageError("--step and --prompt-file belong together: which step, and what it shows instead")
    text = None
    if prompt_file is not None:
        try:
            text = prompt_file.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--prompt-file {prompt_file}: {error}") from None
    try:
        done = replaying.command(_settings(config, folders), id, step=step, prompt=text, upstream=upstream)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        click.echo(json.dumps(replaying.replay_json(done), indent=2, ensure_ascii=False))
    else:
        replaying.draw_replay(done, everything=everything)
    if not done.replay.well:
        sys.exit(1)


@main.command(short_help="Write a program that works, and its test.")
@click.argument("name")
@click.option(
    "--programs", "folder", type=click.Path(path_type=Path), default=Path("programs"), show_default=True, help="Folder."
)
def new(name: str, folder: Path) -> None:
    """Write the program NAME, which works as it is, and its test, which needs no model."""
    from asmodel.template import write

    written = write(name, folder)
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(f'\nTry it:   asmodel run {name} "the sea" --programs {folder}')
    click.echo(f"Test it:  python -m pytest {written[-1]}")
    click.echo(f"Serve it: asmodel serve --programs {folder}")


if __name__ == "__main__":
    main()
