"""A program with an effect, run once over a disk cache; as a process of its own, which can be told to die on the way.

    python -m tests.effecting FOLDER KEY KIND DIES

KIND is `plain` or `keyed`, DIES one of `never`, `before`, `after` (the effect itself) or `later` (at the step that
follows it). Each effect adds a line to FOLDER/world, each purchase one to FOLDER/bought; the answer is printed, or the
error's code.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from asmodel import Message, Run, program, step, tool
from asmodel.calls import Call
from asmodel.effects import Journal
from asmodel.errors import AsmodelError
from asmodel.models import Models, ServedProgram
from asmodel.programs import Program
from asmodel.protocols import Cache
from asmodel.run import Request, execute
from asmodel.testing import FunctionUpstream
from asmodel.upstreams import Cached
from asmodel_plugins.disk_cache import DiskCache


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def made(folder: Path, kind: str, dies: str) -> tuple[Program[Any, Any], FunctionUpstream]:
    def note(file: str, line: str) -> None:
        with (folder / file).open("a") as written:
            written.write(line + "\n")

    def act(text: str, key: str) -> dict[str, str]:
        if dies == "before":
            die()
        note("world", f"{text} {key}".strip())
        if dies == "after":
            die()
        return {"sent": text}

    @tool(effect=True)
    def send(text: str) -> dict[str, str]:
        return act(text, "")

    @tool(effect=True)
    async def send_keyed(text: str, idempotency_key: str = "") -> dict[str, str]:
        return act(text, idempotency_key)

    @step
    def letter(question: str) -> str:
        return f"Write about {question}."

    @step
    def report(sent: str, when: str) -> str:
        return f"Say that {sent} was sent at {when}."

    @program("mailer")
    async def mailer(run: Run) -> str:
        text = await run(letter, run.question)
        sent = await run(send_keyed, text) if kind == "keyed" else await run(send, text)
        return await run.reply(report, sent["sent"], run.now.isoformat())

    def answer(call: Call) -> str:
        shown = getattr(call, "messages")[0].text  # noqa: B009  # of any kind of call
        if dies == "later" and shown.startswith("Say"):
            die()
        note("bought", shown)
        return f"<{shown}>"

    return mailer, FunctionUpstream(answer, name="up")


async def ask(
    asked: Program[Any, Any], upstream: FunctionUpstream, store: Cache, journals: Cache, key: str, question: str = "q"
) -> Any:
    """What the service does for a request that has an Idempotency-Key."""
    models = Models([asked], {"default": Cached(upstream, store)}, store=store)
    served = models.find(asked.name)
    assert isinstance(served, ServedProgram)
    journal = await Journal.begun(journals, scope="", program=asked.name, identity=key)
    run: Run[Any] = Run(
        asked,
        Request(messages=(Message("user", question),)),
        id="run",
        cast=models.cast(served),
        params=None,
        store=store,
        journal=journal,
    )
    return await execute(run)


async def main(folder: Path, key: str, kind: str, dies: str) -> None:
    store, journals = DiskCache(folder / "cache"), DiskCache(folder / "cache" / "effects")
    await store.open()
    await journals.open()
    try:
        print(await ask(*made(folder, kind, dies), store, journals, key))
    except AsmodelError as error:
        print(error.code)
    finally:
        await journals.close()
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
