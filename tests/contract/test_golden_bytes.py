"""Golden bytes: what was once on the wire in a version is on it for ever, whoever packs it, and means the same."""

from __future__ import annotations

from pathlib import Path

import msgpack
import numpy as np
import pytest

from broker.protocol.array_checks import ARRAY_DTYPES
from broker.protocol.codec import unpack_trajectories
from broker.protocol.commands import COMMANDS, Deliver, TrajectoryBody, parse_body
from broker.protocol.frames import PROTOCOL_MAJOR, decode
from tests.contract import golden

NAMES = sorted(golden.ENVELOPES)
# A receiver of a version understands the older ones of its major version.
OF_ALL_VERSIONS = sorted(golden.ROOT.glob(f"{PROTOCOL_MAJOR}.*/*.hex"))
PARCELS = {"trajectory": TrajectoryBody, "deliver": Deliver}


def test_every_message_has_its_file_and_every_file_its_message() -> None:
    assert sorted(path.stem for path in golden.CURRENT.glob("*.hex")) == NAMES == sorted(golden.messages())


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_on_the_wire_are_the_golden_ones(name: str) -> None:
    assert golden.text_of(golden.by_code(name)) == (golden.CURRENT / f"{name}.hex").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_another_encoder_makes_the_same_bytes(name: str) -> None:
    assert golden.text_of(golden.by_hand(name)) == (golden.CURRENT / f"{name}.hex").read_text()


@pytest.mark.parametrize("path", OF_ALL_VERSIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_golden_bytes_still_mean_the_same(path: Path) -> None:
    wire = golden.frames_of(path)
    message = decode(wire)
    body = parse_body(message, COMMANDS[message.command].body)
    by_hand = golden.ENVELOPES[path.stem]
    assert message.command == by_hand["t"]
    assert golden.plain(body) == by_hand["b"]
    assert [[array.dtype.str, list(array.shape)] for array in message.arrays] == by_hand["a"]
    assert [array.tobytes() for array in message.arrays] == wire[2:]


@pytest.mark.parametrize("name", NAMES)
def test_another_decoder_reads_the_same_facts(name: str) -> None:
    wire = golden.by_code(name)
    envelope = msgpack.unpackb(wire[1])
    assert envelope == golden.ENVELOPES[name]
    for frame, mine, (dtype, shape) in zip(wire[2:], golden.messages()[name].arrays, envelope["a"], strict=True):
        np.testing.assert_array_equal(np.frombuffer(frame, dtype).reshape(shape), mine)


@pytest.mark.parametrize("name", sorted(PARCELS))
def test_every_field_of_the_golden_trajectories_arrives(name: str) -> None:
    received = unpack_trajectories(decode(golden.frames_of(golden.CURRENT / f"{name}.hex")), PARCELS[name])
    sent = golden.trajectories()
    assert [len(trajectory.segments) for trajectory in received] == [2, 1]
    for mine, theirs in zip(sent, received, strict=True):
        assert theirs.head == mine.head
        for ours, seen in zip(mine.segments, theirs.segments, strict=True):
            assert seen.version_runs == ours.version_runs
            arrays = (seen.token_ids_T, seen.loss_mask_T, seen.logprobs_T)
            assert tuple(array.dtype for array in arrays) == ARRAY_DTYPES
            np.testing.assert_array_equal(seen.token_ids_T, ours.token_ids_T)
            np.testing.assert_array_equal(seen.loss_mask_T, ours.loss_mask_T)
            np.testing.assert_array_equal(seen.logprobs_T, ours.logprobs_T)
