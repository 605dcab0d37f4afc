"""Who is gone: by what a peer has not said, not by what the broker has not read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broker.exchange.peers import Peer, Peers
from broker.protocol.commands import Role
from tests.ports import free_ports

HEARTBEAT_S, LIVENESS = 1.0, 5


@pytest.fixture
def peers() -> Iterator[Peers]:
    found = Peers("127.0.0.1", free_ports(1)[0], HEARTBEAT_S, LIVENESS)
    # What is sent to it is not looked at: nothing is due.
    found.add(Peer(b"a", Role.ACTOR, "actor-0", "session", heard_at=100.0, sent_at=float("inf")))
    found.beat(100.0, 100.0)
    yield found
    found.close()


def beats(peers: Peers, start: float, end: float, heard_until: float | None = None) -> list[float]:
    """Of a loop that runs all the time: when somebody was found to be gone."""
    times = [start + i * HEARTBEAT_S / 4 for i in range(int((end - start) * 4 / HEARTBEAT_S) + 1)]
    return [now for now in times if peers.beat(now, now if heard_until is None else heard_until)]


def test_a_peer_is_gone_when_it_was_silent_too_long(peers: Peers) -> None:
    assert not beats(peers, 100.25, 105)
    assert beats(peers, 105.25, 105.25)


def test_what_waits_to_be_read_may_be_what_a_peer_has_said(peers: Peers) -> None:
    assert not beats(peers, 100.25, 200, heard_until=104)
    assert beats(peers, 200.25, 200.25)


def test_a_broker_that_stood_still_reads_first(peers: Peers) -> None:
    assert not beats(peers, 300, 300.75)
    assert beats(peers, 301, 301)
