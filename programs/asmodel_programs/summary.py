"""Summarise a text of any length: its parts, then the summaries of those together, up to one of a set length.

Source: Wu, Ouyang, Ziegler, Stiennon, Lowe, Leike, Christiano, "Recursively Summarizing Books with Human Feedback",
arXiv 2109.10862 (2021). Where a part ends is decided by the sentences around that place and by nothing else, so that a
change of the text moves no part but those beside it: asked again, only the way from there to the top is bought.
"""

import hashlib
import re
from collections.abc import Sequence

from pydantic import BaseModel, Field, model_validator

from asmodel import Answer, InvalidRequest, Run, gather, program, step


class Params(BaseModel):
    words: int = Field(default=100, ge=10, description="How long the result may be, in words.")
    part: int = Field(default=400, ge=60, description="How much of the text is shown to the model at once, in words.")
    focus: str = Field(default="", description="What the summary should attend to.")

    @model_validator(mode="after")
    def _result_is_shorter_than_a_part(self) -> "Params":
        if self.words > self.part:
            raise ValueError(f"a summary of {self.words} words cannot be made of parts of {self.part}")
        return self


def some(text: str) -> str:
    """The reply, if there is one."""
    if not text.strip():
        raise ValueError("The reply is empty; it should be the summary.")
    return text.strip()


@step(model="writer", temperature=0, returns=some)
def summary_of(text: str, words: int, focus: str) -> str:
    attending = f", attending to {focus}," if focus else ""
    return f"{text}\n\nSummarise the text above{attending} in at most {words} words. Give the summary and nothing else."


def length(text: str) -> int:
    """In words; where none are written apart, eight characters are one."""
    return max(len(text.split()), -(-len(text) // 8))


def sentences(text: str, most: int) -> list[str]:
    """The text, cut after each sentence and paragraph; none is longer than `most` words, and none of it is lost."""
    found = re.findall(r".+?(?:[.!?…][\"'”’)\]]*\s+|[。！？]\s*|\n\s*\n|\Z)", text, re.DOTALL)  # noqa: RUF001
    limit = 2 * most - 1  # characters: more words than `most` are not in them
    cut = ([s] if length(s) <= most else [s[i : i + limit] for i in range(0, len(s), limit)] for s in found)
    return [piece for pieces in cut for piece in pieces]


def parts(units: Sequence[str], most: int) -> list[str]:
    """The units in groups of at most `most` words: what is longer is cut after the unit whose hash is the least.

    So whether there is a cut depends on the units within `most` words of it: an edit elsewhere cannot move it.
    """
    sizes, marks = [length(u) for u in units], [hashlib.sha256(u.encode()).digest() for u in units]
    found: list[str] = []
    waiting = [(0, len(units))]
    while waiting:
        start, end = waiting.pop()
        if end - start == 1 or sum(sizes[start:end]) <= most:
            found.append("".join(units[start:end]))
        else:
            cut = min(range(start, end - 1), key=lambda i: (marks[i], i)) + 1
            waiting += [(cut, end), (start, cut)]  # the first one is taken first
    return found


def within(text: str, words: int) -> str:
    """The text, or as many of its sentences as there is room for; where that is none, of its words, or characters."""
    for units in (sentences(text, length(text)), re.findall(r"\S+\s*", text), list(text)):
        kept = ""
        for unit in units:
            if length((kept + unit).strip()) > words:
                break
            kept += unit
        if kept.strip():
            return kept.strip()
    return ""


async def shortened(run: Run[Params], text: str, words: int) -> str:
    """The text in at most so many words: as it is, or as the model puts it."""
    text, focus = text.strip(), run.params.focus
    for _ in range(3):  # what came out too long is summarised again
        if length(text) <= words:
            return text
        brief = summary_of.using(max_tokens=words * 2)
        size = await run.size(brief, text, words, focus)
        tokens = size.tokens * (1.3 if size.estimated else 1) + words * 2
        if size.context is not None and tokens > size.context:
            if length(text) < 4 * words:
                raise InvalidRequest(
                    f'program "summary": to make {words} words of {length(text)} takes {tokens:.0f} tokens, and the '
                    f"model has room for {size.context}; ask for fewer words",
                    param="asmodel.params.words",
                )
            halves = parts(sentences(text, length(text) // 2), length(text) // 2)
            text = " ".join(await gather(shortened(run, half, words) for half in halves))
        else:
            text = await run(brief, text, words, focus)
    return within(text, words)


@program("summary", params=Params)
async def summary(run: Run[Params]) -> Answer:
    """Summarise the documents, or else the last message, however long they are."""
    params, part = run.params, run.params.part
    text = "\n\n".join(document.text for document in run.documents) or run.question
    if not text.strip():
        raise InvalidRequest('program "summary" wants a text: the last message, or "documents": [{"text": "…"}]')
    empty = await run.size(summary_of, "", params.words, params.focus)
    if empty.context is not None:  # at three tokens a word, the reply's among them
        part = max(30, min(part, (empty.context - empty.tokens) // 3))
    units, levels, first = sentences(text, part // 3), 0, 0
    while sum(map(length, units)) > part:
        groups, levels = parts(units, part), levels + 1
        first = first or len(groups)
        with run.part(f"level {levels}", of=len(groups)):
            units = [f"{s}\n\n" for s in await gather(shortened(run, group, part // 5) for group in groups)]
    run.note(levels=levels + 1, parts=first)
    answer = await shortened(run, "".join(units), params.words)
    return Answer(text=answer, data={"levels": levels + 1, "parts": max(1, first)})
