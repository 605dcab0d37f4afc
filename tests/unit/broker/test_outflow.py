"""Sending is bounded in bytes: by the peer's credit and by what the network has not taken."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import zmq

from broker.exchange.outflow import TRACKED_BYTES, Outflow, Run
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Limits, Message, decode, encode

NO_BOUND = 1 << 40


def message(num_bytes: int) -> Message:
    return Message("DELIVER", arrays=(np.zeros(num_bytes, dtype=np.uint8),))


def taken(outflow: Outflow, max_queued_bytes: int = NO_BOUND) -> list[str] | Message | None:
    item = outflow.next(max_queued_bytes)
    return item.ticket_ids if isinstance(item, Run) else item


def test_credit_in_bytes_is_overstepped_by_one_message_at_most() -> None:
    outflow = Outflow()
    for num in range(5):
        outflow.add_results([(num, 0, f"t{num}")])
    outflow.allow(100)
    sent = []
    while (item := taken(outflow)) is not None:
        sent.append(item)
        outflow.sent(message(60))
    assert sent == [["t0"], ["t1"]]
    outflow.allow(90)  # an older credit that was overtaken changes nothing
    outflow.allow(121)
    assert taken(outflow) == ["t2"]
    outflow.sent(message(60))
    assert outflow.next(NO_BOUND) is None
    outflow.allow(None)
    assert [taken(outflow), taken(outflow), taken(outflow)] == [["t3"], ["t4"], None]


def test_neighbours_of_one_parcel_go_out_together_and_in_order() -> None:
    outflow = Outflow()
    letter = Message("DEAD")
    for parcel, index, ticket_id in ((1, 0, "a"), (1, 2, "c"), (2, 0, "d"), (1, 1, "b")):
        outflow.add_results([(parcel, index, ticket_id)])
    outflow.add(letter)
    outflow.add_results([(1, 3, "e")])
    assert outflow.next(NO_BOUND) == Run(1, [0, 2], ["a", "c"])
    assert outflow.next(NO_BOUND) == Run(2, [0], ["d"])
    assert outflow.next(NO_BOUND) == Run(1, [1], ["b"])
    assert outflow.next(NO_BOUND) is letter
    assert outflow.next(NO_BOUND) == Run(1, [3], ["e"])


def test_nothing_overtakes_a_result() -> None:
    outflow = Outflow()
    letter = Message("DEAD")
    outflow.add_results([(0, 0, "t0")])
    outflow.add(letter)
    outflow.allow(0)
    assert outflow.next(NO_BOUND) is None
    outflow.allow(1)
    assert taken(outflow) == ["t0"]
    assert outflow.next(NO_BOUND) is letter


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender, context.socket(zmq.PULL) as receiver:
        sender.setsockopt(zmq.LINGER, 0)
        receiver.setsockopt(zmq.RCVHWM, 1)
        receiver.setsockopt(zmq.RCVTIMEO, 10_000)
        receiver.connect(f"tcp://127.0.0.1:{sender.bind_to_random_port('tcp://127.0.0.1')}")
        yield sender, receiver


def test_what_the_network_has_not_taken_is_counted(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    sender, receiver = pair
    outflow, size, num = Outflow(), 8 << 20, 10
    outflow.add_results([(0, 0, "t0")])
    sender.send_multipart(outflow.track([b"small"]), copy=False)
    assert outflow.queued_bytes == 0
    for _ in range(num):
        sender.send_multipart(outflow.track([b"small", bytes(size)]), copy=False)
    receiver.recv_multipart()
    assert outflow.queued_bytes > TRACKED_BYTES
    assert outflow.blocked(TRACKED_BYTES)
    assert outflow.next(TRACKED_BYTES) is None
    for _ in range(num):
        assert len(receiver.recv_multipart()[1]) == size
    while outflow.queued_bytes:  # the last tracker is told by ZeroMQ's thread
        pass
    assert not outflow.blocked(TRACKED_BYTES)
    assert taken(outflow, TRACKED_BYTES) == ["t0"]


def test_a_message_larger_than_the_limit_is_refused_undecoded() -> None:
    frames = encode(message(1000))
    frames[1] = b"\xc1" + bytes(frames[1])  # no msgpack: nobody looks at it
    with pytest.raises(ProtocolError, match=r"a message of \d+ bytes; at most 1000 are allowed") as caught:
        decode(frames, Limits(max_message_bytes=1000))
    assert caught.value.code is ErrorCode.BAD_FRAME
