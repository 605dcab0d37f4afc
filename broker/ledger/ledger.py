"""The life of every ticket, as a pure state machine: `Ledger.handle(event, now) -> actions`.

Owns what a ticket becomes when: the actors' half is in `leases.py`, the learner's in `deliveries.py`, the operator's in
`letters.py`, the legal transitions in `table.py`, who is next in `schedule.py`. Does no I/O, reads no clock
(`now` is any monotonic number of seconds) and never holds a token array. Memory and the cost of an event grow with the
tickets that are alive, not with those that are done: an ended ticket leaves the ledger, and what became of it is the
journal's to know. Events that may meet an ended ticket therefore carry the journal's word, `settled`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from broker.ledger.deliveries import Deliveries
from broker.ledger.events import (
    Ack,
    Action,
    ActorJoined,
    Cancel,
    Count,
    Credit,
    Damaged,
    Event,
    Finished,
    Hold,
    Issue,
    JournalAttempt,
    JournalEnd,
    JournalResult,
    JournalTicket,
    LearnerJoined,
    PeerGone,
    Purge,
    Release,
    Renew,
    Reply,
    Requeue,
    Restored,
    Result,
    Resume,
    Settled,
    Tick,
    Want,
)
from broker.ledger.leases import Actor, Leases
from broker.ledger.letters import Letters
from broker.ledger.table import OPEN, Entry, TicketTable
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode

CANCELLED_ERROR = "cancelled by the learner"


class Ledger:
    """The ledger of one broker. `restored`, `ended` and `next_seq` come from the journal.

    Until `grant_from`, no ticket is granted: after a restart, actors that still run an episode get the chance to say so
    before it is given to another.
    """

    def __init__(
        self,
        lease_s: float,
        max_attempts: int,
        restored: Iterable[Restored] = (),
        ended: Mapping[tuple[T, Mode], int] | None = None,
        next_seq: int = 1,
        grant_from: float = float("-inf"),
    ) -> None:
        self._table = TicketTable(restored, ended or {}, next_seq)
        self._leases = Leases(self._table, lease_s, max_attempts, grant_from)
        self._deliveries = Deliveries(self._table)
        self._letters = Letters(self._table, CANCELLED_ERROR)
        self._handlers: Mapping[type, Callable[[Any, float], list[Action]]] = {
            Issue: self._issue,
            ActorJoined: lambda event, _: self._leases.joined(event),
            Want: self._want,
            Renew: self._leases.renew,
            Result: self._result,
            Release: lambda event, _: self._leases.release(event),
            PeerGone: self._peer_gone,
            LearnerJoined: self._learner_joined,
            Resume: lambda event, _: self._deliveries.resume(event),
            Credit: self._credit,
            Ack: lambda event, _: self._deliveries.ack(event),
            Cancel: self._cancel,
            Damaged: lambda event, _: self._deliveries.damaged(event),
            Requeue: lambda event, _: self._letters.requeue(event),
            Purge: lambda event, _: self._letters.purge(event),
            Hold: self._hold,
            Tick: lambda _, now: self._leases.expire(now),
        }

    @property
    def counts(self) -> Counter[tuple[T, Mode]]:
        """Tickets by state and mode: a gauge for live states, a total for ends."""
        return self._table.counts

    @property
    def entries(self) -> Collection[Entry]:
        """All live tickets, to be looked at."""
        return self._table.entries.values()

    @property
    def actors(self) -> dict[str, Actor]:
        """Actors by session, to be looked at."""
        return self._leases.actors

    def __contains__(self, ticket_id: str) -> bool:
        return ticket_id in self._table.entries

    def __len__(self) -> int:
        return len(self._table.entries)

    def handle(self, event: Event, now: float) -> list[Action]:
        """The actions that this event causes, in order. The reply to the event, if any, is among them."""
        self._table.schedule.now = now
        return [*self._handlers[type(event)](event, now), *self._leases.grant(now), *self._deliveries.deliver()]

    # --- peers come and go

    def _want(self, event: Want, _now: float) -> list[Action]:
        self._leases.want(event)
        return []

    def _credit(self, event: Credit, _now: float) -> list[Action]:
        self._deliveries.add_credit(event)
        return []

    def _learner_joined(self, event: LearnerJoined, _now: float) -> list[Action]:
        self._deliveries.joined(event)
        return []

    def _peer_gone(self, event: PeerGone, _now: float) -> list[Action]:
        self._deliveries.gone(event.session)
        self._leases.gone(event.session)
        return []

    def _hold(self, event: Hold, _now: float) -> list[Action]:
        self._leases.on_hold = event.on
        return []

    # --- tickets

    def _issue(self, event: Issue, _now: float) -> list[Action]:
        actions: list[Action] = []
        for ticket in event.tickets:
            if ticket.ticket_id not in self._table.entries and ticket.ticket_id not in event.settled_ids:
                actions.append(JournalTicket(self._table.add(ticket).seq, ticket))
        return [*actions, Count("issued", len(actions)), Reply(count=len(actions))]

    def _result(self, event: Result, _now: float) -> list[Action]:
        entry = self._table.entries.get(event.ticket_id)
        if entry is not None and entry.state in OPEN:
            return self._first_result(event, entry.holder)
        known = Settled(entry.state, entry.source) if entry is not None else event.settled
        if known is None or known.state in (T.DEAD, T.CANCELLED):
            return [Count("unwanted"), Reply(status="unwanted")]
        if known.source == event.session:  # the same send again, after a reconnection
            return [Count("repeated"), Reply(status="accepted")]
        return [Count("duplicate"), Reply(status="duplicate")]

    def _first_result(self, event: Result, holder: str) -> list[Action]:
        """A late result is as good as any: the first one counts, whoever sends it."""
        entry = self._leases.end(event.ticket_id, "result")
        entry.source = event.session
        late = holder != event.session
        status = "late" if late else "accepted"
        return [
            JournalResult(entry.result_seq, event.ticket_id, event.session),
            Count(status),
            Count(f"outcome_{event.finish.outcome}", env=entry.ticket.task.env),
            Finished(entry.ticket, event.finish),
            *self._table.closing(entry),
            *(self._leases.withdrawals([(holder, event.ticket_id)]) if late else ()),
            Reply(status="late" if late else "accepted"),
        ]

    def _cancel(self, event: Cancel, _now: float) -> list[Action]:
        entries = self._table.entries
        if event.everything:
            ids = list(entries)
        else:
            ids = [*event.ticket_ids, *(key for group_id in event.group_ids for key in self._table.members(group_id))]
        open_ids = [key for key in dict.fromkeys(ids) if key in entries and entries[key].state in OPEN]
        held = [(entries[ticket_id].holder, ticket_id) for ticket_id in open_ids]
        ends = [action for key in open_ids for action in (self._drop(key) if event.everything else self._withdraw(key))]
        told = self._leases.withdrawals(held)
        return [*ends, *told, Count("cancelled", len(open_ids)), Reply(count=len(open_ids))]

    def _drop(self, ticket_id: str) -> list[Action]:
        """Nobody waits for its group any more: the ticket leaves without a word."""
        self._leases.end(ticket_id, "cancel")
        return [JournalEnd(ticket_id, T.CANCELLED)]

    def _withdraw(self, ticket_id: str) -> list[Action]:
        """Its group lives on and must close, also for a learner that resumes: a dead letter stands in its place."""
        entry = self._leases.end(ticket_id, "withdraw")
        entry.error = CANCELLED_ERROR
        attempt = entry.ticket.attempt
        dead = JournalAttempt(ticket_id, attempt, entry.error, dead=True, seq=entry.result_seq)
        return [dead, *self._table.closing(entry)]
