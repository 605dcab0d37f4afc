"""Results on their way through memory: bounded, handed out once, never another one's."""

from __future__ import annotations

from broker.protocol.codec import trajectory_from_message, trajectory_to_message
from broker.protocol.frames import Message
from broker.store.fresh import FreshResults
from tests.unit.broker.samples import make_ticket, make_trajectory


def trajectory(ticket_id: str, actor_id: str = "actor-0") -> Message:
    return trajectory_to_message(make_trajectory(make_ticket(ticket_id), actor_id))


def test_a_result_goes_out_once_as_a_deliver() -> None:
    fresh = FreshResults()
    fresh.add("a", trajectory("a"))
    message = fresh.take("a")
    assert message is not None
    assert message.command == "DELIVER"
    assert trajectory_from_message(message).ticket.ticket_id == "a"
    assert fresh.take("a") is None


def test_beyond_the_bound_the_oldest_stay_and_the_rest_is_the_stores() -> None:
    size = trajectory("a").array_bytes
    fresh = FreshResults(max_bytes=2 * size)
    for ticket_id in "abc":
        fresh.add(ticket_id, trajectory(ticket_id))
    assert fresh.take("c") is None
    assert fresh.take("a") is not None
    fresh.add("d", trajectory("d"))
    assert fresh.take("d") is not None
    assert fresh.take("b") is not None


def test_a_second_result_of_a_recalled_ticket_replaces_the_first() -> None:
    size = trajectory("a").array_bytes
    fresh = FreshResults(max_bytes=2 * size)
    fresh.add("a", trajectory("a"))
    fresh.discard("a")
    fresh.add("a", trajectory("a", "actor-1"))
    message = fresh.take("a")
    assert message is not None
    assert message.body["head"]["actor_id"] == "actor-1"
    fresh.add("b", trajectory("b"))
    fresh.clear()
    assert fresh.take("b") is None
    fresh.add("c", trajectory("c"))
    fresh.add("d", trajectory("d"))
    assert fresh.take("d") is not None, "clear() gave the room back"
