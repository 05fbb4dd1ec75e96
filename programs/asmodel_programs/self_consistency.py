"""Self-consistency: several sampled chains of thought, and the answer that most of them end in.

Source: Wang, Wei, Schuurmans, Le, Chi, Narang, Chowdhery, Zhou, "Self-Consistency Improves Chain of Thought Reasoning
in Language Models", arXiv 2203.11171 (2022). As there, the reasoning paths are marginalised out by a plain majority.
"""

import re
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, Field

from asmodel import Answer, Message, Run, gather, program, step

ASK = (
    "Think it through step by step. Then give the final answer, as short as it can be, on a last line of its own that "
    "begins with 'Answer:'."
)


class Params(BaseModel):
    samples: int = Field(default=5, ge=1, le=64, description="How many chains of thought are drawn.")
    temperature: float = Field(default=0.7, gt=0, le=2, description="How much they differ.")


def final_answer(text: str) -> str:
    """What stands after the last 'Answer:', or else the last line that is not empty."""
    found = re.findall(r"answer\s*(?:is)?\s*:\s*(.+)", text, re.IGNORECASE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not found and not lines:
        raise ValueError("The reply is empty; it should end with a line that begins with 'Answer:'.")
    return (found or lines)[-1].strip().strip("*").strip()


def normalised(answer: str) -> str:
    """Answers that differ only in case, articles, commas in numbers and punctuation are one answer."""
    words = re.sub(r"(?<=\d),(?=\d{3})", "", answer.lower())
    words = re.sub(r"\.0+\b|[^\w\s.%-]|\.(?!\d)", "", words)
    kept = [word for word in words.split() if word not in ("a", "an", "the")]
    return " ".join(kept or words.split())  # "A" may be the answer


@step(model="writer", returns=final_answer)
def thought(messages: Sequence[Message]) -> Sequence[Message]:
    return [*messages[:-1], Message(messages[-1].role, f"{messages[-1].text}\n\n{ASK}")]


@program("self-consistency", params=Params)
async def self_consistency(run: Run[Params]) -> Answer:
    """Draw several chains of thought and return the answer that most of them agree on."""
    draw = thought.using(temperature=run.params.temperature)
    with run.part("votes", of=run.params.samples):
        answers = await gather(run(draw, run.messages) for _ in range(run.params.samples))
    tally = Counter(map(normalised, answers))
    winner, _ = tally.most_common(1)[0]
    run.note(tally=[votes for _, votes in tally.most_common()])
    text = next(answer for answer in answers if normalised(answer) == winner)
    return Answer(text=text, data={"tally": dict(tally.most_common())})
