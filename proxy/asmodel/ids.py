"""Names for requests, runs and answers: random, so that no two are alike; no secrets.

From the system's random numbers once a process, and from there on by our own generator: to ask the system costs a call
of the kernel each time. A generator that only we draw from, since a program may seed that of the `random` module.
"""

from __future__ import annotations

import os
import random

_RANDOM = random.Random()

if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_RANDOM.seed)


def new_id(bits: int) -> str:
    """That many random bits in hex digits; 64 are enough among millions, 96 among all there are."""
    return f"{_RANDOM.getrandbits(bits):0{bits // 4}x}"
