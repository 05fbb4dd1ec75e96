"""The books of a mixed run of 64 clients: upstream, spans, local file, receipts, log and metrics tell one story."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import re
import secrets
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from tests.collecting import Sink
from tests.e2e.test_jaeger import OUTAGES, UNDELIVERED, exporting
from tests.serving import Answered, Server, eventually, serving, upstream

from asmodel import trace_reader, trace_time
from asmodel.testing import Fault, Received, ScriptedServer, ServerAnswer, ToyModel

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

T = TypeVar("T")

CLIENTS = 64

PROGRAMS = '''
"""Programs inside programs, and programs that spend."""

from collections.abc import Sequence

from pydantic import BaseModel

from asmodel import Message, Reply, Run, gather, program, step, tool


class Count(BaseModel):
    count: int


@tool
def shelf(thing: str) -> str:
    """Where a thing is kept."""
    return f"on the shelf of {thing}"


@step(model="writer", returns=Count)
def count(question: str, thing: str) -> str:
    return f"{question} How many {thing}?"


@step(model="writer", tools=[shelf], returns=Reply)
def looking(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


@step(model="writer")
def summary(question: str, found: Sequence[str]) -> str:
    return f"{question} Found: {', '.join(found)}."


@step(model="writer", temperature=0)
def one_more(question: str, place: int) -> str:
    return f"{question} Number {place}."


@program("leaf")
async def leaf(run: Run) -> str:
    return str((await run(count, run.question, "apples")).count)


@program("branch")
async def branch(run: Run) -> str:
    asked = await run(looking, run.messages)
    told = [(await run.call(call)).text for call in asked.tool_calls]
    told += await gather(run(leaf, f"{run.question} On branch {n}.") for n in range(2))
    return ", ".join(told)


@program("trunk")
async def trunk(run: Run) -> str:
    with run.part("branches", of=2):
        found = await gather(run(branch, f"{run.question} Bough {n}.") for n in range(2))
    return await run.reply(summary, run.question, found)


@program("thrifty")
async def thrifty(run: Run) -> str:
    said = ""
    for place in range(4):
        said = await run(one_more, run.question, place)
        run.best(said)
    return said


@program("spender")
async def spender(run: Run) -> str:
    return " ".join([await run(one_more, run.question, place) for place in range(4)])


@program("hasty")
async def hasty(run: Run) -> str:
    return " ".join(await gather(run(one_more, run.question, place) for place in range(4)))


@program("shared")
async def shared(run: Run) -> str:
    return await run.reply(one_more, run.question, 0)
'''

# A token in costs 1/64 of a dollar and one out 1/32: no sum of these is ever rounded, in a log line of six places
# neither, so that what ought to be equal can be asked to be.
PRICE = "price = { input = 15625, output = 31250 }"
IN, OUT = 1 / 64, 1 / 32

SETTINGS = """
[upstreams.default]
base_url = "{base}"
model = "scripted"
{price}
[upstreams.unpriced]
base_url = "{base}"
model = "unpriced"
[upstreams.narrow]
base_url = "{base}"
model = "narrow"
concurrency = 1
{price}
[upstreams.patient]
base_url = "{base}"
model = "patient"
{price}
[upstreams.first]
base_url = "{base}"
model = "first"
retries = 0
equals = ["second"]
{price}
[upstreams.second]
base_url = "{base}"
model = "second"
{price}
[log]
format = "json"
"""

MARK = re.compile(r"\[order (\d+)\]")
ROUTE = "/v1/chat/completions"
PARAGRAPHS = ["Twelve apples are in the basket.", "A pear is green.", "It rains on Tuesdays."]


# ---- the upstream, which keeps books of its own ----


@dataclass
class Sold:
    """What the answers to one order came to, as the upstream counts it."""

    input: int = 0
    output: int = 0


Doing = Fault | float | str | None
"""How the upstream takes one request of an order: what goes wrong, seconds that it takes, a text, or nothing special."""


class Shop:
    """The upstream: knows an order by its mark, and writes down what it has sold to whom."""

    def __init__(self) -> None:
        self.sold: dict[int, Sold] = defaultdict(Sold)
        self.server = ScriptedServer(self._answer, token_delay=0.002)
        self._orders = 0
        self._plans: dict[int, list[Doing]] = {}
        self._answers = 0
        self._lock = threading.Lock()
        self.held: dict[int, threading.Event] = {}
        """Orders that are not answered before the event."""

    def order(self, *doings: Doing, held: bool = False) -> tuple[int, str]:
        """A new mark, and the question that bears it; its first requests are taken so, the others as usual."""
        with self._lock:
            self._orders += 1
            self._plans[self._orders] = list(doings)
            if held:
                self.held[self._orders] = threading.Event()
            return self._orders, f"[order {self._orders}] How many apples are there?"

    def requests(self) -> dict[int, list[Received]]:
        """What came in, by order; what bears no mark is asmodel's own trial of what the server can do."""
        found: dict[int, list[Received]] = defaultdict(list)
        for request in self.server.requests:
            mark = _mark(request.body)
            if mark is not None:
                found[mark].append(request)
        return found

    def seen(self, mark: int) -> int:
        return len(self.requests()[mark])

    async def _answer(self, body: dict[str, Any]) -> ServerAnswer:
        mark = _mark(body)
        if mark is None:
            return None
        with self._lock:
            plan = self._plans[mark]
            doing = plan.pop(0) if plan else None
            self._answers += 1
            number = self._answers
        held = self.held.get(mark)
        while held is not None and not held.is_set():
            await asyncio.sleep(0.01)
        if isinstance(doing, Fault):
            return doing
        if isinstance(doing, float):
            await asyncio.sleep(doing)
        whole = _whole(body, number, doing if isinstance(doing, str) else None)
        with self._lock:
            sold = self.sold[mark]
            sold.input += whole["usage"]["prompt_tokens"]
            sold.output += whole["usage"]["completion_tokens"]
        return whole

    def scored(self) -> None:
        """Enter the measurements of given text, which the scripted server makes without asking anybody."""
        for mark, requests in self.requests().items():
            for request in requests:
                if request.body.get("echo"):
                    self.sold[mark].input += len(ToyModel.tokens(request.body["prompt"]))
                    assert request.body["max_tokens"] == 0


def _mark(body: Mapping[str, Any]) -> int | None:
    found = MARK.search(json.dumps([body.get("messages"), body.get("prompt")]))
    return None if found is None else int(found[1])


def _whole(body: Mapping[str, Any], number: int, text: str | None) -> dict[str, Any]:
    """An answer of which no two have the same usage."""
    messages = cast("list[dict[str, Any]]", body.get("messages", []))
    finish = "stop"
    message: dict[str, Any] = {"role": "assistant", "content": text or f"Answer: {number % 3}"}
    if text is None and body.get("response_format"):
        message["content"] = json.dumps({"count": number})
    if text is None and body.get("tools") and not any(m["role"] == "tool" for m in messages):
        function = {"name": "shelf", "arguments": json.dumps({"thing": "apples"})}
        message |= {"content": None, "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}]}
        finish = "tool_calls"
    asked, said = 100 + 3 * number, 5 + number % 61
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body["model"],
        "choices": [{"index": n, "message": message, "finish_reason": finish} for n in range(body.get("n") or 1)],
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": number % 7},
            "completion_tokens_details": {"reasoning_tokens": number % 5},
        },
    }


# ---- the clients ----


@dataclass
class Asked:
    """One request, and what its client was told."""

    mark: int
    id: str
    model: str
    wants: str
    """The outcome that its line in the log should tell."""
    stream: bool = False
    answered: Answered | None = None
    """None for a client that has left."""
    parent: str = ""
    """The span of its own that the client told of."""


class Clients:
    """Sends requests, and remembers them."""

    def __init__(self, server: Server, shop: Shop) -> None:
        self.server = server
        self.shop = shop
        self.asked: list[Asked] = []
        self._random = random.Random(5)

    def ask(
        self,
        model: str,
        order: tuple[int, str],
        wants: str = "ok",
        *,
        stream: bool = False,
        headers: Mapping[str, str] | None = None,
        leave: Callable[[], object] | None = None,
        **body: Any,
    ) -> Asked:
        mark, question = order
        asked = Asked(mark, f"req-{mark}-{secrets.token_hex(4)}", model, wants, stream)
        sent = {"x-request-id": asked.id, **(headers or {})}
        if self._random.random() < 0.3:
            asked.parent = secrets.token_hex(8)
            sent["traceparent"] = f"00-{secrets.token_hex(16)}-{asked.parent}-01"
        whole: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}], **body}
        if stream:
            whole |= {"stream": True, "stream_options": {"include_usage": True}}
        self.asked.append(asked)
        if leave is None:
            asked.answered = self.server.chat(whole, sent)
        else:
            self._leave(whole, sent, leave)
        return asked

    def _leave(self, body: Mapping[str, Any], headers: Mapping[str, str], when: Callable[[], object]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.request("POST", ROUTE, json.dumps(body), {"content-type": "application/json", **headers})
            if body.get("stream"):
                response = connection.getresponse()
                while b'"content":"' not in (line := response.readline()):
                    assert line, "the stream ended before it began"
            eventually("it is time to leave", when)
        finally:
            connection.close()

    def gauge(self, name: str, **labels: str) -> float:
        return total(metrics(self.server), name, **labels)


def mixed(clients: Clients) -> list[Callable[[], object]]:
    """What the clients do, all at once: each entry is one client's errand."""
    shop, ask = clients.shop, clients.ask
    errands: list[Callable[[], object]] = []

    def add(model: str, order: tuple[int, str] | None = None, wants: str = "ok", **more: Any) -> None:
        placed = order or shop.order()
        errands.append(lambda: ask(model, placed, wants, **more))

    evidence = {"asmodel": {"params": {"paragraphs": PARAGRAPHS}}}
    votes = {"asmodel": {"params": {"samples": 3}}}
    for n in range(24):
        stream = n % 2 == 1
        add("plain", stream=stream)
        add("evidence-qa", stream=stream, **evidence)
        add("self-consistency", stream=stream, **votes)
        add("trunk", stream=stream)
        add("default", stream=stream)
        # As many repeats of one order, at any distance: whoever is not the first has a hit, or joins.
        if n < 12:
            again, votes_again = shop.order(), shop.order(0.2)
            for _ in range(3):
                add("plain", again, stream=stream)
                add("self-consistency", votes_again, stream=stream, **votes)
    for stream in (False, True):
        add("unpriced", stream=stream)
        add("plain:unpriced", stream=stream)
        add("default", stream=stream, n=2)
        add("plain", stream=stream, n=2)
        add("plain", stream=stream, asmodel={"cache": "off"})
        add("default", stream=stream, asmodel={"cache": "on"})
        # Tried again, and then well; tried in vain; not tried again.
        add("plain", shop.order(Fault(status=503)), stream=stream)
        add("default", shop.order(Fault(status=503)), stream=stream)
        add("trunk", shop.order(None, Fault(status=503), None, Fault(status=503)), stream=stream)
        add("evidence-qa", shop.order(Fault(status=429, headers={"retry-after": "1"})), stream=stream, **evidence)
        add("plain", shop.order(*[Fault(status=500)] * 3), "upstream_unavailable", stream=stream)
        add("plain", shop.order(Fault(status=401)), "upstream_auth", stream=stream)
        add("default", shop.order(Fault(status=401)), "upstream_auth", stream=stream)
        add("self-consistency", shop.order(*[Fault(status=400)] * 3), "upstream_rejected", stream=stream, **votes)
        add("first", shop.order(Fault(status=503)), stream=stream)
        add("shared:first", shop.order(Fault(status=503)), stream=stream)
        # Not to be read at first, or at all.
        add("leaf", shop.order("not a count"), stream=stream)
        add("trunk", shop.order(None, None, "not a count", "nor this"), stream=stream)
        add("leaf", shop.order("not a count", "nor this", "nor this"), "step_unreadable", stream=stream)
        # Limits.
        add("thrifty", stream=stream, asmodel={"limits": {"calls": 2}})
        add("thrifty", stream=stream, asmodel={"limits": {"tokens": 250}})
        add("thrifty", stream=stream, asmodel={"limits": {"cost": 5.0}})
        add("spender", None, "limit_exceeded", stream=stream, asmodel={"limits": {"calls": 3}})
        add("hasty", None, "limit_exceeded", stream=stream, asmodel={"limits": {"calls": 2}})
        add("spender", shop.order(0.1, 30.0), "deadline_exceeded", stream=stream, asmodel={"limits": {"seconds": 1.0}})
        add("plain:unpriced", None, "invalid_request", stream=stream, asmodel={"limits": {"cost": 1.0}})
        # The client's own mistakes.
        add("self-consistency", None, "invalid_request", stream=stream, asmodel={"params": {"samples": 0}})
        add("nobody", None, "model_not_found", stream=stream)
        add("trunk", None, "unsupported_parameter", stream=stream, response_format={"type": "json_object"})
        # Clients that leave: before the answer, in the middle of it.
        for model in ("plain", "default", "self-consistency", "trunk"):
            order = shop.order(*[30.0] * 20)
            add(model, order, "left", leave=lambda mark=order[0]: shop.seen(mark))
        long = shop.order(Fault(answer="word " * 5_000))
        add("plain" if stream else "default", long, "left", stream=True, leave=lambda: True)
    for _ in range(4):
        errands += together(clients, shop.order(0.8), 3)
        errands += together(clients, shop.order(0.5), 2, headers={"idempotency-key": secrets.token_hex(8)})
    errands += [
        lambda: leaves_the_queue(clients),
        lambda: leaves_in_a_pause(clients),
        lambda: leaves_to_others(clients),
    ]
    random.Random(5).shuffle(errands)
    return errands


def together(
    clients: Clients, order: tuple[int, str], many: int, headers: Mapping[str, str] | None = None
) -> list[Callable[[], object]]:
    """Equal requests at the same moment."""
    gate = threading.Barrier(many)

    def errand() -> None:
        gate.wait(20)
        clients.ask("plain", order, headers=headers)

    return [errand] * many


def leaves_the_queue(clients: Clients) -> None:
    """A client that leaves while its call waits for its turn: nothing was ever sent."""
    shop = clients.shop
    holder, leaver = shop.order(held=True), shop.order()
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(clients.ask, "shared:narrow", holder)
        eventually("the only slot is taken", lambda: shop.seen(holder[0]))
        depth = "asmodel_upstream_queue_depth"
        clients.ask("shared:narrow", leaver, "left", leave=lambda: clients.gauge(depth, upstream="narrow") == 1)
        eventually("it has left the queue", lambda: clients.gauge(depth, upstream="narrow") == 0)
        shop.held[holder[0]].set()
        holding.result()
    assert shop.seen(leaver[0]) == 0


def leaves_in_a_pause(clients: Clients) -> None:
    """A client that leaves between two attempts."""
    order = clients.shop.order(Fault(status=503, headers={"retry-after": "30"}))
    retries = "asmodel_upstream_retries_total"
    clients.ask("shared:patient", order, "left", leave=lambda: clients.gauge(retries, upstream="patient") == 1)


def leaves_to_others(clients: Clients) -> None:
    """A client that leaves a call that another has joined: it goes on for the other."""
    shop = clients.shop
    order = shop.order(held=True)
    with ThreadPoolExecutor(1) as pool:
        joined: list[Any] = []

        def left_to_another() -> bool:
            if not shop.seen(order[0]):
                return False
            joined.append(pool.submit(clients.ask, "leaf", order))
            time.sleep(0.5)
            return True

        clients.ask("leaf", order, "left", leave=left_to_another)
        time.sleep(0.3)
        shop.held[order[0]].set()
        joined[0].result()


# ---- the books ----


@dataclass(frozen=True)
class Span:
    """A span as it was exported."""

    trace: str
    id: str
    parent: str
    name: str
    kind: str
    began: int
    ended: int
    failed: bool
    attributes: Mapping[str, Any]
    links: tuple[tuple[str, str], ...]
    waits: tuple[tuple[str, int, float], ...]

    @property
    def is_call(self) -> bool:
        return self.attributes.get("gen_ai.operation.name") in ("chat", "text_completion", "embeddings")

    @property
    def is_step(self) -> bool:
        return "asmodel.step.name" in self.attributes

    @property
    def attempts(self) -> int:
        return int(self.attributes.get("asmodel.upstream.attempts", 1))

    @property
    def unsent(self) -> bool:
        """Whether it was cancelled while it waited for its turn: the wait ended with the span."""
        if not self.attributes.get("asmodel.cancelled"):
            return False
        return any(name == "upstream.queue" and self.ended - at < 50_000_000 for name, at, _ in self.waits)


def _read(span: ProtoSpan) -> Span:
    def value(given: Any) -> Any:
        which = given.WhichOneof("value")
        if which == "array_value":
            return [value(item) for item in given.array_value.values]
        return getattr(given, which)

    def attributes(pairs: Any) -> dict[str, Any]:
        return {pair.key: value(pair.value) for pair in pairs}

    waits: list[tuple[str, int, float]] = []
    for event in span.events:
        told = attributes(event.attributes)
        if event.name == "asmodel.wait":
            waits.append((told["asmodel.wait.name"], event.time_unix_nano, told["asmodel.wait.seconds"]))
    return Span(
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        kind=ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
        failed=span.status.code == 2,
        attributes=attributes(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        waits=tuple(waits),
    )


@dataclass
class Books:
    """All that is known of the run, once the server has ended."""

    asked: list[Asked]
    shop: Shop
    lines: dict[str, list[dict[str, Any]]]
    """The log, by request id."""
    spans: list[Span]
    metrics: dict[tuple[str, frozenset[tuple[str, str]]], float]
    file: Path
    said: str
    seconds: float
    by_trace: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    runs: list[trace_reader.RunRow] = field(default_factory=list[trace_reader.RunRow])

    def __post_init__(self) -> None:
        for span in self.spans:
            self.by_trace[span.trace].append(span)
        self.runs = trace_reader.runs(self.file, limit=100_000)

    def line(self, asked: Asked) -> dict[str, Any]:
        (line,) = self.lines[asked.id]
        return line

    def of(self, asked: Asked) -> list[Span]:
        return self.by_trace[self.line(asked)["trace_id"]]

    def calls(self, asked: Asked) -> list[Span]:
        return [span for span in self.of(asked) if span.is_call]

    @property
    def orders(self) -> dict[int, list[Asked]]:
        found: dict[int, list[Asked]] = defaultdict(list)
        for asked in self.asked:
            found[asked.mark].append(asked)
        return found

    def total(self, name: str, **labels: str) -> float:
        return total(self.metrics, name, **labels)

    def by(self, name: str, *labels: str, **where: str) -> dict[Any, float]:
        """A metric's values by some of its labels, without those that are 0."""
        found: dict[Any, float] = defaultdict(float)
        for (n, of), value in self.metrics.items():
            told = dict(of)
            if n == name and where.items() <= told.items() and value:
                found[tuple(told.get(label, "") for label in labels) if len(labels) > 1 else told[labels[0]]] += value
        return dict(found)


def metrics(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for line in server.ask("GET", "/metrics").body.decode().splitlines():
        if match := re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line):
            labels = frozenset(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            found[match[1], labels] = float(match[3])
    assert found
    return found


def total(found: Mapping[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return sum(value for (n, of), value in found.items() if n == name and labels.items() <= dict(of).items())


@contextmanager
def sink() -> Generator[Sink]:
    made = Sink()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Books:
    folder = tmp_path_factory.mktemp("books")
    (folder / "programs").mkdir()
    (folder / "programs" / "ledger.py").write_text(PROGRAMS)
    shop = Shop()
    with shop.server, sink() as collector:
        settings = SETTINGS.format(base=shop.server.base_url, price=PRICE)
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.address,
            # Longer than the run: what has come by then is there, and the rest is left for the end of the server. The
            # queue takes the whole run, for OpenTelemetry drops what does not fit, as it should.
            "OTEL_BSP_SCHEDULE_DELAY": "600000",
            "OTEL_BSP_MAX_QUEUE_SIZE": "50000",
        }
        with serving(folder, settings, "--programs", str(folder / "programs"), env=env) as server:
            clients = Clients(server, shop)
            began = time.monotonic()
            errands = mixed(clients)
            with ThreadPoolExecutor(CLIENTS) as pool:
                for done in [pool.submit(errand) for errand in errands]:
                    done.result()
            seconds = time.monotonic() - began
            # A client that leaves is not told when the server has noticed.
            eventually("nothing is under way", lambda: idle(server))
            found = metrics(server)
            assert server.stop() == 0
            said = server.said
    shop.scored()
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for text in said.splitlines():
        if text.startswith("{"):
            line = json.loads(text)
            if line["message"] == "request":
                lines[line["request_id"]].append(line)
    spans = [
        _read(span)
        for request in collector.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    file = folder / "state" / "asmodel" / "traces.sqlite"
    return Books(clients.asked, shop, dict(lines), spans, found, file, said, seconds)


def idle(server: Server) -> bool:
    found = metrics(server)
    running = total(found, "asmodel_runs_active") + total(found, "asmodel_upstream_calls_active")
    # The one that reads this is under way itself.
    return running == 0 and total(found, "http_server_active_requests") == 1


def test_the_run_was_a_mixed_one(books: Books) -> None:
    outcomes = Counter(books.line(asked)["outcome"] for asked in books.asked)
    print(f"\n{len(books.asked)} requests of {CLIENTS} clients in {books.seconds:.1f} s: {dict(outcomes)}")
    print(f"{len(books.spans)} spans, {sum(span.is_call for span in books.spans)} calls")
    wrong = [(a.model, a.wants, books.line(a)["outcome"]) for a in books.asked if books.line(a)["outcome"] != a.wants]
    assert not wrong, '\n'.join(map(str, wrong))
    results = Counter(s.attributes.get("asmodel.cache.result") for s in books.spans if s.is_step)
    assert min(results["hit"], results["miss"], results["joined"], results["bypass"]) > 0
    assert "Traceback" not in books.said


def test_every_request_is_one_trace(books: Books) -> None:
    assert {asked.id for asked in books.asked} == books.lines.keys()
    traces = [books.line(asked)["trace_id"] for asked in books.asked]
    assert len(set(traces)) == len(traces)
    assert set(traces) == books.by_trace.keys()
    for asked in books.asked:
        (root,) = (span for span in books.of(asked) if span.kind == "SERVER")
        assert (root.name, root.parent) == (f"POST {ROUTE}", asked.parent)
        if asked.answered is not None:
            assert asked.answered.headers["x-asmodel-trace-id"] == root.trace


def test_no_span_is_an_orphan(books: Books) -> None:
    assert len({span.id for span in books.spans}) == len(books.spans)
    for asked in books.asked:
        inside = {span.id for span in books.of(asked)}
        for span in books.of(asked):
            assert span.parent in inside or span.kind == "SERVER", (asked.model, span.name)
    # What a hit or a join links to is there as well.
    everything = {(span.trace, span.id): span for span in books.spans}
    for span in books.spans:
        for link in span.links:
            assert everything[link].is_call
        assert bool(span.links) == (span.attributes.get("asmodel.cache.result") in ("hit", "joined")), span.name


def test_no_span_is_lost_when_the_server_stops(books: Books) -> None:
    kept: set[str] = set()
    for trace_id in {run.trace_id for run in books.runs}:
        exported = {span.id: span for span in books.by_trace[trace_id]}
        trace = trace_reader.spans(books.file, trace_id)
        nodes = {node.span_id: node for node in trace_time.walk(trace.roots)}
        assert nodes.keys() == exported.keys()
        for span_id, node in nodes.items():
            span = exported[span_id]
            assert (node.name, node.start_ns, node.end_ns) == (span.name, span.began, span.ended)
            assert {**node.attributes} == {**span.attributes}, node.name
        kept.add(trace_id)
    # In the local file are those in which something was run; what was refused before is exported alone.
    refused = {t for t, spans in books.by_trace.items() if [span.kind for span in spans] == ["SERVER"]}
    assert kept == books.by_trace.keys() - refused


def test_each_call_that_came_in_upstream_is_an_attempt_in_a_span(books: Books) -> None:
    requests = books.shop.requests()
    unsent = 0
    wrong: list[object] = []
    for mark, asked in books.orders.items():
        calls = [call for one in asked for call in books.calls(one)]
        unsent += sum(call.unsent for call in calls)
        told = sum(call.attempts for call in calls) - sum(call.unsent for call in calls)
        if told != len(requests[mark]):
            wrong.append((asked[0].model, asked[0].wants, told, len(requests[mark])))
    assert not wrong, '\n'.join(map(str, wrong))
    attempts = sum(span.attempts for span in books.spans if span.is_call)
    assert attempts == len([r for of in requests.values() for r in of]) + unsent
    assert books.total("asmodel_upstream_attempts_total") == attempts
    assert books.total("gen_ai_client_operation_duration_seconds_count") == sum(s.is_call for s in books.spans)
    for span in books.spans:
        tries = sum(s.parent == span.id and s.name.startswith("attempt ") for s in books.by_trace[span.trace])
        assert tries == (span.attempts if span.is_call and span.attempts > 1 else 0)
    print(f"\n{attempts} attempts, {unsent} of which were never sent")


def test_a_line_of_the_log_tells_the_attempts_of_its_trace(books: Books) -> None:
    wrong = []
    for asked in books.asked:
        told, spans = books.line(asked).get("calls", 0), sum(call.attempts for call in books.calls(asked))
        if told != spans:
            wrong.append((asked.model, asked.wants, asked.stream, told, spans, asked.mark))
    assert not wrong, '\n'.join(map(str, wrong))


def spent(calls: Iterable[Span]) -> tuple[int, int, float]:
    """Tokens in, tokens out, dollars; by what the spans of the calls say."""
    of = [call.attributes for call in calls]
    return (
        sum(a.get("gen_ai.usage.input_tokens", 0) for a in of),
        sum(a.get("gen_ai.usage.output_tokens", 0) for a in of),
        sum(a.get("asmodel.upstream.cost", 0.0) for a in of),
    )


def test_tokens_are_those_that_the_upstream_sold(books: Books) -> None:
    wrong = []
    for mark, asked in books.orders.items():
        bought = spent(call for one in asked for call in books.calls(one))
        sold = books.shop.sold[mark]
        if bought[:2] != (sold.input, sold.output):
            wrong.append((asked[0].model, asked[0].wants, bought, sold))
    assert not wrong, '\n'.join(map(str, wrong))


def test_tokens_and_cost_agree_in_spans_and_log(books: Books) -> None:
    wrong = []
    for asked in books.asked:
        line, calls = books.line(asked), books.calls(asked)
        cost = line.get("cost", 0.0)
        told = (line.get("input_tokens", 0), line.get("output_tokens", 0), cost)
        if told != spent(calls):
            wrong.append((asked.model, asked.wants, asked.stream, told, spent(calls)))
    assert not wrong, '\n'.join(map(str, wrong))


def test_tokens_and_cost_agree_in_spans_and_metrics(books: Books) -> None:
    calls = [span for span in books.spans if span.is_call]
    tokens_in, tokens_out, cost = spent(calls)
    assert books.by("asmodel_tokens_total", "type") == {"input": tokens_in, "output": tokens_out}
    assert books.total("asmodel_cost_usd_total") == cost
    assert books.by("gen_ai_client_token_usage_sum", "gen_ai_token_type") == {"input": tokens_in, "output": tokens_out}


def test_tokens_and_cost_agree_in_spans_and_receipts(books: Books) -> None:
    for asked in books.asked:
        if asked.answered is None:
            continue
        receipt, usage = receipts(asked)
        print(asked.model, asked.stream, receipt, usage)
        break


def receipts(asked: Asked) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What the body says that it came to: the object `asmodel`, and the usage."""
    assert asked.answered is not None
    body = asked.answered.body
    if asked.answered.headers["content-type"].startswith("application/json"):
        parts = [json.loads(body)]
    else:
        events = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: ")]
        parts = [json.loads(event) for event in events if event != b"[DONE]"]
    receipt = next((part["asmodel"] for part in reversed(parts) if "asmodel" in part), None)
    usage = next((part["usage"] for part in reversed(parts) if part.get("usage")), None)
    return receipt, usage


def test_outcomes(books: Books) -> None:
    print(books.by("asmodel_runs_total", "nested", "outcome", "error_type"))
    print(Counter((run.outcome, run.error) for run in books.runs))
    print(Counter(books.line(asked)["outcome"] for asked in books.asked))
    print(books.by("http_server_request_duration_seconds_count", "http_response_status_code", http_route=ROUTE))
    print(Counter(books.line(asked)["status"] for asked in books.asked))


def test_time(books: Books) -> None:
    shares = Counter()
    for run in books.runs:
        for share in trace_time.spent(trace_reader.spans(books.file, run.trace_id)):
            shares[share.what] += share.seconds
    print(shares)
