"""Intervals, tests and percentiles: against published values, and against the laws that they keep."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel.evaluation.estimates import (
    bootstrap,
    holm,
    mcnemar,
    percentile,
    seconds_covered,
    spread,
    wilson,
)

COUNTS = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)
SPANS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e3)).map(lambda s: (s[0], s[0] + s[1])), max_size=20)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_has_the_published_ends(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert found.value == successes / n
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@given(COUNTS)
def test_wilsons_interval_holds_the_proportion_and_is_the_mirror_image_of_the_failures(counts: tuple[int, int]) -> None:
    successes, n = counts
    found, mirrored = wilson(successes, n), wilson(n - successes, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-12)


@given(COUNTS)
def test_more_of_the_same_narrows_wilsons_interval(counts: tuple[int, int]) -> None:
    successes, n = counts
    few, many = wilson(successes, n), wilson(4 * successes, 4 * n)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(26, 2, 3.03e-6), (12, 6, 0.2379), (11, 1, 0.00635), (13, 4, 0.0490), (0, 0, 1.0), (5, 5, 1.0), (6, 0, 0.03125)],
)
def test_mcnemars_exact_p_is_that_of_a_sign_test(won: int, lost: int, p: float) -> None:
    assert mcnemar(won, lost) == pytest.approx(p, rel=2e-3)


@given(st.integers(0, 700), st.integers(0, 700))
def test_mcnemar_does_not_mind_who_is_first_and_gives_a_probability(won: int, lost: int) -> None:
    assert mcnemar(won, lost) == mcnemar(lost, won)
    assert 0 <= mcnemar(won, lost) <= 1


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_wider_lead_is_never_less_significant(lost: int, lead: int) -> None:
    assert mcnemar(lost + lead + 1, lost) <= mcnemar(lost + lead, lost) + 1e-12


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(ps: list[float]) -> None:
    adjusted = holm(ps)
    for p, after in zip(ps, adjusted, strict=True):
        assert p <= after <= 1
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert adjusted[order[0]] <= min(1.0, len(ps) * ps[order[0]])


def test_a_bootstrap_comes_near_what_the_normal_distribution_says() -> None:
    draw = random.Random(1)
    values = [draw.gauss(10, 3) for _ in range(200)]
    found = bootstrap(values, seed=0)
    error = 1.96 * 3 / math.sqrt(200)
    assert found.value == pytest.approx(math.fsum(values) / 200)
    assert found.high - found.low == pytest.approx(2 * error, rel=0.2)


@given(VALUES, st.integers(0, 5))
def test_a_bootstrap_holds_the_mean_and_is_the_same_for_the_same_seed(values: list[float], seed: int) -> None:
    found = bootstrap(values, seed=seed, resamples=100)
    assert found == bootstrap(values, seed=seed, resamples=100)
    assert found.low <= found.value <= found.high
    slack = 1e-6 * max(map(abs, values))
    assert min(values) - slack <= found.low
    assert found.high <= max(values) + slack


@pytest.mark.parametrize(("share", "value"), [(0, 1), (0.5, 2.5), (0.9, 3.7), (1, 4), (1 / 3, 2)])
def test_percentiles_are_interpolated(share: float, value: float) -> None:
    assert percentile([1, 2, 3, 4], share) == pytest.approx(value)
    assert percentile([7], share) == 7


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([], 0), ([(1, 3)], 2), ([(1, 3), (2, 4)], 3), ([(1, 9), (2, 4)], 8), ([(1, 2), (100, 101)], 2), ([(5, 5)], 0)],
)
def test_time_is_counted_once_where_calls_overlap_and_not_between_them(
    spans: list[tuple[float, float]], seconds: float
) -> None:
    assert seconds_covered(spans) == seconds


@given(SPANS)
def test_time_under_way_is_between_the_longest_call_and_all_of_them_in_a_row(spans: list[tuple[float, float]]) -> None:
    covered = seconds_covered(spans)
    assert covered <= math.fsum(end - begin for begin, end in spans) + 1e-6
    assert covered >= max((end - begin for begin, end in spans), default=0) - 1e-6
    assert covered == seconds_covered(list(reversed(spans)))


def test_the_spread_of_draws_is_their_standard_deviation() -> None:
    assert spread([0.4, 0.6, 0.8]) == pytest.approx(0.2)
    assert spread([0.7, 0.7]) == 0.0
