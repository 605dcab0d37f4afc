"""The live tickets of the ledger: their states, the legal transitions, their groups, and the queues they wait in.

A pure data structure. Owns `TRANSITIONS`, the one table of what may become what. Decides nothing: the ledger says which
transition, this refuses it where it is illegal. A ticket that reaches a final state leaves at once, a group with its
last ticket.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from broker.ledger.events import Count, Restored
from broker.ledger.schedule import Schedule
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode, Ticket

TRANSITIONS: Final[Mapping[str, tuple[frozenset[T], T]]] = {
    "grant": (frozenset({T.ISSUED}), T.LEASED),
    "reclaim": (frozenset({T.ISSUED}), T.LEASED),  # an actor goes on with an episode that the broker had given up
    "return": (frozenset({T.LEASED}), T.ISSUED),  # drained, lost on the way to the actor, expired or failed
    "exhaust": (frozenset({T.LEASED}), T.DEAD),  # expired or failed for the last time
    "withdraw": (frozenset({T.ISSUED, T.LEASED}), T.DEAD),  # cancelled, while its group lives on
    "result": (frozenset({T.ISSUED, T.LEASED}), T.DELIVERED),
    "deliver": (frozenset({T.DELIVERED}), T.ASSIGNED),
    "keep": (frozenset({T.DELIVERED}), T.ASSIGNED),  # a learner that reconnects holds it already
    "redeliver": (frozenset({T.ASSIGNED}), T.DELIVERED),
    "recall": (frozenset({T.DELIVERED, T.ASSIGNED}), T.ISSUED),  # its stored trajectory is damaged
    "ack": (frozenset({T.DELIVERED, T.ASSIGNED}), T.ACKED),
    "cancel": (frozenset({T.ISSUED, T.LEASED}), T.CANCELLED),
    "requeue": (frozenset({T.DEAD}), T.ISSUED),  # an operator gives it new attempts
}
"""transition: (from, to). Whatever is not here cannot happen. A dead ticket stays dead unless an operator requeues it;
its letter is acked."""

OPEN: Final = frozenset({T.ISSUED, T.LEASED})
"""States of a ticket whose result is still wanted."""

_FINAL: Final = frozenset({T.ACKED, T.CANCELLED})
_URGENT: Final = frozenset({Mode.EVAL, Mode.REFERENCE})  # the learner waits for these


@dataclass(slots=True)
class Entry:
    """One live ticket. `holder`, `leased_at`, `expires_at`: while leased. `source`: the session whose result it is."""

    seq: int
    ticket: Ticket
    state: T = T.ISSUED
    holder: str = ""
    leased_at: float = 0.0
    expires_at: float = 0.0
    result_seq: int = 0
    source: str = ""
    error: str = ""
    announced: bool = False  # a dead letter that the learner holds


@dataclass(slots=True)
class Group:
    """The live tickets of a group, and its dead letters so far. It is closed while none of its tickets is open."""

    ticket_ids: set[str] = field(default_factory=set)
    num_open: int = 0
    num_dead: int = 0


class TicketTable:
    """All live tickets. `counts[state, mode]` is a gauge for live states and a total for ends.

    The two heaps are lazy: what is popped counts only if its ticket is still in the state it was queued for.
    """

    def __init__(self, restored: Iterable[Restored], ended: Mapping[tuple[T, Mode], int], next_seq: int) -> None:
        self.counts: Counter[tuple[T, Mode]] = Counter(ended)
        self.entries: dict[str, Entry] = {}
        self.assigned: set[str] = set()
        self.schedule = Schedule()
        self._groups: dict[str, Group] = {}
        self._next_seq = next_seq
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
        ticket = entry.ticket
        self.entries[ticket.ticket_id] = entry
        self.counts[entry.state, ticket.mode] += 1
        if ticket.group_id not in self._groups:
            self._groups[ticket.group_id] = Group()
        self._groups[ticket.group_id].ticket_ids.add(ticket.ticket_id)
        self._count_in_group(entry, None, entry.state)
        self._enqueue(entry)

    def members(self, group_id: str) -> list[str]:
        """Ids of the live tickets of a group, in the order of their issue."""
        group = self._groups.get(group_id, Group())
        return sorted(group.ticket_ids, key=lambda ticket_id: self.entries[ticket_id].seq)

    def closing(self, entry: Entry) -> list[Count]:
        """What to count if the group has closed with this ticket, which is open no more."""
        group = self._groups[entry.ticket.group_id]
        if group.num_open:
            return []
        return [Count("group_short" if group.num_dead else "group_complete", env=entry.ticket.task.env)]

    def move(self, ticket_id: str, transition: str) -> Entry:
        """Carry out a transition. AssertionError where the table does not allow it."""
        entry = self.entries[ticket_id]
        origins, target = TRANSITIONS[transition]
        if entry.state not in origins:
            raise AssertionError(f"{transition} of ticket {ticket_id} in state {entry.state}")
        self.counts[entry.state, entry.ticket.mode] -= 1
        self.counts[target, entry.ticket.mode] += 1
        self.assigned.discard(ticket_id)
        if (target in OPEN) != (entry.state in OPEN):
            self._count_in_group(entry, entry.state, target)
        if entry.state in OPEN:
            self._note_lease(entry, target)
            self.schedule.discard(ticket_id)
        entry.state, entry.holder = target, ""
        if target in (T.DELIVERED, T.DEAD) and not entry.result_seq:
            entry.result_seq = self._seq()
        if target is T.ASSIGNED:
            self.assigned.add(ticket_id)
        elif target in _FINAL:
            self._forget(entry)
        else:
            self._enqueue(entry)
        return entry

    def lease(self, ticket_id: str, transition: str, holder: str, expires_at: float) -> Entry:
        """Move a ticket to leased, held by this session until `expires_at`."""
        entry = self.move(ticket_id, transition)
        entry.holder, entry.leased_at, entry.expires_at = holder, self.schedule.now, expires_at
        heapq.heappush(self._expiries, (expires_at, ticket_id))
        return entry

    def bury(self, ticket_id: str) -> None:
        """Forget a dead ticket whose letter was acked."""
        entry = self.entries[ticket_id]
        if entry.state is not T.DEAD:
            raise AssertionError(f"burial of ticket {ticket_id}, which is not dead")
        self._forget(entry)

    def remind(self, ticket_id: str) -> None:
        """Queue a dead letter once more."""
        self._enqueue(self.entries[ticket_id])

    def pop_issued(self) -> str | None:
        """Take the ticket that is to be granted next out of its queue; see `schedule.py`."""
        return self.schedule.take()

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
            self.schedule.add(
                ticket.ticket_id,
                env=ticket.task.env,
                group_id=ticket.group_id,
                seq=entry.seq,
                urgent=ticket.mode in _URGENT,
                num_missing=self._groups[ticket.group_id].num_open,
            )
        elif entry.state in (T.DELIVERED, T.DEAD):
            heapq.heappush(self._results, (entry.result_seq, ticket.ticket_id))

    def _forget(self, entry: Entry) -> None:
        ticket = entry.ticket
        del self.entries[ticket.ticket_id]
        group = self._groups[ticket.group_id]
        group.ticket_ids.remove(ticket.ticket_id)
        if not group.ticket_ids:
            del self._groups[ticket.group_id]

    def _count_in_group(self, entry: Entry, origin: T | None, target: T) -> None:
        group = self._groups[entry.ticket.group_id]
        group.num_dead += (target is T.DEAD) - (origin is T.DEAD)
        group.num_open += (target in OPEN) - (origin in OPEN)
        if target is not T.ISSUED:  # it is told of those when they are added
            self.schedule.set_missing(entry.ticket.task.env, entry.ticket.group_id, group.num_open)

    def _note_lease(self, entry: Entry, target: T) -> None:
        """Training leases count for the environments' shares."""
        if entry.ticket.mode in _URGENT:
            return
        if entry.state is T.LEASED:
            self.schedule.lease_ended(entry.ticket.task.env)
        if target is T.LEASED:
            self.schedule.lease_began(entry.ticket.task.env)
