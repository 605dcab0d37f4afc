"""Parcels: what goes in comes out; what is not well-formed is refused on both sides, with ticket, segment and value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.array_checks import ARRAY_DTYPES, BLOCK_TOKENS
from broker.protocol.codec import (
    MAX_BODY_BYTES,
    TOKEN_BYTES,
    Parcel,
    array_bytes,
    pack_trajectories,
    pick,
    read_parcel,
    unpack_trajectories,
)
from broker.protocol.commands import MAX_ITEMS, PARCEL_BYTES, Deliver, TrajectoryBody, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message, decode, encode
from broker.protocol.trajectory import Integrity, Mode, Segment, Trajectory, VersionRun
from tests.unit.broker.samples import make_segment, make_ticket, make_trajectory

BODIES = [TrajectoryBody, Deliver]


def over_the_wire(message: Message) -> Message:
    return decode([bytes(frame) for frame in encode(message)])


def assert_same(received: Sequence[Trajectory], sent: Sequence[Trajectory]) -> None:
    for theirs, mine in zip(received, sent, strict=True):
        assert theirs.head == mine.head
        for seen, ours in zip(theirs.segments, mine.segments, strict=True):
            np.testing.assert_array_equal(seen.token_ids_T, ours.token_ids_T)
            np.testing.assert_array_equal(seen.loss_mask_T, ours.loss_mask_T)
            np.testing.assert_array_equal(seen.logprobs_T, ours.logprobs_T)
            assert seen.version_runs == ours.version_runs
            assert all(isinstance(run, VersionRun) for run in seen.version_runs)


def of_tokens(ticket_id: str, num_tokens: int) -> Trajectory:
    """A trajectory of so many tokens, of which the last three are sampled."""
    return replace(make_trajectory(make_ticket(ticket_id)), segments=(make_segment(num_prompt=num_tokens - 3),))


def three() -> list[Trajectory]:
    """Mixed sizes, several segments, one without a sampled token."""
    silent = Segment(np.array([4], np.int32), np.array([False]), np.zeros(1, np.float32), ())
    return [
        make_trajectory(make_ticket("a1", Mode.EVAL), num_segments=3),
        of_tokens("b1", 1000),
        replace(make_trajectory(make_ticket("c1")), segments=(make_segment(), silent)),
    ]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_parcel_survives_the_wire(body: type[Parcel], count: int) -> None:
    sent = three()[:count]
    message = pack_trajectories(sent, body)
    assert message.command == body.COMMAND
    assert tuple(array.dtype for array in message.arrays) == ARRAY_DTYPES
    assert message.array_bytes == sum(map(array_bytes, sent))
    assert_same(unpack_trajectories(over_the_wire(message), body), sent)


def test_every_array_is_a_view_of_its_frame() -> None:
    wire = [bytes(frame) for frame in encode(pack_trajectories(three()))]
    for trajectory in unpack_trajectories(decode(wire)):
        for segment in trajectory.segments:
            for array, frame in zip(
                (segment.token_ids_T, segment.loss_mask_T, segment.logprobs_T), wire[2:], strict=True
            ):
                assert np.shares_memory(array, np.frombuffer(frame, np.uint8))
                assert not array.flags.writeable


def test_one_segment_is_sent_without_a_copy() -> None:
    trajectory = make_trajectory(make_ticket("a1"))
    assert pack_trajectories([trajectory]).arrays[0] is trajectory.segments[0].token_ids_T


def test_other_byte_order_and_strides_are_put_right_by_the_sender() -> None:
    segment = make_segment()
    odd = replace(
        segment,
        token_ids_T=segment.token_ids_T.astype(">i4"),
        logprobs_T=np.repeat(segment.logprobs_T, 2)[::2],
    )
    trajectory = replace(make_trajectory(make_ticket("a1")), segments=(odd,))
    assert_same(unpack_trajectories(over_the_wire(pack_trajectories([trajectory]))), [trajectory])


def test_a_computed_reward_arrives_as_a_number() -> None:
    trajectory = make_trajectory(make_ticket("a1"))
    head = msgspec.structs.replace(trajectory.head, reward=np.mean([0.5, 1.0]), reward_components={"x": np.float64(2)})
    received = unpack_trajectories(over_the_wire(pack_trajectories([replace(trajectory, head=head)])))[0].head
    assert (received.reward, received.reward_components) == (0.75, {"x": 2.0})


# --- one segment that is wrong, at the sender and at the receiver


def broken(**change: Any) -> Trajectory:
    trajectory = make_trajectory(make_ticket("b1"))
    return replace(trajectory, segments=(make_segment(), replace(make_segment(), **change)))


def with_logprob(value: float, index: int = -1) -> np.ndarray[Any, np.dtype[np.float32]]:
    logprobs_T = make_segment().logprobs_T.copy()
    logprobs_T[index] = value
    return logprobs_T


def as_sent(trajectories: Sequence[Trajectory]) -> Message:
    """What a sender that checks nothing would send."""
    items = [
        {
            "head": msgspec.to_builtins(trajectory.head),
            "segments": [
                {"num_tokens": segment.token_ids_T.size, "version_runs": [list(run) for run in segment.version_runs]}
                for segment in trajectory.segments
            ],
        }
        for trajectory in trajectories
    ]
    segments = [segment for trajectory in trajectories for segment in trajectory.segments]
    arrays = (
        np.concatenate([segment.token_ids_T.ravel() for segment in segments]),
        np.concatenate([segment.loss_mask_T for segment in segments]),
        np.concatenate([segment.logprobs_T for segment in segments]),
    )
    return Message("TRAJECTORY", msgpack.packb({"items": items}), arrays)


WHERE = "trajectory of ticket b1: segment 1: "


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version_runs": (VersionRun(1, 2, 2),)}, WHERE + "the version runs count 2 tokens, the loss mask 3"),
        ({"version_runs": ()}, WHERE + "the version runs count 0 tokens, the loss mask 3"),
        (
            {"version_runs": (VersionRun(1, 2, 3), VersionRun(1, 3, 0))},
            "TRAJECTORY: items[1].segments[1].version_runs[1][2] is 0: Expected `int` >= 1",
        ),
        (
            {"version_runs": (VersionRun(-1, 2, 3),)},
            "TRAJECTORY: items[1].segments[1].version_runs[0][0] is -1: Expected `int` >= 0",
        ),
        (
            {"logprobs_T": with_logprob(0.5)},
            WHERE + "log-prob 0.5; those of sampled tokens are finite and at most 0.001",
        ),
        ({"logprobs_T": with_logprob(float("nan"))}, WHERE + "log-prob nan; those of sampled tokens are finite"),
        ({"logprobs_T": with_logprob(float("inf"))}, WHERE + "log-prob inf; those of sampled tokens are finite"),
        ({"logprobs_T": with_logprob(float("-inf"))}, WHERE + "log-prob -inf; those of sampled tokens are finite"),
        ({"logprobs_T": with_logprob(-1.0, index=0)}, WHERE + "log-prob -1.0 of a token that was not sampled"),
        ({"logprobs_T": with_logprob(5e-4, index=0)}, "of a token that was not sampled; there it must be 0"),
        ({"logprobs_T": with_logprob(float("nan"), index=0)}, WHERE + "log-prob nan of a token that was not sampled"),
        ({"token_ids_T": -make_segment().token_ids_T}, WHERE + "token id -5; ids are not negative"),
    ],
)
def test_a_malformed_trajectory_is_refused_on_both_sides(change: dict[str, Any], says: str) -> None:
    parcel = [make_trajectory(make_ticket("a1")), broken(**change)]
    with pytest.raises(ProtocolError, match=re.escape(says)) as caught:
        pack_trajectories(parcel)
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    for read in (read_parcel, unpack_trajectories):
        with pytest.raises(ProtocolError, match=re.escape(says)) as caught:
            read(over_the_wire(as_sent(parcel)))
        assert caught.value.code is ErrorCode.BAD_MESSAGE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logprobs_T": make_segment().logprobs_T[:-1]}, "logprobs has shape (5,), token_ids (6,); they must be equal"),
        ({"loss_mask_T": make_segment().loss_mask_T[1:]}, "loss_mask has shape (5,), token_ids (6,)"),
        ({"logprobs_T": make_segment().logprobs_T.astype(np.float64)}, "logprobs has dtype float64; it must be <f4"),
        ({"loss_mask_T": make_segment().loss_mask_T.astype(np.uint8)}, "loss_mask has dtype uint8; it must be |b1"),
        ({"token_ids_T": make_segment().token_ids_T.reshape(2, 3)}, "it must be one-dimensional and not empty"),
        ({"token_ids_T": make_segment().token_ids_T[:0]}, "it must be one-dimensional and not empty"),
    ],
)
def test_arrays_that_do_not_fit_are_found_at_the_sender(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(WHERE) + ".*" + re.escape(says)):
        pack_trajectories([make_trajectory(make_ticket("a1")), broken(**change)])


@pytest.mark.parametrize(("position", "value"), [(3, 0.5), (BLOCK_TOKENS + 3, 0.5), (-1, float("nan"))])
def test_a_large_trajectory_is_checked_to_its_end(position: int, value: float) -> None:
    trajectory = of_tokens("a1", 2 * BLOCK_TOKENS + 7)
    pack_trajectories([trajectory])
    trajectory.segments[0].logprobs_T[position] = value
    with pytest.raises(ProtocolError, match=f"ticket a1: segment 0: log-prob {value}"):
        pack_trajectories([trajectory])


def test_a_mask_byte_is_0_or_1() -> None:
    wire = [bytes(frame) for frame in encode(pack_trajectories([make_trajectory(make_ticket("a1"), num_segments=2)]))]
    for mask in (b"\0\0\0\1\1\2", b"\0\0\0\1\2\0"):  # in the second one the bytes add up
        wire[3] = b"\0\0\0\1\1\1" + mask
        with pytest.raises(ProtocolError, match="ticket a1: segment 1: loss_mask holds byte 2; a mask byte is 0 or 1"):
            read_parcel(decode(wire))


# --- a parcel that is wrong


def test_array_count_order_and_shape_are_checked() -> None:
    message = pack_trajectories([make_trajectory(make_ticket("a1"))])
    for arrays in (message.arrays[:2], (*message.arrays, message.arrays[0]), ()):
        with pytest.raises(ProtocolError, match=f"{len(arrays)} arrays; a parcel has token_ids, loss_mask, logprobs"):
            read_parcel(over_the_wire(replace(message, arrays=arrays)))
    with pytest.raises(ProtocolError, match=r"token_ids has dtype <f4; it must be <i4"):
        read_parcel(over_the_wire(replace(message, arrays=message.arrays[::-1])))
    square = (message.arrays[0].reshape(2, 3), *message.arrays[1:])
    with pytest.raises(ProtocolError, match=r"token_ids has shape \[2, 3\]; it has one dimension"):
        read_parcel(over_the_wire(replace(message, arrays=square)))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("surplus", [-1, 1])
def test_arrays_of_another_length_than_the_segments_are_refused(which: int, surplus: int) -> None:
    message = pack_trajectories(three())
    array = message.arrays[which]
    arrays = [*message.arrays]
    arrays[which] = array[:surplus] if surplus < 0 else np.append(array, array[-1:])
    name, num_tokens = ("token_ids", "loss_mask", "logprobs")[which], array.size
    says = f"{name} has {num_tokens + surplus} elements, the segments count {num_tokens} tokens"
    with pytest.raises(ProtocolError, match=says):
        read_parcel(over_the_wire(replace(message, arrays=tuple(arrays))))


@pytest.mark.parametrize("num_tokens", [0, -1, 2**53])
def test_a_segment_of_an_impossible_length_is_refused(num_tokens: int) -> None:
    message = pack_trajectories([make_trajectory(make_ticket("a1"))])
    body = msgpack.unpackb(message.body)
    body["items"][0]["segments"][0]["num_tokens"] = num_tokens
    with pytest.raises(ProtocolError, match=rf"items\[0\]\.segments\[0\]\.num_tokens is {num_tokens}: Expected `int`"):
        read_parcel(over_the_wire(replace(message, body=msgpack.packb(body))))
    body["items"][0]["segments"][0]["num_tokens"] = 2**53 - 1
    with pytest.raises(ProtocolError, match="the segments count 9007199254740991 tokens"):
        read_parcel(over_the_wire(replace(message, body=msgpack.packb(body))))


def test_two_items_of_one_ticket_are_refused_on_both_sides() -> None:
    twice = [*three(), make_trajectory(make_ticket("b1"))]
    for attempt in (lambda: pack_trajectories(twice), lambda: read_parcel(over_the_wire(as_sent(twice)))):
        with pytest.raises(ProtocolError, match="two of its items are of the same ticket"):
            attempt()


def test_a_parcel_has_1_to_256_items() -> None:
    many = [make_trajectory(make_ticket(f"a{i}")) for i in range(MAX_ITEMS + 1)]
    assert_same(unpack_trajectories(over_the_wire(pack_trajectories(many[:-1]))), many[:-1])
    for attempt in (lambda: pack_trajectories(many), lambda: read_parcel(over_the_wire(as_sent(many)))):
        with pytest.raises(ProtocolError, match="TRAJECTORY: items: Expected `array` of length <= 256"):
            attempt()
    with pytest.raises(ProtocolError, match=r"items is \[\]: Expected `array` of length >= 1"):
        pack_trajectories([])


def test_several_share_parcel_bytes_and_one_has_any_size() -> None:
    most = PARCEL_BYTES // TOKEN_BYTES
    assert len(unpack_trajectories(pack_trajectories([of_tokens("a1", most - 6), of_tokens("b1", 6)]))) == 2
    large = [of_tokens("a1", most - 6), of_tokens("b1", 7)]
    says = rf"2 items have {(most + 1) * TOKEN_BYTES} bytes of arrays; together they have {PARCEL_BYTES} at most"
    for attempt in (lambda: pack_trajectories(large), lambda: read_parcel(over_the_wire(as_sent(large)))):
        with pytest.raises(ProtocolError, match=says):
            attempt()
    alone = [of_tokens("a1", 4 * most)]
    assert_same(unpack_trajectories(over_the_wire(pack_trajectories(alone))), alone)


def test_heads_that_no_envelope_holds_are_found_at_the_sender() -> None:
    heavy = Integrity(findings=("x" * (MAX_BODY_BYTES // 3),))
    parcel = [make_trajectory(make_ticket(f"a{i}")) for i in range(3)]
    parcel = [replace(one, head=msgspec.structs.replace(one.head, integrity=heavy)) for one in parcel]
    over_the_wire(pack_trajectories(parcel[:2]))
    with pytest.raises(
        ProtocolError, match=rf"the heads of 3 items, the first of ticket a0, have \d+ bytes.*{MAX_BODY_BYTES}"
    ):
        pack_trajectories(parcel)
    fullest = Integrity(findings=("x" * (MAX_BODY_BYTES - 700),))
    one = replace(parcel[0], head=msgspec.structs.replace(parcel[0].head, integrity=fullest))
    assert MAX_BODY_BYTES - 400 < len(pack_trajectories([one]).body) <= MAX_BODY_BYTES
    over_the_wire(pack_trajectories([one]))


# --- any parcel


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """Prompt and sampled tokens, as they come."""
    mask_T = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=12)))
    num_sampled = int(mask_T.sum())
    cuts = sorted(draw(st.sets(st.integers(1, num_sampled - 1), max_size=3))) if num_sampled > 1 else []
    ends = [0, *cuts, num_sampled]
    lengths = [end - start for start, end in itertools.pairwise(ends) if end > start]
    runs = tuple(VersionRun(draw(st.integers(0, 3)), draw(st.integers(0, 2**53 - 1)), length) for length in lengths)
    values = st.floats(-100, 0, width=32)
    logprobs_T = np.array([draw(values) if sampled else 0.0 for sampled in mask_T], np.float32)
    token_ids_T = np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(mask_T), max_size=len(mask_T))), "<i4")
    return Segment(token_ids_T, mask_T, logprobs_T, runs)


@st.composite
def parcels(draw: st.DrawFn) -> list[Trajectory]:
    """One to five trajectories of different tickets."""
    traces = draw(st.lists(st.lists(segments(), min_size=1, max_size=3), min_size=1, max_size=5))
    return [
        replace(make_trajectory(make_ticket(f"a{number}")), segments=tuple(trace))
        for number, trace in enumerate(traces)
    ]


@given(parcels(), st.sampled_from(BODIES))
def test_any_parcel_survives_the_wire(sent: list[Trajectory], body: type[Parcel]) -> None:
    assert_same(unpack_trajectories(over_the_wire(pack_trajectories(sent, body)), body), sent)


@given(parcels(), st.data())
def test_what_is_picked_is_the_parcel_of_the_trajectories_picked(sent: list[Trajectory], data: st.DataObject) -> None:
    indexes = data.draw(st.lists(st.integers(0, len(sent) - 1), min_size=1, unique=True))
    message = over_the_wire(pack_trajectories(sent))
    picked = pick(message, read_parcel(message), indexes)
    alone = pack_trajectories([sent[i] for i in indexes])
    assert [bytes(frame) for frame in encode(picked)] == [bytes(frame) for frame in encode(alone)]


def test_what_is_picked_for_the_learner_is_a_delivery() -> None:
    message = over_the_wire(pack_trajectories(three()))
    picked = pick(message, parse_body(message, Deliver), [2, 0])
    assert picked.command == "DELIVER"
    assert_same(unpack_trajectories(over_the_wire(picked), Deliver), [three()[2], three()[0]])
