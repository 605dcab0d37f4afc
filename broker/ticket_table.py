"""The live tickets of the ledger: their states, the legal transitions, and the queues they wait in.

A pure data structure. Owns `TRANSITIONS`, the one table of what may become what. Decides nothing: the ledger says which
transition, this refuses it where it is illegal. A ticket that reaches a final state leaves at once.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from broker.ledger_types import Restored
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode, Ticket

TRANSITIONS: Final[Mapping[str, tuple[frozenset[T], T]]] = {
    "grant": (frozenset({T.ISSUED}), T.LEASED),
    "reclaim": (frozenset({T.ISSUED}), T.LEASED),  # an actor goes on with an episode that the broker had given up
    "return": (frozenset({T.LEASED}), T.ISSUED),  # drained, lost on the way to the actor, expired or failed
    "exhaust": (frozenset({T.LEASED}), T.DEAD),  # expired or failed for the last time
    "result": (frozenset({T.ISSUED, T.LEASED}), T.DELIVERED),
    "deliver": (frozenset({T.DELIVERED}), T.ASSIGNED),
    "keep": (frozenset({T.DELIVERED}), T.ASSIGNED),  # a learner that reconnects holds it already
    "redeliver": (frozenset({T.ASSIGNED}), T.DELIVERED),
    "ack": (frozenset({T.DELIVERED, T.ASSIGNED}), T.ACKED),
    "cancel": (frozenset({T.ISSUED, T.LEASED}), T.CANCELLED),
}
"""transition: (from, to). Whatever is not here cannot happen. A dead ticket stays dead; its letter is acked."""

OPEN: Final = frozenset({T.ISSUED, T.LEASED})
"""States of a ticket whose result is still wanted."""

_FINAL: Final = frozenset({T.ACKED, T.CANCELLED})
_URGENT: Final = frozenset({Mode.EVAL, Mode.REFERENCE})  # the learner waits for these


@dataclass(slots=True)
class Entry:
    """One live ticket. `holder` and `expires_at` while leased; `source` is the session whose result was taken."""

    seq: int
    ticket: Ticket
    state: T = T.ISSUED
    holder: str = ""
    expires_at: float = 0.0
    result_seq: int = 0
    source: str = ""
    error: str = ""
    announced: bool = False  # a dead letter that the learner holds


class TicketTable:
    """All live tickets. `counts[state, mode]` is a gauge for live states and a total for ends.

    The three heaps are lazy: what is popped counts only if its ticket is still in the state it was queued for.
    """

    def __init__(self, restored: Iterable[Restored], ended: Mapping[tuple[T, Mode], int], next_seq: int) -> None:
        self.counts: Counter[tuple[T, Mode]] = Counter(ended)
        self.entries: dict[str, Entry] = {}
        self.assigned: set[str] = set()
        self._next_seq = next_seq
        self._issued: list[tuple[int, int, str]] = []  # (urgency, seq, id)
        self._expiries: list[tuple[float, str]] = []
        self._results: list[tuple[int, str]] = []  # (result_seq, id) of what the learner is to get
        for row in restored:
            entry = Entry(row.seq, row.ticket, row.state, result_seq=row.result_seq, source=row.source, error=row.error)
            self._insert(entry)

    def add(self, ticket: Ticket) -> Entry:
        """A new ticket, issued, at the end of the queue."""
        entry = Entry(self._seq(), ticket)
        self._insert(entry)
        return entry

    def _insert(self, entry: Entry) -> None:
        self.entries[entry.ticket.ticket_id] = entry
        self.counts[entry.state, entry.ticket.mode] += 1
        self._enqueue(entry)

    def move(self, ticket_id: str, transition: str) -> Entry:
        """Carry out a transition. AssertionError where the table does not allow it."""
        entry = self.entries[ticket_id]
        origins, target = TRANSITIONS[transition]
        if entry.state not in origins:
            raise AssertionError(f"{transition} of ticket {ticket_id} in state {entry.state}")
        self.counts[entry.state, entry.ticket.mode] -= 1
        self.counts[target, entry.ticket.mode] += 1
        self.assigned.discard(ticket_id)
        entry.state, entry.holder = target, ""
        if target in (T.DELIVERED, T.DEAD) and not entry.result_seq:
            entry.result_seq = self._seq()
        if target is T.ASSIGNED:
            self.assigned.add(ticket_id)
        elif target in _FINAL:
            del self.entries[ticket_id]
        else:
            self._enqueue(entry)
        return entry

    def lease(self, ticket_id: str, transition: str, holder: str, expires_at: float) -> Entry:
        """Move a ticket to leased, held by this session until `expires_at`."""
        entry = self.move(ticket_id, transition)
        entry.holder, entry.expires_at = holder, expires_at
        heapq.heappush(self._expiries, (expires_at, ticket_id))
        return entry

    def bury(self, ticket_id: str) -> None:
        """Forget a dead ticket whose letter was acked."""
        if self.entries.pop(ticket_id).state is not T.DEAD:
            raise AssertionError(f"burial of ticket {ticket_id}, which is not dead")

    def remind(self, ticket_id: str) -> None:
        """Queue a dead letter once more."""
        self._enqueue(self.entries[ticket_id])

    def pop_issued(self) -> str | None:
        """Take the ticket that is to be granted next out of its queue: urgent modes first, then the oldest."""
        while self._issued:
            _, _, ticket_id = heapq.heappop(self._issued)
            if (entry := self.entries.get(ticket_id)) is not None and entry.state is T.ISSUED:
                return ticket_id
        return None

    def pop_expired(self, now: float) -> str | None:
        """Take a leased ticket whose lease has run out."""
        while self._expiries and self._expiries[0][0] <= now:
            _, ticket_id = heapq.heappop(self._expiries)
            entry = self.entries.get(ticket_id)
            if entry is None or entry.state is not T.LEASED:
                continue
            if entry.expires_at <= now:
                return ticket_id
            heapq.heappush(self._expiries, (entry.expires_at, ticket_id))  # renewed since
        return None

    def pop_result(self) -> Entry | None:
        """Take the oldest result or dead letter that the learner does not hold."""
        while self._results:
            _, ticket_id = heapq.heappop(self._results)
            entry = self.entries.get(ticket_id)
            if entry is not None and (entry.state is T.DELIVERED or (entry.state is T.DEAD and not entry.announced)):
                return entry
        return None

    def _seq(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1

    def _enqueue(self, entry: Entry) -> None:
        ticket = entry.ticket
        if entry.state is T.ISSUED:
            heapq.heappush(self._issued, (0 if ticket.mode in _URGENT else 1, entry.seq, ticket.ticket_id))
        elif entry.state in (T.DELIVERED, T.DEAD):
            heapq.heappush(self._results, (entry.result_seq, ticket.ticket_id))
