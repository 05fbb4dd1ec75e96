"""What was lately read from a store or written to it, in memory, for as long as nobody has changed what is there."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

_OVERHEAD = 400
"""Bytes that an entry takes besides its value: its key, its place, and Python's own."""

_SHARE = 16
"""A value larger than this part of the whole is left to the disk: it would drive out many others."""


class Memory:
    """The last used values that fit into `limit` bytes, for any number of threads; 0 keeps none.

    Everything in it was in the store at one *version* of it, which is a number that goes up before entries are removed
    or replaced there (see `disk_store`). Whoever asks says which version it is now; at another one all is forgotten.
    The version b"" is none: nothing is found at it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._largest = limit // _SHARE
        self._version: bytes | None = None
        self._values: OrderedDict[str, tuple[bytes, float | None]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        """Whether there is anything of the key, which `find` may still not give."""
        return key in self._values

    def find(self, key: str, version: bytes) -> bytes | None:
        """The value that the store holds at this version, where it is known."""
        with self._lock:
            if version != self._version:
                self._version = version or None
                self._values.clear()
                self._used = 0
                return None
            found = self._values.get(key)
            if found is None:
                return None
            value, expires = found
            if expires is not None and expires <= time.time():
                self._drop(key)
                return None
            self._values.move_to_end(key)
            return value

    def keep(self, key: str, value: bytes, expires: float | None, version: bytes) -> None:
        """The store held this at that version, until `expires` (Unix seconds)."""
        cost = len(value) + _OVERHEAD
        if cost > self._largest:
            return
        with self._lock:
            if version != self._version:
                return
            self._drop(key)
            self._values[key] = value, expires
            self._used += cost
            while self._used > self.limit:
                self._drop(next(iter(self._values)))

    def _drop(self, key: str) -> None:
        found = self._values.pop(key, None)
        if found is not None:
            self._used -= len(found[0]) + _OVERHEAD
