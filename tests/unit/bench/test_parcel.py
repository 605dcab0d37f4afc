"""The thin client's messages are byte for byte those of the real one, and no two trajectories are equal."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from broker.client.parcels import Parcels as ClientParcels
from broker.protocol.codec import unpack_trajectories
from broker.protocol.commands import OFFER_BYTES, PARCEL_BYTES
from broker.protocol.frames import Frame, decode, encode
from broker.protocol.trajectory import Trajectory
from tests.bench.exchange.load import Job, make_ticket, make_trajectory
from tests.bench.exchange.parcel import Parcels

ACTOR = 3


def real(job: Job, index: int, token: int) -> Trajectory:
    """The trajectory that the thin client stands for: its own ticket, its own first token."""
    trajectory = make_trajectory(job)
    (segment,) = trajectory.segments
    token_ids_T = segment.token_ids_T.copy()
    token_ids_T[0] = token
    head = msgspec.structs.replace(trajectory.head, ticket=make_ticket(job, index))
    return Trajectory(head, (replace(segment, token_ids_T=token_ids_T),))


def plain(frames: list[Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


@pytest.mark.parametrize(("size", "sizes"), [(2 << 10, [8]), (16 << 10, [8]), (256 << 10, [3, 3, 2])])
def test_a_window_is_sent_as_the_real_client_would(size: int, sizes: list[int]) -> None:
    job = Job("run", size, actors=4, seconds=1.0, tickets=64, port=0)
    thin, client = Parcels(job), ClientParcels()
    for turn in range(3):
        indexes = range(turn * job.window, (turn + 1) * job.window)
        tickets = [msgspec.msgpack.encode(make_ticket(job, index)) for index in indexes]
        sent = [plain(frames) for frames, _ in thin.make(ACTOR, tickets)]
        for index in indexes:
            client.add(real(job, index, token=index))
        messages = client.take()
        assert sent == [plain(encode(message)) for message in messages]
        assert [len(unpack_trajectories(message)) for message in messages] == sizes
        client.answered(real(job, index, token=index).ticket.ticket_id for index in indexes)
        thin.take_back(ACTOR)


def test_messages_that_are_on_the_way_are_not_touched() -> None:
    job = Job("run", 256 << 10, actors=4, seconds=1.0, tickets=64, port=0)
    parcels = Parcels(job)
    tickets = [msgspec.msgpack.encode(make_ticket(job, index)) for index in range(8)]
    sent = list(parcels.make(ACTOR, tickets))
    assert not any(copied for _, copied in sent)
    before = [plain(frames) for frames, _ in sent]
    others = list(parcels.make(ACTOR + 1, tickets))
    assert [plain(frames) for frames, _ in sent] == before
    trajectories = [trajectory for frames, _ in (*sent, *others) for trajectory in unpacked(frames)]
    assert len({int(trajectory.segments[0].token_ids_T[0]) for trajectory in trajectories}) == 16
    parcels.take_back(ACTOR)
    ((again, _),) = parcels.make(ACTOR, tickets[:3])
    assert any(np.shares_memory(token_ids(again), token_ids(frames)) for frames, _ in sent)


def token_ids(frames: list[Frame]) -> np.ndarray:
    return np.frombuffer(frames[2], "<i4")


def unpacked(frames: list[Frame]) -> tuple[Trajectory, ...]:
    return unpack_trajectories(decode(frames))


def test_what_is_above_a_parcel_travels_alone() -> None:
    job = Job("run", 2 << 20, actors=1, seconds=1.0, tickets=8, port=0)
    assert min(PARCEL_BYTES, OFFER_BYTES) < job.size
    tickets = [msgspec.Raw(msgspec.msgpack.encode(make_ticket(job, index))) for index in range(3)]
    sent = list(Parcels(job).make(ACTOR, tickets))
    assert [unpacked(frames)[0].ticket for frames, _ in sent] == [make_ticket(job, index) for index in range(3)]
    assert [len(unpacked(frames)) for frames, _ in sent] == [1, 1, 1]
