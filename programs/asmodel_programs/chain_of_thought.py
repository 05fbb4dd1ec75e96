"""Chain of thought: one prompt, in which worked examples have the model think before it answers. A control.

Source: Wei, Wang, Schuurmans, Bosma, Ichter, Xia, Chi, Le, Zhou, "Chain-of-Thought Prompting Elicits Reasoning in Large
Language Models", arXiv 2201.11903 (2022). Without `think` the examples answer at once, which is its own control there.
"""

import re

from pydantic import BaseModel, Field

from asmodel import Answer, Run, program, step

EXAMPLES = """Question: Could a camel cross a desert in three days without water?
Answer: A camel can go a week without drinking, which is longer than three days. So the answer is yes.

Question: Can a harbour seal sleep under water for eight hours without surfacing?
Answer: A harbour seal has to come up to breathe after about five minutes. So the answer is no.

Question: What do the animals that a shepherd looks after give for clothing?
Answer: A shepherd looks after sheep, and sheep give wool. So the answer is wool."""


class Params(BaseModel):
    think: bool = Field(default=True, description="Whether the examples think before they answer.")


def after_thinking(text: str) -> tuple[str, str]:
    """The thoughts, and the answer: what follows the last “the answer is”, or the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("The reply is empty; it should end with “So the answer is …”.")
    found = re.search(r"(?s:.*)\banswer\b[^.?!\n]{0,60}?\bis[:\s]*(\S[^\n]*)", text, re.IGNORECASE)
    return text.strip(), (found[1] if found else lines[-1]).strip().rstrip(".")


@step(model="writer", temperature=0, max_tokens=200, stop="\n", returns=after_thinking)
def thought_and_answer(question: str, think: bool) -> str:
    examples = EXAMPLES if think else re.sub(r"(?<=Answer: ).*So the answer is (.*)\.", r"\1", EXAMPLES)
    return f"{examples}\n\nQuestion: {question}\nAnswer:"


@program("chain-of-thought", params=Params)
async def chain_of_thought(run: Run[Params]) -> Answer:
    """Think step by step in one prompt, after three examples, and answer."""
    thoughts, answer = await run(thought_and_answer, run.question, run.params.think)
    return Answer(text=answer, data={"thoughts": thoughts})
