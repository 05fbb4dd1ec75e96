"""Selection-inference: choose a few facts, conclude one thing from them alone, and again, until the answer is there.

Source: Creswell, Shanahan, Higgins, "Selection-Inference: Exploiting Large Language Models for Interpretable Logical
Reasoning", arXiv 2205.09712 (2022); when to stop is asked as in Creswell and Shanahan, arXiv 2208.14271 (2022). A fact
is selected by its likelihood, so none can be made up; a conclusion is drawn without the question, so none can be bent.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from asmodel import Answer, Citation, Document, InvalidRequest, Run, gather, program, score, step


class Params(BaseModel):
    facts: list[str] = Field(default=[], description="The facts, one a text; or send documents with the conversation.")
    select: int = Field(default=2, ge=1, le=8, description="Facts from which one conclusion is drawn.")
    steps: int = Field(default=4, ge=1, le=32, description="Conclusions that are drawn at most.")
    answers: Literal["open", "yes-no"] = Field(
        default="open", description="open: in a few words. yes-no: the likelier of the two after the conclusions."
    )


@score(model="scorer")
def fact_given(question: str, selected: Sequence[str], fact: str) -> tuple[str, str]:
    return "\n".join([f"Question: {question}", "These facts settle it:", *selected]), f"\n{fact}"


@step(model="writer", temperature=0, max_tokens=64, stop="\n")
def conclusion(selected: Sequence[str]) -> str:
    return "\n".join(selected) + "\n\nWhat follows from these facts taken together? Say it in one sentence."


@step(model="writer", temperature=0, max_tokens=32, stop="\n")
def answer_or_unknown(question: str, conclusions: Sequence[str]) -> str:
    told = "\n".join(conclusions)
    return f"{told}\n\nQuestion: {question}\nAnswer in a few words. If the above does not settle it, say: unknown."


@step(model="writer", temperature=0, max_tokens=32, stop="\n")
def answer_anyhow(question: str, conclusions: Sequence[str]) -> str:
    told = "\n".join(conclusions)
    return f"{told}\n\nQuestion: {question}\nGive the likeliest answer in a few words."


@score(model="scorer")
def answer_given(question: str, conclusions: Sequence[str], answer: str) -> tuple[str, str]:
    return "\n".join([*conclusions, f"Question: {question}", "Answer:"]), f" {answer}"


async def yes_or_no(run: Run[Params], conclusions: Sequence[str]) -> str:
    yes, no = await gather(run(answer_given, run.question, conclusions, answer) for answer in ("yes", "no"))
    return "Yes" if yes.mean > no.mean else "No"


async def selection(run: Run[Params], facts: Sequence[str]) -> list[int]:
    """The places of the facts that are likeliest to be named next, one after another, each given those before it."""
    chosen: list[int] = []
    while len(chosen) < min(run.params.select, len(facts)):
        left = [place for place in range(len(facts)) if place not in chosen]
        named = [facts[place] for place in chosen]
        likelihoods = await gather(run(fact_given, run.question, named, facts[place]) for place in left)
        chosen.append(max(zip(left, likelihoods, strict=True), key=lambda found: found[1].mean)[0])
    return chosen


@program("selection-inference", params=Params)
async def selection_inference(run: Run[Params]) -> Answer:
    """Reason in small inferences, each from a few selected facts, and answer once the conclusions settle it."""
    given = [Document(text=text, id=str(number)) for number, text in enumerate(run.params.facts, 1)] + [*run.documents]
    if not given or not run.question:
        raise InvalidRequest(
            'program "selection-inference" wants a question and facts: "asmodel": {"params": {"facts": ["…", "…"]}}',
            param="asmodel.params.facts",
        )
    facts, conclusions, used = [d.text for d in given], list[str](), dict[int, None]()
    answer = "unknown"
    for number in range(run.params.steps):
        with run.part(f"inference {number + 1}"):
            chosen = await selection(run, facts)
            new = (await run(conclusion, [facts[place] for place in chosen])).strip()
            used |= dict.fromkeys(place for place in chosen if place < len(given))
            if not new or new in facts:
                break  # nothing more follows
            facts.append(new)
            conclusions.append(new)
            answer = (await run(answer_or_unknown, run.question, conclusions)).strip()
        if answer and "unknown" not in answer.lower():
            break
    if run.params.answers == "yes-no":
        answer = await yes_or_no(run, conclusions or facts)
    elif not answer or "unknown" in answer.lower():
        answer = (await run(answer_anyhow, run.question, conclusions or facts)).strip()
    run.note(inferences=len(conclusions))
    cited = [Citation(id=given[place].id or given[place].title, text=given[place].text) for place in used]
    return Answer(text=answer, citations=cited, data={"conclusions": conclusions})
