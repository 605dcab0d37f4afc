"""Large results are let in one after the other, within the bound, whatever becomes of those who offered them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.exchange.admission import Admission


def test_offers_are_cleared_in_turn_as_room_is_made() -> None:
    admission, peers = Admission(100), {b"a", b"b"}
    for ticket_id in ("t0", "t1", "t2"):
        admission.offer(b"a", ticket_id, 60)
    admission.offer(b"b", "t3", 60)
    assert list(admission.clear(peers.__contains__)) == [(b"a", "t0"), (b"a", "t1")]
    assert list(admission.clear(peers.__contains__)) == []
    admission.arrived(b"b", "t0")  # by another connection: frees nothing
    assert list(admission.clear(peers.__contains__)) == []
    admission.arrived(b"a", "t0")
    assert list(admission.clear(peers.__contains__)) == [(b"a", "t2")]
    peers.remove(b"a")
    assert list(admission.clear(peers.__contains__)) == [(b"b", "t3")]
    admission.offer(b"b", "t3", 60)  # it said HELLO again, and asks again
    assert list(admission.clear(peers.__contains__)) == [(b"b", "t3")]
    assert admission.num_bytes == 60
    admission.offer(b"b", "t3", 0)
    assert admission.num_bytes == 0
    assert list(admission.clear(peers.__contains__)) == []


OPERATIONS = st.tuples(
    st.sampled_from(["offer", "offer", "arrived", "leave"]), st.sampled_from([b"a", b"b", b"c"]), st.sampled_from("xyz")
)


@given(st.lists(OPERATIONS, max_size=60), st.integers(1, 40))
def test_the_bound_holds_and_nobody_waits_while_there_is_room(
    operations: list[tuple[str, bytes, str]], max_bytes: int
) -> None:
    admission, size, peers = Admission(max_bytes), 10, {b"a", b"b", b"c"}
    waiting: set[tuple[bytes, str]] = set()
    for name, routing, ticket_id in operations:
        if name == "offer" and routing in peers:
            admission.offer(routing, ticket_id, size)
            waiting.add((routing, ticket_id))
        elif name == "arrived":
            admission.arrived(routing, ticket_id)
        elif name == "leave":  # a connection that has ended never comes back by the same name
            peers.discard(routing)
            waiting = {key for key in waiting if key[0] != routing}
        now = set(admission.clear(peers.__contains__))
        assert now <= waiting
        waiting -= now
        assert admission.num_bytes < max_bytes + size
        assert not waiting or admission.num_bytes >= max_bytes
