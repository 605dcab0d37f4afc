from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from broker.client.parcels import WINDOW_BYTES, Parcels
from broker.protocol.codec import array_bytes, unpack_trajectories
from broker.protocol.commands import MAX_ITEMS, OFFER_BYTES, PARCEL_BYTES, Offer, parse_body
from broker.protocol.errors import ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import Integrity, Segment, Trajectory, VersionRun
from tests.unit.broker.samples import make_ticket, make_trajectory

TOKEN_BYTES = 9


def make(ticket_id: str, num_tokens: int = 4) -> Trajectory:
    mask_T = np.arange(num_tokens) > 0
    logprobs_T = np.where(mask_T, -1.0, 0.0).astype(np.float32)
    runs = (VersionRun(1, 2, num_tokens - 1),)
    segment = Segment(np.arange(num_tokens, dtype=np.int32), mask_T, logprobs_T, runs)
    return dataclasses.replace(make_trajectory(make_ticket(ticket_id)), segments=(segment,))


def filled(*trajectories: Trajectory) -> Parcels:
    parcels = Parcels()
    for trajectory in trajectories:
        parcels.add(trajectory)
    return parcels


def ids(messages: list[Message] | None) -> list[list[str]]:
    """The tickets of each message; an OFFER's as "OFFER id"."""
    assert messages is not None
    return [
        [f"OFFER {parse_body(message, Offer).ticket_id}"]
        if message.command == "OFFER"
        else [trajectory.ticket.ticket_id for trajectory in unpack_trajectories(message)]
        for message in messages
    ]


def test_what_is_handed_in_together_travels_together_once() -> None:
    parcels = filled(make("a1"), make("a2", 7), make("a3"))
    (message,) = parcels.take()
    sent = unpack_trajectories(message)
    assert [trajectory.ticket.ticket_id for trajectory in sent] == ["a1", "a2", "a3"]
    assert sent[1].head == make("a2", 7).head
    assert sent[1].segments[0].token_ids_T.tolist() == list(range(7))
    assert parcels.take() == []
    parcels.add(make("a4"))
    assert ids(parcels.take()) == [["a4"]]
    assert "a1" in parcels


def test_a_parcel_has_its_bounds_and_what_is_large_is_offered() -> None:
    parcels = filled(*(make(f"t{number}") for number in range(MAX_ITEMS + 3)))
    assert [len(tickets) for tickets in ids(parcels.take())] == [MAX_ITEMS, 3]

    third = PARCEL_BYTES // 3 // TOKEN_BYTES
    large = OFFER_BYTES // TOKEN_BYTES + 1
    parcels = filled(make("a1", third), make("a2", third), make("big", large), make("a3", third), make("a4"))
    messages = parcels.take()
    # The tokens of all three would fit, but not with their heads.
    assert ids(messages) == [["OFFER big"], ["a1", "a2"], ["a3", "a4"]]
    assert parse_body(messages[0], Offer).num_bytes == array_bytes(make("big", large))
    assert ids([parcels.cleared("big")]) == [["big"]]
    assert parcels.take() == []
    barely = filled(make("whole", OFFER_BYTES // TOKEN_BYTES), make("a1"))
    assert ids(barely.take()) == [["whole"], ["a1"]]


def test_heads_count_so_that_no_envelope_grows_too_large() -> None:
    findings = Integrity(findings=("x" * (PARCEL_BYTES // 2),))
    parcels = Parcels()
    for ticket_id in ("a1", "a2", "a3"):
        trajectory = make(ticket_id)
        head = msgspec.structs.replace(trajectory.head, integrity=findings)
        parcels.add(dataclasses.replace(trajectory, head=head))
    assert ids(parcels.take()) == [["a1"], ["a2"], ["a3"]]


def test_what_is_unanswered_is_bounded_in_bytes_and_the_rest_travels_fuller() -> None:
    size = PARCEL_BYTES // 4 // TOKEN_BYTES
    names = [f"t{number}" for number in range(20)]
    parcels, sent = filled(*(make(name, size) for name in names)), list[str]()
    waiting: list[str] = []
    while messages := ids(parcels.take()):
        for tickets in messages:
            sent += tickets
            waiting += tickets
        assert array_bytes(make("t", size)) * len(waiting) <= WINDOW_BYTES + PARCEL_BYTES
        parcels.add(make(f"late{len(sent)}", 4)) if len(sent) < 20 else None
        parcels.answered(waiting[:3])
        del waiting[:3]
    assert [name for name in sent if name.startswith("t")] == names
    assert len(sent) == len(set(sent)) == 20 + sum(name.startswith("late") for name in sent)
    for name in waiting:
        parcels.discard(name)  # given up is not on its way either
    parcels.add(make("last", size))
    assert ids(parcels.take()) == [["last"]]


def test_a_new_connection_begins_with_the_whole_window() -> None:
    size = PARCEL_BYTES // 2 // TOKEN_BYTES
    parcels = filled(*(make(f"t{number}", size) for number in range(9)))
    first = ids(parcels.take())
    assert ids(parcels.again()) == first
    assert 0 < sum(map(len, first)) < 9
    assert parcels.take() == []


def test_a_clearance_for_what_is_not_wanted_any_more_is_handed_back() -> None:
    parcels = filled(make("big", OFFER_BYTES // TOKEN_BYTES + 1), make("small"))
    parcels.take()
    parcels.discard("big")
    for ticket_id in ("big", "small", "never"):
        offer = parse_body(parcels.cleared(ticket_id), Offer)
        assert (offer.ticket_id, offer.num_bytes) == (ticket_id, 0)


def test_a_refused_parcel_falls_apart_and_a_refused_single_is_to_blame() -> None:
    parcels = filled(make("a1"), make("a2"), make("a3"))
    parcels.take()
    assert parcels.refused("a2") is None
    assert ids(parcels.refused("a1")) == [["a1"], ["a2"], ["a3"]]
    assert parcels.refused("a1") is None

    parcels = filled(make("a1"), make("a2"), make("a3"))
    parcels.take()
    parcels.discard("a2")
    assert ids(parcels.refused("a1")) == [["a1"], ["a3"]]


def test_a_ticket_that_begins_two_parcels_loses_nothing_of_either() -> None:
    parcels = filled(make("a1"), make("a2"))
    parcels.take()
    parcels.discard("a1")  # its send was given up
    parcels.add(make("a1"))  # and begun again
    parcels.add(make("a3"))
    parcels.take()
    assert ids(parcels.refused("a1")) == [["a1"], ["a2"], ["a3"]]


def test_what_is_answered_is_not_sent_again_and_leaves_no_trace() -> None:
    parcels = filled(make("a1"), make("a2"), make("a3"))
    parcels.take()
    parcels.answered(["a1"])
    assert ids(parcels.refused("a1")) == [["a2"], ["a3"]]  # an answer in pieces ends no parcel
    parcels = filled(make("a1"), make("a2"), make("a3"))
    parcels.take()
    parcels.answered(["a1", "unknown", "a3"])
    parcels.add(make("a4"))
    assert ids(parcels.again()) == [["a2", "a4"]]
    assert parcels.take() == []
    parcels.answered(["a4", "a2"])
    assert parcels.refused("a2") is None
    assert "a2" not in parcels
    assert parcels.again() == []


def test_a_new_connection_packs_anew() -> None:
    large = OFFER_BYTES // TOKEN_BYTES + 1
    parcels = filled(make("a1"), make("a2"))
    parcels.take()
    parcels.add(make("big", large))
    parcels.add(make("b1"))
    parcels.take()
    parcels.add(make("c1"))
    assert ids(parcels.again()) == [["OFFER big"], ["a1", "a2", "b1", "c1"]]
    assert parcels.refused("b1") is None  # of the old connection
    assert ids(parcels.refused("a1")) == [["a1"], ["a2"], ["b1"], ["c1"]]


def test_a_malformed_trajectory_is_not_taken() -> None:
    parcels = filled(make("a1"))
    bad = make("bad")
    bad.segments[0].logprobs_T[1] = np.nan
    with pytest.raises(ProtocolError, match="ticket bad"):
        parcels.add(bad)
    assert "bad" not in parcels
    assert ids(parcels.take()) == [["a1"]]
