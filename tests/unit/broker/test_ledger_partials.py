"""What becomes of a partial: it waits with its ticket, and ends with the attempt that it was made in."""

from __future__ import annotations

from broker.ledger.events import Cancel, HandOver, PartialLost, PeerGone, Release, Renew, Tick, Want
from broker.protocol.commands import HandoverStatus
from tests.unit.broker.book import LEASE_S, MAX_PARTIAL_BYTES, Book, continued, granted, reply


def begun(num_bytes: int = 100) -> Book:
    """s1 has leased and handed over a, and waits for nothing more."""
    book = Book()
    book.issue("a")
    assert granted(book.join("s1", credit=3)) == ["a"]
    assert hand_over(book, "s1", "a", num_bytes) == "kept"
    return book


def hand_over(book: Book, session: str, ticket_id: str, num_bytes: int = 100) -> HandoverStatus:
    return reply(book.do(HandOver(session, ticket_id, num_bytes))).handover


def test_the_next_actor_goes_on_at_no_cost_and_not_the_one_that_drains() -> None:
    book = begun()
    assert book.rows["a"].partial_bytes == 100
    assert continued(book.do(Tick())) == []  # s1 has credit left, and is stopping
    actions = book.join("s2", credit=1)
    assert (continued(actions), granted(actions)) == ([("s2", "a")], [])
    assert book.rows["a"].ticket.attempt == 0
    assert book.result("s2", "a") == "accepted"
    assert (book.rows["a"].partial_bytes, book.ledger.partial_bytes) == (0, 0)


def test_over_a_restart_of_the_broker_and_a_grant_that_was_lost() -> None:
    book = begun()
    book.restart()
    assert continued(book.join("s2", credit=1)) == [("s2", "a")]
    book.do(PeerGone("s2"))
    book.join("s2")  # names no lease: it was lost on the way
    assert continued(book.do(Want("s2", 1))) == [("s2", "a")]


def test_what_is_given_back_without_another_one_is_gone_on_with_from_the_former() -> None:
    book = begun()
    book.join("s2", credit=1)
    book.do(Release("s2", ("a",), "drain"))
    assert continued(book.join("s3", credit=1)) == [("s3", "a")]
    assert hand_over(book, "s3", "a", 200) == "kept"
    assert book.ledger.partial_bytes == 200


def test_a_failed_attempt_ends_the_partial_with_it() -> None:
    for how in ("infra_failure", "expiry", "restart"):
        book = begun()
        book.join("s2", actor_id="actor-2", credit=1)
        if how == "infra_failure":
            book.do(Release("s2", ("a",), "infra_failure"))
        elif how == "expiry":
            book.now += LEASE_S
            book.do(Tick())
        else:
            book.join("s2 again", actor_id="actor-2")
        assert (book.rows["a"].ticket.attempt, book.rows["a"].partial_bytes, book.ledger.partial_bytes) == (1, 0, 0)
        assert granted(book.join("s3", credit=1)) == ["a"]


def test_only_who_holds_the_lease_hands_over() -> None:
    book = begun()
    assert hand_over(book, "s1", "a") == "unwanted"  # a repetition that came late
    book.join("s2", credit=1)
    assert hand_over(book, "s1", "a") == "unwanted"
    assert hand_over(book, "s2", "unknown") == "unwanted"
    book.do(Cancel(("a",)))
    assert hand_over(book, "s2", "a") == "unwanted"
    assert book.ledger.partial_bytes == 0


def test_a_repetition_on_a_new_connection_replaces_the_first() -> None:
    book = begun()
    book.do(PeerGone("s1"))
    book.join("s1", leases=("a",))  # its answer was lost: it still names the lease, and has it again
    assert hand_over(book, "s1", "a", 120) == "kept"
    assert book.ledger.partial_bytes == 120


def test_all_partials_together_have_a_bound_and_the_lease_is_given_back_in_any_case() -> None:
    book = begun(MAX_PARTIAL_BYTES - 50)
    book.issue("b")
    book.join("s2", credit=2)  # goes on with a, and has b
    assert hand_over(book, "s2", "b", 51) == "refused"
    assert hand_over(book, "s2", "a", MAX_PARTIAL_BYTES) == "kept"  # in the place of the former
    assert granted(actions := book.join("s3", credit=2)) == ["b"]
    assert continued(actions) == [("s3", "a")]
    assert book.rows["b"].ticket.attempt == 0


def test_a_damaged_partial_is_dropped_and_the_ticket_stays_leased() -> None:
    book = begun()
    book.join("s2", credit=1)
    book.do(PartialLost("a"))
    assert book.ledger.partial_bytes == 0
    book.do(Renew("s2", ("a",)))
    book.do(Release("s2", ("a",), "drain"))
    assert granted(book.join("s3", credit=1)) == ["a"]
    assert book.do(PartialLost("a")) == []
