"""Answer a question from the paragraphs that come with it, showing the model only those that matter.

Source: Schlag, Sukhbaatar, Celikyilmaz, Yih, Weston, Schmidhuber, Li, "Large Language Model Programs", arXiv 2305.05364
(2023), Algorithm 1: paragraphs are ranked by how likely they make the question, since a model can measure that and can
hardly be asked it (Table 1 there). No instruction, no examples, no calibration. The answer is then read from the best.
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field

from asmodel import Answer, Citation, Document, InvalidRequest, Run, gather, program, score, step


class EvidenceParams(BaseModel):
    paragraphs: list[str] = Field(default=[], description="The paragraphs; or send documents with the conversation.")
    keep: int = Field(default=1, ge=1, description="How many of the best paragraphs the answer is read from.")


@score(model="scorer")
def question_given(paragraph: str, question: str) -> tuple[str, str]:
    return f"{paragraph}\n\nQ:", f" {question}"  # shown, then measured


@step(model="writer", temperature=0, max_tokens=40, stop="\n")
def answer_from(evidence: Sequence[str], question: str) -> str:
    passages = "\n\n".join(evidence)
    return f"{passages}\n\nUsing the passage above, answer in a few words.\nQuestion: {question}"


async def most_likely(run: Run[EvidenceParams], paragraphs: Sequence[str], keep: int) -> list[int]:
    """Algorithm 1: the `keep` paragraphs with the least average negative log-likelihood of the question, by place."""
    with run.part("filter", of=len(paragraphs)):
        likelihoods = await gather(run(question_given, paragraph, run.question) for paragraph in paragraphs)
    return sorted(range(len(paragraphs)), key=lambda i: -likelihoods[i].mean)[:keep]


@program("evidence-qa", params=EvidenceParams)
async def evidence_qa(run: Run[EvidenceParams]) -> Answer:
    """Answer from the paragraphs that make the question most likely, and cite them."""
    documents = [Document(text=text, id=str(n)) for n, text in enumerate(run.params.paragraphs, 1)]
    documents += run.documents
    if not documents or not run.question:
        raise InvalidRequest(
            'program "evidence-qa" wants a question, and paragraphs to answer it from: '
            '"asmodel": {"params": {"paragraphs": ["…", "…"]}}, or "documents": [{"text": "…"}]',
            param="asmodel.params.paragraphs",
        )
    best = await most_likely(run, [d.text for d in documents], run.params.keep)
    evidence = [documents[i] for i in best]
    text = await run.reply(answer_from, [d.text for d in evidence], run.question)
    cited = [Citation(id=d.id or d.title or str(i + 1), text=d.text) for i, d in zip(best, evidence, strict=True)]
    return Answer(text=text, citations=cited)
