"""A process that has answered twenty thousand requests holds no more than one that has answered eight thousand."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from asmodel.app import create_app
from asmodel.calls import Call, Capabilities, Chat, Delta, Reply, Terms, Usage
from asmodel.errors import UpstreamUnavailable
from asmodel.settings import Settings

PROGRAMS = '''
from asmodel import Run, gather, program, step


@step
def ask(question: str, number: int) -> str:
    return f"{question} {number}"


@program("few", supports=["response_format"])
async def few(run: Run[None]) -> str:
    """Two steps side by side, one whose name is made up, and the answer."""
    await gather(run(ask, run.question, number) for number in range(2))
    await run(step(name=f"made up for {run.question}"[:60], shared_prefix=True)(ask.show), run.question * 300, 0)
    return await run.reply(ask, run.question, 9)
'''


class Echo:
    """An upstream that costs little."""

    priced = False

    def __init__(self, *, name: str, connect_timeout: float) -> None:
        self.name = name
        self.identity = "echo"

    async def capabilities(self) -> Capabilities:
        return Capabilities(schema=True)

    async def send(self, call: Call, terms: Terms) -> Reply:
        assert isinstance(call, Chat)
        await asyncio.sleep(0)
        if call.messages[-1].text.startswith("fail"):
            raise UpstreamUnavailable("down")
        text = '{"a": 1}' if "response_format" in call.params else "yes"
        if terms.emit is not None:
            await terms.emit(Delta(text=text))
        return Reply(text=text, usage=Usage(prompt_tokens=1, completion_tokens=1))


class Client:
    """Asks an application in this process."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.statuses: Counter[int] = Counter()

    async def ask(self, body: bytes, *, path: str = "/v1/chat/completions", leaves: bool = False, **more: str) -> None:
        asked = False
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await gone.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            if leaves:
                gone.set()

        headers = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(body)), **more}
        scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 1),
            "state": {},
        }
        await self._app(scope, receive, send)


def body(text: str, model: str = "few", **more: object) -> bytes:
    return orjson.dumps({"model": model, "messages": [{"role": "user", "content": text}], **more})


def shape(n: int) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, f"b{n}": {"type": "string"}}}
    return {"type": "json_schema", "json_schema": {"name": f"shape{n}", "schema": schema}}


async def one(client: Client, n: int) -> None:
    """Each kind of request there is, and no two alike."""
    match n % 10:
        case 0:
            await client.ask(body(f"program {n}"))
        case 1:
            await client.ask(body(f"program {n}", stream=True))
        case 2:
            await client.ask(body(f"again {n % 50}"))
        case 3:
            await client.ask(body(f"passed {n}", "default"), x_request_id=f"request-{n}")
        case 4:
            await client.ask(
                body(f"passed {n}", "default", stream=True), traceparent=f"00-{n + 1:032x}-{n + 1:016x}-01"
            )
        case 5:
            await client.ask(body(f"nobody {n}", f"nobody-{n}"), path="/v1/chat/completions" if n % 20 else f"/v1/{n}")
        case 6:
            await client.ask(body(f"named {n}"), idempotency_key=f"key {n}")
        case 7:
            await client.ask(body(f"left {n}", stream=True), leaves=True)
        case 8:
            await client.ask(body(f"fail {n}", "default"), user_agent=f"agent {n}")
        case _:
            if n % 40 == 9:
                await client.ask(body(f"shape {n}", response_format=shape(n)))
            else:
                await client.ask(body(f"role {n}", asmodel={"roles": {"default": f"nobody-{n}"}}))


@asynccontextmanager
async def alive(app: Any) -> AsyncGenerator[None]:
    """The application between its start and its end, as a server would have it."""
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
    life = asyncio.ensure_future(app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, told.get, said.put))
    await told.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    yield
    await told.put({"type": "lifespan.shutdown"})
    assert (await said.get())["type"] == "lifespan.shutdown.complete"
    await life


async def held(client: Client, numbers: itertools.count[int], count: int) -> int:
    """Blocks of memory that are held once so many more requests are answered and nothing is under way."""
    left = iter(range(count))

    async def ask() -> None:
        for _ in left:
            await one(client, next(numbers))

    await asyncio.gather(*(ask() for _ in range(16)))
    # What is kept for a while is forgotten, and what is being written is written.
    await asyncio.sleep(1.0)
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.timeout(170)
async def test_nothing_grows_with_the_number_of_requests(tmp_path: Path) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "few.py").write_text(PROGRAMS)
    settings = Settings(
        program_folders=[tmp_path / "programs"],
        upstreams={"default": {"kind": f"{__name__}:Echo", "retries": 0}},  # type: ignore[dict-item]
        cache={"kind": "memory", "options": {"size_limit": 1_000_000}},  # type: ignore[arg-type]
        idempotency={"keep_seconds": 0.1, "grace_seconds": 0},  # type: ignore[arg-type]
    )
    app = create_app(settings)
    client = Client(app)
    numbers = itertools.count()
    async with alive(app):
        sizes = [
            await held(client, numbers, 8_000),
            await held(client, numbers, 6_000),
            await held(client, numbers, 6_000),
        ]
    print([f"{size:,}" for size in sizes], client.statuses)
    assert client.statuses[200] > 10_000
    assert client.statuses[404] > 1_500
    assert client.statuses[400] > 1_000
    # A block a request would be 6,000; what is left is chance, and tables that have grown to a power of two.
    assert sizes[2] - sizes[1] < 600
