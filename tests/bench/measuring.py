"""The measuring itself: rounds in which each target has its turn, and the life of a server from its start on."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.bench.processes import LoadProcess, UpstreamProcess, cpu_seconds, memory_bytes
from tests.bench.profiling import NoProfiler, Profile, Watch
from tests.bench.scenarios import Measured, Round, Scenario
from tests.bench.targets import Asmodel, Target

Tell = Callable[[str, float], None]
"""What is being done, and how many seconds of what was planned are over with it."""


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: everyone is first as often as anyone, and follows everyone else."""
    at = number % len(names)
    turned = [*names[at:], *names[:at]]
    return turned[::-1] if number // len(names) % 2 else turned


@dataclass
class Bench:
    """The upstream, the load and who is measured."""

    upstream: UpstreamProcess
    load: LoadProcess
    targets: Sequence[Target]
    rounds: int = 5
    seconds: float = 1.5
    warm_up: float = 0.3
    """Seconds of load before the first round, of which nothing is kept."""
    settle: float = 0.5
    """Seconds after the last round in which a target may finish what it does behind its answers."""
    tell: Tell = lambda what, seconds: None

    def those_able(self, scenario: Scenario) -> list[Target]:
        """Whoever can do it; the direct call, which is first, always does what it can."""
        return [t for t in self.targets if scenario.shape in t.able or t.name == "direct"]

    def planned(self, scenario: Scenario) -> float:
        """About how many seconds it takes."""
        return len(self.those_able(scenario)) * (self.rounds * self.seconds + self.warm_up) + self.settle

    def measure(self, scenario: Scenario) -> Measured:
        """All rounds of a scenario."""
        targets = {target.name: target for target in self.those_able(scenario)}
        measured = Measured(scenario, {name: [] for name in targets})
        for name, target in targets.items():
            self.tell(f"{scenario.name}: {name}", 0.0)
            asked = scenario.direct() if name == "direct" else scenario
            if scenario.cached and name != "direct":
                self._round(target, asked, 5.0, measured, requests=1, warm=True)
            self._round(target, asked, self.warm_up, measured, warm=True)
            self.tell(f"{scenario.name}: {name}", self.warm_up)
        # From the start of one round of a target to the start of its next: what it does behind its answers counts too.
        clocks: dict[str, list[float | None]] = {name: [] for name in targets}
        for number in range(self.rounds):
            for name in rotated(list(targets), number):
                target = targets[name]
                clocks[name].append(cpu_seconds(target.pids))
                asked = scenario.direct() if name == "direct" else scenario
                measured.rounds[name].append(self._round(target, asked, self.seconds, measured))
                self.tell(f"{scenario.name}: {name}", self.seconds)
        time.sleep(self.settle)
        self.tell(scenario.name, self.settle)
        for name, target in targets.items():
            clocks[name].append(cpu_seconds(target.pids))
            measured.rounds[name] = [
                replace(done, cpu=None if begin is None or end is None else end - begin)
                for done, begin, end in zip(measured.rounds[name], clocks[name], clocks[name][1:], strict=False)
            ]
        return measured

    def profile(self, scenario: Scenario, seconds: float, folder: Path) -> Profile:
        """Where the time of the only target goes. Raises NoProfiler."""
        (target,) = self.targets
        measured = Measured(scenario)
        if scenario.cached:
            self._round(target, scenario, 5.0, measured, requests=1, warm=True)
        self._round(target, scenario, self.warm_up, measured, warm=True)
        watch = Watch(target.process.pid, seconds, folder)
        try:
            self._round(target, scenario, seconds + 1.0, measured, warm=True)
            if measured.faults:
                raise NoProfiler(f"what would be seen is how it fails: {measured.faults[0]}")
            return watch.taken()
        finally:
            watch.stop()

    def _round(
        self,
        target: Target,
        scenario: Scenario,
        seconds: float,
        measured: Measured,
        *,
        requests: int | None = None,
        warm: bool = False,
    ) -> Round:
        self.upstream.told(delay=scenario.delay, pace=scenario.pace)
        result = self.load.carry_out(scenario.order(target, seconds, requests))
        seen = self.upstream.told()
        for fault, times in result.errors.items():
            measured.wrong[target.name, fault] += times
        expected = scenario.calls * result.requests
        if not warm and not result.errors and seen["calls"] != expected:
            fault = f"calls of the upstream more or fewer than the {scenario.calls} a request that were due"
            measured.wrong[target.name, fault] += abs(seen["calls"] - expected)
        return Round(result=result, memory=memory_bytes(target.pids), calls=seen["calls"], most=seen["most"])


# ---- the life of a server ----


@dataclass(frozen=True, kw_only=True)
class Life:
    """From the start of a server to its last request."""

    starts: tuple[float, ...]
    """Seconds to the first answer at /healthz, of each start."""
    idle: float | None
    """Megabytes, a second after the start."""
    after: dict[int, float] = field(default_factory=dict[int, float])
    """Megabytes after so many requests."""
    seconds: float = 0.0
    """That all of these took."""
    faults: tuple[str, ...] = ()

    @property
    def requests(self) -> str:
        """How many were asked, in words."""
        return f"{max(self.after, default=0):,} requests"

    @property
    def start(self) -> float:
        return statistics.median(self.starts)

    @property
    def growth(self) -> float | None:
        """Memory at the end to that after the first step; None if nothing was asked."""
        if len(self.after) < 2:
            return None
        return self.after[max(self.after)] / self.after[min(self.after)]


STEP = 10_000
"""Requests after which the memory is read."""


def live(bench: Bench, folder: Path, requests: int = 0, starts: int = 5, checkout: Path | None = None) -> Life:
    """Start the server `starts` times; ask the last one `requests` times, and see what it holds."""
    took: list[float] = []
    idle: list[float] = []
    for number in range(starts):
        server = Asmodel(bench.upstream, folder / f"life-{number}", checkout=checkout)
        try:
            took.append(server.started_in)
            bench.tell("start and idle memory", 1.0)
            time.sleep(1.0)
            memory = memory_bytes(server.pids)
            if memory is not None:
                idle.append(memory / 1e6)
            if requests and number == starts - 1:
                return _aged(bench, server, requests, tuple(took), idle)
        finally:
            server.stop()
    return Life(starts=tuple(took), idle=statistics.median(idle) if idle else None)


MIX = (
    (0.90, Scenario(name="passed through", connections=64)),
    (0.08, Scenario(name="streams", shape="stream", connections=64)),
    (0.01, Scenario(name="programs, bought", shape="program", model="bench-chain", connections=16, steps=5)),
    (0.01, Scenario(name="programs, cached", shape="program", model="bench-chain", connections=16, cached=True)),
)
"""Of what the requests are that a server lives through."""


FILL = (8_000, Scenario(name="programs, bought", shape="program", model="bench-chain", connections=64, steps=5))
"""Asked before the count begins, so that what is bounded is full: the growth is that of what is not."""


def _aged(bench: Bench, server: Target, requests: int, starts: tuple[float, ...], idle: list[float]) -> Life:
    after: dict[int, float] = {}
    faults: Counter[str] = Counter()
    began = time.monotonic()
    bench.upstream.told(delay=0, pace=0)

    def ask(scenario: Scenario, times: int) -> None:
        result = bench.load.carry_out(scenario.order(server, 600.0, times))
        for fault, often in result.errors.items():
            faults[f"{server.name}: {often} x {scenario.name}: {fault}"] += often

    bench.tell("memory: what is bounded is filled", 0.0)
    ask(FILL[1], FILL[0])
    while (done := max(after, default=0)) < requests and not faults:
        for share, scenario in MIX:
            ask(scenario, round(share * STEP))
        memory = memory_bytes(server.pids)
        if memory is None:
            break
        after[done + STEP] = memory / 1e6
        bench.tell(f"memory after {done + STEP:,} requests: {memory / 1e6:.1f} MB", STEP)
    return Life(
        starts=starts,
        idle=statistics.median(idle) if idle else None,
        after=after,
        seconds=time.monotonic() - began,
        faults=tuple(faults),
    )
