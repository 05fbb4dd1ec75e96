"""The facts that settle the question, handed to the model with it: the best that evidence could do. A control.

Source: Schlag et al., "Large Language Model Programs", arXiv 2305.05364 (2023), Table 2: “golden facts in context”, and
with `think` “golden facts + CoT”. Of use only where the facts are known, as they are in a benchmark.
"""

import re

from pydantic import BaseModel, Field

from asmodel import Answer, Run, program, step, thoughts_and_answer

EXAMPLES = """Facts: A camel can go a week without drinking.
Question: Could a camel cross a desert in three days without water?
Answer: A week is longer than three days. So the answer is yes.

Facts: A harbour seal comes up to breathe after about five minutes. Eight hours are longer than five minutes.
Question: Can a harbour seal sleep under water for eight hours without surfacing?
Answer: It has to breathe long before eight hours are over. So the answer is no.

Facts: A shepherd looks after sheep. Sheep give wool.
Question: What do the animals that a shepherd looks after give for clothing?
Answer: They are sheep, which give wool. So the answer is wool."""


class Params(BaseModel):
    facts: list[str] = Field(min_length=1, description="The facts, one a text.")
    think: bool = Field(default=False, description="Whether the examples think before they answer.")


@step(model="writer", temperature=0, max_tokens=200, stop="\n", returns=thoughts_and_answer)
def answer_by(facts: list[str], question: str, think: bool) -> str:
    examples = EXAMPLES if think else re.sub(r"(?<=Answer: ).*So the answer is (.*)\.", r"\1", EXAMPLES)
    return f"{examples}\n\nFacts: {' '.join(facts)}\nQuestion: {question}\nAnswer:"


@program("golden-facts", params=Params)
async def golden_facts(run: Run[Params]) -> Answer:
    """Answer from the facts that are given, in one prompt."""
    thoughts, answer = await run(answer_by, run.params.facts, run.question, run.params.think)
    return Answer(text=answer, data={"thoughts": thoughts})
