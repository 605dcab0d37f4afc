"""The live tickets of the ledger: their states, the legal transitions, their groups, and the queues they wait in.

A pure data structure. Owns `TRANSITIONS`, the one table of what may become what. Decides nothing: the ledger says which
transition, this refuses it where it is illegal. A ticket that reaches a final state leaves at once, a group with its
last ticket.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
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

# Looking a member up in its class costs more than all else that a comparison does.
_ISSUED, _LEASED, _DELIVERED, _ASSIGNED, _DEAD = T.ISSUED, T.LEASED, T.DELIVERED, T.ASSIGNED, T.DEAD
_STATES: Final = tuple(T)
_ISSUED_PLACE, _LEASED_PLACE, _DELIVERED_PLACE = map(_STATES.index, (_ISSUED, _LEASED, _DELIVERED))
_FINAL: Final = frozenset({T.ACKED, T.CANCELLED})
_URGENT: Final = frozenset({Mode.EVAL, Mode.REFERENCE})  # the learner waits for these

Counts = dict[tuple[str, str], int]
"""What one event adds to the totals, by name and environment ("" where a total has none)."""


def totals(counts: Counts) -> list[Count]:
    """The actions that say so."""
    return [Count(name, num, env) for (name, env), num in counts.items()]


@dataclass(frozen=True, slots=True)
class _Step:
    """A transition from one of its states, with all that a move has to know of it. Places are those of a tally."""

    origin: T
    target: T
    origin_place: int
    target_place: int
    open_change: int  # in the numbers of its group
    dead_change: int


def _steps(origins: frozenset[T], target: T) -> tuple[_Step, ...]:
    """The usual one first: a ticket that goes on has mostly come furthest."""
    return tuple(
        _Step(
            origin,
            target,
            _STATES.index(origin),
            _STATES.index(target),
            (target in OPEN) - (origin in OPEN),
            (target is T.DEAD) - (origin is T.DEAD),
        )
        for origin in reversed(_STATES)
        if origin in origins
    )


_STEPS: Final = {transition: _steps(*states) for transition, states in TRANSITIONS.items()}


@dataclass(slots=True)
class Group:
    """The live tickets of a group, and its dead letters so far. It is closed while none of its tickets is open."""

    ticket_ids: set[str] = field(default_factory=set)
    num_open: int = 0
    num_dead: int = 0
    num_issued: int = 0


@dataclass(slots=True)
class Entry:
    """One live ticket. `holder`, `leased_at`, `expires_at`: while leased. `source`: the session whose result it is.

    `group`, `tally` (the counts of its mode) and `urgent` follow from the ticket; they are here because they are needed
    at every move."""

    seq: int
    ticket: Ticket
    group: Group
    tally: list[int]
    urgent: bool
    state: T = T.ISSUED
    holder: str = ""
    leased_at: float = 0.0
    expires_at: float = 0.0
    result_seq: int = 0
    source: str = ""
    error: str = ""
    partial_bytes: int = 0  # of the partial that the next lease begins with; 0 where there is none
    announced: bool = False  # a dead letter that the learner holds


class TicketTable:
    """All live tickets, and how many there are of each state and mode."""

    def __init__(self, restored: Iterable[Restored], ended: Mapping[tuple[T, Mode], int], next_seq: int) -> None:
        self.entries: dict[str, Entry] = {}
        self.schedule = Schedule()
        self.partial_bytes = 0
        """Of all partials."""
        self._groups: dict[str, Group] = {}
        self._next_seq = next_seq
        self._tallies: dict[Mode, list[int]] = {}  # by state, in the order of _STATES
        # In the order of their expiry: time does not go back, and all leases are granted and renewed for as long.
        self._leases: OrderedDict[str, Entry] = OrderedDict()
        # What the learner is to get: what is new, in order, and lazily by (result_seq, id) what was there before.
        self._new_results: deque[Entry] = deque()
        self._old_results: list[tuple[int, str]] = []
        for (state, mode), num in ended.items():
            self._tally(mode)[_STATES.index(state)] += num
        for row in restored:
            entry = self._insert(row.seq, row.ticket, row.state)
            entry.result_seq, entry.source, entry.error = row.result_seq, row.source, row.error
            self.set_partial(entry, row.partial_bytes)
            if row.state is not _ISSUED:
                self.queue_again(entry)

    @property
    def counts(self) -> Counter[tuple[T, Mode]]:
        """By state and mode: a gauge for live states, a total for ends."""
        counts = Counter[tuple[T, Mode]]()
        for mode, tally in self._tallies.items():
            counts.update({(state, mode): num for state, num in zip(_STATES, tally, strict=True)})
        return counts

    def add(self, ticket: Ticket) -> Entry:
        """A new ticket, issued, at the end of the queue."""
        return self._insert(self._seq(), ticket, _ISSUED)

    def _insert(self, seq: int, ticket: Ticket, state: T) -> Entry:
        group = self._groups.get(ticket.group_id)
        if group is None:
            group = self._groups[ticket.group_id] = Group()
        group.ticket_ids.add(ticket.ticket_id)
        group.num_open += state in OPEN
        group.num_dead += state is _DEAD
        tally = self._tally(ticket.mode)
        tally[_STATES.index(state)] += 1
        entry = self.entries[ticket.ticket_id] = Entry(seq, ticket, group, tally, ticket.mode in _URGENT, state)
        if state is _ISSUED:
            self._wait(entry)
        return entry

    def _tally(self, mode: Mode) -> list[int]:
        tally = self._tallies.get(mode)
        if tally is None:
            tally = self._tallies[mode] = [0] * len(_STATES)
        return tally

    def members(self, group_id: str) -> list[str]:
        """Ids of the live tickets of a group, in the order of their issue."""
        group = self._groups.get(group_id, Group())
        return sorted(group.ticket_ids, key=lambda ticket_id: self.entries[ticket_id].seq)

    def count_closing(self, entry: Entry, counts: Counts) -> None:
        """Count the group if it has closed with this ticket, which is open no more."""
        group = entry.group
        if not group.num_open:
            key = "group_short" if group.num_dead else "group_complete", entry.ticket.task.env
            counts[key] = counts.get(key, 0) + 1

    # --- the life of a ticket

    def move(self, entry: Entry, transition: str) -> None:
        """Carry out a transition. AssertionError where the table does not allow it."""
        origin = entry.state
        for step in _STEPS[transition]:
            if step.origin is origin:
                break
        else:
            raise AssertionError(f"{transition} of ticket {entry.ticket.ticket_id} in state {origin}")
        entry.state = target = step.target
        entry.tally[step.origin_place] -= 1
        entry.tally[step.target_place] += 1
        if origin is _LEASED:
            entry.holder = ""
            del self._leases[entry.ticket.ticket_id]
            if not entry.urgent:
                self.schedule.lease_ended(entry.ticket.task.env)
        elif origin is _ISSUED:
            self.schedule.discard(entry.ticket.ticket_id)
            entry.group.num_issued -= 1
        if step.open_change or step.dead_change:
            if entry.partial_bytes:  # nobody is to go on with it
                self.set_partial(entry, 0)
            group = entry.group
            group.num_open += step.open_change
            group.num_dead += step.dead_change
            if group.num_issued:  # others of the group wait
                self.schedule.set_missing(entry.ticket.task.env, entry.ticket.group_id, group.num_open)
        if target is _DELIVERED or target is _DEAD:
            self._queue_result(entry)
        elif target is _ISSUED:
            self._wait(entry)
        elif target in _FINAL:
            self._forget(entry)

    def take_result(self, entry: Entry, source: str, counts: Counts, ended: dict[str, int]) -> None:
        """The first result of a ticket, of this session; counts its group if it closes with it.

        This is `move(entry, "result")`, written out because it comes once for each trajectory. Training leases that end
        are counted in `ended`, by environment: the schedule is to be told of them together."""
        state, ticket, group, tally = entry.state, entry.ticket, entry.group, entry.tally
        assert state is _LEASED or state is _ISSUED, "the table allows a result of these alone"
        if state is _LEASED:
            tally[_LEASED_PLACE] -= 1
            entry.holder = ""
            del self._leases[ticket.ticket_id]
            if not entry.urgent:
                env = ticket.task.env
                ended[env] = ended.get(env, 0) + 1
        else:
            tally[_ISSUED_PLACE] -= 1
            self.schedule.discard(ticket.ticket_id)
            group.num_issued -= 1
        tally[_DELIVERED_PLACE] += 1
        entry.state, entry.source = _DELIVERED, source
        if entry.partial_bytes:
            self.set_partial(entry, 0)
        group.num_open = num_open = group.num_open - 1
        if group.num_issued:  # others of the group wait
            self.schedule.set_missing(ticket.task.env, ticket.group_id, num_open)
        elif not num_open:
            self.count_closing(entry, counts)
        self._queue_result(entry)

    def lease(self, entry: Entry, transition: str, holder: str, expires_at: float) -> None:
        """Move a ticket to leased, held by this session until `expires_at`, which is not before that of any other."""
        self.move(entry, transition)
        entry.holder, entry.leased_at, entry.expires_at = holder, self.schedule.now, expires_at
        self._leases[entry.ticket.ticket_id] = entry
        if not entry.urgent:  # training leases count for the environments' shares
            self.schedule.lease_began(entry.ticket.task.env)

    def renew(self, entry: Entry, expires_at: float) -> None:
        """A lease lasts until `expires_at`, which is not before that of any other."""
        entry.expires_at = expires_at
        self._leases.move_to_end(entry.ticket.ticket_id)

    def set_partial(self, entry: Entry, num_bytes: int) -> None:
        """The ticket has a partial of so many bytes in the place of the one before, or none."""
        self.partial_bytes += num_bytes - entry.partial_bytes
        entry.partial_bytes = num_bytes

    def bury(self, entry: Entry) -> None:
        """Forget a dead ticket whose letter was acked."""
        if entry.state is not _DEAD:
            raise AssertionError(f"burial of ticket {entry.ticket.ticket_id}, which is not dead")
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        ticket, ticket_ids = entry.ticket, entry.group.ticket_ids
        del self.entries[ticket.ticket_id]
        ticket_ids.remove(ticket.ticket_id)
        if not ticket_ids:
            del self._groups[ticket.group_id]

    def _seq(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1

    # --- the queues

    def pop_issued(self) -> Entry | None:
        """Take the ticket that is to be granted next out of its queue; see `schedule.py`."""
        ticket_id = self.schedule.take()
        return None if ticket_id is None else self.entries[ticket_id]

    def expired(self, now: float) -> list[Entry]:
        """The leased tickets whose leases have run out."""
        return list(takewhile(lambda entry: entry.expires_at <= now, self._leases.values()))

    def pop_result(self) -> Entry | None:
        """Take the oldest result or dead letter that the learner does not hold."""
        new, old = self._new_results, self._old_results
        while new or old:
            if old and (not new or old[0][0] < new[0].result_seq):
                entry = self.entries.get(heapq.heappop(old)[1])
            else:
                entry = new.popleft()
            if entry is None:
                continue
            if entry.state is _DELIVERED:
                return entry
            if entry.state is _DEAD and not entry.announced and self.entries.get(entry.ticket.ticket_id) is entry:
                return entry
        return None

    def _queue_result(self, entry: Entry) -> None:
        if entry.result_seq:
            self.queue_again(entry)
        else:
            entry.result_seq = seq = self._next_seq
            self._next_seq = seq + 1
            self._new_results.append(entry)

    def queue_again(self, entry: Entry) -> None:
        """Put a result or dead letter back where it was in the order of arrival; more than once does no harm."""
        heapq.heappush(self._old_results, (entry.result_seq, entry.ticket.ticket_id))

    def _wait(self, entry: Entry) -> None:
        ticket = entry.ticket
        entry.group.num_issued += 1
        self.schedule.add(
            ticket.ticket_id,
            env=ticket.task.env,
            group_id=ticket.group_id,
            seq=entry.seq,
            urgent=entry.urgent,
            num_missing=entry.group.num_open,
        )
