"""Self-consistency: several sampled chains of thought, and the answer that most of them end in.

Source: Wang, Wei, Schuurmans, Le, Chi, Narang, Chowdhery, Zhou, "Self-Consistency Improves Chain of Thought Reasoning
in Language Models", arXiv 2203.11171 (2022). As there, the reasoning paths are marginalised out by a plain majority.
Where the client offers tools, a sample may call some, and those that make the same calls agree. Where it asks for JSON,
each sample is that JSON (and thinks first only if the schema has a place for it), and those of equal values agree. A
sample that cannot be read is no vote.
"""

import re
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, Field

from asmodel import Answer, Message, Reply, Run, StepError, canonical_json, gather, program, step

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


def vote(reply: Reply, *, as_json: bool) -> str:
    """What is counted; an answer that is text has no brackets in it, so it is never taken for anything else."""
    if reply.refusal is not None:
        return "(refused)"
    if reply.tool_calls:
        return ", ".join(sorted(f"{c.name}({canonical_json(c.arguments or '{}')})" for c in reply.tool_calls))
    return canonical_json(reply.text) if as_json else normalised(final_answer(reply.text))


@step(model="writer")
def sample(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


@step(model="writer", returns=final_answer)
def thought(messages: Sequence[Message]) -> Sequence[Message]:
    # The question; after it there may be calls and their results.
    role = "user" if messages[-1].role == "tool" else messages[-1].role
    place = max((i for i, message in enumerate(messages) if message.role == role), default=0)
    asked = messages[place]
    if isinstance(asked.content, str | None) or all(part.get("type") == "text" for part in asked.content):
        question = Message(asked.role, f"{asked.text}\n\n{ASK}")
    else:
        question = Message(asked.role, [*asked.content, {"type": "text", "text": ASK}])
    return [*messages[:place], question, *messages[place + 1 :]]


@program("self-consistency", params=Params, supports=["tools", "response_format", "images", "audio"])
async def self_consistency(run: Run[Params]) -> Answer:
    """Draw several chains of thought and return the answer that most of them agree on."""
    draw = (sample if run.wants_json else thought).using(temperature=run.params.temperature)

    async def drawn() -> Reply | StepError:
        try:
            return await run.draft(draw, run.messages)
        except StepError as error:
            return error

    with run.part("votes", of=run.params.samples):
        replies = await gather(drawn() for _ in range(run.params.samples))
    drafts = [reply for reply in replies if isinstance(reply, Reply)]
    spoilt = [reply for reply in replies if isinstance(reply, StepError)]
    if not drafts:
        raise spoilt[0]
    votes = [vote(draft, as_json=run.wants_json) for draft in drafts]
    tally = Counter(votes).most_common()  # of as many votes, the first comes first
    run.note(tally=[count for _, count in tally], spoilt=len(spoilt))
    chosen = drafts[votes.index(tally[0][0])]
    as_it_came = run.wants_json or chosen.tool_calls or chosen.refusal is not None
    text = await run.reply(chosen) if as_it_came else final_answer(chosen.text)
    return Answer(text=text, data={"tally": dict(tally)})
