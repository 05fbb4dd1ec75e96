"""How long something takes, on a machine that is shared."""

from __future__ import annotations

import pytest


class TooSlow(AssertionError):
    """It took longer than it may, or what was to be looked at then was over before it was looked at."""


def in_time(seconds: float, bound: float) -> None:
    """Raise TooSlow unless it took less than `bound`. In a test that is marked `timed`."""
    if not seconds < bound:
        raise TooSlow(f"{seconds:.3f} s, and less than {bound:g} s was due")


timed = pytest.mark.flaky(reruns=4, reruns_delay=0.5, only_rerun=[TooSlow])
"""For a test with a bound on time. A shared machine stands still for a part of a second now and then, which only ever
adds: the best of five is what the code itself takes. Nothing else that fails in such a test is tried again."""
