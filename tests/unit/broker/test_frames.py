"""Frames: malformed ones are refused before they are decoded; and no bytes raise anything but a ProtocolError."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.exchange.dispatch import about
from broker.protocol.codec import unpack_trajectories
from broker.protocol.commands import COMMANDS, Deliver, Hello, TrajectoryBody, error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import DTYPES, PREAMBLE, Limits, Message, decode, encode
from broker.protocol.trajectory import Segment
from tests.contract import golden


def test_another_major_version_is_named_in_a_sentence() -> None:
    wire = [b"ERGN\x02\x05", *encode(Message("HELLO"))[1:]]
    with pytest.raises(ProtocolError, match=r"peer speaks protocol 2\.5, this side 1\.0") as caught:
        decode(wire)
    assert caught.value.code is ErrorCode.BAD_VERSION
    assert caught.value.fatal


def envelope(**change: Any) -> bytes:
    packed: bytes = msgpack.packb({"t": "X", "b": {}, "a": []} | change)
    return packed


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        ([PREAMBLE], "1 frames; a message has 2 to 5"),
        ([PREAMBLE, envelope(), *[b""] * 4], "6 frames; a message has 2 to 5"),
        ([b"ERGX\x01\x00", envelope()], "not an Ergon preamble"),
        ([PREAMBLE + b"\0", envelope()], "not an Ergon preamble"),
        ([PREAMBLE, b""], "the envelope is not a msgpack map"),
        ([PREAMBLE, b"\xc1"], "the envelope is not a msgpack map"),
        ([PREAMBLE, b"\x90"], "the envelope is not a msgpack map"),
        ([PREAMBLE, envelope() + b"\0"], "trailing characters"),
        ([PREAMBLE, envelope(c=1)], "unknown field `c`"),
        ([PREAMBLE, msgpack.packb({"t": "X", "b": {}})], "missing required field `a`"),
        ([PREAMBLE, envelope(b=[1])], "the body, b of the envelope, is not a map"),
        ([PREAMBLE, envelope(b=None)], "the body, b of the envelope, is not a map"),
        ([PREAMBLE, envelope(t=b"X")], "Expected `str`, got `bytes`"),
        ([PREAMBLE, envelope(t="X" * 400)], "an envelope of 412 bytes; at most 400 are allowed"),
        ([PREAMBLE, envelope(), b""], "0 arrays are announced, 1 frames follow"),
        ([PREAMBLE, envelope(a=[["<i4", [1]]])], "1 arrays are announced, 0 frames follow"),
        ([PREAMBLE, envelope(a=[["<c8", [1]]]), b"x" * 8], "array 0 has dtype '<c8'; allowed: |b1"),
        ([PREAMBLE, envelope(a=[["<i4", [-1]]]), b"xxxx"], "array 0 has shape [-1]"),
        ([PREAMBLE, envelope(a=[["<i4", [1, 1, 1]]]), b"xxxx"], "array 0 has shape [1, 1, 1]"),
        ([PREAMBLE, envelope(a=[["<i4", [2]]]), b"xxxx"], "array 0: <i4 [2] does not fill 4 bytes"),
        ([PREAMBLE, envelope(a=[["|u1", [90]]]), b"x" * 90], "array 0 has 90 bytes; at most 80 are allowed"),
        ([PREAMBLE, envelope(a=[["<i8", [0, 2**62]]]), b""], "array 0 has shape [0, 4611686018427387904]"),
        ([PREAMBLE, envelope(a=[["|u1", [80]]] * 3), *[b"x" * 80] * 3], "at most 250 are allowed"),
    ],
)
def test_a_malformed_message_is_refused_and_ends_the_connection(wire: list[bytes], says: str) -> None:
    limits = Limits(max_frames=5, max_envelope_bytes=400, max_array_bytes=80, max_message_bytes=500, max_dims=2)
    if len(wire) == 5:
        limits = replace(limits, max_message_bytes=250)
    with pytest.raises(ProtocolError) as caught:
        decode(wire, limits)
    assert says in caught.value.message
    assert caught.value.code is ErrorCode.BAD_FRAME
    assert caught.value.fatal


def test_nesting_of_any_depth_is_refused_with_a_sentence() -> None:
    for depth in (10, *range(700, 1010), 5_000, 500_000):  # where Python's stack ends, reading and showing end apart
        deep = b"\x91" * depth + b"\x01"
        for packed in (b"\x81\xa4role" + deep, b"\x81\xa1x" + deep, b"\x81" + deep + b"\x01"):
            with pytest.raises(ProtocolError):
                parse_body(Message("HELLO", packed), Hello)
        with pytest.raises(ProtocolError):
            read_all([PREAMBLE, b"\x83\xa1t\xa5HELLO\xa1b\x81\xa4role" + deep + b"\xa1a\x90"])


# --- any bytes


def read_all(wire: list[bytes]) -> None:
    """Everything a server or a client does with bytes before it looks at its state."""
    message = decode(wire)
    assert isinstance(about(message), str)
    spec = COMMANDS.get(message.command)
    if spec is not None:
        parse_body(message, spec.body)
    for body in (TrajectoryBody, Deliver):  # also where damage has hit the command's name
        for trajectory in unpack_trajectories(message, body):
            assert all(isinstance(segment, Segment) for segment in trajectory.segments)
            for segment in trajectory.segments:
                assert segment.num_sampled == int(segment.loss_mask_T.sum())
                assert np.isfinite(segment.logprobs_T).all()
            assert math.isfinite(trajectory.head.reward)


def survives(wire: list[bytes]) -> None:
    try:
        read_all(wire)
    except ProtocolError as error:
        refusal = error
    else:
        return
    assert len(refusal.message) < 2_000
    assert decode([bytes(frame) for frame in encode(error_message(refusal))]).command == "ERROR"


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_arbitrary_frames_raise_only_protocol_errors(wire: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        read_all(wire)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=16)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SPECS = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(-1, 2**62), max_size=3)), max_size=4)


@given(
    command=st.sampled_from(sorted(COMMANDS)) | st.text(max_size=8),
    body=VALUES,
    specs=SPECS | VALUES,
    raw=st.lists(st.binary(max_size=32), max_size=4),
)
def test_arbitrary_envelopes_raise_only_protocol_errors(command: str, body: Any, specs: Any, raw: list[bytes]) -> None:
    survives([PREAMBLE, msgpack.packb({"t": command, "b": body, "a": specs}), *raw])


@given(command=st.sampled_from(sorted(COMMANDS)), packed=st.binary(min_size=1, max_size=60))
def test_arbitrary_bytes_in_the_body_raise_only_protocol_errors(command: str, packed: bytes) -> None:
    name = msgpack.packb(command)
    survives([PREAMBLE, b"\x83\xa1t" + name + b"\xa1b" + packed + b"\xa1a\x90"])
    survives([PREAMBLE, b"\x83\xa1t" + name + b"\xa1b\x81" + packed + b"\xa1a\x90"])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


@settings(max_examples=400)
@given(name=st.sampled_from(sorted(golden.ENVELOPES)), value=VALUES, data=st.data())
def test_any_value_in_any_place_raises_only_protocol_errors(name: str, value: Any, data: st.DataObject) -> None:
    wire = golden.by_hand(name)
    content = msgpack.unpackb(wire[1])
    *way, last = data.draw(st.sampled_from(sorted(places(content), key=str)))
    owner = content
    for step in way:
        owner = owner[step]
    owner[last] = value
    survives([wire[0], msgpack.packb(content), *wire[2:]])


@settings(max_examples=400)
@given(name=st.sampled_from(sorted(golden.ENVELOPES)), data=st.data())
def test_damage_anywhere_raises_only_protocol_errors(name: str, data: st.DataObject) -> None:
    wire = golden.by_hand(name)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(wire) - 1))
        frame = bytearray(wire[index])
        start = data.draw(st.integers(0, len(frame)))
        frame[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        wire[index] = bytes(frame)
    survives(wire)


@given(name=st.sampled_from(sorted(golden.ENVELOPES)), index=st.integers(0, 4), frame=st.binary(max_size=64))
def test_any_frame_in_the_place_of_another_raises_only_protocol_errors(name: str, index: int, frame: bytes) -> None:
    wire = golden.by_hand(name)
    wire[index % len(wire)] = frame
    survives(wire)
