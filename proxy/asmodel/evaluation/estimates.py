"""What a sample says: intervals of proportions and means, paired tests, percentiles. Numbers in, numbers out.

Sources: Wilson 1927 for the interval of a proportion (its coverage: Brown, Cai and DasGupta 2001); McNemar 1947 in its
exact form, which is a sign test on the pairs that differ; Efron 1979 for the bootstrap, whose percentiles are taken;
Holm 1979 for several comparisons at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95
"""Of every interval."""

_Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""

RESAMPLES = 2000
"""Of a bootstrap: the ends of its interval then move by about a twentieth of its width from seed to seed."""


class Interval(NamedTuple):
    """An estimate, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """The score interval of a proportion. `n` is at least 1."""
    p = successes / n
    shrunk = _Z * _Z / n
    middle = (p + shrunk / 2) / (1 + shrunk)
    half = _Z / (1 + shrunk) * math.sqrt(p * (1 - p) / n + shrunk / (4 * n))
    # Where nothing or everything succeeded, an end is the proportion itself, but for rounding.
    return Interval(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def bootstrap(values: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """The percentile interval of a mean. The same values and seed give the same interval. `values` is not empty."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1 or min(values) == max(values):
        return Interval(mean, mean, mean)
    # By its value and nothing else of the process: a report is the same on every machine.
    draw = random.Random(seed)
    means = sorted(math.fsum(draw.choices(values, k=n)) / n for _ in range(resamples))
    tail = (1 - LEVEL) / 2
    return Interval(mean, min(mean, percentile(means, tail)), max(mean, percentile(means, 1 - tail)))


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p of a paired comparison: pairs that are alike say nothing, the others are coin tosses."""
    n = won + lost
    # In whole numbers up to the last division: 2**n is beyond a float from n = 1024 on.
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    p: float = 2 * tail / (1 << n)
    return min(1.0, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Each p as it stands after several comparisons; in the order in which they were given."""
    adjusted = [0.0] * len(ps)
    worst = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = worst
    return adjusted


def spread(values: Sequence[float]) -> float:
    """The standard deviation of what was drawn several times, without bias in its square. At least two values."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, with linear interpolation between two (Hyndman and Fan 1996, type 7)."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def seconds_covered(spans: Sequence[tuple[float, float]]) -> float:
    """For how long any of the spans, from and to, was under way: what overlaps counts once, and gaps not at all."""
    covered, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
