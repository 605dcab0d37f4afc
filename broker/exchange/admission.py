"""Large results on their way in: which of the actors that offered one may send it now.

Owns the bound in bytes of what the broker is about to receive, because ZeroMQ has no such bound: without it, a slow
disk and many actors with large trajectories would fill the memory. First come, first served. Never refuses a result:
an actor that sends without asking is only not counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator


class Admission:
    """Clears offers while fewer than `max_bytes` are cleared and not yet here; one result may overstep it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[bytes, str, int]] = deque()
        self._cleared: dict[bytes, dict[str, int]] = {}  # connection -> ticket -> bytes
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that were cleared and have not arrived."""
        return self._num_bytes

    def offer(self, routing: bytes, ticket_id: str, num_bytes: int) -> None:
        """A connection has a result of so many bytes; 0 takes the offer back. A repeated offer replaces the former."""
        self.arrived(routing, ticket_id)
        self._waiting = deque(each for each in self._waiting if each[:2] != (routing, ticket_id))
        if num_bytes:
            self._waiting.append((routing, ticket_id, num_bytes))

    def clear(self, known: Callable[[bytes], bool]) -> Iterator[tuple[bytes, str]]:
        """Those that may be sent now, as (connection, ticket). Of a connection that is not `known` any more nothing
        will come, and nothing waits."""
        if not self._waiting:
            return
        for routing in [each for each in self._cleared if not known(each)]:
            self._num_bytes -= sum(self._cleared.pop(routing).values())
        while self._waiting and self._num_bytes < self._max_bytes:
            routing, ticket_id, num_bytes = self._waiting.popleft()
            if not known(routing):
                continue
            self._cleared.setdefault(routing, {})[ticket_id] = num_bytes
            self._num_bytes += num_bytes
            yield routing, ticket_id

    def arrived(self, routing: bytes, ticket_id: str) -> None:
        """A result is here, whatever it is worth."""
        tickets = self._cleared.get(routing)
        if tickets is not None and ticket_id in tickets:
            self._num_bytes -= tickets.pop(ticket_id)
            if not tickets:
                del self._cleared[routing]
