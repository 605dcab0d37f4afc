"""Deltas: bit-identical whatever the bits, harmless when applied twice, folded without loss; damage is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.protocol.delta_records import ELEMENT, HEADER, PASS, Mode, gaps_between, pack_sparse, read_records
from broker.protocol.deltas import BLOCK_BYTES, DeltaEncoder, apply_delta, fold
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.weights import DTYPES, Bytes, TensorSpec, lay_out

# One tensor for each size of an element, an empty one, and one after which nothing is aligned to a word any more.
SPECS = lay_out(
    [
        ("a", "float64", (9,)),
        ("b", "float32", (3, 5)),
        ("c", "bfloat16", (101,)),
        ("d", "float16", (40, 4)),
        ("empty", "bfloat16", (0, 7)),
        ("e", "uint8", (67,)),
        ("f", "bool", (5,)),
    ]
)
NUM_BYTES = SPECS[-1].offset + SPECS[-1].num_bytes
# Quiet and signalling NaNs with payloads, infinities, both zeros, the smallest and largest numbers.
BITS = {
    1: (0x00, 0x01, 0x7F, 0x80, 0xFF),
    2: (0x0000, 0x8000, 0x7FC1, 0xFF81, 0x7F81, 0x7E55, 0x7F80, 0xFF80, 0x0001, 0xFFFF),
    4: (0x00000000, 0x80000000, 0x7FC12345, 0xFF800001, 0x7F800000, 0x00000001, 0xFFFFFFFF),
    8: (0, 1 << 63, 0x7FF8000000001234, 0xFFF0000000000001, 0x7FF0000000000000, 1, (1 << 64) - 1),
}


def itemsize_of(spec: TensorSpec) -> int:
    return DTYPES[spec.dtype][1]


@st.composite
def snapshots(draw: st.DrawFn, num: int) -> list[Bytes]:
    """Consecutive versions: of each tensor nothing, everything, or some elements change, often to special values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    versions = [rng.integers(0, 256, NUM_BYTES, np.uint8)]
    while len(versions) < num:
        new = versions[-1].copy()
        for spec in SPECS:
            elements = new[spec.offset : spec.offset + spec.num_bytes].view(ELEMENT[itemsize_of(spec)])
            fraction = draw(st.sampled_from((0.0, 0.02, 0.3, 0.74, 0.9, 1.0)))
            chosen = np.flatnonzero(rng.random(elements.size) < fraction)
            special = np.array(BITS[itemsize_of(spec)], elements.dtype)
            elements[chosen] = special[rng.integers(0, special.size, chosen.size)]
            if draw(st.booleans()):
                elements[chosen] = rng.integers(0, 256, chosen.size * elements.itemsize, np.uint8).view(elements.dtype)
        versions.append(new)
    return versions


def encode(old: Bytes, new: Bytes, specs: Sequence[TensorSpec] = SPECS) -> Bytes:
    base, encoder, num_changed = old.copy(), DeltaEncoder(), 0
    for index, spec in enumerate(specs):
        part = slice(spec.offset, spec.offset + spec.num_bytes)
        bits = ELEMENT[itemsize_of(spec)]
        expected = int(np.count_nonzero(old[part].view(bits) != new[part].view(bits)))
        assert encoder.add(index, itemsize_of(spec), base[part], new[part]) == expected
        num_changed += expected
    payload = encoder.finish()
    assert np.array_equal(base, new)
    assert payload.size == encoder.num_bytes
    assert (payload.size == 0) == (num_changed == 0)
    assert not payload.flags.writeable
    return payload


def applied(payload: bytes | Bytes, old: Bytes, specs: Sequence[TensorSpec] = SPECS) -> Bytes:
    target = old.copy()
    apply_delta(payload, specs, target)
    return target


@given(snapshots(2))
@settings(deadline=None)
def test_any_two_versions_come_out_bit_identical_also_when_applied_twice(versions: list[Bytes]) -> None:
    old, new = versions
    payload = encode(old, new)
    once = applied(payload, old)
    assert np.array_equal(once, new)
    assert np.array_equal(applied(payload, once), new)


@given(snapshots(5), st.data())
@settings(deadline=None)
def test_any_way_from_one_version_to_another_by_deltas_and_folds_is_the_same(
    versions: list[Bytes], data: st.DataObject
) -> None:
    payloads = [encode(old, new) for old, new in itertools.pairwise(versions)]
    start, cut = 0, sorted(data.draw(st.sets(st.integers(1, 4))) | {4})
    target, folds = versions[0].copy(), []
    for end in cut:
        folds.append(fold(payloads[start:end], SPECS))
        apply_delta(folds[-1], SPECS, target)
        assert np.array_equal(target, versions[end])
        start = end
    of_folds = fold(folds, SPECS)
    assert np.array_equal(applied(of_folds, versions[0]), versions[-1])
    # Over any version that it covers, too: values are absolute.
    assert np.array_equal(applied(of_folds, versions[-1]), versions[-1])


def test_nothing_changed_is_an_empty_payload_and_folds_away() -> None:
    old = np.zeros(NUM_BYTES, np.uint8)
    payload = encode(old, old)
    assert payload.size == 0
    assert apply_delta(payload, SPECS, old) == 0
    assert fold([], SPECS).size == fold([payload, b""], SPECS).size == 0


def test_a_negative_zero_and_a_nan_of_other_bits_are_changes() -> None:
    specs = lay_out([("w", "float32", (4,))])
    old = np.array([0.0, 1.0, np.nan, 2.0], np.float32)
    new = np.array([-0.0, 1.0, np.nan, 2.0], np.float32)
    new.view(np.uint32)[2] ^= 1
    payload = encode(old.view(np.uint8), new.view(np.uint8), specs)
    assert read_records(payload, specs)[0].num_values == 2
    assert np.array_equal(applied(payload, old.view(np.uint8), specs).view(np.uint32), new.view(np.uint32))


@pytest.mark.parametrize(
    "changed",
    [
        [0],
        [3 * BLOCK_BYTES],
        [PASS - 1, 2 * PASS],  # gaps of PASS - 1 and PASS
        [0, BLOCK_BYTES // 2 - 1, BLOCK_BYTES // 2, 2 * BLOCK_BYTES + 7],  # around the blocks' borders
        [PASS, 2 * PASS + 1, 3 * PASS + 1],
    ],
)
def test_gaps_wider_than_sixteen_bits_and_across_blocks(changed: list[int]) -> None:
    specs = lay_out([("w", "bfloat16", (3 * BLOCK_BYTES + 1,))])
    old = np.zeros(specs[0].num_bytes, np.uint8)
    new = old.copy()
    new.view(np.uint16)[changed] = 0x7FC1
    payload = encode(old, new, specs)
    assert np.array_equal(applied(payload, old, specs), new)
    assert read_records(payload, specs)[0].num_values == len(changed)
    assert payload.size < 200


def test_a_tensor_that_changed_nearly_everywhere_is_dense_in_several_blocks() -> None:
    specs = lay_out([("w", "bfloat16", (2 * BLOCK_BYTES + 5,))])
    old, new = (np.random.default_rng(i).integers(0, 256, specs[0].num_bytes, np.uint8) for i in range(2))
    payload = encode(old, new, specs)
    assert read_records(payload, specs)[0].mode is Mode.DENSE
    assert payload.size < new.size * 1.01
    assert np.array_equal(applied(payload, old, specs), new)


def test_an_encoder_refuses_what_does_not_fit_and_leaves_the_base() -> None:
    base = np.zeros(8, np.uint8)
    encoder = DeltaEncoder()
    encoder.add(1, 2, base.copy(), bytes(8))
    for index, itemsize, target, new in (
        (1, 2, base, bytes(8)),
        (2, 3, base, b"1" * 8),
        (2, 2, base, b"1" * 6),
        (2, 2, base[:3], b"1" * 3),
        (2, 2, base[::2], b"1" * 4),
    ):
        with pytest.raises(ValueError, match=f"tensor {index}"):
            encoder.add(index, itemsize, target, new)
    assert not base.any()
    assert encoder.num_bytes == 0


def test_a_target_that_is_no_such_snapshot_is_refused() -> None:
    for target in (np.zeros(NUM_BYTES - 1, np.uint8), np.zeros(NUM_BYTES, np.int8)):
        with pytest.raises(ValueError, match="target"):
            apply_delta(b"", SPECS, target)
    whole = np.zeros(NUM_BYTES, np.uint8)
    whole.flags.writeable = False
    with pytest.raises(ValueError, match="target"):
        apply_delta(b"", SPECS, whole)


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
    assert np.array_equal(applied(damaged, target), target)
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
@example(HEADER.pack(0, 0, 1, 1, 0))
@example(bytes(HEADER.size))
@settings(deadline=None)
def test_random_bytes_are_refused_or_valid(noise: bytes) -> None:
    refused_or_valid(noise)


def frame(content: bytes) -> bytes:
    packed: bytes = zstandard.ZstdCompressor().compress(content)
    return packed


def record(tensor: int, mode: int, num_values: int, num_gaps: int, packed: bytes) -> bytes:
    return HEADER.pack(tensor, mode, num_values, num_gaps, len(packed)) + packed


BYTE_TENSOR = [spec.name for spec in SPECS].index("e")  # 67 elements of one byte
ONE = record(BYTE_TENSOR, Mode.SPARSE, 1, 1, frame(b"\0\0\1"))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (ONE[:-1], "packed bytes"),
        (ONE + b"\0", "allowed: 29 and its frame"),
        (ONE + ONE, r"is of tensor \d; allowed: \d to"),
        (record(len(SPECS), 0, 1, 1, frame(b"\0\0\1")), "is of tensor 7"),
        (record(BYTE_TENSOR, 2, 1, 1, frame(b"\0\0\1")), "mode 2"),
        (record(BYTE_TENSOR, 0, 0, 0, frame(b"")), "0 changed elements; allowed: 1 to 67"),
        (record(BYTE_TENSOR, 0, 68, 68, frame(bytes(204))), "68 changed elements"),
        (record(BYTE_TENSOR, 0, 1, 2, frame(bytes(5))), "2 gaps"),
        (record(BYTE_TENSOR, 0, 2, 1, frame(bytes(4))), "1 gaps"),
        (record(BYTE_TENSOR, 0, 1, 1, frame(b"\x43\0\1")), "changes element 67; allowed: below 67"),
        (record(BYTE_TENSOR, 0, 1, 1, frame(b"\xff\xff\1")), "names no element"),
        (record(BYTE_TENSOR, 1, 66, 0, frame(bytes(66))), "66 values and 0 gaps; allowed: 67, 0"),
        (record(BYTE_TENSOR, 1, 67, 1, frame(bytes(69))), "67 values and 1 gaps"),
        (record(BYTE_TENSOR, 0, 1, 1, b"no frame at all"), "no zstd frame"),
        (record(BYTE_TENSOR, 0, 1, 1, b""), "no zstd frame"),
        (record(BYTE_TENSOR, 0, 1, 1, frame(b"\0\0\1") + b"more"), "does not decompress"),
        (record(BYTE_TENSOR, 0, 1, 1, frame(b"\0\0\1")[:-1]), "does not decompress"),
        (record(BYTE_TENSOR, 0, 1, 1, frame(bytes(1 << 24))), "a frame of 16777216 bytes; allowed: 3"),
        (record(BYTE_TENSOR, 0, 1, 1, zstandard.ZstdCompressor(write_content_size=False).compress(b"\0\0\1")), "frame"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(payload: bytes, words: str) -> None:
    target = OLD.copy()
    # A good record first: it must not be written either.
    good = record(0, Mode.SPARSE, 1, 1, frame(b"\0\0" + bytes(8)))
    with pytest.raises(ProtocolError, match=words):
        apply_delta(good + payload, SPECS, target)
    assert np.array_equal(target, OLD)
    with pytest.raises(ProtocolError, match=words):
        fold([good + payload], SPECS)


def test_what_a_frame_claims_is_believed_only_up_to_its_tensor() -> None:
    """A frame that claims 2^40 bytes is refused by its header alone, and one that holds more than it claims by zstd."""
    huge = b"\x28\xb5\x2f\xfd\xc0\x50" + (1 << 40).to_bytes(8, "little") + b"\x03\0\0"
    with pytest.raises(ProtocolError, match="a frame of 1099511627776 bytes"):
        apply_delta(record(BYTE_TENSOR, 0, 1, 1, huge), SPECS, OLD.copy())
    liar = bytearray(frame(bytes(200)))
    assert liar[4] == 0x20  # one segment, one byte of size, no checksum
    liar[5] = 3
    with pytest.raises(ProtocolError, match="does not decompress"):
        apply_delta(record(BYTE_TENSOR, 0, 1, 1, bytes(liar)), SPECS, OLD.copy())


def test_a_sparse_record_of_every_element_folds_to_a_dense_one() -> None:
    specs = lay_out([("w", "uint8", (6,))])
    zstd = zstandard.ZstdCompressor()
    halves = [pack_sparse(zstd, 0, gaps_between(np.arange(i, 6, 2)), np.full(3, i + 1, np.uint8)) for i in range(2)]
    folded = fold(halves, specs)
    assert read_records(folded, specs)[0].mode is Mode.DENSE
    assert applied(folded, np.zeros(6, np.uint8), specs).tolist() == [1, 2, 1, 2, 1, 2]
