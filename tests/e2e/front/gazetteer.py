"""Look a place up in several books, weigh what they say, and answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from asmodel import Answer, Citation, Run, gather, program, step


class Params(BaseModel):
    books: list[str] = Field(default=["atlas", "almanac", "chronicle"], description="Where to look.")
    style: Literal["short", "long"] = Field(default="short", description="How the answer reads.")
    careful: bool = Field(default=False, description="Whether each finding is looked up twice.")
    pages: int = Field(default=3, ge=1, le=20, description="How many pages of each book.")


@step(model="reader")
def finding(question: str, book: str, page: int) -> str:
    return f"Look up in the {book}, page {page}: {question}"


@step(model="judge")
def weight(question: str, said: str) -> str:
    return f"How much does this help with {question!r}? {said}"


@step(model="writer")
def answer(question: str, findings: list[str]) -> str:
    return "Answer from these findings: " + "; ".join(findings) + "\n" + question


@program("gazetteer", params=Params)
async def gazetteer(run: Run[Params]) -> Answer:
    places = [(book, page) for book in run.params.books for page in range(1, run.params.pages + 1)]
    with run.part("look up", of=len(places)):
        said = await gather(run(finding, run.question, book, page) for book, page in places)
    with run.part("weigh", of=len(said)):
        await gather(run(weight, run.question, one) for one in said)
    text = await run.reply(answer, run.question, said)
    cited = [Citation(id=f"{book} {page}", text=one) for (book, page), one in zip(places, said, strict=True)][:2]
    return Answer(text=text, citations=cited)
