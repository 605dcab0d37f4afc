"""A ledger with a clock, and a dictionary for a journal."""

from __future__ import annotations

from collections import Counter

from broker.ledger.events import (
    Action,
    ActorJoined,
    AnnounceDead,
    Credit,
    Deliver,
    Event,
    Finish,
    Grant,
    Issue,
    JournalAttempt,
    JournalEnd,
    JournalPurge,
    JournalRecall,
    JournalResult,
    JournalTicket,
    LearnerJoined,
    Renew,
    Reply,
    Restored,
    Result,
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
FINISH = Finish(Outcome.COMPLETED, 1.0, 2.0)


def ticket_of(ticket_id: str, mode: Mode = Mode.TRAIN, group_id: str | None = None, env: str = "shop") -> Ticket:
    """A ticket of this group and environment."""
    ticket = make_ticket(ticket_id, mode)
    task = ticket.task.model_copy(update={"env": env})
    return ticket.model_copy(update={"task": task, "group_id": group_id or ticket.group_id})


class Book:
    """The ledger, and what its journal would hold. `do` checks what may be written when."""

    def __init__(self, max_attempts: int = 3) -> None:
        self.now = 0.0
        self.max_attempts = max_attempts
        self.ledger = Ledger(LEASE_S, max_attempts)
        self.rows: dict[str, Restored] = {}
        self.ended: dict[str, Settled] = {}
        self.ended_modes: dict[str, Mode] = {}

    def do(self, event: Event) -> list[Action]:
        actions = self.ledger.handle(event, self.now)
        for action in actions:
            self.write(action)
        return actions

    def write(self, action: Action) -> None:
        match action:
            case JournalTicket(seq, ticket):
                assert ticket.ticket_id not in self.rows
                assert ticket.ticket_id not in self.ended, "an ended ticket lives a second time"
                self.rows[ticket.ticket_id] = Restored(seq, ticket, T.ISSUED)
            case JournalResult(seq, ticket_id, source):
                row = self.rows[ticket_id]
                assert row.state is T.ISSUED, "a second result was taken"
                self.rows[ticket_id] = Restored(row.seq, row.ticket, T.DELIVERED, seq, source)
            case JournalAttempt(ticket_id, attempt, error, dead, seq):
                row = self.rows[ticket_id]
                ticket = row.ticket.model_copy(update={"attempt": attempt})
                self.rows[ticket_id] = Restored(row.seq, ticket, T.DEAD if dead else T.ISSUED, seq, "", error)
            case JournalRecall(ticket_id):
                row = self.rows[ticket_id]
                assert row.state is T.DELIVERED, "recalled without a result"
                self.rows[ticket_id] = Restored(row.seq, row.ticket, T.ISSUED)
            case JournalPurge(ticket_id, error):
                row = self.rows[ticket_id]
                assert row.state is T.DEAD, "purged although it is no dead letter"
                self.rows[ticket_id] = Restored(row.seq, row.ticket, T.DEAD, row.result_seq, PURGED, error)
            case JournalEnd(ticket_id, state):
                row = self.rows.pop(ticket_id)
                self.ended[ticket_id] = Settled(state, row.source)
                self.ended_modes[ticket_id] = row.ticket.mode

    def restart(self) -> None:
        ended = Counter((settled.state, self.ended_modes[key]) for key, settled in self.ended.items())
        seq = 1 + max((max(row.seq, row.result_seq) for row in self.rows.values()), default=0)
        rows = sorted(self.rows.values(), key=lambda row: row.seq)
        self.ledger = Ledger(LEASE_S, self.max_attempts, rows, ended, seq)

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

    def result(self, session: str, ticket_id: str) -> str | None:
        return reply(self.do(Result(session, ticket_id, self.settled(ticket_id), finish=FINISH))).status

    def learner(
        self, session: str = "L", credit: int = 100, acked: tuple[str, ...] = (), held: tuple[str, ...] = ()
    ) -> list[str]:
        self.do(LearnerJoined(session))
        return outgoing([*self.do(Resume(session, acked, held)), *self.do(Credit(session, credit))])


def reply(actions: list[Action]) -> Reply:
    (found,) = [action for action in actions if isinstance(action, Reply)]
    return found


def granted(actions: list[Action]) -> list[str]:
    return [action.ticket.ticket_id for action in actions if isinstance(action, Grant)]


def outgoing(actions: list[Action]) -> list[str]:
    return [action.ticket_id for action in actions if isinstance(action, Deliver | AnnounceDead)]


def withdrawn(actions: list[Action]) -> dict[str, tuple[str, ...]]:
    """By session."""
    return {action.session: action.ticket_ids for action in actions if isinstance(action, Withdraw)}
