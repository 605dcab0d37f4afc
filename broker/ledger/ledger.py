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
from typing import Any, Final

from broker.ledger.deliveries import Deliveries
from broker.ledger.events import (
    Ack,
    Action,
    ActorJoined,
    Cancel,
    Count,
    Credit,
    Damaged,
    EndedRow,
    Event,
    Finish,
    Finished,
    HandOver,
    Hold,
    Issue,
    JournalAttempt,
    JournalEnds,
    JournalResults,
    JournalTickets,
    LearnerJoined,
    PartialLost,
    PeerGone,
    Purge,
    Release,
    Renew,
    Reply,
    Requeue,
    Restored,
    Results,
    Resume,
    Settled,
    TakenRow,
    Tick,
    Want,
)
from broker.ledger.leases import Actor, Leases
from broker.ledger.letters import Letters
from broker.ledger.table import OPEN, Counts, Entry, TicketTable, totals
from broker.protocol.commands import SendStatus
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode, Outcome, Ticket

CANCELLED_ERROR = "cancelled by the learner"

_new_row = tuple.__new__  # makes a NamedTuple in half the time that its own constructor takes
_OUTCOME_COUNTS: Final = {outcome: f"outcome_{outcome}" for outcome in Outcome}


class Ledger:
    """The ledger of one broker. `restored`, `ended` and `next_seq` come from the journal.

    Until `grant_from`, no ticket is granted: after a restart, actors that still run an episode get the chance to say so
    before it is given to another. All partials have `max_partial_bytes` of arrays at most.
    """

    def __init__(
        self,
        lease_s: float,
        max_attempts: int,
        restored: Iterable[Restored] = (),
        ended: Mapping[tuple[T, Mode], int] | None = None,
        next_seq: int = 1,
        grant_from: float = float("-inf"),
        max_partial_bytes: int = 256 << 20,
    ) -> None:
        self._table = TicketTable(restored, ended or {}, next_seq)
        self._leases = Leases(self._table, lease_s, max_attempts, grant_from, max_partial_bytes)
        self._deliveries = Deliveries(self._table)
        self._letters = Letters(self._table, CANCELLED_ERROR)
        self._handlers: Mapping[type, Callable[[Any, float], list[Action]]] = {
            Issue: self._issue,
            ActorJoined: lambda event, _: self._leases.joined(event),
            Want: self._want,
            Renew: self._leases.renew,
            Results: self._results,
            Release: lambda event, _: self._leases.release(event),
            HandOver: lambda event, _: self._leases.hand_over(event),
            PartialLost: lambda event, _: self._leases.partial_lost(event),
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

    @property
    def partial_bytes(self) -> int:
        """Bytes of all partials."""
        return self._table.partial_bytes

    def __contains__(self, ticket_id: str) -> bool:
        return ticket_id in self._table.entries

    def without(self, ticket_ids: Iterable[str]) -> list[str]:
        """Those of the ids that are not here: ended, or never known."""
        entries = self._table.entries
        return [ticket_id for ticket_id in ticket_ids if ticket_id not in entries]

    def __len__(self) -> int:
        return len(self._table.entries)

    def handle(self, event: Event, now: float) -> list[Action]:
        """The actions that this event causes, in order. The reply to the event, if any, is among them."""
        self._table.schedule.now = now
        actions = self._handlers[type(event)](event, now)
        actions += self._leases.grant(now)
        actions += self._deliveries.deliver()
        return actions

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
        table, settled_ids = self._table, event.settled_ids
        rows: list[tuple[int, Ticket]] = []
        for ticket in event.tickets:
            if ticket.ticket_id not in table.entries and ticket.ticket_id not in settled_ids:
                rows.append((table.add(ticket).seq, ticket))
        actions: list[Action] = [JournalTickets(tuple(rows))] if rows else []
        return [*actions, Count("issued", len(rows)), Reply(count=len(rows))]

    def _results(self, event: Results, _now: float) -> list[Action]:
        session, table = event.session, self._table
        rows: list[TakenRow] = []
        finished: list[tuple[Ticket, Finish]] = []
        statuses: list[tuple[str, SendStatus]] = []
        late: list[tuple[str, str]] = []  # who holds a ticket whose result somebody else has sent
        counts: Counts = {}
        ended: dict[str, int] = {}  # training leases by environment
        entry_of, release, take = table.entries.get, self._leases.drop, table.take_result
        outcome, env, num_outcomes, num_accepted = None, "", 0, 0  # counted in runs of the same
        for index, (ticket_id, finish, settled) in enumerate(event.results):
            entry = entry_of(ticket_id)
            if entry is None or entry.state not in OPEN:
                name, status = _no_first_result(session, entry, settled)
                statuses.append((ticket_id, status))
                counts[name, ""] = counts.get((name, ""), 0) + 1
                continue
            ticket = entry.ticket
            if entry.holder == session:
                num_accepted += 1
                statuses.append((ticket_id, "accepted"))
            else:  # as good as any: the first one counts, whoever sends it
                late.append((entry.holder, ticket_id))
                statuses.append((ticket_id, "late"))
            release(entry)
            take(entry, session, counts, ended)
            if finish[0] is not outcome or ticket.task.env != env:
                _count_outcomes(outcome, env, num_outcomes, counts)
                outcome, env, num_outcomes = finish[0], ticket.task.env, 0
            num_outcomes += 1
            rows.append(_new_row(TakenRow, (index, entry.seq, entry.result_seq, ticket_id)))
            finished.append((ticket, finish))
        for env_ended, num in ended.items():
            table.schedule.lease_ended(env_ended, num)
        _count_outcomes(outcome, env, num_outcomes, counts)
        counts |= {(name, ""): num for name, num in (("accepted", num_accepted), ("late", len(late))) if num}
        actions: list[Action] = []
        if rows:
            actions += [JournalResults(session, tuple(rows)), Finished(tuple(finished))]
        if late:
            actions += self._leases.withdrawals(late)
        return [*actions, *totals(counts), Reply(statuses=tuple(statuses))]

    def _cancel(self, event: Cancel, _now: float) -> list[Action]:
        entries = self._table.entries
        if event.everything:
            ids = list(entries)
        else:
            ids = [*event.ticket_ids, *(key for group_id in event.group_ids for key in self._table.members(group_id))]
        open_entries = [entries[key] for key in dict.fromkeys(ids) if key in entries and entries[key].state in OPEN]
        told = self._leases.withdrawals([(entry.holder, entry.ticket.ticket_id) for entry in open_entries])
        actions = self._drop(open_entries) if event.everything else self._withdraw(open_entries)
        num = len(open_entries)
        return [*actions, *told, Count("cancelled", num), Reply(count=num)]

    def _drop(self, entries: list[Entry]) -> list[Action]:
        """Nobody waits for their groups any more: the tickets leave without a word."""
        for entry in entries:
            self._leases.end(entry, "cancel")
        rows = (EndedRow(entry.seq, entry.ticket.ticket_id, entry.ticket.mode, entry.state) for entry in entries)
        return [JournalEnds(tuple(rows))] if entries else []

    def _withdraw(self, entries: list[Entry]) -> list[Action]:
        """Their groups live on and must close, also for a learner that resumes: dead letters stand in their place."""
        counts: Counts = {}
        actions: list[Action] = []
        for entry in entries:
            self._leases.end(entry, "withdraw")
            entry.error = CANCELLED_ERROR
            ticket_id, attempt = entry.ticket.ticket_id, entry.ticket.attempt
            actions.append(
                JournalAttempt(entry.seq, ticket_id, attempt, entry.error, dead=True, result_seq=entry.result_seq)
            )
            self._table.count_closing(entry, counts)
        return [*actions, *totals(counts)]


def _count_outcomes(outcome: Outcome | None, env: str, num: int, counts: Counts) -> None:
    if outcome is not None:
        key = _OUTCOME_COUNTS[outcome], env
        counts[key] = counts.get(key, 0) + num


def _no_first_result(session: str, entry: Entry | None, settled: Settled | None) -> tuple[str, SendStatus]:
    """The name under which it is counted, and the answer."""
    known = Settled(entry.state, entry.source) if entry is not None else settled
    if known is None or known.state in (T.DEAD, T.CANCELLED):
        return "unwanted", "unwanted"
    if known.source == session:  # the same send again, after a reconnection
        return "repeated", "accepted"
    return "duplicate", "duplicate"
