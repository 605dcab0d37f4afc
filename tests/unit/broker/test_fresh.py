"""Parcels on their way through memory: bounded, and gone when nobody wants them."""

from __future__ import annotations

from broker.exchange.fresh import FreshParcels
from broker.protocol.codec import pack_trajectories, unpack_trajectories
from broker.protocol.frames import Message
from tests.unit.broker.samples import make_ticket, make_trajectory


def parcel(*ticket_ids: str) -> Message:
    return pack_trajectories([make_trajectory(make_ticket(ticket_id)) for ticket_id in ticket_ids])


def size(message: Message) -> int:
    return message.array_bytes + len(memoryview(message.body))


def test_a_parcel_is_there_until_it_is_discarded() -> None:
    fresh = FreshParcels(1 << 20)
    fresh.add(7, parcel("a", "b"), 2, ("a", "b"))
    found = fresh.get(7)
    assert found is not None
    assert [t.ticket.ticket_id for t in unpack_trajectories(found.message)] == ["a", "b"]
    assert found.num_items == 2
    fresh.discard(7)
    assert fresh.get(7) is None
    fresh.discard(7)


def test_beyond_the_bound_the_oldest_stay_and_the_rest_is_the_stores() -> None:
    fresh = FreshParcels(max_bytes=2 * size(parcel("a")))
    for number, ticket_id in enumerate("abc"):
        fresh.add(number, parcel(ticket_id), 1, (ticket_id,))
    assert fresh.get(0) is not None
    assert fresh.get(1) is not None
    assert fresh.get(2) is None
    fresh.discard(0)
    fresh.add(3, parcel("d"), 1, ("d",))
    assert fresh.get(3) is not None
    fresh.clear()
    assert fresh.get(1) is None
    fresh.add(4, parcel("e"), 1, ("e",))
    fresh.add(5, parcel("f"), 1, ("f",))
    assert fresh.get(5) is not None, "clear() gave the room back"


def test_what_ended_without_a_delivery_gives_its_room_back() -> None:
    fresh = FreshParcels(max_bytes=2 * size(parcel("a", "b")))
    fresh.add(0, parcel("a", "b"), 2, ("a", "b"))
    fresh.add(1, parcel("c"), 1, ("c",))
    places = {"b": 0, "c": 9}  # a has ended; b's result is in parcel 0 still; c was run again and lies elsewhere
    fresh.retain(places.get)
    assert fresh.get(0) is not None
    assert fresh.get(1) is None
