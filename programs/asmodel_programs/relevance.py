"""Is this paragraph relevant to the question? Asked outright, after examples: the attempt that the likelihood replaced.

Source: Schlag et al., "Large Language Model Programs", arXiv 2305.05364 (2023), Table 1: the best of four models was
right in 61.6 % of 300 balanced pairs. With `think` it says why before it says yes or no.
"""

import re

from pydantic import BaseModel, Field

from asmodel import Answer, Run, program, step

EXAMPLES = """Paragraph: Camel: A camel stores fat in its humps and can go a week without drinking.
Question: Could a camel cross a desert in three days without water?
Relevant: It says how long a camel lasts without water, so yes.

Paragraph: Lighthouse: A lighthouse warns ships of rocks by a strong light.
Question: Can a harbour seal sleep under water for eight hours without surfacing?
Relevant: It says nothing about seals or about breathing, so no.

Paragraph: Harbour seal: Harbour seals dive for about five minutes and then come up to breathe.
Question: Can a harbour seal sleep under water for eight hours without surfacing?
Relevant: It says how long a seal stays under water, so yes.

Paragraph: Wool: Wool is spun into yarn and woven into cloth.
Question: Could a camel cross a desert in three days without water?
Relevant: It says nothing about camels or about water, so no."""


class Params(BaseModel):
    paragraph: str = Field(min_length=1, description="The paragraph.")
    think: bool = Field(default=False, description="Whether the examples say why before they say yes or no.")


def yes_or_no(text: str) -> str:
    """The last yes or no of the text."""
    found = re.findall(r"\b(yes|no)\b", text.lower())
    if not found:
        raise ValueError("The reply should say yes or no.")
    return str(found[-1])


@step(model="judge", temperature=0, max_tokens=64, stop="\n", returns=yes_or_no)
def relevant(paragraph: str, question: str, think: bool) -> str:
    examples = EXAMPLES if think else re.sub(r"(?<=Relevant: ).*so (yes|no)\.", r"\1", EXAMPLES)
    return f"{examples}\n\nParagraph: {paragraph}\nQuestion: {question}\nRelevant:"


@program("relevance", params=Params)
async def relevance(run: Run[Params]) -> Answer:
    """Say yes or no: does the paragraph help to answer the question?"""
    return Answer(text=await run(relevant, run.params.paragraph, run.question, run.params.think))
