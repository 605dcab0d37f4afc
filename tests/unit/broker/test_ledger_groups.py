"""The ledger's rules about parcels, groups, cancellation, turns and what is counted."""

from __future__ import annotations

from collections import Counter

from broker.ledger.events import (
    Ack,
    ActorJoined,
    AnnounceDead,
    Arrived,
    Cancel,
    Count,
    Credit,
    Deliver,
    Event,
    Finish,
    Finished,
    Issue,
    JournalResults,
    LearnerJoined,
    PeerGone,
    Release,
    Renew,
    Results,
    Resume,
    Settle,
    TakenRow,
    Tick,
    Want,
)
from broker.protocol.trajectory import Mode, Outcome
from tests.unit.broker.book import FINISH, LEASE_S, Book, granted, one, outgoing, reply, ticket_of, withdrawn
from tests.unit.broker.samples import make_ticket


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
