"""One step: the whole conversation, as it came. What a model is without a program, and the control for all."""

from collections.abc import Sequence

from asmodel import Message, Run, program, step


@step(model="writer")
def conversation(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


@program("plain", supports=["tools", "response_format", "logprobs", "images", "audio"])
async def plain(run: Run) -> str:
    """Pass the conversation on, with every parameter, and the answer back."""
    return await run.reply(conversation, run.messages)
