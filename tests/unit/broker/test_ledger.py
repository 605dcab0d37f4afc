"""The ledger: its rules one by one, then all of them together under arbitrary sequences of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.ledger import Ledger
from broker.ledger_types import (
    Ack,
    Action,
    ActorJoined,
    AnnounceDead,
    Cancel,
    Credit,
    Deliver,
    Event,
    Grant,
    Hold,
    Issue,
    JournalAttempt,
    JournalEnd,
    JournalResult,
    JournalTicket,
    LearnerJoined,
    PeerGone,
    Release,
    Renew,
    Reply,
    Restored,
    Result,
    Resume,
    Settled,
    Tick,
    Want,
)
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode
from broker.ticket_table import TRANSITIONS, TicketTable
from tests.unit.broker.samples import make_ticket

LEASE_S = 10.0


class Book:
    """A ledger with a clock, and a dictionary for a journal."""

    def __init__(self, max_attempts: int = 3) -> None:
        self.now = 0.0
        self.max_attempts = max_attempts
        self.ledger = Ledger(LEASE_S, max_attempts)
        self.rows: dict[str, Restored] = {}
        self.ended: dict[str, Settled] = {}

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
            case JournalEnd(ticket_id, state):
                self.ended[ticket_id] = Settled(state, self.rows.pop(ticket_id).source)

    def restart(self) -> None:
        ended = Counter((settled.state, Mode.TRAIN) for settled in self.ended.values())
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
        return reply(self.do(Result(session, ticket_id, self.settled(ticket_id)))).status

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


def test_the_life_of_a_ticket() -> None:
    book = Book()
    assert reply(book.issue("t1")).count == 1
    assert granted(book.join("s1", credit=1)) == ["t1"]
    assert book.result("s1", "t1") == "accepted"
    assert book.learner() == ["t1"]
    assert reply(book.do(Ack(("t1",)))).count == 1
    assert book.ended == {"t1": Settled(T.ACKED, "s1")}
    assert len(book.ledger) == 0
    assert reply(book.do(Ack(("t1",)))).count == 0
    assert reply(book.issue("t1")).count == 0


def test_credit_is_a_total_and_bounds_both_directions() -> None:
    book = Book()
    book.issue(*(f"t{i}" for i in range(5)))
    assert len(granted(book.join("s1", credit=2))) == 2
    assert granted(book.do(Want("s1", 2))) == []
    assert len(granted(book.do(Want("s1", 3)))) == 1
    for ticket_id in ("t0", "t1", "t2"):
        book.result("s1", ticket_id)
    assert book.learner(credit=1) == ["t0"]
    assert outgoing(book.do(Credit("L", 1))) == []
    assert outgoing(book.do(Credit("L", 3))) == ["t1", "t2"]


def test_first_come_first_served_but_eval_and_reference_before_train() -> None:
    book = Book()
    book.issue("a", "b")
    book.issue("c", mode=Mode.EVAL)
    book.issue("d", mode=Mode.REFERENCE)
    assert granted(book.join("s1", credit=4)) == ["c", "d", "a", "b"]


def test_a_returned_ticket_keeps_its_place() -> None:
    book = Book()
    book.issue("a", "b", "c")
    book.join("s1", credit=1)
    book.do(Release("s1", ("a",), "drain"))
    assert granted(book.do(Want("s1", 2))) == ["a"]
    assert book.rows["a"].ticket.attempt == 0


def test_actors_take_turns() -> None:
    book = Book()
    book.join("s1", credit=2)
    book.join("s2", credit=2)
    actions = book.issue("a", "b", "c", "d")
    assert [action.session for action in actions if isinstance(action, Grant)] == ["s1", "s2", "s1", "s2"]


def test_an_expired_lease_uses_up_an_attempt_and_a_heartbeat_renews_it() -> None:
    book = Book()
    book.issue("a")
    book.join("s1", credit=1)
    book.now = 9
    book.do(Renew("s1", ("a",)))
    book.now = 18
    assert book.do(Tick()) == []
    book.now = 19
    book.do(Tick())
    assert book.rows["a"].ticket.attempt == 1
    (action,) = [a for a in book.join("s2", credit=1) if isinstance(a, Grant)]
    assert action.ticket.attempt == 1


def test_a_late_result_counts_when_it_is_the_first() -> None:
    book = Book()
    book.issue("a")
    book.join("s1", credit=1)
    book.now = 11
    book.do(Tick())
    book.join("s2", credit=1)
    assert book.result("s1", "a") == "late"
    assert book.result("s2", "a") == "duplicate"
    assert book.result("s1", "a") == "accepted"  # its own result, sent again
    book.learner()
    book.do(Ack(("a",)))
    assert book.result("s2", "a") == "duplicate"
    assert book.result("s1", "a") == "accepted"
    assert book.result("s1", "never") == "unwanted"


def test_attempts_end_in_a_dead_letter_that_wants_an_ack() -> None:
    book = Book(max_attempts=2)
    book.issue("a")
    book.join("s1", credit=2)
    book.do(Release("s1", ("a",), "infra_failure", "sandbox died"))
    actions = book.do(Release("s1", ("a",), "infra_failure", "sandbox died again"))
    assert [a.error for a in actions if isinstance(a, JournalAttempt) and a.dead] == ["sandbox died again"]
    assert book.result("s1", "a") == "unwanted"
    assert book.learner() == ["a"]
    assert book.learner(held=("a",)) == []
    book.restart()
    assert book.learner("L2") == ["a"]
    assert reply(book.do(Ack(("a",)))).count == 1
    assert book.ended == {"a": Settled(T.DEAD, "")}
    assert book.learner("L3") == []


def test_a_restarted_broker_lets_actors_reclaim_and_learners_keep() -> None:
    book = Book()
    book.issue("a", "b", "c")
    book.join("s1", credit=3)
    book.result("s1", "a")
    book.learner()
    book.restart()
    assert granted(book.join("s2", leases=("c",))) == []
    assert granted(book.join("s1", leases=("b",), credit=5)) == []
    assert book.ledger.counts[T.LEASED, Mode.TRAIN] == 2
    assert book.learner(held=("a",)) == []
    assert reply(book.do(Resume("L", (), ("a",)))).returned == 0
    assert reply(book.do(Resume("L", (), ()))).returned == 1
    assert book.learner("L2") == ["a"]


def test_nothing_is_granted_before_the_grace_is_over() -> None:
    book = Book()
    book.issue("a")
    book.ledger = Ledger(LEASE_S, 3, book.rows.values(), grant_from=2.0, next_seq=2)
    assert granted(book.join("s2", credit=1)) == []
    book.now = 2.0
    assert granted(book.do(Tick())) == ["a"]


def test_a_ticket_lost_on_the_way_is_issued_again_at_no_cost() -> None:
    book = Book()
    book.issue("a", "b")
    book.join("s1", credit=2)
    book.do(PeerGone("s1"))
    book.join("s1", leases=("a",))
    assert granted(book.join("s2", credit=2)) == ["b"]
    assert book.rows["b"].ticket.attempt == 0


def test_a_restarted_actor_fails_what_its_predecessor_ran() -> None:
    book = Book()
    book.issue("a")
    book.join("old", actor_id="actor-0", credit=1)
    assert granted(book.join("new", actor_id="actor-0", credit=1)) == ["a"]
    assert book.rows["a"].ticket.attempt == 1
    assert book.result("old", "a") == "late"


def test_hold_stops_grants_and_nothing_else() -> None:
    book = Book()
    book.issue("a", "b")
    book.join("s1", credit=1)
    book.do(Hold(True))
    assert granted(book.do(Want("s1", 2))) == []
    assert book.result("s1", "a") == "accepted"
    assert granted(book.do(Hold(False))) == ["b"]


def test_cancel_ends_what_has_no_result() -> None:
    book = Book()
    book.issue("a", "b", "c")
    book.join("s1", credit=2)
    book.result("s1", "a")
    assert reply(book.do(Cancel())).count == 2
    assert book.result("s1", "b") == "unwanted"
    assert book.learner() == ["a"]
    assert granted(book.do(Want("s1", 5))) == []


def test_a_peer_that_is_gone_gets_nothing() -> None:
    book = Book()
    book.join("s1", credit=1)
    book.do(PeerGone("s1"))
    assert granted(book.issue("a")) == []
    book.join("s2", credit=1)
    book.learner()
    book.do(PeerGone("L"))
    assert outgoing(book.do(Result("s2", "a"))) == []


def test_an_illegal_transition_is_a_bug_and_says_so() -> None:
    table = TicketTable((), {}, 1)
    table.add(make_ticket("a"))
    with pytest.raises(AssertionError, match="deliver of ticket a in state issued"):
        table.move("a", "deliver")
    assert {target for _, target in TRANSITIONS.values()} == set(T)


def test_done_tickets_leave_no_trace_in_memory() -> None:
    book = Book()
    book.join("s1", credit=10**6)
    book.learner(credit=10**6)
    for num in range(2000):
        book.now += LEASE_S
        ticket_id = f"t{num}"
        book.issue(ticket_id)
        book.result("s1", ticket_id)
        book.do(Ack((ticket_id,)))
        book.do(Tick())
    table = book.ledger._table
    assert len(book.ledger) == 0
    assert len(table._issued) + len(table._expiries) + len(table._results) + len(table.assigned) < 10


ACTORS = st.sampled_from(["s0", "s1", "s2", "s3"])  # s0 and s1 are two processes of one actor
IDS = st.sampled_from([f"t{num}" for num in range(8)])


class LedgerMachine(RuleBasedStateMachine):
    """Arbitrary events, with a model of what actors and learner hold. What is checked is in `deliver` and `holds`."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Book(max_attempts=4)
        self.issued: set[str] = set()
        self.acked: set[str] = set()
        self.learner_has: set[str] = set()
        self.leased_at: dict[str, float] = {}
        self.joined: set[str] = set()
        self.credit: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def do(self, event: Event) -> list[Action]:
        actions = self.book.do(event)
        for action in actions:
            if isinstance(action, Grant):
                assert action.session in self.joined
                self.sent[action.session] += 1
                assert self.sent[action.session] <= self.credit[action.session], "more than the credit"
                assert self.book.rows[action.ticket.ticket_id].state is T.ISSUED, "granted although it has a result"
                self.leased_at[action.ticket.ticket_id] = self.book.now
            elif isinstance(action, Deliver | AnnounceDead):
                self.sent["L"] += 1
                assert self.sent["L"] <= self.credit["L"], "more than the credit"
                assert action.ticket_id not in self.acked, "delivered after its ack"
                assert action.ticket_id not in self.learner_has, "delivered twice to one learner"
                self.learner_has.add(action.ticket_id)
        return actions

    @rule(ids=st.lists(IDS, max_size=4))
    def issue(self, ids: list[str]) -> None:
        tickets = tuple(make_ticket(ticket_id) for ticket_id in ids)
        count = reply(self.do(Issue(tickets, frozenset(key for key in ids if self.book.settled(key))))).count
        assert count == len(set(ids) - self.issued)
        self.issued.update(ids)

    @rule(session=ACTORS, credit=st.integers(0, 3), leases=st.sets(IDS, max_size=3))
    def actor_joins(self, session: str, credit: int, leases: set[str]) -> None:
        actor_id = "actor-0" if session in ("s0", "s1") else session
        self.joined -= {"s0", "s1"} if actor_id == "actor-0" else set()
        self.joined.add(session)
        self.credit[session] = self.sent[session] = 0
        self.do(ActorJoined(session, actor_id))
        self.renew(session, leases)
        self.want(session, credit)

    @rule(session=ACTORS, leases=st.sets(IDS, max_size=3))
    def renew(self, session: str, leases: set[str]) -> None:
        self.do(Renew(session, tuple(leases)))

    @rule(session=ACTORS, more=st.integers(1, 3))
    def want(self, session: str, more: int) -> None:
        if session in self.joined:
            self.credit[session] += more
            self.do(Want(session, self.credit[session]))

    @rule(session=ACTORS, ticket_id=IDS)
    def result(self, session: str, ticket_id: str) -> None:
        row, settled = self.book.rows.get(ticket_id), self.book.settled(ticket_id)
        status = reply(self.do(Result(session, ticket_id, settled))).status
        taken = row is not None and row.state is T.ISSUED
        assert (status == "late" or status == "accepted") or not taken
        assert status != "late" or taken

    @rule(session=ACTORS, ticket_id=IDS, drain=st.booleans())
    def release(self, session: str, ticket_id: str, drain: bool) -> None:
        self.do(Release(session, (ticket_id,), "drain" if drain else "infra_failure"))

    @rule(session=st.sampled_from(["s0", "s2", "L"]))
    def peer_gone(self, session: str) -> None:
        self.joined.discard(session)
        self.do(PeerGone(session))

    @rule(credit=st.integers(0, 4), same=st.booleans(), lose=st.sets(IDS, max_size=2))
    def learner_joins(self, credit: int, same: bool, lose: set[str]) -> None:
        """Either the same process on a new connection, on which deliveries may have been lost, or a new one."""
        self.learner_has = self.learner_has - lose if same else set()
        self.sent["L"] = self.credit["L"] = 0
        self.do(LearnerJoined("L"))
        self.do(Resume("L", (), tuple(self.learner_has)))
        self.more_credit(credit)

    @rule(more=st.integers(0, 4))
    def more_credit(self, more: int) -> None:
        self.credit["L"] += more
        self.do(Credit("L", self.credit["L"]))

    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.learner_has)), max_size=3)) if self.learner_has else set()
        self.do(Ack(tuple(ids)))
        for ticket_id in ids:
            assert ticket_id in self.book.ended, "an acked ticket lives on"
        self.acked |= ids

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.book.now += seconds
        self.do(Tick())

    @rule()
    def cancel(self) -> None:
        self.do(Cancel())
        assert not any(row.state is T.ISSUED for row in self.book.rows.values())

    @rule(on=st.booleans())
    def hold(self, on: bool) -> None:
        self.do(Hold(on))

    @rule()
    def restart(self) -> None:
        self.book.restart()
        self.joined.clear()
        self.credit.clear()
        self.sent.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.issued == self.book.rows.keys() | self.book.ended.keys()
        assert self.book.rows.keys() == self.book.ledger._table.entries.keys()

    @invariant()
    def ledger_and_journal_agree(self) -> None:
        for ticket_id, row in self.book.rows.items():
            entry = self.book.ledger._table.entries[ticket_id]
            volatile = {T.LEASED: T.ISSUED, T.ASSIGNED: T.DELIVERED}
            assert volatile.get(entry.state, entry.state) is row.state
            assert (entry.ticket, entry.source) == (row.ticket, row.source)
            assert entry.ticket.attempt <= self.book.max_attempts

    @invariant()
    def counts_are_right(self) -> None:
        states = Counter(entry.state for entry in self.book.ledger._table.entries.values())
        states.update(settled.state for settled in self.book.ended.values())
        assert states == Counter({state: num for (state, _), num in self.book.ledger.counts.items() if num})

    @invariant()
    def no_lease_outlives_its_time(self) -> None:
        self.do(Tick())
        for entry in self.book.ledger._table.entries.values():
            if entry.state is T.LEASED:
                assert self.book.now < entry.expires_at <= self.book.now + LEASE_S
                assert entry.ticket.ticket_id in self.book.ledger._actors[entry.holder].leases

    def teardown(self) -> None:
        """Whatever has happened: patient actors and a learner bring every ticket to its end."""
        self.do(Hold(False))
        self.actor_joins("s3", 0, set())
        self.learner_joins(0, same=False, lose=set())
        self.book.now += 2 * LEASE_S
        self.do(Tick())
        self.want("s3", 100)
        for _ in range(len(self.book.rows)):
            for ticket_id in [key for key, row in self.book.rows.items() if row.state is T.ISSUED]:
                self.result("s3", ticket_id)
        self.more_credit(100)
        self.do(Ack(tuple(self.learner_has)))
        assert self.book.rows == {}
        assert self.issued == self.book.ended.keys()


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase
