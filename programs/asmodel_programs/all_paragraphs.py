"""All paragraphs in one prompt, and the question after them: what a long context is for. A control.

Source: the one that Schlag et al., "Large Language Model Programs", arXiv 2305.05364 (2023) do without: it tells what
their program adds to merely having the evidence. With `think` the examples think before they answer (arXiv 2201.11903).
"""

import re

from pydantic import BaseModel, Field

from asmodel import Answer, Citation, Document, InvalidRequest, Run, program, step, thoughts_and_answer

EXAMPLES = """Question: Could a camel cross a desert in three days without water?
Answer: A camel can go a week without drinking, which is longer than three days. So the answer is yes.

Question: Can a harbour seal sleep under water for eight hours without surfacing?
Answer: A harbour seal has to come up to breathe after about five minutes. So the answer is no.

Question: What do the animals that a shepherd looks after give for clothing?
Answer: A shepherd looks after sheep, and sheep give wool. So the answer is wool."""


class Params(BaseModel):
    paragraphs: list[str] = Field(default=[], description="The paragraphs; or send documents with the conversation.")
    think: bool = Field(default=False, description="Whether the examples think before they answer.")


@step(model="writer", temperature=0, max_tokens=200, stop="\n", returns=thoughts_and_answer)
def answer_among(paragraphs: list[str], question: str, think: bool) -> str:
    examples = EXAMPLES if think else re.sub(r"(?<=Answer: ).*So the answer is (.*)\.", r"\1", EXAMPLES)
    passages = "\n\n".join(paragraphs)
    return f"{examples}\n\nAnswer the next question from these passages.\n\n{passages}\n\nQuestion: {question}\nAnswer:"


@program("all-paragraphs", params=Params)
async def all_paragraphs(run: Run[Params]) -> Answer:
    """Answer from all paragraphs at once, in one prompt."""
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(run.params.paragraphs, 1)]
    documents += run.documents
    if not documents or not run.question:
        raise InvalidRequest(
            'program "all-paragraphs" wants a question, and paragraphs to answer it from: '
            '"asmodel": {"params": {"paragraphs": ["…", "…"]}}, or "documents": [{"text": "…"}]',
            param="asmodel.params.paragraphs",
        )
    thoughts, answer = await run(answer_among, [d.text for d in documents], run.question, run.params.think)
    shown = [Citation(id=d.id or d.title or str(n), text=d.text) for n, d in enumerate(documents, 1)]
    return Answer(text=answer, citations=shown, data={"thoughts": thoughts})
