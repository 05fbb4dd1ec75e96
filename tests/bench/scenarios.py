"""What is measured: the scenarios with their floors, the programs of the benchmark, and what one round of one is.

A floor is what the project holds itself to. Ratios are to the direct call of the same round, with the same number of
connections and the same delay, so that what a busy machine does falls on both.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import orjson
from tests.bench import wire
from tests.bench.load import PLACE, Order, Result

Shape: TypeAlias = Literal["whole", "stream", "program"]

CHAIN, FAN = 5, 16
"""Steps of the two programs: in a row, and independent of one another."""

PROGRAMS = f'''"""The programs of the benchmark: {CHAIN} steps in a row, and {FAN} that do not wait for one another."""

from asmodel import Run, gather, program, step


@step(model="writer")
def next_thought(question: str, number: int, before: str) -> str:
    return f"Step {{number}} of {CHAIN}.\\n\\n{{question}}\\n\\nSo far: {{before}}"


@program("bench-chain")
async def chain(run: Run) -> str:
    """Each step is shown what the one before it said."""
    said = ""
    for number in range({CHAIN}):
        said = await run(next_thought, run.question, number, said)
    return said


@step(model="writer")
def aspect(question: str, number: int) -> str:
    return f"Aspect {{number}} of {FAN}.\\n\\n{{question}}"


@program("bench-fan")
async def fan(run: Run) -> str:
    """All at once; the first of them is the answer."""
    said = await gather(run(aspect, run.question, number) for number in range({FAN}))
    return said[0]
'''


class Asked(Protocol):
    """Where something is asked, and by which name of a model."""

    @property
    def port(self) -> int: ...

    @property
    def path(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def streams_whole(self) -> bool: ...


@dataclass(frozen=True)
class Floor:
    """What one figure of a scenario should be."""

    figure: str
    limit: float
    at_least: bool = False
    """Whether more is better; else less is."""

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def short_by(self, value: float) -> float:
        """How far the value is on the wrong side; 0 if it is not."""
        return 0.0 if self.met(value) else abs(value - self.limit)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing to measure."""

    name: str
    shape: Shape = "whole"
    model: str = ""
    """A program's name; else the upstream is asked through."""
    delay: float = 0.0
    """Seconds that the upstream takes before it answers."""
    pace: float = 0.0
    """Seconds that it takes before each token of a stream."""
    connections: int = 1
    steps: int = 0
    """Steps of the program."""
    cached: bool = False
    """Whether all steps were bought before."""
    floors: tuple[Floor, ...] = ()
    in_a_row: int = 0
    """How many calls of the upstream wait for one another; the time of so many is what a request takes at least."""

    @property
    def calls(self) -> int:
        """Calls of the upstream that one request makes."""
        if self.shape != "program":
            return 1
        return 0 if self.cached else self.steps

    def order(self, target: Asked, seconds: float, requests: int | None = None) -> Order:
        """What the load generator is told."""
        unique = f" ({PLACE})" if self.shape == "program" and not self.cached else " (always the same)"
        body = orjson.dumps(
            wire.question(self.model or target.model, stream=self.shape == "stream", unique=unique)
        ).decode()
        return Order(
            port=target.port,
            path=target.path,
            body=body,
            expect=wire.STREAMED if self.shape == "stream" and not target.streams_whole else wire.ANSWER,
            connections=self.connections,
            seconds=seconds,
            requests=requests,
        )

    def direct(self) -> Scenario:
        """The call without anything in between, to which this one is compared."""
        if self.shape != "program":
            return self
        return Scenario(name=self.name, delay=self.delay, connections=self.connections)


def _passed(delay: int, connections: int, *floors: Floor) -> Scenario:
    name = f"passed through, {delay} ms, c={connections}"
    return Scenario(name=name, delay=delay / 1000, connections=connections, floors=floors, in_a_row=1)


def _streamed(delay: int, connections: int, *floors: Floor) -> Scenario:
    name = f"stream, {delay} ms, c={connections}"
    return Scenario(name=name, shape="stream", delay=delay / 1000, connections=connections, floors=floors, in_a_row=1)


def _program(
    name: str, delay: int, connections: int, *floors: Floor, fan: bool = False, cached: bool = False
) -> Scenario:
    return Scenario(
        name=f"{name}, {delay} ms, c={connections}" if not cached else f"{name}, c={connections}",
        shape="program",
        model="bench-fan" if fan else "bench-chain",
        delay=delay / 1000,
        connections=connections,
        steps=FAN if fan else CHAIN,
        cached=cached,
        floors=floors,
        in_a_row=0 if cached else 1 if fan else CHAIN,
    )


SCENARIOS: tuple[Scenario, ...] = (
    _passed(0, 1, Floor("added p50", 0.5)),
    _passed(0, 16, Floor("ratio", 0.40, at_least=True)),
    _passed(0, 64),
    _passed(0, 256),
    _passed(50, 1),
    _passed(50, 16),
    _passed(50, 64, Floor("ratio", 0.97, at_least=True)),
    _passed(50, 256, Floor("ratio", 0.90, at_least=True)),
    _streamed(0, 1),
    _streamed(0, 16),
    _streamed(0, 64),
    _streamed(50, 1, Floor("added first token", 0.7)),
    _streamed(50, 16),
    _streamed(50, 64, Floor("ratio", 0.95, at_least=True)),
    Scenario(name="stream, 3 ms a token, c=16", shape="stream", pace=0.003, connections=16, in_a_row=1),
    _program(f"program of {CHAIN} steps in a row", 50, 1, Floor("wall", 1.02)),
    _program(f"program of {CHAIN} steps in a row", 50, 64, Floor("wall", 1.08)),
    _program(f"program of {FAN} independent steps", 50, 1, Floor("p50", 55.0), fan=True),
    _program("steps bought", 0, 16, Floor("CPU a step", 300.0)),
    _program(f"program of {CHAIN} steps, all cached", 0, 1, Floor("p50", 1.5), cached=True),
    _program(f"program of {CHAIN} steps, all cached", 0, 16, Floor("ratio", 0.15, at_least=True), cached=True),
)

LIFE = (
    Floor("start to /healthz", 1.0),
    Floor("idle memory", 100.0),
    Floor("memory growth", 1.02),
)

UNITS: Mapping[str, str] = {
    "ratio": "",
    "wall": "",
    "p50": " ms",
    "p99": " ms",
    "added p50": " ms",
    "added p99": " ms",
    "added first token": " ms",
    "CPU": " us",
    "CPU a step": " us",
    "start to /healthz": " s",
    "idle memory": " MB",
    "memory growth": "",
    "memory": " MB",
}
"""What each figure is in. `ratio` is requests a second to those of the direct call; `wall` is the time of a request to
that of its calls of the upstream, as slow as the upstream was told to be."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One target under one load, once."""

    result: Result
    cpu: float | None = None
    """Seconds of the target's processes, what they did after the last answer included."""
    memory: int | None = None
    """Bytes, at the end."""
    calls: int = 0
    """That the upstream saw."""
    most: int = 0
    """Calls in flight at once."""


@dataclass
class Measured:
    """All rounds of one scenario, by target. `direct` is always among them."""

    scenario: Scenario
    rounds: dict[str, list[Round]] = field(default_factory=dict[str, list[Round]])
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """What went wrong, by target and in words, and how often; a figure beside it is worth nothing."""

    @property
    def faults(self) -> list[str]:
        """The same in words."""
        return [f"{target}: {times} x {what}" for (target, what), times in self.wrong.items()]

    def figures(self, target: str) -> dict[str, float]:
        """The figures of a target: medians over the rounds."""
        rounds, direct = self.rounds[target], self.rounds["direct"]
        if not all(r.result.requests for r in (*rounds, *direct)):
            return {}
        found = {
            "rate": _median(r.result.rate for r in rounds),
            "ratio": _median(r.result.rate / d.result.rate for r, d in zip(rounds, direct, strict=False)),
            "p50": _median(r.result.latency.p50 for r in rounds),
            "p99": _median(r.result.latency.p99 for r in rounds),
            "first byte": _median(r.result.first_byte.p50 for r in rounds),
            "requests": float(sum(r.result.requests for r in rounds)),
            "in flight": float(max(r.most for r in rounds)),
        }
        for name in ("p50", "p99"):
            found[f"added {name}"] = _median(
                getattr(r.result.latency, name) - getattr(d.result.latency, name)
                for r, d in zip(rounds, direct, strict=False)
            )
        if self.scenario.shape == "stream":
            found["first token"] = _median(r.result.first_token.p50 for r in rounds)
            found["added first token"] = _median(
                r.result.first_token.p50 - d.result.first_token.p50 for r, d in zip(rounds, direct, strict=False)
            )
        least = self.scenario.in_a_row * self.scenario.delay * 1000
        if least and self.scenario.shape == "program" and target != "direct":
            found["wall"] = found["p50"] / least
            # The upstream's own clock and the loopback are in the direct call, too.
            found["wall to direct"] = _median(
                r.result.latency.p50 / (self.scenario.in_a_row * d.result.latency.p50)
                for r, d in zip(rounds, direct, strict=False)
            )
        if all(r.cpu is not None for r in rounds):
            found["CPU"] = _median((r.cpu or 0.0) / r.result.requests * 1e6 for r in rounds)
            if self.scenario.shape == "program" and target != "direct":
                found["CPU a step"] = found["CPU"] / self.scenario.steps
        memory = [r.memory for r in rounds if r.memory is not None]
        if memory:
            found["memory"] = max(memory) / 1e6
        return found


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
