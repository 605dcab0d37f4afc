"""Frames and codec: what goes in comes out; what is wrong raises ProtocolError and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol import frames
from broker.protocol.codec import trajectory_from_message, trajectory_to_message
from broker.protocol.commands import COMMANDS, Deliver, Issue, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message, decode, encode
from broker.protocol.trajectory import Mode, Segment, Trajectory, VersionRun
from tests.unit.broker.samples import make_segment, make_ticket, make_trajectory


def over_the_wire(message: Message) -> Message:
    return decode([bytes(frame) for frame in encode(message)])


@pytest.mark.parametrize("body", [None, Deliver])
def test_trajectory_survives_the_wire(body: type[Deliver] | None) -> None:
    sent = make_trajectory(make_ticket("a1", Mode.EVAL), num_segments=3)
    message = trajectory_to_message(sent, body) if body else trajectory_to_message(sent)
    received = trajectory_from_message(over_the_wire(message))
    assert received.head == sent.head
    assert len(received.segments) == 3
    for mine, theirs in zip(sent.segments, received.segments, strict=True):
        np.testing.assert_array_equal(mine.token_ids_T, theirs.token_ids_T)
        np.testing.assert_array_equal(mine.loss_mask_T, theirs.loss_mask_T)
        np.testing.assert_array_equal(mine.logprobs_T, theirs.logprobs_T)
        assert mine.version_runs == theirs.version_runs
        assert all(isinstance(run, VersionRun) for run in theirs.version_runs)


def test_every_array_is_a_view_of_its_frame() -> None:
    wire = [bytes(frame) for frame in encode(trajectory_to_message(make_trajectory(make_ticket("a1"))))]
    received = trajectory_from_message(decode(wire))
    assert received.segments[0].logprobs_T.base is not None
    assert not received.segments[0].token_ids_T.flags.writeable


def broken(**change: Any) -> Trajectory:
    trajectory = make_trajectory(make_ticket("a1"))
    return replace(trajectory, segments=(replace(make_segment(), **change),))


def with_logprob(value: float, index: int = -1) -> np.ndarray[Any, np.dtype[np.float32]]:
    logprobs_T = make_segment().logprobs_T.copy()
    logprobs_T[index] = value
    return logprobs_T


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version_runs": (VersionRun(1, 2, 2),)}, "count 2 tokens, the loss mask 3"),
        ({"version_runs": (VersionRun(1, 2, 3), VersionRun(1, 3, 0))}, "counts are positive"),
        ({"version_runs": (VersionRun(-1, 2, 3),)}, "not negative"),
        ({"logprobs_T": with_logprob(0.5)}, "log-prob 0.5"),
        ({"logprobs_T": with_logprob(float("nan"))}, "log-prob nan"),
        ({"logprobs_T": with_logprob(float("-inf"))}, "log-prob -inf"),
        ({"logprobs_T": with_logprob(-1.0, index=0)}, "not sampled"),
        ({"logprobs_T": make_segment().logprobs_T[:-1]}, "must be equal"),
        ({"logprobs_T": make_segment().logprobs_T.astype(np.float64)}, "dtype float64"),
        ({"token_ids_T": make_segment().token_ids_T.reshape(2, 3)}, "one-dimensional"),
        ({"token_ids_T": -make_segment().token_ids_T}, "token id -5"),
    ],
)
def test_a_malformed_trajectory_is_refused_on_both_sides(change: dict[str, Any], says: str) -> None:
    trajectory = broken(**change)
    with pytest.raises(ProtocolError, match=says) as caught:
        trajectory_to_message(trajectory)
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    segment = trajectory.segments[0]
    good = trajectory_to_message(make_trajectory(make_ticket("a1")))
    body = good.body | {"segments": [{"version_runs": [list(run) for run in segment.version_runs]}]}
    arrays = (segment.token_ids_T, segment.loss_mask_T, segment.logprobs_T)
    with pytest.raises(ProtocolError):
        trajectory_from_message(over_the_wire(Message("TRAJECTORY", body, arrays)))


def test_a_mask_byte_is_0_or_1() -> None:
    wire = [bytes(frame) for frame in encode(trajectory_to_message(make_trajectory(make_ticket("a1"))))]
    wire[3] = b"\0\0\0\1\1\2"
    with pytest.raises(ProtocolError, match="byte 2"):
        trajectory_from_message(decode(wire))


def test_array_count_and_order_are_checked() -> None:
    message = trajectory_to_message(make_trajectory(make_ticket("a1")))
    with pytest.raises(ProtocolError, match="2 arrays for 1 segments"):
        trajectory_from_message(replace(message, arrays=message.arrays[:2]))
    with pytest.raises(ProtocolError, match=r"token_ids has dtype <f4"):
        trajectory_from_message(replace(message, arrays=message.arrays[::-1]))


def test_an_unknown_key_and_a_wrong_type_are_named() -> None:
    body = {"request_id": "r", "tickets": [make_ticket("a1").model_dump(mode="json") | {"colour": "red"}]}
    with pytest.raises(ProtocolError, match=r"tickets\.0\.colour is 'red'"):
        parse_body(Message("ISSUE", body), Issue)
    body["tickets"] = [make_ticket("a1").model_dump(mode="json") | {"attempt": "1"}]
    with pytest.raises(ProtocolError, match=r"tickets\.0\.attempt is '1'"):
        parse_body(Message("ISSUE", body), Issue)


def test_another_major_version_is_named_in_a_sentence() -> None:
    wire = [b"ERGN\x02\x05", *encode(Message("HELLO"))[1:]]
    with pytest.raises(ProtocolError, match=r"peer speaks protocol 2\.5, this side 1\.0") as caught:
        decode(wire)
    assert caught.value.code is ErrorCode.BAD_VERSION
    assert caught.value.fatal


def decode_all(wire: list[bytes]) -> None:
    """Everything a server does with bytes before it looks at its state."""
    message = decode(wire)
    spec = COMMANDS.get(message.command)
    if spec is not None:
        parse_body(message, spec.body)
        if message.arrays:
            trajectory_from_message(message)


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_arbitrary_frames_raise_only_protocol_errors(wire: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode_all(wire)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SPECS = st.lists(
    st.tuples(st.sampled_from(sorted(frames.DTYPES)), st.lists(st.integers(-1, 2**62), max_size=3)), max_size=4
)


@given(
    command=st.sampled_from(sorted(COMMANDS)) | st.text(max_size=8),
    body=JSON,
    specs=SPECS | JSON,
    raw=st.lists(st.binary(max_size=32), max_size=4),
)
def test_arbitrary_envelopes_raise_only_protocol_errors(command: str, body: Any, specs: Any, raw: list[bytes]) -> None:
    envelope = msgpack.packb({"t": command, "b": body, "a": specs})
    try:
        decode_all([frames.PREAMBLE, envelope, *raw])
    except ProtocolError:
        return


VALID = [bytes(frame) for frame in encode(trajectory_to_message(make_trajectory(make_ticket("a1"), num_segments=2)))]


@settings(max_examples=400)
@given(st.data())
def test_a_damaged_trajectory_raises_only_protocol_errors(data: st.DataObject) -> None:
    wire = list(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(wire) - 1))
        frame = bytearray(wire[index])
        start = data.draw(st.integers(0, len(frame)))
        frame[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        wire[index] = bytes(frame)
    try:
        decode_all(wire)
        received = trajectory_from_message(decode(wire))  # also where the damage has hit the command's name
    except ProtocolError:
        return
    assert all(isinstance(segment, Segment) for segment in received.segments)
    for segment in received.segments:
        assert segment.num_sampled == int(segment.loss_mask_T.sum())
        assert np.isfinite(segment.logprobs_T).all()
