"""What has arrived and waits to be looked at: bounded, in the order of each connection, the learner's first."""

from __future__ import annotations

from collections import deque

import zmq
from hypothesis import given
from hypothesis import strategies as st

from broker.exchange.intake import Intake, Parts


class Network:
    """Messages that have arrived: (sender, number, bytes)."""

    def __init__(self, *arrived: tuple[str, int, int]) -> None:
        self.arrived = deque(arrived)

    def receive(self) -> Parts:
        if not self.arrived:
            return []
        sender, number, size = self.arrived.popleft()
        return [zmq.Frame(part) for part in (sender.encode(), b"%d" % number, bytes(size))]


def intake(network: Network, max_bytes: int = 1 << 30) -> Intake:
    return Intake(network.receive, lambda routing: routing == b"learner", max_bytes)


def names(taken: list[Parts]) -> list[str]:
    return [f"{parts[0].bytes.decode()}{parts[1].bytes.decode()}" for parts in taken]


def test_the_learner_does_not_queue_behind_the_actors() -> None:
    network = Network(("a", 1, 100), ("b", 1, 100), ("learner", 1, 5), ("a", 2, 100), ("learner", 2, 5))
    waiting = intake(network)
    waiting.fill()
    assert names(list(waiting.take(3, 1 << 20))) == ["learner1", "learner2", "a1"]
    assert names(list(waiting.take(3, 1 << 20))) == ["b1", "a2"]
    assert not waiting
    assert waiting.num_bytes == 0


def test_a_talkative_learner_does_not_keep_the_actors_out() -> None:
    waiting = intake(Network(*(("learner", n, 5) for n in range(9)), ("a", 1, 5), ("a", 2, 5)))
    waiting.fill()
    assert names(list(waiting.take(4, 1 << 20))) == ["learner0", "learner1", "learner2", "learner3", "a1"]


def test_a_round_ends_at_its_bytes_and_has_one_message_at_least() -> None:
    waiting = intake(Network(*(("a", n, 1000) for n in range(4))))
    waiting.fill()
    assert names(list(waiting.take(8, 1500))) == ["a0", "a1"]
    assert names(list(waiting.take(8, 1))) == ["a2"]


def test_no_more_is_held_than_it_may_be() -> None:
    network = Network(*(("a", n, 1000) for n in range(10)))
    waiting = intake(network, max_bytes=2500)
    waiting.fill()
    assert len(network.arrived) == 7
    waiting.fill()
    assert len(network.arrived) == 7
    list(waiting.take(1, 1 << 20))
    waiting.fill()
    assert len(network.arrived) == 6


def test_it_has_read_until_what_it_still_holds_came() -> None:
    times = iter((0.0, 1.0, 2.0, 3.0))
    network = Network(("a", 1, 10))
    waiting = Intake(network.receive, lambda routing: routing == b"learner", 20, lambda: next(times))
    waiting.fill()
    assert waiting.read_until == 0  # a1 may have come at any time since
    list(waiting.take(1, 1 << 20))
    assert waiting.read_until == 1
    network.arrived += [("a", 2, 10), ("learner", 1, 10)]
    waiting.fill()
    list(waiting.take(2, 1 << 20))
    assert waiting.read_until == 1  # there was no room to look whether there is more
    waiting.fill()
    assert waiting.read_until == 3


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "learner"]), st.integers(0, 300)), max_size=40),
    st.integers(1, 5),
    st.integers(1, 500),
    st.integers(1, 900),
)
def test_every_message_comes_once_and_each_connection_keeps_its_order(
    arriving: list[tuple[str, int]], max_messages: int, max_bytes: int, held: int
) -> None:
    network = Network(*((sender, n, size) for n, (sender, size) in enumerate(arriving)))
    waiting, taken = intake(network, held), list[Parts]()
    while True:
        waiting.fill()
        if not waiting:
            break
        taken += waiting.take(max_messages, max_bytes)
    found = [(parts[0].bytes.decode(), int(parts[1].bytes)) for parts in taken]
    assert sorted(number for _, number in found) == list(range(len(arriving)))
    for sender in ("a", "b", "learner"):
        numbers = [number for name, number in found if name == sender]
        assert numbers == sorted(numbers)
