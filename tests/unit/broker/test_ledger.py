"""The ledger's rules, one by one; all of them together are in test_ledger_machine.py."""

from __future__ import annotations

from typing import Any

import pytest

from broker.ledger.events import (
    Ack,
    Cancel,
    Credit,
    Damaged,
    Grant,
    Hold,
    JournalAttempt,
    LearnerJoined,
    PeerGone,
    Release,
    Renew,
    Requeue,
    Resume,
    Settled,
    Tick,
    Want,
)
from broker.ledger.ledger import Ledger
from broker.ledger.table import TRANSITIONS, Entry, TicketTable
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode
from tests.unit.broker.book import FINISH, LEASE_S, Book, granted, one, outgoing, reply
from tests.unit.broker.samples import make_ticket


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
    grants = [(action.session, granted([action])) for action in actions if isinstance(action, Grant)]
    assert grants == [("s1", ["a", "c"]), ("s2", ["b", "d"])]


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
    (ticket,) = action.tickets
    assert ticket.attempt == 1


def test_a_lease_that_is_not_renewed_ends_in_time_though_an_older_one_is() -> None:
    book = Book()
    book.issue("a", "b")
    book.join("s1", credit=1)
    book.now = 1
    book.join("s2", credit=1)
    book.now = 9
    book.do(Renew("s1", ("a",)))
    book.now = 11
    book.do(Tick())
    assert {key: row.ticket.attempt for key, row in book.rows.items()} == {"a": 0, "b": 1}


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
    assert reply(book.do(Cancel(everything=True))).count == 2
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
    assert outgoing(book.do(one("s2", "a", FINISH))) == []


def test_every_transition_of_the_table_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    move, take_result = TicketTable.move, TicketTable.take_result

    def recorded(table: TicketTable, entry: Entry, transition: str) -> None:
        seen.add(transition)
        move(table, entry, transition)

    def recorded_result(*args: Any) -> None:
        seen.add("result")
        take_result(*args)

    monkeypatch.setattr(TicketTable, "move", recorded)
    monkeypatch.setattr(TicketTable, "take_result", recorded_result)
    book = Book(max_attempts=1)
    book.issue("a", "b", "c", "d", "e")
    book.join("s1", credit=5)  # grant
    book.do(Release("s1", ("a",), "drain"))  # return
    book.do(Renew("s1", ("a",)))  # reclaim
    book.result("s1", "a")  # result
    book.result("s1", "e")
    book.do(Release("s1", ("b",), "infra_failure"))  # exhaust
    book.do(Cancel(ticket_ids=("c",)))  # withdraw
    book.do(Cancel(everything=True))  # cancel
    book.do(Requeue(("b",)))  # requeue
    book.learner()  # deliver
    book.do(Damaged("L", "e"))  # recall
    book.do(LearnerJoined("L"))
    book.do(Resume("L", (), ()))  # redeliver
    book.do(Resume("L", (), ("a",)))  # keep
    book.do(Ack(("a",)))  # ack
    assert seen == TRANSITIONS.keys()


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize("num", [1, 3])
def test_a_result_that_is_taken_is_the_transition_of_the_table(leased: bool, num: int) -> None:
    seen = []
    for written_out in (False, True):
        table = TicketTable((), {}, 1)
        entries = [table.add(make_ticket(f"t{i}")) for i in range(num)]
        for entry in entries:
            if leased:
                table.pop_issued()
                table.lease(entry, "grant", "s1", 30.0)
        counts: dict[tuple[str, str], int] = {}
        ended: dict[str, int] = {}
        for entry in entries:
            if written_out:
                table.take_result(entry, "s1", counts, ended)
            else:
                table.move(entry, "result")
                entry.source = "s1"
                table.count_closing(entry, counts)
        for env, num_ended in ended.items():
            table.schedule.lease_ended(env, num_ended)
        leased_time = table.schedule._leased
        seen.append(
            (entries, table.counts, counts, leased_time, len(table.schedule), table.expired(99.0), table.pop_result())
        )
    assert seen[0] == seen[1]
    with pytest.raises(AssertionError, match="allows a result of these alone"):
        table.take_result(entries[0], "s1", {}, {})


def test_an_illegal_transition_is_a_bug_and_says_so() -> None:
    table = TicketTable((), {}, 1)
    entry = table.add(make_ticket("a"))
    with pytest.raises(AssertionError, match="deliver of ticket a in state issued"):
        table.move(entry, "deliver")
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
    assert len(table._leases) + len(table._new_results) + len(table._old_results) == 0
    assert len(table.schedule) + len(table._groups) == 0
