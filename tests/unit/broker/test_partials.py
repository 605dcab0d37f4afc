"""Partials on the wire: what goes in comes out, and what is not well-formed is refused at both ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from broker.protocol.commands import MAX_SNAPSHOT_BYTES, PartialHead, UnfinishedTurn
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message, decode, encode
from broker.protocol.partials import Partial, pack_continue, pack_handover, read_handover, unpack_continue
from broker.protocol.trajectory import PolicyVersion, VersionRun
from tests.unit.broker.samples import make_segment, make_ticket


def make_partial(num_segments: int = 2, snapshot: bytes = b"\x00state", **head: object) -> Partial:
    facts = PartialHead(**{"num_turns": 2, "total_s": 1.5, **head})  # type: ignore[arg-type]
    return Partial(facts, tuple(make_segment() for _ in range(num_segments)), snapshot)


def over_the_wire(message: Message) -> Message:
    return decode([bytes(frame) for frame in encode(message)])


@pytest.mark.parametrize("snapshot", [b"", b"\x00state"])
def test_what_was_handed_over_comes_out_byte_for_byte(snapshot: bytes) -> None:
    turn = UnfinishedTurn(num_tokens=3, began_open=True)
    partial = make_partial(snapshot=snapshot, turn=turn, num_forced_stops=1)
    handover = over_the_wire(pack_handover("a1", partial))
    assert read_handover(handover).ticket_id == "a1"
    ticket = make_ticket("a1", attempt=1)
    received, again = unpack_continue(over_the_wire(pack_continue(ticket, handover)))
    assert (received, again.head, again.snapshot) == (ticket, partial.head, snapshot)
    for mine, theirs in zip(again.segments, partial.segments, strict=True):
        assert mine.version_runs == theirs.version_runs
        for name in ("token_ids_T", "loss_mask_T", "logprobs_T"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def test_the_oldest_version_is_that_of_any_segment() -> None:
    runs = (VersionRun(1, 9, 2), VersionRun(1, 3, 1)), (VersionRun(1, 10, 3),), ()
    segments = tuple(make_segment(runs=each) for each in runs)
    assert Partial(PartialHead(), segments, b"").oldest_version == PolicyVersion(1, 3)
    assert Partial(PartialHead(), segments[2:], b"").oldest_version is None
    assert Partial(PartialHead(), segments, b"").num_sampled == 6


SEGMENT = make_segment()
MANY = 360_000  # runs of one token: a head that has no room for a ticket beside it


def of_many_runs() -> Partial:
    parts = [make_segment(0, (VersionRun(1, 1 << 40, 1), VersionRun(1, 1 << 41, 1)) * (MANY // 20)) for _ in range(10)]
    return Partial(PartialHead(), tuple(parts), b"")


BAD: list[tuple[Callable[[], Partial], str]] = [
    (lambda: make_partial(0), "segments is (): Expected `array` of length >= 1"),
    (of_many_runs, "partial of ticket a1: its heads have"),
    (lambda: make_partial(num_turns=-1), "head.num_turns is -1"),
    (lambda: make_partial(total_s=float("nan")), "head.total_s is nan"),
    (lambda: make_partial(turn=UnfinishedTurn(num_tokens=7)), "head.turn.num_tokens is 7; the last segment has 6"),
    (lambda: make_partial(snapshot=bytes(MAX_SNAPSHOT_BYTES + 1)), f"at most {MAX_SNAPSHOT_BYTES}"),
    (
        lambda: dataclasses.replace(
            make_partial(), segments=(SEGMENT, dataclasses.replace(SEGMENT, version_runs=(VersionRun(1, 2, 2),)))
        ),
        "partial of ticket a1: segment 1: the version runs count 2 tokens, the loss mask 3",
    ),
    (
        lambda: dataclasses.replace(
            make_partial(), segments=(dataclasses.replace(SEGMENT, logprobs_T=np.ones(6, np.float32)),)
        ),
        "partial of ticket a1: segment 0: log-prob 1.0",
    ),
]


@pytest.mark.parametrize(("make", "text"), BAD, ids=range(len(BAD)))  # type: ignore[arg-type]
def test_a_malformed_partial_is_refused_where_it_was_made(make: Callable[[], Partial], text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        pack_handover("a1", make())
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert text.replace("is ()", "is []") in caught.value.message


def test_arrays_of_another_number_type_or_shape_are_refused() -> None:
    good = pack_handover("a1", make_partial())
    tokens, mask, logprobs, snapshot = good.arrays
    for arrays, text in [
        ((tokens, mask, logprobs), "3 arrays"),
        ((tokens, mask, logprobs, snapshot.view("|b1")), "snapshot has dtype |b1"),
        ((tokens, mask, logprobs, snapshot.reshape(2, -1)), "snapshot has shape [2, 3]"),
        ((tokens[:-1], mask, logprobs, snapshot), "token_ids has 11 elements, the segments count 12"),
    ]:
        with pytest.raises(ProtocolError, match=r".") as caught:
            read_handover(Message("HANDOVER", good.body, arrays))
        assert text in caught.value.message
