"""The ledger's rules, one by one; all of them together are in test_ledger_machine.py."""

from __future__ import annotations

from collections import Counter

import pytest

from broker.ledger.events import (
    Ack,
    ActorJoined,
    AnnounceDead,
    Arrived,
    Cancel,
    Count,
    Credit,
    Damaged,
    Deliver,
    Event,
    Finish,
    Finished,
    Grant,
    Hold,
    Issue,
    JournalAttempt,
    JournalResults,
    LearnerJoined,
    PeerGone,
    Release,
    Renew,
    Requeue,
    Results,
    Resume,
    Settle,
    Settled,
    TakenRow,
    Tick,
    Want,
)
from broker.ledger.ledger import Ledger
from broker.ledger.table import TRANSITIONS, Entry, TicketTable
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode, Outcome
from tests.unit.broker.book import FINISH, LEASE_S, Book, granted, outgoing, reply, ticket_of, withdrawn
from tests.unit.broker.samples import make_ticket


def one(session: str, ticket_id: str, finish: Finish = FINISH) -> Results:
    """A parcel of one."""
    return Results(session, (Arrived(ticket_id, finish),))


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


def test_every_trajectory_of_a_parcel_gets_its_own_answer() -> None:
    book = Book()
    book.issue("a", "b", "c", "d", "e")
    book.join("s1", credit=2)  # a, b
    book.join("s2", credit=2)  # c, d
    book.result("s1", "a")
    book.do(Cancel(ticket_ids=("d",)))
    arrived = tuple(Arrived(key, FINISH) for key in ("a", "c", "d", "never", "b", "e"))
    actions = book.do(Results("s2", arrived))
    statuses = {"a": "duplicate", "c": "accepted", "d": "unwanted", "never": "unwanted", "b": "late", "e": "late"}
    assert reply(actions).statuses == tuple(statuses.items())
    assert [a for a in actions if isinstance(a, JournalResults)] == [
        JournalResults("s2", (TakenRow(1, 3, 8, "c"), TakenRow(4, 2, 9, "b"), TakenRow(5, 5, 10, "e")))
    ]
    assert withdrawn(actions) == {"s1": ("b",)}
    counts = {a.name: a.num for a in actions if isinstance(a, Count) and not a.env}
    assert counts == {"duplicate": 1, "accepted": 1, "unwanted": 2, "late": 2}
    assert book.results("s2", "c", "never", "a") == ["accepted", "unwanted", "duplicate"]


def test_a_ticket_that_is_twice_in_a_parcel_counts_once() -> None:
    book = Book()
    book.issue("a")
    book.join("s1", credit=1)
    actions = book.do(Results("s1", (Arrived("a", FINISH), Arrived("a", FINISH))))
    assert reply(actions).statuses == (("a", "accepted"), ("a", "accepted"))
    assert {a.name: a.num for a in actions if isinstance(a, Count) and not a.env} == {"accepted": 1, "repeated": 1}
    assert [len(a.results) for a in actions if isinstance(a, Finished)] == [1]
    assert book.learner() == ["a"]


def test_a_parcel_goes_out_in_one_action_but_for_the_dead_letters_in_between() -> None:
    book = Book(max_attempts=1)
    book.issue("a", "b", "c", "d", "e")
    book.join("s1", credit=5)
    assert book.results("s1", "a", "b") == ["accepted", "accepted"]
    book.do(Release("s1", ("c",), "infra_failure"))
    assert book.results("s1", "e", "d") == ["accepted", "accepted"]
    book.do(LearnerJoined("L"))
    book.do(Resume("L", (), ()))
    actions = book.do(Credit("L", 4))
    assert [a.ticket_ids if isinstance(a, Deliver) else a for a in actions] == [
        ("a", "b"),
        AnnounceDead("L", "c", "group-c", Mode.TRAIN, ""),
        ("e",),
    ]
    book.do(LearnerJoined("L"))
    book.do(Resume("L", (), ("b",)))
    assert outgoing(book.do(Credit("L", 100))) == ["a", "c", "e", "d"]


def test_some_tickets_can_be_cancelled_and_their_groups_close_with_dead_letters_for_every_learner_to_come() -> None:
    book = Book()
    book.issue("a1", "a2", "b1", "c1")
    book.join("s1", credit=2)
    book.result("s1", "a1")
    assert reply(book.do(Cancel(ticket_ids=("b1", "never"), group_ids=("group-a", "group-z")))).count == 2
    assert reply(book.do(Cancel(ticket_ids=("b1",), group_ids=("group-a",)))).count == 0
    assert book.result("s1", "a2") == "unwanted"
    assert book.rows["a2"].error == "cancelled by the learner"
    assert book.rows["a2"].ticket.attempt == 0
    book.restart()
    assert book.learner() == ["a1", "b1", "a2"]
    assert reply(book.do(Ack(("a1", "b1", "a2")))).count == 3
    assert granted(book.join("s2", credit=5)) == ["c1"]
    assert reply(book.do(Cancel())).count == 0  # no ids are none, not all


def test_who_runs_what_is_not_wanted_any_more_is_told_at_once_and_again_until_it_stops() -> None:
    book = Book()
    book.issue("a", "b", "c", "d")
    book.join("s1", credit=2)
    book.join("s2", credit=2)
    assert withdrawn(book.do(Cancel(ticket_ids=("a", "c")))) == {"s1": ("a",), "s2": ("c",)}
    assert withdrawn(book.do(Renew("s1", ("a", "b")))) == {"s1": ("a",)}
    assert withdrawn(book.do(Renew("s1", ("b",)))) == {}
    book.do(PeerGone("s2"))
    assert withdrawn(book.do(Cancel(everything=True))) == {"s1": ("b",)}
    book.do(ActorJoined("s2", "s2"))
    assert withdrawn(book.do(Renew("s2", ("d", "never")))) == {"s2": ("d", "never")}


def test_the_second_of_two_that_run_a_ticket_is_told_when_there_is_a_result() -> None:
    book = Book()
    book.issue("a")
    book.join("s1", credit=1)
    book.now = LEASE_S
    book.do(Tick())
    book.join("s2", credit=1)
    actions = book.do(one("s1", "a", FINISH))
    assert (reply(actions).statuses, withdrawn(actions)) == ((("a", "late"),), {"s2": ("a",)})
    assert withdrawn(book.do(Renew("s1", ("a",)))) == {}  # its own result, not answered yet


def test_almost_complete_groups_come_first_and_survive_a_restart() -> None:
    book = Book()
    group = [ticket_of(f"a{i}", group_id="a") for i in range(4)]
    other = [ticket_of(f"b{i}", group_id="b") for i in range(4)]
    book.do(Issue((*group, *other)))
    book.join("s1", credit=4)
    book.join("s2", credit=1)  # b0
    for ticket_id in ("a0", "a1", "a2"):
        book.result("s1", ticket_id)
    book.do(Release("s1", ("a3",), "infra_failure", "sandbox died"))
    assert granted(book.do(Want("s2", 2))) == ["a3"]
    book.restart()
    assert granted(book.join("s3", credit=2)) == ["a3", "b0"]


def test_a_result_makes_the_rest_of_its_group_come_sooner() -> None:
    book = Book()
    book.do(Issue(tuple(ticket_of(f"{group}{i}", group_id=group) for group in "ab" for i in range(4))))
    book.result("s1", "b0")  # of a lease that had run out
    assert granted(book.join("s2", credit=3)) == ["b1", "b2", "b3"]
    book = Book()
    book.do(Issue(tuple(ticket_of(f"{group}{i}", group_id=group) for group in "ab" for i in range(2))))
    book.result("s1", "b0")
    assert granted(book.join("s2", credit=1)) == ["b1"]  # a single one, too


def test_environments_take_turns_though_one_was_there_first_with_many() -> None:
    book = Book()
    book.do(Issue(tuple(ticket_of(f"a{i}", env="many") for i in range(20))))
    book.do(Issue(tuple(ticket_of(f"b{i}", env="few") for i in range(3))))
    assert sorted(granted(book.join("s1", credit=6))) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_results_are_counted_by_outcome_and_groups_by_how_they_closed() -> None:
    book = Book(max_attempts=1)
    book.do(Issue(tuple(ticket_of(key, group_id=key[0], env=f"env-{key[0]}") for key in ("a1", "a2", "b1", "b2"))))
    book.join("s1", credit=4)
    seen: Counter[tuple[str, str]] = Counter()

    def count(event: Event) -> None:
        seen.update((a.name, a.env) for a in book.do(event) if isinstance(a, Count) and a.env)

    count(one("s1", "a1", Finish(Outcome.TIMEOUT, 0.0, 9.0)))
    count(one("s1", "a1", Finish(Outcome.TIMEOUT, 0.0, 9.0)))
    count(one("s1", "a2", Finish(Outcome.EXPLOIT, 0.0, 9.0)))
    count(one("s1", "b1", FINISH))
    count(Release("s1", ("b2",), "infra_failure", "sandbox died"))
    assert seen == {
        ("outcome_timeout", "env-a"): 1,
        ("outcome_exploit", "env-a"): 1,
        ("outcome_completed", "env-b"): 1,
        ("group_complete", "env-a"): 1,
        ("group_short", "env-b"): 1,
    }


def test_the_monitor_hears_of_every_result_once_and_of_its_fate() -> None:
    book = Book()
    book.issue("a", "b")
    book.join("s1", credit=2)
    assert [a for a in book.do(one("s1", "a", FINISH)) if isinstance(a, Finished)] == [
        Finished(((make_ticket("a"), FINISH),))
    ]
    assert [a for a in book.do(one("s1", "a", FINISH)) if isinstance(a, Finished)] == []
    book.result("s1", "b")
    book.learner()
    actions = book.do(Ack(("a", "b"), frozenset({"b"})))
    assert [a for a in actions if isinstance(a, Settle)] == [Settle(("a", "b"), frozenset({"b"}))]


def test_every_transition_of_the_table_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    move = TicketTable.move

    def recorded(table: TicketTable, entry: Entry, transition: str) -> None:
        seen.add(transition)
        move(table, entry, transition)

    monkeypatch.setattr(TicketTable, "move", recorded)
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
