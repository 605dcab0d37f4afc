"""The learner's half of the ledger: what it is sent, what it holds, what it has done with it.

Works on the ledger's `TicketTable`. Owns the learner's session and credit; never touches an open ticket.
"""

from __future__ import annotations

from collections.abc import Iterable

from broker.ledger.events import (
    Ack,
    Action,
    AnnounceDead,
    Count,
    Credit,
    Damaged,
    Deliver,
    EndedRow,
    JournalEnds,
    JournalRecall,
    LearnerJoined,
    Reply,
    Resume,
    Settle,
)
from broker.ledger.table import OPEN, TicketTable
from broker.protocol.commands import TicketState as T

_new_row = tuple.__new__  # makes a NamedTuple in half the time that its own constructor takes
_DELIVERED, _DEAD = T.DELIVERED, T.DEAD  # looked up once: a member costs more to look up than to compare


class Deliveries:
    """Results and dead letters on their way to the one learner."""

    def __init__(self, table: TicketTable) -> None:
        self._table = table
        self._learner = ""
        self._resumed = False
        self._credit = self._sent = 0

    def joined(self, event: LearnerJoined) -> None:
        """HELLO; nothing is delivered before RESUME."""
        self._learner, self._resumed = event.session, False
        self._credit = self._sent = 0

    def gone(self, session: str) -> None:
        """The learner cannot be reached."""
        if session == self._learner:
            self._learner, self._resumed = "", False

    def resume(self, event: Resume) -> list[Action]:
        """The learner says what it has done with and what it holds; the rest of what was assigned goes out again."""
        if event.session != self._learner:
            return [Reply()]
        actions, num_acked = self._ack_ids(event.acked)
        held = frozenset(event.held)
        num_returned = 0
        for ticket_id, entry in self._table.entries.items():
            if entry.state is T.DEAD:
                entry.announced = ticket_id in held
                self._table.queue_again(entry)
            elif entry.state is T.ASSIGNED and ticket_id not in held:
                self._table.move(entry, "redeliver")
                num_returned += 1
            elif entry.state is T.DELIVERED and ticket_id in held:
                self._table.move(entry, "keep")
        self._resumed = True
        return [*actions, Reply(count=num_acked, returned=num_returned)]

    def add_credit(self, event: Credit) -> None:
        """The learner is ready for more."""
        if event.session == self._learner:
            self._credit = max(self._credit, event.credit)

    def deliver(self) -> list[Action]:
        """Send what is ready, within the credit, in the order of arrival."""
        actions: list[Action] = []
        if not self._resumed:
            return actions
        table = self._table
        ready: list[str] = []  # results without a dead letter in between
        while self._sent < self._credit and (entry := table.pop_result()) is not None:
            self._sent += 1
            ticket = entry.ticket
            if entry.state is _DELIVERED:
                table.move(entry, "deliver")
                ready.append(ticket.ticket_id)
                continue
            if ready:
                actions.append(Deliver(self._learner, tuple(ready)))
                ready = []
            entry.announced = True
            actions.append(AnnounceDead(self._learner, ticket.ticket_id, ticket.group_id, ticket.mode, entry.error))
        if ready:
            actions.append(Deliver(self._learner, tuple(ready)))
        return actions

    def damaged(self, event: Damaged) -> list[Action]:
        """What the learner was to get cannot be read: the episode is run again. It cost the ticket no attempt."""
        entry = self._table.entries.get(event.ticket_id)
        if entry is None or entry.state not in (T.DELIVERED, T.ASSIGNED):
            return []
        if event.session == self._learner:
            self._sent -= 1  # nothing was sent
        entry.result_seq, entry.source = 0, ""
        self._table.move(entry, "recall")
        return [JournalRecall(entry.seq, event.ticket_id), Count("damaged")]

    def ack(self, event: Ack) -> list[Action]:
        """A complete checkpoint contains these."""
        actions, num = self._ack_ids(event.ticket_ids, event.dropped)
        return [*actions, Reply(count=num)]

    def _ack_ids(self, ticket_ids: Iterable[str], dropped: frozenset[str] = frozenset()) -> tuple[list[Action], int]:
        table = self._table
        entries = table.entries
        settled: list[str] = []
        rows: list[EndedRow] = []
        for ticket_id in ticket_ids:
            entry = entries.get(ticket_id)
            if entry is None or entry.state in OPEN:
                continue
            if entry.state is _DEAD:
                table.bury(entry)
            else:
                table.move(entry, "ack")
                settled.append(ticket_id)
            rows.append(_new_row(EndedRow, (entry.seq, ticket_id, entry.ticket.mode, entry.state)))
        actions: list[Action] = []
        if settled:
            actions.append(Settle(tuple(settled), dropped.intersection(settled) if dropped else dropped))
        if rows:
            actions.append(JournalEnds(tuple(rows)))
        return [*actions, Count("acked", len(rows))], len(rows)
