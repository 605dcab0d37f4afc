"""Damaged deltas: refused before anything is written, in words that say what is wrong; or they are another delta."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.protocol.delta_records import HEADER
from broker.protocol.deltas import apply_delta, fold
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.weights import Bytes
from tests.unit.weights.delta_samples import NUM_BYTES, SPECS, applied, encode, loops, read_records

__all__ = ["loops"]

OLD = np.random.default_rng(1).integers(0, 256, NUM_BYTES, np.uint8)


def _next(fraction: float) -> Bytes:
    new = OLD.copy()
    chosen = np.flatnonzero(np.random.default_rng(2).random(NUM_BYTES) < fraction)
    new[chosen] += 1
    return new


PAYLOADS = [encode(OLD, _next(fraction)).tobytes() for fraction in (0.02, 0.3, 1.0)]


def refused_or_valid(damaged: bytes) -> None:
    """Damage raises ProtocolError and leaves the target, or it is a delta: then it is a harmless one, and folds."""
    target = OLD.copy()
    try:
        num_written = apply_delta(damaged, SPECS, target)
    except ProtocolError:
        assert np.array_equal(target, OLD)
        with pytest.raises(ProtocolError) as raised:
            fold([PAYLOADS[0], damaged, PAYLOADS[2]], SPECS)
        assert raised.value.code is ErrorCode.BAD_MESSAGE
        return
    assert 0 <= num_written <= NUM_BYTES
    both = applied(PAYLOADS[0], target)
    assert np.array_equal(applied(fold([damaged, PAYLOADS[0]], SPECS), OLD), both)


@given(st.sampled_from(PAYLOADS), st.data())
@settings(deadline=None, max_examples=300)
def test_a_flipped_bit_is_refused_or_is_another_delta(payload: bytes, data: st.DataObject) -> None:
    damaged = bytearray(payload)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), min_size=1, max_size=3)):
        damaged[bit // 8] ^= 1 << bit % 8
    refused_or_valid(bytes(damaged))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_truncation_within_a_record_is_refused(payload: bytes) -> None:
    ends, end = {0}, 0
    for record in read_records(payload, SPECS):
        end += HEADER.size + record.packed.nbytes
        ends.add(end)
    for size in range(len(payload)):
        refused_or_valid(payload[:size])
        if size not in ends:
            with pytest.raises(ProtocolError):
                apply_delta(payload[:size], SPECS, OLD.copy())


@given(st.binary(max_size=200))
@example(HEADER.pack(0, 1, 1, 0))
@example(bytes(HEADER.size))
@settings(deadline=None)
def test_random_bytes_are_refused_or_valid(noise: bytes) -> None:
    refused_or_valid(noise)


def frame(content: bytes) -> bytes:
    packed: bytes = zstandard.ZstdCompressor().compress(content)
    return packed


def record(block: int, num_values: int, num_gaps: int, packed: bytes) -> bytes:
    return HEADER.pack(block, num_values, num_gaps, len(packed)) + packed


BYTES = 3  # the block of the elements of one byte: 67 and 5 of them
ONE = record(BYTES, 1, 1, frame(b"\0\0\1"))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (ONE[:-1], "packed bytes"),
        (ONE + b"\0", "allowed: 16 and its frame"),
        (ONE + ONE, "of block 3; allowed: 4 to 3"),
        (ONE + record(1, 1, 1, frame(bytes(6))), "of block 1; allowed: 4 to 3"),
        (record(4, 1, 1, frame(b"\0\0\1")), "of block 4; allowed: 1 to 3"),
        (record(2**32 - 1, 1, 1, frame(b"\0\0\1")), "of block 4294967295"),
        (record(BYTES, 0, 0, frame(b"")), "0 changed elements; allowed: 1 to 72"),
        (record(BYTES, 73, 73, frame(bytes(219))), "73 changed elements"),
        (record(BYTES, 1, 2, frame(bytes(5))), "2 gaps"),
        (record(BYTES, 2, 1, frame(bytes(4))), "1 gaps"),
        (record(BYTES, 1, 1, frame(b"\x48\0\1")), "changes element 72; allowed: below 72"),
        (record(BYTES, 2, 2, frame(b"\x24\x23\0\0\1\1")), "changes element 72"),
        (record(BYTES, 1, 1, frame(b"\xff\xff\1")), "names no element"),
        (record(BYTES, 2, 2, frame(b"\xff\0\xff\0\1\1")), "gaps for 1 elements; allowed: 2"),
        (record(BYTES, 1, 1, b"no frame at all"), "no zstd frame"),
        (record(BYTES, 1, 1, b""), "no zstd frame"),
        (record(BYTES, 1, 1, frame(b"\0\0\1") + b"more"), "does not decompress"),
        (record(BYTES, 1, 1, frame(b"\0\0\1")[:-1]), "does not decompress"),
        (record(BYTES, 1, 1, frame(bytes(1 << 24))), "a frame of 16777216 bytes; allowed: 3"),
        (record(BYTES, 1, 1, zstandard.ZstdCompressor(write_content_size=False).compress(b"\0\0\1")), "frame"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(payload: bytes, words: str) -> None:
    target = OLD.copy()
    # A good record first: it must not be written either.
    good = record(0, 1, 1, frame(b"\0\0\2" + bytes(7)))
    with pytest.raises(ProtocolError, match=words):
        apply_delta(good + payload, SPECS, target)
    assert np.array_equal(target, OLD)
    with pytest.raises(ProtocolError, match=words):
        fold([good + payload], SPECS)


def test_what_a_frame_claims_is_believed_only_up_to_its_tensor() -> None:
    """A frame that claims 2^40 bytes is refused by its header alone, and one that holds more than it claims by zstd."""
    huge = b"\x28\xb5\x2f\xfd\xc0\x50" + (1 << 40).to_bytes(8, "little") + b"\x03\0\0"
    with pytest.raises(ProtocolError, match="a frame of 1099511627776 bytes"):
        apply_delta(record(BYTES, 1, 1, huge), SPECS, OLD.copy())
    liar = bytearray(frame(bytes(200)))
    assert liar[4] == 0x20  # one segment, one byte of size, no checksum
    liar[5] = 3
    with pytest.raises(ProtocolError, match="does not decompress"):
        apply_delta(record(BYTES, 1, 1, bytes(liar)), SPECS, OLD.copy())
