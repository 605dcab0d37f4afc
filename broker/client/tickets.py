"""An actor's leased tickets that wait to be run, and the calls that wait for one.

Owns who gets which, and who hears that a ticket is withdrawn. Lives on the event loop; never asks the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Collection

from broker.protocol.trajectory import Ticket


class TicketQueue:
    """First come, first served, on both sides."""

    def __init__(self) -> None:
        self._ready: deque[Ticket] = deque()
        self._waiting: deque[asyncio.Future[Ticket]] = deque()
        self._withdrawn: dict[str, asyncio.Event] = {}  # of tickets that somebody waits for to be withdrawn

    @property
    def num_wanted(self) -> int:
        """Calls that wait for a ticket; negative where tickets wait for a call."""
        return len(self._waiting) - len(self._ready)

    async def get(self, on_wait: Callable[[], None]) -> Ticket:
        """The next ticket; `on_wait` is called where there is none yet. Cancelling the wait loses no ticket: the next
        call gets it."""
        if self._ready:
            return self._ready.popleft()
        future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        on_wait()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.put(future.result())  # it came in the very moment of the cancellation
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(future)

    def put(self, ticket: Ticket) -> None:
        """A ticket for who waits longest, or for the next call."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(ticket)
                return
        self._ready.append(ticket)

    async def withdrawn(self, ticket_id: str) -> None:
        """Wait until this ticket is withdrawn."""
        event = self._withdrawn.setdefault(ticket_id, asyncio.Event())
        try:
            await event.wait()
        finally:
            self._withdrawn.pop(ticket_id, None)

    def withdraw(self, ticket_ids: Collection[str]) -> None:
        """These are not to be run any more: they are taken back, and who runs one is told."""
        for ticket in [ticket for ticket in self._ready if ticket.ticket_id in ticket_ids]:
            self._ready.remove(ticket)
        for ticket_id in ticket_ids:
            if ticket_id in self._withdrawn:
                self._withdrawn[ticket_id].set()

    def fail(self, error: Exception) -> None:
        """There will be no more tickets."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)
