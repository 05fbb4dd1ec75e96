"""One conversation, streamed, with a tool call, by a framework as its users write it; prints what they would see.

    python frameworks.py FRAMEWORK BASE_URL MODEL QUESTION

One line of JSON comes out: the text, how many pieces it came in, and what the tool was called with. The `llm` command
is asked as a command. Nothing here knows of asmodel: only the base URL differs from what one would write for OpenAI.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLED: list[str] = []


def weather(city: str) -> str:
    """The weather in a city."""
    CALLED.append(city)
    return f"21 degrees in {city}"


def langchain(base_url: str, model: str, question: str) -> list[str]:
    from langchain.agents import create_agent
    from langchain.messages import AIMessageChunk
    from langchain.tools import tool
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=base_url, api_key="unused", model=model, max_retries=0)
    agent = create_agent(chat, tools=[tool(weather)])
    pieces: list[str] = []
    asked = {"messages": [{"role": "user", "content": question}]}
    for chunk, _ in agent.stream(asked, stream_mode="messages"):
        if isinstance(chunk, AIMessageChunk) and isinstance(chunk.content, str) and chunk.content:
            pieces.append(chunk.content)
    return pieces


def pydantic_ai(base_url: str, model: str, question: str) -> list[str]:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=base_url, api_key="unused")
    agent = Agent(OpenAIChatModel(model, provider=provider), tools=[weather])

    async def ask() -> list[str]:
        async with agent.run_stream(question) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    return asyncio.run(ask())


def openai_agents(base_url: str, model: str, question: str) -> list[str]:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0)
    agent = Agent(
        name="Weatherman",
        tools=[function_tool(weather)],
        model=OpenAIChatCompletionsModel(model=model, openai_client=client),
    )

    async def ask() -> list[str]:
        pieces: list[str] = []
        result = Runner.run_streamed(agent, question)
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                pieces.append(event.data.delta)
        return pieces

    return asyncio.run(ask())


def litellm(base_url: str, model: str, question: str) -> list[str]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as sdk

    messages: list[Any] = [{"role": "user", "content": question}]
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    while True:
        chunks = [
            *sdk.completion(
                model=f"openai/{model}",
                base_url=base_url,
                api_key="unused",
                messages=messages,
                tools=tools,
                stream=True,
                num_retries=0,
            )
        ]
        message = sdk.stream_chunk_builder(chunks, messages=messages).choices[0].message
        if not message.tool_calls:
            return [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            told = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": told})


TOOL = '''
def weather(city: str) -> str:
    """The weather in a city."""
    return f"21 degrees in {city}"
'''


def llm(base_url: str, model: str, question: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        named = [{"model_id": "mine", "model_name": model, "api_base": base_url, "supports_tools": True}]
        # JSON is YAML.
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps(named))
        Path(folder, "tool.py").write_text(TOOL)
        command = [str(Path(sys.executable).with_name("llm")), "-m", "mine", "--functions", f"{folder}/tool.py"]
        process = subprocess.Popen(
            [*command, "--tools-debug", question],
            env={**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "unused"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said, told = process.communicate(timeout=100)
        if process.returncode:
            raise RuntimeError(told)
        if "21 degrees in" in told:
            CALLED.append(told.split("21 degrees in", 1)[1].split()[0])
        # The command does not say in how many pieces it came.
        return [said[:1], said[1:].rstrip("\n")]


FRAMEWORKS: dict[str, Callable[[str, str, str], list[str]]] = {
    "langchain": langchain,
    "pydantic-ai": pydantic_ai,
    "openai-agents": openai_agents,
    "litellm": litellm,
    "llm": llm,
}


def main() -> None:
    name, base_url, model, question = sys.argv[1:]
    pieces = FRAMEWORKS[name](base_url, model, question)
    print(json.dumps({"text": "".join(pieces), "pieces": len(pieces), "called": CALLED}))


if __name__ == "__main__":
    main()
