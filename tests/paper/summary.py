"""A summary of a text many times as long as the upstream's context; then one word is changed, and it is asked again.

    python tests/paper/summary.py --text FILE --context 1024

Without `--text`, the text is the paragraphs of `--data`, one after the other, up to twenty times the context.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __package__ in (None, ""):
    # Run as a script: its siblings are found as what they are in the tests, and none of them hides a standard module.
    sys.path[0] = str(ROOT)

import click  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tests.paper.asking import Asking, Question, run  # noqa: E402
from tests.paper.drawing import strategyqa  # noqa: E402

from asmodel.settings import Settings, UpstreamSettings  # noqa: E402
from asmodel_programs.summary import summary  # noqa: E402

TIMES = 20
"""How many contexts long the text is at least, at 1.3 tokens a word."""


def with_context(settings: Settings, context: int) -> Settings:
    """The settings with an upstream `default` of so many tokens' context, where it is the embedded model."""
    if not settings.embedded_by_default:
        return settings
    small = UpstreamSettings(kind="embedded", options={"context": context})
    return settings.model_copy(update={"upstreams": {"default": small}})


def changed(text: str, seed: int) -> tuple[str, int]:
    """The text with one word changed, and which."""
    words = text.split(" ")
    place = random.Random(seed).randrange(len(words))
    words[place] = "changed"
    return " ".join(words), place


@click.command()
@click.option("--text", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--context", type=click.IntRange(256), default=1024, show_default=True, help="Tokens of one call.")
@click.option("--words", type=click.IntRange(10), default=100, show_default=True, help="Of the result.")
@click.option("--part", type=click.IntRange(60), default=300, show_default=True, help="Words that are shown at once.")
@click.option("--edits", type=click.IntRange(0), default=5, show_default=True, help="How often a word is changed.")
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings: another model.")
@click.option("--only-cached", is_flag=True, help="Buy nothing; end with an error where something is missing.")
def main(
    file: Path | None,
    data: Path | None,
    context: int,
    words: int,
    part: int,
    edits: int,
    seed: int,
    config: Path | None,
    only_cached: bool,
) -> None:
    """Print how many calls each version of the text took, against the depth of its tree."""
    if file is not None:
        text = file.read_text(encoding="utf-8")
    elif data is not None:
        paragraphs = "\n\n".join(strategyqa(data)[1].values()).split(" ")
        text = " ".join(paragraphs[: int(TIMES * context / 1.3) + 1])
    else:
        raise click.UsageError("say --text FILE or --data DIR")
    params = {"words": words, "part": part}

    async def measure(asking: Asking) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("text", "levels", "parts", "steps", "now bought", "words of the summary"):
            table.add_column(column, justify="left" if column == "text" else "right")
        versions = [("as it is", text)]
        for number in range(edits):
            version, place = changed(text, seed + number)
            versions.append((f"word {place + 1} changed", version))
        said = ""
        for name, version in versions:
            (told,) = await asking.all([Question(program="summary", text=version, params=params)], name)
            shape: Any = told.answer.data
            steps = str(told.calls + told.hits)
            brief = str(len(told.answer.text.split()))
            table.add_row(name, str(shape["levels"]), str(shape["parts"]), steps, str(told.calls), brief)
            said = said or told.answer.text
        console = Console(highlight=False, width=120)
        console.print(
            f"{len(text.split())} words, {len(text)} characters; parts of {part} words; {context} tokens a call\n"
        )
        console.print(table)
        console.print(f"\n{said}\n\n{asking.said()}", markup=False)

    run(
        measure,
        [summary],
        config=config,
        only_cached=only_cached,
        at_once=1,
        changed=lambda settings: with_context(settings, context),
    )


if __name__ == "__main__":
    main()
