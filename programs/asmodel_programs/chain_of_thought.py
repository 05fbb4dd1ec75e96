"""Chain of thought: one prompt, in which worked examples have the model think before it answers. A control.

Source: Wei, Wang, Schuurmans, Bosma, Ichter, Xia, Chi, Le, Zhou, "Chain-of-Thought Prompting Elicits Reasoning in Large
Language Models", arXiv 2201.11903 (2022). Without `think` the examples answer at once, which is its own control there.
"""

import re

from pydantic import BaseModel, Field

from asmodel import Answer, Run, program, step, thoughts_and_answer

EXAMPLES = """Question: Could a camel cross a desert in three days without water?
Answer: A camel can go a week without drinking, which is longer than three days. So the answer is yes.

Question: Can a harbour seal sleep under water for eight hours without surfacing?
Answer: A harbour seal has to come up to breathe after about five minutes. So the answer is no.

Question: What do the animals that a shepherd looks after give for clothing?
Answer: A shepherd looks after sheep, and sheep give wool. So the answer is wool."""


class Params(BaseModel):
    think: bool = Field(default=True, description="Whether the examples think before they answer.")


@step(model="writer", temperature=0, max_tokens=200, stop="\n", returns=thoughts_and_answer)
def thought_and_answer(question: str, think: bool) -> str:
    examples = EXAMPLES if think else re.sub(r"(?<=Answer: ).*So the answer is (.*)\.", r"\1", EXAMPLES)
    return f"{examples}\n\nQuestion: {question}\nAnswer:"


@program("chain-of-thought", params=Params)
async def chain_of_thought(run: Run[Params]) -> Answer:
    """Think step by step in one prompt, after three examples, and answer."""
    thoughts, answer = await run(thought_and_answer, run.question, run.params.think)
    return Answer(text=answer, data={"thoughts": thoughts})
