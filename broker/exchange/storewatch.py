"""Whether the store has room: leases stop before the disk is full, and everything goes on when there is room again.

Owns that state and looks at the disk; the ledger is told what follows.
"""

from __future__ import annotations

import logging

from broker.exchange.dispatch import Request
from broker.exchange.executor import Executor
from broker.ledger.events import Hold
from broker.store.journal import Journal, StoreFullError

log = logging.getLogger(__name__)

CHECK_S = 1.0  # between looks at the disk


class StoreWatch:
    """`full`: the store refuses writes, and actors are refused. `on_hold`: it nearly does, and nothing is leased.
    `free_bytes`: the room that was left at the last look."""

    def __init__(self, journal: Journal, executor: Executor, min_free_mb: int) -> None:
        self._journal, self._executor, self.min_free_mb = journal, executor, min_free_mb
        self.full, self.on_hold = not journal.reserved, False
        self.free_bytes = journal.free_bytes
        self._checked_at = float("-inf")

    def due(self, now: float) -> bool:
        """Whether it is time for another look."""
        return now - self._checked_at >= CHECK_S

    def check(self, now: float) -> None:
        """Look at the disk."""
        self._checked_at = now
        if self.full:
            try:
                self._journal.probe()
                self.full = False
                log.warning("The store takes writes again. store=%s", self._journal.path)
            except StoreFullError as error:
                log.debug("The store is still full. error=%s", error)
        self.free_bytes = self._journal.free_bytes
        free_mb = self.free_bytes >> 20
        on_hold = free_mb < self.min_free_mb
        if on_hold != self.on_hold:
            log.warning("Leases %s. free_mb=%d", "stop: the disk is nearly full" if on_hold else "go on", free_mb)
        self.on_hold = on_hold
        self._executor.execute(Request(Hold(on_hold)))

    def suspend(self, error: StoreFullError) -> None:
        """The store took nothing of this round: forget it, and everybody who waits for an answer."""
        log.error("The store refuses writes; actors are refused until there is room. error=%s", error)
        self.full = True
        self._executor.start_over()
