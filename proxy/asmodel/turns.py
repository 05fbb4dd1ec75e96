"""Who is next, where only so many may be at a time: callers take turns, in each its runs, in each the first to come."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TypeAlias

_Line: TypeAlias = "OrderedDict[asyncio.Future[None], None]"


class Turns:
    """`slots` at a time. To come, to go, and to pass a slot on each take the same time, however many wait.

    A caller with a hundred runs gets as many turns as one with a single run, and a run of a thousand calls as many as
    its caller's run of three. Whoever comes back (a retry, the next step) is the last of its run.

        if not turns.take():
            await turns.wait(caller, run)
        try: ...
        finally: turns.give()
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        # Only who has anybody waiting is in here. What is next stands first; what had its turn goes to the end.
        self._callers: OrderedDict[str, OrderedDict[str, _Line]] = OrderedDict()

    def take(self) -> bool:
        """Take a slot, if there is one and nobody waits for it."""
        if self._free <= 0 or self._callers:
            return False
        self._free -= 1
        return True

    async def wait(self, caller: str, run: str) -> None:
        """Wait for a slot, and take it. Cancelled, it leaves nothing behind."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        runs = self._callers.get(caller)
        if runs is None:
            runs = self._callers[caller] = OrderedDict()
        line = runs.get(run)
        if line is None:
            line = runs[run] = OrderedDict()
        line[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(caller, run, turn)
            else:
                self.give()  # It was given a slot in the same moment.
            raise

    def give(self) -> None:
        """Give a slot back: to who is next."""
        while self._callers:
            caller, runs = next(iter(self._callers.items()))
            run, line = next(iter(runs.items()))
            turn, _ = line.popitem(last=False)
            if line:
                runs.move_to_end(run)
            else:
                del runs[run]
            if runs:
                self._callers.move_to_end(caller)
            else:
                del self._callers[caller]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, caller: str, run: str, turn: asyncio.Future[None]) -> None:
        runs = self._callers.get(caller)
        line = None if runs is None else runs.get(run)
        if runs is None or line is None or turn not in line:
            return  # Its turn came when it was leaving already, and went to the next.
        del line[turn]
        if not line:
            del runs[run]
        if not runs:
            del self._callers[caller]
