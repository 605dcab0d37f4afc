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
    JournalEnd,
    JournalRecall,
    LearnerJoined,
    Reply,
    Resume,
    Settle,
)
from broker.ledger.table import OPEN, TicketTable
from broker.protocol.commands import TicketState as T


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
        returned = sorted(self._table.assigned - held)
        for ticket_id in returned:
            self._table.move(ticket_id, "redeliver")
        for ticket_id, entry in self._table.entries.items():
            if entry.state is T.DEAD:
                entry.announced = ticket_id in held
                self._table.remind(ticket_id)
        for ticket_id in sorted(held & self._table.entries.keys()):
            if self._table.entries[ticket_id].state is T.DELIVERED:
                self._table.move(ticket_id, "keep")
        self._resumed = True
        return [*actions, Reply(count=num_acked, returned=len(returned))]

    def add_credit(self, event: Credit) -> None:
        """The learner is ready for more."""
        if event.session == self._learner:
            self._credit = max(self._credit, event.credit)

    def deliver(self) -> list[Action]:
        """Send what is ready, within the credit, in the order of arrival."""
        actions: list[Action] = []
        while self._resumed and self._sent < self._credit:
            entry = self._table.pop_result()
            if entry is None:
                break
            ticket = entry.ticket
            if entry.state is T.DELIVERED:
                self._table.move(ticket.ticket_id, "deliver")
                actions.append(Deliver(self._learner, ticket.ticket_id))
            else:
                entry.announced = True
                actions.append(AnnounceDead(self._learner, ticket.ticket_id, ticket.group_id, ticket.mode, entry.error))
            self._sent += 1
        return actions

    def damaged(self, event: Damaged) -> list[Action]:
        """What the learner was to get cannot be read: the episode is run again. It cost the ticket no attempt."""
        entry = self._table.entries.get(event.ticket_id)
        if entry is None or entry.state not in (T.DELIVERED, T.ASSIGNED):
            return []
        if event.session == self._learner:
            self._sent -= 1  # nothing was sent
        entry.result_seq, entry.source = 0, ""
        self._table.move(event.ticket_id, "recall")
        return [JournalRecall(event.ticket_id), Count("damaged")]

    def ack(self, event: Ack) -> list[Action]:
        """A complete checkpoint contains these."""
        actions, num = self._ack_ids(event.ticket_ids, event.dropped)
        return [*actions, Reply(count=num)]

    def _ack_ids(self, ticket_ids: Iterable[str], dropped: frozenset[str] = frozenset()) -> tuple[list[Action], int]:
        actions: list[Action] = []
        num = 0
        for ticket_id in ticket_ids:
            entry = self._table.entries.get(ticket_id)
            if entry is None or entry.state in OPEN:
                continue
            num += 1
            if entry.state is T.DEAD:
                self._table.bury(ticket_id)
            else:
                self._table.move(ticket_id, "ack")
                actions.append(Settle(ticket_id, consumed=ticket_id not in dropped))
            actions.append(JournalEnd(ticket_id, entry.state))
        return [*actions, Count("acked", num)], num
