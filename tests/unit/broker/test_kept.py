"""Records of kept trajectories: what was packed comes back, what is cut short or damaged is told apart."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from broker.protocol.errors import ProtocolError
from broker.protocol.kept import Kept, KeptFacts, file_name, pack_kept, parse_file_name, read_records, unpack_kept
from tests.unit.learner.make import make_segment, make_ticket, make_trajectory

FACTS = KeptFacts(step=3, lineage=1, version=27, fate="trained")


def test_what_was_packed_comes_back() -> None:
    kept = Kept(FACTS, make_trajectory(make_ticket(4), 0.5, segment=make_segment((9,), (7, 8), versions=(3, 4))))
    packed = pack_kept(kept)
    ((start, length, record),), end = read_records(packed)
    assert (start, length, end) == (0, len(packed), len(packed))
    back = unpack_kept(record)
    assert back.facts == FACTS
    assert back.trajectory.head == kept.trajectory.head
    (one,), (other,) = back.trajectory.segments, kept.trajectory.segments
    assert one.version_runs == other.version_runs
    for name in ("token_ids_T", "loss_mask_T", "logprobs_T"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_half_written_record_is_left_for_later() -> None:
    first, second = (pack_kept(Kept(FACTS, make_trajectory(make_ticket(group)))) for group in (0, 1))
    records, end = read_records(first + second[:-1])
    assert (len(records), end) == (1, len(first))
    records, end = read_records((first + second)[end:])
    assert (len(records), end) == (1, len(second))
    assert read_records(b"") == ([], 0)


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        [b"\x80"],
        ["text"],
        [msgpack.packb({"step": -1, "lineage": 1, "version": 1, "fate": ""}), b"", b""],
        [msgpack.packb({"step": 1, "lineage": 1, "version": 1, "fate": "trained"}), b"ERGN\x01\x00", b"\xc1"],
    ],
)
def test_what_is_no_record_is_refused(record: object) -> None:
    with pytest.raises(ProtocolError):
        unpack_kept(record)


def test_a_record_with_a_flipped_bit_is_refused_or_another() -> None:
    packed = bytearray(pack_kept(Kept(FACTS, make_trajectory())))
    place = packed.index(b"ERGN")
    packed[place] ^= 1
    ((_, _, record),), _ = read_records(bytes(packed))
    with pytest.raises(ProtocolError, match="preamble"):
        unpack_kept(record)


def test_names_of_files() -> None:
    assert parse_file_name(file_name(12, 3)) == (12, 3)
    assert [parse_file_name(name) for name in ("00000001-0.msgpack.tmp", "1-0.msgpack", "notes.txt")] == [None] * 3
