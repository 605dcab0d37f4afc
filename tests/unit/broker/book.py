"""A ledger with a clock, and a dictionary for a journal."""

from __future__ import annotations

import dataclasses
from collections import Counter

from msgspec.structs import replace

from broker.ledger.events import (
    Action,
    ActorJoined,
    AnnounceDead,
    Arrived,
    Count,
    Credit,
    Deliver,
    Event,
    Finish,
    GoOn,
    Grant,
    HandOver,
    Issue,
    JournalAttempt,
    JournalEnds,
    JournalPartial,
    JournalPurge,
    JournalRecall,
    JournalResults,
    JournalTickets,
    LearnerJoined,
    Renew,
    Reply,
    Restored,
    Results,
    Resume,
    Settled,
    Want,
    Withdraw,
)
from broker.ledger.ledger import Ledger
from broker.ledger.letters import PURGED
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode, Outcome, Ticket
from tests.unit.broker.samples import make_ticket

LEASE_S = 10.0
MAX_PARTIAL_BYTES = 1000
FINISH = Finish(Outcome.COMPLETED, 1.0, 2.0)


def ticket_of(ticket_id: str, mode: Mode = Mode.TRAIN, group_id: str | None = None, env: str = "shop") -> Ticket:
    """A ticket of this group and environment."""
    ticket = make_ticket(ticket_id, mode)
    task = replace(ticket.task, env=env)
    return replace(ticket, task=task, group_id=group_id or ticket.group_id)


def one(session: str, ticket_id: str, finish: Finish = FINISH) -> Results:
    """A parcel of one."""
    return Results(session, (Arrived(ticket_id, finish),))


class Book:
    """The ledger, and what its journal would hold. `do` checks what may be written when."""

    def __init__(self, max_attempts: int = 3) -> None:
        self.now = 0.0
        self.max_attempts = max_attempts
        self.ledger = Ledger(LEASE_S, max_attempts, max_partial_bytes=MAX_PARTIAL_BYTES)
        self.rows: dict[str, Restored] = {}
        self.ended: dict[str, Settled] = {}
        self.ended_modes: dict[str, Mode] = {}

    def do(self, event: Event) -> list[Action]:
        actions = self.ledger.handle(event, self.now)
        for action in actions:
            self.write(action, event)
        counted = [(action.name, action.env) for action in actions if isinstance(action, Count)]
        assert len(counted) == len(set(counted)), "counted in two actions"
        return actions

    def write(self, action: Action, event: Event) -> None:
        match action:
            case JournalTickets(tickets):
                assert tickets, "an action about nothing"
                for seq, ticket in tickets:
                    assert ticket.ticket_id not in self.rows
                    assert ticket.ticket_id not in self.ended, "an ended ticket lives a second time"
                    self.rows[ticket.ticket_id] = Restored(seq, ticket, T.ISSUED)
            case JournalResults(source, taken):
                assert taken, "an action about nothing"
                for _, seq, result_seq, ticket_id in taken:
                    row = self.row(seq, ticket_id)
                    assert row.state is T.ISSUED, "a second result was taken"
                    self.rows[ticket_id] = Restored(row.seq, row.ticket, T.DELIVERED, result_seq, source)
            case JournalAttempt(seq, ticket_id, attempt, error, dead, result_seq):
                row = self.row(seq, ticket_id)
                ticket = replace(row.ticket, attempt=attempt)
                self.rows[ticket_id] = Restored(row.seq, ticket, T.DEAD if dead else T.ISSUED, result_seq, "", error)
            case JournalPartial(seq, ticket_id, lost):
                row = self.row(seq, ticket_id)
                assert row.state is T.ISSUED, "a partial of a ticket that has an end"
                assert isinstance(event, HandOver) or lost
                num_bytes = event.num_bytes if isinstance(event, HandOver) else 0
                self.rows[ticket_id] = dataclasses.replace(row, partial_bytes=num_bytes)
            case JournalRecall(seq, ticket_id):
                row = self.row(seq, ticket_id)
                assert row.state is T.DELIVERED, "recalled without a result"
                self.rows[ticket_id] = Restored(row.seq, row.ticket, T.ISSUED)
            case JournalPurge(seq, ticket_id, error):
                row = self.row(seq, ticket_id)
                assert row.state is T.DEAD, "purged although it is no dead letter"
                self.rows[ticket_id] = Restored(row.seq, row.ticket, T.DEAD, row.result_seq, PURGED, error)
            case JournalEnds(ended):
                assert ended, "an action about nothing"
                for seq, ticket_id, mode, state in ended:
                    row = self.row(seq, ticket_id)
                    assert row.ticket.mode is mode
                    del self.rows[ticket_id]
                    self.ended[ticket_id] = Settled(state, row.source)
                    self.ended_modes[ticket_id] = mode

    def row(self, seq: int, ticket_id: str) -> Restored:
        """What the journal has of a ticket, which the ledger must name by its key."""
        row = self.rows[ticket_id]
        assert row.seq == seq
        return row

    def restart(self) -> None:
        ended = Counter((settled.state, self.ended_modes[key]) for key, settled in self.ended.items())
        seq = 1 + max((max(row.seq, row.result_seq) for row in self.rows.values()), default=0)
        rows = sorted(self.rows.values(), key=lambda row: row.seq)
        self.ledger = Ledger(LEASE_S, self.max_attempts, rows, ended, seq, max_partial_bytes=MAX_PARTIAL_BYTES)

    def settled(self, ticket_id: str) -> Settled | None:
        return None if ticket_id in self.ledger else self.ended.get(ticket_id)

    def issue(self, *ticket_ids: str, mode: Mode = Mode.TRAIN) -> list[Action]:
        tickets = tuple(make_ticket(ticket_id, mode) for ticket_id in ticket_ids)
        return self.do(Issue(tickets, frozenset(key for key in ticket_ids if self.settled(key))))

    def join(
        self, session: str, actor_id: str | None = None, credit: int = 0, leases: tuple[str, ...] = ()
    ) -> list[Action]:
        self.do(ActorJoined(session, actor_id or session))
        return [*self.do(Renew(session, leases)), *(self.do(Want(session, credit)) if credit else [])]

    def result(self, session: str, ticket_id: str) -> str:
        return self.results(session, ticket_id)[0]

    def results(self, session: str, *ticket_ids: str) -> list[str]:
        """The statuses of a parcel."""
        arrived = tuple(Arrived(ticket_id, FINISH, self.settled(ticket_id)) for ticket_id in ticket_ids)
        statuses = reply(self.do(Results(session, arrived))).statuses
        assert [ticket_id for ticket_id, _ in statuses] == list(ticket_ids)
        return [status for _, status in statuses]

    def learner(
        self, session: str = "L", credit: int = 100, acked: tuple[str, ...] = (), held: tuple[str, ...] = ()
    ) -> list[str]:
        self.do(LearnerJoined(session))
        return outgoing([*self.do(Resume(session, acked, held)), *self.do(Credit(session, credit))])


def reply(actions: list[Action]) -> Reply:
    (found,) = [action for action in actions if isinstance(action, Reply)]
    return found


def granted(actions: list[Action]) -> list[str]:
    return [ticket.ticket_id for action in actions if isinstance(action, Grant) for ticket in action.tickets]


def continued(actions: list[Action]) -> list[tuple[str, str]]:
    """Who goes on with which ticket."""
    return [(action.session, action.ticket.ticket_id) for action in actions if isinstance(action, GoOn)]


def outgoing(actions: list[Action]) -> list[str]:
    """Results and dead letters, in order."""
    ids: list[str] = []
    for action in actions:
        if isinstance(action, Deliver):
            assert action.ticket_ids, "an action about nothing"
            ids += action.ticket_ids
        elif isinstance(action, AnnounceDead):
            ids.append(action.ticket_id)
    return ids


def withdrawn(actions: list[Action]) -> dict[str, tuple[str, ...]]:
    """By session."""
    return {action.session: action.ticket_ids for action in actions if isinstance(action, Withdraw)}
