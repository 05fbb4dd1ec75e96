"""A mark for the tests that measure time."""

from __future__ import annotations

import pytest

timed = pytest.mark.flaky(reruns=4, reruns_delay=0.5, only_rerun=["AssertionError", "TimeoutError"])
"""For a test that says how long something takes at most, or that one thing comes before another by some milliseconds.

A machine that is shared stands still for a part of a second now and then, and that only ever adds: the best of five is
what the code itself takes. A test of anything else has no such mark, and fails when it fails once."""
