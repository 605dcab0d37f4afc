"""Which turns are being sampled, and whether another may start: what an engine needs to drain before a switch.

Pure bookkeeping of one event loop; never samples, aborts or adopts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Counts the turns in flight; while it is draining, new ones wait."""

    def __init__(self) -> None:
        self._num_in_flight = 0
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One turn, from when it may start until it ends, however it ends."""
        while not self._admitting.is_set():
            await self._admitting.wait()
        self._num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Let none start and wait for those in flight; whether all have ended in time. `admit` is due either way."""
        self._admitting.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def admit(self) -> None:
        """Turns may start again, first those that have waited. Harmless where they may already."""
        self._admitting.set()
